/* A small test harness: one header, one program per test file, nothing but libc and POSIX.

       #include "harness.h"                      first, for it asks for _GNU_SOURCE
       TEST(adds) { CHECK_EQ_INT(1 + 1, 2); }

   TEST registers itself, and main stands below. Each test runs in a process of its own, which leads a process group, so
   a crash, a hang or a process left behind costs that one test. Its output is kept in a file and shown when it fails.

       build/tests/x [-v] [-l] [filter...]       -v: show output as it comes. -l: list. A filter is a part of a name

   A test gives back what it takes: it waits for its children (test_wait_child), and where the address sanitizer runs,
   it and the children it made by test_fork_run leak nothing. */
#ifndef TPRPC_TESTS_HARNESS_H
#define TPRPC_TESTS_HARNESS_H

#ifndef _GNU_SOURCE
#ifdef _FEATURES_H
#error "include harness.h before every other header, or compile with -D_GNU_SOURCE"
#endif
#define _GNU_SOURCE 1
#endif

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#endif

#ifdef __cplusplus
#define HARNESS_CAST(type, value) static_cast<type>(value)
#define HARNESS_C extern "C"
#else
#define HARNESS_CAST(type, value) ((type)(value))
#define HARNESS_C
#endif

/* TEST_ASAN and TEST_TSAN are 1 under that sanitizer, and TEST_SLOWDOWN is by how much time limits grow for it: a test
   that counts to a million may count to a million / TEST_SLOWDOWN. */
#if defined(__SANITIZE_ADDRESS__)
#define TEST_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define TEST_ASAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TEST_TSAN 1
#endif
#endif
#ifndef TEST_ASAN
#define TEST_ASAN 0
#endif
#ifndef TEST_TSAN
#define TEST_TSAN 0
#endif
#define TEST_SLOWDOWN (TEST_TSAN ? 5 : TEST_ASAN ? 3 : 1)

/* ---- what a test is written with ------------------------------------------------------------------------- */

#define TEST(name) TEST_LIMIT(name, 60)
#define TEST_LIMIT(name, seconds)                                                                       \
    static void harness_run_##name(__attribute__((unused)) void *test_arg);                             \
    static harness_test harness_test_##name = {#name, harness_run_##name, NULL, seconds, NULL};         \
    __attribute__((constructor)) static void harness_add_##name(void) { harness_add(&harness_test_##name); } \
    static void harness_run_##name(__attribute__((unused)) void *test_arg)

/* TESTS(name) { for (...) test_add("name", run, arg, seconds); } for tests that are known at run time alone. */
#define TESTS(name) __attribute__((constructor)) static void harness_tests_##name(void)

/* A CHECK that fails is reported, fails the test and goes on; its value is whether it held. A REQUIRE ends the process.
   Arguments are evaluated once. All of them may be used on any thread and in children. */
#define CHECK(cond) harness_check((cond) ? 1 : 0, __FILE__, __LINE__, #cond)
#define CHECK_EQ_INT(a, b) HARNESS_INT(harness_eq_int, a, b, #a, #b)
#define CHECK_LE_INT(a, b) HARNESS_INT(harness_le_int, a, b, #a, #b)
#define CHECK_STR(a, b) harness_str(a, b, __FILE__, __LINE__, #a, #b)
#define CHECK_CONTAINS(text, part) harness_contains(text, part, __FILE__, __LINE__, #text)
#define CHECK_MEM(a, b, size) harness_mem(a, b, size, __FILE__, __LINE__, #a, #b)

#define REQUIRE(cond) harness_require(harness_check((cond) ? 1 : 0, __FILE__, __LINE__, #cond))
#define REQUIRE_EQ_INT(a, b) harness_require(HARNESS_INT(harness_eq_int, a, b, #a, #b))
#define REQUIRE_LE_INT(a, b) harness_require(HARNESS_INT(harness_le_int, a, b, #a, #b))
#define REQUIRE_STR(a, b) harness_require(harness_str(a, b, __FILE__, __LINE__, #a, #b))
#define REQUIRE_CONTAINS(text, part) harness_require(harness_contains(text, part, __FILE__, __LINE__, #text))
#define REQUIRE_MEM(a, b, size) harness_require(harness_mem(a, b, size, __FILE__, __LINE__, #a, #b))

#define HARNESS_INT(compare, a, b, a_text, b_text) \
    compare(HARNESS_CAST(long long, a), HARNESS_CAST(long long, b), __FILE__, __LINE__, a_text, b_text)

/* Ends the test as skipped: it cannot run here. tests/README.md has to list it. Not after a failed CHECK. */
#define SKIP(reason) harness_skip(reason)

/* ---- state ----------------------------------------------------------------------------------------------- */

typedef struct harness_test {
    const char *name;
    void (*run)(void *arg);
    void *arg;
    double limit_s;
    struct harness_test *next;
} harness_test;

/* In memory that all processes of a test share: a failure in a child counts even when its parent does not look. */
typedef struct harness_shared {
    int failures;
    int finished;           /* the test came to an end that the harness knows of */
    int skipped;
    char reason[200];
} harness_shared;

static harness_test *harness_first, **harness_last = &harness_first;
static harness_shared *harness_common;
static int harness_failures;            /* of this process */
static char harness_folder[200];        /* for test_temp_path; removed when the test has ended */
static sigset_t harness_signals;        /* what the harness waits for; blocked in it, not in tests */
static sigset_t harness_signals_before;

static inline void harness_add(harness_test *test) {
    *harness_last = test;
    harness_last = &test->next;
}

/* ---- checks ---------------------------------------------------------------------------------------------- */

/* One write per failure, so that those of several threads and processes do not mix. */
__attribute__((format(printf, 3, 4)))
static inline int harness_fail(const char *file, int line, const char *format, ...) {
    char text[1000];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    fprintf(stderr, "%s:%d: %s\n", file, line, text);
    __sync_fetch_and_add(&harness_common->failures, 1);
    __sync_fetch_and_add(&harness_failures, 1);
    return 0;
}

static inline int harness_check(int held, const char *file, int line, const char *text) {
    return held || harness_fail(file, line, "failed: %s", text);
}

static inline int harness_eq_int(long long a, long long b, const char *file, int line, const char *a_text,
                                 const char *b_text) {
    return a == b || harness_fail(file, line, "%s is %lld, expected %s, which is %lld", a_text, a, b_text, b);
}

static inline int harness_le_int(long long a, long long b, const char *file, int line, const char *a_text,
                                 const char *b_text) {
    return a <= b || harness_fail(file, line, "%s is %lld, expected at most %s, which is %lld", a_text, a, b_text, b);
}

static inline int harness_str(const char *a, const char *b, const char *file, int line, const char *a_text,
                              const char *b_text) {
    if (a == b || (a && b && strcmp(a, b) == 0)) return 1;
    return harness_fail(file, line, "%s is \"%s\", expected %s, which is \"%s\"", a_text, a ? a : "(NULL)", b_text,
                        b ? b : "(NULL)");
}

static inline int harness_contains(const char *text, const char *part, const char *file, int line,
                                   const char *text_text) {
    if (text && strstr(text, part)) return 1;
    return harness_fail(file, line, "%s is \"%s\", expected \"%s\" in it", text_text, text ? text : "(NULL)", part);
}

static inline int harness_mem(const void *a, const void *b, size_t size, const char *file, int line, const char *a_text,
                              const char *b_text) {
    const unsigned char *x = HARNESS_CAST(const unsigned char *, a), *y = HARNESS_CAST(const unsigned char *, b);
    size_t i = 0;
    if (size == 0) return 1;
    if (!a || !b) return a == b || harness_fail(file, line, "%s is %p, %s is %p", a_text, a, b_text, b);
    if (memcmp(a, b, size) == 0) return 1;   /* the sanitizers look at it once, not at each byte */
    while (i < size - 1 && x[i] == y[i]) i++;
    return harness_fail(file, line, "%s and %s differ at byte %llu of %llu: 0x%02x and 0x%02x", a_text, b_text,
                        HARNESS_CAST(unsigned long long, i), HARNESS_CAST(unsigned long long, size), x[i], y[i]);
}

/* _exit, for other threads may still run, and what they hold is no leak to be reported. */
static inline void harness_require(int held) {
    if (held) return;
    __sync_lock_test_and_set(&harness_common->finished, 1);
    fflush(NULL);
    _exit(1);
}

static inline void harness_skip(const char *reason) {
    snprintf(harness_common->reason, sizeof harness_common->reason, "%s", reason);
    harness_common->reason[strcspn(harness_common->reason, "\n")] = 0;
    __sync_lock_test_and_set(&harness_common->skipped, 1);
    __sync_lock_test_and_set(&harness_common->finished, 1);
    fflush(NULL);
    _exit(0);
}

/* ---- helpers --------------------------------------------------------------------------------------------- */

static inline int64_t test_now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return HARNESS_CAST(int64_t, now.tv_sec) * 1000000 + now.tv_nsec / 1000;
}

static inline void test_sleep_us(int64_t us) {
    struct timespec left;
    left.tv_sec = HARNESS_CAST(time_t, us / 1000000);
    left.tv_nsec = HARNESS_CAST(long, us % 1000000 * 1000);
    while (nanosleep(&left, &left) != 0 && errno == EINTR) {}
}

/* A path where nothing is yet, in a folder that goes away with the test. */
static inline const char *test_temp_path(char *buffer, size_t size) {
    static int count;
    snprintf(buffer, size, "%s/%d.%d", harness_folder, HARNESS_CAST(int, getpid()), __sync_add_and_fetch(&count, 1));
    return buffer;
}

/* Entries of a folder, -1 where it cannot be read. */
static inline int harness_count_entries(const char *path) {
    DIR *dir = opendir(path);
    struct dirent *entry;
    int count = 0;
    if (!dir) return -1;
    while ((entry = readdir(dir)) != NULL) count += entry->d_name[0] != '.';
    closedir(dir);
    return count;
}

/* Open descriptors and threads of this process, to compare before and after. */
static inline int test_count_fds(void) { return harness_count_entries("/proc/self/fd") - 1; }
static inline int test_count_threads(void) { return harness_count_entries("/proc/self/task"); }

/* Lines of a file with `part` in them; "": all. */
static inline int test_count_lines(const char *path, const char *part) {
    char line[1000];
    int count = 0;
    FILE *file = fopen(path, "r");
    if (!file) harness_require(harness_fail(__FILE__, __LINE__, "%s: %s", path, strerror(errno)));
    while (fgets(line, sizeof line, file)) count += strstr(line, part) != NULL;
    fclose(file);
    return count;
}

/* Shared memory that is mapped. */
static inline int test_count_shared(void) { return test_count_lines("/proc/self/maps", "/memfd:"); }

/* Random numbers, splitmix64's: the next one from a state that is any number, and that of a single number. */
static inline uint64_t test_random(uint64_t *state) {
    uint64_t z = *state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}
static inline uint64_t test_mix(uint64_t number) { return test_random(&number); }

#if TEST_ASAN
HARNESS_C int __lsan_do_recoverable_leak_check(void);
#endif

/* Runs fn(arg) in a child, which ends by _exit with the number of checks that failed in it. What other threads of the
   parent hold looks like leaks to the child, so those are looked for only where the parent had one thread. */
static inline pid_t test_fork_run(void (*fn)(void *arg), void *arg) {
    int threads = test_count_threads();
    pid_t pid;
    fflush(NULL);
    pid = fork();
    if (pid < 0) harness_require(harness_fail(__FILE__, __LINE__, "fork: %s", strerror(errno)));
    if (pid != 0) return pid;
    harness_failures = 0;
    fn(arg);
#if TEST_ASAN
    if (threads == 1 && __lsan_do_recoverable_leak_check()) harness_fail(__FILE__, __LINE__, "leaked (in a child)");
#else
    (void)threads;
#endif
    fflush(NULL);
    _exit(harness_failures > 100 ? 100 : harness_failures);
}

/* Waits for a child and gives its exit status (of test_fork_run: the number of failed checks), 128 + the signal that
   ended it, or -1 when it still ran after that time (it is killed then). CHECK_EQ_INT(test_wait_child(pid, 10), 0) */
static inline int test_wait_child(pid_t pid, double seconds) {
    int64_t deadline = test_now_us() + HARNESS_CAST(int64_t, seconds * 1e6) * TEST_SLOWDOWN;
    int64_t pause_us = 100;
    int status = 0;
    for (;;) {
        pid_t got = waitpid(pid, &status, WNOHANG);
        if (got == pid) break;
        if (got < 0 && errno != EINTR) {
            harness_fail(__FILE__, __LINE__, "waitpid(%d): %s", HARNESS_CAST(int, pid), strerror(errno));
            return -1;
        }
        if (test_now_us() > deadline) {
            fprintf(stderr, "child %d: still runs after %g s, killed\n", HARNESS_CAST(int, pid), seconds);
            kill(pid, SIGKILL);
            waitpid(pid, &status, 0);
            return -1;
        }
        test_sleep_us(pause_us);
        if (pause_us < 2000) pause_us *= 2;
    }
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

/* Adds a test at run time, within TESTS. */
static inline void test_add(const char *name, void (*run)(void *arg), void *arg, double limit_s) {
    harness_test *test = HARNESS_CAST(harness_test *, calloc(1, sizeof(harness_test)));
    if (!test) abort();
    test->name = strdup(name);
    test->run = run;
    test->arg = arg;
    test->limit_s = limit_s;
    harness_add(test);
}

/* ---- running --------------------------------------------------------------------------------------------- */

static inline int harness_remove(const char *path, const struct stat *info, int type, struct FTW *walk) {
    (void)info; (void)type; (void)walk;
    return remove(path);
}

static inline void harness_remove_folder(void) {
    if (harness_folder[0]) nftw(harness_folder, harness_remove, 16, FTW_DEPTH | FTW_PHYS);
    harness_folder[0] = 0;
}

/* The test's own process. */
__attribute__((noreturn))
static inline void harness_child(const harness_test *test, FILE *output) {
    struct rlimit no_core = {0, 0};
    int null = open("/dev/null", O_RDONLY);
    setpgid(0, 0);
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);        /* should the harness itself be killed */
#endif
    setrlimit(RLIMIT_CORE, &no_core);        /* some tests crash children by the hundred */
    sigprocmask(SIG_SETMASK, &harness_signals_before, NULL);
    if (null >= 0) { dup2(null, 0); close(null); }
    if (output) { dup2(fileno(output), 1); dup2(fileno(output), 2); fclose(output); }
    setvbuf(stdout, NULL, _IOLBF, 0);        /* in order with stderr, and there after a crash */
    test->run(test->arg);
    __sync_lock_test_and_set(&harness_common->finished, 1);
    exit(harness_failures ? 1 : 0);
}

/* Whether the process ended within its time. A signal that wants to end the harness ends the test first. */
static inline int harness_wait(pid_t pid, double limit_s, int *status) {
    int64_t deadline = test_now_us() + HARNESS_CAST(int64_t, limit_s * 1e6);
    for (;;) {
        struct timespec pause;
        int64_t left = deadline - test_now_us();
        int caught;
        if (waitpid(pid, status, WNOHANG) == pid) return 1;
        if (left <= 0) return 0;
        pause.tv_sec = HARNESS_CAST(time_t, left / 1000000);
        pause.tv_nsec = HARNESS_CAST(long, left % 1000000 * 1000);
        caught = sigtimedwait(&harness_signals, NULL, &pause);
        if (caught > 0 && caught != SIGCHLD) {
            kill(-pid, SIGKILL);
            harness_remove_folder();
            signal(caught, SIG_DFL);
            sigprocmask(SIG_SETMASK, &harness_signals_before, NULL);
            raise(caught);
        }
    }
}

/* Kills what is left of the group; whether something was. Orphans come to the harness (a subreaper), also dead ones
   that the test did not wait for, so that this does not depend on who is quicker. */
static inline int harness_end_group(pid_t group) {
    int left = kill(-group, SIGKILL) == 0;
    while (waitpid(-group, NULL, 0) > 0) left = 1;
    return left;
}

/* Shows the end of what a test printed. */
static inline void harness_show(FILE *output) {
    const long most = 64 * 1024;
    char line[2000];
    long size;
    fseek(output, 0, SEEK_END);
    size = ftell(output);
    fseek(output, size > most ? size - most : 0, SEEK_SET);
    if (size > most) printf("    | ... (%ld bytes cut)\n", size - most);
    while (fgets(line, HARNESS_CAST(int, sizeof line), output))
        printf("    | %s%s", line, strchr(line, '\n') ? "" : "\n");
}

/* Why the test failed, in `why`; empty: it did not. */
static inline void harness_judge(char *why, size_t size, int in_time, double limit_s, int status, int left) {
    why[0] = 0;
    if (!in_time) snprintf(why, size, "killed at its limit of %g s", limit_s);
    else if (WIFSIGNALED(status)) snprintf(why, size, "signal %d, %s", WTERMSIG(status), strsignal(WTERMSIG(status)));
    else if (harness_common->failures) snprintf(why, size, "%d failed check(s)", harness_common->failures);
    else if (WEXITSTATUS(status)) snprintf(why, size, "exit status %d", WEXITSTATUS(status));
    else if (!harness_common->finished) snprintf(why, size, "exit was called before the test's end");
    else if (left) snprintf(why, size, "left a process behind");
}

enum { HARNESS_PASSED, HARNESS_FAILED, HARNESS_SKIPPED };

static inline int harness_run_test(const harness_test *test, int verbose) {
    const char *tmp = getenv("TMPDIR"), *scale = getenv("TEST_LIMIT_SCALE");
    double limit_s = test->limit_s * TEST_SLOWDOWN * (scale ? atof(scale) : 1), seconds;
    FILE *output = verbose ? NULL : tmpfile();
    int64_t begin = test_now_us();
    int status = 0, in_time, left;
    char why[200];
    pid_t pid;

    memset(harness_common, 0, sizeof *harness_common);
    snprintf(harness_folder, sizeof harness_folder, "%s/tprpc-test.XXXXXX", tmp && tmp[0] ? tmp : "/tmp");
    fflush(NULL);
    if ((!verbose && !output) || !mkdtemp(harness_folder) || (pid = fork()) < 0) { perror("harness"); exit(2); }
    if (pid == 0) harness_child(test, output);
    setpgid(pid, pid);                       /* here too: whoever is first */
    in_time = harness_wait(pid, limit_s, &status);
    left = harness_end_group(pid);
    harness_remove_folder();

    seconds = HARNESS_CAST(double, test_now_us() - begin) / 1e6;
    harness_judge(why, sizeof why, in_time, limit_s, status, left);
    if (why[0]) {
        printf("FAIL %s %.3f s: %s\n", test->name, seconds, why);
        if (output) harness_show(output);
    } else if (harness_common->skipped) {
        printf("SKIP %s: %s\n", test->name, harness_common->reason);
    } else {
        printf("ok %s %.3f s\n", test->name, seconds);
    }
    fflush(stdout);
    if (output) fclose(output);
    return why[0] ? HARNESS_FAILED : harness_common->skipped ? HARNESS_SKIPPED : HARNESS_PASSED;
}

static inline int harness_wanted(const char *name, char **filters, int count) {
    int i;
    for (i = 0; i < count; i++)
        if (strstr(name, filters[i])) return 1;
    return count == 0;
}

/* Signals are blocked for good, so that none is missed between a look and a wait. Inherited descriptors are closed, so
   that a test which counts or exhausts them finds the same everywhere. */
static inline void harness_prepare(void) {
    int fd;
    void *memory = mmap(NULL, sizeof(harness_shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) { perror("mmap"); exit(2); }
    harness_common = HARNESS_CAST(harness_shared *, memory);
    signal(SIGCHLD, SIG_DFL);
    for (fd = 3; fd < 1024; fd++) close(fd);
    sigemptyset(&harness_signals);
    sigaddset(&harness_signals, SIGCHLD);
    sigaddset(&harness_signals, SIGINT);
    sigaddset(&harness_signals, SIGTERM);
    sigaddset(&harness_signals, SIGHUP);
    sigprocmask(SIG_BLOCK, &harness_signals, &harness_signals_before);
#ifdef __linux__
    prctl(PR_SET_CHILD_SUBREAPER, 1);
#endif
}

int main(int argc, char **argv) {
    int verbose = 0, list = 0, first = 1;
    int counts[3] = {0, 0, 0};
    const harness_test *test;

    for (; first < argc && argv[first][0] == '-'; first++) {
        if (strcmp(argv[first], "-v") == 0) verbose = 1;
        else if (strcmp(argv[first], "-l") == 0) list = 1;
        else { fprintf(stderr, "usage: %s [-v] [-l] [filter...]\n", argv[0]); return 2; }
    }
    harness_prepare();
    for (test = harness_first; test; test = test->next) {
        if (!harness_wanted(test->name, argv + first, argc - first)) continue;
        if (list) puts(test->name);
        else counts[harness_run_test(test, verbose)]++;
    }
    if (list) return 0;
    if (counts[HARNESS_PASSED] + counts[HARNESS_FAILED] + counts[HARNESS_SKIPPED] == 0) {
        puts("FAIL no test of that name");
        counts[HARNESS_FAILED] = 1;
    }
    printf("%d passed, %d failed", counts[HARNESS_PASSED], counts[HARNESS_FAILED]);
    if (counts[HARNESS_SKIPPED]) printf(", %d skipped", counts[HARNESS_SKIPPED]);
    puts("");
    return counts[HARNESS_FAILED] != 0;
}

/* What the sanitizers do unless the environment says otherwise. Tests fork with threads running. */
#if TEST_ASAN
HARNESS_C const char *__asan_default_options(void);
HARNESS_C const char *__asan_default_options(void) {
    return "detect_stack_use_after_return=1:allocator_may_return_null=1";
}
HARNESS_C const char *__ubsan_default_options(void);
HARNESS_C const char *__ubsan_default_options(void) { return "print_stacktrace=1"; }
#endif
#if TEST_TSAN
HARNESS_C const char *__tsan_default_options(void);
HARNESS_C const char *__tsan_default_options(void) { return "die_after_fork=0:second_deadlock_stack=1"; }
#endif

#endif
