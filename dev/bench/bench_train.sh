#!/bin/sh
# Training speed on the 135M shape: share of the arithmetic peak, cost of fake quantization, what integer products gain,
# memory against the plan.
# Runs the shipped program with its log on; the figure of a run is the median step after warm-up, its peak the one the same
# run measured. Usage: bench_train.sh BIN-FOLDER RANDOM_SHARD [steps]
set -eu
bin=$1 shard=$2 steps=${3:-24}
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"$shard" "$tmp/tokens.bin" 2000000 49152

# run NAME SCHEME B T -> $tmp/NAME/log.jsonl, $tmp/NAME.txt
run() {
    name=$1; scheme=$2; B=$3; T=$4; shift 4
    start=$(date +%s.%N)
    "$bin/train_llama_qat" --init 135M --train-data "$tmp/tokens.bin" --scheme "$scheme" --batch "$B" --seq-len "$T" \
        --steps "$steps" --lr 1e-4 --out "$tmp/$name" --keep 1 --log-every 1000 "$@" > "$tmp/$name.txt"
    end=$(date +%s.%N)
    echo "$start $end" > "$tmp/$name.wall"
    rm -rf "$tmp/$name"/step-* "$tmp/$name/model.bin"
}

# Median of a field over the steps after the fourth.
median() { awk -v key="\"$2\": *" '/"event": *"step"/ { if (match($0, key "[-0-9.e+]+")) { v = substr($0, RSTART, RLENGTH); sub(key, "", v); if (++n > 4) print v } }' \
    "$tmp/$1/log.jsonl" | sort -g | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }

# They take turns, so that a slow spell of a shared machine meets both.
run none1 none 4 512 --profile "$tmp/none1.json"
run qat1 8da4w-32 4 512 --profile "$tmp/qat1.json"
run int1 8da4w-32 4 512 --forward integer --profile "$tmp/int1.json"
run grad1 8da4w-32 4 512 --forward integer --grad-weight int8 --profile "$tmp/grad1.json"
run none2 none 4 512
run qat2 8da4w-32 4 512
run int2 8da4w-32 4 512 --forward integer
run grad2 8da4w-32 4 512 --forward integer --grad-weight int8
run long none 1 2048 --profile "$tmp/long.json"
for r in none1 qat1 int1 grad1 long; do echo "--- $r"; grep -A 40 '^profile' "$tmp/$r.txt"; done
grep '^FLOPs' "$tmp/none1.txt"
grep '^device' "$tmp/none1.txt"

best() { printf '%s\n%s\n' "$1" "$2" | sort -g"${3:-}" | head -n 1; }
share=$(best "$(median none1 peak_share)" "$(median none2 peak_share)" r)
none_ms=$(best "$(median none1 ms)" "$(median none2 ms)")
qat_ms=$(best "$(median qat1 ms)" "$(median qat2 ms)")
int_ms=$(best "$(median int1 ms)" "$(median int2 ms)")
grad_ms=$(best "$(median grad1 ms)" "$(median grad2 ms)")
plan=$(sed -n 's/.*"memory_plan": *\([0-9.e+]*\).*/\1/p' "$tmp/none1/log.jsonl")
rss=$(median none1 peak_rss)
echo "result train_none_peak_share $share ratio"
echo "result train_none_peak_share_T2048 $(median long peak_share) ratio"
echo "result train_none_step $none_ms ms"
echo "result train_8da4w_step $qat_ms ms"
awk -v q="$qat_ms" -v n="$none_ms" 'BEGIN { printf "result qat_overhead_8da4w %.4f ratio\n", q / n }'
echo "result train_8da4w_integer_step $int_ms ms"
awk -v i="$int_ms" -v n="$none_ms" 'BEGIN { printf "result qat_integer_speedup %.4f ratio\n", n / i }'
echo "result train_8da4w_integer_grad_step $grad_ms ms"
awk -v i="$grad_ms" -v n="$none_ms" 'BEGIN { printf "result qat_integer_grad_speedup %.4f ratio\n", n / i }'
awk -v p="$plan" -v r="$rss" 'BEGIN { printf "result train_memory_plan %.0f bytes\nresult train_memory_peak %.0f bytes\nresult train_memory_over_plan %.4f ratio\n", p, r, r / p }'
