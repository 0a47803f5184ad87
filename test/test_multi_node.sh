#!/bin/bash
# The launch scripts, with launchers that only note how they were called. Usage: test/test_multi_node.sh [case]
# shellcheck disable=SC2317
set -u
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
failed=0
only=${1:-}
check() { # check NAME: runs the function of that name
    if [ -n "$only" ] && [ "$only" != "$1" ]; then return; fi
    # A scratch folder each, and every setting as it is by default.
    rm -rf "$tmp/w" && mkdir -p "$tmp/w"
    (export FAKE=$tmp/w PATH="$tmp/bin:$PATH" PAUSE=0 FAKE_KIND=openmpi FAKE_GPUS=0 FAKE_CORES=16
     unset MPIRUN MPI_HOME LOGS RESTARTS CUDA_VISIBLE_DEVICES QLLM_HOME LAUNCH MPI_TYPE REQUEUE OMP_WAIT_POLICY
     unset "${!SLURM_@}" "${!NCCL_@}" "${!UCX_@}"
     out=$FAKE/out
     "$1") >"$tmp/case.txt" 2>&1
    case $? in
    0) echo "ok $1" ;;
    77) echo "skip $1: $(tail -n 1 "$tmp/case.txt")" ;;
    *) echo "not ok $1"; sed 's/^/    /' "$tmp/case.txt"; failed=1 ;;
    esac
}

mkdir -p "$tmp/bin"
# A launcher: notes its arguments and what it has of the environment, then does what the next line of $FAKE/plan says:
#   STATUS [LATEST]   completes checkpoint LATEST and ends with STATUS
#   stuck LATEST      completes LATEST and waits for ever, without a child
#   stop LATEST       waits for SIGUSR1, completes LATEST and ends with 0; other signals end it with 99
cat >"$tmp/bin/mpirun" <<'F'
#!/bin/bash
name=$(basename "$0")
if [ "$1" = --version ]; then
    case $FAKE_KIND in openmpi) echo "mpirun (Open MPI) 4.1.4" ;; mpich) echo "HYDRA build details:" ;; esac
    exit
fi
if [ "$1" = --mpi=list ]; then echo "MPI plugin types are... none ${FAKE_PMI:-pmi2 pmix}"; exit; fi
echo "$name $*" >>"$FAKE/calls"
env | sort >"$FAKE/env"
n=$(wc -l <"$FAKE/calls")
read -r status latest <<<"$(sed -n "${n}p" "$FAKE/plan")"
if [ "$status" = stop ]; then
    trap 'exit 99' INT TERM HUP
    trap 'echo "$latest" >"$FAKE/out/latest"; exit 0' USR1
    echo ready >"$FAKE/ready"
    for ((i = 0; i < 200; i++)); do sleep 0.05; done
    exit 98
fi
if [ "$status" = stuck ]; then
    echo "$latest" >"$FAKE/out/latest"
    mkfifo "$FAKE/fifo"
    read -r _ <>"$FAKE/fifo"
fi
[ -z "$latest" ] || { mkdir -p "$FAKE/out" && echo "$latest" >"$FAKE/out/latest"; }
exit "${status:-97}"
F
cp "$tmp/bin/mpirun" "$tmp/bin/srun"
printf '#!/bin/sh\necho "scontrol $*" >>"$FAKE/scontrol"\n' >"$tmp/bin/scontrol"
cat >"$tmp/bin/nvidia-smi" <<'F'
#!/bin/sh
[ "$FAKE_GPUS" != 0 ] || { echo "NVIDIA-SMI has failed"; exit 9; }
for i in $(seq 0 $((FAKE_GPUS - 1))); do
    printf 'GPU %d: A (UUID: GPU-%d)\n  MIG 1g.10gb Device 0: (UUID: MIG-%d)\n' "$i" "$i" "$i"
done
F
printf '#!/bin/sh\necho $((2 * FAKE_CORES))\n' >"$tmp/bin/nproc"                     # two threads a core, two sockets
cat >"$tmp/bin/lscpu" <<'F'
#!/bin/sh
echo "# comment"
for t in 1 2; do
    for c in $(seq 0 $((FAKE_CORES - 1))); do
        s=$((2 * c / FAKE_CORES))
        case $1 in *CORE,SOCKET) echo "$c,$s" ;; *) echo "$s" ;; esac
    done
done
F
chmod +x "$tmp"/bin/*

plan() { printf '%s\n' "$@" >"$FAKE/plan"; rm -f "$FAKE/calls"; }
calls() { wc -l <"$FAKE/calls"; }
# expect TEXT: the last call has it. Words are whole.
expect() {
    local call
    call=$(tail -n 1 "$FAKE/calls")
    case " $call " in *" $1 "*) ;; *) echo "no \"$1\" in: $call"; return 1 ;; esac
}
one=scripts/multi_node/one_machine.sh many=scripts/multi_node/hostfile.sh slurm=scripts/multi_node/slurm.sbatch

scripts_parse() {
    local s
    for s in scripts/multi_node/*.sh "$slurm" scripts/mpi.sh; do bash -n "$s" || return 1; done
    command -v shellcheck >/dev/null || return 0
    # SC2154, SC2317: what one file sets or defines another uses.
    shellcheck -x -e SC2154,SC2317 scripts/multi_node/*.sh "$slurm"
}

# A rank a GPU; without GPUs a rank a socket; as asked. Cores are shared out; more ranks than cores are not bound.
one_machine() {
    plan "0" "0" "0" "0" "0" "0" "0"
    FAKE_GPUS=8 $one prog --out "$out" --steps 5 && expect "mpirun -np 8" &&
        expect "--map-by ppr:8:node:PE=2 --bind-to core" || return 1
    expect "$PWD/scripts/multi_node/rank.sh prog --out $out --steps 5" || return 1
    FAKE_GPUS=8 CUDA_VISIBLE_DEVICES=3,5 $one prog --out "$out" && expect "-np 2" &&
        expect "--map-by ppr:2:node:PE=8" || return 1
    $one prog --out "$out" && expect "-np 2" && expect "ppr:2:node:PE=8" || return 1
    $one -n 3 -c 4 prog --out "$out" && expect "-np 3" && expect "ppr:3:node:PE=4" || return 1
    $one -n 20 prog --out "$out" && expect "--map-by ppr:20:node:OVERSUBSCRIBE --bind-to none" || return 1
    expect "--out $out --threads 1" && grep -q '^OMP_WAIT_POLICY=passive$' "$FAKE/env" || return 1
    $one -n 20 prog --out "$out" --threads 2 && expect "--out $out --threads 2" && ! expect "--threads 1" || return 1
    FAKE_GPUS=1 $one -n 2 prog --out "$out" 2>&1 | grep -q -e '--comm mpi'
}

one_machine_mpich() {
    export FAKE_KIND=mpich
    plan "0" "0"
    FAKE_GPUS=4 $one prog --out "$out" && expect "mpirun -np 4 -ppn 4 -bind-to core:4" && ! expect "-x" || return 1
    $one -n 40 prog --out "$out" && expect "-ppn 40 -bind-to none"
}

# What the ranks need of the environment is named to Open MPI, and nothing else.
environment() {
    plan "0"
    NCCL_DEBUG=INFO NCCL_IB_HCA=mlx5 UCX_NET_DEVICES=x SECRET_TOKEN=1 $one prog --out "$out" || return 1
    expect "-x NCCL_DEBUG" && expect "-x NCCL_IB_HCA" && expect "-x UCX_NET_DEVICES" && expect "-x LOGS" || return 1
    ! grep -q SECRET "$FAKE/calls" || return 1
    [ "$(id -u)" != 0 ] || grep -q '^OMPI_ALLOW_RUN_AS_ROOT=1$' "$FAKE/env" || return 1
    grep -q "^LOGS=$out/logs$" "$FAKE/env"
}

hostfiles() {
    printf '# two machines\nnode1 slots=4 max_slots=4\n\nnode2:4   # the other\n' >"$FAKE/hosts"
    # The list is there only while the launcher runs: this one keeps a copy.
    { head -n 1 "$tmp/bin/mpirun"
      echo 'for ((i = 1; i < $#; i++)); do'
      echo '    case ${!i} in --hostfile | -f) i=$((i + 1)); cp "${!i}" "$FAKE/machines" ;; esac'
      echo 'done'
      tail -n +2 "$tmp/bin/mpirun"; } >"$FAKE/mpirun" && chmod +x "$FAKE/mpirun" || return 1
    export MPIRUN=$FAKE/mpirun
    plan "0" "0" "0" "0"
    $many "$FAKE/hosts" prog --out "$out" && expect "-np 8" &&
        expect "--map-by ppr:4:node:OVERSUBSCRIBE --bind-to none" || return 1
    [ "$(cat "$FAKE/machines")" = "node1 slots=4"$'\n'"node2 slots=4" ] || { cat "$FAKE/machines"; return 1; }
    FAKE_KIND=mpich $many "$FAKE/hosts" -c 2 prog --out "$out" && expect "-np 8" &&
        expect "-ppn 4 -bind-to core:2" || return 1
    [ "$(cat "$FAKE/machines")" = "node1:4"$'\n'"node2:4" ] || { cat "$FAKE/machines"; return 1; }
    printf 'node1\nnode2 slots=2\n' >"$FAKE/hosts"
    FAKE_GPUS=8 $many "$FAKE/hosts" -c 2 prog --out "$out" && expect "-np 10" &&
        expect "--map-by slot:PE=2 --bind-to core" || return 1
    FAKE_GPUS=8 FAKE_KIND=mpich $many "$FAKE/hosts" prog --out "$out" && expect "-np 10" && ! expect "-ppn" || return 1
    local bad
    for bad in "node1 slots=0" "node1 slots" "node1:x" ":4" ""; do
        echo "$bad" >"$FAKE/hosts"
        $many "$FAKE/hosts" prog --out "$out"
        [ $? = 2 ] || { echo "accepted: $bad"; return 1; }
    done
    $many "$FAKE/nowhere" prog
    [ $? = 2 ] && [ "$(calls)" = 4 ]
}

# Failed runs go on from their checkpoint, with --resume once.
restarts() {
    plan "1 step-10" "137 step-20" "1 step-30" "0 step-40"
    $one prog --out "$out" >"$FAKE/said" 2>&1 && [ "$(calls)" = 4 ] || return 1
    [ "$(grep -c -e '--resume' "$FAKE/calls")" = 3 ] && ! head -n 1 "$FAKE/calls" | grep -q -e '--resume' || return 1
    ! grep -q -e '--resume.*--resume' "$FAKE/calls" && grep -q 'restart 3 of 10 .*from step-30' "$FAKE/said" || return 1
    plan "1 step-50" "0 step-60"
    $one prog --out="$out" --resume && [ "$(calls)" = 2 ] && ! grep -q -e '--resume.*--resume' "$FAKE/calls" || return 1
    rm -rf "$out"
    plan "1" "1 step-1" "0"                       # nothing at the first failure, something at the second
    $one prog --out "$out" && [ "$(calls)" = 3 ]
}

gives_up() {
    plan "1 step-10" "3 step-10" "0"
    $one prog --out "$out" >"$FAKE/said" 2>&1
    [ $? = 3 ] && [ "$(calls)" = 2 ] && grep -q 'no checkpoint since .*step-10' "$FAKE/said" || return 1
    rm -rf "$out"
    plan "1" "4" "0"
    $one prog --out "$out"
    [ $? = 4 ] && [ "$(calls)" = 2 ] || return 1
    rm -rf "$out"
    plan "1 step-1" "1 step-2" "5 step-3" "0"
    RESTARTS=2 $one prog --out "$out"
    [ $? = 5 ] && [ "$(calls)" = 3 ] || return 1
    rm -rf "$out"
    plan "6 step-1" "0"
    RESTARTS=0 $one prog --out "$out"
    [ $? = 6 ] && [ "$(calls)" = 1 ] || return 1
    rm -rf "$out"
    plan "2" "0"                                  # the request itself is wrong
    $one prog --out "$out"
    [ $? = 2 ] && [ "$(calls)" = 1 ] || return 1
    plan "127" "0"
    $one prog --out "$out"
    [ $? = 127 ] && [ "$(calls)" = 1 ]
}

# Starting anew where a run has checkpoints would, after the first failure, go on from the wrong one.
old_checkpoints() {
    mkdir -p "$out" && echo step-7 >"$out/latest"
    plan "0"
    $one prog --out "$out"
    [ $? = 2 ] && [ ! -e "$FAKE/calls" ] && $one prog --out "$out" --resume
}

pauses_grow() {
    # The watch over the launcher sleeps a second at a time.
    printf '#!/bin/sh\n[ "$1" = 1 ] && exec /bin/sleep 1\necho "$1" >>"$FAKE/slept"\n' >"$FAKE/sleep"
    chmod +x "$FAKE/sleep"
    plan "1 a" "1 b" "1 c" "1 d" "1 e" "1 f" "0"
    PATH="$FAKE:$PATH" PAUSE=20 $one prog --out "$out" || return 1
    [ "$(paste -sd ' ' "$FAKE/slept")" = "20 40 80 160 300 300" ] || { cat "$FAKE/slept"; return 1; }
}

# Stopped: the launcher gets SIGUSR1 and nothing else, may end in peace, and is not started again.
stops() {
    local signal pid
    for signal in TERM USR1 INT; do
        rm -rf "$out" "$FAKE/ready"
        plan "stop step-9" "0"
        # A background job of a shell without job control ignores SIGINT for good: not so with it.
        set -m
        $one prog --out "$out" & pid=$!
        set +m
        while [ ! -e "$FAKE/ready" ]; do kill -0 $pid || return 1; sleep 0.02; done
        kill -$signal -- -$pid                    # the whole group, as a terminal does
        wait $pid || { echo "status $? after SIG$signal"; return 1; }
        [ "$(calls)" = 1 ] && [ "$(cat "$out/latest")" = step-9 ] || return 1
    done
}

# mpirun waits for ever although no rank is left: the run goes on.
stuck_launcher() {
    plan "stuck step-3" "0 step-9"
    STUCK=2 $one prog --out "$out" >"$FAKE/said" 2>&1 || { cat "$FAKE/said"; return 1; }
    [ "$(calls)" = 2 ] && grep -q 'the launcher has not' "$FAKE/said" && grep -q 'restart 1 of 10 .*step-3' "$FAKE/said"
}

slurm() {
    export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=77 SLURM_NTASKS=16 SLURM_NTASKS_PER_NODE=8 SLURM_CPUS_PER_TASK=4
    cp $slurm "$FAKE/slurm_script"                # Slurm runs a copy
    plan "0" "0" "0" "0"
    bash "$FAKE/slurm_script" prog --out "$out" || return 1
    expect "srun --mpi=pmix --kill-on-bad-exit=1 --cpus-per-task=4 --cpu-bind=cores" || return 1
    expect "$PWD/scripts/multi_node/rank.sh prog" || return 1
    FAKE_PMI=pmi2 bash "$FAKE/slurm_script" prog --out "$out" && expect "--mpi=pmi2" || return 1
    LAUNCH=mpirun bash "$FAKE/slurm_script" prog --out "$out" && expect "mpirun -np 16" &&
        expect "--map-by ppr:8:node:PE=4" || return 1
    SLURM_RESTART_COUNT=1 bash "$FAKE/slurm_script" prog --out "$out" && expect "prog --out $out --resume" || return 1
    (cd "$FAKE" && SLURM_SUBMIT_DIR=$FAKE bash slurm_script prog) &&
        { echo "found a library in the wrong folder"; return 1; }
    [ ! -e "$FAKE/scontrol" ]
}

slurm_requeues() {
    export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=77 SLURM_NTASKS=2 REQUEUE=1
    plan "stop step-9"
    bash $slurm prog --out "$out" & pid=$!
    while [ ! -e "$FAKE/ready" ]; do kill -0 $pid || return 1; sleep 0.02; done
    kill -USR1 $pid
    wait $pid && [ "$(cat "$FAKE/scontrol")" = "scontrol requeue 77" ] || return 1
    rm "$FAKE/scontrol"
    plan "0"
    bash $slurm prog --out "$out" --resume && [ ! -e "$FAKE/scontrol" ]       # done: no more of it
}

usage_errors() {
    local line
    plan "0"
    for line in "$one" "$one -n 0 prog" "$one -n x prog" "$one -c -1 prog" "$one -z prog" "$many" "$many -c 2" \
        "$many /dev/null prog"; do
        $line
        [ $? = 2 ] || { echo "accepted: $line"; return 1; }
    done
    FAKE_KIND=other $one prog
    [ $? = 2 ] && [ ! -e "$FAKE/calls" ]
}

# With the MPI of this machine: two ranks of which one dies at the first start, and what they said in a file each.
real_ranks() {
    PATH=${PATH#"$tmp/bin:"}
    command -v mpirun >/dev/null || { echo "no mpirun"; return 77; }
    cat >"$FAKE/prog" <<'F'
#!/bin/bash
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-none}}
echo "rank $rank speaks: $*"
case $* in *--resume) exit 0 ;; esac
echo step-4 >"$2/latest"
[ "$rank" = 0 ] && exec sleep 20
echo "rank 1 has died" >&2
kill -9 $$
F
    chmod +x "$FAKE/prog"
    $one -n 2 -c 0 "$FAKE/prog" --out "$out" >"$FAKE/said" 2>&1 || { cat "$FAKE/said"; return 1; }
    cat "$FAKE/said"
    grep -q 'restart 1 of 10 .*from step-4' "$FAKE/said" && grep -q 'rank 1 has died' "$FAKE/said" || return 1
    [ "$(grep -c '^== ' "$out/logs/rank-0.txt")" = 2 ] && grep -q 'rank 1 has died' "$out/logs/rank-1.txt" || return 1
    grep -q '^rank 1 speaks: .*--resume' "$out/logs/rank-1.txt" && ! grep -q 'rank 1' "$out/logs/rank-0.txt"
}

# Stopped in earnest: what the ranks still say after the signal is kept.
real_stop() {
    PATH=${PATH#"$tmp/bin:"}
    command -v mpirun >/dev/null || { echo "no mpirun"; return 77; }
    cat >"$FAKE/prog" <<'F'
#!/bin/bash
trap 'sleep 2 & wait; echo "saved by ${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-none}}"; exit 0' USR1
touch "$2/started-$$"
for ((i = 0; i < 400; i++)); do sleep 0.05; done
exit 1
F
    chmod +x "$FAKE/prog"
    local pid
    $one -n 2 -c 0 "$FAKE/prog" --out "$out" >"$FAKE/said" 2>&1 & pid=$!
    while [ "$(find "$out" -name 'started-*' 2>/dev/null | wc -l)" != 2 ]; do kill -0 $pid ||
        { cat "$FAKE/said"; return 1; }; sleep 0.05; done
    kill -TERM $pid
    wait $pid || { echo "status $?"; cat "$FAKE/said"; return 1; }
    grep -q 'saved by 0' "$out/logs/rank-0.txt" && grep -q 'saved by 1' "$out/logs/rank-1.txt" &&
        grep -q 'saved by 0' "$FAKE/said"
}

for case in scripts_parse one_machine one_machine_mpich environment hostfiles restarts gives_up old_checkpoints \
    pauses_grow stops stuck_launcher slurm slurm_requeues usage_errors real_ranks real_stop; do
    check $case
done
exit $failed
