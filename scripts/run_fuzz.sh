#!/bin/bash
# Runs fuzz targets one after another: scripts/run_fuzz.sh WORK_FOLDER PROGRAM...
# Each starts from dev/fuzz/corpus/NAME (if it is there) and what earlier runs found in WORK_FOLDER/corpus/NAME.
# FUZZ_SECONDS each (60). Input that breaks a target is kept as WORK_FOLDER/crash-NAME-*.
# The last line is: N passed, N failed.
set -u
cd "$(dirname "$0")/.." || exit 1
[ $# -gt 1 ] || { sed -n '2,4s/^# //p' "$0"; exit 2; }
work=$1
shift
passed=0 failed=0
for program in "$@"; do
    name=$(basename "$program")
    name=${name#fuzz_}
    mkdir -p "$work/corpus/$name"
    seeds=("$work/corpus/$name")
    [ -d "dev/fuzz/corpus/$name" ] && seeds+=("dev/fuzz/corpus/$name")
    log=$work/$name.log
    # 2 GB and 10 s an input: a parser that needs more has been tricked.
    if "$program" -max_total_time="${FUZZ_SECONDS:-60}" -timeout=10 -rss_limit_mb=2048 -print_final_stats=1 \
        -artifact_prefix="$work/crash-$name-" "${seeds[@]}" >"$log" 2>&1; then
        runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
        kept=$(find "$work/corpus/$name" -type f | wc -l)
        echo "ok     fuzz $name: ${runs:-?} inputs in ${FUZZ_SECONDS:-60} s, $kept kept"
        passed=$((passed + 1))
    else
        echo "FAILED fuzz $name: see $log"
        grep -v '^#' "$log" | tail -n 40 | sed 's/^/    /'
        failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
