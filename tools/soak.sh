#!/bin/bash
# Runs commands in turn, again and again, until one fails, it is stopped, or so many seconds have passed:
#
#     tools/soak.sh SECONDS COMMAND...        SECONDS 0: no limit. A command is a line for the shell
#
# Each run finds a seed of its own in SOAK_SEED, which is printed. SOAK_SEED=n tools/soak.sh ... begins with n again.
set -u
seconds=$1 began=$(date +%s) rounds=0
shift
export SOAK_SEED=${SOAK_SEED:-$began}
step=${SOAK_STEP:-100000}
export SOAK_STEP=1              # of a command that soaks, too: its seeds follow on its own
trap 'exit 130' INT TERM HUP

while :; do
    for command; do
        echo "SOAK_SEED=$SOAK_SEED $command"
        bash -c "$command" || { status=$?; echo "FAIL SOAK_SEED=$SOAK_SEED $command: exit status $status"; exit 1; }
        SOAK_SEED=$((SOAK_SEED + step))
        passed=$(($(date +%s) - began))
        if [ "$seconds" -gt 0 ] && [ $passed -ge "$seconds" ]; then break 2; fi
    done
    rounds=$((rounds + 1))
done
echo "soaked for $passed s, $rounds whole round(s)"
