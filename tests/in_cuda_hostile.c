/* The channels for GPU memory with a twin that may say anything at any time: nothing crashes, hangs or overruns, and every
   transfer ends once. Seeds are from HOSTILE_SEED on; a seed does the same each time but for the devices' pace. */
#include "cuda/load.h"
#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#define TPRPC_TEST_HOOKS
#include "../tprpc.h"
#include "../tprpc_cuda.h"

enum { IDS = 6, BUFFERS = 3, SIZE = 3 << 19, DEEDS = 400, SEEDS = 6, BULKS = 64, KINDS = 16 };

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
    uint64_t word;                     /* of ipc, once it is there: what proves device 0 */
    int said[KINDS];                   /* how often it was, by kind; and the last */
    tpr_cuda_wire_message last[KINDS];
} stage;

static uint64_t pick(stage *s, uint64_t most) { return test_random(&s->random) % most; }

static tprpc_status say(tprpc_link *link, const void *bytes, size_t size, const intptr_t *handles, size_t count) {
    stage *s = (stage *)(void *)link;
    tpr_cuda_wire_message message;
    (void)handles;
    if (CHECK(tpr_cuda_wire_read((const uint8_t *)bytes, size, count, &message))) {
        s->said[message.kind]++;
        s->last[message.kind] = message;
    }
    return s->lost ? TPRPC_ERROR_PEER : TPRPC_OK;
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
    size_t size = TPR_CUDA_WIRE_DEVICES + parts(s, descriptor + TPR_CUDA_WIRE_DEVICES, pick(s, 4));
    tprpc_error error;
    tpr_cuda_wire_store(descriptor, pick(s, 8) ? pick(s, 4) : test_random(&s->random), TPR_CUDA_WIRE_DEVICES);
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
    message.kind = 1 + (uint32_t)pick(s, KINDS);
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
    if (message.kind == TPR_CUDA_WIRE_EXPORT && pick(s, 8)) message.place = pick(s, 3);
    if (message.kind == TPR_CUDA_WIRE_PROOF && pick(s, 8)) message.offset = pick(s, 3);
    if (message.kind == TPR_CUDA_WIRE_PROOF && pick(s, 2)) message.place = s->word;
    if (message.kind == TPR_CUDA_WIRE_PROOF && pick(s, 2)) message.size = pick(s, 2);
    if (message.kind == TPR_CUDA_WIRE_TOOK && pick(s, 2)) message.offset = TPR_CUDA_WIRE_NOWHERE;
    if (message.kind == TPR_CUDA_WIRE_TOOK && pick(s, 2)) message.size = pick(s, 4);
    tpr_cuda_wire_write(bytes, &message);
    if (message.kind == TPR_CUDA_WIRE_PARTS_OF) size += parts(s, bytes + size, (size_t)message.size);
    if (message.kind == TPR_CUDA_WIRE_EXPORT) {
        memset(bytes + size, 0, TPR_CUDA_WIRE_EXPORT_MORE);
        if (pick(s, 2)) memcpy(bytes + size + 16, &s->handle, 64);
        size += TPR_CUDA_WIRE_EXPORT_MORE;
    }
    if (message.kind == TPR_CUDA_WIRE_PROVE) {
        memcpy(bytes + size, &s->handle, TPR_CUDA_WIRE_HANDLE);
        size += TPR_CUDA_WIRE_HANDLE;
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

/* The page of device 0, when it has been written. */
static const tpr_cuda_proof_page *page_of(const stage *s) {
    const tpr_cuda_ipc_end *end = (const tpr_cuda_ipc_end *)s->end;
    return s->table == &tpr_cuda_ipc_table && end->shown && end->shown->told ? end->shown->page : NULL;
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
    if (page_of(s)) s->word = page_of(s)->words[1];
}

static bool all_ended(const stage *s) {
    bool all = true;
    for (int i = 0; i < IDS; i++) all &= !s->sends[i].live && !s->receives[i].live;
    return all;
}

static const tprpc_channel_table *const tables[] = {&tpr_cuda_basic_table, &tpr_cuda_xth_table, &tpr_cuda_ipc_table};

typedef struct play { int table; uint64_t seed; pid_t process; } play;

static int64_t later_us;               /* by how much the clock is ahead */

static int64_t clock_us(void *user) {
    (void)user;
    return test_now_us() + later_us;
}

static void stage_open(stage *s, const play *p) {
    tprpc_context_desc desc;
    tprpc_device zero = {TPRPC_CUDA, 0};
    tpr_cuda_device *device;
    tpr_cuda_device_guard guard;
    tpr_cuda_driver_ptr at = 0;
    setenv("STANDIN_MEMORY_MB", "256", 1);
    standin_load();
    memset(s, 0, sizeof *s);
    memset(&desc, 0, sizeof desc);
    desc.backends = tprpc_cuda_backends(&desc.backend_count);
    desc.clock_us = clock_us;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &s->ctx, NULL), TPRPC_OK);
    s->table = tables[p->table];
    s->random = p->seed;
    s->process = (int32_t)p->process;
    s->link.control = say;
    s->link.bulk = lend;
    s->link.transport = transport;
    s->link.process = process;
    tpr_cuda_batch_net *net = NULL;
    for (uint32_t i = 0; i < s->ctx->backend_count; i++)
        if (s->ctx->backends[i].backend->channel == s->table)
            net = (tpr_cuda_batch_net *)s->ctx->backends[i].instances[0];
    REQUIRE(net != NULL);
    tpr_cuda_device_set *set = net->queue->set;
    REQUIRE_EQ_INT(tpr_cuda_device_of(set, zero, &device, NULL), TPRPC_OK);
    REQUIRE_EQ_INT(tpr_cuda_device_enter(set, device, &guard, NULL), TPRPC_OK);
    REQUIRE_EQ_INT((int)set->cu->cuMemAlloc(&at, (size_t)2 * IDS * BUFFERS * SIZE), 0);
    REQUIRE_EQ_INT((int)set->cu->cuIpcGetMemHandle(&s->handle, at), 0);
    tpr_cuda_device_leave(set, &guard);
    s->device = (uint8_t *)(uintptr_t)at;
    s->host = (uint8_t *)calloc(2 * IDS * BUFFERS, SIZE);
    REQUIRE(s->host != NULL);
    s->fds[0] = tpr_cuda_os_memfd("arena", TPR_CUDA_ARENA_SIZE);
    s->fds[1] = tpr_cuda_os_memfd("words", TPR_CUDA_WORD_SIZE);
    s->fds[2] = tpr_cuda_os_memfd("neither", 4096);
    REQUIRE_EQ_INT(s->table->attach(net, &s->link, &s->end, NULL), TPRPC_OK);
}

static void stage_close(stage *s, const play *p) {
    tpr_loop_enter(&s->ctx->loops[0]);
    s->lost = true;
    give_back(s);
    for (int i = 0; i < IDS; i++) {
        if (s->sends[i].live) s->table->abort(s->end, &s->sends[i].base.base, true);
        if (s->receives[i].live) s->table->abort(s->end, &s->receives[i].base.base, true);
    }
    tpr_loop_leave(&s->ctx->loops[0]);
    const int64_t end = test_now_us() + 20000000;
    while (!all_ended(s)) {
        REQUIRE(test_now_us() < end);
        tprpc_poll(s->ctx, 1000, 0);
    }
    tpr_loop_enter(&s->ctx->loops[0]);
    s->table->detach(s->end);
    tpr_loop_leave(&s->ctx->loops[0]);
    if (p->process) kill(p->process, SIGKILL);
    CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_OK);
    for (int i = 0; i < 3; i++) close(s->fds[i]);
    free(s->host);
}

static void run_play(void *arg) {
    const play *p = (const play *)arg;
    stage s;
    stage_open(&s, p);
    for (int i = 0; i < DEEDS; i++) {
        if (pick(&s, 100) == 0) later_us += TPR_CUDA_PROOF_LIMIT_US / 2;
        deed(&s);
    }
    stage_close(&s, p);
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

/* ---- a twin that is to prove that it reads, or to be read ---- */

/* What it exports, where it does, and the words that its memory begins with. */
typedef struct theirs { tpr_cuda_driver_ipc handle; uint64_t words[2]; int ready; } theirs;

static theirs *shared;

static void twin_lives(void) {
    tprpc_error error;
    tpr_cuda_driver_context context;
    tpr_cuda_driver_stream stream;
    tpr_cuda_driver_ptr at = 0;
    standin_load();
    const tpr_cuda_driver *cu = tpr_cuda_driver_get(&error);
    if (!cu || cu->cuDevicePrimaryCtxRetain(&context, 0) != 0 || cu->cuCtxPushCurrent(context) != 0 ||
        cu->cuMemAlloc(&at, TPR_CUDA_PROOF_PAGE) != 0 || cu->cuIpcGetMemHandle(&shared->handle, at) != 0 ||
        cu->cuStreamCreate(&stream, (unsigned int)TPR_CUDA_DRIVER_STREAM_NON_BLOCKING) != 0) _exit(1);
    for (uint64_t i = 0; i < 2; i++) {
        shared->words[i] = 0x1234567890abcdef + i;
        cu->cuStreamWriteValue64(stream, at + 8 * i, shared->words[i], 0);
    }
    while (cu->cuStreamQuery(stream) != 0) test_sleep_us(100);
    __atomic_store_n(&shared->ready, 1, __ATOMIC_RELEASE);
    for (;;) pause();
}

static void proving(void (*run)(stage *s)) {
    play p;
    stage s;
    shared = (theirs *)mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(shared != MAP_FAILED);
    p.table = 2;
    p.seed = 1;
    p.process = fork();
    if (!p.process) twin_lives();
    const int64_t end = test_now_us() + 20000000;
    while (!__atomic_load_n(&shared->ready, __ATOMIC_ACQUIRE)) REQUIRE(test_now_us() < end);
    stage_open(&s, &p);
    run(&s);
    stage_close(&s, &p);
    waitpid(p.process, NULL, 0);
}

static tprpc_status tell(stage *s, uint32_t kind, uint64_t id, uint64_t offset, uint64_t size, uint64_t place) {
    uint8_t bytes[TPR_CUDA_WIRE_CONTROL + TPR_CUDA_WIRE_HANDLE];
    tpr_cuda_wire_message message;
    message.kind = kind;
    message.id = id;
    message.offset = offset;
    message.size = size;
    message.place = place;
    tpr_cuda_wire_write(bytes, &message);
    memcpy(bytes + TPR_CUDA_WIRE_CONTROL, &shared->handle, TPR_CUDA_WIRE_HANDLE);
    const size_t more = kind == TPR_CUDA_WIRE_PROVE ? TPR_CUDA_WIRE_HANDLE : 0;
    tpr_loop_enter(&s->ctx->loops[0]);
    const tprpc_status status = s->table->control(s->end, bytes, TPR_CUDA_WIRE_CONTROL + more, NULL, 0);
    tpr_loop_leave(&s->ctx->loops[0]);
    return status;
}

static void until_said(stage *s, uint32_t kind, int times) {
    const int64_t end = test_now_us() + 10000000;
    while (s->said[kind] < times) {
        if (!CHECK(test_now_us() < end)) return;
        tprpc_poll(s->ctx, 1000, 0);
    }
}

static deal *one_buffer(stage *s, bool sending, int k) {
    deal *d = sending ? &s->sends[k] : &s->receives[k];
    memset(d->buffers, 0, sizeof d->buffers);
    d->count = 1;
    d->buffers[0].data = s->device + (size_t)(sending ? k : k + IDS) * SIZE;
    d->buffers[0].size = SIZE;
    d->buffers[0].device.kind = TPRPC_CUDA;
    begin(d, k);
    return d;
}

/* Sends, and has the twin's page told. Returns how many bytes the descriptor has. */
static size_t send_one(stage *s, int k) {
    uint8_t descriptor[4096];
    size_t size = sizeof descriptor;
    deal *d = one_buffer(s, true, k);
    tpr_loop_enter(&s->ctx->loops[0]);
    CHECK_EQ_INT(s->table->send(s->end, &d->base.base, d->buffers, 1, descriptor, &size, NULL), TPRPC_OK);
    tpr_loop_leave(&s->ctx->loops[0]);
    CHECK_EQ_INT(tpr_cuda_wire_load(descriptor, TPR_CUDA_WIRE_DEVICES), 1);
    until_said(s, TPR_CUDA_WIRE_PROVE, 1);
    return size;
}

static void receive_one(stage *s, int k) {
    uint8_t descriptor[TPR_CUDA_WIRE_DEVICES];
    deal *d = one_buffer(s, false, k);
    tpr_cuda_wire_store(descriptor, 1, sizeof descriptor);
    tpr_loop_enter(&s->ctx->loops[0]);
    CHECK_EQ_INT(s->table->recv(s->end, &d->base.base, d->buffers, 1, descriptor, sizeof descriptor, NULL), TPRPC_OK);
    tpr_loop_leave(&s->ctx->loops[0]);
}

/* The twin is sent to as cuda_basic does. */
static void asks(stage *s, int k) {
    tell(s, TPR_CUDA_WIRE_WANT, (uint64_t)k, 0, SIZE, TPR_CUDA_WIRE_NOWHERE);
    const int64_t end = test_now_us() + 10000000;
    while (s->sends[k].live) {
        if (!CHECK(test_now_us() < end)) return;
        tprpc_poll(s->ctx, 1000, 0);
        give_back(s);
    }
    CHECK_EQ_INT(s->sends[k].ended, 1);
    s->sends[k].ended = 0;
}

static void right_word(stage *s) {
    CHECK_EQ_INT(send_one(s, 0), TPR_CUDA_WIRE_DEVICES);
    CHECK_EQ_INT(s->last[TPR_CUDA_WIRE_PROVE].place == page_of(s)->words[0], 1);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROOF, 0, 3, 0, page_of(s)->words[1]), TPRPC_OK);
    tell(s, TPR_CUDA_WIRE_TOOK, 0, TPR_CUDA_WIRE_NOWHERE, 1 << 3, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_PARTS_OF], 1);
    CHECK_EQ_INT(send_one(s, 1), TPR_CUDA_WIRE_DEVICES + TPR_CUDA_WIRE_PART);   /* at once */
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_PROVE], 1);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_ASK], 0);
    CHECK_STR(s->link.why, "");
}

/* Another word, the one that it was told, an error: no parts, now or later. */
static void no_word(stage *s, uint64_t size, uint64_t place, const char *why) {
    CHECK_EQ_INT(send_one(s, 0), TPR_CUDA_WIRE_DEVICES);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROOF, 0, 3, size, place), TPRPC_OK);
    CHECK_CONTAINS(s->link.why, why);
    tell(s, TPR_CUDA_WIRE_TOOK, 0, TPR_CUDA_WIRE_NOWHERE, 1 << 3, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_ASK], 1);
    asks(s, 0);
    tell(s, TPR_CUDA_WIRE_PROOF, 0, 3, 0, page_of(s)->words[1]);   /* it has lost its chance */
    CHECK_EQ_INT(send_one(s, 1), TPR_CUDA_WIRE_DEVICES);
    tell(s, TPR_CUDA_WIRE_TOOK, 1, TPR_CUDA_WIRE_NOWHERE, 1 << 3, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_ASK], 2);
    asks(s, 1);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_PARTS_OF], 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_EXPORT], 0);
}

static void wrong_word(stage *s) { no_word(s, 0, 1, "GPU 3 cannot read GPU 0 here: it read something else"); }
static void some_error(stage *s) { no_word(s, 1, 0, "GPU 3 cannot read GPU 0 here: CUDA_ERROR_INVALID_VALUE"); }

/* One device has proven itself, another takes. And what was never to be proven cannot be. */
static void other_device(stage *s) {
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROOF, 0, 0, 0, 0), TPRPC_ERROR_PROTOCOL);
    send_one(s, 0);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROOF, 0, 3, 0, page_of(s)->words[1]), TPRPC_OK);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROOF, 1, 3, 0, page_of(s)->words[1]), TPRPC_ERROR_PROTOCOL);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROOF, 0, 64, 0, page_of(s)->words[1]), TPRPC_ERROR_PROTOCOL);
    tell(s, TPR_CUDA_WIRE_TOOK, 0, TPR_CUDA_WIRE_NOWHERE, 3 << 3, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_ASK], 1);
    asks(s, 0);
}

static void no_devices(stage *s) {
    send_one(s, 0);
    tell(s, TPR_CUDA_WIRE_TOOK, 0, TPR_CUDA_WIRE_NOWHERE, 0, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_ASK], 1);
    asks(s, 0);
}

static void good_page(stage *s) {
    receive_one(s, 0);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROVE, 0, 0, 0, shared->words[0]), TPRPC_OK);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROVE, 0, 0, 0, shared->words[0]), TPRPC_ERROR_PROTOCOL);
    until_said(s, TPR_CUDA_WIRE_TOOK, 1);
    CHECK(s->last[TPR_CUDA_WIRE_PROOF].place == shared->words[1]);
    CHECK_EQ_INT(s->last[TPR_CUDA_WIRE_PROOF].size, 0);
    CHECK_EQ_INT(s->last[TPR_CUDA_WIRE_TOOK].size, 1);
    receive_one(s, 1);                 /* at once */
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_TOOK], 2);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_PROOF], 1);
    tell(s, TPR_CUDA_WIRE_ASK, 1, 0, 0, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_WANT], 1);
}

static void other_page(stage *s) {
    receive_one(s, 0);
    CHECK_EQ_INT(tell(s, TPR_CUDA_WIRE_PROVE, 0, 0, 0, shared->words[0] + 1), TPRPC_OK);
    until_said(s, TPR_CUDA_WIRE_WANT, 1);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_PROOF], 1);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_TOOK], 0);
    CHECK_STR(s->link.why, "its proof failed: GPU 0 here cannot read the peer's GPU 0: it read something else");
    receive_one(s, 1);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_WANT], 2);
}

/* Nothing comes to be read, or only when it is too late. */
static void mute(stage *s) {
    receive_one(s, 0);
    later_us = TPR_CUDA_PROOF_LIMIT_US * 9 / 10;
    for (int i = 0; i < 20; i++) tprpc_poll(s->ctx, 1000, 0);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_WANT], 0);
    later_us = TPR_CUDA_PROOF_LIMIT_US;
    until_said(s, TPR_CUDA_WIRE_WANT, 1);
    CHECK_EQ_INT(s->last[TPR_CUDA_WIRE_PROOF].size, TPR_CUDA_DRIVER_ERROR_NOT_READY);
    CHECK_STR(s->link.why, "its proof failed: GPU 0 here cannot read the peer's GPU 0: not within 5 s");
    tell(s, TPR_CUDA_WIRE_PROVE, 0, 0, 0, shared->words[0]);
    receive_one(s, 1);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_WANT], 2);
    CHECK_EQ_INT(s->said[TPR_CUDA_WIRE_PROOF], 1);
}

/* The end goes while the page is being read. */
static void gone_meanwhile(stage *s) {
    receive_one(s, 0);
    tell(s, TPR_CUDA_WIRE_PROVE, 0, 0, 0, shared->words[0]);
}

TEST(the_right_word) { proving(right_word); }
TEST(a_wrong_word) { proving(wrong_word); }
TEST(an_error_for_a_word) { proving(some_error); }
TEST(the_word_of_another_device) { proving(other_device); }
TEST(ready_without_a_word) { proving(no_devices); }
TEST(a_page_as_it_should_be) { proving(good_page); }
TEST(another_page) { proving(other_page); }
TEST(a_twin_that_says_nothing) { proving(mute); }
TEST(gone_while_it_is_read) { proving(gone_meanwhile); }
