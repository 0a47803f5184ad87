#!/bin/sh
# The programs together: two runs are bit-equal, a stopped run goes on bit-equal, what is trained is what is served.
# Usage: QLLM_BIN=folder-of-programs test/test_train.sh [case]. Prints "ok NAME" or "not ok NAME" a case.
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
failed=0
only=${1:-}

# A text without an author: sentences drawn from a small grammar by a linear congruential generator.
awk -v seed=1 -v lines=1200 -f test/babble.awk > "$tmp/train.txt"
awk -v seed=2 -v lines=120 -f test/babble.awk > "$tmp/val.txt"

train() { out=$1; shift; "$bin/train_llama_qat" --init tiny --train-data "$tmp/train.txt" --val-data "$tmp/val.txt" --batch 4 --seq-len 64 \
    --lr 3e-3 --warmup 2 --val-every 0 --out "$tmp/$out" "$@" > "$tmp/$out.txt" 2>&1 || { cat "$tmp/$out.txt"; return 1; }; }
# The losses of the steps, the norms too, as the log has them.
steps() { sed -n 's/.*"event": "step", .*"step": \([0-9]*\), "loss": \([^,]*\), "norm": \([^,]*\),.*/\1 \2 \3/p' "$tmp/$1/log.jsonl"; }
last_val() { sed -n 's/.*"event": "val".*"loss_fq": \([^,}]*\).*/\1/p' "$tmp/$1/log.jsonl" | tail -n 1; }

check() { # check NAME command...: runs a case
    name=$1; shift
    if [ -n "$only" ] && [ "$only" != "$name" ]; then return; fi
    if "$@" > "$tmp/case.txt" 2>&1; then echo "ok $name"; else echo "not ok $name"; sed 's/^/    /' "$tmp/case.txt"; failed=1; fi
}

two_runs_equal() {
    train a --steps 12 --scheme 8da4w-32 && train b --steps 12 --scheme 8da4w-32 --threads 1 || return 1
    [ "$(steps a | wc -l)" = 12 ] && [ "$(steps a)" = "$(steps b)" ] && cmp "$tmp/a/model.bin" "$tmp/b/model.bin"
}

# From a checkpoint on the way, and from the one a signal leaves.
resume_equal() {
    for opt in "--optimizer adamw" "--optimizer sgd --recompute block --ste clip" "--fake-quant-after 7 --grad-accum 2" \
        "--grad-weight int8"; do
        rm -rf "$tmp/c" "$tmp/d"
        train c --steps 12 --scheme int4wo-32 --save-every 5 --keep 0 $opt || return 1
        mkdir "$tmp/d" && cp -r "$tmp/c/step-5" "$tmp/d/" && echo step-5 > "$tmp/d/latest"
        train d --steps 12 --scheme int4wo-32 --resume $opt || return 1
        cmp "$tmp/c/model.bin" "$tmp/d/model.bin" && [ "$(steps c | tail -n 7)" = "$(steps d)" ] || return 1
    done
}

signal_saves() {
    train straight --steps 400 --scheme 8da4w-32 || return 1
    "$bin/train_llama_qat" --init tiny --train-data "$tmp/train.txt" --val-data "$tmp/val.txt" --batch 4 --seq-len 64 --lr 3e-3 --warmup 2 \
        --val-every 0 --out "$tmp/stopped" --steps 400 --scheme 8da4w-32 > "$tmp/stopped.txt" 2>&1 &
    pid=$!
    while kill -0 $pid 2>/dev/null && [ "$(grep -c '^step' "$tmp/stopped.txt")" -lt 20 ]; do sleep 0.05; done
    kill -TERM $pid
    wait $pid || return 1
    [ -f "$tmp/stopped/model.bin" ] && { echo "the run ended before it was stopped"; return 1; }
    train stopped --steps 400 --scheme 8da4w-32 --resume || return 1
    cmp "$tmp/straight/model.bin" "$tmp/stopped/model.bin"
}

# --forward integer trains with the very products that are served: the last loss is that of eval --arithmetic served,
# which is not that of trained arithmetic. In steps the three forwards agree to about a hundredth.
integer_is_served() {
    for scheme in 8da4w-32 8da4w-64 int8dq; do
        for opt in "" "--ste clip --recompute block --grad-accum 2" "--fake-quant-after 3" "--grad-weight int8" \
            "--init tiny-untied --ste clip --grad-accum 2"; do
            rm -rf "$tmp/i" "$tmp/packed.bin"
            train i --steps 6 --scheme "$scheme" --forward integer $opt &&
                "$bin/quantize" "$tmp/i/model.bin" --out "$tmp/packed.bin" --quiet > /dev/null || return 1
            want=$(last_val i)
            for arith in served trained; do
                "$bin/eval" "$tmp/packed.bin" --val-data "$tmp/val.txt" --seq-len 64 --arithmetic $arith \
                    --json "$tmp/i.json" > "$tmp/eval.txt" 2>&1 || { cat "$tmp/eval.txt"; return 1; }
            done
            served=$(sed -n 's/.*"val_loss": \([^,}]*\).*/\1/p' "$tmp/i.json" | sed -n 1p)
            trained=$(sed -n 's/.*"val_loss": \([^,}]*\).*/\1/p' "$tmp/i.json" | sed -n 2p)
            rm -f "$tmp/i.json"
            echo "$scheme $opt: trainer $want, served $served, trained $trained"
            [ -n "$want" ] && [ "$want" = "$served" ] && [ "$want" != "$trained" ] || return 1
        done
    done
    train f --steps 6 --scheme int8dq && train i --steps 6 --scheme int8dq --forward integer || return 1
    steps f > "$tmp/f.s" && steps i > "$tmp/i.s"
    paste -d ' ' "$tmp/f.s" "$tmp/i.s" | awk '{ d = $2 - $5; if (d < 0) d = -d; if (!(d < 0.02)) bad = 1; n++ }
            END { exit bad || n != 6 }'
}

# --grad-weight int8 changes no forward: the first loss is the same in every digit. The gradient's norm is not, but is
# near: each of its products of columns is quantized to 127 steps of the column's largest value.
int8_gradients() {
    for opt in "--scheme none" "--scheme int4wo-32" "--scheme 8da4w-32 --forward integer" \
        "--scheme int8dq --grad-accum 2 --recompute block"; do
        rm -rf "$tmp/f" "$tmp/g"
        train f --steps 6 $opt && train g --steps 6 $opt --grad-weight int8 || return 1
        steps f > "$tmp/f.s" && steps g > "$tmp/g.s"
        paste -d ' ' "$tmp/f.s" "$tmp/g.s" | tee "$tmp/both.s" | awk 'function off(a, b) { return a > b ? a - b : b - a }
                NR == 1 && ($2 != $5 || $3 == $6) { bad = 1 }
                !(off($2, $5) < 0.02) || !(off($3, $6) < 0.05 * $3) { bad = 1 } { n++ }
                END { exit bad || n != 6 }' || { echo "$opt"; cat "$tmp/both.s"; return 1; }
    done
}

# What cannot go together is refused before anything is trained.
integer_is_refused() {
    for opt in "--scheme int4wo-32" "--scheme none" "--scheme 8da4w-32 --master bf16-sr" \
        "--weight uint4,group=32,asymmetric --activation int8,token,asymmetric" \
        "--scheme 8da4w-32 --rule *k_proj.weight=int4,group=16;int8,token,asymmetric"; do
        if train no --steps 2 --forward integer $opt > "$tmp/said.txt"; then echo "taken: $opt"; return 1; fi
        grep -q -e '--forward' "$tmp/said.txt" || { cat "$tmp/said.txt"; return 1; }
    done
}

# What is trained is what is served, for every scheme: the packed file scores the very loss that the trainer printed last,
# and packing the exported Hugging Face folder gives the same bytes of codes and scales.
served_is_trained() {
    for scheme in int8wo int8dq int4wo-32 int4wo-64 8da4w-32 8da4w-64 int3-32 int2-16 int5-32 int6-64 int7-32; do
        one_scheme "$scheme" "--scheme $scheme" || return 1
    done
    one_scheme emb "--scheme 8da4w-32 --embedding int4,group=32" || return 1
    one_scheme head "--scheme int4wo-32 --embedding int8,channel --head int8,channel" || return 1
    one_scheme rules "--scheme none --rule *.mlp.*=8da4w-64 --rule *.self_attn.[qkv]_proj.*=int8dq" || return 1
    one_scheme general "--weight int4,group=32,symmetric-no-clip --activation int8,token,symmetric" || return 1
    one_scheme blocks "--weight int5,block=2x16,asymmetric" || return 1
    one_scheme tensor "--weight int8,tensor,symmetric" || return 1
    one_scheme uneven "--weight int8,symmetric-no-clip,range=-100..127" || return 1
}
score() { "$bin/eval" "$1" --val-data "$tmp/val.txt" --seq-len 64 --batch 3 --arithmetic trained --json "$tmp/s.json" > "$tmp/e.txt" 2>&1 ||
    cat "$tmp/e.txt" >&2; sed -n 's/.*"val_loss": *\([^,}]*\).*/\1/p' "$tmp/s.json" | tail -n 1; }
one_scheme() {
    rm -rf "$tmp/s" "$tmp/s.json"
    set -f
    train s --steps 4 --hf $2 || { echo "$1: training failed"; return 1; }
    set +f
    packed="$tmp/s/packed.bin"
    "$bin/quantize" "$tmp/s/model.bin" --out "$packed" > "$tmp/q.txt" 2>&1 || { echo "$1: quantize failed"; cat "$tmp/q.txt"; return 1; }
    trained=$(last_val s)
    served=$(score "$packed")
    [ -n "$trained" ] && [ "$trained" = "$served" ] || { echo "$1: trained $trained, served $served"; return 1; }
    # The exported folder holds the same weights: packing it gives the same codes, so the same loss to the last bit.
    case $2 in "--scheme $1")
        "$bin/quantize" "$tmp/s/hf" --scheme "$1" --out "$packed" > "$tmp/q.txt" 2>&1 || { cat "$tmp/q.txt"; return 1; }
        [ "$trained" = "$(score "$packed")" ] || { echo "$1: the exported folder, packed, scores another loss"; return 1; } ;;
    esac
    echo "$1: $trained"
}

# A parser that accepts anything would accept these. Each: expected status, a word of the message, options.
bad_input() {
    : > "$tmp/empty.txt"
    printf 'x' > "$tmp/one.txt"
    head -c 100 /dev/zero > "$tmp/zeros.bin"
    expect 2 train-data --init tiny &&
    expect 2 "either --model" --train-data "$tmp/train.txt" &&
    expect 2 shape --init nosuch --train-data "$tmp/train.txt" &&
    expect 2 "lr" --init tiny --train-data "$tmp/train.txt" --lr -1 &&
    expect 2 "steps" --init tiny --train-data "$tmp/train.txt" --stepz 3 &&
    expect 2 "divide" --init tiny --train-data "$tmp/train.txt" --scheme 8da4w-48 &&
    expect 2 "scheme" --init tiny --train-data "$tmp/train.txt" --scheme int44 &&
    expect 2 "train_llama_qt" --init tiny --train-data "$tmp/train.txt" --scheme int8qt &&
    expect 2 "positions" --init tiny --train-data "$tmp/train.txt" --seq-len 100000 &&
    expect 2 "activation" --init tiny --train-data "$tmp/train.txt" --seq-len 64 --scheme none --rule '*.q_proj.*=8da4w-32' &&
    expect 2 "empty" --init tiny --train-data "$tmp/empty.txt" &&
    expect 2 "token" --init tiny --train-data "$tmp/one.txt" &&
    expect 2 "nosuch" --init tiny --train-data "$tmp/nosuch.txt" &&
    expect 1 "zeros.bin" --init tiny --train-data "$tmp/zeros.bin" &&
    expect 1 "zeros.bin" --model "$tmp/zeros.bin" --train-data "$tmp/train.txt" &&
    expect 2 "tpu" --init tiny --train-data "$tmp/train.txt" --device tpu
}
expect() {
    status=$1 word=$2; shift 2
    "$bin/train_llama_qat" --out "$tmp/bad" --steps 1 "$@" > "$tmp/bad.txt" 2>&1
    got=$?
    [ "$got" = "$status" ] && grep -qi -- "$word" "$tmp/bad.txt" && return 0
    echo "train_llama_qat $*: status $got, expected $status and a message with \"$word\":"; cat "$tmp/bad.txt"
    return 1
}

# A learning rate that blows up ends with a message after the stated number of steps, not with a model full of NaN.
nan_stops() {
    train nan --steps 40 --scheme none --lr 10 --warmup 0 --clip 0 --max-skips 3 --optimizer sgd --momentum 0.99 && { echo "it went on"; return 1; }
    grep -q 'in a row' "$tmp/nan.txt" && [ ! -e "$tmp/nan/model.bin" ]
}

# A checkpoint of other settings, or with a damaged file, is refused and named.
resume_refuses() {
    train e --steps 3 --scheme 8da4w-32 || return 1
    train e --steps 6 --scheme int4wo-32 --resume && { echo "resumed with another scheme"; return 1; }
    grep -q 'scheme' "$tmp/e.txt" || return 1
    train e --steps 6 --scheme 8da4w-32 --resume --grad-weight int8 && { echo "resumed with other products"; return 1; }
    grep -q 'integer products grad_weight' "$tmp/e.txt" || { cat "$tmp/e.txt"; return 1; }
    truncate -s -100 "$tmp/e/step-3/rank-00000-of-00001.safetensors"
    train e --steps 6 --scheme 8da4w-32 --resume && { echo "resumed from a truncated file"; return 1; }
    grep -q 'rank-00000-of-00001.safetensors' "$tmp/e.txt"
}

check two_runs_equal two_runs_equal
check resume_equal resume_equal
check signal_saves signal_saves
check served_is_trained served_is_trained
check integer_is_served integer_is_served
check integer_is_refused integer_is_refused
check int8_gradients int8_gradients
check bad_input bad_input
check nan_stops nan_stops
check resume_refuses resume_refuses
exit $failed
