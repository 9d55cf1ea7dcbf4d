"""What an optimizer has done so far, on one rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from typing_extensions import override

from distmuon.buckets import BucketSpec, is_whole
from distmuon.collectives import Communicator
from distmuon.cost import default_cost_model
from distmuon.diagnostics import Diagnostics
from distmuon.engine import Engine
from distmuon.norms import GradientNorms
from distmuon.ownership import Ownership
from distmuon.units import format_flops


@dataclass(frozen=True, slots=True)
class Report:
    """Counts taken by `Muon.step`; never a collective, so each rank has its own.

    Attributes:
        steps: Completed steps.
        skipped: Steps left out because of a non-finite gradient (nonfinite="skip").
        rank: This rank in the process group.
        world_size: Ranks in the process group.
        matrices: Matrices that Muon updates; a stack [E, m, n] has E of them, a fused matrix as
            many as it has blocks.
        matrices_owned: Those that this rank orthogonalizes.
        newton_schulz_calls: Matrices that this rank has orthogonalized, summed over the steps.
        newton_schulz_expected: Owned matrices that had a gradient, summed over the steps.
        newton_schulz_flops: Operations of this rank's matrix products so far, by the shapes and the
            form that was really used (`distmuon.orthogonalize.flops`).
        loads: Operations of Newton-Schulz that each rank does in a step in which every matrix has a
            gradient, as planned: by `newton_schulz_cost`, five steps of the plain form.
        bytes_sent: Payload bytes sent by this rank so far: "gather" and "scatter" of pieces of
            matrices, "gram" and "transform" of matrices that several ranks share, "reduce" of
            gradients (hook and owned only), "publish" of parameters, "agree" on whether and how to
            step, "consolidate" of state.
        gradient_norms: Before the last clipping, Muon's and AdamW's apart; NaN before the first
            clipping, None before the first step.
        seconds: Time of each phase so far on this rank, with profile="phases": "read" gradients
            and look for infinities, "reduce wait", "agree", "momentum", "gather wait",
            "newton-schulz", "scatter wait", "apply", "adamw" or "companion", "publish wait". On
            CUDA the stream's time, for which `report` waits.
        state_bytes: Optimizer state on this rank, fp32 master weights included.
        diagnostics: Of the last step that was measured (diagnostics_every), over all ranks.
        muon_parameters: Elements updated by Muon in the whole model.
        adamw_parameters: Elements updated by AdamW, or the class in its place, in the whole model.
        whole: For each optimizer class that looks at whole tensors, which are therefore not cut,
            the elements of the fullest rank over the mean; every rank's shard is as long as that.
    """

    steps: int
    skipped: int
    rank: int
    world_size: int
    matrices: int
    matrices_owned: int
    newton_schulz_calls: int
    newton_schulz_expected: int
    newton_schulz_flops: int
    loads: tuple[int, ...]
    bytes_sent: Mapping[str, int]
    gradient_norms: GradientNorms | None
    seconds: Mapping[str, float]
    state_bytes: int
    diagnostics: Diagnostics | None
    muon_parameters: int
    adamw_parameters: int
    whole: Mapping[str, float] = field(default_factory=dict)

    @override
    def __str__(self) -> str:
        steps = max(self.steps, 1)
        sent = ", ".join(f"{kind} {count / steps:,.0f}" for kind, count in self.bytes_sent.items())
        return (
            f"rank {self.rank} of {self.world_size}: Muon orthogonalized "
            f"{self.matrices_owned} of {self.matrices} matrices x {self.steps} steps = "
            f"{self.newton_schulz_calls:,} of {self.newton_schulz_expected:,} in "
            f"{format_flops(self.newton_schulz_flops)}; "
            f"{self.muon_parameters:,} elements by Muon, {self.adamw_parameters:,} by AdamW; "
            f"state {self.state_bytes:,} bytes; bytes sent per step: {sent or 'none'}"
            + "".join(
                f"; {name} keeps tensors whole, {ratio:.2f} times the mean on the fullest rank"
                for name, ratio in self.whole.items()
            )
        )


def make_report(
    specs: Sequence[BucketSpec], communicator: Communicator, engine: Engine | None
) -> Report:
    """Read the counts. Never a collective.

    Args:
        specs: What the optimizer updates.
        communicator: What has been sent.
        engine: What has been done; None before the first step.

    Returns:
        This rank's report.
    """
    muon = [spec for spec in specs if spec.ownership is not None]
    counts = [spec.ownership.counts() for spec in muon if spec.ownership]
    whole = sorted({spec.algorithm for spec in specs if is_whole(spec.algorithm)})
    return Report(
        steps=engine.steps if engine else 0,
        skipped=engine.skipped if engine else 0,
        rank=communicator.rank,
        world_size=communicator.world_size,
        matrices=sum(map(sum, counts)),
        matrices_owned=sum(each[communicator.rank] for each in counts),
        newton_schulz_calls=engine.calls if engine else 0,
        newton_schulz_expected=engine.expected if engine else 0,
        newton_schulz_flops=engine.flops if engine else 0,
        loads=planned_loads(spec.ownership for spec in muon if spec.ownership),
        bytes_sent=dict(communicator.bytes_sent),
        gradient_norms=engine.norms if engine else None,
        seconds=engine.clock.seconds() if engine else {},
        state_bytes=sum(bucket.shard.state_bytes for bucket in engine.buckets) if engine else 0,
        diagnostics=engine.diagnostics if engine else None,
        muon_parameters=sum(spec.numel for spec in muon),
        adamw_parameters=sum(spec.numel for spec in specs if spec.ownership is None),
        whole={name: _unevenness(specs, name) for name in whole},
    )


def _unevenness(specs: Sequence[BucketSpec], algorithm: str) -> float:
    """Elements that every rank has room for, over the mean of those that ranks have."""
    mine = [spec for spec in specs if spec.algorithm == algorithm]
    return sum(spec.layout.numel for spec in mine) / sum(spec.numel for spec in mine)


def planned_loads(ownerships: Iterable[Ownership]) -> tuple[int, ...]:
    """Newton-Schulz operations of each rank in one step.

    Args:
        ownerships: Who orthogonalizes what, over the same ranks.

    Returns:
        One count per rank, as `newton_schulz_cost` counts.
    """
    formula = default_cost_model("cpu")  # any model without measured times counts alike
    return tuple(map(sum, zip(*(each.loads(formula) for each in ownerships), strict=True)))
