/* Misuse where assertions are off, as in a release build: NULL, handles that are none and numbers out of range, to
   every public function. Each says INVALID or does nothing; DLPack's two are tried so in in_dlpack.c. */
#include "harness.h"
#define TPRPC_STATIC
#define TPRPC_TEST_HOOKS
#define TPRPC_ASSERT(condition) ((void)0)
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"

#define INVALID(call) CHECK_EQ_INT((call), TPRPC_ERROR_INVALID)

static int released, ran;
static void on_release(void *user) { (void)user, released++; }
static void never(tprpc_work *work) { (void)work, ran++; }
static void never_accepted(tprpc_status s, tprpc_pipe *p, const tprpc_error *e, void *u) {
    (void)s, (void)p, (void)e, (void)u;
}
static void never_described(tprpc_status s, const tprpc_message *m, const tprpc_error *e, void *u) {
    (void)s, (void)m, (void)e, (void)u;
}
static void handler(tprpc_request r, const tprpc_message *m, void *user) { (void)r, (void)m, (void)user; }

static tprpc_context *new_context(void) {
    tprpc_context *ctx = NULL;
    REQUIRE(tprpc_context_create(NULL, &ctx, NULL) == TPRPC_OK);
    return ctx;
}

TEST(contexts) {
    static const tprpc_backend *const none[] = {NULL};
    tprpc_context *ctx = NULL;
    tprpc_context_desc desc;
    tprpc_error error;
    int64_t deadline = 0;
    CHECK_EQ_INT(tprpc_version(), TPRPC_VERSION);
    CHECK_STR(tprpc_status_name(TPRPC_OK), "ok");
    CHECK(tprpc_status_name((tprpc_status)-1) && tprpc_status_name((tprpc_status)999));
    CHECK_EQ_INT(tprpc_dtype_size(-1), 0);
    CHECK_EQ_INT(tprpc_dtype_size(INT32_MAX), 0);
    CHECK_EQ_INT(tprpc_error_set(NULL, TPRPC_ERROR_PEER, 0, "text"), TPRPC_ERROR_PEER);
    INVALID(tprpc_context_create(NULL, NULL, NULL));
    INVALID(tprpc_context_create_for(NULL, 1, TPRPC_VERSION, &ctx, &error));
    INVALID(tprpc_context_create_for(NULL, sizeof desc, TPRPC_VERSION + 100, &ctx, NULL));
    for (int i = 0; i < 6; i++) {
        memset(&desc, 0, sizeof desc);
        if (i < 2) desc.threads = i ? INT32_MAX : -1;
        if (i == 2) desc.allocator.alloc = tpr_base_default_alloc;
        if (i == 3) desc.backend_count = 1;
        if (i == 4) desc.backends = none, desc.backend_count = 1;
        if (i == 5) desc.transports = "none";
        INVALID(tprpc_context_create(&desc, &ctx, &error));
        CHECK(!ctx);
    }
    CHECK_EQ_INT(tprpc_context_destroy(NULL), TPRPC_OK);
    CHECK(!tprpc_poll(NULL, TPRPC_FOREVER, 0));
    tprpc_wake(NULL);
    tprpc_context_bind_thread(NULL);
    CHECK_EQ_INT(tprpc_context_handle(NULL), -1);
    CHECK(tprpc_context_arm(NULL, &deadline));
    CHECK(tprpc_context_arm(NULL, NULL));
    ctx = new_context();
    CHECK(!tprpc_poll(ctx, -99, -99));
    tprpc_context_arm(ctx, NULL);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(what_backends_call) {
    static const size_t aligns[] = {0, 3, 8192, SIZE_MAX};
    tprpc_context *ctx = new_context();
    tprpc_work work, before;
    tprpc_backend_info info;
    uint8_t bytes[8] = {0};
    memset(&work, 0, sizeof work);
    tprpc_defer(NULL, &work);
    tprpc_defer(ctx, NULL);
    tprpc_defer_at(NULL, &work, 0);
    tprpc_defer_at(ctx, NULL, 0);
    tprpc_defer(ctx, &work);           /* no run */
    tprpc_defer_at(ctx, &work, 7);
    work.run = never;
    work.loop = 1;                     /* there is one loop, 0 */
    before = work;
    tprpc_defer(ctx, &work);
    tprpc_defer_at(ctx, &work, 7);
    CHECK_MEM(&work, &before, sizeof work);
    for (int i = 0; i < 10; i++) tprpc_poll(ctx, 0, 0);
    CHECK_EQ_INT(ran, 0);
    CHECK_EQ_INT(tprpc_now_us(NULL), 0);
    CHECK(!tprpc_alloc(NULL, 64, 64, 0));
    CHECK(!tprpc_alloc(ctx, SIZE_MAX, 64, 0));
    for (size_t i = 0; i < sizeof aligns / sizeof aligns[0]; i++) CHECK(!tprpc_alloc(ctx, 64, aligns[i], 0));
    tprpc_free(NULL, bytes, sizeof bytes, 0);
    tprpc_free(NULL, NULL, 0, 0);
    tprpc_free(ctx, NULL, 0, 0);
    tprpc_log_text(NULL, TPRPC_LOG_ERROR, "section", "text");
    tprpc_log_text(ctx, TPRPC_LOG_ERROR, NULL, "text");
    tprpc_log_text(ctx, TPRPC_LOG_ERROR, "section", NULL);
    tprpc_log_text(ctx, -1, "section", "text");
    tprpc_log_text(ctx, INT32_MAX, "section", "text");
    INVALID(tprpc_link_control(NULL, bytes, sizeof bytes, NULL, 0));
    INVALID(tprpc_link_bulk(NULL, 1, 0, bytes, sizeof bytes, &work));
    CHECK(!tprpc_link_handles(NULL));
    CHECK_EQ_INT(tprpc_link_process(NULL), 0);
    tprpc_link_explain(NULL, "why");
    CHECK_EQ_INT(tprpc_context_get_backends(NULL, &info, 1, sizeof info), 0);
    CHECK_EQ_INT(tprpc_context_get_backends(ctx, NULL, 1, sizeof info), 0);
    CHECK_EQ_INT(tprpc_context_get_backends(ctx, &info, 1, sizeof info - 1), 0);
    tprpc_transfer_done(NULL, TPRPC_OK, NULL);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* A link whose functions must not be reached. */
TEST(links) {
    tprpc_link link;
    tprpc_work work;
    tpr_channel_transfer ended;
    uint8_t byte = 0;
    memset(&link, 0, sizeof link);
    memset(&work, 0, sizeof work);
    memset(&ended, 0, sizeof ended);
    INVALID(tprpc_link_control(&link, NULL, 1, NULL, 0));
    INVALID(tprpc_link_control(&link, &byte, 1, NULL, 1));
    CHECK_EQ_INT(tprpc_link_control(&link, &byte, SIZE_MAX, NULL, 0), TPRPC_ERROR_LIMIT);
    INVALID(tprpc_link_bulk(&link, 1, 0, &byte, 1, NULL));
    INVALID(tprpc_link_bulk(&link, 1, 0, &byte, 1, &work));   /* no run */
    work.run = never;
    INVALID(tprpc_link_bulk(&link, 1, 0, NULL, 1, &work));
    tprpc_transfer_done(&ended.base, TPRPC_OK, NULL);         /* for the second time */
    CHECK_EQ_INT(ran, 0);
}

/* ---- pipes ---- */

typedef struct ends { tprpc_pipe *accepted; int described, reads; } ends;

static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    (void)error;
    CHECK_EQ_INT(status, TPRPC_OK);
    ((ends *)user)->accepted = pipe;
}
static void on_described(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    (void)m, (void)error;
    CHECK_EQ_INT(status, TPRPC_OK);
    ((ends *)user)->described++;
}
static void on_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    (void)m, (void)error;
    CHECK_EQ_INT(status, TPRPC_OK);
    ((ends *)user)->reads++;
}

TEST(listeners) {
    static const char *const nothing[] = {NULL}, *const odd[] = {""};
    tprpc_context *ctx = new_context();
    tprpc_listener *listener = NULL;
    tprpc_listener_desc desc = {0};
    tprpc_pipe_desc to = {0};
    tprpc_pipe *pipe = NULL;
    tprpc_error error;
    INVALID(tprpc_listen(NULL, &desc, &listener, &error));
    INVALID(tprpc_listen(ctx, NULL, &listener, NULL));
    INVALID(tprpc_listen(ctx, &desc, NULL, &error));
    INVALID(tprpc_listen(ctx, &desc, &listener, &error));
    desc.address_count = 1;
    INVALID(tprpc_listen(ctx, &desc, &listener, &error));
    desc.addresses = nothing;
    INVALID(tprpc_listen(ctx, &desc, &listener, NULL));
    desc.addresses = odd;
    INVALID(tprpc_listen(ctx, &desc, &listener, &error));
    INVALID(tprpc_accept(NULL, never_accepted, NULL));
    CHECK(!tprpc_listener_address(NULL, NULL));
    CHECK(!tprpc_listener_address(NULL, "tcp"));
    tprpc_listener_close(NULL);
    INVALID(tprpc_connect(NULL, &to, &pipe, &error));
    INVALID(tprpc_connect(ctx, NULL, &pipe, NULL));
    INVALID(tprpc_connect(ctx, &to, NULL, &error));
    INVALID(tprpc_connect(ctx, &to, &pipe, &error));
    INVALID(tprpc_connect(ctx, &to, &pipe, NULL));
    to.address = "tcp";
    INVALID(tprpc_connect(ctx, &to, &pipe, &error));
    CHECK(!pipe);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* Messages that cannot be, and reads into what is not there; the pipe is as before. */
TEST(pipes) {
    static const char *const addresses[] = {"tcp://127.0.0.1:0"};
    tprpc_context *ctx = new_context();
    tprpc_listener *listener = NULL;
    tprpc_listener_desc desc = {0};
    tprpc_pipe_desc to = {0};
    tprpc_pipe *pipe = NULL;
    tprpc_pipe_info info;
    uint8_t bytes[64] = {0}, in[64];
    tprpc_tensor tensor = {0}, bad;
    tprpc_payload payload = {bytes, sizeof bytes, NULL, 0}, no_payload = {NULL, 1, NULL, 0};
    tprpc_message m = {0}, wrong;
    ends e = {0};
    INVALID(tprpc_pipe_write(NULL, NULL, NULL, NULL));
    m.release = on_release;
    INVALID(tprpc_pipe_write(NULL, &m, NULL, NULL));
    CHECK_EQ_INT(released, 1);
    INVALID(tprpc_pipe_read_descriptor(NULL, never_described, NULL));
    INVALID(tprpc_pipe_read(NULL, NULL, never_described, NULL));
    tprpc_pipe_close(NULL);
    INVALID(tprpc_pipe_get_info(NULL, &info, sizeof info));
    desc.addresses = addresses;
    desc.address_count = 1;
    REQUIRE(tprpc_listen(ctx, &desc, &listener, NULL) == TPRPC_OK);
    INVALID(tprpc_accept(listener, NULL, NULL));
    CHECK(!tprpc_listener_address(listener, "none"));
    REQUIRE(tprpc_accept(listener, on_accepted, &e) == TPRPC_OK);
    to.address = tprpc_listener_address(listener, "tcp");
    REQUIRE(tprpc_connect(ctx, &to, &pipe, NULL) == TPRPC_OK);
    INVALID(tprpc_pipe_get_info(pipe, NULL, sizeof info));
    INVALID(tprpc_pipe_get_info(pipe, &info, 0));
    INVALID(tprpc_pipe_read_descriptor(pipe, NULL, NULL));
    INVALID(tprpc_pipe_read(pipe, &m, on_read, NULL));       /* nothing is described */
    tensor.data = bytes;
    tensor.size = sizeof bytes;
    for (int i = 0; i < 10; i++) {
        memset(&m, 0, sizeof m);
        bad = tensor;
        m.tensors = &bad;
        m.tensor_count = 1;
        if (i == 0) m.metadata_size = 1;
        if (i == 1) m.tensors = NULL;
        if (i == 2) m.payload_count = 1;
        if (i == 3) bad.data = NULL;
        if (i == 4) bad.dtype = -1;
        if (i == 5) bad.dtype = INT32_MAX;
        if (i == 6) bad.ndim = -1;
        if (i == 7) bad.ndim = TPRPC_MAX_DIMS + 1;
        if (i == 8) bad.metadata_size = 1;
        if (i == 9) m.payloads = &no_payload, m.payload_count = 1;
        INVALID(tprpc_pipe_write(pipe, &m, NULL, NULL));
    }
    memset(&m, 0, sizeof m);
    m.tensors = &tensor;
    m.payloads = &payload;
    m.tensor_count = m.payload_count = 1;
    REQUIRE(tprpc_pipe_write(pipe, &m, NULL, NULL) == TPRPC_OK);
    while (!e.accepted) tprpc_poll(ctx, 1000, 0);
    REQUIRE(tprpc_pipe_read_descriptor(e.accepted, on_described, &e) == TPRPC_OK);
    while (!e.described) tprpc_poll(ctx, 1000, 0);
    for (int i = 0; i < 6; i++) {
        wrong = m;
        bad = tensor;
        wrong.tensors = &bad;
        if (i == 0) wrong.tensor_count = 2;
        if (i == 1) wrong.tensors = NULL;
        if (i == 2) wrong.payloads = NULL;
        if (i == 3) bad.data = NULL;
        if (i == 4) bad.size = 1;
        if (i == 5) no_payload.size = sizeof bytes, wrong.payloads = &no_payload;
        INVALID(tprpc_pipe_read(e.accepted, &wrong, on_read, &e));
    }
    tensor.data = payload.data = in;
    REQUIRE(tprpc_pipe_read(e.accepted, &m, on_read, &e) == TPRPC_OK);
    while (!e.reads) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- stores ---- */

TEST(stores) {
    static const tprpc_store_table no_submit = {sizeof no_submit, NULL, NULL, NULL}, no_size = {0, NULL, NULL, NULL};
    tprpc_context *ctx = new_context();
    tprpc_store_desc desc = {0};
    tprpc_store *store = NULL;
    tprpc_store_request r = {0};
    tprpc_error error;
    char name[300], out[8];
    size_t size = sizeof out;
    INVALID(tprpc_store_open(NULL, &desc, &store, &error));
    INVALID(tprpc_store_open(ctx, NULL, &store, NULL));
    INVALID(tprpc_store_open(ctx, &desc, NULL, &error));
    INVALID(tprpc_store_open(ctx, &desc, &store, &error));
    desc.table = &no_submit;
    INVALID(tprpc_store_open(ctx, &desc, &store, &error));
    desc.table = &no_size;
    INVALID(tprpc_store_open(ctx, &desc, &store, &error));
    desc.table = NULL;
    desc.url = "none";
    INVALID(tprpc_store_open(ctx, &desc, &store, NULL));
    desc.url = "local://";
    REQUIRE(tprpc_store_open(ctx, &desc, &store, NULL) == TPRPC_OK);
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = 0;
    for (int i = 0; i < 4; i++) {
        tprpc_store *s = i ? store : NULL;
        const char *key = i == 0 ? "key" : i == 1 ? NULL : i == 2 ? "" : name;
        INVALID(tprpc_store_set(s, key, "v", 1, NULL, NULL));
        INVALID(tprpc_store_get(s, key, 0, NULL, NULL));
        INVALID(tprpc_store_add(s, key, 1, NULL, NULL));
        INVALID(tprpc_store_compare_set(s, key, NULL, 0, "v", 1, NULL, NULL));
        INVALID(tprpc_store_delete(s, key, NULL, NULL));
        r.size = sizeof r;
        r.kind = TPRPC_STORE_GET;
        r.key = key;
        INVALID(tprpc_store_wait(s, &r, 0, NULL, NULL, &error));
    }
    INVALID(tprpc_store_set(store, "key", NULL, 1, NULL, NULL));
    INVALID(tprpc_store_compare_set(store, "key", NULL, 1, "v", 1, NULL, NULL));
    INVALID(tprpc_store_compare_set(store, "key", NULL, 0, NULL, 1, NULL, NULL));
    CHECK_EQ_INT(tprpc_store_set(store, "key", "v", SIZE_MAX, NULL, NULL), TPRPC_ERROR_LIMIT);
    r.key = "key";
    INVALID(tprpc_store_wait(store, NULL, 0, NULL, NULL, NULL));
    INVALID(tprpc_store_wait(store, &r, 0, out, NULL, &error));
    r.kind = 99;
    INVALID(tprpc_store_wait(store, &r, 0, out, &size, &error));
    r.kind = TPRPC_STORE_GET;
    r.size = 0;
    INVALID(tprpc_store_wait(store, &r, 0, out, &size, &error));
    tprpc_store_finish(NULL, TPRPC_OK, NULL, 0, NULL);
    tprpc_store_close(NULL);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- agents ---- */

TEST(agents) {
    tprpc_context *ctx = new_context();
    tprpc_agent_desc desc = {0}, bad;
    tprpc_method_desc method = {0};
    tprpc_store_desc store = {0};
    tprpc_agent *agent = NULL;
    tprpc_device device = {TPRPC_CPU, -1};
    tprpc_method_id id = {UINT32_MAX, UINT32_MAX};
    tprpc_call_options options = {0};
    tprpc_message m = {0};
    tprpc_pipe_info info;
    tprpc_stats stats;
    tprpc_method_stats method_stats;
    tprpc_peer_stats peer_stats;
    char page[64];
    tprpc_future future, none[3] = {{NULL, 0}, {NULL, 7}, {NULL, UINT64_MAX}};
    tprpc_error error;
    size_t which;
    char text[16];
    store.url = "local://";
    desc.context = ctx;
    desc.name = "ann";
    INVALID(tprpc_agent_create(&desc, &agent, &error));      /* neither a store nor an init_method */
    REQUIRE(tprpc_store_open(ctx, &store, &desc.store, NULL) == TPRPC_OK);
    INVALID(tprpc_agent_create(&desc, NULL, &error));
    INVALID(tprpc_agent_create_for(NULL, sizeof desc, TPRPC_VERSION, &agent, NULL));
    INVALID(tprpc_agent_create_for(&desc, 1, TPRPC_VERSION, &agent, &error));
    INVALID(tprpc_agent_create_for(&desc, sizeof desc, -1, &agent, &error));
    for (int i = 0; i < 7; i++) {
        bad = desc;
        if (i < 2) bad.name = i ? "" : NULL;
        if (i == 2) bad.world_size = -1;
        if (i == 3) bad.world_size = INT32_MAX;
        if (i == 4) bad.rank = bad.world_size = 2;
        if (i == 5) bad.worker_threads = -1;
        if (i == 6) bad.worker_threads = INT32_MAX;
        INVALID(tprpc_agent_create(&bad, &agent, &error));
    }
    CHECK(!agent);
    REQUIRE(tprpc_agent_create(&desc, &agent, NULL) == TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(NULL), TPRPC_OK);
    INVALID(tprpc_agent_register(NULL, &method, &error));
    INVALID(tprpc_agent_register(agent, NULL, NULL));
    method.name = "m";
    INVALID(tprpc_agent_register(agent, &method, &error));   /* no handler */
    method.handler = handler;
    method.name = NULL;
    INVALID(tprpc_agent_register(agent, &method, &error));
    INVALID(tprpc_agent_unregister(NULL, "m", &error));
    INVALID(tprpc_agent_unregister(agent, NULL, NULL));
    INVALID(tprpc_agent_set_device_map(NULL, NULL, &device, &device, 1, &error));
    INVALID(tprpc_agent_set_device_map(agent, NULL, NULL, &device, 1, &error));
    INVALID(tprpc_agent_set_device_map(agent, NULL, &device, NULL, 1, NULL));
    CHECK(tprpc_agent_set_device_map(agent, NULL, &device, &device, 1, &error) > TPRPC_PENDING);
    INVALID(tprpc_agent_start(NULL, NULL, NULL, &error));
    INVALID(tprpc_agent_wait_ready(NULL, 0, &error));
    INVALID(tprpc_agent_leave(NULL, 0, NULL));
    REQUIRE(tprpc_agent_wait_ready(agent, 0, NULL) == TPRPC_OK);
    INVALID(tprpc_agent_start(agent, NULL, NULL, NULL));
    INVALID(tprpc_agent_get_stats(NULL, &stats, sizeof stats));
    INVALID(tprpc_agent_get_stats(agent, NULL, sizeof stats));
    INVALID(tprpc_agent_get_stats(agent, &stats, 1));
    INVALID(tprpc_agent_get_peer_info(NULL, "ann", &info, sizeof info));
    INVALID(tprpc_agent_get_peer_info(agent, NULL, &info, sizeof info));
    INVALID(tprpc_agent_get_peer_info(agent, "ann", NULL, sizeof info));
    INVALID(tprpc_agent_get_peer_info(agent, "ann", &info, 1));
    INVALID(tprpc_agent_get_method_stats(NULL, "m", &method_stats, sizeof method_stats));
    INVALID(tprpc_agent_get_method_stats(agent, NULL, &method_stats, sizeof method_stats));
    INVALID(tprpc_agent_get_method_stats(agent, "m", NULL, sizeof method_stats));
    INVALID(tprpc_agent_get_method_stats(agent, "m", &method_stats, 1));
    INVALID(tprpc_agent_get_peer_stats(NULL, "ann", &peer_stats, sizeof peer_stats));
    INVALID(tprpc_agent_get_peer_stats(agent, NULL, &peer_stats, sizeof peer_stats));
    INVALID(tprpc_agent_get_peer_stats(agent, "ann", NULL, sizeof peer_stats));
    INVALID(tprpc_agent_get_peer_stats(agent, "ann", &peer_stats, 1));
    CHECK_EQ_INT(tprpc_agent_get_methods(NULL, &method_stats, 1, sizeof method_stats), 0);
    CHECK_EQ_INT(tprpc_agent_get_methods(agent, NULL, 1, sizeof method_stats), 0);
    CHECK_EQ_INT(tprpc_agent_get_methods(agent, &method_stats, 1, 1), 0);
    CHECK_EQ_INT(tprpc_agent_get_peers(NULL, &peer_stats, 1, sizeof peer_stats), 0);
    CHECK_EQ_INT(tprpc_agent_get_peers(agent, NULL, 1, sizeof peer_stats), 0);
    CHECK_EQ_INT(tprpc_agent_get_peers(agent, &peer_stats, 1, 1), 0);
    CHECK_EQ_INT(tprpc_agent_prometheus(NULL, page, sizeof page), 0);
    tprpc_agent_each_metric(NULL, NULL, NULL);
    tprpc_agent_each_metric(agent, NULL, NULL);
    m.release = on_release;
    options.error = &error;
    INVALID(tprpc_call(NULL, "ann", "m", &m, &options, &future));
    CHECK(!future.owner && !future.id);
    INVALID(tprpc_call(agent, NULL, "m", &m, NULL, NULL));
    INVALID(tprpc_call(agent, "ann", NULL, &m, NULL, NULL));
    INVALID(tprpc_call_id(NULL, id, &m, NULL, NULL));
    INVALID(tprpc_call_id(agent, id, &m, &options, &future));
    CHECK_EQ_INT(released, 5);
    m.release = NULL;
    m.metadata_size = 1;
    INVALID(tprpc_call(agent, "ann", "m", &m, NULL, NULL));
    m.metadata_size = 0;
    options.stream_count = 1;
    INVALID(tprpc_call(agent, "ann", "m", &m, &options, NULL));
    INVALID(tprpc_resolve(NULL, "ann", "m", &id, &error));
    INVALID(tprpc_resolve(agent, NULL, "m", &id, NULL));
    INVALID(tprpc_resolve(agent, "ann", NULL, &id, &error));
    INVALID(tprpc_resolve(agent, "ann", "m", NULL, &error));
    INVALID(tprpc_future_wait_any(NULL, 1, TPRPC_FOREVER, &which));
    INVALID(tprpc_future_wait_any(none, 0, TPRPC_FOREVER, NULL));
    INVALID(tprpc_future_wait_any(none, 3, TPRPC_FOREVER, NULL));
    INVALID(tprpc_future_wait_all(NULL, 1, TPRPC_FOREVER));
    INVALID(tprpc_future_wait_all(none, 3, TPRPC_FOREVER));
    CHECK_EQ_INT(tprpc_future_wait_all(NULL, 0, TPRPC_FOREVER), TPRPC_OK);
    for (int i = 0; i < 6; i++) {      /* of nobody, and of an agent that gave none such */
        tprpc_request request;
        future = none[i % 3];
        if (i >= 3) future.owner = agent;
        request.owner = future.owner;
        request.id = future.id;
        INVALID(tprpc_future_wait(future, TPRPC_FOREVER));
        CHECK(!tprpc_future_reply(future));
        INVALID(tprpc_future_error(future, &error));
        INVALID(tprpc_future_error(future, NULL));
        INVALID(tprpc_future_cancel(future));
        tprpc_future_release(future);
        m.release = on_release;
        released = 0;
        INVALID(tprpc_reply(request, &m));
        CHECK_EQ_INT(released, 1);
        INVALID(tprpc_reply(request, NULL));
        INVALID(tprpc_fail(request, 0, NULL));
        INVALID(tprpc_request_keep(request));
        CHECK(tprpc_request_cancelled(request));
        CHECK(!tprpc_request_caller(request));
        CHECK(!tprpc_request_message(request));
        CHECK(!tprpc_request_stream(request, device));
    }
    CHECK_EQ_INT(tprpc_agent_report(NULL, text, sizeof text), 0);
    CHECK_STR(text, "");
    CHECK(tprpc_agent_report(agent, NULL, 16) > 0);
    CHECK_EQ_INT(tprpc_pipe_report(NULL, text, sizeof text), 0);
    memset(&info, 0, sizeof info);
    info.path_count = UINT32_MAX;
    CHECK(tprpc_pipe_report(&info, NULL, 16) > 0);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}
