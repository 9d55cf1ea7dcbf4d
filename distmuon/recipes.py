"""Published ways to train with Muon as plain keyword arguments; learning rates between scalings.

    recipe = recipes.moonlight(lr=4.2e-4)
    groups = build_param_groups(model, **recipe.groups)
    optimizer = Muon(groups, **recipe.optimizer)

A `Recipe` holds dictionaries: print them, change them, leave some out. `recipe.keywords` has both
in one, for `distmuon.deepspeed.from_model` and `distmuon.adapters.transformers.MuonFactory`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple

from distmuon.errors import see, with_entry
from distmuon.update_rules import AdjustLrFn, adjust_lr_factor

# Root mean square of AdamW's updates that Moonlight found usual, and matches.
ADAMW_RMS = 0.2
# What recipes are called is not what their scaling is called.
_SCALINGS = {
    "moonlight": "match_rms_adamw",
    "kimi_k2": "match_rms_adamw",
    "normuon": "match_rms_adamw",
    "keller": "original",
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Keyword arguments, to be used as they are or changed.

    Attributes:
        name: Whose recipe it is.
        groups: For `build_param_groups`.
        optimizer: For `Muon`.
        beside: What belongs to the recipe and is no option of either: schedule, clipping, QK-Clip.
        source: Where it is published.
    """

    name: str
    groups: dict[str, Any]
    optimizer: dict[str, Any]
    beside: dict[str, Any]
    source: str

    @property
    def keywords(self) -> dict[str, Any]:
        """Options of groups and optimizer in one dictionary of its own."""
        return {**self.groups, **self.optimizer}


class Rates(NamedTuple):
    """A learning rate, and the weight decay that goes with it.

    Attributes:
        lr: Learning rate.
        weight_decay: Decoupled decay per unit of lr.
    """

    lr: float
    weight_decay: float


def convert_lr(
    lr: float,
    *,
    source: AdjustLrFn | Literal["adamw"],
    target: AdjustLrFn | Literal["adamw"],
    shape: tuple[int, int],
    weight_decay: float = 0.0,
) -> Rates:
    """Keep step and decay of a matrix when the scaling of its update changes.

    The step is `lr * factor * O` and the decay `lr * weight_decay * W`, so the learning rate is
    divided by what the factor grows by, and the weight decay multiplied. Factors depend on the
    shape: except between "adamw", "match_rms_adamw" and "update_rms" the result holds for matrices
    of this shape only.

    Args:
        lr: Learning rate under `source`.
        source: An `adjust_lr_fn`, or "adamw": AdamW, whose updates have root mean square 0.2.
        target: Likewise.
        shape: A x B of the matrix that is to make the same step; the commonest, say.
        weight_decay: Under `source`.

    Returns:
        Both under `target`.

    Raises:
        ValueError: for a negative number, a shape below 1 x 1 or an unknown scaling.
        TypeError: for a value that is no number, a shape that is none, or a scaling that is neither
            a name nor callable.
    """
    _check_rates(lr=lr, weight_decay=weight_decay)
    if not isinstance(shape, Sequence) or not all(map(_is_size, shape)):
        raise TypeError(f"Invalid {shape=}. Must be two integers." + see("bad-option"))
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(
            f"Invalid {shape=}. Must be rows and columns of a matrix." + see("bad-option")
        )
    ratio = _factor("target", target, shape) / _factor("source", source, shape)
    return Rates(lr / ratio, weight_decay * ratio)


def moonlight(lr: float = 4.2e-4, *, weight_decay: float = 0.1) -> Recipe:
    """AdamW's learning rate and weight decay for everything; norms are decayed too.

    Args:
        lr: Learning rate, AdamW's. The default is the 16B model's.
        weight_decay: Decoupled decay per unit of lr.

    Returns:
        The recipe.

    Raises:
        ValueError: for a negative number; TypeError for what is none.

    Source: arXiv 2502.16982, equation 4 and sections 2.2 and 3.3; decay of norms: appendix D.
    """
    _check_rates(lr=lr, weight_decay=weight_decay)
    return Recipe(
        "moonlight",
        {"weight_decay": weight_decay, "decay": "all"},
        {"lr": lr, **_published(), "adjust_lr_fn": "match_rms_adamw"},
        {"schedule": "cosine", "warmup_steps": 2000, "final_lr": 0.1},
        "Moonlight, arXiv 2502.16982",
    )


def kimi_k2(lr: float = 2e-4, *, weight_decay: float = 0.1) -> Recipe:
    """Moonlight's rule, with QK-Clip at a logit of 100.

    Args:
        lr: Learning rate, AdamW's. The default is the 1T model's, constant for 10T tokens and then
            on a cosine to a tenth for 5.5T.
        weight_decay: Decoupled decay per unit of lr.

    Returns:
        The recipe.

    Raises:
        ValueError: for a negative number; TypeError for what is none.

    Source: Kimi K2, arXiv 2507.20534. Whether norms are decayed is not said there.
    """
    _check_rates(lr=lr, weight_decay=weight_decay)
    return Recipe(
        "kimi_k2",
        {"weight_decay": weight_decay, "decay": "weights"},
        {"lr": lr, **_published(), "adjust_lr_fn": "match_rms_adamw"},
        {"schedule": "wsd", "cooldown": 5.5 / 15.5, "final_lr": 0.1, "qk_clip_tau": 100.0},
        "Kimi K2, arXiv 2507.20534",
    )


def keller(lr: float = 0.02, *, adam_lr: float = 3e-4, weight_decay: float = 0.01) -> Recipe:
    """Keller Jordan's scaling, sqrt(max(1, A/B)), with a learning rate of its own for the rest.

    Args:
        lr: Learning rate of the matrices.
        adam_lr: Learning rate of the rest.
        weight_decay: Decoupled decay per unit of lr.

    Returns:
        The recipe.

    Raises:
        ValueError: for a negative number; TypeError for what is none.

    Source: the example in the README of github.com/KellerJordan/Muon.
    """
    _check_rates(lr=lr, adam_lr=adam_lr, weight_decay=weight_decay)
    return Recipe(
        "keller",
        {"weight_decay": weight_decay, "decay": "all", "adam_lr": adam_lr},
        {"lr": lr, **_published(), "adjust_lr_fn": "original"},
        {},
        "Keller Jordan's Muon, github.com/KellerJordan/Muon",
    )


def mup(
    lr: float = 0.02, *, width: int, adam_lr: float = 3e-4, weight_decay: float = 0.1
) -> Recipe:
    """Steps of spectral norm lr * sqrt(A/B): a learning rate tuned at a small width transfers.

    Args:
        lr: Learning rate of the matrices, tuned on a small model; the default is a first guess.
        width: Of the model. An lr that suits a d x d matrix is 0.2*sqrt(d) times AdamW's, so that
            the weight decay is divided by that.
        adam_lr: Learning rate of the rest.
        weight_decay: AdamW's, per unit of AdamW's lr.

    Returns:
        The recipe.

    Raises:
        ValueError: for a width below 1, or a negative number; TypeError for what is none.

    Source: Bernstein, "Deriving Muon"; the modular norm, arXiv 2405.14813.
    """
    if not _is_size(width):
        raise TypeError(f"Invalid {width=}. Must be an integer." + see("bad-option"))
    if width < 1:
        raise ValueError(f"Invalid {width=}. Must be >= 1." + see("bad-option"))
    _check_rates(adam_lr=adam_lr)
    rates = convert_lr(
        lr, source="adamw", target="mup", shape=(width, width), weight_decay=weight_decay
    )
    return Recipe(
        "mup",
        {"weight_decay": rates.weight_decay, "decay": "weights", "adam_lr": adam_lr},
        {"lr": lr, **_published(), "adjust_lr_fn": "mup"},
        {},
        "modular norm, arXiv 2405.14813",
    )


def normuon(lr: float = 4e-4, *, weight_decay: float = 0.1) -> Recipe:
    """NorMuon as in its paper: AdamW's learning rate, decay of matrices only, no Nesterov momentum.

    Args:
        lr: Learning rate, AdamW's. The default is that of the paper's experiments.
        weight_decay: Decoupled decay per unit of lr.

    Returns:
        The recipe.

    Raises:
        ValueError: for a negative number; TypeError for what is none.

    Source: NorMuon, arXiv 2510.05491.
    """
    _check_rates(lr=lr, weight_decay=weight_decay)
    return Recipe(
        "normuon",
        {"weight_decay": weight_decay, "decay": "weights", "matrices": "normuon"},
        {"lr": lr, **_published(), "nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
        {},
        "NorMuon, arXiv 2510.05491",
    )


def _published() -> dict[str, Any]:
    """What all of them have in common: Keller Jordan's coefficients among it, not our own."""
    return {
        "momentum": 0.95,
        "nesterov": True,
        "ns_coefficients": "keller",
        "ns_steps": 5,
        "betas": (0.9, 0.95),
        "eps": 1e-8,
    }


def _factor(side: str, scaling: AdjustLrFn | Literal["adamw"], shape: tuple[int, int]) -> float:
    rows, cols = shape
    if scaling == "adamw":
        # The polar factor of an A x B matrix has root mean square 1/sqrt(max(A, B)).
        return ADAMW_RMS * math.sqrt(max(rows, cols))
    try:
        return adjust_lr_factor(scaling, rows, cols)
    except (TypeError, ValueError) as error:
        if callable(scaling):
            raise
        known = _SCALINGS.get(str(scaling).lower())
        meant = f' The recipe {scaling!r} has "{known}".' if known else ""
        message = f'{side}={scaling!r} is neither "adamw" nor an adjust_lr_fn.{meant} {error}'
        raise type(error)(with_entry(message, "bad-option")) from None


def _check_rates(**rates: object) -> None:
    for name, value in rates.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(
                f"Invalid {name}={value!r} of type {type(value).__name__}. Must be a number."
                + see("bad-option")
            )
        if not 0 <= float(value) < math.inf:
            raise ValueError(
                f"Invalid {name}={value}. Must be >= 0 and finite." + see("bad-option")
            )


def _is_size(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
