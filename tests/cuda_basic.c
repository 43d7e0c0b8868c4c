/* GPU memory between two processes: through host memory that both share, and through the pipe; one that dies in the middle
   leaves no stream of the other's standing, and no transfer open. */
#include "cuda_common.h"

enum { SIZE = 3 << 20, CHUNKED = (2 << 20) + 77 };

static const char staged[] = "cuda_basic,basic";

/* ---- a peer in a process of its own: it sends back what it gets, from device to device as it is told ---- */

typedef struct peer_job { char address[128]; const char *channels; int device, rounds; int die_at; } peer_job;

static peer_job *job;                  /* shared */

static void peer_echo(void *arg) {
    side s;
    (void)arg;
    memset(&s, 0, sizeof s);
    gpu_load();
    s.ctx = gpu_context(strncmp(job->address, "tcp", 3) == 0 ? "tcp" : "shm", job->channels, 0);
    s.pipe = connect_to(s.ctx, job->address, 0, 0);
    void *memory = job->device < 0 ? malloc(SIZE) : gpu_alloc(job->device, SIZE);
    CUstream stream = job->device < 0 ? NULL : gpu_stream(job->device);
    for (int i = 0; i < job->rounds; i++) {
        cargo c;
        memset(&c, 0, sizeof c);
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(s.pipe, on_described, &c.described), TPRPC_OK);
        WAIT(&s, c.described.runs, 1);
        if (c.described.status != TPRPC_OK) break;
        tprpc_tensor in = gpu_tensor(job->device, memory, CHUNKED, stream, 0);
        c.in.tensors = &in;
        c.in.tensor_count = 1;
        REQUIRE_EQ_INT(tprpc_pipe_read(s.pipe, &c.in, on_read, &c.got), TPRPC_OK);
        WAIT(&s, c.got.runs, 1);
        if (c.got.status != TPRPC_OK) break;
        in.target = gpu_device(job->die_at);
        c.out.tensors = &in;
        c.out.tensor_count = 1;
        c.out.release = on_release;
        c.out.release_user = &c.wrote;
        REQUIRE_EQ_INT(tprpc_pipe_write(s.pipe, &c.out, on_written, &c.wrote), TPRPC_OK);
        WAIT(&s, c.wrote.runs, 1);
        CHECK_EQ_INT(c.wrote.status, TPRPC_OK);
    }
    if (job->device < 0) free(memory);
    tprpc_pipe_close(s.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

/* This side: device `here` to the peer's `there` and back. -1: host memory. */
static void there_and_back(const char *address, int here, int there) {
    side s;
    accepting accept;
    cargo c;
    memset(&s, 0, sizeof s);
    memset(&accept, 0, sizeof accept);
    tprpc_context *ctx = context(strncmp(address, "tcp", 3) == 0 ? "tcp" : "shm", 0);   /* to find an address */
    tprpc_context_destroy(ctx);
    job = (peer_job *)mmap(NULL, sizeof *job, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(job != MAP_FAILED);
    job->channels = staged;
    job->device = there;
    job->rounds = 3;
    job->die_at = here;
    int ready[2];
    char byte = 0;
    REQUIRE(pipe(ready) == 0);
    const pid_t child = fork();
    if (!child) {
        close(ready[1]);
        if (read(ready[0], &byte, 1) != 1) _exit(1);
        peer_echo(NULL);
        fflush(NULL);
        _exit(harness_failures != 0);
    }
    gpu_load();
    s.ctx = gpu_context(strncmp(address, "tcp", 3) == 0 ? "tcp" : "shm", staged, 0);
    s.listener = listen_on(s.ctx, address, 0);
    CHECK_EQ_INT(tprpc_accept(s.listener, on_accepted, &accept), TPRPC_OK);
    snprintf(job->address, sizeof job->address, "%s", tprpc_listener_address(s.listener, NULL));
    REQUIRE(write(ready[1], &byte, 1) == 1);
    WAIT(&s, accept.o.runs, 1);
    s.pipe = accept.pipe;
    uint8_t *source = (uint8_t *)(here < 0 ? malloc(CHUNKED) : gpu_alloc(here, CHUNKED));
    uint8_t *target = (uint8_t *)(here < 0 ? malloc(CHUNKED) : gpu_alloc(here, CHUNKED));
    CUstream stream = here < 0 ? NULL : gpu_stream(here);
    for (int i = 0; i < job->rounds; i++) {
        tprpc_tensor out = gpu_tensor(here, source, CHUNKED, stream, there);
        tprpc_tensor in = gpu_tensor(here, target, CHUNKED, stream, here);
        if (here < 0) fill(source, CHUNKED, (uint64_t)i);
        else gpu_put(here, stream, source, CHUNKED, (uint64_t)i);
        cargo_send(&c, s.pipe, s.pipe, &out, &in, 1);
        cargo_read(&c, &s, s.pipe);
        cargo_wait(&c, &s);
        CHECK_EQ_INT(c.got.status, TPRPC_OK);
        if (here < 0) CHECK(matches(target, CHUNKED, (uint64_t)i));
        else CHECK(gpu_matches(here, stream, target, CHUNKED, (uint64_t)i));
    }
    CHECK_EQ_INT(test_wait_child(child, 20), 0);
    tprpc_pipe_close(s.pipe);
    tprpc_listener_close(s.listener);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    if (here < 0) free(source);
    if (here < 0) free(target);
}

TEST(devices_through_shared_memory) { there_and_back("shm://", 0, 0); }
TEST(devices_through_tcp) { there_and_back("tcp://127.0.0.1:0", 0, 0); }
TEST(host_to_device_and_back) { there_and_back("shm://", -1, 0); }
TEST(device_to_host_and_back) { there_and_back("shm://", 0, -1); }
TEST(device_to_host_over_tcp) { there_and_back("tcp://127.0.0.1:0", 0, -1); }
