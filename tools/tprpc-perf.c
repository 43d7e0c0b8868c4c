// tprpc-perf: what a message costs. Runs both ends of a measurement (two processes, pinned to two cores) or one of them
// (--listen on one host, --connect on the other), and prints a table or one JSON object.
//
// Contents: options, numbers, the processes, the ends, the tests over a pipe (there and back, one way, frame, pipes),
// those between agents (rpc, loaded), the bare medium (raw: lines, sockets, copies), main. What GPUs need is in
// perf_cuda.h.
//
// Two rules keep the tool out of its own figures: a round trip reads the clock once, while the next message is already
// under way; and memory that takes part was written before the measurement begins.

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1                // sched_setaffinity, which this file itself needs
#endif
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#include "../tprpc_cuda.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { PERF_KIB = 1024, PERF_MIB = 1024 * 1024, PERF_GIB = 1024 * 1024 * 1024 };
enum { PERF_BODY_MAX = 64 * PERF_KIB };      // larger messages travel as a tensor, smaller ones as metadata
enum { PERF_CONTROL_MAX = 256 };             // bytes of a message by which the ends agree on a test
enum { PERF_LIST_MAX = 8 };                  // transports in --transport
enum { PERF_SIZES_MAX = 16 };                // sizes in --size
enum { PERF_TENSORS_MAX = 4096 };            // of a message, by --count

// ---- options ------------------------------------------------------------------------------------------------------

typedef enum perf_test {
    PERF_RTT, PERF_RPC, PERF_RATE, PERF_BW, PERF_PIPES, PERF_FRAME, PERF_RAW, PERF_LOADED, PERF_TESTS
} perf_test;
static const char *const perf_test_names[PERF_TESTS] = {
    "rtt", "rpc", "rate", "bw", "pipes", "frame", "raw", "loaded"
};

typedef enum perf_medium {           // what --transport means to --test raw
    PERF_LINE, PERF_SOCKET, PERF_MEMCPY, PERF_NONTEMPORAL, PERF_READV, PERF_READV2,
    PERF_BARE_PEER, PERF_BARE_ORDERED, PERF_BARE_IDLE, PERF_BARE_PINNED, PERF_BARE_GATHER, PERF_MEDIA
} perf_medium;
static const char *const perf_medium_names[PERF_MEDIA] = {
    "shm", "tcp", "memcpy", "nontemporal", "readv", "readv2",
    "cuda-peer", "cuda-ordered", "cuda-idle", "cuda-pinned", "cuda-gather"
};

typedef enum perf_spin { PERF_SPIN_ALWAYS, PERF_SPIN_ADAPTIVE, PERF_SPIN_NEVER } perf_spin;

typedef enum perf_kind { PERF_HOST, PERF_PINNED, PERF_CUDA } perf_kind;
typedef struct perf_where {          // the memory of an end
    perf_kind   kind;
    int         index;
    const char *name;                // as it was given
} perf_where;

typedef struct perf_options {
    perf_test   test;
    const char *transport, *channel;         // NULL: the library chooses
    const char *listen, *connect;            // NULL both: this process runs the two ends
    const char *trace;                       // NULL: none
    int64_t     size, iters, count, rate, warmup;    // -1 where not given, until perf_fill_in
    int64_t     lanes;                       // 0: the library's default
    perf_spin   spin;
    perf_medium medium;                      // of --test raw
    bool        tensor, json, pin, in_process;
    int         cpus[2];                     // where each end is pinned; -1: nowhere
    perf_where  devices[2];                  // of the end that measures, and of the other one
    bool        idle, lent;                  // --ordered no, --register yes
    int64_t     sizes[PERF_SIZES_MAX], asked_iters;          // size and iters: of the one that is measured now
    int         size_count;
} perf_options;

static const char perf_usage[] =
    "usage: tprpc-perf [options]\n"
    "  --test T         rtt    one message over a pipe and back (default)\n"
    "                   rpc    one call between agents and back\n"
    "                   rate   small messages one way\n"
    "                   bw     tensors one way\n"
    "                   pipes  what a connection costs: to open, idle, and to the one that is busy\n"
    "                   frame  how long a poll with a budget of 1 ms takes while 1 GiB of tensors arrives\n"
    "                   loaded calls of 64 B at a stated rate between agents: alone, and while tensors stream\n"
    "                          the same way; and the stream alone\n"
    "                   raw    the bare medium, which --transport then names: shm (a cache line), tcp (a socket),\n"
    "                          or copies: memcpy, nontemporal, readv, readv2 (process_vm_readv on 1, 2 threads);\n"
    "                          or driver calls between --device and --peer-device: cuda-peer (copies one way),\n"
    "                          cuda-ordered and cuda-idle (there and back, in the streams' order or between streams\n"
    "                          with nothing on them), cuda-pinned (copies by way of the host, the slower half),\n"
    "                          cuda-gather (--count tensors by one kernel)\n"
    "  --transport L    transports allowed, in order of preference: shm,tcp (default: the library's choice)\n"
    "  --channel L      channels allowed, likewise; rtt and rpc then send a tensor\n"
    "  --lanes N        connections over which mpt spreads a large tensor, up to 8, at both ends (default: 1)\n"
    "  --size N         bytes of a message; K, M and G are powers of 1024 (default: 64; bw, frame and copies: 64M;\n"
    "                   loaded's tensors: 256M). Up to 64K they are a message's metadata, beyond that one tensor.\n"
    "                   With GPUs 8 by default, always tensors, and a list such as 8,64K,1M is measured in turn\n"
    "  --iters N        how many are measured (default: as many as take about a second; loaded: 10000 calls)\n"
    "  --count N        pipes: how many (default: 1000). With GPUs: tensors of a message, each of --size (default: 1)\n"
    "  --rate N         loaded: calls a second (default: 10000. Calls 100 us apart do not wait for one another, so\n"
    "                   what is seen is the tensors; and the second that they take has room for some tensors)\n"
    "  --device D       where the memory of the end that measures (and sends first) is: cpu (default), cuda:N, or\n"
    "                   pinned, which is host memory that the driver knows. --peer-device D: of the other end.\n"
    "                   By hand both ends are given both. With rtt, rpc, bw and raw\n"
    "  --ordered yes|no yes (default): there is work on the streams, before and after each message; no: each end\n"
    "                   waits until its stream is idle before it sends\n"
    "  --register yes|no  whether GPU memory is registered, so that the other end may read it straight (default: yes)\n"
    "  --spin S         always, adaptive (the library's default) or never: how a wait begins (default: adaptive)\n"
    "  --in-process     the two ends are threads of one process, for channels such as xth\n"
    "  --listen ADDR    run one end and wait for the other; with --test rpc or loaded when the other end has it\n"
    "  --connect ADDR   run the other end; ADDR as host:port or transport://address. Without authentication: use it\n"
    "                   on a network you trust\n"
    "  --trace PREFIX   rpc and loaded: each end writes a timeline of its last calls to PREFIXserving.json and\n"
    "                   PREFIXmeasuring.json, for tools/merge-traces.py\n"
    "  --no-pin         do not pin the two ends to two cores; with GPUs they never are\n"
    "  --json           one JSON object instead of a table\n";

static void perf_refuse(const char *format, ...) __attribute__((format(printf, 1, 2), noreturn));
static void perf_die(const char *what, const tprpc_error *error) __attribute__((noreturn));

// Bad arguments: one sentence, exit status 2.
static void perf_refuse(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("tprpc-perf: ", stderr);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    exit(2);
}

// Anything that goes wrong later: one sentence, exit status 1. error NULL: errno says why.
static void perf_die(const char *what, const tprpc_error *error) {
    fprintf(stderr, "tprpc-perf: %s: %s\n", what, error ? error->text : strerror(errno));
    exit(1);
}

static void *perf_must(void *pointer) {
    if (!pointer) perf_die("memory", NULL);
    return pointer;
}

static int64_t perf_parse_number(const char *option, const char *text, bool suffix) {
    char *end = NULL;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    long long unit = 1;
    if (suffix && *end == 'K') unit = PERF_KIB;
    if (suffix && *end == 'M') unit = PERF_MIB;
    if (suffix && *end == 'G') unit = PERF_GIB;
    if (unit != 1) end++;
    if (end == text || *end || errno || value < 0 || value > INT64_C(1000000000000) / unit)
        perf_refuse("%s takes a number%s, not \"%s\".", option, suffix ? " such as 64, 4K or 64M" : "", text);
    return value * unit;
}

static perf_where perf_parse_device(const char *option, const char *text) {
    char *end = NULL;
    if (strcmp(text, "cpu") == 0) return (perf_where){PERF_HOST, 0, text};
    if (strcmp(text, "pinned") == 0) return (perf_where){PERF_PINNED, 0, text};
    const long index = strncmp(text, "cuda:", 5) == 0 ? strtol(text + 5, &end, 10) : -1;
    if (index < 0 || index > 63 || end == text + 5 || *end)
        perf_refuse("%s \"%s\" is none of cpu, pinned and cuda:0, cuda:1, ...", option, text);
    return (perf_where){PERF_CUDA, (int)index, text};
}

static bool perf_parse_yes(const char *option, const char *text) {
    if (strcmp(text, "yes") != 0 && strcmp(text, "no") != 0) perf_refuse("%s is yes or no, not \"%s\".", option, text);
    return *text == 'y';
}

// One size, or several with commas between them.
static void perf_parse_sizes(perf_options *o, const char *text) {
    char one[32];
    o->size_count = 0;
    for (const char *at = text;; at++) {
        const size_t length = strcspn(at, ",");
        if (o->size_count == PERF_SIZES_MAX) perf_refuse("--size takes at most %d sizes.", (int)PERF_SIZES_MAX);
        snprintf(one, sizeof one, "%.*s", length < sizeof one ? (int)length : (int)sizeof one, at);
        o->sizes[o->size_count++] = perf_parse_number("--size", one, true);
        at += length;
        if (!*at) break;
    }
    o->size = o->sizes[0];
}

static perf_test perf_parse_test(const char *text) {
    for (int i = 0; i < PERF_TESTS; i++)
        if (strcmp(text, perf_test_names[i]) == 0) return (perf_test)i;
    perf_refuse("--test \"%s\" is none of rtt, rpc, rate, bw, pipes, frame, loaded and raw.", text);
}

static perf_medium perf_parse_medium(const char *text) {
    if (!text) return PERF_LINE;
    for (int i = 0; i < PERF_MEDIA; i++)
        if (strcmp(text, perf_medium_names[i]) == 0) return (perf_medium)i;
    perf_refuse("--test raw knows --transport shm, tcp, memcpy, nontemporal, readv, readv2 and cuda-peer, -ordered, "
                "-idle, -pinned and -gather, not \"%s\".", text);
}

static perf_spin perf_parse_spin(const char *text) {
    static const char *const names[] = {"always", "adaptive", "never"};
    for (int i = 0; i < 3; i++)
        if (strcmp(text, names[i]) == 0) return (perf_spin)i;
    perf_refuse("--spin \"%s\" is none of always, adaptive and never.", text);
}

static void perf_set_option(perf_options *o, const char *name, const char *value) {
    if (strcmp(name, "--test") == 0) o->test = perf_parse_test(value);
    else if (strcmp(name, "--transport") == 0) o->transport = value;
    else if (strcmp(name, "--channel") == 0) o->channel = value;
    else if (strcmp(name, "--size") == 0) perf_parse_sizes(o, value);
    else if (strcmp(name, "--iters") == 0) o->iters = perf_parse_number(name, value, false);
    else if (strcmp(name, "--count") == 0) o->count = perf_parse_number(name, value, false);
    else if (strcmp(name, "--rate") == 0) o->rate = perf_parse_number(name, value, false);
    else if (strcmp(name, "--trace") == 0) o->trace = value;
    else if (strcmp(name, "--lanes") == 0) o->lanes = perf_parse_number(name, value, false);
    else if (strcmp(name, "--spin") == 0) o->spin = perf_parse_spin(value);
    else if (strcmp(name, "--device") == 0) o->devices[0] = perf_parse_device(name, value);
    else if (strcmp(name, "--peer-device") == 0) o->devices[1] = perf_parse_device(name, value);
    else if (strcmp(name, "--ordered") == 0) o->idle = !perf_parse_yes(name, value);
    else if (strcmp(name, "--register") == 0) o->lent = perf_parse_yes(name, value);
    else if (strcmp(name, "--listen") == 0) o->listen = value;
    else if (strcmp(name, "--connect") == 0) o->connect = value;
    else perf_refuse("there is no option %s; --help lists them.", name);
}

static bool perf_bare_cuda(const perf_options *o) { return o->test == PERF_RAW && o->medium >= PERF_BARE_PEER; }
static bool perf_copies(const perf_options *o) {
    return o->test == PERF_RAW && o->medium >= PERF_MEMCPY && o->medium < PERF_BARE_PEER;
}
static bool perf_on_gpu(const perf_options *o) {
    return o->devices[0].kind == PERF_CUDA || o->devices[1].kind == PERF_CUDA;
}
static bool perf_between_agents(const perf_options *o) { return o->test == PERF_RPC || o->test == PERF_LOADED; }

static void perf_check_raw(const perf_options *o) {
    if (o->listen || o->connect) perf_refuse("--test raw measures within one machine: without --listen and --connect.");
    if (o->channel) perf_refuse("--test raw has no channels.");
    if (o->size > 64 && o->medium == PERF_LINE)
        perf_refuse("--test raw over shm passes a cache line: --size is at most 64.");
#ifndef __SSE2__
    if (o->medium == PERF_NONTEMPORAL)
        perf_refuse("--transport nontemporal: this processor has no such stores, or tprpc-perf does not know them.");
#endif
}

static void perf_check_gpus(const perf_options *o) {
    const bool both = o->devices[0].kind == PERF_CUDA && o->devices[1].kind == PERF_CUDA;
    if (perf_bare_cuda(o) && !both && o->medium != PERF_BARE_PINNED)
        perf_refuse("--transport %s needs two GPUs: --device cuda:0 --peer-device cuda:1, or one twice.",
                    perf_medium_names[o->medium]);
    if (!perf_on_gpu(o)) {
        if (o->devices[0].kind == PERF_PINNED || o->devices[1].kind == PERF_PINNED || perf_bare_cuda(o))
            perf_refuse("pinned memory is measured with a GPU at the other end: --device or --peer-device cuda:0.");
        if (o->size_count > 1) perf_refuse("--size is one size where no GPU takes part.");
        return;
    }
    if (o->test != PERF_RTT && o->test != PERF_RPC && o->test != PERF_BW && !perf_bare_cuda(o))
        perf_refuse("--test %s%s%s is about memory of the CPU: without --device and --peer-device.",
                    perf_test_names[o->test], o->test == PERF_RAW ? " --transport " : "",
                    o->test == PERF_RAW ? perf_medium_names[o->medium] : "");
    if (o->test == PERF_RPC && o->size_count > 1) perf_refuse("--test rpc measures one size.");
    if (o->size_count > 1 && (o->listen || o->connect)) perf_refuse("--size is one size between two hosts.");
    for (int i = 0; i < o->size_count; i++)
        if (o->sizes[i] == 0 || o->sizes[i] > INT64_C(8) * PERF_GIB)
            perf_refuse("--size is between 1 and 8G for memory of a GPU.");
    if (o->count > PERF_TENSORS_MAX)
        perf_refuse("--count is at most %d tensors of a message.", (int)PERF_TENSORS_MAX);
}

static void perf_check_numbers(const perf_options *o) {
    bool one_size = o->test == PERF_RAW || o->test == PERF_BW || o->test == PERF_FRAME || o->test == PERF_LOADED;
    if (o->size == 0 && (o->channel || one_size))
        perf_refuse("--size is at least 1 for --test raw, bw, frame and loaded, and with --channel.");
    if (o->test == PERF_RATE && o->size > PERF_BODY_MAX)
        perf_refuse("--test rate is for messages of at most 64K; --test bw sends larger ones.");
    if (o->size > INT64_C(8) * PERF_GIB) perf_refuse("--size is at most 8G.");
    if (o->iters == 0) perf_refuse("--iters is at least 1.");
    if (o->iters > 100000000) perf_refuse("--iters is at most 100000000.");
    if (o->count == 0 || o->count > 1000000) perf_refuse("--count is between 1 and 1000000.");
    if (o->count > 0 && o->test != PERF_PIPES && !perf_on_gpu(o))
        perf_refuse("--count is for --test pipes; others take --iters.");
    if (o->iters > 0 && o->test == PERF_PIPES) perf_refuse("--iters is not for --test pipes, which takes --count.");
    if (o->rate == 0 || o->rate > 1000000) perf_refuse("--rate is between 1 and 1000000 calls a second.");
    if (o->rate > 0 && o->test != PERF_LOADED) perf_refuse("--rate is for --test loaded.");
}

// Refuses what cannot be measured, before anything is started.
static void perf_check(const perf_options *o) {
    if (o->listen && o->connect) perf_refuse("--listen and --connect are two ends: give one of them.");
    if (o->in_process && (o->listen || o->connect))
        perf_refuse("--in-process runs both ends: without --%s.", o->listen ? "listen" : "connect");
    const bool two = o->test == PERF_RAW && o->medium != PERF_BARE_PEER && o->medium != PERF_BARE_PINNED;
    if (o->in_process && (two || o->test == PERF_PIPES || o->test == PERF_LOADED))
        perf_refuse("--test %s is about two processes: without --in-process.", perf_test_names[o->test]);
    if (o->test == PERF_RATE && o->channel) perf_refuse("--test rate sends no tensors, so --channel says nothing.");
    if (o->trace && !perf_between_agents(o)) perf_refuse("--trace is for --test rpc and loaded, which make calls.");
    if (o->test == PERF_RAW) perf_check_raw(o);
    perf_check_gpus(o);
    perf_check_numbers(o);
}

// With GPUs: what takes a tenth of a second or so, or 4 GiB; one way between GPUs 32 GiB. Of 4 GiB, which take 2 ms
// within a GPU, a twentieth was the time in which the end that measures wakes up to be told that all is there.
static int64_t perf_default_iters_gpu(const perf_options *o) {
    const bool one_way = o->test == PERF_BW || o->medium == PERF_BARE_PEER || o->medium == PERF_BARE_PINNED;
    const bool host = o->devices[0].kind != PERF_CUDA || o->devices[1].kind != PERF_CUDA;
    const int64_t all = (one_way && !host ? INT64_C(32) : INT64_C(4)) * PERF_GIB;
    const int64_t fits = all / (o->size * o->count), most = one_way ? 4000 : 2000;
    return fits > most ? most : fits < 8 ? 8 : fits;
}

// The default number of iterations: about a second's worth at speeds of this decade.
static int64_t perf_default_iters(const perf_options *o) {
    if (perf_on_gpu(o)) return perf_default_iters_gpu(o);
    bool raw_stream = perf_copies(o) || (o->test == PERF_RAW && o->size >= PERF_MIB);
    if (o->test == PERF_LOADED) return 10000;
    if (o->test == PERF_RATE) return 5000000;
    if (o->test == PERF_FRAME) return (PERF_GIB + o->size - 1) / o->size;
    if (o->test == PERF_BW || raw_stream) {
        int64_t fits = INT64_C(4) * PERF_GIB / o->size;
        return fits > 200000 ? 200000 : fits < 8 ? 8 : fits;
    }
    if (o->size > PERF_BODY_MAX) return INT64_C(2) * PERF_GIB / o->size + 8;
    if (o->spin == PERF_SPIN_NEVER) return 20000;
    return o->transport && strcmp(o->transport, "tcp") == 0 ? 100000 : 500000;
}

static void perf_choose_cpus(perf_options *o);
static void perf_gpu_look(const perf_options *o);

static void perf_fill_in(perf_options *o) {
    bool bulk = o->test == PERF_BW || o->test == PERF_FRAME || o->test == PERF_LOADED;
    const bool one_way = bulk || perf_copies(o) || (perf_bare_cuda(o) && o->medium != PERF_BARE_ORDERED &&
                                                    o->medium != PERF_BARE_IDLE);
    if (o->size < 0 && o->test == PERF_LOADED) o->size = 256 * PERF_MIB;
    if (o->size < 0) o->size = one_way ? 64 * PERF_MIB : perf_on_gpu(o) ? 8 : 64;
    if (o->size_count == 0) o->size_count = 1;
    if (o->count < 0) o->count = perf_on_gpu(o) ? 1 : 1000;
    if (o->rate < 0) o->rate = 10000;
    if (o->iters < 0) o->iters = perf_default_iters(o);
    o->tensor = bulk || perf_on_gpu(o) || o->size > PERF_BODY_MAX ||
                (o->channel && (o->test == PERF_RTT || o->test == PERF_RPC));
    o->warmup = o->iters / 10 < 4 ? 4 : o->iters / 10 > 20000 ? 20000 : o->iters / 10;
    if (o->tensor && o->test != PERF_LOADED && o->warmup * o->size > PERF_GIB)      // loaded warms up by small calls
        o->warmup = o->size > PERF_GIB ? 1 : PERF_GIB / o->size;
}

// The options for one of the sizes.
static perf_options perf_of_size(const perf_options *o, int i) {
    perf_options one = *o;
    if (o->size_count > 1) one.size = o->sizes[i];
    one.iters = o->asked_iters;
    perf_fill_in(&one);
    return one;
}

static perf_options perf_parse(int argc, char **argv) {
    perf_options o = {.size = -1, .iters = -1, .count = -1, .rate = -1, .spin = PERF_SPIN_ADAPTIVE,
                      .pin = true, .devices = {{.name = "cpu"}, {.name = "cpu"}}, .lent = true};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0) {
            fputs(perf_usage, stdout);
            exit(0);
        }
        if (strcmp(argv[i], "--json") == 0) o.json = true;
        else if (strcmp(argv[i], "--no-pin") == 0) o.pin = false;
        else if (strcmp(argv[i], "--in-process") == 0) o.in_process = true;
        else if (strncmp(argv[i], "--", 2) != 0) perf_refuse("\"%s\" is not an option; --help lists them.", argv[i]);
        else if (i + 1 == argc) perf_refuse("%s needs a value, or is no option; --help lists them.", argv[i]);
        else perf_set_option(&o, argv[i], argv[i + 1]), i++;
    }
    if (o.test == PERF_RAW) o.medium = perf_parse_medium(o.transport);
    perf_check(&o);
    o.asked_iters = o.iters;
    perf_fill_in(&o);
    perf_choose_cpus(&o);
    return o;
}

// ---- numbers ------------------------------------------------------------------------------------------------------

typedef struct perf_result {         // NAN: makes no sense for this test
    char   transport[16], channel[16];
    double min_us, p50_us, p99_us, p999_us, mean_us, bandwidth_gbps, rate_mps, cpu_s;
    double count, bytes_per_pipe, fds_per_pipe, connect_us, hot_us, alone_us, cold_us;     // of pipes
    double idle_p50_us, idle_p99_us, unloaded_gbps, late;                                  // of loaded
    double chunk;                                                                          // of copies, in bytes
    double cpu_us[2];                // with GPUs: of each end for a message that it sent or took
    int64_t iters;
} perf_result;

static perf_result perf_result_empty(void) {
    return (perf_result){.min_us = NAN, .p50_us = NAN, .p99_us = NAN, .p999_us = NAN, .mean_us = NAN,
                         .bandwidth_gbps = NAN, .rate_mps = NAN, .cpu_s = NAN, .count = NAN, .bytes_per_pipe = NAN,
                         .fds_per_pipe = NAN, .connect_us = NAN, .hot_us = NAN, .alone_us = NAN, .cold_us = NAN,
                         .idle_p50_us = NAN, .idle_p99_us = NAN, .unloaded_gbps = NAN, .late = NAN, .chunk = NAN,
                         .cpu_us = {NAN, NAN}};
}

static int64_t perf_now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static int perf_compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

// Nearest rank: of 400 samples the 99.9th percentile is the largest.
static double perf_percentile_us(const int64_t *sorted, int64_t count, int64_t per_mille) {
    return (double)sorted[(count * per_mille + 999) / 1000 - 1] / 1000;
}

// Sorts the samples, which are durations in nanoseconds.
static void perf_distribution(perf_result *r, int64_t *samples, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)samples[i];
    qsort(samples, (size_t)count, sizeof *samples, perf_compare);
    r->min_us = (double)samples[0] / 1000;
    r->p50_us = perf_percentile_us(samples, count, 500);
    r->p99_us = perf_percentile_us(samples, count, 990);
    r->p999_us = perf_percentile_us(samples, count, 999);
    r->mean_us = sum / (double)count / 1000;
    r->iters = count;
}

static void perf_throughput(perf_result *r, int64_t elapsed_ns, int64_t count, int64_t size) {
    r->mean_us = (double)elapsed_ns / 1000 / (double)count;
    r->bandwidth_gbps = (double)size * (double)count / (double)elapsed_ns;
    r->rate_mps = (double)count * 1000 / (double)elapsed_ns;
    r->iters = count;
}

// count + 1 clock readings become count durations.
static void perf_differences(int64_t *stamps, int64_t count) {
    for (int64_t i = 0; i < count; i++) stamps[i] = stamps[i + 1] - stamps[i];
}

static void perf_json_string(const char *key, const char *value) {
    if (value && *value) printf("\"%s\": \"%s\", ", key, value);
    else printf("\"%s\": null, ", key);
}

static void perf_json_number(const char *key, double value) {
    if (isnan(value)) printf(", \"%s\": null", key);
    else printf(", \"%s\": %.6g", key, value);
}

static void perf_print_json(const perf_options *o, const perf_result *r) {
    putchar('{');
    perf_json_string("test", perf_test_names[o->test]);
    perf_json_string("transport", r->transport);
    perf_json_string("channel", r->channel);
    perf_json_string("device", o->devices[0].name);
    perf_json_string("peer_device", o->devices[1].name);
    if (o->test == PERF_PIPES) printf("\"size\": null, \"iters\": null");
    else printf("\"size\": %" PRId64 ", \"iters\": %" PRId64, o->size, r->iters);
    perf_json_number("min_us", r->min_us);
    perf_json_number("p50_us", r->p50_us);
    perf_json_number("p99_us", r->p99_us);
    perf_json_number("p999_us", r->p999_us);
    perf_json_number("mean_us", r->mean_us);
    perf_json_number("bandwidth_gbps", r->bandwidth_gbps);
    perf_json_number("rate_mps", r->rate_mps);
    perf_json_number("cpu_s", r->cpu_s);
    if (o->test == PERF_PIPES) {
        perf_json_number("count", r->count);
        perf_json_number("bytes_per_pipe", r->bytes_per_pipe);
        perf_json_number("fds_per_pipe", r->fds_per_pipe);
        perf_json_number("connect_us", r->connect_us);
        perf_json_number("hot_us", r->hot_us);
        perf_json_number("alone_us", r->alone_us);
        perf_json_number("cold_us", r->cold_us);
    } else if (o->test == PERF_LOADED) {
        perf_json_number("idle_p50_us", r->idle_p50_us);
        perf_json_number("idle_p99_us", r->idle_p99_us);
        perf_json_number("unloaded_gbps", r->unloaded_gbps);
        perf_json_number("late", r->late);
    } else if (perf_copies(o)) perf_json_number("chunk", r->chunk);
    else if (perf_on_gpu(o)) {
        perf_json_number("count", (double)o->count);
        printf(", \"ordered\": %s, \"registered\": %s", o->idle ? "false" : "true", o->lent ? "true" : "false");
        perf_json_number("cpu_us", r->cpu_us[0]);
        perf_json_number("peer_cpu_us", r->cpu_us[1]);
    }
    puts("}");
    fflush(stdout);                  // one of several: the next ones may fail
}

static void perf_row(const char *name, double value, const char *unit) {
    if (!isnan(value)) printf("  %-22s %12.3f %s\n", name, value, unit);
}

static void perf_print_table(const perf_options *o, const perf_result *r) {
    printf("%s over %s%s%s", perf_test_names[o->test], *r->transport ? r->transport : "?",
           *r->channel ? ", channel " : "", r->channel);
    if (o->test == PERF_PIPES) printf(", %.0f pipes\n", r->count);
    else if (o->test == PERF_FRAME) printf(", %" PRId64 " B tensors, %" PRId64 " polls\n", o->size, r->iters);
    else if (o->test == PERF_LOADED)
        printf(", %" PRId64 " B tensors, %" PRId64 " calls of 64 B, %" PRId64 " a second\n", o->size, r->iters,
               o->rate);
    else if (perf_on_gpu(o))
        printf(", %s %s %s, %" PRId64 " x %" PRId64 " B, %" PRId64 " times\n", o->devices[0].name,
               o->test == PERF_BW || o->test == PERF_RAW ? "to" : "and", o->devices[1].name, o->count, o->size,
               r->iters);
    else printf(", %" PRId64 " B, %" PRId64 " times\n", o->size, r->iters);
    perf_row("min", r->min_us, "us");
    perf_row("p50", r->p50_us, "us");
    perf_row("p99", r->p99_us, "us");
    perf_row("p99.9", r->p999_us, "us");
    perf_row("mean", r->mean_us, "us");
    perf_row("bandwidth", r->bandwidth_gbps, "GB/s (10^9)");
    perf_row("rate", r->rate_mps * 1e6, "per second");
    perf_row("memory of a pipe (Pss)", r->bytes_per_pipe, "bytes");
    perf_row("descriptors of a pipe", r->fds_per_pipe, "");
    perf_row("connect", r->connect_us, "us");
    perf_row("64 B there and back", r->hot_us, "us, all other pipes idle");
    perf_row("before there were any", r->alone_us, "us");
    perf_row("first on a cold pipe", r->cold_us, "us");
    perf_row("calls alone, p50", r->idle_p50_us, "us");
    perf_row("calls alone, p99", r->idle_p99_us, "us");
    perf_row("calls issued late", r->late, "(by more than the time between two)");
    perf_row("the stream alone", r->unloaded_gbps, "GB/s (10^9)");
    perf_row("in chunks of", r->chunk, "bytes");
    perf_row("CPU time", r->cpu_s, "s");
    if (perf_on_gpu(o)) perf_row("of this end, a message", r->cpu_us[0], "us");
    if (perf_on_gpu(o)) perf_row("of the other end", r->cpu_us[1], "us");
}

static void perf_print(const perf_options *o, const perf_result *r) {
    if (o->json) perf_print_json(o, r);
    else perf_print_table(o, r);
}

// ---- the processes ------------------------------------------------------------------------------------------------

static int perf_topology(size_t cpu, const char *name) {
    char path[96];
    int value = (int)cpu;            // nothing known: every CPU counts as a core
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%zu/topology/%s", cpu, name);
    FILE *file = fopen(path, "r");
    if (!file) return value;
    if (fscanf(file, "%d", &value) != 1) value = (int)cpu;
    fclose(file);
    return value;
}

static bool perf_same_core(size_t a, size_t b) {
    return perf_topology(a, "core_id") == perf_topology(b, "core_id") &&
           perf_topology(a, "physical_package_id") == perf_topology(b, "physical_package_id");
}

// Chosen before anybody is pinned: the first CPU that this process may use, and the first one of another core, since
// two threads of one core would measure what a core shares.
static void perf_choose_cpus(perf_options *o) {
    cpu_set_t allowed;
    size_t cpu = 0, first, second;
    o->cpus[0] = o->cpus[1] = -1;
    if (perf_on_gpu(o)) return;      // the driver's own threads would be pinned with the one that starts them
    if (!o->pin || sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
    while (!CPU_ISSET(cpu, &allowed)) cpu++;
    first = cpu++;
    while (!CPU_ISSET(cpu, &allowed)) cpu++;
    second = cpu;
    while (cpu < CPU_SETSIZE && (!CPU_ISSET(cpu, &allowed) || perf_same_core(first, cpu))) cpu++;
    if (cpu < CPU_SETSIZE) second = cpu;             // otherwise there is one core, and its threads must do
    o->cpus[0] = (int)first;
    o->cpus[1] = (int)second;
}

// Pins this thread to the CPU of an end.
static void perf_pin(const perf_options *o, int end) {
    cpu_set_t one;
    if (o->cpus[end] < 0) return;
    CPU_ZERO(&one);
    CPU_SET((size_t)o->cpus[end], &one);
    sched_setaffinity(0, sizeof one, &one);          // where that is forbidden, the machine is measured as it is
}

// Every pipe takes descriptors, and --count may ask for many: all that this user may have.
static void perf_raise_descriptors(const perf_options *o) {
    enum { EACH = 2, OTHERS = 64 };  // descriptors of a pipe at most, and of everything else
    struct rlimit limit = {0, 0}, root = {1048576, 1048576};
    if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    if (limit.rlim_max < root.rlim_max && setrlimit(RLIMIT_NOFILE, &root) == 0) limit = root;
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if (o->test != PERF_PIPES || getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
    if (limit.rlim_cur < (rlim_t)(EACH * o->count + OTHERS))
        fprintf(stderr, "tprpc-perf: this user may open %llu descriptors, which may be too few for --count %" PRId64
                        ": the hard limit (ulimit -Hn) is raised by root.\n", (unsigned long long)limit.rlim_cur,
                o->count);
}

// CPU time of this process and of the other end (0: it runs elsewhere).
static double perf_cpu_s(pid_t other) {
    struct timespec mine = {0, 0}, theirs = {0, 0};
    clockid_t clock;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &mine);
    if (other > 0 && clock_getcpuclockid(other, &clock) == 0) clock_gettime(clock, &theirs);
    return (double)(mine.tv_sec + theirs.tv_sec) + (double)(mine.tv_nsec + theirs.tv_nsec) / 1e9;
}

// What each end spent for a message; begin: the same at the beginning. Of ends in one process nothing is known.
static void perf_cpu_sides(double out[2], pid_t other) {
    out[0] = perf_cpu_s(0);
    out[1] = perf_cpu_s(other) - out[0];
}

static void perf_cpu_of(perf_result *r, const double begin[2], pid_t other, int64_t messages) {
    double now[2];
    perf_cpu_sides(now, other);
    for (int i = 0; i < 2; i++)
        if (other > 0) r->cpu_us[i] = (now[i] - begin[i]) * 1e6 / (double)messages;
    r->cpu_s = now[0] + now[1] - begin[0] - begin[1];
}

typedef void (*perf_body)(const perf_options *o, void *user);

typedef struct perf_other {          // the end that another process, or (--in-process) another thread, runs
    const perf_options *o;
    perf_body body;
    void     *user;
    pid_t     pid;                   // 0: a thread, whose CPU time is this process's
    pthread_t thread;
} perf_other;

static void *perf_other_thread(void *argument) {
    perf_other *other = (perf_other *)argument;
    perf_pin(other->o, 1);
    other->body(other->o, other->user);
    return NULL;
}

// Starts the other end, which runs `body` and ends with this process.
static void perf_start(perf_other *other, const perf_options *o, perf_body body, void *user) {
    pid_t parent = getpid();
    *other = (perf_other){.o = o, .body = body, .user = user};
    if (o->in_process) {
        errno = pthread_create(&other->thread, NULL, perf_other_thread, other);
        if (errno) perf_die("pthread_create", NULL);
    } else other->pid = fork();
    if (other->pid < 0) perf_die("fork", NULL);
    if (other->pid == 0 && !o->in_process) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);           // it ended before prctl
        perf_pin(o, 1);
        body(o, user);
        exit(0);
    }
    perf_pin(o, 0);
}

static void perf_join(const perf_other *other) {
    int status = 0;
    if (other->o->in_process) {
        pthread_join(other->thread, NULL);
        return;
    }
    if (waitpid(other->pid, &status, 0) != other->pid) perf_die("waitpid", NULL);
    if (status != 0) {
        fprintf(stderr, "tprpc-perf: the other end failed (wait status %d).\n", status);
        exit(1);
    }
}

// Memory whose pages exist. Freed by the end of the process.
static void *perf_memory(size_t size) {
    void *memory = NULL;
    if (posix_memalign(&memory, 4096, size ? size : 1) != 0) memory = NULL;
    perf_must(memory);
    memset(memory, 0, size);
    return memory;
}

#include "perf_cuda.h"

// ---- the ends -----------------------------------------------------------------------------------------------------

typedef struct perf_end perf_end;

typedef struct perf_slot {           // memory for one message's tensors on their way in
    perf_end      *end;
    unsigned char *data;
    tprpc_tensor  *places;           // in it
    bool           busy;
} perf_slot;

struct perf_end {                    // one end of a measurement over a pipe
    const perf_options *o;
    tprpc_context  *ctx;
    tprpc_pipe     *pipe;
    bool            serving;         // the end that answers; the other one measures
    bool            agreed, over;    // over: the measuring end has left, as it should
    bool            closing;         // this end leaves: reads that end now are no failure
    pid_t           other;           // the serving end when it is a child of this process; 0

    perf_gpu        gpu;
    tprpc_message   message;         // what this end sends, again and again
    tprpc_tensor   *tensors;         // its own, all in one piece of memory
    int64_t         flying;          // tensors, or groups of messages, that the library still holds

    void          (*on_message)(perf_end *end);   // a message of the test has arrived
    int64_t         at, total;       // messages of this phase: done, and to do
    int64_t        *stamps;          // clock readings of this phase
    perf_slot       slots[2];        // tensors arrive in these, two at a time
    bool            describing;      // a read of a descriptor is pending
    bool            check_all;       // every byte of a tensor, not a sample
    perf_slot      *landed[2];       // with GPUs: what a callback was told of, for after the poll
    int             landed_count;
    int64_t         landings;        // messages that have

    char            control[PERF_CONTROL_MAX];   // the last control message
    bool            control_here;
};

static tprpc_context *perf_context(const perf_options *o) {
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_context *ctx = NULL;
    tprpc_context_desc desc = {.transports = o->transport, .channels = o->channel};
    if (o->spin == PERF_SPIN_ALWAYS) desc.spin_us = 10 * 1000000;
    if (o->spin == PERF_SPIN_NEVER) desc.spin_us = TPRPC_NOW;
    desc.lanes = o->lanes > 8 ? 9 : (int32_t)o->lanes;                      // 9 is refused with a sentence
    if (o->count > 16000) desc.limits.pipes = (uint32_t)o->count + 1000;
    if (perf_on_gpu(o)) desc.backends = tprpc_cuda_backends(&desc.backend_count);
    tprpc_status status = tprpc_context_create(&desc, &ctx, &error);
    if (status == TPRPC_ERROR_INVALID) perf_refuse("%s", error.text);       // an unknown --transport or --channel
    if (status != TPRPC_OK) perf_die("context", &error);
    return ctx;
}

static void perf_die_status(const char *what, tprpc_status status) {
    tprpc_error error = {.status = status};
    snprintf(error.text, sizeof error.text, "%s", tprpc_status_name(status));
    perf_die(what, &error);
}

static void perf_landed(perf_end *end, perf_slot *slot);

// One wait for anything. False: the other end has left, there is nothing to wait for.
static bool perf_turn(perf_end *end) {
    if (!end->over && end->landed_count == 0) tprpc_poll(end->ctx, TPRPC_FOREVER, 0);
    while (end->landed_count) {
        perf_slot *slot = end->landed[0];
        end->landed[0] = end->landed[1];
        end->landed_count--;
        perf_landed(end, slot);
    }
    return !end->over;
}

// Until all that is queued on this end's stream has happened; the library goes on meanwhile.
static void perf_settle(perf_end *end) {
    const int64_t wait_us = end->o->spin == PERF_SPIN_NEVER ? 100 : TPRPC_NOW;
    while (!perf_gpu_settled(&end->gpu)) tprpc_poll(end->ctx, wait_us, 0);
}

static void perf_turn_for_us(perf_end *end, int64_t us) {
    for (int64_t until = perf_now_ns() + us * 1000, now = 0; (now = perf_now_ns()) < until && !end->over;)
        tprpc_poll(end->ctx, (until - now) / 1000 + 1, 0);
}

// For a read's callback: whether there is nothing more to do. The measuring end leaves when it has finished, and the
// serving end learns of it by PEER.
static bool perf_ended(perf_end *end, tprpc_status status, const tprpc_error *error) {
    if (status == TPRPC_OK) return false;
    if (end->closing) return true;
    if (!end->serving || !end->agreed || status != TPRPC_ERROR_PEER) perf_die("read", error);
    end->over = true;
    return true;
}

static void perf_no_channel(const perf_options *o) __attribute__((noreturn));
static void perf_no_channel(const perf_options *o) {
    perf_refuse("--channel %s: none of it moves memory between these two ends%s.", o->channel,
                o->in_process ? "" : ", which are two processes (--in-process makes them threads)");
}

static void perf_write(perf_end *end, const tprpc_message *message, tprpc_written done) {
    tprpc_status status = tprpc_pipe_write(end->pipe, message, done, end);
    if (status == TPRPC_OK || (status == TPRPC_ERROR_PEER && end->serving && end->agreed)) return;
    if (status == TPRPC_ERROR_UNSUPPORTED && end->o->channel) perf_no_channel(end->o);
    perf_die_status("write", status);
}

static void perf_read(perf_end *end, tprpc_read done) {
    tprpc_status status = tprpc_pipe_read(end->pipe, NULL, done, end);
    if (status == TPRPC_OK || (status == TPRPC_ERROR_PEER && end->serving && end->agreed)) return;
    perf_die_status("read", status);
}

// Control messages: short texts between the phases of a test.

static void perf_on_control(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    perf_end *end = (perf_end *)user;
    if (perf_ended(end, status, error)) return;
    size_t room = sizeof end->control - 1, size = message->metadata_size < room ? message->metadata_size : room;
    if (size) memcpy(end->control, message->metadata, size);
    end->control[size] = 0;
    end->control_here = true;
}

static void perf_control_send(perf_end *end, const char *text) {
    tprpc_message message = {.metadata = text, .metadata_size = strlen(text)};
    perf_write(end, &message, NULL);
}

static void perf_control_expect(perf_end *end) {
    end->control_here = false;
    perf_read(end, perf_on_control);
}

// The text that perf_control_expect asked for; NULL: the other end has left.
static const char *perf_control_wait(perf_end *end) {
    while (!end->control_here && perf_turn(end)) {}
    return end->control_here ? end->control : NULL;
}

// The measuring end says what it is about to do.
static void perf_agree(perf_end *end) {
    const perf_options *o = end->o;
    char text[PERF_CONTROL_MAX];
    snprintf(text, sizeof text, "tprpc-perf 2 %d %" PRId64 " %" PRId64 " %" PRId64 " %" PRId64 " %d", (int)o->test,
             o->size, o->iters, o->warmup, o->count, (int)o->tensor);
    perf_control_expect(end);
    perf_control_send(end, text);
    if (strcmp(perf_control_wait(end), "ready") != 0) perf_refuse("the other end says: %s", end->control);
    end->agreed = true;
}

// The serving end takes it over, as far as an honest tprpc-perf can have sent it: it may come from a network.
static void perf_be_told(perf_end *end, perf_options *o) {
    int test = -1, tensor = -1;
    const int64_t places = o->count; // with GPUs: what this end was told to have
    perf_control_expect(end);
    const char *text = perf_control_wait(end);
    int fields = sscanf(text, "tprpc-perf 2 %d %" SCNd64 " %" SCNd64 " %" SCNd64 " %" SCNd64 " %d", &test, &o->size,
                        &o->iters, &o->warmup, &o->count, &tensor);
    if (fields != 6 || test < 0 || test >= PERF_RAW || test == PERF_RPC || o->size < 0 ||
        o->size > INT64_C(8) * PERF_GIB || o->iters < 1 || o->warmup < 1 || o->count < 1 || o->count > 1000000 ||
        (tensor ? o->size == 0 : o->size > PERF_BODY_MAX) || (end->gpu.used && (o->count != places || !tensor))) {
        perf_control_send(end, "it does not know this test: another version, or --test rpc at one end alone");
        perf_turn_for_us(end, 100000);
        perf_refuse("the other end asked for a test that this one does not know.");
    }
    o->test = (perf_test)test;
    o->tensor = tensor != 0;
    end->agreed = true;
}

// Messages of a test. A pattern without zeros, so that memory that was cleared before shows what has arrived.

static unsigned char perf_pattern_sum(size_t at) { return (unsigned char)(at * 131 + (at >> 12) * 7 + (at >> 20)); }
static unsigned char perf_pattern(size_t at) { return perf_pattern_sum(at) | 1; }

enum { PERF_ROW = 256 };             // within a row the pattern steps by 131, which compilers turn into vectors

static void perf_pattern_row(unsigned char to[PERF_ROW], size_t row) {
    const unsigned char first = perf_pattern_sum(row * PERF_ROW);
    for (int i = 0; i < PERF_ROW; i++) to[i] = (unsigned char)((unsigned char)(first + (unsigned char)(i * 131)) | 1);
}

// Memory that holds the pattern, and at least a row of it.
static unsigned char *perf_pattern_memory(size_t size) {
    size_t rows = size / PERF_ROW + 1;
    unsigned char *data = (unsigned char *)perf_memory(rows * PERF_ROW);
    for (size_t row = 0; row < rows; row++) perf_pattern_row(data + row * PERF_ROW, row);
    return data;
}

// Whether all bytes are the pattern's; clears them.
static bool perf_whole(unsigned char *data, size_t size) {
    unsigned char wanted[PERF_ROW];
    bool good = true;
    for (size_t at = 0; at < size; at += PERF_ROW) {
        perf_pattern_row(wanted, at / PERF_ROW);
        good = good && memcmp(data + at, wanted, size - at < PERF_ROW ? size - at : PERF_ROW) == 0;
    }
    memset(data, 0, size);
    return good;
}

// Whether a byte in each MiB, and the last, are the pattern's; clears what it looked at.
static bool perf_sample(unsigned char *data, size_t size) {
    bool good = data[size - 1] == perf_pattern(size - 1);
    data[size - 1] = 0;
    for (size_t i = 0; i + 1 < size; i += PERF_MIB) {
        good = good && data[i] == perf_pattern(i);
        data[i] = 0;
    }
    return good;
}

static void perf_released(void *user) {
    ((perf_end *)user)->flying--;
}

static tprpc_device perf_device_of(const perf_where *where) {
    const bool gpu = where->kind == PERF_CUDA;
    return (tprpc_device){gpu ? TPRPC_CUDA : TPRPC_CPU, gpu ? where->index : 0};
}

// A message's tensors, one behind the other. target: where the other end has its own; NULL: they are received.
static void perf_lay_out(const perf_options *o, const perf_gpu *gpu, tprpc_tensor *tensors, unsigned char *data,
                         const perf_where *target) {
    for (int64_t i = 0; i < o->count; i++)
        tensors[i] = (tprpc_tensor){.data = data + i * o->size, .size = (size_t)o->size,
                                    .device = perf_device_of(&gpu->where),
                                    .stream = perf_gpu_is_device(gpu) ? gpu->stream : NULL,
                                    .target = perf_device_of(target ? target : &gpu->where)};
}

static size_t perf_message_size(const perf_options *o) { return (size_t)o->size * (size_t)o->count; }

static void perf_lend(const perf_options *o, tprpc_context *ctx, const perf_gpu *gpu, unsigned char *data) {
    tprpc_error error = {.status = TPRPC_OK};
    if (!perf_gpu_is_device(gpu) || !o->lent) return;
    tprpc_status status = tprpc_cuda_register(ctx, gpu->where.index, data, perf_message_size(o), &error);
    if (status != TPRPC_OK && status != TPRPC_ERROR_UNSUPPORTED) perf_die("register", &error);
}

// A slot, whose places are written once: who has such memory of his own has them ready, too.
static void perf_slot_make(perf_end *end, perf_slot *slot, unsigned char *data) {
    *slot = (perf_slot){.end = end, .data = data};
    slot->places = (tprpc_tensor *)perf_memory((size_t)end->o->count * sizeof *slot->places);
    slot->places[0] = (tprpc_tensor){.data = data, .size = (size_t)end->o->size, .device = {TPRPC_CPU, 0}};
}

// The same with GPUs. Each end's bytes are other ones: seeds 1 and 2.
static void perf_prepare_gpu(perf_end *end) {
    const perf_options *o = end->o;
    const size_t size = perf_message_size(o);
    const bool sends = o->test == PERF_RTT || !end->serving, takes = o->test == PERF_RTT || end->serving;
    unsigned char *data = sends ? perf_gpu_memory(&end->gpu, size) : NULL;
    if (sends) {
        perf_gpu_fill(&end->gpu, data, size, end->serving ? 2 : 1);
        perf_lend(o, end->ctx, &end->gpu, data);
        perf_lay_out(o, &end->gpu, end->tensors, data, &o->devices[!end->serving]);
    }
    end->message = (tprpc_message){.tensors = end->tensors, .tensor_count = (size_t)o->count, .release = perf_released,
                                   .release_user = end};
    for (int i = 0; i < 2 && takes; i++) {
        perf_slot_make(end, &end->slots[i], perf_gpu_memory(&end->gpu, size));
        perf_lay_out(o, &end->gpu, end->slots[i].places, end->slots[i].data, NULL);
    }
}

// What this end sends: a body, which the library copies, or a tensor, which is lent, any number of times at once.
static void perf_prepare(perf_end *end) {
    size_t size = (size_t)end->o->size;
    end->tensors = (tprpc_tensor *)perf_memory((size_t)end->o->count * sizeof *end->tensors);
    if (end->gpu.used) {
        perf_prepare_gpu(end);
        return;
    }
    const perf_test test = end->o->test;
    bool sends = test == PERF_RTT || test == PERF_PIPES || end->serving == (test == PERF_FRAME);
    bool takes = test == PERF_RTT || !sends;
    unsigned char *data = sends || !end->o->tensor ? perf_pattern_memory(size) : NULL;
    end->message = (tprpc_message){.metadata = data, .metadata_size = size};
    if (!end->o->tensor) return;
    end->tensors[0] = (tprpc_tensor){.data = data, .size = size, .device = {TPRPC_CPU, 0}};
    end->message = (tprpc_message){.tensors = end->tensors, .tensor_count = 1, .release = perf_released,
                                   .release_user = end};
    for (int i = 0; i < 2 && takes; i++) perf_slot_make(end, &end->slots[i], (unsigned char *)perf_memory(size));
}

static void perf_send(perf_end *end) {
    if (end->o->tensor) end->flying++;
    if (end->gpu.used && !end->o->idle && end->o->test == PERF_RTT) perf_gpu_work(&end->gpu);
    perf_write(end, &end->message, NULL);
}

static void perf_on_body(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    perf_end *end = (perf_end *)user;
    if (perf_ended(end, status, error)) return;
    if (message->metadata_size != end->message.metadata_size) {
        errno = EBADMSG;
        perf_die("a message arrived with another size", NULL);
    }
    end->on_message(end);
    perf_read(end, perf_on_body);
}

// Compares what arrived, all of it or a byte in each MiB, and clears what it compared.
static void perf_check_arrival(perf_end *end, unsigned char *data) {
    size_t size = (size_t)end->o->size;
    bool good = end->check_all ? perf_whole(data, size) : perf_sample(data, size);
    errno = EBADMSG;
    if (!good) perf_die("a tensor arrived with other bytes", NULL);
}

static void perf_tensor_expect(perf_end *end);

static void perf_on_tensor(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    perf_slot *slot = (perf_slot *)user;
    perf_end *end = slot->end;
    (void)message;
    if (perf_ended(end, status, error)) return;
    if (end->gpu.used) {
        end->landed[end->landed_count++] = slot;
        return;
    }
    perf_check_arrival(end, slot->data);
    slot->busy = false;
    end->on_message(end);
    perf_tensor_expect(end);
}

static void perf_on_described(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    perf_end *end = (perf_end *)user;
    if (perf_ended(end, status, error)) return;
    perf_slot *slot = end->slots[0].busy ? &end->slots[1] : &end->slots[0];
    tprpc_message allocation = {.tensors = slot->places, .tensor_count = end->gpu.used ? (size_t)end->o->count : 1};
    errno = EBADMSG;
    if (message->tensor_count != allocation.tensor_count || message->tensors[0].size != (size_t)end->o->size)
        perf_die("a tensor arrived with another size", NULL);
    end->describing = false;
    slot->busy = true;
    tprpc_status begun = tprpc_pipe_read(end->pipe, &allocation, perf_on_tensor, slot);
    if (begun != TPRPC_OK) perf_die_status("read", begun);
    perf_tensor_expect(end);
}

// Asks for the next tensor when there is a slot for it.
static void perf_tensor_expect(perf_end *end) {
    if (end->describing || end->over || (end->slots[0].busy && end->slots[1].busy)) return;
    end->describing = true;
    tprpc_status status = tprpc_pipe_read_descriptor(end->pipe, perf_on_described, end);
    if (status == TPRPC_OK || (status == TPRPC_ERROR_PEER && end->serving)) return;
    perf_die_status("read", status);
}

static void perf_check_landed(perf_end *end, const perf_slot *slot) {
    perf_settle(end);
    errno = EBADMSG;
    if (!perf_gpu_holds(&end->gpu, slot->data, perf_message_size(end->o), end->serving ? 1 : 2))
        perf_die("a tensor arrived with other bytes", NULL);
}

// With GPUs: tensors are there in the order of the stream. The first ones and the last ones are looked at as a whole;
// so that the last are not those of the warm-up, its last two are cleared.
static void perf_landed(perf_end *end, perf_slot *slot) {
    const perf_options *o = end->o;
    const int64_t number = ++end->landings;
    if (number == 1) perf_check_landed(end, slot);
    if (number == o->warmup || number == o->warmup - 1) perf_gpu_clear(&end->gpu, slot->data, perf_message_size(o));
    if (o->test == PERF_RTT && !o->idle) perf_gpu_work(&end->gpu);
    slot->busy = false;
    end->on_message(end);
    if (number == o->warmup + o->iters) perf_check_landed(end, slot);
    perf_tensor_expect(end);
}

// From here on messages of the test are taken in; on_message runs for each. Bodies: `ahead` reads are always posted.
static void perf_expect(perf_end *end, void (*on_message)(perf_end *end), int ahead) {
    end->on_message = on_message;
    if (end->o->tensor) perf_tensor_expect(end);
    else for (int i = 0; i < ahead; i++) perf_read(end, perf_on_body);
}

// The channel that moves memory of these GPUs. Between such as do not reach each other in two processes, what it does is
// what cuda_basic does.
static const char *perf_gpu_path(const perf_options *o, const tprpc_pipe_info *info) {
    const bool from = o->devices[0].kind == PERF_CUDA, to = o->devices[1].kind == PERF_CUDA;
    const uint32_t way = !from ? TPRPC_PATH_HOST_TO_DEVICE : !to ? TPRPC_PATH_DEVICE_TO_HOST
                                                                 : TPRPC_PATH_DEVICE_TO_DEVICE;
    for (uint32_t i = 0; i < info->path_count; i++)
        if (info->paths[i].device_kind == TPRPC_CUDA && info->paths[i].carries & way)
            return from && to && !o->in_process && !perf_gpu_peers(o) ? "cuda_basic" : info->paths[i].name;
    return "";
}

// A small tensor would travel within the message where none of the channels asked for can be had.
static void perf_path(const perf_options *o, const tprpc_pipe_info *info, perf_result *r) {
    const char *channel = perf_on_gpu(o) ? perf_gpu_path(o, info) : info->channel;
    if (o->channel && !channel[0]) perf_no_channel(o);
    snprintf(r->transport, sizeof r->transport, "%s", info->transport);
    if (o->tensor) snprintf(r->channel, sizeof r->channel, "%s", channel);
}

static void perf_used_path(perf_end *end, perf_result *r) {
    tprpc_pipe_info info;
    if (tprpc_pipe_get_info(end->pipe, &info, sizeof info) == TPRPC_OK) perf_path(end->o, &info, r);
}

// ---- there and back -----------------------------------------------------------------------------------------------

static void perf_echo(perf_end *end) {
    if (end->gpu.used && end->o->idle) perf_settle(end);
    perf_send(end);
}

// The next message leaves before the clock is read: reading it takes a tenth of the round trip that it times.
static void perf_rtt_back(perf_end *end) {
    if (end->at + 1 < end->total) perf_send(end);
    end->at++;
    end->stamps[end->at] = perf_now_ns();
}

// With GPUs a trip ends when this host knows that its memory holds what came back, and the next one begins then.
static void perf_rtt_back_gpu(perf_end *end) {
    perf_settle(end);
    end->stamps[++end->at] = perf_now_ns();
    if (end->at < end->total) perf_send(end);
}

static void perf_rtt_phase(perf_end *end, int64_t count) {
    end->at = 0;
    end->total = count;
    end->stamps[0] = perf_now_ns();
    perf_send(end);
    while (end->at < count && perf_turn(end)) {}
}

static void perf_rtt(perf_end *end, perf_result *r) {
    const perf_options *o = end->o;
    int64_t most = o->iters > o->warmup ? o->iters : o->warmup;
    end->stamps = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)(most + 1));
    double cpu[2];
    perf_expect(end, end->gpu.used ? perf_rtt_back_gpu : perf_rtt_back, 2);
    end->check_all = true;
    perf_rtt_phase(end, o->warmup);
    end->check_all = false;
    perf_cpu_sides(cpu, end->other);
    perf_rtt_phase(end, o->iters);
    perf_cpu_of(r, cpu, end->other, 2 * o->iters);
    perf_differences(end->stamps, o->iters);
    perf_distribution(r, end->stamps, o->iters);
}

// ---- one way: rate and bw -----------------------------------------------------------------------------------------

enum { PERF_GROUP = 64, PERF_GROUPS = 32 };  // of small messages, one in a group is told about; groups in flight

// Tensors in flight: enough to hide a hop, no more than the caches and the other end's patience are good for.
static int64_t perf_window(const perf_options *o) {
    int64_t fits = INT64_C(64) * PERF_MIB / (o->size * (perf_on_gpu(o) ? o->count : 1));
    return fits < 4 ? 4 : fits > 64 ? 64 : fits;
}

static void perf_sink(perf_end *end) {
    end->at++;
    if (end->at == end->o->warmup) end->check_all = false;
    if (end->at != end->o->warmup && end->at != end->o->warmup + end->o->iters) return;
    perf_settle(end);
    perf_control_send(end, "done");
}

static void perf_group_written(tprpc_status status, const tprpc_error *error, void *user) {
    if (status != TPRPC_OK) perf_die("write", error);
    ((perf_end *)user)->flying--;
}

static void perf_send_bodies(perf_end *end, int64_t count) {
    for (int64_t i = 1; i <= count; i++) {
        bool told = i % PERF_GROUP == 0;
        while (end->flying >= PERF_GROUPS && perf_turn(end)) {}
        end->flying += told;
        perf_write(end, &end->message, told ? perf_group_written : NULL);
    }
}

static void perf_send_tensors(perf_end *end, int64_t count) {
    int64_t window = perf_window(end->o);
    for (int64_t i = 0; i < count && !end->over; i++) {
        while (end->flying >= window && perf_turn(end)) {}
        perf_send(end);
    }
}

// Returns how long it took until the other end had them all.
static int64_t perf_one_way_phase(perf_end *end, int64_t count) {
    perf_control_expect(end);
    int64_t begin = perf_now_ns();
    if (end->o->tensor) perf_send_tensors(end, count);
    else perf_send_bodies(end, count);
    perf_control_wait(end);
    return perf_now_ns() - begin;
}

static void perf_one_way(perf_end *end, perf_result *r) {
    double cpu[2];
    perf_one_way_phase(end, end->o->warmup);
    perf_cpu_sides(cpu, end->other);
    int64_t elapsed = perf_one_way_phase(end, end->o->iters);
    perf_cpu_of(r, cpu, end->other, end->o->iters);
    perf_throughput(r, elapsed, end->o->iters, end->o->size * (end->gpu.used ? end->o->count : 1));
}

// ---- frame: an engine's loop while tensors pour in ------------------------------------------------------------------

enum { PERF_FRAME_BUDGET_US = 1000, PERF_FRAME_WORK_NS = 1000000 };

static void perf_frame_arrived(perf_end *end) {
    end->at++;
}

// The serving end: sends a phase's tensors when told to.
static void perf_source(perf_end *end) {
    int64_t phases[2] = {end->o->warmup, end->o->iters};
    for (int i = 0; i < 2; i++) {
        perf_control_expect(end);
        if (i == 0) perf_control_send(end, "ready");
        if (!perf_control_wait(end)) return;
        perf_send_tensors(end, phases[i]);
    }
    perf_control_expect(end);        // it ends when the other one leaves
    perf_control_wait(end);
}

// Frames until `count` tensors are there: a poll of at most a millisecond, then a millisecond of other work, in which
// the medium fills up again. Returns how many polls there were; durations, if not NULL, takes `room` of them.
static int64_t perf_frame_phase(perf_end *end, int64_t count, int64_t *durations, int64_t room) {
    int64_t polls = 0;
    end->at = 0;
    perf_control_send(end, "go");
    while (end->at < count) {
        int64_t begin = perf_now_ns();
        tprpc_poll(end->ctx, TPRPC_NOW, PERF_FRAME_BUDGET_US);
        int64_t after = perf_now_ns();
        if (durations && polls < room) durations[polls++] = after - begin;
        while (perf_now_ns() - after < PERF_FRAME_WORK_NS) {}
    }
    return polls;
}

static void perf_frame(perf_end *end, perf_result *r) {
    const int64_t room = 1 << 20;    // 2,000 s of frames
    int64_t *durations = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)room);
    end->check_all = true;
    perf_expect(end, perf_frame_arrived, 0);
    perf_frame_phase(end, end->o->warmup, NULL, 0);
    end->check_all = false;
    double cpu = perf_cpu_s(end->other);
    int64_t begin = perf_now_ns();
    int64_t polls = perf_frame_phase(end, end->o->iters, durations, room);
    perf_throughput(r, perf_now_ns() - begin, end->o->iters, end->o->size);
    r->rate_mps = NAN;
    r->cpu_s = perf_cpu_s(end->other) - cpu;
    perf_distribution(r, durations, polls);
}

// ---- pipes: what they cost ------------------------------------------------------------------------------------------
//
// An idle pipe is read from, and nothing comes. The control connection is the hot pipe: its round trip is taken before
// there are others, and again beside all of them. The serving end answers "weigh" with what it weighs, and all else
// with the same.

enum { PERF_PIPES_FIRST = 16 };      // opened before weighing begins, so that what all pipes share is there
enum { PERF_PIPES_SETTLE_US = 500000 };      // how long pipes are left alone before their cost is read
enum { PERF_PIPES_TRIPS = 4000, PERF_PIPES_COLD = 64 };      // round trips on the hot one; cold ones that are tried

typedef struct perf_many perf_many;

typedef struct perf_one {            // one of them
    perf_many  *many;
    tprpc_pipe *pipe;
} perf_one;

struct perf_many {                   // the pipes of one end, beside the first
    perf_end       *end;
    tprpc_listener *listener;        // of the serving end
    perf_one       *ones;
    int64_t         open, greeted;   // greeted: messages that came over them
};

static const char perf_hello[] = "64 bytes of text, which the pipes say to each other and back ...";

static int64_t perf_pss_bytes(void) {
    char line[256];
    long long kib = -1;
    FILE *file = fopen("/proc/self/smaps_rollup", "r");
    if (!file) perf_die("/proc/self/smaps_rollup", NULL);
    while (kib < 0 && fgets(line, sizeof line, file))
        if (sscanf(line, "Pss: %lld kB", &kib) != 1) kib = -1;
    fclose(file);
    return kib * PERF_KIB;
}

static int64_t perf_descriptors(void) {
    int64_t count = 0;
    DIR *list = opendir("/proc/self/fd");
    if (!list) perf_die("/proc/self/fd", NULL);
    while (readdir(list)) count++;
    closedir(list);
    return count;
}

// They outlive the test: their last callbacks run when the context is destroyed.
static perf_many *perf_many_make(perf_end *end, tprpc_listener *listener) {
    size_t all = PERF_PIPES_FIRST + (size_t)end->o->count;
    perf_many *many = (perf_many *)perf_memory(sizeof *many);
    *many = (perf_many){.end = end, .listener = listener, .ones = (perf_one *)perf_memory(all * sizeof(perf_one))};
    return many;
}

static void perf_many_close(perf_many *many) {
    many->end->closing = true;
    for (int64_t i = 0; i < many->open; i++) tprpc_pipe_close(many->ones[i].pipe);
}

static void perf_one_say(perf_one *one) {
    tprpc_message hello = {.metadata = perf_hello, .metadata_size = sizeof perf_hello - 1};
    tprpc_status status = tprpc_pipe_write(one->pipe, &hello, NULL, NULL);
    if (status != TPRPC_OK) perf_die_status("write", status);
}

static void perf_one_expect(perf_one *one, tprpc_read done) {
    tprpc_status status = tprpc_pipe_read(one->pipe, NULL, done, one);
    if (status != TPRPC_OK) perf_die_status("read", status);
}

static void perf_greeting(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    perf_many *many = ((perf_one *)user)->many;
    (void)message;
    if (perf_ended(many->end, status, error)) return;
    many->greeted++;
}

static void perf_one_asked(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    perf_one *one = (perf_one *)user;
    (void)message;
    if (perf_ended(one->many->end, status, error)) return;
    perf_one_say(one);
    perf_one_expect(one, perf_one_asked);
}

static void perf_pipes_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    perf_many *many = (perf_many *)user;
    if (status != TPRPC_OK) perf_die("accept", error);
    perf_one *one = &many->ones[many->open++];
    *one = (perf_one){.many = many, .pipe = pipe};
    perf_one_say(one);
    perf_one_expect(one, perf_one_asked);
    if (many->open == PERF_PIPES_FIRST + many->end->o->count) return;
    status = tprpc_accept(many->listener, perf_pipes_accepted, many);
    if (status != TPRPC_OK) perf_die_status("accept", status);
}

// The serving end: takes pipes in, and answers.
static void perf_pipes_serve(perf_end *end, tprpc_listener *listener) {
    perf_many *many = perf_many_make(end, listener);
    tprpc_status status = tprpc_accept(listener, perf_pipes_accepted, many);
    if (status != TPRPC_OK) perf_die_status("accept", status);
    perf_control_expect(end);
    perf_control_send(end, "ready");
    while (perf_control_wait(end)) {
        bool weigh = strcmp(end->control, "weigh") == 0;
        if (weigh) snprintf(end->control, sizeof end->control, "%" PRId64 " %" PRId64, perf_pss_bytes(),
                            perf_descriptors());
        perf_control_send(end, end->control);
        perf_control_expect(end);
    }
    perf_many_close(many);
}

// Opens pipes, one after the other, each until it has carried a message.
static void perf_pipes_open(perf_many *many, const char *address, int64_t count, int64_t *durations) {
    const perf_options *o = many->end->o;
    tprpc_pipe_desc desc = {.address = address, .insecure = o->connect != NULL};
    for (int64_t i = 0; i < count; i++) {
        tprpc_error error = {.status = TPRPC_OK};
        perf_one *one = &many->ones[many->open++];
        one->many = many;
        int64_t begin = perf_now_ns();
        if (tprpc_connect(many->end->ctx, &desc, &one->pipe, &error) != TPRPC_OK) perf_die("connect", &error);
        perf_one_expect(one, perf_greeting);
        while (many->greeted < many->open && perf_turn(many->end)) {}
        durations[i] = perf_now_ns() - begin;
    }
}

static void perf_hot_trips(perf_end *end, int64_t *durations, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        int64_t begin = perf_now_ns();
        perf_control_expect(end);
        perf_control_send(end, perf_hello);
        perf_control_wait(end);
        durations[i] = perf_now_ns() - begin;
    }
}

// The round trip on the hot pipe, after some that warm it.
static double perf_hot_us(perf_end *end) {
    static int64_t durations[PERF_PIPES_TRIPS];
    perf_result r;
    perf_hot_trips(end, durations, PERF_PIPES_TRIPS / 4);
    perf_hot_trips(end, durations, PERF_PIPES_TRIPS);
    perf_distribution(&r, durations, PERF_PIPES_TRIPS);
    return r.p50_us;
}

// The first round trip on pipes that have been idle since they were opened, each after one on the hot pipe.
static double perf_cold_us(perf_many *many, int64_t count) {
    int64_t durations[PERF_PIPES_COLD], ignored = 0, tried = count < PERF_PIPES_COLD ? count : PERF_PIPES_COLD;
    perf_result r;
    for (int64_t i = 0; i < tried; i++) {
        perf_one *one = &many->ones[PERF_PIPES_FIRST + i * (count / tried)];
        int64_t before = many->greeted;
        perf_hot_trips(many->end, &ignored, 1);
        int64_t begin = perf_now_ns();
        perf_one_expect(one, perf_greeting);
        perf_one_say(one);
        while (many->greeted == before && perf_turn(many->end)) {}
        durations[i] = perf_now_ns() - begin;
    }
    perf_distribution(&r, durations, tried);
    return r.p50_us;
}

// What each end has now: [0] this one, [1] the other.
static void perf_pipes_weigh(perf_end *end, int64_t bytes[2], int64_t fds[2]) {
    perf_turn_for_us(end, PERF_PIPES_SETTLE_US);
    bytes[0] = perf_pss_bytes();
    fds[0] = perf_descriptors();
    perf_control_expect(end);
    perf_control_send(end, "weigh");
    if (sscanf(perf_control_wait(end), "%" SCNd64 " %" SCNd64, &bytes[1], &fds[1]) == 2) return;
    errno = EBADMSG;
    perf_die("the other end's weight", NULL);
}

// The growth per pipe, of the end that it costs more.
static double perf_dearer(const int64_t after[2], const int64_t before[2], int64_t count) {
    int64_t mine = after[0] - before[0], other = after[1] - before[1];
    return (double)(mine > other ? mine : other) / (double)count;
}

static void perf_pipes(perf_end *end, const char *address, perf_result *r) {
    int64_t count = end->o->count, first_bytes[2], first_fds[2], bytes[2], fds[2];
    perf_many *many = perf_many_make(end, NULL);
    int64_t *durations = (int64_t *)perf_memory((PERF_PIPES_FIRST + (size_t)count) * sizeof(int64_t));
    r->alone_us = perf_hot_us(end);
    perf_pipes_open(many, address, PERF_PIPES_FIRST, durations);
    perf_pipes_weigh(end, first_bytes, first_fds);
    double cpu = perf_cpu_s(end->other);
    perf_pipes_open(many, address, count, durations);
    r->cpu_s = perf_cpu_s(end->other) - cpu;
    perf_pipes_weigh(end, bytes, fds);
    perf_distribution(r, durations, count);
    r->connect_us = r->p50_us;
    r->hot_us = perf_hot_us(end);
    r->cold_us = perf_cold_us(many, count);
    r->count = (double)count;
    r->bytes_per_pipe = perf_dearer(bytes, first_bytes, count);
    r->fds_per_pipe = perf_dearer(fds, first_fds, count);
    r->min_us = r->p50_us = r->p99_us = r->p999_us = r->mean_us = NAN;
    perf_many_close(many);
}

// ---- the two ends over a pipe ---------------------------------------------------------------------------------------

typedef struct perf_serving {        // what the child needs to serve
    int         tell;                // a descriptor to write the address to; -1: stderr
    const char *address;             // to listen on; NULL: one of this host for every transport of the options
} perf_serving;

// Where to listen when nobody says: on this host, by each transport that was named. Returns how many.
static size_t perf_local_addresses(const perf_options *o, char text[PERF_LIST_MAX][64], const char **list) {
    const char *names = o->transport ? o->transport : "tcp";         // from there it moves to the best
    size_t count = 0;
    while (*names && count < PERF_LIST_MAX) {
        int length = (int)strcspn(names, ",");
        const char *place = length == 3 && strncmp(names, "tcp", 3) == 0 ? "127.0.0.1:0" : "";
        snprintf(text[count], 64, "%.*s://%s", length > 32 ? 32 : length, names, place);
        list[count] = text[count];
        count++;
        names += length;
        names += *names == ',';
    }
    return count;
}

static const char *perf_full_address(const char *address, char out[256]) {
    snprintf(out, 256, "%s%s", strstr(address, "://") ? "" : "tcp://", address);
    return out;
}

static tprpc_listener *perf_listener(perf_end *end, const perf_serving *serving) {
    char text[PERF_LIST_MAX][64], full[256];
    const char *list[PERF_LIST_MAX];
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_listener *listener = NULL;
    tprpc_listener_desc desc = {.addresses = list, .address_count = 1, .insecure = serving->address != NULL};
    if (serving->address) list[0] = perf_full_address(serving->address, full);
    else desc.address_count = perf_local_addresses(end->o, text, list);
    if (tprpc_listen(end->ctx, &desc, &listener, &error) != TPRPC_OK) perf_die("listen", &error);
    const char *address = tprpc_listener_address(listener, NULL);
    if (serving->tell < 0) fprintf(stderr, "tprpc-perf: listening on %s\n", address);
    else if (write(serving->tell, address, strlen(address) + 1) < 0) perf_die("pipe", NULL);
    return listener;
}

static void perf_first_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    if (status != TPRPC_OK) perf_die("accept", error);
    ((perf_end *)user)->pipe = pipe;
}

// With GPUs memory is given back, for there may be another turn.
static void perf_end_close(perf_end *end) {
    tprpc_error error = {.status = TPRPC_OK};
    unsigned char *mine = end->gpu.used ? (unsigned char *)end->tensors[0].data : NULL;
    end->closing = true;
    if (end->gpu.used) perf_gpu_wait(&end->gpu);
    tprpc_pipe_close(end->pipe);
    while (mine && perf_gpu_is_device(&end->gpu) && end->o->lent &&
           tprpc_cuda_unregister(end->ctx, mine, &error) == TPRPC_PENDING) tprpc_poll(end->ctx, 1000, 0);
    tprpc_context_destroy(end->ctx);
    if (!end->gpu.used) return;
    perf_gpu_free(&end->gpu, mine);
    for (int i = 0; i < 2; i++) perf_gpu_free(&end->gpu, end->slots[i].data);
    perf_gpu_close(&end->gpu);
}

// The serving end, from start to finish.
static void perf_serve_one(const perf_options *asked, void *user) {
    perf_options o = *asked;
    perf_end end = {.o = &o, .ctx = perf_context(&o), .serving = true};
    perf_gpu_open(&end.gpu, &o, 1);
    tprpc_listener *listener = perf_listener(&end, (const perf_serving *)user);
    tprpc_status status = tprpc_accept(listener, perf_first_accepted, &end);
    if (status != TPRPC_OK) perf_die_status("accept", status);
    while (!end.pipe) tprpc_poll(end.ctx, TPRPC_FOREVER, 0);
    perf_be_told(&end, &o);
    perf_prepare(&end);
    end.check_all = true;
    if (o.test == PERF_PIPES) perf_pipes_serve(&end, listener);
    else if (o.test == PERF_FRAME) perf_source(&end);
    else {
        perf_expect(&end, o.test == PERF_RTT ? perf_echo : perf_sink, o.test == PERF_RTT ? 2 : 16);
        if (o.test == PERF_RTT) end.check_all = false;
        perf_control_send(&end, "ready");
        while (perf_turn(&end)) {}
    }
    perf_end_close(&end);
}

static void perf_serve(const perf_options *o, void *user) {
    for (int i = 0; i < o->size_count; i++) {
        const perf_options one = perf_of_size(o, i);
        perf_serve_one(&one, user);
    }
}

// The measuring end.
static void perf_measure(const perf_options *o, const char *address, pid_t other, perf_result *r) {
    perf_end end = {.o = o, .ctx = perf_context(o), .other = other};
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_pipe_desc desc = {.address = address, .insecure = o->connect != NULL};
    perf_gpu_open(&end.gpu, o, 0);
    perf_prepare(&end);              // first, since it may take longer than the other end waits for an agreement
    if (tprpc_connect(end.ctx, &desc, &end.pipe, &error) != TPRPC_OK) perf_die("connect", &error);
    perf_agree(&end);
    if (o->test == PERF_RTT) perf_rtt(&end, r);
    else if (o->test == PERF_PIPES) perf_pipes(&end, address, r);
    else if (o->test == PERF_FRAME) perf_frame(&end, r);
    else perf_one_way(&end, r);
    perf_used_path(&end, r);
    perf_end_close(&end);
}

static void perf_run_pipes(const perf_options *o) {
    char address[256] = "";
    perf_result r = perf_result_empty();
    int tell[2];
    if (o->connect) {
        perf_pin(o, 0);
        perf_measure(o, perf_full_address(o->connect, address), 0, &r);
        perf_print(o, &r);
        return;
    }
    if (pipe(tell) != 0) perf_die("pipe", NULL);
    perf_serving serving = {.tell = tell[1]};
    perf_other other;
    perf_start(&other, o, perf_serve, &serving);
    if (!o->in_process) close(tell[1]);
    for (int i = 0; i < o->size_count; i++) {
        const perf_options one = perf_of_size(o, i);
        r = perf_result_empty();
        if (read(tell[0], address, sizeof address - 1) <= 0) {
            perf_join(&other);       // it has said why
            perf_die("the other end said nothing", NULL);
        }
        perf_measure(&one, address, other.pid, &r);
        perf_print(&one, &r);
    }
    close(tell[0]);
    perf_join(&other);
}

// ---- rpc ------------------------------------------------------------------------------------------------------------

typedef struct perf_agent {          // one end of a measurement between agents
    const perf_options *o;
    tprpc_context *ctx;
    tprpc_agent   *agent;
    tprpc_call_options call;
    tprpc_message  message;          // what this end sends: as perf_prepare's
    tprpc_tensor  *tensors;
    unsigned char *place;            // where tensors arrive
    bool           quit;
    perf_gpu       gpu;
    int            end;              // 1: it serves
    bool           checked;
} perf_agent;

static void perf_nothing(void *user) { (void)user; }

static void perf_agent_prepare_gpu(perf_agent *a) {
    const perf_options *o = a->o;
    unsigned char *data;
    perf_gpu_open(&a->gpu, o, a->end);
    data = perf_gpu_memory(&a->gpu, perf_message_size(o));
    perf_gpu_fill(&a->gpu, data, perf_message_size(o), a->end ? 2 : 1);
    perf_lend(o, a->ctx, &a->gpu, data);
    perf_lay_out(o, &a->gpu, a->tensors, data, &o->devices[!a->end]);
    a->place = perf_gpu_memory(&a->gpu, perf_message_size(o));
    a->message = (tprpc_message){.tensors = a->tensors, .tensor_count = (size_t)o->count, .release = perf_nothing};
}

static void perf_agent_prepare(perf_agent *a) {
    size_t size = (size_t)a->o->size;
    a->tensors = (tprpc_tensor *)perf_memory((size_t)a->o->count * sizeof *a->tensors);
    if (perf_on_gpu(a->o)) {
        perf_agent_prepare_gpu(a);
        return;
    }
    unsigned char *data = perf_pattern_memory(size);
    a->message = (tprpc_message){.metadata = data, .metadata_size = size};
    if (!a->o->tensor) return;
    a->place = (unsigned char *)perf_memory(size);
    a->tensors[0] = (tprpc_tensor){.data = data, .size = size, .device = {TPRPC_CPU, 0}};
    a->message = (tprpc_message){.tensors = a->tensors, .tensor_count = 1, .release = perf_nothing};
}

// Calls follow one another, so one place is enough.
static tprpc_status perf_agent_place(tprpc_placement *placement, void *user) {
    perf_agent *a = (perf_agent *)user;
    const tprpc_message *descriptor = placement->descriptor;
    if (descriptor->tensor_count == 0) return TPRPC_OK;
    if (!a->place || descriptor->tensor_count != a->message.tensor_count) return TPRPC_ERROR_INVALID;
    for (size_t i = 0; i < descriptor->tensor_count; i++) {
        if (descriptor->tensors[i].size != (size_t)a->o->size) return TPRPC_ERROR_INVALID;
        placement->tensors[i].data = a->place + i * (size_t)a->o->size;
        if (perf_gpu_is_device(&a->gpu)) placement->tensors[i].stream = a->gpu.stream;
    }
    return TPRPC_OK;
}

// With GPUs: whether what arrived is what the other end has; once.
static void perf_agent_check(perf_agent *a) {
    if (!a->gpu.used || a->checked) return;
    a->checked = true;
    errno = EBADMSG;
    if (!perf_gpu_holds(&a->gpu, a->place, perf_message_size(a->o), a->end ? 1 : 2))
        perf_die("a tensor arrived with other bytes", NULL);
}

static void perf_agent_echo(tprpc_request request, const tprpc_message *message, void *user) {
    perf_agent *a = (perf_agent *)user;
    if (message->tensor_count) perf_agent_check(a);
    if (message->tensor_count && a->gpu.used && !a->o->idle) perf_gpu_work(&a->gpu);
    else if (a->gpu.used) perf_gpu_wait(&a->gpu);
    tprpc_reply(request, message->tensor_count ? &a->message : message);
}

static void perf_agent_quit(tprpc_request request, const tprpc_message *message, void *user) {
    perf_agent *a = (perf_agent *)user;
    a->quit = true;
    tprpc_reply(request, message->tensor_count ? &a->message : message);
}

static void perf_agent_register(perf_agent *a, const tprpc_method_desc *method) {
    tprpc_error error = {.status = TPRPC_OK};
    if (tprpc_agent_register(a->agent, method, &error) != TPRPC_OK) perf_die("register", &error);
}

// The serving end is rank 0 and serves the store; it stays until the other one calls quit.
static void perf_agent_begin(perf_agent *a, const perf_options *o, const char *init_method, int rank) {
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_agent_desc desc = {.name = rank ? "measuring" : "serving", .init_method = init_method, .rank = rank,
                             .world_size = 2, .insecure = o->listen || o->connect, .trace = o->trace};
    tprpc_method_desc echo = {.name = "echo", .handler = perf_agent_echo, .place = perf_agent_place, .user = a};
    tprpc_method_desc quit = {.name = "quit", .handler = perf_agent_quit, .place = perf_agent_place, .user = a};
    a->o = o;
    a->end = rank == 0;
    a->ctx = desc.context = perf_context(o);
    a->call = (tprpc_call_options){.place = perf_agent_place, .user = a};
    if (tprpc_agent_create(&desc, &a->agent, &error) != TPRPC_OK) perf_die("agent", &error);
    perf_agent_register(a, &echo);
    perf_agent_register(a, &quit);
}

static void perf_agent_join(perf_agent *a) {
    tprpc_error error = {.status = TPRPC_OK};
    if (tprpc_agent_wait_ready(a->agent, a->o->listen ? TPRPC_FOREVER : 30000, &error) != TPRPC_OK)
        perf_die("agent", &error);
}

static tprpc_method_id perf_agent_method(perf_agent *a, const char *name) {
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_method_id method = {0, 0};
    if (tprpc_resolve(a->agent, "serving", name, &method, &error) != TPRPC_OK) perf_die("resolve", &error);
    return method;
}

static void perf_agent_end(perf_agent *a) {
    tprpc_error error = {.status = TPRPC_OK};
    if (tprpc_agent_leave(a->agent, 10000, &error) != TPRPC_OK) perf_die("leave", &error);
    tprpc_agent_destroy(a->agent);
    tprpc_context_destroy(a->ctx);
}

static void perf_agent_serve(const perf_options *o, void *init_method) {
    perf_agent a = {.quit = false};
    perf_agent_begin(&a, o, (const char *)init_method, 0);
    perf_agent_prepare(&a);
    perf_agent_join(&a);
    while (!a.quit) tprpc_poll(a.ctx, TPRPC_FOREVER, 0);
    perf_agent_end(&a);
}

static void perf_one_call(perf_agent *a, tprpc_method_id method, int64_t *stamp) {
    tprpc_future future = {NULL, 0};
    if (a->gpu.used && !a->o->idle) perf_gpu_work(&a->gpu);
    if (a->gpu.used) *stamp = perf_now_ns();
    tprpc_status status = tprpc_call_id(a->agent, method, &a->message, a->place ? &a->call : NULL, &future);
    if (status != TPRPC_OK) perf_die_status("call", status);
    if (!a->gpu.used) *stamp = perf_now_ns();        // while the call is on its way
    if (tprpc_future_wait(future, TPRPC_FOREVER) != TPRPC_OK) {
        tprpc_error error = {.status = TPRPC_OK};
        tprpc_future_error(future, &error);
        perf_die("call", &error);
    }
    const tprpc_message *reply = tprpc_future_reply(future);
    errno = EBADMSG;
    if (reply->metadata_size != a->message.metadata_size || reply->tensor_count != a->message.tensor_count)
        perf_die("a reply arrived with another size", NULL);
    perf_gpu_wait(&a->gpu);          // the reply is there in the stream's order
    perf_agent_check(a);
    tprpc_future_release(future);
}

static void perf_agent_path(perf_agent *a, perf_result *r) {
    tprpc_pipe_info info;
    if (tprpc_agent_get_peer_info(a->agent, "serving", &info, sizeof info) == TPRPC_OK) perf_path(a->o, &info, r);
}

static void perf_measure_calls(const perf_options *o, const char *init_method, pid_t other, perf_result *r) {
    perf_agent a = {.quit = false};
    int64_t *stamps = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)(o->iters + 1)), ignored = 0;
    perf_agent_begin(&a, o, init_method, 1);
    perf_agent_prepare(&a);
    perf_agent_join(&a);
    tprpc_method_id echo = perf_agent_method(&a, "echo"), quit = perf_agent_method(&a, "quit");
    for (int64_t i = 0; i < o->warmup; i++) perf_one_call(&a, echo, &ignored);
    double cpu[2];
    perf_cpu_sides(cpu, other);
    for (int64_t i = 0; i <= o->iters; i++) perf_one_call(&a, echo, &stamps[i]);
    perf_cpu_of(r, cpu, other, 2 * o->iters);
    perf_differences(stamps, o->iters);
    perf_distribution(r, stamps, o->iters);
    perf_agent_path(&a, r);
    perf_one_call(&a, quit, &ignored);
    perf_agent_end(&a);
}

// ---- loaded: calls at a stated rate while tensors stream ------------------------------------------------------------
//
// The calls are due at times that are fixed before: whoever falls behind catches up, and tells how many were late. Each
// is due at some time within its interval: at full ones, the ticks of a kernel or a hypervisor would meet one call in a
// hundred, or none, which is what a p99 then shows. The tensors are calls, too, of a method that swallows them, and go
// the same way as the small calls.

enum { PERF_CALL_BYTES = 64, PERF_STREAM_WINDOW = 2 };       // tensors in flight: one moves while one is announced

typedef struct perf_drain {          // the serving end's: where tensors arrive
    unsigned char *places[PERF_STREAM_WINDOW];
    bool           busy[PERF_STREAM_WINDOW];
    size_t         size;
} perf_drain;

static tprpc_status perf_drain_place(tprpc_placement *placement, void *user) {
    perf_drain *drain = (perf_drain *)user;
    const tprpc_message *descriptor = placement->descriptor;
    if (descriptor->tensor_count != 1 || descriptor->tensors[0].size != drain->size) return TPRPC_ERROR_INVALID;
    for (int i = 0; i < PERF_STREAM_WINDOW; i++) {
        if (drain->busy[i]) continue;
        drain->busy[i] = true;
        placement->tensors[0].data = drain->places[i];
        return TPRPC_OK;
    }
    return TPRPC_ERROR_LIMIT;
}

static void perf_drain_handle(tprpc_request request, const tprpc_message *message, void *user) {
    perf_drain *drain = (perf_drain *)user;
    unsigned char *data = (unsigned char *)message->tensors[0].data;
    errno = EBADMSG;
    if (!perf_sample(data, drain->size)) perf_die("a tensor arrived with other bytes", NULL);
    for (int i = 0; i < PERF_STREAM_WINDOW; i++) drain->busy[i] = drain->busy[i] && drain->places[i] != data;
    tprpc_reply(request, NULL);
}

static void perf_loaded_serve(const perf_options *o, void *init_method) {
    perf_agent a = {.quit = false};
    perf_drain drain = {.size = (size_t)o->size};
    tprpc_method_desc method = {.name = "drain", .handler = perf_drain_handle, .place = perf_drain_place,
                                .user = &drain};
    for (int i = 0; i < PERF_STREAM_WINDOW; i++) drain.places[i] = (unsigned char *)perf_memory(drain.size);
    perf_agent_begin(&a, o, (const char *)init_method, 0);
    perf_agent_register(&a, &method);
    perf_agent_join(&a);
    while (!a.quit) tprpc_poll(a.ctx, TPRPC_FOREVER, 0);
    perf_agent_end(&a);
}

typedef struct perf_load perf_load;

typedef struct perf_load_call {
    perf_load *load;
    int64_t    issued_ns, took_ns;
} perf_load_call;

struct perf_load {                   // the measuring end's: one phase
    perf_agent    *a;
    tprpc_method_id echo, drain;
    tprpc_message  call, bulk;
    perf_load_call *calls;           // those that count
    int64_t        issued, answered, late;       // of the calls: all of this phase; late: of those that count
    bool           streaming;
    int64_t        flying, arrived;  // of the tensors
    int64_t        first_ns, last_ns;            // when the first, and the last, had arrived
};

static void perf_load_answered(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    perf_load_call *call = (perf_load_call *)user;
    (void)reply;
    if (status != TPRPC_OK) perf_die("call", error);
    call->took_ns = perf_now_ns() - call->issued_ns;
    call->load->answered++;
}

// One more call, `behind` the time when it was due. Those beyond the count keep up the load until the phase is over.
static void perf_load_issue(perf_load *load, int64_t behind, int64_t interval_ns) {
    const perf_options *o = load->a->o;
    bool counts = load->issued < o->iters;
    perf_load_call *call = &load->calls[counts ? load->issued : o->iters];
    tprpc_call_options options = {.on_done = perf_load_answered, .user = call};
    load->issued++;
    load->late += counts && behind > interval_ns;
    call->issued_ns = perf_now_ns();
    tprpc_status status = tprpc_call_id(load->a->agent, load->echo, &load->call, &options, NULL);
    if (status != TPRPC_OK) perf_die_status("call", status);
}

// When call i is due, in ns from the beginning.
static int64_t perf_load_due(int64_t i, int64_t interval_ns) {
    const uint64_t mixed = ((uint64_t)i + 1) * UINT64_C(0x9e3779b97f4a7c15);     // the golden ratio's: evenly strewn
    return i * interval_ns + (int64_t)((mixed >> 32) % (uint64_t)interval_ns);
}

static void perf_load_stream(perf_load *load);

static void perf_load_arrived(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    perf_load *load = (perf_load *)user;
    (void)reply;
    if (status == TPRPC_ERROR_UNSUPPORTED && load->a->o->channel) perf_no_channel(load->a->o);
    if (status != TPRPC_OK) perf_die("call with a tensor", error);
    load->last_ns = perf_now_ns();
    if (load->arrived++ == 0) load->first_ns = load->last_ns;
    load->flying--;
    if (load->streaming) perf_load_stream(load);
}

static void perf_load_stream(perf_load *load) {
    tprpc_call_options options = {.on_done = perf_load_arrived, .user = load};
    while (load->flying < PERF_STREAM_WINDOW) {
        tprpc_status status = tprpc_call_id(load->a->agent, load->drain, &load->bulk, &options, NULL);
        if (status == TPRPC_ERROR_UNSUPPORTED && load->a->o->channel) perf_no_channel(load->a->o);
        if (status != TPRPC_OK) perf_die_status("call with a tensor", status);
        load->flying++;
    }
}

// A phase: calls at the stated rate, a stream, or both, for as long as the calls take and three tensors have arrived.
// The stream is under way before the first call is due. Returns how many bytes a nanosecond it moved.
static double perf_load_phase(perf_load *load, bool calling, bool streaming) {
    enum { TENSORS = 3, POLL_US = 1000 };
    const perf_options *o = load->a->o;
    const int64_t interval_ns = 1000000000 / o->rate, span_ns = o->iters * interval_ns;
    load->issued = load->answered = load->late = load->arrived = 0;
    load->streaming = streaming;
    if (streaming) perf_load_stream(load);
    while (streaming && load->arrived == 0) tprpc_poll(load->a->ctx, POLL_US, POLL_US);
    for (int64_t begin = perf_now_ns();;) {
        int64_t now = perf_now_ns(), due = begin + perf_load_due(load->issued, interval_ns), wait_us = POLL_US;
        bool over = now - begin >= span_ns && (!streaming || load->arrived >= TENSORS);
        if (over && (!calling || load->answered >= o->iters)) break;
        if (calling && now >= due) {
            perf_load_issue(load, now - due, interval_ns);
            due = begin + perf_load_due(load->issued, interval_ns);
        }
        if (calling) wait_us = due > now ? (due - now) / 1000 : 0;
        tprpc_poll(load->a->ctx, wait_us, wait_us > 0 ? wait_us : 1);
    }
    load->streaming = false;
    const int64_t arrived = load->arrived, took_ns = load->last_ns - load->first_ns;
    while (load->flying || load->answered < load->issued) tprpc_poll(load->a->ctx, POLL_US, POLL_US);
    return streaming ? (double)o->size * (double)(arrived - 1) / (double)took_ns : NAN;
}

static void perf_load_distribution(const perf_load *load, int64_t *durations, perf_result *r) {
    for (int64_t i = 0; i < load->a->o->iters; i++) durations[i] = load->calls[i].took_ns;
    perf_distribution(r, durations, load->a->o->iters);
}

static void perf_measure_loaded(const perf_options *o, const char *init_method, pid_t other, perf_result *r) {
    perf_agent a = {.quit = false};
    perf_load load = {.a = &a};
    perf_result alone = perf_result_empty();
    int64_t ignored = 0, *durations = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)o->iters);
    unsigned char *data = perf_pattern_memory((size_t)o->size);
    a.message = load.call = (tprpc_message){.metadata = data, .metadata_size = PERF_CALL_BYTES};
    tprpc_tensor tensor = {.data = data, .size = (size_t)o->size, .device = {TPRPC_CPU, 0}};
    load.bulk = (tprpc_message){.tensors = &tensor, .tensor_count = 1, .release = perf_nothing};
    load.calls = (perf_load_call *)perf_memory(sizeof(perf_load_call) * (size_t)(o->iters + 1));
    for (int64_t i = 0; i <= o->iters; i++) load.calls[i].load = &load;
    perf_agent_begin(&a, o, init_method, 1);
    perf_agent_join(&a);
    load.echo = perf_agent_method(&a, "echo");
    load.drain = perf_agent_method(&a, "drain");
    for (int64_t i = 0; i < o->warmup; i++) perf_one_call(&a, load.echo, &ignored);
    perf_load_phase(&load, true, false);
    perf_load_distribution(&load, durations, &alone);
    r->unloaded_gbps = perf_load_phase(&load, false, true);
    double cpu = perf_cpu_s(other);
    r->bandwidth_gbps = perf_load_phase(&load, true, true);
    r->cpu_s = perf_cpu_s(other) - cpu;
    perf_load_distribution(&load, durations, r);
    r->idle_p50_us = alone.p50_us;
    r->idle_p99_us = alone.p99_us;
    r->late = (double)load.late;
    perf_agent_path(&a, r);
    perf_one_call(&a, perf_agent_method(&a, "quit"), &ignored);
    perf_agent_end(&a);
}

// ---- the two ends between agents ------------------------------------------------------------------------------------

static int perf_tcp_listen(struct sockaddr_in *address) {
    socklen_t size = sizeof *address;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (fd < 0 || bind(fd, (struct sockaddr *)address, sizeof *address) != 0 || listen(fd, 1) != 0 ||
        getsockname(fd, (struct sockaddr *)address, &size) != 0) perf_die("socket", NULL);
    return fd;
}

static void perf_run_agents(const perf_options *o, perf_result *r) {
    const perf_body serve = o->test == PERF_LOADED ? perf_loaded_serve : perf_agent_serve;
    void (*measure)(const perf_options *options, const char *init_method, pid_t other, perf_result *result) =
        o->test == PERF_LOADED ? perf_measure_loaded : perf_measure_calls;
    char init_method[256];
    const char *address = o->listen ? o->listen : o->connect;
    if (address) {
        perf_full_address(address, init_method);
        if (strncmp(init_method, "tcp://", 6) != 0)
            perf_refuse("--test %s needs the address as host:port.", perf_test_names[o->test]);
        perf_pin(o, o->listen ? 1 : 0);
        if (o->listen) serve(o, init_method);
        else measure(o, init_method, 0, r);
        return;
    }
    struct sockaddr_in free_port;    // the store's: given back here, taken again by the other end
    perf_other other;
    close(perf_tcp_listen(&free_port));
    snprintf(init_method, sizeof init_method, "tcp://127.0.0.1:%d", (int)ntohs(free_port.sin_port));
    perf_start(&other, o, serve, init_method);
    measure(o, init_method, other.pid, r);
    perf_join(&other);
}

// ---- raw: a cache line and a socket ---------------------------------------------------------------------------------

enum { PERF_ADAPTIVE_NS = 50000 };   // as the library's default
// A socket is given and asked for at most this much at once. A call for all of 64 MiB would be a weaker reference: 3.7
// instead of 5.3 GB/s over loopback on a 2-core VM, Linux 6.18.
enum { PERF_PIECE = PERF_MIB };

typedef struct perf_line { uint32_t value; char rest[124]; } perf_line;     // two lines: prefetchers fetch pairs

// Waits until the line holds `value`. No pause instruction: it costs more than a cache line's way.
static void perf_line_wait(perf_line *line, uint32_t value) {
    while (__atomic_load_n(&line->value, __ATOMIC_ACQUIRE) != value) {}
}

static uint32_t perf_raw_rounds(const perf_options *o) { return (uint32_t)(o->warmup + o->iters); }

static void perf_raw_line_serve(const perf_options *o, void *user) {
    perf_line *lines = (perf_line *)user;
    for (uint32_t i = 1; i <= perf_raw_rounds(o); i++) {
        perf_line_wait(&lines[0], i);
        __atomic_store_n(&lines[1].value, i, __ATOMIC_RELEASE);
    }
}

static void perf_raw_line(const perf_options *o, int64_t *stamps, perf_result *r) {
    void *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    perf_line *lines = (perf_line *)shared;
    if (shared == MAP_FAILED) perf_die("mmap", NULL);
    perf_other other;
    perf_start(&other, o, perf_raw_line_serve, lines);
    double cpu = 0;
    for (uint32_t i = 1; i <= perf_raw_rounds(o); i++) {
        __atomic_store_n(&lines[0].value, i, __ATOMIC_RELEASE);
        if (i == (uint32_t)o->warmup) cpu = perf_cpu_s(other.pid);
        if (i >= (uint32_t)o->warmup) stamps[i - (uint32_t)o->warmup] = perf_now_ns();
        perf_line_wait(&lines[1], i);
    }
    r->cpu_s = perf_cpu_s(other.pid) - cpu;
    perf_join(&other);
}

// Receives all of it, spinning or sleeping as --spin says. False: the other end has closed.
static bool perf_raw_recv(const perf_options *o, int fd, unsigned char *data, size_t size) {
    int64_t sleep_at = 0;
    for (size_t have = 0; have < size;) {
        size_t ask = size - have < PERF_PIECE ? size - have : PERF_PIECE;
        ssize_t got = recv(fd, data + have, ask, o->spin == PERF_SPIN_NEVER ? 0 : MSG_DONTWAIT);
        if (got == 0) return false;
        if (got > 0) {
            have += (size_t)got;
            sleep_at = 0;
            continue;
        }
        if (errno != EAGAIN && errno != EINTR) perf_die("recv", NULL);
        if (o->spin != PERF_SPIN_ADAPTIVE) continue;
        if (sleep_at == 0) sleep_at = perf_now_ns() + PERF_ADAPTIVE_NS;
        if (perf_now_ns() >= sleep_at) poll(&(struct pollfd){.fd = fd, .events = POLLIN}, 1, -1);
    }
    return true;
}

static void perf_raw_send(int fd, const unsigned char *data, size_t size) {
    while (size) {
        ssize_t sent = send(fd, data, size < PERF_PIECE ? size : PERF_PIECE, MSG_NOSIGNAL);
        if (sent < 0 && errno != EINTR) perf_die("send", NULL);
        if (sent < 0) continue;
        data += sent;
        size -= (size_t)sent;
    }
}

static void perf_raw_no_delay(int fd) {
    int on = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on) != 0) perf_die("TCP_NODELAY", NULL);
}

static bool perf_raw_stream(const perf_options *o) { return o->size >= PERF_MIB; }

// The other end: sends messages back, or (a stream) one byte after the warm-up and one at the end.
static void perf_raw_socket_serve(const perf_options *o, void *user) {
    int fd = accept(*(const int *)user, NULL, NULL);
    size_t size = (size_t)o->size;
    unsigned char *data = (unsigned char *)perf_memory(size);
    if (fd < 0) perf_die("accept", NULL);
    perf_raw_no_delay(fd);
    for (int64_t i = 1; i <= o->warmup + o->iters; i++) {
        if (!perf_raw_recv(o, fd, data, size)) perf_die("the measuring end has closed", NULL);
        if (!perf_raw_stream(o)) perf_raw_send(fd, data, size);
        else if (i == o->warmup || i == o->warmup + o->iters) perf_raw_send(fd, data, 1);
    }
    close(fd);
}

static void perf_raw_echo(const perf_options *o, int fd, unsigned char *data, int64_t *stamps, int64_t count) {
    for (int64_t i = 0; i <= count; i++) {
        if (i < count) perf_raw_send(fd, data, (size_t)o->size);
        stamps[i] = perf_now_ns();
        if (i < count && !perf_raw_recv(o, fd, data, (size_t)o->size)) perf_die("the other end has closed", NULL);
    }
}

static int64_t perf_raw_one_way(const perf_options *o, int fd, unsigned char *data, int64_t count) {
    unsigned char done = 0;
    int64_t begin = perf_now_ns();
    for (int64_t i = 0; i < count; i++) perf_raw_send(fd, data, (size_t)o->size);
    if (!perf_raw_recv(o, fd, &done, 1)) perf_die("the other end has closed", NULL);
    return perf_now_ns() - begin;
}

static void perf_raw_socket(const perf_options *o, int64_t *stamps, perf_result *r) {
    struct sockaddr_in address;
    int listener = perf_tcp_listen(&address);
    perf_other other;
    perf_start(&other, o, perf_raw_socket_serve, &listener);
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    unsigned char *data = (unsigned char *)perf_memory((size_t)o->size);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address) != 0) perf_die("connect", NULL);
    perf_raw_no_delay(fd);
    if (perf_raw_stream(o)) perf_raw_one_way(o, fd, data, o->warmup);
    else perf_raw_echo(o, fd, data, stamps, o->warmup);
    double cpu = perf_cpu_s(other.pid);
    if (perf_raw_stream(o)) perf_throughput(r, perf_raw_one_way(o, fd, data, o->iters), o->iters, o->size);
    else perf_raw_echo(o, fd, data, stamps, o->iters);
    r->cpu_s = perf_cpu_s(other.pid) - cpu;
    close(fd);
    perf_join(&other);
}

// ---- raw: copies ----------------------------------------------------------------------------------------------------
//
// Of --size bytes into one of two buffers, as the ends of --test bw have them. How much is copied at a time is chosen
// before measuring begins, by trying; process_vm_readv is given all of it, for it goes page by page anyhow.

typedef struct perf_copy perf_copy;

struct perf_copy {
    const perf_options *o;
    unsigned char *from, *to[2];
    size_t         size, chunk;
    pid_t          owner;            // readv: whose memory `from` is, at that address
    int            tell;             // to whom it says that it has written there
    pthread_t      helper;           // readv2: the second thread, which reads the upper half
    unsigned char *helper_to;        // where to; NULL: it shall end
    uint32_t       asked, done;      // how often it was asked to, and has
};

#ifdef __SSE2__
static void perf_copy_nontemporal(unsigned char *to, const unsigned char *from, size_t size) {
    size_t whole = size & ~(size_t)63;               // cache lines; both begin one
    for (size_t i = 0; i < whole; i += 64) {
        __m128i a = _mm_load_si128((const __m128i *)(const void *)(from + i));
        __m128i b = _mm_load_si128((const __m128i *)(const void *)(from + i + 16));
        __m128i c = _mm_load_si128((const __m128i *)(const void *)(from + i + 32));
        __m128i d = _mm_load_si128((const __m128i *)(const void *)(from + i + 48));
        _mm_stream_si128((__m128i *)(void *)(to + i), a);
        _mm_stream_si128((__m128i *)(void *)(to + i + 16), b);
        _mm_stream_si128((__m128i *)(void *)(to + i + 32), c);
        _mm_stream_si128((__m128i *)(void *)(to + i + 48), d);
    }
    _mm_sfence();
    memcpy(to + whole, from + whole, size - whole);
}
#else
static void perf_copy_nontemporal(unsigned char *to, const unsigned char *from, size_t size) {
    memcpy(to, from, size);          // never asked for: perf_check_raw
}
#endif

static void perf_copy_readv(const perf_copy *copy, unsigned char *to, size_t at, size_t size) {
    while (size) {
        struct iovec here = {to + at, size}, there = {copy->from + at, size};
        ssize_t got = process_vm_readv(copy->owner, &here, 1, &there, 1, 0);
        if (got <= 0) perf_die("process_vm_readv", NULL);
        at += (size_t)got;
        size -= (size_t)got;
    }
}

// Waits until the other thread has counted that far. It has a core to itself, or else is let run.
static void perf_copy_until(const uint32_t *counter, uint32_t value) {
    while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) != value) sched_yield();
}

static void *perf_copy_help(void *user) {
    perf_copy *copy = (perf_copy *)user;
    perf_pin(copy->o, 1);
    for (uint32_t i = 1;; i++) {
        perf_copy_until(&copy->asked, i);
        if (!copy->helper_to) return NULL;
        perf_copy_readv(copy, copy->helper_to, copy->size / 2, copy->size - copy->size / 2);
        __atomic_store_n(&copy->done, i, __ATOMIC_RELEASE);
    }
}

static void perf_copy_ask(perf_copy *copy, unsigned char *to) {
    copy->helper_to = to;
    __atomic_store_n(&copy->asked, copy->asked + 1, __ATOMIC_RELEASE);
}

static void perf_copy_once(perf_copy *copy, unsigned char *to) {
    const perf_medium medium = copy->o->medium;
    if (medium == PERF_READV) perf_copy_readv(copy, to, 0, copy->size);
    else if (medium == PERF_READV2) {
        perf_copy_ask(copy, to);
        perf_copy_readv(copy, to, 0, copy->size / 2);
        perf_copy_until(&copy->done, copy->asked);
    } else for (size_t at = 0; at < copy->size; at += copy->chunk) {
        size_t some = copy->size - at < copy->chunk ? copy->size - at : copy->chunk;
        if (medium == PERF_MEMCPY) memcpy(to + at, copy->from + at, some);
        else perf_copy_nontemporal(to + at, copy->from + at, some);
    }
}

static int64_t perf_copy_many(perf_copy *copy, int64_t count) {
    int64_t begin = perf_now_ns();
    for (int64_t i = 0; i < count; i++) perf_copy_once(copy, copy->to[i & 1]);
    return perf_now_ns() - begin;
}

// The chunk that is fastest: the best of some tries of each.
static size_t perf_copy_choose(perf_copy *copy) {
    const size_t chunks[] = {copy->size, 4 * PERF_MIB, PERF_MIB, 256 * PERF_KIB, 64 * PERF_KIB};
    int64_t best_ns = INT64_MAX, tries = copy->size >= PERF_GIB ? 1 : 3;
    size_t best = copy->size;
    for (size_t i = 0; i < sizeof chunks / sizeof *chunks; i++) {
        copy->chunk = chunks[i];
        if (copy->chunk > copy->size) continue;
        for (int64_t k = 0; k < tries; k++) {
            int64_t took_ns = perf_copy_many(copy, 2);
            if (took_ns < best_ns) best_ns = took_ns, best = copy->chunk;
        }
    }
    return best;
}

// The owner of the memory: says where it is, and stays until this process ends. It is its own from the beginning, as a
// sender's is: pages that are copied after a fork lie otherwise, and copies from there have another speed.
static void perf_copy_own(const perf_options *o, void *user) {
    const perf_copy *copy = (const perf_copy *)user;
    const unsigned char *from = perf_pattern_memory(copy->size);
    (void)o;
    if (write(copy->tell, &from, sizeof from) != (ssize_t)sizeof from) perf_die("pipe", NULL);
    for (;;) pause();
}

static void perf_copy_start_owner(perf_copy *copy) {
    perf_other other;
    int tell[2];
    if (pipe(tell) != 0) perf_die("pipe", NULL);
    copy->tell = tell[1];
    perf_start(&other, copy->o, perf_copy_own, copy);
    close(tell[1]);
    if (read(tell[0], &copy->from, sizeof copy->from) != (ssize_t)sizeof copy->from)
        perf_die("the owner of the memory", NULL);
    close(tell[0]);
    copy->owner = other.pid;
}

static void perf_raw_copies(const perf_options *o, perf_result *r) {
    perf_copy copy = {.o = o, .size = (size_t)o->size, .chunk = (size_t)o->size};
    bool other_process = o->medium == PERF_READV || o->medium == PERF_READV2;
    if (!other_process) copy.from = perf_pattern_memory(copy.size);
    for (int i = 0; i < 2; i++) copy.to[i] = (unsigned char *)perf_memory(copy.size);
    if (other_process) perf_copy_start_owner(&copy);
    else perf_pin(o, 0), copy.chunk = perf_copy_choose(&copy);
    if (o->medium == PERF_READV2) {
        errno = pthread_create(&copy.helper, NULL, perf_copy_help, &copy);
        if (errno) perf_die("pthread_create", NULL);
    }
    perf_copy_many(&copy, o->warmup);
    double cpu = perf_cpu_s(0);
    perf_throughput(r, perf_copy_many(&copy, o->iters), o->iters, o->size);
    r->cpu_s = perf_cpu_s(0) - cpu;
    r->chunk = (double)copy.chunk;
    errno = EBADMSG;
    if (!perf_sample(copy.to[0], copy.size)) perf_die("a copy has other bytes", NULL);
    if (o->medium == PERF_READV2) {
        perf_copy_ask(&copy, NULL);
        pthread_join(copy.helper, NULL);
    }
}

static void perf_run_raw(const perf_options *o, perf_result *r) {
    bool line = o->medium == PERF_LINE;
    int64_t most = o->iters > o->warmup ? o->iters : o->warmup;
    snprintf(r->transport, sizeof r->transport, "%s", perf_medium_names[o->medium]);
    if (perf_copies(o)) {
        perf_raw_copies(o, r);
        return;
    }
    int64_t *stamps = (int64_t *)perf_memory(sizeof(int64_t) * (size_t)(most + 1));
    if (line) perf_raw_line(o, stamps, r);
    else perf_raw_socket(o, stamps, r);
    if (!line && perf_raw_stream(o)) return;
    perf_differences(stamps, o->iters);
    perf_distribution(r, stamps, o->iters);
}

// ---- main -----------------------------------------------------------------------------------------------------------

// What cannot be had is found out before there is a second process to say it again; by a process of its own where it is
// asked of the driver, which must not have been loaded before a fork. It has said why when it fails.
static void perf_try(const perf_options *o) {
    int status = 0;
    const pid_t pid = perf_on_gpu(o) ? fork() : 0;
    if (pid < 0) perf_die("fork", NULL);
    if (pid > 0) {
        if (waitpid(pid, &status, 0) != pid || !WIFEXITED(status)) perf_die("the driver", NULL);
        if (WEXITSTATUS(status) != 0) exit(WEXITSTATUS(status));
        return;
    }
    if (perf_on_gpu(o)) perf_gpu_look(o);
    if (o->test != PERF_RAW && (o->transport || o->channel)) tprpc_context_destroy(perf_context(o));
    if (perf_on_gpu(o)) exit(0);
}

int main(int argc, char **argv) {
    perf_options o = perf_parse(argc, argv);
    perf_result r = perf_result_empty();
    perf_raise_descriptors(&o);
    perf_try(&o);
    if (perf_bare_cuda(&o)) perf_raw_cuda(&o);
    else if (o.test == PERF_RAW || perf_between_agents(&o)) {
        if (o.test == PERF_RAW) perf_run_raw(&o, &r);
        else perf_run_agents(&o, &r);
        if (!o.listen) perf_print(&o, &r);           // the measuring end prints
    } else if (o.listen) {
        perf_serving serving = {.tell = -1, .address = o.listen};
        perf_pin(&o, 1);
        perf_serve(&o, &serving);
    } else perf_run_pipes(&o);
    return 0;
}
