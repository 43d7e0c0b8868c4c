#!/bin/sh
# Shows that the simulated network would see it: plants a bug in a copy of tprpc.h, by replacing one exact line, and
# demands that the simulation goes red within some seeds, for the reason that it should. A line that is no longer there
# fails its test: plant the bug anew.
#
#     tests/sim_planted.sh [name...]
set -u
cd "$(dirname "$0")/.." || exit 2
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM HUP
mkdir -p "$dir/tests"
cc=${CC:-gcc}
passed=0 failed=0
wanted=" $* "

$cc -std=c99 -O1 -g -D_GNU_SOURCE -pthread -c tests/sim.c -o "$dir/sim.o" || exit 2

# plant NAME LINE REPLACEMENT PATTERN: what the simulation says of it matches the pattern (grep -E).
plant() {
    case $wanted in "  " | *" $1 "*) ;; *) return ;; esac
    why=
    if ! LINE=$2 WITH=$3 awk 'BEGIN { line = ENVIRON["LINE"]; with = ENVIRON["WITH"] }
                              $0 == line { found++; print with; next } { print } END { exit found != 1 }' \
            tprpc.h >"$dir/tprpc.h"; then
        why="the line to be replaced is not there once"
    else
        cp tests/impl.c "$dir/tests/impl.c"
        if ! $cc -std=c99 -O0 -pthread -c "$dir/tests/impl.c" -o "$dir/impl.o" >"$dir/said" 2>&1 ||
           ! $cc -pthread "$dir/sim.o" "$dir/impl.o" -ldl -lm -o "$dir/sim" >>"$dir/said" 2>&1; then
            why="it does not compile"
        elif "$dir/sim" --from 1 --count 200 >"$dir/said" 2>&1; then
            why="200 seeds are green with it"
        elif ! grep -Eq "$4" "$dir/said"; then
            why="the simulation is red, but does not say $4"
        fi
    fi
    if [ -z "$why" ]; then
        passed=$((passed + 1))
        echo "ok planted_$1"
    else
        failed=$((failed + 1))
        tail -n 5 "$dir/said" 2>/dev/null
        echo "FAIL planted_$1: $why"
    fi
}

plant lost_callback '        tpr_loop_post(loop, &call->task);' \
    '        if (status == TPRPC_ERROR_TIMEOUT) on->sends--, call->refs--; else tpr_loop_post(loop, &call->task);' \
    'overdue|never ended|is due while its worker sleeps'
plant double_callback '    call->on_done(call->status, reply, error, call->user);' \
    '    for (int i = 0; i < 2; i++) call->on_done(call->status, reply, error, call->user);' \
    'has its callback for the 2'
plant leak '    if (call->error) tpr_base_pool_free(&loop->pool, call->error, sizeof *call->error);' \
    '    ' 'blocks of .* are left'
plant reordering '        if (request->lane != lane) continue;' \
    '        if (request->lane != lane || !request->whole) continue;' 'is handled after'
plant early_release '            op->release = message->release;' \
    '            op->release = NULL; if (message->release) message->release(message->release_user);' \
    'byte .* is wrong|none of ours'
plant oversleep '    int64_t timer = tpr_timer_next_us(&loop->wheel);' \
    '    int64_t timer = tpr_timer_next_us(&loop->wheel); if (timer < INT64_MAX / 2) timer += 20000;' \
    'is due while its worker sleeps on|overdue'
plant lost_cancel '        tpr_agent_call_end(call, TPRPC_ERROR_CANCELLED, &error);' '        (void)error;' \
    'was cancelled, and ends with'

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
