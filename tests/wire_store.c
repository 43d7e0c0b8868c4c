/* The store on the wire and in a file, as earlier versions wrote them: tests/wire/README.md. A recorded session is
   replayed byte by byte, against today's server and against today's client, whole and up to each of its bytes; a recorded
   file is read, and written anew. */
#include "agent_help.h"

enum { SEGMENTS = 200, SEGMENT_MOST = 70000, HELLO = 16 };

/* ---- a tape: what went over one connection, the bytes of one direction that followed each other as one segment ---- */

typedef struct segment { int way; uint32_t size; uint8_t *bytes; } segment;     /* way 0: of the client */
typedef struct tape { size_t count; segment all[SEGMENTS]; } tape;

static void tape_add(tape *t, int way, const uint8_t *bytes, uint32_t size) {
    segment *last = t->count ? &t->all[t->count - 1] : NULL;
    if (!last || last->way != way) {
        REQUIRE(t->count < SEGMENTS);
        last = &t->all[t->count++];
        last->way = way;
        last->size = 0;
        last->bytes = NULL;
    }
    last->bytes = (uint8_t *)realloc(last->bytes, last->size + size);
    REQUIRE(last->bytes != NULL);
    memcpy(last->bytes + last->size, bytes, size);
    last->size += size;
}

static void tape_free(tape *t) {
    for (size_t i = 0; i < t->count; i++) free(t->all[i].bytes);
    memset(t, 0, sizeof *t);
}

static void put_u32(FILE *file, uint32_t value) {
    for (int i = 0; i < 4; i++) fputc((int)(value >> 8 * i & 255), file);
}

static uint32_t get_u32(FILE *file) {
    uint32_t value = 0;
    for (int i = 0; i < 4; i++) value |= (uint32_t)(fgetc(file) & 255) << 8 * i;
    return value;
}

static const char *path_of(char *out, size_t size, const char *name) {
    const char *folder = getenv("TPRPC_WIRE_RECORD"), *slash = strrchr(__FILE__, '/');
    if (folder) snprintf(out, size, "%s/%s", folder, name);
    else snprintf(out, size, "%.*swire/%s", slash ? (int)(slash - __FILE__ + 1) : 0, __FILE__, name);
    return out;
}

static void tape_write(const tape *t, const char *path) {
    FILE *file = fopen(path, "wb");
    REQUIRE(file != NULL);
    fwrite("TPRW\1\0", 1, 6, file);
    for (size_t i = 0; i < t->count; i++) {
        fputc(t->all[i].way, file);
        put_u32(file, t->all[i].size);
        put_u32(file, t->all[i].size);       /* in one piece */
        fwrite(t->all[i].bytes, 1, t->all[i].size, file);
    }
    REQUIRE(fclose(file) == 0);
}

static void tape_read(tape *t, const char *path) {
    static uint8_t bytes[SEGMENT_MOST];
    FILE *file = fopen(path, "rb");
    char magic[6];
    int way;
    if (!file) fprintf(stderr, "%s: %s\n", path, strerror(errno));
    REQUIRE(file != NULL && fread(magic, 1, 6, file) == 6 && memcmp(magic, "TPRW\1\0", 6) == 0);
    memset(t, 0, sizeof *t);
    while ((way = fgetc(file)) != EOF) {
        uint32_t size = get_u32(file);
        REQUIRE(way <= 1 && size > 0 && size <= sizeof bytes && get_u32(file) == size);
        REQUIRE(fread(bytes, 1, size, file) == size);
        tape_add(t, way, bytes, size);
    }
    fclose(file);
    REQUIRE(t->count > 10);
}

/* ---- what a session does: each kind of operation, with each way that it ends ---- */

typedef struct step {
    int kind;
    const char *key, *expected, *value;       /* expected "": none */
    int64_t number;                           /* what is added; ms to wait for the key */
    tprpc_status status;
    const char *shown;                        /* the value shown; "=": a number, which is `sum` */
    int64_t sum;
} step;

static const step steps[] = {
    {TPRPC_STORE_SET, "a", "", "first", 0, TPRPC_OK, "", 0},
    {TPRPC_STORE_GET, "a", "", "", 0, TPRPC_OK, "first", 0},
    {TPRPC_STORE_GET, "missing", "", "", 0, TPRPC_ERROR_TIMEOUT, "", 0},
    {TPRPC_STORE_GET, "late", "", "", 50, TPRPC_ERROR_TIMEOUT, "", 0},
    {TPRPC_STORE_ADD, "n", "", "", 5, TPRPC_OK, "=", 5},
    {TPRPC_STORE_ADD, "n", "", "", -7, TPRPC_OK, "=", -2},
    {TPRPC_STORE_ADD, "a", "", "", 1, TPRPC_ERROR_INVALID, "", 0},
    {TPRPC_STORE_COMPARE_SET, "a", "first", "second", 0, TPRPC_OK, "second", 0},
    {TPRPC_STORE_COMPARE_SET, "a", "first", "third", 0, TPRPC_OK, "second", 0},
    {TPRPC_STORE_COMPARE_SET, "new", "", "made", 0, TPRPC_OK, "made", 0},
    {TPRPC_STORE_SET, "empty", "", "", 0, TPRPC_OK, "", 0},
    {TPRPC_STORE_GET, "empty", "", "", 0, TPRPC_OK, "", 0},
    {TPRPC_STORE_DELETE, "empty", "", "", 0, TPRPC_OK, "\1", 0},
    {TPRPC_STORE_DELETE, "empty", "", "", 0, TPRPC_OK, "\0", 0},
    {TPRPC_STORE_SET, "k\xc3\xa9y", "", "UTF-8", 0, TPRPC_OK, "", 0},
    {TPRPC_STORE_GET, "k\xc3\xa9y", "", "", 0, TPRPC_OK, "UTF-8", 0},
};
enum { STEPS = sizeof steps / sizeof steps[0] };

typedef struct ended { int runs; const step *step; tprpc_status status; } ended;

static bool was_cut;                  /* the player has closed: operations may end by that */

static void on_ended(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    ended *e = (ended *)user;
    const step *s = e->step;
    e->runs++;
    e->status = status;
    if (was_cut && status == TPRPC_ERROR_PEER) {
        CHECK(error && strstr(error->text, "lost its server"));
        return;
    }
    if (!CHECK_EQ_INT(status, s->status)) fprintf(stderr, "step %d: %s\n", (int)(s - steps), error ? error->text : "");
    if (status != TPRPC_OK) {
        CHECK(error && error->text[0]);
    } else if (s->shown[0] == '=') {
        if (CHECK_EQ_INT(size, 8)) CHECK_MEM(value, &s->sum, 8);
    } else if (s->kind == TPRPC_STORE_DELETE) {
        if (CHECK_EQ_INT(size, 1)) CHECK_MEM(value, s->shown, 1);
    } else if (CHECK_EQ_INT(size, strlen(s->shown))) {
        CHECK_MEM(value, s->shown, size);
    }
}

static tprpc_status begin(tprpc_store *store, const step *s, ended *e) {
    const size_t size = strlen(s->value), expected = strlen(s->expected);
    e->step = s;
    switch (s->kind) {
    case TPRPC_STORE_SET: return tprpc_store_set(store, s->key, s->value, size, on_ended, e);
    case TPRPC_STORE_GET: return tprpc_store_get(store, s->key, s->number ? s->number : TPRPC_NOW, on_ended, e);
    case TPRPC_STORE_ADD: return tprpc_store_add(store, s->key, s->number, on_ended, e);
    case TPRPC_STORE_DELETE: return tprpc_store_delete(store, s->key, on_ended, e);
    default: return tprpc_store_compare_set(store, s->key, expected ? s->expected : NULL, expected, s->value, size,
                                            on_ended, e);
    }
}

/* ---- the ends ---- */

typedef struct session {
    tprpc_context *ctx[2];            /* 0: of the client */
    tprpc_store *store[2];
    void (*beside)(struct session *s);
    int listener, fd[2];              /* of the proxy, or of the player: fd[0] */
    uint16_t server_port;
    tape tape;
    size_t at, in;                    /* the segment that is played, how much of it is done */
    size_t cut, left;                 /* after how many bytes of its own the player closes; that it has still to say */
    heap heap[2];
} session;

/* Their contexts' time, which a test may let pass at once. */
static int64_t skipped_us;
static int64_t skipping_clock(void *user) {
    (void)user;
    return test_now_us() + skipped_us;
}

/* Port 0, of a server: one that is free, which it returns; another program may be faster. */
static uint16_t end_open(session *s, int which, uint16_t port) {
    tprpc_context_desc context = {0};
    tprpc_store_desc desc = {0};
    tprpc_error error = {0};
    tprpc_status status;
    char url[64];
    desc.url = url;
    desc.serve = which == 1;
    desc.timeout_ms = WAIT_MS;
    context.transports = "tcp";
    context.clock_us = skipping_clock;
    context.allocator.alloc = heap_alloc;
    context.allocator.free = heap_free;
    context.allocator.user = &s->heap[which];
    REQUIRE_EQ_INT(tprpc_context_create(&context, &s->ctx[which], &error), TPRPC_OK);
    do {
        const uint16_t at = port ? port : socket_free_port();
        snprintf(url, sizeof url, "tcp://127.0.0.1:%d", at);
        status = tprpc_store_open(s->ctx[which], &desc, &s->store[which], &error);
        if (status == TPRPC_OK) return at;
    } while (!port && error.os_code == EADDRINUSE);
    fprintf(stderr, "%s\n", error.text);
    REQUIRE_EQ_INT(status, TPRPC_OK);
    return 0;
}

static void session_close(session *s) {
    for (int i = 0; i < 2; i++) {
        if (s->store[i]) tprpc_store_close(s->store[i]);
        if (s->ctx[i]) CHECK_EQ_INT(tprpc_context_destroy(s->ctx[i]), TPRPC_OK);
        CHECK_EQ_INT(s->heap[i].blocks, 0);
        if (s->fd[i] >= 0) close(s->fd[i]);
    }
    if (s->listener >= 0) close(s->listener);
    tape_free(&s->tape);
}

static void session_turn(session *s) {
    for (int i = 0; i < 2; i++)
        if (s->ctx[i]) tprpc_poll(s->ctx[i], TPRPC_NOW, 0);
    s->beside(s);
}

static int unblocked(int fd) {
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static tprpc_status client_step(session *s, const step *what) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    ended e = {0, NULL, TPRPC_PENDING};
    REQUIRE_EQ_INT(begin(s->store[0], what, &e), TPRPC_OK);
    session_turn(s);
    if (what->kind == TPRPC_STORE_GET) skipped_us += what->number * 1000;      /* it was asked; now it is late */
    while (!e.runs && test_now_us() < end) session_turn(s);
    REQUIRE_EQ_INT(e.runs, 1);
    for (int n = 0; n < 20; n++) session_turn(s);      /* what follows an outcome: an answer to a cancel */
    return e.status;
}

/* Does all steps, one after the other. */
static void client_steps(session *s) {
    for (int i = 0; i < STEPS; i++) client_step(s, &steps[i]);
}

/* ---- recording ---- */

static void proxy_turn(session *s) {
    uint8_t bytes[4096];
    if (s->fd[0] < 0) {
        s->fd[0] = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (s->fd[0] < 0) return;
        s->fd[1] = unblocked(socket_connect(s->server_port));
    }
    for (int way = 0; way < 2; way++) {
        ssize_t n = recv(s->fd[way], bytes, sizeof bytes, 0);
        if (n <= 0) continue;
        tape_add(&s->tape, way, bytes, (uint32_t)n);
        REQUIRE(send(s->fd[1 - way], bytes, (size_t)n, MSG_NOSIGNAL) == n);
    }
}

TEST(record) {
    session s;
    char path[300];
    memset(&s, 0, sizeof s);
    s.fd[0] = s.fd[1] = -1;
    s.beside = proxy_turn;
    uint16_t port;
    s.listener = unblocked(socket_listen(&port));
    s.server_port = end_open(&s, 1, 0);
    end_open(&s, 0, port);
    client_steps(&s);
    CHECK(s.tape.count > 2 * STEPS - 4);
    if (getenv("TPRPC_WIRE_RECORD")) tape_write(&s.tape, path_of(path, sizeof path, "store-1.0.tape"));
    session_close(&s);
}

/* ---- replaying: the tape stands in for one end; the other one must say what it said then, to the byte ---- */

static int played;

/* Whether a segment goes on so. A server's port, which a sentence may name, is another each time, of five digits. */
static bool goes_on(const segment *seg, size_t from, const uint8_t *bytes, size_t size) {
    static const char host[] = "127.0.0.1:";
    enum { HOST = sizeof host - 1, PORT = 5 };
    for (size_t i = 0; i < size; i++) {
        const size_t at = from + i;
        bool port = false;
        for (size_t back = HOST; back < HOST + PORT; back++)
            port |= at >= back && memcmp(seg->bytes + at - back, host, HOST) == 0;
        if (bytes[i] != seg->bytes[at] && !port)
            return !fprintf(stderr, "byte %d is 0x%02x, was 0x%02x\n", (int)at, bytes[i], seg->bytes[at]);
    }
    return true;
}

static void player_turn(session *s) {
    if (s->fd[0] < 0 && (s->fd[0] = accept4(s->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) < 0) return;
    while (s->at < s->tape.count && s->left > 0) {
        const segment *seg = &s->tape.all[s->at];
        static uint8_t bytes[SEGMENT_MOST];
        ssize_t n;
        if (seg->way == played) {
            const size_t rest = seg->size - s->in;
            n = send(s->fd[0], seg->bytes + s->in, rest < s->left ? rest : s->left, MSG_NOSIGNAL);
            if (n > 0) s->left -= (size_t)n;
        } else {
            n = recv(s->fd[0], bytes, seg->size - s->in, 0);
            REQUIRE(n != 0);                           /* the live end closed */
            if (n > 0 && !CHECK(goes_on(seg, s->in, bytes, (size_t)n)))
                fprintf(stderr, "in segment %d of the tape\n", (int)s->at);
        }
        if (n < 0) return;
        s->in += (size_t)n;
        if (s->in < seg->size) continue;
        s->at++;
        s->in = 0;
    }
}

static void replay_open(session *s, int way, size_t cut) {
    char path[300];
    memset(s, 0, sizeof *s);
    s->fd[0] = s->fd[1] = s->listener = -1;
    s->beside = player_turn;
    s->cut = s->left = cut;
    played = way;
    tape_read(&s->tape, path_of(path, sizeof path, "store-1.0.tape"));
}

/* As a later minor version would say it: with fields that this one does not know, behind those that it does. */
static void tape_make_later(tape *t, int way) {
    enum { MORE = 12 };
    size_t from = HELLO;
    for (size_t i = 0; i < t->count; i++) {
        segment old = t->all[i], *seg = &t->all[i];
        if (old.way != way) continue;
        seg->size = (uint32_t)from;
        seg->bytes = (uint8_t *)malloc(old.size + MORE * (1 + old.size / 48));
        REQUIRE(seg->bytes != NULL);
        memcpy(seg->bytes, old.bytes, from);
        if (from) seg->bytes[6] = 9, seg->bytes[12] = 1;       /* the hello: its minor version, and what it reserves */
        while (from < old.size) {
            const uint32_t rest = (uint32_t)(old.bytes[from] + 256 * old.bytes[from + 1]);
            memcpy(seg->bytes + seg->size, old.bytes + from, 4 + rest);
            seg->bytes[seg->size] = (uint8_t)(rest + MORE);
            seg->bytes[seg->size + 1] = (uint8_t)((rest + MORE) >> 8);
            memset(seg->bytes + seg->size + 4 + rest, 0xa5, MORE);
            seg->size += 4 + rest + MORE;
            from += 4 + rest;
        }
        REQUIRE_EQ_INT(from, old.size);
        free(old.bytes);
        from = 0;
    }
}

static void play_client(bool later) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    session s;
    replay_open(&s, 0, SIZE_MAX);
    if (later) tape_make_later(&s.tape, 0);
    uint16_t port = end_open(&s, 1, 0);
    s.fd[0] = unblocked(socket_connect(port));
    while (s.at < s.tape.count && test_now_us() < end) session_turn(&s);
    CHECK_EQ_INT(s.at, s.tape.count);
    session_close(&s);
}

static void play_server(bool later) {
    session s;
    replay_open(&s, 1, SIZE_MAX);
    if (later) tape_make_later(&s.tape, 1);
    uint16_t port;
    s.listener = unblocked(socket_listen(&port));
    end_open(&s, 0, port);
    client_steps(&s);
    CHECK_EQ_INT(s.at, s.tape.count);
    session_close(&s);
}

TEST(replay_client) { play_client(false); }
TEST(replay_server) { play_server(false); }
TEST(later_client) { play_client(true); }
TEST(later_server) { play_server(true); }

/* ---- a peer that goes away in the middle of a frame, of every kind, after each of its bytes ---- */

static size_t bytes_played(const session *s) {
    size_t size = 0;
    for (size_t i = 0; i < s->tape.count; i++)
        if (s->tape.all[i].way == played) size += s->tape.all[i].size;
    return size;
}

/* Closes, every other time with a reset, as when the process was killed with bytes unread. */
static void player_goes(session *s) {
    const struct linger now = {1, 0};
    if (s->cut % 2) REQUIRE(setsockopt(s->fd[0], SOL_SOCKET, SO_LINGER, &now, sizeof now) == 0);
    close(s->fd[0]);
    s->fd[0] = -1;
    was_cut = true;
}

/* The server gives back all that it had of the client, and serves the next. */
static bool cut_client(size_t cut) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    const int before = test_count_fds();
    session s;
    replay_open(&s, 0, cut);
    const bool more = cut < bytes_played(&s);
    uint16_t port = end_open(&s, 1, 0);
    const int fds = test_count_fds();
    s.fd[0] = unblocked(socket_connect(port));
    while (test_count_fds() < fds + 2 && test_now_us() < end) tprpc_poll(s.ctx[1], TPRPC_NOW, 0);
    while (s.left && s.at < s.tape.count && test_now_us() < end) session_turn(&s);
    player_goes(&s);
    while (test_count_fds() > fds && test_now_us() < end) tprpc_poll(s.ctx[1], TPRPC_NOW, 0);
    CHECK_EQ_INT(test_count_fds(), fds);
    was_cut = false;
    end_open(&s, 0, port);
    CHECK_EQ_INT(client_step(&s, &steps[0]), TPRPC_OK);
    session_close(&s);
    CHECK_EQ_INT(test_count_fds(), before);
    return more;
}

static void cut_turn(session *s) {
    player_turn(s);
    if (s->left || s->fd[0] < 0) return;
    player_goes(s);
    if (s->cut > HELLO) return;
    was_cut = false;                                   /* the next connection is served well */
    s->at = s->in = 0;
    s->left = SIZE_MAX;
}

/* A client that has not met its server, or no sooner than that one was gone, tries again. Later the operation that is
   under way ends, and those that follow make a new session, which is as the first. */
static bool cut_server(size_t cut) {
    const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
    const int before = test_count_fds();
    session s;
    replay_open(&s, 1, cut);
    const bool more = cut < bytes_played(&s);
    uint16_t port;
    s.beside = cut_turn;
    s.listener = unblocked(socket_listen(&port));
    end_open(&s, 0, port);
    const int fds = test_count_fds();
    for (int i = 0; i < STEPS && !was_cut; i++) client_step(&s, &steps[i]);
    CHECK_EQ_INT(was_cut, cut > HELLO);
    if (was_cut) {
        while (test_count_fds() > fds && test_now_us() < end) tprpc_poll(s.ctx[0], TPRPC_NOW, 0);
        was_cut = false;
        s.at = s.in = 0;
        s.left = s.cut = SIZE_MAX;
        client_steps(&s);
    }
    CHECK_EQ_INT(s.at, s.tape.count);
    session_close(&s);
    CHECK_EQ_INT(test_count_fds(), before);
    return more;
}

/* At each byte; at each fifth, which meets all fields in some frame, where that takes long. */
static void cut_at_all(bool (*cut_at)(size_t cut)) {
    size_t cut = 0;
    bool more = true;
    for (; more; cut += cut < 5 * HELLO || TEST_SLOWDOWN == 1 ? 1 : 5) {
        const int failed = harness_failures;
        more = cut_at(cut);
        if (harness_failures != failed) fprintf(stderr, "cut after %d bytes\n", (int)cut);
    }
    CHECK(cut > 40 * HELLO);
}

TEST(cut_client) { cut_at_all(cut_client); }
TEST(cut_server) { cut_at_all(cut_server); }

/* ---- a store's file ---- */

static size_t read_whole(const char *path, uint8_t *out, size_t room) {
    FILE *file = fopen(path, "rb");
    if (!file) fprintf(stderr, "%s: %s\n", path, strerror(errno));
    REQUIRE(file != NULL);
    size_t size = fread(out, 1, room, file);
    REQUIRE(size < room);
    fclose(file);
    return size;
}

static void write_whole(const char *path, const uint8_t *bytes, size_t size) {
    FILE *file = fopen(path, "wb");
    REQUIRE(file != NULL && fwrite(bytes, 1, size, file) == size && fclose(file) == 0);
}

/* A fixed order of writes makes a fixed file; the recorded one has the same. */
TEST(file) {
    static uint8_t mine[65536], theirs[65536];
    static const step after[] = {
        {TPRPC_STORE_GET, "a", "", "", 0, TPRPC_OK, "second", 0},
        {TPRPC_STORE_ADD, "n", "", "", 0, TPRPC_OK, "=", -2},
        {TPRPC_STORE_GET, "new", "", "", 0, TPRPC_OK, "made", 0},
        {TPRPC_STORE_GET, "empty", "", "", 0, TPRPC_ERROR_TIMEOUT, "", 0},
        {TPRPC_STORE_GET, "k\xc3\xa9y", "", "", 0, TPRPC_OK, "UTF-8", 0},
    };
    char path[2][256], url[300], recorded[300];
    size_t size = 0, old = 0;
    for (int pass = 0; pass < 2; pass++) {       /* the file that today's writes, then the recorded one */
        tprpc_context *ctx = NULL;
        tprpc_store *store = NULL;
        tprpc_store_desc desc = {0};
        const step *list = pass ? after : steps;
        const int count = pass ? (int)(sizeof after / sizeof after[0]) : STEPS;
        test_temp_path(path[pass], sizeof path[pass]);
        if (pass) write_whole(path[1], theirs, old);
        snprintf(url, sizeof url, "file://%s", path[pass]);
        desc.url = url;
        REQUIRE_EQ_INT(tprpc_context_create_for(NULL, sizeof(tprpc_context_desc), TPRPC_VERSION, &ctx, NULL), TPRPC_OK);
        REQUIRE_EQ_INT(tprpc_store_open(ctx, &desc, &store, NULL), TPRPC_OK);
        for (int i = 0; i < count; i++) {
            const int64_t end = test_now_us() + (int64_t)WAIT_MS * 1000;
            ended e = {0, NULL, TPRPC_PENDING};
            REQUIRE_EQ_INT(begin(store, &list[i], &e), TPRPC_OK);
            while (!e.runs && test_now_us() < end) tprpc_poll(ctx, 1000, 0);
            REQUIRE_EQ_INT(e.runs, 1);
        }
        tprpc_store_close(store);
        CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
        if (pass) continue;
        size = read_whole(path[0], mine, sizeof mine);
        if (getenv("TPRPC_WIRE_RECORD")) write_whole(path_of(recorded, sizeof recorded, "store-1.file"), mine, size);
        old = read_whole(path_of(recorded, sizeof recorded, "store-1.file"), theirs, sizeof theirs);
        CHECK_EQ_INT(size, old);
        CHECK_MEM(mine, theirs, size < old ? size : old);
    }
}
