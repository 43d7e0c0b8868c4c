/* The network and the store of the simulation: a transport and a store of a user's, registered through the public
   tables. A connection is a wire with a lane each way; a lane is a queue of chunks, each with the moment it arrives. */
#ifndef TPRPC_TESTS_SIM_NET_H
#define TPRPC_TESTS_SIM_NET_H

#include "sim_world.h"

enum { SIM_NAME = 32, SIM_KEYS = 256, SIM_DEAD_AFTER_S = 30 };

/* ---- the weather: what the seed makes of it ---- */

static struct {
    int64_t delay_us, jitter_us;       /* each chunk: the first, and up to the second */
    int64_t split;                     /* of 1,000 sends: cut into pieces */
    int64_t tiny;                      /* of 1,000 splits: into pieces of a few bytes */
    int64_t window;                    /* bytes that a lane holds */
    int64_t slow;                      /* of 1,000 chunks: up to 300 ms late */
    int64_t store_us;                  /* a store's answer, at most */
    int64_t store_slow, store_error;   /* of 1,000 operations */
    bool    mended;                    /* the store errs no more */
} sim_net_is;

/* ---- the transport ---- */

typedef struct sim_chunk { struct sim_chunk *next; int64_t at; size_t size, used; uint8_t bytes[1]; } sim_chunk;

typedef struct sim_lane {              /* from one end to the other */
    sim_chunk *flying, **fly_last;     /* on their way */
    sim_chunk *here, **here_last;      /* arrived, not consumed */
    int64_t    held, last_at;          /* bytes of both; when the last chunk arrives */
    int64_t    blocked_since;          /* 0: not */
    bool       ticking, ends;          /* an event is on its way; the sender has disconnected */
} sim_lane;

typedef struct sim_wire {
    struct sim_conn *ends[2];
    sim_node *nodes[2];
    uint32_t  lives[2];
    sim_lane  lanes[2];
    int       refs;
    int32_t   place;                   /* in the list of all, -1: in none */
    int64_t   stalled_until;
    bool      broken;
    char      name[SIM_NAME];          /* what was connected to */
} sim_wire;

typedef struct sim_conn {
    struct sim_conn  *next;            /* of its instance, or of its listener before it is accepted */
    struct sim_net   *net;
    sim_wire         *wire;
    tprpc_conn_owner *owner;
    uint32_t          due;             /* TPRPC_EVENT_* for the owner */
    int               side;
    bool              wants_room, closed, refused, lost;
} sim_conn;

typedef struct sim_listener {
    struct sim_listener *next;         /* of the simulation */
    struct sim_net      *net;
    tprpc_listen_owner  *owner;
    sim_conn            *waiting;
    char                 name[SIM_NAME];
} sim_listener;

typedef struct sim_net {               /* an instance */
    tprpc_context *context;
    sim_node      *node;
    sim_conn      *conns;
    bool           walking, has_due;
    uint32_t       names;
} sim_net;

static sim_listener *sim_listeners;
static sim_wire **sim_wires;           /* that are not broken */
static int32_t sim_wire_count, sim_wire_room;
static int64_t sim_conns_alive;
static sim_node *sim_opening;          /* whose context is being created */
static bool sim_repeats;               /* RECV again until all is consumed */

static void sim_wire_list(sim_wire *wire) {
    if (sim_wire_count == sim_wire_room) {
        sim_wire_room = sim_wire_room ? 2 * sim_wire_room : 256;
        sim_wires = (sim_wire **)realloc(sim_wires, (size_t)sim_wire_room * sizeof *sim_wires);
        if (!sim_wires) sim_fail("the simulation has no memory");
    }
    wire->place = sim_wire_count;
    sim_wires[sim_wire_count++] = wire;
}

static void sim_wire_unlist(sim_wire *wire) {
    if (wire->place < 0) return;
    sim_wires[wire->place] = sim_wires[--sim_wire_count];
    sim_wires[wire->place]->place = wire->place;
    wire->place = -1;
}

static void sim_chunks_free(sim_chunk *chunk) {
    while (chunk) {
        sim_chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
}

static void sim_wire_unref(sim_wire *wire) {
    int i;
    if (--wire->refs > 0) return;
    sim_wire_unlist(wire);
    for (i = 0; i < 2; i++) {
        sim_chunks_free(wire->lanes[i].flying);
        sim_chunks_free(wire->lanes[i].here);
    }
    free(wire);
}

static void sim_due(sim_conn *conn, uint32_t events) {
    if (conn->net->node->dying) return;            /* the dead hear nothing */
    conn->due |= events;
    conn->net->has_due = true;
    sim_wake(conn->net->node);
}

/* Whether nothing gets through between the wire's ends now. */
static bool sim_blocked(const sim_wire *wire) {
    return wire->stalled_until > sim.now || (sim.partitioned && wire->nodes[0]->side != wire->nodes[1]->side);
}

static int64_t sim_delay(void) {
    int64_t delay = sim_net_is.delay_us + sim_spread(sim_net_is.jitter_us);
    if (sim_net_is.slow && sim_chance(sim_net_is.slow)) {
        sim_count(SIM_fault_delay);
        delay += sim_below(300 * SIM_MS);
    }
    return delay;
}

static void sim_lost_event(void *arg, uint64_t side) {
    sim_wire *wire = (sim_wire *)arg;
    sim_conn *conn = wire->ends[side];
    if (conn && !conn->lost) {
        conn->lost = true;
        sim_note(conn->net->node->index, "lost", (int64_t)side, 0, 0);
        sim_due(conn, TPRPC_EVENT_LOST);
    }
    sim_wire_unref(wire);
}

static void sim_tell_lost(sim_wire *wire, int side, int64_t delay) {
    wire->refs++;
    sim_after(delay, sim_lost_event, wire, (uint64_t)side);
}

/* Both ends lose it, each at its moment; what flies is lost. */
static void sim_break(sim_wire *wire, int64_t delay_0, int64_t delay_1) {
    int i;
    if (wire->broken) return;
    wire->broken = true;
    sim_wire_unlist(wire);
    for (i = 0; i < 2; i++) {
        sim_chunk *chunk;
        for (chunk = wire->lanes[i].flying; chunk; chunk = chunk->next)
            wire->lanes[i].held -= (int64_t)(chunk->size - chunk->used);
        sim_chunks_free(wire->lanes[i].flying);
        wire->lanes[i].flying = NULL;
        wire->lanes[i].fly_last = &wire->lanes[i].flying;
    }
    sim_tell_lost(wire, 0, delay_0);
    sim_tell_lost(wire, 1, delay_1);
}

static void sim_lane_event(void *arg, uint64_t index);

static void sim_lane_tick(sim_wire *wire, uint64_t index, int64_t at) {
    sim_lane *lane = &wire->lanes[index];
    if (lane->ticking || !wire->nodes[1]) return;  /* before it is connected nothing flies */
    lane->ticking = true;
    wire->refs++;
    sim_at(at, sim_lane_event, wire, index);
}

/* What has arrived by now is shown to the receiver. */
static void sim_lane_event(void *arg, uint64_t index) {
    sim_wire *wire = (sim_wire *)arg;
    sim_lane *lane = &wire->lanes[index];
    sim_conn *to = wire->ends[1 - index];
    bool any = false;
    lane->ticking = false;
    if (!wire->broken && sim_blocked(wire)) {      /* sent again and again, until the sender takes it for dead */
        if (!lane->blocked_since) lane->blocked_since = sim.now;
        if (sim.now - lane->blocked_since > SIM_DEAD_AFTER_S * SIM_S) {
            sim_note(wire->nodes[index]->index, "silent", wire->nodes[1 - index]->index, 0, 0);
            sim_break(wire, sim_below(SIM_S), sim_below(SIM_S));
        } else {
            sim_lane_tick(wire, index, sim.now + sim_between(50, 400) * SIM_MS);
        }
        sim_wire_unref(wire);
        return;
    }
    lane->blocked_since = 0;
    while (lane->flying && lane->flying->at <= sim.now) {
        sim_chunk *chunk = lane->flying;
        lane->flying = chunk->next;
        if (!lane->flying) lane->fly_last = &lane->flying;
        chunk->next = NULL;
        *lane->here_last = chunk;
        lane->here_last = &chunk->next;
        any = true;
    }
    if (any && to) {
        sim_note(to->net->node->index, "arrives", wire->nodes[index]->index, lane->held, 0);
        sim_due(to, TPRPC_EVENT_RECV);
    }
    if (lane->flying) sim_lane_tick(wire, index, lane->flying->at);
    else if (lane->ends && !wire->broken) sim_tell_lost(wire, 1 - (int)index, 0);
    sim_wire_unref(wire);
}

static tprpc_status sim_net_open(const tprpc_host *host, void *user, void **instance, tprpc_error *error) {
    sim_net *net = (sim_net *)sim_new(sizeof *net);
    (void)user;
    (void)error;
    net->context = host->context;
    net->node = sim_opening;
    net->node->net = net;
    *instance = net;
    return TPRPC_OK;
}

static void sim_sweep(sim_net *net) {
    sim_conn **at = &net->conns;
    while (*at) {
        sim_conn *conn = *at;
        if (!conn->closed) {
            at = &conn->next;
            continue;
        }
        *at = conn->next;
        sim_conns_alive--;
        free(conn);
    }
}

static void sim_net_close(void *instance) {
    sim_net *net = (sim_net *)instance;
    sim_listener *listener;
    sim_sweep(net);
    if (net->conns) sim_fail("an instance is closed before its connections");
    for (listener = sim_listeners; listener; listener = listener->next)
        if (listener->net == net) sim_fail("an instance is closed before its listener %s", listener->name);
    net->node->net = NULL;
    free(net);
}

static size_t sim_domain(void *instance, uint8_t *out, size_t capacity) {
    (void)instance;
    if (capacity < 3) return 0;
    memcpy(out, "sim", 3);
    return 3;
}

static bool sim_reaches(void *instance, const uint8_t *domain, size_t size) {
    (void)instance;
    return size == 3 && memcmp(domain, "sim", 3) == 0;
}

static bool sim_tell(sim_conn *conn) {
    tprpc_error error;
    uint32_t due = conn->due & ~(uint32_t)TPRPC_EVENT_LOST;
    if (conn->closed || !conn->owner) return false;
    if (!due) due = conn->due;                     /* LOST comes after all others */
    conn->due &= ~due;
    if (sim_repeats && !conn->closed && conn->wire->lanes[1 - conn->side].here && due != TPRPC_EVENT_LOST)
        due |= TPRPC_EVENT_RECV;
    if (!due) return false;
    if (due == TPRPC_EVENT_LOST && conn->refused)
        tprpc_error_set(&error, TPRPC_ERROR_UNREACHABLE, 0, "sim: nobody listens on %s", conn->wire->name);
    else if (due == TPRPC_EVENT_LOST)
        tprpc_error_set(&error, TPRPC_ERROR_PEER, 0, "sim: the connection to %s was lost", conn->wire->name);
    conn->owner->event(conn->owner, due, due == TPRPC_EVENT_LOST ? &error : NULL);
    return true;
}

static bool sim_progress(void *instance) {
    sim_net *net = (sim_net *)instance;
    sim_listener *listener;
    sim_conn *conn;
    bool did = false, again = true;
    if (!net->has_due) return false;
    net->has_due = false;
    net->walking = true;
    for (listener = sim_listeners; listener; listener = again ? listener->next : sim_listeners) {
        again = true;
        if (listener->net != net || !listener->waiting) continue;
        sim_conn **at = &listener->waiting;        /* the oldest; the list may change meanwhile */
        while ((*at)->next) at = &(*at)->next;
        conn = *at;
        *at = NULL;
        conn->next = net->conns;
        net->conns = conn;
        did = true;
        again = false;
        listener->owner->accepted(listener->owner, conn);
    }
    for (conn = net->conns; conn; conn = conn->next) {
        did |= sim_tell(conn);
        if (conn->due && conn->owner && !conn->closed) net->has_due = true;
    }
    net->walking = false;
    sim_sweep(net);
    return did;
}

static bool sim_arm(void *instance, int64_t *deadline_us) {
    (void)deadline_us;
    return !((sim_net *)instance)->has_due;
}

static sim_listener *sim_find_listener(const char *name) {
    sim_listener *listener = sim_listeners;
    while (listener && strcmp(listener->name, name) != 0) listener = listener->next;
    return listener;
}

/* A worker that comes back listens where it did before, as one with a fixed port does. */
static tprpc_status sim_listen(void *instance, const char *address, tprpc_listen_owner *owner, void **listener,
                               tprpc_error *error) {
    sim_net *net = (sim_net *)instance;
    sim_listener *self = (sim_listener *)sim_new(sizeof *self);
    self->net = net;
    self->owner = owner;
    if (address[0]) snprintf(self->name, sizeof self->name, "%.31s", address);
    else snprintf(self->name, sizeof self->name, "%s-%u", net->node->name, ++net->names);
    if (sim_find_listener(self->name)) {
        free(self);
        return tprpc_error_set(error, TPRPC_ERROR_UNREACHABLE, EADDRINUSE, "sim: %s is in use", address);
    }
    self->next = sim_listeners;
    sim_listeners = self;
    *listener = self;
    return TPRPC_OK;
}

static size_t sim_text(const char *text, char *out, size_t capacity) {
    int n = snprintf(out, capacity, "%s", text);
    return n < 0 ? 0 : (size_t)n;
}

static size_t sim_address(void *listener, char *out, size_t capacity) {
    return sim_text(((sim_listener *)listener)->name, out, capacity);
}

/* This end is over: what was taken is still delivered, then the other end learns of it. Of a worker that was killed
   nothing more leaves, and its peers learn of it now or later. */
static void sim_conn_leave(sim_conn *conn) {
    sim_wire *wire = conn->wire;
    sim_lane *out = &wire->lanes[conn->side];
    conn->closed = true;
    wire->ends[conn->side] = NULL;
    if (!wire->broken && !wire->ends[1 - conn->side] && wire->nodes[1]) sim_wire_unlist(wire);
    if (!wire->broken && !conn->net->node->dying) {
        out->ends = true;
        sim_lane_tick(wire, (uint64_t)conn->side,
                      out->flying ? out->flying->at : sim.now + sim_net_is.delay_us);
    }
    sim_wire_unref(wire);
}

static void sim_unlisten(void *listener) {
    sim_listener *self = (sim_listener *)listener, **at = &sim_listeners;
    while (*at != self) at = &(*at)->next;
    *at = self->next;
    while (self->waiting) {
        sim_conn *conn = self->waiting;
        self->waiting = conn->next;
        sim_conn_leave(conn);
        sim_conns_alive--;
        free(conn);
    }
    free(self);
}

static bool sim_public_address(void *instance, const char *address) {
    (void)instance;
    (void)address;
    return false;
}

static sim_conn *sim_conn_new(sim_net *net, sim_wire *wire, int side, tprpc_conn_owner *owner) {
    sim_conn *conn = (sim_conn *)sim_new(sizeof *conn);
    conn->net = net;
    conn->wire = wire;
    conn->side = side;
    conn->owner = owner;
    wire->ends[side] = conn;
    wire->nodes[side] = net->node;
    wire->lives[side] = net->node->life;
    wire->refs++;
    sim_conns_alive++;
    return conn;
}

static sim_node *sim_node_of_name(const char *name) {
    int index = name[0] == 'w' ? atoi(name + 1) : -1;
    return index >= 0 && index < sim.count ? &sim.nodes[index] : NULL;
}

static void sim_opened_event(void *arg, uint64_t value) {
    sim_wire *wire = (sim_wire *)arg;
    (void)value;
    if (wire->ends[0] && !wire->ends[0]->lost) sim_due(wire->ends[0], TPRPC_EVENT_OPEN);
    sim_wire_unref(wire);
}

/* Somebody knocks. */
static void sim_knock_event(void *arg, uint64_t tries) {
    sim_wire *wire = (sim_wire *)arg;
    sim_listener *listener = sim_find_listener(wire->name);
    sim_node *node = sim_node_of_name(wire->name);
    if (!wire->ends[0] || wire->broken) {
        sim_wire_unref(wire);
    } else if (node && sim.partitioned && node->side != wire->nodes[0]->side && tries < 20) {
        sim_after(sim_between(200, 1500) * SIM_MS, sim_knock_event, wire, tries + 1);
    } else if (!listener || listener->net->node->dying) {
        sim_count(SIM_fault_refused);
        sim_note(wire->nodes[0]->index, "refused", node ? node->index : -1, 0, 0);
        wire->ends[0]->refused = true;
        sim_tell_lost(wire, 0, sim_delay());
        sim_wire_unref(wire);
    } else {
        sim_conn *conn = sim_conn_new(listener->net, wire, 1, NULL);
        conn->next = listener->waiting;
        listener->waiting = conn;
        listener->net->has_due = true;
        sim_note(wire->nodes[0]->index, "reaches", listener->net->node->index, 0, 0);
        sim_wake(listener->net->node);
        sim_wire_list(wire);
        if (wire->lanes[0].flying) sim_lane_tick(wire, 0, wire->lanes[0].flying->at);
        sim_after(sim_delay(), sim_opened_event, wire, 0);
    }
}

static tprpc_status sim_connect(void *instance, const char *address, uint32_t lane, tprpc_conn_owner *owner,
                                void **conn, tprpc_error *error) {
    sim_net *net = (sim_net *)instance;
    sim_wire *wire = (sim_wire *)sim_new(sizeof *wire);
    sim_conn *self;
    int i;
    (void)lane;
    (void)error;
    wire->place = -1;
    for (i = 0; i < 2; i++) {
        wire->lanes[i].fly_last = &wire->lanes[i].flying;
        wire->lanes[i].here_last = &wire->lanes[i].here;
    }
    snprintf(wire->name, sizeof wire->name, "%.31s", address);
    self = sim_conn_new(net, wire, 0, owner);
    self->next = net->conns;
    net->conns = self;
    wire->refs++;
    sim_after(sim_delay(), sim_knock_event, wire, 0);
    *conn = self;
    return TPRPC_OK;
}

static void sim_own(void *conn, tprpc_conn_owner *owner) {
    sim_conn *self = (sim_conn *)conn;
    self->owner = owner;
    if (self->wire->lanes[1 - self->side].here) self->due |= TPRPC_EVENT_RECV;
    if (!self->due) return;
    self->net->has_due = true;
    sim_wake(self->net->node);
}

/* How many bytes the next piece has. */
static size_t sim_piece(size_t left) {
    if (left < 2 || !sim_chance(sim_net_is.split)) return left;
    sim_count(SIM_fault_split);
    if (sim_chance(sim_net_is.tiny)) return (size_t)sim_between(1, left < 16 ? (int64_t)left : 16);
    return (size_t)sim_between(1, (int64_t)left);
}

static size_t sim_send(void *conn, const tprpc_span *spans, size_t count, const intptr_t *handles, size_t handle_count,
                       bool more) {
    sim_conn *self = (sim_conn *)conn;
    sim_wire *wire = self->wire;
    sim_lane *lane = &wire->lanes[self->side];
    size_t total = 0, taken = 0, room, i;
    (void)handles;
    (void)handle_count;
    (void)more;
    for (i = 0; i < count; i++) total += spans[i].size;
    if (self->lost || wire->broken || self->net->node->dying || (wire->nodes[1] && !wire->ends[1 - self->side]))
        return total;                              /* a broken connection takes everything */
    room = lane->held < sim_net_is.window ? (size_t)(sim_net_is.window - lane->held) : 0;
    for (i = 0; i < count && room > 0; i++) {
        const uint8_t *from = (const uint8_t *)spans[i].data;
        size_t left = spans[i].size < room ? spans[i].size : room;
        room -= left;
        taken += left;
        while (left > 0) {
            size_t size = sim_piece(left);
            sim_chunk *chunk = (sim_chunk *)malloc(sizeof *chunk + size);
            int64_t at = sim.now + sim_delay();
            if (!chunk) sim_fail("the simulation has no memory");
            if (at < lane->last_at) at = lane->last_at;
            lane->last_at = at;
            chunk->next = NULL;
            chunk->at = at;
            chunk->size = size;
            chunk->used = 0;
            memcpy(chunk->bytes, from, size);
            *lane->fly_last = chunk;
            lane->fly_last = &chunk->next;
            lane->held += (int64_t)size;
            from += size;
            left -= size;
        }
    }
    if (taken < total) {
        sim_count(SIM_fault_full);
        self->wants_room = true;
    }
    if (lane->flying) sim_lane_tick(wire, (uint64_t)self->side, lane->flying->at);
    return taken;
}

static tprpc_span sim_peek(void *conn) {
    sim_conn *self = (sim_conn *)conn;
    sim_chunk *chunk = self->wire->lanes[1 - self->side].here;
    tprpc_span span = {NULL, 0};
    if (!chunk) return span;
    span.data = chunk->bytes + chunk->used;
    span.size = chunk->size - chunk->used;
    return span;
}

static void sim_room_event(void *arg, uint64_t side) {
    sim_wire *wire = (sim_wire *)arg;
    sim_conn *conn = wire->ends[side];
    if (conn && !conn->lost && !conn->closed) sim_due(conn, TPRPC_EVENT_SEND);
    sim_wire_unref(wire);
}

static void sim_consume(void *conn, size_t size) {
    sim_conn *self = (sim_conn *)conn;
    sim_wire *wire = self->wire;
    sim_lane *lane = &wire->lanes[1 - self->side];
    sim_conn *other = wire->ends[1 - self->side];
    lane->held -= (int64_t)size;
    while (size > 0) {
        sim_chunk *chunk = lane->here;
        size_t n;
        if (!chunk) sim_fail("more is consumed than was shown");
        n = chunk->size - chunk->used < size ? chunk->size - chunk->used : size;
        chunk->used += n;
        size -= n;
        if (chunk->used < chunk->size) break;
        lane->here = chunk->next;
        if (!lane->here) lane->here_last = &lane->here;
        free(chunk);
    }
    if (!other || !other->wants_room || lane->held > sim_net_is.window / 2) return;
    other->wants_room = false;
    wire->refs++;
    sim_after(sim_net_is.delay_us, sim_room_event, wire, (uint64_t)other->side);
}

static size_t sim_recv(void *conn, const tprpc_span *spans, size_t count) {
    size_t got = 0, i;
    for (i = 0; i < count; i++) {
        uint8_t *to = (uint8_t *)spans[i].data;
        size_t left = spans[i].size;
        while (left > 0) {
            tprpc_span span = sim_peek(conn);
            size_t n = span.size < left ? span.size : left;
            if (n == 0) return got;
            memcpy(to, span.data, n);
            sim_consume(conn, n);
            to += n;
            left -= n;
            got += n;
        }
    }
    return got;
}

static size_t sim_take_handles(void *conn, intptr_t *out, size_t capacity) {
    (void)conn;
    (void)out;
    (void)capacity;
    return 0;
}

static size_t sim_peer(void *conn, char *out, size_t capacity) {
    return sim_text(((sim_conn *)conn)->wire->name, out, capacity);
}

static tprpc_status sim_check_peer(void *conn, tprpc_error *error) {
    (void)conn;
    (void)error;
    return TPRPC_OK;
}

static void sim_disconnect(void *conn, tprpc_status cause) {
    sim_conn *self = (sim_conn *)conn;
    sim_net *net = self->net;
    (void)cause;
    if (self->closed) sim_fail("a connection is ended twice");
    sim_conn_leave(self);
    if (!net->walking) sim_sweep(net);
}

static const tprpc_transport_table sim_table = {
    (uint32_t)sizeof(tprpc_transport_table), 0, sim_net_open, sim_net_close, sim_domain, sim_reaches, sim_progress,
    sim_arm, NULL, sim_listen, sim_address, sim_unlisten, sim_public_address, sim_connect, sim_own, sim_send, sim_peek,
    sim_consume, sim_recv, sim_take_handles, sim_peer, sim_check_peer, NULL,
    sim_disconnect,
};

static const tprpc_backend sim_backend = {(uint32_t)sizeof(tprpc_backend), TPRPC_VERSION, "sim",
                                          "A simulated network, for tests.", 5000, &sim_table, NULL, NULL, NULL};

/* Of a worker that was killed: each of its peers learns of it now, later, or much later. */
static void sim_cut_off(sim_node *node) {
    int32_t i = 0;
    while (i < sim_wire_count) {
        sim_wire *wire = sim_wires[i];
        int side = wire->nodes[0] == node ? 0 : wire->nodes[1] == node ? 1 : -1;
        if (side < 0 || wire->nodes[0] == wire->nodes[1]) {
            i++;
            continue;
        }
        int64_t delay = sim_below(50 * SIM_MS);
        if (sim_chance(300)) {
            sim_count(SIM_fault_lost_late);
            delay = sim_below(5 * SIM_S);
        }
        sim_break(wire, delay, delay);             /* takes it out of the list */
    }
}

/* ---- the store: one map, whose answers take their time ---- */

typedef struct sim_key { struct sim_key *next; char name[256]; uint8_t *value; size_t size; } sim_key;

typedef struct sim_ask {               /* an operation under way */
    struct sim_ask *next;
    tprpc_store_op *op;
    sim_node       *node;
    tprpc_store_request request;
    char            key[256];
    uint8_t        *value, *expected;
    bool            waits, over;       /* for its key; an answer is on its way */
    uint64_t        number;
} sim_ask;

static sim_key *sim_keys[SIM_KEYS];
static sim_ask *sim_asks;
static int64_t sim_key_count;
static uint64_t sim_ask_numbers;

static uint32_t sim_bucket(const char *name) {
    uint32_t hash = 2166136261u;
    while (*name) hash = (hash ^ (uint8_t)*name++) * 16777619u;
    return hash % SIM_KEYS;
}

static sim_key **sim_key_at(const char *name) {
    sim_key **at = &sim_keys[sim_bucket(name)];
    while (*at && strcmp((*at)->name, name) != 0) at = &(*at)->next;
    return at;
}

static void sim_key_delete(const char *name) {
    sim_key **at = sim_key_at(name), *key = *at;
    if (!key) return;
    *at = key->next;
    free(key->value);
    free(key);
    sim_key_count--;
}

static uint8_t *sim_copy(const void *value, size_t size) {
    uint8_t *copy = (uint8_t *)sim_new(size + 1);
    if (size) memcpy(copy, value, size);
    return copy;
}

static void sim_key_set(const char *name, const void *value, size_t size) {
    sim_key **at = sim_key_at(name);
    if (!*at) {
        *at = (sim_key *)sim_new(sizeof **at);
        snprintf((*at)->name, sizeof (*at)->name, "%s", name);
        sim_key_count++;
    }
    free((*at)->value);
    (*at)->value = sim_copy(value, size);
    (*at)->size = size;
}

static void sim_ask_end(sim_ask *ask, tprpc_status status, const void *value, size_t size) {
    sim_ask **at = &sim_asks;
    tprpc_error error;
    memset(&error, 0, sizeof error);
    while (*at != ask) at = &(*at)->next;
    *at = ask->next;
    if (status != TPRPC_OK) tprpc_error_set(&error, status, 0, "the simulated store: %s", tprpc_status_name(status));
    sim_note(ask->node->index, "store answers", ask->request.kind, (int64_t)status, (int64_t)size);
    tprpc_store_finish(ask->op, status, value, size, status == TPRPC_OK ? NULL : &error);
    free(ask->value);
    free(ask->expected);
    free(ask);
}

static sim_ask *sim_ask_of(uint64_t number) {
    sim_ask *ask = sim_asks;
    while (ask && ask->number != number) ask = ask->next;
    return ask;
}

static void sim_ask_wait_event(void *arg, uint64_t number) {
    sim_ask *ask = sim_ask_of(number);
    int64_t left;
    (void)arg;
    if (!ask || !ask->waits) return;
    left = ask->request.deadline_us - sim_clock_of(ask->node);
    if (left <= 0) sim_ask_end(ask, TPRPC_ERROR_TIMEOUT, NULL, 0);
    else sim_after(sim_real(ask->node, left), sim_ask_wait_event, NULL, number);
}

/* Those that wait for a key that is there now. */
static void sim_serve_waiters(const char *name) {
    sim_ask *ask = sim_asks;
    while (ask) {
        sim_ask *next = ask->next;
        if (ask->waits && strcmp(ask->key, name) == 0) {
            sim_key *key = *sim_key_at(name);
            sim_ask_end(ask, TPRPC_OK, key->value, key->size);
        }
        ask = next;
    }
}

static void sim_ask_event(void *arg, uint64_t number) {
    sim_ask *ask = sim_ask_of(number);
    sim_key *key;
    char name[256];
    uint8_t one;
    int64_t sum;
    (void)arg;
    if (!ask || ask->over) return;
    if (sim_net_is.store_error && !sim_net_is.mended && sim_chance(sim_net_is.store_error)) {
        sim_count(SIM_fault_store_error);
        sim_ask_end(ask, TPRPC_ERROR_UNREACHABLE, NULL, 0);
        return;
    }
    snprintf(name, sizeof name, "%s", ask->key);
    key = *sim_key_at(name);
    switch (ask->request.kind) {
    case TPRPC_STORE_SET:
        sim_key_set(name, ask->value, ask->request.value_size);
        sim_ask_end(ask, TPRPC_OK, NULL, 0);
        sim_serve_waiters(name);
        return;
    case TPRPC_STORE_GET:
        if (key) {
            sim_ask_end(ask, TPRPC_OK, key->value, key->size);
        } else if (ask->request.deadline_us == TPRPC_NOW) {
            sim_ask_end(ask, TPRPC_ERROR_TIMEOUT, NULL, 0);
        } else {
            ask->waits = true;
            if (ask->request.deadline_us != TPRPC_FOREVER) sim_ask_wait_event(NULL, number);
        }
        return;
    case TPRPC_STORE_ADD:
        sum = (key ? strtoll((const char *)key->value, NULL, 10) : 0) + ask->request.delta;
        snprintf(name, sizeof name, "%" PRId64, sum);
        sim_key_set(ask->key, name, strlen(name));
        sim_ask_end(ask, TPRPC_OK, &sum, sizeof sum);
        return;
    case TPRPC_STORE_COMPARE_SET:
        if (!key ? !ask->expected
                 : ask->expected && key->size == ask->request.expected_size &&
                       memcmp(key->value, ask->expected, key->size) == 0)
            sim_key_set(name, ask->value, ask->request.value_size);
        key = *sim_key_at(name);
        sim_ask_end(ask, TPRPC_OK, key ? key->value : NULL, key ? key->size : 0);
        if (key) sim_serve_waiters(name);
        return;
    case TPRPC_STORE_DELETE:
        one = key != NULL;
        sim_key_delete(name);
        sim_ask_end(ask, TPRPC_OK, &one, 1);
        return;
    default: sim_fail("a store's request of kind %d", (int)ask->request.kind);
    }
}

static void sim_ask_cancelled(void *arg, uint64_t number) {
    sim_ask *ask = sim_ask_of(number);
    (void)arg;
    if (ask) sim_ask_end(ask, TPRPC_ERROR_CANCELLED, NULL, 0);
}

static void sim_store_submit(void *user, tprpc_store_op *op, const tprpc_store_request *request) {
    sim_ask *ask = (sim_ask *)sim_new(sizeof *ask);
    int64_t delay = sim_between(1, sim_net_is.store_us);
    if (sim_net_is.store_slow && sim_chance(sim_net_is.store_slow)) {
        sim_count(SIM_fault_store_slow);
        delay += sim_below(2 * SIM_S);
    }
    ask->op = op;
    ask->node = (sim_node *)user;
    ask->request = *request;
    ask->number = ++sim_ask_numbers;
    snprintf(ask->key, sizeof ask->key, "%s", request->key);
    if (request->value_size) ask->value = sim_copy(request->value, request->value_size);
    if (request->expected) ask->expected = sim_copy(request->expected, request->expected_size);
    ask->next = sim_asks;
    sim_asks = ask;
    sim_after(delay, sim_ask_event, NULL, ask->number);
}

static void sim_store_cancel(void *user, tprpc_store_op *op) {
    sim_ask *ask = sim_asks;
    (void)user;
    while (ask && ask->op != op) ask = ask->next;
    if (!ask || ask->over) return;
    ask->over = true;
    ask->waits = false;
    sim_after(sim_between(0, SIM_MS), sim_ask_cancelled, NULL, ask->number);
}

static void sim_store_close(void *user) {
    sim_node *node = (sim_node *)user;
    sim_ask *ask;
    for (ask = sim_asks; ask; ask = ask->next)
        if (ask->node == node) sim_fail("a store is closed before its operations have ended");
}

static const tprpc_store_table sim_store_table = {(uint32_t)sizeof(tprpc_store_table), sim_store_submit,
                                                  sim_store_cancel, sim_store_close};

/* After the last worker: nothing is left of either. */
/* names_go: all workers have left a group that nobody was named for beforehand, so none is in the store. */
static void sim_net_end(bool names_go) {
    int i;
    if (sim_listeners) sim_fail("the listener %s is left", sim_listeners->name);
    if (sim_conns_alive) sim_fail("%d connections are left", (int)sim_conns_alive);
    if (sim_asks) sim_fail("an operation of the store's is left");
    for (i = 0; i < SIM_KEYS; i++)
        while (sim_keys[i]) {
            if (names_go && strstr(sim_keys[i]->name, "/name/"))
                sim_fail("the store still holds %s", sim_keys[i]->name);
            sim_key_delete(sim_keys[i]->name);
        }
    sim_wire_count = 0;
}

#endif
