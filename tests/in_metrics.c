/* The inside of what is counted: the histogram against a sorted list, the tables that name each figure, and names and
   callers of which there are more than are counted one by one. */
#define TPRPC_STATIC
#define TPRPC_IMPLEMENTATION
#include "agent_two.h"

/* ---- the histogram ---- */

static uint64_t seed = 1;

static uint64_t next_random(void) {    /* xorshift64* */
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * UINT64_C(2685821657736338717);
}

static int by_size(const void *a, const void *b) {
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* The buckets follow each other without a gap, each as wide as it may be. */
TEST(buckets_cover_all) {
    uint64_t begin = 0;
    for (uint32_t at = 0; at < TPR_BASE_HISTOGRAM_BUCKETS - 1; at++) {
        const uint64_t end = tpr_base_histogram_end(at);
        REQUIRE(end >= begin);
        CHECK_EQ_INT(tpr_base_histogram_at(begin), at);
        CHECK_EQ_INT(tpr_base_histogram_at(end), at);
        CHECK(end == begin || (end - begin + 1) * 8 <= begin);   /* within an eighth */
        begin = end + 1;
    }
    CHECK_EQ_INT(begin, INT64_C(15) << 26);   /* 1,006 s */
    CHECK_EQ_INT(tpr_base_histogram_at(begin), TPR_BASE_HISTOGRAM_BUCKETS - 1);
    CHECK_EQ_INT(tpr_base_histogram_at(UINT64_MAX), TPR_BASE_HISTOGRAM_BUCKETS - 1);
}

/* Random durations of all magnitudes, in two halves that are merged: each percentile is in the bucket of the exact one
   and not below it. */
TEST(percentiles_as_sorted) {
    enum { MOST = 5000 };
    static int64_t all[MOST];
    static tpr_base_histogram one, other;
    for (int round = 0; round < 200; round++) {
        const size_t count = round < 20 ? (size_t)round + 1 : (size_t)(next_random() % MOST) + 1;
        const uint64_t largest = UINT64_C(1) << (next_random() % 30);
        uint64_t sum = 0;
        memset(&one, 0, sizeof one);
        memset(&other, 0, sizeof other);
        for (size_t i = 0; i < count; i++) {
            all[i] = (int64_t)(next_random() % largest >> (next_random() % 8));
            sum += (uint64_t)all[i];
            tpr_base_histogram_add(i % 2 ? &one : &other, all[i]);
        }
        tpr_base_histogram_merge(&one, &other);
        qsort(all, count, sizeof all[0], by_size);
        CHECK_EQ_INT(one.count, count);
        CHECK_EQ_INT(one.sum, sum);
        CHECK_EQ_INT(one.most, all[count - 1]);
        for (uint32_t percent = 1; percent <= 100; percent++) {
            const uint64_t exact = (uint64_t)all[(count * percent + 99) / 100 - 1];
            const uint64_t told = tpr_base_histogram_percentile(&one, percent);
            REQUIRE_LE_INT(exact, told);
            REQUIRE_EQ_INT(tpr_base_histogram_at(told), tpr_base_histogram_at(exact));
            REQUIRE_LE_INT(told, one.most);
        }
    }
}

TEST(odd_durations) {
    static tpr_base_histogram h;
    CHECK_EQ_INT(tpr_base_histogram_percentile(&h, 50), 0);
    tpr_base_histogram_add(&h, -5);                        /* a clock that went back */
    CHECK_EQ_INT(h.sum, 0);
    CHECK_EQ_INT(h.buckets[0], 1);
    tpr_base_histogram_add(&h, INT64_C(5000) * 1000000);   /* beyond the last bucket's beginning: the longest of all */
    CHECK_EQ_INT(tpr_base_histogram_percentile(&h, 50), 0);
    CHECK_EQ_INT(tpr_base_histogram_percentile(&h, 51), INT64_C(5000) * 1000000);
    CHECK_EQ_INT(tpr_base_histogram_percentile(&h, 100), INT64_C(5000) * 1000000);
}

/* ---- the tables: who appends a field to a struct gives it its line ---- */

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static size_t named(const tpr_report_metric *metrics, size_t count, const void *of, size_t size) {
    size_t sum = 0;
    for (size_t i = 0; i < count; i++) {
        sum += metrics[i].size;
        CHECK_LE_INT(metrics[i].at + metrics[i].size, size);
        for (size_t k = 0; k < i; k++) {
            CHECK(strcmp(metrics[i].name, metrics[k].name) != 0);
            CHECK(strcmp(metrics[i].series, metrics[k].series) != 0);
            CHECK(metrics[i].at != metrics[k].at);
        }
        CHECK_EQ_INT(tpr_report_value(&metrics[i], of), 0);
    }
    return sum;
}

TEST(tables_name_every_field) {
    static const tprpc_stats stats;
    static const tprpc_method_stats method;
    static const tprpc_flow flow;
    CHECK_EQ_INT(named(tpr_report_stats, COUNT(tpr_report_stats), &stats, sizeof stats), sizeof stats);
    CHECK_EQ_INT(named(tpr_report_flows, COUNT(tpr_report_flows), &flow, sizeof flow), sizeof flow);
    CHECK_EQ_INT(named(tpr_report_methods, COUNT(tpr_report_methods), &method, sizeof method) +
                 COUNT(tpr_report_times) * sizeof(tprpc_times), sizeof method - sizeof method.name);
}

/* ---- too many to be counted one by one ---- */

static const tprpc_method_desc echo_methods[] = {{"echo", on_echo, NULL, NULL, NULL, 0}, {0}};

static void with_metrics(side *s, tprpc_context_desc *context, tprpc_agent_desc *agent) {
    (void)s; (void)context;
    agent->metrics = true;
}

IN_KINDS(names_beyond_the_limit, ONE | 0x10) {
    tprpc_method_desc late = {"late", on_echo, NULL, NULL, NULL, 0};
    tprpc_method_stats stats, all[8];
    outcome o = {0};
    two_tune = with_metrics;
    two_join(with, echo_methods);
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    for (int i = 0; i < 2; i++) {
        tpr_os_lock_take(&two[i].agent->lock);
        two[i].agent->method_count = TPR_AGENT_METHODS;
        tpr_os_lock_give(&two[i].agent->lock);
    }
    CHECK_EQ_INT(tprpc_agent_register(two[1].agent, &late, NULL), TPRPC_OK);
    CHECK_EQ_INT(call(&two[0], "bob", "late", NULL, NULL, &o), TPRPC_OK);
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 3));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    for (int i = 0; i < 2; i++) {
        const bool caller = i == 0;
        CHECK_EQ_INT(tprpc_agent_get_method_stats(two[i].agent, "late", &stats, sizeof stats), TPRPC_ERROR_NO_METHOD);
        REQUIRE_EQ_INT(tprpc_agent_get_method_stats(two[i].agent, "echo", &stats, sizeof stats), TPRPC_OK);
        CHECK_EQ_INT(caller ? stats.calls : stats.requests, 2);
        CHECK_EQ_INT(caller ? stats.requests : stats.calls, 0);
        CHECK_EQ_INT(tprpc_agent_get_methods(two[i].agent, all, 8, sizeof all[0]), 1);   /* bob echoes, ann called it */
        CHECK_EQ_INT(caller ? stats_of(&two[i]).calls : stats_of(&two[i]).requests, 3);
    }
    two_close();
}

IN_KINDS(callers_beyond_the_limit, ONE | 0x10) {
    tprpc_peer_stats peer;
    outcome o = {0};
    two_open(with, echo_methods);
    tpr_os_lock_take(&two[1].agent->lock);
    two[1].agent->caller_count = TPR_AGENT_CALLERS;
    tpr_os_lock_give(&two[1].agent->lock);
    for (int i = 0; i < 2; i++)
        CHECK_EQ_INT(tprpc_agent_start(two[i].agent, count_ready, &shared->ready, NULL), TPRPC_OK);
    REQUIRE(both_until(&shared->ready, 2));
    CHECK_EQ_INT(call(&two[0], "bob", "echo", NULL, NULL, &o), TPRPC_OK);
    CHECK(both_until(&o.count, 1));
    CHECK_EQ_INT(o.status, TPRPC_OK);
    REQUIRE_EQ_INT(tprpc_agent_get_peer_stats(two[1].agent, "ann", &peer, sizeof peer), TPRPC_OK);   /* of its group */
    CHECK_EQ_INT(peer.from.calls, 1);

    tpr_agent_server stranger;           /* one that is not, as it introduces itself */
    memset(&stranger, 0, sizeof stranger);
    stranger.agent = two[1].agent;
    stranger.caller = tpr_agent_text_locked(two[1].agent, "stranger");
    tpr_base_list_init(&stranger.peer_node);
    CHECK(tpr_agent_peer_in(&stranger));
    CHECK(!stranger.peer);
    tpr_agent_peer_out(&stranger);
    CHECK_EQ_INT(tprpc_agent_get_peer_stats(two[1].agent, "stranger", &peer, sizeof peer), TPRPC_ERROR_NO_WORKER);
    two[1].agent->caller_count = 0;
    CHECK(tpr_agent_peer_in(&stranger));
    REQUIRE(stranger.peer);
    CHECK_EQ_INT(two[1].agent->caller_count, 1);
    stranger.from.begun = 7;
    CHECK_EQ_INT(tprpc_agent_get_peer_stats(two[1].agent, "stranger", &peer, sizeof peer), TPRPC_OK);
    CHECK_EQ_INT(peer.from.calls, 7);
    tpr_agent_peer_out(&stranger);
    CHECK_EQ_INT(tprpc_agent_get_peer_stats(two[1].agent, "stranger", &peer, sizeof peer), TPRPC_OK);
    CHECK_EQ_INT(peer.from.calls, 7);
    two_close();
}
