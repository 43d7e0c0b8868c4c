// Times what a pending call costs the timeout map: a million timers added, then cancelled in another order, while the
// clock goes on as it does at a million calls a second. Prints one line of JSON: ns for each, medians of some rounds.
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "../tprpc.h"
#include <stdio.h>
#include <stdlib.h>

enum { TIMERS = 1000000, ROUNDS = 7, BATCH = 1000 };   // BATCH: timers between two advances of 1 ms
static const int64_t TIMEOUT_US = 60000000;

typedef struct call { tprpc_work timeout; char rest[80]; } call;   // on cache lines of their own, as calls are

static int compare(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

int main(void) {
    static double add_ns[ROUNDS], cancel_ns[ROUNDS];
    tpr_timer_wheel *wheel = (tpr_timer_wheel *)malloc(sizeof *wheel);
    call *calls = (call *)calloc(TIMERS, sizeof *calls);
    uint32_t *order = (uint32_t *)malloc(TIMERS * sizeof *order);
    uint64_t random = 1;
    if (!wheel || !calls || !order) return fprintf(stderr, "bench-timers: no memory\n"), 1;
    for (uint32_t i = 0; i < TIMERS; i++) order[i] = i;
    for (uint32_t i = TIMERS - 1; i > 0; i--) {
        random = random * UINT64_C(6364136223846793005) + 1442695040888963407u;
        uint32_t j = (uint32_t)((random >> 32) % (i + 1)), other = order[j];
        order[j] = order[i];
        order[i] = other;
    }
    for (int round = 0; round < ROUNDS; round++) {
        int64_t clock_us = INT64_C(1000000000) * (round + 1), begin, middle, end;
        tpr_timer_init(wheel, clock_us);
        begin = tpr_os_now_us();
        for (uint32_t i = 0; i < TIMERS; i++) {
            tpr_timer_set(wheel, &calls[i].timeout, clock_us + TIMEOUT_US);
            if (i % BATCH == 0) tpr_timer_advance(wheel, clock_us += 1000);
        }
        middle = tpr_os_now_us();
        for (uint32_t i = 0; i < TIMERS; i++) {
            tpr_timer_cancel(wheel, &calls[order[i]].timeout);
            if (i % BATCH == 0) tpr_timer_advance(wheel, clock_us += 1000);
        }
        end = tpr_os_now_us();
        if (wheel->count) return fprintf(stderr, "bench-timers: timers are left\n"), 1;
        add_ns[round] = (double)(middle - begin) * 1000.0 / TIMERS;
        cancel_ns[round] = (double)(end - middle) * 1000.0 / TIMERS;
    }
    qsort(add_ns, ROUNDS, sizeof add_ns[0], compare);
    qsort(cancel_ns, ROUNDS, sizeof cancel_ns[0], compare);
    printf("{\"add_ns\": %.1f, \"cancel_ns\": %.1f}\n", add_ns[ROUNDS / 2], cancel_ns[ROUNDS / 2]);
    free(order);
    free(calls);
    free(wheel);
    return 0;
}
