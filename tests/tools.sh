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
# `numbers` says; ranks are in their order.
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
ranks = [values[name] for name in ("min_us", "p50_us", "p99_us", "p999_us") if name in numbers]
if ranks != sorted(ranks):
    sys.exit("out of order: %r" % ranks)
END
}

keys="test transport channel device peer_device size iters min_us p50_us p99_us p999_us mean_us bandwidth_gbps rate_mps
      cpu_s"
pipes="count bytes_per_pipe fds_per_pipe connect_us hot_us alone_us cold_us"
loaded="idle_p50_us idle_p99_us unloaded_gbps late"
gpu="count ordered registered cpu_us peer_cpu_us"
times="min_us p50_us p99_us p999_us mean_us"

# The keys of a test's JSON: the usual ones, and its own.
wanted_of() {   # TEST TRANSPORT
    case $1-$2 in
    *-gpu | raw-cuda-*) echo "$keys $gpu" ;;
    pipes-*) echo "$keys $pipes" ;;
    loaded-*) echo "$keys $loaded" ;;
    raw-memcpy | raw-nontemporal | raw-readv*) echo "$keys chunk" ;;
    *) echo "$keys" ;;
    esac
}

# One run of tprpc-perf over a transport; what it must give beside its keys.
perf_as() {     # NAME TEST TRANSPORT NUMBERS FIXED OPTION...
    name=$1 test=$2 transport=$3 numbers=$4 fixed=$5 wanted=$(wanted_of "$2" "$3")
    shift 5
    timeout 60 build/tprpc-perf --test "$test" --transport "$transport" --json "$@" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad "$name" "exit status $status"
    elif ! is_json "$wanted" "test=$test transport=$transport device=cpu peer_device=cpu $fixed" "$numbers"; then
        bad "$name" "$(tail -n 1 "$dir/why")"
    else ok "$name"; fi
}

perf() { perf_as "perf_$1_$2" "$@"; }

perf_all() {    # TRANSPORT
    perf rtt "$1" "$times cpu_s" "size=64 iters=200 channel=None" --iters 200
    perf rpc "$1" "$times cpu_s" "size=64 iters=200 channel=None" --iters 200
    perf rate "$1" "rate_mps cpu_s" "size=64 iters=20000" --iters 20000
    perf bw "$1" "bandwidth_gbps cpu_s" "size=1048576 iters=8 channel=basic" --iters 8 --size 1M --channel basic
    perf pipes "$1" "$pipes" "count=20 size=None iters=None" --count 20
    perf frame "$1" "$times" "size=1048576" --iters 16 --size 1M
    perf raw "$1" "$times cpu_s" "size=64 iters=200 channel=None" --iters 200
    perf loaded "$1" "$times $loaded bandwidth_gbps cpu_s" "size=1048576 iters=300 channel=basic" --iters 300 \
        --rate 2000 --size 1M --channel basic
}

# Every channel of this build that this machine can use, over the first transport that takes it: between two processes,
# or where they refuse each other (exit status 2, as for any channel that cannot be had) between threads of one.
perf_channels() {
    build/tprpc-info --json >"$out" 2>"$said"
    python3 -c 'import json, sys
for c in json.load(sys.stdin)["channels"]:
    if c["viable"] and not c["name"].startswith("cuda"):
        print(c["name"])' <"$out" >"$dir/channels"
    while read -r channel; do
        found='no two ends have it'
        for way in 'shm ' 'tcp ' 'shm --in-process'; do
            # shellcheck disable=SC2086
            timeout 60 build/tprpc-perf --test bw --transport $way --channel "$channel" --size 1M --iters 8 --json \
                >"$out" 2>"$said"
            status=$?
            [ $status -ne 2 ] || continue
            if [ $status -ne 0 ]; then found="exit status $status"
            elif ! is_json "$keys" "test=bw channel=$channel transport=${way%% *}" "bandwidth_gbps cpu_s"; then
                found=$(tail -n 1 "$dir/why")
            else found=; fi
            break
        done
        if [ -n "$found" ]; then bad "perf_channel_$channel" "$found"; else ok "perf_channel_$channel"; fi
    done <"$dir/channels"
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

# What is left to be chosen. --channel makes a tensor of the bytes, so its name shows; how a wait begins, and where an
# end may run, show in two_ends below.
options() {     # TRANSPORT
    perf_as "perf_channel_rtt_$1" rtt "$1" "$times cpu_s" "size=64 iters=200 channel=basic" --iters 200 --channel basic
    perf_as "perf_channel_rpc_$1" rpc "$1" "$times cpu_s" "size=64 iters=200 channel=basic" --iters 200 --channel basic
    perf_as "perf_devices_$1" rtt "$1" "$times" "iters=200" --iters 200 --device cpu --peer-device cpu
    perf_as "perf_no_pin_$1" rtt "$1" "$times" "iters=200" --iters 200 --no-pin
    for spin in always adaptive never; do
        perf_as "perf_spin_${spin}_$1" rtt "$1" "$times" "iters=200" --iters 200 --spin $spin
    done
}

of_process() { sed -n "s/^$2:[[:space:]]*//p" "/proc/$1/status" 2>/dev/null; }

# Whether the end that listens waits as it was told: asleep (S) or spinning (R), and on which processors. Seen three
# times in a row, for one that is to spin may not sleep in between.
listens() {     # PID OF ITS timeout, TEST, STATE, PROCESSORS
    seen=0 tries=0 end=nowhere
    while [ $seen -lt 3 ] && [ $tries -lt 60 ]; do
        tries=$((tries + 1))
        sleep 0.05
        [ "$2" = rpc ] || [ "$2" = loaded ] || grep -q '^tprpc-perf: listening on ' "$dir/listen" || continue
        pid=$(tr -d ' ' <"/proc/$1/task/$1/children")
        end="$(of_process "$pid" State | cut -c1) on $(of_process "$pid" Cpus_allowed_list)"
        if echo "$end" | grep -Eqx "$3 on $4"; then seen=$((seen + 1)); else seen=0; fi
    done
    [ $seen -eq 3 ]
}

# The two ends by hand, as between two hosts, with the same options. Without any an end soon sleeps, and is pinned.
two_ends() {    # TEST NUMBERS FIXED OPTION...
    name=perf_two_ends_$1 test=$1 numbers=$2 fixed=$3 wanted=$(wanted_of "$1" tcp) state=S on='[0-9]+'
    address=127.0.0.1:$(free_port)
    shift 3
    case " $* " in *' always '*) state=R ;; esac
    case " $* " in *' --no-pin '*) on=$(of_process self Cpus_allowed_list) ;; esac
    timeout 60 build/tprpc-perf --test "$test" "$@" --listen "$address" >"$dir/listen" 2>&1 &
    listener=$! started=$listener
    if ! listens $listener "$test" "$state" "$on"; then
        kill $listener
        bad "$name" "the end that listens is $end, expected $state on $on: $(cat "$dir/listen")"
        return
    fi
    timeout 30 build/tprpc-perf --test "$test" "$@" --transport tcp --connect "$address" --json >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then
        kill $listener
        bad "$name" "the end that connects: exit status $status"
        return
    fi
    wait $listener
    status=$? started=
    if [ $status -ne 0 ]; then bad "$name" "the end that listens: exit status $status: $(cat "$dir/listen")"
    elif ! is_json "$wanted" "test=$test transport=tcp device=cpu peer_device=cpu $fixed" "$numbers"; then
        bad "$name" "$(tail -n 1 "$dir/why")"
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

agents() {
    names="pending_bytes serving_bytes one_mps threads_mps crowded_mps join_ms"
    timeout 60 build/bench-agent --calls 5000 --workers 20 --seconds 1 >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad bench_agent "exit status $status"
    elif ! is_json "$names" "" "$names"; then bad bench_agent "$(tail -n 1 "$dir/why")"
    else ok bench_agent; fi
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

# bench.py judges: ratios within a round, a bound by its factor, and --strict by its exit status.
bench_judges() {
    mkdir -p "$dir/judged"
    cat >"$dir/judged/tprpc-perf" <<'END'
#!/bin/sh
case "$*" in
*shm*) echo '{"transport": "shm", "p99_us": 9, "idle_p99_us": 1, "bandwidth_gbps": 3, "unloaded_gbps": 4, "late": 0}' ;;
*) echo '{"transport": "tcp", "p99_us": 40, "idle_p99_us": 10, "bandwidth_gbps": 1, "unloaded_gbps": 2, "late": 7}' ;;
esac
END
    echo '#!/bin/sh
echo "{\"channels\": []}"' >"$dir/judged/tprpc-info"
    chmod +x "$dir/judged/tprpc-perf" "$dir/judged/tprpc-info"
    set -- tools/bench.py --rounds 3 --only beside --build "$dir/judged" --results "$dir/results"
    timeout 60 "$@" >"$out" 2>"$said"
    status=$?
    timeout 60 "$@" --strict >/dev/null 2>&1
    strict=$?
    if [ $status -ne 0 ] || [ $strict -ne 1 ]; then bad bench_judges "exit status $status, with --strict $strict"
    elif ! grep -Eq '^64 B calls beside tensors, p99, shm .*: 0\.90 ok$' "$out" ||
        ! grep -Eq '^tensors beside the calls, shm .*: 0\.75 ok$' "$out" ||
        ! grep -Eq '^64 B calls beside tensors, p99, tcp .*: 1\.33 MISSED$' "$out" ||
        ! grep -Eq '^tensors beside the calls, tcp .*: 0\.50 MISSED$' "$out"; then
        bad bench_judges 'not what it should say'
    else ok bench_judges; fi
}

# bench.py --readme: the section between the markers becomes the newest whole run's, and nothing else changes.
bench_quotes() {
    quotes=$dir/quotes
    mkdir -p "$quotes"
    printf '%s\n' before '<!-- bench.py --readme writes what follows -->' old \
        '<!-- bench.py --readme wrote this -->' after >"$quotes/README.md"
    for day in 01 02; do
        cat >"$quotes/bench-2020-01-$day-000000-toy.json" <<END
{"date": "2020-01-$day 00:00:00", "host_kind": "toy", "cpu": "T", "kernel": "1.2-x", "load": 0, "rounds": 5,
 "rows": [{"name": "a row", "unit": "us", "ours": 2.0, "limit": {"label": "the limit", "figure": 1.0, "ratio": 2.0},
           "peer": null, "bounds": [{"label": "bound", "figure": 5.0, "ratio": 0.4, "sign": "<=", "factor": 1.0,
           "met": true}]}],
 "curves": [], "charts": {"rtt": [{"label": "tprpc shm", "points": [[8, 1.0], [64, 2.0]]}], "bandwidth": []}}
END
    done
    timeout 60 tools/bench.py --readme "$quotes/README.md" --results "$quotes" >"$out" 2>"$said"
    status=$?
    cp "$quotes/README.md" "$dir/first"
    timeout 60 tools/bench.py --readme "$quotes/README.md" --results "$quotes" >>"$out" 2>>"$said"
    cat "$dir/first" >>"$out"
    if [ $status -ne 0 ]; then bad bench_quotes "exit status $status"
    elif ! cmp -s "$dir/first" "$quotes/README.md"; then bad bench_quotes 'the second time it wrote something else'
    elif ! grep -q '^| a row | 2 us | 1 (the limit) | 2.00 | - | - | <= 5: ok |$' "$dir/first" ||
        ! grep -q '^Measured 2020-01-02 on a toy ' "$dir/first" || grep -q '^old$' "$dir/first" ||
        [ "$(sed -n '1p;$p' "$dir/first" | tr '\n' ' ')" != 'before after ' ]; then
        bad bench_quotes 'not what it should be'
    elif ! cmp -s "$quotes/quoted-toy.json" "$quotes/bench-2020-01-02-000000-toy.json"; then
        bad bench_quotes 'the run is not kept'
    elif command -v gnuplot >/dev/null && ! grep -q '<svg' "$quotes/rtt-toy.svg"; then bad bench_quotes 'no chart'
    else ok bench_quotes; fi
}

# What it cannot quote leaves the file as it is: exit status 1, and a sentence.
bench_quotes_not() {    # NAME WORDS FILE FOLDER
    cp "$3" "$dir/before" 2>/dev/null || : >"$dir/before"
    timeout 60 tools/bench.py --readme "$3" --results "$4" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 1 ]; then bad "bench_quotes_$1" "exit status $status"
    elif [ "$(wc -l <"$said")" -ne 1 ] || ! grep -q -e "$2" "$said"; then bad "bench_quotes_$1" "no \"$2\" alone"
    elif [ -e "$3" ] && ! cmp -s "$3" "$dir/before"; then bad "bench_quotes_$1" 'it wrote to the file'
    else ok "bench_quotes_$1"; fi
}

# gpu-bench.py beside programs that say what they are told to: ratios, bounds, rows that say why, two GPUs and one. The
# figures of a size are those of its line; the outbox fails after its first size.
gpu_bench_judges() {
    mkdir -p "$dir/gpu"
    cat >"$dir/gpu/tprpc-info" <<'END'
#!/bin/sh
peers='"peers": [1]'
more=', {"name": "G", "peers": [0]}'
[ "${GPUS:-2}" -eq 2 ] || more=
echo "{\"gpus\": [{\"name\": \"G\", $peers}$more], \"gpus_reason\": \"\", \"stand_in\": false}"
END
    cat >"$dir/gpu/tprpc-perf" <<'END'
#!/bin/sh
all=$* sizes=
while [ $# -gt 0 ]; do
    [ "$1" != --size ] || sizes=$2
    shift
done
trip=11 bandwidth=90
case $all in
*raw*) trip=10 bandwidth=100 ;;
*basic*) echo 'tprpc-perf: no basic today' >&2; exit 1 ;;
esac
for size in $(echo "$sizes" | tr , ' '); do
    echo "{\"size\": $size, \"p50_us\": $trip, \"mean_us\": 50, \"bandwidth_gbps\": $bandwidth," \
        '"cpu_us": 13, "peer_cpu_us": 2}'
    case $all in *'register no'*) echo 'tprpc-perf: the outbox is shut' >&2; exit 1 ;; esac
done
END
    chmod +x "$dir/gpu/tprpc-info" "$dir/gpu/tprpc-perf"
    set -- timeout 60 tools/gpu-bench.py --rounds 2 --only ' 0 ' --build "$dir/gpu" --results "$dir/gpu/results"
    "$@" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 1 ]; then bad gpu_bench_judges "exit status $status"
    elif ! grep -Eq '^8 B, 0 to 1 and back, ordered .* 1\.10 .*<= 1\.15 of bare calls: 1\.10 ok$' "$out" ||
        ! grep -Eq '^256 MiB, 0 to 1 .*>= 0\.97 of bare peer copy: 0\.90 MISSED$' "$out" ||
        ! grep -Eq '^256 MiB, 0 to 1, through the outbox .*not measured$' "$out" ||
        ! grep -Eq '^256 MiB, 0 to 1, without peer access .*not measured$' "$out" ||
        ! grep -q '^not measured: .*the outbox is shut$' "$out" || ! grep -q '^not measured: .*no basic today$' "$out"
    then bad gpu_bench_judges 'not what it should say'
    else ok gpu_bench_judges; fi
    GPUS=1 "$@" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad gpu_bench_one "exit status $status"
    elif grep -q '^8 B, 0 to 1 and back, ordered' "$out" ||
        ! grep -q '^left out: 8 B, 0 to 1 and back, ordered: needs two GPUs$' "$out" ||
        ! grep -Eq '^256 MiB, 0 to 0, one process .*0\.90 MISSED$' "$out"; then bad gpu_bench_one 'not what it says'
    else ok gpu_bench_one; fi
}

# On the stand-in driver it says that it is, and writes nothing that could be quoted; without a driver it says so.
gpu_bench_stand_in() {
    LD_LIBRARY_PATH=build/standin timeout 60 tools/gpu-bench.py --rounds 1 --only 'streams idle' \
        --results "$dir/gpu/stand-in" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad gpu_bench_stand_in "exit status $status"
    elif ! grep -q "stand-in: these are no figures" "$out" || ls "$dir/gpu/stand-in" | grep -v part | grep -q json ||
        ! grep -Eq '^8 B, 0 to 1 and back, streams idle .* bare calls ' "$out"; then bad gpu_bench_stand_in 'not so'
    else ok gpu_bench_stand_in; fi
    STANDIN_DEVICES=0 LD_LIBRARY_PATH=build/standin timeout 60 tools/gpu-bench.py >"$out" 2>"$said"
    status=$?
    if [ $status -ne 1 ] || [ -s "$out" ] || ! grep -q '^tools/gpu-bench.py: no GPU to measure: ' "$said"; then
        bad gpu_bench_no_gpu "exit status $status"
    else ok gpu_bench_no_gpu; fi
}

# The drivers of other libraries, where those are installed.
peers() {
    for peer in zmq nng; do
        [ -x build/bench-$peer ] || continue
        for transport in ipc tcp; do
            for test in rtt rate bw; do
                name=bench_${peer}_${test}_$transport wanted="bandwidth_gbps rate_mps"
                [ $test != rtt ] || wanted="p50_us p99_us"
                timeout 60 build/bench-$peer --test $test --transport $transport --size 100000 --iters 20 \
                    >"$out" 2>"$said"
                status=$?
                if [ $status -ne 0 ]; then bad "$name" "exit status $status"
                elif ! is_json "size iters $wanted" "size=100000 iters=20" "$wanted"; then
                    bad "$name" "$(tail -n 1 "$dir/why")"
                else ok "$name"; fi
            done
        done
        refuses "bench_${peer}_test" usage build/bench-$peer --test ping --transport tcp
        refuses "bench_${peer}_transport" usage build/bench-$peer --test rtt --transport shm
        refuses "bench_${peer}_size" usage build/bench-$peer --test rtt --transport tcp --size many
        refuses "bench_${peer}_odd" usage build/bench-$peer --test rtt --transport
    done
}

# With the stand-in driver: what is measured between which devices, and that the bytes arrive. Its devices 0 and 1 reach
# each other, 0 and 2 do not.
perf_gpu() {    # NAME TEST NUMBERS FIXED OPTION...
    name=perf_gpu_$1 test=$2 numbers=$3 fixed=$4
    shift 4
    LD_LIBRARY_PATH=build/standin timeout 60 build/tprpc-perf --test "$test" --json "$@" >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad "$name" "exit status $status"
    elif ! is_json "$keys $gpu" "test=$test $fixed" "$numbers"; then bad "$name" "$(tail -n 1 "$dir/why")"
    else ok "$name"; fi
}

perf_gpus() {
    one="device=cuda:0 peer_device=cuda:1"
    set -- --device cuda:0 --peer-device cuda:1
    cpu="cpu_s cpu_us peer_cpu_us"
    perf_gpu rtt rtt "$times $cpu" "$one size=8 iters=20 channel=cuda_ipc ordered=True" --iters 20 "$@"
    perf_gpu rtt_idle rtt "$times $cpu" "$one size=8 ordered=False" --iters 20 --ordered no "$@"
    perf_gpu rpc rpc "$times $cpu" "$one size=8 channel=cuda_ipc" --iters 20 "$@"
    perf_gpu rpc_idle rpc "$times $cpu" "$one ordered=False" --iters 20 --ordered no "$@"
    perf_gpu bw bw "bandwidth_gbps $cpu" "$one size=1048576 registered=True" --iters 20 --size 1M "$@"
    perf_gpu bw_odd bw "bandwidth_gbps $cpu" "$one size=70001" --iters 9 --size 70001 "$@"
    perf_gpu bw_unregistered bw "bandwidth_gbps $cpu" "$one registered=False" --iters 8 --size 1M --register no "$@"
    perf_gpu bw_count bw "mean_us $cpu" "$one size=4096 count=100" --iters 8 --size 4K --count 100 "$@"
    perf_gpu rtt_count rtt "$times $cpu" "$one count=100" --iters 8 --size 4K --count 100 "$@"
    perf_gpu tcp rtt "$times" "$one transport=tcp channel=cuda_basic" --iters 8 --transport tcp "$@"
    perf_gpu basic bw "bandwidth_gbps" "$one channel=cuda_basic" --iters 8 --size 1M --channel cuda_basic,basic "$@"
    perf_gpu in_process bw "bandwidth_gbps" "$one channel=cuda_xth" --iters 8 --size 1M --in-process "$@"
    perf_gpu one_device rtt "$times" "device=cuda:1 peer_device=cuda:1 channel=cuda_ipc" --iters 8 --device cuda:1 \
        --peer-device cuda:1
    perf_gpu no_peers rtt "$times" "peer_device=cuda:2 channel=cuda_basic" --iters 8 --device cuda:0 \
        --peer-device cuda:2
    perf_gpu to_host bw "bandwidth_gbps" "peer_device=cpu channel=cuda_basic" --iters 8 --size 1M --device cuda:0
    perf_gpu from_host rtt "$times" "device=cpu" --iters 8 --peer-device cuda:0
    perf_gpu from_pinned bw "bandwidth_gbps" "device=pinned" --iters 8 --size 1M --device pinned --peer-device cuda:0
    for medium in peer pinned; do
        perf_gpu raw_$medium raw "bandwidth_gbps" "$one transport=cuda-$medium size=1048576" --iters 8 --size 1M \
            --transport cuda-$medium "$@"
        perf_gpu raw_${medium}_in_process raw "bandwidth_gbps" "$one" --iters 8 --size 1M --transport cuda-$medium \
            --in-process "$@"
    done
    for medium in ordered idle; do
        perf_gpu raw_$medium raw "$times" "$one transport=cuda-$medium size=8 iters=20" --iters 20 \
            --transport cuda-$medium "$@"
    done
    perf_gpu raw_gather raw "$times" "$one size=4096 count=100" --iters 8 --size 4K --count 100 \
        --transport cuda-gather "$@"
}

# Each end uses its own device and no other: where that is taken by somebody else, there is an error.
perf_gpu_exclusive() {
    for side in --device --peer-device; do
        name=perf_gpu_exclusive_${side#--}
        STANDIN_EXCLUSIVE=1 LD_LIBRARY_PATH=build/standin timeout 60 build/tprpc-perf --test bw --size 4K --iters 4 \
            $side cuda:1 >"$out" 2>"$said"
        status=$?
        if [ $status -ne 1 ] || ! grep -q 'cuDevicePrimaryCtxRetain: error 46' "$said"; then
            bad "$name" "exit status $status"
        else ok "$name"; fi
        STANDIN_EXCLUSIVE=1 LD_LIBRARY_PATH=build/standin timeout 60 build/tprpc-perf --test bw --size 4K --iters 4 \
            $side cuda:2 >"$out" 2>"$said"
        status=$?
        if [ $status -ne 0 ]; then bad "${name}_other" "exit status $status"; else ok "${name}_other"; fi
    done
}

# Several sizes: an object for each, in turn.
perf_gpu_sizes() {
    for test in rtt bw 'raw --transport cuda-peer'; do
        name=perf_gpu_sizes_${test%% *}
        # shellcheck disable=SC2086
        LD_LIBRARY_PATH=build/standin timeout 60 build/tprpc-perf --test $test --json --size 8,4K,1M --iters 8 \
            --device cuda:0 --peer-device cuda:1 >"$out" 2>"$said"
        status=$? sizes=$(sed -n 's/.*"size": \([0-9]*\),.*/\1/p' "$out" | tr '\n' ' ')
        if [ $status -ne 0 ]; then bad "$name" "exit status $status"
        elif [ "$sizes" != '8 4096 1048576 ' ]; then bad "$name" "sizes $sizes"
        else ok "$name"; fi
    done
}

perf_gpu_table() {
    LD_LIBRARY_PATH=build/standin timeout 60 build/tprpc-perf --iters 8 --device cuda:0 --peer-device cuda:1 \
        >"$out" 2>"$said"
    status=$?
    if [ $status -ne 0 ]; then bad perf_gpu_table "exit status $status"
    elif ! grep -q '^rtt over shm, channel cuda_ipc, cuda:0 and cuda:1, 1 x 8 B, 8 times$' "$out"; then
        bad perf_gpu_table 'no head'
    else ok perf_gpu_table; fi
}

perf_all shm
perf_all tcp
perf_gpus
perf_gpu_exclusive
perf_gpu_sizes
perf_gpu_table
perf_channels
for copy in memcpy readv readv2 $([ "$(uname -m)" != x86_64 ] || echo nontemporal); do
    for size in 1 100000 1M; do
        perf_as "perf_raw_${copy}_$size" raw "$copy" "bandwidth_gbps cpu_s chunk" "iters=8 channel=None" --iters 8 \
            --size $size
    done
done
perf_as perf_lanes bw tcp "bandwidth_gbps cpu_s" "size=1048576 iters=8 channel=mpt" --iters 8 --size 1M --lanes 3
perf_as perf_in_process rtt shm "$times cpu_s" "size=64 iters=200" --iters 200 --in-process
perf_as perf_in_process_rpc rpc shm "$times cpu_s" "channel=xth" --iters 200 --channel xth --in-process
perf_as perf_in_process_rate rate tcp "rate_mps cpu_s" "iters=20000" --iters 20000 --in-process
table
options shm
options tcp
# That `never` is no other word for `adaptive`: the default of --iters tells, on the one medium where that many are soon
# done, unless its two ends take turns on one processor.
[ "$(nproc)" -eq 1 ] || perf_as perf_spin_never_iters raw shm "$times" "iters=20000" --spin never
two_ends rtt "$times" "size=64 iters=200 channel=None" --iters 200
two_ends rpc "$times" "size=64 iters=200 channel=None" --iters 200
two_ends rate "rate_mps cpu_s" "size=64 iters=2000 channel=None" --iters 2000 --spin always
two_ends bw "bandwidth_gbps cpu_s" "size=1048576 iters=8 channel=basic" --iters 8 --size 1M --spin never
two_ends pipes "$pipes" "count=20 fds_per_pipe=1 size=None iters=None" --count 20 --spin adaptive
two_ends loaded "$times $loaded" "size=65536 iters=100" --iters 100 --rate 1000 --size 64K
two_ends frame "$times iters bandwidth_gbps" "size=1048576 channel=basic" --iters 16 --size 1M --no-pin
# What tprpc-info tells of this machine, as a table and as JSON.
info_table() {
    build/tprpc-info >"$out" 2>"$said" || { bad info_table "exit status $?"; return; }
    for word in '^tprpc ' '^transports' '^  tcp  ' '^channels' '^  basic ' '^converters' '^limits' '^  open files '; do
        grep -q "$word" "$out" || { bad info_table "nothing like \"$word\""; return; }
    done
    ok info_table
}

info_json() {
    build/tprpc-info --json >"$out" 2>"$said" || { bad info_json "exit status $?"; return; }
    if python3 - "$out" 2>"$said" <<'END'
import json, os, re, resource, sys
header = open("tprpc.h").read() + open("tprpc_cuda.h").read()
told = json.loads(open(sys.argv[1]).read())
assert sorted(told) == ["channels", "converters", "gpus", "gpus_reason", "limits", "stand_in", "transports",
                        "version"], sorted(told)
assert bool(told["gpus"]) is (told["gpus_reason"] == ""), told
names = [b["name"] for kind in ("transports", "channels", "converters") for b in told[kind]]
known = {name.replace("cuda_convert", "cuda") for name in re.findall(r"&tpr_(\w+)_backend,", header)}
assert sorted(names) == sorted(known), (names, known)
for kind in ("transports", "channels"):
    order = [b["priority"] for b in told[kind]]
    assert order == sorted(order, reverse=True), order
    for b in told[kind]:
        assert sorted(b) == ["domain", "name", "priority", "reason", "summary", "viable"], b
        assert b["viable"] is (b["reason"] == ""), b
        assert b["summary"].endswith("."), b
limits = {limit["name"]: limit for limit in told["limits"]}
assert limits["open files"]["value"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0], limits
assert limits["processors"]["value"] == len(os.sched_getaffinity(0)), limits
END
    then ok info_json; else bad info_json "not what it should be"; fi
}

# A limit that is low comes with advice.
info_advice() {
    (ulimit -n 100 && build/tprpc-info) >"$out" 2>"$said" || { bad info_advice "exit status $?"; return; }
    if grep -A1 '^  open files  *100' "$out" | grep -q 'LOW: .*ulimit -n'; then ok info_advice
    else bad info_advice "no advice for 100 open files"; fi
}

# GPUs, as the stand-in driver shows them, and without a driver; that it is the stand-in is told.
info_gpus() {
    LD_LIBRARY_PATH=build/standin build/tprpc-info --json >"$out" 2>"$said" ||
        { bad info_gpus "exit status $?"; return; }
    if python3 - "$out" 2>"$said" <<'END'
import json, sys
told = json.loads(open(sys.argv[1]).read())
assert told["stand_in"] is True and told["gpus_reason"] == "", told
assert [gpu["index"] for gpu in told["gpus"]] == [0, 1, 2, 3], told["gpus"]
assert [gpu["peers"] for gpu in told["gpus"]] == [[1], [0], [3], [2]], told["gpus"]
for gpu in told["gpus"]:
    assert sorted(gpu) == ["compute", "index", "ipc", "memory", "name", "pci", "peers", "uuid"], gpu
    assert gpu["memory"] == 64 << 20 and gpu["ipc"] is True and gpu["compute"] == "9.0", gpu
    assert len(gpu["uuid"]) == 40 and gpu["uuid"].startswith("GPU-") and gpu["pci"].startswith("0000:"), gpu
assert len({gpu["uuid"] for gpu in told["gpus"]}) == 4
for channel in told["channels"]:
    assert channel["viable"] or not channel["name"].startswith("cuda"), channel
END
    then ok info_gpus; else bad info_gpus "not what it should be"; fi
    LD_LIBRARY_PATH=build/standin build/tprpc-info >"$out" 2>"$said"
    if grep -q '^GPUs, .*stand-in.*none of them is real' "$out" && grep -q '^  cuda:3 ' "$out" &&
        grep -q 'reaches cuda:2;' "$out"; then ok info_gpus_table; else bad info_gpus_table 'not what it should be'; fi
}

# An old driver, which is there and of no use, stands for none: what this machine has is not known here.
info_no_gpus() {
    STANDIN_VERSION=11000 LD_LIBRARY_PATH=build/standin build/tprpc-info --json >"$out" 2>"$said" ||
        { bad info_no_gpus "exit status $?"; return; }
    if python3 - "$out" 2>"$said" <<'END'
import json, sys
told = json.loads(open(sys.argv[1]).read())
assert told["gpus"] == [] and told["gpus_reason"] != "", told
for channel in told["channels"]:
    assert channel["viable"] is False and channel["reason"] or not channel["name"].startswith("cuda"), channel
END
    then ok info_no_gpus; else bad info_no_gpus "not what it should be"; fi
}

info_table
info_json
info_gpus
info_no_gpus
info_advice
refuses info_option "no option --jason" build/tprpc-info --jason

refuses option "no option --sise" build/tprpc-perf --sise 64
refuses test '"ping" is none of' build/tprpc-perf --test ping
refuses number 'not "-1"' build/tprpc-perf --size -1
refuses rate 'between 1 and 1000000' build/tprpc-perf --test loaded --rate 0
refuses rate_of_rtt '^tprpc-perf: --rate is for --test loaded' build/tprpc-perf --rate 100
refuses rate_number 'not "fast"' build/tprpc-perf --test loaded --rate fast
refuses loaded_empty 'at least 1' build/tprpc-perf --test loaded --size 0
refuses count_of_loaded 'for --test pipes' build/tprpc-perf --test loaded --count 4
refuses medium 'not "udp"' build/tprpc-perf --test raw --transport udp
refuses raw_channel 'no channels' build/tprpc-perf --test raw --transport memcpy --channel basic
refuses raw_listen 'within one machine' build/tprpc-perf --test raw --transport readv --listen a
refuses raw_line 'at most 64' build/tprpc-perf --test raw --size 65
refuses in_process_listen 'runs both ends' build/tprpc-perf --in-process --listen a
refuses in_process_connect 'runs both ends' build/tprpc-perf --in-process --connect a
for test in raw pipes loaded; do
    refuses in_process_$test 'two processes' build/tprpc-perf --in-process --test $test
done
refuses transport 'ftp' build/tprpc-perf --transport ftp
refuses channel 'tape' build/tprpc-perf --channel tape
refuses channel_of_rate 'no tensors' build/tprpc-perf --test rate --channel basic
refuses channel_of_other_ends xth build/tprpc-perf --iters 100 --channel xth
refuses channel_of_other_ends_bw 'in-process' build/tprpc-perf --test bw --iters 8 --channel xth
refuses channel_of_other_ends_loaded xth build/tprpc-perf --test loaded --iters 8 --size 1M --channel xth
refuses channel_of_other_ends_rpc xth build/tprpc-perf --test rpc --iters 100 --channel xth
refuses spin '"often"' build/tprpc-perf --spin often
refuses device '^tprpc-perf: --device "tape"' build/tprpc-perf --device tape
refuses peer_device '^tprpc-perf: --peer-device "tape"' build/tprpc-perf --peer-device tape
refuses trace 'which make calls' build/tprpc-perf --trace a --iters 1
refuses device_number '^tprpc-perf: --device "cuda:x"' build/tprpc-perf --device cuda:x
refuses device_ordered 'yes or no' build/tprpc-perf --device cuda:0 --ordered maybe
refuses device_register 'yes or no' build/tprpc-perf --device cuda:0 --register often
refuses device_test 'about memory of the CPU' build/tprpc-perf --test rate --device cuda:0
refuses device_raw '--transport memcpy is about' build/tprpc-perf --test raw --transport memcpy --device cuda:0
refuses device_pinned 'with a GPU at the other end' build/tprpc-perf --device pinned
refuses device_raw_two 'needs two GPUs' build/tprpc-perf --test raw --transport cuda-peer --device cuda:0
refuses device_sizes 'where no GPU takes part' build/tprpc-perf --size 8,16
refuses device_count 'at most 4096' build/tprpc-perf --device cuda:0 --count 4097
with_standin="env LD_LIBRARY_PATH=build/standin build/tprpc-perf"
# shellcheck disable=SC2086
{
    refuses device_missing 'shows 4 GPUs' $with_standin --device cuda:4
    refuses peer_device_missing 'shows 4 GPUs' $with_standin --peer-device cuda:9
    refuses device_out_of_reach 'cannot reach' $with_standin --test raw --transport cuda-peer --device cuda:0 \
        --peer-device cuda:2
    refuses device_old_driver 'cuInit\|too old\|cannot be used' env STANDIN_FAIL=cuInit:1:100 $with_standin \
        --device cuda:0
}
refuses two_ends 'give one of them' build/tprpc-perf --listen a --connect b
refuses timers 'usage' build/bench-timers --often
refuses timers_count '"none" is no number' build/bench-timers --count none
refuses idle 'usage' build/bench-idle --often
refuses agent 'usage' build/bench-agent --often
timers
agents
idle
idle --threads 1
peers
bench_says
bench_judges
gpu_bench_judges
gpu_bench_stand_in
bench_quotes
echo 'no markers' >"$dir/plain.md"
bench_quotes_not without_markers 'has no line' "$dir/plain.md" "$dir/quotes"
bench_quotes_not without_run 'no whole run' "$dir/quotes/README.md" "$dir/results"
bench_quotes_not without_file 'No such file' "$dir/nothing.md" "$dir/quotes"

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
