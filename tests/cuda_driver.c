/* Machines whose driver is of no use: no backend is viable, its reason is a sentence, and all else goes on. A device that
   fails, or has no memory left. */
#include "cuda_common.h"

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { SIZE = 50000 };

static int no_dlopen(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, "dlopen") == 0 ? ENOENT : 0;
}

/* The CUDA channels of a context are there, and why they are not used. */
static void not_viable(tprpc_context *ctx, const char *why) {
    tprpc_backend_info infos[32];
    int seen = 0;
    const size_t count = tprpc_context_get_backends(ctx, infos, 32, sizeof *infos);
    for (size_t i = 0; i < count; i++) {
        if (strncmp(infos[i].name, "cuda_", 5) != 0) continue;
        seen++;
        CHECK(!infos[i].viable);
        CHECK_CONTAINS(infos[i].why, why);
    }
    CHECK_LE_INT(2, seen);
}

static void host_goes_on(pair *p) {
    uint8_t *out = (uint8_t *)malloc(SIZE), *in = (uint8_t *)calloc(1, SIZE);
    tprpc_tensor from = gpu_tensor(-1, out, SIZE, NULL, -1), to = gpu_tensor(-1, in, SIZE, NULL, -1);
    cargo c;
    REQUIRE(out && in);
    fill(out, SIZE, 3);
    cargo_carry(&c, p, &from, &to, 1);
    CHECK(matches(in, SIZE, 3));
    free(out);
    free(in);
}

/* A context is made all the same; a GPU tensor is refused with the sentence. */
static void without(const char *why) {
    char memory[16];
    tprpc_tensor tensor = gpu_tensor(0, memory, sizeof memory, NULL, 0);
    tprpc_message m;
    tprpc_error error;
    tprpc_cuda_device device;
    outcome o;
    pair p;
    gpu_pair(&p, "shm://", NULL, 0);
    not_viable(p.s.ctx, why);
    host_goes_on(&p);
    memset(&m, 0, sizeof m);
    memset(&o, 0, sizeof o);
    m.tensors = &tensor;
    m.tensor_count = 1;
    CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &o), TPRPC_ERROR_UNSUPPORTED);
    memset(&error, 0, sizeof error);
    CHECK_EQ_INT(tprpc_cuda_get_devices(&device, 1, sizeof device, &error), 0);
    CHECK_CONTAINS(error.text, why);
    host_goes_on(&p);
    pair_close(&p);
}

TEST(no_driver) {
    tprpc_test_hook = no_dlopen;
    without("there is no driver");
}

TEST(an_old_driver) {
    if (standin_is_real()) SKIP("a real driver");
    setenv("STANDIN_VERSION", "11080", 1);
    standin_load();
    without("12.0 or later is needed");
}

TEST(no_devices) {
    if (standin_is_real()) SKIP("a real driver");
    setenv("STANDIN_DEVICES", "0", 1);
    standin_load();
    without("there is no CUDA device");
}

/* What CUDA_VISIBLE_DEVICES hides is not there: also with a real driver. */
TEST(no_visible_devices) {
    setenv("CUDA_VISIBLE_DEVICES", "", 1);
    standin_load();
    without("there is no CUDA device");
}

/* The write, or what becomes of it, fails with this. */
static void fails(pair *p, const tprpc_tensor *out, tprpc_tensor *in, tprpc_status status, const char *why) {
    cargo c;
    memset(&c, 0, sizeof c);
    c.out.tensors = out;
    c.out.tensor_count = 1;
    c.out.release = on_release;
    c.out.release_user = &c.wrote;
    const tprpc_status said = tprpc_pipe_write(p->a, &c.out, on_written, &c.wrote);
    if (said != TPRPC_OK) {
        CHECK_EQ_INT(said, status);
        CHECK_EQ_INT(c.wrote.releases, 1);
        return;
    }
    c.in.tensors = in;
    c.in.tensor_count = 1;
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p->b, on_described, &c.described), TPRPC_OK);
    cargo_read(&c, &p->s, p->b);
    cargo_wait(&c, &p->s);
    CHECK(c.wrote.status == status || c.got.status == status);
    if (why) CHECK_CONTAINS(c.wrote.status == status ? c.wrote.text : c.got.text, why);
}

typedef struct failing { const char *call; int nth; } failing;

static void fail_one(void *arg) {
    const failing *f = (const failing *)arg;
    char setting[80];
    int failed = 0;
    pair p;
    snprintf(setting, sizeof setting, "%s:%d:999", f->call, f->nth);
    setenv("STANDIN_FAIL", setting, 1);
    gpu_load();
    for (int way = 0; way < 2; way++) {
        gpu_pair(&p, "shm://", way ? "cuda_basic,basic" : "cuda_xth,basic", 0);
        void *source = gpu_alloc(0, SIZE), *target = gpu_alloc(1, SIZE);
        tprpc_tensor out = gpu_tensor(0, source, SIZE, NULL, 1), in = gpu_tensor(1, target, SIZE, NULL, 1);
        for (int k = 0; k < 8; k++) {
            cargo c;
            memset(&c, 0, sizeof c);
            c.out.tensors = &out;
            c.in.tensors = &in;
            c.out.tensor_count = c.in.tensor_count = 1;
            c.out.release = on_release;
            c.out.release_user = &c.wrote;
            const tprpc_status said = tprpc_pipe_write(p.a, &c.out, on_written, &c.wrote);
            if (said != TPRPC_OK) CHECK_EQ_INT(said, TPRPC_ERROR_DEVICE);
            failed += said != TPRPC_OK;
            if (said != TPRPC_OK) continue;
            REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p.b, on_described, &c.described), TPRPC_OK);
            cargo_read(&c, &p.s, p.b);
            cargo_wait(&c, &p.s);
            failed += c.got.status != TPRPC_OK || c.wrote.status != TPRPC_OK;
        }
        host_goes_on(&p);
        pair_close(&p);
    }
    CHECK_LE_INT(failed, 1);
}

/* Each call of the driver's on the way fails, the first and later ones: the transfer says so, and the pipe goes on. */
TEST(calls_that_fail) {
    static const char *const calls[] = {"cuEventRecord", "cuEventCreate", "cuStreamWaitEvent", "cuMemcpyAsync",
                                        "cuMemcpyPeerAsync", "cuStreamCreate", "cuMemHostRegister_v2",
                                        "cuPointerGetAttributes", "cuStreamIsCapturing", "cuEventQuery"};
    if (standin_is_real()) SKIP("a real driver");
    for (size_t i = 0; i < COUNT(calls); i++) {
        failing f;
        f.call = calls[i];
        for (f.nth = 1; f.nth <= 6; f.nth++) {
            if (TEST_TSAN && (i % 3 || f.nth != 2)) continue;   /* each takes a second there */
            if (!CHECK_EQ_INT(test_wait_child(test_fork_run(fail_one, &f), 20), 0)) fprintf(stderr, "%s\n", f.call);
        }
    }
}

TEST(no_memory_on_the_device) {
    pair p;
    if (standin_is_real()) SKIP("a real driver");
    setenv("STANDIN_MEMORY_MB", "8", 1);
    gpu_load();
    gpu_pair(&p, "shm://", NULL, 0);
    void *source = gpu_alloc(0, 6 << 20);
    tprpc_tensor out = gpu_tensor(0, source, 6 << 20, NULL, 0);
    tprpc_message m;
    outcome wrote, got;
    memset(&m, 0, sizeof m);
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    m.tensors = &out;
    m.tensor_count = 1;
    CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &wrote), TPRPC_ERROR_MEMORY);   /* to be copied */
    m.release = on_release;
    m.release_user = &wrote;
    REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(p.b, NULL, on_read, &got), TPRPC_OK);
    WAIT(&p.s, got.runs, 1);
    WAIT(&p.s, wrote.runs, 1);
    CHECK_EQ_INT(got.status, TPRPC_ERROR_MEMORY);
    CHECK_CONTAINS(got.text, "OUT_OF_MEMORY");
    host_goes_on(&p);
    pair_close(&p);
}

TEST(a_device_that_is_anothers) {
    pair p;
    if (standin_is_real()) SKIP("a real driver");
    setenv("STANDIN_EXCLUSIVE", "0", 1);
    gpu_load();
    gpu_pair(&p, "shm://", NULL, 0);
    char memory[16];
    const tprpc_tensor out = gpu_tensor(0, memory, sizeof memory, NULL, 0);
    tprpc_tensor in = out;
    fails(&p, &out, &in, TPRPC_ERROR_DEVICE, NULL);
    host_goes_on(&p);
    pair_close(&p);
}

/* ---- the n-th allocation fails, or the n-th call to the system ---- */

static struct { int blocks, left; const char *call; } scarce;   /* left: until one fails; below 0: none does */

static void *scarce_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    void *at = NULL;
    (void)tag; (void)user;
    if (!scarce.call && scarce.left >= 0 && scarce.left-- == 0) return NULL;
    if (posix_memalign(&at, align < sizeof at ? sizeof at : align, size ? size : 1) != 0) return NULL;
    scarce.blocks++;
    return at;
}

static void scarce_free(void *at, size_t size, uint32_t tag, void *user) {
    (void)size; (void)tag; (void)user;
    scarce.blocks -= at != NULL;
    free(at);
}

static int scarce_system(const char *call, int64_t *size) {
    (void)size;
    if (!scarce.call || strcmp(call, scarce.call) != 0) return 0;
    return scarce.left >= 0 && scarce.left-- == 0 ? ENOMEM : 0;
}

static tprpc_context *scarce_context(const char *channels) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.transports = "shm";
    desc.channels = channels;
    desc.backends = tprpc_cuda_backends(&desc.backend_count);
    desc.allocator.alloc = scarce_alloc;
    desc.allocator.free = scarce_free;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    return ctx;
}

/* Whatever fails, both operations end. Returns whether the pipe is still there. */
static bool try_one(pair *p, const tprpc_tensor *out, tprpc_tensor *in, bool must) {
    cargo c;
    memset(&c, 0, sizeof c);
    c.out.tensors = out;
    c.in.tensors = in;
    c.out.tensor_count = c.in.tensor_count = 1;
    c.out.release = on_release;
    c.out.release_user = &c.wrote;
    if (tprpc_pipe_write(p->a, &c.out, on_written, &c.wrote) != TPRPC_OK) return !CHECK(!must);
    bool there = tprpc_pipe_read_descriptor(p->b, on_described, &c.described) == TPRPC_OK;
    if (there) WAIT(&p->s, c.described.runs, 1);
    there = there && c.described.status == TPRPC_OK && tprpc_pipe_read(p->b, &c.in, on_read, &c.got) == TPRPC_OK;
    if (there) WAIT(&p->s, c.got.runs, 1);
    if (!there) tprpc_pipe_close(p->b);
    if (!there) p->b = NULL;
    WAIT(&p->s, c.wrote.runs, 1);
    if (must) CHECK_EQ_INT(c.got.status, TPRPC_OK);
    return there;
}

/* Until none fails any more. */
static void scarcity(const char *channels, const char *call, int least) {
    bool failed = true;
    int n = 0;
    gpu_load();
    void *memory = gpu_alloc(0, SIZE), *host = malloc(SIZE);
    const tprpc_tensor out = gpu_tensor(0, memory, SIZE, NULL, -1);
    for (; failed; n++) {
        pair p;
        tprpc_tensor in = gpu_tensor(-1, host, SIZE, NULL, -1);
        memset(&p, 0, sizeof p);
        scarce.left = -1;
        scarce.call = call;
        p.s.ctx = scarce_context(channels);
        p.s.also = scarce_context(channels);
        pair_connect(&p, "shm://", 0);
        scarce.left = n;
        const bool there = try_one(&p, &out, &in, false);
        failed = scarce.left < 0;
        scarce.left = -1;
        if (there) try_one(&p, &out, &in, !failed);
        pair_close(&p);
        CHECK_EQ_INT(scarce.blocks, 0);
    }
    CHECK_LE_INT(least, n - 1);            /* so often did one fail */
    free(host);
}

TEST(no_memory_at_any_allocation) {
    scarcity("cuda_xth,basic", NULL, 3);
    scarcity("cuda_basic,basic", NULL, 3);
}

TEST(no_memory_to_share) {
    static const char *const calls[] = {"memfd_create", "ftruncate", "fcntl", "mmap", "fstat", "fstatfs", "get_seals"};
    tprpc_test_hook = scarce_system;
    for (size_t i = 0; i < COUNT(calls); i++) scarcity("cuda_basic,basic", calls[i], 1);
}

/* ---- a kernel of the user's that faults takes its context with it ---- */

static const char fault_ptx[] =
    ".version 6.3\n.target sm_75\n.address_size 64\n.visible .entry standin_fault()\n{\ntrap;\n}\n";

/* A driver that loads a kernel may wait for what the device is at: here, for a gate that is closed. */
static CUfunction fault_load(void) {
    CUmodule module;
    CUfunction function;
    gpu_on(0);
    CU(cuModuleLoadData(&module, fault_ptx));
    CU(cuModuleGetFunction(&function, module, "standin_fault"));
    return function;
}

static void lost(const char *channels) {
    pair p;
    cargo c;
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    gpu_load();
    gpu_pair(&p, "shm://", channels, 0);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE), *host = malloc(SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, -1), in = gpu_tensor(-1, host, SIZE, NULL, -1);
    const CUfunction fault = fault_load();
    cargo_carry(&c, &p, &out, &in, 1);
    uint64_t *gate = gate_close(0, s);
    CU(cuLaunchKernel(fault, 1, 1, 1, 1, 1, 1, 0, s, NULL, NULL));
    cargo_send(&c, p.a, p.b, &out, &in, 1);  /* behind it */
    cargo_read(&c, &p.s, p.b);
    gate_open(gate);
    cargo_wait(&c, &p.s);
    CHECK(c.wrote.status != TPRPC_OK);
    CHECK(c.got.status != TPRPC_OK);
    CHECK(c.wrote.status == TPRPC_ERROR_DEVICE || c.got.status == TPRPC_ERROR_DEVICE);
    fails(&p, &out, &in, TPRPC_ERROR_DEVICE, "cuda: ");
    host_goes_on(&p);
    pair_close(&p);
    free(host);
}

TEST(a_kernel_faults) { lost("cuda_xth,cuda_basic,basic"); }
TEST(a_kernel_faults_on_the_way_through_the_host) { lost("cuda_basic,basic"); }

/* Its receiver has left, and the device fails under what is still being copied: the send ends all the same. */
TEST(a_kernel_faults_when_the_send_is_over) {
    pair p;
    cargo c;
    setenv("CUDA_MODULE_LOADING", "EAGER", 1);
    gpu_load();
    gpu_pair(&p, "shm://", "cuda_basic,basic", 0);
    CUstream s = gpu_stream(0);
    void *source = gpu_alloc(0, SIZE), *host = malloc(SIZE);
    tprpc_tensor out = gpu_tensor(0, source, SIZE, s, -1), in = gpu_tensor(-1, host, SIZE, NULL, -1);
    const CUfunction fault = fault_load();
    cargo_carry(&c, &p, &out, &in, 1);
    uint64_t *gate = gate_close(0, s);
    CU(cuLaunchKernel(fault, 1, 1, 1, 1, 1, 1, 0, s, NULL, NULL));
    cargo_send(&c, p.a, p.b, &out, &in, 1);
    cargo_read(&c, &p.s, p.b);
    idle(&p.s, 5000);                  /* a piece was asked for, and waits behind the gate */
    tprpc_pipe_close(p.b);
    p.b = NULL;
    WAIT(&p.s, c.got.runs, 1);
    idle(&p.s, 5000);
    CHECK_EQ_INT(c.wrote.runs, 0);
    gate_open(gate);
    WAIT(&p.s, c.wrote.runs, 1);
    CHECK(c.wrote.status != TPRPC_OK);
    pair_close(&p);
    free(host);
}
