/* The inside of the agent section: the rings in which threads that do not have a loop's lock leave calls and releases for
   who has it. The test holds the lock, and another thread calls. */
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "agent_two.h"

static const tprpc_method_desc echo_methods[] = {{"echo", on_echo, NULL, NULL, NULL, 0}, {0}};

enum { MANY = 100 };                   /* more than a ring has entries */
static tprpc_future futures[MANY];
static tprpc_method_id echo_id;
static outcome outcomes[MANY];
static int left;                       /* atomic: calls that were left, by whose return they were seen */

static tpr_loop *loop_of(side *s) { return &s->ctx->loops[0]; }
static tpr_agent_loop *on_of(side *s) { return &s->agent->loops[0]; }

static void settle(int count) {
    for (int i = 0; i < count; i++) while (tprpc_future_wait(futures[i], TPRPC_NOW) == TPRPC_PENDING) turn();
}

/* So many calls are known that all entries of the ring have one. */
static void warm(const kind *with) {
    two_join(with, echo_methods);
    REQUIRE_EQ_INT(tprpc_resolve(two[0].agent, "bob", "echo", &echo_id, NULL), TPRPC_OK);
    for (int i = 0; i < MANY; i++)
        REQUIRE_EQ_INT(tprpc_call_id(two[0].agent, echo_id, NULL, NULL, &futures[i]), TPRPC_OK);
    settle(MANY);
    for (int i = 0; i < MANY; i++) tprpc_future_release(futures[i]);
    tpr_loop_enter(loop_of(&two[0]));
    tpr_agent_ring_tend(on_of(&two[0])->ring);
    CHECK_EQ_INT(on_of(&two[0])->ring->aside, TPR_AGENT_RING);
    tpr_loop_leave(loop_of(&two[0]));
    memset(futures, 0, sizeof futures);
    memset(outcomes, 0, sizeof outcomes);
    STORE(&left, 0);
}

/* Whatever there was of calls is over: only what is set aside is in use. */
static void check_rest(void) {
    tpr_loop *loop = loop_of(&two[0]);
    tpr_agent_enter(two[0].agent, loop);
    CHECK_EQ_INT(on_of(&two[0])->active, 0);
    CHECK_EQ_INT(on_of(&two[0])->calls.used, on_of(&two[0])->ring->aside);
    tpr_loop_leave(loop);
}

static void *calls_some(void *arg) {
    const int count = *(const int *)arg;
    for (int i = 0; i < count; i++) {
        char text[64];
        tprpc_message message = {0};
        tprpc_call_options options = {0};
        message.metadata = text;
        message.metadata_size = (size_t)snprintf(text, sizeof text, "body %d", i);
        options.on_done = on_outcome;
        options.user = &outcomes[i];
        CHECK_EQ_INT(tprpc_call_id(two[0].agent, echo_id, &message, &options, &futures[i]), TPRPC_OK);
        STORE(&left, i + 1);
    }
    return NULL;
}

static void check_echo(int i) {
    char text[64];
    const tprpc_message *reply = tprpc_future_reply(futures[i]);
    const int size = snprintf(text, sizeof text, "body %d", i);
    CHECK(reply && reply->metadata_size == (size_t)size && memcmp(reply->metadata, text, (size_t)size) == 0);
}

/* A call returns although another thread has the lock, who begins it when he gives that. */
IN_KINDS(a_call_is_left_to_who_has_the_lock, POLLED) {
    pthread_t thread;
    int count = 10;
    warm(with);
    tpr_loop *loop = loop_of(&two[0]);
    tpr_agent_loop *on = on_of(&two[0]);
    tpr_loop_enter(loop);
    const uint64_t started = on->started;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, calls_some, &count), 0);
    pthread_join(thread, NULL);
    CHECK_EQ_INT(on->started, started);
    for (int i = 0; i < count; i++) {
        CHECK(futures[i].owner == two[0].agent && futures[i].id);
        CHECK(tprpc_future_reply(futures[i]) == NULL);
    }
    tpr_loop_leave(loop);
    CHECK_EQ_INT(on->started, started + (uint64_t)count);
    settle(count);
    for (int i = 0; i < count; i++) check_echo(i);
    for (int i = 0; i < count; i++) tprpc_future_release(futures[i]);
    CHECK(both_until(&outcomes[count - 1].count, 1));
    for (int i = 0; i < count; i++) CHECK(outcomes[i].count == 1 && outcomes[i].status == TPRPC_OK);
    check_rest();
    two_close();
}

/* A full ring: the next call waits until there is room. */
IN_KINDS(a_full_ring_is_waited_for, POLLED) {
    pthread_t thread;
    int count = MANY;
    warm(with);
    tpr_loop *loop = loop_of(&two[0]);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, calls_some, &count), 0);
    while (LOAD(&left) < TPR_AGENT_RING) test_sleep_us(100);
    test_sleep_us(5000);
    CHECK_EQ_INT(LOAD(&left), TPR_AGENT_RING);
    tpr_loop_leave(loop);
    while (LOAD(&left) < MANY) turn();
    pthread_join(thread, NULL);
    settle(MANY);
    for (int i = 0; i < MANY; i++) check_echo(i);
    for (int i = 0; i < MANY; i++) tprpc_future_release(futures[i]);
    for (int i = 0; i < MANY; i++) CHECK(both_until(&outcomes[i].count, 1));
    check_rest();
    two_close();
}

static void *calls_and_drops(void *arg) {
    calls_some(arg);
    for (int i = 0; i < *(const int *)arg; i++) {
        if (i % 2) CHECK_EQ_INT(tprpc_future_cancel(futures[i]), TPRPC_OK);
        tprpc_future_release(futures[i]);
        CHECK_EQ_INT(tprpc_future_wait(futures[i], TPRPC_NOW), TPRPC_ERROR_INVALID);
    }
    return NULL;
}

/* What was left is begun before it is released, or cancelled, by who has not waited. */
IN_KINDS(what_was_left_is_released_and_cancelled, POLLED) {
    pthread_t thread;
    int count = 8, over = 0;
    warm(with);
    tpr_loop *loop = loop_of(&two[0]);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, calls_and_drops, &count), 0);
    while (LOAD(&left) < count) test_sleep_us(100);
    tpr_loop_leave(loop);
    pthread_join(thread, NULL);
    while (over < count) {
        turn();
        over = 0;
        for (int i = 0; i < count; i++) over += LOAD(&outcomes[i].count);
    }
    for (int i = 0; i < count; i++) CHECK_EQ_INT(outcomes[i].status, i % 2 ? TPRPC_ERROR_CANCELLED : TPRPC_OK);
    for (int i = 0; i < 10; i++) turn();
    for (int i = 0; i < count; i++) CHECK_EQ_INT(outcomes[i].count, 1);
    check_rest();
    two_close();
}

/* What would have refused a call that was left is its outcome, and the message before it is not held back. */
IN_KINDS(what_was_left_may_be_refused, POLLED) {
    pthread_t thread;
    int count = 2;
    warm(with);
    tpr_loop *loop = loop_of(&two[0]);
    tpr_agent_loop *on = on_of(&two[0]);
    const uint32_t limit = two[0].ctx->limits.pending_calls;
    tpr_loop_enter(loop);
    tprpc_pipe *pipe = tpr_agent_worker_of(two[0].agent, "bob", false)->pipe;
    REQUIRE(pipe != NULL);
    const uint64_t sent = pipe->messages_sent;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, calls_some, &count), 0);
    pthread_join(thread, NULL);
    two[0].ctx->limits.pending_calls = (uint32_t)on->active + 1;
    tpr_loop_leave(loop);
    two[0].ctx->limits.pending_calls = limit;
    CHECK_EQ_INT(pipe->messages_sent, sent + 2);       /* the first, and one behind it */
    CHECK(!pipe->more);
    settle(count);
    check_echo(0);
    CHECK(both_until(&outcomes[0].count, 1) && both_until(&outcomes[1].count, 1));
    CHECK_EQ_INT(outcomes[1].status, TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(outcomes[1].text, "calling echo on bob");
    CHECK_CONTAINS(outcomes[1].text, "pending_calls");
    for (int i = 0; i < count; i++) tprpc_future_release(futures[i]);
    check_rest();
    two_close();
}

/* ---- behind an entry that another thread has drawn, and not filled yet ---- */

static int through;                    /* atomic */

static void *releases_first(void *arg) {
    (void)arg;
    tprpc_future_release(futures[0]);
    STORE(&through, 1);
    return NULL;
}

static void *counts(void *arg) {
    *(tprpc_stats *)arg = stats_of(&two[0]);
    STORE(&through, 1);
    return NULL;
}

static void *calls_long(void *arg) {
    static uint8_t body[200];
    const tprpc_message message = {.metadata = body, .metadata_size = sizeof body};
    (void)arg;
    CHECK_EQ_INT(tprpc_call_id(two[0].agent, echo_id, &message, NULL, &futures[2]), TPRPC_OK);
    STORE(&through, 1);
    return NULL;
}

/* What a thread does behind it waits until it is filled: it would not find the calls that it has left itself. */
static void behind(const kind *with, void *(*does)(void *), void *arg) {
    pthread_t thread;
    int count = 2;
    warm(with);
    tpr_loop *loop = loop_of(&two[0]);
    tpr_agent_loop *on = on_of(&two[0]);
    tpr_loop_enter(loop);
    const uint64_t started = on->started;
    tpr_agent_entry *entry = tpr_agent_ring_draw(on->ring, false);
    REQUIRE(entry != NULL);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, calls_some, &count), 0);
    pthread_join(thread, NULL);
    tpr_loop_leave(loop);
    CHECK_EQ_INT(on->started, started);
    CHECK_EQ_INT(tprpc_call_id(two[0].agent, echo_id, NULL, NULL, &futures[3]), TPRPC_OK);   /* nobody has the lock */
    CHECK_EQ_INT(on->started, started);                /* and yet it is left behind them */
    STORE(&through, 0);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, does, arg), 0);
    for (int i = 0; i < 20; i++) {
        test_sleep_us(500);
        CHECK_EQ_INT(LOAD(&through), 0);
    }
    CHECK_EQ_INT(on->started, started);
    entry->worker = NULL;
    entry->of.released = NULL;
    tpr_agent_ring_fill(on->ring, entry);
    while (!LOAD(&through)) turn();
    pthread_join(thread, NULL);
    CHECK(both_until(&outcomes[0].count, 1) && both_until(&outcomes[1].count, 1));
    for (int i = 0; i < 4; i++) while (tprpc_future_wait(futures[i], TPRPC_NOW) == TPRPC_PENDING) turn();
    CHECK_EQ_INT(on->started, started + 3 + (futures[2].owner != NULL));
    for (int i = 0; i < 4; i++) tprpc_future_release(futures[i]);
    check_rest();
    two_close();
}

IN_KINDS(released_behind_one_that_is_filled, POLLED) { behind(with, releases_first, NULL); }
IN_KINDS(called_behind_one_that_is_filled, POLLED) { behind(with, calls_long, NULL); }

IN_KINDS(counted_behind_one_that_is_filled, POLLED) {
    tprpc_stats stats;
    behind(with, counts, &stats);
    CHECK_EQ_INT(stats.calls, MANY + 3);
}

/* An agent that is destroyed ends what was left, too. */
IN_KINDS(what_was_left_ends_with_its_agent, POLLED) {
    pthread_t thread;
    int count = 5;
    warm(with);
    tpr_loop *loop = loop_of(&two[0]);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, calls_some, &count), 0);
    pthread_join(thread, NULL);
    loop->lock.state = 1;                              /* as if nothing had been left: it lies there */
    tpr_loop_leave(loop);
    for (int i = 0; i < count; i++) CHECK_EQ_INT(outcomes[i].count, 0);
    two_close();
    for (int i = 0; i < count; i++) CHECK(outcomes[i].count == 1 && outcomes[i].status == TPRPC_ERROR_CLOSED);
}

/* ---- where few calls may be pending ---- */

static void few_pending(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->limits.pending_calls = 10;
}

static void *waits(void *arg) {
    (void)arg;
    CHECK_EQ_INT(tprpc_future_wait(futures[0], WAIT_MS), TPRPC_OK);
    return NULL;
}

/* Who waits sleeps for the lock at times, with a ring or, as here, without one. */
IN_KINDS(without_a_ring_the_lock_is_waited_for, EVERY & ~POLLED) {
    pthread_t thread;
    two_tune = few_pending;
    two_join(with, echo_methods);
    REQUIRE_EQ_INT(tprpc_resolve(two[0].agent, "bob", "echo", &echo_id, NULL), TPRPC_OK);
    tpr_loop *loop = tpr_agent_worker_of(two[0].agent, "bob", false)->loop;
    CHECK(on_of(&two[0])->ring == NULL);
    CHECK_EQ_INT(tprpc_call_id(two[0].agent, echo_id, NULL, NULL, &futures[0]), TPRPC_OK);
    tpr_loop_enter(loop);                              /* the call is on its way, for its pipe was not made before */
    REQUIRE(!tpr_agent_future(futures[0], loop)->done);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, waits, NULL), 0);
    test_sleep_us(20000);                              /* the loop's own thread may be one */
    while (LOAD(&loop->contenders) < 2) test_sleep_us(100);
    tpr_loop_leave(loop);
    pthread_join(thread, NULL);
    tprpc_future_release(futures[0]);
    two_close();
}

static void *releases(void *arg) {
    (void)arg;
    tprpc_future_release(futures[0]);
    return NULL;
}

/* So that who calls next, with no call too many, is not refused for one that was released. */
IN_KINDS(without_a_ring_who_gives_the_lock_releases, POLLED) {
    pthread_t thread;
    two_tune = few_pending;
    two_join(with, echo_methods);
    tpr_loop *loop = &two[0].ctx->loops[0];
    CHECK(on_of(&two[0])->ring == NULL);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", NULL, NULL, &futures[0]), TPRPC_OK);
    while (tprpc_future_wait(futures[0], TPRPC_NOW) == TPRPC_PENDING) turn();
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, releases, NULL), 0);
    pthread_join(thread, NULL);
    CHECK_EQ_INT(on_of(&two[0])->calls.used, 1);
    tpr_loop_leave(loop);
    CHECK_EQ_INT(on_of(&two[0])->calls.used, 0);
    two_close();
}

/* ---- many threads at once ---- */

enum { THREADS = 8, CALLS = 4000 };
static int sum;                        /* atomic: outcomes */

static void count_outcome(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply; (void)error; (void)user;
    CHECK(status == TPRPC_OK || status == TPRPC_ERROR_CANCELLED);
    ADD(&sum, 1);
}

static void *calls_at_random(void *arg) {
    uint32_t random = (uint32_t)(uintptr_t)arg * 2654435761u + 1;
    tprpc_future mine[7] = {{0}};
    for (int i = 0; i < CALLS; i++) {
        char text[200];
        tprpc_message message = {0};
        tprpc_call_options options = {0};
        tprpc_future *future = &mine[(random = random * 1664525u + 1013904223u) >> 16 & 7];
        const bool asks = future < mine + 7;
        if (asks && future->owner) {
            if (random % 5 == 0) tprpc_future_cancel(*future);
            else if (random % 5 > 1) CHECK_EQ_INT(tprpc_future_wait(*future, WAIT_MS), TPRPC_OK);
            tprpc_future_release(*future);
        }
        memset(text, 'a' + i % 26, sizeof text);
        message.metadata = text;
        message.metadata_size = random % 9 ? random % 65 : sizeof text;    /* some are too long for a ring */
        options.on_done = count_outcome;
        options.flags = random % 31 ? 0 : TPRPC_CALL_ONE_WAY;
        CHECK_EQ_INT(tprpc_call_id(two[0].agent, echo_id, &message, &options, asks ? future : NULL), TPRPC_OK);
    }
    for (int i = 0; i < 7; i++) if (mine[i].owner) tprpc_future_release(mine[i]);
    return NULL;
}

IN_KINDS(threads_that_call_at_random, EVERY & ~POLLED) {
    pthread_t threads[THREADS];
    two_join(with, echo_methods);
    REQUIRE_EQ_INT(tprpc_resolve(two[0].agent, "bob", "echo", &echo_id, NULL), TPRPC_OK);
    for (int i = 0; i < THREADS; i++)
        REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, calls_at_random, (void *)(uintptr_t)(i + 1)), 0);
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
    CHECK(both_until(&sum, THREADS * CALLS));
    tprpc_stats stats = stats_of(&two[0]);
    CHECK_EQ_INT(stats.client_active_calls, 0);
    CHECK_EQ_INT(stats.calls, THREADS * CALLS);
    two_close();
    CHECK_EQ_INT(LOAD(&sum), THREADS * CALLS);
}
