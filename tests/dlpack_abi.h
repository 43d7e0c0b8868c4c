/* What DLPack's header declares, as far as the tests need it: names, numbers and layout of 1.0, or of 0.6 where
   TEST_DLPACK_OLD is defined. In its own words, so that the tests need no dlpack.h; and it is no substitute for one. */
#ifndef TPRPC_TESTS_DLPACK_ABI_H
#define TPRPC_TESTS_DLPACK_ABI_H

#include <stddef.h>
#include <stdint.h>

#ifdef TEST_DLPACK_OLD
#define DLPACK_VERSION 60
#else
#define DLPACK_MAJOR_VERSION 1
#define DLPACK_MINOR_VERSION 0
#endif

#ifdef __cplusplus
extern "C" {
typedef enum : int32_t {
#else
typedef enum {
#endif
    kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLOpenCL = 4, kDLVulkan = 7, kDLMetal = 8, kDLVPI = 9, kDLROCM = 10,
    kDLROCMHost = 11, kDLExtDev = 12, kDLCUDAManaged = 13
} DLDeviceType;

typedef enum {
    kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLOpaqueHandle = 3, kDLBfloat = 4, kDLComplex = 5
#ifndef TEST_DLPACK_OLD
    , kDLBool = 6
#endif
} DLDataTypeCode;

typedef struct { DLDeviceType device_type; int32_t device_id; } DLDevice;
typedef struct { uint8_t code, bits; uint16_t lanes; } DLDataType;

typedef struct {
    void      *data;
    DLDevice   device;
    int32_t    ndim;
    DLDataType dtype;
    int64_t   *shape;
    int64_t   *strides;         /* in elements; NULL: contiguous */
    uint64_t   byte_offset;     /* from data to the first element */
} DLTensor;

typedef struct DLManagedTensor {
    DLTensor dl_tensor;
    void    *manager_ctx;
    void   (*deleter)(struct DLManagedTensor *self);   /* frees self too; may be NULL */
} DLManagedTensor;

#ifdef __cplusplus
}
#endif
#endif
