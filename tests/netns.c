/* Hosts, which network namespaces on one bridge stand for: published addresses reach each other, a link that goes away
   without a word is noticed, and a store's host may die and come back. */
#include "agent_help.h"

enum { HOSTS = 3, SILENCE_MS = 2000, NOTICED_MS = SILENCE_MS + 2000, LARGE = 1 << 20 };

/* ---- the network: a namespace that is the switch, and one for each host, whose interface is e0 ---- */

static char net_switch[32], net_space[HOSTS][32], net_host[HOSTS][48], net_url[80];
static bool net_v6;

static int run(const char *format, ...) {
    char command[1000];
    va_list args;
    va_start(args, format);
    vsnprintf(command, sizeof command, format, args);
    va_end(args);
    return system(command);
}

static void enter(const char *name) {
    char path[100];
    snprintf(path, sizeof path, "/run/netns/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    REQUIRE(fd >= 0 && setns(fd, 0) == 0);
    close(fd);
}

/* False: this machine makes no network namespaces. */
static bool net_open(bool v6) {
    const int id = (int)getpid() % 30000;
    net_v6 = v6;
    snprintf(net_switch, sizeof net_switch, "tprpc-s%d", id);
    int failed = run("ip netns add %s && ip -n %s link add br0 type bridge && ip -n %s link set br0 up", net_switch,
                     net_switch, net_switch);
    for (int i = 0; i < HOSTS && !failed; i++) {
        snprintf(net_space[i], sizeof net_space[i], "tprpc-h%d-%d", i, id);
        snprintf(net_host[i], sizeof net_host[i], v6 ? "fd00:7470:7270:63::%d" : "10.235.0.%d", i + 1);
        const char *space = net_space[i];
        failed = run("ip netns add %s && ip -n %s link add p%d type veth peer name e0 netns %s && "
                     "ip -n %s link set p%d master br0 up && ip -n %s addr add %s dev e0 %s && "
                     "ip -n %s link set e0 up && ip -n %s link set lo up",
                     space, net_switch, i, space, net_switch, i, space, net_host[i], v6 ? "nodad" : "", space, space) ||
                 run("ip -n %s route add %s dev e0", space, v6 ? "fd00:7470:7270:63::/64" : "10.235.0.0/24");
    }
    snprintf(net_url, sizeof net_url, v6 ? "tcp://[%s]:29500" : "tcp://%s:29500", net_host[0]);
    return !failed;
}

static void net_close(bool opened) {
    run("ip netns del %s", net_switch);
    for (int i = 0; i < HOSTS; i++) if (net_space[i][0]) run("ip netns del %s", net_space[i]);
    if (!opened) SKIP("network namespaces cannot be made here");
}

/* What is sent on the wire gets lost, and neither end is told. */
static void unplug(int host) { REQUIRE_EQ_INT(run("ip -n %s link set p%d nomaster", net_switch, host), 0); }
static void plug(int host) { REQUIRE_EQ_INT(run("ip -n %s link set p%d master br0", net_switch, host), 0); }

/* ---- groups of one worker per host ---- */

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static tprpc_request kept;

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    kept = request;
    ADD(&shared->handled, 1);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0}, {"keep", on_keep, NULL, NULL, NULL, 0}, {0}
};

static void at_its_host(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    enter(net_space[s->rank]);
    context->silence_ms = SILENCE_MS;
    agent->insecure = true;
}

static void group_start(side *sides, void (*in_main)(side *), bool no_leave) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    for (int i = 0; i < HOSTS; i++) {
        memset(&sides[i], 0, sizeof sides[i]);
        sides[i].name = names[i];
        sides[i].mode = &modes[0];
        sides[i].init_method = net_url;
        sides[i].rank = i;
        sides[i].world = HOSTS;
        sides[i].methods = methods;
        sides[i].tune = at_its_host;
        sides[i].main = in_main;
        sides[i].no_leave = no_leave;
        shared->pid[i] = test_fork_run(side_run, &sides[i]);
    }
}

static void group_end(void) {
    for (int i = 0; i < HOSTS; i++) CHECK_EQ_INT(test_wait_child(shared->pid[i], 40), 0);
}

/* ---- published addresses ---- */

static void call_all(side *s) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    tprpc_message message = text_of("there");
    for (int i = 0; i < 20 * HOSTS; i++)
        if (i % HOSTS != s->rank)
            CHECK_EQ_INT(call_and_wait(s, names[i % HOSTS], "echo", &message, NULL, NULL), TPRPC_OK);
    for (int i = 0; i < HOSTS; i++) {
        tprpc_pipe_info info;
        if (i == s->rank) continue;
        CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, names[i], &info, sizeof info), TPRPC_OK);
        CHECK_STR(info.transport, "tcp");
        CHECK_CONTAINS(info.peer, net_host[i]);
    }
}

static void among_hosts(bool v6) {
    side sides[HOSTS];
    if (geteuid() != 0) SKIP("needs root");
    share();
    bool opened = net_open(v6);
    if (opened) {
        group_start(sides, call_all, false);
        group_end();
    }
    net_close(opened);
}
TEST(three_hosts) { among_hosts(false); }
TEST(three_hosts_over_ipv6) { among_hosts(true); }

/* ---- a link that goes away without a word ---- */

typedef struct pending { int count; tprpc_status status; char text[244]; int64_t at_us; } pending;

static void on_ended(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    pending *p = (pending *)user;
    (void)reply;
    p->status = status;
    p->at_us = test_now_us();
    if (error) snprintf(p->text, sizeof p->text, "%s", error->text);
    ADD(&p->count, 1);
}

static void begin(side *s, pending *p, const char *worker, const char *method, const tprpc_message *message) {
    tprpc_call_options options = {0};
    options.on_done = on_ended;
    options.user = p;
    CHECK_EQ_INT(tprpc_call(s->agent, worker, method, message, &options, NULL), TPRPC_OK);
}

static void ended_in_time(side *s, pending *p, int64_t since_us) {
    CHECK(until(s, &p->count, 1));
    CHECK_EQ_INT(p->status, TPRPC_ERROR_PEER);
    CHECK_LE_INT((p->at_us - since_us) / 1000, NOTICED_MS * TEST_SLOWDOWN);
    printf("%s, after %lld ms: %s\n", s->name, (long long)((p->at_us - since_us) / 1000), p->text);
}

/* The next one, once that has ended well. */
static void again(side *s, pending *p, const char *worker, const tprpc_message *message) {
    if (!p->count || p->status != TPRPC_OK) return;
    p->count = 0;
    begin(s, p, worker, "echo", message);
}

/* Between ann and bob nothing is under way but a call each way that is not answered; between ann and cyd 1 MiB at any
   time each way. Nobody at the ends is told that the link is gone. */
static void lose_link(side *s) {
    static uint8_t bytes[LARGE];
    static const char *const idle[] = {"bob", "ann", NULL}, *const busy[] = {"cyd", NULL, "ann"};
    tprpc_tensor tensor = bytes_of(bytes, sizeof bytes);
    tprpc_message large = tensors_of(&tensor, 1);
    const char *quiet = idle[s->rank], *loud = busy[s->rank];
    pending waits = {0}, moves = {0};
    if (loud) CHECK_EQ_INT(call_and_wait(s, loud, "echo", &large, NULL, NULL), TPRPC_OK);   /* the lane is there */
    if (quiet) begin(s, &waits, quiet, "keep", NULL);
    CHECK(until(s, &shared->handled, 2));
    ADD(&shared->ready, 1);
    if (loud) begin(s, &moves, loud, "echo", &large);
    while (!LOAD(&shared->go)) {
        tprpc_poll(s->ctx, 1000, 0);
        if (loud) again(s, &moves, loud, &large);
    }
    int64_t since_us = test_now_us();
    for (int64_t end = since_us + 100000; loud && test_now_us() < end;) {   /* what had arrived is answered yet */
        tprpc_poll(s->ctx, 1000, 0);
        again(s, &moves, loud, &large);
    }
    if (quiet) ended_in_time(s, &waits, since_us);
    if (loud) ended_in_time(s, &moves, since_us);
    if (quiet) {                       /* and so did who serves */
        while (!tprpc_request_cancelled(kept) && test_now_us() - since_us < WAIT_MS * 1000) tprpc_poll(s->ctx, 1000, 0);
        CHECK(tprpc_request_cancelled(kept));
        CHECK_LE_INT((test_now_us() - since_us) / 1000, NOTICED_MS * TEST_SLOWDOWN);
        tprpc_fail(kept, 0, "");
    }
    ADD(&shared->count[0], 1);         /* nobody closes before all have noticed by themselves */
    CHECK(until(s, &shared->count[0], HOSTS));
}

static void lost_link(void (*cut)(int host)) {
    side sides[HOSTS];
    if (geteuid() != 0) SKIP("needs root");
    share();
    bool opened = net_open(false);
    if (opened) {
        group_start(sides, lose_link, true);
        if (CHECK(until(NULL, &shared->ready, HOSTS))) {
            cut(1);
            cut(2);
        }
        STORE(&shared->go, 1);
        group_end();
    }
    net_close(opened);
}

static void down(int host) { REQUIRE_EQ_INT(run("ip -n %s link set e0 down", net_space[host]), 0); }

TEST(an_unplugged_link_is_noticed) { lost_link(unplug); }
TEST(a_link_that_is_down_is_noticed) { lost_link(down); }

/* ---- a store's host that dies and comes back ---- */

static void serve_store(void *arg) {
    tprpc_context *ctx = NULL;
    tprpc_store *store = NULL;
    tprpc_store_desc desc = {0};
    (void)arg;
    enter(net_space[0]);
    desc.url = net_url;
    desc.serve = desc.insecure = true;
    REQUIRE_EQ_INT(tprpc_context_create(NULL, &ctx, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &desc, &store, NULL), TPRPC_OK);
    while (!LOAD(&shared->stop)) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void on_stored(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    (void)value; (void)size;
    on_ended(status, NULL, error, user);
}

static void use_store(void *arg) {
    tprpc_context_desc context = {0};
    tprpc_context *ctx = NULL;
    tprpc_store *store = NULL;
    tprpc_store_desc desc = {0};
    tprpc_store_request request = {0};
    side s = {0};                      /* for `until` */
    pending get = {0}, set = {0}, lost = {0};
    (void)arg;
    enter(net_space[1]);
    context.silence_ms = SILENCE_MS;
    desc.url = net_url;
    desc.insecure = true;
    s.name = "client";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_store_open(ctx, &desc, &store, NULL), TPRPC_OK);
    s.ctx = ctx;
    CHECK_EQ_INT(tprpc_store_set(store, "k", "v", 1, on_stored, &set), TPRPC_OK);
    CHECK_EQ_INT(tprpc_store_get(store, "none", TPRPC_FOREVER, on_stored, &get), TPRPC_OK);
    CHECK(until(&s, &set.count, 1));
    CHECK_EQ_INT(set.status, TPRPC_OK);
    for (int i = 0; i < 20; i++) tprpc_poll(ctx, 1000, 0);
    STORE(&shared->ready, 1);
    CHECK(until(&s, &shared->go, 1));
    ended_in_time(&s, &get, test_now_us());
    CHECK_CONTAINS(get.text, "lost its server");
    CHECK_EQ_INT(tprpc_store_set(store, "again", "v", 1, on_stored, &set), TPRPC_OK);
    for (int i = 0; i < 20; i++) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(set.count, 1);        /* it waits */
    STORE(&shared->seen, 1);
    CHECK(until(&s, &set.count, 2));
    CHECK_EQ_INT(set.status, TPRPC_OK);
    CHECK_EQ_INT(tprpc_store_get(store, "k", TPRPC_NOW, on_stored, &lost), TPRPC_OK);
    CHECK(until(&s, &lost.count, 1));
    CHECK_EQ_INT(lost.status, TPRPC_ERROR_TIMEOUT);   /* what it held went with it */
    request.size = sizeof request;
    request.kind = TPRPC_STORE_GET;
    request.key = "again";
    CHECK_EQ_INT(tprpc_store_wait(store, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    STORE(&shared->stop, 1);
}

TEST(a_store_host_dies_and_returns) {
    if (geteuid() != 0) SKIP("needs root");
    share();
    bool opened = net_open(false);
    if (opened) {
        pid_t server = test_fork_run(serve_store, NULL), client = test_fork_run(use_store, NULL);
        CHECK(until(NULL, &shared->ready, 1));
        unplug(0);                     /* a host that loses its power says nothing */
        kill(server, SIGKILL);
        CHECK_EQ_INT(test_wait_child(server, 10), 128 + SIGKILL);
        STORE(&shared->go, 1);
        CHECK(until(NULL, &shared->seen, 1));
        plug(0);
        server = test_fork_run(serve_store, NULL);
        CHECK_EQ_INT(test_wait_child(client, 40), 0);
        CHECK_EQ_INT(test_wait_child(server, 10), 0);
    }
    net_close(opened);
}
