/* What a user would write against the public tables, in C99 and in C++11, without the implementation:

   - "toy", a transport between contexts of one process: bytes and descriptors in queues under one mutex, an eventfd to
     sleep on, `more`, room that runs out after 48 KiB;
   - a device of kind TPRPC_DEVICE_USER whose memory the CPU must not touch (what the user holds is mapped PROT_NONE;
   only the device's threads know the other mapping) and whose copies end late, in order within a queue;
   - "toychan", a channel that moves batches to, from and between such memory: small ones from the CPU in its bytes of
   the pipe's descriptor, others by a memfd that its control path hands over, or as bulk where no descriptor can be
   passed; what the device has copied comes back through a completion queue of its own, with an eventfd to sleep on, or,
   of a single buffer, by tprpc_defer;
   - "toydev", the converter of that kind.

   Everything is static, so that a test brings its own; toys_begin after the last fork, toys_end when all is destroyed.
 */
#ifndef TPRPC_TESTS_TOYS_H
#define TPRPC_TESTS_TOYS_H

#include "harness.h"
#include "../tprpc.h"

#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>

#define TOY_CAST(type, value) HARNESS_CAST(type, value)
#define TOY_OF(type, ptr) TOY_CAST(type *, TOY_CAST(void *, ptr))
#define TOY_NEW(type) TOY_CAST(type *, calloc(1, sizeof(type)))
#define TOY_USED __attribute__((unused))

/* ---- the transport --------------------------------------------------------------------------------------- */

enum { TOY_RING = 48 * 1024, TOY_HANDLES = 16, TOY_NAME = 48 };

typedef struct toy_lane {              /* one direction of a connection */
    uint8_t  bytes[TOY_RING];
    uint64_t head, shown, tail;        /* consumed; may be consumed; sent */
    intptr_t handles[TOY_HANDLES];
    size_t   handle_count;
} toy_lane;

typedef struct toy_pair { toy_lane lanes[2]; int refs; } toy_pair;

typedef struct toy_conn {
    struct toy_conn *next;             /* of its instance, or of its listener before it is accepted */
    struct toy_net  *net;
    struct toy_conn *peer;             /* NULL: gone */
    toy_pair        *pair;
    tprpc_conn_owner *owner;
    uint32_t due;                      /* TPRPC_EVENT_* that the owner is to be told */
    int      side;
    bool     wants_room, closed, nobody;
    char     name[TOY_NAME];
} toy_conn;

typedef struct toy_listener {
    struct toy_listener *next;         /* of the process */
    struct toy_net      *net;
    tprpc_listen_owner  *owner;
    toy_conn            *waiting;
    char                 name[TOY_NAME];
} toy_listener;

typedef struct toy_net {               /* an instance */
    tprpc_context *context;
    int            event;
    bool           armed, rung, walking;
    toy_conn      *conns;
} toy_net;

static struct { pthread_mutex_t lock; toy_listener *listeners; unsigned names; } toy_hub =
    {PTHREAD_MUTEX_INITIALIZER, NULL, 0};

static void toy_lock(void) { pthread_mutex_lock(&toy_hub.lock); }
static void toy_unlock(void) { pthread_mutex_unlock(&toy_hub.lock); }

static void toy_ring_bell(toy_net *net) {
    uint64_t one = 1;
    if (!net->armed || net->rung) return;
    net->rung = true;
    if (write(net->event, &one, sizeof one) < 0) abort();
}

static void toy_due(toy_conn *conn, uint32_t events) {
    conn->due |= events;
    toy_ring_bell(conn->net);
}

static tprpc_status toy_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    toy_net *net = TOY_CAST(toy_net *, tprpc_alloc(host->context, sizeof(toy_net), 64, 0x796f74));
    (void)user;
    if (!net) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "toy: no memory");
    memset(net, 0, sizeof *net);
    net->context = host->context;
    net->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (net->event < 0) {
        int code = errno;
        tprpc_free(host->context, net, sizeof *net, 0x796f74);
        return tprpc_error_set(error, TPRPC_ERROR_SYSTEM, code, "toy: eventfd: %s", strerror(code));
    }
    *instance = net;
    return TPRPC_OK;
}

static void toy_free_conn(toy_conn *conn) { tprpc_free(conn->net->context, conn, sizeof *conn, 0x796f74); }

static void toy_sweep(toy_net *net) {
    toy_conn **at = &net->conns;
    while (*at) {
        toy_conn *conn = *at;
        if (!conn->closed) { at = &conn->next; continue; }
        *at = conn->next;
        toy_free_conn(conn);
    }
}

static void toy_close(void *instance) {
    toy_net *net = TOY_CAST(toy_net *, instance);
    toy_sweep(net);
    if (net->conns) abort();           /* all connections are closed by then, says the contract */
    close(net->event);
    tprpc_free(net->context, net, sizeof *net, 0x796f74);
}

static size_t toy_domain(void *instance, uint8_t *out, size_t capacity) {
    int64_t pid = getpid();
    void *hub = &toy_hub;
    (void)instance;
    if (capacity < sizeof pid + sizeof hub) return 0;
    memcpy(out, &pid, sizeof pid);
    memcpy(out + sizeof pid, &hub, sizeof hub);
    return sizeof pid + sizeof hub;
}

static bool toy_reaches(void *instance, const uint8_t *domain, size_t size) {
    uint8_t own[64];
    return toy_domain(instance, own, sizeof own) == size && memcmp(own, domain, size) == 0;
}

/* Takes a connection that waits at one of the instance's listeners. */
static toy_conn *toy_take_waiting(toy_net *net, toy_listener **listener) {
    toy_conn *conn = NULL, **at;
    toy_lock();
    for (*listener = toy_hub.listeners; *listener; *listener = (*listener)->next)
        if ((*listener)->net == net && (*listener)->waiting) break;
    if (*listener) {
        for (at = &(*listener)->waiting; (*at)->next; at = &(*at)->next) {}   /* the oldest */
        conn = *at;
        *at = NULL;
        conn->next = net->conns;
        net->conns = conn;
    }
    toy_unlock();
    return conn;
}

static bool toy_tell(toy_conn *conn) {
    tprpc_error error;
    uint32_t due;
    toy_lock();
    due = conn->owner && !conn->closed ? conn->due & ~TOY_CAST(uint32_t, TPRPC_EVENT_LOST) : 0;
    if (conn->owner && !due && !conn->closed) due = conn->due;     /* LOST comes after all others */
    conn->due &= ~due;
    toy_unlock();
    if (!due) return false;
    if (due == TPRPC_EVENT_LOST && conn->nobody)
        tprpc_error_set(&error, TPRPC_ERROR_UNREACHABLE, 0, "toy: nobody listens on %s", conn->name);
    else if (due == TPRPC_EVENT_LOST)
        tprpc_error_set(&error, TPRPC_ERROR_PEER, 0, "toy: %s disconnected", conn->name);
    conn->owner->event(conn->owner, due, due == TPRPC_EVENT_LOST ? &error : NULL);
    return true;
}

static bool toy_progress(void *instance) {
    toy_net *net = TOY_CAST(toy_net *, instance);
    toy_listener *listener;
    toy_conn *conn;
    uint64_t count;
    bool did = false;
    toy_lock();
    net->armed = false;
    if (net->rung && read(net->event, &count, sizeof count) < 0) abort();
    net->rung = false;
    toy_unlock();
    net->walking = true;
    while ((conn = toy_take_waiting(net, &listener)) != NULL) {
        did = true;
        listener->owner->accepted(listener->owner, conn);
    }
    for (conn = net->conns; conn; conn = conn->next) did |= toy_tell(conn);
    net->walking = false;
    toy_sweep(net);
    return did;
}

static bool toy_arm(void *instance, int64_t *deadline_us) {
    toy_net *net = TOY_CAST(toy_net *, instance);
    toy_listener *listener;
    toy_conn *conn;
    bool busy = false;
    (void)deadline_us;
    toy_lock();
    for (conn = net->conns; conn; conn = conn->next) busy |= conn->due != 0 && conn->owner && !conn->closed;
    for (listener = toy_hub.listeners; listener; listener = listener->next)
        busy |= listener->net == net && listener->waiting;
    net->armed = !busy;
    toy_unlock();
    return !busy;
}

static intptr_t toy_handle(void *instance) { return TOY_CAST(toy_net *, instance)->event; }

static toy_listener *toy_find(const char *name) {
    toy_listener *listener = toy_hub.listeners;
    while (listener && strcmp(listener->name, name) != 0) listener = listener->next;
    return listener;
}

static tprpc_status toy_listen(void *instance, const char *address, tprpc_listen_owner *owner, void **listener,
                               tprpc_error *error) {
    toy_listener *self;
    if (strlen(address) >= TOY_NAME)
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "toy: the name \"%.60s\" is too long", address);
    self = TOY_NEW(toy_listener);
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "toy: no memory");
    self->net = TOY_CAST(toy_net *, instance);
    self->owner = owner;
    toy_lock();
    if (address[0]) snprintf(self->name, sizeof self->name, "%s", address);
    else snprintf(self->name, sizeof self->name, "auto-%u", ++toy_hub.names);
    if (toy_find(self->name)) {
        toy_unlock();
        free(self);
        return tprpc_error_set(error, TPRPC_ERROR_UNREACHABLE, EADDRINUSE, "toy: %s is in use", address);
    }
    self->next = toy_hub.listeners;
    toy_hub.listeners = self;
    toy_unlock();
    *listener = self;
    return TPRPC_OK;
}

static size_t toy_text(const char *text, char *out, size_t capacity) {
    int n = snprintf(out, capacity, "%s", text);
    return n < 0 ? 0 : TOY_CAST(size_t, n);
}

static size_t toy_address(void *listener, char *out, size_t capacity) {
    return toy_text(TOY_CAST(toy_listener *, listener)->name, out, capacity);
}

/* Under the lock: this end is over. */
static void toy_leave(toy_conn *conn) {
    int i;
    conn->closed = true;
    if (conn->peer) {
        conn->peer->peer = NULL;
        toy_due(conn->peer, TPRPC_EVENT_LOST);
    }
    conn->peer = NULL;
    if (!conn->pair || --conn->pair->refs > 0) return;
    for (i = 0; i < 2; i++)
        while (conn->pair->lanes[i].handle_count > 0)
            close(TOY_CAST(int, conn->pair->lanes[i].handles[--conn->pair->lanes[i].handle_count]));
    free(conn->pair);
}

static void toy_unlisten(void *listener) {
    toy_listener *self = TOY_CAST(toy_listener *, listener), **at = &toy_hub.listeners;
    toy_lock();
    while (*at != self) at = &(*at)->next;
    *at = self->next;
    while (self->waiting) {
        toy_conn *conn = self->waiting;
        self->waiting = conn->next;
        toy_leave(conn);
        toy_free_conn(conn);
    }
    toy_unlock();
    free(self);
}

static bool toy_public_address(void *instance, const char *address) {
    (void)instance;
    (void)address;
    return false;
}

static toy_conn *toy_conn_new(toy_net *net, toy_pair *pair, int end, tprpc_conn_owner *owner, const char *name) {
    toy_conn *conn = TOY_CAST(toy_conn *, tprpc_alloc(net->context, sizeof(toy_conn), 64, 0x796f74));
    if (!conn) return NULL;
    memset(conn, 0, sizeof *conn);
    conn->net = net;
    conn->pair = pair;
    conn->side = end;
    conn->owner = owner;
    snprintf(conn->name, sizeof conn->name, "%s", name);
    return conn;
}

static tprpc_status toy_connect(void *instance, const char *address, uint32_t lane, tprpc_conn_owner *owner,
                                void **conn, tprpc_error *error) {
    toy_net *net = TOY_CAST(toy_net *, instance);
    toy_pair *pair = TOY_NEW(toy_pair);
    toy_conn *mine = toy_conn_new(net, pair, 0, owner, address), *theirs = NULL;
    toy_listener *listener;
    (void)lane;
    toy_lock();
    listener = toy_find(address);
    if (listener) theirs = toy_conn_new(listener->net, pair, 1, NULL, "who connected");
    if (!pair || !mine || (listener && !theirs)) {
        toy_unlock();
        if (mine) toy_free_conn(mine);
        if (theirs) toy_free_conn(theirs);
        free(pair);
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "toy: no memory to connect to %s", address);
    }
    pair->refs = listener ? 2 : 1;
    mine->peer = theirs;
    mine->next = net->conns;
    net->conns = mine;
    mine->nobody = listener == NULL;
    toy_due(mine, listener ? TPRPC_EVENT_OPEN : TPRPC_EVENT_LOST);
    if (listener) {
        theirs->peer = mine;
        theirs->next = listener->waiting;
        listener->waiting = theirs;
        toy_ring_bell(listener->net);
    }
    toy_unlock();
    *conn = mine;
    return TPRPC_OK;
}

static void toy_own(void *conn, tprpc_conn_owner *owner) {
    toy_conn *self = TOY_CAST(toy_conn *, conn);
    toy_lane *in = &self->pair->lanes[1 - self->side];
    toy_lock();
    self->owner = owner;
    if (in->shown != in->head) toy_due(self, TPRPC_EVENT_RECV);
    else toy_ring_bell(self->net);
    toy_unlock();
}

static size_t toy_put(toy_lane *lane, const tprpc_span *spans, size_t count) {
    size_t taken = 0, i;
    for (i = 0; i < count; i++) {
        const uint8_t *from = TOY_CAST(const uint8_t *, spans[i].data);
        size_t left = spans[i].size;
        while (left > 0) {
            size_t at = TOY_CAST(size_t, lane->tail % TOY_RING),
                   room = TOY_RING - TOY_CAST(size_t, lane->tail - lane->head);
            size_t n = left;
            if (n > room) n = room;
            if (n > TOY_RING - at) n = TOY_RING - at;
            if (n == 0) return taken;
            memcpy(lane->bytes + at, from, n);
            lane->tail += n;
            from += n;
            left -= n;
            taken += n;
        }
    }
    return taken;
}

static size_t toy_send(void *conn, const tprpc_span *spans, size_t count, const intptr_t *handles, size_t handle_count,
                       bool more) {
    toy_conn *self = TOY_CAST(toy_conn *, conn);
    toy_lane *out = &self->pair->lanes[self->side];
    size_t total = 0, taken = 0, i;
    for (i = 0; i < count; i++) total += spans[i].size;
    toy_lock();
    if (!self->peer) {
        toy_unlock();
        return total;
    }
    if (out->handle_count + handle_count <= TOY_HANDLES) taken = toy_put(out, spans, count);
    for (i = 0; i < handle_count && taken > 0; i++)
        out->handles[out->handle_count++] = fcntl(TOY_CAST(int, handles[i]), F_DUPFD_CLOEXEC, 0);
    if (taken < total) self->wants_room = true;
    if (!more || taken < total) {
        out->shown = out->tail;
        if (taken > 0 || out->shown != out->head) toy_due(self->peer, TPRPC_EVENT_RECV);
    }
    toy_unlock();
    return taken;
}

static tprpc_span toy_peek(void *conn) {
    toy_conn *self = TOY_CAST(toy_conn *, conn);
    toy_lane *in = &self->pair->lanes[1 - self->side];
    tprpc_span span;
    size_t at;
    toy_lock();
    at = TOY_CAST(size_t, in->head % TOY_RING);
    span.data = in->bytes + at;
    span.size = TOY_CAST(size_t, in->shown - in->head);
    if (span.size > TOY_RING - at) span.size = TOY_RING - at;
    toy_unlock();
    return span;
}

static void toy_consume(void *conn, size_t size) {
    toy_conn *self = TOY_CAST(toy_conn *, conn);
    toy_lane *in = &self->pair->lanes[1 - self->side];
    toy_lock();
    in->head += size;
    if (self->peer && self->peer->wants_room && in->tail - in->head <= TOY_RING / 2) {
        self->peer->wants_room = false;
        toy_due(self->peer, TPRPC_EVENT_SEND);
    }
    toy_unlock();
}

static size_t toy_recv(void *conn, const tprpc_span *spans, size_t count) {
    size_t got = 0, i;
    for (i = 0; i < count; i++) {
        uint8_t *to = TOY_CAST(uint8_t *, spans[i].data);
        size_t left = spans[i].size;
        while (left > 0) {
            tprpc_span span = toy_peek(conn);
            size_t n = span.size < left ? span.size : left;
            if (n == 0) return got;
            memcpy(to, span.data, n);
            toy_consume(conn, n);
            to += n;
            left -= n;
            got += n;
        }
    }
    return got;
}

static size_t toy_take_handles(void *conn, intptr_t *out, size_t capacity) {
    toy_conn *self = TOY_CAST(toy_conn *, conn);
    toy_lane *in = &self->pair->lanes[1 - self->side];
    size_t n;
    toy_lock();
    n = in->handle_count < capacity ? in->handle_count : capacity;
    memcpy(out, in->handles, n * sizeof *out);
    in->handle_count -= n;
    memmove(in->handles, in->handles + n, in->handle_count * sizeof *out);
    toy_unlock();
    return n;
}

static size_t toy_peer(void *conn, char *out, size_t capacity) {
    return toy_text(TOY_CAST(toy_conn *, conn)->name, out, capacity);
}

static tprpc_status toy_check_peer(void *conn, tprpc_error *error) {
    (void)conn;
    (void)error;
    return TPRPC_OK;
}

static int32_t toy_process(void *conn) {
    (void)conn;
    return TOY_CAST(int32_t, getpid());
}

static void toy_disconnect(void *conn, tprpc_status cause) {
    toy_conn *self = TOY_CAST(toy_conn *, conn);
    (void)cause;
    toy_lock();
    toy_leave(self);
    toy_unlock();
    if (!self->net->walking) toy_sweep(self->net);
}

static const tprpc_transport_table toy_table = {TOY_CAST(uint32_t, sizeof(tprpc_transport_table)),
                                                TPRPC_TRANSPORT_HANDLES | TPRPC_TRANSPORT_SAME_HOST |
                                                    TPRPC_TRANSPORT_LOCAL_COPY,
                                                toy_open,
                                                toy_close,
                                                toy_domain,
                                                toy_reaches,
                                                toy_progress,
                                                toy_arm,
                                                toy_handle,
                                                toy_listen,
                                                toy_address,
                                                toy_unlisten,
                                                toy_public_address,
                                                toy_connect,
                                                toy_own,
                                                toy_send,
                                                toy_peek,
                                                toy_consume,
                                                toy_recv,
                                                toy_take_handles,
                                                toy_peer,
                                                toy_check_peer,
                                                toy_process,
                                                toy_disconnect};

TOY_USED static const tprpc_backend toy_backend = {TOY_CAST(uint32_t, sizeof(tprpc_backend)),
                                                   TPRPC_VERSION,
                                                   "toy",
                                                   "Queues between contexts of one process, for tests.",
                                                   5000,
                                                   &toy_table,
                                                   NULL,
                                                   NULL,
                                                   NULL};

/* ---- the device ------------------------------------------------------------------------------------------ */

enum { TOY_DEVICES = 2 };

typedef struct toy_job { struct toy_job *next; void (*run)(struct toy_job *job); } toy_job;

typedef struct toy_queue {             /* does one job after the other, each late */
    pthread_t       thread;
    pthread_mutex_t lock;
    pthread_cond_t  more;
    toy_job        *head, **tail;
    bool            stop;
} toy_queue;

typedef struct toy_memory {
    struct toy_memory *next;
    uint8_t *face, *real;              /* what the user holds, PROT_NONE; what the device's threads use */
    size_t   size;
    int32_t  index;
} toy_memory;

static struct {
    pthread_mutex_t lock;
    toy_memory     *memory;
    toy_queue      *queues[TOY_DEVICES];
    int64_t         lag_us;            /* how late */
    int             allocated, prepared, sent, copied, jobs, passed, bulk, inlined, completed;    /* atomic */
    bool            liar;              /* the channel's proof fails */
} toy_gpu = {PTHREAD_MUTEX_INITIALIZER, NULL, {NULL, NULL}, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, false};

static int toy_count(int *counter) { return __sync_fetch_and_add(counter, 0); }

static void *toy_queue_main(void *arg) {
    toy_queue *queue = TOY_CAST(toy_queue *, arg);
    pthread_mutex_lock(&queue->lock);
    for (;;) {
        toy_job *job = queue->head;
        if (!job && queue->stop) break;
        if (!job) {
            pthread_cond_wait(&queue->more, &queue->lock);
            continue;
        }
        queue->head = job->next;
        if (!queue->head) queue->tail = &queue->head;
        pthread_mutex_unlock(&queue->lock);
        test_sleep_us(toy_gpu.lag_us);
        __sync_fetch_and_add(&toy_gpu.jobs, 1);
        job->run(job);
        pthread_mutex_lock(&queue->lock);
    }
    pthread_mutex_unlock(&queue->lock);
    return NULL;
}

static toy_queue *toy_queue_new(void) {
    toy_queue *queue = TOY_NEW(toy_queue);
    REQUIRE(queue != NULL);
    queue->tail = &queue->head;
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->more, NULL);
    REQUIRE(pthread_create(&queue->thread, NULL, toy_queue_main, queue) == 0);
    return queue;
}

static void toy_queue_free(toy_queue *queue) {
    pthread_mutex_lock(&queue->lock);
    queue->stop = true;
    pthread_cond_signal(&queue->more);
    pthread_mutex_unlock(&queue->lock);
    pthread_join(queue->thread, NULL);
    pthread_cond_destroy(&queue->more);
    pthread_mutex_destroy(&queue->lock);
    free(queue);
}

static void toy_queue_put(toy_queue *queue, toy_job *job) {
    pthread_mutex_lock(&queue->lock);
    job->next = NULL;
    *queue->tail = job;
    queue->tail = &job->next;
    pthread_cond_signal(&queue->more);
    pthread_mutex_unlock(&queue->lock);
}

static toy_queue *toy_queue_of(tprpc_device device, void *stream) {
    int32_t index =
        device.kind == TPRPC_DEVICE_USER && device.index > 0 && device.index < TOY_DEVICES ? device.index : 0;
    return stream ? TOY_CAST(toy_queue *, stream) : toy_gpu.queues[index];
}

static tprpc_device toy_device(int32_t index) {
    tprpc_device device;
    device.kind = TPRPC_DEVICE_USER;
    device.index = index;
    return device;
}

TOY_USED static void toys_begin(int64_t lag_us) {
    int i;
    toy_gpu.lag_us = lag_us;
    for (i = 0; i < TOY_DEVICES; i++) toy_gpu.queues[i] = toy_queue_new();
}

TOY_USED static void toys_end(void) {
    int i;
    for (i = 0; i < TOY_DEVICES; i++) toy_queue_free(toy_gpu.queues[i]);
    CHECK_EQ_INT(toy_count(&toy_gpu.allocated), 0);
    CHECK_EQ_INT(toy_count(&toy_gpu.prepared), toy_count(&toy_gpu.sent));
    CHECK(toy_hub.listeners == NULL);
}

static void *toy_map(int fd, size_t size, int protection) {
    void *at = mmap(NULL, size, protection, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? NULL : at;
}

static int toy_memfd(size_t size) {
    int fd = memfd_create("toy", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, TOY_CAST(off_t, size ? size : 1)) != 0) abort();
    return fd;
}

/* Device memory at an odd address within its mapping, so that nobody relies on pages. */
static void *toy_gpu_alloc(int32_t index, size_t size) {
    toy_memory *memory = TOY_NEW(toy_memory);
    int fd = toy_memfd(size + 64);
    if (!memory || fd < 0) abort();
    memory->size = size;
    memory->index = index;
    memory->face = TOY_CAST(uint8_t *, toy_map(fd, size + 64, PROT_NONE));
    memory->real = TOY_CAST(uint8_t *, toy_map(fd, size + 64, PROT_READ | PROT_WRITE));
    close(fd);
    if (!memory->face || !memory->real) abort();
    pthread_mutex_lock(&toy_gpu.lock);
    memory->next = toy_gpu.memory;
    toy_gpu.memory = memory;
    pthread_mutex_unlock(&toy_gpu.lock);
    __sync_fetch_and_add(&toy_gpu.allocated, 1);
    return memory->face + 64;
}

static void toy_gpu_free(void *data) {
    toy_memory **at, *memory;
    if (!data) return;
    pthread_mutex_lock(&toy_gpu.lock);
    for (at = &toy_gpu.memory; *at && (*at)->face + 64 != data; at = &(*at)->next) {}
    memory = *at;
    if (!memory) abort();
    *at = memory->next;
    pthread_mutex_unlock(&toy_gpu.lock);
    munmap(memory->face, memory->size + 64);
    munmap(memory->real, memory->size + 64);
    free(memory);
    __sync_fetch_and_sub(&toy_gpu.allocated, 1);
}

/* For the device's threads alone: where `data` really is; NULL when it is no such memory. */
static uint8_t *toy_gpu_real(const void *data, size_t size) {
    const uint8_t *at = TOY_CAST(const uint8_t *, data);
    uint8_t *real = NULL;
    toy_memory *memory;
    pthread_mutex_lock(&toy_gpu.lock);
    for (memory = toy_gpu.memory; memory && !real; memory = memory->next)
        if (at >= memory->face + 64 && at + size <= memory->face + 64 + memory->size)
            real = memory->real + (at - memory->face);
    pthread_mutex_unlock(&toy_gpu.lock);
    return real;
}

/* A copy in a queue's order. */
typedef struct toy_copy {
    toy_job job;
    void   *to;
    void   *from;
    size_t  size;
    bool    to_device, from_device, free_from;
    int     done;                      /* atomic */
    bool    waited;                    /* somebody waits for it and frees it */
} toy_copy;

static void toy_copy_run(toy_job *job) {
    toy_copy *self = TOY_OF(toy_copy, job);
    void *to = self->to_device ? toy_gpu_real(self->to, self->size) : self->to;
    const void *from = self->from_device ? toy_gpu_real(self->from, self->size) : self->from;
    bool waited = self->waited;
    if (self->size && (!to || !from)) abort();
    if (self->size) memcpy(to, from, self->size);
    if (self->free_from) free(self->from);
    if (waited) __sync_fetch_and_add(&self->done, 1);
    else free(self);
}

/* Writes bytes (copied at once) to device memory; the queue gets to it later. */
TOY_USED static void toy_gpu_put(toy_queue *queue, void *to, const void *bytes, size_t size) {
    toy_copy *copy = TOY_NEW(toy_copy);
    void *stage = malloc(size ? size : 1);
    if (!copy || !stage) abort();
    memcpy(stage, bytes, size);
    copy->job.run = toy_copy_run;
    copy->to = to;
    copy->from = stage;
    copy->size = size;
    copy->to_device = copy->free_from = true;
    toy_queue_put(queue, &copy->job);
}

/* Reads device memory after all that is in the queue; waits for it. */
TOY_USED static void toy_gpu_get(toy_queue *queue, void *out, void *from, size_t size) {
    toy_copy *copy = TOY_NEW(toy_copy);
    if (!copy) abort();
    copy->job.run = toy_copy_run;
    copy->to = out;
    copy->from = from;
    copy->size = size;
    copy->from_device = copy->waited = true;
    toy_queue_put(queue, &copy->job);
    while (!toy_count(&copy->done)) test_sleep_us(50);
    free(copy);
}

/* ---- the channel ----------------------------------------------------------------------------------------- */

enum { TOYC_WANT = 1, TOYC_READY, TOYC_DONE, TOYC_DROP, TOYC_CANCEL };   /* control: kind, 7 zeros, transfer */
enum { TOYC_HEAD = 16, TOYC_INLINE = 2048 };        /* descriptor: count, kind, total; the bytes of a small batch */
enum { TOYC_APART = 1, TOYC_WITHIN = 2 };

typedef struct toyc_net {              /* an instance, and its completion queue */
    const tprpc_host *host;
    pthread_mutex_t   lock;
    struct toyc_transfer *copied, **last;
    int               event;
    bool              armed, rung;
} toyc_net;

typedef struct toyc_end {
    toyc_net         *net;
    tprpc_link       *link;
    struct toyc_transfer *first;
    uint64_t          secret;
} toyc_end;

typedef struct toyc_piece { toy_job job; struct toyc_transfer *of; size_t offset; tprpc_buffer buffer; } toyc_piece;

typedef struct toyc_transfer {
    tprpc_work work, taken;            /* work: from a queue's thread; taken: the link's */
    struct toyc_transfer *next, *next_copied;
    toyc_end       *end;
    tprpc_transfer *transfer;
    bool            sending, wanted, staged, begun, busy, bulking, within;
    tprpc_status    aborted;
    int             left;              /* pieces in queues, atomic */
    int             fd;                /* of the stage */
    size_t          count, total, received;
    uint8_t        *stage;
    toyc_piece     *pieces;
} toyc_transfer;

static tprpc_status toyc_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    toyc_net *self = TOY_NEW(toyc_net);
    (void)user;
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "toychan: no memory");
    self->host = host;
    self->last = &self->copied;
    self->event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (self->event < 0 || pthread_mutex_init(&self->lock, NULL) != 0) abort();
    *instance = self;
    return TPRPC_OK;
}

static void toyc_close(void *instance) {
    toyc_net *self = TOY_CAST(toyc_net *, instance);
    if (self->copied) abort();         /* all ends are detached by then */
    close(self->event);
    pthread_mutex_destroy(&self->lock);
    free(self);
}

static size_t toyc_domain(void *instance, uint8_t *out, size_t capacity) {
    (void)instance;
    if (capacity < 3) return 0;
    memcpy(out, "toy", 3);
    return 3;
}

static bool toyc_reaches(void *instance, const uint8_t *domain, size_t size) {
    (void)instance;
    return size == 3 && memcmp(domain, "toy", 3) == 0;
}

static bool toyc_moves(void *instance, tprpc_device from, tprpc_device to) {
    bool known = (from.kind == TPRPC_CPU || from.kind == TPRPC_DEVICE_USER) &&
                 (to.kind == TPRPC_CPU || to.kind == TPRPC_DEVICE_USER);
    (void)instance;
    return known && (from.kind == TPRPC_DEVICE_USER || to.kind == TPRPC_DEVICE_USER);
}

static tprpc_status toyc_attach(void *instance, tprpc_link *link, void **end, tprpc_error *error) {
    toyc_end *self = TOY_NEW(toyc_end);
    if (!self) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "toychan: no memory");
    self->net = TOY_CAST(toyc_net *, instance);
    self->link = link;
    self->secret = TOY_CAST(uint64_t, test_now_us()) * UINT64_C(0x9E3779B97F4A7C15);
    *end = self;
    return TPRPC_OK;
}

static void toyc_detach(void *end) {
    if (TOY_CAST(toyc_end *, end)->first) abort();      /* detach comes after the last transfer ended */
    free(end);
}

static size_t toyc_challenge(void *end, uint8_t *out, size_t capacity) {
    (void)capacity;
    memcpy(out, &TOY_CAST(toyc_end *, end)->secret, 8);
    return 8;
}

static size_t toyc_answer(void *end, const uint8_t *challenge, size_t size, uint8_t *out, size_t capacity) {
    size_t i;
    (void)end;
    (void)capacity;
    for (i = 0; i < size && i < 8; i++) out[i] = TOY_CAST(uint8_t, toy_gpu.liar ? 0 : ~challenge[i]);
    return i;
}

static tprpc_status toyc_verify(void *end, const uint8_t *answer, size_t size, tprpc_error *error) {
    uint64_t secret = ~TOY_CAST(toyc_end *, end)->secret;
    if (size == 8 && memcmp(answer, &secret, 8) == 0) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_UNSUPPORTED, 0, "toychan: the twin answered wrongly");
}

static void toyc_say(toyc_end *end, uint8_t kind, uint64_t id, const intptr_t *handle) {
    uint8_t bytes[16];
    memset(bytes, 0, sizeof bytes);
    bytes[0] = kind;
    memcpy(bytes + 8, &id, 8);
    tprpc_link_control(end->link, bytes, sizeof bytes, handle, handle ? 1 : 0);   /* one that fails aborts all */
}

static toyc_transfer *toyc_find(toyc_end *end, uint64_t id, bool sending) {
    toyc_transfer *t = end->first;
    while (t && (t->transfer->id != id || t->sending != sending)) t = t->next;
    return t;
}

static void toyc_drop_stage(toyc_transfer *self) {
    if (self->stage) munmap(self->stage, self->total ? self->total : 1);
    if (self->fd >= 0) close(self->fd);
    self->stage = NULL;
    self->fd = -1;
}

static void toyc_finish(toyc_transfer *self, tprpc_status status) {
    toyc_transfer **at = &self->end->first;
    tprpc_transfer *transfer = self->transfer;
    tprpc_error error;
    if (self->busy || self->bulking) abort();
    while (*at != self) at = &(*at)->next;
    *at = self->next;
    toyc_drop_stage(self);
    free(self->pieces);
    free(self);
    if (status != TPRPC_OK) tprpc_error_set(&error, status, 0, "toychan: the transfer was broken off");
    tprpc_transfer_done(transfer, status, status == TPRPC_OK ? NULL : &error);
}

/* On a queue's thread: the loop is to go on with it. */
static void toyc_complete(toyc_transfer *self) {
    toyc_net *net = self->end->net;
    uint64_t one = 1;
    pthread_mutex_lock(&net->lock);
    *net->last = self;
    net->last = &self->next_copied;
    if (net->armed && !net->rung) {    /* whoever does not sleep looks for himself */
        net->rung = true;
        if (write(net->event, &one, sizeof one) < 0) abort();
    }
    pthread_mutex_unlock(&net->lock);
}

/* On a queue's thread. */
static void toyc_piece_run(toy_job *job) {
    toyc_piece *piece = TOY_OF(toyc_piece, job);
    toyc_transfer *self = piece->of;
    const tprpc_buffer *buffer = &piece->buffer;
    uint8_t *data = TOY_CAST(uint8_t *, buffer->data), *stage = self->stage + piece->offset;
    if (buffer->device.kind == TPRPC_DEVICE_USER) data = toy_gpu_real(buffer->data, buffer->size);
    if (buffer->size && !data) abort();
    if (buffer->size) memcpy(self->sending ? stage : data, self->sending ? data : stage, buffer->size);
    if (__sync_sub_and_fetch(&self->left, 1) > 0) return;
    if (self->count == 1) tprpc_defer(self->end->net->host->context, &self->work);
    else toyc_complete(self);
}

/* Copies between stage and buffers, in the order of the buffers' queues. */
static void toyc_copy(toyc_transfer *self) {
    size_t i;
    self->busy = true;
    self->left = TOY_CAST(int, self->count);
    for (i = 0; i < self->count; i++) {
        self->pieces[i].job.run = toyc_piece_run;
        toy_queue_put(toy_queue_of(self->pieces[i].buffer.device, self->pieces[i].buffer.stream), &self->pieces[i].job);
    }
}

/* A sender whose bytes are staged and wanted sends them. */
static void toyc_offer(toyc_transfer *self) {
    intptr_t fd = self->fd;
    if (!self->staged || !self->wanted || self->begun) return;
    self->begun = true;
    if (tprpc_link_handles(self->end->link)) {
        __sync_fetch_and_add(&toy_gpu.passed, 1);
        toyc_say(self->end, TOYC_READY, self->transfer->id, &fd);
        return;
    }
    __sync_fetch_and_add(&toy_gpu.bulk, 1);
    self->bulking = true;
    if (tprpc_link_bulk(self->end->link, self->transfer->id, 0, self->stage, self->total, &self->taken) == TPRPC_OK)
        return;
    self->bulking = false;
    toyc_finish(self, TPRPC_ERROR_PEER);
}

static void toyc_taken(tprpc_work *work) {
    toyc_transfer *self = TOY_CAST(toyc_transfer *, TOY_CAST(void *, TOY_CAST(char *, TOY_CAST(void *, work)) -
                                                                         offsetof(toyc_transfer, taken)));
    self->bulking = false;
    toyc_finish(self, self->aborted);
}

/* Back on the loop: a queue's thread has copied, or a receive with its bytes within the descriptor begins. */
static void toyc_back(tprpc_work *work) {
    toyc_transfer *self = TOY_OF(toyc_transfer, work);
    uint64_t id = self->transfer->id;
    self->busy = false;
    if (self->aborted != TPRPC_OK) {
        if (self->aborted == TPRPC_ERROR_CANCELLED)
            toyc_say(self->end, self->sending ? TOYC_CANCEL : TOYC_DROP, id, NULL);
        toyc_finish(self, self->aborted);
    } else if (self->sending) {
        self->staged = true;
        toyc_offer(self);
    } else if (self->within) {
        self->within = false;
        toyc_copy(self);
    } else {
        if (self->fd >= 0) toyc_say(self->end, TOYC_DONE, id, NULL);
        toyc_finish(self, TPRPC_OK);
    }
}

static bool toyc_progress(void *instance) {
    toyc_net *net = TOY_CAST(toyc_net *, instance);
    toyc_transfer *self;
    uint64_t count;
    bool did = false;
    pthread_mutex_lock(&net->lock);
    net->armed = false;
    if (net->rung && read(net->event, &count, sizeof count) < 0) abort();
    net->rung = false;
    while ((self = net->copied) != NULL) {
        net->copied = self->next_copied;
        if (!net->copied) net->last = &net->copied;
        pthread_mutex_unlock(&net->lock);
        __sync_fetch_and_add(&toy_gpu.completed, 1);
        toyc_back(&self->work);
        did = true;
        pthread_mutex_lock(&net->lock);
    }
    pthread_mutex_unlock(&net->lock);
    return did;
}

static bool toyc_arm(void *instance, int64_t *deadline_us) {
    toyc_net *net = TOY_CAST(toyc_net *, instance);
    bool armed;
    (void)deadline_us;
    pthread_mutex_lock(&net->lock);
    armed = net->armed = net->copied == NULL;
    pthread_mutex_unlock(&net->lock);
    return armed;
}

static intptr_t toyc_handle(void *instance) { return TOY_CAST(toyc_net *, instance)->event; }

static toyc_transfer *toyc_new(toyc_end *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count) {
    toyc_transfer *self = TOY_NEW(toyc_transfer);
    size_t i;
    if (!self) abort();
    self->pieces = TOY_CAST(toyc_piece *, calloc(count + 1, sizeof(toyc_piece)));
    if (!self->pieces) abort();
    self->end = end;
    self->transfer = transfer;
    self->count = count;
    self->fd = -1;
    for (i = 0; i < count; i++) {
        self->pieces[i].of = self;
        self->pieces[i].buffer = buffers[i];
        self->pieces[i].offset = self->total;
        self->total += buffers[i].size;
    }
    self->work.run = toyc_back;
    self->taken.run = toyc_taken;
    self->work.loop = self->taken.loop = end->net->host->loop;
    self->next = end->first;
    end->first = self;
    transfer->channel_data = self;
    return self;
}

static void toyc_stage(toyc_transfer *self) {
    self->fd = toy_memfd(self->total);
    self->stage = TOY_CAST(uint8_t *, toy_map(self->fd, self->total ? self->total : 1, PROT_READ | PROT_WRITE));
    if (!self->stage) abort();
}

static tprpc_status toyc_send(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                              uint8_t *descriptor, size_t *descriptor_size, tprpc_error *error) {
    toyc_transfer *self = toyc_new(TOY_CAST(toyc_end *, end), transfer, buffers, count);
    uint32_t head[2];
    uint64_t total = self->total;
    bool within = total <= TOYC_INLINE && *descriptor_size >= TOYC_HEAD + TOYC_INLINE;
    size_t i;
    (void)error;
    self->sending = true;
    for (i = 0; i < count; i++) within = within && buffers[i].device.kind == TPRPC_CPU;
    head[0] = TOY_CAST(uint32_t, count);
    head[1] = within ? TOYC_WITHIN : TOYC_APART;
    memcpy(descriptor, head, 8);
    memcpy(descriptor + 8, &total, 8);
    *descriptor_size = TOYC_HEAD + (within ? self->total : 0);
    if (within) {
        for (i = 0; i < count; i++)
            memcpy(descriptor + TOYC_HEAD + self->pieces[i].offset, buffers[i].data, buffers[i].size);
        __sync_fetch_and_add(&toy_gpu.inlined, 1);
        toyc_finish(self, TPRPC_OK);
        return TPRPC_OK;
    }
    toyc_stage(self);
    toyc_copy(self);
    return TPRPC_OK;
}

static tprpc_status toyc_recv(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                              const uint8_t *descriptor, size_t descriptor_size, tprpc_error *error) {
    toyc_end *owner = TOY_CAST(toyc_end *, end);
    toyc_transfer *self;
    uint32_t head[2];
    uint64_t total, expected = 0;
    size_t i;
    for (i = 0; i < count; i++) expected += buffers[i].size;
    if (descriptor_size < TOYC_HEAD)
        return tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "toychan: a short descriptor");
    memcpy(head, descriptor, 8);
    memcpy(&total, descriptor + 8, 8);
    if (head[0] != count || total != expected || (head[1] != TOYC_APART && head[1] != TOYC_WITHIN) ||
        descriptor_size != TOYC_HEAD + (head[1] == TOYC_WITHIN ? total : 0) || toyc_find(owner, transfer->id, false))
        return tprpc_error_set(error, TPRPC_ERROR_PROTOCOL, 0, "toychan: a wrong descriptor");
    self = toyc_new(owner, transfer, buffers, count);
    if (head[1] == TOYC_APART) {
        toyc_say(owner, TOYC_WANT, transfer->id, NULL);
        return TPRPC_OK;
    }
    toyc_stage(self);
    close(self->fd);
    self->fd = -1;
    memcpy(self->stage, descriptor + TOYC_HEAD, self->total);
    self->within = self->busy = true;  /* not now: a refused message is aborted at once */
    tprpc_defer(owner->net->host->context, &self->work);
    return TPRPC_OK;
}

static void toyc_abort(void *end, tprpc_transfer *transfer, bool link_lost) {
    toyc_transfer *self = TOY_CAST(toyc_transfer *, transfer->channel_data);
    toyc_end *owner = TOY_CAST(toyc_end *, end);
    if (self->aborted == TPRPC_OK) self->aborted = link_lost ? TPRPC_ERROR_PEER : TPRPC_ERROR_CANCELLED;
    if (self->busy || self->bulking) return;       /* it ends when its memory is untouched */
    if (!link_lost) toyc_say(owner, self->sending ? TOYC_CANCEL : TOYC_DROP, transfer->id, NULL);
    toyc_finish(self, self->aborted);
}

/* The other side wants no more of it. */
static void toyc_refused(toyc_transfer *self) {
    if (self->aborted == TPRPC_OK) self->aborted = TPRPC_ERROR_PEER;
    if (!self->busy && !self->bulking) toyc_finish(self, self->aborted);
}

static void toyc_ready(toyc_transfer *self, const intptr_t *handles) {
    struct stat info;
    self->fd = fcntl(TOY_CAST(int, handles[0]), F_DUPFD_CLOEXEC, 0);
    if (self->fd >= 0 && fstat(self->fd, &info) == 0 && TOY_CAST(uint64_t, info.st_size) >= self->total)
        self->stage = TOY_CAST(uint8_t *, toy_map(self->fd, self->total ? self->total : 1, PROT_READ | PROT_WRITE));
    if (self->stage) toyc_copy(self);
    else toyc_refused(self);
}

/* The handles stay the library's: it closes them when this returns. */
static tprpc_status toyc_control(void *end, const uint8_t *bytes, size_t size, const intptr_t *handles,
                                 size_t handle_count) {
    toyc_end *owner = TOY_CAST(toyc_end *, end);
    toyc_transfer *self;
    uint64_t id;
    if (size != 16 || handle_count > 1 || handle_count != (bytes[0] == TOYC_READY ? 1u : 0u))
        return TPRPC_ERROR_PROTOCOL;
    memcpy(&id, bytes + 8, 8);
    self = toyc_find(owner, id, bytes[0] == TOYC_WANT || bytes[0] == TOYC_DONE || bytes[0] == TOYC_DROP);
    switch (bytes[0]) {
    case TOYC_WANT:
        if (!self) toyc_say(owner, TOYC_CANCEL, id, NULL);
        else if (self->wanted) return TPRPC_ERROR_PROTOCOL;
        if (!self) return TPRPC_OK;
        self->wanted = true;
        toyc_offer(self);
        return TPRPC_OK;
    case TOYC_READY:
        if (self && (self->busy || self->stage)) return TPRPC_ERROR_PROTOCOL;
        if (self) toyc_ready(self, handles);
        return TPRPC_OK;
    case TOYC_DONE:
        if (self && (self->busy || self->bulking || !self->begun)) return TPRPC_ERROR_PROTOCOL;
        if (self) toyc_finish(self, TPRPC_OK);
        return TPRPC_OK;
    case TOYC_DROP:
    case TOYC_CANCEL:
        if (self) toyc_refused(self);
        return TPRPC_OK;
    default: return TPRPC_ERROR_PROTOCOL;
    }
}

static void *toyc_bulk(void *end, uint64_t transfer, uint64_t offset, size_t size) {
    toyc_transfer *self = toyc_find(TOY_CAST(toyc_end *, end), transfer, false);
    if (!self || self->busy || self->aborted != TPRPC_OK || offset != self->received || size > self->total - offset)
        return NULL;
    if (!self->stage) {
        toyc_stage(self);
        close(self->fd);
        self->fd = -1;
    }
    return self->stage + offset;
}

static void toyc_bulk_done(void *end, uint64_t transfer, uint64_t offset, size_t size) {
    toyc_transfer *self = toyc_find(TOY_CAST(toyc_end *, end), transfer, false);
    if (!self || offset != self->received) return;
    self->received += size;
    if (self->received == self->total) toyc_copy(self);
}

static tprpc_status toyc_register(void *instance, const tprpc_allocation *allocation, tprpc_error *error) {
    (void)instance;
    if (allocation->base && allocation->size) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "toychan: no memory");
}

static void toyc_deregister(void *instance, const tprpc_allocation *allocation) {
    (void)instance;
    (void)allocation;
}

static const tprpc_channel_table toyc_table = {
    TOY_CAST(uint32_t, sizeof(tprpc_channel_table)), TPRPC_CHANNEL_MUTUAL, 0, 1, 0, TOYC_HEAD + TOYC_INLINE,
    toyc_open, toyc_close, toyc_domain, toyc_reaches, toyc_progress, toyc_arm, toyc_handle, toyc_moves, toyc_attach,
    toyc_detach, toyc_challenge, toyc_answer, toyc_verify, toyc_send, toyc_recv, toyc_abort, toyc_control, toyc_bulk,
    toyc_bulk_done, toyc_register, toyc_deregister, NULL, NULL, 0
};

TOY_USED static const tprpc_backend toyc_backend = {TOY_CAST(uint32_t, sizeof(tprpc_backend)),
                                                    TPRPC_VERSION,
                                                    "toychan",
                                                    "Memory that the CPU must not touch, for tests.",
                                                    2000,
                                                    NULL,
                                                    &toyc_table,
                                                    NULL,
                                                    NULL};

/* ---- the converter --------------------------------------------------------------------------------------- */

static int32_t toyd_device_count(void *user) {
    (void)user;
    return TOY_DEVICES;
}

static void *toyd_stream(void *user, tprpc_context *ctx, tprpc_device device) {
    (void)user;
    (void)ctx;
    return toy_queue_of(device, NULL);
}

static tprpc_status toyd_prepare(void *user, tprpc_context *ctx, tprpc_tensor *tensor, void **keep,
                                 tprpc_error *error) {
    (void)user;
    (void)ctx;
    if (tensor->size && !toy_gpu_real(tensor->data, tensor->size))
        return tprpc_error_set(error, TPRPC_ERROR_INVALID, 0, "toydev: that is no memory of the device's");
    tensor->stream = toy_queue_of(tensor->device, tensor->stream);
    *keep = malloc(1);
    __sync_fetch_and_add(&toy_gpu.prepared, 1);
    return TPRPC_OK;
}

static void toyd_sent(void *user, tprpc_context *ctx, void *keep) {
    (void)user;
    (void)ctx;
    free(keep);
    __sync_fetch_and_add(&toy_gpu.sent, 1);
}

static tprpc_status toyd_copy(void *user, tprpc_context *ctx, const tprpc_tensor *tensor, void **data,
                              tprpc_error *error) {
    toy_copy *copy = TOY_NEW(toy_copy);
    (void)user;
    (void)ctx;
    if (!copy) return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "toydev: no memory");
    *data = toy_gpu_alloc(tensor->device.index, tensor->size);
    copy->job.run = toy_copy_run;
    copy->to = *data;
    copy->from = tensor->data;
    copy->size = tensor->size;
    copy->to_device = copy->from_device = true;
    __sync_fetch_and_add(&toy_gpu.copied, 1);
    toy_queue_put(toy_queue_of(tensor->device, tensor->stream), &copy->job);
    return TPRPC_OK;
}

static tprpc_status toyd_allocate(void *user, tprpc_context *ctx, tprpc_tensor *tensor, tprpc_error *error) {
    (void)user;
    (void)ctx;
    if (tensor->device.index < 0 || tensor->device.index >= TOY_DEVICES)
        return tprpc_error_set(error, TPRPC_ERROR_DEVICE, 0, "toydev: there is no device %d",
                               TOY_CAST(int, tensor->device.index));
    tensor->data = toy_gpu_alloc(tensor->device.index, tensor->size);
    tensor->stream = toy_queue_of(tensor->device, tensor->stream);
    return TPRPC_OK;
}

typedef struct toy_release { toy_job job; void *data; } toy_release;

static void toy_release_run(toy_job *job) {
    toy_release *self = TOY_OF(toy_release, job);
    toy_gpu_free(self->data);
    free(self);
}

/* After what is queued on the stream: that may use the memory still. */
static void toyd_release(void *user, tprpc_context *ctx, tprpc_device device, void *data, size_t size, void *stream) {
    toy_release *release = TOY_NEW(toy_release);
    (void)user;
    (void)ctx;
    (void)size;
    if (!release) abort();
    release->job.run = toy_release_run;
    release->data = data;
    toy_queue_put(toy_queue_of(device, stream), &release->job);
}

static const tprpc_converter_table toyd_table = {
    TOY_CAST(uint32_t, sizeof(tprpc_converter_table)), TPRPC_DEVICE_USER, toyd_device_count, toyd_stream, toyd_prepare,
    toyd_sent, toyd_copy, toyd_allocate, toyd_release
};

TOY_USED static const tprpc_backend toyd_backend = {TOY_CAST(uint32_t, sizeof(tprpc_backend)),
                                                    TPRPC_VERSION,
                                                    "toydev",
                                                    "The memory of toychan.",
                                                    0,
                                                    NULL,
                                                    NULL,
                                                    &toyd_table,
                                                    NULL};

/* All three, for tprpc_context_desc.backends. */
TOY_USED static const tprpc_backend *const toy_backends[] = {&toy_backend, &toyc_backend, &toyd_backend};

#endif
