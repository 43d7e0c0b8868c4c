/* What the workers of the simulation do, and the ledger in which every operation stands: what it should bring about and
   what has come of it. The ledger sees all workers at once, so each callback is held against what really happened. */
#ifndef TPRPC_TESTS_SIM_WORK_H
#define TPRPC_TESTS_SIM_WORK_H

#include "sim_net.h"

enum { SIM_MAGIC = 0x73696d31, SIM_HEAD = 16, SIM_TENSORS = 4, SIM_LANES = 4, SIM_PIPES = 8 };
enum { SIM_SLACK_US = 3000 };          /* a timer's tick, and what looking at the clock took */

typedef enum sim_kind {
    SIM_PLAIN, SIM_TENSOR, SIM_PLACED, SIM_ONE_WAY, SIM_LANE, SIM_NESTED_WAIT, SIM_NESTED_ASYNC, SIM_CANCELLED,
    SIM_TIMED_OUT, SIM_LATE, SIM_CALLER_GONE, SIM_TWICE, SIM_FAILED, SIM_UNANSWERED, SIM_NO_METHOD, SIM_NO_WORKER,
    SIM_REFUSED, SIM_CALLS, SIM_WRITE = SIM_CALLS, SIM_DESCRIPTOR, SIM_READ, SIM_ACCEPT
} sim_kind;

typedef struct sim_op {
    uint32_t  id, life;
    sim_kind  kind;
    sim_node *node, *target;
    struct sim_op *next, *prev;        /* of the worker's pending ones */
    bool      pending, ended, one_way, borrowed, place_call, place_method, with_future, cancelled, call_again,
              inside, calm;
    int       done, released, handled, placings, unplacings;
    tprpc_status status;
    int64_t   due, begun;              /* by the worker's clock, or never; virtual */
    uint64_t  begun_order, ended_order;
    uint32_t  lane, answer_ms;
    size_t    body, sizes[SIM_TENSORS], reply_body;
    int       tensors;
    uint8_t  *lent;                    /* what is borrowed from the worker */
    size_t    lent_size;
    uint8_t  *into[SIM_TENSORS];       /* where the reply's tensors go */
    tprpc_future future;
    struct sim_end *end;               /* of a pipe */
    uint32_t  number;                  /* on that pipe, by kind */
    uint32_t  read_of;                 /* SIM_READ: the message that is read */
} sim_op;

typedef struct sim_placing { struct sim_placing *next; sim_op *op; uint8_t *into[SIM_TENSORS]; int state; } sim_placing;
enum { SIM_PLACED_OUT = 1, SIM_HANDED, SIM_UNPLACED };

typedef enum sim_todo_kind {
    SIM_DO_REPLY = 1, SIM_DO_CANCEL, SIM_DO_RELEASE, SIM_DO_CLOSE, SIM_DO_REGISTER
} sim_todo_kind;
typedef struct sim_todo {              /* something that a worker does at its time */
    int64_t        at;                 /* virtual */
    sim_todo_kind  kind;
    sim_op        *op;
    tprpc_request  request;
    struct sim_end *end;
    uint32_t       end_number;
} sim_todo;

typedef struct sim_end {               /* one end of a pipe */
    struct sim_end *next;
    sim_node   *node;
    tprpc_pipe *pipe;                  /* NULL: closed */
    uint32_t    number;
    bool        ordered, failed;
    int         pending;               /* operations */
    int         wanted;                /* writes to come */
    uint32_t    issued[4], called[4];  /* of writes, descriptors, reads: how many; the next callback's of an ordered */
    uint32_t    from, next_message;    /* the other end, once a message named it; its next message */
    uint32_t    sent;
    int         described;             /* descriptors asked for and not come */
} sim_end;

typedef struct sim_worker {
    sim_op      *pending;              /* a list */
    int          pending_count, calls_out;
    int64_t      soonest;              /* none of the pending is due before */
    sim_todo    *todo;
    size_t       todo_count, todo_room;
    int          quota;                /* operations it will begin */
    int64_t      next_at;
    int          mode, depth, turn;    /* turn: whose of its neighbours is the next call's */
    int          rolls;                /* calls of the roll call that it has begun */
    bool         finished, rolled, joined, registered;
    sim_placing *placings;
    uint32_t    *lanes;                /* of each caller, SIM_LANES: the last call whose handler began */
    sim_end     *ends;
    tprpc_listener *listener;
    int          accepts;
    int          ready;                /* callbacks of the start */
    tprpc_status ready_status;
} sim_worker;

static sim_op **sim_ops;
static uint32_t sim_op_count, sim_op_room;
static uint64_t sim_order;             /* what began and ended, in what order */
static bool sim_leaving, sim_static_group, sim_has_pipes, sim_has_big, sim_all_channels;
static int  sim_finished, sim_joined, sim_neighbours;      /* neighbours: that a worker calls; 0: all */
static int  sim_rolled;                /* workers whose roll call is over */
static bool sim_calm, sim_rolling;     /* all faults are long over; a call of the roll call is made */
static int64_t sim_mix_of[SIM_CALLS];  /* how often each kind, of their sum */
static uint32_t sim_end_numbers;
static int64_t sim_timeout_us;         /* of calls that should succeed */
static void *sim_old[4096];            /* memory that was given back, kept for a while so that a late read is seen */
static size_t sim_old_sizes[4096];
static uint32_t sim_old_at;

static const int sim_kind_counts[SIM_CALLS] = {
    SIM_call_plain, SIM_call_tensors, SIM_call_placed, SIM_call_one_way, SIM_call_lane, SIM_call_nested_wait,
    SIM_call_nested_async, SIM_call_cancelled, SIM_call_timed_out, SIM_call_replied_late, SIM_call_caller_gone,
    SIM_call_answered_twice, SIM_call_failed_by_handler, SIM_call_unanswered, SIM_call_no_method, SIM_call_no_worker,
    SIM_call_refused_place};

/* ---- bytes: each is known from the operation's id ---- */

static uint64_t sim_word(uint32_t id, uint32_t salt, size_t i) {
    return (UINT64_C(0x9e3779b97f4a7c15) * ((uint64_t)id << 8 | salt)) ^ (uint64_t)i * UINT64_C(0xd6e8feb86659fd93);
}

static void sim_fill(uint8_t *out, size_t size, uint32_t id, uint32_t salt) {
    size_t i;
    uint64_t word;
    for (i = 0; i + 8 <= size; i += 8) {
        word = sim_word(id, salt, i);
        memcpy(out + i, &word, 8);
    }
    word = sim_word(id, salt, i);
    if (i < size) memcpy(out + i, &word, size - i);
}

static void sim_check_bytes(const void *data, size_t size, uint32_t id, uint32_t salt, const char *what) {
    const uint8_t *at = (const uint8_t *)data;
    size_t i;
    uint64_t word;
    for (i = 0; i + 8 <= size; i += 8) {
        word = sim_word(id, salt, i);
        if (memcmp(at + i, &word, 8) != 0)
            sim_fail("%s of operation %u: byte %zu of %zu is wrong", what, id, i, size);
    }
    word = sim_word(id, salt, i);
    if (i < size && memcmp(at + i, &word, size - i) != 0)
        sim_fail("%s of operation %u: byte %zu of %zu is wrong", what, id, i, size);
}

enum { SIM_SALT_BODY = 1, SIM_SALT_REPLY = 2, SIM_SALT_TENSOR = 16, SIM_SALT_ANSWER = 32 };

static void sim_put_body(uint8_t *out, size_t size, uint32_t id, uint32_t salt, uint32_t a, uint32_t b) {
    uint32_t head[4] = {SIM_MAGIC, id, a, b};
    memcpy(out, head, SIM_HEAD);
    sim_fill(out + SIM_HEAD, size - SIM_HEAD, id, salt);
}

/* The operation whose body this is. */
static sim_op *sim_body_op(const tprpc_message *message, uint32_t salt, uint32_t *a, uint32_t *b) {
    uint32_t head[4];
    if (!message || message->metadata_size < SIM_HEAD) sim_fail("a message without a body");
    memcpy(head, message->metadata, SIM_HEAD);
    if (head[0] != SIM_MAGIC || head[1] == 0 || head[1] > sim_op_count) sim_fail("a body that is none of ours");
    sim_check_bytes((const uint8_t *)message->metadata + SIM_HEAD, message->metadata_size - SIM_HEAD, head[1], salt,
                    "the body");
    if (a) *a = head[2];
    if (b) *b = head[3];
    return sim_ops[head[1] - 1];
}

/* Spoils memory that nobody may look at any more. What is looked at late is found out by its bytes; by the address
   sanitizer too. */
static void sim_spoil(void *memory, size_t size) {
    uint32_t at = sim_old_at++ % 4096;
    if (!memory) return;
    memset(memory, 0xdd, size);
#if SIM_ASAN
    free(memory);
    (void)at;
#else
    free(sim_old[at]);
    sim_old[at] = memory;
    sim_old_sizes[at] = size;
#endif
}

/* Nobody wrote there either. */
static void sim_check_spoiled(void) {
    uint32_t i;
    for (i = 0; i < 4096; i++) {
        const uint8_t *at = (const uint8_t *)sim_old[i];
        size_t k;
        for (k = 0; at && k < sim_old_sizes[i]; k++)
            if (at[k] != 0xdd) sim_fail("memory that was given back was written to, at byte %zu", k);
        free(sim_old[i]);
        sim_old[i] = NULL;
    }
}

/* ---- the ledger ---- */

static sim_op *sim_op_new(sim_node *node, sim_kind kind) {
    sim_op *op = (sim_op *)sim_new(sizeof *op);
    if (sim_op_count == sim_op_room) {
        sim_op_room = sim_op_room ? 2 * sim_op_room : 1024;
        sim_ops = (sim_op **)realloc(sim_ops, sim_op_room * sizeof *sim_ops);
        if (!sim_ops) sim_fail("the simulation has no memory");
    }
    sim_ops[sim_op_count++] = op;
    op->id = sim_op_count;
    op->kind = kind;
    op->node = node;
    op->life = node->life;
    op->due = SIM_NEVER;
    op->begun = sim.now;
    op->begun_order = ++sim_order;
    return op;
}

static void sim_op_pend(sim_op *op) {
    sim_worker *work = op->node->work;
    op->pending = true;
    op->next = work->pending;
    if (op->next) op->next->prev = op;
    work->pending = op;
    work->pending_count++;
    if (op->due < work->soonest) work->soonest = op->due;
}

static void sim_count_outcome(tprpc_status status) {
    if (status == TPRPC_OK) sim_count(SIM_outcome_ok);
    if (status == TPRPC_ERROR_PEER) sim_count(SIM_outcome_peer);
    if (status == TPRPC_ERROR_UNREACHABLE) sim_count(SIM_outcome_unreachable);
    if (status == TPRPC_ERROR_TIMEOUT) sim_count(SIM_outcome_timeout);
    if (status == TPRPC_ERROR_CLOSED) sim_count(SIM_outcome_closed);
    if (status == TPRPC_ERROR_CANCELLED) sim_count(SIM_outcome_cancelled);
    if (status == TPRPC_ERROR_REMOTE) sim_count(SIM_outcome_remote);
    if (status == TPRPC_ERROR_NO_METHOD) sim_count(SIM_outcome_no_method);
    if (status == TPRPC_ERROR_NO_WORKER) sim_count(SIM_outcome_no_worker);
    if (status == TPRPC_ERROR_LIMIT) sim_count(SIM_outcome_limit);
}

/* Its one callback has come, or the function refused it. */
static void sim_op_end(sim_op *op, tprpc_status status) {
    sim_worker *work = op->node->work;
    op->ended = true;
    op->status = status;
    op->ended_order = ++sim_order;
    if (!op->pending) return;
    op->pending = false;
    if (op->prev) op->prev->next = op->next;
    else work->pending = op->next;
    if (op->next) op->next->prev = op->prev;
    op->next = op->prev = NULL;
    work->pending_count--;
}

/* A callback of it: the first, in its worker's own life and on its own fiber. */
static void sim_op_called(sim_op *op, tprpc_status status, const tprpc_error *error) {
    if (++op->done != 1) sim_fail("operation %u has its callback for the %d. time", op->id, op->done);
    if (op->ended) sim_fail("operation %u was refused, and has a callback", op->id);
    if (sim.current != op->node || op->life != op->node->life)
        sim_fail("operation %u has its callback elsewhere, or in another life", op->id);
    if ((status == TPRPC_OK) != (error == NULL)) sim_fail("operation %u: status %d with%s an error", op->id,
                                                          (int)status, error ? "" : "out");
    if (error && (error->status != status || !error->text[0]))
        sim_fail("operation %u: an error of status %d that says %d, %s", op->id, (int)status, (int)error->status,
                 error->text);
    sim_note(op->node->index, "ended", op->id, (int64_t)status, op->kind);
    sim_count_outcome(status);
    if ((status == TPRPC_ERROR_CANCELLED) != op->cancelled)
        sim_fail("operation %u was%s cancelled, and ends with %s", op->id, op->cancelled ? "" : " not",
                 tprpc_status_name(status));
    if (status == TPRPC_ERROR_TIMEOUT && op->due != SIM_NEVER && op->kind < SIM_CALLS &&
        op->node->clock_most < op->due && strstr(error->text, "no answer within"))
        sim_fail("operation %u timed out %" PRId64 " us early", op->id, op->due - op->node->clock_most);
    sim_op_end(op, status);
}

static void sim_released(void *user) {
    sim_op *op = (sim_op *)user;
    if (++op->released != 1) sim_fail("the memory of operation %u is released for the %d. time", op->id, op->released);
    if (sim.current != op->node || op->life != op->node->life)
        sim_fail("the memory of operation %u is released elsewhere, or in another life", op->id);
    sim_note(op->node->index, "released", op->id, 0, 0);
    sim_spoil(op->lent, op->lent_size);
    op->lent = NULL;
}

/* Called when a worker has nothing more to do now, and would sleep for that long (negative: until it is woken) by its
   clock: what is due has ended, and what comes due ends the sleep. */
static void sim_nothing_overdue(sim_node *node, int64_t sleep_us) {
    sim_worker *work = node->work;
    const int64_t due = node->clock_most - SIM_SLACK_US;
    const int64_t until = sleep_us < 0 ? SIM_NEVER : sim_clock_of(node) + sleep_us - SIM_SLACK_US;
    sim_op *op;
    if (!work || (work->soonest >= due && work->soonest >= until) || node->dying) return;
    work->soonest = SIM_NEVER;
    for (op = work->pending; op; op = op->next) {
        if (op->due < due)
            sim_fail("operation %u (kind %d) is %" PRId64 " us overdue, and its worker goes to sleep", op->id,
                     (int)op->kind, node->clock_most - op->due);
        if (op->due < until)
            sim_fail("operation %u (kind %d) is due while its worker sleeps on for %" PRId64 " us", op->id,
                     (int)op->kind, sleep_us);
        if (op->due < work->soonest) work->soonest = op->due;
    }
}

/* Whether the method that it calls is registered only at times. */
static bool sim_method_goes(const sim_op *op) { return op->id % 8 == 0 && !op->inside && !op->place_method; }

/* Whether a call may end so. In a quiet seed there is one way alone. */
static bool sim_status_fits(const sim_op *op, tprpc_status status) {
    tprpc_status want = TPRPC_OK;
    bool other = false;
    switch (op->kind) {
    case SIM_CANCELLED:
        want = op->cancelled ? TPRPC_ERROR_CANCELLED : TPRPC_OK;
        break;
    case SIM_TIMED_OUT: case SIM_CALLER_GONE:
        want = TPRPC_ERROR_TIMEOUT;
        other = status == TPRPC_OK && op->kind == SIM_CALLER_GONE;   /* that one was quick */
        break;
    case SIM_FAILED: case SIM_UNANSWERED: want = TPRPC_ERROR_REMOTE; break;
    case SIM_NO_METHOD: want = TPRPC_ERROR_NO_METHOD; break;
    case SIM_NO_WORKER: want = TPRPC_ERROR_NO_WORKER; break;
    case SIM_REFUSED: want = TPRPC_ERROR_LIMIT; break;
    default: break;
    }
    if (status == want || other) return true;
    if (op->calm) return false;
    if (status == TPRPC_ERROR_NO_METHOD && sim_method_goes(op)) return true;
    if (status == TPRPC_ERROR_REMOTE && op->kind == SIM_NESTED_WAIT) return true;      /* waits nest to a limit */
    if (sim.quiet) return false;
    if (status == TPRPC_ERROR_REMOTE) return op->kind == SIM_NESTED_ASYNC;
    return status == TPRPC_ERROR_PEER || status == TPRPC_ERROR_UNREACHABLE || status == TPRPC_ERROR_TIMEOUT ||
           status == TPRPC_ERROR_NO_METHOD || (status == TPRPC_ERROR_NO_WORKER && !sim_static_group) ||
           (status == TPRPC_ERROR_NO_WORKER && sim_leaving) || (status == TPRPC_ERROR_CLOSED && op->node->dying);
}

/* ---- a worker's list of what it does later ---- */

static sim_todo *sim_later(sim_node *node, sim_todo_kind kind, int64_t delay) {
    sim_worker *work = node->work;
    sim_todo *todo;
    if (work->todo_count == work->todo_room) {
        work->todo_room = work->todo_room ? 2 * work->todo_room : 16;
        work->todo = (sim_todo *)realloc(work->todo, work->todo_room * sizeof *work->todo);
        if (!work->todo) sim_fail("the simulation has no memory");
    }
    todo = &work->todo[work->todo_count++];
    memset(todo, 0, sizeof *todo);
    todo->at = sim.now + delay;
    todo->kind = kind;
    return todo;
}

/* ---- calls: the caller's side ---- */

static sim_op *sim_call(sim_node *node, sim_kind kind, bool waits, tprpc_done on_done, void *user);
static sim_kind sim_some_kind(void);
static void sim_new_call(sim_node *node);

static void sim_check_reply(sim_op *op, const tprpc_message *reply) {
    int i;
    if (op->one_way) return;
    if (!reply) sim_fail("operation %u went well, without a reply", op->id);
    if (sim_body_op(reply, SIM_SALT_REPLY, NULL, NULL) != op || reply->metadata_size != op->reply_body)
        sim_fail("operation %u has the reply of another one", op->id);
    if (op->handled != 1) sim_fail("operation %u has a reply, and was handled %d times", op->id, op->handled);
    if ((int)reply->tensor_count != op->tensors)
        sim_fail("operation %u: its reply has %zu tensors, not %d", op->id, reply->tensor_count, op->tensors);
    for (i = 0; i < op->tensors; i++) {
        const tprpc_tensor *tensor = &reply->tensors[i];
        if (tensor->size != op->sizes[i]) sim_fail("operation %u: a tensor of another size came back", op->id);
        if (op->place_call && tensor->data != op->into[i])
            sim_fail("operation %u: a tensor is not where it was placed", op->id);
        sim_check_bytes(tensor->data, tensor->size, op->id, (uint32_t)(SIM_SALT_ANSWER + i), "a reply's tensor");
    }
}

static void sim_call_outcome(sim_op *op, tprpc_status status, const tprpc_message *reply, const tprpc_error *error) {
    if (!sim_status_fits(op, status) && !(op->life != op->node->life))
        sim_fail("operation %u (kind %d) ends with %s: %s", op->id, (int)op->kind, tprpc_status_name(status),
                 error ? error->text : "");
    if (status == TPRPC_OK) sim_check_reply(op, reply);
    if (status == TPRPC_ERROR_REMOTE && op->kind == SIM_FAILED &&
        (error->user_code != (int32_t)(op->id & 0xffff) || !strstr(error->text, "as it should")))
        sim_fail("operation %u failed as another one: %d, %s", op->id, (int)error->user_code, error->text);
}

static void sim_call_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    sim_op *op = (sim_op *)user;
    sim_op_called(op, status, error);
    sim_call_outcome(op, status, reply, error);
    op->node->work->calls_out--;
    if (op->call_again && !op->node->dying && !sim_leaving) {
        sim_count(SIM_call_from_callback);
        sim_call(op->node, SIM_PLAIN, false, NULL, NULL);
    }
}

static tprpc_status sim_call_place(tprpc_placement *placement, void *user) {
    sim_op *op = (sim_op *)user;
    int i;
    if (sim_body_op(placement->descriptor, SIM_SALT_REPLY, NULL, NULL) != op)
        sim_fail("operation %u is asked where another's reply goes", op->id);
    if (++op->placings != 1) sim_fail("operation %u is placed for the %d. time", op->id, op->placings);
    placement->cookie = op;
    for (i = 0; i < op->tensors; i++) {
        op->into[i] = (uint8_t *)sim_new(op->sizes[i] + 1);
        placement->tensors[i].data = op->into[i];
    }
    return TPRPC_OK;
}

static void sim_call_unplaced(const tprpc_placement *placement, void *user) {
    sim_op *op = (sim_op *)user;
    int i;
    if (placement->cookie != op || op->placings != 1) sim_fail("operation %u: what is unplaced was not placed", op->id);
    if (++op->unplacings != 1) sim_fail("operation %u is unplaced for the %d. time", op->id, op->unplacings);
    if (op->ended && op->status == TPRPC_OK) sim_fail("operation %u went well, and is unplaced", op->id);
    for (i = 0; i < op->tensors; i++) {
        sim_spoil(op->into[i], op->sizes[i] + 1);
        op->into[i] = NULL;
    }
}

static void sim_choose_sizes(sim_op *op) {
    int i;
    size_t sum = 0;
    op->body = SIM_HEAD + (size_t)sim_spread(sim_chance(50) ? 40000 : 600);
    op->reply_body = SIM_HEAD + (size_t)sim_spread(600);
    switch (op->kind) {
    case SIM_TENSOR: case SIM_PLACED: case SIM_REFUSED: op->tensors = (int)sim_between(1, SIM_TENSORS); break;
    case SIM_CANCELLED: case SIM_TIMED_OUT: case SIM_LANE: case SIM_LATE: case SIM_CALLER_GONE: case SIM_ONE_WAY:
        op->tensors = sim_chance(300) ? (int)sim_between(1, SIM_TENSORS) : 0;
        break;
    default: break;
    }
    for (i = 0; i < op->tensors; i++) {
        op->sizes[i] = (size_t)sim_spread(sim_chance(300) ? 60000 : 9000);
        if (sim_has_big && sim_chance(20)) op->sizes[i] = (size_t)sim_between(300000, 1500000);
        sum += op->sizes[i];
    }
    if (sum >= 300000) sim_count(SIM_call_big);
}

static void sim_choose_times(sim_op *op, tprpc_call_options *options) {
    int64_t timeout_us = op->calm ? 300 * SIM_S : sim_timeout_us;
    op->answer_ms = 0;
    if (op->kind == SIM_TIMED_OUT || op->kind == SIM_CALLER_GONE) timeout_us = sim_between(1, 300) * SIM_MS;
    if (op->kind == SIM_LATE) op->answer_ms = (uint32_t)sim_between(1, 400);
    if (op->kind == SIM_CALLER_GONE) op->answer_ms = (uint32_t)(timeout_us / SIM_MS + 1 + sim_spread(200));
    if (op->kind == SIM_CANCELLED) op->answer_ms = (uint32_t)sim_between(1, 100);
    options->timeout_ms = timeout_us / SIM_MS;
    op->due = sim_clock_of(op->node) + timeout_us;
    if (op->due < op->node->clock_most) op->due = op->node->clock_most;   /* the clock went back */
}

/* Puts a message together in one block: the body, then the tensors. */
static void sim_choose_message(sim_op *op, tprpc_message *message, tprpc_tensor *tensors) {
    size_t at = op->body;
    int i;
    op->lent_size = op->body;
    for (i = 0; i < op->tensors; i++) op->lent_size += op->sizes[i];
    op->lent = (uint8_t *)sim_new(op->lent_size);
    sim_put_body(op->lent, op->body, op->id, SIM_SALT_BODY, 0, 0);
    memset(message, 0, sizeof *message);
    memset(tensors, 0, SIM_TENSORS * sizeof *tensors);
    for (i = 0; i < op->tensors; i++) {
        sim_fill(op->lent + at, op->sizes[i], op->id, (uint32_t)(SIM_SALT_TENSOR + i));
        tensors[i].data = op->lent + at;
        tensors[i].size = op->sizes[i];
        at += op->sizes[i];
    }
    message->metadata = op->lent;
    message->metadata_size = op->body;
    message->tensors = tensors;
    message->tensor_count = (size_t)op->tensors;
    if (!op->borrowed) return;
    message->release = sim_released;
    message->release_user = op;
}

static const char *sim_method_of(const sim_op *op) {
    switch (op->kind) {
    case SIM_NO_METHOD: return "none";
    case SIM_REFUSED: return "refused";
    default: return op->place_method ? "placed" : sim_method_goes(op) ? "gone" : "plain";
    }
}

/* Refused: the sentence is there, the memory was released, and no callback follows. */
static void sim_call_refused(sim_op *op, tprpc_status status, const tprpc_error *error) {
    if (error->status != status || !error->text[0]) sim_fail("operation %u is refused without a word", op->id);
    if (op->borrowed && op->released != 1) sim_fail("operation %u is refused, and its memory is not released", op->id);
    if (status != TPRPC_ERROR_NO_WORKER && !sim_status_fits(op, status) && status != TPRPC_ERROR_CLOSED &&
        (op->node->work->joined || status != TPRPC_ERROR_INVALID))
        sim_fail("operation %u (kind %d) is refused with %s: %s", op->id, (int)op->kind, tprpc_status_name(status),
                 error->text);
    if (sim.quiet && op->kind != SIM_NO_WORKER) sim_fail("operation %u is refused: %s", op->id, error->text);
    sim_op_end(op, status);
}

/* Begins a call of that kind. waits: its future is wanted. on_done: of a handler that goes on there; user begins with
   the operation then. */
static sim_op *sim_call(sim_node *node, sim_kind kind, bool waits, tprpc_done on_done, void *user) {
    sim_op *op = sim_op_new(node, kind);
    tprpc_call_options options;
    tprpc_message message;
    tprpc_tensor tensors[SIM_TENSORS];
    tprpc_error error;
    tprpc_method_id id;
    tprpc_status status;
    const char *worker;
    bool by_id = sim_chance(250);
    memset(&options, 0, sizeof options);
    memset(&error, 0, sizeof error);
    op->target = &sim.nodes[sim_neighbours ? (node->index + 1 + 61 * (node->work->turn++ % sim_neighbours)) % sim.count
                                           : sim_below(sim.count)];
    op->calm = sim_rolling;
    if (op->calm && !sim_neighbours) op->target = &sim.nodes[(node->index + node->work->rolls) % sim.count];
    op->inside = on_done != NULL || op->calm;
    op->borrowed = sim_chance(300);
    op->one_way = kind == SIM_ONE_WAY;
    if (kind == SIM_LANE || kind == SIM_ONE_WAY) op->lane = (uint32_t)sim_between(kind == SIM_LANE, SIM_LANES - 1);
    if (kind == SIM_LANE && sim_chance(200)) op->one_way = true;
    sim_choose_sizes(op);
    sim_choose_times(op, &options);
    if (kind == SIM_PLACED || (op->tensors && sim_chance(200))) {
        op->place_call = !op->one_way && sim_chance(700);
        op->place_method = !op->place_call || sim_chance(500);
    }
    op->call_again = !op->inside && !op->one_way && sim_chance(50);
    op->with_future = kind == SIM_CANCELLED || waits || sim_chance(100);
    sim_count(sim_kind_counts[kind]);
    if (op->borrowed) sim_count(SIM_call_borrowed);
    sim_choose_message(op, &message, tensors);
    options.flags = op->one_way ? TPRPC_CALL_ONE_WAY : 0;
    options.lane = op->lane;
    options.on_done = on_done ? on_done : sim_call_done;
    options.user = on_done ? user : op;
    options.error = &error;
    if (op->place_call && !on_done) {
        options.place = sim_call_place;
        options.on_unplaced = sim_call_unplaced;
    } else {
        op->place_call = false;
    }
    if (on_done) *(sim_op **)user = op;
    worker = kind == SIM_NO_WORKER ? "nobody" : op->target->name;
    sim_note(node->index, "call", op->id, op->target->index, kind);
    sim_op_pend(op);
    node->work->calls_out++;
    op->future.owner = NULL;
    if (by_id && tprpc_resolve(node->agent, worker, sim_method_of(op), &id, NULL) == TPRPC_OK) {
        sim_count(SIM_call_resolved);
        status = tprpc_call_id(node->agent, id, &message, &options, op->with_future ? &op->future : NULL);
    } else {
        status = tprpc_call(node->agent, worker, sim_method_of(op), &message, &options,
                            op->with_future ? &op->future : NULL);
    }
    if (!op->borrowed) {
        sim_spoil(op->lent, op->lent_size);
        op->lent = NULL;
    }
    if (status != TPRPC_OK) {
        node->work->calls_out--;
        sim_call_refused(op, status, &error);
        return op;
    }
    if (op->done > 0) sim_fail("operation %u has its callback before the call returns", op->id);
    if (op->kind == SIM_CANCELLED) sim_later(node, SIM_DO_CANCEL, sim_spread(120 * SIM_MS))->op = op;
    else if (op->with_future && !waits) sim_later(node, SIM_DO_RELEASE, sim_spread(200 * SIM_MS))->op = op;
    return op;
}

/* ---- the handler's side ---- */

/* The last call of a lane that began to be handled: this one may come after it only where it was begun after it. What
   had ended for its caller before may be late: a connection that broke brings it, beside a new one. */
static void sim_lane_order(sim_node *node, sim_op *op) {
    uint32_t *last;
    if (!op->lane || !node->work->lanes) return;
    last = &node->work->lanes[op->node->index * SIM_LANES + (int)op->lane];
    if (*last > op->id) {
        sim_op *before = sim_ops[*last - 1];
        if (sim.quiet || !op->ended || op->ended_order > before->begun_order)
            sim_fail("lane %u from worker %d: call %u is handled after %u", op->lane, (int)op->node->index, op->id,
                     before->id);
        return;
    }
    *last = op->id;
}

static tprpc_status sim_answer(sim_op *op, tprpc_request request) {
    uint8_t *body = (uint8_t *)sim_new(op->reply_body);
    tprpc_tensor tensors[SIM_TENSORS];
    tprpc_message message;
    tprpc_status status;
    int i;
    memset(&message, 0, sizeof message);
    memset(tensors, 0, sizeof tensors);
    sim_put_body(body, op->reply_body, op->id, SIM_SALT_REPLY, 0, 0);
    message.metadata = body;
    message.metadata_size = op->reply_body;
    message.tensors = tensors;
    message.tensor_count = (size_t)op->tensors;
    for (i = 0; i < op->tensors; i++) {
        tensors[i].size = op->sizes[i];
        tensors[i].data = sim_new(op->sizes[i] + 1);
        sim_fill((uint8_t *)tensors[i].data, op->sizes[i], op->id, (uint32_t)(SIM_SALT_ANSWER + i));
    }
    status = tprpc_reply(request, &message);
    for (i = 0; i < op->tensors; i++) sim_spoil(tensors[i].data, op->sizes[i] + 1);
    sim_spoil(body, op->reply_body);
    sim_note(sim.current->index, "answer", op->id, (int64_t)status, 0);
    if (status != TPRPC_OK && status != TPRPC_ERROR_INVALID && (sim.quiet || status != TPRPC_ERROR_PEER))
        sim_fail("the answer to operation %u is refused with %s", op->id, tprpc_status_name(status));
    return status;
}

/* Keeps a request; one whose connection broke cannot be kept, and nobody waits for it. */
static bool sim_keep(sim_op *op, tprpc_request request) {
    if (tprpc_request_keep(request) == TPRPC_OK) return true;
    if (sim.quiet || tprpc_request_caller(request)) sim_fail("the request of operation %u cannot be kept", op->id);
    return false;
}

typedef struct sim_nested { sim_op *inner, *outer; tprpc_request request; } sim_nested;

static void sim_nested_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    sim_nested *nested = (sim_nested *)user;
    sim_op *inner = nested->inner;
    sim_op_called(inner, status, error);
    sim_call_outcome(inner, status, reply, error);
    inner->node->work->calls_out--;
    if (status == TPRPC_OK) sim_answer(nested->outer, nested->request);
    else tprpc_fail(nested->request, 7, "the nested call failed");
    free(nested);
}

/* A handler that calls another worker, and waits for it there, or answers when that has answered. */
static void sim_handle_nested(sim_node *node, sim_op *op, tprpc_request request) {
    sim_nested *nested = (sim_nested *)sim_new(sizeof *nested);
    tprpc_status status;
    sim_op *inner;
    nested->outer = op;
    nested->request = request;
    if (op->kind == SIM_NESTED_ASYNC) {
        if (!sim_keep(op, request)) {
            free(nested);
            return;
        }
        sim_call(node, SIM_PLAIN, false, sim_nested_done, nested);
        if (nested->inner->ended) {    /* refused, for a callback comes later */
            tprpc_fail(request, 7, "the nested call was refused");
            free(nested);
        }
        return;
    }
    free(nested);
    node->work->depth++;
    {
        tprpc_message message;
        tprpc_call_options options;
        tprpc_future future;
        tprpc_error error;
        uint8_t body[64];
        memset(&message, 0, sizeof message);
        memset(&options, 0, sizeof options);
        memset(&error, 0, sizeof error);
        inner = sim_op_new(node, SIM_PLAIN);
        inner->target = &sim.nodes[sim_below(sim.count)];
        inner->inside = true;
        inner->body = sizeof body;
        inner->reply_body = 40;
        sim_choose_times(inner, &options);
        inner->due = SIM_NEVER;        /* a wait within this one may have to end first */
        sim_put_body(body, sizeof body, inner->id, SIM_SALT_BODY, 0, 0);
        message.metadata = body;
        message.metadata_size = sizeof body;
        options.error = &error;
        sim_note(node->index, "call within", inner->id, inner->target->index, op->id);
        sim_op_pend(inner);
        status = tprpc_call(node->agent, inner->target->name, "plain", &message, &options, &future);
        memset(body, 0xdd, sizeof body);
        if (status == TPRPC_OK) {
            status = tprpc_future_wait(future, TPRPC_FOREVER);
            inner->done = 1;
            sim_note(node->index, "waited", inner->id, (int64_t)status, 0);
            if (status == TPRPC_OK) sim_check_reply(inner, tprpc_future_reply(future));
            else if (status != TPRPC_ERROR_LIMIT && !sim_status_fits(inner, status))
                sim_fail("operation %u within %u ends with %s", inner->id, op->id, tprpc_status_name(status));
            tprpc_future_release(future);
        } else if (sim.quiet) {
            sim_fail("operation %u within %u is refused: %s", inner->id, op->id, error.text);
        }
        sim_op_end(inner, status);
    }
    node->work->depth--;
    if (status == TPRPC_OK) sim_answer(op, request);
    else tprpc_fail(request, 7, "the nested call failed");
}

static void sim_handle_as_told(sim_node *node, sim_op *op, tprpc_request request) {
    char text[64];
    sim_todo *todo;
    switch (op->kind) {
    case SIM_TIMED_OUT: sim_keep(op, request); return;
    case SIM_LATE: case SIM_CALLER_GONE: case SIM_CANCELLED:
        if (!sim_keep(op, request)) return;
        todo = sim_later(node, SIM_DO_REPLY, op->answer_ms * SIM_MS);
        todo->op = op;
        todo->request = request;
        return;
    case SIM_FAILED:
        snprintf(text, sizeof text, "operation %u fails as it should", op->id);
        tprpc_fail(request, (int32_t)(op->id & 0xffff), text);
        return;
    case SIM_UNANSWERED: return;
    case SIM_NESTED_WAIT: case SIM_NESTED_ASYNC: sim_handle_nested(node, op, request); return;
    case SIM_TWICE:
        sim_answer(op, request);
        if (sim_answer(op, request) != TPRPC_ERROR_INVALID) sim_fail("operation %u is answered twice", op->id);
        return;
    default:
        if (op->one_way && op->id % 2) return;
        sim_answer(op, request);
    }
}

static void sim_handler(tprpc_request request, const tprpc_message *message, void *user) {
    sim_node *node = (sim_node *)user;
    sim_op *op = sim_body_op(message, SIM_SALT_BODY, NULL, NULL);
    sim_placing *placing = node->work->placings;
    const char *caller = tprpc_request_caller(request);
    int i;
    sim_note(node->index, "handle", op->id, op->node->index, op->kind);
    if (sim.current != node || op->target != node) sim_fail("operation %u is handled elsewhere", op->id);
    if (++op->handled != 1) sim_fail("operation %u is handled for the %d. time", op->id, op->handled);
    if (caller ? strcmp(caller, op->node->name) != 0 : sim.quiet)   /* NULL: its connection broke, and nobody waits */
        sim_fail("operation %u comes from another caller, %s", op->id, caller ? caller : "which has gone");
    if ((int)message->tensor_count != op->tensors || message->metadata_size != op->body)
        sim_fail("operation %u: another message came", op->id);
    while (placing && placing->op != op) placing = placing->next;
    if (op->place_method && op->tensors && (!placing || placing->state != SIM_PLACED_OUT))
        sim_fail("operation %u is handled, and was not placed", op->id);
    if (placing) placing->state = SIM_HANDED;
    for (i = 0; i < op->tensors; i++) {
        if (message->tensors[i].size != op->sizes[i]) sim_fail("operation %u: a tensor of another size", op->id);
        if (placing && message->tensors[i].data != placing->into[i])
            sim_fail("operation %u: a tensor is not where it was placed", op->id);
        sim_check_bytes(message->tensors[i].data, op->sizes[i], op->id, (uint32_t)(SIM_SALT_TENSOR + i), "a tensor");
    }
    sim_lane_order(node, op);
    sim_handle_as_told(node, op, request);
}

static tprpc_status sim_method_place(tprpc_placement *placement, void *user) {
    sim_node *node = (sim_node *)user;
    sim_op *op = sim_body_op(placement->descriptor, SIM_SALT_BODY, NULL, NULL);
    sim_placing *placing;
    int i;
    if (op->kind == SIM_REFUSED) return TPRPC_ERROR_LIMIT;
    placing = (sim_placing *)sim_new(sizeof *placing);
    if (op->target != node || strcmp(placement->worker, op->node->name) != 0)
        sim_fail("operation %u is placed elsewhere", op->id);
    placing->op = op;
    placing->state = SIM_PLACED_OUT;
    placing->next = node->work->placings;
    node->work->placings = placing;
    placement->cookie = placing;
    for (i = 0; i < op->tensors; i++) {
        placing->into[i] = (uint8_t *)sim_new(op->sizes[i] + 1);
        placement->tensors[i].data = placing->into[i];
    }
    return TPRPC_OK;
}

static void sim_method_unplaced(const tprpc_placement *placement, void *user) {
    sim_placing *placing = (sim_placing *)placement->cookie;
    int i;
    (void)user;
    if (!placing || placing->state != SIM_PLACED_OUT) sim_fail("what is unplaced was not placed, or was handed over");
    placing->state = SIM_UNPLACED;
    for (i = 0; i < placing->op->tensors; i++) {
        sim_spoil(placing->into[i], placing->op->sizes[i] + 1);
        placing->into[i] = NULL;
    }
}

static void sim_refused_handler(tprpc_request request, const tprpc_message *message, void *user) {
    sim_op *op = sim_body_op(message, SIM_SALT_BODY, NULL, NULL);
    (void)request;
    (void)user;
    sim_fail("operation %u was refused by place, and is handled", op->id);
}

static void sim_register(sim_node *node, const char *name, tprpc_handler handler, tprpc_place place) {
    tprpc_method_desc desc;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    desc.name = name;
    desc.handler = handler;
    desc.place = place;
    desc.on_unplaced = place ? sim_method_unplaced : NULL;
    desc.user = node;
    if (tprpc_agent_register(node->agent, &desc, &error) != TPRPC_OK) sim_fail("register %s: %s", name, error.text);
}

/* ---- pipes ---- */

static void sim_pipe_go_on(sim_end *end);

/* An operation of a pipe's has its callback; on an ordered pipe those of one kind come in the order of issue. */
static void sim_pipe_called(sim_op *op, tprpc_status status, const tprpc_error *error) {
    sim_end *end = op->end;
    int kind = (int)op->kind - (int)SIM_WRITE;
    sim_op_called(op, status, error);
    end->pending--;
    if (status != TPRPC_OK) {
        end->failed = true;
        if (status != TPRPC_ERROR_PEER && status != TPRPC_ERROR_CLOSED && status != TPRPC_ERROR_UNREACHABLE &&
            status != TPRPC_ERROR_TIMEOUT)
            sim_fail("operation %u of a pipe ends with %s: %s", op->id, tprpc_status_name(status), error->text);
        if (sim.quiet && status == TPRPC_ERROR_UNREACHABLE) sim_fail("a pipe cannot be connected: %s", error->text);
    }
    if (end->ordered && op->number != end->called[kind])
        sim_fail("operation %u is number %u of its kind on an ordered pipe, and has its callback after %u", op->id,
                 op->number, end->called[kind]);
    end->called[kind]++;
}

static sim_op *sim_pipe_op(sim_end *end, sim_kind kind) {
    sim_op *op = sim_op_new(end->node, kind);
    op->end = end;
    op->number = end->issued[(int)kind - (int)SIM_WRITE]++;
    end->pending++;
    sim_op_pend(op);
    return op;
}

static void sim_pipe_refused(sim_op *op, tprpc_status status) {
    op->end->pending--;
    op->end->issued[(int)op->kind - (int)SIM_WRITE]--;
    op->end->failed = true;
    if (status != TPRPC_ERROR_PEER && status != TPRPC_ERROR_CLOSED && status != TPRPC_ERROR_UNREACHABLE &&
        status != TPRPC_ERROR_TIMEOUT)
        sim_fail("operation %u of a pipe is refused with %s", op->id, tprpc_status_name(status));
    sim_op_end(op, status);
}

static void sim_written(tprpc_status status, const tprpc_error *error, void *user) {
    sim_op *op = (sim_op *)user;
    sim_pipe_called(op, status, error);
    sim_pipe_go_on(op->end);
}

static void sim_pipe_write(sim_end *end) {
    sim_op *op = sim_pipe_op(end, SIM_WRITE);
    tprpc_message message;
    tprpc_tensor tensors[SIM_TENSORS];
    tprpc_status status;
    op->body = SIM_HEAD + (size_t)sim_spread(400);
    op->tensors = sim_chance(500) ? (int)sim_between(1, SIM_TENSORS) : 0;
    for (int i = 0; i < op->tensors; i++) op->sizes[i] = (size_t)sim_spread(sim_chance(100) ? 200000 : 9000);
    op->borrowed = sim_chance(400);
    sim_count(SIM_pipe_write);
    if (op->borrowed) sim_count(SIM_pipe_borrowed);
    sim_choose_message(op, &message, tensors);
    sim_put_body(op->lent, op->body, op->id, SIM_SALT_BODY, end->number, end->sent);
    sim_note(end->node->index, "write", op->id, end->number, end->sent);
    status = tprpc_pipe_write(end->pipe, &message, sim_written, op);
    if (!op->borrowed) {
        sim_spoil(op->lent, op->lent_size);
        op->lent = NULL;
    }
    end->wanted--;
    end->sent++;
    if (status == TPRPC_OK) return;
    if (op->borrowed && op->released != 1) sim_fail("a write is refused, and its memory is not released");
    sim_pipe_refused(op, status);
}

/* What has come is the next of what the other end wrote. */
static sim_op *sim_pipe_message(sim_end *end, const tprpc_message *message, bool bytes) {
    uint32_t from, number;
    sim_op *op = sim_body_op(message, SIM_SALT_BODY, &from, &number);
    int i;
    if (op->kind != SIM_WRITE || op->body != message->metadata_size || (int)message->tensor_count != op->tensors)
        sim_fail("another message came over a pipe than operation %u wrote", op->id);
    if (!end->from) end->from = from;
    if (end->from != from) sim_fail("a message of another pipe came, operation %u", op->id);
    for (i = 0; i < op->tensors; i++) {
        if (message->tensors[i].size != op->sizes[i]) sim_fail("operation %u: a tensor of another size", op->id);
        if (bytes)
            sim_check_bytes(message->tensors[i].data, op->sizes[i], op->id, (uint32_t)(SIM_SALT_TENSOR + i),
                            "a pipe's tensor");
    }
    return op;
}

static void sim_pipe_in_order(sim_end *end, sim_op *op, const tprpc_message *message) {
    uint32_t number;
    sim_body_op(message, SIM_SALT_BODY, NULL, &number);
    if (number != end->next_message)
        sim_fail("message %u of a pipe (operation %u) is shown after message %u", number, op->id, end->next_message);
    end->next_message++;
}

static void sim_read_done(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    sim_op *op = (sim_op *)user;
    sim_end *end = op->end;
    int i;
    sim_pipe_called(op, status, error);
    if (status == TPRPC_OK) {
        sim_op *of = sim_pipe_message(end, message, true);
        if (op->read_of ? of->id != op->read_of : false) sim_fail("operation %u reads another message", op->id);
        if (!op->read_of) sim_pipe_in_order(end, of, message);
        for (i = 0; i < of->tensors && op->read_of; i++)
            if (op->into[0] && message->tensors[i].data != op->into[i])
                sim_fail("operation %u: a tensor is not where it was to go", op->id);
    }
    for (i = 0; i < SIM_TENSORS; i++) {
        free(op->into[i]);
        op->into[i] = NULL;
    }
    if (!op->read_of) end->described -= 2;
    sim_pipe_go_on(end);
}

/* A message is described: reads it, into memory of its own or of the library's. */
static void sim_described(tprpc_status status, const tprpc_message *descriptor, const tprpc_error *error, void *user) {
    sim_op *op = (sim_op *)user, *read, *of;
    sim_end *end = op->end;
    tprpc_message allocation;
    tprpc_tensor tensors[SIM_TENSORS];
    int i;
    sim_pipe_called(op, status, error);
    end->described--;
    if (status == TPRPC_OK) {
        of = sim_pipe_message(end, descriptor, false);
        sim_pipe_in_order(end, of, descriptor);
        if (!end->pipe) return;                    /* this end was closed since, and the message is let go */
        read = sim_pipe_op(end, SIM_READ);
        read->read_of = of->id;
        sim_count(SIM_pipe_read);
        allocation = *descriptor;
        memcpy(tensors, descriptor->tensors ? descriptor->tensors : tensors,
               descriptor->tensors ? (size_t)of->tensors * sizeof *tensors : 0);
        allocation.tensors = tensors;
        if (sim_chance(500)) {
            sim_count(SIM_pipe_read_into);
            for (i = 0; i < of->tensors; i++) {
                read->into[i] = (uint8_t *)sim_new(of->sizes[i] + 1);
                tensors[i].data = read->into[i];
            }
            status = tprpc_pipe_read(end->pipe, &allocation, sim_read_done, read);
        } else {
            status = tprpc_pipe_read(end->pipe, NULL, sim_read_done, read);
        }
        if (status != TPRPC_OK) {
            for (i = 0; i < SIM_TENSORS; i++) {
                free(read->into[i]);
                read->into[i] = NULL;
            }
            sim_pipe_refused(read, status);
        }
    }
    sim_pipe_go_on(end);
}

static void sim_pipe_close(sim_end *end) {
    if (!end->pipe) return;
    sim_count(SIM_pipe_closed);
    sim_note(end->node->index, "close", end->number, end->pending, 0);
    tprpc_pipe_close(end->pipe);
    end->pipe = NULL;
}

/* Keeps a few messages under way, each direction, until it has written what it wanted. */
static void sim_pipe_go_on(sim_end *end) {
    tprpc_status status;
    if (!end->pipe || end->node->dying) return;
    if (end->failed || (sim_leaving && end->wanted == 0)) {
        sim_pipe_close(end);
        return;
    }
    while (end->pipe && !end->failed && end->wanted > 0 &&
           end->issued[0] - end->called[0] < (uint32_t)sim_between(1, 4))
        sim_pipe_write(end);
    while (end->pipe && !end->failed && end->described < 2) {
        sim_op *op;
        bool whole = !end->described && sim_chance(200);
        end->described += whole ? 2 : 1;           /* what is described behind it would be shown before it is read */
        op = sim_pipe_op(end, whole ? SIM_READ : SIM_DESCRIPTOR);
        sim_count(whole ? SIM_pipe_read : SIM_pipe_descriptor);
        status = whole ? tprpc_pipe_read(end->pipe, NULL, sim_read_done, op)
                       : tprpc_pipe_read_descriptor(end->pipe, sim_described, op);
        if (status != TPRPC_OK) sim_pipe_refused(op, status);
    }
    if (end->failed) sim_pipe_close(end);
}

static sim_end *sim_end_new(sim_node *node, tprpc_pipe *pipe, bool ordered) {
    sim_end *end = (sim_end *)sim_new(sizeof *end);
    end->node = node;
    end->pipe = pipe;
    end->ordered = ordered;
    end->number = ++sim_end_numbers;
    end->wanted = (int)sim_between(0, 12);
    end->next = node->work->ends;
    node->work->ends = end;
    if (ordered) sim_count(SIM_pipe_ordered);
    sim_later(node, SIM_DO_CLOSE, sim_between(1, 2000) * SIM_MS)->end = end;
    return end;
}

static void sim_accept(sim_node *node);

static void sim_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    sim_op *op = (sim_op *)user;
    sim_node *node = op->node;
    sim_op_called(op, status, error);
    node->work->accepts--;
    if (status != TPRPC_OK) {
        if (pipe) sim_fail("an accept failed, with a pipe");
        if (sim.quiet && status != TPRPC_ERROR_CLOSED) sim_fail("an accept failed: %s", error->text);
        return;
    }
    sim_count(SIM_pipe_accepted);
    sim_pipe_go_on(sim_end_new(node, pipe, node->index % 2 == 0));
    sim_accept(node);
}

static void sim_accept(sim_node *node) {
    sim_op *op;
    if (!node->work->listener || sim_leaving || node->dying) return;
    op = sim_op_new(node, SIM_ACCEPT);
    node->work->accepts++;
    sim_op_pend(op);
    if (tprpc_accept(node->work->listener, sim_accepted, op) != TPRPC_OK) sim_fail("accept is refused");
}

static void sim_pipe_connect(sim_node *node) {
    char address[64];
    tprpc_pipe_desc desc;
    tprpc_pipe *pipe;
    tprpc_error error;
    sim_node *to = &sim.nodes[sim_below(sim.count)];
    if (sim.quiet && !to->work->listener) return;
    memset(&desc, 0, sizeof desc);
    snprintf(address, sizeof address, "sim://w%d.p", (int)to->index);
    desc.address = address;
    desc.ordered = sim_chance(500);
    if (tprpc_connect(node->ctx, &desc, &pipe, &error) != TPRPC_OK) sim_fail("connect: %s", error.text);
    sim_count(SIM_pipe_connected);
    sim_pipe_go_on(sim_end_new(node, pipe, desc.ordered));
}

/* ---- a worker's life ---- */

static sim_kind sim_some_kind(void) {
    int64_t sum = 0, at;
    int kind;
    for (kind = 0; kind < SIM_CALLS; kind++) sum += sim_mix_of[kind];
    at = sim_below(sum);
    for (kind = 0; kind < SIM_CALLS; kind++) {
        at -= sim_mix_of[kind];
        if (at < 0) return (sim_kind)kind;
    }
    return SIM_PLAIN;
}

static void sim_new_call(sim_node *node) {
    sim_kind kind = sim_some_kind();
    if (kind == SIM_NESTED_WAIT && sim.count > 64) kind = SIM_NESTED_ASYNC;
    sim_call(node, kind, false, NULL, NULL);
}

/* A call whose outcome is waited for where it is made; it may end before, or the wait. */
static void sim_call_and_wait(sim_node *node) {
    sim_op *op = sim_call(node, SIM_PLAIN, true, NULL, NULL);
    tprpc_status status;
    if (op->ended) return;
    sim_count(SIM_call_waited_for);
    status = tprpc_future_wait(op->future, sim_chance(500) ? TPRPC_FOREVER : sim_between(1, 100));
    sim_note(node->index, "waited", op->id, (int64_t)status, 0);
    if (op->ended && status != TPRPC_PENDING && status != op->status)
        sim_fail("operation %u: the wait ends with %s, its callback had %s", op->id, tprpc_status_name(status),
                 tprpc_status_name(op->status));
    tprpc_future_release(op->future);
}

static void sim_do(sim_node *node, sim_todo *todo) {
    sim_op *op = todo->op;
    tprpc_status status;
    switch (todo->kind) {
    case SIM_DO_REPLY:
        status = sim_answer(op, todo->request);
        sim_count(status == TPRPC_OK ? SIM_answer_late : SIM_answer_to_nobody);
        return;
    case SIM_DO_CANCEL:
        status = tprpc_future_cancel(op->future);
        op->cancelled = status == TPRPC_OK;
        sim_note(node->index, "cancel", op->id, (int64_t)status, 0);
        if (status != TPRPC_OK && status != TPRPC_ERROR_INVALID) sim_fail("a cancel ends with %d", (int)status);
        tprpc_future_release(op->future);
        if (tprpc_future_cancel(op->future) != TPRPC_ERROR_INVALID) sim_fail("a stale future is cancelled");
        return;
    case SIM_DO_RELEASE:
        status = tprpc_future_error(op->future, NULL);
        if (op->ended && op->kind < SIM_CALLS && op->life == node->life && status != op->status)
            sim_fail("the future of operation %u has %s, its callback had %s", op->id, tprpc_status_name(status),
                     tprpc_status_name(op->status));
        tprpc_future_release(op->future);
        return;
    case SIM_DO_CLOSE:
        sim_pipe_close(todo->end);
        return;
    case SIM_DO_REGISTER: {
        tprpc_error error;
        if (node->work->registered) {
            sim_count(SIM_method_unregistered);
            status = tprpc_agent_unregister(node->agent, "gone", &error);
            if (status != TPRPC_OK) sim_fail("unregister: %s", error.text);
        } else {
            sim_register(node, "gone", sim_handler, NULL);
        }
        node->work->registered = !node->work->registered;
        if (!sim_leaving) sim_later(node, SIM_DO_REGISTER, sim_between(10, 1000) * SIM_MS);
        return;
    }
    }
}

/* Does what is due of what was put off. Returns when the next is. */
static int64_t sim_do_todo(sim_node *node) {
    sim_worker *work = node->work;
    int64_t next = SIM_NEVER;
    size_t i = 0;
    while (i < work->todo_count) {
        sim_todo todo = work->todo[i];
        if (todo.at > sim.now) {
            if (todo.at < next) next = todo.at;
            i++;
            continue;
        }
        work->todo[i] = work->todo[--work->todo_count];
        sim_do(node, &todo);
    }
    return next;
}

static void sim_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    sim_node *node = (sim_node *)user;
    (void)reply;
    (void)error;
    if (sim.current != node) sim_fail("on_ready runs elsewhere");
    if (++node->work->ready != 1) sim_fail("on_ready runs for the %d. time", node->work->ready);
    node->work->ready_status = status;
}

/* Lets the library work, and sleeps until `at` at the latest, in one of the ways that programs have. */
static void sim_pause(sim_node *node, int64_t at) {
    int64_t left = at == SIM_NEVER ? -1 : at > sim.now ? at - sim.now : 0, armed;
    size_t todo = node->work->todo_count;
    bool more;
    switch (node->work->mode) {
    case 0:
        tprpc_poll(node->ctx, left < 0 ? TPRPC_FOREVER : left == 0 ? TPRPC_NOW : left, 0);
        return;
    case 1:                                        /* frames */
        more = tprpc_poll(node->ctx, TPRPC_NOW, 1500);
        if (!more) sim_nothing_overdue(node, 0);
        sim_sleep(more ? 2000 : 16000, false);
        return;
    default:                                       /* a loop of its own */
        more = tprpc_poll(node->ctx, TPRPC_NOW, node->index % 2 ? 20 : 0);
        if (more || node->work->todo_count != todo || !tprpc_context_arm(node->ctx, &armed)) return;
        sim_nothing_overdue(node, armed);
        if (armed >= 0 && (left < 0 || armed < left)) left = armed;
        sim_sleep(left, true);
    }
}

static void sim_create(sim_node *node) {
    static const tprpc_backend *const backends[] = {&sim_backend};
    tprpc_context_desc context;
    tprpc_store_desc store;
    tprpc_agent_desc agent;
    tprpc_error error;
    memset(&context, 0, sizeof context);
    memset(&store, 0, sizeof store);
    memset(&agent, 0, sizeof agent);
    context.backends = backends;
    context.backend_count = 1;
    context.transports = "sim";
    context.channels = sim_all_channels ? NULL : "basic";
    context.spin_us = TPRPC_NOW;
    context.allocator.alloc = sim_alloc;
    context.allocator.free = sim_free;
    context.allocator.user = &node->heap;
    context.clock_us = sim_clock;
    context.user = node;
    sim_opening = node;
    memset(&node->heap, 0, sizeof node->heap);
    if (tprpc_context_create(&context, &node->ctx, &error) != TPRPC_OK) sim_fail("context: %s", error.text);
    store.table = &sim_store_table;
    store.user = node;
    if (tprpc_store_open(node->ctx, &store, &node->store, &error) != TPRPC_OK) sim_fail("store: %s", error.text);
    agent.context = node->ctx;
    agent.store = node->store;
    agent.name = node->name;
    agent.rank = node->index;
    agent.world_size = sim_static_group ? sim.count : 0;
    agent.start_timeout_ms = 60000;
    if (tprpc_agent_create(&agent, &node->agent, &error) != TPRPC_OK) sim_fail("agent: %s", error.text);
    sim_register(node, "plain", sim_handler, NULL);
    sim_register(node, "gone", sim_handler, NULL);
    sim_register(node, "placed", sim_handler, sim_method_place);
    sim_register(node, "refused", sim_refused_handler, sim_method_place);
    node->work->registered = true;
}

static void sim_listen_for_pipes(sim_node *node) {
    tprpc_listener_desc desc;
    char address[64];
    const char *addresses[1];
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    snprintf(address, sizeof address, "sim://w%d.p", (int)node->index);
    addresses[0] = address;
    desc.addresses = addresses;
    desc.address_count = 1;
    desc.ordered = node->index % 2 == 0;
    if (tprpc_listen(node->ctx, &desc, &node->work->listener, &error) != TPRPC_OK) sim_fail("listen: %s", error.text);
    sim_accept(node);
    sim_accept(node);
}

/* Everything of this life has ended, and nothing of it is left. */
static void sim_destroy(sim_node *node) {
    sim_worker *work = node->work;
    sim_placing *placing;
    sim_end *end;
    tprpc_context *ctx = node->ctx;
    sim_note(node->index, "destroy", node->dying, work->pending_count, 0);
    if (tprpc_agent_destroy(node->agent) != TPRPC_OK) sim_fail("an agent cannot be destroyed");
    node->agent = NULL;
    tprpc_store_close(node->store);
    node->store = NULL;
    if (tprpc_context_destroy(ctx) != TPRPC_OK) sim_fail("a context cannot be destroyed");
    node->ctx = NULL;
    if (work->pending) sim_fail("operation %u (kind %d) never ended", work->pending->id, (int)work->pending->kind);
    if (node->heap.blocks || node->heap.bytes)
        sim_fail("%d blocks of %" PRId64 " bytes are left of a context", (int)node->heap.blocks, node->heap.bytes);
    if (node->net) sim_fail("an instance of the transport is left");
    while ((placing = work->placings) != NULL) {
        int i;
        if (placing->state == SIM_PLACED_OUT) sim_fail("operation %u was placed, and no more", placing->op->id);
        for (i = 0; i < SIM_TENSORS; i++) free(placing->into[i]);
        work->placings = placing->next;
        free(placing);
    }
    while ((end = work->ends) != NULL) {
        if (end->pending) sim_fail("%d operations of a pipe never ended", end->pending);
        work->ends = end->next;
        free(end);
    }
    free(work->todo);
    free(work->lanes);
    work->todo = NULL;
    work->lanes = NULL;
}

enum { SIM_ROLLS = 8 };

/* Once the faults are over for good each worker reaches others, whatever became of its pipes to them. */
static void sim_roll_call(sim_node *node) {
    sim_worker *work = node->work;
    if (!sim_calm || work->rolled) return;
    sim_rolling = true;
    while (work->rolls < SIM_ROLLS && work->rolls < sim.count - 1) {
        work->rolls++;
        sim_count(SIM_call_in_calm);
        sim_call(node, SIM_PLAIN, false, NULL, NULL);
    }
    sim_rolling = false;
    if (work->calls_out) return;
    work->rolled = true;
    sim_rolled++;
}

/* What a worker does while the group is there. */
static void sim_serve(sim_node *node) {
    sim_worker *work = node->work;
    while (!node->dying) {
        int64_t next = sim_do_todo(node);
        bool begins = work->quota > 0 && (!sim.quiet || sim_joined == sim.count);   /* else it may call too early */
        if (begins && sim.now >= work->next_at) {
            work->quota--;
            work->next_at = sim.now + sim_spread(40 * SIM_MS);
            if (sim_has_pipes && sim_chance(60)) sim_pipe_connect(node);
            else if (sim_chance(60)) sim_call_and_wait(node);
            else sim_new_call(node);
        }
        if (begins && work->quota > 0 && work->next_at < next) next = work->next_at;
        if (!begins && work->quota > 0 && sim.now + 10 * SIM_MS < next) next = sim.now + 10 * SIM_MS;
        if (node->dying) return;
        sim_roll_call(node);
        if (work->quota <= 0 && !work->finished && work->calls_out == 0) {
            work->finished = true;
            sim_finished++;
        }
        if (sim_leaving) return;
        sim_pause(node, next);
    }
}

/* Its pipes are closed and its listener, and what they had pending has ended; then it leaves. */
static void sim_part(sim_node *node) {
    sim_worker *work = node->work;
    tprpc_error error;
    tprpc_status status;
    sim_end *end;
    int calls;
    int64_t until = sim.now + sim_below(200 * SIM_MS);
    while (sim.now < until && !node->dying) {
        int64_t next = sim_do_todo(node);
        sim_pause(node, next < until ? next : until);
    }
    if (work->listener) tprpc_listener_close(work->listener);
    work->listener = NULL;
    for (end = work->ends; end; end = end->next) sim_pipe_close(end);
    if (node->dying) return;
    if (sim_static_group && sim.quiet)             /* they are under way when all leave, and are handled all the same */
        for (calls = 0; calls < 3; calls++) sim_call(node, SIM_ONE_WAY, false, NULL, NULL);
    status = tprpc_agent_leave(node->agent, 0, &error);
    sim_note(node->index, "leave", (int64_t)status, 0, 0);
    if (status != TPRPC_OK && !sim_net_is.store_error && !node->dying)
        sim_fail("worker %d cannot leave: %s", (int)node->index, error.text);
}

static void sim_restart(void *arg, uint64_t life);

/* Its clock may have jumped beyond the time that the start has. */
static bool sim_may_not_join(const sim_node *node, tprpc_status status) {
    return node->dying || sim_net_is.store_error || (status == TPRPC_ERROR_TIMEOUT && !sim.quiet);
}

/* A worker's program. */
static void sim_live(sim_node *node) {
    sim_worker *work = node->work;
    char key[64];
    tprpc_error error;
    work->pending = NULL;
    work->pending_count = work->calls_out = 0;
    work->soonest = SIM_NEVER;
    work->ready = 0;
    work->ready_status = TPRPC_OK;
    work->todo_count = work->todo_room = 0;
    work->accepts = 0;
    work->mode = (int)sim_below(3);
    work->joined = false;
    if (sim.count <= 64) work->lanes = (uint32_t *)sim_new((size_t)sim.count * SIM_LANES * sizeof *work->lanes);
    if (node->life > 1) {                          /* who starts it again takes its old claims away */
        snprintf(key, sizeof key, "tprpc/name/%s", node->name);
        sim_key_delete(key);
        snprintf(key, sizeof key, "tprpc/rank/%d", (int)node->index);
        if (sim_static_group) sim_key_delete(key);
    }
    sim_create(node);
    sim_note(node->index, "starts", node->life, work->mode, 0);
    if (sim_chance(500)) {
        tprpc_status status = tprpc_agent_wait_ready(node->agent, 0, &error);
        work->joined = status == TPRPC_OK;
        if (!work->joined && !sim_may_not_join(node, status))
            sim_fail("worker %d cannot join: %s", (int)node->index, error.text);
    } else {
        if (tprpc_agent_start(node->agent, sim_ready, node, &error) != TPRPC_OK) sim_fail("start: %s", error.text);
        while (!work->ready && !node->dying) tprpc_poll(node->ctx, TPRPC_FOREVER, 0);
        work->joined = work->ready && work->ready_status == TPRPC_OK;
        if (work->ready && !work->joined && !sim_may_not_join(node, work->ready_status))
            sim_fail("worker %d cannot join: %d", (int)node->index, (int)work->ready_status);
    }
    sim_note(node->index, "joined", work->joined, 0, 0);
    sim_joined += work->joined;
    if (work->joined && !node->dying) {
        if (sim_has_pipes) sim_listen_for_pipes(node);
        sim_later(node, SIM_DO_REGISTER, sim_between(10, 1000) * SIM_MS);
        sim_serve(node);
        if (sim_leaving && !node->dying) sim_part(node);
    }
    if (work->listener) tprpc_listener_close(work->listener);
    work->listener = NULL;
    sim_destroy(node);
    sim_joined -= work->joined;
    work->joined = false;
    if (sim_leaving) return;
    sim.to_come++;
    sim_after(sim_between(1, 500) * SIM_MS, sim_restart, node, node->life);
}

static void sim_restart(void *arg, uint64_t life) {
    sim_node *node = (sim_node *)arg;
    sim.to_come--;
    if (node->life != life || node->exists) return;
    if (sim_leaving) return;
    sim_count(SIM_fault_restart);
    sim_start_node(node, sim_live);
}

/* At the end: each operation has its one callback, each borrowed memory was released once. */
static void sim_check_ledger(void) {
    uint32_t i;
    for (i = 0; i < sim_op_count; i++) {
        sim_op *op = sim_ops[i];
        if (!op->ended) sim_fail("operation %u (kind %d) never ended", op->id, (int)op->kind);
        if (op->borrowed && op->released != 1) sim_fail("the memory of operation %u was never released", op->id);
        if (op->placings > op->unplacings && op->status != TPRPC_OK)
            sim_fail("operation %u failed, and was not unplaced", op->id);
        if (op->handled > 1) sim_fail("operation %u was handled %d times", op->id, op->handled);
        if (sim.quiet && op->kind < SIM_CALLS && op->handled != 1 && op->kind != SIM_NO_METHOD &&
            op->kind != SIM_NO_WORKER && op->kind != SIM_REFUSED && op->kind != SIM_CANCELLED &&
            op->kind != SIM_TIMED_OUT && op->kind != SIM_CALLER_GONE && op->id % 8 != 0)
            sim_fail("operation %u (kind %d) was handled %d times", op->id, (int)op->kind, op->handled);
    }
}

static void sim_work_end(void) {
    uint32_t i;
    for (i = 0; i < sim_op_count; i++) {
        int k;
        for (k = 0; k < SIM_TENSORS; k++) free(sim_ops[i]->into[k]);
        free(sim_ops[i]);
    }
    sim_op_count = 0;
    sim_order = 0;
    sim_check_spoiled();
}

#endif
