#!/bin/sh
# The stand-in driver beside a real cuda.h, where there is one (in CUDA_HOME, /usr/local/cuda, or where gcc looks):
# tests/standin.sh. Compiled with that, tests/cuda/standin.c has the same constants, sizes, entry points and versions.
set -u
cd "$(dirname "$0")/cuda" || exit 2
include=${CUDA_HOME:-/usr/local/cuda}/include
source='#include <cuda.h>
#include <cudaTypedefs.h>
#if CUDA_VERSION < 13000
#error older than what the stand-in has
#endif'
compiles() { gcc -std=c99 -Wall -Werror -DSTANDIN_WITH_CUDA_H -I. -I"$include" -fsyntax-only -x c - 2>&1; }

if ! printf '%s\n' "$source" | compiles >/dev/null; then
    echo 'SKIP standin_is_as_cuda_h: no cuda.h of CUDA 13'
    echo '0 passed, 0 failed, 1 skipped'
    exit 0
fi
said=$(compiles <standin.c)
# What is wrong must be seen: a parameter, a version.
if [ -z "$said" ] &&
   ! sed 's/unsigned int flags, CUdevice device/int flags, CUdevice device/' standin.c | compiles >/dev/null &&
   ! sed 's/AT(cuMemFree, 3020/AT(cuMemFree, 3030/' standin.c | compiles >/dev/null; then
    echo 'ok standin_is_as_cuda_h'
    echo '1 passed, 0 failed'
    exit 0
fi
printf '%s\n' "$said" | head -n 40
echo 'FAIL standin_is_as_cuda_h: it has other declarations, or does not see when it has'
echo '0 passed, 1 failed'
exit 1
