/* A dynamic group whose tcp:// store dies with the worker that serves it, and comes back at its address. */
#include "agent_help.h"

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static const tprpc_method_desc methods[] = {{"echo", on_echo, NULL, NULL, NULL, 0}, {0}};

static void dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    agent->world_size = agent->rank = 0;
    agent->serve_store = s->rank == 0;
}

static char url[64];
static side sides[3];

static side *side_of(int rank, const mode *with, void (*in_main)(side *)) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    side *s = &sides[rank];
    memset(s, 0, sizeof *s);
    s->name = names[rank];
    s->rank = rank;
    s->mode = with;
    s->init_method = url;
    s->methods = methods;
    s->tune = dynamic;
    s->main = in_main;
    s->no_leave = true;
    return s;
}

static tprpc_status ask(side *s, const char *worker, int64_t timeout_ms, tprpc_error *error) {
    tprpc_call_options options = {0};
    options.timeout_ms = timeout_ms;
    return call_and_wait(s, worker, "echo", NULL, &options, error);
}

static void serves(side *s) {
    ADD(&shared->ready, 1);
    CHECK(until(s, &shared->stop, 1));
}

static void cyd_serves(side *s) {
    ADD(&shared->ready, 1);
    CHECK(until(s, &shared->go, 1));
    CHECK_EQ_INT(ask(s, "bob", WAIT_MS, NULL), TPRPC_OK);
    ADD(&shared->seen, 1);
    CHECK(until(s, &shared->go, 2));
    CHECK_EQ_INT(ask(s, "bob", WAIT_MS, NULL), TPRPC_OK);
    side_leave(s);                     /* by a store that was away: it is back, if not his name */
    ADD(&shared->outcomes, 1);
}

static void kill_ann(void) {
    kill(shared->pid[0], SIGKILL);
    CHECK_EQ_INT(test_wait_child(shared->pid[0], 10), 128 + SIGKILL);
}

static void store_returns(const mode *with) {
    tprpc_error error = {0};
    share();
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    shared->pid[0] = test_fork_run(side_run, side_of(0, with, serves));
    shared->pid[2] = test_fork_run(side_run, side_of(2, with, cyd_serves));
    side *bob = side_of(1, with, NULL);
    side_open(bob);
    side_join(bob);
    CHECK(until(bob, &shared->ready, 2));
    CHECK_EQ_INT(ask(bob, "ann", WAIT_MS, NULL), TPRPC_OK);
    CHECK_EQ_INT(ask(bob, "cyd", WAIT_MS, NULL), TPRPC_OK);
    STORE(&shared->go, 1);
    CHECK(until(bob, &shared->seen, 1));

    kill_ann();
    CHECK(ask(bob, "ann", 300, &error) > TPRPC_PENDING);
    CHECK_CONTAINS(error.text, "ann");
    for (int i = 0; i < 10; i++) CHECK_EQ_INT(ask(bob, "cyd", WAIT_MS, NULL), TPRPC_OK);   /* whom he knows */

    shared->pid[0] = test_fork_run(side_run, side_of(0, with, serves));
    CHECK(until(bob, &shared->ready, 3));
    int64_t end = test_now_us() + WAIT_MS * 1000;
    while (ask(bob, "ann", 1000, &error) != TPRPC_OK && test_now_us() < end) tprpc_poll(bob->ctx, 1000, 0);
    CHECK_EQ_INT(ask(bob, "ann", WAIT_MS, NULL), TPRPC_OK);
    CHECK_EQ_INT(ask(bob, "cyd", WAIT_MS, NULL), TPRPC_OK);
    STORE(&shared->go, 2);             /* cyd leaves while it is there, bob when it has gone for good */
    CHECK(until(bob, &shared->outcomes, 1));
    CHECK_EQ_INT(test_wait_child(shared->pid[2], 20), 0);
    STORE(&shared->stop, 1);
    CHECK_EQ_INT(test_wait_child(shared->pid[0], 20), 0);
    CHECK(ask(bob, "dan", 300, &error) > TPRPC_PENDING);   /* waits for it to return, which leave does not */
    CHECK_EQ_INT(tprpc_agent_leave(bob->agent, WAIT_MS, &error), TPRPC_ERROR_PEER);
    CHECK_CONTAINS(error.text, "lost its server");
    side_close(bob);
}
IN_MODES(the_store_returns, APART_MODES) { store_returns(with); }
