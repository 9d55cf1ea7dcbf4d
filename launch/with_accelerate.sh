#!/usr/bin/env bash
# Accelerate's launcher. One machine, the number of its ranks in the file:
#
#   SETTINGS=configs/accelerate/gpu.yaml launch/with_accelerate.sh --config configs/shakespeare.yaml
#
# Several. On each of them, here the second of two:
#
#   HEAD=first-machine NNODES=2 NODE_RANK=1 NPROC=8 launch/with_accelerate.sh --config my.yaml
#
# SETTINGS   Accelerate's own file, configs/accelerate/gpu.yaml unless set
# NPROC      ranks of this machine; unset, the file's number
# HEAD, PORT, NNODES, NODE_RANK, RESTARTS, WAIT_S, IFACE: as in nodes_static.sh
# PROGRAM    your own program in place of launch/train_accelerate.py
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/environment.sh"

where=(--config_file "${SETTINGS:-$here/../configs/accelerate/gpu.yaml}")
if [ "${NNODES:-1}" -gt 1 ]; then
    # Accelerate counts the ranks of all machines together, torchrun those of one.
    where+=(
        --num_machines "$NNODES" --machine_rank "${NODE_RANK:?0 on the first machine}"
        --num_processes "$((NNODES * ${NPROC:?ranks of this machine}))"
        --main_process_ip "${HEAD:?address of machine 0}" --main_process_port "${PORT:-29500}"
        --rdzv_conf "timeout=${WAIT_S:-600}"
    )
elif [ -n "${NPROC:-}" ]; then
    where+=(--num_processes "$NPROC")
fi

exec "$PYTHON" -m accelerate.commands.accelerate_cli launch "${where[@]}" \
    --max_restarts "${RESTARTS:-0}" "${PROGRAM:-$here/train_accelerate.py}" "$@"
