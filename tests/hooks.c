/* Every system call fails, the first time or always, while contexts, pipes and agents do their work: what was begun ends
   once, with a sentence or because another way was found; nothing is lost, leaked or hung. */
#include "agent_help.h"
extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { PATIENCE_MS = 1500, NAMES = 128 };

/* ---- the hook ---- */

typedef struct seen { char name[32]; int calls; } seen;
static seen calls[NAMES];
static size_t call_count;
static const char *failing;       /* NULL: none fails */
static const char *failing_too;   /* this one beside it, always */
static int failing_with;
static bool failing_once;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int on_call(const char *call, int64_t *size) {
    size_t i = 0;
    bool fails;
    (void)size;
    pthread_mutex_lock(&lock);
    while (i < call_count && strcmp(calls[i].name, call) != 0) i++;
    if (i == call_count) {
        REQUIRE(call_count < NAMES);
        snprintf(calls[call_count++].name, sizeof calls[0].name, "%s", call);
    }
    fails = failing && strcmp(call, failing) == 0 && (!failing_once || calls[i].calls == 0);
    calls[i].calls++;
    pthread_mutex_unlock(&lock);
    return failing_too && strcmp(call, failing_too) == 0 ? EPERM : fails ? failing_with : 0;
}

/* Memory is failed elsewhere (in_base.c, pipe.c); a lock that cannot be waited for is tried again. */
static bool is_swept(const char *call) { return strcmp(call, "alloc") != 0 && strcmp(call, "futex_wait") != 0; }

/* ---- what is done meanwhile: each returns whether it worked ---- */

typedef struct ends {
    tprpc_context *ctx[2];
    heap heap[2];
    int outcomes, good;
    tprpc_pipe *accepted;
} ends;

static void told(const tprpc_error *error, tprpc_status status) {
    if (status == TPRPC_OK) return;
    CHECK(error && error->status == status && error->text[0]);
    if (getenv("TEST_LOG") && error) fprintf(stderr, "  %s\n", error->text);
}

static bool ends_open(ends *e, const char *transports) {
    memset(e, 0, sizeof *e);
    for (int i = 0; i < 2; i++) {
        tprpc_context_desc desc = {0};
        tprpc_error error = {0};
        desc.transports = transports;
        desc.spin_us = TPRPC_NOW;
        desc.allocator.alloc = heap_alloc;
        desc.allocator.free = heap_free;
        desc.allocator.user = &e->heap[i];
        tprpc_status status = tprpc_context_create(&desc, &e->ctx[i], &error);
        told(&error, status);
        if (status != TPRPC_OK) return false;
    }
    return true;
}

static void ends_close(ends *e) {
    for (int i = 2; i-- > 0;) {
        if (e->ctx[i]) CHECK_EQ_INT(tprpc_context_destroy(e->ctx[i]), TPRPC_OK);
        CHECK_EQ_INT(e->heap[i].blocks, 0);
    }
}

static bool ends_poll(ends *e, const int *flag, int at_least) {
    const int64_t end = test_now_us() + (int64_t)(PATIENCE_MS + 10000) * 1000;
    while (*flag < at_least && test_now_us() < end)
        for (int i = 0; i < 2; i++) tprpc_poll(e->ctx[i], 1000, 0);
    return CHECK(*flag >= at_least);      /* all that was begun has ended */
}

static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    told(error, status);
    if (status == TPRPC_OK) ((ends *)user)->accepted = pipe;
}

static void on_written(tprpc_status status, const tprpc_error *error, void *user) {
    ends *e = (ends *)user;
    told(error, status);
    e->outcomes++;
    e->good += status == TPRPC_OK;
}

static void on_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    ends *e = (ends *)user;
    told(error, status);
    e->outcomes++;
    e->good += status == TPRPC_OK && message->tensor_count == 1 && filled(message->tensors[0].data, 300000, 1);
}

/* A listener on the address, a pipe to it, a large message there and one back. */
static bool messages(const char *address, const char *transports) {
    static uint8_t large[300000];
    tprpc_listener_desc listener_desc = {0};
    tprpc_pipe_desc pipe_desc = {0};
    tprpc_tensor tensor = bytes_of(large, sizeof large);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_listener *listener = NULL;
    tprpc_pipe *pipe = NULL;
    tprpc_error error = {0};
    ends e;
    fill(large, sizeof large, 1);
    bool good = ends_open(&e, transports);
    listener_desc.addresses = &address;
    listener_desc.address_count = 1;
    if (good && tprpc_listen(e.ctx[0], &listener_desc, &listener, &error) != TPRPC_OK) {
        told(&error, error.status);
        good = false;
    }
    if (good) {
        REQUIRE_EQ_INT(tprpc_accept(listener, on_accepted, &e), TPRPC_OK);
        pipe_desc.address = tprpc_listener_address(listener, NULL);
        pipe_desc.timeout_ms = PATIENCE_MS;
        if (tprpc_connect(e.ctx[1], &pipe_desc, &pipe, &error) != TPRPC_OK) {
            told(&error, error.status);
            good = false;
        }
    }
    if (good) {
        int begun = 0;
        begun += tprpc_pipe_write(pipe, &message, on_written, &e) == TPRPC_OK;
        begun += tprpc_pipe_read(pipe, NULL, on_read, &e) == TPRPC_OK;
        const int64_t end = test_now_us() + (int64_t)(PATIENCE_MS + 10000) * 1000;
        while (!e.accepted && e.outcomes < begun && test_now_us() < end)
            for (int i = 0; i < 2; i++) tprpc_poll(e.ctx[i], 1000, 0);
        if (e.accepted) {
            begun += tprpc_pipe_read(e.accepted, NULL, on_read, &e) == TPRPC_OK;
            begun += tprpc_pipe_write(e.accepted, &message, on_written, &e) == TPRPC_OK;
        }
        /* an end that hears nothing of a failure at the other one waits: then the other closes */
        for (int i = 0; e.good + 1 > e.outcomes && e.outcomes < begun && test_now_us() < end; i++)
            tprpc_poll(e.ctx[i % 2], 1000, 0);
        if (e.outcomes < begun) {
            tprpc_pipe_close(pipe);
            pipe = NULL;
        }
        ends_poll(&e, &e.outcomes, begun);
        CHECK_EQ_INT(e.outcomes, begun);
        good = e.good == 4;
    }
    tprpc_pipe_close(pipe);
    tprpc_pipe_close(e.accepted);
    tprpc_listener_close(listener);
    ends_close(&e);
    return good;
}

static bool over_tcp(void) { return messages("tcp://127.0.0.1:0", "tcp"); }
static bool over_tcp6(void) { return messages("tcp://[::1]:0", "tcp"); }
static bool over_shm(void) { return messages("shm://", "shm"); }
static bool moved_to_shm(void) { return messages("tcp://127.0.0.1:0", "shm,tcp"); }

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    on_written(status, error, user);
}

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

/* Two agents meet in a store of the kind and call each other. */
static bool agents(const char *url) {
    static const char *const names[] = {"ann", "bob"};
    tprpc_agent *both[2] = {NULL, NULL};
    tprpc_error error = {0};
    ends e;
    int begun = 0;
    bool good = ends_open(&e, "tcp");
    for (int i = 0; i < 2 && good; i++) {
        tprpc_agent_desc desc = {0};
        tprpc_method_desc echo = {0};
        desc.context = e.ctx[i];
        desc.name = names[i];
        desc.init_method = url;
        desc.rank = i;
        desc.world_size = 2;
        desc.start_timeout_ms = desc.timeout_ms = PATIENCE_MS;
        echo.name = "echo";
        echo.handler = on_echo;
        tprpc_status status = tprpc_agent_create(&desc, &both[i], &error);
        if (status == TPRPC_OK) status = tprpc_agent_register(both[i], &echo, &error);
        if (status == TPRPC_OK) status = tprpc_agent_start(both[i], on_ready, &e, &error);
        told(&error, status);
        good = status == TPRPC_OK;
        begun += good;
    }
    if (begun) ends_poll(&e, &e.outcomes, begun);
    if (good && e.good == 2) {
        tprpc_call_options options = {0};
        options.on_done = on_ready;
        options.user = &e;
        options.error = &error;
        for (int i = 0; i < 2; i++) {
            tprpc_status status = tprpc_call(both[i], names[1 - i], "echo", NULL, &options, NULL);
            told(&error, status);
            begun += status == TPRPC_OK;
        }
        ends_poll(&e, &e.outcomes, begun);
    }
    CHECK_EQ_INT(e.outcomes, begun);
    for (int i = 0; i < 2; i++)
        if (both[i]) CHECK_EQ_INT(tprpc_agent_destroy(both[i]), TPRPC_OK);
    ends_close(&e);
    return e.good == 4;
}

static bool agents_by_tcp(void) {
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    return agents(url);
}

static bool agents_by_file(void) {
    char path[250], url[300];
    snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
    return agents(url);
}

/* A thread sleeps on a loop's bell, another one rings. */
static void rung(tprpc_work *work) { work->loop = 77; }

static void *rings(void *arg) {
    void **both = (void **)arg;
    test_sleep_us(2000);
    tprpc_defer((tprpc_context *)both[0], (tprpc_work *)both[1]);
    return NULL;
}

static bool bells(void) {
    tprpc_context *ctx = NULL;
    tprpc_context_desc desc = {0};
    tprpc_work work = {0};
    tprpc_error error = {0};
    void *both[2];
    pthread_t thread;
    desc.spin_us = TPRPC_NOW;
    tprpc_status status = tprpc_context_create(&desc, &ctx, &error);
    told(&error, status);
    if (status != TPRPC_OK) return false;
    work.run = rung;
    both[0] = ctx;
    both[1] = &work;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, rings, both), 0);
    for (int i = 0; work.loop != 77 && i < 1000; i++) tprpc_poll(ctx, (int64_t)60 * 1000000, 0);
    pthread_join(thread, NULL);
    CHECK_EQ_INT(work.loop, 77);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    return true;
}

/* ---- the sweeps ---- */

static void run_failing(bool (*scenario)(void), const char *name, int with, bool once, const char *harmless) {
    const int fds = test_count_fds();
    char word[40];
    bool good;
    snprintf(word, sizeof word, " %s ", name);
    for (size_t i = 0; i < call_count; i++) calls[i].calls = 0;
    failing = name;
    failing_with = with;
    failing_once = once;
    if (getenv("TEST_LOG")) fprintf(stderr, "%s fails %s\n", name, once ? "once" : "always");
    STORE(&tprpc_test_hook, on_call);
    good = scenario();
    STORE(&tprpc_test_hook, NULL);
    failing = NULL;
    if (!CHECK_EQ_INT(test_count_fds(), fds)) fprintf(stderr, "  when %s fails\n", name);
    if (strstr(harmless, word) && !CHECK(good)) fprintf(stderr, "  %s fails %s\n", name, once ? "once" : "always");
}

/* must: calls that the scenario makes; harmless: those whose failure it gets over. Both: " a b c ". */
static void sweep(bool (*scenario)(void), const char *must, const char *harmless) {
    char name[32];
    int n = 0;
    size_t count;
    run_failing(scenario, "nothing", 0, true, " nothing ");
    count = call_count;
    for (const char *at = must; sscanf(at, "%31s%n", name, &n) == 1; at += n) {
        bool found = false;
        for (size_t i = 0; i < count; i++) found |= strcmp(calls[i].name, name) == 0 && calls[i].calls > 0;
        if (!CHECK(found)) fprintf(stderr, "  %s is not called\n", name);
    }
    for (size_t i = 0; i < count; i++) {
        if (!is_swept(calls[i].name)) continue;
        run_failing(scenario, calls[i].name, EIO, true, harmless);
        run_failing(scenario, calls[i].name, EIO, false, harmless);
    }
}

#define OPTIONS " reuseaddr nodelay keepalive keepidle keepintvl keepcnt sock_diag sock_diag_send sock_diag_recv bell_read "

TEST_LIMIT(tcp, 240) {
    sweep(over_tcp, "reuseaddr nodelay keepalive keepidle keepintvl keepcnt socket_error getsockname getpeername "
                    "getaddrinfo_numeric sock_diag sock_diag_send sock_diag_recv netns_cookie", OPTIONS);
}
TEST_LIMIT(tcp6, 240) { sweep(over_tcp6, "sock_diag_send getaddrinfo_numeric", OPTIONS); }
TEST_LIMIT(tcp_owner_by_proc, 240) {
    failing_too = "sock_diag";
    sweep(over_tcp, "sock_diag read_owner", " reuseaddr nodelay ");
    failing_too = NULL;
}
TEST_LIMIT(shm, 240) { sweep(over_shm, "fstat fstatfs get_seals memfd_create mmap", ""); }
TEST_LIMIT(moved, 240) { sweep(moved_to_shm, "fstatfs get_seals socket_error", " fstatfs get_seals memfd_create "); }
TEST_LIMIT(agents_meet_by_tcp, 240) { sweep(agents_by_tcp, "connect_route getaddrinfo_numeric getsockname", OPTIONS); }
TEST_LIMIT(agents_meet_by_file, 240) { sweep(agents_by_file, "open_file pread pwrite fcntl", ""); }
TEST(bells_that_fail) {
    run_failing(bells, "bell_write", EIO, true, " bell_write ");
    run_failing(bells, "bell_read", EIO, true, " bell_read ");
    run_failing(bells, "bell_read", EIO, false, " bell_read ");
}
