/* Every system call and every allocation fails, at each of its occurrences in turn, that one alone or all from it on,
   while contexts, pipes and agents do their work from creation to the end: what was begun ends once, with a sentence
   or because another way was found; nothing is lost, leaked or hung.

       HOOKS_ONLY="send 12 104 once" build/tests/hooks -v whole_tcp_polled     one failure, as a report names it
       HOOKS_ALL=1 build/tests/hooks     every code that is known for a call, not one in turn; two loops; and under a
                                         sanitizer every failure, not one in TEST_SLOWDOWN */
#include "agent_help.h"
#include <signal.h>
extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { PATIENCE_MS = 1500, NAMES = 128, WORKERS = 6, MOST_OF_ONE = 600 };

/* ---- time: while nothing goes on but failures it runs faster, so that nobody sits out what ends by a time-out ---- */

enum { IDLE_US = 300, SKIPPED_US = 10000, MANY_FAILED = 50, FAILED_US = 5000 };
static int64_t skipped_us;
static int64_t clock_us(void *user) { (void)user; return test_now_us() + LOAD(&skipped_us); }

/* ---- the hook ---- */

typedef struct seen { char name[32]; int calls; } seen;
static seen calls[NAMES];
static size_t call_count;
static const char *failing;       /* NULL: none fails */
static const char *failing_too;   /* this one beside it, always */
static int failing_with, failing_at = 1;   /* at its n-th call, counted from 1 */
static bool failing_once;         /* else from there on */
static int failed;                /* how often it did */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int on_call(const char *call, int64_t *size) {
    size_t i = 0;
    bool fails;
    (void)size;
    pthread_mutex_lock(&lock);
    while (i < call_count && strcmp(calls[i].name, call) != 0) i++;
    if (i == call_count) {
        REQUIRE(call_count < NAMES);
        snprintf(calls[call_count++].name, sizeof calls[0].name, "%s", call);
    }
    const int n = ++calls[i].calls;
    fails = failing && strcmp(call, failing) == 0 && (failing_once ? n == failing_at : n >= failing_at);
    if (fails && ADD(&failed, 1) > MANY_FAILED) ADD(&skipped_us, FAILED_US);
    pthread_mutex_unlock(&lock);
    return failing_too && strcmp(call, failing_too) == 0 ? EPERM : fails ? failing_with : 0;
}

static bool is_in(const char *word, const char *words) {
    char spaced[40];
    snprintf(spaced, sizeof spaced, " %.31s ", word);
    return strstr(words, spaced) != NULL;
}

/* What gives something back cannot fail. A bell that may never be rung leaves its thread asleep, and a lock that may
   never be waited for is spun on: no system does that, but either may fail once. */
#define NEVER_FAIL " close munmap shutdown epoll_del futex_wake "
#define FAIL_ONCE  " bell_write futex_wait "

/* With what a call fails: each word list's codes, in turn. */
static const struct { const char *calls; int codes[6]; } known_codes[] = {
    {" alloc mmap ", {ENOMEM}},
    {" send ", {ECONNRESET, EAGAIN, EINTR, EPIPE, ENOBUFS}},
    {" recv ", {ECONNRESET, EAGAIN, EINTR, ENOMEM, ETIMEDOUT}},
    {" accept ", {EMFILE, ECONNABORTED, EAGAIN, EINTR, EPERM}},
    {" connect ", {ECONNREFUSED, EAGAIN, EINTR, ENETUNREACH, EPERM}},
    {" socket socket_unix eventfd epoll_create dup sock_diag ", {EMFILE, ENFILE, ENOBUFS, EPERM}},
    {" memfd_create pidfd_open getrandom epoll_pwait2 ", {ENOSYS, EMFILE, EINTR, EPERM}},
    {" fcntl ", {EAGAIN, ENOLCK, EINTR, EPERM}},
    {" ftruncate pread pwrite ", {EINTR, ENOSPC, EIO}},
    {" open open_file read read_owner ", {EMFILE, ENOENT, EINTR, EIO}},
    {" epoll_ctl ", {ENOSPC, ENOMEM}},
    {" epoll_wait epoll_peek ", {EINTR, ENOMEM}},
    {" futex_wait bell_write bell_read ", {EINTR, EAGAIN}},
    {" pthread_create ", {EAGAIN, EPERM}},
    {" process_vm_readv ", {EPERM, EFAULT, ESRCH, ENOMEM}},
    {"", {EIO, EPERM, ENOMEM, EINTR}},
};

static const int *codes_of(const char *call) {
    size_t i = 0;
    while (known_codes[i].calls[0] && !is_in(call, known_codes[i].calls)) i++;
    return known_codes[i].codes;
}

static int code_count(const int *codes) {
    int n = 0;
    while (n < 6 && codes[n]) n++;
    return n;
}

/* ---- a port of this process's own, for its servers: others may not choose it meanwhile ---- */

static uint16_t reserved_port;

static void reserve_port(void) {
    struct sockaddr_in at;
    socklen_t size = sizeof at;
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0), on = 1;
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    REQUIRE(fd >= 0 && setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) == 0);
    REQUIRE(bind(fd, (struct sockaddr *)(void *)&at, sizeof at) == 0);   /* not listening: a server may beside it */
    REQUIRE(getsockname(fd, (struct sockaddr *)(void *)&at, &size) == 0);
    reserved_port = ntohs(at.sin_port);
}

/* ---- what is done meanwhile: each returns whether it worked ---- */

typedef struct ends {
    tprpc_context *ctx[2];
    heap heap[2];
    int outcomes, good;
    tprpc_pipe *accepted;
    int threads;
} ends;

/* Polls both in turn; where they have threads, lets those. Where nothing happens time flies, once something has failed:
   before that, who is slow on a busy machine has the time that he needs. */
static void turn(ends *e) {
    static int turns;
    const int64_t begin = test_now_us();
    for (int i = 0; i < 2; i++) {
        if (!e->threads) tprpc_poll(e->ctx[i], IDLE_US / 2, 0);
        else if (turns % 8 == 0) tprpc_wake(e->ctx[i]);
    }
    if (e->threads) test_sleep_us(IDLE_US);
    turns++;
    if (LOAD(&failed) && test_now_us() - begin >= IDLE_US) ADD(&skipped_us, SKIPPED_US);
}

static void told(const tprpc_error *error, tprpc_status status) {
    if (status == TPRPC_OK) return;
    CHECK(error && error->status == status && error->text[0]);
    if (getenv("TEST_LOG") && error) fprintf(stderr, "  %s\n", error->text);
}

static const char *channels;           /* NULL: all */

static bool ends_open(ends *e, const char *transports, int threads) {
    memset(e, 0, sizeof *e);
    e->threads = threads;
    for (int i = 0; i < 2; i++) {
        tprpc_context_desc desc = {0};
        tprpc_error error = {0};
        desc.transports = transports;
        desc.channels = channels;
        desc.threads = threads;
        desc.clock_us = clock_us;
        desc.spin_us = TPRPC_NOW;
        desc.allocator.alloc = heap_alloc;
        desc.allocator.free = heap_free;
        desc.allocator.user = &e->heap[i];
        tprpc_status status = tprpc_context_create(&desc, &e->ctx[i], &error);
        told(&error, status);
        if (status != TPRPC_OK) return false;
    }
    return true;
}

static void ends_close(ends *e) {
    for (int i = 2; i-- > 0;) {
        if (e->ctx[i]) CHECK_EQ_INT(tprpc_context_destroy(e->ctx[i]), TPRPC_OK);
        CHECK_EQ_INT(e->heap[i].blocks, 0);
    }
}

static bool ends_poll(ends *e, const int *flag, int at_least) {
    const int64_t end = test_now_us() + (int64_t)(PATIENCE_MS + 10000) * 1000 * TEST_SLOWDOWN;
    while (LOAD(flag) < at_least && test_now_us() < end) turn(e);
    return CHECK(LOAD(flag) >= at_least); /* all that was begun has ended */
}

static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    told(error, status);
    if (status == TPRPC_OK) ((ends *)user)->accepted = pipe;
}

static void on_written(tprpc_status status, const tprpc_error *error, void *user) {
    ends *e = (ends *)user;
    told(error, status);
    if (status == TPRPC_OK) ADD(&e->good, 1);
    ADD(&e->outcomes, 1);
}

static void on_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    ends *e = (ends *)user;
    told(error, status);
    e->outcomes++;
    e->good += status == TPRPC_OK && message->tensor_count == 1 && filled(message->tensors[0].data, 300000, 1);
}

/* A listener on the address, a pipe to it, a large message there and one back. */
static bool messages(const char *address, const char *transports) {
    static uint8_t large[300000];
    tprpc_listener_desc listener_desc = {0};
    tprpc_pipe_desc pipe_desc = {0};
    tprpc_tensor tensor = bytes_of(large, sizeof large);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_listener *listener = NULL;
    tprpc_pipe *pipe = NULL;
    tprpc_error error = {0};
    ends e;
    fill(large, sizeof large, 1);
    bool good = ends_open(&e, transports, 0);
    listener_desc.addresses = &address;
    listener_desc.address_count = 1;
    if (good && tprpc_listen(e.ctx[0], &listener_desc, &listener, &error) != TPRPC_OK) {
        told(&error, error.status);
        good = false;
    }
    if (good) {
        REQUIRE_EQ_INT(tprpc_accept(listener, on_accepted, &e), TPRPC_OK);
        pipe_desc.address = tprpc_listener_address(listener, NULL);
        pipe_desc.timeout_ms = PATIENCE_MS;
        if (tprpc_connect(e.ctx[1], &pipe_desc, &pipe, &error) != TPRPC_OK) {
            told(&error, error.status);
            good = false;
        }
    }
    if (good) {
        int begun = 0;
        begun += tprpc_pipe_write(pipe, &message, on_written, &e) == TPRPC_OK;
        begun += tprpc_pipe_read(pipe, NULL, on_read, &e) == TPRPC_OK;
        const int64_t end = test_now_us() + (int64_t)(PATIENCE_MS + 10000) * 1000 * TEST_SLOWDOWN;
        while (!e.accepted && e.outcomes < begun && test_now_us() < end) turn(&e);
        if (e.accepted) {
            begun += tprpc_pipe_read(e.accepted, NULL, on_read, &e) == TPRPC_OK;
            begun += tprpc_pipe_write(e.accepted, &message, on_written, &e) == TPRPC_OK;
        }
        /* an end that hears nothing of a failure at the other one waits: then the other closes */
        while (e.good + 1 > e.outcomes && e.outcomes < begun && test_now_us() < end) turn(&e);
        if (e.outcomes < begun) {
            tprpc_pipe_close(pipe);
            pipe = NULL;
        }
        ends_poll(&e, &e.outcomes, begun);
        CHECK_EQ_INT(e.outcomes, begun);
        good = e.good == 4;
    }
    tprpc_pipe_close(pipe);
    tprpc_pipe_close(e.accepted);
    tprpc_listener_close(listener);
    ends_close(&e);
    return good;
}

static bool over_tcp(void) { return messages("tcp://127.0.0.1:0", "tcp"); }
static bool over_tcp6(void) { return messages("tcp://[::1]:0", "tcp"); }
static bool over_shm(void) { return messages("shm://", "shm"); }
static bool read_by_cma(void) {
    channels = "cma,basic";
    const bool good = messages("shm://", "shm");
    channels = NULL;
    return good;
}
static bool moved_to_shm(void) { return messages("tcp://127.0.0.1:0", "shm,tcp"); }

static void on_ready(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    on_written(status, error, user);
}

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

/* Two agents meet in a store of the kind and call each other. trace: NULL, or where they trace it. */
static bool agents(const char *url, const char *trace) {
    static const char *const names[] = {"ann", "bob"};
    tprpc_agent *both[2] = {NULL, NULL};
    tprpc_error error = {0};
    ends e;
    int begun = 0;
    bool good = ends_open(&e, "tcp", 0);
    for (int i = 0; i < 2 && good; i++) {
        tprpc_agent_desc desc = {0};
        tprpc_method_desc echo = {0};
        desc.context = e.ctx[i];
        desc.name = names[i];
        desc.init_method = url;
        desc.rank = i;
        desc.world_size = 2;
        desc.start_timeout_ms = desc.timeout_ms = PATIENCE_MS;
        desc.trace = trace;
        echo.name = "echo";
        echo.handler = on_echo;
        tprpc_status status = tprpc_agent_create(&desc, &both[i], &error);
        if (status == TPRPC_OK) status = tprpc_agent_register(both[i], &echo, &error);
        if (status == TPRPC_OK) status = tprpc_agent_start(both[i], on_ready, &e, &error);
        told(&error, status);
        good = status == TPRPC_OK;
        begun += good;
    }
    if (begun) ends_poll(&e, &e.outcomes, begun);
    if (good && e.good == 2) {
        tprpc_call_options options = {0};
        options.on_done = on_ready;
        options.user = &e;
        options.error = &error;
        for (int i = 0; i < 2; i++) {
            tprpc_status status = tprpc_call(both[i], names[1 - i], "echo", NULL, &options, NULL);
            told(&error, status);
            begun += status == TPRPC_OK;
        }
        ends_poll(&e, &e.outcomes, begun);
    }
    CHECK_EQ_INT(e.outcomes, begun);
    for (int i = 0; i < 2; i++)
        if (both[i]) CHECK_EQ_INT(tprpc_agent_destroy(both[i]), TPRPC_OK);
    ends_close(&e);
    return e.good == 4;
}

static bool agents_by_tcp(void) {
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", reserved_port);
    return agents(url, NULL);
}

static bool agents_by_file(void) {
    char path[250], url[300];
    snprintf(url, sizeof url, "file://%s", test_temp_path(path, sizeof path));
    return agents(url, path);
}

/* ---- the whole of it: two agents meet, call each other in every way, leave and end ---- */

typedef struct shape { const char *name, *transports; int threads; bool by_tcp; } shape;
static const shape shapes[] = {
    {"whole_tcp_polled", "tcp", 0, true},     {"whole_shm_polled", "shm", 0, false},
    {"whole_tcp_threaded", "tcp", 1, true},   {"whole_shm_threaded", "shm", 1, false},
    {"whole_moved_polled", NULL, 0, false},   {"whole_two_loops", "shm,tcp", 2, false},
};
static const shape *shaped;

enum { SLOTS = 16, LARGE = 40000, PLACED = 12000, KEPT = 8, TRIES = 8 };

typedef struct whole {
    ends e;
    tprpc_agent *agent[2];
    tprpc_store *store;
    int begun, lent, given_back;          /* outcomes to come; borrowed messages, and those released */
    int handled, slots[SLOTS];            /* placed memory: 1 while the library or a handler has it */
    tprpc_request kept[KEPT];
    int kept_count, left;
} whole;
static uint8_t pattern_large[LARGE], pattern_before[PLACED], pattern_after[PLACED], slot_memory[SLOTS][PLACED];
static whole *w_now;                      /* what the slots and releases belong to */

static void on_given_back(void *user) { ADD((int *)user, 1); }

static tprpc_status take_slot(tprpc_placement *placement, void *user) {
    (void)user;
    if (placement->descriptor->tensor_count != 1 || placement->descriptor->tensors[0].size != PLACED)
        return TPRPC_ERROR_LIMIT;
    for (int i = 0; i < SLOTS; i++) {
        int expected = 0;
        if (!__atomic_compare_exchange_n(&w_now->slots[i], &expected, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            continue;
        placement->tensors[0].data = slot_memory[i];
        placement->cookie = &w_now->slots[i];
        return TPRPC_OK;
    }
    CHECK_EQ_INT(SLOTS, 0);               /* there are more than placements at a time */
    return TPRPC_ERROR_LIMIT;
}

static void free_slot(void *slot) { CHECK_EQ_INT(__atomic_exchange_n((int *)slot, 0, __ATOMIC_ACQ_REL), 1); }
static void on_unplaced(const tprpc_placement *placement, void *user) { (void)user; free_slot(placement->cookie); }

static int *slot_of(const void *data) {
    for (int i = 0; i < SLOTS; i++) if (data == slot_memory[i]) return &w_now->slots[i];
    return NULL;
}

/* Changes what came in place and replies with it. */
static void on_change(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_message reply = *message;
    int *slot = message->tensor_count == 1 ? slot_of(message->tensors[0].data) : NULL;
    (void)user;
    if (!CHECK(slot != NULL)) return;
    CHECK_MEM(message->tensors[0].data, pattern_before, PLACED);
    memcpy(message->tensors[0].data, pattern_after, PLACED);
    reply.release = free_slot;
    reply.release_user = slot;
    tprpc_reply(request, &reply);
}

static void on_heard(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request;
    CHECK(message->tensor_count == 1 && memcmp(message->tensors[0].data, pattern_large, LARGE) == 0);
    ADD(&((whole *)user)->handled, 1);
}

static void on_later(tprpc_request request, const tprpc_message *message, void *user) {
    whole *w = (whole *)user;
    (void)message;
    if (tprpc_request_keep(request) != TPRPC_OK) return;
    pthread_mutex_lock(&lock);
    REQUIRE(w->kept_count < KEPT);
    w->kept[w->kept_count++] = request;
    pthread_mutex_unlock(&lock);
}

static void answer_kept(whole *w) {
    for (;;) {
        pthread_mutex_lock(&lock);
        const bool any = w->kept_count > 0;
        tprpc_request request = {0};
        if (any) request = w->kept[--w->kept_count];
        pthread_mutex_unlock(&lock);
        if (!any) return;
        tprpc_message reply = text_of("late");
        if (tprpc_reply(request, &reply) != TPRPC_OK) tprpc_fail(request, 1, "cannot");
    }
}

static void on_refuse(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message; (void)user;
    tprpc_fail(request, 42, "as told");
}

/* What each call expects; good counts those that had it. */
static void on_echoed(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    if (status == TPRPC_OK && CHECK(reply->tensor_count <= 1) && reply->tensor_count)
        CHECK(reply->tensors[0].size == LARGE && memcmp(reply->tensors[0].data, pattern_large, LARGE) == 0);
    on_written(status, error, user);
}

static void on_changed(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    if (status == TPRPC_OK) {
        int *slot = reply->tensor_count == 1 ? slot_of(reply->tensors[0].data) : NULL;
        if (CHECK(slot != NULL)) {
            CHECK_MEM(reply->tensors[0].data, pattern_after, PLACED);
            free_slot(slot);
        }
    }
    on_written(status, error, user);
}

static void on_refused(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    CHECK(status != TPRPC_OK);
    if (status == TPRPC_ERROR_REMOTE && !strstr(error->text, "no memory")) CHECK_EQ_INT(error->user_code, 42);
    told(error, status);
    ADD(&((ends *)user)->good, status == TPRPC_ERROR_REMOTE);
    ADD(&((ends *)user)->outcomes, 1);
}

static void begin_call(whole *w, int from, const char *method, tprpc_message *message, tprpc_call_options *options) {
    tprpc_error error = {0};
    if (message && message->release) {
        message->release_user = &w->given_back;
        ADD(&w->lent, 1);
    }
    options->user = &w->e;
    options->error = &error;
    tprpc_status status = tprpc_call(w->agent[from], from ? "ann" : "bob", method, message, options, NULL);
    told(&error, status);
    if (status == TPRPC_OK) w->begun++;
}

static void begin_calls(whole *w, int from) {
    tprpc_tensor large = bytes_of(pattern_large, LARGE), placed = bytes_of(pattern_before, PLACED);
    tprpc_message text = text_of("hello"), tensor = tensors_of(&large, 1), change = tensors_of(&placed, 1);
    tprpc_call_options echo = {0}, changes = {0}, one_way = {0}, refused = {0};
    echo.on_done = on_echoed;
    tensor.release = on_given_back;
    begin_call(w, from, "echo", &text, &echo);
    begin_call(w, from, "echo", &tensor, &echo);
    changes.on_done = on_changed;
    changes.place = take_slot;
    changes.on_unplaced = on_unplaced;
    begin_call(w, from, "change", &change, &changes);
    change.release = on_given_back;
    begin_call(w, from, "change", &change, &changes);
    one_way.on_done = on_ready;
    one_way.flags = TPRPC_CALL_ONE_WAY;
    begin_call(w, from, "heard", &tensor, &one_way);
    begin_call(w, from, "later", &text, &echo);
    echo.lane = 3;
    begin_call(w, from, "later", &text, &echo);
    begin_call(w, from, "echo", &text, &echo);
    refused.on_done = on_refused;
    begin_call(w, from, "refuse", &text, &refused);
}

static bool whole_until(whole *w, int outcomes) {
    const int64_t end = test_now_us() + (int64_t)(PATIENCE_MS + 10000) * 1000 * TEST_SLOWDOWN;
    while (LOAD(&w->e.outcomes) < outcomes && test_now_us() < end) {
        turn(&w->e);
        answer_kept(w);
    }
    return CHECK_EQ_INT(LOAD(&w->e.outcomes), outcomes);
}

static bool whole_start(whole *w) {
    static const char *const names[] = {"ann", "bob"};
    const tprpc_method_desc methods[] = {
        {"echo", on_echo, NULL, NULL, w, 0},   {"change", on_change, take_slot, on_unplaced, w, 0},
        {"heard", on_heard, NULL, NULL, w, 0}, {"later", on_later, NULL, NULL, w, 0},
        {"refuse", on_refuse, NULL, NULL, w, 0},
    };
    const tprpc_device host = {TPRPC_CPU, 0};
    tprpc_store_desc store = {0};
    tprpc_error error = {0};
    tprpc_status status = TPRPC_OK;
    char url[64];
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", reserved_port);
    store.url = "local://";
    if (!shaped->by_tcp) status = tprpc_store_open(w->e.ctx[0], &store, &w->store, &error);
    for (int i = 0; i < 2 && status == TPRPC_OK; i++) {
        tprpc_agent_desc desc = {0};
        desc.context = w->e.ctx[i];
        desc.name = names[i];
        desc.init_method = shaped->by_tcp ? url : NULL;
        desc.store = w->store;
        desc.rank = i;
        desc.world_size = 2;
        desc.start_timeout_ms = desc.timeout_ms = PATIENCE_MS;
        status = tprpc_agent_create(&desc, &w->agent[i], &error);
        for (size_t m = 0; m < sizeof methods / sizeof methods[0] && status == TPRPC_OK; m++)
            status = tprpc_agent_register(w->agent[i], &methods[m], &error);
        if (status == TPRPC_OK)            /* so that there are maps to exchange, which change nothing */
            status = tprpc_agent_set_device_map(w->agent[i], i ? NULL : "bob", &host, &host, 1, &error);
        if (status == TPRPC_OK) status = tprpc_agent_start(w->agent[i], on_ready, &w->e, &error);
        if (status == TPRPC_OK) w->begun++;
    }
    told(&error, status);
    return (!w->begun || whole_until(w, w->begun)) && w->e.good == 2;
}

/* After one failure the same two find a way to each other. */
static void goes_on(whole *w) {
    tprpc_call_options options = {0};
    int tries = 0;
    options.on_done = on_echoed;
    for (bool through = false; !through && CHECK(tries < TRIES); tries++) {
        const int good = LOAD(&w->e.good);
        begin_call(w, tries % 2, "echo", NULL, &options);
        through = whole_until(w, w->begun) && LOAD(&w->e.good) > good;
    }
}

static void *leaves(void *arg) {
    tprpc_error error = {0};
    tprpc_status status = tprpc_agent_leave((tprpc_agent *)arg, PATIENCE_MS, &error);
    told(&error, status);
    ADD(&w_now->left, 1 + (status == TPRPC_OK) * 100);
    return NULL;
}

static bool everyone_leaves(whole *w) {
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) REQUIRE_EQ_INT(pthread_create(&threads[i], NULL, leaves, w->agent[i]), 0);
    while (LOAD(&w->left) % 100 < 2) {
        turn(&w->e);
        answer_kept(w);
    }
    for (int i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    return w->left == 202;
}

static bool whole_run(void) {
    static whole w;
    memset(&w, 0, sizeof w);
    w_now = &w;
    bool good = ends_open(&w.e, shaped->transports, shaped->threads);
    good = good && whole_start(&w);
    if (good) {
        const int begun = w.begun;
        for (int i = 0; i < 2; i++) begin_calls(&w, i);
        whole_until(&w, w.begun);
        good = w.e.good == w.begun && w.begun == begun + 18;
        pthread_mutex_lock(&lock);
        const bool recovers = failing && failing_once && failed;
        pthread_mutex_unlock(&lock);
        if (recovers) goes_on(&w);
        if (good && !failing) CHECK(ends_poll(&w.e, &w.handled, 2));   /* one way: nobody else waits for these */
        good &= everyone_leaves(&w);
    }
    for (int i = 0; i < 2; i++) if (w.agent[i]) CHECK_EQ_INT(tprpc_agent_destroy(w.agent[i]), TPRPC_OK);
    CHECK_EQ_INT(w.e.outcomes, w.begun);
    tprpc_store_close(w.store);
    ends_close(&w.e);
    CHECK_EQ_INT(w.given_back, w.lent);
    for (int i = 0; i < SLOTS; i++) CHECK_EQ_INT(w.slots[i], 0);
    return good;
}

/* A thread sleeps on a loop's bell, another one rings. */
static void rung(tprpc_work *work) { work->loop = 77; }

static void *rings(void *arg) {
    void **both = (void **)arg;
    test_sleep_us(2000);
    tprpc_defer((tprpc_context *)both[0], (tprpc_work *)both[1]);
    return NULL;
}

static bool bells(void) {
    tprpc_context *ctx = NULL;
    tprpc_context_desc desc = {0};
    tprpc_work work = {0};
    tprpc_error error = {0};
    void *both[2];
    pthread_t thread;
    desc.spin_us = TPRPC_NOW;
    tprpc_status status = tprpc_context_create(&desc, &ctx, &error);
    told(&error, status);
    if (status != TPRPC_OK) return false;
    work.run = rung;
    both[0] = ctx;
    both[1] = &work;
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, rings, both), 0);
    for (int i = 0; work.loop != 77 && i < 1000; i++) tprpc_poll(ctx, (int64_t)60 * 1000000, 0);
    pthread_join(thread, NULL);
    CHECK_EQ_INT(work.loop, 77);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    return true;
}

/* ---- the sweeps ---- */

/* Mappings that a context may leave behind: shared memory, and pages that a fork's child finds wiped. */
static int count_mappings(void) { return test_count_shared() + test_count_lines("/proc/self/smaps", " wf"); }

static void run_failing(bool (*scenario)(void), const char *name, int at, int with, bool once, const char *harmless) {
    const int fds = test_count_fds(), failures = harness_failures;
    bool good;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < call_count; i++) calls[i].calls = 0;
    failing = name;
    failing_at = at;
    failing_with = with;
    failing_once = once;
    failed = 0;
    pthread_mutex_unlock(&lock);
    if (getenv("TEST_LOG")) fprintf(stderr, "%s %d %d %s\n", name ? name : "nothing", at, with, once ? "once" : "on");
    STORE(&tprpc_test_hook, on_call);
    good = scenario();
    STORE(&tprpc_test_hook, NULL);
    failing = NULL;
    CHECK_EQ_INT(test_count_fds(), fds);
    if (!name || is_in(name, harmless)) CHECK(good);
    if (harness_failures > failures)
        fprintf(stderr, "  HOOKS_ONLY=\"%s %d %d %s\" repeats it\n", name ? name : "nothing", at, with,
                once ? "once" : "on");
}

typedef struct sweeping {
    bool (*scenario)(void);
    const char *must, *harmless;
    int most;                     /* of the occurrences of a call, the first so many fail */
    int worker;
    struct told_of { char doing[80]; int runs, reached; } *told;   /* shared: by worker */
} sweeping;

static void on_alarm(int number) {
    static const char text[] = "the run hangs\n";
    (void)number;
    ssize_t n = write(2, text, sizeof text - 1);
    (void)n;
    if (getenv("HOOKS_PAUSE")) for (;;) pause();   /* for a debugger */
    abort();
}

static void one_failure(sweeping *s, const char *name, int at, int with, bool once) {
    struct told_of *told_of = &s->told[s->worker];
    snprintf(told_of->doing, sizeof told_of->doing, "%s %d %d %s", name, at, with, once ? "once" : "on");
    const int64_t begin = test_now_us();
    alarm(30 * TEST_SLOWDOWN);
    run_failing(s->scenario, name, at, with, once, s->harmless);
    alarm(0);
    if (getenv("HOOKS_TIMES"))
        printf("%8lld us %s\n", (long long)(test_now_us() - begin), told_of->doing);
    told_of->runs++;
    told_of->reached += failed > 0;
}

/* One in WORKERS of all the failures. What is waited for is mostly time, so there are more workers than processors. */
static void sweep_part(void *arg) {
    sweeping *s = (sweeping *)arg;
    const bool all = getenv("HOOKS_ALL") != NULL;
    static seen counted[NAMES];
    const size_t count = call_count;
    int job = 0;
    memcpy(counted, calls, sizeof counted);
    signal(SIGALRM, on_alarm);
    reserve_port();
    run_failing(s->scenario, NULL, 0, 0, true, "");   /* what libc keeps is there */
    const int mappings = count_mappings();
    for (size_t i = 0; i < count; i++) {
        const int *codes = codes_of(counted[i].name);
        if (is_in(counted[i].name, NEVER_FAIL) || !counted[i].calls) continue;
        for (int at = 1; at <= counted[i].calls + 1 && at <= s->most; at++)
            for (int once = is_in(counted[i].name, FAIL_ONCE); once < 2; once++)
                for (int c = 0; c < (all || counted[i].calls < 4 ? code_count(codes) : 1); c++)
                    if (++job % WORKERS == s->worker && (all || job / WORKERS % TEST_SLOWDOWN == 0))
                        one_failure(s, counted[i].name, at, codes[(at + once + c) % code_count(codes)], once);
    }
    CHECK_EQ_INT(count_mappings(), mappings);
}

/* A call whose last occurrences would not be failed, for there are more than MOST_OF_ONE; NULL: none. */
static const seen *cut_short(void) {
    for (size_t i = 0; i < call_count; i++)
        if (!is_in(calls[i].name, NEVER_FAIL) && calls[i].calls > MOST_OF_ONE) return &calls[i];
    return NULL;
}

static void only_one(sweeping *s, const char *text) {
    static char name[32], how[8];
    int at, with;
    REQUIRE_EQ_INT(sscanf(text, "%31s %d %d %7s", name, &at, &with, how), 4);
    reserve_port();
    one_failure(s, name, at, with, how[1] == 'n' && how[2] == 'c');
    printf("%d of it failed\n", failed);
}

/* must: calls that the scenario makes; harmless: those whose failure it gets over. Both: " a b c ". */
static void sweep(bool (*scenario)(void), const char *must, const char *harmless, int most) {
    const char *only = getenv("HOOKS_ONLY");
    sweeping s = {scenario, must, harmless, most, 0, NULL};
    char name[32];
    int n = 0, runs = 0, reached = 0;
    pid_t pids[WORKERS];
    void *memory = mmap(NULL, WORKERS * sizeof *s.told, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    s.told = (struct told_of *)memory;
    if (only) {
        only_one(&s, only);
        return;
    }
    reserve_port();
    run_failing(scenario, NULL, 0, 0, true, "");
    /* On a busy machine a run may wait long, and look often for what it waits for: then another one is counted. */
    for (int i = 0; i < 5 && most == MOST_OF_ONE && cut_short(); i++) run_failing(scenario, NULL, 0, 0, true, "");
    if (most == MOST_OF_ONE && !CHECK(!cut_short()))
        fprintf(stderr, "  %s is called %d times, of which %d fail\n", cut_short()->name, cut_short()->calls, most);
    for (const char *at = must; sscanf(at, "%31s%n", name, &n) == 1; at += n) {
        bool found = false;
        for (size_t i = 0; i < call_count; i++) found |= strcmp(calls[i].name, name) == 0 && calls[i].calls > 0;
        if (!CHECK(found)) fprintf(stderr, "  %s is not called\n", name);
    }
    for (size_t i = 0; i < call_count; i++) printf("%s %d%s", calls[i].name, calls[i].calls, i + 1 < call_count ? ", "
                                                                                                    : "\n");
    for (int i = 0; i < WORKERS; i++) {
        s.worker = i;
        pids[i] = test_fork_run(sweep_part, &s);
    }
    for (int i = 0; i < WORKERS; i++) {
        if (!CHECK_EQ_INT(test_wait_child(pids[i], 600), 0))
            fprintf(stderr, "  the last was HOOKS_ONLY=\"%s\"\n", s.told[i].doing);
        runs += s.told[i].runs;
        reached += s.told[i].reached;
    }
    printf("%d runs, in %d of them a call failed\n", runs, reached);
    CHECK(reached > runs / 3);    /* how often a thread that spins looks for work varies */
    munmap(memory, WORKERS * sizeof *s.told);
}

#define OPTIONS " nodelay keepalive keepidle keepintvl keepcnt sock_diag sock_diag_send sock_diag_recv bell_read "

TEST_LIMIT(tcp, 240) {
    sweep(over_tcp, "reuseaddr nodelay keepalive keepidle keepintvl keepcnt socket_error getsockname getpeername "
                    "getaddrinfo_numeric sock_diag sock_diag_send sock_diag_recv netns_cookie",
          " reuseaddr" OPTIONS, 1);
}
TEST_LIMIT(tcp6, 240) { sweep(over_tcp6, "sock_diag_send getaddrinfo_numeric", " reuseaddr" OPTIONS, 1); }
TEST_LIMIT(tcp_owner_by_proc, 240) {
    failing_too = "sock_diag";
    sweep(over_tcp, "sock_diag read_owner", " reuseaddr nodelay ", 1);
    failing_too = NULL;
}
TEST_LIMIT(shm, 240) { sweep(over_shm, "fstat fstatfs get_seals memfd_create mmap", "", 1); }
TEST_LIMIT(cma, 240) { sweep(read_by_cma, "process_vm_readv", " process_vm_readv ", 12); }
TEST_LIMIT(moved, 240) { sweep(moved_to_shm, "fstatfs get_seals socket_error", " fstatfs get_seals memfd_create ", 1); }
TEST_LIMIT(agents_meet_by_tcp, 240) {
    sweep(agents_by_tcp, "connect_route getaddrinfo_numeric getsockname", OPTIONS, 1);
}
TEST_LIMIT(agents_meet_by_file, 240) { sweep(agents_by_file, "open_file pread pwrite fcntl", "", 1); }
TEST(bells_that_fail) {
    run_failing(bells, "bell_write", 1, EIO, true, " bell_write ");
    run_failing(bells, "bell_read", 1, EIO, true, " bell_read ");
    run_failing(bells, "bell_read", 1, EIO, false, " bell_read ");
}

static void whole_sweep(void *arg) {
    shaped = (const shape *)arg;
    fill(pattern_large, LARGE, 1);
    fill(pattern_before, PLACED, 2);
    fill(pattern_after, PLACED, 3);
    sweep(whole_run, "alloc send recv epoll_ctl", "", MOST_OF_ONE);
}
TESTS(whole) {
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0] - (getenv("HOOKS_ALL") == NULL); i++)
        test_add(shapes[i].name, whole_sweep, (void *)(uintptr_t)&shapes[i], 600);
}
