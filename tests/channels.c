/* The channels for host memory that have ways of their own: helpers on other loops, memory that may not be read, or not
   any more. What all channels do is in_conformance.c's. */
#include "harness.h"
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include "../tprpc.h"
#include "pipe_common.h"

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

enum { LARGE = (24 << 20) + 3, GIVE_UP_S = 20, AWAY = LARGE / (TEST_SLOWDOWN > 1 ? 4 : 1) };   /* AWAY: many of them */

static tprpc_context *context_with(const char *channels, int threads) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    desc.threads = threads;
    desc.transports = "shm";
    desc.channels = channels;
    desc.log = print_log;
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

static void pair_with(pair *p, const char *channels, int threads) {
    memset(p, 0, sizeof *p);
    p->s.threads = threads;
    p->s.ctx = context_with(channels, threads);
    p->s.also = context_with(channels, threads);
    pair_connect(p, "shm://", 0);
}

/* A large tensor on its way from one end to the other. */
typedef struct parcel {
    uint8_t *there, *back;
    tprpc_tensor tensor;
    tprpc_message m;
    outcome wrote, described, got;
} parcel;

static void parcel_make(parcel *x, size_t size, uint64_t seed) {
    memset(x, 0, sizeof *x);
    x->there = (uint8_t *)malloc(size);
    x->back = (uint8_t *)calloc(1, size);
    REQUIRE(x->there && x->back);
    fill(x->there, size, seed);
    x->tensor.data = x->there;
    x->tensor.size = size;
    x->m.tensors = &x->tensor;
    x->m.tensor_count = 1;
    x->m.release = on_release;
    x->m.release_user = &x->wrote;
}

/* Sends it, and begins to receive it. */
static void parcel_begin(parcel *x, side *s, tprpc_pipe *from, tprpc_pipe *to) {
    REQUIRE_EQ_INT(tprpc_pipe_write(from, &x->m, on_written, &x->wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(to, on_described, &x->described), TPRPC_OK);
    WAIT(s, x->described.runs, 1);
    x->tensor.data = x->back;
    x->m.release = NULL;
    REQUIRE_EQ_INT(tprpc_pipe_read(to, &x->m, on_read, &x->got), TPRPC_OK);
}

static void parcel_end(parcel *x, side *s, uint64_t seed) {
    WAIT(s, x->got.runs, 1);
    WAIT(s, x->wrote.runs, 1);
    WAIT(s, x->wrote.releases, 1);
    CHECK_EQ_INT(x->got.status, TPRPC_OK);
    CHECK_EQ_INT(x->wrote.status, TPRPC_OK);
    CHECK(matches(x->back, x->tensor.size, seed));
    free(x->there);
    free(x->back);
}

static void carry(pair *p, size_t size, uint64_t seed) {
    parcel *x = (parcel *)calloc(1, sizeof *x);
    REQUIRE(x != NULL);
    parcel_make(x, size, seed);
    parcel_begin(x, &p->s, p->a, p->b);
    parcel_end(x, &p->s, seed);
    free(x);
}

/* ---- several loops at one transfer ---- */

static pthread_t first_reader;
static int reads, others;              /* calls, of which the first reads the sender's table; of them by other threads */

/* The first thread that fetches waits until another one does too. */
static int meet_another(const char *call, int64_t *size) {
    const int64_t end = test_now_us() + GIVE_UP_S * INT64_C(1000000);
    (void)size;
    if (strcmp(call, "process_vm_readv") != 0) return 0;
    const int turn = ADD(reads, 1);
    if (turn == 1) return 0;
    if (turn > 2) {
        while (LOAD(reads) < 100) test_sleep_us(10);
        if (!pthread_equal(first_reader, pthread_self())) STORE(others, 1);
        return 0;
    }
    first_reader = pthread_self();
    STORE(reads, 100);
    while (!LOAD(others) && test_now_us() < end) test_sleep_us(100);
    return 0;
}

TEST(helpers_fetch_too) {
    pair p;
    pair_with(&p, "cma", 4);
    carry(&p, 64, 1);                  /* the pipe is open */
    STORE(tprpc_test_hook, meet_another);
    carry(&p, LARGE, 2);
    STORE(tprpc_test_hook, NULL);
    CHECK(others);
    pair_close(&p);
}

static void many_at_once(const char *channels) {
    enum { MANY = 12 };
    pair p;
    parcel *x = (parcel *)calloc(MANY, sizeof *x);
    REQUIRE(x != NULL);
    pair_with(&p, channels, 4);
    for (int i = 0; i < MANY; i++) parcel_make(&x[i], (size_t)(i % 3 ? 100000 : 5 << 20) + (size_t)i, (uint64_t)i);
    for (int i = 0; i < MANY; i++) parcel_begin(&x[i], &p.s, i % 2 ? p.a : p.b, i % 2 ? p.b : p.a);
    for (int i = 0; i < MANY; i++) parcel_end(&x[i], &p.s, (uint64_t)i);
    free(x);
    pair_close(&p);
}

/* Large ones of a pipe come one after the other, and a small one need not wait for them. */
static void in_turn(const char *channels) {
    enum { MANY = 5 };
    pair p;
    parcel *x = (parcel *)calloc(MANY, sizeof *x);
    REQUIRE(x != NULL);
    pair_with(&p, channels, 0);
    for (int i = 0; i < MANY; i++) parcel_make(&x[i], i == MANY - 1 ? 100000 : (8u << 20) >> i, (uint64_t)i);
    for (int i = 0; i < MANY; i++) REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &x[i].m, on_written, &x[i].wrote), TPRPC_OK);
    for (int i = 0; i < MANY; i++) REQUIRE_EQ_INT(tprpc_pipe_read(p.b, NULL, on_read, &x[i].got), TPRPC_OK);
    for (int i = 0; i < MANY; i++) WAIT(&p.s, x[i].got.runs, 1);
    for (int i = 1; i < MANY - 1; i++) CHECK_LE_INT(x[i - 1].got.place, x[i].got.place);
    CHECK_LE_INT(x[MANY - 1].got.place, x[1].got.place);
    for (int i = 0; i < MANY; i++) {
        WAIT(&p.s, x[i].wrote.releases, 1);
        free(x[i].there);
        free(x[i].back);
    }
    free(x);
    pair_close(&p);
}

TEST(in_turn_xth) { in_turn("xth"); }
TEST(in_turn_cma) { in_turn("cma"); }

TEST(many_at_once_xth) { many_at_once("xth"); }
TEST(many_at_once_cma) { many_at_once("cma"); }

typedef struct blocker { tprpc_work work; int begun, end; } blocker;

static void block(tprpc_work *work) {
    blocker *b = (blocker *)(void *)work;
    const int64_t end = test_now_us() + GIVE_UP_S * INT64_C(1000000);
    STORE(b->begun, 1);
    while (!LOAD(b->end) && test_now_us() < end) test_sleep_us(1000);
}

typedef struct reading { pthread_t thread; tprpc_pipe *pipe; parcel *x; } reading;

static void *read_late(void *arg) {
    reading *r = (reading *)arg;
    CHECK_EQ_INT(tprpc_pipe_read(r->pipe, &r->x->m, on_read, &r->x->got), TPRPC_OK);
    return NULL;
}

/* A loop that a callback holds up keeps no transfer of another loop from its end. */
static void helper_is_held_up(const char *channels) {
    pair p;
    parcel *x = (parcel *)calloc(2, sizeof *x);
    blocker b;
    tprpc_pipe *pipes[2][2];
    REQUIRE(x != NULL);
    memset(&b, 0, sizeof b);
    b.work.run = block;
    b.work.loop = 1;
    pair_with(&p, channels, 2);
    for (int i = 0; i < 2; i++) {      /* one on each loop of the receiver */
        pipes[i][0] = p.a;
        pipes[i][1] = p.b;
        if (i == 0) {
            accepting accept;
            memset(&accept, 0, sizeof accept);
            CHECK_EQ_INT(tprpc_accept(p.s.listener, on_accepted, &accept), TPRPC_OK);
            p.b = connect_to(p.s.also, tprpc_listener_address(p.s.listener, NULL), 0, 0);
            WAIT(&p.s, accept.o.runs, 1);
            p.a = accept.pipe;
        }
    }
    for (int i = 0; i < 2; i++) {
        parcel_make(&x[i], LARGE, (uint64_t)i);
        REQUIRE_EQ_INT(tprpc_pipe_write(pipes[i][0], &x[i].m, on_written, &x[i].wrote), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(pipes[i][1], on_described, &x[i].described), TPRPC_OK);
        WAIT(&p.s, x[i].described.runs, 1);
    }
    tprpc_defer(p.s.also, &b.work);
    WAIT(&p.s, b.begun, 1);
    for (int i = 0; i < 2; i++) {
        x[i].tensor.data = x[i].back;
        x[i].m.release = NULL;
    }
    reading readers_of[2];             /* the read of a pipe of the loop that is held up waits for its lock */
    for (int i = 0; i < 2; i++) {
        readers_of[i].pipe = pipes[i][1];
        readers_of[i].x = &x[i];
        REQUIRE_EQ_INT(pthread_create(&readers_of[i].thread, NULL, read_late, &readers_of[i]), 0);
    }
    const int64_t end = test_now_us() + GIVE_UP_S * INT64_C(500000);
    while (!LOAD(x[0].got.runs) && !LOAD(x[1].got.runs) && test_now_us() < end) test_sleep_us(1000);
    CHECK_EQ_INT(LOAD(x[0].got.runs) + LOAD(x[1].got.runs), 1);
    STORE(b.end, 1);
    for (int i = 0; i < 2; i++) pthread_join(readers_of[i].thread, NULL);
    for (int i = 0; i < 2; i++) parcel_end(&x[i], &p.s, (uint64_t)i);
    tprpc_pipe_close(pipes[0][0]);
    tprpc_pipe_close(pipes[0][1]);
    free(x);
    pair_close(&p);
}

TEST(helper_is_held_up_xth) { helper_is_held_up("xth"); }
TEST(helper_is_held_up_cma) { helper_is_held_up("cma"); }

/* ---- memory that cannot be read, or not any more ---- */

static int reads_left, read_code;      /* of process_vm_readv: so many go well; then this error, or 0: short */

static int spoil_reads(const char *call, int64_t *size) {
    if (strcmp(call, "process_vm_readv") != 0 || ADD(reads_left, -1) >= 0) return 0;
    if (!read_code && size) *size = 1000;
    return read_code;
}

/* What cannot be read comes through the pipe, all of it, however far the reading had come. */
TEST(unreadable_is_sent) {
    static const int codes[] = {EPERM, EFAULT, ENOSYS, 0}, good[] = {0, 1, 2, 7};
    for (int threads = 0; threads <= 2; threads += 2)
        for (size_t i = 0; i < COUNT(codes) * COUNT(good); i++) {
            pair p;
            tprpc_pipe_info info;
            pair_with(&p, "cma,basic", threads);
            carry(&p, 20000, 1);
            REQUIRE_EQ_INT(tprpc_pipe_get_info(p.a, &info, sizeof info), TPRPC_OK);
            CHECK_STR(info.channel, "cma");
            CHECK_EQ_INT(info.fallbacks, 0);
            const uint64_t before = info.bytes_sent;
            read_code = codes[i / COUNT(good)];
            reads_left = good[i % COUNT(good)];
            STORE(tprpc_test_hook, spoil_reads);
            carry(&p, 5 << 20, 2);
            STORE(tprpc_test_hook, NULL);
            REQUIRE_EQ_INT(tprpc_pipe_get_info(p.a, &info, sizeof info), TPRPC_OK);
            CHECK_LE_INT(before + (5 << 20), info.bytes_sent);
            CHECK_EQ_INT(info.fallbacks, 1);
            REQUIRE_EQ_INT(tprpc_pipe_get_info(p.b, &info, sizeof info), TPRPC_OK);
            CHECK_EQ_INT(info.fallbacks, 1);
            carry(&p, 5 << 20, 3);     /* and the next is read again */
            REQUIRE_EQ_INT(tprpc_pipe_get_info(p.a, &info, sizeof info), TPRPC_OK);
            CHECK_LE_INT(info.bytes_sent, before + (6 << 20));
            pair_close(&p);
        }
}

/* The sender goes while the receiver reads: an error, never bytes that were the sender's no more. */
static void sender_goes(const char *channels, int threads) {
    for (int turns = 0; turns < 40; turns++) {
        pair p;
        parcel *x = (parcel *)calloc(1, sizeof *x);
        REQUIRE(x != NULL);
        pair_with(&p, channels, threads);
        parcel_make(x, AWAY, 5);
        parcel_begin(x, &p.s, p.a, p.b);
        if (threads) test_sleep_us(turns * 50);
        else for (int i = 0; i < turns; i++) tprpc_poll(p.s.also, TPRPC_NOW, 1);
        tprpc_pipe_close(p.a);
        p.a = NULL;
        WAIT(&p.s, x->wrote.releases, 1);
        memset(x->there, 0xee, AWAY);
        free(x->there);
        WAIT(&p.s, x->got.runs, 1);
        WAIT(&p.s, x->wrote.runs, 1);
        if (x->got.status == TPRPC_OK) CHECK(matches(x->back, AWAY, 5));
        else CHECK_EQ_INT(x->got.status, TPRPC_ERROR_PEER);
        free(x->back);
        free(x);
        pair_close(&p);
    }
}

TEST_LIMIT(sender_goes_basic_polled, 60) { sender_goes("basic", 0); }
TEST_LIMIT(sender_goes_basic_threads, 60) { sender_goes("basic", 2); }
TEST_LIMIT(sender_goes_xth_polled, 60) { sender_goes("xth", 0); }
TEST_LIMIT(sender_goes_xth_threads, 60) { sender_goes("xth", 3); }
TEST_LIMIT(sender_goes_cma_polled, 60) { sender_goes("cma", 0); }
TEST_LIMIT(sender_goes_cma_threads, 60) { sender_goes("cma", 3); }

static int held, let_on;               /* a read has begun; it may go on */

static int hold_second(const char *call, int64_t *size) {
    (void)size;
    if (strcmp(call, "process_vm_readv") != 0 || ADD(held, 1) != 2) return 0;
    const int64_t end = test_now_us() + GIVE_UP_S * INT64_C(1000000);
    while (!LOAD(let_on) && test_now_us() < end) test_sleep_us(100);
    return 0;
}

/* Exactly between: the memory is the sender's again when it is read. */
TEST(read_too_late) {
    enum { SIZE = 100000 };
    pair p;
    parcel *x = (parcel *)calloc(1, sizeof *x);
    REQUIRE(x != NULL);
    pair_with(&p, "cma", 1);
    parcel_make(x, SIZE, 5);
    held = -1000;                      /* the proof reads too */
    STORE(tprpc_test_hook, hold_second);
    REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &x->m, on_written, &x->wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(p.b, on_described, &x->described), TPRPC_OK);
    WAIT(&p.s, x->described.runs, 1);
    x->tensor.data = x->back;
    x->m.release = NULL;
    STORE(held, 0);
    REQUIRE_EQ_INT(tprpc_pipe_read(p.b, &x->m, on_read, &x->got), TPRPC_OK);
    WAIT(&p.s, held, 2);
    tprpc_pipe_close(p.a);
    p.a = NULL;
    WAIT(&p.s, x->wrote.releases, 1);
    memset(x->there, 0xee, SIZE);
    STORE(let_on, 1);
    WAIT(&p.s, x->got.runs, 1);
    WAIT(&p.s, x->wrote.runs, 1);
    CHECK_EQ_INT(x->got.status, TPRPC_ERROR_PEER);
    STORE(tprpc_test_hook, NULL);
    pair_close(&p);
    free(x->there);
    free(x->back);
    free(x);
}

/* ---- memory that is freed while it is lent ---- */

static const char *freed_channel;

static void free_too_early(void *arg) {
    const int *out = (const int *)arg;
    pair p;
    parcel x;
    dup2(*out, STDERR_FILENO);
    pair_with(&p, freed_channel, 0);
    parcel_make(&x, LARGE, 1);
    REQUIRE_EQ_INT(tprpc_pipe_write(p.a, &x.m, on_written, &x.wrote), TPRPC_OK);
    free(x.there);
    REQUIRE_EQ_INT(tprpc_pipe_read(p.b, NULL, on_read, &x.got), TPRPC_OK);
    WAIT(&p.s, x.got.runs, 1);
    _exit(0);
}

/* Undefined, says the manual; where both ends are in sight of the address sanitizer, that finds it. */
TEST(freed_too_early_is_found) {
    static const char *const all[] = {"basic", "bulk", "xth"};
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);       /* the sanitizer's own child comes to this process */
    for (size_t i = 0; TEST_ASAN && i < COUNT(all); i++) {
        char said[4096];
        size_t have = 0;
        ssize_t n;
        int ends[2];
        REQUIRE_EQ_INT(pipe(ends), 0);
        freed_channel = all[i];
        const pid_t child = test_fork_run(free_too_early, &ends[1]);
        close(ends[1]);
        while ((n = read(ends[0], said + have, sizeof said - 1 - have)) > 0) have += (size_t)n;
        said[have] = 0;
        CHECK(test_wait_child(child, GIVE_UP_S) != 0);
        while (waitpid(-1, NULL, 0) > 0) {}
        CHECK_CONTAINS(said, "heap-use-after-free");
        close(ends[0]);
    }
}

/* ---- which there are ---- */

static const tprpc_backend_info *info_named(const tprpc_backend_info *all, size_t count, const char *name) {
    size_t i = 0;
    while (i < count && strcmp(all[i].name, name) != 0) i++;
    REQUIRE(i < count);
    return &all[i];
}

TEST(backends_are_told) {
    tprpc_backend_info all[16], one[2];
    tprpc_context *ctx = context_with("cma,basic", 2);   /* over shm alone */
    const size_t count = tprpc_context_get_backends(ctx, all, COUNT(all), sizeof *all);
    REQUIRE(count >= 5 && count <= COUNT(all));
    const tprpc_backend_info *shm = info_named(all, count, "shm"), *tcp = info_named(all, count, "tcp");
    const tprpc_backend_info *cma = info_named(all, count, "cma"), *basic = info_named(all, count, "basic");
    const tprpc_backend_info *xth = info_named(all, count, "xth");
    CHECK(shm->viable && cma->viable && basic->viable && !tcp->viable && !xth->viable);
    CHECK_STR(shm->why, "");
    CHECK_CONTAINS(tcp->why, "not among the transports given");
    CHECK_CONTAINS(xth->why, "not among the channels given");
    CHECK(shm->kind == TPRPC_BACKEND_TRANSPORT && cma->kind == TPRPC_BACKEND_CHANNEL);
    CHECK_LE_INT(basic->priority + 1, cma->priority);    /* as the list says */
    CHECK(shm->domain_size > 0 && cma->domain_size == 8 && basic->domain_size == 0 && xth->domain_size == 0);
    CHECK_CONTAINS(cma->summary, "process_vm_readv");
    memset(one, 0x5a, sizeof one);
    const tprpc_backend_info untouched = one[1];
    CHECK_EQ_INT(tprpc_context_get_backends(ctx, one, 1, sizeof *one), count);
    CHECK_STR(one[0].name, all[0].name);
    CHECK_MEM(&one[1], &untouched, sizeof untouched);
    CHECK_EQ_INT(tprpc_context_get_backends(ctx, NULL, 0, sizeof *one), count);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* ---- a peer that forbids it ---- */

static int prctls;

static int count_prctls(const char *call, int64_t *size) {
    (void)size;
    if (strcmp(call, "prctl") == 0) ADD(prctls, 1);
    return 0;
}

/* The right to be read is given away by who asks for that alone. */
TEST(let_read) {
    for (int asked = 0; asked < 2; asked++) {
        tprpc_context_desc desc;
        tprpc_context *ctx;
        memset(&desc, 0, sizeof desc);
        desc.let_read = asked;
        STORE(prctls, 0);
        STORE(tprpc_test_hook, count_prctls);
        REQUIRE_EQ_INT(tprpc_context_create(&desc, &ctx, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
        STORE(tprpc_test_hook, NULL);
        CHECK_EQ_INT(LOAD(prctls), asked);
    }
}

typedef struct apart { char address[128], channel[16], why[128]; int listens, done; } apart;

static void forbid_by_seccomp(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_process_vm_readv, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof filter[0], filter};
    REQUIRE_EQ_INT(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
    REQUIRE_EQ_INT(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), 0);
}

static void forbid_by_dump(void) { REQUIRE_EQ_INT(prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), 0); }

static void say_channel(tprpc_pipe *pipe, char *channel, size_t channel_size, char *why, size_t why_size) {
    tprpc_pipe_info info;
    REQUIRE_EQ_INT(tprpc_pipe_get_info(pipe, &info, sizeof info), TPRPC_OK);
    snprintf(channel, channel_size, "%s", info.channel);
    for (uint32_t i = 0; i < info.path_count; i++)
        if (strcmp(info.paths[i].name, "cma") == 0) snprintf(why, why_size, "%s", info.paths[i].why);
}

typedef struct peer { apart *shared; void (*forbid)(void); const char *channels; int times; } peer;

/* Sends a tensor there, and gets it back. */
static void there_and_back(side *s, tprpc_pipe *pipe, bool first) {
    parcel *x = (parcel *)calloc(2, sizeof *x);
    REQUIRE(x != NULL);
    parcel_make(&x[0], AWAY, first);
    parcel_make(&x[1], AWAY, !first);
    REQUIRE_EQ_INT(tprpc_pipe_write(pipe, &x[0].m, on_written, &x[0].wrote), TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_pipe_read_descriptor(pipe, on_described, &x[1].described), TPRPC_OK);
    WAIT(s, x[1].described.runs, 1);
    x[1].tensor.data = x[1].back;
    x[1].m.release = NULL;
    REQUIRE_EQ_INT(tprpc_pipe_read(pipe, &x[1].m, on_read, &x[1].got), TPRPC_OK);
    WAIT(s, x[1].got.runs, 1);
    WAIT(s, x[0].wrote.releases, 1);
    CHECK(matches(x[1].back, AWAY, !first));
    for (int i = 0; i < 2; i++) {
        free(x[i].there);
        free(x[i].back);
    }
    free(x);
}

static void peer_main(void *arg) {
    peer *self = (peer *)arg;
    side s;
    memset(&s, 0, sizeof s);
    self->forbid();
    s.ctx = context_with(self->channels, 0);
    WAIT(&s, self->shared->listens, 1);
    s.pipe = connect_to(s.ctx, self->shared->address, 0, 0);
    for (int i = 0; i < self->times; i++) there_and_back(&s, s.pipe, false);
    say_channel(s.pipe, self->shared->channel, sizeof self->shared->channel, self->shared->why,
                sizeof self->shared->why);
    STORE(self->shared->done, 1);
    for (;;) work(&s);
}

/* Opens a pipe to a child, sends and gets tensors; tells of this end's pipe. */
static void beside(peer other, apart *theirs, tprpc_pipe_info *info) {
    void *memory = mmap(NULL, sizeof(apart), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    other.shared = (apart *)memory;
    accepting accept;
    side s;
    REQUIRE(memory != MAP_FAILED);
    memset(&s, 0, sizeof s);
    memset(&accept, 0, sizeof accept);
    const pid_t child = test_fork_run(peer_main, &other);
    s.ctx = context_with(other.channels, 0);
    s.listener = listen_on(s.ctx, "shm://", 0);
    snprintf(other.shared->address, sizeof other.shared->address, "%s", tprpc_listener_address(s.listener, NULL));
    CHECK_EQ_INT(tprpc_accept(s.listener, on_accepted, &accept), TPRPC_OK);
    STORE(other.shared->listens, 1);
    WAIT(&s, accept.o.runs, 1);
    REQUIRE_EQ_INT(accept.o.status, TPRPC_OK);
    for (int i = 0; i < other.times; i++) there_and_back(&s, accept.pipe, true);
    WAIT(&s, other.shared->done, 1);
    REQUIRE_EQ_INT(tprpc_pipe_get_info(accept.pipe, info, sizeof *info), TPRPC_OK);
    *theirs = *other.shared;
    kill(child, SIGKILL);
    CHECK_EQ_INT(test_wait_child(child, 5), 128 + SIGKILL);
    tprpc_pipe_close(accept.pipe);
    CHECK_EQ_INT(tprpc_context_destroy(s.ctx), TPRPC_OK);
    munmap(memory, sizeof(apart));
}

static const char *why_not(const tprpc_pipe_info *info, const char *name) {
    for (uint32_t i = 0; i < info->path_count; i++)
        if (strcmp(info->paths[i].name, name) == 0) return info->paths[i].chosen ? NULL : info->paths[i].why;
    return "it is not there";
}

/* The same with a child that forbids; says which channel either end sends by, and why not by cma. */
static void beside_one_that(void (*forbid)(void), apart *theirs, char *channel, size_t channel_size, char *why,
                            size_t why_size) {
    const peer other = {NULL, forbid, "cma,basic", 1};
    tprpc_pipe_info info;
    beside(other, theirs, &info);
    snprintf(channel, channel_size, "%s", info.channel);
    if (why_not(&info, "cma")) snprintf(why, why_size, "%s", why_not(&info, "cma"));
}

static void forbid_nothing(void) {}

/* Of bulk and cma the pipe stays with the faster, whichever that is here; not before both were tried. */
TEST(the_faster_is_chosen) {
    static const char faster[] = "another channel was faster with large tensors", first[] = "another channel comes first";
    for (int times = 1; times <= 8; times += 7) {
        const peer other = {NULL, forbid_nothing, NULL, times};
        tprpc_pipe_info info;
        apart theirs;
        beside(other, &theirs, &info);
        const char *bulk = why_not(&info, "bulk"), *cma = why_not(&info, "cma");
        CHECK(!bulk != !cma);
        if (times == 1) CHECK(!bulk && strcmp(cma, first) == 0);
        else CHECK_STR(bulk ? bulk : cma, faster);
        CHECK_STR(why_not(&info, "basic"), first);
        CHECK_EQ_INT(info.fallbacks, 0);
        CHECK_STR(info.channel, bulk ? "cma" : "bulk");
    }
}

/* The user's order is kept, whatever is faster. */
TEST(a_given_order_is_kept) {
    static const char *const orders[] = {"cma,bulk,basic", "bulk,cma,basic", "basic,bulk,cma"};
    for (size_t i = 0; i < COUNT(orders); i++) {
        const peer other = {NULL, forbid_nothing, orders[i], 8};
        tprpc_pipe_info info;
        apart theirs;
        beside(other, &theirs, &info);
        CHECK(strncmp(orders[i], info.channel, strlen(info.channel)) == 0);
        CHECK(strncmp(orders[i], theirs.channel, strlen(theirs.channel)) == 0);
    }
}

TEST(another_process_is_read) {
    apart theirs;
    char channel[16], why[128] = "";
    beside_one_that(forbid_nothing, &theirs, channel, sizeof channel, why, sizeof why);
    CHECK_STR(channel, "cma");
    CHECK_STR(theirs.channel, "cma");
}

/* Where the call is forbidden the channel is not offered. */
TEST(forbidden_by_seccomp) {
    apart theirs;
    char channel[16], why[128] = "";
    beside_one_that(forbid_by_seccomp, &theirs, channel, sizeof channel, why, sizeof why);
    CHECK_STR(channel, "basic");
    CHECK_STR(theirs.channel, "basic");
    CHECK_CONTAINS(theirs.why, "process_vm_readv: Operation not permitted");
    CHECK_CONTAINS(why, "does not offer it");
}

/* One that may not be read can read: each direction has its own right. Root may read all. */
TEST(forbidden_in_one_direction) {
    apart theirs;
    char channel[16], why[128] = "";
    if (getuid() == 0) {
        REQUIRE_EQ_INT(setgid(65534), 0);
        REQUIRE_EQ_INT(setuid(65534), 0);
        REQUIRE_EQ_INT(prctl(PR_SET_DUMPABLE, 1, 0, 0, 0), 0);
    }
    beside_one_that(forbid_by_dump, &theirs, channel, sizeof channel, why, sizeof why);
    CHECK_STR(channel, "cma");
    CHECK_STR(theirs.channel, "basic");
    CHECK_CONTAINS(theirs.why, "the peer cannot read this process's memory: Operation not permitted");
}
