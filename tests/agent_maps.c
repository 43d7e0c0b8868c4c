/* Device maps between processes: what goes where and comes back, what is refused when a group starts or a worker is
   looked up, which devices an agent may use; and that converters get everything back however a call ends. Each process
   has the devices of toys.h. */
#include "agent_help.h"
#include "toys.h"

enum { SIZE = 20000, LARGE = 300000 };
enum { PROCESSES = 0x93 };             /* tcp and shm polled, shm with threads, all transports */

static tprpc_device device_of(int32_t kind, int32_t index) {
    tprpc_device device;
    device.kind = kind;
    device.index = index;
    return device;
}
static tprpc_device cpu(void) { return device_of(TPRPC_CPU, 0); }

static bool on_device(const tprpc_tensor *tensor, tprpc_device device) {
    return tensor->device.kind == device.kind && tensor->device.index == device.index;
}

/* A tensor on a device, filled in its queue's order. */
static tprpc_tensor tensor_on(tprpc_device device, size_t size, unsigned seed) {
    uint8_t *bytes = (uint8_t *)malloc(size);
    REQUIRE(bytes != NULL);
    fill(bytes, size, seed);
    tprpc_tensor tensor = bytes_of(bytes, size);
    if (device.kind != TPRPC_DEVICE_USER) return tensor;
    tensor.device = device;
    tensor.data = toy_gpu_alloc(device.index, size);
    toy_gpu_put(toy_queue_of(device, NULL), tensor.data, bytes, size);
    free(bytes);
    return tensor;
}

static void tensor_free(tprpc_tensor *tensor) {
    uint8_t byte;
    if (tensor->device.kind == TPRPC_DEVICE_USER) {   /* what fills it may be in the queue still */
        toy_gpu_get(toy_queue_of(tensor->device, NULL), &byte, tensor->data, 1);
        toy_gpu_free(tensor->data);
    } else {
        free(tensor->data);
    }
}

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

/* Of this process, for several of them call at a time. */
static int released;
static void count_released(void *user) { (void)user; ADD(&released, 1); }
static bool until_released_once(side *s) {
    bool good = until(s, &released, 1) && LOAD(&released) == 1;
    STORE(&released, 0);
    return good;
}

/* ---- members ---- */

typedef struct member {                /* what one of a group does; of a side's `user` */
    void (*maps)(side *);              /* before it starts; NULL: nothing */
    const tprpc_device *devices;       /* of its descriptor */
    size_t device_count;
    bool bare, dies;                   /* without converters; it is killed */
} member;

static bool group_is_dynamic;

static void as_member(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    const member *m = (const member *)s->user;
    if (!m->bare) context->backends = toy_backends;
    if (!m->bare) context->backend_count = 3;
    agent->devices = m->devices;
    agent->device_count = m->device_count;
    if (group_is_dynamic) agent->world_size = agent->rank = 0;
}

/* Starts, puts down how that ended, and where it ended well does what it is for. */
static void member_run(void *arg) {
    side *s = (side *)arg;
    const member *m = (const member *)s->user;
    tprpc_error error = {0};
    toys_begin(500);
    side_open(s);
    if (m->maps) m->maps(s);
    const tprpc_status status = tprpc_agent_wait_ready(s->agent, 0, &error);
    snprintf(shared->text[s->rank], sizeof shared->text[0], "%s", error.text);
    STORE(&shared->status[s->rank], (int)status);
    ADD(&shared->ready, 1);
    if (s->main && status == TPRPC_OK) s->main(s);
    if (!s->main && status == TPRPC_OK && group_is_dynamic) serve_until_stop(s);
    if (status == TPRPC_OK) side_leave(s);
    side_close(s);
    toys_end();
}

static void members_run(const mode *with, side *sides, member *members, int count) {
    group g;
    share();
    sides[0].mode = with;
    for (int i = 0; i < count; i++) {
        sides[i].tune = as_member;
        sides[i].user = &members[i];
    }
    group_open(&g, sides, count);
    for (int i = 1; i < count; i++) shared->pid[i] = test_fork_run(member_run, &sides[i]);
    shared->pid[0] = getpid();
    member_run(&sides[0]);
    for (int i = 1; i < count; i++) {
        const int ended = test_wait_child(shared->pid[i], 40);
        CHECK_EQ_INT(ended, members[i].dies ? 128 + SIGKILL : 0);
    }
    group_close(&g);
}

static void map_one(side *s, const char *worker, tprpc_device from, tprpc_device to) {
    tprpc_error error = {0};
    if (tprpc_agent_set_device_map(s->agent, worker, &from, &to, 1, &error) != TPRPC_OK) {
        fprintf(stderr, "%s\n", error.text);
        CHECK(false);
    }
}

static void until_all_ready(side *s, int count) { CHECK(until(s, &shared->ready, count)); }

/* ---- there and back ---- */

/* Says on which devices its tensors are, and sends them back as they came; the last is its own, on the host. */
static void on_return(tprpc_request request, const tprpc_message *message, void *user) {
    char text[200] = "";
    uint8_t own[100];
    tprpc_tensor tensors[8] = {{0}};
    tprpc_message reply = tensors_of(tensors, message->tensor_count + 1);
    (void)user;
    REQUIRE(message->tensor_count < 8);
    for (size_t i = 0; i < message->tensor_count; i++) {
        const tprpc_tensor *t = &message->tensors[i];
        CHECK(holds(t, (unsigned)i));
        CHECK_EQ_INT(t->target.kind, TPRPC_DEVICE_DEFAULT);
        CHECK(tprpc_request_stream(request, t->device) == t->stream);
        snprintf(text + strlen(text), sizeof text - strlen(text), "%s%d:%d", i ? " " : "", (int)t->device.kind,
                 (int)t->device.index);
        tensors[i] = *t;
    }
    fill(own, sizeof own, (unsigned)message->tensor_count);
    tensors[message->tensor_count] = bytes_of(own, sizeof own);
    reply.metadata = text;
    reply.metadata_size = strlen(text);
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

/* Likewise, all to the host, as the handler says. */
static void on_to_host(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensors[8] = {{0}};
    const tprpc_message reply = tensors_of(tensors, message->tensor_count);
    (void)user;
    REQUIRE(message->tensor_count <= 8);
    for (size_t i = 0; i < message->tensor_count; i++) {
        tensors[i] = message->tensors[i];
        tensors[i].target = cpu();
    }
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static tprpc_request kept_request;

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    kept_request = request;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->seen, 1);
}

static void on_go_on(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_reply(kept_request, tprpc_request_message(kept_request)), TPRPC_OK);
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
}

/* Which devices the agent uses, as "64:1 64:0". */
static void devices_text(side *s, char *out, size_t size) {
    tprpc_device devices[64];
    const size_t count = tprpc_agent_get_devices(s->agent, devices, 64);
    REQUIRE(count <= 64);
    out[0] = 0;
    for (size_t i = 0; i < count; i++)
        snprintf(out + strlen(out), size - strlen(out), "%s%d:%d", i ? " " : "", (int)devices[i].kind,
                 (int)devices[i].index);
}

static void on_devices(tprpc_request request, const tprpc_message *message, void *user) {
    char text[200];
    (void)message;
    devices_text((side *)user, text, sizeof text);
    const tprpc_message reply = text_of(text);
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static const tprpc_method_desc methods[] = {
    {"return", on_return, NULL, NULL, NULL, 0}, {"to_host", on_to_host, NULL, NULL, NULL, 0},
    {"keep", on_keep, NULL, NULL, NULL, 0},     {"go_on", on_go_on, NULL, NULL, NULL, 0},
    {"devices", on_devices, NULL, NULL, NULL, 0}, {0},
};

static void check_text(const tprpc_message *reply, const char *expected) {
    char text[200] = "";
    REQUIRE(reply != NULL && reply->metadata_size < sizeof text);
    if (reply->metadata_size) memcpy(text, reply->metadata, reply->metadata_size);
    CHECK_STR(text, expected);
}

/* Sends tensors on `from`, which are to be at `there` and to come back to `back`, whose last is the handler's own. */
static void there_and_back(side *s, const char *worker, const tprpc_device *from, size_t count, const char *there,
                           const tprpc_device *back) {
    for (int round = 0; round < 4; round++) {
        tprpc_tensor tensors[8] = {{0}};
        tprpc_message message = tensors_of(tensors, count);
        tprpc_future future;
        tprpc_error error = {0};
        for (size_t i = 0; i < count; i++) tensors[i] = tensor_on(from[i], round < 2 ? SIZE : 100, (unsigned)i);
        if (round % 2) message.release = count_released;
        REQUIRE_EQ_INT(tprpc_call(s->agent, worker, "return", &message, NULL, &future), TPRPC_OK);
        if (!CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK)) {
            tprpc_future_error(future, &error);
            fprintf(stderr, "%s\n", error.text);
        } else {
            const tprpc_message *reply = tprpc_future_reply(future);
            check_text(reply, there);
            REQUIRE_EQ_INT(reply->tensor_count, count + 1);
            for (size_t i = 0; i <= count; i++) {
                CHECK(on_device(&reply->tensors[i], back[i]));
                CHECK_EQ_INT(reply->tensors[i].target.kind, TPRPC_DEVICE_DEFAULT);
                CHECK(holds(&reply->tensors[i], (unsigned)i));
            }
        }
        tprpc_future_release(future);
        if (round % 2) CHECK(until_released_once(s));
        for (size_t i = 0; i < count; i++) tensor_free(&tensors[i]);
    }
}

static void to_host_and_back(side *s, const char *worker) {
    tprpc_tensor tensors[2] = {{0}};
    const tprpc_message message = tensors_of(tensors, 2);
    tprpc_future future;
    tensors[0] = tensor_on(toy_device(0), SIZE, 0);
    tensors[1] = tensor_on(cpu(), SIZE, 1);
    REQUIRE_EQ_INT(tprpc_call(s->agent, worker, "to_host", &message, NULL, &future), TPRPC_OK);
    if (CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK))
        for (unsigned i = 0; i < 2; i++) {
            const tprpc_tensor *t = &tprpc_future_reply(future)->tensors[i];
            CHECK(on_device(t, cpu()));
            CHECK(holds(t, i));
        }
    tprpc_future_release(future);
    for (int i = 0; i < 2; i++) tensor_free(&tensors[i]);
}

/* All kinds of pairs to bob; to the others one entry for all, and cyd has one of his own in its stead. */
static void map_all_pairs(side *s) {
    map_one(s, "bob", cpu(), cpu());
    map_one(s, "bob", cpu(), toy_device(1));   /* the last word counts */
    map_one(s, "bob", toy_device(0), toy_device(0));
    map_one(s, "bob", toy_device(1), cpu());
    map_one(s, NULL, toy_device(0), toy_device(1));
    map_one(s, "cyd", toy_device(0), cpu());
}

static void ask_devices(side *s, const char *worker, const char *expected) {
    tprpc_future future;
    REQUIRE_EQ_INT(tprpc_call(s->agent, worker, "devices", NULL, NULL, &future), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    check_text(tprpc_future_reply(future), expected);
    tprpc_future_release(future);
}

/* A call runs while the map cannot be changed, and ends by the map as it was. */
static void map_while_calls_run(side *s) {
    const tprpc_device from = toy_device(1), to = toy_device(1);
    tprpc_tensor tensor = tensor_on(from, SIZE, 0);
    const tprpc_message message = tensors_of(&tensor, 1);
    tprpc_error error = {0};
    tprpc_future future;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "keep", &message, NULL, &future), TPRPC_OK);
    CHECK(until(s, &shared->seen, 1));
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, "bob", &from, &to, 1, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "before it starts");
    CHECK_EQ_INT(tprpc_future_wait(future, TPRPC_NOW), TPRPC_PENDING);
    CHECK_EQ_INT(call_and_wait(s, "bob", "go_on", NULL, NULL, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    CHECK(on_device(&tprpc_future_reply(future)->tensors[0], from));
    CHECK(holds(&tprpc_future_reply(future)->tensors[0], 0));
    tprpc_future_release(future);
    tensor_free(&tensor);
}

/* Before anybody calls, a static group knows which of one's devices the others map to; a dynamic one does not. */
static void look_at_devices(side *s) {
    const char *const known[] = {"64:0 64:1", "64:1 64:0", "", "64:1"};
    char text[200];
    devices_text(s, text, sizeof text);
    CHECK_STR(text, group_is_dynamic ? "" : known[s->rank]);
    ADD(&shared->count[0], 1);
}

static void look_and_serve(side *s) {
    look_at_devices(s);
    serve_until_stop(s);
}

static void go_all_ways(side *s) {
    const tprpc_device from[] = {toy_device(0), cpu(), toy_device(1), cpu()};
    const tprpc_device from_bob[] = {toy_device(0), cpu(), toy_device(1), cpu(), toy_device(1)};
    const tprpc_device from_cyd[] = {toy_device(0), toy_device(0), toy_device(1), toy_device(0), toy_device(0)};
    const tprpc_device from_dan[] = {toy_device(0), cpu(), toy_device(0), cpu(), cpu()};
    char text[200];
    CHECK(until(s, &shared->count[0], 3));
    for (int i = 0; i < 2; i++) {
        there_and_back(s, "bob", from, 4, "64:0 64:1 1:0 64:1", from_bob);
        there_and_back(s, "cyd", from, 4, "1:0 1:0 64:1 1:0", from_cyd);
        there_and_back(s, "dan", from, 4, "64:1 1:0 64:1 1:0", from_dan);
        to_host_and_back(s, "bob");
    }
    map_while_calls_run(s);
    there_and_back(s, "bob", from, 4, "64:0 64:1 1:0 64:1", from_bob);
    devices_text(s, text, sizeof text);
    CHECK_STR(text, "64:0 64:1");
    ask_devices(s, "bob", "64:1 64:0");
    ask_devices(s, "dan", "64:1");
    CHECK_EQ_INT(tprpc_agent_get_devices(s->agent, NULL, 0), 2);
    STORE(&shared->go, 1);
    CHECK(until(s, &shared->outcomes, 1));
    STORE(&shared->stop, 1);
}

/* Who is mapped to has no map himself: his calls go as the tensors say. */
static void go_without_map(side *s) {
    const tprpc_device from[] = {toy_device(1), cpu()}, back[] = {toy_device(1), cpu(), cpu()};
    look_at_devices(s);
    CHECK(until(s, &shared->go, 1));
    there_and_back(s, "ann", from, 2, "64:1 1:0", back);
    ADD(&shared->outcomes, 1);
    CHECK(until(s, &shared->stop, 1));
}

static void all_ways(const mode *with, bool is_dynamic) {
    side sides[4] = {{0}};
    member members[4] = {{0}};
    group_is_dynamic = is_dynamic;
    for (int i = 0; i < 4; i++) sides[i].methods = methods;
    members[0].maps = map_all_pairs;
    sides[0].main = go_all_ways;
    sides[1].main = go_without_map;
    sides[2].main = sides[3].main = look_and_serve;
    members_run(with, sides, members, 4);
}
IN_MODES(there_and_back_again, PROCESSES) { all_ways(with, false); }
IN_MODES(there_and_back_in_a_dynamic_group, PROCESSES) { all_ways(with, true); }

/* Maps that name the host alone need no device, and no converter. */
static void map_host(side *s) {
    map_one(s, NULL, cpu(), cpu());
    map_one(s, s->rank ? "ann" : "bob", cpu(), cpu());
    CHECK_EQ_INT(tprpc_agent_get_devices(s->agent, NULL, 0), 0);
}
static void go_by_host(side *s) {
    const tprpc_device hosts[] = {cpu(), cpu(), cpu()};
    there_and_back(s, s->rank ? "ann" : "bob", hosts, 2, "1:0 1:0", hosts);
}
IN_MODES(host_to_host_everywhere, PROCESSES) {
    side sides[2] = {{0}};
    member members[2] = {{0}};
    for (int i = 0; i < 2; i++) {
        sides[i].methods = methods;
        sides[i].main = go_by_host;
        members[i].maps = map_host;
        members[i].bare = true;
    }
    members_run(with, sides, members, 2);
}

/* ---- refused when a group starts: by all of it, in the words of the one whose map it is ---- */

static void map_nobody(side *s) {
    map_one(s, "bob", cpu(), toy_device(0));
    map_one(s, "eve", cpu(), cpu());
}
static void map_no_index(side *s) { map_one(s, "bob", cpu(), toy_device(50)); }
static void map_no_kind(side *s) { map_one(s, "bob", toy_device(1), device_of(77, 3)); }
static void map_two_to_one(side *s) {
    map_one(s, "bob", toy_device(0), toy_device(1));
    map_one(s, NULL, toy_device(0), toy_device(0));   /* bob has one of his own */
    map_one(s, NULL, toy_device(1), toy_device(1));
}
static void map_to_self(side *s) { map_one(s, s->name, toy_device(0), toy_device(2)); }
static void map_all(side *s) { map_one(s, NULL, toy_device(0), toy_device(1)); }

static void none_starts(const mode *with, int whose, void (*maps)(side *), member *second, tprpc_status status,
                        const char *sentence) {
    side sides[3] = {{0}};
    member members[3] = {{0}};
    if (second) members[1] = *second;
    members[whose].maps = maps;
    members_run(with, sides, members, 3);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ_INT(LOAD(&shared->status[i]), status);
        CHECK_CONTAINS(shared->text[i], sides[i].name);
        CHECK_CONTAINS(shared->text[i], sentence);
    }
}

IN_MODES(map_to_nobody, PROCESSES) {
    none_starts(with, 0, map_nobody, NULL, TPRPC_ERROR_NO_WORKER, "ann has a device map for worker eve");
}
IN_MODES(map_to_no_device, PROCESSES) {
    none_starts(with, 2, map_no_index, NULL, TPRPC_ERROR_INVALID,
                "cyd maps device 0 of kind 1 to device 50 of kind 64 of bob, which has kind 64: 0 to 1");
}
IN_MODES(map_to_no_kind, PROCESSES) {
    none_starts(with, 0, map_no_kind, NULL, TPRPC_ERROR_INVALID,
                "ann maps device 1 of kind 64 to device 3 of kind 77 of bob, which has kind 64: 0 to 1");
}
IN_MODES(map_of_two_to_one, PROCESSES) {
    none_starts(with, 2, map_two_to_one, NULL, TPRPC_ERROR_INVALID, "both to device 1 of kind 64 of bob");
}
IN_MODES(map_to_oneself, PROCESSES) {
    none_starts(with, 1, map_to_self, NULL, TPRPC_ERROR_INVALID, "to device 2 of kind 64 of bob");
}
IN_MODES(map_of_all_to_the_host_alone, PROCESSES) {
    member bare = {0};
    bare.bare = true;
    none_starts(with, 0, map_all, &bare, TPRPC_ERROR_INVALID, "device 1 of kind 64 of bob, which has the host alone");
}
IN_MODES(map_to_a_device_not_given, PROCESSES) {
    const tprpc_device given = toy_device(0);
    member few = {0};
    few.devices = &given;
    few.device_count = 1;
    none_starts(with, 2, map_all, &few, TPRPC_ERROR_INVALID, "of bob, which has kind 64: 0 to 0");
}

/* ---- refused when a worker is looked up ---- */

static void map_wrongly(side *s) {
    map_one(s, "bob", cpu(), toy_device(50));
    map_one(s, "eve", cpu(), toy_device(50));   /* who is not there yet: nobody knows */
}

static void look_up(side *s) {
    tprpc_error error = {0};
    until_all_ready(s, 3);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ_INT(call_and_wait(s, "bob", "devices", NULL, NULL, &error), TPRPC_ERROR_INVALID);
        CHECK_CONTAINS(error.text, "to device 50 of kind 64 of bob, which has kind 64: 0 to 1");
        CHECK_EQ_INT(call_and_wait(s, "cyd", "devices", NULL, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(call_and_wait(s, "eve", "devices", NULL, NULL, &error), TPRPC_ERROR_NO_WORKER);
    }
    STORE(&shared->stop, 1);
}

IN_MODES(wrong_map_in_a_dynamic_group, PROCESSES) {
    side sides[3] = {{0}};
    member members[3] = {{0}};
    group_is_dynamic = true;
    for (int i = 0; i < 3; i++) sides[i].methods = methods;
    members[0].maps = map_wrongly;
    sides[0].main = look_up;
    members_run(with, sides, members, 3);
}

static void map_two_to_one_of_all(side *s) {
    map_one(s, NULL, cpu(), toy_device(1));
    map_one(s, NULL, toy_device(0), toy_device(1));
}
static void stop_all(side *s) {
    until_all_ready(s, 3);
    STORE(&shared->stop, 1);
}
IN_MODES(two_to_one_in_a_dynamic_group, PROCESSES) {
    side sides[3] = {{0}};
    member members[3] = {{0}};
    group_is_dynamic = true;
    sides[0].main = stop_all;
    members[1].maps = map_two_to_one;
    members[2].maps = map_two_to_one_of_all;
    members_run(with, sides, members, 3);
    CHECK_EQ_INT(shared->status[0], TPRPC_OK);
    CHECK_EQ_INT(shared->status[1], TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(shared->text[1], "both to device 1 of kind 64 of bob");
    CHECK_EQ_INT(shared->status[2], TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(shared->text[2],
                   "device 0 of kind 1 and device 0 of kind 64 both to device 1 of kind 64 of every worker");
}

/* ---- the devices of an agent ---- */

/* Answers with a tensor on the device that is not its, and where that is refused, says so. */
static void on_wrong_device(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensor = tensor_on(toy_device(1), SIZE, 0);
    const tprpc_message reply = tensors_of(&tensor, 1);
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_ERROR_UNSUPPORTED);
    CHECK_EQ_INT(tprpc_fail(request, 7, "as it should be"), TPRPC_OK);
    tensor_free(&tensor);
}

static const tprpc_method_desc few_methods[] = {
    {"return", on_return, NULL, NULL, NULL, 0}, {"devices", on_devices, NULL, NULL, NULL, 0},
    {"wrong", on_wrong_device, NULL, NULL, NULL, 0}, {0},
};

static void map_from_not_given(side *s) {
    const tprpc_device from = toy_device(1), to = cpu();
    tprpc_error error = {0};
    CHECK_EQ_INT(tprpc_agent_set_device_map(s->agent, NULL, &from, &to, 1, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "from[0] is device 1 of kind 64, which bob does not have among its devices");
    map_one(s, "ann", toy_device(0), toy_device(1));
}

static void call_from_not_given(side *s) {
    tprpc_tensor tensor = tensor_on(toy_device(1), SIZE, 0);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_error error = {0};
    const tprpc_device from = toy_device(0), back[] = {toy_device(0), cpu()};
    message.release = count_released;
    CHECK(until(s, &shared->go, 1));
    CHECK_EQ_INT(call_and_wait(s, "ann", "return", &message, NULL, &error), TPRPC_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(error.text, "tensor 0 is on device 1 of kind 64, which bob does not have among its devices");
    CHECK(until_released_once(s));     /* it has run */
    there_and_back(s, "ann", &from, 1, "64:1", back);
    tensor_free(&tensor);
    ADD(&shared->outcomes, 1);
    CHECK(until(s, &shared->stop, 1));
}

static void call_to_not_given(side *s) {
    tprpc_error error = {0};
    const tprpc_device from = toy_device(0), back[] = {toy_device(0), cpu()};
    tprpc_call_options options = {0};
    until_all_ready(s, 2);
    for (int i = 0; i < 2; i++) {
        tprpc_tensor tensor = tensor_on(toy_device(i), SIZE, 0);
        const tprpc_message message = tensors_of(&tensor, 1);
        tensor.target = toy_device(1);
        CHECK_EQ_INT(call_and_wait(s, "bob", "return", &message, NULL, &error), TPRPC_ERROR_UNSUPPORTED);
        CHECK_CONTAINS(error.text, "tensor 0 is for device 1 of kind 64, which bob does not have among its devices");
        options.flags = TPRPC_CALL_ONE_WAY;
        CHECK_EQ_INT(tprpc_call(s->agent, "bob", "return", &message, &options, NULL), TPRPC_OK);
        there_and_back(s, "bob", &from, 1, "64:0", back);
        tensor_free(&tensor);
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "wrong", NULL, NULL, &error), TPRPC_ERROR_REMOTE);
    CHECK_STR(error.text, "as it should be");
    ask_devices(s, "bob", "64:0");
    STORE(&shared->go, 1);
    CHECK(until(s, &shared->outcomes, 1));
    STORE(&shared->stop, 1);
}

IN_MODES(devices_not_given, PROCESSES) {
    const tprpc_device given[] = {cpu(), toy_device(0), toy_device(0)};
    side sides[2] = {{0}};
    member members[2] = {{0}};
    for (int i = 0; i < 2; i++) sides[i].methods = few_methods;
    sides[0].main = call_to_not_given;
    sides[1].main = call_from_not_given;
    members[1].maps = map_from_not_given;
    members[1].devices = given;
    members[1].device_count = 3;
    members_run(with, sides, members, 2);
}

/* ---- descriptors ---- */

static int32_t many_devices(void *user) { (void)user; return 3000; }
static const tprpc_converter_table many_table = {
    (uint32_t)sizeof(tprpc_converter_table), 100, many_devices, NULL, NULL, NULL, NULL, NULL, NULL
};
static const tprpc_backend many_backend = {(uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "many", "Many devices.", 0,
                                           NULL, NULL, &many_table, NULL};
static const tprpc_backend *const many_backends[] = {&many_backend};

static void refuse(const tprpc_agent_desc *desc, tprpc_status status, const char *text) {
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    CHECK_EQ_INT(tprpc_agent_create(desc, &agent, &error), status);
    CHECK(agent == NULL);
    CHECK_CONTAINS(error.text, text);
}

TEST(descriptors) {
    tprpc_context_desc context = {0};
    tprpc_agent_desc desc = {0};
    tprpc_agent *agent = NULL;
    tprpc_device devices[70];
    tprpc_error error = {0};
    context.backends = many_backends;
    context.backend_count = 1;
    REQUIRE_EQ_INT(tprpc_context_create(&context, &desc.context, NULL), TPRPC_OK);
    desc.name = "ann";
    desc.init_method = "tcp://127.0.0.1:1";
    desc.transports = "tcp";
    refuse(&desc, TPRPC_ERROR_INVALID, "transports are those of its private context");
    desc.transports = NULL;
    desc.channels = "basic";
    refuse(&desc, TPRPC_ERROR_INVALID, "channels are those of its private context");
    desc.channels = NULL;
    desc.device_count = 1;
    refuse(&desc, TPRPC_ERROR_INVALID, "devices is NULL");
    desc.devices = devices;
    for (int i = 0; i < 70; i++) devices[i] = device_of(100, i);
    devices[0] = device_of(100, 3000);
    refuse(&desc, TPRPC_ERROR_INVALID, "devices[0] is device 3000 of kind 100, of which there are 3000 here");
    devices[0] = device_of(TPRPC_CUDA, 0);
    refuse(&desc, TPRPC_ERROR_UNSUPPORTED, "devices[0] is of device kind 2");
    devices[0] = device_of(100, 0);
    desc.device_count = 65;
    refuse(&desc, TPRPC_ERROR_LIMIT, "more than 64 devices");
    desc.device_count = 64;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_get_devices(agent, devices, 2), 64);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    for (int i = 0; i < 70; i++) devices[i] = device_of(100, 2 * i);
    desc.device_count = 17;
    refuse(&desc, TPRPC_ERROR_LIMIT, "more than 16 runs");
    desc.device_count = 16;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    desc.devices = NULL;
    desc.device_count = 0;
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    for (int i = 0; i < 1024; i++) {
        const tprpc_device device = device_of(100, i);
        REQUIRE_EQ_INT(tprpc_agent_set_device_map(agent, NULL, &device, &device, 1, NULL), TPRPC_OK);
    }
    CHECK_EQ_INT(tprpc_agent_get_devices(agent, devices, 70), 64);   /* as many as it remembers */
    devices[0] = device_of(100, 1024);
    CHECK_EQ_INT(tprpc_agent_set_device_map(agent, NULL, devices, devices, 1, &error), TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(error.text, "over 1024 entries");
    devices[0] = device_of(100, 7);    /* in the place of another */
    CHECK_EQ_INT(tprpc_agent_set_device_map(agent, NULL, devices, devices, 1, &error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(desc.context), TPRPC_OK);
}

/* A private context has the transports and channels that the agent was told, or says which there are. */
static void echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

TEST(backends_of_a_private_context) {
    tprpc_agent_desc desc = {0};
    tprpc_method_desc method = {0};
    tprpc_agent *agent = NULL;
    tprpc_future future;
    tprpc_pipe_info info;
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
    desc.name = "ann";
    desc.init_method = url;
    desc.world_size = 1;
    desc.transports = "carrier-pigeon";
    refuse(&desc, TPRPC_ERROR_INVALID, "tcp");
    desc.transports = NULL;
    desc.channels = "semaphore";
    refuse(&desc, TPRPC_ERROR_INVALID, "basic");
    desc.transports = "tcp";
    desc.channels = "basic";
    REQUIRE_EQ_INT(tprpc_agent_create(&desc, &agent, NULL), TPRPC_OK);
    method.name = "echo";
    method.handler = echo;
    REQUIRE_EQ_INT(tprpc_agent_register(agent, &method, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_agent_wait_ready(agent, WAIT_MS, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_call(agent, "ann", "echo", NULL, NULL, &future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    tprpc_future_release(future);
    REQUIRE_EQ_INT(tprpc_agent_get_peer_info(agent, "ann", &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "tcp");
    CHECK_STR(info.channel, "basic");
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
}

/* ---- what converters hold, however a call ends ---- */

static tprpc_status place_refuses(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    return TPRPC_ERROR_DENIED;
}

/* Bytes are about to come; they will not, for who sends them dies. */
static tprpc_status place_kills_caller(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    kill(shared->pid[2], SIGKILL);
    return TPRPC_OK;
}

static tprpc_status place_dies(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    kill(getpid(), SIGKILL);
    return TPRPC_OK;
}

static tprpc_status place_kills_bob(tprpc_placement *placement, void *user) {
    (void)placement; (void)user;
    kill(shared->pid[1], SIGKILL);
    return TPRPC_OK;
}

static const tprpc_method_desc hold_methods[] = {
    {"echo", echo, NULL, NULL, NULL, 0},           {"refuse", echo, place_refuses, NULL, NULL, 0},
    {"die", echo, place_dies, NULL, NULL, 0},      {"kill_caller", echo, place_kills_caller, NULL, NULL, 0},
    {0},
};

/* Waits until the device has nothing of the library's: each prepare had its sent, each copy and allocate its release. */
static void until_given_back(side *s, int prepared_at_least, int own) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while ((toy_count(&toy_gpu.prepared) != toy_count(&toy_gpu.sent) || toy_count(&toy_gpu.allocated) != own) &&
           test_now_us() < end) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(toy_count(&toy_gpu.prepared), toy_count(&toy_gpu.sent));
    CHECK_EQ_INT(toy_count(&toy_gpu.allocated), own);
    CHECK_LE_INT(prepared_at_least, toy_count(&toy_gpu.prepared));
}

static void one_end(side *s, const char *method, bool lent, const tprpc_call_options *options, bool cancel,
                    tprpc_status status) {
    tprpc_tensor tensors[3] = {{0}};
    tprpc_message message = tensors_of(tensors, 3);
    tprpc_error error = {0};
    tprpc_future future;
    const int prepared = toy_count(&toy_gpu.prepared);
    tensors[0] = tensor_on(toy_device(0), LARGE, 0);
    tensors[1] = tensor_on(cpu(), LARGE, 1);
    tensors[1].target = toy_device(1);
    tensors[2] = tensor_on(toy_device(1), 100, 2);
    if (lent) message.release = count_released;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", method, &message, options, &future), TPRPC_OK);
    if (cancel) CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), status);
    tprpc_future_error(future, &error);
    fprintf(stderr, "%s, %s: %s\n", method, lent ? "lent" : "copied", error.text);
    tprpc_future_release(future);
    if (lent) CHECK(until_released_once(s));
    until_given_back(s, prepared + 2, 2);
    for (int i = 0; i < 3; i++) tensor_free(&tensors[i]);
}

static void end_all_ways(side *s) {
    tprpc_call_options options = {0}, late = {0};
    options.place = place_refuses;
    late.timeout_ms = 1;
    toy_gpu.lag_us = 5000;             /* so that there is something under way */
    for (int lent = 0; lent < 2; lent++) {
        one_end(s, "echo", lent, NULL, false, TPRPC_OK);
        one_end(s, "echo", lent, &late, false, TPRPC_ERROR_TIMEOUT);
        one_end(s, "echo", lent, NULL, true, TPRPC_ERROR_CANCELLED);
        one_end(s, "refuse", lent, NULL, false, TPRPC_ERROR_DENIED);
        one_end(s, "nothing", lent, NULL, false, TPRPC_ERROR_NO_METHOD);
        one_end(s, "echo", lent, &options, false, TPRPC_ERROR_DENIED);   /* its reply is refused */
        one_end(s, "echo", lent, NULL, false, TPRPC_OK);
    }
}

static void cyd_calls(side *s) {
    tprpc_tensor tensor = tensor_on(toy_device(0), LARGE, 0);
    const tprpc_message message = tensors_of(&tensor, 1);
    until_all_ready(s, 3);
    call_and_wait(s, "ann", "kill_caller", &message, NULL, NULL);
    serve_until_stop(s);
}

/* `first` and others who serve; the last of them dies, if one does. */
static void hold(const mode *with, void (*first)(side *), int count, bool one_dies) {
    side sides[3] = {{0}};
    member members[3] = {{0}};
    group_is_dynamic = true;
    for (int i = 0; i < count; i++) sides[i].methods = hold_methods;
    sides[0].main = first;
    if (count == 3) sides[2].main = cyd_calls;
    members[count - 1].dies = one_dies;
    members_run(with, sides, members, count);
}

static void end_all(side *s) {
    until_all_ready(s, 2);
    end_all_ways(s);
    STORE(&shared->stop, 1);
}
IN_MODES(all_is_given_back, PROCESSES) { hold(with, end_all, 2, false); }

/* The receiver dies while bytes are on their way to it. */
static void bob_dies(side *s) {
    until_all_ready(s, 2);
    toy_gpu.lag_us = 5000;
    one_end(s, "die", (s->mode->threads & 1) == 0, NULL, false, TPRPC_ERROR_PEER);
}
IN_MODES(given_back_when_the_receiver_dies, PROCESSES) { hold(with, bob_dies, 2, true); }

/* The worker dies while its reply is on its way, into memory that is here already. */
static void bob_dies_late(side *s) {
    tprpc_call_options options = {0};
    until_all_ready(s, 2);
    options.place = place_kills_bob;
    one_end(s, "echo", false, &options, false, TPRPC_ERROR_PEER);
}
IN_MODES(given_back_when_the_worker_dies, PROCESSES) { hold(with, bob_dies_late, 2, true); }

/* A caller dies while its call is on its way, into memory that is here already. */
static void ann_serves(side *s) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    until_all_ready(s, 3);
    while ((stats_of(s).requests_failed < 1 || stats_of(s).server_active_calls) && test_now_us() < end)
        tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(stats_of(s).requests_failed, 1);
    until_given_back(s, 0, 0);
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    STORE(&shared->stop, 1);
}
IN_MODES(given_back_when_the_caller_dies, PROCESSES) { hold(with, ann_serves, 3, true); }
