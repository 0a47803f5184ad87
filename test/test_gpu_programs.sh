#!/bin/bash
# The programs with the CUDA wing: on a machine without a GPU they say so and run on the CPU; with the simulator in the
# GPU's place they train, quantize, generate and score what the CPU does.
# Usage: QLLM_BIN=folder-of-programs test/test_gpu_programs.sh [case]. The simulated programs lie in QLLM_BIN/../sim.
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
sim=$bin/../sim
precision=${QLLM_PRECISION:-bf16}
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cat "$here"/doc/*.md >"$work/text.txt"
head -c 3000 "$here/README.md" >"$work/val.txt"
failed=0
train() {   # BIN OUT OPTIONS...
    local program=$1/train_llama_qat out=$2
    shift 2
    "$program" --init tiny --train-data "$work/text.txt" --scheme 8da4w-32 --batch 1 --seq-len 16 --lr 1e-3 --out "$out" \
        --seed 5 --grad-accum 2 "$@"
}
losses() { sed -n 's/.*"event": *"step".*"loss": *\([^,]*\),.*/\1/p' "$1/log.jsonl"; }
fails() {   # says why on its standard error
    echo "  $*"
    return 1
}

no_gpu() {  # a program that finds no GPU says so, with status 1, and takes the CPU where it may choose
    nvidia-smi -L >/dev/null 2>&1 && { echo "skip no_gpu: this machine has a GPU"; return 2; }
    train "$bin" "$work/a" --steps 1 --device cuda >"$work/log" 2>&1
    [ $? -eq 1 ] || { fails "--device cuda: status is not 1"; return; }
    grep -q -e "device cuda: .*--device cpu" "$work/log" || { fails "the message: $(cat "$work/log")"; return; }
    train "$bin" "$work/a" --steps 1 --device auto >"$work/log" 2>&1 || { fails "--device auto"; return; }
    grep -q "^device  cpu:" "$work/log" || fails "--device auto did not take the CPU"
}
old_gpu() { # compute capability 7.5 is refused by name, and auto takes the CPU
    CUDASIM_CAPABILITY=75 train "$sim" "$work/a" --steps 1 --device cuda >"$work/log" 2>&1
    [ $? -eq 1 ] && grep -q "compute capability 7.5" "$work/log" || { fails "$(cat "$work/log")"; return; }
    CUDASIM_CAPABILITY=75 train "$sim" "$work/a" --steps 1 --device auto 2>&1 | grep -q "^device  cpu:" ||
        fails "--device auto did not take the CPU"
}
small_gpu() {   # what does not fit is said before training, with the batch that does
    CUDASIM_MEMORY=4000000 train "$sim" "$work/a" --steps 1 --device cuda --batch 64 --seq-len 256 >"$work/log" 2>&1
    [ $? -eq 1 ] && grep -q "the largest batch that fits is --batch\|too little for one sequence" "$work/log" ||
        fails "$(tail -n 2 "$work/log")"
}
losses_as_on_the_cpu() { "$here/dev/gpu/compare.sh" "$bin" "$sim" "$precision" 6 tiny 1 16 >"$work/log" 2>&1 || fails "$(cat "$work/log")"; }
same_bits() {   # eager steps, graphs and other orders of the threads give the same weights
    QLLM_NO_GRAPH=1 train "$sim" "$work/eager" --steps 6 --device cuda >"$work/log" 2>&1 || { fails "$(tail -n 2 "$work/log")"; return; }
    CUDASIM_ORDER=7 train "$sim" "$work/graph" --steps 6 --device cuda >"$work/log" 2>&1 || { fails "$(tail -n 2 "$work/log")"; return; }
    cmp "$work/eager/model.bin" "$work/graph/model.bin" || fails "model.bin of eager steps and of a graph differ"
}
resume() {      # stopped after two steps of four: the same file
    train "$sim" "$work/whole" --steps 4 --device cuda --save-every 2 --keep 0 >"$work/log" 2>&1 || { fails "$(tail -n 2 "$work/log")"; return; }
    mkdir -p "$work/part" && cp -r "$work/whole/step-2" "$work/part/" && echo step-2 >"$work/part/latest"
    train "$sim" "$work/part" --steps 4 --device cuda --resume >"$work/log" 2>&1 || { fails "$(tail -n 2 "$work/log")"; return; }
    grep -q "from step 2" "$work/log" && cmp "$work/whole/model.bin" "$work/part/model.bin" || fails "resumed weights differ"
}
recompute_and_clip() {  # the masks of --ste clip, --recompute block and SGD take the same operations on both
    for device in cpu cuda; do
        if [ $device = cpu ]; then p=$bin; else p=$sim; fi
        train $p "$work/r-$device" --steps 3 --device $device --ste clip --recompute block --optimizer sgd --no-save \
            >"$work/log" 2>&1 || { fails "$(tail -n 2 "$work/log")"; return; }
    done
    paste <(losses "$work/r-cpu") <(losses "$work/r-cuda") |
        awk '{ d = $1 - $2; if (d < 0) d = -d; if (!(d <= 5e-3 * $1)) bad = 1 } END { exit bad || NR != 3 }' ||
        fails "losses: $(losses "$work/r-cpu" | xargs) and $(losses "$work/r-cuda" | xargs)"
}
val_loss() { sed -n 's/.*"val_loss": *\([^,]*\),.*/\1/p' "$1" | tail -n 1; }
serve() {       # quantized by the CPU; scored token by token and continued by both: equal text, losses equal to rounding
    head -c 100 "$work/val.txt" >"$work/short.txt"
    train "$bin" "$work/m" --steps 6 --device cpu >/dev/null 2>&1
    for scheme in 8da4w-32 int4wo-32 int8wo int8dq; do
        "$bin/quantize" "$work/m/model.bin" --scheme $scheme --out "$work/$scheme.bin" --quiet >"$work/log" 2>&1 ||
            { fails "quantize: $(tail -n 2 "$work/log")"; return; }
        for device in cpu cuda; do
            if [ $device = cpu ]; then p=$bin; else p=$sim; fi
            "$p/eval" "$work/$scheme.bin" --device $device --arithmetic served --val-data "$work/short.txt" --seq-len 16 \
                --step 1 --batch 2 --json "$work/e-$device" >"$work/log" 2>&1 || { fails "eval: $(tail -n 2 "$work/log")"; return; }
            "$p/generate" "$work/$scheme.bin" --device $device --prompt "The floor plan" --max-new-tokens 6 --temperature 0 \
                >"$work/g-$device" 2>"$work/log" || { fails "generate: $(tail -n 2 "$work/log")"; return; }
        done
        echo "$(val_loss "$work/e-cpu") $(val_loss "$work/e-cuda")" |
            awk '{ d = $1 - $2; if (d < 0) d = -d; exit !(NF == 2 && d <= 5e-3 * $1) }' ||
            { fails "$scheme: losses $(val_loss "$work/e-cpu") and $(val_loss "$work/e-cuda")"; return; }
        cmp <(head -n 1 "$work/g-cpu") <(head -n 1 "$work/g-cuda") || { fails "$scheme: greedy text differs"; return; }
    done
}
decode_graph() {        # tokens by a graph that is replayed, and by kernels one after the other: the same text, drawn or not
    [ -f "$work/m/model.bin" ] || train "$bin" "$work/m" --steps 6 --device cpu >/dev/null 2>&1
    "$bin/quantize" "$work/m/model.bin" --scheme 8da4w-32 --out "$work/d.bin" --quiet >"$work/log" 2>&1 ||
        { fails "quantize: $(tail -n 2 "$work/log")"; return; }
    local options
    for options in "--temperature 0" "--temperature 0 --kv int8" "--temperature 1 --top-k 40 --top-p 0.9 --seed 3"; do
        for way in graph eager cpu; do
            if [ $way = cpu ]; then set -- "$bin/generate" --device cpu; else set -- "$sim/generate" --device cuda; fi
            # shellcheck disable=SC2086
            env $([ $way = eager ] && echo QLLM_NO_GRAPH=1) "$1" "$work/d.bin" "$2" "$3" --prompt "The floor plan" \
                --max-new-tokens 40 $options >"$work/g-$way" 2>"$work/log" || { fails "$way: $(tail -n 2 "$work/log")"; return; }
        done
        cmp "$work/g-graph" "$work/g-eager" || { fails "$options: a graph and eager kernels differ"; return; }
        # Further on a rounding may turn a choice between tokens that are nearly as likely.
        cmp -n 24 "$work/g-graph" "$work/g-cpu" || { fails "$options: the CPU says otherwise"; return; }
    done
}
trained_is_served() {   # the trainer's last validation and eval of the packed file: the same loss to the last digit
    train "$sim" "$work/t" --steps 2 --device cuda --val-data "$work/val.txt" --val-every 0 >"$work/log" 2>&1 ||
        { fails "$(tail -n 2 "$work/log")"; return; }
    local trained served
    trained=$(sed -n 's/^val .* 8da4w-32 loss \([0-9.]*\) .*/\1/p' "$work/log" | tail -n 1)
    "$sim/quantize" "$work/t/model.bin" --out "$work/t.bin" --quiet >"$work/log" 2>&1 &&
        "$sim/eval" "$work/t.bin" --device cuda --val-data "$work/val.txt" --seq-len 16 >"$work/log" 2>&1 ||
        { fails "$(tail -n 2 "$work/log")"; return; }
    served=$(cat "$work/log")
    case $served in *"$trained"*) [ -n "$trained" ] ;; *) fails "trained $trained, served: $served" ;; esac
}

int8_training() {       # two orders of the threads, eager and in a graph, and a resumed run: the same file, which is what is served
    qt() {  # OUT OPTIONS...
        local out=$1
        shift
        "$sim/train_llama_qt" --init tiny --train-data "$work/text.txt" --batch 1 --seq-len 16 --lr 1e-3 --out "$out" --seed 5 \
            --device cuda --matmul int8 --optim-state int8 --steps 4 "$@" >"$work/log" 2>&1 || fails "$(tail -n 2 "$work/log")"
    }
    qt "$work/q1" --save-every 2 --keep 0 && QLLM_NO_GRAPH=1 CUDASIM_ORDER=7 qt "$work/q2" || return
    mkdir -p "$work/q3" && cp -r "$work/q1/step-2" "$work/q3/" && echo step-2 >"$work/q3/latest"
    qt "$work/q3" --resume --val-data "$work/val.txt" --val-every 0 || return
    cmp "$work/q1/model.bin" "$work/q2/model.bin" && cmp "$work/q1/model.bin" "$work/q3/model.bin" || { fails "files differ"; return; }
    local trained served
    trained=$(sed -n 's/^val .* loss \([0-9.]*\) .*/\1/p' "$work/log" | tail -n 1)
    served=$("$sim/eval" "$work/q3/model.bin" --device cuda --val-data "$work/val.txt" --seq-len 16 2>&1)
    case $served in *"$trained"*) [ -n "$trained" ] ;; *) fails "trained $trained, served: $served" ;; esac
}

for name in no_gpu old_gpu small_gpu losses_as_on_the_cpu same_bits resume recompute_and_clip serve decode_graph trained_is_served int8_training; do
    [ $# -gt 0 ] && [ "$1" != $name ] && continue
    if [ $name != no_gpu ] && [ ! -x "$sim/train_llama_qat" ]; then
        echo "skip $name: the simulated programs are not built (make sim-programs)"
        continue
    fi
    $name
    case $? in
    0) echo "ok $name" ;;
    2) ;;
    *) echo "not ok $name"; failed=1 ;;
    esac
done
exit $failed
