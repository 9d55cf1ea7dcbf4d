"""From matrices to polar factors: scaling, orientation, iteration, in as few passes as there are.

On a GPU the passes over all entries would take half as long as the products. So half precision is
rounded to in the pass that scales, products take a matrix as it lies in memory, and the last factor
and change of dtype are left to whoever copies the result to its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from distmuon.kernels import symmetric
from distmuon.kernels.elementwise import scale_into
from distmuon.orthogonalize import exact, halley, newton_schulz, policy, stability
from distmuon.orthogonalize.guards import is_finite, largest_entry, prescale, prescale_each
from distmuon.orthogonalize.policy import Method
from distmuon.orthogonalize.schedule import AnySchedule, Rational

NonFinite: TypeAlias = Literal["propagate", "zero"]
EXACT = ("svd", "eigh")
# Below this many entries a matrix costs less than the calls it takes, and a CPU gains from
# batched products; above, it loses the cache: measured, docs/numerics.md.
_BATCHED_ENTRIES = 64 * 128
# Entries that go through batched products at once elsewhere. It bounds the memory they take, at
# most 12 bytes each, and fills a GPU many times over.
_STACKED_ENTRIES = 2**27
# Entries from which a matrix of a stack is worth calls of its own: of 512 x 2048, which a GPU takes
# some 10 us for, as the host does for a call or two. Not yet measured.
_ALONE_ENTRIES = 2**20
# No entry of a float16 Gram matrix is larger: a sixteenth of what float16 holds.
_FLOAT16_GRAM = 2.0**12


class Plan(NamedTuple):
    """How to orthogonalize.

    Attributes:
        method: As in `orthogonalize`.
        schedule: What it evaluates.
        dtype: Of the products.
        nonfinite: As in `orthogonalize`.
    """

    method: Method
    schedule: AnySchedule
    dtype: torch.dtype
    nonfinite: NonFinite

    @property
    def uses_lapack(self) -> bool:
        """Whether LAPACK sees the matrix: it does not pass NaNs on, and rounds as memory lies."""
        return self.method in EXACT or isinstance(self.schedule, Rational)


class Polar(NamedTuple):
    """Polar factors, but for a number each and their dtype.

    Attributes:
        values: [..., m, n] in the dtype of the iteration, of any strides.
        scale: [..., 1, 1] in float32, what `values` are still to be multiplied by; None for ones.
        finite: bool [..., 1, 1], whether the matrix had only finite entries.
    """

    values: Tensor
    scale: Tensor | None
    finite: Tensor

    def finish(self, dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
        """The polar factors, [..., m, n] contiguous.

        Args:
            dtype: Of the result.
            out: Where to put it; None for memory of its own, or that of `values`.
        """
        widened = dtype == torch.float32 and self.values.dtype in (torch.float16, torch.bfloat16)
        if self.scale is None and not widened:
            values = self.values.to(dtype).contiguous()
            return values if out is None else out.copy_(values)
        if out is None:
            out = torch.empty(self.values.shape, dtype=dtype, device=self.values.device)
        return scale_into(self.values, self.factor(), out)

    def factor(self, number: float = 1.0) -> Tensor:
        """What half-precision `values` are still to be multiplied by, [..., 1, 1] in float32.

        Args:
            number: And by this; half precision times a number would stay half precision.
        """
        if self.scale is not None:
            return self.scale if number == 1.0 else self.scale * number
        shape = *self.values.shape[:-2], 1, 1
        return torch.full(shape, number, dtype=torch.float32, device=self.values.device)


def stack_numel(device: torch.device) -> int:
    """Entries of equal matrices that are worth one call: 0 on CPUs, where single ones are faster.

    Args:
        device: Where they are.
    """
    return 0 if device.type == "cpu" else _STACKED_ENTRIES


def polar_each(matrices: Sequence[Tensor], plan: Plan, largest: Sequence[Tensor | None]) -> Polar:
    """Polar factors of equal matrices in memory apart.

    Args:
        matrices: [m, n] each. Not modified.
        plan: How.
        largest: Of each its largest absolute entry [1] in float32; None to look.

    Returns:
        For [count, m, n].
    """
    first = matrices[0]
    known = [each if each is None else each.view(1, 1) for each in largest]
    if len(matrices) == 1:
        return _alone(first, plan, known[0])
    if first.numel() < _ALONE_ENTRIES:
        found = [each for each in known if each is not None]
        amax = torch.stack(found) if len(found) == len(known) else None
        return _together(torch.stack(tuple(matrices)), plan, amax)
    amax = torch.stack(
        [
            largest_entry(x) if each is None else each
            for x, each in zip(matrices, known, strict=True)
        ]
    )
    return _iterate(prescale_each(matrices, amax, *_rounding(first, plan)), amax, plan)


def polar_batch(x: Tensor, plan: Plan, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    """Polar factors of a batch of any size.

    Args:
        x: [count, m, n]. Not modified.
        plan: How.
        largest: [count, 1, 1] in float32, the largest absolute entries; None to look.

    Returns:
        [count, m, n] contiguous in x's dtype, and bool [count], whether each one's entries were
        finite.
    """
    count, m, n = x.shape
    stacked = stack_numel(x.device) // (m * n)
    if count == 1:
        found = _alone(x[0], plan, None if largest is None else largest[0])
        return found.finish(x.dtype), found.finite[:, 0, 0]
    if count <= stacked or _batched_on_cpu(x, plan):
        found = _together(x, plan, largest)
        return found.finish(x.dtype), found.finite[:, 0, 0]
    # More than a step would hand over at once: its largest entries are looked for again.
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flags = []
    for start in range(0, count, max(1, stacked)):
        some = x[start : start + max(1, stacked)]
        part = _together(some, plan, None) if stacked > 1 else _alone(some[0], plan, None)
        part.finish(x.dtype, out=out[start : start + max(1, stacked)])
        flags.append(part.finite[:, 0, 0])
    return out, torch.cat(flags)


def _alone(x: Tensor, plan: Plan, largest: Tensor | None) -> Polar:
    """One matrix [m, n], as a batch of one."""
    if _batched_on_cpu(x, plan):
        return _together(x[None], plan, largest if largest is None else largest[None])
    values, scale, finite = _together(x, plan, largest)
    return Polar(values[None], scale if scale is None else scale[None], finite[None])


def _batched_on_cpu(x: Tensor, plan: Plan) -> bool:
    """Whether small matrices go through batched products, also a single one: they round alike then.

    With sides that are multiples of four every matrix of a batch, and its Gram matrix, starts on a
    boundary of 64 bytes; products of others would round by where they start. In half precision
    torch's batched product rounds before it adds, with which `cubic` becomes infinite.
    """
    m, n = x.shape[-2:]
    aligned = m % 4 == 0 and n % 4 == 0
    exactly = plan.dtype == torch.float32 and not plan.uses_lapack
    return x.device.type == "cpu" and m * n <= _BATCHED_ENTRIES and aligned and exactly


def _together(x: Tensor, plan: Plan, largest: Tensor | None) -> Polar:
    """One matrix [m, n], or a batch computed as one."""
    amax = largest_entry(x) if largest is None else largest
    return _iterate(prescale(x, amax, *_rounding(x, plan)), amax, plan)


def _rounding(x: Tensor, plan: Plan) -> tuple[torch.dtype | None, float]:
    """What the scaled x is rounded to, None for nothing, and what its entries stay below."""
    if plan.method in EXACT or plan.dtype not in (torch.float16, torch.bfloat16):
        return None, 1.0
    if plan.dtype == torch.bfloat16:
        return plan.dtype, 1.0
    return plan.dtype, 2.0 ** math.floor(math.log2(_FLOAT16_GRAM / max(x.shape[-2:])) / 2)


def _iterate(scaled: Tensor, amax: Tensor, plan: Plan) -> Polar:
    """What is left to do when the largest entries are out of the way."""
    finite = is_finite(amax)
    if plan.nonfinite == "zero" or plan.uses_lapack:
        # LAPACK raises on NaN or loses it, and inf * 0 is NaN: only a selection removes them.
        scaled = torch.where(finite, scaled, 0.0)
    tall = scaled.size(-2) > scaled.size(-1)
    wide = scaled.mT if tall else scaled
    if tall and not symmetric.takes(wide):
        # Products of transposed views round differently; also of a view of one column.
        wide = wide.clone(memory_format=torch.contiguous_format)
    del scaled
    values, scale = _decompose(wide, plan) if plan.method in EXACT else _evaluate(wide, plan)
    values = values.mT if tall else values
    if plan.nonfinite == "propagate" and plan.uses_lapack:
        values = torch.where(finite, values, torch.nan)
    return Polar(values, scale, finite)


def _decompose(wide: Tensor, plan: Plan) -> tuple[Tensor, None]:
    # LAPACK and cuSOLVER have no half precision.
    work = wide.to(torch.promote_types(plan.dtype, torch.float32))
    return (exact.svd(work) if plan.method == "svd" else exact.eigh(work)), None


def _evaluate(wide: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
    work = wide.to(plan.dtype)
    if isinstance(plan.schedule, Rational):
        return halley.on_gram(work, plan.schedule), None
    precision = policy.arithmetic(plan.dtype, wide.device)
    method = plan.method
    if method == "auto":
        method = policy.choose_form(wide, plan.schedule, precision)
    if method == "gram":
        windows = stability.windows(plan.schedule, precision)
        return newton_schulz.on_gram(work, plan.schedule, windows), None
    if method == "coupled":
        return newton_schulz.coupled(work, plan.schedule), None
    return newton_schulz.plain(work, plan.schedule)
