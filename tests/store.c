/* Stores through the public interface: every operation on every kind, between threads and processes, and all that may
   go wrong: time-outs, closing, lost servers, strangers, files that are none. */
#include "harness.h"
#include "../tprpc.h"
#include "sockets.h"
#include <pthread.h>

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

/* ---- helpers --------------------------------------------------------------------------------------------- */

static tprpc_context *new_context(int threads) {
    tprpc_context_desc desc = {.threads = threads};
    tprpc_error error = {0};
    tprpc_context *ctx = NULL;
    if (tprpc_context_create(&desc, &ctx, &error)) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

static tprpc_store *open_store(tprpc_context *ctx, const char *url, bool serve, int64_t timeout_ms) {
    tprpc_store_desc desc = {.url = url, .serve = serve, .timeout_ms = timeout_ms};
    tprpc_error error = {0};
    tprpc_store *store = NULL;
    if (tprpc_store_open(ctx, &desc, &store, &error)) fprintf(stderr, "%s: %s\n", url, error.text);
    REQUIRE(store != NULL);
    return store;
}

static tprpc_status wait_get(tprpc_store *store, const char *key, int64_t timeout_ms, char *out, size_t room,
                             tprpc_error *error) {
    tprpc_store_request r = {.size = sizeof r, .kind = TPRPC_STORE_GET, .key = key};
    size_t size = room - 1;
    tprpc_status status = tprpc_store_wait(store, &r, timeout_ms, out, &size, error);
    out[status == TPRPC_OK ? size : 0] = 0;
    return status;
}

static tprpc_status wait_set(tprpc_store *store, const char *key, const char *value, tprpc_error *error) {
    tprpc_store_request r = {.size = sizeof r, .kind = TPRPC_STORE_SET, .key = key, .value = value,
                             .value_size = strlen(value)};
    return tprpc_store_wait(store, &r, 0, NULL, NULL, error);
}

static int64_t wait_add(tprpc_store *store, const char *key, int64_t delta, tprpc_error *error) {
    tprpc_store_request r = {.size = sizeof r, .kind = TPRPC_STORE_ADD, .key = key, .delta = delta};
    int64_t sum = INT64_MIN;
    size_t size = sizeof sum;
    tprpc_error mine = {0};
    if (tprpc_store_wait(store, &r, 0, &sum, &size, error ? error : &mine) && !error)
        fprintf(stderr, "add: %s\n", mine.text);
    return sum;
}

static tprpc_status wait_swap(tprpc_store *store, const char *key, const char *expected, const char *value, char *out,
                              size_t room) {
    tprpc_store_request r = {.size = sizeof r, .kind = TPRPC_STORE_COMPARE_SET, .key = key, .value = value,
                             .value_size = strlen(value), .expected = expected,
                             .expected_size = expected ? strlen(expected) : 0};
    size_t size = room - 1;
    tprpc_status status = tprpc_store_wait(store, &r, 0, out, &size, NULL);
    out[status == TPRPC_OK ? size : 0] = 0;
    return status;
}

typedef struct outcome {
    int count; tprpc_status status; char value[64]; size_t size; bool present; char text[244];
} outcome;

static void on_outcome(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    outcome *o = (outcome *)user;
    o->count++;
    o->status = status;
    o->size = size;
    o->present = value != NULL;
    if (size) memcpy(o->value, value, size < sizeof o->value ? size : sizeof o->value);
    snprintf(o->text, sizeof o->text, "%s", error ? error->text : "");
    CHECK((status == TPRPC_OK) == (error == NULL));
}

static bool poll_for(tprpc_context *ctx, const outcome *o, int count, double seconds) {
    int64_t until = test_now_us() + (int64_t)(seconds * 1e6) * TEST_SLOWDOWN;
    while (o->count < count && test_now_us() < until) tprpc_poll(ctx, 10000, 0);
    return o->count == count;
}

static const char *tcp_url(char *out, size_t size) {
    snprintf(out, size, "tcp://127.0.0.1:%d", socket_free_port());
    return out;
}

static const char *file_url(char *out, size_t size) {
    char path[256];
    snprintf(out, size, "file://%s", test_temp_path(path, sizeof path));
    return out;
}

/* ---- what every kind does -------------------------------------------------------------------------------- */

static void check_semantics(tprpc_store *store) {
    char value[64], big[65536], back[65536];
    tprpc_error error = {0};
    tprpc_store_request r = {.size = sizeof r, .kind = TPRPC_STORE_DELETE, .key = "k"};
    unsigned char gone = 7;
    size_t size = sizeof gone;

    CHECK_EQ_INT(wait_get(store, "k", TPRPC_NOW, value, sizeof value, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "no key 'k'");
    CHECK_EQ_INT(wait_set(store, "k", "one", NULL), TPRPC_OK);
    CHECK_EQ_INT(wait_get(store, "k", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_STR(value, "one");
    CHECK_EQ_INT(wait_set(store, "k", "", NULL), TPRPC_OK);
    CHECK_EQ_INT(wait_get(store, "k", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_STR(value, "");

    CHECK_EQ_INT(wait_swap(store, "k", NULL, "no", value, sizeof value), TPRPC_OK);   /* empty is not absent */
    CHECK_STR(value, "");
    CHECK_EQ_INT(wait_swap(store, "k", "", "two", value, sizeof value), TPRPC_OK);
    CHECK_STR(value, "two");
    CHECK_EQ_INT(wait_swap(store, "k", "other", "three", value, sizeof value), TPRPC_OK);
    CHECK_STR(value, "two");
    CHECK_EQ_INT(wait_swap(store, "new", "there", "x", value, sizeof value), TPRPC_OK);
    CHECK_EQ_INT(wait_get(store, "new", TPRPC_NOW, value, sizeof value, NULL), TPRPC_ERROR_TIMEOUT);
    CHECK_EQ_INT(wait_swap(store, "new", NULL, "x", value, sizeof value), TPRPC_OK);
    CHECK_STR(value, "x");

    CHECK_EQ_INT(wait_add(store, "n", 5, NULL), 5);
    CHECK_EQ_INT(wait_add(store, "n", -7, NULL), -2);
    CHECK_EQ_INT(wait_get(store, "n", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_STR(value, "-2");
    CHECK_EQ_INT(wait_add(store, "k", 1, &error), INT64_MIN);
    CHECK_EQ_INT(error.status, TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "'k'");
    CHECK_EQ_INT(wait_set(store, "n", "9223372036854775807", NULL), TPRPC_OK);
    CHECK_EQ_INT(wait_add(store, "n", 1, &error), INT64_MIN);
    CHECK_EQ_INT(wait_add(store, "n", -1, NULL), INT64_MAX - 1);

    CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, &gone, &size, NULL), TPRPC_OK);
    CHECK_EQ_INT(gone, 1);
    CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, &gone, &size, NULL), TPRPC_OK);
    CHECK_EQ_INT(gone, 0);
    CHECK_EQ_INT(wait_get(store, "k", TPRPC_NOW, value, sizeof value, NULL), TPRPC_ERROR_TIMEOUT);

    memset(big, 'b', sizeof big);
    r.kind = TPRPC_STORE_SET;
    r.value = big;
    r.value_size = sizeof big;
    CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, NULL, NULL, NULL), TPRPC_OK);
    r.kind = TPRPC_STORE_GET;
    size = sizeof back;
    CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, back, &size, NULL), TPRPC_OK);
    CHECK_EQ_INT(size, sizeof big);
    CHECK_MEM(back, big, sizeof big);
    size = 10;
    CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, back, &size, &error), TPRPC_ERROR_LIMIT);
    CHECK_EQ_INT(size, sizeof big);
    r.kind = TPRPC_STORE_DELETE;
    CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, NULL, NULL, NULL), TPRPC_OK);
}

static void check_bad_arguments(tprpc_store *store) {
    char longest[258];
    memset(longest, 'k', sizeof longest);
    longest[256] = 0;
    CHECK_EQ_INT(tprpc_store_set(store, "", "x", 1, NULL, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_store_set(store, longest, "x", 1, NULL, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_store_set(store, "\xff\xfe", "x", 1, NULL, NULL), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_store_set(store, "big", longest, 65537, NULL, NULL), TPRPC_ERROR_LIMIT);
    longest[255] = 0;
    CHECK_EQ_INT(tprpc_store_set(store, longest, "x", 1, NULL, NULL), TPRPC_OK);
}

static void check_asynchronous(tprpc_context *ctx, tprpc_store *store) {
    static outcome many[300];
    outcome got = {0}, set = {0}, late = {0};
    char key[16];
    CHECK_EQ_INT(tprpc_store_get(store, "coming", 20000, on_outcome, &got), TPRPC_OK);
    CHECK_EQ_INT(tprpc_store_get(store, "never", 30, on_outcome, &late), TPRPC_OK);
    CHECK(poll_for(ctx, &late, 1, 10));
    CHECK_EQ_INT(late.status, TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(late.text, "no key 'never' after 30 ms");
    CHECK_EQ_INT(got.count, 0);
    CHECK_EQ_INT(tprpc_store_set(store, "coming", "here", 4, on_outcome, &set), TPRPC_OK);
    CHECK(poll_for(ctx, &got, 1, 10));
    CHECK(poll_for(ctx, &set, 1, 10));
    CHECK_EQ_INT(got.status, TPRPC_OK);
    CHECK_MEM(got.value, "here", 4);
    CHECK(!set.present);
    memset(many, 0, sizeof many);
    for (int i = 0; i < 300; i++) {   /* in the order asked: each get sees the set before it */
        snprintf(key, sizeof key, "many%d", i / 2);
        if (i % 2 == 0) CHECK_EQ_INT(tprpc_store_set(store, key, &i, sizeof i, on_outcome, &many[i]), TPRPC_OK);
        else CHECK_EQ_INT(tprpc_store_get(store, key, TPRPC_NOW, on_outcome, &many[i]), TPRPC_OK);
    }
    for (int i = 0; i < 300; i++) {
        int value = -1;
        CHECK(poll_for(ctx, &many[i], 1, 10));
        CHECK_EQ_INT(many[i].status, TPRPC_OK);
        if (i % 2 == 0) continue;
        memcpy(&value, many[i].value, sizeof value);
        CHECK_EQ_INT(value, i - 1);
    }
}

static void check_close(tprpc_context *ctx, const char *url, bool serve) {
    tprpc_store *store = open_store(ctx, url, serve, 0);
    outcome waiting[3] = {{0}}, set = {0};
    for (int i = 0; i < 3; i++)
        CHECK_EQ_INT(tprpc_store_get(store, "x", TPRPC_FOREVER, on_outcome, &waiting[i]), TPRPC_OK);
    for (int i = 0; i < 5; i++) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(tprpc_store_set(store, "y", "z", 1, on_outcome, &set), TPRPC_OK);
    tprpc_store_close(store);
    CHECK_EQ_INT(waiting[0].count, 0);   /* never inline */
    CHECK(poll_for(ctx, &set, 1, 5));
    for (int i = 0; i < 3; i++) {
        CHECK(poll_for(ctx, &waiting[i], 1, 5));
        CHECK_EQ_INT(waiting[i].status, TPRPC_ERROR_CLOSED);
        CHECK_CONTAINS(waiting[i].text, url);
    }
}

static void check_destroy(const char *url, bool serve) {
    tprpc_context *ctx = new_context(0);
    outcome waiting = {0}, set = {0};
    tprpc_store *store = open_store(ctx, url, serve, 0);
    CHECK_EQ_INT(tprpc_store_get(store, "x", TPRPC_FOREVER, on_outcome, &waiting), TPRPC_OK);
    CHECK_EQ_INT(tprpc_store_set(store, "y", "z", 1, on_outcome, &set), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(waiting.count, 1);
    CHECK_EQ_INT(waiting.status, TPRPC_ERROR_CLOSED);
    CHECK_EQ_INT(set.count, 1);
}

static void check_kind(const char *url, bool serve) {
    int fds = test_count_fds();
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, serve, 0);
    check_semantics(store);
    check_bad_arguments(store);
    check_asynchronous(ctx, store);
    tprpc_store_close(store);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    ctx = new_context(0);
    check_close(ctx, url, serve);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    check_destroy(url, serve);
    CHECK_EQ_INT(test_count_fds(), fds);
}

TEST(local_store) { check_kind("local://", false); }

TEST(file_store) {
    char url[300];
    check_kind(file_url(url, sizeof url), false);
}

TEST(tcp_store_at_its_server) {
    char url[64];
    check_kind(tcp_url(url, sizeof url), true);
}

/* A server in a process of its own, until its parent closes the pipe. */
typedef struct server { const char *url; int quit[2]; } server;

static void run_server(void *arg) {
    server *s = (server *)arg;
    char byte;
    close(s->quit[1]);
    fcntl(s->quit[0], F_SETFL, O_NONBLOCK);
    tprpc_context *ctx = new_context(0);
    open_store(ctx, s->url, true, 0);
    while (read(s->quit[0], &byte, 1) < 0) tprpc_poll(ctx, 10000, 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static pid_t start_server(server *s, const char *url) {
    s->url = url;
    REQUIRE(pipe(s->quit) == 0);
    pid_t pid = test_fork_run(run_server, s);
    close(s->quit[0]);
    return pid;
}

static void stop_server(server *s, pid_t pid) {
    close(s->quit[1]);
    CHECK_EQ_INT(test_wait_child(pid, 10), 0);
}

TEST(tcp_store_at_a_client) {
    char url[64];
    server s;
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    int fds = test_count_fds();
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    check_semantics(store);
    check_bad_arguments(store);
    check_asynchronous(ctx, store);
    tprpc_store_close(store);
    check_close(ctx, url, false);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    check_destroy(url, false);
    CHECK_EQ_INT(test_count_fds(), fds);
    stop_server(&s, pid);
}

/* ---- threads --------------------------------------------------------------------------------------------- */

typedef struct hammer { tprpc_store *store; int count; } hammer;

static void *hammer_add(void *arg) {
    hammer *h = (hammer *)arg;
    for (int i = 0; i < h->count; i++) CHECK(wait_add(h->store, "sum", 1, NULL) > 0);
    return NULL;
}

static void *hammer_swap(void *arg) {   /* a lock made of compare_set guards a plain counter */
    hammer *h = (hammer *)arg;
    char value[64], next[64];
    for (int i = 0; i < h->count; i++) {
        for (;;) {
            char seen[64];
            REQUIRE(wait_get(h->store, "guarded", TPRPC_NOW, seen, sizeof seen, NULL) == TPRPC_OK);
            /* what nobody else writes */
            snprintf(next, sizeof next, "%d %d %p %d", atoi(seen) + 1, (int)getpid(), (void *)&value, i);
            REQUIRE(wait_swap(h->store, "guarded", seen, next, value, sizeof value) == TPRPC_OK);
            if (strcmp(value, next) == 0) break;
        }
    }
    return NULL;
}

static void hammer_threads(tprpc_store *store, int count) {
    pthread_t threads[4];
    hammer h = {store, count};
    char value[64];
    CHECK_EQ_INT(wait_set(store, "guarded", "0", NULL), TPRPC_OK);
    for (int i = 0; i < 4; i++) REQUIRE(pthread_create(&threads[i], NULL, i % 2 ? hammer_add : hammer_swap, &h) == 0);
    for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    CHECK_EQ_INT(wait_add(store, "sum", 0, NULL), 2 * count);
    CHECK_EQ_INT(wait_get(store, "guarded", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_EQ_INT(atoi(value), 2 * count);
}

TEST(threads_wait_on_a_polled_context) {   /* none of them is the callback thread, and that does not poll */
    tprpc_context *ctx = new_context(0);
    hammer_threads(open_store(ctx, "local://", false, 0), 1000 / TEST_SLOWDOWN);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(threads_wait_on_a_threaded_context) {
    char url[64];
    tprpc_context *ctx = new_context(2), *other = new_context(1);
    hammer_threads(open_store(ctx, "local://", false, 0), 1000 / TEST_SLOWDOWN);
    open_store(ctx, tcp_url(url, sizeof url), true, 0);
    hammer_threads(open_store(other, url, false, 0), 300 / TEST_SLOWDOWN);
    CHECK_EQ_INT(tprpc_context_destroy(other), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void *set_later(void *arg) {
    hammer *h = (hammer *)arg;
    test_sleep_us(30000);
    CHECK_EQ_INT(wait_set(h->store, "later", "now", NULL), TPRPC_OK);
    return NULL;
}

TEST(a_thread_ends_anothers_wait) {
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, "local://", false, 0);
    hammer h = {store, 0};
    pthread_t thread;
    char value[64];
    REQUIRE(pthread_create(&thread, NULL, set_later, &h) == 0);
    CHECK_EQ_INT(wait_get(store, "later", 20000, value, sizeof value, NULL), TPRPC_OK);
    CHECK_STR(value, "now");
    pthread_join(thread, NULL);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static pthread_t callback_thread;
static void on_thread(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    CHECK(pthread_equal(pthread_self(), callback_thread));
    on_outcome(status, value, size, error, user);
}

static outcome asked;
static void *ask_from_here(void *arg) {
    hammer *h = (hammer *)arg;
    for (int i = 0; i < 200; i++) CHECK_EQ_INT(tprpc_store_add(h->store, "n", 1, on_thread, &asked), TPRPC_OK);
    return NULL;
}

TEST(callbacks_run_on_the_callback_thread) {
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, "local://", false, 0);
    pthread_t thread;
    hammer h = {store, 0};
    callback_thread = pthread_self();
    outcome mine = {0};
    REQUIRE(pthread_create(&thread, NULL, ask_from_here, &h) == 0);
    pthread_join(thread, NULL);
    CHECK_EQ_INT(tprpc_store_add(store, "n", 1, on_thread, &mine), TPRPC_OK);
    CHECK(poll_for(ctx, &mine, 1, 5));
    CHECK_EQ_INT(asked.count, 200);
    CHECK_EQ_INT(wait_add(store, "n", 0, NULL), 201);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

typedef struct nest { tprpc_store *store; int depth, limit_seen; } nest;
static void on_nested(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    nest *n = (nest *)user;
    tprpc_error mine = {0};
    char key[16];
    (void)value; (void)size; (void)error;
    if (status != TPRPC_OK) return;
    snprintf(key, sizeof key, "d%d", n->depth++);
    if (wait_add(n->store, key, 1, &mine) == INT64_MIN) {
        CHECK_EQ_INT(mine.status, TPRPC_ERROR_LIMIT);
        n->limit_seen++;
    }
}

TEST(waits_nest_in_callbacks_to_a_limit) {
    tprpc_context *ctx = new_context(0);
    nest n = {open_store(ctx, "local://", false, 0), 0, 0};
    for (int i = 0; i < 30; i++) CHECK_EQ_INT(tprpc_store_set(n.store, "x", "y", 1, on_nested, &n), TPRPC_OK);
    while (n.depth < 30) tprpc_poll(ctx, 1000, 0);
    CHECK(n.limit_seen > 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- a user's own ---------------------------------------------------------------------------------------- */

typedef struct toy { int submitted, cancelled, closed; tprpc_store_op *kept; pthread_t thread; bool threaded; } toy;

static void toy_submit(void *user, tprpc_store_op *op, const tprpc_store_request *request) {
    toy *t = (toy *)user;
    tprpc_error error;
    CHECK_EQ_INT(t->closed, 0);
    t->submitted++;
    if (strcmp(request->key, "hang") == 0) __atomic_store_n(&t->kept, op, __ATOMIC_RELEASE);   /* for other threads */
    else if (strcmp(request->key, "fail") == 0)
        tprpc_store_finish(op, tprpc_error_set(&error, TPRPC_ERROR_REMOTE, 0, "the toy says no"), NULL, 0, &error);
    else tprpc_store_finish(op, TPRPC_OK, request->value, request->value_size, NULL);
}

static void toy_cancel(void *user, tprpc_store_op *op) {
    toy *t = (toy *)user;
    CHECK(t->kept == op);
    t->cancelled++;
    t->kept = NULL;
    tprpc_store_finish(op, TPRPC_ERROR_CANCELLED, NULL, 0, NULL);
}

static void toy_close(void *user) {
    toy *t = (toy *)user;
    CHECK(!t->kept);
    t->closed++;
}

static void *finish_later(void *arg) {
    test_sleep_us(20000);
    tprpc_store_finish((tprpc_store_op *)arg, TPRPC_OK, "late", 4, NULL);
    return NULL;
}

TEST(a_store_of_the_users) {
    static const tprpc_store_table table = {sizeof table, toy_submit, toy_cancel, toy_close};
    tprpc_context *ctx = new_context(0);
    toy t = {0};
    tprpc_store_desc desc = {.table = &table, .user = &t};
    tprpc_store *store = NULL;
    tprpc_error error = {0};
    outcome o = {0};
    char value[64];
    pthread_t thread;
    REQUIRE(tprpc_store_open(ctx, &desc, &store, &error) == TPRPC_OK);
    CHECK_EQ_INT(wait_set(store, "k", "value", &error), TPRPC_OK);
    CHECK_EQ_INT(wait_set(store, "fail", "value", &error), TPRPC_ERROR_REMOTE);
    CHECK_STR(error.text, "the toy says no");
    CHECK_EQ_INT(wait_get(store, "hang", 30, value, sizeof value, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "no key 'hang' after 30 ms");
    for (int i = 0; i < 10; i++) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(t.cancelled, 1);
    CHECK_EQ_INT(tprpc_store_get(store, "hang", 20, on_outcome, &o), TPRPC_OK);
    CHECK(poll_for(ctx, &o, 1, 5));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_TIMEOUT);
    CHECK_EQ_INT(t.cancelled, 2);
    CHECK_EQ_INT(tprpc_store_get(store, "hang", 20000, on_outcome, &o), TPRPC_OK);
    while (!t.kept) tprpc_poll(ctx, 1000, 0);
    REQUIRE(pthread_create(&thread, NULL, finish_later, t.kept) == 0);
    CHECK(poll_for(ctx, &o, 2, 5));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK_MEM(o.value, "late", 4);
    pthread_join(thread, NULL);
    t.kept = NULL;
    CHECK_EQ_INT(tprpc_store_get(store, "hang", TPRPC_FOREVER, on_outcome, &o), TPRPC_OK);
    while (!t.kept) tprpc_poll(ctx, 1000, 0);
    tprpc_store_close(store);
    CHECK(poll_for(ctx, &o, 3, 5));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_CLOSED);
    for (int i = 0; i < 10; i++) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(t.closed, 1);
    t.closed = 0;
    REQUIRE(tprpc_store_open(ctx, &desc, &store, &error) == TPRPC_OK);   /* closed with its context */
    CHECK_EQ_INT(tprpc_store_get(store, "hang", TPRPC_FOREVER, on_outcome, &o), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    CHECK_EQ_INT(o.count, 4);
    CHECK_EQ_INT(t.closed, 1);
}

/* One whose operations end when they like: `cancel` is ignored. */
static void deaf_cancel(void *user, tprpc_store_op *op) { (void)user, (void)op; }

/* The destruction's half minute passes at once: while in a hurry, each look at the clock is that much later. */
static int in_hurry;
static int64_t hurried_us;
static int64_t hurried_clock(void *user) {
    (void)user;
    return test_now_us() + __atomic_add_fetch(&hurried_us, __atomic_load_n(&in_hurry, __ATOMIC_RELAXED) ? 30000000 : 0,
                                              __ATOMIC_RELAXED);
}

TEST(destroyed_again_when_a_store_has_ended) {
    static const tprpc_store_table table = {sizeof table, toy_submit, deaf_cancel, toy_close};
    for (int threads = 0; threads < 3; threads++) {
        tprpc_context_desc context = {.threads = threads, .clock_us = hurried_clock};
        tprpc_context *ctx = NULL;
        toy t = {0};
        tprpc_store_desc desc = {.table = &table, .user = &t};
        tprpc_store *store = NULL;
        outcome o = {0};
        const int fds = test_count_fds();
        REQUIRE(tprpc_context_create(&context, &ctx, NULL) == TPRPC_OK);
        REQUIRE(tprpc_store_open(ctx, &desc, &store, NULL) == TPRPC_OK);
        CHECK_EQ_INT(tprpc_store_get(store, "hang", TPRPC_FOREVER, on_outcome, &o), TPRPC_OK);
        while (!__atomic_load_n(&t.kept, __ATOMIC_ACQUIRE)) tprpc_poll(ctx, 1000, 0);
        for (int i = 0; i < 3; i++) {
            __atomic_store_n(&in_hurry, 1, __ATOMIC_RELAXED);
            CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_ERROR_TIMEOUT);
            __atomic_store_n(&in_hurry, 0, __ATOMIC_RELAXED);
            CHECK_EQ_INT(o.count, 0);
            CHECK_EQ_INT(t.closed, 0);
        }
        tprpc_store_finish(t.kept, TPRPC_OK, "late", 4, NULL);
        t.kept = NULL;
        CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
        CHECK_EQ_INT(o.count, 1);
        CHECK_EQ_INT(t.closed, 1);
        CHECK_EQ_INT(test_count_fds(), fds);
    }
}

/* ---- files ----------------------------------------------------------------------------------------------- */

typedef struct job { const char *url; int count; int who; } job;

static void file_adder(void *arg) {
    job *j = (job *)arg;
    tprpc_context *ctx = new_context(0);
    hammer h = {open_store(ctx, j->url, false, 0), j->count};
    hammer_add(&h);
    hammer_swap(&h);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void hammer_processes(const char *url, int count) {
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    job j = {url, count, 0};
    pid_t pids[3];
    char value[64];
    CHECK_EQ_INT(wait_set(store, "guarded", "0", NULL), TPRPC_OK);
    for (int i = 0; i < 3; i++) pids[i] = test_fork_run(file_adder, &j);
    for (int i = 0; i < 3; i++) CHECK_EQ_INT(test_wait_child(pids[i], 40), 0);
    CHECK_EQ_INT(wait_add(store, "sum", 0, NULL), 3 * j.count);
    CHECK_EQ_INT(wait_get(store, "guarded", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_EQ_INT(atoi(value), 3 * j.count);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(processes_hammer_one_file) {
    char url[300];
    hammer_processes(file_url(url, sizeof url), 2000 / TEST_SLOWDOWN);
}

TEST(processes_hammer_one_server) {
    char url[64];
    server s;
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    hammer_processes(url, 1000 / TEST_SLOWDOWN);
    stop_server(&s, pid);
}

static void file_setter(void *arg) {
    job *j = (job *)arg;
    test_sleep_us(50000);
    tprpc_context *ctx = new_context(0);
    CHECK_EQ_INT(wait_set(open_store(ctx, j->url, false, 0), "from afar", "hello", NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void wait_for_another_process(const char *url) {
    job j = {url, 0, 0};
    pid_t pid = test_fork_run(file_setter, &j);
    char value[64];
    tprpc_error error = {0};
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    CHECK_EQ_INT(wait_get(store, "from afar", 20000, value, sizeof value, &error), TPRPC_OK);
    CHECK_STR(value, "hello");
    CHECK_EQ_INT(wait_get(store, "not there", 50, value, sizeof value, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, url);
    CHECK_CONTAINS(error.text, "no key 'not there' after 50 ms");
    CHECK_EQ_INT(test_wait_child(pid, 10), 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(a_process_ends_anothers_wait_on_a_file) {
    char url[300];
    wait_for_another_process(file_url(url, sizeof url));
}

TEST(a_process_ends_anothers_wait_on_a_server) {
    char url[64];
    server s;
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    wait_for_another_process(url);
    stop_server(&s, pid);
}

static tprpc_status try_open(const char *url, tprpc_error *error) {
    tprpc_context *ctx = new_context(0);
    tprpc_store_desc desc = {.url = url};
    tprpc_store *store = NULL;
    tprpc_status status = tprpc_store_open(ctx, &desc, &store, error);
    CHECK((status == TPRPC_OK) == (store != NULL));
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    return status;
}

static void write_file(const char *path, const char *mode, const void *bytes, size_t size) {
    FILE *file = fopen(path, mode);
    REQUIRE(file != NULL && fwrite(bytes, 1, size, file) == size);
    fclose(file);
}

TEST(files_that_are_no_stores) {
    char url[300];
    tprpc_error error = {0};
    file_url(url, sizeof url);
    write_file(url + 7, "w", "hello, world\n", 13);
    CHECK_EQ_INT(try_open(url, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "is not a store file");
    CHECK_CONTAINS(error.text, url + 7);
    file_url(url, sizeof url);
    write_file(url + 7, "w", "abc", 3);
    CHECK_EQ_INT(try_open(url, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("file:///", &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("file:///dev/zero", &error), TPRPC_ERROR_INVALID);
    file_url(url, sizeof url);
    REQUIRE(mkfifo(url + 7, 0600) == 0);
    CHECK_EQ_INT(try_open(url, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("file:///nowhere/at/all", &error), TPRPC_ERROR_UNREACHABLE);
    CHECK_CONTAINS(error.text, "/nowhere/at/all");
    CHECK_EQ_INT(try_open("file://", &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("ftp://x", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "tcp://host:port");
    CHECK_EQ_INT(try_open("tcp://127.0.0.1", &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("tcp://127.0.0.1:http", &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("tcp://127.0.0.1:70000", &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(try_open("tcp://:", &error), TPRPC_ERROR_INVALID);
}

TEST(files_of_other_users) {
    char url[300], path[280];
    tprpc_error error = {0};
    if (geteuid() != 0) SKIP("needs root, to give a file away");
    test_temp_path(path, sizeof path);
    write_file(path, "w", "", 0);
    REQUIRE(chown(path, 4711, 4711) == 0);
    snprintf(url, sizeof url, "file://%s", path);
    CHECK_EQ_INT(try_open(url, &error), TPRPC_ERROR_DENIED);
}

/* Cuts a store's file at every byte: the records before are there, and the store can be written again. */
TEST(a_torn_tail) {
    char url[300], copy[300], value[64];
    static char bytes[4096];
    struct stat before, after;
    size_t size;
    file_url(url, sizeof url);
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    CHECK_EQ_INT(wait_set(store, "first", "1", NULL), TPRPC_OK);
    REQUIRE(stat(url + 7, &before) == 0);
    CHECK_EQ_INT(wait_set(store, "second", "some longer value", NULL), TPRPC_OK);
    REQUIRE(stat(url + 7, &after) == 0);
    tprpc_store_close(store);
    FILE *file = fopen(url + 7, "r");
    size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    CHECK_EQ_INT(size, after.st_size);
    for (size_t cut = 0; cut < size; cut++) {
        file_url(copy, sizeof copy);
        write_file(copy + 7, "w", bytes, cut);
        store = open_store(ctx, copy, false, 0);
        CHECK_EQ_INT(wait_get(store, "first", TPRPC_NOW, value, sizeof value, NULL),
                     cut < (size_t)before.st_size ? TPRPC_ERROR_TIMEOUT : TPRPC_OK);
        CHECK_EQ_INT(wait_get(store, "second", TPRPC_NOW, value, sizeof value, NULL), TPRPC_ERROR_TIMEOUT);
        CHECK_EQ_INT(wait_set(store, "third", "3", NULL), TPRPC_OK);
        tprpc_store_close(store);
        store = open_store(ctx, copy, false, 0);
        CHECK_EQ_INT(wait_get(store, "third", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
        CHECK_STR(value, "3");
        tprpc_store_close(store);
        unlink(copy + 7);
    }
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(a_damaged_file_says_so) {
    char url[300], value[64];
    tprpc_error error = {0};
    file_url(url, sizeof url);
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    CHECK_EQ_INT(wait_set(store, "a", "1", NULL), TPRPC_OK);
    CHECK_EQ_INT(wait_set(store, "b", "2", NULL), TPRPC_OK);
    tprpc_store_close(store);
    FILE *file = fopen(url + 7, "r+");
    fseek(file, 8 + 16, SEEK_SET);
    fputc('z', file);
    fclose(file);
    store = open_store(ctx, url, false, 0);
    CHECK_EQ_INT(wait_get(store, "a", 5000, value, sizeof value, &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "damaged at byte 8");
    CHECK_EQ_INT(wait_set(store, "c", "3", &error), TPRPC_ERROR_PROTOCOL);
    CHECK_EQ_INT(truncate(url + 7, 8), 0);
    CHECK_EQ_INT(wait_set(store, "c", "3", &error), TPRPC_OK);
    CHECK_EQ_INT(truncate(url + 7, 3), 0);
    CHECK_EQ_INT(wait_set(store, "d", "4", &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "cut short");
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void hold_lock(void *arg) {
    const char *url = (const char *)arg;
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    int fd = open(url + 7, O_RDWR);
    CHECK(fd >= 0 && fcntl(fd, F_OFD_SETLKW, &lock) == 0);
    test_sleep_us(1000000);
}

TEST(a_locked_file_is_waited_for) {
    char url[300], value[64];
    tprpc_error error = {0};
    outcome o = {0}, after = {0};
    int64_t begin, longest = 0;
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, file_url(url, sizeof url), false, 0);
    tprpc_store_request r = {.size = sizeof r, .kind = TPRPC_STORE_SET, .key = "k", .value = "v", .value_size = 1};
    CHECK_EQ_INT(wait_set(store, "first", "1", NULL), TPRPC_OK);
    pid_t pid = test_fork_run(hold_lock, url);
    test_sleep_us(100000);
    CHECK_EQ_INT(tprpc_store_wait(store, &r, 50, NULL, NULL, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "another process has locked the file");
    /* reading needs no lock */
    CHECK_EQ_INT(wait_get(store, "first", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_store_set(store, "k", "v", 1, on_outcome, &o), TPRPC_OK);
    CHECK_EQ_INT(tprpc_store_get(store, "k", TPRPC_NOW, on_outcome, &after), TPRPC_OK);   /* in the order asked */
    while (after.count == 0) {
        begin = test_now_us();
        tprpc_poll(ctx, 0, 0);
        if (test_now_us() - begin > longest) longest = test_now_us() - begin;
        test_sleep_us(1000);
    }
    CHECK_EQ_INT(o.status, TPRPC_OK);
    CHECK_EQ_INT(after.status, TPRPC_OK);
    CHECK_LE_INT(longest, 500000);   /* the lock was held longer than that: no poll waited for it */
    CHECK_EQ_INT(test_wait_child(pid, 10), 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- tcp: what may go wrong ------------------------------------------------------------------------------ */

TEST(nobody_serves) {
    char url[64], value[64];
    tprpc_error error = {0};
    outcome o = {0};
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, tcp_url(url, sizeof url), false, 200);
    CHECK_EQ_INT(tprpc_store_set(store, "k", "v", 1, on_outcome, &o), TPRPC_OK);
    CHECK(poll_for(ctx, &o, 1, 10));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_UNREACHABLE);
    CHECK_CONTAINS(o.text, url);
    CHECK_CONTAINS(o.text, "no server after 200 ms");
    CHECK_CONTAINS(o.text, "refused");
    CHECK_EQ_INT(wait_get(store, "k", 100, value, sizeof value, &error), TPRPC_ERROR_TIMEOUT);
    CHECK_CONTAINS(error.text, "no key 'k' after 100 ms");
    CHECK_CONTAINS(error.text, "refused");
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void serve_later(void *arg) {
    test_sleep_us(300000);
    run_server(arg);
}

TEST(workers_start_before_their_server) {
    char url[64];
    server s = {tcp_url(url, sizeof url), {0, 0}};
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    REQUIRE(pipe(s.quit) == 0);
    pid_t pid = test_fork_run(serve_later, &s);
    close(s.quit[0]);
    CHECK_EQ_INT(wait_add(store, "n", 3, NULL), 3);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    stop_server(&s, pid);
}

TEST(a_lost_server) {
    char url[64];
    server s;
    outcome o = {0};
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 200);
    CHECK_EQ_INT(wait_add(store, "n", 3, NULL), 3);
    CHECK_EQ_INT(tprpc_store_get(store, "k", TPRPC_FOREVER, on_outcome, &o), TPRPC_OK);
    for (int i = 0; i < 5; i++) tprpc_poll(ctx, 1000, 0);
    kill(pid, SIGKILL);
    CHECK(poll_for(ctx, &o, 1, 5));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_PEER);
    CHECK_CONTAINS(o.text, url);
    CHECK_CONTAINS(o.text, "lost its server");
    for (int i = 0; i < 2; i++) {      /* each waits for it to come back, as at the start */
        o.count = 0;
        CHECK_EQ_INT(tprpc_store_set(store, "k", "v", 1, on_outcome, &o), TPRPC_OK);
        CHECK(poll_for(ctx, &o, 1, 10));
        CHECK_EQ_INT(o.status, TPRPC_ERROR_UNREACHABLE);
        CHECK_CONTAINS(o.text, "no server after 200 ms");
    }
    CHECK_EQ_INT(test_wait_child(pid, 10), 128 + SIGKILL);
    close(s.quit[1]);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* Killed and started again at its address, over and over: what is asked meanwhile is done when it is back. */
TEST(a_server_that_returns) {
    char url[64], value[64];
    server s;
    tprpc_error error = {0};
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    for (int round = 0; round < 3; round++) {
        outcome got = {0}, set[2] = {{0}}, found = {0};
        CHECK_EQ_INT(wait_add(store, "n", 1, NULL), 1);          /* what it held is lost with it */
        CHECK_EQ_INT(tprpc_store_get(store, "k", TPRPC_FOREVER, on_outcome, &got), TPRPC_OK);
        for (int i = 0; i < 5; i++) tprpc_poll(ctx, 1000, 0);
        kill(pid, SIGKILL);
        CHECK_EQ_INT(test_wait_child(pid, 10), 128 + SIGKILL);
        close(s.quit[1]);
        CHECK(poll_for(ctx, &got, 1, 5));
        CHECK_EQ_INT(got.status, TPRPC_ERROR_PEER);
        CHECK_EQ_INT(tprpc_store_set(store, "a", "1", 1, on_outcome, &set[0]), TPRPC_OK);
        for (int i = 0; i < 5; i++) tprpc_poll(ctx, 1000, 0);
        CHECK_EQ_INT(tprpc_store_get(store, "b", 20000, on_outcome, &found), TPRPC_OK);
        CHECK_EQ_INT(set[0].count + found.count, 0);
        pid = start_server(&s, url);
        CHECK(poll_for(ctx, &set[0], 1, 10));
        CHECK_EQ_INT(set[0].status, TPRPC_OK);
        CHECK_EQ_INT(tprpc_store_set(store, "b", "2", 1, on_outcome, &set[1]), TPRPC_OK);
        CHECK(poll_for(ctx, &found, 1, 10));
        CHECK_EQ_INT(found.status, TPRPC_OK);
        CHECK_MEM(found.value, "2", 1);
        CHECK_EQ_INT(wait_get(store, "a", TPRPC_NOW, value, sizeof value, &error), TPRPC_OK);
        CHECK_STR(value, "1");
        CHECK_EQ_INT(set[0].count + found.count + got.count, 3);
    }
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    stop_server(&s, pid);
}

/* Sends bytes to a server and waits for it to hang up. Returns whether it did. */
static bool hangs_up_on(const char *url, const void *bytes, size_t size, tprpc_context *ctx) {
    char back[256];
    int fd = socket_connect_to(url);
    bool over = false;
    REQUIRE(send(fd, bytes, size, MSG_NOSIGNAL) == (ssize_t)size);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    for (int64_t until = test_now_us() + 3000000; !over && test_now_us() < until;) {
        tprpc_poll(ctx, 1000, 0);
        ssize_t n = read(fd, back, sizeof back);
        over = n == 0 || (n < 0 && errno != EAGAIN);
    }
    close(fd);
    return over;
}

static int logged;
static void on_log(const tprpc_log *entry, void *user) {
    (void)user;
    if (strcmp(entry->section, "store") == 0 && entry->level <= TPRPC_LOG_WARNING) logged++;
}

TEST(strangers_at_the_server) {
    static const unsigned char hello[16] = {'T', 'P', 'R', 'S', 1, 0, 0, 0};
    static const unsigned char old[16] = {'T', 'P', 'R', 'S', 9, 0, 0, 0};
    char url[64], value[64];
    unsigned char frame[64];
    unsigned seed = 1;
    tprpc_context_desc desc = {.log = on_log};
    tprpc_context *ctx = NULL;
    REQUIRE(tprpc_context_create(&desc, &ctx, NULL) == TPRPC_OK);
    tprpc_store *store = open_store(ctx, tcp_url(url, sizeof url), true, 0);
    CHECK_EQ_INT(wait_set(store, "k", "v", NULL), TPRPC_OK);
    CHECK(hangs_up_on(url, "GET / HTTP/1.1\r\nHost: x\r\n\r\n", 27, ctx));
    CHECK(hangs_up_on(url, "x", 1, ctx));
    CHECK(hangs_up_on(url, old, sizeof old, ctx));
    CHECK_EQ_INT(logged, 3);
    for (int i = 0; i < 50; i++) {   /* noise, and noise behind a good hello */
        unsigned char noise[16 + 400];
        memcpy(noise, hello, 16);
        for (size_t j = i % 2 ? 16 : 0; j < sizeof noise; j++) {
            seed = seed * 1103515245 + 12345;
            noise[j] = (unsigned char)(seed >> 16);
        }
        CHECK(hangs_up_on(url, noise, sizeof noise, ctx));
    }
    memset(frame, 0, sizeof frame);   /* a frame of a size that cannot be */
    memcpy(frame, hello, 16);
    frame[19] = 0x7f;
    CHECK(hangs_up_on(url, frame, sizeof frame, ctx));
    int fd = socket_connect_to(url);   /* who hangs up himself */
    REQUIRE(send(fd, hello, 16, 0) == 16);
    close(fd);
    CHECK_EQ_INT(wait_get(store, "k", TPRPC_NOW, value, sizeof value, NULL), TPRPC_OK);
    CHECK_STR(value, "v");
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static int64_t jumped_us;
static int64_t jumping_clock(void *user) {
    (void)user;
    return test_now_us() + __atomic_load_n(&jumped_us, __ATOMIC_RELAXED);
}

TEST(a_silent_connection_is_dropped_after_10_s) {
    char url[64], byte;
    tprpc_context_desc desc = {.clock_us = jumping_clock};
    tprpc_context *ctx = NULL;
    REQUIRE(tprpc_context_create(&desc, &ctx, NULL) == TPRPC_OK);
    open_store(ctx, tcp_url(url, sizeof url), true, 0);
    int fd = socket_connect_to(url);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    for (int i = 0; i < 20; i++) tprpc_poll(ctx, 1000, 0);
    jumped_us = 9000000;
    for (int i = 0; i < 20; i++) tprpc_poll(ctx, 1000, 0);
    CHECK(read(fd, &byte, 1) < 0 && errno == EAGAIN);
    jumped_us = 10500000;
    for (int i = 0; i < 20; i++) tprpc_poll(ctx, 1000, 0);
    CHECK(read(fd, &byte, 1) == 0);
    close(fd);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(unidentified_connections_are_limited) {
    char url[64], byte;
    int fds[4];
    tprpc_context_desc desc = {.limits = {.handshakes = 2}};
    tprpc_context *ctx = NULL;
    REQUIRE(tprpc_context_create(&desc, &ctx, NULL) == TPRPC_OK);
    tprpc_store *store = open_store(ctx, tcp_url(url, sizeof url), true, 0);
    for (int i = 0; i < 4; i++) {
        fds[i] = socket_connect_to(url);
        fcntl(fds[i], F_SETFL, O_NONBLOCK);
        for (int j = 0; j < 10; j++) tprpc_poll(ctx, 1000, 0);
    }
    for (int i = 0; i < 2; i++) CHECK_EQ_INT(read(fds[i], &byte, 1), 0);   /* the oldest made room */
    for (int i = 2; i < 4; i++) CHECK(read(fds[i], &byte, 1) < 0 && errno == EAGAIN);
    tprpc_store *client = open_store(ctx, url, false, 0);   /* for one that speaks, too; both ends on one loop */
    CHECK_EQ_INT(wait_add(client, "n", 1, NULL), 1);
    CHECK_EQ_INT(wait_add(store, "n", 1, NULL), 2);
    CHECK_EQ_INT(read(fds[2], &byte, 1), 0);
    CHECK(read(fds[3], &byte, 1) < 0 && errno == EAGAIN);
    for (int i = 0; i < 4; i++) close(fds[i]);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

typedef struct stranger { int fd; const char *says; } stranger;
static void *run_stranger(void *arg) {
    stranger *s = (stranger *)arg;
    int fd = accept(s->fd, NULL, NULL);
    char bytes[64];
    if (s->says) CHECK(send(fd, s->says, strlen(s->says), MSG_NOSIGNAL) > 0);
    while (read(fd, bytes, sizeof bytes) > 0) {}
    close(fd);
    return NULL;
}

TEST(a_server_that_is_no_store) {
    char url[64];
    stranger s = {socket_listen_at(url, sizeof url), "HTTP/1.1 400 Bad Request\r\n\r\n"};
    tprpc_error error = {0};
    pthread_t thread;
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 2000);
    REQUIRE(pthread_create(&thread, NULL, run_stranger, &s) == 0);
    CHECK_EQ_INT(wait_set(store, "k", "v", &error), TPRPC_ERROR_PROTOCOL);
    CHECK_CONTAINS(error.text, "does not speak");
    CHECK_CONTAINS(error.text, url);
    pthread_join(thread, NULL);
    tprpc_store_close(store);
    s.says = NULL;   /* one that says nothing */
    store = open_store(ctx, url, false, 300);
    outcome o = {0};
    REQUIRE(pthread_create(&thread, NULL, run_stranger, &s) == 0);
    CHECK_EQ_INT(tprpc_store_set(store, "k", "v", 1, on_outcome, &o), TPRPC_OK);
    CHECK(poll_for(ctx, &o, 1, 5));
    CHECK_EQ_INT(o.status, TPRPC_ERROR_UNREACHABLE);
    CHECK_CONTAINS(o.text, "says nothing");
    pthread_join(thread, NULL);
    close(s.fd);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* A server that answers each request by OK, with that many bytes for a value, or none. */
typedef struct liar { int fd, value; } liar;
static void *run_liar(void *arg) {
    static const unsigned char hello[16] = {'T', 'P', 'R', 'S', 1, 0, 0, 0};
    liar *l = (liar *)arg;
    unsigned char request[16 + 512] = {0}, reply[16 + 48 + 16] = {0};
    int fd = accept(l->fd, NULL, NULL), shown = l->value < 0 ? 0 : l->value;
    ssize_t have = 0, n;
    memcpy(reply, hello, sizeof hello);
    CHECK_EQ_INT(send(fd, reply, 16, MSG_NOSIGNAL), 16);
    while (have < 16 + 48 && (n = read(fd, request + have, sizeof request - (size_t)have)) > 0) have += n;
    reply[16] = (unsigned char)(44 + shown);
    reply[20] = 3;                     /* a reply */
    reply[22] = l->value < 0 ? 0 : 4;  /* a value is there */
    memcpy(reply + 32, request + 32, 8);   /* the request's id */
    reply[52] = (unsigned char)shown;
    send(fd, reply + 16, (size_t)(48 + shown), MSG_NOSIGNAL);
    while (read(fd, request, sizeof request) > 0) {}
    close(fd);
    return NULL;
}

/* Callbacks read what the contract of an operation says: a server that shows something else is none. */
TEST(a_server_that_shows_something_else) {
    static const struct { int kind, value; tprpc_status status; } replies[] = {
        {TPRPC_STORE_SET, -1, TPRPC_OK}, {TPRPC_STORE_SET, 1, TPRPC_ERROR_PROTOCOL},
        {TPRPC_STORE_GET, 0, TPRPC_OK}, {TPRPC_STORE_GET, -1, TPRPC_ERROR_PROTOCOL},
        {TPRPC_STORE_ADD, 8, TPRPC_OK}, {TPRPC_STORE_ADD, 7, TPRPC_ERROR_PROTOCOL},
        {TPRPC_STORE_ADD, 9, TPRPC_ERROR_PROTOCOL}, {TPRPC_STORE_ADD, -1, TPRPC_ERROR_PROTOCOL},
        {TPRPC_STORE_COMPARE_SET, -1, TPRPC_OK}, {TPRPC_STORE_COMPARE_SET, 5, TPRPC_OK},
        {TPRPC_STORE_DELETE, 1, TPRPC_OK}, {TPRPC_STORE_DELETE, 0, TPRPC_ERROR_PROTOCOL},
        {TPRPC_STORE_DELETE, -1, TPRPC_ERROR_PROTOCOL},
    };
    char url[64];
    liar l = {socket_listen_at(url, sizeof url), 0};
    tprpc_context *ctx = new_context(0);
    for (size_t i = 0; i < sizeof replies / sizeof replies[0]; i++) {
        tprpc_store_request r = {.size = sizeof r, .kind = replies[i].kind, .key = "k"};
        tprpc_error error = {0};
        pthread_t thread;
        l.value = replies[i].value;
        REQUIRE(pthread_create(&thread, NULL, run_liar, &l) == 0);
        tprpc_store *store = open_store(ctx, url, false, 2000);
        CHECK_EQ_INT(tprpc_store_wait(store, &r, 0, NULL, NULL, &error), replies[i].status);
        if (replies[i].status != TPRPC_OK) CHECK_CONTAINS(error.text, "lost its server");
        tprpc_store_close(store);
        for (int j = 0; j < 3; j++) tprpc_poll(ctx, 1000, 0);
        pthread_join(thread, NULL);
    }
    close(l.fd);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(beyond_loopback_it_needs_consent) {
    tprpc_context *ctx = new_context(0);
    tprpc_error error = {0};
    char url[64];
    int port = socket_free_port();
    snprintf(url, sizeof url, "tcp://0.0.0.0:%d", port);
    tprpc_store_desc desc = {.url = url, .serve = true};
    tprpc_store *store = NULL;
    CHECK_EQ_INT(tprpc_store_open(ctx, &desc, &store, &error), TPRPC_ERROR_UNSUPPORTED);
    CHECK_CONTAINS(error.text, "secret");
    CHECK_CONTAINS(error.text, "insecure");
    desc.insecure = true;
    REQUIRE(tprpc_store_open(ctx, &desc, &store, &error) == TPRPC_OK);
    desc.url = "tcp://192.0.2.1:1";
    desc.serve = desc.insecure = false;
    tprpc_store *client = NULL;
    CHECK_EQ_INT(tprpc_store_open(ctx, &desc, &client, &error), TPRPC_ERROR_UNSUPPORTED);
    snprintf(url, sizeof url, "tcp://127.0.0.1:%d", port);
    desc.url = url;
    REQUIRE(tprpc_store_open(ctx, &desc, &client, &error) == TPRPC_OK);
    CHECK_EQ_INT(wait_add(client, "n", 1, NULL), 1);
    desc.serve = true;
    tprpc_store *second = NULL;
    CHECK_EQ_INT(tprpc_store_open(ctx, &desc, &second, &error), TPRPC_ERROR_UNREACHABLE);   /* in use */
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void run_other_user(void *arg) {
    tprpc_error error = {0};
    CHECK(setresgid(4711, 4711, 4711) == 0 && setresuid(4711, 4711, 4711) == 0);
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, (const char *)arg, false, 5000);
    CHECK_EQ_INT(wait_set(store, "k", "evil", &error), TPRPC_ERROR_DENIED);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST(another_user_is_denied) {
    char url[64], value[64];
    server s;
    if (geteuid() != 0) SKIP("needs root, to become another user");
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    CHECK_EQ_INT(wait_set(store, "k", "good", NULL), TPRPC_OK);
    CHECK_EQ_INT(test_wait_child(test_fork_run(run_other_user, url), 20), 0);
    CHECK_EQ_INT(wait_get(store, "k", 0, value, sizeof value, NULL), TPRPC_OK);
    CHECK_STR(value, "good");
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    stop_server(&s, pid);
}

TEST(waiting_gets_of_one_client_are_limited) {
    static outcome waits[4097];
    char url[64];
    server s;
    int limited = 0, ok = 0;
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    for (int i = 0; i < 4096; i++) CHECK_EQ_INT(tprpc_store_get(store, "none", 300, on_outcome, &waits[i]), TPRPC_OK);
    for (int i = 0; i < 4096; i++) {
        CHECK(poll_for(ctx, &waits[i], 1, 20));
        CHECK_EQ_INT(waits[i].status, TPRPC_ERROR_TIMEOUT);
    }
    memset(waits, 0, sizeof waits);   /* the server has forgotten them */
    for (int i = 0; i < 4097; i++) CHECK_EQ_INT(tprpc_store_get(store, "all", 60000, on_outcome, &waits[i]), TPRPC_OK);
    CHECK(poll_for(ctx, &waits[4096], 1, 20));
    CHECK_EQ_INT(waits[4096].status, TPRPC_ERROR_LIMIT);
    CHECK_EQ_INT(wait_set(store, "all", "at once", NULL), TPRPC_OK);
    for (int i = 0; i < 4097; i++) {
        poll_for(ctx, &waits[i], 1, 20);
        limited += waits[i].status == TPRPC_ERROR_LIMIT;
        ok += waits[i].status == TPRPC_OK && waits[i].size == 7;
    }
    CHECK_EQ_INT(limited, 1);
    CHECK_EQ_INT(ok, 4096);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    stop_server(&s, pid);
}

TEST(large_values_to_a_client_that_asks_for_many) {
    static outcome gets[500];
    static char big[65536];
    char url[64];
    server s;
    pid_t pid = start_server(&s, tcp_url(url, sizeof url));
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, url, false, 0);
    outcome set = {0};
    CHECK_EQ_INT(tprpc_store_set(store, "big", big, sizeof big, on_outcome, &set), TPRPC_OK);
    for (int i = 0; i < 500; i++) CHECK_EQ_INT(tprpc_store_get(store, "big", 60000, on_outcome, &gets[i]), TPRPC_OK);
    for (int i = 0; i < 500; i++) {
        CHECK(poll_for(ctx, &gets[i], 1, 20));
        CHECK_EQ_INT(gets[i].size, sizeof big);
    }
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
    stop_server(&s, pid);
}

/* ---- env ------------------------------------------------------------------------------------------------- */

TEST(env_store_names_what_is_wrong) {
    tprpc_error error = {0};
    char port[16];
    unsetenv("MASTER_ADDR"); unsetenv("MASTER_PORT"); unsetenv("RANK"); unsetenv("WORLD_SIZE");
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "MASTER_ADDR is not set");
    setenv("MASTER_ADDR", "127.0.0.1", 1);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "MASTER_PORT is not set");
    setenv("MASTER_PORT", "eighty", 1);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "MASTER_PORT is \"eighty\"");
    snprintf(port, sizeof port, "%d", socket_free_port());
    setenv("MASTER_PORT", port, 1);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "WORLD_SIZE is not set");
    setenv("WORLD_SIZE", "2", 1);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "RANK is not set");
    setenv("RANK", "2", 1);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "RANK is \"2\"");
    setenv("RANK", "1", 1);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_OK);
}

/* Sets what torchrun does for a rank of two. `own`: of whether it serves a store at MASTER_PORT it says nothing (0), that
   it does not (1) or that it does (2). */
static void as_torchrun(int port, const char *rank, int own) {
    static const char *const all[][2] = {
        {"MASTER_ADDR", "127.0.0.1"}, {"WORLD_SIZE", "2"}, {"LOCAL_WORLD_SIZE", "2"}, {"GROUP_RANK", "0"},
        {"GROUP_WORLD_SIZE", "1"}, {"ROLE_NAME", "default"}, {"ROLE_WORLD_SIZE", "2"}, {"TORCHELASTIC_RUN_ID", "none"},
        {"TORCHELASTIC_RESTART_COUNT", "0"}, {"TORCHELASTIC_MAX_RESTARTS", "0"}, {"OMP_NUM_THREADS", "1"},
    };
    char text[16];
    for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) setenv(all[i][0], all[i][1], 1);
    snprintf(text, sizeof text, "%d", port);
    setenv("MASTER_PORT", text, 1);
    setenv("RANK", rank, 1);
    setenv("LOCAL_RANK", rank, 1);
    setenv("ROLE_RANK", rank, 1);
    if (own) setenv("TORCHELASTIC_USE_AGENT_STORE", own == 2 ? "True" : "False", 1);
    else unsetenv("TORCHELASTIC_USE_AGENT_STORE");
}

/* Listens at a port whose next is free, or, if `both`, taken by the second. */
static void listen_before(uint16_t *port, int fd[2], bool both) {
    for (int tries = 0; tries < 100; tries++) {
        struct sockaddr_in at;
        fd[0] = socket_listen(port);
        memset(&at, 0, sizeof at);
        at.sin_family = AF_INET;
        at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        at.sin_port = htons((uint16_t)(*port + 1));
        fd[1] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        bool next = bind(fd[1], (struct sockaddr *)(void *)&at, sizeof at) == 0 && listen(fd[1], 1) == 0;
        if (next && both) return;
        close(fd[1]);
        fd[1] = -1;
        if (next) return;
        close(fd[0]);
    }
    REQUIRE(false);
}

/* torchrun may serve a store of its own at MASTER_PORT. Then it is the port after it; where that is taken, or nothing is
   said of a store, rank 0 says what is in its way, here and as an agent. */
TEST(env_store_where_torchrun_serves) {
    tprpc_error error;
    for (int own = 0; own < 4; own++) {            /* 3: as 2, and the next port is taken as well */
        tprpc_agent_desc desc = {.name = "ann", .init_method = "env://", .start_timeout_ms = 1};
        uint16_t port;
        int fd[2];
        listen_before(&port, fd, own == 3);
        as_torchrun(port, "0", own == 3 ? 2 : own);
        for (int i = 0; i < 2; i++) {
            tprpc_agent *agent = NULL;
            memset(&error, 0, sizeof error);
            if (i) REQUIRE(tprpc_agent_create(&desc, &agent, NULL) == TPRPC_OK);
            tprpc_status status = i ? tprpc_agent_start(agent, NULL, NULL, &error) : try_open("env://", &error);
            CHECK_EQ_INT(status, own == 2 ? TPRPC_OK : TPRPC_ERROR_UNREACHABLE);
            CHECK_EQ_INT(error.os_code, own == 2 ? 0 : EADDRINUSE);
            CHECK_EQ_INT(strstr(error.text, "the port after MASTER_PORT") != NULL, own == 3);
            CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
        }
        if (error.text[0]) fprintf(stderr, "%s\n", error.text);
        close(fd[0]);
        if (fd[1] >= 0) close(fd[1]);
    }
    as_torchrun(65535, "0", 2);
    CHECK_EQ_INT(try_open("env://", &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "65535");
}

static void run_rank(void *arg) {
    setenv("RANK", (const char *)arg, 1);
    setenv("LOCAL_RANK", (const char *)arg, 1);
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, "env://", false, 0);
    char value[64];
    CHECK_EQ_INT(wait_set(store, (const char *)arg, "here", NULL), TPRPC_OK);
    CHECK_EQ_INT(wait_get(store, "0", 10000, value, sizeof value, NULL), TPRPC_OK);
    CHECK_EQ_INT(wait_get(store, "1", 10000, value, sizeof value, NULL), TPRPC_OK);
    wait_add(store, "done", 1, NULL);
    while (strcmp((const char *)arg, "0") == 0 && wait_add(store, "done", 0, NULL) < 2) {}
    for (int i = 0; i < 20; i++) tprpc_poll(ctx, 1000, 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

static void between_two_ranks(void) {
    char zero[] = "0", one[] = "1";
    pid_t second = test_fork_run(run_rank, one), first = test_fork_run(run_rank, zero);
    CHECK_EQ_INT(test_wait_child(first, 20), 0);
    CHECK_EQ_INT(test_wait_child(second, 20), 0);
}

TEST(env_store_between_two_ranks) {
    char port[16];
    snprintf(port, sizeof port, "%d", socket_free_port());
    setenv("MASTER_ADDR", "localhost", 1);
    setenv("MASTER_PORT", port, 1);
    setenv("WORLD_SIZE", "2", 1);
    between_two_ranks();
}

TEST(env_store_between_two_ranks_of_torchrun) {
    uint16_t port;
    int fd[2];
    listen_before(&port, fd, false);
    as_torchrun(port, "0", 2);
    between_two_ranks();
    close(fd[0]);
}

/* ---- pmix: what stands in its way; tests/pmix.sh shows it at work ------------------------------------------ */

static const char *pmix_call;
static int fail_pmix(const char *call, int64_t *size) {
    (void)size;
    return pmix_call && strcmp(call, pmix_call) == 0 ? ENOENT : 0;
}

TEST(pmix_store_names_what_is_missing) {
    static const struct { const char *call, *why; } cases[] = {
        {NULL, "PMIX_NAMESPACE is not set"}, {"dlopen", "libpmix.so.2 cannot be loaded: No such file"},
        {"dlsym", "libpmix.so.2 lacks a function"}, {"pmix_init", "PMIx_Init: "},
    };
    tprpc_error error;
    char name[400] = "pmix://";
    tprpc_context *ctx = new_context(0);   /* not under the hook */
    tprpc_store_desc desc = {.url = "pmix://", .timeout_ms = 200};
    tprpc_store *store = NULL;
    unsetenv("PMIX_NAMESPACE");
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        memset(&error, 0, sizeof error);
        pmix_call = cases[i].call;
        tprpc_test_hook = fail_pmix;
        CHECK_EQ_INT(tprpc_store_open(ctx, &desc, &store, &error), TPRPC_ERROR_UNSUPPORTED);
        tprpc_test_hook = NULL;
        CHECK(store == NULL);
        if (strstr(error.text, "built without TPRPC_WITH_PMIX")) SKIP("pmix.h was missing when this was built");
        CHECK_CONTAINS(error.text, "pmix://");
        CHECK_CONTAINS(error.text, cases[i].why);
        setenv("PMIX_NAMESPACE", "nobody", 1);
    }
    memset(name + 7, 'n', sizeof name - 8);
    desc.url = name;
    CHECK_EQ_INT(tprpc_store_open(ctx, &desc, &store, &error), TPRPC_ERROR_INVALID);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- the n-th allocation or system call fails ------------------------------------------------------------ */

static int fail_at, calls_seen;
static int fail_nth(const char *call, int64_t *size) {
    (void)size;
    if (strstr(call, "epoll") || strstr(call, "futex")) return 0;   /* the loop's own are another test's */
    int seen = __atomic_add_fetch(&calls_seen, 1, __ATOMIC_RELAXED);
    return seen == fail_at ? strcmp(call, "alloc") == 0 ? ENOMEM : EIO : 0;
}

/* Returns whether there was an n-th call. Whatever fails, all operations end and nothing leaks. */
static bool survives(tprpc_context *ctx, const char *url, bool serve, const char *client_url, int n) {
    tprpc_store_desc desc = {.url = url, .serve = serve, .timeout_ms = 200};
    tprpc_store *store = NULL, *client = NULL;
    outcome o = {0};
    int begun = 0;
    fail_at = n;
    calls_seen = 0;
    tprpc_test_hook = fail_nth;
    tprpc_store_open(ctx, &desc, &store, NULL);
    if (client_url && store) {
        desc.url = client_url;
        desc.serve = false;
        tprpc_store_open(ctx, &desc, &client, NULL);
    }
    tprpc_store *used = client_url ? client : store;
    if (used) {
        begun += tprpc_store_get(used, "a", 100, on_outcome, &o) == TPRPC_OK;
        begun += tprpc_store_set(used, "a", "b", 1, on_outcome, &o) == TPRPC_OK;
        begun += tprpc_store_add(used, "n", 4, on_outcome, &o) == TPRPC_OK;
        begun += tprpc_store_delete(used, "a", on_outcome, &o) == TPRPC_OK;
        begun += tprpc_store_get(used, "a", 20, on_outcome, &o) == TPRPC_OK;
        CHECK(poll_for(ctx, &o, begun, 5));
    }
    tprpc_store_close(client);
    tprpc_store_close(store);
    for (int i = 0; i < 3; i++) tprpc_poll(ctx, 0, 0);
    tprpc_test_hook = NULL;
    return calls_seen >= n;
}

static void sweep(const char *url, bool serve, const char *client_url, int most) {
    tprpc_context *ctx = new_context(0);
    int n = 1;
    while (n < most && survives(ctx, url, serve, client_url, n)) {
        if (strncmp(url, "file", 4) == 0) unlink(url + 7);
        n++;
    }
    CHECK(n > 5);
    printf("%s: %d calls failed\n", url, n - 1);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

TEST_LIMIT(every_call_may_fail_local, 60) { sweep("local://", false, NULL, 10000); }

TEST_LIMIT(every_call_may_fail_file, 60) {
    char url[300];
    sweep(file_url(url, sizeof url), false, NULL, 10000);
}

TEST_LIMIT(every_call_may_fail_tcp, 120) {
    char url[64];
    tcp_url(url, sizeof url);
    sweep(url, true, url, 150);   /* how many there are depends on how long it looks for bytes */
}

/* ---- after a fork ---------------------------------------------------------------------------------------- */

static void use_inherited(void *arg) {
    CHECK_EQ_INT(tprpc_store_set((tprpc_store *)arg, "k", "v", 1, NULL, NULL), TPRPC_ERROR_INVALID);
    tprpc_store_close((tprpc_store *)arg);
}

TEST(a_forked_child_is_refused) {
    tprpc_context *ctx = new_context(0);
    tprpc_store *store = open_store(ctx, "local://", false, 0);
    pid_t pid = fork();   /* not test_fork_run: the child leaks what it inherited */
    if (pid == 0) {
        use_inherited(store);
        _exit(harness_failures);
    }
    CHECK_EQ_INT(test_wait_child(pid, 10), 0);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}
