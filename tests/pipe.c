/* Pipes, listeners and contexts through the public interface, over every transport: polled and with threads, between
   two
   processes and between two contexts of one. */
#include "harness.h"
#include "../tprpc.h"
#include "pipe_common.h"

extern int (*tprpc_test_hook)(const char *call, int64_t *size);   /* see the os section of tprpc.h */

/* ---- messages of every shape ---- */

typedef struct shape {
    const char *name;
    size_t metadata;
    int payloads, tensors;
    size_t (*size)(int i);             /* of item i: payloads, then tensors */
} shape;

static size_t size_none(int i) { (void)i; return 0; }
enum { FEWER = TEST_SLOWDOWN > 1 ? 3 : 1 };   /* bytes under a sanitizer, which sees the same with those */
static size_t size_one(int i) { (void)i; return 1; }
static size_t size_small(int i) { return 1 + (size_t)i * 37 % 200; }
static size_t size_tiny(int i) { return (size_t)i % 3; }
static size_t size_8k(int i) { return 8192 - (size_t)(i % 2); }
static size_t size_100k(int i) { return 100000 + (size_t)i; }
static size_t size_1m(int i) { return (1u << 20) + 1 - (size_t)i % 3; }
static size_t size_64m(int i) { (void)i; return (64u << 20) / TEST_SLOWDOWN / FEWER; }
static size_t size_odd(int i) {
    static const size_t sizes[] = {1,    3,    0,    63, 64,    65,    1023,  1024,   4095,   4097,  8191,
                                   8192, 8193, 0,    32767, 32769, 65537, 262143, 262144, 262145, 7};
    return sizes[(size_t)i % COUNT(sizes)];
}

static const shape shapes[] = {
    {"empty", 0, 0, 0, size_none}, {"metadata", 5, 0, 0, size_none}, {"metadata 64 KiB", 65536, 0, 0, size_none},
    {"one byte", 0, 1, 0, size_one}, {"nulls", 3, 2, 2, size_none}, {"odd", 17, 10, 11, size_odd},
    {"odd tensors", 0, 0, 21, size_odd}, {"odd payloads", 1, 21, 0, size_odd}, {"1 MiB", 9, 1, 2, size_1m},
    {"1,000 small", 64, 0, 1000, size_small}, {"limit of items", 2, 96, 4000, size_tiny},
    {"on the edge of inline", 0, 3, 6, size_8k}, {"20 large", 5, 10, 10, size_100k}, {"64 MiB", 8, 0, 1, size_64m},
};

typedef struct parcel { tprpc_message m; tprpc_tensor *tensors; tprpc_payload *payloads; outcome o; } parcel;

static size_t item_metadata(int i) { return i % 3 == 1 ? 0 : 1 + (size_t)i % 40; }
static uint64_t item_seed(uint64_t seed, int i) { return seed * 10007 + (uint64_t)i * 2; }
static void *bytes(size_t size) {
    void *memory = size ? malloc(size) : NULL;
    if (size) REQUIRE(memory != NULL);
    return memory;
}
static void *filled(size_t size, uint64_t seed) {
    void *memory = bytes(size);
    fill(memory, size, seed);
    return memory;
}

static void tensor_kind(tprpc_tensor *t, int i) {
    t->target.kind = i % 2 ? TPRPC_CPU : TPRPC_DEVICE_DEFAULT;
    t->target.index = i % 2 ? i % 5 : 0;
    if (i % 4 != 3 || t->size % 4 || !t->size) return;
    t->dtype = TPRPC_F32;
    t->ndim = 3;
    t->shape[0] = (int64_t)t->size / 4;
    t->shape[1] = t->shape[2] = 1;
}

static parcel *parcel_new(const shape *s, uint64_t seed) {
    parcel *p = (parcel *)calloc(1, sizeof *p);
    REQUIRE(p != NULL);
    p->tensors = (tprpc_tensor *)calloc((size_t)s->tensors + 1, sizeof *p->tensors);
    p->payloads = (tprpc_payload *)calloc((size_t)s->payloads + 1, sizeof *p->payloads);
    p->m.metadata = filled(s->metadata, seed);
    p->m.metadata_size = s->metadata;
    p->m.tensors = s->tensors ? p->tensors : NULL;
    p->m.tensor_count = (size_t)s->tensors;
    p->m.payloads = s->payloads ? p->payloads : NULL;
    p->m.payload_count = (size_t)s->payloads;
    for (int i = 0; i < s->payloads; i++) {
        p->payloads[i].size = s->size(i);
        p->payloads[i].data = filled(s->size(i), item_seed(seed, i));
        p->payloads[i].metadata_size = item_metadata(i);
        p->payloads[i].metadata = filled(item_metadata(i), item_seed(seed, i) + 1);
    }
    for (int i = s->payloads; i < s->payloads + s->tensors; i++) {
        tprpc_tensor *t = &p->tensors[i - s->payloads];
        t->size = s->size(i);
        t->data = filled(t->size, item_seed(seed, i));
        t->metadata_size = item_metadata(i);
        t->metadata = filled(t->metadata_size, item_seed(seed, i) + 1);
        tensor_kind(t, i);
    }
    return p;
}

/* Overwrites what a write was given: it must have been copied. */
static void parcel_spoil(parcel *p) {
    if (p->m.metadata) memset((void *)(uintptr_t)p->m.metadata, 0xEE, p->m.metadata_size);
    for (size_t i = 0; i < p->m.payload_count; i++) {
        if (p->payloads[i].data) memset(p->payloads[i].data, 0xEE, p->payloads[i].size);
        p->payloads[i].size++;
    }
    for (size_t i = 0; i < p->m.tensor_count; i++) {
        if (p->tensors[i].data) memset(p->tensors[i].data, 0xEE, p->tensors[i].size);
        p->tensors[i].size++;
    }
}

static void parcel_free(parcel *p) {
    free((void *)(uintptr_t)p->m.metadata);
    for (size_t i = 0; i < p->m.payload_count; i++) {
        free(p->payloads[i].data);
        free((void *)(uintptr_t)p->payloads[i].metadata);
    }
    for (size_t i = 0; i < p->m.tensor_count; i++) {
        free(p->tensors[i].data);
        free((void *)(uintptr_t)p->tensors[i].metadata);
    }
    free(p->tensors);
    free(p->payloads);
    free(p);
}

static void check_described(const tprpc_message *m, const shape *s, uint64_t seed, int with_data) {
    REQUIRE_EQ_INT(m->metadata_size, s->metadata);
    REQUIRE_EQ_INT(m->payload_count, s->payloads);
    REQUIRE_EQ_INT(m->tensor_count, s->tensors);
    CHECK(matches(m->metadata, m->metadata_size, seed));
    for (int i = 0; i < s->payloads; i++) {
        const tprpc_payload *p = &m->payloads[i];
        REQUIRE_EQ_INT(p->size, s->size(i));
        REQUIRE_EQ_INT(p->metadata_size, item_metadata(i));
        CHECK(matches(p->metadata, p->metadata_size, item_seed(seed, i) + 1));
        if (!with_data) REQUIRE(p->data == NULL);
        else REQUIRE(matches(p->data, p->size, item_seed(seed, i)));
    }
    for (int i = s->payloads; i < s->payloads + s->tensors; i++) {
        const tprpc_tensor *t = &m->tensors[i - s->payloads];
        tprpc_tensor want;
        memset(&want, 0, sizeof want);
        want.size = s->size(i);
        tensor_kind(&want, i);
        REQUIRE_EQ_INT(t->size, want.size);
        REQUIRE_EQ_INT(t->metadata_size, item_metadata(i));
        REQUIRE_EQ_INT(t->dtype, want.dtype);
        REQUIRE_EQ_INT(t->ndim, want.ndim);
        REQUIRE_MEM(t->shape, want.shape, sizeof want.shape);
        CHECK_EQ_INT(t->target.kind, want.target.kind);
        CHECK_EQ_INT(t->target.index, want.target.index);
        CHECK(matches(t->metadata, t->metadata_size, item_seed(seed, i) + 1));
        if (!with_data) REQUIRE(t->data == NULL);
        else REQUIRE(matches(t->data, t->size, item_seed(seed, i)));
    }
}

/* ---- one end that reads every shape, issuing each operation in the callback of the one before ---- */

enum { READ_OWN, READ_DESCRIBED, READ_WHOLE, READ_MODES };
typedef struct reader {
    tprpc_pipe *pipe;
    int mode, next, finished;
    uint64_t seed;
    tprpc_tensor tensors[4096];
    tprpc_payload payloads[4096];
} reader;

static void reader_next(reader *r);

static void reader_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    reader *r = (reader *)user;
    if (error) fprintf(stderr, "read: %s\n", error->text);
    REQUIRE_EQ_INT(status, TPRPC_OK);
    check_described(m, &shapes[r->next], r->seed + (uint64_t)r->next, 1);
    for (size_t i = 0; i < m->tensor_count; i++) {
        if (r->mode != READ_OWN && m->tensors[i].size) CHECK(((uintptr_t)m->tensors[i].data & 63) == 0);
        if (r->mode != READ_OWN && m->tensors[i].size) *(uint8_t *)m->tensors[i].data ^= 1;   /* it may be written to */
        if (r->mode == READ_OWN && m->tensors[i].size) CHECK(m->tensors[i].data == r->tensors[i].data);
        if (r->mode == READ_OWN) free(r->tensors[i].data);
    }
    for (size_t i = 0; i < m->payload_count && r->mode == READ_OWN; i++) {
        if (m->payloads[i].size) CHECK(m->payloads[i].data == r->payloads[i].data);
        free(r->payloads[i].data);
    }
    r->next++;
    reader_next(r);
}

static void reader_described(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    reader *r = (reader *)user;
    tprpc_message own;
    if (error) fprintf(stderr, "describe: %s\n", error->text);
    REQUIRE_EQ_INT(status, TPRPC_OK);
    check_described(m, &shapes[r->next], r->seed + (uint64_t)r->next, 0);
    if (r->mode == READ_DESCRIBED) {
        REQUIRE_EQ_INT(tprpc_pipe_read(r->pipe, NULL, reader_read, r), TPRPC_OK);
        return;
    }
    memset(&own, 0, sizeof own);
    memset(r->tensors, 0, sizeof r->tensors);
    own.tensors = r->tensors;
    own.tensor_count = m->tensor_count;
    own.payloads = r->payloads;
    own.payload_count = m->payload_count;
    for (size_t i = 0; i < m->tensor_count; i++) {
        r->tensors[i].size = m->tensors[i].size;
        r->tensors[i].data = bytes(m->tensors[i].size);
    }
    for (size_t i = 0; i < m->payload_count; i++) {
        memset(&r->payloads[i], 0, sizeof r->payloads[i]);
        r->payloads[i].size = m->payloads[i].size;
        r->payloads[i].data = bytes(m->payloads[i].size);
    }
    REQUIRE_EQ_INT(tprpc_pipe_read(r->pipe, &own, reader_read, r), TPRPC_OK);
}

static void reader_next(reader *r) {
    if (r->next == (int)COUNT(shapes)) STORE(r->finished, 1);
    else if (r->mode == READ_WHOLE) REQUIRE_EQ_INT(tprpc_pipe_read(r->pipe, NULL, reader_read, r), TPRPC_OK);
    else REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(r->pipe, reader_described, r), TPRPC_OK);
}

static void read_shapes(side *s, int mode, uint64_t seed) {
    reader *r = (reader *)calloc(1, sizeof *r);
    REQUIRE(r != NULL);
    r->pipe = s->pipe;
    r->mode = mode;
    r->seed = seed;
    reader_next(r);
    WAIT(s, r->finished, 1);
    free(r);
}

/* lend: every other message is lent, the others copied. */
static void write_shapes(side *s, int lend, uint64_t seed) {
    parcel *parcels[COUNT(shapes)];
    for (int i = 0; i < (int)COUNT(shapes); i++) {
        parcel *p = parcels[i] = parcel_new(&shapes[i], seed + (uint64_t)i);
        int lent = i % 2 == lend;
        tprpc_message m = p->m;
        if (lent) m.release = on_release;
        m.release_user = &p->o;
        REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &p->o), TPRPC_OK);
        if (!lent) parcel_spoil(p);
    }
    for (int i = 0; i < (int)COUNT(shapes); i++) {
        WAIT(s, parcels[i]->o.runs, 1);
        CHECK_EQ_INT(parcels[i]->o.status, TPRPC_OK);
        CHECK_EQ_INT(parcels[i]->o.releases, i % 2 == lend);
        parcel_free(parcels[i]);
    }
}

/* ---- the matrix: transport x threads x processes ---- */

typedef struct job {
    const char *transports, *address, *expected;
    int threads, processes, ordered;
    void (*body)(side *s);             /* runs on both sides */
} job;

typedef struct common { int stage[2]; int numbers[8]; char address[128]; } common;

/* Both sides are here, and both work until then. */
static void meet(side *s, int stage) {
    STORE(s->common->stage[s->who], stage);
    WAIT(s, s->common->stage[!s->who], stage);
}

static void *side_run(void *arg) {
    side *s = (side *)arg;
    const job *j = s->job;
    accepting accept;
    s->threads = j->threads;
    s->ctx = context(j->transports, j->threads);
    memset(&accept, 0, sizeof accept);
    if (s->who == 0) {
        s->listener = listen_on(s->ctx, j->address, j->ordered);
        snprintf(s->common->address, sizeof s->common->address, "%s", tprpc_listener_address(s->listener, NULL));
        CHECK_EQ_INT(tprpc_accept(s->listener, on_accepted, &accept), TPRPC_OK);
        STORE(s->common->stage[0], 1);
        WAIT(s, accept.o.runs, 1);
        REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
        s->pipe = accept.pipe;
    } else {
        WAIT(s, s->common->stage[0], 1);
        s->pipe = connect_to(s->ctx, s->common->address, j->ordered, 0);
    }
    j->body(s);
    meet(s, 1000);
    tprpc_pipe_close(s->pipe);
    tprpc_listener_close(s->listener);
    CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_OK);
    return NULL;
}

static void side_process(void *arg) { side_run(arg); }

static void job_run(void *arg) {
    const job *j = (const job *)arg;
    side sides[2];
    void *memory = mmap(NULL, sizeof(common), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_t thread;
    REQUIRE(memory != MAP_FAILED);
    memset(sides, 0, sizeof sides);
    for (int i = 0; i < 2; i++) {
        sides[i].job = j;
        sides[i].common = (common *)memory;
        sides[i].who = i;
    }
    if (j->processes == 2) {
        pid_t child = test_fork_run(side_process, &sides[1]);
        side_run(&sides[0]);
        CHECK_EQ_INT(test_wait_child(child, WAIT_S), 0);
    } else {
        REQUIRE(pthread_create(&thread, NULL, side_run, &sides[1]) == 0);
        side_run(&sides[0]);
        pthread_join(thread, NULL);
    }
    munmap(memory, sizeof(common));
}

static void add_matrix(const char *name, void (*body)(side *), int ordered, double limit_s) {
    static const struct { const char *name, *transports, *address, *expected; } ways[] = {
        {"tcp", "tcp", "tcp://127.0.0.1:0", "tcp"}, {"shm", "shm", "shm://", "shm"},
        {"moved", NULL, "tcp://127.0.0.1:0", "shm"}};
    for (size_t way = 0; way < COUNT(ways); way++)
        for (int threads = 0; threads <= 2; threads++)
            for (int processes = 1; processes <= 2; processes++) {
                char full[100];
                job *j = (job *)calloc(1, sizeof *j);
                if (!j) abort();
                j->transports = ways[way].transports;
                j->address = ways[way].address;
                j->expected = ways[way].expected;
                j->threads = threads;
                j->processes = processes;
                j->ordered = ordered;
                j->body = body;
                snprintf(full, sizeof full, "%s.%s.threads%d.%s", name, ways[way].name, threads,
                         processes == 2 ? "processes" : "contexts");
                test_add(full, job_run, j, limit_s);
            }
}

static const tprpc_path *path_of(const tprpc_pipe_info *info, const char *name) {
    for (uint32_t i = 0; i < info->path_count; i++) if (strcmp(info->paths[i].name, name) == 0) return &info->paths[i];
    fprintf(stderr, "no path is named %s\n", name);
    REQUIRE(0);
    return NULL;
}

static void shapes_body(side *s) {
    for (int mode = 0; mode < READ_MODES; mode++) {
        if (s->who == 0) read_shapes(s, mode, 100 * (uint64_t)mode);
        else write_shapes(s, mode % 2, 100 * (uint64_t)mode);
        if (s->who == 1) read_shapes(s, mode, 5000 + 100 * (uint64_t)mode);
        else write_shapes(s, mode % 2, 5000 + 100 * (uint64_t)mode);
    }
}

/* What get_info and the report say after a message of 1 MiB each way. */
static void info_body(side *s) {
    static uint8_t mega[1 << 20];
    tprpc_tensor tensor;
    tprpc_message m;
    tprpc_pipe_info info;
    outcome wrote, got;
    char report[4096], text[128];
    memset(&tensor, 0, sizeof tensor);
    memset(&m, 0, sizeof m);
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    tensor.data = mega;
    tensor.size = sizeof mega;
    m.tensors = &tensor;
    m.tensor_count = 1;
    REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe, NULL, on_read, &got), TPRPC_OK);
    WAIT(s, wrote.runs, 1);
    WAIT(s, got.runs, 1);
    CHECK_EQ_INT(wrote.status, TPRPC_OK);
    CHECK_EQ_INT(got.status, TPRPC_OK);
    meet(s, 2);
    CHECK_EQ_INT(tprpc_pipe_get_info(s->pipe, &info, sizeof info - 1), TPRPC_ERROR_INVALID);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(s->pipe, &info, sizeof info), TPRPC_OK);
    const char *channel = s->job->processes == 1 ? "xth" : strcmp(info.transport, "shm") == 0 ? "bulk" : "basic";
    CHECK_STR(info.transport, s->job->expected);
    CHECK_STR(info.channel, channel);
    CHECK(info.peer[0] != 0);
    CHECK_EQ_INT(info.tensor_bytes_sent, sizeof mega);
    CHECK_EQ_INT(info.tensor_bytes_received, sizeof mega);
    CHECK_EQ_INT(info.messages_sent, 1);
    CHECK_EQ_INT(info.messages_received, 1);
    CHECK(info.bytes_sent > (s->job->processes == 2 ? sizeof mega : 100));
    CHECK(info.bytes_received > (s->job->processes == 2 ? sizeof mega : 100));
    int chosen[2] = {0, 0};
    for (uint32_t i = 0; i < info.path_count; i++) {
        chosen[info.paths[i].channel] += info.paths[i].chosen;
        if (info.paths[i].chosen) CHECK_STR(info.paths[i].why, "");
        else CHECK(info.paths[i].why[0] != 0);
    }
    CHECK_EQ_INT(chosen[0], 1);
    CHECK_EQ_INT(chosen[1], 1);
    CHECK(path_of(&info, s->job->expected)->chosen);
    CHECK(path_of(&info, channel)->chosen);
    CHECK_EQ_INT(path_of(&info, channel)->carries, TPRPC_PATH_HOST_TO_HOST);
    CHECK_EQ_INT(path_of(&info, s->job->expected)->carries, 0);
    if (s->job->transports && strcmp(s->job->transports, "tcp") == 0)
        CHECK_CONTAINS(path_of(&info, "shm")->why, "not among the transports given");
    size_t whole = tprpc_pipe_report(&info, report, sizeof report);
    CHECK_EQ_INT(whole, strlen(report));
    snprintf(text, sizeof text, "%s and %s", s->job->expected, channel);
    CHECK_CONTAINS(report, text);
    CHECK_CONTAINS(report, "not ");
    CHECK_EQ_INT(tprpc_pipe_report(&info, report, 10), whole);
    CHECK_EQ_INT(strlen(report), 9);
    CHECK_EQ_INT(tprpc_pipe_report(&info, NULL, 0), whole);
}

/* ---- order ---- */

enum { ORDER_COUNT = 120 };
typedef struct ordering { outcome o; int index; } ordering;

static void order_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    ordering *r = (ordering *)user;
    int index = -1;
    REQUIRE_EQ_INT(status, TPRPC_OK);
    REQUIRE_EQ_INT(m->metadata_size, sizeof index);
    memcpy(&index, m->metadata, sizeof index);
    CHECK_EQ_INT(index, r->index);
    for (size_t i = 0; i < m->tensor_count; i++) CHECK(matches(m->tensors[i].data, m->tensors[i].size,
        (uint64_t)index));
    outcome_set(&r->o, status, error);
}

static void order_body(side *s) {
    static const size_t sizes[] = {10, (3 << 20) / FEWER, 0, 100, 70000, 9, 8193, 1, 500000, 30};
    ordering *writes = (ordering *)calloc(ORDER_COUNT, sizeof *writes), *reads = (ordering *)calloc(ORDER_COUNT,
        sizeof *reads);
    void **blocks = (void **)calloc(ORDER_COUNT, sizeof *blocks);
    REQUIRE(writes && reads && blocks);
    for (int i = 0; i < ORDER_COUNT; i++) {
        tprpc_tensor tensor;
        tprpc_message m;
        memset(&tensor, 0, sizeof tensor);
        memset(&m, 0, sizeof m);
        tensor.size = sizes[(size_t)(i + s->who * 3) % COUNT(sizes)];
        tensor.data = blocks[i] = filled(tensor.size, (uint64_t)i);
        m.metadata = &i;
        m.metadata_size = sizeof i;
        m.tensors = &tensor;
        m.tensor_count = 1;
        m.release = on_release;
        m.release_user = &writes[i].o;
        reads[i].index = i;
        if (i % 2) REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &writes[i].o), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe, NULL, order_read, &reads[i]), TPRPC_OK);
        if (!(i % 2)) REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &writes[i].o), TPRPC_OK);
    }
    for (int i = 0; i < ORDER_COUNT; i++) {
        WAIT(s, writes[i].o.runs, 1);
        WAIT(s, reads[i].o.runs, 1);
        CHECK_EQ_INT(writes[i].o.status, TPRPC_OK);
        CHECK_EQ_INT(writes[i].o.releases, 1);
        if (i && s->job->ordered) CHECK(writes[i].o.place > writes[i - 1].o.place);
        if (i && s->job->ordered) CHECK(reads[i].o.place > reads[i - 1].o.place);
    }
    for (int i = 0; i < ORDER_COUNT; i++) free(blocks[i]);
    free(blocks);
    free(writes);
    free(reads);
}

/* A large message waits to be read, a small one behind it is read: with and without order. */
static void independent_body(side *s) {
    enum { LARGE = (8 << 20) / FEWER };
    outcome o[4];
    tprpc_tensor tensor;
    tprpc_message m;
    memset(o, 0, sizeof o);
    memset(&tensor, 0, sizeof tensor);
    memset(&m, 0, sizeof m);
    tensor.size = LARGE;
    m.tensors = &tensor;
    m.tensor_count = 1;
    void *memory = tensor.data = filled(LARGE, 1);
    if (s->who == 1) {
        tprpc_message small;
        memset(&small, 0, sizeof small);
        small.metadata = "small";
        small.metadata_size = 5;
        m.release = on_release;
        m.release_user = &o[0];
        REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &o[0]), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &small, on_written, &o[1]), TPRPC_OK);
        if (!s->job->ordered) WAIT(s, o[1].runs, 1);
        meet(s, 2);
        CHECK_EQ_INT(LOAD(o[0].runs), 0);
        CHECK_EQ_INT(LOAD(o[1].runs), !s->job->ordered);
        meet(s, 3);
        WAIT(s, o[0].runs, 1);
        WAIT(s, o[1].runs, 1);
        CHECK_EQ_INT(o[0].place > o[1].place, !s->job->ordered);
    } else {
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(s->pipe, on_described, &o[0]), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(s->pipe, on_described, &o[1]), TPRPC_OK);
        WAIT(s, o[1].runs, 1);
        CHECK(o[1].place > o[0].place);
        meet(s, 2);
        meet(s, 3);
        REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe, &m, on_read, &o[2]), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe, NULL, on_read, &o[3]), TPRPC_OK);
        WAIT(s, o[2].runs, 1);
        WAIT(s, o[3].runs, 1);
        CHECK_EQ_INT(o[2].status, TPRPC_OK);
        CHECK_EQ_INT(o[3].status, TPRPC_OK);
        if (s->job->ordered) CHECK(o[3].place > o[2].place);
        CHECK(matches(memory, LARGE, 1));
    }
    meet(s, 4);
    free(memory);
}

/* Both ends write all that they have before either reads. */
static void both_ways_body(side *s) {
    enum { N = 6, LARGE = (12 << 20) / FEWER };
    outcome writes[N], reads[N];
    void *memory[N];
    memset(writes, 0, sizeof writes);
    memset(reads, 0, sizeof reads);
    for (int i = 0; i < N; i++) {
        tprpc_payload payload;
        tprpc_message m;
        memset(&payload, 0, sizeof payload);
        memset(&m, 0, sizeof m);
        payload.data = memory[i] = filled(LARGE, (uint64_t)i);
        payload.size = LARGE;
        m.payloads = &payload;
        m.payload_count = 1;
        m.release = on_release;
        m.release_user = &writes[i];
        REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &writes[i]), TPRPC_OK);
    }
    meet(s, 2);
    for (int i = 0; i < N; i++) REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe, NULL, on_read, &reads[i]), TPRPC_OK);
    for (int i = 0; i < N; i++) {
        WAIT(s, writes[i].runs, 1);
        WAIT(s, reads[i].runs, 1);
        CHECK_EQ_INT(writes[i].status, TPRPC_OK);
        CHECK_EQ_INT(writes[i].releases, 1);
        CHECK_EQ_INT(reads[i].status, TPRPC_OK);
        free(memory[i]);
    }
}

TESTS(matrix) {
    add_matrix("shapes", shapes_body, 0, 90);
    add_matrix("info", info_body, 0, 30);
    add_matrix("order", order_body, 0, 60);
    add_matrix("ordered", order_body, 1, 60);
    add_matrix("independent", independent_body, 0, 30);
    add_matrix("independent_ordered", independent_body, 1, 30);
    add_matrix("both_ways", both_ways_body, 0, 60);
}

/* ---- tests of two contexts of one process, over each transport, polled and with a thread ---- */

typedef struct way { const char *name, *transports, *address; int threads; } way;
static const way ways[] = {
    {"tcp.polled", "tcp", "tcp://127.0.0.1:0", 0}, {"shm.polled", "shm", "shm://", 0}, {"moved.polled", NULL,
        "tcp://[::1]:0", 0},
    {"tcp.threaded", "tcp", "tcp://127.0.0.1:0", 1}, {"shm.threaded", "shm", "shm://", 1},
    {"moved.threaded", NULL, "tcp://127.0.0.1:0", 1}};

static void add_ways(const char *name, void (*run)(void *way), double limit_s) {
    for (size_t i = 0; i < COUNT(ways); i++) {
        char full[100];
        snprintf(full, sizeof full, "%s.%s", name, ways[i].name);
        test_add(full, run, (void *)(uintptr_t)&ways[i], limit_s);
    }
}
#define TEST_WAYS(test, seconds)                              \
    static void test##_run(void *arg);                        \
    TESTS(test) { add_ways(#test, test##_run, seconds); }     \
    static void test##_run(void *arg)

static void pair_open_way(pair *p, const void *arg, int ordered) {
    const way *w = (const way *)arg;
    pair_open(p, w->transports, w->address, w->threads, ordered);
}

static tprpc_message text_message(const char *text) {
    tprpc_message m;
    memset(&m, 0, sizeof m);
    m.metadata = text;
    m.metadata_size = strlen(text);
    return m;
}

/* One message each way: the pair still works. */
static void pair_check(pair *p) {
    outcome o[4];
    tprpc_message m = text_message("still here");
    memset(o, 0, sizeof o);
    CHECK_EQ_INT(tprpc_pipe_write(p->a, &m, on_written, &o[0]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_write(p->b, &m, on_written, &o[1]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read(p->a, NULL, on_read, &o[2]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read(p->b, NULL, on_read, &o[3]), TPRPC_OK);
    for (int i = 0; i < 4; i++) {
        WAIT(&p->s, o[i].runs, 1);
        CHECK_EQ_INT(o[i].status, TPRPC_OK);
    }
}

static void refused(tprpc_pipe *pipe, const tprpc_message *message, tprpc_status expected) {
    outcome o;
    tprpc_message m = *message;
    memset(&o, 0, sizeof o);
    m.release = on_release;
    m.release_user = &o;
    CHECK_EQ_INT(tprpc_pipe_write(pipe, &m, on_written, &o), expected);
    CHECK_EQ_INT(LOAD(o.releases), 1);           /* before it returned */
    CHECK_EQ_INT(LOAD(o.runs), 0);
}

static void refused_tensor(tprpc_pipe *pipe, const tprpc_tensor *tensor, tprpc_status expected) {
    tprpc_tensor two[2];
    tprpc_message m;
    static uint8_t byte;
    memset(two, 0, sizeof two);
    memset(&m, 0, sizeof m);
    two[0].data = &byte;
    two[0].size = 1;
    two[1] = *tensor;
    m.tensors = two;
    m.tensor_count = 2;
    refused(pipe, &m, expected);
}

TEST_WAYS(bad_writes, 20) {
    static float floats[24];
    static tprpc_tensor many[4097];
    static uint8_t metadata[(1 << 20) + 1];
    pair p;
    tprpc_message m;
    tprpc_payload payload;
    tprpc_tensor good, t;
    pair_open_way(&p, arg, 0);
    memset(&m, 0, sizeof m);
    memset(&payload, 0, sizeof payload);
    m.metadata_size = 5;
    refused(p.a, &m, TPRPC_ERROR_INVALID);
    m.metadata_size = 0;
    m.tensor_count = 1;
    refused(p.a, &m, TPRPC_ERROR_INVALID);
    m.tensor_count = 0;
    m.payload_count = 1;
    refused(p.a, &m, TPRPC_ERROR_INVALID);
    m.payloads = &payload;
    payload.size = 1;
    refused(p.a, &m, TPRPC_ERROR_INVALID);
    payload.size = 0;
    payload.metadata_size = 1;
    refused(p.a, &m, TPRPC_ERROR_INVALID);

    memset(&good, 0, sizeof good);
    good.data = floats;
    good.size = sizeof floats;
    good.dtype = TPRPC_F32;
    good.ndim = 2;
    good.shape[0] = 4;
    good.shape[1] = 6;
    t = good; t.data = NULL; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.size--; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.shape[0] = 5; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.shape[0] = -4; t.shape[1] = -6; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.shape[0] = INT64_MAX; t.shape[1] = INT64_MAX; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.ndim = 9; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.ndim = -1; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.dtype = 99; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.dtype = -1; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.metadata_size = 3; refused_tensor(p.a, &t, TPRPC_ERROR_INVALID);
    t = good; t.strides[0] = 1; t.strides[1] = 4; refused_tensor(p.a, &t, TPRPC_ERROR_UNSUPPORTED);
    t = good; t.strides[0] = 12; t.strides[1] = 2; refused_tensor(p.a, &t, TPRPC_ERROR_UNSUPPORTED);
    t = good; t.device.kind = TPRPC_CUDA; refused_tensor(p.a, &t, TPRPC_ERROR_UNSUPPORTED);
    t = good; t.target.kind = TPRPC_DEVICE_USER; refused_tensor(p.a, &t, TPRPC_ERROR_UNSUPPORTED);

    memset(&m, 0, sizeof m);
    m.tensors = many;
    m.tensor_count = COUNT(many);
    refused(p.a, &m, TPRPC_ERROR_LIMIT);
    memset(&m, 0, sizeof m);
    m.metadata = metadata;
    m.metadata_size = sizeof metadata;
    refused(p.a, &m, TPRPC_ERROR_LIMIT);
    t = good; t.strides[0] = 6; t.strides[1] = 1;   /* contiguous, and said so */
    memset(&m, 0, sizeof m);
    m.tensors = &t;
    m.tensor_count = 1;
    CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, NULL, NULL), TPRPC_OK);
    outcome got;
    memset(&got, 0, sizeof got);
    CHECK_EQ_INT(tprpc_pipe_read(p.b, NULL, on_read, &got), TPRPC_OK);
    WAIT(&p.s, got.runs, 1);
    CHECK_EQ_INT(got.status, TPRPC_OK);
    pair_check(&p);
    pair_close(&p);
}

/* Reads whose allocation differs from what was described; nothing described. */
TEST_WAYS(bad_reads, 20) {
    pair p;
    outcome o[3], never;
    tprpc_tensor tensors[3];
    tprpc_payload payload;
    tprpc_message m, own;
    uint8_t memory[40000];
    pair_open_way(&p, arg, 0);
    memset(o, 0, sizeof o);
    memset(&never, 0, sizeof never);
    memset(tensors, 0, sizeof tensors);
    memset(&payload, 0, sizeof payload);
    memset(&m, 0, sizeof m);
    memset(memory, 7, sizeof memory);
    tensors[0].data = tensors[1].data = tensors[2].data = payload.data = memory;
    tensors[0].size = 30000;
    tensors[1].size = 100;
    payload.size = 40;
    m.tensors = tensors;
    m.tensor_count = 2;
    m.payloads = &payload;
    m.payload_count = 1;
    own = m;
    CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &never), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &o[0]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read_descriptor(p.b, on_described, &o[1]), TPRPC_OK);
    WAIT(&p.s, o[1].runs, 1);
    own.tensor_count = 1; CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &never), TPRPC_ERROR_INVALID);
    own.tensor_count = 3; CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &never), TPRPC_ERROR_INVALID);
    own = m; own.payload_count = 0; CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &never), TPRPC_ERROR_INVALID);
    tensors[0].size++; own = m; CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &never), TPRPC_ERROR_INVALID);
    tensors[0].size--; payload.size--; CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &never), TPRPC_ERROR_INVALID);
    payload.size++;
    CHECK_EQ_INT(tprpc_pipe_read(p.b, &own, on_read, &o[2]), TPRPC_OK);
    WAIT(&p.s, o[2].runs, 1);
    CHECK_EQ_INT(o[2].status, TPRPC_OK);
    WAIT(&p.s, o[0].runs, 1);
    pair_check(&p);
    CHECK_EQ_INT(never.runs, 0);
    pair_close(&p);
}

/* ---- limits ---- */

static tprpc_context *context_limited(const way *w, const tprpc_limits *limits) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.threads = w->threads;
    desc.transports = w->transports;
    desc.limits = *limits;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    return ctx;
}

/* The limits of either end hold, before the pipe is agreed and after; the pipe survives. */
TEST_WAYS(message_over_limit, 20) {
    static uint8_t memory[200000];
    pair p;
    tprpc_limits limits;
    tprpc_payload payloads[9];
    tprpc_message m;
    outcome parked, got, wrote;
    memset(&limits, 0, sizeof limits);
    memset(payloads, 0, sizeof payloads);
    memset(&m, 0, sizeof m);
    memset(&parked, 0, sizeof parked);
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    memset(&p, 0, sizeof p);
    p.s.threads = ((const way *)arg)->threads;
    p.s.also = context_limited((const way *)arg, &limits);
    limits.message_bytes = 100000;
    limits.metadata_bytes = 1000;
    limits.tensors = 8;
    p.s.ctx = context_limited((const way *)arg, &limits);
    payloads[0].data = memory;
    payloads[0].size = 100001;
    m.payloads = payloads;
    m.payload_count = 1;
    m.release = on_release;
    m.release_user = &parked;
    accepting accept;
    memset(&accept, 0, sizeof accept);
    p.s.listener = listen_on(p.s.ctx, ((const way *)arg)->address, 0);
    CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
    p.b = connect_to(p.s.also, tprpc_listener_address(p.s.listener, NULL), 0, 0);
    tprpc_status early = tprpc_pipe_write(p.b, &m, on_written, &parked);
    if (early == TPRPC_OK) {                     /* the peer's limits were not known yet */
        WAIT(&p.s, parked.runs, 1);
        CHECK_EQ_INT(parked.status, TPRPC_ERROR_LIMIT);
    } else {
        CHECK_EQ_INT(early, TPRPC_ERROR_LIMIT);
    }
    CHECK_EQ_INT(parked.releases, 1);
    WAIT(&p.s, accept.o.runs, 1);
    p.a = accept.pipe;
    pair_check(&p);
    for (int side_of = 0; side_of < 2; side_of++) {
        tprpc_pipe *pipe = side_of ? p.a : p.b;
        m.payload_count = 1;
        payloads[0].size = 100001;
        refused(pipe, &m, TPRPC_ERROR_LIMIT);
        payloads[0].size = 1;
        payloads[0].metadata = memory;
        payloads[0].metadata_size = 1001;
        refused(pipe, &m, TPRPC_ERROR_LIMIT);
        payloads[0].metadata_size = 0;
        m.payload_count = 9;
        refused(pipe, &m, TPRPC_ERROR_LIMIT);
    }
    m.payload_count = 8;
    payloads[0].size = 100000;
    payloads[0].metadata_size = 1000;
    m.release = NULL;
    CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, on_written, &wrote), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read(p.a, NULL, on_read, &got), TPRPC_OK);
    WAIT(&p.s, got.runs, 1);
    WAIT(&p.s, wrote.runs, 1);
    CHECK_EQ_INT(got.status, TPRPC_OK);
    pair_check(&p);
    pair_close(&p);
}

/* What a read of the pipe ends with, or is refused with where that had failed before; the pipe says the same. */
static tprpc_status read_ends(side *s, tprpc_pipe *pipe, outcome *o) {
    tprpc_pipe_info info;
    char report[4096];
    memset(o, 0, sizeof *o);
    tprpc_status status = tprpc_pipe_read(pipe, NULL, on_read, o);
    if (status == TPRPC_OK) WAIT(s, o->runs, 1);
    CHECK_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    tprpc_pipe_report(&info, report, sizeof report);
    CHECK_CONTAINS(report, info.error.text);
    CHECK_EQ_INT(strstr(report, "failed: ") != NULL, info.error.status != TPRPC_OK);
    if (status == TPRPC_OK) {
        CHECK_EQ_INT(info.error.status, o->status);
        CHECK_STR(info.error.text, o->text);
        return o->status;
    }
    CHECK_EQ_INT(info.error.status, status);
    snprintf(o->text, sizeof o->text, "%s", info.error.text);
    return status;
}

/* limits.pipes: of a context that connects. */
TEST_WAYS(pipes_over_limit_connecting, 20) {
    const way *w = (const way *)arg;
    pair p;
    tprpc_limits limits;
    tprpc_pipe *pipes[3];
    tprpc_pipe_desc desc;
    tprpc_error error;
    accepting accept[3];
    memset(&p, 0, sizeof p);
    memset(&limits, 0, sizeof limits);
    memset(pipes, 0, sizeof pipes);
    memset(&desc, 0, sizeof desc);
    memset(accept, 0, sizeof accept);
    p.s.threads = w->threads;
    p.s.ctx = context_limited(w, &limits);
    limits.pipes = 2;
    p.s.also = context_limited(w, &limits);
    p.s.listener = listen_on(p.s.ctx, w->address, 0);
    desc.address = tprpc_listener_address(p.s.listener, NULL);
    for (int i = 0; i < 2; i++) {
        CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept[i]), TPRPC_OK);
        pipes[i] = connect_to(p.s.also, desc.address, 0, 0);
        WAIT(&p.s, accept[i].o.runs, 1);
    }
    int fds = test_count_fds();
    for (int i = 0; i < 5; i++) {
        memset(&error, 0, sizeof error);
        CHECK_EQ_INT(tprpc_connect(p.s.also, &desc, &pipes[2], &error), TPRPC_ERROR_LIMIT);
        CHECK_EQ_INT(error.status, TPRPC_ERROR_LIMIT);
        CHECK_CONTAINS(error.text, "limits.pipes");
        CHECK(pipes[2] == NULL);
    }
    CHECK_EQ_INT(test_count_fds(), fds);
    tprpc_pipe_close(pipes[0]);                  /* and there is room */
    int64_t deadline = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    while (tprpc_connect(p.s.also, &desc, &pipes[2], &error) == TPRPC_ERROR_LIMIT && test_now_us() < deadline)
        work(&p.s);
    REQUIRE(pipes[2] != NULL);
    CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept[2]), TPRPC_OK);
    WAIT(&p.s, accept[2].o.runs, 1);
    for (int i = 1; i < 3; i++) {
        p.a = pipes[i];
        p.b = accept[i].pipe;
        tprpc_message m = text_message("which");
        outcome o;
        CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(read_ends(&p.s, p.b, &o), TPRPC_OK);
    }
    tprpc_pipe_close(pipes[1]);
    tprpc_pipe_close(accept[0].pipe);
    tprpc_pipe_close(accept[1].pipe);
    p.a = accept[2].pipe;
    p.b = pipes[2];
    pair_close(&p);
}

/* limits.pipes: of a context that listens. Who is one too many is sent away, and the listener goes on. */
TEST_WAYS(pipes_over_limit_incoming, 20) {
    const way *w = (const way *)arg;
    pair p;
    tprpc_limits limits;
    tprpc_pipe *pipes[3], *more;
    accepting accept[3];
    outcome o;
    memset(&p, 0, sizeof p);
    memset(&limits, 0, sizeof limits);
    memset(accept, 0, sizeof accept);
    p.s.threads = w->threads;
    p.s.also = context_limited(w, &limits);
    limits.pipes = 2;
    p.s.ctx = context_limited(w, &limits);
    p.s.listener = listen_on(p.s.ctx, w->address, 0);
    const char *address = tprpc_listener_address(p.s.listener, NULL);
    for (int i = 0; i < 3; i++) CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept[i]), TPRPC_OK);
    for (int i = 0; i < 2; i++) {
        pipes[i] = connect_to(p.s.also, address, 0, 0);
        WAIT(&p.s, accept[i].o.runs, 1);
        REQUIRE_EQ_INT(accept[i].o.status, TPRPC_OK);
    }
    int fds = test_count_fds();
    for (int i = 0; i < 3; i++) {
        more = connect_to(p.s.also, address, 0, 0);
        CHECK_EQ_INT(read_ends(&p.s, more, &o), TPRPC_ERROR_PEER);
        CHECK(o.text[0] != 0);
        tprpc_pipe_close(more);
    }
    CHECK_EQ_INT(LOAD(accept[2].o.runs), 0);
    p.a = accept[0].pipe;
    p.b = pipes[0];
    pair_check(&p);                              /* the others do not notice */
    CHECK_LE_INT(test_count_fds(), fds);
    tprpc_pipe_close(p.a);
    CHECK_EQ_INT(read_ends(&p.s, p.b, &o), TPRPC_ERROR_PEER);
    tprpc_pipe_close(p.b);
    p.b = connect_to(p.s.also, address, 0, 0);   /* there is room again */
    WAIT(&p.s, accept[2].o.runs, 1);
    REQUIRE_EQ_INT(accept[2].o.status, TPRPC_OK);
    p.a = accept[2].pipe;
    pair_check(&p);
    tprpc_pipe_close(accept[1].pipe);
    tprpc_pipe_close(pipes[1]);
    pair_close(&p);
}

/* ---- an allocator that keeps books ---- */

typedef struct books { int64_t live, most, blocks; int bad; } books;
typedef struct booked { size_t size; uint32_t tag, align; void *base; uint64_t guard; } booked;

static void *books_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    books *b = (books *)user;
    size_t room = sizeof(booked) > align ? (sizeof(booked) + align - 1) / align * align : align;
    uint8_t *base = NULL;
    if (align == 0 || (align & (align - 1)) || align > 4096 || !tag) ADD(b->bad, 1);
    if (posix_memalign((void **)&base, align < 64 ? 64 : align, room + size)) return NULL;
    memset(base + room, 0xA5, size < 4096 ? size : 4096);
    booked *e = (booked *)(void *)(base + room - sizeof(booked));
    e->size = size;
    e->tag = tag;
    e->base = base;
    e->guard = UINT64_C(0x600D600D600D600D);
    int64_t live = ADD(b->live, (int64_t)size), most = LOAD(b->most);
    while (live > most && !__atomic_compare_exchange_n(&b->most, &most, live, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {}
    ADD(b->blocks, 1);
    return base + room;
}

static void books_free(void *ptr, size_t size, uint32_t tag, void *user) {
    books *b = (books *)user;
    booked *e = (booked *)(void *)((uint8_t *)ptr - sizeof(booked));
    if (e->guard != UINT64_C(0x600D600D600D600D) || e->size != size || e->tag != tag) ADD(b->bad, 1);
    for (int i = 0; i < 4; i++) {
        char c = (char)(tag >> (8 * i));
        if (c < ' ' || c > '~') ADD(b->bad, 1);
    }
    ADD(b->live, -(int64_t)size);
    ADD(b->blocks, -1);
    e->guard = 0;
    free(e->base);
}

static tprpc_context *context_booked(const way *w, books *b, const tprpc_limits *limits) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.threads = w->threads;
    desc.transports = w->transports;
    desc.allocator.alloc = books_alloc;
    desc.allocator.free = books_free;
    desc.allocator.user = b;
    if (limits) desc.limits = *limits;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
    return ctx;
}

static void books_close(books *b) {
    CHECK_EQ_INT(b->live, 0);
    CHECK_EQ_INT(b->blocks, 0);
    CHECK_EQ_INT(b->bad, 0);
}

/* 1 GiB is offered to who does not read: lent tensors, then small copied messages until the writer's limit. */
TEST_WAYS(reader_who_never_reads, 60) {
    enum { N = 64, LARGE = 16 << 20, LIMIT = 32 << 20 };
    static outcome writes[N];
    books b[2];
    pair p;
    tprpc_limits limits;
    tprpc_tensor tensor;
    tprpc_message m;
    int small = 0;
    uint8_t *memory = (uint8_t *)filled(LARGE, 3), *into = (uint8_t *)bytes(LARGE);
    memset(b, 0, sizeof b);
    memset(&p, 0, sizeof p);
    memset(&limits, 0, sizeof limits);
    limits.memory_bytes = LIMIT;
    limits.inflight_bytes = 8 << 20;
    p.s.threads = ((const way *)arg)->threads;
    p.s.ctx = context_booked((const way *)arg, &b[0], &limits);
    p.s.also = context_booked((const way *)arg, &b[1], &limits);
    pair_connect(&p, ((const way *)arg)->address, 0);
    memset(&tensor, 0, sizeof tensor);
    memset(&m, 0, sizeof m);
    tensor.data = memory;
    tensor.size = LARGE;
    m.tensors = &tensor;
    m.tensor_count = 1;
    m.release = on_release;
    for (int i = 0; i < N; i++) {
        m.release_user = &writes[i];
        REQUIRE_EQ_INT(tprpc_pipe_write(p.b, &m, on_written, &writes[i]), TPRPC_OK);
    }
    tensor.size = 8000;
    m.release = NULL;
    for (;; small++) {
        tprpc_status status = tprpc_pipe_write(p.b, &m, NULL, NULL);
        if (status == TPRPC_OK && small < 200000) continue;
        CHECK_EQ_INT(status, TPRPC_ERROR_LIMIT);
        break;
    }
    idle(&p.s, 200000);
    CHECK_LE_INT(LOAD(b[0].most), LIMIT);
    CHECK_LE_INT(LOAD(b[1].most), LIMIT);
    CHECK_LE_INT(LOAD(b[0].live), 8 << 20);      /* the reader: a window of frames and buffers, not what was offered */
    for (int i = 0; i < N; i++) {
        outcome o[2];
        tprpc_message own = m;
        memset(o, 0, sizeof o);
        tensor.data = into;
        tensor.size = LARGE;
        CHECK_EQ_INT(writes[i].runs, 0);
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p.a, on_described, &o[0]), TPRPC_OK);
        WAIT(&p.s, o[0].runs, 1);
        REQUIRE_EQ_INT(o[0].status, TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read(p.a, &own, on_read, &o[1]), TPRPC_OK);
        WAIT(&p.s, o[1].runs, 1);
        REQUIRE_EQ_INT(o[1].status, TPRPC_OK);
        if (i % 16 == 0) CHECK(matches(into, LARGE, 3));
        WAIT(&p.s, writes[i].runs, 1);
        CHECK_EQ_INT(writes[i].releases, 1);
    }
    for (int i = 0; i < small; i++) {
        outcome o;
        memset(&o, 0, sizeof o);
        REQUIRE_EQ_INT(tprpc_pipe_read(p.a, NULL, on_read, &o), TPRPC_OK);
        WAIT(&p.s, o.runs, 1);
        REQUIRE_EQ_INT(o.status, TPRPC_OK);
    }
    CHECK_LE_INT(100, small);
    pair_check(&p);
    CHECK_LE_INT(b[0].most, LIMIT);
    CHECK_LE_INT(b[1].most, LIMIT);
    pair_close(&p);
    books_close(&b[0]);
    books_close(&b[1]);
    free(memory);
    free(into);
}

/* ---- ends ---- */

enum { MANY = 40 };
typedef struct pending { outcome writes[MANY], reads[MANY], descriptors[MANY]; void *memory; } pending;

/* Operations of every kind that cannot end by themselves: what is written is larger than what flows unread. */
static void pending_begin(pending *all, tprpc_pipe *pipe) {
    tprpc_tensor tensor;
    tprpc_message m;
    memset(all, 0, sizeof *all);
    memset(&tensor, 0, sizeof tensor);
    memset(&m, 0, sizeof m);
    tensor.size = 1 << 20;
    tensor.data = all->memory = filled(1 << 20, 9);
    m.tensors = &tensor;
    m.tensor_count = 1;
    for (int i = 0; i < MANY; i++) {
        m.release = i % 2 ? on_release : NULL;
        m.release_user = &all->writes[i];
        CHECK_EQ_INT(tprpc_pipe_write(pipe, &m, on_written, &all->writes[i]), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read_descriptor(pipe, on_described, &all->descriptors[i]), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(pipe, NULL, on_read, &all->reads[i]), TPRPC_OK);
    }
}

static void pending_check(pending *all, tprpc_status expected) {
    for (int i = 0; i < MANY; i++) {
        CHECK_EQ_INT(all->writes[i].runs, 1);
        CHECK_EQ_INT(all->writes[i].status, expected);
        CHECK_EQ_INT(all->writes[i].releases, i % 2);
        CHECK_EQ_INT(all->reads[i].runs, 1);
        CHECK_EQ_INT(all->reads[i].status, expected);
        CHECK_EQ_INT(all->descriptors[i].runs, 1);
        CHECK_EQ_INT(all->descriptors[i].status, expected);
    }
    free(all->memory);
}

static void pending_wait(pending *all, side *s) {
    for (int i = 0; i < MANY; i++) {
        WAIT(s, all->writes[i].runs, 1);
        WAIT(s, all->reads[i].runs, 1);
        WAIT(s, all->descriptors[i].runs, 1);
    }
}

static void close_pending(const way *w, int ordered) {
    pair p;
    pending mine;
    outcome theirs;
    memset(&theirs, 0, sizeof theirs);
    pair_open(&p, w->transports, w->address, w->threads, ordered);
    CHECK_EQ_INT(tprpc_pipe_read_descriptor(p.a, on_described, &theirs), TPRPC_OK);
    pending_begin(&mine, p.b);
    idle(&p.s, 20000);
    tprpc_pipe_close(p.b);
    p.b = NULL;
    pending_wait(&mine, &p.s);
    pending_check(&mine, TPRPC_ERROR_CLOSED);
    WAIT(&p.s, theirs.runs, 1);
    /* What had come may be described; then comes the end, and it stays. */
    for (int i = 0; ; i++) {
        outcome o;
        memset(&o, 0, sizeof o);
        tprpc_status status = tprpc_pipe_read_descriptor(p.a, on_described, &o);
        if (status == TPRPC_OK) {
            WAIT(&p.s, o.runs, 1);
            status = o.status;
        }
        if (status == TPRPC_OK && i <= MANY) continue;
        CHECK_EQ_INT(status, TPRPC_ERROR_PEER);
        break;
    }
    tprpc_message m = text_message("late");
    refused(p.a, &m, TPRPC_ERROR_PEER);
    pair_close(&p);
}

TEST_WAYS(close_ends_all, 20) { close_pending((const way *)arg, 0); }
TEST_WAYS(close_ends_all_ordered, 20) { close_pending((const way *)arg, 1); }

/* A read that has ended, and waits for a descriptor that was asked for before it, when the pipe ends. */
static void held_up(const way *w, int by_peer) {
    pair p;
    outcome o[4];
    tprpc_message m = text_message("one");
    memset(o, 0, sizeof o);
    pair_open(&p, w->transports, w->address, w->threads, 1);
    CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read_descriptor(p.a, on_described, &o[0]), TPRPC_OK);
    WAIT(&p.s, o[0].runs, 1);
    CHECK_EQ_INT(tprpc_pipe_read_descriptor(p.a, on_described, &o[1]), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read(p.a, NULL, on_read, &o[2]), TPRPC_OK);   /* of the message that was described */
    CHECK_EQ_INT(tprpc_pipe_read_descriptor(p.a, on_described, &o[3]), TPRPC_OK);
    idle(&p.s, 20000);
    CHECK_EQ_INT(LOAD(o[2].runs), 0);
    tprpc_pipe_close(by_peer ? p.b : p.a);
    if (by_peer) p.b = NULL;
    else p.a = NULL;
    for (int i = 1; i < 4; i++) WAIT(&p.s, o[i].runs, 1);
    CHECK_EQ_INT(o[1].status, by_peer ? TPRPC_ERROR_PEER : TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(o[2].status, TPRPC_OK);
    CHECK_EQ_INT(o[3].status, by_peer ? TPRPC_ERROR_PEER : TPRPC_ERROR_CLOSED);
    CHECK(o[1].place < o[2].place && o[2].place < o[3].place);
    pair_close(&p);
}

TEST_WAYS(peer_closes_while_a_read_is_held_up, 20) { held_up((const way *)arg, 1); }
TEST_WAYS(closes_while_a_read_is_held_up, 20) { held_up((const way *)arg, 0); }

/* The same before the pipe is connected, and by the end of the context. */
TEST_WAYS(close_before_agreed, 20) {
    const way *w = (const way *)arg;
    side s;
    pending mine;
    memset(&s, 0, sizeof s);
    s.threads = w->threads;
    s.ctx = context(w->transports, w->threads);
    tprpc_listener *listener = listen_on(s.ctx, w->address, 0);
    s.pipe = connect_to(s.ctx, tprpc_listener_address(listener, NULL), 0, 0);
    pending_begin(&mine, s.pipe);
    tprpc_pipe_close(s.pipe);
    pending_wait(&mine, &s);
    pending_check(&mine, TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

TEST_WAYS(destroy_ends_all, 20) {
    pair p;
    pending a, b;
    accepting accept;
    memset(&accept, 0, sizeof accept);
    pair_open_way(&p, arg, 0);
    pending_begin(&a, p.a);
    pending_begin(&b, p.b);
    CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
    idle(&p.s, 5000);
    CHECK_EQ_INT(tprpc_context_destroy(p.s.ctx), TPRPC_OK);   /* with its pipe, its listener, and all that is pending */
    for (int i = 0; i < MANY; i++) {                          /* some have read a message of the other's by now */
        CHECK_EQ_INT(a.writes[i].runs, 1);
        CHECK_EQ_INT(a.writes[i].releases, i % 2);
        CHECK_EQ_INT(a.reads[i].runs, 1);
        CHECK_EQ_INT(a.descriptors[i].runs, 1);
    }
    CHECK_EQ_INT(accept.o.runs, 1);
    CHECK_EQ_INT(accept.o.status, TPRPC_ERROR_CLOSED);
    CHECK(pthread_equal(accept.o.thread, pthread_self()));    /* callbacks that are left run on who destroys */
    CHECK_EQ_INT(tprpc_context_destroy(p.s.also), TPRPC_OK);
    for (int i = 0; i < MANY; i++) {
        CHECK_EQ_INT(b.writes[i].runs, 1);
        CHECK_EQ_INT(b.writes[i].releases, i % 2);
        CHECK_EQ_INT(b.reads[i].runs, 1);
        CHECK_EQ_INT(b.descriptors[i].runs, 1);
    }
    free(a.memory);
    free(b.memory);
}

TEST_WAYS(destroy_ends_pending, 20) {
    pair p;
    pending b;
    pair_open_way(&p, arg, 1);
    pending_begin(&b, p.b);
    CHECK_EQ_INT(tprpc_context_destroy(p.s.also), TPRPC_OK);
    pending_check(&b, TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(tprpc_context_destroy(p.s.ctx), TPRPC_OK);
}

/* A pipe closed in its own callbacks, of each kind. */
typedef struct closer { outcome o; tprpc_pipe *pipe; tprpc_listener *listener; } closer;
static void close_written(tprpc_status status, const tprpc_error *error, void *user) {
    tprpc_pipe_close(((closer *)user)->pipe);
    outcome_set(&((closer *)user)->o, status, error);
}
static void close_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    char first = m && m->metadata_size ? *(const char *)m->metadata : 0;
    tprpc_pipe_close(((closer *)user)->pipe);
    if (m && m->metadata_size) CHECK_EQ_INT(*(const char *)m->metadata, first);   /* valid until this returns */
    outcome_set(&((closer *)user)->o, status, error);
}
static void close_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    tprpc_pipe_close(pipe);
    tprpc_listener_close(((closer *)user)->listener);
    outcome_set(&((closer *)user)->o, status, error);
}
static void close_release(void *user) { tprpc_pipe_close(((closer *)user)->pipe); ADD(((closer *)user)->o.releases,
    1); }

TEST_WAYS(close_in_callback, 20) {
    for (int kind = 0; kind < 4; kind++) {
        pair p;
        closer c;
        outcome rest[3];
        tprpc_message m = text_message("close");
        memset(&c, 0, sizeof c);
        memset(rest, 0, sizeof rest);
        pair_open_way(&p, arg, kind % 2);
        c.pipe = p.a;
        CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
        if (kind == 3) m.release = close_release;
        m.release_user = &c;
        if (kind == 0) CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, close_written, &c), TPRPC_OK);
        if (kind == 1) CHECK_EQ_INT(tprpc_pipe_read(p.a, NULL, close_read, &c), TPRPC_OK);
        if (kind == 2) CHECK_EQ_INT(tprpc_pipe_read_descriptor(p.a, close_read, &c), TPRPC_OK);
        if (kind == 3) CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &c.o), TPRPC_OK);
        WAIT(&p.s, c.o.runs, 1);
        CHECK_EQ_INT(c.o.status, TPRPC_OK);
        CHECK_EQ_INT(c.o.releases, kind == 3);
        if (tprpc_pipe_read(p.b, NULL, on_read, &rest[0]) == TPRPC_OK) WAIT(&p.s, rest[0].runs, 1);
        p.a = NULL;
        pair_close(&p);
    }
}

TEST_WAYS(close_while_accepting, 20) {
    const way *w = (const way *)arg;
    side s;
    closer c;
    outcome o;
    accepting three[3];
    memset(&s, 0, sizeof s);
    memset(&c, 0, sizeof c);
    memset(&o, 0, sizeof o);
    memset(three, 0, sizeof three);
    s.threads = w->threads;
    s.ctx = context(w->transports, w->threads);
    c.listener = listen_on(s.ctx, w->address, 0);
    CHECK_EQ_INT(tprpc_accept(c.listener, close_accepted, &c), TPRPC_OK);
    for (int i = 0; i < 3; i++) CHECK_EQ_INT(tprpc_accept(c.listener, on_accepted, &three[i]), TPRPC_OK);
    s.pipe = connect_to(s.ctx, tprpc_listener_address(c.listener, NULL), 0, 0);
    tprpc_status reading = tprpc_pipe_read(s.pipe, NULL, on_read, &o);
    if (reading == TPRPC_OK) {                   /* else it has been closed by now */
        WAIT(&s, o.runs, 1);
        reading = o.status;
    }
    CHECK_EQ_INT(reading, TPRPC_ERROR_PEER);
    WAIT(&s, c.o.runs, 1);
    CHECK_EQ_INT(c.o.status, TPRPC_OK);
    for (int i = 0; i < 3; i++) {
        WAIT(&s, three[i].o.runs, 1);
        CHECK_EQ_INT(three[i].o.status, TPRPC_ERROR_CLOSED);
    }
    tprpc_pipe_close(s.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

/* Connections come before anybody asks for them, and are handed over in turn; a listener that closes ends those that
   wait. */
TEST_WAYS(accept_after_connect, 20) {
    const way *w = (const way *)arg;
    side s;
    tprpc_pipe *pipes[4];
    accepting got[3];
    outcome o[4];
    memset(&s, 0, sizeof s);
    memset(got, 0, sizeof got);
    memset(o, 0, sizeof o);
    s.threads = w->threads;
    s.ctx = context(w->transports, w->threads);
    s.also = context(w->transports, w->threads);
    s.listener = listen_on(s.ctx, w->address, 0);
    for (int i = 0; i < 4; i++) {
        tprpc_message m = text_message("early");
        pipes[i] = connect_to(s.also, tprpc_listener_address(s.listener, NULL), 0, 0);
        CHECK_EQ_INT(tprpc_pipe_write(pipes[i], &m, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(pipes[i], NULL, on_read, &o[i]), TPRPC_OK);
    }
    idle(&s, 50000);
    for (int i = 0; i < 3; i++) CHECK_EQ_INT(tprpc_accept(s.listener, on_accepted, &got[i]), TPRPC_OK);
    for (int i = 0; i < 3; i++) {
        outcome read;
        memset(&read, 0, sizeof read);
        WAIT(&s, got[i].o.runs, 1);
        REQUIRE_EQ_INT(got[i].o.status, TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(got[i].pipe, NULL, on_read, &read), TPRPC_OK);
        WAIT(&s, read.runs, 1);
        CHECK_EQ_INT(read.status, TPRPC_OK);
    }
    tprpc_listener_close(s.listener);                      /* with the fourth in its queue */
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    s.ctx = s.also;
    s.also = NULL;
    for (int i = 0; i < 4; i++) {
        WAIT(&s, o[i].runs, 1);
        CHECK_EQ_INT(o[i].status, TPRPC_ERROR_PEER);
    }
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

/* Whole messages that came before the peer closed are still read; then PEER. */
TEST_WAYS(unread_when_peer_closes, 20) {
    enum { N = 20 };
    for (int how = 0; how < 3; how++) {
        pair p;
        outcome writes[N], reads[N + 1];
        char texts[N][8];
        memset(writes, 0, sizeof writes);
        memset(reads, 0, sizeof reads);
        pair_open_way(&p, arg, 0);
        for (int i = 0; i < N; i++) {
            snprintf(texts[i], sizeof texts[i], "%d", i);
            tprpc_message m = text_message(texts[i]);
            CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &writes[i]), TPRPC_OK);
        }
        for (int i = 0; i < N; i++) WAIT(&p.s, writes[i].runs, 1);
        if (how == 0) { tprpc_pipe_close(p.a); p.a = NULL; }
        if (how == 1) { CHECK_EQ_INT(tprpc_context_destroy(p.s.ctx), TPRPC_OK); p.a = NULL; p.s.listener = NULL; }
        if (how == 1) { p.s.ctx = p.s.also; p.s.also = NULL; }
        if (how == 2) { tprpc_pipe_close(p.a); p.a = NULL; idle(&p.s, 20000); }
        for (int i = 0; i <= N; i++) {
            tprpc_status status = tprpc_pipe_read(p.b, NULL, on_read, &reads[i]);
            if (i < N) REQUIRE_EQ_INT(status, TPRPC_OK);
            if (status == TPRPC_OK) {
                WAIT(&p.s, reads[i].runs, 1);
                status = reads[i].status;
            }
            CHECK_EQ_INT(status, i < N ? TPRPC_OK : TPRPC_ERROR_PEER);
        }
        if (how == 1) {
            tprpc_pipe_close(p.b);
            CHECK_EQ_INT(tprpc_context_destroy(p.s.ctx), TPRPC_OK);
        } else {
            pair_close(&p);
        }
    }
}

/* ---- deaths ---- */

typedef struct doomed { const way *w; common *shared; int writes; } doomed;

/* The child connects, and writes or reads large tensors until it is killed. */
static void doomed_run(void *arg) {
    static outcome o[64];
    doomed *d = (doomed *)arg;
    side s;
    tprpc_payload payload;
    tprpc_message m;
    memset(&s, 0, sizeof s);
    memset(&payload, 0, sizeof payload);
    memset(&m, 0, sizeof m);
    s.threads = d->w->threads;
    s.ctx = context(d->w->transports, s.threads);
    WAIT(&s, d->shared->stage[0], 1);
    s.pipe = connect_to(s.ctx, d->shared->address, 0, 0);
    payload.size = 32 << 20;
    payload.data = filled(payload.size, 1);
    m.payloads = &payload;
    m.payload_count = 1;
    m.release = on_release;
    for (size_t i = 0; i < COUNT(o); i++) {
        m.release_user = &o[i];
        if (d->writes) REQUIRE_EQ_INT(tprpc_pipe_write(s.pipe, &m, on_written, &o[i]), TPRPC_OK);
        else REQUIRE_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_read, &o[i]), TPRPC_OK);
    }
    for (;;) work(&s);
}

/* Forks the child that runs `run`, and takes in its pipe as s->pipe. */
static pid_t doomed_open(side *s, doomed *d, void (*run)(void *arg)) {
    accepting accept;
    void *memory = mmap(NULL, sizeof(common), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    d->shared = (common *)memory;
    const pid_t child = test_fork_run(run, d);
    memset(s, 0, sizeof *s);
    memset(&accept, 0, sizeof accept);
    s->threads = d->w->threads;
    s->ctx = context(d->w->transports, s->threads);
    s->listener = listen_on(s->ctx, d->w->address, 0);
    snprintf(d->shared->address, sizeof d->shared->address, "%s", tprpc_listener_address(s->listener, NULL));
    CHECK_EQ_INT(tprpc_accept(s->listener, on_accepted, &accept), TPRPC_OK);
    STORE(d->shared->stage[0], 1);
    WAIT(s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    s->pipe = accept.pipe;
    return child;
}

static void doomed_close(side *s, doomed *d) {
    tprpc_pipe_close(s->pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_OK);
    munmap(d->shared, sizeof *d->shared);
}

static void killed(const way *w, int child_writes) {
    static outcome o[64];
    doomed d = {w, NULL, child_writes};
    side s;
    tprpc_payload payload;
    tprpc_message m;
    const pid_t child = doomed_open(&s, &d, doomed_run);
    memset(&payload, 0, sizeof payload);
    memset(&m, 0, sizeof m);
    payload.size = 32 << 20;
    payload.data = filled(payload.size, 1);
    m.payloads = &payload;
    m.payload_count = 1;
    m.release = on_release;
    for (size_t i = 0; i < COUNT(o); i++) {
        m.release_user = &o[i];
        if (child_writes) REQUIRE_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_read, &o[i]), TPRPC_OK);
        else REQUIRE_EQ_INT(tprpc_pipe_write(s.pipe, &m, on_written, &o[i]), TPRPC_OK);
    }
    WAIT(&s, o[0].runs, 1);
    CHECK_EQ_INT(o[0].status, TPRPC_OK);
    for (int i = 0; i < 5; i++) work(&s);        /* into the middle of the next */
    kill(child, SIGKILL);
    int64_t begin = test_now_us();
    WAIT(&s, o[COUNT(o) - 1].runs, 1);
    CHECK_LE_INT(test_now_us() - begin, 5000000 * TEST_SLOWDOWN);
    for (size_t i = 0; i < COUNT(o); i++) {
        WAIT(&s, o[i].runs, 1);
        bool late = i + 9 > COUNT(o) && i + 1 < COUNT(o);   /* the last may go another way, and sooner */
        if (late) CHECK_EQ_INT(o[i].status, TPRPC_ERROR_PEER);
        else CHECK(o[i].status == TPRPC_OK || o[i].status == TPRPC_ERROR_PEER);
        CHECK_EQ_INT(o[i].releases, !child_writes);
    }
    CHECK(o[COUNT(o) - 2].text[0] != 0);
    CHECK_EQ_INT(test_wait_child(child, 5), 128 + SIGKILL);
    doomed_close(&s, &d);
    free(payload.data);
}

TEST_WAYS(killed_while_writing, 30) { killed((const way *)arg, 1); }
TEST_WAYS(killed_while_reading, 30) { killed((const way *)arg, 0); }

/* ---- what a process wrote before it ended ---- */

enum { WORDS = 8, WORD_BYTES = 100000 };   /* together what tcp takes without a reader, and more than one turn reads */

static void fill_word(uint8_t *out, int i) {
    fill(out, WORD_BYTES, (uint64_t)i + 7);
}

/* Writes, waits until the medium has it all, forks where a child is to hold the connection, and ends. */
static void speaker_run(void *arg) {
    static uint8_t words[WORDS][WORD_BYTES];
    static outcome o[WORDS];
    doomed *d = (doomed *)arg;
    side s;
    tprpc_message m;
    memset(&s, 0, sizeof s);
    memset(&m, 0, sizeof m);
    s.threads = d->w->threads;
    s.ctx = context(d->w->transports, s.threads);
    WAIT(&s, d->shared->stage[0], 1);
    s.pipe = connect_to(s.ctx, d->shared->address, 0, 0);
    for (int i = 0; i < WORDS; i++) {
        fill_word(words[i], i);
        m.metadata = words[i];
        m.metadata_size = WORD_BYTES;
        REQUIRE_EQ_INT(tprpc_pipe_write(s.pipe, &m, on_written, &o[i]), TPRPC_OK);
    }
    for (int i = 0; i < WORDS; i++) WAIT(&s, o[i].runs, 1);
    pid_t holder = d->writes ? fork() : 1;
    if (holder == 0) for (;;) pause();
    REQUIRE(holder > 0);
    STORE(d->shared->stage[1], (int)holder);
    _exit(0);
}

typedef struct word { outcome o; uint8_t bytes[WORD_BYTES]; } word;

static void on_word(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    word *w = (word *)user;
    if (status == TPRPC_OK && CHECK_EQ_INT(m->metadata_size, WORD_BYTES)) memcpy(w->bytes, m->metadata, WORD_BYTES);
    outcome_set(&w->o, status, error);
}

/* All of it is read, though the reader looks long after the end; then the end is told, though a child holds it. */
static void last_words(const way *w, int held) {
    static word words[WORDS + 1];
    static uint8_t expected[WORD_BYTES];
    doomed d = {w, NULL, held};
    side s;
    prctl(PR_SET_CHILD_SUBREAPER, 1);             /* the holder becomes this process's, which ends it */
    const pid_t child = doomed_open(&s, &d, speaker_run);
    while (!LOAD(d.shared->stage[1])) {
        if (strncmp(w->name, "tcp", 3) == 0) test_sleep_us(1000);
        else work(&s);                            /* a ring is smaller */
    }
    CHECK_EQ_INT(test_wait_child(child, 5), 0);
    test_sleep_us(150000);                        /* who is polled is away; what has come is not asked for */
    for (int i = 0; i < WORDS; i++) {
        REQUIRE_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_word, &words[i]), TPRPC_OK);
        idle(&s, 10000);
        fill_word(expected, i);
        WAIT(&s, words[i].o.runs, 1);
        CHECK_EQ_INT(words[i].o.status, TPRPC_OK);
        CHECK_MEM(words[i].bytes, expected, WORD_BYTES);
    }
    if (tprpc_pipe_read(s.pipe, NULL, on_word, &words[WORDS]) == TPRPC_OK) {   /* else its end is known already */
        WAIT(&s, words[WORDS].o.runs, 1);
        CHECK_EQ_INT(words[WORDS].o.status, TPRPC_ERROR_PEER);
    }
    if (held) kill(LOAD(d.shared->stage[1]), SIGKILL);
    if (held) CHECK_EQ_INT(waitpid(LOAD(d.shared->stage[1]), NULL, 0), LOAD(d.shared->stage[1]));
    doomed_close(&s, &d);
}

TEST_WAYS(last_words, 30) { last_words((const way *)arg, 0); }
TEST_WAYS(last_words_before_a_child_holds_the_pipe, 30) { last_words((const way *)arg, 1); }

/* ---- shared memory that is not there ---- */

static const char *missing_call;       /* that the system does not know */

static int fail_missing(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, LOAD(missing_call)) == 0 ? ENOSYS : 0;
}

static void miss(const char *call) {
    if (call) STORE(missing_call, call);
    STORE(tprpc_test_hook, call ? fail_missing : NULL);
}

/* A tensor of 1 MiB there and back: what came is sent. */
static void pair_echo(pair *p) {
    enum { SIZE = 1 << 20 };
    uint8_t *there = (uint8_t *)filled(SIZE, 21), *back = (uint8_t *)bytes(SIZE);
    tprpc_tensor tensor;
    tprpc_message m;
    memset(&tensor, 0, sizeof tensor);
    memset(&m, 0, sizeof m);
    m.tensors = &tensor;
    m.tensor_count = 1;
    tensor.size = SIZE;
    for (int turn = 0; turn < 2; turn++) {
        outcome o[3];
        memset(o, 0, sizeof o);
        tensor.data = there;
        CHECK_EQ_INT(tprpc_pipe_write(turn ? p->a : p->b, &m, on_written, &o[0]), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read_descriptor(turn ? p->b : p->a, on_described, &o[1]), TPRPC_OK);
        WAIT(&p->s, o[1].runs, 1);
        tensor.data = back;
        CHECK_EQ_INT(tprpc_pipe_read(turn ? p->b : p->a, &m, on_read, &o[2]), TPRPC_OK);
        WAIT(&p->s, o[2].runs, 1);
        WAIT(&p->s, o[0].runs, 1);
        CHECK_EQ_INT(o[0].status, TPRPC_OK);
        CHECK_EQ_INT(o[2].status, TPRPC_OK);
        CHECK(matches(back, SIZE, 21));
        memset(there, 0, SIZE);
        memcpy(there, back, SIZE);
    }
    free(there);
    free(back);
}

/* The pipe goes over tcp, and says of shm why not: each end what it knows (NULL: it is not looked at). */
static void check_on_tcp(pair *p, const char *at_listener, const char *at_connector) {
    const char *const whys[2] = {at_listener, at_connector};
    for (int i = 0; i < 2; i++) {
        tprpc_pipe_info info;
        CHECK_EQ_INT(tprpc_pipe_get_info(i ? p->b : p->a, &info, sizeof info), TPRPC_OK);
        CHECK_STR(info.transport, "tcp");
        CHECK(path_of(&info, "tcp")->chosen);
        CHECK(!path_of(&info, "shm")->chosen);
        CHECK_CONTAINS(path_of(&info, "shm")->why, whys[i]);
        CHECK(strstr(path_of(&info, "shm")->why, "another transport") == NULL);
    }
}

/* One of the contexts, or both, are created where memfds or UNIX sockets are not: then it is tcp, and the info says
   why. */
static void shm_is_missing(const char *call, const char *why, int threads) {
    for (int who = 1; who < 4; who++) {          /* bits: who listens; who connects */
        pair p;
        tprpc_context_desc desc;
        tprpc_context *none = NULL;
        tprpc_error error;
        memset(&p, 0, sizeof p);
        memset(&desc, 0, sizeof desc);
        memset(&error, 0, sizeof error);
        p.s.threads = threads;
        miss(who & 1 ? call : NULL);
        p.s.ctx = context(NULL, threads);
        miss(who & 2 ? call : NULL);
        p.s.also = context(NULL, threads);
        miss(NULL);
        pair_connect(&p, "tcp://127.0.0.1:0", 0);
        pair_echo(&p);
        check_on_tcp(&p, who & 1 ? why : "does not offer", who & 2 ? why : "does not offer");
        check_on_tcp(&p, who & 1 ? strerror(ENOSYS) : "", who & 2 ? strerror(ENOSYS) : "");
        if (who & 1) {
            static const char *const address = "shm://";
            tprpc_listener *listener = NULL;
            tprpc_listener_desc listening;
            memset(&listening, 0, sizeof listening);
            listening.addresses = &address;
            listening.address_count = 1;
            CHECK_EQ_INT(tprpc_listen(p.s.ctx, &listening, &listener, &error), TPRPC_ERROR_UNSUPPORTED);
            CHECK_CONTAINS(error.text, why);
        }
        pair_close(&p);
        desc.transports = "shm";                 /* nothing else is allowed: said when it is created */
        miss(call);
        CHECK_EQ_INT(tprpc_context_create(&desc, &none, &error), TPRPC_ERROR_UNSUPPORTED);
        miss(NULL);
        CHECK_CONTAINS(error.text, why);
    }
}

TEST(no_memfd_polled) { shm_is_missing("memfd_create", "memfd", 0); }
TEST(no_memfd_threaded) { shm_is_missing("memfd_create", "memfd", 1); }
TEST(no_unix_sockets_polled) { shm_is_missing("socket_unix", "UNIX socket", 0); }
TEST(no_unix_sockets_threaded) { shm_is_missing("socket_unix", "UNIX socket", 1); }

/* What was there when the contexts were created is not when the pipe is to be moved, or when the listener listens. */
static void shm_goes_missing(const char *call, int threads) {
    for (int late = 0; late < 2; late++) {
        pair p;
        int fds = 0;
        bool listens = late || strcmp(call, "socket_unix") != 0;
        memset(&p, 0, sizeof p);
        p.s.threads = threads;
        p.s.ctx = context(NULL, threads);
        p.s.also = context(NULL, threads);
        if (!late) miss(call);
        p.s.listener = listen_on(p.s.ctx, "tcp://127.0.0.1:0", 0);
        for (int round = 0; round < 3; round++) {
            accepting accept;
            memset(&accept, 0, sizeof accept);
            if (round == 2) miss(NULL);
            else miss(call);
            if (round == 1) fds = test_count_fds();
            CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
            p.b = connect_to(p.s.also, tprpc_listener_address(p.s.listener, NULL), 0, 0);
            WAIT(&p.s, accept.o.runs, 1);
            REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
            p.a = accept.pipe;
            pair_echo(&p);
            if (round < 2 || !listens) {
                check_on_tcp(&p, "has not moved", listens ? strerror(ENOSYS) : "listen");
            } else {
                tprpc_pipe_info info;
                CHECK_EQ_INT(tprpc_pipe_get_info(p.b, &info, sizeof info), TPRPC_OK);
                CHECK_STR(info.transport, "shm");
            }
            tprpc_pipe_close(p.a);
            tprpc_pipe_close(p.b);
            idle(&p.s, 2000);
            if (round == 1) CHECK_LE_INT(test_count_fds(), fds);
        }
        p.a = p.b = NULL;
        pair_close(&p);
    }
}

TEST(memfd_goes_missing_polled) { shm_goes_missing("memfd_create", 0); }
TEST(memfd_goes_missing_threaded) { shm_goes_missing("memfd_create", 1); }
TEST(unix_sockets_go_missing_polled) { shm_goes_missing("socket_unix", 0); }
TEST(unix_sockets_go_missing_threaded) { shm_goes_missing("socket_unix", 1); }

/* ---- memory that is not there ---- */

static int allocations, missing_allocation, blocked_sends;

static int fail_allocation(const char *call, int64_t *size) {
    (void)size;
    return strcmp(call, "alloc") == 0 && ADD(allocations, 1) == missing_allocation ? ENOMEM : 0;
}

/* None from there on; and for a while nothing can be sent, so that to say something would need memory too. */
static int fail_allocations(const char *call, int64_t *size) {
    (void)size;
    if (strcmp(call, "send") == 0)
        return LOAD(allocations) >= missing_allocation && ADD(blocked_sends, 1) < 400 ? EAGAIN : 0;
    return strcmp(call, "alloc") == 0 && ADD(allocations, 1) >= missing_allocation ? ENOMEM : 0;
}

/* Both ends hear of it, whichever allocation on the way of a large message fails: none waits for the other. */
static void memory_is_missing(const char *channels, const char *transports,
                              int (*hook)(const char *call, int64_t *size)) {
    uint8_t *large = (uint8_t *)filled(1 << 20, 3);
    int failures = 0;
    for (missing_allocation = 1; missing_allocation < 100 && failures == missing_allocation - 1; missing_allocation++) {
        tprpc_context_desc desc;
        tprpc_tensor tensors[20];                /* each takes a block: some are of no pool */
        tprpc_message m;
        outcome o[2];
        pair p;
        memset(&desc, 0, sizeof desc);
        memset(tensors, 0, sizeof tensors);
        memset(&m, 0, sizeof m);
        memset(o, 0, sizeof o);
        memset(&p, 0, sizeof p);
        desc.channels = channels;
        desc.transports = transports;
        REQUIRE_EQ_INT(tprpc_context_create(&desc, &p.s.ctx, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_context_create(&desc, &p.s.also, NULL), TPRPC_OK);
        pair_connect(&p, "tcp://127.0.0.1:0", 0);
        for (size_t i = 0; i < COUNT(tensors); i++) {
            tensors[i].data = large;
            tensors[i].size = (64 << 10) + i;
        }
        m.tensors = tensors;
        m.tensor_count = COUNT(tensors);
        m.release = on_release;
        m.release_user = &o[0];
        idle(&p.s, 1000);
        allocations = blocked_sends = 0;
        STORE(tprpc_test_hook, hook);
        const bool reads = tprpc_pipe_read(p.a, NULL, on_read, &o[1]) == TPRPC_OK;
        const bool writes = tprpc_pipe_write(p.b, &m, on_written, &o[0]) == TPRPC_OK;
        if (writes) WAIT(&p.s, o[0].runs, 1);
        if (writes && reads) WAIT(&p.s, o[1].runs, 1);
        STORE(tprpc_test_hook, NULL);
        failures += allocations >= missing_allocation;
        CHECK_EQ_INT(o[0].releases, 1);
        pair_close(&p);
        if (reads) CHECK_EQ_INT(o[1].runs, 1);
    }
    printf("%d allocations failed\n", failures);
    CHECK(failures > 3);
    free(large);
}

TEST(no_memory_on_the_way_basic) { memory_is_missing("basic", NULL, fail_allocation); }
TEST(no_memory_on_the_way_xth) { memory_is_missing("xth,basic", NULL, fail_allocation); }
TEST(no_memory_from_there_on_basic) { memory_is_missing("basic", "tcp", fail_allocations); }
TEST(no_memory_from_there_on_xth) { memory_is_missing("xth,basic", "tcp", fail_allocations); }

/* ---- fork ---- */

static void in_child(void *arg) {
    pair *p = (pair *)arg;
    tprpc_pipe_info info;
    tprpc_pipe_desc desc;
    tprpc_pipe *pipe = NULL;
    tprpc_message m = text_message("child");
    outcome never;
    accepting accept;
    tprpc_error error;
    memset(&never, 0, sizeof never);
    memset(&accept, 0, sizeof accept);
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.address = "tcp://127.0.0.1:9";
    refused(p->a, &m, TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_pipe_read(p->a, NULL, on_read, &never), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_pipe_read_descriptor(p->a, on_described, &never), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_pipe_get_info(p->a, &info, sizeof info), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_accept(p->s.listener, on_accepted, &accept), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_connect(p->s.ctx, &desc, &pipe, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_context_destroy(p->s.ctx), TPRPC_ERROR_INVALID);
    CHECK(!tprpc_poll(p->s.ctx, 1000, 0));
    tprpc_wake(p->s.ctx);
    tprpc_pipe_close(p->a);
    tprpc_listener_close(p->s.listener);
    CHECK_EQ_INT(never.runs, 0);
    tprpc_context *own = context("tcp", 0);      /* one of its own is fine */
    CHECK_EQ_INT(tprpc_context_destroy(own), TPRPC_OK);
}

TEST_WAYS(forked_child_is_refused, 20) {
    pair p;
    pair_open_way(&p, arg, 0);
    pid_t child = test_fork_run(in_child, &p);
    pair_check(&p);
    CHECK_EQ_INT(test_wait_child(child, 10), 0);
    pair_check(&p);
    pair_close(&p);
}

/* Programs that are started while messages fly inherit nothing. */
TEST_WAYS(exec_inherits_nothing, 30) {
    pair p;
    tprpc_tensor tensor;
    tprpc_message m;
    memset(&tensor, 0, sizeof tensor);
    memset(&m, 0, sizeof m);
    tensor.size = 1 << 20;
    tensor.data = filled(tensor.size, 1);
    m.tensors = &tensor;
    m.tensor_count = 1;
    pair_open_way(&p, arg, 0);
    for (int round = 0; round < 10; round++) {
        char text[4000];
        size_t have = 0;
        outcome o[2];
        int ends[2];
        memset(o, 0, sizeof o);
        CHECK_EQ_INT(tprpc_pipe_write(p.a, &m, on_written, &o[0]), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(p.b, NULL, on_read, &o[1]), TPRPC_OK);
        work(&p.s);
        REQUIRE(pipe2(ends, O_CLOEXEC) == 0);
        pid_t child = fork();
        REQUIRE(child >= 0);
        if (child == 0) {
            dup2(ends[1], 1);
            execl("/bin/sh", "sh", "-c", "ls -l /proc/self/fd", (char *)NULL);
            _exit(127);
        }
        close(ends[1]);
        for (;;) {
            ssize_t n = read(ends[0], text + have, sizeof text - 1 - have);
            if (n <= 0) break;
            have += (size_t)n;
        }
        text[have] = 0;
        close(ends[0]);
        CHECK_EQ_INT(test_wait_child(child, 10), 0);
        CHECK_CONTAINS(text, "->");
        if (strstr(text, "socket:") || strstr(text, "anon_inode") || strstr(text, "memfd"))
            CHECK_STR(text, "no descriptor of ours");
        WAIT(&p.s, o[0].runs, 1);
        WAIT(&p.s, o[1].runs, 1);
    }
    pair_close(&p);
    free(tensor.data);
}

/* ---- threads, nesting ---- */

typedef struct nest { pair *p; outcome o, written, read; int nests; } nest;
static void nest_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    nest *n = (nest *)user;
    tprpc_message reply = text_message("reply");
    char first = m && m->metadata_size ? *(const char *)m->metadata : 0;
    CHECK_EQ_INT(tprpc_context_destroy(n->p->s.ctx), TPRPC_ERROR_INVALID);
    if (n->nests) {                              /* a whole exchange by polls inside of a callback */
        CHECK_EQ_INT(tprpc_pipe_write(n->p->a, &reply, on_written, &n->written), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(n->p->b, NULL, on_read, &n->read), TPRPC_OK);
        WAIT(&n->p->s, n->read.runs, 1);
        idle(&n->p->s, 5000);
        CHECK_EQ_INT(LOAD(n->written.runs), 0);  /* callbacks of one pipe never run in one another */
    }
    CHECK(m && *(const char *)m->metadata == first);
    outcome_set(&n->o, status, error);
}

TEST_WAYS(nested_in_callback, 20) {
    pair p;
    nest n;
    tprpc_message m = text_message("request");
    pair_open_way(&p, arg, 0);
    memset(&n, 0, sizeof n);
    n.p = &p;
    n.nests = ((const way *)arg)->threads == 0;
    CHECK_EQ_INT(tprpc_pipe_read(p.a, NULL, nest_read, &n), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
    WAIT(&p.s, n.o.runs, 1);
    if (n.nests) WAIT(&p.s, n.written.runs, 1);
    pair_check(&p);
    pair_close(&p);
}

static void *poll_elsewhere(void *arg) {
    side *s = (side *)arg;
    for (int i = 0; i < 200; i++) work(s);
    return NULL;
}

static void *bind_and_wait(void *arg) {
    pair *p = (pair *)arg;
    tprpc_context_bind_thread(p->s.ctx);
    tprpc_context_bind_thread(p->s.also);
    pair_check(p);
    return NULL;
}

/* Callbacks run on the bound thread alone, whoever else moves bytes; with threads, on one of the library's. */
TEST_WAYS(callback_thread, 20) {
    const way *w = (const way *)arg;
    pair p;
    outcome wrote, got;
    pthread_t thread;
    tprpc_message m = text_message("thread");
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    pair_open_way(&p, arg, 0);
    CHECK_EQ_INT(tprpc_pipe_read(p.a, NULL, on_read, &got), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, on_written, &wrote), TPRPC_OK);
    if (w->threads == 0) {
        REQUIRE(pthread_create(&thread, NULL, poll_elsewhere, &p.s) == 0);
        pthread_join(thread, NULL);
        CHECK_EQ_INT(LOAD(got.runs), 0);
        CHECK_EQ_INT(LOAD(wrote.runs), 0);
    }
    WAIT(&p.s, got.runs, 1);
    WAIT(&p.s, wrote.runs, 1);
    CHECK_EQ_INT(pthread_equal(got.thread, pthread_self()) != 0, w->threads == 0);
    CHECK_EQ_INT(pthread_equal(wrote.thread, pthread_self()) != 0, w->threads == 0);
    if (w->threads == 0) {
        REQUIRE(pthread_create(&thread, NULL, bind_and_wait, &p) == 0);
        pthread_join(thread, NULL);
        memset(&got, 0, sizeof got);
        CHECK_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_read(p.a, NULL, on_read, &got), TPRPC_OK);
        idle(&p.s, 20000);
        CHECK_EQ_INT(LOAD(got.runs), 0);         /* this thread is bound no more */
        tprpc_context_bind_thread(p.s.ctx);
        tprpc_context_bind_thread(p.s.also);
        WAIT(&p.s, got.runs, 1);
        CHECK(pthread_equal(got.thread, pthread_self()));
    }
    pair_close(&p);
}

static void *wake_later(void *arg) {
    test_sleep_us(50000);
    tprpc_wake((tprpc_context *)arg);
    return NULL;
}

TEST(wake_ends_a_poll) {
    tprpc_context *ctx = context(NULL, 0);
    pthread_t thread;
    for (int i = 0; i < 3; i++) {
        int64_t begin = test_now_us();
        REQUIRE(pthread_create(&thread, NULL, wake_later, ctx) == 0);
        CHECK(!tprpc_poll(ctx, i == 0 ? 20000000 : TPRPC_FOREVER, 0));
        CHECK_LE_INT(30000, test_now_us() - begin);
        CHECK_LE_INT(test_now_us() - begin, 10000000);
        pthread_join(thread, NULL);
    }
    int64_t begin = test_now_us();
    tprpc_wake(ctx);
    CHECK(!tprpc_poll(ctx, 20000000, 0));        /* the next one, at once */
    CHECK_LE_INT(test_now_us() - begin, 5000000);
    begin = test_now_us();
    CHECK(!tprpc_poll(ctx, 30000, 0));           /* and only that one */
    CHECK_LE_INT(29000, test_now_us() - begin);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- the budget ---- */

/* A clock that jumps when it is told to: by so much each time that it is read, or in a callback. */
typedef struct jumper { int64_t ahead_us, per_look_us, in_callback_us; int runs; } jumper;
static int64_t jumper_clock(void *user) {
    jumper *j = (jumper *)user;
    return test_now_us() / 1000 + (j->ahead_us += j->per_look_us);
}
static void jumper_read(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    jumper *j = (jumper *)user;
    CHECK_EQ_INT(status, TPRPC_OK);
    CHECK(m && !error);
    j->ahead_us += j->in_callback_us;
    j->runs++;
}

enum { BUDGET_COUNT = 8, BUDGET_BYTES = 4 << 20, BUDGET_PROBE = 4096 };

static void budget_open(pair *p, const way *w, const char *channels, jumper *j) {
    tprpc_context_desc desc;
    memset(&desc, 0, sizeof desc);
    memset(p, 0, sizeof *p);
    memset(j, 0, sizeof *j);
    desc.transports = w->transports;
    desc.channels = channels;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &p->s.also, NULL), TPRPC_OK);
    desc.clock_us = jumper_clock;
    desc.user = j;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &p->s.ctx, NULL), TPRPC_OK);
    pair_connect(p, w->address, 0);
}

/* How much of the memory has been received: it was 0, and 1 comes. */
static size_t budget_received(uint8_t *const *memory) {
    size_t bytes = 0;
    for (int i = 0; i < BUDGET_COUNT; i++)
        for (size_t at = 0; at < BUDGET_BYTES; at += BUDGET_PROBE) bytes += memory[i][at] ? BUDGET_PROBE : 0;
    return bytes;
}

static uint64_t budget_sent(tprpc_pipe *pipe) {
    tprpc_pipe_info info;
    REQUIRE_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    return info.bytes_sent;
}

static void on_nothing(void *user) { (void)user; }

/* The deadline passes as soon as the poll looks at the clock a second time, so all that it does is over the budget: a
   chunk (of 1 MiB at most) and a callback, whatever waits. It says that work was left, and in the end all came. */
static void budget_of(const way *w, const char *channels) {
    enum { CHUNK = 1 << 20 };
    pair p;
    jumper j;
    uint8_t *into[BUDGET_COUNT], *from = (uint8_t *)bytes(BUDGET_BYTES);
    outcome described[BUDGET_COUNT];
    int left = 0, polls = 0;
    size_t most = 0;
    tprpc_payload payload;
    tprpc_message m;
    memset(&payload, 0, sizeof payload);
    memset(&m, 0, sizeof m);
    memset(described, 0, sizeof described);
    memset(from, 1, BUDGET_BYTES);
    budget_open(&p, w, channels, &j);
    payload.data = from;
    payload.size = BUDGET_BYTES;
    m.payloads = &payload;
    m.payload_count = 1;
    m.release = on_nothing;                      /* it is lent */
    for (int i = 0; i < BUDGET_COUNT; i++) {
        REQUIRE_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p.a, on_described, &described[i]), TPRPC_OK);
        WAIT(&p.s, described[i].runs, 1);
        into[i] = (uint8_t *)calloc(1, BUDGET_BYTES);
        REQUIRE(into[i] != NULL);
    }
    for (int i = 0; i < BUDGET_COUNT; i++) {
        tprpc_message own = m;
        tprpc_payload where = payload;
        where.data = into[i];
        own.payloads = &where;
        REQUIRE_EQ_INT(tprpc_pipe_read(p.a, &own, jumper_read, &j), TPRPC_OK);
    }
    int64_t deadline = test_now_us() + 40000000;
    while (j.runs < BUDGET_COUNT) {
        size_t before = budget_received(into), moved;
        uint64_t sent = budget_sent(p.a);
        int runs = j.runs;
        REQUIRE(test_now_us() < deadline);
        j.per_look_us = 2000;
        left += tprpc_poll(p.s.ctx, TPRPC_NOW, 1000);
        j.per_look_us = 0;
        moved = budget_received(into) - before;
        if (moved > most) most = moved;
        CHECK_LE_INT(budget_sent(p.a) - sent, 4096);
        CHECK_LE_INT(j.runs - runs, 1);
        tprpc_poll(p.s.also, TPRPC_NOW, 0);
        polls++;
    }
    fprintf(stderr, "at most %d bytes in a poll, %d polls, %d left\n", (int)most, polls, left);
    CHECK_EQ_INT(budget_received(into), BUDGET_COUNT * BUDGET_BYTES);
    CHECK_LE_INT(most, CHUNK);
    CHECK_LE_INT(BUDGET_COUNT * BUDGET_BYTES / CHUNK, polls);
    CHECK_LE_INT(1, left);
    pair_close(&p);
    for (int i = 0; i < BUDGET_COUNT; i++) free(into[i]);
    free(from);
}
static void budget_basic_run(void *arg) { budget_of((const way *)arg, "basic"); }
static void budget_xth_run(void *arg) { budget_of((const way *)arg, "xth,basic"); }

/* Many callbacks wait, each of which takes longer than the budget: a poll runs one. */
static void budget_callbacks_run(void *arg) {
    enum { N = 60 };
    pair p;
    jumper j;
    tprpc_message m = text_message("small");
    budget_open(&p, (const way *)arg, NULL, &j);
    for (int i = 0; i < N; i++) {
        REQUIRE_EQ_INT(tprpc_pipe_read(p.a, NULL, jumper_read, &j), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_write(p.b, &m, NULL, NULL), TPRPC_OK);
    }
    idle(&p.s, 0);
    for (int i = 0; i < 20; i++) tprpc_poll(p.s.also, TPRPC_NOW, 0);
    j.in_callback_us = 2000;
    int64_t deadline = test_now_us() + 40000000;
    while (j.runs < N) {
        int runs = j.runs;
        REQUIRE(test_now_us() < deadline);
        bool left = tprpc_poll(p.s.ctx, TPRPC_NOW, 1000);
        CHECK_LE_INT(j.runs - runs, 1);
        if (j.runs > runs) CHECK(left);
    }
    pair_close(&p);
}

TESTS(budget) {                        /* of polled contexts: threads have none */
    for (size_t i = 0; i < COUNT(ways); i++) {
        char name[100];
        if (ways[i].threads) continue;
        snprintf(name, sizeof name, "budget.%s", ways[i].name);
        test_add(name, budget_basic_run, (void *)(uintptr_t)&ways[i], 60);
        snprintf(name, sizeof name, "budget_xth.%s", ways[i].name);
        test_add(name, budget_xth_run, (void *)(uintptr_t)&ways[i], 60);
        snprintf(name, sizeof name, "budget_callbacks.%s", ways[i].name);
        test_add(name, budget_callbacks_run, (void *)(uintptr_t)&ways[i], 60);
    }
}

/* ---- a foreign loop: poll(2) on the handle alone ---- */

static void foreign_wait(side *s, int *count, int least, int *sleeps) {
    int64_t deadline = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    while (tprpc_poll(s->ctx, TPRPC_NOW, 0), LOAD(*count) < least) {
        struct pollfd fd;
        int64_t left_us = 0;
        REQUIRE(test_now_us() < deadline);
        if (!tprpc_context_arm(s->ctx, &left_us)) continue;
        fd.fd = (int)tprpc_context_handle(s->ctx);
        fd.events = POLLIN;
        fd.revents = 0;
        ++*sleeps;
        int ready = poll(&fd, 1, left_us == TPRPC_FOREVER ? WAIT_S * 1000 : (int)(left_us / 1000) + 1);
        REQUIRE(ready > 0 || left_us != TPRPC_FOREVER);   /* asleep although there was work */
    }
}

static void foreign_body(side *s) {
    enum { ROUNDS = 200, LARGE = 3 << 20 };
    void *memory = filled(LARGE, 5);
    int sleeps = 0;
    for (int i = 0; i < ROUNDS; i++) {
        outcome wrote, got;
        tprpc_tensor tensor;
        tprpc_message m = text_message("foreign");
        memset(&wrote, 0, sizeof wrote);
        memset(&got, 0, sizeof got);
        memset(&tensor, 0, sizeof tensor);
        tensor.data = memory;
        tensor.size = i % 20 == 7 ? LARGE : i % 3 ? 0 : 20000;
        m.tensors = &tensor;
        m.tensor_count = 1;
        m.release = on_release;
        m.release_user = &wrote;
        for (int turn = 0; turn < 2; turn++) {
            if (turn == s->who) {
                if (i % 10 == 0) test_sleep_us(2000);     /* so that the other one sleeps for certain */
                REQUIRE_EQ_INT(tprpc_pipe_write(s->pipe, &m, on_written, &wrote), TPRPC_OK);
            } else {
                REQUIRE_EQ_INT(tprpc_pipe_read(s->pipe, NULL, on_read, &got), TPRPC_OK);
                foreign_wait(s, &got.runs, 1, &sleeps);
                REQUIRE_EQ_INT(got.status, TPRPC_OK);
            }
        }
        foreign_wait(s, &wrote.runs, 1, &sleeps);
    }
    CHECK_LE_INT(10, sleeps);
    free(memory);
}

TESTS(foreign) {
    static const job jobs[] = {
        {"tcp", "tcp://127.0.0.1:0", "tcp", 0, 1, 0, foreign_body}, {"tcp", "tcp://127.0.0.1:0", "tcp", 0, 2, 0,
            foreign_body},
        {"shm", "shm://", "shm", 0, 1, 0, foreign_body}, {"shm", "shm://", "shm", 0, 2, 0, foreign_body}};
    for (size_t i = 0; i < COUNT(jobs); i++) {
        char name[60];
        snprintf(name, sizeof name, "foreign_loop.%s.%s", jobs[i].expected,
            jobs[i].processes == 2 ? "processes" : "contexts");
        test_add(name, job_run, (void *)(uintptr_t)&jobs[i], 60);
    }
}

/* An idle armed context stays asleep, also between two idle peers. */
TEST(armed_and_idle) {
    pair p;
    struct pollfd fd;
    int64_t left_us;
    int wakes = 0;
    pair_open(&p, "shm", "shm://", 0, 0);
    pair_check(&p);
    idle(&p.s, 20000);
    int64_t end = test_now_us() + 300000;
    while (test_now_us() < end) {
        tprpc_poll(p.s.ctx, TPRPC_NOW, 0);
        if (!tprpc_context_arm(p.s.ctx, &left_us)) continue;
        fd.fd = (int)tprpc_context_handle(p.s.ctx);
        fd.events = POLLIN;
        poll(&fd, 1, 100);
        wakes++;
    }
    CHECK_LE_INT(wakes, 20);
    pair_close(&p);
}

/* ---- addresses, listeners of several ---- */

TEST(several_addresses) {
    static const char *const addresses[] = {"tcp://127.0.0.1:0", "shm://", "tcp://[::1]:0"};
    side s;
    tprpc_listener_desc desc;
    char list[3][128];
    memset(&s, 0, sizeof s);
    memset(&desc, 0, sizeof desc);
    s.ctx = context(NULL, 0);
    desc.addresses = addresses;
    desc.address_count = 3;
    REQUIRE_EQ_INT(tprpc_listen(s.ctx, &desc, &s.listener, NULL), TPRPC_OK);
    CHECK_STR(tprpc_listener_address(s.listener, NULL), tprpc_listener_address(s.listener, "tcp"));
    CHECK(tprpc_listener_address(s.listener, "shm") != NULL);
    CHECK(tprpc_listener_address(s.listener, "carrier") == NULL);
    snprintf(list[0], sizeof list[0], "%s", tprpc_listener_address(s.listener, "tcp"));
    snprintf(list[1], sizeof list[1], "%s", tprpc_listener_address(s.listener, "shm"));
    CHECK(strncmp(list[0], "tcp://127.0.0.1:", 16) == 0 && strcmp(list[0] + 16, "0") != 0);
    CHECK(strncmp(list[1], "shm://", 6) == 0 && list[1][6] != 0);
    for (int i = 0; i < 2; i++) {
        accepting accept;
        tprpc_pipe_info info;
        memset(&accept, 0, sizeof accept);
        s.also = context(i == 0 ? "tcp" : NULL, 0);
        s.pipe = connect_to(s.also, list[i], 0, 0);
        CHECK_EQ_INT(tprpc_accept(s.listener, on_accepted, &accept), TPRPC_OK);
        WAIT(&s, accept.o.runs, 1);
        REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
        CHECK_EQ_INT(tprpc_pipe_get_info(accept.pipe, &info, sizeof info), TPRPC_OK);
        CHECK_STR(info.transport, i == 0 ? "tcp" : "shm");
        if (i == 0) CHECK_CONTAINS(path_of(&info, "shm")->why, "does not offer");
        tprpc_pipe_close(s.pipe);
        tprpc_pipe_close(accept.pipe);
        CHECK_EQ_INT(tprpc_context_destroy(s.also), TPRPC_OK);
        s.also = NULL;
    }
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

/* Names of shm up to the limit are whole in the listener's address: one can connect to them, and move to them. */
TEST(long_shm_names) {
    static const size_t lengths[] = {60, 95, 96, 99, 100};
    for (size_t i = 0; i < COUNT(lengths) * 2; i++) {
        char name[128];
        const char *addresses[2] = {name, "tcp://127.0.0.1:0"};
        pair p;
        accepting accept;
        tprpc_listener_desc desc;
        tprpc_pipe_info info;
        int moves = (int)(i % 2);
        memset(&p, 0, sizeof p);
        memset(&accept, 0, sizeof accept);
        memset(&desc, 0, sizeof desc);
        memset(name, 'n', sizeof name);
        snprintf(name, sizeof name, "shm://%d.%d.", (int)i, (int)getpid());
        name[strlen(name)] = 'n';
        name[6 + lengths[i / 2]] = 0;
        p.s.ctx = context(NULL, 0);
        p.s.also = context(NULL, 0);
        desc.addresses = addresses;
        desc.address_count = 2;
        REQUIRE_EQ_INT(tprpc_listen(p.s.ctx, &desc, &p.s.listener, NULL), TPRPC_OK);
        CHECK_STR(tprpc_listener_address(p.s.listener, "shm"), name);
        CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
        p.b = connect_to(p.s.also, tprpc_listener_address(p.s.listener, moves ? "tcp" : "shm"), 0, 0);
        WAIT(&p.s, accept.o.runs, 1);
        REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
        p.a = accept.pipe;
        pair_check(&p);
        CHECK_EQ_INT(tprpc_pipe_get_info(p.b, &info, sizeof info), TPRPC_OK);
        CHECK_STR(info.transport, "shm");
        pair_close(&p);
    }
}

static void bad_address(tprpc_context *ctx, const char *address, tprpc_status listening, tprpc_status connecting) {
    tprpc_listener_desc ld;
    tprpc_pipe_desc pd;
    tprpc_listener *listener = NULL;
    tprpc_pipe *pipe = NULL;
    tprpc_error error;
    memset(&ld, 0, sizeof ld);
    memset(&pd, 0, sizeof pd);
    ld.addresses = &address;
    ld.address_count = 1;
    pd.address = address;
    for (int i = 0; i < 2; i++) {
        memset(&error, 0, sizeof error);
        tprpc_status expected = i ? connecting : listening;
        tprpc_status status = i ? tprpc_connect(ctx, &pd, &pipe, &error) : tprpc_listen(ctx, &ld, &listener, &error);
        if (!CHECK_EQ_INT(status, expected)) fprintf(stderr, "%s \"%s\": %s\n", i ? "connect" : "listen", address,
            error.text);
        if (status == TPRPC_OK) continue;
        CHECK(i ? pipe == NULL : listener == NULL);
        CHECK_EQ_INT(error.status, status);
        CHECK(error.text[0] != 0);
    }
    tprpc_pipe_close(pipe);
    if (listener) tprpc_listener_close(listener);
}

TEST(bad_addresses) {
    tprpc_context *ctx = context(NULL, 0);
    char longest[400];
    memset(longest, 'a', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    memcpy(longest, "tcp://", 6);
    const tprpc_status invalid = TPRPC_ERROR_INVALID;
    static const char *const wrong[] = {"", "tcp", "tcp:", "tcp:/", "://", "127.0.0.1:80", "tcp://", "tcp://127.0.0.1",
        "tcp://127.0.0.1:", "tcp://127.0.0.1:x", "tcp://127.0.0.1:65536", "tcp://127.0.0.1:-1", "tcp://127.0.0.1:80x",
            "tcp://::1:80",
        "tcp://[::1]", "tcp://[::1:80", "averylongtransportname://x"};
    for (size_t i = 0; i < COUNT(wrong); i++)
        bad_address(ctx, wrong[i], strcmp(wrong[i], "tcp://") == 0 ? TPRPC_OK : invalid, invalid);
    bad_address(ctx, longest, invalid, invalid);
    for (size_t length = 101; length < 110; length++) {
        memcpy(longest, "shm://", 6);
        longest[6 + length] = 0;
        bad_address(ctx, longest, invalid, invalid);
        longest[6 + length] = 'a';
    }
    bad_address(ctx, "carrier://pigeon", TPRPC_ERROR_UNSUPPORTED, TPRPC_ERROR_UNSUPPORTED);
    bad_address(ctx, "tcp://0.0.0.0:0", TPRPC_ERROR_UNSUPPORTED, TPRPC_ERROR_UNSUPPORTED);
    bad_address(ctx, "tcp://192.0.2.1:80", TPRPC_ERROR_UNSUPPORTED, TPRPC_ERROR_UNSUPPORTED);
    tprpc_listener *listener = listen_on(ctx, "tcp://127.0.0.1:0", 0);
    tprpc_listener_desc desc;
    tprpc_listener *second = NULL;
    const char *taken = tprpc_listener_address(listener, NULL);
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.addresses = &taken;
    desc.address_count = 1;
    CHECK_EQ_INT(tprpc_listen(ctx, &desc, &second, &error), TPRPC_ERROR_UNREACHABLE);
    CHECK_CONTAINS(error.text, taken + 6);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(bad_contexts) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.transports = "tcp,pigeon";
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "pigeon");
    CHECK_CONTAINS(error.text, "shm");           /* the known ones */
    desc.transports = "";
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    desc.transports = NULL;
    desc.channels = "teleport";
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "basic");
    desc.channels = NULL;
    CHECK_EQ_INT(tprpc_context_create_for(&desc, sizeof desc - 8, TPRPC_VERSION, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_context_create_for(&desc, sizeof desc, TPRPC_VERSION + 100, &ctx, &error), TPRPC_ERROR_INVALID);
    desc.threads = -1;
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    desc.threads = 0;
    desc.allocator.alloc = books_alloc;
    CHECK_EQ_INT(tprpc_context_create(&desc, &ctx, &error), TPRPC_ERROR_INVALID);
    CHECK(ctx == NULL);
    CHECK_EQ_INT(tprpc_context_destroy(NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_version(), TPRPC_VERSION);
}

/* ---- strangers at the other end ---- */

static const uint8_t hello_9[] = {12, 0, 0, 0, 1, 0, 0, 0, 'T', 'P', 'R', 'P', 9, 0, 3, 0, 1, 2, 3, 4};
static const char http[] = "HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n";
static uint8_t noise[5000];

/* Connects to a stranger that answers `bytes`, then closes or stays silent. */
static void stranger_answers(int threads, const void *answer, size_t size, int closes, tprpc_status expected,
    const char *part) {
    char address[64];
    side s;
    outcome wrote, got;
    tprpc_message m = text_message("hello?");
    int listener = socket_listen_at(address, sizeof address);
    memset(&s, 0, sizeof s);
    memset(&wrote, 0, sizeof wrote);
    memset(&got, 0, sizeof got);
    s.threads = threads;
    s.ctx = context("tcp", threads);
    s.pipe = connect_to(s.ctx, address, 0, 300);
    CHECK_EQ_INT(tprpc_pipe_write(s.pipe, &m, on_written, &wrote), TPRPC_OK);
    CHECK_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_read, &got), TPRPC_OK);
    int fd = accept(listener, NULL, NULL);
    REQUIRE(fd >= 0);
    if (size) CHECK_EQ_INT(send(fd, answer, size, MSG_NOSIGNAL), size);
    if (closes) close(fd);
    WAIT(&s, wrote.runs, 1);
    WAIT(&s, got.runs, 1);
    CHECK_EQ_INT(wrote.status, expected);
    CHECK_EQ_INT(got.status, expected);
    if (!CHECK_CONTAINS(got.text, part)) fprintf(stderr, "%s\n", wrote.text);
    tprpc_pipe_close(s.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    if (!closes) close(fd);
    close(listener);
}

static void strangers(int threads) {
    fill(noise, sizeof noise, 77);
    stranger_answers(threads, http, sizeof http - 1, 0, TPRPC_ERROR_PROTOCOL, "tprpc");
    stranger_answers(threads, noise, sizeof noise, 0, TPRPC_ERROR_PROTOCOL, "tprpc");
    stranger_answers(threads, hello_9, sizeof hello_9, 0, TPRPC_ERROR_PROTOCOL, "wire version 9.3");
    stranger_answers(threads, hello_9, sizeof hello_9 - 5, 0, TPRPC_ERROR_TIMEOUT, "");
    stranger_answers(threads, NULL, 0, 0, TPRPC_ERROR_TIMEOUT, "127.0.0.1");
    stranger_answers(threads, NULL, 0, 1, TPRPC_ERROR_PEER, "127.0.0.1");
    stranger_answers(threads, hello_9, 3, 1, TPRPC_ERROR_PEER, "127.0.0.1");
}
TEST(strangers_polled) { strangers(0); }
TEST(strangers_threaded) { strangers(1); }

TEST(nobody_there) {
    for (int i = 0; i < 2; i++) {
        char address[64];
        side s;
        outcome o[2];
        memset(&s, 0, sizeof s);
        memset(o, 0, sizeof o);
        s.ctx = context(NULL, 0);
        close(socket_listen_at(address, sizeof address));
        tprpc_pipe_desc desc;
        tprpc_error error;
        memset(&desc, 0, sizeof desc);
        memset(&error, 0, sizeof error);
        desc.address = i ? "shm://nobody.of.this.name" : address;
        tprpc_status status = tprpc_connect(s.ctx, &desc, &s.pipe, &error);
        if (status == TPRPC_OK) {
            CHECK_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_read, &o[0]), TPRPC_OK);
            WAIT(&s, o[0].runs, 1);
            status = o[0].status;
            memcpy(error.text, o[0].text, sizeof error.text);
            CHECK_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_read, &o[1]), TPRPC_ERROR_UNREACHABLE);
        }
        CHECK_EQ_INT(status, TPRPC_ERROR_UNREACHABLE);
        CHECK_CONTAINS(error.text, desc.address + 6);
        tprpc_pipe_close(s.pipe);
        CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    }
}

/* Strangers connect to a listener, which goes on serving. */
TEST(strangers_connect) {
    side s;
    accepting accept;
    int fds[6];
    static const char get[] = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n";
    uint8_t big[64] = {0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0};
    char answer[4096];
    memset(&s, 0, sizeof s);
    memset(&accept, 0, sizeof accept);
    fill(noise, sizeof noise, 78);
    s.ctx = context(NULL, 0);
    s.also = context(NULL, 0);
    s.listener = listen_on(s.ctx, "tcp://127.0.0.1:0", 0);
    CHECK_EQ_INT(tprpc_accept(s.listener, on_accepted, &accept), TPRPC_OK);
    const char *address = tprpc_listener_address(s.listener, NULL);
    for (size_t i = 0; i < COUNT(fds); i++) fds[i] = socket_connect_to(address);
    CHECK(send(fds[0], get, sizeof get - 1, MSG_NOSIGNAL) > 0);
    CHECK(send(fds[1], noise, sizeof noise, MSG_NOSIGNAL) > 0);
    CHECK(send(fds[2], big, sizeof big, MSG_NOSIGNAL) > 0);
    CHECK(send(fds[3], hello_9, sizeof hello_9, MSG_NOSIGNAL) > 0);
    CHECK(send(fds[4], hello_9, 5, MSG_NOSIGNAL) > 0);
    close(fds[4]);
    idle(&s, 100000);
    for (int i = 0; i < 4; i++) {                /* each was shown the door; the last after our hello and a word */
        ssize_t n, all = 0;
        struct timeval limit = {5, 0};
        setsockopt(fds[i], SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        while ((n = recv(fds[i], answer, sizeof answer, 0)) > 0) all += n;
        CHECK(n == 0 || errno == ECONNRESET);
        if (i == 3) CHECK(all > 50);
        close(fds[i]);
    }
    s.pipe = connect_to(s.also, address, 0, 0);
    WAIT(&s, accept.o.runs, 1);                  /* the silent one is still there, and does not matter */
    CHECK_EQ_INT(accept.o.status, TPRPC_OK);
    close(fds[5]);
    CHECK_EQ_INT(tprpc_context_destroy(s.also), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
}

/* ---- no descriptors left ---- */

TEST(no_descriptors) {
    pair p;
    struct rlimit limit, low;
    tprpc_context *ctx = NULL;
    tprpc_pipe *pipe = NULL;
    tprpc_error error;
    tprpc_pipe_desc desc;
    pair_open(&p, NULL, "tcp://127.0.0.1:0", 0, 0);
    REQUIRE(getrlimit(RLIMIT_NOFILE, &limit) == 0);
    for (int more = 0; more < 12; more++) {      /* it runs out at each point of creating a context */
        low = limit;
        low.rlim_cur = (rlim_t)test_count_fds() + (rlim_t)more + 3;
        REQUIRE(setrlimit(RLIMIT_NOFILE, &low) == 0);
        memset(&error, 0, sizeof error);
        tprpc_status status = tprpc_context_create(NULL, &ctx, &error);
        REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
        if (status == TPRPC_OK) CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
        else CHECK(status == TPRPC_ERROR_LIMIT || status == TPRPC_ERROR_UNSUPPORTED);
        if (status != TPRPC_OK) CHECK(error.text[0] != 0);
    }
    int before = test_count_fds();
    low = limit;
    low.rlim_cur = 3;
    REQUIRE(setrlimit(RLIMIT_NOFILE, &low) == 0);
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.address = tprpc_listener_address(p.s.listener, NULL);
    CHECK_EQ_INT(tprpc_connect(p.s.also, &desc, &pipe, &error), TPRPC_ERROR_LIMIT);
    CHECK_CONTAINS(error.text, "tcp");
    pair_check(&p);                              /* what is open goes on */
    REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK_EQ_INT(test_count_fds(), before);

    /* The listener has none to accept with, and takes the connection later. */
    accepting accept;
    memset(&accept, 0, sizeof accept);
    CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
    pipe = connect_to(p.s.also, desc.address, 0, 0);
    REQUIRE(setrlimit(RLIMIT_NOFILE, &low) == 0);
    idle(&p.s, 200000);
    CHECK_EQ_INT(LOAD(accept.o.runs), 0);
    REQUIRE(setrlimit(RLIMIT_NOFILE, &limit) == 0);
    WAIT(&p.s, accept.o.runs, 1);
    CHECK_EQ_INT(accept.o.status, TPRPC_OK);
    pair_close(&p);
}

/* ---- hooks ---- */

typedef struct hooks { books b; int begun, ended, logged; pthread_t thread; int64_t skew_us; char names[200];
    tprpc_context *ctx; } hooks;
static void hook_begin(const char *name, void *user) { CHECK(name && name[0]); ADD(((hooks *)user)->begun, 1); }
static void hook_end(const char *name, void *user) { CHECK(name && name[0]); ADD(((hooks *)user)->ended, 1); }
static int64_t hook_clock(void *user) { return test_now_us() + LOAD(((hooks *)user)->skew_us); }
static void hook_log(const tprpc_log *entry, void *user) {
    hooks *h = (hooks *)user;
    CHECK(entry->section && entry->section[0] && entry->peer && entry->text && entry->text[0] && entry->file
        && entry->file[0]);
    CHECK(entry->level >= TPRPC_LOG_PANIC && entry->level <= TPRPC_LOG_DEBUG);
    CHECK(entry->id != 0 && entry->line > 0);
    tprpc_context *ctx = LOAD(h->ctx);
    if (ctx) tprpc_wake(ctx);                    /* no lock is held */
    ADD(h->logged, 1);
}

static void hooks_of(const way *w) {
    hooks *h = (hooks *)calloc(1, sizeof *h);
    tprpc_context_desc desc;
    side s;
    outcome o;
    char address[64];
    REQUIRE(h != NULL);
    memset(&desc, 0, sizeof desc);
    memset(&s, 0, sizeof s);
    memset(&o, 0, sizeof o);
    desc.threads = w->threads * 2;
    desc.transports = w->transports;
    desc.allocator.alloc = books_alloc;
    desc.allocator.free = books_free;
    desc.allocator.user = &h->b;
    desc.log = hook_log;
    desc.thread_begin = hook_begin;
    desc.thread_end = hook_end;
    desc.clock_us = hook_clock;
    desc.user = h;
    int fds = test_count_fds();
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &s.ctx, NULL), TPRPC_OK);
    STORE(h->ctx, s.ctx);
    s.threads = desc.threads;
    s.also = context(w->transports, desc.threads);
    pair p;
    memset(&p, 0, sizeof p);
    p.s = s;
    pair_connect(&p, w->address, 0);
    for (int i = 0; i < 20; i++) pair_check(&p);
    CHECK(LOAD(h->b.live) > 0);
    pair_close(&p);
    books_close(&h->b);
    CHECK_EQ_INT(h->begun, desc.threads);
    CHECK_EQ_INT(h->ended, desc.threads);
    CHECK_EQ_INT(test_count_fds(), fds);

    if (w->transports && strcmp(w->transports, "tcp") != 0) { free(h); return; }
    h->ctx = NULL;                               /* the clock: a time-out of 10 minutes passes when it says so */
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &s.ctx, NULL), TPRPC_OK);
    s.also = NULL;
    int listener = socket_listen_at(address, sizeof address);
    s.pipe = connect_to(s.ctx, address, 0, 600000);
    CHECK_EQ_INT(tprpc_pipe_read(s.pipe, NULL, on_read, &o), TPRPC_OK);
    idle(&s, 50000);
    CHECK_EQ_INT(LOAD(o.runs), 0);
    STORE(h->skew_us, INT64_C(601000000));
    tprpc_wake(s.ctx);
    WAIT(&s, o.runs, 1);
    CHECK_EQ_INT(o.status, TPRPC_ERROR_TIMEOUT);
    tprpc_listener *ours = listen_on(s.ctx, "tcp://127.0.0.1:0", 0);
    int fd = socket_connect_to(tprpc_listener_address(ours, NULL));
    CHECK(send(fd, http, sizeof http, MSG_NOSIGNAL) > 0);
    WAIT(&s, h->logged, 1);                      /* that it does not speak tprpc */
    close(fd);
    close(listener);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    books_close(&h->b);
    free(h);
}
TEST_WAYS(hooks, 20) { hooks_of((const way *)arg); }

/* ---- limits.handshakes ---- */

/* What a raw socket sees: 1 it is open and silent, 0 it is over. */
static int still_open(int fd) {
    uint8_t byte;
    ssize_t n = recv(fd, &byte, 1, MSG_DONTWAIT);
    return n > 0 || (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK));
}

/* Until so many of the sockets are open; more is looked at for a while, too. */
static int count_open(side *s, const int *fds, int count, int expected) {
    int64_t deadline = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    int n;
    do {
        n = 0;
        for (int i = 0; i < count; i++) n += still_open(fds[i]);
        work(s);
    } while (n != expected && test_now_us() < deadline);
    return n;
}

static void clock_jumps(side *s, hooks *h, int64_t us) {
    STORE(h->skew_us, us);
    tprpc_wake(s->ctx);
    idle(s, 20000);
}

/* A clock that goes a thousand times slower than the day, so that what a jump is to show does not come by waiting. */
static int64_t slow_clock(void *user) { return 1000000000 + test_now_us() / 1000 + LOAD(((hooks *)user)->skew_us); }

/* Silent connections up to the limit are kept for the time of a handshake, by the context's clock; for each further one
   the oldest is dropped, and so they keep nobody out who speaks. */
static void silent_connections(int threads) {
    enum { N = 4 };
    hooks *h = (hooks *)calloc(1, sizeof *h);
    tprpc_context_desc desc;
    pair p;
    int fds[N], before = 0;
    REQUIRE(h != NULL);
    memset(&desc, 0, sizeof desc);
    memset(&p, 0, sizeof p);
    desc.threads = p.s.threads = threads;
    desc.transports = "tcp";
    desc.limits.handshakes = 2;
    desc.clock_us = slow_clock;
    desc.log = hook_log;
    desc.user = h;
    REQUIRE_EQ_INT(tprpc_context_create(&desc, &p.s.ctx, NULL), TPRPC_OK);
    p.s.also = context("tcp", threads);
    p.s.listener = listen_on(p.s.ctx, "tcp://127.0.0.1:0", 0);
    const char *address = tprpc_listener_address(p.s.listener, NULL);
    for (int round = 0; round < 2; round++) {    /* they go by the next that comes, and by the time */
        for (int i = 0; i < N; i++) {
            fds[i] = socket_connect_to(address);
            idle(&p.s, 5000);
        }
        CHECK_EQ_INT(count_open(&p.s, fds, N, 2), 2);
        CHECK(still_open(fds[2]) && still_open(fds[3]));
        WAIT(&p.s, h->logged, 2);               /* it says so */
        if (round == 1) {
            clock_jumps(&p.s, h, INT64_C(9000000));
            CHECK(still_open(fds[2]) && still_open(fds[3]));
            clock_jumps(&p.s, h, INT64_C(11000000));
            CHECK_EQ_INT(count_open(&p.s, fds, N, 0), 0);
        }
        accepting accept;
        memset(&accept, 0, sizeof accept);
        CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
        p.b = connect_to(p.s.also, address, 0, 0);
        WAIT(&p.s, accept.o.runs, 1);
        REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
        p.a = accept.pipe;
        pair_check(&p);
        if (round == 0) CHECK_EQ_INT(count_open(&p.s, fds, N, 1), 1);    /* the older one made room */
        for (int i = 0; i < N; i++) close(fds[i]);
        tprpc_pipe_close(p.a);
        tprpc_pipe_close(p.b);
        p.a = p.b = NULL;
        idle(&p.s, 10000);
        if (round == 0) before = test_count_fds();
        else CHECK_LE_INT(test_count_fds(), before);
    }
    pair_close(&p);
    free(h);
}
TEST(silent_connections_polled) { silent_connections(0); }
TEST(silent_connections_threaded) { silent_connections(1); }

/* One handshake at a time: the second connection, that a pipe would move to, is one too many, and the pipe stays. */
TEST(no_handshake_left_to_move) {
    static const way moved = {"moved", NULL, "tcp://127.0.0.1:0", 0};
    pair p;
    tprpc_limits limits;
    tprpc_pipe_info info;
    memset(&p, 0, sizeof p);
    memset(&limits, 0, sizeof limits);
    p.s.also = context_limited(&moved, &limits);
    limits.handshakes = 1;
    p.s.ctx = context_limited(&moved, &limits);
    pair_connect(&p, moved.address, 0);
    CHECK_EQ_INT(tprpc_pipe_get_info(p.b, &info, sizeof info), TPRPC_OK);
    CHECK_STR(info.transport, "tcp");
    CHECK(path_of(&info, "shm")->why[0] != 0);
    pair_check(&p);
    pair_close(&p);
}
