"""Train a language model. `python launch/train.py --help` lists everything that can be set.

torchrun --standalone --nproc-per-node 2 launch/train.py --config configs/shakespeare.yaml
"""

import sys

from distmuon.cli.interrupts import leaving_at_once

with leaving_at_once("launch/train.py"):
    from torch.distributed.elastic.multiprocessing.errors import record

    from distmuon.training.main import main

if __name__ == "__main__":
    # `record` hands a rank's traceback to torchrun, which shows the first failure of all ranks.
    sys.exit(record(main)())
