#!/bin/bash
# Training on several ranks against training on one. Usage: QLLM_BIN=folder-of-programs test/test_mpi.sh [case]
# FULL=1: every number of ranks, level, accumulation and scheme, with a table of the largest differences.
# Prints "ok NAME", "not ok NAME" or "skip NAME" a case. Ranks share whatever cores there are.
# shellcheck disable=SC2317,SC2086
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
compare=$(dirname "$bin")/test/mpi/compare_models
precision=${QLLM_PRECISION:-bf16}
only=${1:-}
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. scripts/mpi.sh
if why=$(mpi_missing "$bin/train_llama_qat"); then echo "skip mpi: $why"; exit 0; fi
failed=0
check() { # check NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    if [ -n "$only" ] && [ "$only" != "$name" ]; then return; fi
    if "$@" >"$tmp/case.txt" 2>&1; then
        echo "ok $name"
        sed -n 's/^report /    /p' "$tmp/case.txt"
    else
        echo "not ok $name ($((SECONDS - start)) s)"
        sed 's/^/    /' "$tmp/case.txt"
        failed=1
    fi
}

STEPS=6 GLOBAL=48                                  # sequences a step, whatever divides them
awk -v seed=1 -v lines=400 -f test/babble.awk >"$tmp/train.txt"
awk -v seed=2 -v lines=60 -f test/babble.awk >"$tmp/val.txt"

# train NAME RANKS LEVEL ACCUM ARGUMENTS...: once; what is there already is not made again.
train() {
    local out=$tmp/$1 R=$2 level=$3 accum=$4
    shift 4
    [ ! -e "$out/done" ] || return 0
    set -- "$bin/train_llama_qat" --init tiny --train-data "$tmp/train.txt" --seq-len 32 --lr 1e-3 --schedule constant \
        --steps $STEPS --batch $((GLOBAL / (R * accum))) --grad-accum "$accum" --shard "$level" --threads 1 \
        --out "$out" "$@"
    if [ "$R" = 1 ]; then "$@" >"$out.txt" 2>&1; else mpi_run "$R" "$@" >"$out.txt" 2>&1; fi || {
        echo "failed with status $?: $*"; cat "$out.txt"; return 1; }
    touch "$out/done"
}
steps() {       # "STEP LOSS NORM", as the log has them: to the last bit
    sed -n 's/.*"event": "step", .*"step": \([0-9]*\), "loss": \([^,]*\), "norm": \([^,]*\),.*/\1 \2 \3/p' \
        "$tmp/$1/log.jsonl"
}
field() { sed -n "s/.*\"event\": \"$2\".*\"$3\": \([^,}]*\).*/\1/p" "$tmp/$1/log.jsonl" | tail -n 1; }
equal() { # equal A B: losses, norms and weights, bit for bit
    [ "$(steps "$1")" = "$(steps "$2")" ] || { echo "$1 and $2 have other losses or norms:"
        paste <(steps "$1") <(steps "$2"); return 1; }
    cmp "$tmp/$1/model.bin" "$tmp/$2/model.bin"
}
# The largest relative difference of a loss, in the first step and in all of them.
loss_difference() {
    paste <(steps "$1") <(steps "$2") | awk '{ d = $2 - $5; d = (d < 0 ? -d : d) / $2; if (NR == 1) first = d
        if (!(d <= most)) most = d } END { if (NR == '$STEPS') print first + 0, most + 0; else print "1 1" }'
}
# at_most WHAT VALUE BOUND
at_most() {
    awk -v v="$2" -v b="$3" 'BEGIN { exit !(v + 0 <= b) }' || { echo "$1: $2, expected at most $3"; return 1; }
}

# What may differ from one rank's run. The first loss is a sum in another order: of doubles, printed to 1e-16; 1e-6
# leaves room for a matmul whose rows depend on their number. Gradients are f32 sums of some 1500 tokens in another
# order, 1e-7 to 1e-6 of their size apart. AdamW divides by that size, so a weight whose gradient cancels to nearly
# nothing may go another way by up to two learning rates a step: the largest difference is bounded by 2.04 STEPS lr
# (and, exported as bf16, a rounding of weights below 1). The mean, as a part of how far training moved the weights,
# says whether gradients are right: 1e-6, and where a weight lies at the border of two bf16 values or two codes it falls
# to the other side, what follows rounds differently, and some 1e-4 come of it. Of the losses, which a weight in 10^5
# hardly moves, some 1e-6. A rank's gradient lost or counted twice moves the mean by tenths and losses by 1e-3 and more.
case $precision in
bf16) loss_bound=1e-4 mean_bound=5e-3 ;;
*) loss_bound=1e-5 mean_bound=1e-3 ;;
esac
most_bound=$(awk "BEGIN { print 2.04 * $STEPS * 1e-3 + 2^-8 }")

# near NAME REFERENCE START: prints "first-step loss, losses, weights, mean" and checks them.
near() {
    local first most weights mean
    read -r first most <<<"$(loss_difference "$1" "$2")"
    read -r weights mean _ <<<"$("$compare" "$tmp/$1/model.bin" "$tmp/$2/model.bin" "$tmp/$3/model.bin")"
    echo "$first $most $weights $mean" >"$tmp/near.txt"
    at_most "$1: relative difference of the first loss" "$first" 1e-6 &&
        at_most "$1: relative difference of losses" "$most" "${4:-$loss_bound}" &&
        at_most "$1: difference of weights" "$weights" "${5:-$most_bound}" &&
        at_most "$1: mean difference, a part of the training" "${mean:-nan}" "${6:-$mean_bound}"
}
start_of() { # the weights that training with ARGUMENTS starts from: $tmp/start-NAME
    local name=$1
    shift
    train "start-$name" 1 none 1 "$@" --lr 0 --steps 1
}

# matrix SCHEME ACCUM RANKS...: all levels. Each run lies near that of one rank. On the same ranks `none` equals `optim`
# and `grad` equals `full` to the bit, for they sum the same numbers in the same order; without accumulation, where each
# gradient is summed over ranks once, all four do. Reports a line a number of ranks: the largest of the four levels.
matrix() {
    local scheme=$1 accum=$2 R level name
    shift 2
    start_of "$scheme" --scheme "$scheme" && train "one-$scheme" 1 none 1 --scheme "$scheme" || return 1
    for R in "$@"; do
        : >"$tmp/rows.txt"
        for level in none optim grad full; do
            name=$scheme-$accum-$R-$level
            train "$name" "$R" $level "$accum" --scheme "$scheme" &&
                near "$name" "one-$scheme" "start-$scheme" || return 1
            cat "$tmp/near.txt" >>"$tmp/rows.txt"
        done
        name=$scheme-$accum-$R
        equal "$name-none" "$name-optim" && equal "$name-grad" "$name-full" || return 1
        if [ "$accum" = 1 ]; then equal "$name-none" "$name-full" || return 1; fi
        awk -v who="$R ranks, accumulation $accum, $scheme" '
            { for (i = 1; i <= 4; i++) if ($i > m[i]) m[i] = $i }
            END { printf "report %-36s losses %8.2g   weights %8.2g   mean %8.2g of the training\n", who,
                         m[2], m[3], m[4] }' "$tmp/rows.txt"
    done
}

# Codes and scales between ranks instead of values: the same bits, and the fewer bytes that they promise.
gather_quant_is_full() {
    local scheme quant full
    for scheme in 8da4w-32 int8dq; do
        train "q-$scheme" 3 full 2 --scheme $scheme && train "f-$scheme" 3 full 2 --scheme $scheme --gather full &&
            equal "q-$scheme" "f-$scheme" || return 1
    done
    quant=$(field q-8da4w-32 wire linears) full=$(field f-8da4w-32 wire linears)
    echo "report linears, a step and rank: $quant bytes as codes and scales, $full as $precision"
    # 4 bits and a bf16 scale for 32: 0.5625 bytes, of the 2 or 4 of a value.
    [ "$precision" = fp32 ] && full=$((full / 2))
    at_most "quantized bytes" "$quant" "$(awk "BEGIN { print 0.29 * $full }")"
}

two_runs_equal() {
    train twice-a 3 full 2 --scheme 8da4w-32 && train twice-b 3 full 2 --scheme 8da4w-32 && equal twice-a twice-b
}

# resume_at STEP FROM NAME RANKS LEVEL ACCUM ARGUMENTS...: NAME goes on from a copy of FROM's checkpoint.
resume_at() {
    local step=$1 from=$2 name=$3
    shift 3
    mkdir -p "$tmp/$name" && cp -r "$tmp/$from/step-$step" "$tmp/$name/" || return 1
    echo "step-$step" >"$tmp/$name/latest"
    train "$name" "$@" --resume && grep -q "from step $step" "$tmp/$name.txt"
}

# On the same ranks and level the same bits; so between levels that sum alike; on other ranks to rounding.
resume() {
    local s="--scheme 8da4w-32 --save-every 3 --keep 0" R level
    train whole 3 full 2 $s && resume_at 3 whole part 3 full 2 $s || return 1
    cmp "$tmp/whole/model.bin" "$tmp/part/model.bin" && [ "$(steps whole | tail -n 3)" = "$(steps part)" ] || return 1
    resume_at 3 whole part-grad 3 grad 2 $s && cmp "$tmp/whole/model.bin" "$tmp/part-grad/model.bin" || return 1
    start_of 8da4w-32 --scheme 8da4w-32 || return 1
    for R in 1 ${FULL:+2 4 8}; do
        [ "$R" = 1 ] && level=none || level=full
        resume_at 3 whole "on-$R" "$R" $level 1 $s || return 1
        # The log of the steps before is the other run's.
        { grep '"event": "step"' "$tmp/whole/log.jsonl" | head -n 3; cat "$tmp/on-$R/log.jsonl"; } >"$tmp/joined" &&
            mv "$tmp/joined" "$tmp/on-$R/log.jsonl" && near "on-$R" whole start-8da4w-32 || return 1
        echo "report 3 ranks, then $R: losses, weights, mean differ by $(cut -d ' ' -f 2- "$tmp/near.txt")"
    done
}

# variant NAME RANKS LEVEL ACCUM ARGUMENTS...: near one rank with the same arguments.
variant() {
    local name=$1 R=$2 level=$3 accum=$4
    shift 4
    start_of "$name" "$@" && train "one-$name" 1 none 1 "$@" && train "many-$name" "$R" "$level" "$accum" "$@" &&
        near "many-$name" "one-$name" "start-$name" || return 1
    echo "report first loss, losses, weights, mean differ by $(cat "$tmp/near.txt")"
}
recompute() {
    train re-no 3 full 2 --scheme 8da4w-32 && train re-yes 3 full 2 --scheme 8da4w-32 --recompute block &&
        equal re-no re-yes
}
# SGD divides by nothing: a weight differs as its gradient does, by some 1e-6 of its way.
sgd() {
    local loss_bound=1e-6 most_bound=1e-4 mean_bound=1e-5
    variant sgd "$1" "$2" 1 --scheme none --optimizer sgd --lr 0.05
}

# Validation on three ranks, whose last windows are not there for all of them, is eval's on one to the order of a sum of
# doubles. So is one on the way, with fake quantization not yet begun.
validation() {
    local args="--scheme 8da4w-32 --val-data $tmp/val.txt --val-every 2 --fake-quant-after 3" trained served one many
    train valid 3 full 2 $args || return 1
    "$bin/quantize" "$tmp/valid/model.bin" --out "$tmp/packed.bin" >"$tmp/q.txt" 2>&1 || { cat "$tmp/q.txt"; return 1; }
    "$bin/eval" "$tmp/packed.bin" --val-data "$tmp/val.txt" --seq-len 32 --batch 5 --arithmetic trained \
        --json "$tmp/eval.json" >"$tmp/q.txt" 2>&1 || { cat "$tmp/q.txt"; return 1; }
    trained=$(field valid val loss_fq)
    served=$(sed -n 's/.*"val_loss": *\([^,}]*\).*/\1/p' "$tmp/eval.json" | tail -n 1)
    echo "report trained $trained, scored $served"
    awk -v a="$trained" -v b="$served" 'BEGIN { d = a - b; exit !(a > 0 && b > 0 && (d < 0 ? -d : d) <= 1e-13 * b) }' ||
        { echo "trained $trained, scored $served"; return 1; }
    train valid-one 1 none 1 $args || return 1
    many=$(val_losses valid) one=$(val_losses valid-one)
    [ "$(wc -w <<<"$many")" = 6 ] && at_most "difference of validations" "$(paste <(echo "$many") <(echo "$one") |
        awk '{ d = $1 / $2 - 1; d = d < 0 ? -d : d; if (!(d <= most)) most = d } END { print most + 0 }')" "$loss_bound"
}
val_losses() { # with fake quantization and without, of steps 2, 4 and 6
    grep '"event": "val"' "$tmp/$1/log.jsonl" | grep -o '"loss[_fq]*": [^,}]*' | cut -d ' ' -f 2
}

# Ranks that do not see the same folder, or not the same checkpoint in it, are told so at the start.
apart() { # apart WORD ARGUMENTS...: rank 0 in one folder, rank 1 in another
    local word=$1
    shift
    # shellcheck disable=SC2016
    if mpi_run 2 sh -c 'cd "$0/folder-${OMPI_COMM_WORLD_RANK:-$PMI_RANK}" && exec "$@"' "$tmp" "$bin/train_llama_qat" \
        --init tiny --train-data "$tmp/train.txt" --seq-len 32 --steps 2 --threads 1 "$@"; then
        echo "it ran"
        return 1
    fi >"$tmp/apart.txt" 2>&1
    grep -q "$word" "$tmp/apart.txt" || { cat "$tmp/apart.txt"; return 1; }
}
folders_apart() {
    mkdir -p "$tmp/folder-0" "$tmp/folder-1" && apart "does not see in --out" --out run
}

if [ -n "${FULL:-}" ]; then
    for scheme in 8da4w-32 none; do
        for accum in 1 2; do check "matrix_${scheme}_$accum" matrix $scheme $accum 1 2 3 4 8; done
    done
else
    check matrix_8da4w-32_1 matrix 8da4w-32 1 2
    check matrix_8da4w-32_2 matrix 8da4w-32 2 3
fi
check gather_quant_is_full gather_quant_is_full
check two_runs_equal two_runs_equal
check resume resume
check validation validation
check sgd sgd 3 full
check untied variant untied 3 full 2 --init tiny-untied --scheme 8da4w-32
check embedding_and_head variant emb 3 full 2 --scheme 8da4w-32 --embedding int4,group=32 --head int8,channel
check blocks variant blocks 3 full 2 --weight int5,block=2x16,asymmetric
check recompute recompute
check mixed_rules variant mixed 3 full 2 --scheme int8wo --rule '*layers.0*k_proj*=none' --rule '*up_proj*=int4wo-32'
check folders_apart folders_apart
if [ -n "${FULL:-}" ]; then
    check eight_ranks_sgd sgd 8 grad
    check ste_clip variant clip 4 full 1 --scheme 8da4w-32 --ste clip
    check fake_quant_after variant after 4 full 2 --scheme 8da4w-32 --fake-quant-after 3
    check tensor_scale variant tensor 3 full 2 --weight int8,tensor,symmetric
    check row_codes variant codes 3 full 2 --scheme int8wo
    check rules variant rules 4 full 1 --scheme none --rule '*.mlp.*=8da4w-64' --rule '*.self_attn.[qkv]_proj.*=int8dq'
    check untied_grad variant untied-grad 8 grad 2 --init tiny-untied --scheme int4wo-32
fi
exit $failed
