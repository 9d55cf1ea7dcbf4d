#!/usr/bin/env bash
# What srun starts once on each machine of a job: Slurm's variables in the words of nodes_c10d.sh.
# slurm.sbatch calls it; from a terminal on the first machine of an allocation:
#
#   srun --ntasks-per-node 1 bash launch/slurm_node.sh --config my.yaml
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")

export NNODES="$SLURM_NNODES"
# The machine that srun was called on; a batch script runs on the first one.
export HEAD="${HEAD:-$SLURM_LAUNCH_NODE_IPADDR}"
# Said, because a machine seldom knows such an address as its own.
if [ "$SLURM_NODEID" -eq 0 ]; then
    export IS_HOST="${IS_HOST:-true}"
else
    export IS_HOST="${IS_HOST:-false}"
fi
# Kept when the job is queued again, so that the run finds its own folder.
export JOB="${JOB:-$SLURM_JOB_ID}"
# Two jobs may share a machine.
export PORT="${PORT:-$((20000 + SLURM_JOB_ID % 10000))}"
# Slurm's count of the GPUs that were asked for, where it counts them.
export NPROC="${NPROC:-${SLURM_GPUS_ON_NODE:-auto}}"

exec bash "$here/nodes_c10d.sh" "$@"
