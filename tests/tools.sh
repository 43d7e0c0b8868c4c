#!/bin/sh
# What the tools print and how they refuse:  tests/tools.sh      (make build/tprpc-perf build/bench-timers ... first)
# How fast anything is, is no matter here.
set -u
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d) || exit 2
out=$dir/output said=$dir/said passed=0 failed=0 started=

# Ends what is left of a run, and nothing else: process ids are those of our own children and of theirs.
clean() {
    # shellcheck disable=SC2046
    for pid in $started; do kill -9 $(cat "/proc/$pid/task/$pid/children" 2>/dev/null) "$pid" 2>/dev/null; done
    rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT TERM HUP

ok()  { passed=$((passed + 1)); echo "ok $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1: $2"; sed 's/^/    /' "$out" "$said"; }

# Whether the output is one JSON object on one line with exactly these keys, the values `fixed` says, and numbers where
# `numbers` says.
is_json() {     # KEYS FIXED NUMBERS: "a b", "a=text b=text", "a b"
    python3 - "$out" "$@" 2>"$dir/why" <<'END'
import json, sys
text, keys, fixed, numbers = open(sys.argv[1]).read(), sys.argv[2].split(), sys.argv[3].split(), sys.argv[4].split()
if text.count("\n") != 1 or not text.endswith("\n"):
    sys.exit("not one line")
pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs)
names = [name for name, _ in pairs]
if sorted(names) != sorted(keys):
    sys.exit("missing: %s; not expected: %s" % (sorted(set(keys) - set(names)) or "none",
                                                sorted(set(names) - set(keys)) or "none, or twice"))
values = dict(pairs)
for pair in fixed:
    name, _, value = pair.partition("=")
    if str(values[name]) != value:
        sys.exit("%s is %r, expected %s" % (name, values[name], value))
for name in numbers:
    if isinstance(values[name], bool) or not isinstance(values[name], (int, float)):
        sys.exit("%s is %r, no number" % (name, values[name]))
END
}

keys="test transport channel device peer_device size iters min_us p50_us p99_us p999_us mean_us bandwidth_gbps rate_mps
      cpu_s"
pipes="count bytes_per_pipe fds_per_pipe connect_us"
times="min_us p50_us p99_us p999_us mean_us"

# One run of tprpc-perf over a transport; what it must give beside its keys.
perf() {        # TEST TRANSPORT NUMBERS FIXED OPTION...
    name=perf_$1_$2 test=$1 transport=$2 numbers=$3 fixed=$4 wanted=$keys
    shift 4
    [ "$test" != pipes ] || wanted="$keys $pipes"
    timeout 60 build/tprpc-perf --test "$test" --transport "$transport" --json "$@" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad "$name" "exit status $status"
    elif ! is_json "$wanted" "test=$test transport=$transport device=cpu peer_device=cpu $fixed" "$numbers"; then
        bad "$name" "$(tail -n 1 "$dir/why")"
    else ok "$name"; fi
}

perf_all() {    # TRANSPORT
    perf rtt "$1" "$times cpu_s" "size=64 iters=200" --iters 200
    perf rpc "$1" "$times cpu_s" "size=64 iters=200" --iters 200
    perf rate "$1" "rate_mps cpu_s" "size=64 iters=20000" --iters 20000
    perf bw "$1" "bandwidth_gbps cpu_s" "size=1048576 iters=8 channel=basic" --iters 8 --size 1M
    perf pipes "$1" "$pipes" "count=20 size=None iters=None" --count 20
    perf frame "$1" "$times" "size=1048576" --iters 16 --size 1M
    perf raw "$1" "$times cpu_s" "size=64 iters=200 channel=None" --iters 200
}

# A table without --json: no braces, and the figures that the JSON has.
table() {
    timeout 60 build/tprpc-perf --iters 200 >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad perf_table "exit status $status"
    elif grep -q '[{}]' "$out" || ! grep -Eq '^ +p99\.9 +[0-9.]+ us$' "$out"; then bad perf_table 'no table'
    else ok perf_table; fi
}

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# The two ends by hand, as between two hosts. The one that connects may come first.
two_ends() {    # TEST
    name=perf_two_ends_$1 port=$(free_port)
    timeout 60 build/tprpc-perf --test "$1" --iters 200 --listen "127.0.0.1:$port" >"$dir/listen" 2>&1 &
    listener=$! started=$listener tries=0 status=1
    while [ $status -ne 0 ] && [ $tries -lt 50 ]; do
        timeout 30 build/tprpc-perf --test "$1" --iters 200 --transport tcp --connect "127.0.0.1:$port" --json \
            >"$out" 2>"$said"
        status=$?
        tries=$((tries + 1))
        [ $status -eq 0 ] || sleep 0.1
    done
    if [ $status -ne 0 ]; then
        kill $listener
        bad "$name" "the end that connects: exit status $status"
        return
    fi
    wait $listener
    status=$? started=
    if [ $status -ne 0 ]; then bad "$name" "the end that listens: exit status $status: $(cat "$dir/listen")"
    elif ! is_json "$keys" "test=$1 transport=tcp iters=200" "$times"; then bad "$name" "$(tail -n 1 "$dir/why")"
    else ok "$name"; fi
}

# Bad arguments: exit status 2, one sentence on stderr, nothing on stdout.
refuses() {     # NAME WORDS PROGRAM OPTION...
    name=refuses_$1 words=$2
    shift 2
    timeout 20 "$@" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 2 ]; then bad "$name" "exit status $status"
    elif [ -s "$out" ] || [ "$(wc -l <"$said")" -ne 1 ]; then bad "$name" 'not one line, on stderr alone'
    elif ! grep -q -e "$words" "$said"; then bad "$name" "no \"$words\" in it"
    else ok "$name"; fi
}

timers() {
    names="set_ns cancel_ns call_ns call_cancel_ns bare_ns bare_cancel_ns"
    timeout 60 build/bench-timers --rounds 1 --count 5000 >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad bench_timers "exit status $status"
    elif ! is_json "$names" "" "$names"; then bad bench_timers "$(tail -n 1 "$dir/why")"
    else ok bench_timers; fi
}

# It says who it is and stays until it is killed; bench.py looks at both.
idle() {        # OPTION...
    name=bench_idle$(echo "$*" | tr -d ' -')
    : >"$out"
    build/bench-idle "$@" >"$out" 2>"$said" &
    idler=$! started=$idler tries=0
    while [ ! -s "$out" ] && [ $tries -lt 300 ] && kill -0 $idler 2>/dev/null; do
        sleep 0.1
        tries=$((tries + 1))
    done
    # shellcheck disable=SC2034
    read -r word first second rest <"$out" || word=
    if [ "$word" != ready ] || [ "$first" != $idler ] || [ -n "$rest" ]; then bad "$name" 'not "ready PID PID"'
    elif ! grep -q '^State:[[:space:]]*S' "/proc/$first/status" "/proc/$second/status"; then
        bad "$name" 'it does not sleep'
    else ok "$name"; fi
    kill $idler
    wait $idler 2>/dev/null
    tries=0
    while [ -d "/proc/$second" ] && [ $tries -lt 50 ]; do
        sleep 0.1
        tries=$((tries + 1))
    done
    if [ -d "/proc/$second" ]; then bad "${name}_ends" 'the other process is left'; else ok "${name}_ends"; fi
    started=
}

# bench.py says which measurement it could not make, in its table, and exits with 1.
bench_says() {
    mkdir -p "$dir/build"
    printf '#!/bin/sh\necho "{\\"set_ns\\": 1}"\n' >"$dir/build/bench-timers"
    chmod +x "$dir/build/bench-timers"
    timeout 60 tools/bench.py --rounds 1 --only 'call timeout' --build "$dir/build" --results "$dir/results" \
        >"$out" 2>"$said"
    status=$?
    if [ $status -ne 1 ]; then bad bench_missing_key "exit status $status"
    elif [ -s "$said" ] || ! grep -q '^not measured: .*gave no cancel_ns' "$out"; then
        bad bench_missing_key 'it does not say what is missing'
    else ok bench_missing_key; fi
}

perf_all shm
perf_all tcp
table
two_ends rtt
two_ends rpc
refuses option "no option --sise" build/tprpc-perf --sise 64
refuses test '"ping" is none of' build/tprpc-perf --test ping
refuses number 'not "-1"' build/tprpc-perf --size -1
refuses transport 'ftp' build/tprpc-perf --transport ftp
refuses device '"tape"' build/tprpc-perf --device tape
refuses two_ends 'give one of them' build/tprpc-perf --listen a --connect b
refuses timers 'usage' build/bench-timers --often
refuses timers_count '"none" is no number' build/bench-timers --count none
refuses idle 'usage' build/bench-idle --often
timers
idle
idle --threads 1
bench_says

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
