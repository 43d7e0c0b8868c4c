/* Edges of agents and contexts: many requests that are cancelled, the largest of what is limited, functions that only
   backends call, hooks of worker threads, groups on an IPv6 address. */
#include "agent_help.h"

/* ---- a million pending calls may be cancelled at once: each cancellation finds its request directly ---- */

enum { KEPT = 150000 / TEST_SLOWDOWN, ANSWERED_EACH = 7, LEFT_EACH = 16 };
static tprpc_request kept[KEPT];
static int kept_count;

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    uint32_t index;
    (void)user;
    REQUIRE_EQ_INT(message->metadata_size, sizeof index);
    memcpy(&index, message->metadata, sizeof index);
    REQUIRE(index < KEPT);
    REQUIRE_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    kept[index] = request;
    kept_count++;
    ADD(&shared->handled, 1);
}

/* Those not cancelled, by index, as far as they differ from what is expected; then all are answered. */
static void on_count(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    for (uint32_t i = 0; i < KEPT; i++) {
        const bool cancelled = i % LEFT_EACH != 0 && i % ANSWERED_EACH != 0;
        if (tprpc_request_cancelled(kept[i]) != (cancelled || i % ANSWERED_EACH == 0)) ADD(&shared->bad, 1);
        if (i % ANSWERED_EACH != 0) tprpc_reply(kept[i], NULL);
    }
    tprpc_reply(request, NULL);
}

static void on_answer_some(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(kept_count, KEPT);
    for (uint32_t i = 0; i < KEPT; i += ANSWERED_EACH) CHECK_EQ_INT(tprpc_reply(kept[i], NULL), TPRPC_OK);
    tprpc_reply(request, NULL);
}

static void client_cancels(side *s) {
    tprpc_future *futures = (tprpc_future *)calloc(KEPT, sizeof *futures);
    uint32_t *order = (uint32_t *)calloc(KEPT, sizeof *order), random = 1;
    tprpc_method_id id;
    int bad = 0;
    REQUIRE(futures && order);
    REQUIRE_EQ_INT(tprpc_resolve(s->agent, "bob", "keep", &id, NULL), TPRPC_OK);
    for (uint32_t i = 0; i < KEPT; i++) {
        tprpc_message message = {0};
        uint32_t j = i ? (random = random * 1664525 + 1013904223) % (i + 1) : 0;
        message.metadata = &i;
        message.metadata_size = sizeof i;
        REQUIRE_EQ_INT(tprpc_call_id(s->agent, id, &message, NULL, &futures[i]), TPRPC_OK);
        order[i] = order[j];
        order[j] = i;
        if (i % 64 == 0) tprpc_poll(s->ctx, TPRPC_NOW, 0);
    }
    REQUIRE(until(s, &shared->handled, KEPT));      /* calls have no order among each other */
    CHECK_EQ_INT(call_and_wait(s, "bob", "answer some", NULL, NULL, NULL), TPRPC_OK);
    for (uint32_t i = 0; i < KEPT; i++) {
        const uint32_t n = order[i];
        if (n % ANSWERED_EACH == 0) CHECK_EQ_INT(tprpc_future_wait(futures[n], WAIT_MS), TPRPC_OK);
        else if (n % LEFT_EACH != 0) CHECK_EQ_INT(tprpc_future_cancel(futures[n]), TPRPC_OK);
        if (i % 64 == 0) tprpc_poll(s->ctx, TPRPC_NOW, 0);
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "count", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
    for (uint32_t i = 0; i < KEPT; i++) {
        const bool cancelled = i % LEFT_EACH != 0 && i % ANSWERED_EACH != 0;
        if (tprpc_future_wait(futures[i], WAIT_MS) != (cancelled ? TPRPC_ERROR_CANCELLED : TPRPC_OK)) bad++;
        tprpc_future_release(futures[i]);
    }
    CHECK_EQ_INT(bad, 0);
    free(futures);
    free(order);
}

IN_MODES(cancellations_of_many, 0x80) {
    static const tprpc_method_desc methods[] = {{"keep", on_keep, NULL, NULL, NULL, 0},
                                                {"answer some", on_answer_some, NULL, NULL, NULL, 0},
                                                {"count", on_count, NULL, NULL, NULL, 0}, {0}};
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_cancels;
    sides[1].methods = methods;
    group_run(sides, 2);
}

/* ---- what only backends call ---- */

TEST(dtype_sizes) {
    static const struct { int32_t dtype; size_t size; } sizes[] = {
        {TPRPC_BYTES, 1}, {TPRPC_BOOL, 1}, {TPRPC_I8, 1}, {TPRPC_I16, 2}, {TPRPC_I32, 4}, {TPRPC_I64, 8}, {TPRPC_U8, 1},
        {TPRPC_U16, 2}, {TPRPC_U32, 4}, {TPRPC_U64, 8}, {TPRPC_F16, 2}, {TPRPC_BF16, 2}, {TPRPC_F32, 4}, {TPRPC_F64, 8},
        {TPRPC_C64, 8}, {TPRPC_C128, 16}, {TPRPC_C128 + 1, 0}, {-1, 0}, {INT32_MAX, 0}, {INT32_MIN, 0},
    };
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        CHECK_EQ_INT(tprpc_dtype_size(sizes[i].dtype), sizes[i].size);
}

static int64_t ran_at[4];
static int ran;
static tprpc_context *deferring;

static void on_due(tprpc_work *work) {
    (void)work;
    REQUIRE(ran < 4);
    ran_at[ran++] = tprpc_now_us(deferring);
}

/* Never before it is due, in the order due, and on the loop that was asked for. */
TEST(defer_at) {
    tprpc_context_desc desc = {0};
    tprpc_work works[4];
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    memset(works, 0, sizeof works);
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &deferring, NULL), TPRPC_OK);
    const int64_t now = tprpc_now_us(deferring), due[4] = {now + 30000, now - 1000000, now + 10000, now + 20000};
    for (int i = 0; i < 4; i++) {
        works[i].run = on_due;
        tprpc_defer_at(deferring, &works[i], due[i]);
    }
    while (ran < 4 && test_now_us() < end) tprpc_poll(deferring, 100000, 0);
    REQUIRE_EQ_INT(ran, 4);
    CHECK(ran_at[1] >= now + 10000);
    CHECK(ran_at[2] >= now + 20000);
    CHECK(ran_at[3] >= now + 30000);
    CHECK_EQ_INT(tprpc_context_destroy(deferring), TPRPC_OK);
}

static int lines;
static char said[4][300];

static void keep_line(const tprpc_log *entry, void *user) {
    CHECK(user == (void *)&lines);
    if (strcmp(entry->section, "toy") != 0) return;
    REQUIRE(lines < 4);
    snprintf(said[lines++], sizeof said[0], "%d %s", (int)entry->level, entry->text);
}

TEST(log_text) {
    tprpc_context_desc desc = {0};
    tprpc_context *ctx = NULL;
    char section[8] = "toy", text[40] = "100% of a text";
    desc.log = keep_line;
    desc.user = &lines;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    tprpc_log_text(ctx, TPRPC_LOG_WARNING, section, text);
    memset(section, 'x', 3);             /* copied */
    memset(text, 'x', 5);
    tprpc_log_text(ctx, TPRPC_LOG_DEBUG, "toy", "compiled out by the default level");
    tprpc_poll(ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    REQUIRE_EQ_INT(lines, 1);
    CHECK_STR(said[0], "2 100% of a text");
}

/* ---- the largest, and one more ---- */

TEST(listener_addresses) {
    static const char *addresses[17];
    tprpc_context_desc context = {0};
    tprpc_listener_desc desc = {0};
    tprpc_context *ctx = NULL;
    tprpc_listener *listener = NULL;
    tprpc_error error = {0};
    for (int i = 0; i < 17; i++) addresses[i] = i % 2 ? "shm://" : "tcp://127.0.0.1:0";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    desc.addresses = addresses;
    desc.address_count = 16;
    CHECK_EQ_INT(tprpc_listen(ctx, &desc, &listener, &error), TPRPC_OK);
    tprpc_listener_close(listener);
    desc.address_count = 17;
    const tprpc_status status = tprpc_listen(ctx, &desc, &listener, &error);
    CHECK(status == TPRPC_ERROR_LIMIT || status == TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(error.status, status);
    CHECK_CONTAINS(error.text, "16");
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(loops) {
    tprpc_context_desc desc = {0};
    tprpc_context *ctx = NULL;
    tprpc_error error = {0};
    const int threads = test_count_threads();
    desc.threads = 64;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_OK);
    CHECK_LE_INT(threads + 64, test_count_threads());
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    ctx = NULL;
    desc.threads = 65;
    const tprpc_status status = tprpc_context_create(&desc, &ctx, &error);
    CHECK(status == TPRPC_ERROR_LIMIT || status == TPRPC_ERROR_INVALID);
    CHECK(!ctx);
    CHECK_CONTAINS(error.text, "64");
}

TEST(world_size) {
    static const int32_t sizes[] = {1048576, 1048577, INT32_MAX, -1};
    for (int i = 0; i < 4; i++) {
        tprpc_agent_desc desc = {0};
        tprpc_agent *agent = NULL;
        tprpc_error error = {0};
        desc.name = "ann";
        desc.init_method = "tcp://127.0.0.1:1";
        desc.world_size = sizes[i];
        desc.rank = sizes[i] > 0 ? sizes[i] - 1 : 0;
        const tprpc_status status = tprpc_agent_create(&desc, &agent, &error);
        CHECK_EQ_INT(status, i == 0 ? TPRPC_OK : TPRPC_ERROR_INVALID);
        CHECK((agent != NULL) == (i == 0));
        if (i > 0) CHECK(error.text[0]);
        tprpc_agent_destroy(agent);
    }
}

/* ---- the agent's own threads tell of themselves ---- */

static int threads_begun, threads_ended;
static __thread bool told_begin;

static void on_thread_begin(const char *name, void *user) {
    (void)user;
    CHECK(name && name[0] && !told_begin);
    told_begin = true;
    ADD(&threads_begun, 1);
}

static void on_thread_end(const char *name, void *user) {
    (void)user;
    CHECK(name && name[0] && told_begin);
    ADD(&threads_ended, 1);
}

static void on_job(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK(told_begin);
    tprpc_reply(request, NULL);
}

static void with_workers(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s;
    context->thread_begin = on_thread_begin;
    context->thread_end = on_thread_end;
    agent->worker_threads = 3;
}

static void client_jobs(side *s) {
    for (int i = 0; i < 10; i++) CHECK_EQ_INT(call_and_wait(s, "bob", "job", NULL, NULL, NULL), TPRPC_OK);
}

IN_MODES(worker_thread_hooks, 0x2c) {
    static const tprpc_method_desc methods[] = {{"job", on_job, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {0}};
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_jobs;
    sides[1].methods = methods;
    sides[1].tune = with_workers;
    group_run(sides, 2);
    CHECK_EQ_INT(threads_begun, 3 + with->threads);
    CHECK_EQ_INT(threads_ended, threads_begun);
}

/* A handler ends its thread: its call fails, and there are as many threads as before. Some had answered first. */
static void on_exit_thread(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK(told_begin);
    if (message->metadata_size) tprpc_reply(request, NULL);
    pthread_exit(NULL);
}

static void client_exits(side *s) {
    const tprpc_message answered = {.metadata = "1", .metadata_size = 1};
    tprpc_error error;
    for (int i = 0; i < 20; i++) {
        CHECK_EQ_INT(call_and_wait(s, "bob", "exit", NULL, NULL, &error), TPRPC_ERROR_REMOTE);
        CHECK_CONTAINS(error.text, "without answering");
        CHECK_EQ_INT(call_and_wait(s, "bob", "exit", &answered, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(call_and_wait(s, "bob", "job", NULL, NULL, NULL), TPRPC_OK);
    }
}

IN_MODES(threads_that_handlers_end, 0x2c) {
    static const tprpc_method_desc methods[] = {{"job", on_job, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING},
                                                {"exit", on_exit_thread, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {0}};
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_exits;
    sides[1].methods = methods;
    sides[1].tune = with_workers;
    group_run(sides, 2);
    CHECK_EQ_INT(threads_begun, 3 + 40 + with->threads);
    CHECK_EQ_INT(threads_ended, threads_begun);
}

/* ---- a group on an IPv6 address ---- */

static void client_v6(side *s) {
    tprpc_pipe_info info;
    CHECK_EQ_INT(call_and_wait(s, "bob", "job", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info), TPRPC_OK);
    CHECK_CONTAINS(info.peer, "[::1]:");
}

static void answer(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

IN_MODES(group_over_ipv6, 0x49) {
    static const tprpc_method_desc methods[] = {{"job", answer, NULL, NULL, NULL, 0}, {0}};
    side sides[2] = {{0}};
    char url[64];
    snprintf(url, sizeof url, "tcp://[::1]:%d", socket_free_port());
    sides[0].mode = with;
    sides[0].init_method = sides[1].init_method = url;
    sides[0].main = client_v6;
    sides[1].methods = methods;
    group_run(sides, 2);
}

/* ---- tprpc_wake while a thread waits for its future ---- */

enum { LONG_MS = 10000 };

static void on_slow(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    CHECK(until(NULL, &shared->go, 1));
    test_sleep_us(20000);              /* by then the caller waits */
    tprpc_reply(request, message);
}

static tprpc_request woken_kept;
static void on_keep_one(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    REQUIRE_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    woken_kept = request;
    ADD(&shared->handled, 1);
}

/* The waiting thread, which drives the loop, does not shut out the loop's own, whose handler wants to reply. */
static void client_woken(side *s) {
    tprpc_future future;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "ann", "slow", NULL, NULL, &future), TPRPC_OK);
    CHECK(until(NULL, &shared->handled, 1));
    tprpc_wake(s->ctx);
    STORE(&shared->go, 1);
    CHECK_EQ_INT(tprpc_future_wait(future, LONG_MS), TPRPC_OK);
    tprpc_future_release(future);
}

static void without_spinning(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->spin_us = TPRPC_NOW;
}

IN_MODES(woken_while_waiting, 0x38) {
    static const tprpc_method_desc methods[] = {{"slow", on_slow, NULL, NULL, NULL, 0}, {0}};
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_woken;
    sides[0].tune = without_spinning;
    sides[0].methods = methods;
    group_run(sides, 2);
}

typedef struct waiter { tprpc_future future; int64_t cpu_us; int begun; } waiter;

static int64_t cpu_now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void *waits(void *arg) {
    waiter *w = (waiter *)arg;
    STORE(&w->begun, 1);
    CHECK_EQ_INT(tprpc_future_wait(w->future, LONG_MS), TPRPC_OK);
    w->cpu_us = cpu_now_us();
    return NULL;
}

static void *wakes(void *arg) {
    test_sleep_us(30000);              /* by then it polls */
    tprpc_wake((tprpc_context *)arg);
    return NULL;
}

/* A poll that follows the thread which waits is ended too; and where nobody polls, that thread goes on sleeping. */
static void client_wakes_poll(side *s) {
    waiter w = {{NULL, 0}, 0, 0};
    pthread_t waiting, waking;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "ann", "keep", NULL, NULL, &w.future), TPRPC_OK);
    CHECK(until(s, &shared->handled, 1));
    REQUIRE_EQ_INT(pthread_create(&waiting, NULL, waits, &w), 0);
    CHECK(until(NULL, &w.begun, 1));
    test_sleep_us(30000);              /* by then it sleeps */
    REQUIRE_EQ_INT(pthread_create(&waking, NULL, wakes, s->ctx), 0);
    const int64_t begin = test_now_us();
    tprpc_poll(s->ctx, (int64_t)LONG_MS * 1000, 0);
    CHECK_LE_INT(test_now_us() - begin, (int64_t)LONG_MS * 500);
    pthread_join(waking, NULL);
    tprpc_wake(s->ctx);
    test_sleep_us(500000);
    tprpc_reply(woken_kept, NULL);
    pthread_join(waiting, NULL);
    CHECK_LE_INT(w.cpu_us, 250000);
    tprpc_future_release(w.future);
}

IN_MODES(wake_ends_a_poll_that_follows, 0x44) {
    static const tprpc_method_desc methods[] = {{"keep", on_keep_one, NULL, NULL, NULL, 0}, {0}};
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_wakes_poll;
    sides[0].methods = methods;
    group_run(sides, 2);
}

/* ---- a large call that times out at once: its outcome comes, then its memory back, once, and is freed ---- */

static void freed(void *user) {
    free(user);
    ADD(&shared->released, 1);
}

static void client_has_no_time(side *s) {
    enum { LARGE = 64 << 20, CALLS = 4 };
    for (int i = 0; i < CALLS; i++) {
        tprpc_tensor tensor = {0};
        tprpc_message message = {0};
        tprpc_call_options options = {0};
        tensor.size = LARGE;
        tensor.data = malloc(LARGE);
        REQUIRE(tensor.data != NULL);
        memset(tensor.data, i, LARGE);
        message.tensors = &tensor;
        message.tensor_count = 1;
        message.release = freed;
        message.release_user = tensor.data;
        options.timeout_ms = 1;
        CHECK_EQ_INT(call_and_wait(s, "bob", "take", &message, &options, NULL), TPRPC_ERROR_TIMEOUT);
        CHECK(until_released(s, i + 1));
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "take", NULL, NULL, NULL), TPRPC_OK);   /* the pipe has survived it */
    CHECK_EQ_INT(LOAD(&shared->released), CALLS);
    CHECK_EQ_INT(stats_of(s).client_active_calls, 0);
}

static void on_take(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    tprpc_reply(request, NULL);
}

static void with_lanes(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->lanes = 3;                /* for mpt, which is not used without */
}

static void no_time(const mode *with, const char *channels) {
    static const tprpc_method_desc methods[] = {{"take", on_take, NULL, NULL, NULL, 0}, {0}};
    side sides[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        sides[i].channels = channels;
        sides[i].tune = with_lanes;
    }
    sides[0].mode = with;
    sides[0].main = client_has_no_time;
    sides[1].methods = methods;
    group_run(sides, 2);
}

IN_MODES(no_time_basic, ALL_MODES) { no_time(with, "basic"); }
IN_MODES(no_time_xth, 0x64) { no_time(with, "xth"); }
IN_MODES(no_time_cma, 0x92) { no_time(with, "cma"); }
IN_MODES(no_time_bulk, 0x92) { no_time(with, "bulk"); }
IN_MODES(no_time_mpt, 0x49) { no_time(with, "mpt"); }

/* ---- the request's own message as a late answer to a call that was cancelled: it goes with the request ---- */

static void poison_and_free(void *ptr, size_t size, uint32_t tag, void *user) {
    if (ptr) memset(ptr, 0xa5, size);
    heap_free(ptr, size, tag, user);
}

static void poisoning(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->allocator.free = poison_and_free;
}

static void client_cancels_one(side *s) {
    static uint8_t body[200000];           /* with it the message's block is of no pool */
    tprpc_message message = {0};
    tprpc_future future;
    message.metadata = body;
    message.metadata_size = sizeof body;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "keep", &message, NULL, &future), TPRPC_OK);
    CHECK(until(s, &shared->handled, 1));
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_ERROR_CANCELLED);
    tprpc_future_release(future);
    CHECK(until(s, &shared->go, 1));
}

static void server_answers_late(side *s) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    CHECK(until(s, &shared->handled, 1));
    while (!tprpc_request_cancelled(woken_kept) && test_now_us() < end) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(tprpc_reply(woken_kept, tprpc_request_message(woken_kept)), TPRPC_ERROR_INVALID);
    STORE(&shared->go, 1);
}

IN_MODES(late_answer_with_its_own_message, 0x7f) {
    static const tprpc_method_desc methods[] = {{"keep", on_keep_one, NULL, NULL, NULL, 0}, {0}};
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_cancels_one;
    sides[1].methods = methods;
    sides[1].main = server_answers_late;
    sides[1].tune = poisoning;
    group_run(sides, 2);
}
