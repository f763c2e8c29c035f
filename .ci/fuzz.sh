#!/usr/bin/env bash
# Builds the core without Python under libFuzzer, AddressSanitizer and UBSan, and feeds each target
# of tests/fuzz its corpus and RUNS inputs more (50,000; long runs are started by hand). A crash
# leaves its input in CRASHES, by default the current folder; with its fault repaired it goes to
# tests/fuzz/found. GROW=1 adds what reached new code to the corpus, reduced to what matters. CLANG
# (clang) and JOBS (all CPUs) are read.
#   RUNS=1000000 .ci/fuzz.sh
#   RUNS=1000000 GROW=1 .ci/fuzz.sh fuzz_plan
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
crashes=$(cd "${CRASHES:-.}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

export cc=${CLANG:-clang} objects=$work/objects
export flags="-std=c11 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wall -Wextra -Werror
    -Icsrc -Itests/fuzz -O1 -g -fno-omit-frame-pointer -fno-sanitize-recover=all
    -fsanitize=fuzzer-no-link,address,undefined"
mkdir "$objects"
# Of the kernels' tables only the one that runs is watched, and for addresses alone: more takes
# minutes to compile, and the self-test has them under both sanitizers.
export SPARSEATTN_ISA=baseline
compile() {
    local as=$flags
    case $1 in
    csrc/tile/tile_*_base.c) as="${flags%-fsanitize=*} -fsanitize=address" ;;
    csrc/tile/tile_*_avx*.c) as="${flags%-fsanitize=*} -O0" ;;
    esac
    # shellcheck disable=SC2086 # flags are words
    $cc $as -c "$1" -o "$objects/${1//\//_}.o"
}
export -f compile
find csrc/base csrc/tile csrc/engine csrc/variants -name '*.c' -print0 |
    xargs -0 -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -I{} bash -euc 'compile {}'

passed=0
if [ $# = 0 ]; then
    set -- $(find tests/fuzz -name 'fuzz_*.c' -printf '%f\n' | sort | sed 's/\.c$//')
fi
for target; do
    corpus=tests/fuzz/corpus/$target
    mkdir "$work/$target"
    # shellcheck disable=SC2086 # flags are words
    $cc $flags -fsanitize=fuzzer "tests/fuzz/$target.c" "$objects"/*.o -o "$work/run_$target" \
        -lpthread -lm -ldl
    printf '=== %s\n' "$target"
    # a new folder first: what is found goes there, and the corpus stays as it was committed
    "$work/run_$target" "$work/$target" "$corpus" tests/fuzz/found -runs="${RUNS:-50000}" \
        -seed="${SEED:-1}" -max_len=1024 -timeout=1 -rss_limit_mb=1024 -print_final_stats=1 \
        -verbosity=0 -artifact_prefix="$crashes/$target-"
    if [ -n "${GROW:-}" ]; then
        mkdir "$work/small"
        "$work/run_$target" -set_cover_merge=1 -max_len=1024 -verbosity=0 "$work/small" \
            "$work/$target" "$corpus"
        rm -rf "$corpus"
        mv "$work/small" "$corpus"
    fi
    passed=$((passed + 1))
done
printf '%d targets, no crash\n' "$passed"
