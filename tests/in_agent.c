/* The inside of the agent section: what it tells a profiler, a hostile peer while memory is short, and placing without
   memory. */
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
