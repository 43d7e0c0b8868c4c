// wave: one wave field, simulated by several processes together.
//
// The start of the field is read from a PNG image. It is cut into strips of rows, one for each worker process. In every
// step a worker sends its outermost rows to its neighbours, each as a tensor in a call, and receives theirs in place:
// into the rows around its own strip, the halos. The coordinator, this process, asks the workers to advance to a level
// in time; the reply carries the strip, which it receives in place in a picture of the whole field. In the end it
// compares the result bit by bit with a run of its own, and the bytes that the library counted with those of the halos.
//
// Calls: "halo_above" and "halo_below" between workers, "advance" from the coordinator to a worker. No process has a
// second thread: all callbacks run within tprpc_poll.
#define TPRPC_IMPLEMENTATION
#include "tprpc.h"
#include "wave_field.h"

#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_WORKERS = 64, START_MS = 10000, LEAVE_MS = 1500, WATCH_US = 100000, DEATH_MS = 500 };
enum { ABOVE, BELOW };

typedef struct settings {
    const char *image, *out, *transport;
    int workers, steps, every, size, corrupt;   // size: columns, 0: as the image; corrupt: a step, -1: none
    bool quiet;
} settings;

static char names[MAX_WORKERS + 2][24];         // worker 1 is "worker1"

// The first row of worker i + 1.
static size_t strip_first(const settings *o, const field *start, int i) {
    return start->height * (size_t)i / (size_t)o->workers;
}

// ---- a worker -------------------------------------------------------------------------------------------------------

static bool agent_create(const settings *o, const char *store, const char *name, int rank, tprpc_context **context,
                         tprpc_agent **agent, tprpc_error *error) {
    // A wait spins before it sleeps: faster where each process has a processor, slower where others need this one.
    const bool spin = sysconf(_SC_NPROCESSORS_ONLN) > o->workers;
    const tprpc_context_desc polled = {.transports = o->transport, .spin_us = spin ? 0 : TPRPC_NOW};
    if (tprpc_context_create(&polled, context, error)) return false;
    const tprpc_agent_desc desc = {.context = *context, .name = name, .init_method = store, .rank = rank,
                                   .world_size = o->workers + 1, .start_timeout_ms = START_MS};
    return !tprpc_agent_create(&desc, agent, error);
}

typedef struct side {                    // what a worker keeps for one of its two neighbours
    struct worker *worker;
    const char *name;                    // NULL where the field ends
    tprpc_method_id method;              // what takes our row there
    size_t  edge, halo;                  // our row that it needs; where its row goes
    int32_t received, answered;          // its rows that came; our rows that it answered
    int64_t called_ns;
} side;

typedef struct worker {
    const settings *settings;
    tprpc_context  *context;
    tprpc_agent    *agent;
    int     number;                      // 1 to settings->workers, the rank as well
    size_t  rows, width;
    float  *levels[2];                   // level k is kept in levels[k & 1]
    side    sides[2];
    int32_t level, goal;
    tprpc_request advance;               // to be answered when level is goal
    timing  timing;                      // of halo calls, since the last report
    tprpc_error error;                   // of the first call that failed
} worker;

typedef struct report {                  // goes with each strip; both ends are this program, so it travels as it is
    timing   timing;
    uint64_t received;                   // tensor bytes from everybody
    tprpc_pipe_info sides[2];            // of the pipes to the neighbours
} report;

// A neighbour gets past level k only with our row of level k. So its row of level k + 1 can come while we still work on
// level k, and goes to the other of the two levels; its row of level k + 2 cannot.
static tprpc_status halo_place(tprpc_placement *placement, void *user) {
    const side *s = (const side *)user;
    const worker *w = s->worker;
    const tprpc_message *m = placement->descriptor;
    int32_t level;
    if (m->metadata_size != sizeof level || m->tensor_count != 1 || m->tensors[0].size != w->width * sizeof(float))
        return TPRPC_ERROR_INVALID;
    memcpy(&level, m->metadata, sizeof level);
    if (level != s->received || level > w->level + 1) return TPRPC_ERROR_INVALID;
    placement->tensors[0].data = w->levels[level & 1] + s->halo * w->width;
    return TPRPC_OK;
}

static void on_halo(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    const worker *w = s->worker;
    if (s->received++ == w->settings->corrupt && w->number == 2 && s == &w->sides[ABOVE])
        for (size_t x = 0; x < w->width; x++) ((float *)message->tensors[0].data)[x] += 0.25f;
    tprpc_reply(request, NULL);
}

static void on_halo_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    side *s = (side *)user;
    (void)reply;
    s->answered++;
    if (status == TPRPC_OK) timing_add(&s->worker->timing, now_ns() - s->called_ns);
    else if (!s->worker->error.status) s->worker->error = *error;
}

static bool halo_send(worker *w, side *s) {
    const tprpc_tensor row = {.data = w->levels[w->level & 1] + s->edge * w->width, .size = w->width * sizeof(float),
                              .dtype = TPRPC_F32, .ndim = 1, .shape = {(int64_t)w->width}};
    const tprpc_message message = {.metadata = &w->level, .metadata_size = sizeof w->level,
                                   .tensors = &row, .tensor_count = 1};
    const tprpc_call_options options = {.on_done = on_halo_done, .user = s, .error = &w->error};
    s->called_ns = now_ns();
    return !tprpc_call_id(w->agent, s->method, &message, &options, NULL);
}

static bool halo_moved(const worker *w, const side *s) {
    return !s->name || (s->received > w->level && s->answered > w->level);
}

// Sends our rows of this level to the neighbours, and waits for theirs. Should one die that has answered but not sent
// its own, the coordinator, whose call to it fails, ends us all.
static bool worker_exchange(worker *w) {
    for (side *s = w->sides; s < w->sides + 2; s++)
        if (s->name && !halo_send(w, s)) return false;
    while (!w->error.status && !(halo_moved(w, &w->sides[ABOVE]) && halo_moved(w, &w->sides[BELOW])))
        tprpc_poll(w->context, TPRPC_FOREVER, 0);
    return !w->error.status;
}

static void worker_reply(worker *w) {
    tprpc_stats stats = {0};
    report r = {.timing = w->timing};
    tprpc_agent_get_stats(w->agent, &stats, sizeof stats);
    r.received = stats.tensor_bytes_received;
    for (int i = ABOVE; i <= BELOW; i++)
        if (w->sides[i].name) tprpc_agent_get_peer_info(w->agent, w->sides[i].name, &r.sides[i], sizeof r.sides[i]);
    const tprpc_tensor strip = {.data = w->levels[w->level & 1] + w->width, .size = w->rows * w->width * sizeof(float),
                                .dtype = TPRPC_F32, .ndim = 2, .shape = {(int64_t)w->rows, (int64_t)w->width}};
    const tprpc_message reply = {.metadata = &r, .metadata_size = sizeof r, .tensors = &strip, .tensor_count = 1};
    tprpc_reply(w->advance, &reply);
    memset(&w->timing, 0, sizeof w->timing);
}

static void worker_advance(worker *w) {
    for (; w->level < w->goal; w->level++) {
        if (!worker_exchange(w)) {
            tprpc_fail(w->advance, 1, w->error.text);
            w->goal = w->level;
            return;
        }
        strip_step(w->levels[(w->level + 1) & 1], w->levels[w->level & 1], w->rows, w->width, !w->sides[ABOVE].name,
                   !w->sides[BELOW].name);
    }
    worker_reply(w);
}

// Keeps the request: the steps are made in worker_main's loop, not in a callback.
static void on_advance(tprpc_request request, const tprpc_message *message, void *user) {
    worker *w = (worker *)user;
    int32_t goal = 0;
    if (message->metadata_size == sizeof goal) memcpy(&goal, message->metadata, sizeof goal);
    if (w->goal > w->level || goal <= w->level) {
        tprpc_fail(request, 2, "no level to advance to");
        return;
    }
    w->goal = goal;
    w->advance = request;
    tprpc_request_keep(request);
}

static bool worker_join(worker *w, const char *store) {
    const tprpc_method_desc methods[] = {
        {.name = "halo_above", .handler = on_halo, .place = halo_place, .user = &w->sides[ABOVE]},
        {.name = "halo_below", .handler = on_halo, .place = halo_place, .user = &w->sides[BELOW]},
        {.name = "advance", .handler = on_advance, .user = w}};
    static const char *const takes[2] = {"halo_below", "halo_above"};   // our row at the neighbour on either side
    if (!agent_create(w->settings, store, names[w->number], w->number, &w->context, &w->agent, &w->error)) return false;
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (tprpc_agent_register(w->agent, &methods[i], &w->error)) return false;
    if (tprpc_agent_wait_ready(w->agent, 0, &w->error)) return false;
    for (int i = ABOVE; i <= BELOW; i++)
        if (w->sides[i].name && tprpc_resolve(w->agent, w->sides[i].name, takes[i], &w->sides[i].method, &w->error))
            return false;
    return true;
}

// A worker process, from its start to its exit status.
static int worker_main(const settings *o, const field *start, const char *store, int number) {
    const size_t first = strip_first(o, start, number - 1), rows = strip_first(o, start, number) - first;
    worker w = {.settings = o, .number = number, .width = start->width, .rows = rows};
    w.sides[ABOVE] = (side){.worker = &w, .name = number > 1 ? names[number - 1] : NULL, .edge = 1, .halo = 0};
    w.sides[BELOW] = (side){.worker = &w, .name = number < o->workers ? names[number + 1] : NULL, .edge = rows,
                            .halo = rows + 1};
    if (!strip_create(w.levels, start, first, rows)) return 1;
    bool good = worker_join(&w, store);
    while (good && w.level < o->steps) {
        if (w.level < w.goal) worker_advance(&w);
        else tprpc_poll(w.context, TPRPC_FOREVER, 0);
    }
    good = good && !tprpc_agent_leave(w.agent, TPRPC_FOREVER, &w.error);   // we wait for the last frame
    if (!good) (void)COMPLAIN("%s: %s", names[number], w.error.text);
    tprpc_agent_destroy(w.agent);
    tprpc_context_destroy(w.context);
    free(w.levels[0]);
    free(w.levels[1]);
    return !good;
}

// ---- the coordinator: processes -------------------------------------------------------------------------------------

typedef struct remote {                  // a worker as the coordinator sees it
    struct coordinator *coordinator;
    const char *name;
    pid_t   pid;                         // 0 once it has ended
    int     how;                         // wait status
    float  *strip;                       // where the strip that it is asked for goes
    size_t  strip_bytes;
    report  report;                      // what came with its last strip
} remote;

typedef struct coordinator {
    const settings *settings;
    const field    *start;
    tprpc_context  *context;
    tprpc_agent    *agent;
    remote  remotes[MAX_WORKERS], *end;
    int     calling;                     // calls not ended
    tprpc_error error;                   // of the first call that failed
    float  *frames[2];                   // one is written as a picture while the other is received
    timing  all, recent;                 // recent: since the last line of progress
    int64_t line_ns;
    int     line_level;
} coordinator;

// The kernel ends the workers when this process dies, however that happens.
static bool workers_start(coordinator *c, const char *store) {
    const pid_t parent = getpid();
    fflush(NULL);
    for (int i = 0; i < c->settings->workers; i++) {
        const pid_t pid = fork();
        if (pid < 0) return COMPLAIN("no process for %s: %s", names[i + 1], strerror(errno));
        if (!pid) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            _exit(getppid() == parent ? worker_main(c->settings, c->start, store, i + 1) : 1);
        }
        c->remotes[i] = (remote){.coordinator = c, .name = names[i + 1], .pid = pid};
        c->end = &c->remotes[i + 1];
    }
    return true;
}

static void workers_kill(coordinator *c) {
    for (remote *r = c->remotes; r < c->end; r++) {
        if (!r->pid) continue;
        kill(r->pid, SIGKILL);
        waitpid(r->pid, NULL, 0);
    }
}

// A worker that has ended, or ends within the given time; NULL when none does.
static remote *workers_ended(coordinator *c, int wait_ms) {
    for (;; wait_ms--) {
        for (remote *r = c->remotes; r < c->end; r++) {
            if (!r->pid || waitpid(r->pid, &r->how, WNOHANG) != r->pid) continue;
            r->pid = 0;
            return r;
        }
        if (wait_ms <= 0) return NULL;
        nanosleep(&(const struct timespec){0, 1000000}, NULL);
    }
}

// Says why the run ends, and which worker died, if one did: a call may fail a moment before its process has ended.
static bool workers_lost(coordinator *c, const remote *dead) {
    const char *why = c->error.status ? c->error.text : "its process ended";
    if (!dead) dead = workers_ended(c, DEATH_MS);
    if (!dead) return COMPLAIN("%s", why);
    const bool killed = WIFSIGNALED(dead->how);
    return COMPLAIN("%s died (%s %d): %s", dead->name, killed ? "signal" : "exit status",
                    killed ? WTERMSIG(dead->how) : WEXITSTATUS(dead->how), why);
}

// Whether all of them end well, in time.
static bool workers_join(coordinator *c) {
    for (int left = c->settings->workers; left; left--) {
        const remote *r = workers_ended(c, LEAVE_MS);
        if (!r) return COMPLAIN("%d workers did not end", left);
        if (r->how) return COMPLAIN("%s ended badly (wait status %d)", r->name, r->how);
    }
    return true;
}

// ---- the coordinator: calls -----------------------------------------------------------------------------------------

// Waits until everything begun has ended well. A worker's death fails the calls to it; that its process has ended is
// looked for beside, so that the run would end even if nobody noticed the death.
static bool wait_calls(coordinator *c) {
    while (c->calling && !c->error.status) {
        tprpc_poll(c->context, WATCH_US, 0);
        const remote *dead = workers_ended(c, 0);
        if (dead) return workers_lost(c, dead);
    }
    return !c->error.status || workers_lost(c, NULL);
}

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    coordinator *c = (coordinator *)user;
    (void)reply;
    c->calling--;
    if (status) c->error = *error;
}

static bool coordinator_join(coordinator *c, const char *store) {
    c->calling = 1;
    if (!agent_create(c->settings, store, "coordinator", 0, &c->context, &c->agent, &c->error) ||
        tprpc_agent_start(c->agent, on_ready, c, &c->error)) return workers_lost(c, NULL);
    return wait_calls(c);
}

static void on_strip(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    static const tprpc_error wrong = {.status = TPRPC_ERROR_PROTOCOL, .text = "a worker sent what is no reply"};
    remote *r = (remote *)user;
    coordinator *c = r->coordinator;
    c->calling--;
    if (status == TPRPC_OK && reply->metadata_size == sizeof r->report)
        memcpy(&r->report, reply->metadata, sizeof r->report);
    else if (!c->error.status) c->error = error ? *error : wrong;
}

static tprpc_status strip_place(tprpc_placement *placement, void *user) {
    const remote *r = (const remote *)user;
    const tprpc_message *m = placement->descriptor;
    if (m->tensor_count != 1 || m->tensors[0].size != r->strip_bytes) return TPRPC_ERROR_INVALID;
    placement->tensors[0].data = r->strip;
    return TPRPC_OK;
}

// Asks every worker for its strip at a level, to be received into `cells`.
static bool call_advance(coordinator *c, int32_t level, float *cells) {
    const tprpc_message message = {.metadata = &level, .metadata_size = sizeof level};
    for (int i = 0; i < c->settings->workers; i++) {
        remote *r = &c->remotes[i];
        const size_t first = strip_first(c->settings, c->start, i), after = strip_first(c->settings, c->start, i + 1);
        r->strip = cells + first * c->start->width;
        r->strip_bytes = (after - first) * c->start->width * sizeof(float);
        const tprpc_call_options options = {.timeout_ms = TPRPC_FOREVER, .on_done = on_strip, .place = strip_place,
                                            .user = r, .error = &c->error};
        if (tprpc_call(c->agent, r->name, "advance", &message, &options, NULL)) return workers_lost(c, NULL);
        c->calling++;
    }
    return true;
}

// ---- the coordinator: what it shows and checks ----------------------------------------------------------------------

// One live line on a terminal, a line every second elsewhere.
static void show_progress(coordinator *c, int level) {
    const int64_t now = now_ns(), passed = now - c->line_ns;
    const bool live = isatty(STDOUT_FILENO);
    if (c->settings->quiet || passed < (live ? 100000000 : 1000000000)) return;
    const double seconds = (double)passed / 1e9;
    printf("%sstep %d of %d: %.0f steps/s, %.0f calls/s, call p50 %.1f us, p99 %.1f us%s", live ? "\r\033[K" : "",
           level, c->settings->steps, (level - c->line_level) / seconds, (double)c->recent.calls / seconds,
           timing_us(&c->recent, 50), timing_us(&c->recent, 99), live ? "" : "\n");
    fflush(stdout);
    c->line_ns = now;
    c->line_level = level;
    memset(&c->recent, 0, sizeof c->recent);
}

static void show_pair(const char *one, const char *other, const tprpc_pipe_info *info, uint64_t there, uint64_t back) {
    printf("%-12s %-10s %-10s %-10s %14" PRIu64 " %14" PRIu64 "\n", one, other, info->transport, info->channel, there,
           back);
}

static void show_result(coordinator *c, double seconds) {
    const settings *o = c->settings;
    printf("%s%d workers, %zu x %zu cells, %d steps in %.2f s: %.0f steps/s\n", isatty(STDOUT_FILENO) ? "\r\033[K" : "",
           o->workers, c->start->width, c->start->height, o->steps, seconds, o->steps / seconds);
    printf("%" PRIu64 " calls: %.0f calls/s, p50 %.1f us, p99 %.1f us; frames in %s\n\n", c->all.calls,
           (double)c->all.calls / seconds, timing_us(&c->all, 50), timing_us(&c->all, 99), o->out);
    printf("%-12s %-10s %-10s %-10s %14s %14s\n", "pair", "", "transport", "channel", "bytes there", "bytes back");
    for (remote *r = c->remotes; r + 1 < c->end; r++)
        show_pair(r->name, r[1].name, &r->report.sides[BELOW], r->report.sides[BELOW].tensor_bytes_sent,
                  r[1].report.sides[ABOVE].tensor_bytes_sent);
    for (remote *r = c->remotes; r < c->end; r++) {
        tprpc_pipe_info info;
        if (!tprpc_agent_get_peer_info(c->agent, r->name, &info, sizeof info))
            show_pair("coordinator", r->name, &info, info.tensor_bytes_sent, info.tensor_bytes_received);
    }
}

// Between workers only halos move, and workers receive nothing else; so the library's counters must say just this.
static bool check_bytes(const coordinator *c) {
    const settings *o = c->settings;
    const size_t row = c->start->width * sizeof(float);
    const uint64_t expected = (uint64_t)o->steps * (uint64_t)(o->workers - 1) * 2 * row;
    uint64_t sent = 0, received = 0;
    for (const remote *r = c->remotes; r < c->end; r++) {
        sent += r->report.sides[ABOVE].tensor_bytes_sent + r->report.sides[BELOW].tensor_bytes_sent;
        received += r->report.received;
    }
    if (!o->quiet)
        printf("\nhalos: %d steps x %d boundaries x 2 rows x %zu bytes = %" PRIu64 "; counted: %" PRIu64 " sent, %"
               PRIu64 " received\n", o->steps, o->workers - 1, row, expected, sent, received);
    return (sent == expected && received == expected) || COMPLAIN("the bytes counted are not those of the halos");
}

// Runs the same field here and compares it bit by bit.
static bool check_field(const coordinator *c, const float *cells) {
    const field *f = c->start;
    const int steps = c->settings->steps;
    const int64_t began = now_ns();
    const size_t count = f->width * f->height;
    float *levels[2];
    if (!strip_create(levels, f, 0, f->height)) return false;
    for (int k = 0; k < steps; k++) strip_step(levels[(k + 1) & 1], levels[k & 1], f->height, f->width, true, true);
    const double rate = steps * 1e9 / (double)(now_ns() - began);
    const float *alone = levels[steps & 1] + f->width;
    size_t differ = 0, first = 0;
    for (size_t i = count; i-- > 0;)
        if (memcmp(&alone[i], &cells[i], sizeof(float))) differ++, first = i;
    free(levels[0]);
    free(levels[1]);
    if (differ)
        return COMPLAIN("%zu of %zu cells differ from those of one process alone, the first in row %zu, column %zu",
                        differ, count, first / f->width, first % f->width);
    if (!c->settings->quiet)
        printf("one process alone: the same %zu cells bit for bit, %.0f steps/s\n", count, rate);
    return true;
}

// ---- the run --------------------------------------------------------------------------------------------------------

// Advances to the last level and writes frames; while one is written, the workers are on their way to the next.
static bool run_frames(coordinator *c, const float **last) {
    const settings *o = c->settings;
    int level = 0;
    c->line_ns = now_ns();
    *last = c->start->cells;
    for (int frame = 0;; frame++) {
        const int goal = o->steps - level < o->every ? o->steps : level + o->every;
        if (level < o->steps && !call_advance(c, goal, c->frames[frame & 1])) return false;
        if (!frame_write(o->out, c->start, *last, frame)) return false;
        if (level == o->steps) return true;
        if (!wait_calls(c)) return false;
        for (const remote *r = c->remotes; r < c->end; r++) {
            timing_merge(&c->recent, &r->report.timing);
            timing_merge(&c->all, &r->report.timing);
        }
        *last = c->frames[frame & 1];
        level = goal;
        show_progress(c, level);
    }
}

static bool run(coordinator *c, const char *store) {
    const float *last;
    if (!workers_start(c, store) || !coordinator_join(c, store)) return false;
    const int64_t began = now_ns();
    if (!run_frames(c, &last)) return false;
    const double seconds = (double)(now_ns() - began) / 1e9;
    if (!c->settings->quiet) show_result(c, seconds);
    if (tprpc_agent_leave(c->agent, LEAVE_MS, &c->error)) return workers_lost(c, NULL);
    const bool ended = workers_join(c), bytes = check_bytes(c), same = check_field(c, last);
    return ended && bytes && same;
}

static bool parse(settings *o, char **argv) {
    const struct { const char *name; int least, most, *number; const char **text; } all[] = {
        {"-n", 1, MAX_WORKERS, &o->workers, NULL}, {"--steps", 1, 1 << 30, &o->steps, NULL},
        {"--every", 1, 1 << 30, &o->every, NULL}, {"--size", 2, MAX_CELLS, &o->size, NULL},
        {"--corrupt", 0, 1 << 30, &o->corrupt, NULL}, {"--image", 0, 0, NULL, &o->image},
        {"--out", 0, 0, NULL, &o->out}, {"--transport", 0, 0, NULL, &o->transport}};
    const size_t count = sizeof all / sizeof *all;
    while (*++argv) {
        size_t i = 0;
        char *end = NULL;
        if (!strcmp(*argv, "--quiet")) { o->quiet = true; continue; }
        while (i < count && strcmp(*argv, all[i].name)) i++;
        if (i == count || !argv[1])
            return COMPLAIN("%s? Options: -n workers, --steps N, --every N (steps between frames), --size columns, "
                            "--image FILE, --out DIR, --transport shm|tcp, --corrupt STEP, --quiet", *argv);
        argv++;
        if (all[i].text) { *all[i].text = *argv; continue; }
        const long value = strtol(*argv, &end, 10);
        if (*end || end == *argv || value < all[i].least || value > all[i].most)
            return COMPLAIN("%s: a number from %d to %d", all[i].name, all[i].least, all[i].most);
        *all[i].number = (int)value;
    }
    return o->corrupt < 0 || (o->corrupt < o->steps && o->workers > 1) || COMPLAIN("no halo moves at that step");
}

int main(int argc, char **argv) {
    static coordinator c;
    settings o = {.image = "examples/wave.png", .out = "build/wave-frames", .workers = 4, .steps = 10000, .every = 100,
                  .corrupt = -1};
    field start = {0};
    char store[512] = "file://", *path = store + strlen(store);   // where the workers find each other
    (void)argc;
    for (int i = 0; i < MAX_WORKERS + 2; i++) snprintf(names[i], sizeof names[i], "worker%d", i);
    if (!parse(&o, argv) || !field_load(&start, o.image, (size_t)o.size)) return 1;
    if ((size_t)o.workers > start.height) return !COMPLAIN("more workers than rows");
    if (mkdir(o.out, 0777) && errno != EEXIST) return !COMPLAIN("%s: %s", o.out, strerror(errno));
    for (int i = 0; i < 2; i++) c.frames[i] = (float *)malloc(start.width * start.height * sizeof(float));
    snprintf(path, sizeof store - strlen(store), "%s/store-%d", o.out, (int)getpid());
    c.settings = &o;
    c.start = &start;
    const bool good = c.frames[0] && c.frames[1] ? run(&c, store) : COMPLAIN("no memory");
    workers_kill(&c);
    unlink(path);
    tprpc_agent_destroy(c.agent);
    tprpc_context_destroy(c.context);
    free(c.frames[0]);
    free(c.frames[1]);
    free(start.cells);
    return !good;
}
