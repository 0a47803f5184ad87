#!/bin/sh
# INT8 training on the 135M shape against bf16 with fp32 masters: speed of weight-only and of integer matmuls (head
# included), memory; and the memory of weights, gradients and moments that the plans give for 1B.
# Runs the shipped programs with their logs on, taking turns, so that a slow spell of a shared machine meets all of them;
# the figure of a run is the median step after warm-up. Usage: bench_qt.sh BIN-FOLDER RANDOM_SHARD [steps]
set -eu
bin=$1 shard=$2 steps=${3:-24}
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
"$shard" "$tmp/tokens.bin" 2000000 49152

# run NAME PROGRAM OPTIONS -> $tmp/NAME/log.jsonl, $tmp/NAME.txt
run() {
    name=$1; program=$2; shift 2
    "$bin/$program" --init 135M --train-data "$tmp/tokens.bin" --batch 4 --seq-len 512 --steps "$steps" --lr 1e-4 \
        --no-save --out "$tmp/$name" --log-every 1000 "$@" > "$tmp/$name.txt"
}
# Median of a field over the steps after the fourth.
median() { awk -v key="\"$2\": *" '/"event": *"step"/ { if (match($0, key "[-0-9.e+]+")) { v = substr($0, RSTART, RLENGTH); sub(key, "", v); if (++n > 4) print v } }' \
    "$tmp/$1/log.jsonl" | sort -g | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }
best() { printf '%s\n%s\n' "$(median "$1" "$2")" "$(median "$3" "$2")" | sort -g"${4:-}" | head -n 1; }

run none1 train_llama_qat --scheme none
run wo1 train_llama_qt --matmul weight-only
run int1 train_llama_qt --matmul int8
run none2 train_llama_qat --scheme none
run wo2 train_llama_qt --matmul weight-only
run int2 train_llama_qt --matmul int8
# Where the time goes: runs of their own, since marks between operations cost a little.
all=$steps steps=8
run none3 train_llama_qat --scheme none --profile "$tmp/none3.json"
run wo3 train_llama_qt --matmul weight-only --profile "$tmp/wo3.json"
run int3 train_llama_qt --matmul int8 --profile "$tmp/int3.json"
steps=$all
for r in none3 wo3 int3; do echo "--- $r"; grep -A 40 '^profile' "$tmp/$r.txt"; done
grep '^device' "$tmp/none1.txt"
none=$(best none1 ms none2) wo=$(best wo1 ms wo2) int=$(best int1 ms int2)
echo "result qt_bf16_step $none ms"
echo "result qt_weight_only_step $wo ms"
echo "result qt_int8_step $int ms"
echo "result qt_bf16_peak_share $(best none1 peak_share none2 r) ratio"
awk -v n="$none" -v w="$wo" -v i="$int" 'BEGIN {
    printf "result qt_weight_only_speed %.4f ratio\nresult qt_int8_speedup %.4f ratio\n", n / w, n / i }'
for r in none1 wo1 int1; do
    plan=$(sed -n 's/.*"memory_plan": *\([0-9.e+]*\).*/\1/p' "$tmp/$r/log.jsonl")
    awk -v r="${r%1}" -v p="$plan" -v m="$(median $r peak_rss)" 'BEGIN {
        sub(/none/, "bf16", r); sub(/wo/, "weight_only", r); sub(/int/, "int8", r)
        printf "result qt_%s_memory_plan %.0f bytes\nresult qt_%s_memory_peak %.0f bytes\n", r, p, r, m }'
done

# Memory at 1B. The plan is printed before anything is allocated; a batch that fits nowhere ends the program there.
plan() {
    program=$1; shift
    "$bin/$program" --init 1B --train-data "$tmp/tokens.bin" --batch 65536 --seq-len 2048 --steps 1 --out "$tmp/plan" "$@" \
        > "$tmp/plan.txt" 2>&1 || true
    awk '/^memory plan/ { on = 1; next } /^  total/ { on = 0; seen = 1 } on && !/activations|tokens/ {
        m = $NF == "GB" ? 1e9 : $NF == "MB" ? 1e6 : $NF == "kB" ? 1e3 : 1; sum += $(NF - 1) * m }
        END { if (!seen) exit 1; printf "%.0f\n", sum }' "$tmp/plan.txt" || { cat "$tmp/plan.txt" >&2; return 1; }
}
fp32=$(plan train_llama_qat --scheme none)
bf16=$(plan train_llama_qat --scheme none --master bf16-sr)
qt=$(plan train_llama_qt --optim-state int8)
floats=$(plan train_llama_qt --optim-state int8 --head float)
# What arithmetic allows: gradients stay fp32. Of the parameters of linears (16 blocks) the weight goes from 2 bytes to 1,
# of the table its 2 bytes stay; both moments go from 8 bytes to 2; an fp32 master would have been 4 more.
awk -v fp32="$fp32" -v bf16="$bf16" -v qt="$qt" -v floats="$floats" 'BEGIN {
    linears = 16 * (2048 * 64 * (2 * 32 + 2 * 8) + 3 * 2048 * 8192); table = 128256 * 2048
    allowed = linears * (14 - 7) + table * (14 - 8)
    printf "# 1B, weights, gradients and moments: linears %.1fM parameters, table %.1fM\n", linears / 1e6, table / 1e6
    printf "# bf16 with fp32 moments: 2 + 4 + 8 bytes a parameter, with fp32 masters 4 more\n"
    printf "# INT8 with 8-bit moments: 1 + 4 + 2 bytes, of the table 2 + 4 + 2\n"
    printf "# arithmetic saves 7 bytes of a linear parameter and 6 of the table: %.2f GB; with masters %.2f GB\n",
        allowed / 1e9, (allowed + 4 * (linears + table)) / 1e9
    printf "result qt_1B_bf16_fp32_master %.3f GB\nresult qt_1B_bf16 %.3f GB\n", fp32 / 1e9, bf16 / 1e9
    printf "result qt_1B_int8 %.3f GB\nresult qt_1B_int8_float_head %.3f GB\n", qt / 1e9, floats / 1e9
    printf "result qt_memory_saving_share %.4f ratio\n", (bf16 - qt) / allowed
    printf "result qt_memory_saving_share_float_head %.4f ratio\n", (bf16 - floats) / allowed
    printf "result qt_memory_saving_share_fp32_master %.4f ratio\n", (fp32 - qt) / (allowed + 4 * (linears + table))
}'
