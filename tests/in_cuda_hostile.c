/* The channels for GPU memory with a twin that may say anything at any time: nothing crashes, hangs or overruns, and every
   transfer ends once. Seeds are from HOSTILE_SEED on; a seed does the same each time but for the devices' pace. */
#include "cuda/load.h"
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#define TPRPC_TEST_HOOKS
#include "../tprpc.h"
#include "../tprpc_cuda.h"

enum { IDS = 6, BUFFERS = 3, SIZE = 3 << 19, DEEDS = 400, SEEDS = 6, BULKS = 64 };

typedef struct deal {                  /* a transfer */
    tpr_channel_transfer base;         /* first */
    bool live;
    int  ended;
    tprpc_buffer buffers[BUFFERS];
    size_t count;
} deal;

typedef struct stage {
    tprpc_link link;                   /* first */
    const tprpc_channel_table *table;
    tprpc_context *ctx;
    void *end;
    deal sends[IDS], receives[IDS];
    tprpc_work *taken[BULKS];
    int taken_count;
    uint64_t random;
    uint8_t *device, *host;
    int fds[3];                        /* as large as an arena, as words, as neither */
    tpr_cuda_driver_ipc handle;        /* a good one */
    int32_t process;
    bool lost;
} stage;

static uint64_t pick(stage *s, uint64_t most) { return test_random(&s->random) % most; }

static tprpc_status say(tprpc_link *link, const void *bytes, size_t size, const intptr_t *handles, size_t count) {
    (void)bytes; (void)size; (void)handles; (void)count;
    return ((stage *)(void *)link)->lost ? TPRPC_ERROR_PEER : TPRPC_OK;
}

static tprpc_status lend(tprpc_link *link, uint64_t id, uint64_t offset, const void *data, size_t size,
                         tprpc_work *taken) {
    stage *s = (stage *)(void *)link;
    (void)id; (void)offset; (void)data; (void)size;
    if (s->lost || s->taken_count == BULKS) return TPRPC_ERROR_PEER;
    s->taken[s->taken_count++] = taken;
    return TPRPC_OK;
}

static uint32_t transport(tprpc_link *link) { (void)link; return (uint32_t)TPRPC_TRANSPORT_HANDLES; }
static int32_t process(tprpc_link *link) { return ((stage *)(void *)link)->process; }

static void give_back(stage *s) {
    while (s->taken_count) tprpc_defer(s->ctx, s->taken[--s->taken_count]);
}

static void ended(tpr_channel_transfer *base, tprpc_status status, const tprpc_error *error) {
    deal *d = (deal *)(void *)base;
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    CHECK(d->live);
    d->live = false;
    d->ended++;
}

/* Device or host memory, each buffer its own part of the stage's. */
static void fill_in(stage *s, deal *d, bool sending, int k) {
    d->count = 1 + pick(s, BUFFERS);
    for (size_t i = 0; i < d->count; i++) {
        tprpc_buffer *b = &d->buffers[i];
        const bool host = s->table != &tpr_cuda_ipc_table && pick(s, 2) != 0;
        const size_t at = ((size_t)(sending ? 0 : IDS) + (size_t)k) * BUFFERS + i;
        memset(b, 0, sizeof *b);
        b->data = (host ? s->host : s->device) + at * SIZE;
        b->size = 1 + pick(s, SIZE);
        b->device.kind = host ? TPRPC_CPU : TPRPC_CUDA;
    }
}

static void begin(deal *d, int k) {
    memset(&d->base, 0, sizeof d->base);
    d->base.base.id = (uint64_t)k;
    d->base.done = ended;
    d->live = true;
}

static void begin_send(stage *s, int k) {
    uint8_t descriptor[4096];
    size_t size = sizeof descriptor;
    deal *d = &s->sends[k];
    if (d->live) return;
    fill_in(s, d, true, k);
    begin(d, k);
    if (s->table->send(s->end, &d->base.base, d->buffers, d->count, descriptor, &size, NULL) != TPRPC_OK)
        d->live = false;
}

static size_t parts(stage *s, uint8_t *out, size_t count) {
    for (size_t i = 0; i < count; i++) {
        tpr_cuda_wire_part part;
        part.export_id = pick(s, 3);
        part.from = pick(s, 4) ? 0 : test_random(&s->random);
        part.at = pick(s, 3) ? 0 : pick(s, 2 * SIZE);
        part.size = pick(s, 4) ? pick(s, 2 * SIZE) : test_random(&s->random);
        part.seq = pick(s, 8) ? pick(s, 4) : test_random(&s->random);
        part.slot = (uint32_t)pick(s, 4) ? (uint32_t)pick(s, 4) : (uint32_t)test_random(&s->random);
        part.flags = (uint32_t)pick(s, 4) & ~(uint32_t)TPR_CUDA_WIRE_PART_WAITS;   /* who waits, waits for a live peer */
        tpr_cuda_wire_write_part(out + i * TPR_CUDA_WIRE_PART, &part);
    }
    return count * TPR_CUDA_WIRE_PART;
}

static void begin_receive(stage *s, int k) {
    uint8_t descriptor[4096];
    deal *d = &s->receives[k];
    size_t size = parts(s, descriptor, pick(s, 4));
    tprpc_error error;
    if (d->live) return;
    if (pick(s, 8) == 0) size = pick(s, 100);
    fill_in(s, d, false, k);
    begin(d, k);
    if (s->table->recv(s->end, &d->base.base, d->buffers, d->count, descriptor, size, &error) != TPRPC_OK)
        d->live = false;
}

static void abort_one(stage *s, int k) {
    deal *d = pick(s, 2) ? &s->sends[k] : &s->receives[k];
    if (d->live) s->table->abort(s->end, &d->base.base, false);
}

static void hear(stage *s, int k) {
    uint8_t bytes[4096];
    intptr_t handle = s->fds[pick(s, 3)];
    tpr_cuda_wire_message message;
    size_t size = TPR_CUDA_WIRE_CONTROL;
    message.kind = 1 + (uint32_t)pick(s, 13);
    message.id = pick(s, 10) ? (uint64_t)k : test_random(&s->random);
    message.offset = pick(s, 4) ? pick(s, 3) * TPR_CUDA_ARENA_CHUNK : test_random(&s->random) >> pick(s, 60);
    message.size = pick(s, 4) ? (uint64_t)TPR_CUDA_ARENA_CHUNK : test_random(&s->random) >> pick(s, 60);
    message.place = pick(s, 3) ? pick(s, TPR_CUDA_ARENA_CHUNKS) * TPR_CUDA_ARENA_CHUNK : TPR_CUDA_WIRE_NOWHERE;
    const deal *d = message.kind == TPR_CUDA_WIRE_WANT ? &s->sends[k] : &s->receives[k];
    if (pick(s, 2) && d->live && message.size > d->buffers[0].size) message.size = d->buffers[0].size;
    if (message.kind == TPR_CUDA_WIRE_ARENA) message.size = TPR_CUDA_ARENA_SIZE;
    if (message.kind == TPR_CUDA_WIRE_WORDS) message.size = TPR_CUDA_WORD_SIZE;
    if (message.kind == TPR_CUDA_WIRE_PARTS_OF) message.size = 1 + pick(s, 4);
    if (message.kind == TPR_CUDA_WIRE_EXPORT) message.id = pick(s, 3);
    tpr_cuda_wire_write(bytes, &message);
    if (message.kind == TPR_CUDA_WIRE_PARTS_OF) size += parts(s, bytes + size, (size_t)message.size);
    if (message.kind == TPR_CUDA_WIRE_EXPORT) {
        memset(bytes + size, 0, TPR_CUDA_WIRE_EXPORT_MORE);
        if (pick(s, 2)) memcpy(bytes + size + 16, &s->handle, 64);
        size += TPR_CUDA_WIRE_EXPORT_MORE;
    }
    if (pick(s, 20) == 0) size = pick(s, sizeof bytes);
    s->table->control(s->end, bytes, size, &handle, tpr_cuda_wire_has_handle(message.kind) ? 1 : 0);
}

static void hear_bulk(stage *s, int k) {
    const uint64_t offset = pick(s, 2 * SIZE);
    const size_t size = 1 + pick(s, TPR_CUDA_ARENA_CHUNK);
    void *to = s->table->bulk(s->end, (uint64_t)k, offset, size);
    if (!to) return;
    memset(to, 0x5a, size);
    s->table->bulk_done(s->end, (uint64_t)k, offset, size);
}

static void deed(stage *s) {
    const int k = (int)pick(s, IDS);
    tpr_loop_enter(&s->ctx->loops[0]);
    switch (pick(s, 8)) {
    case 0: begin_send(s, k); break;
    case 1: begin_receive(s, k); break;
    case 2: abort_one(s, k); break;
    case 3: hear_bulk(s, k); break;
    case 4: give_back(s); break;
    default: hear(s, k); break;
    }
    tpr_loop_leave(&s->ctx->loops[0]);
    if (pick(s, 3) == 0) tprpc_poll(s->ctx, TPRPC_NOW, 0);
}

static bool all_ended(const stage *s) {
    bool all = true;
    for (int i = 0; i < IDS; i++) all &= !s->sends[i].live && !s->receives[i].live;
    return all;
}

static const tprpc_channel_table *const tables[] = {&tpr_cuda_basic_table, &tpr_cuda_xth_table, &tpr_cuda_ipc_table};

typedef struct play { int table; uint64_t seed; pid_t process; } play;

static void run_play(void *arg) {
    const play *p = (const play *)arg;
    stage s;
    tprpc_context_desc desc;
    tprpc_device zero = {TPRPC_CUDA, 0};
    tpr_cuda_device *device;
    tpr_cuda_device_guard guard;
    tpr_cuda_driver_ptr at = 0;
    setenv("STANDIN_MEMORY_MB", "256", 1);
    standin_load();
    memset(&s, 0, sizeof s);
    memset(&desc, 0, sizeof desc);
    desc.backends = tprpc_cuda_backends(&desc.backend_count);
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &s.ctx, NULL), TPRPC_OK);
    s.table = tables[p->table];
    s.random = p->seed;
    s.process = (int32_t)p->process;
    s.link.control = say;
    s.link.bulk = lend;
    s.link.transport = transport;
    s.link.process = process;
    tpr_cuda_batch_net *net = NULL;
    for (uint32_t i = 0; i < s.ctx->backend_count; i++)
        if (s.ctx->backends[i].backend->channel == s.table) net = (tpr_cuda_batch_net *)s.ctx->backends[i].instances[0];
    REQUIRE(net != NULL);
    tpr_cuda_device_set *set = net->queue->set;
    REQUIRE_EQ_INT(tpr_cuda_device_of(set, zero, &device, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tpr_cuda_device_enter(set, device, &guard, NULL), TPRPC_OK);
    REQUIRE_EQ_INT((int)set->cu->cuMemAlloc(&at, (size_t)2 * IDS * BUFFERS * SIZE), 0);
    REQUIRE_EQ_INT((int)set->cu->cuIpcGetMemHandle(&s.handle, at), 0);
    tpr_cuda_device_leave(set, &guard);
    s.device = (uint8_t *)(uintptr_t)at;
    s.host = (uint8_t *)calloc(2 * IDS * BUFFERS, SIZE);
    REQUIRE(s.host != NULL);
    s.fds[0] = tpr_cuda_os_memfd("arena", TPR_CUDA_ARENA_SIZE);
    s.fds[1] = tpr_cuda_os_memfd("words", TPR_CUDA_WORD_SIZE);
    s.fds[2] = tpr_cuda_os_memfd("neither", 4096);
    REQUIRE_EQ_INT(s.table->attach(net, &s.link, &s.end, NULL), TPRPC_OK);
    for (int i = 0; i < DEEDS; i++) deed(&s);
    tpr_loop_enter(&s.ctx->loops[0]);
    s.lost = true;
    give_back(&s);
    for (int i = 0; i < IDS; i++) {
        if (s.sends[i].live) s.table->abort(s.end, &s.sends[i].base.base, true);
        if (s.receives[i].live) s.table->abort(s.end, &s.receives[i].base.base, true);
    }
    tpr_loop_leave(&s.ctx->loops[0]);
    const int64_t end = test_now_us() + 20000000;
    while (!all_ended(&s)) {
        REQUIRE(test_now_us() < end);
        tprpc_poll(s.ctx, 1000, 0);
    }
    tpr_loop_enter(&s.ctx->loops[0]);
    s.table->detach(s.end);
    tpr_loop_leave(&s.ctx->loops[0]);
    if (p->process) kill(p->process, SIGKILL);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    for (int i = 0; i < 3; i++) close(s.fds[i]);
    free(s.host);
}

static void hostile(int table) {
    const char *from = getenv("HOSTILE_SEED");
    const uint64_t first = from ? strtoull(from, NULL, 10) : 1;
    for (uint64_t i = 0; i < SEEDS; i++) {
        play p;
        p.table = table;
        p.seed = first + i;
        p.process = fork();            /* a peer that lives, and does nothing */
        if (!p.process) for (;;) pause();
        if (!CHECK_EQ_INT(test_wait_child(test_fork_run(run_play, &p), 30), 0))
            fprintf(stderr, "HOSTILE_SEED=%llu\n", (unsigned long long)p.seed);
        kill(p.process, SIGKILL);
        waitpid(p.process, NULL, 0);
    }
}

TEST(basic_with_a_hostile_twin) { hostile(0); }
TEST(xth_with_a_hostile_twin) { hostile(1); }
TEST(ipc_with_a_hostile_twin) { hostile(2); }
