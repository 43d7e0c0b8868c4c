#!/bin/sh
# Installs what a purpose needs and this machine lacks:  tools/setup.sh demo|test|coverage|bench
#
# What counts is whether a thing works here, not whether dpkg knows it: a machine that has it, from wherever, needs
# neither dpkg nor a network. What lacks is installed with apt-get where this user is root, or sudo asks no password, or
# there is somebody at a terminal to be asked for it; elsewhere the one line to type is printed and the exit status is 1.
set -u

# Each need is a package and the check that it is there, which is quiet and has no side effect.
has() { command -v "$1" >/dev/null 2>&1; }
compiles() {        # compiles COMPILER SOURCE [FLAG...]
    compiler=$1 source=$2
    shift 2
    has "$compiler" && printf '%s\n' "$source" | "$compiler" "$@" -o /dev/null - >/dev/null 2>&1
}
links() {           # links SOURCE FLAG: a program to a real file, for some linkers refuse /dev/null
    out=$(mktemp) || return 1
    compiles clang "$1" -x c "$2" -o "$out"
    rc=$?
    rm -f "$out"
    return $rc
}
links_sanitizer() { links 'int main(void) { return 0; }' "-fsanitize=$1"; }
links_fuzzer() {
    links 'int LLVMFuzzerTestOneInput(const char *data, unsigned long size) { return !data && size; }' -fsanitize=fuzzer
}
has_header() {      # has_header NAME FOLDER...: in one of them
    header=$1
    shift
    for folder; do [ ! -f "$folder/$header" ] || return 0; done
    return 1
}
has_llvm() {        # a tool of LLVM's, clang's own or on the path
    has "$(clang "-print-prog-name=$1" 2>/dev/null)"
}

missing_for() {
    has gcc                                                             || echo gcc
    compiles gcc '#include <stdio.h>' -x c -c                           || echo libc6-dev
    has make                                                            || echo make
    compiles gcc '#include <png.h>' -x c -c                             || echo libpng-dev
    [ "$1" = demo ] && return
    has clang                                                           || echo clang
    compiles g++ '#include <string>' -x c++ -c                          || echo g++
    { links_sanitizer address,undefined && links_sanitizer thread && links_fuzzer; } || echo libclang-rt-dev
    has nm                                                              || echo binutils
    has python3                                                         || echo python3
    has ip                                                              || echo iproute2
    { has unshare && has setpriv; }                                     || echo util-linux
    has valgrind                                                        || echo valgrind
    has_header pmix.h /usr/include /usr/local/include /usr/lib/*/pmix2/include  || echo libpmix-dev
    has mpirun                                                          || echo openmpi-bin
    # The cross compiler recommends the libc it compiles against, and recommended packages are not installed here.
    has aarch64-linux-gnu-gcc                                           || echo gcc-aarch64-linux-gnu
    compiles aarch64-linux-gnu-gcc '#include <pthread.h>' -x c -c       || echo libc6-dev-arm64-cross
    [ "$1" = test ] && return
    if [ "$1" = coverage ]; then
        { has_llvm llvm-profdata && has_llvm llvm-cov; }                || echo llvm
        return
    fi
    has ucx_perftest                                                    || echo ucx-utils
    compiles gcc '#include <zmq.h>' -x c -c                             || echo libzmq3-dev
    compiles gcc '#include <nng/nng.h>' -x c -c                         || echo libnng-dev
    has gnuplot                                                         || echo gnuplot-nox
}

case ${1-} in
demo|test|coverage|bench) purpose=$1 ;;
*) echo "usage: tools/setup.sh demo|test|coverage|bench" >&2; exit 2 ;;
esac

missing=$(missing_for "$purpose" | tr '\n' ' ')
missing=${missing% }
[ -n "$missing" ] || exit 0

if ! has apt-get; then
    echo "tools/setup.sh: $purpose needs what Debian and Ubuntu package as: $missing" >&2
    exit 1
elif [ "$(id -u)" = 0 ]; then
    as_root='env DEBIAN_FRONTEND=noninteractive'
elif has sudo && sudo -n true 2>/dev/null; then
    as_root='sudo -n env DEBIAN_FRONTEND=noninteractive'
elif has sudo && [ -t 0 ] && [ -t 2 ]; then
    as_root='sudo env DEBIAN_FRONTEND=noninteractive'
else
    echo "tools/setup.sh: $purpose needs some packages. Type:" >&2
    echo "sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing" >&2
    exit 1
fi

echo "tools/setup.sh: installing for $purpose: $missing"
$as_root apt-get update -q >/dev/null || echo "tools/setup.sh: apt-get update failed; trying with what is known" >&2

# A release may carry one of them inside another package (Ubuntu 22.04 has the runtime of the sanitizers in clang's),
# and one unknown name would make apt-get install none. Whether all is well is seen afterwards.
known=
for package in $missing; do
    if [ -n "$(apt-cache madison "$package" 2>/dev/null)" ]; then known="$known $package"
    else echo "tools/setup.sh: this release has no package $package"; fi
done
# shellcheck disable=SC2086
[ -z "$known" ] || $as_root apt-get install -q -y --no-install-recommends $known >/dev/null

missing=$(missing_for "$purpose" | tr '\n' ' ')
missing=${missing% }
[ -n "$missing" ] || exit 0
echo "tools/setup.sh: still missing for $purpose, see above: $missing. By hand:" >&2
echo "sudo apt-get update && sudo apt-get install -y --no-install-recommends $missing" >&2
exit 1
