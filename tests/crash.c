/* Crashes for real: two processes in a busy exchange of calls and messages, of which one is killed at moments that come
   from a seed. A moment is a count of events, not a time: the n-th system call or allocation of the one that dies, within
   it; the n-th of its callbacks, likewise; or the n-th callback of the survivor, who kills it then. The survivor's
   operations end within a second, nothing of the dead is left, and it connects to the next one.

       CRASH_MOMENTS=2000 CRASH_SEED=7 build/tests/crash moments

   There are three processes: the test itself, which starts and buries the bobs; ann, the survivor of all; and bob. */
#include "busy.h"
extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { WITHIN_US = 1000000 };          /* a death is known by then */
enum { LARGEST = 300000, PIPE_OPS = 3, PIPE_LARGEST = 100000, PROOF = 6 };
enum { BY_CALL, BY_EVENT, BY_SURVIVOR, BY_KINDS };
enum { JOINING_CALLS = 400, BUSY_CALLS = 600, BUSY_EVENTS = 400, MOST_EVENTS = 1500 };

typedef struct plan { int by, n; bool joining, forks; int threads; int64_t spin_us; uint64_t seed; } plan;

/* What ann, bob and the test see of each other. */
typedef struct stage {
    int round;                         /* that ann wants a bob for */
    int ready, go, buried, over;       /* the round that bob has joined in, may die in, is dead in; that ann has done */
    int gone;                          /* ann may end */
    pid_t bob, child;                  /* child: bob's, which outlives it */
    int   forking;                     /* it may soon be there */
    int64_t died_us;
    char url[300], address[128];       /* the store; ann's listener for pipes beside */
    int kinds[BY_KINDS], joining, forked, proofs;
    int64_t worst_us;
} stage;
static stage *on;

/* by_tcp: the store is at ann's, over tcp, which does not see through a child that holds a dead bob's connection. */
typedef struct setting { const char *name, *transports, *address; int threads, by_tcp, moments; } setting;
static const setting *set;

/* Pipes come in by tcp and move to shm. Their end is known at once, so ann calls bob again while he is being buried, and
   where a child of his holds his tcp listener open her connection is made, and nobody ever answers. */
static bool moves(void) { return strcmp(set->transports, "shm,tcp") == 0; }
static bool may_fork(void) { return !set->by_tcp; }

static long number_of(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 0) : otherwise;
}

static plan plan_of(int round) {
    plan p;
    memset(&p, 0, sizeof p);
    p.seed = (uint64_t)number_of("CRASH_SEED", 1) << 20 ^ (uint64_t)round;
    uint64_t random = p.seed;
    p.by = (int)busy_below(&random, BY_KINDS);
    p.joining = busy_below(&random, 6) == 0 && p.by == BY_CALL;
    p.n = 1 + (int)busy_below(&random, p.joining ? JOINING_CALLS : p.by == BY_CALL ? BUSY_CALLS : BUSY_EVENTS);
    p.threads = busy_below(&random, 4) == 0;
    p.spin_us = busy_below(&random, 4) == 0 ? 20 : TPRPC_NOW;
    p.forks = !p.joining && busy_below(&random, 8) == 0 && may_fork();
    return p;
}

/* ---- messages beside the calls: a pipe that both ends write to and read from all the time ---- */

typedef struct line {
    struct line *next;
    busy *of;
    tprpc_pipe *pipe;
    int writing, reading, lent, failed;
    bool looked_at;
    uint32_t sent, received;
    uint8_t *in;
    struct line_write { struct line *of; int busy, parts; uint8_t *memory; } writes[PIPE_OPS];
} line;

typedef struct line_head { uint32_t number, size; } line_head;

static void line_lost(line *l, tprpc_status status, const tprpc_error *error) {
    if (!CHECK(busy_forgives(l->of, status))) fprintf(stderr, "the pipe: %s\n", error->text);
    STORE(&l->failed, 1);
}

static void line_written(tprpc_status status, const tprpc_error *error, void *user) {
    struct line_write *w = (struct line_write *)user;
    line *l = w->of;
    if (status != TPRPC_OK) line_lost(l, status, error);
    busy_event(l->of);
    ADD(&l->writing, -1);
    if (ADD(&w->parts, -1) == 0) STORE(&w->busy, 0);
}

static void line_released(void *user) {
    struct line_write *w = (struct line_write *)user;
    memset(w->memory, 0xDD, 64);
    busy_event(w->of->of);
    ADD(&w->of->lent, -1);
    if (ADD(&w->parts, -1) == 0) STORE(&w->busy, 0);
}

static void line_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    line *l = (line *)user;
    if (status != TPRPC_OK) line_lost(l, status, error);
    else if (CHECK(message->tensor_count == 1))
        CHECK(busy_filled(message->tensors[0].data, message->tensors[0].size, l->received));
    busy_event(l->of);
    ADD(&l->reading, -1);
}

static void line_described(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    line *l = (line *)user;
    line_head head = {0, 0};
    tprpc_tensor tensor;
    tprpc_message into = {0};
    if (status != TPRPC_OK) {
        line_lost(l, status, error);
        ADD(&l->reading, -1);
        return;
    }
    if (CHECK_EQ_INT(message->metadata_size, sizeof head)) memcpy(&head, message->metadata, sizeof head);
    CHECK_EQ_INT(head.number, ++l->received);        /* in the order written */
    CHECK_EQ_INT(message->tensor_count, 1);
    CHECK_EQ_INT(message->tensors[0].size, head.size);
    tensor = message->tensors[0];
    tensor.data = l->in;
    into.tensors = &tensor;
    into.tensor_count = 1;
    busy_event(l->of);
    status = tprpc_pipe_read(l->pipe, &into, line_read, l);
    if (status == TPRPC_OK) return;
    CHECK(busy_forgives(l->of, status));
    STORE(&l->failed, 1);
    ADD(&l->reading, -1);
}

static line *line_new(busy *of, tprpc_pipe *pipe) {
    line *l = (line *)calloc(1, sizeof *l);
    REQUIRE(l != NULL && (l->in = (uint8_t *)malloc(PIPE_LARGEST)) != NULL);
    l->of = of;
    l->pipe = pipe;
    for (int i = 0; i < PIPE_OPS; i++) {
        l->writes[i].of = l;
        REQUIRE((l->writes[i].memory = (uint8_t *)malloc(PIPE_LARGEST)) != NULL);
    }
    return l;
}

/* Keeps its operations under way. */
static void line_turn(line *l) {
    for (int i = 0; i < PIPE_OPS && !LOAD(&l->failed); i++) {
        struct line_write *w = &l->writes[i];
        line_head head;
        tprpc_tensor tensor;
        tprpc_message message = {0};
        if (LOAD(&w->busy)) continue;
        head.number = ++l->sent;
        head.size = 64 + busy_below(&l->of->random, PIPE_LARGEST - 64);
        busy_fill(w->memory, head.size, head.number);
        tensor = bytes_of(w->memory, head.size);
        message.metadata = &head;
        message.metadata_size = sizeof head;
        message.tensors = &tensor;
        message.tensor_count = 1;
        message.release = line_released;
        message.release_user = w;
        w->parts = 2;
        STORE(&w->busy, 1);
        ADD(&l->lent, 1);
        ADD(&l->writing, 1);
        tprpc_status status = tprpc_pipe_write(l->pipe, &message, line_written, w);
        if (status == TPRPC_OK) continue;
        CHECK(busy_forgives(l->of, status));
        CHECK_EQ_INT(LOAD(&w->parts), 1);            /* its release has run */
        ADD(&l->writing, -1);
        STORE(&w->busy, 0);
        STORE(&l->failed, 1);
    }
    if (LOAD(&l->failed) || LOAD(&l->reading)) return;
    STORE(&l->reading, 1);
    tprpc_status status = tprpc_pipe_read_descriptor(l->pipe, line_described, l);
    if (status == TPRPC_OK) return;
    CHECK(busy_forgives(l->of, status));
    STORE(&l->reading, 0);
    STORE(&l->failed, 1);
}

static bool line_idle(line *l) { return !LOAD(&l->writing) && !LOAD(&l->reading) && !LOAD(&l->lent); }

static void line_free(line *l) {
    tprpc_pipe_close(l->pipe);
    for (int i = 0; i < PIPE_OPS; i++) free(l->writes[i].memory);
    free(l->in);
    free(l);
}

/* ---- bob, who dies ---- */

static plan bobs;
static int bobs_left, bobs_events;

__attribute__((noreturn)) static void die(void) {
    STORE(&on->died_us, test_now_us());
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static int bob_hook(const char *call, int64_t *size) {
    (void)call;
    (void)size;
    if (bobs.joining || LOAD(&on->go) == LOAD(&on->round))
        if (ADD(&bobs_left, -1) == 0) die();
    return 0;
}

static void bob_event(busy *b) {
    (void)b;
    if (LOAD(&on->go) != LOAD(&on->round)) return;
    if (bobs.by == BY_EVENT && ADD(&bobs_left, -1) == 0) die();
    if (ADD(&bobs_events, 1) == MOST_EVENTS) die();      /* at the latest */
}

/* The name of the one before, who could not take it out. */
static void bob_bury_name(busy *b) {
    tprpc_store_desc desc = {0};
    tprpc_store *store = NULL;
    desc.url = b->url;
    REQUIRE_EQ_INT(tprpc_store_open(b->ctx, &desc, &store, NULL), TPRPC_OK);
    bury_name(store, "bob");
    tprpc_store_close(store);
}

static void bob_join(busy *b) {
    for (int i = 0;; i++) {
        tprpc_error error = {0};
        bob_bury_name(b);
        tprpc_status status = tprpc_agent_wait_ready(b->agent, WAIT_MS, &error);
        if (status == TPRPC_OK) return;
        fprintf(stderr, "bob: %s\n", error.text);
        REQUIRE(i < 10 && status == TPRPC_ERROR_INVALID);    /* the server had a request of the dead to read yet */
        CHECK_EQ_INT(tprpc_agent_destroy(b->agent), TPRPC_OK);
        busy_new_agent(b);
    }
}

/* Another of bob's threads may die for all of them right behind the fork: so the child says itself that it is there. */
static void bob_forks(void) {
    STORE(&on->forking, 1);
    const pid_t pid = fork();
    if (pid == 0) {
        STORE(&on->child, getpid());
        for (;;) pause();
    }
    REQUIRE(pid > 0);
}

static void bob_main(void *arg) {
    static busy b;
    tprpc_pipe_desc desc = {0};
    tprpc_pipe *pipe = NULL;
    const int round = *(int *)arg;
    bobs = plan_of(round);
    bobs_left = bobs.n;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    b.name = "bob";
    b.url = on->url;
    b.transports = set->transports;
    b.index = 1;
    b.threads = bobs.threads;
    b.spin_us = bobs.spin_us;
    b.largest = LARGEST;
    b.random = ~bobs.seed;
    b.life = (uint32_t)round;
    b.event = bob_event;
    if (bobs.by == BY_CALL) tprpc_test_hook = bob_hook;
    busy_open(&b);
    bob_join(&b);
    desc.address = on->address;
    REQUIRE_EQ_INT(tprpc_connect(b.ctx, &desc, &pipe, NULL), TPRPC_OK);
    line *l = line_new(&b, pipe);
    STORE(&on->bob, getpid());
    STORE(&on->ready, round);
    for (int forks = bobs.forks;;) {
        while (busy_active(&b) < BUSY_OPS / 2 && busy_call(&b, "ann", 0)) {}
        busy_answer_late(&b);
        line_turn(l);
        busy_work(&b);
        if (forks && LOAD(&on->go) == round) bob_forks(), forks = 0;
        /* what has no calls of the system left to die in dies all the same */
        if (bobs.joining && ADD(&bobs_left, -1) == 0) die();
    }
}

/* ---- ann, who lives on ---- */

static busy anns;
static line *lines;
static int accepting, anns_left, over_shm;     /* over_shm: lines that moved */
static pthread_mutex_t line_lock = PTHREAD_MUTEX_INITIALIZER;

static void ann_event(busy *b) {
    (void)b;
    if (LOAD(&anns_left) <= 0 || ADD(&anns_left, -1) != 0) return;
    STORE(&on->died_us, test_now_us());
    kill(LOAD(&on->bob), SIGKILL);
}

static void ann_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    (void)user;
    STORE(&accepting, 0);
    if (!CHECK(status == TPRPC_OK || status == TPRPC_ERROR_PEER || status == TPRPC_ERROR_CLOSED))
        fprintf(stderr, "accepting: %s\n", error->text);
    if (!pipe) return;
    line *l = line_new(&anns, pipe);
    pthread_mutex_lock(&line_lock);
    l->next = lines;
    lines = l;
    pthread_mutex_unlock(&line_lock);
}

/* What carries it, now that something has come. */
static void line_look(line *l) {
    tprpc_pipe_info info;
    CHECK_EQ_INT(tprpc_pipe_get_info(l->pipe, &info, sizeof info), TPRPC_OK);
    over_shm += strcmp(info.transport, "shm") == 0;
    l->looked_at = true;
}

/* Keeps ann's side of the pipes going; those that failed and have ended go. */
static int ann_lines(tprpc_listener *listener, bool closing) {
    line *done = NULL;
    int left = 0;
    if (!LOAD(&accepting) && !closing) {
        STORE(&accepting, 1);
        CHECK_EQ_INT(tprpc_accept(listener, ann_accepted, NULL), TPRPC_OK);
    }
    pthread_mutex_lock(&line_lock);
    line *all = lines;
    lines = NULL;
    pthread_mutex_unlock(&line_lock);
    while (all) {
        line *l = all, **to = LOAD(&l->failed) && line_idle(l) ? &done : &lines;
        all = l->next;
        if (to == &lines) line_turn(l), left++;
        if (moves() && !l->looked_at && LOAD(&l->received) && !LOAD(&l->failed)) line_look(l);
        pthread_mutex_lock(&line_lock);
        l->next = *to;
        *to = l;
        pthread_mutex_unlock(&line_lock);
    }
    while (done) {
        line *l = done;
        done = l->next;
        line_free(l);
    }
    return left;
}

static int64_t ann_pipes(void) {
    tprpc_stats stats;
    memset(&stats, 0, sizeof stats);
    CHECK_EQ_INT(tprpc_agent_get_stats(anns.agent, &stats, sizeof stats), TPRPC_OK);
    return (int64_t)stats.pipes;
}

typedef struct holding { int fds, maps, shm; int64_t blocks, bytes; } holding;

static holding ann_holds(void) {
    holding h;
    h.fds = test_count_fds();
    h.maps = test_count_lines("/proc/self/maps", "");
    h.shm = test_count_shared();
    h.blocks = LOAD(&anns.heap->blocks);
    h.bytes = LOAD(&anns.heap->bytes);
    return h;
}

static void lower(holding *least, const holding *h) {
    if (least->maps == 0 || h->maps < least->maps) least->maps = h->maps;
    if (least->blocks == 0 || h->blocks < least->blocks) least->blocks = h->blocks;
    if (least->bytes == 0 || h->bytes < least->bytes) least->bytes = h->bytes;
}

/* Calls to the new bob end well, so ann is connected to him. */
static bool ann_proves(int round, tprpc_listener *listener) {
    const int64_t good = anns.good + PROOF, end = test_now_us() + (int64_t)WAIT_MS * 1000;
    while (LOAD(&on->ready) != round && LOAD(&on->buried) != round && test_now_us() < end) {
        busy_work(&anns);
        ann_lines(listener, false);
        busy_answer_late(&anns);
    }
    while (LOAD(&on->ready) == round && LOAD(&on->buried) != round && LOAD(&anns.good) < good && test_now_us() < end) {
        while (busy_active(&anns) < BUSY_OPS / 2 && busy_call(&anns, "bob", 1)) {}
        busy_work(&anns);
        ann_lines(listener, false);
        busy_answer_late(&anns);
    }
    return LOAD(&anns.good) >= good;
}

static void ann_round(int round, tprpc_listener *listener, const holding *before) {
    const plan p = plan_of(round);
    STORE(&anns.forgiving, p.joining);   /* who is not to die yet fails nothing */
    STORE(&on->round, round);
    bool proved = ann_proves(round, listener);
    if (!p.joining) REQUIRE(proved);
    on->proofs += proved;
    STORE(&anns.forgiving, 1);
    if (p.by == BY_SURVIVOR) STORE(&anns_left, p.n);
    STORE(&on->go, round);
    while (LOAD(&on->buried) != round) {
        while (LOAD(&on->ready) == round && busy_call(&anns, "bob", 1)) {}
        ann_lines(listener, false);
        busy_answer_late(&anns);
        busy_work(&anns);
    }
    const int64_t died_us = LOAD(&on->died_us), end = died_us + (int64_t)WITHIN_US * TEST_SLOWDOWN;
    bool over = false;
    while (!over && test_now_us() < end) {
        busy_work(&anns);
        while (busy_answer_late(&anns)) {}
        int open = ann_lines(listener, false);
        over = !busy_active(&anns) && !busy_places_taken(&anns) && !open && ann_pipes() == 0;
    }
    const int64_t took_us = test_now_us() - died_us;
    if (took_us > on->worst_us) on->worst_us = took_us;
    if (!CHECK(over)) fprintf(stderr, "%d calls, %d places, %d lines, %d pipes are left\n", busy_active(&anns),
                              busy_places_taken(&anns), ann_lines(listener, false), (int)ann_pipes());
    holding now = ann_holds();
    while ((now.fds > before->fds || now.shm > before->shm) && test_now_us() < end) {
        busy_work(&anns);
        now = ann_holds();
    }
    CHECK_EQ_INT(now.fds, before->fds);
    CHECK_EQ_INT(now.shm, before->shm);
    on->kinds[p.by]++;
    on->joining += p.joining;
    if (harness_failures)
        fprintf(stderr, "in round %d: CRASH_SEED=%ld, by %d at %d, joining %d, threads %d, forks %d\n", round,
                number_of("CRASH_SEED", 1), p.by, p.n, p.joining, p.threads, p.forks);
    REQUIRE_EQ_INT(harness_failures, 0);
    STORE(&on->over, round);
}

static void ann_main(void *arg) {
    const char *address = set->address;
    const int moments = *(int *)arg;
    tprpc_listener_desc desc = {0};
    tprpc_listener *listener = NULL;
    holding before, early = {0, 0, 0, 0, 0}, late = {0, 0, 0, 0, 0};      /* the least in the second and last quarter */
    anns.name = "ann";
    anns.url = on->url;
    anns.transports = set->transports;
    anns.threads = set->threads;
    anns.spin_us = TPRPC_NOW;
    anns.largest = LARGEST;
    anns.random = 5;
    anns.event = ann_event;
    anns.serves_store = strncmp(on->url, "tcp", 3) == 0;
    busy_open(&anns);
    desc.addresses = &address;
    desc.address_count = 1;
    REQUIRE_EQ_INT(tprpc_listen(anns.ctx, &desc, &listener, NULL), TPRPC_OK);
    snprintf(on->address, sizeof on->address, "%s", tprpc_listener_address(listener, NULL));
    REQUIRE_EQ_INT(tprpc_agent_wait_ready(anns.agent, WAIT_MS, NULL), TPRPC_OK);
    before = ann_holds();
    for (int round = 1; round <= moments; round++) {
        ann_round(round, listener, &before);
        const holding now = ann_holds();
        if (round > moments / 4 && round <= moments / 2) lower(&early, &now);
        if (round > moments - moments / 4) lower(&late, &now);
        if (getenv("TEST_LOG"))
            fprintf(stderr, "round %d: fds %d maps %d shm %d blocks %lld bytes %lld\n", round, now.fds, now.maps,
                    now.shm, (long long)now.blocks, (long long)now.bytes);
    }
    fprintf(stderr, "maps %d then %d, blocks %lld then %lld, bytes %lld then %lld\n", early.maps, late.maps,
            (long long)early.blocks, (long long)late.blocks, (long long)early.bytes, (long long)late.bytes);
    if (moves()) fprintf(stderr, "%d lines moved to shm\n", over_shm);
    if (moves() && moments >= 16) CHECK(over_shm > moments / 2);
    /* What is kept to be used again grows less and less: in many runs by 16 blocks and 470 KB at most from one of
       those quarters to the other. A block lost in each round adds half as many as there are rounds. */
    if (moments >= 16) {
        if (!TEST_ASAN && !TEST_TSAN) CHECK_LE_INT(late.maps, early.maps + 5);
        CHECK_LE_INT(late.blocks, early.blocks + 25);
        CHECK_LE_INT(late.bytes, early.bytes + 3 * LARGEST);
    }
    tprpc_listener_close(listener);
    busy_close(&anns);
    while (!LOAD(&on->gone)) test_sleep_us(100);
}

/* ---- the test: starts and buries ---- */

static void moments_run(void *arg) {
    static int round, moments;
    char path[250];
    set = (const setting *)arg;
    moments = (int)number_of("CRASH_MOMENTS", set->moments / TEST_SLOWDOWN);
    void *memory = mmap(NULL, sizeof *on, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    REQUIRE(memory != MAP_FAILED);
    on = (stage *)memory;
    if (set->by_tcp)
        snprintf(on->url, sizeof on->url, "tcp://127.0.0.1:%d", socket_free_port());
    else snprintf(on->url, sizeof on->url, "file://%s", test_temp_path(path, sizeof path));
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    const int64_t began_us = test_now_us();
    pid_t ann = test_fork_run(ann_main, &moments);
    for (round = 1; round <= moments; round++) {
        int status = 0;
        while (LOAD(&on->round) != round) {
            test_sleep_us(50);
            REQUIRE(waitpid(ann, &status, WNOHANG) == 0);    /* ann lives */
        }
        STORE(&on->child, 0);
        STORE(&on->forking, 0);
        pid_t bob = test_fork_run(bob_main, &round);
        REQUIRE(waitpid(bob, &status, 0) == bob);
        if (!CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL))
            fprintf(stderr, "bob of round %d ended by himself: %d\n", round, status);
        STORE(&on->buried, round);
        while (LOAD(&on->over) != round) {
            test_sleep_us(50);
            REQUIRE(waitpid(ann, &status, WNOHANG) == 0);    /* ann lives */
        }
        for (int i = 0; LOAD(&on->forking) && !LOAD(&on->child) && i < 1000; i++) test_sleep_us(100);
        if (LOAD(&on->child)) {
            on->forked++;
            kill(on->child, SIGKILL);
            REQUIRE(waitpid(on->child, NULL, 0) == on->child);
        }
    }
    STORE(&on->gone, 1);
    CHECK_EQ_INT(test_wait_child(ann, 30), 0);
    CHECK(on->forked > 0 || !may_fork() || moments < 100);
    printf("%s: %d moments in %.1f s: %d in its calls (%d of them while joining), %d in its callbacks, %d by the "
           "survivor's; %d with a child that lives on; %d times connected anew; the worst took %.1f ms\n", set->name,
           moments, (double)(test_now_us() - began_us) / 1e6, on->kinds[BY_CALL], on->joining, on->kinds[BY_EVENT],
           on->kinds[BY_SURVIVOR], on->forked, on->proofs, (double)on->worst_us / 1e3);
}

static const setting settings[] = {
    {"moments_tcp", "tcp", "tcp://127.0.0.1:0", 0, 0, 200},
    {"moments_tcp_and_store", "tcp", "tcp://127.0.0.1:0", 0, 1, 100},
    {"moments_shm", "shm", "shm://", 0, 0, 200},
    {"moments_moved", "shm,tcp", "tcp://127.0.0.1:0", 0, 0, 100},
    {"moments_tcp_threads", "tcp", "tcp://127.0.0.1:0", 1, 0, 40},
    {"moments_shm_threads", "shm", "shm://", 1, 0, 40},
};

TESTS(moments) {
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++)
        test_add(settings[i].name, moments_run, (void *)(uintptr_t)&settings[i], 120);
}
