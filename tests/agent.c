/* Calls between agents, through the public interface: outcomes, ownership, receiving in place, threads, order. Groups
   of two, over each transport, polled and threaded, as processes and as threads of one process. */
#include "agent_help.h"
#include "agent_hold.h"

/* ---- handlers ---- */

/* In a polled context handlers run on one thread; the methods of `blocking` ones are told apart by their flag. */
static void check_thread(const side *s) {
    if (s->mode->threads == 0 && !pthread_equal(pthread_self(), s->thread)) ADD(&shared->bad, 1);
}

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    check_thread((side *)user);
    ADD(&shared->handled, 1);
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static void on_sink(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message;
    check_thread((side *)user);
    ADD(&shared->handled, 1);
    tprpc_reply(request, NULL);
}

static void on_fail(tprpc_request request, const tprpc_message *message, void *user) {
    char text[100] = "";
    check_thread((side *)user);
    memcpy(text, message->metadata, message->metadata_size < 99 ? message->metadata_size : 99);
    CHECK_EQ_INT(tprpc_fail(request, 42, text), TPRPC_OK);
}

static void on_silent(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request; (void)message;
    check_thread((side *)user);
}

typedef struct later { tprpc_request request; float *values; size_t count; } later;

static void later_release(void *user) {
    later *l = (later *)user;
    free(l->values);
    free(l);
    ADD(&shared->count[1], 1);
}

static void *later_job(void *arg) {
    later *l = (later *)arg;
    tprpc_tensor tensor = bytes_of(l->values, l->count * sizeof(float));
    tprpc_message message = tensors_of(&tensor, 1);
    const tprpc_message *in = tprpc_request_message(l->request);
    message.release = later_release;
    message.release_user = l;
    tensor.dtype = TPRPC_F32;
    tensor.ndim = 1;
    tensor.shape[0] = (int64_t)l->count;
    test_sleep_us(2000);
    if (CHECK(in && in->tensor_count == 1))
        for (size_t i = 0; i < l->count; i++) l->values[i] = 2 * ((const float *)in->tensors[0].data)[i];
    CHECK_STR(tprpc_request_caller(l->request), "ann");
    ADD(&shared->count[0], 1);
    tprpc_reply(l->request, &message);
    return NULL;
}

static void on_later(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    later *l = (later *)calloc(1, sizeof *l);
    REQUIRE(l && s->job_count < SIDE_THREADS);
    l->request = request;
    l->count = message->tensors[0].size / sizeof(float);
    l->values = (float *)calloc(l->count, sizeof(float));
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    REQUIRE_EQ_INT(pthread_create(&s->jobs[s->job_count++], NULL, later_job, l), 0);
}

/* Waits until the kept requests read as cancelled, answers them all on the callback thread, and tells how: the outcome is
   in shared->status[0]. */
static void on_answer(tprpc_request request, const tprpc_message *message, void *user) {
    const bool wait = message->metadata_size && *(const char *)message->metadata == 'c';
    (void)user;
    for (int i = 0; i < kept_count; i++) {
        tprpc_message reply = text_of("late");
        tprpc_error error = {0};
        (void)error;
        if (wait && !tprpc_request_cancelled(kept[i])) ADD(&shared->bad, 1);
        reply.release = count_release;
        STORE(&shared->status[0], (int)tprpc_reply(kept[i], &reply));
        STORE(&shared->status[1], (int)tprpc_reply(kept[i], &reply));   /* twice */
        STORE(&shared->status[2], (int)tprpc_fail(kept[i], 1, "thrice"));
    }
    kept_count = 0;
    tprpc_reply(request, NULL);
}

/* Occupies its loop until told to go on, so that what the caller does meanwhile is not seen before the answer. */
static void on_slow(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    STORE(&shared->seen, 1);
    CHECK(until(NULL, &shared->go, 1));
    tprpc_reply(request, message);
}

static void on_twice(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_message second = text_of("second");
    (void)user;
    second.release = count_release;
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
    CHECK_EQ_INT(tprpc_reply(request, &second), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_fail(request, 1, "third"), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_ERROR_INVALID);
    CHECK(tprpc_request_cancelled(request));
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},     {"sink", on_sink, NULL, NULL, NULL, 0},
    {"fail", on_fail, NULL, NULL, NULL, 0},     {"silent", on_silent, NULL, NULL, NULL, 0},
    {"later", on_later, NULL, NULL, NULL, 0},   {"hold", on_hold, NULL, NULL, NULL, 0},
    {"answer", on_answer, NULL, NULL, NULL, 0}, {"slow", on_slow, NULL, NULL, NULL, 0},
    {"twice", on_twice, NULL, NULL, NULL, 0},   {0},
};

/* Two sides, the second serving `methods`. */
static void pair(const mode *with, void (*client)(side *)) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client;
    sides[0].methods = sides[1].methods = methods;
    group_run(sides, 2);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
}

/* ---- calls and their replies ---- */

static void check_echo(side *s, size_t body, const size_t *sizes, size_t count) {
    tprpc_tensor tensors[8];
    tprpc_message message = {0};
    tprpc_future future;
    uint8_t *bytes = (uint8_t *)malloc(body + 1);
    REQUIRE(count <= 8 && bytes);
    fill(bytes, body, 3);
    for (size_t i = 0; i < count; i++) {
        tensors[i] = bytes_of(sizes[i] ? malloc(sizes[i]) : NULL, sizes[i]);
        fill(tensors[i].data, sizes[i], (unsigned)i);
        tensors[i].metadata = "meta";
        tensors[i].metadata_size = i % 5;
        if (sizes[i] % 8 || !sizes[i]) continue;
        tensors[i].dtype = TPRPC_F32;
        tensors[i].ndim = 2;
        tensors[i].shape[0] = 2;
        tensors[i].shape[1] = (int64_t)(sizes[i] / 8);
    }
    message.metadata = bytes;
    message.metadata_size = body;
    message.tensors = tensors;
    message.tensor_count = count;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, NULL, &future), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_error(future, NULL), TPRPC_OK);
    const tprpc_message *reply = tprpc_future_reply(future);
    REQUIRE(reply != NULL);
    REQUIRE_EQ_INT(reply->metadata_size, body);
    CHECK_MEM(reply->metadata, bytes, body);
    REQUIRE_EQ_INT(reply->tensor_count, count);
    for (size_t i = 0; i < count; i++) {
        const tprpc_tensor *t = &reply->tensors[i];
        REQUIRE_EQ_INT(t->size, sizes[i]);
        CHECK(sizes[i] == 0 || t->data != tensors[i].data);
        CHECK(filled(t->data, sizes[i], (unsigned)i));
        CHECK_EQ_INT((uintptr_t)t->data % 64, 0);
        CHECK_EQ_INT(t->dtype, tensors[i].dtype);
        CHECK_EQ_INT(t->ndim, tensors[i].ndim);
        CHECK_EQ_INT(t->shape[0], tensors[i].shape[0]);
        CHECK_EQ_INT(t->shape[1], tensors[i].shape[1]);
        CHECK_EQ_INT(t->metadata_size, i % 5);
        CHECK_MEM(t->metadata, "meta", i % 5);
        if (sizes[i]) ((uint8_t *)t->data)[0] ^= 1;   /* writable */
        free(tensors[i].data);
    }
    free(bytes);
    tprpc_future_release(future);
}

static void client_echo(side *s) {
    const size_t small[] = {16, 0, 40}, large[] = {1 << 20, 3, 0, 8, 70000}, single[] = {16}, huge[] = {24 << 20};
    check_echo(s, 0, NULL, 0);
    check_echo(s, 64, NULL, 0);
    check_echo(s, 65, NULL, 0);
    check_echo(s, 100000, NULL, 0);
    check_echo(s, 5, single, 1);
    check_echo(s, 0, small, 3);
    check_echo(s, 33, large, 5);
    check_echo(s, 0, huge, 1);
    check_echo(s, 64, NULL, 0);
    CHECK_EQ_INT(LOAD(&shared->handled), 9);
}
IN_MODES(echo, 0xff) { pair(with, client_echo); }

/* ---- shared memory that is not there: calls go over tcp ---- */

extern int (*tprpc_test_hook)(const char *call, int64_t *size);
static const char *missing_call;       /* that the system does not know */

static int fail_missing(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, missing_call) == 0 ? ENOSYS : 0;
}

static void client_missing(side *s) {
    const size_t sizes[] = {1 << 20, 0, 70000};
    tprpc_pipe_info info;
    check_echo(s, 5, sizes, 3);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "tcp");
    for (uint32_t i = 0; i < info.path_count; i++)
        if (strcmp(info.paths[i].name, "shm") == 0) CHECK(info.paths[i].why[0] != 0);
}

/* One side in a process of its own. user: "late" when the call is there until the context is. */
static void missing_run(void *arg) {
    side *s = (side *)arg;
    const char *when = (const char *)s->user;
    if (strcmp(when, "early") == 0) STORE(&tprpc_test_hook, fail_missing);
    side_open(s);
    ADD(&shared->ready, 1);
    CHECK(until(NULL, &shared->ready, 2));
    if (strcmp(when, "late") == 0) STORE(&tprpc_test_hook, fail_missing);
    side_join(s);
    if (s->main) s->main(s);
    side_leave(s);
    side_close(s);
    STORE(&tprpc_test_hook, NULL);
}

static void run_missing(const mode *with, const char *ann, const char *bob) {
    static const char *const calls[] = {"memfd_create", "socket_unix"};
    for (size_t i = 0; i < 2; i++) {
        side sides[2] = {{0}};
        group g;
        share();
        missing_call = calls[i];
        sides[0].mode = with;
        sides[0].main = client_missing;
        sides[0].methods = sides[1].methods = methods;
        sides[0].user = (void *)(uintptr_t)ann;
        sides[1].user = (void *)(uintptr_t)bob;
        group_open(&g, sides, 2);
        pid_t child = test_fork_run(missing_run, &sides[1]);
        missing_run(&sides[0]);
        CHECK_EQ_INT(test_wait_child(child, 40), 0);
        group_close(&g);
    }
}
IN_MODES(shm_is_missing_here, 0x80) { run_missing(with, "early", "never"); }
IN_MODES(shm_is_missing_there, 0x80) { run_missing(with, "never", "early"); }
IN_MODES(shm_is_missing, 0x80) { run_missing(with, "early", "early"); }
IN_MODES(shm_goes_missing_here, 0x80) { run_missing(with, "late", "never"); }
IN_MODES(shm_goes_missing, 0x80) { run_missing(with, "late", "late"); }

typedef struct outcome { int count; tprpc_status status; size_t size; char text[244]; pthread_t thread; } outcome;

static void on_outcome(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    outcome *o = (outcome *)user;
    o->status = status;
    o->size = reply ? reply->metadata_size : 0;
    o->thread = pthread_self();
    CHECK((status == TPRPC_OK) == (error == NULL));
    if (error) snprintf(o->text, sizeof o->text, "%s", error->text);
    if (error) CHECK_EQ_INT(error->status, status);
    ADD(&o->count, 1);
}

static void client_ways(side *s) {
    outcome o = {0};
    tprpc_call_options options = {0};
    tprpc_message message = text_of("hello");
    tprpc_future future;
    tprpc_method_id id;
    options.on_done = on_outcome;
    options.user = &o;

    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, NULL), TPRPC_OK);   /* on_done alone */
    CHECK(until(s, &o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK_EQ_INT(o.size, 5);
    if (s->mode->threads == 0) CHECK(pthread_equal(o.thread, s->thread));

    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, &future), TPRPC_OK);   /* both */
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    CHECK(until(s, &o.count, 2));
    tprpc_future_release(future);

    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, &future), TPRPC_OK);   /* released before */
    tprpc_future_release(future);
    CHECK(until(s, &o.count, 3));
    CHECK_EQ_INT(o.size, 5);

    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, NULL, NULL), TPRPC_OK);   /* neither */
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);

    options.flags = TPRPC_CALL_ONE_WAY;
    STORE(&shared->handled, 0);
    message.release = count_release;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "sink", &message, &options, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "sink", &message, &options, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    CHECK(tprpc_future_reply(future) == NULL || tprpc_future_reply(future)->metadata_size == 0);
    tprpc_future_release(future);
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "nothing", &message, &options, NULL), TPRPC_OK);   /* nobody hears */
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "fail", &message, &options, NULL), TPRPC_OK);
    CHECK(until(s, &shared->handled, 2));
    CHECK(until_released(s, 4));
    CHECK(until(s, &o.count, 7));
    CHECK_EQ_INT(o.status, TPRPC_OK);

    CHECK_EQ_INT(tprpc_resolve(s->agent, "bob", "echo", &id, NULL), TPRPC_OK);
    message.release = NULL;
    for (int i = 0; i < 3; i++) {
        CHECK_EQ_INT(tprpc_call_id(s->agent, id, &message, NULL, &future), TPRPC_OK);
        CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
        tprpc_future_release(future);
    }
    /* to itself */
    CHECK_EQ_INT(call_and_wait(s, "ann", "echo", &message, NULL, NULL), TPRPC_OK);
}
IN_MODES(ways, ALL_MODES) { pair(with, client_ways); }

static void client_later(side *s) {
    float values[1000];
    tprpc_tensor tensor = bytes_of(values, sizeof values);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_future futures[8];
    for (int i = 0; i < 1000; i++) values[i] = (float)i;
    for (int i = 0; i < 8; i++)
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", "later", &message, NULL, &futures[i]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 8, WAIT_MS), TPRPC_OK);
    for (int i = 0; i < 8; i++) {
        const tprpc_message *reply = tprpc_future_reply(futures[i]);
        if (CHECK(reply && reply->tensor_count == 1 && reply->tensors[0].size == sizeof values)) {
            CHECK_EQ_INT(((const float *)reply->tensors[0].data)[999], 1998);
            CHECK_EQ_INT(reply->tensors[0].dtype, TPRPC_F32);
        }
        tprpc_future_release(futures[i]);
    }
    CHECK_EQ_INT(LOAD(&shared->count[0]), 8);
    CHECK(until(s, &shared->count[1], 8));   /* each released once */
}
IN_MODES(later, ALL_MODES) { pair(with, client_later); }

/* ---- what goes wrong, and what it says ---- */

static void client_failures(side *s) {
    tprpc_message message = text_of("the bridge is out");
    tprpc_error error = {0}, mine = {0};
    tprpc_call_options options = {0};
    tprpc_tensor tensor = {0};
    tprpc_future future = {&tensor, 7};
    tprpc_method_id id = {0, 0}, forged = {77, 1234};

    message.release = count_release;
    CHECK_EQ_INT(call_and_wait(s, "bob", "fail", &message, NULL, &error), TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(error.user_code, 42);
    CHECK_STR(error.text, "the bridge is out");
    CHECK_EQ_INT(call_and_wait(s, "bob", "silent", &message, NULL, &error), TPRPC_ERROR_REMOTE);
    CHECK_CONTAINS(error.text, "silent");
    CHECK_CONTAINS(error.text, "answer");
    CHECK_EQ_INT(call_and_wait(s, "bob", "no such thing", &message, NULL, &error), TPRPC_ERROR_NO_METHOD);
    CHECK_CONTAINS(error.text, "no such thing");
    CHECK_CONTAINS(error.text, "bob");
    CHECK(until_released(s, 3));

    options.error = &mine;
    CHECK_EQ_INT(tprpc_call(s->agent, "nobody here", "echo", &message, &options, &future), TPRPC_ERROR_NO_WORKER);
    CHECK(future.owner == NULL && future.id == 0);
    CHECK_EQ_INT(mine.status, TPRPC_ERROR_NO_WORKER);
    CHECK_CONTAINS(mine.text, "nobody here");
    CHECK_EQ_INT(LOAD(&shared->released), 4);
    CHECK_EQ_INT(tprpc_future_wait(future, 0), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_resolve(s->agent, "nobody here", "echo", &id, &error), TPRPC_ERROR_NO_WORKER);
    CHECK_CONTAINS(error.text, "nobody here");
    CHECK_EQ_INT(tprpc_call_id(s->agent, forged, &message, &options, &future), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->released), 5);
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "", &message, &options, &future), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "\xff\xfe", &message, &options, &future), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(mine.text, "UTF-8");
    CHECK_EQ_INT(LOAD(&shared->released), 7);

    tensor = bytes_of(&error, 64);                         /* strides that are not contiguous */
    tensor.dtype = TPRPC_F32;
    tensor.ndim = 2;
    tensor.shape[0] = tensor.shape[1] = 4;
    tensor.strides[0] = 1;
    tensor.strides[1] = 4;
    message.tensors = &tensor;
    message.tensor_count = 1;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, &future), TPRPC_ERROR_UNSUPPORTED);
    tensor.strides[0] = tensor.strides[1] = 0;
    tensor.shape[1] = 5;                                   /* shape x dtype is not size */
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, &future), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->released), 9);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_ERROR_INVALID);
    tprpc_future_release(future);
    CHECK_EQ_INT(call_and_wait(s, "bob", "twice", NULL, NULL, NULL), TPRPC_OK);
    CHECK(until_released(s, 10));
    CHECK_EQ_INT(stats_of(s).client_active_calls, 0);
}
IN_MODES(failures, ALL_MODES) { pair(with, client_failures); }

static void client_timeout(side *s) {
    tprpc_message message = text_of("late"), cancelled = text_of("c");
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    tprpc_future future;
    outcome o = {0};
    message.release = count_release;
    options.timeout_ms = 30;
    options.on_done = on_outcome;
    options.user = &o;
    CHECK_EQ_INT(call_and_wait(s, "bob", "hold", &message, &options, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "hold");
    CHECK_CONTAINS(error.text, "bob");
    CHECK_CONTAINS(error.text, "30 ms");
    CHECK(until(s, &o.count, 1));
    CHECK_STR(o.text, error.text);
    CHECK(until_released(s, 1));
    /* the peer is told; its answer is INVALID, and released */
    STORE(&shared->released, 0);
    CHECK(until(s, &shared->seen, 1));
    CHECK_EQ_INT(call_and_wait(s, "bob", "answer", &cancelled, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->status[0]), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->status[1]), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->status[2]), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->released), 2);
    /* an answer on its way already is dropped, and counted */
    STORE(&shared->seen, 0);
    message.release = NULL;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "slow", &message, &options, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_ERROR_TIMEOUT);
    CHECK(until(s, &shared->seen, 1));
    CHECK_EQ_INT(stats_of(s).late_replies, 0);
    STORE(&shared->go, 1);
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(stats_of(s).late_replies, 1);
    CHECK_EQ_INT(stats_of(s).calls_timed_out, 2);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_ERROR_TIMEOUT);
    CHECK(tprpc_future_reply(future) == NULL);
    tprpc_future_release(future);
    CHECK(until(s, &o.count, 2));                          /* its on_done may follow the wait, and looks at `o` */
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
}
/* Serves without a thread that drives beside the loop's own, so that a loop whose handler waits does nothing else. */
static void serve_plainly(side *s) { CHECK(until(s->mode->threads ? NULL : s, &shared->stop, 1)); }

static void client_timeout_stop(side *s) {
    client_timeout(s);
    STORE(&shared->stop, 1);
}

IN_MODES(timeout, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_timeout_stop;
    sides[1].main = serve_plainly;
    sides[1].methods = methods;
    group_run(sides, 2);
}

static void client_cancel(side *s) {
    tprpc_message message = text_of("x"), cancelled = text_of("c"), plain = text_of("p");
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    tprpc_future future;
    outcome o = {0};
    message.release = count_release;
    options.on_done = on_outcome;
    options.user = &o;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", &message, &options, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, TPRPC_NOW), TPRPC_PENDING);
    CHECK_EQ_INT(tprpc_future_error(future, &error), TPRPC_PENDING);
    CHECK(tprpc_future_reply(future) == NULL);
    CHECK(until(s, &shared->seen, 1));
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_ERROR_CANCELLED);
    CHECK_EQ_INT(tprpc_future_error(future, &error), TPRPC_ERROR_CANCELLED);
    CHECK_CONTAINS(error.text, "hold");
    if (s->mode->threads == 0) CHECK_EQ_INT(o.count, 0);   /* queued, never inline */
    CHECK(until(s, &o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_CANCELLED);
    CHECK(until_released(s, 1));
    CHECK_EQ_INT(call_and_wait(s, "bob", "answer", &cancelled, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->status[0]), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->released), 3);   /* the peer's two */
    tprpc_future_release(future);
    /* one that is not cancelled is answered by the same handler */
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, NULL, &future), TPRPC_OK);
    CHECK(until(s, &shared->seen, 2));
    CHECK_EQ_INT(call_and_wait(s, "bob", "answer", &plain, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->status[0]), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->status[1]), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(LOAD(&shared->status[2]), TPRPC_ERROR_INVALID);
    CHECK(until_released(s, 5));
    tprpc_future_release(future);
    CHECK_EQ_INT(stats_of(s).calls_cancelled, 1);
}
IN_MODES(cancel, ALL_MODES) { pair(with, client_cancel); }

static void client_stale(side *s) {
    tprpc_future future, none = {NULL, 0}, forged, futures[3];
    tprpc_request request;
    tprpc_error error = {0};
    size_t which = 99;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", NULL, NULL, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    tprpc_future_release(future);
    tprpc_future_release(future);
    CHECK_EQ_INT(tprpc_future_wait(future, 0), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_error(future, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(error.status, TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_ERROR_INVALID);
    CHECK(tprpc_future_reply(future) == NULL);
    CHECK_EQ_INT(tprpc_future_wait(none, 0), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_error(none, NULL), TPRPC_ERROR_INVALID);
    tprpc_future_release(none);
    for (int i = 0; i < 64; i++) {
        forged.owner = s->agent;
        forged.id = (uint64_t)1 << i | 1;
        CHECK_EQ_INT(tprpc_future_wait(forged, 0), TPRPC_ERROR_INVALID);
        CHECK_EQ_INT(tprpc_future_cancel(forged), TPRPC_ERROR_INVALID);
        tprpc_future_release(forged);
        request.owner = s->agent;
        request.id = forged.id;
        CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_ERROR_INVALID);
        CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_ERROR_INVALID);
        CHECK(tprpc_request_message(request) == NULL);
        CHECK(tprpc_request_caller(request) == NULL);
        CHECK(tprpc_request_cancelled(request));
    }
    /* the slot is used again: the old handle stays stale */
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, NULL, &futures[0]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_ERROR_INVALID);
    tprpc_future_release(future);
    CHECK_EQ_INT(tprpc_future_wait(futures[0], TPRPC_NOW), TPRPC_PENDING);
    /* any and all */
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "hold", NULL, NULL, &futures[1]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", NULL, NULL, &futures[2]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait_any(futures, 3, WAIT_MS, &which), TPRPC_OK);
    CHECK_EQ_INT(which, 2);
    which = 99;
    CHECK_EQ_INT(tprpc_future_wait_any(futures, 2, 20, &which), TPRPC_PENDING);
    CHECK_EQ_INT(which, 99);
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 3, 20), TPRPC_PENDING);
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 0, 20), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_cancel(futures[1]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait_any(futures, 2, WAIT_MS, &which), TPRPC_ERROR_CANCELLED);
    CHECK_EQ_INT(which, 1);
    CHECK_EQ_INT(call_and_wait(s, "bob", "answer", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 3, WAIT_MS), TPRPC_ERROR_CANCELLED);   /* the first that is not OK */
    tprpc_future_release(futures[1]);
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 3, WAIT_MS), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_future_wait_any(futures + 1, 2, WAIT_MS, NULL), TPRPC_ERROR_INVALID);
    tprpc_future_release(futures[0]);
    tprpc_future_release(futures[2]);
}
IN_MODES(stale, ALL_MODES) { pair(with, client_stale); }

/* ---- receiving in place ---- */

enum { PLACE_BIG = 1 << 20, PLACE_SMALL = 64, PLACE_HUGE = 64 << 20 };
static uint8_t *place_memory[2];       /* where tensors go on this side */
static char place_cookie;

static void place_setup(void) {
    for (int i = 0; i < 2; i++) REQUIRE((place_memory[i] = (uint8_t *)calloc(1, PLACE_HUGE)) != NULL);
}

static void place_teardown(void) {
    for (int i = 0; i < 2; i++) free(place_memory[i]);
}

static tprpc_status place_here(tprpc_placement *placement, void *user) {
    const tprpc_message *descriptor = placement->descriptor;
    (void)user;
    ADD(&shared->placed, 1);
    CHECK(placement->size >= sizeof *placement);
    CHECK_STR(placement->method, "put");
    CHECK_STR(placement->worker, placement->request.id ? "ann" : "bob");
    if (!CHECK(descriptor && descriptor->tensor_count <= 2)) return TPRPC_ERROR_INVALID;
    for (size_t i = 0; i < descriptor->tensor_count; i++) {
        CHECK(descriptor->tensors[i].data == NULL);
        CHECK_EQ_INT(placement->tensors[i].size, descriptor->tensors[i].size);
        placement->tensors[i].data = place_memory[i];
    }
    placement->cookie = &place_cookie;
    return TPRPC_OK;
}

static void unplaced_here(const tprpc_placement *placement, void *user) {
    side *s = (side *)user;
    CHECK(placement->cookie == &place_cookie);
    CHECK_STR(placement->method, "put");
    CHECK(placement->tensors[0].data == place_memory[0]);
    if (s && s->mode->threads == 0) CHECK(pthread_equal(pthread_self(), s->thread));
    ADD(&shared->unplaced, 1);
}

static void on_put(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    ADD(&shared->handled, 1);
    for (size_t i = 0; i < message->tensor_count; i++) {
        CHECK(message->tensors[i].data == place_memory[i]);
        CHECK(filled(message->tensors[i].data, message->tensors[i].size, (unsigned)i));
    }
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static tprpc_status place_refuses(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    ADD(&shared->placed, 1);
    return TPRPC_ERROR_LIMIT;
}

static void no_unplaced(const tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    ADD(&shared->bad, 1);
}

static const tprpc_method_desc place_methods[] = {
    {"put", on_put, place_here, unplaced_here, NULL, 0},
    {"refuse", on_sink, place_refuses, no_unplaced, NULL, 0},
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {0},
};

static void put_once(side *s, const size_t *sizes, size_t count, uint8_t **sources, bool one_process) {
    tprpc_tensor tensors[2];
    tprpc_message message;
    tprpc_call_options options = {0};
    tprpc_future future;
    (void)one_process;
    for (size_t i = 0; i < count; i++) {
        tensors[i] = bytes_of(sources[i], sizes[i]);
        fill(sources[i], sizes[i], (unsigned)i);
    }
    message = tensors_of(tensors, count);
    message.release = count_release;
    options.place = place_here;
    options.on_unplaced = unplaced_here;
    options.user = s;
    STORE(&shared->released, 0);
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "put", &message, &options, &future), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    const tprpc_message *reply = tprpc_future_reply(future);
    REQUIRE(reply && reply->tensor_count == count);
    for (size_t i = 0; i < count; i++) {
        CHECK(reply->tensors[i].data == place_memory[i]);
        CHECK(filled(place_memory[i], sizes[i], (unsigned)i));
    }
    tprpc_future_release(future);
    CHECK(until_released(s, 1));
}

static void client_place(side *s) {
    const size_t sizes[4][2] = {{PLACE_SMALL, PLACE_SMALL}, {PLACE_BIG, PLACE_SMALL}, {PLACE_BIG, PLACE_BIG},
                                {5, PLACE_HUGE / 8}};
    uint8_t *sources[2] = {(uint8_t *)malloc(PLACE_HUGE), (uint8_t *)malloc(PLACE_HUGE)};
    tprpc_tensor tensor = bytes_of(sources[0], PLACE_BIG);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    for (int i = 0; i < 4; i++) put_once(s, sizes[i], 2, sources, !s->mode->processes);
    put_once(s, sizes[0], 1, sources, !s->mode->processes);
    CHECK_EQ_INT(LOAD(&shared->placed), 10);
    CHECK_EQ_INT(LOAD(&shared->handled), 5);
    /* refused, by either end */
    for (int i = 0; i < 2; i++) {
        STORE(&shared->placed, 0);
        tensor.size = i ? PLACE_SMALL : PLACE_BIG;
        CHECK_EQ_INT(call_and_wait(s, "bob", "refuse", &message, NULL, &error), TPRPC_ERROR_LIMIT);
        CHECK_CONTAINS(error.text, "refuse");
        CHECK_CONTAINS(error.text, "bob");
        options.place = place_refuses;
        options.on_unplaced = no_unplaced;
        CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, &options, &error), TPRPC_ERROR_LIMIT);
        CHECK_EQ_INT(LOAD(&shared->placed), 2);
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->unplaced), 0);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
    free(sources[0]);
    free(sources[1]);
}

/* In one process both sides receive at the same addresses: a round trip overwrites what it sends, with the same. */
IN_MODES(place, APART_MODES) {
    side sides[2] = {{0}};
    place_setup();
    sides[0].mode = with;
    sides[0].main = client_place;
    sides[1].methods = place_methods;
    group_run(sides, 2);
    place_teardown();
}

/* ---- what was placed comes back when the message fails ---- */

static tprpc_status place_and_kill(tprpc_placement *placement, void *user) {
    tprpc_status status = place_here(placement, user);
    const int who = placement->request.id ? 0 : 1;
    kill(shared->pid[who], SIGKILL);
    test_sleep_us(20000);
    return status;
}

static void on_give(tprpc_request request, const tprpc_message *message, void *user) {
    static uint8_t *memory;
    tprpc_tensor tensor;
    (void)message; (void)user;
    if (!memory) REQUIRE((memory = (uint8_t *)calloc(1, PLACE_HUGE)) != NULL);
    tensor = bytes_of(memory, PLACE_HUGE);
    tprpc_message reply = tensors_of(&tensor, 1);
    reply.release = count_release;
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static const tprpc_method_desc give_methods[] = {
    {"put", on_give, NULL, NULL, NULL, 0}, {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

static void client_killed_reply(side *s) {
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    outcome o = {0};
    tprpc_future other;
    options.place = place_and_kill;
    options.on_unplaced = unplaced_here;
    options.user = s;
    CHECK_EQ_INT(call_and_wait(s, "bob", "put", NULL, &options, &error), TPRPC_ERROR_PEER);
    CHECK_CONTAINS(error.text, "bob");
    CHECK_CONTAINS(error.text, "put");
    CHECK(until(s, &shared->unplaced, 1));
    options.place = NULL;
    options.on_unplaced = NULL;
    options.on_done = on_outcome;
    options.user = &o;
    options.timeout_ms = 5000;
    if (tprpc_call(s->agent, "bob", "put", NULL, &options, &other) == TPRPC_OK) {   /* nobody is there */
        CHECK(tprpc_future_wait(other, WAIT_MS) > TPRPC_PENDING);
        CHECK(until(s, &o.count, 1));
        tprpc_future_release(other);
    }
    tprpc_poll(s->ctx, 10000, 0);
    CHECK_EQ_INT(LOAD(&shared->unplaced), 1);
    CHECK_EQ_INT(LOAD(&shared->placed), 1);
}

IN_MODES(unplaced_when_the_replier_dies, APART_MODES) {
    side sides[2] = {{0}};
    char dies[] = "dies";
    place_setup();
    sides[0].mode = with;
    sides[0].main = client_killed_reply;
    sides[0].no_leave = true;
    sides[1].methods = give_methods;
    sides[1].user = dies;
    group_run(sides, 2);
    place_teardown();
}

static void caller_dies(side *s) {
    tprpc_tensor tensor = bytes_of(place_memory[1], PLACE_HUGE);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_future future;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "ann", "put", &message, NULL, &future), TPRPC_OK);
    tprpc_future_wait(future, WAIT_MS);
    REQUIRE(false);   /* killed by now */
}

static tprpc_status place_and_kill_caller(tprpc_placement *placement, void *user) {
    (void)user;
    ADD(&shared->placed, 1);
    placement->tensors[0].data = place_memory[0];
    placement->cookie = &place_cookie;
    kill(shared->pid[1], SIGKILL);
    test_sleep_us(20000);
    return TPRPC_OK;
}

static void server_unplaced(side *s) {
    CHECK(until(s, &shared->unplaced, 1));
    for (int i = 0; i < 5; i++) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(LOAD(&shared->unplaced), 1);
    CHECK_EQ_INT(LOAD(&shared->placed), 1);
    CHECK_EQ_INT(LOAD(&shared->handled), 0);
    CHECK_EQ_INT(stats_of(s).server_active_calls, 0);
}

static const tprpc_method_desc kill_methods[] = {{"put", on_put, place_and_kill_caller, unplaced_here, NULL, 0}, {0}};

IN_MODES(unplaced_when_the_caller_dies, APART_MODES) {
    side sides[2] = {{0}};
    char dies[] = "dies";
    place_setup();
    sides[0].mode = with;
    sides[0].main = server_unplaced;
    sides[0].methods = kill_methods;
    sides[0].no_leave = true;
    sides[1].main = caller_dies;
    sides[1].user = dies;
    group_run(sides, 2);
    place_teardown();
}

static tprpc_status place_and_stop(tprpc_placement *placement, void *user) {
    tprpc_status status;
    kill(shared->pid[1], SIGSTOP);       /* before it is known, for who knows it lets it go on */
    status = place_here(placement, user);
    test_sleep_us(20000);
    return status;
}

static void client_unplaced_timeout(side *s) {
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    tprpc_future future;
    options.place = place_and_stop;
    options.on_unplaced = unplaced_here;
    options.user = s;
    options.timeout_ms = 300;
    CHECK_EQ_INT(call_and_wait(s, "bob", "put", NULL, &options, &error), TPRPC_ERROR_TIMEOUT);
    kill(shared->pid[1], SIGCONT);
    CHECK(until(s, &shared->unplaced, 1));
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);   /* the pipe survives */
    /* cancelled while it comes */
    options.timeout_ms = 0;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "put", NULL, &options, &future), TPRPC_OK);
    CHECK(until(s, &shared->placed, 2));
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    kill(shared->pid[1], SIGCONT);
    CHECK(until(s, &shared->unplaced, 2));
    tprpc_future_release(future);
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->unplaced), 2);
    CHECK_EQ_INT(LOAD(&shared->placed), 2);
    CHECK(until_released(s, 2));   /* the peer's replies */
}

/* A worker that is stopped does nothing: cma reads from him all the same. */
static void only_what_both_do(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s;
    (void)agent;
    context->channels = "bulk,basic";
}

IN_MODES(unplaced_when_it_times_out, APART_MODES) {
    side sides[2] = {{0}};
    place_setup();
    sides[0].tune = sides[1].tune = only_what_both_do;
    sides[0].mode = with;
    sides[0].main = client_unplaced_timeout;
    sides[1].methods = give_methods;
    group_run(sides, 2);
    place_teardown();
}

/* ---- waits within handlers, and callbacks that call anything ---- */

static void on_down(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    uint32_t left;
    tprpc_message next = {0};
    tprpc_error error = {0};
    check_thread(s);
    memcpy(&left, message->metadata, sizeof left);
    if (left == 0) {
        tprpc_reply(request, NULL);
        return;
    }
    left--;
    next.metadata = &left;
    next.metadata_size = sizeof left;
    tprpc_call_options options = {0};
    tprpc_future future;
    options.error = &error;
    tprpc_status status = tprpc_call(s->agent, s->rank == 0 ? "bob" : "ann", "down", &next, &options, &future);
    if (status == TPRPC_OK) {
        status = tprpc_future_wait(future, WAIT_MS);
        if (status == TPRPC_ERROR_LIMIT) ADD(&shared->count[3], 1);
        else tprpc_future_error(future, &error);
        tprpc_future_release(future);
    }
    if (status == TPRPC_OK) CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
    else CHECK_EQ_INT(tprpc_fail(request, (int32_t)status, error.text), TPRPC_OK);
}

static const tprpc_method_desc down_methods[] = {{"down", on_down, NULL, NULL, NULL, 0}, {0}};

static tprpc_status down(side *s, uint32_t depth) {
    tprpc_message message = {0};
    message.metadata = &depth;
    message.metadata_size = sizeof depth;
    return call_and_wait(s, "bob", "down", &message, NULL, NULL);
}

static void client_down(side *s) {
    CHECK_EQ_INT(down(s, 0), TPRPC_OK);
    CHECK_EQ_INT(down(s, 1), TPRPC_OK);
    CHECK_EQ_INT(down(s, 7), TPRPC_OK);
    CHECK_EQ_INT(LOAD(&shared->count[3]), 0);
    CHECK_EQ_INT(down(s, 40), TPRPC_ERROR_REMOTE);   /* deeper than limits.nesting, 4 here */
    CHECK(LOAD(&shared->count[3]) >= 1);
    /* what is left of that chain unwinds meanwhile, and may stand in the way of the next */
    tprpc_status status = TPRPC_ERROR_REMOTE;
    for (int i = 0; i < 200 && status != TPRPC_OK; i++) status = down(s, 7);
    CHECK_EQ_INT(status, TPRPC_OK);
}

static void nest_little(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->limits.nesting = 4;
    if (context->threads) context->threads = 1;   /* each loop has its own depth */
}

IN_MODES(nested, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_down;
    sides[0].methods = sides[1].methods = down_methods;
    sides[0].tune = sides[1].tune = nest_little;
    group_run(sides, 2);
}

typedef struct chain { side *s; int left, done; tprpc_future future; } chain;

static void chain_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    chain *c = (chain *)user;
    side *s = c->s;
    tprpc_call_options options = {0};
    tprpc_message message = text_of("more");
    char text[300];
    tprpc_method_desc method = {"temporary", on_echo, NULL, NULL, s, 0};
    (void)reply; (void)error;
    CHECK_EQ_INT(status, TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_leave(s->agent, 10, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_start(s->agent, NULL, NULL, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_register(s->agent, &method, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "ann", "temporary", &message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "temporary", NULL), TPRPC_OK);
    stats_of(s);
    CHECK(tprpc_agent_report(s->agent, text, sizeof text) > 0);
    tprpc_poll(s->ctx, TPRPC_NOW, 0);
    tprpc_wake(s->ctx);
    tprpc_future_release(c->future);
    if (--c->left > 0) {
        tprpc_future future;
        options.on_done = chain_done;
        options.user = c;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", &message, &options, &future), TPRPC_OK);
        c->future = future;
    } else {
        STORE(&c->done, 1);
    }
}

static void client_chain(side *s) {
    chain c = {0};
    tprpc_call_options options = {0};
    c.s = s;
    c.left = 50;
    options.on_done = chain_done;
    options.user = &c;
    CHECK_EQ_INT(tprpc_call(s->agent, "bob", "echo", NULL, &options, NULL), TPRPC_OK);
    CHECK(until(s, &c.done, 1));
}
/* One loop: in a threaded context the future that a callback releases could be written after the call that it is of. */
IN_MODES(callbacks_call_anything, 0x47) { pair(with, client_chain); }

/* ---- threads ---- */

typedef struct job { side *s; int index, rounds; } job;

static void *job_run(void *arg) {
    job *j = (job *)arg;
    for (int i = 0; i < j->rounds; i++) {
        uint32_t body[2] = {(uint32_t)j->index, (uint32_t)i};
        tprpc_message message = {0};
        tprpc_future futures[2];
        message.metadata = body;
        message.metadata_size = sizeof body;
        if (!CHECK(tprpc_call(j->s->agent, "bob", "echo", &message, NULL, &futures[0]) == TPRPC_OK)) break;
        if (!CHECK(tprpc_call(j->s->agent, "ann", "echo", &message, NULL, &futures[1]) == TPRPC_OK)) break;
        if (!CHECK_EQ_INT(tprpc_future_wait_all(futures, 2, WAIT_MS), TPRPC_OK)) break;
        for (int k = 0; k < 2; k++) {
            const tprpc_message *reply = tprpc_future_reply(futures[k]);
            CHECK(reply && reply->metadata_size == sizeof body && memcmp(reply->metadata, body, sizeof body) == 0);
            tprpc_future_release(futures[k]);
        }
    }
    ADD(&shared->count[5], 1);
    return NULL;
}

static void client_jobs(side *s) {
    job jobs[8];
    pthread_t threads[8];
    for (int i = 0; i < 8; i++) {
        jobs[i].s = s;
        jobs[i].index = i;
        jobs[i].rounds = 300 / TEST_SLOWDOWN / (TEST_TSAN ? 4 : 1);
        REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, job_run, &jobs[i]), 0);
    }
    CHECK(until(s, &shared->count[5], 8));   /* handlers for ann run here, and assert so */
    for (int i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    CHECK_EQ_INT(LOAD(&shared->handled), 8 * 2 * jobs[0].rounds);
}
IN_MODES(eight_threads_wait, ALL_MODES) { pair(with, client_jobs); }

/* ---- blocking handlers: the engine's jobs, or the agent's threads ---- */

enum { QUEUE_MOST = 4, ENGINE_THREADS = 2 };
typedef struct engine {                /* a job system whose queue is short */
    pthread_mutex_t lock;
    pthread_cond_t change;
    pthread_t threads[ENGINE_THREADS];
    struct { void (*run)(void *); void *arg; } queue[QUEUE_MOST];
    int count, stop, refused, ran;
} engine;

static engine jobs_engine = {.lock = PTHREAD_MUTEX_INITIALIZER, .change = PTHREAD_COND_INITIALIZER};

static void *engine_run(void *arg) {
    engine *e = (engine *)arg;
    pthread_mutex_lock(&e->lock);
    while (!e->stop || e->count) {
        if (!e->count) {
            pthread_cond_wait(&e->change, &e->lock);
            continue;
        }
        void (*run)(void *) = e->queue[0].run;
        void *what = e->queue[0].arg;
        memmove(e->queue, e->queue + 1, (size_t)--e->count * sizeof e->queue[0]);
        pthread_mutex_unlock(&e->lock);
        run(what);
        pthread_mutex_lock(&e->lock);
        e->ran++;
    }
    pthread_mutex_unlock(&e->lock);
    return NULL;
}

static bool engine_submit(void (*run)(void *), void *arg, void *user) {
    engine *e = &jobs_engine;
    (void)user;
    pthread_mutex_lock(&e->lock);
    bool room = e->count < QUEUE_MOST;
    if (room) {
        e->queue[e->count].run = run;
        e->queue[e->count++].arg = arg;
        pthread_cond_signal(&e->change);
    } else {
        e->refused++;
    }
    pthread_mutex_unlock(&e->lock);
    return room;
}

static void engine_start(void) {
    jobs_engine.stop = jobs_engine.refused = jobs_engine.ran = 0;
    for (int i = 0; i < ENGINE_THREADS; i++)
        REQUIRE_EQ_INT(pthread_create(&jobs_engine.threads[i], NULL, engine_run, &jobs_engine), 0);
}

static void engine_stop(void) {
    pthread_mutex_lock(&jobs_engine.lock);
    jobs_engine.stop = 1;
    pthread_cond_broadcast(&jobs_engine.change);
    pthread_mutex_unlock(&jobs_engine.lock);
    for (int i = 0; i < ENGINE_THREADS; i++) pthread_join(jobs_engine.threads[i], NULL);
}

/* Blocks for a while and calls back to the caller, from wherever it runs. */
static void on_block(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    if (s->mode->threads == 0 && pthread_equal(pthread_self(), s->thread)) ADD(&shared->bad, 1);
    ADD(&shared->handled, 1);
    test_sleep_us(2000);
    CHECK_EQ_INT(call_and_wait(s, "ann", "echo", message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static const tprpc_method_desc block_methods[] = {
    {"block", on_block, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {"echo", on_echo, NULL, NULL, NULL, 0}, {0},
};

static void client_block(side *s) {
    tprpc_message message = text_of("block");
    tprpc_future futures[40];
    tprpc_call_options options = {0};
    for (int i = 0; i < 40; i++) {
        options.lane = (uint32_t)i % 3;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", "block", &message, &options, &futures[i]), TPRPC_OK);
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);   /* others are served meanwhile */
    CHECK_EQ_INT(tprpc_future_wait_all(futures, 40, WAIT_MS), TPRPC_OK);
    for (int i = 0; i < 40; i++) tprpc_future_release(futures[i]);
    CHECK_EQ_INT(LOAD(&shared->handled), 40 + 40 + 1);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
}

static void use_engine(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->submit = engine_submit;
    engine_start();
}

static void use_workers(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)context;
    agent->worker_threads = 3;
}

static void block_engine_main(side *s) {
    CHECK(until(s, &shared->stop, 1));
    engine_stop();
    CHECK(jobs_engine.refused > 0);
    CHECK_EQ_INT(jobs_engine.ran, 40);
}

static void client_block_engine(side *s) {
    client_block(s);
    STORE(&shared->stop, 1);
}

IN_MODES(blocking_by_submit, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_block_engine;
    sides[0].methods = methods;
    sides[1].methods = block_methods;
    sides[1].tune = use_engine;
    sides[1].main = block_engine_main;
    group_run(sides, 2);
}

IN_MODES(blocking_by_workers, ALL_MODES) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_block;
    sides[0].methods = methods;
    sides[1].methods = block_methods;
    sides[1].tune = use_workers;
    group_run(sides, 2);
}

/* ---- lanes: order ---- */

static void on_order(tprpc_request request, const tprpc_message *message, void *user) {
    uint32_t body[2];
    (void)user;
    memcpy(body, message->metadata, sizeof body);
    const int at = ADD(&shared->count[8 + body[0]], 1);
    if ((uint32_t)at != body[1]) ADD(&shared->bad, 1);
    tprpc_reply(request, NULL);
}

static tprpc_status order_place(tprpc_placement *placement, void *user) {
    (void)user;
    if (placement->tensors[0].size != PLACE_HUGE / 4) return TPRPC_OK;
    placement->tensors[0].data = place_memory[0];
    return TPRPC_OK;
}

static const tprpc_method_desc order_methods[] = {
    {"order", on_order, NULL, NULL, NULL, 0}, {"order in place", on_order, order_place, NULL, NULL, 0}, {0},
};

static void client_order(side *s) {
    enum { N = 120 };
    tprpc_future futures[N];
    uint32_t next[4] = {0};
    for (int i = 0; i < N; i++) {
        tprpc_call_options options = {0};
        const bool large = i % 20 == 0;
        tprpc_tensor tensor = bytes_of(place_memory[1], large ? PLACE_HUGE / 4 : i % 3 == 0 ? 100000 : 64);
        tprpc_message message = tensors_of(&tensor, i % 5 == 4 ? 0 : 1);
        options.lane = (uint32_t)(1 + i % 2);
        if (large) options.lane = 1;
        uint32_t body[2] = {options.lane, ++next[options.lane]};
        message.metadata = body;
        message.metadata_size = sizeof body;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", i % 20 == 0 && i % 40 ? "order in place" : "order", &message, &options,
                                &futures[i]), TPRPC_OK);
    }
    CHECK_EQ_INT(tprpc_future_wait_all(futures, N, WAIT_MS), TPRPC_OK);
    for (int i = 0; i < N; i++) tprpc_future_release(futures[i]);
    CHECK_EQ_INT(LOAD(&shared->count[9]) + LOAD(&shared->count[10]), N);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
}

IN_MODES(lanes, ALL_MODES) {
    side sides[2] = {{0}};
    place_setup();
    sides[0].mode = with;
    sides[0].main = client_order;
    sides[1].methods = order_methods;
    group_run(sides, 2);
    place_teardown();
}

/* ---- hot reload ---- */

/* Code of the method runs, for a while. */
static void reload_code(void) {
    if (LOAD(&shared->count[6])) ADD(&shared->bad, 1);   /* unregistered at this moment */
    test_sleep_us(100);
    if (LOAD(&shared->count[6])) ADD(&shared->bad, 1);
}

static void on_reload(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    reload_code();
    tprpc_reply(request, message);
    reload_code();
}

/* Memory that place gave and that did not come back yet; that of calls whose method went in between never does. */
enum { RELOAD_SLOTS = 200 };
static void *reload_slots[RELOAD_SLOTS];

static bool reload_slot(void *from, void *to) {
    for (int i = 0; i < RELOAD_SLOTS; i++)
        if (__sync_bool_compare_and_swap(&reload_slots[i], from, to)) return true;
    return false;
}

static void reload_give_back(void *memory) {
    if (!memory || !reload_slot(memory, NULL)) ADD(&shared->bad, 1);
    else free(memory);
}

static tprpc_status place_reload(tprpc_placement *placement, void *user) {
    void *memory = malloc(placement->tensors[0].size);
    (void)user;
    reload_code();
    if (!memory || !reload_slot(NULL, memory)) {
        free(memory);
        return TPRPC_ERROR_MEMORY;
    }
    placement->tensors[0].data = placement->cookie = memory;
    ADD(&shared->placed, 1);
    return TPRPC_OK;
}

static void unplaced_reload(const tprpc_placement *placement, void *user) {
    (void)user;
    reload_code();
    reload_give_back(placement->cookie);
    ADD(&shared->unplaced, 1);
}

static void on_placed_reload(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    reload_code();
    if (!filled(message->tensors[0].data, message->tensors[0].size, 0)) ADD(&shared->bad, 1);
    reload_give_back(message->tensors[0].data);
    ADD(&shared->handled, 1);
    tprpc_reply(request, NULL);
    reload_code();
}

static void on_remove_itself(tprpc_request request, const tprpc_message *message, void *user) {
    side *s = (side *)user;
    (void)message;
    CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "once", NULL), TPRPC_PENDING);
    CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "once", NULL), TPRPC_ERROR_NO_METHOD);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
}

static const tprpc_method_desc reload_methods[] = {
    {"reload", on_reload, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING},
    {"once", on_remove_itself, NULL, NULL, NULL, 0},
    {0},
};

static const tprpc_method_desc reload_inline_methods[] = {
    {"reload", on_reload, NULL, NULL, NULL, 0}, {"once", on_remove_itself, NULL, NULL, NULL, 0}, {0},
};
static const tprpc_method_desc reload_placed_methods[] = {
    {"reload", on_placed_reload, place_reload, unplaced_reload, NULL, 0},
    {"once", on_remove_itself, NULL, NULL, NULL, 0},
    {0},
};

/* Calls of all sizes, or of 1 MiB, of which some are cancelled on their way. */
static void *reload_caller(void *arg) {
    job *j = (job *)arg;
    uint8_t *bytes = (uint8_t *)malloc(PLACE_BIG);
    fill(bytes, PLACE_BIG, 0);
    for (int i = 0; !LOAD(&shared->stop); i++) {
        const size_t most = j->s->user ? PLACE_BIG : i % 3 ? 64 : 70000;
        const bool cancelled = j->s->user && i % 4 == 0;
        tprpc_tensor tensor = bytes_of(bytes, most);
        tprpc_message message = tensors_of(&tensor, 1);
        tprpc_error error = {0};
        tprpc_status status = TPRPC_ERROR_CANCELLED;
        if (cancelled) {
            tprpc_future future;
            REQUIRE_EQ_INT(tprpc_call(j->s->agent, "bob", "reload", &message, NULL, &future), TPRPC_OK);
            test_sleep_us(i % 5 * 100);
            tprpc_future_cancel(future);
            tprpc_future_release(future);
        } else {
            status = call_and_wait(j->s, "bob", "reload", &message, NULL, &error);
            if (!CHECK(status == TPRPC_OK || status == TPRPC_ERROR_NO_METHOD)) fprintf(stderr, "%s\n", error.text);
        }
        if (status == TPRPC_OK) ADD(&shared->count[0], 1);
        if (status == TPRPC_ERROR_NO_METHOD) {
            CHECK_CONTAINS(error.text, "reload");
            ADD(&shared->count[1], 1);
        }
    }
    free(bytes);
    ADD(&shared->count[2], 1);
    return NULL;
}

static void client_reload(side *s) {
    job jobs[3];
    pthread_t threads[3];
    CHECK_EQ_INT(call_and_wait(s, "bob", "once", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "bob", "once", NULL, NULL, NULL), TPRPC_ERROR_NO_METHOD);
    for (int i = 0; i < 3; i++) {
        jobs[i].s = s;
        REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, reload_caller, &jobs[i]), 0);
    }
    CHECK(until(s, &shared->count[2], 3));
    for (int i = 0; i < 3; i++) pthread_join(threads[i], NULL);
    CHECK(LOAD(&shared->count[0]) > 0);
    CHECK(LOAD(&shared->count[1]) > 0);
    CHECK_EQ_INT(LOAD(&shared->bad), 0);
}

/* Takes the method away and gives it back while it is called; `polls` drives the agent, NULL: others do. */
static void reload(side *s, side *polls) {
    tprpc_method_desc method = s->methods[0];
    tprpc_error error = {0};
    const int rounds = method.place ? 10 : 30;      /* each leaves some memory behind */
    method.user = s;
    CHECK_EQ_INT(tprpc_agent_register(s->agent, &method, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "reload");
    CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "never there", &error), TPRPC_ERROR_NO_METHOD);
    CHECK_CONTAINS(error.text, "never there");
    for (int i = 0; i < rounds; i++) {
        CHECK(until(polls, &shared->count[0], LOAD(&shared->count[0]) + 3));
        CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "reload", NULL), TPRPC_OK);
        STORE(&shared->count[6], 1);
        CHECK(until(polls, &shared->count[1], LOAD(&shared->count[1]) + 3));
        STORE(&shared->count[6], 0);
        CHECK_EQ_INT(tprpc_agent_register(s->agent, &method, NULL), TPRPC_OK);
    }
    STORE(&shared->stop, 1);
}

static void server_reload(side *s) { reload(s, s); }

static void *reload_elsewhere(void *arg) {
    reload((side *)arg, NULL);
    return NULL;
}

static void server_reload_elsewhere(side *s) {
    pthread_t thread;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, reload_elsewhere, s), 0);
    CHECK(until(s, &shared->stop, 1));
    pthread_join(thread, NULL);
}

static void run_reload(const mode *with, const tprpc_method_desc *served, void (*server)(side *)) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client_reload;
    if (served == reload_placed_methods) sides[0].user = &place_cookie;
    sides[1].methods = served;
    sides[1].main = server;
    if (served == reload_methods) sides[1].tune = use_workers;
    group_run(sides, 2);
}

IN_MODES(hot_reload, ALL_MODES) { run_reload(with, reload_methods, server_reload); }
/* Handlers on the loop's thread, or within a poll, while another thread unregisters. */
IN_MODES(hot_reload_inline, ALL_MODES) { run_reload(with, reload_inline_methods, server_reload_elsewhere); }
IN_MODES(hot_reload_placed, ALL_MODES) {
    run_reload(with, reload_placed_methods, server_reload_elsewhere);
    CHECK_LE_INT(shared->handled + shared->unplaced, shared->placed);
    for (int i = 0; i < RELOAD_SLOTS; i++) free(reload_slots[i]);
}
