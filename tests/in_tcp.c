/* The tcp transport, through its table, on a real context; peers are ends of the same context or plain sockets. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "sockets.h"
#include <linux/filter.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>

// ---- a context, and ends that remember what happened to them

typedef struct world {
    tprpc_context *ctx;
    tpr_tcp *tcp;
    const tprpc_transport_table *t;
    char address[64];
    void *listener;
    tprpc_listen_owner owner;
} world;

typedef struct end {
    tprpc_conn_owner owner;
    world *w;
    void *conn;
    bool ignore;               // leaves received bytes where they are
    bool inside;               // a function of this end is running: no event may come
    bool close_on_recv;
    int opened, recvs, sends, losts;
    tprpc_error error;
    uint8_t *in;               // where received bytes go, `want` in all
    size_t got, want, mix;     // mix: how the next are taken
} end;

static int64_t clock_ahead_us;
static int64_t ahead_clock(void *user) { (void)user; return tpr_os_now_us() + clock_ahead_us; }
static char last_log[300];
static int logs;
static void keep_log(const tprpc_log *entry, void *user) {
    (void)user;
    if (entry->level > TPRPC_LOG_WARNING) return;
    logs++;
    snprintf(last_log, sizeof last_log, "%s", entry->text);
}

static void pump(end *e) {
    const tprpc_transport_table *t = e->w->t;
    while (e->conn && e->got < e->want) {
        size_t left = e->want - e->got;
        if (e->mix++ % 3 == 0) {
            tprpc_span span = t->peek(e->conn);
            size_t n = span.size < left ? span.size : left;
            if (n > 1 && e->mix % 2) n /= 2;
            if (!n) return;
            memcpy(e->in + e->got, span.data, n);
            t->consume(e->conn, n);
            e->got += n;
        } else {
            tprpc_span spans[3];
            size_t n;
            spans[0].data = e->in + e->got;
            spans[0].size = left > 100000 ? 100000 : left / 2;
            spans[1].data = NULL;
            spans[1].size = 0;
            spans[2].data = e->in + e->got + spans[0].size;
            spans[2].size = left - spans[0].size > 70000 ? 70000 : left - spans[0].size;
            n = t->recv(e->conn, spans, 3);
            e->got += n;
            if (!n) return;
        }
    }
}

static void on_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    end *e = TPR_CONTAINER(owner, end, owner);
    CHECK(!e->inside);
    CHECK(e->losts == 0 || !(events & TPRPC_EVENT_LOST));
    e->opened += (events & TPRPC_EVENT_OPEN) != 0;
    e->sends += (events & TPRPC_EVENT_SEND) != 0;
    e->recvs += (events & TPRPC_EVENT_RECV) != 0;
    if (events & TPRPC_EVENT_LOST) {
        e->losts++;
        CHECK(error != NULL);
        if (error) e->error = *error;
    }
    if ((events & TPRPC_EVENT_RECV) && e->close_on_recv) {
        e->w->t->disconnect(e->conn, TPRPC_OK);
        e->conn = NULL;
        return;
    }
    if ((events & TPRPC_EVENT_RECV) && !e->ignore) pump(e);
}

enum { ENDS = 64 };
static end ends[ENDS];          // accepted ones, in order
static int end_count;
static bool accept_closes, accept_unlistens;

static void end_init(end *e, world *w, void *conn) {
    memset(e, 0, sizeof *e);
    e->w = w;
    e->conn = conn;
    e->owner.event = on_event;
}

static void on_accepted(tprpc_listen_owner *owner, void *conn) {
    world *w = TPR_CONTAINER(owner, world, owner);
    REQUIRE(end_count < ENDS);
    end *e = &ends[end_count++];
    end_init(e, w, conn);
    w->t->own(conn, &e->owner);
    if (accept_unlistens) w->t->unlisten(w->listener);
    if (accept_unlistens) w->listener = NULL;
    if (accept_closes) w->t->disconnect(conn, TPRPC_OK);
    if (accept_closes) e->conn = NULL;
}

// address NULL: do not listen. spin_us as the context's.
static void world_open(world *w, const char *address, int64_t spin_us) {
    tprpc_context_desc desc = TPR_ZERO;
    tprpc_error error = TPR_ZERO;
    desc.transports = "tcp";
    desc.spin_us = spin_us;
    desc.clock_us = ahead_clock;
    desc.log = keep_log;
    memset(w, 0, sizeof *w);
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &w->ctx, &error), TPRPC_OK);
    for (uint32_t i = 0; i < w->ctx->backend_count; i++)
        if (strcmp(w->ctx->backends[i].backend->name, "tcp") == 0) w->tcp = (tpr_tcp *)w->ctx->backends[i].instances[0];
    REQUIRE(w->tcp != NULL);
    w->t = tpr_tcp_backend.transport;
    w->owner.accepted = on_accepted;
    if (!address) return;
    if (w->t->listen(w->tcp, address, &w->owner, &w->listener, &error)) fprintf(stderr, "%s\n", error.text);
    REQUIRE(w->listener != NULL);
    w->t->address(w->listener, w->address, sizeof w->address);
}

static void world_close(world *w) {
    if (w->listener) w->t->unlisten(w->listener);
    for (int i = 0; i < end_count; i++)
        if (ends[i].conn && ends[i].w == w) w->t->disconnect(ends[i].conn, TPRPC_OK);
    CHECK(tpr_base_list_empty(&w->tcp->sockets) && tpr_base_list_empty(&w->tcp->closed));
    CHECK_EQ_INT(w->tcp->hot_count, 0);
    CHECK_EQ_INT(tprpc_context_destroy(w->ctx), TPRPC_OK);
    end_count = 0;
}

static tprpc_status join(world *w, const char *address, end *e, tprpc_error *error) {
    end_init(e, w, NULL);
    e->inside = true;
    tprpc_status status = w->t->connect(w->tcp, address, 0, &e->owner, &e->conn, error);
    e->inside = false;
    return status;
}

static void leave(end *e) {
    if (e->conn) e->w->t->disconnect(e->conn, TPRPC_OK);
    e->conn = NULL;
}

// Polls until `condition`, at most 10 s.
#define UNTIL(w, condition) \
    do { \
        int64_t until_end = test_now_us() + 10000000 * TEST_SLOWDOWN; \
        while (!(condition) && test_now_us() < until_end) tprpc_poll((w)->ctx, 2000, 0); \
        REQUIRE(condition); \
    } while (0)

// Connects `e` to the world's own listener; the accepted end is the last one.
static end *pair(world *w, end *e) {
    int before = end_count;
    tprpc_error error = TPR_ZERO;
    if (join(w, w->address, e, &error)) fprintf(stderr, "%s\n", error.text);
    REQUIRE(e->conn != NULL);
    CHECK_EQ_INT(e->opened, 0);
    UNTIL(w, e->opened && end_count > before);
    return &ends[before];
}

static size_t give(end *e, const void *bytes, size_t size) {
    tprpc_span span;
    span.data = (void *)(uintptr_t)bytes;
    span.size = size;
    e->inside = true;
    size_t n = e->w->t->send(e->conn, &span, 1, NULL, 0, false);
    e->inside = false;
    return n;
}

// A plain socket connected to the world's listener.
static int plain(world *w, end **accepted) {
    int before = end_count, fd = socket_connect_to(w->address);
    UNTIL(w, end_count > before);
    *accepted = &ends[before];
    return fd;
}

static uint8_t *pattern(size_t size, uint32_t seed) {
    uint8_t *p = (uint8_t *)malloc(size);
    for (size_t i = 0; i < size; i++) p[i] = (uint8_t)((seed = seed * 1664525u + 1013904223u) >> 24);
    return p;
}

// ---- hooks

static uint32_t hook_random = 1;
static int hook_calls, hook_code;
static const char *hook_name;

static int hook_short(const char *call, int64_t *size) {   // short reads and writes, interruptions, full sockets
    hook_random = hook_random * 1664525u + 1013904223u;
    if (strcmp(call, "send") != 0 && strcmp(call, "recv") != 0) return 0;
    uint32_t dice = hook_random >> 28;
    if (dice == 0) return EAGAIN;
    if (dice == 1) return EINTR;
    if (dice == 2) return ENOBUFS;
    if (dice < 8) *size = 1 + (hook_random >> 8) % 5000;
    return 0;
}

static int hook_fail(const char *call, int64_t *size) {   // one call fails each time
    (void)size;
    if (!hook_name || strcmp(call, hook_name) != 0) return 0;
    hook_calls++;
    return hook_code;
}

static int hook_left;
static int hook_nth(const char *call, int64_t *size) {    // the n-th call of any kind fails
    (void)size;
    if (strcmp(call, "futex_wait") == 0 || --hook_left != 0) return 0;
    return hook_code;
}

// ---- addresses

TEST(addresses) {
    static const char *const bad[][2] = {
        {"127.0.0.1", "no port"}, {"127.0.0.1:", "port"}, {"127.0.0.1:65536", "0 to 65535"}, {"127.0.0.1:-1", "port"},
        {"127.0.0.1:80x", "port"}, {"127.0.0.1:99999999999", "port"}, {"::1:80", "brackets"}, {"[::1:80", "brackets"},
        {"[::1]", "no port"}, {"[:80", "brackets"}, {"no.such.host.invalid:80", "no.such.host.invalid"},
        {"256.1.1.1:80", "256.1.1.1"}, {"x y:1", "x y"}};
    world w;
    tprpc_error error = TPR_ZERO;
    void *listener = NULL;
    char text[64];
    end e;
    world_open(&w, NULL, 0);
    for (size_t i = 0; i < TPR_COUNT(bad); i++) {
        CHECK(w.t->listen(w.tcp, bad[i][0], &w.owner, &listener, &error) != TPRPC_OK);
        CHECK_CONTAINS(error.text, bad[i][1]);
        CHECK_CONTAINS(error.text, bad[i][0]);
        CHECK(join(&w, bad[i][0], &e, &error) != TPRPC_OK);
        CHECK_CONTAINS(error.text, bad[i][1]);
    }
    char longest[400];
    memset(longest, 'a', sizeof longest);
    strcpy(longest + 300, ":80");
    CHECK_EQ_INT(join(&w, longest, &e, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(join(&w, "127.0.0.1:0", &e, &error), TPRPC_ERROR_INVALID);
    static const char *const good[][2] = {
        {"", "127.0.0.1:"}, {"127.0.0.1:0", "127.0.0.1:"}, {"[::1]:0", "[::1]:"}, {"localhost:0", "1"},
        {"0.0.0.0:0", "0.0.0.0:"}, {"[::]:0", "[::]:"}, {":0", ":"}, {"*:0", ":"}};
    for (size_t i = 0; i < TPR_COUNT(good); i++) {
        CHECK_EQ_INT(w.t->listen(w.tcp, good[i][0], &w.owner, &listener, &error), TPRPC_OK);
        size_t length = w.t->address(listener, text, sizeof text);
        CHECK_EQ_INT(length, strlen(text));
        CHECK(strncmp(text, good[i][1], strlen(good[i][1])) == 0 || i == 3 || i > 5);
        CHECK(atoi(strrchr(text, ':') + 1) > 0);
        CHECK_EQ_INT(w.t->public_address(w.tcp, text), i > 3);
        void *second = NULL;
        CHECK_EQ_INT(w.t->listen(w.tcp, text, &w.owner, &second, &error), TPRPC_ERROR_UNREACHABLE);
        CHECK_CONTAINS(error.text, text);
        w.t->unlisten(listener);
    }
    CHECK(!w.t->public_address(w.tcp, ""));
    CHECK(w.t->public_address(w.tcp, "192.0.2.1:80"));
    CHECK(!w.t->public_address(w.tcp, "[::ffff:127.0.0.1]:80"));
    CHECK_EQ_INT(w.t->listen(w.tcp, "192.0.2.77:0", &w.owner, &listener, &error), TPRPC_ERROR_UNREACHABLE);
    world_close(&w);
}

// ---- bytes

// Sends `size` bytes from a to b and b to a at once, in odd pieces, and compares.
static void exchange(world *w, end *a, end *b, size_t size, bool spin) {
    uint8_t *x = pattern(size, 7), *y = pattern(size, 8);
    size_t sent[2] = {0, 0};
    end *from[2];
    uint8_t *bytes[2];
    int64_t until = test_now_us() + 20000000 * TEST_SLOWDOWN;
    from[0] = a;
    from[1] = b;
    bytes[0] = x;
    bytes[1] = y;
    for (int i = 0; i < 2; i++) {
        from[i]->got = 0;
        from[i]->want = size;
        from[i]->in = (uint8_t *)calloc(1, size);
    }
    while ((a->got < size || b->got < size) && !a->losts && !b->losts && test_now_us() < until) {
        for (int i = 0; i < 2; i++) {
            tprpc_span spans[20];
            size_t count = 0, at = sent[i], offered = 0;
            for (; count < 20 && at < size; count++) {
                size_t piece = count % 4 == 3 ? 0 : 1 + (at * 7 + count) % 9000;
                if (piece > size - at) piece = size - at;
                spans[count].data = bytes[i] + at;
                spans[count].size = piece;
                at += piece;
                offered += piece;
            }
            size_t taken = w->t->send(from[i]->conn, spans, count, NULL, 0, sent[i] % 2 && offered < size - sent[i]);
            CHECK_LE_INT(taken, offered);
            sent[i] += taken;
        }
        if (spin) w->t->progress(w->tcp);
        else tprpc_poll(w->ctx, 1000, 0);
    }
    CHECK_EQ_INT(a->got, size);
    CHECK_EQ_INT(b->got, size);
    CHECK_MEM(b->in, x, size);
    CHECK_MEM(a->in, y, size);
    for (int i = 0; i < 2; i++) free(from[i]->in);
    free(x);
    free(y);
}

static void exchange_on(const char *address, int64_t spin_us, bool spin, int (*hook)(const char *, int64_t *)) {
    world w;
    end a;
    world_open(&w, address, spin_us);
    end *b = pair(&w, &a);
    TPR_ATOMIC_STORE(&tprpc_test_hook, hook);
    size_t sizes[] = {1, 64, 65536, 65537, 300001, 5000000};
    for (size_t i = 0; i < TPR_COUNT(sizes) - (hook ? 1u : 0u); i++) exchange(&w, &a, b, sizes[i], spin);
    TPR_ATOMIC_STORE(&tprpc_test_hook, (int (*)(const char *, int64_t *))NULL);
    CHECK(a.losts == 0 && b->losts == 0);
    CHECK(((tpr_tcp_conn *)a.conn)->buffer == NULL);
    leave(&a);
    UNTIL(&w, b->losts);
    CHECK_CONTAINS(b->error.text, "closed the connection");
    CHECK_EQ_INT(b->error.status, TPRPC_ERROR_PEER);
    world_close(&w);
}

TEST(bytes_v4) { exchange_on("127.0.0.1:0", 0, false, NULL); }
TEST(bytes_v6) { exchange_on("[::1]:0", 0, false, NULL); }
TEST(bytes_sleeping) { exchange_on("", TPRPC_NOW, false, NULL); }
TEST(bytes_spinning) { exchange_on("", 0, true, NULL); }
TEST(bytes_short_calls) { exchange_on("", 0, false, hook_short); }
TEST(bytes_short_calls_sleeping) { exchange_on("", TPRPC_NOW, false, hook_short); }

// ---- connections begin and end

TEST(refused) {
    world w;
    end e;
    tprpc_error error = TPR_ZERO;
    char text[64], where[128];
    world_open(&w, "", 0);
    strcpy(text, w.address);
    w.t->unlisten(w.listener);
    w.listener = NULL;
    REQUIRE_EQ_INT(join(&w, text, &e, &error), TPRPC_OK);
    CHECK_EQ_INT(give(&e, "x", 1), e.losts ? 1 : 0);
    UNTIL(&w, e.losts);
    CHECK_EQ_INT(e.error.status, TPRPC_ERROR_UNREACHABLE);
    snprintf(where, sizeof where, "connecting to tcp://%s: Connection refused", text);
    CHECK_STR(e.error.text, where);
    CHECK_EQ_INT(e.opened + e.recvs + e.sends, 0);
    leave(&e);
    hook_name = "connect";
    hook_code = ENETUNREACH;
    tprpc_test_hook = hook_fail;
    REQUIRE_EQ_INT(join(&w, text, &e, &error), TPRPC_OK);
    tprpc_test_hook = NULL;
    UNTIL(&w, e.losts);
    CHECK_EQ_INT(e.error.os_code, ENETUNREACH);
    leave(&e);
    REQUIRE_EQ_INT(join(&w, text, &e, &error), TPRPC_OK);   // closed before its outcome
    leave(&e);
    for (int i = 0; i < 100; i++) tprpc_poll(w.ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(e.losts, 0);
    world_close(&w);
}

TEST(bytes_before_the_end) {
    world w;
    end a;
    uint8_t *bytes = pattern(200000, 3), in[200000];
    world_open(&w, "", TPRPC_NOW);
    end *b = pair(&w, &a);
    b->ignore = true;
    CHECK_EQ_INT(give(&a, bytes, 200000), 200000);
    leave(&a);
    for (int i = 0; i < 50; i++) tprpc_poll(w.ctx, 1000, 0);
    CHECK_EQ_INT(b->recvs, 1);
    b->in = in;
    b->want = sizeof in;
    pump(b);
    UNTIL(&w, (b->ignore = false, b->losts));
    CHECK_EQ_INT(b->got, sizeof in);
    CHECK_MEM(in, bytes, sizeof in);
    CHECK_EQ_INT(b->losts, 1);
    CHECK_EQ_INT(give(b, bytes, 1000), 1000);   // swallowed
    free(bytes);
    world_close(&w);
}

static void reset(int fd) {
    struct linger linger = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &linger, sizeof linger);
    close(fd);
}

// A reset while received bytes stand unread: LOST comes at once, once, and the bytes can still be had.
TEST(reset_by_peer) {
    world w;
    end *b;
    uint8_t in[100000];
    world_open(&w, "", TPRPC_NOW);
    int fd = plain(&w, &b);
    b->ignore = true;
    uint8_t *bytes = pattern(100000, 4);
    CHECK_EQ_INT(send(fd, bytes, 100000, 0), 100000);
    UNTIL(&w, b->recvs);
    for (int i = 0; i < 20; i++) tprpc_poll(w.ctx, 1000, 0);
    reset(fd);
    UNTIL(&w, b->losts);
    CHECK_EQ_INT(b->error.status, TPRPC_ERROR_PEER);
    CHECK_EQ_INT(b->error.os_code, ECONNRESET);
    CHECK_CONTAINS(b->error.text, "tcp 127.0.0.1:");
    b->in = in;
    b->want = sizeof in;
    pump(b);
    CHECK_EQ_INT(b->got, 100000);
    CHECK_MEM(in, bytes, sizeof in);
    CHECK_EQ_INT(w.t->peek(b->conn).size, 0);
    CHECK_EQ_INT(give(b, bytes, 100000), 100000);
    for (int i = 0; i < 20; i++) tprpc_poll(w.ctx, 1000, 0);
    CHECK_EQ_INT(b->losts, 1);
    free(bytes);
    world_close(&w);
}

// What a peer sent before it closed is delivered though our own send failed first.
TEST(answer_before_broken_send) {
    world w;
    end *b;
    uint8_t in[10];
    world_open(&w, "", TPRPC_NOW);
    int fd = plain(&w, &b);
    b->in = in;
    b->want = sizeof in;
    CHECK_EQ_INT(send(fd, "0123456789", 10, 0), 10);
    hook_name = "send";
    hook_code = EPIPE;
    tprpc_test_hook = hook_fail;
    CHECK_EQ_INT(give(b, "x", 1), 1);
    tprpc_test_hook = NULL;
    UNTIL(&w, b->losts);
    CHECK_EQ_INT(b->got, 10);
    close(fd);
    world_close(&w);
}

TEST(disconnect_delivers) {
    world w;
    end *b;
    uint8_t *bytes = pattern(200000, 5), *in = (uint8_t *)malloc(200000);
    world_open(&w, "", 0);
    int fd = plain(&w, &b);
    b->ignore = true;
    CHECK_EQ_INT(send(fd, bytes, 100000, 0), 100000);   // nobody reads these
    UNTIL(&w, b->recvs);
    CHECK_EQ_INT(give(b, bytes, 200000), 200000);
    leave(b);
    size_t got = 0;
    ssize_t n;
    while (got < 200000 && (n = recv(fd, in + got, 200000 - got, 0)) > 0) got += (size_t)n;
    CHECK_EQ_INT(got, 200000);
    CHECK_EQ_INT(recv(fd, in, 1, 0), 0);
    close(fd);
    free(bytes);
    free(in);
    world_close(&w);
}

TEST(closing_inside_events) {
    world w;
    end a[8];
    world_open(&w, "", 0);
    for (int i = 0; i < 8; i++) pair(&w, &a[i])->close_on_recv = true;
    for (int i = 0; i < 8; i++) give(&a[i], "bye", 3);
    for (int i = 0; i < 8; i++) UNTIL(&w, a[i].losts);
    for (int i = 0; i < 8; i++) leave(&a[i]);
    accept_closes = true;
    tprpc_error error = TPR_ZERO;
    for (int i = 0; i < 8; i++) REQUIRE_EQ_INT(join(&w, w.address, &a[i], &error), TPRPC_OK);
    for (int i = 0; i < 8; i++) UNTIL(&w, a[i].losts);
    for (int i = 0; i < 8; i++) leave(&a[i]);
    accept_unlistens = true;
    for (int i = 0; i < 8; i++) REQUIRE_EQ_INT(join(&w, w.address, &a[i], &error), TPRPC_OK);
    for (int i = 0; i < 8; i++) UNTIL(&w, a[i].losts);
    for (int i = 0; i < 8; i++) leave(&a[i]);
    world_close(&w);
}

static end *other_end, new_end;
static void on_event_replace(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    (void)owner;
    (void)error;
    if (!(events & TPRPC_EVENT_RECV) || new_end.conn) return;
    tprpc_error why = TPR_ZERO;
    world *w = other_end->w;
    leave(other_end);
    CHECK_EQ_INT(join(w, w->address, &new_end, &why), TPRPC_OK);
}

// What the poller reported of a connection closed meanwhile does not reach a new one in its place.
TEST(closed_between_report_and_event) {
    world w;
    end *a, *b;
    world_open(&w, "", TPRPC_NOW);
    int fds[2];
    fds[0] = plain(&w, &a);
    fds[1] = plain(&w, &b);
    a->owner.event = on_event_replace;   // its bytes come first, and it closes b, whose bytes are reported with them
    other_end = b;
    b->ignore = true;
    w.tcp->first = 0;
    for (int i = 0; i < 2; i++) CHECK_EQ_INT(send(fds[i], "x", 1, 0), 1);
    for (int64_t i = 0; i < 10000000 && !new_end.conn; i++) w.t->progress(w.tcp);
    CHECK_EQ_INT(new_end.opened, 0);
    UNTIL(&w, new_end.opened);
    leave(&new_end);
    for (int i = 0; i < 2; i++) close(fds[i]);
    world_close(&w);
}

// A connection that breaks when nobody drives keeps the loop from sleeping, or wakes it.
TEST(broken_while_armed) {
    world w;
    end *b;
    int64_t deadline;
    struct pollfd handle;
    world_open(&w, "", 0);
    int fd = plain(&w, &b);
    for (int i = 0; i < 2; i++) {
        hook_name = "send";
        hook_code = EPIPE;
        if (i) fd = plain(&w, &b);
        while (tprpc_poll(w.ctx, TPRPC_NOW, 0)) {}
        if (i) REQUIRE(tprpc_context_arm(w.ctx, &deadline));
        tprpc_test_hook = hook_fail;
        CHECK_EQ_INT(give(b, "x", 1), 1);
        tprpc_test_hook = NULL;
        if (!i) CHECK(!tprpc_context_arm(w.ctx, &deadline));
        handle.fd = (int)tprpc_context_handle(w.ctx);
        handle.events = POLLIN;
        if (i) CHECK_EQ_INT(poll(&handle, 1, 1000), 1);
        CHECK_EQ_INT(b->losts, 0);
        UNTIL(&w, b->losts);
        leave(b);
        close(fd);
    }
    world_close(&w);
}

// A forked child holds the sockets: the peer sees the end all the same, and the poller forgets them.
TEST(closing_with_a_forked_child) {
    world w;
    end a;
    int hold[2];
    REQUIRE_EQ_INT(pipe(hold), 0);
    world_open(&w, "", TPRPC_NOW);
    end *b = pair(&w, &a);
    pid_t child = fork();
    if (child == 0) {
        char c;
        close(hold[1]);
        _exit(read(hold[0], &c, 1) == 0 ? 0 : 1);
    }
    leave(&a);
    UNTIL(&w, b->losts);
    leave(b);
    tprpc_test_hook = hook_fail;
    hook_name = "epoll_wait";
    hook_code = hook_calls = 0;
    tprpc_poll(w.ctx, 50000, 0);
    tprpc_test_hook = NULL;
    CHECK_LE_INT(hook_calls, 3);
    close(hold[1]);
    CHECK_EQ_INT(test_wait_child(child, 10), 0);
    close(hold[0]);
    world_close(&w);
}

// ---- owners that are slow

// How often the loop wakes within 100 ms.
static int wakes(world *w) {
    hook_name = "epoll_wait";
    hook_code = hook_calls = 0;
    tprpc_test_hook = hook_fail;
    int64_t until = test_now_us() + 100000;
    while (test_now_us() < until) tprpc_poll(w->ctx, until - test_now_us(), 0);
    tprpc_test_hook = NULL;
    return hook_calls;
}

TEST(reader_that_does_not_read) {
    world w;
    end a;
    uint8_t *bytes = pattern(3000000, 6);
    size_t sent = 0;
    world_open(&w, "", TPRPC_NOW);
    end *b = pair(&w, &a);
    b->ignore = true;
    for (int quiet = 0; quiet < 20;) {
        size_t n = give(&a, bytes + sent, 3000000 - sent);
        sent += n;
        quiet = n ? 0 : quiet + 1;
        tprpc_poll(w.ctx, 1000, 0);
    }
    CHECK(sent >= 100000);
    CHECK_LE_INT(wakes(&w), 10);
    CHECK_EQ_INT(b->recvs, 1);
    b->ignore = false;
    b->want = sent;
    b->in = (uint8_t *)malloc(sent);
    pump(b);
    UNTIL(&w, b->got == sent);
    CHECK_MEM(b->in, bytes, sent);
    CHECK_LE_INT(wakes(&w), 10);
    free(b->in);
    free(bytes);
    leave(&a);
    world_close(&w);
}

TEST(room_is_told_once) {
    world w;
    end *b;
    enum { SIZE = 8 << 20 };
    uint8_t *bytes = pattern(SIZE, 9);
    world_open(&w, "", TPRPC_NOW);
    int fd = plain(&w, &b), quiet = 0;
    size_t sent = 0;
    while (quiet < 10) {
        size_t n = sent < SIZE ? give(b, bytes + sent, SIZE - sent) : 0;
        sent += n;
        quiet = n ? 0 : quiet + 1;
        tprpc_poll(w.ctx, 1000, 0);
    }
    REQUIRE(sent < SIZE);
    CHECK_LE_INT(wakes(&w), 4);
    b->sends = 0;
    size_t got = 0;
    static uint8_t in[1 << 20];
    while (got < sent) {
        ssize_t n = recv(fd, in, sizeof in, 0);
        REQUIRE(n > 0);
        CHECK_MEM(in, bytes + got, (size_t)n);
        got += (size_t)n;
        tprpc_poll(w.ctx, TPRPC_NOW, 0);
    }
    UNTIL(&w, b->sends);
    CHECK_LE_INT(wakes(&w), 4);
    CHECK_EQ_INT(b->sends, 1);
    close(fd);
    free(bytes);
    world_close(&w);
}

// One progress moves at most a bounded number of bytes, and no connection starves behind others.
TEST(share_of_a_progress) {
    world w;
    end a[6], *b[6];
    enum { SIZE = 4 << 20 };
    uint8_t *bytes = pattern(SIZE, 10);
    size_t sent[6] = {0};
    world_open(&w, "", 0);
    for (int i = 0; i < 6; i++) {
        b[i] = pair(&w, &a[i]);
        b[i]->in = (uint8_t *)malloc(SIZE);
        b[i]->want = SIZE;
    }
    size_t before = 0, all = 0, least = SIZE, most = 0;
    int64_t until = test_now_us() + 20000000 * TEST_SLOWDOWN;
    while (all < 6 * (size_t)SIZE && test_now_us() < until) {
        for (int i = 0; i < 6; i++) if (sent[i] < SIZE) sent[i] += give(&a[i], bytes + sent[i], SIZE - sent[i]);
        w.t->progress(w.tcp);
        all = most = 0;
        least = SIZE;
        for (int i = 0; i < 6; i++) {
            all += b[i]->got;
            least = b[i]->got < least ? b[i]->got : least;
            most = b[i]->got > most ? b[i]->got : most;
        }
        CHECK_LE_INT(all - before, 4 * TPR_TCP_CHUNK);
        if (!CHECK_LE_INT(most - least, 8 * TPR_TCP_CHUNK)) break;
        before = all;
    }
    CHECK_EQ_INT(all, 6 * (size_t)SIZE);
    for (int i = 0; i < 6; i++) {
        CHECK_MEM(b[i]->in, bytes, SIZE);
        free(b[i]->in);
        leave(&a[i]);
    }
    free(bytes);
    world_close(&w);
}

// More connections than the hot set has room for, spinning until some have left the poller; then asleep.
TEST(hot_and_cold) {
    world w;
    enum { COUNT = 24 };
    static end a[COUNT];
    end *b[COUNT];
    uint8_t in[4096];
    world_open(&w, "", TPRPC_NOW);
    for (int i = 0; i < COUNT; i++) b[i] = pair(&w, &a[i]);
    bool outside = false;
    for (int round = 0; round < 320; round++) {
        for (int i = 0; i < (round < 300 ? 4 : COUNT); i++) {
            b[i]->in = in;
            b[i]->got = 0;
            b[i]->want = 64;
            REQUIRE_EQ_INT(give(&a[i], "0123456789012345678901234567890123456789012345678901234567890123", 64), 64);
            for (int64_t n = 0; b[i]->got < 64 && n < 100000000; n++) w.t->progress(w.tcp);
            REQUIRE_EQ_INT(b[i]->got, 64);
            outside |= ((tpr_tcp_conn *)b[i]->conn)->socket.outside;
        }
        CHECK_LE_INT(w.tcp->hot_count, TPR_TCP_HOT);
    }
    CHECK(outside);
    CHECK_LE_INT(wakes(&w), 3);
    for (int i = 0; i < COUNT; i++) CHECK(!((tpr_tcp_conn *)b[i]->conn)->socket.outside);
    for (int i = 0; i < COUNT; i++) b[i]->got = 0;
    for (int i = 0; i < COUNT; i++) CHECK_EQ_INT(give(&a[i], "x", 1), 1);
    for (int i = 0; i < COUNT; i++) UNTIL(&w, b[i]->got == 1);
    for (int i = 0; i < TPR_TCP_HOT_TRIES + 100; i++) w.t->progress(w.tcp);
    CHECK_EQ_INT(w.tcp->hot_count, 0);
    for (int i = 0; i < COUNT; i++) leave(&a[i]);
    world_close(&w);
}

// ---- failures

TEST(accept_without_descriptors) {
    world w;
    end e;
    tprpc_error error = TPR_ZERO;
    world_open(&w, "", TPRPC_NOW);
    hook_name = "accept";
    hook_code = EMFILE;
    tprpc_test_hook = hook_fail;
    REQUIRE_EQ_INT(join(&w, w.address, &e, &error), TPRPC_OK);
    int64_t until = test_now_us() + 350000;
    while (test_now_us() < until) tprpc_poll(w.ctx, 10000, 0);
    tprpc_test_hook = NULL;
    CHECK(hook_calls >= 2);
    CHECK_LE_INT(hook_calls, 6);
    CHECK_EQ_INT(logs, 1);
    CHECK_CONTAINS(last_log, "Too many open files");
    CHECK_CONTAINS(last_log, w.address);
    UNTIL(&w, end_count == 1);
    leave(&e);
    hook_calls = 0;
    tprpc_test_hook = hook_fail;      // closed while it waits to try again
    REQUIRE_EQ_INT(join(&w, w.address, &e, &error), TPRPC_OK);
    UNTIL(&w, hook_calls);
    tprpc_test_hook = NULL;
    leave(&e);
    world_close(&w);
}

// The n-th call into the system, or for memory, fails, for every n: an error or a LOST, nothing hung or leaked.
TEST_LIMIT(every_call_fails_once, 120) {
    static const int codes[] = {ENOMEM, EIO, EMFILE, EAGAIN, EPERM};
    uint8_t in[100];
    bool ended = false;
    for (int n = 1; n < 400 && !ended; n++) {
        for (size_t c = 0; c < TPR_COUNT(codes); c++) {
            world w;
            end a;
            tprpc_error error = TPR_ZERO;
            world_open(&w, "", 0);
            hook_left = n;
            hook_code = codes[c];
            tprpc_test_hook = hook_nth;
            tprpc_status status = join(&w, w.address, &a, &error);
            int64_t until = test_now_us() + 3000000 * TEST_SLOWDOWN;
            if (status == TPRPC_OK) {
                while ((!a.opened || !end_count) && !a.losts && test_now_us() < until) tprpc_poll(w.ctx, 1000, 0);
                if (!a.losts && end_count) {
                    ends[0].in = in;
                    ends[0].want = sizeof in;
                    for (size_t sent = 0; !a.losts && !ends[0].losts && ends[0].got < 100 && test_now_us() < until;) {
                        sent += give(&a, in, 100 - sent);
                        tprpc_poll(w.ctx, 1000, 0);
                    }
                    CHECK(ends[0].got == 100 || a.losts || ends[0].losts);
                } else {
                    CHECK(a.losts);
                }
            } else {
                CHECK(error.text[0] != 0);
            }
            tprpc_test_hook = NULL;
            ended = hook_left > 0;
            leave(&a);
            world_close(&w);
        }
    }
    CHECK(ended);
}

// The other end's kernel drops whatever comes: like a host that lost its power.
static void go_deaf(int fd) {
    struct sock_filter drop = BPF_STMT(BPF_RET | BPF_K, 0);
    struct sock_fprog program = {1, &drop};
    REQUIRE_EQ_INT(setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program), 0);
}

// Passes `real_us` of the kernel's time and as many seconds of the loop's as it takes for the slow look to come about.
static void pass(world *w, int64_t real_us) {
    int64_t until = test_now_us() + real_us;
    while (test_now_us() < until) {
        tprpc_poll(w->ctx, 20000, 0);
        clock_ahead_us += TPR_TCP_CHECK_US + 1000;
        tprpc_poll(w->ctx, TPRPC_NOW, 0);
    }
}

TEST(silent_peer) {
    world w;
    end *dead, *idle, *full;
    uint8_t *bytes = pattern(8 << 20, 11);
    world_open(&w, "", TPRPC_NOW);
    w.tcp->silence_us = 2000000;   // above what a live kernel leaves unanswered, to limit its rate: up to 1.4 s in all
    int fds[3];
    fds[0] = plain(&w, &dead);
    fds[1] = plain(&w, &idle);
    fds[2] = plain(&w, &full);
    for (int i = 0; i < 50; i++) {   // a peer that does not read, as one in a debugger: its window is closed
        give(full, bytes, 1 << 20);
        tprpc_poll(w.ctx, 1000, 0);
    }
    CHECK_EQ_INT(give(idle, "x", 1), 1);
    pass(&w, 2500000);
    CHECK(!dead->losts && !idle->losts && !full->losts);
    CHECK(!((tpr_tcp_conn *)idle->conn)->unproven && ((tpr_tcp_conn *)full->conn)->unproven);
    go_deaf(fds[0]);
    CHECK_EQ_INT(give(dead, "hello", 5), 5);   // the last ACK is long ago, but there was nothing to acknowledge
    clock_ahead_us += TPR_TCP_CHECK_US + 1000;
    tprpc_poll(w.ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(dead->losts, 0);
    pass(&w, 2500000);
    CHECK_EQ_INT(dead->losts, 1);
    CHECK_EQ_INT(dead->error.status, TPRPC_ERROR_PEER);
    CHECK_CONTAINS(dead->error.text, "acknowledged nothing");
    CHECK(!idle->losts && !full->losts);
    leave(full);
    clock_ahead_us += TPR_TCP_CHECK_US + 1000;
    tprpc_poll(w.ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(w.ctx->loops[0].wheel.count, 0);   // nothing ticks
    for (int i = 0; i < 3; i++) close(fds[i]);
    free(bytes);
    world_close(&w);
}

static int option_of(int fd, int level, int name) {
    int value = -1;
    socklen_t size = sizeof value;
    CHECK_EQ_INT(getsockopt(fd, level, name, &value, &size), 0);
    return value;
}

// The last probe of the kernel's has its interval, too: then the peer is dead.
TEST(probes_end_with_the_silence) {
    for (int64_t ms = 2000; ms <= 3600000; ms += ms < 10000 ? 500 : 59500) {
        int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        tpr_os_tcp_options(fd, ms);
        int idle = option_of(fd, IPPROTO_TCP, TCP_KEEPIDLE), between = option_of(fd, IPPROTO_TCP, TCP_KEEPINTVL);
        CHECK_EQ_INT(option_of(fd, SOL_SOCKET, SO_KEEPALIVE), 1);
        CHECK_EQ_INT(idle + between * option_of(fd, IPPROTO_TCP, TCP_KEEPCNT), (ms + 999) / 1000);
        CHECK(idle >= 1 && between >= 1);
        close(fd);
    }
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    tpr_os_tcp_options(fd, TPRPC_FOREVER);
    CHECK_EQ_INT(option_of(fd, SOL_SOCKET, SO_KEEPALIVE), 0);
    CHECK_EQ_INT(option_of(fd, IPPROTO_TCP, TCP_NODELAY), 1);
    close(fd);
}

TEST(silence_of_a_context) {
    static const struct { int64_t given, silence_us; } cases[] = {
        {0, 30000000}, {2000, 2000000}, {3600000, INT64_C(3600000000)}, {TPRPC_FOREVER, INT64_MAX},
        {1999, 0}, {1, 0}, {3600001, 0}, {TPRPC_NOW, 0}, {-30000, 0}, {INT64_MAX, 0},
    };
    for (size_t i = 0; i < TPR_COUNT(cases); i++) {
        tprpc_context_desc desc = TPR_ZERO;
        tprpc_context *ctx = NULL;
        tprpc_error error = TPR_ZERO;
        desc.silence_ms = cases[i].given;
        desc.transports = "tcp";
        tprpc_status status = tprpc_context_create(&desc, &ctx, &error);
        CHECK_EQ_INT(status, cases[i].silence_us ? TPRPC_OK : TPRPC_ERROR_INVALID);
        if (!ctx) CHECK_CONTAINS(error.text, "silence_ms");
        for (uint32_t b = 0; ctx && b < ctx->backend_count; b++)
            if (strcmp(ctx->backends[b].backend->name, "tcp") == 0)
                CHECK_EQ_INT(((tpr_tcp *)ctx->backends[b].instances[0])->silence_us, cases[i].silence_us);
        CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    }
}

// ---- whose socket

static void connect_as(void *arg) {   // another user connects, says something and waits for the end
    world *w = (world *)arg;
    char c;
    struct sockaddr_storage to;
    socklen_t size;
    tpr_os_address address;
    REQUIRE_EQ_INT(setresuid(4711, 4711, 4711), 0);
    REQUIRE(tpr_tcp_parse(w->address, &address, NULL) == TPRPC_OK);
    to = address.at;
    size = address.size;
    int fd = socket(to.ss_family, SOCK_STREAM, 0);
    REQUIRE_EQ_INT(connect(fd, (struct sockaddr *)(void *)&to, size), 0);
    CHECK_EQ_INT(send(fd, "x", 1, 0), 1);
    CHECK_EQ_INT(recv(fd, &c, 1, 0), 0);
    close(fd);
}

static int hook_no_netlink(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, "sock_diag") == 0 ? EPERM : 0;
}

static int hook_no_owner(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, "sock_diag") == 0 || strcmp(call, "open") == 0 ? EACCES : 0;
}

// By the kernel's answer and by the files, over IPv4, IPv6 and both mixed.
TEST(other_user_is_denied) {
    if (geteuid() != 0) SKIP("needs root, for a second user");
    static const char *const where[] = {"127.0.0.1:0", "[::1]:0", "[::]:0", "0.0.0.0:0"};
    for (int i = 0; i < 8; i++) {
        world w;
        end a;
        tprpc_error error = TPR_ZERO;
        char peer[64];
        world_open(&w, where[i % 4], 0);
        if (i % 4 == 2) {   // an IPv4 peer of an IPv6 listener
            char port[16];
            snprintf(port, sizeof port, "%s", strrchr(w.address, ':'));
            snprintf(w.address, sizeof w.address, "127.0.0.1%s", port);
        }
        tprpc_test_hook = i < 4 ? NULL : hook_no_netlink;
        end *b = pair(&w, &a);
        CHECK_EQ_INT(w.t->check_peer(b->conn, &error), TPRPC_OK);
        CHECK_EQ_INT(w.t->check_peer(a.conn, &error), TPRPC_OK);
        pid_t child = test_fork_run(connect_as, &w);
        UNTIL(&w, end_count == 2 && ends[1].recvs);
        CHECK_EQ_INT(w.t->check_peer(ends[1].conn, &error), TPRPC_ERROR_DENIED);
        CHECK_CONTAINS(error.text, "user 4711");
        CHECK_CONTAINS(error.text, "user 0");
        w.t->peer(ends[1].conn, peer, sizeof peer);
        CHECK_CONTAINS(error.text, peer);
        tprpc_test_hook = hook_no_owner;
        CHECK_EQ_INT(w.t->check_peer(b->conn, &error), TPRPC_ERROR_UNSUPPORTED);
        tprpc_test_hook = NULL;
        leave(&ends[1]);
        CHECK_EQ_INT(test_wait_child(child, 10), 0);
        leave(&a);
        world_close(&w);
    }
}

// A socket that is closed already reads as root's in the kernel's tables: that must not pass as this user.
TEST(closed_peer_is_nobody) {
    for (int i = 0; i < 2; i++) {
        world w;
        end *b;
        tprpc_error error = TPR_ZERO;
        world_open(&w, "", 0);
        int fd = plain(&w, &b);
        CHECK_EQ_INT(send(fd, "x", 1, 0), 1);
        UNTIL(&w, b->recvs);
        close(fd);
        tprpc_test_hook = i ? hook_no_netlink : NULL;
        CHECK_EQ_INT(w.t->check_peer(b->conn, &error), TPRPC_ERROR_PEER);
        tprpc_test_hook = NULL;
        world_close(&w);
    }
}

static void self_connecting(void *arg) {
    tprpc_error error = TPR_ZERO;
    struct ifreq lo;
    world w;
    end e;
    (void)arg;
    REQUIRE_EQ_INT(unshare(CLONE_NEWNET), 0);
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    memset(&lo, 0, sizeof lo);
    strcpy(lo.ifr_name, "lo");
    lo.ifr_flags = IFF_UP;
    REQUIRE_EQ_INT(ioctl(fd, SIOCSIFFLAGS, &lo), 0);
    close(fd);
    fd = open("/proc/sys/net/ipv4/ip_local_port_range", O_WRONLY);
    REQUIRE(fd >= 0 && write(fd, "40000 40000", 11) == 11);
    close(fd);
    world_open(&w, NULL, 0);
    REQUIRE_EQ_INT(join(&w, "127.0.0.1:40000", &e, &error), TPRPC_OK);
    UNTIL(&w, e.losts || e.opened);
    CHECK_EQ_INT(e.opened, 0);
    CHECK_EQ_INT(e.error.os_code, ECONNREFUSED);
    leave(&e);
    world_close(&w);
}

// A socket whose own port was chosen to be the one it connects to is connected to itself; nobody listens there.
TEST(connected_to_itself) {
    if (geteuid() != 0) SKIP("needs root, for a network namespace");
    CHECK_EQ_INT(test_wait_child(test_fork_run(self_connecting, NULL), 20), 0);
}

// ---- cost

TEST(idle_connections_hold_little) {
    world w;
    end a;
    uint8_t in[64];
    world_open(&w, "", 0);
    end *b = pair(&w, &a);
    b->in = in;
    b->want = 1 << 30;
    for (int i = 0; i < 1000; i++) {
        b->got = 0;
        b->want = 64;
        give(&a, in, 64);
        UNTIL(&w, b->got == 64);
        CHECK(((tpr_tcp_conn *)b->conn)->buffer == NULL);
    }
    CHECK_LE_INT(sizeof(tpr_tcp_conn), 256);
    clock_ahead_us += 2 * TPR_TCP_CHECK_US;
    UNTIL(&w, w.ctx->loops[0].wheel.count == 0);
    CHECK_LE_INT(wakes(&w), 3);
    leave(&a);
    world_close(&w);
}
