#!/bin/bash
# rank.sh COMMAND...: what every rank runs. All it says goes to LOGS/rank-N.txt besides where it went before.
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-${SLURM_PROCID:-0}}}}
log=$LOGS/rank-$rank.txt
mkdir -p "$LOGS" || exec "$@"
printf '== %s on %s, process %d: %s\n' "$(date '+%F %T')" "$(hostname)" $$ "$*" >>"$log" || exec "$@"
# The copies end with the pipe, not with a signal to all of the group: the program still has something to say then.
exec > >(trap '' INT TERM USR1; exec tee -a "$log") 2> >(trap '' INT TERM USR1; exec tee -a "$log" >&2) "$@"
