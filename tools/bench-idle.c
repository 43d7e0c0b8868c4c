// bench-idle: two processes, an agent in each, connected and doing nothing. Prints "ready PID PID" and stays until it
// is killed, so that bench.py can read in /proc what they cost meanwhile.
//
//   bench-idle [--threads N]      N loops of the library's own in each (default: 0, polled)

#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"

#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void idle_die(const char *what, const tprpc_error *error) __attribute__((noreturn));

static void idle_die(const char *what, const tprpc_error *error) {
    fprintf(stderr, "bench-idle: %s: %s\n", what, error ? error->text : "failed");
    exit(1);
}

static void idle_echo(tprpc_request request, const tprpc_message *message, void *user) {
    (void)user;
    tprpc_reply(request, message);
}

static void idle_called(tprpc_status status, const tprpc_message *reply, const tprpc_error *error, void *user) {
    (void)reply;
    if (status != TPRPC_OK) idle_die("call", error);
    *(bool *)user = true;
}

// A port of this host that nobody uses, for the store.
static int idle_free_port(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t size = sizeof address;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) != 0 ||
        getsockname(fd, (struct sockaddr *)&address, &size) != 0) idle_die("socket", NULL);
    close(fd);
    return ntohs(address.sin_port);
}

// Joins, calls the other one once, so that they are connected, and idles for ever.
static void idle_run(int rank, int port, int threads, pid_t other) {
    static const char *const names[] = {"zero", "one"};
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_context *ctx = NULL;
    tprpc_agent *agent = NULL;
    bool called = false;
    char init_method[64];
    snprintf(init_method, sizeof init_method, "tcp://127.0.0.1:%d", port);
    tprpc_context_desc context_desc = {.threads = threads};
    tprpc_agent_desc desc = {.name = names[rank], .init_method = init_method, .rank = rank, .world_size = 2};
    tprpc_method_desc echo = {.name = "echo", .handler = idle_echo};
    tprpc_call_options options = {.on_done = idle_called, .user = &called};
    if (tprpc_context_create(&context_desc, &ctx, &error) != TPRPC_OK) idle_die("context", &error);
    desc.context = ctx;
    if (tprpc_agent_create(&desc, &agent, &error) != TPRPC_OK ||
        tprpc_agent_register(agent, &echo, &error) != TPRPC_OK ||
        tprpc_agent_wait_ready(agent, 30000, &error) != TPRPC_OK) idle_die("agent", &error);
    if (tprpc_call(agent, names[1 - rank], "echo", NULL, &options, NULL) != TPRPC_OK) idle_die("call", NULL);
    if (threads > 0) sleep(2);
    else for (int i = 0; i < 20; i++) tprpc_poll(ctx, 100000, 0);
    if (!called) idle_die("no answer within 2 s", NULL);
    if (other > 0) {
        printf("ready %d %d\n", (int)getpid(), (int)other);
        fflush(stdout);
    }
    for (;;) {
        if (threads > 0) pause();
        else tprpc_poll(ctx, TPRPC_FOREVER, 0);
    }
}

int main(int argc, char **argv) {
    int threads = argc == 3 && strcmp(argv[1], "--threads") == 0 ? atoi(argv[2]) : 0, port = idle_free_port();
    if (argc != 1 && (argc != 3 || threads < 1)) {
        fputs("usage: bench-idle [--threads N]\n", stderr);
        return 2;
    }
    pid_t parent = getpid(), child = fork();
    if (child < 0) idle_die("fork", NULL);
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) return 1;           // it ended before prctl
    }
    idle_run(child == 0, port, threads, child);
    return 0;
}
