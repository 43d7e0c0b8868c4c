/* Traces: what the files of two workers say of calls of every kind, read by a strict parser of JSON; what is lost where
   the ring is small; what cannot be written. */
#include "agent_help.h"
#include <sys/syscall.h>

extern int (*tprpc_test_hook)(const char *call, int64_t *size);

/* ---- JSON (RFC 8259), strictly: a value and nothing behind it. A failure ends the test and says where ---- */

typedef struct json {
    char type;                         /* o a s n t f 0 (null) */
    char *key, *text;                  /* of a member; of strings and numbers */
    double number;
    struct json *first, *next;
} json;

typedef struct reader { const char *from, *at; } reader;

static void bad(const reader *r, const char *why) {
    fprintf(stderr, "%s at byte %d: %.60s\n", why, (int)(r->at - r->from), r->at);
    REQUIRE(false);
}

static void skip_space(reader *r) { while (*r->at && strchr(" \t\r\n", *r->at)) r->at++; }

static unsigned read_hex(reader *r) {
    unsigned value = 0;
    for (int i = 0; i < 4; i++, r->at++) {
        const char *digits = "0123456789abcdefABCDEF", *d = *r->at ? strchr(digits, *r->at) : NULL;
        if (!d) bad(r, "no hexadecimal digit");
        value = value * 16 + (unsigned)(d - digits > 15 ? d - digits - 6 : d - digits);
    }
    return value;
}

/* The bytes of a UTF-8 sequence, 0: none. */
static int utf8(const char *at) {
    const unsigned char *p = (const unsigned char *)at;
    const int n = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] < 0xe0 ? 2 : (p[0] & 0xf0) == 0xe0 ? 3 :
                  p[0] >= 0xf0 && p[0] < 0xf5 ? 4 : 0;
    for (int i = 1; i < n; i++) if ((p[i] & 0xc0) != 0x80) return 0;
    return n;
}

static char *read_string(reader *r) {
    char *out, *to;
    if (*r->at++ != '"') bad(r, "no string");
    out = to = (char *)malloc(2001);
    while (*r->at != '"') {
        if (to - out > 1990) bad(r, "a string too long for here");
        if (*r->at == '\\') {
            const char *from = "\"\\/bfnrt", *is = "\"\\/\b\f\n\r\t", *e = r->at[1] ? strchr(from, r->at[1]) : NULL;
            r->at += 2;
            if (e) *to++ = is[e - from];
            else if (r->at[-1] == 'u') *to++ = (char)read_hex(r);   /* of control characters alone */
            else bad(r, "no such escape");
            continue;
        }
        int n = utf8(r->at);
        if ((unsigned char)*r->at < 0x20 || !n) bad(r, "a control character, or no UTF-8");
        while (n-- > 0) *to++ = *r->at++;
    }
    r->at++;
    *to = 0;
    return out;
}

static void read_number(reader *r, json *value) {
    const char *from = r->at;
    char *end;
    if (*r->at == '-') r->at++;
    if (*r->at == '0' && r->at[1] >= '0' && r->at[1] <= '9') bad(r, "a leading zero");
    if (*r->at < '0' || *r->at > '9') bad(r, "no value");
    while (*r->at >= '0' && *r->at <= '9') r->at++;
    if (*r->at == '.') {
        if (*++r->at < '0' || *r->at > '9') bad(r, "no digit behind the point");
        while (*r->at >= '0' && *r->at <= '9') r->at++;
    }
    value->type = 'n';
    value->number = strtod(from, &end);
    value->text = strndup(from, (size_t)(r->at - from));
    if (end != r->at) bad(r, "no number");
}

static json *read_value(reader *r);

static void read_members(reader *r, json *value, char close) {
    json **last = &value->first;
    value->type = close == '}' ? 'o' : 'a';
    r->at++;
    skip_space(r);
    if (*r->at == close) {
        r->at++;
        return;
    }
    for (;;) {
        char *key = NULL;
        skip_space(r);
        if (close == '}') {
            key = read_string(r);
            for (const json *other = value->first; other; other = other->next)
                if (strcmp(other->key, key) == 0) bad(r, "a key twice");
            skip_space(r);
            if (*r->at++ != ':') bad(r, "no colon");
        }
        *last = read_value(r);
        (*last)->key = key;
        last = &(*last)->next;
        if (*r->at == close) break;
        if (*r->at++ != ',') bad(r, "no comma");
    }
    r->at++;
}

static json *read_value(reader *r) {
    static const struct { char type; const char *word; } words[] = {{'t', "true"}, {'f', "false"}, {'0', "null"}};
    json *value = (json *)calloc(1, sizeof *value);
    skip_space(r);
    if (*r->at == '{') read_members(r, value, '}');
    else if (*r->at == '[') read_members(r, value, ']');
    else if (*r->at == '"') value->type = 's', value->text = read_string(r);
    else {
        for (size_t i = 0; i < 3; i++) {
            if (strncmp(r->at, words[i].word, strlen(words[i].word)) != 0) continue;
            value->type = words[i].type;
            r->at += strlen(words[i].word);
        }
        if (!value->type) read_number(r, value);
    }
    skip_space(r);
    return value;
}

static void json_free(json *value) {
    while (value) {
        json *next = value->next;
        json_free(value->first);
        free(value->key);
        free(value->text);
        free(value);
        value = next;
    }
}

static const json *member(const json *of, const char *key) {
    for (const json *m = of ? of->first : NULL; m; m = m->next) if (m->key && strcmp(m->key, key) == 0) return m;
    return NULL;
}

static const char *text_in(const json *of, const char *key) {
    const json *m = member(of, key);
    return m && m->type == 's' ? m->text : "";
}

/* ---- a trace ---- */

typedef struct event {
    char     ph;
    int64_t  ns, dur;
    int      pid, tid;
    uint64_t id;                       /* of flows and of asynchronous slices */
    const char *name, *cat, *status, *peer, *call;
    int      lost;
} event;

typedef struct trace {
    json   *root;
    event  *events;
    int     count, pid;
    const char *worker;
} trace;

/* us with at most three decimals, exactly: a double would do for 100 days. */
static int64_t ns_of(const json *number) {
    REQUIRE(number && number->type == 'n');
    const char *point = strchr(number->text, '.');
    REQUIRE(point && strlen(point) == 4);
    const int64_t us = strtoll(number->text, NULL, 10), part = strtoll(point + 1, NULL, 10);
    return us * 1000 + (number->text[0] == '-' ? -part : part);
}

static char *read_file(const char *path) {
    FILE *file = fopen(path, "r");
    char *text = (char *)calloc(1, 64 << 20);
    REQUIRE(file != NULL && text != NULL);
    const size_t n = fread(text, 1, (64 << 20) - 1, file);
    REQUIRE_EQ_INT(strlen(text), n);
    fclose(file);
    return text;
}

static trace trace_read(const char *path) {
    trace t = {0};
    char *text = read_file(path);
    reader r = {text, text};
    t.root = read_value(&r);
    if (*r.at) bad(&r, "something behind the value");
    free(text);
    REQUIRE_EQ_INT(t.root->type, 'a');
    for (const json *e = t.root->first; e; e = e->next) t.count++;
    t.events = (event *)calloc((size_t)t.count + 1, sizeof *t.events);
    event *to = t.events;
    for (const json *e = t.root->first; e; e = e->next, to++) {
        const json *args = member(e, "args");
        const char *id = text_in(e, "id");
        REQUIRE_EQ_INT(e->type, 'o');
        REQUIRE_EQ_INT(strlen(text_in(e, "ph")), 1);
        to->ph = text_in(e, "ph")[0];
        to->ns = ns_of(member(e, "ts"));
        to->dur = to->ph == 'X' ? ns_of(member(e, "dur")) : 0;
        to->pid = (int)member(e, "pid")->number;
        to->tid = (int)member(e, "tid")->number;
        to->name = text_in(e, "name");
        to->cat = text_in(e, "cat");
        to->status = text_in(args, "status");
        to->call = text_in(args, "call");
        to->peer = text_in(args, "to");
        if (!*to->peer) to->peer = text_in(args, "from");
        if (!*to->peer) to->peer = text_in(args, "of");
        to->id = *id ? strtoull(id, NULL, 16) : 0;
        to->lost = member(args, "lost") ? (int)member(args, "lost")->number : 0;
        CHECK(*to->name && to->dur >= 0);
        if (to->ph == 'M') {
            if (strcmp(to->name, "process_name") == 0) t.worker = text_in(args, "name"), t.pid = to->pid;
            to->peer = text_in(args, strcmp(to->name, "tprpc_clock") == 0 ? "boot" : "name");
        }
    }
    return t;
}

static void trace_free(trace *t) {
    json_free(t->root);
    free(t->events);
}

static int count_of(const trace *t, char ph, const char *name) {
    int n = 0;
    for (int i = 0; i < t->count; i++)
        n += t->events[i].ph == ph && (!name || strcmp(t->events[i].name, name) == 0);
    return n;
}

static int lost_in(const trace *t) {
    int n = 0;
    for (int i = 0; i < t->count; i++) n += t->events[i].lost;
    return n;
}

static const char *thread_name(const trace *t, int tid) {
    const char *name = NULL;
    for (int i = 0; i < t->count; i++)
        if (t->events[i].ph == 'M' && t->events[i].tid == tid && strcmp(t->events[i].name, "thread_name") == 0)
            name = t->events[i].peer;
    return name;
}

/* The thread of the n-th slice of that name, 0: there is none. */
static int thread_of(const trace *t, const char *name) {
    for (int i = 0; i < t->count; i++)
        if (t->events[i].ph == 'X' && strcmp(t->events[i].name, name) == 0) return t->events[i].tid;
    return 0;
}

static int by_time(const void *a, const void *b) {
    const event *x = *(const event *const *)a, *y = *(const event *const *)b;
    if (x->tid != y->tid) return x->tid < y->tid ? -1 : 1;
    if (x->ns != y->ns) return x->ns < y->ns ? -1 : 1;
    return x->dur > y->dur ? -1 : x->dur < y->dur;
}

/* Slices of a thread lie within or apart from one another, as viewers demand. */
static void slices_nest(const trace *t) {
    const event **slices = (const event **)calloc((size_t)t->count + 1, sizeof *slices);
    int64_t ends[64];
    int n = 0, depth = 0;
    for (int i = 0; i < t->count; i++) if (t->events[i].ph == 'X') slices[n++] = &t->events[i];
    qsort(slices, (size_t)n, sizeof *slices, by_time);
    for (int i = 0; i < n; i++) {
        if (i && slices[i]->tid != slices[i - 1]->tid) depth = 0;
        while (depth && ends[depth - 1] <= slices[i]->ns) depth--;
        if (depth && !CHECK(slices[i]->ns + slices[i]->dur <= ends[depth - 1])) fprintf(stderr, "%s\n", slices[i]->name);
        REQUIRE(depth < 64);
        ends[depth++] = slices[i]->ns + slices[i]->dur;
    }
    free(slices);
}

/* The slice that a step of a flow is of: the innermost of its thread at that time. */
static const event *slice_of(const trace *t, const event *step) {
    const event *found = NULL;
    for (int i = 0; i < t->count; i++) {
        const event *e = &t->events[i];
        if (e->ph == 'X' && e->tid == step->tid && e->ns <= step->ns && step->ns <= e->ns + e->dur &&
            (!found || e->ns > found->ns || (e->ns == found->ns && e->dur < found->dur)))
            found = e;
    }
    return found;
}

static bool is_step(const event *e) { return e->ph == 's' || e->ph == 't' || e->ph == 'f'; }

/* What holds of every trace that lost nothing. */
static void trace_check(const trace *t) {
    REQUIRE(t->worker != NULL);
    CHECK_EQ_INT(lost_in(t), 0);
    slices_nest(t);
    for (int i = 0; i < t->count; i++) {
        const event *e = &t->events[i];
        CHECK_EQ_INT(e->pid, t->pid);
        CHECK(strchr("XstfbeM", e->ph) != NULL);
        if (e->ph == 'X') CHECK(thread_name(t, e->tid) != NULL);
        if (is_step(e)) {
            const event *slice = slice_of(t, e);
            if (CHECK(slice != NULL)) CHECK_EQ_INT(strtoull(slice->call, NULL, 16), e->id);
            CHECK_STR(e->name, "call");
            CHECK_STR(e->cat, "tprpc");
        }
        if (e->ph != 'b') continue;
        int ends = 0, before = 0;      /* a call begins with its slice; nothing waits before it was received */
        for (int k = 0; k < t->count; k++) {
            const event *other = &t->events[k];
            before += other->ph == 'X' && strtoull(other->call, NULL, 16) == e->id && other->ns <= e->ns;
            if (other->ph != 'e' || other->id != e->id || strcmp(other->cat, e->cat) != 0) continue;
            ends++;
            CHECK_STR(other->name, e->name);
            CHECK(other->ns >= e->ns);
        }
        CHECK_EQ_INT(ends, 1);
        CHECK(before > 0);
    }
}

/* The steps of a call as letters in the order of time: its caller's in capitals, s t t t f being "StttF". */
static void steps_of(const trace *caller, const trace *other, uint64_t id, char out[16]) {
    const trace *both[2] = {caller, other};
    int64_t times[16];
    int n = 0;
    for (int w = 0; w < 2; w++)
        for (int i = 0; i < both[w]->count; i++) {
            const event *e = &both[w]->events[i];
            int at = n;
            if (!is_step(e) || e->id != id) continue;
            REQUIRE(n < 15);
            for (; at > 0 && times[at - 1] > e->ns; at--) {
                times[at] = times[at - 1];
                out[at] = out[at - 1];
            }
            times[at] = e->ns;
            out[at] = (char)(w ? e->ph : e->ph - 'a' + 'A');
            n++;
        }
    out[n] = 0;
}

/* Every call of the name has these steps (NULL: these two of the caller's, two of the other's, where time decides), and
   that outcome; returns how many there are. */
static int calls_are(const trace *caller, const trace *other, const char *method, const char *steps,
                     const char *outcome) {
    char name[200], found[16];
    int n = 0;
    snprintf(name, sizeof name, "call %s", method);
    for (int i = 0; i < caller->count; i++) {
        const event *e = &caller->events[i];
        if (e->ph != 'X' || strcmp(e->name, name) != 0) continue;
        n++;
        CHECK_STR(e->peer, other->worker);
        steps_of(caller, other, strtoull(e->call, NULL, 16), found);
        if (steps) CHECK_STR(found, steps);
        else CHECK(strlen(found) == 4 && found[0] == 'S' && strchr(found, 'F'));
        for (int k = 0; k < caller->count; k++) {
            const event *o = &caller->events[k];
            if (o->ph == 'X' && strncmp(o->name, "outcome of ", 11) == 0 && strcmp(o->call, e->call) == 0)
                CHECK_STR(o->status, outcome);
        }
    }
    return n;
}

/* ---- what is called ---- */

#define ODD "qu\"o\\te \xc3\xa9"         /* a name that JSON, and this worker's file, write another way */
static char prefix[260];
static int loops;                      /* of both, 0: polled */

static void on_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static void on_fail(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message;
    (void)user;
    tprpc_fail(request, 7, "no");
}

static void on_forget(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request;
    (void)message;
    (void)user;
}

static void on_note(tprpc_request request, const tprpc_message *message, void *user) {
    (void)request;
    (void)message;
    (void)user;
    ADD(&shared->handled, 1);
}

static void on_relay(tprpc_request request, const tprpc_message *message, void *user) {
    CHECK_EQ_INT(call_and_wait((side *)user, "ann", "echo", message, NULL, NULL), TPRPC_OK);
    tprpc_reply(request, NULL);
}

static void on_keep(tprpc_request request, const tprpc_message *message, void *user) {
    (void)message;
    (void)user;
    CHECK_EQ_INT(tprpc_request_keep(request), TPRPC_OK);
    ADD(&shared->seen, 1);
}

static const tprpc_method_desc methods[] = {
    {"echo", on_echo, NULL, NULL, NULL, 0},         {ODD, on_echo, NULL, NULL, NULL, 0},
    {"fail", on_fail, NULL, NULL, NULL, 0},         {"forget", on_forget, NULL, NULL, NULL, 0},
    {"note", on_note, NULL, NULL, NULL, 0},         {"relay", on_relay, NULL, NULL, NULL, 0},
    {"keep", on_keep, NULL, NULL, NULL, 0},         {"keep too", on_keep, NULL, NULL, NULL, 0},
    {"block", on_echo, NULL, NULL, NULL, TPRPC_METHOD_BLOCKING}, {0},
};

static void traced(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    context->threads = loops;
    agent->trace = prefix;
    agent->worker_threads = s->rank;   /* bob has one */
}

static void path_of(char *out, size_t size, const char *name) { snprintf(out, size, "%s%s.json", prefix, name); }

static void choose_prefix(void) {
    char path[250];
    snprintf(prefix, sizeof prefix, "%s-", test_temp_path(path, sizeof path));
}

/* ---- two processes, calls of every kind ---- */

enum { ECHOES = 20 };

static void calls_of_every_kind(side *s) {
    tprpc_call_options late = {0}, one_way = {0};
    tprpc_message hello = text_of("hello");
    const int notes = LOAD(&shared->handled);
    const char *bob = "b/\"ob\"";
    tprpc_future future;
    late.timeout_ms = 30;
    one_way.flags = TPRPC_CALL_ONE_WAY;
    for (int i = 0; i < ECHOES; i++) CHECK_EQ_INT(call_and_wait(s, bob, "echo", &hello, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, bob, ODD, &hello, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, bob, "relay", &hello, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, bob, "fail", NULL, NULL, NULL), TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(call_and_wait(s, bob, "forget", NULL, NULL, NULL), TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(call_and_wait(s, bob, "nothing", NULL, NULL, NULL), TPRPC_ERROR_NO_METHOD);
    CHECK_EQ_INT(call_and_wait(s, bob, "keep", NULL, &late, NULL), TPRPC_ERROR_TIMEOUT);
    CHECK(until(s, &shared->seen, 1));
    REQUIRE_EQ_INT(tprpc_call(s->agent, bob, "keep too", NULL, NULL, &future), TPRPC_OK);
    CHECK(until(s, &shared->seen, 2));
    CHECK_EQ_INT(tprpc_future_cancel(future), TPRPC_OK);
    tprpc_future_release(future);
    CHECK_EQ_INT(call_and_wait(s, bob, "block", &hello, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, bob, "note", NULL, &one_way, NULL), TPRPC_OK);
    CHECK(until(s, &shared->handled, notes + 1));
    CHECK_EQ_INT(tprpc_call(s->agent, "nobody", "echo", NULL, NULL, NULL), TPRPC_ERROR_NO_WORKER);
    CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, NULL), TPRPC_OK);
    shared->pid[3] = (pid_t)syscall(SYS_gettid);
}

static void check_both(const trace *ann, const trace *bob) {
    trace_check(ann);
    trace_check(bob);
    CHECK_STR(ann->worker, "ann");
    CHECK_STR(bob->worker, "b/\"ob\"");
    CHECK_EQ_INT(ann->pid, shared->pid[0]);
    CHECK_EQ_INT(bob->pid, shared->pid[1]);
    CHECK_EQ_INT(calls_are(ann, bob, "echo", "StttF", "ok"), ECHOES);
    CHECK_EQ_INT(calls_are(ann, bob, ODD, "StttF", "ok"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "relay", "StttF", "ok"), 1);
    CHECK_EQ_INT(calls_are(bob, ann, "echo", "StttF", "ok"), 1);   /* within relay */
    CHECK_EQ_INT(calls_are(ann, bob, "fail", "StttF", "remote"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "forget", "StttF", "remote"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "nothing", "StF", "no_method"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "keep", NULL, "timeout"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "keep too", "SttF", "cancelled"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "block", "StttF", "ok"), 1);
    CHECK_EQ_INT(calls_are(ann, bob, "note", "Stf", "ok"), 1);
    CHECK_EQ_INT(count_of(ann, 's', NULL), ECHOES + 9);   /* and none of the call to nobody */
    CHECK_EQ_INT(count_of(ann, 'f', NULL), ECHOES + 8);
    CHECK_EQ_INT(count_of(bob, 'X', "answer echo"), ECHOES);
    CHECK_EQ_INT(count_of(bob, 'X', "receive an unknown method"), 1);
}

static void both_traced(const mode *with, int threads) {
    side sides[2] = {{0}};
    char path[300];
    if (!shared) share();
    choose_prefix();
    loops = threads;
    sides[0].mode = with;
    sides[0].main = calls_of_every_kind;
    sides[0].methods = sides[1].methods = methods;
    sides[0].tune = sides[1].tune = traced;
    sides[1].name = "b/\"ob\"";
    group_run(sides, 2);
    path_of(path, sizeof path, "ann");
    trace ann = trace_read(path);
    path_of(path, sizeof path, "b%2F%22ob%22");
    trace bob = trace_read(path);
    check_both(&ann, &bob);
    /* who did what */
    const int block = thread_of(&bob, "block"), echo = thread_of(&bob, "echo"), call = thread_of(&ann, "call echo");
    CHECK_STR(thread_name(&bob, block), "tprpc-w0");
    CHECK_EQ_INT(call, shared->pid[3]);
    CHECK(echo != block);
    if (threads) CHECK_CONTAINS(thread_name(&bob, echo), "tprpc-");
    else CHECK_EQ_INT(echo, bob.pid);
    trace_free(&ann);
    trace_free(&bob);
}

IN_MODES(two_processes, 0x3) { both_traced(with, 0); }
IN_MODES(two_processes_with_loops, 0x10) { both_traced(with, 2); }

/* ---- what is lost ---- */

enum { SMALL = 8, MANY = 50 };

static void traced_little(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    traced(s, context, agent);
    agent->trace_events = s->rank ? 0 : SMALL;
}

static void lose_many(side *s) {
    char path[300];
    path_of(path, sizeof path, "ann");
    for (int round = 1; round <= 3; round++) {
        for (int i = 0; i < MANY; i++) CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
        CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, NULL), TPRPC_OK);
        trace t = trace_read(path);
        CHECK_EQ_INT(lost_in(&t), round * (2 * MANY - SMALL));
        CHECK_EQ_INT(count_of(&t, 'X', NULL), round * SMALL);
        CHECK_EQ_INT(count_of(&t, 'i', "lost events"), round);
        CHECK_EQ_INT(count_of(&t, 'X', "outcome of echo"), round * SMALL / 2);   /* the newest are there */
        trace_free(&t);
        CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, NULL), TPRPC_OK);   /* nothing new: nothing is written */
    }
}

TEST(the_oldest_are_lost_and_counted) {
    side sides[2] = {{0}};
    char path[300];
    choose_prefix();
    sides[0].mode = &modes[1];
    sides[0].main = lose_many;
    sides[0].methods = sides[1].methods = methods;
    sides[0].tune = sides[1].tune = traced_little;
    group_run(sides, 2);
    path_of(path, sizeof path, "ann");
    trace ann = trace_read(path);
    CHECK_EQ_INT(count_of(&ann, 'M', "thread_name"), 1);
    trace_free(&ann);
    path_of(path, sizeof path, "bob");
    trace bob = trace_read(path);
    trace_check(&bob);
    CHECK_EQ_INT(count_of(&bob, 'X', "echo"), 3 * MANY);
    trace_free(&bob);
}

/* ---- several loops and threads, one process, written meanwhile ---- */

enum { CALLERS = 4, EACH = 100 };

static void *call_many(void *arg) {
    side *s = (side *)arg;
    for (int i = 0; i < EACH; i++) {
        CHECK_EQ_INT(call_and_wait(s, i % 2 ? "bob" : "ann", i % 3 ? "echo" : "block", NULL, NULL, NULL), TPRPC_OK);
        if (i % 50 == 0) CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, NULL), TPRPC_OK);
    }
    ADD(&shared->seen, 1);
    return NULL;
}

static void crowd(side *s) {
    for (s->job_count = 0; s->job_count < CALLERS; s->job_count++)
        REQUIRE_EQ_INT(pthread_create(&s->jobs[s->job_count], NULL, call_many, s), 0);
    while (LOAD(&shared->seen) < CALLERS) {
        CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, NULL), TPRPC_OK);
        test_sleep_us(500);
    }
}

TEST(crowd_of_threads) {
    side sides[2] = {{0}};
    char path[300];
    share();
    choose_prefix();
    loops = 2;
    sides[0].mode = &modes[5];
    sides[0].main = crowd;
    sides[0].methods = sides[1].methods = methods;
    sides[0].tune = sides[1].tune = traced;
    group_run(sides, 2);
    path_of(path, sizeof path, "ann");
    trace ann = trace_read(path);
    path_of(path, sizeof path, "bob");
    trace bob = trace_read(path);
    CHECK_EQ_INT(lost_in(&ann) + lost_in(&bob), 0);
    slices_nest(&ann);
    slices_nest(&bob);
    CHECK_EQ_INT(count_of(&ann, 's', NULL), CALLERS * EACH);
    CHECK_EQ_INT(count_of(&ann, 'f', NULL), CALLERS * EACH);
    CHECK_EQ_INT(count_of(&ann, 't', NULL), 3 * CALLERS * EACH / 2);   /* its calls to itself */
    CHECK_EQ_INT(count_of(&bob, 't', NULL), 3 * CALLERS * EACH / 2);
    CHECK(count_of(&ann, 'M', "thread_name") >= CALLERS);
    trace_free(&ann);
    trace_free(&bob);
}

/* ---- a method that is gone before its calls are written ---- */

static void call_the_gone(side *s) {
    const tprpc_message hello = text_of("hello");
    CHECK_EQ_INT(call_and_wait(s, "ann", "echo", &hello, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_unregister(s->agent, "echo", NULL), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "ann", "echo", &hello, NULL, NULL), TPRPC_ERROR_NO_METHOD);
    s->no_leave = true;                /* destroy writes as well as leave does */
}

TEST(method_that_is_gone) {
    side sides[1] = {{0}};
    char path[300], found[16];
    choose_prefix();
    sides[0].mode = &modes[1];
    sides[0].main = call_the_gone;
    sides[0].methods = methods;
    sides[0].tune = traced;
    group_run(sides, 1);
    path_of(path, sizeof path, "ann");
    trace ann = trace_read(path), none = {0};
    trace_check(&ann);
    CHECK_EQ_INT(count_of(&ann, 'X', "echo"), 1);
    CHECK_EQ_INT(count_of(&ann, 'X', "answer echo"), 1);
    for (int i = 0, n = 0; i < ann.count; i++) {   /* both ends of a call are here */
        if (ann.events[i].ph != 's') continue;
        steps_of(&ann, &none, ann.events[i].id, found);
        CHECK_STR(found, n++ ? "STF" : "STTTF");
    }
    trace_free(&ann);
}

/* ---- what cannot be ---- */

static const char *failing;
static int failing_at, failing_with;

static int fails(const char *call, int64_t *size) {
    (void)size;
    return failing && strcmp(call, failing) == 0 && --failing_at == 0 ? failing_with : 0;
}

static tprpc_status create(tprpc_agent_desc *desc, tprpc_agent **agent, tprpc_error *error) {
    memset(error, 0, sizeof *error);
    desc->name = "ann";
    desc->init_method = "tcp://127.0.0.1:29501";
    desc->world_size = 1;
    return tprpc_agent_create(desc, agent, error);
}

TEST(what_cannot_be_is_refused) {
    tprpc_agent_desc desc = {0};
    tprpc_error error;
    tprpc_agent *agent;
    char path[300], folder[300], said[300], *text;
    choose_prefix();
    snprintf(folder, sizeof folder, "%sno/such/", prefix);
    desc.trace = folder;
    CHECK_EQ_INT(create(&desc, &agent, &error), TPRPC_ERROR_UNREACHABLE);
    CHECK_EQ_INT(error.os_code, ENOENT);
    snprintf(said, sizeof said, "the trace cannot be written: No such file or directory: %.100s", folder);
    CHECK_CONTAINS(error.text, said);
    CHECK(agent == NULL);
    desc.trace = prefix;
    desc.trace_events = -1;
    CHECK_EQ_INT(create(&desc, &agent, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "trace_events is -1, not 0 to 16777216");
    desc.trace_events = (1 << 24) + 1;
    CHECK_EQ_INT(create(&desc, &agent, &error), TPRPC_ERROR_INVALID);
    desc.trace_events = 0;
    text = (char *)malloc(2000);
    memset(text, 'x', 1999);
    text[1999] = 0;
    desc.trace = text;
    CHECK_EQ_INT(create(&desc, &agent, &error), TPRPC_ERROR_INVALID);
    CHECK_CONTAINS(error.text, "too long");
    free(text);
    path_of(path, sizeof path, "ann");
    REQUIRE_EQ_INT(mkdir(path, 0700), 0);
    desc.trace = prefix;
    CHECK_EQ_INT(create(&desc, &agent, &error), TPRPC_ERROR_SYSTEM);
    CHECK_EQ_INT(error.os_code, EISDIR);
    REQUIRE_EQ_INT(rmdir(path), 0);
    desc.trace = NULL;
    CHECK_EQ_INT(create(&desc, &agent, &error), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_flush_trace(agent, &error), TPRPC_OK);   /* nothing is traced */
    CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
}

/* Every call of the system and for memory that an agent with a trace makes while it is created fails, the n-th for all
   n; it is created, or there is a sentence and nothing is left. */
TEST(every_failure_at_creation) {
    static const char *const calls[] = {"alloc", "open_file", "fstat", "ftruncate", "pwrite", "open", "read"};
    heap memory = {0};
    tprpc_context_desc context = {0};
    tprpc_context *ctx;
    context.allocator.alloc = heap_alloc;
    context.allocator.free = heap_free;
    context.allocator.user = &memory;
    REQUIRE_EQ_INT(tprpc_context_create(&context, &ctx, NULL), TPRPC_OK);
    const int64_t blocks = memory.blocks, bytes = memory.bytes;
    const int fds = test_count_fds();
    choose_prefix();
    STORE(&tprpc_test_hook, fails);
    for (size_t c = 0; c < sizeof calls / sizeof calls[0]; c++) {
        int failures = 0;
        for (int n = 1; n < 100; n++) {
            tprpc_agent_desc desc = {0};
            tprpc_agent *agent = NULL;
            tprpc_error error;
            desc.context = ctx;
            desc.trace = prefix;
            failing_with = strcmp(calls[c], "alloc") == 0 ? ENOMEM : EIO;
            failing_at = n;
            failing = calls[c];
            const tprpc_status status = create(&desc, &agent, &error);
            const bool over = failing_at > 0;
            failing = NULL;
            failures += status != TPRPC_OK;
            if (status != TPRPC_OK) CHECK(error.text[0] != 0 && error.status == status);
            CHECK_EQ_INT(status == TPRPC_OK, agent != NULL);
            CHECK_EQ_INT(tprpc_agent_destroy(agent), TPRPC_OK);
            CHECK_EQ_INT(memory.blocks, blocks);
            CHECK_EQ_INT(memory.bytes, bytes);
            CHECK_EQ_INT(test_count_fds(), fds);
            if (over) break;
        }
        CHECK(failures > 0 || c >= 5);  /* without the boot's id it is a trace all the same */
    }
    STORE(&tprpc_test_hook, (int (*)(const char *, int64_t *))NULL);
    CHECK_EQ_INT(tprpc_context_destroy(ctx), TPRPC_OK);
}

/* A full disk: who flushes is told; what was to be written is lost, and the next flush says so. */
static void fill_disk(side *s) {
    tprpc_error error = {0};
    char path[300];
    path_of(path, sizeof path, "ann");
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, &error), TPRPC_OK);
    CHECK_EQ_INT(call_and_wait(s, "bob", "fail", NULL, NULL, NULL), TPRPC_ERROR_REMOTE);
    failing_with = ENOSPC;
    for (int i = 0; i < 2; i++) {      /* the second has nothing but to say what the first lost */
        failing_at = 1;
        failing = "pwrite";
        STORE(&tprpc_test_hook, fails);
        CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, &error), TPRPC_ERROR_LIMIT);
        CHECK_EQ_INT(error.os_code, ENOSPC);
        CHECK_CONTAINS(error.text, "the trace cannot be written: No space left on device: /");
        STORE(&tprpc_test_hook, (int (*)(const char *, int64_t *))NULL);
    }
    CHECK_EQ_INT(call_and_wait(s, "bob", "note", NULL, NULL, NULL), TPRPC_ERROR_REMOTE);
    CHECK_EQ_INT(tprpc_agent_flush_trace(s->agent, &error), TPRPC_OK);
    trace t = trace_read(path);
    CHECK_EQ_INT(lost_in(&t), 2);
    CHECK_EQ_INT(count_of(&t, 's', NULL), 2);
    CHECK_EQ_INT(count_of(&t, 'X', "call echo") + count_of(&t, 'X', "outcome of note"), 2);
    CHECK_EQ_INT(count_of(&t, 'M', "thread_name"), 2);   /* the name may have been in what was lost */
    trace_free(&t);
}

TEST(full_disk) {
    side sides[2] = {{0}};
    choose_prefix();
    sides[0].mode = &modes[1];
    sides[0].main = fill_disk;
    sides[0].methods = sides[1].methods = methods;
    sides[0].tune = sides[1].tune = traced;
    group_run(sides, 2);
}

/* ---- a clock of the user's ---- */

static int64_t other_clock(void *user) { (void)user; return test_now_us() + INT64_C(1000000000000); }

static void with_a_clock(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    traced(s, context, agent);
    context->clock_us = other_clock;
}

static void call_and_leave(side *s) {
    char path[300];
    CHECK_EQ_INT(call_and_wait(s, "bob", "echo", NULL, NULL, NULL), TPRPC_OK);
    side_leave(s);
    s->no_leave = true;
    path_of(path, sizeof path, "ann");
    trace t = trace_read(path);
    CHECK_EQ_INT(count_of(&t, 'f', NULL), 1);
    trace_free(&t);
}

TEST(clock_of_the_user) {
    side sides[2] = {{0}};
    char path[300];
    const int64_t before = other_clock(NULL) * 1000;
    choose_prefix();
    sides[0].mode = &modes[1];
    sides[0].main = call_and_leave;
    sides[0].methods = sides[1].methods = methods;
    sides[0].tune = sides[1].tune = with_a_clock;
    group_run(sides, 2);
    path_of(path, sizeof path, "ann");
    trace t = trace_read(path);
    trace_check(&t);
    CHECK_EQ_INT(count_of(&t, 's', NULL), 1);
    for (int i = 0; i < t.count; i++) {
        const event *e = &t.events[i];
        if (e->ph != 'M') CHECK(e->ns >= before && e->ns <= other_clock(NULL) * 1000);
        if (strcmp(e->name, "tprpc_clock") == 0) CHECK_STR(e->peer, "of the user");
    }
    trace_free(&t);
}
