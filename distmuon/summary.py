"""What an optimizer has done on all ranks together, in two lines for the end of a training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from typing_extensions import override

from distmuon.collectives import Communicator
from distmuon.report import Report
from distmuon.units import format_bytes, format_flops


class Reporting(Protocol):
    """An optimizer of this package: `Muon`, or DeepSpeed's `ZeroOrtho`."""

    @property
    def communicator(self) -> Communicator:
        """The ranks that the state is sharded over."""

    def report(self) -> Report:
        """What this rank has done."""


class Done(NamedTuple):
    """One rank's share.

    Attributes:
        owned: Matrices that it orthogonalizes.
        calls: Matrices that it has orthogonalized, summed over the steps.
        expected: Owned matrices that had a gradient, summed over the steps.
        flops: Operations that this took.
        state_bytes: Optimizer state that it holds.
    """

    owned: int
    calls: int
    expected: int
    flops: int
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What all ranks have done.

    Attributes:
        steps: Completed steps.
        skipped: Steps left out because of a gradient that was not finite.
        matrices: Matrices that Muon updates.
        ranks: The share of each rank.
        bytes_sent: Payload bytes so far, of all ranks together, by kind as in `Report`.
    """

    steps: int
    skipped: int
    matrices: int
    ranks: tuple[Done, ...]
    bytes_sent: Mapping[str, int]

    @property
    def calls(self) -> int:
        """Matrices that were orthogonalized, over all ranks and steps."""
        return sum(rank.calls for rank in self.ranks)

    @property
    def expected(self) -> int:
        """Matrices that had a gradient, over all ranks and steps."""
        return sum(rank.expected for rank in self.ranks)

    @property
    def flops(self) -> int:
        """Operations of Newton-Schulz, over all ranks and steps."""
        return sum(rank.flops for rank in self.ranks)

    @property
    def problem(self) -> str:
        """What is wrong with the count of matrices, for a person; empty if nothing is."""
        owned = sum(rank.owned for rank in self.ranks)
        if owned != self.matrices:
            return f"{owned} of {self.matrices} matrices have an owner"
        short = [
            f"rank {rank}: {done.calls:,} of {done.expected:,}"
            for rank, done in enumerate(self.ranks)
            if done.calls != done.expected
        ]
        if short:
            return f"not every matrix with a gradient was orthogonalized once ({', '.join(short)})"
        return ""

    @override
    def __str__(self) -> str:
        return f"{self._matrices()}\n{self._rest()}"

    def _matrices(self) -> str:
        planned = self.matrices * self.steps
        product = f"{_count(self.matrices, 'matrix', 'matrices')} x {_count(self.steps, 'step')}"
        text = f"Muon orthogonalized {product} = {self.calls:,} of {planned:,}"
        if self.expected != planned:
            # A parameter that was not used, or groups that have changed on the way.
            text = (
                f"Muon orthogonalized {self.calls:,} of the {self.expected:,} matrices that had a "
                f"gradient ({product} are {planned:,})"
            )
        return f"WARNING: {text}: {self.problem}. Please report this." if self.problem else text

    def _rest(self) -> str:
        steps, count = max(self.steps, 1), len(self.ranks)
        parts = [f"{format_flops(self.flops / steps)} of Newton-Schulz a step"]
        if count > 1:
            owned = _from_to([rank.owned for rank in self.ranks], str)
            sent = ", ".join(
                f"{kind} {format_bytes(count / steps)}"
                for kind, count in sorted(self.bytes_sent.items())
            )
            # DistributedDataParallel and DeepSpeed average them, and count for themselves.
            apart = "" if "reduce" in self.bytes_sent else ", gradients not counted"
            parts.append(f"{count} ranks own {owned} matrices each")
            parts.append(f"sent by all of them a step: {sent or 'nothing'}{apart}")
        held = _from_to([rank.state_bytes for rank in self.ranks], format_bytes)
        parts.append(f"state {held}{' on each rank' if count > 1 else ''}")
        parts.append(f"{_count(self.skipped, 'step')} skipped")
        return "; ".join(parts)


def _count(count: int, one: str, more: str = "") -> str:
    return f"{count:,} {one if count == 1 else more or f'{one}s'}"


def _from_to(counts: Sequence[int], write: Callable[[int], str]) -> str:
    low, high = write(min(counts)), write(max(counts))
    return low if low == high else f"{low} to {high}"


def combine(reports: Sequence[Report]) -> Summary:
    """Put the reports of all ranks together.

    Args:
        reports: One for each rank, in rank order.

    Returns:
        The summary.
    """
    sent: Counter[str] = Counter()
    for report in reports:
        sent.update(report.bytes_sent)
    return Summary(
        steps=max(report.steps for report in reports),
        skipped=max(report.skipped for report in reports),
        matrices=reports[0].matrices,
        ranks=tuple(
            Done(
                report.matrices_owned,
                report.newton_schulz_calls,
                report.newton_schulz_expected,
                report.newton_schulz_flops,
                report.state_bytes,
            )
            for report in reports
        ),
        bytes_sent=dict(sent),
    )


def summarize(optimizer: Reporting) -> Summary:
    """Say what an optimizer has done, on all ranks together. A collective: call it on every rank.

    Args:
        optimizer: `Muon`, or DeepSpeed's; out of any wrapper (`distmuon.adapters.accelerate`
            has `unwrap`).

    Returns:
        The same on every rank; `print` shows two lines.
    """
    # The planned loads are a number for every rank on every rank, and no part of it.
    mine = replace(optimizer.report(), loads=(), diagnostics=None)
    return combine(optimizer.communicator.collect(mine))
