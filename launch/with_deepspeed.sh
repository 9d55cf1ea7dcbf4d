#!/usr/bin/env bash
# DeepSpeed's launcher. One machine:
#
#   NPROC=8 launch/with_deepspeed.sh --config configs/shakespeare.yaml
#
# Several, each started by hand or by a scheduler, here the second one:
#
#   HOSTFILE=hosts HEAD=first-machine NODE_RANK=1 launch/with_deepspeed.sh --config my.yaml
#
# Several, all started from the first one over pdsh and ssh: the same without NODE_RANK. DeepSpeed
# hands on NCCL's and Python's variables then, and what stands in a file .deepspeed_env: put
# OMP_NUM_THREADS=1 and GLOO_SOCKET_IFNAME=... there.
#
# HOSTFILE   a line `name slots=8` for each machine
# HEAD       name or address of machine 0; PORT there, 29500 unless set
# NODE_RANK  this machine's number, from 0
# NPROC      ranks, on one machine
# IFACE      network interface of the messages
# PROGRAM    your own program in place of launch/train_deepspeed.py; DeepSpeed gives it --local_rank
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/environment.sh"

if [ -z "${HOSTFILE:-}" ]; then
    # Without a host file of ours DeepSpeed would take /job/hostfile where that exists.
    where=(--hostfile /dev/null --num_gpus "${NPROC:?number of ranks}")
else
    where=(--hostfile "$HOSTFILE" --master_addr "${HEAD:?address of machine 0}")
    where+=(${NODE_RANK:+--no_ssh --node_rank "$NODE_RANK"})
fi

exec "$PYTHON" -m deepspeed.launcher.runner "${where[@]}" --master_port "${PORT:-29500}" \
    "${PROGRAM:-$here/train_deepspeed.py}" "$@"
