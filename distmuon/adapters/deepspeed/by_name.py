"""For configurations that name their optimizer: `"optimizer": {"type": "DistMuon", ...}`.

DeepSpeed has no registry of optimizers. It looks an unknown name up in `torch.optim` and hands the
class the bare parameters, without names. So the class has to be put there, which `register` does
when it is asked to, and the routes have to be on the parameters, where `tag` puts them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distmuon.adapters.deepspeed.build import arrange
from distmuon.adapters.deepspeed.config_check import check_version
from distmuon.adapters.deepspeed.optimizer import ZeroOrtho
from distmuon.errors import see
from distmuon.options import Algorithm
from distmuon.param_groups import Decay, build_param_groups


class Tag(NamedTuple):
    """What `tag` notes on a parameter.

    Attributes:
        name: FQN.
        algorithm: The update rule.
        decay: Whether it has weight decay.
    """

    name: str
    algorithm: Algorithm
    decay: bool


class TaggedZeroOrtho(ZeroOrtho):
    """`ZeroOrtho` from bare parameters with tags; what "DistMuon" in a configuration becomes."""

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-3,
        *,
        adam_lr: float | None = None,
        weight_decay: float = 0.1,
        **options: Any,
    ) -> None:
        """Sort tagged parameters into groups.

        Args:
            params: All parameters of the model; frozen ones are left out.
            lr: Learning rate.
            adam_lr: Learning rate of the AdamW groups; None: the same.
            weight_decay: Decay per unit of lr of the parameters that decay.
            **options: As `ZeroOrtho`.

        Raises:
            ValueError: if a parameter has no tag, and as `ZeroOrtho`.
        """
        groups: dict[tuple[Algorithm, bool], list[tuple[str, Tensor]]] = {}
        for position, parameter in enumerate(params):
            if not parameter.requires_grad:
                continue
            found = getattr(parameter, "distmuon", None)
            if found is None:
                raise ValueError(
                    f"Parameter {position} of shape {list(parameter.shape)} has no route. Call "
                    "distmuon.deepspeed.tag(model) before deepspeed.initialize." + see("deepspeed")
                )
            key = (found.algorithm, found.decay)
            groups.setdefault(key, []).append((found.name, parameter))
        ordered = sorted(groups, key=lambda key: (key[0] != "muon", not key[1]))
        plain = [
            {
                "params": groups[algorithm, decay],
                "algorithm": algorithm,
                "weight_decay": weight_decay if decay else 0.0,
            }
            for algorithm, decay in ordered
        ]
        super().__init__(arrange(plain, adam_lr), lr=lr, **options)


def tag(
    model: nn.Module,
    *,
    decay: Decay = "weights",
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Note on every trainable parameter which update rule it gets. Before `initialize`.

    Args:
        model: The model that `deepspeed.initialize` gets.
        decay: As `distmuon.build_param_groups`.
        overrides: As `distmuon.build_param_groups`.

    Raises:
        ValueError: as `distmuon.build_param_groups`.
        TypeError: likewise.
    """
    for group in build_param_groups(model, weight_decay=1.0, decay=decay, overrides=overrides):
        for name, parameter in group["params"]:
            parameter.distmuon = Tag(name, group["algorithm"], group["weight_decay"] > 0)


def register() -> None:
    """Let DeepSpeed find "DistMuon" by name, in this process.

    It becomes an attribute of `torch.optim`, and one of the optimizers that ZeRO takes without
    "zero_allow_untested_optimizer". A configuration cannot call it "Muon": that is DeepSpeed's own.

    Raises:
        ImportError: if DeepSpeed is not installed.
    """
    check_version()
    from deepspeed.runtime.zero import utils

    torch.optim.DistMuon = TaggedZeroOrtho  # type: ignore[attr-defined]
    if TaggedZeroOrtho not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(TaggedZeroOrtho)
