/* The stand-in driver: that it is as late, as strict and as careful as tests rely on. What is not the stand-in's own
   can be run against a real driver too, to see whether the stand-in does as that does:
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
static standin_host_access_fn *host_access;         /* these are NULL for a real driver */

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

/* Of this seed, ten operations are late by 99 ms in sum. */
TEST(streams_are_late) {
    CUstream s;
    CUdeviceptr at;
    int64_t begun;
    of_the_standin_alone();
    setenv("STANDIN_LAG_US", "20000", 1);
    setenv("STANDIN_SEED", "1", 1);
    begin();
    s = new_stream();
    at = new_memory(64);
    begun = test_now_us();
    for (int i = 0; i < 10; i++) OK(cuMemsetD8Async(at, 1, 64, s));
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_NOT_READY);
    OK(cuStreamSynchronize(s));
    CHECK_LE_INT(80000, test_now_us() - begun);
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
    test_sleep_us(20000);
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
    uint8_t buffer[SIZE];
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
    new_memory(SIZE);           /* which might be taken for it */
    tell(c, 0);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 0);
}

static void opens_in_vain(void *arg) {
    common *c = arg;
    CUdeviceptr at = 0;
    begin();
    hear(c, 1);
    CHECK(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY) != CUDA_SUCCESS);
}

/* The bytes of freed memory may be there for a while, if another device still knew them. */
TEST(freed_memory_is_not_opened) {
    common *c = new_common();
    CUcontext first, second = NULL;
    CUdeviceptr at;
    pid_t pid;
    of_the_standin_alone();
    pid = test_fork_run(opens_in_vain, c);
    first = begin();
    at = new_memory(SIZE);
    OK(cuIpcGetMemHandle(&c->memory, at));
    OK(cuDevicePrimaryCtxRetain(&second, 1));
    OK(cuCtxSetCurrent(second));
    OK(cuMemcpyDtoDAsync_v2(new_memory(SIZE), at, SIZE, new_stream()));
    while (count_of("operations")) test_sleep_us(1000);
    OK(cuCtxSetCurrent(first));
    OK(cuMemFree_v2(at));
    tell(c, 0);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 0);
}

/* A device has its number of each process, and one that is hidden can still be reached. */
static void sees_other_devices(void *arg) {
    common *c = arg;
    CUcontext second = NULL;
    CUdeviceptr at = 0;
    int ordinal = -1;
    uint8_t got = 0;
    setenv("CUDA_VISIBLE_DEVICES", "3,0", 1);
    hear(c, 1);
    begin();
    CHECK_EQ_INT(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY), CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
    REQUIRE_EQ_INT(cuDevicePrimaryCtxRetain(&second, 1), CUDA_SUCCESS);
    OK(cuCtxSetCurrent(second));
    REQUIRE_EQ_INT(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY), CUDA_SUCCESS);
    OK(cuPointerGetAttribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at));
    CHECK_EQ_INT(ordinal, 1);
    OK(cuMemcpyDtoH_v2(&got, at, 1));
    CHECK_EQ_INT(got, 6);
    OK(cuIpcCloseMemHandle(at));
}

TEST(processes_that_see_other_devices) {
    common *c = new_common();
    CUdeviceptr at;
    pid_t pid;
    of_the_standin_alone();
    pid = test_fork_run(sees_other_devices, c);
    setenv("CUDA_VISIBLE_DEVICES", "1", 1);
    begin();
    at = new_memory(SIZE);
    OK(cuMemsetD8Async(at, 6, SIZE, NULL));
    OK(cuStreamSynchronize(NULL));
    OK(cuIpcGetMemHandle(&c->memory, at));
    tell(c, 0);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 0);
    OK(cuMemFree_v2(at));
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
}

/* ---- order ----------------------------------------------------------------------------------------------- */

static CUfunction kernel_named(const char *name) {
    CUmodule module = NULL;
    CUfunction f = NULL;
    REQUIRE_EQ_INT(cuModuleLoadData(&module, "standin"), CUDA_SUCCESS);
    REQUIRE_EQ_INT(cuModuleGetFunction(&f, module, name), CUDA_SUCCESS);
    return f;
}

static CUresult launch(CUfunction f, CUstream s, void *a, void *b, void *c) {
    void *params[3];
    params[0] = a;
    params[1] = b;
    params[2] = c;
    return cuLaunchKernel(f, 1, 1, 1, 32, 1, 1, 0, s, params, NULL);
}

/* Two streams, memory, a pinned buffer and a word: what these tests play with. */
typedef struct field {
    CUstream a, b;
    CUdeviceptr at;
    uint8_t *pinned;
    uint32_t *word;
    CUfunction spin, gather;
    uint32_t long_us;
} field;

static field new_field(void) {
    field f;
    begin();
    f.a = new_stream();
    f.b = new_stream();
    f.at = new_memory(SIZE);
    f.pinned = new_host(SIZE);
    f.word = new_word();
    f.spin = standin_is_real() ? NULL : kernel_named("standin_spin");
    f.gather = standin_is_real() ? NULL : kernel_named("tprpc_gather");
    f.long_us = 60000000;           /* until the process is ended */
    return f;
}
static void spin(field *f, CUstream s) { OK(launch(f->spin, s, &f->long_us, NULL, NULL)); }

static void two_writers(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuMemsetD8Async(f.at + SIZE - 1, 2, 1, f.b));
}
static void reads_what_is_written(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
}
static void an_event_too_early(void *arg) {
    field f = new_field();
    CUevent e = new_event();
    (void)arg;
    OK(cuEventRecord(e, f.a));
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuStreamWaitEvent(f.b, e, 0));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
}
static void a_word_too_early(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuStreamWaitValue32_v2(f.b, device_of(f.word), 1, CU_STREAM_WAIT_VALUE_GEQ));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
    OK(cuStreamWriteValue32_v2(f.a, device_of(f.word), 1, 0));
    spin(&f, f.a);
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuCtxSynchronize());
}
static void a_copy_of_the_default_stream(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuMemcpyDtoH_v2(f.pinned, f.at, SIZE));
}
static void the_host_reads_too_early(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.a));
    host_access(f.pinned + 5, 1, 0);
}
static void the_host_writes_too_early(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuMemcpyHtoDAsync_v2(f.at, f.pinned, SIZE, f.a));
    host_access(f.pinned + 5, 1, 0);                    /* both read */
    host_access(f.pinned + 5, 1, 1);
}
static void freed_in_the_order_of_another_stream(void *arg) {
    field f = new_field();
    CUdeviceptr at = 0;
    (void)arg;
    OK(cuMemAllocAsync(&at, SIZE, f.a));
    OK(cuMemsetD8Async(at, 1, SIZE, f.a));
    OK(cuStreamSynchronize(f.a));
    OK(cuMemsetD8Async(at, 1, SIZE, f.a));
    OK(cuMemFreeAsync(at, f.b));
}
static void used_before_it_is_there(void *arg) {
    field f = new_field();
    CUdeviceptr at = 0;
    (void)arg;
    OK(cuMemAllocAsync(&at, SIZE, f.a));
    OK(cuMemsetD8Async(at, 1, SIZE, f.b));
}
static void a_kernel_s_items(void *arg) {
    field f = new_field();
    uint64_t *items = new_host(64);
    CUdeviceptr items_at = device_of(items);
    uint32_t count = 2;
    (void)arg;
    items[0] = f.at; items[1] = f.at + 1000; items[2] = 100;
    items[3] = f.at + 2000; items[4] = device_of(f.pinned); items[5] = 100;
    OK(launch(f.gather, f.a, &items_at, &count, NULL));
    OK(cuMemsetD8Async(f.at + 1099, 0, 100, f.b));
    OK(cuCtxSynchronize());
}
/* It ended, but nobody has seen that. */
static void only_luck(void *arg) {
    field f = new_field();
    (void)arg;
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    while (count_of("operations")) test_sleep_us(1000);
    OK(cuMemsetD8Async(f.at, 2, SIZE, f.b));
}

TEST(unordered_accesses_are_found) {
    static const struct { void (*run)(void *arg); const char *says; } cases[] = {
        {two_writers, "a memset writes bytes 65535 to 65536 of device memory, which a memset on another stream writes"},
        {reads_what_is_written, "cuMemcpyDtoHAsync reads bytes 0 to 65536 of device memory, which a memset on another"},
        {an_event_too_early, "cuMemcpyDtoHAsync reads"},
        {a_word_too_early, "unordered access"},
        {a_copy_of_the_default_stream, "cuMemcpyDtoH reads"},
        {the_host_reads_too_early, "the host reads"},
        {the_host_writes_too_early, "the host writes"},
        {freed_in_the_order_of_another_stream, "a free in stream order writes"},
        {used_before_it_is_there, "which an allocation in stream order on another stream writes"},
        {a_kernel_s_items, "tprpc_gather"},
        {only_luck, "a memset writes"},
    };
    of_the_standin_alone();
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) ends_by(cases[i].run, NULL, SIGABRT, cases[i].says);
}

static void say_so(void *word) { __atomic_store_n((uint32_t *)word, 1u, __ATOMIC_RELEASE); }

TEST(ordered_accesses_are_not) {
    field f = new_field();
    CUevent e = new_event();
    CUstream blocking = NULL;
    CUdeviceptr word;
    OK(cuStreamCreate(&blocking, CU_STREAM_DEFAULT));
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuMemsetD8Async(f.at, 2, SIZE, f.a));
    OK(cuEventRecord(e, f.a));
    OK(cuStreamWaitEvent(f.b, e, 0));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
    OK(cuMemsetD8Async(f.at, 3, SIZE, f.b));
    OK(cuStreamSynchronize(f.b));                       /* and so of all before it */
    if (host_access) host_access(f.pinned, SIZE, 1);
    CHECK_EQ_INT(f.pinned[0], 2);
    OK(cuMemsetD8Async(f.at, 4, SIZE, f.a));
    OK(cuLaunchHostFunc(f.a, say_so, f.word));
    while (!__atomic_load_n(f.word, __ATOMIC_ACQUIRE)) test_sleep_us(100);
    OK(cuMemsetD8Async(f.at, 5, SIZE, f.b));
    OK(cuEventRecord(e, f.b));
    while (cuEventQuery(e) == CUDA_ERROR_NOT_READY) test_sleep_us(100);
    OK(cuMemsetD8Async(f.at, 6, SIZE, f.a));
    while (cuStreamQuery(f.a) == CUDA_ERROR_NOT_READY) test_sleep_us(100);
    OK(cuMemsetD8Async(f.at, 7, SIZE, blocking));
    OK(cuMemsetD8Async(f.at, 8, SIZE, NULL));
    OK(cuMemsetD8Async(f.at, 9, SIZE, blocking));
    OK(cuMemcpyDtoH_v2(f.pinned, f.at, SIZE));
    CHECK_EQ_INT(f.pinned[0], 9);
    /* The one that waits is told of first. */
    OK(cuStreamWaitValue32_v2(f.b, device_of(f.word), 2, CU_STREAM_WAIT_VALUE_GEQ));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
    OK(cuMemsetD8Async(f.at, 10, SIZE, f.a));
    OK(cuStreamWriteValue32_v2(f.a, device_of(f.word), 2, 0));
    OK(cuStreamWaitValue32_v2(f.a, device_of(f.word + 1), 1, CU_STREAM_WAIT_VALUE_GEQ));
    OK(cuMemsetD8Async(f.at, 11, SIZE, f.a));
    OK(cuStreamWriteValue32_v2(f.b, device_of(f.word + 1), 1, 0));
    OK(cuCtxSynchronize());
    CHECK_EQ_INT(f.pinned[0], 10);
    CHECK_EQ_INT(f.pinned[SIZE - 1], 10);
    /* A word need not be written as one. */
    word = new_memory(4);
    OK(cuMemsetD32Async(word, 0, 1, f.a));
    OK(cuStreamSynchronize(f.a));
    OK(cuMemsetD8Async(f.at, 12, SIZE, f.a));
    OK(cuMemsetD32Async(word, 1, 1, f.a));
    OK(cuStreamWaitValue32_v2(f.b, word, 1, CU_STREAM_WAIT_VALUE_EQ));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
    OK(cuCtxSynchronize());
    CHECK_EQ_INT(f.pinned[0], 12);
}

static uint32_t *shown, *taken;
static void shows_and_waits(void *arg) {
    (void)arg;
    set_word(shown, 1);
    while (!__atomic_load_n(taken, __ATOMIC_ACQUIRE)) test_sleep_us(100);
}

/* The host goes on while the function that told it so has not returned. */
TEST(a_host_function_tells_of_what_was_before_it) {
    field f = new_field();
    shown = new_word();
    taken = shown + 1;
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    OK(cuLaunchHostFunc(f.a, shows_and_waits, NULL));
    while (!__atomic_load_n(shown, __ATOMIC_ACQUIRE)) test_sleep_us(100);
    OK(cuMemcpyDtoHAsync_v2(f.pinned, f.at, SIZE, f.b));
    OK(cuStreamSynchronize(f.b));
    CHECK_EQ_INT(f.pinned[0], 1);
    set_word(taken, 1);
    OK(cuStreamSynchronize(f.a));
}

/* Programs made up at random, on streams of two devices, whose every access is ordered somehow: none may be found fault
   with, and each buffer ends as the order says. */
enum { BUFFERS = 3, CHAINS = 6 };
typedef struct program {
    CUcontext contexts[2];
    CUstream streams[CHAINS];
    CUevent events[CHAINS];
    CUdeviceptr at[BUFFERS];
    uint32_t *words[BUFFERS], values[BUFFERS];
    int last[BUFFERS], filled[BUFFERS];      /* the stream that touched it last, and what it wrote */
} program;

static program new_program(void) {
    program p;
    memset(&p, 0, sizeof p);
    p.contexts[0] = begin();
    OK(cuDevicePrimaryCtxRetain(&p.contexts[1], 1));
    for (int i = 0; i < BUFFERS; i++) {
        p.at[i] = new_memory(SIZE);
        p.words[i] = new_host(64);
    }
    for (int i = 0; i < CHAINS; i++) {
        OK(cuCtxSetCurrent(p.contexts[i % 2]));
        OK(cuStreamCreate(&p.streams[i], i < 4 ? CU_STREAM_NON_BLOCKING : CU_STREAM_DEFAULT));
        p.events[i] = new_event();
    }
    return p;
}

/* What stream `to` is given next comes after all that touched the buffer. */
static void put_in_order(program *p, int buffer, int to, unsigned how) {
    int from = p->last[buffer];
    CUdeviceptr word = device_of(p->words[buffer]);
    CUresult result;
    switch (how) {
    case 0:
        OK(cuEventRecord(p->events[from], p->streams[from]));
        OK(cuStreamWaitEvent(p->streams[to], p->events[from], 0));
        break;
    case 1:                                             /* the wait first, as between processes */
        p->values[buffer]++;
        if (to != from) OK(cuStreamWaitValue32_v2(p->streams[to], word, p->values[buffer], CU_STREAM_WAIT_VALUE_GEQ));
        OK(cuStreamWriteValue32_v2(p->streams[from], word, p->values[buffer], 0));
        break;
    case 2:
        p->values[buffer]++;
        OK(cuStreamWriteValue32_v2(p->streams[from], word, p->values[buffer], 0));
        OK(cuStreamWaitValue32_v2(p->streams[to], word, p->values[buffer], CU_STREAM_WAIT_VALUE_GEQ));
        break;
    case 3:
        OK(cuLaunchHostFunc(p->streams[from], say_so, p->words[buffer] + 8));
        while (!__atomic_exchange_n(p->words[buffer] + 8, 0u, __ATOMIC_ACQ_REL)) test_sleep_us(10);
        break;
    case 4:
        OK(cuEventRecord(p->events[from], p->streams[from]));
        OK(cuEventSynchronize(p->events[from]));
        break;
    case 5:
        OK(cuCtxSetCurrent(p->contexts[from % 2]));
        OK(cuCtxSynchronize());
        break;
    case 6:
        while ((result = cuStreamQuery(p->streams[from])) == CUDA_ERROR_NOT_READY) test_sleep_us(10);
        OK(result);
        break;
    default:
        OK(cuStreamSynchronize(p->streams[from]));
    }
}

TEST(no_false_alarms) {
    const char *seed = getenv("STANDIN_SEED");
    uint64_t random = seed ? strtoull(seed, NULL, 10) : 1;
    uint8_t *pinned;
    program p;
    of_the_standin_alone();
    setenv("STANDIN_LAG_US", "30", 0);
    p = new_program();
    pinned = new_host(SIZE);
    for (int i = 0; i < 300; i++) {
        uint64_t r = test_random(&random);
        int buffer = (int)(r % BUFFERS), to = (int)(r / 8 % CHAINS);
        put_in_order(&p, buffer, to, (unsigned)(r / 64 % 8));
        p.last[buffer] = to;
        if (r / 512 % 4 == 0) {
            OK(cuMemcpyDtoDAsync_v2(p.at[buffer] + SIZE / 2, p.at[buffer], SIZE / 2, p.streams[to]));
        } else {
            p.filled[buffer] = i & 255;
            OK(cuMemsetD8Async(p.at[buffer], (unsigned char)i, SIZE, p.streams[to]));
        }
    }
    for (int i = 0; i < BUFFERS; i++) {
        OK(cuMemcpyDtoHAsync_v2(pinned, p.at[i], SIZE, p.streams[p.last[i]]));
        OK(cuStreamSynchronize(p.streams[p.last[i]]));
        CHECK_EQ_INT(pinned[0], p.filled[i]);
        CHECK_EQ_INT(pinned[SIZE - 1], p.filled[i]);
    }
}

static void exporter_at_work(void *arg) {
    common *c = arg;
    field f = new_field();
    OK(cuIpcGetMemHandle(&c->memory, f.at));
    spin(&f, f.a);
    OK(cuMemsetD8Async(f.at, 1, SIZE, f.a));
    tell(c, 1);
    pause();
}
static void pulls_too_early(void *arg) {
    common *c = arg;
    field f = new_field();
    CUdeviceptr at = 0;
    OK(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY));
    OK(cuMemcpyDtoHAsync_v2(f.pinned, at + 50, 10, f.a));
    OK(cuStreamSynchronize(f.a));
}

TEST(unordered_accesses_of_two_processes_are_found) {
    common *c = new_common();
    pid_t pid;
    of_the_standin_alone();
    pid = test_fork_run(exporter_at_work, c);
    hear(c, 0);
    ends_by(pulls_too_early, c, SIGABRT, "cuMemcpyDtoHAsync reads bytes 50 to 60 of device memory, which process");
    kill(pid, SIGKILL);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 128 + SIGKILL);
}

/* Pinned memory that both have registered. A mapping's file can be opened again by root alone, and so its accesses told
   to other processes. */
static void writes_pinned_memory(void *arg) {
    common *c = arg;
    field f = new_field();
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    spin(&f, f.a);
    OK(cuMemcpyDtoHAsync_v2(c->buffer, f.at, SIZE, f.a));
    tell(c, 1);
    pause();
}
static void reads_pinned_memory(void *arg) {
    common *c = arg;
    field f = new_field();
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    OK(cuMemcpyHtoDAsync_v2(f.at, c->buffer + 50, 10, f.a));
    OK(cuStreamSynchronize(f.a));
}
static void looks_at_pinned_memory(void *arg) {
    common *c = arg;
    begin();
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    host_access(c->buffer, 1, 0);
}

TEST(unordered_accesses_to_pinned_memory_of_two_processes) {
    common *c = new_common();
    siginfo_t ended;
    pid_t pid;
    of_the_standin_alone();
    if (geteuid() != 0) SKIP("not run as root");
    pid = test_fork_run(writes_pinned_memory, c);
    hear(c, 0);
    ends_by(reads_pinned_memory, c, SIGABRT, "of pinned memory, which process");
    ends_by(looks_at_pinned_memory, c, SIGABRT, "the host reads");
    kill(pid, SIGKILL);
    CHECK_EQ_INT(waitid(P_PID, (id_t)pid, &ended, WEXITED | WNOWAIT), 0);
    CHECK_EQ_INT(test_wait_child(test_fork_run(reads_pinned_memory, c), WAIT_S), 0);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 128 + SIGKILL);
}

/* A ring of chunks, one copy down and one up, the host not in between; as two processes without peer access do it. */
enum { CHUNKS = 40, CHUNK = SIZE / 4 };
static void pulls_chunks(void *arg) {
    common *c = arg;
    uint8_t *text;
    CUdeviceptr at;
    CUstream s;
    begin();
    s = new_stream();
    at = new_memory(CHUNKS * CHUNK);
    text = new_host(CHUNKS * CHUNK);
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    for (uint32_t i = 0; i < CHUNKS; i++) {
        OK(cuStreamWaitValue32_v2(s, device_of(&c->words[0]), i + 1, CU_STREAM_WAIT_VALUE_GEQ));
        OK(cuMemcpyHtoDAsync_v2(at + i * CHUNK, c->buffer + i % 4 * CHUNK, CHUNK, s));
        OK(cuStreamWriteValue32_v2(s, device_of(&c->words[16]), i + 1, 0));
    }
    OK(cuMemcpyDtoHAsync_v2(text, at, CHUNKS * CHUNK, s));
    OK(cuStreamSynchronize(s));
    for (uint32_t i = 0; i < CHUNKS; i++) {
        CHECK_EQ_INT(text[i * CHUNK], i + 1);
        CHECK_EQ_INT(text[(i + 1) * CHUNK - 1], i + 1);
    }
}

TEST(chunks_through_pinned_memory) {
    common *c = new_common();
    pid_t pid = test_fork_run(pulls_chunks, c);
    CUdeviceptr at;
    CUstream s;
    begin();
    s = new_stream();
    at = new_memory(CHUNK);
    OK(cuMemHostRegister_v2(c, sizeof *c, 1));
    for (uint32_t i = 0; i < CHUNKS; i++) {
        OK(cuMemsetD8Async(at, (unsigned char)(i + 1), CHUNK, s));
        if (i >= 4) OK(cuStreamWaitValue32_v2(s, device_of(&c->words[16]), i - 3, CU_STREAM_WAIT_VALUE_GEQ));
        OK(cuMemcpyDtoHAsync_v2(c->buffer + i % 4 * CHUNK, at, CHUNK, s));
        OK(cuStreamWriteValue32_v2(s, device_of(&c->words[0]), i + 1, 0));
    }
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 0);
    OK(cuStreamSynchronize(s));
}

/* What a killed process was about to do is not held against the others, though its parent has not noticed yet. */
static void survivor(void *arg) {
    common *c = arg;
    field f = new_field();
    CUdeviceptr at = 0;
    OK(cuIpcOpenMemHandle_v2(&at, c->memory, LAZY));
    tell(c, 0);
    hear(c, 0);
    OK(cuMemcpyDtoHAsync_v2(f.pinned, at + 50, 10, f.a));
    OK(cuStreamSynchronize(f.a));
    OK(cuIpcCloseMemHandle(at));
}

TEST(accesses_of_the_dead_are_over) {
    common *c = new_common();
    pid_t exporting, other;
    siginfo_t ended;
    of_the_standin_alone();
    exporting = test_fork_run(exporter_at_work, c);
    hear(c, 0);
    other = test_fork_run(survivor, c);
    hear(c, 1);
    kill(exporting, SIGKILL);
    CHECK_EQ_INT(waitid(P_PID, (id_t)exporting, &ended, WEXITED | WNOWAIT), 0);
    tell(c, 1);
    CHECK_EQ_INT(test_wait_child(other, WAIT_S), 0);
    CHECK_EQ_INT(test_wait_child(exporting, WAIT_S), 128 + SIGKILL);
}

/* ---- errors ---------------------------------------------------------------------------------------------- */

static void never_called(void *arg) { *(int *)arg = 1; }

TEST(a_fault_is_sticky) {
    CUcontext first, second = NULL;
    CUfunction fault;
    CUdeviceptr at;
    CUstream s;
    int called = 0, can = 0;
    uint32_t *word;
    of_the_standin_alone();
    first = begin();
    fault = kernel_named("standin_fault");
    s = new_stream();
    word = new_word();
    at = new_memory(64);
    OK(cuDevicePrimaryCtxRetain(&second, 1));
    hold(s, word);
    OK(launch(fault, s, NULL, NULL, NULL));
    OK(cuLaunchHostFunc(s, never_called, &called));
    OK(cuStreamWriteValue32_v2(s, device_of(word + 1), 1, 0));
    set_word(word, 1);
    CHECK_EQ_INT(cuStreamSynchronize(s), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ_INT(cuMemAlloc_v2(&at, 64), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ_INT(cuMemsetD8Async(at, 1, 64, s), CUDA_ERROR_LAUNCH_FAILED);
    CHECK_EQ_INT(cuCtxSynchronize(), CUDA_ERROR_LAUNCH_FAILED);
    OK(cuDeviceCanAccessPeer(&can, 0, 1));
    CHECK_EQ_INT(called, 0);
    CHECK_EQ_INT(word[1], 0);
    OK(cuCtxSetCurrent(second));
    OK(cuMemAlloc_v2(&at, 64));
    OK(cuMemsetD8Async(at, 1, 64, NULL));
    OK(cuCtxSynchronize());
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_LAUNCH_FAILED);
    OK(cuStreamDestroy_v2(s));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CHECK_EQ_INT(cuCtxSetCurrent(first), CUDA_ERROR_CONTEXT_IS_DESTROYED);
}

TEST(kernels_reach_what_is_mapped_for_them) {
    CUcontext first, peer = NULL, stranger = NULL;
    CUdeviceptr near_by, far_off;
    uint64_t size = 64;
    uint8_t value = 3, got = 0;
    CUfunction fill;
    CUstream s;
    of_the_standin_alone();
    first = begin();
    fill = kernel_named("standin_fill");
    s = new_stream();
    OK(cuDevicePrimaryCtxRetain(&peer, 1));
    OK(cuDevicePrimaryCtxRetain(&stranger, 2));
    OK(cuCtxSetCurrent(stranger));
    far_off = new_memory(64);
    OK(cuCtxSetCurrent(peer));
    near_by = new_memory(64);
    OK(cuCtxSetCurrent(first));
    CHECK_EQ_INT(cuCtxEnablePeerAccess(stranger, 0), CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
    OK(cuCtxEnablePeerAccess(peer, 0));
    CHECK_EQ_INT(cuCtxEnablePeerAccess(peer, 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
    OK(launch(fill, s, &near_by, &size, &value));
    OK(cuStreamSynchronize(s));
    OK(cuMemcpyDtoH_v2(&got, near_by + 63, 1));
    CHECK_EQ_INT(got, 3);
    OK(launch(fill, s, &far_off, &size, &value));
    CHECK_EQ_INT(cuStreamSynchronize(s), CUDA_ERROR_ILLEGAL_ADDRESS);
}

TEST(the_gather_kernel_copies) {
    field f;
    uint64_t *items;
    CUdeviceptr items_at;
    uint32_t count = 3;
    uint8_t back[400];
    of_the_standin_alone();
    f = new_field();
    items = new_host(3 * 24);
    items_at = device_of(items);
    for (int i = 0; i < 3; i++) {
        items[3 * i] = f.at + (uint64_t)i * 1000;
        items[3 * i + 1] = f.at + 10000 + (uint64_t)i * 100;
        items[3 * i + 2] = i == 1 ? 0 : 100;
        OK(cuMemsetD8Async(f.at + (uint64_t)i * 1000, (unsigned char)(i + 1), 100, f.a));
    }
    OK(cuMemsetD8Async(f.at + 10000, 9, 400, f.a));
    OK(launch(f.gather, f.a, &items_at, &count, NULL));
    OK(cuMemcpyDtoHAsync_v2(back, f.at + 10000, 400, f.a));
    CHECK_EQ_INT(back[99], 1);
    CHECK_EQ_INT(back[100], 9);
    CHECK_EQ_INT(back[200], 3);
    CHECK_EQ_INT(back[300], 9);
}

TEST(modules_and_functions) {
    CUmodule module = NULL;
    CUfunction f = NULL;
    of_the_standin_alone();
    begin();
    CHECK_EQ_INT(cuModuleLoadData(&module, "nonsense"), CUDA_ERROR_INVALID_IMAGE);
    OK(cuModuleLoadData(&module, ".version 7.0\n.target sm_50\n.visible .entry tprpc_gather(\n)"));
    OK(cuModuleGetFunction(&f, module, "tprpc_gather"));
    CHECK_EQ_INT(cuModuleGetFunction(&f, module, "standin_spin"), CUDA_ERROR_NOT_FOUND);
    CHECK_EQ_INT(cuLaunchKernel(f, 1, 1, 1, 2000, 1, 1, 0, NULL, NULL, NULL), CUDA_ERROR_INVALID_VALUE);
    OK(cuModuleUnload(module));
    CHECK_EQ_INT(count_of("modules"), 0);
}

TEST(errors_are_injected) {
    CUdeviceptr at;
    CUevent e = NULL;
    const char *name = NULL;
    of_the_standin_alone();
    setenv("STANDIN_FAIL", "cuMemAlloc:2:2,cuEventCreate:1+:304,cuStreamQuery_v2:1:1", 1);
    begin();
    OK(cuMemAlloc_v2(&at, 64));
    CHECK_EQ_INT(cuMemAlloc_v2(&at, 64), CUDA_ERROR_OUT_OF_MEMORY);
    OK(cuMemAlloc_v2(&at, 64));
    for (int i = 0; i < 3; i++) CHECK_EQ_INT(cuEventCreate(&e, 0), CUDA_ERROR_OPERATING_SYSTEM);
    OK(cuStreamQuery(NULL));
    CHECK_EQ_INT(calls_of("cuMemAlloc_v2"), 3);
    CHECK_EQ_INT(calls_of("cuMemFree_v2"), 0);
    OK(cuGetErrorName(CUDA_ERROR_OUT_OF_MEMORY, &name));
    CHECK_STR(name, "CUDA_ERROR_OUT_OF_MEMORY");
    CHECK_EQ_INT(cuGetErrorName((CUresult)12345, &name), CUDA_ERROR_INVALID_VALUE);
}

static void leaves_things(void *arg) {
    (void)arg;
    setenv("STANDIN_LEAKS", "1", 1);
    begin();
    new_memory(64);
    new_stream();
    new_stream();
    exit(0);
}

TEST(what_is_left_is_counted) {
    CUdeviceptr at;
    CUstream s;
    CUevent e;
    void *host;
    of_the_standin_alone();
    ends_by(leaves_things, NULL, 0,
            "1 contexts left\nstand-in driver: 2 streams left\nstand-in driver: 1 allocations left");
    begin();
    CHECK_EQ_INT(count_of("contexts"), 1);
    s = new_stream();
    e = new_event();
    at = new_memory(64);
    host = new_host(64);
    CHECK(count_of("streams") == 1 && count_of("events") == 1 && count_of("allocations") == 1 && count_of("host") == 1);
    CHECK_EQ_INT(count_of("nonsense"), -1);
    OK(cuStreamDestroy_v2(s));
    CHECK_EQ_INT(cuStreamQuery(s), CUDA_ERROR_INVALID_HANDLE);
    OK(cuEventDestroy_v2(e));
    OK(cuMemFree_v2(at));
    OK(cuMemFreeHost(host));
    CHECK(!count_of("streams") && !count_of("events") && !count_of("allocations") && !count_of("host"));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    CHECK_EQ_INT(count_of("contexts"), 0);
}

static void after_a_fork(void *arg) {
    int count;
    (void)arg;
    CHECK_EQ_INT(cuDeviceGetCount(&count), CUDA_ERROR_NOT_INITIALIZED);
    CHECK_EQ_INT(cuInit(0), CUDA_ERROR_NOT_INITIALIZED);
}

TEST(does_not_survive_a_fork) {
    begin();
    CHECK_EQ_INT(test_wait_child(test_fork_run(after_a_fork, NULL), WAIT_S), 0);
}

TEST(contexts_are_stacked) {
    CUcontext primary, own = NULL, got = NULL;
    CUdevice device = -1;
    int active = -1;
    primary = begin();
    OK(cuCtxCreate_v2(&own, 0, 0));
    OK(cuCtxGetCurrent(&got));
    CHECK(got == own);
    OK(cuCtxPopCurrent_v2(&got));
    CHECK(got == own);
    OK(cuCtxGetCurrent(&got));
    CHECK(got == primary);
    OK(cuCtxPushCurrent_v2(own));
    OK(cuCtxGetDevice(&device));
    CHECK_EQ_INT(device, 0);
    OK(cuCtxDestroy_v2(own));
    OK(cuCtxGetCurrent(&got));
    CHECK(got == primary);
    OK(cuDevicePrimaryCtxGetState(0, NULL, &active));
    CHECK_EQ_INT(active, 1);
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(cuDevicePrimaryCtxGetState(0, NULL, &active));
    CHECK_EQ_INT(active, 0);
    OK(cuCtxSetCurrent(NULL));
    CHECK_EQ_INT(cuCtxSynchronize(), CUDA_ERROR_INVALID_CONTEXT);
    CHECK_EQ_INT(cuCtxPopCurrent_v2(&got), CUDA_ERROR_INVALID_CONTEXT);
}

/* ---- capture --------------------------------------------------------------------------------------------- */

static int capture_state(CUstream s) {
    CUstreamCaptureStatus state = -1;
    OK(cuStreamIsCapturing(s, &state));
    return (int)state;
}

static void begin_capture(CUstream s, CUstreamCaptureMode mode) { OK(cuStreamBeginCapture_v2(s, mode)); }

static void end_capture(CUstream s, CUresult expected) {
    CUgraph graph = NULL;
    CHECK_EQ_INT(cuStreamEndCapture(s, &graph), expected);
    CHECK((graph != NULL) == (expected == CUDA_SUCCESS));
    if (graph) OK(cuGraphDestroy(graph));
    CHECK_EQ_INT(capture_state(s), CU_STREAM_CAPTURE_STATUS_NONE);
}

TEST(captured_work_does_not_run) {
    CUstream a, b;
    CUevent fork_event, join_event;
    CUdeviceptr at;
    uint8_t *pinned;
    begin();
    a = new_stream();
    b = new_stream();
    fork_event = new_event();
    join_event = new_event();
    at = new_memory(64);
    pinned = new_host(64);
    OK(cuMemsetD8Async(at, 5, 64, a));
    OK(cuStreamSynchronize(a));
    CHECK_EQ_INT(capture_state(a), CU_STREAM_CAPTURE_STATUS_NONE);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CHECK_EQ_INT(capture_state(a), CU_STREAM_CAPTURE_STATUS_ACTIVE);
    OK(cuMemsetD8Async(at, 7, 64, a));
    OK(cuEventRecord(fork_event, a));
    OK(cuStreamWaitEvent(b, fork_event, 0));
    CHECK_EQ_INT(capture_state(b), CU_STREAM_CAPTURE_STATUS_ACTIVE);
    OK(cuMemsetD8Async(at, 8, 64, b));
    OK(cuEventRecord(join_event, b));
    OK(cuStreamWaitEvent(a, join_event, 0));
    end_capture(a, CUDA_SUCCESS);
    CHECK_EQ_INT(capture_state(b), CU_STREAM_CAPTURE_STATUS_NONE);
    OK(cuMemcpyDtoHAsync_v2(pinned, at, 64, a));
    OK(cuStreamSynchronize(a));
    CHECK_EQ_INT(pinned[0], 5);
}

TEST(what_a_capture_forbids) {
    CUstream a, b, blocking = NULL;
    CUevent e, outside;
    CUdeviceptr at;
    CUstreamCaptureMode relaxed = CU_STREAM_CAPTURE_MODE_RELAXED;
    begin();
    a = new_stream();
    b = new_stream();
    OK(cuStreamCreate(&blocking, CU_STREAM_DEFAULT));
    e = new_event();
    outside = new_event();
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CHECK_EQ_INT(cuStreamSynchronize(a), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    CHECK_EQ_INT(capture_state(a), CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CHECK_EQ_INT(cuStreamQuery(a), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
    CHECK_EQ_INT(cuMemAlloc_v2(&at, 64), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_RELAXED);
    OK(cuMemAlloc_v2(&at, 64));
    end_capture(a, CUDA_SUCCESS);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuThreadExchangeStreamCaptureMode(&relaxed));
    CHECK_EQ_INT(relaxed, CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuMemAlloc_v2(&at, 64));
    OK(cuThreadExchangeStreamCaptureMode(&relaxed));
    OK(cuEventRecord(e, a));
    CHECK_EQ_INT(cuEventQuery(e), CUDA_ERROR_CAPTURED_EVENT);
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    OK(cuEventRecord(outside, b));
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CHECK_EQ_INT(cuStreamWaitEvent(a, outside, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    OK(cuEventRecord(e, a));
    OK(cuStreamWaitEvent(b, e, 0));
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
    begin_capture(blocking, CU_STREAM_CAPTURE_MODE_RELAXED);
    CHECK_EQ_INT(cuMemsetD8Async(at, 1, 64, NULL), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    end_capture(blocking, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    CHECK_EQ_INT(cuStreamBeginCapture_v2(NULL, CU_STREAM_CAPTURE_MODE_GLOBAL), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    begin_capture(a, CU_STREAM_CAPTURE_MODE_GLOBAL);
    CHECK_EQ_INT(cuCtxSynchronize(), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    end_capture(a, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    OK(cuCtxSynchronize());
}

/* ---- virtual memory -------------------------------------------------------------------------------------- */

static void send_fd(int to, int fd) {
    char byte = 0, control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message;
    memset(control, 0, sizeof control);
    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    CMSG_FIRSTHDR(&message)->cmsg_level = SOL_SOCKET;
    CMSG_FIRSTHDR(&message)->cmsg_type = SCM_RIGHTS;
    CMSG_FIRSTHDR(&message)->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &fd, sizeof fd);
    CHECK_EQ_INT(sendmsg(to, &message, 0), 1);
}
static int receive_fd(int from) {
    char byte = 0, control[CMSG_SPACE(sizeof(int))];
    struct iovec part = {&byte, 1};
    struct msghdr message;
    int fd;
    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    REQUIRE_EQ_INT(recvmsg(from, &message, 0), 1);
    memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof fd);
    return fd;
}

enum { BLOCK = 2 << 20 };

static CUmemAllocationProp on_device_0(void) {
    CUmemAllocationProp prop;
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    return prop;
}

static CUdeviceptr map_block(CUmemGenericAllocationHandle handle) {
    CUmemAccessDesc access = {{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    CUdeviceptr at = 0;
    REQUIRE_EQ_INT(cuMemAddressReserve(&at, BLOCK, 0, 0, 0), CUDA_SUCCESS);
    OK(cuMemMap(at, BLOCK, 0, handle, 0));
    OK(cuMemSetAccess(at, BLOCK, &access, 1));
    return at;
}

static void unmap_block(CUdeviceptr at, CUmemGenericAllocationHandle handle) {
    OK(cuCtxSynchronize());
    OK(cuMemUnmap(at, BLOCK));
    OK(cuMemRelease(handle));
    OK(cuMemAddressFree(at, BLOCK));
}

static void importer_of_a_handle(void *arg) {
    common *c = arg;
    CUmemGenericAllocationHandle handle = 0;
    CUdeviceptr at;
    uint8_t got = 0;
    int fd;
    begin();
    fd = receive_fd(c->ends[1]);
    OK(cuMemImportFromShareableHandle(&handle, (void *)(intptr_t)fd, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    close(fd);
    at = map_block(handle);
    OK(cuMemcpyDtoH_v2(&got, at + BLOCK - 1, 1));
    CHECK_EQ_INT(got, 77);
    unmap_block(at, handle);
}

TEST(virtual_memory) {
    common *c = new_common();
    pid_t pid = test_fork_run(importer_of_a_handle, c);
    CUmemAllocationProp prop = on_device_0();
    CUmemGenericAllocationHandle handle = 0;
    CUdeviceptr at = 0;
    unsigned int legacy = 7;
    uint64_t types = 0;
    int fd = -1;
    begin();
    CHECK_EQ_INT(cuMemCreate(&handle, 1000, &prop, 0), CUDA_ERROR_INVALID_VALUE);
    REQUIRE_EQ_INT(cuMemCreate(&handle, BLOCK, &prop, 0), CUDA_SUCCESS);
    OK(cuMemAddressReserve(&at, BLOCK, 0, 0, 0));
    OK(cuMemMap(at, BLOCK, 0, handle, 0));
    CHECK(cuMemsetD8Async(at, 77, BLOCK, NULL) != CUDA_SUCCESS);        /* no access yet */
    CHECK(cuMemAddressFree(at, BLOCK) != CUDA_SUCCESS);
    OK(cuMemUnmap(at, BLOCK));
    OK(cuMemAddressFree(at, BLOCK));
    at = map_block(handle);
    OK(cuMemsetD8Async(at, 77, BLOCK, NULL));
    OK(cuStreamSynchronize(NULL));
    OK(cuPointerGetAttribute(&legacy, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, at));
    CHECK_EQ_INT(legacy & 0xff, 0);
    OK(cuPointerGetAttribute(&types, CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, at));
    CHECK_EQ_INT(types, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    CHECK(cuIpcGetMemHandle(&c->memory, at) != CUDA_SUCCESS);
    OK(cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0));
    send_fd(c->ends[0], fd);
    close(fd);
    CHECK_EQ_INT(test_wait_child(pid, WAIT_S), 0);
    unmap_block(at, handle);
    if (!standin_is_real()) CHECK(!count_of("mappings") && !count_of("handles") && !count_of("reservations"));
}

/* Two addresses of the same memory are the same memory. */
static void through_two_mappings(void *arg) {
    CUmemAllocationProp prop = on_device_0();
    CUmemGenericAllocationHandle handle = 0;
    field f = new_field();
    (void)arg;
    OK(cuMemCreate(&handle, BLOCK, &prop, 0));
    OK(cuMemsetD8Async(map_block(handle), 1, 64, f.a));
    OK(cuMemsetD8Async(map_block(handle), 1, 64, f.b));
}

static void through_two_registrations(void *arg) {
    int fd = memfd_create("ring", MFD_CLOEXEC);
    uint8_t *a, *b;
    field f = new_field();
    (void)arg;
    REQUIRE(ftruncate(fd, SIZE) == 0);
    a = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    b = mmap(NULL, SIZE / 2, PROT_READ | PROT_WRITE, MAP_SHARED, fd, SIZE / 2);
    OK(cuMemHostRegister_v2(a, SIZE, 1));
    OK(cuMemHostRegister_v2(b, SIZE / 2, 1));
    OK(cuMemcpyDtoHAsync_v2(a + SIZE / 2, f.at, 64, f.a));
    OK(cuMemcpyDtoHAsync_v2(b + 63, f.at, 64, f.b));
}

TEST(two_mappings_of_the_same_memory) {
    of_the_standin_alone();
    if (geteuid() == 0)
        ends_by(through_two_registrations, NULL, SIGABRT, "writes bytes 32831 to 32895 of pinned memory");
    ends_by(through_two_mappings, NULL, SIGABRT, "a memset writes bytes 0 to 64 of device memory");
}
