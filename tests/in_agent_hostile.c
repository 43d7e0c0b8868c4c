/* Peers made by hand that speak the handshake of pipes, and then send what no agent would: to a worker that serves, and
   as a worker that is called. The pipe ends with PROTOCOL, or the message is passed over where it may have been late;
   others are served on, and nothing leaks. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "agent_help.h"
#include "agent_hold.h"
#include "sockets.h"

/* ---- a peer made by hand ---- */

typedef struct got { tpr_wire_call prefix; tprpc_error error; uint8_t body[64]; size_t size; } got;

typedef struct mallory {
    tpr_pipe_user user;                /* first */
    tprpc_context *ctx;
    tprpc_pipe *pipe;
    int open, ended, count;
    tprpc_error error;
    got got[32];
    void (*answer)(struct mallory *m, const tpr_wire_call *call);   /* when it is called; under the lock */
} mallory;

static void mallory_opened(tpr_pipe_user *user) { ((mallory *)(void *)user)->open++; }

static void mallory_message(tpr_pipe_user *user, tpr_pipe_in *in) {
    mallory *m = (mallory *)(void *)user;
    got *g = &m->got[m->count % 32];
    memset(g, 0, sizeof *g);
    REQUIRE(tpr_wire_get_call(in->prefix, in->prefix_size, &g->prefix));
    g->size = in->message.metadata_size < sizeof g->body ? in->message.metadata_size : sizeof g->body;
    if (g->size) memcpy(g->body, in->message.metadata, g->size);
    if (g->prefix.kind == TPR_WIRE_ERROR)
        CHECK(tpr_wire_get_error(in->message.metadata, in->message.metadata_size, &g->error));
    m->count++;
    tpr_agent_drop_in(in);
    if (m->answer && g->prefix.kind == TPR_WIRE_CALL) m->answer(m, &g->prefix);
}

static void mallory_ended(tpr_pipe_user *user) {
    mallory *m = (mallory *)(void *)user;
    tprpc_pipe *pipe = m->pipe;
    m->error = pipe->error;
    m->ended++;
    m->pipe = NULL;
    pipe->closed = true;
    pipe->user = NULL;
}

static void mallory_init(mallory *m, tprpc_context *ctx) {
    memset(m, 0, sizeof *m);
    m->ctx = ctx;
    m->user.opened = mallory_opened;
    m->user.message = mallory_message;
    m->user.ended = mallory_ended;
}

static void mallory_connect(mallory *m, tprpc_context *ctx, const char *address) {
    tprpc_pipe_desc desc = {0};
    tpr_loop *loop = &ctx->loops[0];
    mallory_init(m, ctx);
    desc.address = address;
    tpr_loop_enter(loop);
    m->pipe = tpr_pipe_new(ctx, loop, true, false, NULL);
    REQUIRE(m->pipe != NULL);
    m->pipe->user = &m->user;
    REQUIRE_EQ_INT(tpr_pipe_reach(m->pipe, &desc, NULL), TPRPC_OK);
    tpr_loop_leave(loop);
}

static void mallory_close(mallory *m) {
    tpr_loop *loop = &m->ctx->loops[0];
    tpr_loop_enter(loop);
    if (m->pipe) tpr_pipe_end(m->pipe, TPRPC_ERROR_CLOSED, 0, "closed");
    tpr_loop_leave(loop);
    CHECK_EQ_INT(m->ended, 1);
}

/* Sends any bytes as a message's prefix. The loop's lock is held or not: this takes it when it is not. */
static void say_bytes(mallory *m, const void *prefix, size_t size, const tprpc_message *message) {
    static const tprpc_message empty;
    if (m->pipe) tpr_pipe_send(m->pipe, NULL, prefix, size, message ? message : &empty, true, NULL);
}

static void say(mallory *m, uint8_t kind, uint32_t method, uint64_t id, const tprpc_message *message) {
    tpr_wire_call call;
    uint8_t prefix[TPR_WIRE_CALL_BYTES];
    memset(&call, 0, sizeof call);
    call.kind = kind;
    call.method = method;
    call.id = id;
    tpr_wire_put_call(prefix, &call);
    say_bytes(m, prefix, sizeof prefix, message);
}

static void say_intro(mallory *m) {
    uint8_t intro[160];
    tprpc_message message = {0};
    message.metadata = intro;
    message.metadata_size = tpr_wire_put_intro(intro, sizeof intro, "mallory", 7);
    say(m, TPR_WIRE_INTRO, 0, 0, &message);
}

static void lent_ended(tpr_pipe_write *write) { free(write); }

/* A message with a tensor that does not travel inline: a transfer that the other end has to ask for. */
static void say_bulk(mallory *m, uint8_t kind, uint32_t method, uint64_t id) {
    static uint8_t bytes[300000];
    const tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    const tprpc_message message = tensors_of(&tensor, 1);
    tpr_pipe_write *write = (tpr_pipe_write *)calloc(1, sizeof *write);
    tpr_wire_call call;
    uint8_t prefix[TPR_WIRE_CALL_BYTES];
    REQUIRE(write != NULL);
    memset(&call, 0, sizeof call);
    call.kind = kind;
    call.method = method;
    call.id = id;
    tpr_wire_put_call(prefix, &call);
    if (m->pipe) tpr_pipe_write_begin(m->pipe, write, lent_ended);
    if (!m->pipe) free(write);
    else if (tpr_pipe_send(m->pipe, write, prefix, sizeof prefix, &message, true, NULL) != TPRPC_OK) {
        tpr_pipe_write_undo(write);
        free(write);
    }
}

/* Drives both sides until *flag is that much. */
static bool drive_until(side *s, tprpc_context *ctx, int *flag, int at_least) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (LOAD(flag) < at_least && test_now_us() < end) {
        tprpc_poll(ctx, TPRPC_NOW, 0);
        tprpc_poll(s->ctx, 200, 0);
    }
    return LOAD(flag) >= at_least;
}

/* ---- methods ---- */

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static void on_release(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    while (kept_count) tprpc_reply(kept[--kept_count], NULL);
    tprpc_reply(request, NULL);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {"hold", on_hold, NULL, NULL, NULL, 0},
    {"release", on_release, NULL, NULL, NULL, 0},
    {0},
};

enum { INSIDE_MODES = 0x6c };

static side *victim;

static void dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    agent->rank = agent->world_size = 0;
    if (s->rank) victim = s;
}

static void serve(side *s) {
    STORE(&shared->ready, 1);
    serve_until_stop(s);
}

/* Side 0 runs `first`, in a group with bob, who serves until it is over. */
static void with_bob(const mode *with, void (*first)(side *)) {
    side sides[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].tune = dynamic;
    }
    sides[0].mode = with;
    sides[0].main = first;
    sides[1].main = serve;
    group_run(sides, 2);
}

/* A context of mallory's own. */
static tprpc_context *raw_context(heap *h, const char *transports) {
    tprpc_context_desc desc = {0};
    tprpc_context *ctx = NULL;
    desc.allocator.alloc = heap_alloc;
    desc.allocator.free = heap_free;
    desc.allocator.user = h;
    desc.transports = transports;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    return ctx;
}

/* ---- to a worker that serves ---- */

static uint32_t echo_id(void) { return tpr_agent_method_id("echo"); }

static void call_first(mallory *m) { say(m, TPR_WIRE_CALL, echo_id(), 1, NULL); }
static void cancel_first(mallory *m) { say(m, TPR_WIRE_CANCEL, 0, 1, NULL); }
static void intro_twice(mallory *m) { say_intro(m); say_intro(m); }
static void reply_to_it(mallory *m) { say_intro(m); say(m, TPR_WIRE_REPLY, 0, 1, NULL); }
static void kind_0(mallory *m) { say_intro(m); say(m, 0, echo_id(), 1, NULL); }
static void kind_6(mallory *m) { say_intro(m); say(m, TPR_WIRE_INTRO + 1, echo_id(), 1, NULL); }
static void kind_255(mallory *m) { say_intro(m); say(m, 255, echo_id(), 1, NULL); }
static void bulky_reply(mallory *m) { say_intro(m); say_bulk(m, TPR_WIRE_REPLY, 0, 1); }
static void bulky_intro_twice(mallory *m) { say_intro(m); say_bulk(m, TPR_WIRE_INTRO, 0, 0); }

static void error_to_it(mallory *m) {
    uint8_t body[100];
    tprpc_message message = {0};
    message.metadata = body;
    message.metadata_size = tpr_wire_put_error(body, sizeof body, TPRPC_ERROR_REMOTE, 1, "no");
    say_intro(m);
    say(m, TPR_WIRE_ERROR, 0, 1, &message);
}

static void no_prefix(mallory *m) { say_intro(m); say_bytes(m, NULL, 0, NULL); }

static void short_prefix(mallory *m) {
    static const uint8_t bytes[TPR_WIRE_CALL_BYTES] = {TPR_WIRE_CALL};
    say_intro(m);
    say_bytes(m, bytes, TPR_WIRE_CALL_BYTES - 1, NULL);
}

static void payloads_in_a_call(mallory *m) {
    char bytes[] = "payload";
    tprpc_payload payload = {bytes, sizeof bytes, NULL, 0};
    tprpc_message message = {0};
    message.payloads = &payload;
    message.payload_count = 1;
    say_intro(m);
    say(m, TPR_WIRE_CALL, echo_id(), 1, &message);
}

static void intro_of(mallory *m, const char *name, size_t name_size, size_t cut) {
    uint8_t body[400];
    tprpc_message message = {0};
    tpr_base_store_le32(body, 0);
    tpr_base_store_le32(body + 4, (uint32_t)name_size);
    memcpy(body + 8, name, name_size);
    message.metadata = body;
    message.metadata_size = 8 + name_size - cut;
    say(m, TPR_WIRE_INTRO, 0, 0, &message);
}
static void intro_empty(mallory *m) { say(m, TPR_WIRE_INTRO, 0, 0, NULL); }
static void intro_no_name(mallory *m) { intro_of(m, "", 0, 0); }
static void intro_not_utf8(mallory *m) { intro_of(m, "\xc3\x28", 2, 0); }
static void intro_with_0(mallory *m) { intro_of(m, "a\0b", 3, 0); }
static void intro_cut(mallory *m) { intro_of(m, "mallory", 7, 1); }
static void intro_too_long(mallory *m) {
    char name[200];
    memset(name, 'm', sizeof name);
    intro_of(m, name, 129, 0);
}

/* Device maps behind an introduction: too many, cut, or a number alone. */
static void maps_of(mallory *m, uint32_t count, size_t bytes) {
    uint8_t body[200] = {0};
    tprpc_message message = {0};
    const size_t size = tpr_wire_put_intro(body, sizeof body, "mallory", 7);
    tpr_base_store_le32(body + size, count);
    message.metadata = body;
    message.metadata_size = size + bytes;
    say(m, TPR_WIRE_INTRO, 0, 0, &message);
}
static void maps_too_many(mallory *m) { maps_of(m, TPR_WIRE_MAPS + 1, 100); }
static void maps_wild(mallory *m) { maps_of(m, UINT32_MAX, 100); }
static void maps_cut(mallory *m) { maps_of(m, 3, 4 + 3 * TPR_WIRE_MAP_BYTES - 1); }
static void maps_begun(mallory *m) { maps_of(m, 0, 3); }

static const struct { const char *name; void (*run)(mallory *m); } attacks[] = {
    {"call_first", call_first}, {"cancel_first", cancel_first}, {"intro_twice", intro_twice},
    {"reply_to_it", reply_to_it}, {"error_to_it", error_to_it}, {"kind_0", kind_0}, {"kind_6", kind_6},
    {"kind_255", kind_255}, {"bulky_reply", bulky_reply}, {"bulky_intro_twice", bulky_intro_twice},
    {"no_prefix", no_prefix}, {"short_prefix", short_prefix}, {"payloads_in_a_call", payloads_in_a_call},
    {"intro_empty", intro_empty}, {"intro_no_name", intro_no_name}, {"intro_not_utf8", intro_not_utf8},
    {"intro_with_0", intro_with_0}, {"intro_cut", intro_cut}, {"intro_too_long", intro_too_long},
    {"maps_too_many", maps_too_many}, {"maps_wild", maps_wild}, {"maps_cut", maps_cut}, {"maps_begun", maps_begun},
};

static void attack_all(side *s) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, s->mode->transports);
    mallory m;
    CHECK(until(s, &shared->ready, 1));
    for (size_t round = 0; round < 3 * sizeof attacks / sizeof attacks[0]; round++) {
        const size_t i = round % (sizeof attacks / sizeof attacks[0]);
        fprintf(stderr, "%s\n", attacks[i].name);
        mallory_connect(&m, ctx, victim->agent->self.addresses[0]);
        REQUIRE(drive_until(s, ctx, &m.open, 1));
        tpr_loop_enter(&ctx->loops[0]);
        attacks[i].run(&m);
        tpr_loop_leave(&ctx->loops[0]);
        CHECK(drive_until(s, ctx, &m.ended, 1));
        CHECK_EQ_INT(m.error.status, TPRPC_ERROR_PEER);   /* which said why */
        CHECK_CONTAINS(m.error.text, "something else than calls");
        CHECK_EQ_INT(m.count, 0);      /* no answer */
        CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    }
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;   /* an answer is here before its handler ends */
    while (stats_of(victim).server_active_calls && test_now_us() < end) test_sleep_us(100);
    CHECK_EQ_INT(stats_of(victim).server_active_calls, 0);
    STORE(&shared->stop, 1);
}
IN_MODES(attacks_on_a_server, INSIDE_MODES) { with_bob(with, attack_all); }

/* What is odd, but may be: it is served, or passed over, and the pipe goes on. */
static void bear_it(side *s) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, s->mode->transports);
    tpr_wire_call huge = {TPR_WIRE_CALL, 0xfe, echo_id(), 5, UINT64_MAX, UINT32_MAX, 255};
    uint8_t prefix[TPR_WIRE_PREFIX] = {0};
    const uint32_t hold = tpr_agent_method_id("hold");
    mallory m;
    CHECK(until(s, &shared->ready, 1));
    mallory_connect(&m, ctx, victim->agent->self.addresses[0]);
    REQUIRE(drive_until(s, ctx, &m.open, 1));
    tpr_loop_enter(&ctx->loops[0]);
    say_intro(&m);
    for (uint64_t i = 0; i < 100; i++) say(&m, TPR_WIRE_CANCEL, 0, i * UINT64_C(0x9e3779b97f4a7c15), NULL);
    say_bulk(&m, TPR_WIRE_CANCEL, 0, 77);
    tpr_wire_put_call(prefix, &huge);
    prefix[2] = prefix[3] = 0xff;      /* reserved */
    say_bytes(&m, prefix, TPR_WIRE_CALL_BYTES, NULL);
    tpr_loop_leave(&ctx->loops[0]);
    CHECK(drive_until(s, ctx, &m.count, 1));
    CHECK_EQ_INT(m.got[0].prefix.kind, TPR_WIRE_REPLY);
    CHECK(m.got[0].prefix.id == UINT64_MAX);

    tpr_loop_enter(&ctx->loops[0]);    /* a method that is none; one id many times, cancelled more often */
    say_bulk(&m, TPR_WIRE_CALL, 12345, 2);
    tpr_loop_leave(&ctx->loops[0]);
    CHECK(drive_until(s, ctx, &m.count, 2));
    CHECK_EQ_INT(m.got[1].error.status, TPRPC_ERROR_NO_METHOD);
    tpr_loop_enter(&ctx->loops[0]);
    for (int i = 0; i < 8; i++) say(&m, TPR_WIRE_CALL, hold, 3, NULL);
    tpr_loop_leave(&ctx->loops[0]);
    CHECK(drive_until(s, ctx, &shared->seen, 8));
    tpr_loop_enter(&ctx->loops[0]);
    for (uint64_t i = 4; i < 40; i++) say(&m, TPR_WIRE_CANCEL, 0, i, NULL);   /* of others, which are none */
    say(&m, TPR_WIRE_CALL, echo_id(), 4, NULL);
    tpr_loop_leave(&ctx->loops[0]);
    CHECK(drive_until(s, ctx, &m.count, 3));
    for (int i = 0; i < 8; i++) CHECK(!tprpc_request_cancelled(kept[i]));
    tpr_loop_enter(&ctx->loops[0]);
    for (int i = 0; i < 20; i++) say(&m, TPR_WIRE_CANCEL, 0, 3, NULL);
    say(&m, TPR_WIRE_CALL, echo_id(), 4, NULL);
    tpr_loop_leave(&ctx->loops[0]);
    CHECK(drive_until(s, ctx, &m.count, 4));
    CHECK_EQ_INT(call_and_wait(s, "bob", "release", NULL, NULL, NULL), TPRPC_OK);

    tpr_loop_enter(&ctx->loops[0]);    /* and gone amid it all: calls begun, a transfer not served */
    for (int i = 0; i < 8; i++) say(&m, TPR_WIRE_CALL, hold, (uint64_t)(i / 2), NULL);
    for (int i = 0; i < 8; i++) say_bulk(&m, TPR_WIRE_CALL, hold, 100);
    tpr_loop_leave(&ctx->loops[0]);
    CHECK(drive_until(s, ctx, &shared->seen, 12));
    CHECK_EQ_INT(m.ended, 0);
    mallory_close(&m);
    for (int i = 0; i < 50; i++) CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    for (int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
         stats_of(victim).server_active_calls > stats_of(victim).server_active_async_calls && test_now_us() < end;)
        drive_until(s, ctx, &(int){1}, 1);
    CHECK_EQ_INT(call_and_wait(s, "bob", "release", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    STORE(&shared->stop, 1);
}
IN_MODES(odd_callers_are_borne, INSIDE_MODES) { with_bob(with, bear_it); }

/* An ordinary pipe, which an agent's listener takes: its messages are none between agents. */
static void end_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)message;
    if (error) CHECK_CONTAINS(error->text, "something else than calls");
    STORE((int *)user, (int)status);
}

static void come_by_a_pipe(side *s) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, s->mode->transports);
    CHECK(until(s, &shared->ready, 1));
    for (int i = 0; i < 4; i++) {
        tprpc_pipe_desc desc = {0};
        tprpc_message message = text_of("hello");
        tprpc_pipe *pipe = NULL;
        int outcome = 0;
        desc.address = victim->agent->self.addresses[0];
        REQUIRE_EQ_INT(tprpc_connect(ctx, &desc, &pipe, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(pipe, NULL, end_read, &outcome), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_write(pipe, &message, NULL, NULL), TPRPC_OK);
        CHECK(drive_until(s, ctx, &outcome, 1));
        CHECK_EQ_INT(outcome, TPRPC_ERROR_PEER);
        tprpc_pipe_close(pipe);
        CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    }
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    STORE(&shared->stop, 1);
}
IN_MODES(ordinary_pipes, INSIDE_MODES) { with_bob(with, come_by_a_pipe); }

/* ---- as a worker that is called ---- */

static mallory evil;                   /* the pipe that came in last */
static uint64_t other_call;            /* of a call to bob */

static tpr_pipe_user *evil_accepts(void *arg, tprpc_pipe *pipe) {
    void (*answer)(mallory *, const tpr_wire_call *) = evil.answer;
    REQUIRE(evil.pipe == NULL);
    mallory_init(&evil, (tprpc_context *)arg);
    evil.answer = answer;
    evil.pipe = pipe;
    return &evil.user;
}

static void say_error_of(mallory *m, uint64_t id, const void *body, size_t size) {
    tprpc_message message = {0};
    message.metadata = body;
    message.metadata_size = size;
    say(m, TPR_WIRE_ERROR, 0, id, &message);
}

static void reply_well(mallory *m, const tpr_wire_call *call) { say(m, TPR_WIRE_REPLY, 0, call->id, NULL); }

/* Which end in PROTOCOL, the pipe with them. */
static void call_back(mallory *m, const tpr_wire_call *call) { say(m, TPR_WIRE_CALL, echo_id(), call->id, NULL); }
static void cancel_back(mallory *m, const tpr_wire_call *call) { say(m, TPR_WIRE_CANCEL, 0, call->id, NULL); }
static void intro_back(mallory *m, const tpr_wire_call *call) { (void)call; say_intro(m); }
static void bulk_back(mallory *m, const tpr_wire_call *call) { say_bulk(m, TPR_WIRE_CALL, echo_id(), call->id); }
static void short_back(mallory *m, const tpr_wire_call *call) {
    static const uint8_t bytes[8] = {TPR_WIRE_REPLY};
    (void)call;
    say_bytes(m, bytes, sizeof bytes, NULL);
}
static void payloads_back(mallory *m, const tpr_wire_call *call) {
    char bytes[] = "payload";
    tprpc_payload payload = {bytes, sizeof bytes, NULL, 0};
    tprpc_message message = {0};
    message.payloads = &payload;
    message.payload_count = 1;
    say(m, TPR_WIRE_REPLY, 0, call->id, &message);
}

/* Which end in PROTOCOL, and the pipe goes on. */
static void error_empty(mallory *m, const tpr_wire_call *call) { say_error_of(m, call->id, NULL, 0); }
static void error_short(mallory *m, const tpr_wire_call *call) { say_error_of(m, call->id, "\7\0\0\0\1", 5); }
static void error_cut(mallory *m, const tpr_wire_call *call) {
    say_error_of(m, call->id, "\7\0\0\0\1\0\0\0\xff\0\0\0text", 16);
}
static void error_endless(mallory *m, const tpr_wire_call *call) {
    static uint8_t body[60000];
    memset(body, 'x', sizeof body);
    tpr_base_store_le32(body, TPRPC_ERROR_REMOTE);
    tpr_base_store_le32(body + 8, sizeof body - 12);
    say_error_of(m, call->id, body, sizeof body);
}

/* Which are borne: the call ends well. */
static void reply_others(mallory *m, const tpr_wire_call *call) {
    for (uint64_t i = 0; i < 20; i++) say(m, TPR_WIRE_REPLY, 0, i * UINT64_C(0x123456789abcdef), NULL);
    say(m, TPR_WIRE_REPLY, 0, UINT64_MAX, NULL);
    say(m, TPR_WIRE_REPLY, 0, call->id + 1, NULL);
    say(m, TPR_WIRE_REPLY, 0, call->id ^ UINT64_C(1) << 63, NULL);
    say(m, TPR_WIRE_REPLY, 0, other_call, NULL);   /* not its own to answer */
    say_error_of(m, other_call, "\7\0\0\0\1\0\0\0\0\0\0\0", 12);
    say_bulk(m, TPR_WIRE_REPLY, 0, call->id + 2);
    say_error_of(m, call->id + 3, NULL, 0);
    reply_well(m, call);
}
static void reply_twice(mallory *m, const tpr_wire_call *call) {
    reply_well(m, call);
    reply_well(m, call);
    say_bulk(m, TPR_WIRE_REPLY, 0, call->id);
}

/* Which end in what it says, or in REMOTE where that is nothing that an error can be. */
static void error_status_0(mallory *m, const tpr_wire_call *call) {
    say_error_of(m, call->id, "\0\0\0\0\1\0\0\0\0\0\0\0", 12);
}
static void error_status_wild(mallory *m, const tpr_wire_call *call) {
    say_error_of(m, call->id, "\xff\xff\xff\xff\1\0\0\0\0\0\0\0", 12);
}

/* Replies with a tensor that is said to be on a device, of which evil published 64:3 to 64:4, and to go to another. */
static void say_on(mallory *m, uint64_t id, int32_t kind, int32_t index, int32_t to_kind, int32_t to_index) {
    tprpc_tensor tensor = bytes_of(NULL, 0);
    const tprpc_message message = tensors_of(&tensor, 1);
    tensor.device.kind = kind;
    tensor.device.index = index;
    tensor.target.kind = to_kind;
    tensor.target.index = to_index;
    say(m, TPR_WIRE_REPLY, 0, id, &message);
}
static void on_its_own(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, TPRPC_DEVICE_USER, 4, TPRPC_CPU, 0); }
static void on_too_high(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, TPRPC_DEVICE_USER, 5, TPRPC_CPU, 0); }
static void on_too_low(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, TPRPC_DEVICE_USER, 2, TPRPC_CPU, 0); }
static void on_below_0(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, TPRPC_DEVICE_USER, -1, TPRPC_CPU, 0); }
static void on_no_kind(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, 77, 0, TPRPC_CPU, 0); }
static void to_no_kind(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, TPRPC_CPU, 0, 77, 1); }
static void to_its_own(mallory *m, const tpr_wire_call *c) { say_on(m, c->id, TPRPC_DEVICE_USER, 4, 0, 0); }

static const struct { const char *name; void (*answer)(mallory *, const tpr_wire_call *); tprpc_status status;
                      bool ends; } answers[] = {
    {"reply_well", reply_well, TPRPC_OK, false}, {"call_back", call_back, TPRPC_ERROR_PROTOCOL, true},
    {"cancel_back", cancel_back, TPRPC_ERROR_PROTOCOL, true}, {"intro_back", intro_back, TPRPC_ERROR_PROTOCOL, true},
    {"bulk_back", bulk_back, TPRPC_ERROR_PROTOCOL, true}, {"short_back", short_back, TPRPC_ERROR_PROTOCOL, true},
    {"payloads_back", payloads_back, TPRPC_ERROR_PROTOCOL, true},
    {"error_empty", error_empty, TPRPC_ERROR_PROTOCOL, false},
    {"error_short", error_short, TPRPC_ERROR_PROTOCOL, false}, {"error_cut", error_cut, TPRPC_ERROR_PROTOCOL, false},
    {"error_endless", error_endless, TPRPC_ERROR_PROTOCOL, false}, {"reply_others", reply_others, TPRPC_OK, false},
    {"reply_twice", reply_twice, TPRPC_OK, false}, {"error_status_0", error_status_0, TPRPC_ERROR_REMOTE, false},
    {"error_status_wild", error_status_wild, TPRPC_ERROR_REMOTE, false},
    {"on_its_own", on_its_own, TPRPC_OK, false}, {"on_too_high", on_too_high, TPRPC_ERROR_PROTOCOL, false},
    {"on_too_low", on_too_low, TPRPC_ERROR_PROTOCOL, false}, {"on_below_0", on_below_0, TPRPC_ERROR_PROTOCOL, false},
    {"on_no_kind", on_no_kind, TPRPC_ERROR_PROTOCOL, false}, {"to_no_kind", to_no_kind, TPRPC_ERROR_UNSUPPORTED, false},
    {"to_its_own", to_its_own, TPRPC_ERROR_UNSUPPORTED, false},
};

static bool evil_is_old;               /* it says nothing of its devices */
static uint32_t evil_process;          /* it says that it is this one */
static const char *evil_address;       /* where it says it is; NULL: where it listens */

static tprpc_listener *evil_listen(side *s, tprpc_context *ctx) {
    const char *addresses[] = {"tcp://127.0.0.1:0"};
    tprpc_listener_desc desc = {0};
    tprpc_store_request request = {0};
    tpr_wire_worker worker;
    uint8_t value[1400];
    tprpc_listener *listener = NULL;
    desc.addresses = addresses;
    desc.address_count = 1;
    REQUIRE_EQ_INT(tpr_pipe_listen_for(ctx, &desc, &ctx->loops[0], evil_accepts, ctx, &listener, NULL), TPRPC_OK);
    memset(&worker, 0, sizeof worker);
    snprintf(worker.name, sizeof worker.name, "evil");
    worker.address_count = worker.tells_devices = worker.run_count = 1;
    worker.runs[0].kind = TPRPC_DEVICE_USER;
    worker.runs[0].first = 3;
    worker.runs[0].count = 2;
    if (evil_is_old) worker.tells_devices = 0;
    worker.process = evil_process;
    worker.space = evil_process ? ctx->process_space : 0;
    snprintf(worker.addresses[0], sizeof worker.addresses[0], "%s",
             evil_address ? evil_address : tprpc_listener_address(listener, "tcp"));
    request.size = sizeof request;
    request.kind = TPRPC_STORE_SET;
    request.key = "tprpc/name/evil";
    request.value = value;
    request.value_size = tpr_wire_put_worker(value, sizeof value, &worker);
    REQUIRE_EQ_INT(tprpc_store_wait(s->store, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
    return listener;
}

static void done_once(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (error && status != TPRPC_ERROR_REMOTE) CHECK_CONTAINS(error->text, "evil");   /* those are its own words */
    STORE(&shared->status[0], (int)status);
    ADD((int *)user, 1);
}

static void call_evil(side *s) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, s->mode->transports);
    tprpc_listener *listener = evil_listen(s, ctx);
    tprpc_future other;
    int64_t end;
    CHECK(until(s, &shared->ready, 1));
    for (size_t round = 0; round < 2 * sizeof answers / sizeof answers[0]; round++) {
        const size_t i = round % (sizeof answers / sizeof answers[0]);
        tprpc_call_options options = {0};
        int done = 0;
        fprintf(stderr, "%s\n", answers[i].name);
        REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, NULL, &other), TPRPC_OK);
        CHECK(until(s, &shared->seen, (int)round + 1));
        other_call = other.id;
        evil.answer = answers[i].answer;
        options.on_done = done_once;
        options.user = &done;
        REQUIRE_EQ_INT(tprpc_call(s->agent, "evil", "echo", NULL, &options, NULL), TPRPC_OK);
        REQUIRE(drive_until(s, ctx, &done, 1));
        CHECK_EQ_INT(LOAD(&shared->status[0]), answers[i].status);
        if (answers[i].ends) CHECK(drive_until(s, ctx, &evil.ended, 1));
        if (answers[i].ends) CHECK_CONTAINS(evil.error.text, "something else than a reply");
        CHECK_EQ_INT(tprpc_future_wait(other, TPRPC_NOW), TPRPC_PENDING);
        CHECK_EQ_INT(call_and_wait(s, "bob", "release", NULL, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_future_wait(other, WAIT_MS), TPRPC_OK);
        tprpc_future_release(other);
        evil.answer = reply_well;      /* and it may be called again, over this pipe or a new one */
        REQUIRE_EQ_INT(tprpc_call(s->agent, "evil", "echo", NULL, &options, NULL), TPRPC_OK);
        CHECK(drive_until(s, ctx, &done, 2));
        CHECK_EQ_INT(LOAD(&shared->status[0]), TPRPC_OK);
    }
    end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (stats_of(s).late_replies < 2 * 29 && test_now_us() < end) drive_until(s, ctx, &(int){1}, 1);
    CHECK_EQ_INT(stats_of(s).late_replies, 2 * 29);   /* 27 that were others', 2 that came again */
    CHECK_EQ_INT(stats_of(s).client_active_calls, 0);
    if (evil.pipe) mallory_close(&evil);
    tprpc_listener_close(listener);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    STORE(&shared->stop, 1);
}
IN_MODES(answers_of_a_hostile_worker, INSIDE_MODES) { with_bob(with, call_evil); }

/* ---- as one who has got a worker's address ---- */

/* One says what is his trade, one hangs up, one hangs up with what he was told unread: what he said may go with it. */
static void *answer_otherwise(void *listener) {
    const struct linger at_once = {1, 0};
    for (int i = 0;; i++) {
        const int fd = accept((int)(intptr_t)listener, NULL, NULL);
        if (fd < 0) return NULL;
        if (i % 3 != 1) CHECK(write(fd, "220 mail.example ESMTP ready, and more than a header of ours\r\n", 62) == 62);
        if (i % 3 == 2) CHECK_EQ_INT(setsockopt(fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once), 0);
        close(fd);
    }
}

/* Calls to a worker whose address has become another process's, one of ours or not, do not go there. */
static void call_stranger(side *s) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, s->mode->transports);
    enum { ROUNDS = 6 };
    const tprpc_status expected[ROUNDS] = {TPRPC_ERROR_TIMEOUT,     TPRPC_ERROR_UNREACHABLE, TPRPC_ERROR_UNREACHABLE,
                                           TPRPC_ERROR_UNREACHABLE, TPRPC_ERROR_UNREACHABLE, TPRPC_OK};
    char address[64];
    uint16_t port = 0;
    const int fd = socket_listen(&port);
    pthread_t thread;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, answer_otherwise, (void *)(intptr_t)fd), 0);
    snprintf(address, sizeof address, "tcp://127.0.0.1:%u", port);
    CHECK(until(s, &shared->ready, 1));
    evil.answer = reply_well;
    for (int i = 0; i < ROUNDS; i++) {
        tprpc_call_options options = {0};
        evil_process = (uint32_t)(i < 2 ? getppid() : getpid());
        evil_address = i >= 2 && i < ROUNDS - 1 ? address : NULL;
        tprpc_listener *listener = evil_listen(s, ctx);
        int done = 0;
        options.flags = i == 0 ? TPRPC_CALL_IDEMPOTENT : 0;
        options.timeout_ms = i == 0 ? 40 : 0;
        options.on_done = done_once;
        options.user = &done;
        REQUIRE_EQ_INT(tprpc_call(s->agent, "evil", "echo", NULL, &options, NULL), TPRPC_OK);
        REQUIRE(drive_until(s, ctx, &done, 1));
        CHECK_EQ_INT(LOAD(&shared->status[0]), expected[i]);
        CHECK_EQ_INT(evil.count, i == ROUNDS - 1 ? 2 : 0);
        if (evil.pipe) mallory_close(&evil);
        tprpc_listener_close(listener);
    }
    shutdown(fd, SHUT_RDWR);
    pthread_join(thread, NULL);
    close(fd);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    STORE(&shared->stop, 1);
}
IN_MODES(a_stranger_at_a_workers_address, INSIDE_MODES) { with_bob(with, call_stranger); }

/* ---- as a worker of an older version, which says nothing of its devices ---- */

/* What a map has to do with it is not checked, and of its replies where they go alone; it is told the map, which it would
   not understand. */
static void call_old(side *s) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, s->mode->transports);
    tprpc_listener *listener;
    tpr_wire_reader maps;
    uint32_t count = 0;
    evil_is_old = true;
    listener = evil_listen(s, ctx);
    CHECK(until(s, &shared->ready, 1));
    for (size_t i = 0; i < 3; i++) {
        void (*const asked[])(mallory *, const tpr_wire_call *) = {on_no_kind, to_its_own, reply_well};
        const tprpc_status expected[] = {TPRPC_OK, TPRPC_ERROR_UNSUPPORTED, TPRPC_OK};
        tprpc_call_options options = {0};
        int done = 0;
        evil.answer = asked[i];
        options.on_done = done_once;
        options.user = &done;
        REQUIRE_EQ_INT(tprpc_call(s->agent, "evil", "echo", NULL, &options, NULL), TPRPC_OK);
        REQUIRE(drive_until(s, ctx, &done, 1));
        CHECK_EQ_INT(LOAD(&shared->status[0]), expected[i]);
    }
    CHECK_EQ_INT(evil.got[0].prefix.kind, TPR_WIRE_INTRO);
    CHECK(tpr_wire_get_intro_maps(evil.got[0].body, evil.got[0].size, &maps, &count));
    REQUIRE_EQ_INT(count, 1);
    CHECK_EQ_INT(tpr_wire_read_map(&maps).to.index, 50);
    if (evil.pipe) mallory_close(&evil);
    tprpc_listener_close(listener);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    STORE(&shared->stop, 1);
}

IN_MODES(a_worker_of_an_older_version, INSIDE_MODES) {
    side sides[2] = {{0}};
    group g;
    const tprpc_device from = {TPRPC_CPU, 0}, to = {TPRPC_DEVICE_USER, 50};
    share();
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].tune = dynamic;
    }
    sides[0].mode = with;
    sides[1].main = serve;
    group_open(&g, sides, 2);
    REQUIRE_EQ_INT(pthread_create(&sides[1].self, NULL, side_thread, &sides[1]), 0);
    side_open(&sides[0]);
    REQUIRE_EQ_INT(tprpc_agent_set_device_map(sides[0].agent, "evil", &from, &to, 1, NULL), TPRPC_OK);
    side_join(&sides[0]);
    call_old(&sides[0]);
    side_leave(&sides[0]);
    side_close(&sides[0]);
    pthread_join(sides[1].self, NULL);
    group_close(&g);
}

/* ---- as a worker of a static group, whose device maps are not what they should be ---- */

static void put_key(tprpc_store *store, const char *key, const void *value, size_t size) {
    tprpc_store_request request = {0};
    request.size = sizeof request;
    request.kind = TPRPC_STORE_SET;
    request.key = key;
    request.value = value;
    request.value_size = size;
    REQUIRE_EQ_INT(tprpc_store_wait(store, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
}

/* How the start of ann ends in a group with evil, who said that he has maps: with these, or NULL: with none. */
static void start_with(const void *maps, size_t size, uint32_t rank, tprpc_status status, const char *text) {
    heap h = {0};
    tprpc_context *ctx = raw_context(&h, NULL);
    tprpc_store_desc store = {0};
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    tpr_wire_worker worker;
    uint8_t value[1400];
    store.url = "local://";
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &store, &desc.store, NULL), TPRPC_OK);
    memset(&worker, 0, sizeof worker);
    snprintf(worker.name, sizeof worker.name, "evil");
    worker.rank = rank;
    worker.tells_devices = worker.has_maps = 1;
    put_key(desc.store, "tprpc/rank/1", value, tpr_wire_put_worker(value, sizeof value, &worker));
    if (maps) put_key(desc.store, "tprpc/devices/1", maps, size);
    desc.context = ctx;
    desc.name = "ann";
    desc.world_size = 2;
    desc.start_timeout_ms = maps ? WAIT_MS : 20;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    if (text) CHECK_EQ_INT(tprpc_agent_wait_ready(agent, 0, &error), status);
    else tprpc_agent_wait_ready(agent, 0, &error);
    if (text) CHECK_CONTAINS(error.text, text);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    tprpc_store_close(desc.store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
}

TEST(odd_maps_in_the_store) {
    uint8_t bytes[400];
    tpr_wire_map maps[3];
    tprpc_error outcome = {0};
    memset(maps, 0xff, sizeof maps);   /* for every worker, to devices that nobody has */
    size_t size = tpr_wire_put_mapped(bytes, sizeof bytes, &outcome, maps, 3);
    start_with(bytes, size, 1, TPRPC_OK, "");
    start_with(bytes, size - 1, 1, TPRPC_ERROR_PROTOCOL, "device maps in the store cannot be read");
    start_with("", 0, 1, TPRPC_ERROR_PROTOCOL, "device maps in the store cannot be read");
    start_with(NULL, 0, 1, TPRPC_ERROR_TIMEOUT, "the device maps of rank 1 did not come");
    outcome.status = TPRPC_ERROR_INVALID;
    memset(outcome.text, 'x', sizeof outcome.text - 1);
    size = tpr_wire_put_mapped(bytes, sizeof bytes, &outcome, maps, 0);
    start_with(bytes, size, 1, TPRPC_ERROR_INVALID, "ann cannot join: xxxxx");
    start_with(bytes, size, 2, TPRPC_OK, NULL);   /* ranks that are not in the group, whatever comes of that */
    start_with(bytes, size, 0, TPRPC_OK, NULL);
    start_with(bytes, size, UINT32_MAX, TPRPC_OK, NULL);
}

/* ---- a lock of the members whose holder does not come on ---- */

static int64_t stopped_clock;
static int64_t clock_of(void *user) {
    (void)user;
    return LOAD(&stopped_clock);
}

static void joined(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply; (void)error;
    CHECK_EQ_INT(status, TPRPC_OK);
    STORE((int *)user, 1);
}

/* Who holds the lock in a process of this host that has ended is taken over with no time passing; others have theirs. */
static void join_after(pid_t holder, bool same_host, bool at_once) {
    tprpc_context_desc context = {0};
    tprpc_store_desc store = {0};
    tprpc_agent_desc desc = {0};
    tprpc_context *ctx = NULL;
    tprpc_agent *agent = NULL;
    tpr_wire_members members;
    uint8_t value[400];
    int done = 0;
    STORE(&stopped_clock, 1000000);
    context.clock_us = clock_of;
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    store.url = "local://";
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &store, &desc.store, NULL), TPRPC_OK);
    memset(&members, 0, sizeof members);
    members.generation = members.holder = 77;
    members.space = ctx->process_space + !same_host;
    members.process = (uint32_t)holder;
    snprintf(members.name, sizeof members.name, "gone");
    put_key(desc.store, "tprpc/members", value, tpr_wire_put_members(value, sizeof value, &members));
    desc.context = ctx;
    desc.name = "ann";
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_agent_start(agent, joined, &done, NULL), TPRPC_OK);
    for (int i = 0; i < 1000 && !LOAD(&done); i++) tprpc_poll(ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(LOAD(&done), at_once);
    for (int i = 0; i < 1000 && !LOAD(&done); i++) {
        ADD(&stopped_clock, 10000);
        tprpc_poll(ctx, TPRPC_NOW, 0);
    }
    CHECK_EQ_INT(LOAD(&done), 1);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    tprpc_store_close(desc.store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void ends_at_once(void *arg) { (void)arg; }

TEST(a_lock_whose_holder_is_gone) {
    const pid_t dead = test_fork_run(ends_at_once, NULL);
    CHECK_EQ_INT(test_wait_child(dead, 10), 0);
    join_after(dead, true, true);
    join_after(dead, false, false);
    join_after(getppid(), true, false);
}
