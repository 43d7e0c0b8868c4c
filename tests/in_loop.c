/* A loop by itself: threads that wait for its lock get it, however busy it is, and the processor where many wait; the
   ends of other processes that are watched through it are told, once, whether it spins, sleeps or hangs in a foreign
   loop. */
#include "harness.h"
#include <poll.h>
#include <pthread.h>
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"

#define LOAD(at) __atomic_load_n(at, __ATOMIC_ACQUIRE)
#define STORE(at, value) __atomic_store_n(at, value, __ATOMIC_RELEASE)
#define ADD(at, value) __atomic_add_fetch(at, value, __ATOMIC_ACQ_REL)

static tpr_loop *loop_new(int64_t spin_us) {
    static tpr_loop_env env;
    tprpc_error error;
    tpr_loop *loop = (tpr_loop *)calloc(1, sizeof *loop);
    REQUIRE(loop != NULL);
    memset(&env, 0, sizeof env);
    env.spin_us = spin_us;
    env.memory.hooks.alloc = tpr_base_default_alloc;
    env.memory.hooks.free = tpr_base_default_free;
    env.memory.limit = UINT64_C(1) << 32;
    REQUIRE_EQ_INT(tpr_loop_init(loop, &env, NULL, 0, &error), TPRPC_OK);
    return loop;
}

static void loop_free(tpr_loop *loop) {
    tpr_loop_fini(loop);
    CHECK_EQ_INT(loop->env->memory.used, 0);
    free(loop);
}

/* ---- the lock of a loop that always has work ---- */

enum { ENTRIES = 200, DUE_US = 20000, GIVE_UP_US = 10000000 };
static int entered, fired;
static uint32_t turns, idle_every;       /* every so manieth turn finds nothing; 0: none */

static bool has_work(void *instance) {   /* at the price of a system call or two, as of who looks at sockets in vain */
    const int64_t start = test_now_us();
    (void)instance;
    turns++;
    while (test_now_us() - start < 4) {}
    return !idle_every || turns % idle_every != 0;
}

static void *enters(void *arg) {
    tpr_loop *loop = (tpr_loop *)arg;
    for (int i = 0; i < ENTRIES; i++) {
        tpr_loop_enter(loop);
        ADD(&entered, 1);
        tpr_loop_leave(loop);
        test_sleep_us(50);               /* so that it comes anew, and sleeps before it has the lock */
    }
    return NULL;
}

static void on_due(tprpc_work *work) {
    (void)work;
    fired = 1;
}

static bool all_entered(void *arg) {
    (void)arg;
    return LOAD(&entered) == ENTRIES && fired;
}

static void enter_while(bool waits, uint32_t idle) {
    tpr_loop *loop = loop_new(waits ? GIVE_UP_US : 0);   /* a wait would sleep: nobody tells it that all have entered */
    tpr_loop_source source;
    tprpc_error error;
    tprpc_work due;
    pthread_t thread;
    memset(&source, 0, sizeof source);
    memset(&due, 0, sizeof due);
    source.progress = has_work;
    idle_every = idle;
    due.run = on_due;
    REQUIRE_EQ_INT(tpr_loop_add_source(loop, source, -1, &error), TPRPC_OK);
    tpr_loop_enter(loop);
    tpr_loop_timer(loop, &due, tpr_loop_clock(loop) + DUE_US);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, enters, loop), 0);
    const int64_t end = test_now_us() + GIVE_UP_US;
    if (waits) tpr_loop_wait(loop, all_entered, NULL, tpr_loop_clock(loop) + GIVE_UP_US);
    else while (!all_entered(NULL) && test_now_us() < end) tpr_loop_poll(loop, INT64_MAX, INT64_MAX);
    CHECK_EQ_INT(LOAD(&entered), ENTRIES);
    CHECK(fired);
    tpr_loop_leave(loop);
    pthread_join(thread, NULL);
    loop_free(loop);
}
TEST(others_enter_a_poll_that_is_busy) { enter_while(false, 0); }
TEST(others_enter_polls_that_find_work_at_once) { enter_while(false, 2); }
TEST(others_enter_a_wait_that_is_busy) { enter_while(true, 0); }
TEST(others_enter_a_wait_that_finds_work_now_and_then) { enter_while(true, 2); }

/* ---- a crowd: who finds no work lets others run ---- */

static int yields, over;

static int count_yields(const char *call, int64_t *size) {
    (void)size;
    if (strcmp(call, "sched_yield") == 0) ADD(&yields, 1);
    return 0;
}

static bool is_over(void *arg) {
    (void)arg;
    return LOAD(&over) != 0;
}

static bool no_work(void *instance) {
    (void)instance;
    return false;
}

static void *enters_and_ends(void *arg) {
    enters(arg);
    STORE(&over, 1);
    return NULL;
}

/* Spins in vain beside a thread that comes for the lock now and again, or for 60 ms beside none. */
static void spin_beside(bool another) {
    tpr_loop *loop = loop_new(GIVE_UP_US);
    pthread_t thread;
    loop->sources[0].progress = no_work;
    loop->source_count = 1;
    STORE(&tprpc_test_hook, count_yields);
    tpr_loop_enter(loop);
    if (another) REQUIRE_EQ_INT(pthread_create(&thread, NULL, enters_and_ends, loop), 0);
    tpr_loop_wait(loop, is_over, NULL, test_now_us() + (another ? GIVE_UP_US : 60000));
    tpr_loop_leave(loop);
    if (another) pthread_join(thread, NULL);
    if (another) CHECK_LE_INT(1, LOAD(&yields));
    else CHECK_EQ_INT(LOAD(&yields), 0);
    CHECK_EQ_INT(LOAD(&over), another);
    if (another) {                           /* they are gone: so is the crowd, after a while */
        test_sleep_us(2 * TPR_LOOP_CROWD_US + TPR_LOOP_ABOUT_US);
        tpr_loop_enter(loop);
        tpr_loop_clock(loop);
        STORE(&yields, 0);
        STORE(&over, 0);
        tpr_loop_wait(loop, is_over, NULL, test_now_us() + 20000);
        tpr_loop_leave(loop);
        CHECK_EQ_INT(LOAD(&yields), 0);
    }
    STORE(&tprpc_test_hook, NULL);
    loop->source_count = 0;
    loop_free(loop);
}

TEST(in_a_crowd_who_finds_no_work_yields) { spin_beside(true); }
TEST(who_spins_alone_does_not_yield) { spin_beside(false); }

/* ---- work that another thread does for one who wants the lock ---- */

typedef struct errand { tprpc_work work; tpr_loop *loop; uint32_t ran; pthread_t by; } errand;

static void on_errand(tprpc_work *work) {
    errand *e = (errand *)(void *)work;
    e->by = pthread_self();
    tpr_loop_ran(&e->ran);
}

static void *wants(void *arg) {
    errand *e = (errand *)arg;
    tpr_loop_run_aside(e->loop, &e->work, &e->ran);
    return NULL;
}

/* What was deferred, which may be long, is for who drives, and not for who gives the lock. */
TEST(who_gives_the_lock_does_what_was_left_and_no_more) {
    tpr_loop *loop = loop_new(GIVE_UP_US);
    pthread_t thread;
    errand e, deferred;
    memset(&e, 0, sizeof e);
    memset(&deferred, 0, sizeof deferred);
    e.loop = loop;
    e.work.run = deferred.work.run = on_errand;
    tpr_loop_enter(loop);
    tpr_loop_defer(loop, &deferred.work, false);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, wants, &e), 0);
    while (!TPR_ATOMIC_LOAD(&e.ran)) test_sleep_us(100);
    tpr_loop_leave(loop);
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&e.ran), 1);
    CHECK_EQ_INT(deferred.ran, 0);
    pthread_join(thread, NULL);
    e.ran = 0;
    wants(&e);                                                           /* nobody has it */
    CHECK_EQ_INT(deferred.ran, 0);
    tpr_loop_enter(loop);
    tpr_loop_turn(loop);
    CHECK_EQ_INT(deferred.ran, 1);
    tpr_loop_leave(loop);
    loop_free(loop);
}

TEST(who_has_the_lock_does_what_others_want_it_for) {
    tpr_loop *loop = loop_new(GIVE_UP_US);
    pthread_t thread;
    errand e;
    memset(&e, 0, sizeof e);
    e.loop = loop;
    e.work.run = on_errand;
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, wants, &e), 0);
    while (TPR_ATOMIC_LOAD(&e.ran) != 1) tpr_loop_drain(loop);           /* which it never gives away */
    tpr_loop_leave(loop);
    pthread_join(thread, NULL);
    CHECK(pthread_equal(e.by, pthread_self()));
    e.ran = 0;
    memset(&e.by, 0, sizeof e.by);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, wants, &e), 0);
    while (!TPR_ATOMIC_LOAD(&e.ran)) test_sleep_us(100);                 /* until it sleeps */
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&e.ran), 2);
    CHECK(!e.by);
    tpr_loop_leave(loop);                                                /* who has the lock looks once more */
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&e.ran), 1);
    pthread_join(thread, NULL);
    CHECK(pthread_equal(e.by, pthread_self()));
    e.ran = 0;
    wants(&e);                                                           /* nobody has it */
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&e.ran), 1);
    loop_free(loop);
}

static void *comes_in(void *arg) {
    tpr_loop *loop = (tpr_loop *)arg;
    tpr_loop_enter(loop);
    STORE(&over, 1);
    tpr_loop_leave(loop);
    return NULL;
}

/* Who has waited long for the lock gets it next, whoever else comes by. */
TEST(who_has_waited_long_is_let_in) {
    tpr_loop *loop = loop_new(GIVE_UP_US);
    pthread_t thread, next;
    STORE(&over, 0);
    tpr_loop_enter(loop);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, comes_in, loop), 0);
    while (!TPR_ATOMIC_LOAD(&loop->hungry)) test_sleep_us(100);
    CHECK_EQ_INT(LOAD(&over), 0);
    CHECK(!tpr_loop_trylock(loop));
    tpr_loop_leave(loop);
    REQUIRE_EQ_INT(pthread_create(&next, NULL, comes_in, loop), 0);
    pthread_join(thread, NULL);
    pthread_join(next, NULL);
    CHECK_EQ_INT(LOAD(&over), 1);
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&loop->hungry), 0);
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&loop->contenders), 0);
    CHECK_EQ_INT(TPR_ATOMIC_LOAD(&loop->lock.state), 0);
    loop_free(loop);
}

/* ---- the timers of a loop that has work ---- */

static int64_t hands;                    /* of a clock that each turn with work moves on by a millisecond */
static uint32_t worked, fired_at;

static int64_t by_hand(void *user) {
    (void)user;
    return hands;
}

static bool works(void *instance) {
    (void)instance;
    if (idle_every && ++turns % idle_every == 0) return false;
    worked++;
    hands += 1000;
    return true;
}

static void on_late(tprpc_work *work) {
    (void)work;
    fired_at = worked;
}

static bool has_fired(void *arg) {
    (void)arg;
    return fired_at || worked > 5000;
}

/* However many turns a poll or a wait takes, a timer is late by so many turns at most. */
static void due_at_work(bool waits, uint32_t idle) {
    tpr_loop *loop = loop_new(waits ? GIVE_UP_US : 0);
    tpr_loop_source source;
    tprpc_error error;
    tprpc_work due;
    memset(&source, 0, sizeof source);
    memset(&due, 0, sizeof due);
    hands = tpr_loop_clock(loop);
    loop->env->clock_us = by_hand;
    turns = worked = fired_at = 0;
    source.progress = works;
    idle_every = idle;
    due.run = on_late;
    REQUIRE_EQ_INT(tpr_loop_add_source(loop, source, -1, &error), TPRPC_OK);
    tpr_loop_enter(loop);
    tpr_loop_timer(loop, &due, tpr_loop_clock(loop) + 1000);
    if (waits) tpr_loop_wait(loop, has_fired, NULL, INT64_MAX);
    else while (!has_fired(NULL)) tpr_loop_poll(loop, INT64_MAX, INT64_MAX);
    CHECK_LE_INT(1, fired_at);
    CHECK_LE_INT(fired_at, TPR_LOOP_BUSY_TURNS + 2);
    tpr_loop_leave(loop);
    loop_free(loop);
}
TEST(due_in_polls_that_work) { due_at_work(false, 0); }
TEST(due_in_polls_that_work_at_length) { due_at_work(false, 40); }
TEST(due_in_polls_that_find_work_at_once) { due_at_work(false, 2); }
TEST(due_in_a_wait_that_works) { due_at_work(true, 0); }
TEST(due_in_a_wait_that_works_at_length) { due_at_work(true, 40); }

/* ---- a clock that goes back ---- */

static int64_t skew_us;
static int64_t skewed_clock(void *user) {
    (void)user;
    return test_now_us() + LOAD(&skew_us);
}

static bool idle_turn(void *instance) {
    (void)instance;
    turns++;
    return false;
}

static void *rings_twice(void *arg) {
    tpr_loop *loop = (tpr_loop *)arg;
    test_sleep_us(20000);
    STORE(&skew_us, INT64_C(-3600000000));
    tpr_os_bell_ring(loop->bell);        /* for nothing */
    test_sleep_us(50000);
    TPR_ATOMIC_STORE(&loop->woken, 1u);
    tpr_os_bell_ring(loop->bell);
    return NULL;
}

/* Who slept when it went back sleeps on, and does not spin until the hour has come again. */
TEST(a_clock_goes_back_an_hour) {
    tpr_loop *loop = loop_new(20);
    tpr_loop_source source;
    tprpc_error error;
    pthread_t thread;
    memset(&source, 0, sizeof source);
    source.progress = idle_turn;
    loop->env->clock_us = skewed_clock;
    REQUIRE_EQ_INT(tpr_loop_add_source(loop, source, -1, &error), TPRPC_OK);
    REQUIRE_EQ_INT(pthread_create(&thread, NULL, rings_twice, loop), 0);
    tpr_loop_enter(loop);
    tpr_loop_poll(loop, INT64_MAX, INT64_MAX);
    tpr_loop_leave(loop);
    pthread_join(thread, NULL);
    printf("%u turns\n", (unsigned)turns);
    CHECK(turns < 20000);                /* 20 us of them; else 50 ms of them */
    loop_free(loop);
}

/* ---- processes ---- */

enum { PROCESSES = 5, WATCHES = 4 };
typedef struct watcher { tpr_process_watch watch; int ended; struct watcher *also; } watcher;

static void on_ended(tpr_process_watch *watch) {
    watcher *w = TPR_CONTAINER(watch, watcher, watch);
    CHECK(watch->process == NULL);
    w->ended++;
    if (w->also) tpr_process_unwatch(&w->also->watch);
}

static pid_t process_start(void) {
    pid_t pid = fork();
    if (pid == 0) for (;;) pause();
    REQUIRE(pid > 0);
    return pid;
}

static void process_kill(pid_t pid) {
    kill(pid, SIGKILL);
    REQUIRE(waitpid(pid, NULL, 0) == pid);
}

static void turn(tpr_loop *loop) {
    tpr_loop_enter(loop);
    tpr_loop_clock(loop);
    tpr_loop_poll(loop, INT64_MIN, INT64_MAX);
    tpr_loop_leave(loop);
}

TEST(each_watch_is_told_once) {
    static watcher w[PROCESSES][WATCHES];
    tpr_loop *loop = loop_new(0);
    const int fds = test_count_fds();
    pid_t pids[PROCESSES];
    for (int i = 0; i < PROCESSES; i++) {
        pids[i] = process_start();
        for (int k = 0; k < WATCHES; k++) {
            w[i][k].watch.ended = on_ended;
            CHECK(tpr_process_start(&loop->processes, pids[i], &w[i][k].watch));
        }
    }
    CHECK_EQ_INT(loop->processes.count, PROCESSES);
    CHECK_EQ_INT(test_count_fds(), fds + PROCESSES + 1);   /* one for each, and the poller */
    for (int i = 0; i < 20; i++) turn(loop);
    for (int i = 0; i < PROCESSES; i++) for (int k = 0; k < WATCHES; k++) CHECK_EQ_INT(w[i][k].ended, 0);
    tpr_process_unwatch(&w[0][0].watch);               /* one of several, */
    for (int k = 0; k < WATCHES; k++) tpr_process_unwatch(&w[1][k].watch);   /* all of one, */
    w[2][0].also = &w[2][1];                           /* one of the same process by another, */
    w[3][0].also = &w[4][0];                           /* and of another process */
    for (int i = 0; i < PROCESSES; i++) process_kill(pids[i]);
    int64_t end = test_now_us() + 5000000;
    while ((!w[4][3].ended || loop->processes.count) && test_now_us() < end) turn(loop);
    for (int i = 0; i < PROCESSES; i++)
        for (int k = 0; k < WATCHES; k++) {
            bool none = i == 1 || (i == 0 && k == 0) || (i == 2 && k == 1);
            if (i == 4 && k == 0) CHECK(w[i][k].ended <= 1);   /* whichever was told first */
            else CHECK_EQ_INT(w[i][k].ended, none ? 0 : 1);
        }
    CHECK_EQ_INT(loop->processes.count, 0);
    CHECK_EQ_INT(test_count_fds(), fds);
    loop_free(loop);
}

TEST(the_gone_and_oneself) {
    tpr_loop *loop = loop_new(0);
    static watcher w;
    pid_t pid = process_start();
    process_kill(pid);
    w.watch.ended = on_ended;
    CHECK(!tpr_process_start(&loop->processes, pid, &w.watch));
    CHECK(tpr_process_start(&loop->processes, getpid(), &w.watch));
    CHECK(tpr_process_start(&loop->processes, 0, &w.watch));
    CHECK(tpr_process_start(&loop->processes, -5, &w.watch));
    CHECK(w.watch.process == NULL);
    pid = process_start();                             /* dead and not yet waited for: told by the next look */
    kill(pid, SIGKILL);
    CHECK(tpr_process_start(&loop->processes, pid, &w.watch));
    for (int64_t end = test_now_us() + 5000000; !w.ended && test_now_us() < end;) turn(loop);
    CHECK_EQ_INT(w.ended, 1);
    REQUIRE(waitpid(pid, NULL, 0) == pid);
    loop_free(loop);
}

/* Who sleeps for long is woken; who hangs the loop in one of his own sees the handle turn readable. */
static void told_while(bool foreign) {
    tpr_loop *loop = loop_new(0);
    static watcher w;
    pid_t pid = process_start();
    struct pollfd look;
    w.watch.ended = on_ended;
    CHECK(tpr_process_start(&loop->processes, pid, &w.watch));
    turn(loop);
    const int64_t start = test_now_us();
    if (fork() == 0) {
        test_sleep_us(20000);
        kill(pid, SIGKILL);
        _exit(0);
    }
    look.fd = loop->poller;
    look.events = POLLIN;
    look.revents = 0;
    tpr_loop_enter(loop);
    if (foreign) {
        int64_t until = INT64_MAX;
        CHECK(tpr_loop_quiet(loop, true, false, &until));
        loop->armed = true;
        tpr_loop_leave(loop);
        CHECK_EQ_INT(poll(&look, 1, 10000), 1);
        tpr_loop_enter(loop);
        tpr_loop_clock(loop);
        tpr_loop_poll(loop, INT64_MIN, INT64_MAX);
    } else {
        while (!w.ended && test_now_us() - start < 10000000)
            tpr_loop_poll(loop, tpr_loop_clock(loop) + 10000000, INT64_MAX);
    }
    tpr_loop_leave(loop);
    CHECK_EQ_INT(w.ended, 1);
    CHECK(test_now_us() - start < 5000000);
    while (wait(NULL) > 0) {}
    loop_free(loop);
}
TEST(told_while_it_sleeps) { told_while(false); }
TEST(told_while_it_hangs_in_another) { told_while(true); }

static const char *refused;
static int refuse(const char *call, int64_t *size) {
    (void)size;
    return refused && strcmp(call, refused) == 0 ? EMFILE : 0;
}

/* What cannot be watched is not, and nothing is left of the try. */
TEST(no_descriptors_left) {
    static const char *const calls[] = {"epoll_create", "epoll_ctl", "pidfd_open", "alloc"};
    pid_t pid = process_start();
    for (size_t i = 0; i < sizeof calls / sizeof calls[0]; i++) {
        tpr_loop *loop = loop_new(0);
        static watcher w;
        const int fds = test_count_fds();
        refused = calls[i];
        STORE(&tprpc_test_hook, refuse);
        CHECK(tpr_process_start(&loop->processes, pid, &w.watch));
        STORE(&tprpc_test_hook, NULL);
        CHECK(w.watch.process == NULL);
        CHECK_EQ_INT(loop->processes.count, 0);
        CHECK_EQ_INT(test_count_fds(), fds);
        CHECK(tpr_process_start(&loop->processes, pid, &w.watch));   /* later it can */
        CHECK(w.watch.process != NULL);
        tpr_process_unwatch(&w.watch);
        loop_free(loop);
    }
    process_kill(pid);
}
