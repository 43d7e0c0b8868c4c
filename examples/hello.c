#define TPRPC_IMPLEMENTATION
#include "tprpc.h"
#include <stdio.h>

static void on_scale(tprpc_request request, const tprpc_message *message, void *user) {
    const tprpc_tensor *x = message->tensors;
    (void)user;
    if (message->tensor_count == 1 && x->dtype == TPRPC_F32) {
        for (size_t i = 0; i < x->size / sizeof(float); i++) ((float *)x->data)[i] *= 2.0f;
        tprpc_reply(request, message);
    } else tprpc_fail(request, 1, "scale takes one F32 tensor");
}

int main(int argc, char **argv) {
    const bool client = argc > 1 && argv[1][0] == 'c';
    tprpc_error error = {0};
    tprpc_agent *agent = NULL;
    tprpc_agent_desc desc = {.name = client ? "client" : "server", .init_method = "tcp://127.0.0.1:29500",
                             .rank = client, .world_size = 2};
    tprpc_method_desc scale = {.name = "scale", .handler = on_scale};
    bool good = !tprpc_agent_create(&desc, &agent, &error) && !tprpc_agent_register(agent, &scale, &error) &&
                !tprpc_agent_wait_ready(agent, 60000, &error);
    if (good && client) {
        float x[4] = {1, 2, 3, 4};
        tprpc_tensor tensor = {.data = x, .size = sizeof x, .dtype = TPRPC_F32, .ndim = 1, .shape = {4}};
        tprpc_message message = {.tensors = &tensor, .tensor_count = 1};
        tprpc_call_options options = {.error = &error};
        tprpc_future future;
        if (!tprpc_call(agent, "server", "scale", &message, &options, &future) &&
            !tprpc_future_wait(future, TPRPC_FOREVER))
            printf("%g\n", (double)((const float *)tprpc_future_reply(future)->tensors[0].data)[3]);
        else if (!error.status) tprpc_future_error(future, &error);
        tprpc_future_release(future);
    }
    if (good) tprpc_agent_leave(agent, 10000, &error);
    if (error.status) fprintf(stderr, "%s\n", error.text);
    tprpc_agent_destroy(agent);
    return error.status != TPRPC_OK;
}
