#!/bin/sh
# Scoring speed: windows of 2,048 tokens through a random 135M model, as a share of the arithmetic peak. In trained
# arithmetic the float model; in served arithmetic each of SCHEMES, all against the same peak, that of the build's type:
# integers can be above it. Every model is scored RUNS times in turn with the others, so that a slow spell of a shared
# machine meets all; a share is the best speed over the highest peak that any run measured. The processor share takes
# the time that the program's threads ran for the time that passed: what is left of the peak where others run too.
# Usage: bench_eval.sh BIN-FOLDER RANDOM_SHARD [windows]
# SCHEMES="int8wo int8dq int4wo-32 8da4w-32" RUNS=2 SHAPE=135M THREADS=0; QLLM_TMP: where files of some 0.8 GB go.
set -eu
bin=$1 shard=$2 windows=${3:-16}
shape=${SHAPE:-135M} runs=${RUNS:-2}
schemes=${SCHEMES:-int8wo int8dq int4wo-32 8da4w-32}
tmp=$(mktemp -d "${QLLM_TMP:-${TMPDIR:-/tmp}}/bench-eval-XXXXXX"); trap 'rm -rf "$tmp"' EXIT
"$(dirname "$shard")/random_model" "$tmp/float.bin" "$shape"
"$shard" "$tmp/tokens.bin" $((windows * 2048 + 1)) 49152
for scheme in $schemes; do
    "$bin/quantize" "$tmp/float.bin" --scheme "$scheme" --out "$tmp/$scheme.bin" --quiet >/dev/null
done

score() { # score NAME MODEL ARITHMETIC
    "$bin/eval" "$tmp/$2.bin" --val-data "$tmp/tokens.bin" --seq-len 2048 --arithmetic "$3" --peak --no-verify \
        --threads "${THREADS:-0}" --json "$tmp/$1.json" >"$tmp/$1.txt" 2>"$tmp/$1.err" || { cat "$tmp/$1.err" >&2; exit 1; }
}
i=0
while [ $i -lt "$runs" ]; do
    score float-trained float trained
    score float-served float served
    for scheme in $schemes; do score "$scheme-served" "$scheme" served; done
    i=$((i + 1))
done
head -n 1 "$tmp/float-trained.txt"
# most FIELD FILES: the largest value of a field of the JSON lines
most() {
    field=$1; shift
    cat "$@" | sed -n "s/.*\"$field\": \([^,}]*\).*/\1/p" | sort -g | tail -n 1
}
cpus=$(sed -n 's/.*, \([0-9]*\) threads\{0,1\}[,;].*/\1/p' "$tmp/float-trained.txt" | head -n 1)
# least FIELD FILES: the smallest
least() {
    field=$1; shift
    cat "$@" | sed -n "s/.*\"$field\": \([^,}]*\).*/\1/p" | sort -g | head -n 1
}
peak=$(most peak_flops "$tmp"/*.json)
awk -v p="$peak" 'BEGIN { printf "result eval_peak %.1f GFLOP/s\n", p / 1e9 }'
for name in float-trained float-served $(for s in $schemes; do echo "$s-served"; done); do
    awk -v name="$name" -v peak="$peak" -v rate="$(most flops_per_second "$tmp/$name.json")" \
        -v tokens="$(most tokens_per_second "$tmp/$name.json")" -v cpus="$cpus" -v run="$(most tokens_run "$tmp/$name.json")" \
        -v busy="$(least processor_seconds "$tmp/$name.json")" 'BEGIN {
        gsub(/-/, "_", name)
        flops = rate / tokens * run
        printf "result eval_%s %.1f tok/s\nresult eval_peak_share_%s %.4f ratio\n", name, tokens, name, rate / peak
        printf "result eval_processor_share_%s %.4f ratio\n", name, flops / (busy / cpus) / peak }'
done
