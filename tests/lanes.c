/* Lanes: the connections beside a pipe's own over which large tensors go. Between two contexts, of one process or two,
   over shm and over tcp, there through a proxy that counts connections, and delays, refuses or cuts them. */
#include "harness.h"
#include <netinet/tcp.h>
#include "../tprpc.h"
#include "pipe_common.h"

enum { FEWER = TEST_SLOWDOWN > 1 ? 4 : 1 };   /* bytes under a sanitizer, which sees the same with those */
enum { LEAST = 256 << 10, LARGE = (8 << 20) / FEWER + 3, HUGE_ONE = 24 << 20 };

/* ---- a proxy, on a thread of its own ---- */

enum { WAYS = 256, PIECE = 64 << 10, NONE = 1000 };
enum { CUT_BOTH, CUT_CONNECTOR, CUT_LISTENER, CUTS };   /* which ends hear of it; the other one is left in the dark */

typedef struct way {                   /* one connection: 0, to who connected; 1, to who listens */
    int fd[2];
    bool ended[2], deaf;               /* no more comes from there; deaf: what comes is thrown away */
    uint8_t bytes[2][PIECE];           /* from that end */
    size_t have[2], gone[2];
    uint64_t passed[2];
} way;

typedef struct proxy {
    pthread_t thread;
    int listener, stop;
    uint16_t to;
    char address[64];
    way *ways[WAYS];
    int count;                         /* of connections that came */
    int refuse, hold;                  /* connections from this one on are refused; this one says nothing */
    int cut, cut_how, cuts;            /* this one is cut, once; cuts: that were made */
    int64_t cut_after;                 /* bytes, either way */
    int slow_us;                       /* to wait for a piece of a connection that is not the first */
} proxy;

static void way_close(way *w, int end) {
    if (w->fd[end] >= 0) close(w->fd[end]);
    w->fd[end] = -1;
    w->ended[end] = true;
}

static void proxy_accept(proxy *p) {
    int fd = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    const int index = p->count;
    struct sockaddr_in to;
    int on = 1, other = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(p->to);
    REQUIRE(index < WAYS && other >= 0);
    if (index < LOAD(p->refuse) && connect(other, (struct sockaddr *)(void *)&to, sizeof to) == 0) {
        way *w = (way *)calloc(1, sizeof *w);
        REQUIRE(w != NULL);
        w->fd[0] = fd;
        w->fd[1] = other;
        REQUIRE(fcntl(w->fd[1], F_SETFL, O_NONBLOCK) == 0);
        for (int end = 0; end < 2; end++) setsockopt(w->fd[end], IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        p->ways[index] = w;
    } else {
        close(fd);
        close(other);
    }
    ADD(p->count, 1);
}

/* Moves what one end has said; returns whether anything moved. */
static bool way_move(proxy *p, way *w, int from) {
    bool moved = false;
    if (w->fd[from] >= 0 && !w->ended[from] && !w->have[from]) {
        const ssize_t n = recv(w->fd[from], w->bytes[from], PIECE, 0);
        w->gone[from] = 0;
        w->have[from] = n > 0 ? (size_t)n : 0;
        w->ended[from] = n == 0 || (n < 0 && errno != EAGAIN);
        moved = n >= 0;
        if (n > 0 && LOAD(p->slow_us) && w != p->ways[0]) test_sleep_us(LOAD(p->slow_us));
        if (w->ended[from] && w->fd[!from] >= 0 && !w->deaf) shutdown(w->fd[!from], SHUT_WR);
    }
    if (w->have[from] && (w->deaf || w->fd[!from] < 0)) {
        w->have[from] = 0;
    } else if (w->have[from]) {
        const ssize_t n = send(w->fd[!from], w->bytes[from] + w->gone[from], w->have[from], MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) w->have[from] = 0;
        if (n <= 0) return moved;
        w->gone[from] += (size_t)n;
        w->have[from] -= (size_t)n;
        ADD(w->passed[from], (uint64_t)n);
        moved = true;
    }
    return moved;
}

static void way_cut(proxy *p, way *w) {
    const struct linger reset = {1, 0};
    w->deaf = true;
    for (int end = 0; end < 2; end++) {
        if (p->cut_how == (end ? CUT_CONNECTOR : CUT_LISTENER)) continue;
        setsockopt(w->fd[end], SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
        way_close(w, end);
    }
    STORE(p->cut, NONE);
    ADD(p->cuts, 1);
}

static void *proxy_run(void *arg) {
    proxy *p = (proxy *)arg;
    while (!LOAD(p->stop)) {
        bool moved = false;
        proxy_accept(p);
        for (int i = 0; i < p->count; i++) {
            way *w = p->ways[i];
            if (!w || i == LOAD(p->hold)) continue;
            for (int from = 0; from < 2; from++) moved |= way_move(p, w, from);
            if (i == LOAD(p->cut) && (int64_t)(w->passed[0] + w->passed[1]) >= p->cut_after) way_cut(p, w);
            if (w->ended[0] && w->ended[1] && !w->have[0] && !w->have[1])
                for (int end = 0; end < 2; end++) way_close(w, end);
        }
        if (!moved) test_sleep_us(200);
    }
    for (int i = 0; i < p->count; i++) {
        if (p->ways[i]) for (int end = 0; end < 2; end++) way_close(p->ways[i], end);
        free(p->ways[i]);
    }
    close(p->listener);
    return NULL;
}

static void proxy_begin(proxy *p, const char *to) {
    uint16_t port;
    memset(p, 0, sizeof *p);
    p->refuse = p->hold = p->cut = NONE;
    p->to = (uint16_t)atoi(strrchr(to, ':') + 1);
    p->listener = socket_listen(&port);
    REQUIRE(fcntl(p->listener, F_SETFL, O_NONBLOCK) == 0);
    snprintf(p->address, sizeof p->address, "tcp://127.0.0.1:%d", port);
    REQUIRE_EQ_INT(pthread_create(&p->thread, NULL, proxy_run, p), 0);
}

static void proxy_end(proxy *p) {
    STORE(p->stop, 1);
    pthread_join(p->thread, NULL);
}

/* ---- two ends ---- */

static int64_t clock_ahead;            /* of contexts that have this clock */
static int64_t clock_us(void *user) { (void)user; return test_now_us() + LOAD(clock_ahead); }

static int late_ones;                  /* lanes that did not come in time, on a slow machine; others are made then */
static void on_log(const tprpc_log *entry, void *user) {
    if (strstr(entry->text, "it did not come in time")) ADD(late_ones, 1);
    print_log(entry, user);
}

typedef struct setting { const char *transports, *channels; int threads, lanes, clock; } setting;

static tprpc_context *context_set(const setting *set) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    desc.threads = set->threads;
    desc.transports = set->transports;
    desc.channels = set->channels;
    desc.lanes = set->lanes;
    desc.log = on_log;
    if (set->clock) desc.clock_us = clock_us;
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

typedef struct ends { pair p; proxy way; bool has_way; } ends;

static void ends_connect(ends *e) {
    accepting accept;
    memset(&accept, 0, sizeof accept);
    CHECK_EQ_INT(tprpc_accept(e->p.s.listener, on_accepted, &accept), TPRPC_OK);
    e->p.b = connect_to(e->p.s.also, e->has_way ? e->way.address : tprpc_listener_address(e->p.s.listener, NULL), 0, 0);
    WAIT(&e->p.s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    e->p.a = accept.pipe;
}

/* tcp goes through the proxy. */
static void ends_open(ends *e, const setting *set) {
    const bool tcp = strcmp(set->transports, "tcp") == 0;
    memset(e, 0, sizeof *e);
    STORE(late_ones, 0);
    e->p.s.threads = set->threads;
    e->p.s.ctx = context_set(set);
    e->p.s.also = context_set(set);
    e->p.s.listener = listen_on(e->p.s.ctx, tcp ? "tcp://127.0.0.1:0" : "shm://", 0);
    e->has_way = tcp;
    if (tcp) proxy_begin(&e->way, tprpc_listener_address(e->p.s.listener, NULL));
    ends_connect(e);
}

static void ends_close(ends *e) {
    pair_close(&e->p);
    if (e->has_way) proxy_end(&e->way);
}

/* ---- a tensor on its way ---- */

typedef struct parcel {
    uint8_t *there, *back;
    size_t size;
    uint64_t seed;
    tprpc_tensor out, in;
    tprpc_message m, to;
    outcome wrote, described, got;
} parcel;

static parcel *parcel_new(size_t size, uint64_t seed) {
    parcel *x = (parcel *)calloc(1, sizeof *x);
    REQUIRE(x != NULL);
    x->size = x->out.size = x->in.size = size;
    x->seed = seed;
    x->out.data = x->there = (uint8_t *)malloc(size);
    x->in.data = x->back = (uint8_t *)calloc(1, size);
    REQUIRE(x->there && x->back);
    fill(x->there, size, seed);
    x->m.tensors = &x->out;
    x->to.tensors = &x->in;
    x->m.tensor_count = x->to.tensor_count = 1;
    x->m.release = on_release;
    x->m.release_user = &x->wrote;
    return x;
}

static void parcel_begin(parcel *x, side *s, tprpc_pipe *from, tprpc_pipe *to) {
    REQUIRE_EQ_INT(tprpc_pipe_write(from, &x->m, on_written, &x->wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(to, on_described, &x->described), TPRPC_OK);
    WAIT(s, x->described.runs, 1);
    REQUIRE_EQ_INT(x->described.status, TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(to, &x->to, on_read, &x->got), TPRPC_OK);
}

/* Waits for both ends of it; each ends once. Returns the reader's status. */
static tprpc_status parcel_wait(parcel *x, side *s) {
    WAIT(s, x->got.runs, 1);
    WAIT(s, x->wrote.runs, 1);
    WAIT(s, x->wrote.releases, 1);
    if (x->got.status == TPRPC_OK) CHECK(matches(x->back, x->size, x->seed));
    return x->got.status;
}

static void parcel_free(parcel *x) {
    free(x->there);
    free(x->back);
    free(x);
}

static void carry(ends *e, size_t size, bool by_connector) {
    static uint64_t seed;
    parcel *x = parcel_new(size, ++seed);
    parcel_begin(x, &e->p.s, by_connector ? e->p.b : e->p.a, by_connector ? e->p.a : e->p.b);
    CHECK_EQ_INT(parcel_wait(x, &e->p.s), TPRPC_OK);
    if (x->got.status) fprintf(stderr, "%s\n", x->got.text);
    parcel_free(x);
}

/* Connections that are there beside the first; of shm, which both ends have mapped. */
static int lanes_of(const ends *e) { return e->has_way ? LOAD(e->way.count) - 1 : test_count_shared() / 2 - 1; }

/* A large one goes through again and again until there have been as many lanes; time passes so that more are tried. */
static void carry_until(ends *e, int lanes, bool by_connector) {
    const int64_t end = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    ADD(clock_ahead, 1100000);
    while (lanes_of(e) < lanes && test_now_us() < end) {
        carry(e, LARGE, by_connector);
        idle(&e->p.s, 20000);
    }
    REQUIRE_LE_INT(lanes, lanes_of(e));
}

static const setting settings[] = {
    {"tcp", "basic", 0, 0, 1}, {"tcp", "basic", 1, 0, 1}, {"tcp", "mpt,basic", 0, 4, 1}, {"tcp", "mpt,basic", 3, 4, 1},
    {"tcp", "mpt,basic", 0, 8, 0}, {"tcp", "basic", 0, 8, 0}, {"shm", "basic", 0, 0, 0}, {"shm", "basic", 2, 0, 0},
    {"shm", "bulk", 0, 0, 0}, {"shm", "bulk", 1, 0, 0}, {"shm", "bulk", 0, 4, 0}, {"shm", "basic", 1, 4, 0}};

static int wanted(const setting *set) { return strncmp(set->channels, "mpt", 3) == 0 ? set->lanes : 1; }

/* Over tcp, with a clock that can be set ahead. */
#define EACH_TCP(set) for (const setting *set = settings; set->clock; set++)
#define EACH(set) for (const setting *set = settings; set < settings + COUNT(settings); set++)

/* ---- how many, and when ---- */

static void opens(const setting *set, bool by_connector) {
    static const size_t small_sizes[] = {1, 100000, LEAST - 1}, large_sizes[] = {LEAST, LEAST + 1, (1 << 20) + 1, LARGE};
    ends e;
    fprintf(stderr, "%s %s %d threads %d lanes\n", set->transports, set->channels, set->threads, set->lanes);
    ends_open(&e, set);
    for (size_t i = 0; i < COUNT(small_sizes); i++) carry(&e, small_sizes[i], by_connector);
    idle(&e.p.s, 10000);
    CHECK_EQ_INT(lanes_of(&e), 0);
    for (size_t i = 0; i < COUNT(large_sizes); i++) {
        carry(&e, large_sizes[i], by_connector);
        if (i == 0) carry_until(&e, wanted(set), by_connector);
        for (int turn = 0; turn < 3; turn++) carry(&e, large_sizes[i], turn & 1);
    }
    for (size_t i = 0; i < COUNT(small_sizes); i++) carry(&e, small_sizes[i], !by_connector);
    if (e.has_way || !LOAD(late_ones)) CHECK_EQ_INT(lanes_of(&e), wanted(set) + LOAD(late_ones));
    ends_close(&e);
}

TEST(opens_by_connector) { EACH(set) opens(set, true); }
TEST(opens_by_listener) { EACH(set) opens(set, false); }

/* What a context was told is what it opens, whatever the other end has. */
TEST(lanes_differ) {
    static const setting few = {"tcp", "mpt,basic", 0, 2, 0}, many = {"tcp", "mpt,basic", 0, 6, 0};
    for (int swap = 0; swap < 4; swap++) {
        ends e;
        memset(&e, 0, sizeof e);
        e.p.s.ctx = context_set(swap & 1 ? &few : &many);
        e.p.s.also = context_set(swap & 1 ? &many : &few);
        e.p.s.listener = listen_on(e.p.s.ctx, "tcp://127.0.0.1:0", 0);
        e.has_way = true;
        proxy_begin(&e.way, tprpc_listener_address(e.p.s.listener, NULL));
        ends_connect(&e);
        for (int i = 0; i < 8; i++) {
            carry(&e, LARGE, swap & 2);
            carry(&e, LARGE, !(swap & 2));
            carry(&e, 100, true);
        }
        CHECK_LE_INT(lanes_of(&e), swap & 1 ? 6 : 2);
        CHECK_LE_INT(2, lanes_of(&e));
        ends_close(&e);
    }
}

/* ---- which pipe's ---- */

/* Many pipes to one listener ask for lanes at a time: each gets its own, and its own bytes. */
static void many_pipes(const setting *set) {
    enum { PIPES = 6 };
    ends e;
    tprpc_pipe *a[PIPES], *b[PIPES];
    parcel *x[PIPES][4];
    ends_open(&e, set);
    for (int i = 0; i < PIPES; i++) {
        if (i) ends_connect(&e);
        a[i] = e.p.a;
        b[i] = e.p.b;
    }
    STORE(e.way.hold, PIPES + 1);      /* one of the lanes comes last */
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < PIPES; i++) {
            x[i][k] = parcel_new((size_t)LARGE / 2 + (size_t)(i * 4 + k) * 1001, (uint64_t)(i * 100 + k));
            parcel_begin(x[i][k], &e.p.s, k & 1 ? a[i] : b[i], k & 1 ? b[i] : a[i]);
        }
    idle(&e.p.s, 50000);
    STORE(e.way.hold, NONE);
    for (int k = 0; k < 4; k++)
        for (int i = 0; i < PIPES; i++) {
            CHECK_EQ_INT(parcel_wait(x[i][k], &e.p.s), TPRPC_OK);
            parcel_free(x[i][k]);
        }
    if (set->transports[0] == 't') CHECK_LE_INT(LOAD(e.way.count), PIPES * (1 + wanted(set)) + LOAD(late_ones));
    if (set->transports[0] == 't') CHECK_LE_INT(PIPES * (1 + wanted(set)), LOAD(e.way.count));
    for (int i = 0; i < PIPES - 1; i++) {
        tprpc_pipe_close(a[i]);
        tprpc_pipe_close(b[i]);
    }
    ends_close(&e);
}

TEST(many_pipes) { EACH(set) many_pipes(set); }

/* ---- lanes that end ---- */

static void dies_in_a_transfer(const setting *set, int how, bool by_connector) {
    ends e;
    fprintf(stderr, "%s %d threads, cut %d, by connector %d\n", set->channels, set->threads, how, by_connector);
    ends_open(&e, set);
    carry_until(&e, wanted(set), by_connector);
    idle(&e.p.s, 20000);
    parcel *x = parcel_new(HUGE_ONE, 77);
    const int had = lanes_of(&e);
    const way *last = e.way.ways[had];
    STORE(e.way.slow_us, 300);
    e.way.cut_how = how;
    e.way.cut_after = (int64_t)(LOAD(last->passed[0]) + LOAD(last->passed[1])) + (1 << 20);
    STORE(e.way.cut, had);
    parcel_begin(x, &e.p.s, by_connector ? e.p.b : e.p.a, by_connector ? e.p.a : e.p.b);
    CHECK_EQ_INT(parcel_wait(x, &e.p.s), TPRPC_ERROR_PEER);
    CHECK_CONTAINS(x->got.text, "a connection of the pipe was lost: lane ");
    CHECK_EQ_INT(LOAD(e.way.cuts), 1);
    STORE(e.way.slow_us, 0);
    carry(&e, 100, by_connector);
    carry(&e, LARGE, by_connector);
    carry(&e, LARGE, !by_connector);
    carry_until(&e, had + 1, by_connector);
    parcel_free(x);
    ends_close(&e);
}

TEST_LIMIT(dies_in_a_transfer, 120) {
    EACH_TCP(set)
        for (int how = 0; how < CUTS; how++)
            for (int by = 0; by < 2; by++) dies_in_a_transfer(set, how, by);
}

/* The sockets that this process has, and how many. */
static int sockets_of(int *fds, int most) {
    int count = 0;
    for (int fd = 3; fd < 200; fd++) {
        struct stat info;
        if (fstat(fd, &info) == 0 && S_ISSOCK(info.st_mode) && count < most) fds[count++] = fd;
    }
    return count;
}

/* Over shared memory: the socket beside it ends. */
static void dies_in_shm(const setting *set, bool by_connector, int turns) {
    int before[64], after[64];
    ends e;
    ends_open(&e, set);
    carry(&e, 100, true);
    const int count = sockets_of(before, 64);
    carry_until(&e, 1, by_connector);
    idle(&e.p.s, 5000);
    REQUIRE_EQ_INT(sockets_of(after, 64), count + 2);
    int lane = 0;
    while (lane < count && after[lane] == before[lane]) lane++;
    parcel *x = parcel_new(HUGE_ONE, 4);
    parcel_begin(x, &e.p.s, by_connector ? e.p.b : e.p.a, by_connector ? e.p.a : e.p.b);
    for (int i = 0; i < turns; i++) tprpc_poll(i & 1 ? e.p.s.ctx : e.p.s.also, TPRPC_NOW, 1);
    REQUIRE(shutdown(after[lane], SHUT_RDWR) == 0);
    const tprpc_status status = parcel_wait(x, &e.p.s);
    if (status) CHECK_EQ_INT(status, TPRPC_ERROR_PEER);
    if (status) CHECK_CONTAINS(x->got.text, "a connection of the pipe was lost: lane 1");
    if (turns == 16) CHECK_EQ_INT(status, TPRPC_ERROR_PEER);
    parcel_free(x);
    carry(&e, 100, !by_connector);
    carry(&e, LARGE, by_connector);
    carry_until(&e, 1, by_connector);
    ends_close(&e);
}

TEST(dies_in_shm) {
    static const setting shm[] = {{"shm", "basic", 0, 0, 1}, {"shm", "bulk", 0, 0, 1}};
    for (int i = 0; i < 4; i++)
        for (int turns = 0; turns <= 32; turns = turns ? turns * 2 : 1) dies_in_shm(&shm[i / 2], i & 1, turns);
}

/* One end alone hears that a lane has ended on which nothing was: nothing fails, and nothing waits for ever. */
static void dies_idle(const setting *set, int how, bool by_connector) {
    ends e;
    fprintf(stderr, "%s %d threads, cut %d, by connector %d\n", set->channels, set->threads, how, by_connector);
    ends_open(&e, set);
    carry_until(&e, wanted(set), by_connector);
    idle(&e.p.s, 20000);
    const int had = lanes_of(&e);
    e.way.cut_how = how;
    STORE(e.way.cut, had);
    if (set->threads) WAIT(&e.p.s, e.way.cuts, 1);
    while (!LOAD(e.way.cuts)) test_sleep_us(100);
    parcel *x = parcel_new(LARGE, 5);
    for (int i = 0; i < 3; i++) {      /* who reads hears of it first, or not */
        if (set->threads) test_sleep_us(5000);
        else tprpc_poll(by_connector ? e.p.s.ctx : e.p.s.also, TPRPC_NOW, 0);
    }
    parcel_begin(x, &e.p.s, by_connector ? e.p.b : e.p.a, by_connector ? e.p.a : e.p.b);
    CHECK_EQ_INT(parcel_wait(x, &e.p.s), TPRPC_OK);
    parcel_free(x);
    carry(&e, 10, !by_connector);
    carry_until(&e, had + 1, by_connector);
    ends_close(&e);
}

TEST_LIMIT(reader_hears_first, 120) {
    EACH_TCP(set)
        for (int by = 0; by < 2; by++) dies_idle(set, by ? CUT_LISTENER : CUT_CONNECTOR, by);
}

TEST_LIMIT(both_hear, 120) {
    EACH_TCP(set)
        for (int by = 0; by < 2; by++) dies_idle(set, CUT_BOTH, by);
}

/* The writer alone hears of it, before it writes. */
TEST_LIMIT(writer_hears_first, 120) {
    EACH_TCP(set)
        for (int by = 0; by < 2; by++) {
            ends e;
            ends_open(&e, set);
            carry_until(&e, wanted(set), by);
            const int had = lanes_of(&e);
            e.way.cut_how = by ? CUT_CONNECTOR : CUT_LISTENER;
            STORE(e.way.cut, had);
            while (!LOAD(e.way.cuts)) test_sleep_us(100);
            idle(&e.p.s, 50000);
            carry(&e, LARGE, by);
            carry(&e, LARGE, !by);
            carry_until(&e, had + 1, by);
            ends_close(&e);
        }
}

/* ---- lanes that do not come ---- */

static const char *why_of(tprpc_pipe *pipe, tprpc_pipe_info *info) {
    REQUIRE_EQ_INT(tprpc_pipe_get_info(pipe, info, sizeof *info), TPRPC_OK);
    for (uint32_t i = 0; i < info->path_count; i++)
        if (info->paths[i].channel && info->paths[i].chosen) return info->paths[i].why;
    return NULL;
}

/* Refused: tensors travel all the same, the info says why, and tries become fewer. */
TEST(refused) {
    EACH_TCP(set)
        for (int by = 0; by < 2; by++) {
            tprpc_pipe_info info;
            ends e;
            ends_open(&e, set);
            carry(&e, 100, true);
            CHECK_STR(why_of(e.p.b, &info), "");
            STORE(e.way.refuse, 1);
            for (int i = 0; i < 100; i++) {    /* of seconds: tried after 1, 2, 4, ... */
                carry(&e, LEAST, by);
                if (i == 0) idle(&e.p.s, 20000);
                ADD(clock_ahead, 1000000);
            }
            CHECK_LE_INT(2 * wanted(set), lanes_of(&e));
            CHECK_LE_INT(lanes_of(&e), 8 * wanted(set));
            CHECK_CONTAINS(why_of(e.p.b, &info), "lane ");
            CHECK_EQ_INT(info.fallbacks, 0);
            ends_close(&e);
        }
}

/* It comes too late, or never says a word: nothing that is under way fails, and another comes later. */
static void late(const setting *set, bool by_connector, int hold_ms) {
    tprpc_pipe_info info;
    ends e;
    ends_open(&e, set);
    STORE(e.way.hold, 1);
    carry(&e, LARGE, by_connector);
    parcel *x = parcel_new(LARGE, 5);  /* which is being received all the while */
    REQUIRE_EQ_INT(tprpc_pipe_write(by_connector ? e.p.b : e.p.a, &x->m, on_written, &x->wrote), TPRPC_OK);
    if (!set->threads) ADD(clock_ahead, hold_ms * INT64_C(1000));
    idle(&e.p.s, set->threads ? hold_ms * INT64_C(1000) : 50000);
    STORE(e.way.hold, NONE);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(by_connector ? e.p.a : e.p.b, on_described, &x->described), TPRPC_OK);
    WAIT(&e.p.s, x->described.runs, 1);
    REQUIRE_EQ_INT(tprpc_pipe_read(by_connector ? e.p.a : e.p.b, &x->to, on_read, &x->got), TPRPC_OK);
    CHECK_EQ_INT(parcel_wait(x, &e.p.s), TPRPC_OK);
    parcel_free(x);
    if (hold_ms > 2000) CHECK_CONTAINS(why_of(e.p.b, &info), "lane 1: it did not come in time");
    carry_until(&e, wanted(set) + (hold_ms > 2000), by_connector);
    idle(&e.p.s, 20000);
    CHECK_STR(why_of(e.p.b, &info), "");
    ends_close(&e);
}

TEST_LIMIT(late, 120) {
    for (int by = 0; by < 2; by++) {
        late(&settings[0], by, 300);
        late(&settings[0], by, 2300);
        late(&settings[1], by, 2300);
    }
}

/* An end that nobody polls for longer than a lane may take to come: what was sent to it meanwhile is whole. */
static void not_polled(bool connector, bool writes) {
    ends e;
    ends_open(&e, &settings[0]);
    tprpc_context *idle_one = connector ? e.p.s.also : e.p.s.ctx, *other = connector ? e.p.s.ctx : e.p.s.also;
    tprpc_pipe *from = writes == connector ? e.p.b : e.p.a, *to = writes == connector ? e.p.a : e.p.b;
    for (int turn = 0; turn < 12; turn++) {
        parcel *x = parcel_new(LARGE, (uint64_t)turn);
        if (turn) ends_connect(&e);
        from = writes == connector ? e.p.b : e.p.a;
        to = writes == connector ? e.p.a : e.p.b;
        parcel_begin(x, &e.p.s, from, to);
        for (int i = 0; i < turn; i++) {
            tprpc_poll(idle_one, TPRPC_NOW, 1);
            test_sleep_us(300);
            tprpc_poll(other, TPRPC_NOW, 1);
        }
        ADD(clock_ahead, 2100000);
        for (int i = 0; i < 30; i++) tprpc_poll(other, 1000, 0);
        CHECK_EQ_INT(parcel_wait(x, &e.p.s), TPRPC_OK);
        if (x->got.status) fprintf(stderr, "turn %d: %s\n", turn, x->got.text);
        parcel_free(x);
        if (turn < 11) {
            tprpc_pipe_close(e.p.a);
            tprpc_pipe_close(e.p.b);
        }
    }
    ends_close(&e);
}

TEST_LIMIT(connector_not_polled, 120) { not_polled(true, false); }
TEST_LIMIT(connector_not_polled_writes, 120) { not_polled(true, true); }
TEST_LIMIT(listener_not_polled, 120) { not_polled(false, false); }
TEST_LIMIT(listener_not_polled_writes, 120) { not_polled(false, true); }

/* ---- a pipe that is closed, or its process ends, as soon as a write is done ---- */

static void on_written_close(tprpc_status status, const tprpc_error *error, void *user) {
    tprpc_pipe **pipe = (tprpc_pipe **)user;
    CHECK(status == TPRPC_OK && !error);
    tprpc_pipe_close(*pipe);
    STORE(*pipe, NULL);
}

/* The reader has to wait for what the lanes still bring, however slow they are. */
static void closes_when_done(const setting *set, bool by_connector) {
    ends e;
    outcome small_one;
    memset(&small_one, 0, sizeof small_one);
    ends_open(&e, set);
    carry_until(&e, wanted(set), by_connector);
    idle(&e.p.s, 20000);
    parcel *x = parcel_new(LARGE, 9);
    tprpc_pipe **from = by_connector ? &e.p.b : &e.p.a, *to = by_connector ? e.p.a : e.p.b;
    if (e.has_way) STORE(e.way.slow_us, 1000);
    x->m.release = NULL;
    REQUIRE_EQ_INT(tprpc_pipe_write(*from, &x->m, on_written_close, from), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(to, on_described, &x->described), TPRPC_OK);
    WAIT(&e.p.s, x->described.runs, 1);
    REQUIRE_EQ_INT(x->described.status, TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(to, &x->to, on_read, &x->got), TPRPC_OK);
    WAIT(&e.p.s, x->got.runs, 1);
    if (!CHECK_EQ_INT(x->got.status, TPRPC_OK)) fprintf(stderr, "%s: %s\n", set->channels, x->got.text);
    CHECK(matches(x->back, x->size, x->seed));
    tprpc_status status = tprpc_pipe_read(to, NULL, on_read, &small_one);   /* then it ends as any other */
    if (status == TPRPC_OK) {
        WAIT(&e.p.s, small_one.runs, 1);
        status = small_one.status;
    }
    CHECK_EQ_INT(status, TPRPC_ERROR_PEER);
    while (LOAD(*from)) work(&e.p.s);
    parcel_free(x);
    ends_close(&e);
}

TEST_LIMIT(closes_when_done, 120) {
    EACH(set) {
        fprintf(stderr, "%s %s %d threads\n", set->transports, set->channels, set->threads);
        closes_when_done(set, false);
        closes_when_done(set, true);
    }
}

/* Bytes that keep coming are waited for longer than silence is. */
TEST(slow_after_the_close) {
    ends e;
    ends_open(&e, &settings[0]);
    carry_until(&e, 1, true);
    parcel *x = parcel_new(LARGE, 9);
    x->m.release = NULL;
    REQUIRE_EQ_INT(tprpc_pipe_write(e.p.b, &x->m, on_written_close, &e.p.b), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(e.p.a, on_described, &x->described), TPRPC_OK);
    WAIT(&e.p.s, x->described.runs, 1);
    STORE(e.way.slow_us, 10000);
    REQUIRE_EQ_INT(tprpc_pipe_read(e.p.a, &x->to, on_read, &x->got), TPRPC_OK);
    while (e.p.b) work(&e.p.s);
    idle(&e.p.s, 20000);
    parcel *back[2] = {parcel_new(10, 1), parcel_new(LARGE, 2)};   /* to who is gone, though not all of him came */
    tprpc_status status[2];
    for (int i = 0; i < 2; i++) status[i] = tprpc_pipe_write(e.p.a, &back[i]->m, on_written, &back[i]->wrote);
    for (int i = 0; i < 40 && !x->got.runs; i++) {
        idle(&e.p.s, 50000);
        ADD(clock_ahead, 5000000);
    }
    WAIT(&e.p.s, x->got.runs, 1);
    CHECK_EQ_INT(x->got.status, TPRPC_OK);
    for (int i = 0; i < 2; i++) {
        if (status[i] == TPRPC_OK) WAIT(&e.p.s, back[i]->wrote.runs, 1);
        CHECK_EQ_INT(back[i]->wrote.releases, 1);
        parcel_free(back[i]);
    }
    CHECK(matches(x->back, x->size, x->seed));
    while (e.p.b) work(&e.p.s);
    parcel_free(x);
    ends_close(&e);
}

/* And silence ends. */
TEST(silent_after_the_close) {
    ends e;
    ends_open(&e, &settings[0]);
    carry_until(&e, 1, true);
    parcel *x = parcel_new(LARGE, 9);
    STORE(e.way.slow_us, 1000);
    x->m.release = NULL;
    REQUIRE_EQ_INT(tprpc_pipe_write(e.p.b, &x->m, on_written_close, &e.p.b), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(e.p.a, on_described, &x->described), TPRPC_OK);
    WAIT(&e.p.s, x->described.runs, 1);
    REQUIRE_EQ_INT(tprpc_pipe_read(e.p.a, &x->to, on_read, &x->got), TPRPC_OK);
    while (e.p.b) work(&e.p.s);
    STORE(e.way.hold, 1);
    for (int i = 0; i < 4 && !x->got.runs; i++) {
        idle(&e.p.s, 50000);
        ADD(clock_ahead, 10100000);
    }
    WAIT(&e.p.s, x->got.runs, 1);
    CHECK_EQ_INT(x->got.status, TPRPC_ERROR_PEER);
    STORE(e.way.hold, NONE);
    parcel_free(x);
    ends_close(&e);
}

typedef struct writer { setting set; char address[128]; int size; } writer;

static void writer_main(void *arg) {
    writer *w = (writer *)arg;
    side s;
    memset(&s, 0, sizeof s);
    s.threads = w->set.threads;
    s.ctx = context_set(&w->set);
    s.pipe = connect_to(s.ctx, w->address, 0, 0);
    parcel *x = parcel_new((size_t)w->size, 31);
    for (int i = 0; i < 3; i++) {
        memset(&x->wrote, 0, sizeof x->wrote);
        REQUIRE_EQ_INT(tprpc_pipe_write(s.pipe, &x->m, on_written, &x->wrote), TPRPC_OK);
        WAIT(&s, x->wrote.runs, 1);
        CHECK_EQ_INT(x->wrote.status, TPRPC_OK);
    }
    tprpc_pipe_close(s.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    parcel_free(x);
}

/* What a process has written is read whole after its end. */
static void process_ends(const setting *set) {
    accepting accept;
    writer w;
    side s;
    memset(&s, 0, sizeof s);
    memset(&w, 0, sizeof w);
    memset(&accept, 0, sizeof accept);
    const bool tcp = strcmp(set->transports, "tcp") == 0;
    w.set = *set;
    w.set.clock = 0;
    w.size = LARGE;
    if (tcp) snprintf(w.address, sizeof w.address, "tcp://127.0.0.1:%d", socket_free_port());
    else snprintf(w.address, sizeof w.address, "shm://lanes-%d", (int)getpid());
    int started[2];
    REQUIRE(pipe2(started, O_CLOEXEC) == 0);
    const pid_t child = fork();        /* before there is a context */
    REQUIRE(child >= 0);
    if (child == 0) {
        char byte;
        REQUIRE(read(started[0], &byte, 1) == 1);
        writer_main(&w);
        _exit(harness_failures != 0);
    }
    s.threads = set->threads;
    s.ctx = context_set(&w.set);
    s.listener = listen_on(s.ctx, w.address, 0);
    CHECK_EQ_INT(tprpc_accept(s.listener, on_accepted, &accept), TPRPC_OK);
    REQUIRE(write(started[1], "x", 1) == 1);
    WAIT(&s, accept.o.runs, 1);
    for (int i = 0; i < 3; i++) {
        parcel *x = parcel_new(LARGE, 31);
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(accept.pipe, on_described, &x->described), TPRPC_OK);
        WAIT(&s, x->described.runs, 1);
        REQUIRE_EQ_INT(x->described.status, TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(accept.pipe, &x->to, on_read, &x->got), TPRPC_OK);
        while (!LOAD(x->got.runs)) {   /* slowly */
            test_sleep_us(2000);
            work(&s);
        }
        if (!CHECK_EQ_INT(x->got.status, TPRPC_OK)) fprintf(stderr, "%d of %s: %s\n", i, set->channels, x->got.text);
        CHECK(matches(x->back, x->size, x->seed));
        parcel_free(x);
    }
    CHECK_EQ_INT(test_wait_child(child, 10), 0);
    close(started[0]);
    close(started[1]);
    tprpc_pipe_close(accept.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

TEST_LIMIT(process_ends, 120) {
    EACH(set) {
        fprintf(stderr, "%s %s %d threads\n", set->transports, set->channels, set->threads);
        process_ends(set);
    }
}

/* A pipe, its listener or its context is closed while lanes come, work and go. */
TEST_LIMIT(closed_at_any_time, 120) {
    EACH(set)
        for (int turn = 0; turn < 24; turn += TEST_SLOWDOWN > 1 ? 5 : 1) {
            ends e;
            parcel *x[2];
            ends_open(&e, set);
            for (int i = 0; i < 2; i++) {
                x[i] = parcel_new(LARGE, (uint64_t)turn);
                parcel_begin(x[i], &e.p.s, i ? e.p.a : e.p.b, i ? e.p.b : e.p.a);
            }
            if (set->threads) test_sleep_us(turn * 100);
            else for (int i = 0; i < turn; i++) tprpc_poll(i & 1 ? e.p.s.ctx : e.p.s.also, TPRPC_NOW, 1);
            if (turn % 4 == 0) tprpc_listener_close(e.p.s.listener);
            if (turn % 4 == 0) e.p.s.listener = NULL;
            if (turn % 4 == 1) tprpc_pipe_close(e.p.a);
            if (turn % 4 == 1) e.p.a = NULL;
            if (turn % 4 == 2) tprpc_pipe_close(e.p.b);
            if (turn % 4 == 2) e.p.b = NULL;
            if (turn % 4 < 3)
                for (int i = 0; i < 2; i++) {
                    const tprpc_status status = parcel_wait(x[i], &e.p.s);
                    if (turn % 4 == 0) CHECK_EQ_INT(status, TPRPC_OK);
                }
            ends_close(&e);
            for (int i = 0; i < 2; i++) {
                CHECK(x[i]->got.runs == 1 && x[i]->wrote.runs == 1 && x[i]->wrote.releases == 1);
                parcel_free(x[i]);
            }
        }
}
