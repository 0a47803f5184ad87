#!/bin/bash
# The scripts themselves: what they count, draw and gather. Usage: test/test_scripts.sh [case]. "ok NAME" or "not ok NAME".
# shellcheck disable=SC2317
set -u
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0
only=${1:-}
check() { # check NAME: runs the function of that name
    if [ -n "$only" ] && [ "$only" != "$1" ]; then return; fi
    "$1" >"$tmp/case.txt" 2>&1
    case $? in
    0) echo "ok $1" ;;
    77) echo "skip $1: $(tail -n 1 "$tmp/case.txt")" ;;
    *) echo "not ok $1"; sed 's/^/    /' "$tmp/case.txt"; failed=1 ;;
    esac
}

# A runner of tests that miscounts hides every other failure.
runner_counts() {
    mkdir -p "$tmp/r/scripts" "$tmp/r/test" "$tmp/r/b/bf16/bin" "$tmp/r/b/bf16/test"
    cp scripts/run_tests.sh "$tmp/r/scripts/"
    local t=$tmp/r/test
    printf 'echo ok a; echo skip b; echo ok c\n' >"$t/good.sh"
    "$tmp/r/scripts/run_tests.sh" "$tmp/r/b/bf16" >"$tmp/out" || return 1
    [ "$(tail -n 1 "$tmp/out")" = "2 passed, 0 failed, 1 skipped" ] || return 1
    printf 'echo ok a; echo not ok b; exit 1\n' >"$t/bad.sh"
    printf 'echo ok a; exit 3\n' >"$t/dies.sh"                                # 1 passed, and the death is a failure
    printf 'exit 1\n' >"$t/silent.sh"
    printf 'echo "4 passed, 2 failed"; exit 1\n' >"$t/sums.sh"
    printf 'echo "[==========] Running 3 test(s)."; echo "[       OK ] x"\n' >"$t/stops.sh"   # 2 of 3 never ran
    "$tmp/r/scripts/run_tests.sh" "$tmp/r/b/bf16" >"$tmp/out" && return 1
    tail -n 1 "$tmp/out"
    [ "$(tail -n 1 "$tmp/out")" = "9 passed, 6 failed, 1 skipped" ] && grep -q '^FAILED in bf16/bad.sh: b' "$tmp/out"
}

# No held-out line is a training line, markup is gone, and too little text is an error.
text_is_held_out() {
    local root=$tmp/root i
    mkdir -p "$root/usr/share/man/man1" "$root/usr/share/common-licenses"
    ! scripts/machine_text.sh "$tmp/none" "$root" || return 1
    for i in $(seq 1 64); do
        { printf '.TH PAGE %d\n.SH "A HEADING OF PAGE %d"\n.B \\-\\-option\n.de XX\nmacro body\n..\n' "$i" "$i"
          printf 'A line that is on every page.\n'
          awk -v seed="$i" -v lines=300 -f test/babble.awk | awk -v page="$i" '{ print $0, page, NR }'; } | gzip >"$root/usr/share/man/man1/p$i.1.gz"
    done
    scripts/machine_text.sh "$tmp/text" "$root" || return 1
    [ "$(grep -c -F -x -f "$tmp/text/held-out.txt" "$tmp/text/train.txt")" = 0 ] || return 1
    [ "$(grep -c 'A line that is on every page' "$tmp/text/train.txt")" = 1 ] || return 1
    grep -q -x -e '--option' "$tmp/text/train.txt" && ! grep -q 'macro body' "$tmp/text/train.txt"
}

plot_is_png() {
    command -v gnuplot >/dev/null || { echo "no gnuplot"; return 77; }
    mkdir -p "$tmp/run"
    for i in 1 2 3 4; do
        printf '{"event": "step", "time": 1.5, "step": %d, "loss": %d.5, "norm": null}\n' "$i" $((5 - i))
        printf '{"event": "val", "time": 1.5, "step": %d, "loss_fq": 3.25, "loss": 2e0}\n' "$i"
    done >"$tmp/run/log.jsonl"
    scripts/plot.sh -o "$tmp/a.png" -l "level=2.5" "$tmp/run" "$tmp/run/log.jsonl" || return 1
    [ "$(head -c 4 "$tmp/a.png" | tail -c 3)" = PNG ] || return 1
    ! scripts/plot.sh -o "$tmp/b.png" "$tmp/nowhere" && [ ! -e "$tmp/b.png" ]
}

# Perplexities e^1, e^1.5 and e^1.25: half of the loss is recovered.
table_is_right() {
    printf '%s\n' "float 2.718281828 1000000 10" "rtn:int3-32 4.48168907 500000 20" "qat:int3-32 3.490342957 500000 20" \
        >"$tmp/table"
    table=$tmp/table out=$tmp bash -c '. scripts/lib.sh; print_table perplexity' >"$tmp/out" || return 1
    cat "$tmp/out"
    grep -q '^int3-32: QAT recovers 50.0 % .*(0.2500 of 0.5000 nats)$' "$tmp/out" || return 1
    printf '{"event": "a", "x": 1}\n{"event": "a", "y": 2, "x": -3.5e-7}\n{"event": "b", "x": 9}\n' >"$tmp/j"
    [ "$(out=$tmp bash -c '. scripts/lib.sh; json_field "$1" a x' - "$tmp/j")" = -3.5e-7 ]
}

# Four runs of a few steps: a table with a line each, curves, and losses that eval agrees with; a second call repeats none.
qt_experiment_compares() {
    [ -n "${QLLM_BIN:-}" ] || { echo "no QLLM_BIN"; return 77; }
    awk -v seed=1 -v lines=200 -f test/babble.awk >"$tmp/t.txt"
    awk -v seed=2 -v lines=30 -f test/babble.awk >"$tmp/v.txt"
    qt() { TRAIN=$tmp/t.txt VAL=$tmp/v.txt SHAPE=tiny STEPS=4 SEEDS=3 BATCH=2 SEQ_LEN=64 VAL_EVERY=2 WARMUP=1 \
        scripts/qt_experiment.sh "$tmp/qt"; }
    qt || return 1
    [ "$(cut -d, -f1,2,8 "$tmp/qt/table.csv" | tr '\n' ' ')" = \
        "run,seed,eval bf16,3,equal weight-only,3,equal int8,3,equal nearest,3,equal " ] || return 1
    [ "$(wc -l <"$tmp/qt/curves.csv")" = 9 ] || return 1
    cp "$tmp/qt/table.csv" "$tmp/first.csv"
    qt >"$tmp/again" && ! grep -q '^val ' "$tmp/again" && cmp "$tmp/first.csv" "$tmp/qt/table.csv" || return 1
    ! RUNS="bf16 int9" qt
}

check runner_counts
check text_is_held_out
check plot_is_png
check table_is_right
check qt_experiment_compares
exit $failed
