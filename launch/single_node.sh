#!/usr/bin/env bash
# One machine.
#
#   NPROC=8 launch/single_node.sh --config configs/shakespeare.yaml
#
# NPROC     ranks; auto takes one for each GPU, or for each core where there is no GPU
# RESTARTS  times that all ranks are started again when one has died; 0 unless set, as a mistake in
#           the configuration would only be told so many times more
# PROGRAM   your own program in place of launch/train.py
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/environment.sh"

# --standalone: torchrun takes a free port, so that two jobs on a machine do not meet, and makes up
# a name for the job, by which a restarted run finds its folder.
exec "$PYTHON" -m torch.distributed.run --standalone \
    --nproc-per-node "${NPROC:-auto}" --max-restarts "${RESTARTS:-0}" \
    "${PROGRAM:-$here/train.py}" "$@"
