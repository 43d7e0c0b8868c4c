/* Every decoder of the section `wire`. The first byte chooses the decoder, the rest is what a peer sent. What a decoder
   accepts obeys its limits; and written again it is read the same. */
#include "fuzz.h"

static void fuzz_moment(void) {}

/* What is read lies in a block of exactly its size, so that the address sanitizer sees a byte too many. */
static uint8_t *block;
static size_t block_size;

static void block_take(size_t most) {
    size_t size = most;
    const uint8_t *bytes = fuzz_bytes(&size);
    block = (uint8_t *)malloc(size ? size : 1);
    FUZZ_CHECK(block != NULL);
    if (size) memcpy(block, bytes, size);
    block_size = size;
}

static uint8_t again[1 << 20];         /* what was decoded, written again */

static bool same_bytes(tpr_base_bytes a, tpr_base_bytes b) {
    return a.size == b.size && (a.size == 0 || memcmp(a.data, b.data, a.size) == 0);
}

static bool inside(tpr_base_bytes bytes) {
    return bytes.size == 0 || (bytes.data >= block && bytes.data + bytes.size <= block + block_size);
}

static void try_hello(void) {
    static tpr_wire_hello one, two;
    if (!tpr_wire_read_hello(block, block_size, &one)) return;
    if (one.major != TPR_WIRE_MAJOR) {
        FUZZ_CHECK(one.offer_count == 0);
        return;
    }
    FUZZ_CHECK(one.offer_count <= TPR_WIRE_OFFERS);
    tpr_wire_writer w = tpr_wire_writer_of(again, sizeof again);
    tpr_wire_write_hello(&w, &one);
    FUZZ_CHECK(!w.failed && (size_t)(w.at - again) <= block_size);   /* fields may trail it */
    FUZZ_CHECK(tpr_wire_read_hello(again, (size_t)(w.at - again), &two) && memcmp(&one, &two, sizeof one) == 0);
}

static void try_lane(void) {
    tpr_wire_lane one, two;
    uint8_t bytes[TPR_WIRE_LANE_BYTES];
    memset(&one, 0, sizeof one);
    memset(&two, 0, sizeof two);
    if (!tpr_wire_read_lane(block, block_size, &one)) return;
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_lane(&w, &one);
    FUZZ_CHECK(!w.failed && w.at == w.end);
    FUZZ_CHECK(tpr_wire_read_lane(bytes, sizeof bytes, &two) && memcmp(&one, &two, sizeof one) == 0);
}

static void try_move(void) {
    tpr_wire_move one, two;
    uint8_t bytes[TPR_WIRE_MOVE_BYTES];
    try_lane();                        /* begins like a move: the corpus has those */
    if (!tpr_wire_read_move(block, block_size, &one)) return;
    tpr_wire_writer w = tpr_wire_writer_of(bytes, sizeof bytes);
    tpr_wire_write_move(&w, &one);
    FUZZ_CHECK(!w.failed && w.at == w.end);
    FUZZ_CHECK(tpr_wire_read_move(bytes, sizeof bytes, &two) && memcmp(&one, &two, sizeof one) == 0);
}

static void try_agree(void) {
    static tpr_wire_agree one, two;
    memset(&one, 0, sizeof one);
    memset(&two, 0, sizeof two);
    if (!tpr_wire_read_agree(block, block_size, &one)) return;
    FUZZ_CHECK(one.count <= TPR_WIRE_CHANNELS);
    tpr_wire_writer w = tpr_wire_writer_of(again, sizeof again);
    tpr_wire_write_agree(&w, &one);
    FUZZ_CHECK(!w.failed && (size_t)(w.at - again) <= block_size);
    FUZZ_CHECK(tpr_wire_read_agree(again, (size_t)(w.at - again), &two) && one.step == two.step &&
               one.count == two.count);
    for (uint32_t i = 0; i < one.count; i++) {
        const tpr_wire_proof *a = &one.proofs[i], *b = &two.proofs[i];
        FUZZ_CHECK(a->challenge_size <= TPR_WIRE_PROOF && a->answer_size <= TPR_WIRE_PROOF);
        FUZZ_CHECK(strcmp(a->name, b->name) == 0 && a->verdict == b->verdict);
        FUZZ_CHECK(a->challenge_size == b->challenge_size && a->answer_size == b->answer_size);
        FUZZ_CHECK(memcmp(a->challenge, b->challenge, a->challenge_size) == 0);
        FUZZ_CHECK(memcmp(a->answer, b->answer, a->answer_size) == 0);
    }
}

static void try_bye(void) {
    tprpc_status one, two;
    char text[200], back[200];
    if (!tpr_wire_read_bye(block, block_size, &one, text, sizeof text)) return;
    FUZZ_CHECK(one <= TPRPC_ERROR_SYSTEM && strlen(text) < sizeof text);
    tpr_wire_writer w = tpr_wire_writer_of(again, sizeof again);
    tpr_wire_write_bye(&w, one, text);
    FUZZ_CHECK(!w.failed && tpr_wire_read_bye(again, (size_t)(w.at - again), &two, back, sizeof back));
    FUZZ_CHECK(one == two && strcmp(text, back) == 0);
}

static void try_frame(void) {
    tpr_wire_frame frame;
    uint8_t head[TPR_WIRE_HEADER];
    if (block_size < TPR_WIRE_HEADER || !tpr_wire_get_frame(block, 1 << 20, &frame)) return;
    FUZZ_CHECK(frame.size <= (1u << 20) + TPR_WIRE_DATA_HEADER && frame.handles <= TPR_OS_HANDLES);
    FUZZ_CHECK(frame.kind >= TPR_WIRE_HELLO && frame.kind <= TPR_WIRE_LOST);
    tpr_wire_put_frame(head, frame.size, frame.kind, frame.handles, frame.channel);
    FUZZ_CHECK(memcmp(head, block, sizeof head) == 0);
}

/* The head of a short message is one that the general reader reads the same. */
static void try_short(void) {
    uint32_t metadata_size;
    uint8_t prefix_size, head[TPR_WIRE_SHORT];
    tpr_wire_frame frame;
    tpr_wire_message message;
    if (block_size < TPR_WIRE_SHORT || !tpr_wire_get_short(block, &metadata_size, &prefix_size)) return;
    tpr_wire_put_short(head, metadata_size, prefix_size);
    block[6] = block[7] = 0;           /* the channel, which a message has not, is not looked at */
    FUZZ_CHECK(memcmp(head, block, sizeof head) == 0);
    FUZZ_CHECK(tpr_wire_get_frame(block, UINT32_MAX, &frame) && frame.kind == TPR_WIRE_MESSAGE);
    tpr_wire_reader r = tpr_wire_reader_of(block + TPR_WIRE_HEADER, TPR_WIRE_MESSAGE_HEADER);
    tpr_wire_read_message(&r, &message);
    FUZZ_CHECK(!r.failed && message.metadata_size == metadata_size && message.prefix_size == prefix_size);
    FUZZ_CHECK(message.payloads == 0 && message.tensors == 0 && message.transfers == 0);
}

static void try_payload(tpr_wire_reader *r, uint32_t transfers) {
    tpr_wire_item one, two;
    memset(&one, 0, sizeof one);
    memset(&two, 0, sizeof two);
    tpr_wire_read_payload(r, &one, transfers);
    if (r->failed) return;
    FUZZ_CHECK(one.transfer == TPR_WIRE_INLINE || one.transfer < transfers);
    tpr_wire_writer w = tpr_wire_writer_of(again, TPR_WIRE_PAYLOAD_BYTES);
    tpr_wire_write_payload(&w, &one);
    FUZZ_CHECK(!w.failed && w.at == w.end);
    tpr_wire_reader back = tpr_wire_reader_of(again, TPR_WIRE_PAYLOAD_BYTES);
    tpr_wire_read_payload(&back, &two, transfers);
    FUZZ_CHECK(!back.failed && memcmp(&one, &two, sizeof one) == 0);
}

static void try_tensor(tpr_wire_reader *r, uint32_t transfers) {
    tpr_wire_item one, two;
    memset(&one, 0, sizeof one);
    memset(&two, 0, sizeof two);
    tpr_wire_read_tensor(r, &one, transfers);
    if (r->failed) return;
    FUZZ_CHECK(one.transfer == TPR_WIRE_INLINE || one.transfer < transfers);
    FUZZ_CHECK(one.ndim <= TPRPC_MAX_DIMS && tprpc_dtype_size(one.dtype) > 0);
    if (one.dtype != TPRPC_BYTES || one.ndim) {      /* the product, in a way that cannot overflow unseen */
        unsigned __int128 total = tprpc_dtype_size(one.dtype);
        bool none = false;
        for (int i = 0; i < one.ndim; i++) {
            FUZZ_CHECK(one.shape[i] >= 0);
            none |= one.shape[i] == 0;
        }
        for (int i = 0; i < one.ndim && !none; i++) {
            total *= (uint64_t)one.shape[i];
            FUZZ_CHECK(total <= UINT64_MAX);
        }
        FUZZ_CHECK(none ? one.size == 0 : total == one.size);
    }
    const size_t size = tpr_wire_tensor_bytes(one.ndim);
    tpr_wire_writer w = tpr_wire_writer_of(again, size);
    tpr_wire_write_tensor(&w, &one);
    FUZZ_CHECK(!w.failed && w.at == w.end);
    tpr_wire_reader back = tpr_wire_reader_of(again, size);
    tpr_wire_read_tensor(&back, &two, transfers);
    FUZZ_CHECK(!back.failed && memcmp(&one, &two, sizeof one) == 0);
}

static void try_transfer(tpr_wire_reader *r) {
    tpr_wire_transfer one, two;
    tpr_wire_read_transfer(r, &one);
    if (r->failed) return;
    FUZZ_CHECK(one.descriptor.size <= TPR_WIRE_DESCRIPTOR && inside(one.descriptor));
    tpr_wire_writer w = tpr_wire_writer_of(again, sizeof again);
    tpr_wire_write_transfer(&w, &one);
    FUZZ_CHECK(!w.failed && (size_t)(w.at - again) == TPR_WIRE_TRANSFER_BYTES + one.descriptor.size);
    tpr_wire_reader back = tpr_wire_reader_of(again, (size_t)(w.at - again));
    tpr_wire_read_transfer(&back, &two);
    FUZZ_CHECK(!back.failed && one.id == two.id && one.channel == two.channel &&
               same_bytes(one.descriptor, two.descriptor));
}

/* A message as a pipe reads it: header, payloads, tensors, transfers, prefix, metadata. */
static void try_message(void) {
    tpr_wire_reader r = tpr_wire_reader_of(block, block_size), back;
    tpr_wire_message head, two;
    tpr_wire_read_message(&r, &head);
    if (r.failed) return;
    FUZZ_CHECK(head.prefix_size <= TPR_WIRE_PREFIX && head.transfers <= TPR_WIRE_CHANNELS);
    tpr_wire_writer w = tpr_wire_writer_of(again, TPR_WIRE_MESSAGE_HEADER);
    tpr_wire_write_message(&w, &head);
    FUZZ_CHECK(!w.failed && w.at == w.end);
    back = tpr_wire_reader_of(again, TPR_WIRE_MESSAGE_HEADER);
    tpr_wire_read_message(&back, &two);
    FUZZ_CHECK(!back.failed && head.metadata_size == two.metadata_size && head.payloads == two.payloads &&
               head.tensors == two.tensors && head.transfers == two.transfers && head.prefix_size == two.prefix_size);
    for (uint32_t i = 0; i < head.payloads && !r.failed; i++) try_payload(&r, head.transfers);
    for (uint32_t i = 0; i < head.tensors && !r.failed; i++) try_tensor(&r, head.transfers);
    for (uint32_t i = 0; i < head.transfers && !r.failed; i++) try_transfer(&r);
    tpr_base_bytes prefix = tpr_wire_read_raw(&r, head.prefix_size);
    tpr_base_bytes metadata = tpr_wire_read_raw(&r, head.metadata_size);
    FUZZ_CHECK(inside(prefix) && inside(metadata));
    FUZZ_CHECK(r.at >= block && r.at <= block + block_size);
}

static void try_call(void) {
    tpr_wire_call one, two;
    uint8_t bytes[TPR_WIRE_CALL_BYTES];
    memset(&one, 0, sizeof one);
    memset(&two, 0, sizeof two);
    if (!tpr_wire_get_call(block, block_size, &one)) return;
    FUZZ_CHECK(one.kind >= TPR_WIRE_CALL && one.kind <= TPR_WIRE_INTRO);
    tpr_wire_put_call(bytes, &one);
    FUZZ_CHECK(tpr_wire_get_call(bytes, sizeof bytes, &two) && memcmp(&one, &two, sizeof one) == 0);
}

static void try_error(void) {
    tprpc_error one, two;
    if (!tpr_wire_get_error(block, block_size, &one)) return;
    FUZZ_CHECK(one.status >= TPRPC_ERROR_INVALID && one.status <= TPRPC_ERROR_SYSTEM);
    size_t size = tpr_wire_put_error(again, sizeof again, one.status, one.user_code, one.text);
    FUZZ_CHECK(size && tpr_wire_get_error(again, size, &two) && memcmp(&one, &two, sizeof one) == 0);
    for (size_t room = 0; room < size; room++)
        FUZZ_CHECK(tpr_wire_put_error(again, room, one.status, one.user_code, one.text) == 0);
}

static void try_intro(void) {
    char one[TPR_WIRE_NAME], two[TPR_WIRE_NAME];
    uint32_t rank, back;
    if (!tpr_wire_get_intro(block, block_size, one, sizeof one, &rank)) return;
    FUZZ_CHECK(one[0] && strlen(one) < sizeof one);
    size_t size = tpr_wire_put_intro(again, sizeof again, one, rank);
    FUZZ_CHECK(size && tpr_wire_get_intro(again, size, two, sizeof two, &back) && rank == back &&
               strcmp(one, two) == 0);
    for (size_t room = 0; room < size; room++) FUZZ_CHECK(tpr_wire_put_intro(again, room, one, rank) == 0);
}

/* Behind an introduction, and in the store. Tried with workers, so that the corpus keeps its numbers. */
static void try_maps(void) {
    static tpr_wire_map maps[TPR_WIRE_MAPS];
    tpr_wire_reader r;
    tprpc_error one, two;
    uint32_t count, back;
    if (tpr_wire_get_intro_maps(block, block_size, &r, &count)) {
        FUZZ_CHECK(count <= TPR_WIRE_MAPS);
        for (uint32_t i = 0; i < count; i++) tpr_wire_read_map(&r);
        FUZZ_CHECK(!r.failed && r.at <= block + block_size);
    }
    if (!tpr_wire_get_mapped(block, block_size, &one, &r, &count)) return;
    FUZZ_CHECK(count <= TPR_WIRE_MAPS && one.status <= TPRPC_ERROR_SYSTEM && strlen(one.text) < sizeof one.text);
    for (uint32_t i = 0; i < count; i++) maps[i] = tpr_wire_read_map(&r);
    FUZZ_CHECK(!r.failed);
    size_t size = tpr_wire_put_mapped(again, sizeof again, &one, maps, count);
    FUZZ_CHECK(size && size <= block_size && tpr_wire_get_mapped(again, size, &two, &r, &back) && back == count);
    FUZZ_CHECK(memcmp(again, block, size) == 0);
}

/* What else a group has in its store. */
static void try_group(void) {
    tpr_wire_kind kind;
    tpr_wire_members members;
    tpr_wire_leave word, back;
    if (tpr_wire_get_kind(block, block_size, &kind))
        FUZZ_CHECK(tpr_wire_put_kind(again, sizeof again, kind.nonce, kind.world_size, kind.name) <= block_size);
    if (tpr_wire_get_members(block, block_size, &members)) {
        size_t size = tpr_wire_put_members(again, sizeof again, &members);
        FUZZ_CHECK(size ? memcmp(again, block, size) == 0 : members.taken.size + 200 > sizeof again);
    }
    if (!tpr_wire_get_leave(block, block_size, &word)) return;
    size_t size = tpr_wire_put_leave(again, sizeof again, &word);
    FUZZ_CHECK(size && tpr_wire_get_leave(again, size, &back) && memcmp(&word, &back, sizeof word) == 0);
}

static void try_worker(void) {
    static tpr_wire_worker one, two;
    try_maps();
    try_group();
    if (!tpr_wire_get_worker(block, block_size, &one)) return;
    FUZZ_CHECK(one.address_count <= TPR_WIRE_ADDRESSES && one.run_count <= TPR_WIRE_RUNS && one.name[0]);
    size_t size = tpr_wire_put_worker(again, sizeof again, &one);
    FUZZ_CHECK(size && tpr_wire_get_worker(again, size, &two) && memcmp(&one, &two, sizeof one) == 0);
    for (size_t room = 0; room < size; room += 7) FUZZ_CHECK(tpr_wire_put_worker(again, room, &one) == 0);
}

static void try_store_hello(void) {
    tpr_wire_store_hello one, two;
    uint8_t bytes[TPR_WIRE_STORE_HELLO];
    bool begins = tpr_wire_store_begins(block, block_size);
    if (!tpr_wire_store_read_hello(block, block_size, &one)) return;
    FUZZ_CHECK(begins && one.status <= (uint32_t)TPRPC_ERROR_SYSTEM && one.status != (uint32_t)TPRPC_PENDING);
    tpr_wire_store_write_hello(bytes, (tprpc_status)one.status);
    FUZZ_CHECK(tpr_wire_store_read_hello(bytes, sizeof bytes, &two) && one.status == two.status);
}

/* Frames as they come: cut, each whole one read. */
static void try_store(void) {
    tpr_wire_store_frame one, two;
    size_t at = 0, length = 0;
    int whole;
    while ((whole = tpr_wire_store_split(block + at, block_size - at, &length)) > 0) {
        FUZZ_CHECK(length <= block_size - at && length >= TPR_WIRE_STORE_FIXED && length <= TPR_WIRE_STORE_FRAME);
        memset(&one, 0, sizeof one);
        if (tpr_wire_store_read(block + at, length, &one)) {
            FUZZ_CHECK(inside(one.key) && inside(one.value) && inside(one.expected) && inside(one.text));
            FUZZ_CHECK(one.key.size <= TPR_WIRE_STORE_KEY && one.value.size <= TPR_WIRE_STORE_VALUE &&
                       one.expected.size <= TPR_WIRE_STORE_VALUE && one.text.size <= TPR_WIRE_STORE_TEXT);
            if (one.type == TPR_WIRE_STORE_REQUEST) FUZZ_CHECK(one.key.size > 0);
            size_t size = tpr_wire_store_size(&one), found = 0;
            FUZZ_CHECK(size <= length && size <= sizeof again);
            tpr_wire_store_write(&one, again);
            FUZZ_CHECK(tpr_wire_store_split(again, size, &found) == 1 && found == size);
            FUZZ_CHECK(tpr_wire_store_read(again, size, &two));
            FUZZ_CHECK(one.type == two.type && one.kind == two.kind && one.flags == two.flags &&
                       one.status == two.status && one.os_code == two.os_code && one.id == two.id &&
                       one.delta == two.delta && same_bytes(one.key, two.key) && same_bytes(one.value, two.value) &&
                       same_bytes(one.expected, two.expected) && same_bytes(one.text, two.text));
        }
        at += length;
    }
    FUZZ_CHECK(whole < 0 || length == 0 || length > block_size - at);
}

/* Records of a file. The hash, which no fuzzer guesses, is put right where `mend` says so. */
static void try_records(void) {
    static uint8_t bytes[TPR_WIRE_RECORD_MOST];
    tpr_wire_record one, two;
    bool mend = block_size && block[0] & 1;
    size_t at = block_size ? 1 : 0;
    while (at + TPR_WIRE_RECORD_FIXED <= block_size) {
        size_t size = (size_t)TPR_WIRE_RECORD_FIXED + block[at + 9] + tpr_base_load_le32(block + at + 12);
        if (mend && size <= block_size - at)
            tpr_base_store_le64(block + at, tpr_base_hash(block + at + 8, size - 8));
        if (tpr_wire_record_read(block + at, block_size - at, &one) <= 0) return;
        FUZZ_CHECK(one.size == size && inside(one.key) && inside(one.value) && one.key.size > 0);
        if (one.remove) one.value = tpr_base_bytes_none();
        if (!one.remove && !one.value.data) one.value.data = block;
        size = tpr_wire_record_write(one.key, one.value, bytes);
        FUZZ_CHECK(size <= sizeof bytes && tpr_wire_record_read(bytes, size, &two) == 1 && two.size == size);
        FUZZ_CHECK(one.remove == two.remove && same_bytes(one.key, two.key) && same_bytes(one.value, two.value));
        FUZZ_CHECK(tpr_wire_record_read(bytes, size - 1, &two) == 0);
        at += one.size;
    }
}

/* What a writer wrote is read back, whatever the values, and in no less room. */
static void try_writers(void) {
    static tpr_wire_hello hello, hello_back;
    static tpr_wire_agree agree, agree_back;
    memset(&hello, 0, sizeof hello);
    memset(&agree, 0, sizeof agree);
    fuzz_at = block;
    fuzz_end = block + block_size;
    hello.major = TPR_WIRE_MAJOR;
    hello.minor = fuzz_u16();
    hello.message_bytes = fuzz_number();
    hello.metadata_bytes = fuzz_number();
    hello.tensors = (uint32_t)fuzz_number();
    hello.window = (uint32_t)fuzz_number();
    hello.space = hello.minor ? fuzz_number() : 0;
    hello.process = hello.minor ? (uint32_t)fuzz_number() : 0;
    hello.offer_count = fuzz_below(TPR_WIRE_OFFERS + 1);
    for (uint32_t i = 0; i < hello.offer_count; i++) {
        tpr_wire_offer *offer = &hello.offers[i];
        offer->channel = fuzz_u8() & 1;
        offer->domain_size = (uint8_t)fuzz_below(sizeof offer->domain + 1);
        for (uint32_t k = 0; k < offer->domain_size; k++) offer->domain[k] = fuzz_u8();
        snprintf(offer->name, sizeof offer->name, "%.*s", (int)fuzz_below(sizeof offer->name), "abcdefghijklmnopqrst");
        for (uint32_t k = fuzz_below(TPR_WIRE_ADDRESS); k > 0; k--) offer->address[k - 1] = (char)(fuzz_u8() | 1);
    }
    tpr_wire_writer w = tpr_wire_writer_of(again, sizeof again);
    tpr_wire_write_hello(&w, &hello);
    size_t size = (size_t)(w.at - again);
    FUZZ_CHECK(!w.failed && tpr_wire_read_hello(again, size, &hello_back));
    FUZZ_CHECK(memcmp(&hello, &hello_back, sizeof hello) == 0);
    w = tpr_wire_writer_of(again, size - 1);
    tpr_wire_write_hello(&w, &hello);
    FUZZ_CHECK(w.failed && !tpr_wire_read_hello(again, size - 1, &hello_back));
    agree.step = fuzz_u8();
    agree.count = fuzz_below(TPR_WIRE_CHANNELS + 1);
    for (uint32_t i = 0; i < agree.count; i++) {
        tpr_wire_proof *proof = &agree.proofs[i];
        proof->challenge_size = fuzz_below(TPR_WIRE_PROOF + 1);
        proof->answer_size = fuzz_below(TPR_WIRE_PROOF + 1);
        proof->verdict = fuzz_u8() & 1;
    }
    w = tpr_wire_writer_of(again, sizeof again);
    tpr_wire_write_agree(&w, &agree);
    size = (size_t)(w.at - again);
    memset(&agree_back, 0, sizeof agree_back);
    FUZZ_CHECK(!w.failed && tpr_wire_read_agree(again, size, &agree_back));
    FUZZ_CHECK(memcmp(&agree, &agree_back, sizeof agree) == 0);
    w = tpr_wire_writer_of(again, size - 1);
    tpr_wire_write_agree(&w, &agree);
    FUZZ_CHECK(w.failed && !tpr_wire_read_agree(again, size - 1, &agree_back));
}

static void fuzz_one(void) {
    static void (*const all[])(void) = {
        try_hello, try_move, try_agree, try_bye, try_frame, try_short, try_message, try_call, try_error, try_intro,
        try_worker, try_store_hello, try_store, try_records, try_writers,
    };
    uint32_t which = fuzz_below(sizeof all / sizeof all[0]);
    block_take(SIZE_MAX);
    all[which]();
    free(block);
}
