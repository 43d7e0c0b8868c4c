/* What calls cost, and what is said of them: counters and reports, no allocation after warm-up, no blocking call in a
   poll, no context switch in a spinning wait. */
#include "agent_help.h"

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

static uint8_t memory[3][1 << 16];    /* where each side receives; what is sent */

static tprpc_status place(tprpc_placement *placement, void *user) {
    placement->tensors[0].data = memory[((const side *)user)->rank];
    return placement->tensors[0].size <= sizeof memory[0] ? TPRPC_OK : TPRPC_ERROR_LIMIT;
}

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static void on_stats(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_stats stats = stats_of((side *)user);
    tprpc_message reply = {0};
    (void)message;
    reply.metadata = &stats;
    reply.metadata_size = sizeof stats;
    tprpc_reply(request, &reply);
}

static void on_allocs(tprpc_request request, const tprpc_message *message, void *user) {
    heap *h = &((side *)user)->heap;
    int64_t calls = LOAD(&h->calls);
    tprpc_message reply = {0};
    const uint32_t tag = LOAD(&h->last_tag);
    (void)message;
    printf("%lld allocations, the last %.4s of %zu bytes\n", (long long)calls, (const char *)&tag, LOAD(&h->last_size));
    reply.metadata = &calls;
    reply.metadata_size = sizeof calls;
    tprpc_reply(request, &reply);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},
    {"put", on_echo, place, NULL, NULL, 0},
    {"stats", on_stats, NULL, NULL, NULL, 0},
    {"allocs", on_allocs, NULL, NULL, NULL, 0},
    {0},
};

static void pair(const mode *with, void (*client)(side *),
                 void (*tune)(side *, tprpc_context_desc *, tprpc_agent_desc *)) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client;
    sides[0].methods = sides[1].methods = methods;
    sides[0].tune = sides[1].tune = tune;
    group_run(sides, 2);
}

/* Asks bob for a plain struct. */
static void ask(side *s, const char *method, void *out, size_t size) {
    tprpc_future future;
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", method, NULL, NULL, &future), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    const tprpc_message *reply = tprpc_future_reply(future);
    REQUIRE(reply && reply->metadata_size == size);
    memcpy(out, reply->metadata, size);
    tprpc_future_release(future);
}

/* ---- counters and reports ---- */

static void client_stats(side *s) {
    uint8_t *large = (uint8_t *)calloc(1, 1 << 20);
    tprpc_tensor tensors[3] = {bytes_of(large, 1 << 20), bytes_of(large, 64), bytes_of(NULL, 0)};
    tprpc_message message = tensors_of(tensors, 3);
    tprpc_pipe_info info;
    tprpc_stats mine, theirs;
    tprpc_error error;
    tprpc_future future;
    char report[4000], cut[20];
    enum { N = 10 };
    const uint64_t bytes = (uint64_t)N * ((1 << 20) + 64);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "nobody", &info, sizeof info), TPRPC_ERROR_NO_WORKER);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info), TPRPC_ERROR_UNREACHABLE);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info - 1), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_agent_get_stats(s->agent, &mine, sizeof mine + 8), TPRPC_ERROR_INVALID);
    for (int i = 0; i < N; i++) CHECK_EQ_INT(call_and_wait(s, "bob", "echo", &message, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "bob", "nothing", NULL, NULL, &error), TPRPC_ERROR_NO_METHOD);
    REQUIRE_EQ_INT(tprpc_call(s->agent, "bob", "echo", NULL, NULL, &future), TPRPC_OK);
    CHECK_LE_INT(stats_of(s).client_active_calls, 1);
    CHECK_EQ_INT(tprpc_future_wait(future, WAIT_MS), TPRPC_OK);
    tprpc_future_release(future);
    ask(s, "stats", &theirs, sizeof theirs);
    mine = stats_of(s);
    CHECK_EQ_INT(mine.calls, N + 3);
    CHECK_EQ_INT(mine.calls_failed, 1);
    CHECK_EQ_INT(mine.calls_timed_out, 0);
    CHECK_EQ_INT(mine.calls_cancelled, 0);
    CHECK_EQ_INT(mine.client_active_calls, 0);
    CHECK_EQ_INT(mine.requests, 0);
    CHECK_EQ_INT(mine.tensor_bytes_sent, bytes);
    CHECK_EQ_INT(mine.tensor_bytes_received, bytes);
    CHECK_EQ_INT(mine.workers, 2);
    CHECK_EQ_INT(mine.pipes, 1);
    CHECK(mine.fast_messages >= 2);
    const uint64_t rings = 2 * 516 * 1024;            /* of the pipe and its lane, where it is over shm */
    CHECK(mine.memory_bytes > 0 && mine.memory_bytes <= (uint64_t)LOAD(&s->heap.bytes) + 65536 + rings);
    CHECK_EQ_INT(theirs.requests, N + 3);
    CHECK_EQ_INT(theirs.requests_failed, 1);
    CHECK_EQ_INT(theirs.server_active_calls, 1);
    CHECK_EQ_INT(theirs.tensor_bytes_sent, bytes);
    CHECK_EQ_INT(theirs.tensor_bytes_received, bytes);
    CHECK_EQ_INT(theirs.pipes, 1);
    CHECK_EQ_INT(tprpc_agent_get_peer_info(s->agent, "bob", &info, sizeof info), TPRPC_OK);
    CHECK_EQ_INT(info.tensor_bytes_sent, bytes);
    CHECK_EQ_INT(info.tensor_bytes_received, bytes);
    CHECK_STR(info.transport, s->mode->transports ? s->mode->transports : "shm");
    CHECK(info.channel[0] && info.peer[0]);
    CHECK(info.path_count >= 4);
    for (uint32_t i = 0; i < info.path_count; i++) CHECK(info.paths[i].chosen || info.paths[i].why[0]);
    const size_t whole = tprpc_agent_report(s->agent, report, sizeof report);
    CHECK_EQ_INT(whole, strlen(report));
    CHECK_CONTAINS(report, "ann");
    CHECK_CONTAINS(report, "bob");
    CHECK_CONTAINS(report, info.transport);
    CHECK_EQ_INT(tprpc_agent_report(s->agent, NULL, 0), whole);
    memset(cut, 'x', sizeof cut);
    CHECK_EQ_INT(tprpc_agent_report(s->agent, cut, 16), whole);
    CHECK_EQ_INT(strlen(cut), 15);
    CHECK_MEM(cut, report, 15);
    CHECK_EQ_INT(cut[16], 'x');
    free(large);
}
IN_MODES(stats, ALL_MODES) { pair(with, client_stats, NULL); }

/* ---- nothing is allocated ---- */

/* Serves a million calls: for as long as the test may take, which ends it. */
static void serve_many(side *s) {
    for (int i = 0; i < 8 && !LOAD(&shared->stop); i++) until(s, &shared->stop, 1);
    CHECK_EQ_INT(LOAD(&shared->stop), 1);
}

/* bob serves by polling, for who waits to leave asks the store at times, which allocates. */
static void without_leave(const mode *with, void (*client)(side *)) {
    side sides[2] = {{0}};
    sides[0].mode = with;
    sides[0].main = client;
    sides[1].main = serve_many;
    sides[0].methods = sides[1].methods = methods;
    group_run(sides, 2);
}

enum { WINDOW = 8 };

/* Calls of which `window` are on their way at a time. */
static void repeat(side *s, const char *method, const tprpc_message *message, const tprpc_call_options *options,
                   int count, int window) {
    tprpc_future futures[4 * WINDOW];
    tprpc_method_id id;
    REQUIRE_EQ_INT(tprpc_resolve(s->agent, "bob", method, &id, NULL), TPRPC_OK);
    for (int done = 0; done < count; done += window) {
        for (int i = 0; i < window; i++)
            REQUIRE_EQ_INT(tprpc_call_id(s->agent, id, message, options, &futures[i]), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_future_wait_all(futures, (size_t)window, WAIT_MS), TPRPC_OK);
        for (int i = 0; i < window; i++) tprpc_future_release(futures[i]);
    }
}

/* What both sides have allocated up to now. */
static int64_t allocations(side *s) {
    int64_t theirs;
    ask(s, "allocs", &theirs, sizeof theirs);
    return LOAD(&s->heap.calls) + theirs;
}

/* A busy machine lets more frames queue up at once than the warm-up did. The pools keep what they had to get for them,
   so one of a few rounds gets nothing any more, while calls that allocate do in each. */
static void check_no_allocation(side *s, const char *method, const tprpc_message *message,
                                const tprpc_call_options *options, int count) {
    enum { ROUNDS = 5 };
    int64_t before, more = 1;
    repeat(s, method, message, options, count < 20000 ? count : 20000, 4 * WINDOW);   /* warm-up: more at a time */
    allocations(s);
    for (int round = 0; round < ROUNDS && more; round++) {
        before = allocations(s);
        repeat(s, method, message, options, count, WINDOW);
        more = allocations(s) - before;
        CHECK_LE_INT(more, WINDOW);
    }
    CHECK_EQ_INT(more, 0);
    STORE(&shared->stop, 1);
}

/* As often as is asked for between processes over shm, a tenth elsewhere; a sanitizer, which counts too, gets fewer: the
   first thousands of calls are like all others. */
static int thrift(const mode *with) {
    return (TEST_SLOWDOWN > 1 ? 40 : 1) * (with->processes && with->transports[0] == 's' ? 1 : 10);
}

static void client_small(side *s) {
    char body[64] = "sixty-four bytes";
    tprpc_message message = {0};
    message.metadata = body;
    message.metadata_size = sizeof body;
    check_no_allocation(s, "echo", &message, NULL, 1000000 / thrift(s->mode));
}
IN_MODES_LIMIT(small_calls_allocate_nothing, 0x1b, 240) { without_leave(with, client_small); }

static void client_in_place(side *s) {
    tprpc_tensor tensor = bytes_of(memory[2], sizeof memory[2]);
    tprpc_message message = tensors_of(&tensor, 1);
    tprpc_call_options options = {0};
    options.place = place;
    options.user = s;
    check_no_allocation(s, "put", &message, &options, 100000 / thrift(s->mode));
}
IN_MODES_LIMIT(calls_in_place_allocate_nothing, 0x1b, 240) { without_leave(with, client_in_place); }

/* ---- a poll does not block ---- */

/* All that a poll may do: what never waits, by what the calls are or by how they are made. */
static const char may_poll[] =
    " alloc epoll_create epoll_peek epoll_ctl eventfd bell_read bell_write poll getrandom dup "
    " socket socket_unix connect socket_error getsockname getpeername getsockopt netns_cookie accept send recv "
    " nodelay keepalive keepidle keepintvl keepcnt tcp_info ioctl sock_diag sock_diag_send sock_diag_recv "
    " getaddrinfo_numeric "                            /* of an address, which nobody is asked for */
    " bind listen reuseaddr "
    " memfd_create ftruncate fcntl mmap fstat fstatfs get_seals pidfd_open "
    " close shutdown drain munmap epoll_del futex_wake "   /* sockets do not linger */
    " process_vm_readv "                               /* a copy, of a chunk at most, also of one that is stopped */
    " open read read_owner "                           /* of /proc alone; a store's file is another name */
    " pread pwrite ";                                  /* of a store's file, whose lock (fcntl) is never waited for */

static __thread int in_poll;
static int blocked, calls_seen, may_wait_for_chunk;
static char blocked_by[32];

static int look_for_blocking(const char *call, int64_t *size) {
    char word[40];
    (void)size;
    if (!in_poll) return 0;
    calls_seen++;
    snprintf(word, sizeof word, " %s ", call);
    if (strstr(may_poll, word)) return 0;
    /* The end of a transfer between threads of one process waits, at most, for the chunk that the other is copying; who
       uses one local store with others, for the few instructions that another one needs. */
    if (may_wait_for_chunk && strcmp(call, "futex_wait") == 0) return 0;
    blocked++;
    snprintf(blocked_by, sizeof blocked_by, "%s", call);
    return 0;
}

static void poll_watched(side *s, int64_t budget_us) {
    in_poll = 1;
    tprpc_poll(s->ctx, TPRPC_NOW, budget_us);
    in_poll = 0;
}

static void count_done(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply; (void)error;
    CHECK_EQ_INT(status, TPRPC_OK);
    ++*(int *)user;
}

/* From the start on: the store, the group, connecting, agreeing, large tensors and small messages, and idle polls.
   Start itself may block for a name's look-up, so it is not watched. */
static void watched_polls(side *s) {
    enum { N = 40 };
    static uint8_t large[4 << 20];
    tprpc_call_options options = {0};
    int ready = 0, done = 0;
    int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    options.on_done = count_done;
    options.user = &done;
    blocked = calls_seen = 0;
    side_open(s);
    STORE(&tprpc_test_hook, look_for_blocking);
    REQUIRE_EQ_INT(tprpc_agent_start(s->agent, count_done, &ready, NULL), TPRPC_OK);
    while (!ready && test_now_us() < end) poll_watched(s, 500);
    REQUIRE_EQ_INT(ready, 1);
    for (int i = 0; i < N; i++) {
        tprpc_tensor tensor = bytes_of(large, i % 4 ? 64 : sizeof large);
        tprpc_message message = tensors_of(&tensor, 1);
        in_poll = 1;                 /* a call of a polled context must not block either */
        CHECK_EQ_INT(tprpc_call(s->agent, s->rank ? "ann" : "bob", "echo", &message, &options, NULL), TPRPC_OK);
        in_poll = 0;
    }
    while (done < N && test_now_us() < end) poll_watched(s, 500);
    CHECK_EQ_INT(done, N);
    for (int i = 0; i < 20000; i++) poll_watched(s, 0);
    STORE(&tprpc_test_hook, NULL);
    CHECK_EQ_INT(blocked, 0);
    CHECK_STR(blocked_by, "");
    CHECK(calls_seen > 0);
    side_leave(s);
    side_close(s);
}

/* One side is watched here, the other one lives in a process or on a thread of its own. */
static void watch(const mode *with, bool tcp_store, int rank, const char *channels) {
    side sides[2] = {{0}};
    char url[64];
    pid_t pid = 0;
    group g;
    share();
    sides[0].mode = with;
    if (tcp_store) {
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", socket_free_port());
        sides[0].init_method = sides[1].init_method = url;
    }
    sides[0].methods = sides[1].methods = methods;
    sides[0].channels = sides[1].channels = channels;
    group_open(&g, sides, 2);
    if (with->processes) pid = test_fork_run(side_run, &sides[1 - rank]);
    else REQUIRE_EQ_INT(pthread_create(&sides[1 - rank].self, NULL, side_thread, &sides[1 - rank]), 0);
    may_wait_for_chunk = !with->processes && !channels;
    watched_polls(&sides[rank]);
    if (with->processes) CHECK_EQ_INT(test_wait_child(pid, 40), 0);
    else pthread_join(sides[1 - rank].self, NULL);
    group_close(&g);
}

IN_MODES(polls_do_not_block, 0xc3) { watch(with, false, 0, NULL); }
/* Two threads that share nothing: without xth, and each with a store of its own. */
IN_MODES(polls_do_not_block_basic, 0x44) { watch(with, true, 0, "basic"); }
IN_MODES(polls_do_not_block_cma, 0x82) { watch(with, true, 0, "cma"); }
IN_MODES(polls_do_not_block_as_store, 0x83) { watch(with, true, 0, NULL); }
IN_MODES(polls_do_not_block_at_store, 0x83) { watch(with, true, 1, NULL); }

/* ---- a spinning wait ---- */

static void spin_long(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)agent;
    context->spin_us = 2000000;
}

static void client_spins(side *s) {
    const bool shm = strcmp(s->mode->transports ? s->mode->transports : "shm", "shm") == 0;
    int quiet = 0, tries = 0;
    for (int i = 0; i < 1000; i++) CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    for (; tries < 200 && (shm || quiet < 20); tries++) {
        struct rusage before, after;
        getrusage(RUSAGE_THREAD, &before);
        for (int i = 0; i < 10; i++) CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
        getrusage(RUSAGE_THREAD, &after);
        if (after.ru_nvcsw == before.ru_nvcsw) quiet++;
    }
    fprintf(stderr, "%d of %d without a sleep\n", quiet, tries);
    CHECK(quiet >= (shm ? tries / 2 + 1 : 20));
}

/* tcp: the kernel may make a thread wait in a system call of its own accord, so only some need be without. */
IN_MODES(spinning_waits_do_not_sleep, 0x83) { pair(with, client_spins, spin_long); }
