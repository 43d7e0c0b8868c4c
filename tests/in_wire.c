/* The wire. Every decoder of the implementation, directly: round trips, truncation at every byte, limits, bytes that
   trail; and recorded sessions of every wire version (tests/wire/README.md), replayed against today's ends, cut short
   and corrupted. TPRPC_WIRE_RECORD=FOLDER build/tests/in_wire record writes new recordings. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "sockets.h"
#include "toys_use.h"
#include "wire_tape.h"

/* ---- decoders ---- */

/* Runs decode on the first n bytes, in memory of exactly that size. */
static bool decode_cut(bool (*decode)(const uint8_t *bytes, size_t size), const uint8_t *bytes, size_t size) {
    uint8_t *exact = (uint8_t *)malloc(size ? size : 1);
    bool good;
    REQUIRE(exact != NULL);
    memcpy(exact, bytes, size);
    good = decode(exact, size);
    free(exact);
    return good;
}

/* Whole: good; cut anywhere: refused; with bytes behind: good; with random damage: whatever, within its memory. */
static void decode_all(bool (*decode)(const uint8_t *bytes, size_t size), const uint8_t *bytes, size_t size) {
    uint8_t *more = (uint8_t *)malloc(size + 16);
    uint32_t seed = 1, i, k;
    size_t n;
    REQUIRE(more != NULL);
    CHECK(decode_cut(decode, bytes, size));
    for (n = 0; n < size; n++)
        if (!CHECK(!decode_cut(decode, bytes, n))) fprintf(stderr, "%d of %d bytes were believed\n", (int)n, (int)size);
    memcpy(more, bytes, size);
    memset(more + size, 0xA5, 16);
    CHECK(decode_cut(decode, more, size + 16));
    CHECK(decode_cut(decode, more, size + 1));
    for (i = 0; i < 3000 / TEST_SLOWDOWN; i++) {
        memcpy(more, bytes, size);
        for (k = 0; k < 1 + i % 4; k++) {
            seed = seed * 1664525u + 1013904223u;
            more[(seed >> 8) % size] = (uint8_t)(seed >> 16);
        }
        decode_cut(decode, more, (seed >> 5) % 3 ? size : (seed >> 7) % (size + 1));
    }
    free(more);
}

static bool hello_decode(const uint8_t *bytes, size_t size) {
    static tpr_wire_hello out;
    return tpr_wire_read_hello(bytes, size, &out);
}

static void hello_fill(tpr_wire_hello *hello, uint32_t offers) {
    uint32_t i;
    memset(hello, 0, sizeof *hello);
    hello->major = TPR_WIRE_MAJOR;
    hello->minor = 7;
    for (i = 0; i < 16; i++) hello->nonce[i] = (uint8_t)(i + 1), hello->token[i] = (uint8_t)(i + 100);
    hello->message_bytes = UINT64_C(0x123456789A);
    hello->metadata_bytes = 1 << 20;
    hello->tensors = 4096;
    hello->window = 1 << 20;
    hello->offer_count = offers;
    hello->space = UINT64_C(0xABCDEF0123456789);
    hello->process = 4711;
    for (i = 0; i < offers; i++) {
        tpr_wire_offer *offer = &hello->offers[i];
        snprintf(offer->name, sizeof offer->name, "a_backend_%u", i % 100);
        offer->channel = i % 2 != 0;
        offer->domain_size = (uint8_t)(i * 2 % 65);
        memset(offer->domain, (int)i, offer->domain_size);
        if (i % 3 == 0) memset(offer->address, 'x', sizeof offer->address - 1);
    }
}

TEST(hello) {
    static tpr_wire_hello in, out;
    static uint8_t bytes[16384];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    uint32_t i;
    hello_fill(&in, TPR_WIRE_OFFERS);
    tpr_wire_write_hello(&w, &in);
    REQUIRE(!w.failed);
    REQUIRE(tpr_wire_read_hello(bytes, (size_t)(w.at - bytes), &out));
    CHECK_EQ_INT(out.major, in.major);
    CHECK_EQ_INT(out.minor, in.minor);
    CHECK_MEM(out.nonce, in.nonce, 16);
    CHECK_MEM(out.token, in.token, 16);
    CHECK_EQ_INT(out.message_bytes, in.message_bytes);
    CHECK_EQ_INT(out.metadata_bytes, in.metadata_bytes);
    CHECK_EQ_INT(out.tensors, in.tensors);
    CHECK_EQ_INT(out.window, in.window);
    REQUIRE_EQ_INT(out.offer_count, in.offer_count);
    for (i = 0; i < in.offer_count; i++) {
        CHECK_STR(out.offers[i].name, in.offers[i].name);
        CHECK_STR(out.offers[i].address, in.offers[i].address);
        CHECK_EQ_INT(out.offers[i].channel, in.offers[i].channel);
        CHECK_EQ_INT(out.offers[i].domain_size, in.offers[i].domain_size);
        CHECK_MEM(out.offers[i].domain, in.offers[i].domain, in.offers[i].domain_size);
    }
    CHECK(out.space == in.space);
    CHECK_EQ_INT(out.process, in.process);
    decode_all(hello_decode, bytes, (size_t)(w.at - bytes));
    hello_fill(&in, 2);
    w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_hello(&w, &in);
    decode_all(hello_decode, bytes, (size_t)(w.at - bytes));
    size_t size = (size_t)(w.at - bytes);
    in.minor = 0;                                                      /* which did not say who speaks */
    w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_hello(&w, &in);
    CHECK_EQ_INT(w.at - bytes, size - 12);
    REQUIRE(tpr_wire_read_hello(bytes, size, &out));
    CHECK(out.space == 0 && out.process == 0);
    decode_all(hello_decode, bytes, (size_t)(w.at - bytes));
}

/* Where the n-th u32 of interest stands in a hello: its offers begin at byte 68. */
enum { HELLO_COUNT = 8 + 32 + 16 + 8, HELLO_OFFERS = HELLO_COUNT + 4 };

TEST(hello_limits) {
    static tpr_wire_hello in, out;
    static uint8_t bytes[16384], bad[16384];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    size_t size, name = HELLO_OFFERS + 1;
    hello_fill(&in, 1);
    tpr_wire_write_hello(&w, &in);
    size = (size_t)(w.at - bytes);
    CHECK_EQ_INT(tpr_base_load_le32(bytes + HELLO_COUNT), 1);
    memcpy(bad, bytes, size);
    bad[0] ^= 1;
    CHECK(!tpr_wire_read_hello(bad, size, &out));                      /* the magic */
    memcpy(bad, bytes, size);
    bad[4] = TPR_WIRE_MAJOR + 1;                                       /* another version: known, and nothing read */
    CHECK(tpr_wire_read_hello(bad, size, &out));
    CHECK_EQ_INT(out.major, TPR_WIRE_MAJOR + 1);
    CHECK_EQ_INT(out.offer_count, 0);
    CHECK(tpr_wire_read_hello(bad, 8, &out));
    CHECK(!tpr_wire_read_hello(bad, 7, &out));
    memset(bad, 0, sizeof bad);                                        /* one offer too many, all there */
    memcpy(bad, bytes, HELLO_OFFERS);
    tpr_base_store_le32(bad + HELLO_COUNT, TPR_WIRE_OFFERS);
    CHECK(tpr_wire_read_hello(bad, sizeof bad, &out));
    tpr_base_store_le32(bad + HELLO_COUNT, TPR_WIRE_OFFERS + 1);
    CHECK(!tpr_wire_read_hello(bad, sizeof bad, &out));
    tpr_base_store_le32(bad + HELLO_COUNT, UINT32_MAX);
    CHECK(!tpr_wire_read_hello(bad, sizeof bad, &out));
    memset(bad, 'n', sizeof bad);                                      /* a name of 16 bytes */
    memcpy(bad, bytes, name);
    tpr_base_store_le32(bad + name, 16);
    memset(bad + name + 4 + 16, 0, 8);
    CHECK(!tpr_wire_read_hello(bad, sizeof bad, &out));
    memcpy(bad, bytes, size);                                          /* a 0 within it */
    bad[name + 4 + 2] = 0;
    CHECK(!tpr_wire_read_hello(bad, size, &out));
    memset(bad, 0, sizeof bad);                                        /* a domain of 65 bytes */
    memcpy(bad, bytes, name);
    tpr_base_store_le32(bad + name + 4, 65);
    CHECK(!tpr_wire_read_hello(bad, sizeof bad, &out));
    memset(bad + name, 'a', sizeof bad - name);                        /* an address of 112 bytes */
    memset(bad + name, 0, 8);
    tpr_base_store_le32(bad + name + 8, 112);
    CHECK(!tpr_wire_read_hello(bad, sizeof bad, &out));
    tpr_base_store_le32(bad + name + 8, 111);
    CHECK(tpr_wire_read_hello(bad, sizeof bad, &out));
    CHECK_EQ_INT(strlen(out.offers[0].address), 111);
}

TEST(writer_stays_within) {
    static tpr_wire_hello in;
    uint8_t bytes[200];
    size_t room;
    hello_fill(&in, 3);
    for (room = 0; room < sizeof bytes - 1; room++) {
        tpr_wire_writer w = tpr_wire_writer_of(bytes, room);
        memset(bytes, 0x77, sizeof bytes);
        tpr_wire_write_hello(&w, &in);
        CHECK(w.failed);
        CHECK_EQ_INT(bytes[room], 0x77);
    }
}

TEST(reader_stays_failed) {
    uint8_t bytes[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    tpr_wire_reader r = tpr_wire_reader_of(bytes, sizeof bytes);
    CHECK_EQ_INT(tpr_wire_read_u32(&r), 0x04030201);
    CHECK_EQ_INT(tpr_wire_read_u64(&r), 0);
    CHECK(r.failed);
    CHECK_EQ_INT(tpr_wire_read_u8(&r), 0);       /* though there would be one */
    CHECK_EQ_INT(tpr_wire_read_u16(&r), 0);
    CHECK_EQ_INT(tpr_wire_read_u32(&r), 0);
    CHECK(tpr_wire_read_raw(&r, 1).data == NULL);
    CHECK_EQ_INT(tpr_wire_read_bytes(&r, 100).size, 0);
    r = tpr_wire_reader_of(bytes, sizeof bytes);
    CHECK(tpr_wire_read_raw(&r, SIZE_MAX).data == NULL && r.failed);
}

static bool move_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_move out;
    return tpr_wire_read_move(bytes, size, &out);
}

TEST(move) {
    tpr_wire_move in, out;
    uint8_t bytes[36];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    memset(in.token, 3, 16);
    memset(in.nonce, 9, 16);
    tpr_wire_write_move(&w, &in);
    CHECK(!w.failed && w.at == w.end);
    CHECK(tpr_wire_read_move(bytes, sizeof bytes, &out));
    CHECK_MEM(&in, &out, sizeof in);
    decode_all(move_decode, bytes, sizeof bytes);
    bytes[3] ^= 0x80;
    CHECK(!move_decode(bytes, sizeof bytes));
}

static bool agree_decode(const uint8_t *bytes, size_t size) {
    static tpr_wire_agree out;
    return tpr_wire_read_agree(bytes, size, &out);
}

TEST(agree) {
    static tpr_wire_agree in, out;
    static uint8_t bytes[TPR_WIRE_CONTROL], bad[TPR_WIRE_CONTROL];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    uint32_t i;
    size_t size;
    in.step = 3;
    in.count = TPR_WIRE_CHANNELS;
    for (i = 0; i < in.count; i++) {
        snprintf(in.proofs[i].name, 16, "channel%u", i);
        in.proofs[i].challenge_size = i * 16;
        in.proofs[i].answer_size = TPR_WIRE_PROOF - i;
        memset(in.proofs[i].challenge, (int)i, in.proofs[i].challenge_size);
        memset(in.proofs[i].answer, (int)i + 50, in.proofs[i].answer_size);
        in.proofs[i].verdict = i % 2 != 0;
    }
    tpr_wire_write_agree(&w, &in);
    REQUIRE(!w.failed);
    size = (size_t)(w.at - bytes);
    REQUIRE(tpr_wire_read_agree(bytes, size, &out));
    CHECK_EQ_INT(out.step, 3);
    for (i = 0; i < in.count; i++) {
        CHECK_STR(out.proofs[i].name, in.proofs[i].name);
        CHECK_EQ_INT(out.proofs[i].verdict, in.proofs[i].verdict);
        CHECK_EQ_INT(out.proofs[i].challenge_size, in.proofs[i].challenge_size);
        CHECK_EQ_INT(out.proofs[i].answer_size, in.proofs[i].answer_size);
        CHECK_MEM(out.proofs[i].challenge, in.proofs[i].challenge, in.proofs[i].challenge_size);
        CHECK_MEM(out.proofs[i].answer, in.proofs[i].answer, in.proofs[i].answer_size);
    }
    in.count = 2;
    w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_agree(&w, &in);
    decode_all(agree_decode, bytes, (size_t)(w.at - bytes));
    memset(bad, 0, sizeof bad);                  /* one channel too many; a challenge and an answer too long */
    tpr_base_store_le32(bad + 4, TPR_WIRE_CHANNELS);
    CHECK(agree_decode(bad, sizeof bad));
    tpr_base_store_le32(bad + 4, TPR_WIRE_CHANNELS + 1);
    CHECK(!agree_decode(bad, sizeof bad));
    tpr_base_store_le32(bad + 4, 1);
    tpr_base_store_le32(bad + 12, TPR_WIRE_PROOF);
    CHECK(agree_decode(bad, sizeof bad));
    tpr_base_store_le32(bad + 12, TPR_WIRE_PROOF + 1);
    CHECK(!agree_decode(bad, sizeof bad));
    tpr_base_store_le32(bad + 12, 0);
    tpr_base_store_le32(bad + 16, TPR_WIRE_PROOF + 1);
    CHECK(!agree_decode(bad, sizeof bad));
}

static bool bye_decode(const uint8_t *bytes, size_t size) {
    tprpc_status status;
    char text[64];
    return tpr_wire_read_bye(bytes, size, &status, text, sizeof text);
}

TEST(bye) {
    uint8_t bytes[100];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tprpc_status status;
    char text[64];
    tpr_wire_write_bye(&w, TPRPC_ERROR_LIMIT, "no more room");
    CHECK(tpr_wire_read_bye(bytes, (size_t)(w.at - bytes), &status, text, sizeof text));
    CHECK_EQ_INT(status, TPRPC_ERROR_LIMIT);
    CHECK_STR(text, "no more room");
    decode_all(bye_decode, bytes, (size_t)(w.at - bytes));
    tpr_base_store_le32(bytes, 12345);           /* a status of a later version */
    CHECK(tpr_wire_read_bye(bytes, (size_t)(w.at - bytes), &status, text, sizeof text));
    CHECK_EQ_INT(status, TPRPC_ERROR_SYSTEM);
    CHECK(!tpr_wire_read_bye(bytes, (size_t)(w.at - bytes), &status, text, 12));
}

static bool lane_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_lane out;
    return tpr_wire_read_lane(bytes, size, &out);
}

TEST(lane) {
    tpr_wire_lane in, out;
    uint8_t bytes[TPR_WIRE_LANE_BYTES];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    memset(in.move.token, 3, 16);
    memset(in.move.nonce, 4, 16);
    in.number = 8;
    in.sent = UINT64_C(0x123456789abcdef0);
    tpr_wire_write_lane(&w, &in);
    REQUIRE(!w.failed && w.at == bytes + sizeof bytes);
    CHECK(tpr_wire_read_lane(bytes, sizeof bytes, &out));
    CHECK_MEM(&in.move, &out.move, sizeof in.move);
    CHECK(out.number == in.number && out.sent == in.sent);
    decode_all(lane_decode, bytes, sizeof bytes);
    bytes[0]++;
    CHECK(!lane_decode(bytes, sizeof bytes));
}

TEST(frame_headers) {
    static const struct { uint8_t kind; uint32_t least, most;
    } kinds[] = {{TPR_WIRE_HELLO, 0, TPR_WIRE_FIRST},
                 {TPR_WIRE_MOVE, 0, TPR_WIRE_FIRST},
                 {TPR_WIRE_MOVED, 0, TPR_WIRE_FIRST},
                 {TPR_WIRE_AGREE, 0, TPR_WIRE_CONTROL},
                 {TPR_WIRE_MESSAGE, TPR_WIRE_MESSAGE_HEADER, 5000},
                 {TPR_WIRE_CHANNEL, 0, TPR_WIRE_CONTROL},
                 {TPR_WIRE_DATA, TPR_WIRE_DATA_HEADER + 1, TPR_WIRE_DATA_HEADER + TPR_WIRE_CHUNK},
                 {TPR_WIRE_CREDIT, 0, TPR_WIRE_CONTROL},
                 {TPR_WIRE_BYE, 0, TPR_WIRE_CONTROL},
                 {TPR_WIRE_LANE, 0, TPR_WIRE_FIRST},
                 {TPR_WIRE_LANED, 0, TPR_WIRE_FIRST},
                 {TPR_WIRE_WANT, 0, TPR_WIRE_CONTROL},
                 {TPR_WIRE_LOST, 0, TPR_WIRE_CONTROL}};
    uint8_t in[8];
    tpr_wire_frame out;
    uint32_t kind, i, handles;
    for (i = 0; i < COUNT(kinds); i++) {
        tpr_wire_put_frame(in, kinds[i].most, kinds[i].kind, 0, 0x1234);
        CHECK(tpr_wire_get_frame(in, 5000, &out));
        CHECK_EQ_INT(out.size, kinds[i].most);
        CHECK_EQ_INT(out.kind, kinds[i].kind);
        CHECK_EQ_INT(out.channel, 0x1234);
        tpr_wire_put_frame(in, kinds[i].most + 1, kinds[i].kind, 0, 0);
        CHECK(!tpr_wire_get_frame(in, 5000, &out));
        tpr_wire_put_frame(in, UINT32_MAX, kinds[i].kind, 0, 0);
        CHECK(!tpr_wire_get_frame(in, 5000, &out));
        tpr_wire_put_frame(in, kinds[i].least, kinds[i].kind, 0, 0);
        CHECK(tpr_wire_get_frame(in, 5000, &out));
        if (kinds[i].least) tpr_wire_put_frame(in, kinds[i].least - 1, kinds[i].kind, 0, 0);
        if (kinds[i].least) CHECK(!tpr_wire_get_frame(in, 5000, &out));
        for (handles = 1; handles < 256; handles++) {
            tpr_wire_put_frame(in, kinds[i].least, kinds[i].kind, (uint8_t)handles, 0);
            CHECK_EQ_INT(tpr_wire_get_frame(in, 5000, &out), kinds[i].kind == TPR_WIRE_CHANNEL && handles <= 8);
        }
    }
    for (kind = 0; kind < 256; kind++) {         /* what is not known is refused */
        bool known = kind >= TPR_WIRE_HELLO && kind <= TPR_WIRE_LOST;
        tpr_wire_put_frame(in, 20, (uint8_t)kind, 0, 0);
        CHECK_EQ_INT(tpr_wire_get_frame(in, 5000, &out), known);
    }
}

static bool head_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    tpr_wire_message m;
    tpr_wire_read_message(&r, &m);
    return !r.failed;
}

static bool payload_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    tpr_wire_item item;
    tpr_wire_read_payload(&r, &item, 3);
    return !r.failed;
}

static bool tensor_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    tpr_wire_item item;
    tpr_wire_read_tensor(&r, &item, 3);
    return !r.failed;
}

static bool transfer_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_reader r = tpr_wire_reader_of(bytes, size);
    tpr_wire_transfer transfer;
    tpr_wire_read_transfer(&r, &transfer);
    return !r.failed;
}

TEST(message_head) {
    uint8_t bytes[TPR_WIRE_MESSAGE_HEADER];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_reader r = tpr_wire_reader_of(bytes, sizeof bytes);
    tpr_wire_message head = {0x01020304, 5, 6, TPR_WIRE_CHANNELS, TPR_WIRE_PREFIX}, got;
    tpr_wire_write_message(&w, &head);
    CHECK(!w.failed && w.at == w.end);
    tpr_wire_read_message(&r, &got);
    CHECK(!r.failed && got.metadata_size == head.metadata_size && got.payloads == 5 && got.tensors == 6);
    CHECK(got.transfers == head.transfers && got.prefix_size == head.prefix_size);
    decode_all(head_decode, bytes, sizeof bytes);
    bytes[8] = TPR_WIRE_CHANNELS + 1;
    CHECK(!head_decode(bytes, sizeof bytes));
    bytes[8] = 0;
    bytes[9] = TPR_WIRE_PREFIX + 1;
    CHECK(!head_decode(bytes, sizeof bytes));
}

TEST(message_payload) {
    uint8_t bytes[TPR_WIRE_PAYLOAD_BYTES];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_reader r = tpr_wire_reader_of(bytes, sizeof bytes);
    tpr_wire_item item, back;
    memset(&item, 0, sizeof item);
    item.size = UINT64_C(0x1122334455);
    item.metadata_size = 77;
    item.transfer = 2;
    tpr_wire_write_payload(&w, &item);
    CHECK(!w.failed && w.at == w.end);
    tpr_wire_read_payload(&r, &back, 3);
    CHECK(!r.failed && back.size == item.size && back.metadata_size == 77 && back.transfer == 2);
    decode_all(payload_decode, bytes, sizeof bytes);
    bytes[12] = 3;                               /* a transfer that is not there */
    CHECK(!payload_decode(bytes, sizeof bytes));
    bytes[12] = TPR_WIRE_INLINE;
    CHECK(payload_decode(bytes, sizeof bytes));
}

TEST(message_tensor) {
    uint8_t bytes[200];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_reader r;
    tpr_wire_item item, back;
    int d;
    memset(&item, 0, sizeof item);
    item.metadata_size = 77;
    item.transfer = 2;
    item.dtype = TPRPC_F32;
    item.ndim = TPRPC_MAX_DIMS;
    item.size = 4 * 256;
    item.device.kind = TPRPC_CUDA;
    item.device.index = 3;
    item.target.kind = TPRPC_DEVICE_USER + 5;
    item.target.index = -1;
    for (d = 0; d < TPRPC_MAX_DIMS; d++) item.shape[d] = 2;
    tpr_wire_write_tensor(&w, &item);
    CHECK_EQ_INT((size_t)(w.at - bytes), tpr_wire_tensor_bytes(TPRPC_MAX_DIMS));
    r = tpr_wire_reader_of(bytes, (size_t)(w.at - bytes));
    memset(&back, 0, sizeof back);
    tpr_wire_read_tensor(&r, &back, 3);
    CHECK(!r.failed && back.dtype == TPRPC_F32 && back.ndim == TPRPC_MAX_DIMS && back.size == 1024);
    CHECK(back.device.kind == TPRPC_CUDA && back.device.index == 3 && back.target.kind == TPRPC_DEVICE_USER + 5);
    CHECK(back.target.index == -1 && back.metadata_size == 77 && back.transfer == 2);
    CHECK_MEM(back.shape, item.shape, sizeof item.shape);
    decode_all(tensor_decode, bytes, (size_t)(w.at - bytes));
    bytes[14] = TPRPC_MAX_DIMS + 1;
    CHECK(!tensor_decode(bytes, (size_t)(w.at - bytes)));
    bytes[14] = TPRPC_MAX_DIMS;
    bytes[12] = 3;
    CHECK(!tensor_decode(bytes, (size_t)(w.at - bytes)));
}

TEST(message_transfer) {
    static uint8_t bytes[6000], descriptor[TPR_WIRE_DESCRIPTOR + 1];
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_reader r;
    tpr_wire_transfer transfer, t;
    memset(descriptor, 8, sizeof descriptor);
    transfer.id = UINT64_C(0xFFEEDDCCBBAA9988);
    transfer.channel = 15;
    transfer.descriptor.data = descriptor;
    transfer.descriptor.size = 100;
    tpr_wire_write_transfer(&w, &transfer);
    CHECK_EQ_INT(w.at - bytes, TPR_WIRE_TRANSFER_BYTES + 100);
    r = tpr_wire_reader_of(bytes, (size_t)(w.at - bytes));
    tpr_wire_read_transfer(&r, &t);
    CHECK(!r.failed && t.id == transfer.id && t.channel == 15 && t.descriptor.size == 100);
    decode_all(transfer_decode, bytes, (size_t)(w.at - bytes));
    transfer.descriptor.size = TPR_WIRE_DESCRIPTOR;
    w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_transfer(&w, &transfer);
    CHECK(transfer_decode(bytes, (size_t)(w.at - bytes)));
    transfer.descriptor.size = TPR_WIRE_DESCRIPTOR + 1;
    w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_transfer(&w, &transfer);
    CHECK(!transfer_decode(bytes, (size_t)(w.at - bytes)));
}

TEST(shapes) {
    static const struct { int32_t dtype, ndim; int64_t shape[4]; uint64_t size; bool fits;
    } cases[] = {{TPRPC_BYTES, 0, {0}, 12345, true},
                 {TPRPC_BYTES, 0, {0}, 0, true},
                 {TPRPC_F32, 0, {0}, 4, true},
                 {TPRPC_F32, 0, {0}, 5, false},
                 {TPRPC_F32, 2, {2, 3}, 24, true},
                 {TPRPC_F32, 2, {2, 3}, 23, false},
                 {TPRPC_F32, 2, {2, 3}, 25, false},
                 {TPRPC_F32, 2, {0, 3}, 0, true},
                 {TPRPC_F32, 2, {3, 0}, 0, true},
                 {TPRPC_F32, 2, {0, 3}, 4, false},
                 {TPRPC_F32, 1, {-1}, 4, false},
                 {TPRPC_F32, 2, {-1, -1}, 4, false},
                 {TPRPC_U8, 2, {INT64_C(1) << 32, INT64_C(1) << 32}, 0, false},
                 {TPRPC_U8, 3, {INT64_C(1) << 32, INT64_C(1) << 31, 2}, 0, false},
                 {TPRPC_C128, 1, {INT64_C(1) << 60}, 0, false},
                 {TPRPC_C128, 1, {INT64_MAX}, UINT64_MAX, false},
                 {TPRPC_U8, 1, {INT64_MAX}, (uint64_t)INT64_MAX, true},
                 {TPRPC_C128 + 1, 1, {1}, 1, false},
                 {-1, 1, {1}, 1, false},
                 {TPRPC_U8, -1, {1}, 1, false},
                 {TPRPC_U8, TPRPC_MAX_DIMS + 1, {1}, 1, false}};
    size_t i;
    for (i = 0; i < COUNT(cases); i++) {
        int64_t shape[TPRPC_MAX_DIMS + 1] = {0};
        memcpy(shape, cases[i].shape, sizeof cases[i].shape);
        if (!CHECK_EQ_INT(tpr_wire_shape_fits(cases[i].dtype, cases[i].ndim, shape, cases[i].size), cases[i].fits))
            fprintf(stderr, "case %d\n", (int)i);
    }
}

static bool call_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_call call;
    return tpr_wire_get_call(bytes, size, &call);
}

static bool error_decode(const uint8_t *bytes, size_t size) {
    tprpc_error error;
    return tpr_wire_get_error(bytes, size, &error);
}

static bool intro_decode(const uint8_t *bytes, size_t size) {
    char name[TPR_WIRE_NAME];
    uint32_t rank;
    return tpr_wire_get_intro(bytes, size, name, sizeof name, &rank);
}

static bool worker_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_worker worker;
    return tpr_wire_get_worker(bytes, size, &worker);
}

TEST(calls) {
    tpr_wire_call in = {TPR_WIRE_REPLY, 1, 0x11223344, 0x55667788, UINT64_C(0x123456789ABCDEF0), 0x99AABBCC, 7}, out;
    uint8_t bytes[400];
    tprpc_error error;
    char name[TPR_WIRE_NAME];
    uint32_t kind, rank = 0;
    size_t size;
    tpr_wire_put_call(bytes, &in);
    CHECK(tpr_wire_get_call(bytes, TPR_WIRE_CALL_BYTES, &out));
    CHECK(in.kind == out.kind && in.flags == out.flags && in.method == out.method && in.lane == out.lane);
    CHECK(in.timeout_ms == out.timeout_ms && in.id == out.id && in.depth == out.depth);
    decode_all(call_decode, bytes, TPR_WIRE_CALL_BYTES);
    for (kind = 0; kind < 256; kind++) {
        bytes[0] = (uint8_t)kind;
        CHECK_EQ_INT(call_decode(bytes, TPR_WIRE_CALL_BYTES), kind >= TPR_WIRE_CALL && kind <= TPR_WIRE_INTRO);
    }
    size = tpr_wire_put_error(bytes, sizeof bytes, TPRPC_ERROR_REMOTE, -42, "it did not work");
    CHECK(size > 0 && tpr_wire_get_error(bytes, size, &error));
    CHECK_EQ_INT(error.status, TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(error.user_code, -42);
    CHECK_STR(error.text, "it did not work");
    decode_all(error_decode, bytes, size);
    tpr_base_store_le32(bytes, TPRPC_OK);        /* an error that is none, or not known */
    CHECK(tpr_wire_get_error(bytes, size, &error) && error.status == TPRPC_ERROR_REMOTE);
    tpr_base_store_le32(bytes, 999);
    CHECK(tpr_wire_get_error(bytes, size, &error) && error.status == TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(tpr_wire_put_error(bytes, 20, TPRPC_ERROR_REMOTE, 0, "it does not fit in there"), 0);
    size = tpr_wire_put_intro(bytes, sizeof bytes, "worker7", 7);
    CHECK(size > 0 && tpr_wire_get_intro(bytes, size, name, sizeof name, &rank));
    CHECK_STR(name, "worker7");
    CHECK_EQ_INT(rank, 7);
    decode_all(intro_decode, bytes, size);
    CHECK(!intro_decode(bytes, tpr_wire_put_intro(bytes, sizeof bytes, "", 7)));
    CHECK(!intro_decode(bytes, tpr_wire_put_intro(bytes, sizeof bytes, "\xff\xfe", 7)));
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = 0;
    CHECK(intro_decode(bytes, tpr_wire_put_intro(bytes, sizeof bytes, name, 7)));
    size = tpr_wire_put_intro(bytes, sizeof bytes, name, 7);
    bytes[4]++;
    CHECK(!intro_decode(bytes, size + 1));
}

static bool kind_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_kind kind;
    return tpr_wire_get_kind(bytes, size, &kind);
}

static bool members_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_members members;
    return tpr_wire_get_members(bytes, size, &members);
}

static bool leave_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_leave word;
    return tpr_wire_get_leave(bytes, size, &word);
}

TEST(words_of_groups) {
    static uint8_t bytes[400], taken[3] = {1, 2, 3};
    tpr_wire_kind kind;
    tpr_wire_members members, back;
    tpr_wire_leave word, said;
    size_t size = tpr_wire_put_kind(bytes, sizeof bytes, 77, 3, "ann");
    CHECK(tpr_wire_get_kind(bytes, size, &kind) && kind.nonce == 77 && kind.world_size == 3);
    CHECK_STR(kind.name, "ann");
    decode_all(kind_decode, bytes, size);
    CHECK(!kind_decode(bytes, tpr_wire_put_kind(bytes, sizeof bytes, 77, 3, "")));
    memset(&members, 0, sizeof members);
    members.generation = 5;
    members.holder = 6;
    members.ticket = 7;
    members.space = 8;
    members.process = 9;
    snprintf(members.name, sizeof members.name, "bob");
    members.taken.data = taken;
    members.taken.size = sizeof taken;
    size = tpr_wire_put_members(bytes, sizeof bytes, &members);
    CHECK(tpr_wire_get_members(bytes, size, &back) && back.generation == 5 && back.holder == 6 &&
          back.ticket == 7 && back.space == 8 && back.process == 9);
    CHECK_STR(back.name, "bob");
    if (CHECK_EQ_INT(back.taken.size, sizeof taken)) CHECK_MEM(back.taken.data, taken, sizeof taken);
    decode_all(members_decode, bytes, size);
    tpr_base_store_le32(bytes + size - 7, TPR_WIRE_MEMBERS + 1);
    CHECK(!members_decode(bytes, sizeof bytes));
    memset(&word, 0, sizeof word);
    word.activity = 9;
    word.calls = 10;
    word.requests = 11;
    for (int named = 0; named < 2; named++) {
        snprintf(word.method, sizeof word.method, "%s", named ? "hold" : "");
        size = tpr_wire_put_leave(bytes, sizeof bytes, &word);
        CHECK(tpr_wire_get_leave(bytes, size, &said) && memcmp(&word, &said, sizeof word) == 0);
        decode_all(leave_decode, bytes, size);
    }
    bytes[size - 1] = 0xFF;                      /* a method that is no UTF-8 */
    CHECK(!leave_decode(bytes, size));
}

TEST(workers) {
    static tpr_wire_worker in, out;
    static uint8_t bytes[2000];
    size_t size;
    uint32_t i;
    snprintf(in.name, sizeof in.name, "the worker");
    in.nonce = UINT64_C(0xABCDEF0102030405);
    in.rank = 12;
    in.space = UINT64_C(0x1020304050607080);
    in.process = 4711;
    in.level = TPR_WIRE_LEVEL;
    in.address_count = TPR_WIRE_ADDRESSES;
    for (i = 0; i < in.address_count; i++)
        snprintf(in.addresses[i], sizeof in.addresses[i], "tcp://127.0.0.1:%u", 1000 + i);
    size = tpr_wire_put_worker(bytes, sizeof bytes, &in);
    CHECK(size > 0 && tpr_wire_get_worker(bytes, size, &out));
    CHECK_STR(out.name, in.name);
    CHECK(out.nonce == in.nonce && out.rank == 12 && out.address_count == in.address_count);
    for (i = 0; i < in.address_count; i++) CHECK_STR(out.addresses[i], in.addresses[i]);
    CHECK(out.space == in.space && out.process == 4711);
    CHECK_EQ_INT(out.level, TPR_WIRE_LEVEL);
    decode_all(worker_decode, bytes, size - 16);
    CHECK(tpr_wire_get_worker(bytes, size - 16, &out) && out.space == 0 && out.process == 0);   /* as it once was, */
    CHECK(tpr_wire_get_worker(bytes, size - 4, &out) && out.process == 4711 && out.level == 0);   /* and later, */
    CHECK(tpr_wire_get_worker(bytes, size, &out) && !out.tells_devices);   /* and after that */
    in.tells_devices = in.has_maps = 1;
    in.run_count = TPR_WIRE_RUNS;
    for (i = 0; i < in.run_count; i++) {
        in.runs[i].kind = (int32_t)(60 + i);
        in.runs[i].first = i;
        in.runs[i].count = 7 * i;
    }
    size_t most = tpr_wire_put_worker(bytes, sizeof bytes, &in);
    CHECK_EQ_INT(most, size + 8 + TPR_WIRE_RUNS * 12);
    CHECK_LE_INT(most, TPR_WIRE_ENTRY);          /* what the agents have room for */
    CHECK(tpr_wire_get_worker(bytes, most, &out) && memcmp(&in, &out, sizeof in) == 0);
    for (i = 1; i < 8; i++) CHECK(tpr_wire_get_worker(bytes, size + i, &out) && !out.tells_devices);
    for (size_t cut = size + 8; cut < most; cut++) CHECK(!worker_decode(bytes, cut));
    bytes[size + 4]++;                           /* a run too many */
    CHECK(!worker_decode(bytes, sizeof bytes));
    memset(bytes + 12 + 4 + 10 + 4, 0, sizeof bytes - 30);
    tpr_base_store_le32(bytes + 12 + 4 + 10, TPR_WIRE_ADDRESSES);
    CHECK(worker_decode(bytes, sizeof bytes));
    tpr_base_store_le32(bytes + 12 + 4 + 10, TPR_WIRE_ADDRESSES + 1);
    CHECK(!worker_decode(bytes, sizeof bytes));
    bytes[16] = 0xFF;                            /* a name that is no UTF-8 */
    tpr_base_store_le32(bytes + 12 + 4 + 10, 0);
    CHECK(!worker_decode(bytes, sizeof bytes));
}

/* ---- device maps ---- */

static void map_fill(tpr_wire_map *maps, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        maps[i].rank = i % 3 ? i : UINT32_MAX;
        maps[i].from.kind = (int32_t)i + 1;
        maps[i].from.index = -(int32_t)i;
        maps[i].to.kind = TPRPC_DEVICE_USER;
        maps[i].to.index = (int32_t)(i * 7);
    }
}

static bool maps_same(tpr_wire_reader *r, const tpr_wire_map *maps, uint32_t count) {
    bool same = true;
    for (uint32_t i = 0; i < count; i++) {
        tpr_wire_map map = tpr_wire_read_map(r);
        same &= memcmp(&map, &maps[i], sizeof map) == 0;
    }
    return same && !r->failed;
}

static bool intro_maps_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_reader r;
    uint32_t count;
    bool good = tpr_wire_get_intro_maps(bytes, size, &r, &count);
    for (uint32_t i = 0; good && i < count; i++) tpr_wire_read_map(&r);
    return good && !r.failed;
}

static bool mapped_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_reader r;
    tprpc_error said;
    uint32_t count;
    bool good = tpr_wire_get_mapped(bytes, size, &said, &r, &count);
    for (uint32_t i = 0; good && i < count; i++) tpr_wire_read_map(&r);
    return good && !r.failed;
}

/* Behind an introduction, which an older worker reads and skips them; and none behind an older worker's. */
TEST(maps_of_a_caller) {
    static tpr_wire_map maps[TPR_WIRE_MAPS + 1];
    static uint8_t bytes[30000];
    char name[TPR_WIRE_NAME];
    const uint32_t counts[] = {1, 3, TPR_WIRE_MAPS};
    tpr_wire_reader r;
    uint32_t rank, count;
    size_t size = tpr_wire_put_intro(bytes, sizeof bytes, "ann", 9);
    map_fill(maps, TPR_WIRE_MAPS + 1);
    CHECK(tpr_wire_get_intro_maps(bytes, size, &r, &count) && count == 0);
    for (int i = 0; i < 3; i++) {
        tpr_wire_writer w = tpr_wire_writer_of(bytes + size, sizeof bytes - size);
        tpr_wire_write_maps(&w, maps, counts[i]);
        const size_t whole = (size_t)(w.at - bytes);
        CHECK_EQ_INT(whole, size + 4 + counts[i] * TPR_WIRE_MAP_BYTES);
        CHECK(tpr_wire_get_intro(bytes, whole, name, sizeof name, &rank) && rank == 9);
        REQUIRE(tpr_wire_get_intro_maps(bytes, whole, &r, &count) && count == counts[i]);
        CHECK(maps_same(&r, maps, count));
        for (size_t cut = size + 1; cut < whole; cut++) CHECK(!intro_maps_decode(bytes, cut));
    }
    tpr_base_store_le32(bytes + size, TPR_WIRE_MAPS + 1);
    CHECK(!intro_maps_decode(bytes, sizeof bytes));
}

TEST(maps_in_the_store) {
    static tpr_wire_map maps[TPR_WIRE_MAPS];
    static uint8_t bytes[30000];
    tpr_wire_reader r;
    tprpc_error in, out;
    uint32_t count;
    map_fill(maps, TPR_WIRE_MAPS);
    memset(&in, 0, sizeof in);
    in.status = TPRPC_ERROR_NO_WORKER;
    memset(in.text, 'x', sizeof in.text - 1);
    size_t size = tpr_wire_put_mapped(bytes, TPR_WIRE_MAPPED_BYTES, &in, maps, TPR_WIRE_MAPS);
    CHECK_EQ_INT(size, TPR_WIRE_MAPPED_BYTES);
    CHECK_LE_INT(size, TPR_WIRE_STORE_VALUE);
    CHECK_EQ_INT(tpr_wire_put_mapped(bytes, size - 1, &in, maps, TPR_WIRE_MAPS), 0);
    REQUIRE(tpr_wire_get_mapped(bytes, size, &out, &r, &count) && count == TPR_WIRE_MAPS);
    CHECK(maps_same(&r, maps, count));
    CHECK_EQ_INT(out.status, in.status);
    CHECK_STR(out.text, in.text);
    size = tpr_wire_put_mapped(bytes, sizeof bytes, &in, maps, 2);
    decode_all(mapped_decode, bytes, size);
    tpr_base_store_le32(bytes, TPRPC_PENDING);   /* no outcome */
    CHECK(!mapped_decode(bytes, size));
    tpr_base_store_le32(bytes, TPRPC_ERROR_SYSTEM + 1);
    CHECK(!mapped_decode(bytes, size));
}

/* ---- what stores say ---- */

static tpr_base_bytes bytes_of(const char *text, size_t size) {
    tpr_base_bytes bytes;
    bytes.data = (const uint8_t *)text;
    bytes.size = size;
    return bytes;
}

static bool store_hello_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_store_hello hello;
    return tpr_wire_store_read_hello(bytes, size, &hello);
}

static bool store_decode(const uint8_t *bytes, size_t size) {
    tpr_wire_store_frame frame;
    return tpr_wire_store_read(bytes, size, &frame);
}

TEST(store_hello) {
    uint8_t bytes[TPR_WIRE_STORE_HELLO];
    tpr_wire_store_hello hello;
    size_t i;
    tpr_wire_store_write_hello(bytes, TPRPC_ERROR_DENIED);
    CHECK(tpr_wire_store_read_hello(bytes, sizeof bytes, &hello));
    CHECK(hello.major == TPR_WIRE_STORE_MAJOR && hello.minor == TPR_WIRE_STORE_MINOR &&
          hello.status == TPRPC_ERROR_DENIED);
    decode_all(store_hello_decode, bytes, sizeof bytes);
    for (i = 0; i <= sizeof bytes; i++) CHECK(tpr_wire_store_begins(bytes, i));
    for (i = 0; i < 4; i++) {
        bytes[i] ^= 1;
        CHECK(!tpr_wire_store_begins(bytes, i + 1));
        CHECK(tpr_wire_store_begins(bytes, i));
        CHECK(!store_hello_decode(bytes, sizeof bytes));
        bytes[i] ^= 1;
    }
    tpr_base_store_le32(bytes + 8, 1000);
    CHECK(!store_hello_decode(bytes, sizeof bytes));
}

TEST(store_frames) {
    static uint8_t bytes[300000];
    tpr_wire_store_frame in = TPR_ZERO, out;
    size_t size, length, n;
    int kind;
    in.type = TPR_WIRE_STORE_REQUEST;
    in.kind = TPRPC_STORE_COMPARE_SET;
    in.flags = TPR_WIRE_STORE_EXPECTED;
    in.id = 77;
    in.delta = -5;
    in.key = bytes_of("a key", 5);
    in.value = bytes_of("a value\0with", 12);
    in.expected = bytes_of("", 0);
    size = tpr_wire_store_size(&in);
    tpr_wire_store_write(&in, bytes);
    for (n = 0; n < size; n++) {
        CHECK_EQ_INT(tpr_wire_store_split(bytes, n, &length), 0);
        CHECK_EQ_INT(length, n < 4 ? 0 : size);
    }
    CHECK_EQ_INT(tpr_wire_store_split(bytes, size, &length), 1);
    CHECK_EQ_INT(tpr_wire_store_split(bytes, size + 9, &length), 1);
    CHECK_EQ_INT(length, size);
    CHECK(tpr_wire_store_read(bytes, size, &out));
    CHECK(out.type == in.type && out.kind == in.kind && out.flags == in.flags && out.id == 77 && out.delta == -5);
    CHECK_EQ_INT(out.key.size, 5);
    CHECK_MEM(out.key.data, "a key", 5);
    CHECK_EQ_INT(out.value.size, 12);
    CHECK_MEM(out.value.data, "a value\0with", 12);
    decode_all(store_decode, bytes, size);
    for (kind = 0; kind < 256; kind++) {         /* kinds and types that are not known */
        bytes[5] = (uint8_t)kind;
        CHECK_EQ_INT(store_decode(bytes, size), kind >= TPRPC_STORE_SET && kind <= TPRPC_STORE_DELETE);
    }
    bytes[5] = TPRPC_STORE_GET;
    for (kind = 0; kind < 256; kind++) {
        bytes[4] = (uint8_t)kind;
        CHECK_EQ_INT(store_decode(bytes, size), kind >= TPR_WIRE_STORE_REQUEST && kind <= TPR_WIRE_STORE_REPLY);
    }
    bytes[4] = TPR_WIRE_STORE_REQUEST;
    bytes[TPR_WIRE_STORE_FIXED - 12] = 0xFF;     /* the key is no UTF-8 */
    CHECK(!store_decode(bytes, size));
    tpr_base_store_le32(bytes, TPR_WIRE_STORE_FRAME - 3);
    CHECK_EQ_INT(tpr_wire_store_split(bytes, 4, &length), -1);
    tpr_base_store_le32(bytes, TPR_WIRE_STORE_FRAME - 4);
    CHECK_EQ_INT(tpr_wire_store_split(bytes, 4, &length), 0);
    tpr_base_store_le32(bytes, TPR_WIRE_STORE_FIXED - 5);
    CHECK_EQ_INT(tpr_wire_store_split(bytes, 4, &length), -1);
    in = out;
    in.type = TPR_WIRE_STORE_REPLY;
    in.status = TPRPC_PENDING;                   /* no outcome */
    in.key = in.value = in.expected = in.text = bytes_of("", 0);
    tpr_wire_store_write(&in, bytes);
    CHECK(!store_decode(bytes, tpr_wire_store_size(&in)));
    in.status = TPRPC_ERROR_TIMEOUT;
    tpr_wire_store_write(&in, bytes);
    CHECK(store_decode(bytes, tpr_wire_store_size(&in)));
    in.status = 1000;
    tpr_wire_store_write(&in, bytes);
    CHECK(!store_decode(bytes, tpr_wire_store_size(&in)));
}

TEST(store_limits) {
    static uint8_t bytes[300000];
    static char lots[70000];
    tpr_wire_store_frame in = TPR_ZERO;
    size_t i;
    memset(lots, 'l', sizeof lots);
    in.type = TPR_WIRE_STORE_REQUEST;
    in.kind = TPRPC_STORE_SET;
    for (i = 0; i < 8; i++) {                    /* at its limit, and one over it */
        size_t over = i % 2;
        in.key = bytes_of(lots, i / 2 == 0 ? TPR_WIRE_STORE_KEY + over : 3);
        in.value = bytes_of(lots, i / 2 == 1 ? TPR_WIRE_STORE_VALUE + over : 3);
        in.expected = bytes_of(lots, i / 2 == 2 ? TPR_WIRE_STORE_VALUE + over : 3);
        in.text = bytes_of(lots, i / 2 == 3 ? TPR_WIRE_STORE_TEXT + over : 3);
        tpr_wire_store_write(&in, bytes);
        CHECK_EQ_INT(store_decode(bytes, tpr_wire_store_size(&in)), !over);
    }
    in.key = bytes_of("", 0);
    tpr_wire_store_write(&in, bytes);
    CHECK(!store_decode(bytes, tpr_wire_store_size(&in)));
}

TEST(store_records) {
    static uint8_t bytes[TPR_WIRE_RECORD_MOST + 16];
    tpr_wire_record out;
    size_t size, n, i;
    size = tpr_wire_record_write(bytes_of("a key", 5), bytes_of("value", 5), bytes);
    CHECK_EQ_INT(size, TPR_WIRE_RECORD_FIXED + 10);
    CHECK_EQ_INT(tpr_wire_record_read(bytes, size, &out), 1);
    CHECK(!out.remove && out.size == size && out.key.size == 5 && out.value.size == 5);
    CHECK_MEM(out.value.data, "value", 5);
    for (n = 0; n < size; n++) {
        uint8_t *exact = (uint8_t *)malloc(n ? n : 1);
        REQUIRE(exact != NULL);
        memcpy(exact, bytes, n);
        CHECK_EQ_INT(tpr_wire_record_read(exact, n, &out), 0);
        free(exact);
    }
    for (i = 0; i < size * 8; i++) {             /* no single bit may be wrong */
        if (i / 8 == 10 || i / 8 == 11) continue;          /* the zeros are not looked at, the hash covers them */
        bytes[i / 8] ^= (uint8_t)(1 << i % 8);
        CHECK(tpr_wire_record_read(bytes, size, &out) != 1);
        bytes[i / 8] ^= (uint8_t)(1 << i % 8);
    }
    CHECK_EQ_INT(tpr_wire_record_read(bytes, size + 16, &out), 1);
    CHECK_EQ_INT(out.size, size);
    size = tpr_wire_record_write(bytes_of("a key", 5), tpr_base_bytes_none(), bytes);
    CHECK_EQ_INT(tpr_wire_record_read(bytes, size, &out), 1);
    CHECK(out.remove);
    tpr_base_store_le32(bytes + 12, TPR_WIRE_STORE_VALUE + 1);
    CHECK_EQ_INT(tpr_wire_record_read(bytes, sizeof bytes, &out), -1);
}

/* ---- sessions ---- */

/* ---- the messages of a session, which both ends know */

enum { PART_MOST = 4 };
typedef struct scene {
    int way;
    const char *metadata;
    size_t payloads[PART_MOST], tensors[PART_MOST];
    size_t payload_count, tensor_count;
} scene;

static const scene scenes[] = {
    {0, "first", {10, 0}, {24, 0}, 2, 2},
    {1, "second", {1}, {24}, 1, 1},
    {0, "by a channel", {100}, {9001, 16}, 1, 2},
    {1, "by a channel", {0}, {9001, 8193}, 0, 2},
    {0, "", {0}, {0}, 0, 0},
};
enum { BULKY = 9, BULKY_BYTES = 8192 };          /* messages each way of 4 payloads of zeros: their credit comes back */

static void scene_message(const scene *s, tprpc_message *m, tprpc_payload *payloads, tprpc_tensor *tensors,
                          uint8_t *memory) {
    size_t i;
    memset(m, 0, sizeof *m);
    memset(payloads, 0, PART_MOST * sizeof *payloads);
    memset(tensors, 0, PART_MOST * sizeof *tensors);
    m->metadata = s->metadata;
    m->metadata_size = strlen(s->metadata);
    m->payloads = payloads;
    m->payload_count = s->payload_count;
    m->tensors = tensors;
    m->tensor_count = s->tensor_count;
    for (i = 0; i < s->payload_count; i++) {
        payloads[i].size = s->payloads[i];
        payloads[i].data = payloads[i].size ? memory : NULL;
        payloads[i].metadata = "payload";
        payloads[i].metadata_size = 7 * (i % 2 == 0);
        fill(memory, payloads[i].size, (unsigned)i);
        memory += payloads[i].size;
    }
    for (i = 0; i < s->tensor_count; i++) {
        tensors[i].size = s->tensors[i];
        tensors[i].data = tensors[i].size ? memory : NULL;
        tensors[i].metadata = "tensor";
        tensors[i].metadata_size = 6 * (i % 2 == 0);
        if (s->tensors[i] == 24) {
            tensors[i].dtype = TPRPC_F32;
            tensors[i].ndim = 2;
            tensors[i].shape[0] = 2;
            tensors[i].shape[1] = 3;
        }
        fill(memory, tensors[i].size, 50 + (unsigned)i);
        memory += tensors[i].size;
    }
}

static void look_scene(const tprpc_message *message, void *arg) {
    static uint8_t memory[40000];
    const scene *s = (const scene *)arg;
    tprpc_payload payloads[PART_MOST];
    tprpc_tensor tensors[PART_MOST];
    tprpc_message m;
    size_t i;
    scene_message(s, &m, payloads, tensors, memory);
    REQUIRE_EQ_INT(message->metadata_size, m.metadata_size);
    CHECK_MEM(message->metadata, m.metadata, m.metadata_size);
    REQUIRE_EQ_INT(message->payload_count, m.payload_count);
    REQUIRE_EQ_INT(message->tensor_count, m.tensor_count);
    for (i = 0; i < m.payload_count; i++) {
        REQUIRE_EQ_INT(message->payloads[i].size, payloads[i].size);
        CHECK_MEM(message->payloads[i].data, payloads[i].data, payloads[i].size);
        REQUIRE_EQ_INT(message->payloads[i].metadata_size, payloads[i].metadata_size);
        CHECK_MEM(message->payloads[i].metadata, payloads[i].metadata, payloads[i].metadata_size);
    }
    for (i = 0; i < m.tensor_count; i++) {
        REQUIRE_EQ_INT(message->tensors[i].size, tensors[i].size);
        CHECK_MEM(message->tensors[i].data, tensors[i].data, tensors[i].size);
        CHECK_EQ_INT(message->tensors[i].ndim, tensors[i].ndim);
        CHECK_EQ_INT(message->tensors[i].dtype, tensors[i].dtype);
        CHECK_MEM(message->tensors[i].shape, tensors[i].shape, sizeof tensors[i].shape);
        REQUIRE_EQ_INT(message->tensors[i].metadata_size, tensors[i].metadata_size);
        CHECK_MEM(message->tensors[i].metadata, tensors[i].metadata, tensors[i].metadata_size);
    }
}

static void look_bulky(const tprpc_message *message, void *arg) {
    static const uint8_t zeros[BULKY_BYTES];
    size_t i;
    (void)arg;
    REQUIRE_EQ_INT(message->payload_count, 4);
    for (i = 0; i < 4; i++) {
        REQUIRE_EQ_INT(message->payloads[i].size, BULKY_BYTES);
        CHECK_MEM(message->payloads[i].data, zeros, BULKY_BYTES);
    }
}

/* A stage: live ends, 0 who connected and 1 who listened, NULL where a tape or nobody stands in; and what turns beside.
 */
typedef struct stage {
    tprpc_context *ctx[2];
    tprpc_pipe *pipe[2];
    void (*beside)(void *arg);
    void *arg;
    int accepted;
    tprpc_listener *listener;
} stage;

static bool stage_until(stage *s, int *counter) {
    int64_t end = deadline();
    int i;
    while (!toy_count(counter)) {
        if (test_now_us() > end) return false;
        for (i = 0; i < 2; i++) if (s->ctx[i]) tprpc_poll(s->ctx[i], TPRPC_NOW, 0);
        if (s->beside) s->beside(s->arg);
    }
    return true;
}

static void stage_play(stage *s, int way, const tprpc_message *m, void (*look)(const tprpc_message *, void *),
                       void *arg) {
    outcome written;
    seen got;
    memset(&written, 0, sizeof written);
    memset(&got, 0, sizeof got);
    got.look = look;
    got.arg = arg;
    if (s->pipe[1 - way]) REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe[1 - way], NULL, on_seen, &got), TPRPC_OK);
    if (s->pipe[way]) {
        REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe[way], m, on_written, &written), TPRPC_OK);
        REQUIRE(stage_until(s, &written.runs));
        if (!CHECK_EQ_INT(written.status, TPRPC_OK)) fprintf(stderr, "%s\n", written.text);
    }
    if (s->pipe[1 - way]) {
        REQUIRE(stage_until(s, &got.o.runs));
        if (!CHECK_EQ_INT(got.o.status, TPRPC_OK)) fprintf(stderr, "%s\n", got.o.text);
    }
}

static void stage_all(stage *s, int closer) {
    static uint8_t memory[40000];
    static uint8_t zeros[BULKY_BYTES];
    tprpc_payload payloads[PART_MOST];
    tprpc_tensor tensors[PART_MOST];
    tprpc_message m;
    seen end;
    size_t i;
    int way, k;
    for (i = 0; i < COUNT(scenes); i++) {
        scene_message(&scenes[i], &m, payloads, tensors, memory);
        stage_play(s, scenes[i].way, &m, look_scene, (void *)(uintptr_t)&scenes[i]);
    }
    memset(&m, 0, sizeof m);
    memset(payloads, 0, sizeof payloads);
    for (i = 0; i < 4; i++) payloads[i].data = zeros, payloads[i].size = BULKY_BYTES;
    m.payloads = payloads;
    m.payload_count = 4;
    for (way = 0; way < 2; way++)
        for (k = 0; k < BULKY; k++) stage_play(s, way, &m, look_bulky, NULL);
    memset(&end, 0, sizeof end);
    if (s->pipe[1 - closer] && tprpc_pipe_read(s->pipe[1 - closer], NULL, on_read, &end.o) != TPRPC_OK) {
        tprpc_message none = TPR_ZERO;           /* a tape's bye may be there already */
        CHECK_EQ_INT(tprpc_pipe_write(s->pipe[1 - closer], &none, NULL, NULL), TPRPC_ERROR_PEER);
        return;
    }
    if (s->pipe[closer]) tprpc_pipe_close(s->pipe[closer]);
    s->pipe[closer] = NULL;
    if (s->pipe[1 - closer]) {
        REQUIRE(stage_until(s, &end.o.runs));
        CHECK_EQ_INT(end.o.status, TPRPC_ERROR_PEER);
        CHECK_CONTAINS(end.o.text, "closed the pipe");       /* it said so: not just a lost connection */
    }
}

static void stage_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    stage *s = (stage *)user;
    (void)error;
    if (status == TPRPC_OK) s->pipe[1] = pipe;
    __sync_fetch_and_add(&s->accepted, 1);
}

/* A live end that listens. Returns its port. */
static uint16_t stage_listen(stage *s) {
    static const char *const address = "tcp://127.0.0.1:0";
    tprpc_listener_desc desc;
    tprpc_error error = TPR_ZERO;
    memset(&desc, 0, sizeof desc);
    world_backend_count = 0;
    s->ctx[1] = context("tcp", "basic", 0);
    desc.addresses = &address;
    desc.address_count = 1;
    REQUIRE_EQ_INT(tprpc_listen(s->ctx[1], &desc, &s->listener, &error), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_accept(s->listener, stage_accepted, s), TPRPC_OK);
    return (uint16_t)atoi(strrchr(tprpc_listener_address(s->listener, NULL), ':') + 1);
}

static void stage_connect(stage *s, uint16_t port) {
    tprpc_pipe_desc desc;
    tprpc_error error = TPR_ZERO;
    char address[64];
    memset(&desc, 0, sizeof desc);
    snprintf(address, sizeof address, "tcp://127.0.0.1:%u", (unsigned)port);
    world_backend_count = 0;
    s->ctx[0] = context("tcp", "basic", 0);
    desc.address = address;
    REQUIRE_EQ_INT(tprpc_connect(s->ctx[0], &desc, &s->pipe[0], &error), TPRPC_OK);
}

static void stage_close(stage *s) {
    int i;
    for (i = 0; i < 2; i++) tprpc_pipe_close(s->pipe[i]);
    if (s->listener) tprpc_listener_close(s->listener);
    for (i = 0; i < 2; i++) CHECK_EQ_INT(tprpc_context_destroy(s->ctx[i]), TPRPC_OK);
}

/* ---- recording: a proxy between two live ends */

typedef struct proxy {
    int listener, fd[2];
    uint16_t port;
    splitter in[2];
    tape *tape;
} proxy; /* fd 0: who connected */

static void proxy_turn(void *arg) {
    proxy *p = (proxy *)arg;
    const uint8_t *frame;
    uint32_t size;
    int way;
    if (p->fd[0] < 0) {
        p->fd[0] = accept4(p->listener, NULL, NULL, SOCK_CLOEXEC);
        if (p->fd[0] < 0) return;
        p->fd[1] = socket_connect(p->port);
    }
    for (way = 0; way < 2; way++) {
        if (!split_fill(&p->in[way], p->fd[way])) shutdown(p->fd[1 - way], SHUT_WR);
        while ((frame = split_next(&p->in[way], &size)) != NULL) {
            tape_add(p->tape, way, frame, size);
            REQUIRE(send(p->fd[1 - way], frame, size, MSG_NOSIGNAL) == (ssize_t)size || errno == EPIPE ||
                    errno == ECONNRESET);
            split_drop(&p->in[way], size);
        }
    }
}

static tape *record_session(int closer) {
    proxy *p = (proxy *)calloc(1, sizeof(proxy));
    stage s;
    tape *t = tape_new();
    uint16_t port;
    REQUIRE(p != NULL);
    memset(&s, 0, sizeof s);
    t->closer = closer;
    p->tape = t;
    p->fd[0] = p->fd[1] = -1;
    p->listener = socket_listen(&port);
    fcntl(p->listener, F_SETFL, O_NONBLOCK);
    s.beside = proxy_turn;
    s.arg = p;
    p->port = stage_listen(&s);
    stage_connect(&s, port);
    REQUIRE(stage_until(&s, &s.accepted));
    stage_all(&s, closer);
    stage_close(&s);
    close(p->fd[0]);
    close(p->fd[1]);
    close(p->listener);
    free(p);
    return t;
}

static void count_kinds(const tape *t, int counts[2][16]) {
    size_t i;
    memset(counts, 0, 2 * sizeof counts[0]);
    for (i = 0; i < t->count; i++) {
        tpr_wire_frame frame;
        REQUIRE(tpr_wire_get_frame(t->frames[i].bytes, 1 << 20, &frame));
        counts[t->frames[i].way][frame.kind]++;
    }
}

/* Every kind of frame is in a session, so that a recording is worth something. */
TEST(record) {
    const char *folder = getenv("TPRPC_WIRE_RECORD");
    int closer;
    for (closer = 0; closer < 2; closer++) {
        tape *t = record_session(closer);
        int counts[2][16];
        char path[300];
        int way;
        count_kinds(t, counts);
        for (way = 0; way < 2; way++) {
            CHECK_EQ_INT(counts[way][TPR_WIRE_HELLO], 1);
            CHECK_EQ_INT(counts[way][TPR_WIRE_AGREE], 2);
            CHECK(counts[way][TPR_WIRE_MESSAGE] > 3);
            CHECK(counts[way][TPR_WIRE_CHANNEL] > 0);
            CHECK(counts[way][TPR_WIRE_DATA] > 0);
            CHECK(counts[way][TPR_WIRE_CREDIT] > 0);
            CHECK_EQ_INT(counts[way][TPR_WIRE_BYE], way == closer);
        }
        if (folder) {
            snprintf(path, sizeof path, "%s/%d.%d%s.bin", folder, TPR_WIRE_MAJOR, TPR_WIRE_MINOR, closer ? "-bye" : "");
            tape_write(t, path);
        }
        tape_free(t);
    }
}

/* ---- replaying: a tape stands in for one end */

typedef struct player {
    int fd;
    const tape *tape;
    size_t at;
    int way;
    splitter in;
    bool over;
} player; /* way: it plays */

/* Sends what is its to send, and waits for as many frames of the same kinds as the tape has. */
static void player_turn(void *arg) {
    player *p = (player *)arg;
    const uint8_t *frame;
    uint32_t size;
    split_fill(&p->in, p->fd);
    while (p->at < p->tape->count) {
        const taped *f = &p->tape->frames[p->at];
        if (f->way == p->way) {
            REQUIRE(send(p->fd, f->bytes, f->size, MSG_NOSIGNAL) == (ssize_t)f->size);
        } else {
            if ((frame = split_next(&p->in, &size)) == NULL) return;
            if (!CHECK_EQ_INT(frame[4], f->bytes[4])) fprintf(stderr, "frame %d of the tape\n", (int)p->at);
            split_drop(&p->in, size);
        }
        p->at++;
    }
    p->over = true;
}

/* Who connected is the tape's. */
static void play_client(tape *t) {
    player *p = (player *)calloc(1, sizeof(player));
    stage s;
    int fds = test_count_fds();
    REQUIRE(p != NULL);
    memset(&s, 0, sizeof s);
    p->tape = t;
    p->way = 0;
    s.beside = player_turn;
    s.arg = p;
    p->fd = socket_connect(stage_listen(&s));
    REQUIRE(stage_until(&s, &s.accepted));
    stage_all(&s, t->closer);
    player_turn(p);
    test_sleep_us(2000);
    player_turn(p);
    CHECK(p->over);
    stage_close(&s);
    close(p->fd);
    free(p);
    tape_free(t);
    CHECK_EQ_INT(test_count_fds(), fds);
}

/* Who listened is the tape's. */
static void play_server(tape *t) {
    player *p = (player *)calloc(1, sizeof(player));
    stage s;
    uint16_t port;
    int fds = test_count_fds(), listener = socket_listen(&port);
    REQUIRE(p != NULL);
    memset(&s, 0, sizeof s);
    p->tape = t;
    p->way = 1;
    s.beside = player_turn;
    s.arg = p;
    stage_connect(&s, port);
    p->fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    REQUIRE(p->fd >= 0);
    stage_all(&s, t->closer);
    test_sleep_us(2000);
    player_turn(p);
    CHECK(p->over);
    stage_close(&s);
    close(p->fd);
    close(listener);
    free(p);
    tape_free(t);
    CHECK_EQ_INT(test_count_fds(), fds);
}

static void replay_client(void *name) { play_client(tape_of((const char *)name)); }
static void replay_server(void *name) { play_server(tape_of((const char *)name)); }

/* As a later minor version would say it: with fields that this one does not know, behind those that it does. */
static tape *later_of(const char *name, int way) {
    enum { MORE = 12 };
    tape *t = tape_of(name);
    for (size_t i = 0; i < t->count; i++) {
        taped *f = &t->frames[i];
        const uint8_t kind = f->bytes[4];
        if (f->way != way || kind == TPR_WIRE_MESSAGE || kind == TPR_WIRE_DATA || kind == TPR_WIRE_CHANNEL) continue;
        f->bytes = (uint8_t *)realloc(f->bytes, f->size + MORE);
        REQUIRE(f->bytes != NULL);
        memset(f->bytes + f->size, 0xa5, MORE);
        f->size += MORE;
        tpr_wire_put_frame(f->bytes, f->size - TPR_WIRE_HEADER, kind, 0, 0);
        if (kind == TPR_WIRE_HELLO) f->bytes[TPR_WIRE_HEADER + 6] = TPR_WIRE_MINOR + 9;
    }
    return t;
}

static void later_client(void *name) { play_client(later_of((const char *)name, 0)); }
static void later_server(void *name) { play_server(later_of((const char *)name, 1)); }

/* ---- a live listener, and bytes that are not what they should be ---- */

typedef struct victim { stage s; uint16_t port; int runs, opened; tprpc_status status; char text[244]; } victim;

static void victim_seen(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    victim *v = (victim *)user;
    CHECK_EQ_INT(status == TPRPC_OK, m != NULL);
    if (status != TPRPC_OK) CHECK(error && error->text[0]);
    v->status = status;
    snprintf(v->text, sizeof v->text, "%s", error ? error->text : "");
    v->runs++;
    if (status == TPRPC_OK && v->s.pipe[1]) {    /* answers, so that it also writes */
        tprpc_pipe_write(v->s.pipe[1], m, NULL, NULL);
        if (tprpc_pipe_read(v->s.pipe[1], NULL, victim_seen, v) != TPRPC_OK) v->status = TPRPC_ERROR_PEER;
    }
}

/* Sends bytes, closes, and drives until the victim's side of it is over. */
static void victim_feed(victim *v, const uint8_t *bytes, size_t size) {
    int fd = socket_connect(v->port), i, quiet = 0;
    int64_t end = deadline(), since = test_now_us();
    tprpc_pipe *pipe = NULL;
    size_t sent = 0;
    bool reading = false, dead = false;
    uint8_t drop[65536];
    v->status = TPRPC_OK;
    while (test_now_us() < end) {
        ssize_t n = sent < size ? send(fd, bytes + sent, size - sent, MSG_NOSIGNAL | MSG_DONTWAIT) : 0;
        if (n > 0) sent += (size_t)n;
        if (n < 0 && errno != EAGAIN) sent = size, dead = true;
        n = recv(fd, drop, sizeof drop, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && errno != EAGAIN)) dead = true;     /* it has hung up on us */
        for (i = 0; i < 3; i++) tprpc_poll(v->s.ctx[1], TPRPC_NOW, 0);
        if (toy_count(&v->s.accepted) && !pipe && v->s.pipe[1]) {
            pipe = v->s.pipe[1];
            v->opened++;
            quiet = 0;
            since = test_now_us();
        }
        if (pipe && !reading) {
            tprpc_pipe_info info;
            reading = true;
            CHECK_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
            if (tprpc_pipe_read(pipe, NULL, victim_seen, v) != TPRPC_OK) v->status = TPRPC_ERROR_PEER;
        }
        if (sent < size || !socket_arrived(fd)) since = test_now_us();
        if (dead || (++quiet > 6 && test_now_us() - since > 500)) break;   /* polls by time, too: some look by time */
    }
    close(fd);
    if (pipe) {                        /* its end is told, once */
        while (v->status == TPRPC_OK && test_now_us() < end) tprpc_poll(v->s.ctx[1], 200, 0);
        if (!CHECK(v->status == TPRPC_ERROR_PEER || v->status == TPRPC_ERROR_PROTOCOL ||
                   v->status == TPRPC_ERROR_UNSUPPORTED || v->status == TPRPC_ERROR_MEMORY))     /* a message refused */
            fprintf(stderr, "it ended with %s: %s\n", tprpc_status_name(v->status), v->text);
        tprpc_pipe_close(pipe);
        v->s.pipe[1] = NULL;
        v->s.accepted = 0;
        REQUIRE_EQ_INT(tprpc_accept(v->s.listener, stage_accepted, &v->s), TPRPC_OK);
    }
    for (i = 0; i < 3; i++) tprpc_poll(v->s.ctx[1], TPRPC_NOW, 0);
    CHECK(test_now_us() < end);
}

static void victim_open(victim *v) {
    memset(v, 0, sizeof *v);
    v->port = stage_listen(&v->s);
}

/* The bytes of one way of a tape, one after the other. */
static uint8_t *tape_join(const tape *t, int way, size_t most, size_t *size) {
    uint8_t *bytes = (uint8_t *)malloc(2 << 20);
    size_t i;
    REQUIRE(bytes != NULL);
    *size = 0;
    for (i = 0; i < t->count && *size < most; i++) {
        if (t->frames[i].way != way) continue;
        memcpy(bytes + *size, t->frames[i].bytes, t->frames[i].size);
        *size += t->frames[i].size;
    }
    return bytes;
}

/* A peer that is gone at any byte. */
static void replay_cut(void *name) {
    tape *t = tape_of((const char *)name);
    victim *v = (victim *)malloc(sizeof(victim));
    size_t size, at, step, i;
    uint8_t *bytes = tape_join(t, 0, 12000, &size);
    uint32_t cut_kinds = 0;
    int fds;
    REQUIRE(v != NULL);
    victim_open(v);
    victim_feed(v, bytes, size);
    fds = test_count_fds();
    step = TEST_SLOWDOWN > 1 ? 29 : 3;
    for (at = 0; at < size; at += at < 1200 ? step : 331) victim_feed(v, bytes, at);
    free(bytes);
    bytes = tape_join(t, 0, SIZE_MAX, &size);    /* and in each frame to the end: bulk, credit and bye come late */
    for (i = 0, at = 0; i < t->count; i++) {
        const taped *f = &t->frames[i];
        if (f->way != 0) continue;
        if (at + f->size > 12000) {
            cut_kinds |= 1u << f->bytes[4];
            victim_feed(v, bytes, at + TPR_WIRE_HEADER - 1);
            victim_feed(v, bytes, at + TPR_WIRE_HEADER);
            victim_feed(v, bytes, at + f->size / 2);
            victim_feed(v, bytes, at + f->size - 1);
        }
        at += f->size;
    }
    CHECK(cut_kinds & 1u << TPR_WIRE_CREDIT);
    CHECK(t->closer != 0 || (cut_kinds & 1u << TPR_WIRE_BYE));
    CHECK_LE_INT(test_count_fds(), fds);
    stage_close(&v->s);
    free(bytes);
    free(v);
    tape_free(t);
}

/* A peer of whose bytes one is wrong, whichever. */
static void replay_corrupt(void *name) {
    static const uint8_t masks[] = {0x01, 0x80, 0xFF};
    tape *t = tape_of((const char *)name);
    victim *v = (victim *)malloc(sizeof(victim));
    size_t size, at, k, step = TEST_SLOWDOWN > 1 ? 7 : 1;
    uint8_t *bytes = tape_join(t, 0, 12000, &size);
    REQUIRE(v != NULL);
    victim_open(v);
    for (at = 0; at < size; at += at < 1000 ? step : 499) {
        for (k = 0; k < COUNT(masks); k++) {
            bytes[at] ^= masks[k];
            victim_feed(v, bytes, size);
            bytes[at] ^= masks[k];
        }
    }
    stage_close(&v->s);
    free(bytes);
    free(v);
    tape_free(t);
}

/* Frames that a peer may not send at that point, put after the first `keep` of its frames. */
static void feed_frame(victim *v, const tape *t, size_t keep, uint8_t kind, uint16_t channel, const void *body,
                       uint32_t size) {
    uint8_t *bytes = (uint8_t *)malloc(2 << 20);
    size_t at = 0, i;
    REQUIRE(bytes != NULL);
    for (i = 0; i < t->count && keep > 0; i++) {
        if (t->frames[i].way != 0) continue;
        memcpy(bytes + at, t->frames[i].bytes, t->frames[i].size);
        at += t->frames[i].size;
        keep--;
    }
    tpr_wire_put_frame(bytes + at, size, kind, 0, channel);
    if (size) memcpy(bytes + at + TPR_WIRE_HEADER, body, size);
    victim_feed(v, bytes, at + TPR_WIRE_HEADER + size);
    free(bytes);
}

static void replay_hostile(void *name) {
    tape *t = tape_of((const char *)name);
    victim *v = (victim *)malloc(sizeof(victim));
    static tpr_wire_agree agree;
    static uint8_t body[TPR_WIRE_CONTROL];
    tpr_wire_writer w;
    uint32_t kind, keep, size, way;
    int opened;
    REQUIRE(v != NULL);
    victim_open(v);
    memset(body, 0x41, sizeof body);
    for (keep = 0; keep < 6; keep++) {           /* every kind, known or not, at every moment, in some sizes */
        for (kind = 0; kind < 13; kind++) {
            for (size = 0; size < 200; size = size * 3 + 8) {
                feed_frame(v, t, keep, (uint8_t)kind, 0, body, size);
                feed_frame(v, t, keep, (uint8_t)kind, 9, body, size);
            }
        }
        feed_frame(v, t, keep, 255, 0, body, 100);
    }
    for (way = 0; way < 4; way++) {              /* channels that only the peer has, or has twice */
        uint8_t *bytes = (uint8_t *)malloc(40000);
        size_t at = t->frames[0].size;
        REQUIRE(bytes != NULL);
        memset(&agree, 0, sizeof agree);
        agree.step = 1;
        agree.count = way == 0 ? 1 : way == 1 ? 2 : way == 2 ? TPR_WIRE_CHANNELS : 0;
        for (kind = 0; kind < agree.count; kind++)
            snprintf(agree.proofs[kind].name, 16, "%s", way == 1 && kind ? "basic" : way == 2 ? "basic" : "unheard-of");
        memcpy(bytes, t->frames[0].bytes, at);
        for (kind = 0; kind < 2; kind++) {
            agree.step = kind ? 3 : 1;
            w = tpr_wire_writer_of(body, sizeof body);
            tpr_wire_write_agree(&w, &agree);
            tpr_wire_put_frame(bytes + at, (uint32_t)(w.at - body), TPR_WIRE_AGREE, 0, 0);
            memcpy(bytes + at + TPR_WIRE_HEADER, body, (size_t)(w.at - body));
            at += TPR_WIRE_HEADER + (size_t)(w.at - body);
        }
        for (kind = 0; kind < t->count; kind++) {          /* and a message, which is read and answered */
            const taped *f = &t->frames[kind];
            if (f->way != 0 || f->bytes[4] != TPR_WIRE_MESSAGE) continue;
            memcpy(bytes + at, f->bytes, f->size);
            at += f->size;
            break;
        }
        opened = v->opened;
        victim_feed(v, bytes, at);
        CHECK_EQ_INT(v->opened, opened + 1);
        free(bytes);
    }
    stage_close(&v->s);
    free(v);
    tape_free(t);
}

static void no_recordings(void *arg) {
    (void)arg;
    fprintf(stderr, "tests/wire has no recording of this wire version\n");
    CHECK(0);
}

TESTS(recordings) {
    static const struct { const char *what; void (*run)(void *); } all[] = {
        {"client", replay_client}, {"server", replay_server}, {"cut", replay_cut}, {"corrupt", replay_corrupt},
        {"hostile", replay_hostile}, {"later_client", later_client}, {"later_server", later_server}};
    char path[300], own[32], name[120];
    const char *slash = strrchr(__FILE__, '/');
    struct dirent **entries = NULL;
    int count, i, mine = 0;
    size_t k;
    snprintf(path, sizeof path, "%.*swire", slash ? (int)(slash - __FILE__ + 1) : 0, __FILE__);
    snprintf(own, sizeof own, "%d.%d.bin", TPR_WIRE_MAJOR, TPR_WIRE_MINOR);
    count = scandir(path, &entries, NULL, alphasort);
    for (i = 0; i < count; i++) {
        char *file = strdup(entries[i]->d_name);
        size_t length = file ? strlen(file) : 0;
        free(entries[i]);
        if (length < 5 || strcmp(file + length - 4, ".bin") != 0) {
            free(file);
            continue;
        }
        mine |= strcmp(file, own) == 0;
        for (k = 0; k < COUNT(all); k++) {
            snprintf(name, sizeof name, "replay_%s_%s", all[k].what, file);
            test_add(name, all[k].run, file, 120);
        }
    }
    free(entries);
    if (!mine) test_add("replay", no_recordings, NULL, 10);
}
