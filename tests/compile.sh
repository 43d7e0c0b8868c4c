#!/bin/sh
# What tprpc.h promises to compilers, linkers and the files that include it:  tests/compile.sh [NAME...]
# With names, only the checks that have one of them in theirs. Each check runs in a folder of its own, as many at a time
# as there are cores; its output is shown when it fails.
# shellcheck disable=SC2046,SC2086      # flags are words
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
header=$root/tprpc.h

warnings='-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wundef -Werror'
cxx_warnings='-Wold-style-cast -fno-exceptions -fno-rtti'
libraries='-pthread -ldl -lm'

# Lines of the sources that are compiled. For dlpack.h stands one of ours, 1.0 or, with -DTEST_DLPACK_OLD, 0.6. Like the
# real one it includes no system header that spoils _GNU_SOURCE for the implementation.
include='#include "tprpc.h"'
implement='#define TPRPC_IMPLEMENTATION'
dlpack='#include "tests/dlpack_abi.h"'
cuda='#include "tprpc_cuda.h"'
cuda_implement='#define TPRPC_CUDA_IMPLEMENTATION'
use='int use(void); int use(void) { return tprpc_version() != TPRPC_VERSION; }'

has() { command -v "$1" >/dev/null 2>&1; }
is_cxx() { case $1 in c++*) true ;; *) false ;; esac; }

# The command of a compiler for a standard: gcc is g++ for C++.
command_of() {
    if ! is_cxx "$2"; then echo "$1"
    elif [ "$1" = gcc ]; then echo g++
    else echo "$1++"; fi
}

# compile COMPILER STANDARD ARGUMENT...: with all warnings, and they are errors.
compile() {
    compile_command=$(command_of "$1" "$2") compile_flags="-std=$2 $warnings"
    ! is_cxx "$2" || compile_flags="$compile_flags $cxx_warnings"
    shift 2
    "$compile_command" $compile_flags -I"$root" "$@"
}

run() {
    "$@"
    rc=$?
    [ $rc -eq 0 ] || echo "$*: exit status $rc"
    return $rc
}

# write NAME STANDARD LINE...: a source file; sets `source` to its name.
write() {
    if is_cxx "$2"; then source=$1.cpp; else source=$1.c; fi
    shift 2
    printf '%s\n' "$@" >"$source"
}

# ---- the checks: run in an empty folder; what they print tells why they failed ----

# compiles COMPILER STANDARD FLAGS LINE...: to x.o, without a word. Several checks look at the same object: the first one
# compiles it, the others take it from there.
compiles() {
    compiler=$1 standard=$2 flags=$3
    shift 3
    write x "$standard" "$@"
    made=../made.$(printf '%s\n' "$compiler" "$standard" "$flags" | cat - "$source" | cksum | tr ' ' .)
    if mkdir "$made" 2>/dev/null; then
        compile "$compiler" "$standard" $flags -c "$source" -o "$made/x.o" >"$made/said" 2>&1
        echo $? >"$made/ended"
        mv "$made/ended" "$made/rc"
    fi
    tries=0
    while [ ! -f "$made/rc" ]; do
        [ $((tries += 1)) -le 3000 ] || { echo "who compiles $made does not end"; return 1; }
        sleep 0.1
    done
    cat "$made/said"
    [ "$(cat "$made/rc")" -eq 0 ] && [ ! -s "$made/said" ] && ln -f "$made/x.o" x.o
}

# dlpack COMPILER STANDARD: the declarations for a user's dlpack.h, new and old, that came before tprpc.h or between two
# inclusions of it; they name the functions that the library has. Without dlpack.h there are none.
dlpack() {
    for version in '' -DTEST_DLPACK_OLD; do
        for before in '' "$include"; do
            compiles "$1" "$2" "$version" "$before" "$dlpack" "$include" "$include" "$use" \
                'tprpc_status from(DLManagedTensor *m, tprpc_tensor *t);' \
                'tprpc_status from(DLManagedTensor *m, tprpc_tensor *t) {' \
                '    return tprpc_from_dlpack(m, t, NULL, NULL);' '}' \
                'tprpc_status to(const tprpc_tensor *t, DLTensor *d, int64_t *s);' \
                'tprpc_status to(const tprpc_tensor *t, DLTensor *d, int64_t *s) {' \
                '    return tprpc_to_dlpack(t, d, s, NULL);' '}' || return 1
            [ "$(undefined | grep -cEx 'tprpc_(from|to)_dlpack')" -eq 2 ] || { undefined; return 1; }
        done
    done
    write y "$2" "$include"
    compile "$1" "$2" -E -P "$source" >without && ! grep dlpack without
}

# A dlpack.h older than 0.6 is refused in one sentence, and 0.6 is not. The preprocessor alone says so.
dlpack_too_old() {
    write x c99 "$implement" "$include"
    compile gcc c99 -E -DDLPACK_VERSION=60 x.c -o /dev/null || return 1
    ! compile gcc c99 -E -DDLPACK_VERSION=59 x.c -o /dev/null 2>said || { echo '0.5 is taken'; return 1; }
    cat said
    [ "$(grep -c 'error:' said)" -eq 1 ] && grep -q 'error:.*dlpack\.h is older than 0\.6' said
}

# Function names that the object x.o asks the system for.
undefined() { nm -u x.o | sed 's/.* //; s/@.*//'; }

# leaves_none FLAG REGEX: the implementation built so asks for none of these functions. Not optimised, for what is
# merely optimised away is still there for the next compiler.
leaves_none() {
    compiles gcc c99 "$1" "$implement" "$include" || return 1
    ! undefined | grep -Ex "$2"
}

# exports_tprpc COMPILER STANDARD FLAGS: the symbols that the object gives to others are tprpc_* and there are some.
exports_tprpc() {
    compiles "$@" "$implement" "$include" || return 1
    nm -g --defined-only x.o | awk 'NF { names++; if ($NF !~ /^tprpc_/) { print; bad++ } } END { exit bad || !names }'
}

exports_dlpack() {
    exports_tprpc "$1" "$2" "$3 -include tests/dlpack_abi.h" || return 1
    [ "$(nm -g --defined-only x.o | grep -cE ' tprpc_(from|to)_dlpack$')" -eq 2 ]
}

exports_nothing() {
    compiles "$@" "$implement" "$include" || return 1
    [ -z "$(nm -g --defined-only x.o | tee names)" ] || { cat names; return 1; }
}

# What is declared with TPRPC_API is defined, and the other way round.
declares_what_it_defines() {
    exports_tprpc gcc c99 '' || return 1
    nm -g --defined-only x.o | sed 's/.* //' | sort >defined
    write y c99 "$include"
    compile gcc c99 -DTPRPC_API=MARK -E -P y.c | tr '\n' ' ' | grep -o 'MARK [^;]*' |
        sed 's/^[^(]*\(tprpc_[a-z0-9_]*\) *(.*/\1/' | sort -u >declared
    diff declared defined
}

# A shared library by TPRPC_DLL exports tprpc_* though all else is hidden, and a program that includes with TPRPC_DLL
# calls it.
dll() {
    write lib "$2" "$implement" "$include"
    compile "$1" "$2" -DTPRPC_DLL -fPIC -fvisibility=hidden -shared "$source" -o libx.so $libraries || return 1
    nm -D --defined-only libx.so | awk '$NF !~ /^tprpc_/ && $NF !~ /^_/ { print; bad = 1 } END { exit bad }' || return 1
    write main "$2" "$include" 'int main(void) { return tprpc_version() != TPRPC_VERSION; }'
    compile "$1" "$2" -DTPRPC_DLL "$source" -L. -lx -Wl,-rpath,. -o main && ./main
}

# Other libraries' macros before the public part. Each expands to what compiles nowhere; min and max take arguments.
hostile() {
    compiles "$1" "$2" '' '#define min(a, b) @' '#define max(a, b) @' "$(
        for name in near far small interface None Status Bool Success ERROR; do echo "#define $name @"; done)" \
        "$include" "$use"
}

# unity COMPILER STANDARD FLAGS FILE...: these files included in one, which runs. `impl` has the implementation; `a` and
# `b` are users, with a system header.
unity() {
    compiler=$1 standard=$2 flags=$3
    shift 3
    printf '%s\n' "$implement" "$include" >impl
    printf '%s\n' "$include" '#include <string.h>' \
        'static int version_a(void) { return strlen("a") == 1 ? tprpc_version() : 0; }' >a
    printf '%s\n' '#include <stdio.h>' "$include" \
        'int main(void) { return version_a() != TPRPC_VERSION || puts("") < 0; }' >b
    write x "$standard" $(printf '#include"%s"\n' "$@")
    compile "$compiler" "$standard" -I. $flags "$source" -o x $libraries && ./x
}

# A plugin with a copy of the library: it listens or connects on a context of its own, and one message goes each way.
plugin() {
    cat >plugin.c <<'END'
#define TPRPC_IMPLEMENTATION
#include "tprpc.h"
#include <stdlib.h>
#include <string.h>
#define EXPORT __attribute__((visibility("default")))
typedef struct plugin {
    tprpc_context *ctx;
    tprpc_listener *listener;
    tprpc_pipe *pipe;
    int sent, got;
    char transport[16];
} plugin;
EXPORT plugin *plugin_create(void);
EXPORT const char *plugin_listen(plugin *p, const char *address);
EXPORT int plugin_connect(plugin *p, const char *address);
EXPORT void plugin_close(plugin *p);
EXPORT int plugin_send(plugin *p, const char *text);
EXPORT int plugin_poll(plugin *p);
EXPORT const char *plugin_transport(plugin *p);
EXPORT int plugin_destroy(plugin *p);
static void on_read(tprpc_status status, const tprpc_message *message, const tprpc_error *error, void *user) {
    (void)error;
    if (status == TPRPC_OK && message->metadata_size == 5 && !memcmp(message->metadata, "hello", 5))
        ((plugin *)user)->got++;
}
static void on_written(tprpc_status status, const tprpc_error *error, void *user) {
    (void)error;
    if (status == TPRPC_OK) ((plugin *)user)->sent++;
}
static void on_accepted(tprpc_status status, tprpc_pipe *pipe, const tprpc_error *error, void *user) {
    (void)error;
    if (status != TPRPC_OK) return;
    ((plugin *)user)->pipe = pipe;
    tprpc_pipe_read(pipe, NULL, on_read, user);
}
EXPORT plugin *plugin_create(void) {
    plugin *p = (plugin *)calloc(1, sizeof *p);
    tprpc_context_desc desc = {0};
    if (p && tprpc_context_create(&desc, &p->ctx, NULL) != TPRPC_OK) return NULL;
    return p;
}
EXPORT const char *plugin_listen(plugin *p, const char *address) {
    tprpc_listener_desc desc = {0};
    desc.addresses = &address;
    desc.address_count = 1;
    if (tprpc_listen(p->ctx, &desc, &p->listener, NULL) != TPRPC_OK) return NULL;
    if (tprpc_accept(p->listener, on_accepted, p) != TPRPC_OK) return NULL;
    return tprpc_listener_address(p->listener, NULL);
}
EXPORT int plugin_connect(plugin *p, const char *address) {
    tprpc_pipe_desc desc = {0};
    desc.address = address;
    return tprpc_connect(p->ctx, &desc, &p->pipe, NULL) != TPRPC_OK ||
           tprpc_pipe_read(p->pipe, NULL, on_read, p) != TPRPC_OK;
}
EXPORT void plugin_close(plugin *p) {
    tprpc_pipe_close(p->pipe);
    if (p->listener) tprpc_listener_close(p->listener);
    p->pipe = NULL;
    p->listener = NULL;
    p->sent = p->got = 0;
}
EXPORT int plugin_send(plugin *p, const char *text) {
    tprpc_message message = {0};
    message.metadata = text;
    message.metadata_size = strlen(text);
    return !p->pipe || tprpc_pipe_write(p->pipe, &message, on_written, p) != TPRPC_OK;
}
EXPORT int plugin_poll(plugin *p) {                  /* 1: it has a pipe; 2: a message has come */
    tprpc_poll(p->ctx, 1000, 0);
    return (p->pipe != NULL) + 2 * (p->got > 0);
}
EXPORT const char *plugin_transport(plugin *p) {
    tprpc_pipe_info info;
    if (tprpc_pipe_get_info(p->pipe, &info, sizeof info) != TPRPC_OK) return "none";
    memcpy(p->transport, info.transport, sizeof p->transport);
    return p->transport;
}
EXPORT int plugin_destroy(plugin *p) {
    int status = tprpc_context_destroy(p->ctx) != TPRPC_OK;
    free(p);
    return status;
}
END
}

# Two copies of the library, each inside a shared library of its own, in one program: over each transport they connect to
# each other and exchange messages, and when one goes, the other goes on.  vendored FLAG FLAG: of each copy
vendored() {
    plugin
    cat >main.c <<'END'
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
struct plugin;
typedef struct copy {
    struct plugin *(*create)(void);
    const char *(*listen)(struct plugin *, const char *);
    int (*connect)(struct plugin *, const char *);
    void (*close)(struct plugin *);
    int (*send)(struct plugin *, const char *);
    int (*poll)(struct plugin *);
    const char *(*transport)(struct plugin *);
    int (*destroy)(struct plugin *);
    struct plugin *p;
} copy;
static void get(void *library, const char *name, void *out) {
    void *symbol = dlsym(library, name);
    memcpy(out, &symbol, sizeof symbol);
}
static int load(copy *c, const char *path) {
    void *library = dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 0;
    get(library, "plugin_create", &c->create);
    get(library, "plugin_listen", &c->listen);
    get(library, "plugin_connect", &c->connect);
    get(library, "plugin_close", &c->close);
    get(library, "plugin_send", &c->send);
    get(library, "plugin_poll", &c->poll);
    get(library, "plugin_transport", &c->transport);
    get(library, "plugin_destroy", &c->destroy);
    return c->create && c->listen && c->connect && c->close && c->send && c->poll && c->transport && c->destroy;
}
/* Polls both until each has all that `want` says. */
static int until(copy *a, copy *b, int want) {
    time_t end = time(NULL) + 20;
    while (time(NULL) < end)
        if (((a->poll(a->p) & want) == want) & ((b->poll(b->p) & want) == want)) return 1;
    return 0;
}
static int talk(copy *a, copy *b, const char *address, const char *transport) {
    const char *at = a->listen(a->p, address);
    if (!at || b->connect(b->p, at)) return printf("%s: not connected\n", address), 0;
    if (!until(a, b, 1) || b->send(b->p, "hello") || a->send(a->p, "hello") || !until(a, b, 3))
        return printf("%s: no message\n", address), 0;
    if (strcmp(a->transport(a->p), transport) != 0 || strcmp(b->transport(b->p), transport) != 0)
        return printf("%s: over %s, not %s\n", address, a->transport(a->p), transport), 0;
    b->close(b->p);
    a->close(a->p);
    return 1;
}
int main(void) {
    static copy a, b, c;
    if (!load(&a, "./a.so") || !load(&b, "./b.so")) return 2;
    if (a.create == b.create) return 3;
    c = b;
    a.p = a.create();
    b.p = b.create();
    if (!a.p || !b.p) return 4;
    if (!talk(&a, &b, "tcp://127.0.0.1:0", "shm") || !talk(&b, &a, "shm://", "shm")) return 5;
    if (!a.listen(a.p, "tcp://127.0.0.1:0") || a.destroy(a.p)) return 6;
    c.p = c.create();
    if (!c.p || !talk(&c, &b, "shm://", "shm") || !talk(&b, &c, "tcp://127.0.0.1:0", "shm")) return 7;
    return b.destroy(b.p) || c.destroy(c.p) ? 8 : 0;
}
END
    compile gcc c99 "$1" -fPIC -shared plugin.c -o a.so $libraries &&
        if [ "$1" = "$2" ]; then cp a.so b.so; else compile gcc c99 "$2" -fPIC -shared plugin.c -o b.so $libraries; fi &&
        compile gcc c99 main.c -o main -ldl && run ./main
}

# left_out_runs FLAGS ADDRESS...: linked without a part, two contexts of one program talk over what is left, under each
# address; with no address, a local store is all there is.
left_out_runs() {
    flags=$1
    shift
    plugin
    cat >main.c <<'END'
#include "plugin.c"
#include <stdio.h>
#include <time.h>
static void on_stored(tprpc_status status, const void *value, size_t size, const tprpc_error *error, void *user) {
    (void)value; (void)size; (void)error;
    *(int *)user = status == TPRPC_OK;
}
static int stores(void) {
    tprpc_context_desc context = {0};
    tprpc_store_desc desc = {0};
    tprpc_context *ctx = NULL;
    tprpc_store *store = NULL;
    tprpc_status status = tprpc_context_create(&context, &ctx, NULL);
    int stored = 0;
    if (status != TPRPC_OK) return status == TPRPC_ERROR_UNSUPPORTED;    /* no transport: it says so */
    desc.url = "local://";
    if (tprpc_store_open(ctx, &desc, &store, NULL) != TPRPC_OK) return 0;
    if (tprpc_store_set(store, "k", "v", 1, on_stored, &stored) != TPRPC_OK) return 0;
    for (int i = 0; i < 1000 && !stored; i++) tprpc_poll(ctx, 1000, 0);
    tprpc_store_close(store);
    return stored && tprpc_context_destroy(ctx) == TPRPC_OK;
}
int main(int argc, char **argv) {
    if (!stores()) return 2;
    for (int i = 1; i < argc; i++) {
        plugin *a = plugin_create(), *b = plugin_create();
        const char *at = a ? plugin_listen(a, argv[i]) : NULL;
        time_t end = time(NULL) + 20;
        if (!b || !at || plugin_connect(b, at) || plugin_send(b, "hello")) return 3;
        while (plugin_poll(a) != 3 && time(NULL) < end) plugin_poll(b);
        if (a->got != 1 || plugin_send(a, "hello")) return 4;
        while (plugin_poll(b) != 3 && time(NULL) < end) plugin_poll(a);
        if (b->got != 1) return 5;
        printf("%s: %s\n", argv[i], plugin_transport(a));
        plugin_close(b);
        plugin_close(a);
        if (plugin_destroy(a) || plugin_destroy(b)) return 6;
    }
    return 0;
}
END
    compile gcc c99 $flags main.c -o main $libraries && run ./main "$@"
}

# The texts of log messages are in the object, or not.  log_level LEVEL: those above it are compiled out. `levels` holds
# a line "LEVEL TEXT" per message of the header.
log_level() {
    python3 - "$header" >levels <<'END'
import re, sys
names = ["PANIC", "ERROR", "WARNING", "INFO", "DEBUG"]
text = re.sub(r'"\s*\n\s*"', '', open(sys.argv[1]).read())
pattern = r'TPR_LOG\((?:[^;"]*?)TPRPC_LOG_(\w+),\s*"\w+",\s*(?:""|[^,"]+),\s*"((?:[^"\\]|\\.)*)"'
for level, format in re.findall(pattern, text):
    if len(format) >= 18 and text.count(format) == 1:      # a short one may stand elsewhere, too
        print(names.index(level), format)
END
    [ "$(wc -l <levels)" -ge 3 ] || { echo 'found no messages in the header'; cat levels; return 1; }
    compiles gcc c99 "-DTPRPC_LOG_LEVEL=$1" "$implement" "$include" || return 1
    strings -n 4 x.o >texts
    while read -r level text; do
        if [ "$level" -le "$1" ]; then grep -qF -- "$text" texts || { echo "missing: $text"; return 1; }
        elif grep -qF -- "$text" texts; then echo "still there: $text"; return 1
        fi
    done <levels
}

# Without files an agent that is to write a trace is refused, in a sentence; one that is not is created.
no_trace() {
    compiles gcc c99 -DTPRPC_NO_FILES "$implement" "$include" || return 1
    cat >main.c <<'END'
#include "tprpc.h"
#include <stdio.h>
int main(void) {
    tprpc_agent_desc desc = {.name = "a", .init_method = "tcp://127.0.0.1:29599", .world_size = 1};
    tprpc_agent *agent = NULL;
    tprpc_error error = {TPRPC_OK, 0, 0, ""};
    if (tprpc_agent_create(&desc, &agent, &error) || tprpc_agent_flush_trace(agent, NULL)) return 1;
    tprpc_agent_destroy(agent);
    desc.trace = "a";
    tprpc_status status = tprpc_agent_create(&desc, &agent, &error);
    puts(error.text);
    return status != TPRPC_ERROR_UNSUPPORTED || agent;
}
END
    compile gcc c99 main.c x.o $libraries -o main || return 1
    run ./main >said || { cat said; return 1; }
    cat said
    grep -q 'a trace needs files.*TPRPC_NO_FILES' said
}

# A system header came first without _GNU_SOURCE: one error that says so, and nothing else.
one_error() {
    write x "$2" '#include <string.h>' "$implement" "$include"
    ! compile "$1" "$2" -c "$source" -o x.o >said 2>&1 || { echo 'it compiles'; return 1; }
    cat said
    [ "$(grep -c 'error:' said)" -eq 1 ] && ! grep -q 'warning:' said && grep -q 'error:.*_GNU_SOURCE' said
}

# mismatch WHAT: the program is built with a header that differs in this from that of the library.
mismatch() {
    case $1 in
    nothing)      edit='' expected=NOTHING ;;
    version)      edit='s/^\(#define TPRPC_VERSION  *\)[0-9]*/\1990000/' expected=BOTH ;;
    context_desc) edit="s/^typedef struct tprpc_$1 {/& int64_t added_here[4];/" expected=CONTEXT ;;
    agent_desc)   edit="s/^typedef struct tprpc_$1 {/& int64_t added_here[4];/" expected=AGENT ;;
    esac
    mkdir other && sed "$edit" "$header" >other/tprpc.h
    if [ "$1" != nothing ] && cmp -s "$header" other/tprpc.h; then
        echo 'found nothing to change in the header'
        return 1
    fi
    cat >main.c <<'END'
#include "tprpc.h"
#include <stdio.h>
#include <string.h>
enum { NOTHING, CONTEXT, AGENT, BOTH };
static int refused(const char *what, tprpc_status status, const void *object, const tprpc_error *error) {
    printf("%s: status %d, \"%s\"\n", what, (int)status, error->text);
    return status != TPRPC_OK && !object && strlen(error->text) > 20 && strchr(error->text, ' ') != NULL;
}
int main(void) {
    tprpc_context_desc context_desc = {0};
    tprpc_agent_desc agent_desc = {0};
    tprpc_context *context = NULL;
    tprpc_agent *agent = NULL;
    tprpc_error error = {0};
    tprpc_status status = tprpc_context_create(&context_desc, &context, &error);
    if (EXPECTED & CONTEXT ? !refused("context", status, context, &error) : status != TPRPC_OK) return 2;
    agent_desc.context = context;
    agent_desc.name = "a";
    agent_desc.init_method = "tcp://127.0.0.1:29599";
    agent_desc.world_size = 1;
    status = tprpc_agent_create(&agent_desc, &agent, &error);
    if (EXPECTED & AGENT ? !refused("agent", status, agent, &error) : status != TPRPC_OK) return 3;
    if (agent) tprpc_agent_destroy(agent);
    if (context) tprpc_context_destroy(context);
    return 0;
}
END
    compiles gcc c99 '' "$implement" "$include" &&
        gcc -std=c99 -Iother "-DEXPECTED=$expected" main.c x.o -o main $libraries && run ./main
}

# The public part includes three headers.
includes_three() {
    write x "$2" "$include" "$use"
    compile "$1" "$2" -H -fsyntax-only "$source" 2>&1 | sed -n 's|^\.\. .*/||p' | sort -u >included
    [ -s included ] && ! grep -vxE 'stddef\.h|stdint\.h|stdbool\.h' included
}

# The public part adds macros TPRPC_* alone, and the implementation leaves none of its own.
macros() {
    write three "$2" '#include <stddef.h>' '#include <stdint.h>' '#include <stdbool.h>'
    compile "$1" "$2" -E -dM "$source" | awk '{ print $2 }' | sort >before
    write with "$2" "$include"
    compile "$1" "$2" -E -dM "$source" | awk '{ print $2 }' | sort >after
    write whole "$2" "$implement" "$include"
    compile "$1" "$2" -E -dM "$source" | awk '{ print $2 }' | sort >with_implementation
    [ -s before ] && grep -q '^TPRPC_' after && ! comm -13 before after | grep -v '^TPRPC_' &&
        ! grep '^TPR_' with_implementation
}

# said_nothing FOLDER: what was compiled there before is good.
said_nothing() {
    cat "$1/said"
    [ -f "$1/good" ]
}

# example COMPILER STANDARD FILE
example() { compile "$1" "$2" -c "$3" -o x.o; }

# hello.c is at most 40 lines long and in the README word for word.
hello_in_readme() {
    wc -l "$root/examples/hello.c"
    [ "$(wc -l <"$root/examples/hello.c")" -le 40 ] &&
        python3 -c 'import sys; hello, readme = (open(f).read() for f in sys.argv[1:]); sys.exit(hello not in readme)' \
            "$root/examples/hello.c" "$root/README.md"
}

# ---- running them ----

# Called by xargs. The job's file has the check's name in its first line, then the command, an argument a line.
if [ "${1-}" = --job ]; then
    job=$2
    set --
    { IFS= read -r name; while IFS= read -r argument; do set -- "$@" "$argument"; done; } <"$job"
    mkdir "$job.d" && cd "$job.d" || exit 1
    if "$@" >../"${job##*/}.log" 2>&1; then
        printf 'ok %s\n' "$name"
        : >"$job.ok"
    else
        printf '%s\n' "FAIL $name" "$(head -n 25 "$job.log" | sed 's/^/    | /')"
    fi
    exit 0
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/tprpc-compile.XXXXXX") || exit 2
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM HUP
count=0 skipped=0

wanted() {
    wanted_name=$1
    shift
    [ $# -gt 0 ] || return 0
    for pattern; do case $wanted_name in *"$pattern"*) return 0 ;; esac; done
    return 1
}
filters=$*

# check NAME COMMAND...: queues it. An argument of several lines would be several arguments, which is the same to all.
check() {
    wanted "$1" $filters || return 0
    count=$((count + 1))
    printf '%s\n' "$@" >"$work/$(printf '%03d' $count)"
}

skip() {
    echo "SKIP $1: $2"
    skipped=$((skipped + 1))
}

compilers=gcc
if has clang && has clang++; then compilers='gcc clang'; else skip compile_clang 'clang is missing'; fi

for compiler in $compilers; do
    # Some of what compiles the implementation does it with DLPack, rather than once more.
    for std in c99 c++11 c++20; do
        check "implementation $compiler $std" compiles $compiler $std '' "$implement" "$include"
    done
    for std in c11 c++17; do
        check "implementation, dlpack.h $compiler $std" compiles $compiler $std '' "$dlpack" "$implement" "$include"
    done
    for std in c99 c++11 c++20; do      # tprpc_cuda.h, alone and in one file with tprpc.h, in both orders
        check "cuda, implementation $compiler $std" compiles $compiler $std '' "$cuda_implement" "$cuda" "$cuda" "$use"
        check "cuda, declarations $compiler $std" compiles $compiler $std '' "$cuda" "$include" "$use"
    done
    check "cuda, both $compiler c99" compiles $compiler c99 '' "$implement" "$include" "$cuda_implement" "$cuda"
    check "cuda, both at once $compiler c++17" compiles $compiler c++17 -DTPRPC_STATIC "$implement" "$cuda_implement" \
        "$cuda" "$use"
    check "cuda, optimised, without assertions $compiler" compiles $compiler c99 '-O2 -DNDEBUG' "$cuda_implement" "$cuda"
    check "cuda, without $compiler" compiles $compiler c99 '-DTPRPC_NO_DLOPEN -DTPRPC_NO_THREADS' "$cuda_implement" \
        "$cuda"
    check "implementation, old dlpack.h $compiler c17" compiles $compiler c17 -DTEST_DLPACK_OLD "$dlpack" "$implement" \
        "$include"
    for std in c99 c11 c17 c++11 c++17; do check "dlpack.h $compiler $std" dlpack $compiler $std; done
    for std in c99 c11 c17 c++11 c++17 c++20; do
        check "declarations $compiler $std" compiles $compiler $std '' "$include" "$use"
    done
    for std in c99 c++11; do
        check "static $compiler $std" exports_nothing $compiler $std -DTPRPC_STATIC
        check "dll $compiler $std" dll $compiler $std
        check "symbols $compiler $std" exports_tprpc $compiler $std ''
        check "symbols with test hooks, dlpack.h $compiler $std" exports_dlpack $compiler $std -DTPRPC_TEST_HOOKS
        check "hostile macros $compiler $std" hostile $compiler $std
        check "public includes $compiler $std" includes_three $compiler $std
        check "macros $compiler $std" macros $compiler $std
        check "twice $compiler $std" compiles $compiler $std '' "$include" "$include" "$use"
        check "implementation twice, old dlpack.h $compiler $std" compiles $compiler $std -DTEST_DLPACK_OLD "$dlpack" \
            "$implement" "$include" "$include" "$implement" "$include" "$use"
        check "declarations before and after $compiler $std" compiles $compiler $std '' "$include" "$implement" \
            "$include" '#undef TPRPC_IMPLEMENTATION' "$include" "$use"
        check "unity $compiler $std" unity $compiler $std '' impl a b
        check "unity, implementation within $compiler $std" unity $compiler $std -D_GNU_SOURCE a impl b
    done
    check "optimised, without assertions $compiler" compiles $compiler c99 '-O2 -DNDEBUG' "$implement" "$include"
    check "one error $compiler c99" one_error $compiler c99
    check "one error $compiler gnu99" one_error $compiler gnu99
    check "no error with _GNU_SOURCE $compiler" compiles $compiler c99 -D_GNU_SOURCE '#include <string.h>' \
        "$implement" "$include"
    for file in "$root"/examples/*.c; do
        if [ "${file##*/}" = wave.c ] && ! echo '#include <png.h>' | gcc -E - >/dev/null 2>&1; then
            skip compile_wave 'png.h is missing'
            continue
        fi
        [ $compiler = gcc ] || check "example ${file##*/} $compiler c99" example $compiler c99 "$file"   # as make does
    done
    for file in "$root"/examples/*.cpp; do
        [ $compiler = gcc ] || check "example ${file##*/} $compiler c++11" example $compiler c++11 "$file"
        check "example ${file##*/} $compiler c++20" example $compiler c++20 "$file"
    done
done

check "dlpack.h older than 0.6" dlpack_too_old
check "declared is defined" declares_what_it_defines
check "hello.c in the README" hello_in_readme

# What can be left out: each alone, and all together.
left_out=$(grep -o 'TPRPC_NO_[A-Z0-9_]*' "$header" | sort -u)
all=
for macro in $left_out; do
    all="$all -D$macro"
    case $macro in *_TCP | *_SHM | *_XTH | *_CMA | *_THREADS) continue ;; esac       # those are run, below
    check "without: $macro" compiles gcc c99 -D$macro "$implement" "$include"
done
check "without: all" compiles gcc c99 "$all" "$implement" "$include"
for compiler in $compilers; do
    check "without: all $compiler c++17" compiles $compiler c++17 "$all" "$implement" "$include"
done
for macro in TCP SHM XTH CMA BULK MPT THREADS DLOPEN FILES GETENV; do
    check "can be left out: $macro" grep -qw "TPRPC_NO_$macro" "$header"
done
check "symbols without threads" leaves_none -DTPRPC_NO_THREADS '(pthread|thrd|mtx|cnd|tss)_.*'
check "symbols without dlopen" leaves_none -DTPRPC_NO_DLOPEN 'dl(m?open|v?sym|close|error|addr1?|info|_iterate_phdr)'
# What takes a path, or a file's own ways; fstat and ftruncate serve memory, too.
opening='(__)?(open|openat|creat|fopen|freopen|tmpfile|mkostemps?|mkstemps?)(64)?(_2)?|openat2|fdopen|opendir'
naming='mkdtemp|mkdir(at)?|(un)?link(at)?|rename(at|at2)?|l?stat(64)?|access|readlink(at)?|truncate(64)?|remove'
check "symbols without files" leaves_none -DTPRPC_NO_FILES "$opening|$naming|realpath|flock|lockf(64)?"
check "no trace without files" no_trace
check "symbols without getenv" leaves_none -DTPRPC_NO_GETENV '(__)?(secure_)?getenv|(__)?environ'

# What can be added. The header of PMIx is not ours: no warning of its own counts.
pmix=
for folder in /usr/include /usr/local/include /usr/lib/*/pmix2/include; do
    [ ! -f "$folder/pmix.h" ] || pmix="-DTPRPC_WITH_PMIX -idirafter $folder"
done
if [ -n "$pmix" ]; then
    for compiler in $compilers; do
        for std in c99 c++11 c++20; do
            check "with: TPRPC_WITH_PMIX $compiler $std" compiles $compiler $std "$pmix" "$implement" "$include"
        done
    done
    check "with: TPRPC_WITH_PMIX, symbols" leaves_none "$pmix" 'PMIx_.*'
    check "with: TPRPC_WITH_PMIX, symbols without dlopen" leaves_none "$pmix -DTPRPC_NO_DLOPEN" 'PMIx_.*|dl(open|sym|error)'
    check "with: TPRPC_WITH_PMIX, without: all" compiles gcc c99 "$pmix$all" "$implement" "$include"
else
    skip compile_pmix 'pmix.h is missing'
fi

check "two copies, hidden" vendored -fvisibility=hidden -fvisibility=hidden
check "two copies, static" vendored -DTPRPC_STATIC -DTPRPC_STATIC
check "two copies, one of each" vendored -DTPRPC_STATIC -fvisibility=hidden
check "runs without TCP" left_out_runs -DTPRPC_NO_TCP shm://
check "runs without SHM" left_out_runs -DTPRPC_NO_SHM tcp://127.0.0.1:0
check "runs without XTH" left_out_runs -DTPRPC_NO_XTH tcp://127.0.0.1:0 shm://
check "runs without CMA" left_out_runs -DTPRPC_NO_CMA tcp://127.0.0.1:0 shm://
check "runs without BULK, MPT" left_out_runs '-DTPRPC_NO_BULK -DTPRPC_NO_MPT' tcp://127.0.0.1:0 shm://
check "runs without THREADS" left_out_runs -DTPRPC_NO_THREADS tcp://127.0.0.1:0 shm://
check "runs without TCP, SHM" left_out_runs '-DTPRPC_NO_TCP -DTPRPC_NO_SHM'
check "runs without: all but TCP" left_out_runs "$(echo "$all" | sed 's/-DTPRPC_NO_TCP//')" tcp://127.0.0.1:0
check "log level 0" log_level 0
check "log level 4" log_level 4
for what in nothing version context_desc agent_desc; do check "header and library differ: $what" mismatch $what; done

if has aarch64-linux-gnu-gcc; then
    check "implementation aarch64" compiles aarch64-linux-gnu-gcc c99 -O2 "$implement" "$include"
    check "declarations aarch64" compiles aarch64-linux-gnu-gcc c11 '' "$include" "$use"
else
    skip compile_aarch64 'aarch64-linux-gnu-gcc is missing'
fi

# The time is taken alone, before the others start, and is a report: other machines have other clocks.
if wanted "optimised gcc c99" "$@"; then
    check "optimised gcc c99" said_nothing "$work/timed"
    begin=$(date +%s%N)
    (mkdir "$work/timed" && cd "$work/timed" && compiles gcc c99 -O2 "$implement" "$include" >said && : >good)
    echo "the implementation compiles in $((($(date +%s%N) - begin) / 1000000)) ms at -O2 ($(gcc -dumpfullversion))"
fi

find "$work" -type f -name '[0-9][0-9][0-9]' | sort | xargs -P "$(nproc)" -n 1 "$0" --job
passed=$(find "$work" -name '*.ok' | wc -l)
if [ "$skipped" -gt 0 ]; then echo "$passed passed, $((count - passed)) failed, $skipped skipped"
else echo "$passed passed, $((count - passed)) failed"; fi
[ "$count" -eq "$passed" ]
