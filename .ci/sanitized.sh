#!/usr/bin/env bash
# The module itself under AddressSanitizer and UBSan: csrc/python, which .ci/selftest.sh leaves out,
# and what lies below it. Tests of the boundary run; pytest's options come after the sources.
#   .ci/sanitized.sh PYTHON [SOURCES] [PYTEST OPTIONS]     PYTHON: has the package's test extra
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$1 sources=${2:-$root}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
shift $(($# < 2 ? $# : 2))

tests=()
for name in boundary errors core_plans core_memory plan_arrays merge ops weights sample stubs; do
    tests+=("$root/tests/test_$name.py")
done
SPARSEATTN_SANITIZE=address,undefined \
    "$python" -m pip install -q --no-deps --no-compile --target "$work/module" "$sources"

# Leaks: tests count the core's own bytes; the interpreter never frees all of its own.
export ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export PYTHONPATH=$work/module PYTHONMALLOC=malloc
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
cd "$work"
LD_PRELOAD=$preload "$python" -c '
import sparseattn
assert "/module/" in sparseattn._core.__file__, sparseattn._core.__file__
assert b"__asan_init" in open(sparseattn._core.__file__, "rb").read()'
LD_PRELOAD=$preload "$python" -m pytest -q --capture=sys -p no:cacheprovider \
    "$@" "${tests[@]}" # sys: a report goes past Python, and is seen
