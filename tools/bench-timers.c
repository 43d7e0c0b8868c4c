// bench-timers: what the timeouts of a million pending calls cost. Prints one line of JSON, in ns, medians of the rounds:
//
//   set_ns, cancel_ns            the timing wheel alone: a million timers set, then cancelled in another order
//   call_ns, call_cancel_ns      a million calls of an agent with a timeout of 60 s, begun, then cancelled likewise
//   bare_ns, bare_cancel_ns      as many calls without one, pending at the same time
//
// so that call_ns + call_cancel_ns - bare_ns - bare_cancel_ns is what timeouts add to calls: the wheel, the clock that
// is read for it, and the cache lines that both touch.
//
//   bench-timers [--rounds N] [--count N]      (default: 5, 1000000)
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BATCH = 1000, MOST_ROUNDS = 100 };   // BATCH: operations between two looks at the clock, or polls
static const int64_t TIMEOUT_MS = 60000, START_MS = 30000;

typedef struct timed { tprpc_work timeout; char rest[80]; } timed;   // on cache lines of their own, as calls are
typedef struct side { tprpc_context *ctx; tprpc_agent *agent; bool ready; } side;
typedef struct kept { tprpc_request *requests; uint32_t count; } kept;   // what the called side has not answered

static void die(const char *what, const tprpc_error *error) __attribute__((noreturn));
static void die(const char *what, const tprpc_error *error) {
    fprintf(stderr, "bench-timers: %s%s%s\n", what, error ? ": " : "", error ? error->text : "");
    exit(1);
}

static void *must(void *memory) {
    if (!memory) die("no memory", NULL);
    return memory;
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double median(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, compare);
    return count % 2 ? values[count / 2] : (values[count / 2 - 1] + values[count / 2]) / 2;
}

// 0 to count - 1 in an order that no cache foresees.
static uint32_t *shuffled(uint32_t count) {
    uint32_t *order = (uint32_t *)must(malloc(count * sizeof *order));
    uint64_t random = 1;
    for (uint32_t i = 0; i < count; i++) order[i] = i;
    for (uint32_t i = count - 1; i > 0; i--) {
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407u;
        uint32_t j = (uint32_t)((random >> 32) % (i + 1)), other = order[j];
        order[j] = order[i];
        order[i] = other;
    }
    return order;
}

// ---- the wheel alone: the clock goes on as it does at a million calls a second

static void measure_wheel(const uint32_t *order, timed *timers, uint32_t count, double *set_ns, double *cancel_ns) {
    static tpr_timer_wheel wheel_memory;
    tpr_timer_wheel *wheel = &wheel_memory;
    int64_t clock_us = 1000000000, begin, middle, end;
    tpr_timer_init(wheel, clock_us);
    begin = tpr_os_now_us();
    for (uint32_t i = 0; i < count; i++) {
        tpr_timer_set(wheel, &timers[i].timeout, clock_us + TIMEOUT_MS * 1000);
        if (i % BATCH == 0) tpr_timer_advance(wheel, clock_us += 1000);
    }
    middle = tpr_os_now_us();
    for (uint32_t i = 0; i < count; i++) {
        tpr_timer_cancel(wheel, &timers[order[i]].timeout);
        if (i % BATCH == 0) tpr_timer_advance(wheel, clock_us += 1000);
    }
    end = tpr_os_now_us();
    if (wheel->count) die("timers are left", NULL);
    *set_ns = (double)(middle - begin) * 1000.0 / count;
    *cancel_ns = (double)(end - middle) * 1000.0 / count;
}

// ---- whole calls: two agents of this process, of which one keeps the requests

static void on_call(tprpc_request request, const tprpc_message *message, void *user) {
    kept *all = (kept *)user;
    (void)message;
    if (tprpc_request_keep(request) != TPRPC_OK) die("a request cannot be kept", NULL);
    all->requests[all->count++] = request;
}

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (status != TPRPC_OK) die("start", error);
    ((side *)user)->ready = true;
}

static void open_sides(side sides[2], tprpc_store **store, kept *all, uint32_t count) {
    static const char *const names[] = {"caller", "called"};
    tprpc_error error = {.status = TPRPC_OK};
    for (int i = 0; i < 2; i++) {
        tprpc_context_desc context = {0};
        tprpc_agent_desc agent = {0};
        tprpc_method_desc method = {0};
        tprpc_store_desc local = {0};
        context.limits.memory_bytes = UINT64_C(1) << 40;
        context.limits.pending_calls = 2 * count + 1000;
        context.limits.peer_calls = 2 * count + 1000;
        context.transports = "shm";
        local.url = "local://";
        if (tprpc_context_create(&context, &sides[i].ctx, &error) != TPRPC_OK) die("context", &error);
        if (i == 0 && tprpc_store_open(sides[0].ctx, &local, store, &error) != TPRPC_OK) die("store", &error);
        agent.context = sides[i].ctx;
        agent.name = names[i];
        agent.store = *store;
        agent.rank = i;
        agent.world_size = 2;
        method.name = "nothing";
        method.handler = on_call;
        method.user = all;
        if (tprpc_agent_create(&agent, &sides[i].agent, &error) != TPRPC_OK ||
            tprpc_agent_register(sides[i].agent, &method, &error) != TPRPC_OK ||
            tprpc_agent_start(sides[i].agent, on_ready, &sides[i], &error) != TPRPC_OK) die("agent", &error);
    }
    int64_t limit_us = tpr_os_now_us() + START_MS * 1000;
    while (!sides[0].ready || !sides[1].ready) {
        if (tpr_os_now_us() > limit_us) die("the agents do not become ready", NULL);
        for (int i = 0; i < 2; i++) tprpc_poll(sides[i].ctx, 100, 0);
    }
}

// Lets the other side receive what was sent, until it keeps `keeps` requests, and takes in what came back.
static void settle(side sides[2], const kept *all, uint32_t keeps) {
    int64_t limit_us = tpr_os_now_us() + START_MS * 1000;
    do {
        if (tpr_os_now_us() > limit_us) die("the calls do not arrive", NULL);
        for (int i = 0; i < 4; i++) tprpc_poll(sides[i % 2].ctx, TPRPC_NOW, 0);
    } while (all->count < keeps);
}

// Batches of calls with a timeout and of calls without alternate, so that both meet the same memory, caches and clock
// rate; so do their cancellations. Only the calling side's functions are timed, and the median batch counts, for in some
// the kernel gives memory or another process runs.
static void measure_calls(side sides[2], kept *all, const uint32_t *order, tprpc_future *futures, uint32_t count,
                          double *batches[4]) {
    tprpc_call_options options[2] = {{.timeout_ms = TIMEOUT_MS}, {.timeout_ms = TPRPC_FOREVER}};
    tprpc_method_id id = {0, 0};
    uint32_t sent = 0;
    if (tprpc_resolve(sides[0].agent, "called", "nothing", &id, NULL) != TPRPC_OK) die("resolve", NULL);
    all->count = 0;
    for (uint32_t at = 0; at < 2 * count; at += BATCH) {     // of each two batches one is of each kind
        uint32_t kind = at / BATCH % 2;
        int64_t begin = tpr_os_now_us();
        for (uint32_t i = at; i < at + BATCH; i++)
            if (tprpc_call_id(sides[0].agent, id, NULL, &options[kind], &futures[i]) != TPRPC_OK) die("call", NULL);
        batches[2 * kind][at / BATCH / 2] = (double)(tpr_os_now_us() - begin);
        settle(sides, all, sent += BATCH);
    }
    for (uint32_t at = 0; at < 2 * count; at += BATCH) {
        uint32_t kind = at / BATCH % 2, from = at / (2 * BATCH) * BATCH;
        int64_t begin = tpr_os_now_us();
        for (uint32_t i = from; i < from + BATCH; i++) {
            uint32_t nth = order[i];                          // of its kind
            tprpc_future future = futures[nth / BATCH * 2 * BATCH + kind * BATCH + nth % BATCH];
            if (tprpc_future_cancel(future) != TPRPC_OK) die("a call ended before it was cancelled", NULL);
        }
        batches[2 * kind + 1][at / BATCH / 2] = (double)(tpr_os_now_us() - begin);
        settle(sides, all, sent);
    }
    for (uint32_t i = 0; i < 2 * count; i++) tprpc_future_release(futures[i]);
    for (uint32_t i = 0; i < all->count; i++) tprpc_reply(all->requests[i], NULL);     // INVALID: it was cancelled
    settle(sides, all, sent);
}

static uint32_t number(const char *text, uint32_t most) {
    char *end = NULL;
    unsigned long value = strtoul(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || value < 1 || value > most) {
        fprintf(stderr, "bench-timers: \"%s\" is no number between 1 and %u\n", text, (unsigned)most);
        exit(2);
    }
    return (uint32_t)value;
}

int main(int argc, char **argv) {
    static const char *const keys[] = {"set_ns", "cancel_ns", "call_ns", "call_cancel_ns", "bare_ns", "bare_cancel_ns"};
    static double ns[6][MOST_ROUNDS], *batches[4];
    side sides[2];
    kept all = {NULL, 0};
    tprpc_store *store = NULL;
    uint32_t rounds = 5, count = 1000000;
    for (int i = 1; i < argc; i += 2) {
        bool is_rounds = strcmp(argv[i], "--rounds") == 0;
        if (i + 1 == argc || (!is_rounds && strcmp(argv[i], "--count") != 0)) {
            fputs("usage: bench-timers [--rounds N] [--count N]\n", stderr);
            return 2;
        }
        if (is_rounds) rounds = number(argv[i + 1], MOST_ROUNDS);
        else count = number(argv[i + 1], 10000000);
    }
    count = (count + BATCH - 1) / BATCH * BATCH;
    memset(sides, 0, sizeof sides);
    uint32_t *order = shuffled(count);
    timed *timers = (timed *)must(calloc(count, sizeof *timers));
    tprpc_future *futures = (tprpc_future *)must(calloc(2 * (size_t)count, sizeof *futures));
    for (int i = 0; i < 4; i++) batches[i] = (double *)must(calloc(count / BATCH, sizeof(double)));
    all.requests = (tprpc_request *)must(calloc(2 * (size_t)count, sizeof *all.requests));
    open_sides(sides, &store, &all, count);
    for (uint32_t round = 0; round <= rounds; round++) {     // the first warms up, and is written over
        uint32_t at = round ? round - 1 : 0;
        measure_wheel(order, timers, count, &ns[0][at], &ns[1][at]);
        measure_calls(sides, &all, order, futures, count, batches);
        for (int i = 0; i < 4; i++) ns[2 + i][at] = median(batches[i], (int)(count / BATCH)) * 1000.0 / BATCH;
    }
    for (int i = 0; i < 6; i++) printf("%s\"%s\": %.1f", i ? ", " : "{", keys[i], median(ns[i], (int)rounds));
    puts("}");
    for (int i = 0; i < 2; i++) tprpc_agent_destroy(sides[i].agent);
    tprpc_store_close(store);
    for (int i = 2; i-- > 0;) tprpc_context_destroy(sides[i].ctx);
    for (int i = 0; i < 4; i++) free(batches[i]);
    free(all.requests);
    free(futures);
    free(timers);
    free(order);
    return 0;
}
