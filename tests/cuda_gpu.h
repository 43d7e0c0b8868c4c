/* The driver as a user has it, and streams that stand still until they are let go. For whoever has UNUSED and fill(), and
   GPU_HOLDS(at, size, seed) for what fill() made, whose seeds are of type GPU_SEED. These tests run on the stand-in driver,
   or with CUDA_LIBRARY=libcuda.so.1 on real GPUs. */
#ifndef TPRPC_TESTS_CUDA_GPU_H
#define TPRPC_TESTS_CUDA_GPU_H

#include "cuda/load.h"
#include "../tprpc_cuda.h"
#include <pthread.h>

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
    X(cuMemGetAllocationGranularity, (size_t *, const CUmemAllocationProp *, CUmemAllocationGranularity_flags)) \
    X(cuMemAddressReserve, (CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long))                  \
    X(cuMemCreate, (CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long)) \
    X(cuMemMap, (CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long))              \
    X(cuMemRelease, (CUmemGenericAllocationHandle))                                                           \
    X(cuMemSetAccess, (CUdeviceptr, size_t, const CUmemAccessDesc *, size_t))                                 \
    X(cuModuleLoadData, (CUmodule *, const void *)) X(cuModuleGetFunction, (CUfunction *, CUmodule, const char *)) \
    X(cuLaunchKernel, (CUfunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, \
                       unsigned int, CUstream, void **, void **))                                             \
    X(cuMemHostGetDevicePointer_v2, (CUdeviceptr *, void *, unsigned int)) X(cuDeviceCanAccessPeer, (int *, CUdevice, CUdevice))

#define GPU_DECLARE(name, params) static UNUSED CUresult (*name) params;
GPU_FUNCTIONS(GPU_DECLARE)

enum { GPU_MOST = 16, GPU_GATES = 64, GPU_STAGE = 64 << 20 };

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

/* How many devices there are, for who has yet to fork: a driver works in no child of who has loaded it. */
static UNUSED int gpu_count_apart(void) {
    int status = 0;
    const pid_t pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        gpu_load();
        _exit(gpu.count);
    }
    REQUIRE(waitpid(pid, &status, 0) == pid && WIFEXITED(status));
    return WEXITSTATUS(status);
}

/* The next calls are for this device. */
static UNUSED void gpu_on(int device) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    REQUIRE(device < gpu.count);
    pthread_mutex_lock(&lock);
    if (!gpu.contexts[device]) CU(cuDevicePrimaryCtxRetain(&gpu.contexts[device], device));
    CU(cuCtxSetCurrent(gpu.contexts[device]));
    pthread_mutex_unlock(&lock);
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

/* Memory as others than cuMemAlloc give it: from the driver's pool, in the order of a stream, */
static UNUSED void *gpu_alloc_async(int device, size_t size, CUstream stream) {
    CUdeviceptr at = 0;
    gpu_on(device);
    CU(cuMemAllocAsync(&at, size, stream));
    return (void *)(uintptr_t)at;
}

/* and virtual memory. It stays. */
static UNUSED void *gpu_alloc_virtual(int device, size_t size) {
    CUmemAllocationProp prop;
    CUmemAccessDesc access;
    CUmemGenericAllocationHandle handle;
    CUdeviceptr at = 0;
    size_t piece = 0;
    memset(&prop, 0, sizeof prop);
    memset(&access, 0, sizeof access);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.location.type = access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = access.location.id = device;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    gpu_on(device);
    CU(cuMemGetAllocationGranularity(&piece, &prop, CU_MEM_ALLOC_GRANULARITY_MINIMUM));
    const size_t whole = (size + piece - 1) / piece * piece;
    CU(cuMemAddressReserve(&at, whole, 0, 0, 0));
    CU(cuMemCreate(&handle, whole, &prop, 0));
    CU(cuMemMap(at, whole, 0, handle, 0));
    CU(cuMemRelease(handle));
    CU(cuMemSetAccess(at, whole, &access, 1));
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

/* Pinned memory for a while: it is used again in turn. Real drivers may wait for a device when they allocate, which a
   stream that stands still would hold up. */
static UNUSED void *gpu_stage(size_t size) {
    static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    static uint8_t *ring;
    static size_t used;
    pthread_mutex_lock(&lock);
    if (!ring) ring = (uint8_t *)gpu_pinned(GPU_STAGE);
    REQUIRE(size <= GPU_STAGE);
    if (used + size > GPU_STAGE) used = 0;
    void *at = ring + used;
    used += (size + 63) & ~(size_t)63;
    pthread_mutex_unlock(&lock);
    return at;
}

/* Writes what fill() makes, in the order of the stream. */
static UNUSED void gpu_put(int device, CUstream stream, void *to, size_t size, uint64_t seed) {
    void *bytes = gpu_stage(size);
    fill(bytes, size, (GPU_SEED)seed);
    gpu_on(device);
    CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)to, (CUdeviceptr)(uintptr_t)bytes, size, stream));
}

/* Whether device memory holds it, once the stream has come that far. */
static UNUSED int gpu_matches(int device, CUstream stream, const void *at, size_t size, uint64_t seed) {
    void *bytes = gpu_stage(size);
    int same;
    gpu_on(device);
    CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)bytes, (CUdeviceptr)(uintptr_t)at, size, stream));
    CU(cuStreamSynchronize(stream));
    same = GPU_HOLDS(bytes, size, (GPU_SEED)seed);
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
        gpu_stage(1);                  /* what is allocated once, is before the first one closes */
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

static UNUSED tprpc_device gpu_device(int index) {     /* -1: the host */
    tprpc_device device;
    device.kind = index < 0 ? TPRPC_CPU : TPRPC_CUDA;
    device.index = index < 0 ? 0 : index;
    return device;
}

#endif
