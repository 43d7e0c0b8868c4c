/* Dynamic groups, through the public interface: workers that come late, are found by their names in the store, leave, come
   again under the same name, and die. */
#include "agent_help.h"

enum { JOINED = 0, LEFT_IT, GONE, BACK, ANSWERED };   /* of shared->count: how far cyd is */

static void on_who(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_message reply = text_of(((side *)user)->name);
    (void)message;
    ADD(&shared->handled, 1);
    tprpc_reply(request, &reply);
}

static void on_never(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->seen, 1);
}

/* Asks the caller who he is, and answers that. */
static void on_mirror(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    tprpc_future future;
    (void)message;
    CHECK_EQ_INT(tprpc_call(s->agent, tprpc_request_caller(request), "who", NULL, NULL, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    CHECK_EQ_INT(tprpc_reply(request, tprpc_future_reply(future)), TPRPC_OK);
    tprpc_future_release(future);
}

static const tprpc_method_desc methods[] = {
    {"who", on_who, NULL, NULL, NULL, 0},
    {"never", on_never, NULL, NULL, NULL, 0},
    {"mirror", on_mirror, NULL, NULL, NULL, 0},
    {0},
};

static tprpc_status ask(side *s, const char *worker, const char *method, const char *expected, tprpc_error *error) {
    tprpc_call_options options = {0};
    tprpc_error mine = {0};
    tprpc_future future;
    if (!error) error = &mine;
    options.error = error;
    tprpc_status status = tprpc_call(s->agent, worker, method, NULL, &options, &future);
    if (status != TPRPC_OK) return status;
    status = tprpc_future_wait(future, WAIT_MS);
    tprpc_future_error(future, error);
    if (status == TPRPC_OK && expected) {
        const tprpc_message *reply = tprpc_future_reply(future);
        REQUIRE(reply != NULL);
        if (CHECK_EQ_INT(reply->metadata_size, strlen(expected))) CHECK_MEM(reply->metadata, expected, strlen(expected));
    } else if (status != TPRPC_OK && expected) {
        fprintf(stderr, "%s asks %s: %s\n", s->name, worker, error->text);
    }
    tprpc_future_release(future);
    return status;
}

static void ask_both_ways(side *s, const char *worker) {
    for (int i = 0; i < 20; i++) {
        CHECK_EQ_INT(ask(s, worker, "who", worker, NULL), TPRPC_OK);
        CHECK_EQ_INT(ask(s, worker, "mirror", s->name, NULL), TPRPC_OK);
    }
}

/* Nobody of that name is in the group, and the error says of whom. */
static void ask_nobody(side *s, const char *worker) {
    tprpc_error error = {0};
    CHECK_EQ_INT(ask(s, worker, "who", NULL, &error), TPRPC_ERROR_NO_WORKER);
    CHECK_CONTAINS(error.text, worker);
}

/* Drives until the pipe to the worker has ended, so that the next call looks him up. */
static void until_lost(side *s, const char *worker) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    tprpc_pipe_info info;
    while (tprpc_agent_get_peer_info(s->agent, worker, &info, sizeof info) == TPRPC_OK && test_now_us() < end)
        tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, worker, &info, sizeof info), TPRPC_ERROR_UNREACHABLE);
}

/* ---- late, gone and back ---- */

static void ann_stays(side *s) {
    ask_nobody(s, "bob");
    ask_nobody(s, "cyd");
    STORE(&shared->go, 1);             /* bob may come */
    CHECK(until(s, &shared->ready, 1));
    ask_both_ways(s, "bob");
    ask_nobody(s, "cyd");
    STORE(&shared->go, 2);             /* and cyd */
    CHECK(until(s, &shared->count[JOINED], 1));
    ask_both_ways(s, "cyd");
    ask_both_ways(s, "bob");
    STORE(&shared->go, 3);             /* cyd leaves, and is there still */
    CHECK(until(s, &shared->count[LEFT_IT], 1));
    const int handled = LOAD(&shared->handled);
    ask_nobody(s, "cyd");
    CHECK_EQ_INT(LOAD(&shared->handled), handled);
    STORE(&shared->go, 4);             /* cyd goes */
    CHECK(until(s, &shared->count[GONE], 1));
    until_lost(s, "cyd");
    ask_nobody(s, "cyd");
    STORE(&shared->go, 5);             /* and comes again */
    CHECK(until(s, &shared->count[BACK], 1));
    ask_both_ways(s, "cyd");
    CHECK(until(s, &shared->count[ANSWERED], 2));   /* bob and cyd are through */
    STORE(&shared->stop, 1);
    CHECK(until(s, &shared->outcomes, 2));   /* they have left: the store may go, if it is ann's */
}

static void bob_comes(side *s) {
    STORE(&shared->ready, 1);
    CHECK(until(s, &shared->count[BACK], 1));
    ask_both_ways(s, "ann");
    ask_both_ways(s, "cyd");
    ask_nobody(s, "dan");
    ADD(&shared->count[ANSWERED], 1);
    CHECK(until(s, &shared->stop, 1));
    side_leave(s);
    ADD(&shared->outcomes, 1);
}

static void dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    agent->world_size = agent->rank = 0;
    agent->serve_store = s->rank == 0 && s->init_method && strncmp(s->init_method, "tcp", 3) == 0;
    CHECK(until(NULL, &shared->go, s->rank));
}

static void cyd_comes_twice(side *s) {
    tprpc_agent_desc desc = {0};
    STORE(&shared->count[JOINED], 1);
    ask_both_ways(s, "bob");
    CHECK(until(s, &shared->go, 3));
    side_leave(s);
    CHECK_EQ_INT(tprpc_call(s->agent, "ann", "who", NULL, NULL, NULL), TPRPC_ERROR_CLOSED);
    STORE(&shared->count[LEFT_IT], 1);
    CHECK(until(s, &shared->go, 4));
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    STORE(&shared->count[GONE], 1);
    CHECK(until(s, &shared->go, 5));
    desc.context = s->ctx;
    desc.name = s->name;
    desc.init_method = s->init_method;
    desc.store = s->store;
    desc.start_timeout_ms = WAIT_MS;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &s->agent, NULL), TPRPC_OK);
    for (const tprpc_method_desc *m = methods; m->name; m++) {
        tprpc_method_desc method = *m;
        method.user = s;
        REQUIRE_EQ_INT(tprpc_agent_register(s->agent, &method, NULL), TPRPC_OK);
    }
    side_join(s);
    STORE(&shared->count[BACK], 1);
    ask_both_ways(s, "ann");
    ask_both_ways(s, "bob");
    ADD(&shared->count[ANSWERED], 1);
    CHECK(until(s, &shared->stop, 1));
    side_leave(s);
    ADD(&shared->outcomes, 1);
}

static void come_and_go(const mode *with, const char *url) {
    void (*const mains[3])(side *) = {ann_stays, bob_comes, cyd_comes_twice};
    side sides[3] = {{0}};
    for (int i = 0; i < 3; i++) {
        sides[i].main = mains[i];
        sides[i].methods = methods;
        sides[i].tune = dynamic;
        sides[i].init_method = url;
        sides[i].no_leave = i > 0;     /* they did */
    }
    sides[0].mode = with;
    group_run(sides, 3);
}

/* file:// between processes, local:// within one */
IN_MODES(come_late_leave_and_return, 0xff) { come_and_go(with, NULL); }

IN_MODES(over_a_tcp_store, 0xff) {
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    come_and_go(with, url);
}

/* ---- killed ---- */

static char store_url[300];

/* What became of a worker that wants to join under bob's name; it serves until told to stop when it could. */
static void another_bob(void *arg) {
    side s = {0};
    tprpc_error error = {0};
    s.name = "bob";
    s.mode = (const mode *)arg;
    s.methods = methods;
    s.init_method = store_url;
    s.tune = dynamic;
    s.rank = 1;
    side_open(&s);
    tprpc_status status = tprpc_agent_wait_ready(s.agent, 0, &error);
    snprintf(shared->text[1], sizeof shared->text[1], "%s", error.text);
    STORE(&shared->status[1], (int)status);
    ADD(&shared->ready, 1);
    if (status == TPRPC_OK) {
        CHECK(until(&s, &shared->stop, 1));
        side_leave(&s);
        ADD(&shared->outcomes, 1);
    }
    side_close(&s);
}

static void ann_sees_bob_die(side *s) {
    tprpc_error error = {0};
    tprpc_future future;
    tprpc_store_desc desc = {0};
    tprpc_store *store = NULL;
    CHECK(until(s, &shared->ready, 1));
    ask_both_ways(s, "bob");
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "never", NULL, NULL, &future), TPRPC_OK);
    CHECK(until(s, &shared->seen, 1));
    kill(shared->pid[1], SIGKILL);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_ERROR_PEER);
    CHECK_EQ_INT(tprpc_future_error(future, &error), TPRPC_ERROR_PEER);
    CHECK_CONTAINS(error.text, "bob");
    tprpc_future_release(future);
    memset(&error, 0, sizeof error);   /* his name is in the store still, but nobody is there */
    tprpc_status status = ask(s, "bob", "who", NULL, &error);
    CHECK(status == TPRPC_ERROR_UNREACHABLE || status == TPRPC_ERROR_PEER);
    CHECK_CONTAINS(error.text, "bob");
    fprintf(stderr, "the next call: %s\n", error.text);

    /* Another bob is told what is in his way, and does no harm. */
    STORE(&shared->ready, 0);
    shared->pid[2] = test_fork_run(another_bob, (void *)(uintptr_t)s->mode);
    CHECK(until(s, &shared->ready, 1));
    CHECK_EQ_INT(LOAD(&shared->status[1]), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(shared->text[1], "taken by worker bob");
    CHECK_CONTAINS(shared->text[1], "tprpc/name/bob");
    CHECK_EQ_INT(test_wait_child(shared->pid[2], 20), 0);

    /* Once that is out of his way, he is found. */
    desc.url = store_url;
    REQUIRE_EQ_INT(tprpc_store_open(s->ctx, &desc, &store, NULL), TPRPC_OK);
    bury_name(store, "bob");
    tprpc_store_close(store);
    ask_nobody(s, "bob");
    STORE(&shared->ready, 0);
    shared->pid[2] = test_fork_run(another_bob, (void *)(uintptr_t)s->mode);
    CHECK(until(s, &shared->ready, 1));
    CHECK_EQ_INT(LOAD(&shared->status[1]), TPRPC_OK);
    ask_both_ways(s, "bob");
    STORE(&shared->stop, 1);
    CHECK(until(s, &shared->outcomes, 1));
    CHECK_EQ_INT(test_wait_child(shared->pid[2], 20), 0);
}

static void bob_serves(side *s) {
    STORE(&shared->ready, 1);
    for (;;) tprpc_poll(s->ctx, 10000, 0);
}

static void killed_with_store(const mode *with, const char *url) {
    side sides[2] = {{0}};
    char dies[] = "dies";
    share();
    STORE(&shared->go, 1);
    snprintf(store_url, sizeof store_url, "%s", url);
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].tune = dynamic;
        sides[i].init_method = store_url;
    }
    sides[0].mode = with;
    sides[0].main = ann_sees_bob_die;
    sides[1].main = bob_serves;
    sides[1].user = dies;
    group_run(sides, 2);
}

IN_MODES(killed_and_restarted, APART_MODES) {
    char url[300], path[250];
    snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
    killed_with_store(with, url);
}

IN_MODES(killed_and_restarted_tcp, APART_MODES) {
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    killed_with_store(with, url);
}

/* ---- a store that is gone ---- */

static void ann_goes_first(side *s) {
    CHECK(until(s, &shared->ready, 1));
    side_leave(s);
}

static void bob_is_told(side *s) {
    tprpc_error error = {0};
    ask_both_ways(s, "ann");
    STORE(&shared->ready, 1);
    CHECK(until(s, &shared->stop, 1));
    tprpc_status status = tprpc_agent_leave(s->agent, 2000, &error);
    CHECK(status > TPRPC_PENDING);
    CHECK_CONTAINS(error.text, "bob is still in the store");
    fprintf(stderr, "told: %s\n", error.text);
    CHECK_EQ_INT(tprpc_call(s->agent, "ann", "who", NULL, NULL, NULL), TPRPC_ERROR_CLOSED);
}

/* ann serves the store and goes before bob, whose leave says that his name stays. */
IN_MODES(leave_without_a_store, 0xff) {
    side sides[2] = {{0}};
    char url[64];
    group g;
    share();
    STORE(&shared->go, 1);
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].tune = dynamic;
        sides[i].init_method = url;
        sides[i].no_leave = true;
    }
    sides[0].mode = with;
    sides[0].main = ann_goes_first;
    sides[1].main = bob_is_told;
    group_open(&g, sides, 2);
    if (with->processes) shared->pid[1] = test_fork_run(side_run, &sides[1]);
    else REQUIRE_EQ_INT(pthread_create(&sides[1].self, NULL, side_thread, &sides[1]), 0);
    side_run(&sides[0]);
    STORE(&shared->stop, 1);
    if (with->processes) CHECK_EQ_INT(test_wait_child(shared->pid[1], 40), 0);
    else pthread_join(sides[1].self, NULL);
    group_close(&g);
}
