"""What all ranks must agree on before a step may touch anything; every rank raises together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import NamedTuple, NoReturn

import torch

from distmuon.collectives import Communicator
from distmuon.errors import see, with_entry
from distmuon.failure import Topic
from distmuon.options import MissingGrad
from distmuon.plan import digest

# Averaged gradients are the same bits on every rank; gradients that were never averaged differ in
# their leading digits. The margin only allows for backends whose all-reduce rounds differently.
_AVERAGED_RTOL = 1e-3


def check_backend(communicator: Communicator, devices: Sequence[torch.device]) -> None:
    """Refuse to send the tensors of a device by a backend that cannot.

    Args:
        communicator: The group.
        devices: Where the flat buffers lie.

    Raises:
        ValueError: for gloo and a device other than the CPU: it has no all-to-all there; or if the
            group has no backend for the device, as NCCL's has none for the CPU.
    """
    if communicator.world_size == 1:
        return
    for kind in dict.fromkeys(device.type for device in devices):
        backend = communicator.backend(kind)
        if backend == "gloo" and kind != "cpu":
            raise ValueError(
                f"The parameters are on {kind}, and the process group sends from there with gloo, "
                'which lacks the all-to-all. Use init_process_group("nccl") or '
                '"cpu:gloo,cuda:nccl", or keep the parameters on the CPU.' + see("launch")
            )
        if not backend:
            raise ValueError(
                f"There are parameters on {kind}, from where the process group cannot send. Move "
                'the model to its GPU before the first step, or use init_process_group("gloo") '
                'for CPUs and "cpu:gloo,cuda:nccl" for both.' + see("launch")
            )


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
                "the same groups, in the same order, on every rank." + see("ranks-differ")
            )
    raise AssertionError("digests differ where the lines do not")


def check_averaged(
    communicator: Communicator, names: Sequence[str], norms: Sequence[float | None]
) -> bool:
    """Refuse gradients that were not averaged over the ranks.

    Args:
        communicator: The group.
        names: FQN of each parameter.
        norms: Norm of each whole gradient on this rank; None where there is none.

    Returns:
        Whether there was any gradient to look at, the same on every rank.

    Raises:
        RuntimeError: on every rank, naming the first parameter whose gradients differ.
    """
    everyone = communicator.collect(list(norms))
    compared = False
    for name, *seen in zip(names, *everyone, strict=True):
        values = [value for value in seen if value is not None]
        if len(values) < len(seen) or not all(map(_finite, values)):
            continue  # `agree` says what is wrong with these
        compared = True
        if max(values) - min(values) > _AVERAGED_RTOL * max(values):
            raise RuntimeError(
                f"The gradients of {name} differ between ranks: their norms are "
                f"{min(values):.6g} to {max(values):.6g}. They must be averaged over the process "
                "group before step(): wrap the model in DistributedDataParallel, and leave its "
                "no_sync() context for the last micro-batch." + see("gradient-not-averaged")
            )
    return compared


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rank knows about its gradients before a step.

    Attributes:
        present: For each parameter whether this rank has a gradient.
        nonfinite: The first parameter with a NaN or infinity in this rank's range, if any.
        options: Description of the hyperparameters as they are now.
        problem: What this rank cannot go on with, if anything.
    """

    present: list[bool]
    nonfinite: str | None
    options: str
    problem: Exception | None


class Verdict(NamedTuple):
    """What all ranks know about this step's gradients.

    Attributes:
        present: For each parameter whether it is updated.
        nonfinite: A message naming the first NaN or infinity; None if all is finite.
    """

    present: list[bool]
    nonfinite: str | None


def agree(
    communicator: Communicator,
    names: Sequence[str],
    finding: Finding,
    *,
    missing_grad: MissingGrad,
    device: torch.device,
) -> Verdict:
    """Agree, in one small all-reduce, on whether and how to step.

    Args:
        communicator: The group.
        names: FQN of each parameter.
        finding: What this rank knows.
        missing_grad: What a gradient on some ranks only means: an error, or zeros on the others.
        device: Where the backend expects its tensors.

    Returns:
        The same verdict on every rank.

    Raises:
        RuntimeError: on every rank, if hyperparameters differ, no rank has a gradient, only some
            have one, or another rank has a problem.
        Exception: this rank's own problem.
    """
    mark = int.from_bytes(digest([finding.options])[:3], "big")
    found = [int(finding.nonfinite is not None), int(finding.problem is not None)]
    counts = communicator.add_up([*map(int, finding.present), *found, mark, mark**2], device)
    *counts, nonfinite, problems, marks, squares = counts
    if problems:
        _raise_problem(communicator, finding.problem, "step")
    # Equal numbers, and only those, reach Cauchy and Schwarz's bound.
    if communicator.world_size * squares != marks**2:
        _raise_options(communicator, finding.options)
    message = _name_nonfinite(communicator, finding.nonfinite) if nonfinite else None
    if missing_grad == "raise":
        _refuse_partial(communicator, names, finding.present, counts)
    if not any(counts):
        raise RuntimeError(
            "No parameter has a gradient. Call backward() before step(), and zero_grad() after it. "
            "(load_state_dict(assign=True) replaces the Parameters that the optimizer knows.)"
            + see("missing-gradient")
        )
    return Verdict([count > 0 for count in counts], message)


@contextmanager
def together(communicator: Communicator, phase: str) -> Iterator[None]:
    """Let every rank raise if what is inside goes wrong on one. A collective.

    Args:
        communicator: The group.
        phase: What a rank cannot do then.

    Raises:
        RuntimeError: naming the first rank with a problem, where this rank has none.
        ValueError: this rank's own problem, and so TypeError.
    """
    problem = None
    try:
        yield
    except (TypeError, ValueError) as error:
        problem = error
    with communicator.during(Topic(phase)):
        _raise_problem(communicator, problem, phase)


def _raise_problem(communicator: Communicator, problem: Exception | None, phase: str) -> None:
    said = communicator.collect(str(problem) if problem is not None else None)
    if problem is not None:
        raise problem
    for rank, message in enumerate(said):
        if message is not None:
            raise RuntimeError(
                with_entry(f"Rank {rank} cannot {phase}: {message}", "one-rank-stopped")
            )


def _raise_options(communicator: Communicator, options: str) -> NoReturn:
    seen = communicator.collect(options)
    other = next(rank for rank, text in enumerate(seen) if text != seen[0])
    here, there = next(
        pair
        for pair in zip(seen[0].split(", "), seen[other].split(", "), strict=False)
        if pair[0] != pair[1]
    )
    raise RuntimeError(
        f"The hyperparameters differ between ranks: rank 0 has {here}, rank {other} has {there}. "
        "Feed schedulers the same values on every rank (a loss averaged over the ranks, not each "
        "rank's own)." + see("ranks-differ")
    )


def _refuse_partial(
    communicator: Communicator,
    names: Sequence[str],
    present: Sequence[bool],
    counts: Sequence[int],
) -> None:
    partial = [i for i, count in enumerate(counts) if 0 < count < communicator.world_size]
    if partial:
        holders = communicator.collect(present[partial[0]])
        without = [rank for rank, has in enumerate(holders) if not has]
        raise RuntimeError(
            f"{names[partial[0]]} has a gradient on some ranks but not on ranks {without} "
            f"({len(partial)} parameters are so). Every rank must use the same parameters in its "
            "backward pass; DistributedDataParallel(find_unused_parameters=True) fills in zeros, "
            'and so does Muon(reduce="owned", missing_grad="zero").' + see("missing-gradient")
        )


def _name_nonfinite(communicator: Communicator, nonfinite: str | None) -> str:
    found = communicator.collect(nonfinite)
    rank, name = next((r, n) for r, n in enumerate(found) if n is not None)
    return (
        f"The gradient of {name} has a NaN or an infinity (found by rank {rank}). Parameters and "
        "optimizer state are unchanged on every rank."
    )


def _finite(value: float) -> bool:
    return value - value == 0.0
