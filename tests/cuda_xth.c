/* GPU memory between two contexts of one process: bytes, order, memory of every kind, what a user gets wrong. */
#include "cuda_common.h"

enum { SIZE = 100000 };

static const char direct[] = "cuda_xth,basic", staged[] = "cuda_basic,basic";

/* ---- bytes arrive ---- */

/* From every device to every device, and the host, at an odd offset. device -1: the host. */
static void carry(pair *p, int from, int to, size_t size, size_t offset, bool pinned) {
    CUstream s = from < 0 ? NULL : gpu_stream(from), r = to < 0 ? NULL : gpu_stream(to);
    uint8_t *source = (uint8_t *)(from < 0 ? pinned ? gpu_pinned(size + offset) : malloc(size + offset)
                                           : gpu_alloc(from, size + offset)) + offset;
    uint8_t *target = (uint8_t *)(to < 0 ? pinned ? gpu_pinned(size + offset) : malloc(size + offset)
                                         : gpu_alloc(to, size + offset)) + offset;
    const uint64_t seed = size + offset + (uint64_t)(from + 2) * 100 + (uint64_t)to;
    tprpc_tensor out = gpu_tensor(from, source, size, s, to), in = gpu_tensor(to, target, size, r, to);
    cargo c;
    if (from < 0) fill(source, size, seed);
    else gpu_put(from, s, source, size, seed);
    gpu_off();
    cargo_carry(&c, p, &out, &in, 1);
    if (from < 0) memset(source, 0, size);   /* it is the sender's again, in the order of its stream */
    else gpu_set(from, s, source, 0, size);
    if (to < 0) CHECK(matches(target, size, seed));
    else CHECK(gpu_matches(to, r, target, size, seed));
    if (from >= 0) CU(cuStreamSynchronize(s));
    if (from >= 0) gpu_free(from, source - offset);
    if (to >= 0) gpu_free(to, target - offset);
    if (from < 0 && !pinned) free(source - offset);
    if (to < 0 && !pinned) free(target - offset);
}

static void carry_all(const char *address, const char *channels) {
    static const size_t sizes[] = {1, 8, SIZE, (3 << 20) + 5};
    pair p;
    gpu_load();
    gpu_pair(&p, address, channels, 0);
    for (int from = -1; from < gpu.count && from < 4; from++)
        for (int to = -1; to < gpu.count && to < 4; to++)
            for (size_t i = 0; i < COUNT(sizes) && (from >= 0 || to >= 0); i++) {
                if (i != 1 && (from > 1 || to > 1)) continue;   /* enough of them */
                if (i == 3 && TEST_TSAN && from != 0) continue;
                carry(&p, from, to, sizes[i], i == 1 ? 0 : 4 * i + 1, true);
                if (from < 0 || to < 0) carry(&p, from, to, sizes[i], i, false);
            }
    pipe_carries(p.a, channels == direct ? "cuda_xth" : "cuda_basic", ALL_OF_DEVICES);
    pipe_carries(p.a, channels == direct ? "cuda_basic" : "cuda_xth", 0);
    pipe_carries(p.b, "basic", TPRPC_PATH_HOST_TO_HOST);
    pair_close(&p);
}

TEST(every_pair_of_devices) { carry_all("shm://", direct); }
TEST(every_pair_through_shared_memory) { carry_all("shm://", staged); }
TEST(every_pair_through_the_pipe) { carry_all("tcp://127.0.0.1:0", staged); }

/* ---- memory that others than cuMemAlloc gave ---- */

enum { LARGE = (5 << 20) + 3 };

static void other_memory(const char *channels) {
    pair p;
    cargo c;
    gpu_load();
    const int last = gpu.count > 1 ? 1 : 0;
    gpu_pair(&p, "shm://", channels, 0);
    CUstream s = gpu_stream(0), r = gpu_stream(last);
    for (int kind = 0; kind < 2; kind++) {
        uint8_t *source = (uint8_t *)(kind ? gpu_alloc_virtual(0, LARGE) : gpu_alloc_async(0, LARGE, s));
        uint8_t *target = (uint8_t *)(kind ? gpu_alloc_virtual(last, LARGE) : gpu_alloc_async(last, LARGE, r));
        tprpc_tensor out = gpu_tensor(0, source, LARGE, s, last), in = gpu_tensor(last, target, LARGE, r, last);
        gpu_put(0, s, source, LARGE, 3);
        cargo_carry(&c, &p, &out, &in, 1);
        CHECK(gpu_matches(last, r, target, LARGE, 3));
        tprpc_tensor outs[20], ins[20];
        for (size_t i = 0; i < 20; i++) {    /* small ones, which a kernel may not reach */
            outs[i] = gpu_tensor(0, source + i * 8, 8, s, last);
            ins[i] = gpu_tensor(last, target + i * 8, 8, r, last);
        }
        gpu_put(0, s, source, 160, 4);
        cargo_carry(&c, &p, outs, ins, 20);
        CHECK(gpu_matches(last, r, target, 160, 4));
    }
    pair_close(&p);
}

TEST(memory_of_others) { other_memory(direct); }
TEST(memory_of_others_through_the_host) { other_memory(staged); }

/* ---- order: nothing has happened yet, and all is ordered ---- */

static void ordered(int from, int to, bool stopped) {
    pair p;
    gpu_pair(&p, "shm://", direct, 0);
    CUstream s = gpu_stream(from), r = gpu_stream(to);
    uint8_t *source = (uint8_t *)gpu_alloc(from, SIZE), *target = (uint8_t *)gpu_alloc(to, SIZE);
    tprpc_tensor out = gpu_tensor(from, source, SIZE, s, to), in = gpu_tensor(to, target, SIZE, r, to);
    cargo c;
    gpu_set(from, s, source, 1, SIZE);
    cargo_carry(&c, &p, &out, &in, 1);       /* what is made on first use is there */
    uint64_t *gate = gate_close(from, s), *other = stopped ? gate_close(to, r) : NULL;
    gpu_put(from, s, source, SIZE, 7);
    cargo_carry(&c, &p, &out, &in, 1);       /* the callbacks have run */
    CHECK(gate_holds(s));
    CHECK(gate_holds(r));
    gpu_set(from, s, source, 0x55, SIZE);    /* the sender goes on, */
    gate_open(gate);
    if (other) test_sleep_us(2000);
    if (other) gate_open(other);
    CHECK(gpu_matches(to, r, target, SIZE, 7));   /* and it is what was sent */
    CU(cuStreamSynchronize(s));
    pair_close(&p);
}

TEST(callbacks_mean_ordered) {
    gpu_load();
    for (int from = 0; from < gpu.count && from < 3; from++)
        for (int to = 0; to < gpu.count && to < 3; to++) ordered(from, to, (from + to) % 2 != 0);
}

/* Host memory has no order: the callback waits for it. */
TEST(host_memory_is_waited_for) {
    pair p;
    gpu_load();
    gpu_pair(&p, "shm://", direct, 0);
    CUstream s = gpu_stream(0);
    uint8_t *device = (uint8_t *)gpu_alloc(0, SIZE), *host = (uint8_t *)gpu_pinned(SIZE);
    tprpc_tensor out = gpu_tensor(0, device, SIZE, s, -1), in = gpu_tensor(-1, host, SIZE, NULL, -1);
    cargo c;
    memset(host, 0, SIZE);
    gpu_set(0, s, device, 1, SIZE);
    cargo_carry(&c, &p, &out, &in, 1);
    uint64_t *gate = gate_close(0, s);
    gpu_put(0, s, device, SIZE, 3);
    cargo_send(&c, p.a, p.b, &out, &in, 1);
    cargo_read(&c, &p.s, p.b);
    idle(&p.s, 20000);
    CHECK_EQ_INT(c.got.runs, 0);
    gate_open(gate);
    cargo_wait(&c, &p.s);
    CHECK(matches(host, SIZE, 3));
    pair_close(&p);
}

/* ---- several tensors in one message ---- */

TEST(mixed_and_empty) {
    enum { N = 6 };
    pair p;
    gpu_load();
    gpu_pair(&p, "shm://", NULL, 0);
    const int last = gpu.count > 1 ? 1 : 0;
    const int from[N] = {0, -1, last, 0, -1, 0}, to[N] = {last, -1, 0, -1, 0, 0};
    const size_t sizes[N] = {SIZE, SIZE, 17, 3000, SIZE + 1, 0};
    tprpc_tensor out[N], in[N];
    CUstream streams[2] = {gpu_stream(0), gpu_stream(last)};
    cargo c;
    for (int i = 0; i < N; i++) {
        void *source = from[i] < 0 ? malloc(sizes[i]) : sizes[i] ? gpu_alloc(from[i], sizes[i]) : NULL;
        void *target = to[i] < 0 ? malloc(sizes[i]) : sizes[i] ? gpu_alloc(to[i], sizes[i]) : NULL;
        out[i] = gpu_tensor(from[i], source, sizes[i], from[i] < 0 ? NULL : streams[from[i] == 0 ? 0 : 1], to[i]);
        in[i] = gpu_tensor(to[i], target, sizes[i], to[i] < 0 ? NULL : streams[to[i] == 0 ? 0 : 1], to[i]);
        if (from[i] < 0) fill(source, sizes[i], (uint64_t)i);
        else if (sizes[i]) gpu_put(from[i], streams[from[i] == 0 ? 0 : 1], source, sizes[i], (uint64_t)i);
    }
    for (int round = 0; round < 3; round++) {
        cargo_carry(&c, &p, out, in, N);
        for (int i = 0; i < N; i++) {
            if (to[i] < 0) CHECK(matches(in[i].data, sizes[i], (uint64_t)i));
            else if (sizes[i])
                CHECK(gpu_matches(to[i], streams[to[i] == 0 ? 0 : 1], in[i].data, sizes[i], (uint64_t)i));
        }
    }
    for (int i = 0; i < N; i++) {
        if (from[i] < 0) free(out[i].data);
        if (to[i] < 0) free(in[i].data);
    }
    pair_close(&p);
}

TEST(a_thousand_small_ones) {
    enum { N = 1000, EACH = 4096 };
    pair p;
    gpu_load();
    gpu_pair(&p, "shm://", direct, 0);
    const int to = gpu.count > 1 ? 1 : 0;
    CUstream s = gpu_stream(0), r = gpu_stream(to);
    uint8_t *source = (uint8_t *)gpu_alloc(0, N * EACH), *target = (uint8_t *)gpu_alloc(to, N * EACH);
    tprpc_tensor *out = (tprpc_tensor *)calloc(N, sizeof *out), *in = (tprpc_tensor *)calloc(N, sizeof *in);
    cargo c;
    REQUIRE(out && in);
    for (size_t i = 0; i < N; i++) {
        out[i] = gpu_tensor(0, source + i * EACH, EACH, s, to);
        in[i] = gpu_tensor(to, target + (N - 1 - i) * EACH, EACH, r, to);
    }
    gpu_put(0, s, source, N * EACH, 9);
    cargo_carry(&c, &p, out, in, N);
    if (gpu.standin_calls) CHECK_EQ_INT(gpu.standin_calls("cuLaunchKernel"), 1);
    uint8_t *bytes = (uint8_t *)gpu_pinned(N * EACH), *expected = (uint8_t *)malloc(N * EACH);
    REQUIRE(expected != NULL);
    fill(expected, N * EACH, 9);
    gpu_on(to);
    CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)bytes, (CUdeviceptr)(uintptr_t)target, N * EACH, r));
    CU(cuStreamSynchronize(r));
    for (size_t i = 0; i < N; i++) CHECK(memcmp(bytes + (N - 1 - i) * EACH, expected + i * EACH, EACH) == 0);
    free(expected);
    free(out);
    free(in);
    pair_close(&p);
}

/* ---- memory of the library's ---- */

typedef struct taken { outcome o; int device; uint64_t seed; size_t size; int right; } taken;

static void on_taken(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    taken *t = (taken *)user;
    for (size_t i = 0; m && i < m->tensor_count; i++) {
        const tprpc_tensor *tensor = &m->tensors[i];
        CHECK_EQ_INT(tensor->device.kind, t->device < 0 ? TPRPC_CPU : TPRPC_CUDA);
        CHECK_EQ_INT(tensor->device.index, t->device < 0 ? 0 : t->device);
        CHECK(((uintptr_t)tensor->data & 63) == 0);
        t->right += t->device < 0 ? matches(tensor->data, tensor->size, t->seed)
                                  : gpu_matches(t->device, (CUstream)tensor->stream, tensor->data, tensor->size, t->seed);
    }
    outcome_set(&t->o, status, error);
}

/* Copied when it is written (no release), allocated where it is read. */
static void copied(pair *p, int from, int to, size_t size, uint64_t seed) {
    CUstream s = from < 0 ? NULL : gpu_stream(from);
    void *source = from < 0 ? malloc(size) : gpu_alloc(from, size);
    tprpc_tensor tensor = gpu_tensor(from, source, size, s, to);
    tprpc_message m;
    outcome wrote;
    taken got;
    memset(&m, 0, sizeof m);
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    m.tensors = &tensor;
    m.tensor_count = 1;
    got.device = to;
    got.seed = seed;
    if (from < 0) fill(source, size, seed);
    else gpu_put(from, s, source, size, seed);
    REQUIRE_EQ_INT(tprpc_pipe_write(p->a, &m, on_written, &wrote), TPRPC_OK);
    if (from < 0) memset(source, 0, size);   /* it was copied, in the order of the stream */
    else gpu_set(from, s, source, 0, size);
    REQUIRE_EQ_INT(tprpc_pipe_read(p->b, NULL, on_taken, &got), TPRPC_OK);
    WAIT(&p->s, got.o.runs, 1);
    WAIT(&p->s, wrote.runs, 1);
    CHECK_EQ_INT(wrote.status, TPRPC_OK);
    CHECK_EQ_INT(got.o.status, TPRPC_OK);
    CHECK_EQ_INT(got.right, 1);
    if (from >= 0) CU(cuStreamSynchronize(s));
    if (from >= 0) gpu_free(from, source);
    else free(source);
}

TEST(copied_and_allocated) {
    pair p;
    gpu_load();
    for (int way = 0; way < 2; way++) {
        gpu_pair(&p, "shm://", way ? staged : direct, 0);
        const int last = gpu.count > 1 ? 1 : 0;
        for (int i = 0; i < 20; i++) {
            copied(&p, 0, last, SIZE, 3);
            copied(&p, last, 0, 100, 4);
            copied(&p, 0, -1, SIZE, 5);
            copied(&p, -1, last, SIZE, 6);
        }
        pair_close(&p);
    }
}

/* What came is used on another stream, which is late, when its memory is given back and used again. */
typedef struct other_use { outcome o; tprpc_context *ctx; CUstream other; uint8_t *copy; } other_use;

static void on_used(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *arg) {
    other_use *u = (other_use *)arg;
    CUevent event;
    if (m) {
        const tprpc_tensor *t = &m->tensors[0];
        gpu_on(0);
        CU(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
        CU(cuEventRecord(event, (CUstream)t->stream));
        CU(cuStreamWaitEvent(u->other, event, 0));
        CU(cuEventDestroy_v2(event));
        CU(cuMemcpyAsync((CUdeviceptr)(uintptr_t)u->copy, (CUdeviceptr)(uintptr_t)t->data, t->size, u->other));
        CHECK_EQ_INT(tprpc_cuda_use(u->ctx, t, u->other, NULL), TPRPC_OK);
    }
    outcome_set(&u->o, status, error);
}

TEST(memory_used_on_another_stream) {
    pair p;
    other_use u[3];
    gpu_load();
    gpu_pair(&p, "shm://", direct, 0);
    CUstream s = gpu_stream(0);
    uint8_t *source = (uint8_t *)gpu_alloc(0, SIZE);
    tprpc_tensor tensor = gpu_tensor(0, source, SIZE, s, 0);
    tprpc_message m;
    outcome wrote[3];
    uint64_t *gates[3];
    memset(&m, 0, sizeof m);
    m.tensors = &tensor;
    m.tensor_count = 1;
    copied(&p, 0, 0, SIZE, 1);
    for (int i = 0; i < 3; i++) {
        memset(&u[i], 0, sizeof u[i]);
        memset(&wrote[i], 0, sizeof wrote[i]);
        u[i].ctx = p.s.also;
        u[i].other = gpu_stream(0);
        u[i].copy = (uint8_t *)gpu_alloc(0, SIZE);
        gates[i] = gate_close(0, u[i].other);
        gpu_put(0, s, source, SIZE, (uint64_t)i);
        REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &wrote[i]), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(p.b, NULL, on_used, &u[i]), TPRPC_OK);
        WAIT(&p.s, u[i].o.runs, 1);
        WAIT(&p.s, wrote[i].runs, 1);
        CHECK_EQ_INT(u[i].o.status, TPRPC_OK);
    }
    for (int i = 0; i < 3; i++) gate_open(gates[i]);
    for (int i = 0; i < 3; i++) CHECK(gpu_matches(0, u[i].other, u[i].copy, SIZE, (uint64_t)i));
    pair_close(&p);
}

static struct { int allocs, frees; CUdeviceptr last; } engine;

static void *engine_alloc(int32_t device, size_t size, void *stream, void *user) {
    CUdeviceptr at = 0;
    (void)stream;
    CHECK(user == &engine);
    CHECK(device == 0);
    CU(cuMemAlloc_v2(&at, size));
    engine.allocs++;
    engine.last = at;
    return (void *)(uintptr_t)at;
}

static void engine_free(int32_t device, void *data, size_t size, void *stream, void *user) {
    CHECK(device == 0 && size == SIZE && user == &engine);
    engine.frees++;
    CU(cuStreamSynchronize((CUstream)stream));
    CU(cuMemFree_v2((CUdeviceptr)(uintptr_t)data));
}

TEST(an_allocator_of_the_users) {
    tprpc_cuda_allocator allocator;
    pair p;
    allocator.alloc = engine_alloc;
    allocator.free = engine_free;
    allocator.user = &engine;
    gpu_load();
    gpu_pair(&p, "shm://", direct, 0);
    CHECK_EQ_INT(tprpc_cuda_set_allocator(p.s.also, &allocator, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_cuda_set_allocator(p.s.ctx, &allocator, NULL), TPRPC_OK);
    copied(&p, 0, 0, SIZE, 3);
    copied(&p, -1, 0, SIZE, 3);
    pair_close(&p);
    CHECK_EQ_INT(engine.allocs, 3);
    CHECK_EQ_INT(engine.frees, 3);
}

/* ---- what a user gets wrong ---- */

static void refused(pair *p, tprpc_tensor tensor, const char *why) {
    tprpc_message m;
    outcome o;
    taken got;
    tprpc_pipe_info info;
    memset(&m, 0, sizeof m);
    memset(&o, 0, sizeof o);
    memset(&got, 0, sizeof got);
    m.tensors = &tensor;
    m.tensor_count = 1;
    m.release = on_release;
    m.release_user = &o;
    CHECK_EQ_INT(tprpc_pipe_write(p->a, &m, on_written, &o), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(o.releases, 1);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(p->a, &info, sizeof info), TPRPC_OK);
    CHECK_EQ_INT(info.error.status, TPRPC_OK);
    (void)why;
}

TEST(wrong_memory_and_streams) {
    pair p;
    CUcontext other;
    CUstream foreign;
    gpu_load();
    gpu_pair(&p, "shm://", NULL, 0);
    void *memory = gpu_alloc(0, SIZE), *host = malloc(SIZE), *pinned = gpu_pinned(SIZE);
    CUstream s = gpu_stream(0);
    CU(cuCtxCreate_v2(&other, 0, 0));
    CU(cuStreamCreate(&foreign, CU_STREAM_NON_BLOCKING));
    copied(&p, 0, 0, SIZE, 1);
    refused(&p, gpu_tensor(0, host, SIZE, s, 0), "not device memory");
    refused(&p, gpu_tensor(0, pinned, SIZE, s, 0), "not device memory");
    refused(&p, gpu_tensor(0, memory, (64 << 20) + SIZE, s, 0), "past the end");
    refused(&p, gpu_tensor(gpu.count, memory, SIZE, NULL, 0), "there is no device");
    if (gpu.count > 1) refused(&p, gpu_tensor(1, memory, SIZE, NULL, 0), "is on device 0");
    refused(&p, gpu_tensor(0, memory, SIZE, foreign, 0), "primary context");
    copied(&p, 0, 0, SIZE, 2);
    CU(cuStreamDestroy_v2(foreign));
    CU(cuCtxDestroy_v2(other));
    free(host);
    pair_close(&p);
}

TEST(a_capture_stays_intact) {
    pair p;
    CUgraph graph = NULL;
    CUstreamCaptureStatus status;
    gpu_load();
    gpu_pair(&p, "shm://", direct, 0);
    void *memory = gpu_alloc(0, SIZE), *target = gpu_alloc(0, SIZE);
    CUstream s = gpu_stream(0), r = gpu_stream(0);
    tprpc_tensor out = gpu_tensor(0, memory, SIZE, r, 0), in = gpu_tensor(0, target, SIZE, s, 0);
    cargo c;
    gpu_put(0, r, memory, SIZE, 5);
    copied(&p, 0, 0, SIZE, 1);
    gpu_on(0);
    CU(cuStreamBeginCapture_v2(s, CU_STREAM_CAPTURE_MODE_GLOBAL));
    refused(&p, gpu_tensor(0, memory, SIZE, s, 0), "captured");
    CU(cuStreamIsCapturing(s, &status));
    CHECK_EQ_INT(status, CU_STREAM_CAPTURE_STATUS_ACTIVE);
    cargo_send(&c, p.a, p.b, &out, &in, 1);  /* to be placed on it: the read fails, */
    cargo_read(&c, &p.s, p.b);
    cargo_wait(&c, &p.s);
    CHECK_EQ_INT(c.got.status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(c.got.text, "captured");
    in.stream = r;
    cargo_carry(&c, &p, &out, &in, 1);       /* and on others all goes on */
    CU(cuStreamEndCapture(s, &graph));
    CHECK(gpu_matches(0, r, target, SIZE, 5));
    CHECK(graph != NULL);
    CU(cuGraphDestroy(graph));
    copied(&p, 0, 0, SIZE, 1);
    pair_close(&p);
}

/* ---- ends ---- */

/* A pipe that is closed while its streams stand still: the transfers end, and the streams go on. */
TEST(closed_in_the_middle) {
    pair p;
    gpu_load();
    for (int way = 0; way < 2; way++) {
        gpu_pair(&p, "shm://", way ? staged : direct, 0);
        CUstream s = gpu_stream(0);
        uint8_t *device = (uint8_t *)gpu_alloc(0, 4 << 20), *host = (uint8_t *)malloc(4 << 20);
        tprpc_tensor out = gpu_tensor(0, device, 4 << 20, s, -1), in = gpu_tensor(-1, host, 4 << 20, NULL, -1);
        cargo c;
        copied(&p, 0, -1, SIZE, 1);
        uint64_t *gate = gate_close(0, s);
        cargo_send(&c, p.a, p.b, &out, &in, 1);
        cargo_read(&c, &p.s, p.b);
        idle(&p.s, 5000);
        tprpc_pipe_close(p.b);
        p.b = NULL;
        idle(&p.s, 5000);
        gate_open(gate);
        cargo_wait(&c, &p.s);
        CHECK_EQ_INT(c.got.status, TPRPC_ERROR_CLOSED);
        CHECK(c.wrote.status != TPRPC_OK);
        CU(cuStreamSynchronize(s));
        pair_close(&p);
        free(host);
        gpu_free(0, device);
    }
}

/* Nobody named the other devices: they have no context. */
TEST(no_context_that_nobody_named) {
    pair p;
    gpu_load();
    if (gpu.count < 2) SKIP("one device");
    CHECK(!gpu_has_context(0));
    gpu_pair(&p, "shm://", NULL, 0);
    for (int i = 0; i < gpu.count; i++) CHECK(!gpu_has_context(i));
    copied(&p, 0, 0, SIZE, 1);
    copied(&p, 0, -1, SIZE, 1);
    CHECK(gpu_has_context(0));
    for (int i = 1; i < gpu.count; i++) CHECK(!gpu_has_context(i));
    pair_close(&p);
}

TEST(devices_are_told) {
    tprpc_cuda_device devices[GPU_MOST];
    tprpc_error error;
    gpu_load();
    memset(&error, 0, sizeof error);
    REQUIRE_EQ_INT(tprpc_cuda_get_devices(devices, GPU_MOST, sizeof *devices, &error), gpu.count);
    for (int i = 0; i < gpu.count; i++) {
        CHECK_EQ_INT(devices[i].index, i);
        CHECK(devices[i].name[0] && devices[i].memory_bytes > 1 << 20 && devices[i].major > 0);
        CHECK(!gpu_has_context(i));
        for (int k = 0; k < gpu.count; k++) {
            int can = 0;
            if (k != i) CU(cuDeviceCanAccessPeer(&can, i, k));
            CHECK_EQ_INT((devices[i].peers >> k & 1) != 0, can != 0);
            CHECK_EQ_INT(memcmp(devices[i].uuid, devices[k].uuid, 16) == 0, i == k);
        }
    }
}

/* ---- many, in threads of the library's ---- */

TEST(many_in_threads) {
    enum { ROUNDS = 100, PARALLEL = 4 };
    pair p;
    cargo c[PARALLEL];
    tprpc_tensor out[PARALLEL], in[PARALLEL];
    CUstream s[PARALLEL], r[PARALLEL];
    gpu_load();
    const int to = gpu.count > 1 ? 1 : 0;
    for (int way = 0; way < 2; way++) {
        gpu_pair(&p, "shm://", way ? staged : direct, 2);
        for (int k = 0; k < PARALLEL; k++) {
            s[k] = gpu_stream(0);
            r[k] = gpu_stream(to);
            out[k] = gpu_tensor(0, gpu_alloc(0, SIZE), SIZE, s[k], to);
            in[k] = gpu_tensor(to, gpu_alloc(to, SIZE), SIZE, r[k], to);
        }
        for (int i = 0; i < ROUNDS / TEST_SLOWDOWN; i++) {
            for (int k = 0; k < PARALLEL; k++) {
                gpu_set(0, s[k], out[k].data, i + k, SIZE);
                cargo_send(&c[k], p.a, p.b, &out[k], &in[k], 1);
                cargo_read(&c[k], &p.s, p.b);
            }
            for (int k = 0; k < PARALLEL; k++) {
                cargo_wait(&c[k], &p.s);
                CHECK_EQ_INT(c[k].got.status, TPRPC_OK);
                CHECK_EQ_INT(c[k].wrote.status, TPRPC_OK);
            }
        }
        for (int k = 0; k < PARALLEL; k++) {
            gpu_put(0, s[k], out[k].data, SIZE, (uint64_t)k);
            cargo_carry(&c[k], &p, &out[k], &in[k], 1);
            CHECK(gpu_matches(to, r[k], in[k].data, SIZE, (uint64_t)k));
        }
        pair_close(&p);
    }
}
