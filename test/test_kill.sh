#!/bin/bash
# Training runs that are killed, and what is left of them: test/mpi/kill_harness.c says what is looked at.
# Usage: [KILLS=200] [SEED=1] QLLM_BIN=folder-of-programs test/test_kill.sh [campaign, or "special"]
# Last line: N passed, N failed.
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
harness=$(dirname "$bin")/test/mpi/kill_harness
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
. scripts/mpi.sh
[ -x "$harness" ] || { echo "not ok kill: $harness was not built"; exit 1; }

awk -v seed=1 -v lines=600 -f test/babble.awk >"$tmp/train.txt"
set -- ${1:+--only "$1"} --program "$bin/train_llama_qat" --data "$tmp/train.txt" --dir "$tmp" --seed "${SEED:-1}" \
    --kills "${KILLS:-$([ "${QLLM_PRECISION:-}" = fp32 ] && echo 6 || echo 12)}"
if why=$(mpi_missing "$bin/train_llama_qat"); then
    echo "one process only: $why"
else
    # What MPI itself never frees would be taken for leaks of the program.
    export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0"
    case $(mpi_kind) in
    openmpi)
        export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        set -- --launcher "$MPIRUN --oversubscribe --bind-to none" "$@" ;;
    *) set -- --launcher "$MPIRUN -bind-to none" "$@" ;;
    esac
fi
"$harness" "$@"
