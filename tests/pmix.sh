#!/bin/sh
# Groups that a launcher starts, by pmix://:  tests/pmix.sh       (make build/libtprpc.a first)
set -u
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d) || exit 2
space=tprpc-m$$ spaces=
clean() {
    for i in $spaces; do ip netns del "$space-$i"; done
    rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT TERM HUP
out=$dir/output passed=0 failed=0 skipped=0

ok()   { passed=$((passed + 1)); echo "ok $1"; }
bad()  { failed=$((failed + 1)); echo "FAIL $1: $2"; sed 's/^/    /' "$out"; }
skip() { skipped=$((skipped + 1)); echo "SKIP $1: $2"; }
says() { grep -qF "$1" "$out"; }

# A worker named after its rank: worker METHOD... joins each group in turn, calls all others and leaves. In the environment
# WORLD is the size it believes in, LIMIT_MS its patience, INSECURE that it leaves the host, ADDRESS where, and ABSENT the
# rank that does not come, or none; with that a failure is what is wanted, and its exit status, after which mpirun takes
# its time, 0.
cat >"$dir/worker.c" <<'EOF'
#define _GNU_SOURCE
#include "tprpc.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int rank;
static void on_who(tprpc_request request, const tprpc_message *message, void *user) {
    tprpc_message reply = {.metadata = &rank, .metadata_size = sizeof rank};
    (void)message; (void)user;
    tprpc_reply(request, &reply);
}
static bool asks(tprpc_agent *agent, int other, tprpc_error *error) {
    tprpc_call_options options = {.error = error};
    tprpc_future future;
    char name[16];
    int said = -1;
    snprintf(name, sizeof name, "w%d", other);
    if (tprpc_call(agent, name, "who", NULL, &options, &future)) return false;
    if (!tprpc_future_wait(future, 10000)) memcpy(&said, tprpc_future_reply(future)->metadata, sizeof said);
    else tprpc_future_error(future, error);
    tprpc_future_release(future);
    return said == other;
}
static int joins(const char *method) {
    tprpc_agent_desc desc = {.init_method = method, .start_timeout_ms = 20000};
    tprpc_method_desc who = {.name = "who", .handler = on_who};
    tprpc_error error = {0};
    tprpc_agent *agent = NULL;
    tprpc_stats stats = {0};
    char name[16];
    int called = 0;
    snprintf(name, sizeof name, "w%d", rank);
    desc.name = name;
    if (getenv("WORLD")) {
        desc.rank = rank;
        desc.world_size = atoi(getenv("WORLD"));
    }
    desc.insecure = getenv("INSECURE") != NULL;
    desc.address = getenv("ADDRESS");
    if (getenv("LIMIT_MS")) desc.start_timeout_ms = atoi(getenv("LIMIT_MS"));
    bool good = !tprpc_agent_create(&desc, &agent, &error) && !tprpc_agent_register(agent, &who, &error) &&
                !tprpc_agent_wait_ready(agent, 0, &error) && !tprpc_agent_get_stats(agent, &stats, sizeof stats);
    for (int i = 0; good && i < (int)stats.workers; i++) if (i != rank) called += good = asks(agent, i, &error);
    tprpc_pipe_info info;
    if (good && desc.insecure && !tprpc_agent_get_peer_info(agent, rank ? "w0" : "w1", &info, sizeof info))
        printf("rank %d is at %s\n", !rank, info.peer);
    if (good) good = !tprpc_agent_leave(agent, 10000, &error);
    if (good) printf("rank %d of %u called %d in %s\n", rank, stats.workers, called, method);
    else printf("rank %d: %s: %s\n", rank, tprpc_status_name(error.status), error.text);
    fflush(stdout);
    tprpc_agent_destroy(agent);
    return !good;
}
int main(int argc, char **argv) {
    const char *text = getenv("PMIX_RANK"), *absent = getenv("ABSENT");
    rank = text ? atoi(text) : 0;
    for (int i = 1; i < argc; i++) {
        if (absent && strcmp(absent, text ? text : "") == 0) usleep(1300000);
        else if (joins(argv[i]) && !absent) return 1;
    }
    return 0;
}
EOF

# On this host alone, without ssh, as any user, and whatever the number of processors.
launch() {      # NUMBER ARGUMENT...
    number=$1
    shift
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout 30 \
        mpirun --mca plm isolated --mca btl self --oversubscribe -np "$number" "$dir/worker" "$@" >"$out" 2>&1
}

all_called() {  # NAME SIZE METHOD...
    name=$1 size=$2
    shift 2
    for method; do
        for rank in $(seq 0 $((size - 1))); do
            says "rank $rank of $size called $((size - 1)) in $method" || { bad "$name" "rank $rank in $method"; return; }
        done
    done
    ok "$name"
}

forms() {       # NAME SIZE METHOD...: a group of all in each
    name=$1 size=$2
    shift 2
    if launch "$size" "$@"; then all_called "$name" "$size" $(printf '%s\n' "$@" | sort -u)
    else bad "$name" "exit status $?"; fi
}

if ! gcc -std=c99 -Wall -Wextra -Werror -O1 -I. "$dir/worker.c" build/libtprpc.a -o "$dir/worker" -pthread -ldl -lm \
        >"$out" 2>&1; then
    bad pmix 'the worker does not compile'
else
    "$dir/worker" pmix:// >"$out" 2>&1
    if says 'built without TPRPC_WITH_PMIX'; then skip pmix 'built without TPRPC_WITH_PMIX'
    elif says 'unsupported: pmix://: no PMIx launcher'; then ok pmix_without_a_launcher
    else bad pmix_without_a_launcher 'it does not say so'; fi
fi

if [ $failed -eq 0 ] && [ $skipped -eq 0 ]; then
    mkdir "$dir/lib"
    : >"$dir/lib/libpmix.so.2"
    PMIX_NAMESPACE=none LD_LIBRARY_PATH=$dir/lib "$dir/worker" pmix:// >"$out" 2>&1
    if says 'unsupported: pmix://: libpmix.so.2 cannot be loaded: '; then ok pmix_without_the_library
    else bad pmix_without_the_library 'it does not say so'; fi

    if ! command -v mpirun >/dev/null 2>&1; then skip pmix 'mpirun is missing'
    else
        forms pmix_group 4 pmix://
        WORLD=4 forms pmix_group_of_a_size 4 pmix://named
        forms pmix_groups_one_after_another 2 pmix:// pmix://second pmix:// pmix://second pmix://
    fi
fi

# What a group says that cannot form.
fails() {       # NAME SIZE METHOD TEXT
    launch "$2" "$3"
    if says "$4"; then ok "$1"
    else bad "$1" "it does not say: $4"; fi
}

if [ $failed -eq 0 ] && [ $skipped -eq 0 ]; then
    ABSENT=none WORLD=3 fails pmix_of_another_size 1 pmix:// \
        'rank 0: invalid: worker w0 was given rank 0 of 3, but the launcher made it rank 0 of 1'
    ABSENT=0 LIMIT_MS=200 fails pmix_without_rank_0 2 pmix:// \
        'rank 1: timeout: pmix://: rank 0 has not said within 200 ms where it serves the store'
    ABSENT=1 LIMIT_MS=200 fails pmix_without_rank_1 2 pmix:// 'w0 cannot join: rank 1 of 2 did not come'
fi

# Two hosts, which network namespaces stand for; the launcher reaches the second by a stand-in for ssh. The first has
# two interfaces, of which the second is the one to name.
hosts() {
    for i in 0 1; do ip netns add "$space-$i" && spaces="$spaces $i" && ip -n "$space-$i" link set lo up || return 1; done
    for net in 1 2; do
        ip link add "e$net" netns "$space-0" type veth peer name "e$net" netns "$space-1" || return 1
        for i in 0 1; do
            ip -n "$space-$i" addr add "10.236.$net.$((i + 1))/24" dev "e$net" || return 1
            ip -n "$space-$i" link set "e$net" up || return 1
        done
    done
    # shellcheck disable=SC2016     # to be expanded there
    printf '%s\n' '#!/bin/sh' 'shift' \
        "exec ip netns exec $space-1 unshare -u sh -c 'hostname other; eval \"\$*\"' sh \"\$@\"" >"$dir/agent"
    chmod +x "$dir/agent"
}

launch_apart() {    # ARGUMENT...
    OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout 30 ip netns exec "$space-0" unshare -u sh -c \
        'hostname first; exec "$@"' sh mpirun --mca plm_rsh_agent "$dir/agent" --mca btl self -x INSECURE -x ADDRESS \
        -x ABSENT --host 10.236.1.1:1,10.236.1.2:1 -np 2 "$dir/worker" "$@" >"$out" 2>&1
}

meets_apart() {     # NAME HOST
    if ! launch_apart pmix://; then bad "$1" "exit status $?"
    elif ! says "rank 0 is at $2:"; then bad "$1" "rank 0 is not at $2"
    else all_called "$1" 2 pmix://; fi
}

if [ $failed -eq 0 ] && [ $skipped -eq 0 ]; then
    if [ "$(id -u)" != 0 ]; then skip pmix_two_hosts 'needs root'
    elif ! hosts >"$out" 2>&1; then skip pmix_two_hosts 'network namespaces cannot be made here'
    else
        export INSECURE= ADDRESS= ABSENT=none
        unset INSECURE ADDRESS
        launch_apart pmix://
        if says 'the 2 ranks are on several hosts' && says '`insecure`'; then ok pmix_two_hosts_need_consent
        else bad pmix_two_hosts_need_consent 'it does not say so'; fi
        export INSECURE=1
        meets_apart pmix_two_hosts 10.236.1.1
        export ADDRESS=e2
        meets_apart pmix_two_hosts_at_an_interface 10.236.2.1
    fi
fi

if [ $skipped -eq 0 ]; then echo "$passed passed, $failed failed"
else echo "$passed passed, $failed failed, $skipped skipped"; fi
[ $failed -eq 0 ]
