/* Who is in a group: lookups, the ids of dynamic groups, removal, the members' lock and those who die with it, groups
   of two kinds in one store, entries that are another's. */
#include "agent_help.h"

static void on_who(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_message reply = text_of(((side *)user)->name);
    (void)message;
    tprpc_reply(request, &reply);
}

static const tprpc_method_desc methods[] = {{"who", on_who, NULL, NULL, NULL, 0}, {0}};

static tprpc_worker_info info_of(side *s, const char *name) {
    tprpc_worker_info info;
    tprpc_error error = {0};
    memset(&info, 0xee, sizeof info);
    if (!CHECK_EQ_INT(tprpc_agent_get_worker(s->agent, name, WAIT_MS, &info, sizeof info, &error), TPRPC_OK))
        fprintf(stderr, "%s looks for %s: %s\n", s->name, name ? name : "itself", error.text);
    return info;
}

/* ---- a static group: all are known */

static void look_around(side *s) {
    static const char *const names[] = {"ann", "bob", "cyd"};
    tprpc_worker_info all[4], info;
    tprpc_method_id id;
    tprpc_error error = {0};
    size_t count = 4;
    bool seen[3] = {false, false, false};
    info = info_of(s, NULL);
    CHECK_STR(info.name, s->name);
    CHECK_EQ_INT(info.id, s->rank);
    CHECK_EQ_INT(info.state, TPRPC_WORKER_SELF);
    CHECK_EQ_INT(info.process, getpid());
    CHECK(info.url_count >= 1 && strstr(info.urls[0], "://"));
    CHECK(until(s, &shared->ready, s->rank));   /* one after the other, so that states are known */
    const int other = (s->rank + 1) % 3;
    info = info_of(s, names[other]);
    CHECK_EQ_INT(info.id, other);
    CHECK_EQ_INT(info.state, TPRPC_WORKER_UNUSED);
    if (s->mode->processes) CHECK_EQ_INT(info.process, shared->pid[other]);
    CHECK_EQ_INT(call_and_wait(s, names[other], "who", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_resolve(s->agent, names[other], "who", &id, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_get_worker_by_id(s->agent, (uint32_t)other, 0, &info, sizeof info, NULL), TPRPC_OK);
    CHECK_STR(info.name, names[other]);
    CHECK_EQ_INT(info.state, TPRPC_WORKER_CONNECTED);
    CHECK_EQ_INT(info.index, id.worker);
    CHECK_EQ_INT(tprpc_agent_list_workers(s->agent, 0, all, &count, sizeof all[0], &error), TPRPC_OK);
    CHECK_EQ_INT(count, 3);
    for (size_t i = 0; i < count; i++) {
        REQUIRE(all[i].id < 3);
        CHECK_STR(all[i].name, names[all[i].id]);
        seen[all[i].id] = true;
    }
    CHECK(seen[0] && seen[1] && seen[2]);
    count = 2;
    CHECK_EQ_INT(tprpc_agent_list_workers(s->agent, 0, all, &count, sizeof all[0], &error), TPRPC_ERROR_LIMIT);
    CHECK_EQ_INT(count, 3);
    CHECK_CONTAINS(error.text, "3 workers");
    CHECK_EQ_INT(tprpc_agent_get_worker(s->agent, "dan", 0, &info, sizeof info, &error), TPRPC_ERROR_NO_WORKER);
    CHECK_CONTAINS(error.text, "dan");
    CHECK_EQ_INT(tprpc_agent_get_worker_by_id(s->agent, 3, 0, &info, sizeof info, &error), TPRPC_ERROR_NO_WORKER);
    CHECK_EQ_INT(tprpc_agent_get_worker(s->agent, "ann", 0, &info, sizeof info - 8, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_remove_worker(s->agent, names[other], 0, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "static");
    ADD(&shared->ready, 1);
}

IN_MODES(who_is_in_a_static_group, 0x31) {
    side sides[3] = {{0}};
    sides[0].mode = with;
    for (int i = 0; i < 3; i++) {
        sides[i].main = look_around;
        sides[i].methods = methods;
    }
    share();
    group_run(sides, 3);
}

/* ---- members of a dynamic group, all in this thread, at a store that stands between them and a local one: it counts,
   and holds back what the test says */

typedef struct gate {
    tprpc_store *local, *store;
    int hold_kind, hold_count;         /* the so-manieth operation of that kind, and those after it, wait at the gate */
    const char *hold_key;              /* whose key begins so */
    int operations;
    bool held;
    struct { tprpc_store_op *op; tprpc_store_request request; char key[256], value[2000], expected[2000]; } waits[8];
    int waiting;
} gate;

static tprpc_context *store_ctx;
static tprpc_store *local;

static void gate_done(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    tprpc_store_finish((tprpc_store_op *)user, status, value, size, error);
}

static void gate_pass(gate *g, tprpc_store_op *op, const tprpc_store_request *r) {
    tprpc_status status = TPRPC_ERROR_INVALID;
    switch (r->kind) {
    case TPRPC_STORE_SET: status = tprpc_store_set(g->local, r->key, r->value, r->value_size, gate_done, op); break;
    case TPRPC_STORE_GET:
        status = tprpc_store_get(g->local, r->key, r->deadline_us == TPRPC_NOW ? TPRPC_NOW : 100, gate_done, op);
        break;
    case TPRPC_STORE_ADD: status = tprpc_store_add(g->local, r->key, r->delta, gate_done, op); break;
    case TPRPC_STORE_COMPARE_SET:
        status = tprpc_store_compare_set(g->local, r->key, r->expected, r->expected_size, r->value, r->value_size,
                                         gate_done, op);
        break;
    case TPRPC_STORE_DELETE: status = tprpc_store_delete(g->local, r->key, gate_done, op); break;
    default: break;
    }
    CHECK_EQ_INT(status, TPRPC_OK);
}

static void gate_submit(void *user, tprpc_store_op *op, const tprpc_store_request *r) {
    gate *g = (gate *)user;
    ADD(&g->operations, 1);
    if (!g->held && g->hold_key && r->kind == g->hold_kind && strncmp(r->key, g->hold_key, strlen(g->hold_key)) == 0)
        g->held = --g->hold_count == 0;
    if (!g->held) {
        gate_pass(g, op, r);
        return;
    }
    REQUIRE(g->waiting < 8 && r->value_size <= sizeof g->waits[0].value);
    REQUIRE(r->expected_size <= sizeof g->waits[0].expected);
    g->waits[g->waiting].op = op;
    g->waits[g->waiting].request = *r;
    snprintf(g->waits[g->waiting].key, sizeof g->waits[0].key, "%s", r->key);
    if (r->value_size) memcpy(g->waits[g->waiting].value, r->value, r->value_size);
    if (r->expected_size) memcpy(g->waits[g->waiting].expected, r->expected, r->expected_size);
    g->waits[g->waiting].request.key = g->waits[g->waiting].key;
    g->waits[g->waiting].request.value = g->waits[g->waiting].value;
    if (r->expected) g->waits[g->waiting].request.expected = g->waits[g->waiting].expected;
    g->waiting++;
}

/* What was held goes on, much later. */
static void gate_open(gate *g) {
    g->held = false;
    g->hold_key = NULL;
    for (int i = 0; i < g->waiting; i++) gate_pass(g, g->waits[i].op, &g->waits[i].request);
    g->waiting = 0;
}

static void gate_cancel(void *user, tprpc_store_op *op) {
    gate *g = (gate *)user;
    for (int i = 0; i < g->waiting; i++) {
        if (g->waits[i].op != op) continue;
        g->waits[i] = g->waits[--g->waiting];
        tprpc_store_finish(op, TPRPC_ERROR_CANCELLED, NULL, 0, NULL);
        return;
    }
}

static const tprpc_store_table gate_table = {sizeof gate_table, gate_submit, gate_cancel, NULL};

typedef struct member { side side; gate gate; tprpc_status status; tprpc_error error; int ready; } member;
static const mode inside = {"inside", "tcp", 0, false};

/* Where a test waits for one that stands still, seconds pass in tens of milliseconds. */
static int64_t speed = 1;
static int64_t fast_clock(void *user) {
    (void)user;
    return test_now_us() * speed;
}

static void at_the_gate(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)agent;
    context->clock_us = fast_clock;
    context->spin_us = TPRPC_NOW;
    (void)s;
}

static void stores_open(void) {
    tprpc_context_desc context = {0};
    tprpc_store_desc store = {0};
    context.threads = 1;
    store.url = "local://";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &store_ctx, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_store_open(store_ctx, &store, &local, NULL), TPRPC_OK);
    share();
}

static void stores_close(void) {
    tprpc_store_close(local);
    CHECK_EQ_INT(tprpc_context_destroy(store_ctx), TPRPC_OK);
}

static void on_joined(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    member *m = (member *)user;
    (void)reply;
    m->status = status;
    if (error) m->error = *error;
    m->ready = 1;
}

static void member_open(member *m, const char *name, int world) {
    tprpc_store_desc desc = {0};
    memset(&m->side, 0, sizeof m->side);
    m->side.name = name;
    m->side.mode = &inside;
    m->side.world = world;
    m->side.methods = methods;
    m->side.tune = at_the_gate;
    m->gate.local = local;
    desc.table = &gate_table;
    desc.user = &m->gate;
    REQUIRE_EQ_INT(tprpc_store_open(store_ctx, &desc, &m->gate.store, NULL), TPRPC_OK);
    m->side.store = m->gate.store;
    m->ready = 0;
    side_open(&m->side);
    REQUIRE_EQ_INT(tprpc_agent_start(m->side.agent, on_joined, m, NULL), TPRPC_OK);
}

static bool member_ready(member *m) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (!m->ready && test_now_us() < end) tprpc_poll(m->side.ctx, 1000, 0);
    if (m->ready && m->status != TPRPC_OK) fprintf(stderr, "%s: %s\n", m->side.name, m->error.text);
    return m->ready && m->status == TPRPC_OK;
}

static void member_join(member *m, const char *name) {
    member_open(m, name, 0);
    REQUIRE(member_ready(m));
}

static void member_close(member *m) {
    side_close(&m->side);
    tprpc_store_close(m->gate.store);
}

static uint32_t id_of(member *m) { return info_of(&m->side, NULL).id; }

/* The names of all, by their ids, as one sees them: "ann bob - dan". */
static const char *list_of(member *m) {
    static char text[200];
    tprpc_worker_info all[16];
    tprpc_error error = {0};
    size_t count = 16;
    text[0] = 0;
    if (!CHECK_EQ_INT(tprpc_agent_list_workers(m->side.agent, WAIT_MS, all, &count, sizeof all[0], &error), TPRPC_OK))
        fprintf(stderr, "%s\n", error.text);
    uint32_t next = 0;
    for (size_t i = 0; i < count && i < 16; i++) {
        for (; next < all[i].id; next++) strcat(text, "- ");
        snprintf(text + strlen(text), sizeof text - strlen(text), "%.20s ", all[i].name);
        next++;
    }
    if (text[0]) text[strlen(text) - 1] = 0;
    return text;
}

TEST(ids_are_given_and_given_again) {
    static member m[5];
    static const char *const names[] = {"ann", "bob", "cyd", "dan"};
    tprpc_worker_info info;
    tprpc_error error = {0};
    stores_open();
    for (int i = 0; i < 4; i++) {
        member_join(&m[i], names[i]);
        CHECK_EQ_INT(id_of(&m[i]), i);
    }
    CHECK_STR(list_of(&m[3]), "ann bob cyd dan");
    CHECK_EQ_INT(tprpc_agent_get_worker_by_id(m[0].side.agent, 2, 0, &info, sizeof info, &error), TPRPC_OK);
    CHECK_STR(info.name, "cyd");
    CHECK_EQ_INT(info_of(&m[0].side, "dan").id, 3);
    CHECK_EQ_INT(tprpc_agent_leave(m[1].side.agent, WAIT_MS, &error), TPRPC_OK);
    CHECK_STR(list_of(&m[0]), "ann - cyd dan");
    CHECK_EQ_INT(tprpc_agent_get_worker_by_id(m[0].side.agent, 1, 0, &info, sizeof info, &error),
                 TPRPC_ERROR_NO_WORKER);
    CHECK_CONTAINS(error.text, "no worker 1");
    CHECK_EQ_INT(tprpc_agent_get_worker(m[0].side.agent, "bob", 0, &info, sizeof info, &error), TPRPC_ERROR_NO_WORKER);
    member_join(&m[4], "eve");
    CHECK_EQ_INT(id_of(&m[4]), 1);
    CHECK_STR(list_of(&m[2]), "ann eve cyd dan");
    member_close(&m[1]);
    member_join(&m[1], "bob");         /* the name comes again, with another id */
    CHECK_EQ_INT(id_of(&m[1]), 4);
    CHECK_STR(list_of(&m[2]), "ann eve cyd dan bob");
    for (int i = 0; i < 5; i++) CHECK_EQ_INT(tprpc_agent_leave(m[i].side.agent, WAIT_MS, &error), TPRPC_OK);
    for (int i = 0; i < 5; i++) member_close(&m[i]);
    stores_close();
}

TEST(a_name_is_taken_once) {
    static member m[3];
    stores_open();
    member_join(&m[0], "ann");
    member_open(&m[1], "ann", 0);
    CHECK(!member_ready(&m[1]));
    CHECK_EQ_INT(m[1].status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(m[1].error.text, "taken by worker ann");
    member_join(&m[2], "bob");         /* the refused one has left no lock and no id behind */
    CHECK_EQ_INT(id_of(&m[2]), 1);
    CHECK_STR(list_of(&m[0]), "ann bob");
    for (int i = 0; i < 3; i++) member_close(&m[i]);
    stores_close();
}

/* ---- removal */

TEST(a_removed_worker_makes_room) {
    static member m[4];
    tprpc_error error = {0};
    tprpc_worker_info info;
    stores_open();
    member_join(&m[0], "ann");
    member_join(&m[1], "bob");
    member_join(&m[2], "cyd");
    CHECK_EQ_INT(tprpc_agent_remove_worker(m[0].side.agent, "dan", 0, &error), TPRPC_ERROR_NO_WORKER);
    CHECK_CONTAINS(error.text, "dan");
    CHECK_EQ_INT(tprpc_agent_remove_worker(m[0].side.agent, "ann", 0, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_remove_worker(m[0].side.agent, "bob", 0, &error), TPRPC_OK);
    CHECK_STR(list_of(&m[2]), "ann - cyd");
    CHECK_EQ_INT(tprpc_agent_get_worker(m[2].side.agent, "bob", 0, &info, sizeof info, &error), TPRPC_ERROR_NO_WORKER);
    CHECK_EQ_INT(tprpc_agent_remove_worker(m[2].side.agent, "bob", 0, &error), TPRPC_ERROR_NO_WORKER);
    member_join(&m[3], "bob");         /* while the old one lives, and does not know */
    CHECK_EQ_INT(id_of(&m[3]), 1);
    CHECK_EQ_INT(tprpc_agent_leave(m[1].side.agent, WAIT_MS, &error), TPRPC_OK);   /* which harms nobody */
    CHECK_STR(list_of(&m[0]), "ann bob cyd");
    CHECK_EQ_INT(info_of(&m[0].side, "bob").id, 1);
    CHECK_EQ_INT(tprpc_agent_leave(m[3].side.agent, WAIT_MS, &error), TPRPC_OK);
    CHECK_STR(list_of(&m[0]), "ann - cyd");
    for (int i = 0; i < 4; i++) member_close(&m[i]);
    stores_close();
}

static void dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)context;
    agent->world_size = 0;
    if (s->rank) CHECK(until(NULL, &shared->go, s->rank));   /* so that ids are known */
}

static void serve_until_killed(side *s) {
    ADD(&shared->ready, 1);
    if (s->user) for (;;) tprpc_poll(s->ctx, 10000, 0);
    CHECK(until(s, &shared->stop, 1));
}

static char url[300];

static void new_bob(void *arg) {
    side s = {0};
    s.name = "bob";
    s.mode = (const mode *)arg;
    s.methods = methods;
    s.init_method = url;
    s.main = serve_until_killed;
    side_run(&s);
}

/* bob is killed while cyd goes on; ann removes him; who comes under his name gets his id, and both find him anew. */
static void bury_bob(side *s) {
    tprpc_error error = {0};
    tprpc_worker_info before, after;
    STORE(&shared->go, 1);
    CHECK(until(s, &shared->ready, 1));
    STORE(&shared->go, 2);
    CHECK(until(s, &shared->ready, 2));
    CHECK_EQ_INT(call_and_wait(s, "bob", "who", NULL, NULL, NULL), TPRPC_OK);
    before = info_of(s, "bob");
    CHECK_EQ_INT(before.id, 1);
    CHECK_EQ_INT(before.state, TPRPC_WORKER_CONNECTED);
    kill(shared->pid[1], SIGKILL);
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (info_of(s, "bob").state != TPRPC_WORKER_LOST && test_now_us() < end) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(info_of(s, "bob").id, 1);   /* he died, and is in the group still */
    if (!CHECK_EQ_INT(tprpc_agent_remove_worker(s->agent, "bob", WAIT_MS, &error), TPRPC_OK))
        fprintf(stderr, "%s\n", error.text);
    CHECK_EQ_INT(call_and_wait(s, "bob", "who", NULL, NULL, &error), TPRPC_ERROR_NO_WORKER);
    pid_t pid = test_fork_run(new_bob, (void *)(uintptr_t)s->mode);
    CHECK(until(s, &shared->ready, 3));
    CHECK_EQ_INT(call_and_wait(s, "bob", "who", NULL, NULL, NULL), TPRPC_OK);
    after = info_of(s, "bob");
    CHECK_EQ_INT(after.id, 1);
    CHECK_EQ_INT(after.process, pid);
    CHECK(strcmp(after.urls[0], before.urls[0]) != 0);
    CHECK_EQ_INT(call_and_wait(s, "cyd", "who", NULL, NULL, NULL), TPRPC_OK);
    STORE(&shared->stop, 1);
    CHECK_EQ_INT(test_wait_child(pid, 20), 0);
}

IN_MODES(killed_and_removed, 0x11) {
    side sides[3] = {{0}};
    char path[250], dies[] = "dies";
    snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
    share();
    sides[0].mode = with;
    for (int i = 0; i < 3; i++) {
        sides[i].main = i ? serve_until_killed : bury_bob;
        sides[i].methods = methods;
        sides[i].tune = dynamic;
        sides[i].init_method = url;
    }
    sides[1].user = dies;
    group_run(sides, 3);
}

/* ---- those who die, or stand still, in the middle of a change */

/* Where ann stops: before that operation. */
static const struct { const char *name; int kind; const char *key; int count; bool held; } stops[] = {
    {"its number", TPRPC_STORE_ADD, "tprpc/ticket", 1, false},
    {"its turn", TPRPC_STORE_COMPARE_SET, "tprpc/members", 1, false},
    {"its id", TPRPC_STORE_COMPARE_SET, "tprpc/member/", 1, true},
    {"its name", TPRPC_STORE_COMPARE_SET, "tprpc/name/", 1, true},
    {"the record", TPRPC_STORE_COMPARE_SET, "tprpc/members", 2, true},
    {"the next", TPRPC_STORE_SET, "tprpc/turn/", 1, false},
};

TEST(stopped_while_it_joins) {
    speed = 25;
    for (size_t i = 0; i < sizeof stops / sizeof stops[0]; i++) {
        static member m[3];
        memset(m, 0, sizeof m);
        fprintf(stderr, "ann stops before %s\n", stops[i].name);
        stores_open();
        m[0].gate.hold_kind = stops[i].kind;
        m[0].gate.hold_key = stops[i].key;
        m[0].gate.hold_count = stops[i].count;
        member_open(&m[0], "ann", 0);
        while (!m[0].gate.held) tprpc_poll(m[0].side.ctx, 1000, 0);
        member_join(&m[1], "bob");     /* waits for ann, and no longer than it must */
        member_join(&m[2], "cyd");
        CHECK(!m[0].ready);
        gate_open(&m[0].gate);         /* ann goes on, and finds herself passed over */
        CHECK(member_ready(&m[0]));
        CHECK(id_of(&m[0]) != id_of(&m[1]) && id_of(&m[0]) != id_of(&m[2]) && id_of(&m[1]) != id_of(&m[2]));
        const char *list = list_of(&m[1]);
        CHECK(strstr(list, "ann") && strstr(list, "bob") && strstr(list, "cyd"));
        CHECK_EQ_INT(strlen(list), 11);
        CHECK_EQ_INT(info_of(&m[1].side, "ann").id, id_of(&m[0]));
        for (int k = 0; k < 3; k++) CHECK_EQ_INT(tprpc_agent_leave(m[k].side.agent, WAIT_MS, NULL), TPRPC_OK);
        for (int k = 0; k < 3; k++) member_close(&m[k]);
        stores_close();
    }
}

/* The same, and she does not go on. */
TEST(died_while_it_joined) {
    speed = 25;
    for (size_t i = 0; i < sizeof stops / sizeof stops[0]; i++) {
        static member m[3];
        memset(m, 0, sizeof m);
        fprintf(stderr, "ann dies before %s\n", stops[i].name);
        stores_open();
        m[0].gate.hold_kind = stops[i].kind;
        m[0].gate.hold_key = stops[i].key;
        m[0].gate.hold_count = stops[i].count;
        member_open(&m[0], "ann", 0);
        while (!m[0].gate.held) tprpc_poll(m[0].side.ctx, 1000, 0);
        member_join(&m[1], "bob");
        CHECK_EQ_INT(id_of(&m[1]), i == 5 ? 1 : 0);   /* what was not recorded is nobody's */
        tprpc_status status = tprpc_agent_remove_worker(m[1].side.agent, "ann", WAIT_MS, NULL);
        CHECK_EQ_INT(status, i < 4 ? TPRPC_ERROR_NO_WORKER : TPRPC_OK);
        member_join(&m[2], "cyd");
        CHECK_STR(list_of(&m[2]), i == 5 ? "cyd bob" : "bob cyd");
        for (int k = 0; k < 3; k++) member_close(&m[k]);
        stores_close();
    }
}

/* A join that is given up gives the lock back: the next one does not wait for its end. */
TEST(destroyed_while_it_joins) {
    for (size_t i = 1; i < 4; i++) {
        static member m[2];
        memset(m, 0, sizeof m);
        stores_open();
        m[0].gate.hold_kind = stops[i].kind;
        m[0].gate.hold_key = stops[i].key;
        m[0].gate.hold_count = stops[i].count;
        member_open(&m[0], "ann", 0);
        while (!m[0].gate.held) tprpc_poll(m[0].side.ctx, 1000, 0);
        m[0].gate.held = false;        /* the store answers again, but for what it holds */
        m[0].gate.hold_key = NULL;
        member_close(&m[0]);
        CHECK(m[0].ready);
        CHECK_EQ_INT(m[0].status, TPRPC_ERROR_CLOSED);
        m[1].gate.hold_kind = TPRPC_STORE_GET;   /* it need not look whether anything happens, but once, where */
        m[1].gate.hold_key = "tprpc/members";    /* an entry is in its way, whether it has the lock */
        m[1].gate.hold_count = i < 3 ? 1 : 2;
        member_join(&m[1], "bob");
        CHECK(!m[1].gate.held);
        m[1].gate.hold_key = NULL;
        member_close(&m[1]);
        stores_close();
    }
}

/* ---- what a join costs */

TEST(joins_cost_the_same_in_a_large_group) {
    enum { MEMBERS = 200 };
    static tprpc_agent *agents[MEMBERS];
    static char names[MEMBERS][8];
    tprpc_context *ctx = NULL, *own = NULL;
    tprpc_context_desc context = {0};
    tprpc_store_desc desc = {0};
    tprpc_store *store = NULL;
    tprpc_worker_info info;
    char where[64];
    static member m[2];
    stores_open();
    snprintf(where, sizeof where, "tcp://127.0.0.1:%d", socket_free_port());
    context.transports = "tcp";
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    context.threads = 1;               /* the store's host is another process, usually */
    REQUIRE_EQ_INT(tprpc_context_create(&context, &own, NULL), TPRPC_OK);
    desc.url = where;
    desc.serve = true;
    REQUIRE_EQ_INT(tprpc_store_open(own, &desc, &store, NULL), TPRPC_OK);
    m[0].gate.local = m[1].gate.local = local;
    local = store;                     /* behind the gates */
    member_join(&m[0], "first");
    for (int i = 0; i < MEMBERS - 1; i++) {
        tprpc_agent_desc agent = {0};
        snprintf(names[i], sizeof names[i], "w%d", i);
        agent.context = ctx;
        agent.name = names[i];
        agent.store = store;
        REQUIRE_EQ_INT(tprpc_agent_create(&agent, &agents[i], NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_agent_wait_ready(agents[i], WAIT_MS, NULL), TPRPC_OK);
    }
    member_join(&m[1], "last");
    fprintf(stderr, "operations of the store: %d for the first, %d for the last\n", m[0].gate.operations,
            m[1].gate.operations);
    CHECK_LE_INT(m[1].gate.operations, m[0].gate.operations + 1);   /* the first need not wait for its turn */
    for (int i = 0; i < 5; i++) {
        tprpc_agent_desc agent = {0};
        tprpc_agent *late = NULL;
        agent.name = "late";
        agent.init_method = where;
        int64_t before = test_now_us();
        REQUIRE_EQ_INT(tprpc_agent_create(&agent, &late, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_agent_wait_ready(late, WAIT_MS, NULL), TPRPC_OK);
        fprintf(stderr, "a group of %d is joined in %.2f ms\n", MEMBERS + 1, (double)(test_now_us() - before) / 1000);
        CHECK_EQ_INT(tprpc_agent_get_worker(late, NULL, 0, &info, sizeof info, NULL), TPRPC_OK);
        CHECK_EQ_INT(info.id, MEMBERS + 1);
        CHECK_EQ_INT(tprpc_agent_leave(late, WAIT_MS, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_agent_destroy(late), TPRPC_OK);
    }
    for (int i = 0; i < MEMBERS - 1; i++) CHECK_EQ_INT(tprpc_agent_destroy(agents[i]), TPRPC_OK);
    local = m[0].gate.local;
    for (int i = 0; i < 2; i++) member_close(&m[i]);
    tprpc_store_close(store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(own), TPRPC_OK);
}

/* ---- two kinds in one store */

TEST(a_static_worker_comes_to_a_dynamic_group) {
    static member m[2];
    stores_open();
    member_join(&m[0], "ann");
    member_open(&m[1], "bob", 2);
    CHECK(!member_ready(&m[1]));
    CHECK_EQ_INT(m[1].status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(m[1].error.text, "static, of 2 workers");
    CHECK_CONTAINS(m[1].error.text, "worker ann, which came first, is dynamic");
    CHECK_CONTAINS(m[1].error.text, "tprpc/kind");
    CHECK_EQ_INT(call_and_wait(&m[0].side, "bob", "who", NULL, NULL, NULL), TPRPC_ERROR_NO_WORKER);
    for (int i = 0; i < 2; i++) member_close(&m[i]);
    stores_close();
}

/* The static group waits for more: it is told, too, and need not wait in vain. */
static void mix(int world, const char *theirs) {
    static member m[2];
    memset(m, 0, sizeof m);
    stores_open();
    member_open(&m[0], "ann", 3);
    for (int i = 0; i < 200; i++) tprpc_poll(m[0].side.ctx, 100, 0);
    CHECK(!m[0].ready);
    member_open(&m[1], "bob", world);
    CHECK(!member_ready(&m[1]));
    CHECK_EQ_INT(m[1].status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(m[1].error.text, "worker ann, which came first, is static, of 3 workers");
    CHECK_CONTAINS(m[1].error.text, theirs);
    CHECK(!member_ready(&m[0]));
    CHECK_EQ_INT(m[0].status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(m[0].error.text, "worker bob");
    CHECK_CONTAINS(m[0].error.text, "static, of 3 workers");
    CHECK_CONTAINS(m[0].error.text, theirs);
    for (int i = 0; i < 2; i++) member_close(&m[i]);
    stores_close();
}
TEST(a_dynamic_worker_comes_to_a_static_group) { mix(0, "dynamic"); }
TEST(a_static_group_of_another_size) { mix(2, "static, of 2 workers"); }

/* ---- entries that are another's */

static size_t read_key(const char *key, uint8_t *out, size_t room) {
    tprpc_store_request request = {0};
    request.size = sizeof request;
    request.kind = TPRPC_STORE_GET;
    request.key = key;
    REQUIRE_EQ_INT(tprpc_store_wait(local, &request, WAIT_MS, out, &room, NULL), TPRPC_OK);
    return room;
}

static void write_key(const char *key, const uint8_t *value, size_t size) {
    tprpc_store_request request = {0};
    request.size = sizeof request;
    request.kind = TPRPC_STORE_SET;
    request.key = key;
    request.value = value;
    request.value_size = size;
    REQUIRE_EQ_INT(tprpc_store_wait(local, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
}

TEST(the_entry_of_another_worker) {
    static member m[2];
    uint8_t entry[1500];
    tprpc_worker_info info;
    tprpc_error error = {0};
    stores_open();
    member_join(&m[0], "ann");
    member_join(&m[1], "bob");
    size_t size = read_key("tprpc/name/bob", entry, sizeof entry);
    write_key("tprpc/name/eve", entry, size);
    write_key("tprpc/member/0", entry, size);
    CHECK_EQ_INT(call_and_wait(&m[0].side, "eve", "who", NULL, NULL, &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "tprpc/name/eve");
    CHECK_CONTAINS(error.text, "bob");
    CHECK_EQ_INT(tprpc_agent_get_worker(m[0].side.agent, "eve", 0, &info, sizeof info, &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "bob");
    CHECK_EQ_INT(tprpc_agent_get_worker_by_id(m[0].side.agent, 0, 0, &info, sizeof info, &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "tprpc/member/0");
    CHECK_EQ_INT(tprpc_agent_remove_worker(m[0].side.agent, "eve", 0, &error), TPRPC_ERROR_PROTOCOL);
    write_key("tprpc/members", (const uint8_t *)"x", 1);
    CHECK_EQ_INT(tprpc_agent_leave(m[0].side.agent, WAIT_MS, &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "tprpc/members");
    for (int i = 0; i < 2; i++) member_close(&m[i]);
    stores_close();
}

/* Ranks 1 and 2 of a static group, whose entries are made of ann's: with her rank, or with her name. */
TEST(ranks_that_are_another_s) {
    for (int named = 0; named < 2; named++) {
        static member m[1];
        uint8_t entry[1500];
        memset(m, 0, sizeof m);
        stores_open();
        member_open(&m[0], "ann", 2);
        for (int i = 0; i < 100; i++) tprpc_poll(m[0].side.ctx, 100, 0);
        size_t size = read_key("tprpc/rank/0", entry, sizeof entry);
        if (named) entry[8] = 1;       /* behind the nonce */
        write_key("tprpc/rank/1", entry, size);
        CHECK(!member_ready(&m[0]));
        CHECK_EQ_INT(m[0].status, TPRPC_ERROR_PROTOCOL);
        CHECK_CONTAINS(m[0].error.text, named ? "both say that they are worker ann" : "whose rank is 0");
        member_close(&m[0]);
        stores_close();
    }
}
