#!/bin/sh
# Runs test programs and sums what they say:  tests/run.sh PROGRAM... ("PROGRAM ARGUMENT..." in quotes)
#
# Each program shows a line per test and closes with "N passed, N failed" or "N passed, N failed, N skipped". This script
# closes with "N passed, N failed" over all of them, whatever was skipped; a line "N skipped" stands before where
# something was. That line is the last and the only one of its kind that stands alone: theirs get their name before. One
# failure more for a program that ends without such a line or fails beside it, and for each "SKIP name: reason" that
# tests/README.md does not allow by a line "- SKIP name: condition".
#
# One more than there are processors run side by side, for they wait more than they work, or TEST_JOBS; those after an
# argument "--" one by one when the others have ended, for they need the machine to themselves. They are shown in the
# order of the arguments.
set -u
readme=$(dirname "$0")/README.md
running=

# The first field of a closing line that starts with a number and ends with the word, 0 where there is none.
field() { printf '%s\n' "$1" | sed -n "s/^.*\(^\|, \)\([0-9][0-9]*\) $2.*\$/\2/p" | grep . || echo 0; }

is_closing() {
    case $1 in [0-9]*" passed, "[0-9]*" failed"*) ;; *) return 1 ;; esac
    printf '%s\n' "$1" | grep -Eqx '[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?'
}

allowed() { awk -v want="- SKIP $1: " 'index($0, want) == 1 && length($0) > length(want) { found = 1 }
                                       END { exit !found }' "$readme"; }

# Programs with the thread sanitizer of older compilers do not start where the kernel spreads mappings far.
prefix() {
    case $1 in *tsan*) ;; *) return ;; esac
    bits=$(cat /proc/sys/vm/mmap_rnd_bits 2>/dev/null || echo 0)
    if [ "$bits" -gt 28 ] && setarch -R true 2>/dev/null; then echo "setarch -R"; fi
}

# Runs the programs, up to the one named $1, that no other worker has taken: the n-th is its who made the folder n. There
# lie what the program said, in `said`, and, when it has ended, its exit status, in `status`.
work() {
    trap '[ -z "$running" ] || kill "$running"; exit 130' TERM
    n=0 end=$1
    shift
    for program; do
        n=$((n + 1))
        [ "$program" != "$end" ] || return
        [ "$program" != -- ] || continue
        mkdir "$dir/$n" 2>/dev/null || continue
        # shellcheck disable=SC2046,SC2086
        $(prefix "$program") $program >"$dir/$n/said" 2>&1 </dev/null &
        running=$!
        wait "$running"
        echo $? >"$dir/$n/ended"
        running=
        mv "$dir/$n/ended" "$dir/$n/status"
    done
}

# Shows what a program said. Sets `closing` to its last line where that is a closing line, `skips` to the number of
# tests it skipped and `unlisted` to that of those which README does not allow.
show() {
    closing='' skips=0 unlisted=0
    while IFS= read -r line || [ -n "$line" ]; do
        closing=
        if is_closing "$line"; then
            closing=$line
            echo "$1: $line"
            continue
        fi
        printf '%s\n' "$line"
        case $line in "SKIP "*": "*) ;; *) continue ;; esac
        skips=$((skips + 1))
        name=${line#SKIP }
        name=${name%%: *}
        allowed "$name" && continue
        unlisted=$((unlisted + 1))
        echo "FAIL $name: skipped, and tests/README.md has no line \"- SKIP $name: condition\""
    done
}

set -f          # programs are split into words, and nothing more
dir=$(mktemp -d "${TMPDIR:-/tmp}/tprpc-run.XXXXXX") || exit 2
workers=
trap 'rm -rf "$dir"' EXIT
# shellcheck disable=SC2086
trap 'kill $workers; wait; exit 130' INT TERM HUP
jobs=${TEST_JOBS:-$(($(nproc 2>/dev/null || echo 1) + 1))}
while [ "$jobs" -gt 0 ]; do
    work -- "$@" &
    workers="$workers $!"
    jobs=$((jobs - 1))
done

n=0 passed=0 failed=0 skipped=0 red=''
for program; do
    n=$((n + 1))
    if [ "$program" = -- ]; then
        work '' "$@" &
        workers="$workers $!"
        continue
    fi
    while [ ! -f "$dir/$n/status" ]; do sleep 0.1; done
    echo "== $program"
    show "$program" <"$dir/$n/said"
    status=$(cat "$dir/$n/status")
    bad=0
    if [ -n "$closing" ]; then
        bad=$(field "$closing" failed)
        passed=$((passed + $(field "$closing" passed)))
        if [ "$(field "$closing" skipped)" -ne "$skips" ]; then
            echo "FAIL $program: $skips SKIP lines, but it closes with: $closing"
            bad=$((bad + 1))
        elif [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then
            echo "FAIL $program: exit status $status"
            bad=1
        fi
    else
        echo "FAIL $program: no closing line, exit status $status"
        bad=1
    fi
    bad=$((bad + unlisted))
    skipped=$((skipped + skips - unlisted))
    failed=$((failed + bad))
    [ "$bad" -eq 0 ] || red="$red
     $program: $bad"
done

echo
[ -z "$red" ] || echo "failed:$red"
[ "$skipped" -eq 0 ] || echo "$skipped skipped"
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
