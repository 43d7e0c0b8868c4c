/* The store: its server with strangers for clients, its client with a stranger for a server, its file with a stranger
   writing to it, and an agent whose group meets at a stranger's. The input is a list of deeds, as in live.h. Every
   operation ends once, shows what its contract says, and nothing is left. */
#include "fuzz.h"
#define REQUIRE FUZZ_CHECK
#include "../sockets.h"

static void fuzz_moment(void) {}

enum { SERVER, CLIENT, FILE_STORE, AGENT };
enum { LINES = 3, OPERATIONS = 512, DEEDS = 300, IDS = 8 };

static int role, ear = -1, lines[LINES], file = -1, other = -1;   /* other: the file, as another process has it open */
static uint16_t port, ear_port;
static tprpc_context *ctx;
static tprpc_store *store;
static tprpc_agent *agent;
static uint32_t current, cut;
static uint64_t ids[IDS], file_size;
static uint8_t kinds[IDS];
static uint32_t id_count;
static struct { uint8_t in[1 << 18]; size_t have; bool met; } inputs[LINES];
static struct { bool ended; int32_t kind; } operations[OPERATIONS];
static uint32_t operation_count, look_sum;

static const char *pick_key(void) {
    static char key[256];
    uint8_t how = fuzz_u8();
    if (how < 200) {
        static const char *const keys[] = {"a", "b", "tprpc/name/evil", "tprpc/name/me", "tprpc/rank/0", "tprpc/rank/1",
                                           "tprpc/left", "n"};
        return keys[how % 8];
    }
    memset(key, how, sizeof key);
    key[how == 255 ? 255 : how - 199] = 0;
    for (char *c = key; *c; c++) *c = 'k';
    return key;
}

/* ---- the user */

static void user_done(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    uintptr_t number = (uintptr_t)user;
    FUZZ_CHECK(!operations[number].ended);
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL));
    operations[number].ended = true;
    if (status != TPRPC_OK) return;
    FUZZ_CHECK(value != NULL || size == 0);
    FUZZ_CHECK(size <= TPR_WIRE_STORE_VALUE);
    for (size_t i = 0; i < size; i++) look_sum += ((const uint8_t *)value)[i];   /* all of it is there */
    if (operations[number].kind == TPRPC_STORE_ADD) FUZZ_CHECK(value && size == sizeof(int64_t));
    if (operations[number].kind == TPRPC_STORE_DELETE) FUZZ_CHECK(value && size == 1);
    if (operations[number].kind == TPRPC_STORE_GET) FUZZ_CHECK(value);
}

static void user_asks(void) {
    static uint8_t bytes[70000];
    uint8_t how = fuzz_u8();
    const char *key = pick_key();
    size_t size = fuzz_size(how & 128 ? TPR_WIRE_STORE_VALUE : 100);
    void *number = (void *)(uintptr_t)operation_count;
    tprpc_status status;
    if (!store || operation_count == OPERATIONS) return;
    memset(bytes, how & 64 ? '7' : how, size);
    operations[operation_count].ended = false;
    operations[operation_count].kind = TPRPC_STORE_SET + how % 5;
    switch (operations[operation_count].kind) {
    case TPRPC_STORE_SET: status = tprpc_store_set(store, key, bytes, size, user_done, number); break;
    case TPRPC_STORE_GET:
        status = tprpc_store_get(store, key, how & 32 ? TPRPC_NOW : how & 16 ? 5 : TPRPC_FOREVER, user_done, number);
        break;
    case TPRPC_STORE_ADD: status = tprpc_store_add(store, key, (int64_t)fuzz_number(), user_done, number); break;
    case TPRPC_STORE_COMPARE_SET:
        status = tprpc_store_compare_set(store, key, how & 32 ? NULL : bytes, how & 32 ? 0 : size / 2, bytes, size,
                                         user_done, number);
        break;
    default: status = tprpc_store_delete(store, key, user_done, number); break;
    }
    FUZZ_CHECK(!operations[operation_count].ended);
    if (status == TPRPC_OK) operation_count++;
}

/* ---- the stranger's sockets */

static void line_close(uint32_t i, bool hard) {
    const struct linger at_once = {1, 0};
    if (lines[i] < 0) return;
    if (hard) setsockopt(lines[i], SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(lines[i]);
    lines[i] = -1;
    inputs[i].have = 0;
    inputs[i].met = false;
}

static void line_begin(void) {
    struct sockaddr_in in;
    for (uint32_t i = 0; i < LINES; i++) {
        if (lines[i] >= 0) continue;
        current = i;
        if (role != SERVER) {
            lines[i] = accept4(ear, NULL, NULL, SOCK_CLOEXEC);
            return;
        }
        lines[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        memset(&in, 0, sizeof in);
        in.sin_family = AF_INET;
        in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        in.sin_port = htons(port);
        if (connect(lines[i], (struct sockaddr *)(void *)&in, sizeof in) != 0) line_close(i, true);
        return;
    }
}

static void say(const void *bytes, size_t size) {
    const uint8_t *at = (const uint8_t *)bytes;
    for (uint32_t pieces = 0; size && lines[current] >= 0; pieces++) {
        size_t n = cut && pieces < 64 && cut < size ? cut : size;
        (void)!send(lines[current], at, n, MSG_DONTWAIT | MSG_NOSIGNAL);
        at += n;
        size -= n;
        if (size) fuzz_poll(ctx, 1);
    }
}

static void say_hello(uint8_t flags) {
    uint8_t hello[TPR_WIRE_STORE_HELLO];
    tpr_wire_store_write_hello(hello, flags & 1 ? (tprpc_status)fuzz_below(20) : TPRPC_OK);
    if (flags & 2) hello[fuzz_below(sizeof hello)] ^= fuzz_u8();
    say(hello, flags & 4 ? fuzz_below(sizeof hello) : sizeof hello);
}

static tpr_base_bytes some_bytes(uint8_t *room, size_t most) {
    tpr_base_bytes bytes;
    bytes.size = fuzz_size(most);
    bytes.data = room;
    memset(room, fuzz_u8(), bytes.size);
    return bytes;
}

/* A worker as the store has it, so that an agent that asks for one goes on. */
static tpr_base_bytes worker_bytes(uint8_t *room, size_t size) {
    static tpr_wire_worker worker;
    tpr_base_bytes bytes = {room, 0};
    uint8_t how = fuzz_u8();
    memset(&worker, 0, sizeof worker);
    worker.nonce = how & 1 ? fuzz_u64() : 1;
    worker.rank = how & 2 ? fuzz_u32() : how >> 6;
    worker.address_count = how >> 4 & 3;
    worker.space = worker.nonce;
    worker.process = how;
    snprintf(worker.name, sizeof worker.name, "%s", how & 4 ? "evil" : "me");
    for (uint32_t i = 0; i < worker.address_count; i++)
        snprintf(worker.addresses[i], sizeof worker.addresses[i], how & 8 ? "tcp://127.0.0.1:%u" : "tcp://%u", ear_port);
    worker.tells_devices = how & 1;
    worker.has_maps = how >> 1 & 1;
    worker.run_count = how >> 2 & 3;
    for (uint32_t i = 0; i < worker.run_count; i++) worker.runs[i].count = worker.runs[i].first = (uint32_t)how << i;
    bytes.size = tpr_wire_put_worker(room, size, &worker);
    return bytes;
}

/* Its device maps. */
static tpr_base_bytes mapped_bytes(uint8_t *room, size_t size) {
    tpr_base_bytes bytes = {room, 0};
    tpr_wire_map maps[20];
    tprpc_error outcome;
    uint8_t how = fuzz_u8();
    memset(&outcome, 0, sizeof outcome);
    memset(maps, how, sizeof maps);
    maps[0].rank = how & 1;
    outcome.status = how & 2 ? TPRPC_OK : (tprpc_status)(how >> 2);
    snprintf(outcome.text, sizeof outcome.text, "%d", how);
    bytes.size = tpr_wire_put_mapped(room, size, &outcome, maps, how & 15);
    return bytes;
}

static void say_frame(void) {
    static uint8_t bytes[4][1 << 17], out[1 << 19];
    tpr_wire_store_frame frame;
    uint8_t flags = fuzz_u8(), value = fuzz_u8();
    const char *key = pick_key();
    memset(&frame, 0, sizeof frame);
    frame.type = flags & 1 ? fuzz_u8() & 3 : role == SERVER ? TPR_WIRE_STORE_REQUEST : TPR_WIRE_STORE_REPLY;
    frame.kind = (uint8_t)(flags & 2 ? fuzz_u8() : 1 + value % 5);
    frame.flags = fuzz_u8() & 7;
    frame.status = flags & 4 ? fuzz_below(20) : 0;
    frame.id = flags & 8 || !id_count ? fuzz_u8() & 15 : ids[fuzz_u8() % (id_count < IDS ? id_count : IDS)];
    frame.delta = (int64_t)fuzz_number();
    frame.key.data = (const uint8_t *)key;
    frame.key.size = strlen(key);
    frame.value = some_bytes(bytes[1], value & 64 ? 70000 : 40);
    if (role != SERVER && value & 32) {
        frame.value.data = bytes[1];
        frame.value.size = 8;
    }
    if (role == AGENT && value & 16) frame.value = worker_bytes(bytes[1], sizeof bytes[1]);
    if (value & 128) frame.expected = some_bytes(bytes[2], 70000);
    if (flags & 16) frame.text = some_bytes(bytes[3], 300);
    tpr_wire_store_write(&frame, out);
    size_t size = tpr_wire_store_size(&frame);
    if (flags & 128) out[fuzz_below(48)] ^= fuzz_u8();
    say(out, size);
}

/* Reads what the other end says, to know what it asked for. reply: answers that as a good server would, with the bytes
   that the input chooses. */
static void hear(uint32_t i, bool reply) {
    ssize_t n;
    if (lines[i] < 0) return;
    n = recv(lines[i], inputs[i].in + inputs[i].have, sizeof inputs[i].in - inputs[i].have, MSG_DONTWAIT);
    if (n > 0) inputs[i].have += (size_t)n;
    for (;;) {
        size_t length = inputs[i].met ? 0 : TPR_WIRE_STORE_HELLO;
        tpr_wire_store_frame frame;
        if (!inputs[i].met && inputs[i].have < length) return;
        if (inputs[i].met && tpr_wire_store_split(inputs[i].in, inputs[i].have, &length) <= 0) return;
        if (inputs[i].met && tpr_wire_store_read(inputs[i].in, length, &frame) &&
            frame.type == TPR_WIRE_STORE_REQUEST) {
            kinds[id_count % IDS] = frame.kind;
            ids[id_count++ % IDS] = frame.id;
            if (reply) {
                static uint8_t room[1 << 11], out[1 << 12];
                tpr_wire_store_frame answer;
                memset(&answer, 0, sizeof answer);
                answer.type = TPR_WIRE_STORE_REPLY;
                answer.id = frame.id;
                answer.flags = TPR_WIRE_STORE_PRESENT;
                answer.value.data = room;
                memset(room, 0, 16);
                room[0] = (uint8_t)fuzz_below(4);
                answer.value.size = frame.kind == TPRPC_STORE_ADD ? 8 : frame.kind == TPRPC_STORE_DELETE ? 1 : 0;
                static const char maps[] = "tprpc/devices/";
                const bool asks_maps = frame.key.size > strlen(maps) && memcmp(frame.key.data, maps, strlen(maps)) == 0;
                if (frame.kind == TPRPC_STORE_GET)
                    answer.value = asks_maps ? mapped_bytes(room, sizeof room) : worker_bytes(room, sizeof room);
                if (frame.kind == TPRPC_STORE_COMPARE_SET && frame.value.size < sizeof room) {
                    memcpy(room, frame.value.data, frame.value.size);
                    answer.value.size = frame.value.size;
                    if (fuzz_u8() & 1) answer.value = worker_bytes(room, sizeof room);
                }
                if (frame.kind == TPRPC_STORE_SET) answer.flags = 0;
                tpr_wire_store_write(&answer, out);
                current = i;
                say(out, tpr_wire_store_size(&answer));
            }
        }
        inputs[i].met = true;
        inputs[i].have -= length;
        memmove(inputs[i].in, inputs[i].in + length, inputs[i].have);
    }
}

static void serve(void) {
    for (int i = 0; i < 6; i++) {
        if (lines[current] < 0) line_begin();
        if (lines[current] >= 0 && !inputs[current].met) say_hello(0);
        fuzz_poll(ctx, 1);
        for (uint32_t k = 0; k < LINES; k++) hear(k, role != SERVER);
    }
}

/* ---- the stranger's hand on the file */

static void file_deed(void) {
    static uint8_t record[TPR_WIRE_RECORD_MOST], bytes[70000];
    uint8_t how = fuzz_u8();
    const char *name = pick_key();
    tpr_base_bytes key = {(const uint8_t *)name, strlen(name)}, value;
    struct stat st;
    size_t size;
    FUZZ_CHECK(fstat(file, &st) == 0);
    file_size = (uint64_t)st.st_size;
    if (file_size > 4 << 20) return;
    switch (how & 7) {
    case 0: case 1: case 2:            /* a record, whole or cut, with one byte that may be wrong */
        value = some_bytes(bytes, how & 8 ? TPR_WIRE_STORE_VALUE : 100);
        if (how & 16) value.data = NULL, value.size = 0;
        size = tpr_wire_record_write(key, value, record);
        if (how & 32) record[fuzz_below((uint32_t)size)] ^= fuzz_u8();
        if (how & 64) tpr_base_store_le64(record, tpr_base_hash(record + 8, size - 8));
        if (how & 128) size = fuzz_below((uint32_t)size + 1);
        FUZZ_CHECK(pwrite(file, record, size, (off_t)file_size) >= 0);
        break;
    case 3:
        size = fuzz_size(600);
        { const uint8_t *raw = fuzz_bytes(&size); FUZZ_CHECK(pwrite(file, raw, size, (off_t)file_size) >= 0); }
        break;
    case 4: FUZZ_CHECK(ftruncate(file, how & 8 ? (off_t)fuzz_below(100) : st.st_size / 2) == 0); break;
    case 5:
        bytes[0] = fuzz_u8();
        FUZZ_CHECK(pwrite(file, bytes, 1, (off_t)(fuzz_u16() % (file_size + 1))) >= 0);
        break;
    case 6: (void)tpr_os_file_lock(other, how & 8); break;
    default: FUZZ_CHECK(pwrite(file, tpr_wire_record_magic, how & 8 ? 8 : fuzz_below(9), 0) >= 0); break;
    }
}

static void store_begin(void) {
    char url[64];
    tprpc_store_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.url = url;
    desc.timeout_ms = 100;
    desc.serve = role == SERVER;
    for (int i = 0; i < 10 && !store; i++) {
        if (i || !port) port = socket_free_port();
        snprintf(url, sizeof url, "tcp://127.0.0.1:%u", role == SERVER ? port : ear_port);
        if (role == FILE_STORE) snprintf(url, sizeof url, "file:///proc/self/fd/%d", file);
        if (tprpc_store_open(ctx, &desc, &store, NULL) != TPRPC_OK) FUZZ_CHECK(role != CLIENT && !store);
    }
    FUZZ_CHECK(store || role == FILE_STORE);   /* a file that is no store is refused */
}

/* ---- an agent */

static void agent_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    uintptr_t number = (uintptr_t)user;
    (void)reply;
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL));
    FUZZ_CHECK(!operations[number].ended);
    operations[number].ended = true;
}

static void agent_begin(uint8_t how) {
    char url[64];
    tprpc_agent_desc desc;
    memset(&desc, 0, sizeof desc);
    snprintf(url, sizeof url, "tcp://127.0.0.1:%u", ear_port);
    desc.context = ctx;
    desc.name = "me";
    desc.init_method = url;
    desc.world_size = how & 1 ? 3 : 0;
    desc.rank = how & 1 ? 1 : 0;
    desc.start_timeout_ms = 1000;
    desc.timeout_ms = 1000;
    FUZZ_CHECK(tprpc_agent_create(&desc, &agent, NULL) == TPRPC_OK);
    if (how & 64) {                    /* a map of its own: to who may not be there, to what he may not have */
        const tprpc_device host = {TPRPC_CPU, 0}, far = {TPRPC_DEVICE_USER, 3};
        FUZZ_CHECK(tprpc_agent_set_device_map(agent, how & 32 ? "evil" : NULL, &host, how & 16 ? &host : &far, 1,
                                              NULL) == TPRPC_OK);
    }
    operations[operation_count].ended = false;
    if (tprpc_agent_start(agent, agent_done, (void *)(uintptr_t)operation_count, NULL) == TPRPC_OK) operation_count++;
    fuzz_poll(ctx, 1);
}

static void agent_deed(void) {
    tprpc_call_options options;
    memset(&options, 0, sizeof options);
    if (operation_count == OPERATIONS) return;
    operations[operation_count].ended = false;
    options.on_done = agent_done;
    options.user = (void *)(uintptr_t)operation_count;
    switch (fuzz_u8() & 7) {
    case 0: tprpc_agent_leave(agent, 1 + fuzz_u8(), NULL); break;
    case 1: tprpc_agent_wait_ready(agent, 1 + fuzz_u8(), NULL); break;
    default:
        if (tprpc_call(agent, "evil", "echo", NULL, &options, NULL) == TPRPC_OK) operation_count++;
        break;
    }
}

/* ---- the whole */

static void deed(void) {
    uint8_t which = fuzz_u8();
    size_t size;
    switch (which % 20) {
    case 0: fuzz_poll(ctx, 1 + fuzz_below(8)); break;
    case 1:
        size = fuzz_size(300);
        { const uint8_t *bytes = fuzz_bytes(&size); say(bytes, size); }
        break;
    case 2: say_hello(fuzz_u8()); break;
    case 3: case 4: case 5: if (role == FILE_STORE) file_deed(); else say_frame(); break;
    case 6: case 7: case 8: if (agent) agent_deed(); else user_asks(); break;
    case 9: for (uint32_t i = 0; i < LINES; i++) hear(i, false); break;
    case 10: fuzz_now_us += (int64_t)1 << fuzz_below(26); fuzz_poll(ctx, 1); break;
    case 11: case 12: if (role == FILE_STORE) fuzz_poll(ctx, 1); else serve(); break;
    case 13: line_begin(); break;
    case 14:
        size = fuzz_u8();
        if (size & 1 && lines[current] >= 0) shutdown(lines[current], SHUT_WR);
        else line_close(current, size & 2);
        break;
    case 15: current = fuzz_below(LINES); break;
    case 16:
        size = fuzz_u8();
        cut = size & 1 ? fuzz_u8() : 0;
        fuzz_piece = size & 2 ? 1 + fuzz_u8() : 0;
        if (size & 16) fuzz_alloc_fails = 1 + fuzz_u8();
        break;
    case 17:
        if (role != FILE_STORE || !(fuzz_u8() & 1)) break;
        tprpc_store_close(store);
        store = NULL;
        store_begin();
        break;
    default: serve(); break;
    }
}

static void begin_once(void) {
    struct sockaddr_in in;
    socklen_t size = sizeof in;
    if (ear >= 0) return;
    ear = tpr_os_socket(AF_INET);
    memset(&in, 0, sizeof in);
    in.sin_family = AF_INET;
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    FUZZ_CHECK(bind(ear, (struct sockaddr *)(void *)&in, sizeof in) == 0 && listen(ear, 16) == 0);
    FUZZ_CHECK(getsockname(ear, (struct sockaddr *)(void *)&in, &size) == 0);
    ear_port = ntohs(in.sin_port);
}

static void fuzz_one(void) {
    begin_once();
    const int fds = fuzz_count_fds();
    uint8_t how = fuzz_u8();
    role = how & 3;
    store = NULL;
    agent = NULL;
    operation_count = id_count = cut = current = 0;
    for (uint32_t i = 0; i < LINES; i++) {
        lines[i] = -1;
        inputs[i].have = 0;
        inputs[i].met = false;
    }
    ctx = fuzz_context("tcp");
    if (role == FILE_STORE) {
        char path[40];
        file = memfd_create("fuzz", MFD_CLOEXEC);
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
        other = open(path, O_RDWR | O_CLOEXEC);
        FUZZ_CHECK(file >= 0 && other >= 0);
        if (how & 4) for (int i = 0; i < (how >> 5); i++) file_deed();
    }
    if (role == AGENT) agent_begin(how >> 3);
    else store_begin();
    if (role == SERVER) line_begin();
    if (how & 8) serve();
    for (int i = 0; i < DEEDS && fuzz_left(); i++) deed();
    fuzz_alloc_fails = 0;
    if (how & 16) for (uint32_t i = 0; i < LINES; i++) line_close(i, true);
    if (how & 32) fuzz_poll(ctx, 3);
    if (store && how & 64) tprpc_store_close(store);
    if (agent) FUZZ_CHECK(tprpc_agent_destroy(agent) == TPRPC_OK);
    FUZZ_CHECK(tprpc_context_destroy(ctx) == TPRPC_OK);
    for (uint32_t i = 0; i < LINES; i++) line_close(i, true);
    for (int fd; (fd = accept4(ear, NULL, NULL, SOCK_CLOEXEC)) >= 0;) close(fd);
    if (role == FILE_STORE) {
        close(file);
        close(other);
    }
    for (uint32_t i = 0; i < operation_count; i++) FUZZ_CHECK(operations[i].ended);
    FUZZ_CHECK(fuzz_count_fds() == fds);
}
