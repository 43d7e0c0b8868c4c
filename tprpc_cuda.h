// tprpc_cuda - CUDA memory for tprpc: tensors on GPUs travel in calls and messages as host memory does. Part of
// tprpc 0.1.0; it needs the declarations of tprpc.h beside it.
//
// In exactly one C or C++ file of your program, it may be the one that has TPRPC_IMPLEMENTATION, write
//
//     #define TPRPC_CUDA_IMPLEMENTATION
//     #include "tprpc_cuda.h"
//
// and elsewhere include it plain. A compiler for C99 or C++11 is enough: no nvcc, no file of the CUDA toolkit, and
// nothing of CUDA is linked. The driver (libcuda.so.1) is loaded when a context is created that was given our backends;
// where there is none, or it is of no use, the program runs on without it, and tprpc_context_get_backends says why.
//
//     tprpc_context_desc desc = {0};
//     desc.backends = tprpc_cuda_backends(&desc.backend_count);
//     tprpc_context_create(&desc, &ctx, &error);
//     ...
//     tprpc_tensor tensor = {.data = pointer, .size = size, .device = {TPRPC_CUDA, 0}, .stream = stream,
//                            .target = {TPRPC_CUDA, 1}};
//
// License: Unlicense or MIT-0, at the end of the file.
//
// CONTENTS, to be searched for. First this manual, then the public part; then, under TPRPC_CUDA_IMPLEMENTATION, the
// sections; each uses only what stands above it, and of tprpc.h only what is public:
//
//   >>os          system calls, each through one function
//   >>base        lists, memory
//   >>driver      the CUDA driver: its types, constants and entry points as we declare them
//   >>wire        every byte that a peer can send
//   >>device      devices by number, their contexts, peers and memory
//   >>kernels     what is launched, as PTX
//   >>stream      the library's streams, events, and what waits for them
//   >>arena       pinned host memory that two processes share
//   >>word        order between streams of two processes
//   >>export      device memory that other processes may open
//   >>outbox      device memory of ours that they have open, for what cannot be shown to them
//   >>proof       whether another process can really read a device's memory
//   >>batch       what the channels have in common: batches, and the way through host memory
//   >>basic       any memory through pinned host memory
//   >>xth         device memory between threads of one process
//   >>ipc         device memory between processes of one host
//   >>convert     device memory for the library: copied, allocated, given back
//   >>backends    the table
//
//
// STREAMS AND ORDER
//
// A tensor on a GPU is read after the work that is queued on its `stream` when the call or write is made, and written
// in the order of the stream that it is placed on. NULL is the device's legacy default stream. When a callback runs
// (release, done, on_done, a handler), the transfer is ordered: what you queue on that stream from then on comes after
// it. It need not have happened yet; no stream is ever synchronised with the host on the way. Host memory is different:
// when a callback runs, it is there.
//
// What the library allocates for a tensor that came is ordered on a stream of its own, which the tensor names and
// tprpc_request_stream gives; order your work after it (by an event), or on it. It is given back in the order of that
// stream when the request is answered or the future released: what other streams still do with it you order before
// that, or name by tprpc_cuda_use.
//
// Streams must be of the device's primary context, the one that the CUDA runtime uses. A stream that is being captured
// into a graph is refused with INVALID, and the capture stays as it is; do not begin a capture on a stream while a
// tensor on it is on its way.
//
// A freed pointer and a destroyed stream cannot be told from live ones: to use them is undefined.
//
//
// DEVICES
//
// A device's index is what the driver gives this process (CUDA_VISIBLE_DEVICES). Its primary context is retained when
// the first tensor names the device, and released with the tprpc context; no other device is touched.
//
//
// HOW THE BYTES TRAVEL
//
// cuda_xth (400) moves between two contexts of one process: from any GPU to any, and between GPUs and pinned host
// memory, one copy, queued on the receiver's stream.
//
// cuda_ipc (300) moves from GPU to GPU between processes of one host, over a connection that passes descriptors (shm).
// The receiver opens the sender's memory and copies on his own stream; words in memory that both share order the two
// streams. Memory that you registered (tprpc_cuda_register) is read where it is. Everything else, whatever allocated
// it, the sender first copies into an outbox: device memory of the library's that the peers have open. The first tensor
// from one GPU to another has the two processes prove that the receiver really reads the sender's memory; where he does
// not, this one and all others between the two GPUs go as cuda_basic has it, and tprpc_pipe_get_info says why.
//
// cuda_basic (0) moves between all memory everywhere: the sender copies into pinned host memory that both processes
// share, the receiver out of it, in chunks; where nothing can be shared the chunks travel through the pipe. The other
// two go this way where they cannot: host memory that is not pinned, GPUs that do not reach each other.
//
// Many small tensors of one message on one stream are copied by one kernel, where the receiving GPU can reach the
// memory; else one by one.
//
// Name the channels in tprpc_context_desc.channels ("cuda_ipc,cuda_basic,bulk,basic"), and the others are not used.
// tprpc_pipe_get_info tells which of them a pipe's tensors take (tprpc_path.carries).
//
//
// DEATHS
//
// When the other process dies, what streams of yours wait for is released by this process, so they go on, with what
// was queued behind. A transfer that was under way is reported failed (PEER). One whose callback has run was ordered,
// not done: its target then holds anything, and the pipe's error tells of it.
//
// A device that fails (a kernel's fault, say) takes its context with it, as CUDA has it: what is to be done on it fails
// with DEVICE, the driver's name and number of the error in the text; everything that needs no GPU goes on.
//
//
// LIMITS AND DEFAULTS
//
//   what                                              where                                 value
//   the driver                                        -                                     CUDA 12.0 or later
//   devices of a process                              -                                     64
//   streams that the tensors of a message are on      -                                     64
//   a chunk of pinned host memory                     -                                     2 MiB
//   chunks of an end of a pipe                        -                                     8
//   chunks of a transfer that are under way           -                                     6
//   an outbox, of each device and loop of a context   -                                     20 MiB
//   chunks of an outbox                               -                                     8 of 2 MiB, 64 of 64 KiB
//   likewise for what is larger than 2 MiB            -                                     96 MiB: 3 of 32 MiB
//   transfers of a pipe that words order at a time    -                                     512
//   memory by which a device is proven, likewise      -                                     2 MiB
//   a proof has failed when it takes                  -                                     5 s
//   small tensors go by a kernel                      -                                     from 8 on, of up to 64 KiB
//   a peer's death, when waiting for it               -                                     is looked for each 50 ms
//   a device's failure, likewise                      -                                     is looked for each 20 ms
//   a context that is destroyed waits for its streams -                                     30 s

#ifndef TPRPC_CUDA_H
#define TPRPC_CUDA_H

#include "tprpc.h"

#ifdef __cplusplus
extern "C" {
#endif

// The channels and the converter for TPRPC_CUDA, for tprpc_context_desc.backends; *count is set to their number. With
// backends of your own, copy the pointers into one array. Loads nothing. Any thread.
TPRPC_API const struct tprpc_backend *const *tprpc_cuda_backends(size_t *count);

typedef struct tprpc_cuda_device {   // a GPU as the driver shows it to this process
    int32_t  index;                  // of tprpc_device
    int32_t  major, minor;           // its compute capability
    int32_t  reserved;
    char     name[64];
    uint8_t  uuid[16];
    uint64_t memory_bytes;
    uint64_t peers;                  // bit i: it can reach the memory of device i
    char     pci[16];                // "0000:1b:00.0"
} tprpc_cuda_device;
// Tells which GPUs there are: fills the first `capacity` of `out` (`size`: sizeof *out of the caller). Returns how many
// there are; 0 and *error where there is no driver of use, or none. Creates no context on any. Any thread.
TPRPC_API size_t tprpc_cuda_get_devices(tprpc_cuda_device *out, size_t capacity, size_t size, tprpc_error *error);

typedef struct tprpc_cuda_allocator {
    // Memory of a device that is ready in the order of `stream`, aligned to 256 bytes; NULL: none is left. The device's
    // primary context is current. (default: a pool of the driver's, cuMemAllocFromPoolAsync)
    void *(*alloc)(int32_t device, size_t size, void *stream, void *user);
    // Gives it back in the order of `stream`. (default: cuMemFreeAsync)
    void  (*free)(int32_t device, void *data, size_t size, void *stream, void *user);
    void  *user;                     // (default: NULL)
} tprpc_cuda_allocator;
// From here on device memory for this context comes from `allocator`, both of whose functions are set; copied. Set it
// before the first tensor comes: memory goes back to the allocator that is set then. They are called under a lock of
// the library's, on any thread, and must not call tprpc. INVALID: one is missing; UNSUPPORTED: the context has no
// CUDA channel that is used. Any thread.
TPRPC_API tprpc_status tprpc_cuda_set_allocator(tprpc_context *ctx, const tprpc_cuda_allocator *allocator,
                                                tprpc_error *error);

// Tells that memory which the library allocated for a tensor is also used on `stream`, of the same device: it is given
// back only behind what is queued on that stream by then, without the host waiting for it. For a tensor of a request, a
// reply or a read that you were shown, while you have it. Any thread. Errors: INVALID (no device memory, or a stream
// that cannot take work), UNSUPPORTED, MEMORY, DEVICE.
TPRPC_API tprpc_status tprpc_cuda_use(tprpc_context *ctx, const tprpc_tensor *tensor, void *stream, tprpc_error *error);

// Lets processes of this host read memory of yours straight, instead of by way of a copy that we make: `size` bytes at
// `base`, which lie in one allocation of cuMemAlloc (or cudaMalloc), stay allocated until unregister has returned OK.
// The allocation is shown to peers as a whole. Any thread. Errors: INVALID (not device memory of that device, past the
// end of its allocation, or registered), UNSUPPORTED (no CUDA channel is used, or memory of a kind that cannot be
// shared: virtual memory, cuMemAllocAsync), DEVICE, MEMORY.
TPRPC_API tprpc_status tprpc_cuda_register(tprpc_context *ctx, int32_t device, void *base, size_t size,
                                           tprpc_error *error);
// Ends that: no transfer that begins from here on reads the memory straight. OK: no peer has it open any more, it may
// be freed. PENDING: some peer has; poll, and call again. A peer that dies or whose pipe is closed has it no more.
// Any thread. INVALID: it is not registered.
TPRPC_API tprpc_status tprpc_cuda_unregister(tprpc_context *ctx, void *base, tprpc_error *error);

#ifdef __cplusplus
}
#endif

#endif // TPRPC_CUDA_H

// ====================================================================================================================
// The implementation
// ====================================================================================================================

#if defined(TPRPC_CUDA_IMPLEMENTATION) && !defined(TPRPC_CUDA_IMPLEMENTED)
#define TPRPC_CUDA_IMPLEMENTED

#if !defined(_GNU_SOURCE) && defined(_FEATURES_H) && (defined(_STRING_H) || defined(_STDIO_H) || defined(_STDLIB_H) || \
    defined(_UNISTD_H) || defined(_FCNTL_H) || defined(_TIME_H) || defined(_SYS_TYPES_H) || defined(_ERRNO_H) || \
    defined(_ASSERT_H) || defined(_PTHREAD_H) || defined(_SYS_SOCKET_H) || defined(_SIGNAL_H) || defined(_MATH_H))
#error "tprpc_cuda: a system header came before the implementation: define _GNU_SOURCE above it, or include it first"
#else

#if defined(__GNUC__) && defined(__cplusplus)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wold-style-cast"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#endif

#ifdef __cplusplus
#define TPR_CUDA_ZERO {}
#else
#define TPR_CUDA_ZERO {0}
#endif
#define TPR_CUDA_OF(ptr, type, member) ((type *)(void *)((char *)(ptr) - offsetof(type, member)))
#define TPR_CUDA_COUNT(array) (sizeof(array) / sizeof((array)[0]))

#ifdef __cplusplus
extern "C" {
#endif

// >>os ----------------------------------------------------------------------------------------------------------------
// The operating system: every system call, through one function each, so that a test can make any of them fail.
//
// Uses: nothing.
// Invariant: functions that return int give -1 with errno set on failure; no descriptor is born without close-on-exec.

#if defined(__linux__)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#ifdef _FEATURES_H   // the public part's <stdint.h> came without it: glibc decides anew
#undef _FEATURES_H
#include <features.h>
#endif
#endif
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>
#else
#error "tprpc_cuda: the os section knows Linux alone; add your system's calls there"
#endif

#ifndef TPRPC_ASSERT
#ifdef NDEBUG
#define TPRPC_ASSERT(condition) ((void)0)
#else
#include <assert.h>
#define TPRPC_ASSERT(condition) assert(condition)
#endif
#endif

#ifdef TPRPC_TEST_HOOKS
extern int (*tprpc_test_hook)(const char *call, int64_t *size);   // of tprpc.h, whose comment says how it is used
static int tpr_cuda_os_hooked(const char *call) {
    int64_t none = 0;
    int (*hook)(const char *, int64_t *) = __atomic_load_n(&tprpc_test_hook, __ATOMIC_ACQUIRE);
    const int code = hook ? hook(call, &none) : 0;
    if (code) errno = code;
    return code;
}
#define TPR_CUDA_OS_HOOKED(call) tpr_cuda_os_hooked(call)
#else
#define TPR_CUDA_OS_HOOKED(call) ((void)(call), 0)
#endif

enum { TPR_CUDA_OS_SEALS = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL };

typedef struct tpr_cuda_os_lock { pthread_mutex_t mutex; } tpr_cuda_os_lock;
#define TPR_CUDA_OS_UNLOCKED {PTHREAD_MUTEX_INITIALIZER}

static void tpr_cuda_os_lock_init(tpr_cuda_os_lock *lock) { pthread_mutex_init(&lock->mutex, NULL); }
static void tpr_cuda_os_lock_free(tpr_cuda_os_lock *lock) { pthread_mutex_destroy(&lock->mutex); }
static void tpr_cuda_os_lock_take(tpr_cuda_os_lock *lock) { pthread_mutex_lock(&lock->mutex); }
static void tpr_cuda_os_lock_give(tpr_cuda_os_lock *lock) { pthread_mutex_unlock(&lock->mutex); }

// The library of that name, or NULL and why.
static void *tpr_cuda_os_library(const char *name, char *why, size_t size) {
#ifdef TPRPC_NO_DLOPEN
    snprintf(why, size, "%s: built with TPRPC_NO_DLOPEN", name);
    return NULL;
#else
    void *library = NULL;
    if (TPR_CUDA_OS_HOOKED("dlopen")) {
        snprintf(why, size, "%s: %s", name, strerror(errno));
    } else if ((library = dlopen(name, RTLD_NOW | RTLD_LOCAL)) == NULL) {
        const char *text = dlerror();
        snprintf(why, size, "%s", text ? text : name);
    }
    return library;
#endif
}

static void tpr_cuda_os_library_close(void *library) {
#ifndef TPRPC_NO_DLOPEN
    if (library) dlclose(library);
#else
    (void)library;
#endif
}

static void *tpr_cuda_os_symbol(void *library, const char *name) {
#ifndef TPRPC_NO_DLOPEN
    return dlsym(library, name);
#else
    (void)library;
    (void)name;
    return NULL;
#endif
}

static int tpr_cuda_os_pid(void) { return (int)getpid(); }

static int tpr_cuda_os_random(void *out, size_t size) {
    if (TPR_CUDA_OS_HOOKED("getrandom")) return -1;
    return getrandom(out, size, 0) == (ssize_t)size ? 0 : -1;
}

// What tells this boot of this machine from every other: 36 characters, or none where it cannot be told.
static void tpr_cuda_os_boot_id(char *out) {
    out[0] = 0;
    const int fd = TPR_CUDA_OS_HOOKED("open") ? -1 : open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    const ssize_t got = TPR_CUDA_OS_HOOKED("read") ? -1 : read(fd, out, 36);
    out[got == 36 ? 36 : 0] = 0;
    close(fd);
}

// A memory descriptor of `size` bytes that no one can resize any more.
static int tpr_cuda_os_memfd(const char *name, size_t size) {
    if (TPR_CUDA_OS_HOOKED("memfd_create")) return -1;
    const int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) return -1;
    if (TPR_CUDA_OS_HOOKED("ftruncate") || ftruncate(fd, (off_t)size) != 0 || TPR_CUDA_OS_HOOKED("fcntl") ||
        fcntl(fd, F_ADD_SEALS, TPR_CUDA_OS_SEALS) != 0) {
        const int code = errno;
        close(fd);
        errno = code;
        return -1;
    }
    return fd;
}

// Whether `fd` is such a descriptor, of exactly `size` bytes. Huge pages are refused: their giver could take them away.
static int tpr_cuda_os_memfd_check(int fd, size_t size) {
    struct stat st;
    struct statfs fs;
    if (TPR_CUDA_OS_HOOKED("fstat") || fstat(fd, &st) != 0) return -1;
    if (TPR_CUDA_OS_HOOKED("fstatfs") || fstatfs(fd, &fs) != 0) return -1;
    const int seals = TPR_CUDA_OS_HOOKED("get_seals") ? -1 : fcntl(fd, F_GET_SEALS);
    if (seals >= 0 && (seals & TPR_CUDA_OS_SEALS) == TPR_CUDA_OS_SEALS && st.st_size == (off_t)size &&
        (uint32_t)fs.f_type != (uint32_t)HUGETLBFS_MAGIC) return 0;
    errno = EPERM;
    return -1;
}

static void *tpr_cuda_os_map(int fd, size_t size) {
    if (TPR_CUDA_OS_HOOKED("mmap")) return NULL;
    void *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? NULL : at;
}

static void tpr_cuda_os_unmap(void *at, size_t size) { if (at) munmap(at, size); }
static void tpr_cuda_os_close(int fd) { if (fd >= 0) close(fd); }

// A descriptor by which a process can be watched, or -1: its number has to do.
static int tpr_cuda_os_process(int32_t pid) {
    if (TPR_CUDA_OS_HOOKED("pidfd_open")) return -1;
    return (int)syscall(SYS_pidfd_open, (pid_t)pid, 0u);
}

static bool tpr_cuda_os_process_lives(int process, int32_t pid) {
    struct pollfd look;
    look.fd = process;
    look.events = POLLIN;
    look.revents = 0;
    if (process < 0) return kill((pid_t)pid, 0) == 0 || errno == EPERM;
    return TPR_CUDA_OS_HOOKED("poll") || poll(&look, 1, 0) == 0;
}

static void tpr_cuda_os_sleep_us(int64_t us) {
    struct timespec ts;
    ts.tv_sec = (time_t)(us / 1000000);
    ts.tv_nsec = (long)(us % 1000000 * 1000);
    nanosleep(&ts, NULL);
}

// >>base --------------------------------------------------------------------------------------------------------------
// Lists, and memory of a context.
//
// Uses: nothing.
// Invariant: a node is in one list at most, and points at itself when it is in none.

enum { TPR_CUDA_BASE_TAG = 'c' | 'u' << 8 | 'd' << 16 | 'a' << 24 };

typedef struct tpr_cuda_base_list { struct tpr_cuda_base_list *next, *prev; } tpr_cuda_base_list;

static void tpr_cuda_base_list_init(tpr_cuda_base_list *head) { head->next = head->prev = head; }
static bool tpr_cuda_base_list_empty(const tpr_cuda_base_list *head) { return head->next == head; }

static void tpr_cuda_base_list_add(tpr_cuda_base_list *head, tpr_cuda_base_list *node) {   // at the end
    node->next = head;
    node->prev = head->prev;
    head->prev->next = node;
    head->prev = node;
}

static void tpr_cuda_base_list_remove(tpr_cuda_base_list *node) {
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node->next = node->prev = node;
}

// Zeroed memory, or NULL.
static void *tpr_cuda_base_alloc(tprpc_context *ctx, size_t size) {
    void *memory = tprpc_alloc(ctx, size, 16, (uint32_t)TPR_CUDA_BASE_TAG);
    if (memory) memset(memory, 0, size);
    return memory;
}

static void tpr_cuda_base_free(tprpc_context *ctx, void *memory, size_t size) {
    tprpc_free(ctx, memory, size, (uint32_t)TPR_CUDA_BASE_TAG);
}

// >>driver ------------------------------------------------------------------------------------------------------------
// The CUDA driver, loaded at run time: the few types, constants and entry points that are used, as we declare them.
// Where a cuda.h is found, a test compares them with it.
//
// Uses: os.
// Invariant: an entry point is asked for by the version that it is declared as here, so a newer driver gives the same.

typedef int                tpr_cuda_driver_result;     // CUresult
typedef int                tpr_cuda_driver_device;     // CUdevice
typedef unsigned long long tpr_cuda_driver_ptr;        // CUdeviceptr
typedef struct tpr_cuda_driver_context_t *tpr_cuda_driver_context;
typedef struct tpr_cuda_driver_stream_t  *tpr_cuda_driver_stream;
typedef struct tpr_cuda_driver_event_t   *tpr_cuda_driver_event;
typedef struct tpr_cuda_driver_pool_t    *tpr_cuda_driver_pool;
typedef struct tpr_cuda_driver_module_t  *tpr_cuda_driver_module;
typedef struct tpr_cuda_driver_function_t *tpr_cuda_driver_function;
typedef int tpr_cuda_driver_device_attribute, tpr_cuda_driver_pointer_attribute, tpr_cuda_driver_pool_attribute;
typedef int tpr_cuda_driver_capture_status, tpr_cuda_driver_capture_mode, tpr_cuda_driver_proc_status;
typedef struct tpr_cuda_driver_uuid { char bytes[16]; } tpr_cuda_driver_uuid;
typedef struct tpr_cuda_driver_ipc { char reserved[64]; } tpr_cuda_driver_ipc;
typedef struct tpr_cuda_driver_location { int type, id; } tpr_cuda_driver_location;
typedef struct tpr_cuda_driver_access { tpr_cuda_driver_location location; int flags; } tpr_cuda_driver_access;
typedef struct tpr_cuda_driver_pool_props {
    int allocType, handleTypes;
    tpr_cuda_driver_location location;
    void *win32SecurityAttributes;
    size_t maxSize;
    unsigned short usage;
    unsigned char reserved[54];
} tpr_cuda_driver_pool_props;
typedef void (*tpr_cuda_driver_host_fn)(void *user);

enum {                               // named as cuda.h names them, without CU_ or CUDA_
    TPR_CUDA_DRIVER_SUCCESS = 0,
    TPR_CUDA_DRIVER_ERROR_OUT_OF_MEMORY = 2,
    TPR_CUDA_DRIVER_ERROR_NOT_INITIALIZED = 3,
    TPR_CUDA_DRIVER_ERROR_NO_DEVICE = 100,
    TPR_CUDA_DRIVER_ERROR_INVALID_VALUE = 1,
    TPR_CUDA_DRIVER_ERROR_NOT_READY = 600,
    TPR_CUDA_DRIVER_ERROR_PEER_ACCESS_ALREADY_ENABLED = 704,
    TPR_CUDA_DRIVER_ERROR_NOT_SUPPORTED = 801,
    TPR_CUDA_DRIVER_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    TPR_CUDA_DRIVER_GET_PROC_ADDRESS_LEGACY_STREAM = 1,
    TPR_CUDA_DRIVER_STREAM_NON_BLOCKING = 1,
    TPR_CUDA_DRIVER_EVENT_DISABLE_TIMING = 2,
    TPR_CUDA_DRIVER_STREAM_CAPTURE_STATUS_NONE = 0,
    TPR_CUDA_DRIVER_STREAM_CAPTURE_MODE_RELAXED = 2,
    TPR_CUDA_DRIVER_STREAM_WAIT_VALUE_GEQ = 0,
    TPR_CUDA_DRIVER_STREAM_WRITE_VALUE_DEFAULT = 0,
    TPR_CUDA_DRIVER_IPC_MEM_LAZY_ENABLE_PEER_ACCESS = 1,
    TPR_CUDA_DRIVER_MEMHOSTREGISTER_PORTABLE = 1,
    TPR_CUDA_DRIVER_MEMHOSTREGISTER_DEVICEMAP = 2,
    TPR_CUDA_DRIVER_MEMORYTYPE_HOST = 1,
    TPR_CUDA_DRIVER_MEMORYTYPE_DEVICE = 2,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_MEMORY_TYPE = 2,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_DEVICE_ORDINAL = 9,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE = 10,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_RANGE_START_ADDR = 11,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_RANGE_SIZE = 12,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_ACCESS_FLAGS = 16,
    TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE = 3,
    TPR_CUDA_DRIVER_MEMPOOL_ATTR_RELEASE_THRESHOLD = 4,
    TPR_CUDA_DRIVER_MEM_ALLOCATION_TYPE_PINNED = 1,
    TPR_CUDA_DRIVER_MEM_HANDLE_TYPE_NONE = 0,
    TPR_CUDA_DRIVER_MEM_LOCATION_TYPE_DEVICE = 1,
    TPR_CUDA_DRIVER_MEM_ACCESS_FLAGS_PROT_READWRITE = 3,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_PCI_BUS_ID = 33,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_PCI_DEVICE_ID = 34,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING = 41,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID = 50,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76,
    TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED = 115,
    TPR_CUDA_DRIVER_LEAST_VERSION = 12000
};

// The entry points: name, version, parameters.
#define TPR_CUDA_DRIVER_ENTRIES(F) \
    F(cuInit, 2000, (unsigned int flags)) \
    F(cuDriverGetVersion, 2020, (int *version)) \
    F(cuGetErrorName, 6000, (tpr_cuda_driver_result code, const char **name)) \
    F(cuGetErrorString, 6000, (tpr_cuda_driver_result code, const char **text)) \
    F(cuDeviceGetCount, 2000, (int *count)) \
    F(cuDeviceGet, 2000, (tpr_cuda_driver_device *device, int ordinal)) \
    F(cuDeviceGetName, 2000, (char *name, int size, tpr_cuda_driver_device device)) \
    F(cuDeviceGetUuid, 11040, (tpr_cuda_driver_uuid *uuid, tpr_cuda_driver_device device)) \
    F(cuDeviceTotalMem, 3020, (size_t *bytes, tpr_cuda_driver_device device)) \
    F(cuDeviceGetAttribute, 2000, \
      (int *value, tpr_cuda_driver_device_attribute attribute, tpr_cuda_driver_device device)) \
    F(cuDeviceCanAccessPeer, 4000, (int *can, tpr_cuda_driver_device device, tpr_cuda_driver_device peer)) \
    F(cuDevicePrimaryCtxRetain, 7000, (tpr_cuda_driver_context *context, tpr_cuda_driver_device device)) \
    F(cuDevicePrimaryCtxRelease, 11000, (tpr_cuda_driver_device device)) \
    F(cuCtxPushCurrent, 4000, (tpr_cuda_driver_context context)) \
    F(cuCtxPopCurrent, 4000, (tpr_cuda_driver_context *context)) \
    F(cuCtxEnablePeerAccess, 4000, (tpr_cuda_driver_context peer, unsigned int flags)) \
    F(cuThreadExchangeStreamCaptureMode, 10010, (tpr_cuda_driver_capture_mode *mode)) \
    F(cuStreamCreate, 2000, (tpr_cuda_driver_stream *stream, unsigned int flags)) \
    F(cuStreamDestroy, 4000, (tpr_cuda_driver_stream stream)) \
    F(cuStreamQuery, 2000, (tpr_cuda_driver_stream stream)) \
    F(cuStreamWaitEvent, 3020, (tpr_cuda_driver_stream stream, tpr_cuda_driver_event event, unsigned int flags)) \
    F(cuStreamIsCapturing, 10000, (tpr_cuda_driver_stream stream, tpr_cuda_driver_capture_status *status)) \
    F(cuStreamGetCtx, 9020, (tpr_cuda_driver_stream stream, tpr_cuda_driver_context *context)) \
    F(cuEventCreate, 2000, (tpr_cuda_driver_event *event, unsigned int flags)) \
    F(cuEventDestroy, 4000, (tpr_cuda_driver_event event)) \
    F(cuEventRecord, 2000, (tpr_cuda_driver_event event, tpr_cuda_driver_stream stream)) \
    F(cuEventQuery, 2000, (tpr_cuda_driver_event event)) \
    F(cuLaunchHostFunc, 10000, (tpr_cuda_driver_stream stream, tpr_cuda_driver_host_fn run, void *user)) \
    F(cuMemcpyAsync, 4000, \
      (tpr_cuda_driver_ptr to, tpr_cuda_driver_ptr from, size_t size, tpr_cuda_driver_stream stream)) \
    F(cuMemcpyPeerAsync, 4000, (tpr_cuda_driver_ptr to, tpr_cuda_driver_context to_context, tpr_cuda_driver_ptr from, \
                                tpr_cuda_driver_context from_context, size_t size, tpr_cuda_driver_stream stream)) \
    F(cuMemHostRegister, 6050, (void *at, size_t size, unsigned int flags)) \
    F(cuMemHostUnregister, 4000, (void *at)) \
    F(cuPointerGetAttributes, 7000, (unsigned int count, tpr_cuda_driver_pointer_attribute *attributes, void **data, \
                                     tpr_cuda_driver_ptr at)) \
    F(cuMemPoolCreate, 11020, (tpr_cuda_driver_pool *pool, const tpr_cuda_driver_pool_props *props)) \
    F(cuMemPoolDestroy, 11020, (tpr_cuda_driver_pool pool)) \
    F(cuMemPoolSetAttribute, 11020, \
      (tpr_cuda_driver_pool pool, tpr_cuda_driver_pool_attribute attribute, void *value)) \
    F(cuMemPoolSetAccess, 11020, (tpr_cuda_driver_pool pool, const tpr_cuda_driver_access *access, size_t count)) \
    F(cuMemPoolTrimTo, 11020, (tpr_cuda_driver_pool pool, size_t keep)) \
    F(cuMemAllocFromPoolAsync, 11020, \
      (tpr_cuda_driver_ptr *at, size_t size, tpr_cuda_driver_pool pool, tpr_cuda_driver_stream stream)) \
    F(cuMemFreeAsync, 11020, (tpr_cuda_driver_ptr at, tpr_cuda_driver_stream stream)) \
    F(cuModuleLoadData, 2000, (tpr_cuda_driver_module *module, const void *image)) \
    F(cuModuleUnload, 2000, (tpr_cuda_driver_module module)) \
    F(cuModuleGetFunction, 2000, \
      (tpr_cuda_driver_function *function, tpr_cuda_driver_module module, const char *name)) \
    F(cuLaunchKernel, 4000, \
      (tpr_cuda_driver_function function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, \
       unsigned int block_x, unsigned int block_y, unsigned int block_z, unsigned int shared, \
       tpr_cuda_driver_stream stream, void **parameters, void **extra)) \
    F(cuMemAlloc, 3020, (tpr_cuda_driver_ptr *at, size_t size)) \
    F(cuMemFree, 3020, (tpr_cuda_driver_ptr at)) \
    F(cuMemHostGetDevicePointer, 3020, (tpr_cuda_driver_ptr *at, void *host, unsigned int flags)) \
    F(cuIpcGetMemHandle, 4010, (tpr_cuda_driver_ipc *handle, tpr_cuda_driver_ptr at)) \
    F(cuIpcOpenMemHandle, 11000, (tpr_cuda_driver_ptr *at, tpr_cuda_driver_ipc handle, unsigned int flags)) \
    F(cuIpcCloseMemHandle, 4010, (tpr_cuda_driver_ptr at)) \
    F(cuStreamWaitValue64, 11070, \
      (tpr_cuda_driver_stream stream, tpr_cuda_driver_ptr at, uint64_t value, unsigned int flags)) \
    F(cuStreamWriteValue64, 11070, \
      (tpr_cuda_driver_stream stream, tpr_cuda_driver_ptr at, uint64_t value, unsigned int flags))

#define TPR_CUDA_DRIVER_FIELD(name, version, parameters) tpr_cuda_driver_result (*name) parameters;
typedef struct tpr_cuda_driver { TPR_CUDA_DRIVER_ENTRIES(TPR_CUDA_DRIVER_FIELD) } tpr_cuda_driver;
#undef TPR_CUDA_DRIVER_FIELD

// The driver of this process, loaded once and kept. A child of a fork has one of its own, or none: CUDA is no good
// there once its parent has used it.
static struct { tpr_cuda_os_lock lock; tpr_cuda_driver driver; int pid; } tpr_cuda_driver_loaded =
    {TPR_CUDA_OS_UNLOCKED, TPR_CUDA_ZERO, 0};

static const char *tpr_cuda_driver_name(const tpr_cuda_driver *cu, tpr_cuda_driver_result code) {
    const char *name = NULL;
    return cu->cuGetErrorName(code, &name) == 0 && name ? name : "an error that the driver does not know";
}

// What a failed call means, with the driver's name for it. Returns the status.
static tprpc_status tpr_cuda_driver_fail(const tpr_cuda_driver *cu, tpr_cuda_driver_result code, const char *call,
                                         tprpc_error *error) {
    const char *name = tpr_cuda_driver_name(cu, code), *text = NULL;
    if (cu->cuGetErrorString(code, &text) != 0 || !text) text = "no more is known";
    return tprpc_error_set(error, (int)code == TPR_CUDA_DRIVER_ERROR_OUT_OF_MEMORY ? TPRPC_ERROR_MEMORY
                                                                                  : TPRPC_ERROR_DEVICE,
                           (int32_t)code, "cuda: %s: %s (%d), %s", call, name, (int)code, text);
}

static tprpc_status tpr_cuda_driver_check(const tpr_cuda_driver *cu, tpr_cuda_driver_result code, const char *call,
                                          tprpc_error *error) {
    return (int)code == TPR_CUDA_DRIVER_SUCCESS ? TPRPC_OK : tpr_cuda_driver_fail(cu, code, call, error);
}
#define TPR_CUDA_DRIVER_CALL(cu, name, arguments, error) tpr_cuda_driver_check(cu, (cu)->name arguments, #name, error)

typedef struct tpr_cuda_driver_entry { const char *name; int version; size_t offset; } tpr_cuda_driver_entry;

// Fills the table, asking for each entry point by its version.
static tprpc_status tpr_cuda_driver_find(void *library, tpr_cuda_driver *out, tprpc_error *error) {
#define TPR_CUDA_DRIVER_ENTRY(name, version, parameters) {#name, version, offsetof(tpr_cuda_driver, name)},
    static const tpr_cuda_driver_entry entries[] = {TPR_CUDA_DRIVER_ENTRIES(TPR_CUDA_DRIVER_ENTRY)};
#undef TPR_CUDA_DRIVER_ENTRY
    tpr_cuda_driver_result (*find)(const char *, void **, int, uint64_t, tpr_cuda_driver_proc_status *) = NULL;
    void *address = tpr_cuda_os_symbol(library, "cuGetProcAddress_v2");
    if (!address)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "cuda: the driver is older than CUDA %d.0, which is needed: update it",
                               TPR_CUDA_DRIVER_LEAST_VERSION / 1000);
    memcpy(&find, &address, sizeof find);
    for (size_t i = 0; i < TPR_CUDA_COUNT(entries); i++) {
        tpr_cuda_driver_proc_status status;
        address = NULL;
        if ((int)find(entries[i].name, &address, entries[i].version,
                      (uint64_t)TPR_CUDA_DRIVER_GET_PROC_ADDRESS_LEGACY_STREAM, &status) != 0 || !address)
            return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cuda: the driver has no %s of CUDA %d.%d",
                                   entries[i].name, entries[i].version / 1000, entries[i].version % 1000 / 10);
        memcpy((char *)out + entries[i].offset, &address, sizeof address);
    }
    return TPRPC_OK;
}

static tprpc_status tpr_cuda_driver_begin(const tpr_cuda_driver *cu, tprpc_error *error) {
    int version = 0, count = 0;
    const tpr_cuda_driver_result code = cu->cuInit(0);
    if ((int)code == TPR_CUDA_DRIVER_ERROR_NO_DEVICE)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, (int32_t)code, "cuda: there is no CUDA device");
    if ((int)code == TPR_CUDA_DRIVER_ERROR_NOT_INITIALIZED)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, (int32_t)code,
                               "cuda: this process was forked from one that used CUDA, and can not");
    tprpc_status status = tpr_cuda_driver_check(cu, code, "cuInit", error);
    if (status == TPRPC_OK) status = TPR_CUDA_DRIVER_CALL(cu, cuDriverGetVersion, (&version), error);
    if (status == TPRPC_OK && version < TPR_CUDA_DRIVER_LEAST_VERSION)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, version,
                               "cuda: the driver is for CUDA %d.%d; %d.0 or later is needed", version / 1000,
                               version % 1000 / 10, TPR_CUDA_DRIVER_LEAST_VERSION / 1000);
    if (status == TPRPC_OK) status = TPR_CUDA_DRIVER_CALL(cu, cuDeviceGetCount, (&count), error);
    if (status == TPRPC_OK && count < 1)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cuda: there is no CUDA device");
    return status;
}

// The driver, or NULL and why there is none of use: UNSUPPORTED, or DEVICE where it fails.
static const tpr_cuda_driver *tpr_cuda_driver_get(tprpc_error *error) {
    char why[160];
    tpr_cuda_driver driver;
    tprpc_status status = TPRPC_OK;
    tpr_cuda_os_lock_take(&tpr_cuda_driver_loaded.lock);
    if (tpr_cuda_driver_loaded.pid != tpr_cuda_os_pid()) {
        void *library = tpr_cuda_os_library("libcuda.so.1", why, sizeof why);
        if (!library)
            status = tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cuda: there is no driver: %s", why);
        if (status == TPRPC_OK) status = tpr_cuda_driver_find(library, &driver, error);
        if (status == TPRPC_OK) status = tpr_cuda_driver_begin(&driver, error);
        if (status == TPRPC_OK) {
            tpr_cuda_driver_loaded.driver = driver;
            tpr_cuda_driver_loaded.pid = tpr_cuda_os_pid();
        } else {
            tpr_cuda_os_library_close(library);
        }
    }
    tpr_cuda_os_lock_give(&tpr_cuda_driver_loaded.lock);
    return status == TPRPC_OK ? &tpr_cuda_driver_loaded.driver : NULL;
}

// >>wire --------------------------------------------------------------------------------------------------------------
// Every byte that a peer can send: the channels' control messages. Little endian.
//
// Uses: nothing.
// Invariant: what is decoded has a known kind and no more than the channels ask about; whether it fits what is under
// way they judge.

enum {
    TPR_CUDA_WIRE_CONTROL = 40,        // bytes: u32 kind, u32 0, u64 id, u64 offset, u64 size, u64 place; behind it
    TPR_CUDA_WIRE_EXPORT_MORE = 80,    // of EXPORT: 16 of the device's UUID, 64 of a handle
    TPR_CUDA_WIRE_HANDLE = 64,         // of PROVE
    TPR_CUDA_WIRE_DEVICES = 8,         // a descriptor begins with them: u64, bit i: device i of the sender
    TPR_CUDA_WIRE_DEVICE_MOST = 64,
    TPR_CUDA_WIRE_PART = 48,           // of PARTS, and of a descriptor, each: u64 export, u64 from, u64 at, u64 size,
                                       // u64 seq, u32 slot, u32 flags
    TPR_CUDA_WIRE_PARTS = 84           // at most in one message
};

typedef enum tpr_cuda_wire_kind {
    TPR_CUDA_WIRE_WANT = 1,            // receiver: send these bytes, to that place of my arena or through the pipe
    TPR_CUDA_WIRE_HAVE = 2,            // sender: they are there
    TPR_CUDA_WIRE_DONE = 3,            // receiver: all was fetched
    TPR_CUDA_WIRE_DROP = 4,            // receiver: no more is wanted
    TPR_CUDA_WIRE_CANCEL = 5,          // sender: no more comes, and nothing is written any more
    TPR_CUDA_WIRE_ARENA = 6,           // receiver: my arena, of `size` bytes, with its handle
    TPR_CUDA_WIRE_WORDS = 7,           // sender: my words, of `size` bytes, with their handle
    TPR_CUDA_WIRE_EXPORT = 8,          // sender: `id` stands for `size` bytes of memory of my device `place`
    TPR_CUDA_WIRE_UNEXPORT = 9,        // sender: close it
    TPR_CUDA_WIRE_CLOSED = 10,         // receiver: it is closed
    TPR_CUDA_WIRE_PARTS_OF = 11,       // sender: `size` more parts of a transfer
    TPR_CUDA_WIRE_TOOK = 12,           // receiver: the part at `offset` is being read, and its word will be written;
                                       // at NOWHERE: my devices `size`, bit by bit, are ready for parts
    TPR_CUDA_WIRE_PROVE = 13,          // sender: memory of my device `id` begins with the word `place` and another
    TPR_CUDA_WIRE_PROOF = 14,          // receiver: that is `place`, as my device `offset` reads your device `id`; or it
                                       // cannot, for `size`, an error of the driver's
    TPR_CUDA_WIRE_ASK = 15             // sender: no parts come; say what you want
} tpr_cuda_wire_kind;

enum { TPR_CUDA_WIRE_PART_WAITS = 1, TPR_CUDA_WIRE_PART_LAST = 2 };   // its word is to be waited for; is to be written

typedef struct tpr_cuda_wire_part { uint64_t export_id, from, at, size, seq; uint32_t slot, flags; } tpr_cuda_wire_part;

#define TPR_CUDA_WIRE_NOWHERE UINT64_MAX   // as a place: through the pipe

typedef struct tpr_cuda_wire_message { uint32_t kind; uint64_t id, offset, size, place; } tpr_cuda_wire_message;

static void tpr_cuda_wire_store(uint8_t *out, uint64_t value, size_t size) {
    for (size_t i = 0; i < size; i++) out[i] = (uint8_t)(value >> 8 * i);
}

static uint64_t tpr_cuda_wire_load(const uint8_t *in, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; i++) value |= (uint64_t)in[i] << 8 * i;
    return value;
}

static void tpr_cuda_wire_write(uint8_t *out, const tpr_cuda_wire_message *message) {
    tpr_cuda_wire_store(out, message->kind, 8);
    tpr_cuda_wire_store(out + 8, message->id, 8);
    tpr_cuda_wire_store(out + 16, message->offset, 8);
    tpr_cuda_wire_store(out + 24, message->size, 8);
    tpr_cuda_wire_store(out + 32, message->place, 8);
}

static bool tpr_cuda_wire_has_handle(uint64_t kind) {
    return kind == TPR_CUDA_WIRE_ARENA || kind == TPR_CUDA_WIRE_WORDS;
}

// Decodes a control message that came with `handles` descriptors; what stands behind it is as long as it says. False:
// it is none.
static bool tpr_cuda_wire_read(const uint8_t *in, size_t size, size_t handles, tpr_cuda_wire_message *out) {
    if (size < TPR_CUDA_WIRE_CONTROL) return false;
    const uint64_t kind = tpr_cuda_wire_load(in, 8);
    uint64_t more = 0;
    out->kind = (uint32_t)kind;
    out->id = tpr_cuda_wire_load(in + 8, 8);
    out->offset = tpr_cuda_wire_load(in + 16, 8);
    out->size = tpr_cuda_wire_load(in + 24, 8);
    out->place = tpr_cuda_wire_load(in + 32, 8);
    if (kind < TPR_CUDA_WIRE_WANT || kind > TPR_CUDA_WIRE_ASK) return false;
    if (kind == TPR_CUDA_WIRE_PARTS_OF && (!out->size || out->size > TPR_CUDA_WIRE_PARTS)) return false;
    if (kind == TPR_CUDA_WIRE_PARTS_OF) more = out->size * TPR_CUDA_WIRE_PART;
    if (kind == TPR_CUDA_WIRE_EXPORT) more = TPR_CUDA_WIRE_EXPORT_MORE;
    if (kind == TPR_CUDA_WIRE_PROVE) more = TPR_CUDA_WIRE_HANDLE;
    if ((kind == TPR_CUDA_WIRE_EXPORT && out->place >= TPR_CUDA_WIRE_DEVICE_MOST) ||
        (kind == TPR_CUDA_WIRE_PROVE && out->id >= TPR_CUDA_WIRE_DEVICE_MOST) ||
        (kind == TPR_CUDA_WIRE_PROOF && out->offset >= TPR_CUDA_WIRE_DEVICE_MOST)) return false;
    return size == TPR_CUDA_WIRE_CONTROL + more && handles == (tpr_cuda_wire_has_handle(kind) ? 1u : 0u);
}

static void tpr_cuda_wire_write_part(uint8_t *out, const tpr_cuda_wire_part *part) {
    tpr_cuda_wire_store(out, part->export_id, 8);
    tpr_cuda_wire_store(out + 8, part->from, 8);
    tpr_cuda_wire_store(out + 16, part->at, 8);
    tpr_cuda_wire_store(out + 24, part->size, 8);
    tpr_cuda_wire_store(out + 32, part->seq, 8);
    tpr_cuda_wire_store(out + 40, part->slot, 4);
    tpr_cuda_wire_store(out + 44, part->flags, 4);
}

// A part of a transfer of `total` bytes. False: it is none.
static bool tpr_cuda_wire_read_part(const uint8_t *in, uint64_t total, uint32_t slots, tpr_cuda_wire_part *out) {
    out->export_id = tpr_cuda_wire_load(in, 8);
    out->from = tpr_cuda_wire_load(in + 8, 8);
    out->at = tpr_cuda_wire_load(in + 16, 8);
    out->size = tpr_cuda_wire_load(in + 24, 8);
    out->seq = tpr_cuda_wire_load(in + 32, 8);
    out->slot = (uint32_t)tpr_cuda_wire_load(in + 40, 4);
    out->flags = (uint32_t)tpr_cuda_wire_load(in + 44, 4);
    return out->size && out->at < total && out->size <= total - out->at && out->seq && out->seq < UINT64_MAX / 4 &&
           out->slot < slots && out->flags <= 3;
}

// >>device ------------------------------------------------------------------------------------------------------------
// Devices by number, as a context uses them: their primary contexts, which reach each other, their memory.
//
// Uses: os, base, driver.
// Invariant: a device's primary context is retained when a tensor names the device, not before, and every call for it
// stands between tpr_cuda_device_enter and _leave. A set lives as long as a channel of its tprpc context does.

enum { TPR_CUDA_DEVICE_MOST = 64 };    // as many as a word has bits

typedef struct tpr_cuda_device {
    int32_t index;
    tpr_cuda_driver_device  handle;
    tpr_cuda_driver_context context;   // NULL: not used so far; set once, under the set's lock, atomic
    tpr_cuda_driver_stream  stream;    // of what the library allocates; likewise
    tpr_cuda_driver_pool    pool;      // likewise
    uint64_t peers, asked;             // bit i: it and device i reach each other's memory; that was found out
    struct tpr_cuda_device_block *late;   // to be given back; under the set's lock
    struct tpr_cuda_device_use   *uses;   // likewise
    tpr_cuda_driver_module   module;   // of >>kernels; under the set's lock
    tpr_cuda_driver_function gather;   // likewise; NULL: not so far, or it cannot be loaded
    bool                     loaded;   // it was tried
} tpr_cuda_device;

typedef struct tpr_cuda_device_use {   // a stream that memory is used on, beside its own
    struct tpr_cuda_device_use *next;
    const void *data;
    void       *stream;
} tpr_cuda_device_use;

typedef struct tpr_cuda_device_block { // memory whose stream was being captured when it was given back
    struct tpr_cuda_device_block *next;
    void  *data, *stream;
    size_t size;
} tpr_cuda_device_block;

typedef struct tpr_cuda_device_export {
    struct tpr_cuda_device_export *next;      // of the set
    uint64_t            id, at, size;  // the whole allocation
    uint64_t            from, length;  // what was registered
    tpr_cuda_device    *device;
    tpr_cuda_driver_ipc handle;
    tpr_cuda_driver_uuid uuid;
    uint32_t            users;         // links that were told; under the set's lock
    bool                closing;       // likewise; atomic
} tpr_cuda_device_export;

typedef struct tpr_cuda_device_set {   // of a tprpc context
    tpr_cuda_base_list     node;       // of the process
    tprpc_context         *ctx;
    const tpr_cuda_driver *cu;
    uint32_t               users;      // under the process's lock
    tpr_cuda_os_lock       lock;       // for what is made on first use
    tprpc_cuda_allocator   allocator;  // alloc NULL: the pools
    tpr_cuda_device_export *exports;   // what users registered; under the lock
    uint64_t               export_ids; // given out; likewise
    tpr_cuda_base_list     queues;     // of >>stream, one a loop; under the lock
    int32_t                count;
    tpr_cuda_device        devices[TPR_CUDA_DEVICE_MOST];
} tpr_cuda_device_set;

typedef struct tpr_cuda_device_guard { tpr_cuda_driver_capture_mode mode; } tpr_cuda_device_guard;

// By which converters, which are given the context alone, find its devices.
static struct { tpr_cuda_os_lock lock; tpr_cuda_base_list *sets; } tpr_cuda_device_process =
    {TPR_CUDA_OS_UNLOCKED, NULL};

// Under the process's lock.
static tpr_cuda_device_set *tpr_cuda_device_set_of(const tprpc_context *ctx) {
    for (tpr_cuda_base_list *node = tpr_cuda_device_process.sets; node; node = node->next) {
        tpr_cuda_device_set *set = TPR_CUDA_OF(node, tpr_cuda_device_set, node);
        if (set->ctx == ctx) return set;
    }
    return NULL;
}

static tprpc_status tpr_cuda_device_list(tpr_cuda_device_set *set, tprpc_error *error) {
    int count = 0;
    tprpc_status status = TPR_CUDA_DRIVER_CALL(set->cu, cuDeviceGetCount, (&count), error);
    if (count > TPR_CUDA_DEVICE_MOST) count = TPR_CUDA_DEVICE_MOST;
    for (int i = 0; i < count && status == TPRPC_OK; i++) {
        int unified = 0;
        tpr_cuda_device *device = &set->devices[i];
        device->index = i;
        status = TPR_CUDA_DRIVER_CALL(set->cu, cuDeviceGet, (&device->handle, i), error);
        if (status == TPRPC_OK)
            status = TPR_CUDA_DRIVER_CALL(
                set->cu, cuDeviceGetAttribute,
                (&unified, (tpr_cuda_driver_device_attribute)TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING,
                 device->handle), error);
        if (status == TPRPC_OK && !unified)
            status = tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                                     "cuda: device %d has an address space of its own", i);
    }
    set->count = count;
    return status;
}

static tpr_cuda_device_set *tpr_cuda_device_set_new(tprpc_context *ctx, tprpc_error *error) {
    const tpr_cuda_driver *cu = tpr_cuda_driver_get(error);
    if (!cu) return NULL;
    tpr_cuda_device_set *set = (tpr_cuda_device_set *)tpr_cuda_base_alloc(ctx, sizeof *set);
    if (!set) {
        tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory for the devices");
        return NULL;
    }
    set->ctx = ctx;
    set->cu = cu;
    tpr_cuda_os_lock_init(&set->lock);
    tpr_cuda_base_list_init(&set->queues);
    if (tpr_cuda_device_list(set, error) == TPRPC_OK) return set;
    tpr_cuda_os_lock_free(&set->lock);
    tpr_cuda_base_free(ctx, set, sizeof *set);
    return NULL;
}

// The devices of a context, found or made; each join has its leave. NULL: no driver of use, and why.
static tpr_cuda_device_set *tpr_cuda_device_join(tprpc_context *ctx, tprpc_error *error) {
    tpr_cuda_os_lock_take(&tpr_cuda_device_process.lock);
    tpr_cuda_device_set *set = tpr_cuda_device_set_of(ctx);
    if (!set && (set = tpr_cuda_device_set_new(ctx, error)) != NULL) {
        set->node.prev = NULL;
        set->node.next = tpr_cuda_device_process.sets;
        if (set->node.next) set->node.next->prev = &set->node;
        tpr_cuda_device_process.sets = &set->node;
    }
    if (set) set->users++;
    tpr_cuda_os_lock_give(&tpr_cuda_device_process.lock);
    return set;
}

// The devices of a context that is alive; NULL: no channel of ours is used in it.
static tpr_cuda_device_set *tpr_cuda_device_find(const tprpc_context *ctx, tprpc_error *error) {
    tpr_cuda_os_lock_take(&tpr_cuda_device_process.lock);
    tpr_cuda_device_set *set = tpr_cuda_device_set_of(ctx);
    tpr_cuda_os_lock_give(&tpr_cuda_device_process.lock);
    if (!set) tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cuda: no CUDA channel is used in this context");
    return set;
}

// Makes the device's primary context current and lets this thread's captures be.
static tprpc_status tpr_cuda_device_enter(const tpr_cuda_device_set *set, const tpr_cuda_device *device,
                                          tpr_cuda_device_guard *guard, tprpc_error *error) {
    tpr_cuda_driver_context context = __atomic_load_n(&device->context, __ATOMIC_ACQUIRE);
    const tprpc_status status = TPR_CUDA_DRIVER_CALL(set->cu, cuCtxPushCurrent, (context), error);
    if (status != TPRPC_OK) return status;
    guard->mode = (tpr_cuda_driver_capture_mode)TPR_CUDA_DRIVER_STREAM_CAPTURE_MODE_RELAXED;
    set->cu->cuThreadExchangeStreamCaptureMode(&guard->mode);
    return TPRPC_OK;
}

static void tpr_cuda_device_leave(const tpr_cuda_device_set *set, tpr_cuda_device_guard *guard) {
    tpr_cuda_driver_context context;
    set->cu->cuThreadExchangeStreamCaptureMode(&guard->mode);
    set->cu->cuCtxPopCurrent(&context);
}

// A device that is named, with its context. INVALID: there is none of that number; else what the driver says.
static tprpc_status tpr_cuda_device_of(tpr_cuda_device_set *set, tprpc_device name, tpr_cuda_device **out,
                                       tprpc_error *error) {
    tprpc_status status = TPRPC_OK;
    if (name.kind != TPRPC_CUDA || name.index < 0 || name.index >= set->count)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda: there is no device %d; this process sees %d",
                               (int)name.index, (int)set->count);
    tpr_cuda_device *device = *out = &set->devices[name.index];
    if (__atomic_load_n(&device->context, __ATOMIC_ACQUIRE)) return TPRPC_OK;
    tpr_cuda_os_lock_take(&set->lock);
    if (!device->context) {
        tpr_cuda_driver_context context = NULL;
        status = TPR_CUDA_DRIVER_CALL(set->cu, cuDevicePrimaryCtxRetain, (&context, device->handle), error);
        if (status == TPRPC_OK) __atomic_store_n(&device->context, context, __ATOMIC_RELEASE);
    }
    tpr_cuda_os_lock_give(&set->lock);
    return status;
}

// Whether the device's context is lost: then nothing that was queued on it runs any more.
static bool tpr_cuda_device_lost(const tpr_cuda_device_set *set, const tpr_cuda_device *device) {
    tpr_cuda_device_guard guard;
    if (tpr_cuda_device_enter(set, device, &guard, NULL) != TPRPC_OK) return true;
    const int code = (int)set->cu->cuStreamQuery(NULL);
    tpr_cuda_device_leave(set, &guard);
    return code != TPR_CUDA_DRIVER_SUCCESS && code != TPR_CUDA_DRIVER_ERROR_NOT_READY &&
           code != TPR_CUDA_DRIVER_ERROR_STREAM_CAPTURE_IMPLICIT;
}

// ---- peers

// Lets device `index` at what a pool allocates. A copy between the two works without, slower.
static void tpr_cuda_device_share_pool(const tpr_cuda_device_set *set, tpr_cuda_driver_pool pool, int32_t index) {
    tpr_cuda_driver_access access;
    memset(&access, 0, sizeof access);
    access.location.type = TPR_CUDA_DRIVER_MEM_LOCATION_TYPE_DEVICE;
    access.location.id = index;
    access.flags = TPR_CUDA_DRIVER_MEM_ACCESS_FLAGS_PROT_READWRITE;
    set->cu->cuMemPoolSetAccess(pool, &access, 1);
}

// Lets `device` read and write what `peer` allocates, where the two can; both have contexts. Under the set's lock.
static bool tpr_cuda_device_open_peer(tpr_cuda_device_set *set, tpr_cuda_device *device, tpr_cuda_device *peer) {
    tpr_cuda_device_guard guard;
    int can = 0;
    if (set->cu->cuDeviceCanAccessPeer(&can, device->handle, peer->handle) != 0 || !can) return false;
    if (tpr_cuda_device_enter(set, device, &guard, NULL) != TPRPC_OK) return false;
    const int code = (int)set->cu->cuCtxEnablePeerAccess(peer->context, 0);
    if (peer->pool) tpr_cuda_device_share_pool(set, peer->pool, device->index);
    tpr_cuda_device_leave(set, &guard);
    return code == TPR_CUDA_DRIVER_SUCCESS || code == TPR_CUDA_DRIVER_ERROR_PEER_ACCESS_ALREADY_ENABLED;
}

// Sees to it, once, that copies between two devices go straight where they can. They go through the host where not.
static void tpr_cuda_device_pair(tpr_cuda_device_set *set, tpr_cuda_device *a, tpr_cuda_device *b) {
    const uint64_t bit = UINT64_C(1) << b->index;
    if (a == b || (__atomic_load_n(&a->asked, __ATOMIC_ACQUIRE) & bit)) return;
    tpr_cuda_os_lock_take(&set->lock);
    if (!(a->asked & bit)) {
        const bool there = tpr_cuda_device_open_peer(set, a, b), back = tpr_cuda_device_open_peer(set, b, a);
        if (there && back) {
            a->peers |= bit;
            b->peers |= UINT64_C(1) << a->index;
        }
        __atomic_fetch_or(&b->asked, UINT64_C(1) << a->index, __ATOMIC_RELEASE);
        __atomic_fetch_or(&a->asked, bit, __ATOMIC_RELEASE);
    }
    tpr_cuda_os_lock_give(&set->lock);
}

// Queues a copy; NULL stands for the host. The stream's device is entered.
static tprpc_status tpr_cuda_device_copy(const tpr_cuda_device_set *set, const tpr_cuda_device *to_device, void *to,
                                         const tpr_cuda_device *from_device, const void *from, size_t size,
                                         tpr_cuda_driver_stream stream, tprpc_error *error) {
    const tpr_cuda_driver_ptr target = (tpr_cuda_driver_ptr)(uintptr_t)to;
    const tpr_cuda_driver_ptr source = (tpr_cuda_driver_ptr)(uintptr_t)from;
    if (!to_device || !from_device || to_device == from_device)
        return TPR_CUDA_DRIVER_CALL(set->cu, cuMemcpyAsync, (target, source, size, stream), error);
    return TPR_CUDA_DRIVER_CALL(set->cu, cuMemcpyPeerAsync,
                                (target, to_device->context, source, from_device->context, size, stream), error);
}

// ---- what a user gives: is it what he says?

typedef struct tpr_cuda_device_range { int kind, ordinal; uint64_t start, size; } tpr_cuda_device_range;

// What the driver knows of an address; kind 0: nothing. A device is entered.
static tprpc_status tpr_cuda_device_ask(const tpr_cuda_device_set *set, const void *at, tpr_cuda_device_range *out,
                                        tprpc_error *error) {
    tpr_cuda_driver_pointer_attribute attributes[4] = {
        (tpr_cuda_driver_pointer_attribute)TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_MEMORY_TYPE,
        (tpr_cuda_driver_pointer_attribute)TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_DEVICE_ORDINAL,
        (tpr_cuda_driver_pointer_attribute)TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_RANGE_START_ADDR,
        (tpr_cuda_driver_pointer_attribute)TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_RANGE_SIZE};
    void *data[4];
    memset(out, 0, sizeof *out);
    data[0] = &out->kind;
    data[1] = &out->ordinal;
    data[2] = &out->start;
    data[3] = &out->size;
    return TPR_CUDA_DRIVER_CALL(set->cu, cuPointerGetAttributes,
                                (4, attributes, data, (tpr_cuda_driver_ptr)(uintptr_t)at), error);
}

// Whether kernels of the device that is entered may read and write memory; a copy reaches further. Where the driver
// cannot tell they may not.
static bool tpr_cuda_device_reaches(const tpr_cuda_device_set *set, uint64_t at) {
    tpr_cuda_driver_pointer_attribute attribute =
        (tpr_cuda_driver_pointer_attribute)TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_ACCESS_FLAGS;
    int access = 0;
    void *data = &access;
    return set->cu->cuPointerGetAttributes(1, &attribute, &data, (tpr_cuda_driver_ptr)at) == 0 &&
           access == TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_ACCESS_FLAG_READWRITE;
}

// Whether host memory is pinned, so that a copy to or from it needs no hand of the host's. A device is entered.
static bool tpr_cuda_device_pinned(const tpr_cuda_device_set *set, const void *at, size_t size) {
    tpr_cuda_device_range first, last;
    if (tpr_cuda_device_ask(set, at, &first, NULL) != TPRPC_OK) return false;
    if (tpr_cuda_device_ask(set, (const char *)at + size - 1, &last, NULL) != TPRPC_OK) return false;
    return first.kind == TPR_CUDA_DRIVER_MEMORYTYPE_HOST && last.kind == TPR_CUDA_DRIVER_MEMORYTYPE_HOST &&
           first.start == last.start;
}

// Whether an address is of an allocation that ends where the driver says. Virtual memory goes on in the next piece.
static bool tpr_cuda_device_whole(const tpr_cuda_device_set *set, uint64_t at) {
    tpr_cuda_driver_pointer_attribute attribute =
        (tpr_cuda_driver_pointer_attribute)TPR_CUDA_DRIVER_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE;
    uint64_t whole = 0;                // of which the driver writes the first byte, or four
    void *data = &whole;
    return set->cu->cuPointerGetAttributes(1, &attribute, &data, (tpr_cuda_driver_ptr)at) == 0 && whole;
}

// Whether `size` bytes at `data` are on that device. *known: what was asked before, of which they may be a part.
static tprpc_status tpr_cuda_device_check_memory(const tpr_cuda_device_set *set, const tpr_cuda_device *device,
                                                 const void *data, size_t size, tpr_cuda_device_range *known,
                                                 tprpc_error *error) {
    const uint64_t at = (uintptr_t)data;
    if (!known->size || at < known->start || at - known->start >= known->size) {
        const tprpc_status status = tpr_cuda_device_ask(set, data, known, error);
        if (status != TPRPC_OK) return status;
    }
    if (known->kind != TPR_CUDA_DRIVER_MEMORYTYPE_DEVICE)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda: %p is not device memory of this process, though "
                               "it was said to be on device %d", data, (int)device->index);
    if (known->ordinal != device->index)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda: %p is on device %d, not on device %d", data,
                               known->ordinal, (int)device->index);
    tpr_cuda_device_range last = *known;
    for (uint64_t end = last.start + last.size; last.size && size > end - at; end = last.start + last.size) {
        const tprpc_status status = tpr_cuda_device_ask(set, (const void *)(uintptr_t)end, &last, error);
        if (status != TPRPC_OK) return status;
        if (last.kind != TPR_CUDA_DRIVER_MEMORYTYPE_DEVICE || last.ordinal != device->index || last.start != end ||
            tpr_cuda_device_whole(set, at))
            return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                                   "cuda: %zu bytes at %p go past the end of its allocation", size, data);
    }
    return TPRPC_OK;
}

// Whether a stream is being captured into a graph, so that nothing may be queued on it. Its device is entered.
static bool tpr_cuda_device_captures(const tpr_cuda_device_set *set, tpr_cuda_driver_stream stream) {
    tpr_cuda_driver_capture_status capture = (tpr_cuda_driver_capture_status)TPR_CUDA_DRIVER_STREAM_CAPTURE_STATUS_NONE;
    const int code = (int)set->cu->cuStreamIsCapturing(stream, &capture);
    return code == TPR_CUDA_DRIVER_ERROR_STREAM_CAPTURE_IMPLICIT ||
           (code == 0 && (int)capture != TPR_CUDA_DRIVER_STREAM_CAPTURE_STATUS_NONE);
}

// Whether work can be queued on a stream; its device is entered.
static tprpc_status tpr_cuda_device_check_stream(const tpr_cuda_device_set *set, const tpr_cuda_device *device,
                                                 void *stream, tprpc_error *error) {
    tpr_cuda_driver_context context = NULL;
    tpr_cuda_driver_stream queue = (tpr_cuda_driver_stream)stream;
    if (tpr_cuda_device_captures(set, queue))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "cuda: the stream is being captured into a graph, which a transfer cannot be part of");
    if (!stream) return TPRPC_OK;
    const tprpc_status status = TPR_CUDA_DRIVER_CALL(set->cu, cuStreamGetCtx, (queue, &context), error);
    if (status == TPRPC_OK && context != device->context)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0,
                               "cuda: the stream is not of the primary context of device %d", (int)device->index);
    return status;
}

// Whether a buffer on a device is what it is said to be, and its stream can take work. Creates the device's context.
static tprpc_status tpr_cuda_device_check(tpr_cuda_device_set *set, const tprpc_buffer *buffer, tprpc_error *error) {
    tpr_cuda_device_guard guard;
    tpr_cuda_device *device;
    tpr_cuda_device_range known = TPR_CUDA_ZERO;
    tprpc_status status = tpr_cuda_device_of(set, buffer->device, &device, error);
    if (status == TPRPC_OK) status = tpr_cuda_device_enter(set, device, &guard, error);
    if (status != TPRPC_OK) return status;
    status = tpr_cuda_device_check_memory(set, device, buffer->data, buffer->size, &known, error);
    if (status == TPRPC_OK) status = tpr_cuda_device_check_stream(set, device, buffer->stream, error);
    tpr_cuda_device_leave(set, &guard);
    return status;
}

// ---- memory

// The stream of what the library allocates, made on first use. Under the set's lock, the device entered.
static tprpc_status tpr_cuda_device_need_stream(tpr_cuda_device_set *set, tpr_cuda_device *device, tprpc_error *error) {
    tpr_cuda_driver_stream stream = NULL;
    if (device->stream) return TPRPC_OK;
    const tprpc_status status = TPR_CUDA_DRIVER_CALL(
        set->cu, cuStreamCreate, (&stream, (unsigned int)TPR_CUDA_DRIVER_STREAM_NON_BLOCKING), error);
    if (status == TPRPC_OK) __atomic_store_n(&device->stream, stream, __ATOMIC_RELEASE);
    return status;
}

// Likewise a pool, which keeps what it was given back.
static tprpc_status tpr_cuda_device_need_pool(tpr_cuda_device_set *set, tpr_cuda_device *device, tprpc_error *error) {
    tpr_cuda_driver_pool_props props;
    tpr_cuda_driver_pool pool = NULL;
    uint64_t keep = UINT64_MAX;
    if (device->pool) return TPRPC_OK;
    memset(&props, 0, sizeof props);
    props.allocType = TPR_CUDA_DRIVER_MEM_ALLOCATION_TYPE_PINNED;
    props.handleTypes = TPR_CUDA_DRIVER_MEM_HANDLE_TYPE_NONE;
    props.location.type = TPR_CUDA_DRIVER_MEM_LOCATION_TYPE_DEVICE;
    props.location.id = device->index;
    tprpc_status status = TPR_CUDA_DRIVER_CALL(set->cu, cuMemPoolCreate, (&pool, &props), error);
    if (status != TPRPC_OK) return status;
    status = TPR_CUDA_DRIVER_CALL(
        set->cu, cuMemPoolSetAttribute,
        (pool, (tpr_cuda_driver_pool_attribute)TPR_CUDA_DRIVER_MEMPOOL_ATTR_RELEASE_THRESHOLD, &keep), error);
    for (int32_t i = 0; i < set->count && status == TPRPC_OK; i++)
        if (device->peers & UINT64_C(1) << i) tpr_cuda_device_share_pool(set, pool, i);
    if (status == TPRPC_OK) device->pool = pool;
    else set->cu->cuMemPoolDestroy(pool);
    return status;
}

// Has the stream that memory is given back on come behind all others that it was used on. Under the set's lock, the
// device entered.
static void tpr_cuda_device_end_uses(tpr_cuda_device_set *set, tpr_cuda_device *device,
                                     const tpr_cuda_device_block *block) {
    for (tpr_cuda_device_use **at = &device->uses; *at;) {
        tpr_cuda_device_use *use = *at;
        tpr_cuda_driver_event event = NULL;
        if (use->data != block->data) {
            at = &use->next;
            continue;
        }
        *at = use->next;
        if (!tpr_cuda_device_captures(set, (tpr_cuda_driver_stream)use->stream) &&
            set->cu->cuEventCreate(&event, (unsigned int)TPR_CUDA_DRIVER_EVENT_DISABLE_TIMING) == 0) {
            if (set->cu->cuEventRecord(event, (tpr_cuda_driver_stream)use->stream) == 0)
                set->cu->cuStreamWaitEvent((tpr_cuda_driver_stream)block->stream, event, 0);
            set->cu->cuEventDestroy(event);
        }
        tpr_cuda_base_free(set->ctx, use, sizeof *use);
    }
}

// Gives memory back, unless its stream is being captured. Under the set's lock, the device entered.
static bool tpr_cuda_device_give(tpr_cuda_device_set *set, tpr_cuda_device *device,
                                 const tpr_cuda_device_block *block) {
    tpr_cuda_driver_stream stream = (tpr_cuda_driver_stream)block->stream;
    if (tpr_cuda_device_captures(set, stream)) return false;
    if (device->uses) tpr_cuda_device_end_uses(set, device, block);
    if (set->allocator.free)
        set->allocator.free(device->index, block->data, block->size, block->stream, set->allocator.user);
    else set->cu->cuMemFreeAsync((tpr_cuda_driver_ptr)(uintptr_t)block->data, stream);   // a lost device takes it along
    return true;
}

static void tpr_cuda_device_give_late(tpr_cuda_device_set *set, tpr_cuda_device *device) {
    for (tpr_cuda_device_block **at = &device->late; *at;) {
        tpr_cuda_device_block *block = *at;
        if (!tpr_cuda_device_give(set, device, block)) {
            at = &block->next;
            continue;
        }
        *at = block->next;
        tpr_cuda_base_free(set->ctx, block, sizeof *block);
    }
}

// Memory that is ready in the order of a stream. The device's context is entered here. MEMORY: none is left.
static tprpc_status tpr_cuda_device_alloc(tpr_cuda_device_set *set, tpr_cuda_device *device, size_t size, void *stream,
                                          void **out, tprpc_error *error) {
    tpr_cuda_device_guard guard;
    tpr_cuda_driver_ptr at = 0;
    tprpc_status status = tpr_cuda_device_enter(set, device, &guard, error);
    if (status != TPRPC_OK) return status;
    tpr_cuda_os_lock_take(&set->lock);
    if (device->late) tpr_cuda_device_give_late(set, device);
    if (set->allocator.alloc) {
        *out = set->allocator.alloc(device->index, size, stream, set->allocator.user);
        if (!*out) status = tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0,
                                            "cuda: the allocator has no %zu bytes on device %d", size,
                                            (int)device->index);
    } else {
        status = tpr_cuda_device_need_pool(set, device, error);
        if (status == TPRPC_OK) {
            tpr_cuda_driver_stream queue = (tpr_cuda_driver_stream)stream;
            status = TPR_CUDA_DRIVER_CALL(set->cu, cuMemAllocFromPoolAsync, (&at, size, device->pool, queue), error);
            if (status == TPRPC_ERROR_MEMORY && set->cu->cuMemPoolTrimTo(device->pool, 0) == 0)
                status = TPR_CUDA_DRIVER_CALL(set->cu, cuMemAllocFromPoolAsync, (&at, size, device->pool, queue),
                                              error);
        }
        *out = (void *)(uintptr_t)at;
    }
    tpr_cuda_os_lock_give(&set->lock);
    tpr_cuda_device_leave(set, &guard);
    return status;
}

// Gives it back in the order of a stream.
static void tpr_cuda_device_free(tpr_cuda_device_set *set, tpr_cuda_device *device, void *data, size_t size,
                                 void *stream) {
    tpr_cuda_device_guard guard;
    tpr_cuda_device_block block = TPR_CUDA_ZERO, *late;
    if (tpr_cuda_device_enter(set, device, &guard, NULL) != TPRPC_OK) return;
    block.data = data;
    block.stream = stream;
    block.size = size;
    tpr_cuda_os_lock_take(&set->lock);
    if (device->late) tpr_cuda_device_give_late(set, device);
    if (!tpr_cuda_device_give(set, device, &block)) {
        late = (tpr_cuda_device_block *)tpr_cuda_base_alloc(set->ctx, sizeof *late);
        if (late) {
            *late = block;
            late->next = device->late;
            device->late = late;
        } else {
            tprpc_log_text(set->ctx, TPRPC_LOG_ERROR, "cuda", "no memory to remember device memory: it is lost");
        }
    }
    tpr_cuda_os_lock_give(&set->lock);
    tpr_cuda_device_leave(set, &guard);
}

// The stream of what the library allocates on a device, or NULL.
static tprpc_status tpr_cuda_device_stream(tpr_cuda_device_set *set, tpr_cuda_device *device, void **out,
                                           tprpc_error *error) {
    tpr_cuda_device_guard guard;
    *out = __atomic_load_n(&device->stream, __ATOMIC_ACQUIRE);
    if (*out) return TPRPC_OK;
    tprpc_status status = tpr_cuda_device_enter(set, device, &guard, error);
    if (status != TPRPC_OK) return status;
    tpr_cuda_os_lock_take(&set->lock);
    status = tpr_cuda_device_need_stream(set, device, error);
    *out = device->stream;
    tpr_cuda_os_lock_give(&set->lock);
    tpr_cuda_device_leave(set, &guard);
    return status;
}

// ---- the end of a set

static void tpr_cuda_device_close(tpr_cuda_device_set *set, tpr_cuda_device *device) {
    tpr_cuda_device_guard guard;
    while (device->uses) {             // of memory that was not ours
        tpr_cuda_device_use *use = device->uses;
        device->uses = use->next;
        tpr_cuda_base_free(set->ctx, use, sizeof *use);
    }
    if (!device->context) return;
    if (tpr_cuda_device_enter(set, device, &guard, NULL) == TPRPC_OK) {
        tpr_cuda_device_give_late(set, device);
        if (device->module) set->cu->cuModuleUnload(device->module);
        if (device->pool) set->cu->cuMemPoolDestroy(device->pool);
        if (device->stream) set->cu->cuStreamDestroy(device->stream);
        tpr_cuda_device_leave(set, &guard);
    }
    set->cu->cuDevicePrimaryCtxRelease(device->handle);
}

static void tpr_cuda_device_part(tpr_cuda_device_set *set) {   // the other end of a join
    tpr_cuda_os_lock_take(&tpr_cuda_device_process.lock);
    const bool last = --set->users == 0;
    if (last) {
        if (set->node.prev) set->node.prev->next = set->node.next;
        else tpr_cuda_device_process.sets = set->node.next;
        if (set->node.next) set->node.next->prev = set->node.prev;
    }
    tpr_cuda_os_lock_give(&tpr_cuda_device_process.lock);
    if (!last) return;
    while (set->exports) {
        tpr_cuda_device_export *first = set->exports;
        set->exports = first->next;
        tpr_cuda_base_free(set->ctx, first, sizeof *first);
    }
    for (int32_t i = 0; i < set->count; i++) tpr_cuda_device_close(set, &set->devices[i]);
    tpr_cuda_os_lock_free(&set->lock);
    tpr_cuda_base_free(set->ctx, set, sizeof *set);
}

// ---- what there is

static tprpc_status tpr_cuda_device_describe(const tpr_cuda_driver *cu, int index, int count, tprpc_cuda_device *out,
                                             tprpc_error *error) {
    static const int attributes[] = {TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                                     TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                                     TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID,
                                     TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_PCI_BUS_ID,
                                     TPR_CUDA_DRIVER_DEVICE_ATTRIBUTE_PCI_DEVICE_ID};
    int values[TPR_CUDA_COUNT(attributes)] = TPR_CUDA_ZERO, can;
    tpr_cuda_driver_device device, peer;
    tpr_cuda_driver_uuid uuid;
    size_t bytes = 0;
    memset(out, 0, sizeof *out);
    out->index = index;
    tprpc_status status = TPR_CUDA_DRIVER_CALL(cu, cuDeviceGet, (&device, index), error);
    if (status == TPRPC_OK)
        status = TPR_CUDA_DRIVER_CALL(cu, cuDeviceGetName, (out->name, (int)sizeof out->name, device), error);
    if (status == TPRPC_OK) status = TPR_CUDA_DRIVER_CALL(cu, cuDeviceGetUuid, (&uuid, device), error);
    if (status == TPRPC_OK) status = TPR_CUDA_DRIVER_CALL(cu, cuDeviceTotalMem, (&bytes, device), error);
    for (size_t i = 0; i < TPR_CUDA_COUNT(attributes) && status == TPRPC_OK; i++)
        status = TPR_CUDA_DRIVER_CALL(cu, cuDeviceGetAttribute,
                                      (&values[i], (tpr_cuda_driver_device_attribute)attributes[i], device), error);
    if (status != TPRPC_OK) return status;
    out->major = values[0];
    out->minor = values[1];
    memcpy(out->uuid, &uuid, sizeof out->uuid);
    out->memory_bytes = bytes;
    snprintf(out->pci, sizeof out->pci, "%04x:%02x:%02x.0", (unsigned)values[2] & 0xffff, (unsigned)values[3] & 0xff,
             (unsigned)values[4] & 0xff);
    for (int i = 0; i < count; i++)
        if (i != index && cu->cuDeviceGet(&peer, i) == 0 && cu->cuDeviceCanAccessPeer(&can, device, peer) == 0 && can)
            out->peers |= UINT64_C(1) << i;
    return TPRPC_OK;
}

// ---- public

TPRPC_API size_t tprpc_cuda_get_devices(tprpc_cuda_device *out, size_t capacity, size_t size, tprpc_error *error) {
    int count = 0;
    TPRPC_ASSERT(out || !capacity);
    if ((!out && capacity) || size != sizeof *out) {
        tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_cuda_get_devices: a NULL, or another size");
        return 0;
    }
    const tpr_cuda_driver *cu = tpr_cuda_driver_get(error);
    if (!cu || TPR_CUDA_DRIVER_CALL(cu, cuDeviceGetCount, (&count), error) != TPRPC_OK) return 0;
    if (count > TPR_CUDA_DEVICE_MOST) count = TPR_CUDA_DEVICE_MOST;
    for (int i = 0; i < count && (size_t)i < capacity; i++)
        if (tpr_cuda_device_describe(cu, i, count, &out[i], error) != TPRPC_OK) return 0;
    return (size_t)count;
}

TPRPC_API tprpc_status tprpc_cuda_use(tprpc_context *ctx, const tprpc_tensor *tensor, void *stream,
                                      tprpc_error *error) {
    tprpc_buffer buffer = TPR_CUDA_ZERO;
    TPRPC_ASSERT(ctx && tensor && tensor->device.kind == TPRPC_CUDA && tensor->data);
    if (!ctx || !tensor || tensor->device.kind != TPRPC_CUDA || !tensor->data)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "tprpc_cuda_use: no tensor on a GPU");
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, error);
    if (!set) return TPRPC_ERROR_UNSUPPORTED;
    buffer.data = tensor->data;
    buffer.size = tensor->size;
    buffer.device = tensor->device;
    buffer.stream = stream;
    const tprpc_status status = tpr_cuda_device_check(set, &buffer, error);
    if (status != TPRPC_OK || stream == tensor->stream) return status;
    tpr_cuda_device_use *use = (tpr_cuda_device_use *)tpr_cuda_base_alloc(ctx, sizeof *use);
    if (!use) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory to remember a stream");
    use->data = tensor->data;
    use->stream = stream;
    tpr_cuda_os_lock_take(&set->lock);
    use->next = set->devices[tensor->device.index].uses;
    set->devices[tensor->device.index].uses = use;
    tpr_cuda_os_lock_give(&set->lock);
    return TPRPC_OK;
}

TPRPC_API tprpc_status tprpc_cuda_set_allocator(tprpc_context *ctx, const tprpc_cuda_allocator *allocator,
                                                tprpc_error *error) {
    TPRPC_ASSERT(ctx && allocator && allocator->alloc && allocator->free);
    if (!ctx || !allocator || !allocator->alloc || !allocator->free)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "an allocator has both alloc and free");
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, error);
    if (!set) return TPRPC_ERROR_UNSUPPORTED;
    tpr_cuda_os_lock_take(&set->lock);
    set->allocator = *allocator;
    tpr_cuda_os_lock_give(&set->lock);
    return TPRPC_OK;
}

// >>kernels -----------------------------------------------------------------------------------------------------------
// Kernels that the host launches: PTX as bytes, loaded for a device when it first has use for one. Where that fails the
// slower way is taken.
//
// Uses: os, driver, device.
// Invariant: a kernel is given only memory that its device can reach.

enum {
    TPR_CUDA_KERNELS_SMALL = 64 << 10, // bytes of a copy that is better made with others by a kernel,
    TPR_CUDA_KERNELS_MANY = 8,         // where there are so many
    TPR_CUDA_KERNELS_GRID = 2048, TPR_CUDA_KERNELS_BLOCK = 256
};

typedef struct tpr_cuda_kernels_entry { uint64_t from, to, size; } tpr_cuda_kernels_entry;   // of gather's table

// Made of tools/gather.cu by tools/ptx.py, which also compares it. SHA-256 of tools/gather.cu:
// bed994f78b7fc379f7d7af58caac75a36aa78566469e3c2e3230cf07f894f7ec
static const unsigned char tpr_cuda_kernels_ptx[] = {
    46, 118, 101, 114, 115, 105, 111, 110, 32, 54, 46, 51, 10, 46, 116, 97, 114, 103, 101, 116, 32, 115, 109, 95, 55,
    53, 10, 46, 97, 100, 100, 114, 101, 115, 115, 95, 115, 105, 122, 101, 32, 54, 52, 10, 46, 118, 105, 115, 105, 98,
    108, 101, 32, 46, 101, 110, 116, 114, 121, 32, 116, 112, 114, 112, 99, 95, 103, 97, 116, 104, 101, 114, 40, 10, 46,
    112, 97, 114, 97, 109, 32, 46, 117, 54, 52, 32, 116, 112, 114, 112, 99, 95, 103, 97, 116, 104, 101, 114, 95, 112,
    97, 114, 97, 109, 95, 48, 44, 10, 46, 112, 97, 114, 97, 109, 32, 46, 117, 51, 50, 32, 116, 112, 114, 112, 99, 95,
    103, 97, 116, 104, 101, 114, 95, 112, 97, 114, 97, 109, 95, 49, 10, 41, 10, 123, 10, 46, 114, 101, 103, 32, 46, 112,
    114, 101, 100, 32, 9, 37, 112, 60, 56, 62, 59, 10, 46, 114, 101, 103, 32, 46, 98, 49, 54, 32, 9, 37, 114, 115, 60,
    50, 62, 59, 10, 46, 114, 101, 103, 32, 46, 98, 51, 50, 32, 9, 37, 114, 60, 49, 55, 62, 59, 10, 46, 114, 101, 103,
    32, 46, 98, 54, 52, 32, 9, 37, 114, 100, 60, 50, 57, 62, 59, 10, 108, 100, 46, 112, 97, 114, 97, 109, 46, 117, 54,
    52, 32, 9, 37, 114, 100, 49, 53, 44, 32, 91, 116, 112, 114, 112, 99, 95, 103, 97, 116, 104, 101, 114, 95, 112, 97,
    114, 97, 109, 95, 48, 93, 59, 10, 108, 100, 46, 112, 97, 114, 97, 109, 46, 117, 51, 50, 32, 9, 37, 114, 53, 44, 32,
    91, 116, 112, 114, 112, 99, 95, 103, 97, 116, 104, 101, 114, 95, 112, 97, 114, 97, 109, 95, 49, 93, 59, 10, 109,
    111, 118, 46, 117, 51, 50, 32, 9, 37, 114, 49, 54, 44, 32, 37, 99, 116, 97, 105, 100, 46, 120, 59, 10, 115, 101,
    116, 112, 46, 103, 101, 46, 117, 51, 50, 32, 9, 37, 112, 49, 44, 32, 37, 114, 49, 54, 44, 32, 37, 114, 53, 59, 10,
    64, 37, 112, 49, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95, 66, 66, 48, 95, 49, 48, 59, 10, 109, 111, 118, 46, 117, 51,
    50, 32, 9, 37, 114, 54, 44, 32, 37, 116, 105, 100, 46, 120, 59, 10, 99, 118, 116, 46, 117, 54, 52, 46, 117, 51, 50,
    32, 9, 37, 114, 100, 49, 44, 32, 37, 114, 54, 59, 10, 109, 111, 118, 46, 117, 51, 50, 32, 9, 37, 114, 55, 44, 32,
    37, 110, 116, 105, 100, 46, 120, 59, 10, 99, 118, 116, 46, 117, 54, 52, 46, 117, 51, 50, 32, 9, 37, 114, 100, 50,
    44, 32, 37, 114, 55, 59, 10, 109, 111, 118, 46, 117, 51, 50, 32, 9, 37, 114, 50, 44, 32, 37, 110, 99, 116, 97, 105,
    100, 46, 120, 59, 10, 99, 118, 116, 97, 46, 116, 111, 46, 103, 108, 111, 98, 97, 108, 46, 117, 54, 52, 32, 9, 37,
    114, 100, 51, 44, 32, 37, 114, 100, 49, 53, 59, 10, 36, 76, 95, 95, 66, 66, 48, 95, 50, 58, 10, 109, 117, 108, 46,
    119, 105, 100, 101, 46, 117, 51, 50, 32, 9, 37, 114, 100, 49, 55, 44, 32, 37, 114, 49, 54, 44, 32, 50, 52, 59, 10,
    97, 100, 100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 49, 56, 44, 32, 37, 114, 100, 51, 44, 32, 37, 114, 100, 49, 55,
    59, 10, 108, 100, 46, 103, 108, 111, 98, 97, 108, 46, 117, 54, 52, 32, 9, 37, 114, 100, 52, 44, 32, 91, 37, 114,
    100, 49, 56, 43, 49, 54, 93, 59, 10, 109, 111, 118, 46, 117, 54, 52, 32, 9, 37, 114, 100, 50, 55, 44, 32, 48, 59,
    10, 108, 100, 46, 103, 108, 111, 98, 97, 108, 46, 117, 54, 52, 32, 9, 37, 114, 100, 53, 44, 32, 91, 37, 114, 100,
    49, 56, 93, 59, 10, 108, 100, 46, 103, 108, 111, 98, 97, 108, 46, 117, 54, 52, 32, 9, 37, 114, 100, 54, 44, 32, 91,
    37, 114, 100, 49, 56, 43, 56, 93, 59, 10, 111, 114, 46, 98, 54, 52, 32, 32, 9, 37, 114, 100, 49, 57, 44, 32, 37,
    114, 100, 53, 44, 32, 37, 114, 100, 54, 59, 10, 97, 110, 100, 46, 98, 54, 52, 32, 32, 9, 37, 114, 100, 50, 48, 44,
    32, 37, 114, 100, 49, 57, 44, 32, 49, 53, 59, 10, 115, 101, 116, 112, 46, 110, 101, 46, 115, 54, 52, 32, 9, 37, 112,
    50, 44, 32, 37, 114, 100, 50, 48, 44, 32, 48, 59, 10, 64, 37, 112, 50, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95, 66,
    66, 48, 95, 55, 59, 10, 115, 104, 114, 46, 117, 54, 52, 32, 9, 37, 114, 100, 55, 44, 32, 37, 114, 100, 52, 44, 32,
    52, 59, 10, 115, 101, 116, 112, 46, 108, 101, 46, 117, 54, 52, 32, 9, 37, 112, 51, 44, 32, 37, 114, 100, 55, 44, 32,
    37, 114, 100, 49, 59, 10, 64, 37, 112, 51, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95, 66, 66, 48, 95, 54, 59, 10, 109,
    111, 118, 46, 117, 54, 52, 32, 9, 37, 114, 100, 50, 54, 44, 32, 37, 114, 100, 49, 59, 10, 36, 76, 95, 95, 66, 66,
    48, 95, 53, 58, 10, 46, 112, 114, 97, 103, 109, 97, 32, 34, 110, 111, 117, 110, 114, 111, 108, 108, 34, 59, 10, 115,
    104, 108, 46, 98, 54, 52, 32, 9, 37, 114, 100, 50, 49, 44, 32, 37, 114, 100, 50, 54, 44, 32, 52, 59, 10, 97, 100,
    100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 50, 44, 32, 37, 114, 100, 54, 44, 32, 37, 114, 100, 50, 49, 59, 10,
    97, 100, 100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 51, 44, 32, 37, 114, 100, 53, 44, 32, 37, 114, 100, 50, 49,
    59, 10, 108, 100, 46, 118, 52, 46, 117, 51, 50, 32, 9, 123, 37, 114, 56, 44, 32, 37, 114, 57, 44, 32, 37, 114, 49,
    48, 44, 32, 37, 114, 49, 49, 125, 44, 32, 91, 37, 114, 100, 50, 51, 93, 59, 10, 115, 116, 46, 118, 52, 46, 117, 51,
    50, 32, 9, 91, 37, 114, 100, 50, 50, 93, 44, 32, 123, 37, 114, 56, 44, 32, 37, 114, 57, 44, 32, 37, 114, 49, 48, 44,
    32, 37, 114, 49, 49, 125, 59, 10, 97, 100, 100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 54, 44, 32, 37, 114, 100,
    50, 54, 44, 32, 37, 114, 100, 50, 59, 10, 115, 101, 116, 112, 46, 108, 116, 46, 117, 54, 52, 32, 9, 37, 112, 52, 44,
    32, 37, 114, 100, 50, 54, 44, 32, 37, 114, 100, 55, 59, 10, 64, 37, 112, 52, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95,
    66, 66, 48, 95, 53, 59, 10, 36, 76, 95, 95, 66, 66, 48, 95, 54, 58, 10, 97, 110, 100, 46, 98, 54, 52, 32, 32, 9, 37,
    114, 100, 50, 55, 44, 32, 37, 114, 100, 52, 44, 32, 45, 49, 54, 59, 10, 36, 76, 95, 95, 66, 66, 48, 95, 55, 58, 10,
    97, 100, 100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 56, 44, 32, 37, 114, 100, 50, 55, 44, 32, 37, 114, 100, 49,
    59, 10, 115, 101, 116, 112, 46, 103, 101, 46, 117, 54, 52, 32, 9, 37, 112, 53, 44, 32, 37, 114, 100, 50, 56, 44, 32,
    37, 114, 100, 52, 59, 10, 64, 37, 112, 53, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95, 66, 66, 48, 95, 57, 59, 10, 36,
    76, 95, 95, 66, 66, 48, 95, 56, 58, 10, 46, 112, 114, 97, 103, 109, 97, 32, 34, 110, 111, 117, 110, 114, 111, 108,
    108, 34, 59, 10, 97, 100, 100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 52, 44, 32, 37, 114, 100, 53, 44, 32, 37,
    114, 100, 50, 56, 59, 10, 108, 100, 46, 117, 56, 32, 9, 37, 114, 115, 49, 44, 32, 91, 37, 114, 100, 50, 52, 93, 59,
    10, 97, 100, 100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 53, 44, 32, 37, 114, 100, 54, 44, 32, 37, 114, 100, 50,
    56, 59, 10, 115, 116, 46, 117, 56, 32, 9, 91, 37, 114, 100, 50, 53, 93, 44, 32, 37, 114, 115, 49, 59, 10, 97, 100,
    100, 46, 115, 54, 52, 32, 9, 37, 114, 100, 50, 56, 44, 32, 37, 114, 100, 50, 56, 44, 32, 37, 114, 100, 50, 59, 10,
    115, 101, 116, 112, 46, 108, 116, 46, 117, 54, 52, 32, 9, 37, 112, 54, 44, 32, 37, 114, 100, 50, 56, 44, 32, 37,
    114, 100, 52, 59, 10, 64, 37, 112, 54, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95, 66, 66, 48, 95, 56, 59, 10, 36, 76,
    95, 95, 66, 66, 48, 95, 57, 58, 10, 97, 100, 100, 46, 115, 51, 50, 32, 9, 37, 114, 49, 54, 44, 32, 37, 114, 49, 54,
    44, 32, 37, 114, 50, 59, 10, 115, 101, 116, 112, 46, 108, 116, 46, 117, 51, 50, 32, 9, 37, 112, 55, 44, 32, 37, 114,
    49, 54, 44, 32, 37, 114, 53, 59, 10, 64, 37, 112, 55, 32, 98, 114, 97, 32, 9, 36, 76, 95, 95, 66, 66, 48, 95, 50,
    59, 10, 36, 76, 95, 95, 66, 66, 48, 95, 49, 48, 58, 10, 114, 101, 116, 59, 10, 125, 10, 0,
};

// The kernel of a device that copies many small pieces, or NULL. The device is entered.
static tpr_cuda_driver_function tpr_cuda_kernels_gather(tpr_cuda_device_set *set, tpr_cuda_device *device) {
    if (__atomic_load_n(&device->loaded, __ATOMIC_ACQUIRE)) return device->gather;
    tpr_cuda_os_lock_take(&set->lock);
    if (!device->loaded) {
        tpr_cuda_driver_function gather = NULL;
        tprpc_error why = TPR_CUDA_ZERO;
        tprpc_status status =
            TPR_CUDA_DRIVER_CALL(set->cu, cuModuleLoadData, (&device->module, tpr_cuda_kernels_ptx), &why);
        if (status == TPRPC_OK)
            status =
                TPR_CUDA_DRIVER_CALL(set->cu, cuModuleGetFunction, (&gather, device->module, "tprpc_gather"), &why);
        if (status == TPRPC_OK) device->gather = gather;
        else tprpc_log_text(set->ctx, TPRPC_LOG_INFO, "cuda", why.text);
        __atomic_store_n(&device->loaded, true, __ATOMIC_RELEASE);
    }
    tpr_cuda_os_lock_give(&set->lock);
    return device->gather;
}

// Launches it for a table that the device can reach. The device is entered.
static tprpc_status tpr_cuda_kernels_launch(const tpr_cuda_device_set *set, const tpr_cuda_device *device,
                                            uint64_t table, uint32_t count, tpr_cuda_driver_stream stream,
                                            tprpc_error *error) {
    const uint32_t grid = count < TPR_CUDA_KERNELS_GRID ? count : (uint32_t)TPR_CUDA_KERNELS_GRID;
    void *parameters[2];
    parameters[0] = &table;
    parameters[1] = &count;
    return TPR_CUDA_DRIVER_CALL(set->cu, cuLaunchKernel,
                                (device->gather, grid, 1, 1, TPR_CUDA_KERNELS_BLOCK, 1, 1, 0, stream, parameters, NULL),
                                error);
}

// >>stream ------------------------------------------------------------------------------------------------------------
// The library's own streams, events that are used again, and what waits for a device. A loop that is awake looks at
// what waits; one that goes to sleep has itself woken by the driver, from a stream of ours.
//
// Uses: os, base, driver, device.
// Invariant: a wait runs once, on its loop, under its lock. The host waits for no stream but when a context is
// destroyed.

enum {
    TPR_CUDA_STREAM_OWN = 4,           // streams of ours on a device, on each loop;
    TPR_CUDA_STREAM_ALL,               // and one on which nothing ever waits
    TPR_CUDA_STREAM_LOOK_US = 20000,   // a device that failed rings no bell: it is looked at after this time
    TPR_CUDA_STREAM_CLOSE_US = 30000000   // so long a context that is destroyed waits for its streams
};

typedef struct tpr_cuda_stream_wait {  // for what was queued on a stream
    tpr_cuda_base_list     node;
    void (*run)(struct tpr_cuda_stream_wait *wait, tprpc_status status, const tprpc_error *error);
    tpr_cuda_device       *device;
    tpr_cuda_driver_event  event;      // NULL: for all that is queued on the stream
    tpr_cuda_driver_stream stream;
    bool                   belled;
} tpr_cuda_stream_wait;

typedef struct tpr_cuda_stream_lane {  // of one device
    tpr_cuda_driver_stream own[TPR_CUDA_STREAM_ALL], bell;
    uint32_t               turn;
    tpr_cuda_driver_event *events;     // free ones: `count` of them, room for `room`
    uint32_t               count, room;
    void                  *outboxes[2];   // of >>outbox: for transfers of a few bytes, and of many
    bool                   no_large;   // there is no memory for the second
} tpr_cuda_stream_lane;

typedef struct tpr_cuda_stream_queue { // of one loop, shared by our channels' instances on it
    tpr_cuda_base_list    node;        // of the set
    tpr_cuda_device_set  *set;
    tprpc_context        *ctx;
    uint32_t              loop, users; // users: under the set's lock
    tpr_cuda_base_list    waits;
    bool                  armed;       // since the loop's last turn: it may sleep
    tpr_cuda_stream_lane *lanes;       // set->count of them
    tpr_cuda_os_lock      bell_lock;
    bool                  rung;        // under it: the work is deferred
    tprpc_work            bell;
    tprpc_work            sweep;       // an export is to be closed; run NULL: nobody cares. Under the set's lock
    bool                  sweeping;    // it is deferred; likewise
    void                (*swept)(struct tpr_cuda_stream_queue *queue);
    void                 *sweeper;
} tpr_cuda_stream_queue;

static void tpr_cuda_stream_woken(tprpc_work *work) {
    tpr_cuda_stream_queue *queue = TPR_CUDA_OF(work, tpr_cuda_stream_queue, bell);
    tpr_cuda_os_lock_take(&queue->bell_lock);
    queue->rung = false;               // the loop is awake, and looks at what waits by itself
    tpr_cuda_os_lock_give(&queue->bell_lock);
}

// On a thread of the driver's.
static void tpr_cuda_stream_ring(void *user) {
    tpr_cuda_stream_queue *queue = (tpr_cuda_stream_queue *)user;
    tpr_cuda_os_lock_take(&queue->bell_lock);
    if (!queue->rung) tprpc_defer(queue->ctx, &queue->bell);
    queue->rung = true;
    tpr_cuda_os_lock_give(&queue->bell_lock);
}

// There is something new to wait for. A loop that sleeps does not know: whoever has begun it need not be its thread.
static void tpr_cuda_stream_rouse(tpr_cuda_stream_queue *queue) {
    if (!queue->armed) return;
    queue->armed = false;
    tpr_cuda_stream_ring(queue);
}

static tpr_cuda_stream_queue *tpr_cuda_stream_queue_new(tpr_cuda_device_set *set, const tprpc_host *host) {
    tpr_cuda_stream_queue *queue = (tpr_cuda_stream_queue *)tpr_cuda_base_alloc(host->context, sizeof *queue);
    const size_t size = (size_t)set->count * sizeof(tpr_cuda_stream_lane);
    if (!queue) return NULL;
    queue->lanes = (tpr_cuda_stream_lane *)tpr_cuda_base_alloc(host->context, size);
    if (!queue->lanes) {
        tpr_cuda_base_free(host->context, queue, sizeof *queue);
        return NULL;
    }
    queue->set = set;
    queue->ctx = host->context;
    queue->loop = queue->bell.loop = host->loop;
    queue->bell.run = tpr_cuda_stream_woken;
    tpr_cuda_base_list_init(&queue->waits);
    tpr_cuda_os_lock_init(&queue->bell_lock);
    return queue;
}

static void tpr_cuda_stream_swept(tprpc_work *work) {
    tpr_cuda_stream_queue *queue = TPR_CUDA_OF(work, tpr_cuda_stream_queue, sweep);
    tpr_cuda_os_lock_take(&queue->set->lock);
    queue->sweeping = false;
    tpr_cuda_os_lock_give(&queue->set->lock);
    if (queue->swept) queue->swept(queue);
}

// Who is to be told on this loop when an export is to be closed. NULL: nobody any more.
static void tpr_cuda_stream_sweeper(tpr_cuda_stream_queue *queue, void (*swept)(tpr_cuda_stream_queue *queue),
                                    void *user) {
    tpr_cuda_os_lock_take(&queue->set->lock);
    queue->sweep.run = swept ? tpr_cuda_stream_swept : NULL;
    queue->sweep.loop = queue->loop;
    queue->swept = swept;
    queue->sweeper = user;
    tpr_cuda_os_lock_give(&queue->set->lock);
}

// The queue of a host's loop, found or made, with the devices of its context; each join has its part.
static tprpc_status tpr_cuda_stream_join(const tprpc_host *host, tpr_cuda_stream_queue **out, tprpc_error *error) {
    tpr_cuda_stream_queue *found = NULL;
    tprpc_error why = TPR_CUDA_ZERO;
    tpr_cuda_device_set *set = tpr_cuda_device_join(host->context, &why);
    if (!set) {
        if (error) *error = why;
        return why.status;
    }
    tpr_cuda_os_lock_take(&set->lock);
    for (tpr_cuda_base_list *node = set->queues.next; node != &set->queues && !found; node = node->next) {
        tpr_cuda_stream_queue *queue = TPR_CUDA_OF(node, tpr_cuda_stream_queue, node);
        if (queue->loop == host->loop) found = queue;
    }
    if (!found && (found = tpr_cuda_stream_queue_new(set, host)) != NULL)
        tpr_cuda_base_list_add(&set->queues, &found->node);
    if (found) found->users++;
    tpr_cuda_os_lock_give(&set->lock);
    *out = found;
    if (found) return TPRPC_OK;
    tpr_cuda_device_part(set);
    return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory for the streams of a loop");
}

// ---- streams and events; the device is entered

static tprpc_status tpr_cuda_stream_make(const tpr_cuda_stream_queue *queue, tpr_cuda_driver_stream *stream,
                                         tprpc_error *error) {
    if (*stream) return TPRPC_OK;
    return TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamCreate,
                                (stream, (unsigned int)TPR_CUDA_DRIVER_STREAM_NON_BLOCKING), error);
}

// One of our streams, each in turn, so that what waits on one does not hold up all.
static tprpc_status tpr_cuda_stream_own(tpr_cuda_stream_queue *queue, const tpr_cuda_device *device,
                                        tpr_cuda_driver_stream *out, tprpc_error *error) {
    tpr_cuda_stream_lane *lane = &queue->lanes[device->index];
    tpr_cuda_driver_stream *stream = &lane->own[lane->turn++ % TPR_CUDA_STREAM_OWN];
    const tprpc_status status = tpr_cuda_stream_make(queue, stream, error);
    *out = *stream;
    return status;
}

// The one on which nothing ever waits.
static tprpc_status tpr_cuda_stream_free(tpr_cuda_stream_queue *queue, const tpr_cuda_device *device,
                                         tpr_cuda_driver_stream *out, tprpc_error *error) {
    tpr_cuda_driver_stream *stream = &queue->lanes[device->index].own[TPR_CUDA_STREAM_OWN];
    const tprpc_status status = tpr_cuda_stream_make(queue, stream, error);
    *out = *stream;
    return status;
}

static tprpc_status tpr_cuda_stream_event(tpr_cuda_stream_queue *queue, const tpr_cuda_device *device,
                                          tpr_cuda_driver_event *out, tprpc_error *error) {
    tpr_cuda_stream_lane *lane = &queue->lanes[device->index];
    if (lane->count) {
        *out = lane->events[--lane->count];
        return TPRPC_OK;
    }
    return TPR_CUDA_DRIVER_CALL(queue->set->cu, cuEventCreate,
                                (out, (unsigned int)TPR_CUDA_DRIVER_EVENT_DISABLE_TIMING), error);
}

// Gives an event back, on which nothing is to be queued any more; what is queued may still come.
static void tpr_cuda_stream_event_back(tpr_cuda_stream_queue *queue, const tpr_cuda_device *device,
                                       tpr_cuda_driver_event event) {
    tpr_cuda_stream_lane *lane = &queue->lanes[device->index];
    if (!event) return;
    if (lane->count == lane->room) {
        const uint32_t room = lane->room ? 2 * lane->room : 16;
        tpr_cuda_driver_event *events =
            (tpr_cuda_driver_event *)tpr_cuda_base_alloc(queue->ctx, room * sizeof *events);
        if (!events) {
            queue->set->cu->cuEventDestroy(event);
            return;
        }
        if (lane->count) memcpy(events, lane->events, lane->count * sizeof *events);
        tpr_cuda_base_free(queue->ctx, lane->events, lane->room * sizeof *events);
        lane->events = events;
        lane->room = room;
    }
    lane->events[lane->count++] = event;
}

static tprpc_status tpr_cuda_stream_record(tpr_cuda_stream_queue *queue, const tpr_cuda_device *device,
                                           tpr_cuda_driver_stream stream, tpr_cuda_driver_event *out,
                                           tprpc_error *error) {
    tprpc_status status = tpr_cuda_stream_event(queue, device, out, error);
    if (status != TPRPC_OK) return status;
    status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuEventRecord, (*out, stream), error);
    if (status == TPRPC_OK) return status;
    tpr_cuda_stream_event_back(queue, device, *out);
    *out = NULL;
    return status;
}

// ---- waits

// Has `wait` run when all is done that was queued before the event was recorded, which becomes the wait's; or, where
// there is none, when the stream has nothing queued.
static void tpr_cuda_stream_watch(tpr_cuda_stream_queue *queue, tpr_cuda_stream_wait *wait, tpr_cuda_device *device,
                                  tpr_cuda_driver_event event, tpr_cuda_driver_stream stream) {
    wait->device = device;
    wait->event = event;
    wait->stream = stream;
    wait->belled = false;
    tpr_cuda_base_list_add(&queue->waits, &wait->node);
    tpr_cuda_stream_rouse(queue);
}

// Has `wait` run when all is done that is queued on a stream now, which has to stay until then. The device is entered.
// What was queued has to be waited for, so this does not fail.
static void tpr_cuda_stream_await(tpr_cuda_stream_queue *queue, tpr_cuda_stream_wait *wait, tpr_cuda_device *device,
                                  tpr_cuda_driver_stream stream) {
    tpr_cuda_driver_event event = NULL;
    tpr_cuda_stream_record(queue, device, stream, &event, NULL);
    tpr_cuda_stream_watch(queue, wait, device, event, stream);
}

static tpr_cuda_driver_result tpr_cuda_stream_ask(const tpr_cuda_stream_queue *queue,
                                                  const tpr_cuda_stream_wait *wait) {
    return wait->event ? queue->set->cu->cuEventQuery(wait->event) : queue->set->cu->cuStreamQuery(wait->stream);
}

// Whether a wait is over, and how. Its event is then back. An error says that nothing runs on the device any more only
// if it stays.
static bool tpr_cuda_stream_over(tpr_cuda_stream_queue *queue, tpr_cuda_stream_wait *wait, tprpc_status *status,
                                 tprpc_error *error) {
    tpr_cuda_device_guard guard;
    *status = tpr_cuda_device_enter(queue->set, wait->device, &guard, error);
    if (*status != TPRPC_OK) return true;
    tpr_cuda_driver_result code = tpr_cuda_stream_ask(queue, wait);
    if ((int)code != 0 && (int)code != TPR_CUDA_DRIVER_ERROR_NOT_READY) code = tpr_cuda_stream_ask(queue, wait);
    const bool over = (int)code != TPR_CUDA_DRIVER_ERROR_NOT_READY;
    if (over) {
        *status = tpr_cuda_driver_check(queue->set->cu, code, "waiting for a copy", error);
        tpr_cuda_stream_event_back(queue, wait->device, wait->event);
    }
    tpr_cuda_device_leave(queue->set, &guard);
    return over;
}

// Runs the waits that are over. They may begin others, which stand behind.
static bool tpr_cuda_stream_progress(tpr_cuda_stream_queue *queue) {
    bool did = false;
    tpr_cuda_base_list todo;
    queue->armed = false;
    if (tpr_cuda_base_list_empty(&queue->waits)) return false;
    todo = queue->waits;
    todo.next->prev = todo.prev->next = &todo;
    tpr_cuda_base_list_init(&queue->waits);
    while (!tpr_cuda_base_list_empty(&todo)) {
        tpr_cuda_stream_wait *wait = TPR_CUDA_OF(todo.next, tpr_cuda_stream_wait, node);
        tprpc_status status = TPRPC_OK;
        tprpc_error error = TPR_CUDA_ZERO;
        tpr_cuda_base_list_remove(&wait->node);
        if (!tpr_cuda_stream_over(queue, wait, &status, &error)) {
            tpr_cuda_base_list_add(&queue->waits, &wait->node);
            continue;
        }
        did = true;
        wait->run(wait, status, status == TPRPC_OK ? NULL : &error);
    }
    return did;
}

// Has the driver ring when a wait may be over. False: it cannot.
static bool tpr_cuda_stream_bell(tpr_cuda_stream_queue *queue, tpr_cuda_stream_wait *wait) {
    const tpr_cuda_driver *cu = queue->set->cu;
    tpr_cuda_stream_lane *lane = &queue->lanes[wait->device->index];
    tpr_cuda_device_guard guard;
    if (wait->belled) return true;
    if (tpr_cuda_device_enter(queue->set, wait->device, &guard, NULL) != TPRPC_OK) return false;
    wait->belled = wait->event && tpr_cuda_stream_make(queue, &lane->bell, NULL) == TPRPC_OK &&
                   cu->cuStreamWaitEvent(lane->bell, wait->event, 0) == 0 &&
                   cu->cuLaunchHostFunc(lane->bell, tpr_cuda_stream_ring, queue) == 0;
    tpr_cuda_device_leave(queue->set, &guard);
    return wait->belled;
}

// As a channel's arm. Waits ring one after the other, so one that is behind a longer one is found by looking.
static bool tpr_cuda_stream_arm(tpr_cuda_stream_queue *queue, int64_t *deadline_us) {
    queue->armed = true;
    if (tpr_cuda_base_list_empty(&queue->waits)) return true;
    bool all = true;
    for (tpr_cuda_base_list *node = queue->waits.next; node != &queue->waits; node = node->next)
        all &= tpr_cuda_stream_bell(queue, TPR_CUDA_OF(node, tpr_cuda_stream_wait, node));
    const int64_t due = tprpc_now_us(queue->ctx) + (all ? TPR_CUDA_STREAM_LOOK_US : TPR_CUDA_STREAM_LOOK_US / 20);
    if (due < *deadline_us) *deadline_us = due;
    return true;
}

// ---- the end

static bool tpr_cuda_stream_busy(const tpr_cuda_stream_queue *queue, tpr_cuda_driver_stream stream) {
    return stream && (int)queue->set->cu->cuStreamQuery(stream) == TPR_CUDA_DRIVER_ERROR_NOT_READY;
}

// Ends what a loop has on one device. False: something is still queued there.
static bool tpr_cuda_stream_lane_close(tpr_cuda_stream_queue *queue, int32_t index) {
    const tpr_cuda_device *device = &queue->set->devices[index];
    tpr_cuda_stream_lane *lane = &queue->lanes[index];
    tpr_cuda_device_guard guard;
    bool busy = false;
    if (!device->context || tpr_cuda_device_enter(queue->set, device, &guard, NULL) != TPRPC_OK) return true;
    for (uint32_t i = 0; i < TPR_CUDA_STREAM_ALL; i++) busy |= tpr_cuda_stream_busy(queue, lane->own[i]);
    busy |= tpr_cuda_stream_busy(queue, lane->bell);
    for (uint32_t i = 0; i < TPR_CUDA_STREAM_ALL && !busy; i++) {
        if (lane->own[i]) queue->set->cu->cuStreamDestroy(lane->own[i]);
        lane->own[i] = NULL;
    }
    if (!busy && lane->bell) queue->set->cu->cuStreamDestroy(lane->bell);
    if (!busy) lane->bell = NULL;
    while (!busy && lane->count) queue->set->cu->cuEventDestroy(lane->events[--lane->count]);
    tpr_cuda_device_leave(queue->set, &guard);
    return !busy;
}

// Waits until nothing of ours is queued any more, and nothing waits; false: it takes too long.
static bool tpr_cuda_stream_drain(tpr_cuda_stream_queue *queue) {
    for (int64_t waited_us = 0; waited_us < TPR_CUDA_STREAM_CLOSE_US; waited_us += 100) {
        bool done = true;
        tpr_cuda_stream_progress(queue);
        if (tpr_cuda_base_list_empty(&queue->waits))
            for (int32_t i = 0; i < queue->set->count; i++) done &= tpr_cuda_stream_lane_close(queue, i);
        if (done && tpr_cuda_base_list_empty(&queue->waits)) return true;
        tpr_cuda_os_sleep_us(100);
    }
    return false;
}

static void tpr_cuda_stream_part(tpr_cuda_stream_queue *queue) {
    tpr_cuda_device_set *set = queue->set;
    tprpc_context *ctx = queue->ctx;
    tpr_cuda_os_lock_take(&set->lock);
    const bool last = --queue->users == 0;
    if (last) tpr_cuda_base_list_remove(&queue->node);
    tpr_cuda_os_lock_give(&set->lock);
    tpr_cuda_os_lock_take(&queue->bell_lock);
    queue->rung |= last;               // nobody is to be woken any more
    tpr_cuda_os_lock_give(&queue->bell_lock);
    if (last && tpr_cuda_stream_drain(queue)) {
        for (int32_t i = 0; i < set->count; i++) {
            tpr_cuda_stream_lane *lane = &queue->lanes[i];
            tpr_cuda_base_free(ctx, lane->events, lane->room * sizeof(tpr_cuda_driver_event));
        }
        tpr_cuda_base_free(ctx, queue->lanes, (size_t)set->count * sizeof(tpr_cuda_stream_lane));
        tpr_cuda_os_lock_free(&queue->bell_lock);
        tpr_cuda_base_free(ctx, queue, sizeof *queue);
    } else if (last) {                 // what still runs will touch it
        tprpc_log_text(ctx, TPRPC_LOG_ERROR, "cuda", "a stream has not ended: what it uses is left behind");
    }
    tpr_cuda_device_part(set);
}

// >>arena -------------------------------------------------------------------------------------------------------------
// Pinned host memory in chunks, which two processes share where their connection passes descriptors.
//
// Uses: os, base, driver, device, stream.
// Invariant: a chunk is busy from when it is taken until nobody writes to it or reads from it, on a device or in the
// other process; an arena lives as long as its end of a pipe, and as a copy out of a chunk of it is queued.

enum { TPR_CUDA_ARENA_CHUNK = 2 << 20, TPR_CUDA_ARENA_CHUNKS = 8, TPR_CUDA_ARENA_SIZE = 16 << 20 };

typedef struct tpr_cuda_arena_memory { // as one end sees it
    uint8_t         *base;             // NULL: there is none
    size_t           size;
    tpr_cuda_device *pinned;           // by whose context; NULL: not so far
    tpr_cuda_driver_ptr at;            // for devices; 0: not so far
} tpr_cuda_arena_memory;

struct tpr_cuda_arena;
typedef struct tpr_cuda_arena_chunk {
    struct tpr_cuda_arena *arena;
    tpr_cuda_stream_wait   wait;       // for a copy out of it
    uint8_t               *data;
    bool                   busy, orphan;   // orphan: its transfer has ended, and the peer may still write to it
    uint64_t               id, offset; // of an orphan
} tpr_cuda_arena_chunk;

typedef struct tpr_cuda_arena {
    tpr_cuda_arena_memory  memory;
    tpr_cuda_stream_queue *queue;
    int                    fd;
    bool                   told;       // the peer has it
    uint32_t               users;
    void                 (*more)(void *owner);   // a chunk has become free
    void                  *owner;      // NULL: gone
    tpr_cuda_arena_chunk   chunks[TPR_CUDA_ARENA_CHUNKS];
} tpr_cuda_arena;

// Pins the memory, once, so that all devices reach it. The device is entered.
static tprpc_status tpr_cuda_arena_pin(const tpr_cuda_device_set *set, tpr_cuda_arena_memory *memory,
                                       tpr_cuda_device *device, tprpc_error *error) {
    const unsigned int flags =
        TPR_CUDA_DRIVER_MEMHOSTREGISTER_PORTABLE | TPR_CUDA_DRIVER_MEMHOSTREGISTER_DEVICEMAP;
    tprpc_status status = TPRPC_OK;
    if (memory->at) return TPRPC_OK;
    if (!memory->pinned)
        status = TPR_CUDA_DRIVER_CALL(set->cu, cuMemHostRegister, (memory->base, memory->size, flags), error);
    if (status != TPRPC_OK) return status;
    memory->pinned = device;
    return TPR_CUDA_DRIVER_CALL(set->cu, cuMemHostGetDevicePointer, (&memory->at, memory->base, 0), error);
}

static void tpr_cuda_arena_memory_free(const tpr_cuda_device_set *set, tpr_cuda_arena_memory *memory) {
    tpr_cuda_device_guard guard;
    if (memory->pinned && tpr_cuda_device_enter(set, memory->pinned, &guard, NULL) == TPRPC_OK) {
        set->cu->cuMemHostUnregister(memory->base);
        tpr_cuda_device_leave(set, &guard);
    }
    tpr_cuda_os_unmap(memory->base, memory->size);
    memory->base = NULL;
    memory->pinned = NULL;
    memory->at = 0;
}

static void tpr_cuda_arena_unref(tpr_cuda_arena *arena) {
    if (--arena->users) return;
    tpr_cuda_arena_memory_free(arena->queue->set, &arena->memory);
    tpr_cuda_os_close(arena->fd);
    tpr_cuda_base_free(arena->queue->ctx, arena, sizeof *arena);
}

static tpr_cuda_arena *tpr_cuda_arena_new(tpr_cuda_stream_queue *queue, tprpc_error *error) {
    tpr_cuda_arena *arena = (tpr_cuda_arena *)tpr_cuda_base_alloc(queue->ctx, sizeof *arena);
    if (!arena) {
        tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory for an arena");
        return NULL;
    }
    arena->queue = queue;
    arena->users = 1;
    arena->memory.size = TPR_CUDA_ARENA_SIZE;
    arena->fd = tpr_cuda_os_memfd("tprpc cuda", TPR_CUDA_ARENA_SIZE);
    if (arena->fd >= 0) arena->memory.base = (uint8_t *)tpr_cuda_os_map(arena->fd, TPR_CUDA_ARENA_SIZE);
    if (!arena->memory.base) {
        const int code = errno;
        tprpc_error_set(error, code == ENOMEM ? TPRPC_ERROR_MEMORY : TPRPC_ERROR_LIMIT, code,
                        "cuda: making %d bytes of memory to share: %s", TPR_CUDA_ARENA_SIZE, strerror(code));
        tpr_cuda_arena_unref(arena);
        return NULL;
    }
    for (int i = 0; i < TPR_CUDA_ARENA_CHUNKS; i++) {
        arena->chunks[i].arena = arena;
        arena->chunks[i].data = arena->memory.base + (size_t)i * TPR_CUDA_ARENA_CHUNK;
        tpr_cuda_base_list_init(&arena->chunks[i].wait.node);
    }
    return arena;
}

// Maps memory of the peer, of which nothing is believed. False: it is not of that size, or cannot be mapped.
static bool tpr_cuda_arena_map(tpr_cuda_arena_memory *memory, intptr_t handle, size_t size) {
    if (tpr_cuda_os_memfd_check((int)handle, size) != 0) return false;
    memory->base = (uint8_t *)tpr_cuda_os_map((int)handle, size);
    memory->size = size;
    return memory->base != NULL;
}

static tpr_cuda_arena_chunk *tpr_cuda_arena_take(tpr_cuda_arena *arena) {
    for (int i = 0; i < TPR_CUDA_ARENA_CHUNKS; i++) {
        tpr_cuda_arena_chunk *chunk = &arena->chunks[i];
        if (chunk->busy) continue;
        chunk->busy = true;
        chunk->orphan = false;
        return chunk;
    }
    return NULL;
}

static void tpr_cuda_arena_give(tpr_cuda_arena_chunk *chunk) {
    tpr_cuda_arena *arena = chunk->arena;
    chunk->busy = chunk->orphan = false;
    if (arena->owner) arena->more(arena->owner);
}

static void tpr_cuda_arena_copied(tpr_cuda_stream_wait *wait, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_arena_chunk *chunk = TPR_CUDA_OF(wait, tpr_cuda_arena_chunk, wait);
    tpr_cuda_arena *arena = chunk->arena;
    (void)status;                      // a device that failed fails the next that is asked of it
    (void)error;
    tpr_cuda_arena_give(chunk);
    tpr_cuda_arena_unref(arena);
}

// Gives the chunk back when what is queued on the stream is done, be its end of the pipe there or not. The device is
// entered.
static tprpc_status tpr_cuda_arena_give_after(tpr_cuda_arena_chunk *chunk, tpr_cuda_device *device,
                                              tpr_cuda_driver_stream stream, tprpc_error *error) {
    tpr_cuda_driver_event event = NULL;
    chunk->wait.run = tpr_cuda_arena_copied;
    const tprpc_status status = tpr_cuda_stream_record(chunk->arena->queue, device, stream, &event, error);
    if (status != TPRPC_OK) return status;
    tpr_cuda_stream_watch(chunk->arena->queue, &chunk->wait, device, event, stream);
    chunk->arena->users++;
    return TPRPC_OK;
}

// >>word --------------------------------------------------------------------------------------------------------------
// Order between streams of two processes: words in pinned memory that both share. A stream waits for a word only after
// the peer has said that the matching write is queued; when the peer's process has died the host writes it.
//
// Uses: os, base, driver, wire, device, stream, arena.
// Invariant: a link lives until nothing of ours that it orders is queued any more, be its end of a pipe there or not. A
// slot is used again when both its words have reached what was last said for it.

enum {
    TPR_CUDA_WORD_SLOTS = 512,
    TPR_CUDA_WORD_SIZE = TPR_CUDA_WORD_SLOTS * 16,   // bytes: a slot is u64 ready, u64 done
    TPR_CUDA_WORD_TEND_US = 50000      // a peer's death is looked for, while something waits for it
};

typedef struct tpr_cuda_word_side {    // the words of one direction: its sender writes `ready`, its receiver `done`
    tpr_cuda_arena_memory memory;
    uint64_t              said[TPR_CUDA_WORD_SLOTS];    // sender: what a part was said to have
    uint64_t              waits[TPR_CUDA_WORD_SLOTS];   // what a stream of ours waits for, in the peer's word,
    uint64_t              writes[TPR_CUDA_WORD_SLOTS];  // and will write to ours
} tpr_cuda_word_side;

typedef struct tpr_cuda_word_link {
    tpr_cuda_base_list     node;       // of those that are tended
    tpr_cuda_stream_queue *queue;
    tpr_cuda_word_side     mine, theirs;   // of what this end sends, and receives
    int                    fd, process;
    int32_t                pid;
    bool                   told, dead, gone;   // gone: its end of the pipe is
    bool                   proving;    // memory of the peer's is being read beside the words
    uint32_t               hint;
    uint64_t               seq;
    void                 (*freed)(struct tpr_cuda_word_link *link, void *user);   // before its memory goes
    void                  *user;
    tpr_cuda_arena        *arena;      // of an end that is gone, and its peer's: to unpin them waits for all streams,
    tpr_cuda_arena_memory  theirs_arena;   // one of which may wait for a word; NULL: none
} tpr_cuda_word_link;

typedef struct tpr_cuda_word_tender {  // of an instance: looks after links that something waits for
    tpr_cuda_stream_queue *queue;
    tpr_cuda_base_list     links;
    tprpc_work             work;
    bool                   set;
    bool                 (*lent)(const tpr_cuda_word_link *link);   // whether it reads, or its peer, and not by words
    void                 (*look)(void *user);   // each time
    void                  *user;
} tpr_cuda_word_tender;

static uint64_t *tpr_cuda_word_ready(const tpr_cuda_word_side *side, uint32_t slot) {
    return (uint64_t *)(void *)side->memory.base + 2 * (size_t)slot;
}
static uint64_t *tpr_cuda_word_done(const tpr_cuda_word_side *side, uint32_t slot) {
    return tpr_cuda_word_ready(side, slot) + 1;
}
static bool tpr_cuda_word_reached(const uint64_t *word, uint64_t value) {
    return (int64_t)(__atomic_load_n(word, __ATOMIC_ACQUIRE) - value) >= 0;
}

// Queues a wait for a word, or its write; `done` says which of the slot's. The device is entered, the side pinned.
static tprpc_status tpr_cuda_word_wait(const tpr_cuda_device_set *set, tpr_cuda_word_side *side, uint32_t slot,
                                       bool done, uint64_t value, tpr_cuda_driver_stream stream, tprpc_error *error) {
    const tpr_cuda_driver_ptr at = side->memory.at + 16 * (uint64_t)slot + (done ? 8 : 0);
    const tprpc_status status = TPR_CUDA_DRIVER_CALL(
        set->cu, cuStreamWaitValue64, (stream, at, value, (unsigned int)TPR_CUDA_DRIVER_STREAM_WAIT_VALUE_GEQ), error);
    if (status == TPRPC_OK) side->waits[slot] = value;
    return status;
}

static tprpc_status tpr_cuda_word_write(const tpr_cuda_device_set *set, tpr_cuda_word_side *side, uint32_t slot,
                                        bool done, uint64_t value, tpr_cuda_driver_stream stream, tprpc_error *error) {
    const tpr_cuda_driver_ptr at = side->memory.at + 16 * (uint64_t)slot + (done ? 8 : 0);
    const tprpc_status status = TPR_CUDA_DRIVER_CALL(
        set->cu, cuStreamWriteValue64, (stream, at, value, (unsigned int)TPR_CUDA_DRIVER_STREAM_WRITE_VALUE_DEFAULT),
        error);
    if (status == TPRPC_OK) side->writes[slot] = value;
    return status;
}

// ---- slots, of what this end sends

// A slot and a number for it. False: none is free.
static bool tpr_cuda_word_take(tpr_cuda_word_link *link, uint32_t *slot, uint64_t *seq) {
    tpr_cuda_word_side *side = &link->mine;
    for (uint32_t i = 0; i < TPR_CUDA_WORD_SLOTS; i++) {
        const uint32_t k = (link->hint + i) % TPR_CUDA_WORD_SLOTS;
        if (!tpr_cuda_word_reached(tpr_cuda_word_done(side, k), side->said[k]) ||
            !tpr_cuda_word_reached(tpr_cuda_word_ready(side, k), side->writes[k])) continue;
        link->hint = k + 1;
        *slot = k;
        *seq = side->said[k] = ++link->seq;
        return true;
    }
    return false;
}

// The next number for a slot that goes on being used.
static uint64_t tpr_cuda_word_again(tpr_cuda_word_link *link, uint32_t slot) {
    return link->mine.said[slot] = ++link->seq;
}

// ---- the end of a peer, and of a link

// Whether a stream of ours still waits for a word of the side, or will write one.
static bool tpr_cuda_word_outstanding(const tpr_cuda_word_side *side, bool sending) {
    bool open = false;
    for (uint32_t i = 0; side->memory.base && i < TPR_CUDA_WORD_SLOTS && !open; i++) {
        const uint64_t *ready = tpr_cuda_word_ready(side, i), *done = tpr_cuda_word_done(side, i);
        open = !tpr_cuda_word_reached(sending ? ready : done, side->writes[i]) ||
               !tpr_cuda_word_reached(sending ? done : ready, side->waits[i]);
    }
    return open;
}

static void tpr_cuda_word_reach(uint64_t *word, uint64_t value) {
    if (value && !tpr_cuda_word_reached(word, value)) __atomic_store_n(word, value, __ATOMIC_RELEASE);
}

// The peer's process has ended: what waits for it goes on.
static void tpr_cuda_word_release(tpr_cuda_word_link *link) {
    for (uint32_t i = 0; i < TPR_CUDA_WORD_SLOTS; i++) {
        if (link->mine.memory.base) {
            tpr_cuda_word_reach(tpr_cuda_word_done(&link->mine, i), link->mine.waits[i]);
            tpr_cuda_word_reach(tpr_cuda_word_done(&link->mine, i), link->mine.said[i]);
        }
        if (link->theirs.memory.base) tpr_cuda_word_reach(tpr_cuda_word_ready(&link->theirs, i), link->theirs.waits[i]);
    }
    link->dead = true;
}

static void tpr_cuda_word_look_at(tpr_cuda_word_link *link) {
    if (link->dead || !tpr_cuda_os_process_lives(link->process, link->pid)) tpr_cuda_word_release(link);
}

// Whether the device that the words were first used on is lost: what is outstanding there never comes.
static bool tpr_cuda_word_lost(const tpr_cuda_word_link *link) {
    const tpr_cuda_device *device = link->mine.memory.pinned ? link->mine.memory.pinned : link->theirs.memory.pinned;
    return device && tpr_cuda_device_lost(link->queue->set, device);
}

static void tpr_cuda_word_link_free(tpr_cuda_word_link *link) {
    tprpc_context *ctx = link->queue->ctx;
    if (link->freed) link->freed(link, link->user);
    tpr_cuda_base_list_remove(&link->node);
    tpr_cuda_arena_memory_free(link->queue->set, &link->mine.memory);
    tpr_cuda_arena_memory_free(link->queue->set, &link->theirs.memory);
    tpr_cuda_arena_memory_free(link->queue->set, &link->theirs_arena);
    if (link->arena) tpr_cuda_arena_unref(link->arena);
    tpr_cuda_os_close(link->fd);
    tpr_cuda_os_close(link->process);
    tpr_cuda_base_free(ctx, link, sizeof *link);
}

// Looks at every link. Returns whether something is outstanding on one. closing: what peers still read of ours is not
// waited for.
static bool tpr_cuda_word_tend_all(tpr_cuda_word_tender *tender, bool closing) {
    bool open = false;
    for (tpr_cuda_base_list *node = tender->links.next, *next; node != &tender->links; node = next) {
        tpr_cuda_word_link *link = TPR_CUDA_OF(node, tpr_cuda_word_link, node);
        next = node->next;
        const bool waits = tpr_cuda_word_outstanding(&link->mine, true) ||
                           tpr_cuda_word_outstanding(&link->theirs, false) ||
                           (link->gone && !closing && tender->lent && tender->lent(link));
        if (waits) tpr_cuda_word_look_at(link);
        if (link->gone && (!waits || (closing && tpr_cuda_word_lost(link)))) tpr_cuda_word_link_free(link);
        else open |= waits;
    }
    if (tender->look) tender->look(tender->user);
    return open;
}

static void tpr_cuda_word_tend(tpr_cuda_word_tender *tender) {
    if (tender->set) return;
    tender->set = true;
    tprpc_defer_at(tender->queue->ctx, &tender->work, tprpc_now_us(tender->queue->ctx) + TPR_CUDA_WORD_TEND_US);
}

static void tpr_cuda_word_tended(tprpc_work *work) {
    tpr_cuda_word_tender *tender = TPR_CUDA_OF(work, tpr_cuda_word_tender, work);
    tender->set = false;
    if (tpr_cuda_word_tend_all(tender, false)) tpr_cuda_word_tend(tender);
}

static void tpr_cuda_word_tender_init(tpr_cuda_word_tender *tender, tpr_cuda_stream_queue *queue) {
    tender->queue = queue;
    tender->work.run = tpr_cuda_word_tended;
    tender->work.loop = queue->loop;
    tpr_cuda_base_list_init(&tender->links);
}

// The words of a new end of a pipe to another process. UNSUPPORTED: it cannot be watched.
static tprpc_status tpr_cuda_word_link_new(tpr_cuda_word_tender *tender, int32_t process, tpr_cuda_word_link **out,
                                           tprpc_error *error) {
    tpr_cuda_word_link *link = (tpr_cuda_word_link *)tpr_cuda_base_alloc(tender->queue->ctx, sizeof *link);
    if (!link) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory for the words of a pipe");
    link->queue = tender->queue;
    link->fd = -1;
    tpr_cuda_base_list_add(&tender->links, &link->node);
    link->process = tpr_cuda_os_process(process);
    link->pid = process;
    if (tpr_cuda_os_process_lives(link->process, link->pid)) {
        *out = link;
        return TPRPC_OK;
    }
    tpr_cuda_word_link_free(link);
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "cuda: process %d is not there", (int)process);
}

// Makes the memory of what this end sends.
static tprpc_status tpr_cuda_word_make(tpr_cuda_word_link *link, tprpc_error *error) {
    if (link->mine.memory.base) return TPRPC_OK;
    if (link->fd < 0) link->fd = tpr_cuda_os_memfd("tprpc cuda words", TPR_CUDA_WORD_SIZE);
    if (link->fd >= 0) link->mine.memory.base = (uint8_t *)tpr_cuda_os_map(link->fd, TPR_CUDA_WORD_SIZE);
    link->mine.memory.size = TPR_CUDA_WORD_SIZE;
    if (link->mine.memory.base) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_LIMIT, errno, "cuda: making memory for words: %s", strerror(errno));
}

// The pipe's end is gone; the link goes when nothing waits any more.
static void tpr_cuda_word_link_leave(tpr_cuda_word_tender *tender, tpr_cuda_word_link *link) {
    link->gone = true;
    tpr_cuda_word_look_at(link);
    if (tpr_cuda_word_tend_all(tender, false)) tpr_cuda_word_tend(tender);
}

// When the context is destroyed: whether all links could be freed.
static bool tpr_cuda_word_tender_close(tpr_cuda_word_tender *tender) {
    for (int64_t waited_us = 0; waited_us < TPR_CUDA_STREAM_CLOSE_US; waited_us += 1000) {
        tpr_cuda_word_tend_all(tender, true);
        if (tpr_cuda_base_list_empty(&tender->links)) return true;
        tpr_cuda_os_sleep_us(1000);
    }
    return false;
}

// >>export ------------------------------------------------------------------------------------------------------------
// Device memory that other processes of this host may open: what the user registered, and outboxes; and theirs, opened
// here.
//
// Uses: os, base, driver, wire, device, stream, arena, word.
// Invariant: an export is freed when no link has been told of it that is there, and no peer has it open.

// Makes `size` bytes at `at`, a whole allocation, ready to be opened by others. The device is entered.
static tprpc_status tpr_cuda_export_make(tpr_cuda_device_set *set, tpr_cuda_device *device, uint64_t at, uint64_t size,
                                         tpr_cuda_device_export **out, tprpc_error *error) {
    tpr_cuda_device_export *self = (tpr_cuda_device_export *)tpr_cuda_base_alloc(set->ctx, sizeof *self);
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory to register memory");
    self->at = self->from = at;
    self->size = self->length = size;
    self->device = device;
    tprpc_status status = TPR_CUDA_DRIVER_CALL(set->cu, cuIpcGetMemHandle, (&self->handle, at), error);
    if (status == TPRPC_OK)
        status = TPR_CUDA_DRIVER_CALL(set->cu, cuDeviceGetUuid, (&self->uuid, device->handle), error);
    if (status != TPRPC_OK) {
        tpr_cuda_base_free(set->ctx, self, sizeof *self);
        return status;
    }
    tpr_cuda_os_lock_take(&set->lock);
    self->id = ++set->export_ids;
    tpr_cuda_os_lock_give(&set->lock);
    *out = self;
    return TPRPC_OK;
}

// What was registered and has all of these bytes, or NULL. Under the set's lock.
static tpr_cuda_device_export *tpr_cuda_export_of(const tpr_cuda_device_set *set, int32_t device, const void *data,
                                                  size_t size) {
    const uint64_t at = (uintptr_t)data;
    for (tpr_cuda_device_export *i = set->exports; i; i = i->next)
        if (!i->closing && i->device->index == device && at >= i->from && at - i->from < i->length &&
            size <= i->length - (at - i->from)) return i;
    return NULL;
}

static bool tpr_cuda_export_has(tpr_cuda_device_set *set, int32_t device, const void *data, size_t size) {
    tpr_cuda_os_lock_take(&set->lock);
    const bool has = tpr_cuda_export_of(set, device, data, size) != NULL;
    tpr_cuda_os_lock_give(&set->lock);
    return has;
}

// Whether what was registered has all of these bytes; then *known is what is known of it, and the driver need not be
// asked, which takes as long as to queue a copy.
static bool tpr_cuda_export_knows(tpr_cuda_device_set *set, int32_t device, const void *data, size_t size,
                                  tpr_cuda_device_range *known) {
    tpr_cuda_os_lock_take(&set->lock);
    const tpr_cuda_device_export *found = tpr_cuda_export_of(set, device, data, size);
    if (found) {
        known->kind = TPR_CUDA_DRIVER_MEMORYTYPE_DEVICE;
        known->ordinal = device;
        known->start = found->from;
        known->size = found->length;
    }
    tpr_cuda_os_lock_give(&set->lock);
    return found != NULL;
}

// Likewise, and it stays until it is dropped.
static tpr_cuda_device_export *tpr_cuda_export_hold(tpr_cuda_device_set *set, int32_t device, const void *data,
                                                    size_t size) {
    tpr_cuda_os_lock_take(&set->lock);
    tpr_cuda_device_export *found = tpr_cuda_export_of(set, device, data, size);
    if (found) found->users++;
    tpr_cuda_os_lock_give(&set->lock);
    return found;
}

static void tpr_cuda_export_drop(tpr_cuda_device_set *set, tpr_cuda_device_export *self) {
    tpr_cuda_os_lock_take(&set->lock);
    self->users--;
    tpr_cuda_os_lock_give(&set->lock);
}

// ---- public

TPRPC_API tprpc_status tprpc_cuda_register(tprpc_context *ctx, int32_t index, void *base, size_t size,
                                           tprpc_error *error) {
    tpr_cuda_device_range range = TPR_CUDA_ZERO;
    tpr_cuda_device_guard guard;
    tpr_cuda_device *device;
    tpr_cuda_device_export *self = NULL;
    tprpc_device name;
    TPRPC_ASSERT(ctx && base && size);
    if (!ctx || !base || !size) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda: no memory to register");
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, error);
    if (!set) return TPRPC_ERROR_UNSUPPORTED;
    if (tpr_cuda_export_has(set, index, base, 1))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda: %p is registered", base);
    name.kind = TPRPC_CUDA;
    name.index = index;
    tprpc_status status = tpr_cuda_device_of(set, name, &device, error);
    if (status == TPRPC_OK) status = tpr_cuda_device_enter(set, device, &guard, error);
    if (status != TPRPC_OK) return status;
    status = tpr_cuda_device_check_memory(set, device, base, size, &range, error);
    if (status == TPRPC_OK) {
        tprpc_error why = TPR_CUDA_ZERO;
        if ((uintptr_t)base - range.start > range.size || size > range.size - ((uintptr_t)base - range.start))
            status = tprpc_error_set(&why, TPRPC_ERROR_UNSUPPORTED, 0,
                                     "cuda: memory of several pieces cannot be shared with other processes");
        else status = tpr_cuda_export_make(set, device, range.start, range.size, &self, &why);
        if (status == TPRPC_ERROR_DEVICE && (why.os_code == TPR_CUDA_DRIVER_ERROR_INVALID_VALUE ||
                                             why.os_code == TPR_CUDA_DRIVER_ERROR_NOT_SUPPORTED))
            status = tprpc_error_set(&why, TPRPC_ERROR_UNSUPPORTED, why.os_code,
                                     "cuda: memory of this kind cannot be shared with other processes");
        if (status != TPRPC_OK && error) *error = why;
    }
    tpr_cuda_device_leave(set, &guard);
    if (status != TPRPC_OK) return status;
    self->from = (uintptr_t)base;
    self->length = size;
    tpr_cuda_os_lock_take(&set->lock);
    self->next = set->exports;
    set->exports = self;
    tpr_cuda_os_lock_give(&set->lock);
    return TPRPC_OK;
}

TPRPC_API tprpc_status tprpc_cuda_unregister(tprpc_context *ctx, void *base, tprpc_error *error) {
    tpr_cuda_device_export *self = NULL, **at;
    TPRPC_ASSERT(ctx && base);
    if (!ctx || !base) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda: no memory to unregister");
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, error);
    if (!set) return TPRPC_ERROR_UNSUPPORTED;
    tprpc_status status = TPRPC_ERROR_INVALID;
    tpr_cuda_os_lock_take(&set->lock);
    for (at = &set->exports; *at && (*at)->from != (uintptr_t)base; at = &(*at)->next) {}
    if ((self = *at) != NULL) status = self->users ? TPRPC_PENDING : TPRPC_OK;
    if (status == TPRPC_OK) *at = self->next;
    for (tpr_cuda_base_list *node = set->queues.next; node != &set->queues && status == TPRPC_PENDING;
         node = node->next) {
        tpr_cuda_stream_queue *queue = TPR_CUDA_OF(node, tpr_cuda_stream_queue, node);
        if (!queue->sweep.run || queue->sweeping) continue;
        queue->sweeping = true;
        tprpc_defer(ctx, &queue->sweep);
    }
    if (self) __atomic_store_n(&self->closing, true, __ATOMIC_RELEASE);
    tpr_cuda_os_lock_give(&set->lock);
    if (status == TPRPC_OK) tpr_cuda_base_free(ctx, self, sizeof *self);
    if (status == TPRPC_ERROR_INVALID) tprpc_error_set(error, status, 0, "cuda: %p is not registered", base);
    return status;
}

// >>outbox ------------------------------------------------------------------------------------------------------------
// Device memory of ours that peers have open: what cannot be shown to them is copied there, in chunks.
//
// Uses: base, driver, device, stream, arena, word, export.
// Invariant: a chunk is used again when the receiver's word says that it was read, or the receiver's process has ended.

// A device has two on a loop. The second is for transfers of many bytes: a copy between two H200 takes 4 us more than
// its bytes do, and a chunk's words 3 us, so that chunks of 8 MiB (21 us) reached three quarters of a long copy's rate.
enum {
    TPR_CUDA_OUTBOX_LARGE = 32 << 20, TPR_CUDA_OUTBOX_LARGES = 3,
    TPR_CUDA_OUTBOX_MIDDLE = 2 << 20, TPR_CUDA_OUTBOX_MIDDLES = 8,
    TPR_CUDA_OUTBOX_SMALL = 64 << 10, TPR_CUDA_OUTBOX_SMALLS = 64,
    TPR_CUDA_OUTBOX_MOST = TPR_CUDA_OUTBOX_MIDDLES + TPR_CUDA_OUTBOX_SMALLS
};

typedef struct tpr_cuda_outbox_chunk {
    struct tpr_cuda_outbox *box;
    tpr_cuda_word_link *link;          // whose word says that it was read; NULL: it is free
    uint64_t at, size, seq;            // at: within the outbox
    uint64_t offset, length;           // of the transfer's bytes that are in it
    uint32_t slot;
    bool     held, dropped;            // a send goes on using it; nobody will say that it was read
} tpr_cuda_outbox_chunk;

typedef struct tpr_cuda_outbox {       // of a device, on a loop
    tpr_cuda_device_export *export_;
    uint64_t              base;
    int                   count, smalls;   // smalls: the first of them
    tpr_cuda_outbox_chunk chunks[TPR_CUDA_OUTBOX_MOST];
} tpr_cuda_outbox;

// Makes an outbox of a device, which is entered.
static tprpc_status tpr_cuda_outbox_make(tpr_cuda_stream_queue *queue, tpr_cuda_device *device, bool large,
                                         tpr_cuda_outbox **out, tprpc_error *error) {
    tpr_cuda_device_set *set = queue->set;
    tpr_cuda_driver_ptr at = 0;
    tpr_cuda_outbox *box = (tpr_cuda_outbox *)tpr_cuda_base_alloc(queue->ctx, sizeof *box);
    if (!box) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory for an outbox");
    uint64_t size = 0;
    box->smalls = large ? 0 : (int)TPR_CUDA_OUTBOX_SMALLS;
    box->count = large ? (int)TPR_CUDA_OUTBOX_LARGES : (int)TPR_CUDA_OUTBOX_MOST;
    for (int i = 0; i < box->count; i++) {
        tpr_cuda_outbox_chunk *chunk = &box->chunks[i];
        chunk->box = box;
        chunk->at = size;
        chunk->size = large ? (uint64_t)TPR_CUDA_OUTBOX_LARGE
                      : i < box->smalls ? (uint64_t)TPR_CUDA_OUTBOX_SMALL : (uint64_t)TPR_CUDA_OUTBOX_MIDDLE;
        size += chunk->size;
    }
    tprpc_status status = TPR_CUDA_DRIVER_CALL(set->cu, cuMemAlloc, (&at, (size_t)size), error);
    if (status == TPRPC_OK) status = tpr_cuda_export_make(set, device, at, size, &box->export_, error);
    if (status != TPRPC_OK) {
        tpr_cuda_base_free(queue->ctx, box, sizeof *box);
        if (at) set->cu->cuMemFree(at);
        return status;
    }
    box->base = at;
    *out = box;
    return TPRPC_OK;
}

// The outbox of a device for transfers of that size, made on first use; where there is no memory for large chunks, the
// one with small ones. The device is entered.
static tprpc_status tpr_cuda_outbox_of(tpr_cuda_stream_queue *queue, tpr_cuda_device *device, uint64_t size,
                                       tpr_cuda_outbox **out, tprpc_error *error) {
    tpr_cuda_stream_lane *lane = &queue->lanes[device->index];
    bool large = size > TPR_CUDA_OUTBOX_MIDDLE && !lane->no_large;
    *out = (tpr_cuda_outbox *)lane->outboxes[large];
    if (*out) return TPRPC_OK;
    lane->no_large = large && tpr_cuda_outbox_make(queue, device, true, out, NULL) != TPRPC_OK;
    if (lane->no_large) return tpr_cuda_outbox_of(queue, device, size, out, error);
    const tprpc_status status = large ? TPRPC_OK : tpr_cuda_outbox_make(queue, device, false, out, error);
    if (status == TPRPC_OK) lane->outboxes[large] = *out;
    return status;
}

// Whether a chunk is being written, or may be read.
static bool tpr_cuda_outbox_busy(const tpr_cuda_outbox_chunk *chunk) {
    const tpr_cuda_word_side *side = chunk->link ? &chunk->link->mine : NULL;
    return side && !tpr_cuda_word_reached(chunk->dropped ? tpr_cuda_word_ready(side, chunk->slot)
                                                         : tpr_cuda_word_done(side, chunk->slot), chunk->seq);
}

// For a receiver who waits: the chunk of the link that will be the first to be read, as its peer has said; NULL: none.
static tpr_cuda_outbox_chunk *tpr_cuda_outbox_next(tpr_cuda_outbox *box, const tpr_cuda_word_link *link, int first) {
    tpr_cuda_outbox_chunk *next = NULL;
    for (int i = first; i < box->count; i++) {
        tpr_cuda_outbox_chunk *chunk = &box->chunks[i];
        if (chunk->link != link || chunk->held || chunk->dropped) continue;
        if (!next || (int64_t)(next->seq - chunk->seq) > 0) next = chunk;
    }
    return next;
}

// A chunk for that many bytes, with a slot of the link; NULL: none. asked: the receiver waits for it. Every other chunk
// is for those alone, else what is sent ahead of its receiver may hold them all, and what he waits for gets none.
// *busy: the stream that fills it has to wait for its word.
static tpr_cuda_outbox_chunk *tpr_cuda_outbox_take(tpr_cuda_outbox *box, tpr_cuda_word_link *link, uint64_t size,
                                                   bool asked, bool *busy) {
    const int first = size <= TPR_CUDA_OUTBOX_SMALL ? 0 : box->smalls;
    for (int i = first; i < box->count; i++) {
        tpr_cuda_outbox_chunk *chunk = &box->chunks[i];
        if ((!asked && i % 2) || chunk->held || tpr_cuda_outbox_busy(chunk)) continue;
        if (!tpr_cuda_word_take(link, &chunk->slot, &chunk->seq)) return NULL;
        chunk->link = link;
        chunk->held = true;
        chunk->dropped = *busy = false;
        return chunk;
    }
    tpr_cuda_outbox_chunk *next = asked ? tpr_cuda_outbox_next(box, link, first) : NULL;
    if (next) next->held = *busy = true;
    return next;
}

// Whether the peer of a link has not read a chunk that it may know of.
static bool tpr_cuda_outbox_lent(const tpr_cuda_stream_queue *queue, const tpr_cuda_word_link *link) {
    bool lent = false;
    for (int32_t i = 0; i < 2 * queue->set->count; i++) {
        const tpr_cuda_outbox *box = (const tpr_cuda_outbox *)queue->lanes[i / 2].outboxes[i % 2];
        for (int k = 0; box && k < box->count && !lent; k++)
            lent = box->chunks[k].link == link && tpr_cuda_outbox_busy(&box->chunks[k]);
    }
    return lent;
}

// A link goes: its chunks are free, for nothing of ours waits on it, and its peer reads at its own risk.
static void tpr_cuda_outbox_link_gone(tpr_cuda_stream_queue *queue, const tpr_cuda_word_link *link) {
    for (int32_t i = 0; i < 2 * queue->set->count; i++) {
        tpr_cuda_outbox *box = (tpr_cuda_outbox *)queue->lanes[i / 2].outboxes[i % 2];
        for (int k = 0; box && k < box->count; k++)
            if (box->chunks[k].link == link) box->chunks[k].link = NULL;
    }
}

// Frees the outboxes of a loop, whose links have gone.
static void tpr_cuda_outbox_close(tpr_cuda_stream_queue *queue) {
    for (int32_t i = 0; i < 2 * queue->set->count; i++) {
        tpr_cuda_outbox *box = (tpr_cuda_outbox *)queue->lanes[i / 2].outboxes[i % 2];
        tpr_cuda_device_guard guard;
        if (!box) continue;
        if (tpr_cuda_device_enter(queue->set, box->export_->device, &guard, NULL) == TPRPC_OK) {
            queue->set->cu->cuMemFree((tpr_cuda_driver_ptr)box->base);
            tpr_cuda_device_leave(queue->set, &guard);
        }
        tpr_cuda_base_free(queue->ctx, box->export_, sizeof *box->export_);
        tpr_cuda_base_free(queue->ctx, box, sizeof *box);
        queue->lanes[i / 2].outboxes[i % 2] = NULL;
    }
}

// >>proof -------------------------------------------------------------------------------------------------------------
// Whether another process can really read memory of a device of this one: a page of that device holds two words that
// chance does not make. The peer is told the first, by which it knows that it reads this page and no other; by the
// second, which it has to tell, its word for it is known to be true.
//
// Uses: os, base, driver, device, stream, arena.
// Invariant: a page is shown when its words are there; it lives as long as the instance that shows it.

enum {
    TPR_CUDA_PROOF_PAGE = 2 << 20,     // bytes: of less the driver shows what lies beside, too
    TPR_CUDA_PROOF_LIMIT_US = 5000000
};

typedef struct tpr_cuda_proof_page {   // of a device, on a loop
    struct tpr_cuda_proof_page *next;
    tpr_cuda_stream_queue *queue;
    tpr_cuda_device       *device;
    tpr_cuda_driver_ptr    at;
    tpr_cuda_driver_ipc    handle;
    uint64_t               words[2];
    bool                   writing, written;
    int32_t                code;       // the driver's, where it cannot be shown; 0: it can
    tpr_cuda_stream_wait   wait;
    void                 (*ready)(void *user);   // its words are there, or will not be
    void                  *user;
} tpr_cuda_proof_page;

typedef struct tpr_cuda_proof_reader { // reads pages of peers, one at a time
    tpr_cuda_stream_queue *queue;
    tpr_cuda_arena_memory  memory;     // where it reads to
    tpr_cuda_stream_wait   wait;
    bool                   busy;
    void                 (*read)(void *user, const uint64_t *words, int32_t code);   // code: the driver's
    void                  *user;
} tpr_cuda_proof_reader;

// Its words are queued on a stream of ours, on which nothing waits. The device is entered.
static tprpc_status tpr_cuda_proof_write(tpr_cuda_proof_page *page, tprpc_error *error) {
    const tpr_cuda_driver *cu = page->queue->set->cu;
    tpr_cuda_driver_stream stream = NULL;
    tprpc_status status = TPR_CUDA_DRIVER_CALL(cu, cuMemAlloc, (&page->at, (size_t)TPR_CUDA_PROOF_PAGE), error);
    if (status == TPRPC_OK) status = TPR_CUDA_DRIVER_CALL(cu, cuIpcGetMemHandle, (&page->handle, page->at), error);
    if (status == TPRPC_OK) status = tpr_cuda_stream_free(page->queue, page->device, &stream, error);
    for (uint64_t i = 0; i < TPR_CUDA_COUNT(page->words) && status == TPRPC_OK; i++)
        status = TPR_CUDA_DRIVER_CALL(cu, cuStreamWriteValue64,
                                      (stream, page->at + 8 * i, page->words[i],
                                       (unsigned int)TPR_CUDA_DRIVER_STREAM_WRITE_VALUE_DEFAULT), error);
    if (status == TPRPC_OK) tpr_cuda_stream_await(page->queue, &page->wait, page->device, stream);
    page->writing = status == TPRPC_OK;
    return status;
}

static void tpr_cuda_proof_page_written(tpr_cuda_stream_wait *wait, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_proof_page *page = TPR_CUDA_OF(wait, tpr_cuda_proof_page, wait);
    page->writing = false;
    page->written = status == TPRPC_OK;
    if (status != TPRPC_OK) page->code = error->os_code;
    page->ready(page->user);
}

// Nothing is queued that writes to it.
static void tpr_cuda_proof_page_free(tpr_cuda_proof_page *page) {
    tpr_cuda_device_guard guard;
    if (page->at && tpr_cuda_device_enter(page->queue->set, page->device, &guard, NULL) == TPRPC_OK) {
        page->queue->set->cu->cuMemFree(page->at);
        tpr_cuda_device_leave(page->queue->set, &guard);
    }
    tpr_cuda_base_free(page->queue->ctx, page, sizeof *page);
}

// Makes one. A device that cannot show memory has one with a code; MEMORY and LIMIT are not kept.
static tprpc_status tpr_cuda_proof_page_new(tpr_cuda_stream_queue *queue, tpr_cuda_device *device,
                                            void (*ready)(void *user), void *user, tpr_cuda_proof_page **out,
                                            tprpc_error *error) {
    tpr_cuda_device_guard guard;
    tprpc_error why = TPR_CUDA_ZERO;
    tpr_cuda_proof_page *page = (tpr_cuda_proof_page *)tpr_cuda_base_alloc(queue->ctx, sizeof *page);
    if (!page) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda: no memory to prove a device");
    page->queue = queue;
    page->device = device;
    page->ready = ready;
    page->user = user;
    page->wait.run = tpr_cuda_proof_page_written;
    tprpc_status status = TPRPC_OK;
    if (tpr_cuda_os_random(page->words, sizeof page->words) != 0)
        status = tprpc_error_set(&why, TPRPC_ERROR_LIMIT, errno, "cuda: random bytes: %s", strerror(errno));
    if (status == TPRPC_OK && (status = tpr_cuda_device_enter(queue->set, device, &guard, &why)) == TPRPC_OK) {
        status = tpr_cuda_proof_write(page, &why);
        tpr_cuda_device_leave(queue->set, &guard);
    }
    if (status == TPRPC_OK || status == TPRPC_ERROR_DEVICE) {
        page->code = status == TPRPC_OK ? 0 : why.os_code;
        *out = page;
        return TPRPC_OK;
    }
    tpr_cuda_proof_page_free(page);
    if (error) *error = why;
    return status;
}

// ---- of a peer

static void tpr_cuda_proof_was_read(tpr_cuda_stream_wait *wait, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_proof_reader *reader = TPR_CUDA_OF(wait, tpr_cuda_proof_reader, wait);
    uint64_t words[2];
    memcpy(words, reader->memory.base, sizeof words);
    reader->busy = false;
    reader->read(reader->user, words, status == TPRPC_OK ? 0 : error->os_code);
}

// Begins to read the page that is at `at` for the device, which is entered.
static tprpc_status tpr_cuda_proof_read(tpr_cuda_proof_reader *reader, tpr_cuda_device *device, tpr_cuda_driver_ptr at,
                                        tprpc_error *error) {
    const size_t size = 4096;
    tpr_cuda_device_set *set = reader->queue->set;
    tpr_cuda_driver_stream stream = NULL;
    if (!reader->memory.base) {
        const int fd = tpr_cuda_os_memfd("tprpc cuda proof", size);
        if (fd >= 0) reader->memory.base = (uint8_t *)tpr_cuda_os_map(fd, size);
        const int code = errno;
        tpr_cuda_os_close(fd);
        reader->memory.size = size;
        if (!reader->memory.base)
            return tprpc_error_set(error, TPRPC_ERROR_LIMIT, code, "cuda: memory for a proof: %s", strerror(code));
    }
    memset(reader->memory.base, 0, 16);
    tprpc_status status = tpr_cuda_arena_pin(set, &reader->memory, device, error);
    if (status == TPRPC_OK) status = tpr_cuda_stream_free(reader->queue, device, &stream, error);
    if (status == TPRPC_OK)
        status = tpr_cuda_device_copy(set, NULL, reader->memory.base, device, (const void *)(uintptr_t)at, 16, stream,
                                      error);
    if (status != TPRPC_OK) return status;
    reader->busy = true;
    reader->wait.run = tpr_cuda_proof_was_read;
    tpr_cuda_stream_await(reader->queue, &reader->wait, device, stream);
    return TPRPC_OK;
}

// >>batch -------------------------------------------------------------------------------------------------------------
// What the channels have in common: a batch of buffers, which the receiver fetches itself, or asks for piece by piece.
// A piece goes through a chunk of the receiver's arena, into which the sender copies it; where the two share no memory,
// through the pipe.
//
// Uses: os, base, driver, wire, device, kernels, stream, arena, export, outbox.
// Invariant: a batch is in `sends` or `receives` of its end from its beginning to its end; a message of the twin about
// one that is not there is about one that has ended. A send ends when neither a stream of ours, nor the link, nor a
// receiver of this process is at its memory, or when what is at it is ordered before what the user queues next.

enum {
    TPR_CUDA_BATCH_PIECES = 6,         // of a batch that are under way
    TPR_CUDA_BATCH_ORDERS = 64,        // streams that one batch is on
    TPR_CUDA_BATCH_BOXES = 8,          // chunks of an outbox that one batch has
    TPR_CUDA_BATCH_FEW = 4,            // buffers of a batch whose block is kept
    TPR_CUDA_BATCH_KEPT = 64
};

typedef enum tpr_cuda_batch_outcome {  // of a fetch
    TPR_CUDA_BATCH_FETCHED,            // it is queued; where `lent` is not 0 it is waited for
    TPR_CUDA_BATCH_GOING_ON,           // it goes on by what the sender says
    TPR_CUDA_BATCH_UNREADABLE,         // the sender is to be asked for it
    TPR_CUDA_BATCH_GONE,               // the sender has taken it back
    TPR_CUDA_BATCH_FAILED              // the error says why
} tpr_cuda_batch_outcome;

typedef struct tpr_cuda_batch tpr_cuda_batch;
struct tpr_cuda_batch_end;

typedef struct tpr_cuda_batch_method { // what a channel does in its own way; NULL: nothing
    const char *name;
    bool words;                        // its sends are ordered by words, not by events
    tpr_cuda_batch_outcome (*fetch)(tpr_cuda_batch *receive, const uint8_t *descriptor, size_t size,
                                    tprpc_error *error);
    // A send is over; false: a receiver is still at it, and defers `back`.
    bool (*withdraw)(tpr_cuda_batch *send);
    // A receive that had fetched, or tried to, ends.
    void (*let_go)(tpr_cuda_batch *receive);
    // A send begins, with a word for the receiver.
    tprpc_status (*offer)(tpr_cuda_batch *send, uint8_t *descriptor, size_t *size, tprpc_error *error);
    // All was fetched; the send ends when nothing is lent. Or what was offered will not be fetched.
    void (*fetched)(tpr_cuda_batch *send);
    void (*forget)(tpr_cuda_batch *send);
    // What the twin says that is not about batches in general.
    tprpc_status (*control)(struct tpr_cuda_batch_end *end, const tpr_cuda_wire_message *message, const uint8_t *more,
                            const intptr_t *handles);
} tpr_cuda_batch_method;

typedef struct tpr_cuda_batch_net {    // an instance
    size_t                 size;       // of its block
    const tpr_cuda_batch_method *method;
    tpr_cuda_stream_queue *queue;
    tpr_cuda_batch        *kept;       // blocks of small batches
    uint32_t               kept_count;
} tpr_cuda_batch_net;

typedef struct tpr_cuda_batch_gather { // copies that one kernel is to make
    tpr_cuda_arena_chunk    *chunk;    // the table's; NULL: there are none
    tpr_cuda_kernels_entry  *entries;  // in it
    uint32_t                 count;
    tpr_cuda_device         *device;
    tpr_cuda_driver_stream   stream;
    tpr_cuda_device_range    known;    // what the driver said of the last source, of which
    const tpr_cuda_device   *asked;    // this device
    bool                     reached;  // can read it by kernels
} tpr_cuda_batch_gather;

typedef struct tpr_cuda_batch_end {
    tpr_cuda_batch_net   *net;
    tprpc_link           *link;
    tpr_cuda_os_lock      lock;        // for `sends`, at which receivers of this process may look
    tpr_cuda_base_list    sends, receives;
    tpr_cuda_base_list    hungry;      // receives that wait for a chunk, and pieces of sends, by their own nodes
    tpr_cuda_base_list    starved;
    tpr_cuda_arena       *arena;       // NULL: not needed so far
    tpr_cuda_arena_memory theirs;      // the peer's arena
    uint32_t              places;      // bit i: its chunk i is being written
    tpr_cuda_device      *entered;     // while buffers are gone through, for to enter a device costs as much as a copy
    tpr_cuda_device_guard guard;
    tpr_cuda_batch_gather gather;
} tpr_cuda_batch_end;

typedef struct tpr_cuda_batch_order {  // a stream that buffers of a batch are on
    tpr_cuda_device       *device;
    tpr_cuda_driver_stream stream;
    tpr_cuda_driver_event  event;      // NULL: nothing is queued on it
    bool                   busy;       // something is
    uint32_t               slot;       // its word, while `seq` is not 0
    uint64_t               seq;
    uint64_t               waited;     // of a receive of xth: bit i: it waits for order i of the send
    tpr_cuda_batch        *batch;
    tpr_cuda_stream_wait   wait;
} tpr_cuda_batch_order;

typedef struct tpr_cuda_batch_piece {  // bytes under way: of one buffer
    tpr_cuda_batch       *batch;       // NULL: unused
    tpr_cuda_base_list    node;        // of `starved`
    size_t                buffer, at, size, got;   // at: within the buffer; got: how much has come through the pipe
    uint64_t              offset, place;   // within the batch; in the arena
    tpr_cuda_arena_chunk *chunk;       // NULL: straight from or into host memory
    tpr_cuda_stream_wait  wait;
    tprpc_work            taken;
} tpr_cuda_batch_piece;

struct tpr_cuda_batch {
    tpr_cuda_base_list  node;          // of the end; alone while it is kept
    tpr_cuda_base_list  hunger;
    tpr_cuda_batch     *next;          // while it is kept
    tpr_cuda_batch_end *end;
    tprpc_transfer     *transfer;
    uint64_t            id;
    size_t              count, size;   // buffers; bytes of this block
    tprpc_buffer       *buffers;
    tpr_cuda_batch_order *orders;
    uint8_t            *order_of;      // per buffer on a device
    bool               *goes_on;       // per buffer: it lies behind the one before, in one allocation, on one stream
    uint32_t            order_count;
    uint64_t            total, moved;  // bytes; moved: that have gone or come
    size_t              buffer, at;    // of a receive: what is asked for next,
    uint64_t            wanted;        // which so many bytes stand before
    bool                sending, refused, asked, over, lost, shared;   // shared: the peer may write to chunks for it
    bool                fetched;       // of a send: by the receiver
    bool                fresh;         // of a receive: its streams were looked at just now
    uint32_t            lent;          // what is at its memory, or runs for it
    uint32_t            readers;       // of a send, under the end's lock: receivers of this process; and
    bool                withdrawn;     // that none may begin any more
    tprpc_status        status;
    tprpc_error         error;         // of one that failed
    tprpc_work          back;          // the last reader has gone
    void               *held;          // the method's
    uint32_t            way;           // likewise
    tpr_cuda_driver_stream stream;     // likewise
    bool                stream_set;    // likewise
    struct tpr_cuda_outbox_chunk *boxes[TPR_CUDA_BATCH_BOXES];
    tpr_cuda_batch_piece pieces[TPR_CUDA_BATCH_PIECES];
};

static tprpc_status tpr_cuda_batch_say(tpr_cuda_batch_end *end, uint32_t kind, uint64_t id, uint64_t offset,
                                       uint64_t size, uint64_t place, const intptr_t *handle) {
    uint8_t bytes[TPR_CUDA_WIRE_CONTROL];
    tpr_cuda_wire_message message;
    message.kind = kind;
    message.id = id;
    message.offset = offset;
    message.size = size;
    message.place = place;
    tpr_cuda_wire_write(bytes, &message);
    return tprpc_link_control(end->link, bytes, sizeof bytes, handle, handle ? 1 : 0);   // one that refuses aborts all
}

static tpr_cuda_batch *tpr_cuda_batch_find(const tpr_cuda_base_list *list, uint64_t id) {   // the oldest come first
    for (tpr_cuda_base_list *node = list->next; node != list; node = node->next) {
        tpr_cuda_batch *batch = TPR_CUDA_OF(node, tpr_cuda_batch, node);
        if (batch->id == id) return batch;
    }
    return NULL;
}

// ---- beginning and end

static size_t tpr_cuda_batch_orders_of(size_t count) {
    return count < TPR_CUDA_BATCH_ORDERS ? count : (size_t)TPR_CUDA_BATCH_ORDERS;
}

static size_t tpr_cuda_batch_size(size_t count) {
    return sizeof(tpr_cuda_batch) + count * (sizeof(tprpc_buffer) + 1 + sizeof(bool)) +
           tpr_cuda_batch_orders_of(count) * sizeof(tpr_cuda_batch_order);
}

static tpr_cuda_batch *tpr_cuda_batch_block(tpr_cuda_batch_net *net, size_t count) {
    const bool few = count <= TPR_CUDA_BATCH_FEW;
    const size_t size = tpr_cuda_batch_size(few ? (size_t)TPR_CUDA_BATCH_FEW : count);
    tpr_cuda_batch *batch = few ? net->kept : NULL;
    if (batch) {
        net->kept = batch->next;
        net->kept_count--;
        memset(batch, 0, size);
    } else {
        batch = (tpr_cuda_batch *)tpr_cuda_base_alloc(net->queue->ctx, size);
    }
    if (batch) batch->size = size;
    return batch;
}

static void tpr_cuda_batch_free(tpr_cuda_batch_net *net, tpr_cuda_batch *batch) {
    for (uint32_t i = 0; i < batch->order_count; i++)
        tpr_cuda_stream_event_back(net->queue, batch->orders[i].device, batch->orders[i].event);
    if (batch->size == tpr_cuda_batch_size(TPR_CUDA_BATCH_FEW) && net->kept_count < TPR_CUDA_BATCH_KEPT) {
        batch->next = net->kept;
        net->kept = batch;
        net->kept_count++;
    } else {
        tpr_cuda_base_free(net->queue->ctx, batch, batch->size);
    }
}

static void tpr_cuda_batch_back(tprpc_work *work);

static tprpc_status tpr_cuda_batch_new(tpr_cuda_batch_end *end, tprpc_transfer *transfer, const tprpc_buffer *buffers,
                                       size_t count, bool sending, tpr_cuda_batch **out, tprpc_error *error) {
    const char *name = end->net->method->name;
    if (tpr_cuda_batch_find(sending ? &end->sends : &end->receives, transfer->id))
        return tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "%s: the peer began a transfer twice", name);
    tpr_cuda_batch *batch = *out = tpr_cuda_batch_block(end->net, count);
    if (!batch)
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "%s: no memory for a transfer of %zu buffers", name,
                               count);
    batch->end = end;
    batch->transfer = transfer;
    batch->id = transfer->id;
    batch->sending = sending;
    batch->count = count;
    batch->orders = (tpr_cuda_batch_order *)(void *)(batch + 1);
    batch->buffers = (tprpc_buffer *)(void *)(batch->orders + tpr_cuda_batch_orders_of(count));
    batch->order_of = (uint8_t *)(void *)(batch->buffers + count);
    batch->goes_on = (bool *)(void *)(batch->order_of + count);
    batch->back.run = tpr_cuda_batch_back;
    batch->back.loop = end->net->queue->loop;
    tpr_cuda_base_list_init(&batch->node);
    tpr_cuda_base_list_init(&batch->hunger);
    for (size_t i = 0; i < count; i++) {
        batch->buffers[i] = buffers[i];
        batch->total += buffers[i].size;
        batch->refused |= buffers[i].size && !buffers[i].data;
    }
    return TPRPC_OK;
}

// The entry of a stream in the batch's table, found or made.
static tprpc_status tpr_cuda_batch_order_for(tpr_cuda_batch *batch, tpr_cuda_device *device,
                                             tpr_cuda_driver_stream stream, uint8_t *out, tprpc_error *error) {
    for (uint32_t i = batch->order_count; i-- > 0;) {
        if (batch->orders[i].device != device || batch->orders[i].stream != stream) continue;
        *out = (uint8_t)i;
        return TPRPC_OK;
    }
    if (batch->order_count == tpr_cuda_batch_orders_of(batch->count))
        return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "%s: tensors of one message are on more than %d streams",
                               batch->end->net->method->name, TPR_CUDA_BATCH_ORDERS);
    tpr_cuda_batch_order *order = &batch->orders[batch->order_count];
    order->device = device;
    order->stream = stream;
    order->batch = batch;
    tpr_cuda_base_list_init(&order->wait.node);
    *out = (uint8_t)batch->order_count++;
    return TPRPC_OK;
}

// Enters the device of the next buffer, where it is another than the last one's; leave comes behind the last.
static tprpc_status tpr_cuda_batch_enter(tpr_cuda_batch_end *end, tpr_cuda_device *device, tprpc_error *error) {
    const tpr_cuda_device_set *set = end->net->queue->set;
    if (end->entered == device) return TPRPC_OK;
    if (end->entered) tpr_cuda_device_leave(set, &end->guard);
    end->entered = NULL;
    const tprpc_status status = tpr_cuda_device_enter(set, device, &end->guard, error);
    if (status == TPRPC_OK) end->entered = device;
    return status;
}

static void tpr_cuda_batch_leave(tpr_cuda_batch_end *end) {
    if (end->entered) tpr_cuda_device_leave(end->net->queue->set, &end->guard);
    end->entered = NULL;
}

// Whether buffer i lies behind the one before it, on the same stream, and both in what is known of an allocation: what
// was found of that one goes for this one, and one copy moves both.
static bool tpr_cuda_batch_continues(const tpr_cuda_batch *batch, size_t i, const tpr_cuda_device_range *known) {
    const tprpc_buffer *buffer = &batch->buffers[i], *last = buffer - 1;
    return i && buffer->size && last->size && buffer->data == (char *)last->data + last->size &&
           buffer->stream == last->stream && buffer->device.kind == TPRPC_CUDA &&
           last->device.kind == TPRPC_CUDA && buffer->device.index == last->device.index &&
           (uintptr_t)last->data >= known->start && (uintptr_t)buffer->data - known->start < known->size &&
           buffer->size <= known->size - ((uintptr_t)buffer->data - known->start);
}

// How many bytes of a batch, from its place on, lie one behind the other, `most` at most. Its place is not an empty
// buffer.
static size_t tpr_cuda_batch_run(const tpr_cuda_batch *batch, uint64_t most) {
    uint64_t size = batch->buffers[batch->buffer].size - batch->at;
    for (size_t i = batch->buffer + 1; size < most && i < batch->count && batch->goes_on[i]; i++)
        size += batch->buffers[i].size;
    return (size_t)(size < most ? size : most);
}

// Moves a batch's place on by that many bytes, and past what has none.
static void tpr_cuda_batch_advance(tpr_cuda_batch *batch, size_t size) {
    while (batch->buffer < batch->count) {
        const size_t left = batch->buffers[batch->buffer].size - batch->at;
        if (size < left) break;
        size -= left;
        batch->at = 0;
        batch->buffer++;
    }
    batch->at += size;
}

// Checks what the user gave, and of a send marks how far its streams are. The last device stays entered when all is
// well, for what comes next is most often queued there.
static tprpc_status tpr_cuda_batch_look(tpr_cuda_batch *batch, tprpc_error *error) {
    tpr_cuda_batch_end *end = batch->end;
    tpr_cuda_stream_queue *queue = end->net->queue;
    tpr_cuda_device_range known = TPR_CUDA_ZERO;
    tprpc_status status = TPRPC_OK;
    for (size_t i = 0; i < batch->count && status == TPRPC_OK; i++) {
        const tprpc_buffer *buffer = &batch->buffers[i];
        tpr_cuda_driver_stream stream = (tpr_cuda_driver_stream)buffer->stream;
        tpr_cuda_device *device;
        if (buffer->device.kind != TPRPC_CUDA || !buffer->size) continue;
        batch->goes_on[i] = tpr_cuda_batch_continues(batch, i, &known);
        if (batch->goes_on[i]) batch->order_of[i] = batch->order_of[i - 1];
        if (batch->goes_on[i]) continue;
        const uint32_t before = batch->order_count;
        status = tpr_cuda_device_of(queue->set, buffer->device, &device, error);
        if (status == TPRPC_OK) status = tpr_cuda_batch_enter(end, device, error);
        if (status == TPRPC_OK &&
            !(end->net->method->words && tpr_cuda_export_knows(queue->set, device->index, buffer->data, buffer->size,
                                                               &known)))
            status = tpr_cuda_device_check_memory(queue->set, device, buffer->data, buffer->size, &known, error);
        if (status == TPRPC_OK) status = tpr_cuda_batch_order_for(batch, device, stream, &batch->order_of[i], error);
        if (status != TPRPC_OK || batch->order_count == before) continue;
        tpr_cuda_batch_order *order = &batch->orders[before];
        status = tpr_cuda_device_check_stream(queue->set, device, buffer->stream, error);
        order->busy = batch->sending && status == TPRPC_OK && (int)queue->set->cu->cuStreamQuery(stream) != 0;
        if (order->busy && !end->net->method->words)
            status = tpr_cuda_stream_record(queue, device, stream, &order->event, error);
    }
    if (status != TPRPC_OK) tpr_cuda_batch_leave(end);
    return status;
}

static void tpr_cuda_batch_list(tpr_cuda_batch *batch) {
    tpr_cuda_batch_end *end = batch->end;
    tpr_cuda_os_lock_take(&end->lock);
    tpr_cuda_base_list_add(batch->sending ? &end->sends : &end->receives, &batch->node);
    tpr_cuda_os_lock_give(&end->lock);
    batch->transfer->channel_data = batch;
}

// Keeps the first failure.
static void tpr_cuda_batch_fail(tpr_cuda_batch *batch, tprpc_status status, const tprpc_error *error) {
    if (batch->status != TPRPC_OK) return;
    batch->status = status;
    if (error && error->status == status) batch->error = *error;
    else tprpc_error_set(&batch->error, status, 0, "%s: the transfer was %s", batch->end->net->method->name,
                         status == TPRPC_ERROR_CANCELLED ? "cancelled" : "broken off by the peer");
}

// Of a receive that ends early: chunks that the peer may still write to are not used again before it says so.
static void tpr_cuda_batch_leave_chunks(tpr_cuda_batch *receive) {
    for (int i = 0; i < TPR_CUDA_BATCH_PIECES; i++) {
        tpr_cuda_batch_piece *piece = &receive->pieces[i];
        if (!piece->batch || !piece->chunk) continue;
        piece->batch = NULL;
        if (!receive->shared || receive->lost) {
            tpr_cuda_arena_give(piece->chunk);
            continue;
        }
        piece->chunk->orphan = true;
        piece->chunk->id = receive->id;
        piece->chunk->offset = piece->offset;
    }
}

// Ends a batch: out of its list, its memory back, then the word to its owner.
static void tpr_cuda_batch_finish(tpr_cuda_batch *batch) {
    tpr_cuda_batch_end *end = batch->end;
    tprpc_transfer *transfer = batch->transfer;
    const tprpc_status status = batch->status;
    const tprpc_error error = batch->error;
    const uint64_t id = batch->id;
    const bool cancelled = batch->sending && status != TPRPC_OK && !batch->lost;
    tpr_cuda_os_lock_take(&end->lock);
    tpr_cuda_base_list_remove(&batch->node);
    tpr_cuda_os_lock_give(&end->lock);
    tpr_cuda_base_list_remove(&batch->hunger);
    if (!batch->sending) tpr_cuda_batch_leave_chunks(batch);
    if (batch->held) end->net->method->let_go(batch);
    tpr_cuda_batch_free(end->net, batch);
    if (cancelled) tpr_cuda_batch_say(end, TPR_CUDA_WIRE_CANCEL, id, 0, 0, 0, NULL);
    tprpc_transfer_done(transfer, status, status == TPRPC_OK ? NULL : &error);
}

// Something that was at a batch's memory has come back.
static void tpr_cuda_batch_settle(tpr_cuda_batch *batch) {
    if (batch->over && !batch->lent) tpr_cuda_batch_finish(batch);
}

// ---- a send is over

static void tpr_cuda_batch_send_over(tpr_cuda_batch *send) {
    const tpr_cuda_batch_method *method = send->end->net->method;
    if (send->over) return;
    send->over = true;
    for (int i = 0; i < TPR_CUDA_BATCH_PIECES; i++) {   // what waits for a chunk is not sent any more
        tpr_cuda_batch_piece *piece = &send->pieces[i];
        if (!piece->batch || tpr_cuda_base_list_empty(&piece->node)) continue;
        tpr_cuda_base_list_remove(&piece->node);
        piece->batch = NULL;
    }
    if (method->forget) method->forget(send);
    if (method->withdraw && !method->withdraw(send)) send->lent++;
    tpr_cuda_batch_settle(send);
}

static void tpr_cuda_batch_back(tprpc_work *work) {
    tpr_cuda_batch *send = TPR_CUDA_OF(work, tpr_cuda_batch, back);
    send->lent--;
    tpr_cuda_batch_settle(send);
}

static void tpr_cuda_batch_send_failed(tpr_cuda_batch *send, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_batch_fail(send, status, error);
    tpr_cuda_batch_send_over(send);
}

// ---- a receive is over

// Tells the sender, and ends. To tell may end the pipe, which aborts all, so it is over before.
static void tpr_cuda_batch_receive_over(tpr_cuda_batch *receive, uint32_t word) {
    if (receive->over) return;
    receive->over = true;
    receive->lent++;
    if (word && !receive->lost) tpr_cuda_batch_say(receive->end, word, receive->id, 0, 0, 0, NULL);
    receive->lent--;
    tpr_cuda_batch_settle(receive);
}

static void tpr_cuda_batch_receive_failed(tpr_cuda_batch *receive, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_batch_fail(receive, status, error);
    tpr_cuda_batch_receive_over(receive, TPR_CUDA_WIRE_DROP);
}

// ---- asking: the receiver's part of the way through host memory

static void tpr_cuda_batch_more(void *owner);

// The arena of this end, made when first needed; the peer is told of it where that can be.
static tpr_cuda_arena *tpr_cuda_batch_arena(tpr_cuda_batch_end *end, tprpc_error *error) {
    if (end->arena) return end->arena;
    end->arena = tpr_cuda_arena_new(end->net->queue, error);
    if (!end->arena) return NULL;
    end->arena->owner = end;
    end->arena->more = tpr_cuda_batch_more;
    return end->arena;
}

// ---- many small copies by one kernel

// Makes the copies that were collected; to be called before anything is queued that has to come behind them.
static tprpc_status tpr_cuda_batch_flush(tpr_cuda_batch_end *end, tprpc_error *error) {
    const tpr_cuda_device_set *set = end->net->queue->set;
    tpr_cuda_batch_gather gather = end->gather;
    tpr_cuda_arena_chunk *chunk = gather.chunk;
    tpr_cuda_device_guard guard;
    memset(&end->gather, 0, sizeof end->gather);   // what is known of memory, too: it may be freed from here on
    if (!chunk) return TPRPC_OK;
    const uint64_t table = chunk->arena->memory.at + (uint64_t)(chunk->data - chunk->arena->memory.base);
    tprpc_status status = tpr_cuda_device_enter(set, gather.device, &guard, error);
    if (status != TPRPC_OK) {
        tpr_cuda_arena_give(chunk);
        return status;
    }
    status = tpr_cuda_kernels_launch(set, gather.device, table, gather.count, gather.stream, NULL);
    if (status == TPRPC_OK) {
        status = tpr_cuda_arena_give_after(chunk, gather.device, gather.stream, error);
    } else {                           // one by one, then
        status = TPRPC_OK;
        for (uint32_t i = 0; i < gather.count && status == TPRPC_OK; i++)
            status = TPR_CUDA_DRIVER_CALL(set->cu, cuMemcpyAsync,
                                          ((tpr_cuda_driver_ptr)gather.entries[i].to,
                                           (tpr_cuda_driver_ptr)gather.entries[i].from,
                                           (size_t)gather.entries[i].size, gather.stream), error);
        tpr_cuda_arena_give(chunk);
    }
    tpr_cuda_device_leave(set, &guard);
    return status;
}

// Whether a kernel of the device may make this copy; a table is begun. The device is entered. foreign: the source is
// another device's, of this process: then it has to be of an allocation that comes with the device's peers, which pools
// and virtual memory do not, each piece of which has rights of its own.
static bool tpr_cuda_batch_can_gather(tpr_cuda_batch_end *end, size_t count, tpr_cuda_device *device, bool foreign,
                                      tpr_cuda_driver_stream stream, uint64_t from, size_t size) {
    tpr_cuda_batch_gather *gather = &end->gather;
    tpr_cuda_device_set *set = end->net->queue->set;
    if (count < TPR_CUDA_KERNELS_MANY || size > TPR_CUDA_KERNELS_SMALL || !tpr_cuda_kernels_gather(set, device))
        return false;
    if (gather->chunk && (gather->device != device || gather->stream != stream ||
                          gather->count == TPR_CUDA_ARENA_CHUNK / sizeof(tpr_cuda_kernels_entry))) return false;
    tpr_cuda_device_range *known = &gather->known;
    if (from < known->start || from - known->start >= known->size || gather->asked != device) {
        gather->asked = device;
        if (tpr_cuda_device_ask(set, (const void *)(uintptr_t)from, known, NULL) != TPRPC_OK) known->kind = 0;
        gather->reached = known->kind == TPR_CUDA_DRIVER_MEMORYTYPE_DEVICE && tpr_cuda_device_reaches(set, from) &&
                          (!foreign || tpr_cuda_device_whole(set, from));
    }
    if (!gather->reached || from < known->start || size > known->size - (from - known->start)) return false;
    if (gather->chunk) return true;
    tpr_cuda_arena *arena = tpr_cuda_batch_arena(end, NULL);
    if (!arena || tpr_cuda_arena_pin(set, &arena->memory, device, NULL) != TPRPC_OK) return false;
    gather->chunk = tpr_cuda_arena_take(arena);
    if (!gather->chunk) return false;
    gather->entries = (tpr_cuda_kernels_entry *)(void *)gather->chunk->data;
    gather->device = device;
    gather->stream = stream;
    return true;
}

// Queues one of `count` copies to memory of a device, which is entered, or collects it until the flush. from_device:
// NULL for memory of another process.
static tprpc_status tpr_cuda_batch_copy(tpr_cuda_batch_end *end, size_t count, tpr_cuda_device *device, uint64_t to,
                                        const tpr_cuda_device *from_device, uint64_t from, size_t size,
                                        tpr_cuda_driver_stream stream, tprpc_error *error) {
    tpr_cuda_batch_gather *gather = &end->gather;
    const bool foreign = from_device && from_device != device;
    if (!tpr_cuda_batch_can_gather(end, count, device, foreign, stream, from, size))
        return tpr_cuda_device_copy(end->net->queue->set, device, (void *)(uintptr_t)to, from_device,
                                    (const void *)(uintptr_t)from, size, stream, error);
    gather->entries[gather->count].from = from;
    gather->entries[gather->count].to = to;
    gather->entries[gather->count++].size = size;
    return TPRPC_OK;
}

// Which chunk a piece is to go through. NULL with OK: none is free; the batch is hungry.
static tprpc_status tpr_cuda_batch_chunk_for(tpr_cuda_batch *receive, tpr_cuda_arena_chunk **out, tprpc_error *error) {
    tpr_cuda_batch_end *end = receive->end;
    *out = NULL;
    tpr_cuda_arena *arena = tpr_cuda_batch_arena(end, error);
    if (!arena) return error->status;
    if (!arena->told && tprpc_link_handles(end->link)) {
        const intptr_t handle = arena->fd;
        arena->told = true;
        tpr_cuda_batch_say(end, TPR_CUDA_WIRE_ARENA, 0, 0, TPR_CUDA_ARENA_SIZE, 0, &handle);
    }
    *out = tpr_cuda_arena_take(arena);
    if (!*out && tpr_cuda_base_list_empty(&receive->hunger)) tpr_cuda_base_list_add(&end->hungry, &receive->hunger);
    return TPRPC_OK;
}

static tpr_cuda_batch_piece *tpr_cuda_batch_piece_new(tpr_cuda_batch *batch) {
    for (int i = 0; i < TPR_CUDA_BATCH_PIECES; i++) {
        tpr_cuda_batch_piece *piece = &batch->pieces[i];
        if (piece->batch) continue;
        memset(piece, 0, sizeof *piece);
        piece->batch = batch;
        tpr_cuda_base_list_init(&piece->node);
        tpr_cuda_base_list_init(&piece->wait.node);
        return piece;
    }
    return NULL;
}

// Asks for as many pieces as there may be under way. The batch may have ended after it.
static void tpr_cuda_batch_ask(tpr_cuda_batch *receive) {
    tprpc_error error = TPR_CUDA_ZERO;
    tpr_cuda_batch_piece *piece;
    receive->lent++;
    while (!receive->over && receive->buffer < receive->count) {
        const tprpc_buffer *buffer = &receive->buffers[receive->buffer];
        if (receive->at == buffer->size) {
            receive->buffer++;
            receive->at = 0;
            continue;
        }
        if ((piece = tpr_cuda_batch_piece_new(receive)) == NULL) break;
        piece->buffer = receive->buffer;
        piece->at = receive->at;
        piece->size = buffer->size - piece->at;
        if (piece->size > TPR_CUDA_ARENA_CHUNK) piece->size = TPR_CUDA_ARENA_CHUNK;
        piece->place = TPR_CUDA_WIRE_NOWHERE;
        if (buffer->device.kind == TPRPC_CUDA || tprpc_link_handles(receive->end->link)) {
            const tprpc_status status = tpr_cuda_batch_chunk_for(receive, &piece->chunk, &error);
            if (!piece->chunk) piece->batch = NULL;
            if (status != TPRPC_OK) tpr_cuda_batch_receive_failed(receive, status, &error);
            if (!piece->chunk) break;
            if (receive->end->arena->told)
                piece->place = (uint64_t)(piece->chunk->data - receive->end->arena->memory.base);
        }
        piece->offset = receive->wanted;
        receive->wanted += piece->size;
        receive->at += piece->size;
        receive->shared |= piece->place != TPR_CUDA_WIRE_NOWHERE;
        tpr_cuda_batch_say(receive->end, TPR_CUDA_WIRE_WANT, receive->id, piece->offset, piece->size, piece->place,
                           NULL);
    }
    receive->lent--;
    tpr_cuda_batch_settle(receive);
}

// A chunk is free again: who waits for one goes on.
static void tpr_cuda_batch_give_piece(tpr_cuda_batch_piece *piece);
static void tpr_cuda_batch_more(void *owner) {
    tpr_cuda_batch_end *end = (tpr_cuda_batch_end *)owner;
    if (!tpr_cuda_base_list_empty(&end->starved)) {
        tpr_cuda_batch_piece *piece = TPR_CUDA_OF(end->starved.next, tpr_cuda_batch_piece, node);
        tpr_cuda_base_list_remove(&piece->node);
        tpr_cuda_batch_give_piece(piece);
    } else if (!tpr_cuda_base_list_empty(&end->hungry)) {
        tpr_cuda_batch *receive = TPR_CUDA_OF(end->hungry.next, tpr_cuda_batch, hunger);
        tpr_cuda_base_list_remove(&receive->hunger);
        tpr_cuda_batch_ask(receive);
    }
}

// Queues the copy of a chunk to the device that it is for; the chunk is given back behind it.
static tprpc_status tpr_cuda_batch_upload(tpr_cuda_batch *receive, const tpr_cuda_batch_piece *piece,
                                          tprpc_error *error) {
    const tpr_cuda_device_set *set = receive->end->net->queue->set;
    const tprpc_buffer *buffer = &receive->buffers[piece->buffer];
    const tpr_cuda_batch_order *order = &receive->orders[receive->order_of[piece->buffer]];
    tpr_cuda_arena_chunk *chunk = piece->chunk;
    tpr_cuda_device_guard guard;
    tprpc_status status = tpr_cuda_device_enter(set, order->device, &guard, error);
    if (status == TPRPC_OK) {
        status = tpr_cuda_device_check_stream(set, order->device, buffer->stream, error);
        if (status == TPRPC_OK) status = tpr_cuda_arena_pin(set, &chunk->arena->memory, order->device, error);
        if (status == TPRPC_OK)
            status = tpr_cuda_device_copy(set, order->device, (uint8_t *)buffer->data + piece->at, NULL, chunk->data,
                                          piece->size, order->stream, error);
        if (status == TPRPC_OK) {
            status = tpr_cuda_arena_give_after(chunk, order->device, order->stream, error);
            tpr_cuda_device_leave(set, &guard);
            return status;             // where it is not given back it is not used again, for it is being read
        }
        tpr_cuda_device_leave(set, &guard);
    }
    tpr_cuda_arena_give(chunk);
    return status;
}

// All of a piece is there.
static void tpr_cuda_batch_arrived(tpr_cuda_batch_piece *piece) {
    tpr_cuda_batch *receive = piece->batch;
    const tprpc_buffer *buffer = &receive->buffers[piece->buffer];
    tprpc_error error = TPR_CUDA_ZERO;
    tprpc_status status = TPRPC_OK;
    receive->lent++;
    piece->batch = NULL;
    receive->moved += piece->size;
    if (piece->chunk && buffer->device.kind == TPRPC_CUDA) {
        status = tpr_cuda_batch_upload(receive, piece, &error);
    } else if (piece->chunk) {
        memcpy((uint8_t *)buffer->data + piece->at, piece->chunk->data, piece->size);
        tpr_cuda_arena_give(piece->chunk);
    }
    if (status != TPRPC_OK) tpr_cuda_batch_receive_failed(receive, status, &error);
    else if (receive->moved == receive->total) tpr_cuda_batch_receive_over(receive, 0);   // the sender knows
    else if (!receive->over) tpr_cuda_batch_ask(receive);
    receive->lent--;
    tpr_cuda_batch_settle(receive);
}

// ---- giving: the sender's part

// A piece of a send is over.
static void tpr_cuda_batch_piece_free(tpr_cuda_batch_piece *piece) {
    tpr_cuda_batch_end *end = piece->batch->end;
    tpr_cuda_arena_chunk *chunk = piece->chunk;
    if (piece->place != TPR_CUDA_WIRE_NOWHERE) end->places &= ~(1u << piece->place / TPR_CUDA_ARENA_CHUNK);
    piece->batch = NULL;
    piece->chunk = NULL;
    if (chunk) tpr_cuda_arena_give(chunk);
}

// A piece has gone, by way of the arena or through the pipe.
static void tpr_cuda_batch_gone(tpr_cuda_batch_piece *piece, bool say) {
    tpr_cuda_batch *send = piece->batch;
    const uint64_t offset = piece->offset, size = piece->size;
    send->moved += size;
    send->lent++;
    tpr_cuda_batch_piece_free(piece);
    if (say && !send->over) tpr_cuda_batch_say(send->end, TPR_CUDA_WIRE_HAVE, send->id, offset, size, 0, NULL);
    if (send->moved == send->total) tpr_cuda_batch_send_over(send);
    send->lent--;
    tpr_cuda_batch_settle(send);
}

static void tpr_cuda_batch_taken(tprpc_work *work) {
    tpr_cuda_batch_piece *piece = TPR_CUDA_OF(work, tpr_cuda_batch_piece, taken);
    piece->batch->lent--;
    tpr_cuda_batch_gone(piece, false);
}

// Hands a piece to the link.
static void tpr_cuda_batch_lend(tpr_cuda_batch_piece *piece, const void *data) {
    tpr_cuda_batch *send = piece->batch;
    piece->taken.run = tpr_cuda_batch_taken;
    piece->taken.loop = send->end->net->queue->loop;
    const tprpc_status status =
        tprpc_link_bulk(send->end->link, send->id, piece->offset, data, piece->size, &piece->taken);
    if (status == TPRPC_OK) {
        send->lent++;
        return;
    }
    send->lent++;
    tpr_cuda_batch_piece_free(piece);
    send->lent--;
    tpr_cuda_batch_send_failed(send, status == TPRPC_ERROR_MEMORY ? status : TPRPC_ERROR_PEER, NULL);
}

// A device has copied a piece into a chunk, or failed to.
static void tpr_cuda_batch_loaded(tpr_cuda_stream_wait *wait, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_batch_piece *piece = TPR_CUDA_OF(wait, tpr_cuda_batch_piece, wait);
    tpr_cuda_batch *send = piece->batch;
    if (status == TPRPC_OK && !send->over) {
        send->lent--;
        if (piece->chunk) tpr_cuda_batch_lend(piece, piece->chunk->data);
        else tpr_cuda_batch_gone(piece, true);
        return;
    }
    tpr_cuda_batch_piece_free(piece);
    if (status != TPRPC_OK) tpr_cuda_batch_send_failed(send, status, error);
    send->lent--;
    tpr_cuda_batch_settle(send);
}

// Queues the copy of a piece into pinned memory, behind what was on its stream when it was sent.
static tprpc_status tpr_cuda_batch_download(tpr_cuda_batch_piece *piece, tpr_cuda_arena_memory *memory, uint8_t *to,
                                            tprpc_error *error) {
    const tpr_cuda_batch *send = piece->batch;
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    const tprpc_buffer *buffer = &send->buffers[piece->buffer];
    const tpr_cuda_batch_order *order = &send->orders[send->order_of[piece->buffer]];
    tpr_cuda_driver_stream stream = NULL;
    tpr_cuda_device_guard guard;
    tprpc_status status = tpr_cuda_device_enter(queue->set, order->device, &guard, error);
    if (status != TPRPC_OK) return status;
    piece->wait.run = tpr_cuda_batch_loaded;
    status = tpr_cuda_arena_pin(queue->set, memory, order->device, error);
    if (status == TPRPC_OK) status = tpr_cuda_stream_own(queue, order->device, &stream, error);
    if (status == TPRPC_OK && order->event)
        status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (stream, order->event, 0), error);
    if (status == TPRPC_OK)
        status = tpr_cuda_device_copy(queue->set, NULL, to, order->device, (const uint8_t *)buffer->data + piece->at,
                                      piece->size, stream, error);
    if (status == TPRPC_OK) tpr_cuda_stream_await(queue, &piece->wait, order->device, stream);
    tpr_cuda_device_leave(queue->set, &guard);
    return status;
}

// Sends a piece that was asked for.
static void tpr_cuda_batch_give_piece(tpr_cuda_batch_piece *piece) {
    tpr_cuda_batch *send = piece->batch;
    tpr_cuda_batch_end *end = send->end;
    const tprpc_buffer *buffer = &send->buffers[piece->buffer];
    const bool shared = piece->place != TPR_CUDA_WIRE_NOWHERE;
    const uint8_t *from = (const uint8_t *)buffer->data + piece->at;
    tpr_cuda_arena_memory *memory = &end->theirs;
    uint8_t *to = shared ? memory->base + piece->place : NULL;
    tprpc_error error = TPR_CUDA_ZERO;
    if (buffer->device.kind != TPRPC_CUDA) {
        if (shared) memcpy(to, from, piece->size);
        if (shared) tpr_cuda_batch_gone(piece, true);
        else tpr_cuda_batch_lend(piece, from);
        return;
    }
    tprpc_status status = TPRPC_OK;
    if (!shared) {
        tpr_cuda_arena *arena = tpr_cuda_batch_arena(end, &error);
        if (!arena) status = error.status;
        else piece->chunk = tpr_cuda_arena_take(arena);
        if (arena && !piece->chunk) {
            tpr_cuda_base_list_add(&end->starved, &piece->node);
            return;
        }
        if (arena) memory = &arena->memory;
        if (arena) to = piece->chunk->data;
    }
    if (status == TPRPC_OK) status = tpr_cuda_batch_download(piece, memory, to, &error);
    if (status == TPRPC_OK) {
        send->lent++;
        return;
    }
    send->lent++;
    tpr_cuda_batch_piece_free(piece);
    send->lent--;
    tpr_cuda_batch_send_failed(send, status, &error);
}

// The peer asks for a piece.
static tprpc_status tpr_cuda_batch_wanted(tpr_cuda_batch_end *end, const tpr_cuda_wire_message *message) {
    tpr_cuda_batch *send = tpr_cuda_batch_find(&end->sends, message->id);
    uint64_t offset = message->offset;
    size_t i = 0;
    if (!send) tpr_cuda_batch_say(end, TPR_CUDA_WIRE_CANCEL, message->id, 0, 0, 0, NULL);
    if (!send || send->over) return TPRPC_OK;
    while (i < send->count && offset >= send->buffers[i].size) offset -= send->buffers[i++].size;
    if (i == send->count || !message->size || message->size > send->buffers[i].size - offset ||
        message->size > TPR_CUDA_ARENA_CHUNK) return TPRPC_ERROR_PROTOCOL;
    if (end->net->method->forget) end->net->method->forget(send);
    tpr_cuda_batch_piece *piece = tpr_cuda_batch_piece_new(send);
    if (!piece) return TPRPC_ERROR_PROTOCOL;
    piece->buffer = i;
    piece->at = (size_t)offset;
    piece->size = (size_t)message->size;
    piece->offset = message->offset;
    piece->place = end->theirs.base ? message->place : TPR_CUDA_WIRE_NOWHERE;
    if (piece->place != TPR_CUDA_WIRE_NOWHERE) {
        const uint64_t chunk = piece->place / TPR_CUDA_ARENA_CHUNK;
        if (piece->place % TPR_CUDA_ARENA_CHUNK || chunk >= TPR_CUDA_ARENA_CHUNKS || (end->places & 1u << chunk)) {
            piece->batch = NULL;
            return TPRPC_ERROR_PROTOCOL;
        }
        end->places |= 1u << chunk;
    }
    tpr_cuda_batch_give_piece(piece);
    return TPRPC_OK;
}

// ---- a channel's functions

static tprpc_status tpr_cuda_batch_send(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                                        uint8_t *descriptor, size_t *descriptor_size, tprpc_error *error) {
    tpr_cuda_batch_end *self = (tpr_cuda_batch_end *)end;
    tpr_cuda_batch *send;
    *descriptor_size = 0;
    tprpc_status status = tpr_cuda_batch_new(self, transfer, buffers, count, true, &send, error);
    if (status != TPRPC_OK) return status;
    status = tpr_cuda_batch_look(send, error);
    if (status == TPRPC_OK && self->net->method->offer)
        status = self->net->method->offer(send, descriptor, descriptor_size, error);
    tpr_cuda_batch_leave(self);
    if (status == TPRPC_OK) tpr_cuda_batch_list(send);
    else tpr_cuda_batch_free(self->net, send);
    return status;
}

// What a fetch queued that has to be waited for is done.
static void tpr_cuda_batch_fetched(tpr_cuda_stream_wait *wait, tprpc_status status, const tprpc_error *error) {
    tpr_cuda_batch *receive = TPR_CUDA_OF(wait, tpr_cuda_batch_order, wait)->batch;
    if (status != TPRPC_OK) tpr_cuda_batch_fail(receive, status, error);
    if (--receive->lent) return;
    if (receive->over) tpr_cuda_batch_settle(receive);
    else tpr_cuda_batch_receive_over(receive, receive->status == TPRPC_OK ? TPR_CUDA_WIRE_DONE : TPR_CUDA_WIRE_DROP);
}

// What comes of a fetch. The batch is lent while this runs.
static void tpr_cuda_batch_go_on(tpr_cuda_batch *receive, tpr_cuda_batch_outcome outcome, const tprpc_error *why) {
    receive->asked = outcome == TPR_CUDA_BATCH_UNREADABLE;
    if (receive->asked) tpr_cuda_batch_ask(receive);
    else if (outcome == TPR_CUDA_BATCH_GONE) tpr_cuda_batch_receive_failed(receive, TPRPC_ERROR_PEER, NULL);
    else if (outcome == TPR_CUDA_BATCH_FAILED) tpr_cuda_batch_receive_failed(receive, why->status, why);
    else if (outcome == TPR_CUDA_BATCH_FETCHED && receive->lent == 1)
        tpr_cuda_batch_receive_over(receive, TPR_CUDA_WIRE_DONE);
}

static tprpc_status tpr_cuda_batch_recv(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                                        const uint8_t *descriptor, size_t descriptor_size, tprpc_error *error) {
    tpr_cuda_batch_end *self = (tpr_cuda_batch_end *)end;
    tprpc_error why = TPR_CUDA_ZERO;
    tpr_cuda_batch *receive = NULL;
    tprpc_status status = tpr_cuda_batch_new(self, transfer, buffers, count, false, &receive, error);
    if (status == TPRPC_OK && !receive->refused && (status = tpr_cuda_batch_look(receive, error)) != TPRPC_OK)
        tpr_cuda_batch_free(self->net, receive);
    if (status != TPRPC_OK) {          // the sender, which waits, is told
        tpr_cuda_batch_say(self, TPR_CUDA_WIRE_DROP, transfer->id, 0, 0, 0, NULL);
        return status;
    }
    tpr_cuda_batch_list(receive);
    if (receive->refused) return TPRPC_OK;
    receive->lent++;                   // to tell may end the pipe, which aborts all
    tpr_cuda_batch_outcome outcome = TPR_CUDA_BATCH_UNREADABLE;
    if (!receive->total) outcome = TPR_CUDA_BATCH_FETCHED;
    receive->fresh = true;
    if (receive->total && self->net->method->fetch)
        outcome = self->net->method->fetch(receive, descriptor, descriptor_size, &why);
    tpr_cuda_batch_leave(self);
    receive->fresh = false;
    tpr_cuda_batch_go_on(receive, outcome, &why);
    receive->lent--;
    tpr_cuda_batch_settle(receive);
    return TPRPC_OK;
}

static void tpr_cuda_batch_abort(void *end, tprpc_transfer *transfer, bool link_lost) {
    tpr_cuda_batch *batch = (tpr_cuda_batch *)transfer->channel_data;
    const tprpc_status status = link_lost ? TPRPC_ERROR_PEER : TPRPC_ERROR_CANCELLED;
    (void)end;
    if (!batch) return;                // its beginning has failed, and to say so ended the pipe
    batch->lost |= link_lost;
    if (batch->fetched && batch->over) return;   // it waits for words, which come, or the peer's death is seen
    if (batch->sending) tpr_cuda_batch_send_failed(batch, status, NULL);
    else tpr_cuda_batch_receive_failed(batch, status, NULL);
}

static tpr_cuda_batch_piece *tpr_cuda_batch_piece_at(tpr_cuda_batch *batch, uint64_t offset, uint64_t size) {
    for (int i = 0; batch && i < TPR_CUDA_BATCH_PIECES; i++) {
        tpr_cuda_batch_piece *piece = &batch->pieces[i];
        if (piece->batch && offset >= piece->offset && offset - piece->offset < piece->size &&
            size <= piece->size - (offset - piece->offset)) return piece;
    }
    return NULL;
}

// Chunks of a transfer that has ended, at one place or all: the peer writes to them no more.
static void tpr_cuda_batch_orphans(tpr_cuda_batch_end *end, uint64_t id, bool all, uint64_t offset) {
    for (int i = 0; end->arena && i < TPR_CUDA_ARENA_CHUNKS; i++) {
        tpr_cuda_arena_chunk *chunk = &end->arena->chunks[i];
        if (chunk->orphan && chunk->id == id && (all || chunk->offset == offset)) tpr_cuda_arena_give(chunk);
    }
}

static tprpc_status tpr_cuda_batch_have(tpr_cuda_batch_end *end, const tpr_cuda_wire_message *message) {
    tpr_cuda_batch *receive = tpr_cuda_batch_find(&end->receives, message->id);
    tpr_cuda_batch_piece *piece = tpr_cuda_batch_piece_at(receive, message->offset, message->size);
    if (!receive || receive->over) {
        tpr_cuda_batch_orphans(end, message->id, false, message->offset);
        return TPRPC_OK;
    }
    if (!piece || piece->offset != message->offset || piece->size != message->size || !piece->chunk)
        return TPRPC_ERROR_PROTOCOL;
    tpr_cuda_batch_arrived(piece);
    return TPRPC_OK;
}

static tprpc_status tpr_cuda_batch_control(void *end, const uint8_t *bytes, size_t size, const intptr_t *handles,
                                           size_t count) {
    tpr_cuda_batch_end *self = (tpr_cuda_batch_end *)end;
    tpr_cuda_wire_message message;
    tpr_cuda_batch *batch;
    if (!tpr_cuda_wire_read(bytes, size, count, &message)) return TPRPC_ERROR_PROTOCOL;
    switch (message.kind) {
    case TPR_CUDA_WIRE_WANT: return tpr_cuda_batch_wanted(self, &message);
    case TPR_CUDA_WIRE_HAVE: return tpr_cuda_batch_have(self, &message);
    case TPR_CUDA_WIRE_ARENA:          // one that cannot be mapped here is done without
        if (self->theirs.base || message.size != TPR_CUDA_ARENA_SIZE) return TPRPC_ERROR_PROTOCOL;
        tpr_cuda_arena_map(&self->theirs, handles[0], TPR_CUDA_ARENA_SIZE);
        return TPRPC_OK;
    case TPR_CUDA_WIRE_DONE:
        batch = tpr_cuda_batch_find(&self->sends, message.id);
        if (batch && !batch->over && self->net->method->fetched) self->net->method->fetched(batch);
        if (batch) tpr_cuda_batch_send_over(batch);
        return TPRPC_OK;
    case TPR_CUDA_WIRE_DROP:
        batch = tpr_cuda_batch_find(&self->sends, message.id);
        if (batch) tpr_cuda_batch_send_failed(batch, TPRPC_ERROR_PEER, NULL);
        else tpr_cuda_batch_say(self, TPR_CUDA_WIRE_CANCEL, message.id, 0, 0, 0, NULL);
        return TPRPC_OK;
    default:
        if (message.kind != TPR_CUDA_WIRE_CANCEL)
            return !self->net->method->control ? TPRPC_ERROR_PROTOCOL
                   : self->net->method->control(self, &message, bytes + TPR_CUDA_WIRE_CONTROL, handles);
        tpr_cuda_batch_orphans(self, message.id, true, 0);
        batch = tpr_cuda_batch_find(&self->receives, message.id);
        if (!batch) return TPRPC_OK;
        batch->shared = false;
        tpr_cuda_batch_fail(batch, TPRPC_ERROR_PEER, NULL);
        tpr_cuda_batch_receive_over(batch, 0);
        return TPRPC_OK;
    }
}

static void *tpr_cuda_batch_bulk(void *end, uint64_t id, uint64_t offset, size_t size) {
    tpr_cuda_batch *receive = tpr_cuda_batch_find(&((tpr_cuda_batch_end *)end)->receives, id);
    if (!receive || !receive->asked || receive->over) return NULL;
    const tpr_cuda_batch_piece *piece = tpr_cuda_batch_piece_at(receive, offset, size);
    if (!piece) return NULL;
    uint8_t *to = piece->chunk ? piece->chunk->data : (uint8_t *)receive->buffers[piece->buffer].data + piece->at;
    return to + (offset - piece->offset);
}

static void tpr_cuda_batch_bulk_done(void *end, uint64_t id, uint64_t offset, size_t size) {
    tpr_cuda_batch *receive = tpr_cuda_batch_find(&((tpr_cuda_batch_end *)end)->receives, id);
    tpr_cuda_batch_piece *piece = tpr_cuda_batch_piece_at(receive, offset, size);
    if (!piece || !receive->asked || receive->over) return;
    piece->got += size;
    if (piece->got >= piece->size) tpr_cuda_batch_arrived(piece);
}

// ---- instances and ends

// An instance of `size` bytes, which begin with a tpr_cuda_batch_net.
static tprpc_status tpr_cuda_batch_open(const tprpc_host *host, const tpr_cuda_batch_method *method, size_t size,
                                        void **instance, tprpc_error *error) {
    tpr_cuda_stream_queue *queue;
    const tprpc_status status = tpr_cuda_stream_join(host, &queue, error);
    if (status != TPRPC_OK) return status;
    tpr_cuda_batch_net *net = (tpr_cuda_batch_net *)tpr_cuda_base_alloc(host->context, size);
    if (!net) {
        tpr_cuda_stream_part(queue);
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "%s: no memory for an instance", method->name);
    }
    net->size = size;
    net->method = method;
    net->queue = queue;
    *instance = net;
    return TPRPC_OK;
}

static void tpr_cuda_batch_close(void *instance) {
    tpr_cuda_batch_net *net = (tpr_cuda_batch_net *)instance;
    tpr_cuda_stream_queue *queue = net->queue;
    while (net->kept) {
        tpr_cuda_batch *batch = net->kept;
        net->kept = batch->next;
        tpr_cuda_base_free(queue->ctx, batch, batch->size);
    }
    tpr_cuda_base_free(queue->ctx, net, net->size);
    tpr_cuda_stream_part(queue);
}

static bool tpr_cuda_batch_progress(void *instance) {
    return tpr_cuda_stream_progress(((tpr_cuda_batch_net *)instance)->queue);
}

static bool tpr_cuda_batch_arm(void *instance, int64_t *deadline_us) {
    return tpr_cuda_stream_arm(((tpr_cuda_batch_net *)instance)->queue, deadline_us);
}

static bool tpr_cuda_batch_moves(void *instance, tprpc_device from, tprpc_device to) {
    (void)instance;
    return (from.kind == TPRPC_CUDA && (to.kind == TPRPC_CUDA || to.kind == TPRPC_CPU)) ||
           (from.kind == TPRPC_CPU && to.kind == TPRPC_CUDA);
}

// A new end of `size` bytes, which begin with a tpr_cuda_batch_end.
static void *tpr_cuda_batch_attach(void *instance, tprpc_link *link, size_t size, tprpc_error *error) {
    tpr_cuda_batch_net *net = (tpr_cuda_batch_net *)instance;
    tpr_cuda_batch_end *end = (tpr_cuda_batch_end *)tpr_cuda_base_alloc(net->queue->ctx, size);
    if (!end) {
        tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "no memory for a channel %s", net->method->name);
        return NULL;
    }
    end->net = net;
    end->link = link;
    tpr_cuda_os_lock_init(&end->lock);
    tpr_cuda_base_list_init(&end->sends);
    tpr_cuda_base_list_init(&end->receives);
    tpr_cuda_base_list_init(&end->hungry);
    tpr_cuda_base_list_init(&end->starved);
    return end;
}

static void tpr_cuda_batch_detach(tpr_cuda_batch_end *end, size_t size) {
    tprpc_context *ctx = end->net->queue->ctx;
    if (end->arena) {                  // copies out of it may still be queued
        end->arena->owner = NULL;
        tpr_cuda_arena_unref(end->arena);
    }
    tpr_cuda_arena_memory_free(end->net->queue->set, &end->theirs);
    tpr_cuda_os_lock_free(&end->lock);
    tpr_cuda_base_free(ctx, end, size);
}

// >>basic -------------------------------------------------------------------------------------------------------------
// The channel that works between all memory: through pinned host memory, which both processes share on one host, and
// through the pipe where they do not.
//
// Uses: base, device, stream, batch.
// Invariant: it has no state but that of its batches.

static const tpr_cuda_batch_method tpr_cuda_basic_method = {"cuda_basic", false, NULL, NULL, NULL, NULL,
                                                            NULL, NULL, NULL};

static tprpc_status tpr_cuda_basic_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    return tpr_cuda_batch_open(host, &tpr_cuda_basic_method, sizeof(tpr_cuda_batch_net), instance, error);
}

static size_t tpr_cuda_basic_domain(void *instance, uint8_t *out, size_t capacity) {
    (void)instance;
    (void)out;
    (void)capacity;
    return 0;
}

static bool tpr_cuda_basic_reaches(void *instance, const uint8_t *domain, size_t size) {
    (void)instance;
    (void)domain;
    (void)size;
    return true;
}

static tprpc_status tpr_cuda_basic_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    *end = tpr_cuda_batch_attach(instance, link, sizeof(tpr_cuda_batch_end), error);
    return *end ? TPRPC_OK : TPRPC_ERROR_MEMORY;
}

static void tpr_cuda_basic_detach(void *end) {
    tpr_cuda_batch_detach((tpr_cuda_batch_end *)end, sizeof(tpr_cuda_batch_end));
}

static const tprpc_channel_table tpr_cuda_basic_table = {
    (uint32_t)sizeof(tprpc_channel_table), 0, 0, 1, 0, 0,
    tpr_cuda_basic_open, tpr_cuda_batch_close, tpr_cuda_basic_domain, tpr_cuda_basic_reaches,
    tpr_cuda_batch_progress, tpr_cuda_batch_arm, NULL, tpr_cuda_batch_moves,
    tpr_cuda_basic_attach, tpr_cuda_basic_detach, NULL, NULL, NULL, tpr_cuda_batch_send, tpr_cuda_batch_recv,
    tpr_cuda_batch_abort, tpr_cuda_batch_control, tpr_cuda_batch_bulk, tpr_cuda_batch_bulk_done, NULL, NULL, NULL, NULL,
    1,
};

static const tprpc_backend tpr_cuda_basic_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "cuda_basic",
    "GPU memory through pinned host memory, shared on one host, else through the pipe.",
    0, NULL, &tpr_cuda_basic_table, NULL, NULL,
};

// >>xth ---------------------------------------------------------------------------------------------------------------
// Device memory, and pinned host memory, between threads of one process: one copy, which the receiver queues on his own
// stream between events of the sender's.
//
// Uses: os, base, driver, device, stream, batch.
// Invariant: no pointer of a peer's is ever believed: a receiver finds the sender's end by its key in the registry of
// this process, and the buffers by the transfer's id in that end, under the end's lock. As long as the host has to wait
// for its copies it is counted in the batch, which does not end before.

enum { TPR_CUDA_XTH_KEY = 16 };

typedef struct tpr_cuda_xth_end {
    tpr_cuda_batch_end batch;          // first
    tpr_cuda_base_list node;           // in the registry
    uint32_t           users;          // receivers that hold it, under the registry's lock
    uint8_t            key[TPR_CUDA_XTH_KEY], secret[TPR_CUDA_XTH_KEY], peer_key[TPR_CUDA_XTH_KEY];
} tpr_cuda_xth_end;

// Which ends live in this process.
static struct { tpr_cuda_os_lock lock; tpr_cuda_base_list *first; } tpr_cuda_xth_registry =
    {TPR_CUDA_OS_UNLOCKED, NULL};

static void tpr_cuda_xth_register(tpr_cuda_xth_end *end) {
    tpr_cuda_os_lock_take(&tpr_cuda_xth_registry.lock);
    end->node.next = tpr_cuda_xth_registry.first;
    end->node.prev = NULL;
    if (end->node.next) end->node.next->prev = &end->node;
    tpr_cuda_xth_registry.first = &end->node;
    tpr_cuda_os_lock_give(&tpr_cuda_xth_registry.lock);
}

// Takes an end out once no receiver holds it; one that does has no batch of it any more and lets go at once.
static void tpr_cuda_xth_unregister(tpr_cuda_xth_end *end) {
    for (bool held = true; held;) {
        tpr_cuda_os_lock_take(&tpr_cuda_xth_registry.lock);
        held = end->users > 0;
        if (!held) {
            if (end->node.prev) end->node.prev->next = end->node.next;
            else tpr_cuda_xth_registry.first = end->node.next;
            if (end->node.next) end->node.next->prev = end->node.prev;
        }
        tpr_cuda_os_lock_give(&tpr_cuda_xth_registry.lock);
        if (!held) return;
        tpr_cuda_os_lock_take(&end->batch.lock);
        tpr_cuda_os_lock_give(&end->batch.lock);
    }
}

// The live end of that key, held and locked, or NULL.
static tpr_cuda_xth_end *tpr_cuda_xth_find(const uint8_t *key) {
    tpr_cuda_xth_end *found = NULL;
    tpr_cuda_os_lock_take(&tpr_cuda_xth_registry.lock);
    for (tpr_cuda_base_list *node = tpr_cuda_xth_registry.first; node && !found; node = node->next) {
        tpr_cuda_xth_end *end = TPR_CUDA_OF(node, tpr_cuda_xth_end, node);
        if (memcmp(end->key, key, TPR_CUDA_XTH_KEY) == 0) found = end;
    }
    if (found) found->users++;
    tpr_cuda_os_lock_give(&tpr_cuda_xth_registry.lock);
    if (found) tpr_cuda_os_lock_take(&found->batch.lock);
    return found;
}

static void tpr_cuda_xth_let_go(tpr_cuda_xth_end *end) {
    tpr_cuda_os_lock_take(&tpr_cuda_xth_registry.lock);
    tpr_cuda_os_lock_give(&end->batch.lock);
    end->users--;
    tpr_cuda_os_lock_give(&tpr_cuda_xth_registry.lock);
}

static bool tpr_cuda_xth_same_sizes(const tpr_cuda_batch *send, const tpr_cuda_batch *receive) {
    bool same = send->count == receive->count;
    for (size_t i = 0; same && i < receive->count; i++) same = send->buffers[i].size == receive->buffers[i].size;
    return same;
}

// Whether the copy between a buffer on a device and one that may be of the host's can be queued: that has to be pinned.
static bool tpr_cuda_xth_pinned(tpr_cuda_device_set *set, const tprpc_buffer *on_device, const tprpc_buffer *other) {
    tpr_cuda_device_guard guard;
    tpr_cuda_device *device;
    if (on_device->device.kind != TPRPC_CUDA) return false;
    if (other->device.kind == TPRPC_CUDA) return true;
    if (tpr_cuda_device_of(set, on_device->device, &device, NULL) != TPRPC_OK ||
        tpr_cuda_device_enter(set, device, &guard, NULL) != TPRPC_OK) return false;
    const bool pinned = tpr_cuda_device_pinned(set, other->data, other->size);
    tpr_cuda_device_leave(set, &guard);
    return pinned;
}

// Whether all copies can be queued.
static bool tpr_cuda_xth_direct(const tpr_cuda_batch *send, const tpr_cuda_batch *receive) {
    tpr_cuda_device_set *set = receive->end->net->queue->set;
    bool direct = true;
    for (size_t i = 0; direct && i < receive->count; i++) {
        const tprpc_buffer *from = &send->buffers[i], *to = &receive->buffers[i];
        if (to->size) direct = tpr_cuda_xth_pinned(set, from, to) || tpr_cuda_xth_pinned(set, to, from);
    }
    return direct;
}

// Queues the copy of `size` bytes from the beginning of buffer i on. The stream is the receiver's; to host memory it is
// one of ours on the sender's device.
static tprpc_status tpr_cuda_xth_copy(tpr_cuda_batch *receive, const tpr_cuda_batch *send, size_t i, size_t size,
                                      tprpc_error *error) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    const tprpc_buffer *from = &send->buffers[i], *to = &receive->buffers[i];
    const uint8_t mark = send->order_of[i];
    const tpr_cuda_batch_order *before = from->device.kind == TPRPC_CUDA ? &send->orders[mark] : NULL;
    tpr_cuda_device *source = NULL, *target = NULL, *device;
    tpr_cuda_driver_stream stream = NULL;
    tprpc_status status = TPRPC_OK;
    if (before) status = tpr_cuda_device_of(queue->set, from->device, &source, error);
    if (status == TPRPC_OK && to->device.kind == TPRPC_CUDA) {
        target = receive->orders[receive->order_of[i]].device;
        stream = receive->orders[receive->order_of[i]].stream;
    }
    if (source && target) tpr_cuda_device_pair(queue->set, target, source);
    device = target ? target : source;
    if (status == TPRPC_OK) status = tpr_cuda_batch_enter(receive->end, device, error);
    if (status != TPRPC_OK) return status;
    if (!target) {
        status = tpr_cuda_stream_own(queue, device, &stream, error);
        if (status == TPRPC_OK)
            status = tpr_cuda_batch_order_for(receive, device, stream, &receive->order_of[i], error);
    }
    tpr_cuda_batch_order *order = &receive->orders[receive->order_of[i]];
    if (status == TPRPC_OK && before && before->event && !(order->waited & UINT64_C(1) << mark)) {
        status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (stream, before->event, 0), error);
        order->waited |= UINT64_C(1) << mark;
    }
    if (status == TPRPC_OK && target && source)
        status = tpr_cuda_batch_copy(receive->end, receive->count, target, (uintptr_t)to->data, source,
                                     (uintptr_t)from->data, size, stream, error);
    else if (status == TPRPC_OK)
        status = tpr_cuda_device_copy(queue->set, target, to->data, source, from->data, size, stream, error);
    return status;
}

// Has what the sender's streams do next come after the copies that end at an event. False: not all could be told, for
// one is being captured; then the host has to see to it.
static bool tpr_cuda_xth_order_sender(tpr_cuda_batch *send, const tpr_cuda_device_set *set,
                                      tpr_cuda_driver_event event) {
    bool all = true;
    for (uint32_t i = 0; i < send->order_count; i++) {
        const tpr_cuda_batch_order *order = &send->orders[i];
        tpr_cuda_device_guard guard;
        const bool entered = tpr_cuda_device_enter(set, order->device, &guard, NULL) == TPRPC_OK;
        all &= entered && !tpr_cuda_device_captures(set, order->stream) &&
               set->cu->cuStreamWaitEvent(order->stream, event, 0) == 0;
        if (entered) tpr_cuda_device_leave(set, &guard);
    }
    return all;
}

// Orders both sides after the copies that were queued. Where that is not enough, or fails, the host waits for them.
static void tpr_cuda_xth_order(tpr_cuda_batch *receive, tpr_cuda_batch *send, bool host) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    for (uint32_t i = 0; i < receive->order_count; i++) {
        tpr_cuda_batch_order *order = &receive->orders[i];
        tpr_cuda_device_guard guard;
        if (tpr_cuda_device_enter(queue->set, order->device, &guard, NULL) == TPRPC_OK) {
            tpr_cuda_stream_record(queue, order->device, order->stream, &order->event, NULL);
            tpr_cuda_device_leave(queue->set, &guard);
        }
        if (order->event && tpr_cuda_xth_order_sender(send, queue->set, order->event) && !host) continue;
        order->wait.run = tpr_cuda_batch_fetched;
        tpr_cuda_stream_watch(queue, &order->wait, order->device, order->event, order->stream);
        order->event = NULL;           // the wait's
        receive->lent++;
    }
}

static tpr_cuda_batch_outcome tpr_cuda_xth_fetch(tpr_cuda_batch *receive, const uint8_t *descriptor, size_t size,
                                                 tprpc_error *error) {
    (void)descriptor;
    (void)size;
    tpr_cuda_xth_end *peer = tpr_cuda_xth_find(((tpr_cuda_xth_end *)receive->end)->peer_key);
    if (!peer) return TPR_CUDA_BATCH_GONE;
    tpr_cuda_batch *send = tpr_cuda_batch_find(&peer->batch.sends, receive->id);
    tpr_cuda_batch_outcome outcome = TPR_CUDA_BATCH_FETCHED;
    if (!send || send->withdrawn || !tpr_cuda_xth_same_sizes(send, receive)) outcome = TPR_CUDA_BATCH_GONE;
    else if (!tpr_cuda_xth_direct(send, receive)) outcome = TPR_CUDA_BATCH_UNREADABLE;
    if (outcome == TPR_CUDA_BATCH_FETCHED) {
        tprpc_status status = TPRPC_OK;
        bool host = false;
        for (size_t i = 0, next; i < receive->count && status == TPRPC_OK; i = next) {
            size_t bytes = receive->buffers[i].size;
            for (next = i + 1; next < receive->count && receive->goes_on[next] && send->goes_on[next]; next++)
                bytes += receive->buffers[next].size;
            if (!bytes) continue;
            host |= send->buffers[i].device.kind == TPRPC_CPU || receive->buffers[i].device.kind == TPRPC_CPU;
            status = tpr_cuda_xth_copy(receive, send, i, bytes, error);
        }
        tpr_cuda_batch_leave(receive->end);
        if (status == TPRPC_OK) status = tpr_cuda_batch_flush(receive->end, error);
        else tpr_cuda_batch_flush(receive->end, NULL);
        tpr_cuda_xth_order(receive, send, host);
        if (status != TPRPC_OK) outcome = TPR_CUDA_BATCH_FAILED;
    }
    if (receive->lent > 1) {           // the sender's memory is in use until it is let go
        receive->held = send;
        send->readers++;
        tpr_cuda_os_lock_give(&peer->batch.lock);
    } else {
        tpr_cuda_xth_let_go(peer);
    }
    return outcome;
}

// A receive that had to be waited for ends.
static void tpr_cuda_xth_leave(tpr_cuda_batch *receive) {
    tpr_cuda_batch *send = (tpr_cuda_batch *)receive->held;
    tpr_cuda_xth_end *peer = (tpr_cuda_xth_end *)send->end;
    tpr_cuda_os_lock_take(&peer->batch.lock);
    if (--send->readers == 0 && send->withdrawn) tprpc_defer(peer->batch.net->queue->ctx, &send->back);
    tpr_cuda_xth_let_go(peer);
}

static bool tpr_cuda_xth_withdraw(tpr_cuda_batch *send) {
    tpr_cuda_os_lock_take(&send->end->lock);
    send->withdrawn = true;
    const bool idle = send->readers == 0;
    tpr_cuda_os_lock_give(&send->end->lock);
    return idle;
}

static const tpr_cuda_batch_method tpr_cuda_xth_method = {
    "cuda_xth", false, tpr_cuda_xth_fetch, tpr_cuda_xth_withdraw, tpr_cuda_xth_leave, NULL, NULL, NULL, NULL,
};

static tprpc_status tpr_cuda_xth_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    return tpr_cuda_batch_open(host, &tpr_cuda_xth_method, sizeof(tpr_cuda_batch_net), instance, error);
}

static size_t tpr_cuda_xth_domain(void *instance, uint8_t *out, size_t capacity) {
    char boot[40];
    (void)instance;
    tpr_cuda_os_boot_id(boot);
    return (size_t)snprintf((char *)out, capacity, "%.36s %d", boot, tpr_cuda_os_pid());
}

static bool tpr_cuda_xth_reaches(void *instance, const uint8_t *domain, size_t size) {
    uint8_t own[64];
    const size_t own_size = tpr_cuda_xth_domain(instance, own, sizeof own);
    return own_size == size && memcmp(own, domain, size) == 0;
}

static tprpc_status tpr_cuda_xth_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    tpr_cuda_xth_end *self = (tpr_cuda_xth_end *)tpr_cuda_batch_attach(instance, link, sizeof *self, error);
    if (!self) return TPRPC_ERROR_MEMORY;
    if (tpr_cuda_os_random(self->key, TPR_CUDA_XTH_KEY) != 0 ||
        tpr_cuda_os_random(self->secret, TPR_CUDA_XTH_KEY) != 0) {
        const int code = errno;
        tpr_cuda_batch_detach(&self->batch, sizeof *self);
        return tprpc_error_set(error, TPRPC_ERROR_SYSTEM, code, "cuda: reading random bytes: %s", strerror(code));
    }
    tpr_cuda_xth_register(self);
    *end = self;
    return TPRPC_OK;
}

static void tpr_cuda_xth_detach(void *end) {
    tpr_cuda_xth_end *self = (tpr_cuda_xth_end *)end;
    tpr_cuda_xth_unregister(self);
    tpr_cuda_batch_detach(&self->batch, sizeof *self);
}

static size_t tpr_cuda_xth_challenge(void *end, uint8_t *out, size_t capacity) {
    (void)capacity;
    memcpy(out, ((tpr_cuda_xth_end *)end)->key, TPR_CUDA_XTH_KEY);
    return TPR_CUDA_XTH_KEY;
}

// Only who is in this process can look the secret up.
static size_t tpr_cuda_xth_answer(void *end, const uint8_t *challenge, size_t size, uint8_t *out, size_t capacity) {
    tpr_cuda_xth_end *self = (tpr_cuda_xth_end *)end, *peer;
    (void)capacity;
    if (size != TPR_CUDA_XTH_KEY || (peer = tpr_cuda_xth_find(challenge)) == NULL) return 0;
    memcpy(self->peer_key, challenge, TPR_CUDA_XTH_KEY);
    memcpy(out, peer->secret, TPR_CUDA_XTH_KEY);
    tpr_cuda_xth_let_go(peer);
    return TPR_CUDA_XTH_KEY;
}

static tprpc_status tpr_cuda_xth_verify(void *end, const uint8_t *answer, size_t size, tprpc_error *error) {
    const tpr_cuda_xth_end *self = (const tpr_cuda_xth_end *)end;
    if (size == TPR_CUDA_XTH_KEY && memcmp(answer, self->secret, TPR_CUDA_XTH_KEY) == 0) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                           "the peer is not in this process, or has its own copy of tprpc_cuda");
}

static const tprpc_channel_table tpr_cuda_xth_table = {
    (uint32_t)sizeof(tprpc_channel_table), (uint32_t)TPRPC_CHANNEL_MUTUAL, 0, 1, 0, 0,
    tpr_cuda_xth_open, tpr_cuda_batch_close, tpr_cuda_xth_domain, tpr_cuda_xth_reaches,
    tpr_cuda_batch_progress, tpr_cuda_batch_arm, NULL, tpr_cuda_batch_moves,
    tpr_cuda_xth_attach, tpr_cuda_xth_detach, tpr_cuda_xth_challenge, tpr_cuda_xth_answer, tpr_cuda_xth_verify,
    tpr_cuda_batch_send, tpr_cuda_batch_recv, tpr_cuda_batch_abort, tpr_cuda_batch_control, tpr_cuda_batch_bulk,
    tpr_cuda_batch_bulk_done, NULL, NULL, NULL, NULL, 1,
};

static const tprpc_backend tpr_cuda_xth_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "cuda_xth",
    "GPU memory between threads of one process, copied once in stream order.",
    400, NULL, &tpr_cuda_xth_table, NULL, NULL,
};

// >>ipc ---------------------------------------------------------------------------------------------------------------
// Device memory between processes of one host: the receiver opens the sender's memory and copies on his own stream,
// between words that both share. What was registered is read where it is; all else from the sender's outbox, into which
// he copies it.
//
// That a device of the receiver reads one of the sender is proven by the first transfer between the two, not when the
// pipe is agreed: then no device has been named, so there is no context to export from or open in, and which pairs of
// devices will matter is not known. Until it is proven sends are late: they offer no more than the devices that they
// are on. The receiver, who knows his own, reads a page of each (>>proof) before he says that he is ready; where he
// cannot, or is given no page in time, he asks for the bytes through host memory. The sender gives parts to who has
// told him the word; who has not is to ask.
//
// Uses: os, base, driver, wire, device, kernels, stream, arena, word, export, outbox, proof, batch.
// Invariant: of a transfer `moved` counts the bytes whose copy by the receiver is queued here, or that the outbox was
// given; a part is read from memory that the peer has said is its own, within its bounds.

typedef struct tpr_cuda_ipc_net {      // an instance
    tpr_cuda_batch_net   batch;        // first
    tpr_cuda_word_tender tender;
    tpr_cuda_base_list   ends;
    tpr_cuda_base_list   slow;         // sends that wait for words which no stream of theirs can wait for
    tpr_cuda_base_list   starved;      // sends that wait for a chunk of an outbox, in turn
    tpr_cuda_base_list   parked;       // receives that wait for a proof
    tpr_cuda_proof_page *pages;        // of our devices
    tpr_cuda_proof_reader reader;
    tpr_cuda_word_link  *proving;      // whose peer it reads from,
    struct tpr_cuda_ipc_seen *reads;   // which device (NULL: the end has gone), and
    int32_t              reads_by;     // by which of ours
} tpr_cuda_ipc_net;

typedef struct tpr_cuda_ipc_told {     // an export that the peer knows
    struct tpr_cuda_ipc_told *next;
    tpr_cuda_device_export *of;
    int64_t asked_us;                  // to close it; 0: not
} tpr_cuda_ipc_told;

typedef struct tpr_cuda_ipc_import {   // one of the peer's
    struct tpr_cuda_ipc_import *next;
    uint64_t            id, size;
    uint32_t            device;        // of the peer
    tpr_cuda_driver_ipc handle;
    bool                closing;
    tpr_cuda_driver_ptr at[1];         // by device of ours; 0: not opened, 1: cannot be
} tpr_cuda_ipc_import;

typedef struct tpr_cuda_ipc_shown {    // a device of ours, to the peer; bit i of the words: its device i
    struct tpr_cuda_ipc_shown *next;
    const tpr_cuda_proof_page *page;
    uint64_t good, bad;                // has told the word; cannot read it
    bool     told;
} tpr_cuda_ipc_shown;

typedef struct tpr_cuda_ipc_seen {     // a device of the peer, from here; bit i of the words: our device i
    struct tpr_cuda_ipc_seen *next;
    struct tpr_cuda_ipc_end  *end;
    tpr_cuda_ipc_import *page;         // NULL: we have not been told
    uint32_t device;
    uint64_t word, good, bad;          // what we were told; reads it; cannot
} tpr_cuda_ipc_seen;

typedef struct tpr_cuda_ipc_parked {   // of a receive: its descriptor, of `size` bytes, and since when
    int64_t since_us;
    size_t  size;
    uint8_t descriptor[1];
} tpr_cuda_ipc_parked;

typedef struct tpr_cuda_ipc_end {
    tpr_cuda_batch_end   batch;        // first
    tpr_cuda_base_list   node;         // of the net
    tpr_cuda_word_link  *words;
    tpr_cuda_ipc_told   *told;
    tpr_cuda_ipc_import *imports;      // given to the link when the end goes
    tpr_cuda_ipc_shown  *shown;
    tpr_cuda_ipc_seen   *seen;
} tpr_cuda_ipc_end;

enum { TPR_CUDA_IPC_ASKED, TPR_CUDA_IPC_DIRECT, TPR_CUDA_IPC_OUTBOX, TPR_CUDA_IPC_LATE };   // which way a send goes
enum { TPR_CUDA_IPC_CANNOT = 1 };
enum { TPR_CUDA_IPC_LARGE = 1 << 20 }; // bytes of a part that is fetched beside the next one
#define TPR_CUDA_IPC_NEVER (UINT64_C(1) << 62)

static tpr_cuda_ipc_net *tpr_cuda_ipc_net_of(const tpr_cuda_batch *batch) {
    return (tpr_cuda_ipc_net *)(void *)batch->end->net;
}
static tpr_cuda_ipc_end *tpr_cuda_ipc_end_of(const tpr_cuda_batch *batch) {
    return (tpr_cuda_ipc_end *)(void *)batch->end;
}

// Puts a batch on a list of the net's, at which the loop looks after a time.
static void tpr_cuda_ipc_put(tpr_cuda_batch *batch, tpr_cuda_base_list *list) {
    tpr_cuda_base_list_add(list, &batch->hunger);
    tpr_cuda_stream_rouse(batch->end->net->queue);
}

// ---- imports

static size_t tpr_cuda_ipc_import_size(const tpr_cuda_stream_queue *queue) {
    return sizeof(tpr_cuda_ipc_import) + (size_t)queue->set->count * sizeof(tpr_cuda_driver_ptr);
}

static tpr_cuda_ipc_import *tpr_cuda_ipc_import_of(const tpr_cuda_ipc_end *end, uint64_t id) {
    tpr_cuda_ipc_import *import = end->imports;
    while (import && import->id != id) import = import->next;
    return import;
}

// Closes an import on all devices, and frees it. Nothing is queued that reads it.
static void tpr_cuda_ipc_import_free(tpr_cuda_stream_queue *queue, tpr_cuda_ipc_import *import) {
    for (int32_t i = 0; i < queue->set->count; i++) {
        tpr_cuda_device_guard guard;
        if (import->at[i] <= TPR_CUDA_IPC_CANNOT ||
            tpr_cuda_device_enter(queue->set, &queue->set->devices[i], &guard, NULL) != TPRPC_OK) continue;
        queue->set->cu->cuIpcCloseMemHandle(import->at[i]);
        tpr_cuda_device_leave(queue->set, &guard);
    }
    tpr_cuda_base_free(queue->ctx, import, tpr_cuda_ipc_import_size(queue));
}

// Where a device of ours sees the peer's memory; 0: it cannot, and why, when that is found out. The device is entered.
static tpr_cuda_driver_ptr tpr_cuda_ipc_open_import(const tpr_cuda_stream_queue *queue, tpr_cuda_ipc_import *import,
                                                    const tpr_cuda_device *device, int32_t *code) {
    tpr_cuda_driver_ptr *at = &import->at[device->index];
    if (!*at) {
        *code = (int32_t)queue->set->cu->cuIpcOpenMemHandle(
            at, import->handle, (unsigned int)TPR_CUDA_DRIVER_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
        if (*code) *at = TPR_CUDA_IPC_CANNOT;
    }
    return *at == TPR_CUDA_IPC_CANNOT ? 0 : *at;
}

static tpr_cuda_ipc_import *tpr_cuda_ipc_import_new(const tpr_cuda_stream_queue *queue, uint64_t id, uint64_t size,
                                                    uint64_t device, const uint8_t *handle) {
    tpr_cuda_ipc_import *import =
        (tpr_cuda_ipc_import *)tpr_cuda_base_alloc(queue->ctx, tpr_cuda_ipc_import_size(queue));
    if (!import) return NULL;
    import->id = id;
    import->size = size;
    import->device = (uint32_t)device;
    memcpy(&import->handle, handle, sizeof import->handle);
    return import;
}

// What an end has opened goes when nothing on its link is outstanding.
static void tpr_cuda_ipc_link_freed(tpr_cuda_word_link *link, void *user) {
    tpr_cuda_ipc_import *import = (tpr_cuda_ipc_import *)user, *next;
    for (; import; import = next) {
        next = import->next;
        tpr_cuda_ipc_import_free(link->queue, import);
    }
    tpr_cuda_outbox_link_gone(link->queue, link);
}

static bool tpr_cuda_ipc_link_lent(const tpr_cuda_word_link *link) {
    return link->proving || tpr_cuda_outbox_lent(link->queue, link);
}

// ---- proofs

// Says why transfers go through host memory. code: the driver's; 0: what was read was not the word.
static void tpr_cuda_ipc_explain(tpr_cuda_ipc_end *end, const char *what, int32_t code) {
    const tpr_cuda_stream_queue *queue = end->batch.net->queue;
    char why[110];
    const char *name = "it read something else";
    if (code == TPR_CUDA_DRIVER_ERROR_NOT_READY) name = "not within 5 s";
    else if (code) name = tpr_cuda_driver_name(queue->set->cu, (tpr_cuda_driver_result)code);
    snprintf(why, sizeof why, "its proof failed: %.51s: %.38s", what, name);
    tprpc_link_explain(end->batch.link, why);
    tprpc_log_text(queue->ctx, TPRPC_LOG_INFO, "cuda_ipc", why);
}

static tpr_cuda_ipc_shown *tpr_cuda_ipc_shown_of(const tpr_cuda_ipc_end *end, uint64_t device) {
    tpr_cuda_ipc_shown *shown = end->shown;
    while (shown && (uint64_t)shown->page->device->index != device) shown = shown->next;
    return shown;
}

// Has the peer prove that it reads a device of ours, once.
static void tpr_cuda_ipc_tell_page(tpr_cuda_ipc_end *end, tpr_cuda_ipc_shown *shown) {
    uint8_t bytes[TPR_CUDA_WIRE_CONTROL + TPR_CUDA_WIRE_HANDLE];
    tpr_cuda_wire_message message = TPR_CUDA_ZERO;
    if (shown->told || !shown->page->written) return;
    shown->told = true;
    message.kind = TPR_CUDA_WIRE_PROVE;
    message.id = (uint64_t)shown->page->device->index;
    message.place = shown->page->words[0];
    tpr_cuda_wire_write(bytes, &message);
    memcpy(bytes + TPR_CUDA_WIRE_CONTROL, &shown->page->handle, TPR_CUDA_WIRE_HANDLE);
    tprpc_link_control(end->batch.link, bytes, sizeof bytes, NULL, 0);   // one that refuses aborts all
}

static void tpr_cuda_ipc_page_ready(void *user) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)user;
    for (tpr_cuda_base_list *node = net->ends.next, *next; node != &net->ends; node = next) {
        tpr_cuda_ipc_end *end = TPR_CUDA_OF(node, tpr_cuda_ipc_end, node);
        next = node->next;
        for (tpr_cuda_ipc_shown *shown = end->shown, *after; shown; shown = after) {
            after = shown->next;
            tpr_cuda_ipc_tell_page(end, shown);
        }
    }
}

// A device of ours as the peer sees it, found or made.
static tprpc_status tpr_cuda_ipc_show(tpr_cuda_ipc_end *end, tpr_cuda_device *device, tpr_cuda_ipc_shown **out,
                                      tprpc_error *error) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)(void *)end->batch.net;
    tpr_cuda_stream_queue *queue = net->batch.queue;
    tpr_cuda_proof_page *page = net->pages;
    if ((*out = tpr_cuda_ipc_shown_of(end, (uint64_t)device->index)) != NULL) return TPRPC_OK;
    tpr_cuda_batch_leave(&end->batch);
    while (page && page->device != device) page = page->next;
    if (!page) {
        const tprpc_status status = tpr_cuda_proof_page_new(queue, device, tpr_cuda_ipc_page_ready, net, &page, error);
        if (status != TPRPC_OK) return status;
        page->next = net->pages;
        net->pages = page;
    }
    tpr_cuda_ipc_shown *shown = (tpr_cuda_ipc_shown *)tpr_cuda_base_alloc(queue->ctx, sizeof *shown);
    if (!shown) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda_ipc: no memory for a proof");
    shown->page = page;
    shown->next = end->shown;
    end->shown = *out = shown;
    if (page->code) {
        char what[52];
        snprintf(what, sizeof what, "GPU %d here cannot be shown", (int)device->index);
        tpr_cuda_ipc_explain(end, what, page->code);
    }
    tpr_cuda_ipc_tell_page(end, shown);
    return TPRPC_OK;
}

// Which devices a send is on; 0: one of them cannot be shown. *proven: all were read by each device of the peer that
// tried to, so that parts can be offered at once.
static tprpc_status tpr_cuda_ipc_show_all(const tpr_cuda_batch *send, uint64_t *devices, bool *proven,
                                          tprpc_error *error) {
    bool can = true;
    *devices = 0;
    *proven = true;
    for (uint32_t i = 0; i < send->order_count; i++) {
        tpr_cuda_ipc_shown *shown;
        const tprpc_status status =
            tpr_cuda_ipc_show(tpr_cuda_ipc_end_of(send), send->orders[i].device, &shown, error);
        if (status != TPRPC_OK) return status;
        *devices |= UINT64_C(1) << send->orders[i].device->index;
        *proven &= shown->good && !shown->bad;
        can &= !shown->page->code;
    }
    if (!can) *devices = 0;
    *proven &= can;
    return TPRPC_OK;
}

// Whether those devices of the peer have proven that they read all that the send is on.
static bool tpr_cuda_ipc_proven(const tpr_cuda_batch *send, uint64_t devices) {
    bool all = devices != 0;
    for (uint32_t i = 0; i < send->order_count && all; i++) {
        const tpr_cuda_ipc_shown *shown =
            tpr_cuda_ipc_shown_of(tpr_cuda_ipc_end_of(send), (uint64_t)send->orders[i].device->index);
        all = shown && !(devices & ~shown->good);
    }
    return all;
}

// The peer says how one of its devices reads one of ours.
static tprpc_status tpr_cuda_ipc_on_proof(tpr_cuda_ipc_end *end, const tpr_cuda_wire_message *message) {
    tpr_cuda_ipc_shown *shown = tpr_cuda_ipc_shown_of(end, message->id);
    const uint64_t bit = UINT64_C(1) << message->offset;
    if (!shown || message->size > INT32_MAX) return TPRPC_ERROR_PROTOCOL;
    if (!message->size && message->place == shown->page->words[1]) {
        if (!(shown->bad & bit)) shown->good |= bit;
        return TPRPC_OK;
    }
    if (!(shown->bad & bit)) {
        char what[52];
        snprintf(what, sizeof what, "the peer's GPU %d cannot read GPU %d here", (int)message->offset,
                 (int)message->id);
        tpr_cuda_ipc_explain(end, what, (int32_t)message->size);
    }
    shown->bad |= bit;
    shown->good &= ~bit;
    return TPRPC_OK;
}

// ---- proofs, of the peer's devices

static tpr_cuda_ipc_seen *tpr_cuda_ipc_seen_of(const tpr_cuda_ipc_end *end, uint32_t device) {
    tpr_cuda_ipc_seen *seen = end->seen;
    while (seen && seen->device != device) seen = seen->next;
    return seen;
}

// Likewise, or made; NULL: no memory.
static tpr_cuda_ipc_seen *tpr_cuda_ipc_see(tpr_cuda_ipc_end *end, uint32_t device) {
    tpr_cuda_ipc_seen *seen = tpr_cuda_ipc_seen_of(end, device);
    if (seen) return seen;
    seen = (tpr_cuda_ipc_seen *)tpr_cuda_base_alloc(end->batch.net->queue->ctx, sizeof *seen);
    if (!seen) return NULL;
    seen->end = end;
    seen->device = device;
    seen->next = end->seen;
    return end->seen = seen;
}

// A device of ours reads a device of the peer, or not (any more): the peer is told. words: what was read; NULL: nothing
// was, for the driver's `code`.
static void tpr_cuda_ipc_answer(tpr_cuda_ipc_seen *seen, int32_t device, const uint64_t *words, int32_t code) {
    const uint64_t bit = UINT64_C(1) << device;
    const bool good = !code && words && words[0] == seen->word;
    tpr_cuda_ipc_end *end = seen->end;
    if (seen->bad & bit) return;
    if (good) seen->good |= bit;
    else seen->good &= ~bit;
    if (!good) seen->bad |= bit;
    if (!good) {
        char what[52];
        snprintf(what, sizeof what, "GPU %d here cannot read the peer's GPU %d", (int)device, (int)seen->device);
        tpr_cuda_ipc_explain(end, what, code);
    }
    tpr_cuda_batch_say(&end->batch, TPR_CUDA_WIRE_PROOF, seen->device, (uint64_t)device, (uint64_t)code,
                       words ? words[1] : 0, NULL);
}

// ---- sending

// Tells the peer of our words, and of an export, once.
static tprpc_status tpr_cuda_ipc_tell_words(tpr_cuda_ipc_end *end, tprpc_error *error) {
    const intptr_t handle = end->words->fd;
    if (end->words->told) return TPRPC_OK;
    tpr_cuda_batch_leave(&end->batch);
    end->words->told = true;
    const tprpc_status status = tpr_cuda_batch_say(&end->batch, TPR_CUDA_WIRE_WORDS, 0, 0, TPR_CUDA_WORD_SIZE, 0,
                                                   &handle);
    return status == TPRPC_OK ? status : tprpc_error_set(error, status, 0, "cuda_ipc: the pipe takes no words");
}

static tprpc_status tpr_cuda_ipc_tell(tpr_cuda_ipc_end *end, tpr_cuda_device_export *export_, tprpc_error *error) {
    uint8_t bytes[TPR_CUDA_WIRE_CONTROL + TPR_CUDA_WIRE_EXPORT_MORE];
    tpr_cuda_wire_message message = TPR_CUDA_ZERO;
    tpr_cuda_stream_queue *queue = end->batch.net->queue;
    for (tpr_cuda_ipc_told *told = end->told; told; told = told->next)
        if (told->of == export_) return TPRPC_OK;
    tpr_cuda_batch_leave(&end->batch);
    tpr_cuda_ipc_told *told = (tpr_cuda_ipc_told *)tpr_cuda_base_alloc(queue->ctx, sizeof *told);
    if (!told) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "cuda_ipc: no memory to remember an export");
    told->of = export_;
    told->next = end->told;
    end->told = told;
    tpr_cuda_os_lock_take(&queue->set->lock);
    export_->users++;
    tpr_cuda_os_lock_give(&queue->set->lock);
    message.kind = TPR_CUDA_WIRE_EXPORT;
    message.id = export_->id;
    message.size = export_->size;
    message.place = (uint64_t)export_->device->index;
    tpr_cuda_wire_write(bytes, &message);
    memcpy(bytes + TPR_CUDA_WIRE_CONTROL, &export_->uuid, 16);
    memcpy(bytes + TPR_CUDA_WIRE_CONTROL + 16, &export_->handle, 64);
    const tprpc_status status = tprpc_link_control(end->batch.link, bytes, sizeof bytes, NULL, 0);
    return status == TPRPC_OK ? status : tprpc_error_set(error, status, 0, "cuda_ipc: the pipe has ended");
}

// Parts on their way: in the descriptor, or in messages of their own.
typedef struct tpr_cuda_ipc_parts { uint8_t bytes[TPR_CUDA_WIRE_CONTROL + 4032]; size_t count; } tpr_cuda_ipc_parts;

static void tpr_cuda_ipc_add_part(tpr_cuda_ipc_parts *parts, const tpr_cuda_wire_part *part) {
    tpr_cuda_wire_write_part(parts->bytes + TPR_CUDA_WIRE_CONTROL + parts->count++ * TPR_CUDA_WIRE_PART, part);
}

static void tpr_cuda_ipc_say_parts(tpr_cuda_batch *send, tpr_cuda_ipc_parts *parts) {
    tpr_cuda_wire_message message = TPR_CUDA_ZERO;
    message.kind = TPR_CUDA_WIRE_PARTS_OF;
    message.id = send->id;
    message.size = parts->count;
    tpr_cuda_wire_write(parts->bytes, &message);
    if (parts->count)
        tprpc_link_control(send->end->link, parts->bytes, TPR_CUDA_WIRE_CONTROL + parts->count * TPR_CUDA_WIRE_PART,
                           NULL, 0);
}

// A send's buffers from `first` on that lie one behind the other and are on one stream, so that they are one part.
// *size: of all. *next: the first that is not of them.
static void tpr_cuda_ipc_neighbours(const tpr_cuda_batch *send, size_t first, size_t *size, size_t *next) {
    const tprpc_buffer *buffer = &send->buffers[first];
    size_t i = first + 1;
    *size = buffer->size;
    for (; i < send->count; i++) {
        const tprpc_buffer *other = &send->buffers[i];
        if (other->size && (send->order_of[i] != send->order_of[first] || other->data != (char *)buffer->data + *size))
            break;
        *size += other->size;
    }
    *next = i;
}

// Whether a send of registered memory is small tensors that lie here and there: they travel faster packed together.
static bool tpr_cuda_ipc_scattered(const tpr_cuda_batch *send) {
    size_t parts = 0;
    if (send->total / send->count > TPR_CUDA_KERNELS_SMALL) return false;
    for (size_t i = 0, size; i < send->count && parts <= TPR_CUDA_WIRE_PARTS; parts++)
        tpr_cuda_ipc_neighbours(send, i, &size, &i);
    return parts > TPR_CUDA_WIRE_PARTS;
}

// Direct: the next buffers as parts, as many as a message holds.
static tprpc_status tpr_cuda_ipc_direct_parts(tpr_cuda_batch *send, tpr_cuda_ipc_parts *parts, tprpc_error *error) {
    tpr_cuda_ipc_end *end = tpr_cuda_ipc_end_of(send);
    tpr_cuda_device_set *set = send->end->net->queue->set;
    while (send->buffer < send->count && parts->count < TPR_CUDA_WIRE_PARTS) {
        const tprpc_buffer *buffer = &send->buffers[send->buffer];
        const tpr_cuda_batch_order *order = &send->orders[send->order_of[send->buffer]];
        tpr_cuda_wire_part part;
        size_t size = 0, next = send->buffer + 1;
        bool last = true;
        if (!buffer->size) {
            send->buffer = next;
            continue;
        }
        tpr_cuda_ipc_neighbours(send, send->buffer, &size, &next);
        tpr_cuda_device_export *export_ = tpr_cuda_export_hold(set, buffer->device.index, buffer->data, size);
        if (!export_) {                // they are neighbours by chance
            next = send->buffer + 1;
            size = buffer->size;
            export_ = tpr_cuda_export_hold(set, buffer->device.index, buffer->data, size);
        }
        if (!export_) return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "cuda_ipc: memory was unregistered");
        const tprpc_status status = tpr_cuda_ipc_tell(end, export_, error);
        tpr_cuda_export_drop(set, export_);   // the link has it now
        if (status != TPRPC_OK) return status;
        for (size_t i = next; last && i < send->count; i++)
            last = !send->buffers[i].size || &send->orders[send->order_of[i]] != order;
        part.export_id = export_->id;
        part.from = (uintptr_t)buffer->data - export_->at;
        part.at = send->moved;
        part.size = size;
        part.seq = order->seq;
        part.slot = order->slot;
        part.flags = (order->busy ? (uint32_t)TPR_CUDA_WIRE_PART_WAITS : 0) |
                     (last ? (uint32_t)TPR_CUDA_WIRE_PART_LAST : 0);
        tpr_cuda_ipc_add_part(parts, &part);
        send->moved += size;
        send->buffer = next;
    }
    return TPRPC_OK;
}

// Gives each stream of a direct send a slot, whose word it writes when it has come so far; of a late one, a stream of
// ours does that has come so far as it had when the send began.
static tprpc_status tpr_cuda_ipc_direct_orders(tpr_cuda_batch *send, tprpc_error *error) {
    tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(send)->words;
    const tpr_cuda_device_set *set = link->queue->set;
    tprpc_status status = TPRPC_OK;
    for (uint32_t i = 0; i < send->order_count && status == TPRPC_OK; i++) {
        tpr_cuda_batch_order *order = &send->orders[i];
        status = tpr_cuda_batch_enter(send->end, order->device, error);
        if (status != TPRPC_OK) break;
        status = tpr_cuda_arena_pin(set, &link->mine.memory, order->device, error);
        if (status == TPRPC_OK && !tpr_cuda_word_take(link, &order->slot, &order->seq))
            status = tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "cuda_ipc: too many transfers are under way");
        tpr_cuda_driver_stream stream = order->stream;
        if (status == TPRPC_OK && order->event) {
            status = tpr_cuda_stream_own(link->queue, order->device, &stream, error);
            if (status == TPRPC_OK)
                status = TPR_CUDA_DRIVER_CALL(set->cu, cuStreamWaitEvent, (stream, order->event, 0), error);
        }
        if (status == TPRPC_OK && order->busy)
            status = tpr_cuda_word_write(set, &link->mine, order->slot, false, order->seq, stream, error);
    }
    tpr_cuda_batch_leave(send->end);
    return status;
}

// Queues the copy of the next bytes of a send into a chunk, on a stream of its outbox's device, which is entered.
static tprpc_status tpr_cuda_ipc_pack(tpr_cuda_batch *send, tpr_cuda_outbox_chunk *chunk, tprpc_error *error) {
    tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(send)->words;
    const tpr_cuda_device_set *set = link->queue->set;
    tpr_cuda_device *device = send->orders[0].device;
    tprpc_status status = TPRPC_OK;
    chunk->offset = send->moved;
    chunk->length = 0;
    tpr_cuda_batch_advance(send, 0);
    while (send->buffer < send->count && chunk->length < chunk->size && status == TPRPC_OK) {
        const size_t size = tpr_cuda_batch_run(send, chunk->size - chunk->length);
        status = tpr_cuda_batch_copy(send->end, send->count, device, chunk->box->base + chunk->at + chunk->length,
                                     device, (uintptr_t)send->buffers[send->buffer].data + send->at, size,
                                     send->stream, error);
        chunk->length += size;
        tpr_cuda_batch_advance(send, size);
    }
    send->moved += chunk->length;
    if (status == TPRPC_OK) status = tpr_cuda_batch_flush(send->end, error);
    else tpr_cuda_batch_flush(send->end, NULL);
    if (status == TPRPC_OK)
        status = tpr_cuda_word_write(set, &link->mine, chunk->slot, false, chunk->seq, send->stream, error);
    return status;
}

static void tpr_cuda_ipc_chunk_part(const tpr_cuda_outbox_chunk *chunk, tpr_cuda_ipc_parts *parts) {
    tpr_cuda_wire_part part;
    part.export_id = chunk->box->export_->id;
    part.from = chunk->at;
    part.at = chunk->offset;
    part.size = chunk->length;
    part.seq = chunk->seq;
    part.slot = chunk->slot;
    part.flags = TPR_CUDA_WIRE_PART_WAITS | TPR_CUDA_WIRE_PART_LAST;
    tpr_cuda_ipc_add_part(parts, &part);
}

// The stream that packs: the sender's own where there is one and a chunk does, at once; else one of ours, behind all of
// his.
static tprpc_status tpr_cuda_ipc_pack_stream(tpr_cuda_batch *send, bool his, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    if (his) send->stream = send->orders[0].stream;
    if (his) return TPRPC_OK;
    tprpc_status status = tpr_cuda_stream_own(queue, send->orders[0].device, &send->stream, error);
    for (uint32_t i = 0; i < send->order_count && status == TPRPC_OK; i++) {
        tpr_cuda_batch_order *order = &send->orders[i];
        if (!order->busy) continue;
        if (!order->event) status = tpr_cuda_stream_record(queue, order->device, order->stream, &order->event, error);
        if (status == TPRPC_OK)
            status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (send->stream, order->event, 0), error);
    }
    return status;
}

// All of a send is packed: what its streams do next comes after that.
static tprpc_status tpr_cuda_ipc_packed(tpr_cuda_batch *send, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    tpr_cuda_driver_event event = NULL;
    if (send->stream == send->orders[0].stream) return TPRPC_OK;
    tprpc_status status = tpr_cuda_stream_record(queue, send->orders[0].device, send->stream, &event, error);
    for (uint32_t i = 0; i < send->order_count && status == TPRPC_OK; i++) {
        tpr_cuda_batch_order *order = &send->orders[i];
        status = tpr_cuda_device_check_stream(queue->set, order->device, order->stream, error);
        if (status == TPRPC_OK)
            status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (order->stream, event, 0), error);
    }
    tpr_cuda_stream_event_back(queue, send->orders[0].device, event);
    return status;
}

// Has what comes next on a send's stream wait until a chunk was read, to fill it again.
static tprpc_status tpr_cuda_ipc_wait_read(tpr_cuda_batch *send, tpr_cuda_outbox_chunk *chunk, tprpc_error *error) {
    tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(send)->words;
    const tprpc_status status =
        tpr_cuda_word_wait(link->queue->set, &link->mine, chunk->slot, true, chunk->seq, send->stream, error);
    tpr_cuda_word_tend(&tpr_cuda_ipc_net_of(send)->tender);
    if (status == TPRPC_OK) chunk->seq = tpr_cuda_word_again(link, chunk->slot);
    return status;
}

// Packs as much as there are more chunks for; none: the parts stay empty. asked: the receiver waits. The device is
// entered.
static tprpc_status tpr_cuda_ipc_pack_some(tpr_cuda_batch *send, bool asked, tpr_cuda_ipc_parts *parts,
                                           tprpc_error *error) {
    tpr_cuda_ipc_end *end = tpr_cuda_ipc_end_of(send);
    tpr_cuda_outbox *box;
    tprpc_status status = tpr_cuda_outbox_of(end->batch.net->queue, send->orders[0].device, send->total, &box, error);
    for (int i = 0; i < TPR_CUDA_BATCH_BOXES && send->moved < send->total && status == TPRPC_OK; i++) {
        bool busy = false;
        if (send->boxes[i]) continue;
        send->boxes[i] = tpr_cuda_outbox_take(box, end->words, send->total - send->moved, asked, &busy);
        if (!send->boxes[i]) break;
        if (!send->stream_set)
            status = tpr_cuda_ipc_pack_stream(send, send->order_count == 1 && send->total <= send->boxes[i]->size,
                                              error);
        send->stream_set = true;
        if (status == TPRPC_OK && busy) status = tpr_cuda_ipc_wait_read(send, send->boxes[i], error);
        if (status == TPRPC_OK) status = tpr_cuda_ipc_pack(send, send->boxes[i], error);
        if (status == TPRPC_OK) tpr_cuda_ipc_chunk_part(send->boxes[i], parts);
    }
    if (status == TPRPC_OK && send->moved == send->total) status = tpr_cuda_ipc_packed(send, error);
    return status;
}

// Begins to pack. Where there is no chunk it goes on when the receiver says that he is ready. late: he is. The device
// is entered.
static tprpc_status tpr_cuda_ipc_pack_first(tpr_cuda_batch *send, bool late, tpr_cuda_ipc_parts *parts,
                                            tprpc_error *error) {
    tpr_cuda_ipc_end *end = tpr_cuda_ipc_end_of(send);
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    tpr_cuda_outbox *box;
    tprpc_status status = tpr_cuda_arena_pin(queue->set, &end->words->mine.memory, send->orders[0].device, error);
    if (status == TPRPC_OK) status = tpr_cuda_outbox_of(queue, send->orders[0].device, send->total, &box, error);
    if (status == TPRPC_OK) status = tpr_cuda_ipc_tell(end, box->export_, error);
    if (status == TPRPC_OK && late) status = tpr_cuda_ipc_pack_stream(send, false, error);
    send->stream_set = late;
    if (status == TPRPC_OK && (!late || tpr_cuda_base_list_empty(&tpr_cuda_ipc_net_of(send)->starved)))
        status = tpr_cuda_ipc_pack_some(send, late, parts, error);
    if (status == TPRPC_OK && !send->stream_set) status = tpr_cuda_ipc_pack_stream(send, false, error);
    send->stream_set = true;
    return status;
}

// The receiver is ready, and a chunk may be free. False: none is.
static bool tpr_cuda_ipc_start(tpr_cuda_batch *send) {
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    tpr_cuda_device_guard guard;
    tpr_cuda_ipc_parts parts;
    tprpc_error error = TPR_CUDA_ZERO;
    parts.count = 0;
    tprpc_status status = tpr_cuda_device_enter(queue->set, send->orders[0].device, &guard, &error);
    if (status == TPRPC_OK) {
        status = tpr_cuda_ipc_pack_some(send, true, &parts, &error);
        tpr_cuda_device_leave(queue->set, &guard);
    }
    if (status == TPRPC_OK && !parts.count) return false;
    send->lent++;
    if (status == TPRPC_OK) tpr_cuda_ipc_say_parts(send, &parts);
    else tpr_cuda_batch_send_failed(send, status, &error);
    send->lent--;
    tpr_cuda_batch_settle(send);
    return true;
}

// What was offered is not fetched, or fetched no more: its slots are not used again, for a word may still be written.
static void tpr_cuda_ipc_forget(tpr_cuda_batch *send) {
    tpr_cuda_ipc_end *end = tpr_cuda_ipc_end_of(send);
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    for (uint32_t i = 0; i < send->order_count; i++) {
        tpr_cuda_batch_order *order = &send->orders[i];
        if (send->fetched) continue;
        if (order->seq) end->words->mine.said[order->slot] = order->seq + TPR_CUDA_IPC_NEVER;
        order->seq = 0;
        tpr_cuda_device_guard guard;
        if (send->over || send->way == TPR_CUDA_IPC_ASKED || !order->busy || order->event ||
            tpr_cuda_device_enter(queue->set, order->device, &guard, NULL) != TPRPC_OK) continue;
        if (!tpr_cuda_device_captures(queue->set, order->stream))   // it is asked for instead, in this order
            tpr_cuda_stream_record(queue, order->device, order->stream, &order->event, NULL);
        tpr_cuda_device_leave(queue->set, &guard);
    }
    for (int i = 0; i < TPR_CUDA_BATCH_BOXES; i++) {
        if (send->boxes[i]) send->boxes[i]->held = false;
        if (send->boxes[i] && send->way == TPR_CUDA_IPC_OUTBOX && !send->fetched) {
            end->words->mine.said[send->boxes[i]->slot] = send->boxes[i]->seq + TPR_CUDA_IPC_NEVER;
            send->boxes[i]->dropped = true;
        }
        send->boxes[i] = NULL;
    }
    if (!send->over && send->way != TPR_CUDA_IPC_ASKED) send->moved = 0;
    send->way = TPR_CUDA_IPC_ASKED;
}

// Whether all of a send is registered and is better read where it is. *one: it is on one device.
static bool tpr_cuda_ipc_is_direct(const tpr_cuda_batch *send, bool *one) {
    tpr_cuda_device_set *set = send->end->net->queue->set;
    bool direct = true;
    *one = true;
    tpr_cuda_os_lock_take(&set->lock);
    for (size_t i = 0; i < send->count; i++) {
        const tprpc_buffer *buffer = &send->buffers[i];
        if (!buffer->size) continue;
        direct = direct && tpr_cuda_export_of(set, buffer->device.index, buffer->data, buffer->size);
        *one &= buffer->device.index == send->orders[0].device->index;
    }
    tpr_cuda_os_lock_give(&set->lock);
    return direct && !(*one && tpr_cuda_ipc_scattered(send));
}

// Decides which way a send goes, and makes its first parts.
static tprpc_status tpr_cuda_ipc_begin(tpr_cuda_batch *send, bool late, tpr_cuda_ipc_parts *parts,
                                       tprpc_error *error) {
    const tpr_cuda_device_set *set = send->end->net->queue->set;
    tpr_cuda_device_guard guard;
    bool one;
    const bool direct = tpr_cuda_ipc_is_direct(send, &one);
    send->way = direct ? TPR_CUDA_IPC_DIRECT : TPR_CUDA_IPC_OUTBOX;
    if (!direct && !one)
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "cuda_ipc: memory of several devices that is not registered");
    if (direct) {
        const tprpc_status status = tpr_cuda_ipc_direct_orders(send, error);
        return status == TPRPC_OK ? tpr_cuda_ipc_direct_parts(send, parts, error) : status;
    }
    tpr_cuda_batch_leave(send->end);   // to tell the peer of an outbox may run what is not ours
    tprpc_status status = tpr_cuda_device_enter(set, send->orders[0].device, &guard, error);
    if (status != TPRPC_OK) return status;
    status = tpr_cuda_ipc_pack_first(send, late, parts, error);
    tpr_cuda_device_leave(set, &guard);
    return status;
}

// Of a send that is late: marks how far its streams are, and nothing else.
static tprpc_status tpr_cuda_ipc_put_off(tpr_cuda_batch *send, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    tprpc_status status = TPRPC_OK;
    send->way = TPR_CUDA_IPC_LATE;
    for (uint32_t i = 0; i < send->order_count && status == TPRPC_OK; i++) {
        tpr_cuda_batch_order *order = &send->orders[i];
        tpr_cuda_device_guard guard;
        if (!order->busy) continue;
        status = tpr_cuda_device_enter(queue->set, order->device, &guard, error);
        if (status != TPRPC_OK) break;
        status = tpr_cuda_stream_record(queue, order->device, order->stream, &order->event, error);
        tpr_cuda_device_leave(queue->set, &guard);
    }
    return status;
}

// The descriptor: the devices that the send is on, and its first parts.
static tprpc_status tpr_cuda_ipc_offer(tpr_cuda_batch *send, uint8_t *descriptor, size_t *size, tprpc_error *error) {
    tpr_cuda_ipc_end *end = tpr_cuda_ipc_end_of(send);
    tpr_cuda_ipc_parts parts;
    uint64_t devices = 0;
    bool proven = false, one;
    parts.count = 0;
    tprpc_status status = tpr_cuda_word_make(end->words, error);
    if (status == TPRPC_OK) status = tpr_cuda_ipc_tell_words(end, error);
    if (status == TPRPC_OK && !tpr_cuda_ipc_is_direct(send, &one) && !one)
        status = tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                                 "cuda_ipc: memory of several devices that is not registered");
    if (status == TPRPC_OK) status = tpr_cuda_ipc_show_all(send, &devices, &proven, error);
    if (status != TPRPC_OK) return status;
    status = proven ? tpr_cuda_ipc_begin(send, false, &parts, error) : tpr_cuda_ipc_put_off(send, error);
    if (status != TPRPC_OK) {
        send->over = true;
        tpr_cuda_ipc_forget(send);
        return status;
    }
    *size = TPR_CUDA_WIRE_DEVICES + parts.count * TPR_CUDA_WIRE_PART;
    tpr_cuda_wire_store(descriptor, devices, TPR_CUDA_WIRE_DEVICES);
    memcpy(descriptor + TPR_CUDA_WIRE_DEVICES, parts.bytes + TPR_CUDA_WIRE_CONTROL, parts.count * TPR_CUDA_WIRE_PART);
    return TPRPC_OK;
}

// The receiver of a late send is ready, with those devices. Where they have not proven themselves, or there is no
// memory for an outbox, he is to ask.
static void tpr_cuda_ipc_go_ahead(tpr_cuda_batch *send, uint64_t devices) {
    tpr_cuda_ipc_parts parts;
    tprpc_error error = TPR_CUDA_ZERO;
    parts.count = 0;
    if (!tpr_cuda_ipc_proven(send, devices) || tpr_cuda_ipc_begin(send, true, &parts, &error) != TPRPC_OK) {
        tpr_cuda_ipc_forget(send);
        tpr_cuda_batch_say(send->end, TPR_CUDA_WIRE_ASK, send->id, 0, 0, 0, NULL);
    } else if (parts.count) {
        tpr_cuda_ipc_say_parts(send, &parts);
    } else {
        tpr_cuda_ipc_put(send, &tpr_cuda_ipc_net_of(send)->starved);
    }
}

// The peer has queued the read of a chunk: the next bytes go into it, behind that.
static tprpc_status tpr_cuda_ipc_refill(tpr_cuda_batch *send, tpr_cuda_outbox_chunk *chunk, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = send->end->net->queue;
    tpr_cuda_device *device = send->orders[0].device;
    tpr_cuda_ipc_parts parts;
    tpr_cuda_device_guard guard;
    tprpc_status status = tpr_cuda_device_enter(queue->set, device, &guard, error);
    if (status != TPRPC_OK) return status;
    parts.count = 0;
    if (tpr_cuda_base_list_empty(&tpr_cuda_ipc_net_of(send)->starved))   // more chunks first, where nobody has none
        status = tpr_cuda_ipc_pack_some(send, true, &parts, error);
    if (status == TPRPC_OK && send->moved < send->total) {
        status = tpr_cuda_ipc_wait_read(send, chunk, error);
        if (status == TPRPC_OK) status = tpr_cuda_ipc_pack(send, chunk, error);
        if (status == TPRPC_OK && send->moved == send->total) status = tpr_cuda_ipc_packed(send, error);
        if (status == TPRPC_OK) tpr_cuda_ipc_chunk_part(chunk, &parts);
    }
    tpr_cuda_device_leave(queue->set, &guard);
    if (status == TPRPC_OK) tpr_cuda_ipc_say_parts(send, &parts);
    return status;
}

// The peer goes on with a send.
static void tpr_cuda_ipc_took(tpr_cuda_batch *send, const tpr_cuda_wire_message *message) {
    const uint64_t offset = message->offset;
    tprpc_error error = TPR_CUDA_ZERO;
    tprpc_status status = TPRPC_OK;
    if (send->over || send->way == TPR_CUDA_IPC_ASKED || send->moved == send->total) return;
    send->lent++;
    if (send->way == TPR_CUDA_IPC_LATE) {
        tpr_cuda_ipc_go_ahead(send, message->size);
    } else if (send->way == TPR_CUDA_IPC_DIRECT) {
        tpr_cuda_ipc_parts parts;
        for (parts.count = 0; send->moved < send->total && status == TPRPC_OK; parts.count = 0) {
            status = tpr_cuda_ipc_direct_parts(send, &parts, &error);
            tpr_cuda_ipc_say_parts(send, &parts);
        }
    }
    else if (send->way == TPR_CUDA_IPC_OUTBOX && !send->boxes[0] && tpr_cuda_base_list_empty(&send->hunger))
        tpr_cuda_ipc_put(send, &tpr_cuda_ipc_net_of(send)->starved);
    for (int i = 0; send->way == TPR_CUDA_IPC_OUTBOX && i < TPR_CUDA_BATCH_BOXES; i++) {
        if (!send->boxes[i] || send->boxes[i]->offset != offset) continue;
        status = tpr_cuda_ipc_refill(send, send->boxes[i], &error);
        break;
    }
    if (status != TPRPC_OK) tpr_cuda_batch_send_failed(send, status, &error);
    send->lent--;
    tpr_cuda_batch_settle(send);
}

// The peer has queued all reads: what the sender's streams do next comes after them.
static void tpr_cuda_ipc_fetched(tpr_cuda_batch *send) {
    tpr_cuda_ipc_net *net = tpr_cuda_ipc_net_of(send);
    tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(send)->words;
    bool slow = false;
    send->fetched = true;
    for (int i = 0; i < TPR_CUDA_BATCH_BOXES; i++)
        if (send->boxes[i]) link->mine.waits[send->boxes[i]->slot] = send->boxes[i]->seq;
    for (uint32_t i = 0; i < send->order_count && send->way == TPR_CUDA_IPC_DIRECT; i++) {
        tpr_cuda_batch_order *order = &send->orders[i];
        tpr_cuda_device_guard guard;
        if (!order->seq || tpr_cuda_word_reached(tpr_cuda_word_done(&link->mine, order->slot), order->seq)) {
            order->seq = 0;
            continue;
        }
        tpr_cuda_word_tend(&net->tender);
        if (tpr_cuda_device_enter(link->queue->set, order->device, &guard, NULL) != TPRPC_OK) continue;
        if (!tpr_cuda_device_captures(link->queue->set, order->stream) &&
            tpr_cuda_word_wait(link->queue->set, &link->mine, order->slot, true, order->seq, order->stream, NULL) ==
                TPRPC_OK) order->seq = 0;
        slow |= order->seq != 0;
        tpr_cuda_device_leave(link->queue->set, &guard);
    }
    if (!slow) return;
    send->lent++;                      // the host looks at the words
    tpr_cuda_ipc_put(send, &net->slow);
}

// Ends sends whose words were to be looked at.
static bool tpr_cuda_ipc_look_slow(tpr_cuda_ipc_net *net) {
    bool did = false;
    for (tpr_cuda_base_list *node = net->slow.next, *next; node != &net->slow; node = next) {
        tpr_cuda_batch *send = TPR_CUDA_OF(node, tpr_cuda_batch, hunger);
        const tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(send)->words;
        bool all = true;
        next = node->next;
        for (uint32_t i = 0; i < send->order_count && all; i++)
            all = !send->orders[i].seq ||
                  tpr_cuda_word_reached(tpr_cuda_word_done(&link->mine, send->orders[i].slot), send->orders[i].seq);
        if (!all) continue;
        did = true;
        for (uint32_t i = 0; i < send->order_count; i++) send->orders[i].seq = 0;
        tpr_cuda_base_list_remove(node);
        send->lent--;
        tpr_cuda_batch_settle(send);
        next = net->slow.next;         // others may have gone with it
    }
    return did;
}

// ---- receiving

// One of our streams, which comes behind all streams of a receive.
static tprpc_status tpr_cuda_ipc_join(tpr_cuda_batch *receive, tpr_cuda_driver_stream *out, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    tprpc_status status = tpr_cuda_batch_enter(receive->end, receive->orders[0].device, error);
    if (status == TPRPC_OK) status = tpr_cuda_stream_own(queue, receive->orders[0].device, out, error);
    for (uint32_t i = 0; i < receive->order_count && status == TPRPC_OK; i++) {
        const tpr_cuda_batch_order *order = &receive->orders[i];
        tpr_cuda_driver_event event = NULL;
        status = tpr_cuda_batch_enter(receive->end, order->device, error);
        if (status != TPRPC_OK) break;
        status = tpr_cuda_stream_record(queue, order->device, order->stream, &event, error);
        if (status == TPRPC_OK)
            status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (*out, event, 0), error);
        tpr_cuda_stream_event_back(queue, order->device, event);
    }
    return status;
}

// Which stream fetches a part: the receive's; or, of a large one of several, one of ours, so that the way to the next
// part's copy does not stand between the two. That one comes behind what was on the receive's when it began.
static tprpc_status tpr_cuda_ipc_fetch_stream(tpr_cuda_batch *receive, const tpr_cuda_wire_part *part,
                                              tpr_cuda_driver_stream *out, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    tpr_cuda_batch_order *order = &receive->orders[receive->order_of[receive->buffer]];
    const uint32_t flags = TPR_CUDA_WIRE_PART_WAITS | TPR_CUDA_WIRE_PART_LAST;
    tprpc_status status = TPRPC_OK;
    *out = receive->stream ? receive->stream : order->stream;
    if (receive->stream || receive->order_count > 1 || part->size < TPR_CUDA_IPC_LARGE ||
        part->size == receive->total || (part->flags & flags) != flags) return TPRPC_OK;
    if (!order->event) status = tpr_cuda_stream_record(queue, order->device, order->stream, &order->event, error);
    if (status == TPRPC_OK) status = tpr_cuda_stream_own(queue, order->device, out, error);
    if (status == TPRPC_OK)
        status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (*out, order->event, 0), error);
    if (status == TPRPC_OK) receive->stream = *out;
    return status;
}

// A part has been fetched by a stream of ours: the receive's comes behind it, even where something failed.
static tprpc_status tpr_cuda_ipc_rejoin(tpr_cuda_batch *receive, tprpc_error *error) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    const tpr_cuda_batch_order *order = &receive->orders[0];
    tpr_cuda_driver_event event = NULL;
    tpr_cuda_device_guard guard;
    tprpc_status status = tpr_cuda_device_enter(queue->set, order->device, &guard, error);
    if (status == TPRPC_OK) {
        status = tpr_cuda_stream_record(queue, order->device, receive->stream, &event, error);
        if (status == TPRPC_OK)
            status = TPR_CUDA_DRIVER_CALL(queue->set->cu, cuStreamWaitEvent, (order->stream, event, 0), error);
        tpr_cuda_stream_event_back(queue, order->device, event);
        tpr_cuda_device_leave(queue->set, &guard);
    }
    receive->stream = NULL;
    return status;
}

// Has the sender's word written when all copies of the receive that were queued are done. Where the sender waited for
// nothing this is not on the receive's stream, where it would take a third of the time of a small copy.
static tprpc_status tpr_cuda_ipc_write_done(tpr_cuda_batch *receive, const tpr_cuda_wire_part *part,
                                            tprpc_error *error) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(receive)->words;
    tpr_cuda_driver_stream stream = receive->stream ? receive->stream : receive->orders[0].stream;
    const bool beside = receive->order_count > 1 || !(part->flags & TPR_CUDA_WIRE_PART_WAITS);
    tprpc_status status = beside ? tpr_cuda_ipc_join(receive, &stream, error) : TPRPC_OK;
    if (status == TPRPC_OK) status = tpr_cuda_batch_enter(receive->end, receive->orders[0].device, error);
    if (status != TPRPC_OK) return status;
    status = tpr_cuda_word_write(queue->set, &link->theirs, part->slot, true, part->seq, stream, error);
    tpr_cuda_word_tend(&tpr_cuda_ipc_net_of(receive)->tender);
    return status;
}

// Where a device of ours sees memory of a device of the peer; 0: that is not proven, or cannot be opened, which undoes
// the proof. The device is entered.
static tpr_cuda_driver_ptr tpr_cuda_ipc_reach(tpr_cuda_batch *receive, tpr_cuda_ipc_import *import,
                                              const tpr_cuda_device *device) {
    tpr_cuda_ipc_seen *seen = tpr_cuda_ipc_seen_of(tpr_cuda_ipc_end_of(receive), import->device);
    int32_t code = 0;
    if (!seen || !(seen->good & UINT64_C(1) << device->index)) return 0;
    const tpr_cuda_driver_ptr at = tpr_cuda_ipc_open_import(receive->end->net->queue, import, device, &code);
    if (code) tpr_cuda_ipc_answer(seen, device->index, NULL, code);
    return at;
}

// Queues the copy of `size` bytes of a part, from `skip` on, to where they go in the receive's current buffer. *can:
// whether the peer's memory could be opened.
static tprpc_status tpr_cuda_ipc_copy(tpr_cuda_batch *receive, tpr_cuda_ipc_import *import,
                                      const tpr_cuda_wire_part *part, uint64_t skip, size_t size, bool *can,
                                      tprpc_error *error) {
    tpr_cuda_stream_queue *queue = receive->end->net->queue;
    tpr_cuda_word_link *link = tpr_cuda_ipc_end_of(receive)->words;
    const tprpc_buffer *buffer = &receive->buffers[receive->buffer];
    tpr_cuda_batch_order *order = &receive->orders[receive->order_of[receive->buffer]];
    tprpc_status status = tpr_cuda_batch_enter(receive->end, order->device, error);
    if (status != TPRPC_OK) return status;
    tpr_cuda_driver_stream stream = order->stream;
    if (!receive->fresh) status = tpr_cuda_device_check_stream(queue->set, order->device, buffer->stream, error);
    const tpr_cuda_driver_ptr from = status == TPRPC_OK ? tpr_cuda_ipc_reach(receive, import, order->device) : 0;
    if (status == TPRPC_OK && !from) *can = false;
    if (status == TPRPC_OK && from) status = tpr_cuda_arena_pin(queue->set, &link->theirs.memory, order->device, error);
    if (status == TPRPC_OK && from) status = tpr_cuda_ipc_fetch_stream(receive, part, &stream, error);
    const bool waits = (part->flags & TPR_CUDA_WIRE_PART_WAITS) && order->seq != part->seq;
    if (status == TPRPC_OK && from && waits) {
        status = tpr_cuda_word_wait(queue->set, &link->theirs, part->slot, false, part->seq, stream, error);
        order->seq = part->seq;        // what this stream waited for last
        tpr_cuda_word_tend(&tpr_cuda_ipc_net_of(receive)->tender);
    }
    if (status == TPRPC_OK && from)
        status = tpr_cuda_batch_copy(receive->end, receive->count, order->device,
                                     (uintptr_t)buffer->data + receive->at, NULL, from + part->from + skip, size,
                                     stream, error);
    return status;
}

// Queues the copies of a part; one that a stream of ours makes is then to be rejoined.
static tprpc_status tpr_cuda_ipc_take(tpr_cuda_batch *receive, const tpr_cuda_wire_part *part, bool *can,
                                      tprpc_error *error) {
    tpr_cuda_ipc_import *import = tpr_cuda_ipc_import_of(tpr_cuda_ipc_end_of(receive), part->export_id);
    tprpc_status status = TPRPC_OK;
    uint64_t done = 0;
    if (!import || part->from > import->size || part->size > import->size - part->from || part->at != receive->moved)
        return tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "cuda_ipc: the peer offered memory that it has not");
    tpr_cuda_batch_advance(receive, 0);
    while (done < part->size && receive->buffer < receive->count && *can && status == TPRPC_OK) {
        const size_t size = tpr_cuda_batch_run(receive, part->size - done);
        status = tpr_cuda_ipc_copy(receive, import, part, done, size, can, error);
        if (!*can || status != TPRPC_OK) break;
        done += size;
        tpr_cuda_batch_advance(receive, size);
    }
    if (status != TPRPC_OK || !*can) return status;
    receive->moved += part->size;
    if (part->flags & TPR_CUDA_WIRE_PART_LAST || receive->moved == receive->total)
        status = tpr_cuda_batch_flush(receive->end, error);
    if (status == TPRPC_OK && (part->flags & TPR_CUDA_WIRE_PART_LAST))
        status = tpr_cuda_ipc_write_done(receive, part, error);
    return status;
}

// All of it is to be asked for, also what was queued: that comes first, on the same streams.
static tpr_cuda_batch_outcome tpr_cuda_ipc_again(tpr_cuda_batch *receive) {
    receive->buffer = receive->at = 0;
    receive->moved = 0;
    return TPR_CUDA_BATCH_UNREADABLE;
}

static tpr_cuda_batch_outcome tpr_cuda_ipc_take_parts(tpr_cuda_batch *receive, const uint8_t *bytes, size_t count,
                                                      tprpc_error *error) {
    const tpr_cuda_ipc_end *end = tpr_cuda_ipc_end_of(receive);
    bool can = true;
    for (size_t i = 0; i < count; i++, bytes += TPR_CUDA_WIRE_PART) {
        tpr_cuda_wire_part part;
        tprpc_status status = TPRPC_OK;
        if (!tpr_cuda_wire_read_part(bytes, receive->total, TPR_CUDA_WORD_SLOTS, &part) ||
            !end->words->theirs.memory.base)
            status = tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "cuda_ipc: the peer sent a broken part");
        if (status == TPRPC_OK) status = tpr_cuda_ipc_take(receive, &part, &can, error);
        if (receive->stream) {
            tpr_cuda_batch_leave(receive->end);
            tpr_cuda_batch_flush(receive->end, NULL);   // of one that failed
            const tprpc_status joined = tpr_cuda_ipc_rejoin(receive, status == TPRPC_OK ? error : NULL);
            if (status == TPRPC_OK) status = joined;
        }
        if (status != TPRPC_OK) return TPR_CUDA_BATCH_FAILED;
        if (!can) return tpr_cuda_ipc_again(receive);
        const bool say = (part.flags & TPR_CUDA_WIRE_PART_LAST) || i + 1 == count;
        if (receive->moved == receive->total || !say) continue;
        tpr_cuda_batch_leave(receive->end);
        tpr_cuda_batch_say(receive->end, TPR_CUDA_WIRE_TOOK, receive->id, part.at, 0, 0, NULL);
        if (receive->over) return TPR_CUDA_BATCH_GOING_ON;
    }
    return receive->moved == receive->total ? TPR_CUDA_BATCH_FETCHED : TPR_CUDA_BATCH_GOING_ON;
}

// Takes parts, and tells the sender how far it is.
static tpr_cuda_batch_outcome tpr_cuda_ipc_take_all(tpr_cuda_batch *receive, const uint8_t *bytes, size_t count,
                                                    tprpc_error *error) {
    tprpc_error why = TPR_CUDA_ZERO;
    const tpr_cuda_batch_outcome outcome = tpr_cuda_ipc_take_parts(receive, bytes, count, error);
    tpr_cuda_batch_leave(receive->end);
    const tprpc_status status = tpr_cuda_batch_flush(receive->end, &why);
    if (status == TPRPC_OK || outcome == TPR_CUDA_BATCH_FAILED) return outcome;
    *error = why;
    return TPR_CUDA_BATCH_FAILED;
}

// Begins to read a device of the peer for one of ours, which may fail at once.
static void tpr_cuda_ipc_read_page(tpr_cuda_ipc_net *net, tpr_cuda_ipc_seen *seen, tpr_cuda_device *device) {
    tpr_cuda_device_guard guard;
    tprpc_error error = TPR_CUDA_ZERO;
    int32_t code = 0;
    tprpc_status status = tpr_cuda_device_enter(net->batch.queue->set, device, &guard, &error);
    if (status == TPRPC_OK) {
        const tpr_cuda_driver_ptr at = tpr_cuda_ipc_open_import(net->batch.queue, seen->page, device, &code);
        if (at) status = tpr_cuda_proof_read(&net->reader, device, at, &error);
        tpr_cuda_device_leave(net->batch.queue->set, &guard);
    }
    if (status != TPRPC_OK) code = error.os_code;
    if (status == TPRPC_ERROR_LIMIT) code = TPR_CUDA_DRIVER_ERROR_OUT_OF_MEMORY;
    if (!net->reader.busy) {
        tpr_cuda_ipc_answer(seen, device->index, NULL, code);
        return;
    }
    net->reads = seen;
    net->reads_by = device->index;
    net->proving = seen->end->words;
    net->proving->proving = true;
}

typedef enum tpr_cuda_ipc_state { TPR_CUDA_IPC_PROVEN, TPR_CUDA_IPC_OPEN, TPR_CUDA_IPC_REFUTED } tpr_cuda_ipc_state;

// Whether the devices of a receive read those of the peer; what is not known is being found out. late: for too long.
static tpr_cuda_ipc_state tpr_cuda_ipc_look_at(tpr_cuda_batch *receive, uint64_t devices, bool late) {
    tpr_cuda_ipc_net *net = tpr_cuda_ipc_net_of(receive);
    tpr_cuda_ipc_state state = TPR_CUDA_IPC_PROVEN;
    for (uint32_t k = 0; k < TPR_CUDA_WIRE_DEVICE_MOST && devices >> k; k++) {
        if (!(devices & UINT64_C(1) << k)) continue;
        tpr_cuda_ipc_seen *seen = tpr_cuda_ipc_see(tpr_cuda_ipc_end_of(receive), k);
        for (uint32_t i = 0; i < receive->order_count; i++) {
            tpr_cuda_device *device = receive->orders[i].device;
            const uint64_t bit = UINT64_C(1) << device->index;
            if (seen && (seen->good & bit)) continue;
            tpr_cuda_batch_leave(receive->end);
            if (seen && !late && !((seen->good | seen->bad) & bit) && seen->page && !net->reader.busy)
                tpr_cuda_ipc_read_page(net, seen, device);
            if (seen && late && !(seen->good & bit))
                tpr_cuda_ipc_answer(seen, device->index, NULL, TPR_CUDA_DRIVER_ERROR_NOT_READY);
            if (!seen || (seen->bad & bit)) return TPR_CUDA_IPC_REFUTED;
            if (!(seen->good & bit)) state = TPR_CUDA_IPC_OPEN;
        }
    }
    return state;
}

static int64_t tpr_cuda_ipc_due(const tpr_cuda_ipc_parked *parked) {
    return parked->since_us + TPR_CUDA_PROOF_LIMIT_US;
}

// Puts a receive aside until more is known.
static tpr_cuda_batch_outcome tpr_cuda_ipc_park(tpr_cuda_batch *receive, const uint8_t *descriptor, size_t size) {
    tpr_cuda_ipc_net *net = tpr_cuda_ipc_net_of(receive);
    tprpc_context *ctx = net->batch.queue->ctx;
    tpr_cuda_ipc_parked *parked = (tpr_cuda_ipc_parked *)receive->held;
    if (!parked) {
        parked = (tpr_cuda_ipc_parked *)tpr_cuda_base_alloc(ctx, sizeof *parked + size);
        if (!parked) return TPR_CUDA_BATCH_UNREADABLE;
        parked->since_us = tprpc_now_us(ctx);
        parked->size = size;
        memcpy(parked->descriptor, descriptor, size);
        receive->held = parked;
    }
    tpr_cuda_ipc_put(receive, &net->parked);
    return TPR_CUDA_BATCH_GOING_ON;
}

static void tpr_cuda_ipc_let_go(tpr_cuda_batch *receive) {
    tpr_cuda_ipc_parked *parked = (tpr_cuda_ipc_parked *)receive->held;
    tpr_cuda_base_free(receive->end->net->queue->ctx, parked, sizeof *parked + parked->size);
}

static tpr_cuda_batch_outcome tpr_cuda_ipc_fetch(tpr_cuda_batch *receive, const uint8_t *descriptor, size_t size,
                                                 tprpc_error *error) {
    const tpr_cuda_ipc_parked *parked = (const tpr_cuda_ipc_parked *)receive->held;
    const size_t rest = size - TPR_CUDA_WIRE_DEVICES;
    uint64_t here = 0;
    if (size < TPR_CUDA_WIRE_DEVICES || rest % TPR_CUDA_WIRE_PART || rest / TPR_CUDA_WIRE_PART > TPR_CUDA_WIRE_PARTS) {
        tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "cuda_ipc: the peer sent a broken descriptor");
        return TPR_CUDA_BATCH_FAILED;
    }
    const uint64_t devices = tpr_cuda_wire_load(descriptor, TPR_CUDA_WIRE_DEVICES);
    const bool late = parked && tprpc_now_us(receive->end->net->queue->ctx) >= tpr_cuda_ipc_due(parked);
    if (!devices) return TPR_CUDA_BATCH_UNREADABLE;
    const tpr_cuda_ipc_state state = tpr_cuda_ipc_look_at(receive, devices, late);
    if (state == TPR_CUDA_IPC_REFUTED) return TPR_CUDA_BATCH_UNREADABLE;
    if (state == TPR_CUDA_IPC_OPEN) return tpr_cuda_ipc_park(receive, descriptor, size);
    for (uint32_t i = 0; i < receive->order_count; i++) here |= UINT64_C(1) << receive->orders[i].device->index;
    if (rest)
        return tpr_cuda_ipc_take_all(receive, descriptor + TPR_CUDA_WIRE_DEVICES, rest / TPR_CUDA_WIRE_PART, error);
    tpr_cuda_batch_leave(receive->end);
    tpr_cuda_batch_say(receive->end, TPR_CUDA_WIRE_TOOK, receive->id, TPR_CUDA_WIRE_NOWHERE, here, 0, NULL);
    return TPR_CUDA_BATCH_GOING_ON;
}

// Something has become known: receives that were put aside go on, or again wait.
static void tpr_cuda_ipc_retry(tpr_cuda_ipc_net *net) {
    tpr_cuda_base_list todo = net->parked;
    if (tpr_cuda_base_list_empty(&net->parked)) return;
    todo.next->prev = todo.prev->next = &todo;
    tpr_cuda_base_list_init(&net->parked);
    while (!tpr_cuda_base_list_empty(&todo)) {
        tpr_cuda_batch *receive = TPR_CUDA_OF(todo.next, tpr_cuda_batch, hunger);
        const tpr_cuda_ipc_parked *parked = (const tpr_cuda_ipc_parked *)receive->held;
        tprpc_error why = TPR_CUDA_ZERO;
        tpr_cuda_base_list_remove(&receive->hunger);
        receive->lent++;
        tpr_cuda_batch_go_on(receive, tpr_cuda_ipc_fetch(receive, parked->descriptor, parked->size, &why), &why);
        receive->lent--;
        tpr_cuda_batch_settle(receive);
    }
}

// A page of a peer has been read, or could not be.
static void tpr_cuda_ipc_page_read(void *user, const uint64_t *words, int32_t code) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)user;
    tpr_cuda_ipc_seen *seen = net->reads;
    net->reads = NULL;
    net->proving->proving = false;     // one that has gone is freed when it is looked after
    if (seen) tpr_cuda_ipc_answer(seen, net->reads_by, code ? NULL : words, code);
    tpr_cuda_ipc_retry(net);
}

// ---- from the twin

static tprpc_status tpr_cuda_ipc_on_export(tpr_cuda_ipc_end *end, const tpr_cuda_wire_message *message,
                                           const uint8_t *more) {
    tpr_cuda_stream_queue *queue = end->batch.net->queue;
    if (tpr_cuda_ipc_import_of(end, message->id) || !message->size) return TPRPC_ERROR_PROTOCOL;
    tpr_cuda_ipc_import *import =
        tpr_cuda_ipc_import_new(queue, message->id, message->size, message->place, more + 16);
    if (!import) return TPRPC_ERROR_MEMORY;
    import->next = end->imports;
    end->imports = import;
    return TPRPC_OK;
}

static tprpc_status tpr_cuda_ipc_on_prove(tpr_cuda_ipc_end *end, const tpr_cuda_wire_message *message,
                                          const uint8_t *more) {
    tpr_cuda_ipc_seen *seen = tpr_cuda_ipc_see(end, (uint32_t)message->id);
    if (!seen) return TPRPC_ERROR_MEMORY;
    if (seen->page) return TPRPC_ERROR_PROTOCOL;
    seen->word = message->place;
    seen->page = tpr_cuda_ipc_import_new(end->batch.net->queue, 0, TPR_CUDA_PROOF_PAGE, message->id, more);
    if (!seen->page) return TPRPC_ERROR_MEMORY;
    tpr_cuda_ipc_retry((tpr_cuda_ipc_net *)(void *)end->batch.net);
    return TPRPC_OK;
}

// Closes what the peer wants to have closed, when nothing reads it any more.
static void tpr_cuda_ipc_close_imports(tpr_cuda_ipc_end *end) {
    for (tpr_cuda_ipc_import **at = &end->imports; *at;) {
        tpr_cuda_ipc_import *import = *at;
        if (!import->closing || tpr_cuda_word_outstanding(&end->words->theirs, false)) {
            at = &import->next;
            continue;
        }
        const uint64_t id = import->id;
        *at = import->next;
        tpr_cuda_ipc_import_free(end->batch.net->queue, import);
        tpr_cuda_batch_say(&end->batch, TPR_CUDA_WIRE_CLOSED, id, 0, 0, 0, NULL);
        at = &end->imports;
    }
}

static void tpr_cuda_ipc_on_closed(tpr_cuda_ipc_end *end, uint64_t id) {
    tpr_cuda_device_set *set = end->batch.net->queue->set;
    for (tpr_cuda_ipc_told **at = &end->told; *at; at = &(*at)->next) {
        tpr_cuda_ipc_told *told = *at;
        if (told->of->id != id || !told->asked_us) continue;
        *at = told->next;
        tpr_cuda_export_drop(set, told->of);
        tpr_cuda_base_free(set->ctx, told, sizeof *told);
        return;
    }
}

static tprpc_status tpr_cuda_ipc_on_parts(tpr_cuda_ipc_end *end, const tpr_cuda_wire_message *message,
                                          const uint8_t *more) {
    tpr_cuda_batch *receive = tpr_cuda_batch_find(&end->batch.receives, message->id);
    tprpc_error error = TPR_CUDA_ZERO;
    if (!receive || receive->over || receive->asked || !tpr_cuda_base_list_empty(&receive->hunger)) return TPRPC_OK;
    receive->lent++;
    tpr_cuda_batch_go_on(receive, tpr_cuda_ipc_take_all(receive, more, (size_t)message->size, &error), &error);
    receive->lent--;
    tpr_cuda_batch_settle(receive);
    return TPRPC_OK;
}

// The peer offers no parts, or no more.
static tprpc_status tpr_cuda_ipc_on_ask(tpr_cuda_ipc_end *end, uint64_t id) {
    tpr_cuda_batch *receive = tpr_cuda_batch_find(&end->batch.receives, id);
    if (!receive || receive->over || receive->asked || receive->refused) return TPRPC_OK;
    tpr_cuda_base_list_remove(&receive->hunger);
    receive->lent++;
    tpr_cuda_batch_go_on(receive, tpr_cuda_ipc_again(receive), NULL);
    receive->lent--;
    tpr_cuda_batch_settle(receive);
    return TPRPC_OK;
}

static tprpc_status tpr_cuda_ipc_control(tpr_cuda_batch_end *batch_end, const tpr_cuda_wire_message *message,
                                         const uint8_t *more, const intptr_t *handles) {
    tpr_cuda_ipc_end *end = (tpr_cuda_ipc_end *)(void *)batch_end;
    tpr_cuda_ipc_import *import;
    tpr_cuda_batch *send;
    switch (message->kind) {
    case TPR_CUDA_WIRE_WORDS:          // that cannot be mapped here: its parts are broken then
        if (end->words->theirs.memory.base || message->size != TPR_CUDA_WORD_SIZE) return TPRPC_ERROR_PROTOCOL;
        tpr_cuda_arena_map(&end->words->theirs.memory, handles[0], TPR_CUDA_WORD_SIZE);
        return TPRPC_OK;
    case TPR_CUDA_WIRE_EXPORT: return tpr_cuda_ipc_on_export(end, message, more);
    case TPR_CUDA_WIRE_UNEXPORT:
        if ((import = tpr_cuda_ipc_import_of(end, message->id)) != NULL) import->closing = true;
        tpr_cuda_ipc_close_imports(end);
        return TPRPC_OK;
    case TPR_CUDA_WIRE_CLOSED:
        tpr_cuda_ipc_on_closed(end, message->id);
        return TPRPC_OK;
    case TPR_CUDA_WIRE_PARTS_OF: return tpr_cuda_ipc_on_parts(end, message, more);
    case TPR_CUDA_WIRE_TOOK:
        if ((send = tpr_cuda_batch_find(&batch_end->sends, message->id)) != NULL)
            tpr_cuda_ipc_took(send, message);
        return TPRPC_OK;
    case TPR_CUDA_WIRE_PROVE: return tpr_cuda_ipc_on_prove(end, message, more);
    case TPR_CUDA_WIRE_PROOF: return tpr_cuda_ipc_on_proof(end, message);
    case TPR_CUDA_WIRE_ASK: return tpr_cuda_ipc_on_ask(end, message->id);
    default: return TPRPC_ERROR_PROTOCOL;
    }
}

// ---- instances and ends

static const tpr_cuda_batch_method tpr_cuda_ipc_method = {
    "cuda_ipc", true, tpr_cuda_ipc_fetch, NULL, tpr_cuda_ipc_let_go, tpr_cuda_ipc_offer, tpr_cuda_ipc_fetched,
    tpr_cuda_ipc_forget, tpr_cuda_ipc_control,
};

// Asks peers to close what is being unregistered; again after a while, for a pipe that has ended says so only then.
static void tpr_cuda_ipc_sweep(tpr_cuda_stream_queue *queue) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)queue->sweeper;
    const int64_t now_us = tprpc_now_us(queue->ctx);
    for (tpr_cuda_base_list *node = net->ends.next, *next; node != &net->ends; node = next) {
        tpr_cuda_ipc_end *end = TPR_CUDA_OF(node, tpr_cuda_ipc_end, node);
        next = node->next;
        for (tpr_cuda_ipc_told *told = end->told, *after; told; told = after) {
            const uint64_t id = told->of->id;
            after = told->next;
            if (!__atomic_load_n(&told->of->closing, __ATOMIC_ACQUIRE)) continue;
            if (told->asked_us && now_us - told->asked_us < TPR_CUDA_WORD_TEND_US) continue;
            told->asked_us = now_us;
            if (tpr_cuda_batch_say(&end->batch, TPR_CUDA_WIRE_UNEXPORT, id, 0, 0, 0, NULL) != TPRPC_OK)
                tpr_cuda_ipc_on_closed(end, id);
        }
    }
}

// Each time that links are tended: imports that wait to be closed.
static void tpr_cuda_ipc_tended(void *user) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)user;
    for (tpr_cuda_base_list *node = net->ends.next, *next; node != &net->ends; node = next) {
        next = node->next;
        tpr_cuda_ipc_close_imports(TPR_CUDA_OF(node, tpr_cuda_ipc_end, node));
    }
}

static tprpc_status tpr_cuda_ipc_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    (void)user;
    const tprpc_status status = tpr_cuda_batch_open(host, &tpr_cuda_ipc_method, sizeof(tpr_cuda_ipc_net), instance,
                                                    error);
    if (status != TPRPC_OK) return status;
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)*instance;
    tpr_cuda_word_tender_init(&net->tender, net->batch.queue);
    net->tender.look = tpr_cuda_ipc_tended;
    net->tender.lent = tpr_cuda_ipc_link_lent;
    net->tender.user = net;
    tpr_cuda_base_list_init(&net->ends);
    tpr_cuda_base_list_init(&net->slow);
    tpr_cuda_base_list_init(&net->starved);
    tpr_cuda_base_list_init(&net->parked);
    net->reader.queue = net->batch.queue;
    net->reader.read = tpr_cuda_ipc_page_read;
    net->reader.user = net;
    tpr_cuda_stream_sweeper(net->batch.queue, tpr_cuda_ipc_sweep, net);
    return TPRPC_OK;
}

// Whether proofs of ours are no longer queued, after a while.
static bool tpr_cuda_ipc_proofs_end(const tpr_cuda_ipc_net *net) {
    bool busy = true;
    for (int64_t waited_us = 0; busy && waited_us < TPR_CUDA_STREAM_CLOSE_US; waited_us += 100) {
        busy = net->reader.busy;
        for (const tpr_cuda_proof_page *page = net->pages; page; page = page->next) busy |= page->writing;
        if (busy && !tpr_cuda_stream_progress(net->batch.queue)) tpr_cuda_os_sleep_us(100);
    }
    return !busy;
}

static void tpr_cuda_ipc_close(void *instance) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)instance;
    tpr_cuda_stream_queue *queue = net->batch.queue;
    tpr_cuda_stream_sweeper(queue, NULL, NULL);
    if (!tpr_cuda_ipc_proofs_end(net) || !tpr_cuda_word_tender_close(&net->tender)) {   // what still runs will touch it
        tprpc_log_text(queue->ctx, TPRPC_LOG_ERROR, "cuda_ipc",
                       "a stream waits for a peer: what it uses is left behind");
        return;
    }
    tpr_cuda_outbox_close(queue);
    while (net->pages) {
        tpr_cuda_proof_page *page = net->pages;
        net->pages = page->next;
        tpr_cuda_proof_page_free(page);
    }
    tpr_cuda_arena_memory_free(queue->set, &net->reader.memory);
    tpr_cuda_batch_close(instance);
}

// When the first of the receives that wait for a proof has waited for too long.
static int64_t tpr_cuda_ipc_parked_until(const tpr_cuda_ipc_net *net) {
    int64_t first = INT64_MAX;
    for (const tpr_cuda_base_list *node = net->parked.next; node != &net->parked; node = node->next) {
        const int64_t due =
            tpr_cuda_ipc_due((const tpr_cuda_ipc_parked *)TPR_CUDA_OF(node, tpr_cuda_batch, hunger)->held);
        if (due < first) first = due;
    }
    return first;
}

static bool tpr_cuda_ipc_progress(void *instance) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)instance;
    bool did = tpr_cuda_ipc_look_slow(net);
    if (!tpr_cuda_base_list_empty(&net->parked) &&
        tpr_cuda_ipc_parked_until(net) <= tprpc_now_us(net->batch.queue->ctx)) tpr_cuda_ipc_retry(net);
    while (!tpr_cuda_base_list_empty(&net->starved)) {
        tpr_cuda_batch *send = TPR_CUDA_OF(net->starved.next, tpr_cuda_batch, hunger);
        tpr_cuda_base_list_remove(&send->hunger);
        if (!tpr_cuda_ipc_start(send)) {
            net->starved.next->prev = &send->hunger;   // first again
            send->hunger.next = net->starved.next;
            send->hunger.prev = &net->starved;
            net->starved.next = &send->hunger;
            break;
        }
        did = true;
    }
    return tpr_cuda_batch_progress(instance) || did;
}

static bool tpr_cuda_ipc_arm(void *instance, int64_t *deadline_us) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)instance;
    if (!tpr_cuda_base_list_empty(&net->slow) || !tpr_cuda_base_list_empty(&net->starved)) {
        const int64_t due = tprpc_now_us(net->batch.queue->ctx) + 1000;
        if (due < *deadline_us) *deadline_us = due;
    }
    const int64_t until = tpr_cuda_ipc_parked_until(net);
    if (until < *deadline_us) *deadline_us = until;
    return tpr_cuda_batch_arm(instance, deadline_us);
}

static size_t tpr_cuda_ipc_domain(void *instance, uint8_t *out, size_t capacity) {
    char boot[40];
    (void)instance;
    tpr_cuda_os_boot_id(boot);
    return (size_t)snprintf((char *)out, capacity, "%.36s", boot);
}

static bool tpr_cuda_ipc_reaches(void *instance, const uint8_t *domain, size_t size) {
    uint8_t own[64];
    const size_t own_size = tpr_cuda_ipc_domain(instance, own, sizeof own);
    return own_size && own_size == size && memcmp(own, domain, size) == 0;
}

static bool tpr_cuda_ipc_moves(void *instance, tprpc_device from, tprpc_device to) {
    (void)instance;
    return from.kind == TPRPC_CUDA && to.kind == TPRPC_CUDA;
}

static tprpc_status tpr_cuda_ipc_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)instance;
    const int32_t process = tprpc_link_process(link);
    if (process <= 0 || !tprpc_link_handles(link))
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0,
                               "the transport passes no handles, or cannot say whose process it is");
    if (process == tpr_cuda_os_pid())
        return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "the peer is in this process");
    tpr_cuda_ipc_end *self = (tpr_cuda_ipc_end *)tpr_cuda_batch_attach(instance, link, sizeof *self, error);
    if (!self) return TPRPC_ERROR_MEMORY;
    const tprpc_status status = tpr_cuda_word_link_new(&net->tender, process, &self->words, error);
    if (status != TPRPC_OK) {
        tpr_cuda_batch_detach(&self->batch, sizeof *self);
        return status;
    }
    self->words->freed = tpr_cuda_ipc_link_freed;
    tpr_cuda_base_list_add(&net->ends, &self->node);
    *end = self;
    return TPRPC_OK;
}

static void tpr_cuda_ipc_detach(void *end) {
    tpr_cuda_ipc_end *self = (tpr_cuda_ipc_end *)end;
    tpr_cuda_ipc_net *net = (tpr_cuda_ipc_net *)(void *)self->batch.net;
    tpr_cuda_device_set *set = self->batch.net->queue->set;
    tpr_cuda_base_list_remove(&self->node);
    while (self->told) {
        tpr_cuda_ipc_told *told = self->told;
        self->told = told->next;
        tpr_cuda_export_drop(set, told->of);
        tpr_cuda_base_free(set->ctx, told, sizeof *told);
    }
    while (self->shown) {
        tpr_cuda_ipc_shown *shown = self->shown;
        self->shown = shown->next;
        tpr_cuda_base_free(set->ctx, shown, sizeof *shown);
    }
    while (self->seen) {
        tpr_cuda_ipc_seen *seen = self->seen;
        self->seen = seen->next;
        if (seen == net->reads) net->reads = NULL;
        if (seen->page) {              // it is closed with the others
            seen->page->next = self->imports;
            self->imports = seen->page;
        }
        tpr_cuda_base_free(set->ctx, seen, sizeof *seen);
    }
    self->words->user = self->imports;
    self->words->arena = self->batch.arena;
    self->words->theirs_arena = self->batch.theirs;
    if (self->batch.arena) self->batch.arena->owner = NULL;
    self->batch.arena = NULL;
    memset(&self->batch.theirs, 0, sizeof self->batch.theirs);
    tpr_cuda_word_link_leave(&net->tender, self->words);
    tpr_cuda_batch_detach(&self->batch, sizeof *self);
}

static const tprpc_channel_table tpr_cuda_ipc_table = {
    (uint32_t)sizeof(tprpc_channel_table), 0, 0, 1, 0, TPR_CUDA_WIRE_DEVICES + TPR_CUDA_WIRE_PARTS * TPR_CUDA_WIRE_PART,
    tpr_cuda_ipc_open, tpr_cuda_ipc_close, tpr_cuda_ipc_domain, tpr_cuda_ipc_reaches,
    tpr_cuda_ipc_progress, tpr_cuda_ipc_arm, NULL, tpr_cuda_ipc_moves,
    tpr_cuda_ipc_attach, tpr_cuda_ipc_detach, NULL, NULL, NULL, tpr_cuda_batch_send, tpr_cuda_batch_recv,
    tpr_cuda_batch_abort, tpr_cuda_batch_control, tpr_cuda_batch_bulk, tpr_cuda_batch_bulk_done, NULL, NULL, NULL, NULL,
    1,
};

static const tprpc_backend tpr_cuda_ipc_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "cuda_ipc",
    "GPU memory of another process of this host, opened and copied in stream order.",
    300, NULL, &tpr_cuda_ipc_table, NULL, NULL,
};

// >>convert -----------------------------------------------------------------------------------------------------------
// Device memory as pipes and agents need it: copied, allocated and given back, in the order of streams. What is sent as
// it is, the channels check.
//
// Uses: driver, device.
// Invariant: memory goes back on the device that it came from, in the order of a stream of that device.

static int32_t tpr_cuda_convert_device_count(void *user) {
    int count = 0;
    (void)user;
    const tpr_cuda_driver *cu = tpr_cuda_driver_get(NULL);
    if (!cu || cu->cuDeviceGetCount(&count) != 0) return 0;
    return count < TPR_CUDA_DEVICE_MOST ? count : TPR_CUDA_DEVICE_MOST;
}

static void *tpr_cuda_convert_stream(void *user, tprpc_context *ctx, tprpc_device name) {
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, NULL);
    tpr_cuda_device *device;
    void *stream = NULL;
    (void)user;
    if (!set || tpr_cuda_device_of(set, name, &device, NULL) != TPRPC_OK) return NULL;
    return tpr_cuda_device_stream(set, device, &stream, NULL) == TPRPC_OK ? stream : NULL;
}

static tprpc_status tpr_cuda_convert_check(tprpc_context *ctx, const tprpc_tensor *tensor, tpr_cuda_device_set **set,
                                           tpr_cuda_device **device, tprpc_error *error) {
    tprpc_buffer buffer = TPR_CUDA_ZERO;
    tprpc_error why = TPR_CUDA_ZERO;
    *set = tpr_cuda_device_find(ctx, &why);
    if (!*set) {
        if (error) *error = why;
        return why.status;
    }
    buffer.data = tensor->data;
    buffer.size = tensor->size;
    buffer.device = tensor->device;
    buffer.stream = tensor->stream;
    tprpc_status status = tpr_cuda_device_of(*set, tensor->device, device, error);
    return status == TPRPC_OK ? tpr_cuda_device_check(*set, &buffer, error) : status;
}

static tprpc_status tpr_cuda_convert_copy(void *user, tprpc_context *ctx, const tprpc_tensor *tensor, void **data,
                                          tprpc_error *error) {
    tpr_cuda_device_set *set;
    tpr_cuda_device *device;
    tpr_cuda_device_guard guard;
    (void)user;
    *data = NULL;
    tprpc_status status = tpr_cuda_convert_check(ctx, tensor, &set, &device, error);
    if (status == TPRPC_OK) status = tpr_cuda_device_alloc(set, device, tensor->size, tensor->stream, data, error);
    if (status == TPRPC_OK) status = tpr_cuda_device_enter(set, device, &guard, error);
    if (status != TPRPC_OK) return status;
    status = tpr_cuda_device_copy(set, device, *data, device, tensor->data, tensor->size,
                                  (tpr_cuda_driver_stream)tensor->stream, error);
    tpr_cuda_device_leave(set, &guard);
    if (status == TPRPC_OK) return TPRPC_OK;
    tpr_cuda_device_free(set, device, *data, tensor->size, tensor->stream);
    *data = NULL;
    return status;
}

static tprpc_status tpr_cuda_convert_allocate(void *user, tprpc_context *ctx, tprpc_tensor *tensor,
                                              tprpc_error *error) {
    tprpc_error why = TPR_CUDA_ZERO;
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, &why);
    tpr_cuda_device *device;
    (void)user;
    if (!set) {
        if (error) *error = why;
        return why.status;
    }
    tprpc_status status = tpr_cuda_device_of(set, tensor->device, &device, error);
    if (status == TPRPC_OK && !tensor->stream) status = tpr_cuda_device_stream(set, device, &tensor->stream, error);
    if (status != TPRPC_OK) return status;
    return tpr_cuda_device_alloc(set, device, tensor->size, tensor->stream, &tensor->data, error);
}

static void tpr_cuda_convert_release(void *user, tprpc_context *ctx, tprpc_device name, void *data, size_t size,
                                     void *stream) {
    tpr_cuda_device_set *set = tpr_cuda_device_find(ctx, NULL);
    tpr_cuda_device *device;
    (void)user;
    if (set && tpr_cuda_device_of(set, name, &device, NULL) == TPRPC_OK)
        tpr_cuda_device_free(set, device, data, size, stream);
}

static const tprpc_converter_table tpr_cuda_convert_table = {
    (uint32_t)sizeof(tprpc_converter_table), TPRPC_CUDA, tpr_cuda_convert_device_count, tpr_cuda_convert_stream,
    NULL, NULL, tpr_cuda_convert_copy, tpr_cuda_convert_allocate, tpr_cuda_convert_release,
};

static const tprpc_backend tpr_cuda_convert_backend = {
    (uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "cuda", "GPU memory for tensors, in the order of streams.",
    0, NULL, NULL, &tpr_cuda_convert_table, NULL,
};

// >>backends ----------------------------------------------------------------------------------------------------------
// The table, one line a backend.
//
// Uses: basic, xth, ipc, convert.
// Invariant: no backend's name appears anywhere below.

TPRPC_API const struct tprpc_backend *const *tprpc_cuda_backends(size_t *count) {
    static const tprpc_backend *const all[] = {
        &tpr_cuda_xth_backend,
        &tpr_cuda_ipc_backend,
        &tpr_cuda_basic_backend,
        &tpr_cuda_convert_backend,
    };
    TPRPC_ASSERT(count);
    if (count) *count = TPR_CUDA_COUNT(all);
    return all;
}

#ifndef TPRPC_TEST_HOOKS   // the tests of internals go on with these
#undef TPR_CUDA_COUNT
#undef TPR_CUDA_DRIVER_CALL
#undef TPR_CUDA_DRIVER_ENTRIES
#undef TPR_CUDA_IPC_NEVER
#undef TPR_CUDA_OF
#undef TPR_CUDA_OS_HOOKED
#undef TPR_CUDA_OS_UNLOCKED
#undef TPR_CUDA_WIRE_NOWHERE
#undef TPR_CUDA_ZERO
#endif

#ifdef __cplusplus
}
#endif

#if defined(__GNUC__) && defined(__cplusplus)
#pragma GCC diagnostic pop
#endif

#endif // the system's headers were right
#endif // TPRPC_CUDA_IMPLEMENTATION

// This software is available under two licenses; choose whichever you prefer.
//
// ------------------------------------------------------------------------------
// ALTERNATIVE A - MIT No Attribution (MIT-0)
//
// Copyright (c) the tprpc authors
//
// Permission is hereby granted, free of charge, to any person obtaining a copy of
// this software and associated documentation files (the "Software"), to deal in
// the Software without restriction, including without limitation the rights to
// use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies
// of the Software, and to permit persons to whom the Software is furnished to do
// so.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
// IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
// FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
// AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
// LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
// OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
// SOFTWARE.
//
// ------------------------------------------------------------------------------
// ALTERNATIVE B - Public Domain (The Unlicense, unlicense.org)
//
// This is free and unencumbered software released into the public domain.
//
// Anyone is free to copy, modify, publish, use, compile, sell, or distribute this
// software, either in source code form or as a compiled binary, for any purpose,
// commercial or non-commercial, and by any means.
//
// In jurisdictions that recognize copyright laws, the author or authors of this
// software dedicate any and all copyright interest in the software to the public
// domain. We make this dedication for the benefit of the public at large and to
// the detriment of our heirs and successors. We intend this dedication to be an
// overt act of relinquishment in perpetuity of all present and future rights to
// this software under copyright law.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
// IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
// FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
// AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN
// ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION
// WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
