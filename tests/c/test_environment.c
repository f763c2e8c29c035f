/* test_environment.c - what is read once: instruction set, thread count, control groups. Children
 * stand for fresh processes, so this runs before anything has been read. */
#define _GNU_SOURCE /* mkdtemp, setenv */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#include "base/windows_lean.h"
#else
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "base/cpu.h"
#include "base/threads.h"
#include "base/view.h"
#include "check.h"

typedef struct {
    const char *threads, *omp;
    int count; /* expected; 0: whatever the machine gives */
} count_case;

static void
set_or_clear(const char *name, const char *value)
{
#ifdef _WIN32
    SetEnvironmentVariableA(name, value);
#else
    if (value != NULL) {
        setenv(name, value, 1);
    } else {
        unsetenv(name);
    }
#endif
}

static int
count_threads(void *arg)
{
    const count_case *c = arg;
    set_or_clear("SPARSEATTN_NUM_THREADS", c->threads);
    set_or_clear("OMP_NUM_THREADS", c->omp);
    return sa_num_threads();
}

static void
check_counts(void)
{
    const int machine = SA_MIN(SA_MIN(sa_cpus_affine(), sa_cpus_quota(NULL, NULL)), SA_MAX_THREADS);
    static count_case cases[] = {
        {NULL, NULL, 0},
        {"3", NULL, 3},
        {"3", "5", 3},
        {NULL, "5", 5},
        {NULL, "6,2", 6},
        {"", "7", 7},
        {"zero", "7", 7},
        {"0", NULL, 0},
        {"-4", NULL, 0},
        {"1000", NULL, 64},
        {"1", "9", 1},
        {" 4", NULL, 4},
        {"999999999999999999999", NULL, 64},
    };
    check_case("thread count from the environment");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const int want = cases[i].count > 0 ? cases[i].count : machine;
        const int got = check_child(count_threads, &cases[i]);
        CHECK(got == want, "%s and %s gave %d, not %d", cases[i].threads, cases[i].omp, got, want);
    }
}

static int
ask_isa(void *word)
{
    set_or_clear("SPARSEATTN_ISA", word);
    const char *refused = sa_isa_refused();
    return (int)sa_isa_now() + (refused == NULL ? 0 : strcmp(refused, word) == 0 ? 10 : 20);
}

static void
check_isa(void)
{
    static char words[][16] = {"baseline", "avx2", "avx512"};
    int best = 0;
    check_case("instruction set from the environment");
    for (int i = 0; i < SA_ISA_COUNT; i++) {
        const bool has = sa_isa_has((sa_isa)i);
        best = has ? i : best;
        CHECK(strcmp(sa_isa_name((sa_isa)i), words[i]) == 0, "name %d", i);
    }
    CHECK(sa_isa_has(SA_ISA_BASE), "every CPU has the baseline");
    for (int i = 0; i < SA_ISA_COUNT; i++) {
        const int want = sa_isa_has((sa_isa)i) ? i : best + 10,
                  got = check_child(ask_isa, words[i]);
        CHECK(got == want, "%s gave %d, not %d", words[i], got, want);
    }
    CHECK(check_child(ask_isa, NULL) == best, "no word");
    CHECK(check_child(ask_isa, "") == best, "an empty word");
    CHECK(check_child(ask_isa, "AVX2 ") == best + 10, "a word that is none");

    check_case("instruction set by call");
    for (int i = 0; i < SA_ISA_COUNT; i++) {
        const bool has = sa_isa_has((sa_isa)i);
        CHECK(sa_isa_set((sa_isa)i) == has, "set %d", i);
        CHECK(!has || (int)sa_isa_now() == i, "now %d", i);
    }
    CHECK(!sa_isa_set(SA_ISA_COUNT), "one that does not exist");
    sa_isa_set((sa_isa)best);
}

#ifndef _WIN32 /* which has no control groups */
static void
write_file(const char *folder, const char *name, const char *text)
{
    char path[600];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    for (char *slash = path + strlen(folder); (slash = strchr(slash + 1, '/')) != NULL;) {
        *slash = '\0';
        mkdir(path, 0700);
        *slash = '/';
    }
    FILE *file = fopen(path, "w");
    if (CHECK(file != NULL, "cannot write %s", path)) {
        fputs(text, file);
        fclose(file);
    }
}

static void
check_quota(void)
{
    static const struct {
        const char *groups, *files[6];
        int cpus;
    } cases[] = {
        {"0::/\n", {NULL}, INT_MAX},
        {"0::/a/b\n", {"a/b/cpu.max", "max 100000\n"}, INT_MAX},
        {"0::/a/b\n", {"a/b/cpu.max", "250000 100000\n"}, 3},
        {"0::/a/b\n", {"a/b/cpu.max", "400000 100000\n", "a/cpu.max", "200000 100000\n"}, 2},
        {"0::/elsewhere\n", {"cpu.max", "50000 100000\n"}, 1},
        {"0::/\n", {"cpu.max", "garbage\n"}, INT_MAX},
        {"4:cpu,cpuacct:/x\n1:name=systemd:/\n",
         {"cpu,cpuacct/x/cpu.cfs_quota_us", "150000\n", "cpu,cpuacct/x/cpu.cfs_period_us",
          "50000\n"},
         3},
        {"1:cpu:/x\n",
         {"cpu/x/cpu.cfs_quota_us", "-1\n", "cpu/x/cpu.cfs_period_us", "50000\n"},
         INT_MAX},
        {"3:cpuset:/x\n",
         {"cpuset/x/cpu.cfs_quota_us", "50000\n", "cpuset/x/cpu.cfs_period_us", "50000\n"},
         INT_MAX},
        {"no colon\n\n:\n", {NULL}, INT_MAX},
    };
    check_case("CPUs granted by control groups");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char folder[] = "/tmp/selftest-XXXXXX", groups[64], command[64];
        if (!CHECK(mkdtemp(folder) != NULL, "no folder")) {
            return;
        }
        write_file(folder, "groups", cases[i].groups);
        for (int f = 0; f < 6 && cases[i].files[f] != NULL; f += 2) {
            write_file(folder, cases[i].files[f], cases[i].files[f + 1]);
        }
        snprintf(groups, sizeof groups, "%s/groups", folder);
        const int got = sa_cpus_quota(groups, folder);
        CHECK(got == cases[i].cpus, "case %zu gave %d, not %d", i, got, cases[i].cpus);
        snprintf(command, sizeof command, "rm -r %s", folder);
        CHECK(system(command) == 0, "%s", command);
    }
}
#endif

void
sa_selftest_environment(void)
{
    check_counts();
    check_isa();
#ifndef _WIN32
    check_quota();
#endif
    check_case("CPUs granted to this process");
    CHECK(sa_cpus_quota("/nowhere", "/nowhere") == INT_MAX, "no file");
    CHECK(sa_cpus_affine() >= 1, "affinity");
}
