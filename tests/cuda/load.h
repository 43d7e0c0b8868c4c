/* Loads the stand-in driver that was built beside this program: whoever opens "libcuda.so.1" afterwards gets it, and
   not the machine's. CUDA_LIBRARY=libcuda.so.1 in the environment takes the machine's real driver all the same. */
#ifndef TPRPC_TESTS_LOAD_H
#define TPRPC_TESTS_LOAD_H

#include "../harness.h"
#include "standin.h"

#include <dlfcn.h>

/* Not the stand-in, but a real driver: what is the stand-in's own cannot be tested. */
static inline int standin_is_real(void) { return getenv("CUDA_LIBRARY") != NULL; }

static inline void *standin_load(void) {
    char path[600];
    const char *name = getenv("CUDA_LIBRARY");
    void *library;
    if (!name) {
        ssize_t size = readlink("/proc/self/exe", path, 500);
        path[size > 0 ? size : 0] = 0;
        *strrchr(path, '/') = 0;
        strcpy(strrchr(path, '/'), "/standin/libcuda.so.1");
        name = path;
    }
    library = dlopen(name, RTLD_NOW);
    if (!library) harness_require(harness_fail(__FILE__, __LINE__, "%s", dlerror()));
    return library;
}

#endif
