// What the drivers of other libraries (bench-zmq.c, bench-nng.c) have in common: the options, two processes, the clock,
// and one JSON object with the figures that tprpc-perf gives for the same test.
//
// A driver defines peer_name and the five functions below, and includes this file. These libraries have threads of
// their own, so nothing is pinned to a core; and they sleep while they wait, for spinning they cannot.

#include <inttypes.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef struct peer_options {
    bool    stream;                  // messages one way; else there and back
    size_t  size;
    int64_t iters, warmup;
    int     ahead;                   // of a stream: how many messages may wait at each end
    char    address[128];
} peer_options;

// Opens a socket: the serving end listens, the other one connects, and neither waits for the other.
static void peer_open(const peer_options *o, bool serving);
// Sends `size` bytes, which stay as they are until the process ends.
static void peer_send(const unsigned char *data, size_t size);
// Receives one message of that size.
static void peer_receive(size_t size);
// Closes the socket; what was sent still arrives.
static void peer_close(void);
// The library's sentence for its last failure.
static const char *peer_reason(void);

static void peer_die(const char *what, const char *why) __attribute__((noreturn));
static void peer_die(const char *what, const char *why) {
    fprintf(stderr, "%s: %s: %s\n", peer_name, what, why);
    exit(1);
}

static void peer_check(bool good, const char *what) {
    if (!good) peer_die(what, peer_reason());
}

static void peer_usage(void) __attribute__((noreturn));
static void peer_usage(void) {
    fprintf(stderr, "usage: %s --test rtt|rate|bw --transport ipc|tcp [--size N] [--iters N]\n", peer_name);
    exit(2);
}

static int64_t peer_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int64_t peer_number(const char *text, int64_t most) {
    char *end = NULL;
    long long value = strtoll(text, &end, 10);
    if (end == text || *end || value < 1 || value > most) peer_usage();
    return value;
}

static int peer_free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockname(fd, (struct sockaddr *)&address, &size) != 0) peer_die("socket", "no port is free");
    close(fd);
    return ntohs(address.sin_port);
}

static peer_options peer_parse(int argc, char **argv) {
    peer_options o = {.size = 64, .iters = 10000};
    bool test = false, tcp = false, transport = false;
    for (int i = 1; i + 1 < argc; i += 2) {
        const char *value = argv[i + 1];
        if (strcmp(argv[i], "--test") == 0) {
            o.stream = strcmp(value, "rtt") != 0;
            test = !o.stream || strcmp(value, "rate") == 0 || strcmp(value, "bw") == 0;
        } else if (strcmp(argv[i], "--transport") == 0) {
            tcp = strcmp(value, "tcp") == 0;
            transport = tcp || strcmp(value, "ipc") == 0;
        } else if (strcmp(argv[i], "--size") == 0) o.size = (size_t)peer_number(value, INT64_C(8) << 30);
        else if (strcmp(argv[i], "--iters") == 0) o.iters = peer_number(value, 100000000);
        else peer_usage();
    }
    if (argc % 2 == 0 || !test || !transport) peer_usage();
    o.warmup = o.iters / 10 + 1;
    o.ahead = o.size > 65536 ? 2 : 1000;
    if (tcp) snprintf(o.address, sizeof o.address, "tcp://127.0.0.1:%d", peer_free_port());
    else snprintf(o.address, sizeof o.address, "ipc:///tmp/%s-%d", peer_name, (int)getpid());
    return o;
}

static unsigned char *peer_memory(size_t size) {
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, size) != 0) peer_die("memory", "there is not enough");
    memset(memory, 1, size);
    return (unsigned char *)memory;
}

// The other end. Of a stream it tells how long the measured messages took to come.
static void peer_serve(const peer_options *o, int tell) {
    int64_t begin = 0;
    peer_open(o, true);
    if (write(tell, "", 1) != 1) peer_die("pipe", "the measuring end has gone");
    unsigned char *data = peer_memory(o->size);
    for (int64_t i = 0; i < o->warmup + o->iters; i++) {
        if (i == o->warmup) begin = peer_now_ns();
        peer_receive(o->size);
        if (!o->stream) peer_send(data, o->size);
    }
    int64_t elapsed = peer_now_ns() - begin;
    if (write(tell, &elapsed, sizeof elapsed) != sizeof elapsed) peer_die("pipe", "the measuring end has gone");
    peer_close();
}

static int peer_compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

static void peer_print_round_trips(const peer_options *o, int64_t *durations) {
    qsort(durations, (size_t)o->iters, sizeof *durations, peer_compare);
    printf("{\"size\": %zu, \"iters\": %" PRId64 ", \"p50_us\": %.6g, \"p99_us\": %.6g}\n", o->size, o->iters,
           (double)durations[(o->iters - 1) / 2] / 1000, (double)durations[(o->iters * 99 + 99) / 100 - 1] / 1000);
}

static void peer_measure(const peer_options *o, int told) {
    int64_t elapsed = 0, *durations = (int64_t *)malloc((size_t)o->iters * sizeof *durations);
    unsigned char *data = peer_memory(o->size);
    if (!durations) peer_die("memory", "there is not enough");
    peer_open(o, false);
    for (int64_t i = -o->warmup; i < o->iters; i++) {
        int64_t begin = peer_now_ns();
        peer_send(data, o->size);
        if (!o->stream) peer_receive(o->size);
        if (i >= 0) durations[i] = peer_now_ns() - begin;
    }
    if (read(told, &elapsed, sizeof elapsed) != sizeof elapsed) peer_die("the other end", "it told nothing");
    if (!o->stream) peer_print_round_trips(o, durations);
    else printf("{\"size\": %zu, \"iters\": %" PRId64 ", \"bandwidth_gbps\": %.6g, \"rate_mps\": %.6g}\n", o->size,
                o->iters, (double)o->size * (double)o->iters / (double)elapsed,
                (double)o->iters * 1000 / (double)elapsed);
    peer_close();
    free(durations);
}

int main(int argc, char **argv) {
    peer_options o = peer_parse(argc, argv);
    int tell[2], status = 0;
    char ready;
    if (pipe(tell) != 0) peer_die("pipe", "no descriptor is free");
    pid_t parent = getpid(), child = fork();         // before there is a socket: neither library survives a fork
    if (child < 0) peer_die("fork", "no process is free");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) return 1;           // it ended before prctl
        close(tell[0]);
        peer_serve(&o, tell[1]);
        return 0;
    }
    close(tell[1]);
    if (read(tell[0], &ready, 1) != 1) peer_die("the other end", "it did not begin");
    peer_measure(&o, tell[0]);
    if (waitpid(child, &status, 0) != child || status != 0) peer_die("the other end", "it failed");
    if (strncmp(o.address, "ipc://", 6) == 0) unlink(o.address + 6);
    return 0;
}
