"""What in a DeepSpeed configuration this optimizer cannot do, each with what to change."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from distmuon.errors import see

_OLDEST = (0, 19)


def check_version() -> None:
    """Look whether DeepSpeed is there, and new enough.

    Raises:
        ImportError: if it is not installed.

    Warns:
        UserWarning: for versions whose gradients were found wrong on some stages.
    """
    try:
        version = metadata.version("deepspeed")
    except metadata.PackageNotFoundError as error:
        raise ImportError(
            "DeepSpeed is not installed. Install it with: pip install 'distmuon[deepspeed]'"
            + see("missing-package")
        ) from error
    if is_old(version):
        warnings.warn(
            f"DeepSpeed {version} is older than 0.19. Some versions before it average gradients "
            "wrongly in ZeRO-2 with gradient accumulation, for every optimizer; distmuon is tested "
            "with 0.19.8. Upgrade with: pip install -U deepspeed" + see("missing-package"),
            stacklevel=3,
        )


def is_old(version: str) -> bool:
    """Whether a version of DeepSpeed is older than those that distmuon is tested with."""
    return tuple(map(int, re.findall(r"\d+", version)[:2])) < _OLDEST


def check_config(config: Mapping[str, Any] | str | Path, *, by_name: bool = False) -> None:
    """Refuse what would train wrongly, hang, or fail later and less clearly.

    Args:
        config: DeepSpeed's configuration, a dictionary or a JSON file.
        by_name: Whether its "optimizer" section names this optimizer (`register`); otherwise the
            optimizer is built by `from_model`, and there must be no such section.

    Raises:
        ValueError: for the first entry that cannot be, saying what to change.
    """
    entries = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
    zero = entries.get("zero_optimization") or {}
    if zero.get("stage", 0) == 3:
        raise ValueError(
            "zero_optimization.stage is 3: no optimizer sees whole matrices there, and a client "
            "Muon would silently train wrongly. Set it to 2; the optimizer state is sharded just "
            "the same." + see("deepspeed-zero3")
        )
    if zero.get("elastic_checkpoint"):
        raise ValueError(
            "zero_optimization.elastic_checkpoint cannot be resumed from with this optimizer. Set "
            "it to false; distmuon.deepspeed.load_resharded loads on another number of ranks."
            + see("deepspeed")
        )
    offload = (zero.get("offload_optimizer") or {}).get("device", "none")
    if offload == "nvme":
        raise ValueError(
            'zero_optimization.offload_optimizer.device is "nvme". This optimizer\'s state is 1/N '
            'per rank already; set it to "none".' + see("deepspeed")
        )
    if offload == "cpu" and entries.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            "With zero_optimization.offload_optimizer DeepSpeed accepts its own optimizers only. "
            'Set "zero_force_ds_cpu_optimizer": false beside it, or remove offload_optimizer.'
            + see("deepspeed")
        )
    if int((entries.get("tensor_parallel") or {}).get("autotp_size", 0)) > 1:
        raise ValueError(
            "tensor_parallel.autotp_size is above 1: AutoTP cuts matrices, and Muon needs whole "
            "ones. Set it to 1." + see("deepspeed")
        )
    if entries.get("optimizer") and not by_name:
        raise ValueError(
            'The configuration has an "optimizer" section of type '
            f"{entries['optimizer'].get('type')!r}, which DeepSpeed ignores beside an optimizer "
            "that is handed to it. Remove the section; its lr and weight_decay go to from_model."
            + see("deepspeed")
        )
    stage = zero.get("stage", 0)
    if stage > 0 and not by_name and not entries.get("zero_allow_untested_optimizer"):
        raise ValueError(
            "DeepSpeed takes an optimizer that it does not know only with "
            '"zero_allow_untested_optimizer": true. Add it to the configuration.' + see("deepspeed")
        )
