/* The simulated network: groups of workers in one process, on a transport with a virtual clock, everything from a seed.

       build/sim                     what the continuous integration runs: all seeds of the list, and the large groups
       build/sim --seed N [-v]       one seed again, identically; -v: with its whole trace
       build/sim --from N --count N  so many seeds
       build/sim --large N [-v]      one of a thousand workers; with --workers W: of so many, 65 to 4,096
       build/sim --soak [N]          seeds from N on (default: by the clock), until stopped or red

   What it has found, with the seed that was red (as the workload then was): an ordered pipe that ended walked its reads
   in a circle (40); a loop whose next timer was far off did not sleep (5); a wait did not sleep after tprpc_wake (12);
   a poll spun where the clock had gone back (18); bulk of a cancelled message stopped its pipe (216, 408, 1616).

   The parts: sim_world.h (clock, events, fibers), sim_net.h (transport and store), sim_work.h (what workers do, and the
   ledger in which every operation stands). */
#include "sim_work.h"

enum {
    SIM_FLOOR = 100,                   /* of operations and faults of each kind, in what is run by default */
    SIM_FAULTS_S = 60,                 /* when at the latest a seed's faults end */
    SIM_CALM_S = 40                    /* after which nothing of them is left */
};

static int64_t sim_warm, sim_last_bytes;   /* of a large group: bytes allocated, at most while it warms up; at last */

/* ---- faults ---- */

static int64_t sim_fault_every, sim_fault_mix[9];
static bool sim_faults_over;
static int64_t sim_well_since;         /* or never */
enum { SIM_F_CUT, SIM_F_STALL_LINK, SIM_F_PARTITION, SIM_F_KILL, SIM_F_STALL, SIM_F_FORWARD, SIM_F_BACK, SIM_F_KINDS };

static void sim_heal(void *arg, uint64_t value) {
    (void)arg;
    (void)value;
    if (!sim.partitioned) return;
    sim.partitioned = false;
    sim_count(SIM_fault_heal);
    sim_note(-1, "heal", 0, 0, 0);
}

static void sim_kill(sim_node *node) {
    int32_t i, dying = 0;
    for (i = 0; i < sim.count; i++) dying += sim.nodes[i].dying || !sim.nodes[i].exists;
    if (!node->exists || node->dying || !node->ctx || dying * 3 > sim.count) return;
    sim_count(SIM_fault_kill);
    sim_note(node->index, "kill", 0, 0, 0);
    node->dying = true;
    node->stalled_until = 0;
    sim_cut_off(node);
    tprpc_wake(node->ctx);             /* as its signal handler would */
    sim_wake_up(node);
}

static void sim_jump(sim_node *node, int64_t by) {
    sim_count(by > 0 ? SIM_fault_clock_forward : SIM_fault_clock_back);
    sim_note(node->index, "clock", by, 0, 0);
    node->skew_us += by;
    sim_wake(node);
}

static void sim_fault_event(void *arg, uint64_t value) {
    sim_node *node = &sim.nodes[sim_below(sim.count)];
    int64_t sum = 0, at;
    int32_t i;
    int kind;
    (void)arg;
    (void)value;
    if (sim_faults_over) return;
    for (kind = 0; kind < SIM_F_KINDS; kind++) sum += sim_fault_mix[kind];
    at = sum ? sim_below(sum) : 0;
    for (kind = 0; kind < SIM_F_KINDS; kind++) {
        at -= sim_fault_mix[kind];
        if (at < 0) break;
    }
    switch (kind) {
    case SIM_F_CUT:
        if (!sim_wire_count) break;
        sim_count(SIM_fault_cut);
        i = (int32_t)sim_below(sim_wire_count);
        sim_note(sim_wires[i]->nodes[0]->index, "cut", sim_wires[i]->nodes[1]->index, 0, 0);
        sim_break(sim_wires[i], sim_spread(SIM_S), sim_spread(SIM_S));
        break;
    case SIM_F_STALL_LINK:
        if (!sim_wire_count) break;
        sim_count(SIM_fault_stalled_link);
        sim_wires[sim_below(sim_wire_count)]->stalled_until = sim.now + sim_spread(8 * SIM_S);
        break;
    case SIM_F_PARTITION:
        if (sim.partitioned) break;
        sim_count(SIM_fault_partition);
        sim_note(-1, "partition", 0, 0, 0);
        sim.partitioned = true;
        for (i = 0; i < sim.count; i++) sim.nodes[i].side = (int)sim_below(2);
        sim_after(sim_spread(sim_chance(100) ? 50 * SIM_S : 4 * SIM_S), sim_heal, NULL, 0);
        break;
    case SIM_F_KILL: sim_kill(node); break;
    case SIM_F_STALL:
        if (!node->exists || node->dying || node->stalled_until > sim.now) break;
        sim_count(SIM_fault_stalled_worker);
        node->stalled_until = sim.now + sim_spread(3 * SIM_S);
        sim_note(node->index, "stall", node->stalled_until - sim.now, 0, 0);
        break;
    case SIM_F_FORWARD: sim_jump(node, 1 + sim_spread(5 * SIM_S)); break;
    case SIM_F_BACK: sim_jump(node, -1 - sim_spread(3 * SIM_S)); break;
    default: break;
    }
    sim_after(1 + sim_spread(2 * sim_fault_every), sim_fault_event, NULL, 0);
}

/* In a large group without faults: once each worker has called its neighbours twice, memory grows no more. Calls under
   way take some, so it is looked at often and the most counts. */
static void sim_watch_memory(void) {
    int64_t bytes = 0;
    int32_t i, most = 0;
    if (!sim_neighbours || !sim.quiet || sim_leaving) return;
    for (i = 0; i < sim.count; i++) {
        bytes += sim.nodes[i].heap.bytes;
        if (sim.nodes[i].work->quota > most) most = sim.nodes[i].work->quota;
    }
    if (most > 25) {
        if (bytes > sim_warm) sim_warm = bytes;
    } else if (bytes > sim_warm + sim_warm / 20) {
        sim_fail("%" PRId64 " bytes are allocated in all, and were %" PRId64 " once it was warm", bytes, sim_warm);
    }
    sim_last_bytes = bytes;
}

/* All are there, and none of what faults do to them lasts. */
static bool sim_all_well(void) {
    int32_t i;
    if (!sim_faults_over || sim_finished != sim.count || sim_joined != sim.count || sim.partitioned) return false;
    for (i = 0; i < sim.count && !sim.nodes[i].dying && sim.nodes[i].stalled_until <= sim.now; i++) {}
    return i == sim.count;
}

/* Once all workers have begun what they were to begin, and it has ended: the faults end, in the calm that follows all call
   each other, and then all leave. */
static void sim_end_event(void *arg, uint64_t value) {
    int32_t i;
    (void)arg;
    (void)value;
    sim_watch_memory();
    for (i = 0; i < sim.count && sim.nodes[i].work->quota <= 0; i++) {}
    if (i == sim.count || sim.now > 1000 * SIM_S + SIM_FAULTS_S * SIM_S) sim_faults_over = true;
    sim_net_is.mended = sim_all_well();
    if (!sim_net_is.mended) {
        sim_well_since = SIM_NEVER;
    } else if (sim_well_since == SIM_NEVER) {
        sim_well_since = sim.now;
    } else if (!sim_calm && sim.now - sim_well_since > (sim.quiet ? 0 : SIM_CALM_S * SIM_S)) {
        sim_note(-1, "calm", 0, 0, 0);
        sim_calm = true;
        for (i = 0; i < sim.count; i++) tprpc_wake(sim.nodes[i].ctx);
    } else if (sim_calm && sim_rolled == sim.count) {
        sim_note(-1, "all leave", 0, 0, 0);
        sim_leaving = true;
        sim_net_is.mended = false;
        for (i = 0; i < sim.count; i++) tprpc_wake(sim.nodes[i].ctx);
        return;
    }
    sim_after(50 * SIM_MS, sim_end_event, NULL, 0);
}

/* ---- a seed ---- */

static void sim_choose_weather(void) {
    sim_net_is.delay_us = sim_between(5, 500);
    sim_net_is.jitter_us = sim_chance(300) ? 0 : sim_spread(20 * SIM_MS);
    sim_net_is.split = sim_chance(300) ? 0 : sim_below(700);
    sim_net_is.tiny = !sim_has_big && sim_chance(300) ? sim_below(500) : 0;
    sim_net_is.window = sim_has_big ? sim_between(4096, 300000) : sim_between(300, 100000);
    sim_net_is.slow = sim_chance(500) ? sim_below(30) : 0;
    sim_net_is.store_us = sim_between(10, 5000);
    sim_net_is.store_slow = sim_chance(400) ? sim_below(100) : 0;
    if (sim.large) sim_net_is.store_slow /= 30;    /* members come and go one at a time, and each has a minute for it */
    sim_net_is.store_error = !sim.quiet && sim_chance(150) ? sim_between(1, 20) : 0;
    sim_net_is.mended = false;
    sim_repeats = sim_chance(300);
}

static void sim_choose_faults(void) {
    int i;
    sim_fault_every = sim_between(5, 400) * SIM_MS;
    for (i = 0; i < SIM_F_KINDS; i++) sim_fault_mix[i] = sim_chance(400) ? 0 : sim_between(1, 10);
    if (sim.count > 64) sim_fault_mix[SIM_F_PARTITION] = 0;
    sim_faults_over = sim.quiet;
    if (!sim.quiet) sim_after(sim_spread(2 * SIM_S), sim_fault_event, NULL, 0);
}

static void sim_choose(int32_t count) {
    int i;
    sim.quiet = count ? sim.seed % 2 == 1 : sim.seed % 8 == 0;
    sim.count = count ? count : (int32_t)sim_between(3, 24);
    sim_neighbours = count ? 16 : 0;
    sim_static_group = !count && sim_chance(500);
    sim_has_pipes = !count && sim_chance(600);
    sim_has_big = !count && sim_chance(150);
    sim_all_channels = sim_chance(250);
    sim_timeout_us = sim.quiet ? 300 * SIM_S : sim_between(2, 20) * SIM_S;
    sim_leaving = false;
    sim_warm = sim_last_bytes = 0;
    sim_finished = sim_joined = sim_rolled = 0;
    sim_calm = sim_rolling = false;
    sim_well_since = SIM_NEVER;
    sim_end_numbers = 0;
    for (i = 0; i < SIM_CALLS; i++) sim_mix_of[i] = sim_between(1, 10);
    sim_mix_of[sim_below(SIM_CALLS)] += 40;
    sim_choose_weather();
}

static void sim_choose_clock(sim_node *node) {
    node->skew_us = sim_spread(INT64_C(1000000) * SIM_S);
    node->ppm = sim_chance(500) ? sim_between(-20000, 20000) : 0;
}

/* A crash or a hang of the real kind says which seed it was, too. */
static void sim_crashed(int signal) {
    if (!sim_failing) {
        sim_failing = true;
        sim_print_trace();
        fprintf(stderr, "seed %" PRIu64 ", %.6f s, worker %d: signal %d (%s)\nagain: build/sim %s %" PRIu64 "\n",
                sim.seed, (double)sim.now / 1e6, sim.current ? (int)sim.current->index : -1, signal,
                signal ? strsignal(signal) : "the sanitizer's", sim.large ? "--large" : "--seed", sim.seed);
        fflush(NULL);
    }
    _exit(1);
}

#if SIM_ASAN
static void sim_condemned(void) { sim_crashed(0); }
#endif

static void sim_catch_crashes(void) {
    static char stack[128 * 1024];
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGALRM};
    stack_t other;
    struct sigaction action;
    size_t i;
    memset(&other, 0, sizeof other);
    other.ss_sp = stack;
    other.ss_size = sizeof stack;
    sigaltstack(&other, NULL);
    memset(&action, 0, sizeof action);
    action.sa_handler = sim_crashed;
    action.sa_flags = SA_ONSTACK;
#if SIM_ASAN
    __sanitizer_set_death_callback(sim_condemned);
#endif
    for (i = SIM_ASAN ? 4 : 0; i < sizeof signals / sizeof signals[0]; i++) sigaction(signals[i], &action, NULL);
}

static int64_t sim_fds_before;
static uint64_t sim_operations;        /* of all that this process ran */

/* Runs a seed to its end; on a failure the process ends. Returns the hash of its trace. */
static uint64_t sim_run(uint64_t seed, int32_t count) {
    static sim_worker *works;
    uint64_t *counts = sim.counts;
    sim_event *heap = sim.heap;
    size_t room = sim.heap_room;
    int32_t i;
    memset(&sim, 0, sizeof sim);
    sim.counts = counts;
    sim.heap = heap;
    sim.heap_room = room;
    sim.seed = seed;
    sim.large = count != 0;
    sim.random = sim_mix(seed ^ UINT64_C(0x5eed)) ^ (uint64_t)count;
    sim.now = 1000 * SIM_S;
    sim.most_steps = count ? 100000000 : 5000000;
    sim.most_time = sim.now + 3600 * SIM_S;
    sim_choose(count);
    sim.nodes = (sim_node *)sim_new((size_t)sim.count * sizeof *sim.nodes);
    sim.runnable = (int32_t *)sim_new((size_t)sim.count * sizeof *sim.runnable);
    works = (sim_worker *)sim_new((size_t)sim.count * sizeof *works);
    sim_on_sleep = sim_nothing_overdue;
    tprpc_test_hook = sim_hook;
    if (!sim_fds_before) sim_fds_before = sim_count_fds();
    for (i = 0; i < sim.count; i++) {
        sim_node *node = &sim.nodes[i];
        node->index = i;
        node->work = &works[i];
        snprintf(node->name, sizeof node->name, "w%d", (int)i);
        works[i].quota = count ? 60 : (int)(520 / sim.count + 1 + sim_below(20));
        sim_choose_clock(node);
        sim_start_node(node, sim_live);
    }
    sim_choose_faults();
    sim_end_event(NULL, 0);
    sim_run_until_over();
    sim.now += 100 * SIM_S;                        /* what is on its way finds nobody */
    while (sim.heap_count) {
        sim_event event = sim_take_event();
        event.run(event.arg, event.value);
    }
    sim_check_ledger();
    if (sim_op_count < 500) sim_fail("%d operations", (int)sim_op_count);
    sim_operations += (uint64_t)sim_op_count;
    sim_work_end();
    sim_net_end(sim.quiet && !sim_static_group);
    for (i = 0; i < sim.count; i++) sim_stacks[sim_stack_count++] = sim.nodes[i].stack;
    free(sim.nodes);
    free(sim.runnable);
    free(works);
    if (sim_count_fds() != sim_fds_before)
        sim_fail("%d descriptors are open, %d were before", sim_count_fds(), (int)sim_fds_before);
    return sim.hash;
}

/* ---- runs of many seeds ---- */

enum { SIM_PROCESSES = 64, SIM_LARGE = 1000, SIM_REAL_S = 200 };   /* a large group; how long a seed may take */

typedef struct sim_shared {            /* by all processes of a run */
    uint64_t next, last, done, counts[SIM_COUNTS], operations;
    uint64_t running[SIM_PROCESSES];   /* the seeds */
} sim_shared;
static sim_shared *sim_all;

/* Runs seeds until none is left. Each seventh seed twice: it must be the same again. */
static void sim_worker_process(int place) {
    uint64_t seed;
    sim_catch_crashes();
    while ((seed = __sync_fetch_and_add(&sim_all->next, 1)) <= sim_all->last) {
        uint64_t hash;
        sim_all->running[place] = seed;
        alarm(SIM_REAL_S);
        hash = sim_run(seed, 0);
        if (seed % 7 == 3 && sim_run(seed, 0) != hash) sim_fail("the seed is another one the second time");
        __sync_fetch_and_add(&sim_all->done, 1);
    }
    __sync_fetch_and_add(&sim_all->operations, sim_operations);
    fflush(NULL);
    _exit(0);
}

/* A large group; of it memory must not grow once it is warm. */
static void sim_large_process(uint64_t seed) {
    sim_catch_crashes();
    alarm(SIM_REAL_S);
    sim_run(seed, SIM_LARGE);
    __sync_fetch_and_add(&sim_all->done, 1);
    __sync_fetch_and_add(&sim_all->operations, sim_operations);
    _exit(0);
}

/* Waits for one of the processes; one that a signal ended has said nothing. Returns whether it was red. */
static int sim_await(pid_t *pids, int count, int large) {
    int status = 0, i = 0;
    const pid_t pid = wait(&status);
    while (i < count && pids[i] != pid) i++;
    if (pid > 0 && WIFSIGNALED(status) && i < count)
        fprintf(stderr, "signal %d (%s) while it ran: build/sim %s %" PRIu64 "\n", WTERMSIG(status),
                strsignal(WTERMSIG(status)), i < large ? "--large" : "--seed", sim_all->running[i]);
    return status != 0;
}

/* Runs the seeds from `first` on, on as many processes as there are processors, and `large` large groups. Returns how
   many processes were red. */
static int sim_run_many(uint64_t first, uint64_t count, int large) {
    pid_t pids[SIM_PROCESSES];
    long jobs = sysconf(_SC_NPROCESSORS_ONLN);
    int started = 0, running = 0, red = 0;
    if (jobs < 1) jobs = 1;
    if (jobs > SIM_PROCESSES - large) jobs = SIM_PROCESSES - large;
    sim_all->next = first;
    sim_all->last = first + count - 1;
    fflush(NULL);
    for (; started < (int)jobs + large; started++, running++) {
        if (running >= jobs) {
            red += sim_await(pids, started, large);
            running--;
        }
        if (started < large) sim_all->running[started] = first + (uint64_t)started;
        pids[started] = fork();
        if (pids[started] < 0) return red + 1;
        if (pids[started] == 0 && started < large) sim_large_process(first + (uint64_t)started);
        if (pids[started] == 0) sim_worker_process(started);
    }
    while (running-- > 0) red += sim_await(pids, started, large);
    return red;
}

static int sim_report(void) {
    int i, low = 0;
    printf("%-24s %10" PRIu64 "\n", "operations", sim_all->operations);
    for (i = 0; i < SIM_COUNTS; i++) {
        printf("%-24s %10" PRIu64 "\n", sim_count_names[i], sim_all->counts[i]);
        if (sim_all->counts[i] >= SIM_FLOOR) continue;
        printf("FAIL %s: only %" PRIu64 "\n", sim_count_names[i], sim_all->counts[i]);
        low++;
    }
    return low;
}

static int sim_usage(void) {
    fprintf(stderr, "usage: sim [--seed N [-v] | --large N [--workers W] [-v] | --from N --count N | --soak [N]]\n");
    return 2;
}

int main(int argc, char **argv) {
    uint64_t first = 1, count = SIM_ASAN ? 120 : 2000;
    int64_t begun = sim_real_us();
    bool one = false, large_one = false, soak = false, floors = true;
    int i, red, low = 0, large = SIM_ASAN ? 0 : 2, passed = 0, workers = SIM_LARGE;
    for (i = 1; i < argc; i++) {
        if (strcmp(argv[i], "-v") == 0) sim_verbose = true;
        else if (strcmp(argv[i], "--soak") == 0 && i + 1 == argc) { soak = true; first = (uint64_t)time(NULL) * 1000; }
        else if (i + 1 == argc) return sim_usage();
        else if (strcmp(argv[i], "--seed") == 0) { one = true; first = strtoull(argv[++i], NULL, 10); }
        else if (strcmp(argv[i], "--large") == 0) { one = large_one = true; first = strtoull(argv[++i], NULL, 10); }
        else if (strcmp(argv[i], "--workers") == 0) workers = atoi(argv[++i]);
        else if (strcmp(argv[i], "--from") == 0) { first = strtoull(argv[++i], NULL, 10); floors = false; large = 0; }
        else if (strcmp(argv[i], "--count") == 0) { count = strtoull(argv[++i], NULL, 10); floors = false; large = 0; }
        else if (strcmp(argv[i], "--soak") == 0) { soak = true; first = strtoull(argv[++i], NULL, 10); }
        else return sim_usage();
    }
    if (workers <= 64 || workers > SIM_NODES) return sim_usage();
    sim_all = (sim_shared *)mmap(NULL, sizeof *sim_all, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (sim_all == MAP_FAILED) return 2;
    sim.counts = sim_all->counts;
    if (one) {
        sim_catch_crashes();
        alarm(SIM_REAL_S * (unsigned)(workers > SIM_LARGE ? workers / (SIM_LARGE / 4) : 1));
        uint64_t hash = sim_run(first, large_one ? workers : 0);
        if (sim_warm) printf("%" PRId64 " bytes when warm, %" PRId64 " at the end\n", sim_warm, sim_last_bytes);
        printf("seed %" PRIu64 ": trace %016" PRIx64 ", %.3f s of virtual time, %" PRIu64 " steps, %.3f s\n", first,
               hash, (double)(sim.now - 1100 * SIM_S) / 1e6, sim.steps, (double)(sim_real_us() - begun) / 1e6);
        return 0;
    }
    if (soak) {
        printf("seeds from %" PRIu64 " on\n", first);
        while (sim_run_many(first, 1000, 1) == 0) {
            first += 1000;
            printf("%" PRIu64 " seeds, %.0f s\n", sim_all->done, (double)(sim_real_us() - begun) / 1e6);
            fflush(stdout);
        }
        return 1;
    }
    red = sim_run_many(first, count, large);
    printf("%s %" PRIu64 " of %" PRIu64 " seeds from %" PRIu64 " on, %.1f s\n", red ? "FAIL" : "ok", sim_all->done,
           count + (uint64_t)large, first, (double)(sim_real_us() - begun) / 1e6);
    if (floors) low = sim_report();
    passed = (red == 0) + (floors && !low);
    printf("%d passed, %d failed\n", passed, (red != 0) + (low != 0));
    return red || low;
}
