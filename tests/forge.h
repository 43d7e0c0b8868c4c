/* What a peer made by hand says, put together with the library's own writers. After tprpc.h with its implementation. */
#ifndef TPRPC_TESTS_FORGE_H
#define TPRPC_TESTS_FORGE_H

#include "pipe_common.h"

typedef struct script { uint8_t bytes[65536]; size_t size; } script;

static UNUSED void put_frame(script *s, uint8_t kind, uint8_t handles, uint16_t channel, const void *body,
                             uint32_t size) {
    REQUIRE(s->size + TPR_WIRE_HEADER + size <= sizeof s->bytes);
    tpr_wire_put_frame(s->bytes + s->size, size, kind, handles, channel);
    if (size) memcpy(s->bytes + s->size + TPR_WIRE_HEADER, body, size);
    s->size += TPR_WIRE_HEADER + size;
}

static UNUSED void put_hello_of(script *s, uint16_t minor) {
    static tpr_wire_hello hello;
    uint8_t body[TPR_WIRE_FIRST];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    memset(&hello, 0, sizeof hello);
    hello.major = TPR_WIRE_MAJOR;
    hello.minor = minor;
    hello.message_bytes = 1 << 30;
    hello.metadata_bytes = 1 << 20;
    hello.tensors = 100;
    hello.window = 1 << 20;
    hello.offer_count = 2;
    snprintf(hello.offers[0].name, sizeof hello.offers[0].name, "basic");
    hello.offers[0].channel = true;
    snprintf(hello.offers[1].name, sizeof hello.offers[1].name, "tcp");
    tpr_wire_write_hello(&w, &hello);
    REQUIRE(!w.failed);
    put_frame(s, TPR_WIRE_HELLO, 0, 0, body, (uint32_t)(w.at - body));
}

static UNUSED void put_hello(script *s) { put_hello_of(s, TPR_WIRE_MINOR); }

static UNUSED void put_agree(script *s, uint32_t step) {
    static tpr_wire_agree agree;
    uint8_t body[TPR_WIRE_CONTROL];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    memset(&agree, 0, sizeof agree);
    agree.step = step;
    agree.count = 1;
    snprintf(agree.proofs[0].name, sizeof agree.proofs[0].name, "basic");
    agree.proofs[0].verdict = true;
    tpr_wire_write_agree(&w, &agree);
    REQUIRE(!w.failed);
    put_frame(s, TPR_WIRE_AGREE, 0, 0, body, (uint32_t)(w.at - body));
}

/* What a connector says until the pipe is open, without waiting for answers, which the protocol allows. */
static UNUSED void put_handshake(script *s) {
    put_hello(s);
    put_agree(s, 1);
    put_agree(s, 3);
}

typedef struct item { uint64_t size; uint32_t metadata; uint8_t transfer; } item;

/* A message of payloads; trailing: bytes behind the header that are there. */
static UNUSED void put_message(script *s, uint32_t metadata, uint16_t payloads, uint16_t tensors, uint8_t transfers,
                        uint8_t prefix, const item *items, size_t item_count, size_t trailing) {
    static uint8_t body[32768];
    tpr_wire_writer w = tpr_wire_writer_of(body, sizeof body);
    tpr_wire_message head;
    memset(body, 0, sizeof body);
    head.metadata_size = metadata;
    head.payloads = payloads;
    head.tensors = tensors;
    head.transfers = transfers;
    head.prefix_size = prefix;
    tpr_wire_write_message(&w, &head);
    for (size_t i = 0; i < item_count; i++) {
        tpr_wire_item wire;
        memset(&wire, 0, sizeof wire);
        wire.size = items[i].size;
        wire.metadata_size = items[i].metadata;
        wire.transfer = items[i].transfer;
        tpr_wire_write_payload(&w, &wire);
    }
    put_frame(s, TPR_WIRE_MESSAGE, 0, 0, body, (uint32_t)((size_t)(w.at - body) + trailing));
}

#endif
