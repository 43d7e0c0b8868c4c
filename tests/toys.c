/* A transport, a channel and a converter of a user's (toys.h), in use: through the public header alone. Compiled as C99
   here and as C++11 by toys_cpp.cpp. */
#include "toys_use.h"

/* ---- pipes over the toy transport ---- */

static const size_t sizes[] = {0, 1, 7, 4097, 8192, 8193, 65536, 65537, BIG};

static void look_payloads(const tprpc_message *message, void *arg) {
    size_t i;
    (void)arg;
    CHECK_EQ_INT(message->payload_count, COUNT(sizes));
    for (i = 0; i < message->payload_count; i++) {
        CHECK_EQ_INT(message->payloads[i].size, sizes[i]);
        CHECK(filled(message->payloads[i].data, sizes[i], TOY_CAST(unsigned, i)));
    }
    CHECK_EQ_INT(message->metadata_size, 5);
    CHECK_MEM(message->metadata, "hello", 5);
}

/* Payloads of all sizes, `rounds` times there and back at once. */
static void exchange_payloads(world *w, int rounds) {
    tprpc_payload payloads[COUNT(sizes)];
    tprpc_message message;
    outcome written[2][8];
    seen got[2][8];
    size_t i;
    int side, round;
    memset(payloads, 0, sizeof payloads);
    memset(&message, 0, sizeof message);
    memset(written, 0, sizeof written);
    memset(got, 0, sizeof got);
    for (i = 0; i < COUNT(sizes); i++) {
        payloads[i].data = bytes_new(sizes[i]);
        payloads[i].size = sizes[i];
        fill(payloads[i].data, sizes[i], TOY_CAST(unsigned, i));
    }
    message.metadata = "hello";
    message.metadata_size = 5;
    message.payloads = payloads;
    message.payload_count = COUNT(sizes);
    for (round = 0; round < rounds; round++) {
        for (side = 0; side < 2; side++) {
            got[side][round].look = look_payloads;
            REQUIRE_EQ_INT(tprpc_pipe_read(w->pipe[side], NULL, on_seen, &got[side][round]), TPRPC_OK);
            REQUIRE_EQ_INT(tprpc_pipe_write(w->pipe[side], &message, on_written, &written[side][round]), TPRPC_OK);
        }
    }
    for (i = 0; i < COUNT(sizes); i++) {     /* it was copied */
        memset(payloads[i].data, 0xEE, sizes[i]);
        free(payloads[i].data);
    }
    for (round = 0; round < rounds; round++) {
        for (side = 0; side < 2; side++) {
            UNTIL(w, written[side][round].runs, 1);
            UNTIL(w, got[side][round].o.runs, 1);
            CHECK_EQ_INT(written[side][round].status, TPRPC_OK);
            CHECK_EQ_INT(got[side][round].o.status, TPRPC_OK);
        }
    }
}

static void check_transport(world *w, const char *name) {
    tprpc_pipe_info info;
    int i;
    for (i = 0; i < 2; i++) {
        int64_t end = deadline();
        do {                           /* one end is open a moment before the other */
            pump(w);
            REQUIRE_EQ_INT(tprpc_pipe_get_info(w->pipe[i], &info, sizeof info), TPRPC_OK);
        } while (!info.transport[0] && test_now_us() < end);
        CHECK_STR(info.transport, name);
    }
}

static void run_pipes(int threads) {
    world w;
    toys_begin(100);
    world_open(&w, "toy", NULL, "toy://", threads);
    check_transport(&w, "toy");
    exchange_payloads(&w, 6);
    world_close(&w);
    toys_end();
}

TEST(toy_pipes_polled) { run_pipes(0); }
TEST(toy_pipes_threads) { run_pipes(2); }

TEST(toy_named_address) {
    world w;
    toys_begin(100);
    world_open(&w, "toy", NULL, "toy://one", 0);
    CHECK_STR(tprpc_listener_address(w.listener, NULL), "toy://one");
    exchange_payloads(&w, 1);
    world_close(&w);
    toys_end();
}

/* The best common transport is the user's, wherever the pipe came in. */
static void run_moved(const char *address) {
    world w;
    toys_begin(100);
    world_open(&w, NULL, NULL, address, 0);
    check_transport(&w, "toy");
    exchange_payloads(&w, 2);
    world_close(&w);
    toys_end();
}

TEST(toy_moved_from_tcp) { run_moved("tcp://127.0.0.1:0"); }
TEST(toy_moved_from_shm) { run_moved("shm://"); }

/* Both contexts are driven from a poll(2) of ours on their handles alone; returns how often it slept. */
static int foreign_loop(world *w, int *counter, int least) {
    int64_t end = deadline();
    int i, slept = 0;
    while (toy_count(counter) < least) {
        struct pollfd fds[2];
        int64_t until[2];
        bool armed = true;
        REQUIRE(test_now_us() < end);
        for (i = 0; i < 2; i++) {
            armed &= tprpc_context_arm(w->ctx[i], &until[i]);
            fds[i].fd = TOY_CAST(int, tprpc_context_handle(w->ctx[i]));
            fds[i].events = POLLIN;
        }
        if (armed) REQUIRE(poll(fds, 2, 10000) > 0 || until[0] >= 0 || until[1] >= 0);
        slept += armed;
        tprpc_poll(w->ctx[0], TPRPC_NOW, 0);
        tprpc_poll(w->ctx[1], TPRPC_NOW, 0);
    }
    return slept;
}

TEST(toy_foreign_loop) {
    world w;
    tprpc_message message;
    outcome written[20];
    seen got[20];
    tprpc_payload payload;
    int i;
    toys_begin(100);
    world_open(&w, "toy", NULL, "toy://", 0);
    memset(&message, 0, sizeof message);
    memset(&payload, 0, sizeof payload);
    memset(written, 0, sizeof written);
    memset(got, 0, sizeof got);
    message.payloads = &payload;
    message.payload_count = 1;
    payload.size = 200000;
    payload.data = bytes_new(payload.size);
    fill(payload.data, payload.size, 1);
    for (i = 0; i < 20; i++) {
        REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_read, &got[i].o), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_write(w.pipe[1], &message, on_written, &written[i]), TPRPC_OK);
    }
    foreign_loop(&w, &got[19].o.runs, 1);
    for (i = 0; i < 20; i++) CHECK_EQ_INT(got[i].o.runs, 1);
    free(payload.data);
    world_close(&w);
    toys_end();
}

/* ---- tensors over the toy channel ---- */

/* CPU to device, device to CPU, device to device, in batches of one and of many, both ways at once. */
static void run_tensors(const char *transports, const char *address, int threads) {
    static const bool kinds[3][2] = {{false, true}, {true, false}, {true, true}};
    static const size_t counts[] = {1, 2, ITEMS};
    world w;
    batch *both = TOY_CAST(batch *, bytes_new(2 * sizeof(batch)));
    size_t k, c;
    int side;
    toys_begin(300);
    world_open(&w, transports, NULL, address, threads);
    for (k = 0; k < COUNT(kinds); k++) {
        for (c = 0; c < COUNT(counts); c++) {
            for (side = 0; side < 2; side++) {
                batch_fill(&both[side], kinds[k][0], kinds[k][1], counts[c], counts[c] == 2 ? BIG : 0,
                           TOY_CAST(unsigned, 10 * k + c) + TOY_CAST(unsigned, side));
                batch_write(&w, &both[side], side);
            }
            for (side = 0; side < 2; side++) batch_read(&w, &both[side], 1 - side);
            for (side = 0; side < 2; side++) {
                batch_ends(&w, &both[side], TPRPC_OK, TPRPC_OK);
                batch_check(&both[side], TOY_CAST(unsigned, 10 * k + c) + TOY_CAST(unsigned, side));
                batch_free(&both[side]);
            }
        }
    }
    CHECK(toy_count(&toy_gpu.jobs) > 0);
    free(both);
    world_close(&w);
    toys_end();
}

TEST(toy_tensors_by_handle) {
    run_tensors("toy", "toy://", 0);
    CHECK(toy_count(&toy_gpu.passed) > 0);
    CHECK(toy_count(&toy_gpu.inlined) > 0);
    CHECK_EQ_INT(toy_count(&toy_gpu.bulk), 0);
}

TEST(toy_tensors_by_bulk) {
    run_tensors("tcp", "tcp://127.0.0.1:0", 0);
    CHECK(toy_count(&toy_gpu.bulk) > 0);
    CHECK_EQ_INT(toy_count(&toy_gpu.passed), 0);
}

TEST(toy_tensors_over_shm) {
    run_tensors("shm", "shm://", 0);
    CHECK(toy_count(&toy_gpu.passed) > 0);
}

TEST(toy_tensors_threads) { run_tensors("toy", "toy://", 2); }
TEST(toy_tensors_threads_tcp) { run_tensors("tcp", "tcp://127.0.0.1:0", 1); }

/* A channel has readiness of its own: what the device has copied, late, is its to tell. */
static void run_foreign_tensors(const char *transports, const char *address) {
    world w;
    batch *b = TOY_CAST(batch *, bytes_new(sizeof(batch)));
    int slept = 0;
    toys_begin(5000);
    world_open(&w, transports, NULL, address, 0);
    batch_fill(b, true, true, 8, 70000, 1);
    batch_write(&w, b, 1);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(w.pipe[0], on_described, &b->described), TPRPC_OK);
    slept += foreign_loop(&w, &b->described.runs, 1);
    batch_takes(&w, b, 0);
    slept += foreign_loop(&w, &b->got.runs, 1);
    slept += foreign_loop(&w, &b->written.runs, 1);
    slept += foreign_loop(&w, &b->written.releases, 1);
    CHECK(slept > 0);
    CHECK_EQ_INT(b->got.status, TPRPC_OK);
    CHECK_EQ_INT(b->written.status, TPRPC_OK);
    CHECK_EQ_INT(toy_count(&toy_gpu.completed), 2);      /* of the sender, of the receiver */
    batch_check(b, 1);
    batch_free(b);
    free(b);
    world_close(&w);
    toys_end();
}

TEST(toy_foreign_loop_of_a_channel) { run_foreign_tensors("toy", "toy://"); }
TEST(toy_foreign_loop_of_a_channel_tcp) { run_foreign_tensors("tcp", "tcp://127.0.0.1:0"); }

/* Device and host tensors in one message, placed by the library: by the converter, where the sender asked. */
static void look_mixed(const tprpc_message *message, void *arg) {
    uint8_t bytes[5000];
    (void)arg;
    REQUIRE_EQ_INT(message->tensor_count, 3);
    CHECK_EQ_INT(message->tensors[0].device.kind, TPRPC_DEVICE_USER);
    CHECK_EQ_INT(message->tensors[0].device.index, 1);
    toy_gpu_get(toy_gpu.queues[1], bytes, message->tensors[0].data, 5000);
    CHECK(filled(bytes, 5000, 1));
    CHECK_EQ_INT(message->tensors[1].device.kind, TPRPC_CPU);
    CHECK(filled(message->tensors[1].data, 4000, 2));
    CHECK_EQ_INT(message->tensors[2].device.kind, TPRPC_DEVICE_USER);    /* no target: as the source */
    toy_gpu_get(toy_queue_of(message->tensors[2].device, NULL), bytes, message->tensors[2].data, 3000);
    CHECK(filled(bytes, 3000, 3));
}

TEST(toy_tensors_mixed_and_allocated) {
    world w;
    tprpc_message message;
    tprpc_tensor tensors[3];
    uint8_t bytes[3][5000];
    outcome written;
    seen got;
    unsigned i;
    toys_begin(300);
    world_open(&w, "toy", NULL, "toy://", 0);
    memset(&message, 0, sizeof message);
    memset(tensors, 0, sizeof tensors);
    memset(&written, 0, sizeof written);
    memset(&got, 0, sizeof got);
    for (i = 0; i < 3; i++) fill(bytes[i], sizeof bytes[i], i + 1);
    tensors[0].data = bytes[0];
    tensors[0].size = 5000;
    tensors[0].target = toy_device(1);
    tensors[1].data = bytes[1];
    tensors[1].size = 4000;
    tensors[2].data = toy_gpu_alloc(0, 3000);
    tensors[2].size = 3000;
    tensors[2].device = toy_device(0);
    tensors[2].stream = toy_gpu.queues[0];
    toy_gpu_put(toy_gpu.queues[0], tensors[2].data, bytes[2], 3000);
    message.tensors = tensors;
    message.tensor_count = 3;
    message.release = on_release;
    message.release_user = &written;
    got.look = look_mixed;
    REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_seen, &got), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_write(w.pipe[1], &message, on_written, &written), TPRPC_OK);
    UNTIL(&w, got.o.runs, 1);
    UNTIL(&w, written.runs, 1);
    CHECK_EQ_INT(got.o.status, TPRPC_OK);
    CHECK_EQ_INT(written.status, TPRPC_OK);
    toy_gpu_free(tensors[2].data);
    world_close(&w);
    toys_end();
}

/* "Bytes too (device memory by a copy in stream order), unless release is set." */
TEST(toy_tensor_not_lent) {
    world w;
    batch *b = TOY_CAST(batch *, bytes_new(sizeof(batch)));
    tprpc_message message;
    tprpc_status status;
    toys_begin(300);
    world_open(&w, "toy", NULL, "toy://", 0);
    batch_fill(b, true, true, 1, 100000, 5);
    memset(&message, 0, sizeof message);
    message.tensors = b->out;
    message.tensor_count = 1;
    status = tprpc_pipe_write(w.pipe[0], &message, on_written, &b->written);
    CHECK_EQ_INT(status, TPRPC_OK);
    if (status == TPRPC_OK) {
        uint8_t *other = TOY_CAST(uint8_t *, bytes_new(100000));
        memset(other, 0xEE, 100000);
        toy_gpu_put(toy_gpu.queues[0], b->from[0], other, 100000);     /* after the copy, in the queue's order */
        free(other);
        batch_read(&w, b, 1);
        UNTIL(&w, b->written.runs, 1);
        UNTIL(&w, b->got.runs, 1);
        batch_check(b, 5);
        CHECK_EQ_INT(toy_count(&toy_gpu.copied), 1);
    }
    toy_queue_free(toy_gpu.queues[0]);       /* what is queued has run: the memory may go */
    toy_gpu.queues[0] = toy_queue_new();
    batch_free(b);
    free(b);
    world_close(&w);
    toys_end();
}

/* A channel whose proof fails is not used, and the reason is shown. */
TEST(toy_proof_fails) {
    world w;
    batch *b = TOY_CAST(batch *, bytes_new(sizeof(batch)));
    tprpc_message message;
    tprpc_pipe_info info;
    uint32_t i;
    bool shown = false;
    toys_begin(100);
    toy_gpu.liar = true;
    world_open(&w, "toy", NULL, "toy://", 0);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[1], &info, sizeof info), TPRPC_OK);
    for (i = 0; i < info.path_count; i++) {
        if (strcmp(info.paths[i].name, "toychan") != 0) continue;
        shown = true;
        CHECK(!info.paths[i].chosen);
        CHECK_CONTAINS(info.paths[i].why, "proof");
    }
    CHECK(shown);
    batch_fill(b, true, false, 1, 5000, 5);
    memset(&message, 0, sizeof message);
    message.tensors = b->out;
    message.tensor_count = 1;
    message.release = on_release;
    message.release_user = &b->written;
    CHECK_EQ_INT(tprpc_pipe_write(w.pipe[1], &message, on_written, &b->written), TPRPC_ERROR_UNSUPPORTED);
    CHECK_EQ_INT(b->written.releases, 1);
    CHECK_EQ_INT(b->written.runs, 0);
    exchange_payloads(&w, 1);          /* the pipe is as before */
    toy_queue_free(toy_gpu.queues[0]);
    toy_gpu.queues[0] = toy_queue_new();
    batch_free(b);
    free(b);
    world_close(&w);
    toys_end();
}

static const bool both_user[2] = {true, true};

TEST(toy_closed_by_sender) { run_closed("toy", NULL, "toy://", both_user, 1, 0); }
TEST(toy_closed_by_receiver) { run_closed("toy", NULL, "toy://", both_user, 0, 0); }
TEST(toy_closed_by_sender_bulk) { run_closed("tcp", NULL, "tcp://127.0.0.1:0", both_user, 1, 0); }
TEST(toy_closed_by_receiver_bulk) { run_closed("tcp", NULL, "tcp://127.0.0.1:0", both_user, 0, 0); }
TEST(toy_context_of_sender_destroyed) { run_closed("toy", NULL, "toy://", both_user, 1, 1); }
TEST(toy_context_of_receiver_destroyed) { run_closed("toy", NULL, "toy://", both_user, 0, 1); }

/* A device that is not there: the message is refused, the sender told, and the pipe goes on. */
TEST(toy_refused_message) {
    world w;
    batch *b = TOY_CAST(batch *, bytes_new(sizeof(batch)));
    int by;
    for (by = 0; by < 2; by++) {
        toys_begin(300);
        world_open(&w, by ? "tcp" : "toy", NULL, by ? "tcp://127.0.0.1:0" : "toy://", 0);
        batch_fill(b, true, true, 1, 70000, 1);
        b->out[0].target = toy_device(77);
        batch_write(&w, b, 1);
        REQUIRE_EQ_INT(tprpc_pipe_read(w.pipe[0], NULL, on_read, &b->got), TPRPC_OK);
        UNTIL(&w, b->got.runs, 1);
        UNTIL(&w, b->written.runs, 1);
        CHECK_EQ_INT(b->got.status, TPRPC_ERROR_DEVICE);
        CHECK_CONTAINS(b->got.text, "77");
        CHECK_EQ_INT(b->written.status, TPRPC_ERROR_PEER);
        batch_free(b);
        exchange_payloads(&w, 1);
        world_close(&w);
        toys_end();
    }
    free(b);
}

/* ---- a channel with limits ---- */

static bool limited_moves(void *instance, tprpc_device from, tprpc_device to) {
    (void)instance;
    return from.kind == TPRPC_CPU && to.kind == TPRPC_CPU;
}

static int toy_used(void) {            /* transfers over the toys' channel */
    return toy_count(&toy_gpu.passed) + toy_count(&toy_gpu.bulk) + toy_count(&toy_gpu.inlined);
}

/* A pipe whose best channel for host memory is `table`. */
static void limited_open(world *w, tprpc_channel_table *table, const char *transports, const char *address) {
    static tprpc_backend backend;
    static const tprpc_backend *list[1];
    table->moves = limited_moves;
    backend = toyc_backend;
    backend.name = "toylim";
    backend.channel = table;
    list[0] = &backend;
    world_backends = list;
    world_backend_count = 1;
    toys_begin(100);
    world_open(w, transports, NULL, address, 0);
}

/* A message of one payload, lent, so that it goes from where it is; how many transfers of toylim it took. */
static int limited_send(world *w, uint8_t *data, size_t size, unsigned seed) {
    int used = toy_used();
    tprpc_payload payload;
    tprpc_message message, own;
    outcome written, described, got;
    uint8_t *into = TOY_CAST(uint8_t *, bytes_new(size));
    memset(&payload, 0, sizeof payload);
    memset(&message, 0, sizeof message);
    memset(&written, 0, sizeof written);
    memset(&described, 0, sizeof described);
    memset(&got, 0, sizeof got);
    fill(data, size, seed);
    payload.data = data;
    payload.size = size;
    message.payloads = &payload;
    message.payload_count = 1;
    message.release = on_release;
    message.release_user = &written;
    own = message;
    REQUIRE_EQ_INT(tprpc_pipe_write(w->pipe[1], &message, on_written, &written), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(w->pipe[0], on_described, &described), TPRPC_OK);
    UNTIL(w, described.runs, 1);
    payload.data = into;
    REQUIRE_EQ_INT(tprpc_pipe_read(w->pipe[0], &own, on_read, &got), TPRPC_OK);
    UNTIL(w, got.runs, 1);
    UNTIL(w, written.runs, 1);
    CHECK_EQ_INT(got.status, TPRPC_OK);
    CHECK_EQ_INT(written.status, TPRPC_OK);
    CHECK(filled(into, size, seed));
    free(into);
    return toy_used() - used;
}

/* Buffers that it cannot move go by the next channel: too large, of a size or at an address that is not aligned. */
static void run_limited(const char *transports, const char *address) {
    static const struct { size_t size, offset; bool fits; } cases[] = {
        {65536, 0, true}, {65536 + 64, 0, false}, {9024, 0, true}, {9000, 0, false}, {9024, 8, false},
        {9024, 64, true}, {BIG, 1, false}, {65536, 63, false}};
    tprpc_channel_table table = toyc_table;
    uint8_t *memory = NULL;
    world w;
    size_t i;
    table.max_bytes = 64 * 1024;
    table.alignment = 64;
    REQUIRE(posix_memalign(TOY_CAST(void **, TOY_CAST(void *, &memory)), 64, 2 * BIG) == 0);
    limited_open(&w, &table, transports, address);
    for (i = 0; i < 2 * COUNT(cases); i++) {
        size_t k = i % COUNT(cases);
        int used = limited_send(&w, memory + cases[k].offset, cases[k].size, TOY_CAST(unsigned, i));
        if (!CHECK_EQ_INT(used, cases[k].fits)) fprintf(stderr, "case %d\n", TOY_CAST(int, k));
    }
    world_close(&w);
    toys_end();
    free(memory);
}
TEST(toy_channel_with_limits) { run_limited("tcp", "tcp://127.0.0.1:0"); }
TEST(toy_channel_with_limits_over_shm) { run_limited("shm", "shm://"); }

static tprpc_status full_send(void *end, tprpc_transfer *transfer, const tprpc_buffer *buffers, size_t count,
                              uint8_t *descriptor, size_t *descriptor_size, tprpc_error *error) {
    (void)end; (void)transfer; (void)buffers; (void)count; (void)descriptor; (void)descriptor_size;
    return tprpc_error_set(error, TPRPC_ERROR_LIMIT, 0, "toylim: full");
}

/* What the best channel does not take goes by the next, and is counted. */
TEST(toy_channel_that_is_full) {
    tprpc_channel_table table = toyc_table;
    uint8_t *memory = TOY_CAST(uint8_t *, bytes_new(BIG));
    tprpc_pipe_info info;
    world w;
    unsigned i;
    table.send = full_send;
    limited_open(&w, &table, "shm", "shm://");
    for (i = 1; i <= 3; i++) {
        CHECK_EQ_INT(limited_send(&w, memory, BIG, i), 0);
        REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[1], &info, sizeof info), TPRPC_OK);
        CHECK_EQ_INT(info.fallbacks, i);
    }
    REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[0], &info, sizeof info), TPRPC_OK);
    CHECK_EQ_INT(info.fallbacks, 0);   /* of what it received, none was to come otherwise */
    world_close(&w);
    toys_end();
    free(memory);
}

/* The channel says up to where a buffer is better sent within the message; the manual's limits are the default and
   the sum. */
TEST(toy_channel_with_an_inline_limit) {
    static const struct { uint32_t advice; size_t within, apart; } cases[] = {
        {0, 8 << 10, (8 << 10) + 1}, {1, 1, 2}, {100, 100, 101}, {20000, 20000, 20001}, {40000, 32 << 10, (32 << 10) + 1}};
    uint8_t *memory = TOY_CAST(uint8_t *, bytes_new(BIG));
    size_t i;
    for (i = 0; i < COUNT(cases); i++) {
        tprpc_channel_table table = toyc_table;
        world w;
        table.inline_bytes = cases[i].advice;
        limited_open(&w, &table, "shm", "shm://");
        CHECK_EQ_INT(limited_send(&w, memory, cases[i].within, 1), 0);
        CHECK_EQ_INT(limited_send(&w, memory, cases[i].apart, 2), 1);
        world_close(&w);
        toys_end();
    }
    free(memory);
}

/* ---- a better transport that never opens ---- */

static int64_t mute_ahead_us;          /* atomic */
static int64_t mute_clock(void *user) {
    (void)user;                        /* slow, so that only a jump makes a time-out pass */
    return 1000000000 + test_now_us() / 1000 + __sync_fetch_and_add(&mute_ahead_us, 0);
}

static tprpc_status mute_connect(void *instance, const char *address, uint32_t lane, tprpc_conn_owner *owner,
                                 void **conn, tprpc_error *error) {
    toy_net *net = TOY_CAST(toy_net *, instance);
    toy_pair *pair = TOY_NEW(toy_pair);
    toy_conn *mine = pair ? toy_conn_new(net, pair, 0, owner, address) : NULL;
    (void)lane;
    if (!mine) {
        free(pair);
        return tprpc_error_set(error, TPRPC_ERROR_MEMORY, 0, "mute: no memory");
    }
    pair->refs = 1;
    toy_lock();
    mine->next = net->conns;
    net->conns = mine;
    toy_unlock();
    *conn = mine;
    return TPRPC_OK;
}

/* After 2 s, by the context's clock, the pipe stays where it is, opens, and says why. */
TEST(toy_never_opens) {
    static const char *const address = "tcp://127.0.0.1:0";
    tprpc_transport_table table = toy_table;
    tprpc_backend backend = toy_backend;
    const tprpc_backend *list[1];
    tprpc_context_desc desc;
    tprpc_listener_desc listening;
    tprpc_pipe_desc connecting;
    tprpc_pipe_info info;
    tprpc_error error;
    world w;
    uint32_t i;
    int k, shown = 0;
    table.connect = mute_connect;
    backend.name = "mute";
    backend.transport = &table;
    list[0] = &backend;
    toys_begin(100);
    memset(&w, 0, sizeof w);
    memset(&desc, 0, sizeof desc);
    memset(&listening, 0, sizeof listening);
    memset(&connecting, 0, sizeof connecting);
    desc.backends = list;
    desc.backend_count = 1;
    desc.transports = "mute,tcp";
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &w.ctx[0], &error), TPRPC_OK);
    desc.clock_us = mute_clock;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &w.ctx[1], &error), TPRPC_OK);
    listening.addresses = &address;
    listening.address_count = 1;
    REQUIRE_EQ_INT(tprpc_listen(w.ctx[0], &listening, &w.listener, &error), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_accept(w.listener, on_accepted, &w), TPRPC_OK);
    connecting.address = tprpc_listener_address(w.listener, NULL);
    REQUIRE_EQ_INT(tprpc_connect(w.ctx[1], &connecting, &w.pipe[1], &error), TPRPC_OK);
    for (k = 0; k < 3; k++) {
        int64_t end = test_now_us() + 30000;
        if (k == 2) end = deadline();  /* no wait in the polls: it would last a thousand times as long */
        while (test_now_us() < end && !(k == 2 && w.accepted)) {
            tprpc_poll(w.ctx[0], TPRPC_NOW, 0);
            tprpc_poll(w.ctx[1], TPRPC_NOW, 0);
        }
        if (k < 2) CHECK_EQ_INT(w.accepted, 0);
        if (k == 0) __sync_fetch_and_add(&mute_ahead_us, 1900000);     /* not yet */
        if (k == 1) __sync_fetch_and_add(&mute_ahead_us, 200000);
    }
    REQUIRE_EQ_INT(w.accepted, 1);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(w.pipe[1], &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "tcp");
    for (i = 0; i < info.path_count; i++) {
        if (strcmp(info.paths[i].name, "mute") != 0) continue;
        CHECK(!info.paths[i].chosen);
        CHECK_CONTAINS(info.paths[i].why, "in time");
        shown++;
    }
    CHECK_EQ_INT(shown, 1);
    exchange_payloads(&w, 1);
    world_close(&w);
    toys_end();
}

/* ---- agents ---- */

typedef struct called { outcome o; int handled; bool placed; void *data, *answer; tprpc_device where; } called;

static tprpc_status on_place(tprpc_placement *placement, void *user) {
    called *c = TOY_CAST(called *, user);
    CHECK_EQ_INT(placement->descriptor->tensor_count, 1);
    CHECK_EQ_INT(placement->descriptor->tensors[0].target.kind, TPRPC_DEVICE_USER);
    c->placed = true;
    c->data = toy_gpu_alloc(1, placement->descriptor->tensors[0].size);
    placement->tensors[0].data = c->data;
    placement->tensors[0].device = toy_device(1);
    placement->tensors[0].stream = toy_gpu.queues[1];
    return TPRPC_OK;
}

static void on_call(tprpc_request request, const tprpc_message *message, void *user) {
    called *c = TOY_CAST(called *, user);
    tprpc_message reply;
    tprpc_tensor tensor;
    uint8_t *bytes = TOY_CAST(uint8_t *, bytes_new(100000));
    REQUIRE_EQ_INT(message->tensor_count, 1);
    c->where = message->tensors[0].device;
    toy_gpu_get(toy_queue_of(c->where, NULL), bytes, message->tensors[0].data, 100000);
    CHECK(filled(bytes, 100000, 3));
    memset(&tensor, 0, sizeof tensor);     /* the request's own memory goes when it is answered */
    tensor.data = c->answer = toy_gpu_alloc(1, 100000);
    tensor.size = 100000;
    tensor.device = toy_device(1);
    tensor.target = toy_device(0);
    tensor.stream = toy_gpu.queues[1];
    toy_gpu_put(toy_gpu.queues[1], tensor.data, bytes, 100000);
    free(bytes);
    memset(&reply, 0, sizeof reply);
    reply.tensors = &tensor;
    reply.tensor_count = 1;
    reply.release = on_release;
    reply.release_user = &c->o;
    c->handled++;
    CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static void on_replied(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    called *c = TOY_CAST(called *, user);
    if (reply && CHECK_EQ_INT(reply->tensor_count, 1)) {
        uint8_t *bytes = TOY_CAST(uint8_t *, bytes_new(100000));
        c->where = reply->tensors[0].device;
        if (c->where.kind == TPRPC_DEVICE_USER)
            toy_gpu_get(toy_queue_of(c->where, NULL), bytes, reply->tensors[0].data, 100000);
        CHECK(filled(bytes, 100000, 3));
        free(bytes);
    }
    if (error) fprintf(stderr, "call: %s\n", error->text);
    ended(&c->o, status, error);
}

/* Two agents; a tensor of the device to one of the device there, placed by the library or by the handler's `place`. */
static void run_agents(const char *transports, bool place) {
    world w;
    tprpc_store *store;
    tprpc_agent *agents[2] = {NULL, NULL};
    tprpc_method_desc method;
    tprpc_message message;
    tprpc_call_options options;
    tprpc_error error;
    called handled, replied;
    batch *b = TOY_CAST(batch *, bytes_new(sizeof(batch)));
    int i, ready = 0;
    memset(&w, 0, sizeof w);
    memset(&handled, 0, sizeof handled);
    memset(&replied, 0, sizeof replied);
    memset(&method, 0, sizeof method);
    memset(&message, 0, sizeof message);
    memset(&options, 0, sizeof options);
    toys_begin(300);
    store = agents_create(&w, transports, NULL, agents);
    method.name = "back";
    method.handler = on_call;
    method.place = place ? on_place : NULL;
    method.user = &handled;
    REQUIRE_EQ_INT(tprpc_agent_register(agents[1], &method, &error), TPRPC_OK);
    for (i = 0; i < 2; i++) REQUIRE_EQ_INT(tprpc_agent_start(agents[i], on_ready, &ready, &error), TPRPC_OK);
    UNTIL(&w, ready, 2);
    batch_fill(b, true, true, 1, 100000, 3);
    b->out[0].target = toy_device(1);
    message.tensors = b->out;
    message.tensor_count = 1;
    message.release = on_release;
    message.release_user = &b->written;
    options.on_done = on_replied;
    options.user = &replied;
    options.error = &error;
    if (!CHECK_EQ_INT(tprpc_call(agents[0], "right", "back", &message, &options, NULL), TPRPC_OK))
        fprintf(stderr, "call: %s\n", error.text);
    else {
        UNTIL(&w, replied.o.runs, 1);
        UNTIL(&w, b->written.releases, 1);
        UNTIL(&w, handled.o.releases, 1);
        CHECK_EQ_INT(replied.o.status, TPRPC_OK);
        CHECK_EQ_INT(handled.handled, 1);
        CHECK_EQ_INT(handled.placed, place);
        CHECK_EQ_INT(handled.where.kind, TPRPC_DEVICE_USER);
        CHECK_EQ_INT(handled.where.index, 1);
        CHECK_EQ_INT(replied.where.kind, TPRPC_DEVICE_USER);
        CHECK(toy_count(&toy_gpu.prepared) > 0);      /* the agent prepares what it sends */
    }
    for (i = 0; i < 2; i++) CHECK_EQ_INT(tprpc_agent_destroy(agents[i]), TPRPC_OK);
    tprpc_store_close(store);
    for (i = 1; i >= 0; i--) CHECK_EQ_INT(tprpc_context_destroy(w.ctx[i]), TPRPC_OK);
    toy_gpu_free(handled.data);
    toy_gpu_free(handled.answer);
    batch_free(b);
    free(b);
    toys_end();
}

TEST(toy_agents_allocated) { run_agents("tcp", false); }
TEST(toy_agents_placed) { run_agents("tcp", true); }
TEST(toy_agents_over_toy) { run_agents("toy,tcp", true); }

enum { GIVEN = 3000001 };

static void on_give(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensor;
    tprpc_message reply;
    (void)message;
    memset(&tensor, 0, sizeof tensor);
    memset(&reply, 0, sizeof reply);
    tensor.data = user;
    tensor.size = GIVEN;
    reply.tensors = &tensor;
    reply.tensor_count = 1;
    if (!tprpc_request_cancelled(request)) CHECK_EQ_INT(tprpc_reply(request, &reply), TPRPC_OK);
}

static void on_given(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    if (reply && CHECK_EQ_INT(reply->tensor_count, 1) && CHECK_EQ_INT(reply->tensors[0].size, GIVEN))
        CHECK(filled(TOY_CAST(const uint8_t *, reply->tensors[0].data), GIVEN, 9));
    ended(TOY_CAST(outcome *, user), status, error);
}

/* A call that is cancelled while its answer comes in bulk, after each number of turns: what nobody wants any more is let
   go of, however the ring of the toys' connection cuts it, and the next call over the same pipe is answered. */
TEST(toy_bulk_that_is_not_wanted) {
    enum { TURNS = 60 };
    world w;
    tprpc_agent *agents[2] = {NULL, NULL};
    tprpc_method_desc method;
    tprpc_message message;
    tprpc_error error;
    uint8_t *given = TOY_CAST(uint8_t *, bytes_new(GIVEN));
    int i, turns, ready = 0, cancelled = 0;
    memset(&w, 0, sizeof w);
    memset(&method, 0, sizeof method);
    memset(&message, 0, sizeof message);
    fill(given, GIVEN, 9);
    toys_begin(0);
    tprpc_store *store = agents_create(&w, "toy,tcp", "basic", agents);
    method.name = "give";
    method.handler = on_give;
    method.user = given;
    REQUIRE_EQ_INT(tprpc_agent_register(agents[1], &method, &error), TPRPC_OK);
    for (i = 0; i < 2; i++) REQUIRE_EQ_INT(tprpc_agent_start(agents[i], on_ready, &ready, &error), TPRPC_OK);
    UNTIL(&w, ready, 2);
    for (turns = 0; turns < TURNS; turns++) {
        outcome first, second;
        tprpc_call_options options;
        tprpc_future future;
        memset(&first, 0, sizeof first);
        memset(&second, 0, sizeof second);
        memset(&options, 0, sizeof options);
        options.on_done = on_given;
        options.user = &first;
        REQUIRE_EQ_INT(tprpc_call(agents[0], "right", "give", &message, &options, &future), TPRPC_OK);
        for (i = 0; i < turns; i++) tprpc_poll(w.ctx[i % 2], TPRPC_NOW, 1);
        cancelled += tprpc_future_cancel(future) == TPRPC_OK;
        tprpc_future_release(future);
        options.user = &second;
        REQUIRE_EQ_INT(tprpc_call(agents[0], "right", "give", &message, &options, NULL), TPRPC_OK);
        UNTIL(&w, first.runs, 1);
        UNTIL(&w, second.runs, 1);
        CHECK_EQ_INT(second.status, TPRPC_OK);
    }
    CHECK(cancelled > TURNS / 4);
    for (i = 0; i < 2; i++) CHECK_EQ_INT(tprpc_agent_destroy(agents[i]), TPRPC_OK);
    tprpc_store_close(store);
    for (i = 1; i >= 0; i--) CHECK_EQ_INT(tprpc_context_destroy(w.ctx[i]), TPRPC_OK);
    free(given);
    toys_end();
}

/* ---- names and tables ---- */

TEST(unknown_names_are_refused) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.backends = toy_backends;
    desc.backend_count = COUNT(toy_backends);
    desc.channels = "basic,teleport";
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK(ctx == NULL);
    CHECK_CONTAINS(error.text, "teleport");
    CHECK_CONTAINS(error.text, "toychan");       /* what is known */
    CHECK_CONTAINS(error.text, "basic");
    desc.channels = NULL;
    desc.transports = "pigeon";
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "pigeon");
    CHECK_CONTAINS(error.text, "toy");
    desc.transports = "toy,basic";               /* a channel is no transport */
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    desc.transports = "toy,";
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    desc.transports = "toy";
    desc.channels = "toychan";
    desc.backend_count = 0;                      /* the user's are not there: not known either */
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK(ctx == NULL);
}

static void refuse(tprpc_backend backend, const char *part) {
    const tprpc_backend *list = &backend;
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.backends = &list;
    desc.backend_count = 1;
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(error.status, TPRPC_ERROR_INVALID);
    CHECK(strlen(error.text) > 10);
    CHECK_CONTAINS(error.text, part);
    CHECK(ctx == NULL);
    if (ctx) tprpc_context_destroy(ctx);
}

TEST(wrong_tables_are_refused) {
    tprpc_transport_table transport = toy_table;
    tprpc_channel_table channel = toyc_table;
    tprpc_converter_table converter = toyd_table;
    tprpc_backend b = toy_backend;
    b.size -= 8;
    refuse(b, "toy");
    b = toy_backend;
    b.size = 0;
    refuse(b, "toy");
    b = toy_backend;
    b.version = TPRPC_VERSION + 10000;
    refuse(b, "version");
    b = toy_backend;
    b.channel = &toyc_table;                     /* two tables */
    refuse(b, "toy");
    b = toy_backend;
    b.transport = NULL;                          /* none */
    refuse(b, "toy");
    transport.size -= 8;
    b = toy_backend;
    b.transport = &transport;
    refuse(b, "size");
    channel.size += 8;
    b = toyc_backend;
    b.channel = &channel;
    refuse(b, "size");
    channel = toyc_table;
    channel.max_descriptor = 4097;
    b.channel = &channel;
    refuse(b, "4096");
    refuse(b, "max_descriptor");
    converter.size = 0;
    b = toyd_backend;
    b.converter = &converter;
    refuse(b, "size");
    b = toy_backend;
    b.name = "";
    refuse(b, "name");
    b.name = "a_name_of_16_byt";
    refuse(b, "name");
    b.name = "a,b";
    refuse(b, "comma");
    b.name = NULL;
    refuse(b, "name");
    b.name = "tcp";                              /* one that the library has */
    refuse(b, "tcp");
}

TEST(a_backend_twice_is_refused) {
    const tprpc_backend *list[2] = {&toy_backend, &toy_backend};
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.backends = list;
    desc.backend_count = 2;
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "toy");
}
