// bench-nng: what nng needs for a message there and back (pair), and for messages one way (push, pull), between two
// processes of this host. bench.py runs it beside tprpc-perf.  Usage: bench_peer.h

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <nng/nng.h>
#include <nng/protocol/pair0/pair.h>
#include <nng/protocol/pipeline0/pull.h>
#include <nng/protocol/pipeline0/push.h>

static const char *const peer_name = "bench-nng";
#include "bench_peer.h"

static nng_socket nng_end;
static int nng_failed;               // the last status

static const char *peer_reason(void) { return nng_strerror(nng_failed); }

static bool nng_good(int status) {
    nng_failed = status;
    return status == 0;
}

static void peer_open(const peer_options *o, bool serving) {
    int (*open)(nng_socket *socket) = !o->stream ? nng_pair0_open : serving ? nng_pull0_open : nng_push0_open;
    peer_check(nng_good(open(&nng_end)), "open");
    peer_check(nng_good(nng_socket_set_size(nng_end, NNG_OPT_RECVMAXSZ, 0)), NNG_OPT_RECVMAXSZ);     // no limit
    // Not every protocol has such a buffer; where there is none, messages wait elsewhere.
    if (o->stream) nng_socket_set_int(nng_end, serving ? NNG_OPT_RECVBUF : NNG_OPT_SENDBUF, o->ahead);
    if (serving) peer_check(nng_good(nng_listen(nng_end, o->address, NULL, 0)), "nng_listen");
    else peer_check(nng_good(nng_dial(nng_end, o->address, NULL, 0)), "nng_dial");
}

static void peer_send(const unsigned char *data, size_t size) {
    peer_check(nng_good(nng_send(nng_end, (void *)(uintptr_t)data, size, 0)), "nng_send");   // it copies
}

static void peer_receive(size_t size) {
    nng_msg *message = NULL;
    peer_check(nng_good(nng_recvmsg(nng_end, &message, 0)), "nng_recvmsg");
    if (nng_msg_len(message) != size) peer_die("nng_recvmsg", "a message arrived with another size");
    nng_msg_free(message);
}

// A push socket drops what it has not sent when it is closed: but by now the other end has told that it has all.
static void peer_close(void) {
    nng_close(nng_end);
}
