// parameter_server: several workers train one model together; one of them is killed and replaced meanwhile.
//
// The server keeps the parameters of a linear model. Each worker, a process of its own, has its own samples of a noisy
// linear function; again and again it pulls the parameters, computes a gradient on a few of its samples, and pushes it;
// the server moves the parameters against it. Nobody waits for the slowest: a gradient may be of parameters that others
// have changed since. After a third of the gradients the server kills one worker with SIGKILL, removes it from the
// group and starts a new process under the same name, while the others go on.
//
// Calls: "pull" and "push" from workers to the server. The group is dynamic: who comes has the store's address and a
// name, and nobody waits for a number of workers to be there.
#define TPRPC_IMPLEMENTATION
#include "tprpc.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PARAMETERS = 4096, BATCH = 16, MAX_WORKERS = 16, START_MS = 10000, KILLED = 0 };
static const float rate = 0.005f, noise = 0.01f;   // at twenty times that rate it would not settle
static const double enough = 0.05;                 // how far from the truth the model may end; it begins at 0.7

static uint32_t next_random(uint32_t *state) { return *state = *state * 1664525u + 1013904223u; }

static float uniform(uint32_t *state) { return (float)(next_random(state) >> 8) / (float)(1 << 23) - 1.0f; }

// What is to be learnt: parameter i.
static float truth(size_t i) { return sinf((float)i * 0.37f); }

static tprpc_message tensor_message(tprpc_tensor *tensor, float *data) {
    memset(tensor, 0, sizeof *tensor);
    tensor->data = data;
    tensor->size = PARAMETERS * sizeof *data;
    tensor->dtype = TPRPC_F32;
    tensor->ndim = 1;
    tensor->shape[0] = PARAMETERS;
    return (tprpc_message){.tensors = tensor, .tensor_count = 1};
}

static int fail(const tprpc_error *error) {
    fprintf(stderr, "parameter_server: %s\n", error->text);
    return 1;
}

// ---- a worker -------------------------------------------------------------------------------------------------------

// The gradient of the mean squared error over some fresh samples, at `parameters`.
static void gradient_of(const float *parameters, float *gradient, uint32_t *random) {
    static float sample[PARAMETERS];
    memset(gradient, 0, PARAMETERS * sizeof *gradient);
    for (int s = 0; s < BATCH; s++) {
        float error = noise * uniform(random);
        for (size_t i = 0; i < PARAMETERS; i++) {
            sample[i] = uniform(random);
            error += (parameters[i] - truth(i)) * sample[i];
        }
        for (size_t i = 0; i < PARAMETERS; i++) gradient[i] += error * sample[i] * (1.0f / BATCH);
    }
}

// A worker's life: until the server says that it is done.
static int work(const char *store, const char *name, uint32_t random) {
    static float gradient[PARAMETERS];
    tprpc_error error = {0};
    tprpc_agent *agent = NULL;
    const tprpc_agent_desc desc = {.name = name, .init_method = store};
    tprpc_call_options options = {.error = &error};
    tprpc_method_id pull, push;
    bool more = true;
    prctl(PR_SET_PDEATHSIG, SIGKILL);    // a worker is not to outlive its server
    bool good = !tprpc_agent_create(&desc, &agent, &error) && !tprpc_agent_wait_ready(agent, START_MS, &error) &&
                !tprpc_resolve(agent, "server", "pull", &pull, &error) &&
                !tprpc_resolve(agent, "server", "push", &push, &error);
    while (good && more) {
        tprpc_tensor tensor;
        tprpc_message message = tensor_message(&tensor, gradient);
        tprpc_future pulled = {0}, pushed = {0};
        good = !tprpc_call_id(agent, pull, NULL, &options, &pulled) && !tprpc_future_wait(pulled, TPRPC_FOREVER);
        if (good) gradient_of((const float *)tprpc_future_reply(pulled)->tensors[0].data, gradient, &random);
        else if (!error.status) tprpc_future_error(pulled, &error);
        tprpc_future_release(pulled);
        if (!good) break;
        good = !tprpc_call_id(agent, push, &message, &options, &pushed) && !tprpc_future_wait(pushed, TPRPC_FOREVER);
        if (good) more = tprpc_future_reply(pushed)->metadata_size == 0;   // a last word has a body
        else if (!error.status) tprpc_future_error(pushed, &error);
        tprpc_future_release(pushed);
    }
    if (good) tprpc_agent_leave(agent, START_MS, &error);
    tprpc_agent_destroy(agent);
    return error.status == TPRPC_OK ? 0 : fail(&error);
}

// ---- the server -----------------------------------------------------------------------------------------------------

typedef struct server {
    float parameters[PARAMETERS];
    int   steps, done;                   // gradients that are to come; that came
} server;

static void on_pull(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_tensor tensor;
    tprpc_message reply = tensor_message(&tensor, ((server *)user)->parameters);
    (void)message;
    tprpc_reply(request, &reply);
}

static void on_push(tprpc_request request, const tprpc_message *message, void *user) {
    server *s = (server *)user;
    const tprpc_message last = {.metadata = "done", .metadata_size = 4};
    if (message->tensor_count != 1 || message->tensors[0].size != sizeof s->parameters) {
        tprpc_fail(request, 1, "push takes one tensor of all parameters");
        return;
    }
    const float *gradient = (const float *)message->tensors[0].data;
    for (size_t i = 0; i < PARAMETERS; i++) s->parameters[i] -= rate * gradient[i];
    s->done++;
    tprpc_reply(request, s->done >= s->steps ? &last : NULL);
}

// How far the model is from what is to be learnt: the root of the mean squared difference.
static double distance(const server *s) {
    double sum = 0;
    for (size_t i = 0; i < PARAMETERS; i++) sum += pow((double)(s->parameters[i] - truth(i)), 2);
    return sqrt(sum / PARAMETERS);
}

// A worker is this program anew: a forked child must not use what its parent has of tprpc.
static pid_t start_worker(const char *program, const char *store, int worker, int life) {
    char name[24], seed[24];
    snprintf(name, sizeof name, "worker%d", worker);
    snprintf(seed, sizeof seed, "%d", 1 + worker + 1000 * life);
    pid_t pid = fork();
    if (pid) return pid;
    execl("/proc/self/exe", program, "--work", store, name, seed, (char *)NULL);
    _exit(127);
}

static bool serve_until(server *s, tprpc_context *context, int done, int64_t most_ms) {
    const int64_t end = tprpc_now_us(context) + most_ms * 1000;
    while (s->done < done && tprpc_now_us(context) < end) tprpc_poll(context, 100000, 0);
    return s->done >= done;
}

// One line for each worker, whichever process had its name.
static void print_table(tprpc_agent *agent) {
    tprpc_peer_stats peers[MAX_WORKERS + 1];
    size_t count = tprpc_agent_get_peers(agent, peers, MAX_WORKERS + 1, sizeof *peers);
    printf("%-10s %9s %7s %9s %14s %14s\n", "worker", "processes", "calls", "failed", "bytes received", "bytes sent");
    for (size_t i = 0; i < count && i < MAX_WORKERS + 1; i++) {
        const tprpc_flow *from = &peers[i].from;
        printf("%-10s %9llu %7llu %9llu %14llu %14llu\n", peers[i].name, (unsigned long long)from->pipes,
               (unsigned long long)from->calls, (unsigned long long)from->errors,
               (unsigned long long)from->bytes_received, (unsigned long long)from->bytes_sent);
    }
}

// Trains until `steps` gradients have come. A third on, one worker dies and is replaced.
static bool train(server *s, tprpc_context *context, tprpc_agent *agent, pid_t *workers, const char *program,
                  const char *store, tprpc_error *error) {
    char name[24];
    snprintf(name, sizeof name, "worker%d", KILLED);
    if (!serve_until(s, context, s->steps / 3, 60000)) {
        tprpc_error_set(error, TPRPC_ERROR_TIMEOUT, 0, "%d gradients came in a minute", s->done);
        return false;
    }
    printf("%d gradients: the model is %.4f from the truth; %s is killed and replaced\n", s->done, distance(s), name);
    kill(workers[KILLED], SIGKILL);
    waitpid(workers[KILLED], NULL, 0);
    workers[KILLED] = -1;
    if (tprpc_agent_remove_worker(agent, name, START_MS, error)) return false;
    workers[KILLED] = start_worker(program, store, KILLED, 1);
    if (serve_until(s, context, s->steps, 60000)) return true;
    tprpc_error_set(error, TPRPC_ERROR_TIMEOUT, 0, "%d gradients came in a minute more", s->done);
    return false;
}

static int serve(const char *program, const char *store, int worker_count, int steps) {
    static server s;
    tprpc_context *context = NULL;
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    pid_t workers[MAX_WORKERS];
    const tprpc_context_desc polled = {.spin_us = TPRPC_NOW};   // there are more processes than processors
    const tprpc_method_desc pull = {.name = "pull", .handler = on_pull, .user = &s};
    const tprpc_method_desc push = {.name = "push", .handler = on_push, .user = &s};
    int left = worker_count, status = 0, failed = 0;
    s.steps = steps;
    for (int i = 0; i < worker_count; i++) workers[i] = -1;
    bool good = !tprpc_context_create(&polled, &context, &error);
    const tprpc_agent_desc desc = {.context = context, .name = "server", .init_method = store, .serve_store = true};
    good = good && !tprpc_agent_create(&desc, &agent, &error) && !tprpc_agent_register(agent, &pull, &error) &&
           !tprpc_agent_register(agent, &push, &error) && !tprpc_agent_wait_ready(agent, START_MS, &error);
    for (int i = 0; good && i < worker_count; i++) workers[i] = start_worker(program, store, i, 0);
    good = good && train(&s, context, agent, workers, program, store, &error);
    const int64_t end = context ? tprpc_now_us(context) + (int64_t)START_MS * 1000 : 0;
    while (good && left && tprpc_now_us(context) < end) {      // they hear of the end by their next push, and leave
        tprpc_poll(context, 10000, 0);
        for (int i = 0; i < worker_count; i++) {
            if (workers[i] <= 0 || waitpid(workers[i], &status, WNOHANG) != workers[i]) continue;
            workers[i] = -1;
            left--;
            failed += status != 0;
        }
    }
    for (int i = 0; i < worker_count; i++) {
        if (workers[i] <= 0) continue;
        kill(workers[i], SIGKILL);
        waitpid(workers[i], NULL, 0);
    }
    if (good) print_table(agent);
    if (good) printf("%d gradients: the model is %.4f from the truth\n", s.done, distance(&s));
    if (good && (left || failed))
        tprpc_error_set(&error, TPRPC_ERROR_PEER, 0, "%d workers failed, %d did not end", failed, left);
    else if (good && !(distance(&s) < enough))
        tprpc_error_set(&error, TPRPC_ERROR_INVALID, 0, "the model is further from the truth than %.2f", enough);
    if (good) tprpc_agent_leave(agent, START_MS, error.status ? NULL : &error);
    tprpc_agent_destroy(agent);
    tprpc_context_destroy(context);
    return error.status == TPRPC_OK ? 0 : fail(&error);
}

int main(int argc, char **argv) {
    if (argc == 5 && strcmp(argv[1], "--work") == 0) return work(argv[2], argv[3], (uint32_t)atoi(argv[4]));
    const int workers = argc > 1 ? atoi(argv[1]) : 4, steps = argc > 2 ? atoi(argv[2]) : 4000;
    const char *store = argc > 3 ? argv[3] : "tcp://127.0.0.1:29501";
    if (argc > 4 || workers < 2 || workers > MAX_WORKERS || steps < 3) {
        fprintf(stderr, "usage: parameter_server [workers, 2 to %d (default: 4) [gradients (default: 4000) [store's "
                "address]]]\n", MAX_WORKERS);
        return 2;
    }
    return serve(argv[0], store, workers, steps);
}
