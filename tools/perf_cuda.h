// What tprpc-perf needs of GPUs: the driver's entry points as it declares them itself, the memory of an end and what it
// holds, and the bare driver calls of --test raw that the library is put beside. Part of tprpc-perf.c, which
// includes this once, after what runs processes.
#ifndef TPRPC_TOOLS_PERF_CUDA_H
#define TPRPC_TOOLS_PERF_CUDA_H

#include <dlfcn.h>

// ---- the driver -----------------------------------------------------------------------------------------------------

typedef struct perf_cu_handle { char bytes[64]; } perf_cu_handle;            // CUipcMemHandle

#define PERF_CU_FUNCTIONS(F) \
    F(cuInit, (unsigned flags)) \
    F(cuGetErrorString, (int error, const char **text)) \
    F(cuDeviceGetCount, (int *count)) \
    F(cuDeviceCanAccessPeer, (int *can, int device, int peer)) \
    F(cuDevicePrimaryCtxRetain, (void **context, int device)) \
    F(cuCtxSetCurrent, (void *context)) \
    F(cuCtxEnablePeerAccess, (void *context, unsigned flags)) \
    F(cuStreamCreate, (void **stream, unsigned flags)) \
    F(cuStreamDestroy_v2, (void *stream)) \
    F(cuStreamQuery, (void *stream)) \
    F(cuStreamSynchronize, (void *stream)) \
    F(cuStreamWaitValue64_v2, (void *stream, uint64_t at, uint64_t value, unsigned flags)) \
    F(cuStreamWriteValue64_v2, (void *stream, uint64_t at, uint64_t value, unsigned flags)) \
    F(cuMemAlloc_v2, (uint64_t *at, size_t size)) \
    F(cuMemFree_v2, (uint64_t at)) \
    F(cuMemHostAlloc, (void **at, size_t size, unsigned flags)) \
    F(cuMemFreeHost, (void *at)) \
    F(cuMemHostRegister_v2, (void *at, size_t size, unsigned flags)) \
    F(cuMemHostGetDevicePointer_v2, (uint64_t *device_at, void *at, unsigned flags)) \
    F(cuMemcpyAsync, (uint64_t to, uint64_t from, size_t size, void *stream)) \
    F(cuMemsetD8Async, (uint64_t at, unsigned char value, size_t size, void *stream)) \
    F(cuIpcGetMemHandle, (perf_cu_handle *handle, uint64_t at)) \
    F(cuIpcOpenMemHandle_v2, (uint64_t *at, perf_cu_handle handle, unsigned flags)) \
    F(cuModuleLoadData, (void **module, const void *image)) \
    F(cuModuleGetFunction, (void **function, void *module, const char *name)) \
    F(cuLaunchKernel, (void *function, unsigned x, unsigned y, unsigned z, unsigned threads_x, unsigned threads_y, \
                       unsigned threads_z, unsigned shared, void *stream, void **arguments, void **extra))

typedef struct perf_cu_driver {
#define PERF_CU_POINTER(name, parameters) int (*name) parameters;
    PERF_CU_FUNCTIONS(PERF_CU_POINTER)
    int count;                           // of devices
} perf_cu_driver;

static perf_cu_driver perf_cu;
static pthread_once_t perf_cu_once = PTHREAD_ONCE_INIT;

enum { PERF_CU_NOT_READY = 600, PERF_CU_PEER_ALREADY = 704 };
enum { PERF_CU_NON_BLOCKING = 1, PERF_CU_PORTABLE = 1, PERF_CU_MAPPED = 2, PERF_CU_LAZY_PEER = 1, PERF_CU_GEQ = 0 };

static void perf_cu_must(int code, const char *what) {
    tprpc_error error = {.status = TPRPC_ERROR_DEVICE};
    const char *text = NULL;
    if (code == 0) return;
    perf_cu.cuGetErrorString(code, &text);
    snprintf(error.text, sizeof error.text, "error %d, %s", code, text ? text : "which the driver does not know");
    perf_die(what, &error);
}
#define PERF_CU(name, arguments) perf_cu_must(perf_cu.name arguments, #name)

// Once in a process, and in none that forks afterwards: the driver does not live in a child.
static void perf_cu_load(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), *found;
    if (!library) perf_refuse("there is no CUDA driver here: %s.", dlerror());
#define PERF_CU_FIND(name, parameters) \
    found = dlsym(library, #name); \
    if (!found) perf_refuse("the CUDA driver is too old: it has no %s.", #name); \
    memcpy(&perf_cu.name, &found, sizeof found);
    PERF_CU_FUNCTIONS(PERF_CU_FIND)
    const char *text = NULL;
    int code = perf_cu.cuInit(0);
    if (code) perf_cu.cuGetErrorString(code, &text);
    if (code) perf_refuse("the CUDA driver cannot be used: cuInit gives error %d, %s.", code, text ? text : "unknown");
    PERF_CU(cuDeviceGetCount, (&perf_cu.count));
}

// ---- the memory of an end -------------------------------------------------------------------------------------------

enum { PERF_STAGE = 16 * PERF_MIB };     // by how much device memory is filled and looked at

typedef struct perf_gpu {                // an end of a measurement in which GPU memory takes part
    perf_where where;
    bool       used;                     // false: neither end has GPU memory
    void      *context, *stream;         // NULL: this end is plain host memory, and needs none
    uint64_t  *stage;                    // pinned
    uint64_t   scratch;                  // device memory of 8 bytes, for work on the stream
} perf_gpu;

static void perf_gpu_check_index(const char *option, const perf_where *where) {
    if (where->kind == PERF_CUDA && where->index >= perf_cu.count)
        perf_refuse("%s %s: this machine shows %d GPU%s.", option, where->name, perf_cu.count,
                    perf_cu.count == 1 ? "" : "s");
}

// Whether a GPU at one end can reach the memory of the GPU at the other.
static bool perf_gpu_peers(const perf_options *o) {
    int can = 0;
    if (o->devices[0].kind != PERF_CUDA || o->devices[1].kind != PERF_CUDA) return false;
    if (o->devices[0].index == o->devices[1].index) return true;
    pthread_once(&perf_cu_once, perf_cu_load);
    if (o->listen || o->connect) return true;        // who knows what is there
    PERF_CU(cuDeviceCanAccessPeer, (&can, o->devices[1].index, o->devices[0].index));
    return can != 0;
}

// Whether there are the GPUs that the options name. With --listen and --connect this machine has one of the ends.
static void perf_gpu_look(const perf_options *o) {
    const int only = o->listen ? 1 : o->connect ? 0 : -1;
    if (only >= 0 && o->devices[only].kind == PERF_HOST) return;
    pthread_once(&perf_cu_once, perf_cu_load);
    if (only != 1) perf_gpu_check_index("--device", &o->devices[0]);
    if (only != 0) perf_gpu_check_index("--peer-device", &o->devices[1]);
    if (perf_bare_cuda(o) && o->medium != PERF_BARE_PINNED && !perf_gpu_peers(o))
        perf_refuse("--transport %s: %s cannot reach the memory of %s.", perf_medium_names[o->medium],
                          o->devices[1].name, o->devices[0].name);
}

// The calling thread works for this end from here on.
static void perf_gpu_open(perf_gpu *gpu, const perf_options *o, int end) {
    *gpu = (perf_gpu){.where = o->devices[end], .used = perf_on_gpu(o)};
    if (!gpu->used || gpu->where.kind == PERF_HOST) return;
    const perf_where *device = gpu->where.kind == PERF_CUDA ? &gpu->where : &o->devices[!end];
    void *stage = NULL;
    pthread_once(&perf_cu_once, perf_cu_load);
    perf_gpu_check_index(end ? "--peer-device" : "--device", &gpu->where);
    PERF_CU(cuDevicePrimaryCtxRetain, (&gpu->context, device->index));
    PERF_CU(cuCtxSetCurrent, (gpu->context));
    PERF_CU(cuStreamCreate, (&gpu->stream, PERF_CU_NON_BLOCKING));
    PERF_CU(cuMemHostAlloc, (&stage, PERF_STAGE, PERF_CU_PORTABLE));
    PERF_CU(cuMemAlloc_v2, (&gpu->scratch, 8));
    gpu->stage = (uint64_t *)stage;
}

static void perf_gpu_close(perf_gpu *gpu) {
    if (!gpu->stream) return;
    PERF_CU(cuMemFree_v2, (gpu->scratch));
    PERF_CU(cuMemFreeHost, (gpu->stage));
    PERF_CU(cuStreamDestroy_v2, (gpu->stream));
}

static uint64_t perf_gpu_address(const void *at) { return (uint64_t)(uintptr_t)at; }
static bool perf_gpu_is_device(const perf_gpu *gpu) { return gpu->where.kind == PERF_CUDA; }

// Memory of this end, cleared.
static unsigned char *perf_gpu_memory(const perf_gpu *gpu, size_t size) {
    uint64_t device = 0;
    void *host = NULL;
    if (gpu->where.kind == PERF_HOST) return (unsigned char *)perf_memory(size);
    if (gpu->where.kind == PERF_PINNED) {
        PERF_CU(cuMemHostAlloc, (&host, size, PERF_CU_PORTABLE));
        memset(host, 0, size);
        return (unsigned char *)host;
    }
    PERF_CU(cuMemAlloc_v2, (&device, size));
    PERF_CU(cuMemsetD8Async, (device, 0, size, gpu->stream));
    PERF_CU(cuStreamSynchronize, (gpu->stream));
    return (unsigned char *)(uintptr_t)device;
}

static void perf_gpu_free(const perf_gpu *gpu, unsigned char *at) {
    if (gpu->where.kind == PERF_HOST) free(at);
    else if (gpu->where.kind == PERF_PINNED) PERF_CU(cuMemFreeHost, (at));
    else if (at) PERF_CU(cuMemFree_v2, (perf_gpu_address(at)));
}

// The i-th word of random bytes (splitmix64).
static uint64_t perf_random(uint64_t seed, uint64_t i) {
    uint64_t z = (seed << 40) + (i + 1) * UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void perf_random_fill(uint64_t *words, size_t bytes, uint64_t seed, size_t at) {
    for (size_t i = 0; i < bytes / 8; i++) words[i] = perf_random(seed, at / 8 + i);
    const uint64_t last = perf_random(seed, (at + bytes) / 8);
    memcpy((unsigned char *)words + bytes / 8 * 8, &last, bytes % 8);
}

static bool perf_random_there(const uint64_t *words, size_t bytes, uint64_t seed, size_t at) {
    uint64_t wrong = 0;
    for (size_t i = 0; i < bytes / 8; i++) wrong |= words[i] ^ perf_random(seed, at / 8 + i);
    const uint64_t last = perf_random(seed, (at + bytes) / 8);
    return wrong == 0 && memcmp((const unsigned char *)words + bytes / 8 * 8, &last, bytes % 8) == 0;
}

static size_t perf_stage_size(size_t size, size_t at) { return size - at < PERF_STAGE ? size - at : PERF_STAGE; }

// Fills memory of this end with random bytes of `seed`.
static void perf_gpu_fill(const perf_gpu *gpu, unsigned char *to, size_t size, uint64_t seed) {
    if (!perf_gpu_is_device(gpu)) {
        perf_random_fill((uint64_t *)(void *)to, size, seed, 0);
        return;
    }
    for (size_t at = 0; at < size; at += PERF_STAGE) {
        perf_random_fill(gpu->stage, perf_stage_size(size, at), seed, at);
        PERF_CU(cuMemcpyAsync, (perf_gpu_address(to + at), perf_gpu_address(gpu->stage), perf_stage_size(size, at),
                                gpu->stream));
        PERF_CU(cuStreamSynchronize, (gpu->stream));
    }
}

// Whether memory of this end holds them, in the order of its stream.
static bool perf_gpu_holds(const perf_gpu *gpu, const unsigned char *from, size_t size, uint64_t seed) {
    if (!perf_gpu_is_device(gpu)) return perf_random_there((const uint64_t *)(const void *)from, size, seed, 0);
    for (size_t at = 0; at < size; at += PERF_STAGE) {
        PERF_CU(cuMemcpyAsync, (perf_gpu_address(gpu->stage), perf_gpu_address(from + at), perf_stage_size(size, at),
                                gpu->stream));
        PERF_CU(cuStreamSynchronize, (gpu->stream));
        if (!perf_random_there(gpu->stage, perf_stage_size(size, at), seed, at)) return false;
    }
    return true;
}

// Work of a user on the stream of this end: writes 8 bytes.
static void perf_gpu_work(const perf_gpu *gpu) {
    if (gpu->stream) PERF_CU(cuMemsetD8Async, (gpu->scratch, 1, 8, gpu->stream));
}

// Clears the beginning of memory of this end, in the order of its stream.
static void perf_gpu_clear(const perf_gpu *gpu, unsigned char *at, size_t size) {
    if (perf_gpu_is_device(gpu))
        PERF_CU(cuMemsetD8Async, (perf_gpu_address(at), 0, size < 8 ? size : 8, gpu->stream));
    else memset(at, 0, size < 8 ? size : 8);
}

// Whether all that was queued on the stream of this end has happened.
static bool perf_gpu_settled(const perf_gpu *gpu) {
    const int code = gpu->stream ? perf_cu.cuStreamQuery(gpu->stream) : 0;
    if (code != PERF_CU_NOT_READY) perf_cu_must(code, "cuStreamQuery");
    return code == 0;
}

static void perf_gpu_wait(const perf_gpu *gpu) {
    if (gpu->stream) PERF_CU(cuStreamSynchronize, (gpu->stream));
}

// ---- raw: driver calls ----------------------------------------------------------------------------------------------
//
// The process that measures has --peer-device and pulls, as the library's receiver does; the other one has --device,
// and lends its memory. Both see some pinned memory with flags that the hosts set and words that the GPUs set.

enum { PERF_BARE_PAGE = 4096 };          // each size has one of its own

typedef struct perf_bare_shared {
    perf_cu_handle handles[2];           // of the memory of end 0 and 1
    int32_t  lent[2];                    // the handle is there
    int32_t  over;
    char     pad[116];
    struct { uint32_t turn; char pad[124]; } host[2];        // how many trips each host has announced
    struct { uint64_t turn; char pad[120]; } word[2];        // how many each GPU has
} perf_bare_shared;

typedef struct perf_bare {               // an end
    perf_gpu gpu;
    perf_bare_shared *shared;
    uint64_t mine, theirs, words;        // device addresses: of memory of both, and of `word`
    int      end;
} perf_bare;

// Where the other process has failed, which has said why, nothing is waited for.
static void perf_bare_look(uint32_t looked) {
    siginfo_t info = {.si_pid = 0};
    if ((looked & 0xfffff) == 0xfffff && waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid != 0)
        exit(1);
}

// The shared page is mapped by both, so both register it. Memory of a process is open to the other by a handle.
static void perf_bare_open(perf_bare *bare, const perf_options *o, perf_bare_shared *shared, int end, size_t size) {
    *bare = (perf_bare){.shared = shared, .end = end};
    perf_gpu_open(&bare->gpu, o, !end);                      // end 0 measures, on --peer-device
    PERF_CU(cuMemHostRegister_v2, (shared, PERF_BARE_PAGE, PERF_CU_PORTABLE | PERF_CU_MAPPED));
    PERF_CU(cuMemHostGetDevicePointer_v2, (&bare->words, shared->word, 0));
    bare->mine = perf_gpu_address(perf_gpu_memory(&bare->gpu, size));
    PERF_CU(cuIpcGetMemHandle, (&shared->handles[end], bare->mine));
    __atomic_store_n(&shared->lent[end], 1, __ATOMIC_RELEASE);
    for (uint32_t i = 0; !__atomic_load_n(&shared->lent[!end], __ATOMIC_ACQUIRE); i++) perf_bare_look(i);
    PERF_CU(cuIpcOpenMemHandle_v2, (&bare->theirs, shared->handles[!end], PERF_CU_LAZY_PEER));
}

static void perf_bare_host_wait(perf_bare *bare, uint32_t turn) {
    for (uint32_t i = 0; __atomic_load_n(&bare->shared->host[!bare->end].turn, __ATOMIC_ACQUIRE) < turn; i++)
        perf_bare_look(i);
}

static void perf_bare_host_tell(perf_bare *bare, uint32_t turn) {
    __atomic_store_n(&bare->shared->host[bare->end].turn, turn, __ATOMIC_RELEASE);
}

static uint64_t perf_bare_word(const perf_bare *bare, int end) {
    return bare->words + (uint64_t)end * sizeof bare->shared->word[0];
}

// Sends: after what is queued on the stream, the other GPU may copy.
static void perf_bare_send(perf_bare *bare, uint32_t turn, bool ordered) {
    if (ordered) {
        perf_gpu_work(&bare->gpu);
        PERF_CU(cuStreamWriteValue64_v2, (bare->gpu.stream, perf_bare_word(bare, bare->end), turn, 0));
    }
    perf_bare_host_tell(bare, turn);
}

// Takes what the other end sent: its GPU's word first, where order is asked for; a write of the user's after it.
static void perf_bare_take(perf_bare *bare, uint32_t turn, size_t size, bool ordered) {
    perf_bare_host_wait(bare, turn);
    if (ordered) PERF_CU(cuStreamWaitValue64_v2, (bare->gpu.stream, perf_bare_word(bare, !bare->end), turn,
                                                  PERF_CU_GEQ));
    PERF_CU(cuMemcpyAsync, (bare->mine + size, bare->theirs, size, bare->gpu.stream));
    if (ordered) perf_gpu_work(&bare->gpu);
    else PERF_CU(cuStreamSynchronize, (bare->gpu.stream));
}

static bool perf_bare_ordered(const perf_options *o) { return o->medium == PERF_BARE_ORDERED; }

static void perf_bare_until_over(const perf_bare *bare) {
    while (!__atomic_load_n(&bare->shared->over, __ATOMIC_ACQUIRE)) usleep(100);
}

static void perf_bare_trips_serve(const perf_options *o, perf_bare_shared *shared) {
    perf_bare bare;
    perf_bare_open(&bare, o, shared, 1, 2 * (size_t)o->size);
    for (uint32_t i = 1; i <= (uint32_t)(o->warmup + o->iters); i++) {
        perf_bare_take(&bare, i, (size_t)o->size, perf_bare_ordered(o));
        perf_bare_send(&bare, i, perf_bare_ordered(o));
    }
    PERF_CU(cuStreamSynchronize, (bare.gpu.stream));
    perf_bare_until_over(&bare);
}

// There and back, until the host that measures knows that its GPU has it.
static void perf_bare_trips(const perf_options *o, perf_bare_shared *shared, perf_result *r) {
    perf_bare bare;
    int64_t *durations = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)o->iters);
    perf_bare_open(&bare, o, shared, 0, 2 * (size_t)o->size);
    for (int64_t i = 0; i < o->warmup + o->iters; i++) {
        const int64_t begin = perf_now_ns();
        perf_bare_send(&bare, (uint32_t)i + 1, perf_bare_ordered(o));
        perf_bare_take(&bare, (uint32_t)i + 1, (size_t)o->size, perf_bare_ordered(o));
        PERF_CU(cuStreamSynchronize, (bare.gpu.stream));
        if (i >= o->warmup) durations[i - o->warmup] = perf_now_ns() - begin;
    }
    perf_distribution(r, durations, o->iters);
}

// Lends memory with random bytes until it is over.
static void perf_bare_lend(const perf_options *o, perf_bare_shared *shared) {
    perf_bare bare;
    const size_t size = (size_t)o->size * (size_t)o->count;
    perf_bare_open(&bare, o, shared, 1, size);
    perf_gpu_fill(&bare.gpu, (unsigned char *)(uintptr_t)bare.mine, size, 1);
    perf_bare_host_tell(&bare, 1);
    perf_bare_until_over(&bare);
}

// Memory to copy from, and two pieces to copy into.
static void perf_bare_memory(perf_bare *bare, const perf_options *o, perf_bare_shared *shared, size_t size) {
    perf_gpu from;
    if (!o->in_process) {
        perf_bare_open(bare, o, shared, 0, 2 * size);
        perf_bare_host_wait(bare, 1);
        return;
    }
    *bare = (perf_bare){.shared = shared};
    perf_gpu_open(&from, o, 0);
    bare->theirs = perf_gpu_address(perf_gpu_memory(&from, size));
    perf_gpu_fill(&from, (unsigned char *)(uintptr_t)bare->theirs, size, 1);
    perf_gpu_open(&bare->gpu, o, 1);
    bare->mine = perf_gpu_address(perf_gpu_memory(&bare->gpu, 2 * size));
    if (from.where.index == bare->gpu.where.index) return;
    const int code = perf_cu.cuCtxEnablePeerAccess(from.context, 0);
    if (code != PERF_CU_PEER_ALREADY) perf_cu_must(code, "cuCtxEnablePeerAccess");
}

static void perf_bare_check(const perf_bare *bare, size_t size) {
    errno = EBADMSG;
    if (!perf_gpu_holds(&bare->gpu, (const unsigned char *)(uintptr_t)bare->mine, size, 1))
        perf_die("a copy has other bytes", NULL);
}

static int64_t perf_bare_copy_many(const perf_gpu *gpu, uint64_t to, uint64_t step, uint64_t from, size_t size,
                                   int64_t count) {
    const int64_t begin = perf_now_ns();
    for (int64_t i = 0; i < count; i++)
        PERF_CU(cuMemcpyAsync, (to + (uint64_t)(i & 1) * step, from, size, gpu->stream));
    PERF_CU(cuStreamSynchronize, (gpu->stream));
    return perf_now_ns() - begin;
}

static void perf_bare_peer(const perf_options *o, perf_bare_shared *shared, perf_result *r) {
    perf_bare bare;
    const size_t size = (size_t)o->size;
    perf_bare_memory(&bare, o, shared, size);
    perf_bare_copy_many(&bare.gpu, bare.mine, size, bare.theirs, size, o->warmup);
    perf_throughput(r, perf_bare_copy_many(&bare.gpu, bare.mine, size, bare.theirs, size, o->iters), o->iters, o->size);
    perf_bare_check(&bare, size);
}

// Copies between a GPU and pinned host memory, in each direction that the two devices ask for: the slower one counts.
static void perf_bare_pinned(const perf_options *o, perf_result *r) {
    const size_t size = (size_t)o->size;
    void *host = NULL;
    int64_t slowest = 0;
    for (int end = 0; end < 2; end++) {
        if (o->devices[end].kind != PERF_CUDA) continue;
        perf_gpu gpu;
        perf_gpu_open(&gpu, o, end);
        if (!host) {
            PERF_CU(cuMemHostAlloc, (&host, size, PERF_CU_PORTABLE));
            memset(host, 1, size);
        }
        const uint64_t device = perf_gpu_address(perf_gpu_memory(&gpu, size)), there = perf_gpu_address(host);
        const uint64_t to = end ? device : there, from = end ? there : device;
        perf_bare_copy_many(&gpu, to, 0, from, size, o->warmup);
        const int64_t took = perf_bare_copy_many(&gpu, to, 0, from, size, o->iters);
        if (took > slowest) slowest = took;
    }
    perf_throughput(r, slowest, o->iters, o->size);
}

// Many small tensors by the library's own kernel, launched by hand.
static void perf_bare_gather(const perf_options *o, perf_bare_shared *shared, perf_result *r) {
    perf_bare bare;
    void *module, *function, *pinned = NULL;
    unsigned count = (unsigned)o->count;
    const unsigned grid = count < TPR_CUDA_KERNELS_GRID ? count : TPR_CUDA_KERNELS_GRID;
    const uint64_t size = (uint64_t)o->size, all = size * count;
    int64_t *durations = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)o->iters);
    perf_bare_memory(&bare, o, shared, (size_t)all);
    PERF_CU(cuModuleLoadData, (&module, tpr_cuda_kernels_ptx));
    PERF_CU(cuModuleGetFunction, (&function, module, "tprpc_gather"));
    PERF_CU(cuMemHostAlloc, (&pinned, count * sizeof(tpr_cuda_kernels_entry), PERF_CU_PORTABLE | PERF_CU_MAPPED));
    tpr_cuda_kernels_entry *table = (tpr_cuda_kernels_entry *)pinned;
    for (unsigned i = 0; i < count; i++)
        table[i] = (tpr_cuda_kernels_entry){.from = bare.theirs + i * size, .to = bare.mine + i * size, .size = size};
    uint64_t table_at = perf_gpu_address(pinned);
    void *arguments[2] = {&table_at, &count};
    for (int64_t i = 0; i < o->warmup + o->iters; i++) {
        const int64_t begin = perf_now_ns();
        PERF_CU(cuLaunchKernel, (function, grid, 1, 1, TPR_CUDA_KERNELS_BLOCK, 1, 1, 0, bare.gpu.stream, arguments,
                                 NULL));
        PERF_CU(cuStreamSynchronize, (bare.gpu.stream));
        if (i >= o->warmup) durations[i - o->warmup] = perf_now_ns() - begin;
    }
    perf_bare_check(&bare, (size_t)all);
    perf_distribution(r, durations, o->iters);
}

static perf_bare_shared *perf_bare_page(void *pages, int i) {
    return (perf_bare_shared *)(void *)((unsigned char *)pages + (size_t)i * PERF_BARE_PAGE);
}

static void perf_bare_serve(const perf_options *o, void *pages) {
    for (int i = 0; i < o->size_count; i++) {
        const perf_options one = perf_of_size(o, i);
        const bool trips = o->medium == PERF_BARE_ORDERED || o->medium == PERF_BARE_IDLE;
        (trips ? perf_bare_trips_serve : perf_bare_lend)(&one, perf_bare_page(pages, i));
    }
}

static void perf_bare_measure(const perf_options *o, perf_bare_shared *shared, perf_result *r) {
    if (o->medium == PERF_BARE_PEER) perf_bare_peer(o, shared, r);
    else if (o->medium == PERF_BARE_PINNED) perf_bare_pinned(o, r);
    else if (o->medium == PERF_BARE_GATHER) perf_bare_gather(o, shared, r);
    else perf_bare_trips(o, shared, r);
}

static void perf_raw_cuda(const perf_options *o) {
    const bool two = !o->in_process && o->medium != PERF_BARE_PINNED;
    const size_t size = PERF_SIZES_MAX * PERF_BARE_PAGE;
    void *pages = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    perf_other other;
    if (pages == MAP_FAILED) perf_die("mmap", NULL);
    if (two) perf_start(&other, o, perf_bare_serve, pages);
    for (int i = 0; i < o->size_count; i++) {
        const perf_options one = perf_of_size(o, i);
        perf_result r = perf_result_empty();
        snprintf(r.transport, sizeof r.transport, "%s", perf_medium_names[o->medium]);
        perf_bare_measure(&one, perf_bare_page(pages, i), &r);
        __atomic_store_n(&perf_bare_page(pages, i)->over, 1, __ATOMIC_RELEASE);
        perf_print(&one, &r);
    }
    if (two) perf_join(&other);
}

#endif
