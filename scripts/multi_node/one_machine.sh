#!/bin/bash
# Trains with all of one machine: a rank a GPU or, where there is none, a rank a socket; restarted when it fails.
#   scripts/multi_node/one_machine.sh [-n RANKS] [-c CORES] ./train_llama_qat --model M --train-data D --out RUN ...
#   -n RANKS   another number of ranks
#   -c CORES   cores that each rank is bound to (default: an equal share; 0: not bound)
# lib.sh lists what the environment may set; rank N's output is in RUN/logs/rank-N.txt. Ctrl-C saves and leaves.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/multi_node/lib.sh
. "$here/lib.sh"
usage() { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

ranks='' cores=''
while getopts n:c:h option; do
    case $option in
    n) ranks=$OPTARG ;;
    c) cores=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage
[[ ${ranks:-1} =~ ^[1-9][0-9]*$ ]] || fail "-n $ranks: expected a number of ranks"
[[ ${cores:-0} =~ ^[0-9]+$ ]] || fail "-c $cores: expected a number of cores"
! why=$(mpi_missing "") || fail "$why"

# --- NCCL on one machine: uncomment to change; all NCCL_ variables reach the ranks -----------------------------------
# export NCCL_DEBUG=WARN            # INFO prints rings, links and transports: the first thing to read when it is slow
# export NCCL_P2P_DISABLE=1         # GPUs hang or garble in direct copies (virtual machines, IOMMU): by way of memory
# export NCCL_SHM_DISABLE=1         # /dev/shm is too small (containers: give them --shm-size=1g instead)
# export NCCL_NVLS_ENABLE=0         # NVLink multicast fails to initialize (driver or fabric manager): without it
# export CUDA_VISIBLE_DEVICES=0,1   # only these GPUs: as many ranks
gpus=$(gpus_here) here_cores=$(cores_here)
[ -n "$ranks" ] || { [ "$gpus" -gt 0 ] && ranks=$gpus; } || ranks=$(sockets_here)
if [ "$gpus" -gt 0 ] && [ "$ranks" -gt "$gpus" ]; then
    note "$ranks ranks share $gpus GPUs: NCCL cannot do that; the ranks take --comm mpi, through the host's memory"
fi
cores=${cores:-$((here_cores / ranks))}
more=()
if [ "$cores" = 0 ] && [ "$ranks" -gt "$here_cores" ]; then
    export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}    # threads that wait asleep: others need their core
    has_option --threads "$@" || more=(--threads 1)
fi
note "$ranks ranks, $gpus GPUs, $([ "$cores" = 0 ] && echo "not bound" || echo "$cores of $here_cores cores a rank")"
launch() {
    mpi_command "$ranks" "$ranks" "$cores" ""
    exec "${mpi[@]}" "$@"
}
ranks_are_children=1
multi_run "$@" ${more[@]+"${more[@]}"}
