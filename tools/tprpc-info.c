// tprpc-info: what this machine has for tprpc: every transport and channel, whether it can be used and why not, its
// GPUs and which of them reach each other, and the limits that matter, with advice where one is low.  tprpc-info --help
// tells the options.

#define TPRPC_IMPLEMENTATION
#define TPRPC_CUDA_IMPLEMENTATION
#include "../tprpc_cuda.h"

#include <dlfcn.h>
#include <inttypes.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>

static const char info_usage[] =
    "usage: tprpc-info [--json]\n"
    "  --json           one JSON object instead of tables\n";

enum { INFO_BACKENDS = 64, INFO_GPUS = 64 };

// ---- limits ---------------------------------------------------------------------------------------------------------

typedef struct info_limit {
    const char *name, *unit;
    int64_t     value;                   // -1: none, or it cannot be told; `text` says which
    const char *text;
    char        advice[200];             // "" where it does
} info_limit;

static void info_advise(info_limit *limit, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void info_advise(info_limit *limit, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(limit->advice, sizeof limit->advice, format, arguments);
    va_end(arguments);
}

// The first number in a file. False: no such file, or it begins with something else ("max").
static bool info_number(const char *path, int64_t *out) {
    FILE *file = fopen(path, "r");
    const bool found = file && fscanf(file, "%" SCNd64, out) == 1;
    if (file) fclose(file);
    return found;
}

static int64_t info_resource(int which) {
    struct rlimit limit;
    if (getrlimit(which, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY || limit.rlim_cur > INT64_MAX) return -1;
    return (int64_t)limit.rlim_cur;
}

static info_limit info_descriptors(void) {
    info_limit limit = {.name = "open files", .unit = "", .value = info_resource(RLIMIT_NOFILE), .text = "unlimited"};
    if (limit.value >= 0 && limit.value < 16384)
        info_advise(&limit, "enough for about %" PRId64 " pipes; for more: ulimit -n 65536, or setrlimit in the program",
                    limit.value * 9 / 10);
    return limit;
}

static info_limit info_mappings(void) {
    info_limit limit = {.name = "mappings", .unit = "", .value = -1, .text = "not told by this system"};
    info_number("/proc/sys/vm/max_map_count", &limit.value);
    if (limit.value >= 0 && limit.value < 16384)
        info_advise(&limit, "a pipe over shm takes one; for more: sysctl vm.max_map_count=65530");
    return limit;
}

static info_limit info_locked(void) {
    info_limit limit = {.name = "locked memory", .unit = "bytes", .value = info_resource(RLIMIT_MEMLOCK),
                        .text = "unlimited"};
    return limit;                        // nothing in this version locks any
}

static info_limit info_ptrace(void) {
    info_limit limit = {.name = "ptrace scope", .unit = "", .value = -1, .text = "none: not restricted by Yama"};
    info_number("/proc/sys/kernel/yama/ptrace_scope", &limit.value);
    if (limit.value == 1)
        info_advise(&limit, "cma needs tprpc_context_desc.let_read in the processes that send, or "
                            "sysctl kernel.yama.ptrace_scope=0");
    if (limit.value == 2) info_advise(&limit, "cma is for root alone; for all: sysctl kernel.yama.ptrace_scope=0");
    if (limit.value == 3) info_advise(&limit, "cma is for nobody, until the system is started anew");
    return limit;
}

// What the control group of this process leaves, by version 2's files; INT64_MAX: it sets no limit.
static int64_t info_group_memory(void) {
    char line[512], path[600];
    int64_t most = 0, used = 0, left = INT64_MAX;
    FILE *file = fopen("/proc/self/cgroup", "r");
    while (file && fgets(line, sizeof line, file)) {
        if (strncmp(line, "0::", 3) != 0) continue;
        line[strcspn(line, "\n")] = 0;
        for (char *group = line + 3; ; *strrchr(group, '/') = 0) {   // it and all above it
            snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.max", group);
            const bool limited = info_number(path, &most);
            snprintf(path, sizeof path, "/sys/fs/cgroup%s/memory.current", group);
            if (limited && info_number(path, &used) && most - used < left) left = most - used;
            if (!strrchr(group, '/')) break;
        }
    }
    if (file) fclose(file);
    return left;
}

static int64_t info_free_memory(void) {
    char line[128];
    int64_t kib = -1;
    FILE *file = fopen("/proc/meminfo", "r");
    while (file && kib < 0 && fgets(line, sizeof line, file)) sscanf(line, "MemAvailable: %" SCNd64, &kib);
    if (file) fclose(file);
    return kib < 0 ? -1 : kib * 1024;
}

static info_limit info_shared_memory(void) {
    info_limit limit = {.name = "memory to share", .unit = "bytes", .value = info_free_memory(),
                        .text = "not told by this system"};
    const int64_t group = info_group_memory();
    const bool grouped = group < INT64_MAX && (limit.value < 0 || group < limit.value);
    if (grouped) limit.value = group;
    if (limit.value >= 0 && limit.value < INT64_C(64) << 20)
        info_advise(&limit, "a pipe over shm takes about half a MiB; %s",
                    grouped ? "raise memory.max of this control group" : "the machine has hardly any memory left");
    return limit;
}

static info_limit info_cores(void) {
    info_limit limit = {.name = "processors", .unit = "", .value = -1, .text = "not told by this system"};
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) == 0) limit.value = CPU_COUNT(&set);
    if (limit.value == 1)
        info_advise(&limit, "two ends that spin take turns on it: spin_us = TPRPC_NOW in tprpc_context_desc");
    return limit;
}

// ---- GPUs -----------------------------------------------------------------------------------------------------------

typedef struct info_gpus {
    tprpc_cuda_device all[INFO_GPUS];
    size_t            count;
    tprpc_error       error;             // why there are none
    bool              shown;             // their memory to other processes: cuda_ipc can be used
    bool              stand_in;          // the driver is that of the tests
} info_gpus;

static void info_find_gpus(info_gpus *gpus, const tprpc_backend_info *backends, size_t count) {
    memset(gpus, 0, sizeof *gpus);
    gpus->count = tprpc_cuda_get_devices(gpus->all, INFO_GPUS, sizeof *gpus->all, &gpus->error);
    if (gpus->count > INFO_GPUS) gpus->count = INFO_GPUS;
    for (size_t i = 0; i < count; i++)
        if (strcmp(backends[i].name, "cuda_ipc") == 0) gpus->shown = backends[i].viable;
    void *driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    gpus->stand_in = driver && dlsym(driver, "standin_count");
    if (driver) dlclose(driver);
}

// As the driver's own tools write it: "GPU-" and the digits in groups.
static const char *info_uuid(const tprpc_cuda_device *gpu, char out[48]) {
    int used = snprintf(out, 48, "GPU-");
    for (int i = 0; i < 16; i++)
        used += snprintf(out + used, 48 - (size_t)used, "%s%02x", i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "",
                         (unsigned)gpu->uuid[i]);
    return out;
}

static bool info_reaches(const tprpc_cuda_device *gpu, size_t other) { return (gpu->peers >> other & 1) != 0; }

// ---- output ---------------------------------------------------------------------------------------------------------

static const char *const info_groups[] = {"", "transports", "channels"};   // by kind

static int info_first_larger(const void *a, const void *b) {
    const int32_t left = ((const tprpc_backend_info *)a)->priority, right = ((const tprpc_backend_info *)b)->priority;
    return (left < right) - (left > right);
}

// A domain as text: as it is where it can be read, else in hexadecimal digits.
static const char *info_domain(const tprpc_backend_info *info, char *out, size_t size) {
    bool readable = true;
    size_t used = 0;
    for (uint32_t i = 0; i < info->domain_size; i++)
        readable = readable && info->domain[i] >= ' ' && info->domain[i] <= '~';
    out[0] = 0;
    for (uint32_t i = 0; i < info->domain_size && used < size; i++)
        used += (size_t)snprintf(out + used, size - used, readable ? "%c" : "%02x", info->domain[i]);
    return out;
}

static void info_json_string(const char *key, const char *text, const char *after) {
    printf("\"%s\": \"", key);
    for (; *text; text++) {
        if (*text == '"' || *text == '\\') printf("\\%c", *text);
        else if ((unsigned char)*text < ' ') printf("\\u%04x", (unsigned)*text);
        else putchar(*text);
    }
    printf("\"%s", after);
}

static void info_json_gpus(const info_gpus *gpus) {
    char uuid[48];
    printf("\"gpus\": [");
    for (size_t i = 0; i < gpus->count; i++) {
        const tprpc_cuda_device *gpu = &gpus->all[i];
        const char *between = "";
        printf("%s{\"index\": %d, ", i ? ", " : "", (int)gpu->index);
        info_json_string("name", gpu->name, ", ");
        info_json_string("uuid", info_uuid(gpu, uuid), ", ");
        info_json_string("pci", gpu->pci, ", ");
        printf("\"compute\": \"%d.%d\", \"memory\": %" PRIu64 ", \"ipc\": %s, \"peers\": [", (int)gpu->major,
               (int)gpu->minor, gpu->memory_bytes, gpus->shown ? "true" : "false");
        for (size_t other = 0; other < gpus->count; other++) {
            if (other == i || !info_reaches(gpu, other)) continue;
            printf("%s%zu", between, other);
            between = ", ";
        }
        printf("]}");
    }
    printf("], ");
    info_json_string("gpus_reason", gpus->count ? "" : gpus->error.text, ", ");
    printf("\"stand_in\": %s, ", gpus->stand_in ? "true" : "false");
}

static void info_print_json(const tprpc_backend_info *all, size_t count, const info_gpus *gpus,
                            const info_limit *limits, size_t limit_count) {
    char domain[2 * sizeof all->domain + 1];
    printf("{\"version\": %d, ", (int)tprpc_version());
    for (int kind = TPRPC_BACKEND_TRANSPORT; kind <= TPRPC_BACKEND_CHANNEL; kind++) {
        const char *between = "";
        printf("\"%s\": [", info_groups[kind]);
        for (size_t i = 0; i < count; i++) {
            if (all[i].kind != kind) continue;
            printf("%s{", between);
            info_json_string("name", all[i].name, ", ");
            printf("\"viable\": %s, ", all[i].viable ? "true" : "false");
            info_json_string("reason", all[i].why, ", ");
            printf("\"priority\": %d, ", (int)all[i].priority);
            info_json_string("domain", info_domain(&all[i], domain, sizeof domain), ", ");
            info_json_string("summary", all[i].summary, "}");
            between = ", ";
        }
        printf("], ");
    }
    info_json_gpus(gpus);
    printf("\"limits\": [");
    for (size_t i = 0; i < limit_count; i++) {
        printf("%s{", i ? ", " : "");
        info_json_string("name", limits[i].name, ", ");
        if (limits[i].value < 0) printf("\"value\": null, ");
        else printf("\"value\": %" PRId64 ", ", limits[i].value);
        info_json_string("advice", limits[i].advice, "}");
    }
    printf("]}\n");
}

static void info_print_gpus(const info_gpus *gpus) {
    char uuid[48];
    printf("\nGPUs%s\n", gpus->stand_in ? ", of the tests' stand-in driver: none of them is real" : "");
    if (!gpus->count) printf("  %-15s %s\n", "none", gpus->error.text);
    for (size_t i = 0; i < gpus->count; i++) {
        const tprpc_cuda_device *gpu = &gpus->all[i];
        printf("  cuda:%-10d %s, %" PRIu64 " MiB, compute capability %d.%d\n", (int)gpu->index, gpu->name,
               gpu->memory_bytes >> 20, (int)gpu->major, (int)gpu->minor);
        printf("  %15s %s, PCI %s\n", "", info_uuid(gpu, uuid), gpu->pci);
        printf("  %15s reaches", "");
        for (size_t other = 0; other < gpus->count; other++)
            if (other != i && info_reaches(gpu, other)) printf(" cuda:%d", (int)gpus->all[other].index);
        printf("%s; %s\n", gpu->peers & ~(UINT64_C(1) << i) ? "" : " no other",
               gpus->shown ? "other processes can open its memory" : "no other process can open its memory");
    }
}

static void info_print(const tprpc_backend_info *all, size_t count, const info_gpus *gpus, const info_limit *limits,
                       size_t limit_count) {
    struct utsname name = {.sysname = ""};
    char domain[2 * sizeof all->domain + 1];
    uname(&name);
    printf("tprpc %d on %s %s, %s\n", (int)tprpc_version(), name.sysname, name.release, name.machine);
    for (int kind = TPRPC_BACKEND_TRANSPORT; kind <= TPRPC_BACKEND_CHANNEL; kind++) {
        printf("\n%s, the first that both ends can use\n", info_groups[kind]);
        for (size_t i = 0; i < count; i++) {
            if (all[i].kind != kind) continue;
            printf("  %-15s %5d  %s\n", all[i].name, (int)all[i].priority, all[i].summary);
            if (!all[i].viable) printf("  %23s NOT HERE: %s\n", "", all[i].why);
            else if (all[i].domain_size) printf("  %23s within %s\n", "", info_domain(&all[i], domain, sizeof domain));
        }
    }
    info_print_gpus(gpus);
    printf("\nlimits\n");
    for (size_t i = 0; i < limit_count; i++) {
        if (limits[i].value < 0) printf("  %-15s %s\n", limits[i].name, limits[i].text);
        else printf("  %-15s %" PRId64 " %s\n", limits[i].name, limits[i].value, limits[i].unit);
        if (limits[i].advice[0]) printf("  %15s LOW: %s\n", "", limits[i].advice);
    }
}

int main(int argc, char **argv) {
    bool json = false;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--json") == 0) {
            json = true;
        } else if (strcmp(argv[i], "--help") == 0) {
            fputs(info_usage, stdout);
            return 0;
        } else {
            fprintf(stderr, "tprpc-info: there is no option %s; --help tells them.\n", argv[i]);
            return 2;
        }
    }
    tprpc_backend_info all[INFO_BACKENDS];
    tprpc_error error = {.status = TPRPC_OK};
    tprpc_context *ctx = NULL;
    tprpc_context_desc desc = {.backends = NULL};
    static info_gpus gpus;
    desc.backends = tprpc_cuda_backends(&desc.backend_count);
    if (tprpc_context_create(&desc, &ctx, &error) != TPRPC_OK) {
        fprintf(stderr, "tprpc-info: %s\n", error.text);
        return 1;
    }
    size_t count = tprpc_context_get_backends(ctx, all, INFO_BACKENDS, sizeof *all);
    if (count > INFO_BACKENDS) count = INFO_BACKENDS;
    qsort(all, count, sizeof *all, info_first_larger);
    const info_limit limits[] = {info_cores(),  info_descriptors(), info_mappings(), info_shared_memory(),
                                 info_locked(), info_ptrace()};
    info_find_gpus(&gpus, all, count);
    if (json) info_print_json(all, count, &gpus, limits, sizeof limits / sizeof *limits);
    else info_print(all, count, &gpus, limits, sizeof limits / sizeof *limits);
    tprpc_context_destroy(ctx);
    return 0;
}
