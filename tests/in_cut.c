/* A peer that goes away in the middle of a frame, of every kind, at several places in it: by closing, and by SIGKILL.
   The peer is made by hand: a ghost, that speaks through a transport's own table and plays either end of a session
   (hello, a move to a better transport, the proof of channels, messages, bulk both ways, credit, bye) up to the cut.
   Its victim is a live end, which is told once, gives everything back, and serves the next. */
#include "harness.h"
#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include "pipe_common.h"

enum { BULK = 20000, FRAME = 32768 };

/* tcp a second time, so that a pipe can move from tcp to something better that is tcp too. */
static const tprpc_backend tcp2_backend = {sizeof(tprpc_backend), TPRPC_VERSION, "tcp2", "tcp, for tests.", 50,
    &tpr_tcp_table, NULL, NULL, NULL};
static const tprpc_backend *const backends[] = {&tcp2_backend};

typedef struct route { const char *name, *transports, *first, *better; } route;   /* better: NULL, it does not move */
static const route routes[] = {
    {"tcp", "tcp2,tcp", "tcp", "tcp2"}, {"moved", "shm,tcp", "tcp", "shm"}, {"shm", "shm", "shm", NULL}};

/* ---- memory that is counted ---- */

typedef struct heap { int64_t bytes, blocks; } heap;

static void *heap_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    void *ptr = NULL;
    (void)tag;
    if (posix_memalign(&ptr, align < sizeof ptr ? sizeof ptr : align, size ? size : 1) != 0) return NULL;
    ADD(((heap *)user)->bytes, (int64_t)size);
    ADD(((heap *)user)->blocks, 1);
    return ptr;
}

static void heap_free(void *ptr, size_t size, uint32_t tag, void *user) {
    (void)tag;
    ADD(((heap *)user)->bytes, -(int64_t)size);
    ADD(((heap *)user)->blocks, -1);
    free(ptr);
}

static tprpc_context *context_on(const route *r, heap *h) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    tprpc_error error;
    memset(&desc, 0, sizeof desc);
    memset(&error, 0, sizeof error);
    desc.backends = backends;
    desc.backend_count = 1;
    desc.transports = r->transports;
    desc.channels = "basic";
    if (h) {
        desc.allocator.alloc = heap_alloc;
        desc.allocator.free = heap_free;
        desc.allocator.user = h;
    }
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) fprintf(stderr, "context: %s\n", error.text);
    REQUIRE(ctx != NULL);
    return ctx;
}

/* ---- the ghost ---- */

typedef struct string {                /* one of its connections */
    tprpc_conn_owner owner;            /* first */
    struct ghost *ghost;
    const tprpc_transport_table *table;
    void *conn;
    bool  open, lost;
    uint8_t in[2 * FRAME];             /* received, from the beginning of a frame */
    size_t  have;
} string;

typedef struct ear { tprpc_listen_owner owner; struct ghost *ghost; int which; } ear;

typedef struct ghost {
    const route *r;
    bool listens, kills, splits;       /* splits: each frame comes in two pieces, with a while between */
    int    pause;
    size_t part;                       /* of the frame, sent */
    size_t cut_frame, cut_at;          /* which frame of its own is cut; how: see cut_size */
    tprpc_context *ctx;
    string strings[2];                 /* over the first transport; over the better one */
    ear    ears[2];
    void  *listeners[2];
    size_t sent;                       /* frames, whole */
    int    seen[16];                   /* frames of each kind that came */
    uint64_t bulk, message_cost;       /* bytes of bulk that came; of the message's frame */
    uint8_t token[16], nonce[16];      /* of the victim */
    char   address[TPR_WIRE_ADDRESS];  /* that the victim offers to move to */
    bool   over;
    uint8_t frame[FRAME];
    size_t  frame_size;
} ghost;

static const tpr_context_backend *entry_of(tprpc_context *ctx, const char *name) {
    for (uint32_t i = 0; i < ctx->backend_count; i++)
        if (strcmp(ctx->backends[i].backend->name, name) == 0) return &ctx->backends[i];
    REQUIRE(0);
    return NULL;
}

static void *instance_of(ghost *g, int which) {
    return entry_of(g->ctx, which ? g->r->better : g->r->first)->instances[0];
}

static const tprpc_transport_table *table_of(ghost *g, int which) {
    return entry_of(g->ctx, which ? g->r->better : g->r->first)->backend->transport;
}

/* What the ghost makes of a frame of the victim's. */
static void ghost_hears(ghost *g, const tpr_wire_frame *frame, const uint8_t *body) {
    static tpr_wire_hello hello;
    tpr_wire_move move;
    g->seen[frame->kind]++;
    if (frame->kind == TPR_WIRE_HELLO) {
        REQUIRE(tpr_wire_read_hello(body, frame->size, &hello));
        memcpy(g->token, hello.token, 16);
        for (uint32_t i = 0; i < hello.offer_count; i++)
            if (g->r->better && strcmp(hello.offers[i].name, g->r->better) == 0)
                memcpy(g->address, hello.offers[i].address, sizeof g->address);
    } else if (frame->kind == TPR_WIRE_MOVE) {
        REQUIRE(tpr_wire_read_move(body, frame->size, &move));
        memcpy(g->nonce, move.nonce, 16);
    } else if (frame->kind == TPR_WIRE_MESSAGE) {
        g->message_cost = TPR_WIRE_HEADER + frame->size;
    } else if (frame->kind == TPR_WIRE_DATA) {
        g->bulk += frame->size - TPR_WIRE_DATA_HEADER;
    }
}

static void string_event(tprpc_conn_owner *owner, uint32_t events, const tprpc_error *error) {
    string *s = (string *)(void *)owner;
    (void)error;
    if (events & TPRPC_EVENT_OPEN) s->open = true;
    while ((events & TPRPC_EVENT_RECV) && s->have < sizeof s->in) {
        tprpc_span span;
        tpr_wire_frame frame;
        span.data = s->in + s->have;
        span.size = sizeof s->in - s->have;
        size_t n = s->table->recv(s->conn, &span, 1);
        if (!n) break;
        s->have += n;
        while (s->have >= TPR_WIRE_HEADER) {
            REQUIRE(tpr_wire_get_frame(s->in, 1 << 20, &frame));
            size_t size = TPR_WIRE_HEADER + frame.size;
            if (s->have < size) break;
            ghost_hears(s->ghost, &frame, s->in + TPR_WIRE_HEADER);
            s->have -= size;
            memmove(s->in, s->in + size, s->have);
        }
    }
    if (events & TPRPC_EVENT_LOST) s->lost = true;
}

static void ear_accepted(tprpc_listen_owner *owner, void *conn) {
    ear *e = (ear *)(void *)owner;
    string *s = &e->ghost->strings[e->which];
    if (s->conn) {                     /* one is enough */
        s->table->disconnect(conn, TPRPC_ERROR_LIMIT);
        return;
    }
    s->conn = conn;
    s->open = true;
    s->table->own(conn, &s->owner);
}

static void ghost_frame(ghost *g, uint8_t kind, const tpr_wire_writer *w) {
    g->frame_size = (size_t)(w->at - g->frame);
    REQUIRE(!w->failed);
    tpr_wire_put_frame(g->frame, (uint32_t)(g->frame_size - TPR_WIRE_HEADER), kind, 0, 0);
}

static void ghost_builds_hello(ghost *g, tpr_wire_writer *w) {
    static tpr_wire_hello hello;
    memset(&hello, 0, sizeof hello);
    hello.major = TPR_WIRE_MAJOR;
    hello.minor = TPR_WIRE_MINOR;
    hello.message_bytes = 1 << 30;
    hello.metadata_bytes = 1 << 20;
    hello.tensors = 100;
    hello.window = 1 << 20;
    for (int i = 0; i < (g->r->better ? 3 : 2); i++) {
        tpr_wire_offer *offer = &hello.offers[hello.offer_count++];
        offer->channel = i == 0;
        snprintf(offer->name, sizeof offer->name, "%s", i == 0 ? "basic" : i == 1 ? g->r->first : g->r->better);
        if (i == 0) continue;
        offer->domain_size =
            (uint8_t)table_of(g, i - 1)->domain(instance_of(g, i - 1), offer->domain, sizeof offer->domain);
        if (i == 2 && g->listens) table_of(g, 1)->address(g->listeners[1], offer->address, sizeof offer->address);
    }
    tpr_wire_write_hello(w, &hello);
}

static void ghost_builds_agree(tpr_wire_writer *w, uint32_t step) {
    static tpr_wire_agree agree;
    memset(&agree, 0, sizeof agree);
    agree.step = step;
    agree.count = 1;
    snprintf(agree.proofs[0].name, sizeof agree.proofs[0].name, "basic");
    agree.proofs[0].verdict = true;
    tpr_wire_write_agree(w, &agree);
}

/* A payload, within the message or as transfer 1 of channel 0. */
static void ghost_builds_message(tpr_wire_writer *w, bool apart) {
    tpr_wire_message head;
    tpr_wire_item item;
    tpr_wire_transfer transfer;
    memset(&head, 0, sizeof head);
    memset(&item, 0, sizeof item);
    memset(&transfer, 0, sizeof transfer);
    head.metadata_size = 7;
    head.payloads = 1;
    head.transfers = apart;
    item.size = apart ? BULK : 5;
    item.metadata_size = 3;
    item.transfer = apart ? 0 : TPR_WIRE_INLINE;
    transfer.id = 1;
    tpr_wire_write_message(w, &head);
    tpr_wire_write_payload(w, &item);
    if (apart) tpr_wire_write_transfer(w, &transfer);
    tpr_wire_write_raw(w, "metadat" "met" "bytes", apart ? 10 : 15);
}

/* The ghost's frames in their order; what each waits for. */
enum { SAY_HELLO, SAY_MOVE, SAY_AGREE, SAY_AGREE_2, SAY_INLINE, SAY_APART, SAY_DATA, SAY_READY, SAY_CREDIT, SAY_BYE,
    SAY_ALL };
static const char *const says[] = {"HELLO", "MOVE or MOVED", "AGREE", "AGREE 2", "MESSAGE", "MESSAGE with a transfer",
    "DATA", "CHANNEL", "CREDIT", "BYE"};

static bool ghost_may(const ghost *g) {
    const int *seen = g->seen;
    switch (g->sent) {
    case SAY_HELLO: return g->strings[0].open && (!g->listens || seen[TPR_WIRE_HELLO]);
    case SAY_MOVE: return g->strings[1].open && seen[g->listens ? TPR_WIRE_MOVE : TPR_WIRE_HELLO];
    case SAY_AGREE:
        if (g->listens) return seen[TPR_WIRE_AGREE] > 0;
        return seen[g->r->better ? TPR_WIRE_MOVED : TPR_WIRE_HELLO] > 0;
    case SAY_AGREE_2: return seen[TPR_WIRE_AGREE] > (g->listens ? 1 : 0);
    case SAY_INLINE: return g->listens || seen[TPR_WIRE_AGREE] > 1;
    case SAY_DATA: return seen[TPR_WIRE_CHANNEL] > 0;
    case SAY_READY: return seen[TPR_WIRE_MESSAGE] > 0;
    case SAY_CREDIT: return g->bulk == BULK;
    default: return true;
    }
}

static void ghost_builds(ghost *g) {
    static const uint8_t kinds[] = {TPR_WIRE_HELLO, TPR_WIRE_MOVE, TPR_WIRE_AGREE, TPR_WIRE_AGREE, TPR_WIRE_MESSAGE,
        TPR_WIRE_MESSAGE, TPR_WIRE_DATA, TPR_WIRE_CHANNEL, TPR_WIRE_CREDIT, TPR_WIRE_BYE};
    static const uint8_t zeros[BULK];
    uint8_t kind = g->sent == SAY_MOVE && g->listens ? (uint8_t)TPR_WIRE_MOVED : kinds[g->sent];
    tpr_wire_writer w = tpr_wire_writer_of(g->frame + TPR_WIRE_HEADER, sizeof g->frame - TPR_WIRE_HEADER);
    tpr_wire_move move;
    switch (g->sent) {
    case SAY_HELLO: ghost_builds_hello(g, &w); break;
    case SAY_MOVE:
        memcpy(move.token, g->token, 16);
        memcpy(move.nonce, g->nonce, 16);
        tpr_wire_write_move(&w, &move);
        break;
    case SAY_AGREE: ghost_builds_agree(&w, g->listens ? 2 : 1); break;
    case SAY_AGREE_2: ghost_builds_agree(&w, g->listens ? 4 : 3); break;
    case SAY_INLINE: ghost_builds_message(&w, false); break;
    case SAY_APART: ghost_builds_message(&w, true); break;
    case SAY_DATA:                     /* transfer 1, offset 0 */
        tpr_wire_write_u64(&w, 1);
        tpr_wire_write_u64(&w, 0);
        tpr_wire_write_raw(&w, zeros, BULK);
        break;
    case SAY_READY:                    /* of basic's, for the victim's transfer 1 */
        tpr_wire_write_u64(&w, TPR_BATCH_READY);
        tpr_wire_write_u64(&w, 1);
        break;
    case SAY_CREDIT: tpr_wire_write_u64(&w, g->message_cost); break;
    default: tpr_wire_write_bye(&w, TPRPC_ERROR_CLOSED, ""); break;
    }
    ghost_frame(g, kind, &w);
}

/* Where a frame is cut: before it, in its header, behind that, in the middle, before its last byte; not at all. */
enum { CUTS = 6 };
static size_t cut_size(size_t how, size_t size) {
    const size_t at[CUTS] = {0, TPR_WIRE_HEADER - 1, TPR_WIRE_HEADER, size / 2, size - 1, size};
    return at[how];
}

static void ghost_goes(ghost *g) {
    for (int i = 0; i < 2; i++) {
        string *s = &g->strings[i];
        if (s->conn) s->table->disconnect(s->conn, TPRPC_OK);
        s->conn = NULL;
        if (g->listeners[i]) table_of(g, i)->unlisten(g->listeners[i]);
        g->listeners[i] = NULL;
    }
    g->over = true;
}

static void ghost_connects(ghost *g, int which, const char *address) {
    tprpc_error error;
    string *s = &g->strings[which];
    memset(&error, 0, sizeof error);
    if (table_of(g, which)->connect(instance_of(g, which), address, 0, &s->owner, &s->conn, &error) != TPRPC_OK)
        fprintf(stderr, "ghost: %s\n", error.text);
    REQUIRE(s->conn != NULL);
}

/* Says all that it may; under the lock of its loop. */
static void ghost_speaks(ghost *g) {
    for (;;) {
        if (g->sent == SAY_MOVE && !g->r->better) g->sent++;
        if (g->sent == SAY_MOVE && !g->listens && g->seen[TPR_WIRE_HELLO] && !g->strings[1].conn)
            ghost_connects(g, 1, g->address);
        if (g->sent == SAY_ALL || !ghost_may(g) || g->pause-- > 0) return;
        string *s = &g->strings[g->r->better && g->sent >= SAY_MOVE];
        tprpc_span span;
        ghost_builds(g);
        bool last = g->sent == g->cut_frame;
        span.data = g->frame + g->part;
        span.size = (last ? cut_size(g->cut_at, g->frame_size) : g->frame_size) - g->part;
        if (g->splits && !g->part) span.size /= 2;
        if (span.size) REQUIRE_EQ_INT(s->table->send(s->conn, &span, 1, NULL, 0, false), span.size);
        g->part += span.size;
        g->pause = g->splits ? 5 : 0;
        if (g->splits && g->part < g->frame_size) return;
        g->part = 0;
        if (last && g->kills) raise(SIGKILL);
        if (last) {
            ghost_goes(g);
            return;
        }
        if (g->sent == SAY_MOVE && g->listens) g->strings[0].lost = false;
        if (g->sent == SAY_AGREE && g->strings[1].conn && g->strings[0].conn && !g->listens) {
            g->strings[0].table->disconnect(g->strings[0].conn, TPRPC_OK);   /* it has moved */
            g->strings[0].conn = NULL;
        }
        g->sent++;
    }
}

/* Begins: connects to the address, or listens and says where. */
static void ghost_begins(ghost *g, char *address) {
    tpr_loop *loop;
    tprpc_error error;
    memset(&error, 0, sizeof error);
    g->ctx = context_on(g->r, NULL);
    loop = &g->ctx->loops[0];
    tpr_loop_enter(loop);
    for (int i = 0; i < (g->r->better ? 2 : 1); i++) {
        g->strings[i].owner.event = string_event;
        g->strings[i].ghost = g;
        g->strings[i].table = table_of(g, i);
        if (!g->listens) continue;
        g->ears[i].owner.accepted = ear_accepted;
        g->ears[i].ghost = g;
        g->ears[i].which = i;
        REQUIRE_EQ_INT(
            table_of(g, i)->listen(instance_of(g, i), "", &g->ears[i].owner, &g->listeners[i], &error), TPRPC_OK);
    }
    if (!g->listens) {
        ghost_connects(g, 0, strstr(address, "://") + 3);
    } else {
        char rest[TPR_WIRE_ADDRESS];
        table_of(g, 0)->address(g->listeners[0], rest, sizeof rest);
        snprintf(address, TPR_WIRE_ADDRESS + 20, "%s://%s", g->r->first, rest);
    }
    tpr_loop_leave(loop);
}

static void ghost_turn(ghost *g) {
    tprpc_poll(g->ctx, TPRPC_NOW, 0);
    tpr_loop_enter(&g->ctx->loops[0]);
    if (!g->over) ghost_speaks(g);
    tpr_loop_leave(&g->ctx->loops[0]);
}

static void ghost_ends(ghost *g) {
    tpr_loop_enter(&g->ctx->loops[0]);
    ghost_goes(g);
    tpr_loop_leave(&g->ctx->loops[0]);
    CHECK_EQ_INT(tprpc_context_destroy(g->ctx), TPRPC_OK);
}

/* In a process of its own, where it is killed. */
typedef struct haunt { ghost *g; char address[TPR_WIRE_ADDRESS + 20]; int ready, stop; } haunt;

static void haunt_run(void *arg) {
    haunt *h = (haunt *)arg;
    int64_t end = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    ghost_begins(h->g, h->address);
    STORE(h->ready, 1);
    while (test_now_us() < end && !LOAD(h->stop)) ghost_turn(h->g);
    _exit(1);                          /* it was not killed: it did not come to the cut */
}

/* ---- the victim ---- */

typedef struct victim {
    side s;
    bool listens, accepts;             /* accepts: has asked for a pipe */
    accepting accept;
    int  errors, read, written;
    tprpc_status status;               /* of the one error of its reads */
    char text[244];
    outcome write;
    uint8_t memory[BULK];
    heap *h;
} victim;

static void victim_reads(tprpc_status status, const tprpc_message *m, const tprpc_error *error, void *user) {
    victim *v = (victim *)user;
    CHECK_EQ_INT(status == TPRPC_OK, m != NULL);
    CHECK_EQ_INT(status == TPRPC_OK, error == NULL);
    if (status == TPRPC_OK) {
        v->read++;
        CHECK_EQ_INT(m->payload_count, 1);
        status = tprpc_pipe_read(v->s.pipe, NULL, victim_reads, v);
        if (status == TPRPC_OK) return;
    }
    v->status = status;
    if (error) memcpy(v->text, error->text, sizeof v->text);
    v->errors++;
}

/* A read that goes on, and a write that needs the peer's readiness. */
static void victim_works(victim *v) {
    tprpc_payload payload;
    tprpc_message m;
    memset(&payload, 0, sizeof payload);
    memset(&m, 0, sizeof m);
    payload.data = v->memory;
    payload.size = BULK;
    m.payloads = &payload;
    m.payload_count = 1;
    m.release = on_release;
    m.release_user = &v->write;
    tprpc_status status = tprpc_pipe_read(v->s.pipe, NULL, victim_reads, v);
    if (status != TPRPC_OK) {          /* it has ended by now */
        v->status = status;
        v->errors++;
    }
    status = tprpc_pipe_write(v->s.pipe, &m, on_written, &v->write);
    CHECK(status == TPRPC_OK || status == TPRPC_ERROR_PEER);
    v->written = status == TPRPC_OK;
}

static void victim_turn(victim *v) {
    work(&v->s);
    if (!v->listens || v->s.pipe || !LOAD(v->accept.o.runs)) return;
    REQUIRE_EQ_INT(v->accept.o.status, TPRPC_OK);
    v->s.pipe = v->accept.pipe;
    memset(&v->accept, 0, sizeof v->accept);
    v->accepts = false;
    victim_works(v);
}

/* One session that is cut, from whichever end; the victim's context lives on. */
static void session(victim *v, ghost *g) {
    int64_t end = test_now_us() + WAIT_S * INT64_C(1000000) * TEST_SLOWDOWN;
    haunt *h = (haunt *)mmap(NULL, sizeof(haunt), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child = -1;
    int status = 0;
    bool opens = g->cut_frame > SAY_AGREE_2 || (g->cut_frame == SAY_AGREE_2 && g->cut_at == CUTS - 1);
    REQUIRE(h != MAP_FAILED);
    memset(&v->write, 0, sizeof v->write);
    v->s.pipe = NULL;
    v->errors = v->read = v->written = 0;
    v->status = TPRPC_OK;
    h->g = g;
    if (v->listens) {
        snprintf(h->address, sizeof h->address, "%s", tprpc_listener_address(v->s.listener, NULL));
        if (!v->accepts) CHECK_EQ_INT(tprpc_accept(v->s.listener, on_accepted, &v->accept), TPRPC_OK);
        v->accepts = true;             /* what nothing came of is still there for the next */
    }
    if (g->kills) {
        child = test_fork_run(haunt_run, h);
        while (!LOAD(h->ready) && test_now_us() < end) work(&v->s);
    } else {
        ghost_begins(g, h->address);
    }
    if (!v->listens) {
        v->s.pipe = connect_to(v->s.ctx, h->address, 0, 0);
        victim_works(v);
    }
    while (!g->kills && !g->over) {
        REQUIRE(test_now_us() < end);
        ghost_turn(g);
        victim_turn(v);
    }
    if (g->kills) {
        while (waitpid(child, &status, WNOHANG) == 0) {
            if (test_now_us() > end) kill(child, SIGTERM);
            victim_turn(v);
        }
        CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    }
    /* What it hears of it: an error, once, if there was a pipe to hear of. */
    if (v->listens && opens) while (!v->s.pipe && test_now_us() < end) victim_turn(v);
    if (v->listens && !opens) idle(&v->s, 2000);
    CHECK_EQ_INT(v->s.pipe != NULL, !v->listens || opens);
    if (v->s.pipe) {
        while ((!v->errors || (v->written && !LOAD(v->write.runs))) && test_now_us() < end) work(&v->s);
        idle(&v->s, 500);
        CHECK_EQ_INT(v->errors, 1);
        if (!CHECK_EQ_INT(v->status, TPRPC_ERROR_PEER)) fprintf(stderr, "%s\n", v->text);
        CHECK_EQ_INT(v->write.runs, v->written);
        CHECK_EQ_INT(v->write.releases, 1);
        if (v->written && g->cut_frame < SAY_READY) CHECK_EQ_INT(v->write.status, TPRPC_ERROR_PEER);
        if (g->cut_frame > SAY_DATA) CHECK_EQ_INT(v->read, 2);
        CHECK_EQ_INT(tprpc_pipe_read(v->s.pipe, NULL, victim_reads, v), TPRPC_ERROR_PEER);
        CHECK_EQ_INT(v->errors, 1);
        tprpc_pipe_close(v->s.pipe);
    }
    if (!g->kills) ghost_ends(g);
    munmap(h, sizeof *h);
}

/* The victim's accept is still there when nothing came of a session: a good one takes it. */
static void session_cut(victim *v, const route *r, size_t frame, size_t how, bool kills, bool splits) {
    ghost *g = (ghost *)calloc(1, sizeof(ghost));
    REQUIRE(g != NULL);
    g->splits = splits;
    g->r = r;
    g->listens = !v->listens;
    g->kills = kills;
    g->cut_frame = frame;
    g->cut_at = how;
    int before = harness_failures;
    session(v, g);
    if (harness_failures != before)
        fprintf(stderr, "cut in %s, place %d, %s\n", says[frame], (int)how, kills ? "killed" : "closed");
    free(g);
}

static void cut_all(const route *r, bool listens, bool kills) {
    victim *v = (victim *)calloc(1, sizeof(victim));
    heap h = {0, 0};
    int fds = 0, before = test_count_fds();
    int64_t bytes = 0;
    REQUIRE(v != NULL);
    v->listens = listens;
    v->s.ctx = context_on(r, &h);
    if (listens) v->s.listener = listen_on(v->s.ctx, strcmp(r->first, "tcp") ? "shm://" : "tcp://127.0.0.1:0", 0);
    for (int splits = 0; splits < 2; splits++) {     /* whole ones: the ghost can speak, and all is warm */
        session_cut(v, r, SAY_BYE, CUTS - 1, false, splits);
        CHECK_CONTAINS(v->text, "closed the pipe");
    }
    for (int round = 0; round < 2; round++) {
        for (size_t frame = 0; frame < SAY_ALL; frame++) {
            for (size_t how = kills ? 1 : 0; how < CUTS - (kills ? 1 : 0); how += kills ? 2 : 1) {
                if (frame == SAY_MOVE && !r->better) continue;
                session_cut(v, r, frame, how, kills, false);
            }
        }
        session_cut(v, r, SAY_BYE, CUTS - 1, false, false);
        CHECK_CONTAINS(v->text, "closed the pipe");
        idle(&v->s, 2000);
        CHECK_EQ_INT(LOAD(v->s.ctx->pipes), 0);
        if (round == 0) fds = test_count_fds(), bytes = LOAD(h.bytes);
    }
    CHECK_LE_INT(test_count_fds(), fds);
    CHECK_LE_INT(LOAD(h.bytes), bytes);              /* what it keeps to use again, and no more */
    if (v->s.listener) tprpc_listener_close(v->s.listener);
    CHECK_EQ_INT(tprpc_context_destroy(v->s.ctx), TPRPC_OK);
    CHECK_EQ_INT(h.bytes, 0);
    CHECK_EQ_INT(h.blocks, 0);
    CHECK_EQ_INT(test_count_fds(), before);
    free(v);
}

typedef struct variant { const route *r; bool listens, kills; } variant;
static void variant_run(void *arg) {
    variant *v = (variant *)arg;
    cut_all(v->r, v->listens, v->kills);
}

TESTS(cuts) {
    for (size_t i = 0; i < COUNT(routes); i++)
        for (int k = 0; k < 4; k++) {
            variant *v = (variant *)calloc(1, sizeof(variant));
            char name[80];
            if (!v) abort();
            v->r = &routes[i];
            v->listens = k % 2 == 0;
            v->kills = k / 2;
            snprintf(name, sizeof name, "%s.%s.%s", v->kills ? "killed" : "closed", routes[i].name,
                v->listens ? "listening" : "connecting");
            test_add(name, variant_run, v, 60);
        }
}
