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
        TypeError: if it is no configuration at all.
        OSError: if the file cannot be read.
    """
    entries = _read(config)
    zero = _section(entries, "zero_optimization")
    stage = zero.get("stage", 0)
    if type(stage) is not int:
        raise ValueError(
            f"zero_optimization.stage is {stage!r}. Must be 0, 1 or 2." + see("deepspeed")
        )
    if stage == 3:
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
    offload = _section(zero, "offload_optimizer").get("device", "none")
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
    if int(_section(entries, "tensor_parallel").get("autotp_size", 0)) > 1:
        raise ValueError(
            "tensor_parallel.autotp_size is above 1: AutoTP cuts matrices, and Muon needs whole "
            "ones. Set it to 1." + see("deepspeed")
        )
    optimizer = _section(entries, "optimizer")
    if optimizer and not by_name:
        raise ValueError(
            'The configuration has an "optimizer" section of type '
            f"{optimizer.get('type')!r}, which DeepSpeed ignores beside an optimizer "
            "that is handed to it. Remove the section; its lr and weight_decay go to from_model."
            + see("deepspeed")
        )
    if stage > 0 and not by_name and not entries.get("zero_allow_untested_optimizer"):
        raise ValueError(
            "DeepSpeed takes an optimizer that it does not know only with "
            '"zero_allow_untested_optimizer": true. Add it to the configuration.' + see("deepspeed")
        )


def _read(config: Mapping[str, Any] | str | Path) -> Mapping[str, Any]:
    entries = config
    if isinstance(config, (str, Path)):
        try:
            entries = json.loads(Path(config).read_text())
        except ValueError as error:
            raise ValueError(f"{config} is no JSON: {error}" + see("deepspeed")) from error
    if not isinstance(entries, Mapping):
        raise TypeError(
            f"Invalid configuration of type {type(entries).__name__}. Must be a dictionary or the "
            "path of a JSON file." + see("deepspeed")
        )
    return entries


def _section(entries: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    section = entries.get(key)
    if section is not None and not isinstance(section, Mapping):
        raise ValueError(
            f'"{key}" in the configuration is {section!r}. Must be a section in braces.'
            + see("deepspeed")
        )
    return section or {}
