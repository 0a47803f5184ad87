#!/bin/bash
# Two ranks that share everything out (--shard full) against two that share nothing, and against one process with the
# same cores, on the 135M shape with 8 micro-steps an update: speed, bytes on the wire, memory against the plan.
# Runs the shipped program with its log on. Usage: bench_shard.sh BIN-FOLDER RANDOM_SHARD [steps]
set -eu
bin=$1 shard=$2 steps=${3:-6}
. "$(dirname "$0")/../../scripts/mpi.sh"
if why=$(mpi_missing "$bin/train_llama_qat"); then echo "skip: $why"; exit 0; fi
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"$shard" "$tmp/tokens.bin" 2000000 49152
export MPI_TIMEOUT=900

# run NAME RANKS OPTIONS...: $tmp/NAME/log.jsonl
run() {
    name=$1 n=$2
    shift 2
    set -- "$bin/train_llama_qat" --init 135M --train-data "$tmp/tokens.bin" --scheme 8da4w-32 --seq-len 512 \
        --steps "$steps" --lr 1e-4 --out "$tmp/$name" --no-save --log-every 1000 "$@"
    if [ "$n" = 1 ]; then "$@" >"$tmp/$name.txt"; else mpi_run "$n" "$@" >"$tmp/$name.txt"; fi
    grep '^wire' "$tmp/$name.txt" | sed "s/^/$name: /" || true
}
# field NAME EVENT KEY: of every such line of the log
field() { awk -v event="\"event\": \"$2\"" -v key="\"$3\": " 'index($0, event) && (i = index($0, key)) {
    v = substr($0, i + length(key)); sub(/[,}].*/, "", v); print v }' "$tmp/$1/log.jsonl"; }
# The fastest step after the second: others on the machine only make steps slower.
fastest() { for r in "$@"; do field "$r" step ms | tail -n +3; done | sort -g | head -n 1; }

# They take turns, so that a slow spell of a shared machine meets all.
for turn in 1 2; do
    run "none$turn" 2 --shard none --batch 1 --grad-accum 8
    run "full$turn" 2 --shard full --batch 1 --grad-accum 8
    run "alone$turn" 1 --batch 2 --grad-accum 8
done
run whole 2 --shard full --gather full --batch 1 --grad-accum 8
none=$(fastest none1 none2) full=$(fastest full1 full2) alone=$(fastest alone1 alone2)
echo "result shard_none_step $none ms"
echo "result shard_full_step $full ms"
echo "result one_process_step $alone ms"
echo "result shard_full_gather_full_step $(fastest whole) ms"
awk -v n="$none" -v f="$full" -v a="$alone" 'BEGIN {
    printf "result shard_full_rate_to_none %.4f ratio\n", n / f
    printf "result shard_full_rate_to_one_process %.4f ratio\n", a / f }'
for k in linears others gradients; do echo "result wire_$k $(field full1 wire $k) bytes"; done
echo "result wire_linears_gather_full $(field whole wire linears) bytes"
awk -v q="$(field full1 wire linears)" -v w="$(field whole wire linears)" \
    'BEGIN { printf "result wire_linears_quant_to_full %.4f ratio\n", q / w }'
echo "result wire_busy $(field full1 wire busy_seconds) s"
echo "result wire_waited $(field full1 wire blocked_seconds) s"
awk -v p="$(field full1 start memory_plan)" -v r="$(field full1 step peak_rss | sort -g | tail -n 1)" 'BEGIN {
    printf "result shard_memory_plan %.0f bytes\nresult shard_memory_peak %.0f bytes\n", p, r
    printf "result shard_memory_over_plan %.4f ratio\n", r / p }'
