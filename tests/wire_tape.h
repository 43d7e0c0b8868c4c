/* Recorded sessions (tests/wire/README.md): frames of one or two connections between two ends, as they followed each
   other. After the implementation. */
#ifndef TPRPC_TESTS_WIRE_TAPE_H
#define TPRPC_TESTS_WIRE_TAPE_H

#include "sockets.h"

/* A frame. way & 1: who sent it, 0 who connected; way >> 1: on which connection. */
typedef struct taped { int way; uint32_t size; uint8_t *bytes; } taped;
typedef struct tape { int closer; size_t count; taped frames[400]; } tape;

static inline tape *tape_new(void) {
    tape *t = (tape *)calloc(1, sizeof(tape));
    REQUIRE(t != NULL);
    return t;
}

static inline void tape_free(tape *t) {
    size_t i;
    for (i = 0; i < t->count; i++) free(t->frames[i].bytes);
    free(t);
}

static inline void tape_add(tape *t, int way, const uint8_t *bytes, uint32_t size) {
    REQUIRE(t->count < sizeof t->frames / sizeof t->frames[0]);
    t->frames[t->count].way = way;
    t->frames[t->count].size = size;
    t->frames[t->count].bytes = (uint8_t *)malloc(size);
    REQUIRE(t->frames[t->count].bytes != NULL);
    memcpy(t->frames[t->count++].bytes, bytes, size);
}

enum { RUN = 32 };                     /* equal bytes that are worth a run */

static inline void tape_write(const tape *t, const char *path) {
    FILE *file = fopen(path, "wb");
    size_t i;
    REQUIRE(file != NULL);
    fputs("TPRW", file);
    fputc(1, file);
    fputc(t->closer, file);
    for (i = 0; i < t->count; i++) {
        const taped *f = &t->frames[i];
        uint8_t head[5];
        uint32_t at = 0;
        head[0] = (uint8_t)f->way;
        tpr_base_store_le32(head + 1, f->size);
        fwrite(head, 1, 5, file);
        while (at < f->size) {         /* u32: a length, of bytes that follow or, with the top bit, of one repeated */
            uint32_t run = 1, plain = 0;
            while (at + run < f->size && f->bytes[at + run] == f->bytes[at]) run++;
            if (run >= RUN) {
                tpr_base_store_le32(head, run | 0x80000000u);
                fwrite(head, 1, 4, file);
                fputc(f->bytes[at], file);
                at += run;
                continue;
            }
            while (at + plain < f->size) {
                uint32_t same = 1;
                while (same < RUN && at + plain + same < f->size && f->bytes[at + plain + same] == f->bytes[at + plain])
                    same++;
                if (same == RUN) break;
                plain++;
            }
            tpr_base_store_le32(head, plain);
            fwrite(head, 1, 4, file);
            fwrite(f->bytes + at, 1, plain, file);
            at += plain;
        }
    }
    REQUIRE(fclose(file) == 0);
}

static inline uint32_t file_u32(FILE *file) {
    uint8_t bytes[4];
    REQUIRE(fread(bytes, 1, 4, file) == 4);
    return tpr_base_load_le32(bytes);
}

static inline tape *tape_read(const char *path) {
    static uint8_t bytes[2 << 20];
    FILE *file = fopen(path, "rb");
    tape *t = tape_new();
    char magic[6];
    int way;
    if (!file) fprintf(stderr, "%s: %s\n", path, strerror(errno));
    REQUIRE(file != NULL && fread(magic, 1, 6, file) == 6 && memcmp(magic, "TPRW\1", 5) == 0);
    t->closer = magic[5];
    while ((way = fgetc(file)) != EOF) {
        uint32_t size = file_u32(file), at = 0;
        REQUIRE(way <= 3 && size >= TPR_WIRE_HEADER && size <= sizeof bytes);
        while (at < size) {
            uint32_t piece = file_u32(file), n = piece & 0x7FFFFFFFu;
            REQUIRE(n > 0 && n <= size - at);
            if (piece & 0x80000000u) memset(bytes + at, fgetc(file), n);
            else REQUIRE(fread(bytes + at, 1, n, file) == n);
            at += n;
        }
        tape_add(t, way, bytes, size);
    }
    fclose(file);
    REQUIRE(t->count > 10);
    return t;
}

/* Splits a stream into frames. */
typedef struct splitter { uint8_t bytes[2 << 20]; size_t have; } splitter;

static inline const uint8_t *split_next(const splitter *s, uint32_t *size) {
    if (s->have < TPR_WIRE_HEADER) return NULL;
    *size = TPR_WIRE_HEADER + tpr_base_load_le32(s->bytes);
    return s->have >= *size ? s->bytes : NULL;
}

static inline void split_drop(splitter *s, uint32_t size) {
    s->have -= size;
    memmove(s->bytes, s->bytes + size, s->have);
}

/* False: the other end closed. */
static inline bool split_fill(splitter *s, int fd) {
    ssize_t n = recv(fd, s->bytes + s->have, sizeof s->bytes - s->have, MSG_DONTWAIT);
    if (n > 0) s->have += (size_t)n;
    return n > 0 || (n < 0 && errno == EAGAIN);
}

static inline tape *tape_of(const char *name) {
    char path[300];
    const char *slash = strrchr(__FILE__, '/');
    snprintf(path, sizeof path, "%.*swire/%s", slash ? (int)(slash - __FILE__ + 1) : 0, __FILE__, name);
    return tape_read(path);
}

#endif
