/* The inside of the store section: what the agent uses of it, and its decoders on any bytes at all. */
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "harness.h"

static tprpc_context *new_context(void) {
    tprpc_context *ctx = NULL;
    REQUIRE(tprpc_context_create_for(NULL, sizeof(tprpc_context_desc), TPRPC_VERSION, &ctx, NULL) == TPRPC_OK);
    return ctx;
}

typedef struct seen { int count; tprpc_status status; tprpc_context *ctx; char value[16]; } seen;

static void on_done(tprpc_store_op *op, void *user) {
    seen *s = (seen *)user;
    CHECK(op->context == s->ctx);
    CHECK(op->context->loops[op->loop].lock.state != 0);   /* under that loop's lock */
    s->count++;
    s->status = op->status;
    if (op->value) memcpy(s->value, op->value, op->value_size);
}

static tprpc_store_op *begin(tprpc_store *store, tprpc_context *ctx, int32_t kind, const char *key, const char *value,
                             int64_t deadline_us, seen *s) {
    tprpc_store_request r = TPR_ZERO;
    tprpc_store_op *op = NULL;
    r.size = sizeof r;
    r.kind = kind;
    r.key = key;
    r.value = value;
    r.value_size = value ? strlen(value) : 0;
    r.deadline_us = deadline_us;
    s->ctx = ctx;
    CHECK_EQ_INT(tpr_store_submit(store, ctx, 0, &r, on_done, s, &op, NULL), TPRPC_OK);
    return op;
}

/* Two contexts share a local store by its pointer: what one asks for is done though the store's own is never polled. */
TEST(a_local_store_serves_two_contexts) {
    tprpc_context *home = new_context(), *other = new_context();
    tprpc_store_desc desc = {.url = "local://"};
    tprpc_store *store = NULL;
    seen get = {0}, set = {0}, late = {0}, cancelled = {0};
    REQUIRE(tprpc_store_open(home, &desc, &store, NULL) == TPRPC_OK);
    begin(store, other, TPRPC_STORE_GET, "k", NULL, TPRPC_FOREVER, &get);
    begin(store, other, TPRPC_STORE_GET, "late", NULL, tprpc_now_us(other) + 20000, &late);
    tprpc_store_op *op = begin(store, other, TPRPC_STORE_GET, "gone", NULL, TPRPC_FOREVER, &cancelled);
    for (int i = 0; i < 5; i++) tprpc_poll(other, 1000, 0);
    CHECK_EQ_INT(get.count + set.count + cancelled.count, 0);
    CHECK_EQ_INT(store->map.index.count, 3);
    tpr_store_cancel(store, op);
    tpr_store_cancel(store, op);   /* twice is once */
    CHECK_EQ_INT(store->map.index.count, 2);   /* nothing is left of a key nobody waits for */
    begin(store, other, TPRPC_STORE_SET, "k", "value", 0, &set);
    CHECK_EQ_INT(set.count, 0);   /* never inline */
    for (int i = 0; i < 200 && late.count == 0; i++) tprpc_poll(other, 1000, 0);
    CHECK_EQ_INT(get.count, 1);
    CHECK_MEM(get.value, "value", 5);
    CHECK_EQ_INT(set.status, TPRPC_OK);
    CHECK_EQ_INT(cancelled.status, TPRPC_ERROR_CANCELLED);
    CHECK_EQ_INT(late.count, 1);
    CHECK_EQ_INT(late.status, TPRPC_ERROR_TIMEOUT);
    CHECK_EQ_INT(other->loops[0].wheel.count, 0);
    CHECK_EQ_INT(store->map.index.count, 1);
    CHECK_EQ_INT(store->refs, 1);
    begin(store, other, TPRPC_STORE_GET, "x", NULL, TPRPC_FOREVER, &get);
    tprpc_store_close(store);
    for (int i = 0; i < 5; i++) tprpc_poll(other, 1000, 0);
    CHECK_EQ_INT(get.count, 2);
    CHECK_EQ_INT(get.status, TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(tprpc_context_destroy(other), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(home), TPRPC_OK);
}

/* Keys whose hashes are equal: chains of the map. */
TEST(keys_of_one_hash) {
    tprpc_context *ctx = new_context();
    tpr_store_map map = {&ctx->env.memory, {&ctx->env.memory, NULL, 0, 0}};
    tpr_base_bytes keys[3], value = {(const uint8_t *)"v", 1};
    for (int i = 0; i < 3; i++) {
        keys[i].data = (const uint8_t *)(i == 0 ? "a" : i == 1 ? "b" : "c");
        keys[i].size = 1;
    }
    for (int order = 0; order < 6; order++) {
        static const int orders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};
        tpr_store_entry *entries[3];
        for (int i = 0; i < 3; i++) {
            CHECK(tpr_store_map_write(&map, keys[i], value));
            entries[i] = tpr_store_map_find(&map, keys[i], false);
        }
        /* no collisions of 64 bits are at hand: the entries are chained under one key's hash */
        uint64_t hash = tpr_base_hash("a", 1);
        for (int i = 0; i < 3; i++) tpr_base_map_remove(&map.index, tpr_base_hash(keys[i].data, 1));
        entries[0]->next = entries[1];
        entries[1]->next = entries[2];
        entries[2]->next = NULL;
        for (int i = 0; i < 3; i++) ((char *)(entries[i] + 1))[0] = 'a';
        REQUIRE(tpr_base_map_put(&map.index, hash, entries[0]));
        for (int i = 0; i < 3; i++) {
            tpr_store_entry *entry = entries[orders[order][i]];
            tpr_base_free(map.memory, entry->value, entry->value_size, (uint32_t)TPR_STORE_TAG);
            entry->value = NULL;
            tpr_store_map_tidy(&map, entry);
            int left = 0;
            for (entry = (tpr_store_entry *)tpr_base_map_get(&map.index, hash); entry; entry = entry->next) left++;
            CHECK_EQ_INT(left, 2 - i);
        }
    }
    tpr_store_map_clear(&map);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* The decoders on copies that end where the memory ends, so that a sanitizer sees every byte read beyond. */
TEST(decoders_on_any_bytes) {
    unsigned seed = 7;
    int whole = 0, split = 0, records = 0;
    for (int round = 0; round < 300000 / TEST_SLOWDOWN; round++) {
        uint8_t good[400];
        tpr_wire_store_frame frame = TPR_ZERO;
        tpr_wire_record record;
        tpr_wire_store_hello hello;
        size_t size, length;
        frame.type = (uint8_t)(1 + round % 3);
        frame.kind = (uint8_t)(1 + round % 5);
        frame.key = tpr_store_bytes("the key", 7);
        frame.value = tpr_store_bytes("the value", (size_t)(round % 9));
        frame.expected = tpr_store_bytes("expected", (size_t)(round % 8));
        if (round % 4 == 0) {
            size = tpr_wire_record_write(frame.key, frame.value, good);
        } else {
            size = tpr_wire_store_size(&frame);
            tpr_wire_store_write(&frame, good);
        }
        for (unsigned flips = (seed = seed * 1103515245 + 12345) >> 30; flips > 0; flips--) {
            seed = seed * 1103515245 + 12345;
            good[(seed >> 8) % size] ^= (uint8_t)(1u << (seed >> 29));
        }
        seed = seed * 1103515245 + 12345;
        if (seed >> 31) size = (seed >> 8) % (size + 1);
        uint8_t *bytes = (uint8_t *)malloc(size ? size : 1);
        memcpy(bytes, good, size);
        if (tpr_wire_store_split(bytes, size, &length) == 1) {
            CHECK(length <= size);
            split++;
            whole += tpr_wire_store_read(bytes, length, &frame);
        }
        records += tpr_wire_record_read(bytes, size, &record) == 1;
        tpr_wire_store_read_hello(bytes, size, &hello);
        tpr_wire_store_begins(bytes, size);
        free(bytes);
    }
    CHECK(whole > 0 && split > whole && records > 0);
}

TEST(env_gives_rank_size_and_url) {
    int32_t rank = -1, size = -1;
    char url[64];
    tprpc_error error = TPR_ZERO;
    setenv("MASTER_ADDR", "::1", 1);
    setenv("MASTER_PORT", "29500", 1);
    setenv("RANK", "3", 1);
    setenv("WORLD_SIZE", "4", 1);
    CHECK_EQ_INT(tpr_store_env(&rank, &size, url, sizeof url, &error), TPRPC_OK);
    CHECK_EQ_INT(rank, 3);
    CHECK_EQ_INT(size, 4);
    CHECK_STR(url, "tcp://[::1]:29500");
    CHECK_EQ_INT(tpr_store_env(&rank, &size, url, 10, &error), TPRPC_ERROR_INVALID);
    setenv("MASTER_ADDR", "host", 1);
    CHECK_EQ_INT(tpr_store_env(NULL, NULL, url, sizeof url, &error), TPRPC_OK);
    CHECK_STR(url, "tcp://host:29500");
    setenv("WORLD_SIZE", "0", 1);
    CHECK_EQ_INT(tpr_store_env(&rank, &size, NULL, 0, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "WORLD_SIZE");
}
