/* What the tests of two agents in one thread share: each has a context of its own that is polled in turn, so that a test
   stops them at the moment it means. */
#ifndef TPRPC_TESTS_AGENT_TWO_H
#define TPRPC_TESTS_AGENT_TWO_H

#include "agent_help.h"

typedef struct kind { const char *name, *transports, *channels; int threads; } kind;

static const kind kinds[] UNUSED = {
    {"tcp_basic", "tcp", "basic", 0}, {"shm_basic", "shm", "basic", 0}, {"tcp_xth", "tcp", "xth,basic", 0},
    {"shm_xth", "shm", "xth,basic", 0}, {"threads", NULL, NULL, 2}, {"threads_basic", "tcp", "basic", 1},
};
enum { EVERY = 0x3f, POLLED = 0xf, ONE = 1, TWO = 0x12 };

typedef struct in_kind { void (*run)(const kind *); const kind *kind; } in_kind;
static inline void in_kind_run(void *arg) { ((in_kind *)arg)->run(((in_kind *)arg)->kind); }

static inline void in_kinds(const char *name, void (*run)(const kind *), unsigned mask) {
    static in_kind all[200];
    static size_t count;
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        char text[100];
        if (!(mask >> i & 1)) continue;
        REQUIRE(count < sizeof all / sizeof all[0]);
        all[count].run = run;
        all[count].kind = &kinds[i];
        snprintf(text, sizeof text, "%s_%s", name, kinds[i].name);
        test_add(text, in_kind_run, &all[count++], 30);
    }
}

#define IN_KINDS(name, mask)                                      \
    static void in_##name(const kind *with);                      \
    TESTS(name) { in_kinds(#name, in_##name, mask); }             \
    static void in_##name(UNUSED const kind *with)

static side two[2];                    /* ann calls, bob serves */
static mode two_mode;
static group two_group;
static const kind *two_kind;
static void (*two_tune)(side *, tprpc_context_desc *, tprpc_agent_desc *);

static inline void tune(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    context->channels = two_kind->channels;
    if (two_tune) two_tune(s, context, agent);
}

/* The budget is over at once: a poll does one turn, so that transfers stay under way. */
static inline void turn(void) {
    for (int i = 0; i < 2; i++) if (two[i].ctx) tprpc_poll(two[i].ctx, TPRPC_NOW, 1);
    if (two_kind->threads) test_sleep_us(100);
}

static inline bool both_until(int *flag, int at_least) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (LOAD(flag) < at_least) {
        if (test_now_us() > end) return false;
        turn();
    }
    return true;
}

static inline void count_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (status != TPRPC_OK) fprintf(stderr, "joining: %s\n", error->text);
    CHECK_EQ_INT(status, TPRPC_OK);
    ADD((int *)user, 1);
}

static inline void two_open(const kind *with, const tprpc_method_desc *methods) {
    two_kind = with;
    two_mode.name = with->name;
    two_mode.transports = with->transports;
    two_mode.threads = with->threads;
    two[0].mode = &two_mode;
    if (!shared) share();
    group_open(&two_group, two, 2);
    for (int i = 0; i < 2; i++) {
        two[i].methods = methods;
        two[i].tune = tune;
        side_open(&two[i]);
    }
}

static inline void two_join(const kind *with, const tprpc_method_desc *methods) {
    two_open(with, methods);
    for (int i = 0; i < 2; i++)
        CHECK_EQ_INT(tprpc_agent_start(two[i].agent, count_ready, &shared->ready, NULL), TPRPC_OK);
    REQUIRE(both_until(&shared->ready, 2));
}

static inline void end_agent(side *s) {
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    s->agent = NULL;
}

static inline void two_close(void) {
    for (int i = 0; i < 2; i++) side_close(&two[i]);
    group_close(&two_group);
}

/* An outcome, counted. */
typedef struct outcome { int count; tprpc_status status; char text[256]; } outcome;

static inline void on_outcome(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    outcome *o = (outcome *)user;
    (void)reply;
    o->status = status;
    if (error) snprintf(o->text, sizeof o->text, "%s", error->text);
    ADD(&o->count, 1);
}

static inline tprpc_status call(side *s, const char *worker, const char *method, const tprpc_message *message,
                         tprpc_call_options *options, outcome *o) {
    tprpc_call_options plain = {0};
    if (!options) options = &plain;
    options->on_done = on_outcome;
    if (!options->user) options->user = o;
    return tprpc_call(s->agent, worker, method, message, options, NULL);
}

static inline void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    tprpc_reply(request, message);
}

#endif
