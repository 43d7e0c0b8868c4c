/* A method whose requests are kept, in this process, until another method answers them. After agent_help.h. */
#ifndef AGENT_HOLD_H
#define AGENT_HOLD_H

static tprpc_request kept[64];
static int kept_count;

static void on_hold(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    REQUIRE(kept_count < 64);
    kept[kept_count++] = request;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->seen, 1);
}

#endif
