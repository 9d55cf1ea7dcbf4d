#!/usr/bin/env bash
# Several machines that number themselves, and may come and go. The same on each of them:
#
#   HEAD=first-machine NNODES=2 NPROC=8 JOB=run1 launch/nodes_c10d.sh --config my.yaml
#
# HEAD       name or address, for all, of the machine that keeps the list; PORT there, 29500 unless
#            set. It must stay until the end
# IS_HOST    true on that machine, false on the others; unset, each compares HEAD with its own
#            names, which fails where HEAD is an address that the machine does not know as its own
# NNODES     number of machines, or 2:4 for at least two and at most four
# LOCAL_ADDR address of this machine for the others, if its full host name does not lead to it
# JOB, NPROC, RESTARTS (3 unless set), WAIT_S, IFACE, PROGRAM: as in nodes_static.sh
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/environment.sh"

case "${NNODES:?number of machines}" in
*:*)
    # torchrun of torch 2.13 shares one store between its machines and the ranks. A machine that
    # comes later then waits 60 s for an address that nobody sends, and fails.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE="${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}"
    ;;
esac

# read_timeout: how long the others try to reach HEAD; torchrun gives up after 60 s.
wait_s="${WAIT_S:-600}"
conf="join_timeout=$wait_s,read_timeout=$wait_s${IS_HOST:+,is_host=$IS_HOST}"

exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$NNODES" --rdzv-backend c10d --rdzv-conf "$conf" \
    --rdzv-endpoint "${HEAD:?address of one machine}:${PORT:-29500}" \
    ${JOB:+"--rdzv-id=$JOB"} ${LOCAL_ADDR:+"--local-addr=$LOCAL_ADDR"} \
    --nproc-per-node "${NPROC:-auto}" --max-restarts "${RESTARTS:-3}" \
    "${PROGRAM:-$here/train.py}" "$@"
