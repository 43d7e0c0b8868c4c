/* What the tests of pipes share: sides that run in a process or a thread of their own, messages that can be checked. */
#ifndef TPRPC_TESTS_PIPE_COMMON_H
#define TPRPC_TESTS_PIPE_COMMON_H

#include <poll.h>
#include <pthread.h>
#include "sockets.h"

#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_ACQUIRE)
#define STORE(x, v) __atomic_store_n(&(x), v, __ATOMIC_RELEASE)
#define ADD(x, v) __atomic_add_fetch(&(x), v, __ATOMIC_ACQ_REL)
#define UNUSED __attribute__((unused))
#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

enum { WAIT_S = 20 };                  /* the most that anything here takes, but for the sanitizers */

/* ---- outcomes: what became of an operation ---- */

typedef struct outcome {
    int runs, releases;                /* of its callback; of its message's release */
    int place;                         /* in the order of callbacks, from 1 */
    tprpc_status status;
    char text[244];
    pthread_t thread;                  /* that the callback ran on */
} outcome;

static int outcome_order;

static UNUSED void outcome_set(outcome *o, tprpc_status status, const tprpc_error *error) {
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (error) CHECK_EQ_INT(error->status, status);
    if (error) CHECK(error->text[0] != 0);
    o->status = status;
    if (error) memcpy(o->text, error->text, sizeof o->text);
    o->thread = pthread_self();
    o->place = ADD(outcome_order, 1);
    CHECK_EQ_INT(ADD(o->runs, 1), 1);
}

static UNUSED void on_written(tprpc_status status, const tprpc_error *error, void *user) {
    outcome_set((outcome *)user, status, error);
}

static UNUSED void on_described(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    CHECK_EQ_INT(status == TPRPC_OK, m != NULL);
    outcome_set((outcome *)user, status, error);
}

static UNUSED void on_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    CHECK_EQ_INT(status == TPRPC_OK, m != NULL);
    outcome_set((outcome *)user, status, error);
}

static UNUSED void on_release(void *user) { CHECK_EQ_INT(ADD(((outcome *)user)->releases, 1), 1); }

/* ---- bytes that can be told ---- */

static UNUSED uint64_t pattern(uint64_t seed, size_t i) {
    return (seed + 1) * UINT64_C(0x9E3779B97F4A7C15) + i * UINT64_C(0xD6E8FEB86659FD93);
}

enum { PATTERN_BLOCK = 512 };          /* words made at once: the sanitizers look at each copy, not at each word */

static UNUSED void pattern_block(uint64_t *words, uint64_t seed, size_t first) {
    for (size_t i = 0; i < PATTERN_BLOCK; i++) words[i] = pattern(seed, first + i);
}

static UNUSED void fill(void *out, size_t size, uint64_t seed) {
    uint64_t words[PATTERN_BLOCK];
    for (size_t at = 0; at < size; at += sizeof words) {
        pattern_block(words, seed, at / 8);
        memcpy((uint8_t *)out + at, words, size - at < sizeof words ? size - at : sizeof words);
    }
}

static UNUSED int matches(const void *in, size_t size, uint64_t seed) {
    uint64_t words[PATTERN_BLOCK];
    for (size_t at = 0; at < size; at += sizeof words) {
        pattern_block(words, seed, at / 8);
        if (memcmp((const uint8_t *)in + at, words, size - at < sizeof words ? size - at : sizeof words) != 0) return 0;
    }
    return 1;
}

/* ---- contexts at work ---- */

typedef struct side {
    tprpc_context *ctx, *also;         /* also: polled by the same thread (NULL: none) */
    int threads;
    const struct job *job;
    struct common *common;             /* of both sides, also when they are processes */
    int who;                           /* 0: listens; 1: connects */
    tprpc_listener *listener;
    tprpc_pipe *pipe;
} side;

static UNUSED void work(side *s) {
    if (s->threads) { test_sleep_us(100); return; }
    tprpc_poll(s->ctx, s->also ? TPRPC_NOW : 1000, 0);
    if (s->also) tprpc_poll(s->also, 100, 0);
}

static UNUSED int wait_for(side *s, int *count, int least) {
    int64_t deadline = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    while (LOAD(*count) < least) {
        if (test_now_us() > deadline) return 0;
        work(s);
    }
    return 1;
}
#define WAIT(s, count, least) REQUIRE(wait_for(s, &(count), least))

/* Lets the side work for a while, where it is to be shown that something does not happen. */
static UNUSED void idle(side *s, int64_t us) {
    int64_t end = test_now_us() + us;
    while (test_now_us() < end) work(s);
}

/* What the library logs is seen when a test fails. */
static UNUSED void print_log(const tprpc_log *entry, void *user) {
    (void)user;
    fprintf(stderr, "log %d %s: %s\n", (int)entry->level, entry->section, entry->text);
}

static UNUSED tprpc_context *context(const char *transports, int threads) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.threads = threads;
    desc.transports = transports;
    desc.log = print_log;
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

static UNUSED tprpc_listener *listen_on(tprpc_context *ctx, const char *address, int ordered) {
    tprpc_listener_desc desc;
    tprpc_listener *listener = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.addresses = &address;
    desc.address_count = 1;
    desc.ordered = ordered != 0;
    if (tprpc_listen(ctx, &desc, &listener, &error) != TPRPC_OK) fprintf(stderr, "listen: %s\n", error.text);
    REQUIRE(listener != NULL);
    return listener;
}

static UNUSED tprpc_pipe *connect_to(tprpc_context *ctx, const char *address, int ordered, int64_t timeout_ms) {
    tprpc_pipe_desc desc;
    tprpc_pipe *pipe = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.address = address;
    desc.ordered = ordered != 0;
    desc.timeout_ms = timeout_ms;
    if (tprpc_connect(ctx, &desc, &pipe, &error) != TPRPC_OK) fprintf(stderr, "connect: %s\n", error.text);
    REQUIRE(pipe != NULL);
    return pipe;
}

typedef struct accepting { outcome o; tprpc_pipe *pipe; } accepting;

static UNUSED void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    accepting *a = (accepting *)user;
    CHECK_EQ_INT(status == TPRPC_OK, pipe != NULL);
    a->pipe = pipe;
    outcome_set(&a->o, status, error);
}

/* ---- two contexts of this process; where they are polled, this thread drives both ---- */

typedef struct pair { side s; tprpc_pipe *a, *b; } pair;   /* s.ctx listens and has a; s.also has b */

static UNUSED void pair_connect(pair *p, const char *address, int ordered) {
    accepting accept;
    memset(&accept, 0, sizeof accept);
    p->s.listener = listen_on(p->s.ctx, address, ordered);
    CHECK_EQ_INT(tprpc_accept(p->s.listener, on_accepted, &accept), TPRPC_OK);
    p->b = connect_to(p->s.also, tprpc_listener_address(p->s.listener, NULL), ordered, 0);
    WAIT(&p->s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    p->a = accept.pipe;
}

static UNUSED void pair_open(pair *p, const char *transports, const char *address, int threads, int ordered) {
    memset(p, 0, sizeof *p);
    p->s.threads = threads;
    p->s.ctx = context(transports, threads);
    p->s.also = context(transports, threads);
    pair_connect(p, address, ordered);
}

static UNUSED void pair_close(pair *p) {
    tprpc_pipe_close(p->a);
    tprpc_pipe_close(p->b);
    if (p->s.listener) tprpc_listener_close(p->s.listener);
    CHECK_EQ_INT(tprpc_context_destroy(p->s.also), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(p->s.ctx), TPRPC_OK);
}

#endif
