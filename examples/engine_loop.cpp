// engine_loop: calls from a frame loop, without threads and without waiting.
//
// Two processes, "sim0" and "sim1", each run a loop of 60 frames a second. Once in a frame the library gets at most
// 1.5 ms to move bytes and to run callbacks; nothing of it happens elsewhere. They send each other the edge of their
// world, a halo, received in place, and print how that went. It ends by itself after two seconds.
#define TPRPC_IMPLEMENTATION
#include "tprpc.h"
#include <arpa/inet.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

namespace {

const int64_t frame_us = 1000000 / 60, budget_us = 1500;
const unsigned frames = 120;
const size_t cells = 256;

struct world {
    float out[2][cells], in[2][cells];   // halo k is sent from out[k & 1] and received in in[k & 1]
    bool out_busy[2];
    bool ready, calling, failed, quit;
    unsigned sent, answered, received;   // halos
    float energy;                        // what simulate makes of the halo that came last
};

int64_t now_us() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return int64_t(t.tv_sec) * 1000000 + t.tv_nsec / 1000;
}

bool fail(const tprpc_error &error) {
    std::fprintf(stderr, "engine_loop: %s\n", error.text);
    return true;
}

// ---- callbacks: all of them run within tprpc_poll -------------------------------------------------------------------

void on_ready(tprpc_status status, const tprpc_message *, const tprpc_error *error, void *user) {
    world *w = static_cast<world *>(user);
    w->ready = status == TPRPC_OK;
    w->failed = !w->ready;
    if (error) fail(*error);
}

// Says where an incoming halo goes; its number, in the metadata, picks the buffer.
tprpc_status halo_place(tprpc_placement *p, void *user) {
    world *w = static_cast<world *>(user);
    const tprpc_message *d = p->descriptor;
    unsigned number;
    if (d->metadata_size != sizeof number || d->tensor_count != 1 || d->tensors[0].size != sizeof w->in[0])
        return TPRPC_ERROR_INVALID;
    std::memcpy(&number, d->metadata, sizeof number);
    if (number != w->received) return TPRPC_ERROR_INVALID;
    p->tensors[0].data = w->in[number & 1];
    return TPRPC_OK;
}

void on_halo(tprpc_request request, const tprpc_message *, void *user) {
    static_cast<world *>(user)->received++;
    tprpc_reply(request, nullptr);
}

void out_free(void *busy) { *static_cast<bool *>(busy) = false; }

void on_answer(tprpc_status status, const tprpc_message *, const tprpc_error *error, void *user) {
    world *w = static_cast<world *>(user);
    w->calling = false;
    if (status == TPRPC_OK) w->answered++;
    else if (!w->quit) w->failed = fail(*error);
}

// ---- a frame --------------------------------------------------------------------------------------------------------

void simulate(world &w, unsigned frame) {
    w.energy = 0;
    if (w.received)
        for (size_t i = 0; i < cells; i++) w.energy += w.in[(w.received - 1) & 1][i];
    if (!w.out_busy[w.sent & 1])
        for (size_t i = 0; i < cells; i++) w.out[w.sent & 1][i] = float(frame);
}

// One call at a time, and the next one into the other buffer: so a halo never lands where simulate reads.
void send_halo(world &w, tprpc_agent *agent, const char *peer) {
    const unsigned which = w.sent & 1;
    if (!w.ready || w.calling || w.out_busy[which]) return;
    tprpc_tensor t = {};
    t.data = w.out[which]; t.size = sizeof w.out[which]; t.dtype = TPRPC_F32; t.ndim = 1; t.shape[0] = cells;
    tprpc_message m = {};
    m.metadata = &w.sent; m.metadata_size = sizeof w.sent;
    m.tensors = &t; m.tensor_count = 1;
    m.release = out_free; m.release_user = &w.out_busy[which];
    tprpc_call_options o = {};
    tprpc_error refusal = {};
    o.on_done = on_answer; o.user = &w; o.error = &refusal;
    w.out_busy[which] = true;
    w.calling = tprpc_call(agent, peer, "halo", m, o) == TPRPC_OK;
    if (w.calling) w.sent++;
    else w.failed = fail(refusal);
}

void sleep_until(int64_t due_us) {
    const int64_t left = due_us - now_us();
    if (left > 0) usleep(static_cast<useconds_t>(left));
}

int run(const char *name, const char *peer) {
    static world w;
    tprpc_error error = {};
    tprpc_context *ctx = nullptr;
    tprpc_agent *agent = nullptr;
    if (tprpc_context_create(tprpc_context_desc(), &ctx, &error) != TPRPC_OK) return fail(error);
    tprpc_agent_desc ad = {};
    ad.context = ctx; ad.name = name; ad.init_method = "env://";
    tprpc_method_desc md = {};
    md.name = "halo"; md.handler = on_halo; md.place = halo_place; md.user = &w;
    if (tprpc_agent_create(ad, &agent, &error) != TPRPC_OK || tprpc_agent_register(agent, md, &error) != TPRPC_OK ||
        tprpc_agent_start(agent, on_ready, &w, &error) != TPRPC_OK) return fail(error);
    int64_t due = now_us(), worst = 0;
    for (unsigned frame = 0; frame < frames && !w.failed; frame++) {
        simulate(w, frame);
        send_halo(w, agent, peer);
        const int64_t before = now_us();
        tprpc_poll(ctx, TPRPC_NOW, budget_us);
        const int64_t took = now_us() - before;
        if (took > worst) worst = took;
        sleep_until(due += frame_us);
    }
    w.quit = true;
    const bool good = !w.failed && tprpc_agent_leave(agent, 5000, &error) == TPRPC_OK && w.answered && w.received;
    std::printf("%s: %u frames, %u calls answered, %u halos received, energy %g, worst poll %lld us\n", name, frames,
                w.answered, w.received, double(w.energy), static_cast<long long>(worst));
    std::fflush(stdout);
    if (error.status != TPRPC_OK) fail(error);
    tprpc_agent_destroy(agent);
    tprpc_context_destroy(ctx);
    return good ? 0 : 1;
}

// Sets what env:// reads, as launchers of several processes do.
bool set_environment() {
    sockaddr_in a = {};
    socklen_t size = sizeof a;
    const int fd = socket(AF_INET, SOCK_STREAM, 0);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    sockaddr *address = reinterpret_cast<sockaddr *>(&a);
    const bool found = fd >= 0 && !bind(fd, address, size) && !getsockname(fd, address, &size);
    if (fd >= 0) close(fd);
    char port[8];
    std::snprintf(port, sizeof port, "%d", ntohs(a.sin_port));
    return found && !setenv("MASTER_ADDR", "127.0.0.1", 1) && !setenv("MASTER_PORT", port, 1) &&
           !setenv("WORLD_SIZE", "2", 1);
}

} // namespace

int main() {
    if (!set_environment()) return 1;
    const pid_t child = fork();
    if (child < 0) return 1;
    setenv("RANK", child ? "0" : "1", 1);
    const int mine = child ? run("sim0", "sim1") : run("sim1", "sim0");
    int other = 0;
    if (child && waitpid(child, &other, 0) != child) return 1;
    return mine || other;
}
