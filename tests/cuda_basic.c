/* GPU memory between two processes through host memory: shared by both, and through the pipe. One that dies in the middle
   leaves no transfer of the other's open, and none of its streams standing. */
#include "cuda_two.h"

enum { SIZE = (13 << 20) + 77, ROUNDS = 3, READY = 1 };

typedef struct way { const char *address; int here, there; } way;   /* devices; -1: host memory */

static void *memory_on(int device) { return device < 0 ? malloc(SIZE) : gpu_alloc(device, SIZE); }
static void memory_free(int device, void *memory) { if (device < 0) free(memory); else gpu_free(device, memory); }

/* Sends back what it gets. */
static void echo(two *t, void *arg) {
    const way *w = (const way *)arg;
    CUstream stream = w->there < 0 ? NULL : gpu_stream(w->there);
    void *memory = memory_on(w->there);
    for (int i = 0; i < ROUNDS; i++) {
        tprpc_tensor tensor = gpu_tensor(w->there, memory, SIZE, stream, w->here);
        cargo c;
        two_got(t, &c, &tensor, 1);
        two_sent(t, &c, &tensor, 1);
    }
    if (stream) CU(cuStreamSynchronize(stream));
    memory_free(w->there, memory);
}

static void there_and_back(const char *address, int here, int there) {
    way w;
    two t;
    cargo out, in;
    w.address = address;
    w.here = here;
    w.there = there;
    two_open(&t, address, "cuda_basic,basic", echo, &w);
    CUstream stream = here < 0 ? NULL : gpu_stream(here);
    void *source = memory_on(here), *target = memory_on(here);
    for (uint64_t i = 0; i < ROUNDS; i++) {
        const tprpc_tensor from = gpu_tensor(here, source, SIZE, stream, there);
        tprpc_tensor to = gpu_tensor(here, target, SIZE, stream, here);
        if (here < 0) fill(source, SIZE, i);
        else gpu_put(here, stream, source, SIZE, i);
        two_send(&t, &out, &from, 1);
        pipe_carries(t.s.pipe, "cuda_basic", ALL_OF_DEVICES);
        pipe_carries(t.s.pipe, "cuda_ipc", 0);
        two_got(&t, &in, &to, 1);
        WAIT(&t.s, out.wrote.runs, 1);
        CHECK_EQ_INT(out.wrote.status, TPRPC_OK);
        if (here < 0) CHECK(matches(target, SIZE, i));
        else CHECK(gpu_matches(here, stream, target, SIZE, i));
    }
    two_close(&t, false);
    memory_free(here, source);
    memory_free(here, target);
}

TEST(devices_through_shared_memory) { there_and_back("shm://", 0, 0); }
TEST(devices_through_tcp) { there_and_back("tcp://127.0.0.1:0", 0, 0); }
TEST(host_to_device_and_back) { there_and_back("shm://", -1, 0); }
TEST(device_to_host_and_back) { there_and_back("shm://", 0, -1); }
TEST(device_to_host_over_tcp) { there_and_back("tcp://127.0.0.1:0", 0, -1); }

/* ---- deaths ---- */

/* Its stream stands still, so of what it sends nothing comes. */
static void sends_nothing(two *t, void *arg) {
    const way *w = (const way *)arg;
    CUstream stream = gpu_stream(0);
    void *memory = memory_on(0);
    const tprpc_tensor tensor = gpu_tensor(0, memory, SIZE, stream, w->here);
    cargo c;
    two_sent(t, &c, &tensor, 1);
    gate_close(0, stream);
    two_send(t, &c, &tensor, 1);
    for (;;) tprpc_poll(t->s.ctx, 1000, 0);
}

static void sender_dies(const char *address) {
    way w;
    two t;
    cargo c;
    w.address = address;
    w.here = w.there = 0;
    two_open(&t, address, "cuda_basic,basic", sends_nothing, &w);
    CUstream stream = gpu_stream(0);
    void *memory = memory_on(0);
    tprpc_tensor tensor = gpu_tensor(0, memory, SIZE, stream, 0);
    two_got(&t, &c, &tensor, 1);
    two_recv(&t, &c, &tensor, 1);
    gpu_set(0, stream, memory, 1, SIZE);   /* the user's, queued behind */
    idle(&t.s, 3000);
    CHECK_EQ_INT(c.got.runs, 0);
    two_kill(&t);
    WAIT(&t.s, c.got.runs, 1);
    CHECK(c.got.status != TPRPC_OK);
    two_goes_on(&t, 0, stream);
    two_close(&t, true);
}

TEST(sender_dies_shared) { sender_dies("shm://"); }
TEST(sender_dies_over_tcp) { sender_dies("tcp://127.0.0.1:0"); }

static void takes_nothing(two *t, void *arg) {
    (void)arg;
    void *memory = memory_on(0);
    tprpc_tensor tensor = gpu_tensor(0, memory, SIZE, NULL, 0);
    cargo c;
    two_got(t, &c, &tensor, 1);
    two_raise(t, READY);
    for (;;) test_sleep_us(1000);
}

static void receiver_dies(const char *address) {
    way w;
    two t;
    cargo c;
    w.address = address;
    w.here = w.there = 0;
    two_open(&t, address, "cuda_basic,basic", takes_nothing, &w);
    CUstream stream = gpu_stream(0);
    void *memory = memory_on(0);
    const tprpc_tensor tensor = gpu_tensor(0, memory, SIZE, stream, 0);
    two_sent(&t, &c, &tensor, 1);
    two_await(&t, READY);
    two_send(&t, &c, &tensor, 1);
    gpu_set(0, stream, memory, 1, SIZE);
    idle(&t.s, 3000);
    CHECK_EQ_INT(c.wrote.runs, 0);
    two_kill(&t);
    WAIT(&t.s, c.wrote.runs, 1);
    CHECK(c.wrote.status != TPRPC_OK);
    two_goes_on(&t, 0, stream);
    two_close(&t, true);
}

TEST(receiver_dies_shared) { receiver_dies("shm://"); }
TEST(receiver_dies_over_tcp) { receiver_dies("tcp://127.0.0.1:0"); }

/* While both send to each other what takes many chunks. */
TEST(killed_at_any_moment) {
    const two_exchange e = {"cuda_basic,basic", (40 << 20) + 77, 0, 0};
    setenv("STANDIN_MEMORY_MB", "256", 1);
    two_killed_at_any_moment(e, 60000);
}
