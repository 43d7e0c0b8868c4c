/* Groups of agents, through the public interface: joining, leaving, deaths, trust, names, and what calls cost. */
#include "agent_help.h"
#include "agent_hold.h"
#include <net/if.h>

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

/* ---- handlers ---- */

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    tprpc_reply(request, message);
}

static void on_answer(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    while (kept_count) CHECK_EQ_INT(tprpc_reply(kept[--kept_count], NULL), TPRPC_OK);
    tprpc_reply(request, NULL);
}

static void count_slept(void *user) {
    (void)user;
    ADD(&shared->count[1], 1);
}

static void on_sleep(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_message reply = text_of("slept");
    (void)message; (void)user;
    reply.release = count_slept;
    ADD(&shared->count[0], 1);
    test_sleep_us(100000);
    tprpc_reply(request, &reply);
}

static void on_back(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    tprpc_error error = {0};
    tprpc_status status = call_and_wait(s, tprpc_request_caller(request), "echo", message, NULL, &error);
    if (status != TPRPC_OK) fprintf(stderr, "%s calls back: %s\n", s->name, error.text);
    CHECK_EQ_INT(status, TPRPC_OK);
    ADD(&shared->count[2], 1);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {"hold", on_hold, NULL, NULL, NULL, 0},
    {"answer", on_answer, NULL, NULL, NULL, 0},
    {"sleep", on_sleep, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING},
    {"back", on_back, NULL, NULL, NULL, 0},
    {0},
};

static void group_of(const mode *with, int count, void (*first)(side *), void (*others)(side *)) {
    side sides[4] = {{0}};
    for (int i = 0; i < count; i++) {
        sides[i].main = i ? others : first;
        sides[i].methods = methods;
    }
    sides[0].mode = with;
    group_run(sides, count);
}

static void call_all(side *s) {
    static const char *const names[] = {"ann", "bob", "cyd", "dan"};
    for (int round = 0; round < 20; round++)
        for (int i = 0; i < s->world; i++) {
            tprpc_message message = text_of(names[i]);
            CHECK_EQ_INT(call_and_wait(s, names[i], "echo", &message, NULL, NULL), TPRPC_OK);
        }
}
IN_MODES(four_call_each_other, 0xff) { group_of(with, 4, call_all, call_all); }

/* ---- joining ---- */

typedef struct joiner {
    const char *name, *url;
    int rank, world, start_ms;
    tprpc_store *store;
    tprpc_status status;
    tprpc_error error;
} joiner;

static void *join_run(void *arg) {
    joiner *j = (joiner *)arg;
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    desc.name = j->name;
    desc.store = j->store;
    desc.init_method = j->url;
    desc.rank = j->rank;
    desc.world_size = j->world;
    desc.start_timeout_ms = j->start_ms ? j->start_ms : WAIT_MS;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    j->status = tprpc_agent_wait_ready(agent, 0, &j->error);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    return NULL;
}

static void join_all(joiner *joiners, int count) {
    pthread_t threads[4];
    tprpc_context_desc context = {0};
    tprpc_context *ctx = NULL;
    tprpc_store_desc store = {0};
    tprpc_store *local = NULL;
    context.threads = 1;
    store.url = "local://";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &store, &local, NULL), TPRPC_OK);
    for (int i = 0; i < count; i++) {
        joiners[i].store = local;
        REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, join_run, &joiners[i]), 0);
    }
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
    tprpc_store_close(local);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* Of two one is refused, with that in its text; the other waits for nobody. */
static void check_one_refused(const joiner *joiners, const char *text) {
    int refused = joiners[0].status == TPRPC_ERROR_INVALID ? 0 : 1;
    CHECK_EQ_INT(joiners[refused].status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(joiners[refused].error.text, text);
    CHECK_EQ_INT(joiners[!refused].status, TPRPC_ERROR_TIMEOUT);
}

TEST(two_of_one_name) {
    joiner joiners[2] = {{"twin", NULL, 0, 2, 500, NULL, TPRPC_OK, {0}},
                         {"twin", NULL, 1, 2, 500, NULL, TPRPC_OK, {0}}};
    join_all(joiners, 2);
    check_one_refused(joiners, "twin");
}

TEST(two_of_one_rank) {
    joiner joiners[2] = {{"ann", NULL, 1, 3, 500, NULL, TPRPC_OK, {0}}, {"bob", NULL, 1, 3, 500, NULL, TPRPC_OK, {0}}};
    join_all(joiners, 2);
    check_one_refused(joiners, "rank 1");
}

TEST(one_never_comes) {
    joiner joiners[2] = {{"ann", NULL, 0, 3, 300, NULL, TPRPC_OK, {0}}, {"bob", NULL, 1, 3, 300, NULL, TPRPC_OK, {0}}};
    join_all(joiners, 2);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ_INT(joiners[i].status, TPRPC_ERROR_TIMEOUT);
        CHECK_CONTAINS(joiners[i].error.text, "rank 2");
    }
}

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    CHECK(reply == NULL);
    CHECK((status == TPRPC_OK) == (error == NULL));
    if (error) CHECK_CONTAINS(error->text, "rank 1");
    STORE(&shared->status[0], (int)status);
    ADD((int *)user, 1);
}

TEST(start_says_when_it_is_over) {
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    tprpc_context *ctx = NULL;
    tprpc_store *store = NULL;
    tprpc_store_desc local = {0};
    tprpc_error error = {0};
    tprpc_context_desc context = {0};
    tprpc_future future;
    int ready = 0;
    share();
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    local.url = "local://";
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &local, &store, NULL), TPRPC_OK);
    for (int world = 1; world <= 2; world++) {
        desc.context = ctx;
        desc.store = store;
        desc.name = world == 1 ? "lone" : "left";
        desc.world_size = world;
        desc.start_timeout_ms = 100;
        REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_call(agent, desc.name, "x", NULL, NULL, &future), TPRPC_ERROR_INVALID);   /* too early */
        CHECK_EQ_INT(tprpc_agent_leave(agent, 10, &error), TPRPC_ERROR_INVALID);
        ready = 0;
        CHECK_EQ_INT(tprpc_agent_start(agent, on_ready, &ready, &error), TPRPC_OK);
        CHECK_EQ_INT(tprpc_agent_start(agent, on_ready, &ready, &error), TPRPC_ERROR_INVALID);
        CHECK_EQ_INT(ready, 0);
        for (int i = 0; i < 30000 && !ready; i++) tprpc_poll(ctx, 1000, 0);
        CHECK_EQ_INT(ready, 1);
        CHECK_EQ_INT(LOAD(&shared->status[0]), world == 1 ? TPRPC_OK : world == 2 ? (int)LOAD(&shared->status[0]) : 0);
        if (world == 1) CHECK_EQ_INT(tprpc_agent_leave(agent, 1000, &error), TPRPC_OK);
        CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
        CHECK_EQ_INT(tprpc_store_delete(store, "tprpc/rank/0", NULL, NULL), TPRPC_OK);
    }
    CHECK_EQ_INT(LOAD(&shared->status[0]), TPRPC_ERROR_TIMEOUT);
    tprpc_store_close(store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static tprpc_status create(tprpc_agent_desc *desc, tprpc_error *error) {
    tprpc_agent *agent = (tprpc_agent *)(void *)error;
    tprpc_status status;
    memset(error, 0, sizeof *error);
    status = tprpc_agent_create(desc, &agent, error);
    CHECK((status == TPRPC_OK) == (agent != NULL));
    if (agent) tprpc_agent_destroy(agent);
    return status;
}

TEST(names_and_descriptors) {
    tprpc_agent_desc desc = {0};
    tprpc_error error;
    tprpc_agent *agent = NULL;
    char name[200];
    memset(name, 'x', sizeof name);
    desc.init_method = "tcp://127.0.0.1:1";
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "name");
    desc.name = "";
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    name[129] = 0;
    desc.name = name;
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    name[128] = 0;
    CHECK_EQ_INT(create(&desc, &error), TPRPC_OK);
    desc.name = "\xc3\x28";
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "UTF-8");
    desc.name = "caf\xc3\xa9";
    CHECK_EQ_INT(create(&desc, &error), TPRPC_OK);
    desc.secret = "hush";
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(error.text, "secret");
    desc.secret = NULL;
    desc.init_method = NULL;
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    desc.init_method = "somewhere";
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "somewhere");
    desc.init_method = "tcp://127.0.0.1:1";
    desc.world_size = 2;
    desc.rank = 2;
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "rank");
    desc.rank = -1;
    CHECK_EQ_INT(create(&desc, &error), TPRPC_ERROR_INVALID);
    desc.rank = 0;
    CHECK_EQ_INT(tprpc_agent_create_for(&desc, sizeof desc - 8, TPRPC_VERSION, &agent, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "both");
    CHECK_EQ_INT(tprpc_agent_create_for(&desc, sizeof desc, TPRPC_VERSION + 100, &agent, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_create(&desc, &agent, &error), TPRPC_OK);
    tprpc_method_desc method = {"", on_echo, NULL, NULL, NULL, 0};
    CHECK_EQ_INT(tprpc_agent_register(agent, &method, &error), TPRPC_ERROR_INVALID);
    memset(name, 'x', sizeof name);
    name[129] = 0;
    method.name = name;
    CHECK_EQ_INT(tprpc_agent_register(agent, &method, &error), TPRPC_ERROR_INVALID);
    method.name = "\xff";
    CHECK_EQ_INT(tprpc_agent_register(agent, &method, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "UTF-8");
    name[128] = 0;
    method.name = name;
    CHECK_EQ_INT(tprpc_agent_register(agent, &method, &error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(NULL), TPRPC_OK);
}

/* ---- every kind of store ---- */

static void run_with_url(const char *url, int count) {
    side sides[4] = {{0}};
    for (int i = 0; i < count; i++) {
        sides[i].init_method = url;
        sides[i].main = call_all;
        sides[i].methods = methods;
    }
    sides[0].mode = &modes[7];
    group_run(sides, count);
}

TEST(store_tcp) {
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    run_with_url(url, 3);
}

static void env_side(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    char rank[8];
    (void)context;
    snprintf(rank, sizeof rank, "%d", s->rank);
    setenv("RANK", rank, 1);
    agent->rank = agent->world_size = 0;
}

TEST(store_env) {
    side sides[3] = {{0}};
    char port[8];
    snprintf(port, sizeof port, "%d", socket_free_port());
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    setenv("MASTER_PORT", port, 1);
    setenv("WORLD_SIZE", "3", 1);
    for (int i = 0; i < 3; i++) {
        sides[i].init_method = "env://";
        sides[i].tune = env_side;
        sides[i].main = call_all;
        sides[i].methods = methods;
    }
    sides[0].mode = &modes[7];
    group_run(sides, 3);
}

/* ---- leaving ---- */

static void tarry(side *s) {           /* the first leaves first, the last last */
    call_all(s);
    test_sleep_us(s->rank * 30000);
}
static void tarry_first(side *s) {
    call_all(s);
    test_sleep_us((s->world - s->rank) * 30000);
}
IN_MODES(first_leaves_first, FOUR_MODES) { group_of(with, 3, tarry, tarry); }
IN_MODES(first_leaves_last, FOUR_MODES) { group_of(with, 3, tarry_first, tarry_first); }

static void leave_alone(side *s) {
    tprpc_error error = {0};
    tprpc_future future;
    tprpc_message message = text_of("x");
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 200, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "bob");
    message.release = count_release;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, NULL, &future), TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(LOAD(&shared->released), 1);
    CHECK(tprpc_agent_leave(s->agent, 200, &error) != TPRPC_OK);
    STORE(&shared->stop, 1);
}

IN_MODES(leave_names_who_stays, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = leave_alone;
    sides[1].main = serve_until_stop;
    sides[0].no_leave = sides[1].no_leave = true;
    group_run(sides, 2);
}

/* ann leaves at once; what bob asks of her meanwhile has her call bob back. */
static void ask_the_leaving(side *s) {
    test_sleep_us(50000);
    for (int i = 0; i < 10; i++) CHECK_EQ_INT(call_and_wait(s, "ann", "back", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->count[2]), 10);
}
IN_MODES(served_while_leaving, ALL_MODES) { group_of(with, 2, NULL, ask_the_leaving); }

static void hold_and_leave(side *s) {
    tprpc_call_options options = {0};
    options.timeout_ms = 50;
    CHECK_EQ_INT(call_and_wait(s, "bob", "hold", NULL, &options, NULL), TPRPC_ERROR_TIMEOUT);
    CHECK(until(s, &shared->seen, 1));
}

static void answer_after_leave(side *s) {
    tprpc_message message = text_of("late");
    tprpc_error error = {0};
    CHECK(until(s, &shared->seen, 1));
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, WAIT_MS, &error), TPRPC_OK);
    message.release = count_release;
    CHECK_EQ_INT(tprpc_reply(kept[0], &message), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->released), 1);
    CHECK_EQ_INT(tprpc_fail(kept[0], 1, "late"), TPRPC_ERROR_INVALID);
    CHECK(tprpc_request_cancelled(kept[0]));
}

IN_MODES(answer_after_leave, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = hold_and_leave;
    sides[1].main = answer_after_leave;
    sides[1].methods = methods;
    sides[1].no_leave = true;
    group_run(sides, 2);
}

/* ---- the end with work at hand ---- */

static void count_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    CHECK((status == TPRPC_OK) == (error == NULL));
    if (status == TPRPC_ERROR_CLOSED) ADD(&shared->count[4], 1);
    if (status == TPRPC_ERROR_PEER) {
        ADD(&shared->count[5], 1);
        CHECK_CONTAINS(error->text, (const char *)user);
    }
    ADD(&shared->outcomes, 1);
}

enum { HELD = 20 };

static void leave_nothing_done(side *s) {
    static uint8_t bytes[200000];
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_call_options options = {0};
    tprpc_future future;
    options.on_done = count_done;
    options.user = (void *)(uintptr_t)"bob";
    for (int i = 0; i < HELD; i++) {
        tprpc_message message = tensors_of(&tensor, i % 2 ? 0 : 1);
        message.release = count_release;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", i % 5 ? "hold" : "sleep", &message, &options, i % 3 ? &future : NULL),
                     TPRPC_OK);
    }
    CHECK(until(s, &shared->seen, HELD - HELD / 5));
    CHECK(until(s, &shared->count[0], 1));
    for (int i = 0; i < HELD; i++) {   /* and some that have just begun */
        tprpc_message message = tensors_of(&tensor, 1);
        message.release = count_release;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", &message, &options, NULL), TPRPC_OK);
    }
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    s->agent = NULL;
    const int outcomes = LOAD(&shared->outcomes), released = LOAD(&shared->released);
    CHECK_EQ_INT(outcomes, 2 * HELD);
    CHECK_EQ_INT(released, 2 * HELD);
    CHECK(LOAD(&shared->count[4]) >= HELD);
    test_sleep_us(10000);
    CHECK_EQ_INT(LOAD(&shared->outcomes), outcomes);   /* nothing runs after it */
    STORE(&shared->stop, 1);
}

/* bob is destroyed while its handlers run and its requests are kept, some of them by a caller that is gone. */
static void end_at_work(side *s) {
    CHECK(until(s, &shared->seen, HELD - HELD / 5));
    CHECK(until(s, &shared->count[0], 1));
    if (s->world == 2) CHECK(until(s, &shared->stop, 1));
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    s->agent = NULL;
    CHECK_EQ_INT(LOAD(&shared->count[1]), LOAD(&shared->count[0]));   /* every reply released */
}

static void with_workers(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)context;
    agent->worker_threads = 2;
}

IN_MODES(destroy_the_caller, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = leave_nothing_done;
    sides[1].main = end_at_work;
    sides[1].methods = methods;
    sides[1].tune = with_workers;
    sides[0].no_leave = sides[1].no_leave = true;
    group_run(sides, 2);
}

static void see_the_end(side *s) {
    tprpc_call_options options = {0};
    options.on_done = count_done;
    options.user = (void *)(uintptr_t)"bob";
    for (int i = 0; i < HELD; i++) {
        tprpc_message message = text_of("wait");
        message.release = count_release;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", i % 5 ? "hold" : "sleep", &message, &options, NULL), TPRPC_OK);
    }
    CHECK(until(s, &shared->outcomes, HELD));
    CHECK(until_released(s, HELD));
    CHECK(LOAD(&shared->count[5]) >= HELD - HELD / 5);
}

static void end_with_requests(side *s) {
    CHECK(until(s, &shared->seen, HELD - HELD / 5));
    CHECK(until(s, &shared->count[0], 1));
    tprpc_request request = kept[0];
    CHECK(!tprpc_request_cancelled(request));
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    s->agent = NULL;
    CHECK_EQ_INT(LOAD(&shared->count[1]), LOAD(&shared->count[0]));
}

IN_MODES(destroy_the_server, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = see_the_end;
    sides[1].main = end_with_requests;
    sides[1].methods = methods;
    sides[1].tune = with_workers;
    sides[0].no_leave = sides[1].no_leave = true;
    group_run(sides, 2);
}

/* ---- a death ---- */

static void see_bob_die(side *s) {
    tprpc_call_options options = {0};
    tprpc_future futures[5], other;
    tprpc_error error;
    options.on_done = count_done;
    options.user = (void *)(uintptr_t)"bob";
    for (int i = 0; i < 5; i++)
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, &options, &futures[i]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_call(s->agent, "cyd", "hold", NULL, NULL, &other), TPRPC_OK);
    CHECK(until(s, &shared->seen, 6));
    kill(shared->pid[1], SIGKILL);
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 5, WAIT_MS), TPRPC_ERROR_PEER);
    for (int i = 0; i < 5; i++) {
        CHECK_EQ_INT(tprpc_future_error(futures[i], &error), TPRPC_ERROR_PEER);
        CHECK_CONTAINS(error.text, "bob");
        tprpc_future_release(futures[i]);
    }
    CHECK(until(s, &shared->outcomes, 5));
    CHECK_EQ_INT(LOAD(&shared->count[5]), 5);
    CHECK_EQ_INT(tprpc_future_wait(other, TPRPC_NOW), TPRPC_PENDING);
    CHECK_EQ_INT(call_and_wait(s, "cyd", "answer", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(other, WAIT_MS), TPRPC_OK);
    tprpc_future_release(other);
    CHECK(call_and_wait(s, "bob", "echo", NULL, NULL, &error) > TPRPC_PENDING);   /* still dead, and said so */
    CHECK_CONTAINS(error.text, "bob");
    for (int i = 0; i < 100; i++) CHECK_EQ_INT(call_and_wait(s, "cyd", "echo", NULL, NULL, NULL), TPRPC_OK);
    STORE(&shared->stop, 1);
}

static void die_or_serve(side *s) {
    if (s->rank == 1) for (;;) tprpc_poll(s->ctx, 10000, 0);
    serve_until_stop(s);
}

IN_MODES(killed, APART_MODES) {
    side sides[3] = {{0}};
    char dies[] = "dies";
    sides[0].mode = with;
    sides[0].main = see_bob_die;
    sides[1].main = sides[2].main = die_or_serve;
    sides[1].user = dies;
    for (int i = 0; i < 3; i++) {
        sides[i].methods = methods;
        sides[i].no_leave = true;
    }
    group_run(sides, 3);
}

/* ---- fork ---- */

typedef struct inherited { side *s; tprpc_future future; } inherited;

static void use_inherited(void *arg) {
    inherited *i = (inherited *)arg;
    side *s = i->s;
    tprpc_error error = {0};
    tprpc_future future;
    tprpc_method_id id;
    tprpc_stats stats;
    tprpc_request request = {s->agent, 1};
    tprpc_method_desc method = {"new", on_echo, NULL, NULL, NULL, 0};
    tprpc_message message = text_of("x");
    message.release = count_release;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, NULL, &future), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->released), 1);
    CHECK_EQ_INT(tprpc_resolve(s->agent, "bob", "echo", &id, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_wait(i->future, WAIT_MS), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_cancel(i->future), TPRPC_ERROR_INVALID);
    tprpc_future_release(i->future);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_register(s->agent, &method, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "echo", &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 10, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_get_stats(s->agent, &stats, sizeof stats), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_ERROR_INVALID);
    CHECK(!tprpc_poll(s->ctx, 1000, 0));
    fflush(NULL);
    _exit(harness_failures ? 1 : 0);   /* what is inherited is no leak */
}

static void fork_amid(side *s) {
    tprpc_future futures[8];
    static uint8_t bytes[300000];
    for (int round = 0; round < 5; round++) {
        tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
        tprpc_message message = tensors_of(&tensor, 1);
        inherited i;
        for (int k = 0; k < 8; k++)
            CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, NULL, &futures[k]), TPRPC_OK);
        tprpc_poll(s->ctx, 100, 0);
        STORE(&shared->released, 0);
        i.s = s;
        i.future = futures[0];
        pid_t pid = test_fork_run(use_inherited, &i);
        CHECK_EQ_INT(tprpc_future_wait_all(futures, 8, WAIT_MS), TPRPC_OK);
        CHECK_EQ_INT(test_wait_child(pid, 10), 0);
        for (int k = 0; k < 8; k++) tprpc_future_release(futures[k]);
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
}
IN_MODES(fork_amid_traffic, ALL_MODES) { group_of(with, 2, fork_amid, NULL); }

/* ---- trust: networks and users ---- */

static int run(const char *format, ...) {
    char command[500];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    return system(command);
}

static char net_a[32], net_b[32], net_host[2][20], net_url[64];

static void enter(const char *name) {
    char path[100];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    REQUIRE(fd >= 0 && setns(fd, 0) == 0);
    close(fd);
}

static void network_side(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    enter(s->rank ? net_b : net_a);
    agent->insecure = true;
}

static void network_main(side *s) {
    const char *peer = s->rank ? "ann" : "bob";
    tprpc_pipe_info info;
    call_all(s);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, peer, &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "tcp");
    CHECK_CONTAINS(info.peer, net_host[!s->rank]);
}

static void refused_side(void *arg) {
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    (void)arg;
    enter(net_a);
    desc.name = "ann";
    desc.init_method = net_url;
    desc.world_size = 1;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_start(agent, NULL, NULL, &error), TPRPC_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(error.text, "secret");
    CHECK_CONTAINS(error.text, "insecure");
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
}

/* In a process of its own, so that the namespaces are removed whatever becomes of it. */
static void network_group(void *arg) {
    side sides[2] = {{0}};
    (void)arg;
    for (int i = 0; i < 2; i++) {
        sides[i].init_method = net_url;
        sides[i].tune = network_side;
        sides[i].main = network_main;
        sides[i].methods = methods;
    }
    sides[0].mode = &modes[0];
    group_run(sides, 2);
}

/* Two namespaces joined by a pair of veth; what routes to the store is not the first interface. */
TEST(between_network_namespaces) {
    const int id = (int)getpid() % 30000, net = id % 200 + 20;
    if (geteuid() != 0) SKIP("needs root");
    share();
    snprintf(net_a, sizeof net_a, "tprpc-a%d", id);
    snprintf(net_b, sizeof net_b, "tprpc-b%d", id);
    snprintf(net_host[0], sizeof net_host[0], "10.231.%d.1", net);
    snprintf(net_host[1], sizeof net_host[1], "10.231.%d.2", net);
    snprintf(net_url, sizeof net_url, "tcp://%s:29500", net_host[0]);
    int failed = run("ip netns add %s && ip netns add %s", net_a, net_b);
    for (int i = 0; i < 2 && !failed; i++) {   /* first an interface that leads nowhere */
        const char *in = i ? net_b : net_a;
        failed = run("ip -n %s link set lo up && ip -n %s link add de%d type veth peer name df%d && "
                     "ip -n %s addr add 10.%d.0.1/24 dev de%d && ip -n %s link set de%d up", in, in, id, id, in, 99 + i,
                     id, in, id);
    }
    if (!failed)
        failed = run("ip link add tpa%d netns %s type veth peer name tpb%d netns %s", id, net_a, id, net_b);
    for (int i = 0; i < 2 && !failed; i++) {
        const char *in = i ? net_b : net_a;
        failed = run("ip -n %s addr add %s/24 dev tp%c%d && ip -n %s link set tp%c%d up", in, net_host[i], "ab"[i], id,
                     in, "ab"[i], id);
    }
    if (!failed) {
        CHECK_EQ_INT(test_wait_child(test_fork_run(refused_side, NULL), 20), 0);
        CHECK_EQ_INT(test_wait_child(test_fork_run(network_group, NULL), 50), 0);
    }
    run("ip netns del %s; ip netns del %s", net_a, net_b);
    if (failed) SKIP("network namespaces cannot be made here");
}

static char intruder_url[64], intruder_address[128];

static void finish_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)message;
    if (error) snprintf(shared->text[1], sizeof shared->text[1], "%s", error->text);
    STORE((int *)user, (int)status);
}

/* Another user joins by the store, then knocks at a worker's own address. */
static void intrude(void *arg) {
    tprpc_agent_desc agent_desc = {0};
    tprpc_context_desc context = {0};
    tprpc_pipe_desc pipe_desc = {0};
    tprpc_pipe *pipe = NULL;
    tprpc_context *ctx = NULL;
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    int outcome = 0;
    (void)arg;
    REQUIRE(setresgid(65534, 65534, 65534) == 0 && setresuid(65534, 65534, 65534) == 0);
    context.transports = "tcp";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, &error), TPRPC_OK);
    agent_desc.context = ctx;
    agent_desc.name = "mallory";
    agent_desc.init_method = intruder_url;
    agent_desc.rank = 1;
    agent_desc.world_size = 2;
    agent_desc.start_timeout_ms = 5000;
    REQUIRE_EQ_INT(tprpc_agent_create(&agent_desc, &agent, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_wait_ready(agent, 0, &error), TPRPC_ERROR_DENIED);
    fprintf(stderr, "told: %s\n", error.text);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    STORE(&shared->go, 1);           /* the rightful one may come */
    CHECK(until(NULL, &shared->ready, 1));
    snprintf(intruder_address, sizeof intruder_address, "tcp://%.100s", shared->text[0]);
    pipe_desc.address = intruder_address;
    pipe_desc.timeout_ms = 5000;
    REQUIRE_EQ_INT(tprpc_connect(ctx, &pipe_desc, &pipe, &error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read(pipe, NULL, finish_read, &outcome), TPRPC_OK);
    for (int i = 0; i < 10000 && !LOAD(&outcome); i++) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(LOAD(&outcome), TPRPC_ERROR_DENIED);
    tprpc_pipe_close(pipe);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    STORE(&shared->stop, 1);
}

static void intruded_main(side *s) {
    tprpc_pipe_info info;
    call_all(s);
    if (s->rank == 0) {
        CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info), TPRPC_OK);
        CHECK_STR(info.transport, "tcp");
        info.peer[strcspn(info.peer, " ,")] = 0;
        snprintf(shared->text[0], sizeof shared->text[0], "%s", info.peer);
        STORE(&shared->ready, 1);
    }
    while (!LOAD(&shared->stop)) {
        call_all(s);
        tprpc_poll(s->ctx, 1000, 0);
    }
    call_all(s);
}

static void come_later(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context; (void)agent;
    if (s->rank) CHECK(until(NULL, &shared->go, 1));
}

TEST(another_user_is_denied) {
    side sides[2] = {{0}};
    if (geteuid() != 0) SKIP("needs root");
    share();
    snprintf(intruder_url, sizeof intruder_url, "tcp://127.0.0.1:%d", socket_free_port());
    pid_t pid = test_fork_run(intrude, NULL);
    for (int i = 0; i < 2; i++) {
        sides[i].init_method = intruder_url;
        sides[i].main = intruded_main;
        sides[i].tune = come_later;
        sides[i].methods = methods;
    }
    sides[0].mode = &modes[0];
    group_run(sides, 2);
    CHECK_EQ_INT(test_wait_child(pid, 20), 0);
}
