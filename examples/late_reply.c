// late_reply: a request that is answered later, by another thread.
//
// The handler of "bake" keeps its request and gives it to a job thread, as an engine does with work that is too long
// for a callback. The job thread computes and answers. Both workers live in this process: "server" on a context with a
// thread of its own, "client" on one that main drives by waiting. They find each other in a store that lives in memory.
#define TPRPC_IMPLEMENTATION
#include "tprpc.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { QUEUE = 8, CALLS = 3, COUNT = 4, WAIT_MS = 10000 };

// ---- an engine's job system, in small: one thread, one bounded queue ------------------------------------------------

typedef struct jobs {
    pthread_t       thread;
    pthread_mutex_t lock;
    pthread_cond_t  changed;
    struct { void (*run)(void *); void *arg; } queue[QUEUE];
    size_t          first, count;
    bool            quit;
} jobs;

static bool job_submit(jobs *j, void (*run)(void *), void *arg) {
    pthread_mutex_lock(&j->lock);
    const bool room = j->count < QUEUE && !j->quit;
    if (room) {
        const size_t last = (j->first + j->count++) % QUEUE;
        j->queue[last].run = run;
        j->queue[last].arg = arg;
    }
    pthread_cond_signal(&j->changed);
    pthread_mutex_unlock(&j->lock);
    return room;
}

static void *jobs_main(void *user) {
    jobs *j = (jobs *)user;
    pthread_mutex_lock(&j->lock);
    while (j->count || !j->quit) {
        if (!j->count) {
            pthread_cond_wait(&j->changed, &j->lock);
            continue;
        }
        void (*run)(void *) = j->queue[j->first].run;
        void *arg = j->queue[j->first].arg;
        j->first = (j->first + 1) % QUEUE;
        j->count--;
        pthread_mutex_unlock(&j->lock);
        run(arg);
        pthread_mutex_lock(&j->lock);
    }
    pthread_mutex_unlock(&j->lock);
    return NULL;
}

static bool jobs_start(jobs *j) {
    memset(j, 0, sizeof *j);
    return !pthread_mutex_init(&j->lock, NULL) && !pthread_cond_init(&j->changed, NULL) &&
           !pthread_create(&j->thread, NULL, jobs_main, j);
}

// Runs what is queued, then ends the thread.
static void jobs_join(jobs *j) {
    pthread_mutex_lock(&j->lock);
    j->quit = true;
    pthread_cond_signal(&j->changed);
    pthread_mutex_unlock(&j->lock);
    pthread_join(j->thread, NULL);
}

// ---- the server -----------------------------------------------------------------------------------------------------

typedef struct bake { tprpc_request request; size_t count; float out[]; } bake;

static void bake_job(void *user) {
    bake *b = (bake *)user;
    if (tprpc_request_cancelled(b->request)) {
        tprpc_fail(b->request, 0, "cancelled");
        free(b);
        return;
    }
    const float *in = (const float *)tprpc_request_message(b->request)->tensors[0].data;
    for (size_t i = 0; i < b->count; i++) b->out[i] = in[i] * in[i];
    tprpc_tensor tensor = {.data = b->out, .size = b->count * sizeof(float), .dtype = TPRPC_F32, .ndim = 1,
                           .shape = {(int64_t)b->count}};
    tprpc_message reply = {.tensors = &tensor, .tensor_count = 1, .release = free, .release_user = b};
    tprpc_reply(b->request, &reply);
}

static void on_bake(tprpc_request request, const tprpc_message *message, void *user) {
    if (message->tensor_count != 1 || message->tensors[0].dtype != TPRPC_F32) {
        tprpc_fail(request, 1, "bake takes one F32 tensor");
        return;
    }
    bake *b = (bake *)malloc(sizeof *b + message->tensors[0].size);
    if (!b) {
        tprpc_fail(request, 2, "no memory to bake in");
        return;
    }
    b->request = request;
    b->count = message->tensors[0].size / sizeof(float);
    tprpc_request_keep(request);
    if (!job_submit((jobs *)user, bake_job, b)) {
        tprpc_fail(request, 3, "job queue full");
        free(b);
    }
}

static bool server_start(jobs *j, tprpc_context **context, tprpc_store **store, tprpc_agent **agent,
                         tprpc_error *error) {
    tprpc_context_desc threaded = {.threads = 1};
    tprpc_store_desc local = {.url = "local://"};
    tprpc_method_desc bake_method = {.name = "bake", .handler = on_bake, .user = j};
    if (tprpc_context_create(&threaded, context, error)) return false;
    if (tprpc_store_open(*context, &local, store, error)) return false;
    tprpc_agent_desc desc = {.context = *context, .name = "server", .store = *store};
    return !tprpc_agent_create(&desc, agent, error) && !tprpc_agent_register(*agent, &bake_method, error) &&
           !tprpc_agent_wait_ready(*agent, WAIT_MS, error);
}

// ---- the client -----------------------------------------------------------------------------------------------------

// Asks for several bakes at once and prints the results in the order asked.
static bool client_bake(tprpc_agent *agent, tprpc_error *error) {
    tprpc_future futures[CALLS];
    for (size_t k = 0; k < CALLS; k++) {
        float x[COUNT];
        for (size_t i = 0; i < COUNT; i++) x[i] = (float)(k * COUNT + i);
        const tprpc_tensor tensor = {.data = x, .size = sizeof x, .dtype = TPRPC_F32, .ndim = 1, .shape = {COUNT}};
        const tprpc_message message = {.tensors = &tensor, .tensor_count = 1};
        const tprpc_call_options options = {.error = error};
        tprpc_call(agent, "server", "bake", &message, &options, &futures[k]);   // refused: a future that waiting refuses
    }
    for (size_t k = 0; k < CALLS; k++) {
        if (!tprpc_future_wait(futures[k], TPRPC_FOREVER)) {
            const float *y = (const float *)tprpc_future_reply(futures[k])->tensors[0].data;
            printf("bake %zu: %g %g %g %g\n", k, (double)y[0], (double)y[1], (double)y[2], (double)y[3]);
        } else if (!error->status) {
            tprpc_future_error(futures[k], error);
        }
        tprpc_future_release(futures[k]);
    }
    return !error->status;
}

static bool client_run(tprpc_store *store, tprpc_error *error) {
    tprpc_context *context = NULL;
    tprpc_agent *agent = NULL;
    if (tprpc_context_create(NULL, &context, error)) return false;
    tprpc_agent_desc desc = {.context = context, .name = "client", .store = store};
    const bool good = !tprpc_agent_create(&desc, &agent, error) && !tprpc_agent_wait_ready(agent, WAIT_MS, error) &&
                      client_bake(agent, error) && !tprpc_agent_leave(agent, WAIT_MS, error);
    tprpc_agent_destroy(agent);
    tprpc_context_destroy(context);
    return good;
}

int main(void) {
    jobs j;
    tprpc_error error = {0};
    tprpc_context *context = NULL;
    tprpc_store *store = NULL;
    tprpc_agent *agent = NULL;
    if (!jobs_start(&j)) return fprintf(stderr, "no thread for jobs\n"), 1;
    const bool good = server_start(&j, &context, &store, &agent, &error) && client_run(store, &error) &&
                      !tprpc_agent_leave(agent, WAIT_MS, &error);
    jobs_join(&j);
    tprpc_agent_destroy(agent);
    tprpc_store_close(store);
    tprpc_context_destroy(context);
    if (!good) fprintf(stderr, "%s: %s\n", tprpc_status_name(error.status), error.text);
    return !good;
}
