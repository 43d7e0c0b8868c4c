/* The world of the simulated network: one thread, one virtual clock, everything from one seed.

   Each worker is a program on a stack of its own (a fiber), which makes its context and agent, calls, waits, and leaves
   as a user's program does. Where the library would sleep, the test hook hands over to the scheduler, which lets the
   others run; when all sleep, virtual time jumps to the next event. So nothing waits in real time, and a wait within a
   handler is a real one. */
#ifndef TPRPC_TESTS_SIM_WORLD_H
#define TPRPC_TESTS_SIM_WORLD_H

#include "../tprpc.h"

#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#define SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIM_ASAN 1
#endif
#endif
#ifndef SIM_ASAN
#define SIM_ASAN 0
#endif
#if SIM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { SIM_NODES = 4096, SIM_TRACE = 400, SIM_STACK = SIM_ASAN ? 1024 * 1024 : 256 * 1024 };

#define SIM_NEVER INT64_MAX
#define SIM_US INT64_C(1)
#define SIM_MS INT64_C(1000)
#define SIM_S  INT64_C(1000000)

/* ---- what is counted: each name is a line of the report, and one that stays below its floor fails the run ---- */

#define SIM_COUNTERS(X)                                                                                               \
    X(call_plain) X(call_tensors) X(call_placed) X(call_one_way) X(call_lane) X(call_nested_wait)                     \
    X(call_nested_async) X(call_cancelled) X(call_timed_out) X(call_replied_late) X(call_caller_gone)                 \
    X(call_answered_twice) X(call_failed_by_handler) X(call_unanswered) X(call_no_method) X(call_no_worker)           \
    X(call_refused_place) X(call_from_callback) X(call_waited_for) X(call_resolved) X(call_borrowed) X(call_big)      \
    X(call_in_calm)                                                                                                   \
    X(method_unregistered) X(pipe_connected) X(pipe_accepted) X(pipe_write) X(pipe_borrowed) X(pipe_descriptor)       \
    X(pipe_read) X(pipe_read_into) X(pipe_ordered) X(pipe_closed)                                                     \
    X(fault_split) X(fault_delay) X(fault_full) X(fault_stalled_link) X(fault_cut) X(fault_lost_late)                 \
    X(fault_partition) X(fault_heal) X(fault_kill) X(fault_restart) X(fault_stalled_worker) X(fault_clock_forward)    \
    X(fault_clock_back) X(fault_refused) X(fault_store_slow) X(fault_store_error)                                     \
    X(answer_late) X(answer_to_nobody)                                                                                \
    X(outcome_ok) X(outcome_peer) X(outcome_unreachable) X(outcome_timeout) X(outcome_closed) X(outcome_cancelled)    \
    X(outcome_remote) X(outcome_no_method) X(outcome_no_worker) X(outcome_limit)

enum {
#define X(name) SIM_##name,
    SIM_COUNTERS(X)
#undef X
    SIM_COUNTS
};

static const char *const sim_count_names[] = {
#define X(name) #name,
    SIM_COUNTERS(X)
#undef X
};

/* ---- the world ---- */

typedef struct sim_event {
    int64_t  at;
    uint64_t number;                   /* events of one moment come in the order they were made */
    void   (*run)(void *arg, uint64_t value);
    void    *arg;
    uint64_t value;
} sim_event;

typedef struct sim_trace {
    int64_t     at;
    int32_t     node;
    const char *what;                  /* a literal */
    int64_t     a, b, c;
} sim_trace;

typedef struct sim_heap { int64_t blocks, bytes, most; } sim_heap;

typedef struct sim_node {
    int32_t        index;
    uint32_t       life;               /* how often it was started */
    char           name[16];
    /* its fiber */
    ucontext_t     at;
    void          *stack, *fake;
    void         (*main)(struct sim_node *);
    bool           exists, runnable, sleeping, in_library, away, by_bell, over;
    uint64_t       sleeps;             /* tells a wake-up of an earlier sleep from one of this */
    int64_t        stalled_until;
    /* its clock */
    int64_t        skew_us, ppm, clock_most;
    uint32_t       looks;
    /* what it has of the library */
    tprpc_context *ctx;
    tprpc_agent   *agent;
    tprpc_store   *store;
    struct sim_net *net;
    sim_heap       heap;
    bool           dying;              /* killed: it gets no bytes any more, and ends as soon as it can */
    int            side;               /* of a partition */
    struct sim_worker *work;
} sim_node;

typedef struct sim_world {
    uint64_t   seed, random;
    int64_t    now;
    uint64_t   events_made, steps, most_steps;
    int64_t    most_time;
    sim_event *heap;
    size_t     heap_count, heap_room;
    sim_node  *nodes;
    int32_t    count;                  /* of nodes */
    int32_t   *runnable;
    int32_t    runnable_count, alive, to_come;   /* to_come: dead ones that will be started again */
    sim_node  *current;
    ucontext_t main;
    const void *main_stack;
    size_t     main_size;
    void      *main_fake;
    bool       bells;                  /* somebody's bell was rung */
    bool       large;                  /* a group of a thousand: not a seed of the list */
    bool       quiet;                  /* a seed without faults: everything must succeed */
    bool       partitioned;
    uint64_t   hash;
    sim_trace  trace[SIM_TRACE];
    uint64_t   traced;
    uint64_t  *counts;                 /* shared by all processes of a run */
} sim_world;

static sim_world sim;
static bool sim_verbose, sim_failing;
static void *sim_stacks[SIM_NODES];    /* kept from seed to seed */
static int sim_stack_count;

/* Of the machine, for what the program says of itself; nothing in the world depends on it. */
static int64_t sim_real_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static int sim_count_fds(void) {
    DIR *dir = opendir("/proc/self/fd");
    int count = 0;
    if (!dir) return -1;
    while (readdir(dir)) count++;
    closedir(dir);
    return count;
}

static void sim_count(int what) { __sync_fetch_and_add(&sim.counts[what], 1); }

/* ---- chance ---- */

static uint64_t sim_mix(uint64_t x) {
    x = (x ^ x >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ x >> 27) * UINT64_C(0x94d049bb133111eb);
    return x ^ x >> 31;
}

static uint64_t sim_random(void) { return sim_mix(sim.random += UINT64_C(0x9e3779b97f4a7c15)); }

/* 0 to below - 1. */
static int64_t sim_below(int64_t below) { return (int64_t)(sim_random() % (uint64_t)below); }
static int64_t sim_between(int64_t low, int64_t high) { return low + sim_below(high - low + 1); }
static bool sim_chance(int64_t of_1000) { return sim_below(1000) < of_1000; }

/* Small values often, large ones seldom, as sizes and delays are. */
static int64_t sim_spread(int64_t most) {
    int bits = 1;
    while (bits < 62 && most >> bits) bits++;
    return sim_below(INT64_C(1) << sim_between(0, bits)) % (most + 1);
}

/* The library's random bytes come from the seed too. */
ssize_t getrandom(void *out, size_t size, unsigned flags);
ssize_t getrandom(void *out, size_t size, unsigned flags) {
    uint8_t *at = (uint8_t *)out;
    size_t i;
    (void)flags;
    for (i = 0; i < size; i++) at[i] = (uint8_t)sim_random();
    return (ssize_t)size;
}

/* ---- the trace ---- */

static void sim_note(int32_t node, const char *what, int64_t a, int64_t b, int64_t c) {
    sim_trace *entry = &sim.trace[sim.traced++ % SIM_TRACE];
    entry->at = sim.now;
    entry->node = node;
    entry->what = what;
    entry->a = a;
    entry->b = b;
    entry->c = c;
    sim.hash = sim_mix(sim.hash ^ (uint64_t)sim.now) + (uint64_t)node;
    sim.hash = sim_mix(sim.hash ^ (uint64_t)a) + (uint64_t)(uint8_t)what[0] * 256 + (uint64_t)(uint8_t)what[1];
    sim.hash = sim_mix(sim.hash ^ (uint64_t)b) + (uint64_t)c;
    if (sim_verbose)
        fprintf(stderr, "%12.6f w%-3d %s %" PRId64 " %" PRId64 " %" PRId64 "\n", (double)sim.now / 1e6, (int)node, what,
                a, b, c);
}

static void sim_print_trace(void) {
    uint64_t i, first = sim.traced > SIM_TRACE ? sim.traced - SIM_TRACE : 0;
    for (i = first; i < sim.traced && !sim_verbose; i++) {
        const sim_trace *entry = &sim.trace[i % SIM_TRACE];
        fprintf(stderr, "%12.6f w%-3d %s %" PRId64 " %" PRId64 " %" PRId64 "\n", (double)entry->at / 1e6,
                (int)entry->node, entry->what, entry->a, entry->b, entry->c);
    }
}

/* The seed is wrong: says where and how, and ends the process. */
__attribute__((format(printf, 1, 2), noreturn))
static void sim_fail(const char *format, ...) {
    va_list args;
    if (sim_failing) _exit(3);
    sim_failing = true;
    sim_print_trace();
    fprintf(stderr, "seed %" PRIu64 ", %.6f s, worker %d: ", sim.seed, (double)sim.now / 1e6,
            sim.current ? (int)sim.current->index : -1);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\nagain: build/sim %s %" PRIu64 "\n", sim.large ? "--large" : "--seed", sim.seed);
    fflush(NULL);
    _exit(1);
}

#define SIM_CHECK(condition) ((condition) ? (void)0 : sim_fail("%s:%d: %s", __FILE__, __LINE__, #condition))

static void *sim_new(size_t size) {
    void *memory = calloc(1, size);
    if (!memory) sim_fail("the simulation has no memory");
    return memory;
}

/* ---- events: a binary heap ---- */

static bool sim_before(const sim_event *a, const sim_event *b) {
    return a->at != b->at ? a->at < b->at : a->number < b->number;
}

static void sim_at(int64_t at, void (*run)(void *, uint64_t), void *arg, uint64_t value) {
    sim_event event;
    size_t i;
    event.at = at < sim.now ? sim.now : at;
    event.number = sim.events_made++;
    event.run = run;
    event.arg = arg;
    event.value = value;
    if (sim.heap_count == sim.heap_room) {
        sim.heap_room = sim.heap_room ? sim.heap_room * 2 : 1024;
        sim.heap = (sim_event *)realloc(sim.heap, sim.heap_room * sizeof *sim.heap);
        if (!sim.heap) sim_fail("the simulation has no memory");
    }
    for (i = sim.heap_count++; i > 0 && sim_before(&event, &sim.heap[(i - 1) / 2]); i = (i - 1) / 2)
        sim.heap[i] = sim.heap[(i - 1) / 2];
    sim.heap[i] = event;
}

static void sim_after(int64_t delay, void (*run)(void *, uint64_t), void *arg, uint64_t value) {
    sim_at(sim.now + delay, run, arg, value);
}

static sim_event sim_take_event(void) {
    sim_event first = sim.heap[0], last = sim.heap[--sim.heap_count];
    size_t i = 0, child;
    while ((child = 2 * i + 1) < sim.heap_count) {
        if (child + 1 < sim.heap_count && sim_before(&sim.heap[child + 1], &sim.heap[child])) child++;
        if (!sim_before(&sim.heap[child], &last)) break;
        sim.heap[i] = sim.heap[child];
        i = child;
    }
    if (sim.heap_count) sim.heap[i] = last;
    return first;
}

/* ---- a worker's clock ---- */

static int64_t sim_clock_of(const sim_node *node) {
    return sim.now + node->skew_us + sim.now / 1000000 * node->ppm + sim.now % 1000000 * node->ppm / 1000000;
}

/* The library's clock_us. To look takes time: so budgets end. */
static int64_t sim_clock(void *user) {
    sim_node *node = (sim_node *)user;
    int64_t now;
    if (++node->looks % 4 == 0) node->skew_us++;
    now = sim_clock_of(node);
    if (now > node->clock_most) node->clock_most = now;
    return now;
}

/* How much virtual time passes until that clock has moved by so much. */
static int64_t sim_real(const sim_node *node, int64_t us) {
    int64_t second = 1000000 + node->ppm;
    if (us > SIM_NEVER / 4) return SIM_NEVER;
    return us - us / second * node->ppm - us % second * node->ppm / second + 2;
}

/* ---- fibers ---- */

static void sim_switch(ucontext_t *from, void **fake, ucontext_t *to, const void *stack, size_t size) {
#if SIM_ASAN
    __sanitizer_start_switch_fiber(fake, stack, size);
#endif
    swapcontext(from, to);
#if SIM_ASAN
    __sanitizer_finish_switch_fiber(fake ? *fake : NULL, NULL, NULL);
#else
    (void)fake, (void)stack, (void)size;
#endif
}

static void sim_yield(void) {
    sim_node *node = sim.current;
    sim.current = NULL;
    sim_switch(&node->at, node->over ? NULL : &node->fake, &sim.main, sim.main_stack, sim.main_size);
}

static void sim_enter(void) {
    sim_node *node = sim.current;
#if SIM_ASAN
    __sanitizer_finish_switch_fiber(NULL, &sim.main_stack, &sim.main_size);
#endif
    node->main(node);
    node->over = true;
    sim_yield();
    abort();
}

static void sim_make_runnable(sim_node *node) {
    if (node->runnable || node->over || !node->exists) return;
    node->runnable = true;
    sim.runnable[sim.runnable_count++] = node->index;
}

static void sim_unstall(void *arg, uint64_t life) {
    sim_node *node = (sim_node *)arg;
    if (node->life == life && node->stalled_until <= sim.now) sim_make_runnable(node);
}

/* Ends the worker's sleep, if it sleeps; one that is stalled sleeps on. */
static void sim_wake_up(sim_node *node) {
    if (!node->sleeping) return;
    node->sleeping = false;
    node->sleeps++;
    if (node->stalled_until > sim.now) sim_at(node->stalled_until, sim_unstall, node, node->life);
    else sim_make_runnable(node);
}

/* Something has come for it, which one that is away between two frames does not notice. */
static void sim_wake(sim_node *node) {
    if (!node->away) sim_wake_up(node);
}

static void sim_wake_due(void *arg, uint64_t sleeps) {
    sim_node *node = (sim_node *)arg;
    if (node->sleeps == sleeps) sim_wake_up(node);
}

/* The running worker sleeps until it is woken, at most that long by its own clock (negative: no limit). */
static void sim_sleep(int64_t us, bool in_library) {
    sim_node *node = sim.current;
    int64_t left = us < 0 ? SIM_NEVER : sim_real(node, us);
    node->sleeping = true;
    node->in_library = in_library;
    node->away = !in_library;
    node->by_bell = false;
    if (left < SIM_NEVER - sim.now) sim_after(left, sim_wake_due, node, node->sleeps);
    sim_yield();
    node->in_library = node->away = false;
}

static void sim_start_node(sim_node *node, void (*run)(sim_node *)) {
    if (!node->stack) {
        if (sim_stack_count) {
            node->stack = sim_stacks[--sim_stack_count];
        } else {                       /* with a page below that none may touch */
            node->stack = mmap(NULL, SIM_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                               0);
            if (node->stack == MAP_FAILED || mprotect(node->stack, 4096, PROT_NONE) != 0)
                sim_fail("the simulation has no memory for a stack");
        }
    }
    getcontext(&node->at);
    node->at.uc_stack.ss_sp = node->stack;
    node->at.uc_stack.ss_size = SIM_STACK;
    node->at.uc_link = NULL;
    makecontext(&node->at, sim_enter, 0);
    node->main = run;
    node->over = node->sleeping = node->dying = false;
    node->exists = true;
    node->stalled_until = 0;
    node->life++;
    node->sleeps++;
    sim.alive++;
    sim_make_runnable(node);
}

static void sim_run_node(sim_node *node) {
    sim.current = node;
    sim_switch(&sim.main, &sim.main_fake, &node->at, node->stack, SIM_STACK);
    if (!node->over) return;
    node->exists = false;
    sim.alive--;
}

/* ---- the hook: where the library would sleep, and what it rings ---- */

static void (*sim_on_sleep)(sim_node *node, int64_t us);      /* it has nothing more to do now */

static int sim_hook(const char *call, int64_t *size) {
    sim_node *node = sim.current;
    switch (call[0]) {
    case 'e':
        if (strcmp(call, "epoll_peek") == 0) return EINTR;         /* of real sockets, and there are none */
        if (strcmp(call, "epoll_wait") != 0) return 0;
        if (!node) sim_fail("the library waits on the scheduler's own stack");
        if (sim_on_sleep) sim_on_sleep(node, *size);
        sim_sleep(*size, true);
        if (!node->by_bell) return EINTR;
        *size = 0;                                                 /* for it to clear the bell */
        return 0;
    case 'b':
        if (strcmp(call, "bell_write") == 0) sim.bells = true;
        return 0;
    case 'm': return strcmp(call, "memfd_create") == 0 ? EPERM : 0;   /* no shared memory here: contexts are quicker */
    case 'f':
        if (strcmp(call, "futex_wait") == 0) sim_fail("the only thread waits for another one");
        return 0;
    default: return 0;
    }
}

/* Whose bell was rung is asked of the descriptors: so one that is not rung when it should be stays asleep. */
static void sim_look_at_bells(void) {
    static struct pollfd fds[SIM_NODES];
    static int32_t who[SIM_NODES];
    nfds_t count = 0, k;
    int32_t i;
    sim.bells = false;
    for (i = 0; i < sim.count; i++) {
        sim_node *node = &sim.nodes[i];
        if (!node->exists || !node->sleeping || !node->in_library || !node->ctx) continue;
        fds[count].fd = (int)tprpc_context_handle(node->ctx);
        fds[count].events = POLLIN;
        who[count++] = i;
    }
    if (count == 0 || poll(fds, count, 0) <= 0) return;
    for (k = 0; k < count; k++) {
        if (!fds[k].revents) continue;
        sim.nodes[who[k]].by_bell = true;
        sim_wake(&sim.nodes[who[k]]);
    }
}

/* ---- the scheduler ---- */

static void sim_run_until_over(void) {
    while (sim.alive > 0 || sim.to_come > 0) {
        if (++sim.steps > sim.most_steps) sim_fail("no end after %" PRIu64 " steps", sim.steps);
        if (sim.bells) sim_look_at_bells();
        if (sim.runnable_count) {
            int32_t i = (int32_t)sim_below(sim.runnable_count), index = sim.runnable[i];
            sim.runnable[i] = sim.runnable[--sim.runnable_count];
            sim.nodes[index].runnable = false;
            sim_run_node(&sim.nodes[index]);
        } else if (sim.heap_count) {
            sim_event event = sim_take_event();
            if (event.at > sim.most_time) sim_fail("no end after %.1f s of virtual time", (double)sim.now / 1e6);
            sim.now = event.at;
            event.run(event.arg, event.value);
        } else {
            sim_fail("%d workers wait, and nothing will ever happen", (int)sim.alive);
        }
    }
}

/* ---- memory of the library's, counted for each worker ---- */

static void *sim_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    sim_heap *heap = (sim_heap *)user;
    void *ptr = NULL;
    (void)tag;
    if (posix_memalign(&ptr, align < sizeof ptr ? sizeof ptr : align, size ? size : 1) != 0) return NULL;
    heap->blocks++;
    heap->bytes += (int64_t)size;
    if (heap->bytes > heap->most) heap->most = heap->bytes;
    return ptr;
}

static void sim_free(void *ptr, size_t size, uint32_t tag, void *user) {
    sim_heap *heap = (sim_heap *)user;
    (void)tag;
    if (!ptr) return;
    heap->blocks--;
    heap->bytes -= (int64_t)size;
    free(ptr);
}

#endif
