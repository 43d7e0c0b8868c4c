// bench-cuda: GPU memory through tprpc, beside what the bare driver does in the same run.
//
//   bench-cuda [--from D] [--to D] [--inside] [--outbox] [--channels LIST]
//
// Two processes, or with --inside two contexts of one; memory is registered, or with --outbox not. It prints one JSON
// object: microseconds for 8 bytes there and back, bytes a second of 256 MiB one way, microseconds for 1,000 tensors of
// 4 KiB one way, each as the median of several; and "bare", what cuMemcpyPeerAsync does in this process.

#define TPRPC_CUDA_IMPLEMENTATION
#include "../tprpc_cuda.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { SMALL = 8, MANY = 1000, EACH = 4096, ROUNDS = 300, TURNS = 15 };
#define LARGE ((size_t)256 << 20)

typedef struct bench {
    int from, to;
    bool inside, outbox;
    const char *channels;
    const tpr_cuda_driver *cu;
    tprpc_context *ctx[2];
    tprpc_pipe *pipe[2];               // NULL: that end is another process's
    tpr_cuda_driver_context context[2];
    tpr_cuda_driver_stream stream[2];
    void *memory[2];
} bench;

static void fatal(const char *what, const char *why) {
    fprintf(stderr, "bench-cuda: %s: %s\n", what, why);
    exit(1);
}

static void check(int code, const char *what) {
    char text[40];
    snprintf(text, sizeof text, "CUDA error %d", code);
    if (code) fatal(what, text);
}

static double now_us(void) {
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e6 + (double)ts.tv_nsec / 1e3;
}

static int by_size(const void *a, const void *b) {
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, size_t count) {
    qsort(values, count, sizeof *values, by_size);
    return values[count / 2];
}

static void work(bench *b) {
    for (int i = 0; i < 2; i++) if (b->ctx[i]) tprpc_poll(b->ctx[i], TPRPC_NOW, 0);
}

// ---- both ends

static void open_device(bench *b, int end) {
    tpr_cuda_driver_device device;
    tpr_cuda_driver_ptr at;
    check(b->cu->cuDeviceGet(&device, end ? b->to : b->from), "cuDeviceGet");
    check(b->cu->cuDevicePrimaryCtxRetain(&b->context[end], device), "cuDevicePrimaryCtxRetain");
    check(b->cu->cuCtxPushCurrent(b->context[end]), "cuCtxPushCurrent");
    check(b->cu->cuStreamCreate(&b->stream[end], TPR_CUDA_DRIVER_STREAM_NON_BLOCKING), "cuStreamCreate");
    check(b->cu->cuMemAlloc(&at, LARGE), "cuMemAlloc");
    b->memory[end] = (void *)(uintptr_t)at;
}

static void open_context(bench *b, int end) {
    tprpc_context_desc desc = {0};
    tprpc_error error;
    desc.backends = tprpc_cuda_backends(&desc.backend_count);
    desc.channels = b->channels;
    if (tprpc_context_create(&desc, &b->ctx[end], &error) != TPRPC_OK) fatal("a context", error.text);
    if (!b->outbox && tprpc_cuda_register(b->ctx[end], end ? b->to : b->from, b->memory[end], LARGE, &error) != TPRPC_OK)
        fatal("registering", error.text);
}

static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    if (status != TPRPC_OK) fatal("accepting", error->text);
    *(tprpc_pipe **)user = pipe;
}

static tprpc_tensor tensor_of(const bench *b, int end, size_t offset, size_t size) {
    tprpc_tensor tensor = {0};
    tensor.data = (char *)b->memory[end] + offset;
    tensor.size = size;
    tensor.device.kind = tensor.target.kind = TPRPC_CUDA;
    tensor.device.index = end ? b->to : b->from;
    tensor.target.index = end ? b->from : b->to;
    tensor.stream = b->stream[end];
    return tensor;
}

// ---- a message: `left` is raised by its callbacks

typedef struct parcel { tprpc_tensor *tensors; size_t count; tprpc_message message; int left; bool reading; } parcel;

static void on_release(void *user) { (void)user; }

static void on_written(tprpc_status status, const tprpc_error *error, void *user) {
    if (status != TPRPC_OK) fatal("writing", error->text);
    ((parcel *)user)->left = 0;
}
static void on_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)message;
    if (status != TPRPC_OK) fatal("reading", error->text);
    ((parcel *)user)->left = 0;
}
static void on_described(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)message;
    if (status != TPRPC_OK) fatal("describing", error->text);
    ((parcel *)user)->left = 2;
}

static parcel *parcel_new(const bench *b, int end, size_t count, size_t size) {
    parcel *p = (parcel *)calloc(1, sizeof *p);
    if (!p || !(p->tensors = (tprpc_tensor *)calloc(count, sizeof *p->tensors))) fatal("memory", "none");
    for (size_t i = 0; i < count; i++) p->tensors[i] = tensor_of(b, end, i * size, size);
    p->message.tensors = p->tensors;
    p->message.tensor_count = p->count = count;
    p->message.release = on_release;
    return p;
}

static void parcel_free(parcel *p) {
    free(p->tensors);
    free(p);
}

static void send_begin(bench *b, int end, parcel *p) {
    p->left = 1;
    if (tprpc_pipe_write(b->pipe[end], &p->message, on_written, p) != TPRPC_OK) fatal("writing", "refused");
}

static void recv_begin(bench *b, int end, parcel *p) {
    tprpc_message into = p->message;
    into.release = NULL;
    p->left = 1;
    if (tprpc_pipe_read_descriptor(b->pipe[end], on_described, p) != TPRPC_OK) fatal("describing", "refused");
    while (p->left != 2) work(b);
    p->left = 1;
    if (tprpc_pipe_read(b->pipe[end], &into, on_read, p) != TPRPC_OK) fatal("reading", "refused");
}

static void finish(bench *b, parcel *p) { while (p->left) work(b); }

static void finish_stream(bench *b, int end) {
    tpr_cuda_driver_context context;
    int code;
    check(b->cu->cuCtxPushCurrent(b->context[end]), "cuCtxPushCurrent");
    while ((code = (int)b->cu->cuStreamQuery(b->stream[end])) == TPR_CUDA_DRIVER_ERROR_NOT_READY) work(b);
    check(code, "cuStreamQuery");
    check(b->cu->cuCtxPopCurrent(&context), "cuCtxPopCurrent");
}

// ---- what is measured: end 0 sends and takes the time, end 1 sends back

static void once(bench *b, size_t count, size_t size, bool back) {
    parcel *there[2] = {parcel_new(b, 0, count, size), parcel_new(b, 1, count, size)};
    if (b->pipe[0]) send_begin(b, 0, there[0]);
    if (b->pipe[1]) recv_begin(b, 1, there[1]);
    if (b->pipe[1]) finish(b, there[1]);
    if (b->pipe[0]) finish(b, there[0]);
    if (!back && b->pipe[1]) finish_stream(b, 1);
    parcel *home[2] = {parcel_new(b, 0, back ? count : 1, back ? size : SMALL),
                       parcel_new(b, 1, back ? count : 1, back ? size : SMALL)};
    if (b->pipe[1]) send_begin(b, 1, home[1]);
    if (b->pipe[0]) recv_begin(b, 0, home[0]);
    if (b->pipe[0]) finish(b, home[0]);
    if (b->pipe[1]) finish(b, home[1]);
    if (b->pipe[0]) finish_stream(b, 0);
    for (int i = 0; i < 2; i++) {
        parcel_free(there[i]);
        parcel_free(home[i]);
    }
}

static double measure(bench *b, size_t count, size_t size, bool back, int turns, int rounds) {
    double times[TURNS];
    for (int i = 0; i < 5; i++) once(b, count, size, back);
    for (int t = 0; t < turns; t++) {
        const double begin = now_us();
        for (int i = 0; i < rounds; i++) once(b, count, size, back);
        times[t] = (now_us() - begin) / rounds;
    }
    return median(times, (size_t)turns);
}

static void all(bench *b, double *out) {
    out[0] = measure(b, 1, SMALL, true, TURNS, ROUNDS);
    out[1] = measure(b, 1, LARGE, false, TURNS, 3);
    out[2] = measure(b, MANY, EACH, false, TURNS, 20);
}

// One copy by the bare driver, and its end on the host.
static double bare(bench *b, size_t size, int rounds) {
    double times[TURNS];
    for (int t = 0; t < TURNS; t++) {
        const double begin = now_us();
        for (int i = 0; i < rounds; i++) {
            check(b->cu->cuMemcpyPeerAsync((tpr_cuda_driver_ptr)(uintptr_t)b->memory[1], b->context[1],
                                           (tpr_cuda_driver_ptr)(uintptr_t)b->memory[0], b->context[0], size,
                                           b->stream[1]), "cuMemcpyPeerAsync");
            finish_stream(b, 1);
        }
        times[t] = (now_us() - begin) / rounds;
    }
    return median(times, TURNS);
}

static void child(bench *b, const char *address) {
    tprpc_pipe_desc desc = {0};
    tprpc_error error;
    double unused[3];
    if (!(b->cu = tpr_cuda_driver_get(&error))) fatal("the driver", error.text);
    open_device(b, 1);
    open_context(b, 1);
    desc.address = address;
    if (tprpc_connect(b->ctx[1], &desc, &b->pipe[1], &error) != TPRPC_OK) fatal("connecting", error.text);
    all(b, unused);
    tprpc_pipe_close(b->pipe[1]);
    tprpc_context_destroy(b->ctx[1]);
}

static void parse(bench *b, int argc, char **argv) {
    b->to = 1;
    for (int i = 1; i < argc; i++) {
        const char *next = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(argv[i], "--inside")) b->inside = true;
        else if (!strcmp(argv[i], "--outbox")) b->outbox = true;
        else if (!strcmp(argv[i], "--from")) b->from = atoi(next), i++;
        else if (!strcmp(argv[i], "--to")) b->to = atoi(next), i++;
        else if (!strcmp(argv[i], "--channels")) b->channels = next, i++;
        else fatal("usage", "bench-cuda [--from D] [--to D] [--inside] [--outbox] [--channels LIST]");
    }
}

static void report(bench *b) {
    tprpc_listener_desc listen = {0};
    tprpc_listener *listener;
    tprpc_error error;
    double times[3];
    const char *address = "shm://bench-cuda";
    listen.addresses = &address;
    listen.address_count = 1;
    open_device(b, 0);
    open_context(b, 0);
    if (tprpc_listen(b->ctx[0], &listen, &listener, &error) != TPRPC_OK) fatal("listening", error.text);
    tprpc_accept(listener, on_accepted, &b->pipe[0]);
    if (b->inside) {
        tprpc_pipe_desc desc = {0};
        open_device(b, 1);
        open_context(b, 1);
        desc.address = address;
        if (tprpc_connect(b->ctx[1], &desc, &b->pipe[1], &error) != TPRPC_OK) fatal("connecting", error.text);
    }
    while (!b->pipe[0]) work(b);
    all(b, times);
    if (!b->inside) open_device(b, 1);
    const double copy = bare(b, LARGE, 3), small = bare(b, SMALL, 100);
    printf("{\"from\": %d, \"to\": %d, \"inside\": %s, \"registered\": %s, \"round_trip_8_us\": %.2f, "
           "\"one_way_256_mib_gb_s\": %.1f, \"thousand_4_kib_us\": %.1f, "
           "\"bare\": {\"copy_256_mib_gb_s\": %.1f, \"copy_8_us\": %.2f}}\n",
           b->from, b->to, b->inside ? "true" : "false", b->outbox ? "false" : "true", times[0],
           (double)LARGE / times[1] / 1e3, times[2], (double)LARGE / copy / 1e3, small);
    tprpc_pipe_close(b->pipe[0]);
    if (b->inside) tprpc_pipe_close(b->pipe[1]);
    if (b->inside) tprpc_context_destroy(b->ctx[1]);
    tprpc_context_destroy(b->ctx[0]);
}

int main(int argc, char **argv) {
    bench b = {0};
    tprpc_error error;
    pid_t other = 0;
    int status = 0;
    parse(&b, argc, argv);
    if (!b.inside && (other = fork()) == 0) {
        usleep(2000000);               // until the other listens
        child(&b, "shm://bench-cuda");
        return 0;
    }
    if (!(b.cu = tpr_cuda_driver_get(&error))) fatal("the driver", error.text);
    report(&b);
    if (other) waitpid(other, &status, 0);
    return status != 0;
}
