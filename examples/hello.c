#define TPRPC_IMPLEMENTATION
#include "tprpc.h"
#include <stdio.h>

static void on_scale(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    if (message->tensor_count != 1 || message->tensors[0].dtype != TPRPC_F32) {
        tprpc_fail(request, 1, "scale takes one F32 tensor");
        return;
    }
    float *x = (float *)message->tensors[0].data;
    for (size_t i = 0; i < message->tensors[0].size / sizeof *x; i++) x[i] *= 2.0f;
    tprpc_reply(request, message);
}

int main(int argc, char **argv) {
    const bool client = argc > 1 && argv[1][0] == 'c';
    tprpc_error error = {0};
    tprpc_agent *agent = NULL;
    tprpc_agent_desc desc = {.name = client ? "client" : "server", .init_method = "tcp://127.0.0.1:29500",
                             .rank = client, .world_size = 2};
    tprpc_method_desc scale = {.name = "scale", .handler = on_scale};
    if (tprpc_agent_create(&desc, &agent, &error) || tprpc_agent_register(agent, &scale, &error) ||
        tprpc_agent_wait_ready(agent, 60000, &error)) return fprintf(stderr, "%s\n", error.text), 1;
    if (client) {
        float x[4] = {1, 2, 3, 4};
        tprpc_tensor tensor = {.data = x, .size = sizeof x, .dtype = TPRPC_F32, .ndim = 1, .shape = {4}};
        tprpc_message message = {.tensors = &tensor, .tensor_count = 1};
        tprpc_future future;
        tprpc_status status = tprpc_call(agent, "server", "scale", &message, NULL, &future);
        if (status != TPRPC_OK) return fprintf(stderr, "%s\n", tprpc_status_name(status)), 1;
        if (tprpc_future_wait(future, TPRPC_FOREVER) == TPRPC_OK)
            printf("%g\n", (double)((const float *)tprpc_future_reply(future)->tensors[0].data)[3]);
        else if (tprpc_future_error(future, &error)) fprintf(stderr, "%s\n", error.text);
        tprpc_future_release(future);
    }
    tprpc_agent_leave(agent, 10000, &error);
    tprpc_agent_destroy(agent);
    return error.status != TPRPC_OK;
}
