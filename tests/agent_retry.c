/* Connecting again, with pauses that double; and calls that may be sent again, whose message is kept until the outcome and
   released once. Workers die and come back, as agents of this process and as processes that are killed. */
#include "toys.h"
#include "agent_two.h"
#include "agent_hold.h"

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { BIG = 300000 };
static uint8_t big[BIG];
static int lives;                      /* of bob's; written while none is served */

static void lapse(int turns) { while (turns-- > 0) turn(); }

/* Whether a tensor of the host or of a toy device holds what fill() wrote, in its stream's order. */
static bool holds(const tprpc_tensor *tensor, unsigned seed) {
    if (tensor->device.kind != TPRPC_DEVICE_USER) return filled(tensor->data, tensor->size, seed);
    uint8_t *bytes = (uint8_t *)malloc(tensor->size);
    REQUIRE(bytes != NULL);
    toy_gpu_get(toy_queue_of(tensor->device, tensor->stream), bytes, tensor->data, tensor->size);
    const bool good = filled(bytes, tensor->size, seed);
    free(bytes);
    return good;
}

/* Keeps what comes in bob's first life, answers with it in the next. */
static void on_lossy(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    if (message->tensor_count) CHECK(holds(&message->tensors[0], 3));
    else CHECK_EQ_INT(message->metadata_size, 5);
    if (lives == 1 && message->tensor_count && message->tensors[0].device.kind == TPRPC_CPU)   /* it is his to write to */
        memset(message->tensors[0].data, 'x', message->tensors[0].size);
    if (lives == 1) CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    else CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
    ADD(&shared->seen, 1);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0}, {"hold", on_hold, NULL, NULL, NULL, 0},
    {"lossy", on_lossy, NULL, NULL, NULL, 0}, {0},
};

/* ---- bob's deaths, and ann's clock ---- */

static int64_t clock_at;
static bool by_hand, is_static, has_toys;
static uint32_t bob_serves;            /* limits.peer_calls of his; 0: the default */
static uint64_t ann_keeps;             /* limits.inflight_bytes of hers */

static int64_t clock_of(void *user) {
    (void)user;
    return LOAD(&clock_at);
}

static void make(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    if (!is_static) agent->world_size = 0;
    if (by_hand && s->rank == 0) context->clock_us = clock_of;
    if (s->rank == 1) context->limits.peer_calls = bob_serves;
    else context->limits.inflight_bytes = ann_keeps;
    if (!has_toys) return;
    context->backends = toy_backends;
    context->backend_count = 3;
}

static void open_two(const kind *with) {
    STORE(&clock_at, 1000000000);
    kept_count = 0;
    lives = 1;
    two_tune = make;
    two_join(with, methods);
}

static void bob_dies(void) { side_close(&two[1]); }

/* Until ann knows that the pipe to him has ended. */
static void until_lost(void) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    tprpc_pipe_info info;
    while (tprpc_agent_get_peer_info(two[0].agent, "bob", &info, sizeof info) == TPRPC_OK && test_now_us() < end) turn();
    CHECK_EQ_INT(tprpc_agent_get_peer_info(two[0].agent, "bob", &info, sizeof info), TPRPC_ERROR_UNREACHABLE);
}

static void bob_returns(void) {
    const int ready = LOAD(&shared->ready);
    bury_name(two_group.store, "bob");
    lives++;
    side_open(&two[1]);
    CHECK_EQ_INT(tprpc_agent_start(two[1].agent, count_ready, &shared->ready, NULL), TPRPC_OK);
    REQUIRE(both_until(&shared->ready, ready + 1));
}

static void until_retried(uint64_t times) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (stats_of(&two[0]).calls_retried < times && test_now_us() < end) turn();
    CHECK(stats_of(&two[0]).calls_retried >= times);
}

/* ---- pauses between attempts to connect ---- */

static int connects;
static int count_connects(const char *what, int64_t *size) {
    (void)size;
    if (strcmp(what, "connect") == 0) ADD(&connects, 1);
    return 0;
}

/* The longest pause after n failures in a row. */
static int64_t pause_after(int n) { return n < 1 ? 0 : INT64_C(10000) << (n < 8 ? n - 1 : 7); }

/* In a static group a worker's address is known, so an attempt begins within the call or the turn that it is due in. */
IN_KINDS(pauses_double, POLLED) {
    by_hand = is_static = true;
    tprpc_test_hook = count_connects;
    open_two(with);
    outcome first = {0};
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &first), TPRPC_OK);
    REQUIRE(both_until(&first.count, 1));
    CHECK_EQ_INT(first.status, TPRPC_OK);
    bob_dies();
    until_lost();
    for (int n = 0; n < 11; n++) {
        const int64_t most = pause_after(n);
        outcome o[2] = {{0}};
        STORE(&connects, 0);
        tprpc_status status = call(&two[0], "bob", "echo", NULL, NULL, &o[0]);
        if (n == 0) {                  /* at once */
            CHECK(LOAD(&connects) > 0);
            if (status == TPRPC_OK) CHECK(both_until(&o[0].count, 1));
            continue;
        }
        CHECK_EQ_INT(status, TPRPC_OK);
        ADD(&clock_at, most / 2 - 1);
        lapse(5);
        CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o[1]), TPRPC_OK);   /* waits with the first */
        lapse(5);
        CHECK_EQ_INT(LOAD(&connects), 0);
        CHECK_EQ_INT(LOAD(&o[0].count) + LOAD(&o[1].count), 0);
        ADD(&clock_at, most / 2 + 2000);
        for (int i = 0; i < 2; i++) {
            REQUIRE(both_until(&o[i].count, 1));
            CHECK(o[i].status == TPRPC_ERROR_UNREACHABLE || o[i].status == TPRPC_ERROR_PEER);
            CHECK_CONTAINS(o[i].text, "calling echo on bob");
        }
        CHECK(LOAD(&connects) > 0);
    }
    two_close();
}

/* A pipe that opens ends the pauses: after its loss the first attempt is made at once. */
IN_KINDS(pauses_end, POLLED) {
    by_hand = true;
    open_two(with);
    for (int round = 0; round < 2; round++) {
        outcome good = {0};
        CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &good), TPRPC_OK);
        if (round) ADD(&clock_at, 2000000);
        REQUIRE(both_until(&good.count, 1));
        CHECK_EQ_INT(good.status, TPRPC_OK);
        bob_dies();
        until_lost();
        for (int n = 0; n < 8; n++) {
            outcome o = {0};
            CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
            if (n) ADD(&clock_at, pause_after(n) + 2000);
            REQUIRE(both_until(&o.count, 1));
            CHECK(o.status == TPRPC_ERROR_UNREACHABLE || o.status == TPRPC_ERROR_PEER);
        }
        bob_returns();
    }
    two_close();
}

/* He dies, and is called in vain until the pauses are the longest. */
static void die_and_miss(void) {
    bob_dies();
    for (int n = 0; n < 9; n++) {
        outcome lost = {0};
        CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &lost), TPRPC_OK);
        ADD(&clock_at, 2000000);
        REQUIRE(both_until(&lost.count, 1));
        CHECK(lost.status == TPRPC_ERROR_UNREACHABLE || lost.status == TPRPC_ERROR_PEER);
    }
}

/* What is begun within a pause goes to the worker when he is back, once; and what times out says that he is not reached. */
IN_KINDS(queued_within_a_pause, POLLED) {
    tprpc_call_options options = {0};
    outcome o[3] = {{0}};
    by_hand = true;
    open_two(with);
    die_and_miss();
    for (int i = 0; i < 2; i++) CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o[i]), TPRPC_OK);
    options.timeout_ms = 100;
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, &options, &o[2]), TPRPC_OK);
    ADD(&clock_at, 110000);
    REQUIRE(both_until(&o[2].count, 1));
    CHECK_EQ_INT(o[2].status, TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(o[2].text, "calling echo on bob: no answer within 100 ms; it is not reached: ");
    bob_returns();
    CHECK_EQ_INT(LOAD(&o[0].count), 0);
    ADD(&clock_at, 2000000);
    for (int i = 0; i < 2; i++) {
        REQUIRE(both_until(&o[i].count, 1));
        CHECK_EQ_INT(o[i].status, TPRPC_OK);
    }
    CHECK_EQ_INT(stats_of(&two[0]).calls_retried, 0);
    two_close();
}

/* Who takes a dead worker's place is called at once, though the pause for the dead one is not over. */
IN_KINDS(replaced_within_a_pause, POLLED) {
    outcome o = {0};
    by_hand = true;
    open_two(with);
    die_and_miss();
    bob_returns();
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    two_close();
}

/* Where connecting fails within the call, as over shm, one that may be sent again is not refused; others are. */
IN_KINDS(refused_connections, EVERY) {
    tprpc_call_options options = {0}, plain_options = {0};
    tprpc_message message = text_of("lent");
    outcome o = {0}, plain = {0};
    is_static = true;
    open_two(with);
    bob_dies();
    message.release = count_release;
    options.flags = TPRPC_CALL_IDEMPOTENT;
    options.timeout_ms = 150;
    CHECK_EQ_INT(call(&two[0], "bob", "echo", &message, &options, &o), TPRPC_OK);
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_TIMEOUT);
    CHECK(both_until(&shared->released, 1));
    tprpc_status status = call(&two[0], "bob", "echo", &message, &plain_options, &plain);
    if (status == TPRPC_OK) {
        REQUIRE(both_until(&plain.count, 1));
        status = plain.status;
    }
    CHECK(status == TPRPC_ERROR_UNREACHABLE || status == TPRPC_ERROR_PEER);
    CHECK(both_until(&shared->released, 2));
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), 2);
}

/* ---- sent again ---- */

enum { SMALL, COPIED, LENT, GIVEN, WAYS };

/* Calls lossy, idempotent, in one of the ways; what was copied is overwritten at once. */
static void call_lossy(int way, uint32_t flags, tprpc_call_options *options, outcome *o) {
    static char body[] = "small";
    static uint8_t bytes[BIG] __attribute__((aligned(64)));
    tprpc_tensor tensor = bytes_of(bytes, BIG);
    tprpc_message message = tensors_of(&tensor, way == SMALL ? 0 : 1);
    if (way != SMALL) fill(bytes, BIG, 3);
    if (way == SMALL) {
        message.metadata = body;
        message.metadata_size = 5;
    }
    if (way >= LENT) message.release = count_release;
    if (way == GIVEN) message.flags = TPRPC_MESSAGE_GIVE;
    options->flags = flags;
    CHECK_EQ_INT(call(&two[0], "bob", "lossy", &message, options, o), TPRPC_OK);
    if (way == COPIED) memset(bytes, 'x', sizeof bytes);
}

static void lose_once(const kind *with, int way) {
    tprpc_call_options options = {0}, plain_options = {0};
    outcome o = {0}, plain = {0};
    open_two(with);
    call_lossy(way, TPRPC_CALL_IDEMPOTENT, &options, &o);
    call_lossy(SMALL, 0, &plain_options, &plain);
    REQUIRE(both_until(&shared->seen, 2));
    lapse(10);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    bob_dies();
    REQUIRE(both_until(&plain.count, 1));   /* it may not be sent again: it ends at once */
    CHECK_EQ_INT(plain.status, TPRPC_ERROR_PEER);
    lapse(10);
    CHECK_EQ_INT(LOAD(&o.count), 0);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    bob_returns();
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    if (way >= LENT) CHECK(both_until(&shared->released, 1));
    lapse(20);
    CHECK_EQ_INT(LOAD(&o.count), 1);
    CHECK_EQ_INT(LOAD(&plain.count), 1);
    CHECK_EQ_INT(LOAD(&shared->released), way >= LENT);
    CHECK_EQ_INT(LOAD(&shared->handled), 3);
    const tprpc_stats stats = stats_of(&two[0]);
    CHECK_EQ_INT(stats.calls, 2);
    CHECK_EQ_INT(stats.calls_failed, 1);
    CHECK(stats.calls_retried >= 1);
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), way >= LENT);
}
IN_KINDS(sent_again_small, EVERY) { lose_once(with, SMALL); }
IN_KINDS(sent_again_copied, EVERY) { lose_once(with, COPIED); }
IN_KINDS(sent_again_lent, EVERY) { lose_once(with, LENT); }
IN_KINDS(sent_again_given, EVERY) { lose_once(with, GIVEN); }

/* What is copied on a device is copied once, too, before the caller's work that follows in its queue. */
TEST(sent_again_from_a_device) {
    static const kind with = {"toys", NULL, NULL, 0};
    tprpc_call_options options = {0};
    outcome o = {0};
    has_toys = true;
    toys_begin(2000);
    open_two(&with);
    toy_queue *queue = toy_gpu.queues[0];
    tprpc_tensor tensor = bytes_of(toy_gpu_alloc(0, BIG), BIG);
    tprpc_message message = tensors_of(&tensor, 1);
    tensor.device = toy_device(0);
    fill(big, BIG, 3);
    toy_gpu_put(queue, tensor.data, big, BIG);
    options.flags = TPRPC_CALL_IDEMPOTENT;
    CHECK_EQ_INT(call(&two[0], "bob", "lossy", &message, &options, &o), TPRPC_OK);
    memset(big, 'x', sizeof big);
    toy_gpu_put(queue, tensor.data, big, BIG);
    REQUIRE(both_until(&shared->seen, 1));
    bob_dies();
    bob_returns();
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->handled), 2);
    two_close();
    toy_gpu_free(tensor.data);
    toys_end();
}

/* What is kept is counted, and refused where it would be too much; what is lent is not. */
IN_KINDS(kept_within_a_limit, EVERY) {
    tprpc_tensor tensor = bytes_of(big, BIG);
    tprpc_message message = tensors_of(&tensor, 1);
    outcome o[4] = {{0}};
    tprpc_error error = {0};
    ann_keeps = 2 * BIG + BIG / 2;
    open_two(with);
    for (int round = 0; round < 2; round++) {
        STORE(&shared->seen, 0);
        STORE(&shared->released, 0);
        kept_count = 0;
        memset(o, 0, sizeof o);
        for (int i = 0; i < 4; i++) {
            tprpc_call_options options = {0};
            options.flags = TPRPC_CALL_IDEMPOTENT;
            options.error = &error;
            message.release = i == 3 ? count_release : NULL;
            CHECK_EQ_INT(call(&two[0], "bob", "hold", &message, &options, &o[i]),
                         i == 2 ? TPRPC_ERROR_LIMIT : TPRPC_OK);
        }
        CHECK_CONTAINS(error.text, "calling hold on bob: ");
        CHECK_CONTAINS(error.text, "limits.inflight_bytes");
        REQUIRE(both_until(&shared->seen, 3));
        for (int i = 0; i < 3; i++) CHECK_EQ_INT(tprpc_reply(kept[i], NULL), TPRPC_OK);
        for (int i = 0; i < 4; i++) if (i != 2) REQUIRE(both_until(&o[i].count, 1));
        CHECK(both_until(&shared->released, 1));
        CHECK_EQ_INT(LOAD(&o[2].count), 0);
    }
    two_close();
}

/* It is sent once where nothing is lost, and what was lent stays so until the outcome. */
IN_KINDS(sent_once, EVERY) {
    open_two(with);
    for (int way = 0; way < WAYS; way++) {
        tprpc_call_options options = {0};
        tprpc_message message = text_of("held");
        outcome o = {0};
        STORE(&shared->released, 0);
        STORE(&shared->seen, 0);
        kept_count = 0;
        if (way >= LENT) message.release = count_release;
        options.flags = TPRPC_CALL_IDEMPOTENT;
        CHECK_EQ_INT(call(&two[0], "bob", "hold", &message, &options, &o), TPRPC_OK);
        REQUIRE(both_until(&shared->seen, 1));
        lapse(20);
        CHECK_EQ_INT(LOAD(&shared->released), 0);
        CHECK_EQ_INT(tprpc_reply(kept[0], NULL), TPRPC_OK);
        REQUIRE(both_until(&o.count, 1));
        CHECK_EQ_INT(o.status, TPRPC_OK);
        if (way >= LENT) CHECK(both_until(&shared->released, 1));
    }
    CHECK_EQ_INT(stats_of(&two[0]).calls_retried, 0);
    CHECK_EQ_INT(stats_of(&two[1]).requests, WAYS);
    two_close();
}

/* One that goes to a dead worker from the start waits for him; so it does while the store has no such name. */
IN_KINDS(waits_for_the_dead, EVERY) {
    tprpc_call_options options = {0}, others = {0};
    outcome o = {0}, nobody = {0};
    open_two(with);
    bob_dies();
    lives = 2;
    call_lossy(LENT, TPRPC_CALL_IDEMPOTENT, &options, &o);
    until_retried(2);
    bury_name(two_group.store, "bob");
    until_retried(5);
    CHECK_EQ_INT(LOAD(&o.count), 0);
    others.flags = TPRPC_CALL_IDEMPOTENT;
    CHECK_EQ_INT(call(&two[0], "no one", "echo", NULL, &others, &nobody), TPRPC_OK);   /* never was there */
    CHECK(both_until(&nobody.count, 1));
    CHECK_EQ_INT(nobody.status, TPRPC_ERROR_NO_WORKER);
    bob_returns();
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK(both_until(&shared->released, 1));
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), 1);
}

/* ---- without memory ---- */

static int fail_in = -1;               /* the allocation of ann's that fails, counted from now; below 0: none */

static void *thin_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    if (LOAD(&fail_in) >= 0 && ADD(&fail_in, -1) < 0) return NULL;
    return heap_alloc(size, align, tag, user);
}

static void make_thin(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    make(s, context, agent);
    if (s->rank == 0) context->allocator.alloc = thin_alloc;
}

/* Whichever allocation fails, of a call that is sent, lost and sent again: it ends once, and what was lent comes back
   once. */
IN_KINDS(no_memory, POLLED) {
    static uint8_t bytes[4 * BIG];
    int bad = 0;
    lives = 2;
    two_tune = make_thin;
    two_join(with, methods);
    fill(bytes, sizeof bytes, 3);
    for (int n = 0; n < 24; n++) {
        for (int way = COPIED; way <= LENT; way++) {
            tprpc_call_options options = {0};
            tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
            tprpc_message message = tensors_of(&tensor, 1);
            outcome o = {0};
            STORE(&shared->released, 0);
            options.flags = TPRPC_CALL_IDEMPOTENT;
            message.release = way == LENT ? count_release : NULL;
            if (n % 4 == 3) bob_dies();
            STORE(&fail_in, n / 2);
            tprpc_status status = call(&two[0], "bob", "lossy", &message, &options, &o);
            if (n % 4 == 3) {
                for (int i = 0; i < 50; i++) tprpc_poll(two[0].ctx, TPRPC_NOW, 0);
                bob_returns();
            }
            if (status == TPRPC_OK) REQUIRE(both_until(&o.count, 1));   /* of what, depends on who had no memory */
            bad += status != TPRPC_OK || o.status != TPRPC_OK;
            STORE(&fail_in, -1);
            if (way == LENT) CHECK(both_until(&shared->released, 1));
            lapse(3);
            CHECK_EQ_INT(LOAD(&shared->released), way == LENT);
            CHECK_EQ_INT(LOAD(&o.count), status == TPRPC_OK);
        }
    }
    CHECK(bad > 0);
    bob_dies();
    bob_returns();
    tprpc_call_options options = {0};
    outcome o = {0};
    call_lossy(COPIED, TPRPC_CALL_IDEMPOTENT, &options, &o);
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    two_close();
}

/* ---- ends within a pause ---- */

/* Another call makes several attempts, so what was set to a time has come by then. */
static void pass_the_pauses(void) {
    tprpc_call_options options = {0};
    tprpc_future future;
    options.flags = TPRPC_CALL_IDEMPOTENT;
    const uint64_t before = stats_of(&two[0]).calls_retried;
    REQUIRE_EQ_INT(tprpc_call(two[0].agent, "bob", "lossy", NULL, &options, &future), TPRPC_OK);
    until_retried(before + 5);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    tprpc_future_release(future);
}

static void end_in_pause(const kind *with, int way, const char *how) {
    tprpc_call_options options = {0};
    outcome o = {0};
    tprpc_future future;
    static char body[] = "small";
    static uint8_t bytes[BIG];
    tprpc_tensor tensor = bytes_of(bytes, BIG);
    tprpc_message message = tensors_of(&tensor, way == SMALL ? 0 : 1);
    open_two(with);
    bob_dies();
    message.metadata = body;
    message.metadata_size = 5;
    if (way >= LENT) message.release = count_release;
    options.flags = TPRPC_CALL_IDEMPOTENT;
    options.on_done = on_outcome;
    options.user = &o;
    if (strcmp(how, "time") == 0) options.timeout_ms = 150;
    REQUIRE_EQ_INT(tprpc_call(two[0].agent, "bob", "lossy", &message, &options, &future), TPRPC_OK);
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (stats_of(&two[0]).calls_retried < 2 && !LOAD(&o.count) && test_now_us() < end) turn();
    if (way != COPIED) until_lost();   /* it has no pipe now; else it waits on one that has a pause */
    if (strcmp(how, "cancel") == 0) {
        CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
        CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_ERROR_INVALID);
        pass_the_pauses();
    } else if (strcmp(how, "destroy") == 0) {
        end_agent(&two[0]);
    }
    REQUIRE(both_until(&o.count, 1));
    if (way >= LENT) CHECK(both_until(&shared->released, 1));
    if (strcmp(how, "time") == 0) {
        CHECK_EQ_INT(o.status, TPRPC_ERROR_TIMEOUT);
        CHECK_CONTAINS(o.text, "calling lossy on bob: no answer within 150 ms; attempt ");
        CHECK_CONTAINS(o.text, "the one before: ");
    } else {
        CHECK_EQ_INT(o.status, strcmp(how, "cancel") == 0 ? TPRPC_ERROR_CANCELLED : TPRPC_ERROR_CLOSED);
    }
    if (two[0].agent) {
        tprpc_future_release(future);
        lapse(20);
        CHECK_EQ_INT(stats_of(&two[0]).client_active_calls, 0);
    }
    two_close();
    CHECK_EQ_INT(LOAD(&o.count), 1);
    CHECK_EQ_INT(LOAD(&shared->released), way >= LENT);
}
IN_KINDS(timed_out_small, EVERY) { end_in_pause(with, SMALL, "time"); }
IN_KINDS(timed_out_lent, EVERY) { end_in_pause(with, LENT, "time"); }
IN_KINDS(cancelled_copied, EVERY) { end_in_pause(with, COPIED, "cancel"); }
IN_KINDS(cancelled_lent, EVERY) { end_in_pause(with, LENT, "cancel"); }
IN_KINDS(destroyed_copied, EVERY) { end_in_pause(with, COPIED, "destroy"); }
IN_KINDS(destroyed_lent, EVERY) { end_in_pause(with, LENT, "destroy"); }

/* ---- refused, then served ---- */

static void until_refused(unsigned times) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (stats_of(&two[1]).requests_failed < times && test_now_us() < end) turn();
}

IN_KINDS(refused_twice, EVERY) {
    tprpc_call_options options = {0};
    outcome held = {0}, o = {0}, plain = {0};
    tprpc_message message = text_of("lent");
    bob_serves = 1;
    open_two(with);
    CHECK_EQ_INT(call(&two[0], "bob", "hold", NULL, NULL, &held), TPRPC_OK);
    REQUIRE(both_until(&shared->seen, 1));
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &plain), TPRPC_OK);
    REQUIRE(both_until(&plain.count, 1));
    CHECK_EQ_INT(plain.status, TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(plain.text, "calling echo on bob: bob serves 1 requests of ann, as many as it may "
                               "(limits.peer_calls)");
    message.release = count_release;
    options.flags = TPRPC_CALL_IDEMPOTENT;
    CHECK_EQ_INT(call(&two[0], "bob", "echo", &message, &options, &o), TPRPC_OK);
    until_refused(3);
    CHECK_EQ_INT(LOAD(&o.count), 0);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    CHECK_EQ_INT(LOAD(&shared->handled), 0);
    CHECK_EQ_INT(tprpc_reply(kept[0], NULL), TPRPC_OK);
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK(both_until(&shared->released, 1));
    CHECK_EQ_INT(LOAD(&shared->handled), 1);
    CHECK(stats_of(&two[0]).calls_retried >= 2);
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), 1);
    CHECK_EQ_INT(held.status, TPRPC_OK);
}

/* What will not pass is not sent again: an unknown method, a failure of the handler's, a worker who left, one's own limit. */
static void on_fails(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    ADD(&shared->handled, 1);
    tprpc_fail(request, 5, "no");
}

IN_KINDS(not_sent_again, EVERY) {
    static const tprpc_method_desc failing[] = {{"fails", on_fails, NULL, NULL, NULL, 0}, {0}};
    static const char *const names[][2] = {{"bob", "fails"}, {"bob", "nothing"}, {"no one", "fails"}};
    static const tprpc_status expected[] = {TPRPC_ERROR_REMOTE, TPRPC_ERROR_NO_METHOD, TPRPC_ERROR_NO_WORKER};
    two_tune = make;
    two_join(with, failing);
    for (int i = 0; i < 3; i++) {
        tprpc_call_options options = {0};
        tprpc_message message = text_of("lent");
        outcome o = {0};
        STORE(&shared->released, 0);
        message.release = count_release;
        options.flags = TPRPC_CALL_IDEMPOTENT;
        CHECK_EQ_INT(call(&two[0], names[i][0], names[i][1], &message, &options, &o), TPRPC_OK);
        REQUIRE(both_until(&o.count, 1));
        CHECK_EQ_INT(o.status, expected[i]);
        CHECK(both_until(&shared->released, 1));
    }
    CHECK_EQ_INT(LOAD(&shared->handled), 1);
    CHECK_EQ_INT(stats_of(&two[0]).calls_retried, 0);
    two_close();
}

/* A one-way call to a dead worker is sent again until it has left. */
IN_KINDS(one_way_until_it_left, EVERY) {
    tprpc_call_options options = {0};
    outcome o = {0};
    open_two(with);
    bob_dies();
    call_lossy(LENT, TPRPC_CALL_IDEMPOTENT | TPRPC_CALL_ONE_WAY, &options, &o);
    until_retried(2);
    CHECK_EQ_INT(LOAD(&o.count), 0);
    bob_returns();
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK(both_until(&shared->seen, 1));
    CHECK(both_until(&shared->released, 1));
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), 1);
}

/* ---- a reply in place is lost half-way, and placed again ---- */

static uint8_t landing[4 << 20];

static tprpc_status place_landing(tprpc_placement *placement, void *user) {
    (void)user;
    placement->tensors[0].data = landing;
    ADD(&shared->placed, 1);
    return TPRPC_OK;
}

static void unplace_landing(const tprpc_placement *placement, void *user) {
    (void)user;
    CHECK(placement->tensors[0].data == landing);
    ADD(&shared->unplaced, 1);
}

static void on_give(tprpc_request request, const tprpc_message *message, void *user) {
    static uint8_t bytes[sizeof landing];
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_message reply = tensors_of(&tensor, 1);
    (void)message; (void)user;
    fill(bytes, sizeof bytes, 9);
    ADD(&shared->handled, 1);
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static const tprpc_method_desc giving[] = {{"give", on_give, NULL, NULL, NULL, 0}, {0}};

IN_KINDS(reply_lost_half_way, POLLED) {
    tprpc_call_options options = {0};
    outcome o = {0};
    lives = 1;
    two_tune = make;
    two_join(with, giving);
    options.flags = TPRPC_CALL_IDEMPOTENT;
    options.place = place_landing;
    options.on_unplaced = unplace_landing;
    CHECK_EQ_INT(call(&two[0], "bob", "give", NULL, &options, &o), TPRPC_OK);
    while (!LOAD(&shared->placed)) turn();
    bob_dies();
    bob_returns();
    REQUIRE(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK(filled(landing, sizeof landing, 9));
    CHECK(both_until(&shared->unplaced, LOAD(&shared->placed) - 1));
    CHECK_EQ_INT(LOAD(&shared->unplaced), LOAD(&shared->placed) - 1);
    two_close();
}

/* ---- processes that are killed and replaced ---- */

static void on_die(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    if (ADD(&shared->handled, 1) == 1) kill(getpid(), SIGKILL);
    CHECK(filled(message->tensors[0].data, message->tensors[0].size, 3));
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static const tprpc_method_desc deadly[] = {
    {"die", on_die, NULL, NULL, NULL, 0}, {"hold", on_hold, NULL, NULL, NULL, 0}, {0},
};

static void make_dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)context;
    agent->world_size = 0;
}

/* Bob, of whom the second joins when he is told to. */
static void be_bob(void *arg) {
    side *s = (side *)arg;
    if (s->user) for (int64_t end = test_now_us() + 20000000; !LOAD(&shared->go) && test_now_us() < end;) test_sleep_us(500);
    side_open(s);
    side_join(s);
    ADD(&shared->ready, 1);
    serve_until_stop(s);
    side_close(s);
}

IN_MODES(killed_and_replaced, 0x83) {
    static char second[] = "second";
    side sides[2] = {{0}};
    tprpc_store_desc store_desc = {0};
    tprpc_store *store = NULL;
    tprpc_call_options options = {0};
    tprpc_tensor tensor = bytes_of(big, BIG);
    tprpc_message message = tensors_of(&tensor, 1);
    outcome o = {0}, plain = {0};
    group g;
    fill(big, BIG, 3);
    share();
    sides[0].mode = with;
    for (int i = 0; i < 2; i++) sides[i].tune = make_dynamic;
    sides[1].methods = deadly;
    group_open(&g, sides, 2);
    const pid_t first = test_fork_run(be_bob, &sides[1]);
    sides[1].user = second;
    const pid_t next = test_fork_run(be_bob, &sides[1]);
    side *ann = &sides[0];
    side_open(ann);
    side_join(ann);
    store_desc.url = g.url;
    REQUIRE_EQ_INT(tprpc_store_open(ann->ctx, &store_desc, &store, NULL), TPRPC_OK);
    CHECK(until(ann, &shared->ready, 1));
    CHECK_EQ_INT(call(ann, "bob", "hold", NULL, NULL, &plain), TPRPC_OK);
    CHECK(until(ann, &shared->seen, 1));
    message.release = count_release;
    options.flags = TPRPC_CALL_IDEMPOTENT;
    CHECK_EQ_INT(call(ann, "bob", "die", &message, &options, &o), TPRPC_OK);
    CHECK(until(ann, &plain.count, 1));
    CHECK_EQ_INT(plain.status, TPRPC_ERROR_PEER);
    CHECK(test_wait_child(first, 20) != 0);
    CHECK_EQ_INT(LOAD(&o.count), 0);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    bury_name(store, "bob");
    STORE(&shared->go, 1);
    CHECK(until(ann, &o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK(until_released(ann, 1));
    CHECK_EQ_INT(LOAD(&shared->handled), 2);
    CHECK_EQ_INT(LOAD(&shared->seen), 1);   /* what may run once ran once */
    CHECK(stats_of(ann).calls_retried >= 1);
    STORE(&shared->stop, 1);
    CHECK_EQ_INT(test_wait_child(next, 20), 0);
    tprpc_store_close(store);
    side_close(ann);
    CHECK_EQ_INT(LOAD(&o.count), 1);
    CHECK_EQ_INT(LOAD(&shared->released), 1);
    group_close(&g);
}
