/* Recorded sessions of what one connection with nothing but messages does not show (tests/wire/README.md): a pipe that
   moves to a better transport, and an agent that calls another. Replayed against today's ends, which must say what was
   said then, to the byte, but for what only the moment knows. TPRPC_WIRE_RECORD=FOLDER build/tests/in_wire_sessions
   record writes new recordings. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "agent_help.h"
#include "agent_hold.h"
#include "wire_tape.h"

enum { LINKS = 2, MOVE_BODY = 36, PORT_DIGITS = 5 };

/* ---- a session: live ends, 0 who connects and 1 who listens, as far as no tape stands in for them ---- */

typedef struct session {
    tape *t;
    int plays;                         /* the end that the tape stands in for, -1: none, all goes through to be taped */
    size_t at;
    int listener[LINKS], fd[LINKS][2]; /* of the end that listens, or of who goes between; -1: none yet */
    uint16_t port[LINKS], to[LINKS];   /* of `listener`; where the live end listens */
    splitter *in[LINKS][2];
    uint8_t token[16];                 /* of the pipe: the live listener's */
    uint8_t taped_move[MOVE_BODY], move[MOVE_BODY];     /* what the tape's connector says, and what is said now */
    tprpc_context *ctx[2];
    void (*run)(struct session *s, int side);           /* what the live end does, until both have done it all */
    side agents[2];
    group g;
} session;

static tpr_wire_hello *hello_of(const uint8_t *frame, uint32_t size) {
    tpr_wire_hello *hello = (tpr_wire_hello *)calloc(1, sizeof *hello);
    REQUIRE(hello && tpr_wire_read_hello(frame + TPR_WIRE_HEADER, size - TPR_WIRE_HEADER, hello));
    return hello;
}

/* The address of the better transport in a listener's hello; NULL: there is none. */
static char *better_of(tpr_wire_hello *hello) {
    for (uint32_t i = 0; i < hello->offer_count; i++) {
        tpr_wire_offer *offer = &hello->offers[i];
        if (strcmp(offer->name, "better") == 0 && offer->address[0]) return offer->address;
    }
    return NULL;
}

static void replace(uint8_t *bytes, size_t size, const void *from, const void *to, size_t n) {
    uint8_t *at = (uint8_t *)memmem(bytes, size, from, n);
    REQUIRE(at != NULL);
    memcpy(at, to, n);
}

/* A listener's hello: the port of the better transport becomes ours. Returns which it was. */
static uint16_t own_port(session *s, uint8_t *frame, uint32_t size) {
    tpr_wire_hello *hello = hello_of(frame, size);
    char *address = better_of(hello), *digits, own[8];
    uint16_t port = 0;
    if (address) {
        digits = strrchr(address, ':') + 1;
        port = (uint16_t)atoi(digits);
        snprintf(own, sizeof own, "%u", (unsigned)s->port[1]);
        REQUIRE(strlen(digits) == PORT_DIGITS && strlen(own) == PORT_DIGITS);
        replace(frame, size, digits, own, PORT_DIGITS);
    }
    free(hello);
    return port;
}

/* ---- recording: goes between the two */

static void between_turn(session *s) {
    for (int link = 0; link < LINKS; link++) {
        const uint8_t *frame;
        uint32_t size;
        if (s->fd[link][0] < 0) {
            s->fd[link][0] = accept4(s->listener[link], NULL, NULL, SOCK_CLOEXEC);
            if (s->fd[link][0] < 0) continue;
            s->fd[link][1] = socket_connect(s->to[link]);
        }
        for (int end = 0; end < 2; end++) {
            splitter *in = s->in[link][end];
            if (!split_fill(in, s->fd[link][end])) shutdown(s->fd[link][1 - end], SHUT_WR);
            while ((frame = split_next(in, &size)) != NULL) {
                if (end && frame[4] == TPR_WIRE_HELLO) s->to[1] = own_port(s, in->bytes, size);
                tape_add(s->t, 2 * link + end, frame, size);
                REQUIRE(send(s->fd[link][1 - end], frame, size, MSG_NOSIGNAL) == (ssize_t)size || errno == EPIPE ||
                        errno == ECONNRESET);
                split_drop(in, size);
            }
        }
    }
}

/* ---- replaying: the tape stands in for one end */

static bool link_open(session *s, int link) {
    int *fd = &s->fd[link][0];
    if (*fd < 0 && s->plays == 0) *fd = socket_connect(s->to[link]);
    if (*fd < 0) *fd = accept4(s->listener[link], NULL, NULL, SOCK_CLOEXEC);
    return *fd >= 0;
}

/* What is of the moment is put in: the port of the better transport; the token and the nonce of a move. */
static void play_frame(session *s, const taped *f) {
    uint8_t *bytes = (uint8_t *)malloc(f->size);
    REQUIRE(bytes != NULL);
    memcpy(bytes, f->bytes, f->size);
    if (f->bytes[4] == TPR_WIRE_HELLO && s->plays == 1) own_port(s, bytes, f->size);
    if (f->bytes[4] == TPR_WIRE_MOVE) {
        tpr_wire_hello *theirs = NULL;
        for (size_t i = 0; !theirs; i++)
            if (s->t->frames[i].way == 1) theirs = hello_of(s->t->frames[i].bytes, s->t->frames[i].size);
        replace(bytes, f->size, theirs->token, s->token, 16);
        free(theirs);
        memcpy(s->taped_move, f->bytes + f->size - MOVE_BODY, MOVE_BODY);
        memcpy(s->move, bytes + f->size - MOVE_BODY, MOVE_BODY);
    }
    if (f->bytes[4] == TPR_WIRE_MOVED) replace(bytes, f->size, s->taped_move, s->move, MOVE_BODY);
    REQUIRE(send(s->fd[f->way >> 1][0], bytes, f->size, MSG_NOSIGNAL) == (ssize_t)f->size);
    free(bytes);
}

/* What the live end says is what was said. A hello has much of its own, which in_wire.c's tests decode. */
static void check_frame(session *s, const taped *f, const uint8_t *frame, uint32_t size) {
    uint8_t *want = (uint8_t *)malloc(f->size);
    REQUIRE(want != NULL);
    memcpy(want, f->bytes, f->size);
    REQUIRE_EQ_INT(frame[4], f->bytes[4]);
    if (frame[4] == TPR_WIRE_HELLO) {
        tpr_wire_hello *hello = hello_of(frame, size);
        memcpy(s->token, hello->token, 16);
        if (s->plays == 0 && better_of(hello)) s->to[1] = (uint16_t)atoi(strrchr(better_of(hello), ':') + 1);
        free(hello);
        free(want);
        return;
    }
    REQUIRE_EQ_INT(size, f->size);
    if (frame[4] == TPR_WIRE_MOVE) {   /* the nonce is its own, the token that of the tape's hello */
        memcpy(s->taped_move, f->bytes + size - MOVE_BODY, MOVE_BODY);
        memcpy(s->move, frame + size - MOVE_BODY, MOVE_BODY);
        memcpy(want + size - 16, frame + size - 16, 16);
    }
    if (frame[4] == TPR_WIRE_MOVED) replace(want, size, s->taped_move, s->move, MOVE_BODY);
    CHECK_MEM(frame, want, size);
    free(want);
}

static void player_turn(session *s) {
    for (; s->at < s->t->count; s->at++) {
        const taped *f = &s->t->frames[s->at];
        splitter *in = s->in[f->way >> 1][0];
        const uint8_t *frame;
        uint32_t size;
        if (!link_open(s, f->way >> 1)) return;
        if ((f->way & 1) == s->plays) {
            play_frame(s, f);
            continue;
        }
        split_fill(in, s->fd[f->way >> 1][0]);
        if ((frame = split_next(in, &size)) == NULL) return;
        fprintf(stderr, "frame %d\n", (int)s->at);
        check_frame(s, f, frame, size);
        split_drop(in, size);
    }
}

/* ---- both */

static void session_turn(session *s) {
    for (int i = 0; i < 2; i++) if (s->ctx[i]) tprpc_poll(s->ctx[i], TPRPC_NOW, 0);
    if (s->plays < 0) between_turn(s);
    else player_turn(s);
}

static void session_until(session *s, int *counter, int least) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (LOAD(counter) < least) {
        REQUIRE(test_now_us() < end);
        session_turn(s);
    }
}

static session *session_new(tape *t, int plays) {
    session *s = (session *)calloc(1, sizeof *s);
    REQUIRE(s != NULL);
    s->t = t;
    s->plays = plays;
    for (int i = 0; i < LINKS; i++) {
        s->listener[i] = socket_listen(&s->port[i]);
        fcntl(s->listener[i], F_SETFL, O_NONBLOCK);
        for (int k = 0; k < 2; k++) {
            s->fd[i][k] = -1;
            s->in[i][k] = (splitter *)calloc(1, sizeof(splitter));
            REQUIRE(s->in[i][k] != NULL);
        }
    }
    return s;
}

/* What is under way still arrives; a tape is then over, and its last frames were right. */
static void session_end(session *s) {
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    if (s->plays < 0) for (int i = 0; i < 100; i++) session_turn(s);
    while (s->plays >= 0 && s->at < s->t->count && test_now_us() < end) session_turn(s);
    if (s->plays >= 0) CHECK_EQ_INT(s->at, s->t->count);
    for (int i = 0; i < LINKS; i++) {
        close(s->listener[i]);
        for (int k = 0; k < 2; k++) {
            if (s->fd[i][k] >= 0) close(s->fd[i][k]);
            free(s->in[i][k]);
        }
    }
    free(s);
}

/* ---- a pipe that moves ---- */

static int move_accepted, move_written, move_read, move_ended;
static tprpc_pipe *move_incoming;
static uint8_t move_bytes[9001];       /* more than goes within a message */

static void on_move_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    (void)error; (void)user;
    CHECK_EQ_INT(status, TPRPC_OK);
    move_incoming = pipe;
    move_accepted++;
}

static void on_move_written(tprpc_status status, const tprpc_error *error, void *user) {
    (void)error; (void)user;
    CHECK_EQ_INT(status, TPRPC_OK);
    move_written++;
}

static void on_move_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)error; (void)user;
    CHECK_EQ_INT(status, TPRPC_OK);
    REQUIRE(message && message->payload_count == 2);
    CHECK_EQ_INT(message->metadata_size, 5);
    CHECK_MEM(message->metadata, "moved", 5);
    CHECK_EQ_INT(message->payloads[0].size, 3);
    CHECK_MEM(message->payloads[0].data, "abc", 3);
    REQUIRE_EQ_INT(message->payloads[1].size, sizeof move_bytes);
    CHECK_MEM(message->payloads[1].data, move_bytes, sizeof move_bytes);
    move_read++;
}

static void on_move_ended(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(status, TPRPC_ERROR_PEER);
    if (error) CHECK_CONTAINS(error->text, "closed the pipe");
    move_ended++;
}

static void move_write(session *s, tprpc_pipe *pipe) {
    tprpc_payload payloads[2] = {{"abc", 3, NULL, 0}, {move_bytes, sizeof move_bytes, NULL, 0}};
    tprpc_message message = text_of("moved");
    int before = move_written;
    message.payloads = payloads;
    message.payload_count = 2;
    REQUIRE_EQ_INT(tprpc_pipe_write(pipe, &message, on_move_written, NULL), TPRPC_OK);
    session_until(s, &move_written, before + 1);
}

static void check_moved(tprpc_pipe *pipe) {
    tprpc_pipe_info info;
    REQUIRE_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "better");
}

/* tcp under another name, which is preferred: what moves is seen, and goes by sockets that a tape can stand in at. */
static void move_run(session *s) {
    tprpc_backend better = tpr_tcp_backend;
    const tprpc_backend *list = &better;
    const char *addresses[2] = {"tcp://127.0.0.1:0", "better://127.0.0.1:0"};
    tprpc_context_desc desc = {0};
    tprpc_listener_desc listening = {0};
    tprpc_pipe_desc connecting = {0};
    tprpc_listener *listener = NULL;
    tprpc_pipe *pipe = NULL;
    char address[64];
    better.name = "better";
    desc.backends = &list;
    desc.backend_count = 1;
    desc.transports = "better,tcp";
    desc.channels = "basic";
    for (int i = 0; i < 2; i++)
        if (s->plays != i) REQUIRE_EQ_INT(tprpc_context_create(&desc, &s->ctx[i], NULL), TPRPC_OK);
    if (s->ctx[1]) {
        listening.addresses = addresses;
        listening.address_count = 2;
        REQUIRE_EQ_INT(tprpc_listen(s->ctx[1], &listening, &listener, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_accept(listener, on_move_accepted, NULL), TPRPC_OK);
        s->to[0] = (uint16_t)atoi(strrchr(tprpc_listener_address(listener, "tcp"), ':') + 1);
    }
    if (s->ctx[0]) {
        snprintf(address, sizeof address, "tcp://127.0.0.1:%u", (unsigned)s->port[0]);
        connecting.address = address;
        REQUIRE_EQ_INT(tprpc_connect(s->ctx[0], &connecting, &pipe, NULL), TPRPC_OK);
    }
    if (s->ctx[1]) {
        session_until(s, &move_accepted, 1);
        REQUIRE_EQ_INT(tprpc_pipe_read(move_incoming, NULL, on_move_read, NULL), TPRPC_OK);
    }
    if (pipe) move_write(s, pipe);
    if (pipe) REQUIRE_EQ_INT(tprpc_pipe_read(pipe, NULL, on_move_read, NULL), TPRPC_OK);
    if (s->ctx[1]) {
        session_until(s, &move_read, 1);
        move_write(s, move_incoming);
        check_moved(move_incoming);
        if (tprpc_pipe_read(move_incoming, NULL, on_move_ended, NULL) != TPRPC_OK) move_ended++;   /* a bye was there */
    }
    if (pipe) {
        session_until(s, &move_read, s->ctx[1] ? 2 : 1);
        check_moved(pipe);
        tprpc_pipe_close(pipe);
    }
    if (s->ctx[1]) {
        session_until(s, &move_ended, 1);
        tprpc_pipe_close(move_incoming);
        tprpc_listener_close(listener);
    }
    for (int i = 0; i < 2; i++) CHECK_EQ_INT(tprpc_context_destroy(s->ctx[i]), TPRPC_OK);
    s->ctx[0] = s->ctx[1] = NULL;
}

/* ---- an agent that calls another: ann is 0, bob 1 ---- */

static float numbers[6] = {1, 2, 3, 4, 5, 6};
static int notes, cancels;

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    CHECK_STR(tprpc_request_caller(request), "ann");
    CHECK_EQ_INT(tprpc_reply(request, message), TPRPC_OK);
}

static void on_refuse(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    CHECK_EQ_INT(tprpc_fail(request, -7, "not today"), TPRPC_OK);
}

static void on_note(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request; (void)user;
    CHECK_EQ_INT(message->metadata_size, 4);
    notes++;
}

static void on_free(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    while (kept_count) {
        cancels += tprpc_request_cancelled(kept[--kept_count]);
        tprpc_reply(kept[kept_count], NULL);
    }
    CHECK_EQ_INT(tprpc_reply(request, NULL), TPRPC_OK);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0}, {"refuse", on_refuse, NULL, NULL, NULL, 0},
    {"note", on_note, NULL, NULL, NULL, 0}, {"hold", on_hold, NULL, NULL, NULL, 0},
    {"free", on_free, NULL, NULL, NULL, 0}, {0},
};

typedef struct answer { int count; tprpc_status status; int32_t code; char text[256]; bool same; } answer;

static void on_answer(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    answer *a = (answer *)user;
    const tprpc_tensor *t = reply && reply->tensor_count == 1 ? reply->tensors : NULL;
    a->count++;
    a->status = status;
    if (error) a->code = error->user_code;
    if (error) snprintf(a->text, sizeof a->text, "%s", error->text);
    a->same = t && t->dtype == TPRPC_F32 && t->ndim == 2 && t->shape[0] == 2 && t->shape[1] == 3 &&
              t->size == sizeof numbers && memcmp(t->data, numbers, sizeof numbers) == 0 &&
              reply->metadata_size == 4 && memcmp(reply->metadata, "ping", 4) == 0;
}

static answer ask(session *s, const char *method, const tprpc_message *message, tprpc_status status) {
    tprpc_call_options options = {0};
    answer a = {0};
    options.on_done = on_answer;
    options.user = &a;
    options.lane = 3;
    REQUIRE_EQ_INT(tprpc_call(s->agents[0].agent, "bob", method, message, &options, NULL), TPRPC_OK);
    session_until(s, &a.count, 1);
    CHECK_EQ_INT(a.status, status);
    return a;
}

static void ann_calls(session *s) {
    tprpc_tensor tensor = bytes_of(numbers, sizeof numbers);
    tprpc_message message = text_of("ping"), note = text_of("note"), large;
    tprpc_call_options options = {0};
    tprpc_future future;
    tprpc_tensor zeros = bytes_of(move_bytes, sizeof move_bytes);
    answer a, held = {0};
    tensor.dtype = TPRPC_F32;
    tensor.ndim = 2;
    tensor.shape[0] = 2;
    tensor.shape[1] = 3;
    message.tensors = &tensor;
    message.tensor_count = 1;
    a = ask(s, "echo", &message, TPRPC_OK);
    CHECK(a.same);
    a = ask(s, "refuse", NULL, TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(a.code, -7);
    CHECK_CONTAINS(a.text, "not today");
    a = ask(s, "none", NULL, TPRPC_ERROR_NO_METHOD);
    options.flags = TPRPC_CALL_ONE_WAY;
    REQUIRE_EQ_INT(tprpc_call(s->agents[0].agent, "bob", "note", &note, &options, NULL), TPRPC_OK);
    options.flags = 0;
    options.timeout_ms = TPRPC_FOREVER;
    options.on_done = on_answer;
    options.user = &held;
    REQUIRE_EQ_INT(tprpc_call(s->agents[0].agent, "bob", "hold", NULL, &options, &future), TPRPC_OK);
    ask(s, "echo", &message, TPRPC_OK);          /* bob is behind the hold */
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    session_until(s, &held.count, 1);
    CHECK_EQ_INT(held.status, TPRPC_ERROR_CANCELLED);
    tprpc_future_release(future);
    ask(s, "free", NULL, TPRPC_OK);
    large = tensors_of(&zeros, 1);
    ask(s, "echo", &large, TPRPC_OK);
}

static void dynamic(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s;
    context->channels = "basic";
    agent->rank = agent->world_size = 0;
}

/* Bob is where the session's own socket listens. */
static void publish_bob(session *s) {
    tprpc_store_request request = {0};
    tpr_wire_worker worker;
    uint8_t value[1400];
    memset(&worker, 0, sizeof worker);
    snprintf(worker.name, sizeof worker.name, "bob");
    worker.address_count = 1;
    snprintf(worker.addresses[0], sizeof worker.addresses[0], "tcp://127.0.0.1:%u", (unsigned)s->port[0]);
    request.size = sizeof request;
    request.kind = TPRPC_STORE_SET;
    request.key = "tprpc/name/bob";
    request.value = value;
    request.value_size = tpr_wire_put_worker(value, sizeof value, &worker);
    REQUIRE_EQ_INT(tprpc_store_wait(s->g.store, &request, WAIT_MS, NULL, NULL, NULL), TPRPC_OK);
}

static void on_started(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (error) fprintf(stderr, "%s\n", error->text);
    CHECK_EQ_INT(status, TPRPC_OK);
    ADD((int *)user, 1);
}

static void call_run(session *s) {
    static const mode polled = {"tcp_inside", "tcp", 0, false};
    int started = 0, live = 0, over = 1;
    s->agents[0].mode = &polled;
    group_open(&s->g, s->agents, 2);
    for (int i = 1; i >= 0; i--) {
        side *a = &s->agents[i];
        if (s->plays == i) continue;
        a->tune = dynamic;
        a->methods = i ? methods : NULL;
        side_open(a);
        s->ctx[i] = a->ctx;
        live++;
        REQUIRE_EQ_INT(tprpc_agent_start(a->agent, on_started, &started, NULL), TPRPC_OK);
    }
    for (int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000; LOAD(&started) < live;) {   /* nothing is played yet */
        REQUIRE(test_now_us() < end);
        for (int i = 0; i < 2; i++) if (s->ctx[i]) tprpc_poll(s->ctx[i], TPRPC_NOW, 0);
    }
    if (s->ctx[1]) s->to[0] = (uint16_t)atoi(strrchr(s->agents[1].agent->self.addresses[0], ':') + 1);
    publish_bob(s);
    if (s->ctx[0]) {
        ann_calls(s);
        side_leave(&s->agents[0]);
        side_close(&s->agents[0]);
        s->ctx[0] = NULL;
    }
    if (s->ctx[1]) {
        tprpc_stats stats;
        int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
        do {                           /* until ann has gone */
            session_turn(s);
            stats = stats_of(&s->agents[1]);
            over = stats.requests >= 8 && stats.pipes == 0;
        } while (!over && test_now_us() < end);
        CHECK(over);
        CHECK_EQ_INT(notes, 1);
        CHECK_EQ_INT(cancels, 1);
        side_close(&s->agents[1]);
        s->ctx[1] = NULL;
    }
    group_close(&s->g);
}

/* ---- */

static const struct { const char *name; void (*run)(session *s); } sessions[] = {
    {"move", move_run}, {"agent", call_run}};
enum { SESSIONS = sizeof sessions / sizeof sessions[0] };

static void file_of(char *out, size_t size, size_t which) {
    snprintf(out, size, "%s-%d.%d.frames", sessions[which].name, TPR_WIRE_MAJOR, TPR_WIRE_MINOR);
}

static void run_session(void (*run)(session *), tape *t, int plays) {
    session *s = session_new(t, plays);
    move_accepted = move_written = move_read = move_ended = notes = cancels = 0;
    if (!shared) share();
    run(s);
    session_end(s);
}

/* Everything that is to be shown is in them. */
TEST(record) {
    const char *folder = getenv("TPRPC_WIRE_RECORD");
    for (size_t k = 0; k < SESSIONS; k++) {
        tape *t = tape_new();
        int moves = 0, calls[2][8] = {{0}};
        char name[40], path[300];
        run_session(sessions[k].run, t, -1);
        for (size_t i = 0; i < t->count; i++) {
            const uint8_t *at = t->frames[i].bytes;
            moves += at[4] == TPR_WIRE_MOVE || at[4] == TPR_WIRE_MOVED;
            if (at[4] == TPR_WIRE_MESSAGE && at[17] == TPR_WIRE_CALL_BYTES) calls[t->frames[i].way & 1][at[24] & 7]++;
        }
        CHECK_EQ_INT(moves, k == 0 ? 2 : 0);
        for (int kind = TPR_WIRE_CALL; k == 1 && kind <= TPR_WIRE_INTRO; kind++)
            CHECK(calls[kind == TPR_WIRE_REPLY || kind == TPR_WIRE_ERROR][kind] > 0);
        if (folder) {
            file_of(name, sizeof name, k);
            snprintf(path, sizeof path, "%s/%s", folder, name);
            tape_write(t, path);
        }
        tape_free(t);
    }
}

typedef struct replayed { void (*run)(session *s); int plays; char file[60]; } replayed;

static void replay(void *arg) {
    const replayed *r = (const replayed *)arg;
    int fds = test_count_fds();
    tape *t = tape_of(r->file);
    run_session(r->run, t, r->plays);
    tape_free(t);
    CHECK_EQ_INT(test_count_fds(), fds);
}

static void no_recording(void *arg) {
    fprintf(stderr, "tests/wire has no recording %s\n", ((const replayed *)arg)->file);
    CHECK(0);
}

/* Those of every version, and there are some of this one. */
TESTS(replays) {
    static replayed all[100];
    const char *slash = strrchr(__FILE__, '/');
    struct dirent **entries = NULL;
    char path[300], name[120];
    size_t count = 0;
    snprintf(path, sizeof path, "%.*swire", slash ? (int)(slash - __FILE__ + 1) : 0, __FILE__);
    int found = scandir(path, &entries, NULL, alphasort);
    for (size_t k = 0; k < SESSIONS; k++) {
        const size_t length = strlen(sessions[k].name);
        bool mine = false;
        char own[40];
        file_of(own, sizeof own, k);
        for (int i = 0; i < found; i++) {
            const char *file = entries[i]->d_name, *end = strrchr(file, '.');
            if (strncmp(file, sessions[k].name, length) != 0 || !end || strcmp(end, ".frames") != 0) continue;
            mine |= strcmp(file, own) == 0;
            for (int plays = 0; plays < 2 && count < 99; plays++) {
                replayed *r = &all[count++];
                r->run = sessions[k].run;
                r->plays = plays;
                snprintf(r->file, sizeof r->file, "%.59s", file);
                snprintf(name, sizeof name, "replay_%s_of_%s", plays ? "listener" : "connector", r->file);
                test_add(name, replay, r, 60);
            }
        }
        if (mine || count == 100) continue;
        snprintf(all[count].file, sizeof all[count].file, "%s", own);
        test_add(own, no_recording, &all[count++], 10);
    }
    for (int i = 0; i < found; i++) free(entries[i]);
    free(entries);
}
