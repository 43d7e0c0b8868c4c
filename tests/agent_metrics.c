/* What an agent counts and measures: exactly, by method and by peer, on a clock that stands still unless it is moved;
   the same as pairs and as Prometheus's page, read by a strict parser; and read while threads call and register. */
#include "agent_two.h"

/* ---- a clock of the test's, and an engine's queue of jobs ---- */

static int64_t now_us;                 /* of both agents */
static void (*job_run[64])(void *);
static void *job_arg[64];
static int job_count;

static int64_t still_clock(void *user) {
    (void)user;
    return LOAD(&now_us);
}

static bool keep_job(void (*run)(void *), void *arg, void *user) {
    (void)user;
    REQUIRE(job_count < 64);
    job_run[job_count] = run;
    job_arg[job_count++] = arg;
    return true;
}

static void run_jobs(void) {
    for (int i = 0; i < job_count; i++) job_run[i](job_arg[i]);
    job_count = 0;
}

static bool measure = true;            /* what the agents are asked for */
static int pool;

static void with_metrics(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s;
    agent->metrics = measure;
    agent->worker_threads = pool;
    if (!two_kind->threads) {
        now_us = 1000000;
        context->clock_us = still_clock;
        if (!pool) context->submit = keep_job;
    }
}

/* ---- methods ---- */

enum { KEPT = 16 };
static tprpc_request kept[KEPT];
static int kept_count, take_us;

static void on_fail(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    tprpc_fail(request, 7, "as asked");
}

static void on_silent(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request; (void)message; (void)user;
}

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    REQUIRE(kept_count < KEPT);
    kept[kept_count] = request;
    ADD(&kept_count, 1);
    ADD(&now_us, take_us);
}

static void on_slow(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&now_us, take_us);
    ADD(&shared->handled, 1);
    tprpc_reply(request, message);
    ADD(&now_us, 1);                   /* to the end of the handler, not to its answer */
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {"fail", on_fail, NULL, NULL, NULL, 0},
    {"silent", on_silent, NULL, NULL, NULL, 0},
    {"keep", on_keep, NULL, NULL, NULL, 0},
    {"slow", on_slow, NULL, NULL, NULL, 0},
    {"job", on_slow, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING},
    {"quo\"te\\d", on_echo, NULL, NULL, NULL, 0},
    {0},
};

static tprpc_method_stats method_of(const side *s, const char *name) {
    tprpc_method_stats stats;
    memset(&stats, 0, sizeof stats);
    REQUIRE_EQ_INT(tprpc_agent_get_method_stats(s->agent, name, &stats, sizeof stats), TPRPC_OK);
    CHECK_STR(stats.name, name);
    return stats;
}

static tprpc_peer_stats peer_of(const side *s, const char *name) {
    tprpc_peer_stats stats;
    memset(&stats, 0, sizeof stats);
    REQUIRE_EQ_INT(tprpc_agent_get_peer_stats(s->agent, name, &stats, sizeof stats), TPRPC_OK);
    CHECK_STR(stats.name, name);
    return stats;
}

static void call_done(const char *method, const tprpc_message *message, uint32_t flags, tprpc_status expected) {
    tprpc_call_options options = {0};
    outcome o = {0};
    options.flags = flags;
    CHECK_EQ_INT(call(&two[0], "bob", method, message, &options, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, expected);
}

static void check_calls(const char *method, uint64_t calls, uint64_t failed, uint64_t timed_out, uint64_t cancelled,
                        uint64_t active) {
    const tprpc_method_stats stats = method_of(&two[0], method);
    CHECK_EQ_INT(stats.calls, calls);
    CHECK_EQ_INT(stats.calls_failed, failed);
    CHECK_EQ_INT(stats.calls_timed_out, timed_out);
    CHECK_EQ_INT(stats.calls_cancelled, cancelled);
    CHECK_EQ_INT(stats.client_active_calls, active);
    CHECK_EQ_INT(stats.requests + stats.server_active_calls + stats.requests_failed, 0);
    CHECK_EQ_INT(stats.call_time.count, measure ? calls - active : 0);
    CHECK_EQ_INT(stats.queue_time.count + stats.handler_time.count, 0);
}

static void check_requests(const char *method, uint64_t requests, uint64_t failed, uint64_t active) {
    tprpc_method_stats stats = method_of(&two[1], method);
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (measure && stats.handler_time.count < requests - active && test_now_us() < end) {   /* it returns later */
        turn();
        stats = method_of(&two[1], method);
    }
    CHECK_EQ_INT(stats.requests, requests);
    CHECK_EQ_INT(stats.requests_failed, failed);
    CHECK_EQ_INT(stats.server_active_calls, active);
    CHECK_EQ_INT(stats.calls + stats.client_active_calls + stats.calls_failed, 0);
    CHECK_EQ_INT(stats.queue_time.count, measure ? requests : 0);
    CHECK_EQ_INT(stats.handler_time.count, measure ? requests - active : 0);
    CHECK_EQ_INT(stats.call_time.count, 0);
}

/* The sums over all methods and over all peers are the agent's own. */
static void check_sums(side *s, uint64_t unknown) {
    tprpc_method_stats method[32];
    tprpc_peer_stats peer[8];
    const tprpc_stats all = stats_of(s);
    tprpc_stats sum = {0};
    size_t count = tprpc_agent_get_methods(s->agent, method, 32, sizeof method[0]);
    REQUIRE_LE_INT(count, 32);
    for (size_t i = 0; i < count; i++) {
        sum.calls += method[i].calls;
        sum.calls_failed += method[i].calls_failed;
        sum.calls_timed_out += method[i].calls_timed_out;
        sum.calls_cancelled += method[i].calls_cancelled;
        sum.client_active_calls += method[i].client_active_calls;
        sum.requests += method[i].requests;
        sum.requests_failed += method[i].requests_failed;
        sum.server_active_calls += method[i].server_active_calls;
    }
    CHECK_EQ_INT(sum.calls, all.calls);
    CHECK_EQ_INT(sum.calls_failed, all.calls_failed);
    CHECK_EQ_INT(sum.calls_timed_out, all.calls_timed_out);
    CHECK_EQ_INT(sum.calls_cancelled, all.calls_cancelled);
    CHECK_EQ_INT(sum.client_active_calls, all.client_active_calls);
    CHECK_EQ_INT(sum.requests + unknown, all.requests);     /* of a method that is not there */
    CHECK_EQ_INT(sum.requests_failed + unknown, all.requests_failed);
    CHECK_EQ_INT(sum.server_active_calls, all.server_active_calls);
    memset(&sum, 0, sizeof sum);
    uint64_t errors = 0;
    count = tprpc_agent_get_peers(s->agent, peer, 8, sizeof peer[0]);
    REQUIRE_EQ_INT(count, 2);          /* oneself is one */
    for (size_t i = 0; i < count; i++) {
        sum.calls += peer[i].to.calls;
        sum.requests += peer[i].from.calls;
        errors += peer[i].to.errors + peer[i].from.errors;
        sum.client_active_calls += peer[i].to.active_calls;
        sum.server_active_calls += peer[i].from.active_calls;
        sum.bytes_sent += peer[i].to.bytes_sent + peer[i].from.bytes_sent;
        sum.bytes_received += peer[i].to.bytes_received + peer[i].from.bytes_received;
        sum.tensor_bytes_sent += peer[i].to.tensor_bytes_sent + peer[i].from.tensor_bytes_sent;
        sum.tensor_bytes_received += peer[i].to.tensor_bytes_received + peer[i].from.tensor_bytes_received;
        sum.pipes += (uint32_t)(peer[i].to.pipes_open + peer[i].from.pipes_open);
    }
    CHECK_EQ_INT(sum.calls, all.calls);
    CHECK_EQ_INT(sum.requests, all.requests);
    CHECK_EQ_INT(errors, all.calls_failed + all.requests_failed);
    CHECK_EQ_INT(sum.client_active_calls, all.client_active_calls);
    CHECK_EQ_INT(sum.server_active_calls, all.server_active_calls);
    CHECK_EQ_INT(sum.bytes_sent, all.bytes_sent);
    CHECK_EQ_INT(sum.bytes_received, all.bytes_received);
    CHECK_EQ_INT(sum.tensor_bytes_sent, all.tensor_bytes_sent);
    CHECK_EQ_INT(sum.tensor_bytes_received, all.tensor_bytes_received);
    CHECK_EQ_INT(sum.pipes, all.pipes);
}

/* ---- counts ---- */

/* Calls of each kind, as many as the checks below say; three of "keep" are left kept, one of them active here. */
static outcome waiting;

static void make_calls(void) {
    static uint8_t bytes[1 << 16];
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_message message = tensors_of(&tensor, 1), wrong = {0};
    tprpc_payload payload = {bytes, 1, NULL, 0};
    tprpc_call_options options = {0};
    tprpc_future future;
    outcome timed_out = {0};
    wrong.payloads = &payload;
    wrong.payload_count = 1;
    for (int i = 0; i < 5; i++) call_done("echo", i < 2 ? &message : NULL, 0, TPRPC_OK);
    for (int i = 0; i < 2; i++) call_done("fail", NULL, 0, TPRPC_ERROR_REMOTE);
    call_done("silent", NULL, 0, TPRPC_ERROR_REMOTE);
    call_done("nothing", NULL, 0, TPRPC_ERROR_NO_METHOD);
    for (int i = 0; i < 3; i++) call_done("echo", NULL, TPRPC_CALL_ONE_WAY, TPRPC_OK);
    CHECK(both_until(&shared->handled, 8));
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", &wrong, NULL, NULL), TPRPC_ERROR_INVALID);   /* not counted */
    options.timeout_ms = 50;
    CHECK_EQ_INT(call(&two[0], "bob", "keep", NULL, &options, &timed_out), TPRPC_OK);
    CHECK(both_until(&kept_count, 1));
    ADD(&now_us, 60000);
    CHECK(both_until(&timed_out.count, 1));
    CHECK_EQ_INT(timed_out.status, TPRPC_ERROR_TIMEOUT);
    REQUIRE_EQ_INT(tprpc_call(two[0].agent, "bob", "keep", NULL, NULL, &future), TPRPC_OK);
    CHECK(both_until(&kept_count, 2));
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    tprpc_future_release(future);
    memset(&waiting, 0, sizeof waiting);
    CHECK_EQ_INT(call(&two[0], "bob", "keep", NULL, NULL, &waiting), TPRPC_OK);
    CHECK(both_until(&kept_count, 3));
}

static bool rests(void) {
    const tprpc_stats a = stats_of(&two[0]), b = stats_of(&two[1]);
    return a.bytes_sent == b.bytes_received && a.bytes_received == b.bytes_sent && b.requests == a.calls;
}

static void counts(const kind *with) {
    tprpc_method_stats stats;
    tprpc_peer_stats peer;
    tprpc_flow to, from;
    two_tune = with_metrics;
    two_join(with, methods);
    CHECK_EQ_INT(tprpc_agent_get_methods(two[0].agent, NULL, 0, sizeof stats), 7);   /* registered, if never called */
    make_calls();
    check_calls("echo", 8, 0, 0, 0, 0);
    check_calls("fail", 2, 2, 0, 0, 0);
    check_calls("silent", 1, 1, 0, 0, 0);
    check_calls("nothing", 1, 1, 0, 0, 0);
    check_calls("keep", 3, 2, 1, 1, 1);
    check_calls("slow", 0, 0, 0, 0, 0);
    check_requests("fail", 2, 2, 0);
    check_requests("silent", 1, 1, 0);
    check_requests("keep", 3, 0, 3);
    CHECK_EQ_INT(tprpc_agent_get_method_stats(two[1].agent, "nothing", &stats, sizeof stats), TPRPC_ERROR_NO_METHOD);
    CHECK_EQ_INT(tprpc_agent_get_method_stats(two[0].agent, "never", &stats, sizeof stats), TPRPC_ERROR_NO_METHOD);
    CHECK_EQ_INT(tprpc_agent_get_method_stats(two[0].agent, "bob", &stats, sizeof stats), TPRPC_ERROR_NO_METHOD);
    CHECK_EQ_INT(tprpc_agent_get_peer_stats(two[0].agent, "echo", &peer, sizeof peer), TPRPC_ERROR_NO_WORKER);
    CHECK_EQ_INT(tprpc_agent_get_peer_stats(two[0].agent, "cyd", &peer, sizeof peer), TPRPC_ERROR_NO_WORKER);
    CHECK_EQ_INT(tprpc_agent_get_method_stats(two[0].agent, "echo", &stats, sizeof stats - 1), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_get_peer_stats(two[0].agent, "bob", &peer, sizeof peer + 8), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_get_methods(two[0].agent, &stats, 1, 8), 0);
    CHECK_EQ_INT(tprpc_agent_get_peers(two[0].agent, &peer, 1, 8), 0);
    CHECK_EQ_INT(tprpc_agent_get_methods(two[0].agent, &stats, 1, sizeof stats), 8);   /* in order; no more than room */
    CHECK_STR(stats.name, "echo");
    for (int i = 0; i < 3; i++) tprpc_reply(kept[i], NULL);
    CHECK(both_until(&waiting.count, 1));
    CHECK_EQ_INT(waiting.status, TPRPC_OK);
    check_calls("keep", 3, 2, 1, 1, 0);
    check_requests("keep", 3, 0, 0);
    for (int64_t end = test_now_us() + 10000000; !rests() && test_now_us() < end;) turn();
    check_requests("echo", 8, 0, 0);   /* by now the one-way ones are over, too */
    check_sums(&two[0], 0);
    check_sums(&two[1], 1);
    to = peer_of(&two[0], "bob").to;
    from = peer_of(&two[1], "ann").from;
    CHECK_EQ_INT(to.calls, 15);
    CHECK_EQ_INT(to.errors, 6);
    CHECK_EQ_INT(to.pipes, 1);
    CHECK_EQ_INT(to.pipes_open, 1);
    CHECK_EQ_INT(to.tensor_bytes_sent, 2 << 16);
    CHECK_EQ_INT(to.tensor_bytes_received, 2 << 16);
    CHECK_EQ_INT(from.calls, 15);
    CHECK_EQ_INT(from.errors, 4);      /* fail, silent, nothing */
    CHECK_EQ_INT(from.pipes, 1);
    CHECK_EQ_INT(from.pipes_open, 1);
    CHECK_EQ_INT(from.bytes_received, to.bytes_sent);
    CHECK_EQ_INT(from.bytes_sent, to.bytes_received);
    CHECK_EQ_INT(from.tensor_bytes_received, 2 << 16);
    CHECK_EQ_INT(peer_of(&two[0], "bob").from.calls + peer_of(&two[1], "ann").to.calls, 0);
    two_close();
}

IN_KINDS(counts, EVERY) { counts(with); }
IN_KINDS(counts_without_times, TWO) {
    measure = false;
    counts(with);
}

/* What is refused at once was no call, also where that is seen only as it is sent. */
static void little_room(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    with_metrics(s, context, agent);
    context->limits.inflight_bytes = 64 << 10;
}

IN_KINDS(refused_calls_do_not_count, POLLED) {
    static uint8_t bytes[1 << 20];
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_message large = tensors_of(&tensor, 1);
    two_tune = little_room;
    two_join(with, methods);
    call_done("echo", NULL, 0, TPRPC_OK);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", &large, NULL, NULL), TPRPC_ERROR_LIMIT);
    check_calls("echo", 1, 0, 0, 0, 0);
    CHECK_EQ_INT(peer_of(&two[0], "bob").to.calls, 1);
    CHECK_EQ_INT(peer_of(&two[0], "bob").to.active_calls, 0);
    two_close();
}

/* Pipes that end: their bytes stay, and calls that were under way are errors. */
IN_KINDS(counts_outlive_pipes, POLLED) {
    tprpc_flow before, after;
    two_tune = with_metrics;
    two_join(with, methods);
    call_done("echo", NULL, 0, TPRPC_OK);
    memset(&waiting, 0, sizeof waiting);
    CHECK_EQ_INT(call(&two[0], "bob", "keep", NULL, NULL, &waiting), TPRPC_OK);
    CHECK(both_until(&kept_count, 1));
    before = peer_of(&two[0], "bob").to;
    CHECK_EQ_INT(before.active_calls, 1);
    end_agent(&two[1]);
    CHECK(both_until(&waiting.count, 1));
    CHECK_EQ_INT(waiting.status, TPRPC_ERROR_PEER);
    after = peer_of(&two[0], "bob").to;
    CHECK_EQ_INT(after.active_calls, 0);
    CHECK_EQ_INT(after.calls, 2);
    CHECK_EQ_INT(after.errors, 1);
    CHECK_EQ_INT(after.pipes, 1);
    CHECK_EQ_INT(after.pipes_open, 0);
    CHECK(after.bytes_sent >= before.bytes_sent && after.bytes_received >= before.bytes_received);
    CHECK(before.bytes_sent > 0 && before.bytes_received > 0);
    check_calls("keep", 1, 1, 0, 0, 0);
    two_close();
}

IN_KINDS(counts_outlive_callers, POLLED) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    tprpc_flow before, after;
    two_tune = with_metrics;
    two_join(with, methods);
    call_done("echo", NULL, 0, TPRPC_OK);
    memset(&waiting, 0, sizeof waiting);
    CHECK_EQ_INT(call(&two[0], "bob", "keep", NULL, NULL, &waiting), TPRPC_OK);
    CHECK(both_until(&kept_count, 1));
    before = peer_of(&two[1], "ann").from;
    end_agent(&two[0]);
    while (peer_of(&two[1], "ann").from.pipes_open && test_now_us() < end) turn();
    after = peer_of(&two[1], "ann").from;
    CHECK_EQ_INT(after.pipes, 1);
    CHECK_EQ_INT(after.pipes_open, 0);
    CHECK_EQ_INT(after.calls, 2);
    CHECK_EQ_INT(after.active_calls, 1);   /* it is still kept */
    CHECK(after.bytes_sent >= before.bytes_sent && after.bytes_received >= before.bytes_received);
    tprpc_reply(kept[0], NULL);
    before = after;
    after = peer_of(&two[1], "ann").from;   /* with the last request the pipe's record has gone */
    CHECK_EQ_INT(after.active_calls, 0);
    CHECK_EQ_INT(after.calls, 2);
    CHECK_EQ_INT(after.errors, 0);
    CHECK_EQ_INT(after.pipes, 1);
    CHECK_EQ_INT(after.bytes_sent, before.bytes_sent);
    CHECK_EQ_INT(after.bytes_received, before.bytes_received);
    check_requests("keep", 1, 0, 0);
    two_close();
}

/* Names are counted on when their method is registered again, and while it is not. */
IN_KINDS(counts_outlive_methods, ONE) {
    two_tune = with_metrics;
    two_join(with, methods);
    call_done("echo", NULL, 0, TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_unregister(two[1].agent, "echo", NULL), TPRPC_OK);
    call_done("echo", NULL, 0, TPRPC_ERROR_NO_METHOD);
    check_requests("echo", 1, 0, 0);
    CHECK_EQ_INT(tprpc_agent_register(two[1].agent, &methods[0], NULL), TPRPC_OK);
    call_done("echo", NULL, 0, TPRPC_OK);
    check_requests("echo", 2, 0, 0);
    check_calls("echo", 3, 1, 0, 0, 0);
    two_close();
}

/* ---- times: the clock stands still but for what is said here ---- */

IN_KINDS(times, POLLED) {
    outcome o = {0};
    tprpc_times t;
    two_tune = with_metrics;
    two_join(with, methods);
    take_us = 300;
    call_done("slow", NULL, 0, TPRPC_OK);
    t = method_of(&two[1], "slow").handler_time;
    CHECK(t.count == 1 && t.sum_us == 301 && t.max_us == 301 && t.p50_us == 301 && t.p99_us == 301);
    CHECK(t.average_us > 300.9 && t.average_us < 301.1);
    t = method_of(&two[1], "slow").queue_time;
    CHECK(t.count == 1 && t.sum_us == 0 && t.max_us == 0);
    t = method_of(&two[0], "slow").call_time;
    CHECK(t.count == 1 && t.sum_us == 301);

    CHECK_EQ_INT(call(&two[0], "bob", "job", NULL, NULL, &o), TPRPC_OK);   /* waits for the engine */
    ADD(&now_us, 5000);                /* on its way */
    for (int i = 0; !job_count && i < 1000; i++) tprpc_poll(two[1].ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(stats_of(&two[1]).queued_jobs, 1);
    CHECK_EQ_INT(stats_of(&two[1]).thread_pool_size, 0);
    ADD(&now_us, 700);
    run_jobs();
    CHECK_EQ_INT(stats_of(&two[1]).queued_jobs, 0);
    CHECK(both_until(&o.count, 1));
    t = method_of(&two[1], "job").queue_time;
    CHECK(t.count == 1 && t.sum_us == 700 && t.max_us == 700 && t.p90_us == 700);
    t = method_of(&two[1], "job").handler_time;
    CHECK(t.count == 1 && t.sum_us == 301);
    t = method_of(&two[0], "job").call_time;
    CHECK(t.count == 1 && t.sum_us == 6001);

    CHECK_EQ_INT(call(&two[0], "bob", "keep", NULL, NULL, &o), TPRPC_OK);   /* until it is answered */
    CHECK(both_until(&kept_count, 1));
    ADD(&now_us, 2000);
    CHECK_EQ_INT(method_of(&two[1], "keep").handler_time.count, 0);
    CHECK_EQ_INT(tprpc_reply(kept[0], NULL), TPRPC_OK);
    ADD(&now_us, 4000);
    t = method_of(&two[1], "keep").handler_time;
    CHECK(t.count == 1 && t.sum_us == 2300);
    CHECK(both_until(&o.count, 2));
    t = method_of(&two[0], "keep").call_time;
    CHECK(t.count == 1 && t.sum_us == 6300);

    for (take_us = 0; take_us < 100; take_us++) call_done("slow", NULL, 0, TPRPC_OK);   /* 1 to 100 us, and 301 */
    t = method_of(&two[1], "slow").handler_time;
    CHECK(t.count == 101 && t.sum_us == 5050 + 301 && t.max_us == 301);
    CHECK(t.p50_us >= 51 && t.p50_us * 8 < 51 * 9);
    CHECK(t.p90_us >= 91 && t.p90_us * 8 < 91 * 9);
    CHECK(t.p99_us >= 100 && t.p99_us * 8 < 100 * 9);
    two_close();
}

/* ---- the pool ---- */

static int may_end;

static void on_stay(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    while (!LOAD(&may_end)) test_sleep_us(100);
    tprpc_reply(request, message);
}

static const tprpc_method_desc stay_methods[] = {{"stay", on_stay, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {0}};

IN_KINDS(pool, TWO) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    outcome o = {0};
    tprpc_stats stats;
    pool = 3;
    two_tune = with_metrics;
    two_join(with, stay_methods);
    stats = stats_of(&two[1]);
    CHECK(stats.thread_pool_size == 3 && stats.num_idle_threads == 3 && stats.queued_jobs == 0);
    CHECK_EQ_INT(call(&two[0], "bob", "stay", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&shared->handled, 1));
    stats = stats_of(&two[1]);
    CHECK(stats.thread_pool_size == 3 && stats.num_idle_threads == 2 && stats.queued_jobs == 0);
    for (int i = 0; i < 4; i++) CHECK_EQ_INT(call(&two[0], "bob", "stay", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&shared->handled, 3));
    while (stats_of(&two[1]).queued_jobs < 2 && test_now_us() < end) turn();
    stats = stats_of(&two[1]);
    CHECK(stats.thread_pool_size == 3 && stats.num_idle_threads == 0 && stats.queued_jobs == 2);
    STORE(&may_end, 1);
    CHECK(both_until(&o.count, 5));
    while (stats_of(&two[1]).num_idle_threads < 3 && test_now_us() < end) turn();   /* a job ends after its answer */
    stats = stats_of(&two[1]);
    CHECK(stats.thread_pool_size == 3 && stats.num_idle_threads == 3 && stats.queued_jobs == 0);
    two_close();
}

/* ---- as pairs ---- */

typedef struct pair { char name[300]; double value; } pair;
static pair pairs[2000];
static int pair_count;

static void on_pair(const char *name, double value, void *user) {
    (void)stats_of((side *)user);      /* no lock is held */
    REQUIRE(pair_count < 2000);
    snprintf(pairs[pair_count].name, sizeof pairs[0].name, "%s", name);
    pairs[pair_count++].value = value;
}

static double pair_value(const char *name) {
    int found = 0;
    double value = -1;
    for (int i = 0; i < pair_count; i++) {
        if (strcmp(pairs[i].name, name) != 0) continue;
        found++;
        value = pairs[i].value;
    }
    if (found != 1) fprintf(stderr, "%s: %d times\n", name, found);
    CHECK_EQ_INT(found, 1);
    return value;
}

#define CHECK_PAIR(name, value) CHECK((uint64_t)pair_value(name) == (value))

static void check_pairs(side *s) {
    const tprpc_stats stats = stats_of(s);
    const tprpc_method_stats slow = method_of(s, "slow"), quoted = method_of(s, "quo\"te\\d");
    const tprpc_peer_stats peer = peer_of(s, s->rank ? "ann" : "bob");
    pair_count = 0;
    tprpc_agent_each_metric(s->agent, on_pair, s);
    for (int i = 0; i < pair_count; i++) pair_value(pairs[i].name);   /* each once */
    CHECK_PAIR("agent.client_active_calls", stats.client_active_calls);
    CHECK_PAIR("agent.calls", stats.calls);
    CHECK_PAIR("agent.requests", stats.requests);
    CHECK_PAIR("agent.workers", stats.workers);
    CHECK_PAIR("agent.thread_pool_size", stats.thread_pool_size);
    CHECK_PAIR("agent.queued_jobs", stats.queued_jobs);
    CHECK_PAIR("method.slow.calls", slow.calls);
    CHECK_PAIR("method.slow.requests", slow.requests);
    CHECK_PAIR("method.quo\"te\\d.calls", quoted.calls);
    CHECK_PAIR(s->rank ? "peer.ann.to.calls" : "peer.bob.to.calls", peer.to.calls);
    CHECK_PAIR(s->rank ? "peer.ann.from.calls" : "peer.bob.from.calls", peer.from.calls);
    CHECK_PAIR(s->rank ? "peer.ann.from.bytes_sent" : "peer.bob.from.bytes_sent", peer.from.bytes_sent);
    if (measure) {
        CHECK_PAIR("method.slow.handler_time.count", slow.handler_time.count);
        CHECK_PAIR("method.slow.handler_time.p99_us", slow.handler_time.p99_us);
        CHECK_PAIR("method.slow.call_time.sum_us", slow.call_time.sum_us);
        CHECK_PAIR("method.slow.call_time.max_us", slow.call_time.max_us);
        CHECK(pair_value("method.slow.call_time.average_us") == slow.call_time.average_us);
        CHECK_PAIR("method.slow.queue_time.p50_us", slow.queue_time.p50_us);
    }
}

/* ---- as Prometheus's page: a parser that takes its format 0.0.4 as we may write it, and nothing else ---- */

typedef struct sample { char key[600]; char value[40]; } sample;   /* key: the name and the labels, unescaped */
static sample samples[4000];
static int sample_count;

static size_t name_length(const char *at) {
    size_t n = 0;
    while ((at[n] >= 'a' && at[n] <= 'z') || (n && at[n] >= '0' && at[n] <= '9') || at[n] == '_') n++;
    return n;
}

static bool ends_in(const char *text, size_t size, const char *end) {
    const size_t n = strlen(end);
    return size >= n && memcmp(text + size - n, end, n) == 0;
}

/* Labels, from the brace on: appended to the key as name=value; each. Returns what follows them. */
static const char *parse_labels(const char *at, char *key, size_t room) {
    size_t used = strlen(key);
    REQUIRE(*at == '{');
    do {
        const size_t n = name_length(++at);
        REQUIRE(n > 0 && used + n + 2 < room);
        memcpy(key + used, at, n);
        used += n;
        at += n;
        REQUIRE(at[0] == '=' && at[1] == '"');
        key[used++] = '=';
        for (at += 2; *at != '"'; at++) {
            char c = *at;
            REQUIRE((uint8_t)c >= 0x20 && used + 2 < room);
            if (c == '\\') {
                c = *++at;
                REQUIRE(c == '\\' || c == '"' || c == 'n');
                if (c == 'n') c = '\n';
            }
            key[used++] = c;
        }
        key[used++] = ';';
        at++;
    } while (*at == ',');
    key[used] = 0;
    REQUIRE(*at == '}');
    return at + 1;
}

static void parse_sample(const char *line, const char *family, size_t family_size, const char *type) {
    sample *s = &samples[sample_count];
    const size_t n = name_length(line);
    const bool summary = strcmp(type, "summary") == 0;
    const bool part = summary && (ends_in(line, n, "_sum") || ends_in(line, n, "_count"));
    REQUIRE(sample_count < 4000);
    REQUIRE(memcmp(line, family, family_size) == 0);
    REQUIRE(part ? n == family_size + (ends_in(line, n, "_sum") ? 4u : 6u) : n == family_size);
    memcpy(s->key, line, n);
    s->key[n] = ' ';
    s->key[n + 1] = 0;
    const char *at = parse_labels(line + n, s->key, sizeof s->key);
    CHECK((strstr(s->key, "quantile=") != NULL) == (summary && !part));
    REQUIRE(*at == ' ');
    snprintf(s->value, sizeof s->value, "%s", at + 1);
    REQUIRE(s->value[0] >= '0' && s->value[0] <= '9');
    size_t digits = strspn(s->value, "0123456789");
    if (s->value[digits] == '.') digits += 1 + strspn(s->value + digits + 1, "0123456789");
    CHECK_EQ_INT(digits, strlen(s->value));
    for (int i = 0; i < sample_count; i++) REQUIRE(strcmp(samples[i].key, s->key) != 0);
    sample_count++;
}

static void parse_page(char *page) {
    static char families[200][100];
    char type[20] = "";
    int count = 0;
    size_t size = 0;
    sample_count = 0;
    REQUIRE(page[0] && page[strlen(page) - 1] == '\n');
    for (char *line = page, *end; *line; line = end + 1) {
        end = strchr(line, '\n');
        *end = 0;
        if (line[0] != '#') {
            REQUIRE(count > 0 && type[0]);
            parse_sample(line, families[count - 1], size, type);
            continue;
        }
        if (strncmp(line, "# HELP ", 7) == 0) {
            size = name_length(line + 7);
            REQUIRE(count < 200 && size < 100 && memcmp(line + 7, "tprpc_", 6) == 0 && line[7 + size] == ' ');
            REQUIRE(strlen(line + 7 + size) > 5 && !strchr(line, '\\'));
            snprintf(families[count], sizeof families[0], "%.*s", (int)size, line + 7);
            for (int i = 0; i < count; i++) REQUIRE(strcmp(families[i], families[count]) != 0);   /* stands together */
            count++;
            type[0] = 0;
        } else {
            REQUIRE(strncmp(line, "# TYPE ", 7) == 0 && count > 0 && !type[0]);
            REQUIRE(memcmp(line + 7, families[count - 1], size) == 0 && line[7 + size] == ' ');
            snprintf(type, sizeof type, "%s", line + 8 + size);
            REQUIRE(strcmp(type, "counter") == 0 || strcmp(type, "gauge") == 0 || strcmp(type, "summary") == 0);
            CHECK_EQ_INT(ends_in(line + 7, size, "_total"), strcmp(type, "counter") == 0);
            CHECK_EQ_INT(ends_in(line + 7, size, "_seconds"), strcmp(type, "summary") == 0);
        }
    }
}

static const char *sample_value(const char *key) {
    for (int i = 0; i < sample_count; i++) if (strcmp(samples[i].key, key) == 0) return samples[i].value;
    fprintf(stderr, "%s is missing\n", key);
    return "missing";
}

static void check_sample(const side *s, const char *name, const char *labels, uint64_t value) {
    char key[600], text[40];
    snprintf(key, sizeof key, "%s worker=%s;%s", name, s->name, labels);
    snprintf(text, sizeof text, "%llu", (unsigned long long)value);
    CHECK_STR(sample_value(key), text);
}

static void check_seconds(const side *s, const char *name, const char *labels, uint64_t us) {
    char key[600], text[40];
    snprintf(key, sizeof key, "%s worker=%s;%s", name, s->name, labels);
    snprintf(text, sizeof text, "%d.%06d", (int)(us / 1000000), (int)(us % 1000000));
    CHECK_STR(sample_value(key), text);
}

static void check_page(side *s) {
    static char page[200000], again[sizeof page];
    const tprpc_stats stats = stats_of(s);
    const tprpc_method_stats slow = method_of(s, "slow"), quoted = method_of(s, "quo\"te\\d");
    const tprpc_peer_stats peer = peer_of(s, s->rank ? "ann" : "bob");
    const size_t whole = tprpc_agent_prometheus(s->agent, page, sizeof page);
    REQUIRE(whole < sizeof page);
    CHECK_EQ_INT(whole, strlen(page));
    CHECK_EQ_INT(tprpc_agent_prometheus(s->agent, NULL, 0), whole);
    memset(again, 'x', sizeof again);
    CHECK_EQ_INT(tprpc_agent_prometheus(s->agent, again, 1000), whole);   /* cut, and ended */
    CHECK_EQ_INT(strlen(again), 999);
    CHECK_MEM(again, page, 999);
    CHECK_EQ_INT(again[1000], 'x');
    parse_page(page);
    check_sample(s, "tprpc_client_active_calls", "", stats.client_active_calls);
    check_sample(s, "tprpc_calls_total", "", stats.calls);
    check_sample(s, "tprpc_calls_failed_total", "", stats.calls_failed);
    check_sample(s, "tprpc_requests_total", "", stats.requests);
    check_sample(s, "tprpc_sent_bytes_total", "", stats.bytes_sent);
    check_sample(s, "tprpc_workers", "", stats.workers);
    check_sample(s, "tprpc_thread_pool_size", "", stats.thread_pool_size);
    check_sample(s, "tprpc_num_idle_threads", "", stats.num_idle_threads);
    check_sample(s, "tprpc_method_calls_total", "method=slow;", slow.calls);
    check_sample(s, "tprpc_method_requests_total", "method=slow;", slow.requests);
    check_sample(s, "tprpc_method_calls_total", "method=quo\"te\\d;", quoted.calls);
    const char *to = s->rank ? "peer=ann;direction=to;" : "peer=bob;direction=to;";
    const char *from = s->rank ? "peer=ann;direction=from;" : "peer=bob;direction=from;";
    check_sample(s, "tprpc_peer_calls_total", to, peer.to.calls);
    check_sample(s, "tprpc_peer_errors_total", to, peer.to.errors);
    check_sample(s, "tprpc_peer_sent_bytes_total", to, peer.to.bytes_sent);
    check_sample(s, "tprpc_peer_received_bytes_total", to, peer.to.bytes_received);
    check_sample(s, "tprpc_peer_calls_total", from, peer.from.calls);
    check_sample(s, "tprpc_peer_received_bytes_total", from, peer.from.bytes_received);
    check_sample(s, "tprpc_peer_pipes_open", from, peer.from.pipes_open);
    if (measure) {
        const char *name = s->rank ? "tprpc_method_handler_time_seconds" : "tprpc_method_call_time_seconds";
        const tprpc_times *t = s->rank ? &slow.handler_time : &slow.call_time;
        char part[100];
        CHECK(t->count > 0 && t->sum_us > 1000000);
        check_seconds(s, name, "method=slow;quantile=0.5;", t->p50_us);
        check_seconds(s, name, "method=slow;quantile=0.9;", t->p90_us);
        check_seconds(s, name, "method=slow;quantile=0.99;", t->p99_us);
        check_seconds(s, name, "method=slow;quantile=1;", t->max_us);
        snprintf(part, sizeof part, "%s_sum", name);
        check_seconds(s, part, "method=slow;", t->sum_us);
        snprintf(part, sizeof part, "%s_count", name);
        check_sample(s, part, "method=slow;", t->count);
    } else {
        for (int i = 0; i < sample_count; i++) CHECK(!strstr(samples[i].key, "_seconds"));
    }
}

static void pages(const kind *with) {
    two_tune = with_metrics;
    two_join(with, methods);
    take_us = 1234567;
    call_done("slow", NULL, 0, TPRPC_OK);
    for (take_us = 1; take_us < 100000; take_us *= 7) call_done("slow", NULL, 0, TPRPC_OK);
    call_done("quo\"te\\d", NULL, 0, TPRPC_OK);
    call_done("fail", NULL, 0, TPRPC_ERROR_REMOTE);
    for (int i = 0; i < 2; i++) check_page(&two[i]);
    for (int i = 0; i < 2; i++) check_pairs(&two[i]);
    two_close();
}

IN_KINDS(pages, POLLED) { pages(with); }
IN_KINDS(pages_without_times, ONE) {
    measure = false;
    pages(with);
}

/* ---- read while threads call, register and unregister ---- */

enum { CALLERS = 2, CALLS = 2000 / TEST_SLOWDOWN };
static int callers_done;

static void *call_on(void *arg) {
    const char *method = (const char *)arg;
    for (int i = 0; i < CALLS; i++) {
        CHECK_EQ_INT(call_and_wait(&two[0], "bob", method, NULL, NULL, NULL), TPRPC_OK);
        if (i % 16 == 0) {             /* a name that nobody has seen */
            char name[40];
            snprintf(name, sizeof name, "%s/%d", method, i);
            CHECK_EQ_INT(call_and_wait(&two[0], "bob", name, NULL, NULL, NULL), TPRPC_ERROR_NO_METHOD);
        }
    }
    ADD(&callers_done, 1);
    return NULL;
}

static void *register_on(void *arg) {
    (void)arg;
    for (int i = 0; LOAD(&callers_done) < CALLERS; i++) {
        char name[40];
        tprpc_method_desc method = {NULL, on_echo, NULL, NULL, NULL, 0};
        snprintf(name, sizeof name, "new/%d", i % 100);
        method.name = name;
        CHECK_EQ_INT(tprpc_agent_register(two[1].agent, &method, NULL), TPRPC_OK);
        call_and_wait(&two[0], "bob", name, NULL, NULL, NULL);
        CHECK_EQ_INT(tprpc_agent_unregister(two[1].agent, name, NULL), TPRPC_OK);
    }
    return NULL;
}

static void check_times(const tprpc_times *t, uint64_t most) {
    CHECK_LE_INT(t->count, most);
    CHECK(t->p50_us <= t->p90_us && t->p90_us <= t->p99_us && t->p99_us <= t->max_us);
    CHECK(t->max_us <= t->sum_us);
}

static void count_pair(const char *name, double value, void *user) {
    CHECK(name[0] && value >= 0);
    ++*(int *)user;
}

/* Nothing is counted twice, and no count goes back. */
static void read_all(side *s) {
    static tprpc_method_stats before[2][1000], now[1000];
    static size_t count_before[2];
    static char page[1 << 20];
    tprpc_peer_stats peer[8];
    int count_pairs = 0;
    const size_t count = tprpc_agent_get_methods(s->agent, now, 1000, sizeof now[0]);
    REQUIRE_LE_INT(count, 1000);
    CHECK_LE_INT(count_before[s->rank], count);
    for (size_t i = 0; i < count; i++) {
        const bool old = i < count_before[s->rank];
        CHECK_LE_INT(now[i].client_active_calls + now[i].calls_failed, now[i].calls);
        CHECK_LE_INT(now[i].server_active_calls + now[i].requests_failed, now[i].requests);
        check_times(&now[i].call_time, now[i].calls);
        check_times(&now[i].queue_time, now[i].requests);
        check_times(&now[i].handler_time, now[i].requests);
        CHECK(!old || now[i].name == before[s->rank][i].name);
        CHECK(!old || (now[i].calls >= before[s->rank][i].calls && now[i].requests >= before[s->rank][i].requests));
    }
    memcpy(before[s->rank], now, sizeof now);
    count_before[s->rank] = count;
    CHECK_EQ_INT(tprpc_agent_get_peers(s->agent, peer, 8, sizeof peer[0]), 2);
    tprpc_agent_each_metric(s->agent, count_pair, &count_pairs);
    CHECK(count_pairs > 30);
    const size_t whole = tprpc_agent_prometheus(s->agent, page, sizeof page);
    CHECK(whole > 1000 && (whole >= sizeof page || whole == strlen(page)));
}

IN_KINDS(read_while_called, 0x30) {
    pthread_t threads[CALLERS + 1];
    static const char *const names[CALLERS] = {"echo", "quo\"te\\d"};
    two_tune = with_metrics;
    two_join(with, methods);
    for (int i = 0; i < CALLERS; i++)
        REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, call_on, (void *)(uintptr_t)names[i]), 0);
    REQUIRE_EQ_INT(pthread_create(&threads[CALLERS], NULL, register_on, NULL), 0);
    while (LOAD(&callers_done) < CALLERS)
        for (int i = 0; i < 2; i++) read_all(&two[i]);
    for (int i = 0; i <= CALLERS; i++) pthread_join(threads[i], NULL);
    for (int i = 0; i < CALLERS; i++) check_calls(names[i], CALLS, 0, 0, 0, 0);
    for (int i = 0; i < 2; i++) read_all(&two[i]);
    two_close();
}

/* ---- what is measured allocates nothing, once its name is known ---- */

IN_KINDS(measuring_allocates_nothing, POLLED) {
    two_tune = with_metrics;
    two_join(with, methods);
    for (int i = 0; i < 200; i++) call_done("echo", NULL, 0, TPRPC_OK);
    const int64_t before[2] = {LOAD(&two[0].heap.calls), LOAD(&two[1].heap.calls)};
    for (int i = 0; i < 1000; i++) call_done("echo", NULL, 0, TPRPC_OK);
    for (int i = 0; i < 2; i++) CHECK_EQ_INT(LOAD(&two[i].heap.calls) - before[i], 0);
    CHECK_EQ_INT(method_of(&two[1], "echo").handler_time.count, 1200);
    two_close();
}
