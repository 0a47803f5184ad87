# What the launch scripts share; read by `. lib.sh` in bash. Each script defines `launch COMMAND...`, which ends in the
# exec of a launcher (mpirun, srun), and calls `multi_run COMMAND...`.
# shellcheck shell=bash disable=SC2034,SC2154
#
# From the environment:
#   RESTARTS=10     a failed run is started again at most so often (0: never)
#   PAUSE=10        seconds before the first restart; each further pause is twice as long, up to 300
#   LOGS=OUT/logs   rank-N.txt: all that rank N says, of all starts
#   MPIRUN=mpirun   the launcher; Open MPI's or MPICH's (Hydra, so Intel MPI's too)
here=${here:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck source=scripts/mpi.sh
. "$here/../mpi.sh"

note() { printf '%s: %s\n' "$(basename "${script:-$0}" .sh)" "$*" >&2; }
fail() { note "$@"; exit 2; }

# --- the machine ---------------------------------------------------------------------------------------------------

# GPUs that ranks may use: those of CUDA_VISIBLE_DEVICES, else all. MIG slices do not count: NCCL wants whole GPUs.
gpus_here() {
    local n=0
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        n=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | sed '/^ *-/,$d' | grep -c .)    # the driver stops at -1
    elif command -v nvidia-smi >/dev/null 2>&1; then
        n=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ')
    fi
    echo "${n:-0}"
}

# Cores that this shell may use: hyperthreads do not count, they have no matrix unit of their own.
cores_here() {
    local physical may
    may=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)      # which would obey them
    physical=$(lscpu -p=CORE,SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)
    if [ "$physical" -gt 0 ] && [ "$physical" -lt "$may" ]; then echo "$physical"; else echo "$may"; fi
}

sockets_here() {
    local n
    n=$(lscpu -p=SOCKET 2>/dev/null | grep -v '^#' | sort -u | wc -l)
    echo $((n > 0 ? n : 1))
}

# --- the command line of mpirun ------------------------------------------------------------------------------------

# mpi_command RANKS RANKS_A_MACHINE CORES HOSTFILE: the array `mpi` starts RANKS ranks, each bound to CORES cores that
# lie side by side (0: not bound, as many to a core as need be). RANKS_A_MACHINE 0: as the hostfile says. HOSTFILE "":
# this machine, or the batch system's.
mpi_command() {
    local ranks=$1 each=$2 cores=$3 hosts=$4 name place=slot
    case $(mpi_kind) in
    openmpi)
        [ "$(id -u)" != 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
        mpi=("$MPIRUN" -np "$ranks")
        [ -z "$hosts" ] || mpi+=(--hostfile "$hosts")
        [ "$each" -le 0 ] || place=ppr:$each:node
        if [ "$cores" -gt 0 ]; then mpi+=(--map-by "$place:PE=$cores" --bind-to core)
        else mpi+=(--map-by "$place:OVERSUBSCRIBE" --bind-to none); fi
        # Other machines get only what is named.
        for name in $(compgen -e | grep -E '^(LD_LIBRARY_PATH|LOGS|(NCCL|UCX|OMP|KMP|CUDA|FI)_[A-Z0-9_]+)$'); do
            mpi+=(-x "$name")
        done ;;
    mpich)
        mpi=("$MPIRUN" -np "$ranks")                    # the whole environment goes along by itself
        [ -z "$hosts" ] || mpi+=(-f "$hosts")
        [ "$each" -le 0 ] || mpi+=(-ppn "$each")
        if [ "$cores" -gt 0 ]; then mpi+=(-bind-to "core:$cores"); else mpi+=(-bind-to none); fi ;;
    *) fail "$(mpi_missing "")" ;;
    esac
}

# --- starting, and starting again ----------------------------------------------------------------------------------

# out_of COMMAND...: the folder of the run, as the program will take it from its arguments.
out_of() {
    local out=run
    while [ $# -gt 0 ]; do
        case $1 in
        --out) out=${2:-} ;;
        --out=*) out=${1#--out=} ;;
        esac
        shift
    done
    printf '%s' "$out"
}

has_option() { # has_option NAME COMMAND...
    local name=$1 a
    shift
    for a in "$@"; do
        case $a in "$name" | "$name"=*) return 0 ;; esac
    done
    return 1
}

# Ends a launcher that has had no living child for a minute: Open MPI's mpirun 4.1 may wait for itself for ever where a
# rank died in the first moments of its life. Only for launchers whose children are the ranks.
watch_launcher() {
    local idle=0 seconds=${STUCK:-60}
    ps -o stat= --ppid $$ >/dev/null 2>&1 || return 0      # a ps that cannot tell would say that none is alive
    while sleep 1 && kill -0 "$1" 2>/dev/null; do
        if ps -o stat= --ppid "$1" | awk '!/Z/ { n++ } END { exit !n }'; then idle=0; else idle=$((idle + 1)); fi
        if [ "$idle" -ge "$seconds" ]; then
            note "all ranks have ended, the launcher has not: ending it"
            kill -9 "$1"
        fi
    done
}

newest() { cat "$1/latest" 2>/dev/null; }      # the checkpoint to go on from; "" where there is none

# multi_run COMMAND...: runs it to its end, with --resume after failures. Returns 0 when it is done, or was stopped and
# has saved (`stopped` is 1 then); 2 at once where the program says that the request itself is wrong; else the status of
# the failure after which it gave up: the last of RESTARTS, or the second with no checkpoint in between.
multi_run() {
    local out status again before='' now restarts=0 pause=${PAUSE:-10} pid='' more=()
    stopped=0
    out=$(out_of "$@")
    if ! has_option --resume "$@" && [ -n "$(newest "$out")" ]; then
        note "$out holds $(newest "$out") of an earlier run: add --resume to go on from it, or choose another --out"
        return 2
    fi
    mkdir -p "$out" || return 2
    LOGS=${LOGS:-$(cd "$out" && pwd)/logs}
    export LOGS
    # The launcher runs in a process group of its own, so that Ctrl-C comes here alone, and is handed SIGUSR1, the
    # signal that mpirun and srun pass on to the ranks: these save and leave. At others they end the ranks at once.
    set -m
    trap 'stopped=1; [ -z "$pid" ] || kill -USR1 "$pid" 2>/dev/null' INT TERM USR1
    while :; do
        (launch "$here/rank.sh" "$@" ${more[@]+"${more[@]}"}) </dev/null &
        pid=$!
        [ "$stopped" = 0 ] || kill -USR1 "$pid" 2>/dev/null       # the signal came while nothing ran
        [ "${ranks_are_children:-0}" = 0 ] || watch_launcher "$pid" &
        while :; do                                     # a trapped signal ends `wait`, not the launcher
            wait "$pid"
            status=$?
            kill -0 "$pid" 2>/dev/null || break
        done
        wait "$pid" 2>/dev/null                         # a signal that came at the very end hid the status
        again=$?
        [ "$again" = 127 ] || status=$again
        pid=
        if [ "$status" = 0 ] || [ "$status" = 2 ] || [ "$stopped" = 1 ]; then break; fi
        now=$(newest "$out")
        if [ "$status" = 126 ] || [ "$status" = 127 ]; then
            note "$1 cannot be started (status $status)"
            break
        elif [ "$restarts" -ge "${RESTARTS:-10}" ]; then
            note "status $status, and $restarts restarts were made: giving up. Newest checkpoint: ${now:-none}; logs:" \
                 "$LOGS"
            break
        elif [ "$restarts" -gt 0 ] && [ "$now" = "$before" ]; then
            note "status $status, and no checkpoint since the failure before (newest: ${now:-none}): giving up. The" \
                 "cause is in $LOGS; where it only takes long to the next checkpoint, lower --save-every"
            break
        fi
        before=$now
        restarts=$((restarts + 1))
        note "status $status; restart $restarts of ${RESTARTS:-10} in $pause s from ${now:-the beginning}"
        sleep "$pause" &
        wait $!
        if [ "$stopped" = 1 ]; then kill $!; break; fi
        pause=$((pause * 2 < 300 ? pause * 2 : 300))
        has_option --resume "$@" || more=(--resume)
    done
    trap - INT TERM USR1
    set +m
    return "$status"
}
