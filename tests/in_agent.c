/* The inside of the agent section: what it tells a profiler, a hostile peer while memory is short, placing without
   memory, and the log where the locks of several loops are held. */
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include <stdint.h>

static void span_begin(uint64_t id);
static void span_end(uint64_t id);
static int64_t plotted;
#define TPRPC_SPAN_BEGIN(name, id) span_begin(id)
#define TPRPC_SPAN_END(name, id)   span_end(id)
#define TPRPC_PLOT(name, value)    (plotted = (value))
#include "agent_two.h"

/* ---- spans and plots ---- */

static uint64_t spans[64];
static int span_count, spans_begun;

static void span_begin(uint64_t id) {
    for (int i = 0; i < span_count; i++) CHECK(spans[i] != id);
    REQUIRE(span_count < 64);
    spans[span_count++] = id;
    spans_begun++;
}

static void span_end(uint64_t id) {
    for (int i = 0; i < span_count; i++) {
        if (spans[i] != id) continue;
        spans[i] = spans[--span_count];
        return;
    }
    CHECK(false);                      /* it has not begun, or is over */
}

static void little_room(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->limits.inflight_bytes = 64 << 10;
}

static const tprpc_method_desc echo_methods[] = {{"echo", on_echo, NULL, NULL, NULL, 0}, {0}};

IN_KINDS(spans_and_plots, POLLED) {
    static uint8_t bytes[1 << 20];
    tprpc_call_options options = {0};
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_message large = tensors_of(&tensor, 1);
    outcome o = {0};
    two_tune = little_room;
    two_join(with, echo_methods);
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    CHECK_EQ_INT(plotted, 1);
    CHECK(both_until(&o.count, 1));
    CHECK_EQ_INT(plotted, 0);
    CHECK_EQ_INT(span_count, 0);
    options.flags = TPRPC_CALL_ONE_WAY;   /* ends as it leaves */
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", NULL, &options, NULL), TPRPC_OK);
    CHECK(both_until(&shared->handled, 2));
    CHECK_EQ_INT(span_count, 0);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", &large, NULL, NULL), TPRPC_ERROR_LIMIT);   /* refused */
    CHECK_EQ_INT(span_count, 0);
    CHECK_EQ_INT(plotted, 0);
    CHECK(spans_begun >= 2);
    two_close();
}

/* ---- what needs no lock, or has who holds it do it ---- */

static tprpc_future asked;
static int steps;                      /* atomic */

static void *asks(void *arg) {
    const tprpc_message *reply;
    tprpc_future next;
    side *s = (side *)arg;
    CHECK_EQ_INT(tprpc_future_wait(asked, WAIT_MS), TPRPC_OK);
    reply = tprpc_future_reply(asked);
    CHECK(reply && reply->metadata_size == 5 && memcmp(reply->metadata, "hello", 5) == 0);
    tprpc_future_release(asked);
    tprpc_future_release(asked);                       /* it is stale: nothing happens */
    CHECK(tprpc_future_reply(asked) == NULL);
    STORE(&steps, 1);
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", NULL, NULL, &next), TPRPC_OK);
    CHECK_EQ_INT(tprpc_call(s->agent, "nobody", "echo", NULL, NULL, NULL), TPRPC_ERROR_NO_WORKER);
    asked = next;
    STORE(&steps, 2);
    return NULL;
}

static void *releases(void *arg) {
    (void)arg;
    tprpc_future_release(asked);
    return NULL;
}

IN_KINDS(a_future_that_is_done_needs_no_lock, POLLED) {
    const tprpc_message hello = {.metadata = "hello", .metadata_size = 5};
    pthread_t thread;
    two_join(with, echo_methods);
    tpr_loop *loop = &two[0].ctx->loops[0];
    const tpr_agent_loop *on = &two[0].agent->loops[0];
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", &hello, NULL, &asked), TPRPC_OK);
    while (tprpc_future_wait(asked, TPRPC_NOW) == TPRPC_PENDING) turn();
    CHECK_EQ_INT(on->calls.used, 1 + on->ring->aside);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, asks, &two[0]), 0);
    while (LOAD(&steps) < 1) test_sleep_us(100);
    while (LOAD(&steps) < 2) test_sleep_us(100);
    CHECK_EQ_INT(on->calls.used, 1 + on->ring->aside); /* until who has the lock looks */
    CHECK_EQ_INT(on->started, 1);
    tpr_loop_leave(loop);
    CHECK_EQ_INT(on->started, 2);
    CHECK_EQ_INT(on->active, 1);
    CHECK_EQ_INT(on->calls.used, 1 + on->ring->aside);
    pthread_join(thread, NULL);
    while (tprpc_future_wait(asked, TPRPC_NOW) == TPRPC_PENDING) turn();
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, releases, NULL), 0);
    pthread_join(thread, NULL);
    tpr_loop_leave(loop);
    two_close();                                       /* which finds the release */
}

static void *waits(void *arg) {
    CHECK_EQ_INT(tprpc_future_wait(*(const tprpc_future *)arg, WAIT_MS), TPRPC_OK);
    STORE(&steps, 1);
    return NULL;
}

/* Who has the lock, and keeps it, brings the outcome: who wants the lock for nothing else need not have it. */
IN_KINDS(an_outcome_is_seen_by_who_waits_for_the_lock, POLLED) {
    pthread_t thread;
    tprpc_future future;
    two_join(with, echo_methods);
    tpr_loop *loop = &two[0].ctx->loops[0];
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", NULL, NULL, &future), TPRPC_OK);
    STORE(&steps, 0);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, waits, &future), 0);
    while (!LOAD(&loop->contenders)) test_sleep_us(100);
    CHECK_EQ_INT(LOAD(&steps), 0);
    for (int64_t end = test_now_us() + WAIT_MS * 1000 / 2; !LOAD(&steps) && test_now_us() < end;) {
        tpr_loop_turn(loop);
        tprpc_poll(two[1].ctx, TPRPC_NOW, 0);
    }
    CHECK_EQ_INT(LOAD(&steps), 1);
    tpr_loop_leave(loop);
    pthread_join(thread, NULL);
    tprpc_future_release(future);
    two_close();
}

/* ---- memory that runs short ---- */

static int64_t allocations_left;       /* of the side that `short_of` names: the next one fails, and those after it */
static side *short_of;
static bool short_once;                /* it alone */

enum { MANY = 1000 };                  /* tensors: what they need is more than a loop's pool keeps */
static uint8_t bytes[200000], place_target[sizeof bytes];

static tprpc_message many_tensors(void) {
    static tprpc_tensor tensors[MANY];
    tensors[0] = bytes_of(bytes, sizeof bytes);
    return tensors_of(tensors, MANY);
}

static void *short_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    if (short_of && user == &short_of->heap) {
        allocations_left--;
        if (allocations_left == -1 || (allocations_left < 0 && !short_once)) return NULL;
    }
    return heap_alloc(size, align, tag, user);
}

static void with_short_memory(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->allocator.alloc = short_alloc;
}

static tpr_agent_server *server_of(tprpc_agent *agent) {
    char *node = (char *)agent->loops[0].servers.next;
    return (tpr_agent_server *)(void *)(node - offsetof(tpr_agent_server, node));
}

static void say_nonsense(tprpc_agent *agent, tprpc_pipe *pipe) {
    tprpc_message message = many_tensors();
    tpr_wire_call prefix;
    memset(&prefix, 0, sizeof prefix);
    prefix.kind = TPR_WIRE_INTRO;      /* no reply; and no introduction, nor the first */
    message.release = count_release;
    CHECK_EQ_INT(tpr_agent_send_on(agent, pipe, &prefix, &message, 0, NULL), TPRPC_OK);
}

/* A peer sends what it must not, with a tensor, and the n-th allocation fails from there on: the pipe ends. */
static void nonsense(const kind *with, int to) {
    for (int n = 0; n < 16; n++) {
        outcome o = {0};
        short_once = n % 2;
        two_tune = with_short_memory;
        if (shared) memset(shared, 0, sizeof *shared);
        short_of = NULL;
        two_join(with, echo_methods);
        CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
        CHECK(both_until(&o.count, 1));
        side *from = &two[!to];
        tpr_loop *loop = &from->ctx->loops[0];
        tpr_loop_enter(loop);
        tprpc_pipe *pipe = to ? tpr_agent_worker_of(from->agent, "bob", false)->pipe
                              : server_of(from->agent)->pipe;
        if (CHECK(pipe != NULL)) say_nonsense(from->agent, pipe);
        tpr_loop_leave(loop);
        allocations_left = n / 2;
        short_of = &two[to];
        for (int i = 0; i < 200; i++) turn();
        short_of = NULL;
        CHECK(both_until(&shared->released, 1));
        CHECK_EQ_INT(stats_of(&two[to]).pipes, 0);
        two_close();
    }
}
IN_KINDS(nonsense_for_a_server, POLLED) { nonsense(with, 1); }
IN_KINDS(nonsense_for_a_caller, POLLED) { nonsense(with, 0); }

/* What has a place is received there or not at all. */
static tprpc_status place_here(tprpc_placement *placement, void *user) {
    (void)user;
    placement->tensors[0].data = place_target;
    return TPRPC_OK;
}

static void on_put(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK(message->tensors[0].data == place_target);
    ADD(&shared->handled, 1);
    tprpc_reply(request, NULL);
}

static const tprpc_method_desc put_methods[] = {{"put", on_put, place_here, NULL, NULL, 0}, {0}};

IN_KINDS(placing_without_memory, POLLED) {
    int handled = 0;
    for (int n = 0; n < 24; n++) {
        tprpc_message message = many_tensors();
        tprpc_call_options options = {0};
        outcome o[2] = {{0}};
        two_tune = with_short_memory;
        if (shared) memset(shared, 0, sizeof *shared);
        short_of = NULL;
        two_join(with, put_methods);
        options.timeout_ms = 5000;
        CHECK_EQ_INT(call(&two[0], "bob", "none", NULL, &options, &o[0]), TPRPC_OK);
        CHECK(both_until(&o[0].count, 1));
        short_once = n % 2;
        allocations_left = n / 2;
        short_of = &two[1];
        options.user = &o[1];
        CHECK_EQ_INT(call(&two[0], "bob", "put", &message, &options, &o[1]), TPRPC_OK);
        CHECK(both_until(&o[1].count, 1));
        CHECK(o[1].status != TPRPC_ERROR_TIMEOUT);
        handled += LOAD(&shared->handled);
        short_of = NULL;
        two_close();
    }
    CHECK(handled > 0);
}

/* ---- the log, where the locks of all loops are held ---- */

static int log_armed, in_log;          /* atomic: whether lines are put down; threads within the log */
static __thread int lines_here;        /* that this thread wrote */
static __thread bool writes;           /* this thread is within the log, which puts nothing down: it would not end */

/* What the section itself may do at any moment: the line is pending, and whoever leaves a loop next writes it. */
static void put_line(side *s) {
    if (LOAD(&log_armed) && !writes)
        tpr_base_log_put(&s->ctx->env.logger, TPRPC_LOG_WARNING, "test", "", __FILE__, __LINE__, "a line");
}

static void *line_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    put_line(user == &two[0].heap ? &two[0] : &two[1]);      /* allocators are called under locks too */
    return heap_alloc(size, align, tag, user);
}

/* Within 10 s: the loops' own threads hold it for moments. */
static bool can_be_had(tpr_os_lock *lock) {
    int64_t end = test_now_us() + 10000000;
    while (!tpr_os_trylock(lock)) {
        if (test_now_us() > end) return false;
        test_sleep_us(100);
    }
    tpr_os_lock_give(lock);
    return true;
}

/* Whoever writes it holds no lock: each can be had, and what takes them all be called. */
static void log_locks(const tprpc_log *entry, void *user) {
    side *s = (side *)user;
    (void)entry;
    ADD(&in_log, 1);
    if (LOAD(&log_armed) && !writes) {
        tprpc_method_desc method = {"of_the_log", on_echo, NULL, NULL, NULL, 0};
        writes = true;
        lines_here++;
        for (uint32_t i = 0; i < s->ctx->loop_count; i++) REQUIRE(can_be_had(&s->ctx->loops[i].lock));
        if (tprpc_agent_register(s->agent, &method, NULL) == TPRPC_OK)     /* another thread's log may be at it */
            tprpc_agent_unregister(s->agent, method.name, NULL);
        writes = false;
    }
    ADD(&in_log, -1);
}

static void with_log(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    context->log = log_locks;
    context->user = s;
    context->allocator.alloc = line_alloc;
}

enum { LOG_ROUNDS = 10, LOG_NAMES = 300, SEVERAL_LOOPS = 0x10 };

IN_KINDS(log_without_locks, SEVERAL_LOOPS) {
    static char names[LOG_NAMES][16];
    tprpc_method_desc method = {NULL, on_echo, NULL, NULL, NULL, 0};
    for (int round = 0; round < LOG_ROUNDS; round++) {
        two_tune = with_log;
        if (shared) memset(shared, 0, sizeof *shared);
        two_open(with, echo_methods);
        REQUIRE_LE_INT(2, two[0].ctx->loop_count);
        STORE(&log_armed, 1);          /* an agent that has started lets go what it held, on every loop */
        for (int i = 0; i < 2; i++)
            CHECK_EQ_INT(tprpc_agent_start(two[i].agent, count_ready, &shared->ready, NULL), TPRPC_OK);
        REQUIRE(both_until(&shared->ready, 2));
        int before[4] = {lines_here, 0, 0, 0};
        for (int i = 0; i < LOG_NAMES; i++) {      /* maps grow under the locks */
            snprintf(names[i], sizeof names[i], "name%d", i);
            method.name = names[i];
            CHECK_EQ_INT(tprpc_agent_register(two[0].agent, &method, NULL), TPRPC_OK);
        }
        before[1] = lines_here;
        for (int i = 0; i < LOG_NAMES; i++) {
            tprpc_method_id id;
            CHECK_EQ_INT(tprpc_resolve(two[0].agent, "bob", names[i], &id, NULL), TPRPC_OK);
        }
        before[2] = lines_here;
        for (int i = 0; i < LOG_NAMES; i++) {
            put_line(&two[0]);         /* it allocates nothing itself */
            CHECK_EQ_INT(tprpc_agent_unregister(two[0].agent, names[i], NULL), TPRPC_OK);
        }
        before[3] = lines_here;
        for (int i = 0; i < 3; i++) CHECK(before[i] < before[i + 1]);
        STORE(&log_armed, 0);
        while (LOAD(&in_log)) test_sleep_us(100);  /* its agent stays until it is through */
        two_close();
    }
}
