/* The simulated network: groups of workers in one process, on a transport with a virtual clock, everything from a seed.

       build/sim                     what the continuous integration runs: all seeds of the list, and the large groups
       build/sim --seed N [-v]       one seed again, identically; -v: with its whole trace
       build/sim --from N --count N  so many seeds
       build/sim --soak [N]          seeds from N on (default: by the clock), until stopped or red

   The parts: sim_world.h (clock, events, fibers), sim_net.h (transport and store), sim_work.h (what workers do, and the
   ledger in which every operation stands). */
#include "sim_work.h"

enum { SIM_FLOOR = 100 };              /* of operations and faults of each kind, in what is run by default */

/* Seeds that were red once, each with what was wrong. */
static const uint64_t sim_once_red[] = {0};

/* ---- faults ---- */

static int64_t sim_fault_every, sim_fault_mix[9];
static bool sim_faults_over;
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

/* Once all workers have begun what they were to begin, and it has ended: the faults end, and then all leave. */
static void sim_end_event(void *arg, uint64_t value) {
    int32_t i;
    (void)arg;
    (void)value;
    if (sim_finished == sim.count) sim_faults_over = true;
    if (sim_finished == sim.count && sim_joined == sim.count && !sim.partitioned) {
        for (i = 0; i < sim.count && !sim.nodes[i].dying && sim.nodes[i].stalled_until <= sim.now; i++) {}
        if (i == sim.count) {
            sim_note(-1, "all leave", 0, 0, 0);
            sim_leaving = true;
            for (i = 0; i < sim.count; i++) sim_wake(&sim.nodes[i]);
            return;
        }
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
    sim_net_is.store_error = !sim.quiet && sim_chance(150) ? sim_between(1, 20) : 0;
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
    sim.quiet = sim.seed % 8 == 0;
    sim.count = count ? count : (int32_t)sim_between(3, 24);
    sim_neighbours = count ? 16 : 0;
    sim_static_group = !count && sim_chance(500);
    sim_has_pipes = !count && sim_chance(600);
    sim_has_big = !count && sim_chance(150);
    sim_timeout_us = sim.quiet ? 300 * SIM_S : sim_between(2, 20) * SIM_S;
    sim_leaving = false;
    sim_finished = sim_joined = 0;
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
        fprintf(stderr, "seed %" PRIu64 ", %.6f s, worker %d: signal %d (%s)\nagain: build/sim --seed %" PRIu64 "\n",
                sim.seed, (double)sim.now / 1e6, sim.current ? (int)sim.current->index : -1, signal, strsignal(signal),
                sim.seed);
        fflush(NULL);
    }
    _exit(1);
}

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
    for (i = SIM_ASAN ? 4 : 0; i < sizeof signals / sizeof signals[0]; i++) sigaction(signals[i], &action, NULL);
}

static int64_t sim_fds_before;

/* Runs a seed to its end; on a failure the process ends. Returns the hash of its trace. */
static uint64_t sim_run(uint64_t seed, int32_t count) {
    static sim_worker *works;
    uint64_t *counts = sim.counts;
    sim_event *heap = sim.heap;
    size_t room = sim.heap_room;
    int64_t operations;
    int32_t i;
    memset(&sim, 0, sizeof sim);
    sim.counts = counts;
    sim.heap = heap;
    sim.heap_room = room;
    sim.seed = seed;
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
        works[i].quota = count ? 40 : (int)(520 / sim.count + 1 + sim_below(20));
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
    operations = sim_op_count;
    if (operations < 500) sim_fail("%d operations", (int)operations);
    sim_work_end();
    sim_net_end();
    for (i = 0; i < sim.count; i++) sim_stacks[sim_stack_count++] = sim.nodes[i].stack;
    free(sim.nodes);
    free(sim.runnable);
    free(works);
    if (sim_count_fds() != sim_fds_before)
        sim_fail("%d descriptors are open, %d were before", sim_count_fds(), (int)sim_fds_before);
    return sim.hash;
}

int main(int argc, char **argv) {
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, n = argc > 2 ? strtoull(argv[2], NULL, 10) : 1;
    static uint64_t counts[SIM_COUNTS];
    int i;
    int64_t start = sim_real_us();
    sim_verbose = argc > 3;
    sim_catch_crashes();
    sim.counts = counts;
    (void)sim_once_red;
    for (uint64_t k = 0; k < n; k++) {
        alarm(20);
        uint64_t hash = sim_run(seed + k, 0);
        if (n < 20) printf("seed %" PRIu64 ": %016" PRIx64 ", %.3f s, steps %d\n", seed + k, hash, (double)(sim.now - 1000 * SIM_S) / 1e6, (int)sim.steps);
    }
    for (i = 0; i < SIM_COUNTS; i++) printf("%-24s %" PRIu64 "\n", sim_count_names[i], counts[i]);
    printf("%.3f s\n", (double)(sim_real_us() - start) / 1e6);
    return 0;
}
