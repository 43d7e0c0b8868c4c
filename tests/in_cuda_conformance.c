/* What every backend promises (in_conformance.c), of those of tprpc_cuda.h, on the stand-in driver. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#include "../tprpc.h"
#include "../tprpc_cuda.h"
#include "toys_use.h"
#define UNUSED TOY_USED
#define GPU_HOLDS filled
#define GPU_SEED unsigned
#include "cuda_gpu.h"

static CUstream kit_streams[TOY_DEVICES];

static void kit_begin(int64_t lag_us) {
    char lag[24];
    int i;
    snprintf(lag, sizeof lag, "%lld", (long long)lag_us);
    setenv("STANDIN_LAG_US", lag, 0);
    setenv("STANDIN_MEMORY_MB", "256", 0);
    if (!gpu.count) gpu_load();
    for (i = 0; i < TOY_DEVICES; i++) kit_streams[i] = gpu_stream(i);
}

static void kit_end(void) {
    const int64_t end = deadline();
    int i;
    while (gpu.standin_count("operations") > 0 && test_now_us() < end) test_sleep_us(100);   /* what is given back */
    for (i = 0; i < TOY_DEVICES; i++) CU(cuStreamDestroy_v2(kit_streams[i]));
    CHECK_EQ_INT(gpu.standin_count("allocations"), 0);
    CHECK_EQ_INT(gpu.standin_count("mappings"), 0);
    CHECK_EQ_INT(gpu.standin_count("streams"), 0);
    CHECK_EQ_INT(gpu.standin_count("events"), 0);
    gpu_off();
}

/* The default streams too: what is received is in their order. */
static bool kit_idle(void) {
    bool idle = true;
    int i;
    for (i = 0; i < TOY_DEVICES; i++) {
        gpu_on(i);
        idle = idle && !gate_holds(kit_streams[i]) && !gate_holds(NULL);
    }
    return idle;
}

static void *kit_stream(int32_t index) { return kit_streams[index]; }
static void *kit_stream_new(int32_t index) { return gpu_stream(index); }
static void kit_stream_free(void *stream) {
    CU(cuStreamSynchronize((CUstream)stream));
    CU(cuStreamDestroy_v2((CUstream)stream));
}

static void *kit_alloc(int32_t index, size_t size) { return gpu_alloc(index, size ? size : 1); }

/* A message that has been sent is ordered in its stream, and need not have been read from the memory. */
static void kit_free(int32_t index, void *data) {
    gpu_on(index);
    if (index < TOY_DEVICES) CU(cuStreamSynchronize(kit_streams[index]));
    gpu_free(index, data);
}

static void kit_put(int32_t index, void *stream, void *to, const void *bytes, size_t size) {
    void *staged = gpu_stage(size);
    if (size) memcpy(staged, bytes, size);
    gpu_on(index);
    if (size) CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)to, (CUdeviceptr)(uintptr_t)staged, size, (CUstream)stream));
}

static void kit_get(int32_t index, void *stream, void *out, void *from, size_t size) {
    void *staged = gpu_stage(size);
    gpu_on(index);
    if (size) CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)staged, (CUdeviceptr)(uintptr_t)from, size, (CUstream)stream));
    CU(cuStreamSynchronize((CUstream)stream));
    if (size) memcpy(out, staged, size);
}

static const kit cuda_kit = {"cuda", TPRPC_CUDA, &tpr_cuda_convert_backend, &tpr_cuda_xth_backend,
                             &tpr_cuda_xth_backend, &tpr_cuda_ipc_backend, TPRPC_ERROR_INVALID, true, kit_begin,
                             kit_end, kit_idle, kit_stream, kit_stream_new, kit_stream_free, kit_alloc, kit_free,
                             kit_put, kit_get};

#define CONFORMANCE_KIT cuda_kit
#include "in_conformance.c"

TESTS(registry) {
    size_t count;
    const tprpc_backend *const *backends = tprpc_cuda_backends(&count);
    add_backends(backends, count);
}
