/* num_threads.c - how many threads by default: what the environment says, else the CPUs that
 * affinity and the control groups of this process grant. */
#include "base/cpus_os.h" /* first: it asks the system for more than C11 */

#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/environment.h"
#include "base/threads.h"
#include "base/view.h"

enum { PATH = 4096 };

static atomic_int wanted; /* 0: not known yet */

/* quota microseconds in each period, as whole CPUs, rounded up; no limit unless both positive. */
static int
whole_cpus(long long quota, long long period)
{
    if (quota <= 0 || period <= 0) {
        return INT_MAX;
    }
    return (int)SA_MIN((quota - 1) / period + 1, (long long)INT_MAX);
}

static long long
read_number(const char *folder, const char *name)
{
    char path[PATH + 64];
    long long value = -1;
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        if (fscanf(file, "%lld", &value) != 1) {
            value = -1;
        }
        fclose(file);
    }
    return value;
}

static int
limit_v1(const char *folder)
{
    return whole_cpus(read_number(folder, "cpu.cfs_quota_us"),
                      read_number(folder, "cpu.cfs_period_us"));
}

/* cpu.max holds "quota period" or "max period". */
static int
limit_v2(const char *folder)
{
    char path[PATH + 64];
    long long quota = -1, period = -1;
    snprintf(path, sizeof path, "%s/cpu.max", folder);
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        if (fscanf(file, "%lld %lld", &quota, &period) != 2) {
            quota = -1;
        }
        fclose(file);
    }
    return whole_cpus(quota, period);
}

/* The least limit of root/path and of all folders above it up to root. Inside a container whose
 * groups the host named, path is not there, and root is the container's own group. */
static int
least_limit(const char *root, const char *path, int (*limit)(const char *folder))
{
    char folder[PATH];
    const size_t kept = strlen(root), added = strlen(path);
    if (kept + added >= sizeof folder) {
        return limit(root);
    }
    memcpy(folder, root, kept);
    memcpy(folder + kept, path, added + 1);
    int least = limit(root);
    for (char *slash; strlen(folder) > kept; *slash = '\0') {
        least = SA_MIN(least, limit(folder));
        slash = strrchr(folder, '/');
    }
    return least;
}

/* Whether "cpu" stands in the comma-separated list. */
static int
lists_cpu(const char *list)
{
    for (const char *at = list; at != NULL; at = strchr(at, ',')) {
        at += *at == ',';
        const size_t length = strcspn(at, ",");
        if (length == 3 && strncmp(at, "cpu", 3) == 0) {
            return 1;
        }
    }
    return 0;
}

int
sa_cpus_quota(const char *groups, const char *mount)
{
    if (mount == NULL) {
        mount = "/sys/fs/cgroup";
    }
    FILE *file = fopen(groups != NULL ? groups : "/proc/self/cgroup", "r");
    if (file == NULL) {
        return INT_MAX;
    }
    int least = INT_MAX;
    char line[PATH], root[PATH];
    while (fgets(line, sizeof line, file) != NULL) { /* number:controllers:/path */
        line[strcspn(line, "\n")] = '\0';
        char *list = strchr(line, ':');
        char *path = list != NULL ? strchr(list + 1, ':') : NULL;
        if (path == NULL) {
            continue;
        }
        *list++ = *path++ = '\0';
        if (*list == '\0') { /* version 2 */
            least = SA_MIN(least, least_limit(mount, path, limit_v2));
        } else if (lists_cpu(list)) {
            const int length = snprintf(root, sizeof root, "%s/%s", mount, list);
            if (length > 0 && (size_t)length < sizeof root) {
                least = SA_MIN(least, least_limit(root, path, limit_v1));
            }
            snprintf(root, sizeof root, "%s/cpu", mount);
            least = SA_MIN(least, least_limit(root, path, limit_v1));
        }
    }
    fclose(file);
    return least;
}

int
sa_cpus_affine(void)
{
    return cpus_of_process();
}

/* The number that a variable starts with ("4" or "4,2"); 0: none. */
static int
number_in(const char *variable)
{
    char room[SA_VALUE_MAX], *end;
    const char *text = sa_environment(variable, room);
    if (text == NULL) {
        return 0;
    }
    const long value = strtol(text, &end, 10);
    return end != text && value > 0 ? (int)SA_MIN(value, SA_MAX_THREADS) : 0;
}

static int
cpus_allowed(void)
{
    return SA_MIN(sa_cpus_affine(), sa_cpus_quota(NULL, NULL));
}

int
sa_num_threads(void)
{
    int count = atomic_load_explicit(&wanted, memory_order_relaxed);
    if (count > 0) {
        return count;
    }
    count = number_in("SPARSEATTN_NUM_THREADS");
    if (count == 0) {
        count = number_in("OMP_NUM_THREADS");
    }
    if (count == 0) {
        count = SA_MIN(cpus_allowed(), SA_MAX_THREADS);
    }
    int unknown = 0;
    return atomic_compare_exchange_strong(&wanted, &unknown, count) ? count : unknown;
}

void
sa_num_threads_set(int count)
{
    atomic_store(&wanted, SA_MAX(1, SA_MIN(count, SA_MAX_THREADS)));
}
