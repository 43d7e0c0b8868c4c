/* What the tests of agents share: one side of a group, as a thread or as a process, with a counting allocator, and
   memory that all processes of a test see. */
#ifndef TPRPC_TESTS_AGENT_HELP_H
#define TPRPC_TESTS_AGENT_HELP_H

#include "harness.h"
#include <pthread.h>
#include <sched.h>
#include "../tprpc.h"
#include "sockets.h"

#define LOAD(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define STORE(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
#define ADD(at, value) __atomic_add_fetch(at, value, __ATOMIC_ACQ_REL)
#define UNUSED __attribute__((unused))

enum { WAIT_MS = 30000 };   /* a bound on every wait that should end at once */

/* ---- kinds of group: each test runs in several of them ---- */

typedef struct mode { const char *name, *transports; int threads; bool processes; } mode;

static const mode modes[] UNUSED = {
    {"tcp_polled", "tcp", 0, true},    {"shm_polled", "shm", 0, true},    {"default_polled", NULL, 0, false},
    {"tcp_threads", "tcp", 1, false},  {"shm_threads", "shm", 2, true},   {"default_threads", NULL, 2, false},
    {"tcp_inside", "tcp", 0, false},   {"default_apart", NULL, 0, true},
};

/* Registers `run` once per mode of the mask, as name_mode. */
static inline void in_modes(const char *name, void (*run)(const mode *), unsigned mask, double limit_s);

typedef struct in_mode { void (*run)(const mode *); const mode *mode; } in_mode;
static inline void in_mode_run(void *arg) { ((in_mode *)arg)->run(((in_mode *)arg)->mode); }

static inline void in_modes(const char *name, void (*run)(const mode *), unsigned mask, double limit_s) {
    static in_mode all[400];
    static size_t count;
    size_t i;
    for (i = 0; i < sizeof modes / sizeof modes[0]; i++) {
        char text[100];
        if (!(mask >> i & 1)) continue;
        all[count].run = run;
        all[count].mode = &modes[i];
        snprintf(text, sizeof text, "%s_%s", name, modes[i].name);
        test_add(text, in_mode_run, &all[count++], limit_s);
    }
}

enum { ALL_MODES = 0x3f, TWO_MODES = 0x12, FOUR_MODES = 0x1e, APART_MODES = 0x93 };
#define IN_MODES(name, mask) IN_MODES_LIMIT(name, mask, 60)
#define IN_MODES_LIMIT(name, mask, seconds)                                                       \
    static void in_##name(const mode *with);                                                      \
    TESTS(name) { in_modes(#name, in_##name, mask, seconds); }                                    \
    static void in_##name(UNUSED const mode *with)

/* ---- memory that all processes of a test see ---- */

typedef struct common {
    int released, outcomes, handled, unplaced, placed, go, seen, bad, stop, ready, count[16];
    int status[8];
    pid_t pid[4];
    char text[8][256];
    uint32_t order[64 * 1024];
} common;
static common *shared;

static inline void share(void) {
    void *memory = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    shared = (common *)memory;
}

/* ---- an allocator that counts ---- */

typedef struct heap { int64_t blocks, bytes, calls; uint32_t last_tag; size_t last_size; } heap;

static inline void *heap_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    heap *h = (heap *)user;
    void *ptr = NULL;
    STORE(&h->last_tag, tag);
    STORE(&h->last_size, size);
    if (posix_memalign(&ptr, align < sizeof ptr ? sizeof ptr : align, size ? size : 1) != 0) return NULL;
    ADD(&h->blocks, 1);
    ADD(&h->bytes, (int64_t)size);
    ADD(&h->calls, 1);
    return ptr;
}

static inline void heap_free(void *ptr, size_t size, uint32_t tag, void *user) {
    heap *h = (heap *)user;
    (void)tag;
    if (!ptr) return;
    ADD(&h->blocks, -1);
    ADD(&h->bytes, -(int64_t)size);
    free(ptr);
}

static inline void show_log(const tprpc_log *entry, void *user) {
    fprintf(stderr, "%.6f %d %s %s: %s %s\n", (double)(test_now_us() % 100000000) / 1e6, (int)getpid(),
            (const char *)user, entry->section, entry->peer, entry->text);
}

/* Takes the keys of a dead worker out of the store, which it could not do itself: where no other worker is there to
   remove it. */
static inline void bury_key(tprpc_store *store, const char *key) {
    tprpc_store_request request = {0};
    request.size = sizeof request;
    request.kind = TPRPC_STORE_DELETE;
    request.key = key;
    CHECK_EQ_INT(tprpc_store_wait(store, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
}

static inline void bury_name(tprpc_store *store, const char *name) {
    tprpc_store_request request = {0};
    uint8_t entry[2000];
    size_t size = sizeof entry;
    char key[100];
    snprintf(key, sizeof key, "tprpc/name/%s", name);
    request.size = sizeof request;
    request.kind = TPRPC_STORE_GET;
    request.key = key;
    tprpc_status status = tprpc_store_wait(store, &request, TPRPC_NOW, entry, &size, NULL);
    bury_key(store, key);
    if (status != TPRPC_OK || size < 12) return;
    snprintf(key, sizeof key, "tprpc/member/%u", entry[8] + 256u * entry[9]);   /* its id, behind the nonce */
    bury_key(store, key);
}

/* ---- one side: a context, an agent, its methods ---- */

enum { SIDE_THREADS = 16 };

typedef struct side {
    const mode *mode;
    const char *name, *init_method, *channels;
    int rank, world;
    tprpc_store *store;
    const tprpc_method_desc *methods;   /* the last has no name; their user is this side */
    void (*main)(struct side *);        /* NULL: serves until all leave */
    void (*tune)(struct side *, tprpc_context_desc *, tprpc_agent_desc *);
    void *user;
    bool no_leave, deserted;            /* main did what is to be done; it may fail to leave */
    /* while it runs */
    tprpc_context *ctx;
    tprpc_agent *agent;
    heap heap;
    pthread_t thread, jobs[SIDE_THREADS];
    int job_count;
    pthread_t self;
} side;

static inline void side_open(side *s) {
    tprpc_context_desc context = {0};
    tprpc_agent_desc agent = {0};
    tprpc_error error = {0};
    context.threads = s->mode->threads;
    context.transports = s->mode->transports;
    context.channels = s->channels;
    context.allocator.alloc = heap_alloc;
    context.allocator.free = heap_free;
    context.allocator.user = &s->heap;
    if (getenv("TEST_LOG")) {           /* what the library says of it, to look for a cause */
        context.log = show_log;
        context.user = (void *)(uintptr_t)s->name;
    }
    agent.name = s->name;
    agent.init_method = s->init_method;
    agent.store = s->store;
    agent.rank = s->rank;
    agent.world_size = s->world;
    agent.start_timeout_ms = WAIT_MS;
    if (s->tune) s->tune(s, &context, &agent);
    s->thread = pthread_self();
    if (tprpc_context_create(&context, &s->ctx, &error) != TPRPC_OK) fprintf(stderr, "%s: %s\n", s->name, error.text);
    REQUIRE(s->ctx != NULL);
    agent.context = s->ctx;
    if (tprpc_agent_create(&agent, &s->agent, &error) != TPRPC_OK) fprintf(stderr, "%s: %s\n", s->name, error.text);
    REQUIRE(s->agent != NULL);
    for (const tprpc_method_desc *m = s->methods; m && m->name; m++) {
        tprpc_method_desc method = *m;
        method.user = s;
        REQUIRE_EQ_INT(tprpc_agent_register(s->agent, &method, &error), TPRPC_OK);
    }
}

static inline void side_join(side *s) {
    tprpc_error error = {0};
    if (tprpc_agent_wait_ready(s->agent, 0, &error) != TPRPC_OK) {
        fprintf(stderr, "%s: %s\n", s->name, error.text);
        REQUIRE(false);
    }
}

static inline void side_leave(side *s) {
    tprpc_error error = {0};
    tprpc_status status = tprpc_agent_leave(s->agent, WAIT_MS, &error);
    if (status != TPRPC_OK && !s->deserted) fprintf(stderr, "%s cannot leave: %s\n", s->name, error.text);
    if (!s->deserted) CHECK_EQ_INT(status, TPRPC_OK);
}

static inline void side_close(side *s) {
    for (int i = 0; i < s->job_count; i++) pthread_join(s->jobs[i], NULL);
    s->job_count = 0;
    if (s->agent) CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    if (s->ctx) CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_OK);
    s->agent = NULL;
    s->ctx = NULL;
    CHECK_EQ_INT(s->heap.blocks, 0);
    CHECK_EQ_INT(s->heap.bytes, 0);
}

static inline void side_run(void *arg) {
    side *s = (side *)arg;
    side_open(s);
    side_join(s);
    if (s->main) s->main(s);
    if (!s->no_leave) side_leave(s);
    side_close(s);
}

static inline void *side_thread(void *arg) {
    side_run(arg);
    return NULL;
}

/* Drives the side's context, if any, until *flag is that much; false: it took too long. */
static inline bool until(side *s, int *flag, int at_least) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (LOAD(flag) < at_least) {
        if (test_now_us() > end) return false;
        if (s) tprpc_poll(s->ctx, 1000, 0);
        else test_sleep_us(200);
    }
    return true;
}

/* Serves until told to stop: for groups that lose a member, and so cannot leave. */
static inline void serve_until_stop(side *s) { CHECK(until(s, &shared->stop, 1)); }

/* ---- a group: side 0 runs here, the others in threads or processes of their own ---- */

typedef struct group { tprpc_context *store_ctx; tprpc_store *store; char url[300]; } group;

static inline void group_open(group *g, side *sides, int count) {
    memset(g, 0, sizeof *g);
    if (sides[0].mode->processes) {
        char path[250];
        snprintf(g->url, sizeof g->url, "file://%s", test_temp_path(path, sizeof path));
    } else {
        tprpc_context_desc context = {0};
        tprpc_store_desc store = {0};
        context.threads = 1;
        store.url = "local://";
        REQUIRE_EQ_INT(tprpc_context_create(&context, &g->store_ctx, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_store_open(g->store_ctx, &store, &g->store, NULL), TPRPC_OK);
    }
    for (int i = 0; i < count; i++) {
        if (!sides[i].name) sides[i].name = i == 0 ? "ann" : i == 1 ? "bob" : i == 2 ? "cyd" : "dan";
        sides[i].mode = sides[0].mode;
        sides[i].rank = i;
        sides[i].world = count;
        if (sides[i].init_method) continue;
        if (g->store) sides[i].store = g->store;
        else sides[i].init_method = g->url;
    }
}

static inline void group_close(group *g) {
    if (g->store) tprpc_store_close(g->store);
    if (g->store_ctx) CHECK_EQ_INT(tprpc_context_destroy(g->store_ctx), TPRPC_OK);
}

static inline void group_run(side *sides, int count) {
    const bool apart = sides[0].mode->processes;
    group g;
    if (!shared) share();
    if (apart) {                     /* no thread and no context before the fork */
        group_open(&g, sides, count);
        for (int i = 1; i < count; i++) shared->pid[i] = test_fork_run(side_run, &sides[i]);
        shared->pid[0] = getpid();
    } else {
        group_open(&g, sides, count);
        for (int i = 1; i < count; i++) REQUIRE_EQ_INT(pthread_create(&sides[i].self, NULL, side_thread, &sides[i]), 0);
    }
    side_run(&sides[0]);
    for (int i = 1; i < count; i++) {
        if (!apart) pthread_join(sides[i].self, NULL);
        else if (!sides[i].user || strcmp((const char *)sides[i].user, "dies") != 0)
            CHECK_EQ_INT(test_wait_child(shared->pid[i], 40), 0);
        else test_wait_child(shared->pid[i], 40);
    }
    group_close(&g);
}

/* ---- messages ---- */

static inline void count_release(void *user) {
    ADD(&shared->released, 1);
    if (user) ADD((int *)user, 1);
}

static inline tprpc_tensor bytes_of(void *data, size_t size) {
    tprpc_tensor tensor = {0};
    tensor.data = data;
    tensor.size = size;
    return tensor;
}

static inline tprpc_message text_of(const char *text) {
    tprpc_message message = {0};
    message.metadata = text;
    message.metadata_size = strlen(text);
    return message;
}

static inline tprpc_message tensors_of(const tprpc_tensor *tensors, size_t count) {
    tprpc_message message = {0};
    message.tensors = tensors;
    message.tensor_count = count;
    return message;
}

static inline void fill(void *data, size_t size, unsigned seed) {
    for (size_t i = 0; i < size; i++) ((uint8_t *)data)[i] = (uint8_t)(i * 7 + i / 251 + seed);
}

static inline bool filled(const void *data, size_t size, unsigned seed) {
    for (size_t i = 0; i < size; i++)
        if (((const uint8_t *)data)[i] != (uint8_t)(i * 7 + i / 251 + seed)) return false;
    return true;
}

/* Calls, waits and gives the future back; with the error when there was one. */
static inline tprpc_status call_and_wait(side *s, const char *worker, const char *method, const tprpc_message *message,
                                         const tprpc_call_options *given, tprpc_error *error) {
    tprpc_call_options options = {0};
    tprpc_error mine = {0};
    tprpc_future future;
    if (given) options = *given;
    if (!error) error = &mine;
    if (!options.error) options.error = error;
    tprpc_status status = tprpc_call(s->agent, worker, method, message, &options, &future);
    if (status != TPRPC_OK) return status;
    status = tprpc_future_wait(future, WAIT_MS);
    tprpc_future_error(future, error);
    tprpc_future_release(future);
    return status;
}

static inline tprpc_stats stats_of(side *s) {
    tprpc_stats stats;
    memset(&stats, 0, sizeof stats);
    CHECK_EQ_INT(tprpc_agent_get_stats(s->agent, &stats, sizeof stats), TPRPC_OK);
    return stats;
}

/* Drives until no call of the side's is active and the releases are that many. */
static inline bool until_released(side *s, int count) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (LOAD(&shared->released) < count && test_now_us() < end) tprpc_poll(s->ctx, 1000, 0);
    return LOAD(&shared->released) == count;
}

#endif
