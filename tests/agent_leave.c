/* How a group leaves: all agree that nothing runs anywhere, and who is in the way is named. Real processes, threads. */
#include "agent_help.h"

enum { MODES = 0x31, HOPS = 90 };      /* tcp_polled, shm_threads, default_threads */

static void count_bad_line(const tprpc_log *entry, void *user) {
    if (entry->level > TPRPC_LOG_WARNING) return;
    fprintf(stderr, "%s logs: %s: %s\n", (const char *)user, entry->section, entry->text);
    ADD(&shared->bad, 1);
}

/* No worker writes a line that somebody would have to look at. */
static void listen_to_log(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    context->log = count_bad_line;
    context->user = (void *)(uintptr_t)s->name;
}

/* ---- one-way calls */

static void one_way(side *s, const char *worker, const char *method, const void *body, size_t size) {
    tprpc_call_options options = {0};
    tprpc_message message = {0};
    tprpc_error error = {0};
    options.flags = TPRPC_CALL_ONE_WAY;
    options.error = &error;
    message.metadata = body;
    message.metadata_size = size;
    if (!CHECK_EQ_INT(tprpc_call(s->agent, worker, method, &message, &options, NULL), TPRPC_OK))
        fprintf(stderr, "%s calls %s on %s: %s\n", s->name, method, worker, error.text);
}

static void on_slow(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    ADD(&shared->seen, 1);
    tprpc_reply(request, NULL);        /* it has answered, and runs on */
    test_sleep_us(60000);
    ADD(&shared->handled, 1);
}

static const char *next_of(const side *s) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    return names[(s->rank + 1) % s->world];
}

/* Passes the word on, sometimes after a call that is answered; each hop is counted. */
static void on_pass(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    int hops;
    memcpy(&hops, message->metadata, sizeof hops);
    if (hops % 9 == 0) test_sleep_us(3000);
    if (hops % 5 == 0) CHECK_EQ_INT(call_and_wait(s, next_of(s), "echo", NULL, NULL, NULL), TPRPC_OK);
    ADD(&shared->count[0], 1);
    if (--hops > 0) one_way(s, next_of(s), "pass", &hops, sizeof hops);
    tprpc_reply(request, NULL);
}

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static tprpc_request kept;
static void on_hold(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    kept = request;
    ADD(&shared->seen, 1);
}

static void on_leave(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_error error = {0};
    CHECK_EQ_INT(tprpc_agent_leave(((side *)user)->agent, 100, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "leave");
    tprpc_reply(request, message);
}

static const tprpc_method_desc methods[] = {
    {"slow", on_slow, NULL, NULL, NULL, 0},
    {"slow job", on_slow, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING},
    {"pass", on_pass, NULL, NULL, NULL, 0},
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {"hold", on_hold, NULL, NULL, NULL, 0},
    {"leave", on_leave, NULL, NULL, NULL, 0},
    {"leave job", on_leave, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING},
    {0},
};

static void with_workers(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    listen_to_log(s, context, agent);
    agent->worker_threads = 2;
}

static void group_of(const mode *with, int count, void (*first)(side *), void (*others)(side *), bool leave) {
    side sides[3] = {{0}};
    for (int i = 0; i < count; i++) {
        sides[i].main = i ? others : first;
        sides[i].methods = methods;
        sides[i].tune = with_workers;
        sides[i].no_leave = !leave;
    }
    sides[0].mode = with;
    share();
    group_run(sides, count);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
}

/* ann has left when both handlers have ended, the inline one on a loop of bob's, and the job. */
static void send_slow(side *s) {
    one_way(s, "bob", "slow", "", 0);
    one_way(s, "bob", "slow job", "", 0);
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->handled), 2);
}
static void leave_at_once(side *s) {
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->handled), 2);
}
IN_MODES(waits_for_handlers_of_one_way_calls, MODES) { group_of(with, 2, send_slow, leave_at_once, false); }

/* A word goes round while all leave: it is under way between workers that have nothing to do, over and over. */
static void pass_and_leave(side *s) {
    int hops = HOPS;
    one_way(s, "bob", "pass", &hops, sizeof hops);
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->count[0]), HOPS);
}
static void leave_meanwhile(side *s) {
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->count[0]), HOPS);
}
IN_MODES(waits_for_what_is_under_way, MODES) { group_of(with, 3, pass_and_leave, leave_meanwhile, false); }

/* A call that its caller has given up is under way nonetheless, and its handler makes more. */
static void give_up(side *s) {
    tprpc_future future;
    int hops = HOPS;
    tprpc_message message = {0};
    message.metadata = &hops;
    message.metadata_size = sizeof hops;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "pass", &message, NULL, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    tprpc_future_release(future);
    side_leave(s);
    int count = LOAD(&shared->count[0]);
    CHECK(count == 0 || count == HOPS);   /* it did not leave, or all of it was done */
}
IN_MODES(waits_for_calls_that_were_given_up, MODES) { group_of(with, 3, give_up, side_leave, false); }

/* ---- kept requests */

static void *answer_later(void *arg) {
    (void)arg;
    test_sleep_us(60000);
    STORE(&shared->handled, 2);
    CHECK_EQ_INT(tprpc_reply(kept, NULL), TPRPC_OK);
    return NULL;
}

static void send_hold(side *s) {
    one_way(s, "bob", "hold", "", 0);
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->handled), 2);
}
static void hold_and_leave(side *s) {
    CHECK(until(s, &shared->seen, 1));
    REQUIRE_EQ_INT(pthread_create(&s->jobs[s->job_count++], NULL, answer_later, NULL), 0);
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->handled), 2);
}
IN_MODES(waits_for_kept_requests, MODES) { group_of(with, 2, send_hold, hold_and_leave, false); }

/* ---- who is in the way */

static void told_who_holds(side *s) {
    tprpc_error error = {0};
    one_way(s, "bob", "hold", "", 0);
    CHECK(until(s, &shared->count[1], 1));   /* bob leaves, too */
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 400, &error), TPRPC_ERROR_TIMEOUT);
    fprintf(stderr, "told: %s\n", error.text);
    CHECK_CONTAINS(error.text, s->rank == 1 ? "worker bob still runs" : "worker bob (rank 1) still runs");
    CHECK_CONTAINS(error.text, "1 requests (of hold)");
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, NULL, NULL), TPRPC_ERROR_CLOSED);
    ADD(&shared->outcomes, 1);
    CHECK(until(s, &shared->outcomes, 3));
}
static void hold_in_vain(side *s) {
    tprpc_error error = {0};
    if (s->rank == 2) CHECK(until(s, &shared->count[1], 1));
    else CHECK(until(s, &shared->seen, 1));
    if (s->rank == 1) STORE(&shared->count[1], 1);
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 400, &error), TPRPC_ERROR_TIMEOUT);
    fprintf(stderr, "told: %s\n", error.text);
    CHECK_CONTAINS(error.text, s->rank == 1 ? "worker bob still runs" : "worker bob (rank 1) still runs");
    CHECK_CONTAINS(error.text, "1 requests (of hold)");
    ADD(&shared->outcomes, 1);
    CHECK(until(s, &shared->outcomes, 3));
}
IN_MODES(says_what_still_runs, MODES) { group_of(with, 3, told_who_holds, hold_in_vain, false); }

static void told_who_died(side *s) {
    tprpc_error error = {0};
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    kill(shared->pid[1], SIGKILL);
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 300, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "worker bob (rank 1) has not left");
    CHECK(until(s, &shared->outcomes, 1));
}
static void left_or_killed(side *s) {
    tprpc_error error = {0};
    if (s->rank == 1) for (;;) tprpc_poll(s->ctx, 10000, 0);
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 300, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "(rank ");   /* ann, who may have begun later, or bob */
    ADD(&shared->outcomes, 1);
}
IN_MODES(names_who_was_killed, 0x11) {
    side sides[3] = {{0}};
    char dies[] = "dies";
    sides[0].mode = with;
    for (int i = 0; i < 3; i++) {
        sides[i].main = i ? left_or_killed : told_who_died;
        sides[i].methods = methods;
        sides[i].no_leave = true;
    }
    sides[1].user = dies;
    group_run(sides, 3);
}

/* ---- in silence */

static void call_all(side *s) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    for (int i = 0; i < s->world; i++) CHECK_EQ_INT(call_and_wait(s, names[i], "echo", NULL, NULL, NULL), TPRPC_OK);
    ADD(&shared->ready, 1);
    CHECK(until(s, &shared->ready, s->world));
}
IN_MODES(leaves_in_silence, ALL_MODES) { group_of(with, 3, call_all, call_all, true); }
IN_MODES(goes_at_once_in_silence, ALL_MODES) { group_of(with, 3, call_all, call_all, false); }

/* ---- where it may be called */

static void leave_inside(side *s) {
    CHECK_EQ_INT(call_and_wait(s, "bob", "leave", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "bob", "leave job", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
}
IN_MODES(not_within_handlers, MODES) { group_of(with, 2, leave_inside, NULL, true); }

/* ---- what a group leaves behind */

/* Nothing: another group, of another size and under the same names, meets in the same store. */
IN_MODES(a_second_group_in_the_store, MODES) {
    char url[300], path[250];
    snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
    for (int count = 3; count >= 2; count--) {
        side sides[3] = {{0}};
        sides[0].mode = with;
        for (int i = 0; i < count; i++) {
            sides[i].main = call_all;
            sides[i].methods = methods;
            sides[i].init_method = url;
        }
        share();
        group_run(sides, count);
    }
}

/* ---- dynamic groups: who leaves ends what it serves */

static void call_slow(side *s) {
    CHECK(until(s, &shared->ready, 1));
    CHECK_EQ_INT(call_and_wait(s, "bob", "slow", NULL, NULL, NULL), TPRPC_OK);
    STORE(&shared->stop, 1);
}
static void leave_slowly(side *s) {
    STORE(&shared->ready, 1);
    CHECK(until(s, &shared->seen, 1));
    side_leave(s);
    CHECK_EQ_INT(LOAD(&shared->handled), 1);
    CHECK(until(s, &shared->stop, 1));
}
static void dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    with_workers(s, context, agent);
    agent->world_size = 0;
}
IN_MODES(a_dynamic_worker_ends_what_it_serves, MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    for (int i = 0; i < 2; i++) {
        sides[i].main = i ? leave_slowly : call_slow;
        sides[i].methods = methods;
        sides[i].tune = dynamic;
        sides[i].no_leave = i == 1;
    }
    share();
    group_run(sides, 2);
}

/* ---- a store that goes away */

static void serve_and_die(side *s) {
    CHECK(until(s, &shared->go, 1));
    test_sleep_us(20000);
    kill(getpid(), SIGKILL);
}
static void left_alone(side *s) {
    tprpc_error error = {0};
    STORE(&shared->go, 1);
    tprpc_status status = tprpc_agent_leave(s->agent, 600, &error);
    CHECK(status > TPRPC_PENDING);
    fprintf(stderr, "told: %s\n", error.text);
    CHECK_CONTAINS(error.text, s->init_method);
    STORE(&shared->outcomes, 1);
}
IN_MODES(names_a_store_that_died, 0x11) {
    side sides[2] = {{0}};
    char url[64];
    group g;
    share();
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    sides[0].mode = with;
    for (int i = 0; i < 2; i++) {
        sides[i].main = i ? left_alone : serve_and_die;
        sides[i].init_method = url;
        sides[i].no_leave = true;
    }
    group_open(&g, sides, 2);
    for (int i = 0; i < 2; i++) shared->pid[i] = test_fork_run(side_run, &sides[i]);
    test_wait_child(shared->pid[0], 20);
    CHECK_EQ_INT(test_wait_child(shared->pid[1], 20), 0);
    CHECK_EQ_INT(LOAD(&shared->outcomes), 1);
    group_close(&g);
}

/* ---- a worker of before there were rounds */

static size_t put_u32(uint8_t *out, uint32_t value) {
    for (int i = 0; i < 4; i++) out[i] = (uint8_t)(value >> 8 * i);
    return 4;
}

static void set_key(tprpc_store *store, const char *key, const void *value, size_t size) {
    tprpc_store_request request = {0};
    request.size = sizeof request;
    request.kind = TPRPC_STORE_SET;
    request.key = key;
    request.value = value;
    request.value_size = size;
    REQUIRE_EQ_INT(tprpc_store_wait(store, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
}

/* It says that it leaves, and that it has left, and nothing more. */
TEST(leaves_with_an_older_worker) {
    for (int leaves = 0; leaves < 3; leaves++) {
        tprpc_context_desc context = {0};
        tprpc_store_desc desc = {0};
        tprpc_agent_desc agent_desc = {0};
        tprpc_agent *agent = NULL;
        tprpc_context *ctx = NULL;
        tprpc_store *store = NULL;
        tprpc_error error = {0};
        uint8_t entry[64] = {7, 0, 0, 0, 0, 0, 0, 0};
        size_t size = 8;
        size += put_u32(entry + size, 1);
        size += put_u32(entry + size, 3);
        memcpy(entry + size, "bob", 3);
        size += 3;
        size += put_u32(entry + size, 0);
        context.threads = 1;
        desc.url = "local://";
        REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_store_open(ctx, &desc, &store, NULL), TPRPC_OK);
        set_key(store, "tprpc/rank/1", entry, size);
        if (leaves >= 1) set_key(store, "tprpc/leave/1", "1", 1);
        if (leaves >= 2) set_key(store, "tprpc/left/1", "1", 1);
        agent_desc.context = ctx;
        agent_desc.name = "ann";
        agent_desc.store = store;
        agent_desc.world_size = 2;
        REQUIRE_EQ_INT(tprpc_agent_create(&agent_desc, &agent, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_agent_wait_ready(agent, WAIT_MS, &error), TPRPC_OK);
        CHECK_EQ_INT(tprpc_agent_leave(agent, leaves == 2 ? WAIT_MS : 100, &error),
                     leaves == 2 ? TPRPC_OK : TPRPC_ERROR_TIMEOUT);
        if (leaves < 2) CHECK_CONTAINS(error.text, "worker bob (rank 1) has not left");
        CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
        tprpc_store_close(store);
        CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    }
}
