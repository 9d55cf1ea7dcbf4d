"""The setup of a rank in lines, to be compared with the other ranks' and with its own later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from distmuon.buckets import BucketSpec
from distmuon.options import Policy, read_options
from distmuon.qk_clip import QKClip
from distmuon.structure import read_blocks
from distmuon.version import __version__


def outline(group: Mapping[str, Any]) -> str:
    """What of a group the layout depends on.

    Args:
        group: A `param_groups` entry.

    Returns:
        Equal texts for groups that lead to the same layout.
    """
    blocks = read_blocks(group["blocks"])
    reading = "" if group["axes"] == "out_in" else f" read as {group['axes']}"
    reading += "" if blocks is None else f" in blocks {tuple(blocks)}"
    seed = group.get("stochastic_rounding")
    rounding = "" if seed is None else f" rounded with seed {seed}"
    return f"{len(group['params'])} {group['algorithm']}{reading}{rounding}"


def describe_setup(
    specs: Sequence[BucketSpec],
    groups: Sequence[Mapping[str, Any]],
    policy: Policy,
    clip: QKClip | None,
) -> list[str]:
    """What every rank must have alike; a wrong value on one rank is a difference, too.

    Args:
        specs: Of the flat buffers.
        groups: The parameter groups.
        policy: How the ranks work together.
        clip: QK-Clip, if there is one.

    Returns:
        Readable lines; the first that differs between two ranks names the mistake.
    """
    lines = [f"distmuon {__version__}, torch {torch.__version__}", str(policy)]
    lines += clip.describe() if clip else ["no QK-Clip"]
    try:
        options = [read_options(group, index) for index, group in enumerate(groups)]
        lines += [option.describe() for option in options]
        for spec in specs:
            lines += spec.lines(options)
    except (TypeError, ValueError) as error:
        lines.append(str(error))
    return lines
