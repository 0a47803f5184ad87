# Starting ranks in tests and recipes, whatever MPI is there; read by `. scripts/mpi.sh` (bash or sh).
#   mpi_missing [PROGRAM]     says why nothing can be started here, or fails:
#                             if why=$(mpi_missing "$p"); then echo "skip NAME: $why"
#   mpi_run N COMMAND...      N ranks on this machine: also as root, also with more ranks than cores, threads not bound
# MPI_ARGS are further arguments of mpirun. MPIRUN (or MPI_HOME/bin/mpirun) names the launcher,
# MPI_TIMEOUT=120 the seconds after which it is ended.
# shellcheck shell=sh disable=SC2086
MPIRUN=${MPIRUN:-${MPI_HOME:+$MPI_HOME/bin/mpirun}}
MPIRUN=${MPIRUN:-mpirun}

mpi_kind() {    # openmpi, mpich (and what is made from it) or nothing
    if [ -z "${mpi_kind_found:-}" ]; then
        case $("$MPIRUN" --version 2>&1) in
        *"Open MPI"* | *OpenRTE* | *PRRTE*) mpi_kind_found=openmpi ;;
        *HYDRA* | *Intel*) mpi_kind_found=mpich ;;
        *) mpi_kind_found= ;;
        esac
    fi
    echo "$mpi_kind_found"
}

mpi_missing() {
    if ! command -v "$MPIRUN" >/dev/null 2>&1; then
        echo "no mpirun (apt-get install libopenmpi-dev openmpi-bin, or set MPI_HOME)"
    elif [ -z "$(mpi_kind)" ]; then
        echo "$MPIRUN is neither Open MPI's nor MPICH's"
    elif [ -n "${1:-}" ] && [ ! -x "$1" ]; then
        echo "$1 is not there: run make first"
    elif [ -n "${1:-}" ] && ! ldd "$1" 2>/dev/null | grep -q libmpi; then
        echo "$1 was built without MPI"
    else
        return 1
    fi
}

mpi_run() {
    mpi_n=$1
    shift
    # Threads that wait asleep: with more threads than cores, spinning at barriers costs far more.
    OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
    export OMP_WAIT_POLICY
    # What MPI itself never frees would be taken for leaks of the program.
    ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
    export ASAN_OPTIONS
    case $(mpi_kind) in
    openmpi)
        OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout -k 5 "${MPI_TIMEOUT:-120}" \
            "$MPIRUN" --oversubscribe --bind-to none ${MPI_ARGS:-} -np "$mpi_n" "$@" </dev/null ;;
    *)
        timeout -k 5 "${MPI_TIMEOUT:-120}" "$MPIRUN" -bind-to none ${MPI_ARGS:-} -np "$mpi_n" "$@" </dev/null ;;
    esac
}
