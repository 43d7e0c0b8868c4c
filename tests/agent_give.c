/* Calls and replies that are given to an agent of this process: shown in place until the request is answered or the
   future released. */
#include "agent_two.h"

enum { SIZE = 100000 };

static struct { void *data[2]; bool right; tprpc_request request; int kept; } seen;

static uint8_t *aligned(size_t size, unsigned seed) {
    void *block = NULL;
    REQUIRE_EQ_INT(posix_memalign(&block, 64, size), 0);
    fill(block, size, seed);
    return (uint8_t *)block;
}

static tprpc_message gift(const tprpc_tensor *tensor, void *user) {
    tprpc_message message = tensors_of(tensor, 1);
    message.release = count_release;
    message.release_user = user;
    message.flags = TPRPC_MESSAGE_GIVE;
    return message;
}

static void look(const tprpc_message *message) {
    seen.data[0] = message->tensors[0].data;
    seen.right = filled(message->tensors[0].data, message->tensors[0].size, 1);
    fill(message->tensors[0].data, message->tensors[0].size, 2);
}

/* Changes the tensor in place, and replies without it. */
static void on_look(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    look(message);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    ADD(&shared->handled, 1);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
}

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    look(message);
    seen.request = request;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->handled, 1);
    STORE(&seen.kept, 1);
}

/* Gives a tensor back, of its own. */
static void on_fetch(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensor = bytes_of(aligned(SIZE, 3), SIZE);
    tprpc_message reply = gift(&tensor, NULL);
    (void)message;
    (void)user;
    seen.data[1] = tensor.data;
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static const tprpc_method_desc methods[] = {
    {"look", on_look, NULL, NULL, NULL, 0}, {"keep", on_keep, NULL, NULL, NULL, 0},
    {"fetch", on_fetch, NULL, NULL, NULL, 0}, {"echo", on_echo, NULL, NULL, NULL, 0}, {NULL, NULL, NULL, NULL, NULL, 0},
};

enum { XTH = 0x1c };                   /* of `kinds`: tcp_xth, shm_xth and threads */

static void idle(int64_t us) {
    const int64_t end = test_now_us() + us;
    while (test_now_us() < end) turn();
}

IN_KINDS(call, XTH) {
    outcome o = {0};
    uint8_t *data;
    two_join(with, methods);
    data = aligned(SIZE, 1);
    tprpc_tensor tensor = bytes_of(data, SIZE);
    tprpc_message message = gift(&tensor, NULL);
    CHECK_EQ_INT(call(&two[0], "bob", "look", &message, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    CHECK(both_until(&shared->released, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK(seen.data[0] == data && seen.right && filled(data, SIZE, 2));
    CHECK_EQ_INT(stats_of(&two[1]).tensor_bytes_adopted, SIZE);
    idle(20000);
    CHECK_EQ_INT(shared->released, 1);
    two_close();
    free(data);
}

/* The reply is the replier's memory until the future is released. */
IN_KINDS(reply, XTH) {
    tprpc_call_options options = {0};
    char report[4000];
    tprpc_future future;
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    two_join(with, methods);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "fetch", NULL, &options, &future), TPRPC_OK);
    while (tprpc_future_wait(future, TPRPC_NOW) == TPRPC_PENDING && test_now_us() < end) turn();
    const tprpc_message *reply = tprpc_future_reply(future);
    REQUIRE(reply != NULL && reply->tensor_count == 1);
    CHECK(reply->tensors[0].data == seen.data[1] && filled(reply->tensors[0].data, SIZE, 3));
    fill(reply->tensors[0].data, SIZE, 4);
    idle(30000);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    CHECK_EQ_INT(stats_of(&two[0]).tensor_bytes_adopted, SIZE);
    CHECK(tprpc_agent_report(two[0].agent, report, sizeof report) < sizeof report);
    CHECK_CONTAINS(report, "of which 100000 not copied\n");
    tprpc_future_release(future);
    CHECK(both_until(&shared->released, 1));
    CHECK(filled(seen.data[1], SIZE, 4));
    two_close();
    CHECK_EQ_INT(shared->released, 1);
    free(seen.data[1]);
}

/* The caller gives up; what he gave stays the handler's until that has answered. */
static void given_up(const kind *with, bool cancel) {
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    tprpc_future future;
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    uint8_t *data;
    two_join(with, methods);
    data = aligned(SIZE, 1);
    tprpc_tensor tensor = bytes_of(data, SIZE);
    tprpc_message message = gift(&tensor, NULL);
    options.timeout_ms = cancel ? WAIT_MS : 200;
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "keep", &message, &options, &future), TPRPC_OK);
    CHECK(both_until(&seen.kept, 1));
    if (cancel) CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    while (tprpc_future_wait(future, TPRPC_NOW) == TPRPC_PENDING && test_now_us() < end) turn();
    CHECK_EQ_INT(tprpc_future_error(future, &error), cancel ? TPRPC_ERROR_CANCELLED : TPRPC_ERROR_TIMEOUT);
    tprpc_future_release(future);
    while (!tprpc_request_cancelled(seen.request) && test_now_us() < end) turn();
    idle(30000);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    CHECK(tprpc_request_message(seen.request) && tprpc_request_message(seen.request)->tensors[0].data == data);
    CHECK(filled(data, SIZE, 2));
    CHECK_EQ_INT(tprpc_reply(seen.request, NULL), TPRPC_ERROR_INVALID);
    CHECK(both_until(&shared->released, 1));
    two_close();
    CHECK_EQ_INT(shared->released, 1);
    free(data);
}

IN_KINDS(times_out, XTH) { given_up(with, false); }
IN_KINDS(is_cancelled, XTH) { given_up(with, true); }

/* The receiver's agent goes with a request that it kept: the memory is the sender's again. */
IN_KINDS(receiver_goes, XTH) {
    outcome o = {0};
    uint8_t *data;
    two_join(with, methods);
    data = aligned(SIZE, 1);
    tprpc_tensor tensor = bytes_of(data, SIZE);
    tprpc_message message = gift(&tensor, NULL);
    CHECK_EQ_INT(call(&two[0], "bob", "keep", &message, NULL, &o), TPRPC_OK);
    CHECK(both_until(&seen.kept, 1));
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    end_agent(&two[1]);
    CHECK(both_until(&shared->released, 1));
    CHECK(both_until(&o.count, 1));
    CHECK(o.status != TPRPC_OK);
    two_close();
    CHECK_EQ_INT(shared->released, 1);
    free(data);
}

/* What was given may be sent on as a reply: it is copied, for it goes with the request. */
IN_KINDS(echoed, XTH) {
    tprpc_call_options options = {0};
    tprpc_future future;
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    uint8_t *data;
    two_join(with, methods);
    data = aligned(SIZE, 5);
    tprpc_tensor tensor = bytes_of(data, SIZE);
    tprpc_message message = gift(&tensor, NULL);
    CHECK_EQ_INT(tprpc_call(two[0].agent, "bob", "echo", &message, &options, &future), TPRPC_OK);
    while (tprpc_future_wait(future, TPRPC_NOW) == TPRPC_PENDING && test_now_us() < end) turn();
    CHECK(both_until(&shared->released, 1));
    memset(data, 0, SIZE);
    const tprpc_message *reply = tprpc_future_reply(future);
    REQUIRE(reply != NULL && reply->tensor_count == 1);
    CHECK(reply->tensors[0].data != data && filled(reply->tensors[0].data, SIZE, 5));
    tprpc_future_release(future);
    two_close();
    free(data);
}

/* ---- the sender's agent is destroyed while its gift is kept ---- */

static int64_t hurried_us(void *user) {   /* so that 30 s are soon over */
    (void)user;
    return test_now_us() * 30;
}

static void hurry(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    if (s == &two[0]) context->clock_us = hurried_us;
}

/* It waits, says so, and goes when the receiver is done. */
IN_KINDS(sender_goes, XTH) {
    tprpc_call_options options = {0};
    outcome o = {0};
    uint8_t *data;
    two_tune = hurry;
    two_join(with, methods);
    data = aligned(SIZE, 1);
    tprpc_tensor tensor = bytes_of(data, SIZE);
    tprpc_message message = gift(&tensor, NULL);
    options.timeout_ms = 300000;
    CHECK_EQ_INT(call(&two[0], "bob", "keep", &message, &options, &o), TPRPC_OK);
    CHECK(both_until(&seen.kept, 1));
    CHECK_EQ_INT(tprpc_agent_destroy(two[0].agent), TPRPC_ERROR_TIMEOUT);
    CHECK_EQ_INT(o.count, 1);
    CHECK_EQ_INT(o.status, TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(LOAD(&shared->released), 0);
    CHECK_EQ_INT(tprpc_context_destroy(two[0].ctx), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_destroy(two[0].agent), TPRPC_ERROR_TIMEOUT);
    CHECK(filled(data, SIZE, 2));
    tprpc_reply(seen.request, NULL);   /* whether or not he has heard that the caller is gone */
    CHECK(both_until(&shared->released, 1));
    two_close();
    CHECK_EQ_INT(shared->released, 1);
    free(data);
}
