/* Two processes with GPUs: this one, and a child that can be killed. */
#ifndef TPRPC_TESTS_CUDA_TWO_H
#define TPRPC_TESTS_CUDA_TWO_H

#include "cuda_common.h"

enum { TWO_ACCEPTED = 31 };

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

#endif
