/* Pipes between two contexts and batches of tensors, on the CPU and on a kind of device: what toys.c and
   in_conformance.c share. The one that includes it may set world_backends and world_kit first. */
#ifndef TPRPC_TESTS_TOYS_USE_H
#define TPRPC_TESTS_TOYS_USE_H

#include "toys.h"

#include <sys/socket.h>

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))
enum { WAIT_S = 20, BIG = 1024 * 1024 + 1 };

/* ---- a kind of device ---- */

typedef struct kit {
    const char *name;                  /* in those of tests */
    int32_t kind;
    const tprpc_backend *converter, *channel;  /* the second: one that moves it between contexts of a process */
    const tprpc_backend *within, *apart;       /* channels: between contexts of one process, of two alone; NULL: none */
    tprpc_status unknown;              /* what comes of a device that is not there */
    bool    ordered;                   /* a transfer ends once it is ordered in streams, and need not have happened */
    void  (*begin)(int64_t lag_us);    /* after the last fork: streams of its own, on which all is that late */
    void  (*end)(void);                /* when all is destroyed: nothing is left */
    bool  (*idle)(void);               /* what is queued on these streams has run */
    void *(*stream)(int32_t index);    /* the one of a device, of TOY_DEVICES */
    void *(*stream_new)(int32_t index);
    void  (*stream_free)(void *stream);        /* once what is queued has run */
    void *(*alloc)(int32_t index, size_t size);
    void  (*free)(int32_t index, void *data);
    /* in the order of the stream of that device, NULL is one too; get waits */
    void  (*put)(int32_t index, void *stream, void *to, const void *bytes, size_t size);
    void  (*get)(int32_t index, void *stream, void *out, void *from, size_t size);
} kit;

TOY_USED static void *toy_kit_stream(int32_t index) { return toy_gpu.queues[index]; }
TOY_USED static void *toy_kit_stream_new(int32_t index) {
    (void)index;
    return toy_queue_new();
}
TOY_USED static void toy_kit_stream_free(void *stream) { toy_queue_free(TOY_CAST(toy_queue *, stream)); }
TOY_USED static void toy_kit_free(int32_t index, void *data) {
    (void)index;
    toy_gpu_free(data);
}
TOY_USED static bool toy_kit_idle(void) {
    int i;
    for (i = 0; i < TOY_DEVICES; i++) {
        toy_queue_free(toy_gpu.queues[i]);
        toy_gpu.queues[i] = toy_queue_new();
    }
    return true;
}
TOY_USED static void toy_kit_put(int32_t index, void *stream, void *to, const void *bytes, size_t size) {
    toy_gpu_put(toy_queue_of(toy_device(index), stream), to, bytes, size);
}
TOY_USED static void toy_kit_get(int32_t index, void *stream, void *out, void *from, size_t size) {
    toy_gpu_get(toy_queue_of(toy_device(index), stream), out, from, size);
}

TOY_USED static const kit toy_kit = {"user", TPRPC_DEVICE_USER, &toyd_backend, &toyc_backend, NULL, NULL,
                                     TPRPC_ERROR_DEVICE, false, toys_begin, toys_end, toy_kit_idle, toy_kit_stream,
                                     toy_kit_stream_new, toy_kit_stream_free, toy_gpu_alloc, toy_kit_free, toy_kit_put,
                                     toy_kit_get};

/* Of what batches are that are not of host memory. */
static const kit *world_kit = &toy_kit;

TOY_USED static tprpc_device world_device(int32_t index) {
    tprpc_device device;
    device.kind = world_kit->kind;
    device.index = index;
    return device;
}

/* ---- two contexts and a pipe between them ---- */

typedef struct world {
    tprpc_context  *ctx[2];
    tprpc_listener *listener;
    tprpc_pipe     *pipe[2];           /* who listens; who connects */
    int             threads, accepted;
} world;

/* What contexts are created with. */
static const tprpc_backend *const *world_backends = toy_backends;
static size_t world_backend_count = COUNT(toy_backends);
static uint64_t world_memory;

/* Where the ends are in two processes: which one this process has, and a socket to the other process. */
static struct { bool apart; int side, socket; } world_half = {false, 0, -1};

TOY_USED static bool world_here(int side) { return !world_half.apart || world_half.side == side; }

TOY_USED static int64_t deadline(void) { return test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN; }

TOY_USED static void pump(world *w) {
    if (w->threads) { test_sleep_us(100); return; }
    if (w->ctx[0]) tprpc_poll(w->ctx[0], TPRPC_NOW, 0);
    if (w->ctx[1]) tprpc_poll(w->ctx[1], 200, 0);
}

/* Works until the other process, where there is one, is here too. */
TOY_USED static void world_meet(world *w) {
    const int64_t end = deadline();
    char byte = 0;
    if (!world_half.apart) return;
    REQUIRE(send(world_half.socket, &byte, 1, MSG_NOSIGNAL) == 1);
    while (recv(world_half.socket, &byte, 1, MSG_DONTWAIT) != 1) {
        REQUIRE(test_now_us() < end);
        pump(w);
    }
}

/* Works until memory that batches had on devices is free of their streams. */
TOY_USED static void world_settle(world *w) {
    const int64_t end = deadline();
    while (!world_kit->idle()) {
        REQUIRE(test_now_us() < end);
        pump(w);
    }
}

TOY_USED static bool reaches(world *w, int *counter, int least) {
    int64_t end = deadline();
    while (toy_count(counter) < least) {
        if (test_now_us() > end) return false;
        pump(w);
    }
    return true;
}
#define UNTIL(w, counter, least) REQUIRE(reaches(w, &(counter), least))

TOY_USED static tprpc_context *context(const char *transports, const char *channels, int threads) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.backends = world_backends;
    desc.backend_count = world_backend_count;
    desc.limits.memory_bytes = world_memory;
    desc.transports = transports;
    desc.channels = channels;
    desc.threads = threads;
    desc.lanes = 3;                    /* for mpt, which is not used without */
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

TOY_USED static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    world *w = TOY_CAST(world *, user);
    CHECK_EQ_INT(status, TPRPC_OK);
    if (error) fprintf(stderr, "accept: %s\n", error->text);
    w->pipe[0] = pipe;
    __sync_fetch_and_add(&w->accepted, 1);
}

TOY_USED static void world_listen(world *w, const char *address, char *out, size_t size) {
    tprpc_listener_desc listening;
    tprpc_error error;
    memset(&listening, 0, sizeof listening);
    memset(&error, 0, sizeof error);
    listening.addresses = &address;
    listening.address_count = 1;
    if (tprpc_listen(w->ctx[0], &listening, &w->listener, &error) != TPRPC_OK)
        fprintf(stderr, "listen: %s\n", error.text);
    REQUIRE(w->listener != NULL);
    REQUIRE_EQ_INT(tprpc_accept(w->listener, on_accepted, w), TPRPC_OK);
    snprintf(out, size, "%s", tprpc_listener_address(w->listener, NULL));
}

TOY_USED static void world_open(world *w, const char *transports, const char *channels, const char *address,
                                int threads) {
    tprpc_pipe_desc connecting;
    tprpc_error error;
    char at[128] = "";
    int i;
    memset(w, 0, sizeof *w);
    memset(&connecting, 0, sizeof connecting);
    memset(&error, 0, sizeof error);
    w->threads = threads;
    for (i = 0; i < 2; i++)
        if (world_here(i)) w->ctx[i] = context(transports, channels, threads);
    if (world_here(0)) world_listen(w, address, at, sizeof at);
    if (!world_here(1)) REQUIRE(write(world_half.socket, at, sizeof at) == TOY_CAST(ssize_t, sizeof at));
    if (!world_here(0)) REQUIRE(read(world_half.socket, at, sizeof at) == TOY_CAST(ssize_t, sizeof at));
    connecting.address = at;
    if (world_here(1)) REQUIRE_EQ_INT(tprpc_connect(w->ctx[1], &connecting, &w->pipe[1], &error), TPRPC_OK);
    if (world_here(0)) UNTIL(w, w->accepted, 1);
    world_meet(w);                     /* who closes before is never accepted */
}

TOY_USED static void world_close(world *w) {
    int i;
    world_meet(w);
    tprpc_pipe_close(w->pipe[0]);
    tprpc_pipe_close(w->pipe[1]);
    if (w->listener) tprpc_listener_close(w->listener);
    for (i = 0; i < 2; i++) CHECK_EQ_INT(tprpc_context_destroy(w->ctx[i]), TPRPC_OK);
}

/* ---- outcomes ---- */

typedef struct outcome { int runs, releases; tprpc_status status; char text[244]; } outcome;

TOY_USED static void ended(outcome *o, tprpc_status status, const tprpc_error *error) {
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (error) memcpy(o->text, error->text, sizeof o->text);
    o->status = status;
    CHECK_EQ_INT(__sync_fetch_and_add(&o->runs, 1), 0);
}

TOY_USED static void on_written(tprpc_status status, const tprpc_error *error, void *user) {
    ended(TOY_CAST(outcome *, user), status, error);
}

TOY_USED static void on_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    CHECK_EQ_INT(status == TPRPC_OK, message != NULL);
    ended(TOY_CAST(outcome *, user), status, error);
}

TOY_USED static void on_described(tprpc_status status, const tprpc_message *message, const tprpc_error *error,
                                  void *user) {
    CHECK_EQ_INT(status == TPRPC_OK, message != NULL);
    ended(TOY_CAST(outcome *, user), status, error);
}

TOY_USED static void on_release(void *user) {
    CHECK_EQ_INT(__sync_fetch_and_add(&TOY_CAST(outcome *, user)->releases, 1), 0);
}

/* Shows what a read got to `seen` below, which runs within the callback. */
typedef struct seen { outcome o; void (*look)(const tprpc_message *message, void *arg); void *arg; } seen;

TOY_USED static void on_seen(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    seen *s = TOY_CAST(seen *, user);
    if (message) s->look(message, s->arg);
    ended(&s->o, status, error);
}

TOY_USED static void fill(void *data, size_t size, unsigned seed) {
    uint8_t *at = TOY_CAST(uint8_t *, data);
    size_t i;
    for (i = 0; i < size; i++) at[i] = TOY_CAST(uint8_t, (i * 131 + (i >> 8) * 7 + seed * 29) & 255);
}

TOY_USED static bool filled(const void *data, size_t size, unsigned seed) {
    const uint8_t *at = TOY_CAST(const uint8_t *, data);
    size_t i;
    for (i = 0; i < size; i++)
        if (at[i] != TOY_CAST(uint8_t, (i * 131 + (i >> 8) * 7 + seed * 29) & 255)) return false;
    return true;
}

TOY_USED static void *bytes_new(size_t size) {
    void *data = malloc(size ? size : 1);
    REQUIRE(data != NULL);
    return data;
}

/* ---- agents ---- */

TOY_USED static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (error) fprintf(stderr, "ready: %s\n", error->text);
    CHECK_EQ_INT(status, TPRPC_OK);
    __sync_fetch_and_add(TOY_CAST(int *, user), 1);
}

/* A context and an agent each, in one group; the store is the first one's. */
TOY_USED static tprpc_store *agents_create(world *w, const char *transports, const char *channels,
                                          tprpc_agent **agents) {
    static const char *const names[2] = {"left", "right"};
    tprpc_store *store = NULL;
    tprpc_store_desc store_desc;
    tprpc_error error;
    int i;
    memset(&store_desc, 0, sizeof store_desc);
    memset(&error, 0, sizeof error);
    for (i = 0; i < 2; i++) w->ctx[i] = context(transports, channels, 0);
    store_desc.url = "local://";
    REQUIRE_EQ_INT(tprpc_store_open(w->ctx[0], &store_desc, &store, &error), TPRPC_OK);
    for (i = 0; i < 2; i++) {
        tprpc_agent_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.context = w->ctx[i];
        desc.name = names[i];
        desc.rank = i;
        desc.world_size = 2;
        desc.store = store;
        if (tprpc_agent_create(&desc, &agents[i], &error) != TPRPC_OK) fprintf(stderr, "agent: %s\n", error.text);
        REQUIRE(agents[i] != NULL);
    }
    return store;
}

/* ---- batches of tensors ---- */

enum { ITEMS = 40 };

typedef struct batch {                 /* tensors of one message, from one kind to another */
    bool from_user, to_user;           /* on devices of world_kit */
    bool writes, reads;                /* this process does */
    size_t count;
    size_t size[ITEMS];
    void *from[ITEMS], *to[ITEMS];
    tprpc_tensor out[ITEMS], in[ITEMS];
    outcome written, described, got;
} batch;

TOY_USED static size_t batch_size(size_t i) {
    static const size_t some[] = {1, 64, 0, 4096, 4097, 3, 65536, 100001, 12, 300};
    return some[i % COUNT(some)];
}

/* From how many devices the tensors of a batch are. */
static size_t batch_sources = TOY_DEVICES;

TOY_USED static int32_t batch_source(size_t i) { return TOY_CAST(int32_t, i % batch_sources); }
TOY_USED static int32_t batch_target(size_t i) { return TOY_CAST(int32_t, (i + 1) % TOY_DEVICES); }

TOY_USED static void *place_new(bool user, int32_t index, size_t size) {
    return user ? world_kit->alloc(index, size) : bytes_new(size);
}
TOY_USED static void place_free(bool user, int32_t index, void *data) {
    if (user) world_kit->free(index, data);
    else free(data);
}

TOY_USED static void batch_fill(batch *b, bool from_user, bool to_user, size_t count, size_t size, unsigned seed) {
    size_t i;
    memset(b, 0, sizeof *b);
    b->from_user = from_user;
    b->to_user = to_user;
    b->count = count;
    for (i = 0; i < count; i++) {
        const int32_t index = batch_source(i);
        uint8_t *bytes;
        b->size[i] = size ? size : batch_size(i);
        bytes = TOY_CAST(uint8_t *, bytes_new(b->size[i]));
        fill(bytes, b->size[i], seed + TOY_CAST(unsigned, i));
        b->from[i] = place_new(from_user, index, b->size[i]);
        b->to[i] = place_new(to_user, batch_target(i), b->size[i]);
        b->out[i].data = b->from[i];
        b->in[i].data = b->to[i];
        b->out[i].size = b->in[i].size = b->size[i];
        if (to_user) b->out[i].target = b->in[i].device = world_device(batch_target(i));
        else b->out[i].target.kind = b->in[i].device.kind = TPRPC_CPU;
        if (from_user) {               /* written late: only the order of the queue makes it right */
            b->out[i].device = world_device(index);
            b->out[i].stream = world_kit->stream(index);
            world_kit->put(index, b->out[i].stream, b->from[i], bytes, b->size[i]);
        } else {
            memcpy(b->from[i], bytes, b->size[i]);
        }
        free(bytes);
    }
}

TOY_USED static void batch_check(batch *b, unsigned seed) {
    size_t i;
    for (i = 0; i < b->count; i++) {
        uint8_t *bytes = TOY_CAST(uint8_t *, bytes_new(b->size[i]));
        if (b->to_user) world_kit->get(batch_target(i), NULL, bytes, b->to[i], b->size[i]);
        else memcpy(bytes, b->to[i], b->size[i]);
        if (!CHECK(filled(bytes, b->size[i], seed + TOY_CAST(unsigned, i))))
            fprintf(stderr, "tensor %d of %d bytes\n", TOY_CAST(int, i), TOY_CAST(int, b->size[i]));
        free(bytes);
    }
}

TOY_USED static void batch_free(batch *b) {
    size_t i;
    for (i = 0; i < b->count; i++) {
        place_free(b->from_user, batch_source(i), b->from[i]);
        place_free(b->to_user, batch_target(i), b->to[i]);
    }
}

TOY_USED static void batch_write(world *w, batch *b, int side) {
    tprpc_message message;
    memset(&message, 0, sizeof message);
    message.tensors = b->out;
    message.tensor_count = b->count;
    message.release = on_release;      /* lent: no copy is made */
    message.release_user = &b->written;
    b->writes = world_here(side);
    if (!b->writes) return;
    REQUIRE_EQ_INT(tprpc_pipe_write(w->pipe[side], &message, on_written, &b->written), TPRPC_OK);
}

/* Once it is described. */
TOY_USED static void batch_takes(world *w, batch *b, int side) {
    tprpc_message message;
    memset(&message, 0, sizeof message);
    message.tensors = b->in;
    message.tensor_count = b->count;
    b->reads = true;
    REQUIRE_EQ_INT(b->described.status, TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(w->pipe[side], &message, on_read, &b->got), TPRPC_OK);
}

TOY_USED static void batch_read_after(world *w, batch *b, int side, int64_t pause_us) {
    if (!world_here(side)) return;
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(w->pipe[side], on_described, &b->described), TPRPC_OK);
    UNTIL(w, b->described.runs, 1);
    if (pause_us) test_sleep_us(pause_us);
    batch_takes(w, b, side);
}

TOY_USED static void batch_read(world *w, batch *b, int side) { batch_read_after(w, b, side, 0); }

TOY_USED static void batch_ends(world *w, batch *b, tprpc_status written, tprpc_status got) {
    if (b->writes) UNTIL(w, b->written.runs, 1);
    if (b->reads) UNTIL(w, b->got.runs, 1);
    if (b->writes) UNTIL(w, b->written.releases, 1);
    if (b->writes && !CHECK_EQ_INT(b->written.status, written)) fprintf(stderr, "written: %s\n", b->written.text);
    if (b->reads && !CHECK_EQ_INT(b->got.status, got)) fprintf(stderr, "read: %s\n", b->got.text);
}

TOY_USED static void batch_closed(const batch *b) {
    CHECK(b->got.status == TPRPC_OK || b->got.status == TPRPC_ERROR_PEER || b->got.status == TPRPC_ERROR_CLOSED);
    CHECK(b->written.status == TPRPC_OK || b->written.status == TPRPC_ERROR_PEER ||
          b->written.status == TPRPC_ERROR_CLOSED);
}

/* A pipe closes, on either side, while copies are late: every operation ends once, and only when its memory is free. */
TOY_USED static void run_closed(const char *transports, const char *channels, const char *address, const bool *kinds,
                                int closer, int context_too) {
    int moment;
    for (moment = 0; moment < 4; moment++) {
        world w;
        batch *b = TOY_CAST(batch *, bytes_new(sizeof(batch)));
        world_kit->begin(5000);
        world_open(&w, transports, channels, address, 0);
        batch_fill(b, kinds[0], kinds[1], 8, 70000, 1);
        batch_write(&w, b, 1);
        batch_read(&w, b, 0);
        world_meet(&w);
        if (moment > 0) {
            int64_t end = test_now_us() + moment * 7000;
            while (test_now_us() < end) pump(&w);
        }
        if (context_too && world_here(closer)) {
            if (w.listener) tprpc_listener_close(w.listener);
            w.listener = NULL;
            CHECK_EQ_INT(tprpc_context_destroy(w.ctx[closer]), TPRPC_OK);
            CHECK_EQ_INT(closer ? b->written.runs : b->got.runs, 1);
            if (closer) CHECK_EQ_INT(b->written.releases, 1);
            w.pipe[closer] = NULL;
            w.ctx[closer] = NULL;
        } else if (world_here(closer)) {
            tprpc_pipe_close(w.pipe[closer]);
            w.pipe[closer] = NULL;
        }
        if (b->writes) UNTIL(&w, b->written.runs, 1);
        if (b->reads) UNTIL(&w, b->got.runs, 1);
        CHECK_EQ_INT(b->written.releases, b->writes);
        batch_closed(b);
        if (moment == 0 && kinds[0] && kinds[1] && !world_kit->ordered) CHECK(b->got.status != TPRPC_OK);
        world_settle(&w);
        batch_free(b);
        free(b);
        world_close(&w);
        world_kit->end();
    }
}

#endif
