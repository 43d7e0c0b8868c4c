/* What the tests of CUDA share: the driver as a user has it, streams that stand still until they are let go, and pairs of
   contexts that move GPU memory. They run on the stand-in driver, or with CUDA_LIBRARY=libcuda.so.1 on real GPUs. */
#ifndef TPRPC_TESTS_CUDA_COMMON_H
#define TPRPC_TESTS_CUDA_COMMON_H

#include "cuda/load.h"
#include "../tprpc_cuda.h"
#include "pipe_common.h"

#define GPU_FUNCTIONS(X)                                                                                      \
    X(cuInit, (unsigned int)) X(cuDeviceGetCount, (int *)) X(cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice)) \
    X(cuDevicePrimaryCtxGetState, (CUdevice, unsigned int *, int *)) X(cuCtxSetCurrent, (CUcontext))          \
    X(cuCtxGetCurrent, (CUcontext *)) X(cuStreamCreate, (CUstream *, unsigned int)) X(cuStreamDestroy_v2, (CUstream)) \
    X(cuStreamSynchronize, (CUstream)) X(cuStreamQuery, (CUstream)) X(cuStreamIsCapturing, (CUstream, CUstreamCaptureStatus *)) \
    X(cuStreamBeginCapture_v2, (CUstream, CUstreamCaptureMode)) X(cuStreamEndCapture, (CUstream, CUgraph *))  \
    X(cuGraphDestroy, (CUgraph)) X(cuEventCreate, (CUevent *, unsigned int)) X(cuEventDestroy_v2, (CUevent))  \
    X(cuEventRecord, (CUevent, CUstream)) X(cuStreamWaitEvent, (CUstream, CUevent, unsigned int))             \
    X(cuStreamWaitValue64_v2, (CUstream, CUdeviceptr, cuuint64_t, unsigned int))                              \
    X(cuMemAlloc_v2, (CUdeviceptr *, size_t)) X(cuMemFree_v2, (CUdeviceptr)) X(cuMemGetInfo_v2, (size_t *, size_t *)) \
    X(cuMemHostAlloc, (void **, size_t, unsigned int)) X(cuMemFreeHost, (void *))                             \
    X(cuMemcpyAsync, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                            \
    X(cuMemsetD8Async, (CUdeviceptr, unsigned char, size_t, CUstream))                                        \
    X(cuMemAllocAsync, (CUdeviceptr *, size_t, CUstream)) X(cuMemFreeAsync, (CUdeviceptr, CUstream))          \
    X(cuCtxCreate_v2, (CUcontext *, unsigned int, CUdevice)) X(cuCtxDestroy_v2, (CUcontext))                  \
    X(cuMemHostGetDevicePointer_v2, (CUdeviceptr *, void *, unsigned int)) X(cuDeviceCanAccessPeer, (int *, CUdevice, CUdevice))

#define GPU_DECLARE(name, params) static UNUSED CUresult (*name) params;
GPU_FUNCTIONS(GPU_DECLARE)

enum { GPU_MOST = 16, GPU_GATES = 64 };

static struct {
    int        count;
    CUcontext  contexts[GPU_MOST];
    uint64_t  *gates;                  /* words; a gate is open when its word is not 0 */
    int        gate_count;
    standin_count_fn *standin_count;   /* NULL: a real driver */
    standin_calls_fn *standin_calls;
} gpu;

#define CU(call) REQUIRE_EQ_INT((int)(call), 0)

static UNUSED void gpu_find(void *library, const char *name, void *out, size_t size) {
    void *at = dlsym(library, name);
    memcpy(out, &at, size);
}

/* Loads the driver. Not before the last fork. */
static UNUSED void gpu_load(void) {
    void *library = standin_load();
#define GPU_FIND(name, params) gpu_find(library, #name, &name, sizeof name); REQUIRE(name != NULL);
    GPU_FUNCTIONS(GPU_FIND)
    gpu_find(library, "standin_count", &gpu.standin_count, sizeof gpu.standin_count);
    gpu_find(library, "standin_calls", &gpu.standin_calls, sizeof gpu.standin_calls);
    CU(cuInit(0));
    CU(cuDeviceGetCount(&gpu.count));
    if (gpu.count > GPU_MOST) gpu.count = GPU_MOST;
    REQUIRE(gpu.count > 0);
}

/* The next calls are for this device. */
static UNUSED void gpu_on(int device) {
    REQUIRE(device < gpu.count);
    if (!gpu.contexts[device]) CU(cuDevicePrimaryCtxRetain(&gpu.contexts[device], device));
    CU(cuCtxSetCurrent(gpu.contexts[device]));
}

static UNUSED void gpu_off(void) { CU(cuCtxSetCurrent(NULL)); }

static UNUSED bool gpu_has_context(int device) {
    unsigned int flags;
    int active = 0;
    CU(cuDevicePrimaryCtxGetState(device, &flags, &active));
    return active != 0;
}

static UNUSED CUstream gpu_stream(int device) {
    CUstream stream;
    gpu_on(device);
    CU(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    return stream;
}

static UNUSED void *gpu_alloc(int device, size_t size) {
    CUdeviceptr at = 0;
    gpu_on(device);
    CU(cuMemAlloc_v2(&at, size));
    return (void *)(uintptr_t)at;
}

static UNUSED void gpu_free(int device, void *at) {
    gpu_on(device);
    CU(cuMemFree_v2((CUdeviceptr)(uintptr_t)at));
}

static UNUSED void *gpu_pinned(size_t size) {
    void *at = NULL;
    gpu_on(0);
    CU(cuMemHostAlloc(&at, size, 1 | 2));   /* of all contexts, mapped */
    return at;
}

/* Writes what fill() makes, in the order of the stream. */
static UNUSED void gpu_put(int device, CUstream stream, void *to, size_t size, uint64_t seed) {
    void *bytes = gpu_pinned(size ? size : 1);   /* until the test ends */
    fill(bytes, size, seed);
    gpu_on(device);
    CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)to, (CUdeviceptr)(uintptr_t)bytes, size, stream));
}

/* Whether device memory holds it, once the stream has come that far. */
static UNUSED int gpu_matches(int device, CUstream stream, const void *at, size_t size, uint64_t seed) {
    void *bytes = gpu_pinned(size ? size : 1);
    int same;
    gpu_on(device);
    CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)bytes, (CUdeviceptr)(uintptr_t)at, size, stream));
    CU(cuStreamSynchronize(stream));
    same = matches(bytes, size, seed);
    CU(cuMemFreeHost(bytes));
    return same;
}

static UNUSED void gpu_set(int device, CUstream stream, void *at, int value, size_t size) {
    gpu_on(device);
    CU(cuMemsetD8Async((CUdeviceptr)(uintptr_t)at, (unsigned char)value, size, stream));
}

/* ---- gates: a stream goes no further until the test lets it ---- */

static UNUSED uint64_t *gate_close(int device, CUstream stream) {
    CUdeviceptr word;
    if (!gpu.gates) {
        gpu.gates = (uint64_t *)gpu_pinned(GPU_GATES * sizeof *gpu.gates);
        memset(gpu.gates, 0, GPU_GATES * sizeof *gpu.gates);
    }
    REQUIRE(gpu.gate_count < GPU_GATES);
    uint64_t *gate = &gpu.gates[gpu.gate_count++];
    gpu_on(device);
    CU(cuMemHostGetDevicePointer_v2(&word, gate, 0));
    CU(cuStreamWaitValue64_v2(stream, word, 1, CU_STREAM_WAIT_VALUE_GEQ));
    return gate;
}

static UNUSED void gate_open(uint64_t *gate) { __atomic_store_n(gate, 1, __ATOMIC_SEQ_CST); }

static UNUSED bool gate_holds(CUstream stream) { return (int)cuStreamQuery(stream) == CUDA_ERROR_NOT_READY; }

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

static UNUSED tprpc_device gpu_device(int index) {     /* -1: the host */
    tprpc_device device;
    device.kind = index < 0 ? TPRPC_CPU : TPRPC_CUDA;
    device.index = index < 0 ? 0 : index;
    return device;
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
