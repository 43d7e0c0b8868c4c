#!/bin/sh
# Runs test programs and sums what they say:  tests/run.sh PROGRAM... ("PROGRAM ARGUMENT..." in quotes)
#
# Each program shows a line per test and closes with "N passed, N failed" or "N passed, N failed, N skipped". So does
# this script, over all of them, and that line is the last and the only one that stands alone: theirs get their name
# before. One failure more for a program that ends without such a line or fails beside it, and for each
# "SKIP name: reason" that tests/README.md does not allow by a line "- SKIP name: condition".
set -u
readme=$(dirname "$0")/README.md
passed=0 failed=0 skipped=0 red='' running=

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

# Shows a program's output as it comes. Sets `closing` to its last line where that is a closing line, `skips` to the
# number of tests it skipped and `unlisted` to that of those which README does not allow.
follow() {
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

pipe=$(mktemp -u "${TMPDIR:-/tmp}/tprpc-run.XXXXXX")
mkfifo -m 600 "$pipe" || exit 2
trap 'rm -f "$pipe"' EXIT
trap '[ -z "$running" ] || kill "$running"; exit 130' INT TERM HUP

set -f          # programs are split into words, and nothing more
for program; do
    echo "== $program"
    # shellcheck disable=SC2046,SC2086
    $(prefix "$program") $program >"$pipe" 2>&1 </dev/null &
    running=$!
    follow "$program" <"$pipe"
    wait "$running"
    status=$?
    running=

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
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $failed failed, $skipped skipped"
else echo "$passed passed, $failed failed"; fi
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
