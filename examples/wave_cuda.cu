// wave_cuda: wave.c's field on GPUs. Built by make where nvcc is; needs no image, and writes none.
//
// The field is cut into strips of rows, one for each worker process; there is a worker for each GPU, or several on one
// (-n). In every step a worker sends its outermost rows to its neighbours straight from GPU memory, each as a tensor in
// a call, and receives theirs in place: into the rows around its own strip, the halos. No process waits for a GPU: rows
// are sent and received in the order of the worker's stream, between the kernels that make the steps. The coordinator,
// this process, asks the workers for their strips, which it receives in host memory, and compares the field bit by bit
// with a run of its own on the CPU. (For that nothing may be contracted: nvcc -fmad=false, gcc -ffp-contract=off.)
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#include "tprpc_cuda.h"

#include <cuda_runtime.h>
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MAX_WORKERS = 64, MAX_CELLS = 1 << 26, START_MS = 30000, LEAVE_MS = 5000, WATCH_US = 100000 };
enum { ABOVE, BELOW };

struct settings { int workers, gpus, steps, every, width, height, corrupt; bool quiet; };   // corrupt: a step, -1: none

static char names[MAX_WORKERS + 2][24];         // worker 1 is "worker1"

// Says what is wrong; false.
#define COMPLAIN(...) (fprintf(stderr, "wave_cuda: " __VA_ARGS__), fprintf(stderr, "\n"), false)

static bool cuda_good(cudaError_t code, const char *what) {
    return code == cudaSuccess || COMPLAIN("%s: %s", what, cudaGetErrorString(code));
}

static int strip_first(const settings *o, int i) { return (int)((int64_t)o->height * i / o->workers); }
static int device_of(const settings *o, int number) { return (number - 1) % o->gpus; }
static tprpc_device gpu(int index) { return {TPRPC_CUDA, index}; }

static int64_t now_ns() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// ---- the simulation -------------------------------------------------------------------------------------------------

static __host__ __device__ float cell_step(float before, float mid, float up, float down, float left, float right) {
    const float speed = 0.04f, damping = 0.9999f;   // speed: squared, in cells per step; stable up to 0.5
    return mid + damping * (mid - before) + speed * (up + down + left + right - 4.0f * mid);
}

// The cell in row y, 1 to `rows`, of the level after `now`. Rows 0 and rows + 1 are halos, not used where the strip
// ends at the field's `top` or `bottom`: waves are reflected there. `next` holds the level before `now`.
static __host__ __device__ void strip_cell(float *next, const float *now, int rows, int width, bool top, bool bottom,
                                           int y, int x) {
    const float *mid = now + (size_t)y * width;
    const float *up = y == 1 && top ? mid : mid - width, *down = y == rows && bottom ? mid : mid + width;
    float *to = next + (size_t)y * width + x;
    *to = cell_step(*to, mid[x], up[x], down[x], mid[x > 0 ? x - 1 : x], mid[x < width - 1 ? x + 1 : x]);
}

static __global__ void strip_step(float *next, const float *now, int rows, int width, bool top, bool bottom) {
    const int x = (int)(blockIdx.x * blockDim.x + threadIdx.x), y = (int)blockIdx.y + 1;
    if (x < width) strip_cell(next, now, rows, width, top, bottom, y, x);
}

static __global__ void row_change(float *row, int width) {
    const int x = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (x < width) row[x] += 0.25f;
}

// A drop that has just fallen: a round hill.
static float field_start(const settings *o, int y, int x) {
    const int dy = y - o->height / 3, dx = x - o->width / 3, reach = o->width / 12 + 2;
    const int far = dx * dx + dy * dy;
    return far < reach * reach ? 1.0f - (float)far / (float)(reach * reach) : 0.0f;
}

// Rows of the field at its start, with a halo above and one below; the caller frees it.
static float *strip_start(const settings *o, int first, int rows) {
    float *cells = (float *)calloc((size_t)(rows + 2) * o->width, sizeof(float));
    for (int y = 0; cells && y < rows; y++)
        for (int x = 0; x < o->width; x++) cells[(size_t)(y + 1) * o->width + x] = field_start(o, first + y, x);
    return cells;
}

// ---- a worker -------------------------------------------------------------------------------------------------------

struct worker;

struct side {                            // what a worker keeps for one of its two neighbours
    worker *owner;
    int     neighbour;                   // its number; 0 where the field ends
    tprpc_method_id method;              // what takes our row there
    int     edge, halo;                  // our row that it needs; where its row goes
    int     received, answered, released;        // its rows that came; our rows that it answered, and has read
};

struct worker {
    const settings *o;
    tprpc_context  *context;
    tprpc_agent    *agent;
    int          number, device, rows;
    cudaStream_t stream;
    float       *memory, *levels[2];     // level k is in levels[k & 1]
    side         sides[2];
    int          level, goal;
    tprpc_request advance;               // to be answered when level is goal
    tprpc_error  error;                  // of the first call that failed
};

// A neighbour gets past level k only with our row of level k, so its row of level k + 1 can come while we work on level
// k, and goes to the other of the two levels. The kernel that reads there last was queued before our row was sent.
static tprpc_status halo_place(tprpc_placement *placement, void *user) {
    const side *s = (const side *)user;
    const worker *w = s->owner;
    const tprpc_message *m = placement->descriptor;
    int level;
    if (m->metadata_size != sizeof level || m->tensor_count != 1 || m->tensors[0].size != w->o->width * sizeof(float))
        return TPRPC_ERROR_INVALID;
    memcpy(&level, m->metadata, sizeof level);
    if (level != s->received || level > w->level + 1) return TPRPC_ERROR_INVALID;
    placement->tensors[0].data = w->levels[level & 1] + (size_t)s->halo * w->o->width;
    placement->tensors[0].stream = w->stream;
    return TPRPC_OK;
}

// The row is there in the order of the stream, which goes for whatever is queued from here on.
static void on_halo(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    const worker *w = s->owner;
    if (s->received++ == w->o->corrupt && w->number == 2 && s == &w->sides[ABOVE])
        row_change<<<(w->o->width + 255) / 256, 256, 0, w->stream>>>((float *)message->tensors[0].data, w->o->width);
    tprpc_reply(request, NULL);
}

static void on_halo_done(tprpc_status status, const tprpc_message *, const tprpc_error *error, void *user) {
    side *s = (side *)user;
    s->answered++;
    if (status != TPRPC_OK && !s->owner->error.status) s->owner->error = *error;
}

static void on_halo_released(void *user) { ((side *)user)->released++; }

static bool halo_send(worker *w, side *s) {
    tprpc_tensor row = {};
    tprpc_message message = {};
    tprpc_call_options options = {};
    row.data = w->levels[w->level & 1] + (size_t)s->edge * w->o->width;
    row.size = w->o->width * sizeof(float);
    row.device = gpu(w->device);
    row.stream = w->stream;
    row.target = gpu(device_of(w->o, s->neighbour));
    message.metadata = &w->level;
    message.metadata_size = sizeof w->level;
    message.tensors = &row;
    message.tensor_count = 1;
    message.release = on_halo_released;
    message.release_user = s;
    options.on_done = on_halo_done;
    options.user = s;
    options.error = &w->error;
    return !tprpc_call_id(w->agent, s->method, &message, &options, NULL);
}

// The next step writes where our row of the level before this one was lent from.
static bool halo_moved(const worker *w, const side *s) {
    return !s->neighbour || (s->received > w->level && s->answered > w->level && s->released >= w->level);
}

static bool worker_exchange(worker *w) {
    for (side *s = w->sides; s < w->sides + 2; s++)
        if (s->neighbour && !halo_send(w, s)) return false;
    while (!w->error.status && !(halo_moved(w, &w->sides[ABOVE]) && halo_moved(w, &w->sides[BELOW])))
        tprpc_poll(w->context, TPRPC_FOREVER, 0);
    return !w->error.status;
}

// The strip goes to the coordinator's host memory, in the order of the stream, with the tensor bytes that came here.
static void worker_reply(worker *w) {
    tprpc_stats stats = {};
    tprpc_tensor strip = {};
    tprpc_message reply = {};
    tprpc_agent_get_stats(w->agent, &stats, sizeof stats);
    strip.data = w->levels[w->level & 1] + w->o->width;
    strip.size = (size_t)w->rows * w->o->width * sizeof(float);
    strip.device = gpu(w->device);
    strip.stream = w->stream;
    strip.target = {TPRPC_CPU, 0};
    reply.metadata = &stats.tensor_bytes_received;
    reply.metadata_size = sizeof stats.tensor_bytes_received;
    reply.tensors = &strip;
    reply.tensor_count = 1;
    tprpc_reply(w->advance, &reply);
}

static void worker_advance(worker *w) {
    const dim3 blocks((unsigned)(w->o->width + 255) / 256, (unsigned)w->rows);
    for (; w->level < w->goal; w->level++) {
        if (!worker_exchange(w)) {
            tprpc_fail(w->advance, 1, w->error.text);
            w->goal = w->level;
            return;
        }
        strip_step<<<blocks, 256, 0, w->stream>>>(w->levels[(w->level + 1) & 1], w->levels[w->level & 1], w->rows,
                                                  w->o->width, !w->sides[ABOVE].neighbour, !w->sides[BELOW].neighbour);
    }
    const cudaError_t code = cudaGetLastError();
    if (code == cudaSuccess) worker_reply(w);
    else tprpc_fail(w->advance, 3, cudaGetErrorString(code));
}

// Keeps the request: the steps are made in worker_main's loop, not in a callback.
static void on_advance(tprpc_request request, const tprpc_message *message, void *user) {
    worker *w = (worker *)user;
    int goal = 0;
    if (message->metadata_size == sizeof goal) memcpy(&goal, message->metadata, sizeof goal);
    if (w->goal > w->level || goal <= w->level) {
        tprpc_fail(request, 2, "no level to advance to");
        return;
    }
    w->goal = goal;
    w->advance = request;
    tprpc_request_keep(request);
}

// Both levels are one piece of memory, which the neighbours may read straight.
static bool worker_memory(worker *w, int first) {
    const size_t level = (size_t)(w->rows + 2) * w->o->width, bytes = level * sizeof(float);
    float *start = strip_start(w->o, first, w->rows);
    bool good = start || COMPLAIN("no memory for %d rows", w->rows);
    good = good && cuda_good(cudaSetDevice(w->device), "cudaSetDevice") &&
           cuda_good(cudaStreamCreateWithFlags(&w->stream, cudaStreamNonBlocking), "cudaStreamCreate") &&
           cuda_good(cudaMalloc((void **)&w->memory, 2 * bytes), "cudaMalloc");
    for (int i = 0; i < 2 && good; i++) {
        w->levels[i] = w->memory + (size_t)i * level;
        good = cuda_good(cudaMemcpy(w->levels[i], start, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
    }
    free(start);
    return good;
}

static bool agent_create(const settings *o, const char *store, int rank, tprpc_context **context, tprpc_agent **agent,
                         tprpc_error *error) {
    tprpc_context_desc polled = {};
    tprpc_agent_desc desc = {};
    polled.backends = tprpc_cuda_backends(&polled.backend_count);
    if (sysconf(_SC_NPROCESSORS_ONLN) <= o->workers) polled.spin_us = TPRPC_NOW;   // others need this processor
    if (tprpc_context_create(&polled, context, error)) return false;
    desc.context = *context;
    desc.name = rank ? names[rank] : "coordinator";
    desc.init_method = store;
    desc.rank = rank;
    desc.world_size = o->workers + 1;
    desc.start_timeout_ms = START_MS;
    return !tprpc_agent_create(&desc, agent, error);
}

static bool worker_method(worker *w, const char *name, tprpc_handler handler, tprpc_place place, void *user) {
    tprpc_method_desc method = {};
    method.name = name;
    method.handler = handler;
    method.place = place;
    method.user = user;
    return !tprpc_agent_register(w->agent, &method, &w->error);
}

static bool worker_join(worker *w, const char *store) {
    static const char *const takes[2] = {"halo_below", "halo_above"};   // our row at the neighbour on either side
    if (!agent_create(w->o, store, w->number, &w->context, &w->agent, &w->error) ||
        tprpc_cuda_register(w->context, w->device, w->memory,
                            2 * (size_t)(w->rows + 2) * w->o->width * sizeof(float), &w->error) ||
        !worker_method(w, "halo_above", on_halo, halo_place, &w->sides[ABOVE]) ||
        !worker_method(w, "halo_below", on_halo, halo_place, &w->sides[BELOW]) ||
        !worker_method(w, "advance", on_advance, NULL, w) || tprpc_agent_wait_ready(w->agent, 0, &w->error))
        return false;
    for (int i = ABOVE; i <= BELOW; i++)
        if (w->sides[i].neighbour &&
            tprpc_resolve(w->agent, names[w->sides[i].neighbour], takes[i], &w->sides[i].method, &w->error))
            return false;
    return true;
}

// A worker process, from its start to its exit status. It ends without giving GPU memory back: its end does.
static int worker_main(const settings *o, const char *store, int number) {
    const int first = strip_first(o, number - 1);
    worker w = {};
    w.o = o;
    w.number = number;
    w.device = device_of(o, number);
    w.rows = strip_first(o, number) - first;
    w.sides[ABOVE].neighbour = number - 1;
    w.sides[ABOVE].edge = 1;
    w.sides[BELOW].neighbour = number < o->workers ? number + 1 : 0;
    w.sides[BELOW].edge = w.rows;
    w.sides[BELOW].halo = w.rows + 1;
    w.sides[ABOVE].owner = w.sides[BELOW].owner = &w;
    if (!worker_memory(&w, first)) return 1;
    bool good = worker_join(&w, store);
    while (good && w.level < o->steps) {
        if (w.level < w.goal) worker_advance(&w);
        else tprpc_poll(w.context, TPRPC_FOREVER, 0);
    }
    good = good && !tprpc_agent_leave(w.agent, TPRPC_FOREVER, &w.error);   // we wait for the last strip
    if (!good) (void)COMPLAIN("%s: %s", names[number], w.error.text);
    tprpc_agent_destroy(w.agent);
    tprpc_context_destroy(w.context);
    return !good;
}

// ---- the coordinator ------------------------------------------------------------------------------------------------

struct coordinator;

struct remote {                          // a worker as the coordinator sees it
    coordinator *owner;
    const char  *name;
    pid_t    pid;                        // 0 once it has ended
    float   *strip;                      // where its strip goes
    size_t   strip_bytes;
    uint64_t received;                   // tensor bytes that came to it
};

struct coordinator {
    const settings *o;
    tprpc_context  *context;
    tprpc_agent    *agent;
    remote      remotes[MAX_WORKERS];
    int         calling;                 // calls not ended
    tprpc_error error;                   // of the first call that failed
    float      *cells;                   // the field
};

// The kernel ends the workers when this process dies, however that happens. No CUDA call comes before the last fork.
static bool workers_start(coordinator *c, const char *store) {
    const pid_t parent = getpid();
    fflush(NULL);
    for (int i = 0; i < c->o->workers; i++) {
        const pid_t pid = fork();
        if (pid < 0) return COMPLAIN("no process for %s: %s", names[i + 1], strerror(errno));
        if (!pid) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            _exit(getppid() == parent ? worker_main(c->o, store, i + 1) : 1);
        }
        c->remotes[i].owner = c;
        c->remotes[i].name = names[i + 1];
        c->remotes[i].pid = pid;
    }
    return true;
}

static void workers_kill(coordinator *c) {
    for (remote *r = c->remotes; r < c->remotes + c->o->workers; r++) {
        if (!r->pid) continue;
        kill(r->pid, SIGKILL);
        waitpid(r->pid, NULL, 0);
    }
}

// Whether no worker has ended that should not have.
static bool workers_live(coordinator *c) {
    for (remote *r = c->remotes; r < c->remotes + c->o->workers; r++) {
        int how = 0;
        if (!r->pid || waitpid(r->pid, &how, WNOHANG) != r->pid) continue;
        r->pid = 0;
        return COMPLAIN("%s died (wait status %d)%s%s", r->name, how, c->error.status ? ": " : "", c->error.text);
    }
    return true;
}

static bool workers_join(coordinator *c) {
    for (remote *r = c->remotes; r < c->remotes + c->o->workers; r++) {
        int how = 0;
        waitpid(r->pid, &how, 0);
        r->pid = 0;
        if (how) return COMPLAIN("%s ended badly (wait status %d)", r->name, how);
    }
    return true;
}

// Waits until everything begun has ended well.
static bool wait_calls(coordinator *c) {
    while (c->calling && !c->error.status) {
        tprpc_poll(c->context, WATCH_US, 0);
        if (!workers_live(c)) return false;
    }
    if (!c->error.status) return true;
    return workers_live(c) && COMPLAIN("%s", c->error.text);
}

static void on_ready(tprpc_status status, const tprpc_message *, const tprpc_error *error, void *user) {
    coordinator *c = (coordinator *)user;
    c->calling--;
    if (status) c->error = *error;
}

static tprpc_status strip_place(tprpc_placement *placement, void *user) {
    const remote *r = (const remote *)user;
    const tprpc_message *m = placement->descriptor;
    if (m->tensor_count != 1 || m->tensors[0].size != r->strip_bytes) return TPRPC_ERROR_INVALID;
    placement->tensors[0].data = r->strip;
    return TPRPC_OK;
}

static void on_strip(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    remote *r = (remote *)user;
    r->owner->calling--;
    if (status != TPRPC_OK && !r->owner->error.status) r->owner->error = *error;
    if (status == TPRPC_OK && reply->metadata_size == sizeof r->received)
        memcpy(&r->received, reply->metadata, sizeof r->received);
}

// Asks every worker for its strip at a level.
static bool call_advance(coordinator *c, int level) {
    for (int i = 0; i < c->o->workers; i++) {
        remote *r = &c->remotes[i];
        tprpc_message message = {};
        tprpc_call_options options = {};
        const int first = strip_first(c->o, i), after = strip_first(c->o, i + 1);
        r->strip = c->cells + (size_t)first * c->o->width;
        r->strip_bytes = (size_t)(after - first) * c->o->width * sizeof(float);
        message.metadata = &level;
        message.metadata_size = sizeof level;
        options.timeout_ms = TPRPC_FOREVER;
        options.on_done = on_strip;
        options.place = strip_place;
        options.user = r;
        options.error = &c->error;
        if (tprpc_call(c->agent, r->name, "advance", &message, &options, NULL)) return COMPLAIN("%s", c->error.text);
        c->calling++;
    }
    return wait_calls(c);
}

// Between workers only halos move, and workers receive nothing else; so the library's counters must say just this.
static bool check_bytes(const coordinator *c) {
    const uint64_t row = c->o->width * sizeof(float);
    const uint64_t expected = (uint64_t)c->o->steps * (uint64_t)(c->o->workers - 1) * 2 * row;
    uint64_t received = 0;
    for (int i = 0; i < c->o->workers; i++) received += c->remotes[i].received;
    if (!c->o->quiet) printf("halos: %" PRIu64 " bytes expected, %" PRIu64 " counted\n", expected, received);
    return received == expected || COMPLAIN("the bytes counted are not those of the halos");
}

// Runs the same field on the CPU and compares it bit by bit.
static bool check_field(const coordinator *c) {
    const settings *o = c->o;
    const int64_t began = now_ns();
    const size_t count = (size_t)o->width * o->height;
    float *levels[2] = {strip_start(o, 0, o->height), strip_start(o, 0, o->height)};
    if (!levels[0] || !levels[1]) return COMPLAIN("no memory");
    for (int k = 0; k < o->steps; k++)
        for (int y = 1; y <= o->height; y++)
            for (int x = 0; x < o->width; x++)
                strip_cell(levels[(k + 1) & 1], levels[k & 1], o->height, o->width, true, true, y, x);
    const float *alone = levels[o->steps & 1] + o->width;
    size_t differ = 0;
    for (size_t i = 0; i < count; i++) differ += memcmp(&alone[i], &c->cells[i], sizeof(float)) != 0;
    free(levels[0]);
    free(levels[1]);
    if (differ) return COMPLAIN("%zu of %zu cells differ from those of one process on the CPU", differ, count);
    if (!o->quiet) printf("one process on the CPU: the same %zu cells bit for bit, %.0f steps/s\n", count,
                          o->steps * 1e9 / (double)(now_ns() - began));
    return true;
}

static bool run(coordinator *c, const char *store) {
    const settings *o = c->o;
    if (!workers_start(c, store)) return false;
    c->calling = 1;
    if (!agent_create(o, store, 0, &c->context, &c->agent, &c->error) ||
        tprpc_agent_start(c->agent, on_ready, c, &c->error)) return COMPLAIN("%s", c->error.text);
    if (!wait_calls(c)) return false;
    const int64_t began = now_ns();
    for (int level = 0; level < o->steps;) {
        level = o->steps - level < o->every ? o->steps : level + o->every;
        if (!call_advance(c, level)) return false;
    }
    const double seconds = (double)(now_ns() - began) / 1e9;
    if (!o->quiet)
        printf("%d workers on %d GPU%s, %d x %d cells, %d steps in %.2f s: %.0f steps/s\n", o->workers, o->gpus,
               o->gpus == 1 ? "" : "s", o->width, o->height, o->steps, seconds, o->steps / seconds);
    if (tprpc_agent_leave(c->agent, LEAVE_MS, &c->error)) return COMPLAIN("%s", c->error.text);
    const bool ended = workers_join(c), bytes = check_bytes(c), same = check_field(c);
    return ended && bytes && same;
}

// How many GPUs there are. Asked by a process of its own, for the driver does not live on in a fork.
static int count_gpus() {
    int how = 0;
    const pid_t pid = fork();
    if (!pid) {
        int count = 0;
        _exit(cuda_good(cudaGetDeviceCount(&count), "no GPU") ? count : 0);
    }
    return pid > 0 && waitpid(pid, &how, 0) == pid && WIFEXITED(how) ? WEXITSTATUS(how) : 0;
}

static bool parse(settings *o, char **argv) {
    const struct { const char *name; int least, most, *number; } all[] = {
        {"-n", 1, MAX_WORKERS, &o->workers}, {"--steps", 1, 1 << 30, &o->steps}, {"--every", 1, 1 << 30, &o->every},
        {"--width", 2, 1 << 16, &o->width}, {"--height", 2, 1 << 16, &o->height},
        {"--corrupt", 0, 1 << 30, &o->corrupt}};
    const size_t count = sizeof all / sizeof *all;
    while (*++argv) {
        size_t i = 0;
        char *end = NULL;
        if (!strcmp(*argv, "--quiet")) { o->quiet = true; continue; }
        while (i < count && strcmp(*argv, all[i].name)) i++;
        if (i == count || !argv[1])
            return COMPLAIN("%s? Options: -n workers, --steps N, --every N (steps between strips), --width N, "
                            "--height N, --corrupt STEP, --quiet", *argv);
        const long value = strtol(*++argv, &end, 10);
        if (*end || end == *argv || value < all[i].least || value > all[i].most)
            return COMPLAIN("%s: a number from %d to %d", all[i].name, all[i].least, all[i].most);
        *all[i].number = (int)value;
    }
    return (int64_t)o->width * o->height <= MAX_CELLS || COMPLAIN("at most %d cells", (int)MAX_CELLS);
}

int main(int, char **argv) {
    static coordinator c;
    settings o = {};
    char store[64];
    o.steps = 2000;
    o.every = 500;
    o.width = 1024;
    o.height = 768;
    o.corrupt = -1;
    if (!parse(&o, argv)) return 1;
    o.gpus = count_gpus();
    if (!o.gpus) return 1;
    if (!o.workers) o.workers = o.gpus > 1 ? o.gpus : 2;
    if (o.workers > o.height) return !COMPLAIN("more workers than rows");
    if (o.corrupt >= 0 && (o.corrupt >= o.steps || o.workers < 2)) return !COMPLAIN("no halo moves at that step");
    for (int i = 0; i < MAX_WORKERS + 2; i++) snprintf(names[i], sizeof names[i], "worker%d", i);
    snprintf(store, sizeof store, "file:///tmp/wave_cuda-%d", (int)getpid());   // where the workers find each other
    c.o = &o;
    c.cells = (float *)calloc((size_t)o.width * o.height, sizeof(float));
    const bool good = c.cells ? run(&c, store) : COMPLAIN("no memory");
    workers_kill(&c);
    unlink(store + strlen("file://"));
    tprpc_agent_destroy(c.agent);
    tprpc_context_destroy(c.context);
    free(c.cells);
    return !good;
}
