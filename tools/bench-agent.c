// bench-agent: what agents cost beyond pipes, where there are many of something. Prints one line of JSON:
//
//   pending_bytes, serving_bytes   memory that one of `calls` calls without a body takes while it is pending, of the
//                                  caller's context and of the one that serves it
//   one_mps, threads_mps           million calls a second from one thread, and from 16 threads, to one worker of another
//                                  process, with as many calls under way in all; the worker has a core of its own, the
//                                  threads share the others
//   crowded_mps                    the same from 16 threads that may take the worker's core, too
//   join_ms                        the median of how long a worker takes to join a dynamic group of `workers`, from its
//                                  creation until it is ready, over tcp://
//
//   bench-agent [--calls N] [--workers N] [--seconds N]      (default: 1000000, 200, 1)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE          // sched_setaffinity
#endif
#include "../tprpc.h"
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 16, UNDER_WAY = 512, HOSTS = 8, JOINS = 21, START_MS = 60000, PORT = 29610 };

static void die(const char *what, const tprpc_error *error) __attribute__((noreturn));
static void die(const char *what, const tprpc_error *error) {
    fprintf(stderr, "bench-agent: %s%s%s\n", what, error ? ": " : "", error ? error->text : "");
    exit(1);
}

static void *must(void *memory) {
    if (!memory) die("no memory", NULL);
    return memory;
}

static tprpc_context *context(uint32_t calls, int64_t spin_us) {
    tprpc_context_desc desc = {0};
    tprpc_context *ctx = NULL;
    tprpc_error error = {.status = TPRPC_OK};
    desc.limits.memory_bytes = UINT64_C(1) << 40;
    desc.limits.pending_calls = calls + 1000;
    desc.spin_us = spin_us;
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) die("context", &error);
    return ctx;
}

// A worker of a static group of two where there is a rank, else of a dynamic one. Not started.
static tprpc_agent *worker(tprpc_context *ctx, const char *name, const char *url, tprpc_store *store, int rank,
                           bool serves) {
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    tprpc_error error = {.status = TPRPC_OK};
    desc.context = ctx;
    desc.name = name;
    desc.init_method = url;
    desc.store = store;
    desc.rank = rank < 0 ? 0 : rank;
    desc.world_size = rank < 0 ? 0 : 2;
    desc.serve_store = serves;
    if (tprpc_agent_create(&desc, &agent, &error) != TPRPC_OK) die("agent", &error);
    return agent;
}

static void serve(tprpc_agent *agent, const char *name, tprpc_handler handler, void *user) {
    const tprpc_method_desc method = {.name = name, .handler = handler, .user = user};
    tprpc_error error = {.status = TPRPC_OK};
    if (tprpc_agent_register(agent, &method, &error) != TPRPC_OK) die("register", &error);
}

static uint64_t memory_of(tprpc_agent *agent) {
    tprpc_stats stats;
    if (tprpc_agent_get_stats(agent, &stats, sizeof stats) != TPRPC_OK) die("stats", NULL);
    return stats.memory_bytes;
}

// ---- pending: both sides in this process, so that the figures of both are at hand

typedef struct kept { tprpc_request *requests; uint32_t count; } kept;

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    kept *all = (kept *)user;
    (void)message;
    if (tprpc_request_keep(request) != TPRPC_OK) die("a request cannot be kept", NULL);
    all->requests[all->count++] = request;
}

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (status != TPRPC_OK) die("start", error);
    ++*(int *)user;
}

static void measure_pending(uint32_t calls, double bytes[2]) {
    static const char *const names[] = {"caller", "called"};
    const tprpc_store_desc local = {.url = "local://"};
    tprpc_context *ctx[2];
    tprpc_agent *agents[2];
    tprpc_store *store = NULL;
    tprpc_future *futures = (tprpc_future *)must(calloc(calls, sizeof *futures));
    tprpc_method_id id = {0, 0};
    kept all = {(tprpc_request *)must(calloc(calls, sizeof(tprpc_request))), 0};
    uint64_t before[2];
    int ready = 0;
    for (int i = 0; i < 2; i++) {
        ctx[i] = context(calls, TPRPC_NOW);
        if (i == 0 && tprpc_store_open(ctx[0], &local, &store, NULL) != TPRPC_OK) die("store", NULL);
        agents[i] = worker(ctx[i], names[i], NULL, store, i, false);
        serve(agents[i], "keep", on_keep, &all);
        if (tprpc_agent_start(agents[i], on_ready, &ready, NULL) != TPRPC_OK) die("start", NULL);
    }
    for (int i = 0; ready < 2; i++) tprpc_poll(ctx[i % 2], TPRPC_NOW, 0);
    if (tprpc_resolve(agents[0], "called", "keep", &id, NULL) != TPRPC_OK) die("resolve", NULL);
    for (uint32_t i = 0; i < calls; i++) {
        if (tprpc_call_id(agents[0], id, NULL, NULL, &futures[i]) != TPRPC_OK) die("call", NULL);
        if (i == 0) {                       // what the pair has for a call at all does not count
            while (all.count < 1) for (int k = 0; k < 2; k++) tprpc_poll(ctx[k], TPRPC_NOW, 0);
            for (int k = 0; k < 2; k++) before[k] = memory_of(agents[k]);
        }
        if (i % 64 == 0) for (int k = 0; k < 2; k++) tprpc_poll(ctx[k], TPRPC_NOW, 0);
    }
    while (all.count < calls) for (int k = 0; k < 2; k++) tprpc_poll(ctx[k], TPRPC_NOW, 0);
    for (int k = 0; k < 2; k++) bytes[k] = (double)(memory_of(agents[k]) - before[k]) / (calls - 1);
    for (uint32_t i = 0; i < calls; i++) tprpc_future_release(futures[i]);
    for (int k = 0; k < 2; k++) tprpc_agent_destroy(agents[k]);
    tprpc_store_close(store);
    for (int k = 2; k-- > 0;) tprpc_context_destroy(ctx[k]);
    free(futures);
    free(all.requests);
}

// ---- threads: one process serves, the other calls

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static bool stopped;
static void on_stop(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message;
    (void)user;
    tprpc_reply(request, NULL);
    stopped = true;
}

static void serve_calls(const char *url) {
    tprpc_context *ctx = context(UNDER_WAY, 0);
    tprpc_agent *agent = worker(ctx, "called", url, NULL, 1, false);
    serve(agent, "echo", on_echo, NULL);
    serve(agent, "stop", on_stop, NULL);
    if (tprpc_agent_wait_ready(agent, START_MS, NULL) != TPRPC_OK) die("the group does not meet", NULL);
    while (!stopped) tprpc_poll(ctx, 10000, 0);
    tprpc_agent_leave(agent, START_MS, NULL);
    tprpc_agent_destroy(agent);
    tprpc_context_destroy(ctx);
}

typedef struct calling { tprpc_agent *agent; tprpc_context *ctx; tprpc_method_id id; int under_way; int64_t until_us;
                         uint64_t calls; } calling;

// Keeps so many calls under way, and waits for the oldest.
static void *call_on_and_on(void *arg) {
    calling *c = (calling *)arg;
    tprpc_future futures[UNDER_WAY];
    const tprpc_message message = {.metadata = "0123456789012345678901234567890123456789012345678901234567890123",
                                   .metadata_size = 64};
    for (uint64_t i = 0;; i++) {
        tprpc_future *slot = &futures[i % (uint64_t)c->under_way];
        if (i >= (uint64_t)c->under_way) {
            if (tprpc_future_wait(*slot, START_MS) != TPRPC_OK) die("a call failed", NULL);
            tprpc_future_release(*slot);
            c->calls++;
        }
        if (i % 16 == 0 && tprpc_now_us(c->ctx) >= c->until_us) {
            for (uint64_t k = i + 1; k < i + (uint64_t)c->under_way; k++) {
                if (k < (uint64_t)c->under_way) continue;       // there was no such call yet
                tprpc_future_wait(futures[k % (uint64_t)c->under_way], START_MS);
                tprpc_future_release(futures[k % (uint64_t)c->under_way]);
            }
            return NULL;
        }
        if (tprpc_call_id(c->agent, c->id, &message, NULL, slot) != TPRPC_OK) die("call", NULL);
    }
}

static double rate_of(tprpc_context *ctx, tprpc_agent *agent, tprpc_method_id id, int threads, int seconds) {
    pthread_t running[THREADS];
    calling each[THREADS];
    uint64_t calls = 0;
    const int64_t begin = tprpc_now_us(ctx);
    for (int i = 0; i < threads; i++) {
        each[i] = (calling){agent, ctx, id, UNDER_WAY / threads, begin + (int64_t)seconds * 1000000, 0};
        if (pthread_create(&running[i], NULL, call_on_and_on, &each[i]) != 0) die("no thread", NULL);
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(running[i], NULL);
        calls += each[i].calls;
    }
    return (double)calls / (double)(tprpc_now_us(ctx) - begin);
}

// Lets a process (0: this one), and the threads that it starts from now on, have these cores.
static void have_cores(pid_t pid, const cpu_set_t *cores) {
    if (sched_setaffinity(pid, sizeof *cores, cores) != 0) die("sched_setaffinity", NULL);
}

static void measure_threads(const char *url, int seconds, double mps[3]) {
    cpu_set_t all, one, others;
    size_t core = 0;
    if (sched_getaffinity(0, sizeof all, &all) != 0) die("sched_getaffinity", NULL);
    while (!CPU_ISSET(core, &all)) core++;
    others = all;
    if (CPU_COUNT(&all) > 1) CPU_CLR(core, &others);
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    pid_t pid = fork();
    if (pid == 0) {
        serve_calls(url);
        exit(0);
    }
    tprpc_context *ctx = context(UNDER_WAY, 0);
    tprpc_agent *agent = worker(ctx, "caller", url, NULL, 0, false);
    tprpc_method_id id = {0, 0};
    tprpc_future future;
    if (tprpc_agent_wait_ready(agent, START_MS, NULL) != TPRPC_OK) die("the group does not meet", NULL);
    if (tprpc_resolve(agent, "called", "echo", &id, NULL) != TPRPC_OK) die("resolve", NULL);
    have_cores(pid, &one);
    have_cores(0, &others);
    rate_of(ctx, agent, id, 1, 1);                               // warms up
    mps[0] = rate_of(ctx, agent, id, 1, seconds);
    mps[1] = rate_of(ctx, agent, id, THREADS, seconds);
    have_cores(pid, &all);
    have_cores(0, &all);
    mps[2] = rate_of(ctx, agent, id, THREADS, seconds);
    if (tprpc_call(agent, "called", "stop", NULL, NULL, &future) == TPRPC_OK) tprpc_future_wait(future, START_MS);
    tprpc_future_release(future);
    tprpc_agent_leave(agent, START_MS, NULL);
    tprpc_agent_destroy(agent);
    tprpc_context_destroy(ctx);
    waitpid(pid, NULL, 0);
}

// ---- joining: a few processes hold the group, each with its share of the workers

static void hold_workers(const char *url, int host, int count, int told) {
    tprpc_context *ctx = context(1000, TPRPC_NOW);
    tprpc_agent **agents = (tprpc_agent **)must(calloc((size_t)count, sizeof(tprpc_agent *)));
    char name[32], byte = 0;
    for (int i = 0; i < count; i++) {
        tprpc_error error = {.status = TPRPC_OK};
        snprintf(name, sizeof name, "host%d-%d", host, i);
        agents[i] = worker(ctx, name, url, NULL, -1, host == 0 && i == 0);
        if (tprpc_agent_wait_ready(agents[i], START_MS, &error) != TPRPC_OK) die(name, &error);
    }
    if (write(told, &byte, 1) != 1) die("nobody listens", NULL);
    for (;;) tprpc_poll(ctx, 100000, 0);     // until it is killed
}

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double measure_join(const char *url, int workers) {
    pid_t pids[HOSTS];
    int told[2];
    double ms[JOINS];
    char byte;
    if (pipe(told) != 0) die("no pipe", NULL);
    for (int i = 0; i < HOSTS; i++) {
        pids[i] = fork();
        if (pids[i] == 0) hold_workers(url, i, workers / HOSTS + (i < workers % HOSTS), told[1]);
        if (i == 0 && read(told[0], &byte, 1) != 1) die("the first workers do not meet", NULL);
    }
    for (int i = 1; i < HOSTS; i++) if (read(told[0], &byte, 1) != 1) die("the workers do not meet", NULL);
    tprpc_context *ctx = context(1000, TPRPC_NOW);
    for (int i = 0; i < JOINS; i++) {
        tprpc_error error = {.status = TPRPC_OK};
        const int64_t begin = tprpc_now_us(ctx);
        tprpc_agent *agent = worker(ctx, "newcomer", url, NULL, -1, false);
        if (tprpc_agent_wait_ready(agent, START_MS, &error) != TPRPC_OK) die("joining", &error);
        ms[i] = (double)(tprpc_now_us(ctx) - begin) / 1000.0;
        if (tprpc_agent_leave(agent, START_MS, &error) != TPRPC_OK) die("leaving", &error);
        tprpc_agent_destroy(agent);
    }
    tprpc_context_destroy(ctx);
    for (int i = 0; i < HOSTS; i++) {
        kill(pids[i], SIGKILL);
        waitpid(pids[i], NULL, 0);
    }
    qsort(ms, JOINS, sizeof *ms, compare);
    return ms[JOINS / 2];
}

int main(int argc, char **argv) {
    static const char *const names[] = {"--calls", "--workers", "--seconds"};
    int values[] = {1000000, 200, 1};
    double bytes[2], mps[3];
    char urls[2][64];
    for (int i = 1; i < argc; i += 2) {
        int at = 0;
        while (at < 3 && strcmp(argv[i], names[at]) != 0) at++;
        if (at == 3 || i + 1 == argc || (values[at] = atoi(argv[i + 1])) < (at == 2 ? 1 : 16)) {
            fputs("usage: bench-agent [--calls N] [--workers N] [--seconds N]\n", stderr);
            return 2;
        }
    }
    for (int i = 0; i < 2; i++) snprintf(urls[i], sizeof urls[i], "tcp://127.0.0.1:%d", PORT + i);
    measure_threads(urls[0], values[2], mps);                    // it forks: before this process is large
    const double join_ms = measure_join(urls[1], values[1]);
    measure_pending((uint32_t)values[0], bytes);
    printf("{\"pending_bytes\": %.1f, \"serving_bytes\": %.1f, \"one_mps\": %.3f, \"threads_mps\": %.3f, "
           "\"crowded_mps\": %.3f, \"join_ms\": %.3f}\n", bytes[0], bytes[1], mps[0], mps[1], mps[2], join_ms);
    return 0;
}
