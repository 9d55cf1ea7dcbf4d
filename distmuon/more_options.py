"""Options of a parameter group that torch.optim.Muon has no counterpart of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict, get_args

from distmuon.errors import see
from distmuon.update_rules import DecayRule


class MoreOptions(TypedDict, total=False):
    """What `Muon` takes beside the arguments of its signature, for all groups or in one.

    Attributes:
        decay_rule: Which elements are decayed: "decoupled" all of them, "cautious" those that the
            update makes smaller too (Chen et al., arXiv 2510.12402).
        max_update_rms: Largest root mean square of a matrix's scaled update, before lr. What is
            larger is scaled down to it; None for no bound. Other updates have none: a group of them
            that names one is refused, and the constructor's is not for them.
        stochastic_rounding: Seed with which bfloat16 parameters are rounded at random, in place of
            an fp32 master copy; None keeps the copy. See `distmuon.rounding`.
    """

    decay_rule: DecayRule
    max_update_rms: float | None
    stochastic_rounding: int | None


MORE_DEFAULTS: MoreOptions = {
    "decay_rule": "decoupled",
    "max_update_rms": None,
    "stochastic_rounding": None,
}
# What a run says of itself: saved groups do not change it, because it decides what is kept.
OF_THE_RUN = ("stochastic_rounding",)


def complete(more: MoreOptions) -> MoreOptions:
    """Options with the defaults of those that are not given.

    Args:
        more: Keyword arguments that the signature does not have.

    Returns:
        All of them; their values are checked with the group's.

    Raises:
        TypeError: for an unknown one.
    """
    unknown = sorted(more.keys() - MORE_DEFAULTS.keys())
    if unknown:
        raise TypeError(
            f"Unknown argument {unknown[0]!r}. Must be one of the signature's or of "
            f"{sorted(MORE_DEFAULTS)}." + see("bad-option")
        )
    return {**MORE_DEFAULTS, **more}


def read_more(group: Mapping[str, Any], index: int) -> MoreOptions:
    """Check these options of a parameter group.

    Args:
        group: A `param_groups` entry. One that was saved before an option existed lacks it.
        index: Its position, for messages.

    Returns:
        All of them.

    Raises:
        ValueError: for a value out of range, naming key and group.
        TypeError: for a value of a wrong type, naming key and group.
    """
    decay_rule, bound, seed = (group.get(key, default) for key, default in MORE_DEFAULTS.items())
    if decay_rule not in get_args(DecayRule):
        raise ValueError(
            f"Invalid {decay_rule=} in group {index}. Must be one of {get_args(DecayRule)}."
            + see("bad-option")
        )
    if bound is not None and (isinstance(bound, bool) or not isinstance(bound, (int, float))):
        raise TypeError(
            f"Invalid max_update_rms={bound!r} in group {index}. Must be a number."
            + see("bad-option")
        )
    if bound is not None and not 0 < bound < math.inf:
        raise ValueError(
            f"Invalid max_update_rms={bound} in group {index}. Must be > 0 and finite, or None."
            + see("bad-option")
        )
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(
            f"Invalid stochastic_rounding={seed!r} in group {index}. Must be an int, the seed, or "
            "None." + see("bad-option")
        )
    return {"decay_rule": decay_rule, "max_update_rms": bound, "stochastic_rounding": seed}
