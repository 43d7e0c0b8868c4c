#!/bin/bash
# What mpt gains on a network that shapes each flow: two network namespaces, a veth between them on which every
# connection has MBIT of its own, and tprpc-perf over it with one lane and with LANES.
#
#     tools/bench-mpt.sh [MBIT] [LANES]       default: 200 and 4. Run as root, after make build/tprpc-perf
set -u
cd "$(dirname "$0")/.."
mbit=${1:-200} lanes=${2:-4} port=7311 classes=64
a=tprpc-mpt-a-$$ b=tprpc-mpt-b-$$ listening=

skip() { echo "bench-mpt is skipped: $1"; exit 0; }

clean_up() {
    [ -n "$listening" ] && kill "$listening" 2>/dev/null
    ip netns del "$a" 2>/dev/null
    ip netns del "$b" 2>/dev/null
}
trap clean_up EXIT
trap 'exit 130' INT TERM HUP

# Of an interface: a class for each flow, told by some bits of the port of who connected. Those of ports that a kernel
# gives out one after the other differ.
shape() {
    local in=$1 device=$2 which=$3 i
    tc -n "$in" qdisc add dev "$device" root handle 1: htb default ffff r2q 1000 2>/dev/null || return
    for ((i = 0; i < classes; i++)); do
        tc -n "$in" class add dev "$device" parent 1: classid "1:$(printf %x $((i + 1)))" htb rate "${mbit}mbit" \
            burst 64k || return
        tc -n "$in" filter add dev "$device" parent 1: protocol ip u32 match ip "$which" $((2 * i)) \
            "$(printf 0x%04x $((2 * (classes - 1))))" flowid "1:$(printf %x $((i + 1)))" || return
    done
}

[ -x build/tprpc-perf ] || { echo "bench-mpt: build/tprpc-perf is missing: make build/tprpc-perf" >&2; exit 1; }
[ "$(id -u)" = 0 ] || skip "only root makes network namespaces."
command -v tc >/dev/null && command -v ip >/dev/null || skip "ip and tc (iproute2) are not installed."
ip netns add "$a" 2>/dev/null && ip netns add "$b" 2>/dev/null || skip "this machine allows no network namespaces."
ip link add v0 netns "$a" type veth peer name v1 netns "$b" 2>/dev/null || skip "the kernel has no veth."
ip -n "$a" addr add 10.77.0.1/24 dev v0 && ip -n "$b" addr add 10.77.0.2/24 dev v1 || exit 1
ip -n "$a" link set v0 up && ip -n "$b" link set v1 up && ip -n "$a" link set lo up && ip -n "$b" link set lo up || exit 1
shape "$a" v0 sport && shape "$b" v1 dport || skip "the kernel has no htb, or no u32 to tell flows by."

# Prints what one run says.
measure() {
    local options=(--test bw --transport tcp --size 16M --iters 12 --lanes "$1" --no-pin) out
    ip netns exec "$b" build/tprpc-perf "${options[@]}" --listen "10.77.0.2:$port" >/dev/null & listening=$!
    for ((i = 0; i < 100; i++)); do
        ip netns exec "$b" ss -ltn 2>/dev/null | grep -q ":$port " && break
        sleep 0.05
    done
    out=$(ip netns exec "$a" build/tprpc-perf "${options[@]}" --connect "10.77.0.2:$port" --json) || return
    wait "$listening"
    listening=
    echo "$out"
}

one=$(measure 1) && several=$(measure "$lanes") || { echo "bench-mpt: tprpc-perf failed" >&2; exit 1; }
rate() { sed -n 's/.*"bandwidth_gbps": *\([0-9.e+-]*\).*/\1/p' <<<"$1" | head -1; }
awk -v mbit="$mbit" -v lanes="$lanes" -v one="$(rate "$one")" -v several="$(rate "$several")" 'BEGIN {
    printf "each flow has %d Mbit/s: one lane %.1f Mbit/s, %d lanes %.1f Mbit/s, ratio %.2f\n", mbit, one * 8000, lanes,
           several * 8000, several / one }'
