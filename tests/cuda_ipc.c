/* GPU memory between processes of one host: bytes, order, registered memory and other, and what becomes of streams when
   the other process is killed. */
#include "cuda_two.h"

enum { SIZE = 100000, LARGE = (34 << 20) + 12, FEW = 10 };
enum { SENT = 1, GOT, GO, DONE };      /* flags */

static const char *memory_mb = "256";
static void more_memory(void) { setenv("STANDIN_MEMORY_MB", memory_mb, 1); }

/* ---- bytes arrive ---- */

typedef struct trip { int from, to; bool registered; const size_t *sizes; size_t count; } trip;

static void trip_receive(two *t, void *arg) {
    const trip *x = (const trip *)arg;
    cargo c;
    for (size_t i = 0; i < x->count && x->from < gpu.count && x->to < gpu.count; i++) {
        CUstream r = gpu_stream(x->to);
        uint8_t *target = (uint8_t *)gpu_alloc(x->to, x->sizes[i] + 4 * i) + 4 * i;
        tprpc_tensor in = gpu_tensor(x->to, target, x->sizes[i], r, x->to);
        two_got(t, &c, &in, 1);
        CHECK(gpu_matches(x->to, r, target, x->sizes[i], i));
        gpu_free(x->to, target - 4 * i);
    }
    two_await(t, DONE);                /* it may not even have accepted, where there is nothing to send */
}

static void trip_send(void *arg) {
    const trip *x = (const trip *)arg;
    two t;
    cargo c;
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,cuda_basic,basic", trip_receive, arg);
    if (x->from < gpu.count && x->to < gpu.count) {
        for (size_t i = 0; i < x->count; i++) {
            CUstream s = gpu_stream(x->from);
            uint8_t *source = (uint8_t *)gpu_alloc(x->from, x->sizes[i] + i) + i;
            tprpc_tensor out = gpu_tensor(x->from, source, x->sizes[i], s, x->to);
            tprpc_error error;
            memset(&error, 0, sizeof error);
            if (x->registered)
                CHECK_EQ_INT(tprpc_cuda_register(t.s.ctx, x->from, source, x->sizes[i], &error), TPRPC_OK);
            gpu_put(x->from, s, source, x->sizes[i], i);
            two_sent(&t, &c, &out, 1);
            gpu_set(x->from, s, source, 0, x->sizes[i]);
            CU(cuStreamSynchronize(s));
            tprpc_status status = TPRPC_PENDING;
            while (x->registered && (status = tprpc_cuda_unregister(t.s.ctx, source, &error)) == TPRPC_PENDING)
                tprpc_poll(t.s.ctx, 1000, 0);
            if (x->registered) CHECK_EQ_INT(status, TPRPC_OK);
            gpu_free(x->from, source - i);
        }
        pipe_carries(t.s.pipe, "cuda_ipc", TPRPC_PATH_DEVICE_TO_DEVICE);
        pipe_carries(t.s.pipe, "cuda_basic", WITH_HOST);
        pipe_carries(t.s.pipe, "basic", TPRPC_PATH_HOST_TO_HOST);
        pipe_carries(t.s.pipe, "bulk", 0);
    }
    two_raise(&t, DONE);
    two_close(&t, false);
}

static const size_t sizes[] = {8, 1, SIZE, 64 << 10, (4 << 20) + 1, LARGE};

static void trips(bool registered, size_t first, size_t count) {
    for (int from = 0; from < 3; from++)
        for (int to = 0; to < 3; to++) {
            trip x;
            if (TEST_TSAN && (from != 0 || to == 0)) continue;      /* they take their time there */
            x.from = from;
            x.to = to;
            x.registered = registered;
            x.sizes = sizes + first;
            x.count = count;
            CHECK_EQ_INT(test_wait_child(test_fork_run(trip_send, &x), 30), 0);
        }
}

TEST(registered_memory) { trips(true, 0, 3); }
TEST(any_memory) { trips(false, 0, 4); }

static void large(bool registered) {
    trip x;
    x.from = 0;
    x.to = 1;
    x.registered = registered;
    x.sizes = sizes + 4;
    x.count = 2;
    trip_send(&x);
}

TEST(large_registered_memory) { large(true); }
TEST(large_memory) { large(false); }

TEST(large_memory_where_large_chunks_have_no_room) {
    memory_mb = "100";
    large(false);
}

/* One message that has more bytes than the outbox has: each chunk is used again, and one holds parts of two tensors. */
enum { MUCH = 5, MUCH_EACH = (22 << 20) + 4 };

static void much_receive(two *t, void *arg) {
    cargo c;
    tprpc_tensor in[MUCH];
    CUstream r = gpu_stream(1);
    (void)arg;
    uint8_t *target = (uint8_t *)gpu_alloc(1, MUCH * (size_t)MUCH_EACH);
    for (size_t i = 0; i < MUCH; i++) in[i] = gpu_tensor(1, target + i * MUCH_EACH, MUCH_EACH, r, 1);
    two_got(t, &c, in, MUCH);
    for (size_t i = 0; i < MUCH; i++) CHECK(gpu_matches(1, r, in[i].data, MUCH_EACH, i));
}

TEST(more_than_the_outbox_has) {
    two t;
    cargo c;
    tprpc_tensor out[MUCH];
    if (gpu_count_apart() < 2) SKIP("one device");
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", much_receive, NULL);
    CUstream s = gpu_stream(0);
    uint8_t *source = (uint8_t *)gpu_alloc(0, MUCH * (size_t)MUCH_EACH);
    for (size_t i = 0; i < MUCH; i++) {
        out[i] = gpu_tensor(0, source + i * MUCH_EACH, MUCH_EACH, s, 1);
        CU(cuStreamSynchronize(s));    /* what the bytes come from has room for two */
        gpu_put(0, s, out[i].data, MUCH_EACH, i);
    }
    two_sent(&t, &c, out, MUCH);
    gpu_set(0, s, source, 0, MUCH * (size_t)MUCH_EACH);
    two_close(&t, false);
}

/* ---- memory that others than cuMemAlloc gave: by way of the outbox; it cannot be registered ---- */

enum { ACROSS = (5 << 20) + 3 };

static void others_receive(two *t, void *arg) {
    cargo c;
    (void)arg;
    CUstream r = gpu_stream(0);
    for (int kind = 0; kind < 2; kind++) {
        void *target = kind ? gpu_alloc_virtual(0, ACROSS) : gpu_alloc_async(0, ACROSS, r);
        tprpc_tensor in = gpu_tensor(0, target, ACROSS, r, 0);
        two_got(t, &c, &in, 1);
        CHECK(gpu_matches(0, r, target, ACROSS, 3));
    }
}

TEST(memory_of_others) {
    two t;
    cargo c;
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", others_receive, NULL);
    CUstream s = gpu_stream(0);
    for (int kind = 0; kind < 2; kind++) {
        void *source = kind ? gpu_alloc_virtual(0, ACROSS) : gpu_alloc_async(0, ACROSS, s);
        tprpc_tensor out = gpu_tensor(0, source, ACROSS, s, 0);
        tprpc_error error;
        CHECK_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, ACROSS, &error), TPRPC_ERROR_UNSUPPORTED);
        CHECK_CONTAINS(error.text, "cannot be shared");
        gpu_put(0, s, source, ACROSS, 3);
        two_sent(&t, &c, &out, 1);
        gpu_set(0, s, source, 0, ACROSS);
    }
    CU(cuStreamSynchronize(s));
    two_close(&t, false);
}

/* ---- order ---- */

enum { ONE = 1 };                      /* a device that reaches device 0, where there is one */

static int other(void) { return gpu.count > 1 ? ONE : 0; }

typedef struct ends { bool registered, gated; } ends;

static void ordered_receive(two *t, void *arg) {
    const ends *x = (const ends *)arg;
    cargo c;
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), SIZE);
    tprpc_tensor in = gpu_tensor(other(), target, SIZE, r, other());
    two_got(t, &c, &in, 1);            /* what is made on first use is there */
    uint64_t *gate = x->gated ? gate_close(other(), r) : NULL;
    two_got(t, &c, &in, 1);            /* ordered; nothing has come */
    CHECK(gate_holds(r));
    two_raise(t, GOT);
    two_await(t, GO);
    if (gate) gate_open(gate);
    CHECK(gpu_matches(other(), r, target, SIZE, 7));
    two_raise(t, DONE);
}

static void ordered(bool registered, bool gated_receiver) {
    ends x;
    two t;
    cargo c;
    x.registered = registered;
    x.gated = gated_receiver;
    two_open(&t, "shm://", "cuda_ipc,basic", ordered_receive, &x);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, other());
    if (registered) REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, SIZE, NULL), TPRPC_OK);
    gpu_set(0, s, source, 1, SIZE);
    two_sent(&t, &c, &out, 1);
    uint64_t *gate = gated_receiver ? NULL : gate_close(0, s);
    gpu_put(0, s, source, SIZE, 7);
    two_sent(&t, &c, &out, 1);
    gpu_set(0, s, source, 0x55, SIZE);     /* the sender goes on */
    two_await(&t, GOT);
    if (gate) CHECK(gate_holds(s));
    two_raise(&t, GO);
    if (gate) gate_open(gate);
    two_await(&t, DONE);
    CU(cuStreamSynchronize(s));
    two_close(&t, false);
}

TEST(sender_is_late_registered) { ordered(true, false); }
TEST(sender_is_late) { ordered(false, false); }
TEST(receiver_is_late_registered) { ordered(true, true); }
TEST(receiver_is_late) { ordered(false, true); }

/* ---- what cannot be proven goes through host memory, from the first transfer on, and the pipe says why ---- */

enum { LITTLE = 4000, PROOFS = 600 };  /* more than there are words */

static const char *why_not(tprpc_pipe *pipe) {
    static tprpc_pipe_info info;
    REQUIRE_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    for (uint32_t i = 0; i < info.path_count; i++)
        if (strcmp(info.paths[i].name, "cuda_ipc") == 0) return info.paths[i].why;
    return "";
}

/* What each end is to say, and how many allocations it has then: the two tensors, and what the library made. */
typedef struct refusal { const char *why[2]; long allocations[2], mappings[2]; bool registered; } refusal;

static void refused(two *t, const refusal *x, bool child) {
    cargo out, in;
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, LITTLE), *target = gpu_alloc(0, LITTLE);
    const tprpc_tensor from = gpu_tensor(0, source, LITTLE, s, 0);
    tprpc_tensor to = gpu_tensor(0, target, LITTLE, s, 0);
    if (x->registered) REQUIRE_EQ_INT(tprpc_cuda_register(t->s.ctx, 0, source, LITTLE, NULL), TPRPC_OK);
    for (uint64_t i = 0; i < PROOFS / TEST_SLOWDOWN; i++) {
        gpu_put(0, s, source, LITTLE, 2 * i + child);
        two_send(t, &out, &from, 1);
        two_got(t, &in, &to, 1);
        WAIT(&t->s, out.wrote.runs, 1);
        if (!CHECK_EQ_INT(out.wrote.status, TPRPC_OK)) fprintf(stderr, "%s\n", out.wrote.text);
        if (!CHECK(gpu_matches(0, s, target, LITTLE, 2 * i + !child))) break;
    }
    if (x->why[child][0]) CHECK_CONTAINS(why_not(t->s.pipe), x->why[child]);
    else CHECK_STR(why_not(t->s.pipe), "");
    if (gpu.standin_count) CHECK_EQ_INT(gpu.standin_count("allocations"), x->allocations[child]);
    if (gpu.standin_count) CHECK_EQ_INT(gpu.standin_count("mappings"), x->mappings[child]);
    two_raise(t, child ? DONE : GO);
    two_await(t, child ? GO : DONE);
}

static void refused_child(two *t, void *arg) { refused(t, (const refusal *)arg, true); }

static void refuse(const refusal *x, const char *child, const char *here) {
    two t;
    two_fails = child;
    two_fails_here = here;
    two_open(&t, "shm://", "cuda_ipc,cuda_basic,basic", refused_child, (void *)(uintptr_t)x);
    if (!gpu.standin_calls) {
        two_kill(&t);
        SKIP("a real driver does not fail when it is told to");
    }
    refused(&t, x, false);
    two_close(&t, false);
}

#define CANNOT_OPEN "cuIpcOpenMemHandle:1+:1"
#define SAID(who) "its proof failed: " who ": CUDA_ERROR_INVALID_VALUE"

TEST(nothing_fails) {
    static const refusal x = {{"", ""}, {4, 4}, {2, 2}, false};
    refuse(&x, NULL, NULL);
}

TEST(the_receiver_cannot_open) {
    static const refusal x = {{SAID("the peer's GPU 0 cannot read GPU 0 here"),
                               SAID("GPU 0 here cannot read the peer's GPU 0")}, {3, 4}, {2, 0}, false};
    refuse(&x, CANNOT_OPEN, NULL);
}

TEST(the_receiver_cannot_open_registered) {
    static const refusal x = {{SAID("the peer's GPU 0 cannot read GPU 0 here"),
                               SAID("GPU 0 here cannot read the peer's GPU 0")}, {3, 3}, {2, 0}, true};
    refuse(&x, CANNOT_OPEN, NULL);
}

TEST(neither_can_open) {
    static const refusal x = {{"its proof failed: ", "its proof failed: "}, {3, 3}, {0, 0}, false};
    refuse(&x, CANNOT_OPEN, CANNOT_OPEN);
}

TEST(the_sender_cannot_show) {
    static const refusal x = {{"its proof failed: GPU 0 here cannot be shown: CUDA_ERROR_NOT_SUPPORTED", ""},
                              {3, 4}, {2, 0}, false};
    refuse(&x, NULL, "cuIpcGetMemHandle:1+:801");
}

/* The page can be opened, and the outbox can not. */
TEST(no_more_can_be_opened) {
    static const refusal x = {{SAID("the peer's GPU 0 cannot read GPU 0 here"),
                               SAID("GPU 0 here cannot read the peer's GPU 0")}, {4, 4}, {2, 1}, false};
    refuse(&x, "cuIpcOpenMemHandle:2+:1", NULL);
}

/* Of two allocations the first can be opened, and all is asked for then; or the page can be opened, and not read. */
static void halfway_receive(two *t, void *arg) {
    cargo c;
    (void)arg;
    CUstream r = gpu_stream(0);
    tprpc_tensor in[2];
    for (int k = 0; k < 2; k++) in[k] = gpu_tensor(0, gpu_alloc(0, SIZE), SIZE, r, 0);
    for (uint64_t i = 0; i < 3; i++) {
        two_got(t, &c, in, 2);
        for (uint64_t k = 0; k < 2; k++) CHECK(gpu_matches(0, r, in[k].data, SIZE, 2 * i + k));
    }
    if (gpu.standin_calls) CHECK_CONTAINS(why_not(t->s.pipe), SAID("GPU 0 here cannot read the peer's GPU 0"));
}

static void halfway(const char *fails) {
    two t;
    cargo c;
    tprpc_tensor out[2];
    two_fails = fails;
    two_open(&t, "shm://", "cuda_ipc,basic", halfway_receive, NULL);
    CUstream s = gpu_stream(0);
    for (int k = 0; k < 2; k++) {
        out[k] = gpu_tensor(0, gpu_alloc(0, SIZE), SIZE, s, 0);
        REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, out[k].data, SIZE, NULL), TPRPC_OK);
    }
    for (uint64_t i = 0; i < 3; i++) {
        for (uint64_t k = 0; k < 2; k++) gpu_put(0, s, out[k].data, SIZE, 2 * i + k);
        two_sent(&t, &c, out, 2);
    }
    two_close(&t, false);
}

TEST(the_second_cannot_be_opened) { halfway("cuIpcOpenMemHandle:3+:1"); }
TEST(the_page_cannot_be_read) { halfway("cuMemcpyAsync:1:1"); }

/* Many are sent before the first is read; their streams stand still, and go on after they were sent. */
enum { EARLY = 40 };

static void early_receive(two *t, void *arg) {
    static cargo c[EARLY];
    tprpc_tensor in[EARLY];
    (void)arg;
    CUstream r = gpu_stream(other());
    uint8_t *target = (uint8_t *)gpu_alloc(other(), EARLY * SIZE);
    two_await(t, SENT);
    for (size_t i = 0; i < EARLY; i++) {
        in[i] = gpu_tensor(other(), target + i * SIZE, SIZE, r, other());
        two_recv(t, &c[i], &in[i], 1);
    }
    for (size_t i = 0; i < EARLY; i++) {
        WAIT(&t->s, c[i].got.runs, 1);
        CHECK_EQ_INT(c[i].got.status, TPRPC_OK);
        CHECK(gpu_matches(other(), r, in[i].data, SIZE, i));
    }
}

static void early(bool registered, const char *fails) {
    static cargo c[EARLY];
    tprpc_tensor out[EARLY];
    two t;
    two_fails = fails;
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", early_receive, NULL);
    CUstream s = gpu_stream(0);
    uint8_t *source = (uint8_t *)gpu_alloc(0, EARLY * SIZE);
    if (registered) REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, EARLY * SIZE, NULL), TPRPC_OK);
    uint64_t *gate = gate_close(0, s);
    for (size_t i = 0; i < EARLY; i++) {
        out[i] = gpu_tensor(0, source + i * SIZE, SIZE, s, other());
        gpu_put(0, s, out[i].data, SIZE, i);
        two_send(&t, &c[i], &out[i], 1);
    }
    two_raise(&t, SENT);
    idle(&t.s, 3000);
    gate_open(gate);
    for (size_t i = 0; i < EARLY; i++) {
        WAIT(&t.s, c[i].wrote.runs, 1);
        CHECK_EQ_INT(c[i].wrote.status, TPRPC_OK);
    }
    two_close(&t, false);
}

TEST(sent_before_it_is_proven) { early(false, NULL); }
TEST(sent_before_it_is_proven_registered) { early(true, NULL); }
TEST(sent_before_it_is_refused) { early(false, CANNOT_OPEN); }
TEST(sent_before_it_is_refused_registered) { early(true, CANNOT_OPEN); }

/* ---- a process is killed: streams of the other go on, with what was queued behind ---- */

static void sender_that_dies(two *t, void *arg) {
    const ends *x = (const ends *)arg;
    cargo c;
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, 0);
    if (x->registered) REQUIRE_EQ_INT(tprpc_cuda_register(t->s.ctx, 0, source, SIZE, NULL), TPRPC_OK);
    two_sent(t, &c, &out, 1);
    gate_close(0, s);
    two_send(t, &c, &out, 1);
    for (;;) tprpc_poll(t->s.ctx, 1000, 0);
}

static void sender_dies(bool registered, bool closed) {
    ends x;
    two t;
    cargo c;
    x.registered = registered;
    two_open(&t, "shm://", "cuda_xth,cuda_ipc,basic", sender_that_dies, &x);
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), SIZE);
    tprpc_tensor in = gpu_tensor(other(), target, SIZE, r, other());
    two_got(&t, &c, &in, 1);
    two_got(&t, &c, &in, 1);
    CHECK(gate_holds(r));              /* for what the sender alone can let go */
    if (closed) tprpc_pipe_close(t.s.pipe);
    if (closed) t.s.pipe = NULL;
    idle(&t.s, 2000);
    two_kill(&t);
    two_goes_on(&t, other(), r);
    two_usable(&t, NULL);
    two_close(&t, true);
}

TEST(sender_dies_registered) { sender_dies(true, false); }
TEST(sender_dies_outbox) { sender_dies(false, false); }
TEST(sender_dies_after_the_pipe) { sender_dies(false, true); }

static void receiver_that_dies(two *t, void *arg) {
    cargo c;
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), SIZE);
    tprpc_tensor in = gpu_tensor(other(), target, SIZE, r, other());
    (void)arg;
    two_got(t, &c, &in, 1);
    gate_close(other(), r);
    two_got(t, &c, &in, 1);
    two_raise(t, GOT);
    for (;;) tprpc_poll(t->s.ctx, 1000, 0);
}

static void receiver_dies(bool registered, bool closed) {
    two t;
    cargo c;
    two_open(&t, "shm://", "cuda_xth,cuda_ipc,basic", receiver_that_dies, NULL);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, other());
    if (registered) REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, SIZE, NULL), TPRPC_OK);
    two_sent(&t, &c, &out, 1);
    CU(cuStreamSynchronize(s));
    two_sent(&t, &c, &out, 1);
    two_await(&t, GOT);
    if (registered) CHECK(gate_holds(s));
    if (closed) tprpc_pipe_close(t.s.pipe);
    if (closed) t.s.pipe = NULL;
    two_kill(&t);
    two_goes_on(&t, 0, s);
    two_usable(&t, NULL);
    if (registered) {
        tprpc_status status;
        while ((status = tprpc_cuda_unregister(t.s.ctx, source, NULL)) == TPRPC_PENDING) tprpc_poll(t.s.ctx, 1000, 0);
        CHECK_EQ_INT(status, TPRPC_OK);
    }
    two_close(&t, true);
}

TEST(receiver_dies_registered) { receiver_dies(true, false); }
TEST(receiver_dies_outbox) { receiver_dies(false, false); }
TEST(receiver_dies_after_the_pipe) { receiver_dies(true, true); }

/* While both send to each other. */
TEST(killed_at_any_moment) {
    two_exchange e = {"cuda_xth,cuda_ipc,basic", 4 << 20, 0, 0};
    e.to = gpu_count_apart() > 1;
    two_killed_at_any_moment(e, 4000);
}

/* ---- many small tensors ---- */

enum { SMALLS = 300, EACH = 4000, APART = EACH + 96 };

static tprpc_tensor *smalls(int device, uint8_t *memory, size_t step, CUstream stream, int target) {
    tprpc_tensor *tensors = (tprpc_tensor *)calloc(SMALLS, sizeof *tensors);
    REQUIRE(tensors != NULL);
    for (size_t i = 0; i < SMALLS; i++) tensors[i] = gpu_tensor(device, memory + i * step, EACH, stream, target);
    return tensors;
}

typedef struct steps { size_t from, to; } steps;   /* from tensor to tensor, in the sender's memory and the other's */

static int calls_of(const char *name) { return gpu.standin_calls ? (int)gpu.standin_calls(name) : 0; }

static void smalls_receive(two *t, void *arg) {
    cargo c;
    const size_t to = ((const steps *)arg)->to;
    int copies = 0;
    CUstream r = gpu_stream(other());
    uint8_t *target = (uint8_t *)gpu_alloc(other(), SMALLS * to);
    tprpc_tensor *in = smalls(other(), target, to, r, other());
    for (uint64_t i = 0; i < 3; i++) {
        const int before = calls_of("cuMemcpyAsync");
        two_got(t, &c, in, SMALLS);
        copies += calls_of("cuMemcpyAsync") - before;
        for (size_t k = 0; k < SMALLS; k++) CHECK(gpu_matches(other(), r, target + k * to, EACH, i + k));
        two_raise(t, 10 + (int)i);
    }
    const int launches = calls_of("cuLaunchKernel");
    if (gpu.standin_calls && to != EACH) CHECK_LE_INT(3, launches);   /* by a kernel */
    if (gpu.standin_calls && to == EACH) CHECK_EQ_INT(launches, 0);   /* neighbours at both ends: one copy each time */
    if (gpu.standin_calls) CHECK_LE_INT(copies, 4);                   /* and one of the proof's */
    free(in);
}

static void many_smalls(bool registered, size_t from, size_t to) {
    two t;
    cargo c;
    steps step;
    step.from = from;
    step.to = to;
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", smalls_receive, &step);
    CUstream s = gpu_stream(0);
    uint8_t *source = (uint8_t *)gpu_alloc(0, SMALLS * from);
    tprpc_tensor *out = smalls(0, source, from, s, other());
    if (registered) REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, SMALLS * from, NULL), TPRPC_OK);
    for (uint64_t i = 0; i < 3; i++) {
        for (size_t k = 0; k < SMALLS; k++) gpu_put(0, s, source + k * from, EACH, i + k);
        two_sent(&t, &c, out, SMALLS);
        gpu_set(0, s, source, 0, SMALLS * from);
        two_await(&t, 10 + (int)i);
    }
    free(out);
    two_close(&t, false);
}

TEST(many_small_registered) { many_smalls(true, EACH, APART); }
TEST(many_small_here_and_there) { many_smalls(true, APART, APART); }
TEST(many_small) { many_smalls(false, EACH, APART); }
TEST(many_small_to_one_place) { many_smalls(true, APART, EACH); }
TEST(neighbours_at_both_ends) { many_smalls(true, EACH, EACH); }
TEST(neighbours_at_both_ends_through_the_outbox) { many_smalls(false, EACH, EACH); }

/* ---- what stands between a small transfer and its copy ---- */

enum { EIGHT = 8, BEFORE = 50, LITTLE_SENT = 20, LITTLE_GOT = 30 };    /* the last two: flags */

static int calls_of_all(void) {
    static const char *const names[] = {
        "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuThreadExchangeStreamCaptureMode", "cuPointerGetAttributes",
        "cuStreamIsCapturing", "cuStreamGetCtx", "cuStreamQuery", "cuStreamWaitValue64_v2", "cuStreamWriteValue64_v2",
        "cuMemcpyAsync", "cuEventRecord", "cuEventQuery", "cuStreamWaitEvent", "cuMemcpyPeerAsync",
    };
    int sum = 0;
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) sum += calls_of(names[i]);
    return sum;
}

static void little_receive(two *t, void *arg) {
    cargo c;
    (void)arg;
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), EIGHT);
    tprpc_tensor in = gpu_tensor(other(), target, EIGHT, r, other());
    for (int i = 0; i < 3; i++) {
        two_await(t, LITTLE_SENT + i);
        tprpc_poll(t->s.ctx, 3000, 0);
        const int before = calls_of_all();
        two_got(t, &c, &in, 1);
        const int calls = calls_of_all() - before;
        if (i == 2) CHECK_LE_INT(calls, 10);
        CHECK(gpu_matches(other(), r, target, EIGHT, (uint64_t)i));
        two_raise(t, LITTLE_GOT + i);
    }
}

TEST(a_small_transfer_asks_little_of_the_driver) {
    two t;
    cargo c;
    two_open(&t, "shm://", "cuda_ipc,basic", little_receive, NULL);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, EIGHT);
    tprpc_tensor out = gpu_tensor(0, source, EIGHT, s, other());
    REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, EIGHT, NULL), TPRPC_OK);
    for (int i = 0; i < 3; i++) {
        for (int k = 0; k < BEFORE; k++) gpu_put(0, s, source, EIGHT, (uint64_t)i);
        const int before = calls_of_all();
        two_send(&t, &c, &out, 1);
        const int calls = calls_of_all() - before;
        if (i == 2) CHECK_LE_INT(calls, 8);
        two_raise(&t, LITTLE_SENT + i);
        two_await(&t, LITTLE_GOT + i);
        WAIT(&t.s, c.wrote.runs, 1);
    }
    two_close(&t, false);
}

/* ---- what is sent ahead of its receiver leaves room in the outbox for what he waits for ---- */

enum { AHEAD = 20, AHEAD_FIRST = 8, AHEAD_SIZE = 1 << 20, AHEAD_MAY = 20, AHEAD_TAKEN = 21 };   /* the last two: flags */

static void ahead_receive(two *t, void *arg) {
    cargo c;
    (void)arg;
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), AHEAD_SIZE);
    tprpc_tensor in = gpu_tensor(other(), target, AHEAD_SIZE, r, other());
    for (int i = 0; i < AHEAD; i++) {
        while (LOAD(t->shared->flags[AHEAD_MAY]) <= i) tprpc_poll(t->s.ctx, 500, 0);
        two_got(t, &c, &in, 1);
        CHECK(gpu_matches(other(), r, target, AHEAD_SIZE, (uint64_t)i));
        STORE(t->shared->flags[AHEAD_TAKEN], i + 1);
    }
}

TEST(sent_far_ahead) {
    static cargo cargos[AHEAD];
    static tprpc_tensor out[AHEAD];
    two t;
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", ahead_receive, NULL);
    CUstream s = gpu_stream(0);
    for (int i = 0; i < AHEAD; i++) {
        out[i] = gpu_tensor(0, gpu_alloc(0, AHEAD_SIZE), AHEAD_SIZE, s, other());
        gpu_put(0, s, out[i].data, AHEAD_SIZE, (uint64_t)i);
    }
    CU(cuStreamSynchronize(s));
    for (int i = 0; i < AHEAD; i++) {
        const int taken = i - AHEAD_FIRST;
        if (taken >= 0) {              /* each chunk that becomes free may go to one that nobody reads so soon */
            STORE(t.shared->flags[AHEAD_MAY], taken + 1);
            WAIT(&t.s, cargos[taken].wrote.runs, 1);
            while (LOAD(t.shared->flags[AHEAD_TAKEN]) <= taken) tprpc_poll(t.s.ctx, 500, 0);
        }
        two_send(&t, &cargos[i], &out[i], 1);
    }
    STORE(t.shared->flags[AHEAD_MAY], AHEAD);
    for (int i = 0; i < AHEAD; i++) {
        WAIT(&t.s, cargos[i].wrote.runs, 1);
        CHECK_EQ_INT(cargos[i].wrote.status, TPRPC_OK);
    }
    two_close(&t, false);
}

/* ---- others ---- */

/* A stream that is being captured when the receiver has it: the host waits, and the capture is left alone. */
static void captured_receive(two *t, void *arg) {
    cargo c;
    CUstream r = gpu_stream(0);
    void *target = gpu_alloc(0, SIZE);
    tprpc_tensor in = gpu_tensor(0, target, SIZE, r, 0);
    (void)arg;
    two_got(t, &c, &in, 1);
    uint64_t *gate = gate_close(0, r);
    two_await(t, SENT);
    two_got(t, &c, &in, 1);
    two_raise(t, GOT);
    two_await(t, GO);
    gate_open(gate);
    CU(cuStreamSynchronize(r));
}

TEST(captured_while_it_travels) {
    two t;
    cargo c;
    CUgraph graph = NULL;
    two_open(&t, "shm://", "cuda_ipc,basic", captured_receive, NULL);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, 0);
    REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, SIZE, NULL), TPRPC_OK);
    two_sent(&t, &c, &out, 1);
    CU(cuStreamSynchronize(s));
    two_send(&t, &c, &out, 1);
    CU(cuStreamSynchronize(s));
    CU(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    two_raise(&t, SENT);
    two_await(&t, GOT);
    idle(&t.s, 5000);
    CHECK_EQ_INT(c.wrote.runs, 0);     /* the receiver has not read it */
    two_raise(&t, GO);
    WAIT(&t.s, c.wrote.runs, 1);
    CHECK_EQ_INT(c.wrote.status, TPRPC_OK);
    CU(cuStreamEndCapture(s, &graph));
    CHECK(graph != NULL);
    CU(cuGraphDestroy(graph));
    two_close(&t, false);
}

/* The child's device 0 is this process's device 1. */
static void other_numbers_receive(two *t, void *arg) {
    cargo c;
    (void)arg;
    CHECK_EQ_INT(gpu.count, 1);
    CUstream r = gpu_stream(0);
    void *target = gpu_alloc(0, SIZE);
    tprpc_tensor in = gpu_tensor(0, target, SIZE, r, 0);
    two_got(t, &c, &in, 1);
    CHECK(gpu_matches(0, r, target, SIZE, 5));
}

TEST(other_visible_devices) {
    two t;
    cargo c;
    if (gpu_count_apart() < 2) SKIP("one device");
    two_visible = "1";
    two_open(&t, "shm://", "cuda_ipc,basic", other_numbers_receive, NULL);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, 0);
    gpu_put(0, s, source, SIZE, 5);
    two_sent(&t, &c, &out, 1);
    two_close(&t, false);
}

/* Many at a time, more than there are chunks. */
enum { ATONCE = 40, WAVES = 4, CHUNKY = 1 << 20 };
typedef struct wave { size_t size; int count; bool registered; } wave;

static void wave_receive(two *t, void *arg) {
    cargo c[ATONCE];
    const wave *x = (const wave *)arg;
    CUstream r = gpu_stream(other());
    uint8_t *target = (uint8_t *)gpu_alloc(other(), (size_t)x->count * x->size);
    tprpc_tensor in[ATONCE];
    for (int w = 0; w < WAVES; w++) {
        for (int i = 0; i < x->count; i++) {
            in[i] = gpu_tensor(other(), target + (size_t)i * x->size, x->size, r, other());
            two_recv(t, &c[i], &in[i], 1);
        }
        for (int i = 0; i < x->count; i++) {
            WAIT(&t->s, c[i].got.runs, 1);
            CHECK_EQ_INT(c[i].got.status, TPRPC_OK);
        }
        CHECK(gpu_matches(other(), r, target, (size_t)x->count * x->size, (uint64_t)w));
        two_raise(t, 10 + w);
    }
}

static void waves(size_t size, int count, bool registered) {
    wave one, *x = &one;
    two t;
    cargo c[ATONCE];
    tprpc_tensor out[ATONCE];
    one.size = size;
    one.count = count;
    one.registered = registered;
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", wave_receive, x);
    CUstream s = gpu_stream(0);
    uint8_t *source = (uint8_t *)gpu_alloc(0, (size_t)x->count * x->size);
    if (x->registered) REQUIRE_EQ_INT(tprpc_cuda_register(t.s.ctx, 0, source, (size_t)x->count * x->size, NULL), TPRPC_OK);
    for (int w = 0; w < WAVES; w++) {
        gpu_put(0, s, source, (size_t)x->count * x->size, (uint64_t)w);
        for (int i = 0; i < x->count; i++) {
            out[i] = gpu_tensor(0, source + (size_t)i * x->size, x->size, s, other());
            two_send(&t, &c[i], &out[i], 1);
        }
        for (int i = 0; i < x->count; i++) {
            WAIT(&t.s, c[i].wrote.runs, 1);
            CHECK_EQ_INT(c[i].wrote.status, TPRPC_OK);
        }
        two_await(&t, 10 + w);
        CU(cuStreamSynchronize(s));    /* all has been compared; this process, too, knows that its bytes were read */
    }
    two_close(&t, false);
}

TEST(many_at_once_registered) { waves(CHUNKY, ATONCE, true); }
TEST(many_at_once) { waves(CHUNKY, ATONCE, false); }
TEST(large_ones_at_once) { waves(18 << 20, 3, false); }

/* Read one after the other, while more are always on their way than there are chunks: the first is not held up by the
   later ones. */
enum { STREAM = 300, ON_THEIR_WAY = 12 };

static void stream_receive(two *t, void *arg) {
    cargo c;
    (void)arg;
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), CHUNKY);
    tprpc_tensor in = gpu_tensor(other(), target, CHUNKY, r, other());
    for (int i = 0; i < STREAM; i++) two_got(t, &c, &in, 1);
    CHECK(gpu_matches(other(), r, target, CHUNKY, STREAM - 1));
}

TEST(read_one_by_one) {
    two t;
    cargo c[ON_THEIR_WAY];
    tprpc_tensor out[ON_THEIR_WAY];
    more_memory();
    two_open(&t, "shm://", "cuda_ipc,basic", stream_receive, NULL);
    CUstream s = gpu_stream(0);
    uint8_t *source = (uint8_t *)gpu_alloc(0, ON_THEIR_WAY * CHUNKY);
    for (int i = 0; i < STREAM + ON_THEIR_WAY; i++) {
        const int k = i % ON_THEIR_WAY;
        if (i >= ON_THEIR_WAY) {
            WAIT(&t.s, c[k].wrote.runs, 1);
            CHECK_EQ_INT(c[k].wrote.status, TPRPC_OK);
        }
        if (i >= STREAM) continue;
        out[k] = gpu_tensor(0, source + (size_t)k * CHUNKY, CHUNKY, s, other());
        if (i == STREAM - 1) gpu_put(0, s, out[k].data, CHUNKY, STREAM - 1);
        two_send(&t, &c[k], &out[k], 1);
    }
    two_close(&t, false);
}

/* A hundred thousand; on the stand-in driver, whose streams lag on purpose, and under a sanitizer (CUDA_FEW), some. */
static int many(void) { return gpu.standin_count || getenv("CUDA_FEW") ? 2000 : 100000; }

enum { MANY_KINDS = 8 };
typedef struct holds { long of[MANY_KINDS]; } holds;     /* what a process holds, of several kinds */

/* KiB of host memory, MiB of device memory that is not free, and what a stand-in driver counts. */
static holds holds_now(void) {
    static const char *const kinds[] = {"streams", "events", "allocations", "host", "registered", "mappings"};
    holds now;
    size_t free_bytes = 0, all_bytes = 0;
    memset(&now, 0, sizeof now);
    if (!gpu.standin_count) {          /* which remembers all that it was asked for */
        FILE *file = fopen("/proc/self/statm", "r");
        REQUIRE(file && fscanf(file, "%*s %ld", &now.of[0]) == 1);
        fclose(file);
        now.of[0] *= sysconf(_SC_PAGESIZE) / 1024;
    }
    CU(cuMemGetInfo_v2(&free_bytes, &all_bytes));
    now.of[1] = (long)((all_bytes - free_bytes) >> 20);
    for (size_t k = 0; gpu.standin_count && k < COUNT(kinds); k++) now.of[2 + k] = gpu.standin_count(kinds[k]);
    return now;
}

/* From the middle to the end nothing grows, but for the streams and events that a pool still makes. */
static void hold_flat(int i, holds *before) {
    static const long more[MANY_KINDS] = {1024, 4, 10, 10, 0, 0, 0, 0};
    if (i == many() / 2) *before = holds_now();
    if (i != many() - 10) return;
    const holds now = holds_now();
    for (int k = 0; k < MANY_KINDS; k++) CHECK_LE_INT(now.of[k], before->of[k] + more[k]);
}

static void many_receive(two *t, void *arg) {
    cargo c;
    holds before;
    CUstream r = gpu_stream(other());
    void *target = gpu_alloc(other(), SIZE);
    tprpc_tensor in = gpu_tensor(other(), target, 4000, r, other());
    (void)arg;
    for (int i = 0; i < many(); i++) {
        two_got(t, &c, &in, 1);
        hold_flat(i, &before);
    }
    CHECK(gpu_matches(other(), r, target, 4000, (uint64_t)many() - 1));
}

TEST(many_and_flat) {
    holds before;
    two t;
    cargo c;
    two_open(&t, "shm://", "cuda_ipc,basic", many_receive, NULL);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE);
    tprpc_tensor out = gpu_tensor(0, source, 4000, s, other());
    for (int i = 0; i < many(); i++) {
        if (i >= many() - 5) gpu_put(0, s, source, 4000, (uint64_t)i);
        two_sent(&t, &c, &out, 1);
        hold_flat(i, &before);
    }
    two_close(&t, false);
}
