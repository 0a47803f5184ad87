#!/bin/bash
# Sharded training on a GPU against training that is not: dev/gpu/ranks.sh GPU-PROGRAMS PRECISION [SHAPE B T]
#   one rank that gathers, sends and sums for itself: the weights of one that does not, to the bit
#   two ranks on this GPU, through the host's memory (--comm mpi): the losses of one, to rounding
#   where there are two GPUs and NCCL: the weights of the way through the host, to the bit
# GPU-PROGRAMS may be simulated ones. What needs MPI is left out without it. Lines "ok NAME", "not ok NAME", "skip NAME".
set -u
cd "$(dirname "$0")/../.." || exit 1
programs=${1:?folder of programs} precision=${2:?bf16 or fp32}
shape=${3:-tiny} B=${4:-2} T=${5:-16}
trainer=$programs/train_llama_qat
. scripts/mpi.sh
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cat doc/*.md >"$work/text.txt"
failed=0

# train OUT RANKS ARGUMENTS...
train() {
    local out=$work/$1 R=$2
    shift 2
    set -- "$trainer" --init "$shape" --train-data "$work/text.txt" --scheme 8da4w-32 --device cuda --seq-len "$T" \
        --batch $((B / R)) --grad-accum 2 --steps 4 --lr 1e-3 --schedule constant --clip 0 --out "$out" "$@"
    if [ "$R" = 1 ]; then "$@"; else mpi_run "$R" "$@"; fi >"$out.txt" 2>&1 || { tail -n 3 "$out.txt"; return 1; }
}
losses() { sed -n 's/.*"event": "step".*"loss": \([^,]*\),.*/\1/p' "$work/$1/log.jsonl"; }
near() {    # near A B: losses, relative; those of bf16 pass matmuls of another number of rows
    paste <(losses "$1") <(losses "$2") | awk -v bound="$([ "$precision" = fp32 ] && echo 2e-4 || echo 5e-3)" '
        { d = $1 / $2 - 1; d = d < 0 ? -d : d; if (!(d <= most)) most = d }
        END { printf "largest relative difference of losses %.2g, allowed %g\n", most, bound
              exit !(NR == 4 && most <= bound) }'
}
check() { # check NAME COMMAND...
    local name=$1
    shift
    if "$@" >"$work/case.txt" 2>&1; then echo "ok $name"; else echo "not ok $name"; sed 's/^/    /' "$work/case.txt"; failed=1; fi
}

# With one micro-step a gradient is summed once, in whatever place; clipping aside nothing depends on the order of the norm.
itself() {
    train none 1 --shard none --grad-accum 1 && train full 1 --shard full --grad-accum 1 &&
        cmp "$work/none/model.bin" "$work/full/model.bin"
}
shared() { train one 1 && train two 2 --comm mpi && near one two; }
nccl() { train nccl 2 --comm nccl && cmp "$work/two/model.bin" "$work/nccl/model.bin"; }

check one_rank_sharded itself
if why=$(mpi_missing "$trainer"); then
    echo "skip two ranks: $why"
else
    check two_ranks_share_a_gpu shared
    gpus=${CUDASIM_DEVICES:-$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')}
    if [ "$gpus" -ge 2 ]; then check two_ranks_by_nccl nccl; else echo "skip two_ranks_by_nccl: one GPU"; fi
fi
exit $failed
