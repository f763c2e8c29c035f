/* selftest.c - the core without Python, for sanitizers and emulators: .ci/selftest.sh builds and
 * runs it.
 *
 * A new kernel adds a file with one function sa_selftest_<name>, declared in check.h, and a line in
 * the table. `selftest WORD` runs the functions whose name contains WORD.
 */
#include <stdio.h>
#include <string.h>

#include "base/cpu.h"
#include "base/ctx.h"
#include "base/threads.h"
#include "check.h"

static const struct {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"environment", sa_selftest_environment},
    {"alloc", sa_selftest_alloc},
    {"half", sa_selftest_half},
    {"philox", sa_selftest_philox},
    {"pool", sa_selftest_pool},
    {"fork", sa_selftest_fork},
    {"tile_pack", sa_selftest_tile_pack},
    {"tile_strip", sa_selftest_tile_strip},
    {"tile_row", sa_selftest_tile_row},
    {"tile_run", sa_selftest_tile_run},
    {"tile_grad", sa_selftest_tile_grad},
    {"select", sa_selftest_select},
    {"plan", sa_selftest_plan},
    {"pack", sa_selftest_pack},
    {"attend", sa_selftest_attend},
    {"attend_rows", sa_selftest_attend_rows},
    {"grad", sa_selftest_grad},
    {"received", sa_selftest_received},
    {"gemm", sa_selftest_gemm},
    {"ops", sa_selftest_ops},
    {"faults", sa_selftest_faults},
};

int
main(int argc, char **argv)
{
    int code;
    sa_poison_set(true); /* a forgotten value is a NaN, pieces stand apart */
    if (check_is_child(argc, argv, &code)) {
        return code;
    }
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (argc < 2 || strstr(tests[i].name, argv[1]) != NULL) {
            sa_poison_set(true);
            numbers_seed(i);
            tests[i].run();
            sa_scratch_trim();
            check_case("%s leaves nothing behind", tests[i].name);
            CHECK(sa_live_bytes() == 0, "%lld bytes are still held", (long long)sa_live_bytes());
            CHECK(sa_breaches() == 0, "%lld red zones written over", (long long)sa_breaches());
        }
    }
    for (int isa = 0; isa < SA_ISA_COUNT; isa++) {
        printf("tables of %s: %s\n", sa_isa_name((sa_isa)isa),
               sa_isa_has((sa_isa)isa) ? "run" : "NOT RUN, this CPU lacks it");
    }
    return check_end();
}
