#!/bin/sh
# The fuzz targets:  tests/fuzz.sh [SECONDS [SEED]]     a share of SECONDS (default: 60) for each, one after the other
#                    tests/fuzz.sh --long [SECONDS]     all side by side, SECONDS each (default: until stopped)
#
# First each runs over its corpus, tests/fuzz/corpus/NAME, then on from there: in the first form with nothing kept and
# from a seed that is printed, in the second in build/fuzz/corpus/NAME, where what is found stays. An input that fails is
# left in build/fuzz/failed; `build/fuzz/NAME FILE` runs it again. One that is worth it goes into the corpus.
# (make build/fuzz/wire build/fuzz/tcp ... first; `make test-fuzz` and `make fuzz` do.)
set -u
cd "$(dirname "$0")/.." || exit 2
failed_dir=build/fuzz/failed
passed=0 failed=0 running=
mkdir -p "$failed_dir"
out=$(mktemp -d) || exit 2
trap 'rm -rf "$out"' EXIT
# shellcheck disable=SC2086
trap '[ -z "$running" ] || kill $running; wait; exit 130' INT TERM HUP

# An input of the live targets takes milliseconds: the time limit is for hangs, on a machine that does much else too.
options='-timeout=60 -rss_limit_mb=4096 -print_final_stats=1'

ok()  { passed=$((passed + 1)); echo "ok $1"; }
bad() {
    failed=$((failed + 1))
    echo "FAIL $1: exit status $2"
    grep -v '^#' "$out/said" | tail -n 60 | sed 's/^/    /'
}

# Runs a target, in the background so that a signal ends it; its output is in $out/said.
fuzz() {
    target=$1
    shift
    # shellcheck disable=SC2086
    "build/fuzz/$target" $options -artifact_prefix="$failed_dir/$target-" "$@" >"$out/said" 2>&1 </dev/null &
    running=$!
    wait "$running"
    status=$?
    running=
    return $status
}

stat() { sed -n "s/^stat::$1: *//p" "$out/said"; }

short() {
    seconds=$1 seed=$2
    echo "seed $seed"
    # The live ones need more time for as many inputs.
    for share in wire:1 cuda:1 store:3 tcp:3 shm:3; do
        target=${share%:*} corpus=tests/fuzz/corpus/${share%:*}
        for_it=$((seconds * ${share#*:} / 11))
        if fuzz "$target" -runs=0 "$corpus"; then ok "${target}_corpus"; else bad "${target}_corpus" $?; fi
        mkdir "$out/$target"
        if fuzz "$target" -max_total_time="$((for_it > 0 ? for_it : 1))" -max_len=2048 -seed="$seed" \
                "$out/$target" "$corpus"; then
            ok "$target $(stat number_of_executed_units) inputs"
        else bad "$target (seed $seed)" $?; fi
    done
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

long() {
    for target in wire cuda store tcp shm; do
        mkdir -p "build/fuzz/corpus/$target"
        # shellcheck disable=SC2086
        "build/fuzz/$target" $options -max_total_time="$1" -max_len=4096 -reload=0 \
            -artifact_prefix="$failed_dir/$target-" "build/fuzz/corpus/$target" "tests/fuzz/corpus/$target" \
            >"build/fuzz/$target.log" 2>&1 </dev/null &
        running="$running $!"
        echo "$target: process $!, build/fuzz/$target.log"
    done
    for pid in $running; do wait "$pid" || failed=$((failed + 1)); done
    running=
    tail -qn 1 build/fuzz/*.log
    [ "$failed" -eq 0 ] || echo "$failed of the targets failed: see build/fuzz/*.log and $failed_dir"
    [ "$failed" -eq 0 ]
}

case ${1-} in
--long) long "${2:-0}" ;;
*) short "${1:-60}" "${2:-$(($(date +%s) % 1000000 + 1))}" ;;
esac
