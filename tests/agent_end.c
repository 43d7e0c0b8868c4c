/* How agents end with work at hand, and what they owe until then. */
#include "agent_two.h"
#include <poll.h>

/* ---- memory that was placed comes back ---- */

enum { BIG = 4 << 20, WORDS = 512 << 10 };   /* words: more than a loop's pool keeps, so that a stale look is seen */
static uint8_t *big[2];
static char *words;

static void big_open(void) {
    for (int i = 0; i < 2; i++) REQUIRE((big[i] = (uint8_t *)calloc(1, BIG)) != NULL);
    REQUIRE((words = (char *)malloc(WORDS)) != NULL);
    memset(words, 'w', WORDS);
}

static void big_close(void) {
    for (int i = 0; i < 2; i++) free(big[i]);
    free(words);
}

static tprpc_status place_big(tprpc_placement *placement, void *user) {
    (void)user;
    placement->tensors[0].data = big[1];
    placement->cookie = &shared->unplaced;
    ADD(&shared->placed, 1);
    return TPRPC_OK;
}

static void unplace_big(const tprpc_placement *placement, void *user) {
    (void)user;
    CHECK(placement->cookie == &shared->unplaced);
    CHECK(placement->tensors[0].data == big[1]);
    CHECK_EQ_INT(placement->descriptor->tensor_count, 1);
    CHECK_EQ_INT(placement->descriptor->tensors[0].size, BIG);
    if (CHECK_EQ_INT(placement->descriptor->metadata_size, WORDS))
        CHECK_MEM(placement->descriptor->metadata, words, WORDS);
    ADD(&shared->unplaced, 1);
}

static void on_big(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK(message->tensors[0].data == big[1]);
    ADD(&shared->handled, 1);
    tprpc_reply(request, NULL);
}

/* Replies with words and a big tensor, lent. */
static void on_give(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensor = bytes_of(big[0], BIG);
    tprpc_message reply = tensors_of(&tensor, 1);
    (void)message; (void)user;
    reply.metadata = words;
    reply.metadata_size = WORDS;
    reply.release = count_release;
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static const tprpc_method_desc big_methods[] = {
    {"big", on_big, place_big, unplace_big, NULL, 0}, {"give", on_give, NULL, NULL, NULL, 0},
    {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

static void send_big(uint32_t lane, outcome *o) {
    tprpc_call_options options = {0};
    tprpc_tensor tensor = bytes_of(big[0], BIG);
    tprpc_message message = tensors_of(&tensor, 1);
    message.metadata = words;
    message.metadata_size = WORDS;
    message.release = count_release;
    options.lane = lane;
    CHECK_EQ_INT(call(&two[0], "bob", "big", &message, &options, o), TPRPC_OK);
}

/* The server goes while it receives in place: the memory is its again before destroy returns. */
IN_KINDS(destroy_while_a_request_is_placed, EVERY) {
    outcome o = {0};
    big_open();
    two_join(with, big_methods);
    send_big(0, &o);
    while (!LOAD(&shared->placed)) turn();
    end_agent(&two[1]);
    CHECK_EQ_INT(LOAD(&shared->unplaced) + LOAD(&shared->handled), 1);
    CHECK(both_until(&o.count, 1));
    CHECK(both_until(&shared->released, 1));
    for (int i = 0; i < 20; i++) turn();
    CHECK_EQ_INT(LOAD(&shared->unplaced) + LOAD(&shared->handled), 1);
    two_close();
    big_close();
}

/* The caller goes while it receives a reply in place. */
IN_KINDS(destroy_while_a_reply_is_placed, EVERY) {
    tprpc_call_options options = {0};
    big_open();
    two_join(with, big_methods);
    options.place = place_big;
    options.on_unplaced = unplace_big;
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "give", NULL, &options, NULL), TPRPC_OK);
    while (!LOAD(&shared->placed)) turn();
    end_agent(&two[0]);
    CHECK_LE_INT(LOAD(&shared->unplaced), 1);
    if (!with->threads) CHECK_EQ_INT(LOAD(&shared->unplaced), 1);   /* with threads all may have come by now */
    CHECK(both_until(&shared->released, 1));
    for (int i = 0; i < 20; i++) turn();
    two_close();
    CHECK_LE_INT(LOAD(&shared->unplaced), 1);
    big_close();
}

/* The caller gives up while the server receives: on_unplaced reads the descriptor of a request that is over. */
IN_KINDS(unplaced_shows_its_descriptor, EVERY) {
    tprpc_call_options options = {0};
    tprpc_future future;
    tprpc_tensor tensor = bytes_of(NULL, BIG);
    tprpc_message message = tensors_of(&tensor, 1);
    big_open();
    tensor.data = big[0];
    two_join(with, big_methods);
    message.metadata = words;
    message.metadata_size = WORDS;
    message.release = count_release;
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "big", &message, &options, &future), TPRPC_OK);
    while (!LOAD(&shared->placed)) turn();
    end_agent(&two[0]);
    for (int i = 0; i < 30000 && !LOAD(&shared->unplaced) && !LOAD(&shared->handled); i++) {
        turn();
        test_sleep_us(100);
    }
    CHECK_EQ_INT(LOAD(&shared->unplaced) + LOAD(&shared->handled), 1);
    CHECK_EQ_INT(LOAD(&shared->released), 1);
    two_close();
    CHECK_EQ_INT(LOAD(&shared->unplaced) + LOAD(&shared->handled), 1);
    big_close();
}

/* A request that was placed and is whole waits in its lane for one that is still on its way, when the agent goes. */
static tprpc_status place_small(tprpc_placement *placement, void *user) {
    (void)user;
    placement->tensors[0].data = shared->text[0];
    ADD(&shared->count[0], 1);
    return TPRPC_OK;
}

static void unplace_small(const tprpc_placement *placement, void *user) {
    (void)user;
    CHECK(placement->tensors[0].data == shared->text[0]);
    ADD(&shared->count[1], 1);
}

static void on_small(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    ADD(&shared->count[2], 1);
    tprpc_reply(request, NULL);
}

static const tprpc_method_desc lane_methods[] = {
    {"big", on_big, place_big, unplace_big, NULL, 0}, {"small", on_small, place_small, unplace_small, NULL, 0}, {0},
};

IN_KINDS(destroy_while_a_lane_waits, EVERY) {
    tprpc_call_options options = {0};
    tprpc_tensor tensor = bytes_of(shared, 8);
    tprpc_message message = tensors_of(&tensor, 1);
    outcome o[2] = {{0}};
    big_open();
    two_join(with, lane_methods);
    tensor.data = shared->text[1];
    send_big(7, &o[0]);
    options.lane = 7;
    CHECK_EQ_INT(call(&two[0], "bob", "small", &message, &options, &o[1]), TPRPC_OK);
    CHECK(both_until(&shared->count[0], 1));
    if (!with->threads) CHECK_EQ_INT(LOAD(&shared->handled), 0);
    turn();
    end_agent(&two[1]);
    CHECK_EQ_INT(LOAD(&shared->unplaced) + LOAD(&shared->handled), 1);
    CHECK_EQ_INT(LOAD(&shared->count[1]) + LOAD(&shared->count[2]), 1);
    for (int i = 0; i < 2; i++) CHECK(both_until(&o[i].count, 1));
    CHECK(both_until(&shared->released, 1));
    two_close();
    big_close();
}

/* ---- a name that is being looked up ---- */

static void make_dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)context;
    agent->world_size = 0;
}

static const tprpc_method_desc echo_methods[] = {{"echo", on_echo, NULL, NULL, NULL, 0}, {0}};

IN_KINDS(destroy_while_a_name_is_looked_up, EVERY) {
    tprpc_future future;
    two_tune = make_dynamic;
    two_join(with, echo_methods);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "nobody", "echo", NULL, NULL, NULL), TPRPC_OK);   /* no callback: it alone */
    CHECK_EQ_INT(tprpc_call(two[0].agent, "no one", "echo", NULL, NULL, &future), TPRPC_OK);   /* is waited for */
    end_agent(&two[0]);
    for (int i = 0; i < 20; i++) turn();
    two_close();
}

/* ---- destroy and what runs meanwhile ---- */

static void on_join(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    CHECK_EQ_INT(status, TPRPC_ERROR_CLOSED);
    if (error) CHECK_CONTAINS(error->text, "destroyed");
    ADD((int *)user, 1);
}

/* It waits for a worker that does not come; or it has just begun. */
IN_KINDS(destroy_while_starting, EVERY) {
    for (int turns = 0; turns <= 100; turns += 50) {
        int ready = 0;
        two_open(with, echo_methods);
        CHECK_EQ_INT(tprpc_agent_start(two[0].agent, on_join, &ready, NULL), TPRPC_OK);
        for (int i = 0; i < turns; i++) turn();
        CHECK_EQ_INT(ready, 0);
        end_agent(&two[0]);
        CHECK_EQ_INT(ready, 1);
        for (int i = 0; i < 20; i++) turn();
        CHECK_EQ_INT(ready, 1);
        two_close();
    }
}

/* A handler on a thread of the agent's or the engine's destroys the agent: refused. */
static void on_destroy(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    STORE(&shared->status[0], (int)tprpc_agent_destroy(s->agent));
    tprpc_reply(request, message);
}

static const tprpc_method_desc destroy_methods[] = {
    {"destroy", on_destroy, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

static void with_workers(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    if (s == &two[1]) agent->worker_threads = 2;
}

typedef struct engine_job { void (*run)(void *); void *arg; } engine_job;
static void *engine_job_run(void *arg) {
    engine_job job = *(engine_job *)arg;
    free(arg);
    job.run(job.arg);
    return NULL;
}

static pthread_t engine_threads[32];
static int engine_count;

static bool engine_submit(void (*run)(void *), void *arg, void *user) {
    engine_job *job = (engine_job *)malloc(sizeof *job);
    (void)user;
    REQUIRE(job != NULL && engine_count < 32);
    job->run = run;
    job->arg = arg;
    REQUIRE_EQ_INT(pthread_create(&engine_threads[engine_count++], NULL, engine_job_run, job), 0);
    return true;
}

static void engine_join(void) { while (engine_count) pthread_join(engine_threads[--engine_count], NULL); }

static void with_engine(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s == &two[1]) context->submit = engine_submit;
}

static void destroy_inside(const kind *with, void (*how)(side *, tprpc_context_desc *, tprpc_agent_desc *)) {
    outcome o = {0};
    two_tune = how;
    two_join(with, destroy_methods);
    CHECK_EQ_INT(call(&two[0], "bob", "destroy", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->status[0]), TPRPC_ERROR_INVALID);
    o.count = 0;
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);   /* nothing was done */
    CHECK(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    engine_join();
    two_close();
}
IN_KINDS(destroy_in_a_worker, TWO) { destroy_inside(with, with_workers); }
IN_KINDS(destroy_in_a_job, TWO) { destroy_inside(with, with_engine); }

/* A blocking handler waits for the callback of a call of its own, which destroy alone can end and run. */
static tprpc_request held[8];
static int held_count;

static void on_hold(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    held[ADD(&held_count, 1) - 1] = request;
    ADD(&shared->seen, 1);
}

static void on_wait_for_callback(tprpc_request request, const tprpc_message *message, void *user) {
    outcome o = {0};
    (void)message;
    CHECK_EQ_INT(call((side *)user, "ann", "hold", NULL, NULL, &o), TPRPC_OK);
    CHECK(until(NULL, &o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_CLOSED);
    tprpc_reply(request, NULL);
    ADD(&shared->handled, 1);
}

static const tprpc_method_desc waiting_methods[] = {
    {"wait", on_wait_for_callback, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {"hold", on_hold, NULL, NULL, NULL, 0},
    {0},
};

static void destroy_under_a_handler(const kind *with, void (*how)(side *, tprpc_context_desc *, tprpc_agent_desc *)) {
    two_tune = how;
    two_join(with, waiting_methods);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "wait", NULL, NULL, NULL), TPRPC_OK);
    CHECK(both_until(&shared->seen, 1));
    end_agent(&two[1]);
    CHECK_EQ_INT(LOAD(&shared->handled), 1);
    engine_join();
    two_close();
}
IN_KINDS(destroy_under_a_worker_that_waits, EVERY) { destroy_under_a_handler(with, with_workers); }
IN_KINDS(destroy_under_a_job_that_waits, EVERY) { destroy_under_a_handler(with, with_engine); }

/* Another thread destroys an agent of a shared context: callbacks come back to the thread they belong to. */
static void *destroy_extra(void *arg) {
    CHECK_EQ_INT(tprpc_agent_destroy((tprpc_agent *)arg), TPRPC_OK);
    return NULL;
}

IN_KINDS(destroy_on_another_thread, EVERY) {
    tprpc_agent_desc desc = {0};
    tprpc_agent *extra = NULL;
    outcome o = {0};
    pthread_t thread;
    two_join(with, echo_methods);
    desc.name = "extra";
    desc.store = two_group.store;
    desc.context = two[0].ctx;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &extra, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, destroy_extra, extra), 0);
    pthread_join(thread, NULL);
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    two_close();
}

/* ---- answers ---- */

/* The answer to a one-way call goes nowhere, but what it lends is released where callbacks run. */
static void release_here(void *user) {
    if (!pthread_equal(pthread_self(), *(pthread_t *)user)) ADD(&shared->bad, 1);
    ADD(&shared->released, 1);
}

static void *answer_apart(void *arg) {
    tprpc_message reply = text_of("to nobody");
    reply.release = release_here;
    reply.release_user = arg;
    CHECK_EQ_INT(tprpc_reply(held[0], &reply), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    CHECK_EQ_INT(tprpc_reply(held[0], NULL), TPRPC_ERROR_INVALID);
    return NULL;
}

IN_KINDS(answer_to_a_one_way_call, POLLED) {
    tprpc_call_options options = {0};
    pthread_t self = pthread_self(), thread;
    two_join(with, waiting_methods);
    options.flags = TPRPC_CALL_ONE_WAY;
    for (int destroyed = 0; destroyed < 2; destroyed++) {   /* destroy runs it, if nothing else does */
        held_count = shared->seen = shared->released = 0;
        CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "hold", NULL, &options, NULL), TPRPC_OK);
        CHECK(both_until(&shared->seen, 1));
        REQUIRE_EQ_INT(pthread_create(&thread, NULL, answer_apart, &self), 0);
        pthread_join(thread, NULL);
        if (destroyed) end_agent(&two[1]);
        else CHECK(both_until(&shared->released, 1));
        CHECK_EQ_INT(LOAD(&shared->released), 1);
    }
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
    two_close();
}

/* The caller does not read, and its pipe holds what it may: an error goes all the same, so no call waits in vain. */
static void small_queue(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s == &two[1]) context->limits.inflight_bytes = 64 << 10;
}

static void on_fill(tprpc_request request, const tprpc_message *message, void *user) {
    static uint8_t bytes[16 << 10];
    tprpc_message reply = {0};
    (void)message; (void)user;
    reply.metadata = bytes;
    reply.metadata_size = sizeof bytes;
    ADD(&shared->handled, 1);
    tprpc_status status = tprpc_reply(request, &reply);
    if (status == TPRPC_OK) return;
    CHECK_EQ_INT(status, TPRPC_ERROR_LIMIT);
    if (ADD(&shared->seen, 1) % 2) CHECK_EQ_INT(tprpc_fail(request, 7, "no room"), TPRPC_OK);
}                                      /* or it returns without a word, and that is said */

static const tprpc_method_desc fill_methods[] = {{"fill", on_fill, NULL, NULL, NULL, 0}, {0}};

IN_KINDS(errors_pass_a_full_pipe, POLLED) {
    enum { N = 4000, MORE = 400 };
    static outcome o[N + MORE];
    int n = 0, more = 0, failed = 0;
    two_tune = small_queue;
    two_join(with, fill_methods);
    while (n < N && more < MORE) {     /* bob alone is polled; ann's call leaves at once */
        tprpc_call_options options = {0};
        options.timeout_ms = 5000;
        REQUIRE_EQ_INT(call(&two[0], "bob", "fill", NULL, &options, &o[n]), TPRPC_OK);
        n++;
        while (LOAD(&shared->handled) < 1) turn();
        while (LOAD(&shared->handled) < n) tprpc_poll(two[1].ctx, TPRPC_NOW, 1);
        more = LOAD(&shared->seen);
    }
    CHECK(more >= MORE);
    for (int i = 0; i < n; i++) {
        CHECK(both_until(&o[i].count, 1));
        if (o[i].status == TPRPC_OK) continue;
        failed++;
        CHECK_EQ_INT(o[i].status, TPRPC_ERROR_REMOTE);
    }
    CHECK_EQ_INT(failed, more);
    two_close();
}

/* ---- calls that begin while the agent ends ---- */

static void on_hammer(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    tprpc_status status = TPRPC_OK;
    (void)message;
    ADD(&shared->seen, 1);
    while (status != TPRPC_ERROR_CLOSED) status = tprpc_call(s->agent, "ann", "none", NULL, NULL, NULL);
    tprpc_reply(request, NULL);
    ADD(&shared->handled, 1);
}

static const tprpc_method_desc hammer_methods[] = {
    {"hammer", on_hammer, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {0},
};

IN_KINDS(destroy_while_threads_call, EVERY) {
    for (int round = 0; round < 20 / TEST_SLOWDOWN; round++) {
        two_tune = with_workers;
        shared ? (void)memset(shared, 0, sizeof *shared) : (void)0;
        two_join(with, hammer_methods);
        for (int i = 0; i < 2; i++)
            CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "hammer", NULL, NULL, NULL), TPRPC_OK);
        CHECK(both_until(&shared->seen, 2));
        end_agent(&two[1]);
        CHECK_EQ_INT(LOAD(&shared->handled), 2);
        for (int i = 0; i < 20; i++) turn();
        two_close();
    }
}

/* ---- starts that fail ---- */

TEST(wait_ready_after_a_failed_start) {
    for (int i = 0; i < 2; i++) {
        tprpc_agent_desc desc = {0};
        tprpc_agent *agent = NULL;
        tprpc_error error[2] = {{0}};
        unsetenv("MASTER_ADDR");
        desc.name = "ann";
        desc.world_size = 3;
        desc.init_method = i ? "env://" : "tcp://127.0.0.1:1";
        if (!i) desc.address = "no such place";
        REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
        for (int k = 0; k < 2; k++) CHECK_EQ_INT(tprpc_agent_wait_ready(agent, 200, &error[k]), TPRPC_ERROR_INVALID);
        CHECK_STR(error[1].text, error[0].text);
        CHECK_EQ_INT(tprpc_agent_start(agent, NULL, NULL, &error[0]), TPRPC_ERROR_INVALID);
        CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    }
}

/* ---- the last word of an engine's job: agent and context go as soon as it has answered ---- */

IN_KINDS(destroy_after_a_job, TWO) {
    for (int round = 0; round < 20; round++) {
        tprpc_message message = text_of("x");
        outcome o = {0};
        two_tune = with_engine;
        if (shared) shared->ready = 0;
        two_join(with, destroy_methods);
        two[1].methods = NULL;
        CHECK_EQ_INT(call(&two[0], "bob", "destroy", &message, NULL, &o), TPRPC_OK);
        CHECK(both_until(&o.count, 1));
        two_close();
        engine_join();
    }
}

/* ---- a store under the test's control: it answers, or holds what one side asks, or is silent ---- */

typedef struct slow_key { char key[64]; char value[2000]; size_t size; bool there; } slow_key;
static slow_key slow_keys[32];
static int slow_key_count;
static pthread_mutex_t slow_lock = PTHREAD_MUTEX_INITIALIZER;

typedef struct slow_store {            /* one for each side; what they hold is common */
    tprpc_store *store;
    bool closed, silent;               /* closed: gets wait; silent: nothing is answered */
    tprpc_store_op *ops[32];
    char keys[32][64];
    int count;
} slow_store;
static slow_store slow[2];

static slow_key *slow_find(const char *key, bool create) {
    for (int i = 0; i < slow_key_count; i++)
        if (strcmp(slow_keys[i].key, key) == 0) return create || slow_keys[i].there ? &slow_keys[i] : NULL;
    if (!create) return NULL;
    REQUIRE(slow_key_count < 32);
    snprintf(slow_keys[slow_key_count].key, sizeof slow_keys[0].key, "%s", key);
    return &slow_keys[slow_key_count++];
}

static void slow_look(slow_store *s) { /* ends the gets that can end */
    for (;;) {
        tprpc_store_op *op = NULL;
        slow_key *found = NULL;
        pthread_mutex_lock(&slow_lock);
        for (int i = 0; i < s->count && !op && !s->closed; i++) {
            if ((found = slow_find(s->keys[i], false)) == NULL) continue;
            op = s->ops[i];
            s->ops[i] = s->ops[--s->count];
            memmove(s->keys[i], s->keys[s->count], sizeof s->keys[i]);
        }
        pthread_mutex_unlock(&slow_lock);
        if (!op) return;
        tprpc_store_finish(op, TPRPC_OK, found->value, found->size, NULL);
    }
}

static void slow_submit(void *user, tprpc_store_op *op, const tprpc_store_request *request) {
    slow_store *s = (slow_store *)user;
    slow_key *found = NULL;
    const bool wait = s->silent || (request->kind == TPRPC_STORE_GET && request->deadline_us != TPRPC_NOW);
    tprpc_status status = TPRPC_OK;
    int64_t sum = 0;
    pthread_mutex_lock(&slow_lock);
    if (wait) {
        REQUIRE(s->count < 32);
        snprintf(s->keys[s->count], sizeof s->keys[0], "%s", s->silent ? "(silent)" : request->key);
        s->ops[s->count++] = op;
    } else {
        found = slow_find(request->key, true);
        bool same = found->there ? request->expected && found->size == request->expected_size &&
                                       memcmp(found->value, request->expected, found->size) == 0
                                 : !request->expected;
        REQUIRE(request->value_size <= sizeof found->value);
        if (request->kind == TPRPC_STORE_GET && !found->there) status = TPRPC_ERROR_TIMEOUT;
        if (request->kind == TPRPC_STORE_DELETE) found->there = false;
        if (request->kind == TPRPC_STORE_ADD) {
            sum = (found->there ? strtoll(found->value, NULL, 10) : 0) + request->delta;
            found->size = (size_t)snprintf(found->value, sizeof found->value, "%lld", (long long)sum);
            found->there = true;
        }
        if (request->kind == TPRPC_STORE_SET || (request->kind == TPRPC_STORE_COMPARE_SET && same)) {
            memcpy(found->value, request->value, found->size = request->value_size);
            found->there = true;
        }
    }
    pthread_mutex_unlock(&slow_lock);
    if (!wait && request->kind == TPRPC_STORE_ADD) tprpc_store_finish(op, TPRPC_OK, &sum, sizeof sum, NULL);
    else if (!wait) tprpc_store_finish(op, status, found->there ? found->value : NULL, found->there * found->size, NULL);
    for (int i = 0; i < 2; i++) slow_look(&slow[i]);
}

static void slow_cancel(void *user, tprpc_store_op *op) {
    slow_store *s = (slow_store *)user;
    bool found = false;
    pthread_mutex_lock(&slow_lock);
    for (int i = 0; i < s->count && !found; i++) {
        if (s->ops[i] != op) continue;
        found = true;
        s->ops[i] = s->ops[--s->count];
        memmove(s->keys[i], s->keys[s->count], sizeof s->keys[i]);
    }
    pthread_mutex_unlock(&slow_lock);
    if (found) tprpc_store_finish(op, TPRPC_ERROR_CANCELLED, NULL, 0, NULL);
}

static const tprpc_store_table slow_table = {sizeof slow_table, slow_submit, slow_cancel, NULL};
static tprpc_context *slow_ctx;

static void slow_open(int64_t timeout_ms) {
    tprpc_context_desc context = {0};
    context.threads = 1;
    REQUIRE_EQ_INT(tprpc_context_create(&context, &slow_ctx, NULL), TPRPC_OK);
    for (int i = 0; i < 2; i++) {
        tprpc_store_desc desc = {0};
        desc.table = &slow_table;
        desc.user = &slow[i];
        desc.timeout_ms = timeout_ms;
        REQUIRE_EQ_INT(tprpc_store_open(slow_ctx, &desc, &slow[i].store, NULL), TPRPC_OK);
    }
}

static void slow_close(void) {
    for (int i = 0; i < 2; i++) tprpc_store_close(slow[i].store);
    CHECK_EQ_INT(tprpc_context_destroy(slow_ctx), TPRPC_OK);
}

static void with_slow(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    agent->store = slow[s - two].store;
}

/* ---- lanes ---- */

static void on_order(tprpc_request request, const tprpc_message *message, void *user) {
    uint32_t number;
    (void)user;
    memcpy(&number, message->metadata, sizeof number);
    if (number != (uint32_t)ADD(&shared->handled, 1)) {
        fprintf(stderr, "number %u is handled as number %d\n", number, LOAD(&shared->handled));
        ADD(&shared->bad, 1);
    }
    tprpc_reply(request, NULL);
}

static const tprpc_method_desc order_methods[] = {
    {"inline", on_order, NULL, NULL, NULL, 0}, {"blocking", on_order, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {0},
};

static void send_order(uint32_t number, const char *method) {
    tprpc_call_options options = {0};
    tprpc_message message = {0};
    message.metadata = &number;
    message.metadata_size = sizeof number;
    options.lane = 5;
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", method, &message, &options, NULL), TPRPC_OK);
}

/* Calls reach a worker that has not started yet: it holds them, in order. */
IN_KINDS(lanes_while_starting, EVERY) {
    enum { N = 20 };
    slow_open(TPRPC_FOREVER);
    slow[1].closed = true;
    two_tune = with_slow;
    two_open(with, order_methods);
    for (int i = 0; i < 2; i++)
        CHECK_EQ_INT(tprpc_agent_start(two[i].agent, count_ready, &shared->ready, NULL), TPRPC_OK);
    REQUIRE(both_until(&shared->ready, 1));
    for (uint32_t i = 1; i <= N; i++) {
        send_order(i, "inline");
        for (int k = 0; k < 10; k++) turn();
        if (i % 7 == 0) test_sleep_us(1500);
    }
    for (int64_t end = test_now_us() + 20000; test_now_us() < end;) turn();
    CHECK_EQ_INT(LOAD(&shared->ready), 1);
    CHECK_EQ_INT(LOAD(&shared->handled), 0);
    slow[1].closed = false;
    slow_look(&slow[1]);
    CHECK(both_until(&shared->ready, 2));
    CHECK(both_until(&shared->handled, N));
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
    two_close();
    slow_close();
}

/* They are held, and the worker is destroyed: each ends. */
IN_KINDS(destroy_with_calls_held, EVERY) {
    outcome o[4] = {{0}};
    slow_open(TPRPC_FOREVER);
    slow[1].closed = true;
    two_tune = with_slow;
    two_open(with, echo_methods);
    CHECK_EQ_INT(tprpc_agent_start(two[0].agent, count_ready, &shared->ready, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_start(two[1].agent, on_join, &shared->count[0], NULL), TPRPC_OK);
    REQUIRE(both_until(&shared->ready, 1));
    for (int i = 0; i < 4; i++) CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o[i]), TPRPC_OK);
    for (int64_t end = test_now_us() + 20000; test_now_us() < end;) turn();
    end_agent(&two[1]);
    CHECK_EQ_INT(LOAD(&shared->count[0]), 1);
    for (int i = 0; i < 4; i++) CHECK(both_until(&o[i].count, 1));
    two_close();
    slow_close();
}

/* An engine that refuses every other job, and runs the last one first. */
static engine_job stack[64];
static int stack_count, stack_asked;

static bool stack_submit(void (*run)(void *), void *arg, void *user) {
    (void)user;
    if (ADD(&stack_asked, 1) % 2) return false;
    pthread_mutex_lock(&slow_lock);
    REQUIRE(stack_count < 64);
    stack[stack_count].run = run;
    stack[stack_count++].arg = arg;
    pthread_mutex_unlock(&slow_lock);
    return true;
}

static bool stack_run(void) {
    engine_job job = {NULL, NULL};
    pthread_mutex_lock(&slow_lock);
    if (stack_count) job = stack[--stack_count];
    pthread_mutex_unlock(&slow_lock);
    if (job.run) job.run(job.arg);
    return job.run != NULL;
}

static void with_stack(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s == &two[1]) context->submit = stack_submit;
}

IN_KINDS(lanes_of_jobs, POLLED) {    /* one thread: that order is the order of their beginnings */
    enum { N = 30 };
    int64_t end = test_now_us() + 20000000;
    two_tune = with_stack;
    two_join(with, order_methods);
    for (uint32_t i = 1; i <= N; i++) send_order(i, i % 3 ? "blocking" : "inline");
    while (LOAD(&shared->handled) < N && test_now_us() < end) {
        for (int i = 0; i < 20; i++) turn();
        test_sleep_us(500);
        stack_run();
    }
    CHECK_EQ_INT(LOAD(&shared->handled), N);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
    while (stack_run()) {}
    two_close();
}

/* ---- futures ---- */

static const tprpc_method_desc future_methods[] = {
    {"hold", on_hold, NULL, NULL, NULL, 0}, {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

/* Of two futures on two loops the second is over: a look that does not wait finds it. */
IN_KINDS(wait_any_over_two_loops, 0x10) {
    tprpc_future futures[2];
    size_t which = 9;
    two_join(with, future_methods);
    for (int round = 0; round < 2; round++) {
        tprpc_call_options options = {0};
        outcome o = {0};
        options.on_done = on_outcome;
        options.user = &o;
        CHECK_EQ_INT(tprpc_call(two[0].agent, round ? "ann" : "bob", "hold", NULL, NULL, &futures[0]), TPRPC_OK);
        CHECK_EQ_INT(tprpc_call(two[0].agent, round ? "bob" : "ann", "echo", NULL, &options, &futures[1]), TPRPC_OK);
        CHECK(futures[0].id >> 56 != futures[1].id >> 56);
        CHECK(both_until(&o.count, 1));
        CHECK_EQ_INT(tprpc_future_wait_any(futures, 2, TPRPC_NOW, &which), TPRPC_OK);
        CHECK_EQ_INT(which, 1);
        CHECK_EQ_INT(tprpc_future_wait_any(futures, 1, TPRPC_NOW, &which), TPRPC_PENDING);
        for (int i = 0; i < 2; i++) tprpc_future_release(futures[i]);
    }
    CHECK(both_until(&shared->seen, 2));
    two_close();
}

/* Cancelled while its pipe still connects: the peer is told, behind the call. */
IN_KINDS(cancel_while_connecting, EVERY) {
    tprpc_future future;
    bool cancelled = false;
    two_join(with, future_methods);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "hold", NULL, NULL, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    CHECK(both_until(&shared->seen, 1));
    for (int64_t end = test_now_us() + 3000000; !cancelled && test_now_us() < end;) {
        turn();
        cancelled = tprpc_request_cancelled(held[0]);
    }
    CHECK(cancelled);
    tprpc_future_release(future);
    two_close();
}

/* ---- a store that does not answer, and has no limit of its own ---- */

static void on_late(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    CHECK_EQ_INT(status, TPRPC_ERROR_TIMEOUT);
    if (error) fprintf(stderr, "%s\n", error->text);
    ADD((int *)user, 1);
}

static void with_slow_shortly(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    with_slow(s, context, agent);
    agent->start_timeout_ms = 200;
}

IN_KINDS(start_at_a_silent_store, TWO) {
    for (int dynamic = 0; dynamic < 2; dynamic++) {
        tprpc_error error = {0};
        int ready = 0;
        two_tune = with_slow_shortly;
        slow[0].silent = true;
        slow_open(TPRPC_FOREVER);
        two_open(with, echo_methods);
        CHECK_EQ_INT(tprpc_agent_start(two[0].agent, on_late, &ready, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_agent_wait_ready(two[0].agent, 50, &error), TPRPC_ERROR_TIMEOUT);
        CHECK_CONTAINS(error.text, "50 ms");
        CHECK_CONTAINS(error.text, "store");
        for (int64_t end = test_now_us() + 3000000; !LOAD(&ready) && test_now_us() < end;) turn();
        CHECK_EQ_INT(LOAD(&ready), 1);
        CHECK_EQ_INT(tprpc_agent_wait_ready(two[0].agent, 0, &error), TPRPC_ERROR_TIMEOUT);
        CHECK_CONTAINS(error.text, "ann");
        two_close();
        slow_close();
    }
}

/* ---- smaller things ---- */

/* A released future is stale, also while its call goes on. */
IN_KINDS(a_released_future_is_stale, TWO) {
    tprpc_future future;
    two_join(with, future_methods);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "hold", NULL, NULL, &future), TPRPC_OK);
    CHECK(both_until(&shared->seen, 1));
    CHECK_EQ_INT(tprpc_future_wait(future, TPRPC_NOW), TPRPC_PENDING);
    tprpc_future_release(future);
    tprpc_future_release(future);
    CHECK_EQ_INT(tprpc_future_wait(future, TPRPC_NOW), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_error(future, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(stats_of(&two[0]).client_active_calls, 1);
    two_close();
}

/* A refusal names the worker, the method and the cause. */
IN_KINDS(refusals_name_the_call, ONE) {
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    tprpc_tensor tensor = bytes_of(NULL, 4);
    tprpc_message message = tensors_of(&tensor, 1);
    two_join(with, echo_methods);
    options.error = &error;
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "some method", &message, &options, NULL), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "some method");
    CHECK_CONTAINS(error.text, "bob");
    CHECK_CONTAINS(error.text, "tensor 0");
    two_close();
}

static void call_inherited(void *arg) {
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    options.error = &error;
    CHECK_EQ_INT(tprpc_call_id(two[0].agent, *(tprpc_method_id *)arg, NULL, &options, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(error.status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "fork");
    _exit(0);                          /* what it inherited is no leak */
}

IN_KINDS(call_id_after_a_fork, ONE) {
    tprpc_method_id id;
    two_join(with, echo_methods);
    CHECK_EQ_INT(tprpc_resolve(two[0].agent, "bob", "echo", &id, NULL), TPRPC_OK);
    CHECK_EQ_INT(test_wait_child(test_fork_run(call_inherited, &id), 20), 0);
    two_close();
}

/* place must decide: PENDING is no outcome. */
static tprpc_status place_pending(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    return TPRPC_PENDING;
}

static const tprpc_method_desc pending_methods[] = {
    {"put", on_echo, place_pending, NULL, NULL, 0}, {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

IN_KINDS(place_says_pending, TWO) {
    tprpc_call_options options = {0};
    tprpc_tensor tensor = bytes_of(shared, 16);
    tprpc_message message = tensors_of(&tensor, 1);
    outcome o[2] = {{0}};
    two_join(with, pending_methods);
    tensor.data = shared;
    CHECK_EQ_INT(call(&two[0], "bob", "put", &message, &options, &o[0]), TPRPC_OK);
    CHECK(both_until(&o[0].count, 1));
    CHECK_EQ_INT(o[0].status, TPRPC_ERROR_INVALID);
    options.place = place_pending;
    options.user = &o[1];
    CHECK_EQ_INT(call(&two[0], "bob", "echo", &message, &options, &o[1]), TPRPC_OK);
    CHECK(both_until(&o[1].count, 1));
    CHECK_EQ_INT(o[1].status, TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->handled), 1);
    two_close();
}

/* A store that is silent does not say that there is no such worker. */
static void with_slow_apart(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    with_slow(s, context, agent);
    agent->world_size = 0;
}

IN_KINDS(silence_is_no_answer, TWO) {
    outcome o = {0};
    two_tune = with_slow_apart;
    slow_open(50);
    two_join(with, echo_methods);
    slow[0].silent = true;
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(o.text, "bob");
    two_close();
    slow_close();
}

/* A worker whose own word does not reach the store does not read that it has not left. */
IN_KINDS(leave_at_a_silent_store, TWO) {
    tprpc_error error = {0};
    two_tune = with_slow;
    slow_open(50);
    two_join(with, echo_methods);
    slow[0].silent = true;
    CHECK_EQ_INT(tprpc_agent_leave(two[0].agent, 20000, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "no answer");
    two_close();
    slow_close();
}

/* ---- polls and arming ---- */

static void count_work(tprpc_work *work) { (void)work; ADD(&shared->count[3], 1); }

TEST(times_without_end) {
    tprpc_context *ctx = NULL;
    tprpc_work work = {0};
    share();
    work.run = count_work;
    REQUIRE_EQ_INT(tprpc_context_create(NULL, &ctx, NULL), TPRPC_OK);
    tprpc_defer(ctx, &work);
    CHECK(!tprpc_poll(ctx, INT64_MAX, INT64_MAX));
    CHECK_EQ_INT(LOAD(&shared->count[3]), 1);
    tprpc_defer(ctx, &work);
    CHECK(!tprpc_poll(ctx, INT64_MAX - 1, INT64_MAX - 1));
    CHECK_EQ_INT(LOAD(&shared->count[3]), 2);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* A context that said "poll again" is away: what comes does not ring. */
TEST(arming_with_a_timer_that_is_due) {
    tprpc_context *ctx = NULL;
    tprpc_work late = {0}, more = {0};
    int64_t left = 0;
    share();
    late.run = more.run = count_work;
    REQUIRE_EQ_INT(tprpc_context_create(NULL, &ctx, NULL), TPRPC_OK);
    tprpc_defer_at(ctx, &late, tprpc_now_us(ctx) + 1000);
    tprpc_poll(ctx, TPRPC_NOW, 0);
    test_sleep_us(10000);
    for (int i = 0; i < 2; i++) {
        CHECK(!tprpc_context_arm(ctx, i ? &left : NULL));
        struct pollfd fd = {(int)tprpc_context_handle(ctx), POLLIN, 0};
        if (i == 1) tprpc_defer(ctx, &more);
        CHECK_EQ_INT(poll(&fd, 1, 0), 0);
    }
    while (LOAD(&shared->count[3]) < 2) tprpc_poll(ctx, TPRPC_NOW, 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}
