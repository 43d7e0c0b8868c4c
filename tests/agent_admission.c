/* What a caller may make a worker hold: requests by number, the bytes that came with them, and tensors, which wait at the
   caller until there is room. And handlers that wait, nested. */
#include "agent_two.h"

enum { MIB = 1 << 20, MOST = 32 };

/* Requests that are kept until the test answers them, in the order in which they came to the handler. */
static tprpc_request held[MOST];
static int numbers[MOST];

static void on_hold(tprpc_request request, const tprpc_message *message, void *user) {
    int at = LOAD(&shared->seen);
    (void)user;
    REQUIRE(at < MOST);
    held[at] = request;
    REQUIRE(message->metadata_size >= sizeof numbers[0]);
    memcpy(&numbers[at], message->metadata, sizeof numbers[0]);
    if (message->tensor_count) CHECK(filled(message->tensors[0].data, message->tensors[0].size, (unsigned)numbers[at]));
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->seen, 1);
}

static uint8_t *landings[MOST];

static tprpc_status place_apart(tprpc_placement *placement, void *user) {
    int at = LOAD(&shared->placed);
    (void)user;
    if (at >= MOST) return TPRPC_ERROR_LIMIT;
    placement->tensors[0].data = landings[at] = (uint8_t *)malloc(placement->tensors[0].size);
    ADD(&shared->placed, 1);
    return TPRPC_OK;
}

static const tprpc_method_desc methods[] = {
    {"hold", on_hold, NULL, NULL, NULL, 0}, {"placed", on_hold, place_apart, NULL, NULL, 0},
    {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

static uint64_t peer_bytes, served_bytes;

static void limit(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s->rank != 1) return;
    context->limits.peer_bytes = peer_bytes;
    context->limits.served_bytes = served_bytes;
}

static void open_two(const kind *with, uint64_t peer, uint64_t served) {
    peer_bytes = peer;
    served_bytes = served;
    two_tune = limit;
    two_join(with, methods);
}

static void lapse(int turns) { while (turns-- > 0) turn(); }

typedef struct one { outcome o; tprpc_future future; uint8_t *bytes; size_t size; } one;

/* Calls bob with a number and a tensor of so many bytes, lent; 0: without. */
static void give(side *from, one *c, const char *method, int number, size_t size) {
    tprpc_call_options options = {0};
    memset(c, 0, sizeof *c);
    c->size = size;
    c->bytes = (uint8_t *)malloc(size ? size : 1);
    fill(c->bytes, size, (unsigned)number);
    tprpc_tensor tensor = bytes_of(c->bytes, size);
    tprpc_message message = tensors_of(&tensor, size ? 1 : 0);
    message.metadata = &number;
    message.metadata_size = sizeof number;
    message.release = count_release;
    options.on_done = on_outcome;
    options.user = &c->o;
    CHECK_EQ_INT(tprpc_call(from->agent, "bob", method, &message, &options, &c->future), TPRPC_OK);
}

static void done_with(one *c) {
    tprpc_future_release(c->future);
    free(c->bytes);
}

static void let_go(int at) { CHECK_EQ_INT(tprpc_reply(held[at], NULL), TPRPC_OK); }

static void until_requests(uint64_t count) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (stats_of(&two[1]).requests < count && test_now_us() < end) turn();
    CHECK_EQ_INT(stats_of(&two[1]).requests, count);
}

static void until_active(uint64_t count) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (stats_of(&two[1]).server_active_calls > count && test_now_us() < end) turn();
    CHECK_EQ_INT(stats_of(&two[1]).server_active_calls, count);
}

/* Two of a MiB come in, the others wait, unread and without memory; they come in order as the ones before are answered. */
IN_KINDS(tensors_wait, EVERY) {
    one calls[10];
    open_two(with, 2 * MIB + MIB / 2, 0);
    for (int i = 0; i < 10; i++) give(&two[0], &calls[i], "hold", i, MIB);
    until_requests(10);
    REQUIRE(both_until(&shared->seen, 2));
    const tprpc_stats before = stats_of(&two[1]);
    for (int i = 0; i < 10; i++) {
        lapse(30);
        CHECK_EQ_INT(LOAD(&shared->seen), i + 2 < 10 ? i + 2 : 10);
        CHECK_EQ_INT(stats_of(&two[1]).server_active_calls, 10 - i);
        if (i < 5 && !with->threads) CHECK(stats_of(&two[1]).memory_bytes <= before.memory_bytes + MIB / 2);
        let_go(i);
        REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(calls[i].o.status, TPRPC_OK);
        if (i + 3 <= 10) REQUIRE(both_until(&shared->seen, i + 3));
    }
    for (int i = 0; i < 10; i++) CHECK_EQ_INT(numbers[i], i);
    CHECK(both_until(&shared->released, 10));
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), 10);
    for (int i = 0; i < 10; i++) free(calls[i].bytes);
}

/* One that is larger than the limit comes in alone; small ones pass meanwhile, and it does not wait for those. */
IN_KINDS(larger_than_the_limit, EVERY) {
    one calls[5];
    open_two(with, MIB, 0);
    give(&two[0], &calls[0], "hold", 0, 0);
    give(&two[0], &calls[1], "hold", 1, 4 * MIB);
    REQUIRE(both_until(&shared->seen, 2));
    give(&two[0], &calls[2], "hold", 2, 3 * MIB);
    give(&two[0], &calls[3], "hold", 3, 300000);   /* behind that */
    until_requests(4);
    lapse(30);
    CHECK_EQ_INT(LOAD(&shared->seen), 2);
    let_go(1);
    REQUIRE(both_until(&shared->seen, 3));
    lapse(30);
    CHECK_EQ_INT(LOAD(&shared->seen), 3);
    CHECK_EQ_INT(numbers[2], 2);
    let_go(2);
    REQUIRE(both_until(&shared->seen, 4));
    let_go(0);
    let_go(3);
    for (int i = 0; i < 4; i++) {
        REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(calls[i].o.status, TPRPC_OK);
        done_with(&calls[i]);
    }
    two_close();
}

/* A small one that would fit waits behind a large one that does not: each caller's come in order. */
IN_KINDS(in_order, EVERY) {
    one calls[3];
    open_two(with, 3 * MIB, 0);
    give(&two[0], &calls[0], "hold", 0, MIB);
    REQUIRE(both_until(&shared->seen, 1));
    give(&two[0], &calls[1], "hold", 1, 2 * MIB + MIB / 2);
    give(&two[0], &calls[2], "hold", 2, 300000);
    until_requests(3);
    lapse(30);
    CHECK_EQ_INT(LOAD(&shared->seen), 1);
    let_go(0);
    REQUIRE(both_until(&shared->seen, 3));
    for (int i = 1; i < 3; i++) let_go(i);
    for (int i = 0; i < 3; i++) {
        REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(calls[i].o.status, TPRPC_OK);
        done_with(&calls[i]);
    }
    two_close();
}

/* Who waits goes when he is not wanted any more, and what waits behind him comes in. */
static void unwanted(const kind *with, const char *how) {
    one calls[3];
    tprpc_call_options options = {0};
    open_two(with, MIB, 0);
    give(&two[0], &calls[0], "hold", 0, MIB);
    REQUIRE(both_until(&shared->seen, 1));
    options.on_done = on_outcome;
    options.user = &calls[1].o;
    options.timeout_ms = strcmp(how, "time") == 0 ? 100 : 0;
    memset(&calls[1], 0, sizeof calls[1]);
    calls[1].bytes = (uint8_t *)malloc(2 * MIB);
    fill(calls[1].bytes, 2 * MIB, 1);
    int number = 1;
    tprpc_tensor tensor = bytes_of(calls[1].bytes, 2 * MIB);
    tprpc_message message = tensors_of(&tensor, 1);
    message.metadata = &number;
    message.metadata_size = sizeof number;
    message.release = count_release;
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "hold", &message, &options, &calls[1].future), TPRPC_OK);
    until_requests(2);
    give(&two[0], &calls[2], "hold", 2, 300000);
    until_requests(3);
    lapse(20);
    CHECK_EQ_INT(LOAD(&shared->seen), 1);
    if (strcmp(how, "cancel") == 0) CHECK_EQ_INT(tprpc_future_cancel(calls[1].future), TPRPC_OK);
    if (strcmp(how, "death") == 0) {
        end_agent(&two[0]);
        until_active(1);               /* the first is kept */
        CHECK_EQ_INT(LOAD(&shared->seen), 1);
        CHECK(tprpc_request_cancelled(held[0]));
    } else if (strcmp(how, "destroy") == 0) {
        end_agent(&two[1]);
        for (int i = 0; i < 3; i++) REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(LOAD(&shared->seen), 1);
    } else {
        REQUIRE(both_until(&calls[1].o.count, 1));
        CHECK_EQ_INT(calls[1].o.status, strcmp(how, "time") == 0 ? TPRPC_ERROR_TIMEOUT : TPRPC_ERROR_CANCELLED);
        CHECK(both_until(&shared->released, 1));
        until_active(2);
        CHECK_EQ_INT(LOAD(&shared->seen), 1);
        let_go(0);
        REQUIRE(both_until(&shared->seen, 2));
        CHECK_EQ_INT(numbers[1], 2);
        let_go(1);
        for (int i = 0; i < 3; i++) REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(stats_of(&two[1]).server_active_calls, 0);
    }
    CHECK(both_until(&shared->released, 3));
    two_close();
    CHECK_EQ_INT(LOAD(&shared->released), 3);
    for (int i = 0; i < 3; i++) free(calls[i].bytes);
}
IN_KINDS(cancelled_while_it_waits, EVERY) { unwanted(with, "cancel"); }
IN_KINDS(timed_out_while_it_waits, EVERY) { unwanted(with, "time"); }
IN_KINDS(dead_while_it_waits, EVERY) { unwanted(with, "death"); }
IN_KINDS(destroyed_while_it_waits, EVERY) { unwanted(with, "destroy"); }

/* The limit of all: bob calls himself, and is a caller of his own. Which of the two is over it the error says. */
IN_KINDS(all_callers_share, EVERY) {
    one calls[4];
    open_two(with, 3 * MIB, 4 * MIB);
    give(&two[0], &calls[0], "hold", 0, 2 * MIB);
    REQUIRE(both_until(&shared->seen, 1));
    give(&two[1], &calls[1], "hold", 1, MIB + MIB / 2);
    REQUIRE(both_until(&shared->seen, 2));
    give(&two[1], &calls[2], "hold", 2, MIB);
    until_requests(3);
    lapse(20);
    CHECK_EQ_INT(LOAD(&shared->seen), 2);
    let_go(0);                         /* another caller's */
    REQUIRE(both_until(&shared->seen, 3));
    let_go(1);
    let_go(2);
    for (int i = 0; i < 3; i++) {
        REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(calls[i].o.status, TPRPC_OK);
        done_with(&calls[i]);
    }
    two_close();
}

/* Bodies have come by when they are looked at: those that do not fit are refused, and say by what limit. */
static void bodies(const kind *with, uint64_t peer, uint64_t served, const char *name) {
    static uint8_t body[300000];
    outcome o[4] = {{0}};
    tprpc_message message = {0};
    open_two(with, peer, served);
    message.metadata = body;
    message.metadata_size = sizeof body;
    for (int i = 0; i < 4; i++) CHECK_EQ_INT(call(&two[0], "bob", "hold", &message, NULL, &o[i]), TPRPC_OK);
    REQUIRE(both_until(&o[3].count, 1));
    REQUIRE(both_until(&shared->seen, 3));
    CHECK_EQ_INT(o[3].status, TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(o[3].text, "calling hold on bob: bob holds ");
    CHECK_CONTAINS(o[3].text, name);
    for (int i = 0; i < 3; i++) let_go(i);
    for (int i = 0; i < 3; i++) {
        REQUIRE(both_until(&o[i].count, 1));
        CHECK_EQ_INT(o[i].status, TPRPC_OK);
    }
    outcome again = {0};               /* and one that is larger than the limit, alone */
    const int seen = LOAD(&shared->seen);
    static uint8_t large[MIB - 1000];
    message.metadata = large;
    message.metadata_size = sizeof large;
    CHECK_EQ_INT(call(&two[0], "bob", "hold", &message, NULL, &again), TPRPC_OK);
    REQUIRE(both_until(&shared->seen, seen + 1));
    let_go(seen);
    REQUIRE(both_until(&again.count, 1));
    CHECK_EQ_INT(again.status, TPRPC_OK);
    CHECK_EQ_INT(stats_of(&two[1]).requests_failed, 1);
    two_close();
}
IN_KINDS(bodies_of_one_caller, EVERY) { bodies(with, MIB, 0, "limits.peer_bytes"); }
IN_KINDS(bodies_of_all_callers, EVERY) { bodies(with, 0, MIB, "limits.served_bytes"); }

/* Memory of the user's is his: it does not count. */
IN_KINDS(placed_does_not_count, EVERY) {
    one calls[6];
    open_two(with, MIB, MIB);
    for (int i = 0; i < 6; i++) give(&two[0], &calls[i], "placed", i, MIB);
    REQUIRE(both_until(&shared->seen, 6));
    for (int i = 0; i < 6; i++) let_go(i);
    for (int i = 0; i < 6; i++) {
        REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(calls[i].o.status, TPRPC_OK);
        done_with(&calls[i]);
        free(landings[i]);
    }
    two_close();
}

/* Many callers' worth of calls through a narrow gate: all come through, whichever loop they are on. */
IN_KINDS(all_come_through, EVERY) {
    enum { EACH = 40 };
    static one calls[2 * EACH];
    open_two(with, 3 * MIB, 2 * MIB);
    for (int i = 0; i < 2 * EACH; i++)
        give(&two[i % 2], &calls[i], "echo", i, i % 7 == 0 ? 2 * MIB : i % 3 == 0 ? 0 : MIB / 2);
    for (int i = 0; i < 2 * EACH; i++) {
        REQUIRE(both_until(&calls[i].o.count, 1));
        CHECK_EQ_INT(calls[i].o.status, TPRPC_OK);
    }
    CHECK(both_until(&shared->released, 2 * EACH));
    for (int i = 0; i < 2 * EACH; i++) done_with(&calls[i]);
    two_close();
}

/* ---- handlers that wait for a call back, and that for one again ---- */

enum { NESTING = 4 };
static side nested[2];
static uint32_t worker_threads;

/* Calls the other one with a depth less by one, and answers once that is answered. */
static void on_down(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    int32_t depth;
    tprpc_message further = {0};
    tprpc_future future;
    REQUIRE_EQ_INT(message->metadata_size, sizeof depth);
    memcpy(&depth, message->metadata, sizeof depth);
    ADD(&shared->handled, 1);
    if (--depth < 0) {
        tprpc_reply(request, NULL);    /* at the end of a chain that was too deep all may have left */
        return;
    }
    further.metadata = &depth;
    further.metadata_size = sizeof depth;
    const char *caller = tprpc_request_caller(request);   /* NULL, and a refusal: the chain that was too deep goes on */
    if (!caller || tprpc_call(s->agent, caller, "down", &further, NULL, &future) != TPRPC_OK) {   /* while all leave */
        tprpc_fail(request, 0, "leaving");
        return;
    }
    tprpc_status status = tprpc_future_wait(future, WAIT_MS);
    tprpc_error error = {0};
    if (status == TPRPC_ERROR_LIMIT && tprpc_future_error(future, &error) == TPRPC_PENDING) {
        CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
        CHECK_CONTAINS(error.text, "calling down on");
        CHECK_CONTAINS(error.text, "4 waits within handlers are nested (limits.nesting)");
        ADD(&shared->count[0], 1);
    } else {
        tprpc_future_error(future, &error);
    }
    if (status == TPRPC_OK) tprpc_reply(request, NULL);
    else tprpc_fail(request, (int32_t)status, error.text);
    tprpc_future_release(future);
}

static void nest(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s;
    context->limits.nesting = NESTING;
    if (context->threads > 1) context->threads = 1;   /* each loop has a depth of its own */
    agent->worker_threads = (int32_t)worker_threads;
}

static tprpc_status down(side *s, int32_t depth, tprpc_error *error) {
    tprpc_message message = {0};
    message.metadata = &depth;
    message.metadata_size = sizeof depth;
    return call_and_wait(s, "bob", "down", &message, NULL, error);
}

/* Bob and ann take turns, so they wait half of the depth each; with more threads it may go deeper. */
static void go_down(side *s) {
    const int32_t most = 2 * NESTING;
    tprpc_error error = {0};
    for (int32_t depth = 0; depth < most; depth++) {
        STORE(&shared->handled, 0);
        CHECK_EQ_INT(down(s, depth, &error), TPRPC_OK);
        CHECK_EQ_INT(LOAD(&shared->handled), depth + 1);
    }
    CHECK_EQ_INT(LOAD(&shared->count[0]), 0);
    CHECK_EQ_INT(down(s, 10 * most, &error), TPRPC_ERROR_REMOTE);
    CHECK_CONTAINS(error.text, "limits.nesting");
    CHECK(LOAD(&shared->count[0]) >= 1);
}

static void nest_in(const mode *with, bool blocks, int threads) {
    tprpc_method_desc both[2] = {{"down", on_down, NULL, NULL, NULL, 0}, {0}};
    both[0].flags = blocks ? TPRPC_METHOD_BLOCKING : 0;
    worker_threads = (uint32_t)threads;
    nested[0].mode = with;
    nested[0].main = go_down;
    for (int i = 0; i < 2; i++) {
        nested[i].methods = both;
        nested[i].tune = nest;
    }
    group_run(nested, 2);
}
IN_MODES(nested, ALL_MODES) { nest_in(with, false, 0); }
IN_MODES(nested_blocking_inline, ALL_MODES) { nest_in(with, true, 0); }
IN_MODES(nested_blocking_one_thread, ALL_MODES) { nest_in(with, true, 1); }
IN_MODES(nested_blocking_three_threads, ALL_MODES) { nest_in(with, true, 3); }
