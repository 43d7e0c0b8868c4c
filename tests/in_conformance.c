/* What every backend promises: walks the registry (tpr_backends_all) and the toys, and runs one suite over every
   transport, through its table, one over every channel, through pipes over every transport, and one over every
   converter, through pipes and calls. A new backend is tested by being registered; a converter needs a kit (toys_use.h)
   for its kind of device beside. A backend that cannot be exercised here fails. in_cuda_conformance.c includes this for
   another list of backends, with CONFORMANCE_KIT, the kit for their kind of device. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "toys_use.h"

static const kit *const kits[] = {
#ifdef CONFORMANCE_KIT
    &CONFORMANCE_KIT,
#endif
    &toy_kit};

/* ---- a transport's instance, driven by hand ---- */

typedef struct rig {
    tprpc_context *ctx;
    const tprpc_transport_table *t;
    void     *instance;
    tpr_loop *loop;                    /* locked while the rig is open */
} rig;

typedef struct end {                   /* of a connection */
    tprpc_conn_owner owner;
    rig     *r;
    void    *conn;
    int      opens, recvs, sends, losts, after;   /* after: events that came after LOST */
    bool     inside;                   /* a function of the connection runs: no event may come */
    uint32_t leave_on;                 /* disconnects within that event */
    tprpc_error error;
} end;

typedef struct door {                  /* a listener */
    tprpc_listen_owner owner;
    rig  *r;
    void *listener;
    end  *ends;                        /* the next that comes in becomes this one */
    int   count, most;
    bool  refuse;                      /* disconnects within accepted */
    char  address[128];
} door;

static bool turn(rig *r) {
    tpr_loop_clock(r->loop);
    return tpr_loop_turn(r->loop);
}

static void rig_open(rig *r, const tprpc_backend *backend) {
    tprpc_context *ctx = context(backend->name, NULL, 0);
    uint32_t i;
    memset(r, 0, sizeof *r);
    r->ctx = ctx;
    for (i = 0; i < ctx->backend_count; i++) {
        if (ctx->backends[i].backend != backend) continue;
        if (!ctx->backends[i].viable)
            fprintf(stderr, "%s cannot be exercised: %s\n", backend->name, ctx->backends[i].why);
        REQUIRE(ctx->backends[i].viable);
        r->instance = ctx->backends[i].instances[0];
    }
    REQUIRE(r->instance != NULL);
    r->t = backend->transport;
    r->loop = &ctx->loops[0];
    tpr_loop_enter(r->loop);
}

static void rig_close(rig *r) {
    int i;
    for (i = 0; i < 3; i++) turn(r);
    tpr_loop_leave(r->loop);
    CHECK_EQ_INT(tprpc_context_destroy(r->ctx), TPRPC_OK);
}

static void on_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    end *e = (end *)(void *)owner;
    CHECK(!e->inside);
    CHECK((events & ~15u) == 0 && events != 0);
    if (e->losts) e->after++;
    e->opens += (events & TPRPC_EVENT_OPEN) != 0;
    e->recvs += (events & TPRPC_EVENT_RECV) != 0;
    e->sends += (events & TPRPC_EVENT_SEND) != 0;
    e->losts += (events & TPRPC_EVENT_LOST) != 0;
    if (events & TPRPC_EVENT_LOST) {
        CHECK(error && error->status != TPRPC_OK && error->text[0]);
        if (error) e->error = *error;
    }
    if (e->leave_on & events) {
        void *conn = e->conn;
        e->conn = NULL;
        e->r->t->disconnect(conn, TPRPC_OK);
    }
}

static void end_init(end *e, rig *r) {
    memset(e, 0, sizeof *e);
    e->owner.event = on_event;
    e->r = r;
}

static void on_incoming(tprpc_listen_owner *owner, void *conn) {
    door *d = (door *)(void *)owner;
    REQUIRE(d->count < d->most);
    d->count++;
    if (d->refuse) {
        d->r->t->disconnect(conn, TPRPC_ERROR_DENIED);
        return;
    }
    d->ends->conn = conn;
    d->r->t->own(conn, &d->ends->owner);
    d->ends++;
}

static void door_open(door *d, rig *r, const char *address, end *ends, int most) {
    tprpc_error error = TPR_ZERO;
    memset(d, 0, sizeof *d);
    d->owner.accepted = on_incoming;
    d->r = r;
    d->ends = ends;
    d->most = most;
    if (r->t->listen(r->instance, address, &d->owner, &d->listener, &error) != TPRPC_OK)
        fprintf(stderr, "%s\n", error.text);
    REQUIRE(d->listener != NULL);
    r->t->address(d->listener, d->address, sizeof d->address);
    CHECK(d->address[0]);
}

static void end_connect(end *e, rig *r, const char *address) {
    tprpc_error error = TPR_ZERO;
    end_init(e, r);
    e->inside = true;
    if (r->t->connect(r->instance, address, 0, &e->owner, &e->conn, &error) != TPRPC_OK)
        fprintf(stderr, "%s\n", error.text);
    e->inside = false;
    REQUIRE(e->conn != NULL);
}

static void end_close(end *e) {
    void *conn = e->conn;
    e->conn = NULL;
    e->inside = true;
    if (conn) e->r->t->disconnect(conn, TPRPC_OK);
    e->inside = false;
}

/* Until cond holds, at most 20 s (a REQUIRE); both rigs may be one. */
#define TURN_UNTIL(a, b, cond)                                         \
    do {                                                               \
        int64_t turn_end = deadline();                                 \
        bool turn_ok;                                                  \
        while (!(turn_ok = (cond)) && test_now_us() < turn_end) {      \
            turn(a);                                                   \
            if ((b) != (a)) turn(b);                                   \
        }                                                              \
        if (!turn_ok) fprintf(stderr, "never: %s\n", #cond);           \
        REQUIRE(turn_ok);                                              \
    } while (0)

/* Drives it until nothing is left to do. */
static void settle(rig *r) {
    int64_t until = deadline();
    while (turn(r)) REQUIRE(test_now_us() < until);        /* it says that it is busy for ever */
}

static void turns(rig *a, rig *b, int count) {
    while (count-- > 0) {
        turn(a);
        turn(b);
        test_sleep_us(20);
    }
}

static size_t send_some(end *e, const tprpc_span *spans, size_t count, bool more) {
    size_t n;
    e->inside = true;
    n = e->r->t->send(e->conn, spans, count, NULL, 0, more);
    e->inside = false;
    return n;
}

static size_t send_bytes(end *e, const void *bytes, size_t size) {
    tprpc_span span;
    span.data = (void *)(uintptr_t)bytes;
    span.size = size;
    return send_some(e, &span, 1, false);
}

static size_t recv_bytes(end *e, void *bytes, size_t size) {
    tprpc_span span;
    size_t n;
    span.data = bytes;
    span.size = size;
    e->inside = true;
    n = e->r->t->recv(e->conn, &span, 1);
    e->inside = false;
    return n;
}

/* ---- pairs of ends ---- */

typedef struct both { const tprpc_backend *backend; rig r[2]; door d; end e[2]; } both;   /* 0 listens, 1 connects */

static void both_open(both *b, const tprpc_backend *backend) {
    memset(b, 0, sizeof *b);
    b->backend = backend;
    rig_open(&b->r[0], backend);
    rig_open(&b->r[1], backend);
    end_init(&b->e[0], &b->r[0]);
    door_open(&b->d, &b->r[0], "", b->e, 1);
    end_connect(&b->e[1], &b->r[1], b->d.address);
    TURN_UNTIL(&b->r[0], &b->r[1], b->e[0].conn && b->e[1].opens);
    CHECK_EQ_INT(b->e[1].opens, 1);
    CHECK_EQ_INT(b->e[0].opens, 0);
}

static void both_close(both *b) {
    int i;
    for (i = 0; i < 2; i++) end_close(&b->e[i]);
    if (b->d.listener) b->r[0].t->unlisten(b->d.listener);
    for (i = 0; i < 2; i++) {
        CHECK_LE_INT(b->e[i].losts, 1);
        CHECK_EQ_INT(b->e[i].after, 0);
        rig_close(&b->r[i]);
    }
}

#define WITH(backend)                     \
    both b;                               \
    int fds;                              \
    toys_begin(50);                       \
    fds = test_count_fds();               \
    both_open(&b, (const tprpc_backend *)(backend))
#define DONE()                            \
    both_close(&b);                       \
    CHECK_EQ_INT(test_count_fds(), fds);  \
    toys_end()

/* ---- the suite of transports ---- */

static void t_connect(void *arg) {
    char text[128];
    uint8_t domain[64], again[64];
    size_t size;
    int i;
    WITH(arg);
    for (i = 0; i < 2; i++) {
        tprpc_error error = TPR_ZERO;
        const tprpc_transport_table *t = b.r[i].t;
        CHECK(t->peer(b.e[i].conn, text, sizeof text) > 0 && strlen(text) > 0);
        CHECK_EQ_INT(t->peer(b.e[i].conn, text, 2) > 0 && strlen(text) <= 1, 1);
        if (!CHECK_EQ_INT(t->check_peer(b.e[i].conn, &error), TPRPC_OK)) fprintf(stderr, "%s\n", error.text);
        size = t->domain(b.r[i].instance, domain, sizeof domain);
        CHECK_LE_INT(size, 64);
        CHECK_EQ_INT(t->domain(b.r[1 - i].instance, again, sizeof again), size);
        CHECK_MEM(domain, again, size);
        CHECK(t->reaches(b.r[i].instance, domain, size));
        if (size > 0) {                /* another machine's is out of reach, as is a broken one */
            CHECK(!t->reaches(b.r[i].instance, domain, size - 1));
            domain[0] ^= 1;
            CHECK(!t->reaches(b.r[i].instance, domain, size));
        }
        CHECK(!t->public_address(b.r[i].instance, b.d.address));
    }
    DONE();
}

static void t_listen_twice(void *arg) {
    const tprpc_transport_table *t;
    tprpc_error error = TPR_ZERO;
    void *second = NULL;
    door other;
    end ends[1];
    int i;
    WITH(arg);
    t = b.r[0].t;
    for (i = 0; i < 2; i++) {
        CHECK(t->listen(b.r[i].instance, b.d.address, &b.d.owner, &second, &error) != TPRPC_OK);
        CHECK_EQ_INT(error.status, TPRPC_ERROR_UNREACHABLE);
        CHECK(strlen(error.text) > 10);
    }
    door_open(&other, &b.r[0], "", ends, 1);     /* one that is chosen is another */
    CHECK(strcmp(other.address, b.d.address) != 0);
    t->unlisten(other.listener);
    DONE();
}

static void t_nobody(void *arg) {
    const tprpc_transport_table *t;
    char address[128];
    tprpc_error error = TPR_ZERO;
    end e;
    int i;
    WITH(arg);
    t = b.r[0].t;
    memcpy(address, b.d.address, sizeof address);
    t->unlisten(b.d.listener);
    b.d.listener = NULL;
    for (i = 0; i < 2; i++) {
        end_init(&e, &b.r[1]);
        if (t->connect(b.r[1].instance, address, 0, &e.owner, &e.conn, &error) == TPRPC_OK) {
            TURN_UNTIL(&b.r[0], &b.r[1], e.losts);
            error = e.error;
            CHECK_EQ_INT(e.opens, 0);
            turns(&b.r[0], &b.r[1], 20);
            CHECK_EQ_INT(e.losts, 1);
            CHECK_EQ_INT(send_bytes(&e, "abc", 3), 3);
            end_close(&e);
        }
        CHECK_EQ_INT(error.status, TPRPC_ERROR_UNREACHABLE);
        CHECK(strlen(error.text) > 10);
    }
    end_init(&e, &b.r[1]);             /* and one that is closed at once hears of nothing */
    if (t->connect(b.r[1].instance, address, 0, &e.owner, &e.conn, NULL) == TPRPC_OK) {
        end_close(&e);
        turns(&b.r[0], &b.r[1], 20);
        CHECK_EQ_INT(e.losts + e.opens, 0);
    }
    DONE();
}

static void t_small(void *arg) {
    uint8_t out[300], in[300];
    size_t size, got;
    int side, before;
    WITH(arg);
    for (size = 1; size < sizeof out; size += 7) {
        for (side = 0; side < 2; side++) {
            tprpc_span span;
            fill(out, size, (unsigned)size);
            before = b.e[1 - side].recvs;
            REQUIRE_EQ_INT(send_bytes(&b.e[side], out, size), size);
            TURN_UNTIL(&b.r[0], &b.r[1], b.e[1 - side].recvs > before);
            TURN_UNTIL(&b.r[0], &b.r[1], b.r[1 - side].t->peek(b.e[1 - side].conn).size > 0);
            span = b.r[1 - side].t->peek(b.e[1 - side].conn);
            in[0] = *(const uint8_t *)span.data;           /* the first byte in place, the rest copied */
            b.r[1 - side].t->consume(b.e[1 - side].conn, 1);
            for (got = 1; got < size;) {
                got += recv_bytes(&b.e[1 - side], in + got, size - got);
                if (got < size) turns(&b.r[0], &b.r[1], 1);
            }
            CHECK(filled(in, size, (unsigned)size));
            CHECK_EQ_INT(b.r[1 - side].t->peek(b.e[1 - side].conn).size, 0);
            CHECK_EQ_INT(recv_bytes(&b.e[1 - side], in, sizeof in), 0);
        }
    }
    DONE();
}

/* Bytes of a stream, so that any part of it can be checked. */
static uint8_t stream_byte(uint64_t at) { return (uint8_t)((at * UINT64_C(0x9E3779B97F4A7C15)) >> 56); }
enum { STREAM_BLOCK = 512 };           /* bytes made at once: the sanitizers look at each copy, not at each byte */
static void stream_block(uint8_t *bytes, uint64_t at) {
    size_t i;
    for (i = 0; i < STREAM_BLOCK; i++) bytes[i] = stream_byte(at + i);
}
static void stream_fill(uint8_t *out, size_t size, uint64_t at) {
    uint8_t bytes[STREAM_BLOCK];
    size_t done;
    for (done = 0; done < size; done += sizeof bytes) {
        stream_block(bytes, at + done);
        memcpy(out + done, bytes, size - done < sizeof bytes ? size - done : sizeof bytes);
    }
}
static bool stream_is(const uint8_t *in, size_t size, uint64_t at) {
    uint8_t bytes[STREAM_BLOCK];
    size_t done;
    for (done = 0; done < size; done += sizeof bytes) {
        stream_block(bytes, at + done);
        if (memcmp(in + done, bytes, size - done < sizeof bytes ? size - done : sizeof bytes) != 0) return false;
    }
    return true;
}

static uint32_t rolled(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 8;
}

enum { MANY = 150, PIECE = 900 };      /* spans; bytes of one at most */

/* Cuts up to `most` bytes of memory into spans of odd sizes, 0 included. Returns their sum. */
static size_t cut(uint8_t *memory, size_t most, tprpc_span *spans, size_t count, uint32_t *state) {
    size_t used = 0, i;
    for (i = 0; i < count; i++) {
        size_t size = rolled(state) % 5 == 0 ? 0 : rolled(state) % (PIECE + 1);
        if (size > most - used) size = most - used;
        spans[i].data = size ? memory + used : NULL;
        spans[i].size = size;
        used += size;
    }
    return used;
}

typedef struct flow {                  /* one direction */
    end *from, *to;
    uint64_t sent, got, total;
    uint32_t state;
    int      mode;                     /* 0: by turns; 1: peek alone; 2: recv alone */
    bool     blocked;
    int      sends;                    /* SEND events seen when it was blocked */
} flow;

static uint8_t flow_out[MANY * PIECE], flow_in[MANY * PIECE];

static void flow_send(flow *f) {
    tprpc_span spans[MANY];
    size_t most = f->total - f->sent < sizeof flow_out ? (size_t)(f->total - f->sent) : sizeof flow_out;
    size_t count = 1 + rolled(&f->state) % MANY, size, taken;
    if (!most || (f->blocked && f->from->sends == f->sends)) return;
    f->blocked = false;
    size = cut(flow_out, most, spans, count, &f->state);
    stream_fill(flow_out, size, f->sent);
    f->sends = f->from->sends;
    taken = send_some(f->from, spans, count, f->sent + size < f->total && rolled(&f->state) % 3 == 0);
    REQUIRE(taken <= size);
    f->sent += taken;
    f->blocked = taken < size;         /* a SEND event follows; nothing is tried before */
}

static void flow_recv(flow *f) {
    tprpc_span spans[MANY];
    bool peeked = f->mode == 1 || (f->mode == 0 && rolled(&f->state) % 2);
    if (peeked) {
        tprpc_span span = f->to->r->t->peek(f->to->conn);
        size_t size = span.size > 3 && rolled(&f->state) % 2 ? span.size / 2 : span.size;
        if (!size) return;
        REQUIRE(stream_is((const uint8_t *)span.data, size, f->got));
        f->to->r->t->consume(f->to->conn, size);
        f->got += size;
    } else {
        size_t count = 1 + rolled(&f->state) % MANY, size, got;
        size = cut(flow_in, sizeof flow_in, spans, count, &f->state);
        f->to->inside = true;
        got = f->to->r->t->recv(f->to->conn, spans, count);
        f->to->inside = false;
        REQUIRE(got <= size);
        REQUIRE(stream_is(flow_in, got, f->got));
        f->got += got;
    }
}

static void stream(both *b, uint64_t total, int mode) {
    flow f[2];
    int64_t until = test_now_us() + 40 * INT64_C(1000000) * TEST_SLOWDOWN;
    int side;
    memset(f, 0, sizeof f);
    for (side = 0; side < 2; side++) {
        f[side].from = &b->e[side];
        f[side].to = &b->e[1 - side];
        f[side].total = total;
        f[side].state = (uint32_t)side + 7;
        f[side].mode = mode;
    }
    while (f[0].got < total || f[1].got < total) {
        if (!CHECK(test_now_us() < until)) {
            for (side = 0; side < 2; side++)
                fprintf(stderr, "way %d: sent %llu, got %llu, blocked %d\n", side, (unsigned long long)f[side].sent,
                        (unsigned long long)f[side].got, f[side].blocked);
            REQUIRE(0);
        }
        for (side = 0; side < 2; side++) {
            flow_send(&f[side]);
            flow_recv(&f[side]);
        }
        turn(&b->r[0]);
        turn(&b->r[1]);
    }
    CHECK_EQ_INT(b->e[0].losts + b->e[1].losts, 0);
}

static void t_streams(void *arg) {
    int mode;
    WITH(arg);
    for (mode = 0; mode < 3; mode++) stream(&b, (UINT64_C(24) << 20) / TEST_SLOWDOWN, mode);
    DONE();
}

static void t_backpressure(void *arg) {
    enum { LOT = 1 << 20 };
    uint8_t *bytes = (uint8_t *)malloc(LOT);
    uint64_t sent = 0, got = 0;
    size_t n = 1;
    int side;
    WITH(arg);
    REQUIRE(bytes != NULL);
    for (side = 0; side < 2; side++) {
        end *from = &b.e[side], *to = &b.e[1 - side];
        sent = got = 0;
        for (n = LOT; n == LOT && sent < UINT64_C(256) << 20; sent += n) {     /* the reader does nothing */
            stream_fill(bytes, LOT, sent);
            n = send_bytes(from, bytes, LOT);
        }
        if (!CHECK(n < LOT)) fprintf(stderr, "%llu bytes and no end\n", (unsigned long long)sent);
        for (;;) {                     /* room may come once more where the medium itself holds bytes */
            int before = from->sends;
            turns(&b.r[side], &b.r[side], 200);
            if (from->sends == before) break;
            stream_fill(bytes, LOT, sent);
            n = send_bytes(from, bytes, LOT);
            sent += n;
            REQUIRE(n < LOT);
        }
        CHECK_LE_INT(sent, UINT64_C(64) << 20);
        while (got < sent) {
            int64_t until = deadline();
            int before = from->sends;
            while (got < sent) {
                size_t more = recv_bytes(to, bytes, LOT);
                REQUIRE(stream_is(bytes, more, got));
                got += more;
                turn(&b.r[1 - side]);
                REQUIRE(test_now_us() < until);
            }
            TURN_UNTIL(&b.r[0], &b.r[1], from->sends > before);    /* the event that was owed */
            if (sent < UINT64_C(80) << 20) {
                stream_fill(bytes, 100, sent);
                n = send_bytes(from, bytes, 100);
                CHECK_EQ_INT(n, 100);
                sent = n < 100 ? sent + n : UINT64_C(80) << 20;
                REQUIRE_EQ_INT(n, 100);
                TURN_UNTIL(&b.r[0], &b.r[1], to->r->t->peek(to->conn).size > 0);
                CHECK_EQ_INT(recv_bytes(to, bytes, 100), 100);
                break;
            }
        }
    }
    free(bytes);
    DONE();
}

static void t_more(void *arg) {
    uint8_t in[64];
    size_t got = 0;
    int i;
    WITH(arg);
    for (i = 0; i < 26; i++) {
        char letter = (char)('a' + i);
        tprpc_span span;
        span.data = &letter;
        span.size = 1;
        REQUIRE_EQ_INT(send_some(&b.e[1], &span, 1, i < 25), 1);
    }
    while (got < 26) {
        TURN_UNTIL(&b.r[0], &b.r[1], b.r[0].t->peek(b.e[0].conn).size > 0);
        got += recv_bytes(&b.e[0], in + got, sizeof in - got);
    }
    CHECK_EQ_INT(got, 26);
    CHECK_MEM(in, "abcdefghijklmnopqrstuvwxyz", 26);
    DONE();
}

static int memfd_with(int value) {
    int fd = memfd_create("conformance", MFD_CLOEXEC);
    REQUIRE(fd >= 0 && write(fd, &value, sizeof value) == (ssize_t)sizeof value);
    return fd;
}

static void t_handles(void *arg) {
    bool can = (((const tprpc_backend *)arg)->transport->flags & TPRPC_TRANSPORT_HANDLES) != 0;
    intptr_t given[8], taken[9];
    size_t have = 0, i;
    int round, expected = 1000, next = 1000;
    WITH(arg);
    CHECK_EQ_INT(b.r[0].t->take_handles(b.e[0].conn, taken, 9), 0);
    for (round = 0; can && round < 3; round++) {
        size_t count = round == 0 ? 1 : 8, got = 0;
        char bytes[10] = "handles: ";
        tprpc_span span;
        span.data = bytes;
        span.size = sizeof bytes;
        for (i = 0; i < count; i++) given[i] = memfd_with(next++);
        REQUIRE_EQ_INT(b.r[1].t->send(b.e[1].conn, &span, 1, given, count, false), sizeof bytes);
        for (i = 0; i < count; i++) close((int)given[i]);          /* duplicated: the caller's are his */
        REQUIRE_EQ_INT(send_bytes(&b.e[1], bytes, sizeof bytes), sizeof bytes);
        for (have = 0; have < count;) {
            TURN_UNTIL(&b.r[0], &b.r[1], (have = b.r[0].t->take_handles(b.e[0].conn, taken, round == 2 ? 3 : 9)) > 0);
            for (i = 0; i < have; i++) {
                int value = 0;
                CHECK(pread((int)taken[i], &value, sizeof value, 0) == (ssize_t)sizeof value);
                CHECK_EQ_INT(value, expected);
                CHECK(fcntl((int)taken[i], F_GETFD) & FD_CLOEXEC);
                expected++;
                close((int)taken[i]);
            }
            count -= have;
            have = 0;
        }
        while (got < 2 * sizeof bytes) {
            char in[2 * sizeof bytes];
            got += recv_bytes(&b.e[0], in, sizeof in);
            turns(&b.r[0], &b.r[1], 1);
        }
    }
    if (can) {                         /* some that nobody takes are not leaked: DONE counts */
        tprpc_span span;
        char byte = 1;
        span.data = &byte;
        span.size = 1;
        for (i = 0; i < 8; i++) given[i] = memfd_with(1);
        REQUIRE_EQ_INT(b.r[1].t->send(b.e[1].conn, &span, 1, given, 8, false), 1);
        for (i = 0; i < 8; i++) close((int)given[i]);
        turns(&b.r[0], &b.r[1], 20);
    }
    DONE();
}

/* What one end sent before it closed arrives, then one LOST; what is sent after is taken. */
static void t_close(void *arg) {
    static const size_t amounts[] = {0, 1, 30000, 1 << 20};
    uint8_t *bytes = (uint8_t *)malloc(1 << 20);
    size_t i, sent, got;
    int side;
    REQUIRE(bytes != NULL);
    for (i = 0; i < 8; i++) {
        WITH(arg);
        side = (int)(i % 2);
        stream_fill(bytes, 1 << 20, 0);
        sent = amounts[i / 2] ? send_bytes(&b.e[side], bytes, amounts[i / 2]) : 0;
        end_close(&b.e[side]);
        for (got = 0; got < sent;) {
            size_t n = recv_bytes(&b.e[1 - side], bytes, 7777);
            REQUIRE(stream_is(bytes, n, got));
            got += n;
            if (n) continue;
            turn(&b.r[side]);
            turn(&b.r[1 - side]);
            if (b.e[1 - side].losts && !b.r[1 - side].t->peek(b.e[1 - side].conn).size) break;
        }
        CHECK_EQ_INT(got, sent);
        TURN_UNTIL(&b.r[0], &b.r[1], b.e[1 - side].losts);
        CHECK_EQ_INT(b.e[1 - side].error.status, TPRPC_ERROR_PEER);
        CHECK_EQ_INT(b.r[1 - side].t->peek(b.e[1 - side].conn).size, 0);
        CHECK_EQ_INT(send_bytes(&b.e[1 - side], bytes, 1 << 20), 1 << 20);
        turns(&b.r[0], &b.r[1], 20);
        CHECK_EQ_INT(b.e[1 - side].losts, 1);
        CHECK_EQ_INT(b.e[side].losts, 0);        /* who closed hears of nothing */
        DONE();
    }
    free(bytes);
}

/* LOST comes while bytes are left: they may still be read. */
static void t_close_unread(void *arg) {
    uint8_t bytes[5000];
    size_t got = 0, n;
    WITH(arg);
    stream_fill(bytes, sizeof bytes, 0);
    REQUIRE_EQ_INT(send_bytes(&b.e[1], bytes, sizeof bytes), sizeof bytes);
    end_close(&b.e[1]);
    TURN_UNTIL(&b.r[0], &b.r[1], b.e[0].recvs > 0);
    turns(&b.r[0], &b.r[1], 50);
    while (got < sizeof bytes) {
        n = recv_bytes(&b.e[0], bytes, 1000);
        if (!n) turns(&b.r[0], &b.r[1], 1);
        REQUIRE(stream_is(bytes, n, got));
        got += n;
        if (!n && b.e[0].losts) break;
    }
    CHECK_EQ_INT(got, sizeof bytes);
    TURN_UNTIL(&b.r[0], &b.r[1], b.e[0].losts);
    DONE();
}

/* ---- sleeping on the handle alone ---- */

/* Drives until it may sleep, and checks that it sleeps. */
static void doze(rig *r) {
    int64_t until = deadline();
    int quiet = 0;
    REQUIRE(r->t->handle != NULL && r->t->handle(r->instance) >= 0);
    while (quiet < 3 && test_now_us() < until) {
        int64_t limit = INT64_MAX;
        struct pollfd fd;
        settle(r);
        if (!r->t->arm(r->instance, &limit)) continue;
        fd.fd = (int)r->t->handle(r->instance);
        fd.events = POLLIN;
        if (poll(&fd, 1, 2) == 0) quiet++;       /* one wake-up in vain may be */
        else quiet = 0;
    }
    CHECK_EQ_INT(quiet, 3);
}

/* Arms it, or drives it until the count has grown. */
static void settle_armed(rig *r, const int *count, int before) {
    int64_t until = deadline(), limit = INT64_MAX;
    while (*count == before && !r->t->arm(r->instance, &limit)) {
        turn(r);
        REQUIRE(test_now_us() < until);          /* busy for ever */
    }
}

/* Sleeps on the handle alone until the count grows. */
static bool wakes(rig *r, int *count, int before) {
    int tries;
    for (tries = 0; *count == before && tries < 50; tries++) {
        struct pollfd fd;
        fd.fd = (int)r->t->handle(r->instance);
        fd.events = POLLIN;
        if (poll(&fd, 1, 5000 * TEST_SLOWDOWN) <= 0) return false;
        while (*count == before && turn(r)) {}   /* some report bytes again until they are consumed */
        if (*count == before) settle_armed(r, count, before);
    }
    return *count != before;
}

static void t_sleep_data(void *arg) {
    uint8_t bytes[100];
    int round, before;
    WITH(arg);
    for (round = 0; round < 20; round++) {
        int side = round % 2;
        doze(&b.r[side]);
        before = b.e[side].recvs;
        memset(bytes, round, sizeof bytes);
        REQUIRE_EQ_INT(send_bytes(&b.e[1 - side], bytes, sizeof bytes), sizeof bytes);
        REQUIRE(wakes(&b.r[side], &b.e[side].recvs, before));
        CHECK_EQ_INT(recv_bytes(&b.e[side], bytes, sizeof bytes), sizeof bytes);
        CHECK_EQ_INT(bytes[0], round);
    }
    DONE();
}

static void t_sleep_connection(void *arg) {
    end more[4];
    door d;
    int i;
    WITH(arg);
    end_init(&more[1], &b.r[0]);
    end_init(&more[3], &b.r[0]);
    door_open(&d, &b.r[0], "", &more[1], 1);
    for (i = 0; i < 1; i++) {
        int64_t until = deadline();
        doze(&b.r[0]);
        end_connect(&more[0], &b.r[1], d.address);
        while (d.count == 0 && test_now_us() < until) {
            struct pollfd fd;
            fd.fd = (int)b.r[0].t->handle(b.r[0].instance);
            fd.events = POLLIN;
            turn(&b.r[1]);             /* who connects may have to do something too */
            if (poll(&fd, 1, 10) > 0) while (!d.count && turn(&b.r[0])) {}
            settle_armed(&b.r[0], &d.count, 0);
        }
        CHECK_EQ_INT(d.count, 1);
        TURN_UNTIL(&b.r[0], &b.r[1], more[0].opens);
    }
    end_close(&more[0]);
    end_close(&more[1]);
    b.r[0].t->unlisten(d.listener);
    DONE();
}

static void t_sleep_room(void *arg) {
    enum { LOT = 1 << 20 };
    uint8_t *bytes = (uint8_t *)calloc(1, LOT);
    size_t n;
    int before, i;
    int64_t until = deadline();
    WITH(arg);
    REQUIRE(bytes != NULL);
    do {                               /* until nothing more goes, also after a while */
        before = b.e[1].sends;
        n = send_bytes(&b.e[1], bytes, LOT);
        if (n == LOT) continue;
        for (i = 0; i < 300; i++) {
            turn(&b.r[1]);
            test_sleep_us(20);
        }
    } while ((n == LOT || b.e[1].sends != before) && test_now_us() < until);
    doze(&b.r[1]);
    before = b.e[1].sends;
    for (i = 0; i < 3; i++)
        while (recv_bytes(&b.e[0], bytes, LOT) > 0 || turn(&b.r[0])) REQUIRE(test_now_us() < until);
    REQUIRE(wakes(&b.r[1], &b.e[1].sends, before));
    free(bytes);
    DONE();
}

static void t_sleep_death(void *arg) {
    int side;
    for (side = 0; side < 2; side++) {
        WITH(arg);
        doze(&b.r[side]);
        end_close(&b.e[1 - side]);
        turn(&b.r[1 - side]);
        REQUIRE(wakes(&b.r[side], &b.e[side].losts, 0));
        DONE();
    }
}

/* ---- closing where it is least convenient ---- */

static void t_disconnect_inside(void *arg) {
    static const uint32_t events[] = {TPRPC_EVENT_RECV, TPRPC_EVENT_LOST, TPRPC_EVENT_SEND, TPRPC_EVENT_OPEN, 0};
    size_t i;
    for (i = 0; i < COUNT(events); i++) {
        uint8_t *bytes = (uint8_t *)calloc(1, 1 << 20);
        WITH(arg);
        REQUIRE(bytes != NULL);
        b.e[0].leave_on = events[i];
        if (events[i] == TPRPC_EVENT_RECV) {
            send_bytes(&b.e[1], "x", 1);
            TURN_UNTIL(&b.r[0], &b.r[1], !b.e[0].conn && b.e[1].losts);
        } else if (events[i] == TPRPC_EVENT_LOST) {
            end_close(&b.e[1]);
            TURN_UNTIL(&b.r[0], &b.r[1], !b.e[0].conn);
        } else if (events[i] == TPRPC_EVENT_SEND) {
            while (send_bytes(&b.e[0], bytes, 1 << 20) == 1 << 20) {}
            while (b.e[0].conn) {
                recv_bytes(&b.e[1], bytes, 1 << 20);
                turns(&b.r[0], &b.r[1], 1);
            }
        } else {                       /* OPEN of the connector; accepted */
            end another[2];
            door d;
            end_init(&another[1], &b.r[0]);
            door_open(&d, &b.r[0], "", &another[1], 1);
            d.refuse = events[i] == 0;
            end_connect(&another[0], &b.r[1], d.address);
            another[0].leave_on = events[i];
            if (events[i]) {
                TURN_UNTIL(&b.r[0], &b.r[1], another[0].opens);
                TURN_UNTIL(&b.r[0], &b.r[1], !d.count || another[1].losts || !another[1].conn);
            } else {
                TURN_UNTIL(&b.r[0], &b.r[1], another[0].losts);
                CHECK_EQ_INT(d.count, 1);
            }
            turns(&b.r[0], &b.r[1], 20);
            end_close(&another[0]);
            end_close(&another[1]);
            d.r->t->unlisten(d.listener);
        }
        turns(&b.r[0], &b.r[1], 20);
        free(bytes);
        DONE();
    }
}

static void t_new_owner(void *arg) {
    uint8_t bytes[20];
    end second;
    WITH(arg);
    REQUIRE_EQ_INT(send_bytes(&b.e[1], "0123456789", 10), 10);
    TURN_UNTIL(&b.r[0], &b.r[1], b.e[0].recvs > 0);
    CHECK_EQ_INT(recv_bytes(&b.e[0], bytes, 4), 4);
    end_init(&second, &b.r[0]);
    second.conn = b.e[0].conn;
    b.r[0].t->own(second.conn, &second.owner);
    b.e[0].conn = NULL;
    b.e[0].inside = true;              /* it hears of nothing any more */
    CHECK_EQ_INT(recv_bytes(&second, bytes + 4, 16), 6);
    REQUIRE_EQ_INT(send_bytes(&b.e[1], "abcdefghij", 10), 10);
    TURN_UNTIL(&b.r[0], &b.r[1], second.recvs > 0 && b.r[0].t->peek(second.conn).size == 10);
    CHECK_EQ_INT(recv_bytes(&second, bytes + 10, 10), 10);
    CHECK_MEM(bytes, "0123456789abcdefghij", 20);
    end_close(&b.e[1]);
    TURN_UNTIL(&b.r[0], &b.r[1], second.losts);
    end_close(&second);
    DONE();
}

static void t_many(void *arg) {
    enum { CONNS = 60 };
    end *ends = (end *)calloc(2 * CONNS, sizeof(end));
    door d;
    uint8_t byte;
    int i, matched = 0;
    WITH(arg);
    REQUIRE(ends != NULL);
    for (i = 0; i < CONNS; i++) end_init(&ends[i], &b.r[0]);
    door_open(&d, &b.r[0], "", ends, CONNS);
    for (i = 0; i < CONNS; i++) end_connect(&ends[CONNS + i], &b.r[1], d.address);
    for (i = 0; i < CONNS; i++) TURN_UNTIL(&b.r[0], &b.r[1], ends[CONNS + i].opens && d.count == CONNS);
    for (i = 0; i < CONNS; i++) {
        byte = (uint8_t)i;
        REQUIRE_EQ_INT(send_bytes(&ends[CONNS + i], &byte, 1), 1);
    }
    for (i = 0; i < CONNS; i++) {
        TURN_UNTIL(&b.r[0], &b.r[1], recv_bytes(&ends[i], &byte, 1) == 1);
        REQUIRE(byte < CONNS);
        CHECK_EQ_INT(ends[CONNS + byte].after++, 0);      /* each once */
        matched++;
        ends[CONNS + byte].after = 100;
    }
    CHECK_EQ_INT(matched, CONNS);
    for (i = 0; i < CONNS; i += 2) end_close(&ends[i]);
    turns(&b.r[0], &b.r[1], 10);
    for (i = 0; i < 2 * CONNS; i++) end_close(&ends[i]);
    b.r[0].t->unlisten(d.listener);
    free(ends);
    DONE();
}

/* ---- another process ---- */

typedef struct away {                  /* what a child is told, and tells */
    const tprpc_backend *backend;
    int    socket[2];
    bool   listens;                    /* the child does */
    bool echoes; /* and goes on until its peer closes; otherwise it sends and waits to be killed */
} away;

enum { AWAY_BYTES = 20000 };

static void away_write(int fd, const void *bytes, size_t size) { REQUIRE(write(fd, bytes, size) == (ssize_t)size); }
static void away_read(int fd, void *bytes, size_t size) { REQUIRE(read(fd, bytes, size) == (ssize_t)size); }

static void away_echo(rig *r, end *e) {
    uint8_t *bytes = (uint8_t *)malloc(65536);
    size_t have = 0, at = 0;
    REQUIRE(bytes != NULL);
    while (!e->losts || r->t->peek(e->conn).size) {
        if (at == have) {
            at = 0;
            have = recv_bytes(e, bytes, 65536);
        }
        if (at < have) at += send_bytes(e, bytes + at, have - at);
        turn(r);
    }
    free(bytes);
}

static void away_main(void *arg) {
    away *a = (away *)arg;
    uint8_t domain[65] = {0}, bytes[AWAY_BYTES], word = 0;   /* whole arrays are sent: memcheck looks at all of them */
    char address[128] = "";
    rig r;
    end e;
    door d;
    bool reached;
    close(a->socket[0]);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    rig_open(&r, a->backend);
    domain[0] = (uint8_t)r.t->domain(r.instance, domain + 1, 64);
    away_write(a->socket[1], domain, sizeof domain);
    away_read(a->socket[1], domain, sizeof domain);
    reached = r.t->reaches(r.instance, domain + 1, domain[0]);
    away_write(a->socket[1], &reached, sizeof reached);
    if (!reached) {
        rig_close(&r);
        return;
    }
    end_init(&e, &r);
    if (a->listens) {
        door_open(&d, &r, "", &e, 1);
        away_write(a->socket[1], d.address, sizeof address);
    } else {
        away_read(a->socket[1], address, sizeof address);
        end_connect(&e, &r, address);
    }
    TURN_UNTIL(&r, &r, a->listens ? e.conn != NULL : e.opens > 0);
    if (a->echoes) {
        away_echo(&r, &e);
    } else {
        stream_fill(bytes, sizeof bytes, 0);
        CHECK_EQ_INT(send_bytes(&e, bytes, sizeof bytes), sizeof bytes);
        TURN_UNTIL(&r, &r, r.t->peek(e.conn).size > 0);    /* the word: all of them went */
        away_write(a->socket[1], &word, 1);
        for (;;) {
            turn(&r);
            test_sleep_us(100);
        }
    }
    end_close(&e);
    if (a->listens) r.t->unlisten(d.listener);
    rig_close(&r);
    close(a->socket[1]);
}

/* Those that never leave their process: of two processes there is nothing to test but that they say so. */
static bool stays_within(const tprpc_backend *backend) {
    size_t i;
    for (i = 0; i < COUNT(kits); i++) if (backend == kits[i]->within) return true;
    return backend == &toy_backend || backend == &tpr_xth_backend;
}

/* Opens this end of a connection to a child. False: the backend says that it does not reach other processes. */
static bool away_open(away *a, const tprpc_backend *backend, pid_t *pid, rig *r, door *d, end *e) {
    uint8_t domain[65];
    char address[128];
    bool reaches_us, reaches_it;
    a->backend = backend;
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, a->socket) == 0);
    *pid = test_fork_run(away_main, a);
    close(a->socket[1]);
    rig_open(r, backend);
    memset(domain, 0, sizeof domain);
    away_read(a->socket[0], domain, sizeof domain);
    reaches_it = r->t->reaches(r->instance, domain + 1, domain[0]);
    domain[0] = (uint8_t)r->t->domain(r->instance, domain + 1, 64);
    away_write(a->socket[0], domain, sizeof domain);
    away_read(a->socket[0], &reaches_us, sizeof reaches_us);
    CHECK_EQ_INT(reaches_it, reaches_us);
    if (!reaches_it) {
        CHECK(stays_within(backend));
        CHECK_EQ_INT(test_wait_child(*pid, 10), 0);
        rig_close(r);
        close(a->socket[0]);
        return false;
    }
    end_init(e, r);
    memset(d, 0, sizeof *d);
    if (a->listens) {
        away_read(a->socket[0], address, sizeof address);
        end_connect(e, r, address);
    } else {
        door_open(d, r, "", e, 1);
        away_write(a->socket[0], d->address, sizeof address);
    }
    TURN_UNTIL(r, r, a->listens ? e->opens > 0 : e->conn != NULL);
    return true;
}

static void away_close(away *a, rig *r, door *d, end *e) {
    end_close(e);
    if (d->listener) r->t->unlisten(d->listener);
    rig_close(r);
    close(a->socket[0]);
}

static void t_within(void *arg) {
    away a;
    pid_t pid;
    rig r;
    door d;
    end e;
    memset(&a, 0, sizeof a);
    CHECK(!away_open(&a, (const tprpc_backend *)arg, &pid, &r, &d, &e));
}

static void t_killed(void *arg) {
    int i;
    for (i = 0; i < 4; i++) {
        away a;
        pid_t pid;
        rig r;
        door d;
        end e;
        uint8_t bytes[AWAY_BYTES], word = 1;
        size_t got = 0, n;
        memset(&a, 0, sizeof a);
        a.listens = i % 2 == 1;
        REQUIRE(away_open(&a, (const tprpc_backend *)arg, &pid, &r, &d, &e));
        REQUIRE_EQ_INT(send_bytes(&e, &word, 1), 1);
        turn(&r);
        away_read(a.socket[0], &word, 1);
        if (i < 2) kill(pid, SIGKILL);           /* all of it was sent and is still to be read */
        if (i < 2) CHECK_EQ_INT(test_wait_child(pid, 10), 128 + SIGKILL);
        while (got < sizeof bytes && !(e.losts && !r.t->peek(e.conn).size)) {
            n = recv_bytes(&e, bytes, 1777);
            REQUIRE(stream_is(bytes, n, got));
            got += n;
            turn(&r);
        }
        if (i >= 2) {                  /* the handle alone tells of it */
            doze(&r);
            kill(pid, SIGKILL);
            CHECK_EQ_INT(test_wait_child(pid, 10), 128 + SIGKILL);
            CHECK(wakes(&r, &e.losts, 0));
        }
        CHECK_EQ_INT(got, sizeof bytes);
        TURN_UNTIL(&r, &r, e.losts);
        CHECK_EQ_INT(e.error.status, TPRPC_ERROR_PEER);
        turns(&r, &r, 50);
        CHECK_EQ_INT(e.losts, 1);
        CHECK_EQ_INT(send_bytes(&e, bytes, 1000), 1000);
        away_close(&a, &r, &d, &e);
    }
}

static void t_processes(void *arg) {
    away a;
    pid_t pid;
    rig r;
    door d;
    end e;
    flow f[2];
    uint64_t total = (UINT64_C(32) << 20) / TEST_SLOWDOWN;
    int64_t until = test_now_us() + 40 * INT64_C(1000000) * TEST_SLOWDOWN;
    memset(&a, 0, sizeof a);
    a.echoes = true;
    REQUIRE(away_open(&a, (const tprpc_backend *)arg, &pid, &r, &d, &e));
    memset(f, 0, sizeof f);
    f[0].from = f[1].to = &e;
    f[0].total = f[1].total = total;
    while (f[1].got < total) {
        flow_send(&f[0]);
        flow_recv(&f[1]);
        turn(&r);
        REQUIRE(test_now_us() < until);
    }
    CHECK_EQ_INT(e.losts, 0);
    away_close(&a, &r, &d, &e);
    CHECK_EQ_INT(test_wait_child(pid, 20), 0);
}

/* ---- another thread ---- */

typedef struct apart { const tprpc_backend *backend; char address[128]; int stage; } apart;

static void *apart_main(void *arg) {
    apart *a = (apart *)arg;
    rig r;
    end e;
    rig_open(&r, a->backend);
    while (!toy_count(&a->stage)) test_sleep_us(50);
    end_connect(&e, &r, a->address);
    TURN_UNTIL(&r, &r, e.opens);
    away_echo(&r, &e);
    end_close(&e);
    rig_close(&r);
    return NULL;
}

static void t_threads(void *arg) {
    apart a;
    pthread_t thread;
    rig r;
    door d;
    end e;
    flow f[2];
    uint64_t total = (UINT64_C(24) << 20) / TEST_SLOWDOWN;
    int64_t until = test_now_us() + 40 * INT64_C(1000000) * TEST_SLOWDOWN;
    memset(&a, 0, sizeof a);
    a.backend = (const tprpc_backend *)arg;
    rig_open(&r, a.backend);
    REQUIRE(pthread_create(&thread, NULL, apart_main, &a) == 0);
    end_init(&e, &r);
    door_open(&d, &r, "", &e, 1);
    memcpy(a.address, d.address, sizeof a.address);
    __sync_fetch_and_add(&a.stage, 1);
    TURN_UNTIL(&r, &r, e.conn != NULL);
    memset(f, 0, sizeof f);
    f[0].from = f[1].to = &e;
    f[0].total = f[1].total = total;
    while (f[1].got < total) {
        flow_send(&f[0]);
        flow_recv(&f[1]);
        turn(&r);
        REQUIRE(test_now_us() < until);
    }
    end_close(&e);
    pthread_join(thread, NULL);
    r.t->unlisten(d.listener);
    rig_close(&r);
}

/* ---- the suite of channels, through pipes over a transport ---- */

static struct {                        /* the channel under test, as a user's that counts */
    const tprpc_channel_table *table;
    tprpc_channel_table        mine;
    tprpc_backend              backend;
    const tprpc_backend       *list[4];
    int sends, recvs, aborts;
    bool lies;
} probe;

static tprpc_status probe_send(void *e, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                               uint8_t *descriptor, size_t *descriptor_size, tprpc_error *error) {
    __sync_fetch_and_add(&probe.sends, 1);
    return probe.table->send(e, transfer, buffers, count, descriptor, descriptor_size, error);
}

static tprpc_status probe_recv(void *e, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                               const uint8_t *descriptor, size_t descriptor_size, tprpc_error *error) {
    __sync_fetch_and_add(&probe.recvs, 1);
    return probe.table->recv(e, transfer, buffers, count, descriptor, descriptor_size, error);
}

static void probe_abort(void *e, tprpc_transfer *transfer, bool link_lost) {
    __sync_fetch_and_add(&probe.aborts, 1);
    probe.table->abort(e, transfer, link_lost);
}

static size_t probe_answer(void *e, const uint8_t *challenge, size_t size, uint8_t *out, size_t capacity) {
    size_t n = probe.table->answer(e, challenge, size, out, capacity);
    if (probe.lies && n) out[0] ^= 1;
    return n;
}

typedef struct channel_case {
    const tprpc_backend *channel, *transport;
    const kit  *kit;
    const char *why_not;               /* what it says where it cannot be used */
    bool        kinds[2];              /* whether what is sent, and received, is on the kit's devices */
} channel_case;

static void probe_open(const channel_case *c) {
    memset(&probe, 0, sizeof probe);
    probe.table = c->channel->channel;
    probe.mine = *probe.table;
    probe.mine.send = probe_send;
    probe.mine.recv = probe_recv;
    probe.mine.abort = probe_abort;
    if (probe.mine.answer) probe.mine.answer = probe_answer;
    probe.backend = *c->channel;
    probe.backend.channel = &probe.mine;
    probe.backend.name = "probe";
    probe.list[0] = &toy_backend;
    probe.list[1] = c->kit->converter;
    probe.list[2] = &probe.backend;
    world_backends = probe.list;
    world_backend_count = 3;
    world_kit = c->kit;
    /* of several devices it takes what was registered with it alone, which is for its own tests */
    batch_sources = c->channel == c->kit->apart ? 1 : TOY_DEVICES;
}

static void channel_world(world *w, const channel_case *c, int threads) {
    char address[32];
    const char *text = address;
    snprintf(address, sizeof address, "%s://", c->transport->name);      /* empty: it chooses one */
    world_open(w, c->transport->name, "probe", text, threads);
}

/* late: it is read when the loops have long gone to sleep. */
static void channel_messages(world *w, const channel_case *c, size_t count, size_t size, unsigned seed, bool late) {
    batch *batches = (batch *)calloc(2, sizeof(batch));
    int side;
    REQUIRE(batches != NULL);
    for (side = 0; side < 2; side++) {
        batch_fill(&batches[side], c->kinds[0], c->kinds[1], count, size, seed + (unsigned)side);
        batch_write(w, &batches[side], side);
    }
    for (side = 0; side < 2; side++) batch_read_after(w, &batches[side], 1 - side, late ? 50000 : 0);
    for (side = 0; side < 2; side++) {
        batch_ends(w, &batches[side], TPRPC_OK, TPRPC_OK);
        if (batches[side].reads) batch_check(&batches[side], seed + (unsigned)side);
        batch_free(&batches[side]);
    }
    free(batches);
}

static void channel_message(world *w, const channel_case *c, size_t count, size_t size, unsigned seed) {
    channel_messages(w, c, count, size, seed, false);
}

static void run_channel(const channel_case *c, int threads) {
    static const size_t some[] = {1,     3,      8191,   8193,   9001,          65536,
                                  65537, 262143, 262144, 262145, (1 << 20) + 1, BIG};
    world w;
    unsigned i;
    probe_open(c);
    c->kit->begin(100);
    channel_world(&w, c, threads);
    if (threads) channel_messages(&w, c, 3, 300001, 76, true);    /* the first of all: it proves what is to be proven */
    for (i = 0; i < COUNT(some); i++) channel_message(&w, c, 1, some[i], i);
    channel_message(&w, c, 1, 9001, 77);
    if (threads) channel_messages(&w, c, 3, 300001, 78, true);
    channel_message(&w, c, ITEMS, 0, 50);        /* mixed sizes, 0 among them */
    channel_message(&w, c, ITEMS, 9001, 51);
    channel_message(&w, c, 5, 300001, 52);
    CHECK(probe.sends > 8 && probe.recvs == probe.sends);
    CHECK_EQ_INT(probe.aborts, 0);
    if (!c->kinds[0] && !c->kinds[1]) {
        tprpc_pipe_info info;
        REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[0], &info, sizeof info), TPRPC_OK);
        CHECK_STR(info.channel, "probe");
        CHECK_STR(info.transport, c->transport->name);
    }
    world_close(&w);
    c->kit->end();
}

static void c_sizes(void *arg) { run_channel((const channel_case *)arg, 0); }
static void c_threads(void *arg) { run_channel((const channel_case *)arg, 1); }

/* Memory at odd addresses: host tensors one byte off. */
static void c_unaligned(void *arg) {
    const channel_case *c = (const channel_case *)arg;
    world w;
    batch *b = (batch *)calloc(1, sizeof(batch));
    size_t i;
    REQUIRE(b != NULL);
    probe_open(c);
    c->kit->begin(100);
    channel_world(&w, c, 0);
    batch_fill(b, c->kinds[0], c->kinds[1], 8, 100001, 9);
    for (i = 0; i < 8; i++) {          /* all but the first i bytes */
        b->out[i].data = (uint8_t *)b->out[i].data + i;
        b->in[i].data = (uint8_t *)b->in[i].data + i;
        b->out[i].size -= i;
        b->in[i].size -= i;
    }
    batch_write(&w, b, 1);
    batch_read(&w, b, 0);
    batch_ends(&w, b, TPRPC_OK, TPRPC_OK);
    for (i = 0; b->reads && i < 8; i++) {
        uint8_t *want = (uint8_t *)malloc(100001), *have = (uint8_t *)malloc(100001);
        REQUIRE(want && have);
        fill(want, 100001, 9 + (unsigned)i);
        if (c->kinds[1]) c->kit->get(batch_target(i), NULL, have, b->to[i], 100001);
        else memcpy(have, b->to[i], 100001);
        CHECK_MEM(have + i, want + i, 100001 - i);
        free(want);
        free(have);
    }
    batch_free(b);
    free(b);
    world_close(&w);
    c->kit->end();
}

static void c_closed(void *arg) {
    const channel_case *c = (const channel_case *)arg;
    char address[32];
    int closer, with_context;
    snprintf(address, sizeof address, "%s://", c->transport->name);      /* empty: it chooses one */
    probe_open(c);
    for (closer = 0; closer < 2; closer++)
        for (with_context = 0; with_context < 2; with_context++)
            run_closed(c->transport->name, "probe", address, c->kinds, closer, with_context);
}

/* The receiver has no memory, or no such device: the message is refused and its transfer aborted; the pipe lives on. */
static void c_refused(void *arg) {
    const channel_case *c = (const channel_case *)arg;
    world w;
    batch *b = (batch *)calloc(1, sizeof(batch));
    REQUIRE(b != NULL);
    probe_open(c);
    c->kit->begin(300);
    world_memory = 8 << 20;
    channel_world(&w, c, 0);
    batch_fill(b, c->kinds[0], c->kinds[1], 1, c->kinds[1] ? 70000 : 9 << 20, 1);
    if (c->kinds[1]) b->out[0].target = world_device(77);
    batch_write(&w, b, 1);
    b->reads = world_here(0);
    if (b->reads) REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_read, &b->got), TPRPC_OK);
    batch_ends(&w, b, TPRPC_ERROR_PEER, c->kinds[1] ? c->kit->unknown : TPRPC_ERROR_MEMORY);
    CHECK_EQ_INT(probe.aborts, b->reads);
    batch_free(b);
    free(b);
    channel_message(&w, c, 2, 70000, 3);
    world_close(&w);
    c->kit->end();
}

/* It has nothing that could be out of reach, and so asks for no proof of the other end's either. */
static void c_needs_no_proof(void *arg) {
    const tprpc_channel_table *t = ((const channel_case *)arg)->channel->channel;
    CHECK(!t->answer && !t->verify);
    CHECK(!(t->flags & TPRPC_CHANNEL_MUTUAL));
}

/* One that cannot prove itself is not used: another channel is, or the write says that none is there. */
static void c_proof(void *arg) {
    const channel_case *c = (const channel_case *)arg;
    world w;
    batch *b = (batch *)calloc(1, sizeof(batch));
    tprpc_message message;
    tprpc_pipe_info info;
    uint32_t i;
    bool shown = false;
    REQUIRE(b != NULL);
    REQUIRE(c->channel->channel->challenge != NULL);
    probe_open(c);
    c->kit->begin(300);
    probe.lies = true;
    channel_world(&w, c, 0);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[1], &info, sizeof info), TPRPC_OK);
    for (i = 0; i < info.path_count; i++) {
        if (strcmp(info.paths[i].name, "probe") != 0) continue;
        shown = true;
        CHECK(!info.paths[i].chosen);
        CHECK(info.paths[i].why[0]);
    }
    CHECK(shown);
    batch_fill(b, c->kinds[0], c->kinds[1], 1, 70000, 1);
    memset(&message, 0, sizeof message);
    message.tensors = b->out;
    message.tensor_count = 1;
    message.release = on_release;
    message.release_user = &b->written;
    CHECK_EQ_INT(tprpc_pipe_write(w.pipe[1], &message, on_written, &b->written), TPRPC_ERROR_UNSUPPORTED);
    CHECK_EQ_INT(probe.sends, 0);
    world_settle(&w);
    batch_free(b);
    free(b);
    world_close(&w);
    c->kit->end();
}

/* The peer is killed while transfers are under way, both ways. */
typedef struct victim { const channel_case *c; int delay, socket[2]; } victim;

static void victim_main(void *arg) {
    victim *v = (victim *)arg;
    tprpc_pipe_desc desc;
    tprpc_error error = TPR_ZERO;
    world w;
    char address[128];
    batch *b = (batch *)calloc(2, sizeof(batch));
    REQUIRE(b != NULL);
    memset(&w, 0, sizeof w);
    memset(&desc, 0, sizeof desc);
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    v->c->kit->begin(3000);
    away_read(v->socket[1], address, sizeof address);
    w.ctx[0] = context(v->c->transport->name, "probe", 0);
    desc.address = address;
    REQUIRE_EQ_INT(tprpc_connect(w.ctx[0], &desc, &w.pipe[0], &error), TPRPC_OK);
    batch_fill(&b[0], v->c->kinds[0], v->c->kinds[1], 4, BIG, 1);
    batch_fill(&b[1], v->c->kinds[0], v->c->kinds[1], 4, BIG, 1);
    batch_write(&w, &b[0], 0);
    batch_read(&w, &b[1], 0);
    away_write(v->socket[1], "", 1);
    for (;;) pump(&w);
}

/* Whether the channel's domain is the same in another process of this host. */
static void channel_leaves(const channel_case *c, bool expected) {
    const tprpc_channel_table *t = c->channel->channel;
    tprpc_host host = {(uint32_t)sizeof host, 0, NULL};
    tprpc_error error = TPR_ZERO;
    uint8_t there[65] = {0};
    void *instance;
    int way[2];
    pid_t pid;
    c->kit->begin(0);
    host.context = context(NULL, NULL, 0);
    REQUIRE_EQ_INT(t->open(&host, NULL, &instance, &error), TPRPC_OK);
    REQUIRE(pipe(way) == 0);
    fflush(NULL);
    pid = fork();
    if (pid == 0) {
        there[0] = (uint8_t)t->domain(instance, there + 1, 64);
        _exit(write(way[1], there, sizeof there) != (ssize_t)sizeof there);
    }
    away_read(way[0], there, sizeof there);
    CHECK_EQ_INT(test_wait_child(pid, 10), 0);
    close(way[0]);
    close(way[1]);
    CHECK_EQ_INT(t->reaches(instance, there + 1, there[0]), expected);
    t->close(instance);
    CHECK_EQ_INT(tprpc_context_destroy(host.context), TPRPC_OK);
    c->kit->end();
}

static void c_within(void *arg) { channel_leaves((const channel_case *)arg, false); }
static void c_leaves(void *arg) { channel_leaves((const channel_case *)arg, true); }

static void killed_main(void *arg) {
    victim *v = (victim *)arg;
    const channel_case *c = v->c;
    world w;
    batch *b = (batch *)calloc(2, sizeof(batch));
    char text[128] = "", byte;
    pid_t pid;
    int i;
    REQUIRE(b != NULL);
    memset(&w, 0, sizeof w);
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, v->socket) == 0);
    probe_open(c);
    pid = test_fork_run(victim_main, v);
    c->kit->begin(3000);
    w.ctx[0] = context(c->transport->name, "probe", 0);
    snprintf(text, sizeof text, "%s://", c->transport->name);
    world_listen(&w, text, text, sizeof text);
    away_write(v->socket[0], text, sizeof text);
    UNTIL(&w, w.accepted, 1);
    batch_fill(&b[0], c->kinds[0], c->kinds[1], 4, BIG, 1);
    batch_fill(&b[1], c->kinds[0], c->kinds[1], 4, BIG, 1);
    batch_write(&w, &b[0], 0);
    batch_read(&w, &b[1], 0);
    for (i = 0; i < v->delay * 3; i++) pump(&w);
    away_read(v->socket[0], &byte, 1);
    kill(pid, SIGKILL);
    CHECK_EQ_INT(test_wait_child(pid, 10), 128 + SIGKILL);
    for (i = 0; i < 2; i++) {
        outcome *o = i ? &b[1].got : &b[0].written;
        UNTIL(&w, o->runs, 1);
        CHECK(o->status == TPRPC_OK || o->status == TPRPC_ERROR_PEER);
        if (o->status != TPRPC_OK) CHECK(strlen(o->text) > 5);
    }
    UNTIL(&w, b[0].written.releases, 1);
    tprpc_pipe_close(w.pipe[0]);
    tprpc_listener_close(w.listener);
    CHECK_EQ_INT(tprpc_context_destroy(w.ctx[0]), TPRPC_OK);
    w.ctx[0] = NULL;
    world_settle(&w);
    batch_free(&b[0]);
    batch_free(&b[1]);
    free(b);
    close(v->socket[0]);
    close(v->socket[1]);
    c->kit->end();
}

/* Each time in a process of its own: a device's driver does not outlive a fork. */
static void c_killed(void *arg) {
    victim v;
    memset(&v, 0, sizeof v);
    v.c = (const channel_case *)arg;
    for (v.delay = 0; v.delay < 3; v.delay++)
        CHECK_EQ_INT(test_wait_child(test_fork_run(killed_main, &v), 30), 0);
}

/* A test whose two ends are in two processes, each of which runs it. */
typedef struct half_case { const channel_case *c; void (*run)(void *arg); int socket[2]; } half_case;

static void half_main(void *arg) {
    const half_case *h = (const half_case *)arg;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    world_half.side = 1;
    world_half.socket = h->socket[1];
    h->run((void *)(uintptr_t)h->c);
}

static void c_apart(void *arg) {
    half_case *h = (half_case *)arg;
    pid_t pid;
    REQUIRE(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, h->socket) == 0);
    world_half.apart = true;
    pid = test_fork_run(half_main, h);
    world_half.socket = h->socket[0];
    h->run((void *)(uintptr_t)h->c);
    CHECK_EQ_INT(test_wait_child(pid, 30), 0);
    close(h->socket[0]);
    close(h->socket[1]);
}

/* What a channel of the kit's memory says over a transport that it cannot use; NULL: it can. */
static const char *refusal(const tprpc_backend *backend, const tprpc_backend *transport, const kit *k) {
    const uint32_t flags = transport->transport->flags;
    const bool shares = (flags & TPRPC_TRANSPORT_LOCAL_COPY) != 0, lanes = (flags & TPRPC_TRANSPORT_LANES) != 0;
    if (backend == k->apart && !(flags & TPRPC_TRANSPORT_HANDLES)) return "passes no handles";
    if (backend == k->apart && stays_within(transport)) return "in this process";
    if (backend == &tpr_cma_backend && !transport->transport->process) return "whose process";
    if (backend == &tpr_bulk_backend && !shares) return "shares no memory";
    if (backend == &tpr_mpt_backend && (shares || !lanes)) return "several connections";
    return NULL;
}

static void c_says_why_not(void *arg) {
    const channel_case *c = (const channel_case *)arg;
    tprpc_pipe_info info;
    world w;
    uint32_t i, shown = 0;
    probe_open(c);
    c->kit->begin(0);
    channel_world(&w, c, 0);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[0], &info, sizeof info), TPRPC_OK);
    for (i = 0; i < info.path_count; i++) {
        if (strcmp(info.paths[i].name, "probe") != 0) continue;
        shown++;
        CHECK(!info.paths[i].chosen);
        CHECK_CONTAINS(info.paths[i].why, c->why_not);
    }
    CHECK_EQ_INT(shown, 1);
    world_close(&w);
    c->kit->end();
}

static void c_moves_nothing(void *arg) {
    fprintf(stderr, "channel %s could not be exercised: it moves between no kinds of memory that this suite has\n",
            ((const tprpc_backend *)arg)->name);
    CHECK(0);
}

/* ---- the suite of converters, through pipes and calls ---- */

enum { PIECES = 64 };
typedef struct piece { void *data, *stream; size_t size; tprpc_device device; int released; bool copied; } piece;

static struct {                        /* the converter under test, as a user's that notes what it is told */
    pthread_mutex_t lock;
    const kit      *kit;
    const tprpc_converter_table *table;
    tprpc_converter_table mine;
    tprpc_backend   backend;
    const tprpc_backend *list[3];
    piece           pieces[PIECES];    /* allocated or copied */
    struct { void *keep; int sent; } keeps[PIECES];
    void           *asked[PIECES];     /* the stream that each allocation was asked for on */
    int             piece_count, keep_count, asked_count, prepares, copies;
    int             fail_prepare, fail_copy, fail_allocate;    /* which one fails, from 1; 0: none */
} spy = {PTHREAD_MUTEX_INITIALIZER, NULL, NULL, {0}, {0}, {NULL}, {{0}}, {{0}}, {NULL}, 0, 0, 0, 0, 0, 0, 0, 0};

static void *spy_own(void) { return spy.kit->converter->user; }     /* the library knows &spy instead */

static void *spy_default(tprpc_context *ctx, tprpc_device device) {
    return spy.table->stream ? spy.table->stream(spy_own(), ctx, device) : NULL;
}

static tprpc_status spy_fails(int *counter, int which, tprpc_error *error) {
    if (++*counter != which) return TPRPC_OK;
    return tprpc_error_set(error, TPRPC_ERROR_DEVICE, 7, "spied: lost");
}

static void spy_note(void *data, const tprpc_tensor *tensor, bool copied) {
    piece *p = &spy.pieces[spy.piece_count++];
    REQUIRE(spy.piece_count < PIECES && data);
    p->data = data;
    p->stream = tensor->stream;
    p->size = tensor->size;
    p->device = tensor->device;
    p->copied = copied;
}

static tprpc_status spy_prepare(void *user, tprpc_context *ctx, tprpc_tensor *tensor, void **keep, tprpc_error *error) {
    tprpc_status status;
    pthread_mutex_lock(&spy.lock);
    CHECK(user == &spy && tensor->size > 0);
    CHECK_EQ_INT(tensor->device.kind, spy.table->kind);
    status = spy_fails(&spy.prepares, spy.fail_prepare, error);
    if (status == TPRPC_OK) status = spy.table->prepare(spy_own(), ctx, tensor, keep, error);
    if (status == TPRPC_OK) spy.keeps[spy.keep_count++].keep = *keep;
    REQUIRE(spy.keep_count < PIECES);
    pthread_mutex_unlock(&spy.lock);
    return status;
}

static void spy_sent(void *user, tprpc_context *ctx, void *keep) {
    int i = 0;
    pthread_mutex_lock(&spy.lock);
    while (i < spy.keep_count && (spy.keeps[i].keep != keep || spy.keeps[i].sent)) i++;
    if (CHECK(user == &spy && i < spy.keep_count)) {   /* else twice, or what was never kept */
        spy.keeps[i].sent++;
        spy.table->sent(spy_own(), ctx, keep);
    }
    pthread_mutex_unlock(&spy.lock);
}

static tprpc_status spy_copy(void *user, tprpc_context *ctx, const tprpc_tensor *tensor, void **data,
                             tprpc_error *error) {
    tprpc_status status;
    pthread_mutex_lock(&spy.lock);
    CHECK(user == &spy && tensor->size > 0);
    CHECK_EQ_INT(tensor->device.kind, spy.table->kind);
    status = spy_fails(&spy.copies, spy.fail_copy, error);
    if (status == TPRPC_OK) status = spy.table->copy(spy_own(), ctx, tensor, data, error);
    if (status == TPRPC_OK) spy_note(*data, tensor, true);
    pthread_mutex_unlock(&spy.lock);
    return status;
}

static tprpc_status spy_allocate(void *user, tprpc_context *ctx, tprpc_tensor *tensor, tprpc_error *error) {
    tprpc_status status;
    pthread_mutex_lock(&spy.lock);
    CHECK(user == &spy && tensor->size > 0);
    CHECK_EQ_INT(tensor->device.kind, spy.table->kind);
    REQUIRE(spy.asked_count < PIECES);
    spy.asked[spy.asked_count] = tensor->stream;
    status = spy_fails(&spy.asked_count, spy.fail_allocate, error);
    if (status == TPRPC_OK) status = spy.table->allocate(spy_own(), ctx, tensor, error);
    if (status == TPRPC_OK) spy_note(tensor->data, tensor, false);
    pthread_mutex_unlock(&spy.lock);
    return status;
}

/* Of what was given once; with its size, its device, and the stream that it was given on. */
static void spy_release(void *user, tprpc_context *ctx, tprpc_device device, void *data, size_t size, void *stream) {
    int i = 0;
    pthread_mutex_lock(&spy.lock);
    while (i < spy.piece_count && (spy.pieces[i].data != data || spy.pieces[i].released)) i++;
    if (CHECK(user == &spy && i < spy.piece_count)) {
        piece *p = &spy.pieces[i];
        p->released++;
        CHECK_EQ_INT(size, p->size);
        CHECK(device.kind == p->device.kind && device.index == p->device.index);
        /* a copy is made on the stream that the tensor has: none is the library's, by name after prepare */
        CHECK(stream == p->stream || (p->copied && !p->stream && stream == spy_default(ctx, device)));
        spy.table->release(spy_own(), ctx, device, data, size, stream);
    }
    pthread_mutex_unlock(&spy.lock);
}

static int spy_released(void) {
    int i, count = 0;
    pthread_mutex_lock(&spy.lock);
    for (i = 0; i < spy.piece_count; i++) count += spy.pieces[i].released;
    for (i = 0; i < spy.keep_count; i++) count += spy.keeps[i].sent;
    pthread_mutex_unlock(&spy.lock);
    return count;
}

static void *spy_stream(void *user, tprpc_context *ctx, tprpc_device device) {
    CHECK(user == &spy);
    return spy_default(ctx, device);
}

static int32_t spy_device_count(void *user) {
    CHECK(user == &spy);
    return spy.table->device_count(spy_own());
}

static void spy_begin(const kit *k) {
    k->begin(1000);
    spy.kit = k;
    spy.table = k->converter->converter;
    spy.mine = *spy.table;
    if (spy.mine.device_count) spy.mine.device_count = spy_device_count;
    if (spy.mine.stream) spy.mine.stream = spy_stream;
    if (spy.mine.prepare) spy.mine.prepare = spy_prepare;
    if (spy.mine.sent) spy.mine.sent = spy_sent;
    if (spy.mine.copy) spy.mine.copy = spy_copy;
    spy.mine.allocate = spy_allocate;
    spy.mine.release = spy_release;
    spy.backend = *k->converter;
    spy.backend.converter = &spy.mine;
    spy.backend.name = "spied";
    spy.backend.user = &spy;
    spy.list[0] = &toy_backend;
    spy.list[1] = k->channel;
    spy.list[2] = &spy.backend;
    world_backends = spy.list;
    world_backend_count = COUNT(spy.list);
    spy.piece_count = spy.keep_count = spy.asked_count = spy.prepares = spy.copies = 0;
    spy.fail_prepare = spy.fail_copy = spy.fail_allocate = 0;
    memset(spy.pieces, 0, sizeof spy.pieces);
    memset(spy.keeps, 0, sizeof spy.keeps);
}

/* When no context is left: all that was given was given back. */
static void spy_end(void) {
    int i;
    for (i = 0; i < spy.piece_count; i++) CHECK_EQ_INT(spy.pieces[i].released, 1);
    for (i = 0; i < spy.keep_count; i++) CHECK_EQ_INT(spy.keeps[i].sent, spy.table->sent ? 1 : 0);
    spy.kit->end();
}

/* ---- what is sent: on the device, two with a stream of the user's and of the library's, one empty; one on the host */

enum { CARGO = 4, CARGO_SIZE = 20000, CARGO_DEVICES = 2 };   /* the first ones have bytes on a device */

typedef struct cargo {
    tprpc_tensor tensors[CARGO];
    void   *own[CARGO_DEVICES], *streams[CARGO_DEVICES];
    uint8_t host[CARGO_SIZE];
    outcome written;
    seen    got;
} cargo;

static tprpc_device kind_device(int32_t index) {
    tprpc_device device;
    device.kind = spy.table->kind;
    device.index = index;
    return device;
}

static int32_t last_device(void) { return spy.table->device_count ? spy.table->device_count(spy_own()) - 1 : 0; }

static void cargo_put(const cargo *c, int i, unsigned seed) {
    uint8_t bytes[CARGO_SIZE];
    fill(bytes, sizeof bytes, seed);
    spy.kit->put(c->tensors[i].device.index, c->streams[i], c->tensors[i].data, bytes, sizeof bytes);
}

static void cargo_look(const tprpc_message *message, void *arg) {
    uint8_t bytes[CARGO_SIZE];
    int i, k;
    (void)arg;
    REQUIRE_EQ_INT(message->tensor_count, CARGO);
    for (i = 0; i < CARGO_DEVICES; i++) {
        const tprpc_tensor *t = &message->tensors[i];
        CHECK_EQ_INT(t->device.kind, spy.table->kind);
        CHECK_EQ_INT(t->device.index, last_device());
        REQUIRE_EQ_INT(t->size, CARGO_SIZE);
        pthread_mutex_lock(&spy.lock);
        for (k = 0; k < spy.piece_count && (spy.pieces[k].data != t->data || spy.pieces[k].released); k++) {}
        CHECK(k < spy.piece_count && spy.pieces[k].stream == t->stream && !spy.pieces[k].copied);
        pthread_mutex_unlock(&spy.lock);
        spy.kit->get(t->device.index, t->stream ? t->stream : spy_default(NULL, t->device), bytes, t->data, CARGO_SIZE);
        CHECK(filled(bytes, CARGO_SIZE, (unsigned)i));
    }
    CHECK_EQ_INT(message->tensors[2].size, 0);
    CHECK_EQ_INT(message->tensors[3].device.kind, TPRPC_CPU);
    CHECK(filled(message->tensors[3].data, CARGO_SIZE, 3));
}

/* ctx: whose stream a tensor without one is ready on, where the converter sees to it; NULL: the caller names his own
   for it. */
static cargo *cargo_new(tprpc_context *ctx) {
    cargo *c = (cargo *)calloc(1, sizeof(cargo));
    int i;
    REQUIRE(c != NULL);
    c->got.look = cargo_look;
    for (i = 0; i < CARGO_DEVICES; i++) {
        c->tensors[i].device = kind_device(i ? last_device() : 0);
        c->own[i] = c->streams[i] = spy.kit->stream_new(c->tensors[i].device.index);
        if (i && ctx) c->streams[i] = spy.table->prepare ? spy_default(ctx, c->tensors[i].device) : NULL;
        c->tensors[i].data = spy.kit->alloc(c->tensors[i].device.index, CARGO_SIZE);
        c->tensors[i].size = CARGO_SIZE;
        cargo_put(c, i, (unsigned)i);
    }
    c->tensors[0].stream = c->own[0];
    c->tensors[0].target = kind_device(last_device());   /* the other one: where it comes from */
    c->tensors[2].device = kind_device(0);
    fill(c->host, sizeof c->host, 3);
    c->tensors[3].data = c->host;
    c->tensors[3].size = sizeof c->host;
    return c;
}

static void cargo_free(cargo *c) {
    uint8_t bytes[CARGO_SIZE];
    int i;
    for (i = 0; i < CARGO_DEVICES; i++) {   /* once what is queued has run */
        spy.kit->get(c->tensors[i].device.index, c->streams[i], bytes, c->tensors[i].data, CARGO_SIZE);
        spy.kit->free(c->tensors[i].device.index, c->tensors[i].data);
        spy.kit->stream_free(c->own[i]);
    }
    free(c);
}

static tprpc_message cargo_message(cargo *c, bool lent) {
    tprpc_message message;
    memset(&message, 0, sizeof message);
    message.tensors = c->tensors;
    message.tensor_count = CARGO;
    if (lent) message.release = on_release;
    message.release_user = &c->written;
    return message;
}

static tprpc_status cargo_write(tprpc_pipe *pipe, cargo *c, bool lent) {
    tprpc_message message = cargo_message(c, lent);
    tprpc_status status = tprpc_pipe_write(pipe, &message, on_written, &c->written);
    if (status == TPRPC_OK && !lent) {     /* the user's again; in the order of the streams */
        cargo_put(c, 0, 99);
        cargo_put(c, 1, 99);
    }
    return status;
}

static void cargo_ends(world *w, cargo *c, bool lent) {
    UNTIL(w, c->got.o.runs, 1);
    UNTIL(w, c->written.runs, 1);
    if (lent) UNTIL(w, c->written.releases, 1);
    CHECK_EQ_INT(c->got.o.status, TPRPC_OK);
    CHECK_EQ_INT(c->written.status, TPRPC_OK);
}

/* A trip that goes well after one that did not. */
static void cargo_again(world *w, cargo *c, bool lent) {
    memset(&c->written, 0, sizeof c->written);
    memset(&c->got.o, 0, sizeof c->got.o);
    REQUIRE_EQ_INT(cargo_write(w->pipe[1], c, lent), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(w->pipe[0], NULL, on_seen, &c->got), TPRPC_OK);
    cargo_ends(w, c, lent);
}

static void trip_over(world *w, cargo *c) {
    world_close(w);
    cargo_free(c);
    spy_end();
}

static void converter_trip(const kit *k, bool lent, int threads) {
    world w;
    cargo *c;
    int i;
    spy_begin(k);
    world_open(&w, "toy", NULL, "toy://", threads);
    c = cargo_new(w.ctx[1]);
    REQUIRE_EQ_INT(cargo_write(w.pipe[1], c, lent), TPRPC_OK);
    if (!threads) for (i = 0; i < 20; i++) pump(&w);
    CHECK_EQ_INT(spy.prepares, spy.table->prepare ? CARGO_DEVICES : 0);
    CHECK_EQ_INT(spy.copies, lent ? 0 : CARGO_DEVICES);
    CHECK_EQ_INT(spy_released(), 0);   /* nobody has read it: its memory is needed */
    CHECK_EQ_INT(spy.asked_count, 0);
    REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_seen, &c->got), TPRPC_OK);
    cargo_ends(&w, c, lent);
    CHECK_EQ_INT(spy.asked_count, CARGO_DEVICES);
    for (i = 0; i < spy.asked_count; i++) CHECK(spy.asked[i] == NULL);
    trip_over(&w, c);
}

static void v_lent(void *arg) { converter_trip((const kit *)arg, true, 0); }
static void v_copied(void *arg) { converter_trip((const kit *)arg, false, 0); }
static void v_threads(void *arg) {
    converter_trip((const kit *)arg, true, 2);
    converter_trip((const kit *)arg, false, 2);
}

/* What was put aside until the pipe is open is kept all the while, and given back when that comes to nothing. */
static void v_parked(void *arg) {
    int variant;
    for (variant = 0; variant < 4; variant++) {
        const bool lent = variant & 1, closes = variant & 2;
        tprpc_pipe_desc connecting;
        tprpc_pipe *first;
        world w;
        cargo *c;
        spy_begin((const kit *)arg);
        world_open(&w, "toy", NULL, "toy://", 0);
        first = w.pipe[0];
        c = cargo_new(w.ctx[1]);
        memset(&connecting, 0, sizeof connecting);
        connecting.address = tprpc_listener_address(w.listener, NULL);
        tprpc_pipe_close(w.pipe[1]);
        if (!closes) REQUIRE_EQ_INT(tprpc_accept(w.listener, on_accepted, &w), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_connect(w.ctx[1], &connecting, &w.pipe[1], NULL), TPRPC_OK);
        REQUIRE_EQ_INT(cargo_write(w.pipe[1], c, lent), TPRPC_OK);
        CHECK_EQ_INT(spy.prepares, spy.table->prepare ? CARGO_DEVICES : 0);
        CHECK_EQ_INT(spy_released(), 0);
        if (closes) {
            tprpc_pipe_close(w.pipe[1]);
            w.pipe[1] = NULL;
            UNTIL(&w, c->written.runs, 1);
            CHECK_EQ_INT(c->written.status, TPRPC_ERROR_CLOSED);
        } else {
            UNTIL(&w, w.accepted, 2);
            tprpc_pipe_close(first);
            REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_seen, &c->got), TPRPC_OK);
            cargo_ends(&w, c, lent);
        }
        trip_over(&w, c);
    }
}

/* The converter fails at one of the tensors: what it had given for others comes back, and the pipe lives on. */
static void v_fails_sending(void *arg) {
    int lent, which, copies;
    for (copies = !((const kit *)arg)->converter->converter->prepare; copies < 2; copies++) {
        for (lent = 0; lent < 2 - copies; lent++) {
            for (which = 1; which <= CARGO_DEVICES; which++) {
                world w;
                cargo *c;
                spy_begin((const kit *)arg);
                world_open(&w, "toy", NULL, "toy://", 0);
                c = cargo_new(w.ctx[1]);
                *(copies ? &spy.fail_copy : &spy.fail_prepare) = which;
                CHECK_EQ_INT(cargo_write(w.pipe[1], c, lent), TPRPC_ERROR_DEVICE);
                CHECK_EQ_INT(copies ? spy.copies : spy.prepares, which);
                CHECK_EQ_INT(spy_released(), spy.piece_count + spy.keep_count);   /* at once */
                CHECK_EQ_INT(c->written.releases, lent);
                CHECK_EQ_INT(c->written.runs, 0);
                cargo_again(&w, c, lent);
                trip_over(&w, c);
            }
        }
    }
}

static void v_fails_receiving(void *arg) {
    int which;
    for (which = 1; which <= CARGO_DEVICES; which++) {
        world w;
        cargo *c;
        spy_begin((const kit *)arg);
        world_open(&w, "toy", NULL, "toy://", 0);
        c = cargo_new(w.ctx[1]);
        spy.fail_allocate = which;
        REQUIRE_EQ_INT(cargo_write(w.pipe[1], c, true), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_seen, &c->got), TPRPC_OK);
        UNTIL(&w, c->got.o.runs, 1);
        UNTIL(&w, c->written.runs, 1);
        UNTIL(&w, c->written.releases, 1);
        CHECK_EQ_INT(c->got.o.status, TPRPC_ERROR_DEVICE);
        CHECK_CONTAINS(c->got.o.text, "spied: lost");
        CHECK_EQ_INT(c->written.status, TPRPC_ERROR_PEER);
        CHECK_EQ_INT(spy.asked_count, which);
        CHECK_EQ_INT(spy_released(), spy.piece_count + spy.keep_count);
        cargo_again(&w, c, true);
        trip_over(&w, c);
    }
}

/* Either end goes while copies are late. */
static void v_closed(void *arg) {
    int variant;
    for (variant = 0; variant < 16; variant++) {
        const int closer = variant & 1, moment = variant >> 2;
        const bool lent = variant & 2;
        int64_t until;
        world w;
        cargo *c;
        spy_begin((const kit *)arg);
        world_open(&w, "toy", NULL, "toy://", 0);
        c = cargo_new(w.ctx[1]);
        REQUIRE_EQ_INT(cargo_write(w.pipe[1], c, lent), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_seen, &c->got), TPRPC_OK);
        for (until = test_now_us() + moment * 1500; test_now_us() < until;) pump(&w);
        tprpc_pipe_close(w.pipe[closer]);
        w.pipe[closer] = NULL;
        UNTIL(&w, c->got.o.runs, 1);
        UNTIL(&w, c->written.runs, 1);
        world_close(&w);
        if (lent) CHECK_EQ_INT(c->written.releases, 1);
        cargo_free(c);
        spy_end();
    }
}

/* ---- calls: the streams that the caller names */

static void cargo_back(tprpc_request request, const tprpc_message *message, void *user) {
    cargo_look(message, NULL);
    (*(int *)user)++;
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static void cargo_answered(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    cargo *c = (cargo *)user;
    int i;
    if (reply) cargo_look(reply, NULL);
    for (i = 0; reply && i < CARGO_DEVICES; i++) CHECK(reply->tensors[i].stream == c->own[1]);
    ended(&c->got.o, status, error);
}

static void v_calls(void *arg) {
    tprpc_agent *agents[2] = {NULL, NULL};
    tprpc_store *store;
    tprpc_method_desc method;
    tprpc_message message;
    tprpc_call_options options;
    tprpc_stream stream;
    tprpc_error error = TPR_ZERO;
    world w;
    cargo *c;
    int i, ready = 0, handled = 0;
    memset(&w, 0, sizeof w);
    memset(&method, 0, sizeof method);
    memset(&options, 0, sizeof options);
    spy_begin((const kit *)arg);
    store = agents_create(&w, "tcp", NULL, agents);
    method.name = "back";
    method.handler = cargo_back;
    method.user = &handled;
    REQUIRE_EQ_INT(tprpc_agent_register(agents[1], &method, &error), TPRPC_OK);
    for (i = 0; i < 2; i++) REQUIRE_EQ_INT(tprpc_agent_start(agents[i], on_ready, &ready, &error), TPRPC_OK);
    UNTIL(&w, ready, 2);
    c = cargo_new(NULL);
    stream.device = kind_device(last_device());
    stream.stream = c->own[1];
    message = cargo_message(c, false);
    options.streams = &stream;
    options.stream_count = 1;
    options.on_done = cargo_answered;
    options.user = c;
    options.error = &error;
    if (tprpc_call(agents[0], "right", "back", &message, &options, NULL) != TPRPC_OK)
        fprintf(stderr, "call: %s\n", error.text);
    for (i = 0; i < CARGO_DEVICES; i++) CHECK(spy.pieces[i].copied && spy.pieces[i].stream == c->own[i]);
    cargo_put(c, 0, 99);
    cargo_put(c, 1, 99);
    UNTIL(&w, c->got.o.runs, 1);
    CHECK_EQ_INT(c->got.o.status, TPRPC_OK);
    CHECK_EQ_INT(handled, 1);
    CHECK_EQ_INT(spy.asked_count, 2 * CARGO_DEVICES);
    for (i = 0; i < spy.asked_count; i++) CHECK(spy.asked[i] == (i < CARGO_DEVICES ? NULL : c->own[1]));
    for (i = 0; i < 2; i++) CHECK_EQ_INT(tprpc_agent_destroy(agents[i]), TPRPC_OK);
    tprpc_store_close(store);
    for (i = 1; i >= 0; i--) CHECK_EQ_INT(tprpc_context_destroy(w.ctx[i]), TPRPC_OK);
    cargo_free(c);
    spy_end();
}

static void v_table(void *arg) {
    const kit *k = (const kit *)arg;
    const tprpc_converter_table *t = k->converter->converter;
    tprpc_context *ctx;
    int32_t i, count;
    spy_begin(k);
    count = t->device_count ? t->device_count(k->converter->user) : 1;
    ctx = context(NULL, NULL, 0);
    CHECK(t->kind == TPRPC_CPU || t->kind == TPRPC_CUDA || t->kind >= TPRPC_DEVICE_USER);
    CHECK(t->allocate && t->release);
    CHECK(!t->prepare == !t->sent);
    CHECK(count > 0);
    for (i = 0; i < count; i++) {      /* a device's stream is one */
        const tprpc_device device = {t->kind, i};
        CHECK(!t->stream || t->stream(k->converter->user, ctx, device) == t->stream(k->converter->user, ctx, device));
    }
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    spy_end();
}

static void v_unknown(void *arg) {
    fprintf(stderr, "converter %s could not be exercised: this suite has no kit for its kind of device\n",
            ((const tprpc_backend *)arg)->name);
    CHECK(0);
}

/* ---- the registry ---- */

typedef struct named { const char *name; void (*run)(void *arg); } named;

static void add(const char *suite, const char *what, const char *name, void (*run)(void *), void *arg) {
    char text[120];
    snprintf(text, sizeof text, "%s_%s_%s", suite, what, name);
    test_add(text, run, arg, 120);
}

static channel_case cases[512];
static half_case halves[512];
static size_t case_count, half_count;

static void add_transport(const tprpc_backend *backend) {
    static const named tests[] = {
        {"connect", t_connect}, {"listen_twice", t_listen_twice}, {"nobody", t_nobody}, {"small", t_small},
        {"streams", t_streams}, {"backpressure", t_backpressure}, {"more", t_more}, {"handles", t_handles},
        {"close", t_close}, {"close_unread", t_close_unread}, {"sleep_data", t_sleep_data},
        {"sleep_connection", t_sleep_connection}, {"sleep_room", t_sleep_room}, {"sleep_death", t_sleep_death},
        {"disconnect_inside", t_disconnect_inside}, {"new_owner", t_new_owner}, {"many", t_many},
        {"threads", t_threads}};
    static const named two[] = {{"killed", t_killed}, {"processes", t_processes}};
    size_t i;
    for (i = 0; i < COUNT(two) && !stays_within(backend); i++)
        add("transport", backend->name, two[i].name, two[i].run, (void *)(uintptr_t)backend);
    if (stays_within(backend)) add("transport", backend->name, "within", t_within, (void *)(uintptr_t)backend);
    for (i = 0; i < COUNT(tests); i++)
        add("transport", backend->name, tests[i].name, tests[i].run, (void *)(uintptr_t)backend);
}

static void add_case(const channel_case *c, const char *name) {
    static const named tests[] = {{"sizes", c_sizes},   {"threads", c_threads}, {"unaligned", c_unaligned},
                                  {"closed", c_closed}, {"refused", c_refused}};
    const bool proves = c->channel->channel->challenge != NULL, halved = c->channel == c->kit->apart;
    void *arg = (void *)(uintptr_t)c;
    size_t i;
    if (c->why_not) add("channel", name, "says_why_not", c_says_why_not, arg);
    if (refusal(c->channel, c->transport, c->kit)) return;
    for (i = 0; i < COUNT(tests); i++) {
        half_case *h = &halves[half_count];
        if (!halved) {
            add("channel", name, tests[i].name, tests[i].run, arg);
            continue;
        }
        REQUIRE(++half_count < COUNT(halves));
        h->c = c;
        h->run = tests[i].run;
        add("channel", name, tests[i].name, c_apart, h);
    }
    add("channel", name, proves ? "proof" : "needs_no_proof", proves ? c_proof : c_needs_no_proof, arg);
    if (stays_within(c->channel)) {
        add("channel", name, "within", c_within, arg);
    } else if (!stays_within(c->transport)) {  /* else they die together */
        add("channel", name, "leaves", c_leaves, arg);
        add("channel", name, "killed", c_killed, arg);
    }
}

/* Between host memory, and between that and the devices of each kit; under the thread sanitizer, which is slow, a way to
   or from a device over one of three transports in turn. */
static void add_channel(const tprpc_backend *backend, const tprpc_backend *transport) {
    static size_t turn;
    size_t k, n, found = 0;
    turn++;
    for (n = 0; n < COUNT(kits); n++) {
        for (k = n ? 1 : 0; k < 4; k++) {
            const char *const names[2] = {"host", kits[n]->name};
            tprpc_device from = {TPRPC_CPU, 0}, to = {TPRPC_CPU, 0};
            channel_case *c = &cases[case_count];
            char name[64];
            if (k & 2) from.kind = kits[n]->kind;
            if (k & 1) to.kind = kits[n]->kind;
            to.index = k & 1;
            if (!backend->channel->moves(NULL, from, to)) continue;
            found++;
            if (TEST_TSAN && k && backend != kits[n]->apart && (k + turn) % 3) continue;
            REQUIRE(++case_count < COUNT(cases));
            c->channel = backend;
            c->transport = transport;
            c->kit = kits[n];
            c->kinds[0] = (k & 2) != 0;
            c->kinds[1] = (k & 1) != 0;
            c->why_not = refusal(backend, transport, kits[n]);
            if (!c->why_not && backend == kits[n]->apart) c->why_not = "in this process";
            snprintf(name, sizeof name, "%s_over_%s_%s_to_%s", backend->name, transport->name, names[c->kinds[0]],
                     names[c->kinds[1]]);
            add_case(c, name);
        }
    }
    if (!found) add("channel", backend->name, "moves", c_moves_nothing, (void *)(uintptr_t)backend);
}

static void add_converter(const tprpc_backend *backend) {
    static const named tests[] = {
        {"table", v_table}, {"lent", v_lent}, {"copied", v_copied}, {"threads", v_threads}, {"parked", v_parked},
        {"fails_sending", v_fails_sending}, {"fails_receiving", v_fails_receiving}, {"closed", v_closed},
        {"calls", v_calls}};
    size_t i, n = 0;
    while (n < COUNT(kits) && kits[n]->converter != backend) n++;
    if (n == COUNT(kits)) {
        add("converter", backend->name, "kit", v_unknown, (void *)(uintptr_t)backend);
        return;
    }
    for (i = 0; i < COUNT(tests); i++)
        add("converter", backend->name, tests[i].name, tests[i].run, (void *)(uintptr_t)kits[n]);
}

/* Adds what tests these backends; channels go over each transport of the library's, and the toy. */
static void add_backends(const tprpc_backend *const *backends, size_t count) {
    size_t i, j;
    for (i = 0; i < count; i++) {
        if (backends[i]->transport) add_transport(backends[i]);
        if (backends[i]->converter) add_converter(backends[i]);
        for (j = 0; j < TPR_COUNT(tpr_backends_all) && backends[i]->channel; j++)
            if (tpr_backends_all[j]->transport) add_channel(backends[i], tpr_backends_all[j]);
        if (backends[i]->channel) add_channel(backends[i], &toy_backend);
    }
}

#ifndef CONFORMANCE_KIT

TESTS(registry) {
    add_backends(tpr_backends_all, TPR_COUNT(tpr_backends_all));
    add_backends(toy_backends, COUNT(toy_backends));
}

/* ---- as many as a context takes ---- */

enum { OURS = TPR_COUNT(tpr_backends_all), THEIRS = TPR_CONTEXT_BACKENDS - OURS };

static tprpc_backend crowd[TPR_CONTEXT_BACKENDS + 1];
static char crowd_names[TPR_CONTEXT_BACKENDS + 1][16];
static const tprpc_backend *crowd_list[TPR_CONTEXT_BACKENDS + 1];

/* The toys again and again under other names: the converter, the channels, and for the rest transports. */
static void crowd_fill(size_t count, size_t channels) {
    size_t i;
    for (i = 0; i < count; i++) {
        crowd[i] = i == 0 ? toyd_backend : i <= channels ? toyc_backend : toy_backend;
        snprintf(crowd_names[i], sizeof crowd_names[i], "crowd%d", (int)i);
        crowd[i].name = crowd_names[i];
        crowd_list[i] = &crowd[i];
    }
    world_backends = crowd_list;
    world_backend_count = count;
}

static void crowd_is_refused(size_t count, size_t channels, const char *why) {
    int fds = test_count_fds(), threads = test_count_threads();
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error = TPR_ZERO;
    memset(&desc, 0, sizeof desc);
    crowd_fill(count, channels);
    desc.backends = crowd_list;
    desc.backend_count = count;
    desc.threads = 1;
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_LIMIT);
    CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(error.text, why);
    CHECK(ctx == NULL);
    CHECK_EQ_INT(test_count_fds(), fds);
    CHECK_EQ_INT(test_count_threads(), threads);
}

static size_t crowd_channels(void) {   /* of the user's, beside the library's */
    size_t i, left = TPR_WIRE_CHANNELS;
    for (i = 0; i < OURS; i++) left -= tpr_backends_all[i]->channel != NULL;
    return left;
}

TEST(too_many_backends) {
    crowd_is_refused(THEIRS + 1, 1, "31 backends");
    crowd_is_refused(TPR_CONTEXT_BACKENDS + 1, 1, "31 backends");
    crowd_is_refused(1 + crowd_channels() + 1, crowd_channels() + 1, "16 channels");
}

/* A pipe moves to the last transport, and messages go by the last channel on every kind of way. */
TEST(most_backends) {
    static const bool kinds[3][2] = {{false, false}, {true, true}, {true, false}};
    const size_t channels = crowd_channels();
    const char *addresses[2] = {"tcp://127.0.0.1:0", NULL};
    char address[32];
    int threads, fds;
    size_t k;
    crowd_fill(THEIRS, channels);
    crowd[THEIRS - 1].priority++;
    crowd[channels].priority++;
    snprintf(address, sizeof address, "%s://", crowd[THEIRS - 1].name);
    addresses[1] = address;
    for (threads = 0; threads < 2; threads++) {
        tprpc_listener_desc listening;
        tprpc_pipe_desc connecting;
        tprpc_pipe_info info;
        world w;
        toys_begin(50);
        fds = test_count_fds();
        memset(&w, 0, sizeof w);
        memset(&listening, 0, sizeof listening);
        memset(&connecting, 0, sizeof connecting);
        w.threads = threads;
        for (k = 0; k < 2; k++) w.ctx[k] = context(NULL, NULL, threads);
        CHECK_EQ_INT(w.ctx[0]->backend_count, 31);
        listening.addresses = addresses;
        listening.address_count = 2;
        REQUIRE_EQ_INT(tprpc_listen(w.ctx[0], &listening, &w.listener, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_accept(w.listener, on_accepted, &w), TPRPC_OK);
        connecting.address = tprpc_listener_address(w.listener, "tcp");
        REQUIRE_EQ_INT(tprpc_connect(w.ctx[1], &connecting, &w.pipe[1], NULL), TPRPC_OK);
        UNTIL(&w, w.accepted, 1);
        for (k = 0; k < COUNT(kinds); k++) {
            batch b;
            batch_fill(&b, kinds[k][0], kinds[k][1], ITEMS, 0, 7);
            batch_write(&w, &b, 1);
            batch_read(&w, &b, 0);
            batch_ends(&w, &b, TPRPC_OK, TPRPC_OK);
            batch_check(&b, 7);
            batch_free(&b);
        }
        for (k = 0; k < 2; k++) {
            REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[k], &info, sizeof info), TPRPC_OK);
            CHECK_STR(info.transport, crowd[THEIRS - 1].name);
            CHECK(info.channel[0]);    /* one of ours, for host memory */
            CHECK_EQ_INT(info.path_count, COUNT(info.paths));
        }
        world_close(&w);
        CHECK_EQ_INT(test_count_fds(), fds);
        toys_end();
    }
}

#endif
