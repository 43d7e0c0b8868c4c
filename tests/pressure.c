/* The real transports under pressure: the system's calls give less than was asked for, are interrupted, would block,
   come late and fail, as a seed says; agents call each other in every way and a pipe carries messages beside them,
   whose bytes are checked. Gentle pressure must cost nothing but time; under hard pressure every operation ends once,
   and what was lent comes back. Then processes die at the n-th call that they make to the system or for memory, and who
   survives goes on with the next.

       TEST_SEED=n build/tests/pressure -v gentle_tcp     one seed; what fails shows its number
       PRESSURE_SOAK=n build/tests/pressure               SEEDS other seeds for each n; make soak-pressure counts n up
       TEST_SEED=s KILL_AT=n build/tests/pressure -v killed_over_tcp      one death, at the n-th call of a life

   What a seed repeats: what is begun and with which sizes, what becomes of the n-th call of each name, and at which
   calls who is killed. Not how threads and processes interleave, nor how often a loop has looked meanwhile, so the n-th
   call may be another's: a failure may take several runs of its seed to be seen again. */
#include "agent_help.h"
extern int (*tprpc_test_hook)(const char *call, int64_t *size);

static uint64_t random_state;
static uint64_t random_below(uint64_t n) { return test_mix(random_state++) % n; }

/* ---- the pressure: what becomes of the n-th call of a name follows from the seed, the name and n ---- */

enum { BUCKETS = 512, HARD_IN = 400 };            /* one call in so many fails for good */
static uint64_t pressure_seed;
static bool pressure_hard;
static bool over_shm;                 /* whose socket takes a byte at once, unless the peer has others to read */
static uint64_t counts[BUCKETS];                  /* by the name's hash: two names may share one */
static uint64_t kill_at, calls_made;              /* kill_at: 0 for nobody */
static int faults[5];
enum { SHORT, INTERRUPTED, BLOCKED, LATE, FAILED };
static const char *const fault_names[] = {"short", "interrupted", "would block", "late", "failed"};

static bool is_one(const char *call, const char *words) {
    char spaced[40];
    snprintf(spaced, sizeof spaced, " %.31s ", call);
    return strstr(words, spaced) != NULL;
}

static int hard_code(const char *call, uint64_t r) {
    static const int stream[] = {ECONNRESET, EPIPE, ETIMEDOUT, ENOMEM}, some[] = {EMFILE, ENFILE, ENOBUFS, ENOMEM};
    if (is_one(call, " send recv ")) return stream[r % 4];
    if (is_one(call, " accept socket socket_unix memfd_create dup pidfd_open sock_diag eventfd ")) return some[r % 4];
    if (is_one(call, " connect ")) return r % 2 ? ECONNREFUSED : ENETUNREACH;
    if (is_one(call, " alloc mmap epoll_ctl ")) return ENOMEM;
    if (is_one(call, " pread pwrite fstat getsockopt getsockname getpeername socket_error ")) return EIO;
    return 0;
}

static int pressed(const char *call, int64_t *size) {
    uint64_t hash = 5381;
    for (const char *c = call; *c; c++) hash = hash * 33 + (unsigned char)*c;
    const uint64_t n = __atomic_fetch_add(&counts[hash % BUCKETS], 1, __ATOMIC_RELAXED);
    if (kill_at && __atomic_add_fetch(&calls_made, 1, __ATOMIC_RELAXED) == kill_at) kill(getpid(), SIGKILL);
    uint64_t r = test_mix(test_mix(pressure_seed ^ hash) + n);
    const unsigned dice = (unsigned)(r % 100);
    r >>= 8;
    if (pressure_hard && r % HARD_IN == 0) {
        const int code = hard_code(call, r / HARD_IN);
        if (code) ADD(&faults[FAILED], 1);
        if (code) return code;
    }
    if (over_shm && dice < 44 && is_one(call, " send ")) return 0;
    if (dice < 30 && is_one(call, " send recv pread pwrite ")) {
        const int64_t most = (int64_t)1 << (r / 16 % 17);      /* often a few bytes, at times up to 64 KiB */
        if (*size > most) ADD(&faults[SHORT], 1);
        if (*size > most) *size = most;
    } else if (dice < 30 && is_one(call, " epoll_wait ")) {
        if (*size > 100) *size = 1 + (int64_t)(r % 100);
    } else if (dice < 36 && is_one(call, " send recv pread pwrite epoll_wait epoll_peek futex_wait getrandom ")) {
        ADD(&faults[INTERRUPTED], 1);
        return EINTR;
    } else if (dice < 44 && is_one(call, " send recv accept bell_read ")) {
        ADD(&faults[BLOCKED], 1);
        return EAGAIN;
    } else if (dice < 44 && is_one(call, " epoll_pwait2 ")) {
        return ENOSYS;
    } else if (dice == 44) {
        ADD(&faults[LATE], 1);
        if (r % 4) sched_yield();
        else test_sleep_us((int64_t)(r / 4 % 100));
    }
    return 0;
}

static void press(uint64_t seed, bool hard) {
    memset(counts, 0, sizeof counts);
    pressure_seed = seed;
    pressure_hard = hard;
    STORE(&tprpc_test_hook, pressed);
}

static void release_pressure(void) { STORE(&tprpc_test_hook, NULL); }

/* ---- bytes: those of a message follow from its number ---- */

enum { POOL = 1 << 20, LARGEST = 300000, SKEW = 4096 };
static uint8_t *pool;

static void pool_fill(void) {
    uint64_t *words = (uint64_t *)calloc(POOL / 8, 8);
    REQUIRE(words != NULL);
    for (size_t i = 0; i < POOL / 8; i++) words[i] = test_mix(i);
    pool = (uint8_t *)words;
}
static uint8_t *bytes_number(uint32_t id, size_t part) { return pool + (id * 61u + (uint32_t)part * 977u) % SKEW; }
static size_t random_size(void) { return (size_t)random_below((uint64_t)1 << (1 + random_below(18))) % LARGEST; }

/* ---- calls ---- */

enum { ECHO, CHANGE, ONE_WAY, LATER, REFUSED, CANCELLED, TIMED_OUT, NESTED, KINDS };
static const char *const kind_methods[] = {"echo", "change", "heard", "later", "refuse", "later", "never", "nested"};
enum { CALLS = 4000, PARTS = 3, LANES = 4, SLOTS = 64, SLOT_BYTES = 20000, KEPT = 4000, TRIES = 20 };

typedef struct body { uint32_t id, parts, lane, order; uint32_t sizes[PARTS]; } body;   /* what a handler sees */
typedef struct record {               /* of a call, at its caller */
    int outcomes, releases, kind, parts;
    size_t sizes[PARTS];
    tprpc_status status;
    bool lent, cancelled;
    body body;                        /* borrowed with the message */
} record;

static record records[CALLS];
static int handled[CALLS];            /* how often, by the call's number */
static uint32_t record_count;
static int slots[SLOTS], in_lane[2][LANES], ended, lent, given_back;   /* of the side that handles, in_lane */
static uint32_t lane_order[2][LANES];
static uint8_t slot_memory[SLOTS][SLOT_BYTES];
static tprpc_request kept[KEPT], never[KEPT];
static int kept_count, never_count;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static bool apart;                    /* caller and handler are processes: a handler sees no records of the caller's */

static tprpc_status take_slot(tprpc_placement *placement, void *user) {
    (void)user;
    if (placement->descriptor->tensor_count != 1 || placement->descriptor->tensors[0].size > SLOT_BYTES)
        return TPRPC_ERROR_LIMIT;
    for (int i = 0; i < SLOTS; i++) {
        int expected = 0;
        if (!__atomic_compare_exchange_n(&slots[i], &expected, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) continue;
        placement->tensors[0].data = slot_memory[i];
        placement->cookie = &slots[i];
        return TPRPC_OK;
    }
    return TPRPC_ERROR_LIMIT;
}
static int slots_taken(void) {
    int taken = 0;
    for (int i = 0; i < SLOTS; i++) taken += LOAD(&slots[i]);
    return taken;
}
static void free_slot(void *slot) { CHECK_EQ_INT(__atomic_exchange_n((int *)slot, 0, __ATOMIC_ACQ_REL), 1); }
static void on_unplaced(const tprpc_placement *placement, void *user) { (void)user; free_slot(placement->cookie); }
static int *slot_of(const void *data) {
    for (int i = 0; i < SLOTS; i++) if (data == slot_memory[i]) return &slots[i];
    return NULL;
}

/* What came is what was sent; runs in every handler, once per call. */
static bool look_at(const tprpc_message *message, body *b, int side_of_handler) {
    if (!CHECK_EQ_INT(message->metadata_size, sizeof *b)) return false;
    memcpy(b, message->metadata, sizeof *b);
    if (!CHECK(b->id < CALLS) || !CHECK_EQ_INT(message->tensor_count, b->parts)) return false;
    for (uint32_t i = 0; i < b->parts; i++) {
        if (!CHECK_EQ_INT(message->tensors[i].size, b->sizes[i])) return false;
        CHECK_MEM(message->tensors[i].data, bytes_number(b->id, i), b->sizes[i]);
    }
    if (apart) return true;
    CHECK_EQ_INT(ADD(&handled[b->id], 1), 1);
    if (b->lane) {                    /* one lane's handlers start in order, though calls between may have failed */
        const int before = __atomic_exchange_n(&in_lane[side_of_handler][b->lane], (int)b->order, __ATOMIC_ACQ_REL);
        CHECK(before < (int)b->order);
    }
    return true;
}

static int side_number(void *user) { return ((side *)user)->rank; }
static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    body b;
    if (look_at(message, &b, side_number(user))) tprpc_reply(request, message);
}
static void on_heard(tprpc_request request, const tprpc_message *message, void *user) {
    body b;
    (void)request;
    look_at(message, &b, side_number(user));
}
static void on_refuse(tprpc_request request, const tprpc_message *message, void *user) {
    body b;
    if (look_at(message, &b, side_number(user))) tprpc_fail(request, 42, "as told");
}

static void on_change(tprpc_request request, const tprpc_message *message, void *user) {
    body b;
    tprpc_message reply = *message;
    int *slot = message->tensor_count == 1 ? slot_of(message->tensors[0].data) : NULL;
    if (!CHECK(slot != NULL) || !look_at(message, &b, side_number(user))) return;
    memcpy(message->tensors[0].data, bytes_number(b.id, 7), message->tensors[0].size);
    reply.release = free_slot;
    reply.release_user = slot;
    tprpc_reply(request, &reply);
}

static void put(tprpc_request request, tprpc_request *list, int *count) {
    pthread_mutex_lock(&lock);
    REQUIRE(*count < KEPT);
    list[(*count)++] = request;
    pthread_mutex_unlock(&lock);
}

static void keep(tprpc_request request, const tprpc_message *message, void *user, tprpc_request *list, int *count) {
    body b;
    if (look_at(message, &b, side_number(user)) && tprpc_request_keep(request) == TPRPC_OK) put(request, list, count);
}
static void on_later(tprpc_request r, const tprpc_message *m, void *user) { keep(r, m, user, kept, &kept_count); }
static void on_never(tprpc_request r, const tprpc_message *m, void *user) { keep(r, m, user, never, &never_count); }

/* Answers when its own call to the caller has ended. */
typedef struct nested { tprpc_request request; } nested;
static void on_nested_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    nested *n = (nested *)user;
    (void)error;
    if ((status != TPRPC_OK || tprpc_reply(n->request, reply) != TPRPC_OK) &&
        tprpc_fail(n->request, 43, "the call back failed") != TPRPC_OK) put(n->request, kept, &kept_count);
    free(n);
}
static void on_nested(tprpc_request request, const tprpc_message *message, void *user) {
    nested *n = (nested *)calloc(1, sizeof *n);
    tprpc_call_options options = {0};
    body b;
    REQUIRE(n != NULL);
    n->request = request;
    options.on_done = on_nested_done;
    options.user = n;
    if (!look_at(message, &b, side_number(user)) || tprpc_request_keep(request) != TPRPC_OK) {
        free(n);
        return;
    }
    if (tprpc_call(((side *)user)->agent, tprpc_request_caller(request), "mirror", message, &options, NULL) == TPRPC_OK)
        return;
    if (tprpc_fail(request, 43, "cannot call back") != TPRPC_OK) put(request, kept, &kept_count);
    free(n);
}
static void on_mirror(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},     {"change", on_change, take_slot, on_unplaced, NULL, 0},
    {"heard", on_heard, NULL, NULL, NULL, 0},   {"later", on_later, NULL, NULL, NULL, 0},
    {"refuse", on_refuse, NULL, NULL, NULL, 0}, {"never", on_never, NULL, NULL, NULL, 0},
    {"nested", on_nested, NULL, NULL, NULL, 0}, {"mirror", on_mirror, NULL, NULL, NULL, 0},
    {0},
};

static void answer(tprpc_request *list, int *count) {
    for (;;) {
        tprpc_request request = {0};
        pthread_mutex_lock(&lock);
        const bool any = *count > 0;
        if (any) request = list[--*count];
        pthread_mutex_unlock(&lock);
        if (!any) return;
        const tprpc_message *message = tprpc_request_message(request);
        if (!message || tprpc_reply(request, message) != TPRPC_OK) tprpc_fail(request, 44, "no answer");
    }
}

static void on_given_back(void *user) {
    CHECK_EQ_INT(ADD(&((record *)user)->releases, 1), 1);
    ADD(&given_back, 1);
}

static void on_call_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    record *r = (record *)user;
    const uint32_t id = (uint32_t)(r - records);
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (error) CHECK(error->status == status && error->text[0]);
    if (error && !apart && getenv("TEST_LOG")) fprintf(stderr, "%s: %s\n", kind_methods[r->kind], error->text);
    r->status = status;
    if (status == TPRPC_OK && r->kind != ONE_WAY && CHECK_EQ_INT(reply->tensor_count, r->parts))
        for (int i = 0; i < r->parts; i++) {
            if (!CHECK_EQ_INT(reply->tensors[i].size, r->sizes[i])) continue;
            CHECK_MEM(reply->tensors[i].data, bytes_number(id, r->kind == CHANGE ? 7 : (size_t)i), r->sizes[i]);
        }
    if (status == TPRPC_OK && r->kind == CHANGE) {
        int *slot = slot_of(reply->tensors[0].data);
        if (CHECK(slot != NULL)) free_slot(slot);
    }
    CHECK_EQ_INT(ADD(&r->outcomes, 1), 1);
    ADD(&ended, 1);
}

static bool as_meant(const record *r) {
    return r->status == (r->kind == REFUSED ? TPRPC_ERROR_REMOTE : r->kind == TIMED_OUT ? TPRPC_ERROR_TIMEOUT
                         : r->cancelled ? TPRPC_ERROR_CANCELLED : TPRPC_OK);
}

/* Begins a call of that kind; false: it was refused at once. */
static bool begin_call(side *s, const char *worker, int kind) {
    tprpc_tensor tensors[PARTS];
    tprpc_message message = {0};
    tprpc_call_options options = {0};
    tprpc_future future = {0};
    tprpc_error error = {0};
    body b = {0};
    REQUIRE(record_count < CALLS);
    b.id = record_count;
    record *r = &records[record_count++];
    memset(r, 0, sizeof *r);
    STORE(&handled[b.id], 0);
    r->kind = kind;
    r->parts = kind == CHANGE ? 1 : (int)random_below(PARTS + 1);
    for (int i = 0; i < r->parts; i++) {
        r->sizes[i] = kind == CHANGE ? 1 + random_size() % SLOT_BYTES : random_size();
        tensors[i] = bytes_of(bytes_number(b.id, (size_t)i), r->sizes[i]);
        b.sizes[i] = (uint32_t)r->sizes[i];
    }
    b.parts = (uint32_t)r->parts;
    if (kind == ECHO || kind == ONE_WAY) b.lane = (uint32_t)random_below(LANES);
    if (b.lane) b.order = ++lane_order[s->rank][b.lane];
    message = tensors_of(tensors, (size_t)r->parts);
    r->body = b;
    message.metadata = &r->body;
    message.metadata_size = sizeof b;
    r->lent = r->parts && random_below(2);
    if (r->lent) {
        message.release = on_given_back;
        message.release_user = r;
        lent++;
    }
    options.lane = b.lane;
    options.on_done = on_call_done;
    options.user = r;
    options.error = &error;
    if (kind == CHANGE) {
        options.place = take_slot;
        options.on_unplaced = on_unplaced;
    }
    if (kind == ONE_WAY) options.flags = TPRPC_CALL_ONE_WAY;
    if (kind == TIMED_OUT) options.timeout_ms = 1 + (int64_t)random_below(20);
    tprpc_status status = tprpc_call(s->agent, worker, kind_methods[kind], &message, &options, &future);
    if (status != TPRPC_OK) {
        CHECK(error.status == status && error.text[0]);
        record_count--;
        return false;
    }
    if (kind == CANCELLED) r->cancelled = tprpc_future_cancel(future) == TPRPC_OK;
    tprpc_future_release(future);
    return true;
}

/* ---- a pipe beside them: messages in both directions, some read into memory of the reader's ---- */

enum { MESSAGES = 12 };
typedef struct end {                  /* one end of the pipe: it writes MESSAGES and reads as many */
    tprpc_pipe *pipe;
    int number, written, read, outcomes, begun, good;
    uint32_t next;                    /* the number of the next message, or under hard pressure the least it may be */
    uint8_t *memory[2];
    tprpc_message into;
    tprpc_tensor tensor;
    tprpc_payload payload;
    bool described;
} end;

static void end_read(end *e);

static void on_pipe_written(tprpc_status status, const tprpc_error *error, void *user) {
    end *e = (end *)user;
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    ADD(&e->good, status == TPRPC_OK);
    ADD(&e->outcomes, 1);
}

static void on_pipe_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    end *e = (end *)user;
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (status == TPRPC_OK) {
        uint32_t head[4];
        if (CHECK_EQ_INT(message->metadata_size, sizeof head)) {
            memcpy(head, message->metadata, sizeof head);
            CHECK_LE_INT(e->next, head[0]);   /* in the order written; one whose write failed is left out */
            if (!pressure_hard) CHECK_EQ_INT(head[0], e->next);
            e->next = head[0] + 1;
            CHECK_EQ_INT(head[1], !e->number);
            if (CHECK(message->tensor_count == 1 && message->payload_count == 1)) {
                CHECK_EQ_INT(message->tensors[0].size, head[2]);
                CHECK_EQ_INT(message->payloads[0].size, head[3]);
                CHECK_MEM(message->tensors[0].data, bytes_number(head[0], head[1]), head[2]);
                CHECK_MEM(message->payloads[0].data, bytes_number(head[0], head[1] + 2), head[3]);
            }
        }
        ADD(&e->read, 1);
    }
    free(e->memory[0]);
    free(e->memory[1]);
    e->memory[0] = e->memory[1] = NULL;
    if (status == TPRPC_OK && LOAD(&e->read) < MESSAGES) end_read(e);
    ADD(&e->good, status == TPRPC_OK);
    ADD(&e->outcomes, 1);
}

static void on_pipe_described(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    end *e = (end *)user;
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (status == TPRPC_OK && CHECK(message->tensor_count == 1 && message->payload_count == 1)) {
        e->tensor = message->tensors[0];
        e->payload = message->payloads[0];
        e->memory[0] = (uint8_t *)malloc(e->tensor.size + 1);
        e->memory[1] = (uint8_t *)malloc(e->payload.size + 1);
        e->tensor.data = e->memory[0];
        e->payload.data = e->memory[1];
        e->into = tensors_of(&e->tensor, 1);
        e->into.payloads = &e->payload;
        e->into.payload_count = 1;
        ADD(&e->begun, 1);            /* before, for its callback may be faster */
        if (tprpc_pipe_read(e->pipe, &e->into, on_pipe_read, e) != TPRPC_OK) {
            ADD(&e->begun, -1);
            free(e->memory[0]);
            free(e->memory[1]);
            e->memory[0] = e->memory[1] = NULL;
        }
    }
    ADD(&e->outcomes, 1);
}

/* Every other message whole, the others in two steps. */
static void end_read(end *e) {
    ADD(&e->begun, 1);
    const tprpc_status status = LOAD(&e->read) % 2 ? tprpc_pipe_read(e->pipe, NULL, on_pipe_read, e)
                                                   : tprpc_pipe_read_descriptor(e->pipe, on_pipe_described, e);
    if (status != TPRPC_OK) ADD(&e->begun, -1);
}

static void end_write(end *e) {
    uint32_t head[4] = {(uint32_t)e->written, (uint32_t)e->number, (uint32_t)random_size(), (uint32_t)random_size()};
    tprpc_tensor tensor = bytes_of(bytes_number(head[0], head[1]), head[2]);
    tprpc_payload payload = {NULL, 0, NULL, 0};
    tprpc_message message = tensors_of(&tensor, 1);
    payload.data = bytes_number(head[0], head[1] + 2);
    payload.size = head[3];
    message.payloads = &payload;
    message.payload_count = 1;
    message.metadata = head;
    message.metadata_size = sizeof head;
    ADD(&e->begun, 1);
    if (tprpc_pipe_write(e->pipe, &message, on_pipe_written, e) == TPRPC_OK) e->written++;
    else ADD(&e->begun, -1);
}

static void end_begin(end *e, tprpc_pipe *pipe, int number) {
    memset(e, 0, sizeof *e);
    e->pipe = pipe;
    e->number = number;
    end_read(e);
}

/* In a test's good end both have written and read all. A read in two steps has two outcomes, one of them good. */
static bool end_done(const end *e) { return LOAD(&e->read) == MESSAGES && LOAD(&e->good) == 2 * MESSAGES; }

/* It has nothing pending and is not done. What a callback counts last is looked at first. */
static bool end_failed(const end *e) {
    const int outcomes = LOAD(&e->outcomes);
    return outcomes >= LOAD(&e->begun) && !end_done(e);
}

/* ---- one seed: two agents and a pipe in this process ---- */

typedef struct accepting { int done; tprpc_pipe *pipe; } accepting;
static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    accepting *a = (accepting *)user;
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    a->pipe = pipe;
    ADD(&a->done, 1);
}

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (error && getenv("TEST_LOG")) fprintf(stderr, "start: %s\n", error->text);
    ADD((int *)user, status == TPRPC_OK ? 1 : 1000);
}

typedef struct strain { const char *name, *transports, *address; bool hard; } strain;
static const strain strains[] = {
    {"gentle_tcp", "tcp", "tcp://127.0.0.1:0", false},     {"hard_tcp", "tcp", "tcp://127.0.0.1:0", true},
    {"gentle_shm", "shm", "shm://", false},                {"hard_shm", "shm", "shm://", true},
    {"gentle_moved", "shm,tcp", "tcp://127.0.0.1:0", false}, {"hard_moved", "shm,tcp", "tcp://127.0.0.1:0", true},
};
enum { OPERATIONS = 60, IN_FLIGHT = 10, SEEDS = 90, START_MS = 20000, GIVE_UP_S = 40 };

static side both[2];
static mode both_mode;
static const char *const names[] = {"ann", "bob"};

static void work_both(void) {
    for (int i = 0; i < 2; i++) if (both[i].ctx && !both_mode.threads) tprpc_poll(both[i].ctx, 200, 0);
    if (both_mode.threads) test_sleep_us(100);
    answer(kept, &kept_count);
}

static bool open_both(const strain *with, tprpc_store **store) {
    tprpc_store_desc local = {0};
    local.url = "local://";
    for (int i = 0; i < 2; i++) {
        tprpc_context_desc context = {0};
        memset(&both[i], 0, sizeof both[i]);
        both[i].mode = &both_mode;
        both[i].rank = i;
        both[i].name = names[i];
        context.transports = with->transports;
        context.threads = both_mode.threads;
        context.spin_us = random_below(2) ? TPRPC_NOW : 5;
        context.allocator.alloc = heap_alloc;
        context.allocator.free = heap_free;
        context.allocator.user = &both[i].heap;
        if (tprpc_context_create(&context, &both[i].ctx, NULL) != TPRPC_OK) return false;
        if (i == 0 && tprpc_store_open(both[0].ctx, &local, store, NULL) != TPRPC_OK) return false;
    }
    return true;
}

/* Whether both are in their group. */
static bool join_both(tprpc_store *store) {
    int ready = 0, begun = 0;
    for (int i = 0; i < 2; i++) {
        tprpc_agent_desc desc = {0};
        desc.context = both[i].ctx;
        desc.name = names[i];
        desc.store = store;
        desc.rank = i;
        desc.world_size = 2;
        desc.start_timeout_ms = pressure_hard ? 500 : START_MS;
        desc.timeout_ms = START_MS;       /* for a request that could not even be failed */
        if (tprpc_agent_create(&desc, &both[i].agent, NULL) != TPRPC_OK) break;
        for (const tprpc_method_desc *m = methods; m->name; m++) {
            tprpc_method_desc method = *m;
            method.user = &both[i];
            if (tprpc_agent_register(both[i].agent, &method, NULL) != TPRPC_OK) break;
        }
        if (tprpc_agent_start(both[i].agent, on_ready, &ready, NULL) != TPRPC_OK) break;
        begun++;
    }
    const int64_t end_us = test_now_us() + (int64_t)GIVE_UP_S * 1000000 * TEST_SLOWDOWN;
    while (LOAD(&ready) / 1000 + LOAD(&ready) % 1000 < begun && test_now_us() < end_us) work_both();
    CHECK_EQ_INT(LOAD(&ready) / 1000 + LOAD(&ready) % 1000, begun);
    return ready == 2;
}

static void calls_of_all_kinds(void) {
    const int64_t end_us = test_now_us() + (int64_t)GIVE_UP_S * 1000000 * TEST_SLOWDOWN;
    for (int begun = 0; begun < OPERATIONS; begun++) {
        const int from = (int)random_below(2);
        begin_call(&both[from], names[!from], (int)random_below(KINDS));
        while ((int)record_count - LOAD(&ended) >= IN_FLIGHT && test_now_us() < end_us) work_both();
        if (random_below(3) == 0) work_both();
    }
    while (LOAD(&ended) < (int)record_count && test_now_us() < end_us) work_both();
    CHECK_EQ_INT(LOAD(&ended), record_count);
    answer(never, &never_count);
    if (pressure_hard) return;
    for (uint32_t i = 0; i < record_count; i++) {
        const record *r = &records[i];
        if (!CHECK(as_meant(r)))
            fprintf(stderr, "  call %u, %s, ended with %s\n", i, kind_methods[r->kind], tprpc_status_name(r->status));
    }
}

/* What is left of one end of a pipe ends when it is closed. */
static void end_finish(end *e) {
    const int64_t end_us = test_now_us() + (int64_t)GIVE_UP_S * 1000000 * TEST_SLOWDOWN;
    tprpc_pipe_close(e->pipe);
    while (LOAD(&e->outcomes) < LOAD(&e->begun) && test_now_us() < end_us) work_both();
    CHECK_EQ_INT(e->outcomes, e->begun);
}

static void messages_both_ways(const char *address) {
    static end ends[2];
    tprpc_listener_desc listening = {0};
    tprpc_pipe_desc connecting = {0};
    tprpc_listener *listener = NULL;
    tprpc_pipe *pipe = NULL;
    accepting a = {0, NULL};
    int64_t end_us = test_now_us() + (int64_t)GIVE_UP_S * 1000000 * TEST_SLOWDOWN;
    listening.addresses = &address;
    listening.address_count = 1;
    tprpc_status status = tprpc_listen(both[0].ctx, &listening, &listener, NULL);
    if (!(pressure_hard || CHECK_EQ_INT(status, TPRPC_OK)) || status != TPRPC_OK) return;
    const bool accepts = tprpc_accept(listener, on_accepted, &a) == TPRPC_OK;
    connecting.address = tprpc_listener_address(listener, NULL);
    connecting.timeout_ms = pressure_hard ? 500 : START_MS;
    if (accepts) status = tprpc_connect(both[1].ctx, &connecting, &pipe, NULL);
    if (accepts && status == TPRPC_OK) {
        end_begin(&ends[1], pipe, 1);
        while (!LOAD(&a.done) && LOAD(&ends[1].outcomes) < LOAD(&ends[1].begun) && test_now_us() < end_us) work_both();
        const int count = a.pipe ? 2 : 1;
        if (a.pipe) end_begin(&ends[0], a.pipe, 0);
        for (int i = 0; i < MESSAGES; i++)
            for (int k = 2 - count; k < 2; k++) {
                end_write(&ends[k]);
                work_both();
            }
        if (pressure_hard) end_us = test_now_us() + 300000;      /* an end may not hear of the other's failure */
        while ((count < 2 || !end_done(&ends[0]) || !end_done(&ends[1])) && test_now_us() < end_us) {
            bool failed = false;
            for (int k = 2 - count; k < 2; k++) failed |= end_failed(&ends[k]);
            if (failed) break;
            work_both();
        }
        if (!pressure_hard) CHECK(count == 2 && end_done(&ends[0]) && end_done(&ends[1]));
        for (int k = 2 - count; k < 2; k++) end_finish(&ends[k]);
    }
    tprpc_listener_close(listener);
    for (int i = 0; i < 1000 && accepts && !LOAD(&a.done); i++) work_both();
    CHECK_EQ_INT(accepts, LOAD(&a.done));
    if (a.pipe && a.pipe != ends[0].pipe) tprpc_pipe_close(a.pipe);
}

/* After the pressure the two find a way to each other, whatever became of their pipes. */
static void goes_on(void) {
    bool through = false;
    for (int i = 0; i < TRIES && !through; i++) {
        const uint32_t id = record_count;
        if (!begin_call(&both[i % 2], names[!(i % 2)], ECHO)) continue;
        const int64_t end_us = test_now_us() + (int64_t)GIVE_UP_S * 1000000 * TEST_SLOWDOWN;
        while (!LOAD(&records[id].outcomes) && test_now_us() < end_us) work_both();
        through = records[id].outcomes && records[id].status == TPRPC_OK;
    }
    CHECK(through);
}

static void run_seed(const strain *with, uint64_t seed) {
    const int fds = test_count_fds(), mappings = test_count_shared(), failures = harness_failures;
    tprpc_store *store = NULL;
    printf("seed %llu\n", (unsigned long long)seed);
    fflush(stdout);
    random_state = test_mix(seed);
    both_mode.threads = (int)(seed % 3);
    record_count = 0;
    ended = lent = given_back = kept_count = never_count = 0;
    memset(lane_order, 0, sizeof lane_order);
    memset(in_lane, 0, sizeof in_lane);
    over_shm = strstr(with->transports, "shm") != NULL;
    press(seed, with->hard);
    if (open_both(with, &store) || !CHECK(with->hard)) {
        const bool joined = join_both(store);
        CHECK(joined || with->hard);
        if (joined) calls_of_all_kinds();
        messages_both_ways(with->address);
        release_pressure();
        if (joined) goes_on();
        if (seed % 2) STORE(&tprpc_test_hook, pressed);      /* while all ends, too */
    }
    for (int i = 0; i < 2; i++) if (both[i].agent) CHECK_EQ_INT(tprpc_agent_destroy(both[i].agent), TPRPC_OK);
    tprpc_store_close(store);
    for (int i = 2; i-- > 0;) {
        if (both[i].ctx) CHECK_EQ_INT(tprpc_context_destroy(both[i].ctx), TPRPC_OK);
        CHECK_EQ_INT(both[i].heap.blocks, 0);
    }
    release_pressure();
    memset(both, 0, sizeof both);
    CHECK_EQ_INT(ended, record_count);
    CHECK_EQ_INT(given_back, lent);
    CHECK_EQ_INT(slots_taken(), 0);
    CHECK_EQ_INT(test_count_fds(), fds);
    CHECK_EQ_INT(test_count_shared(), mappings);
    if (harness_failures > failures) fprintf(stderr, "TEST_SEED=%llu repeats it\n", (unsigned long long)seed);
}

static uint64_t number_of(const char *name, uint64_t otherwise) {
    const char *text = getenv(name);
    return text ? strtoull(text, NULL, 10) : otherwise;
}

static void run_strain(void *arg) {
    const strain *with = (const strain *)arg;
    const char *given = getenv("TEST_SEED");
    pool_fill();
    if (given) {
        run_seed(with, strtoull(given, NULL, 10));
    } else {
        const uint64_t from = 1 + number_of("PRESSURE_SOAK", 0) * SEEDS;
        for (uint64_t i = 0; i < SEEDS / TEST_SLOWDOWN && !harness_failures; i++) run_seed(with, from + i);
    }
    for (int i = 0; i < 5; i++) printf("%s %d%s", fault_names[i], faults[i], i < 4 ? ", " : "\n");
    for (int i = 0; i < 4 + with->hard && !given; i++) CHECK(faults[i] >= 10);
    free(pool);
}

/* ---- killed at the n-th call: a survivor serves and calls one victim after the other, all under one name ---- */

enum { LIFE_CALLS = 1000, KILLS = 150, VICTIM_CALLS = 20, ENOUGH = 8, AT_ONCE = 6, DEATH_MS = 5000 };
typedef struct fate { int ready, go, dead, mourned, enough, stop; uint64_t calls[2]; char address[100]; } fate;
static fate *fates;                   /* shared by all processes of the test */
static const strain *killed_over;
static char kill_url[300];
static uint64_t kill_seed;

static void open_apart(side *s, const char *name) {
    tprpc_context_desc context = {0};
    tprpc_agent_desc agent = {0};
    tprpc_error error = {0};
    memset(s, 0, sizeof *s);
    s->name = name;
    context.transports = killed_over->transports;
    context.spin_us = TPRPC_NOW;
    context.allocator.alloc = heap_alloc;
    context.allocator.free = heap_free;
    context.allocator.user = &s->heap;
    REQUIRE_EQ_INT(tprpc_context_create(&context, &s->ctx, &error), TPRPC_OK);
    agent.context = s->ctx;
    agent.name = name;
    agent.init_method = kill_url;
    REQUIRE_EQ_INT(tprpc_agent_create(&agent, &s->agent, &error), TPRPC_OK);
    for (const tprpc_method_desc *m = methods; m->name; m++) {
        tprpc_method_desc method = *m;
        method.user = s;
        REQUIRE_EQ_INT(tprpc_agent_register(s->agent, &method, NULL), TPRPC_OK);
    }
    if (tprpc_agent_wait_ready(s->agent, WAIT_MS, &error) != TPRPC_OK)
        REQUIRE(harness_fail(__FILE__, __LINE__, "%s cannot join: %s", name, error.text));
}

static void close_apart(side *s) {
    CHECK_EQ_INT(tprpc_agent_destroy(s->agent), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(s->ctx), TPRPC_OK);
    CHECK_EQ_INT(s->heap.blocks, 0);
}

static void work_apart(side *s) {
    tprpc_poll(s->ctx, 500, 0);
    answer(kept, &kept_count);
}

/* An exchange until it dies; who is not to die ends when the survivor has had enough of it. */
static void victim(void *arg) {
    const int round = *(int *)arg;
    static side s;
    static end e;
    tprpc_pipe_desc desc = {0};
    tprpc_pipe *pipe = NULL;
    int64_t end_us = test_now_us() + (int64_t)WAIT_MS * 1000 * TEST_SLOWDOWN;
    random_state = test_mix(kill_seed + kill_at);     /* who is to die at that call is the same in every run */
    press(random_state, false);
    open_apart(&s, "victim");
    desc.address = fates->address;
    REQUIRE_EQ_INT(tprpc_connect(s.ctx, &desc, &pipe, NULL), TPRPC_OK);
    end_begin(&e, pipe, 1);
    for (int i = 0; i < VICTIM_CALLS; i++) {
        begin_call(&s, "survivor", (int)random_below(KINDS));
        if (e.written < MESSAGES) end_write(&e);
        while ((int)record_count - LOAD(&ended) >= AT_ONCE && test_now_us() < end_us) work_apart(&s);
    }
    while ((LOAD(&ended) < (int)record_count || !end_done(&e) || LOAD(&fates->enough) <= round) &&
           test_now_us() < end_us) work_apart(&s);
    CHECK_EQ_INT(ended, record_count);
    CHECK(end_done(&e));
    CHECK(LOAD(&fates->enough) > round);
    if (kill_at == UINT64_MAX) fates->calls[round > 0] = calls_made;
    tprpc_pipe_close(pipe);
    close_apart(&s);
}

/* One victim's life, as the survivor sees it, and what must be over after its death. */
static void outlive(side *s, int round, tprpc_listener *listener, accepting *a, tprpc_store *store, int fds,
                    int mappings) {
    static end e;
    bool piped = false;
    int good = 0;
    record_count = 0;
    ended = lent = given_back = 0;
    if (a->done) {
        memset(a, 0, sizeof *a);
        CHECK_EQ_INT(tprpc_accept(listener, on_accepted, a), TPRPC_OK);
    }
    while (LOAD(&fates->dead) <= round) {
        if ((int)record_count - LOAD(&ended) < AT_ONCE && record_count < CALLS - 1)
            begin_call(s, "victim", (int)random_below(KINDS));
        if (a->pipe && !piped) end_begin(&e, a->pipe, 0);
        piped |= a->pipe != NULL;
        if (piped && e.written < MESSAGES) end_write(&e);
        work_apart(s);
        good = 0;
        for (uint32_t i = 0; i < record_count && good < ENOUGH; i++)
            good += records[i].outcomes && as_meant(&records[i]);
        if (good >= ENOUGH) STORE(&fates->enough, round + 1);
    }
    const int64_t end_us = test_now_us() + (int64_t)DEATH_MS * 1000 * TEST_SLOWDOWN;
    while ((LOAD(&ended) < (int)record_count || given_back < lent ||
            (piped && LOAD(&e.outcomes) < LOAD(&e.begun))) && test_now_us() < end_us) work_apart(s);
    CHECK_EQ_INT(ended, record_count);
    CHECK_EQ_INT(given_back, lent);
    if (piped) CHECK_EQ_INT(e.outcomes, e.begun);
    if (piped) tprpc_pipe_close(e.pipe);
    answer(never, &never_count);
    bury_name(store, "victim");
    while ((test_count_fds() > fds || slots_taken()) && test_now_us() < end_us) work_apart(s);   /* it may speak yet */
    CHECK_LE_INT(test_count_fds(), fds);
    CHECK_LE_INT(test_count_shared(), mappings);
    CHECK_EQ_INT(slots_taken(), 0);
}

static void survivor(void *arg) {
    static side s;
    static accepting a = {1, NULL};
    tprpc_listener_desc desc = {0};
    tprpc_store_desc store_desc = {0};
    tprpc_listener *listener = NULL;
    tprpc_store *store = NULL;
    (void)arg;
    random_state = test_mix(kill_seed);
    press(random_state, false);
    open_apart(&s, "survivor");
    store_desc.url = kill_url;
    REQUIRE_EQ_INT(tprpc_store_open(s.ctx, &store_desc, &store, NULL), TPRPC_OK);
    desc.addresses = &killed_over->address;
    desc.address_count = 1;
    REQUIRE_EQ_INT(tprpc_listen(s.ctx, &desc, &listener, NULL), TPRPC_OK);
    snprintf(fates->address, sizeof fates->address, "%s", tprpc_listener_address(listener, NULL));
    bury_name(store, "victim");                      /* nobody yet; whatever the store keeps open is open */
    const int fds = test_count_fds(), mappings = test_count_shared();
    STORE(&fates->ready, 1);
    for (int round = 0; !LOAD(&fates->stop);) {
        if (LOAD(&fates->go) <= round) {
            work_apart(&s);
            continue;
        }
        outlive(&s, round, listener, &a, store, fds, mappings);
        STORE(&fates->mourned, ++round);
    }
    tprpc_listener_close(listener);
    tprpc_store_close(store);
    close_apart(&s);
}

static bool await(int *flag, int at_least) {
    const int64_t end_us = test_now_us() + (int64_t)WAIT_MS * 1000 * TEST_SLOWDOWN;
    while (LOAD(flag) < at_least && test_now_us() < end_us) test_sleep_us(200);
    return LOAD(flag) >= at_least;
}

static void run_kills(void *arg) {
    const uint64_t only = number_of("KILL_AT", 0);
    const int kills = only ? 1 : KILLS / TEST_SLOWDOWN;
    char path[250];
    int died = 0;
    void *memory = mmap(NULL, sizeof *fates, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    fates = (fate *)memory;
    pool_fill();
    apart = true;
    killed_over = (const strain *)arg;
    over_shm = strstr(killed_over->transports, "shm") != NULL;
    kill_seed = number_of("TEST_SEED", 1 + number_of("PRESSURE_SOAK", 0) * SEEDS);
    printf("seed %llu\n", (unsigned long long)kill_seed);
    snprintf(kill_url, sizeof kill_url, "file://%s", test_temp_path(path, sizeof path));
    const pid_t pid = test_fork_run(survivor, NULL);
    REQUIRE(await(&fates->ready, 1));
    for (int round = 0; round < kills + 2 && !harness_common->failures; round++) {   /* the first and last live on */
        const bool dies = round > 0 && round <= kills;
        kill_at = only ? only : 1 + test_mix(kill_seed * 1000 + (uint64_t)round) % LIFE_CALLS;
        if (!dies) kill_at = UINT64_MAX;              /* counted all the same */
        STORE(&fates->go, round + 1);
        const pid_t child = test_fork_run(victim, &round);
        const int status = test_wait_child(child, 60);
        STORE(&fates->dead, round + 1);
        died += status == 128 + SIGKILL;
        CHECK(status == 0 || (dies && status == 128 + SIGKILL));
        if (!CHECK(await(&fates->mourned, round + 1)) || status % (128 + SIGKILL))
            fprintf(stderr, "TEST_SEED=%llu KILL_AT=%llu repeats it (round %d)\n", (unsigned long long)kill_seed,
                    (unsigned long long)kill_at, round);
    }
    STORE(&fates->stop, 1);
    CHECK_EQ_INT(test_wait_child(pid, 60), 0);
    printf("%d of %d died, in %d calls; the whole lives were of %llu and %llu\n", died, kills, LIFE_CALLS,
           (unsigned long long)fates->calls[0], (unsigned long long)fates->calls[1]);
    if (!only) CHECK(died > kills / 3);       /* who was done before his call came lives */
    free(pool);
}

TESTS(kills) {
    test_add("killed_over_tcp", run_kills, (void *)(uintptr_t)&strains[0], 240);
    test_add("killed_over_shm", run_kills, (void *)(uintptr_t)&strains[2], 240);
    test_add("killed_when_moved", run_kills, (void *)(uintptr_t)&strains[4], 240);
}

TESTS(strains) {
    for (size_t i = 0; i < sizeof strains / sizeof strains[0]; i++)
        test_add(strains[i].name, run_strain, (void *)(uintptr_t)&strains[i], 240);
}
