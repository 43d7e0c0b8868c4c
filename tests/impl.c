/* The implementation, with the test hooks, that all tests of a variant are linked with. */
#define TPRPC_IMPLEMENTATION
#define TPRPC_TEST_HOOKS
#include "../tprpc.h"
