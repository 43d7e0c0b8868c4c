/* Peers that are slow, or silent: thousands of connections that nothing comes from, and such as say hello a byte a
   second. They cost a bounded sum of memory, are dropped in time, and keep no honest peer from being served meanwhile.
   The same for a store's server. */
#include "agent_help.h"
#include <sys/un.h>

enum { HALF_OPEN = 10000, TRICKLES = 64, HANDSHAKES = 1024, SECOND_US = 1000000, SERVED_US = 5000000,
       EACH_KIB = 12 };

static int64_t skew_us;
static int64_t slow_clock(void *user) {    /* a thousand times slower than the day: what passes is what the test adds */
    (void)user;
    return 1000000000 + test_now_us() / 1000 + LOAD(&skew_us);
}

/* ---- who is to be kept from his work: a listener or a store, and clients of his, in one thread ---- */

typedef struct target {
    const char *name, *address;        /* NULL: a store over tcp */
    /* while it runs */
    tprpc_context *ctx, *client;       /* polled in turn */
    heap heap;
    tprpc_listener *listener;
    tprpc_store *store;
    char at[128];
} target;

static tprpc_context *context_of(heap *memory, int64_t (*clock_us)(void *)) {
    tprpc_context_desc desc = {0};
    tprpc_context *ctx = NULL;
    desc.spin_us = TPRPC_NOW;
    desc.clock_us = clock_us;
    if (memory) {
        desc.allocator.alloc = heap_alloc;
        desc.allocator.free = heap_free;
        desc.allocator.user = memory;
    }
    if (getenv("TEST_LOG")) {
        desc.log = show_log;
        desc.user = (void *)(uintptr_t)"slow";
    }
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    return ctx;
}

static tprpc_store *store_of(tprpc_context *ctx, const char *url, bool serve) {
    tprpc_store_desc desc = {0};
    tprpc_store *store = NULL;
    desc.url = url;
    desc.serve = serve;
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &desc, &store, NULL), TPRPC_OK);
    return store;
}

static void target_open(target *t, int64_t (*clock_us)(void *)) {
    tprpc_listener_desc desc = {0};
    t->ctx = context_of(&t->heap, clock_us);
    t->client = context_of(NULL, NULL);
    if (!t->address) {
        snprintf(t->at, sizeof t->at, "tcp://127.0.0.1:%d", socket_free_port());
        t->store = store_of(t->ctx, t->at, true);
        return;
    }
    desc.addresses = &t->address;
    desc.address_count = 1;
    REQUIRE_EQ_INT(tprpc_listen(t->ctx, &desc, &t->listener, NULL), TPRPC_OK);
    snprintf(t->at, sizeof t->at, "%s", tprpc_listener_address(t->listener, NULL));
}

static void target_close(target *t) {
    CHECK_EQ_INT(tprpc_context_destroy(t->client), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(t->ctx), TPRPC_OK);
    CHECK_EQ_INT(t->heap.blocks, 0);
}

/* One thread drives both, so the target has a budget: without one it takes in more strangers in a poll than there are
   places, before the honest peer has had its turn to say hello. */
static void turns(target *t, int count) {
    for (int i = 0; i < count; i++) {
        tprpc_poll(t->ctx, TPRPC_NOW, 1000);
        tprpc_poll(t->client, TPRPC_NOW, 0);
    }
}

/* Not so long that who is silent times out meanwhile. */
static bool turns_until(target *t, const int *flag, int least) {
    const int64_t end = test_now_us() + (int64_t)SERVED_US * TEST_SLOWDOWN;
    while (LOAD(flag) < least && test_now_us() < end) turns(t, 1);
    return LOAD(flag) >= least;
}

static int done;
static tprpc_pipe *accepted;

static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    (void)error; (void)user;
    CHECK_EQ_INT(status, TPRPC_OK);
    accepted = pipe;
    ADD(&done, 1);
}

static void on_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)user;
    if (!CHECK_EQ_INT(status, TPRPC_OK)) fprintf(stderr, "%s\n", error->text);
    else CHECK_EQ_INT(message->metadata_size, 5);
    ADD(&done, 1);
}

static void on_stored(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    (void)value; (void)user;
    if (!CHECK_EQ_INT(status, TPRPC_OK)) fprintf(stderr, "%s\n", error->text);
    CHECK_EQ_INT(size, 8);
    ADD(&done, 1);
}

/* A new peer comes, is served and goes; however many others stand about. */
static void serve_honest(target *t) {
    tprpc_pipe_desc desc = {0};
    tprpc_message message = text_of("hello");
    tprpc_pipe *pipe = NULL;
    STORE(&done, 0);
    accepted = NULL;
    if (t->store) {
        tprpc_store *client = store_of(t->client, t->at, false);
        REQUIRE_EQ_INT(tprpc_store_add(client, "n", 1, on_stored, NULL), TPRPC_OK);
        REQUIRE(turns_until(t, &done, 1));
        tprpc_store_close(client);
        return;
    }
    desc.address = t->at;
    REQUIRE_EQ_INT(tprpc_accept(t->listener, on_accepted, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_connect(t->client, &desc, &pipe, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_write(pipe, &message, NULL, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(pipe, NULL, on_read, NULL), TPRPC_OK);
    REQUIRE(turns_until(t, &done, 1) && accepted);
    REQUIRE_EQ_INT(tprpc_pipe_read(accepted, NULL, on_read, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_write(accepted, &message, NULL, NULL), TPRPC_OK);
    REQUIRE(turns_until(t, &done, 3));
    tprpc_pipe_close(pipe);
    tprpc_pipe_close(accepted);
}

/* ---- strangers ---- */

/* Connects as a stranger to where the target listens; the n-th of many, who have an address of their own by the
   thousand, so that no run of these leaves ports in use to the next. */
static int stranger_connect(const target *t, int n) {
    struct sockaddr_in from, to;
    const struct linger at_once = {1, 0};
    memset(&from, 0, sizeof from);
    memset(&to, 0, sizeof to);
    if (strncmp(t->at, "shm://", 6) == 0) {
        struct sockaddr_un name;       /* an abstract one */
        const size_t size = strlen(t->at + 6);
        int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&name, 0, sizeof name);
        name.sun_family = AF_UNIX;
        REQUIRE(fd >= 0 && size + 2 <= sizeof name.sun_path);
        memcpy(name.sun_path + 1, t->at + 6, size);
        const socklen_t whole = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + size);
        if (connect(fd, (struct sockaddr *)(void *)&name, whole) != 0) {
            perror("connect");
            REQUIRE(false);
        }
        return fd;
    }
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    from.sin_family = to.sin_family = AF_INET;
    from.sin_addr.s_addr = htonl(INADDR_LOOPBACK + 256 + (uint32_t)(n / 1000));
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons((uint16_t)atoi(strrchr(t->at, ':') + 1));
    REQUIRE(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once) == 0);
    REQUIRE(bind(fd, (struct sockaddr *)(void *)&from, sizeof from) == 0);
    if (connect(fd, (struct sockaddr *)(void *)&to, sizeof to) != 0) {
        perror("connect");
        REQUIRE(false);
    }
    return fd;
}

typedef struct crowd { int begun, go, over, dropped; } crowd;   /* seen by all processes */
static crowd *crowds;
static target *attacked;
static int crowd_first, crowd_size;

static void crowd_main(void *arg) {
    struct rlimit files;
    (void)arg;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    REQUIRE(getrlimit(RLIMIT_NOFILE, &files) == 0);
    files.rlim_cur = files.rlim_max;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &files) == 0);
    int *fds = (int *)calloc((size_t)crowd_size, sizeof *fds);
    REQUIRE(fds != NULL);
    for (int i = 0; i < crowd_size; i++) {
        fds[i] = stranger_connect(attacked, crowd_first + i);
        ADD(&crowds->begun, 1);
    }
    while (!LOAD(&crowds->over)) test_sleep_us(1000);
    for (int i = 0; i < crowd_size; i++) {
        uint8_t byte;
        ADD(&crowds->dropped, recv(fds[i], &byte, 1, MSG_DONTWAIT) >= 0 || (errno != EAGAIN && errno != EWOULDBLOCK));
        close(fds[i]);
    }
    free(fds);
}

/* 10,000 that connect and say nothing, from as many processes as descriptors demand. */
static void half_open(target *t) {
    const int count = HALF_OPEN / TEST_SLOWDOWN;
    struct rlimit files;
    pid_t pids[64];
    int processes = 0, served = 0;
    void *memory = mmap(NULL, sizeof *crowds, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    crowds = (crowd *)memory;
    attacked = t;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &files) == 0);
    files.rlim_cur = files.rlim_max;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &files) == 0);
    target_open(t, NULL);
    serve_honest(t);
    turns(t, 100);
    const int64_t before = t->heap.bytes;
    const int before_fds = test_count_fds(), most = files.rlim_max > 20064 ? 20000 : (int)files.rlim_max - 64;
    int64_t peak = 0;
    int peak_fds = 0;
    for (int left = count; left > 0; left -= crowd_size) {
        REQUIRE(processes < 64 && most > 0);
        crowd_first = count - left;
        crowd_size = left < most ? left : most;
        pids[processes++] = test_fork_run(crowd_main, NULL);
    }
    const int64_t end = test_now_us() + 2 * (int64_t)WAIT_MS * 1000;
    while (LOAD(&crowds->begun) < count && test_now_us() < end) {
        serve_honest(t);
        served++;
        if (t->heap.bytes > peak) peak = t->heap.bytes;
        if (test_count_fds() > peak_fds) peak_fds = test_count_fds();
    }
    CHECK_EQ_INT(LOAD(&crowds->begun), count);
    for (int i = 0; i < 2000; i++) turns(t, 1);      /* the last are in */
    for (int i = 0; i < 100; i++, served++) serve_honest(t);
    if (t->heap.bytes > peak) peak = t->heap.bytes;
    if (test_count_fds() > peak_fds) peak_fds = test_count_fds();
    CHECK(peak_fds > before_fds + HANDSHAKES / 2);
    CHECK_LE_INT(peak_fds, before_fds + HANDSHAKES + 64);
    CHECK_LE_INT(peak - before, (HANDSHAKES + 64) * (int64_t)EACH_KIB * 1024);
    STORE(&crowds->over, 1);
    for (int i = 0; i < processes; i++) CHECK_EQ_INT(test_wait_child(pids[i], 30), 0);
    CHECK(crowds->dropped >= count - HANDSHAKES);
    while (test_count_fds() > before_fds && test_now_us() < end) turns(t, 1);
    CHECK_LE_INT(test_count_fds(), before_fds);
    printf("%s: %d half-open connections of %d processes, %d honest peers served meanwhile, at most %d descriptors and "
           "%lld bytes for them; %d dropped\n", t->name, count, processes, served, peak_fds - before_fds,
           (long long)(peak - before), crowds->dropped);
    target_close(t);
}

/* ---- a byte a second ---- */

/* What an honest peer says first, learned from one. */
static size_t first_words(const target *t, uint8_t *out, size_t capacity) {
    char address[64];
    uint16_t port;
    int at = socket_listen(&port), fd;
    tprpc_context *ctx = context_of(NULL, NULL);
    tprpc_pipe *pipe = NULL;
    tprpc_store *store = NULL;
    ssize_t size = 0;
    snprintf(address, sizeof address, "tcp://127.0.0.1:%d", port);
    if (t->store) {
        store = store_of(ctx, address, false);
        REQUIRE_EQ_INT(tprpc_store_set(store, "k", "v", 1, NULL, NULL), TPRPC_OK);
    } else {
        tprpc_pipe_desc desc = {0};
        desc.address = address;
        REQUIRE_EQ_INT(tprpc_connect(ctx, &desc, &pipe, NULL), TPRPC_OK);
    }
    for (int i = 0; i < 50; i++) tprpc_poll(ctx, 1000, 0);
    REQUIRE((fd = accept(at, NULL, NULL)) >= 0);
    for (int i = 0; i < 2000 && size < 12; i++) {
        tprpc_poll(ctx, 1000, 0);
        size = recv(fd, out, capacity, MSG_DONTWAIT | MSG_PEEK);
    }
    REQUIRE(size >= 12);
    tprpc_store_close(store);
    tprpc_pipe_close(pipe);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    close(fd);
    close(at);
    return (size_t)size;
}

static int count_open(const int *fds, int count) {
    int n = 0;
    for (int i = 0; i < count; i++) {
        uint8_t bytes[64];
        const ssize_t got = recv(fds[i], bytes, sizeof bytes, MSG_DONTWAIT | MSG_PEEK);
        n += got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
    }
    return n;
}

/* They begin right, and are dropped after 10 s all the same; honest peers are served at every second. */
static void trickle(target *t) {
    uint8_t words[4096];
    int fds[TRICKLES];
    skew_us = 0;
    target_open(t, slow_clock);
    size_t size = strncmp(t->at, "shm://", 6) == 0 ? 0 : first_words(t, words, sizeof words);
    serve_honest(t);
    turns(t, 100);
    const int64_t before = t->heap.bytes;
    int64_t peak = before;
    const int before_fds = test_count_fds();
    for (int i = 0; i < TRICKLES; i++) fds[i] = stranger_connect(t, i);
    turns(t, 500);
    if (!size) memset(words, 0, size = 11);      /* over shm: it is judged when it is whole, which is one byte more */
    for (int second = 0; second < 12; second++) {
        if (second < 9) CHECK_EQ_INT(count_open(fds, TRICKLES), TRICKLES);
        for (int i = 0; i < TRICKLES; i++)
            if ((size_t)second < size) (void)!send(fds[i], words + second, 1, MSG_NOSIGNAL | MSG_DONTWAIT);
        turns(t, 20);
        serve_honest(t);
        if (t->heap.bytes > peak) peak = t->heap.bytes;
        ADD(&skew_us, SECOND_US);
        tprpc_wake(t->ctx);
        turns(t, 200);
    }
    CHECK_EQ_INT(count_open(fds, TRICKLES), 0);
    CHECK_LE_INT(peak - before, TRICKLES * (int64_t)EACH_KIB * 1024 + 65536);
    for (int i = 0; i < TRICKLES; i++) close(fds[i]);
    turns(t, 500);
    CHECK_LE_INT(test_count_fds(), before_fds);
    serve_honest(t);
    printf("%s: %d trickles, at most %lld bytes for them\n", t->name, TRICKLES, (long long)(peak - before));
    target_close(t);
}

static target targets[] = {{.name = "tcp", .address = "tcp://127.0.0.1:0"}, {.name = "shm", .address = "shm://"},
                           {.name = "store"}};

static void half_open_run(void *arg) { half_open((target *)arg); }
static void trickle_run(void *arg) { trickle((target *)arg); }

TESTS(slow) {
    for (size_t i = 0; i < sizeof targets / sizeof targets[0]; i++) {
        char name[60];
        snprintf(name, sizeof name, "half_open_%s", targets[i].name);
        test_add(name, half_open_run, &targets[i], 60);
        snprintf(name, sizeof name, "trickle_%s", targets[i].name);
        test_add(name, trickle_run, &targets[i], 30);
    }
}
