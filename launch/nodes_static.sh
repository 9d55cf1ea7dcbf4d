#!/usr/bin/env bash
# Several machines with fixed numbers. On each of them, here the second of two:
#
#   HEAD=first-machine NNODES=2 NODE_RANK=1 NPROC=8 launch/nodes_static.sh --config my.yaml
#
# HEAD       name or address of machine 0 that all others can reach; PORT there, 29500 unless set
# NNODES     number of machines; NODE_RANK, from 0, this one's number
# NPROC      ranks of this machine; auto takes one for each GPU, or for each core without GPUs
# JOB        name of the job: with it a restarted run finds its own folder, even if a younger run
#            of the same run.name exists. Another one for every job
# RESTARTS   how often each machine starts its ranks again when one of them has died
# WAIT_S     seconds that the machines wait for one another
# IFACE      network interface of the messages
# PROGRAM    your own program in place of launch/train.py
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/environment.sh"

exec "$PYTHON" -m torch.distributed.run \
    --nnodes "${NNODES:?number of machines}" --node-rank "${NODE_RANK:?0 on the first machine}" \
    --master-addr "${HEAD:?address of machine 0}" --master-port "${PORT:-29500}" \
    --rdzv-conf "timeout=${WAIT_S:-600}" ${JOB:+"--rdzv-id=$JOB"} \
    --nproc-per-node "${NPROC:-auto}" --max-restarts "${RESTARTS:-0}" \
    "${PROGRAM:-$here/train.py}" "$@"
