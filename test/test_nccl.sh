#!/bin/bash
# NCCL's wing between ranks with simulated GPUs, over the stand-in dev/ncclsim: the bytes are those that MPI brings, a
# forgotten wait shows, and mistakes in the use of NCCL are caught.
# Usage: QLLM_BIN=folder-of-programs test/test_nccl.sh [case]
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
sim=$bin/../sim
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
. "$here/scripts/mpi.sh"
only=${1:-}
failed=0

say() {     # NAME STATUS: prints the line of a case, and what was said if it failed
    if [ "$2" -eq 0 ]; then echo "ok $1"; return; fi
    echo "not ok $1"
    head -n 20 "$work/log" | sed 's/^/  /'
    failed=1
}
wanted() { case $1 in *"$only"*) return 0 ;; *) return 1 ;; esac; }
run() {     # RANKS PROGRAM ARGUMENTS... with a GPU a rank, unless GPUS says otherwise
    CUDASIM_DEVICES=${GPUS:-$1} mpi_run "$1" "$sim/$2" "${@:3}" >"$work/log" 2>&1
}
wing() {    # NAME RANKS ARGUMENTS...
    wanted "$1" || return
    run "$2" nccl_wing "${@:3}"
    say "$1" $?
}
caught() {  # MISTAKE RANKS TEXT: the ranks end, and one says the text
    wanted "caught_$1" || return
    NCCLSIM_TIMEOUT=2 run "$2" nccl_rules "$1"
    local status=$?
    [ $status -ne 0 ] && grep -q "^ncclsim: rank [0-9]*: .*$3" "$work/log" && ! grep -q "not caught" "$work/log"
    say "caught_$1" $?
}

command -v "${CXX:-g++}" >/dev/null 2>&1 || { echo "skip nccl: no C++ compiler (apt-get install g++)"; exit 0; }
[ -x "$sim/nccl_wing" ] || { echo "skip nccl: built without MPI (apt-get install libopenmpi-dev openmpi-bin)"; exit 0; }
if why=$(mpi_missing "$sim/nccl_wing"); then echo "skip nccl: $why"; exit 0; fi

for R in 2 3; do
    wing same_$R $R same
    wing ahead_$R $R ahead
    wing unwaited_$R $R unwaited
done
wing recorded 2 recorded
wing given_up 2 given_up
# Who does not see the error is stuck.
NCCLSIM_ASYNC_ERROR=3 MPI_TIMEOUT=20 wing broken 2 broken
for how in late copy; do
    NCCLSIM_ASYNC_ERROR=3 NCCLSIM_ASYNC_AFTER=0.05 MPI_TIMEOUT=20 wing broken_$how 2 broken_$how
done
GPUS=2 wing shares_2 3 shares
GPUS=1 wing shares_1 2 shares
GPUS=4 wing shares_4 3 shares

profiled() {    # both lanes stand in the file of each rank
    run 2 nccl_wing profiled "$work/timeline.json" || return
    for f in "$work/timeline.json" "$work/timeline.json.rank1"; do
        [ "$(grep -c '"all_gather","ph":"X".*"tid":1}' "$f")" -eq 4 ] &&
            [ "$(grep -c '"all_to_all","ph":"X".*"tid":1}' "$f")" -eq 4 ] &&
            [ "$(grep -c '"mask_backward","ph":"X".*"tid":0}' "$f")" -eq 4 ] || return
    done
}
wanted profiled && { profiled; say profiled $?; }

# The trainer, which shards all there is: the weights are those of the way through MPI.
train() {   # COMM OUT ORDER
    CUDASIM_DEVICES=2 CUDASIM_ORDER=$3 mpi_run 2 "$sim/train_llama_qat" --init tiny --train-data "$work/text.txt" \
        --scheme 8da4w-32 --batch 1 --seq-len 16 --lr 1e-3 --seed 5 --grad-accum 2 --steps 2 --shard full \
        --device cuda --comm "$1" --out "$work/$2" >"$work/log" 2>&1
}
trained() {
    cat "$here"/doc/*.md >"$work/text.txt"
    train mpi mpi 0 && train nccl late 1 && train nccl random 9 || return
    grep -q "NCCL 2" "$work/log" || { echo "NCCL was not taken" >>"$work/log"; return 1; }
    cmp "$work/mpi/model.bin" "$work/late/model.bin" && cmp "$work/mpi/model.bin" "$work/random/model.bin"
} 2>>"$work/log" >&2
wanted trained && { trained; say trained $?; }

# A launcher that shows each rank one GPU: another one each, or the same.
one_visible() {
    set -- "$sim/train_llama_qat" --init tiny --train-data "$here/README.md" --batch 1 --seq-len 16 --steps 1 --no-save \
        --device cuda --comm nccl --out "$work/visible"
    # shellcheck disable=SC2016
    CUDASIM_DEVICES=1 mpi_run 2 sh -c 'CUDASIM_FIRST=${OMPI_COMM_WORLD_RANK:-${PMI_RANK}} exec "$@"' sh "$@" \
        >"$work/log" 2>&1 || return
    grep -q "NCCL 2" "$work/log" || return
    ! CUDASIM_DEVICES=1 mpi_run 2 "$@" >"$work/log" 2>&1 && grep -q "2 ranks share GPU 0\|shares GPU 0" "$work/log"
}
wanted one_visible && { one_visible; say one_visible $?; }

# The stand-in itself, which knows nothing of the precision.
[ "${QLLM_PRECISION:-bf16}" = fp32 ] && [ -z "$only" ] && exit $failed
for order in 0 1 5; do
    wanted rules_kept && { run 3 nccl_rules none $order; say rules_kept_$order $?; }
done
wanted early && { run 2 nccl_rules early; say early $?; }
caught order 2 "these are different operations"
caught count 3 "ncclAllGather(6[45] uint8).* counts or types differ"
caught type 2 "float32.*int32.*differ\|int32.*float32.*differ"
caught no_group 2 "stands in no group"
caught missing_receive 2 "sends is not what the \(first\|second\) receives"
caught unequal_bytes 3 "sends is not what the \(first\|second\) receives"
caught missing_self 2 "what it sends to itself"
caught host_memory 2 "in device memory"
caught past_the_end 2 "in device memory"
caught freed 2 "in device memory"
caught overlap 2 "overlaps"
caught destroyed 2 "was destroyed"
caught aborted 2 "was destroyed or aborted"
caught destroyed_early 2 "still in a stream"
caught captured 2 "being captured"
caught fewer 2 "come to its end\|different operations"
caught absent 2 "waits in vain for rank 1"
caught send_changed 2 "changed meanwhile"
caught receive_written 2 "written to meanwhile"
caught two_streams 2 "on two streams"
caught other_id 2 "another id"
exit $failed
