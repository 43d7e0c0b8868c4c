/* What the tests of CUDA with pipes share: pairs of contexts that move GPU memory. */
#ifndef TPRPC_TESTS_CUDA_COMMON_H
#define TPRPC_TESTS_CUDA_COMMON_H

#include "harness.h"
#include "../tprpc.h"
#include "pipe_common.h"
#define GPU_HOLDS matches
#define GPU_SEED uint64_t
#include "cuda_gpu.h"

enum { WITH_HOST = TPRPC_PATH_DEVICE_TO_HOST | TPRPC_PATH_HOST_TO_DEVICE,
       ALL_OF_DEVICES = WITH_HOST | TPRPC_PATH_DEVICE_TO_DEVICE };

/* ---- contexts and messages ---- */

static UNUSED tprpc_context *gpu_context(const char *transports, const char *channels, int threads) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.threads = threads;
    desc.transports = transports;
    desc.channels = channels;
    desc.log = print_log;
    desc.backends = tprpc_cuda_backends(&desc.backend_count);
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

static UNUSED void gpu_pair(pair *p, const char *address, const char *channels, int threads) {
    char transport[8];
    memset(p, 0, sizeof *p);
    snprintf(transport, sizeof transport, "%.3s", address);
    p->s.threads = threads;
    p->s.ctx = gpu_context(transport, channels, threads);
    p->s.also = gpu_context(transport, channels, threads);
    pair_connect(p, address, 0);
}

static UNUSED tprpc_tensor gpu_tensor(int device, void *data, size_t size, CUstream stream, int target) {
    tprpc_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    tensor.data = data;
    tensor.size = size;
    tensor.device = gpu_device(device);
    tensor.stream = stream;
    tensor.target = gpu_device(target);
    return tensor;
}

/* A message of tensors on its way, borrowed, into memory that is given. */
typedef struct cargo { tprpc_message out, in; outcome wrote, described, got; } cargo;

static UNUSED void cargo_send(cargo *c, tprpc_pipe *from, tprpc_pipe *to, const tprpc_tensor *out, tprpc_tensor *in,
                              size_t count) {
    memset(c, 0, sizeof *c);
    c->out.tensors = out;
    c->in.tensors = in;
    c->out.tensor_count = c->in.tensor_count = count;
    c->out.release = on_release;
    c->out.release_user = &c->wrote;
    REQUIRE_EQ_INT(tprpc_pipe_write(from, &c->out, on_written, &c->wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(to, on_described, &c->described), TPRPC_OK);
}

static UNUSED void cargo_read(cargo *c, side *s, tprpc_pipe *to) {
    WAIT(s, c->described.runs, 1);
    REQUIRE_EQ_INT(c->described.status, TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(to, &c->in, on_read, &c->got), TPRPC_OK);
}

/* A pipe tells of a channel for which tensors it is chosen. */
static UNUSED void pipe_carries(tprpc_pipe *pipe, const char *name, uint32_t carries) {
    const tprpc_path *path = NULL;
    tprpc_pipe_info info;
    CHECK_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    for (uint32_t i = 0; i < info.path_count; i++) if (strcmp(info.paths[i].name, name) == 0) path = &info.paths[i];
    REQUIRE(path != NULL);
    CHECK_EQ_INT(path->carries, carries);
    CHECK_EQ_INT(path->chosen, carries != 0);
    CHECK(path->chosen || path->why[0]);
    CHECK_EQ_INT(path->device_kind, carries > TPRPC_PATH_HOST_TO_HOST ? TPRPC_CUDA : 0);
}

/* Both callbacks have run. */
static UNUSED void cargo_wait(cargo *c, side *s) {
    WAIT(s, c->got.runs, 1);
    WAIT(s, c->wrote.runs, 1);
}

static UNUSED void cargo_carry(cargo *c, pair *p, const tprpc_tensor *out, tprpc_tensor *in, size_t count) {
    cargo_send(c, p->a, p->b, out, in, count);
    cargo_read(c, &p->s, p->b);
    cargo_wait(c, &p->s);
    if (c->wrote.status != TPRPC_OK || c->got.status != TPRPC_OK)
        fprintf(stderr, "wrote: %s\ngot: %s\n", c->wrote.text, c->got.text);
    CHECK_EQ_INT(c->wrote.status, TPRPC_OK);
    CHECK_EQ_INT(c->got.status, TPRPC_OK);
}

#endif
