/* A peer made by hand: it speaks the handshake with the library's own writers over a bare socket, then sends what no
   peer of ours would. Whatever it sends, the pipe ends with an error that says so, once, and the listener goes on. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "pipe_common.h"
#include "forge.h"

typedef struct server { side s; const char *address; } server;

static void server_open(server *v) {
    tprpc_context_desc desc;
    memset(v, 0, sizeof *v);
    memset(&desc, 0, sizeof desc);
    desc.transports = "tcp";
    desc.limits.memory_bytes = 64 << 20;         /* what is announced must not be allocated unseen */
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &v->s.ctx, NULL), TPRPC_OK);
    v->s.listener = listen_on(v->s.ctx, "tcp://127.0.0.1:0", 0);
    v->address = tprpc_listener_address(v->s.listener, NULL);
}

/* Sends a script to the server; open: the pipe comes to be, and its read ends as expected. */
static void play(server *v, const script *s, tprpc_status expected, int hang_up) {
    accepting accept;
    outcome got, again;
    memset(&accept, 0, sizeof accept);
    memset(&got, 0, sizeof got);
    memset(&again, 0, sizeof again);
    CHECK_EQ_INT(tprpc_accept(v->s.listener, on_accepted, &accept), TPRPC_OK);
    int fd = socket_connect_to(v->address);
    CHECK_EQ_INT(send(fd, s->bytes, s->size, MSG_NOSIGNAL), s->size);
    if (hang_up) shutdown(fd, SHUT_WR);          /* whose socket it is can be told while it is there */
    WAIT(&v->s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    tprpc_status status = tprpc_pipe_read(accept.pipe, NULL, on_read, &got);
    if (status == TPRPC_OK) {
        WAIT(&v->s, got.runs, 1);
        status = got.status;
    }
    if (!CHECK_EQ_INT(status, expected)) fprintf(stderr, "%s\n", got.text);
    bool begun = status == TPRPC_OK && tprpc_pipe_read(accept.pipe, NULL, on_read, &again) == TPRPC_OK;
    tprpc_pipe_close(accept.pipe);
    if (begun) WAIT(&v->s, again.runs, 1);
    close(fd);
}

/* The script as it should be: the pipe opens and the message is read. Without this the rest would prove nothing. */
TEST(good_script) {
    static script s;
    server v;
    item items[2] = {{5, 3, TPR_WIRE_INLINE}, {0, 0, TPR_WIRE_INLINE}};
    server_open(&v);
    put_handshake(&s);
    put_message(&s, 7, 2, 0, 0, 0, items, 2, 7 + 3 + 5);
    play(&v, &s, TPRPC_OK, 0);
    put_frame(&s, TPR_WIRE_MESSAGE, 0, 0, s.bytes, 3);   /* and a broken one behind: the first is read */
    play(&v, &s, TPRPC_OK, 0);
    CHECK_EQ_INT(tprpc_context_destroy(v.s.ctx), TPRPC_OK);
}

enum { BROKEN = 40 };
/* Adds broken frame number i. 0: there is none of that number. */
static int put_broken(script *s, int i) {
    static uint8_t zeros[20000];
    static const uint8_t huge[8] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f};
    item one = {1, 0, TPR_WIRE_INLINE};
    switch (i) {
    case 0: put_frame(s, 0, 0, 0, zeros, 10); break;                     /* kinds that are none */
    case 1: put_frame(s, 10, 0, 0, zeros, 10); break;
    case 2: put_frame(s, 255, 0, 0, zeros, 0); break;
    case 3: put_frame(s, TPR_WIRE_MESSAGE, 1, 0, zeros, 16); break;      /* handles where none may be */
    case 4: put_frame(s, TPR_WIRE_CHANNEL, 9, 0, zeros, 16); break;
    case 5: put_frame(s, TPR_WIRE_MESSAGE, 0, 0, zeros, 15); break;      /* too short for what it is */
    case 6: put_frame(s, TPR_WIRE_DATA, 0, 0, zeros, 16); break;
    case 7: put_frame(s, TPR_WIRE_CREDIT, 0, 0, zeros, 7); break;
    case 8: put_frame(s, TPR_WIRE_BYE, 0, 0, zeros, 3); break;
    case 9: put_frame(s, TPR_WIRE_CREDIT, 0, 0, huge, 8); break;         /* credit for what was never sent */
    case 10: put_frame(s, TPR_WIRE_AGREE, 0, 0, zeros, 8); break;        /* at the wrong time */
    case 11: put_hello(s); break;
    case 12: put_agree(s, 3); break;
    case 13: put_frame(s, TPR_WIRE_MOVE, 0, 0, zeros, 36); break;
    case 14: put_frame(s, TPR_WIRE_MOVED, 0, 0, zeros, 36); break;
    case 15: put_frame(s, TPR_WIRE_CHANNEL, 0, 1, zeros, 16); break;     /* a channel that is not there */
    case 16: put_frame(s, TPR_WIRE_CHANNEL, 0, 65535, zeros, 16); break;
    case 17: put_frame(s, TPR_WIRE_DATA, 0, 1, zeros, 100); break;
    case 18: put_frame(s, TPR_WIRE_CHANNEL, 0, 0, zeros, 15); break;     /* control that basic does not know */
    case 19: put_frame(s, TPR_WIRE_CHANNEL, 0, 0, zeros, 16); break;
    case 20: put_frame(s, TPR_WIRE_CHANNEL, 0, 0, zeros, 5000); break;
    case 21: put_message(s, 1, 0, 0, 0, 0, NULL, 0, 0); break;           /* metadata that is not there */
    case 22: put_message(s, 0xffffffff, 0, 0, 0, 0, NULL, 0, 100); break;
    case 23: put_message(s, (1 << 20) + 1, 0, 0, 0, 0, NULL, 0, 100); break;
    case 24: put_message(s, 0, 1, 0, 0, 0, NULL, 0, 0); break;           /* items that are not there */
    case 25: put_message(s, 0, 65535, 0, 0, 0, NULL, 0, 0); break;
    case 26: put_message(s, 0, 65535, 65535, 16, 40, NULL, 0, 100); break;
    case 27: put_message(s, 0, 0, 65535, 0, 0, NULL, 0, 20000); break;
    case 28: put_message(s, 0, 0, 0, 17, 0, NULL, 0, 1000); break;       /* too many transfers; an endless prefix */
    case 29: put_message(s, 0, 0, 0, 0, 41, NULL, 0, 100); break;
    case 30: put_message(s, 0, 0, 0, 1, 0, NULL, 0, 0); break;
    case 31: put_message(s, 0, 1, 0, 0, 0, &one, 1, 0); break;           /* inline bytes that are not there */
    case 32: one.size = UINT64_MAX; put_message(s, 0, 1, 0, 0, 0, &one, 1, 100); break;
    case 33: one.size = UINT64_C(17) << 30; put_message(s, 0, 1, 0, 0, 0, &one, 1, 100); break;
    case 34: one.metadata = UINT32_MAX; put_message(s, 0, 1, 0, 0, 0, &one, 1, 100); break;
    case 35: one.transfer = 0; put_message(s, 0, 1, 0, 0, 0, &one, 1, 100); break;   /* a transfer that is not there */
    case 36: one.transfer = 3; put_message(s, 0, 1, 0, 1, 0, &one, 1, 100); break;
    case 37: tpr_wire_put_frame(s->bytes + s->size, 0x7fffffff, TPR_WIRE_MESSAGE, 0, 0); s->size += 8; break;
    case 38: tpr_wire_put_frame(s->bytes + s->size, 16 + (1 << 20) + 1, TPR_WIRE_DATA, 0, 0); s->size += 8; break;
    case 39: tpr_wire_put_frame(s->bytes + s->size, TPR_WIRE_CONTROL + 1, TPR_WIRE_BYE, 0, 0); s->size += 8; break;
    default: return 0;
    }
    return 1;
}

TEST(broken_frames) {
    static script s;
    server v;
    server_open(&v);
    for (int i = 0; i < BROKEN; i++) {
        s.size = 0;
        put_handshake(&s);
        REQUIRE(put_broken(&s, i));
        fprintf(stderr, "broken frame %d\n", i);
        play(&v, &s, TPRPC_ERROR_PROTOCOL, 0);
    }
    CHECK_EQ_INT(tprpc_context_destroy(v.s.ctx), TPRPC_OK);
}

/* A channel that this end does not have keeps its number: what is said to it is refused like any other nonsense. */
TEST(speaks_to_a_channel_that_is_not_here) {
    static script s;
    static tpr_wire_agree agree;
    server v;
    uint8_t body[TPR_WIRE_CONTROL];
    server_open(&v);
    put_hello(&s);
    for (uint32_t step = 1; step <= 3; step += 2) {
        tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
        memset(&agree, 0, sizeof agree);
        agree.step = step;
        agree.count = 2;
        snprintf(agree.proofs[0].name, sizeof agree.proofs[0].name, "basic");
        snprintf(agree.proofs[1].name, sizeof agree.proofs[1].name, "nowhere");
        agree.proofs[0].verdict = agree.proofs[1].verdict = true;
        tpr_wire_write_agree(&w, &agree);
        REQUIRE(!w.failed);
        put_frame(&s, TPR_WIRE_AGREE, 0, 0, body, (uint32_t)(w.at - body));
    }
    put_frame(&s, TPR_WIRE_CHANNEL, 0, 1, body, 16);
    play(&v, &s, TPRPC_ERROR_PROTOCOL, 0);
    CHECK_EQ_INT(tprpc_context_destroy(v.s.ctx), TPRPC_OK);
}

/* A peer that hangs up at each byte of a session: before the pipe is open nobody hears of it; after, PEER. */
TEST(ends_at_each_byte) {
    static script whole, part;
    server v;
    item items[2] = {{5, 3, TPR_WIRE_INLINE}, {2000, 0, 0}};
    server_open(&v);
    put_handshake(&whole);
    size_t open_at = whole.size;
    put_message(&whole, 7, 1, 0, 0, 0, items, 1, 15);
    size_t first = whole.size;
    put_message(&whole, 0, 2, 0, 1, 0, items, 2, 12 + 3 + 5);   /* a zero transfer: id 0 of channel 0, no descriptor */
    for (size_t size = open_at; size < whole.size; size++) {
        part = whole;
        part.size = size;
        play(&v, &part, size < first ? TPRPC_ERROR_PEER : TPRPC_OK, 1);
    }
    accepting accept;
    memset(&accept, 0, sizeof accept);
    CHECK_EQ_INT(tprpc_accept(v.s.listener, on_accepted, &accept), TPRPC_OK);
    for (size_t size = 0; size < open_at; size++) {
        int fd = socket_connect_to(v.address);
        CHECK_EQ_INT(send(fd, whole.bytes, size, MSG_NOSIGNAL), size);
        close(fd);
        work(&v.s);
    }
    idle(&v.s, 20000);
    CHECK_EQ_INT(accept.o.runs, 0);
    int fds = test_count_fds();
    CHECK_LE_INT(fds, 12);
    CHECK_EQ_INT(tprpc_context_destroy(v.s.ctx), TPRPC_OK);
    CHECK_EQ_INT(accept.o.status, TPRPC_ERROR_CLOSED);
}

/* Peers that say hello and no more: after a second they make room for who comes, one each, and so keep nobody out. */
TEST(said_hello_and_no_more) {
    enum { N = 4 };
    static script hello, whole;
    server v;
    tprpc_context_desc desc;
    accepting accept;
    int fds[N + 1], open_ones = 0;
    uint8_t byte[4096];
    memset(&v, 0, sizeof v);
    memset(&desc, 0, sizeof desc);
    memset(&accept, 0, sizeof accept);
    desc.transports = "tcp";
    desc.limits.handshakes = N;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &v.s.ctx, NULL), TPRPC_OK);
    v.s.listener = listen_on(v.s.ctx, "tcp://127.0.0.1:0", 0);
    v.address = tprpc_listener_address(v.s.listener, NULL);
    put_hello(&hello);
    put_handshake(&whole);
    CHECK_EQ_INT(tprpc_accept(v.s.listener, on_accepted, &accept), TPRPC_OK);
    for (int i = 0; i < N; i++) {
        fds[i] = socket_connect_to(v.address);
        CHECK_EQ_INT(send(fds[i], hello.bytes, hello.size, MSG_NOSIGNAL), hello.size);
        while (recv(fds[i], byte, sizeof byte, MSG_DONTWAIT) <= 0) work(&v.s);   /* its own */
    }
    fds[N] = socket_connect_to(v.address);       /* too early: they may be about to say more */
    while (recv(fds[N], byte, 1, MSG_DONTWAIT) != 0) work(&v.s);
    close(fds[N]);
    idle(&v.s, 1100000);
    fds[N] = socket_connect_to(v.address);
    CHECK_EQ_INT(send(fds[N], whole.bytes, whole.size, MSG_NOSIGNAL), whole.size);
    WAIT(&v.s, accept.o.runs, 1);
    CHECK_EQ_INT(accept.o.status, TPRPC_OK);
    for (int i = 0; i < N; i++) {
        ssize_t n = recv(fds[i], byte, sizeof byte, MSG_DONTWAIT);
        while (n > 0) n = recv(fds[i], byte, sizeof byte, MSG_DONTWAIT);
        open_ones += n < 0 && errno == EAGAIN;
        CHECK(i > 0 || !open_ones);              /* the first that came went */
    }
    CHECK_EQ_INT(open_ones, N - 1);
    for (int i = 0; i <= N; i++) close(fds[i]);
    tprpc_pipe_close(accept.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(v.s.ctx), TPRPC_OK);
}

/* Sessions with bytes changed at random, from a seed: nothing crashes, nothing hangs, everything ends. */
TEST_LIMIT(changed_bytes, 60) {
    static script whole, part;
    server v;
    uint64_t seed = 42;
    item items[2] = {{5, 3, TPR_WIRE_INLINE}, {2000, 0, 0}};
    server_open(&v);
    put_handshake(&whole);
    size_t open_at = whole.size;
    put_message(&whole, 7, 1, 0, 0, 0, items, 1, 15);
    put_message(&whole, 0, 2, 0, 1, 0, items, 2, 20);
    put_message(&whole, 3, 0, 0, 0, 0, NULL, 0, 3);
    for (int i = 0; i < 3000 / TEST_SLOWDOWN; i++) {
        accepting accept;
        outcome o[3];
        memset(&accept, 0, sizeof accept);
        memset(o, 0, sizeof o);
        part = whole;
        for (int k = 0; k < 1 + i % 4; k++) {
            seed = seed * UINT64_C(6364136223846793005) + 1442695040888963407u;
            size_t begin = i % 3 ? open_at : 0, at = begin + (size_t)(seed >> 33) % (whole.size - begin);
            part.bytes[at] = (uint8_t)(i % 5 ? seed >> 17 : part.bytes[at] ^ (1u << (seed >> 60) % 8));
        }
        CHECK_EQ_INT(tprpc_accept(v.s.listener, on_accepted, &accept), TPRPC_OK);
        int fd = socket_connect_to(v.address);
        send(fd, part.bytes, part.size, MSG_NOSIGNAL);
        shutdown(fd, SHUT_WR);
        for (int turn = 0; turn < 6 && !accept.o.runs; turn++) tprpc_poll(v.s.ctx, 300, 0);
        close(fd);
        if (!accept.o.runs) {                    /* none came of it: the same is asked for by one that is right */
            fd = socket_connect_to(v.address);
            CHECK_EQ_INT(send(fd, whole.bytes, open_at, MSG_NOSIGNAL), open_at);
            WAIT(&v.s, accept.o.runs, 1);
            close(fd);
        }
        REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
        for (int k = 0; k < 3; k++) {
            if (tprpc_pipe_read(accept.pipe, NULL, on_read, &o[k]) == TPRPC_OK) WAIT(&v.s, o[k].runs, 1);
        }
        tprpc_pipe_close(accept.pipe);
    }
    CHECK_EQ_INT(tprpc_context_destroy(v.s.ctx), TPRPC_OK);
}
