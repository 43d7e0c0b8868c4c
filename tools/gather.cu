// The kernel that moves many small tensors at a time. tools/ptx.py puts it into tprpc_cuda.h.

struct entry { unsigned long long from, to, size; };   // tpr_cuda_kernels_entry

// Each block takes every gridDim.x-th entry. The table is in pinned host memory.
extern "C" __global__ void tprpc_gather(const entry *table, unsigned int count) {
    for (unsigned int i = blockIdx.x; i < count; i += gridDim.x) {
        const unsigned long long to = table[i].to, from = table[i].from, size = table[i].size;
        unsigned long long done = 0;
        if (((to | from) & 15) == 0) {
            const uint4 *source = (const uint4 *)from;
            uint4 *target = (uint4 *)to;
            #pragma unroll 1
            for (unsigned long long k = threadIdx.x; k < size / 16; k += blockDim.x) target[k] = source[k];
            done = size / 16 * 16;
        }
        #pragma unroll 1
        for (unsigned long long k = done + threadIdx.x; k < size; k += blockDim.x)
            ((unsigned char *)to)[k] = ((const unsigned char *)from)[k];
    }
}
