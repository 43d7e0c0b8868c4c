/* Two processes with GPUs: this one, and a child that can be killed. */
#ifndef TPRPC_TESTS_CUDA_TWO_H
#define TPRPC_TESTS_CUDA_TWO_H

#include "cuda_common.h"

enum { TWO_BUSY = 30, TWO_ACCEPTED };

/* What both see. Flags go up. */
typedef struct two_shared { int flags[32]; char address[128]; uint64_t gate; } two_shared;

typedef struct two {
    side s;                            /* this process's end: s.pipe */
    pid_t child;
    two_shared *shared;
} two;

static UNUSED const char *two_visible;  /* CUDA_VISIBLE_DEVICES of the child; NULL: as here */
static UNUSED const char *two_fails, *two_fails_here;   /* STANDIN_FAIL of the child, and of this process */

typedef struct two_peer {
    const char *address, *channels;
    void (*run)(two *t, void *arg);
    void *arg;
    two_shared *shared;
} two_peer;

static UNUSED void two_raise(two *t, int flag) { STORE(t->shared->flags[flag], 1); }

/* Works until the other process has raised a flag. */
static UNUSED void two_await(two *t, int flag) {
    const int64_t end = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    while (!LOAD(t->shared->flags[flag])) {
        REQUIRE(test_now_us() < end);
        tprpc_poll(t->s.ctx, 500, 0);
    }
}

static UNUSED tprpc_context *two_context(const char *address, const char *channels) {
    char transport[8];
    snprintf(transport, sizeof transport, "%.3s", address);
    return gpu_context(transport, channels, 0);
}

static UNUSED void two_child(void *arg) {
    const two_peer *peer = (const two_peer *)arg;
    two t;
    memset(&t, 0, sizeof t);
    t.shared = peer->shared;
    if (two_visible) setenv("CUDA_VISIBLE_DEVICES", two_visible, 1);
    if (two_fails) setenv("STANDIN_FAIL", two_fails, 1);
    gpu_load();
    t.s.ctx = two_context(peer->address, peer->channels);
    while (!LOAD(t.shared->flags[0])) test_sleep_us(100);
    t.s.pipe = connect_to(t.s.ctx, t.shared->address, 0, 0);
    two_await(&t, TWO_ACCEPTED);       /* who closes before is never accepted */
    peer->run(&t, peer->arg);
    tprpc_pipe_close(t.s.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(t.s.ctx), TPRPC_OK);
}

/* The child connects and runs `run`; this process has accepted when it returns. No driver is loaded here before. */
static UNUSED void two_open(two *t, const char *address, const char *channels, void (*run)(two *, void *), void *arg) {
    two_peer peer;
    accepting accept;
    memset(t, 0, sizeof *t);
    memset(&accept, 0, sizeof accept);
    t->shared = (two_shared *)mmap(NULL, sizeof *t->shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(t->shared != MAP_FAILED);
    peer.address = address;
    peer.channels = channels;
    peer.run = run;
    peer.arg = arg;
    peer.shared = t->shared;
    t->child = test_fork_run(two_child, &peer);
    if (two_fails_here) setenv("STANDIN_FAIL", two_fails_here, 1);
    gpu_load();
    t->s.ctx = two_context(address, channels);
    t->s.listener = listen_on(t->s.ctx, address, 0);
    CHECK_EQ_INT(tprpc_accept(t->s.listener, on_accepted, &accept), TPRPC_OK);
    snprintf(t->shared->address, sizeof t->shared->address, "%s", tprpc_listener_address(t->s.listener, NULL));
    two_raise(t, 0);
    WAIT(&t->s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    t->s.pipe = accept.pipe;
    two_raise(t, TWO_ACCEPTED);
}

/* status: of the child; -1: it was killed. */
static UNUSED void two_close(two *t, bool killed) {
    if (!killed) CHECK_EQ_INT(test_wait_child(t->child, 20), 0);
    tprpc_pipe_close(t->s.pipe);
    tprpc_listener_close(t->s.listener);
    CHECK_EQ_INT(tprpc_context_destroy(t->s.ctx), TPRPC_OK);
}

static UNUSED void two_kill(two *t) {
    kill(t->child, SIGKILL);
    CHECK_EQ_INT(test_wait_child(t->child, 20), 128 + SIGKILL);
}

static UNUSED void two_send(two *t, cargo *c, const tprpc_tensor *out, size_t count) {
    memset(c, 0, sizeof *c);
    c->out.tensors = out;
    c->out.tensor_count = count;
    c->out.release = on_release;
    c->out.release_user = &c->wrote;
    REQUIRE_EQ_INT(tprpc_pipe_write(t->s.pipe, &c->out, on_written, &c->wrote), TPRPC_OK);
}

static UNUSED void two_recv(two *t, cargo *c, tprpc_tensor *in, size_t count) {
    memset(c, 0, sizeof *c);
    c->in.tensors = in;
    c->in.tensor_count = count;
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(t->s.pipe, on_described, &c->described), TPRPC_OK);
    WAIT(&t->s, c->described.runs, 1);
    if (c->described.status == TPRPC_OK)
        REQUIRE_EQ_INT(tprpc_pipe_read(t->s.pipe, &c->in, on_read, &c->got), TPRPC_OK);
}

static UNUSED void two_sent(two *t, cargo *c, const tprpc_tensor *out, size_t count) {
    two_send(t, c, out, count);
    WAIT(&t->s, c->wrote.runs, 1);
    if (c->wrote.status != TPRPC_OK) fprintf(stderr, "wrote: %s\n", c->wrote.text);
    CHECK_EQ_INT(c->wrote.status, TPRPC_OK);
}

static UNUSED void two_got(two *t, cargo *c, tprpc_tensor *in, size_t count) {
    two_recv(t, c, in, count);
    WAIT(&t->s, c->got.runs, 1);
    if (c->got.status != TPRPC_OK) fprintf(stderr, "got: %s\n", c->got.text);
    CHECK_EQ_INT(c->got.status, TPRPC_OK);
}

/* ---- the other process was killed: what this one has left ---- */

/* What is queued on a user's stream is done, within the time that anything may take. */
static UNUSED void two_goes_on(two *t, int device, CUstream stream) {
    uint8_t *mark = (uint8_t *)gpu_pinned(64);
    void *memory = gpu_alloc(device, 64);
    const int64_t end = test_now_us() + WAIT_S * INT64_C(1000000);
    gpu_set(device, stream, memory, 0x77, 64);
    gpu_on(device);
    CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)mark, (CUdeviceptr)(uintptr_t)memory, 64, stream));
    while (gate_holds(stream)) {
        REQUIRE(test_now_us() < end);
        tprpc_poll(t->s.ctx, 1000, 0);
    }
    CU(cuStreamSynchronize(stream));
    CHECK_EQ_INT(mark[63], 0x77);
}

/* The context can still be used: a tensor to a pipe of its own. */
static UNUSED void two_usable(two *t, const char *channels) {
    enum { SOME = 100000 };
    pair p;
    cargo c;
    memset(&p, 0, sizeof p);
    p.s.ctx = t->s.ctx;
    p.s.also = gpu_context("shm", channels, 0);
    pair_connect(&p, "shm://", 0);
    void *memory = gpu_alloc(0, SOME), *target = gpu_alloc(0, SOME);
    tprpc_tensor out = gpu_tensor(0, memory, SOME, NULL, 0), in = gpu_tensor(0, target, SOME, NULL, 0);
    gpu_put(0, NULL, memory, SOME, 12);
    cargo_carry(&c, &p, &out, &in, 1);
    CHECK(gpu_matches(0, NULL, target, SOME, 12));
    tprpc_pipe_close(p.a);
    tprpc_pipe_close(p.b);
    tprpc_listener_close(p.s.listener);
    CHECK_EQ_INT(tprpc_context_destroy(p.s.also), TPRPC_OK);
}

/* Both send to each other, from device 0 to device `to`, until one of them is killed. */
typedef struct two_exchange {
    const char *channels;
    size_t size;
    int to;
    uint64_t after_us;                 /* the child is killed so long after the first message has come there */
} two_exchange;

static void two_exchange_on(two *t, const two_exchange *e, bool child) {
    cargo out, in;
    CUstream s = gpu_stream(0), r = gpu_stream(e->to);
    void *source = gpu_alloc(0, e->size), *target = gpu_alloc(e->to, e->size);
    const tprpc_tensor from = gpu_tensor(0, source, e->size, s, e->to);
    tprpc_tensor to = gpu_tensor(e->to, target, e->size, r, e->to);
    for (int i = 0; ; i++) {
        memset(&out, 0, sizeof out);
        memset(&in, 0, sizeof in);
        out.out.tensors = &from;
        in.in.tensors = &to;
        out.out.tensor_count = in.in.tensor_count = 1;
        out.out.release = on_release;
        out.out.release_user = &out.wrote;
        gpu_set(0, s, source, i, e->size);
        if (tprpc_pipe_write(t->s.pipe, &out.out, on_written, &out.wrote) != TPRPC_OK) break;
        if (tprpc_pipe_read_descriptor(t->s.pipe, on_described, &in.described) == TPRPC_OK) {
            WAIT(&t->s, in.described.runs, 1);
            if (child) two_raise(t, TWO_BUSY);
            if (in.described.status == TPRPC_OK && tprpc_pipe_read(t->s.pipe, &in.in, on_read, &in.got) == TPRPC_OK)
                WAIT(&t->s, in.got.runs, 1);
        }
        WAIT(&t->s, out.wrote.runs, 1);
        if (out.wrote.status != TPRPC_OK || in.got.status != TPRPC_OK) break;
    }
    if (child) return;
    two_goes_on(t, 0, s);
    two_goes_on(t, e->to, r);
}

static UNUSED void two_exchange_child(two *t, void *arg) { two_exchange_on(t, (const two_exchange *)arg, true); }

static UNUSED void *two_kills_after(void *arg) {
    two *t = (two *)arg;
    while (!LOAD(t->shared->flags[TWO_BUSY])) test_sleep_us(50);
    test_sleep_us((int64_t)t->shared->gate);
    kill(t->child, SIGKILL);
    return NULL;
}

static UNUSED void two_killed_at(void *arg) {
    two_exchange *e = (two_exchange *)arg;
    two t;
    pthread_t killer;
    two_open(&t, "shm://", e->channels, two_exchange_child, e);
    t.shared->gate = e->after_us;
    REQUIRE(pthread_create(&killer, NULL, two_kills_after, &t) == 0);
    two_exchange_on(&t, e, false);
    pthread_join(killer, NULL);
    CHECK_EQ_INT(test_wait_child(t.child, 20), 128 + SIGKILL);
    two_usable(&t, e->channels);
    two_close(&t, true);
}

/* At ten moments within so many us, each in processes of its own. */
static UNUSED void two_killed_at_any_moment(two_exchange e, uint64_t within_us) {
    for (uint64_t i = 0; i < 10 / TEST_SLOWDOWN; i++) {
        e.after_us = test_mix(i) % within_us;
        if (!CHECK_EQ_INT(test_wait_child(test_fork_run(two_killed_at, &e), 30), 0))
            fprintf(stderr, "killed after %d us\n", (int)e.after_us);
    }
}

#endif
