#!/bin/bash
# Trains the same model on the CPU and on the GPU (or its simulator) and compares the losses step by step:
#   dev/gpu/compare.sh CPU_BIN GPU_BIN PRECISION [STEPS [INIT [BATCH [SEQ_LEN]]]]
# The two sum in different orders; what follows from that is bounded by TOLERANCE, relative to the loss: rounding of
# bf16 activations (2^-9) enters the loss of the first step at a thousandth of its size, and the updates carry it on;
# under fake quantization, and where INT8 weights are rounded, a code may flip besides. Prints for each scheme: ok or not ok, and the largest difference.
set -u
cpu=$1 gpu=$2 precision=$3 steps=${4:-20} init=${5:-1M} batch=${6:-4} seq=${7:-128}
here=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
if [ "$precision" = fp32 ]; then tolerance=2e-4; else tolerance=5e-3; fi
cat "$here"/doc/*.md >"$work/text.txt"
losses() { sed -n 's/.*"event": *"step".*"loss": *\([0-9.e+-]*\).*/\1/p' "$1/log.jsonl"; }
failed=0
for scheme in none 8da4w-32 int4wo-32 qt-weight-only qt-int8; do
    case $scheme in
    qt-*) program=(train_llama_qt --matmul "${scheme#qt-}" --optim-state int8) ;;
    *) program=(train_llama_qat --scheme "$scheme") ;;
    esac
    for device in cpu cuda; do
        bin=$cpu
        [ $device = cuda ] && bin=$gpu
        if ! "$bin/${program[0]}" "${program[@]:1}" --init "$init" --train-data "$work/text.txt" --steps "$steps" \
            --batch "$batch" --seq-len "$seq" --grad-accum 2 --lr 1e-3 --warmup 4 --device $device \
            --out "$work/$scheme-$device" >"$work/log" 2>&1; then
            echo "not ok losses $precision $scheme: ${program[0]} --device $device failed"
            tail -n 3 "$work/log"
            failed=1
            continue 2
        fi
    done
    losses "$work/$scheme-cpu" >"$work/a"
    losses "$work/$scheme-cuda" >"$work/b"
    paste "$work/a" "$work/b" | awk -v steps="$steps" -v tol=$tolerance -v name="$precision $scheme" '
        { d = ($2 - $1) / $1; if (d < 0) d = -d
          if (!(d <= worst)) { worst = d; at = NR }
          n += NF == 2; first = NR == 1 ? $1 : first; last = $2 }
        END { ok = n == steps && worst <= tol
              printf "%s losses %s: %d steps, %.4f to %.4f, ", ok ? "ok" : "not ok", name, n, first, last
              printf "largest relative difference %.1e at step %d (allowed %.0e)\n", worst, at, tol
              exit !ok }' || failed=1
done
exit $failed
