#!/usr/bin/env bash
# Builds the core without Python together with tests/c and runs it: once as released and once under
# AddressSanitizer and UBSan, or once with CFLAGS where set. CC (gcc), LIBS and JOBS (all CPUs) are
# read, and EMULATOR: the command that runs what a cross compiler made. .ci/run says what aarch64 and
# Windows need.
#   CC=clang .ci/selftest.sh
#   CFLAGS="-O1 -g -fsanitize=thread" .ci/selftest.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

export CC=${CC:-gcc}
export UBSAN_OPTIONS=${UBSAN_OPTIONS:-print_stacktrace=1}
export TSAN_OPTIONS=${TSAN_OPTIONS:-die_after_fork=0} # children start threads
jobs=${JOBS:-$(getconf _NPROCESSORS_ONLN)}
always="-std=c11 -ffp-contract=fast -fvisibility=hidden -fno-math-errno -fno-trapping-math
    -Wall -Wextra -Werror -Icsrc -Itests/c"
sanitizers="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
passed=0

# run FLAGS: builds into a fresh folder, runs, adds what passed.
run() {
    local objects line
    objects=$(mktemp -d -p "$work")
    export flags="$always $1" objects
    printf '%s: %s\n' "$CC" "$1"
    find csrc tests/c -path csrc/python -prune -o -name '*.c' -print0 | # that room: .ci/sanitized.sh
        xargs -0 -P "$jobs" -I{} bash -c '$CC $flags -c {} -o "$objects/$(echo {} | tr / _).o"'
    # shellcheck disable=SC2086 # flags are words
    $CC $flags "$objects"/*.o -o "$objects/selftest.exe" ${LIBS:--lpthread -lm -ldl}
    # shellcheck disable=SC2086 # the emulator has options
    ${EMULATOR:-} "$objects/selftest.exe" | tr -d '\r' | tee "$objects/output"
    line=$(tail -n 1 "$objects/output")
    [[ $line =~ ^([0-9]+)\ passed,\ 0\ failed$ ]]
    passed=$((passed + BASH_REMATCH[1]))
}

if [ -n "${CFLAGS:-}" ]; then
    run "$CFLAGS"
else
    run "-O3"
    run "$sanitizers"
fi
printf '%d passed, 0 failed\n' "$passed"
