"""What a launcher tells a process, told to the ranks of the harness."""

from __future__ import annotations

import os

import torch.distributed as dist


def as_launched() -> None:
    """Set what `accelerate launch --cpu` and torchrun set; one process is started by nobody."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if dist.get_world_size() > 1:
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(dist.get_rank())
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(dist.get_world_size())
        # The ranks have met already; Accelerate only wants to see that there is an address.
        os.environ["MASTER_ADDR"] = "127.0.0.1"
