#!/bin/bash
# Trains on several machines that ssh reaches without a password and that share a file system: same program, data and
# --out at the same paths. Restarted when it fails.
#   scripts/multi_node/hostfile.sh HOSTFILE [-c CORES] ./train_llama_qat --model M --train-data D --out /shared/RUN ...
#   HOSTFILE   a line a machine: "name slots=8", "name:8", or "name" (as many ranks as this machine has GPUs, or 1)
#   -c CORES   cores that each rank is bound to (default 0: not bound)
# lib.sh lists what the environment may set; rank N's output is in --out/logs/rank-N.txt. Ctrl-C saves and leaves.
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=scripts/multi_node/lib.sh
. "$here/lib.sh"
usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }

hostfile=${1:-} cores=0
case $hostfile in "" | -*) usage ;; esac
shift
while getopts c:h option; do
    case $option in
    c) cores=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -gt 0 ] || usage
[[ $cores =~ ^[0-9]+$ ]] || fail "-c $cores: expected a number"
[ -r "$hostfile" ] || fail "$hostfile: no such file; expected a line a machine, such as: node1 slots=8"
! why=$(mpi_missing "") || fail "$why"

# --- NCCL between machines: uncomment to change; all NCCL_ variables reach the ranks --------------------------------
# export NCCL_SOCKET_IFNAME=eth0      # the network of the first contact, and of the data where there is no InfiniBand.
#                                     # Name it where machines have several (docker0 and the like): the wrong one hangs
# export NCCL_IB_HCA=mlx5_0,mlx5_1    # InfiniBand or RoCE adapters for data; a leading ^ leaves some out (management)
# export NCCL_IB_GID_INDEX=3          # RoCE v2: the entry of show_gids that has the routable IPv4 address
# export NCCL_IB_TC=106               # RoCE: the traffic class that the switches keep free of loss; ask who runs them
# export NCCL_IB_DISABLE=1            # no InfiniBand although it is there: over TCP, to tell which is at fault
# export NCCL_NET_GDR_LEVEL=PHB       # how far a GPU and an adapter may be apart for direct copies; SYS: always
# export NCCL_CROSS_NIC=1             # rings may change adapters between machines: where all hang on one switch
# export NCCL_IB_TIMEOUT=22           # 4 us * 2^22: longer waits before a congested network counts as broken
# export NCCL_DEBUG=INFO              # which adapters and transports were taken; WARN to be told of errors only
# export NCCL_DEBUG_SUBSYS=INIT,NET   # and of INFO only this
# --- and MPI, which carries the start, saves and, with --comm mpi, everything ---------------------------------------
# export OMPI_MCA_btl_tcp_if_include=eth0 OMPI_MCA_oob_tcp_if_include=eth0   # Open MPI: as NCCL_SOCKET_IFNAME
# export UCX_NET_DEVICES=mlx5_0:1                                            # Open MPI, MPICH over UCX: as NCCL_IB_HCA
# export HYDRA_IFACE=eth0                                                    # MPICH: the network of the start
gpus=$(gpus_here)
machines=$(mktemp) || exit 1
trap 'rm -f "$machines"' EXIT
# Both launchers' forms are read, the one at hand is written.
awk -v kind="$(mpi_kind)" -v each=$((gpus > 0 ? gpus : 1)) '
    { sub(/#.*/, "") }
    NF == 0 { next }
    { name = $1; n = each
      if (i = index(name, ":")) { n = substr(name, i + 1); name = substr(name, 1, i - 1) }
      for (f = 2; f <= NF; f++) {
          if ($f ~ /^slots=/) n = substr($f, 7)
          else if ($f !~ /^max[-_]slots=/) bad = 1
      }
      if (bad || n !~ /^[1-9][0-9]*$/ || name == "") {
          print "line " NR ": expected \"name slots=N\" or \"name:N\", found: " $0 > "/dev/stderr"; exit 1 }
      print name (kind == "openmpi" ? " slots=" : ":") n }' "$hostfile" >"$machines" || fail "$hostfile is malformed"
[ -s "$machines" ] || fail "$hostfile names no machine"
counts=$(sed 's/.*[=:]//' "$machines")
ranks=$(awk '{ n += $1 } END { print n }' <<<"$counts")
each=$(sort -u <<<"$counts")
[[ $each =~ ^[0-9]+$ ]] || each=0                      # unlike numbers: the hostfile alone decides
note "$ranks ranks on $(wc -l <"$machines") machines"
launch() {
    mpi_command "$ranks" "$each" "$cores" "$machines"
    exec "${mpi[@]}" "$@"
}
multi_run "$@"
