/* Where an agent can be reached: the interface or address that it was told to publish, and IPv6. */
#include "agent_help.h"
#include <net/if.h>

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static const tprpc_method_desc methods[] = {{"echo", on_echo, NULL, NULL, NULL, 0}, {0}};

/* Whether an agent with that address starts; alone, with a store of its context's. */
static tprpc_status start_at(const char *address, bool insecure, tprpc_error *error) {
    tprpc_context_desc context = {0};
    tprpc_agent_desc desc = {0};
    tprpc_store_desc store_desc = {0};
    tprpc_store *store = NULL;
    tprpc_context *ctx = NULL;
    tprpc_agent *agent = NULL;
    heap h = {0};
    const int fds = test_count_fds();
    context.allocator.alloc = heap_alloc;
    context.allocator.free = heap_free;
    context.allocator.user = &h;
    context.transports = "tcp";
    store_desc.url = "local://";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &store_desc, &store, NULL), TPRPC_OK);
    desc.context = ctx;
    desc.name = "ann";
    desc.store = store;
    desc.address = address;
    desc.insecure = insecure;
    memset(error, 0, sizeof *error);
    tprpc_status status = tprpc_agent_create(&desc, &agent, error);
    if (status == TPRPC_OK) status = tprpc_agent_start(agent, NULL, NULL, error);
    if (status == TPRPC_OK) CHECK_EQ_INT(tprpc_agent_wait_ready(agent, WAIT_MS, error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    tprpc_store_close(store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(h.blocks, 0);
    CHECK_EQ_INT(test_count_fds(), fds);
    if (status != TPRPC_OK) fprintf(stderr, "%s: %s\n", address ? address : "-", error->text);
    return status;
}

TEST(addresses_that_are_none) {
    static const char *const none[] = {"nothing0", "no.such.host.invalid", "300.1.1.1", "[::1", "lo:", " "};
    tprpc_error error;
    char name[300];
    for (size_t i = 0; i < sizeof none / sizeof none[0]; i++)
        for (int insecure = 0; insecure < 2; insecure++) {
            CHECK_EQ_INT(start_at(none[i], insecure, &error), TPRPC_ERROR_INVALID);
            CHECK_CONTAINS(error.text, none[i]);
        }
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = 0;
    CHECK_EQ_INT(start_at(name, true, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(start_at("lo", false, &error), TPRPC_OK);
    CHECK_EQ_INT(start_at("127.0.0.1", false, &error), TPRPC_OK);
    CHECK_EQ_INT(start_at("127.9.8.7", false, &error), TPRPC_OK);
    CHECK_EQ_INT(start_at("::1", false, &error), TPRPC_OK);
    CHECK(start_at("192.0.2.1", true, &error) > TPRPC_PENDING);   /* of documents, and nobody's */
    CHECK_CONTAINS(error.text, "192.0.2.1");
    CHECK_EQ_INT(start_at("192.0.2.1", false, &error), TPRPC_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(error.text, "192.0.2.1");
    CHECK_CONTAINS(error.text, "secret");
    CHECK_CONTAINS(error.text, "insecure");
}

/* ---- a store without a host does not say where this worker can be reached ---- */

static void finish_stored(void *user, tprpc_store_op *op, const tprpc_store_request *request) {
    (void)user;
    tprpc_store_finish(op, TPRPC_OK, request->value, request->value_size, NULL);
}

static void nothing_to_cancel(void *user, tprpc_store_op *op) { (void)user, (void)op; }

/* init_method NULL: a user's store, in which a key holds what was set last. Alone, so the group is ready at once. */
static tprpc_status start_without_host(const char *init_method, const char *address, bool insecure,
                                       tprpc_error *error) {
    static const tprpc_store_table table = {sizeof table, finish_stored, nothing_to_cancel, NULL};
    tprpc_context *ctx = NULL;
    tprpc_agent *agent = NULL;
    tprpc_agent_desc desc = {0};
    tprpc_store_desc store = {0};
    REQUIRE_EQ_INT(tprpc_context_create(NULL, &ctx, NULL), TPRPC_OK);
    store.table = &table;
    if (!init_method) REQUIRE_EQ_INT(tprpc_store_open(ctx, &store, &desc.store, NULL), TPRPC_OK);
    desc.context = ctx;
    desc.name = "ann";
    desc.init_method = init_method;
    desc.address = address;
    desc.insecure = insecure;
    memset(error, 0, sizeof *error);
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    tprpc_status status = tprpc_agent_start(agent, NULL, NULL, error);
    if (status == TPRPC_OK) CHECK_EQ_INT(tprpc_agent_wait_ready(agent, WAIT_MS, error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    tprpc_store_close(desc.store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    if (status != TPRPC_OK) fprintf(stderr, "%s\n", error->text);
    return status;
}

TEST(an_insecure_group_without_a_host_names_its_address) {
    char path[256], url[300];
    tprpc_error error;
    snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
    for (int users = 0; users < 2; users++) {
        const char *method = users ? NULL : url;
        CHECK_EQ_INT(start_without_host(method, NULL, true, &error), TPRPC_ERROR_INVALID);
        CHECK_CONTAINS(error.text, "`address`");
        CHECK_CONTAINS(error.text, users ? "(the user's)" : url);
        CHECK_EQ_INT(start_without_host(method, "lo", true, &error), TPRPC_OK);
        unlink(path);
        CHECK_EQ_INT(start_without_host(method, NULL, false, &error), TPRPC_OK);
    }
    CHECK_EQ_INT(start_at(NULL, true, &error), TPRPC_OK);   /* local:// is within one process, whatever is allowed */
}

/* ---- between network namespaces that two pairs of veth join ---- */

static int run(const char *format, ...) {
    char command[500];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    return system(command);
}

static char space[2][32], store_host[2][20], other_host[2][20], other_name[2][IFNAMSIZ], store_url[64];
static bool by_name;

static void enter(const char *name) {
    char path[100];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    REQUIRE(fd >= 0 && setns(fd, 0) == 0);
    close(fd);
}

static void other_interface(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    enter(space[s->rank]);
    agent->insecure = true;
    agent->address = by_name ? other_name[s->rank] : other_host[s->rank];
}

static void see_where(side *s) {
    tprpc_pipe_info info;
    for (int i = 0; i < 20; i++) CHECK_EQ_INT(call_and_wait(s, s->rank ? "ann" : "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, s->rank ? "ann" : "bob", &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "tcp");
    CHECK_CONTAINS(info.peer, other_host[!s->rank]);
}

static void refused(void *arg) {
    tprpc_error error;
    (void)arg;
    enter(space[0]);
    for (int i = 0; i < 2; i++) {
        const char *address = i ? other_name[0] : other_host[0];
        CHECK_EQ_INT(start_at(address, false, &error), TPRPC_ERROR_UNSUPPORTED);
        CHECK_CONTAINS(error.text, other_host[0]);
        CHECK_CONTAINS(error.text, "secret");
        CHECK_CONTAINS(error.text, "insecure");
        CHECK_EQ_INT(start_at(address, true, &error), TPRPC_OK);
    }
    CHECK_EQ_INT(start_at("nothing0", false, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "nothing0");
}

/* In a process of its own, so that the namespaces are removed whatever becomes of it. */
static void over_the_other(void *arg) {
    side sides[2] = {{0}};
    (void)arg;
    for (int i = 0; i < 2; i++) {
        sides[i].init_method = store_url;
        sides[i].tune = other_interface;
        sides[i].main = see_where;
        sides[i].methods = methods;
    }
    sides[0].mode = &modes[0];
    group_run(sides, 2);
}

TEST(published_where_it_was_told) {
    const int id = (int)getpid() % 30000, net = id % 200 + 20;
    int failed = 0;
    if (geteuid() != 0) SKIP("needs root");
    share();
    for (int i = 0; i < 2; i++) {
        snprintf(space[i], sizeof space[i], "tprpc-%c%d", "cd"[i], id);
        snprintf(store_host[i], sizeof store_host[i], "10.233.%d.%d", net, i + 1);
        snprintf(other_host[i], sizeof other_host[i], "10.234.%d.%d", net, i + 1);
        snprintf(other_name[i], sizeof other_name[i], "to%c%d", "ab"[i], id);
        failed |= run("ip netns add %s && ip -n %s link set lo up", space[i], space[i]);
    }
    snprintf(store_url, sizeof store_url, "tcp://%s:29500", store_host[0]);
    if (!failed)
        failed = run("ip link add tsa%d netns %s type veth peer name tsb%d netns %s", id, space[0], id, space[1]) ||
                 run("ip link add %s netns %s type veth peer name %s netns %s", other_name[0], space[0], other_name[1],
                     space[1]);
    for (int i = 0; i < 2 && !failed; i++)
        failed = run("ip -n %s addr add %s/24 dev ts%c%d && ip -n %s link set ts%c%d up", space[i], store_host[i], "ab"[i],
                     id, space[i], "ab"[i], id) ||
                 run("ip -n %s addr add %s/24 dev %s && ip -n %s link set %s up", space[i], other_host[i], other_name[i],
                     space[i], other_name[i]);
    if (!failed) {
        CHECK_EQ_INT(test_wait_child(test_fork_run(refused, NULL), 20), 0);
        for (int i = 0; i < 2; i++) {
            by_name = i == 0;
            CHECK_EQ_INT(test_wait_child(test_fork_run(over_the_other, NULL), 50), 0);
        }
    }
    run("ip netns del %s; ip netns del %s", space[0], space[1]);
    if (failed) SKIP("network namespaces cannot be made here");
}

/* ---- IPv6 alone ---- */

static int free_port_v6(void) {
    struct sockaddr_in6 address;
    socklen_t size = sizeof address;
    memset(&address, 0, sizeof address);
    address.sin6_family = AF_INET6;
    address.sin6_addr = in6addr_loopback;
    int fd = socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0);
    REQUIRE(fd >= 0 && bind(fd, (struct sockaddr *)&address, size) == 0);
    REQUIRE(getsockname(fd, (struct sockaddr *)&address, &size) == 0);
    close(fd);
    return ntohs(address.sin6_port);
}

static void dynamic_v6(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    agent->rank = agent->world_size = 0;
    agent->serve_store = s->rank == 0;
}

static void call_v6(side *s) {
    tprpc_pipe_info info;
    const char *peer = s->rank ? "ann" : "bob";
    tprpc_message message = text_of("six");
    if (!s->world || s->tune) {        /* a dynamic group: both are there before either calls */
        ADD(&shared->ready, 1);
        CHECK(until(s, &shared->ready, 2));
    }
    for (int i = 0; i < 50; i++) CHECK_EQ_INT(call_and_wait(s, peer, "echo", &message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, peer, &info, sizeof info), TPRPC_OK);
    if (s->mode->transports && strcmp(s->mode->transports, "tcp") == 0) CHECK_CONTAINS(info.peer, "[::1]:");
    if (!s->world || s->tune) {        /* and neither leaves while the other calls */
        ADD(&shared->ready, 1);
        CHECK(until(s, &shared->ready, 4));
    }
    if (s->rank == 0 && s->tune) CHECK(until(s, &shared->count[0], 1));   /* it serves the store: bob leaves first */
    if (s->rank == 1 && s->tune) {
        side_leave(s);
        ADD(&shared->count[0], 1);
    }
}

static void group_v6(const mode *with, void (*tune)(side *, tprpc_context_desc *, tprpc_agent_desc *)) {
    side sides[2] = {{0}};
    char url[64];
    snprintf(url, sizeof url, "tcp://[::1]:%d", free_port_v6());
    for (int i = 0; i < 2; i++) {
        sides[i].init_method = url;
        sides[i].methods = methods;
        sides[i].main = call_v6;
        sides[i].tune = tune;
    }
    sides[1].no_leave = tune != NULL;
    sides[0].mode = with;
    group_run(sides, 2);
}
IN_MODES(static_v6, 0x5b) { group_v6(with, NULL); }
IN_MODES(dynamic_v6, 0x5b) { group_v6(with, dynamic_v6); }
