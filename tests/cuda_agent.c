/* Calls that carry GPU memory: the device map there and back, streams, tensors kept beyond the handler, agents in one
   process and in several. */
#include "agent_help.h"
#define GPU_HOLDS filled
#define GPU_SEED unsigned
#include "cuda_gpu.h"

enum { SIZE = 300000 };

static int last(void) { return gpu.count > 1 ? 1 : 0; }

static void with_cuda(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    if (!gpu.count) gpu_load();
    context->backends = tprpc_cuda_backends(&context->backend_count);
}

/* Answers with what it got, changed in the order of the call's stream, to where it came from. */
static void on_change(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensors[2];
    memset(tensors, 0, sizeof tensors);
    tprpc_message reply = tensors_of(tensors, message->tensor_count);
    (void)user;
    REQUIRE_LE_INT(message->tensor_count, 2);
    for (size_t i = 0; i < message->tensor_count; i++) {
        tensors[i] = message->tensors[i];
        tensors[i].target = gpu_device(0);
        const tprpc_tensor *t = &message->tensors[i];
        CHECK_EQ_INT(t->device.kind, TPRPC_CUDA);
        CHECK_EQ_INT(t->device.index, last());
        CHECK(t->stream && t->stream == tprpc_request_stream(request, t->device));
        CHECK(gpu_matches(t->device.index, (CUstream)t->stream, t->data, t->size, i));
        gpu_put(t->device.index, (CUstream)t->stream, t->data, t->size, i + 10);
    }
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static void map(side *s, int from, int to) {
    const tprpc_device a = gpu_device(from), b = gpu_device(to);
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, NULL, &a, &b, 1, NULL), TPRPC_OK);
}

static const tprpc_method_desc methods[] = {{"change", on_change, NULL, NULL, NULL, 0}, {0}};

static void two(const mode *with, void (*first)(side *)) {
    side sides[2] = {{0}};
    group g;
    share();
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].tune = with_cuda;
    }
    sides[0].mode = with;
    if (!with->processes) gpu_load();      /* before there are threads */
    group_open(&g, sides, 2);
    if (with->processes) shared->pid[1] = test_fork_run(side_run, &sides[1]);
    else REQUIRE_EQ_INT(pthread_create(&sides[1].self, NULL, side_thread, &sides[1]), 0);
    side_open(&sides[0]);
    map(&sides[0], 0, last());
    side_join(&sides[0]);
    first(&sides[0]);
    side_leave(&sides[0]);
    side_close(&sides[0]);
    if (with->processes) CHECK_EQ_INT(test_wait_child(shared->pid[1], 40), 0);
    else pthread_join(sides[1].self, NULL);
    group_close(&g);
}

/* The channel that this GPU's tensors take, and the report tells of it. */
static void check_channel(side *s) {
    tprpc_pipe_info info;
    char report[4000], line[80];
    const char *name = "";
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info), TPRPC_OK);
    for (uint32_t i = 0; i < info.path_count; i++)
        if (info.paths[i].carries & TPRPC_PATH_DEVICE_TO_DEVICE) name = info.paths[i].name;
    CHECK_STR(name, !s->mode->processes ? "cuda_xth" : strcmp(info.transport, "shm") == 0 ? "cuda_ipc" : "cuda_basic");
    snprintf(line, sizeof line, "    %s, tensors of device kind 2: to devices", name);
    tprpc_agent_report(s->agent, report, sizeof report);
    CHECK_CONTAINS(report, line);
}

static void ask(side *s) {
    CUstream stream = gpu_stream(0), replies = gpu_stream(0);
    for (int round = 0; round < 6; round++) {
        tprpc_tensor tensors[2];
        tprpc_message message = tensors_of(tensors, 2);
        tprpc_call_options options = {0};
        tprpc_error error = {0};
        tprpc_stream streams;
        tprpc_future future;
        const bool lent = round % 2 != 0;
        memset(tensors, 0, sizeof tensors);
        STORE(&shared->released, 0);
        for (unsigned i = 0; i < 2; i++) {
            tensors[i].size = i ? SIZE : 8;
            tensors[i].data = gpu_alloc(0, tensors[i].size);
            tensors[i].device = gpu_device(0);
            tensors[i].stream = stream;
            gpu_put(0, stream, tensors[i].data, tensors[i].size, i);
        }
        if (lent) message.release = count_release;
        streams.device = gpu_device(0);
        streams.stream = replies;
        options.streams = &streams;
        options.stream_count = round > 2 ? 1 : 0;
        options.error = &error;
        REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "change", &message, &options, &future), TPRPC_OK);
        if (!lent)                         /* they were copied, in the order of their stream */
            for (int i = 0; i < 2; i++) gpu_set(0, stream, tensors[i].data, 0, tensors[i].size);
        if (CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK)) {
            const tprpc_message *reply = tprpc_future_reply(future);
            CHECK_EQ_INT(reply->tensor_count, 2);
            for (unsigned i = 0; i < 2; i++) {
                const tprpc_tensor *t = &reply->tensors[i];
                CHECK_EQ_INT(t->device.kind, TPRPC_CUDA);
                CHECK_EQ_INT(t->device.index, 0);
                CHECK(round > 2 ? t->stream == replies : t->stream != NULL);
                CHECK(gpu_matches(0, (CUstream)t->stream, t->data, t->size, i + 10));
            }
        } else {
            tprpc_future_error(future, &error);
            fprintf(stderr, "%s\n", error.text);
        }
        tprpc_future_release(future);
        if (lent) CHECK(until_released(s, 1));
        CU(cuStreamSynchronize(stream));
        for (int i = 0; i < 2; i++) gpu_free(0, tensors[i].data);
    }
    check_channel(s);
}

IN_MODES(there_and_back, 0x7f) { two(with, ask); }
