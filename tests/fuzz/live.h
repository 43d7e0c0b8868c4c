/* A live end, a pipe or an agent, and a stranger at the other one. The input is a list of deeds: what the stranger says
   (a good handshake, a frame with these fields, any bytes, in pieces), what the user of the live end does meanwhile,
   and how time goes on. Whatever is said, every operation ends once, what was lent comes back once, and nothing is left.

   FUZZ_SHM says over what: 0, a socket of tcp; 1, shared memory, into which the stranger also writes as he likes. */
#include "fuzz.h"

enum { LINES = 3, IDS = 8, TURNS = 12, DEEDS = 400, OPERATIONS = 1024, KEPT = 8 };

/* ---- the stranger's connections */

typedef struct line {
    int fd;                            /* -1: there is none */
    bool shm;
    uint8_t *shared, *tx, *rx;         /* of shm, once there is memory */
    size_t shared_size, ring;
    tpr_shm_end *mine, *theirs;
    uint64_t tx_pos, rx_pos;
    uint32_t woken;
    uint8_t *last;                     /* the payload of the last record */
    size_t skip, have;                 /* of what the live end says: bytes of a large frame; of a frame */
    uint8_t in[1 << 16];
} line;

static line lines[LINES], *now;        /* now: the one that deeds are about */
static int ears[2] = {-1, -1};         /* where the stranger listens: tcp, shm */
static char ear_names[2][64];
static bool polite;                    /* he answers a handshake as he should */

/* What he learned of the live end. */
static struct {
    uint8_t token[16], nonce[16], hello[TPR_WIRE_FIRST];
    tpr_wire_lane lane;                /* that was asked for, or told of */
    uint32_t hello_size, step;
    uint64_t granted;
    bool open;
    uint64_t ready[IDS], sending[IDS], calls[IDS], cost;   /* transfers asked for; offered; calls */
    uint32_t ready_count, sending_count, call_count;
    struct { uint64_t id, total, sent; } bulk[IDS];         /* his own transfers */
    uint32_t bulk_count;
} known;

/* ---- the live end */

enum { LISTENS, CONNECTS, SERVES, CALLS };   /* the last two are agents */

static struct {
    int role;
    tprpc_context *ctx;
    tprpc_listener *listener;
    tprpc_pipe *pipes[4];
    uint32_t pipe_count;
    tprpc_store *store;
    tprpc_agent *agent;
    tprpc_request kept[KEPT];
    tprpc_future futures[KEPT];
    uint32_t kept_count, future_count;
    uint8_t policy;                    /* what is done when a descriptor has come */
} live;

/* Each operation of the user's, by its number. */
typedef struct operation { bool begun, ended, places; uint8_t *memory; } operation;
static operation operations[OPERATIONS];
static uint32_t operation_count;

static void turn(uint32_t times) { fuzz_poll(live.ctx, times); }

/* ---- moments: the stranger writes into the memory while the live end reads it */

static struct { uint32_t after; uint8_t *at; uint8_t value; } scribble;

static void fuzz_moment(void) {
    if (scribble.after && --scribble.after == 0 && scribble.at) *scribble.at = scribble.value;
}

/* ---- lines */

static void line_close(line *l, bool hard) {
    const struct linger now_linger = {1, 0};
    if (l->fd >= 0 && hard && !l->shm) setsockopt(l->fd, SOL_SOCKET, SO_LINGER, &now_linger, sizeof now_linger);
    if (l->fd >= 0) close(l->fd);
    if (l->shared) munmap(l->shared, l->shared_size);
    if (l->shared) scribble.after = 0;
    l->fd = -1;
    l->shared = NULL;
    l->have = l->skip = 0;
}

static void line_map(line *l, int memfd, size_t ring, bool first) {
    l->shared_size = sizeof(tpr_shm_shared) + 2 * ring;
    l->shared = (uint8_t *)mmap(NULL, l->shared_size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (l->shared == MAP_FAILED) l->shared = NULL;
    if (!l->shared) return;
    tpr_shm_shared *shared = (tpr_shm_shared *)(void *)l->shared;
    uint8_t *rings = l->shared + sizeof(tpr_shm_shared);
    l->ring = ring;
    l->mine = &shared->ends[first ? 0 : 1];
    l->theirs = &shared->ends[first ? 1 : 0];
    l->tx = rings + (first ? 0 : ring);
    l->rx = rings + (first ? ring : 0);
    l->tx_pos = l->rx_pos = 0;
    l->woken = 0;
    l->last = l->tx;
}

static void line_raw(line *l, const void *bytes, size_t size, const int *fds, size_t fd_count) {
    union { struct cmsghdr head; char room[CMSG_SPACE(16 * sizeof(int))]; } control;
    struct iovec piece = {(void *)(uintptr_t)bytes, size};
    struct msghdr message;
    memset(&message, 0, sizeof message);
    memset(&control, 0, sizeof control);
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    if (fd_count) {
        message.msg_control = &control;
        message.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        control.head.cmsg_level = SOL_SOCKET;
        control.head.cmsg_type = SCM_RIGHTS;
        control.head.cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(&control.head), fds, fd_count * sizeof(int));
    }
    if (l->fd >= 0) (void)!sendmsg(l->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void line_wake(line *l) {
    uint32_t armed = TPR_ATOMIC_LOAD_FULL(&l->theirs->armed);
    uint8_t zero = 0;
    if (!(armed & 1) || armed == l->woken) return;
    l->woken = armed;
    line_raw(l, &zero, 1, NULL, 0);
}

static bool line_has_room(line *l, uint64_t need) {
    for (int i = 0; i < 8; i++) {
        if (l->tx_pos - TPR_ATOMIC_LOAD(&l->theirs->consumed) + need + TPR_SHM_LINE <= l->ring) return true;
        turn(1);
        if (!l->shared) return false;
    }
    return false;
}

/* As the protocol has it, as long as the live end gives room back; then it is dropped. */
static void line_put_records(line *l, const uint8_t *bytes, size_t size) {
    while (size) {
        uint64_t at = l->tx_pos & (l->ring - 1), to_end = l->ring - at;
        size_t n = size < 4000 ? size : 4000;
        uint64_t need = tpr_shm_record(n);
        if (!line_has_room(l, need > to_end ? to_end + need : need)) return;
        if (need > to_end) {
            TPR_ATOMIC_STORE(tpr_shm_word(l->tx, 0), 0u);
            TPR_ATOMIC_STORE(tpr_shm_word(l->tx, at), (uint32_t)TPR_SHM_SKIP);
            l->tx_pos += to_end;
            continue;
        }
        l->tx_pos += need;
        TPR_ATOMIC_STORE(tpr_shm_word(l->tx, l->tx_pos & (l->ring - 1)), 0u);
        l->last = l->tx + at + TPR_SHM_WORD;
        memcpy(l->last, bytes, n);
        TPR_ATOMIC_STORE_FULL(tpr_shm_word(l->tx, at), (uint32_t)n + 1);
        line_wake(l);
        bytes += n;
        size -= n;
    }
}

static void line_put(line *l, const uint8_t *bytes, size_t size) {
    if (l->fd < 0) return;
    if (!l->shm) line_raw(l, bytes, size, NULL, 0);
    else if (l->shared) line_put_records(l, bytes, size);
}

static uint32_t cut;                   /* what is said goes out in pieces of so many bytes; 0: whole */

static void say(const void *bytes, size_t size) {
    const uint8_t *at = (const uint8_t *)bytes;
    for (uint32_t pieces = 0; size; pieces++) {
        size_t n = cut && pieces < 64 && cut < size ? cut : size;
        line_put(now, at, n);
        at += n;
        size -= n;
        if (size) turn(1);
    }
}

static size_t line_get(line *l, uint8_t *to, size_t size) {
    if (l->fd < 0) return 0;
    if (!l->shm) {
        ssize_t n = recv(l->fd, to, size, MSG_DONTWAIT);
        return n > 0 ? (size_t)n : 0;
    }
    if (!l->shared) return 0;
    for (int i = 0; i < 2; i++) {
        uint64_t at = l->rx_pos & (l->ring - 1);
        uint32_t word = TPR_ATOMIC_LOAD(tpr_shm_word(l->rx, at));
        if (word == TPR_SHM_SKIP) {
            l->rx_pos += l->ring - at;
            continue;
        }
        if (word < 2 || word - 1 > l->ring - at - TPR_SHM_WORD || word - 1 > size) return 0;
        memcpy(to, l->rx + at + TPR_SHM_WORD, word - 1);
        l->rx_pos += tpr_shm_record(word - 1);
        TPR_ATOMIC_STORE_FULL(&l->mine->consumed, l->rx_pos);
        if (TPR_ATOMIC_LOAD(&l->theirs->wants)) line_wake(l);
        return word - 1;
    }
    return 0;
}

/* ---- what the stranger says */

static uint8_t frame[1 << 18];
static uint8_t announced;              /* how many descriptors the next frame says that it comes with */

static void say_frame(uint8_t kind, size_t body, uint16_t channel) {
    tpr_wire_put_frame(frame, (uint32_t)body, kind, announced, channel);
    announced = 0;
    say(frame, TPR_WIRE_HEADER + body);
}

static tpr_wire_writer frame_body(void) {
    return tpr_wire_writer_of(frame + TPR_WIRE_HEADER, sizeof frame - TPR_WIRE_HEADER);
}

static size_t body_size(const tpr_wire_writer *w) { return (size_t)(w->at - frame) - TPR_WIRE_HEADER; }

/* What he has: the channel that all have, and what the flags say of the rest, as the live end describes its own. */
static void say_hello(uint8_t flags) {
    static tpr_wire_hello hello, theirs;
    memset(&hello, 0, sizeof hello);
    hello.major = TPR_WIRE_MAJOR;
    hello.minor = TPR_WIRE_MINOR;
    hello.message_bytes = hello.metadata_bytes = 1 << 20;
    hello.tensors = 64;
    hello.window = 1 << 20;
    snprintf(hello.offers[0].name, sizeof hello.offers[0].name, "basic");
    hello.offers[0].channel = true;
    hello.offer_count = 1;
    if ((flags & 1) && known.hello_size && tpr_wire_read_hello(known.hello, known.hello_size, &theirs)) {
        hello.offer_count = theirs.offer_count;
        memcpy(hello.offers, theirs.offers, sizeof hello.offers);
        for (uint32_t i = 0; i < hello.offer_count; i++) {
            tpr_wire_offer *offer = &hello.offers[i];
            const int ear = strcmp(offer->name, "shm") == 0;
            if (!offer->channel) snprintf(offer->address, sizeof offer->address, "%s", strstr(ear_names[ear], "://") + 3);
        }
    }
    if (flags & 2) hello.message_bytes = fuzz_number();
    if (flags & 4) hello.metadata_bytes = fuzz_number();
    if (flags & 8) hello.tensors = (uint32_t)fuzz_number();
    if (flags & 16) hello.major = fuzz_u8();
    if (flags & 32) memcpy(hello.token, known.token, 16);
    if ((flags & 64) && hello.offer_count) {
        tpr_wire_offer *offer = &hello.offers[fuzz_below(hello.offer_count)];
        offer->domain_size = (uint8_t)fuzz_below(65);
        offer->domain[fuzz_below(64)] ^= fuzz_u8();
        offer->channel = fuzz_u8() & 1;
    }
    tpr_wire_writer w = frame_body();
    tpr_wire_write_hello(&w, &hello);
    if (flags & 128) frame[TPR_WIRE_HEADER + fuzz_below((uint32_t)body_size(&w))] ^= fuzz_u8();
    say_frame(TPR_WIRE_HELLO, body_size(&w), 0);
}

/* What cma reads of the stranger's, who is in this process: a nonce, and a transfer's word with where its buffers are. */
static uint8_t nonce[16];
static uint64_t table[1 + 64];
enum { TABLE_WORD = 0x1234 };

/* The next step of the proof, of the channels that the live end named or, when it named none, of basic and of cma. */
static tpr_wire_agree proofs;

static void say_agree(uint32_t step, uint8_t flags) {
    if (!proofs.count) {
        proofs.count = flags & 1 ? 2 : 1;
        snprintf(proofs.proofs[0].name, sizeof proofs.proofs[0].name, "basic");
        snprintf(proofs.proofs[1].name, sizeof proofs.proofs[1].name, "cma");
        tpr_base_store_le64(proofs.proofs[1].challenge, (uintptr_t)nonce);
        proofs.proofs[1].challenge_size = 8;
    }
    proofs.step = step;
    for (uint32_t i = 0; i < proofs.count; i++) {
        tpr_wire_proof *proof = &proofs.proofs[i];
        memcpy(proof->answer, proof->challenge, sizeof proof->answer);
        proof->answer_size = step > 1 ? proof->challenge_size : 0;
        if (strcmp(proof->name, "cma") == 0 && proof->challenge_size == 8) {
            tprpc_span there, here;
            there.data = (void *)(uintptr_t)tpr_base_load_le64(proof->challenge);
            here.data = proof->answer;
            here.size = there.size = sizeof nonce;
            tpr_os_read_process(tpr_os_pid(), &here, &there, 1);
            if (step > 1) proof->answer_size = sizeof nonce;
        }
        if ((flags & 2) && step > 1) proof->answer_size = fuzz_below(TPR_WIRE_PROOF + 1);
        if (flags & 4) proof->challenge_size = fuzz_below(TPR_WIRE_PROOF + 1);
        proof->verdict = !(flags & 8);
    }
    if (flags & 16) proofs.count = fuzz_below(TPR_WIRE_CHANNELS + 1);
    if (flags & 32) snprintf(proofs.proofs[0].name, sizeof proofs.proofs[0].name, "%s", flags & 64 ? "xth" : "nothing");
    tpr_wire_writer w = frame_body();
    tpr_wire_write_agree(&w, &proofs);
    if (flags & 128) frame[TPR_WIRE_HEADER + fuzz_below((uint32_t)body_size(&w))] ^= fuzz_u8();
    say_frame(TPR_WIRE_AGREE, body_size(&w), 0);
}

static void say_move(uint8_t kind, bool wrong) {
    tpr_wire_move move;
    memcpy(move.token, known.token, 16);
    memcpy(move.nonce, known.nonce, 16);
    if (wrong) move.token[fuzz_below(16)] ^= fuzz_u8();
    if (wrong) move.nonce[fuzz_below(16)] ^= fuzz_u8();
    tpr_wire_writer w = frame_body();
    tpr_wire_write_move(&w, &move);
    say_frame(kind, body_size(&w), 0);
}

/* A frame about a lane: one that the live end has spoken of, or any. */
static void say_lane(uint8_t kind, uint8_t how) {
    tpr_wire_lane lane = known.lane;
    memcpy(lane.move.token, known.token, 16);
    if (how & 1) lane.number = (uint32_t)fuzz_number();
    if (how & 2) lane.number = 1;
    if (how & 4) lane.move.nonce[fuzz_below(16)] ^= fuzz_u8();
    if (how & 8) lane.move.token[fuzz_below(16)] ^= fuzz_u8();
    if (how & 16) lane.sent = fuzz_number();
    if (kind == TPR_WIRE_LANE && !(how & 32)) lane.move.nonce[15] = ++known.lane.move.nonce[15];
    tpr_wire_writer w = frame_body();
    tpr_wire_write_lane(&w, &lane);
    if (kind == TPR_WIRE_WANT) tpr_base_store_le32(frame + TPR_WIRE_HEADER, lane.number);
    say_frame(kind, body_size(&w), 0);
}

static uint64_t pick_id(const uint64_t *ids, uint32_t count) {
    uint8_t how = fuzz_u8();
    return how & 1 && count ? ids[(how >> 1) % (count < IDS ? count : IDS)] : how & 2 ? fuzz_number() : how >> 2;
}

static void say_control(uint8_t kind, uint64_t id) {
    uint8_t *body = frame + TPR_WIRE_HEADER;
    memset(body, 0, 16);
    body[0] = kind;
    tpr_base_store_le64(body + 8, id);
    say_frame(TPR_WIRE_CHANNEL, 16, 0);
}

static void say_credit(uint64_t consumed) {
    tpr_base_store_le64(frame + TPR_WIRE_HEADER, consumed);
    say_frame(TPR_WIRE_CREDIT, 8, 0);
}

/* Many messages, one after the other, so that windows and rings fill. */
static void say_flood(void) {
    uint8_t how = fuzz_u8();
    size_t size = how & 1 ? 60000 : how & 2 ? 4000 : 100;
    for (uint32_t i = 0; i < 1 + (how >> 3); i++) {
        memset(frame, 0, TPR_WIRE_SHORT + size);
        tpr_wire_put_short(frame, (uint32_t)size, 0);
        say(frame, TPR_WIRE_SHORT + size);
        if (how & 4) turn(1);
    }
}

/* A prefix as agents have it. */
static uint8_t fill_prefix(uint8_t *prefix) {
    static const char *const methods[] = {"echo", "keep", "fail", "place"};
    tpr_wire_call call;
    uint8_t how = fuzz_u8();
    memset(&call, 0, sizeof call);
    call.kind = how & 7;
    call.flags = how & 8 ? fuzz_u8() : 0;
    call.method = how & 16 ? fuzz_u32() : tpr_agent_method_id(methods[how >> 5 & 3]);
    call.id = call.kind == TPR_WIRE_CALL ? fuzz_u8() : pick_id(known.calls, known.call_count);
    call.lane = how & 128 ? fuzz_u8() & 3 : 0;
    call.timeout_ms = how & 128 ? (uint32_t)fuzz_number() : 0;
    tpr_wire_put_call(prefix, &call);
    return (uint8_t)call.kind;
}

static size_t fill_metadata(uint8_t kind, uint8_t *out) {
    uint8_t how = fuzz_u8();
    size_t size = 0;
    if (kind == TPR_WIRE_ERROR)
        size = tpr_wire_put_error(out, 300, (tprpc_status)fuzz_below(20), (int32_t)fuzz_u8(), "he said no");
    if (kind == TPR_WIRE_INTRO) size = tpr_wire_put_intro(out, 300, "mallory", 7);
    if (size && (how & 1)) out[fuzz_below((uint32_t)size)] ^= fuzz_u8();
    if (size) return size;
    size = fuzz_size(how & 1 ? 70000 : 600);
    memset(out, how, size);
    return size;
}

static uint64_t next_bulk;

static uint64_t offer_bulk(uint64_t total) {
    uint8_t how = fuzz_u8() & 7;       /* mostly a new one; any; the last one, which may be under way */
    uint64_t id = how == 0 ? fuzz_number() : how == 7 && next_bulk ? next_bulk - 1 : next_bulk++;
    known.bulk[known.bulk_count % IDS].id = id;
    known.bulk[known.bulk_count % IDS].total = total;
    known.bulk[known.bulk_count++ % IDS].sent = 0;
    return id;
}

/* A message whose fields fit together; then one byte of it may be wrong. */
static void say_message(bool call) {
    static uint8_t metadata[1 << 17];
    tpr_wire_message head;
    tpr_wire_item items[8];
    uint8_t prefix[TPR_WIRE_PREFIX] = {0}, flags = fuzz_u8(), kind = 0;
    uint64_t totals[4] = {0, 0, 0, 0};
    uint8_t where_table[16];
    memset(&head, 0, sizeof head);
    memset(items, 0, sizeof items);
    if (call) {
        kind = fill_prefix(prefix);
        head.prefix_size = TPR_WIRE_CALL_BYTES;
    } else if (flags & 1) {
        head.prefix_size = (uint8_t)fuzz_below(TPR_WIRE_PREFIX + 1);
    }
    if (!(flags & 2)) {
        head.payloads = flags & 4 ? (uint16_t)fuzz_below(3) : 0;
        head.tensors = (uint16_t)fuzz_below(5);
        head.transfers = (uint8_t)fuzz_below(3);
    }
    const uint32_t count = (uint32_t)head.payloads + head.tensors;
    head.metadata_size = (uint32_t)fill_metadata(kind, metadata);
    for (uint32_t i = 0; i < count; i++) {
        tpr_wire_item *item = &items[i];
        bool bulk = head.transfers && (fuzz_u8() & 1);
        item->size = fuzz_size(bulk ? 300000 : 9000);
        item->transfer = bulk ? (uint8_t)(i % head.transfers) : (uint8_t)TPR_WIRE_INLINE;
        if (bulk) totals[item->transfer] += item->size;
        item->metadata_size = flags & 8 ? fuzz_u8() : 0;
        item->dtype = flags & 16 ? TPRPC_U8 : TPRPC_BYTES;
        item->ndim = flags & 16;
        item->ndim = item->ndim ? 1 : 0;
        item->shape[0] = (int64_t)item->size;
        item->device.kind = flags & 32 ? (int32_t)fuzz_below(70) : TPRPC_CPU;
        item->target.kind = flags & 64 ? (int32_t)fuzz_below(70) : TPRPC_DEVICE_DEFAULT;
    }
    tpr_base_store_le64(where_table, (uintptr_t)table);
    tpr_base_store_le64(where_table + 8, TABLE_WORD);
    table[0] = flags & 4 ? TABLE_WORD : 0;
    for (size_t i = 1; i < sizeof table / sizeof table[0]; i++) table[i] = (uintptr_t)frame;
    tpr_wire_writer w = frame_body();
    tpr_wire_write_message(&w, &head);
    for (uint32_t i = 0; i < count; i++) {
        if (i < head.payloads) tpr_wire_write_payload(&w, &items[i]);
        else tpr_wire_write_tensor(&w, &items[i]);
    }
    for (uint32_t i = 0; i < head.transfers; i++) {
        tpr_wire_transfer transfer = {offer_bulk(totals[i]), flags & 1 ? fuzz_below(3) & 0xffff : 0, {metadata, 0}};
        transfer.descriptor.size = flags & 8 ? fuzz_u8() : 0;
        if (transfer.descriptor.size % 2) {
            transfer.descriptor.data = where_table;
            transfer.descriptor.size = sizeof where_table;
        }
        tpr_wire_write_transfer(&w, &transfer);
    }
    tpr_wire_write_raw(&w, prefix, head.prefix_size);
    tpr_wire_write_raw(&w, metadata, head.metadata_size);
    for (uint32_t i = 0; i < count; i++) tpr_wire_write_raw(&w, metadata, items[i].metadata_size);
    for (uint32_t i = 0; i < count; i++)
        if (items[i].transfer == TPR_WIRE_INLINE) tpr_wire_write_raw(&w, metadata, (size_t)items[i].size);
    if (w.failed) return;
    if (flags & 128) frame[TPR_WIRE_HEADER + fuzz_below((uint32_t)body_size(&w))] ^= fuzz_u8();
    say_frame(TPR_WIRE_MESSAGE, body_size(&w), 0);
}

static void say_data(uint64_t id, uint64_t offset, size_t size, uint16_t channel) {
    if (size > sizeof frame - 64) size = sizeof frame - 64;
    tpr_base_store_le64(frame + TPR_WIRE_HEADER, id);
    tpr_base_store_le64(frame + TPR_WIRE_HEADER + 8, offset);
    memset(frame + TPR_WIRE_HEADER + TPR_WIRE_DATA_HEADER, (int)(id + 1), size);
    say_frame(TPR_WIRE_DATA, TPR_WIRE_DATA_HEADER + size, channel);
}

/* The bulk that the live end asked for. */
static void say_bulk(size_t most) {
    for (uint32_t i = 0; i < IDS; i++) {
        if (known.bulk[i].sent >= known.bulk[i].total) continue;
        for (uint32_t k = 0; k < known.ready_count && k < IDS; k++) {
            if (known.ready[k] != known.bulk[i].id) continue;
            uint64_t left = known.bulk[i].total - known.bulk[i].sent;
            size_t size = left < most ? (size_t)left : most;
            say_data(known.bulk[i].id, known.bulk[i].sent, size, 0);
            known.bulk[i].sent += size;
            break;
        }
    }
}

static void say_intro(void) {
    tpr_wire_call call;
    uint8_t name[64];
    memset(&call, 0, sizeof call);
    call.kind = TPR_WIRE_INTRO;
    size_t size = tpr_wire_put_intro(name, sizeof name, "mallory", 7);
    tpr_wire_put_short(frame, (uint32_t)size, TPR_WIRE_CALL_BYTES);
    tpr_wire_put_call(frame + TPR_WIRE_SHORT, &call);
    memcpy(frame + TPR_WIRE_SHORT + TPR_WIRE_CALL_BYTES, name, size);
    say(frame, TPR_WIRE_SHORT + TPR_WIRE_CALL_BYTES + size);
}

/* ---- what the stranger hears */

static void heard(const tpr_wire_frame *head, const uint8_t *body) {
    static tpr_wire_hello hello;
    static tpr_wire_agree agree;
    tpr_wire_move move;
    tpr_wire_lane lane;
    switch (head->kind) {
    case TPR_WIRE_HELLO:
        if (head->size > sizeof known.hello || !tpr_wire_read_hello(body, head->size, &hello)) return;
        memcpy(known.hello, body, head->size);
        known.hello_size = head->size;
        memcpy(known.token, hello.token, 16);
        memcpy(known.nonce, hello.nonce, 16);
        if (!polite) return;
        if (live.role == CONNECTS || live.role == CALLS) say_hello(0);
        else say_agree(1, 0);
        return;
    case TPR_WIRE_MOVE:
        if (!tpr_wire_read_move(body, head->size, &move)) return;
        memcpy(known.nonce, move.nonce, 16);
        memcpy(known.token, move.token, 16);
        if (polite) say_move(TPR_WIRE_MOVED, false);
        return;
    case TPR_WIRE_LANE: case TPR_WIRE_LANED: case TPR_WIRE_LOST:
        if (!tpr_wire_read_lane(body, head->size, &lane)) return;
        known.lane = lane;
        if (polite && (head->kind != TPR_WIRE_LANED || live.role == LISTENS || live.role == SERVES))
            say_lane(head->kind == TPR_WIRE_LOST ? TPR_WIRE_LOST : TPR_WIRE_LANED, 0);
        return;
    case TPR_WIRE_AGREE:
        memset(&agree, 0, sizeof agree);
        if (!tpr_wire_read_agree(body, head->size, &agree)) return;
        proofs = agree;
        known.step = agree.step;
        if (!polite) return;
        if (agree.step < 4) say_agree(agree.step + 1, 0);
        known.open |= agree.step >= 3;
        if (agree.step >= 3 && live.role == SERVES) say_intro();
        return;
    case TPR_WIRE_MESSAGE: {
        tpr_wire_reader r = tpr_wire_reader_of(body, head->size);
        tpr_wire_message message;
        tpr_wire_transfer transfer;
        tpr_wire_item item;
        tpr_wire_call call;
        memset(&item, 0, sizeof item);
        known.cost += TPR_WIRE_HEADER + head->size;
        tpr_wire_read_message(&r, &message);
        for (int i = 0; i < message.payloads; i++) tpr_wire_read_payload(&r, &item, message.transfers);
        for (int i = 0; i < message.tensors; i++) tpr_wire_read_tensor(&r, &item, message.transfers);
        for (int i = 0; i < message.transfers; i++) {
            tpr_wire_read_transfer(&r, &transfer);
            if (r.failed) break;
            known.sending[known.sending_count++ % IDS] = transfer.id;
            if (polite) say_control(TPR_BATCH_READY, transfer.id);
        }
        if (polite && known.cost - known.granted > 100000) say_credit(known.granted = known.cost);
        tpr_base_bytes prefix = tpr_wire_read_raw(&r, message.prefix_size);
        if (!r.failed && tpr_wire_get_call(prefix.data, prefix.size, &call) && call.kind == TPR_WIRE_CALL)
            known.calls[known.call_count++ % IDS] = call.id;
        return;
    }
    case TPR_WIRE_CHANNEL:
        if (head->size == 16 && body[0] == TPR_BATCH_READY)
            known.ready[known.ready_count++ % IDS] = tpr_base_load_le64(body + 8);
        return;
    default: return;
    }
}

static void hear(line *l) {
    line *before = now;
    for (int round = 0; round < 64; round++) {
        size_t n = line_get(l, l->in + l->have, sizeof l->in - l->have);
        if (!n) break;
        l->have += n;
        for (;;) {
            if (l->skip) {             /* of a frame that is too large to be kept */
                n = l->skip < l->have ? l->skip : l->have;
                l->skip -= n;
                l->have -= n;
                memmove(l->in, l->in + n, l->have);
                if (l->skip) break;
            }
            tpr_wire_frame head;
            if (l->have < TPR_WIRE_HEADER) break;
            if (!tpr_wire_get_frame(l->in, 16 << 20, &head)) {   /* a line whose memory was scribbled over */
                l->have = 0;
                break;
            }
            size_t size = TPR_WIRE_HEADER + (size_t)head.size;
            if (size > sizeof l->in) {
                known.cost += head.kind == TPR_WIRE_MESSAGE ? size : 0;
                l->skip = size;
                continue;
            }
            if (l->have < size) break;
            now = l;
            heard(&head, l->in + TPR_WIRE_HEADER);
            now = before;
            l->have -= size;
            memmove(l->in, l->in + size, l->have);
        }
    }
}

/* ---- lines begin */

static int ear_of(int which) {
    tpr_os_address at;
    struct sockaddr_in in;
    socklen_t size = sizeof in;
    if (ears[which] >= 0) return ears[which];
    if (which) {
        snprintf(ear_names[1], sizeof ear_names[1], "shm://tprpc-fuzz-%d", (int)getpid());
        ears[1] = tpr_os_socket(AF_UNIX);
        FUZZ_CHECK(tpr_os_unix_address(ear_names[1] + 6, &at) == 0 && tpr_os_listen(ears[1], &at) == 0);
        return ears[1];
    }
    ears[0] = tpr_os_socket(AF_INET);
    memset(&in, 0, sizeof in);
    in.sin_family = AF_INET;
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    FUZZ_CHECK(bind(ears[0], (struct sockaddr *)(void *)&in, sizeof in) == 0 && listen(ears[0], 16) == 0);
    FUZZ_CHECK(getsockname(ears[0], (struct sockaddr *)(void *)&in, &size) == 0);
    snprintf(ear_names[0], sizeof ear_names[0], "tcp://127.0.0.1:%d", ntohs(in.sin_port));
    return ears[0];
}

/* Memory to be passed in a hello: what the flags say of it. */
static int memory_of(uint8_t flags, size_t size) {
    if (flags & 1) size = flags & 2 ? size / 2 : size + 4096;
    if (flags & 4) {                   /* not sealed, or not all of it */
        int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        FUZZ_CHECK(fd >= 0 && ftruncate(fd, (off_t)size) == 0);
        if (flags & 8) FUZZ_CHECK(fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0);
        return fd;
    }
    if (flags & 8) return open(flags & 2 ? "/dev/zero" : "/", O_RDONLY | O_CLOEXEC);
    return tpr_os_memfd("fuzz", size);
}

/* The stranger's hello to a listener of shm. flags 0: as it should be. */
static void line_ask(line *l, uint8_t flags) {
    uint8_t hello[TPR_SHM_HELLO] = {0};
    size_t ring = flags & 16 ? (size_t)TPR_SHM_RING_LEAST << fuzz_below(4) : (size_t)TPR_SHM_RING;
    int fds[3], count = flags & 32 ? (int)fuzz_below(4) : 1;
    fds[0] = memory_of(flags & 15, sizeof(tpr_shm_shared) + 2 * ring);
    fds[1] = fds[2] = 0;
    tpr_base_store_le32(hello, TPR_SHM_MAGIC);
    tpr_base_store_le32(hello + 4, TPR_SHM_VERSION);
    tpr_base_store_le32(hello + 8, (uint32_t)ring);
    if (flags & 64) hello[fuzz_below(12)] ^= fuzz_u8();
    size_t first = flags & 128 ? fuzz_below(TPR_SHM_HELLO) : (size_t)TPR_SHM_HELLO;
    if (first) line_raw(l, hello, first, fds, (size_t)(fds[0] >= 0 ? count : 0));
    if (flags & 128) turn(1);
    if (first < sizeof hello) line_raw(l, hello + first, sizeof hello - first, fds, first ? 0 : 1);
    struct stat st;
    if (fds[0] >= 0 && fstat(fds[0], &st) == 0 && st.st_size == (off_t)(sizeof(tpr_shm_shared) + 2 * ring))
        line_map(l, fds[0], ring, true);
    if (fds[0] >= 0) close(fds[0]);
}

static void line_connect(line *l, bool shm, uint8_t flags) {
    const char *address = live.listener ? tprpc_listener_address(live.listener, shm ? "shm" : "tcp") : NULL;
    tpr_os_address at;
    struct sockaddr_in in;
    for (uint32_t i = 0; live.agent && i < live.agent->self.address_count; i++)
        if (strncmp(live.agent->self.addresses[i], shm ? "shm" : "tcp", 3) == 0)
            address = live.agent->self.addresses[i];
    static tpr_wire_hello hello;       /* where it listens for a pipe that moves, it said in its hello */
    static char offered[TPR_WIRE_ADDRESS + 8];
    if (!address && known.hello_size && tpr_wire_read_hello(known.hello, known.hello_size, &hello)) {
        const char *name = shm ? "shm" : "tcp";
        for (uint32_t i = 0; i < hello.offer_count; i++) {
            if (strcmp(hello.offers[i].name, name) != 0 || !hello.offers[i].address[0]) continue;
            snprintf(offered, sizeof offered, "%s://%s", name, hello.offers[i].address);
            address = offered;
        }
    }
    if (!address) return;
    l->shm = shm;
    l->fd = socket(shm ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    FUZZ_CHECK(l->fd >= 0);
    if (shm) {
        FUZZ_CHECK(tpr_os_unix_address(address + 6, &at) == 0);
        (void)!fcntl(l->fd, F_SETFL, O_NONBLOCK);
        if (connect(l->fd, (struct sockaddr *)&at.at, at.size) != 0) {
            line_close(l, true);
            return;
        }
        line_ask(l, flags);
        turn(2);
        uint8_t answer;
        (void)!recv(l->fd, &answer, 1, MSG_DONTWAIT);
        return;
    }
    memset(&in, 0, sizeof in);
    in.sin_family = AF_INET;
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    in.sin_port = htons((uint16_t)atoi(strrchr(address, ':') + 1));
    if (connect(l->fd, (struct sockaddr *)(void *)&in, sizeof in) != 0) line_close(l, true);
}

/* Takes in a connection of the live end's. flags 0: as one should. */
static void line_accept(line *l, bool shm, uint8_t flags) {
    union { struct cmsghdr head; char room[CMSG_SPACE(8 * sizeof(int))]; } control;
    uint8_t hello[TPR_SHM_HELLO], answer = flags & 1 ? fuzz_u8() : 0;
    struct iovec piece = {hello, sizeof hello};
    struct msghdr message;
    int memfd = -1;
    l->fd = accept4(ear_of(shm), NULL, NULL, SOCK_CLOEXEC);
    l->shm = shm;
    if (l->fd < 0 || !shm) return;
    memset(&message, 0, sizeof message);
    memset(&control, 0, sizeof control);
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    message.msg_control = &control;
    message.msg_controllen = sizeof control;
    if (recvmsg(l->fd, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0) return;
    if (CMSG_FIRSTHDR(&message)) memcpy(&memfd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof memfd);
    if (memfd >= 0) line_map(l, memfd, TPR_SHM_RING, false);
    if (memfd >= 0) close(memfd);
    line_raw(l, &answer, 1, NULL, 0);
}

static void line_begin(bool shm, uint8_t flags) {
    for (uint32_t i = 0; i < LINES; i++) {
        if (lines[i].fd >= 0) continue;
        now = &lines[i];
        if (live.role == LISTENS || live.role == SERVES) line_connect(now, shm, flags);
        else line_accept(now, shm, flags);
        return;
    }
}

/* ---- the user of the live end */

static uint32_t operation_begin(size_t memory) {
    FUZZ_CHECK(operation_count < OPERATIONS);
    operation *o = &operations[operation_count];
    o->begun = true;
    o->ended = o->places = false;
    o->memory = memory ? (uint8_t *)malloc(memory) : NULL;
    if (memory) memset(o->memory, 7, memory);
    return operation_count++;
}

static void operation_end(void *user) {
    operation *o = &operations[(uintptr_t)user];
    FUZZ_CHECK(o->begun && !o->ended);
    o->ended = true;
    free(o->memory);
    o->memory = NULL;
}

/* Whether it was accepted: if not, nothing may follow. */
static void operation_status(uint32_t number, tprpc_status status) {
    if (status == TPRPC_OK) return;
    FUZZ_CHECK(!operations[number].ended);
    operation_end((void *)(uintptr_t)number);
}

/* Looks at all that a message shows, so that the sanitizers do. */
static uint32_t look_sum;
static void look_at(const void *bytes, size_t size) {
    for (size_t i = 0; bytes && i < size; i += size > 4096 ? 511 : 1) look_sum += ((const uint8_t *)bytes)[i];
    if (bytes && size) look_sum += ((const uint8_t *)bytes)[size - 1];
}
static void look(const tprpc_message *m) {
    look_at(m->metadata, m->metadata_size);
    for (size_t i = 0; i < m->tensor_count; i++) {
        look_at(m->tensors[i].metadata, m->tensors[i].metadata_size);
        look_at(m->tensors[i].data, m->tensors[i].size);
    }
    for (size_t i = 0; i < m->payload_count; i++) {
        look_at(m->payloads[i].metadata, m->payloads[i].metadata_size);
        look_at(m->payloads[i].data, m->payloads[i].size);
    }
}

static void user_written(tprpc_status status, const tprpc_error *error, void *user) {
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL));
    operation_end(user);
}

static void user_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL));
    if (status == TPRPC_OK) look(message);
    operation_end(user);
}

static tprpc_pipe *user_pipe(void) {
    return live.pipe_count ? live.pipes[fuzz_below(live.pipe_count)] : NULL;
}

/* Reads what was described into memory of its own. */
static void read_placed(tprpc_pipe *pipe, const tprpc_message *descriptor) {
    tprpc_tensor tensors[64];
    tprpc_payload payloads[64];
    tprpc_message to;
    size_t total = 0, at = 0;
    memset(&to, 0, sizeof to);
    if (descriptor->tensor_count > 64 || descriptor->payload_count > 64) return;
    for (size_t i = 0; i < descriptor->tensor_count; i++) total += descriptor->tensors[i].size;
    for (size_t i = 0; i < descriptor->payload_count; i++) total += descriptor->payloads[i].size;
    if (total > 4 << 20) return;
    uint32_t number = operation_begin(total + 1);
    for (size_t i = 0; i < descriptor->tensor_count; i++) {
        tensors[i] = descriptor->tensors[i];
        tensors[i].data = live.policy & 8 ? NULL : operations[number].memory + at;
        tensors[i].device.kind = TPRPC_CPU;
        at += tensors[i].size;
    }
    for (size_t i = 0; i < descriptor->payload_count; i++) {
        payloads[i] = descriptor->payloads[i];
        payloads[i].data = operations[number].memory + at;
        at += payloads[i].size;
    }
    to.tensors = tensors;
    to.tensor_count = descriptor->tensor_count;
    to.payloads = payloads;
    to.payload_count = descriptor->payload_count;
    operation_status(number, tprpc_pipe_read(pipe, &to, user_read, (void *)(uintptr_t)number));
}

static tprpc_pipe *described_pipe;     /* of whose message a descriptor is shown; pipes close in callbacks too */

static void user_described(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL));
    operation_end(user);
    if (status != TPRPC_OK) return;
    look(message);
    bool there = false;
    for (uint32_t i = 0; i < live.pipe_count; i++) there |= live.pipes[i] == described_pipe;
    if (!there || operation_count > OPERATIONS - 64) return;
    if ((live.policy & 3) == 1) {
        uint32_t number = operation_begin(0);
        operation_status(number, tprpc_pipe_read(described_pipe, NULL, user_read, (void *)(uintptr_t)number));
    } else if ((live.policy & 3) == 2) {
        read_placed(described_pipe, message);
    } else if ((live.policy & 7) == 7) {
        for (uint32_t i = 0; i < live.pipe_count; i++)
            if (live.pipes[i] == described_pipe) live.pipes[i] = live.pipes[--live.pipe_count];
        tprpc_pipe_close(described_pipe);
    }
}

static void user_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL) && (pipe != NULL) == (status == TPRPC_OK));
    operation_end(user);
    if (!pipe) return;
    if (live.pipe_count < 4) live.pipes[live.pipe_count++] = pipe;
    else tprpc_pipe_close(pipe);
}

static void user_accepts(void) {
    uint32_t number = operation_begin(0);
    operation_status(number, tprpc_accept(live.listener, user_accepted, (void *)(uintptr_t)number));
}

/* A message of the user's: with bytes of a block that is lent, or copied. */
static void user_message(tprpc_message *message, tprpc_tensor *tensors, tprpc_payload *payloads, uint8_t *bytes,
                         size_t size, uint8_t how) {
    memset(message, 0, sizeof *message);
    memset(tensors, 0, 3 * sizeof *tensors);
    memset(payloads, 0, 2 * sizeof *payloads);
    message->metadata = bytes;
    message->metadata_size = size < 100 ? size : 100;
    message->tensors = tensors;
    message->tensor_count = how & 3;
    message->payloads = payloads;
    message->payload_count = how >> 2 & 1;
    for (size_t i = 0; i < 3; i++) {
        tensors[i].data = bytes;
        tensors[i].size = i == 1 ? message->metadata_size : size;
    }
    payloads[0].data = bytes;
    payloads[0].size = size / 2;
}

static void user_writes(void) {
    static uint8_t own[400000];
    uint8_t how = fuzz_u8();
    size_t size = fuzz_size(sizeof own);
    tprpc_pipe *pipe = user_pipe();
    tprpc_message message;
    tprpc_tensor tensors[3];
    tprpc_payload payloads[2];
    if (!pipe) return;
    uint32_t number = operation_begin(0);
    if (how & 8) {
        uint32_t lent = operation_begin(size + 1);
        user_message(&message, tensors, payloads, operations[lent].memory, size, how);
        message.release = operation_end;
        message.release_user = (void *)(uintptr_t)lent;
    } else {
        user_message(&message, tensors, payloads, own, size, how);
    }
    operation_status(number, tprpc_pipe_write(pipe, &message, user_written, (void *)(uintptr_t)number));
}

static void user_deed_pipe(void) {
    tprpc_pipe_info info;
    char text[300];
    uint32_t number;
    tprpc_pipe *pipe = user_pipe();
    uint8_t which = fuzz_u8() % 8;
    if (which == 6 && live.listener) user_accepts();
    if (!pipe) return;
    switch (which) {
    case 0: case 1: user_writes(); break;
    case 2:
        number = operation_begin(0);
        operation_status(number, tprpc_pipe_read(pipe, NULL, user_read, (void *)(uintptr_t)number));
        break;
    case 3: case 4:
        live.policy = fuzz_u8();
        described_pipe = pipe;
        number = operation_begin(0);
        operation_status(number,
                         tprpc_pipe_read_descriptor(pipe, user_described, (void *)(uintptr_t)number));
        break;
    case 5:
        FUZZ_CHECK(tprpc_pipe_get_info(pipe, &info, sizeof info) == TPRPC_OK);
        tprpc_pipe_report(&info, text, sizeof text);
        break;
    case 7:
        for (uint32_t i = 0; i < live.pipe_count; i++)
            if (live.pipes[i] == pipe) live.pipes[i] = live.pipes[--live.pipe_count];
        tprpc_pipe_close(pipe);
        break;
    default: break;
    }
}

/* ---- the user of an agent */

static void handle_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    look(message);
    tprpc_reply(request, message);
}

static void handle_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    look(message);
    if (live.kept_count < KEPT && tprpc_request_keep(request) == TPRPC_OK) live.kept[live.kept_count++] = request;
}

static void handle_fail(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    look(message);
    look_at(tprpc_request_caller(request), 1);
    tprpc_fail(request, 3, "no");
}

static uint8_t *placed[OPERATIONS];    /* memory given by place that has not come back */
static uint32_t placed_count;

static void place_back(const void *memory) {
    for (uint32_t i = 0; i < placed_count; i++) {
        if (placed[i] != memory) continue;
        free(placed[i]);
        placed[i] = placed[--placed_count];
        return;
    }
    FUZZ_CHECK(memory == NULL && placed_count > OPERATIONS);   /* it was not given by place */
}

static tprpc_status on_place(tprpc_placement *placement, void *user) {
    size_t total = 1, at = 0;
    (void)user;
    if (live.policy & 1) return TPRPC_ERROR_MEMORY;
    for (size_t i = 0; i < placement->descriptor->tensor_count; i++) total += placement->descriptor->tensors[i].size;
    if (total > 4 << 20 || placed_count == OPERATIONS) return TPRPC_ERROR_LIMIT;
    uint8_t *memory = (uint8_t *)malloc(total);
    FUZZ_CHECK(memory != NULL);
    memset(memory, 0, total);
    placed[placed_count++] = memory;
    for (size_t i = 0; i < placement->descriptor->tensor_count; i++) {
        placement->tensors[i].data = memory + at;
        at += placement->tensors[i].size;
    }
    placement->cookie = memory;
    return TPRPC_OK;
}

static void on_unplaced(const tprpc_placement *placement, void *user) {
    (void)user;
    place_back(placement->cookie);
}

/* The memory that was placed begins with the first tensor. */
static void handle_place(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    look(message);
    const void *memory = message->tensor_count ? message->tensors[0].data : NULL;
    tprpc_reply(request, NULL);
    if (memory) place_back(memory);
}

static void call_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    FUZZ_CHECK((status == TPRPC_OK) == (error == NULL));
    if (reply) look(reply);
    if (reply && operations[(uintptr_t)user].places && reply->tensor_count) place_back(reply->tensors[0].data);
    operation_end(user);
}

static void user_calls(void) {
    static uint8_t own[400000];
    uint8_t how = fuzz_u8();
    size_t size = fuzz_size(sizeof own);
    tprpc_message message;
    tprpc_tensor tensors[3];
    tprpc_payload payloads[2];
    tprpc_call_options options;
    tprpc_future future = {NULL, 0};
    memset(&options, 0, sizeof options);
    uint32_t number = operation_begin(0);
    user_message(&message, tensors, payloads, own, size, how & 3);
    if (how & 8) {
        uint32_t lent = operation_begin(size + 1);
        user_message(&message, tensors, payloads, operations[lent].memory, size, how & 3);
        message.release = operation_end;
        message.release_user = (void *)(uintptr_t)lent;
    }
    options.on_done = call_done;
    options.user = (void *)(uintptr_t)number;
    options.timeout_ms = how & 16 ? 1 + fuzz_u8() : 0;
    options.lane = how >> 5 & 1;
    if (how & 4) {
        options.place = on_place;
        options.on_unplaced = on_unplaced;
        operations[number].places = true;
    }
    options.flags = how & 64 ? TPRPC_CALL_ONE_WAY : 0;
    if (options.flags) options.on_done = NULL;
    tprpc_status status = tprpc_call(live.agent, how & 128 ? "nobody" : "evil", "echo", &message, &options,
                                     live.future_count < KEPT ? &future : NULL);
    if (status == TPRPC_OK && options.flags) operation_end((void *)(uintptr_t)number);
    else operation_status(number, status);
    if (future.id) live.futures[live.future_count++] = future;
}

static void user_deed_agent(void) {
    char text[300];
    tprpc_stats stats;
    tprpc_error error;
    const uint8_t which = fuzz_u8() % 8;
    switch (which) {
    case 0: case 1: user_calls(); break;
    case 2:
        if (live.kept_count) tprpc_reply(live.kept[--live.kept_count], NULL);
        break;
    case 3:
        if (live.kept_count) {
            look_sum += tprpc_request_cancelled(live.kept[live.kept_count - 1]);
            if (tprpc_request_message(live.kept[live.kept_count - 1]))
                look(tprpc_request_message(live.kept[live.kept_count - 1]));
            tprpc_fail(live.kept[--live.kept_count], 1, "kept too long");
        }
        break;
    case 4:
        if (live.future_count) tprpc_future_cancel(live.futures[live.future_count - 1]);
        break;
    case 5:
        if (live.future_count) {
            tprpc_future future = live.futures[--live.future_count];
            if (tprpc_future_reply(future)) look(tprpc_future_reply(future));
            tprpc_future_error(future, &error);
            tprpc_future_release(future);
        }
        break;
    case 6:
        tprpc_agent_report(live.agent, text, sizeof text);
        tprpc_agent_prometheus(live.agent, text, sizeof text);
        FUZZ_CHECK(tprpc_agent_get_stats(live.agent, &stats, sizeof stats) == TPRPC_OK);
        break;
    case 7: live.policy = fuzz_u8(); break;
    default: break;
    }
}

static void agent_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply; (void)error;
    *(int *)user = status == TPRPC_OK ? 1 : -1;
}

static void agent_begin(void) {
    static const tprpc_method_desc methods[] = {
        {"echo", handle_echo, NULL, NULL, NULL, 0}, {"keep", handle_keep, NULL, NULL, NULL, 0},
        {"fail", handle_fail, NULL, NULL, NULL, 0}, {"place", handle_place, on_place, on_unplaced, NULL, 0},
    };
    tprpc_store_desc store;
    tprpc_agent_desc desc;
    int ready = 0;
    memset(&store, 0, sizeof store);
    memset(&desc, 0, sizeof desc);
    store.url = "local://";
    FUZZ_CHECK(tprpc_store_open(live.ctx, &store, &live.store, NULL) == TPRPC_OK);
    if (live.role == CALLS) {
        static tpr_wire_worker worker;
        uint8_t value[1400];
        memset(&worker, 0, sizeof worker);
        snprintf(worker.name, sizeof worker.name, "evil");
        worker.address_count = 1;
        snprintf(worker.addresses[0], sizeof worker.addresses[0], "%s", ear_names[FUZZ_SHM]);
        size_t size = tpr_wire_put_worker(value, sizeof value, &worker);
        FUZZ_CHECK(tprpc_store_set(live.store, "tprpc/name/evil", value, size, NULL, NULL) == TPRPC_OK);
    }
    desc.context = live.ctx;
    desc.name = "live";
    desc.store = live.store;
    FUZZ_CHECK(tprpc_agent_create(&desc, &live.agent, NULL) == TPRPC_OK);
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++)
        FUZZ_CHECK(tprpc_agent_register(live.agent, &methods[i], NULL) == TPRPC_OK);
    FUZZ_CHECK(tprpc_agent_start(live.agent, agent_ready, &ready, NULL) == TPRPC_OK);
    for (int i = 0; i < 20 && !ready; i++) turn(1);
    FUZZ_CHECK(ready == 1);
}

/* ---- the whole */

static void live_begin(int role, const char *transports) {
    memset(&live, 0, sizeof live);
    live.role = role;
    live.ctx = fuzz_context(transports);
    if (role == LISTENS) {
        const char *addresses[] = {FUZZ_SHM ? "shm://" : "tcp://127.0.0.1:0"};
        tprpc_listener_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.addresses = addresses;
        desc.address_count = 1;
        desc.ordered = fuzz_u8() & 1;
        FUZZ_CHECK(tprpc_listen(live.ctx, &desc, &live.listener, NULL) == TPRPC_OK);
        user_accepts();
        line_begin(FUZZ_SHM, 0);
    } else if (role == CONNECTS) {
        tprpc_pipe_desc desc;
        memset(&desc, 0, sizeof desc);
        desc.address = ear_names[FUZZ_SHM];
        desc.ordered = fuzz_u8() & 1;
        FUZZ_CHECK(tprpc_connect(live.ctx, &desc, &live.pipes[live.pipe_count++], NULL) == TPRPC_OK);
        turn(1);
        line_begin(FUZZ_SHM, 0);
    } else {
        agent_begin();
        if (role == SERVES) line_begin(FUZZ_SHM, 0);
    }
}

static void shake_hands(void) {
    bool before = polite;
    polite = true;
    if (live.role == CALLS && now->fd < 0) {
        user_calls();
        turn(3);
        line_begin(FUZZ_SHM, 0);
    }
    if (live.role == LISTENS || live.role == SERVES) say_hello(0);
    for (int i = 0; i < TURNS && !known.open; i++) {
        turn(1);
        for (int k = 0; k < LINES; k++) hear(&lines[k]);
    }
    turn(1);
    polite = before;
}

/* A lane on a line of its own, asked for as it should be, but for what is changed of it. */
static void lane_deed(void) {
    const uint8_t how = fuzz_u8();
    const bool asks = live.role == LISTENS || live.role == SERVES, before = polite;
    if (!asks) {
        say_lane(TPR_WIRE_WANT, 2);
        turn(1);
    }
    line_begin(FUZZ_SHM, 0);
    if (asks) say_lane(TPR_WIRE_LANE, how);
    polite = !(how & 64);
    for (int i = 0; i < 3; i++) {
        turn(1);
        hear(now);
    }
    polite = before;
}

/* Writes into the shared memory, now or at a moment to come. */
static void scribble_deed(void) {
    uint8_t where = fuzz_u8(), how = fuzz_u8();
    if (!now->shared) return;
    uint8_t *at = now->shared;
    if (where & 1) at = now->last + (fuzz_u8() & (where & 16 ? 255 : 31));   /* of a frame's heads, mostly */
    else if (where & 2) at += fuzz_below(sizeof(tpr_shm_end) * 2);
    else if (where & 4) at = now->tx + (now->tx_pos & (now->ring - 1));
    else if (where & 8) at = now->rx + (now->rx_pos & (now->ring - 1));
    else at += fuzz_u32() % now->shared_size;
    if (at > now->shared + now->shared_size - 8) return;
    if (how & 1) {
        scribble.at = at;
        scribble.value = fuzz_u8();
        scribble.after = 1 + (how >> 2);
        return;
    }
    uint64_t value = fuzz_number();
    if (how & 2) memcpy(at, &value, 8);
    else memcpy(at, &value, 4);
}

/* A descriptor of any kind, to be passed. */
static int open_kind(uint32_t kind) {
    int ends[2] = {-1, -1}, fd = -1;
    switch (kind % 9) {
    case 0: case 1: (void)!pipe2(ends, O_CLOEXEC | O_NONBLOCK); break;
    case 2: (void)!socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends); break;
    case 3: case 4:
        fd = memfd_create("passed", MFD_CLOEXEC | MFD_ALLOW_SEALING);
        if (fd >= 0) (void)!ftruncate(fd, 1 << 16);
        if (fd >= 0 && kind % 9 == 4) fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL);
        return fd;
    case 5: return open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    case 6: return open("/dev/null", O_RDWR | O_CLOEXEC);
    case 7: return fcntl(now->fd, F_DUPFD_CLOEXEC, 3);      /* the stranger's end of the very socket */
    default: return fcntl(0, F_DUPFD_CLOEXEC, 3);
    }
    fd = kind % 9 == 1;
    if (ends[!fd] >= 0) close(ends[!fd]);
    return ends[fd];
}

/* Into the socket beside the memory: bytes, and descriptors that are announced there or not. A frame may say that it
   comes with as many, or with fewer or more. */
static void socket_deed(void) {
    uint8_t bytes[4], count = fuzz_u8() % 12;
    int fds[16];
    size_t size = 1 + fuzz_below(4), opened = 0;
    if (!now->shm || now->fd < 0) return;
    for (size_t i = 0; i < size; i++) bytes[i] = fuzz_u8() & 15;
    const uint8_t how = fuzz_u8();
    if (how & 1) bytes[0] = count;
    if (how & 2) size = 1;
    const uint32_t kind = count ? fuzz_u8() : 0;            /* of the first; the others' follow from it, too */
    while (opened < count && (fds[opened] = open_kind(kind + (uint32_t)opened * (kind >> 4))) >= 0) opened++;
    line_raw(now, bytes, size, fds, opened);
    for (size_t i = 0; i < opened; i++) close(fds[i]);
    if (!(how & 4)) return;
    announced = how & 8 ? count : (uint8_t)(how >> 5 & 1 ? count + 1 + (how >> 6) : count >> 1);
    if (how & 16) say_control((uint8_t)(how >> 6), pick_id(known.sending, known.sending_count));
}

static void deed(void) {
    uint8_t which = fuzz_u8();
    size_t size;
    int64_t deadline_us;
    switch (which % 32) {
    case 0: turn(1 + fuzz_below(8)); break;
    case 1:
        size = fuzz_size(300);
        { const uint8_t *bytes = fuzz_bytes(&size); say(bytes, size); }
        break;
    case 2: say_hello(fuzz_u8()); break;
    case 3: size = fuzz_u8(); say_agree(size & 128 ? fuzz_below(6) : known.step + 1, (uint8_t)(size & 127)); break;
    case 4: case 5: say_message(false); break;
    case 6: case 7: say_message(true); break;
    case 8: { uint64_t id = fuzz_below(8), at = fuzz_number(); say_data(id, at, fuzz_size(100000) + 1, fuzz_u8() & 1); }
        break;
    case 9:
        size = fuzz_u8();
        tpr_base_store_le64(frame + TPR_WIRE_HEADER, size & 1 ? fuzz_number() : known.cost);
        say_frame(TPR_WIRE_CREDIT, size & 2 ? fuzz_below(16) : 8, 0);
        break;
    case 10: { uint8_t kind = fuzz_u8() & 3; say_control(kind, pick_id(known.sending, known.sending_count)); } break;
    case 11: {
        tpr_wire_writer w = frame_body();
        tpr_wire_write_bye(&w, (tprpc_status)fuzz_below(24), "good bye");
        say_frame(TPR_WIRE_BYE, body_size(&w), 0);
        break;
    }
    case 12: {
        uint8_t kind = fuzz_u8() % (TPR_WIRE_LOST + 1);
        size = fuzz_size(200);
        const uint8_t *bytes = fuzz_bytes(&size);
        if (size) memcpy(frame + TPR_WIRE_HEADER, bytes, size);
        say_frame(kind, size, fuzz_u8() & 3);
        break;
    }
    case 13:
        tpr_wire_put_frame(frame, (uint32_t)fuzz_number(), fuzz_u8() % (TPR_WIRE_LOST + 1), fuzz_u8() & 7, fuzz_u8() & 3);
        say(frame, TPR_WIRE_HEADER);
        break;
    case 14: case 15: for (int i = 0; i < LINES; i++) hear(&lines[i]); break;
    case 16: fuzz_now_us += (int64_t)1 << fuzz_below(26); turn(1); break;
    case 17: case 18: shake_hands(); break;
    case 19: { uint8_t how = fuzz_u8(); line_begin(how & 1, how & 2 ? fuzz_u8() : 0); } break;
    case 20:
        size = fuzz_u8();
        if (size & 1 && now->fd >= 0) shutdown(now->fd, SHUT_WR);
        else line_close(now, size & 2);
        break;
    case 21: now = &lines[fuzz_below(LINES)]; break;
    case 22: case 23: if (live.agent) user_deed_agent(); else user_deed_pipe(); break;
    case 24:
        size = fuzz_u8();
        cut = size & 1 ? fuzz_u8() : 0;
        fuzz_piece = size & 2 ? 1 + fuzz_u8() : 0;
        if (size & 4) polite = size & 8;
        if (size & 16) fuzz_alloc_fails = 1 + fuzz_u8();
        if (size & 32) say_move(size & 64 ? TPR_WIRE_MOVE : TPR_WIRE_MOVED, size & 128);
        break;
    case 25: say_bulk(1 + fuzz_size(200000)); break;
    case 26: scribble_deed(); break;
    case 27: socket_deed(); break;
    case 28: say_flood(); break;
    case 31: lane_deed(); break;
    case 30: { uint8_t kind = (uint8_t)(TPR_WIRE_LANE + fuzz_u8() % 4); say_lane(kind, fuzz_u8()); } break;
    default: look_sum += tprpc_context_arm(live.ctx, &deadline_us); break;
    }
}

static void live_end(uint8_t how) {
    fuzz_alloc_fails = 0;
    if (how & 1) for (int i = 0; i < LINES; i++) line_close(&lines[i], true);
    if (how & 2) turn(3);
    if (how & 4) while (live.pipe_count) tprpc_pipe_close(live.pipes[--live.pipe_count]);
    if ((how & 8) && live.listener) tprpc_listener_close(live.listener);
    if (how & 16) turn(3);
    while (live.future_count) tprpc_future_release(live.futures[--live.future_count]);
    if (live.agent) FUZZ_CHECK(tprpc_agent_destroy(live.agent) == TPRPC_OK);
    FUZZ_CHECK(tprpc_context_destroy(live.ctx) == TPRPC_OK);
    for (int i = 0; i < LINES; i++) line_close(&lines[i], true);
    for (int which = 0; which < 2; which++)
        for (int fd; (fd = accept4(ears[which], NULL, NULL, SOCK_CLOEXEC)) >= 0;) close(fd);
}

static void fuzz_one(void) {
    ear_of(0);
    ear_of(1);
    const int fds = fuzz_count_fds();
    uint8_t how = fuzz_u8(), end = fuzz_u8();
    memset(&known, 0, sizeof known);
    memset(&proofs, 0, sizeof proofs);
    memset(&scribble, 0, sizeof scribble);
    operation_count = 0;
    cut = 0;
    placed_count = 0;
    next_bulk = 0;
    polite = false;
    announced = 0;
    now = &lines[0];
    for (int i = 0; i < LINES; i++) {
        lines[i].fd = -1;
        lines[i].shared = NULL;
        lines[i].have = lines[i].skip = 0;
    }
    live_begin(how & 3, how & 4 ? "shm,tcp" : FUZZ_SHM ? "shm" : "tcp");
    if (how & 8) shake_hands();
    for (int i = 0; i < DEEDS && fuzz_left() && operation_count < OPERATIONS - 200; i++) deed();
    live_end(end);
    for (uint32_t i = 0; i < operation_count; i++) FUZZ_CHECK(operations[i].ended);
    FUZZ_CHECK(placed_count == 0);
    FUZZ_CHECK(fuzz_count_fds() == fds);
}
