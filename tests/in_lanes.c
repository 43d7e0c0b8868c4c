/* Lanes, and a peer made by hand that says about them, and sends over them, what no peer of ours would; and one that
   knows no lanes. The live end is a listener, or connects to a listener made by hand. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "pipe_common.h"
#include "forge.h"

enum { LARGE = 600000, PIECE = 100000 };

static int64_t clock_ahead;
static int context_lanes;              /* 0: the default */
static int64_t clock_us(void *user) { (void)user; return test_now_us() + clock_ahead; }

/* ---- a peer ---- */

typedef struct peer {
    side s;
    const char *address;
    tprpc_pipe *pipe;                  /* the live end */
    int listener, fd;                  /* listener: of one that listens, by hand */
    uint8_t token[16];                 /* of the live end */
    outcome got, wrote;
} peer;

static void peer_send(const peer *p, int fd, const void *bytes, size_t size) {
    (void)p;
    CHECK_EQ_INT(send(fd, bytes, size, MSG_NOSIGNAL), size);
}

/* Takes so many bytes; the live end works meanwhile. False: the connection ended. */
static bool peer_take(peer *p, int fd, void *bytes, size_t size) {
    const int64_t end = test_now_us() + WAIT_S * INT64_C(1000000);
    for (size_t have = 0; have < size;) {
        const ssize_t n = recv(fd, (uint8_t *)bytes + have, size - have, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) return false;
        if (n > 0) have += (size_t)n;
        else tprpc_poll(p->s.ctx, 1000, 0);
        REQUIRE(test_now_us() < end);
    }
    return true;
}

typedef struct frame { tpr_wire_frame head; uint8_t body[TPR_WIRE_HEADER + TPR_WIRE_CHUNK]; } frame;

/* The next frame that the live end sends; false: it has closed. */
static bool peer_frame(peer *p, int fd, frame *f) {
    uint8_t header[TPR_WIRE_HEADER];
    if (!peer_take(p, fd, header, sizeof header)) return false;
    REQUIRE(tpr_wire_get_frame(header, 1 << 20, &f->head));
    return peer_take(p, fd, f->body, f->head.size);
}

/* Skips frames up to one of that kind. */
static bool peer_until(peer *p, int fd, uint8_t kind, frame *f) {
    do if (!peer_frame(p, fd, f)) return false;
    while (f->head.kind != kind);
    return true;
}

static void peer_context(peer *p) {
    tprpc_context_desc desc;
    memset(p, 0, sizeof *p);
    memset(&desc, 0, sizeof desc);
    desc.transports = "tcp";
    desc.channels = "basic";
    desc.lanes = context_lanes;
    desc.clock_us = clock_us;
    desc.log = print_log;
    desc.limits.memory_bytes = 64 << 20;
    p->listener = -1;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &p->s.ctx, NULL), TPRPC_OK);
}

/* One more pipe, of a peer that connects. */
static void peer_connect(peer *p, uint16_t minor) {
    static script s;
    static frame f;
    static tpr_wire_hello hello;
    accepting accept;
    memset(&accept, 0, sizeof accept);
    s.size = 0;
    put_hello_of(&s, minor);
    put_agree(&s, 1);
    put_agree(&s, 3);
    CHECK_EQ_INT(tprpc_accept(p->s.listener, on_accepted, &accept), TPRPC_OK);
    p->fd = socket_connect_to(p->address);
    peer_send(p, p->fd, s.bytes, s.size);
    WAIT(&p->s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    p->pipe = accept.pipe;
    REQUIRE(peer_until(p, p->fd, TPR_WIRE_HELLO, &f) && tpr_wire_read_hello(f.body, f.head.size, &hello));
    memcpy(p->token, hello.token, 16);
    for (int i = 0; i < 2; i++) REQUIRE(peer_until(p, p->fd, TPR_WIRE_AGREE, &f));
}

static void peer_open(peer *p, uint16_t minor) {
    peer_context(p);
    p->s.listener = listen_on(p->s.ctx, "tcp://127.0.0.1:0", 0);
    p->address = tprpc_listener_address(p->s.listener, NULL);
    peer_connect(p, minor);
}

static int peer_accept(peer *p) {
    const int64_t end = test_now_us() + WAIT_S * INT64_C(1000000);
    int fd;
    while ((fd = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC)) < 0) {
        REQUIRE(test_now_us() < end);
        tprpc_poll(p->s.ctx, 1000, 0);
    }
    return fd;
}

/* The live end connects to it. */
static void peer_listen(peer *p, uint16_t minor) {
    static char address[64];
    static script s;
    static frame f;
    static tpr_wire_hello hello;
    peer_context(p);
    p->listener = socket_listen_at(address, sizeof address);
    REQUIRE(fcntl(p->listener, F_SETFL, O_NONBLOCK) == 0);
    p->pipe = connect_to(p->s.ctx, address, 0, 0);
    p->fd = peer_accept(p);
    REQUIRE(peer_until(p, p->fd, TPR_WIRE_HELLO, &f) && tpr_wire_read_hello(f.body, f.head.size, &hello));
    memcpy(p->token, hello.token, 16);
    s.size = 0;
    put_hello_of(&s, minor);
    put_agree(&s, 2);
    put_agree(&s, 4);
    peer_send(p, p->fd, s.bytes, s.size);
    for (int i = 0; i < 2; i++) REQUIRE(peer_until(p, p->fd, TPR_WIRE_AGREE, &f));
    idle(&p->s, 2000);
}

static void peer_close(peer *p) {
    close(p->fd);
    if (p->listener >= 0) close(p->listener);
    tprpc_pipe_close(p->pipe);
    CHECK_EQ_INT(tprpc_context_destroy(p->s.ctx), TPRPC_OK);
}

static void say(const peer *p, int fd, uint8_t kind, uint16_t channel, const void *body, size_t size) {
    static script s;
    s.size = 0;
    put_frame(&s, kind, 0, channel, body, (uint32_t)size);
    peer_send(p, fd, s.bytes, s.size);
}

static tpr_wire_lane lane_word(const peer *p, uint32_t number, uint8_t nonce) {
    tpr_wire_lane word;
    memcpy(word.move.token, p->token, 16);
    memset(word.move.nonce, nonce, 16);
    word.number = number;
    word.sent = 0;
    return word;
}

static void say_lane(const peer *p, int fd, uint8_t kind, const tpr_wire_lane *word) {
    uint8_t body[TPR_WIRE_LANE_BYTES];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    tpr_wire_write_lane(&w, word);
    say(p, fd, kind, 0, body, sizeof body);
}

static void say_data(const peer *p, int fd, uint16_t channel, uint64_t id, uint64_t offset, size_t size, int byte) {
    static uint8_t body[TPR_WIRE_DATA_HEADER + TPR_WIRE_CHUNK];
    uint8_t header[TPR_WIRE_HEADER];
    tpr_wire_put_frame(header, (uint32_t)(TPR_WIRE_DATA_HEADER + size), TPR_WIRE_DATA, 0, channel);
    tpr_base_store_le64(body, id);
    tpr_base_store_le64(body + 8, offset);
    memset(body + TPR_WIRE_DATA_HEADER, byte, size);
    peer_send(p, fd, header, sizeof header);
    peer_send(p, fd, body, TPR_WIRE_DATA_HEADER + size);
}

static void say_control(const peer *p, uint8_t kind, uint64_t id) {
    uint8_t body[16] = {0};
    body[0] = kind;
    tpr_base_store_le64(body + 8, id);
    say(p, p->fd, TPR_WIRE_CHANNEL, 0, body, sizeof body);
}

/* Asks for a lane; -1: it was refused. */
static int ask(peer *p, const tpr_wire_lane *word) {
    static frame f;
    tpr_wire_lane answer;
    const int fd = socket_connect_to(p->address), on = 1;
    CHECK_EQ_INT(setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on), 0);
    say_lane(p, fd, TPR_WIRE_LANE, word);
    if (!peer_frame(p, fd, &f)) {
        close(fd);
        return -1;
    }
    REQUIRE(f.head.kind == TPR_WIRE_LANED && tpr_wire_read_lane(f.body, f.head.size, &answer));
    CHECK_EQ_INT(answer.number, word->number);
    CHECK_MEM(answer.move.nonce, word->move.nonce, 16);
    say_lane(p, fd, TPR_WIRE_LANED, word);
    idle(&p->s, 2000);
    return fd;
}

/* Announces a tensor, which the live end begins to receive into `size` bytes of its own, and no more. */
static void offer(peer *p, uint64_t id, void *memory, size_t size) {
    static script s;
    static frame f;
    tpr_wire_item one;
    tpr_wire_message head;
    tpr_wire_transfer transfer;
    uint8_t body[512];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    tprpc_payload payload;
    tprpc_message to;
    outcome described;
    memset(&head, 0, sizeof head);
    memset(&one, 0, sizeof one);
    memset(&transfer, 0, sizeof transfer);
    memset(&payload, 0, sizeof payload);
    memset(&to, 0, sizeof to);
    memset(&described, 0, sizeof described);
    memset(&p->got, 0, sizeof p->got);
    head.payloads = 1;
    head.transfers = 1;
    one.size = size;
    transfer.id = id;
    tpr_wire_write_message(&w, &head);
    tpr_wire_write_payload(&w, &one);
    tpr_wire_write_transfer(&w, &transfer);
    REQUIRE(!w.failed);
    s.size = 0;
    put_frame(&s, TPR_WIRE_MESSAGE, 0, 0, body, (uint32_t)(w.at - body));
    peer_send(p, p->fd, s.bytes, s.size);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p->pipe, on_described, &described), TPRPC_OK);
    WAIT(&p->s, described.runs, 1);
    REQUIRE_EQ_INT(described.status, TPRPC_OK);
    payload.data = memory;
    payload.size = size;
    to.payloads = &payload;
    to.payload_count = 1;
    REQUIRE_EQ_INT(tprpc_pipe_read(p->pipe, &to, on_read, &p->got), TPRPC_OK);
    do REQUIRE(peer_until(p, p->fd, TPR_WIRE_CHANNEL, &f));
    while (f.body[0] != TPR_BATCH_READY || tpr_base_load_le64(f.body + 8) != id);
}

static bool all_are(const uint8_t *memory, size_t size, int byte) {
    for (size_t i = 0; i < size; i++) if (memory[i] != byte) return false;
    return true;
}

static bool alive(peer *p) {
    tprpc_pipe_info info;
    idle(&p->s, 2000);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(p->pipe, &info, sizeof info), TPRPC_OK);
    if (info.error.status) fprintf(stderr, "%s\n", info.error.text);
    return info.error.status == TPRPC_OK;
}

/* ---- asking ---- */

TEST(asks_for_lanes_that_cannot_be) {
    peer p, other;
    peer_open(&p, TPR_WIRE_MINOR);
    peer_open(&other, TPR_WIRE_MINOR);
    const uint32_t numbers[] = {0, 2, 8, 9, 0x80000001u, 4000000000u, UINT32_MAX};
    for (size_t i = 0; i < COUNT(numbers); i++) {
        tpr_wire_lane word = lane_word(&p, numbers[i], (uint8_t)(10 + i));
        CHECK_EQ_INT(ask(&p, &word), -1);
    }
    for (int i = 0; i < 16; i++) {     /* another token, in each byte */
        tpr_wire_lane word = lane_word(&p, 1, (uint8_t)(20 + i));
        word.move.token[i] ^= 1;
        CHECK_EQ_INT(ask(&p, &word), -1);
    }
    tpr_wire_lane word = lane_word(&other, 1, 40);   /* of a pipe of another listener */
    CHECK_EQ_INT(ask(&p, &word), -1);
    word = lane_word(&p, 1, 41);
    int fd = ask(&p, &word);
    CHECK(fd >= 0);
    CHECK_EQ_INT(ask(&p, &word), -1);  /* the same, and another of its number */
    word = lane_word(&p, 1, 42);
    CHECK_EQ_INT(ask(&p, &word), -1);
    CHECK(alive(&p) && alive(&other));
    uint8_t *memory = (uint8_t *)malloc(LARGE);
    offer(&p, 5, memory, LARGE);       /* and the one that is there works */
    say_data(&p, fd, 0, 5, 0, LARGE, 7);
    WAIT(&p.s, p.got.runs, 1);
    CHECK(p.got.status == TPRPC_OK && all_are(memory, LARGE, 7));
    free(memory);
    close(fd);
    peer_close(&other);
    peer_close(&p);
}

/* Before the pipe is open there is nothing that a lane could be of. */
TEST(asks_before_the_pipe_is_open) {
    static script s;
    static frame f;
    static tpr_wire_hello hello;
    peer p;
    peer_open(&p, TPR_WIRE_MINOR);
    const int early = socket_connect_to(p.address);
    s.size = 0;
    put_hello(&s);
    put_agree(&s, 1);
    peer_send(&p, early, s.bytes, s.size);
    REQUIRE(peer_until(&p, early, TPR_WIRE_HELLO, &f) && tpr_wire_read_hello(f.body, f.head.size, &hello));
    memcpy(p.token, hello.token, 16);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    CHECK_EQ_INT(ask(&p, &word), -1);
    CHECK(alive(&p));
    close(early);
    peer_close(&p);
}

/* Where there are lanes, but not the first, basic's bulk goes over the pipe's own connection. */
TEST(other_lanes_alone) {
    static frame f;
    peer p;
    tprpc_tensor t;
    tprpc_message m;
    context_lanes = 4;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane second = lane_word(&p, 2, 1), fourth = lane_word(&p, 4, 2), fifth = lane_word(&p, 5, 3);
    const int fds[2] = {ask(&p, &second), ask(&p, &fourth)};
    CHECK(fds[0] >= 0 && fds[1] >= 0);
    CHECK_EQ_INT(ask(&p, &fifth), -1);
    memset(&t, 0, sizeof t);
    memset(&m, 0, sizeof m);
    t.size = LARGE;
    t.data = calloc(1, LARGE);
    m.tensors = &t;
    m.tensor_count = 1;
    REQUIRE_EQ_INT(tprpc_pipe_write(p.pipe, &m, on_written, &p.wrote), TPRPC_OK);
    REQUIRE(peer_until(&p, p.fd, TPR_WIRE_MESSAGE, &f));
    say_control(&p, TPR_BATCH_READY, 1);
    for (size_t came = 0; came < LARGE; came += f.head.size - TPR_WIRE_DATA_HEADER)
        REQUIRE(peer_until(&p, p.fd, TPR_WIRE_DATA, &f));
    WAIT(&p.s, p.wrote.runs, 1);
    for (int i = 0; i < 2; i++) close(fds[i]);
    free(t.data);
    peer_close(&p);
}

/* Who listens sends nothing over a lane that the connector has not answered; it may have given it up. */
TEST(carries_nothing_unanswered) {
    static frame f;
    peer p;
    tprpc_tensor t;
    tprpc_message m;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    const int fd = socket_connect_to(p.address);
    say_lane(&p, fd, TPR_WIRE_LANE, &word);
    REQUIRE(peer_frame(&p, fd, &f) && f.head.kind == TPR_WIRE_LANED);
    memset(&t, 0, sizeof t);
    memset(&m, 0, sizeof m);
    t.size = LARGE;
    t.data = calloc(1, LARGE);
    m.tensors = &t;
    m.tensor_count = 1;
    REQUIRE_EQ_INT(tprpc_pipe_write(p.pipe, &m, on_written, &p.wrote), TPRPC_OK);
    REQUIRE(peer_until(&p, p.fd, TPR_WIRE_MESSAGE, &f));
    say_control(&p, TPR_BATCH_READY, 1);
    for (size_t came = 0; came < LARGE; came += f.head.size - TPR_WIRE_DATA_HEADER)
        REQUIRE(peer_until(&p, p.fd, TPR_WIRE_DATA, &f));
    WAIT(&p.s, p.wrote.runs, 1);
    CHECK_EQ_INT(recv(fd, f.body, 1, MSG_DONTWAIT), -1);
    CHECK(alive(&p));
    close(fd);
    free(t.data);
    peer_close(&p);
}

/* Cut anywhere, or never finished. */
TEST(asks_in_pieces) {
    peer p;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    uint8_t bytes[TPR_WIRE_HEADER + TPR_WIRE_LANE_BYTES];
    tpr_wire_writer w = tpr_wire_writer_of(bytes + TPR_WIRE_HEADER, TPR_WIRE_LANE_BYTES);
    tpr_wire_write_lane(&w, &word);
    for (size_t size = 0; size <= sizeof bytes; size++) {
        const int fd = socket_connect_to(p.address);
        tpr_wire_put_frame(bytes, TPR_WIRE_LANE_BYTES, TPR_WIRE_LANE, 0, 0);
        if (size < sizeof bytes) peer_send(&p, fd, bytes, size);
        tpr_wire_put_frame(bytes, (uint32_t)(size < 8 ? 0 : size - 8), TPR_WIRE_LANE, 0, 0);
        if (size == sizeof bytes) tpr_base_store_le32(bytes, TPR_WIRE_LANE_BYTES - 1);   /* one too few */
        if (size == sizeof bytes) peer_send(&p, fd, bytes, size);
        idle(&p.s, 300);
        close(fd);
    }
    CHECK(alive(&p));
    const int fd = ask(&p, &word);
    CHECK(fd >= 0);
    close(fd);
    peer_close(&p);
}

/* ---- what comes over a lane ---- */

/* Frames that are no bulk, or of a channel that is not there: the pipe ends. */
TEST(says_over_a_lane_what_it_may_not) {
    for (uint8_t kind = 0; kind < 20; kind++)
        for (int channel = 0; channel < 2; channel++) {
            static uint8_t zeros[64];
            peer p;
            tprpc_pipe_info info;
            if (kind == TPR_WIRE_DATA && channel == 0) continue;
            peer_open(&p, TPR_WIRE_MINOR);
            tpr_wire_lane word = lane_word(&p, 1, 1);
            const int fd = ask(&p, &word);
            REQUIRE(fd >= 0);
            say(&p, fd, kind, (uint16_t)channel, zeros, sizeof zeros);
            idle(&p.s, 3000);
            REQUIRE_EQ_INT(tprpc_pipe_get_info(p.pipe, &info, sizeof info), TPRPC_OK);
            CHECK_EQ_INT(info.error.status, TPRPC_ERROR_PROTOCOL);
            close(fd);
            peer_close(&p);
        }
}

/* Bulk that nobody asked for, or that does not fit, goes nowhere, over either connection. */
TEST(bulk_that_does_not_fit) {
    static const struct { uint64_t id, offset; size_t size;
    } odd[] = {{6, 0, 1000}, {0, 0, 1}, {UINT64_MAX, 0, 100}, {5, LARGE, 1}, {5, LARGE - 10, 11}, {5, LARGE + 1, 100},
               {5, UINT64_MAX, 1}, {5, UINT64_MAX - 99, 100}, {5, 0, LARGE + 1}, {5, 1, LARGE}, {5, 1u << 31, 1}};
    peer p;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    const int fd = ask(&p, &word);
    REQUIRE(fd >= 0);
    uint8_t *memory = (uint8_t *)malloc(LARGE);
    REQUIRE(memory != NULL);
    memset(memory, 1, LARGE);
    offer(&p, 5, memory, LARGE);
    for (size_t i = 0; i < COUNT(odd); i++)
        for (int k = 0; k < 2; k++) say_data(&p, k ? fd : p.fd, 0, odd[i].id, odd[i].offset, odd[i].size, 0xee);
    idle(&p.s, 20000);
    CHECK(all_are(memory, LARGE, 1));
    CHECK_EQ_INT(p.got.runs, 0);
    for (size_t at = 0; at < LARGE; at += PIECE) say_data(&p, at / PIECE & 1 ? fd : p.fd, 0, 5, at, PIECE, 2);
    WAIT(&p.s, p.got.runs, 1);
    CHECK(p.got.status == TPRPC_OK && all_are(memory, LARGE, 2));
    for (int k = 0; k < 2; k++) say_data(&p, k ? fd : p.fd, 0, 5, 0, PIECE, 3);   /* more than was announced */
    CHECK(alive(&p));
    CHECK(all_are(memory, LARGE, 2));
    free(memory);
    close(fd);
    peer_close(&p);
}

/* The same bytes twice, over both connections at a time: the receive may end before all of them came, and what still
   comes then goes nowhere, the memory being the user's again. */
TEST(bulk_that_overlaps) {
    for (size_t size = LARGE; size > 20000; size /= 5)
        for (int order = 0; order < 2; order++) {
            uint8_t head[TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER];
            peer p;
            peer_open(&p, TPR_WIRE_MINOR);
            tpr_wire_lane word = lane_word(&p, 1, 1);
            const int fd = ask(&p, &word), first = order ? fd : p.fd, second = order ? p.fd : fd;
            uint8_t *memory = (uint8_t *)malloc(size), *rest = (uint8_t *)malloc(size);
            REQUIRE(fd >= 0 && memory && rest);
            memset(rest, 0xee, size);
            offer(&p, 5, memory, size);
            tpr_wire_put_frame(head, (uint32_t)(TPR_WIRE_DATA_HEADER + size), TPR_WIRE_DATA, 0, 0);
            tpr_base_store_le64(head + TPR_WIRE_HEADER, 5);
            tpr_base_store_le64(head + TPR_WIRE_HEADER + 8, 0);
            peer_send(&p, first, head, sizeof head);
            peer_send(&p, first, rest, size / 2);
            idle(&p.s, 5000);
            CHECK_EQ_INT(p.got.runs, 0);
            say_data(&p, second, 0, 5, 0, size, 9);
            WAIT(&p.s, p.got.runs, 1);
            CHECK_EQ_INT(p.got.status, TPRPC_OK);
            free(memory);
            peer_send(&p, first, rest, size - size / 2);
            CHECK(alive(&p));
            free(rest);
            close(fd);
            peer_close(&p);
        }
}

/* A transfer that ends by the peer's word while a piece of it is on its way over a lane. */
TEST(cancelled_in_a_piece) {
    for (size_t size = LARGE; size > 20000; size /= 5) {
        uint8_t head[TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER];
        peer p;
        peer_open(&p, TPR_WIRE_MINOR);
        tpr_wire_lane word = lane_word(&p, 1, 1);
        const int fd = ask(&p, &word);
        uint8_t *memory = (uint8_t *)malloc(size), *rest = (uint8_t *)calloc(1, size);
        REQUIRE(fd >= 0 && memory && rest);
        offer(&p, 5, memory, size);
        tpr_wire_put_frame(head, (uint32_t)(TPR_WIRE_DATA_HEADER + size), TPR_WIRE_DATA, 0, 0);
        tpr_base_store_le64(head + TPR_WIRE_HEADER, 5);
        tpr_base_store_le64(head + TPR_WIRE_HEADER + 8, 0);
        peer_send(&p, fd, head, sizeof head);
        peer_send(&p, fd, rest, size / 2);
        idle(&p.s, 5000);
        say_control(&p, TPR_BATCH_CANCEL, 5);
        WAIT(&p.s, p.got.runs, 1);
        CHECK_EQ_INT(p.got.status, TPRPC_ERROR_PEER);
        free(memory);
        peer_send(&p, fd, rest, size - size / 2);
        CHECK(alive(&p));
        free(rest);
        close(fd);
        peer_close(&p);
    }
}

/* ---- losing ---- */

/* Who says that he sent more than came: what was being received fails, and nothing else does. */
TEST(lost_with_bytes_on_it) {
    static frame f;
    for (int missing = 0; missing < 2; missing++)
        for (int closes = 0; closes < 2; closes++) {
            peer p;
            tpr_wire_lane said;
            peer_open(&p, TPR_WIRE_MINOR);
            tpr_wire_lane word = lane_word(&p, 1, 1);
            int fd = ask(&p, &word);
            uint8_t *memory = (uint8_t *)malloc(LARGE);
            REQUIRE(fd >= 0 && memory);
            offer(&p, 5, memory, LARGE);
            say_data(&p, fd, 0, 5, 0, PIECE, 7);
            idle(&p.s, 5000);
            if (closes) close(fd);
            word.sent = PIECE + (uint64_t)missing;
            if (closes) REQUIRE(peer_until(&p, p.fd, TPR_WIRE_LOST, &f));
            CHECK_EQ_INT(p.got.runs, 0);
            say_lane(&p, p.fd, TPR_WIRE_LOST, &word);
            if (!closes) REQUIRE(peer_until(&p, p.fd, TPR_WIRE_LOST, &f));
            REQUIRE(tpr_wire_read_lane(f.body, f.head.size, &said));
            CHECK(said.number == 1 && said.sent == 0);
            CHECK_MEM(said.move.nonce, word.move.nonce, 16);
            say_lane(&p, p.fd, TPR_WIRE_LOST, &word);   /* it is known */
            idle(&p.s, 5000);
            CHECK_EQ_INT(p.got.runs, missing);
            if (!missing) say_data(&p, p.fd, 0, 5, PIECE, LARGE - PIECE, 7);
            WAIT(&p.s, p.got.runs, 1);
            CHECK_EQ_INT(p.got.status, missing ? TPRPC_ERROR_PEER : TPRPC_OK);
            if (missing) CHECK_CONTAINS(p.got.text, "a connection of the pipe was lost: lane 1");
            CHECK_EQ_INT(ask(&p, &word), -1);           /* not the same again, but another */
            word = lane_word(&p, 1, 2);
            if (!closes) close(fd);
            fd = ask(&p, &word);
            CHECK(fd >= 0 && alive(&p));
            free(memory);
            close(fd);
            peer_close(&p);
        }
}

/* What is begun after this end has said that a lane ended is none of what was on it. */
TEST(begun_after_it_was_lost) {
    static frame f;
    peer p;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    const int fd = ask(&p, &word);
    uint8_t *memory = (uint8_t *)malloc(2 * LARGE);
    REQUIRE(fd >= 0 && memory);
    offer(&p, 5, memory, LARGE);
    close(fd);
    REQUIRE(peer_until(&p, p.fd, TPR_WIRE_LOST, &f));
    peer *second = (peer *)calloc(1, sizeof *second);
    REQUIRE(second != NULL);
    *second = p;                       /* whose reads end apart from the first's */
    offer(second, 6, memory + LARGE, LARGE);
    word.sent = 1;
    say_lane(&p, p.fd, TPR_WIRE_LOST, &word);
    WAIT(&p.s, p.got.runs, 1);
    CHECK_EQ_INT(p.got.status, TPRPC_ERROR_PEER);
    idle(&p.s, 3000);
    CHECK_EQ_INT(second->got.runs, 0);
    say_data(&p, p.fd, 0, 6, 0, LARGE, 7);
    WAIT(&p.s, second->got.runs, 1);
    CHECK_EQ_INT(second->got.status, TPRPC_OK);
    free(second);
    free(memory);
    peer_close(&p);
}

/* The word on the one before may come with the next, ahead of the frame that says it. */
TEST(next_lane_settles) {
    peer p;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1), next = lane_word(&p, 1, 2);
    int fd = ask(&p, &word);
    uint8_t *memory = (uint8_t *)malloc(LARGE);
    REQUIRE(fd >= 0 && memory);
    offer(&p, 5, memory, LARGE);
    close(fd);
    idle(&p.s, 5000);
    next.sent = 1;
    fd = ask(&p, &next);
    CHECK(fd >= 0);
    WAIT(&p.s, p.got.runs, 1);
    CHECK_EQ_INT(p.got.status, TPRPC_ERROR_PEER);
    word.sent = 1;
    say_lane(&p, p.fd, TPR_WIRE_LOST, &word);
    CHECK(alive(&p));
    offer(&p, 6, memory, LARGE);       /* the new one is still there */
    say_data(&p, fd, 0, 6, 0, LARGE, 7);
    WAIT(&p.s, p.got.runs, 1);
    CHECK_EQ_INT(p.got.status, TPRPC_OK);
    free(memory);
    close(fd);
    peer_close(&p);
}

/* One that is said to be lost before it came does not come any more. */
TEST(lost_before_it_came) {
    static frame f;
    peer p;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    say_lane(&p, p.fd, TPR_WIRE_LOST, &word);
    REQUIRE(peer_until(&p, p.fd, TPR_WIRE_LOST, &f));
    CHECK_EQ_INT(ask(&p, &word), -1);
    word = lane_word(&p, 1, 2);
    const int fd = ask(&p, &word);
    CHECK(fd >= 0 && alive(&p));
    close(fd);
    peer_close(&p);
}

TEST(broken_words) {
    const uint32_t numbers[] = {0, 9, 4000000000u};
    for (size_t i = 0; i < COUNT(numbers) + 1; i++) {
        peer p;
        tprpc_pipe_info info;
        peer_open(&p, TPR_WIRE_MINOR);
        tpr_wire_lane word = lane_word(&p, i < COUNT(numbers) ? numbers[i] : 1, 1);
        if (i < COUNT(numbers)) say_lane(&p, p.fd, TPR_WIRE_LOST, &word);
        else say(&p, p.fd, TPR_WIRE_LOST, 0, &word, TPR_WIRE_LANE_BYTES - 1);
        idle(&p.s, 3000);
        REQUIRE_EQ_INT(tprpc_pipe_get_info(p.pipe, &info, sizeof info), TPRPC_OK);
        CHECK_EQ_INT(info.error.status, TPRPC_ERROR_PROTOCOL);
        peer_close(&p);
    }
}

/* ---- closing ---- */

/* To a peer that has closed, and whose lane still brings what is being received, nothing more is sent: over tcp that
   could cost what comes. */
TEST(sends_nothing_to_who_has_closed) {
    enum { MUCH = 24 << 20 };
    static frame f;
    static uint8_t sink[1 << 20];
    peer p;
    tprpc_tensor t;
    tprpc_message m;
    outcome last;
    uint8_t bye[64];
    tpr_wire_writer w = tpr_wire_writer_of(bye, sizeof bye);
    ssize_t n;
    size_t came = 0;
    peer_open(&p, TPR_WIRE_MINOR);
    tpr_wire_lane word = lane_word(&p, 1, 1);
    const int fd = ask(&p, &word);
    uint8_t *memory = (uint8_t *)malloc(LARGE);
    REQUIRE(fd >= 0 && memory);
    memset(&t, 0, sizeof t);
    memset(&m, 0, sizeof m);
    t.size = MUCH;
    t.data = calloc(1, MUCH);
    m.tensors = &t;
    m.tensor_count = 1;
    m.release = on_release;
    m.release_user = &p.wrote;
    REQUIRE_EQ_INT(tprpc_pipe_write(p.pipe, &m, on_written, &p.wrote), TPRPC_OK);
    REQUIRE(peer_until(&p, p.fd, TPR_WIRE_MESSAGE, &f));
    offer(&p, 5, memory, LARGE);
    say_control(&p, TPR_BATCH_READY, 1);
    idle(&p.s, 20000);
    tpr_wire_write_bye(&w, TPRPC_ERROR_CLOSED, "");
    say(&p, p.fd, TPR_WIRE_BYE, 0, bye, (size_t)(w.at - bye));
    idle(&p.s, 20000);
    CHECK(p.got.runs == 0 && p.wrote.runs == 0);
    for (int i = 0; i < 200; i++) {
        while ((n = recv(fd, sink, sizeof sink, MSG_DONTWAIT)) > 0) came += (size_t)n;
        tprpc_poll(p.s.ctx, 1000, 0);
    }
    CHECK_LE_INT(came, MUCH - 1);
    say_data(&p, fd, 0, 5, 0, LARGE, 7);
    WAIT(&p.s, p.got.runs, 1);
    CHECK(p.got.status == TPRPC_OK && all_are(memory, LARGE, 7));
    close(fd);
    WAIT(&p.s, p.wrote.runs, 1);
    CHECK_EQ_INT(p.wrote.status, TPRPC_ERROR_PEER);
    memset(&last, 0, sizeof last);
    CHECK_EQ_INT(tprpc_pipe_read(p.pipe, NULL, on_read, &last), TPRPC_ERROR_PEER);
    free(t.data);
    free(memory);
    peer_close(&p);
}

/* ---- wanting ---- */

/* However often and however many are wanted, a context opens as many as it was told, and tries seldom. */
TEST(wants_and_wants) {
    static frame f;
    static const uint32_t counts[] = {0, 1, 8, 9, 4000000000u, UINT32_MAX};
    peer p;
    peer_listen(&p, TPR_WIRE_MINOR);
    for (int i = 0; i < 3000; i++) {
        uint8_t body[4];
        tpr_base_store_le32(body, counts[(size_t)i % COUNT(counts)]);
        say(&p, p.fd, TPR_WIRE_WANT, 0, body, 4);
        tprpc_poll(p.s.ctx, TPRPC_NOW, 0);
    }
    const int fd = peer_accept(&p);
    idle(&p.s, 20000);
    CHECK_EQ_INT(accept4(p.listener, NULL, NULL, SOCK_CLOEXEC), -1);
    REQUIRE(peer_frame(&p, fd, &f));
    CHECK_EQ_INT(f.head.kind, TPR_WIRE_LANE);
    CHECK(alive(&p));
    close(fd);
    peer_close(&p);
}

/* The answer is not what it should be: there is no lane, and the pipe goes on. */
TEST(answers_wrongly) {
    static frame f;
    for (int how = 0; how < 8; how++) {
        peer p;
        tpr_wire_lane word;
        uint8_t body[4] = {1, 0, 0, 0};
        peer_listen(&p, TPR_WIRE_MINOR);
        say(&p, p.fd, TPR_WIRE_WANT, 0, body, 4);
        int fd = peer_accept(&p);
        REQUIRE(peer_frame(&p, fd, &f) && f.head.kind == TPR_WIRE_LANE);
        REQUIRE(tpr_wire_read_lane(f.body, f.head.size, &word));
        CHECK_EQ_INT(word.number, 1);
        CHECK(all_are(word.move.token, 16, 0));   /* which this peer's hello had */
        memcpy(word.move.token, p.token, 16);
        if (how == 0) word.number = 2;
        if (how == 1) word.number = 0;
        if (how == 2) word.move.nonce[15] ^= 1;
        if (how == 3) word.move.token[0] ^= 1;   /* an answer of one who does not know the pipe's token */
        if (how == 4) close(fd);
        if (how == 5) clock_ahead += 2100000;    /* none */
        if (how < 4 || how == 7) say_lane(&p, fd, how == 7 ? TPR_WIRE_LANE : TPR_WIRE_LANED, &word);
        if (how == 6) say(&p, fd, TPR_WIRE_LANED, 0, body, 4);
        if (how == 6) close(fd);
        REQUIRE(peer_until(&p, p.fd, TPR_WIRE_LOST, &f));
        if (how != 4 && how != 6) CHECK_EQ_INT(recv(fd, body, 1, 0), 0);
        if (how != 4 && how != 6) close(fd);
        say(&p, p.fd, TPR_WIRE_LOST, 0, f.body, f.head.size);
        CHECK(alive(&p));
        clock_ahead += 3000000;                  /* and the next comes to be */
        say(&p, p.fd, TPR_WIRE_WANT, 0, "\1\0\0", 4);
        fd = peer_accept(&p);
        REQUIRE(peer_frame(&p, fd, &f) && f.head.kind == TPR_WIRE_LANE);
        CHECK(tpr_wire_read_lane(f.body, f.head.size, &word) && word.number == 1);
        memcpy(word.move.token, p.token, 16);
        say_lane(&p, fd, TPR_WIRE_LANED, &word);
        uint8_t *memory = (uint8_t *)malloc(LARGE);
        offer(&p, 5, memory, LARGE);
        say_data(&p, fd, 0, 5, 0, LARGE, 7);
        WAIT(&p.s, p.got.runs, 1);
        CHECK_EQ_INT(p.got.status, TPRPC_OK);
        free(memory);
        close(fd);
        peer_close(&p);
    }
}

/* Who listens is not wanted of; nor anything that is too short. */
TEST(wants_wrongly) {
    for (int listens = 0; listens < 2; listens++) {
        peer p;
        tprpc_pipe_info info;
        if (listens) peer_listen(&p, TPR_WIRE_MINOR);
        else peer_open(&p, TPR_WIRE_MINOR);
        say(&p, p.fd, TPR_WIRE_WANT, 0, "\1\0\0", listens ? 3 : 4);
        idle(&p.s, 3000);
        REQUIRE_EQ_INT(tprpc_pipe_get_info(p.pipe, &info, sizeof info), TPRPC_OK);
        CHECK_EQ_INT(info.error.status, TPRPC_ERROR_PROTOCOL);
        peer_close(&p);
    }
}

/* ---- peers of earlier versions ---- */

/* They see no frame that they do not know, and get large tensors over the connection that they know. */
TEST(earlier_minors) {
    static frame f;
    for (uint16_t minor = 0; minor <= TPR_WIRE_MINOR; minor++)
        for (int listens = 0; listens < 2; listens++) {
            peer p;
            tprpc_tensor t;
            tprpc_message m;
            int wants = 0;
            size_t came = 0;
            if (listens) peer_listen(&p, minor);
            else peer_open(&p, minor);
            memset(&t, 0, sizeof t);
            memset(&m, 0, sizeof m);
            t.size = LARGE;
            t.data = calloc(1, LARGE);
            m.tensors = &t;
            m.tensor_count = 1;
            m.release = on_release;
            m.release_user = &p.wrote;
            REQUIRE_EQ_INT(tprpc_pipe_write(p.pipe, &m, on_written, &p.wrote), TPRPC_OK);
            REQUIRE(peer_until(&p, p.fd, TPR_WIRE_MESSAGE, &f));
            say_control(&p, TPR_BATCH_READY, 1);
            while (came < LARGE) {
                REQUIRE(peer_frame(&p, p.fd, &f));
                if (minor < 2) CHECK_EQ_INT(f.head.kind, TPR_WIRE_DATA);
                wants += f.head.kind == TPR_WIRE_WANT;
                if (f.head.kind == TPR_WIRE_DATA) came += f.head.size - TPR_WIRE_DATA_HEADER;
            }
            WAIT(&p.s, p.wrote.runs, 1);
            CHECK_EQ_INT(p.wrote.status, TPRPC_OK);
            CHECK_EQ_INT(wants, minor >= 2 && !listens);
            if (listens) {
                idle(&p.s, 20000);
                const int fd = accept4(p.listener, NULL, NULL, SOCK_CLOEXEC);
                CHECK_EQ_INT(fd >= 0, minor >= 2);
                if (fd >= 0) close(fd);
            }
            free(t.data);
            peer_close(&p);
        }
}
