/* The timing wheel against a plain sorted list. TEST_SEED=n repeats a run: a failure shows its n. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"

enum { TIMERS = 4096, OPERATIONS = 1000000 };

static uint64_t random_state;
static uint64_t random_u64(void) { return test_random(&random_state); }
static uint64_t random_below(uint64_t n) { return random_u64() % n; }

static void seed(void) {
    const char *given = getenv("TEST_SEED");
    random_state = given ? strtoull(given, NULL, 10) : (uint64_t)test_now_us() * 1000003u + (uint64_t)getpid();
    fprintf(stderr, "TEST_SEED=%llu repeats this run\n", (unsigned long long)random_state);
}

/* What the wheel promises, said plainly: a timer runs at the first advance to a tick not before its own, which is that
   of its time rounded up, and at least the one after that at which it was set. Ticks are what is compared. */
typedef struct timer { tprpc_work work; uint64_t tick; bool set, expired; } timer;
static timer timers[TIMERS];
static timer *sorted[TIMERS];             /* those that are set and not expired, by tick */
static size_t sorted_count, expired_count;
static uint64_t model_now;
static tpr_timer_wheel wheel;

static uint64_t tick_of(int64_t due_us) {
    return due_us <= 0 ? 0 : (uint64_t)due_us / 1000 + (due_us % 1000 != 0);
}

static size_t sorted_find(uint64_t tick) {   /* the first place whose tick is larger */
    size_t low = 0, high = sorted_count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (sorted[middle]->tick > tick) high = middle;
        else low = middle + 1;
    }
    return low;
}

static void model_set(timer *t, int64_t due_us) {
    size_t at;
    t->tick = tick_of(due_us);
    if (t->tick <= model_now) t->tick = model_now + 1;
    at = sorted_find(t->tick);
    memmove(sorted + at + 1, sorted + at, (sorted_count++ - at) * sizeof *sorted);
    sorted[at] = t;
    t->set = true;
    t->expired = false;
}

static void model_cancel(timer *t) {
    if (t->set && t->expired) expired_count--;
    if (t->set && !t->expired) {
        size_t at = sorted_find(t->tick);
        while (sorted[at - 1] != t) at--;
        memmove(sorted + at - 1, sorted + at, (sorted_count-- - at) * sizeof *sorted);
    }
    t->set = t->expired = false;
}

static void model_advance(int64_t now_us) {
    size_t n = 0;
    uint64_t to = now_us <= 0 ? 0 : (uint64_t)now_us / 1000;
    if (to <= model_now) return;
    model_now = to;
    for (; n < sorted_count && sorted[n]->tick <= to; n++) sorted[n]->expired = true;
    sorted_count -= n;
    expired_count += n;
    memmove(sorted, sorted + n, sorted_count * sizeof *sorted);
}

/* The invariant of the section's banner, for every piece of work; and that the two agree on what there is. */
static void check_wheel(void) {
    size_t found = 0, expired = 0;
    uint64_t next;
    for (uint32_t level = 0; level < TPR_TIMER_WHEELS; level++) {
        for (uint32_t slot = 0; slot < TPR_TIMER_SLOTS; slot++) {
            tprpc_work *prev = NULL;
            REQUIRE_EQ_INT(wheel.used[level] >> slot & 1, wheel.slots[level][slot] != NULL);
            for (tprpc_work *work = wheel.slots[level][slot]; work; prev = work, work = work->next) {
                timer *t = TPR_CONTAINER(work, timer, work);
                uint32_t shift = 6 * level;
                REQUIRE(work->prev == prev && t->set && !t->expired);
                REQUIRE(shift + 6 >= 64 || t->tick >> shift >> 6 == wheel.now >> shift >> 6);
                REQUIRE_EQ_INT(t->tick >> shift & 63, slot);
                REQUIRE((wheel.now >> shift & 63) < slot);
                found++;
            }
        }
    }
    for (tprpc_work *work = wheel.expired, *prev = NULL; work; prev = work, work = work->next, expired++) {
        REQUIRE(work->prev == prev);
        REQUIRE(TPR_CONTAINER(work, timer, work)->expired);
    }
    REQUIRE_EQ_INT(found, sorted_count);
    REQUIRE_EQ_INT(expired, expired_count);
    next = tpr_timer_next_tick(&wheel);
    if (sorted_count) REQUIRE(next > wheel.now && next <= sorted[0]->tick);
    else REQUIRE(next == UINT64_MAX);
}

static void check_next(void) {
    int64_t next = tpr_timer_next_us(&wheel);
    REQUIRE_EQ_INT(wheel.now, model_now);
    REQUIRE_EQ_INT(wheel.count, sorted_count + expired_count);
    if (expired_count) REQUIRE_EQ_INT(next, 0);
    else if (!sorted_count) REQUIRE_EQ_INT(next, INT64_MAX);
    else if (sorted[0]->tick <= INT64_MAX / 1000) REQUIRE_LE_INT(next, (int64_t)sorted[0]->tick * 1000);
    if (!expired_count && sorted_count) REQUIRE(next == INT64_MAX || (uint64_t)next / 1000 > model_now);
    if (sorted_count && sorted[0]->tick <= INT64_MAX / 1000)      /* an advance that finds something is never left out */
        REQUIRE(tpr_timer_may_be_due(&wheel, (int64_t)sorted[0]->tick * 1000));
    if (!expired_count && next != INT64_MAX)      /* nor one that a loop wakes for: it could not sleep again before it */
        REQUIRE(tpr_timer_may_be_due(&wheel, next));
}

/* The clock is seen; until it goes on there is nothing more to find. */
static void advance(int64_t now_us) {
    model_advance(now_us);
    tpr_timer_advance(&wheel, now_us);
    REQUIRE(!tpr_timer_may_be_due(&wheel, now_us));
}

/* Takes up to `most` pieces of expired work: none too early, none twice, the earlier tick first within one advance. */
static void take(size_t most) {
    uint64_t last = 0;
    while (most-- > 0) {
        tprpc_work *work = tpr_timer_take(&wheel);
        timer *t;
        if (!work) {
            REQUIRE_EQ_INT(expired_count, 0);
            return;
        }
        t = TPR_CONTAINER(work, timer, work);
        REQUIRE(t->set && t->expired && t->tick <= model_now && t->tick >= last);
        REQUIRE(work->state == TPR_TIMER_IDLE && !tpr_timer_is_set(work));
        last = t->tick;
        t->set = t->expired = false;
        expired_count--;
    }
}

/* A time as often near as far: 0 to 63 bits from now, on and beside a tick, sometimes the same as another's. */
static int64_t random_due(void) {
    uint64_t distance = random_u64() >> random_below(64), now = model_now * 1000;
    switch (random_below(16)) {
    case 0: return (int64_t)(now - random_below(5000));       /* has been, or before the epoch */
    case 1: return INT64_MAX - (int64_t)random_below(3000);
    case 2: return -(int64_t)(distance >> 1);
    case 3: return (int64_t)(now + (random_below(200) << random_below(24)) * 1000);   /* the tick itself */
    case 4: case 5: return sorted_count ? sorted[random_below(sorted_count)]->work.due_us : 0;
    case 6: case 7: case 8: return (int64_t)(now + random_below(100000));
    case 9: case 10: case 11: return (int64_t)(now + random_below(100000000));
    default: return distance > (uint64_t)INT64_MAX - now ? INT64_MAX : (int64_t)(now + distance);
    }
}

/* Where the clock is seen next: mostly a little on, at times far, exactly at a timer or short of it, or back. */
static int64_t random_now(void) {
    uint64_t now = model_now * 1000;
    int64_t due = sorted_count ? sorted[random_below(random_below(4) ? 1 : sorted_count)]->work.due_us : 0;
    switch (random_below(24)) {
    case 0: return (int64_t)(now - random_below(now + 2));
    case 1: return -(int64_t)(random_u64() >> 1);
    case 2: case 3: return due > (int64_t)now + 86400000000 ? (int64_t)now : due;
    case 4: case 5: return due > (int64_t)now + 86400000000 ? (int64_t)now : due - 1;
    case 6: case 7: return tpr_timer_next_us(&wheel) < (int64_t)now + 86400000000 ? tpr_timer_next_us(&wheel) : 0;
    case 8: return (int64_t)(now + random_below(1000000000));
    case 9: return (int64_t)(now + random_below(10000000));
    default: return (int64_t)(now + random_below(3000));
    }
}

/* The clock goes to the end of time once in a while, in steps that open every wheel; then all starts again. */
static void to_the_end(void) {
    while (model_now < (uint64_t)INT64_MAX / 1000) {
        uint64_t left = (uint64_t)INT64_MAX - model_now * 1000;
        int64_t now = (int64_t)(model_now * 1000 + (random_u64() >> random_below(30)) % left + 1);
        if (random_below(3) == 0 && tpr_timer_next_us(&wheel) != INT64_MAX) now = tpr_timer_next_us(&wheel);
        if (random_below(40) == 0) now = INT64_MAX;
        advance(now);
        check_next();
        check_wheel();
        take(SIZE_MAX);
    }
    for (size_t i = 0; i < TIMERS; i++) {      /* what is due past the last tick never runs: it is cancelled */
        model_cancel(&timers[i]);
        tpr_timer_cancel(&wheel, &timers[i].work);
    }
    check_next();
    check_wheel();
}

static void begin(int64_t now_us) {
    memset(timers, 0, sizeof timers);
    sorted_count = expired_count = 0;
    model_now = now_us <= 0 ? 0 : (uint64_t)now_us / 1000;
    tpr_timer_init(&wheel, now_us);
    check_next();
    check_wheel();
}

TEST_LIMIT(timer_against_a_sorted_list, 30) {
    size_t set = 0, cancelled = 0, levels[TPR_TIMER_WHEELS + 1] = {0};
    seed();
    begin(0);
    for (size_t i = 0; i < OPERATIONS; i++) {
        /* How many are set swings between few and nearly all. */
        timer *t = &timers[random_below((i / 20000) % 3 == 0 ? 16 : (i / 20000) % 3 == 1 ? 400 : TIMERS)];
        int64_t now;
        switch (random_below(8)) {
        case 0: case 1: case 2: case 3:
            model_cancel(t);                         /* one that is set is set anew */
            tpr_timer_cancel(&wheel, &t->work);
            now = random_due();
            model_set(t, now);
            tpr_timer_set(&wheel, &t->work, now);
            REQUIRE(tpr_timer_is_set(&t->work) && t->work.due_us == now);
            levels[t->work.state >> 8 & 0xff]++;
            set++;
            break;
        case 4: case 5:
            cancelled += t->set;
            model_cancel(t);
            tpr_timer_cancel(&wheel, &t->work);      /* of one that is not set: nothing */
            REQUIRE(t->work.state == TPR_TIMER_IDLE);
            break;
        default:
            now = random_now();
            advance(now);
            take(random_below(4) ? SIZE_MAX : random_below(8));
        }
        check_next();
        if (random_below(256) == 0) check_wheel();
        if (random_below(100000) == 0) {
            to_the_end();
            begin((int64_t)(random_u64() >> random_below(64) >> 1));
        }
    }
    to_the_end();
    printf("%zu set, %zu cancelled, on each wheel:", set, cancelled);
    for (int i = 0; i < TPR_TIMER_WHEELS; i++) printf(" %zu", levels[i]);
    puts("");
    for (int i = 0; i < 9; i++) CHECK(levels[i] > 0);      /* 63 bits of us are 54 bits of ms: nine wheels */
}

/* A loop that sleeps until tpr_timer_next_us wakes at most once for each wheel, and the last time when it is due. */
TEST_LIMIT(timer_wakes_no_more_than_it_must, 30) {
    seed();
    for (int i = 0; i < 100000; i++) {
        int64_t started = (int64_t)(random_u64() >> 2 >> random_below(60)), now = started, due;
        int wakes = 0;
        due = started / 1000 * 1000 + (int64_t)(random_u64() >> 2 >> random_below(60));
        tpr_timer_init(&wheel, now);
        memset(&timers[0], 0, sizeof timers[0]);
        tpr_timer_set(&wheel, &timers[0].work, due);
        while (tpr_timer_next_us(&wheel) != 0) {
            int64_t next = tpr_timer_next_us(&wheel);
            REQUIRE(next > now && next < INT64_MAX);
            tpr_timer_advance(&wheel, next - 1);
            REQUIRE(tpr_timer_take(&wheel) == NULL);
            tpr_timer_advance(&wheel, next);
            now = next;
            wakes++;
        }
        REQUIRE(tpr_timer_take(&wheel) == &timers[0].work);
        REQUIRE_LE_INT(wakes, 9);
        REQUIRE(now >= due && (now - due < 1000 || (due <= started && now - due < 2000)));
    }
}

/* What the loop does: work that ran sets itself again at once, due already. It runs once a tick, not for ever. */
TEST(timer_that_sets_itself_runs_once_a_tick) {
    int runs = 0;
    tprpc_work work;
    memset(&work, 0, sizeof work);
    tpr_timer_init(&wheel, 5000);
    tpr_timer_set(&wheel, &work, 0);
    for (int64_t now = 5000; now <= 25000; now += 250) {
        tprpc_work *taken;
        tpr_timer_advance(&wheel, now);
        while ((taken = tpr_timer_take(&wheel)) != NULL) {
            tpr_timer_set(&wheel, taken, 0);
            runs++;
        }
    }
    CHECK_EQ_INT(runs, 20);
    tpr_timer_cancel(&wheel, &work);
    CHECK_EQ_INT(wheel.count, 0);
    CHECK_EQ_INT(tpr_timer_next_us(&wheel), INT64_MAX);
}
