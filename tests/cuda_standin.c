/* The stand-in driver: that it is as late, as strict and as careful as tests rely on. What is not the stand-in's own can
   be run against a real driver too, to see whether the stand-in does as that does:
   CUDA_LIBRARY=libcuda.so.1 build/tests/cuda_standin */
#include "cuda/load.h"
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>

#define FUNCTIONS(X)                                                                                          \
    X(cuInit, (unsigned int)) X(cuDriverGetVersion, (int *)) X(cuDeviceGetCount, (int *))                     \
    X(cuDeviceGetName, (char *, int, CUdevice)) X(cuDeviceGetUuid_v2, (CUuuid *, CUdevice))                   \
    X(cuDeviceGetAttribute, (int *, CUdevice_attribute, CUdevice)) X(cuDeviceTotalMem_v2, (size_t *, CUdevice)) \
    X(cuDeviceCanAccessPeer, (int *, CUdevice, CUdevice)) X(cuDevicePrimaryCtxRetain, (CUcontext *, CUdevice)) \
    X(cuDevicePrimaryCtxRelease_v2, (CUdevice)) X(cuDevicePrimaryCtxGetState, (CUdevice, unsigned int *, int *)) \
    X(cuCtxGetCurrent, (CUcontext *)) X(cuCtxSetCurrent, (CUcontext)) X(cuCtxPushCurrent_v2, (CUcontext))     \
    X(cuCtxPopCurrent_v2, (CUcontext *)) X(cuCtxGetDevice, (CUdevice *)) X(cuCtxSynchronize, (void))          \
    X(cuCtxEnablePeerAccess, (CUcontext, unsigned int)) X(cuCtxCreate_v2, (CUcontext *, unsigned int, CUdevice)) \
    X(cuCtxDestroy_v2, (CUcontext)) X(cuStreamCreate, (CUstream *, unsigned int)) X(cuStreamDestroy_v2, (CUstream)) \
    X(cuStreamQuery, (CUstream)) X(cuStreamSynchronize, (CUstream)) X(cuStreamGetCtx, (CUstream, CUcontext *)) \
    X(cuStreamWaitEvent, (CUstream, CUevent, unsigned int)) X(cuLaunchHostFunc, (CUstream, CUhostFn, void *)) \
    X(cuStreamWaitValue32_v2, (CUstream, CUdeviceptr, cuuint32_t, unsigned int))                              \
    X(cuStreamWriteValue32_v2, (CUstream, CUdeviceptr, cuuint32_t, unsigned int))                             \
    X(cuStreamWaitValue64_v2, (CUstream, CUdeviceptr, cuuint64_t, unsigned int))                              \
    X(cuStreamWriteValue64_v2, (CUstream, CUdeviceptr, cuuint64_t, unsigned int))                             \
    X(cuStreamBatchMemOp_v2, (CUstream, unsigned int, CUstreamBatchMemOpParams *, unsigned int))              \
    X(cuStreamIsCapturing, (CUstream, CUstreamCaptureStatus *)) X(cuStreamEndCapture, (CUstream, CUgraph *))  \
    X(cuStreamBeginCapture_v2, (CUstream, CUstreamCaptureMode)) X(cuGraphDestroy, (CUgraph))                  \
    X(cuThreadExchangeStreamCaptureMode, (CUstreamCaptureMode *)) X(cuEventCreate, (CUevent *, unsigned int)) \
    X(cuEventRecord, (CUevent, CUstream)) X(cuEventQuery, (CUevent)) X(cuEventSynchronize, (CUevent))         \
    X(cuEventElapsedTime, (float *, CUevent, CUevent)) X(cuEventDestroy_v2, (CUevent))                        \
    X(cuMemAlloc_v2, (CUdeviceptr *, size_t)) X(cuMemFree_v2, (CUdeviceptr)) X(cuMemGetInfo_v2, (size_t *, size_t *)) \
    X(cuMemAllocAsync, (CUdeviceptr *, size_t, CUstream)) X(cuMemFreeAsync, (CUdeviceptr, CUstream))          \
    X(cuMemPoolSetAccess, (CUmemoryPool, const CUmemAccessDesc *, size_t))                                    \
    X(cuDeviceGetDefaultMemPool, (CUmemoryPool *, CUdevice))                                                  \
    X(cuMemHostAlloc, (void **, size_t, unsigned int)) X(cuMemFreeHost, (void *))                             \
    X(cuMemHostRegister_v2, (void *, size_t, unsigned int)) X(cuMemHostUnregister, (void *))                  \
    X(cuMemGetAddressRange_v2, (CUdeviceptr *, size_t *, CUdeviceptr))                                        \
    X(cuPointerGetAttribute, (void *, CUpointer_attribute, CUdeviceptr))                                      \
    X(cuPointerGetAttributes, (unsigned int, CUpointer_attribute *, void **, CUdeviceptr))                    \
    X(cuMemcpyAsync, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                            \
    X(cuMemcpyHtoD_v2, (CUdeviceptr, const void *, size_t))                                                   \
    X(cuMemcpyHtoDAsync_v2, (CUdeviceptr, const void *, size_t, CUstream))                                    \
    X(cuMemcpyDtoHAsync_v2, (void *, CUdeviceptr, size_t, CUstream)) X(cuMemcpyDtoH_v2, (void *, CUdeviceptr, size_t)) \
    X(cuMemcpyDtoDAsync_v2, (CUdeviceptr, CUdeviceptr, size_t, CUstream))                                     \
    X(cuMemcpyPeerAsync, (CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream))                  \
    X(cuMemsetD8Async, (CUdeviceptr, unsigned char, size_t, CUstream))                                        \
    X(cuMemsetD32Async, (CUdeviceptr, unsigned int, size_t, CUstream))                                        \
    X(cuIpcGetMemHandle, (CUipcMemHandle *, CUdeviceptr)) X(cuIpcCloseMemHandle, (CUdeviceptr))               \
    X(cuIpcOpenMemHandle_v2, (CUdeviceptr *, CUipcMemHandle, unsigned int))                                   \
    X(cuIpcGetEventHandle, (CUipcEventHandle *, CUevent)) X(cuIpcOpenEventHandle, (CUevent *, CUipcEventHandle)) \
    X(cuMemAddressReserve, (CUdeviceptr *, size_t, size_t, CUdeviceptr, unsigned long long))                  \
    X(cuMemAddressFree, (CUdeviceptr, size_t)) X(cuMemRelease, (CUmemGenericAllocationHandle))                \
    X(cuMemCreate, (CUmemGenericAllocationHandle *, size_t, const CUmemAllocationProp *, unsigned long long)) \
    X(cuMemMap, (CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long))              \
    X(cuMemUnmap, (CUdeviceptr, size_t)) X(cuMemSetAccess, (CUdeviceptr, size_t, const CUmemAccessDesc *, size_t)) \
    X(cuMemExportToShareableHandle,                                                                           \
      (void *, CUmemGenericAllocationHandle, CUmemAllocationHandleType, unsigned long long))                  \
    X(cuMemImportFromShareableHandle, (CUmemGenericAllocationHandle *, void *, CUmemAllocationHandleType))    \
    X(cuModuleLoadData, (CUmodule *, const void *)) X(cuModuleUnload, (CUmodule))                             \
    X(cuModuleGetFunction, (CUfunction *, CUmodule, const char *))                                            \
    X(cuLaunchKernel, (CUfunction, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, unsigned int, \
                       unsigned int, CUstream, void **, void **))                                             \
    X(cuGetErrorName, (CUresult, const char **))                                                              \
    X(cuGetProcAddress_v2, (const char *, void **, int, cuuint64_t, CUdriverProcAddressQueryResult *))

#define DECLARE(name, params) static CUresult (*name) params;
FUNCTIONS(DECLARE)
static standin_count_fn *count_of;
static standin_calls_fn *calls_of;
static standin_host_access_fn *host_access;

static void find(void *library, const char *name, void *out, size_t size) {
    void *at = dlsym(library, name);
    if (!at && !standin_is_real()) REQUIRE(at != NULL);
    memcpy(out, &at, size);
}

static void load(void) {
    void *library = standin_load();
#define FIND(name, params) find(library, #name, &name, sizeof name);
    FUNCTIONS(FIND)
    find(library, "standin_count", &count_of, sizeof count_of);
    find(library, "standin_calls", &calls_of, sizeof calls_of);
    find(library, "standin_host_access", &host_access, sizeof host_access);
}

#define OK(call) CHECK_EQ_INT(call, CUDA_SUCCESS)

/* A context of device 0 is current. */
static CUcontext begin(void) {
    CUcontext ctx = NULL;
    load();
    REQUIRE_EQ_INT(cuInit(0), CUDA_SUCCESS);
    REQUIRE_EQ_INT(cuDevicePrimaryCtxRetain(&ctx, 0), CUDA_SUCCESS);
    OK(cuCtxSetCurrent(ctx));
    return ctx;
}

static CUstream new_stream(void) {
    CUstream s = NULL;
    REQUIRE_EQ_INT(cuStreamCreate(&s, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    return s;
}
static CUevent new_event(void) {
    CUevent e = NULL;
    REQUIRE_EQ_INT(cuEventCreate(&e, CU_EVENT_DISABLE_TIMING), CUDA_SUCCESS);
    return e;
}
static CUdeviceptr new_memory(size_t size) {
    CUdeviceptr at = 0;
    REQUIRE_EQ_INT(cuMemAlloc_v2(&at, size), CUDA_SUCCESS);
    return at;
}
static void *new_host(size_t size) {
    void *at = NULL;
    REQUIRE_EQ_INT(cuMemHostAlloc(&at, size, 1), CUDA_SUCCESS);
    memset(at, 0, size);
    return at;
}
static CUdeviceptr device_of(const void *at) { return (CUdeviceptr)(uintptr_t)at; }

/* Only where the stand-in is tested. */
static void of_the_standin_alone(void) { if (standin_is_real()) SKIP("not a stand-in driver"); }

/* ---- who it is ------------------------------------------------------------------------------------------- */

TEST(says_what_it_is) {
    char name[100] = "";
    int version = 0, count = 0, can = -1, integrated = -1;
    CUuuid a, b;
    of_the_standin_alone();
    load();
    CHECK_EQ_INT(cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
    OK(cuInit(0));
    OK(cuDriverGetVersion(&version));
    CHECK_EQ_INT(version, 13000);
    OK(cuDeviceGetCount(&count));
    CHECK_EQ_INT(count, 4);
    OK(cuDeviceGetName(name, sizeof name, 0));
    CHECK_STR(name, "tprpc stand-in device");
    OK(cuDeviceGetUuid_v2(&a, 0));
    OK(cuDeviceGetUuid_v2(&b, 1));
    CHECK(memcmp(&a, &b, sizeof a) != 0);
    OK(cuDeviceGetAttribute(&integrated, CU_DEVICE_ATTRIBUTE_INTEGRATED, 0));
    CHECK_EQ_INT(integrated, 0);
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 4; k++) {
            OK(cuDeviceCanAccessPeer(&can, i, k));
            CHECK_EQ_INT(can, i != k && i / 2 == k / 2);
        }
    CHECK_EQ_INT(cuDeviceCanAccessPeer(&can, 0, 4), CUDA_ERROR_INVALID_DEVICE);
}

TEST(devices_are_chosen_by_index) {
    int count = 0, can = 0;
    CUuuid a;
    of_the_standin_alone();
    setenv("CUDA_VISIBLE_DEVICES", "3,2,7,0", 1);
    load();
    OK(cuInit(0));
    OK(cuDeviceGetCount(&count));
    CHECK_EQ_INT(count, 2);
    OK(cuDeviceGetUuid_v2(&a, 0));
    CHECK_EQ_INT(a.bytes[15], 'A' + 3);
    OK(cuDeviceCanAccessPeer(&can, 0, 1));
    CHECK_EQ_INT(can, 1);
}

TEST(no_devices) {
    of_the_standin_alone();
    setenv("STANDIN_DEVICES", "0", 1);
    load();
    CHECK_EQ_INT(cuInit(0), CUDA_ERROR_NO_DEVICE);
    CHECK_EQ_INT(cuDeviceGetCount(NULL), CUDA_ERROR_NOT_INITIALIZED);
}

TEST(exclusive_device) {
    CUcontext ctx;
    int mode = 0;
    of_the_standin_alone();
    setenv("STANDIN_EXCLUSIVE", "1", 1);
    load();
    OK(cuInit(0));
    CHECK_EQ_INT(cuDevicePrimaryCtxRetain(&ctx, 1), CUDA_ERROR_DEVICE_UNAVAILABLE);
    OK(cuDeviceGetAttribute(&mode, CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, 1));
    CHECK_EQ_INT(mode, CU_COMPUTEMODE_EXCLUSIVE_PROCESS);
    OK(cuDevicePrimaryCtxRetain(&ctx, 0));
}

static void *named(const char *name, int version, int *status) {
    void *at = &at;
    CUdriverProcAddressQueryResult found = -1;
    OK(cuGetProcAddress_v2(name, &at, version, 0, &found));
    *status = (int)found;
    return at;
}

TEST(entry_points_by_version) {
    void *at, *library;
    int status;
    load();
    library = standin_load();
    OK(cuInit(0));
    CHECK(named("cuMemAlloc", 12000, &status) == dlsym(library, "cuMemAlloc_v2"));
    CHECK_EQ_INT(status, CU_GET_PROC_ADDRESS_SUCCESS);
    CHECK(named("cuStreamWaitValue32", 11070, &status) == dlsym(library, "cuStreamWaitValue32_v2"));
    CHECK(named("cuCtxSynchronize", 12000, &status) == dlsym(library, "cuCtxSynchronize"));
    CHECK(named("cuMemAllocAsync", 11010, &status) == NULL);
    CHECK_EQ_INT(status, CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT);
    CHECK(named("cuNothing", 12000, &status) == NULL);
    CHECK_EQ_INT(status, CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND);
    CHECK_EQ_INT(cuGetProcAddress_v2("cuMemAlloc", &at, 99000, 0, NULL), CUDA_ERROR_INVALID_VALUE);
}

TEST(an_old_driver) {
    void *library;
    int status, version = 0;
    of_the_standin_alone();
    setenv("STANDIN_VERSION", "11060", 1);
    load();
    library = standin_load();
    OK(cuInit(0));
    OK(cuDriverGetVersion(&version));
    CHECK_EQ_INT(version, 11060);
    CHECK(named("cuStreamWaitValue32", 11060, &status) == NULL);
    CHECK(named("cuMemAlloc", 11060, &status) == dlsym(library, "cuMemAlloc_v2"));
}

/* ---- streams --------------------------------------------------------------------------------------------- */

enum { SIZE = 1 << 16, WAIT_S = 20, LAZY = CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS };

/* Held back by a word, so that nothing depends on how quick it is. */
TEST(streams_work_in_order_and_behind_the_host) {
    volatile uint32_t *word;
    uint8_t *host, text[SIZE];
    CUdeviceptr at;
    CUstream s;
    begin();
    s = new_stream();
    word = new_host(64);
    host = new_host(SIZE);
    at = new_memory(SIZE);
    OK(cuStreamWaitValue32_v2(s, device_of((const void *)(uintptr_t)word), 1, CU_STREAM_WAIT_VALUE_GEQ));
    for (int i = 1; i <= 50; i++) {
        OK(cuMemsetD8Async(at, (unsigned char)i, SIZE, s));
        OK(cuMemcpyDtoHAsync_v2(host + i, at, SIZE - (size_t)i, s));
    }
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_NOT_READY);
    __atomic_store_n(word, 1u, __ATOMIC_RELEASE);
    OK(cuStreamSynchronize(s));
    OK(cuStreamQuery(s));
    for (int i = 1; i < 50; i++) CHECK_EQ_INT(host[i], i);
    memset(text, 50, sizeof text);
    CHECK_MEM(host + 50, text, SIZE - 50);
    OK(cuMemFree_v2(at));
    OK(cuMemFreeHost(host));
    OK(cuStreamDestroy_v2(s));
}

TEST(streams_are_late) {
    CUstream s;
    CUdeviceptr at;
    int late = 0;
    of_the_standin_alone();
    begin();
    s = new_stream();
    at = new_memory(64);
    for (int i = 0; i < 50; i++) {
        OK(cuMemsetD8Async(at, 1, 64, s));
        late += cuStreamQuery(s) == CUDA_ERROR_NOT_READY;
        OK(cuStreamSynchronize(s));
    }
    CHECK(late > 25);
}

static uint32_t *new_word(void) { return new_host(64); }
static void set_word(uint32_t *word, uint32_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }
static void hold(CUstream s, const uint32_t *word) {
    OK(cuStreamWaitValue32_v2(s, device_of(word), 1, CU_STREAM_WAIT_VALUE_EQ));
}

TEST(the_default_stream_waits_for_blocking_ones) {
    CUstream blocking = NULL, free_stream;
    uint32_t *word, *free_word;
    begin();
    OK(cuStreamCreate(&blocking, CU_STREAM_DEFAULT));
    free_stream = new_stream();
    word = new_word();
    free_word = new_word();
    hold(blocking, word);
    hold(free_stream, free_word);
    OK(cuStreamWriteValue32_v2(NULL, device_of(word + 1), 7, 0));
    CHECK_EQ_INT(cuStreamQuery(NULL), CUDA_ERROR_NOT_READY);
    set_word(word, 1);
    OK(cuStreamSynchronize(NULL));
    CHECK_EQ_INT(word[1], 7);
    CHECK_EQ_INT(cuStreamQuery(free_stream), CUDA_ERROR_NOT_READY);
    set_word(free_word, 1);
    hold(NULL, free_word + 1);
    OK(cuStreamWriteValue32_v2(blocking, device_of(word + 2), 8, 0));
    CHECK_EQ_INT(cuStreamQuery(blocking), CUDA_ERROR_NOT_READY);
    set_word(free_word + 1, 1);
    OK(cuStreamSynchronize(blocking));
    CHECK_EQ_INT(word[2], 8);
}

TEST(events_order_streams) {
    CUstream a, b;
    CUevent e, never;
    uint32_t *word;
    begin();
    a = new_stream();
    b = new_stream();
    e = new_event();
    never = new_event();
    word = new_word();
    OK(cuEventQuery(never));
    OK(cuStreamWaitEvent(b, never, 0));
    hold(a, word);
    OK(cuEventRecord(e, a));
    OK(cuStreamWaitEvent(b, e, 0));
    OK(cuStreamWriteValue32_v2(b, device_of(word + 1), 5, 0));
    CHECK_EQ_INT(cuEventQuery(e), CUDA_ERROR_NOT_READY);
    CHECK_EQ_INT(cuStreamQuery(b), CUDA_ERROR_NOT_READY);
    CHECK_EQ_INT(__atomic_load_n(&word[1], __ATOMIC_ACQUIRE), 0);
    set_word(word, 1);
    OK(cuStreamSynchronize(b));
    OK(cuEventSynchronize(e));
    CHECK_EQ_INT(word[1], 5);
    OK(cuEventDestroy_v2(e));
}

TEST(events_measure_time) {
    CUevent a = NULL, b = NULL;
    CUstream s;
    uint32_t *word;
    float ms = -1;
    begin();
    s = new_stream();
    word = new_word();
    OK(cuEventCreate(&a, CU_EVENT_DEFAULT));
    OK(cuEventCreate(&b, CU_EVENT_DEFAULT));
    OK(cuEventRecord(a, s));
    OK(cuEventSynchronize(a));
    hold(s, word);
    OK(cuEventRecord(b, s));
    CHECK_EQ_INT(cuEventElapsedTime(&ms, a, b), CUDA_ERROR_NOT_READY);
    test_sleep_us(2000);
    set_word(word, 1);
    OK(cuEventSynchronize(b));
    OK(cuEventElapsedTime(&ms, a, b));
    CHECK(ms >= 2);
}

static int answer_of_query;
static void in_a_host_function(void *user) {
    answer_of_query = (int)cuStreamQuery(NULL);
    __atomic_store_n((int *)user, 1, __ATOMIC_RELEASE);
}

TEST(host_functions_run_in_order_and_may_not_call) {
    CUstream s;
    uint32_t *word;
    int ran = 0;
    begin();
    s = new_stream();
    word = new_word();
    hold(s, word);
    OK(cuLaunchHostFunc(s, in_a_host_function, &ran));
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_NOT_READY);
    CHECK_EQ_INT(__atomic_load_n(&ran, __ATOMIC_ACQUIRE), 0);
    set_word(word, 1);
    OK(cuStreamSynchronize(s));
    CHECK_EQ_INT(ran, 1);
    CHECK_EQ_INT(answer_of_query, CUDA_ERROR_NOT_PERMITTED);
}

TEST(words_compare_as_told) {
    CUstream s;
    uint32_t *word;
    uint64_t *wide;
    CUstreamBatchMemOpParams batch[2];
    begin();
    s = new_stream();
    word = new_word();
    wide = new_host(64);
    OK(cuStreamWriteValue32_v2(s, device_of(word), 0xfffffff0u, 0));
    OK(cuStreamWaitValue32_v2(s, device_of(word), 0xffffffe0u, CU_STREAM_WAIT_VALUE_GEQ));
    OK(cuStreamWaitValue32_v2(s, device_of(word), 0x10, CU_STREAM_WAIT_VALUE_AND));
    OK(cuStreamWaitValue32_v2(s, device_of(word), 0x1, CU_STREAM_WAIT_VALUE_NOR));
    OK(cuStreamSynchronize(s));
    OK(cuStreamWaitValue32_v2(s, device_of(word), 4, CU_STREAM_WAIT_VALUE_GEQ));     /* after it wrapped */
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_NOT_READY);
    set_word(word, 5);
    OK(cuStreamSynchronize(s));
    memset(batch, 0, sizeof batch);
    batch[0].writeValue.operation = CU_STREAM_MEM_OP_WRITE_VALUE_64;
    batch[0].writeValue.address = device_of(wide);
    batch[0].writeValue.value64 = UINT64_C(1) << 40;
    batch[1].waitValue.operation = CU_STREAM_MEM_OP_WAIT_VALUE_64;
    batch[1].waitValue.address = device_of(wide);
    batch[1].waitValue.value64 = UINT64_C(1) << 40;
    batch[1].waitValue.flags = CU_STREAM_WAIT_VALUE_EQ;
    OK(cuStreamBatchMemOp_v2(s, 2, batch, 0));
    OK(cuStreamSynchronize(s));
    CHECK(*wide == UINT64_C(1) << 40);
    CHECK_EQ_INT(cuStreamWaitValue32_v2(s, device_of(word) + 2, 4, 0), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ_INT(cuStreamWriteValue32_v2(s, device_of(batch), 4, 0), CUDA_ERROR_INVALID_VALUE);
}

/* ---- memory ---------------------------------------------------------------------------------------------- */

/* Runs it in a child, which it must end by that signal (0: by itself), saying this. Sanitizers handle some signals. */
static void ends_by(void (*run)(void *arg), void *arg, int number, const char *text) {
    char said[8000] = "";
    size_t size = 0;
    ssize_t got;
    int ends[2], status;
    pid_t pid;
    REQUIRE(pipe(ends) == 0);
    fflush(NULL);
    pid = fork();
    REQUIRE(pid >= 0);
    if (pid == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        run(arg);
        _exit(0);
    }
    close(ends[1]);
    while ((got = read(ends[0], said + size, sizeof said - 1 - size)) > 0) size += (size_t)got;
    said[size] = 0;
    close(ends[0]);
    status = test_wait_child(pid, WAIT_S);
    if (number == SIGSEGV && (TEST_ASAN || TEST_TSAN)) CHECK(status != 0);
    else CHECK_EQ_INT(status, number ? 128 + number : 0);
    if (!CHECK_CONTAINS(said, text)) fprintf(stderr, "%s", said);
}

static void host_reads_device_memory(void *arg) {
    (void)arg;
    begin();
    fprintf(stderr, "%d\n", *(volatile char *)(uintptr_t)new_memory(64));
}
static void host_writes_device_memory(void *arg) {
    (void)arg;
    begin();
    *(volatile char *)(uintptr_t)new_memory(64) = 1;
}

TEST(the_host_cannot_touch_device_memory) {
    of_the_standin_alone();
    ends_by(host_reads_device_memory, NULL, SIGSEGV, "the host touched device memory");
    ends_by(host_writes_device_memory, NULL, SIGSEGV, "the host touched device memory");
}

TEST(memory_runs_out) {
    CUdeviceptr at[64], base = 0;
    size_t total = 0, left = 0, size = 0;
    int count = 0;
    CUresult result = CUDA_SUCCESS;
    of_the_standin_alone();
    setenv("STANDIN_MEMORY_MB", "16", 1);
    begin();
    while (count < 64 && (result = cuMemAlloc_v2(&at[count], 1 << 20)) == CUDA_SUCCESS) count++;
    CHECK_EQ_INT(result, CUDA_ERROR_OUT_OF_MEMORY);
    CHECK_EQ_INT(count, 16);
    OK(cuMemGetInfo_v2(&left, &total));
    CHECK_EQ_INT(left, 0);
    CHECK_EQ_INT(total, 16 << 20);
    OK(cuMemGetAddressRange_v2(&base, &size, at[3] + 1000));
    CHECK(base == at[3] && size == 1 << 20);
    CHECK_EQ_INT(cuMemFree_v2(at[3] + 1000), CUDA_ERROR_INVALID_VALUE);
    while (count > 0) OK(cuMemFree_v2(at[--count]));
    CHECK_EQ_INT(cuMemFree_v2(at[0]), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ_INT(cuMemsetD8Async(at[0], 1, 1, NULL), CUDA_ERROR_INVALID_VALUE);
    CHECK_EQ_INT(count_of("allocations"), 0);
    OK(cuMemAlloc_v2(&at[0], 16 << 20));
    CHECK_EQ_INT(cuMemsetD8Async(at[0] + 1, 1, 16 << 20, NULL), CUDA_ERROR_INVALID_VALUE);
}

TEST(copies_of_every_kind) {
    uint8_t pageable[5000], back[5000];
    uint8_t *pinned;
    CUdeviceptr a, b = 0;
    CUcontext first, second = NULL;
    CUstream s;
    int count = 0;
    first = begin();
    OK(cuDeviceGetCount(&count));
    s = new_stream();
    pinned = new_host(5000);
    a = new_memory(5000);
    for (int i = 0; i < 5000; i++) pageable[i] = (uint8_t)(i * 7);
    OK(cuMemcpyHtoDAsync_v2(a, pageable, 5000, s));
    memset(pageable, 0, sizeof pageable);               /* it was read */
    if (count > 2) {                                    /* without peer access */
        OK(cuDevicePrimaryCtxRetain(&second, 2));
        OK(cuCtxPushCurrent_v2(second));
        b = new_memory(5000);
        OK(cuCtxPopCurrent_v2(NULL));
        OK(cuMemcpyPeerAsync(b, second, a, first, 5000, s));
        OK(cuMemsetD8Async(a, 0, 5000, s));
        OK(cuMemcpyAsync(a, b, 5000, s));
    }
    OK(cuMemcpyDtoHAsync_v2(pinned, a, 5000, s));
    OK(cuMemcpyDtoHAsync_v2(back, a, 5000, s));         /* it has been written */
    CHECK_MEM(back, pinned, 5000);
    for (int i = 0; i < 5000; i++) if (back[i] != (uint8_t)(i * 7)) { CHECK_EQ_INT(back[i], i * 7); break; }
    OK(cuMemsetD32Async(a + 4, 0x01020304, 4, s));
    OK(cuStreamSynchronize(s));
    OK(cuMemcpyDtoH_v2(back, a, 24));
    CHECK_EQ_INT(back[3], 21);
    CHECK_EQ_INT(back[4], 4);
    CHECK_EQ_INT(back[19], 1);
    CHECK_EQ_INT(back[20], 140);
    CHECK_EQ_INT(cuMemsetD32Async(a + 2, 0, 1, s), CUDA_ERROR_INVALID_VALUE);
}

TEST(pointers_say_what_they_are) {
    CUcontext ctx, got = NULL;
    CUdeviceptr at, range = 0;
    unsigned int type = 0, legacy = 7;
    int ordinal = -1, number = 0;
    size_t size = 0;
    uint64_t first = 0, second = 0, handles = 7;
    CUmemoryPool pool = NULL;
    uint8_t *pinned;
    CUpointer_attribute asked[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_CONTEXT};
    void *answers[] = {&type, &got};
    ctx = begin();
    at = new_memory(1000);
    pinned = new_host(1000);
    OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, at + 10));
    CHECK_EQ_INT(type, CU_MEMORYTYPE_DEVICE);
    OK(cuPointerGetAttribute(&got, CU_POINTER_ATTRIBUTE_CONTEXT, at));
    CHECK(got == ctx);
    OK(cuPointerGetAttribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at));
    CHECK_EQ_INT(ordinal, 0);
    OK(cuPointerGetAttribute(&range, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, at + 10));
    CHECK(range == at);
    OK(cuPointerGetAttribute(&size, CU_POINTER_ATTRIBUTE_RANGE_SIZE, at + 10));
    CHECK_EQ_INT(size, 1000);
    OK(cuPointerGetAttribute(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at));
    CHECK_EQ_INT(legacy & 0xff, 1);
    OK(cuPointerGetAttribute(&first, CU_POINTER_ATTRIBUTE_BUFFER_ID, at));
    OK(cuMemFree_v2(at));
    at = new_memory(1000);
    OK(cuPointerGetAttribute(&second, CU_POINTER_ATTRIBUTE_BUFFER_ID, at));
    CHECK(first != second);
    OK(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, device_of(pinned + 10)));
    CHECK_EQ_INT(type, CU_MEMORYTYPE_HOST);
    CHECK_EQ_INT(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, device_of(&number)),
                 CUDA_ERROR_INVALID_VALUE);
    OK(cuPointerGetAttributes(2, asked, answers, device_of(&number)));
    CHECK_EQ_INT(type, 0);
    CHECK(got == NULL);
    OK(cuMemAllocAsync(&at, 1000, NULL));
    OK(cuPointerGetAttribute(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at));
    CHECK_EQ_INT(legacy & 0xff, 0);
    OK(cuPointerGetAttribute(&pool, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, at));
    CHECK(pool != NULL);
    OK(cuPointerGetAttribute(&handles, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, at));
    CHECK_EQ_INT(handles, 0);
    OK(cuMemFreeAsync(at, NULL));
}

TEST(registered_host_memory) {
    enum { MAPPED = 8192 };
    uint8_t *at = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    begin();
    OK(cuMemHostRegister_v2(at, MAPPED, 1));
    CHECK_EQ_INT(cuMemHostRegister_v2(at + 4096, 4096, 1), CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
    OK(cuStreamWriteValue32_v2(NULL, device_of(at), 9, 0));
    OK(cuStreamSynchronize(NULL));
    CHECK_EQ_INT(at[0], 9);
    OK(cuMemHostUnregister(at));
    CHECK_EQ_INT(cuMemHostUnregister(at), CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED);
    CHECK_EQ_INT(cuStreamWriteValue32_v2(NULL, device_of(at), 9, 0), CUDA_ERROR_INVALID_VALUE);
}

/* ---- between processes ----------------------------------------------------------------------------------- */

/* What two processes have in common, from before either has a driver. */
typedef struct common {
    uint32_t words[64];
    CUipcMemHandle memory;
    CUipcEventHandle event;
    int ends[2];
} common;

static common *new_common(void) {
    common *c = mmap(NULL, sizeof *c, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(c != MAP_FAILED && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, c->ends) == 0);
    return c;
}

/* The steps of two processes: one says, the other hears. */
static void tell(common *c, int side) { CHECK_EQ_INT(write(c->ends[side], "", 1), 1); }
static void hear(common *c, int side) {
    struct pollfd look = {c->ends[side], POLLIN, 0};
    char byte;
    REQUIRE_EQ_INT(poll(&look, 1, WAIT_S * 1000 * TEST_SLOWDOWN), 1);
    REQUIRE_EQ_INT(read(c->ends[side], &byte, 1), 1);
}

/* Opens what it is told, in stream order behind the word, and says so by the next. */
static void importer(void *arg) {
    common *c = arg;
    CUdeviceptr at = 0, again = 0, own;
    CUstream s;
    uint8_t *text;
    close(c->ends[0]);
    begin();
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    s = new_stream();
    own = new_memory(SIZE);
    text = new_host(SIZE);
    hear(c, 1);
    REQUIRE_EQ_INT(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY), CUDA_SUCCESS);
    OK(cuIpcOpenMemHandle_v2(&again, c->memory, LAZY));
    CHECK(at == again);
    OK(cuIpcCloseMemHandle(again));
    for (uint32_t round = 1; round <= 20; round++) {
        OK(cuStreamWaitValue32_v2(s, device_of(&c->words[0]), round, CU_STREAM_WAIT_VALUE_GEQ));
        OK(cuMemcpyDtoDAsync_v2(own, at + 100, SIZE - 100, s));
        OK(cuStreamWriteValue32_v2(s, device_of(&c->words[16]), round, 0));
        OK(cuMemcpyDtoHAsync_v2(text, own, SIZE - 100, s));
        OK(cuStreamSynchronize(s));
        CHECK_EQ_INT(text[0], round);
        CHECK_EQ_INT(text[SIZE - 101], round);
    }
    OK(cuIpcCloseMemHandle(at));
    CHECK_EQ_INT(cuIpcCloseMemHandle(at), CUDA_ERROR_INVALID_VALUE);
    tell(c, 1);
    hear(c, 1);                 /* it is freed */
    CHECK(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY) != CUDA_SUCCESS);
    OK(cuMemFree_v2(own));
}

TEST(memory_is_shared_between_processes) {
    common *c = new_common();
    pid_t pid = test_fork_run(importer, c);
    CUdeviceptr at, other;
    CUstream s;
    begin();
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    s = new_stream();
    at = new_memory(SIZE);
    OK(cuIpcGetMemHandle(&c->memory, at));
    CHECK_EQ_INT(cuIpcOpenMemHandle_v2(&other, c->memory, LAZY), CUDA_ERROR_INVALID_CONTEXT);
    tell(c, 0);
    for (uint32_t round = 1; round <= 20; round++) {
        OK(cuStreamWaitValue32_v2(s, device_of(&c->words[16]), round - 1, CU_STREAM_WAIT_VALUE_GEQ));
        OK(cuMemsetD8Async(at, (unsigned char)round, SIZE, s));
        OK(cuStreamWriteValue32_v2(s, device_of(&c->words[0]), round, 0));
    }
    hear(c, 0);
    OK(cuMemFree_v2(at));
    tell(c, 0);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 0);
}

static void exporter(void *arg) {
    common *c = arg;
    CUdeviceptr at;
    CUevent e = NULL;
    CUstream s;
    begin();
    s = new_stream();
    at = new_memory(SIZE);
    OK(cuMemsetD8Async(at, 42, SIZE, s));
    OK(cuStreamSynchronize(s));
    OK(cuIpcGetMemHandle(&c->memory, at));
    OK(cuEventCreate(&e, CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING));
    OK(cuIpcGetEventHandle(&c->event, e));
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    hold(s, &c->words[0]);
    OK(cuMemsetD8Async(at, 43, SIZE, s));
    OK(cuEventRecord(e, s));
    tell(c, 1);
    hear(c, 1);
    set_word(&c->words[0], 1);
    OK(cuStreamSynchronize(s));
    pause();
}

TEST(events_of_another_process) {
    common *c = new_common();
    pid_t pid = test_fork_run(exporter, c);
    CUdeviceptr at = 0;
    CUevent e = NULL;
    CUstream s;
    uint8_t *text;
    begin();
    s = new_stream();
    text = new_host(SIZE);
    hear(c, 0);
    REQUIRE_EQ_INT(cuIpcOpenEventHandle(&e, c->event), CUDA_SUCCESS);
    REQUIRE_EQ_INT(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY), CUDA_SUCCESS);
    CHECK_EQ_INT(cuEventQuery(e), CUDA_ERROR_NOT_READY);
    OK(cuStreamWaitEvent(s, e, 0));
    OK(cuMemcpyDtoHAsync_v2(text, at, SIZE, s));
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_NOT_READY);
    tell(c, 0);
    OK(cuStreamSynchronize(s));
    CHECK_EQ_INT(text[0], 43);
    OK(cuEventQuery(e));
    kill(pid, SIGKILL);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 128 + SIGKILL);
    OK(cuEventDestroy_v2(e));
    OK(cuIpcCloseMemHandle(at));
}

/* What was mapped stays, what is opened later is stale, a wait for its event never ends. */
TEST(a_killed_exporter) {
    common *c = new_common();
    pid_t pid = test_fork_run(exporter, c);
    CUdeviceptr at = 0, again = 0;
    CUevent e = NULL, late = NULL;
    CUstream s, stuck;
    uint8_t *text;
    begin();
    s = new_stream();
    stuck = new_stream();
    text = new_host(SIZE);
    hear(c, 0);
    REQUIRE_EQ_INT(cuIpcOpenEventHandle(&e, c->event), CUDA_SUCCESS);
    REQUIRE_EQ_INT(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY), CUDA_SUCCESS);
    kill(pid, SIGKILL);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 128 + SIGKILL);
    OK(cuMemcpyDtoHAsync_v2(text, at, SIZE, s));
    OK(cuStreamSynchronize(s));
    CHECK_EQ_INT(text[SIZE - 1], 42);
    OK(cuIpcCloseMemHandle(at));                        /* while nothing hangs, for it waits for the device */
    OK(cuStreamWaitEvent(stuck, e, 0));
    test_sleep_us(20000);
    CHECK_EQ_INT(cuStreamQuery(stuck), CUDA_ERROR_NOT_READY);
    CHECK(cuIpcOpenMemHandle_v2(&again, c->memory, LAZY) != CUDA_SUCCESS);
    CHECK(cuIpcOpenEventHandle(&late, c->event) != CUDA_SUCCESS);
    memset(&c->memory, 0x5a, sizeof c->memory);
    CHECK(cuIpcOpenMemHandle_v2(&again, c->memory, LAZY) != CUDA_SUCCESS);
    _exit(harness_failures ? 1 : (__sync_lock_test_and_set(&harness_common->finished, 1), 0));
}
