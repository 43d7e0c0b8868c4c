/* Messages that are given, through pipes: a receiver of this process gets the sender's memory itself, and the sender has
   it back when the receiver is done, once. What is not given, not aligned or placed is copied. Calls: agent_give.c. */
#include "harness.h"
#include "../tprpc.h"
#include "pipe_common.h"

enum { MANY = 6, SIZE = 100000 };

static tprpc_context *context_with(const char *channels, int threads) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    desc.transports = "shm";
    desc.channels = channels;
    desc.log = print_log;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    return ctx;
}

static void pair_with(pair *p, const char *channels, int threads) {
    memset(p, 0, sizeof *p);
    p->s.threads = threads;
    p->s.ctx = context_with(channels, threads);
    p->s.also = context_with(channels, threads);
    pair_connect(p, "shm://", 0);
}

/* A message of several tensors, and what its receiver saw of it. `hold` keeps the receiver in his callback. */
typedef struct gift {
    uint8_t *block;
    tprpc_tensor tensors[MANY];
    tprpc_message m;
    outcome wrote, described, got;
    void *seen[MANY];
    int right, inside, hold;
    uint64_t seed;
} gift;

static void gift_make(gift *g, size_t count, size_t size, size_t offset, uint64_t seed) {
    memset(g, 0, sizeof *g);
    const size_t step = (size + 127) & ~(size_t)63;
    void *block = NULL;
    REQUIRE_EQ_INT(posix_memalign(&block, 64, count * step + 64), 0);
    g->block = (uint8_t *)block;
    for (size_t i = 0; i < count; i++) {
        g->tensors[i].data = g->block + i * step + offset;
        g->tensors[i].size = size;
        fill(g->tensors[i].data, size, seed + i);
    }
    g->m.tensors = g->tensors;
    g->m.tensor_count = count;
    g->m.release = on_release;
    g->m.release_user = &g->wrote;
    g->m.flags = TPRPC_MESSAGE_GIVE;
    g->seed = seed;
}

/* Looks at what came, and writes to it. */
static void on_gift(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    gift *g = (gift *)user;
    bool his = false;                  /* some of it is the sender's */
    CHECK_EQ_INT(status == TPRPC_OK, m != NULL);
    for (size_t i = 0; m && i < m->tensor_count; i++) {
        g->seen[i] = m->tensors[i].data;
        his |= m->tensors[i].size && g->seen[i] == g->tensors[i].data;
        CHECK(!m->tensors[i].size || ((uintptr_t)m->tensors[i].data & 63) == 0);
        g->right += matches(m->tensors[i].data, m->tensors[i].size, g->seed + i);
        if (m->tensors[i].size) memset(m->tensors[i].data, 0x77, m->tensors[i].size);
    }
    if (m) CHECK_EQ_INT(m->flags, 0);
    STORE(g->inside, 1);
    const int64_t end = test_now_us() + WAIT_S * INT64_C(1000000);
    while (LOAD(g->hold) && test_now_us() < end) test_sleep_us(100);
    if (his) CHECK_EQ_INT(LOAD(g->wrote.releases), 0);
    outcome_set(&g->got, status, error);
}

static void gift_begin(gift *g, tprpc_pipe *from, tprpc_pipe *to) {
    REQUIRE_EQ_INT(tprpc_pipe_write(from, &g->m, on_written, &g->wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(to, NULL, on_gift, g), TPRPC_OK);
}

static void gift_end(gift *g, side *s) {
    WAIT(s, g->got.runs, 1);
    WAIT(s, g->wrote.runs, 1);
    WAIT(s, g->wrote.releases, 1);
}

static uint64_t adopted(tprpc_pipe *pipe) {
    tprpc_pipe_info info;
    REQUIRE_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    return info.tensor_bytes_adopted;
}

/* Sends it from a to b, and says how many tensors were shown in place. */
static size_t carry(pair *p, gift *g) {
    size_t same = 0;
    gift_begin(g, p->a, p->b);
    gift_end(g, &p->s);
    CHECK_EQ_INT(g->got.status, TPRPC_OK);
    CHECK_EQ_INT(g->wrote.status, TPRPC_OK);
    CHECK_EQ_INT(g->right, g->m.tensor_count);
    for (size_t i = 0; i < g->m.tensor_count; i++) {
        const uint8_t *bytes = (const uint8_t *)g->tensors[i].data;
        const bool in_place = g->seen[i] == g->tensors[i].data;
        if (!g->tensors[i].size) continue;
        same += in_place;
        CHECK_EQ_INT(bytes[0] == 0x77 && bytes[g->tensors[i].size - 1] == 0x77 &&
                     !matches(bytes, g->tensors[i].size, g->seed + i), in_place);
    }
    free(g->block);
    return same;
}

static void in_place(int threads) {
    static const size_t sizes[] = {9000, SIZE, (5 << 20) + 1, 20 << 20};
    pair p;
    gift g;
    uint64_t bytes = 0;
    pair_with(&p, "xth", threads);
    for (size_t i = 0; i < COUNT(sizes); i++) {
        gift_make(&g, 1, sizes[i], 0, i);
        CHECK_EQ_INT(carry(&p, &g), 1);
        CHECK_EQ_INT(adopted(p.b), bytes += sizes[i]);
    }
    gift_make(&g, MANY, SIZE, 0, 9);
    CHECK_EQ_INT(carry(&p, &g), MANY);
    CHECK_EQ_INT(adopted(p.b), bytes += MANY * SIZE);
    CHECK_EQ_INT(adopted(p.a), 0);
    pair_close(&p);
}

TEST(in_place_polled) { in_place(0); }
TEST(in_place_threads) { in_place(3); }

static void copied(int threads) {
    pair p;
    gift g;
    pair_with(&p, "xth", threads);
    gift_make(&g, 2, SIZE, 0, 1);      /* lent, but not given */
    g.m.flags = 0;
    CHECK_EQ_INT(carry(&p, &g), 0);
    gift_make(&g, 2, SIZE, 32, 2);     /* not aligned */
    CHECK_EQ_INT(carry(&p, &g), 0);
    gift_make(&g, 2, 18 << 20, 3, 2);  /* likewise, and so large that the cache is passed by */
    CHECK_EQ_INT(carry(&p, &g), 0);
    gift_make(&g, 2, 100, 0, 3);       /* within the message */
    CHECK_EQ_INT(carry(&p, &g), 0);
    gift_make(&g, 2, SIZE, 0, 4);      /* not lent: nothing to give */
    g.m.release = NULL;
    g.wrote.releases = 1;
    gift_begin(&g, p.a, p.b);
    WAIT(&p.s, g.got.runs, 1);
    WAIT(&p.s, g.wrote.runs, 1);
    CHECK(g.right == 2 && g.seen[0] != g.tensors[0].data && g.seen[1] != g.tensors[1].data);
    free(g.block);
    CHECK_EQ_INT(adopted(p.b), 0);
    pair_close(&p);
    pair_with(&p, "cma,basic", threads);   /* channels that can not */
    gift_make(&g, 2, SIZE, 0, 5);
    CHECK_EQ_INT(carry(&p, &g), 0);
    CHECK_EQ_INT(adopted(p.b), 0);
    pair_close(&p);
}

TEST(copied_polled) { copied(0); }
TEST(copied_threads) { copied(2); }

/* Aligned and unaligned, empty and small ones and a payload, in one message. */
static void mixed(int threads) {
    pair p;
    gift g;
    pair_with(&p, "xth", threads);
    gift_make(&g, MANY, SIZE, 0, 20);
    g.tensors[1].size = 0;
    g.tensors[1].data = NULL;
    g.tensors[2].data = (uint8_t *)g.tensors[2].data + 8;
    fill(g.tensors[2].data, SIZE, 22);
    g.tensors[4].size = 500;
    CHECK_EQ_INT(carry(&p, &g), 3);
    CHECK_EQ_INT(adopted(p.b), 3 * SIZE);
    CHECK(g.seen[2] != g.tensors[2].data && g.seen[0] == g.tensors[0].data);
    pair_close(&p);
}

TEST(mixed_polled) { mixed(0); }
TEST(mixed_threads) { mixed(2); }

static void on_payload(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    if (m) *(void **)((gift *)user)->seen = m->payloads[0].data;
    outcome_set(&((gift *)user)->got, status, error);
}

TEST(payloads_too) {
    pair p;
    gift g;
    tprpc_payload payload;
    pair_with(&p, "xth", 0);
    gift_make(&g, 1, SIZE, 0, 1);
    memset(&payload, 0, sizeof payload);
    payload.data = g.tensors[0].data;
    payload.size = SIZE;
    g.m.tensor_count = 0;
    g.m.payloads = &payload;
    g.m.payload_count = 1;
    REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &g.m, NULL, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(p.b, NULL, on_payload, &g), TPRPC_OK);
    WAIT(&p.s, g.got.runs, 1);
    WAIT(&p.s, g.wrote.releases, 1);
    CHECK(g.seen[0] == payload.data);
    free(g.block);
    pair_close(&p);
}

/* Written before the pipe is open: the flag travels with the copy of the message. */
TEST(parked) {
    pair p;
    gift g;
    accepting accept;
    memset(&p, 0, sizeof p);
    memset(&accept, 0, sizeof accept);
    p.s.ctx = context_with("xth", 0);
    p.s.also = context_with("xth", 0);
    p.s.listener = listen_on(p.s.ctx, "shm://", 0);
    CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
    p.b = connect_to(p.s.also, tprpc_listener_address(p.s.listener, NULL), 0, 0);
    gift_make(&g, 1, SIZE, 0, 3);
    REQUIRE_EQ_INT(tprpc_pipe_write(p.b, &g.m, on_written, &g.wrote), TPRPC_OK);
    WAIT(&p.s, accept.o.runs, 1);
    p.a = accept.pipe;
    REQUIRE_EQ_INT(tprpc_pipe_read(p.a, NULL, on_gift, &g), TPRPC_OK);
    gift_end(&g, &p.s);
    CHECK(g.right == 1 && g.seen[0] == g.tensors[0].data);
    free(g.block);
    pair_close(&p);
}

/* Placed by the receiver, it is copied to where he says. */
TEST(placed) {
    pair p;
    gift g;
    tprpc_message to;
    tprpc_tensor at;
    uint8_t *mine = (uint8_t *)malloc(SIZE);
    REQUIRE(mine != NULL);
    pair_with(&p, "xth", 0);
    gift_make(&g, 1, SIZE, 0, 4);
    at = g.tensors[0];
    to = g.m;
    at.data = mine;
    to.tensors = &at;
    to.release = NULL;
    REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &g.m, on_written, &g.wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p.b, on_described, &g.described), TPRPC_OK);
    WAIT(&p.s, g.described.runs, 1);
    REQUIRE_EQ_INT(tprpc_pipe_read(p.b, &to, on_read, &g.got), TPRPC_OK);
    gift_end(&g, &p.s);
    CHECK(matches(mine, SIZE, 4) && matches(g.tensors[0].data, SIZE, 4));
    CHECK_EQ_INT(adopted(p.b), 0);
    free(mine);
    free(g.block);
    pair_close(&p);
}

TEST(unknown_flags) {
    pair p;
    gift g;
    pair_with(&p, "xth", 0);
    gift_make(&g, 1, SIZE, 0, 4);
    g.m.flags = 2;
    CHECK_EQ_INT(tprpc_pipe_write(p.a, &g.m, on_written, &g.wrote), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(g.wrote.releases, 1);
    CHECK_EQ_INT(g.wrote.runs, 0);
    free(g.block);
    pair_close(&p);
}

/* ---- ends, while the receiver looks ---- */

typedef struct watcher { pthread_t thread; side s; int stop; } watcher;

static void *watch(void *arg) {
    watcher *w = (watcher *)arg;
    tprpc_context_bind_thread(w->s.ctx);
    while (!LOAD(w->stop)) tprpc_poll(w->s.ctx, 1000, 0);
    return NULL;
}

static void watch_begin(watcher *w, tprpc_context *ctx) {
    memset(w, 0, sizeof *w);
    w->s.ctx = ctx;
    REQUIRE_EQ_INT(pthread_create(&w->thread, NULL, watch, w), 0);
}

static void watch_end(watcher *w) {
    STORE(w->stop, 1);
    pthread_join(w->thread, NULL);
    tprpc_context_bind_thread(w->s.ctx);
}

enum { CLOSE_SENDER, CLOSE_RECEIVER, DESTROY, ENDINGS };   /* DESTROY: the context of one end */

static void *let_on_later(void *arg) {
    test_sleep_us(300000);
    STORE(((gift *)arg)->hold, 0);
    return NULL;
}

/* The receiver stands in his callback while an end goes. The memory stays his until he is out of it. */
static void ends_while_held(int ending, int threads) {
    pair p;
    gift g;
    watcher w;
    pthread_t later;
    pair_with(&p, "xth", threads);
    gift_make(&g, 2, SIZE, 0, 30);
    g.hold = 1;
    gift_begin(&g, p.a, p.b);
    side sender = p.s;                 /* this thread drives the sender alone */
    sender.also = NULL;
    if (!threads) watch_begin(&w, p.s.also);
    WAIT(&sender, g.inside, 1);
    if (ending == CLOSE_RECEIVER) tprpc_pipe_close(p.b);
    else if (ending == CLOSE_SENDER) tprpc_pipe_close(p.a);
    if (ending != CLOSE_RECEIVER) p.a = NULL;
    else p.b = NULL;
    idle(&sender, 50000);
    CHECK_EQ_INT(LOAD(g.wrote.releases), 0);
    CHECK_EQ_INT(LOAD(g.wrote.runs), 0);
    REQUIRE_EQ_INT(pthread_create(&later, NULL, let_on_later, &g), 0);
    if (ending == DESTROY) {
        tprpc_listener_close(p.s.listener);
        p.s.listener = NULL;
        CHECK_EQ_INT(tprpc_context_destroy(p.s.ctx), TPRPC_OK);
        p.s.ctx = NULL;
        CHECK_EQ_INT(LOAD(g.wrote.releases), 1);
        CHECK_EQ_INT(LOAD(g.wrote.runs), 1);
    } else {
        gift_end(&g, &sender);
    }
    pthread_join(later, NULL);
    if (!threads) watch_end(&w);
    CHECK_EQ_INT(g.right, 2);
    CHECK(g.seen[0] == g.tensors[0].data && g.seen[1] == g.tensors[1].data);
    free(g.block);
    tprpc_pipe_close(p.a);
    tprpc_pipe_close(p.b);
    if (p.s.listener) tprpc_listener_close(p.s.listener);
    CHECK_EQ_INT(tprpc_context_destroy(p.s.also), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(p.s.ctx), TPRPC_OK);
}

TEST(ends_while_held_polled) { for (int i = 0; i < ENDINGS; i++) ends_while_held(i, 0); }
TEST(ends_while_held_threads) { for (int i = 0; i < ENDINGS; i++) ends_while_held(i, 2); }

/* An end goes at each step of the way: the memory comes back once, and who was told it is there has it. */
static void ends_at_any_time(int ending, int threads) {
    for (int turns = 0; turns < 24; turns++) {
        pair p;
        gift g;
        pair_with(&p, "xth", threads);
        gift_make(&g, 2, SIZE, 0, 40);
        g.tensors[1].data = (uint8_t *)g.tensors[1].data + 8;   /* this one is copied */
        fill(g.tensors[1].data, SIZE, 41);
        gift_begin(&g, p.a, p.b);
        if (threads) test_sleep_us(turns * 20);
        for (int i = 0; !threads && i < turns; i++) tprpc_poll(i % 2 ? p.s.also : p.s.ctx, TPRPC_NOW, 1);
        if (ending == CLOSE_RECEIVER) tprpc_pipe_close(p.b);
        else if (ending == CLOSE_SENDER) tprpc_pipe_close(p.a);
        else CHECK_EQ_INT(tprpc_context_destroy(p.s.also), TPRPC_OK);   /* the receiver's, with its pipe */
        if (ending == CLOSE_SENDER) p.a = NULL;
        else p.b = NULL;
        if (ending == DESTROY) p.s.also = NULL;
        gift_end(&g, &p.s);
        if (g.got.status == TPRPC_OK) CHECK(g.right == 2 && g.seen[0] == g.tensors[0].data);
        else CHECK_EQ_INT(g.right, 0);
        free(g.block);
        pair_close(&p);
    }
}

TEST(sender_closes_polled) { ends_at_any_time(CLOSE_SENDER, 0); }
TEST(sender_closes_threads) { ends_at_any_time(CLOSE_SENDER, 2); }
TEST(receiver_closes_polled) { ends_at_any_time(CLOSE_RECEIVER, 0); }
TEST(receiver_closes_threads) { ends_at_any_time(CLOSE_RECEIVER, 2); }
TEST(receiver_is_destroyed_polled) { ends_at_any_time(DESTROY, 0); }
TEST(receiver_is_destroyed_threads) { ends_at_any_time(DESTROY, 2); }

/* A receiver that has no memory for one tensor refuses the message, the one that he had adopted too. */
TEST(refused) {
    pair p;
    gift g;
    tprpc_context_desc desc;
    memset(&p, 0, sizeof p);
    memset(&desc, 0, sizeof desc);
    desc.transports = "shm";
    desc.channels = "xth";
    desc.limits.memory_bytes = 4 << 20;
    p.s.ctx = context_with("xth", 0);
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &p.s.also, NULL), TPRPC_OK);
    pair_connect(&p, "shm://", 0);
    gift_make(&g, 2, 5 << 20, 0, 50);
    g.tensors[1].data = (uint8_t *)g.tensors[1].data + 8;
    gift_begin(&g, p.a, p.b);
    gift_end(&g, &p.s);
    CHECK_EQ_INT(g.got.status, TPRPC_ERROR_MEMORY);
    CHECK_EQ_INT(g.wrote.status, TPRPC_ERROR_PEER);
    free(g.block);
    gift_make(&g, 1, 9 << 20, 0, 51);  /* what is shown in place takes no memory of his */
    CHECK_EQ_INT(carry(&p, &g), 1);
    pair_close(&p);
}

/* Many on several loops, both ways at once. */
TEST(many_threads) {
    enum { ROUNDS = 40 };
    pair p;
    pair_with(&p, "xth", 3);
    for (int round = 0; round < ROUNDS; round++) {
        gift *g = (gift *)calloc(4, sizeof *g);
        REQUIRE(g != NULL);
        for (int i = 0; i < 4; i++) gift_make(&g[i], 3, i < 2 ? SIZE : 3 << 20, i == 3 ? 8 : 0, (uint64_t)(i * 10));
        for (int i = 0; i < 4; i++) gift_begin(&g[i], i % 2 ? p.a : p.b, i % 2 ? p.b : p.a);
        for (int i = 0; i < 4; i++) {
            gift_end(&g[i], &p.s);
            CHECK_EQ_INT(g[i].right, 3);
            CHECK_EQ_INT(g[i].seen[0] == g[i].tensors[0].data, i != 3);
            free(g[i].block);
        }
        free(g);
    }
    pair_close(&p);
}
