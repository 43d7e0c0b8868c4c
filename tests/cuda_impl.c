/* The implementation of tprpc_cuda.h, with the test hooks, that all tests of CUDA are linked with beside impl.c's. */
#define TPRPC_CUDA_IMPLEMENTATION
#define TPRPC_TEST_HOOKS
#include "../tprpc_cuda.h"
