"""The hyperparameters of one parameter group, read from torch's dictionary and checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch

from distmuon.companion import find_companion
from distmuon.cost import CostModel
from distmuon.errors import see, with_entry
from distmuon.layout import LayoutChoice, LayoutKind
from distmuon.more_options import read_more
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.phases import Profile
from distmuon.splits import Sharing, SplitDtype
from distmuon.structure import Axes, Blocks, read_blocks
from distmuon.update_rules import (
    FLOAT32_MAX,
    AdjustLrFn,
    DecayRule,
    adjust_lr_factor,
    overflow,
)

# One of those below, or the name of an optimizer class: companion.py.
Algorithm = str
ALGORITHMS: tuple[Algorithm, ...] = ("muon", "normuon", "adamw")
# Those that orthogonalize matrices, which have owners; the others are elementwise, or classes.
MATRIX_ALGORITHMS: tuple[Algorithm, ...] = ("muon", "normuon")
Reduce = Literal["ddp", "hook", "owned"]
NonFinite = Literal["raise", "skip", "propagate"]
MissingGrad = Literal["raise", "zero"]
Wire = Literal["full", "bfloat16"]
StateDictKind = Literal["whole", "sharded"]
NsDtype = Literal["float32", "float64", "bfloat16", "float16"]

# Past four parts a matrix of a transformer sends more than its pieces would.
MAX_SPLIT = 4
# Integers of a Policy, and the least that each may be.
_LEAST = (
    ("max_skips", 1),
    ("wave_bytes", 1),
    ("check_desync_every", 0),
    ("max_split", 1),
    ("diagnostics_every", 0),
    ("publish_bytes", 0),
)


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """What the update rules read from a parameter group; names as in torch.optim.

    Attributes:
        algorithm: "muon", "normuon", "adamw", or an optimizer class.
        lr: Learning rate.
        weight_decay: Decoupled decay per unit of lr.
        momentum: Decay of Muon's and NorMuon's momentum average.
        nesterov: Whether Muon looks ahead.
        ns_coefficients: Newton-Schulz coefficients: a preset's name, a triple or several.
        ns_steps: Newton-Schulz iterations; None takes the preset's own number.
        ns_dtype: Dtype of the Newton-Schulz products by name; None chooses by device and shape.
        adjust_lr_fn: Shape scaling of Muon's update.
        axes: What the dimensions of Muon's matrices stand for.
        blocks: Where each matrix is cut into blocks that are orthogonalized apart.
        betas: AdamW's moment decays; the second is NorMuon's too.
        eps: Denominator offset of AdamW and NorMuon.
        decay_rule: Which elements are decayed; see `distmuon.more_options`.
        max_update_rms: Bound on a matrix's update; see `distmuon.more_options`.
        stochastic_rounding: A seed, or None; see `distmuon.more_options`.
    """

    algorithm: Algorithm
    lr: float
    weight_decay: float
    momentum: float
    nesterov: bool
    ns_coefficients: Coefficients
    ns_steps: int | None
    ns_dtype: NsDtype | None
    adjust_lr_fn: AdjustLrFn
    axes: Axes
    blocks: Blocks | None
    betas: tuple[float, float]
    eps: float
    decay_rule: DecayRule
    max_update_rms: float | None
    stochastic_rounding: int | None

    def describe(self) -> str:
        """All values in a form that is equal on ranks whose options are; callables by name."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        if callable(self.adjust_lr_fn):
            known["adjust_lr_fn"] = getattr(self.adjust_lr_fn, "__qualname__", "callable")
        return ", ".join(f"{key}={value}" for key, value in known.items())


@dataclass(frozen=True, slots=True)
class Policy:
    """How the ranks work together; the same for all groups, fixed at construction.

    Attributes:
        reduce: Who averages the gradients: "ddp", "hook" or "owned".
        nonfinite: What a NaN or infinity in a gradient does: "raise", "skip" the step, or
            "propagate" into the parameters: nobody looks, so the host need not wait for a GPU.
        max_skips: How many steps in a row may be skipped before it raises after all.
        missing_grad: What a gradient on some ranks only means: "raise", or "zero" on the others.
        wave_bytes: Bytes of momentum that one rank fetches at a time.
        publish_bytes: Bytes of fp32 parameters that a rank publishes at a time, as soon as they are
            final; 0 for all at once at the end.
        check_desync_every: Steps between two comparisons of all parameters; 0 for never.
        layout: Where Muon's matrices lie: "flat", "aligned", or the faster one by "auto".
        cost_model: What work and messages cost; None for the defaults of the device.
        max_split: Most ranks that may share one matrix; 1 for none.
        split_dtype: Dtype of the Gram matrices and transforms of shared matrices.
        profile: Whether the phases of a step are timed: "off" or "phases".
        diagnostics_every: Steps between two looks at updates and weights; 0 for none.
        wire: What momentum and updates travel in: "full" for the state's own dtype, "bfloat16" for
            half the bytes and eight bits.

    Raises:
        ValueError: for a value out of range.
        TypeError: for a value of the wrong type.
    """

    reduce: Reduce = "ddp"
    nonfinite: NonFinite = "raise"
    max_skips: int = 10
    missing_grad: MissingGrad = "raise"
    wave_bytes: int = 64 * 2**20
    check_desync_every: int = 0
    layout: LayoutChoice = "flat"
    cost_model: CostModel | None = None
    max_split: int = 1
    split_dtype: SplitDtype = "float32"
    profile: Profile = "off"
    diagnostics_every: int = 0
    wire: Wire = "full"
    publish_bytes: int = 0

    @property
    def wire_itemsize(self) -> int:
        """Bytes of an element of fp32 momentum on its way, to predict with."""
        return 2 if self.wire == "bfloat16" else 4

    def __post_init__(self) -> None:
        """Check every value."""
        for key, allowed in (
            ("reduce", get_args(Reduce)),
            ("nonfinite", get_args(NonFinite)),
            ("wire", get_args(Wire)),
            ("missing_grad", get_args(MissingGrad)),
            ("layout", (*get_args(LayoutKind), "auto")),
            ("split_dtype", get_args(SplitDtype)),
            ("profile", get_args(Profile)),
        ):
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(
                    f"Invalid {key}={value!r}. Must be one of {allowed}." + see("bad-option")
                )
        for key, least in _LEAST:
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Invalid {key}={value!r}. Must be an int." + see("bad-option"))
            if value < least:
                raise ValueError(f"Invalid {key}={value}. Must be >= {least}." + see("bad-option"))
        if self.max_split > MAX_SPLIT:
            raise ValueError(
                f"Invalid max_split={self.max_split}. Must be <= {MAX_SPLIT}." + see("bad-option")
            )
        if self.max_split > 1 and self.layout == "aligned":
            raise ValueError(
                f'max_split={self.max_split} needs layout="flat" or "auto": with "aligned" every '
                "matrix stays whole where it lies, and nothing is exchanged." + see("bad-option")
            )
        if not isinstance(self.cost_model, CostModel | None):
            raise TypeError(
                f"Invalid cost_model of type {type(self.cost_model).__name__}. Must be a "
                "distmuon.CostModel or None." + see("bad-option")
            )
        if self.missing_grad == "zero" and self.reduce != "owned":
            raise ValueError(
                f'missing_grad="zero" needs reduce="owned", not {self.reduce!r}: only there does '
                "distmuon average the gradients itself. DistributedDataParallel fills in zeros "
                "with find_unused_parameters=True." + see("bad-option")
            )

    @property
    def wave_numel(self) -> int:
        """Elements of momentum per wave; they travel in fp32."""
        return self.wave_bytes // 4

    @property
    def part_numel(self) -> int:
        """Elements of a shard that are published at a time; 0 for all at once."""
        return -(-self.publish_bytes // 4)

    @property
    def sharing(self) -> Sharing:
        """How far matrices may be split."""
        return Sharing(self.max_split, 8 if self.split_dtype == "float64" else 4)


def read_options(group: Mapping[str, Any], index: int) -> GroupOptions:
    """Check a parameter group and turn it into a record.

    Read anew each step, because schedulers write into the dictionary.

    Args:
        group: A `param_groups` entry with every key filled in.
        index: Its position, for messages.

    Returns:
        The checked options.

    Raises:
        ValueError: for a value out of range, naming the key and the group.
        TypeError: for a value of the wrong type, naming the key and the group.
    """
    algorithm = group["algorithm"]
    _check_algorithm(algorithm, index)
    nesterov = group["nesterov"]
    if not isinstance(nesterov, bool):
        raise TypeError(
            f"Invalid {nesterov=} in group {index}. Must be True or False." + see("bad-option")
        )
    ns_dtype = group["ns_dtype"]
    if ns_dtype is not None and ns_dtype not in get_args(NsDtype):
        raise ValueError(
            f"Invalid {ns_dtype=} in group {index}. Must be one of {get_args(NsDtype)} or None."
            + see("bad-option")
        )
    try:
        adjust_lr_factor(group["adjust_lr_fn"], 2, 1)
    except (TypeError, ValueError) as error:
        raise type(error)(f"Group {index}: {error}") from None
    axes = group["axes"]
    if axes not in get_args(Axes):
        raise ValueError(
            f"Invalid {axes=} in group {index}. Must be one of {get_args(Axes)}." + see("bad-group")
        )
    try:
        blocks = read_blocks(group["blocks"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"Group {index}: {error}") from None
    more = read_more(group, index)
    weight_decay = _number(group, "weight_decay", index)
    if algorithm not in ALGORITHMS:
        _check_decay(algorithm, weight_decay, more["decay_rule"], index)
    eps = _number(group, "eps", index, below=FLOAT32_MAX)
    if algorithm == "normuon" and eps == 0:
        raise ValueError(
            f"Invalid {eps=} in group {index}. Must be > 0 with NorMuon: rows may be 0."
            + see("bad-option")
        )
    lr, betas = _number(group, "lr", index), _betas(group, index)
    _check_factors(lr, weight_decay, betas, index)
    return GroupOptions(
        algorithm=algorithm,
        lr=lr,
        weight_decay=weight_decay,
        momentum=_number(group, "momentum", index, below=1.0),
        nesterov=nesterov,
        ns_coefficients=group["ns_coefficients"],
        ns_steps=group["ns_steps"],
        ns_dtype=ns_dtype,
        adjust_lr_fn=group["adjust_lr_fn"],
        axes=axes,
        blocks=blocks,
        betas=betas,
        eps=eps,
        **more,
    )


def refuse_unused_bound(group: Mapping[str, Any], index: int, defaults: Mapping[str, Any]) -> None:
    """Refuse `max_update_rms` in a new group whose rule has no matrices to bound.

    Args:
        group: As the user gave it. What it has of the constructor is meant for the other groups.
        index: Its position, for the message.
        defaults: The constructor's.

    Raises:
        ValueError: if it says a bound itself.
    """
    algorithm = group.get("algorithm", defaults["algorithm"])
    bound = group.get("max_update_rms")
    if algorithm not in MATRIX_ALGORITHMS and bound not in (None, defaults["max_update_rms"]):
        raise ValueError(
            f"Invalid max_update_rms={bound} in group {index} with {algorithm=}: only updates of "
            f"{' and '.join(MATRIX_ALGORITHMS)} are bounded. Leave it out of this group, or clip "
            "its gradients." + see("bad-option")
        )


def _check_algorithm(algorithm: object, index: int) -> None:
    if algorithm in ALGORITHMS:
        return
    if not isinstance(algorithm, str) or "." not in algorithm:
        raise ValueError(
            f"Invalid {algorithm=} in group {index}. Must be one of {ALGORITHMS}, or an "
            'optimizer class such as "torch.optim.SGD(momentum=0.9)".' + see("bad-group")
        )
    try:
        find_companion(algorithm)
    except ValueError as error:
        raise ValueError(with_entry(f"Group {index}: {error}", "bad-group")) from None


def _check_decay(algorithm: str, weight_decay: float, decay_rule: DecayRule, index: int) -> None:
    if decay_rule != "decoupled":
        raise ValueError(
            f"Invalid {decay_rule=} in group {index}: {algorithm} decays its parameters by itself. "
            'Set decay_rule="decoupled" in this group, or algorithm="adamw".' + see("bad-option")
        )
    if weight_decay and not find_companion(algorithm).decays:
        raise ValueError(
            f"Invalid {weight_decay=} in group {index}: {algorithm} has no weight decay. Set "
            "weight_decay=0 in this group." + see("bad-option")
        )


def _betas(group: Mapping[str, Any], index: int) -> tuple[float, float]:
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(
            f"Invalid {betas=} in group {index}. Must be two numbers." + see("bad-option")
        )
    return (
        _number({"betas[0]": betas[0]}, "betas[0]", index, below=1.0),
        _number({"betas[1]": betas[1]}, "betas[1]", index, below=1.0),
    )


def _check_factors(lr: float, weight_decay: float, betas: tuple[float, float], index: int) -> None:
    most = overflow(lr=lr, weight_decay=weight_decay, betas=betas)
    if most is not None:
        raise ValueError(
            f"Invalid {lr=} in group {index}: {most}. Set a smaller lr." + see("bad-option")
        )


def _number(group: Mapping[str, Any], key: str, index: int, *, below: float = math.inf) -> float:
    value = group[key]
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()  # torch's schedulers may keep lr in a tensor
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"Invalid {key}={value!r} of type {type(value).__name__} in group {index}. "
            "Must be a number." + see("bad-option")
        )
    if not 0.0 <= value < below:
        bound = ">= 0.0 and finite" if below == math.inf else f"in [0.0, {below})"
        raise ValueError(
            f"Invalid {key}={value} in group {index}. Must be {bound}." + see("bad-option")
        )
    return float(value)
