/* What the fuzz targets share: the input as a tape of choices, a machine whose time is virtual and whose memory is
   counted, and checks that end the process, which libFuzzer reports with the input.

   A target is one translation unit with the implementation in it. It defines fuzz_one(), which runs once per input. */
#ifndef TPRPC_FUZZ_H
#define TPRPC_FUZZ_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* A moment: where a peer that shares memory may write while the library is at work. Copies are moments, for what is
   copied and then checked must not be read again; so is each look at a word that both share. */
static void fuzz_moment(void);
#ifdef FUZZ_MOMENTS
#define memcpy(to, from, size) (fuzz_moment(), (memcpy)(to, from, size))
#define __atomic_load_n(at, order) (fuzz_moment(), __atomic_load_n(at, order))
#endif

#define TPRPC_TEST_HOOKS
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../../tprpc.h"

#define FUZZ_UNUSED __attribute__((unused))

#define FUZZ_CHECK(condition)                                                                                \
    do {                                                                                                     \
        if (!(condition)) {                                                                                  \
            fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE__, __LINE__, #condition);                   \
            abort();                                                                                         \
        }                                                                                                    \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
static void fuzz_one(void);

/* ---- the input: when it is over, every choice is 0 */

static const uint8_t *fuzz_at, *fuzz_end;

static FUZZ_UNUSED bool fuzz_left(void) { return fuzz_at < fuzz_end; }
static FUZZ_UNUSED uint8_t fuzz_u8(void) { return fuzz_at < fuzz_end ? *fuzz_at++ : (uint8_t)0; }
static FUZZ_UNUSED uint16_t fuzz_u16(void) {
    uint16_t low = fuzz_u8();
    return (uint16_t)(low | fuzz_u8() << 8);
}
static FUZZ_UNUSED uint32_t fuzz_u32(void) {
    uint32_t low = fuzz_u16();
    return low | (uint32_t)fuzz_u16() << 16;
}
static FUZZ_UNUSED uint64_t fuzz_u64(void) {
    uint64_t low = fuzz_u32();
    return low | (uint64_t)fuzz_u32() << 32;
}
static FUZZ_UNUSED uint32_t fuzz_below(uint32_t n) { return n > 256 ? fuzz_u16() % n : fuzz_u8() % n; }

/* The next bytes of the input, at most `size`; *size is how many there are. */
static FUZZ_UNUSED const uint8_t *fuzz_bytes(size_t *size) {
    const uint8_t *at = fuzz_at;
    if (*size > (size_t)(fuzz_end - fuzz_at)) *size = (size_t)(fuzz_end - fuzz_at);
    fuzz_at += *size;
    return at;
}

/* A number: most are small, and many lie at an edge. */
static FUZZ_UNUSED uint64_t fuzz_number(void) {
    uint8_t how = fuzz_u8();
    switch (how >> 5) {
    case 0: case 1: case 2: return how;
    case 3: return fuzz_u16();
    case 4: return fuzz_u32();
    case 5: return (UINT64_C(1) << (how & 31)) - (fuzz_u8() & 1);
    case 6: return (UINT64_C(1) << (32 + (how & 31))) - (fuzz_u8() & 1);
    default: return how & 1 ? UINT64_MAX - (how >> 1 & 15) : fuzz_u64();
    }
}

/* How many bytes: 0 to `most`, small ones more often. */
static FUZZ_UNUSED size_t fuzz_size(size_t most) {
    uint8_t how = fuzz_u8();
    size_t size = how < 128 ? how : how < 192 ? (size_t)(how - 127) * 61 : how < 255 ? (size_t)(how - 191) * 4099 : most;
    return size < most ? size : most;
}

/* ---- the machine */

static int64_t fuzz_now_us;
static uint32_t fuzz_sleeps;           /* without a limit of time, in a row: nobody is there to end them */
static uint32_t fuzz_alloc_fails;      /* 0: none does; n: the n-th from now */
static int64_t fuzz_piece;             /* the most that one send or recv moves; 0: no limit */
static size_t fuzz_memory, fuzz_blocks;

static FUZZ_UNUSED int64_t fuzz_clock(void *user) {
    (void)user;
    fuzz_moment();
    return fuzz_now_us++;
}

/* Who sleeps sees what has come, or wakes when his time is over, which is at once. */
static FUZZ_UNUSED int fuzz_hook(const char *call, int64_t *size) {
    if (strcmp(call, "epoll_wait") == 0) {
        FUZZ_CHECK(*size >= 0 || ++fuzz_sleeps < 1000);
        if (*size > 0) fuzz_now_us += *size;
        *size = 0;
    } else if (strcmp(call, "alloc") == 0) {
        return fuzz_alloc_fails && --fuzz_alloc_fails == 0 ? ENOMEM : 0;
    } else if (strcmp(call, "futex_wait") == 0) {
        return EAGAIN;
    } else if (fuzz_piece && (strcmp(call, "send") == 0 || strcmp(call, "recv") == 0)) {
        if (*size > fuzz_piece) *size = fuzz_piece;
    }
    fuzz_moment();
    return 0;
}

static FUZZ_UNUSED void *fuzz_alloc(size_t size, size_t align, uint32_t tag, void *user) {
    void *ptr = NULL;
    (void)tag; (void)user;
    fuzz_moment();
    if (posix_memalign(&ptr, align < sizeof ptr ? sizeof ptr : align, size ? size : 1) != 0) return NULL;
    fuzz_memory += size;
    fuzz_blocks++;
    return ptr;
}

static FUZZ_UNUSED void fuzz_free(void *ptr, size_t size, uint32_t tag, void *user) {
    (void)tag; (void)user;
    if (!ptr) return;
    FUZZ_CHECK(fuzz_blocks > 0 && fuzz_memory >= size);
    fuzz_memory -= size;
    fuzz_blocks--;
    free(ptr);
}

/* A polled context on that machine, with limits that a fuzzer reaches. */
static FUZZ_UNUSED tprpc_context *fuzz_context(const char *transports) {
    tprpc_context_desc desc;
    tprpc_context *ctx = NULL;
    memset(&desc, 0, sizeof desc);
    desc.spin_us = TPRPC_NOW;
    desc.transports = transports;
    desc.allocator.alloc = fuzz_alloc;
    desc.allocator.free = fuzz_free;
    desc.clock_us = fuzz_clock;
    desc.limits.message_bytes = 4 << 20;
    desc.limits.metadata_bytes = 64 << 10;
    desc.limits.memory_bytes = 64 << 20;
    desc.limits.inflight_bytes = 2 << 20;
    desc.limits.tensors = 64;
    desc.limits.pipes = 16;
    desc.limits.handshakes = 4;
    desc.limits.pending_calls = 16;
    FUZZ_CHECK(tprpc_context_create(&desc, &ctx, NULL) == TPRPC_OK);
    return ctx;
}

static FUZZ_UNUSED void fuzz_poll(tprpc_context *ctx, uint32_t times) {
    for (uint32_t i = 0; i < times; i++) {
        fuzz_now_us += 150;            /* so that every poll looks at the sockets */
        fuzz_sleeps = 0;
        tprpc_poll(ctx, TPRPC_NOW, 0);
    }
}

/* How many descriptors are open; no input needs one as high as the last that is looked at. The lowest free number would
   not do: what is leaked may lie above a number that was given back. */
static FUZZ_UNUSED int fuzz_count_fds(void) {
    int count = 0;
    for (int fd = 3; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    fuzz_at = data;
    fuzz_end = data + size;
    fuzz_now_us = 1000000;
    fuzz_sleeps = fuzz_alloc_fails = 0;
    fuzz_piece = 0;
    tprpc_test_hook = fuzz_hook;
    fuzz_one();
    FUZZ_CHECK(fuzz_memory == 0 && fuzz_blocks == 0);
    return 0;
}

#endif
