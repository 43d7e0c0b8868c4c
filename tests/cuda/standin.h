/* The driver API as far as the stand-in driver (standin.c) has it: types and constants under their own names, so that
   neither the stand-in nor a test needs a cuda.h, and what a test may ask the stand-in. Where STANDIN_WITH_CUDA_H is
   defined, this takes the real cuda.h instead, and the compiler compares all of it: values and sizes below, and each
   entry point where standin.c defines it.

   A program of tests/ loads the stand-in by standin_load(), before anybody asks for "libcuda.so.1": then dlopen of that
   name finds the one that is loaded. Its settings are read from the environment at the first call:

       STANDIN_DEVICES    how many devices the machine has (4)
       STANDIN_PEERS      which reach each other: "0-1,2-3" (that is the default), "all" or "none"
       STANDIN_MEMORY_MB  of each device (64)
       STANDIN_EXCLUSIVE  devices that another process holds for itself: "1,3"
       STANDIN_VERSION    of the driver (13000)
       STANDIN_LAG_US     by how much an operation is late at most (200); 0: not at all
       STANDIN_SEED       of that
       STANDIN_FAIL       "cuMemAlloc_v2:3:2,cuEventRecord:1+:400": the third call of the first gives error 2, and from
                          the first on each of the second gives 400; without its _v2 a name means every version
       STANDIN_LEAKS      1: what is left at exit is listed
       CUDA_VISIBLE_DEVICES, by index

   Devices in STANDIN_ settings are the machine's, not those that CUDA_VISIBLE_DEVICES leaves. */
#ifndef TPRPC_TESTS_STANDIN_H
#define TPRPC_TESTS_STANDIN_H

#include <stddef.h>
#include <stdint.h>

/* ---- the stand-in's own ---------------------------------------------------------------------------------- */

/* How many there are: "contexts", "streams", "events", "allocations" (device memory, of pools too), "host" (pinned),
   "registered", "mappings" (of others' memory and of handles), "handles", "reservations", "pools", "modules", "graphs",
   "operations" (in flight). -1: no such thing. */
typedef long standin_count_fn(const char *what);

/* How often an entry point was called, by its versioned name: that the host never waits, or that nothing is mapped
   twice. */
typedef long standin_calls_fn(const char *name);

/* Says that the host reads or writes pinned or device memory now; aborts where that is not ordered after operations. */
typedef void standin_host_access_fn(const void *ptr, size_t size, int write);

/* ---- constants ------------------------------------------------------------------------------------------- */

#define STANDIN_ERRORS(X)                                                                                     \
    X(CUDA_SUCCESS, 0, "no error")                                                                            \
    X(CUDA_ERROR_INVALID_VALUE, 1, "invalid argument")                                                        \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, "out of memory")                                                           \
    X(CUDA_ERROR_NOT_INITIALIZED, 3, "initialization error")                                                  \
    X(CUDA_ERROR_DEINITIALIZED, 4, "driver shutting down")                                                    \
    X(CUDA_ERROR_STUB_LIBRARY, 34, "CUDA driver is a stub library")                                           \
    X(CUDA_ERROR_DEVICE_UNAVAILABLE, 46, "CUDA-capable device(s) is/are busy or unavailable")                 \
    X(CUDA_ERROR_NO_DEVICE, 100, "no CUDA-capable device is detected")                                        \
    X(CUDA_ERROR_INVALID_DEVICE, 101, "invalid device ordinal")                                               \
    X(CUDA_ERROR_INVALID_IMAGE, 200, "device kernel image is invalid")                                        \
    X(CUDA_ERROR_INVALID_CONTEXT, 201, "invalid device context")                                              \
    X(CUDA_ERROR_MAP_FAILED, 205, "mapping of buffer object failed")                                          \
    X(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED, 217, "peer access is not supported between these two devices")      \
    X(CUDA_ERROR_INVALID_PTX, 218, "a PTX JIT compilation failed")                                            \
    X(CUDA_ERROR_OPERATING_SYSTEM, 304, "OS call failed or operation not supported on this OS")               \
    X(CUDA_ERROR_INVALID_HANDLE, 400, "invalid resource handle")                                              \
    X(CUDA_ERROR_ILLEGAL_STATE, 401, "the operation cannot be performed in the present state")                \
    X(CUDA_ERROR_NOT_FOUND, 500, "named symbol not found")                                                    \
    X(CUDA_ERROR_NOT_READY, 600, "device not ready")                                                          \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, "an illegal memory access was encountered")                            \
    X(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED, 704, "peer access is already enabled")                          \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709, "context is destroyed")                                           \
    X(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, 712, "part or all of the requested memory range is already mapped") \
    X(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, 713, "pointer does not correspond to a registered memory region") \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, "unspecified launch failure")                                            \
    X(CUDA_ERROR_NOT_PERMITTED, 800, "operation not permitted")                                               \
    X(CUDA_ERROR_NOT_SUPPORTED, 801, "operation not supported")                                               \
    X(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, 900, "operation not permitted when stream is capturing")         \
    X(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, 901, "operation failed due to a previous error during capture")  \
    X(CUDA_ERROR_STREAM_CAPTURE_MERGE, 902, "operation would result in a merge of separate capture sequences") \
    X(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, 903, "capture was not ended in the same stream as it began")       \
    X(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, 904, "capturing stream has unjoined work")                          \
    X(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, 905, "dependency created on uncaptured work in another stream")    \
    X(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 906, "the legacy stream would depend on a capturing blocking stream") \
    X(CUDA_ERROR_CAPTURED_EVENT, 907, "operation not permitted on an event last recorded in a capturing stream") \
    X(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, 908, "a thread-local capture ended by another thread") \
    X(CUDA_ERROR_UNKNOWN, 999, "unknown error")

#define STANDIN_CONSTANTS(X)                                                                                  \
    X(CU_MEMORYTYPE_HOST, 1) X(CU_MEMORYTYPE_DEVICE, 2)                                                       \
    X(CU_POINTER_ATTRIBUTE_CONTEXT, 1) X(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, 2)                                 \
    X(CU_POINTER_ATTRIBUTE_DEVICE_POINTER, 3) X(CU_POINTER_ATTRIBUTE_HOST_POINTER, 4)                         \
    X(CU_POINTER_ATTRIBUTE_SYNC_MEMOPS, 6) X(CU_POINTER_ATTRIBUTE_BUFFER_ID, 7)                               \
    X(CU_POINTER_ATTRIBUTE_IS_MANAGED, 8) X(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, 9)                           \
    X(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, 10) X(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, 11)       \
    X(CU_POINTER_ATTRIBUTE_RANGE_SIZE, 12) X(CU_POINTER_ATTRIBUTE_MAPPED, 13)                                 \
    X(CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, 14) X(CU_POINTER_ATTRIBUTE_IS_GPU_DIRECT_RDMA_CAPABLE, 15)   \
    X(CU_POINTER_ATTRIBUTE_ACCESS_FLAGS, 16) X(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, 17)                       \
    X(CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK, 1) X(CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED, 2)             \
    X(CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED, 3) X(CU_DEVICE_P2P_ATTRIBUTE_CUDA_ARRAY_ACCESS_SUPPORTED, 4) \
    X(CU_STREAM_WAIT_VALUE_GEQ, 0) X(CU_STREAM_WAIT_VALUE_EQ, 1) X(CU_STREAM_WAIT_VALUE_AND, 2)               \
    X(CU_STREAM_WAIT_VALUE_NOR, 3) X(CU_STREAM_WAIT_VALUE_FLUSH, 1 << 30)                                     \
    X(CU_STREAM_WRITE_VALUE_DEFAULT, 0) X(CU_STREAM_WRITE_VALUE_NO_MEMORY_BARRIER, 1)                         \
    X(CU_STREAM_MEM_OP_WAIT_VALUE_32, 1) X(CU_STREAM_MEM_OP_WRITE_VALUE_32, 2)                                \
    X(CU_STREAM_MEM_OP_FLUSH_REMOTE_WRITES, 3) X(CU_STREAM_MEM_OP_WAIT_VALUE_64, 4)                           \
    X(CU_STREAM_MEM_OP_WRITE_VALUE_64, 5) X(CU_STREAM_MEM_OP_BARRIER, 6)                                      \
    X(CU_STREAM_DEFAULT, 0) X(CU_STREAM_NON_BLOCKING, 1)                                                      \
    X(CU_EVENT_DEFAULT, 0) X(CU_EVENT_BLOCKING_SYNC, 1) X(CU_EVENT_DISABLE_TIMING, 2) X(CU_EVENT_INTERPROCESS, 4) \
    X(CU_STREAM_CAPTURE_MODE_GLOBAL, 0) X(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, 1)                             \
    X(CU_STREAM_CAPTURE_MODE_RELAXED, 2) X(CU_STREAM_CAPTURE_STATUS_NONE, 0)                                  \
    X(CU_STREAM_CAPTURE_STATUS_ACTIVE, 1) X(CU_STREAM_CAPTURE_STATUS_INVALIDATED, 2)                          \
    X(CU_GET_PROC_ADDRESS_SUCCESS, 0) X(CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND, 1)                              \
    X(CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT, 2)                                                          \
    X(CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS, 1) X(CU_MEM_LOCATION_TYPE_DEVICE, 1)                                \
    X(CU_MEM_ALLOCATION_TYPE_PINNED, 1) X(CU_MEM_HANDLE_TYPE_NONE, 0)                                         \
    X(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 1)                                                            \
    X(CU_MEM_ACCESS_FLAGS_PROT_NONE, 0) X(CU_MEM_ACCESS_FLAGS_PROT_READ, 1) X(CU_MEM_ACCESS_FLAGS_PROT_READWRITE, 3) \
    X(CU_MEM_ALLOC_GRANULARITY_MINIMUM, 0) X(CU_MEM_ALLOC_GRANULARITY_RECOMMENDED, 1)                         \
    X(CU_COMPUTEMODE_DEFAULT, 0) X(CU_COMPUTEMODE_EXCLUSIVE_PROCESS, 3)                                       \
    X(CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1) X(CU_DEVICE_ATTRIBUTE_WARP_SIZE, 10)                      \
    X(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, 16) X(CU_DEVICE_ATTRIBUTE_INTEGRATED, 18)                     \
    X(CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 19) X(CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, 20)                    \
    X(CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 31) X(CU_DEVICE_ATTRIBUTE_PCI_BUS_ID, 33)                       \
    X(CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID, 34) X(CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 40)                    \
    X(CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 41) X(CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID, 50)                    \
    X(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, 75) X(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, 76)   \
    X(CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM, 91)                                        \
    X(CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED, 99)                                                        \
    X(CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, 102)                                           \
    X(CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED, 103)                                   \
    X(CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED, 115)                                                        \
    X(CU_DEVICE_ATTRIBUTE_MEMPOOL_SUPPORTED_HANDLE_TYPES, 119)                                                \
    X(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS, 122)                                                 \
    X(CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR, 123) X(CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, 125)

/* ---- types ----------------------------------------------------------------------------------------------- */

#ifdef STANDIN_WITH_CUDA_H

#include <cuda.h>
#define STANDIN_SAME_ERROR(name, value, text)  typedef char standin_same_##name[(int)(name) == (value) ? 1 : -1];
#define STANDIN_SAME(name, value)              typedef char standin_same_##name[(int)(name) == (value) ? 1 : -1];
STANDIN_ERRORS(STANDIN_SAME_ERROR)
STANDIN_CONSTANTS(STANDIN_SAME)

#else

#define STANDIN_ERROR_IS(name, value, text) name = (value),
#define STANDIN_IS(name, value) name = (value),
enum { STANDIN_ERRORS(STANDIN_ERROR_IS) STANDIN_CONSTANTS(STANDIN_IS) STANDIN_LAST };

typedef int CUresult, CUdevice, CUdevice_attribute, CUdevice_P2PAttribute, CUpointer_attribute, CUmemPool_attribute;
typedef int CUmemAllocationHandleType, CUmemAllocationGranularity_flags, CUmemLocationType, CUmemAllocationType;
typedef int CUmemAccess_flags, CUstreamCaptureMode, CUstreamCaptureStatus, CUdriverProcAddressQueryResult;
typedef int CUstreamBatchMemOpType, CUjit_option;
typedef unsigned long long CUdeviceptr, CUmemGenericAllocationHandle;
typedef uint32_t cuuint32_t;
typedef uint64_t cuuint64_t;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUmemPoolHandle_st *CUmemoryPool;
typedef void (*CUhostFn)(void *user);

typedef struct CUuuid { char bytes[16]; } CUuuid;
typedef struct CUipcMemHandle { char reserved[64]; } CUipcMemHandle;
typedef struct CUipcEventHandle { char reserved[64]; } CUipcEventHandle;
typedef struct CUmemLocation { CUmemLocationType type; int id; } CUmemLocation;
typedef struct CUmemAccessDesc { CUmemLocation location; CUmemAccess_flags flags; } CUmemAccessDesc;
typedef struct CUctxCreateParams CUctxCreateParams;
typedef struct CUexecAffinityParam CUexecAffinityParam;

typedef struct CUmemAllocationProp {
    CUmemAllocationType type;
    CUmemAllocationHandleType requestedHandleTypes;
    CUmemLocation location;
    void *win32HandleMetaData;
    struct { unsigned char compressionType, gpuDirectRDMACapable, usage[2], reserved[4]; } allocFlags;
} CUmemAllocationProp;

typedef struct CUmemPoolProps {
    CUmemAllocationType allocType;
    CUmemAllocationHandleType handleTypes;
    CUmemLocation location;
    void *win32SecurityAttributes;
    size_t maxSize;
    unsigned short usage;
    unsigned char reserved[54];
} CUmemPoolProps;

/* Of a 32 bit value the low half is meant. */
typedef struct CUstreamMemOpValueParams {
    CUstreamBatchMemOpType operation;
    CUdeviceptr address;
    cuuint64_t value64;
    unsigned int flags;
    CUdeviceptr alias;
} CUstreamMemOpValueParams;
typedef union CUstreamBatchMemOpParams {
    CUstreamBatchMemOpType operation;
    CUstreamMemOpValueParams waitValue, writeValue;
    cuuint64_t pad[6];
} CUstreamBatchMemOpParams;

#define CU_STREAM_LEGACY ((CUstream)(uintptr_t)1)

#endif

#define STANDIN_SIZE(type, size) typedef char standin_size_##type[sizeof(type) == (size) ? 1 : -1];
#define STANDIN_FIELD(type, field, offset) \
    typedef char standin_field_##type##_##field[offsetof(type, field) == (offset) ? 1 : -1];
STANDIN_SIZE(CUuuid, 16)
STANDIN_SIZE(CUipcMemHandle, 64)
STANDIN_SIZE(CUipcEventHandle, 64)
STANDIN_SIZE(CUmemAccessDesc, 12)
STANDIN_SIZE(CUmemAllocationProp, 32)
STANDIN_FIELD(CUmemAllocationProp, location, 8)
STANDIN_FIELD(CUmemAllocationProp, allocFlags, 24)
STANDIN_SIZE(CUmemPoolProps, 88)
STANDIN_FIELD(CUmemPoolProps, location, 8)
STANDIN_FIELD(CUmemPoolProps, maxSize, 24)
STANDIN_SIZE(CUstreamBatchMemOpParams, 48)

#endif
