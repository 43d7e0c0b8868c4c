/* Every worker calls every other: 16 workers in 8 processes; more, and longer, by

       LOAD_WORKERS=64 LOAD_SECONDS=600 build/tests/load

   Calls are of every kind. In phases with rests between, at which nothing is under way and memory is looked at: that of
   the library, by its allocator, and that of the process, by what the kernel says; after the warm-up it stays, and in a
   long run the later half needs no more than the earlier one did. */
#include "busy.h"

enum { PROCESSES = 8, WARM = 3, PHASES = 9, LONG = 64, LARGEST = 24000, CALLS_TO_EACH = 24 };

typedef struct look { int64_t heap, blocks, process_kib; } look;
typedef struct stage {
    int arrived[2], fails;             /* at the rests */
    int phases;                        /* that there are to be; grows while there is time */
    int64_t calls;
    look warm[PROCESSES], most[PROCESSES], halves[PROCESSES][2];   /* halves: most until the last power of two of
                                          phases, and until the one before */
    char url[64];
} stage;
static stage *on;
static int workers, each;              /* in all; of a process */

static int64_t seconds_given(void) {
    const char *text = getenv("LOAD_SECONDS");
    return text ? atoi(text) : 0;
}

typedef struct process { int index; tprpc_context *ctx; heap heap; busy *side; } process;

/* Anonymous memory of this process that is there, in KiB; -1 where the kernel does not say. */
static int64_t process_kib(void) {
    char text[200];
    long kib = -1;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    while (file && fgets(text, sizeof text, file)) sscanf(text, "Anonymous: %ld", &kib);
    if (file) fclose(file);
    return kib;
}

static void turn(process *p) {
    for (int i = 0; i < each; i++) busy_answer_late(&p->side[i]);
    tprpc_poll(p->ctx, 1000, 0);
}

/* Serves until all processes are here. */
static void rest(process *p, int *arrived, int expected) {
    const int64_t end = test_now_us() + 2 * (int64_t)WAIT_MS * 1000 * TEST_SLOWDOWN;
    ADD(arrived, 1);
    while (LOAD(arrived) < expected) {
        REQUIRE(test_now_us() < end && !LOAD(&on->fails));
        turn(p);
    }
}

static void phase(process *p) {
    const int64_t end = test_now_us() + 2 * (int64_t)WAIT_MS * 1000 * TEST_SLOWDOWN;
    int next[BUSY_PEERS] = {0}, left = each, active = 1;
    while (left || active) {
        REQUIRE(test_now_us() < end);
        left = active = 0;
        for (int i = 0; i < each; i++) {
            busy *b = &p->side[i];
            while (next[i] < CALLS_TO_EACH * (workers - 1)) {
                char name[16];
                const int peer = (b->index + 1 + next[i] % (workers - 1)) % workers;
                snprintf(name, sizeof name, "w%d", peer);
                if (!busy_call(b, name, peer)) break;
                next[i]++;
            }
            left += next[i] < CALLS_TO_EACH * (workers - 1);
            active += busy_active(b);
        }
        turn(p);
    }
}

static void process_open(process *p, char (*names)[16]) {
    tprpc_context_desc desc = {0};
    desc.spin_us = TPRPC_NOW;
    desc.allocator.alloc = heap_alloc;
    desc.allocator.free = heap_free;
    desc.allocator.user = &p->heap;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &p->ctx, NULL), TPRPC_OK);
    p->side = (busy *)calloc((size_t)each, sizeof *p->side);
    REQUIRE(p->side != NULL);
    for (int i = 0; i < each; i++) {
        busy *b = &p->side[i];
        b->index = b->rank = p->index * each + i;
        snprintf(names[i], sizeof names[i], "w%d", b->index);
        b->name = names[i];
        b->url = on->url;
        b->world_size = workers;
        b->ctx = p->ctx;
        b->shares_ctx = true;
        b->heap = &p->heap;
        b->largest = LARGEST;
        b->random = (uint64_t)b->index * 977;
        busy_open(b);
        REQUIRE_EQ_INT(tprpc_agent_start(b->agent, NULL, NULL, NULL), TPRPC_OK);
    }
    for (int i = 0; i < each; i++) {
        tprpc_error error = {0};
        if (tprpc_agent_wait_ready(p->side[i].agent, WAIT_MS, &error) != TPRPC_OK) fprintf(stderr, "%s\n", error.text);
        REQUIRE_EQ_INT(error.status, TPRPC_OK);
    }
}

static void remember(process *p, int done) {
    look now = {LOAD(&p->heap.bytes), LOAD(&p->heap.blocks), process_kib()}, *most = &on->most[p->index];
    if (done == WARM) on->warm[p->index] = now;
    if (now.heap > most->heap) most->heap = now.heap;
    if (now.blocks > most->blocks) most->blocks = now.blocks;
    if (now.process_kib > most->process_kib) most->process_kib = now.process_kib;
    if (done <= WARM) *most = now;
    if ((done & (done - 1)) == 0) {
        on->halves[p->index][1] = on->halves[p->index][0];
        on->halves[p->index][0] = *most;
    }
    if (getenv("TEST_LOG")) fprintf(stderr, "process %d phase %d: heap %lld, blocks %lld, %lld KiB\n", p->index, done,
                                    (long long)now.heap, (long long)now.blocks, (long long)now.process_kib);
}

static void *leaver(void *arg) {
    busy *b = (busy *)arg;
    tprpc_error error = {0};
    if (!CHECK_EQ_INT(tprpc_agent_leave(b->agent, WAIT_MS, &error), TPRPC_OK)) fprintf(stderr, "%s\n", error.text);
    return NULL;
}

/* Each leaves when all do, so the workers of one process leave side by side. */
static void process_leave(process *p) {
    pthread_t threads[BUSY_PEERS];
    for (int i = 1; i < each; i++) REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, leaver, &p->side[i]), 0);
    leaver(&p->side[0]);
    for (int i = 1; i < each; i++) pthread_join(threads[i], NULL);
}

static void process_main(void *arg) {
    static process p;
    static char names[BUSY_PEERS][16];
    const int64_t began_us = test_now_us(), end_us = began_us + seconds_given() * 1000000;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    p.index = *(int *)arg;
    process_open(&p, names);
    for (int done = 1; done <= LOAD(&on->phases); done++) {
        phase(&p);
        if (p.index == 0 && test_now_us() < end_us && done + 1 >= on->phases) STORE(&on->phases, done + 2);
        rest(&p, &on->arrived[0], done * PROCESSES);
        remember(&p, done);
        rest(&p, &on->arrived[1], done * PROCESSES);
    }
    for (int i = 0; i < each; i++) {
        tprpc_stats stats;
        REQUIRE_EQ_INT(tprpc_agent_get_stats(p.side[i].agent, &stats, sizeof stats), TPRPC_OK);
        CHECK_EQ_INT(stats.pipes, 2 * (workers - 1));
        CHECK_EQ_INT(stats.calls_failed, 0);
        CHECK_EQ_INT(p.side[i].bad, 0);
        ADD(&on->calls, p.side[i].good);
    }
    process_leave(&p);
    for (int i = 0; i < each; i++) busy_close(&p.side[i]);
    CHECK_EQ_INT(tprpc_context_destroy(p.ctx), TPRPC_OK);
    CHECK_EQ_INT(p.heap.blocks, 0);
    free(p.side);
    if (harness_failures) STORE(&on->fails, 1);
}

static void load_run(void *arg) {
    static int index[PROCESSES];
    pid_t pids[PROCESSES];
    const char *given = getenv("LOAD_WORKERS");
    const int64_t began_us = test_now_us();
    (void)arg;
    workers = given ? atoi(given) : 16;
    REQUIRE(workers >= PROCESSES && workers <= BUSY_PEERS && workers % PROCESSES == 0);
    each = workers / PROCESSES;
    void *memory = mmap(NULL, sizeof *on, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    on = (stage *)memory;
    on->phases = PHASES;
    snprintf(on->url, sizeof on->url, "tcp://127.0.0.1:%d", socket_free_port());
    for (int i = 0; i < PROCESSES; i++) {
        index[i] = i;
        pids[i] = test_fork_run(process_main, &index[i]);
    }
    for (int i = 0; i < PROCESSES; i++) {
        const int status = test_wait_child(pids[i], 200 + 2 * (double)seconds_given());
        if (!CHECK_EQ_INT(status, 0)) STORE(&on->fails, 1);
    }
    printf("%d workers, %d pipes, %lld calls in %.1f s\n", workers, workers * (workers - 1), (long long)on->calls,
           (double)(test_now_us() - began_us) / 1e6);
    for (int i = 0; i < PROCESSES; i++) {
        const look *warm = &on->warm[i], *most = &on->most[i];
        printf("process %d: %lld bytes in %lld blocks, at most %lld in %lld; %lld KiB, at most %lld\n", i,
               (long long)warm->heap, (long long)warm->blocks, (long long)most->heap, (long long)most->blocks,
               (long long)warm->process_kib, (long long)most->process_kib);
        /* bursts make the pools of blocks grow a little yet; what leaked at a twentieth of the calls would be more */
        CHECK_LE_INT(most->heap, 2 * warm->heap);
        CHECK_LE_INT(most->blocks, warm->blocks + warm->blocks / 4);
        if (on->phases >= LONG) {
            const look *half = &on->halves[i][1];
            CHECK_LE_INT(most->heap, half->heap + half->heap / 10);
            CHECK_LE_INT(most->blocks, half->blocks + half->blocks / 10);
            CHECK_LE_INT(most->process_kib, half->process_kib + half->process_kib / 10);
        }
        if (!TEST_ASAN && !TEST_TSAN) CHECK_LE_INT(most->process_kib, warm->process_kib + warm->process_kib / 4 + 512);
    }
}

TESTS(load) { test_add("every_worker_calls_every_other", load_run, NULL, 60 + 2 * (double)seconds_given()); }
