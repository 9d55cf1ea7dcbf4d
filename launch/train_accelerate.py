"""Train a language model as launch/train.py does, under Accelerate: the same keys and files.

accelerate launch --config_file configs/accelerate/cpu.yaml launch/train_accelerate.py \
    --config configs/shakespeare.yaml
"""

import sys

from distmuon.cli.interrupts import leaving_at_once

with leaving_at_once("launch/train_accelerate.py"):
    from torch.distributed.elastic.multiprocessing.errors import record

    from distmuon.training.main import main

if __name__ == "__main__":
    # First, so that `run.engine=native` on the command line still wins.
    sys.exit(record(main)(["run.engine=accelerate", *sys.argv[1:]]))
