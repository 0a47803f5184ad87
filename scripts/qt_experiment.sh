#!/bin/bash
# INT8 training against bf16 training: scripts/qt_experiment.sh [OUT]
# The same Llama from scratch on the same text, steps and settings, learning rate to zero, for each seed: in bf16 with
# fp32 masters, with INT8 weights (matmuls weight-only, then integer), and with INT8 weights rounded to nearest. Prints a
# table of loss, memory and speed, compares each last loss with ./eval's of the file, to the bit, and leaves in OUT
# (runs/qt): table.csv, curves.csv and qt.png (held-out loss, and its distance to that of bf16).
# Complete runs are not repeated, one that was stopped goes on.
# Settings: TRAIN=FILE VAL=FILE (default: text that this machine has) STEPS=1000 SEEDS="1 2" SHAPE=5M TOKENIZER=bytes
#           BATCH=16 SEQ_LEN=256 LR=2e-3 WARMUP=100 SCHEDULE=cosine OPTIM_STATE=fp32 VAL_EVERY=100 THREADS=0
#           RUNS="bf16 weight-only int8 nearest" (which of them; bf16 first)
# shellcheck disable=SC1091,SC2154
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
case $#${1:-} in 0 | 1[!-]*) ;; *) sed -n '2,10s/^# //p' "$0" >&2; exit 2 ;; esac
out=${1:-runs/qt}
steps=${STEPS:-1000} T=${SEQ_LEN:-256} B=${BATCH:-16} tokenizer=${TOKENIZER:-bytes}
read -r -a seeds <<<"${SEEDS:-1 2}"
read -r -a runs <<<"${RUNS:-bf16 weight-only int8 nearest}"
need_programs
mkdir -p "$out"
train=${TRAIN:-} val=${VAL:-}
if [ -z "$train" ] || [ -z "$val" ]; then
    [ -z "$train$val" ] || { echo "qt_experiment.sh: give both TRAIN and VAL, or neither" >&2; exit 2; }
    scripts/machine_text.sh "$out"
    train=$out/train.txt val=$out/held-out.txt
fi

settings=(--init "${SHAPE:-5M}" --tokenizer "$tokenizer" --train-data "$train" --val-data "$val" --batch "$B" --seq-len "$T"
    --steps "$steps" --lr "${LR:-2e-3}" --warmup "${WARMUP:-100}" --schedule "${SCHEDULE:-cosine}" --weight-decay 0.1
    --beta2 0.99 --optim-state "${OPTIM_STATE:-fp32}" --val-every "${VAL_EVERY:-100}" --save-every 100 --resume)
# What sets each run apart.
options_of() {
    case $1 in
    bf16) echo train_llama_qat --scheme none --master fp32 ;;
    weight-only) echo train_llama_qt --matmul weight-only ;;
    int8) echo train_llama_qt --matmul int8 ;;
    nearest) echo train_llama_qt --matmul weight-only --rounding nearest ;;
    *) echo "qt_experiment.sh: RUNS: $1 is none of bf16, weight-only, int8, nearest" >&2; return 1 ;;
    esac
}
for name in "${runs[@]}"; do options_of "$name" >/dev/null; done
# Validations of a log as lines "step loss"; after a resume the log may hold a step twice, and the later one counts.
validations() {
    awk '/"event": *"val"/ && match($0, /"step": *[0-9]+/) { s = substr($0, RSTART, RLENGTH); sub(/.*: */, "", s)
        if (match($0, /"loss": *[-+0-9.e]+/)) { v = substr($0, RSTART, RLENGTH); sub(/.*: */, "", v); loss[s] = v } }
        END { for (s in loss) print s, loss[s] }' "$1/log.jsonl" | sort -g
}
# A number of the steps after the fourth: their median, or the largest.
of_steps() {
    awk -v key="\"$2\": *" '/"event": *"step"/ && match($0, key "[-0-9.e+]+") {
        v = substr($0, RSTART, RLENGTH); sub(key, "", v); if (++n > 4) print v }' "$1/log.jsonl" | sort -g |
        awk -v what="$3" '{ a[NR] = $1 } END { print what == "median" ? a[int((NR + 1) / 2)] : a[NR] }'
}
# MB of what the plan holds for weights, gradients and moments.
state_mb() {
    awk '/^memory plan/ { on = 1; next } /^  total/ { on = 0 } on && !/activations|tokens|copy of the state/ {
        m = $NF == "GB" ? 1e3 : $NF == "MB" ? 1 : $NF == "kB" ? 1e-3 : 1e-6; sum += $(NF - 1) * m }
        END { printf "%.1f", sum }' "$1"
}

status=0
echo "run,seed,loss,above_bf16,weights_gradients_states_MB,peak_MB,tok_per_s,eval" >"$out/table.csv"
echo "run,seed,step,loss,above_bf16" >"$out/curves.csv"
for seed in "${seeds[@]}"; do
    for name in "${runs[@]}"; do
        dir=$out/$name-$seed
        read -r -a command <<<"$(options_of "$name")"
        if [ ! -s "$dir/model.bin" ] || [ "$(validations "$dir" | tail -n 1 | cut -d' ' -f1)" != "$steps" ]; then
            say "$name, seed $seed, $steps steps"
            PROGRAM=${command[0]} train "$dir.log" "${command[@]:1}" "${settings[@]}" --seed "$seed" --out "$dir"
        fi
        rm -f "$dir-eval.json"
        run "$dir-eval.txt" "$bin/eval" "$dir/model.bin" --val-data "$val" --seq-len "$T" --batch "$B" "${threads[@]}" \
            --arithmetic trained --json "$dir-eval.json"
        loss=$(validations "$dir" | tail -n 1 | cut -d' ' -f2)
        same=equal
        [ "$(json_field "$dir-eval.json" validation val_loss)" = "$loss" ] || same=DIFFERS status=1
        validations "$dir" >"$out/curve"
        [ "$name" != bf16 ] || cp "$out/curve" "$out/bf16-curve"
        [ -s "$out/bf16-curve" ] || : >"$out/bf16-curve"
        awk -v name="$name" -v seed="$seed" 'NR == FNR && FILENAME != ARGV[2] { base[$1] = $2; next }
            { print name "," seed "," $1 "," $2 "," ($1 in base ? $2 - base[$1] : "") }' "$out/bf16-curve" "$out/curve" \
            >>"$out/curves.csv"
        echo "$name,$seed,$loss,$(tail -n 1 "$out/curves.csv" | cut -d, -f5),$(state_mb "$dir.log"),$(of_steps "$dir" \
            peak_rss largest | awk '{ printf "%.1f", $1 / 1e6 }'),$(of_steps "$dir" tok_per_s median),$same" >>"$out/table.csv"
    done
    rm -f "$out/bf16-curve" "$out/curve"
done

say "${SHAPE:-5M}, $steps steps of $((B * T)) tokens"
awk -F, 'NR == 1 { printf "%-12s %5s %9s %10s %22s %9s %9s  %s\n", "run", "seed", "loss", "above bf16",
        "weights+grads+states", "peak MB", "tok/s", "eval"; next }
    { printf "%-12s %5s %9.4f %10s %19.1f MB %9.1f %9.0f  %s\n", $1, $2, $3, $4 == "" ? "" : sprintf("%+.4f", $4), $5, $6,
        $7, $8 }' "$out/table.csv"
if command -v gnuplot >/dev/null; then
    left='' right='' colour=0
    for name in "${runs[@]}"; do
        colour=$((colour + 1)) title=$name
        for seed in "${seeds[@]}"; do
            pick="\"<awk -F, '\$1 == \\\"$name\\\" && \$2 == $seed { print \$3, \$4, \$5 }' $out/curves.csv\""
            left+="$pick using 1:2 with linespoints lt $colour lw 2 ps 0.5 pt 7 title '$title', "
            [ "$name" = bf16 ] || right+="$pick using 1:3 with linespoints lt $colour lw 2 ps 0.5 pt 7 title '$title', "
            title=
        done
    done
    right=${right%, }
    gnuplot <<PLOT
set terminal pngcairo size 1100,440 font "DejaVu Sans,10" noenhanced
set output '$out/qt.png.tmp'
set grid lc rgb "#dddddd"
set border 3
set tics nomirror
set xlabel "step"
set key outside bottom center horizontal
set multiplot layout 1,2
set ylabel "held-out loss (nats a token)"
plot ${left%, }
set ylabel "above bf16 of the same seed"
set xzeroaxis lt -1
plot ${right:-0 notitle}
unset multiplot
PLOT
    mv "$out/qt.png.tmp" "$out/qt.png"
    echo "curves: $out/qt.png"
fi
[ $status = 0 ] || echo "qt_experiment.sh: ./eval gives another loss than the trainer" >&2
exit $status
