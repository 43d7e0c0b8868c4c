/* The stand-in driver: a libcuda.so.1 without a GPU, a test double. Nothing that it does is a result, least of all its
   speed; figures come from real GPUs alone. It is as strict as the real driver, and stricter where that only hopes:

   - Streams run on threads of their own, in order, and are late by a random time: what nobody waits for is not there.
   - Device memory cannot be touched by the CPU: its addresses are reserved and never mapped; the streams' threads have
     another mapping of the same bytes. A host access is a SIGSEGV that says what it was.
   - An operation that touches memory while another one, which it is not ordered after, may still touch it, ends the
     process with a sentence that names both. So does such an access by another process to memory that is shared.
   - A host function that calls the driver gets CUDA_ERROR_NOT_PERMITTED.
   - Whatever a capture forbids fails and spoils the capture, as it really does.

   standin.h says what can be set. Limits: kernels are C functions of this file, found by name; no per-thread default
   stream, no graphs that run, no managed memory. One mutex guards everything; streams let go of it while they work. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "standin.h"

#include <dirent.h>
#include <execinfo.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))

enum {
    STREAMS = 256,                  /* that exist at once, default streams included */
    DEVICES = 16,
    CONTEXT_DEPTH = 32,             /* pushed by one thread */
    TRACES = 96,                    /* accesses in flight to one allocation, of all processes; more go unseen */
    REMEMBERED = 2000,              /* operations that ended without the host knowing; older ones are forgotten */
    NAME_SIZE = 64,
    LONG_PAUSE_US = 128             /* between looks at a word */
};
static const size_t page_size = 4096;
static const size_t granularity = (size_t)2 << 20;      /* of virtual memory's handles */
static const size_t arena_size = (size_t)16 << 30;      /* addresses of device memory, mapped to nothing */
static const uint64_t magic = UINT64_C(0x6e692d646e617473);

/* ---- what there is --------------------------------------------------------------------------------------- */

/* For each stream the number of its last operation that something is ordered after. */
typedef struct order { uint32_t at[STREAMS]; } order;

/* An access in flight, where other processes that map the same memory see it. */
typedef struct trace {
    uint32_t pid, version, kind;    /* kind is 0 while the rest is not to be read */
    uint32_t unused;
    uint64_t begin, end;
} trace;
enum { TRACE_THERE = 1, TRACE_WRITES = 2 };

/* Behind the bytes of an allocation, in the same memfd. */
typedef struct shared {
    uint64_t magic, size;
    uint32_t device, freed;
    trace traces[TRACES];
} shared;

/* The bytes of device memory. */
typedef struct backing {
    int fd, refs, device;           /* the machine's number */
    bool counted;                   /* as memory that this process took from the device */
    size_t size, mapped;
    uint64_t id;                    /* of the file */
    uint8_t *bytes;
    shared *shared;
} backing;

/* What an address means. */
enum { RANGE_ALLOC, RANGE_POOL, RANGE_IPC, RANGE_VMM, RANGE_HOST, RANGE_REGISTERED };
typedef struct range {
    struct range *next;             /* by address */
    uint64_t base, id;
    size_t size, offset;            /* offset: in the backing or file */
    int kind, opened;               /* how often, of RANGE_IPC */
    bool freed;                     /* in stream order: nothing new may use it */
    backing *backing;               /* NULL: host memory */
    backing *file;                  /* of host memory that processes share: it has no bytes, but traces */
    CUcontext ctx;
    CUmemoryPool pool;
    uint32_t access;                /* of RANGE_VMM: bits of the machine's devices */
    bool exportable;                /* likewise */
} range;

typedef struct reservation { struct reservation *next; uint64_t base; size_t size; } reservation;

typedef struct handle { uint64_t magic; int refs; backing *backing; CUmemAllocationProp prop; } handle;

struct CUmemPoolHandle_st {
    uint64_t magic, handle_types, threshold;
    uint32_t access;                /* bits of the machine's devices */
    int device;
    bool implicit;
};

typedef struct touch { uint64_t key, begin, end; bool write; backing *backing; trace *trace; } touch;

/* An operation of a stream. It is kept after its end until the host knows of that, for who is not ordered after it. */
typedef struct op {
    struct op *next, *all_next;     /* in its stream; of all */
    const char *name;
    CUresult (*run)(struct op *o);  /* on the stream's thread, without the mutex */
    CUcontext ctx;
    int stream;
    uint32_t number;
    order after;                    /* itself included */
    bool checked, started, done;
    bool waits;                     /* for what another process or the host does */
    bool publishes;                 /* others see what it does: a word, an event, a host function */
    touch *accesses;
    size_t access_count;
    const struct kernel *kernel;
    CUevent event;
    backing *word;                  /* kept, though the operation is no access to it */
    range *free_range;
    void *to;
    const void *from;
    size_t size;
    void *payload;                  /* owned */
    uint64_t value, target;
    unsigned int flags;
    CUhostFn host_fn;
    void *user;
    uint64_t params[8];
} op;

typedef struct capture {
    struct capture *next;
    int origin, mode, status;
    size_t nodes;
    pthread_t thread;
} capture;

struct CUgraph_st { uint64_t magic; size_t nodes; };

typedef struct stream {
    bool used, closing, blocking, is_default, has_thread, is_joined;
    pthread_t thread;
    uint32_t generation, issued, done;
    int priority;
    CUcontext ctx;
    op *head, *tail;
    order after;                    /* what its next operation comes after */
    pthread_cond_t wake;
    uint64_t random;
    capture *capture;
    size_t captured, joined;        /* operations since it is in the capture; of those, what others waited for */
} stream;

/* In memory that the processes share which know an interprocess event. */
typedef struct ticket { uint64_t magic, issued, done; } ticket;

struct CUevent_st {
    uint64_t magic;
    struct CUevent_st *next;
    CUcontext ctx;
    unsigned int flags;
    int refs, stream, fd;           /* stream -1: never recorded */
    uint32_t number;
    uint64_t time_ns, mine;         /* mine: the ticket of its last record here */
    order after;
    ticket *ticket;
    bool imported;
    capture *capture;
    int captured_stream;
    size_t captured_at;
};

struct CUctx_st {
    uint64_t magic, id;
    struct CUctx_st *next;
    int device;                     /* the machine's number */
    bool alive, primary;
    int refs;
    unsigned int flags;
    uint32_t peers;                 /* bits of the machine's devices */
    CUresult error;                 /* sticky */
    int default_stream;
};

struct CUmod_st { uint64_t magic; struct CUmod_st *next; CUcontext ctx; char *image; struct CUfunc_st *functions; };
struct CUfunc_st { uint64_t magic; struct CUfunc_st *next; CUmodule module; const struct kernel *kernel; };

/* A kernel is prepared with the mutex held, where it names what it will touch, and runs without. */
typedef struct kernel {
    const char *name;
    size_t param_sizes[8];          /* up to the first 0 */
    bool early;                     /* what it touches is known when it is launched */
    CUresult (*prepare)(op *o);
    CUresult (*run)(op *o);
} kernel;

/* An entry point that was called. */
typedef struct entry { const char *name; uint64_t calls; struct entry *next; bool known; } entry;

typedef struct failure { char name[NAME_SIZE]; uint64_t first, last; int code; } failure;

enum { N_CONTEXTS, N_STREAMS, N_EVENTS, N_ALLOCATIONS, N_HOST, N_REGISTERED, N_MAPPINGS, N_HANDLES, N_RESERVATIONS,
       N_POOLS, N_MODULES, N_GRAPHS, N_OPERATIONS, N_KINDS };
static const char *const kind_names[N_KINDS] = {"contexts", "streams", "events", "allocations", "host", "registered",
    "mappings", "handles", "reservations", "pools", "modules", "graphs", "operations"};

static struct {
    pthread_mutex_t lock;
    pthread_cond_t changed;         /* an operation ended, or a context was lost */
    pid_t pid;                      /* that called cuInit */
    int version, device_count, visible[DEVICES], visible_count;
    uint32_t peers[DEVICES], exclusive;
    size_t memory, used[DEVICES];
    uint64_t lag_us, seed, next_id;
    failure failures[16];
    int failure_count;
    entry *entries;
    long counts[N_KINDS];
    uint8_t *arena;
    uint64_t arena_next;
    struct sigaction old_segv;
    range *ranges;
    reservation *reservations;
    CUcontext contexts;
    CUcontext primaries[DEVICES];
    CUmemoryPool default_pools[DEVICES];
    CUevent events;
    CUmodule modules;
    capture *captures;
    stream streams[STREAMS];
    int high;                       /* one more than the largest stream that was ever used */
    order host;                     /* what the host has seen, or may have */
    op *ops, **ops_end;             /* in flight, or ended unknown to the host; in order of issue */
    size_t ended;                   /* of these */
} g;

static __thread CUcontext current[CONTEXT_DEPTH];
static __thread int current_count;
static __thread int thread_mode;            /* CUstreamCaptureMode */
static __thread bool in_host_function;

static void print_stack(void) {
    void *stack[30];
    backtrace_symbols_fd(stack, backtrace(stack, 30), 2);
}

__attribute__((noreturn, format(printf, 1, 2)))
static void die(const char *format, ...) {
    char text[1000];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "stand-in driver: %s\n", text);
    print_stack();
    abort();
}

static void *allocate(size_t size) {
    void *memory = calloc(1, size);
    if (!memory) die("no memory");
    return memory;
}

static uint64_t random_next(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec;
}

static void sleep_us(uint64_t us) {
    struct timespec pause = {(time_t)(us / 1000000), (long)(us % 1000000 * 1000)};
    nanosleep(&pause, NULL);
}

/* ---- settings -------------------------------------------------------------------------------------------- */

static uint64_t setting(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text && text[0] ? strtoull(text, NULL, 10) : otherwise;
}

static void set_peers(const char *text) {
    bool all = strcmp(text, "all") == 0;
    for (int a = 0; a < DEVICES; a++) g.peers[a] = all ? (1u << DEVICES) - 1 : 1u << a;
    for (const char *at = all || strcmp(text, "none") == 0 ? NULL : text; at; at = strchr(at, ',')) {
        int a, b;
        if (*at == ',') at++;
        if (sscanf(at, "%d-%d", &a, &b) != 2 || a < 0 || b < 0 || a >= DEVICES || b >= DEVICES)
            die("STANDIN_PEERS: %s", text);
        g.peers[a] |= 1u << b;
        g.peers[b] |= 1u << a;
    }
}

/* As the real one: the list ends at the first that is not there. */
static void set_visible(const char *text) {
    char *end;
    g.visible_count = 0;
    if (!text) {
        while (g.visible_count < g.device_count) { g.visible[g.visible_count] = g.visible_count; g.visible_count++; }
        return;
    }
    while (g.visible_count < DEVICES) {
        long index = strtol(text, &end, 10);
        if (end == text || index < 0 || index >= g.device_count) return;
        for (int i = 0; i < g.visible_count; i++)
            if (g.visible[i] == index) { g.visible_count = 0; return; }
        g.visible[g.visible_count++] = (int)index;
        if (*end != ',') return;
        text = end + 1;
    }
}

static void set_failures(const char *text) {
    for (const char *at = text; at && at[0]; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        failure *f = &g.failures[g.failure_count++];
        unsigned long long first;
        char plus[2] = "";
        if (g.failure_count > 16 || (sscanf(at, "%63[^:]:%llu:%d", f->name, &first, &f->code) != 3 &&
                                     sscanf(at, "%63[^:]:%llu%1[+]:%d", f->name, &first, plus, &f->code) != 4))
            die("STANDIN_FAIL: %s", text);
        f->first = first;
        f->last = plus[0] ? UINT64_MAX : first;
    }
}

/* So that a child made while streams work finds the mutex free. */
static void before_fork(void) { pthread_mutex_lock(&g.lock); }
static void after_fork(void) { pthread_mutex_unlock(&g.lock); }

static void configure(void) {
    const char *peers = getenv("STANDIN_PEERS"), *exclusive = getenv("STANDIN_EXCLUSIVE");
    pthread_mutex_init(&g.lock, NULL);
    pthread_cond_init(&g.changed, NULL);
    pthread_atfork(before_fork, after_fork, after_fork);
    g.ops_end = &g.ops;
    g.version = (int)setting("STANDIN_VERSION", 13000);
    g.device_count = (int)setting("STANDIN_DEVICES", 4);
    if (g.device_count > DEVICES) die("STANDIN_DEVICES: at most %d", DEVICES);
    g.memory = (size_t)setting("STANDIN_MEMORY_MB", 64) << 20;
    g.lag_us = setting("STANDIN_LAG_US", 200);
    g.seed = setting("STANDIN_SEED", 1);
    set_peers(peers ? peers : "0-1,2-3");
    for (const char *at = exclusive; at && at[0]; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL)
        g.exclusive |= 1u << (atoi(at) & (DEVICES - 1));
    set_visible(getenv("CUDA_VISIBLE_DEVICES"));
    set_failures(getenv("STANDIN_FAIL"));
}

/* ---- entering and leaving -------------------------------------------------------------------------------- */

enum {
    FREE = 1,                       /* needs no cuInit, and a host function may call it */
    CTX = 2,                        /* needs a current context that works */
    UNSAFE = 4                      /* not during a capture that forbids it */
};

static bool is_failing(const failure *f, const entry *e) {
    size_t length = strlen(f->name);
    if (strncmp(f->name, e->name, length) != 0 || e->calls < f->first || e->calls > f->last) return false;
    return e->name[length] == 0 || strncmp(e->name + length, "_v", 2) == 0;
}

static CUcontext current_context(void) { return current_count ? current[current_count - 1] : NULL; }

static CUresult context_works(CUcontext ctx) {
    if (!ctx) return CUDA_ERROR_INVALID_CONTEXT;
    if (!ctx->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    return ctx->error;
}

static bool spoil(capture *c) {
    c->status = CU_STREAM_CAPTURE_STATUS_INVALIDATED;
    return true;
}

static CUresult capture_works(const capture *c) {
    return c->status == CU_STREAM_CAPTURE_STATUS_ACTIVE ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
}

/* Whether a capture forbids potentially unsafe calls to this thread; it is spoiled then. */
static bool is_forbidden(void) {
    bool forbidden = false;
    for (capture *c = g.captures; c; c = c->next) {
        bool own = c->mode != CU_STREAM_CAPTURE_MODE_RELAXED && pthread_equal(c->thread, pthread_self());
        bool other = c->mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (thread_mode != CU_STREAM_CAPTURE_MODE_RELAXED && (own || other)) forbidden = spoil(c);
    }
    return forbidden;
}

static CUresult admit(entry *e, unsigned flags) {
    CUresult result;
    if (!e->known) { e->known = true; e->next = g.entries; g.entries = e; }
    e->calls++;
    for (int i = 0; i < g.failure_count; i++)
        if (is_failing(&g.failures[i], e)) return (CUresult)g.failures[i].code;
    if (flags & FREE) return CUDA_SUCCESS;
    if (in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    if (g.pid != getpid()) return CUDA_ERROR_NOT_INITIALIZED;       /* nor does the real one survive a fork */
    if (flags & CTX && (result = context_works(current_context())) != CUDA_SUCCESS) return result;
    if (flags & UNSAFE && is_forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return CUDA_SUCCESS;
}

static CUresult enter(entry *e, unsigned flags) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    CUresult result;
    pthread_once(&once, configure);
    pthread_mutex_lock(&g.lock);
    result = admit(e, flags);
    if (result != CUDA_SUCCESS) pthread_mutex_unlock(&g.lock);
    return result;
}

/* An entry point; its body has the mutex. */
#define API(name, flags, params, args)                                                                        \
    static CUresult do_##name params;                                                                         \
    EXPORT CUresult name params;                                                                              \
    EXPORT CUresult name params {                                                                             \
        static entry self = {#name, 0, NULL, false};                                                          \
        CUresult result = enter(&self, flags);                                                                \
        if (result == CUDA_SUCCESS) {                                                                         \
            result = do_##name args;                                                                          \
            pthread_mutex_unlock(&g.lock);                                                                    \
        }                                                                                                     \
        return result;                                                                                        \
    }                                                                                                         \
    static CUresult do_##name params

/* ---- the bytes ------------------------------------------------------------------------------------------- */

static uint64_t file_id(const struct stat *info) { return (uint64_t)info->st_dev << 48 ^ (uint64_t)info->st_ino; }

static size_t pages(size_t size) { return (size + page_size - 1) / page_size * page_size; }

/* Maps a memfd that bytes_new made; NULL: it is none. */
static backing *backing_map(int fd) {
    struct stat info;
    backing *b;
    uint8_t *at;
    shared *tail;
    size_t tail_size = pages(sizeof(shared)), mapped;
    if (fstat(fd, &info) != 0 || info.st_size < (off_t)tail_size) return NULL;
    mapped = (size_t)info.st_size;
    at = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED) return NULL;
    tail = (shared *)(void *)(at + mapped - tail_size);
    if (tail->magic != magic || tail->size > mapped - tail_size) { munmap(at, mapped); return NULL; }
    b = allocate(sizeof *b);
    b->fd = fd;
    b->refs = 1;
    b->device = (int)tail->device;
    b->size = (size_t)tail->size;
    b->mapped = mapped;
    b->id = file_id(&info);
    b->bytes = at;
    b->shared = tail;
    return b;
}

static backing *bytes_new(const char *name, int device, size_t size) {
    shared tail = {magic, size, (uint32_t)device, 0, {{0, 0, 0, 0, 0, 0}}};
    int fd = memfd_create(name, MFD_CLOEXEC);
    backing *b = NULL;
    if (fd < 0) return NULL;
    if (ftruncate(fd, (off_t)(pages(size) + pages(sizeof tail))) == 0 &&
        pwrite(fd, &tail, sizeof tail, (off_t)pages(size)) == (ssize_t)sizeof tail) b = backing_map(fd);
    if (!b) close(fd);
    return b;
}

static CUresult backing_new(int device, size_t size, backing **out) {
    if (size > g.memory || pages(size) > g.memory - g.used[device]) return CUDA_ERROR_OUT_OF_MEMORY;
    *out = bytes_new("standin", device, size);
    if (!*out) return CUDA_ERROR_OPERATING_SYSTEM;
    (*out)->counted = true;
    g.used[device] += pages(size);
    return CUDA_SUCCESS;
}

static void backing_release(backing *b) {
    if (--b->refs > 0) return;
    if (b->counted) g.used[b->device] -= pages(b->size);
    munmap(b->bytes, b->mapped);
    close(b->fd);
    free(b);
}

/* ---- addresses ------------------------------------------------------------------------------------------- */

/* Says whose fault it is and where; the instruction then runs again, and faults as it would have. */
static void on_segv(int number, siginfo_t *info, void *context) {
    static const char text[] = "stand-in driver: the host touched device memory\n";
    const uint8_t *at = info->si_addr;
    (void)context;
    if (at < g.arena || at >= g.arena + arena_size) {
        sigaction(number, &g.old_segv, NULL);
        return;
    }
    if (write(2, text, sizeof text - 1) > 0) print_stack();
    signal(number, SIG_DFL);
}

static void arena_open(void) {
    struct sigaction action;
    void *stack[1], *at = mmap(NULL, arena_size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) die("no addresses");
    g.arena = at;
    backtrace(stack, 1);                        /* the first one allocates, which a signal handler must not */
    memset(&action, 0, sizeof action);
    action.sa_sigaction = on_segv;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &g.old_segv);
}

static bool in_arena(uint64_t at) { return at - (uint64_t)(uintptr_t)g.arena < arena_size; }

/* The end of what is in the way, 0: nothing. */
static uint64_t arena_blocked(uint64_t begin, uint64_t end) {
    for (reservation *r = g.reservations; r; r = r->next)
        if (begin < r->base + r->size && r->base < end) return r->base + r->size;
    for (range *r = g.ranges; r; r = r->next)
        if (begin < r->base + r->size && r->base < end) return r->base + r->size;
    return 0;
}

/* Addresses are used again as late as possible, with a page between any two, so that wrong ones mean nothing. */
static uint64_t arena_take(size_t size, size_t alignment) {
    uint64_t begin = (uint64_t)(uintptr_t)g.arena, at = g.arena_next ? g.arena_next : begin, blocked;
    bool wrapped = false;
    for (;;) {
        at = (at + alignment - 1) / alignment * alignment;
        if (at + size + page_size > begin + arena_size) {
            if (wrapped) return 0;
            wrapped = true;
            at = begin;
            continue;
        }
        blocked = arena_blocked(at, at + size + page_size);
        if (!blocked) break;
        at = blocked + page_size;
    }
    g.arena_next = at + size + page_size;
    return at;
}

static range *range_find(uint64_t at) {
    for (range *r = g.ranges; r && r->base <= at; r = r->next)
        if (at - r->base < r->size) return r;
    return NULL;
}

static range *range_add(int kind, uint64_t base, size_t size, backing *b, CUcontext ctx) {
    range *r = allocate(sizeof *r), **link = &g.ranges;
    while (*link && (*link)->base < base) link = &(*link)->next;
    r->kind = kind;
    r->base = base;
    r->size = size;
    r->backing = b;
    r->ctx = ctx;
    r->id = ++g.next_id;
    r->next = *link;
    *link = r;
    return r;
}

static const int range_counts[] = {N_ALLOCATIONS, N_ALLOCATIONS, N_MAPPINGS, N_MAPPINGS, N_HOST, N_REGISTERED};

/* A pool that is destroyed goes with the last of what it gave. */
static void pool_end(CUmemoryPool pool) {
    bool in_use = pool->magic != 0;
    for (range *r = g.ranges; r; r = r->next) in_use |= r->pool == pool;
    if (!in_use) free(pool);
}

static void range_drop(range *r) {
    range **link = &g.ranges;
    while (*link != r) link = &(*link)->next;
    *link = r->next;
    if (r->pool) pool_end(r->pool);
    g.counts[range_counts[r->kind]]--;
    if (r->kind == RANGE_HOST) munmap((void *)(uintptr_t)r->base, r->size);
    if (r->kind <= RANGE_POOL) __atomic_store_n(&r->backing->shared->freed, 1, __ATOMIC_RELEASE);
    if (r->backing) backing_release(r->backing);
    if (r->file) backing_release(r->file);
    free(r);
}

/* Whether work of a context may use memory where it lies; copies reach further, for the driver stages them. */
static bool is_reachable(CUcontext ctx, const range *r) {
    if (!r->backing) return true;
    if (r->kind == RANGE_VMM) return (r->access & 1u << ctx->device) != 0;
    if (r->kind == RANGE_POOL) return r->backing->device == ctx->device || (r->pool->access & 1u << ctx->device) != 0;
    if (r->kind == RANGE_IPC && r->ctx == ctx) return true;
    return r->backing->device == ctx->device || (ctx->peers & 1u << r->backing->device) != 0;
}

static int visible_index(int device) {
    for (int i = 0; i < g.visible_count; i++)
        if (g.visible[i] == device) return i;
    return -1;
}

/* ---- order ----------------------------------------------------------------------------------------------- */

static void order_join(order *into, const order *from) {
    for (int i = 0; i < g.high; i++)
        if (into->at[i] < from->at[i]) into->at[i] = from->at[i];
}

static bool order_covers(const order *o, int index, uint32_t number) { return o->at[index] >= number; }

/* Whether all of it has ended. */
static bool order_reached(const order *o) {
    for (int i = 0; i < g.high; i++)
        if (g.streams[i].done < o->at[i]) return false;
    return true;
}

static void event_release(CUevent e) {
    if (--e->refs > 0) return;
    if (e->ticket) { munmap(e->ticket, page_size); close(e->fd); }
    free(e);
}

static void op_free(op *o) {
    for (size_t i = 0; i < o->access_count; i++)
        if (o->accesses[i].backing) backing_release(o->accesses[i].backing);
    if (o->word) backing_release(o->word);
    if (o->event) event_release(o->event);
    free(o->accesses);
    free(o->payload);
    free(o);
}

static void op_unlink(op *o, op **link) {
    *link = o->all_next;
    if (g.ops_end == &o->all_next) g.ops_end = link;
    if (o->done) g.ended--;
    op_free(o);
}

/* The host has seen the end of this, or may from now on: whatever is issued later is ordered after all that. What a
   word has told, to whomever, counts as known to the host; so a wait for a word need not find out whose it was. */
static void host_knows(const order *o) {
    op **link = &g.ops;
    order_join(&g.host, o);
    while (*link) {
        op *at = *link;
        if (at->done && order_covers(&g.host, at->stream, at->number)) op_unlink(at, link);
        else link = &at->all_next;
    }
}

/* Whether all that an operation comes after is known already: no wait, for whatever others do, is ahead of it. */
static bool is_sure(const op *o) {
    for (const op *w = g.ops; w; w = w->all_next)
        if (w->waits && !w->done && w != o && order_covers(&o->after, w->stream, w->number)) return false;
    return true;
}

static bool do_collide(const touch *a, const touch *b) {
    return a->key == b->key && a->begin < b->end && b->begin < a->end && (a->write || b->write);
}

static const touch *find_collision(const op *a, const touch *b) {
    for (size_t i = 0; i < a->access_count; i++)
        if (do_collide(&a->accesses[i], b)) return &a->accesses[i];
    return NULL;
}

static const char *memory_of(const touch *a) {
    return a->backing && a->backing->size ? "device memory" : "pinned memory";
}

/* Ends the process where one of these accesses, made by an operation or (NULL) by the host, is not ordered. */
static void check_accesses(const op *by, const touch *accesses, size_t count, const order *after) {
    for (const op *o = g.ops; o; o = o->all_next) {
        if (o == by || !o->access_count || order_covers(after, o->stream, o->number)) continue;
        if (order_covers(&g.host, o->stream, o->number)) continue;
        if (by && (by->stream == o->stream || order_covers(&o->after, by->stream, by->number))) continue;
        if (!o->started && !is_sure(o)) continue;       /* it may wait for this one; it looks itself when it starts */
        for (size_t i = 0; i < count; i++) {
            const touch *hit = find_collision(o, &accesses[i]);
            if (!hit) continue;
            die("unordered access: %s %s bytes %llu to %llu of %s, which %s on another stream %s (bytes %llu to %llu), "
                "and nothing orders it after that", by ? by->name : "the host", accesses[i].write ? "writes" : "reads",
                (unsigned long long)accesses[i].begin, (unsigned long long)accesses[i].end,
                memory_of(&accesses[i]), o->name, hit->write ? "writes" : "reads",
                (unsigned long long)hit->begin, (unsigned long long)hit->end);
        }
    }
}

/* A process that is being killed counts as dead: who sees its sockets close may be quicker than its end. */
static bool is_dead(uint32_t pid) {
    char path[40], text[600], state = 'X';
    unsigned flags = 0;
    const char *at;
    ssize_t size;
    int fd;
    snprintf(path, sizeof path, "/proc/%u/stat", pid);
    fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return true;
    size = read(fd, text, sizeof text - 1);
    close(fd);
    if (size <= 0) return true;
    text[size] = 0;
    at = strrchr(text, ')');
    if (!at || sscanf(at, ") %c %*d %*d %*d %*d %*d %u", &state, &flags) != 2) return true;
    return state == 'Z' || state == 'X' || (flags & 4) != 0;      /* PF_EXITING */
}

/* A free one, or one that a process left when it was killed. */
static trace *trace_take(trace *traces, uint32_t pid) {
    for (int killed = 0; killed < 2; killed++)
        for (trace *t = traces; t < traces + TRACES; t++) {
            uint32_t owner = __atomic_load_n(&t->pid, __ATOMIC_RELAXED);
            if (killed ? owner == 0 || owner == pid || !is_dead(owner) : owner != 0) continue;
            if (__atomic_compare_exchange_n(&t->pid, &owner, pid, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) return t;
        }
    return NULL;
}

/* Notes an access where other processes see it, if there is room. */
static bool trace_begin(touch *a) {
    trace *t = trace_take(a->backing->shared->traces, (uint32_t)g.pid);
    if (!t) return false;
    __atomic_store_n(&t->kind, 0, __ATOMIC_SEQ_CST);
    __atomic_add_fetch(&t->version, 1, __ATOMIC_SEQ_CST);
    __atomic_store_n(&t->begin, a->begin, __ATOMIC_SEQ_CST);
    __atomic_store_n(&t->end, a->end, __ATOMIC_SEQ_CST);
    __atomic_store_n(&t->kind, TRACE_THERE | (a->write ? TRACE_WRITES : 0u), __ATOMIC_SEQ_CST);
    a->trace = t;
    return true;
}

/* Ends the process where an access collides with one that another process has noted. */
static void check_traces(const char *name, const touch *a) {
    uint32_t pid = (uint32_t)g.pid;
    const trace *t = a->backing->shared->traces;
    for (int i = 0; i < TRACES; i++) {
        uint32_t other = __atomic_load_n(&t[i].pid, __ATOMIC_SEQ_CST), version, kind;
        uint64_t begin, end;
        if (other == 0 || other == pid) continue;
        version = __atomic_load_n(&t[i].version, __ATOMIC_SEQ_CST);
        kind = __atomic_load_n(&t[i].kind, __ATOMIC_SEQ_CST);
        begin = __atomic_load_n(&t[i].begin, __ATOMIC_SEQ_CST);
        end = __atomic_load_n(&t[i].end, __ATOMIC_SEQ_CST);
        if (!kind || a->begin >= end || begin >= a->end || (!a->write && !(kind & TRACE_WRITES))) continue;
        if (is_dead(other) || __atomic_load_n(&t[i].version, __ATOMIC_SEQ_CST) != version ||
            __atomic_load_n(&t[i].kind, __ATOMIC_SEQ_CST) != kind) continue;
        die("unordered access: %s %s bytes %llu to %llu of %s, which process %u %s (bytes %llu to %llu), and nothing "
            "orders it after that", name, a->write ? "writes" : "reads", (unsigned long long)a->begin,
            (unsigned long long)a->end, memory_of(a), other, kind & TRACE_WRITES ? "writes" : "reads",
            (unsigned long long)begin, (unsigned long long)end);
    }
}

static void trace_end(touch *a) {
    if (!a->trace) return;
    __atomic_store_n(&a->trace->kind, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&a->trace->pid, 0, __ATOMIC_SEQ_CST);
    a->trace = NULL;
}

static void op_check(op *o) {
    bool room = true;
    check_accesses(o, o->accesses, o->access_count, &o->after);
    for (size_t i = 0; i < o->access_count; i++) {
        if (!o->accesses[i].backing) continue;
        room = room && trace_begin(&o->accesses[i]);     /* first, so that of two processes one at least sees the other */
        check_traces(o->name, &o->accesses[i]);
    }
    o->checked = true;
}

/* ---- operations ------------------------------------------------------------------------------------------ */

static op *op_new(const char *name, CUresult (*run)(op *)) {
    op *o = allocate(sizeof *o);
    o->name = name;
    o->run = run;
    return o;
}

static void op_touch_range(op *o, range *r, uint64_t ptr, size_t size, bool write) {
    touch *a;
    o->accesses = realloc(o->accesses, (o->access_count + 1) * sizeof *a);
    if (!o->accesses) die("no memory");
    a = &o->accesses[o->access_count++];
    memset(a, 0, sizeof *a);
    a->write = write;
    a->backing = r->backing ? r->backing : r->file;
    a->key = a->backing ? a->backing->id : 0;
    a->begin = a->backing ? ptr - r->base + r->offset : ptr;
    a->end = a->begin + size;
    if (a->backing) a->backing->refs++;
}

/* Where the bytes are that an operation will touch; NULL where it must not. Pageable host memory is not noted. */
static uint8_t *op_touch(op *o, uint64_t ptr, size_t size, bool write) {
    range *r = range_find(ptr);
    if (!r) return in_arena(ptr) || !ptr ? NULL : (uint8_t *)(uintptr_t)ptr;
    if (r->freed || size > r->size - (ptr - r->base)) return NULL;
    if (r->kind == RANGE_VMM && !r->access) return NULL;
    op_touch_range(o, r, ptr, size, write);
    if (write && size <= 8) o->publishes = true;        /* a word, which somebody may wait for */
    return r->backing ? r->backing->bytes + r->offset + (ptr - r->base) : (uint8_t *)(uintptr_t)ptr;
}

/* As kernels and words see memory: only what is mapped for their device. */
static uint8_t *op_reach(op *o, CUcontext ctx, uint64_t ptr, size_t size, bool write, bool note) {
    range *r = range_find(ptr);
    if (!r || r->freed || size > r->size - (ptr - r->base) || !is_reachable(ctx, r)) return NULL;
    if (note) return op_touch(o, ptr, size, write);
    if (!r->backing) return (uint8_t *)(uintptr_t)ptr;
    o->word = r->backing;
    o->word->refs++;
    return r->backing->bytes + r->offset + (ptr - r->base);
}

static void op_done(op *o) {
    stream *s = &g.streams[o->stream];
    op **link = &g.ops;
    for (size_t i = 0; i < o->access_count; i++) trace_end(&o->accesses[i]);
    s->head = o->next;
    if (!s->head) s->tail = NULL;
    s->done = o->number;
    o->done = true;
    g.ended++;
    g.counts[N_OPERATIONS]--;
    if (o->free_range) range_drop(o->free_range);
    o->free_range = NULL;
    free(o->payload);
    o->payload = NULL;
    if (!o->access_count || order_covers(&g.host, o->stream, o->number)) {
        while (*link != o) link = &(*link)->all_next;
        op_unlink(o, link);
    }
    for (link = &g.ops; *link && g.ended > REMEMBERED;)
        if ((*link)->done) op_unlink(*link, link);
        else link = &(*link)->all_next;
    pthread_cond_broadcast(&g.changed);
}

/* What others can see, they may have seen before this stream gets the mutex again. */
static void publish(const op *o) {
    pthread_mutex_lock(&g.lock);
    host_knows(&o->after);
    pthread_mutex_unlock(&g.lock);
}

static void op_run(stream *s, op *o) {
    uint64_t lag = g.lag_us ? random_next(&s->random) % (g.lag_us + 1) : 0;
    bool lost = o->ctx->error != CUDA_SUCCESS;
    CUresult result = CUDA_SUCCESS;
    if (!lost && o->kernel && !o->kernel->early) result = o->kernel->prepare(o);
    if (!lost && result == CUDA_SUCCESS && !o->checked) op_check(o);
    o->started = true;
    pthread_mutex_unlock(&g.lock);
    if (lag && !lost) sleep_us(lag);
    if (o->publishes) publish(o);
    if (!lost && result == CUDA_SUCCESS) result = o->run(o);
    pthread_mutex_lock(&g.lock);
    if (result != CUDA_SUCCESS && o->ctx->error == CUDA_SUCCESS) o->ctx->error = result;
    op_done(o);
}

static void *stream_main(void *arg) {
    stream *s = arg;
    prctl(PR_SET_TIMERSLACK, 1000);
    pthread_mutex_lock(&g.lock);
    while (s->head || !s->closing) {
        if (!s->head) pthread_cond_wait(&s->wake, &g.lock);
        else {
            order before = s->head->after;
            before.at[s - g.streams]--;
            if (order_reached(&before)) op_run(s, s->head);
            else pthread_cond_wait(&g.changed, &g.lock);
        }
    }
    if (!s->is_joined) pthread_detach(pthread_self());
    s->used = s->has_thread = false;
    pthread_cond_broadcast(&g.changed);
    pthread_mutex_unlock(&g.lock);
    return NULL;
}

static void stream_start(stream *s) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&s->thread, NULL, stream_main, s) != 0) die("no thread");
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    s->has_thread = true;
}

static stream *stream_new(CUcontext ctx, bool blocking, int priority) {
    int i = 0;
    stream *s;
    while (i < STREAMS && g.streams[i].used) i++;
    if (i == STREAMS) return NULL;
    s = &g.streams[i];
    if (i == g.high) { g.high++; pthread_cond_init(&s->wake, NULL); }
    s->used = true;
    s->closing = s->is_default = false;
    s->generation++;
    s->blocking = blocking;
    s->priority = priority;
    s->ctx = ctx;
    s->capture = NULL;
    s->random = g.seed * 1000003 + (uint64_t)i * 7919 + s->generation;
    memset(&s->after, 0, sizeof s->after);
    s->after.at[i] = s->issued;
    return s;
}

static void stream_close(stream *s) {
    s->closing = true;
    if (!s->is_default) g.counts[N_STREAMS]--;
    if (s->has_thread) pthread_cond_signal(&s->wake);
    else s->used = false;
}

/* What the next operation of a stream comes after, but for what the host knows. */
static void stream_after(const stream *s, order *out) {
    *out = s->after;
    if (s->is_default)
        for (int i = 0; i < g.high; i++) {
            const stream *t = &g.streams[i];
            if (t->used && t->blocking && t->ctx == s->ctx) order_join(out, &t->after);
        }
    else if (s->blocking) order_join(out, &g.streams[s->ctx->default_stream].after);
}

/* Takes the operation; one of a capture is only counted. */
static CUresult issue(stream *s, op *o) {
    int index = (int)(s - g.streams);
    if (s->capture) {
        s->capture->nodes++;
        s->captured++;
        op_free(o);
        return capture_works(s->capture);
    }
    stream_after(s, &o->after);
    o->stream = index;
    o->ctx = s->ctx;
    o->number = ++s->issued;
    o->after.at[index] = o->number;
    s->after = o->after;
    if ((!o->kernel || o->kernel->early) && is_sure(o)) op_check(o);
    *(s->tail ? &s->tail->next : &s->head) = o;
    s->tail = o;
    *g.ops_end = o;
    g.ops_end = &o->all_next;
    g.counts[N_OPERATIONS]++;
    if (!s->has_thread) stream_start(s);
    pthread_cond_signal(&s->wake);
    return CUDA_SUCCESS;
}

/* Blocks the caller until all of it has ended, which the host then knows. */
static void wait_for(const order *o) {
    order target = *o;
    while (!order_reached(&target)) pthread_cond_wait(&g.changed, &g.lock);
    host_knows(&target);
}

/* All that was issued to a context; what frees memory waits for it. */
static void wait_for_context(CUcontext ctx) {
    order all;
    memset(&all, 0, sizeof all);
    for (int i = 0; i < g.high; i++)
        if (g.streams[i].ctx == ctx) order_join(&all, &g.streams[i].after);
    wait_for(&all);
}

/* A handle is no pointer, so that one which is no longer valid is found out. */
static CUstream stream_handle(const stream *s) {
    uint64_t number = (uint64_t)s->generation << 16 | (uint64_t)(s - g.streams) << 4;
    return (CUstream)(uintptr_t)(number | UINT64_C(0x5000000000008));
}

static CUresult stream_look_up(CUstream h, stream **out) {
    CUcontext ctx = current_context();
    uint64_t bits = (uint64_t)(uintptr_t)h;
    stream *s;
    if (!h || h == CU_STREAM_LEGACY) {
        if (!ctx) return CUDA_ERROR_INVALID_CONTEXT;
        if (!ctx->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
        s = &g.streams[ctx->default_stream];
    } else {
        if (bits >> 48 != 5 || (bits & 15) != 8) return CUDA_ERROR_INVALID_HANDLE;
        s = &g.streams[(bits >> 4) % STREAMS];
        if (!s->used || s->closing || stream_handle(s) != h) return CUDA_ERROR_INVALID_HANDLE;
    }
    *out = s;
    return s->ctx->error;
}

/* For what works on a stream: a default stream that would have to wait for one that is captured spoils that. */
static CUresult stream_use(CUstream h, stream **out) {
    CUresult result = stream_look_up(h, out);
    bool implicit = false;
    if (result != CUDA_SUCCESS || !(*out)->is_default) return result;
    for (int i = 0; i < g.high; i++)
        if (g.streams[i].used && g.streams[i].capture && g.streams[i].blocking && g.streams[i].ctx == (*out)->ctx)
            implicit = spoil(g.streams[i].capture);
    return implicit ? CUDA_ERROR_STREAM_CAPTURE_IMPLICIT : CUDA_SUCCESS;
}

static CUresult do_nothing(op *o) { (void)o; return CUDA_SUCCESS; }

/* ---- the driver, errors, entry points -------------------------------------------------------------------- */

API(cuInit, FREE, (unsigned int flags), (flags)) {
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (in_host_function) return CUDA_ERROR_NOT_PERMITTED;
    if (g.pid == getpid()) return CUDA_SUCCESS;
    if (g.pid) return CUDA_ERROR_NOT_INITIALIZED;
    if (!g.visible_count) return CUDA_ERROR_NO_DEVICE;
    arena_open();
    g.pid = getpid();
    return CUDA_SUCCESS;
}

API(cuDriverGetVersion, FREE, (int *version), (version)) {
    if (!version) return CUDA_ERROR_INVALID_VALUE;
    *version = g.version;
    return CUDA_SUCCESS;
}

static const struct { int code; const char *name, *text; } errors[] = {
#define ERROR_ROW(name, value, text) {value, #name, text},
    STANDIN_ERRORS(ERROR_ROW)
};

static CUresult error_text(CUresult error, const char **out, bool name) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = NULL;
    for (size_t i = 0; i < sizeof errors / sizeof errors[0]; i++)
        if (errors[i].code == (int)error) *out = name ? errors[i].name : errors[i].text;
    return *out ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API(cuGetErrorName, FREE, (CUresult error, const char **out), (error, out)) { return error_text(error, out, true); }
API(cuGetErrorString, FREE, (CUresult error, const char **out), (error, out)) { return error_text(error, out, false); }

/* ---- devices --------------------------------------------------------------------------------------------- */

static bool is_device(CUdevice device) { return device >= 0 && device < g.visible_count; }

API(cuDeviceGetCount, 0, (int *count), (count)) {
    if (!count) return CUDA_ERROR_INVALID_VALUE;
    *count = g.visible_count;
    return CUDA_SUCCESS;
}

API(cuDeviceGet, 0, (CUdevice *device, int ordinal), (device, ordinal)) {
    if (!device) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

API(cuDeviceGetName, 0, (char *name, int size, CUdevice device), (name, size, device)) {
    if (!name || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, (size_t)size, "tprpc stand-in device");
    return CUDA_SUCCESS;
}

/* The same in all processes. */
API(cuDeviceGetUuid_v2, 0, (CUuuid *uuid, CUdevice device), (uuid, device)) {
    if (!uuid) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    memcpy(uuid->bytes, "tprpc stand-in ", 15);
    uuid->bytes[15] = (char)('A' + g.visible[device]);
    return CUDA_SUCCESS;
}

API(cuDeviceTotalMem_v2, 0, (size_t *bytes, CUdevice device), (bytes, device)) {
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = g.memory;
    return CUDA_SUCCESS;
}

API(cuDeviceGetAttribute, 0, (int *out, CUdevice_attribute attribute, CUdevice device), (out, attribute, device)) {
    if (!out || (int)attribute < 1 || (int)attribute > 150) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *out = 1024; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *out = 32; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *out = 4; break;
    case CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT: *out = 2; break;
    case CU_DEVICE_ATTRIBUTE_PCI_BUS_ID: *out = g.visible[device] + 1; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *out = 9; break;
    case CU_DEVICE_ATTRIBUTE_MEMPOOL_SUPPORTED_HANDLE_TYPES: *out = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_MODE:
        *out = g.exclusive & 1u << g.visible[device] ? CU_COMPUTEMODE_EXCLUSIVE_PROCESS : CU_COMPUTEMODE_DEFAULT;
        break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: case CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS:
    case CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: case CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM: case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED: case CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED:
    case CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS: case CU_DEVICE_ATTRIBUTE_CAN_USE_STREAM_WAIT_VALUE_NOR:
        *out = 1;
        break;
    default: *out = 0;
    }
    return CUDA_SUCCESS;
}

API(cuDeviceGetPCIBusId, 0, (char *out, int size, CUdevice device), (out, size, device)) {
    if (!out || size <= 0) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(out, (size_t)size, "0000:%02X:00.0", (unsigned)(g.visible[device] + 1));
    return CUDA_SUCCESS;
}

static bool are_peers(int a, int b) { return a != b && (g.peers[a] & 1u << b) != 0; }

API(cuDeviceCanAccessPeer, 0, (int *out, CUdevice device, CUdevice peer), (out, device, peer)) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device) || !is_device(peer)) return CUDA_ERROR_INVALID_DEVICE;
    *out = are_peers(g.visible[device], g.visible[peer]);
    return CUDA_SUCCESS;
}

API(cuDeviceGetP2PAttribute, 0, (int *out, CUdevice_P2PAttribute attribute, CUdevice device, CUdevice peer),
    (out, attribute, device, peer)) {
    if (!out || (int)attribute < 1 || (int)attribute > 4) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device) || !is_device(peer) || device == peer) return CUDA_ERROR_INVALID_DEVICE;
    *out = (int)attribute != CU_DEVICE_P2P_ATTRIBUTE_PERFORMANCE_RANK && are_peers(g.visible[device], g.visible[peer]);
    return CUDA_SUCCESS;
}

/* ---- contexts -------------------------------------------------------------------------------------------- */

static bool context_is(CUcontext ctx) {
    for (CUcontext c = g.contexts; c; c = c->next)
        if (c == ctx) return true;
    return false;
}

/* Contexts are kept for good, so that one which was destroyed is found out. */
static CUresult context_open(CUcontext *slot, CUdevice device, unsigned int flags) {
    CUcontext ctx = *slot;
    stream *s;
    if (g.exclusive & 1u << g.visible[device]) return CUDA_ERROR_DEVICE_UNAVAILABLE;
    if (!ctx) {
        ctx = allocate(sizeof *ctx);
        ctx->magic = magic;
        ctx->device = g.visible[device];
        ctx->next = g.contexts;
        g.contexts = ctx;
    }
    s = stream_new(ctx, false, 0);
    if (!s) return CUDA_ERROR_OUT_OF_MEMORY;
    s->is_default = true;
    g.counts[N_CONTEXTS]++;
    ctx->default_stream = (int)(s - g.streams);
    ctx->alive = true;
    ctx->error = CUDA_SUCCESS;
    ctx->peers = 0;
    ctx->flags = flags;
    ctx->id = ++g.next_id;
    *slot = ctx;
    return CUDA_SUCCESS;
}

static void module_drop(CUmodule m) {
    CUmodule *link = &g.modules;
    while (*link != m) link = &(*link)->next;
    *link = m->next;
    while (m->functions) {
        CUfunction f = m->functions;
        m->functions = f->next;
        free(f);
    }
    m->magic = 0;
    free(m->image);
    free(m);
    g.counts[N_MODULES]--;
}

/* All that it had goes with it. */
static void context_close(CUcontext ctx) {
    wait_for_context(ctx);
    g.counts[N_CONTEXTS]--;
    for (int i = 0; i < g.high; i++)
        if (g.streams[i].used && g.streams[i].ctx == ctx && !g.streams[i].closing) stream_close(&g.streams[i]);
    for (range *r = g.ranges, *next; r; r = next) {
        next = r->next;
        if (r->ctx == ctx && r->kind != RANGE_VMM && r->kind != RANGE_POOL) range_drop(r);
    }
    for (CUmodule m = g.modules, next; m; m = next) {
        next = m->next;
        if (m->ctx == ctx) module_drop(m);
    }
    ctx->alive = false;
}

API(cuDevicePrimaryCtxRetain, 0, (CUcontext *out, CUdevice device), (out, device)) {
    CUresult result = CUDA_SUCCESS;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    CUcontext *slot = &g.primaries[g.visible[device]];
    if (!*slot || !(*slot)->alive) result = context_open(slot, device, 0);
    if (result != CUDA_SUCCESS) return result;
    (*slot)->primary = true;
    (*slot)->refs++;
    *out = *slot;
    return CUDA_SUCCESS;
}

API(cuDevicePrimaryCtxRelease_v2, 0, (CUdevice device), (device)) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    CUcontext ctx = g.primaries[g.visible[device]];
    if (!ctx || !ctx->alive) return CUDA_ERROR_INVALID_CONTEXT;
    if (--ctx->refs == 0) context_close(ctx);
    return CUDA_SUCCESS;
}

API(cuDevicePrimaryCtxGetState, 0, (CUdevice device, unsigned int *flags, int *active), (device, flags, active)) {
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    CUcontext ctx = g.primaries[g.visible[device]];
    if (flags) *flags = ctx && ctx->alive ? ctx->flags : 0;
    if (active) *active = ctx && ctx->alive;
    return CUDA_SUCCESS;
}

static CUresult context_create(CUcontext *out, unsigned int flags, CUdevice device) {
    CUresult result;
    CUcontext ctx = NULL;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    if (current_count == CONTEXT_DEPTH) return CUDA_ERROR_OUT_OF_MEMORY;
    result = context_open(&ctx, device, flags);
    if (result != CUDA_SUCCESS) return result;
    current[current_count++] = *out = ctx;
    return CUDA_SUCCESS;
}

API(cuCtxCreate_v2, 0, (CUcontext *out, unsigned int flags, CUdevice device), (out, flags, device)) {
    return context_create(out, flags, device);
}

API(cuCtxCreate_v3, 0, (CUcontext *out, CUexecAffinityParam *params, int count, unsigned int flags, CUdevice device),
    (out, params, count, flags, device)) {
    return params || count ? CUDA_ERROR_NOT_SUPPORTED : context_create(out, flags, device);
}

API(cuCtxCreate_v4, 0, (CUcontext *out, CUctxCreateParams *params, unsigned int flags, CUdevice device),
    (out, params, flags, device)) {
    return params ? CUDA_ERROR_NOT_SUPPORTED : context_create(out, flags, device);
}

API(cuCtxDestroy_v2, 0, (CUcontext ctx), (ctx)) {
    if (!context_is(ctx) || ctx->primary) return CUDA_ERROR_INVALID_CONTEXT;
    if (!ctx->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (current_context() == ctx) current_count--;
    context_close(ctx);
    return CUDA_SUCCESS;
}

API(cuCtxGetCurrent, 0, (CUcontext *out), (out)) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = current_context();
    return CUDA_SUCCESS;
}

API(cuCtxSetCurrent, 0, (CUcontext ctx), (ctx)) {
    if (ctx && !context_is(ctx)) return CUDA_ERROR_INVALID_CONTEXT;
    if (ctx && !ctx->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (current_count) current_count--;
    if (ctx) current[current_count++] = ctx;
    return CUDA_SUCCESS;
}

API(cuCtxPushCurrent_v2, 0, (CUcontext ctx), (ctx)) {
    if (!context_is(ctx)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!ctx->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (current_count == CONTEXT_DEPTH) return CUDA_ERROR_OUT_OF_MEMORY;
    current[current_count++] = ctx;
    return CUDA_SUCCESS;
}

API(cuCtxPopCurrent_v2, 0, (CUcontext *out), (out)) {
    if (!current_count) return CUDA_ERROR_INVALID_CONTEXT;
    if (out) *out = current_context();
    current_count--;
    return CUDA_SUCCESS;
}

API(cuCtxGetDevice, 0, (CUdevice *out), (out)) {
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
    *out = visible_index(current_context()->device);
    return CUDA_SUCCESS;
}

API(cuCtxGetDevice_v2, 0, (CUdevice *out, CUcontext ctx), (out, ctx)) {
    if (!ctx) ctx = current_context();
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!context_is(ctx)) return CUDA_ERROR_INVALID_CONTEXT;
    *out = visible_index(ctx->device);
    return CUDA_SUCCESS;
}

API(cuCtxGetId, 0, (CUcontext ctx, unsigned long long *out), (ctx, out)) {
    if (!ctx) ctx = current_context();
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!context_is(ctx)) return CUDA_ERROR_INVALID_CONTEXT;
    if (!ctx->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    *out = ctx->id;
    return CUDA_SUCCESS;
}

API(cuCtxEnablePeerAccess, CTX | UNSAFE, (CUcontext peer, unsigned int flags), (peer, flags)) {
    CUcontext ctx = current_context();
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (!context_is(peer) || !peer->alive || peer == ctx) return CUDA_ERROR_INVALID_CONTEXT;
    if (!are_peers(ctx->device, peer->device)) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    if (ctx->peers & 1u << peer->device) return CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED;
    ctx->peers |= 1u << peer->device;
    return CUDA_SUCCESS;
}

API(cuCtxGetStreamPriorityRange, CTX, (int *least, int *greatest), (least, greatest)) {
    if (least) *least = 0;
    if (greatest) *greatest = -5;
    return CUDA_SUCCESS;
}

static CUresult context_synchronize(CUcontext ctx) {
    bool spoiled = false;
    for (int i = 0; i < g.high; i++)
        if (g.streams[i].used && g.streams[i].ctx == ctx && g.streams[i].capture) spoiled = spoil(g.streams[i].capture);
    if (spoiled) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    wait_for_context(ctx);
    return ctx->error;
}

API(cuCtxSynchronize, CTX, (void), ()) { return context_synchronize(current_context()); }
API(cuCtxSynchronize_v2, 0, (CUcontext ctx), (ctx)) {
    if (!ctx) ctx = current_context();
    CUresult result = context_is(ctx) ? context_works(ctx) : CUDA_ERROR_INVALID_CONTEXT;
    return result == CUDA_SUCCESS ? context_synchronize(ctx) : result;
}

/* ---- streams --------------------------------------------------------------------------------------------- */

static CUresult stream_create(CUstream *out, unsigned int flags, int priority) {
    stream *s;
    if (!out || flags & ~1u) return CUDA_ERROR_INVALID_VALUE;
    s = stream_new(current_context(), !(flags & CU_STREAM_NON_BLOCKING), priority);
    if (!s) return CUDA_ERROR_OUT_OF_MEMORY;
    g.counts[N_STREAMS]++;
    *out = stream_handle(s);
    return CUDA_SUCCESS;
}

API(cuStreamCreate, CTX, (CUstream *out, unsigned int flags), (out, flags)) { return stream_create(out, flags, 0); }
API(cuStreamCreateWithPriority, CTX, (CUstream *out, unsigned int flags, int priority), (out, flags, priority)) {
    return stream_create(out, flags, priority);
}

/* What was issued still runs. */
API(cuStreamDestroy_v2, 0, (CUstream h), (h)) {
    stream *s;
    CUresult result = stream_look_up(h, &s);
    if (result == CUDA_ERROR_INVALID_HANDLE || result == CUDA_ERROR_INVALID_CONTEXT) return result;
    if (s->is_default) return CUDA_ERROR_INVALID_HANDLE;
    if (s->capture) spoil(s->capture);
    stream_close(s);
    return CUDA_SUCCESS;
}

static CUresult stream_await(CUstream h, bool block) {
    stream *s;
    order after;
    CUcontext ctx;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (s->capture) { spoil(s->capture); return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
    ctx = s->ctx;
    stream_after(s, &after);
    if (!block && !order_reached(&after)) return CUDA_ERROR_NOT_READY;
    wait_for(&after);
    return ctx->error;
}

API(cuStreamQuery, 0, (CUstream h), (h)) { return stream_await(h, false); }
API(cuStreamSynchronize, 0, (CUstream h), (h)) { return stream_await(h, true); }

API(cuStreamGetCtx, 0, (CUstream h, CUcontext *out), (h, out)) {
    stream *s;
    CUresult result = stream_look_up(h, &s);
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (result == CUDA_ERROR_INVALID_HANDLE || result == CUDA_ERROR_INVALID_CONTEXT) return result;
    *out = s->ctx;
    return CUDA_SUCCESS;
}

static CUresult run_host_fn(op *o) {
    in_host_function = true;
    o->host_fn(o->user);
    in_host_function = false;
    return CUDA_SUCCESS;
}

API(cuLaunchHostFunc, 0, (CUstream h, CUhostFn fn, void *user), (h, fn, user)) {
    stream *s;
    CUresult result = stream_use(h, &s);
    op *o;
    if (result != CUDA_SUCCESS) return result;
    if (!fn) return CUDA_ERROR_INVALID_VALUE;
    o = op_new("a host function", run_host_fn);
    o->host_fn = fn;
    o->user = user;
    o->publishes = true;
    return issue(s, o);
}

/* ---- words ----------------------------------------------------------------------------------------------- */

static bool word_holds(const op *o) {
    bool wide = o->size == 8;
    uint64_t now = wide ? __atomic_load_n((const uint64_t *)o->from, __ATOMIC_ACQUIRE)
                        : __atomic_load_n((const uint32_t *)o->from, __ATOMIC_ACQUIRE);
    switch (o->flags & 3) {
    case CU_STREAM_WAIT_VALUE_GEQ:
        return wide ? (int64_t)(now - o->value) >= 0 : (int32_t)((uint32_t)now - (uint32_t)o->value) >= 0;
    case CU_STREAM_WAIT_VALUE_EQ: return now == o->value;
    case CU_STREAM_WAIT_VALUE_AND: return (now & o->value) != 0;
    default: return wide ? ~(now | o->value) != 0 : ~((uint32_t)now | (uint32_t)o->value) != 0;
    }
}

/* A lost context releases its own streams. */
static bool is_lost(const op *o) {
    bool lost;
    pthread_mutex_lock(&g.lock);
    lost = o->ctx->error != CUDA_SUCCESS;
    pthread_mutex_unlock(&g.lock);
    return lost;
}

static CUresult run_wait(op *o) {
    for (uint64_t pause = 1; !word_holds(o); pause *= pause < LONG_PAUSE_US ? 2 : 1) {
        sleep_us(pause);
        if (pause == LONG_PAUSE_US && is_lost(o)) break;
    }
    return CUDA_SUCCESS;
}

static CUresult run_write(op *o) {
    if (o->size == 8) __atomic_store_n((uint64_t *)o->to, o->value, __ATOMIC_RELEASE);
    else __atomic_store_n((uint32_t *)o->to, (uint32_t)o->value, __ATOMIC_RELEASE);
    return CUDA_SUCCESS;
}

/* Words are what orders, so they are no accesses that have to be ordered. */
static CUresult word(stream *s, uint64_t ptr, uint64_t value, size_t size, unsigned int flags, bool write) {
    op *o = op_new(write ? "a write of a value" : "a wait for a value", write ? run_write : run_wait);
    uint8_t *at = ptr % size ? NULL : op_reach(o, s->ctx, ptr, size, write, false);
    if (!at || (write ? flags & ~1u : flags & ~(3u | 1u << 30))) { op_free(o); return CUDA_ERROR_INVALID_VALUE; }
    o->to = at;
    o->from = at;
    o->value = size == 8 ? value : (uint32_t)value;
    o->size = size;
    o->flags = flags;
    o->waits = !write;
    o->publishes = write;
    return issue(s, o);
}

static CUresult word_on(CUstream h, uint64_t ptr, uint64_t value, size_t size, unsigned int flags, bool write) {
    stream *s;
    CUresult result = stream_use(h, &s);
    return result == CUDA_SUCCESS ? word(s, ptr, value, size, flags, write) : result;
}

API(cuStreamWaitValue32_v2, 0, (CUstream h, CUdeviceptr at, cuuint32_t value, unsigned int flags),
    (h, at, value, flags)) {
    return word_on(h, at, value, 4, flags, false);
}
API(cuStreamWaitValue64_v2, 0, (CUstream h, CUdeviceptr at, cuuint64_t value, unsigned int flags),
    (h, at, value, flags)) {
    return word_on(h, at, value, 8, flags, false);
}
API(cuStreamWriteValue32_v2, 0, (CUstream h, CUdeviceptr at, cuuint32_t value, unsigned int flags),
    (h, at, value, flags)) {
    return word_on(h, at, value, 4, flags, true);
}
API(cuStreamWriteValue64_v2, 0, (CUstream h, CUdeviceptr at, cuuint64_t value, unsigned int flags),
    (h, at, value, flags)) {
    return word_on(h, at, value, 8, flags, true);
}

API(cuStreamBatchMemOp_v2, 0, (CUstream h, unsigned int count, CUstreamBatchMemOpParams *params, unsigned int flags),
    (h, count, params, flags)) {
    stream *s;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!params || !count || count > 256 || flags) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned int i = 0; i < count && result == CUDA_SUCCESS; i++) {
        const CUstreamBatchMemOpParams *p = &params[i];
        int operation = (int)p->operation;
        bool write = operation == CU_STREAM_MEM_OP_WRITE_VALUE_32 || operation == CU_STREAM_MEM_OP_WRITE_VALUE_64;
        bool wide = operation == CU_STREAM_MEM_OP_WAIT_VALUE_64 || operation == CU_STREAM_MEM_OP_WRITE_VALUE_64;
        if (operation == CU_STREAM_MEM_OP_BARRIER || operation == CU_STREAM_MEM_OP_FLUSH_REMOTE_WRITES) continue;
        if (operation < 1 || operation > 5) return CUDA_ERROR_INVALID_VALUE;
        result = write ? word(s, p->writeValue.address, p->writeValue.value64, wide ? 8 : 4, p->writeValue.flags, true)
                       : word(s, p->waitValue.address, p->waitValue.value64, wide ? 8 : 4, p->waitValue.flags, false);
    }
    return result;
}

/* ---- events ---------------------------------------------------------------------------------------------- */

static bool event_is(CUevent e) { return e && e->magic == magic; }

static CUevent event_new(CUcontext ctx, unsigned int flags, int fd, ticket *t) {
    CUevent e = allocate(sizeof *e);
    e->magic = magic;
    e->ctx = ctx;
    e->flags = flags;
    e->refs = 1;
    e->stream = -1;
    e->fd = fd;
    e->ticket = t;
    e->next = g.events;
    g.events = e;
    g.counts[N_EVENTS]++;
    return e;
}

API(cuEventCreate, CTX, (CUevent *out, unsigned int flags), (out, flags)) {
    int fd = -1;
    ticket *t = NULL;
    if (!out || flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
    if (flags & CU_EVENT_INTERPROCESS) {
        if (!(flags & CU_EVENT_DISABLE_TIMING)) return CUDA_ERROR_INVALID_VALUE;
        fd = memfd_create("standin event", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, (off_t)page_size) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
        t = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (t == MAP_FAILED) { close(fd); return CUDA_ERROR_OPERATING_SYSTEM; }
        t->magic = magic;
    }
    *out = event_new(current_context(), flags, fd, t);
    return CUDA_SUCCESS;
}

API(cuEventDestroy_v2, 0, (CUevent e), (e)) {
    CUevent *link = &g.events;
    if (!event_is(e)) return CUDA_ERROR_INVALID_HANDLE;
    while (*link != e) link = &(*link)->next;
    *link = e->next;
    e->magic = 0;
    g.counts[N_EVENTS]--;
    event_release(e);
    return CUDA_SUCCESS;
}

static CUresult run_record(op *o) {
    ticket *t = o->event->ticket;
    uint64_t done = t ? __atomic_load_n(&t->done, __ATOMIC_ACQUIRE) : 0;
    while (t && done < o->target &&
           !__atomic_compare_exchange_n(&t->done, &done, o->target, false, __ATOMIC_RELEASE, __ATOMIC_ACQUIRE)) {}
    pthread_mutex_lock(&g.lock);
    if (o->event->stream == o->stream && o->event->number == o->number) o->event->time_ns = now_ns();
    pthread_mutex_unlock(&g.lock);
    return CUDA_SUCCESS;
}

API(cuEventRecord, 0, (CUevent e, CUstream h), (e, h)) {
    stream *s;
    op *o;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!event_is(e) || e->ctx != s->ctx) return CUDA_ERROR_INVALID_HANDLE;
    e->capture = s->capture;
    if (s->capture) {
        e->captured_stream = (int)(s - g.streams);
        e->captured_at = s->captured;
        return capture_works(s->capture);
    }
    o = op_new("a record of an event", run_record);
    o->event = e;
    e->refs++;
    e->time_ns = 0;
    e->stream = (int)(s - g.streams);
    e->number = s->issued + 1;
    if (e->ticket) {
        o->publishes = true;
        o->target = e->mine = __atomic_add_fetch(&e->ticket->issued, 1, __ATOMIC_ACQ_REL);
    }
    result = issue(s, o);
    e->after = s->after;
    return result;
}

/* Whether its last record was made by another process. */
static bool event_is_foreign(CUevent e) {
    return e->ticket && __atomic_load_n(&e->ticket->issued, __ATOMIC_ACQUIRE) > e->mine;
}

static bool ticket_is_done(const ticket *t, uint64_t target) {
    return __atomic_load_n(&t->done, __ATOMIC_ACQUIRE) >= target;
}

static CUresult run_wait_ticket(op *o) {
    for (uint64_t pause = 1; !ticket_is_done(o->event->ticket, o->target); pause *= pause < LONG_PAUSE_US ? 2 : 1) {
        sleep_us(pause);
        if (pause == LONG_PAUSE_US && is_lost(o)) break;
    }
    return CUDA_SUCCESS;
}

static CUresult wait_captured(stream *s, CUevent e) {
    if (!e->capture) { spoil(s->capture); return CUDA_ERROR_STREAM_CAPTURE_ISOLATION; }
    if (s->capture && s->capture != e->capture) {
        spoil(s->capture);
        spoil(e->capture);
        return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (!s->capture) s->captured = s->joined = 0;
    s->capture = e->capture;
    g.streams[e->captured_stream].joined = e->captured_at;
    s->captured++;                              /* so that it has to be joined itself */
    return capture_works(s->capture);
}

API(cuStreamWaitEvent, 0, (CUstream h, CUevent e, unsigned int flags), (h, e, flags)) {
    stream *s;
    op *o;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!event_is(e)) return CUDA_ERROR_INVALID_HANDLE;
    if (flags & ~1u) return CUDA_ERROR_INVALID_VALUE;
    if (e->capture || s->capture) return wait_captured(s, e);
    if (!event_is_foreign(e)) {
        if (e->stream >= 0) order_join(&s->after, &e->after);
        return CUDA_SUCCESS;
    }
    o = op_new("a wait for another process's event", run_wait_ticket);
    o->event = e;
    e->refs++;
    o->target = __atomic_load_n(&e->ticket->issued, __ATOMIC_ACQUIRE);
    o->waits = true;
    return issue(s, o);
}

static CUresult event_await(CUevent e, bool block) {
    CUcontext ctx;
    if (!event_is(e)) return CUDA_ERROR_INVALID_HANDLE;
    if (e->capture) { spoil(e->capture); return CUDA_ERROR_CAPTURED_EVENT; }
    if (is_forbidden()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    ctx = e->ctx;
    if (ctx->error != CUDA_SUCCESS) return ctx->error;
    if (event_is_foreign(e)) {
        uint64_t target = __atomic_load_n(&e->ticket->issued, __ATOMIC_ACQUIRE);
        while (!ticket_is_done(e->ticket, target)) {
            if (!block) return CUDA_ERROR_NOT_READY;
            pthread_mutex_unlock(&g.lock);
            sleep_us(LONG_PAUSE_US);
            pthread_mutex_lock(&g.lock);
        }
        return CUDA_SUCCESS;
    }
    if (e->stream < 0) return CUDA_SUCCESS;
    if (!block && !order_reached(&e->after)) return CUDA_ERROR_NOT_READY;
    wait_for(&e->after);
    return ctx->error;
}

API(cuEventQuery, 0, (CUevent e), (e)) { return event_await(e, false); }
API(cuEventSynchronize, 0, (CUevent e), (e)) { return event_await(e, true); }

static CUresult elapsed(float *out, CUevent a, CUevent b) {
    bool timed = event_is(a) && event_is(b) && !((a->flags | b->flags) & CU_EVENT_DISABLE_TIMING);
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!timed || a->stream < 0 || b->stream < 0) return CUDA_ERROR_INVALID_HANDLE;
    if (!order_reached(&a->after) || !order_reached(&b->after)) return CUDA_ERROR_NOT_READY;
    *out = (float)((double)(int64_t)(b->time_ns - a->time_ns) / 1e6);
    host_knows(&a->after);
    host_knows(&b->after);
    return CUDA_SUCCESS;
}

#undef cuEventElapsedTime
API(cuEventElapsedTime, UNSAFE, (float *out, CUevent a, CUevent b), (out, a, b)) { return elapsed(out, a, b); }
API(cuEventElapsedTime_v2, UNSAFE, (float *out, CUevent a, CUevent b), (out, a, b)) { return elapsed(out, a, b); }

/* ---- capture --------------------------------------------------------------------------------------------- */

API(cuStreamIsCapturing, 0, (CUstream h, CUstreamCaptureStatus *out), (h, out)) {
    stream *s;
    CUresult result = stream_look_up(h, &s);
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (result != CUDA_SUCCESS) return result;
    for (int i = 0; s->is_default && i < g.high; i++)
        if (g.streams[i].used && g.streams[i].capture && g.streams[i].blocking && g.streams[i].ctx == s->ctx)
            return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    *out = (CUstreamCaptureStatus)(s->capture ? s->capture->status : CU_STREAM_CAPTURE_STATUS_NONE);
    return CUDA_SUCCESS;
}

API(cuStreamBeginCapture_v2, 0, (CUstream h, CUstreamCaptureMode mode), (h, mode)) {
    stream *s;
    CUresult result = stream_look_up(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if ((int)mode < 0 || (int)mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    if (s->is_default) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (s->capture) return CUDA_ERROR_ILLEGAL_STATE;
    s->capture = allocate(sizeof *s->capture);
    s->capture->origin = (int)(s - g.streams);
    s->capture->mode = (int)mode;
    s->capture->status = CU_STREAM_CAPTURE_STATUS_ACTIVE;
    s->capture->thread = pthread_self();
    s->capture->next = g.captures;
    g.captures = s->capture;
    s->captured = s->joined = 0;
    return CUDA_SUCCESS;
}

/* Takes all streams and events out of a capture; whether all of them had come back to where it began. */
static bool capture_close(capture *c) {
    capture **link = &g.captures;
    bool joined = true;
    while (*link != c) link = &(*link)->next;
    *link = c->next;
    for (int i = 0; i < g.high; i++) {
        stream *s = &g.streams[i];
        if (s->capture != c) continue;
        if (i != c->origin && s->joined < s->captured) joined = false;
        s->capture = NULL;
    }
    for (CUevent e = g.events; e; e = e->next)
        if (e->capture == c) e->capture = NULL;
    free(c);
    return joined;
}

API(cuStreamEndCapture, 0, (CUstream h, CUgraph *out), (h, out)) {
    stream *s;
    capture *c;
    CUgraph graph;
    CUresult result = stream_look_up(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = NULL;
    c = s->capture;
    if (!c) return CUDA_ERROR_ILLEGAL_STATE;
    if (c->origin != (int)(s - g.streams)) { spoil(c); return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED; }
    if (c->mode != CU_STREAM_CAPTURE_MODE_RELAXED && !pthread_equal(c->thread, pthread_self()))
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    graph = allocate(sizeof *graph);
    graph->magic = magic;
    graph->nodes = c->nodes;
    result = capture_works(c);
    if (!capture_close(c) && result == CUDA_SUCCESS) result = CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    if (result != CUDA_SUCCESS) { free(graph); return result; }
    g.counts[N_GRAPHS]++;
    *out = graph;
    return CUDA_SUCCESS;
}

API(cuThreadExchangeStreamCaptureMode, 0, (CUstreamCaptureMode *mode), (mode)) {
    int before = thread_mode;
    if (!mode || (int)*mode < 0 || (int)*mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    thread_mode = (int)*mode;
    *mode = (CUstreamCaptureMode)before;
    return CUDA_SUCCESS;
}

API(cuGraphDestroy, 0, (CUgraph graph), (graph)) {
    if (!graph || graph->magic != magic) return CUDA_ERROR_INVALID_VALUE;
    graph->magic = 0;
    free(graph);
    g.counts[N_GRAPHS]--;
    return CUDA_SUCCESS;
}

/* ---- device memory --------------------------------------------------------------------------------------- */

static CUresult memory_new(int kind, int device, size_t size, CUcontext ctx, range **out) {
    backing *b;
    uint64_t at;
    CUresult result = size ? backing_new(device, size, &b) : CUDA_ERROR_INVALID_VALUE;
    if (result != CUDA_SUCCESS) return result;
    at = arena_take(size, page_size);
    if (!at) { backing_release(b); return CUDA_ERROR_OUT_OF_MEMORY; }
    *out = range_add(kind, at, size, b, ctx);
    g.counts[N_ALLOCATIONS]++;
    return CUDA_SUCCESS;
}

API(cuMemAlloc_v2, CTX | UNSAFE, (CUdeviceptr *out, size_t size), (out, size)) {
    range *r;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    CUresult result = memory_new(RANGE_ALLOC, current_context()->device, size, current_context(), &r);
    if (result == CUDA_SUCCESS) *out = r->base;
    return result;
}

/* The range that begins there; NULL for anything else. */
static range *range_at(uint64_t ptr) {
    range *r = range_find(ptr);
    return r && r->base == ptr && !r->freed ? r : NULL;
}

/* Waits for the whole device, as it really does: where a stream hangs, so does this. */
static void wait_for_device(int device) {
    for (CUcontext c = g.contexts; c; c = c->next)
        if (c->alive && c->device == device) wait_for_context(c);
}

API(cuMemFree_v2, CTX | UNSAFE, (CUdeviceptr ptr), (ptr)) {
    range *r = range_at(ptr);
    if (!ptr) return CUDA_SUCCESS;
    if (!r || (r->kind != RANGE_ALLOC && r->kind != RANGE_POOL)) return CUDA_ERROR_INVALID_VALUE;
    r->freed = true;
    wait_for_device(r->backing->device);
    range_drop(r);
    return CUDA_SUCCESS;
}

API(cuMemGetInfo_v2, CTX, (size_t *free_bytes, size_t *total), (free_bytes, total)) {
    if (free_bytes) *free_bytes = g.memory - g.used[current_context()->device];
    if (total) *total = g.memory;
    return CUDA_SUCCESS;
}

API(cuMemGetAddressRange_v2, 0, (CUdeviceptr *base, size_t *size, CUdeviceptr ptr), (base, size, ptr)) {
    range *r = range_find(ptr);
    if (!r || !r->backing || r->freed) return CUDA_ERROR_NOT_FOUND;
    if (base) *base = r->base;
    if (size) *size = r->size;
    return CUDA_SUCCESS;
}

/* ---- pools: what they give is used in stream order ------------------------------------------------------- */

static bool pool_is(CUmemoryPool pool) { return pool && pool->magic == magic; }

static CUmemoryPool pool_new(int device, uint64_t handle_types, bool implicit) {
    CUmemoryPool pool = allocate(sizeof *pool);
    pool->magic = magic;
    pool->device = device;
    pool->handle_types = handle_types;
    pool->implicit = implicit;
    return pool;
}

static CUresult default_pool(CUmemoryPool *out, CUdevice device) {
    CUmemoryPool *slot;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
    slot = &g.default_pools[g.visible[device]];
    if (!*slot) *slot = pool_new(g.visible[device], 0, true);
    *out = *slot;
    return CUDA_SUCCESS;
}

API(cuDeviceGetDefaultMemPool, 0, (CUmemoryPool *out, CUdevice device), (out, device)) {
    return default_pool(out, device);
}
API(cuDeviceGetMemPool, 0, (CUmemoryPool *out, CUdevice device), (out, device)) { return default_pool(out, device); }

API(cuMemPoolCreate, 0, (CUmemoryPool *out, const CUmemPoolProps *props), (out, props)) {
    if (!out || !props || (int)props->allocType != CU_MEM_ALLOCATION_TYPE_PINNED ||
        (int)props->location.type != CU_MEM_LOCATION_TYPE_DEVICE || (unsigned)props->handleTypes > 1)
        return CUDA_ERROR_INVALID_VALUE;
    if (!is_device(props->location.id)) return CUDA_ERROR_INVALID_DEVICE;
    *out = pool_new(g.visible[props->location.id], (uint64_t)props->handleTypes, false);
    g.counts[N_POOLS]++;
    return CUDA_SUCCESS;
}

/* What it gave stays. */
API(cuMemPoolDestroy, 0, (CUmemoryPool pool), (pool)) {
    if (!pool_is(pool) || pool->implicit) return CUDA_ERROR_INVALID_VALUE;
    pool->magic = 0;
    g.counts[N_POOLS]--;
    pool_end(pool);
    return CUDA_SUCCESS;
}

API(cuMemPoolSetAttribute, 0, (CUmemoryPool pool, CUmemPool_attribute attribute, void *value),
    (pool, attribute, value)) {
    if (!pool_is(pool) || !value || (int)attribute < 1 || (int)attribute > 8) return CUDA_ERROR_INVALID_VALUE;
    if ((int)attribute == 4) memcpy(&pool->threshold, value, 8);
    return CUDA_SUCCESS;
}

API(cuMemPoolTrimTo, 0, (CUmemoryPool pool, size_t keep), (pool, keep)) {
    (void)keep;                     /* nothing freed is kept as it is */
    return pool_is(pool) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* The machine's device that a description names, -1: none that has access to memory of that other. */
static int access_device(const CUmemAccessDesc *desc, int owner) {
    int device;
    if ((int)desc->location.type != CU_MEM_LOCATION_TYPE_DEVICE || !is_device(desc->location.id)) return -1;
    device = g.visible[desc->location.id];
    return device == owner || are_peers(device, owner) ? device : -1;
}

API(cuMemPoolSetAccess, 0, (CUmemoryPool pool, const CUmemAccessDesc *map, size_t count), (pool, map, count)) {
    if (!pool_is(pool) || !map) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < count; i++) {
        int device = access_device(&map[i], pool->device);
        if (device < 0) return CUDA_ERROR_INVALID_DEVICE;
        if ((int)map[i].flags == CU_MEM_ACCESS_FLAGS_PROT_NONE) pool->access &= ~(1u << device);
        else pool->access |= 1u << device;
    }
    return CUDA_SUCCESS;
}

static CUresult pool_allocate(CUdeviceptr *out, size_t size, CUmemoryPool pool, CUstream h) {
    stream *s;
    range *r;
    op *o;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    if (s->capture) { spoil(s->capture); return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
    if (!pool) result = default_pool(&pool, visible_index(s->ctx->device));
    if (result != CUDA_SUCCESS || !pool_is(pool)) return CUDA_ERROR_INVALID_VALUE;
    result = memory_new(RANGE_POOL, pool->device, size, NULL, &r);
    if (result != CUDA_SUCCESS) return result;
    r->pool = pool;
    *out = r->base;
    o = op_new("an allocation in stream order", do_nothing);
    op_touch_range(o, r, r->base, size, true);
    return issue(s, o);
}

API(cuMemAllocAsync, CTX, (CUdeviceptr *out, size_t size, CUstream h), (out, size, h)) {
    return pool_allocate(out, size, NULL, h);
}
API(cuMemAllocFromPoolAsync, CTX, (CUdeviceptr *out, size_t size, CUmemoryPool pool, CUstream h),
    (out, size, pool, h)) {
    return pool ? pool_allocate(out, size, pool, h) : CUDA_ERROR_INVALID_VALUE;
}

API(cuMemFreeAsync, CTX, (CUdeviceptr ptr, CUstream h), (ptr, h)) {
    stream *s;
    op *o;
    range *r = range_at(ptr);
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!r || (r->kind != RANGE_ALLOC && r->kind != RANGE_POOL)) return CUDA_ERROR_INVALID_VALUE;
    if (s->capture) { spoil(s->capture); return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED; }
    o = op_new("a free in stream order", do_nothing);
    op_touch_range(o, r, r->base, r->size, true);
    r->freed = true;
    o->free_range = r;
    return issue(s, o);
}

/* ---- host memory ----------------------------------------------------------------------------------------- */

API(cuMemHostAlloc, CTX | UNSAFE, (void **out, size_t size, unsigned int flags), (out, size, flags)) {
    void *at;
    if (!out || !size || flags & ~7u) return CUDA_ERROR_INVALID_VALUE;
    at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    range_add(RANGE_HOST, (uint64_t)(uintptr_t)at, size, NULL, current_context());
    g.counts[N_HOST]++;
    *out = at;
    return CUDA_SUCCESS;
}

API(cuMemFreeHost, CTX | UNSAFE, (void *ptr), (ptr)) {
    range *r = range_at((uint64_t)(uintptr_t)ptr);
    if (!ptr) return CUDA_SUCCESS;
    if (!r || r->kind != RANGE_HOST) return CUDA_ERROR_INVALID_VALUE;
    wait_for_device(current_context()->device);
    range_drop(r);
    return CUDA_SUCCESS;
}

/* Opens the file of a shared mapping that holds all of this once more; -1: there is none, or only root may do it. */
static int mapped_file(uint64_t begin, size_t size, uint64_t *offset) {
    char line[400], path[80], kind[8];
    unsigned long long from, to, at;
    FILE *maps = fopen("/proc/self/maps", "re");
    int fd = -1;
    while (maps && fd < 0 && fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%llx-%llx %7s %llx", &from, &to, kind, &at) != 4 || kind[3] != 's') continue;
        if (begin < from || begin + size > to) continue;
        snprintf(path, sizeof path, "/proc/self/map_files/%llx-%llx", from, to);
        fd = open(path, O_RDWR | O_CLOEXEC);
        *offset = at + (begin - from);
    }
    if (maps) fclose(maps);
    return fd;
}

/* A process's descriptor that has this name; -1: none. */
static int named_file_of(const char *process, const char *name) {
    char path[300], link[80];
    const struct dirent *file;
    DIR *folder;
    ssize_t size;
    int fd = -1;
    snprintf(path, sizeof path, "/proc/%s/fd", process);
    folder = opendir(path);
    while (folder && fd < 0 && (file = readdir(folder)) != NULL) {
        size = readlinkat(dirfd(folder), file->d_name, link, sizeof link - 1);
        link[size > 0 ? size : 0] = 0;
        if (strcmp(link, name) == 0) fd = openat(dirfd(folder), file->d_name, O_RDWR | O_CLOEXEC);
    }
    if (folder) closedir(folder);
    return fd;
}

static int named_file(const char *name) {
    const struct dirent *process;
    DIR *folder = opendir("/proc");
    int fd = -1;
    while (folder && fd < 0 && (process = readdir(folder)) != NULL)
        if (process->d_name[0] >= '1' && process->d_name[0] <= '9') fd = named_file_of(process->d_name, name);
    if (folder) closedir(folder);
    return fd;
}

/* Where the processes that have registered a file note their accesses to it: a memfd that is found by its name, so that
   nothing is left when the last of them is gone, however that went. */
static backing *traces_of(int file) {
    struct flock whole = {F_WRLCK, SEEK_SET, 0, 0, 0};
    struct stat info;
    char name[40], link[80];
    backing *b = NULL;
    int fd;
    if (fstat(file, &info) != 0) return NULL;
    for (range *r = g.ranges; r; r = r->next)
        if (r->file && r->file->id == file_id(&info)) { r->file->refs++; return r->file; }
    snprintf(name, sizeof name, "standin of %llx", (unsigned long long)file_id(&info));
    snprintf(link, sizeof link, "/memfd:%s (deleted)", name);
    if (fcntl(file, F_OFD_SETLKW, &whole) != 0) return NULL;    /* until it is closed: two must not make one each */
    fd = named_file(link);
    if (fd >= 0) b = backing_map(fd);
    if (fd >= 0 && !b) close(fd);
    if (!b) b = bytes_new(name, 0, 0);
    if (b) b->id = file_id(&info);
    return b;
}

API(cuMemHostRegister_v2, CTX | UNSAFE, (void *ptr, size_t size, unsigned int flags), (ptr, size, flags)) {
    uint64_t base = (uint64_t)(uintptr_t)ptr, offset = 0;
    range *r;
    int file;
    if (!ptr || !size || flags & ~15u || in_arena(base)) return CUDA_ERROR_INVALID_VALUE;
    for (r = g.ranges; r; r = r->next)
        if (base < r->base + r->size && r->base < base + size) return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    file = mapped_file(base, size, &offset);
    r = range_add(RANGE_REGISTERED, base, size, NULL, current_context());
    if (file >= 0) {
        r->file = traces_of(file);
        r->offset = offset;
        close(file);
    }
    g.counts[N_REGISTERED]++;
    return CUDA_SUCCESS;
}

API(cuMemHostUnregister, CTX | UNSAFE, (void *ptr), (ptr)) {
    range *r = range_at((uint64_t)(uintptr_t)ptr);
    if (!ptr) return CUDA_ERROR_INVALID_VALUE;
    if (!r || r->kind != RANGE_REGISTERED) return CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
    wait_for_device(current_context()->device);
    range_drop(r);
    return CUDA_SUCCESS;
}

API(cuMemHostGetDevicePointer_v2, CTX, (CUdeviceptr *out, void *ptr, unsigned int flags), (out, ptr, flags)) {
    range *r = range_find((uint64_t)(uintptr_t)ptr);
    if (!out || flags || !r || r->backing) return CUDA_ERROR_INVALID_VALUE;
    *out = (uint64_t)(uintptr_t)ptr;
    return CUDA_SUCCESS;
}

/* ---- what a pointer is ----------------------------------------------------------------------------------- */

static int range_ordinal(const range *r) {
    int index = visible_index(r->backing ? r->backing->device : r->ctx->device);
    return index < 0 ? visible_index(r->ctx->device) : index;       /* memory of a device that is hidden here */
}

/* Writes an attribute; of no range what stands for nothing. False: no such attribute, or not of this pointer. */
static bool pointer_attribute(const range *r, uint64_t ptr, int attribute, void *out) {
    CUcontext ctx = r && (r->kind == RANGE_ALLOC || r->kind >= RANGE_HOST || r->kind == RANGE_IPC) ? r->ctx : NULL;
    CUmemoryPool pool = r && r->kind == RANGE_POOL ? r->pool : NULL;
    void *host = r && !r->backing ? (void *)(uintptr_t)ptr : NULL;
    unsigned int type = !r ? 0 : r->backing ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
    unsigned int yes = 0;
    int ordinal = r ? range_ordinal(r) : -2;
    uint64_t number = 0;
    switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: memcpy(out, &ctx, sizeof ctx); break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: memcpy(out, &type, sizeof type); break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: number = r ? ptr : 0; memcpy(out, &number, 8); break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
        if (r && r->backing) return false;
        memcpy(out, &host, sizeof host);
        break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: number = r ? r->id : 0; memcpy(out, &number, 8); break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: memcpy(out, &ordinal, sizeof ordinal); break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: number = r ? r->base : 0; memcpy(out, &number, 8); break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: number = r ? r->size : 0; memcpy(out, &number, 8); break;
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
        if (pool) number = pool->handle_types;
        if (r && r->exportable) number = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        memcpy(out, &number, 8);
        break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: memcpy(out, &pool, sizeof pool); break;
    case CU_POINTER_ATTRIBUTE_ACCESS_FLAGS:
        yes = r && current_context() && is_reachable(current_context(), r) ? 3 : 0;
        memcpy(out, &yes, sizeof yes);
        break;
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
        yes = r && r->kind == RANGE_ALLOC;
        memcpy(out, &yes, sizeof yes);
        break;
    case CU_POINTER_ATTRIBUTE_MAPPED: yes = r != NULL; memcpy(out, &yes, sizeof(char)); break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: case CU_POINTER_ATTRIBUTE_SYNC_MEMOPS:
        memcpy(out, &yes, sizeof(char));
        break;
    default: return false;
    }
    return true;
}

API(cuPointerGetAttribute, 0, (void *out, CUpointer_attribute attribute, CUdeviceptr ptr), (out, attribute, ptr)) {
    range *r = range_find(ptr);
    if (!out || !r || r->freed) return CUDA_ERROR_INVALID_VALUE;
    return pointer_attribute(r, ptr, (int)attribute, out) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API(cuPointerGetAttributes, 0, (unsigned int count, CUpointer_attribute *attributes, void **out, CUdeviceptr ptr),
    (count, attributes, out, ptr)) {
    range *r = range_find(ptr);
    uint64_t nothing = 0;
    if (!count || !attributes || !out) return CUDA_ERROR_INVALID_VALUE;
    if (r && r->freed) r = NULL;
    for (unsigned int i = 0; i < count; i++)
        if (!pointer_attribute(r, ptr, (int)attributes[i], out[i])) {
            if ((int)attributes[i] != CU_POINTER_ATTRIBUTE_HOST_POINTER) return CUDA_ERROR_INVALID_VALUE;
            memcpy(out[i], &nothing, sizeof(void *));
        }
    return CUDA_SUCCESS;
}

API(cuPointerSetAttribute, 0, (const void *value, CUpointer_attribute attribute, CUdeviceptr ptr),
    (value, attribute, ptr)) {
    range *r = range_find(ptr);
    if (!value || !r || !r->backing || r->freed) return CUDA_ERROR_INVALID_VALUE;
    return (int)attribute == CU_POINTER_ATTRIBUTE_SYNC_MEMOPS ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

/* ---- copies ---------------------------------------------------------------------------------------------- */

/* A copied word may be one that somebody looks at meanwhile. */
static CUresult run_copy(op *o) {
    bool whole = ((uintptr_t)o->to | (uintptr_t)o->from) % 8 == 0;
    if (whole && o->size == 4) {
        uint32_t value = __atomic_load_n((const uint32_t *)o->from, __ATOMIC_ACQUIRE);
        __atomic_store_n((uint32_t *)o->to, value, __ATOMIC_RELEASE);
    } else if (whole && o->size == 8) {
        uint64_t value = __atomic_load_n((const uint64_t *)o->from, __ATOMIC_ACQUIRE);
        __atomic_store_n((uint64_t *)o->to, value, __ATOMIC_RELEASE);
    } else {
        memcpy(o->to, o->from, o->size);
    }
    return CUDA_SUCCESS;
}

/* A copy on any pair of devices: the driver stages what has no peer access. When this returns, pageable memory has been
   read or written. */
static CUresult copy(const char *name, CUstream h, uint64_t dst, uint64_t src, size_t size, bool block) {
    stream *s;
    op *o;
    order after;
    CUresult result = stream_use(h, &s);
    CUcontext ctx;
    if (result != CUDA_SUCCESS || !size) return result;
    ctx = s->ctx;
    o = op_new(name, run_copy);
    o->from = op_touch(o, src, size, false);
    o->to = op_touch(o, dst, size, true);
    o->size = size;
    if (!o->from || !o->to) { op_free(o); return CUDA_ERROR_INVALID_VALUE; }
    if (!range_find(src) && !s->capture) {
        o->payload = allocate(size);
        memcpy(o->payload, o->from, size);
        o->from = o->payload;
    }
    if (!range_find(dst)) block = true;
    if (s->capture) return issue(s, o);
    result = issue(s, o);
    if (result != CUDA_SUCCESS || !block) return result;
    after = s->after;
    wait_for(&after);
    return ctx->error;
}

/* Of copies with a direction in their name: device memory, or pinned host memory as the device sees it. */
static bool is_device_pointer(uint64_t ptr) { return range_find(ptr) != NULL; }

API(cuMemcpyAsync, 0, (CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream h), (dst, src, size, h)) {
    return copy("cuMemcpyAsync", h, dst, src, size, false);
}
API(cuMemcpyHtoDAsync_v2, 0, (CUdeviceptr dst, const void *src, size_t size, CUstream h), (dst, src, size, h)) {
    if (!is_device_pointer(dst)) return CUDA_ERROR_INVALID_VALUE;
    return copy("cuMemcpyHtoDAsync", h, dst, (uint64_t)(uintptr_t)src, size, false);
}
API(cuMemcpyDtoHAsync_v2, 0, (void *dst, CUdeviceptr src, size_t size, CUstream h), (dst, src, size, h)) {
    if (!is_device_pointer(src)) return CUDA_ERROR_INVALID_VALUE;
    return copy("cuMemcpyDtoHAsync", h, (uint64_t)(uintptr_t)dst, src, size, false);
}
API(cuMemcpyDtoDAsync_v2, 0, (CUdeviceptr dst, CUdeviceptr src, size_t size, CUstream h), (dst, src, size, h)) {
    if (!is_device_pointer(dst) || !is_device_pointer(src)) return CUDA_ERROR_INVALID_VALUE;
    return copy("cuMemcpyDtoDAsync", h, dst, src, size, false);
}
API(cuMemcpyPeerAsync, 0, (CUdeviceptr dst, CUcontext to, CUdeviceptr src, CUcontext from, size_t size, CUstream h),
    (dst, to, src, from, size, h)) {
    if (!context_is(to) || !context_is(from) || !to->alive || !from->alive) return CUDA_ERROR_INVALID_CONTEXT;
    if (!is_device_pointer(dst) || !is_device_pointer(src)) return CUDA_ERROR_INVALID_VALUE;
    return copy("cuMemcpyPeerAsync", h, dst, src, size, false);
}
API(cuMemcpy, CTX | UNSAFE, (CUdeviceptr dst, CUdeviceptr src, size_t size), (dst, src, size)) {
    return copy("cuMemcpy", NULL, dst, src, size, true);
}
API(cuMemcpyHtoD_v2, CTX | UNSAFE, (CUdeviceptr dst, const void *src, size_t size), (dst, src, size)) {
    if (!is_device_pointer(dst)) return CUDA_ERROR_INVALID_VALUE;
    return copy("cuMemcpyHtoD", NULL, dst, (uint64_t)(uintptr_t)src, size, true);
}
API(cuMemcpyDtoH_v2, CTX | UNSAFE, (void *dst, CUdeviceptr src, size_t size), (dst, src, size)) {
    if (!is_device_pointer(src)) return CUDA_ERROR_INVALID_VALUE;
    return copy("cuMemcpyDtoH", NULL, (uint64_t)(uintptr_t)dst, src, size, true);
}

static CUresult run_set8(op *o) {
    memset(o->to, (int)o->value, o->size);
    return CUDA_SUCCESS;
}
static CUresult run_set32(op *o) {
    uint32_t value = (uint32_t)o->value;
    for (size_t i = 0; i < o->size / 4; i++) __atomic_store_n((uint32_t *)o->to + i, value, __ATOMIC_RELEASE);
    return CUDA_SUCCESS;
}

static CUresult set(CUstream h, uint64_t dst, uint64_t value, size_t count, size_t width) {
    stream *s;
    op *o;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS || !count) return result;
    if (dst % width || count > SIZE_MAX / width || !is_device_pointer(dst)) return CUDA_ERROR_INVALID_VALUE;
    o = op_new("a memset", width == 4 ? run_set32 : run_set8);
    o->size = count * width;
    o->to = op_touch(o, dst, o->size, true);
    o->value = value;
    if (!o->to) { op_free(o); return CUDA_ERROR_INVALID_VALUE; }
    return issue(s, o);
}

API(cuMemsetD8Async, 0, (CUdeviceptr dst, unsigned char value, size_t count, CUstream h), (dst, value, count, h)) {
    return set(h, dst, value, count, 1);
}
API(cuMemsetD32Async, 0, (CUdeviceptr dst, unsigned int value, size_t count, CUstream h), (dst, value, count, h)) {
    return set(h, dst, value, count, 4);
}

/* ---- between processes ----------------------------------------------------------------------------------- */

/* A handle leads to a descriptor of the process that made it; the file's id says whether that is still the same. */
typedef struct ipc_handle { uint64_t magic, id, size; uint32_t pid; int32_t fd; uint64_t rest[4]; } ipc_handle;
typedef char ipc_handle_fits[sizeof(ipc_handle) == sizeof(CUipcMemHandle) ? 1 : -1];

static CUresult ipc_export(void *out, int fd, size_t size) {
    ipc_handle h = {magic, 0, size, (uint32_t)getpid(), fd, {0, 0, 0, 0}};
    struct stat info;
    if (fstat(fd, &info) != 0) return CUDA_ERROR_OPERATING_SYSTEM;
    h.id = file_id(&info);
    memcpy(out, &h, sizeof h);
    return CUDA_SUCCESS;
}

/* The descriptor, or -1 where what the handle meant is no longer there. */
static int ipc_import(const ipc_handle *h) {
    char path[64];
    struct stat info;
    int fd;
    snprintf(path, sizeof path, "/proc/%u/fd/%d", h->pid, h->fd);
    fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0 && (fstat(fd, &info) != 0 || file_id(&info) != h->id)) { close(fd); fd = -1; }
    return fd;
}

API(cuIpcGetMemHandle, CTX | UNSAFE, (CUipcMemHandle *out, CUdeviceptr ptr), (out, ptr)) {
    range *r = range_find(ptr);
    if (!out || !r || r->freed || r->kind != RANGE_ALLOC) return CUDA_ERROR_INVALID_VALUE;
    return ipc_export(out, r->backing->fd, r->size);
}

API(cuIpcOpenMemHandle_v2, CTX | UNSAFE, (CUdeviceptr *out, CUipcMemHandle name, unsigned int flags),
    (out, name, flags)) {
    CUcontext ctx = current_context();
    ipc_handle h;
    backing *b = NULL;
    uint64_t at;
    int fd;
    memcpy(&h, &name, sizeof h);
    if (!out || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS || h.magic != magic) return CUDA_ERROR_INVALID_VALUE;
    if (h.pid == (uint32_t)g.pid) return CUDA_ERROR_INVALID_CONTEXT;
    for (range *r = g.ranges; r; r = r->next)
        if (r->kind == RANGE_IPC && r->backing->id == h.id && r->ctx == ctx) {
            r->opened++;
            *out = r->base;
            return CUDA_SUCCESS;
        }
    fd = ipc_import(&h);
    if (fd >= 0) b = backing_map(fd);
    if (!b && fd >= 0) close(fd);
    if (!b) return CUDA_ERROR_INVALID_VALUE;
    at = __atomic_load_n(&b->shared->freed, __ATOMIC_ACQUIRE) ? 0 : arena_take(b->size, page_size);
    if (!at || (b->device != ctx->device && !are_peers(ctx->device, b->device))) {
        backing_release(b);
        return at ? CUDA_ERROR_PEER_ACCESS_UNSUPPORTED : CUDA_ERROR_INVALID_VALUE;
    }
    range_add(RANGE_IPC, at, b->size, b, ctx)->opened = 1;
    g.counts[N_MAPPINGS]++;
    *out = at;
    return CUDA_SUCCESS;
}

API(cuIpcCloseMemHandle, CTX | UNSAFE, (CUdeviceptr ptr), (ptr)) {
    range *r = range_at(ptr);
    if (!r || r->kind != RANGE_IPC) return CUDA_ERROR_INVALID_VALUE;
    if (--r->opened > 0) return CUDA_SUCCESS;
    r->freed = true;
    wait_for_device(current_context()->device);
    range_drop(r);
    return CUDA_SUCCESS;
}

API(cuIpcGetEventHandle, CTX | UNSAFE, (CUipcEventHandle *out, CUevent e), (out, e)) {
    if (!event_is(e)) return CUDA_ERROR_INVALID_HANDLE;
    if (!out || !e->ticket || e->imported) return CUDA_ERROR_INVALID_VALUE;
    return ipc_export(out, e->fd, page_size);
}

API(cuIpcOpenEventHandle, CTX | UNSAFE, (CUevent *out, CUipcEventHandle name), (out, name)) {
    ipc_handle h;
    ticket *t = MAP_FAILED;
    int fd;
    memcpy(&h, &name, sizeof h);
    if (!out || h.magic != magic) return CUDA_ERROR_INVALID_VALUE;
    if (h.pid == (uint32_t)g.pid) return CUDA_ERROR_INVALID_CONTEXT;
    fd = ipc_import(&h);
    if (fd >= 0 && h.size == page_size) t = mmap(NULL, page_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (t == MAP_FAILED) { if (fd >= 0) close(fd); return CUDA_ERROR_INVALID_VALUE; }
    *out = event_new(current_context(), CU_EVENT_DISABLE_TIMING | CU_EVENT_INTERPROCESS, fd, t);
    (*out)->imported = true;
    return CUDA_SUCCESS;
}

/* ---- virtual memory -------------------------------------------------------------------------------------- */

static handle *handle_is(CUmemGenericAllocationHandle number) {
    handle *h = (handle *)(uintptr_t)number;
    return h && (number & 7) == 0 && h->magic == magic ? h : NULL;
}

static handle *handle_new(backing *b, const CUmemAllocationProp *prop) {
    handle *h = allocate(sizeof *h);
    h->magic = magic;
    h->refs = 1;
    h->backing = b;
    h->prop = *prop;
    g.counts[N_HANDLES]++;
    return h;
}

static CUresult prop_works(const CUmemAllocationProp *prop) {
    if (!prop || (int)prop->type != CU_MEM_ALLOCATION_TYPE_PINNED || (unsigned)prop->requestedHandleTypes > 1 ||
        (int)prop->location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    return is_device(prop->location.id) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

API(cuMemGetAllocationGranularity, 0,
    (size_t *out, const CUmemAllocationProp *prop, CUmemAllocationGranularity_flags option),
    (out, prop, option)) {
    (void)option;
    if (!out) return CUDA_ERROR_INVALID_VALUE;
    *out = granularity;
    return prop_works(prop);
}

API(cuMemAddressReserve, 0,
    (CUdeviceptr *out, size_t size, size_t alignment, CUdeviceptr hint, unsigned long long flags),
    (out, size, alignment, hint, flags)) {
    reservation *r;
    uint64_t at;
    (void)hint;
    if (!out || !size || size % granularity || flags || alignment & (alignment - 1)) return CUDA_ERROR_INVALID_VALUE;
    at = arena_take(size, alignment > granularity ? alignment : granularity);
    if (!at) return CUDA_ERROR_OUT_OF_MEMORY;
    r = allocate(sizeof *r);
    r->base = at;
    r->size = size;
    r->next = g.reservations;
    g.reservations = r;
    g.counts[N_RESERVATIONS]++;
    *out = at;
    return CUDA_SUCCESS;
}

API(cuMemAddressFree, 0, (CUdeviceptr ptr, size_t size), (ptr, size)) {
    reservation **link = &g.reservations, *r;
    while (*link && ((*link)->base != ptr || (*link)->size != size)) link = &(*link)->next;
    if (!*link) return CUDA_ERROR_INVALID_VALUE;
    for (range *m = g.ranges; m; m = m->next)
        if (m->base >= ptr && m->base < ptr + size) return CUDA_ERROR_INVALID_VALUE;
    r = *link;
    *link = r->next;
    free(r);
    g.counts[N_RESERVATIONS]--;
    return CUDA_SUCCESS;
}

API(cuMemCreate, 0,
    (CUmemGenericAllocationHandle *out, size_t size, const CUmemAllocationProp *prop, unsigned long long flags),
    (out, size, prop, flags)) {
    backing *b;
    CUresult result = prop_works(prop);
    if (result != CUDA_SUCCESS) return result;
    if (!out || !size || size % granularity || flags) return CUDA_ERROR_INVALID_VALUE;
    result = backing_new(g.visible[prop->location.id], size, &b);
    if (result == CUDA_SUCCESS) *out = (uint64_t)(uintptr_t)handle_new(b, prop);
    return result;
}

/* What is mapped of it stays mapped. */
API(cuMemRelease, 0, (CUmemGenericAllocationHandle number), (number)) {
    handle *h = handle_is(number);
    if (!h) return CUDA_ERROR_INVALID_VALUE;
    if (--h->refs > 0) return CUDA_SUCCESS;
    backing_release(h->backing);
    h->magic = 0;
    free(h);
    g.counts[N_HANDLES]--;
    return CUDA_SUCCESS;
}

API(cuMemMap, 0,
    (CUdeviceptr ptr, size_t size, size_t offset, CUmemGenericAllocationHandle number, unsigned long long flags),
    (ptr, size, offset, number, flags)) {
    handle *h = handle_is(number);
    bool reserved = false;
    range *r;
    if (!h || flags || !size || (ptr | size | offset) % granularity || offset > h->backing->size ||
        size > h->backing->size - offset) return CUDA_ERROR_INVALID_VALUE;
    for (reservation *v = g.reservations; v; v = v->next)
        reserved |= ptr >= v->base && ptr + size <= v->base + v->size;
    for (range *m = g.ranges; m; m = m->next)
        if (ptr < m->base + m->size && m->base < ptr + size) reserved = false;
    if (!reserved) return CUDA_ERROR_INVALID_VALUE;
    h->backing->refs++;
    r = range_add(RANGE_VMM, ptr, size, h->backing, NULL);
    r->offset = offset;
    r->exportable = (int)h->prop.requestedHandleTypes != 0;
    g.counts[N_MAPPINGS]++;
    return CUDA_SUCCESS;
}

/* Whether whole mappings fill this. */
static bool is_mapped(uint64_t ptr, size_t size) {
    uint64_t at = ptr;
    for (range *r = range_find(ptr); r && r->kind == RANGE_VMM && r->base == at && at < ptr + size; r = r->next)
        at += r->size;
    return size && at == ptr + size;
}

API(cuMemUnmap, 0, (CUdeviceptr ptr, size_t size), (ptr, size)) {
    if (!is_mapped(ptr, size)) return CUDA_ERROR_INVALID_VALUE;
    for (uint64_t at = ptr; at < ptr + size;) {
        range *r = range_find(at);
        at += r->size;
        range_drop(r);
    }
    return CUDA_SUCCESS;
}

API(cuMemSetAccess, 0, (CUdeviceptr ptr, size_t size, const CUmemAccessDesc *desc, size_t count),
    (ptr, size, desc, count)) {
    if (!desc || !count || !is_mapped(ptr, size)) return CUDA_ERROR_INVALID_VALUE;
    for (uint64_t at = ptr; at < ptr + size;) {
        range *r = range_find(at);
        for (size_t i = 0; i < count; i++) {
            int device = access_device(&desc[i], r->backing->device);
            if (device < 0) return CUDA_ERROR_INVALID_DEVICE;
            if ((int)desc[i].flags == CU_MEM_ACCESS_FLAGS_PROT_NONE) r->access &= ~(1u << device);
            else r->access |= 1u << device;
        }
        at += r->size;
    }
    return CUDA_SUCCESS;
}

API(cuMemExportToShareableHandle, 0,
    (void *out, CUmemGenericAllocationHandle number, CUmemAllocationHandleType type, unsigned long long flags),
    (out, number, type, flags)) {
    handle *h = handle_is(number);
    int fd;
    if (!out || !h || flags || (int)type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR ||
        (int)h->prop.requestedHandleTypes != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_INVALID_VALUE;
    fd = fcntl(h->backing->fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
    memcpy(out, &fd, sizeof fd);
    return CUDA_SUCCESS;
}

API(cuMemImportFromShareableHandle, 0,
    (CUmemGenericAllocationHandle *out, void *os_handle, CUmemAllocationHandleType type), (out, os_handle, type)) {
    CUmemAllocationProp prop;
    backing *b = NULL;
    int fd = -1;
    if ((int)type == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) fd = fcntl((int)(intptr_t)os_handle, F_DUPFD_CLOEXEC, 0);
    if (fd >= 0) b = backing_map(fd);
    if (!out || !b) { if (fd >= 0) close(fd); return CUDA_ERROR_INVALID_VALUE; }
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = visible_index(b->device);
    *out = (uint64_t)(uintptr_t)handle_new(b, &prop);
    return CUDA_SUCCESS;
}

API(cuMemGetAllocationPropertiesFromHandle, 0, (CUmemAllocationProp *out, CUmemGenericAllocationHandle number),
    (out, number)) {
    handle *h = handle_is(number);
    if (!out || !h) return CUDA_ERROR_INVALID_VALUE;
    *out = h->prop;
    return CUDA_SUCCESS;
}

API(cuMemRetainAllocationHandle, 0, (CUmemGenericAllocationHandle *out, void *ptr), (out, ptr)) {
    range *r = range_find((uint64_t)(uintptr_t)ptr);
    CUmemAllocationProp prop;
    if (!out || !r || r->kind != RANGE_VMM) return CUDA_ERROR_INVALID_VALUE;
    memset(&prop, 0, sizeof prop);
    prop.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    if (r->exportable) prop.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    prop.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    prop.location.id = visible_index(r->backing->device);
    r->backing->refs++;
    *out = (uint64_t)(uintptr_t)handle_new(r->backing, &prop);
    return CUDA_SUCCESS;
}

/* ---- kernels --------------------------------------------------------------------------------------------- */

/* tprpc_gather(const struct { uint64_t source, target, size; } *items, uint32_t count): copies each. */
static CUresult prepare_gather(op *o) {
    size_t count = (size_t)o->params[1];
    const uint8_t *list = op_reach(o, o->ctx, o->params[0], count * 24, false, true);
    uint64_t *items;
    if (count && !list) return CUDA_ERROR_ILLEGAL_ADDRESS;
    items = o->payload = allocate(count * 24 + 1);
    memcpy(items, list, count * 24);
    for (size_t i = 0; i < count * 3; i += 3) {
        uint8_t *from = op_reach(o, o->ctx, items[i], (size_t)items[i + 2], false, true);
        uint8_t *to = op_reach(o, o->ctx, items[i + 1], (size_t)items[i + 2], true, true);
        if (items[i + 2] && (!from || !to)) return CUDA_ERROR_ILLEGAL_ADDRESS;
        items[i] = (uint64_t)(uintptr_t)from;
        items[i + 1] = (uint64_t)(uintptr_t)to;
    }
    o->size = count;
    return CUDA_SUCCESS;
}

static CUresult run_gather(op *o) {
    const uint64_t *item = o->payload;
    for (size_t i = 0; i < o->size; i++, item += 3)
        if (item[2]) memcpy((void *)(uintptr_t)item[1], (const void *)(uintptr_t)item[0], (size_t)item[2]);
    return CUDA_SUCCESS;
}

/* standin_fill(void *ptr, uint64_t bytes, uint8_t value) */
static CUresult prepare_fill(op *o) {
    o->size = (size_t)o->params[1];
    o->to = op_reach(o, o->ctx, o->params[0], o->size, true, true);
    o->value = o->params[2];
    return o->to ? CUDA_SUCCESS : CUDA_ERROR_ILLEGAL_ADDRESS;
}

/* standin_spin(uint32_t us) */
static CUresult run_spin(op *o) {
    sleep_us(o->params[0]);
    return CUDA_SUCCESS;
}

/* standin_fault(): its context is lost. */
static CUresult run_fault(op *o) {
    (void)o;
    return CUDA_ERROR_LAUNCH_FAILED;
}

static CUresult run_illegal(op *o) {
    (void)o;
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

static const kernel kernels[] = {
    {"tprpc_gather", {8, 4, 0, 0, 0, 0, 0, 0}, false, prepare_gather, run_gather},
    {"standin_fill", {8, 8, 1, 0, 0, 0, 0, 0}, true, prepare_fill, run_set8},
    {"standin_spin", {4, 0, 0, 0, 0, 0, 0, 0}, true, do_nothing, run_spin},
    {"standin_fault", {0, 0, 0, 0, 0, 0, 0, 0}, true, do_nothing, run_fault},
};

static bool module_is(CUmodule m) { return m && m->magic == magic; }

/* An image is PTX; "standin" alone has every kernel. */
static CUresult module_load(CUmodule *out, const void *image) {
    CUmodule m;
    if (!out || !image) return CUDA_ERROR_INVALID_VALUE;
    if (strcmp(image, "standin") != 0 && !strstr(image, ".version")) return CUDA_ERROR_INVALID_IMAGE;
    if (strcmp(image, "standin") != 0 && !strstr(image, ".target")) return CUDA_ERROR_INVALID_PTX;
    m = allocate(sizeof *m);
    m->magic = magic;
    m->ctx = current_context();
    m->image = strdup(image);
    m->next = g.modules;
    g.modules = m;
    g.counts[N_MODULES]++;
    *out = m;
    return CUDA_SUCCESS;
}

API(cuModuleLoadData, CTX | UNSAFE, (CUmodule *out, const void *image),
    (out, image)) { return module_load(out, image); }
API(cuModuleLoadDataEx, CTX | UNSAFE,
    (CUmodule *out, const void *image, unsigned int count, CUjit_option *options, void **values),
    (out, image, count, options, values)) {
    return count && (!options || !values) ? CUDA_ERROR_INVALID_VALUE : module_load(out, image);
}

API(cuModuleUnload, CTX | UNSAFE, (CUmodule m), (m)) {
    if (!module_is(m)) return CUDA_ERROR_INVALID_HANDLE;
    module_drop(m);
    return CUDA_SUCCESS;
}

API(cuModuleGetFunction, CTX, (CUfunction *out, CUmodule m, const char *name), (out, m, name)) {
    char in_ptx[NAME_SIZE + 8];
    CUfunction f;
    if (!module_is(m)) return CUDA_ERROR_INVALID_HANDLE;
    if (!out || !name) return CUDA_ERROR_INVALID_VALUE;
    snprintf(in_ptx, sizeof in_ptx, ".entry %s", name);
    for (size_t i = 0; i < sizeof kernels / sizeof kernels[0]; i++) {
        if (strcmp(kernels[i].name, name) != 0) continue;
        if (strcmp(m->image, "standin") != 0 && !strstr(m->image, in_ptx)) continue;
        f = allocate(sizeof *f);
        f->magic = magic;
        f->module = m;
        f->kernel = &kernels[i];
        f->next = m->functions;
        m->functions = f;
        *out = f;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_NOT_FOUND;
}

API(cuLaunchKernel, 0,
    (CUfunction f, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z, unsigned int block_x,
     unsigned int block_y, unsigned int block_z, unsigned int shared_bytes, CUstream h, void **params, void **extra),
    (f, grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes, h, params, extra)) {
    stream *s;
    op *o;
    CUresult result = stream_use(h, &s);
    if (result != CUDA_SUCCESS) return result;
    if (!f || f->magic != magic || f->module->ctx != s->ctx) return CUDA_ERROR_INVALID_HANDLE;
    if (!grid_x || !grid_y || !grid_z || !block_x || !block_y || !block_z || extra ||
        (uint64_t)block_x * block_y * block_z > 1024 || shared_bytes > 48 << 10) return CUDA_ERROR_INVALID_VALUE;
    o = op_new(f->kernel->name, f->kernel->run);
    o->kernel = f->kernel;
    o->ctx = s->ctx;
    for (int i = 0; i < 8 && f->kernel->param_sizes[i]; i++) {
        if (!params || !params[i]) { op_free(o); return CUDA_ERROR_INVALID_VALUE; }
        memcpy(&o->params[i], params[i], f->kernel->param_sizes[i]);
    }
    if (f->kernel->early && !s->capture && f->kernel->prepare(o) != CUDA_SUCCESS) o->run = run_illegal;
    return issue(s, o);
}

/* ---- entry points by name -------------------------------------------------------------------------------- */

static CUresult look_up(const char *name, void **out, int version, int *status);

#undef cuGetProcAddress
API(cuGetProcAddress, FREE, (const char *name, void **out, int version, cuuint64_t flags),
    (name, out, version, flags)) {
    int status = CU_GET_PROC_ADDRESS_SUCCESS;
    CUresult result = flags > 2 ? CUDA_ERROR_INVALID_VALUE : look_up(name, out, version, &status);
    return result == CUDA_SUCCESS && status != CU_GET_PROC_ADDRESS_SUCCESS ? CUDA_ERROR_NOT_FOUND : result;
}

API(cuGetProcAddress_v2, FREE,
    (const char *name, void **out, int version, cuuint64_t flags, CUdriverProcAddressQueryResult *status),
    (name, out, version, flags, status)) {
    int found = CU_GET_PROC_ADDRESS_SUCCESS;
    CUresult result = flags > 2 ? CUDA_ERROR_INVALID_VALUE : look_up(name, out, version, &found);
    if (status) *status = (CUdriverProcAddressQueryResult)found;
    return result;
}

/* The version of CUDA that a version of an entry point came with; NULL: one that is not here. */
#ifdef STANDIN_WITH_CUDA_H
#include <cudaTypedefs.h>
#define AT(name, since, symbol) {#name, since, (void (*)(void))(0 ? (PFN_##name##_v##since)0 : symbol)}
#else
#define AT(name, since, symbol) {#name, since, (void (*)(void))symbol}
#endif
static const struct { const char *name; int since; void (*symbol)(void); } symbols[] = {
    AT(cuInit, 2000, cuInit), AT(cuDriverGetVersion, 2020, cuDriverGetVersion),
    AT(cuGetErrorName, 6000, cuGetErrorName), AT(cuGetErrorString, 6000, cuGetErrorString),
    AT(cuGetProcAddress, 11030, cuGetProcAddress), AT(cuGetProcAddress, 12000, cuGetProcAddress_v2),
    AT(cuDeviceGetCount, 2000, cuDeviceGetCount), AT(cuDeviceGet, 2000, cuDeviceGet),
    AT(cuDeviceGetName, 2000, cuDeviceGetName), AT(cuDeviceGetUuid, 9020, NULL),
    AT(cuDeviceGetUuid, 11040, cuDeviceGetUuid_v2), AT(cuDeviceTotalMem, 3020, cuDeviceTotalMem_v2),
    AT(cuDeviceGetAttribute, 2000, cuDeviceGetAttribute), AT(cuDeviceGetPCIBusId, 4010, cuDeviceGetPCIBusId),
    AT(cuDeviceCanAccessPeer, 4000, cuDeviceCanAccessPeer), AT(cuDeviceGetP2PAttribute, 8000, cuDeviceGetP2PAttribute),
    AT(cuDevicePrimaryCtxRetain, 7000, cuDevicePrimaryCtxRetain),
    AT(cuDevicePrimaryCtxRelease, 11000, cuDevicePrimaryCtxRelease_v2),
    AT(cuDevicePrimaryCtxGetState, 7000, cuDevicePrimaryCtxGetState),
    AT(cuCtxCreate, 3020, cuCtxCreate_v2), AT(cuCtxCreate, 11040, cuCtxCreate_v3),
    AT(cuCtxCreate, 12050, cuCtxCreate_v4), AT(cuCtxDestroy, 4000, cuCtxDestroy_v2),
    AT(cuCtxGetCurrent, 4000, cuCtxGetCurrent), AT(cuCtxSetCurrent, 4000, cuCtxSetCurrent),
    AT(cuCtxPushCurrent, 4000, cuCtxPushCurrent_v2), AT(cuCtxPopCurrent, 4000, cuCtxPopCurrent_v2),
    AT(cuCtxGetDevice, 2000, cuCtxGetDevice), AT(cuCtxGetDevice, 13000, cuCtxGetDevice_v2),
    AT(cuCtxGetId, 12000, cuCtxGetId), AT(cuCtxEnablePeerAccess, 4000, cuCtxEnablePeerAccess),
    AT(cuCtxGetStreamPriorityRange, 5050, cuCtxGetStreamPriorityRange),
    AT(cuCtxSynchronize, 2000, cuCtxSynchronize), AT(cuCtxSynchronize, 13000, cuCtxSynchronize_v2),
    AT(cuStreamCreate, 2000, cuStreamCreate), AT(cuStreamCreateWithPriority, 5050, cuStreamCreateWithPriority),
    AT(cuStreamDestroy, 4000, cuStreamDestroy_v2), AT(cuStreamQuery, 2000, cuStreamQuery),
    AT(cuStreamSynchronize, 2000, cuStreamSynchronize), AT(cuStreamWaitEvent, 3020, cuStreamWaitEvent),
    AT(cuStreamWaitValue32, 8000, NULL), AT(cuStreamWaitValue32, 11070, cuStreamWaitValue32_v2),
    AT(cuStreamWaitValue64, 9000, NULL), AT(cuStreamWaitValue64, 11070, cuStreamWaitValue64_v2),
    AT(cuStreamWriteValue32, 8000, NULL), AT(cuStreamWriteValue32, 11070, cuStreamWriteValue32_v2),
    AT(cuStreamWriteValue64, 9000, NULL), AT(cuStreamWriteValue64, 11070, cuStreamWriteValue64_v2),
    AT(cuStreamBatchMemOp, 8000, NULL), AT(cuStreamBatchMemOp, 11070, cuStreamBatchMemOp_v2),
    AT(cuStreamIsCapturing, 10000, cuStreamIsCapturing), AT(cuStreamBeginCapture, 10010, cuStreamBeginCapture_v2),
    AT(cuStreamEndCapture, 10000, cuStreamEndCapture), AT(cuStreamGetCtx, 9020, cuStreamGetCtx),
    AT(cuStreamGetCtx, 12050, NULL), AT(cuThreadExchangeStreamCaptureMode, 10010, cuThreadExchangeStreamCaptureMode),
    AT(cuGraphDestroy, 10000, cuGraphDestroy), AT(cuLaunchHostFunc, 10000, cuLaunchHostFunc),
    AT(cuEventCreate, 2000, cuEventCreate), AT(cuEventRecord, 2000, cuEventRecord),
    AT(cuEventQuery, 2000, cuEventQuery), AT(cuEventSynchronize, 2000, cuEventSynchronize),
    AT(cuEventElapsedTime, 2000, cuEventElapsedTime), AT(cuEventElapsedTime, 12080, cuEventElapsedTime_v2),
    AT(cuEventDestroy, 4000, cuEventDestroy_v2), AT(cuMemAlloc, 3020, cuMemAlloc_v2), AT(cuMemFree, 3020, cuMemFree_v2),
    AT(cuMemAllocAsync, 11020, cuMemAllocAsync), AT(cuMemFreeAsync, 11020, cuMemFreeAsync),
    AT(cuMemAllocFromPoolAsync, 11020, cuMemAllocFromPoolAsync),
    AT(cuDeviceGetDefaultMemPool, 11020, cuDeviceGetDefaultMemPool), AT(cuDeviceGetMemPool, 11020, cuDeviceGetMemPool),
    AT(cuMemPoolCreate, 11020, cuMemPoolCreate), AT(cuMemPoolDestroy, 11020, cuMemPoolDestroy),
    AT(cuMemPoolSetAttribute, 11020, cuMemPoolSetAttribute), AT(cuMemPoolTrimTo, 11020, cuMemPoolTrimTo),
    AT(cuMemPoolSetAccess, 11020, cuMemPoolSetAccess), AT(cuMemHostAlloc, 2020, cuMemHostAlloc),
    AT(cuMemFreeHost, 2000, cuMemFreeHost), AT(cuMemHostRegister, 6050, cuMemHostRegister_v2),
    AT(cuMemHostUnregister, 4000, cuMemHostUnregister),
    AT(cuMemHostGetDevicePointer, 3020, cuMemHostGetDevicePointer_v2),
    AT(cuMemGetAddressRange, 3020, cuMemGetAddressRange_v2), AT(cuMemGetInfo, 3020, cuMemGetInfo_v2),
    AT(cuPointerGetAttribute, 4000, cuPointerGetAttribute), AT(cuPointerGetAttributes, 7000, cuPointerGetAttributes),
    AT(cuPointerSetAttribute, 6000, cuPointerSetAttribute), AT(cuMemcpyAsync, 4000, cuMemcpyAsync),
    AT(cuMemcpyHtoDAsync, 3020, cuMemcpyHtoDAsync_v2), AT(cuMemcpyDtoHAsync, 3020, cuMemcpyDtoHAsync_v2),
    AT(cuMemcpyDtoDAsync, 3020, cuMemcpyDtoDAsync_v2), AT(cuMemcpyPeerAsync, 4000, cuMemcpyPeerAsync),
    AT(cuMemcpy, 4000, cuMemcpy), AT(cuMemcpyHtoD, 3020, cuMemcpyHtoD_v2), AT(cuMemcpyDtoH, 3020, cuMemcpyDtoH_v2),
    AT(cuMemsetD8Async, 3020, cuMemsetD8Async), AT(cuMemsetD32Async, 3020, cuMemsetD32Async),
    AT(cuIpcGetMemHandle, 4010, cuIpcGetMemHandle), AT(cuIpcOpenMemHandle, 11000, cuIpcOpenMemHandle_v2),
    AT(cuIpcCloseMemHandle, 4010, cuIpcCloseMemHandle), AT(cuIpcGetEventHandle, 4010, cuIpcGetEventHandle),
    AT(cuIpcOpenEventHandle, 4010, cuIpcOpenEventHandle), AT(cuMemAddressReserve, 10020, cuMemAddressReserve),
    AT(cuMemAddressFree, 10020, cuMemAddressFree), AT(cuMemCreate, 10020, cuMemCreate),
    AT(cuMemRelease, 10020, cuMemRelease), AT(cuMemMap, 10020, cuMemMap), AT(cuMemUnmap, 10020, cuMemUnmap),
    AT(cuMemSetAccess, 10020, cuMemSetAccess), AT(cuMemExportToShareableHandle, 10020, cuMemExportToShareableHandle),
    AT(cuMemImportFromShareableHandle, 10020, cuMemImportFromShareableHandle),
    AT(cuMemGetAllocationGranularity, 10020, cuMemGetAllocationGranularity),
    AT(cuMemGetAllocationPropertiesFromHandle, 10020, cuMemGetAllocationPropertiesFromHandle),
    AT(cuMemRetainAllocationHandle, 11000, cuMemRetainAllocationHandle),
    AT(cuModuleLoadData, 2000, cuModuleLoadData), AT(cuModuleLoadDataEx, 2010, cuModuleLoadDataEx),
    AT(cuModuleUnload, 2000, cuModuleUnload), AT(cuModuleGetFunction, 2000, cuModuleGetFunction),
    AT(cuLaunchKernel, 4000, cuLaunchKernel),
};

static CUresult look_up(const char *name, void **out, int version, int *status) {
    bool named = false;
    void (*found)(void) = NULL;
    if (!name || !out || version > g.version) return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        if (strcmp(symbols[i].name, name) != 0 || symbols[i].since > g.version) continue;
        named = true;
        if (symbols[i].since <= version) found = symbols[i].symbol;
    }
    memcpy(out, &found, sizeof found);
    *status = found ? CU_GET_PROC_ADDRESS_SUCCESS
            : named ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
    return CUDA_SUCCESS;
}

/* ---- what a test may ask --------------------------------------------------------------------------------- */

EXPORT long standin_count(const char *what);
EXPORT long standin_count(const char *what) {
    long count = -1;
    pthread_mutex_lock(&g.lock);
    for (int i = 0; i < N_KINDS; i++)
        if (strcmp(what, kind_names[i]) == 0) count = g.counts[i];
    pthread_mutex_unlock(&g.lock);
    return count;
}

EXPORT long standin_calls(const char *name);
EXPORT long standin_calls(const char *name) {
    long calls = 0;
    pthread_mutex_lock(&g.lock);
    for (const entry *e = g.entries; e; e = e->next)
        if (strcmp(e->name, name) == 0) calls = (long)e->calls;
    pthread_mutex_unlock(&g.lock);
    return calls;
}

EXPORT void standin_host_access(const void *ptr, size_t size, int write);
EXPORT void standin_host_access(const void *ptr, size_t size, int write) {
    op *o = op_new("the host", do_nothing);
    pthread_mutex_lock(&g.lock);
    op_touch(o, (uint64_t)(uintptr_t)ptr, size, write != 0);
    check_accesses(NULL, o->accesses, o->access_count, &g.host);
    for (size_t i = 0; i < o->access_count; i++)
        if (o->accesses[i].backing) check_traces(o->name, &o->accesses[i]);
    op_free(o);
    pthread_mutex_unlock(&g.lock);
}

/* Threads that have nothing to do end, for a sanitizer sleeps for a second where there are any. */
static void stop_threads(void) {
    pthread_t threads[STREAMS];
    int count = 0;
    pthread_mutex_lock(&g.lock);
    for (int i = 0; i < g.high; i++) {
        stream *s = &g.streams[i];
        if (!s->has_thread || s->head || s->closing) continue;
        s->closing = s->is_joined = true;
        threads[count++] = s->thread;
        pthread_cond_signal(&s->wake);
    }
    pthread_mutex_unlock(&g.lock);
    while (count > 0) pthread_join(threads[--count], NULL);
}

__attribute__((destructor))
static void at_exit(void) {
    if (g.pid != getpid()) return;
    stop_threads();
    if (!setting("STANDIN_LEAKS", 0)) return;
    for (int i = 0; i < N_OPERATIONS; i++)
        if (g.counts[i]) fprintf(stderr, "stand-in driver: %ld %s left\n", g.counts[i], kind_names[i]);
}
