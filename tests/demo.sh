#!/bin/sh
# The examples as a newcomer runs them:  tests/demo.sh        (make build/wave build/hello ... first)
set -u
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d "${TMPDIR:-/tmp}/tprpc-demo.XXXXXX") || exit 2
out=$dir/output passed=0 failed=0 started=

# Ends what is left of a run, and nothing else: process ids are those of our own children and of theirs.
children() { cat "/proc/$1/task/$1/children" 2>/dev/null; }
alive() { grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null; }
clean() {
    # shellcheck disable=SC2046
    for pid in $started; do kill -9 $(children "$pid") "$pid" 2>/dev/null; done
    rm -rf "$dir"
}
trap clean EXIT
trap 'exit 130' INT TERM HUP

ok()   { passed=$((passed + 1)); echo "ok $1"; }
bad()  { failed=$((failed + 1)); echo "FAIL $1: $2"; sed 's/^/    /' "$out"; }
says() { grep -q "$1" "$out"; }
now_ms() { echo $(($(date +%s%N) / 1000000)); }

# wave, in short form.
wave() { timeout 10 build/wave --steps 300 --every 100 --out "$dir/frames" "$@" >"$out" 2>&1; }

runs_on() {
    name=wave_$1
    if ! wave --transport "$1"; then bad "$name" "exit status $?"
    elif ! says 'bit for bit'; then bad "$name" 'no comparison with a run of one process'
    elif [ "$(awk -v t="$1" '/^(worker|coordinator)/ && $3 == t' "$out" | wc -l)" -ne 7 ]; then
        bad "$name" "not every pair is connected over $1"
    elif [ "$(find "$dir/frames" -name 'frame*.png' -size +0 | wc -l)" -ne 4 ]; then bad "$name" 'not 4 frames'
    else ok "$name"; fi
    rm -rf "$dir/frames"
}

runs_with() {       # any number of workers
    name=wave_of_$1
    if wave -n "$1" --quiet && [ ! -s "$out" ]; then ok "$name"; else bad "$name" "exit status $?"; fi
}

# Starts from another picture, of another size: a frame of an earlier run. What must be counted is reckoned here.
starts_from() {     # TRANSPORT
    name=wave_image_$1 rows=$((300 * 3 * 2))
    if ! wave --size 80 --steps 40 --quiet; then bad "$name" "exit status $? when the picture is made"
    elif ! cp "$dir/frames/frame00001.png" "$dir/image.png"; then bad "$name" 'no picture to start from'
    elif ! wave --transport "$1" --image "$dir/image.png"; then bad "$name" "exit status $?"
    elif ! says '^4 workers, 80 x 60 cells, 300 steps'; then bad "$name" 'not the field of the picture'
    elif ! says "= $((rows * 320)); counted: $((rows * 320)) sent, $((rows * 320)) received\$"; then
        bad "$name" "not $rows rows of 320 bytes were counted"
    elif ! says 'bit for bit'; then bad "$name" 'no comparison with a run of one process'
    else ok "$name"; fi
    rm -rf "$dir/frames" "$dir/image.png"
}

# What is no picture is named, and nothing is started.
wrong_image() {
    name=wave_wrong_image
    echo 'no picture' >"$dir/image.png"
    if wave --image "$dir/image.png"; then bad "$name" 'it ran'
    elif ! says "$dir/image.png"; then bad "$name" 'the file is not named'
    elif says 'worker'; then bad "$name" 'workers were started'
    else ok "$name"; fi
}

sees_corruption() {
    name=wave_corrupt
    if wave --corrupt 100 --quiet; then bad "$name" 'a corrupted halo is not seen'
    elif says 'cells differ from those of one process alone'; then ok "$name"
    else bad "$name" 'another failure'; fi
}

# A worker is killed after some steps, or at the start; the run ends within 2 s, names it and leaves no process.
survives_kill() {   # TRANSPORT WORKER DELAY
    name=wave_kill_$1_worker$2_after_$3
    build/wave --steps 100000000 --quiet --transport "$1" --out "$dir/frames" >"$out" 2>&1 &
    run=$! started="$started $!" tries=0 workers=
    while [ "$(echo "$workers" | wc -w)" -lt 4 ] && [ $tries -lt 200 ]; do
        sleep 0.01
        tries=$((tries + 1)) workers=$(children $run)
    done
    sleep "$3"
    began=$(now_ms)
    kill -9 "$(echo "$workers" | cut -d' ' -f"$2")"
    while alive $run && [ $(($(now_ms) - began)) -lt 3000 ]; do sleep 0.02; done
    took=$(($(now_ms) - began))
    left=$(for pid in $workers $run; do alive "$pid" && echo "$pid"; done)
    # shellcheck disable=SC2086
    [ -z "$left" ] || kill -9 $left
    wait $run
    status=$?
    if [ $took -ge 2000 ]; then bad "$name" "$took ms from the death to the end"
    elif [ $status -ne 1 ]; then bad "$name" "exit status $status"
    elif ! says "worker$2 died (signal 9)"; then bad "$name" "worker$2 is not named"
    elif [ -n "$left" ]; then bad "$name" "processes are left: $left"
    else ok "$name"; fi
    started=
}

# The server of README's two quick starts in one process, a client in another.
greets() {      # NAME CLIENT [ARGUMENT]
    name=$1
    shift
    timeout 20 build/hello >"$dir/server" 2>&1 &
    server=$! started=$!
    timeout 20 "$@" >"$out" 2>&1
    client=$?
    wait $server
    status=$?
    cat "$dir/server" >>"$out"
    if [ $client -eq 0 ] && [ $status -eq 0 ] && [ "$(cat "$out")" = 8 ]; then ok "$name"
    else bad "$name" "exit statuses: client $client, server $status"; fi
    started=
}

# README's quick start in C++, word for word, with a user's own warnings, and beside build/hello as it says there. (The
# one in C is examples/hello.c, which tests/compile.sh compares.)
readme_cpp() {
    name=readme_cpp flags='-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef -Wold-style-cast -Werror'
    sed -n '/^```cpp$/,/^```$/{ /^```/!p; }' README.md >"$dir/readme.cpp"
    # shellcheck disable=SC2086
    if [ "$(grep -c '^```cpp$' README.md)" -ne 1 ]; then bad "$name" 'README has not one block of C++'
    elif ! g++ -std=c++11 $flags -fno-exceptions -fno-rtti -I. "$dir/readme.cpp" -o "$dir/readme" -pthread -ldl \
            >"$out" 2>&1 || [ -s "$out" ]; then bad "$name" 'it does not compile without a word'
    else greets "$name" "$dir/readme"; fi
}

late_reply() {
    if timeout 20 build/late_reply >"$out" 2>&1 && says '^bake 2: 64 81 100 121$'; then ok late_reply
    else bad late_reply "exit status $?"; fi
}

# Both processes ran all frames, and every second or third of them brought an answer even on a busy machine.
engine_loop() {
    if ! timeout 20 build/engine_loop >"$out" 2>&1; then bad engine_loop "exit status $?"
    elif [ "$(awk '$2 == 120 && $4 >= 20 && $7 >= 20' "$out" | wc -l)" -ne 2 ]; then bad engine_loop 'too few calls'
    else ok engine_loop; fi
}

# Where nvcc is, it was built; where no GPU is, it says so.
wave_cuda() {
    [ -x build/wave_cuda ] || return 0
    small='--steps 60 --every 20 --width 200 --height 150'
    if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
        if timeout 20 build/wave_cuda >"$out" 2>&1; then bad wave_cuda_none 'it does without a GPU'
        elif ! says '^wave_cuda: no GPU: '; then bad wave_cuda_none 'it does not say that there is no GPU'
        else ok wave_cuda_none; fi
        return
    fi
    for n in 1 2 3; do
        # shellcheck disable=SC2086
        if timeout 60 build/wave_cuda -n $n $small >"$out" 2>&1 && says 'bit for bit'; then ok wave_cuda_of_$n
        else bad wave_cuda_of_$n 'not the same field'; fi
    done
    # shellcheck disable=SC2086
    if timeout 60 build/wave_cuda -n 2 $small --corrupt 7 >"$out" 2>&1 || ! says 'cells differ'; then
        bad wave_cuda_corruption 'a changed halo is not seen'
    else ok wave_cuda_corruption; fi
}

runs_on shm
runs_on tcp
wave_cuda
starts_from shm
starts_from tcp
wrong_image
for n in 1 2 8; do runs_with $n; done
sees_corruption
for transport in shm tcp; do
    survives_kill $transport 1 0
    survives_kill $transport 3 0.05
    survives_kill $transport 4 0.5
done
greets hello build/hello client
readme_cpp
late_reply
engine_loop

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
