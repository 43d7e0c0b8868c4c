/* A worker that is busy: it makes calls of every kind to its peers and serves theirs, and keeps a ledger. Every call
   ends once, every lent buffer and every place comes back once, and bytes are as they were sent. */
#ifndef TPRPC_TESTS_BUSY_H
#define TPRPC_TESTS_BUSY_H

#include "agent_help.h"

enum { BUSY_OPS = 12, BUSY_PLACES = 24, BUSY_KEPT = 8, BUSY_LANES = 2, BUSY_PEERS = 64 };
enum { BUSY_SMALL, BUSY_LENT, BUSY_PLACED, BUSY_ONE_WAY, BUSY_LANE, BUSY_LATE, BUSY_KINDS };

static const char *const busy_methods[BUSY_KINDS] = {"echo", "echo", "place", "sink", "lane", "late"};

/* ---- bytes that can be told: windows of one random page, each block of a buffer another ---- */

enum { BUSY_BLOCK = 16 << 10, BUSY_PAGE = 2 * BUSY_BLOCK };
static uint8_t busy_page[BUSY_PAGE];

static inline uint32_t busy_below(uint64_t *state, uint32_t bound) {
    return (uint32_t)(test_random(state) >> 32) % bound;
}

static inline const uint8_t *busy_window(uint64_t id, size_t at) {
    uint64_t state = id * 31 + at / BUSY_BLOCK;
    if (!busy_page[0]) {
        uint64_t page = 1;
        for (size_t i = 0; i < sizeof busy_page; i++) busy_page[i] = (uint8_t)(test_random(&page) | 1);
    }
    return busy_page + busy_below(&state, BUSY_BLOCK);
}

static inline void busy_fill(void *out, size_t size, uint64_t id) {
    for (size_t at = 0; at < size; at += BUSY_BLOCK)
        memcpy((uint8_t *)out + at, busy_window(id, at), size - at < BUSY_BLOCK ? size - at : BUSY_BLOCK);
}

static inline bool busy_filled(const void *in, size_t size, uint64_t id) {
    for (size_t at = 0; at < size; at += BUSY_BLOCK)
        if (memcmp((const uint8_t *)in + at, busy_window(id, at), size - at < BUSY_BLOCK ? size - at : BUSY_BLOCK) != 0)
            return false;
    return true;
}

/* ---- the worker ---- */

typedef struct busy_note { uint64_t id, size; uint32_t from, lane, number, life; } busy_note;   /* a call's body */

typedef struct busy_op {               /* a call begun here; `parts` of it are still to come: outcome, release, place */
    struct busy *of;
    busy_note note;
    int kind, peer, taken, parts, outcomes, releases, places, unplaces;
    uint8_t *out, *in;
} busy_op;

typedef struct busy_place { struct busy *of; int taken; uint8_t *memory; } busy_place;   /* of a request's tensor */

typedef struct busy {
    const char *name, *url, *transports;
    int index, threads;
    int32_t rank, world_size;
    int64_t spin_us;
    bool serves_store;
    tprpc_context *ctx;                /* NULL: busy_open makes one */
    bool shares_ctx;
    tprpc_agent *agent;
    int64_t (*clock_us)(void *);
    heap own, *heap;
    size_t largest;                    /* of a tensor's bytes */
    unsigned kinds;                    /* of calls that it makes, as bits; 0: all */
    uint64_t random, next_id;
    int64_t timeout_ms;
    int forgiving;                     /* peers may die: calls may fail because of that */
    int closing;
    void (*event)(struct busy *);      /* on every callback (default: none) */
    busy_op ops[BUSY_OPS];
    busy_place places[BUSY_PLACES];
    tprpc_request kept[BUSY_KEPT];
    int kept_count;
    pthread_mutex_t lock;              /* of `kept` */
    uint32_t life, lives[BUSY_PEERS], numbers[BUSY_PEERS][BUSY_LANES], last[BUSY_PEERS][BUSY_LANES];
    int64_t begun, good, bad, served, late, stale, moved[BUSY_KINDS];
} busy;

static inline void busy_event(busy *b) {
    if (b->event) b->event(b);
}

/* What may come of a call whose peer dies meanwhile. */
static inline bool busy_forgives(const busy *b, tprpc_status status) {
    return LOAD(&b->forgiving) && (status == TPRPC_ERROR_PEER || status == TPRPC_ERROR_UNREACHABLE ||
                                   status == TPRPC_ERROR_NO_WORKER);
}

/* ---- calls ---- */

static inline void busy_part(busy_op *op) {
    if (ADD(&op->parts, -1) == 0) STORE(&op->taken, 0);
}

static inline void busy_released(void *user) {
    busy_op *op = (busy_op *)user;
    CHECK_EQ_INT(ADD(&op->releases, 1), 1);
    memset(op->out, 0xDD, op->note.size < 64 ? op->note.size : 64);   /* who reads on reads this */
    busy_event(op->of);
    busy_part(op);
}

static inline tprpc_status busy_on_place(tprpc_placement *placement, void *user) {
    busy_op *op = (busy_op *)user;
    if (placement->descriptor->tensor_count != 1) return TPRPC_ERROR_INVALID;
    CHECK_EQ_INT(ADD(&op->places, 1), 1);
    placement->tensors[0].data = op->in;
    placement->cookie = op;
    ADD(&op->parts, 1);
    return TPRPC_OK;
}

static inline void busy_on_unplaced(const tprpc_placement *placement, void *user) {
    busy_op *op = (busy_op *)user;
    CHECK(placement->cookie == op);
    CHECK_EQ_INT(ADD(&op->unplaces, 1), 1);
    busy_event(op->of);
    busy_part(op);
}

static inline void busy_check_reply(busy_op *op, const tprpc_message *reply) {
    if (op->kind == BUSY_ONE_WAY) return;
    if (CHECK_EQ_INT(reply->metadata_size, sizeof op->note))
        CHECK_MEM(reply->metadata, &op->note, sizeof op->note);
    if (!CHECK_EQ_INT(reply->tensor_count, op->note.size != 0)) return;
    if (op->note.size == 0) return;
    CHECK_EQ_INT(reply->tensors[0].size, op->note.size);
    CHECK(busy_filled(reply->tensors[0].data, (size_t)op->note.size, op->note.id));
    if (op->kind == BUSY_PLACED) CHECK(reply->tensors[0].data == op->in);
}

static inline void busy_on_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    busy_op *op = (busy_op *)user;
    busy *b = op->of;
    CHECK_EQ_INT(ADD(&op->outcomes, 1), 1);
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (status == TPRPC_OK) {
        busy_check_reply(op, reply);
        ADD(&b->good, 1);
        ADD(&b->moved[op->kind], 1);
        if (LOAD(&op->places)) busy_part(op);
    } else {
        if (!busy_forgives(b, status)) harness_fail(__FILE__, __LINE__, "%s calls peer %d, kind %d: %s", b->name,
                                                    op->peer, op->kind, error ? error->text : "");
        ADD(&b->bad, 1);
    }
    busy_event(b);
    busy_part(op);
}

static inline busy_op *busy_free_op(busy *b) {
    for (int i = 0; i < BUSY_OPS; i++)
        if (!LOAD(&b->ops[i].taken)) return &b->ops[i];
    return NULL;
}

static inline int busy_active(busy *b) {
    int n = 0;
    for (int i = 0; i < BUSY_OPS; i++) n += LOAD(&b->ops[i].taken);
    return n;
}

/* Begins a call of some kind; false: as many as there may be are under way. */
static inline bool busy_call(busy *b, const char *worker, int peer) {
    busy_op *op = busy_free_op(b);
    tprpc_call_options options = {0};
    tprpc_message message = {0};
    tprpc_tensor tensor = {0};
    tprpc_error error = {0};
    int kind = (int)busy_below(&b->random, BUSY_KINDS);
    if (!op) return false;
    const size_t most = busy_below(&b->random, 4) ? b->largest / 16 : b->largest;
    while (b->kinds && !(b->kinds >> kind & 1)) kind = (kind + 1) % BUSY_KINDS;
    op->kind = kind;
    op->peer = peer;
    op->note.id = ++b->next_id << 8 | (uint64_t)b->index;
    op->note.from = (uint32_t)b->index;
    op->note.size = kind == BUSY_SMALL ? 0 : 1 + busy_below(&b->random, (uint32_t)most);
    op->note.life = b->life;
    op->note.lane = op->note.number = 0;
    op->outcomes = op->releases = op->places = op->unplaces = 0;
    message.metadata = &op->note;
    message.metadata_size = sizeof op->note;
    if (op->note.size) {
        busy_fill(op->out, (size_t)op->note.size, op->note.id);
        tensor = bytes_of(op->out, (size_t)op->note.size);
        message.tensors = &tensor;
        message.tensor_count = 1;
    }
    options.on_done = busy_on_done;
    options.user = op;
    options.timeout_ms = b->timeout_ms;
    options.error = &error;
    op->parts = 1;
    if (op->note.size && kind != BUSY_LATE) {
        message.release = busy_released;
        message.release_user = op;
        op->parts++;
    }
    if (kind == BUSY_ONE_WAY) options.flags = TPRPC_CALL_ONE_WAY;
    if (kind == BUSY_PLACED) {
        options.place = busy_on_place;
        options.on_unplaced = busy_on_unplaced;
    }
    if (kind == BUSY_LANE) {
        uint32_t lane = busy_below(&b->random, BUSY_LANES);
        options.lane = op->note.lane = lane + 1;
        op->note.number = ++b->numbers[peer][lane];
    }
    STORE(&op->taken, 1);
    b->begun++;
    tprpc_status status = tprpc_call(b->agent, worker, busy_methods[kind], &message, &options, NULL);
    if (status == TPRPC_OK) return true;
    if (!busy_forgives(b, status))
        harness_fail(__FILE__, __LINE__, "%s cannot call %s: %s", b->name, worker, error.text);
    CHECK_EQ_INT(LOAD(&op->releases), message.release != NULL);   /* it has run, and nothing else follows */
    CHECK_EQ_INT(LOAD(&op->outcomes), 0);
    ADD(&b->bad, 1);
    busy_part(op);
    return true;
}

/* ---- requests ---- */

static inline busy_note busy_check_request(const tprpc_message *message) {
    busy_note note = {0};
    if (CHECK_EQ_INT(message->metadata_size, sizeof note)) memcpy(&note, message->metadata, sizeof note);
    if (!CHECK_EQ_INT(message->tensor_count, note.size != 0) || note.size == 0) return note;
    CHECK_EQ_INT(message->tensors[0].size, note.size);
    CHECK(busy_filled(message->tensors[0].data, (size_t)note.size, note.id));
    return note;
}

/* An answer may come too late: the caller may have died. */
static inline void busy_answer(busy *b, tprpc_request request, const tprpc_message *message) {
    tprpc_status status = tprpc_reply(request, message);
    CHECK(status == TPRPC_OK || status == TPRPC_ERROR_INVALID);
    if (status != TPRPC_OK) ADD(&b->stale, 1);
}

static inline void busy_on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    busy *b = (busy *)user;
    busy_check_request(message);
    ADD(&b->served, 1);
    busy_event(b);
    busy_answer(b, request, message);
}

static inline void busy_on_sink(tprpc_request request, const tprpc_message *message, void *user) {
    busy *b = (busy *)user;
    (void)request;
    busy_check_request(message);
    ADD(&b->served, 1);
    busy_event(b);
}

/* A peer that began anew counts anew. A number may be missing where the caller died in the middle of its message. */
static inline void busy_on_lane(tprpc_request request, const tprpc_message *message, void *user) {
    busy *b = (busy *)user;
    busy_note note = busy_check_request(message);
    if (CHECK(note.from < BUSY_PEERS && note.lane >= 1 && note.lane <= BUSY_LANES)) {
        uint32_t *last = &b->last[note.from][note.lane - 1];
        if (b->lives[note.from] != note.life) memset(b->last[note.from], 0, sizeof b->last[note.from]);
        b->lives[note.from] = note.life;
        CHECK(note.number > *last);
        *last = note.number;
    }
    ADD(&b->served, 1);
    busy_event(b);
    busy_answer(b, request, message);
}

static inline void busy_on_late(tprpc_request request, const tprpc_message *message, void *user) {
    busy *b = (busy *)user;
    bool room;
    busy_check_request(message);
    ADD(&b->served, 1);
    pthread_mutex_lock(&b->lock);
    room = b->kept_count < BUSY_KEPT;
    if (room) {                        /* what runs while the agent leaves cannot be kept */
        tprpc_status status = tprpc_request_keep(request);
        CHECK(status == TPRPC_OK || (status == TPRPC_ERROR_INVALID && LOAD(&b->closing)));
        if (status == TPRPC_OK) b->kept[b->kept_count++] = request;
    }
    pthread_mutex_unlock(&b->lock);
    busy_event(b);
    if (!room) busy_answer(b, request, message);
}

/* Answers the oldest of those kept; false: none is. */
static inline bool busy_answer_late(busy *b) {
    tprpc_request request = {0};
    pthread_mutex_lock(&b->lock);
    if (b->kept_count) {
        request = b->kept[0];
        memmove(b->kept, b->kept + 1, (size_t)--b->kept_count * sizeof b->kept[0]);
    }
    pthread_mutex_unlock(&b->lock);
    if (!request.id) return false;
    const tprpc_message *message = tprpc_request_message(request);
    busy_answer(b, request, message);
    ADD(&b->late, 1);
    return true;
}

static inline tprpc_status busy_place_request(tprpc_placement *placement, void *user) {
    busy *b = (busy *)user;
    if (placement->descriptor->tensor_count != 1 || placement->descriptor->tensors[0].size > b->largest)
        return TPRPC_ERROR_INVALID;
    for (int i = 0; i < BUSY_PLACES; i++) {
        busy_place *place = &b->places[i];
        int none = 0;
        if (!__atomic_compare_exchange_n(&place->taken, &none, 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) continue;
        placement->tensors[0].data = place->memory;
        placement->cookie = place;
        return TPRPC_OK;
    }
    return TPRPC_OK;                   /* the library finds memory */
}

static inline void busy_unplace_request(const tprpc_placement *placement, void *user) {
    busy_place *place = (busy_place *)placement->cookie;
    if (place) CHECK_EQ_INT(ADD(&place->taken, -1), 0);
    busy_event((busy *)user);
}

static inline void busy_place_released(void *user) {
    busy_place *place = (busy_place *)user;
    memset(place->memory, 0xDD, 64);
    busy_event(place->of);
    CHECK_EQ_INT(ADD(&place->taken, -1), 0);
}

/* Lends the memory, which the request was received into, to the reply. */
static inline void busy_on_placed(tprpc_request request, const tprpc_message *message, void *user) {
    busy *b = (busy *)user;
    busy_note note = busy_check_request(message);
    tprpc_message reply = *message;
    reply.release = NULL;
    ADD(&b->served, 1);
    for (int i = 0; note.size && i < BUSY_PLACES; i++) {
        if (b->places[i].memory != message->tensors[0].data) continue;
        reply.release = busy_place_released;
        reply.release_user = &b->places[i];
    }
    busy_event(b);
    busy_answer(b, request, &reply);
}

static inline int busy_places_taken(busy *b) {
    int n = 0;
    for (int i = 0; i < BUSY_PLACES; i++) n += LOAD(&b->places[i].taken);
    return n;
}

/* ---- from open to close ---- */

static inline void busy_register(busy *b) {
    const tprpc_method_desc methods[] = {
        {"echo", busy_on_echo, NULL, NULL, NULL, 0},
        {"place", busy_on_placed, busy_place_request, busy_unplace_request, NULL, 0},
        {"sink", busy_on_sink, NULL, NULL, NULL, 0},
        {"lane", busy_on_lane, NULL, NULL, NULL, 0},
        {"late", busy_on_late, NULL, NULL, NULL, 0},
    };
    for (size_t i = 0; i < sizeof methods / sizeof methods[0]; i++) {
        tprpc_method_desc method = methods[i];
        method.user = b;
        REQUIRE_EQ_INT(tprpc_agent_register(b->agent, &method, NULL), TPRPC_OK);
    }
}

static inline void busy_new_agent(busy *b) {
    tprpc_agent_desc agent = {0};
    tprpc_error error = {0};
    agent.context = b->ctx;
    agent.name = b->name;
    agent.init_method = b->url;
    agent.serve_store = b->serves_store;
    agent.rank = b->rank;
    agent.world_size = b->world_size;
    if (tprpc_agent_create(&agent, &b->agent, &error) != TPRPC_OK) fprintf(stderr, "%s: %s\n", b->name, error.text);
    REQUIRE(b->agent != NULL);
    busy_register(b);
}

static inline void busy_open(busy *b) {
    REQUIRE_EQ_INT(pthread_mutex_init(&b->lock, NULL), 0);
    busy_window(0, 0);                 /* before there are threads */
    if (!b->shares_ctx) {
        tprpc_context_desc context = {0};
        tprpc_error error = {0};
        b->heap = &b->own;
        context.threads = b->threads;
        context.transports = b->transports;
        context.spin_us = b->spin_us;
        context.clock_us = b->clock_us;
        context.allocator.alloc = heap_alloc;
        context.allocator.free = heap_free;
        context.allocator.user = b->heap;
        if (getenv("TEST_LOG")) {
            context.log = show_log;
            context.user = (void *)(uintptr_t)b->name;
        }
        tprpc_context_create(&context, &b->ctx, &error);
        if (!b->ctx) fprintf(stderr, "%s: %s\n", b->name, error.text);
        REQUIRE(b->ctx != NULL);
    }
    for (int i = 0; i < BUSY_OPS; i++) {
        b->ops[i].of = b;
        b->ops[i].out = (uint8_t *)malloc(b->largest);
        b->ops[i].in = (uint8_t *)malloc(b->largest);
        REQUIRE(b->ops[i].out && b->ops[i].in);
    }
    for (int i = 0; i < BUSY_PLACES; i++) {
        b->places[i].of = b;
        b->places[i].memory = (uint8_t *)malloc(b->largest);
        REQUIRE(b->places[i].memory != NULL);
    }
    busy_new_agent(b);
}

static inline void busy_work(busy *b) {
    if (b->threads) test_sleep_us(100);
    else tprpc_poll(b->ctx, 1000, 0);
}

/* After it nothing is left that anybody could still use. */
static inline void busy_close(busy *b) {
    STORE(&b->closing, 1);
    CHECK_EQ_INT(tprpc_agent_destroy(b->agent), TPRPC_OK);
    b->agent = NULL;
    if (!b->shares_ctx) {
        CHECK_EQ_INT(tprpc_context_destroy(b->ctx), TPRPC_OK);
        CHECK_EQ_INT(b->heap->blocks, 0);
        CHECK_EQ_INT(b->heap->bytes, 0);
    }
    CHECK_EQ_INT(busy_active(b), 0);
    CHECK_EQ_INT(busy_places_taken(b), 0);
    CHECK_EQ_INT(b->begun, b->good + b->bad);
    for (int i = 0; i < BUSY_OPS; i++) {
        free(b->ops[i].out);
        free(b->ops[i].in);
    }
    for (int i = 0; i < BUSY_PLACES; i++) free(b->places[i].memory);
    pthread_mutex_destroy(&b->lock);
}

#endif
