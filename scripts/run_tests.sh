#!/bin/bash
# Runs tests and counts them: scripts/run_tests.sh DIR... [cudasim]
# DIR is a build folder such as build/bf16: every program in DIR/test, then every test/*.sh with QLLM_BIN=DIR/bin.
# `cudasim` runs `make test-cudasim`. FILTER=name runs only the programs whose name contains it.
#
# A program reports cases as cmocka does; a script by lines "ok NAME", "not ok NAME" and "skip NAME", or by a line
# "N passed, N failed[, N skipped]"; one that says nothing counts as one case by its exit status. Besides failed cases
# these count as a failure: a program that dies or exits nonzero without naming a failed case (a sanitizer's report
# after the last test), runs fewer cases than it announced, or runs none.
# Prints failures in full, and last a line: N passed, N failed[, N skipped]. Exit status 1 if anything failed.
set -u
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 0 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }

limit=${TEST_TIMEOUT:-900}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export TMPDIR=$work/tmp
# Tests are many short parallel loops: threads that wait asleep do not slow down whatever else the machine does, and
# with more threads than free cores spinning at barriers costs far more.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
passed=0 failed=0 skipped=0
failures=() skips=()

# LeakSanitizer needs ptrace, which some containers forbid: look once, and say so if it is off.
choose_leak_detection() {
    printf 'int main(void) { return 0; }\n' >"$work/leak.c"
    if "${CC:-cc}" -fsanitize=address "$work/leak.c" -o "$work/leak" 2>/dev/null &&
        ASAN_OPTIONS=detect_leaks=1 "$work/leak" >/dev/null 2>&1; then
        export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1
    else
        echo "leak detection does not work here and is off"
        export ASAN_OPTIONS=detect_leaks=0
    fi
    export UBSAN_OPTIONS=print_stacktrace=1
}

# run LABEL COMMAND...
run() {
    local label=$1 log=$work/log status start took ok bad skip announced note=
    shift
    rm -rf "$TMPDIR" && mkdir -p "$TMPDIR"
    start=$(date +%s%N)
    timeout "$limit" "$@" >"$log" 2>&1 </dev/null
    status=$?
    took=$((($(date +%s%N) - start) / 1000000))

    announced=$(sed -n 's/^\[==========\] Running \([0-9]*\) test(s).*/\1/p' "$log" | awk '{n += $1} END {print n + 0}')
    if [ "$announced" -gt 0 ]; then
        ok=$(grep -c '^\[       OK \]' "$log")
        # cmocka names a failed or skipped case once when it happens and once more in the list at the end.
        bad=$(sed -n 's/^\[  \(FAILED\|ERROR\)  *\] \([A-Za-z_][A-Za-z0-9_]*\)$/\2/p' "$log" | sort -u | wc -l)
        skip=$(sed -n 's/^\[  SKIPPED \] \([A-Za-z_][A-Za-z0-9_]*\)$/\1/p' "$log" | sort -u | wc -l)
        if [ $((ok + bad + skip)) -lt "$announced" ]; then
            note="only $((ok + bad + skip)) of $announced cases ran"
            bad=$((bad + 1))
        fi
    elif line=$(grep -E '^[0-9]+ passed, [0-9]+ failed(, [0-9]+ skipped)?$' "$log" | tail -1) && [ -n "$line" ]; then
        read -r ok bad skip <<<"${line//[!0-9 ]/}"
        skip=${skip:-0}
        [ $((ok + bad + skip)) -gt 0 ] || { bad=1 note="ran nothing"; }
    else
        ok=$(grep -c '^ok ' "$log") bad=$(grep -c '^not ok ' "$log") skip=$(grep -c '^skip ' "$log")
        [ $((ok + bad + skip)) -gt 0 ] || ok=$((status == 0))
    fi
    if [ "$status" -ne 0 ] && [ "$bad" -eq 0 ]; then
        bad=1
        note="exit status $status"
        [ "$status" -eq 124 ] && note="killed after $limit s"
    fi
    passed=$((passed + ok)) failed=$((failed + bad)) skipped=$((skipped + skip))
    printf '%-6s %-36s %4d passed' "$([ "$bad" -eq 0 ] && echo ok || echo FAILED)" "$label" "$ok"
    [ "$skip" -gt 0 ] && printf ', %d skipped' "$skip"
    [ "$bad" -gt 0 ] && printf ', %d FAILED' "$bad"
    printf '  %d.%01d s%s\n' $((took / 1000)) $((took % 1000 / 100)) "${note:+  ($note)}"
    if [ "$bad" -gt 0 ]; then
        grep -v -E '^\[( RUN|       OK)' "$log" | tail -n 60 | sed 's/^/    /'
        failures+=("$label${note:+ ($note)}: $(sed -n -e 's/^\[  FAILED  \] \([A-Za-z_][A-Za-z0-9_]*\)$/\1/p' \
            -e 's/^not ok //p' "$log" | sort -u | tr '\n' ' ')")
    fi
    [ "$skip" -gt 0 ] && skips+=("$label: $(sed -n 's/^skip\(ped:\)\? *\(.*\)/\2/p' "$log" |
        sed 's/ is not there (set QLLM_DATA.*/ is missing (QLLM_DATA)/' | sort -u | head -3 | paste -sd ';')")
    return 0
}

for dir in "$@"; do
    if [ "$dir" = cudasim ]; then
        # Every kernel in both precisions, one program after the other: as long as a dozen of the others.
        limit=$((3 * limit)) run cudasim "${MAKE:-make}" --no-print-directory ${BUILD:+BUILD="$BUILD"} QLLM_QUIET=1 test-cudasim
        continue
    fi
    name=$(basename "$dir")
    case $name in *-asan) choose_leak_detection ;; esac
    for program in test/test_*.c; do
        [ -e "$program" ] || continue
        t=$(basename "$program" .c)
        case $t in *"${FILTER:-}"*) ;; *) continue ;; esac
        if [ -x "$dir/test/$t" ]; then run "$name/$t" "$dir/test/$t"
        else run "$name/$t" sh -c "echo $dir/test/$t was not built; exit 1"; fi
    done
    for script in test/*.sh; do
        [ -e "$script" ] || continue
        case $script in *"${FILTER:-}"*) ;; *) continue ;; esac
        run "$name/$(basename "$script")" \
            env QLLM_BIN="$(realpath "$dir/bin")" QLLM_PRECISION="${name%-asan}" bash "$script"
    done
done

if [ ${#skips[@]} -gt 0 ]; then printf 'skipped in %s\n' "${skips[@]}"; fi
if [ ${#failures[@]} -gt 0 ]; then printf 'FAILED in %s\n' "${failures[@]}"; fi
echo "$passed passed, $failed failed$([ "$skipped" -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
