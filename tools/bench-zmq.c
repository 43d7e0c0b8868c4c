// bench-zmq: what ZeroMQ needs for a message there and back (PAIR), and for messages one way (PUSH, PULL), between two
// processes of this host. bench.py runs it beside tprpc-perf.  Usage: bench_peer.h

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <zmq.h>

static const char *const peer_name = "bench-zmq";
#include "bench_peer.h"

static void *zmq_ctx, *zmq_end;

static const char *peer_reason(void) { return zmq_strerror(zmq_errno()); }

static void peer_open(const peer_options *o, bool serving) {
    zmq_ctx = zmq_ctx_new();
    peer_check(zmq_ctx != NULL, "zmq_ctx_new");
    zmq_end = zmq_socket(zmq_ctx, !o->stream ? ZMQ_PAIR : serving ? ZMQ_PULL : ZMQ_PUSH);
    peer_check(zmq_end != NULL, "zmq_socket");
    peer_check(zmq_setsockopt(zmq_end, ZMQ_SNDHWM, &o->ahead, sizeof o->ahead) == 0, "ZMQ_SNDHWM");
    peer_check(zmq_setsockopt(zmq_end, ZMQ_RCVHWM, &o->ahead, sizeof o->ahead) == 0, "ZMQ_RCVHWM");
    if (serving) peer_check(zmq_bind(zmq_end, o->address) == 0, "zmq_bind");
    else peer_check(zmq_connect(zmq_end, o->address) == 0, "zmq_connect");
}

static void zmq_keep(void *data, void *hint) {       // the library's copy of the pointer is gone; the bytes stay
    (void)data;
    (void)hint;
}

// Lends large messages, and copies small ones, as is faster for each.
static void peer_send(const unsigned char *data, size_t size) {
    zmq_msg_t message;
    if (size <= 4096) {
        peer_check(zmq_send(zmq_end, data, size, 0) == (int)size, "zmq_send");
        return;
    }
    void *lent = (void *)(uintptr_t)data;
    peer_check(zmq_msg_init_data(&message, lent, size, zmq_keep, NULL) == 0, "zmq_msg_init_data");
    peer_check(zmq_msg_send(&message, zmq_end, 0) >= 0, "zmq_msg_send");
}

static void peer_receive(size_t size) {
    zmq_msg_t message;
    peer_check(zmq_msg_init(&message) == 0, "zmq_msg_init");
    peer_check(zmq_msg_recv(&message, zmq_end, 0) >= 0, "zmq_msg_recv");
    if (zmq_msg_size(&message) != size) peer_die("zmq_msg_recv", "a message arrived with another size");
    zmq_msg_close(&message);
}

static void peer_close(void) {
    zmq_close(zmq_end);
    zmq_ctx_term(zmq_ctx);           // waits until all has left
}
