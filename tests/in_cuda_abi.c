/* The driver as tprpc_cuda.h declares it, compared with a cuda.h where there is one: every value, size and signature. The
   compiler does it. */
#include "harness.h"
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#define TPRPC_TEST_HOOKS
#include "../tprpc.h"
#include "../tprpc_cuda.h"

#if defined(__has_include)
#if __has_include(<cuda.h>)
#include <cuda.h>
#endif
#endif

#ifdef CUDA_VERSION
#define SAME_ERROR(name) (int)CUDA_##name == TPR_CUDA_DRIVER_##name
#define SAME(name) (int)CU_##name == TPR_CUDA_DRIVER_##name
#define SIZED(ours, theirs) sizeof(ours) == sizeof(theirs)
#define PLACED(ours, theirs, field) offsetof(ours, field) == offsetof(theirs, field)

#define ASSERT_AT(line, condition) typedef char in_line_##line[(condition) ? 1 : -1] TPR_UNUSED;
#define ASSERT_ON(line, condition) ASSERT_AT(line, condition)
#define ASSERT(condition) ASSERT_ON(__LINE__, condition)

ASSERT(SAME_ERROR(SUCCESS))
ASSERT(SAME_ERROR(ERROR_INVALID_VALUE))
ASSERT(SAME_ERROR(ERROR_OUT_OF_MEMORY))
ASSERT(SAME_ERROR(ERROR_NOT_INITIALIZED))
ASSERT(SAME_ERROR(ERROR_NO_DEVICE))
ASSERT(SAME_ERROR(ERROR_NOT_READY))
ASSERT(SAME_ERROR(ERROR_PEER_ACCESS_ALREADY_ENABLED))
ASSERT(SAME_ERROR(ERROR_NOT_SUPPORTED))
ASSERT(SAME_ERROR(ERROR_STREAM_CAPTURE_IMPLICIT))
ASSERT(SAME(GET_PROC_ADDRESS_LEGACY_STREAM))
ASSERT(SAME(STREAM_NON_BLOCKING))
ASSERT(SAME(EVENT_DISABLE_TIMING))
ASSERT(SAME(STREAM_CAPTURE_STATUS_NONE))
ASSERT(SAME(STREAM_CAPTURE_MODE_RELAXED))
ASSERT(SAME(STREAM_WAIT_VALUE_GEQ))
ASSERT(SAME(STREAM_WRITE_VALUE_DEFAULT))
ASSERT(SAME(IPC_MEM_LAZY_ENABLE_PEER_ACCESS))
ASSERT(SAME(MEMHOSTREGISTER_PORTABLE))
ASSERT(SAME(MEMHOSTREGISTER_DEVICEMAP))
ASSERT(SAME(MEMORYTYPE_HOST))
ASSERT(SAME(MEMORYTYPE_DEVICE))
ASSERT(SAME(POINTER_ATTRIBUTE_MEMORY_TYPE))
ASSERT(SAME(POINTER_ATTRIBUTE_DEVICE_ORDINAL))
ASSERT(SAME(POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE))
ASSERT(SAME(POINTER_ATTRIBUTE_RANGE_START_ADDR))
ASSERT(SAME(POINTER_ATTRIBUTE_RANGE_SIZE))
ASSERT(SAME(POINTER_ATTRIBUTE_ACCESS_FLAGS))
ASSERT(SAME(POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE))
ASSERT(SAME(MEMPOOL_ATTR_RELEASE_THRESHOLD))
ASSERT(SAME(MEM_ALLOCATION_TYPE_PINNED))
ASSERT(SAME(MEM_HANDLE_TYPE_NONE))
ASSERT(SAME(MEM_LOCATION_TYPE_DEVICE))
ASSERT(SAME(MEM_ACCESS_FLAGS_PROT_READWRITE))
ASSERT(SAME(DEVICE_ATTRIBUTE_PCI_BUS_ID))
ASSERT(SAME(DEVICE_ATTRIBUTE_PCI_DEVICE_ID))
ASSERT(SAME(DEVICE_ATTRIBUTE_PCI_DOMAIN_ID))
ASSERT(SAME(DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING))
ASSERT(SAME(DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR))
ASSERT(SAME(DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR))

ASSERT(SIZED(tpr_cuda_driver_result, CUresult))
ASSERT(SIZED(tpr_cuda_driver_device, CUdevice))
ASSERT(SIZED(tpr_cuda_driver_ptr, CUdeviceptr))
ASSERT(SIZED(tpr_cuda_driver_context, CUcontext))
ASSERT(SIZED(tpr_cuda_driver_stream, CUstream))
ASSERT(SIZED(tpr_cuda_driver_event, CUevent))
ASSERT(SIZED(tpr_cuda_driver_pool, CUmemoryPool))
ASSERT(SIZED(tpr_cuda_driver_device_attribute, CUdevice_attribute))
ASSERT(SIZED(tpr_cuda_driver_pointer_attribute, CUpointer_attribute))
ASSERT(SIZED(tpr_cuda_driver_pool_attribute, CUmemPool_attribute))
ASSERT(SIZED(tpr_cuda_driver_capture_status, CUstreamCaptureStatus))
ASSERT(SIZED(tpr_cuda_driver_capture_mode, CUstreamCaptureMode))
#if CUDA_VERSION >= 12000
ASSERT(SIZED(tpr_cuda_driver_proc_status, CUdriverProcAddressQueryResult))
#endif
ASSERT(SIZED(tpr_cuda_driver_uuid, CUuuid))
ASSERT(SIZED(tpr_cuda_driver_ipc, CUipcMemHandle))
ASSERT(SIZED(tpr_cuda_driver_location, CUmemLocation))
ASSERT(SIZED(tpr_cuda_driver_access, CUmemAccessDesc))
ASSERT(SIZED(tpr_cuda_driver_pool_props, CUmemPoolProps))
ASSERT(PLACED(tpr_cuda_driver_location, CUmemLocation, id))
ASSERT(PLACED(tpr_cuda_driver_access, CUmemAccessDesc, flags))
ASSERT(PLACED(tpr_cuda_driver_pool_props, CUmemPoolProps, handleTypes))
ASSERT(PLACED(tpr_cuda_driver_pool_props, CUmemPoolProps, location))
ASSERT(PLACED(tpr_cuda_driver_pool_props, CUmemPoolProps, maxSize))

/* From here on our parameters are of cuda.h's types, so that a signature is the same or is not. */
#define tpr_cuda_driver_result CUresult
#define tpr_cuda_driver_device CUdevice
#define tpr_cuda_driver_ptr CUdeviceptr
#define tpr_cuda_driver_context CUcontext
#define tpr_cuda_driver_stream CUstream
#define tpr_cuda_driver_event CUevent
#define tpr_cuda_driver_pool CUmemoryPool
#define tpr_cuda_driver_module CUmodule
#define tpr_cuda_driver_function CUfunction
#define tpr_cuda_driver_device_attribute CUdevice_attribute
#define tpr_cuda_driver_pointer_attribute CUpointer_attribute
#define tpr_cuda_driver_pool_attribute CUmemPool_attribute
#define tpr_cuda_driver_capture_status CUstreamCaptureStatus
#define tpr_cuda_driver_capture_mode CUstreamCaptureMode
#define tpr_cuda_driver_uuid CUuuid
#define tpr_cuda_driver_ipc CUipcMemHandle
#define tpr_cuda_driver_access CUmemAccessDesc
#define tpr_cuda_driver_pool_props CUmemPoolProps
#define tpr_cuda_driver_host_fn CUhostFn
#define SAME_SIGNATURE(name, version, parameters) \
    typedef char signature_of_##name[__builtin_types_compatible_p(__typeof__(&name), CUresult(*) parameters) ? 1 : -1] \
        TPR_UNUSED;
TPR_CUDA_DRIVER_ENTRIES(SAME_SIGNATURE)

TEST(the_driver_is_declared_as_in_cuda_h) { CHECK_LE_INT(11080, CUDA_VERSION); }
#else
TEST(the_driver_is_declared_as_in_cuda_h) { SKIP("no cuda.h"); }
#endif

/* A program may use both headers in one file. */
TEST(both_in_one_file) {
    size_t count = 0;
    CHECK(tprpc_cuda_backends(&count) != NULL);
    CHECK_EQ_INT(count, 4);
}
