"""What all ranks must agree on before a step may touch anything; every rank raises together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch

from distmuon.collectives import Communicator
from distmuon.options import MissingGrad
from distmuon.plan import digest

# Averaged gradients are the same bits on every rank; gradients that were never averaged differ in
# their leading digits. The margin only allows for backends whose all-reduce rounds differently.
_AVERAGED_RTOL = 1e-3


def check_same_setup(communicator: Communicator, lines: Sequence[str]) -> None:
    """Compare a digest of the plan over the ranks.

    Args:
        communicator: The group.
        lines: This rank's description of parameters, plan and hyperparameters.

    Raises:
        RuntimeError: on every rank, naming the first line that differs and the ranks.
    """
    digests = communicator.collect(digest(lines))
    others = [rank for rank, seen in enumerate(digests) if seen != digests[0]]
    if not others:
        return
    descriptions = communicator.collect(list(lines))
    for here, there in zip_longest(descriptions[0], descriptions[others[0]], fillvalue="(nothing)"):
        if here != there:
            raise RuntimeError(
                f"Ranks {others} do not have the same optimizer as rank 0. First difference: "
                f"rank 0 has '{here}', rank {others[0]} has '{there}'. Build the same model and "
                "the same groups, in the same order, on every rank."
            )
    raise AssertionError("digests differ where the lines do not")


def check_averaged(
    communicator: Communicator, names: Sequence[str], norms: Sequence[float | None]
) -> None:
    """Refuse gradients that were not averaged over the ranks.

    Args:
        communicator: The group.
        names: FQN of each parameter.
        norms: Norm of each whole gradient on this rank; None where there is none.

    Raises:
        RuntimeError: on every rank, naming the first parameter whose gradients differ.
    """
    everyone = communicator.collect(list(norms))
    for name, *seen in zip(names, *everyone, strict=True):
        values = [value for value in seen if value is not None]
        if len(values) < len(seen) or not all(map(_finite, values)):
            continue  # agree_on_gradients says what is wrong with these
        if max(values) - min(values) > _AVERAGED_RTOL * max(values):
            raise RuntimeError(
                f"The gradients of {name} differ between ranks: their norms are "
                f"{min(values):.6g} to {max(values):.6g}. They must be averaged over the process "
                "group before step(): wrap the model in DistributedDataParallel, and leave its "
                "no_sync() context for the last micro-batch."
            )


class Verdict(NamedTuple):
    """What all ranks know about this step's gradients.

    Attributes:
        present: For each parameter whether it is updated.
        nonfinite: A message naming the first NaN or infinity; None if all is finite.
    """

    present: list[bool]
    nonfinite: str | None


def agree_on_gradients(
    communicator: Communicator,
    names: Sequence[str],
    present: Sequence[bool],
    nonfinite: str | None,
    *,
    missing_grad: MissingGrad,
    device: torch.device,
) -> Verdict:
    """Agree on which parameters have a gradient, and that all gradients are finite.

    Args:
        communicator: The group.
        names: FQN of each parameter.
        present: Whether this rank has a gradient for it.
        nonfinite: The first parameter with a NaN or infinity in this rank's range, if any.
        missing_grad: What a gradient on some ranks only means: an error, or zeros on the others.
        device: Where the backend expects its tensors.

    Returns:
        The same verdict on every rank.

    Raises:
        RuntimeError: on every rank, if none has any gradient, or only some have one.
    """
    counts = communicator.add_up([*map(int, present), int(nonfinite is not None)], device)
    message = _name_nonfinite(communicator, nonfinite) if counts.pop() else None
    world_size = communicator.world_size
    partial = [i for i, count in enumerate(counts) if 0 < count < world_size]
    if partial and missing_grad == "raise":
        holders = communicator.collect([present[i] for i in partial])
        without = [rank for rank, has in enumerate(holders) if not has[0]]
        raise RuntimeError(
            f"{names[partial[0]]} has a gradient on some ranks but not on ranks {without} "
            f"({len(partial)} parameters are so). Every rank must use the same parameters in its "
            "backward pass; DistributedDataParallel(find_unused_parameters=True) fills in zeros, "
            'and so does Muon(reduce="owned", missing_grad="zero").'
        )
    if not any(counts):
        raise RuntimeError(
            "No parameter has a gradient. Call backward() before step(), and zero_grad() after it."
        )
    return Verdict([count > 0 for count in counts], message)


def _name_nonfinite(communicator: Communicator, nonfinite: str | None) -> str:
    found = communicator.collect(nonfinite)
    rank, name = next((r, n) for r, n in enumerate(found) if n is not None)
    return (
        f"The gradient of {name} has a NaN or an infinity (found by rank {rank}). Parameters and "
        "optimizer state are unchanged on every rank."
    )


def _finite(value: float) -> bool:
    return value - value == 0.0
