#!/bin/sh
# Runs a test program on real GPUs under compute-sanitizer:  tests/cuda/sanitized.sh PROGRAM ARGUMENT...
# What the sanitizer has to say stands before what the program said, whose last line tests/run.sh wants to see last.
set -u
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on the path" >&2; exit 2; }
dir=$(mktemp -d) || exit 2
trap 'rm -rf "$dir"' EXIT
CUDA_LIBRARY=libcuda.so.1 CUDA_FEW=1 TEST_LIMIT_SCALE="${TEST_LIMIT_SCALE:-20}" \
    compute-sanitizer --target-processes all --error-exitcode 9 --log-file "$dir/%p.log" "$@" >"$dir/said" 2>&1
status=$?
for log in "$dir"/*.log; do
    if grep -q 'ERROR SUMMARY: [1-9]' "$log"; then cat "$log"; fi
done
cat "$dir/said"
exit "$status"
