// wave_field.h: what wave.c simulates and shows, and how it measures. Nothing here knows of tprpc.
#include <png.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MAX_CELLS = 1 << 26 };

typedef struct field { float *cells; size_t width, height; } field;

// Says what is wrong; false.
#define COMPLAIN(...) (fprintf(stderr, "wave: " __VA_ARGS__), fprintf(stderr, "\n"), false)

// ---- the simulation -------------------------------------------------------------------------------------------------

static float cell_step(float before, float mid, float up, float down, float left, float right) {
    const float speed = 0.04f, damping = 0.9999f;   // speed: squared, in cells per step; stable up to 0.5
    return mid + damping * (mid - before) + speed * (up + down + left + right - 4.0f * mid);
}

// One step of rows 1 to `rows`; rows 0 and rows + 1 are halos, not used where the strip ends at the field's `top` or
// `bottom`: waves are reflected there. `next` holds the level before `now` and becomes the one after it.
static void strip_step(float *restrict next, const float *now, size_t rows, size_t width, bool top, bool bottom) {
    const size_t last = width - 1;
    for (size_t y = 1; y <= rows; y++) {
        const float *mid = now + y * width;
        const float *up = y == 1 && top ? mid : mid - width, *down = y == rows && bottom ? mid : mid + width;
        float *to = next + y * width;
        to[0] = cell_step(to[0], mid[0], up[0], down[0], mid[0], mid[1]);
        for (size_t x = 1; x < last; x++) to[x] = cell_step(to[x], mid[x], up[x], down[x], mid[x - 1], mid[x + 1]);
        to[last] = cell_step(to[last], mid[last], up[last], down[last], mid[last - 1], mid[last]);
    }
}

// Two levels of a strip, each with its halos, both as the field starts: at rest.
static bool strip_create(float *levels[2], const field *start, size_t first, size_t rows) {
    for (int i = 0; i < 2; i++) {
        levels[i] = (float *)calloc((rows + 2) * start->width, sizeof(float));
        if (!levels[i]) return COMPLAIN("no memory for %zu rows", rows);
        memcpy(levels[i] + start->width, start->cells + first * start->width, rows * start->width * sizeof(float));
    }
    return true;
}

// ---- pictures -------------------------------------------------------------------------------------------------------

// Reads an image of any kind as grey; columns 0: as many as it has.
static bool field_load(field *f, const char *path, size_t columns) {
    png_image image = {.version = PNG_IMAGE_VERSION};
    const png_color black = {0, 0, 0};
    if (!png_image_begin_read_from_file(&image, path)) return COMPLAIN("%s: %s", path, image.message);
    image.format = PNG_FORMAT_GRAY;
    const size_t width = image.width, height = image.height;
    f->width = columns ? columns : width;
    f->height = f->width * height / width;
    const bool fits = width <= MAX_CELLS / height && f->width >= 2 && f->height && f->height <= MAX_CELLS / f->width;
    uint8_t *grey = fits ? (uint8_t *)malloc(width * height) : NULL;
    f->cells = fits ? (float *)malloc(f->width * f->height * sizeof(float)) : NULL;
    const bool good = grey && f->cells && png_image_finish_read(&image, &black, grey, 0, NULL);
    for (size_t y = 0; good && y < f->height; y++)
        for (size_t x = 0; x < f->width; x++)
            f->cells[y * f->width + x] = grey[y * height / f->height * width + x * width / f->width] / 255.0f;
    free(grey);
    png_image_free(&image);
    if (good) return true;
    return COMPLAIN("%s: %s", path, !fits ? "no size for a field" : *image.message ? image.message : "no memory");
}

// Crests are light, troughs are blue, calm is dark.
static void colour(uint8_t *rgb, float value) {
    static const float calm[3] = {16, 32, 72}, crest[3] = {255, 250, 235}, trough[3] = {0, 150, 210};
    const float *to = value > 0 ? crest : trough;
    const float part = value > 0 ? 2 * value : -2 * value;
    for (int i = 0; i < 3; i++) rgb[i] = (uint8_t)(calm[i] + (to[i] - calm[i]) * (part < 1 ? part : 1));
}

static bool frame_write(const char *folder, const field *f, const float *cells, int number) {
    char path[512];
    png_image image = {.version = PNG_IMAGE_VERSION, .width = (png_uint_32)f->width, .height = (png_uint_32)f->height,
                       .format = PNG_FORMAT_RGB, .flags = PNG_IMAGE_FLAG_FAST};
    uint8_t *rgb = (uint8_t *)malloc(f->width * f->height * 3);
    if (!rgb) return COMPLAIN("no memory for a frame");
    for (size_t i = 0; i < f->width * f->height; i++) colour(rgb + 3 * i, cells[i]);
    snprintf(path, sizeof path, "%s/frame%05d.png", folder, number);
    const bool written = png_image_write_to_file(&image, path, 0, rgb, 0, NULL);
    free(rgb);
    return written || COMPLAIN("%s: %s", path, image.message);
}

// ---- call latency: counts in buckets, eight for each doubling -------------------------------------------------------

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

enum { BUCKETS = 40 * 8 };
typedef struct timing { uint64_t calls; uint32_t bucket[BUCKETS]; } timing;

static void timing_add(timing *t, int64_t ns) {
    unsigned octave = 0;
    while ((ns >> octave) > 15) octave++;
    const size_t i = octave * 8 + (size_t)(ns >> octave);
    t->calls++;
    t->bucket[i < BUCKETS ? i : BUCKETS - 1]++;
}

static void timing_merge(timing *t, const timing *from) {
    t->calls += from->calls;
    for (size_t i = 0; i < BUCKETS; i++) t->bucket[i] += from->bucket[i];
}

static double timing_us(const timing *t, unsigned percent) {
    uint64_t seen = 0;
    size_t i = 0;
    while (i < BUCKETS - 1 && (seen += t->bucket[i]) * 100 < t->calls * percent) i++;
    return (double)(i < 16 ? i : ((i & 7) + 8) << (i / 8 - 1)) / 1000.0;
}
