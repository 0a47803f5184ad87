#!/bin/bash
# What goes between ranks, and what happens when one of them dies: runs test/mpi/comm_test by mpirun.
# Usage: QLLM_BIN=folder-of-programs test/test_comm.sh [case]. Prints "ok NAME", "not ok NAME" or "skip NAME" a case.
set -u
bin=${QLLM_BIN:?set QLLM_BIN to the folder of the programs}
cd "$(dirname "$0")/.." || exit 1
test=$bin/../test/mpi/comm_test
. scripts/mpi.sh
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
export MPI_TIMEOUT=60
failed=0
only=${1:-}

check() { # check NAME command...: runs a case; status 2: skipped, the last line says why
    local name=$1 status
    shift
    [ -z "$only" ] || [ "$only" = "$name" ] || return
    "$@" >"$work/case" 2>&1
    status=$?
    if [ $status -eq 0 ]; then echo "ok $name"
    elif [ $status -eq 2 ]; then echo "skip $name: $(tail -n 1 "$work/case")"
    else echo "not ok $name"; sed 's/^/    /' "$work/case"; failed=1; fi
}

# The same checks in every number of ranks; each case of comm_test must have run.
patterns() {
    local ok
    if [ "$1" = plain ]; then "$test" all >"$work/out" 2>&1; else mpi_run "$1" "$test" all >"$work/out" 2>&1; fi || {
        cat "$work/out"; return 1; }
    ok=$(grep -c '^ok ' "$work/out")
    [ "$ok" -eq 9 ] && ! grep '^not ok' "$work/out" || { cat "$work/out"; return 1; }
}

# MPICH's mpirun kills the others so fast that it must be told to wait.
[ "$(mpi_kind)" = mpich ] && patient=-disable-auto-cleanup || patient=

# ends MODE VICTIM MESSAGE [STATUS]: three ranks of which one ends badly. All must end within seconds and nonzero,
# and MESSAGE must stand there once, from comm_test itself: mpirun kills the others too, but says so in its own words.
ends() {
    local status start=$SECONDS
    MPI_ARGS=$patient mpi_run 3 "$test" $1 $2 ${computes:-} >"$work/out" 2>&1
    status=$?
    sed 's/^/| /' "$work/out"
    echo "status $status after $((SECONDS - start)) s"
    [ $status -ne 0 ] && [ $status -ne 124 ] && [ "${4:-$status}" = $status ] && [ $((SECONDS - start)) -le 10 ] &&
        [ "$(grep -c "$3" "$work/out")" = 1 ] && [ "$(grep -c '^comm_test' "$work/out")" = 1 ]
}
gone() {
    echo "^comm_test: rank $1 (pid [0-9]* on .*) is gone; ending all ranks\\. The newest complete checkpoint is intact"
}

exits() { ends exit 2 "$(gone 2)" && ends exit 0 "$(gone 0)"; }
killed() { ends kill 1 "$(gone 1)" && computes=y ends kill 2 "$(gone 2)" && computes=y ends kill 0 "$(gone 0)"; }
crashes() { ends crash 1 "$(gone 1)"; }
dies() {
    ends die 0 "^comm_test\\[rank 0\\]: the reason why$" 1 && ends die 2 "^comm_test\\[rank 2\\]: the reason why$" 1 &&
        ends usage 1 "^comm_test\\[rank 1\\]: the reason why$" 2
}
# An error that all ranks meet is told once, by rank 0.
all_die() { ends die -1 "^comm_test\\[rank 0\\]: the reason why$" 1; }

# Ranks whose launcher does nothing when one dies: the watch alone must end them. Each is started by a shell that ends
# well and writes down how its rank ended.
unattended() {
    local out=$work/unattended start=$SECONDS ended
    rm -f "$work"/ended-*
    # shellcheck disable=SC2016
    MPI_ARGS=${patient:---enable-recovery} mpi_run 4 sh -c \
        'trap "" USR1; "$1" kill "$2" $3; s=$?; echo "status $s" >"$4-$$"' - "$test" "$1" "$2" "$work/ended" \
        >"$out" 2>&1
    sed 's/^/| /' "$out"
    ended=$(cat "$work"/ended-* | sort | tr '\n' ' ')
    echo "after $((SECONDS - start)) s: $ended"
    [ $((SECONDS - start)) -le 10 ] && [ "$(grep -c "$(gone "$1")" "$out")" = 1 ] &&
        [ "$(grep -c '^comm_test' "$out")" = 1 ] && [ "$ended" = "status 1 status 1 status 1 status 137 " ]
}
alone() { unattended 2 '' && unattended 2 computes && unattended 0 computes; }

# Without a launcher nothing of MPI starts: one rank, at once.
plain_start() { "$test" size >"$work/out" && [ "$(cat "$work/out")" = "size 1: " ]; }
# A launcher that this build's MPI does not know, or no MPI in the build: each process would train alone.
foreign_launcher() {
    PMI_SIZE=4 PMI_RANK=1 timeout 30 "$test" size >"$work/out" 2>&1
    [ $? -eq 1 ] && grep -q "started as one of 4 ranks (PMI_SIZE), but " "$work/out" || { cat "$work/out"; return 1; }
}
no_watch() {    # by request; a death is then mpirun's to notice
    QLLM_WATCH=off mpi_run 2 "$test" all >"$work/out" 2>&1 && [ "$(grep -c '^ok ' "$work/out")" -eq 9 ] || {
        cat "$work/out"; return 1; }
    QLLM_WATCH=off mpi_run 2 "$test" die 1 >"$work/out" 2>&1
    [ $? -eq 1 ] && grep -q '^comm_test\[rank 1\]: the reason why$' "$work/out" || { cat "$work/out"; return 1; }
}

check plain_start plain_start
check one_rank patterns plain
if why=$(mpi_missing "$test"); then
    echo "skip ranks: $why"
    exit $failed
fi
[ "$(mpi_kind)" = mpich ] || check foreign_launcher foreign_launcher
for n in 1 2 3 8; do check patterns_$n patterns $n; done
for case in exits killed crashes dies all_die alone no_watch; do check $case $case; done
exit $failed
