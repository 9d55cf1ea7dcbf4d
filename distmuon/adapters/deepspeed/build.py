"""From a model to the optimizer that `deepspeed.initialize` takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from distmuon.adapters.deepspeed.config_check import check_config, check_version
from distmuon.adapters.deepspeed.optimizer import ZeroOrtho
from distmuon.layout import read_spec
from distmuon.ownership import assign
from distmuon.param_groups import BlocksByPattern, Decay, build_param_groups
from distmuon.structure import Axes


def from_model(  # noqa: PLR0913 - build_param_groups' options beside its own
    model: nn.Module,
    lr: float = 1e-3,
    *,
    adam_lr: float | None = None,
    weight_decay: float = 0.1,
    decay: Decay = "weights",
    overrides: Mapping[str, str] | None = None,
    blocks: BlocksByPattern | None = None,
    axes: Mapping[str, Axes] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    **options: Any,
) -> ZeroOrtho:
    """Build the optimizer for `deepspeed.initialize(model=model, optimizer=..., config=...)`.

    Call it after `deepspeed.init_distributed()`, so that the number of ranks is known: matrices
    are put into the order in which ZeRO's partitions cut hardly any of them.

    Args:
        model: The model that `deepspeed.initialize` gets, on whatever device and in its dtype.
        lr: Learning rate; with the default scaling AdamW's carries over.
        adam_lr: Learning rate of the AdamW groups; None: the same.
        weight_decay: As `distmuon.build_param_groups`.
        decay: As `distmuon.build_param_groups`.
        overrides: As `distmuon.build_param_groups`.
        blocks: As `distmuon.build_param_groups`.
        axes: As `distmuon.build_param_groups`.
        config: DeepSpeed's configuration, a dictionary or a JSON file, if it is to be checked here
            and now for what this optimizer cannot do.
        **options: As `ZeroOrtho`.

    Returns:
        The optimizer.

    Raises:
        ImportError: if DeepSpeed is not installed.
        ValueError: for a configuration that would not work, saying what to change, and as
            `distmuon.build_param_groups` and `ZeroOrtho`.
        TypeError: likewise.
    """
    check_version()
    if config is not None:
        check_config(config)
    groups = build_param_groups(
        model,
        weight_decay=weight_decay,
        decay=decay,
        overrides=overrides,
        blocks=blocks,
        axes=axes,
    )
    return ZeroOrtho(arrange(groups, adam_lr), lr=lr, **options)


def arrange(groups: Iterable[Mapping[str, Any]], adam_lr: float | None) -> list[dict[str, Any]]:
    """Groups as DeepSpeed should partition them.

    Args:
        groups: From `build_param_groups`.
        adam_lr: Learning rate of the AdamW groups; None: none of their own.

    Returns:
        The same parameters: MoE experts in groups of their own, matrices in an order in which equal
        partitions hold equal work and cut few of them.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    arranged = []
    for group in groups:
        own_lr = adam_lr is not None and group["algorithm"] == "adamw"
        given = {**group, "lr": adam_lr} if own_lr else group
        arranged += [in_cheap_order(part, world_size) for part in _split_experts(given)]
    return arranged


def _split_experts(group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Experts that DeepSpeed's MoE partitions over fewer ranks in groups of their own."""
    parts: defaultdict[str | None, list[Any]] = defaultdict(list)
    for name, parameter in group["params"]:
        expert = not getattr(parameter, "allreduce", True)
        parts[parameter.group_name if expert else None].append((name, parameter))
    return [
        {**group, "params": params, **({} if key is None else {"moe": True, "name": key})}
        for key, params in parts.items()
    ]


def in_cheap_order(group: dict[str, Any], world_size: int) -> dict[str, Any]:
    """A group of matrices in the order in which equal partitions cut few of them.

    Args:
        group: From `build_param_groups`.
        world_size: Number of partitions.

    Returns:
        The same parameters; another rule's group as it is.
    """
    if group["algorithm"] != "muon" or "moe" in group:
        return group
    specs = [read_spec(name, p.shape, group) for name, p in group["params"]]
    order = assign(specs, world_size).order
    return {**group, "params": [group["params"][index] for index in order]}
