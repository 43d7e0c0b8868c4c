/* Tensors of calls on devices: the device map, and streams. The device is toys.h's, whose memory the CPU must not touch and
   whose copies end late, in order within a queue. */
#include "agent_help.h"
#include "toys.h"

enum { SIZE = 20000, LAG_US = 2000 };

static toy_queue *own_queue;           /* a stream of the caller's */

static tprpc_device cpu(void) {
    const tprpc_device device = {TPRPC_CPU, 0};
    return device;
}

static tprpc_device device_of(int32_t kind, int32_t index) {
    tprpc_device device;
    device.kind = kind;
    device.index = index;
    return device;
}

/* Whether a tensor of any device holds what fill() wrote, in its stream's order. */
static bool holds(const tprpc_tensor *tensor, unsigned seed) {
    uint8_t *bytes = (uint8_t *)malloc(tensor->size);
    REQUIRE(bytes != NULL);
    if (tensor->device.kind == TPRPC_DEVICE_USER)
        toy_gpu_get(toy_queue_of(tensor->device, tensor->stream), bytes, tensor->data, tensor->size);
    else memcpy(bytes, tensor->data, tensor->size);
    bool good = filled(bytes, tensor->size, seed);
    free(bytes);
    return good;
}

/* Answers on which devices the tensors are, as "64:1 1:0", when their bytes are right. */
static void on_where(tprpc_request request, const tprpc_message *message, void *user) {
    char text[200] = "";
    (void)user;
    for (size_t i = 0; i < message->tensor_count; i++) {
        const tprpc_tensor *t = &message->tensors[i];
        CHECK(holds(t, (unsigned)i));
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%d:%d", i ? " " : "", (int)t->device.kind,
                 (int)t->device.index);
    }
    tprpc_message reply = text_of(text);
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

/* Sends the tensors back, without a map each to the device it came to. */
static void on_return(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    for (size_t i = 0; i < message->tensor_count; i++) CHECK(holds(&message->tensors[i], (unsigned)i));
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static void on_streams(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK(tprpc_request_stream(request, toy_device(0)) == toy_gpu.queues[0]);
    CHECK(tprpc_request_stream(request, toy_device(1)) == toy_gpu.queues[1]);
    for (size_t i = 0; i < message->tensor_count; i++)
        CHECK(tprpc_request_stream(request, message->tensors[i].device) == message->tensors[i].stream);
    CHECK(tprpc_request_stream(request, cpu()) == NULL);
    CHECK(tprpc_request_stream(request, toy_device(7)) == NULL);
    CHECK(tprpc_request_stream(request, toy_device(-1)) == NULL);
    CHECK(tprpc_request_stream(request, device_of(99, 0)) == NULL);
    ADD(&shared->handled, 1);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
    CHECK(tprpc_request_stream(request, toy_device(0)) == NULL);   /* stale */
}

static const tprpc_method_desc methods[] = {
    {"where", on_where, NULL, NULL, NULL, 0},
    {"return", on_return, NULL, NULL, NULL, 0},
    {"streams", on_streams, NULL, NULL, NULL, 0},
    {0},
};

static void with_toys(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->backends = toy_backends;
    context->backend_count = 3;
}

/* ann on this thread, with a map made by `maps` before she starts, and bob and cyd who serve. */
static void group_with(const mode *with, void (*maps)(side *), void (*first)(side *)) {
    side sides[3] = {{0}};
    group g;
    share();
    toys_begin(LAG_US);
    own_queue = toy_queue_new();
    for (int i = 0; i < 3; i++) {
        sides[i].methods = methods;
        sides[i].tune = with_toys;
    }
    sides[0].mode = with;
    group_open(&g, sides, 3);
    for (int i = 1; i < 3; i++) REQUIRE_EQ_INT(pthread_create(&sides[i].self, NULL, side_thread, &sides[i]), 0);
    side_open(&sides[0]);
    if (maps) maps(&sides[0]);
    side_join(&sides[0]);
    first(&sides[0]);
    side_leave(&sides[0]);
    side_close(&sides[0]);
    for (int i = 1; i < 3; i++) pthread_join(sides[i].self, NULL);
    group_close(&g);
    toy_queue_free(own_queue);
    toys_end();
}

enum { INSIDE_MODES = 0x6c };

/* A tensor of SIZE bytes on a device, or of any size on the host, filled in its queue's order. */
static tprpc_tensor tensor_on(tprpc_device device, toy_queue *queue, size_t size, unsigned seed) {
    uint8_t *bytes = (uint8_t *)malloc(size);
    REQUIRE(bytes != NULL);
    fill(bytes, size, seed);
    tprpc_tensor tensor = bytes_of(bytes, size);
    if (device.kind != TPRPC_DEVICE_USER) return tensor;
    tensor.device = device;
    tensor.data = toy_gpu_alloc(device.index, size);
    toy_gpu_put(queue ? queue : toy_queue_of(device, NULL), tensor.data, bytes, size);
    free(bytes);
    return tensor;
}

static void tensor_free(tprpc_tensor *tensor) {
    if (tensor->device.kind == TPRPC_DEVICE_USER) toy_gpu_free(tensor->data);
    else free(tensor->data);
}

/* ---- the device map ---- */

static void map_one(side *s, const char *worker, tprpc_device from, tprpc_device to) {
    tprpc_error error = {0};
    if (tprpc_agent_set_device_map(s->agent, worker, &from, &to, 1, &error) != TPRPC_OK) {
        fprintf(stderr, "%s\n", error.text);
        CHECK(false);
    }
}

static void map_some(side *s) {
    const tprpc_device from[] = {toy_device(0), {TPRPC_DEVICE_DEFAULT, 0}}, to[] = {toy_device(0), cpu()};
    map_one(s, "bob", cpu(), toy_device(0));
    map_one(s, NULL, toy_device(0), toy_device(1));
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, "bob", from, to, 2, NULL), TPRPC_OK);
    map_one(s, "bob", cpu(), toy_device(1));   /* the last word counts */
    map_one(s, NULL, toy_device(1), cpu());
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, "cyd", NULL, NULL, 0, NULL), TPRPC_OK);
}

static void ask_where(side *s, const char *worker, const char *expected) {
    tprpc_tensor tensors[6];
    tprpc_message message = tensors_of(tensors, 6);
    tprpc_error error = {0};
    tprpc_call_options options = {0};
    tprpc_future future;
    tensors[0] = tensor_on(toy_device(0), NULL, SIZE, 0);
    tensors[1] = tensor_on(cpu(), NULL, 100, 1);
    tensors[2] = tensor_on(cpu(), NULL, SIZE, 2);
    tensors[3] = tensor_on(toy_device(1), NULL, SIZE, 3);
    tensors[4] = tensor_on(toy_device(0), NULL, SIZE, 4);
    tensors[4].target = cpu();         /* as the call says, not as the map */
    tensors[5] = tensor_on(cpu(), NULL, 50, 5);
    tensors[5].target = cpu();
    for (int lent = 0; lent < 2; lent++) {
        STORE(&shared->released, 0);
        if (lent) message.release = count_release;
        options.error = &error;
        REQUIRE_EQ_INT(tprpc_call(s->agent, worker, "where", &message, &options, &future), TPRPC_OK);
        if (CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK)) {
            char text[200] = "";
            const tprpc_message *reply = tprpc_future_reply(future);
            memcpy(text, reply->metadata, reply->metadata_size);
            CHECK_STR(text, expected);
        } else {
            tprpc_future_error(future, &error);
            fprintf(stderr, "%s: %s\n", worker, error.text);
        }
        tprpc_future_release(future);
        if (lent) CHECK(until_released(s, 1));
    }
    for (int i = 0; i < 6; i++) {
        CHECK_EQ_INT(tensors[i].target.kind, i > 3 ? TPRPC_CPU : TPRPC_DEVICE_DEFAULT);   /* the caller's is as it was */
        CHECK(tensors[i].stream == NULL);
        tensor_free(&tensors[i]);
    }
}

static void ask_all_where(side *s) {
    const tprpc_device from = toy_device(0), to = toy_device(1);
    tprpc_error error = {0};
    for (int i = 0; i < 3; i++) {
        ask_where(s, "bob", "64:0 64:1 64:1 1:0 1:0 1:0");
        ask_where(s, "cyd", "64:1 1:0 1:0 1:0 1:0 1:0");
    }
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, "bob", &from, &to, 1, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "before it starts");
    ask_where(s, "bob", "64:0 64:1 64:1 1:0 1:0 1:0");
}
IN_MODES(device_map, INSIDE_MODES) { group_with(with, map_some, ask_all_where); }

static void ask_without(side *s) { ask_where(s, "bob", "64:0 1:0 1:0 64:1 1:0 1:0"); }

static void refuse(side *s, const char *worker, tprpc_device from, tprpc_device to, tprpc_status status,
                   const char *text) {
    const tprpc_device froms[] = {toy_device(0), from}, tos[] = {toy_device(1), to};
    tprpc_error error = {0};
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, worker, froms, tos, 2, &error), status);
    CHECK_EQ_INT(error.status, status);
    CHECK_CONTAINS(error.text, text);
}

/* Refused, each by its name; and of what comes with it nothing is taken. */
static void refuse_bad(side *s) {
    char name[200];
    refuse(s, NULL, device_of(99, 0), cpu(), TPRPC_ERROR_UNSUPPORTED, "from[1] is of device kind 99");
    refuse(s, NULL, device_of(TPRPC_CUDA, 0), cpu(), TPRPC_ERROR_UNSUPPORTED, "from[1] is of device kind 2");
    refuse(s, "bob", toy_device(7), cpu(), TPRPC_ERROR_INVALID, "from[1] is device 7 of kind 64");
    refuse(s, "bob", toy_device(-1), cpu(), TPRPC_ERROR_INVALID, "from[1] is device -1 of kind 64");
    refuse(s, "bob", device_of(TPRPC_CPU, 1), cpu(), TPRPC_ERROR_INVALID, "from[1] is device 1 of kind 1");
    refuse(s, "bob", cpu(), device_of(TPRPC_DEVICE_DEFAULT, 0), TPRPC_ERROR_INVALID, "to[1] is device 0 of kind 0");
    refuse(s, "bob", cpu(), toy_device(-3), TPRPC_ERROR_INVALID, "to[1] is device -3");
    refuse(s, "bob", cpu(), device_of(-5, 0), TPRPC_ERROR_INVALID, "kind -5");
    refuse(s, "", cpu(), cpu(), TPRPC_ERROR_INVALID, "worker's name");
    refuse(s, "\xff", cpu(), cpu(), TPRPC_ERROR_INVALID, "UTF-8");
    memset(name, 'n', sizeof name);
    name[129] = 0;
    refuse(s, name, cpu(), cpu(), TPRPC_ERROR_INVALID, "worker's name");
}
IN_MODES(bad_maps, INSIDE_MODES) { group_with(with, refuse_bad, ask_without); }

/* A device that the other worker does not have is its to refuse, when a tensor comes; a kind that nothing moves, ours. */
static void ask_far(side *s) {
    tprpc_error error = {0};
    tprpc_tensor tensor = tensor_on(cpu(), NULL, SIZE, 0);
    tprpc_message message = tensors_of(&tensor, 1);
    for (int i = 0; i < 4; i++) {
        tensor.target = i % 2 ? toy_device(50) : device_of(77, 0);
        CHECK_EQ_INT(call_and_wait(s, i % 2 ? "bob" : "cyd", "where", &message, NULL, &error), TPRPC_ERROR_UNSUPPORTED);
        CHECK_CONTAINS(error.text, i % 2 ? "tensor 0 is for device 50 of kind 64, which bob does not have"
                                         : "no channel to this peer moves 20000 bytes from device kind 1 to 77");
        CHECK_EQ_INT(call_and_wait(s, i % 2 ? "bob" : "cyd", "where", NULL, NULL, NULL), TPRPC_OK);
    }
    tensor_free(&tensor);
}
IN_MODES(target_on_no_device, INSIDE_MODES) { group_with(with, NULL, ask_far); }

/* ---- streams ---- */

static tprpc_status place_on_stream(tprpc_placement *placement, void *user) {
    CHECK(placement->tensors[0].stream == own_queue);
    CHECK(placement->tensors[1].stream == toy_gpu.queues[1] || placement->tensors[1].stream == NULL);
    placement->tensors[0].data = user;
    return TPRPC_OK;
}

/* The tensor's bytes are queued on the caller's own stream, and end late: who reads in another's order sees others. */
static void order_by_streams(side *s) {
    tprpc_stream streams[2];
    tprpc_call_options options = {0};
    streams[0].device = toy_device(0);
    streams[0].stream = own_queue;
    streams[1].device = toy_device(1);
    streams[1].stream = NULL;          /* the library's */
    for (int i = 0; i < 12; i++) {
        const bool lent = i % 2, placed = i % 3 == 0, own = i % 4 == 3;
        tprpc_tensor tensors[2];
        tprpc_message message = tensors_of(tensors, 2);
        tprpc_future future;
        void *place = placed ? toy_gpu_alloc(0, SIZE) : NULL;
        STORE(&shared->released, 0);
        tensors[0] = tensor_on(toy_device(0), own ? toy_gpu.queues[0] : own_queue, SIZE, 0);
        tensors[1] = tensor_on(toy_device(1), NULL, SIZE, 1);
        if (own) tensors[0].stream = toy_gpu.queues[0];   /* the tensor's own comes first */
        if (lent) message.release = count_release;
        options.streams = streams;
        options.stream_count = 2;
        options.place = placed ? place_on_stream : NULL;
        options.user = place;
        REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "return", &message, &options, &future), TPRPC_OK);
        streams[0].stream = (void *)&future;   /* it was copied */
        REQUIRE_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
        streams[0].stream = own_queue;
        const tprpc_message *reply = tprpc_future_reply(future);
        CHECK_EQ_INT(reply->tensor_count, 2);
        CHECK(reply->tensors[0].stream == own_queue);
        CHECK(!placed || reply->tensors[0].data == place);
        for (unsigned k = 0; k < 2; k++) {
            CHECK_EQ_INT(reply->tensors[k].device.kind, TPRPC_DEVICE_USER);
            CHECK_EQ_INT(reply->tensors[k].device.index, k);
            CHECK(holds(&reply->tensors[k], k));
        }
        tprpc_future_release(future);
        if (lent) CHECK(until_released(s, 1));
        for (int k = 0; k < 2; k++) tensor_free(&tensors[k]);
        toy_gpu_free(place);
    }
    for (int i = 0; i < 10; i++) {     /* and without any */
        tprpc_tensor tensor = tensor_on(toy_device(i % 2), NULL, SIZE, 0);
        tprpc_message message = tensors_of(&tensor, 1);
        CHECK_EQ_INT(call_and_wait(s, "cyd", "streams", &message, NULL, NULL), TPRPC_OK);
        tensor_free(&tensor);
    }
    CHECK_EQ_INT(LOAD(&shared->handled), 10);
}
IN_MODES(streams, INSIDE_MODES) { group_with(with, NULL, order_by_streams); }

static void refuse_stream(side *s, const tprpc_stream *streams, size_t count, tprpc_status status, const char *text) {
    tprpc_message message = text_of("x");
    tprpc_call_options options = {0};
    tprpc_error error = {0};
    tprpc_future future;
    tprpc_method_id id;
    options.streams = streams;
    options.stream_count = count;
    options.error = &error;
    message.release = count_release;
    REQUIRE_EQ_INT(tprpc_resolve(s->agent, "bob", "where", &id, NULL), TPRPC_OK);
    for (int i = 0; i < 2; i++) {
        STORE(&shared->released, 0);
        memset(&error, 0, sizeof error);
        CHECK_EQ_INT(i ? tprpc_call_id(s->agent, id, &message, &options, &future)
                       : tprpc_call(s->agent, "bob", "where", &message, &options, &future), status);
        CHECK_EQ_INT(LOAD(&shared->released), 1);
        CHECK_CONTAINS(error.text, text);
        CHECK(future.id == 0);
    }
}

static void refuse_streams(side *s) {
    tprpc_stream streams[2];
    memset(streams, 0, sizeof streams);
    streams[0].device = toy_device(0);
    streams[1].device = device_of(99, 0);
    refuse_stream(s, streams, 2, TPRPC_ERROR_UNSUPPORTED, "streams[1] is of device kind 99");
    streams[1].device = cpu();
    refuse_stream(s, streams, 2, TPRPC_ERROR_UNSUPPORTED, "streams[1] is of device kind 1");
    streams[1].device = toy_device(7);
    refuse_stream(s, streams, 2, TPRPC_ERROR_INVALID, "streams[1] is device 7 of kind 64");
    streams[1].device = toy_device(0);
    refuse_stream(s, streams, 2, TPRPC_ERROR_INVALID, "streams[0] and [1] are of one device");
    refuse_stream(s, NULL, 1, TPRPC_ERROR_INVALID, "streams is NULL");
    CHECK_EQ_INT(stats_of(s).calls, 0);
    CHECK_EQ_INT(call_and_wait(s, "bob", "where", NULL, NULL, NULL), TPRPC_OK);
}
IN_MODES(bad_streams, INSIDE_MODES) { group_with(with, NULL, refuse_streams); }

/* Without a converter both are refused by name, not ignored. */
static void refuse_here(side *s) {
    tprpc_stream stream = {{TPRPC_CUDA, 0}, NULL};
    tprpc_device from = {TPRPC_CUDA, 0};
    tprpc_error error = {0};
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    refuse_stream(s, &stream, 1, TPRPC_ERROR_UNSUPPORTED, "device kind 2");
    desc.name = "lone";
    desc.context = s->ctx;
    desc.init_method = "tcp://127.0.0.1:1";
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_set_device_map(agent, NULL, &from, &from, 1, &error), TPRPC_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(error.text, "device kind 2");
    from.kind = TPRPC_CPU;
    CHECK_EQ_INT(tprpc_agent_set_device_map(agent, NULL, &from, &from, 1, &error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
}

IN_MODES(no_converter, INSIDE_MODES) {
    side sides[2] = {{0}};
    for (int i = 0; i < 2; i++) sides[i].methods = methods;
    sides[0].mode = with;
    sides[0].main = refuse_here;
    group_run(sides, 2);
}
