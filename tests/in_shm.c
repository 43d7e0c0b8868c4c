/* Connections through shared memory, below the pipes: streams, full rings, sleeping and waking, descriptors, deaths, and
   peers that break the rules. */
#include "harness.h"

#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <sys/socket.h>
#include <sys/un.h>

#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"

static const tprpc_transport_table *const shm = &tpr_shm_table;

/* A context with one loop, whose one source is the instance. */
typedef struct side {
    tprpc_listen_owner owner;
    tprpc_context *ctx;
    tprpc_host     host;
    tpr_shm_instance *instance;
    void *listener;
    char  address[108];
    struct end *accepted[256];
    int accepted_count;
} side;

typedef struct end {
    tprpc_conn_owner owner;
    tpr_shm_conn *conn;
    int  opens, sends, losts, recvs;
    bool hold, echo, close_on_recv;      /* what RECV does: nothing; sends it back; closes */
    tprpc_error error;
    uint64_t got;                        /* bytes of the test's stream */
    uint32_t seed;
} end;

static bool broken_os;                   /* failures are wanted: nothing is checked while sides are made */

static bool side_init(side *s) {
    tprpc_error error;
    void *instance = NULL;
    tpr_loop_source source;
    memset(s, 0, sizeof *s);
    s->ctx = (tprpc_context *)calloc(1, sizeof *s->ctx);
    s->ctx->env.memory.hooks.alloc = tpr_base_default_alloc;
    s->ctx->env.memory.hooks.free = tpr_base_default_free;
    s->ctx->env.memory.limit = UINT64_C(1) << 32;
    tpr_context_limits(&s->ctx->limits);
    s->ctx->loop_count = 1;
    s->ctx->loops = (tpr_loop *)calloc(1, sizeof(tpr_loop));
    bool ok = tpr_loop_init(s->ctx->loops, &s->ctx->env, s->ctx, 0, &error) == TPRPC_OK;
    s->host.size = sizeof s->host;
    s->host.context = s->ctx;
    if (ok && shm->open(&s->host, NULL, &instance, &error) == TPRPC_OK) {
        s->instance = (tpr_shm_instance *)instance;
        source.instance = instance;
        source.progress = shm->progress;
        source.arm = shm->arm;
        if (tpr_loop_add_source(s->ctx->loops, source, shm->handle(instance), &error) == TPRPC_OK) return true;
    }
    if (!broken_os) fprintf(stderr, "%s\n", error.text);
    CHECK(broken_os);
    if (s->instance) shm->close(s->instance);
    if (ok) tpr_loop_fini(s->ctx->loops);
    free(s->ctx->loops);
    free(s->ctx);
    return false;
}

static void side_fini(side *s) {
    if (s->listener) shm->unlisten(s->listener);
    CHECK_EQ_INT(s->instance->handshake_count, 0);
    CHECK_EQ_INT(s->ctx->loops->processes.count, 0);
    shm->close(s->instance);
    tpr_loop_fini(s->ctx->loops);
    CHECK_EQ_INT(s->ctx->env.memory.used, 0);
    free(s->ctx->loops);
    free(s->ctx);
}

static void side_turn(side *s) {
    tpr_loop_enter(s->ctx->loops);
    tpr_loop_clock(s->ctx->loops);
    tpr_loop_turn(s->ctx->loops);
    tpr_loop_leave(s->ctx->loops);
}

/* Sleeps as a waiting thread would, until there is work or time_ms passed. */
static void side_sleep(side *s, int64_t time_ms) {
    tpr_loop_enter(s->ctx->loops);
    int64_t now = tpr_loop_clock(s->ctx->loops);
    tpr_loop_poll(s->ctx->loops, now + time_ms * 1000, INT64_MAX);
    tpr_loop_leave(s->ctx->loops);
}

static uint8_t stream_byte(uint32_t seed, uint64_t at) { return (uint8_t)(at * 167 + (at >> 8) * 13 + (at >> 16) + seed); }

enum { STREAM_BLOCK = 512 };           /* bytes made at once: the sanitizers look at each copy, not at each byte */

static void stream_block(uint8_t *bytes, uint32_t seed, uint64_t at) {
    for (size_t i = 0; i < STREAM_BLOCK; i++) bytes[i] = stream_byte(seed, at + i);
}

static void stream_fill(uint8_t *out, uint32_t seed, uint64_t at, size_t size) {
    uint8_t bytes[STREAM_BLOCK];
    for (size_t done = 0; done < size; done += sizeof bytes) {
        stream_block(bytes, seed, at + done);
        memcpy(out + done, bytes, size - done < sizeof bytes ? size - done : sizeof bytes);
    }
}

static void end_take(end *e, const uint8_t *bytes, size_t size) {
    uint8_t expected[STREAM_BLOCK];
    for (size_t done = 0; done < size; done += sizeof expected) {
        stream_block(expected, e->seed, e->got + done);
        REQUIRE_MEM(bytes + done, expected, size - done < sizeof expected ? size - done : sizeof expected);
    }
    e->got += size;
}

static void end_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    end *e = TPR_CONTAINER(owner, end, owner);
    CHECK_EQ_INT(e->losts, 0);
    CHECK_EQ_INT((events & TPRPC_EVENT_LOST) != 0, error != NULL);
    e->opens += (events & TPRPC_EVENT_OPEN) != 0;
    e->sends += (events & TPRPC_EVENT_SEND) != 0;
    e->losts += (events & TPRPC_EVENT_LOST) != 0;
    e->recvs += (events & TPRPC_EVENT_RECV) != 0;
    if (error) e->error = *error;
    if (!(events & TPRPC_EVENT_RECV) || e->hold) return;
    if (e->close_on_recv) {
        shm->disconnect(e->conn, TPRPC_OK);
        e->conn = NULL;
        return;
    }
    for (int i = 0; i < 64; i++) {
        tprpc_span span = shm->peek(e->conn);
        if (!span.size) return;
        if (e->echo) span.size = shm->send(e->conn, &span, 1, NULL, 0, false);
        else end_take(e, (const uint8_t *)span.data, span.size);
        if (!span.size) return;
        shm->consume(e->conn, span.size);
    }
}

static end *end_new(void) {
    end *e = (end *)calloc(1, sizeof *e);
    e->owner.event = end_event;
    return e;
}

static void end_free(end *e) {
    if (!e) return;
    if (e->conn) shm->disconnect(e->conn, TPRPC_OK);
    free(e);
}

static void side_accepted(tprpc_listen_owner *owner, void *conn) {
    side *s = TPR_CONTAINER(owner, side, owner);
    end *e = end_new();
    e->conn = (tpr_shm_conn *)conn;
    shm->own(conn, &e->owner);
    REQUIRE(s->accepted_count < 256);
    s->accepted[s->accepted_count++] = e;
}

static bool side_listen(side *s, const char *name) {
    tprpc_error error;
    s->owner.accepted = side_accepted;
    if (shm->listen(s->instance, name, &s->owner, &s->listener, &error) == TPRPC_OK) {
        shm->address(s->listener, s->address, sizeof s->address);
        return true;
    }
    CHECK(broken_os);
    return false;
}

static end *side_connect(side *s, const char *address, tprpc_error *error) {
    end *e = end_new();
    void *conn = NULL;
    if (shm->connect(s->instance, address, 0, &e->owner, &conn, error) == TPRPC_OK) {
        e->conn = (tpr_shm_conn *)conn;
        return e;
    }
    free(e);
    return NULL;
}

/* Two sides in this process, and one connection from the second to the first. */
typedef struct pair { side a, b; end *in, *out; } pair;

static void pair_connect(pair *p) {
    tprpc_error error;
    int before = p->a.accepted_count;
    p->out = side_connect(&p->b, p->a.address, &error);
    REQUIRE(p->out != NULL);
    for (int i = 0; i < 20 * TPR_SHM_LOOK_TURNS && (!p->out->opens || p->a.accepted_count == before); i++) {
        side_turn(&p->a);
        side_turn(&p->b);
    }
    REQUIRE_EQ_INT(p->out->opens, 1);
    REQUIRE_EQ_INT(p->a.accepted_count, before + 1);
    p->in = p->a.accepted[before];
}

static void pair_init(pair *p) {
    REQUIRE(side_init(&p->a) && side_init(&p->b));
    REQUIRE(side_listen(&p->a, ""));
    CHECK_CONTAINS(p->a.address, "tprpc-");
    CHECK_EQ_INT(strlen(p->a.address), 38);
    pair_connect(p);
}

static void pair_turns(pair *p, int count) {
    for (int i = 0; i < count; i++) {
        side_turn(&p->a);
        side_turn(&p->b);
    }
}

static void pair_fini(pair *p) {
    for (int i = 0; i < p->a.accepted_count; i++) end_free(p->a.accepted[i]);
    end_free(p->out);
    side_fini(&p->a);
    side_fini(&p->b);
}

/* Sends `size` bytes of the stream that begins at `at`, in up to three spans. Returns what was taken. */
static size_t send_stream(end *e, uint32_t seed, uint64_t at, size_t size, bool more) {
    static uint8_t bytes[1 << 20];
    tprpc_span spans[3];
    stream_fill(bytes, seed, at, size);
    spans[0].data = bytes;
    spans[0].size = size / 3;
    spans[1].data = NULL;
    spans[1].size = 0;
    spans[2].data = bytes + size / 3;
    spans[2].size = size - size / 3;
    return shm->send(e->conn, spans, 3, NULL, 0, more);
}

static uint32_t random_state = 1;
static uint32_t random_next(void) {
    random_state = random_state * 1664525 + 1013904223;
    return random_state >> 8;
}

TEST(connects_and_echoes) {
    pair p;
    char peer[64], expected[64];
    int fds = test_count_fds();
    pair_init(&p);
    shm->peer(p.out->conn, peer, sizeof peer);
    snprintf(expected, sizeof expected, "process %d", (int)getpid());
    CHECK_STR(peer, expected);
    CHECK_EQ_INT(shm->check_peer(p.in->conn, NULL), TPRPC_OK);
    p.in->echo = true;
    CHECK_EQ_INT(send_stream(p.out, 0, 0, 5000, false), 5000);
    pair_turns(&p, 10);
    CHECK_EQ_INT(p.out->got, 5000);
    pair_fini(&p);
    CHECK_EQ_INT(test_count_fds(), fds);
}

TEST(refuses_wrong_addresses) {
    pair p;
    side s;
    tprpc_error error;
    char name[200];
    void *listener;
    pair_init(&p);
    CHECK(!side_connect(&p.b, "nobody-is-here", &error));
    CHECK_EQ_INT(error.status, TPRPC_ERROR_UNREACHABLE);
    CHECK_CONTAINS(error.text, "shm://nobody-is-here");
    CHECK(!side_connect(&p.b, "", &error));
    CHECK_EQ_INT(error.status, TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(shm->listen(p.b.instance, p.a.address, &s.owner, &listener, &error), TPRPC_ERROR_UNREACHABLE);
    CHECK_CONTAINS(error.text, p.a.address);
    for (size_t length = 99; length < 199; length++) {
        memset(name, 'x', length);
        name[length] = 0;
        tprpc_status status = shm->listen(p.b.instance, name, &p.b.owner, &listener, &error);
        if (status == TPRPC_OK) shm->unlisten(listener);
        CHECK_EQ_INT(status, length <= 100 ? TPRPC_OK : TPRPC_ERROR_INVALID);
        if (status != TPRPC_OK) CHECK_CONTAINS(error.text, "100 bytes");
        CHECK(!side_connect(&p.b, name, &error));
        CHECK_EQ_INT(error.status, length <= 100 ? TPRPC_ERROR_UNREACHABLE : TPRPC_ERROR_INVALID);
        if (length > 100) CHECK_CONTAINS(error.text, "100 bytes");
    }
    pair_fini(&p);
}

TEST(domains) {
    pair p;
    uint8_t domain[64];
    pair_init(&p);
    size_t size = shm->domain(p.a.instance, domain, sizeof domain);
    CHECK(size > 12 && shm->reaches(p.b.instance, domain, size));
    CHECK(!shm->reaches(p.b.instance, domain, size - 1));
    domain[size - 1] ^= 1;
    CHECK(!shm->reaches(p.b.instance, domain, size));
    CHECK(!shm->public_address(p.a.instance, p.a.address));
    pair_fini(&p);
}

/* Both directions at once, sizes from 1 byte to beyond the ring, readers of every kind. */
TEST(streams) {
    pair p;
    static uint8_t to[70000];
    pair_init(&p);
    p.in->hold = p.out->hold = true;
    p.in->seed = 1;
    p.out->seed = 2;
    uint64_t sent[2] = {0, 0};
    for (int round = 0; round < 20000 / TEST_SLOWDOWN; round++) {
        for (int k = 0; k < 2; k++) {
            end *from = k ? p.in : p.out, *at = k ? p.out : p.in;
            uint32_t kind = random_next() % 8;
            size_t size = kind < 5 ? random_next() % 200 + 1 : kind < 7 ? random_next() % 9000 : random_next() % 500000;
            sent[k] += send_stream(from, at->seed, sent[k], size, random_next() % 4 == 0);
            if (random_next() % 4 == 0) continue;
            if (random_next() % 2) {
                tprpc_span span = shm->peek(at->conn);
                size_t n = span.size ? random_next() % (span.size + 1) : 0;
                end_take(at, (const uint8_t *)span.data, n);
                shm->consume(at->conn, n);
            } else {
                tprpc_span spans[3];
                spans[0].data = to;
                spans[0].size = random_next() % 100;
                spans[1].data = to + spans[0].size;
                spans[1].size = 0;
                spans[2].data = to + spans[0].size;
                spans[2].size = random_next() % (sizeof to - 100);
                size_t n = shm->recv(at->conn, spans, 3);
                end_take(at, to, n);
            }
        }
        if (round % 16 == 0) pair_turns(&p, 1);
    }
    p.in->hold = p.out->hold = false;
    pair_turns(&p, 100);
    CHECK_EQ_INT(p.in->got, sent[0]);
    CHECK_EQ_INT(p.out->got, sent[1]);
    CHECK(sent[0] > 10000000 / TEST_SLOWDOWN && sent[1] > 10000000 / TEST_SLOWDOWN);
    pair_fini(&p);
}

TEST(small_messages_stay_whole) {
    pair p;
    uint64_t sent = 0;
    pair_init(&p);
    p.in->hold = true;
    for (int i = 0; i < 20000; i++) {
        size_t size = random_next() % TPR_SHM_WHOLE + 1;
        size_t n = send_stream(p.out, 0, sent, size, false);
        if (!n) {
            while (shm->peek(p.in->conn).size) shm->consume(p.in->conn, shm->peek(p.in->conn).size);
            n = send_stream(p.out, 0, sent, size, false);
        }
        REQUIRE_EQ_INT(n, size);
        sent += n;
        if (i % 3) continue;
        while (shm->peek(p.in->conn).size != size) shm->consume(p.in->conn, shm->peek(p.in->conn).size);
        shm->consume(p.in->conn, size);
    }
    pair_fini(&p);
}

TEST(full_ring_takes_less_and_says_when_there_is_room) {
    pair p;
    uint64_t sent = 0;
    pair_init(&p);
    p.in->hold = true;
    for (size_t n; (n = send_stream(p.out, 0, sent, 1000, false)) != 0;) sent += n;
    CHECK(sent > TPR_SHM_RING * 9 / 10 && sent < TPR_SHM_RING);
    pair_turns(&p, 200);
    CHECK_EQ_INT(p.out->sends, 0);
    p.in->hold = false;
    pair_turns(&p, 10);
    CHECK_EQ_INT(p.out->sends, 1);
    CHECK_EQ_INT(p.in->got, sent);
    pair_turns(&p, 10);
    CHECK_EQ_INT(p.out->sends, 1);
    CHECK_EQ_INT(send_stream(p.out, 0, sent, 1000, false), 1000);
    pair_fini(&p);
}

TEST(room_wakes_a_writer_that_sleeps) {
    pair p;
    uint64_t sent = 0;
    int64_t deadline = INT64_MAX;
    pair_init(&p);
    struct pollfd look = {(int)shm->handle(p.b.instance), POLLIN, 0};
    for (size_t n; (n = send_stream(p.out, 0, sent, 1000, false)) != 0;) sent += n;
    CHECK(shm->arm(p.b.instance, &deadline));
    CHECK_EQ_INT(poll(&look, 1, 0), 0);
    for (int i = 0; i < 10; i++) side_turn(&p.a);
    CHECK_EQ_INT(p.in->got, sent);
    CHECK_EQ_INT(poll(&look, 1, 1000), 1);
    side_turn(&p.b);
    CHECK_EQ_INT(p.out->sends, 1);
    pair_fini(&p);
}

/* A record that does not fit before the ring's end moves to its start; what lay there in the last round is not read. */
TEST(nothing_is_read_beyond_a_skip) {
    pair p;
    intptr_t handles[TPR_OS_HANDLES] = {0};
    uint8_t bytes[3000] = {0};
    tprpc_span span = {bytes, sizeof bytes};
    pair_init(&p);
    p.in->hold = true;
    for (int i = 0; i < TPR_SHM_HANDLES / TPR_OS_HANDLES; i++)
        CHECK_EQ_INT(shm->send(p.out->conn, &span, 1, handles, TPR_OS_HANDLES, false), sizeof bytes);
    while ((p.out->conn->tx_pos & p.out->conn->mask) + 3008 <= p.out->conn->mask + 1) {
        CHECK_EQ_INT(shm->send(p.out->conn, &span, 1, NULL, 0, false), sizeof bytes);
        while (p.in->conn->rx_pos < p.out->conn->tx_pos) shm->consume(p.in->conn, shm->peek(p.in->conn).size);
    }
    uint64_t before = p.out->conn->tx_pos;
    CHECK_EQ_INT(shm->send(p.out->conn, &span, 1, handles, 1, false), 0);   /* too many descriptors are not taken */
    CHECK(p.out->conn->tx_pos > before);                                   /* but the skip is written */
    CHECK_EQ_INT(shm->peek(p.in->conn).size, 0);
    CHECK_EQ_INT(shm->send(p.out->conn, &span, 1, NULL, 0, false), sizeof bytes);
    CHECK_EQ_INT(shm->peek(p.in->conn).size, sizeof bytes);
    pair_fini(&p);
}

/* ---- sleeping and waking, between threads that sleep whenever they can */

typedef struct sleeper { side s; end *e; uint64_t want; int64_t deadline; uint32_t random; uint8_t bytes[100000]; } sleeper;

static void *sleeper_main(void *arg) {
    sleeper *me = (sleeper *)arg;
    uint64_t sent = 0;
    me->e->hold = true;
    while ((me->e->got < me->want || sent < me->want) && test_now_us() < me->deadline) {
        tprpc_span span;
        me->random = me->random * 1664525 + 1013904223;
        size_t size = (me->random >> 28 ? (me->random >> 8) % 3000 : (me->random >> 8) % 90000) + 1;
        if (size > me->want - sent) size = (size_t)(me->want - sent);
        stream_fill(me->bytes, me->e->seed, sent, size);
        span.data = me->bytes;
        span.size = size;
        size_t taken = shm->send(me->e->conn, &span, 1, NULL, 0, false);
        sent += taken;
        if (taken < size || (sent == me->want && me->e->got < me->want))
            side_sleep(&me->s, 30000);   /* lost: too late */
        else side_turn(&me->s);
        for (int i = 0; (span = shm->peek(me->e->conn)).size && i < 5; i++) {
            end_take(me->e, (const uint8_t *)span.data, span.size);
            shm->consume(me->e->conn, span.size);
        }
    }
    CHECK_EQ_INT(me->e->got, me->want);
    return NULL;
}

TEST(no_wake_up_is_lost) {
    for (int round = 0; round < 10; round++) {
        static sleeper one, two;
        pair p;
        pthread_t thread;
        pair_init(&p);
        one.s = p.a;
        two.s = p.b;
        one.e = p.in;
        two.e = p.out;
        one.random = 1;
        two.random = 2;
        one.want = two.want = 4000000 / TEST_SLOWDOWN;
        one.deadline = two.deadline = test_now_us() + 15000000;
        pthread_create(&thread, NULL, sleeper_main, &one);
        sleeper_main(&two);
        pthread_join(thread, NULL);
        p.a.ctx->loops->callback_thread = 0;
        pair_fini(&p);
    }
}

TEST(armed_wakes_by_its_handle_once) {
    pair p;
    int64_t deadline = INT64_MAX;
    pair_init(&p);
    pair_turns(&p, 5);
    struct pollfd look = {(int)shm->handle(p.a.instance), POLLIN, 0};
    CHECK_EQ_INT(poll(&look, 1, 0), 0);
    send_stream(p.out, 0, 0, 100, false);         /* not armed: no byte is sent */
    CHECK_EQ_INT(poll(&look, 1, 0), 0);
    CHECK(!shm->arm(p.a.instance, &deadline));    /* busy */
    side_turn(&p.a);
    CHECK_EQ_INT(p.in->got, 100);
    CHECK(shm->arm(p.a.instance, &deadline));
    for (int i = 0; i < 5; i++) send_stream(p.out, 0, 100 + 10 * (uint64_t)i, 10, false);
    CHECK_EQ_INT(poll(&look, 1, 1000), 1);
    uint8_t bytes[16];
    CHECK_EQ_INT(recv(p.in->conn->fd, bytes, sizeof bytes, MSG_PEEK), 1);
    side_turn(&p.a);
    CHECK_EQ_INT(p.in->got, 150);
    CHECK_EQ_INT(poll(&look, 1, 0), 0);
    pair_fini(&p);
}

TEST(many_connections_beyond_the_hot_set) {
    pair p;
    enum { N = 200 };
    end *outs[N];
    uint64_t sent[N];
    pair_init(&p);
    outs[0] = p.out;
    for (int i = 1; i < N; i++) {
        pair_connect(&p);
        outs[i] = p.out;
    }
    p.out = NULL;
    memset(sent, 0, sizeof sent);
    for (int i = 0; i < N; i++) sent[i] += send_stream(outs[i], 0, 0, 10, false);   /* the first may have cooled */
    pair_turns(&p, 2 * TPR_SHM_LOOK_TURNS);
    CHECK_EQ_INT(p.a.instance->hot_count, TPR_SHM_HOT);
    for (int round = 0; round < 200; round++) {
        int active = round % 3 ? 10 : N;
        for (int k = 0; k < active; k++) {
            int i = (int)(random_next() % N);
            sent[i] += send_stream(outs[i], 0, sent[i], random_next() % 300 + 1, false);
        }
        pair_turns(&p, 2 * TPR_SHM_LOOK_TURNS);
        if (round % 5 == 0) {
            int64_t deadline = INT64_MAX;
            for (int i = 0; i < 100 && !shm->arm(p.a.instance, &deadline); i++) side_turn(&p.a);
            side_turn(&p.b);
        }
    }
    pair_turns(&p, 10 * TPR_SHM_LOOK_TURNS);
    for (int i = 0; i < N; i++) CHECK_EQ_INT(p.a.accepted[i]->got, sent[i]);
    for (int i = 0; i < N; i++) end_free(outs[i]);
    pair_turns(&p, 10 * TPR_SHM_LOOK_TURNS);
    for (int i = 0; i < N; i++) CHECK_EQ_INT(p.a.accepted[i]->losts, 1);
    pair_fini(&p);
}

TEST(idle_connections_leave_the_hot_set) {
    pair p;
    pair_init(&p);
    CHECK_EQ_INT(p.a.instance->hot_count, 1);
    for (int i = 0; i < TPR_SHM_IDLE_TURNS + 5000; i++) side_turn(&p.a);
    CHECK_EQ_INT(p.a.instance->hot_count, 0);
    CHECK_EQ_INT(p.in->conn->epoch & 1, 1);
    send_stream(p.out, 0, 0, 10, false);
    for (int i = 0; i < TPR_SHM_LOOK_TURNS; i++) side_turn(&p.a);
    CHECK_EQ_INT(p.in->got, 10);
    CHECK_EQ_INT(p.a.instance->hot_count, 1);
    pair_fini(&p);
}

/* ---- descriptors */

static size_t send_handle(end *e, intptr_t *handles, size_t count, uint64_t at) {
    uint8_t byte = stream_byte(0, at);
    tprpc_span span = {&byte, 1};
    return shm->send(e->conn, &span, 1, handles, count, false);
}

TEST(passes_descriptors_in_order) {
    pair p;
    int fds = test_count_fds();
    uint64_t sent = 0, taken = 0, refused = 0;
    pair_init(&p);
    p.in->hold = true;
    for (int round = 0; round < 500; round++) {
        intptr_t handles[TPR_OS_HANDLES];
        size_t count = random_next() % TPR_OS_HANDLES + 1;
        for (size_t i = 0; i < count; i++) {
            handles[i] = tpr_os_memfd("test", 4096);
            uint64_t value = sent + i;
            CHECK_EQ_INT(pwrite((int)handles[i], &value, sizeof value, 0), sizeof value);
        }
        if (send_handle(p.out, handles, count, 0) == 1) sent += count;
        else refused++;
        for (size_t i = 0; i < count; i++) close((int)handles[i]);
        if (random_next() % 3 == 0) {
            size_t n = shm->take_handles(p.in->conn, handles, random_next() % TPR_OS_HANDLES + 1);
            for (size_t i = 0; i < n; i++) {
                uint64_t value = 0;
                CHECK_EQ_INT(pread((int)handles[i], &value, sizeof value, 0), sizeof value);
                CHECK_EQ_INT(value, taken);
                taken++;
                close((int)handles[i]);
            }
        }
        CHECK_LE_INT(sent - taken, TPR_SHM_HANDLES);
        tprpc_span span = shm->peek(p.in->conn);
        if (span.size) shm->consume(p.in->conn, span.size);
        pair_turns(&p, 1);
    }
    CHECK(refused > 0 && taken > 100);
    CHECK(p.out->sends > 0);
    CHECK_EQ_INT(p.in->losts + p.out->losts, 0);
    pair_fini(&p);
    CHECK_EQ_INT(test_count_fds(), fds);
}

TEST(more_descriptors_than_allowed_end_it) {
    pair p;
    int fds = test_count_fds();
    pair_init(&p);
    for (int i = 0; i < 10; i++) {
        intptr_t handles[TPR_OS_HANDLES];
        for (int k = 0; k < TPR_OS_HANDLES; k++) handles[k] = 0;
        p.in->conn->mine->taken = (uint32_t)(8 * i);   /* as if it lied; it is the writer that then breaks the rule */
        send_handle(p.out, handles, TPR_OS_HANDLES, (uint64_t)i);
    }
    pair_turns(&p, 3 * TPR_SHM_LOOK_TURNS);
    CHECK_EQ_INT(p.in->losts, 1);
    CHECK_EQ_INT(p.in->error.status, TPRPC_ERROR_PROTOCOL);
    pair_fini(&p);
    CHECK_EQ_INT(test_count_fds(), fds);
}

/* ---- ends */

TEST(what_was_sent_before_closing_is_read) {
    pair p;
    pair_init(&p);
    while (p.a.instance->turn % TPR_SHM_LOOK_TURNS != TPR_SHM_LOOK_TURNS - 1) side_turn(&p.a);
    send_stream(p.out, 0, 0, 200000, false);   /* the next turn sees the socket's end before it sees the bytes */
    end_free(p.out);
    p.out = NULL;
    pair_turns(&p, 3 * TPR_SHM_LOOK_TURNS);
    CHECK_EQ_INT(p.in->got, 200000);
    CHECK_EQ_INT(p.in->losts, 1);
    CHECK_EQ_INT(p.in->error.status, TPRPC_ERROR_PEER);
    CHECK_CONTAINS(p.in->error.text, "closed the connection");
    CHECK_EQ_INT(send_stream(p.in, 0, 0, 1000, false), 1000);   /* taken, and nothing else happens */
    pair_turns(&p, 3 * TPR_SHM_LOOK_TURNS);
    CHECK_EQ_INT(p.in->losts, 1);
    pair_fini(&p);
}

TEST(what_is_not_read_does_not_delay_the_end) {
    pair p;
    pair_init(&p);
    p.in->hold = true;
    send_stream(p.out, 0, 0, 5000, false);
    end_free(p.out);
    p.out = NULL;
    pair_turns(&p, 3 * TPR_SHM_LOOK_TURNS);
    CHECK_EQ_INT(p.in->losts, 1);
    while (shm->peek(p.in->conn).size) {
        tprpc_span span = shm->peek(p.in->conn);
        end_take(p.in, (const uint8_t *)span.data, span.size);
        shm->consume(p.in->conn, span.size);
    }
    CHECK_EQ_INT(p.in->got, 5000);
    pair_fini(&p);
}

TEST(closing_within_an_event) {
    pair p;
    pair_init(&p);
    end *first = p.out, *second, *third;
    pair_connect(&p);
    second = p.out;
    pair_connect(&p);
    third = p.out;
    for (int i = 0; i < 3; i++) p.a.accepted[i]->close_on_recv = true;
    send_stream(first, 0, 0, 10, false);
    send_stream(second, 0, 0, 10, false);
    send_stream(third, 0, 0, 10, false);
    pair_turns(&p, 3 * TPR_SHM_LOOK_TURNS);
    CHECK_EQ_INT(first->losts + second->losts + third->losts, 3);
    end_free(first);
    end_free(second);
    p.out = third;
    pair_fini(&p);
}

/* A process that connects and sends 1,000 bytes; a child of it, which keeps the socket open, may live on. */
typedef struct victim { char address[108]; bool child; int told; } victim;

static void victim_main(void *arg) {
    victim *v = (victim *)arg;
    side s;
    tprpc_error error;
    REQUIRE(side_init(&s));
    end *e = side_connect(&s, v->address, &error);
    REQUIRE(e != NULL);
    while (!e->opens) side_turn(&s);
    send_stream(e, 0, 0, 1000, false);
    if (v->child) {
        pid_t child = fork();
        if (child == 0) for (;;) pause();
        CHECK_EQ_INT(write(v->told, &child, sizeof child), sizeof child);
    }
    for (;;) side_turn(&s);
}

static void victim_test(bool child, bool sleeping) {
    side s;
    victim v;
    int fds[2];
    pid_t grandchild = 0;
    char expected[64];
    REQUIRE(pipe(fds) == 0);
    if (child) prctl(PR_SET_CHILD_SUBREAPER, 1);   /* so that it comes to this process, which waits for it */
    REQUIRE(side_init(&s) && side_listen(&s, ""));
    memcpy(v.address, s.address, sizeof v.address);
    v.child = child;
    v.told = fds[1];
    pid_t pid = test_fork_run(victim_main, &v);
    while (!s.accepted_count) side_turn(&s);
    end *e = s.accepted[0];
    e->hold = true;
    CHECK_EQ_INT(s.ctx->loops->processes.count, 1);
    if (child) CHECK_EQ_INT(read(fds[0], &grandchild, sizeof grandchild), sizeof grandchild);
    else test_sleep_us(20000);
    kill(pid, SIGKILL);
    int64_t start = test_now_us();
    e->hold = false;
    while (!e->losts && test_now_us() - start < 5000000) {
        if (sleeping) side_sleep(&s, 5000);
        else side_turn(&s);
    }
    CHECK_LE_INT(test_now_us() - start, 500000 * TEST_SLOWDOWN);
    CHECK_EQ_INT(e->losts, 1);
    CHECK_EQ_INT(e->got, 1000);
    CHECK_EQ_INT(e->error.status, TPRPC_ERROR_PEER);
    snprintf(expected, sizeof expected, "shm: process %d died", (int)pid);
    CHECK_STR(e->error.text, expected);
    CHECK_EQ_INT(test_wait_child(pid, 10), 128 + SIGKILL);
    if (grandchild) {
        kill(grandchild, SIGKILL);
        CHECK_EQ_INT(test_wait_child(grandchild, 10), 128 + SIGKILL);
    }
    end_free(e);
    side_fini(&s);
    close(fds[0]);
    close(fds[1]);
}

TEST(killed_peer_is_noticed_spinning) { victim_test(false, false); }
TEST(killed_peer_is_noticed_sleeping) { victim_test(false, true); }
TEST(killed_peer_is_noticed_though_a_child_holds_its_socket) { victim_test(true, true); }

/* ---- peers that break the rules */

static int raw_socket(const char *address) {
    tpr_os_address at;
    int fd = tpr_os_socket(AF_UNIX);
    REQUIRE(fd >= 0 && tpr_os_unix_address(address, &at) == 0 && tpr_os_connect(fd, &at) == 0);
    return fd;
}

static void raw_hello(int fd, uint32_t magic, uint32_t version, uint32_t ring, intptr_t handle) {
    uint8_t hello[TPR_SHM_HELLO] = {0};
    tprpc_span span = {hello, sizeof hello};
    tpr_base_store_le32(hello, magic);
    tpr_base_store_le32(hello + 4, version);
    tpr_base_store_le32(hello + 8, ring);
    CHECK_EQ_INT(tpr_os_send(fd, &span, 1, &handle, handle >= 0, false), sizeof hello);
}

static void raw_expect(side *s, int fd, int answer) {
    uint8_t byte = 255;
    for (int i = 0; i < 4 * TPR_SHM_LOOK_TURNS; i++) side_turn(s);
    CHECK_EQ_INT(recv(fd, &byte, 1, MSG_DONTWAIT), 1);
    CHECK_EQ_INT(byte, answer);
    CHECK_EQ_INT(s->accepted_count, 0);
    CHECK_EQ_INT(s->instance->handshake_count, 0);
    close(fd);
}

TEST(bad_hellos_are_refused) {
    side s;
    int fds = test_count_fds();
    size_t size = sizeof(tpr_shm_shared) + 2 * (size_t)TPR_SHM_RING;
    REQUIRE(side_init(&s) && side_listen(&s, ""));
    int good = tpr_os_memfd("test", size), small = tpr_os_memfd("test", size - 4096), open = memfd_create("test", 0);
    CHECK_EQ_INT(ftruncate(open, (off_t)size), 0);
    struct { uint32_t magic, version, ring; int fd; tprpc_status answer; } bad[] = {
        {TPR_SHM_MAGIC + 1, TPR_SHM_VERSION, TPR_SHM_RING, good, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION + 1, TPR_SHM_RING, good, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, 0, good, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, TPR_SHM_RING + 64, good, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, 0x80000000u, good, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, TPR_SHM_RING * 2, good, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, TPR_SHM_RING, small, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, TPR_SHM_RING, open, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, TPR_SHM_RING, 0, TPRPC_ERROR_PROTOCOL},
        {TPR_SHM_MAGIC, TPR_SHM_VERSION, TPR_SHM_RING, -1, TPRPC_ERROR_LIMIT}};
    for (size_t i = 0; i < TPR_COUNT(bad); i++) {
        int fd = raw_socket(s.address);
        raw_hello(fd, bad[i].magic, bad[i].version, bad[i].ring, bad[i].fd);
        raw_expect(&s, fd, (int)bad[i].answer);
    }
    int fd = raw_socket(s.address);    /* random bytes, as from another protocol */
    CHECK_EQ_INT(write(fd, "GET / HTTP/1.1\r\nHost: x\r\n", 25), 25);
    raw_expect(&s, fd, TPRPC_ERROR_PROTOCOL);
    fd = raw_socket(s.address);        /* one that leaves */
    for (int i = 0; i < 4 * TPR_SHM_LOOK_TURNS; i++) side_turn(&s);
    CHECK_EQ_INT(s.instance->handshake_count, 1);
    close(fd);
    for (int i = 0; i < 4 * TPR_SHM_LOOK_TURNS; i++) side_turn(&s);
    CHECK_EQ_INT(s.instance->handshake_count, 0);
    close(good);
    close(small);
    close(open);
    side_fini(&s);
    CHECK_EQ_INT(test_count_fds(), fds);
}

static int64_t fake_now;
static int64_t fake_clock(void *user) { (void)user; return fake_now; }

TEST(silent_ends_time_out) {
    side s;
    tpr_os_address at;
    tprpc_error error;
    REQUIRE(side_init(&s) && side_listen(&s, ""));
    fake_now = tpr_os_now_us();
    s.ctx->env.clock_us = fake_clock;
    int deaf = tpr_os_socket(AF_UNIX), silent = raw_socket(s.address);
    REQUIRE(tpr_os_unix_address("tprpc-test-deaf", &at) == 0 && tpr_os_listen(deaf, &at) == 0);
    end *e = side_connect(&s, "tprpc-test-deaf", &error);
    REQUIRE(e != NULL);
    for (int i = 0; i < 2 * TPR_SHM_LOOK_TURNS; i++) side_turn(&s);
    CHECK_EQ_INT(s.instance->handshake_count, 1);
    fake_now += 9900000;
    for (int i = 0; i < 2 * TPR_SHM_LOOK_TURNS; i++) side_turn(&s);
    CHECK_EQ_INT(s.instance->handshake_count, 1);
    CHECK_EQ_INT(e->losts, 0);
    fake_now += 200000;
    for (int i = 0; i < 2 * TPR_SHM_LOOK_TURNS; i++) side_turn(&s);
    CHECK_EQ_INT(s.instance->handshake_count, 0);
    CHECK_EQ_INT(e->losts, 1);
    CHECK_EQ_INT(e->error.status, TPRPC_ERROR_TIMEOUT);
    end_free(e);
    close(deaf);
    close(silent);
    side_fini(&s);
}

TEST(a_full_queue_is_tried_again) {
    side s;
    tpr_os_address at;
    tprpc_error error;
    REQUIRE(side_init(&s) && side_listen(&s, ""));
    int full = tpr_os_socket(AF_UNIX), first = tpr_os_socket(AF_UNIX);
    REQUIRE(tpr_os_unix_address("tprpc-test-full", &at) == 0);
    REQUIRE(bind(full, (const struct sockaddr *)&at.at, at.size) == 0 && listen(full, 0) == 0);
    REQUIRE(tpr_os_connect(first, &at) == 0);
    end *e = side_connect(&s, "tprpc-test-full", &error);
    REQUIRE(e != NULL);
    CHECK_EQ_INT(e->conn->state, TPR_SHM_CONNECTING);
    CHECK_EQ_INT(shm->peek(e->conn).size, 0);
    int accepted = tpr_os_accept(full);
    int64_t start = test_now_us();
    while (e->conn->state == TPR_SHM_CONNECTING && test_now_us() - start < 2000000) side_turn(&s);
    CHECK_EQ_INT(e->conn->state, TPR_SHM_ASKING);
    close(full);
    close(first);
    close(accepted);
    while (!e->losts && test_now_us() - start < 4000000) side_turn(&s);
    CHECK_EQ_INT(e->losts, 1);
    CHECK_EQ_INT(e->error.status, TPRPC_ERROR_PEER);
    end_free(e);
    side_fini(&s);
}

TEST(handshakes_are_limited) {
    side s;
    int fds[40];
    uint8_t byte;
    REQUIRE(side_init(&s) && side_listen(&s, ""));
    s.ctx->limits.handshakes = 10;
    for (int i = 0; i < 40; i++) fds[i] = raw_socket(s.address);
    for (int i = 0; i < 10 * TPR_SHM_LOOK_TURNS; i++) side_turn(&s);
    CHECK_EQ_INT(s.instance->handshake_count, 10);
    for (int i = 0; i < 30; i++) {     /* the oldest made room */
        CHECK_EQ_INT(recv(fds[i], &byte, 1, MSG_DONTWAIT), 1);
        CHECK_EQ_INT(byte, TPRPC_ERROR_LIMIT);
    }
    for (int i = 30; i < 40; i++) CHECK(recv(fds[i], &byte, 1, MSG_DONTWAIT) < 0 && errno == EAGAIN);
    for (int i = 0; i < 40; i++) close(fds[i]);
    side_fini(&s);
}

/* Another user's process: refused by the acceptor, and refuses an acceptor that is another's. */
static void other_user_main(void *arg) {
    side s;
    tprpc_error error;
    REQUIRE(setresuid(65534, 65534, 65534) == 0);
    REQUIRE(side_init(&s));
    CHECK(!side_connect(&s, (const char *)arg, &error));
    CHECK_EQ_INT(error.status, TPRPC_ERROR_DENIED);
    int fd = raw_socket((const char *)arg);
    uint8_t byte = 0;
    struct pollfd look = {fd, POLLIN, 0};
    CHECK_EQ_INT(poll(&look, 1, 5000), 1);
    CHECK_EQ_INT(recv(fd, &byte, 1, 0), 1);
    CHECK_EQ_INT(byte, TPRPC_ERROR_DENIED);
    close(fd);
    side_fini(&s);
}

TEST(another_user_is_denied) {
    side s;
    if (geteuid() != 0) SKIP("only root can become another user");
    REQUIRE(side_init(&s) && side_listen(&s, ""));
    pid_t pid = test_fork_run(other_user_main, s.address);
    for (int i = 0; i < 100; i++) {
        side_turn(&s);
        side_sleep(&s, 10);
    }
    CHECK_EQ_INT(test_wait_child(pid, 10), 0);
    CHECK_EQ_INT(s.accepted_count, 0);
    side_fini(&s);
}

/* A peer writes anything anywhere into the shared memory, again and again: the connection ends, or it does not. */
TEST(scribbling_peers) {
    for (int round = 0; round < 300 / TEST_SLOWDOWN; round++) {
        pair p;
        uint64_t sent = 0;
        pair_init(&p);
        p.in->hold = true;
        for (int step = 0; step < 200 && !p.in->losts; step++) {
            uint32_t *words = (uint32_t *)(void *)p.out->conn->shared;
            size_t ring = (size_t)(p.out->conn->tx - (uint8_t *)p.out->conn->shared) / 4, count = TPR_SHM_RING / 4;
            sent += send_stream(p.out, 0, sent, random_next() % 3000, false);
            for (uint32_t i = 0; i < random_next() % 50; i++) {
                uint32_t kind = random_next() % 6, value = random_next() % 3 ? random_next() % 70000 : random_next() << 8;
                if (random_next() % 8 == 0) value = TPR_SHM_SKIP;
                if (kind == 0) TPR_ATOMIC_STORE(&words[random_next() % 32], value);   /* its own line */
                else if (kind == 1) TPR_ATOMIC_STORE(&words[32 + random_next() % 32], value);   /* the other's */
                else TPR_ATOMIC_STORE(&words[ring + random_next() % (count / 16) * 16 % count], value);
            }
            (void)send_stream(p.in, 0, 0, random_next() % 20000, false);
            for (int i = 0; i < 100; i++) {
                tprpc_span span = shm->peek(p.in->conn);
                if (!span.size) break;
                const uint8_t *ring_in = p.in->conn->rx;
                REQUIRE((const uint8_t *)span.data >= ring_in);
                REQUIRE((const uint8_t *)span.data + span.size <= ring_in + TPR_SHM_RING);
                volatile uint8_t last = ((const uint8_t *)span.data)[span.size - 1];
                (void)last;
                shm->consume(p.in->conn, span.size);
            }
            side_turn(&p.a);
        }
        p.out->hold = true;
        pair_turns(&p, 2);
        pair_fini(&p);
    }
}

TEST(a_ring_of_skips_does_not_hang) {
    pair p;
    pair_init(&p);
    for (size_t i = 0; i < TPR_SHM_RING; i += 64) TPR_ATOMIC_STORE(tpr_shm_word(p.out->conn->tx, i), (uint32_t)TPR_SHM_SKIP);
    side_turn(&p.a);
    side_turn(&p.a);
    CHECK_EQ_INT(p.in->losts, 1);
    CHECK_EQ_INT(p.in->error.status, TPRPC_ERROR_PROTOCOL);
    pair_fini(&p);
}

/* A reader that says that it consumed what it cannot have. */
TEST(a_reader_that_lies_is_left) {
    for (int i = 0; i < 3; i++) {
        pair p;
        uint64_t sent = 0, lies[3] = {1000, UINT64_C(1) << 40, (uint64_t)-64};
        pair_init(&p);
        p.in->hold = true;
        TPR_ATOMIC_STORE(&p.in->conn->mine->consumed, lies[i]);
        for (size_t n = 1; n && sent < 2 * TPR_SHM_RING;) sent += n = send_stream(p.out, 0, sent, 1000, false);
        pair_turns(&p, 2);
        CHECK_EQ_INT(p.out->losts, 1);
        CHECK_EQ_INT(p.out->error.status, TPRPC_ERROR_PROTOCOL);
        pair_fini(&p);
    }
}

/* A peer that closed its socket and goes on writing is read for one ring more at most. */
TEST(a_peer_that_writes_on_after_its_end_is_left) {
    pair p;
    pair_init(&p);
    p.in->hold = true;
    tpr_os_shutdown(p.out->conn->fd);
    for (size_t i = 0; i < TPR_SHM_RING; i += 64) TPR_ATOMIC_STORE(tpr_shm_word(p.out->conn->tx, i), 2u);
    for (int i = 0; i < 3 * TPR_SHM_LOOK_TURNS; i++) side_turn(&p.a);
    uint64_t got = 0;
    while (shm->peek(p.in->conn).size && got < 1000000) {
        got += shm->peek(p.in->conn).size;
        shm->consume(p.in->conn, shm->peek(p.in->conn).size);
    }
    CHECK_EQ_INT(got, TPR_SHM_RING / 64);
    CHECK_EQ_INT(p.in->losts, 1);
    pair_fini(&p);
}

/* ---- what the system refuses */

static int fail_after;                   /* calls until the one that fails */
static int fail_code;

static int fail_hook(const char *call, int64_t *size) {
    (void)size;
    if (strcmp(call, "epoll_peek") == 0 || strcmp(call, "poll") == 0) return 0;
    return --fail_after == 0 ? fail_code : 0;
}

TEST(each_call_may_fail) {
    static const int codes[] = {ENOMEM, EMFILE, EAGAIN, EINTR, ECONNRESET};
    int fds = test_count_fds();
    broken_os = true;
    for (size_t c = 0; c < TPR_COUNT(codes); c++) {
        for (int n = 1; n < 80; n++) {
            side a, b;
            tprpc_error error;
            end *e = NULL;
            fail_after = n;
            fail_code = codes[c];
            tprpc_test_hook = fail_hook;
            bool a_up = side_init(&a), b_up = side_init(&b);
            if (a_up && b_up && side_listen(&a, "") && (e = side_connect(&b, a.address, &error)) != NULL) {
                for (int i = 0; i < 300 && !e->opens && !e->losts; i++) {
                    side_turn(&a);
                    side_turn(&b);
                }
                if (e->opens) {
                    intptr_t handle = 0;
                    int64_t deadline = INT64_MAX;
                    shm->arm(a.instance, &deadline);
                    send_handle(e, &handle, 1, 0);
                    side_turn(&a);
                    if (a.accepted_count) {
                        size_t taken = shm->take_handles(a.accepted[0]->conn, &handle, 1);
                        if (taken) close((int)handle);
                    }
                }
            }
            tprpc_test_hook = NULL;
            end_free(e);
            if (a_up) for (int i = 0; i < a.accepted_count; i++) end_free(a.accepted[i]);
            if (a_up) side_fini(&a);
            if (b_up) side_fini(&b);
        }
    }
    broken_os = false;
    CHECK_EQ_INT(test_count_fds(), fds);
}

/* No descriptor is left to accept with: the listener waits instead of spinning, and goes on when there is one. */
TEST(without_descriptors_the_listener_pauses) {
    pair p;
    struct rlimit before, tight;
    tprpc_error error;
    pair_init(&p);
    REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
    end *e = side_connect(&p.b, p.a.address, &error);
    REQUIRE(e != NULL);
    tight = before;
    tight.rlim_cur = 3;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &tight) == 0);
    pair_turns(&p, 4 * TPR_SHM_LOOK_TURNS);
    struct pollfd look = {(int)shm->handle(p.a.instance), POLLIN, 0};
    REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
    CHECK_EQ_INT(poll(&look, 1, 0), 0);
    CHECK_EQ_INT(p.a.accepted_count, 1);
    int64_t start = test_now_us();
    while (!e->opens && test_now_us() - start < 3000000) pair_turns(&p, 1);
    CHECK_EQ_INT(e->opens, 1);
    end_free(e);
    pair_fini(&p);
}

/* ---- costs */

static long smaps_kb(const char *field) {
    char line[200];
    long sum = 0, value;
    bool ours = false;
    FILE *file = fopen("/proc/self/smaps", "r");
    while (file && fgets(line, sizeof line, file)) {
        if (strstr(line, "memfd:tprpc-shm")) ours = true;
        else if (strchr(line, '-') && strchr(line, ' ') && line[0] != 'V' && strstr(line, " r")) ours = false;
        if (ours && strncmp(line, field, strlen(field)) == 0 && sscanf(line + strlen(field), "%ld", &value) == 1) sum += value;
    }
    if (file) fclose(file);
    return sum;
}

TEST(an_idle_connection_is_cheap) {
    pair p;
    enum { N = 100 };
    end *outs[N];
    pair_init(&p);
    end *first = p.out;
    int fds = test_count_fds();
    long before = smaps_kb("Pss:");
    for (int i = 0; i < N; i++) {
        pair_connect(&p);
        outs[i] = p.out;
        p.in->echo = true;
        for (int k = 0; k < 10; k++) {
            send_stream(outs[i], 0, (uint64_t)k * 100, 100, false);
            pair_turns(&p, 2);
        }
        CHECK_EQ_INT(outs[i]->got, 1000);
    }
    CHECK_EQ_INT(test_count_fds() - fds, 2 * N);   /* both ends: a socket each */
    long each = (smaps_kb("Pss:") - before) * 1024 / (2 * N);
    printf("an idle connection: %ld bytes of shared memory (Pss) and %zu of ours per end\n", each, sizeof(tpr_shm_conn));
    CHECK(each > 1000);
    CHECK_LE_INT(each, 16384);
    for (int i = 0; i < N; i++) end_free(outs[i]);
    p.out = first;
    pair_fini(&p);
}

/* ---- the memory of rings */

static int64_t ahead_us;
static int64_t clock_ahead(void *user) {
    (void)user;
    return tpr_os_now_us() + ahead_us;
}

/* Bytes of the ring that `e` writes that take memory. */
static size_t ring_in_memory(const end *e) {
    unsigned char pages[TPR_SHM_RING / 4096];
    size_t count = 0;
    REQUIRE(mincore(e->conn->tx, TPR_SHM_RING, pages) == 0);
    for (size_t i = 0; i < sizeof pages; i++) count += pages[i] & 1;
    return count * 4096;
}

static void clock_goes_on(pair *p, int64_t us) {
    ahead_us += us;
    pair_turns(p, 2);
}

TEST(idle_rings_go_back) {
    pair p;
    pair_init(&p);
    p.a.ctx->env.clock_us = p.b.ctx->env.clock_us = clock_ahead;
    uint64_t at = 0;
    for (int round = 0; round < 3; round++) {
        while (at < (uint64_t)(round + 1) * 3 * TPR_SHM_RING + 12345) {
            at += send_stream(p.out, 0, at, 50000, false);
            pair_turns(&p, 1);
        }
        pair_turns(&p, 50);
        CHECK_EQ_INT(p.in->got, at);
        CHECK(ring_in_memory(p.out) >= TPR_SHM_RING - 4096);
        clock_goes_on(&p, TPR_SHM_TRIM_US + 2000);   /* it was written not long ago */
        send_stream(p.out, 0, at, 100, false);
        at += 100;
        pair_turns(&p, 2);
        clock_goes_on(&p, TPR_SHM_TRIM_US + 2000);
        CHECK(ring_in_memory(p.out) >= TPR_SHM_RING - 4096);
        clock_goes_on(&p, TPR_SHM_TRIM_US + 2000);
        CHECK(ring_in_memory(p.out) <= TPR_SHM_RING / 4 + 3 * 4096);   /* a reader tells of each quarter */
        CHECK(!p.b.instance->trimming);              /* nothing ticks */
    }
    p.in->hold = true;                               /* what is not read yet stays, and stays whole */
    size_t sent = send_stream(p.out, 0, at, 100000, false);
    CHECK_EQ_INT(sent, 100000);
    for (int i = 0; i < 4; i++) clock_goes_on(&p, TPR_SHM_TRIM_US + 2000);
    p.in->hold = false;
    pair_turns(&p, 50);
    CHECK_EQ_INT(p.in->got, at + sent);
    pair_fini(&p);
}

TEST(memory_of_rings_is_counted) {
    pair p;
    tprpc_error error;
    pair_init(&p);
    const uint64_t used = p.b.ctx->env.memory.used, size = sizeof(tpr_shm_shared) + 2 * TPR_SHM_RING;
    CHECK(used >= size);
    CHECK(p.a.ctx->env.memory.used < size);          /* who connects answers for both */
    p.b.ctx->env.memory.limit = used + size / 2;
    CHECK(!side_connect(&p.b, p.a.address, &error));
    CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(error.text, "limits.memory_bytes");
    CHECK_EQ_INT(p.b.ctx->env.memory.used, used);
    pair_fini(&p);
}

static bool write_text(const char *folder, const char *file, const char *text) {
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, file);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    const bool good = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0) close(fd);
    return good;
}

enum { NOT_LET_IN = 99 };

static void in_small_group(void *group) {
    tprpc_error error;
    pair p;
    if (!write_text((const char *)group, "cgroup.procs", "0")) _exit(NOT_LET_IN);
    pair_init(&p);                                   /* there is room for this one */
    const uint64_t left = tpr_os_memory_left();
    CHECK(left <= 40 << 20 && left > 8 << 20);
    const size_t most = (size_t)left - (1 << 20);    /* and now there is none */
    void *memory = mmap(NULL, most, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    p.b.instance->left_us = 0;
    CHECK(!side_connect(&p.b, p.a.address, &error));
    CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(error.text, "control group");
    munmap(memory, most);
    p.b.instance->left_us = 0;
    end_free(p.out);
    pair_connect(&p);
    pair_fini(&p);
}

/* A control group of this test's own, which has too little memory left. */
TEST(a_small_control_group_refuses) {
    char group[200], text[4096];
    bool second = false;
    if (geteuid() != 0) SKIP("not root");
    REQUIRE(tpr_os_read_file("/proc/self/cgroup", text, sizeof text) > 0);
    char *line = strstr(text, ":memory:/");
    if (line) line += 8;
    else if ((line = strstr(text, "0::/")) != NULL) { line += 3; second = true; }
    if (!line) SKIP("no control groups for memory");
    line[strcspn(line, "\n")] = 0;
    snprintf(group, sizeof group, "/sys/fs/cgroup%s%.120s/tprpc-test-%d", second ? "" : "/memory",
             line[1] ? line : "", (int)getpid());
    if (mkdir(group, 0700) != 0) {
        snprintf(group, sizeof group, "/sys/fs/cgroup%s/tprpc-test-%d", second ? "" : "/memory", (int)getpid());
        if (mkdir(group, 0700) != 0) SKIP("no control group can be made");
    }
    const bool limited = write_text(group, second ? "memory.max" : "memory.limit_in_bytes", "41943040");
    const int status = limited ? test_wait_child(test_fork_run(in_small_group, group), 30) : NOT_LET_IN;
    rmdir(group);
    if (status == NOT_LET_IN) SKIP("the control group made takes no limit or no process");
    CHECK_EQ_INT(status, 0);
}
