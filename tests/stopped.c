/* A peer that stands still is not dead: stopped for 30 s and more in a busy exchange, in a debugger say, it fails
   nothing, though the way to it fills up; and when it goes on, nothing was lost. By day the stop is short and the clocks
   of both ends jump; STOPPED_S=35 build/tests/stopped really waits so long. */
#include "busy.h"
#include <poll.h>

enum { ROUNDS = 3, STOPPED_US = 50000000, STEPS = 12, SHORT_MS = 240, LARGEST = 400000, FLOOD = 240, CRUMB = 7000 };

typedef struct stage {
    int wanted, stopped, go_on;        /* rounds: ann wants bob to stop; he stands; he may go on */
    int over, idle;                    /* no more calls begin; how many have none left */
    int64_t skew_us;                   /* of both clocks */
    char url[300];
} stage;
static stage *on;

static int rounds(void) { return getenv("STOPPED_S") ? 1 : ROUNDS; }

typedef struct setting { const char *name, *transports; int threads; } setting;
static const setting *set;

static int64_t skewed_clock(void *user) {
    (void)user;
    return test_now_us() + LOAD(&on->skew_us);
}

static void side_of(busy *b, const char *name, int rank) {
    b->name = name;
    b->url = on->url;
    b->transports = set->transports;
    b->threads = set->threads;
    b->spin_us = TPRPC_NOW;
    b->rank = rank;
    b->world_size = 2;
    b->index = rank;
    b->largest = LARGEST;
    b->random = (uint64_t)rank + 11;
    b->clock_us = skewed_clock;
    b->timeout_ms = 600000;
    busy_open(b);
    REQUIRE_EQ_INT(tprpc_agent_wait_ready(b->agent, WAIT_MS, NULL), TPRPC_OK);
}

static void keep_busy(busy *b, const char *peer, int index, bool begins) {
    while (begins && busy_call(b, peer, index)) {}
    busy_answer_late(b);
    busy_work(b);
}

/* Does something to each connected socket over IP, of which the library has some; returns the sum. */
static int each_socket(int (*what)(int fd)) {
    struct sockaddr_in at;
    int sum = 0;
    for (int fd = 3; fd < 256; fd++) {
        socklen_t size = sizeof at;
        if (getpeername(fd, (struct sockaddr *)(void *)&at, &size) == 0 && at.sin_family == AF_INET) sum += what(fd);
    }
    return sum;
}

/* Less than the flood, but enough for the window's updates to come in time. */
static int make_small(int fd) {
    const int out = 32 << 10, in = 128 << 10;
    return setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &out, sizeof out) == 0 &&
           setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &in, sizeof in) == 0;
}

static int is_full(int fd) {
    struct pollfd look = {fd, POLLOUT, 0};
    return poll(&look, 1, 0) == 0;
}

static int flooded;
static void on_flooded(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    (void)user;
    if (!CHECK_EQ_INT(status, TPRPC_OK)) fprintf(stderr, "one way: %s\n", error->text);
    ADD(&flooded, 1);
}

/* More than the way to bob holds, none of which waits for him to say where it goes. */
static void flood(busy *b) {
    static uint8_t crumb[CRUMB];
    for (int i = 0; i < FLOOD; i++) {
        busy_note note = {0};
        tprpc_tensor tensor = bytes_of(crumb, sizeof crumb);
        tprpc_message message = tensors_of(&tensor, 1);
        tprpc_call_options options = {0};
        note.id = 77;
        note.size = sizeof crumb;
        busy_fill(crumb, sizeof crumb, note.id);
        message.metadata = &note;
        message.metadata_size = sizeof note;
        options.flags = TPRPC_CALL_ONE_WAY;
        options.on_done = on_flooded;
        options.timeout_ms = 600000;
        REQUIRE_EQ_INT(tprpc_call(b->agent, "bob", "sink", &message, &options, NULL), TPRPC_OK);
    }
}

static void stop_once(busy *b, int round) {
    const char *real = getenv("STOPPED_S");
    const int64_t us = real ? atoi(real) * INT64_C(1000000) : SHORT_MS * 1000, end = test_now_us() + WAIT_MS * 1000;
    const int64_t events = LOAD(&b->served) + 20 + busy_below(&b->random, 100);
    while (LOAD(&b->served) < events && test_now_us() < end) keep_busy(b, "bob", 1, true);
    STORE(&on->wanted, round);
    while (LOAD(&on->stopped) != round && test_now_us() < end) keep_busy(b, "bob", 1, true);
    REQUIRE_EQ_INT(LOAD(&on->stopped), round);
    flood(b);
    for (int i = 0; i < STEPS; i++) {
        const int64_t step = test_now_us() + us / STEPS;
        if (!real) ADD(&on->skew_us, STOPPED_US / STEPS);
        while (test_now_us() < step) keep_busy(b, "bob", 1, true);
    }
    if (strcmp(set->transports, "tcp") == 0) CHECK(each_socket(is_full) > 0);
    CHECK_LE_INT(LOAD(&flooded), round * FLOOD - 1);       /* the way is full over shm, too */
    CHECK(busy_active(b) > 0);
    CHECK_EQ_INT(LOAD(&b->bad), 0);
    STORE(&on->go_on, round);
    /* what the kernel sends next into a closed window may be as far off as the stop was long */
    const int64_t limit = test_now_us() + (int64_t)WAIT_MS * 1000 + 2 * us;
    while ((busy_active(b) || LOAD(&flooded) < round * FLOOD) && test_now_us() < limit) keep_busy(b, "bob", 1, false);
    CHECK_EQ_INT(busy_active(b), 0);
    CHECK_EQ_INT(LOAD(&flooded), round * FLOOD);
    CHECK_EQ_INT(LOAD(&b->bad), 0);
}

/* Each serves the other until both have no call left. */
static void leave(busy *b) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    tprpc_error error = {0};
    while (busy_active(b) && test_now_us() < end) keep_busy(b, "", 0, false);
    ADD(&on->idle, 1);
    while (LOAD(&on->idle) < 2 && test_now_us() < end) keep_busy(b, "", 0, false);
    CHECK_EQ_INT(LOAD(&b->bad), 0);
    if (!CHECK_EQ_INT(tprpc_agent_leave(b->agent, WAIT_MS, &error), TPRPC_OK)) fprintf(stderr, "%s\n", error.text);
    busy_close(b);
}

static void bob_main(void *arg) {
    static busy b;
    (void)arg;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    side_of(&b, "bob", 1);
    while (LOAD(&b.good) < 10) keep_busy(&b, "ann", 0, true);
    each_socket(make_small);
    while (!LOAD(&on->over)) keep_busy(&b, "ann", 0, true);
    leave(&b);
}

static void ann_main(void *arg) {
    static busy b;
    (void)arg;
    side_of(&b, "ann", 0);
    while (LOAD(&b.good) < 10) keep_busy(&b, "bob", 1, true);
    int small = each_socket(make_small);
    if (strcmp(set->transports, "tcp") == 0) CHECK(small > 0);
    for (int round = 1; round <= rounds(); round++) stop_once(&b, round);
    STORE(&on->over, 1);
    fprintf(stderr, "%s: %lld calls each way or more, none failed\n", set->name, (long long)LOAD(&b.good));
    leave(&b);
}

static void stopped_run(void *arg) {
    char path[250];
    int status;
    set = (const setting *)arg;
    void *memory = mmap(NULL, sizeof *on, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    on = (stage *)memory;
    snprintf(on->url, sizeof on->url, "file://%s", test_temp_path(path, sizeof path));
    pid_t ann = test_fork_run(ann_main, NULL), bob = test_fork_run(bob_main, NULL);
    for (int round = 1; round <= rounds(); round++) {
        while (LOAD(&on->wanted) != round) {
            test_sleep_us(200);
            REQUIRE(waitpid(ann, &status, WNOHANG) == 0 && waitpid(bob, &status, WNOHANG) == 0);   /* both live */
        }
        REQUIRE(kill(bob, SIGSTOP) == 0 && waitpid(bob, &status, WUNTRACED) == bob && WIFSTOPPED(status));
        STORE(&on->stopped, round);
        while (LOAD(&on->go_on) != round) {
            test_sleep_us(200);
            REQUIRE(waitpid(ann, &status, WNOHANG) == 0);
        }
        REQUIRE(kill(bob, SIGCONT) == 0);
    }
    CHECK_EQ_INT(test_wait_child(ann, WAIT_MS / 1000), 0);
    CHECK_EQ_INT(test_wait_child(bob, WAIT_MS / 1000), 0);
}

static const setting settings[] = {
    {"stopped_tcp", "tcp", 0}, {"stopped_shm", "shm", 0}, {"stopped_tcp_threads", "tcp", 1},
    {"stopped_shm_threads", "shm", 1},
};

TESTS(stopped) {
    const char *real = getenv("STOPPED_S");
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
        test_add(settings[i].name, stopped_run, (void *)(uintptr_t)&settings[i], 60 + 3 * (real ? atoi(real) : 0));
}
