"""Measures a step while the engine makes it, and adds the figures up over the ranks.

Reads buffers that the step has filled anyway; changes nothing, draws no random numbers. The one
message is sent at the end of a step that is measured, by all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from distmuon import update_rules
from distmuon.buckets import Bucket
from distmuon.collectives import Communicator
from distmuon.diagnostics import (
    SAMPLES,
    Diagnostics,
    GroupDiagnostics,
    MatrixDiagnostics,
    Probe,
    Spectrum,
    SpectrumProbe,
    square_sum,
)
from distmuon.failure import Topic
from distmuon.options import GroupOptions

_NO_SPECTRUM = Spectrum(0.0, 0.0, 0.0, 0.0)


class Observer:
    """Observes nothing: what every step has when it is not measured."""

    def before(self, index: int, grad: Tensor, present: Sequence[bool]) -> Probe:
        """See a bucket's averaged gradients.

        Args:
            index: Of the bucket.
            grad: [shard_numel], this rank's range.
            present: For each parameter whether it is updated.

        Returns:
            What to show the orthogonalized matrices to.
        """
        return Probe()

    def after(self, index: int, update: Tensor) -> None:
        """See a bucket that has just been updated.

        Args:
            index: Of the bucket.
            update: What `before` saw; Muon's step has put its update there.
        """

    def finish(self, flops: int) -> Diagnostics | None:
        """Add everything up. A collective if the step is measured.

        Args:
            flops: Operations of Newton-Schulz of this rank in this step.
        """
        return None


class _Pick(NamedTuple):
    """A matrix whose spectrum is measured."""

    bucket: int
    matrix: int
    owner: int
    name: str


class StepObserver(Observer):
    """Observes one step."""

    def __init__(
        self,
        step: int,
        turn: int,
        buckets: Sequence[Bucket],
        options: Sequence[GroupOptions],
        communicator: Communicator,
    ) -> None:
        """Pick the matrices to look at: equal on every rank.

        Args:
            step: Number of the step, from 1.
            turn: How many steps have been measured before it.
            buckets: That it updates.
            options: Of each parameter group.
            communicator: The group.
        """
        self._step, self._buckets, self._options = step, buckets, options
        self._communicator = communicator
        self._picks = _pick(buckets, turn)
        self._probes: dict[int, SpectrumProbe] = {}
        self._present: dict[int, Sequence[bool]] = {}
        # Where the sums are made; a buffer may be on another device.
        self._device = buckets[0].shard.master.device
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        # For each group squares of the gradient, of the update and of the weights.
        self._squares = [[zero.clone() for _ in range(3)] for _ in options]

    @override
    def before(self, index: int, grad: Tensor, present: Sequence[bool]) -> Probe:
        bucket = self._buckets[index]
        self._present[index] = present
        for segment in bucket.shard.segments:
            if present[segment.tensor]:
                piece = grad[segment.shard_start :][: segment.numel]
                self._add(bucket.spec.groups[segment.tensor], 0, piece)
        if bucket.spec.ownership is None:
            return Probe()
        picked = {pick.matrix for pick in self._picks if pick.bucket == index}
        self._probes[index] = SpectrumProbe(picked)
        return self._probes[index]

    @override
    def after(self, index: int, update: Tensor) -> None:
        bucket, present = self._buckets[index], self._present[index]
        shard = bucket.shard
        for segment in shard.segments:
            if not present[segment.tensor]:
                continue
            group = bucket.spec.groups[segment.tensor]
            start, stop = segment.shard_start, segment.shard_start + segment.numel
            made = update[start:stop]
            if bucket.spec.algorithm == "adamw":
                made = update_rules.adamw_direction(
                    shard.state["exp_avg"][start:stop],
                    shard.state["exp_avg_sq"][start:stop],
                    step=shard.steps[segment.tensor],
                    betas=self._options[group].betas,
                    eps=self._options[group].eps,
                )
            elif bucket.spec.ownership is None:
                made = torch.full_like(made[:1], math.nan)  # only the class knows its update
            self._add(group, 1, made)
            self._add(group, 2, shard.master[start:stop])

    def _add(self, group: int, which: int, values: Tensor) -> None:
        self._squares[group][which] += square_sum(values).to(self._device)

    @override
    def finish(self, flops: int) -> Diagnostics:
        mine: list[float] = torch.stack([s for row in self._squares for s in row]).tolist()
        for pick in self._picks:
            probe = self._probes[pick.bucket]
            mine += probe.found.get(pick.matrix, _NO_SPECTRUM)
        loads = [0.0] * self._communicator.world_size
        loads[self._communicator.rank] = float(flops)
        with self._communicator.during(Topic("diagnostics")):
            found = self._communicator.add_up_reals([*mine, *loads], self._device)
        count = 3 * len(self._options)
        squares = [found[i : i + 3] for i in range(0, count, 3)]
        spectra = found[count : count + 4 * len(self._picks)]
        return Diagnostics(
            step=self._step,
            gradient_norms=self._norms([row[0] for row in squares]),
            groups=self._groups(squares),
            matrices=tuple(
                MatrixDiagnostics(pick.name, pick.owner, *spectra[4 * i : 4 * i + 4])
                for i, pick in enumerate(self._picks)
                if self._updated(pick)
            ),
            owner_flops=tuple(round(load) for load in found[-len(loads) :]),
        )

    def _updated(self, pick: _Pick) -> bool:
        ownership = self._buckets[pick.bucket].spec.ownership
        assert ownership is not None, "only matrices are picked"
        return self._present[pick.bucket][ownership.members[pick.matrix]]

    def _norms(self, squares: Sequence[float]) -> dict[str, float]:
        sums: dict[str, float] = {}
        for options, square in zip(self._options, squares, strict=True):
            sums[options.algorithm] = sums.get(options.algorithm, 0.0) + square
        return {algorithm: math.sqrt(square) for algorithm, square in sums.items()}

    def _groups(self, squares: Sequence[Sequence[float]]) -> tuple[GroupDiagnostics, ...]:
        numels = [0] * len(self._options)
        for index, bucket in enumerate(self._buckets):
            rows = zip(
                bucket.spec.layout.specs, bucket.spec.groups, self._present[index], strict=True
            )
            for spec, group, present in rows:
                numels[group] += spec.numel if present else 0
        return tuple(
            GroupDiagnostics(
                group,
                options.algorithm,
                numels[group],
                options.lr,
                math.sqrt(grad),
                math.sqrt(update / numels[group]),
                math.sqrt(weight / numels[group]),
            )
            for group, (options, (grad, update, weight)) in enumerate(
                zip(self._options, squares, strict=True)
            )
            if numels[group]
        )


def _pick(buckets: Sequence[Bucket], turn: int) -> list[_Pick]:
    """The next few of all matrices that one rank orthogonalizes as one; over time all of them."""
    candidates = []
    for index, bucket in enumerate(buckets):
        ownership = bucket.spec.ownership
        if ownership is not None:
            shared = ownership.shared
            candidates += [
                _Pick(index, matrix, owner, spec.name)
                for matrix, (owner, spec) in enumerate(
                    zip(ownership.owners, ownership.layout.specs, strict=True)
                )
                if matrix not in shared and spec.blocks is None
            ]
    count = min(SAMPLES, len(candidates))
    return [candidates[(turn * SAMPLES + i) % len(candidates)] for i in range(count)]


def make_observer(
    every: int,
    buckets: Sequence[Bucket],
    options: Sequence[GroupOptions],
    communicator: Communicator,
) -> Observer:
    """The observer of the step that begins.

    Args:
        every: Steps between two that are measured, the first is another; 0 for none.
        buckets: That the step updates.
        options: Of each parameter group.
        communicator: The group.

    Returns:
        One that measures, if it is the step's turn.
    """
    if not every:
        return Observer()
    # The parameters' own counts, which a checkpoint keeps: the same steps after a restart.
    step = 1 + max(count for bucket in buckets for count in bucket.shard.steps)
    if step != 1 and step % every:
        return Observer()
    return StepObserver(step, step // every, buckets, options, communicator)
