"""Train the same run inside DeepSpeed; needs the extra "deepspeed".

torchrun --standalone --nproc-per-node 2 launch/train_deepspeed.py --config configs/tiny.yaml
deepspeed --num_gpus 2 launch/train_deepspeed.py --config configs/tiny.yaml
"""

import sys

from distmuon.cli.interrupts import leaving_at_once

with leaving_at_once("launch/train_deepspeed.py"):
    from torch.distributed.elastic.multiprocessing.errors import record

    from distmuon.training.main import main

if __name__ == "__main__":
    # The deepspeed launcher appends --local_rank, which is in the environment as well.
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    sys.exit(record(main)(["run.engine=deepspeed", *given]))
