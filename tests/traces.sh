#!/bin/sh
# Traces of several workers become one:  tests/traces.sh        (make build/tprpc-perf first)
set -u
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d) || exit 2
out=$dir/output said=$dir/said passed=0 failed=0
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM HUP

ok()  { passed=$((passed + 1)); echo "ok $1"; }
bad() { failed=$((failed + 1)); echo "FAIL $1: $2"; sed 's/^/    /' "$said"; }

# Whether the output is a trace of two workers, sorted by time, in which each call goes through both and back.
is_merged() {   # CALLS
    python3 - "$out" "$1" 2>"$said" <<'END'
import collections, json, sys
events, calls = json.load(open(sys.argv[1])), int(sys.argv[2])
if [e["ts"] for e in events] != sorted(e["ts"] for e in events):
    sys.exit("not in the order of time")
names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
if sorted(names.values()) != ["measuring", "serving"]:
    sys.exit("the workers are %r" % names)
flows, slices = collections.defaultdict(list), collections.defaultdict(list)
for e in events:
    if e["ph"] == "X":
        slices[e["pid"], e["tid"]].append(e)
    if e["ph"] in "stf":
        flows[e["id"]].append((e["ph"], names[e["pid"]]))
        if not [x for x in slices[e["pid"], e["tid"]][-2:] if x["ts"] <= e["ts"] <= x["ts"] + x["dur"]]:
            sys.exit("no slice around %r" % e)
want = [("s", "measuring")] + [("t", "serving")] * 3 + [("f", "measuring")]
wrong = [flow for flow in flows.values() if flow != want]
if wrong or len(flows) != calls:
    sys.exit("%d calls, of which %d go another way: %r" % (len(flows), len(wrong), wrong[:1]))
END
}

merged() {      # NAME FILE...
    name=$1
    shift
    if ! tools/merge-traces.py "$@" >"$out" 2>"$said"; then bad "$name" "exit status $?"
    elif ! python3 -m json.tool "$out" >/dev/null 2>"$said"; then bad "$name" 'no JSON'
    elif ! is_merged 222; then bad "$name" 'no trace of both'
    else ok "$name"; fi
}

measure() {     # NAME OPTION...
    name=$1
    shift
    if ! timeout 60 build/tprpc-perf --test rpc --iters 200 --trace "$dir/" "$@" >/dev/null 2>"$said"; then
        bad "$name" "exit status $?"
    elif ! for file in serving measuring; do python3 -m json.tool "$dir/$file.json" || exit 1; done >/dev/null 2>"$said"
    then bad "$name" 'no JSON'
    else ok "$name"; fi
}

# As if the worker had run on another host, at whose boot the clock was another one, and had the other's number there.
elsewhere() {
    python3 - "$dir" <<'END'
import json, sys
with open(sys.argv[1] + "/serving.json") as file:
    pid = json.load(file)[0]["pid"]
with open(sys.argv[1] + "/measuring.json") as file:
    events = json.load(file)
for e in events:
    e["pid"] = pid
    if e["ph"] != "M":
        e["ts"] += 7e9
    if e["name"] == "tprpc_clock":
        e["args"]["boot"] = "another"
with open(sys.argv[1] + "/elsewhere.json", "w") as file:
    json.dump(events, file)
END
}

says() {        # NAME STATUS WORDS FILE...
    name=$1 status=$2 words=$3
    shift 3
    tools/merge-traces.py "$@" >"$out" 2>"$said"
    got=$?
    if [ $got -ne "$status" ]; then bad "$name" "exit status $got"
    elif ! grep -q -e "$words" "$said"; then bad "$name" "no \"$words\" in it"
    else ok "$name"; fi
}

for transport in shm tcp; do
    measure "perf_$transport" --transport $transport
    merged "merged_$transport" "$dir/serving.json" "$dir/measuring.json"
done
merged merged_the_other_way "$dir/measuring.json" "$dir/serving.json"
elsewhere
merged other_host "$dir/serving.json" "$dir/elsewhere.json"
merged other_host_first "$dir/elsewhere.json" "$dir/serving.json"
says other_host_is_named 0 'elsewhere.json: another clock, moved by -[67][09]' "$dir/serving.json" "$dir/elsewhere.json"
says unrelated_host 0 'elsewhere.json: another clock, and no call tells' "$dir/measuring.json" "$dir/elsewhere.json"
measure perf_in_process --in-process
merged merged_in_process "$dir/serving.json" "$dir/measuring.json"
echo '[1, 2]' >"$dir/other.json"
says other_file 1 "merge-traces.py: $dir/other.json: " "$dir/serving.json" "$dir/other.json"
says no_file 1 'No such file' "$dir/none.json"
says no_argument 2 'usage: '

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
