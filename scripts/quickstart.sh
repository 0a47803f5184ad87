#!/bin/bash
# The whole path on a small Llama, with nothing downloaded: scripts/quickstart.sh [OUT]
# Gathers text that the machine has, trains a Llama of a million parameters on its bytes, trains on with quantization-
# aware training (and, for comparison, as many steps in float), converts, scores on held-out text, and ends with a
# table: float, rounded to nearest, QAT. OUT (runs/quickstart) keeps models, logs and loss.png (float and QAT).
# Settings: SCHEME=int3-32 SHAPE=1M STEPS=1200 MORE_STEPS=400 SEED=1337 THREADS=0 (all cores).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
out=${1:-runs/quickstart}
scheme=${SCHEME:-int3-32} shape=${SHAPE:-1M} steps=${STEPS:-1200} more=${MORE_STEPS:-400} seed=${SEED:-1337}
EVENT=validation PPL=perplexity table=$out/table.txt
need_programs
mkdir -p "$out"
: >"$table"

scripts/machine_text.sh "$out"
adamw=(--weight-decay 0.1 --beta2 0.99)
data=(--train-data "$out/train.txt" --val-data "$out/held-out.txt" --seq-len 256 --batch 16 --seed "$seed")

say "a float Llama ($shape) from scratch, $steps steps"
train "$out/base.log" --init "$shape" --tokenizer bytes --scheme none "${data[@]}" "${adamw[@]}" --steps "$steps" \
    --lr 2e-3 --warmup 100 --val-every 400 --out "$out/base"
say "trained on in float, $more steps"
tune=(--model "$out/base/model.bin" "${data[@]}" "${adamw[@]}" --steps "$more" --lr 1e-3 --warmup 20 --val-every 50)
train "$out/float.log" "${tune[@]}" --scheme none --out "$out/float"
say "trained on with $scheme, $more steps"
train "$out/qat.log" "${tune[@]}" --scheme "$scheme" --out "$out/qat"

say "converted"
run "$out/rtn-quantize.txt" "$bin/quantize" "$out/float/model.bin" --scheme "$scheme" \
    --out "$out/float/model-$scheme.bin"
run "$out/qat-quantize.txt" "$bin/quantize" "$out/qat/model.bin" --out "$out/qat/model-$scheme.bin"

say "scored on held-out text"
score=(--val-data "$out/held-out.txt" --seq-len 256)
measure float "$out/float/model.bin" "${score[@]}"
measure "rtn:$scheme" "$out/float/model-$scheme.bin" "${score[@]}"
measure "qat:$scheme" "$out/qat/model-$scheme.bin" "${score[@]}"

say "a sample of the quantized model"
"$bin/generate" "$out/qat/model-$scheme.bin" --prompt "The file is" --max-new-tokens 200 --seed 1 2>/dev/null || true
if command -v gnuplot >/dev/null; then
    echo
    rounded=$(awk '$1 ~ /^rtn:/ { print log($2) }' "$table")
    scripts/plot.sh -o "$out/loss.png" -l "float, rounded to $scheme=$rounded" "$out/float" "$out/qat" || true
fi
say "done"
print_table "perplexity/byte"
