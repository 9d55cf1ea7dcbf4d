"""`distmuon train`: the training run of `launch/train.py`, with the same arguments."""

from __future__ import annotations

import argparse
import sys

_PROGRAM = "distmuon train"
_HINT = (
    "hint: this is one process. For several, put a launcher in front:\n"
    "  torchrun --standalone --nproc-per-node 2 -m distmuon train "
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `train`; its arguments go to the training as they are.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "train", help="train a model from a configuration; takes torchrun's ranks", add_help=False
    )
    parser.set_defaults(run=_run, takes_rest=True)


def _run(options: argparse.Namespace) -> int:
    import torch.distributed as dist
    from torch.distributed.elastic.multiprocessing.errors import record

    from distmuon.training.main import main

    arguments: list[str] = options.rest
    asks = {"-h", "--help"} & set(arguments)
    if not asks and not dist.is_torchelastic_launched() and not _several():
        print(_HINT + " ".join(arguments), file=sys.stderr)
    # `record` hands a rank's traceback to torchrun, which shows the first failure of all ranks.
    return record(main)(arguments, program=_PROGRAM) or 0


def _several() -> bool:
    """Whether another launcher, such as Slurm's, has set the ranks up."""
    from distmuon.training.config import ConfigError, Launch

    try:
        return Launch.from_environment().world_size > 1
    except ConfigError:
        return True  # the training says what is wrong with it
