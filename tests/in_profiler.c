/* The profiler's macros, as a profiler defines them: names must be literals, zones nest on each thread, every span
   begins and ends once by its id, and the number of active calls comes back to 0, however calls end. */
#include "harness.h"
#include <pthread.h>

static void zone_begin(const char *name);
static void zone_end(const char *name);
static void span_begin(const char *name, uint64_t id);
static void span_end(const char *name, uint64_t id);
static void plot(const char *name, int64_t value);

#define TPRPC_ZONE_BEGIN(name)     zone_begin("" name "")
#define TPRPC_ZONE_END(name)       zone_end("" name "")
#define TPRPC_SPAN_BEGIN(name, id) span_begin("" name "", id)
#define TPRPC_SPAN_END(name, id)   span_end("" name "", id)
#define TPRPC_PLOT(name, value)    plot("" name "", value)
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "agent_help.h"

/* ---- the profiler ---- */

enum { DEEP = 64, SPANS = 4096 };
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread const char *zones[DEEP];
static __thread int depth;
static int zones_begun, zones_ended, spans_begun, spans_ended;
static uint64_t open_spans[SPANS];
static int open_count;
static int64_t plotted, plotted_most;

static void zone_begin(const char *name) {
    REQUIRE(depth < DEEP);
    zones[depth++] = name;
    ADD(&zones_begun, 1);
}

static void zone_end(const char *name) {
    REQUIRE(depth > 0);
    CHECK_STR(zones[--depth], name);
    ADD(&zones_ended, 1);
}

static int span_find(uint64_t id) {
    int i = 0;
    while (i < open_count && open_spans[i] != id) i++;
    return i;
}

static void span_begin(const char *name, uint64_t id) {
    pthread_mutex_lock(&lock);
    CHECK_STR(name, "tprpc call");
    CHECK_EQ_INT(span_find(id), open_count);        /* no other one of that id is open, of whichever agent */
    REQUIRE(open_count < SPANS);
    open_spans[open_count++] = id;
    spans_begun++;
    pthread_mutex_unlock(&lock);
}

static void span_end(const char *name, uint64_t id) {
    pthread_mutex_lock(&lock);
    const int at = span_find(id);
    CHECK_STR(name, "tprpc call");
    if (CHECK(at < open_count)) open_spans[at] = open_spans[--open_count];
    spans_ended++;
    pthread_mutex_unlock(&lock);
}

static void plot(const char *name, int64_t value) {
    pthread_mutex_lock(&lock);
    CHECK_STR(name, "tprpc active calls");
    CHECK(value >= 0);
    plotted = value;
    if (value > plotted_most) plotted_most = value;
    pthread_mutex_unlock(&lock);
}

/* ---- calls that end in every way, both ways at once ---- */

enum { N = 20, KEPT = 64 };

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK(depth > 0);                   /* the handler's own zone is around it */
    tprpc_reply(request, message);
}

static void on_fail(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    tprpc_fail(request, 1, "no");
}

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    tprpc_request_keep(request);        /* and never answered */
}

static void on_nothing(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request; (void)message; (void)user;
}

static tprpc_status refuse(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    return TPRPC_ERROR_LIMIT;
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},   {"fail", on_fail, NULL, NULL, NULL, 0},
    {"keep", on_keep, NULL, NULL, NULL, 0},   {"nothing", on_nothing, NULL, NULL, NULL, 0},
    {"refused", on_echo, refuse, NULL, NULL, 0}, {0},
};

static int expected;

static void calls(side *s) {
    static uint8_t large[1 << 20];
    const char *other = s->rank ? "ann" : "bob";
    tprpc_tensor tensor = bytes_of(large, sizeof large);
    tprpc_message message = tensors_of(&tensor, 1), wrong = {0};
    tprpc_payload payload = {large, 64, NULL, 0};
    tprpc_call_options hurried = {0}, one_way = {0};
    tprpc_future futures[N];
    hurried.timeout_ms = 30;
    one_way.flags = TPRPC_CALL_ONE_WAY;
    wrong.payloads = &payload;
    wrong.payload_count = 1;
    for (int i = 0; i < N; i++) {
        CHECK_EQ_INT(call_and_wait(s, other, "echo", i % 2 ? &message : NULL, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(call_and_wait(s, other, "fail", NULL, NULL, NULL), TPRPC_ERROR_REMOTE);
        CHECK_EQ_INT(call_and_wait(s, other, "nothing", NULL, NULL, NULL), TPRPC_ERROR_REMOTE);
        CHECK_EQ_INT(call_and_wait(s, other, "no such", NULL, NULL, NULL), TPRPC_ERROR_NO_METHOD);
        CHECK_EQ_INT(call_and_wait(s, "nobody", "echo", NULL, NULL, NULL), TPRPC_ERROR_NO_WORKER);
        CHECK_EQ_INT(call_and_wait(s, other, "echo", &wrong, NULL, NULL), TPRPC_ERROR_INVALID);
        CHECK(call_and_wait(s, other, "refused", &message, NULL, NULL) != TPRPC_OK);
        CHECK_EQ_INT(call_and_wait(s, other, "echo", NULL, &one_way, NULL), TPRPC_OK);
        ADD(&expected, 6);
    }
    for (int i = 0; i < 3; i++) {
        CHECK_EQ_INT(call_and_wait(s, other, "keep", NULL, &hurried, NULL), TPRPC_ERROR_TIMEOUT);
        ADD(&expected, 1);
    }
    for (int i = 0; i < N; i++)         /* a half is cancelled, the other is open when the agent goes */
        REQUIRE_EQ_INT(tprpc_call(s->agent, other, "keep", NULL, NULL, &futures[i]), TPRPC_OK);
    ADD(&expected, N);
    for (int i = 0; i < N; i++) {
        if (i % 2) CHECK_EQ_INT(tprpc_future_cancel(futures[i]), TPRPC_OK);
        tprpc_future_release(futures[i]);
    }
    ADD(&shared->seen, 1);
    CHECK(until(s, &shared->seen, 2));
    for (int i = 0; i < 50; i++) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(depth, 0);
}

IN_MODES(profiled, 0x6c) {              /* both agents in this process, which alone is profiled */
    side sides[2] = {{0}};
    sides[0].mode = with;
    for (int i = 0; i < 2; i++) {
        sides[i].main = calls;
        sides[i].methods = methods;
        sides[i].no_leave = true;
    }
    group_run(sides, 2);
    CHECK_EQ_INT(zones_begun, zones_ended);
    CHECK(zones_begun >= 2 * 4 * N);
    CHECK_EQ_INT(spans_begun, expected);
    CHECK_EQ_INT(spans_ended, expected);
    CHECK_EQ_INT(open_count, 0);
    CHECK_EQ_INT(plotted, 0);
    CHECK(plotted_most >= N / 2);
}

/* The call's send may fail at once: what begins still ends, in that order. */
static int send_fails(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, "send") == 0 ? EPIPE : 0;
}

static void calls_broken(side *s) {
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    TPR_ATOMIC_STORE(&tprpc_test_hook, send_fails);
    for (int i = 0; i < 5; i++) CHECK(call_and_wait(s, "bob", "echo", NULL, NULL, NULL) != TPRPC_OK);
    TPR_ATOMIC_STORE(&tprpc_test_hook, (int (*)(const char *, int64_t *))NULL);
    STORE(&shared->stop, 1);
}

IN_MODES(profiled_broken, 0x40) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = calls_broken;
    sides[1].main = serve_until_stop;
    sides[0].methods = sides[1].methods = methods;
    sides[0].no_leave = sides[1].no_leave = true;
    group_run(sides, 2);
    CHECK_EQ_INT(spans_begun, spans_ended);
    CHECK(spans_begun > 1);
    CHECK_EQ_INT(open_count, 0);
    CHECK_EQ_INT(plotted, 0);
}
