#!/bin/bash
# The conformance suite under valgrind's memcheck:  tests/valgrind.sh [all]      (make build/tests/in_conformance first)
#
# Without `all`, what takes a minute of a processor at most: the tests of our transports, of a converter and of our
# channels, each over one transport, but none of threads, which valgrind runs one at a time, and none that moves much.
# Memcheck looks for reads of what was never written, for use of what is freed, and at the end of each process for
# memory that nobody holds. A fault of a process that is killed afterwards fails the script, too.
set -u
cd "$(dirname "$0")/.." || exit 2
suite=build/tests/in_conformance

skip() {
    echo "SKIP conformance_under_valgrind: $1"
    echo '0 passed, 0 failed, 1 skipped'
    exit 0
}
command -v valgrind >/dev/null 2>&1 || skip 'there is no valgrind'
valgrind -q --error-exitcode=9 true >/dev/null 2>&1 || skip 'valgrind runs no program here'

# Between processes cma wants pidfd_open, which valgrind does not know (3.19).
mapfile -t tests < <("$suite" -l | grep -v '^channel_cma_.*_killed$')
if [ "${1-}" != all ]; then
    wanted='^(transport_(shm|tcp)|converter|channel_(basic_over_tcp|xth_over_shm|cma_over_shm))_'
    mapfile -t tests < <(printf '%s\n' "${tests[@]}" | grep -E "$wanted" | grep -Ev '_(streams|processes|threads)$')
    if [ ${#tests[@]} -lt 40 ]; then
        echo "FAIL conformance_under_valgrind: ${#tests[@]} tests of the suite were chosen"
        echo '0 passed, 1 failed'
        exit 1
    fi
fi

said=$(mktemp) || exit 2
trap 'rm -f "$said"' EXIT
# What valgrind itself does not know (epoll_pwait2, say) it answers as an old kernel does, and says so in lines with --.
TEST_LIMIT_SCALE=20 valgrind -q --error-exitcode=9 --leak-check=full --errors-for-leak-kinds=definite \
    --suppressions=tests/valgrind.supp "$suite" "${tests[@]}" 2>&1 | grep -v '^--[0-9]*--' >"$said"
status=${PIPESTATUS[0]}
sed '$d' "$said"
closing=$(tail -n 1 "$said")
faults=$(grep -c '^\( *| \)\?==[0-9]*== [A-Z]' "$said")
passed=${closing%% *}
case $closing in
    [0-9]*" passed, 0 failed"*) failed=0 ;;
    [0-9]*" passed, "[0-9]*" failed"*) failed=${closing#*, } failed=${failed%% *} ;;
    *) echo "$closing"; passed=0 failed=1 ;;
esac
if [ "$failed" -eq 0 ] && { [ "$faults" -ne 0 ] || [ "$status" -ne 0 ]; }; then
    echo "FAIL conformance_under_valgrind: $faults faults in processes that were killed, exit status $status"
    failed=1
fi
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
