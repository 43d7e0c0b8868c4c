/* Agents at their limits: calls that are too many, answers that are too large, no descriptors, waits in callbacks that
   need each other, and addresses of IPv6 alone. */
#include "agent_help.h"

/* ---- handlers ---- */

static tprpc_request kept[16];
static int kept_count;

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static void on_hold(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    REQUIRE(kept_count < 16);
    kept[kept_count++] = request;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->seen, 1);
}

static void on_mirror(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    CHECK_EQ_INT(call_and_wait(s, tprpc_request_caller(request), "echo", message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
}

enum { SMALL_LIMIT = 1 << 20 };

/* Answers with more than the caller takes, twice, and says then that it cannot. */
static void on_much(tprpc_request request, const tprpc_message *message, void *user) {
    static uint8_t bytes[SMALL_LIMIT + 1];
    const bool in_body = message->metadata_size && *(const char *)message->metadata == 'b';
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_message reply = tensors_of(&tensor, 1);
    (void)user;
    if (in_body) {
        reply = tensors_of(NULL, 0);
        reply.metadata = bytes;
        reply.metadata_size = sizeof bytes;
    }
    for (int i = 1; i <= 2; i++) {
        reply.release = count_release;
        reply.release_user = NULL;
        CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_ERROR_LIMIT);
        CHECK_EQ_INT(LOAD(&shared->released), i);
    }
    reply.release = NULL;
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_ERROR_LIMIT);
    CHECK(!tprpc_request_cancelled(request));
    CHECK(tprpc_request_message(request) != NULL);
    if (message->metadata_size && *(const char *)message->metadata == 'l') {   /* less will do */
        tensor.size = SMALL_LIMIT;
        CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
    } else {
        CHECK_EQ_INT(tprpc_fail(request, 77, "too much to say"), TPRPC_OK);
    }
    CHECK_EQ_INT(tprpc_fail(request, 78, "again"), TPRPC_ERROR_INVALID);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {"hold", on_hold, NULL, NULL, NULL, 0},
    {"mirror", on_mirror, NULL, NULL, NULL, 0},
    {"much", on_much, NULL, NULL, NULL, 0},
    {0},
};

static void count_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply; (void)user;
    CHECK((status == TPRPC_OK) == (error == NULL));
    ADD(&shared->outcomes, 1);
}

/* Answers what was kept, as soon as it is told to, in rounds; until it is told to stop. */
static void answer_when_told(side *s) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (!LOAD(&shared->stop) && test_now_us() < end) {
        tprpc_poll(s->ctx, 1000, 0);
        if (LOAD(&shared->go) <= 0) continue;
        const int left = LOAD(&shared->seen);
        for (int i = 0; i < left; i++) CHECK_EQ_INT(tprpc_reply(kept[i], NULL), TPRPC_OK);
        kept_count = 0;
        STORE(&shared->seen, 0);
        STORE(&shared->go, 0);
    }
    CHECK(LOAD(&shared->stop));
}

static void let_go(side *s) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    STORE(&shared->go, 1);
    while (LOAD(&shared->go) && test_now_us() < end) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(LOAD(&shared->go), 0);
}

static void pair_of(const mode *with, void (*first)(side *), void (*tune)(side *, tprpc_context_desc *,
                                                                         tprpc_agent_desc *)) {
    side sides[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].tune = tune;
    }
    sides[0].mode = with;
    sides[0].main = first;
    sides[1].main = answer_when_told;
    group_run(sides, 2);
}

/* ---- limits.pending_calls ---- */

static void caller_has_four(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s->rank == 0) context->limits.pending_calls = 4;
}

static void server_has_four(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s->rank == 1) context->limits.pending_calls = 4;
}

static void call_too_often(side *s) {
    static uint8_t bytes[100000];
    const tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_call_options options = {0};
    tprpc_error error;
    tprpc_future futures[4], fifth;
    options.on_done = count_done;
    options.error = &error;
    for (int round = 1; round <= 3; round++) {
        const bool small = round == 2;
        for (int i = 0; i < 4; i++)
            REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, &options, &futures[i]), TPRPC_OK);
        for (int i = 0; i < 3; i++) {  /* the fifth, and again */
            tprpc_message message = small ? text_of("small") : tensors_of(&tensor, 1);
            int released = 0;
            message.release = count_release;
            message.release_user = &released;
            memset(&error, 0, sizeof error);
            CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, i ? &fifth : NULL), TPRPC_ERROR_LIMIT);
            CHECK_EQ_INT(released, 1);
            CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
            CHECK_CONTAINS(error.text, "pending_calls");
            if (i) CHECK(fifth.owner == NULL && fifth.id == 0);
            tprpc_poll(s->ctx, TPRPC_NOW, 0);
            CHECK_EQ_INT(released, 1);
        }
        CHECK_EQ_INT(stats_of(s).client_active_calls, 4);
        CHECK_EQ_INT(LOAD(&shared->outcomes), (round - 1) * 4);
        CHECK_EQ_INT(LOAD(&shared->handled), round - 1);
        if (round == 3) {              /* one that is cancelled makes room too */
            CHECK_EQ_INT(tprpc_future_cancel(futures[0]), TPRPC_OK);
            tprpc_future_release(futures[0]);
            CHECK(until(s, &shared->outcomes, 9));
            REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, &options, &futures[0]), TPRPC_OK);
            CHECK_EQ_INT(tprpc_future_cancel(futures[0]), TPRPC_OK);
        }
        CHECK(until(s, &shared->seen, 4));
        if (round < 3) let_go(s);
        else for (int i = 1; i < 4; i++) CHECK_EQ_INT(tprpc_future_cancel(futures[i]), TPRPC_OK);
        for (int i = 0; i < 4; i++) {
            CHECK_EQ_INT(tprpc_future_wait(futures[i], WAIT_MS), round == 3 ? TPRPC_ERROR_CANCELLED : TPRPC_OK);
            tprpc_future_release(futures[i]);
        }
        CHECK(until(s, &shared->outcomes, round == 3 ? 13 : round * 4));
        CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    }
    CHECK_EQ_INT(stats_of(s).client_active_calls, 0);
    STORE(&shared->stop, 1);
}
IN_MODES(fifth_call, ALL_MODES) { pair_of(with, call_too_often, caller_has_four); }

static void ask_too_often(side *s) {
    static uint8_t bytes[300000];
    const tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_call_options options = {0};
    tprpc_future futures[4];
    tprpc_error error;
    int released = 0;
    options.on_done = count_done;
    for (int round = 1; round <= 3; round++) {
        for (int i = 0; i < 4; i++) {
            tprpc_message message = tensors_of(&tensor, (size_t)(round % 2));
            REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "hold", &message, &options, &futures[i]), TPRPC_OK);
        }
        CHECK(until(s, &shared->seen, 4));
        for (int i = 0; i < 6; i++) {
            tprpc_message message = tensors_of(&tensor, (size_t)(i % 2));
            message.release = count_release;
            message.release_user = &released;
            memset(&error, 0, sizeof error);
            CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, NULL, &error), TPRPC_ERROR_LIMIT);
            CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
            CHECK_CONTAINS(error.text, "bob");
            CHECK_CONTAINS(error.text, "too many");
        }
        CHECK_EQ_INT(LOAD(&shared->handled), 3 * (round - 1));
        let_go(s);
        CHECK_EQ_INT(tprpc_future_wait_all(futures, 4, WAIT_MS), TPRPC_OK);
        for (int i = 0; i < 4; i++) tprpc_future_release(futures[i]);
        for (int i = 0; i < 3; i++) {
            tprpc_message message = tensors_of(&tensor, (size_t)(i % 2));
            CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, NULL, NULL), TPRPC_OK);
        }
    }
    for (int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000; LOAD(&released) < 18 && test_now_us() < end;)
        tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(LOAD(&released), 18);
    STORE(&shared->stop, 1);
}
IN_MODES(fifth_request, ALL_MODES) { pair_of(with, ask_too_often, server_has_four); }

/* ---- an answer beyond the caller's limit ---- */

static void caller_takes_little(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s->rank == 0) context->limits.message_bytes = context->limits.metadata_bytes = SMALL_LIMIT;
    else context->limits.metadata_bytes = 16 * SMALL_LIMIT;
}

static void ask_for_much(side *s) {
    static const char *const what[] = {"tensor", "body", "less"};
    for (int i = 0; i < 9; i++) {
        tprpc_message message = text_of(what[i % 3]);
        tprpc_error error = {0};
        STORE(&shared->released, 0);
        CHECK_EQ_INT(call_and_wait(s, "bob", "much", &message, NULL, &error),
                     i % 3 == 2 ? TPRPC_OK : TPRPC_ERROR_REMOTE);
        if (i % 3 != 2) {
            CHECK_EQ_INT(error.user_code, 77);
            CHECK_STR(error.text, "too much to say");
        }
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    STORE(&shared->stop, 1);
}
IN_MODES(too_large_an_answer, ALL_MODES) { pair_of(with, ask_for_much, caller_takes_little); }

/* ---- waits in callbacks that need each other ---- */

enum { MIRRORS = 8 };

/* All handlers of all workers wait for a call back to their callers, on every loop at once. */
static void mirror_each_other(side *s) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    tprpc_future futures[3 * MIRRORS];
    for (int round = 0; round < 20 / (TEST_TSAN ? 4 : 1); round++) {
        int count = 0;
        for (int i = 0; i < MIRRORS; i++)
            for (int k = 0; k < 3; k++)
                REQUIRE_EQ_INT(tprpc_call(s->agent, names[k], "mirror", NULL, NULL, &futures[count++]), TPRPC_OK);
        CHECK_EQ_INT(tprpc_future_wait_all(futures, (size_t)count, WAIT_MS), TPRPC_OK);
        for (int i = 0; i < count; i++) tprpc_future_release(futures[i]);
    }
}

static void nest_deep(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->limits.nesting = 1000;
    if (context->threads) context->threads = 3;
}

IN_MODES(callbacks_wait_for_each_other, 0xff) {
    side sides[3] = {{0}};
    for (int i = 0; i < 3; i++) {
        sides[i].methods = methods;
        sides[i].main = mirror_each_other;
        sides[i].tune = nest_deep;
    }
    sides[0].mode = with;
    group_run(sides, 3);
}

/* ---- no descriptors ---- */

static void set_descriptors(rlim_t count) {
    struct rlimit limit;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    limit.rlim_cur = count;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

/* A group of one that comes to be with that many descriptors: in a context of its own, or in ctx. Each failure is told as
   one of descriptors, and nothing is left open. Returns whether it came to be. */
static bool start_with(tprpc_context *ctx, const char *url, int more, rlim_t usual) {
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    const char *step = "create";
    const int before = test_count_fds();
    desc.context = ctx;
    desc.name = "ann";
    desc.init_method = url;
    desc.world_size = 1;
    desc.start_timeout_ms = 300;
    set_descriptors((rlim_t)(before + more));
    tprpc_status status = tprpc_agent_create(&desc, &agent, &error);
    if (status == TPRPC_OK) {
        step = "start";
        status = tprpc_agent_start(agent, NULL, NULL, &error);
    }
    if (status == TPRPC_OK) {
        step = "wait";
        status = tprpc_agent_wait_ready(agent, 0, &error);
    }
    if (status == TPRPC_OK) {
        step = "call";
        tprpc_method_desc echo = methods[0];
        tprpc_call_options options = {0};
        tprpc_future future;
        options.error = &error;
        options.timeout_ms = 300;
        CHECK_EQ_INT(tprpc_agent_register(agent, &echo, NULL), TPRPC_OK);
        status = tprpc_call(agent, "ann", "echo", NULL, &options, &future);
        if (status == TPRPC_OK) {
            status = tprpc_future_wait(future, WAIT_MS);
            tprpc_future_error(future, &error);
            tprpc_future_release(future);
        }
    }
    set_descriptors(usual);
    if (status != TPRPC_OK) {
        fprintf(stderr, "%s with %d: %s: %s: %s\n", url, more, step, tprpc_status_name(status), error.text);
        CHECK(error.text[0] != 0);
        CHECK_EQ_INT(error.status, status);
        /* A call may wait in vain to be accepted, or be told that its other end has none to look at it with. */
        CHECK(status == TPRPC_ERROR_LIMIT || status == TPRPC_ERROR_UNSUPPORTED ||
              (strcmp(step, "call") == 0 && status == TPRPC_ERROR_TIMEOUT) ||
              (strcmp(step, "call") == 0 && status == TPRPC_ERROR_PEER && strstr(error.text, "open files")));
    }
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    return status == TPRPC_OK;
}

static void run_out(bool own_context, const char *transports, const char *kind) {
    struct rlimit limit;
    tprpc_context_desc context = {0};
    tprpc_context *ctx = NULL;
    heap h = {0};
    int more = 0, good = 0;
    char url[300], path[250];
    share();
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    context.allocator.alloc = heap_alloc;
    context.allocator.free = heap_free;
    context.allocator.user = &h;
    context.transports = transports;
    for (; more < 100 && good < 3; more++) {
        const int before = test_count_fds();
        if (!own_context) REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
        if (strcmp(kind, "tcp") == 0) snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
        else snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
        good += start_with(ctx, url, more, limit.rlim_cur);
        if (ctx) CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
        CHECK_EQ_INT(h.blocks, 0);
        CHECK_EQ_INT(test_count_fds(), before);
    }
    CHECK_EQ_INT(good, 3);
    CHECK(more > 4);
}
TEST(no_descriptors_own_context) { run_out(true, NULL, "tcp"); }
TEST(no_descriptors_tcp_store) { run_out(false, "tcp", "tcp"); }
TEST(no_descriptors_file_store) { run_out(false, NULL, "file"); }

/* bob has no descriptor to accept ann with, and serves her once he has. */
static void call_the_full(side *s) {
    tprpc_future future;
    CHECK(until(s, &shared->count[0], 1));
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "echo", NULL, NULL, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, 200), TPRPC_PENDING);
    STORE(&shared->count[1], 1);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    tprpc_future_release(future);
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    STORE(&shared->stop, 1);
}

static void be_full(side *s) {
    struct rlimit limit;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    set_descriptors(3);
    STORE(&shared->count[0], 1);
    CHECK(until(s, &shared->count[1], 1));
    set_descriptors(limit.rlim_cur);
    serve_until_stop(s);
}

IN_MODES(no_descriptor_to_accept_with, APART_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = call_the_full;
    sides[1].main = be_full;
    sides[1].methods = methods;
    group_run(sides, 2);
}
