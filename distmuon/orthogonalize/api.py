"""The public functions: validation, scaling, dispatch."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.orthogonalize import exact, halley, newton_schulz, policy, stability
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.orthogonalize.guards import is_finite, largest_entry, nonzero, power_of_two, prescale
from distmuon.orthogonalize.policy import Method
from distmuon.orthogonalize.schedule import AnySchedule, Rational, Schedule

NonFinite: TypeAlias = Literal["propagate", "zero"]
_METHODS: tuple[str, ...] = get_args(Method)
_EXACT = ("svd", "eigh")
_INPUT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Below this many entries a matrix costs less than the calls it takes, and a CPU gains from
# batched products; above, it loses the cache: measured, docs/numerics.md.
_BATCHED_ENTRIES = 64 * 128
# Entries that go through batched products at once elsewhere. It bounds the memory they take, about
# 16 bytes each, and fills a GPU many times over.
_STACKED_ENTRIES = 2**27
# Frobenius norm of a float16 operand: its Gram matrix, of trace 64**2, stays inside the range.
_FLOAT16_NORM = 64.0


class Orthogonalized(NamedTuple):
    """A result and which of its matrices had only finite entries.

    Attributes:
        update: [..., m, n] in the input's dtype.
        finite: bool [...], on the input's device; nothing waits for it.
    """

    update: Tensor
    finite: Tensor


def orthogonalize(
    x: Tensor,
    *,
    method: Method = "auto",
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: NonFinite = "propagate",
    largest: Tensor | None = None,
) -> Tensor:
    """Approximate polar factor U Vᵀ of each matrix U S Vᵀ.

    The result depends on the matrix's values alone: bitwise not on its scale by powers of two, its
    memory layout or its alignment. On CPUs, to the bit, a batch is a loop over its matrices, and
    the transpose of a matrix that is not square gives the transposed result.

    Args:
        x: [..., m, n], float64, float32, float16 or bfloat16. Never modified.
        method: "newton_schulz" iterates on the matrix, "gram" on its m x m Gram matrix, "auto"
            takes the faster of the two that is stable; "coupled" is their textbook reference.
            "svd" and "eigh" are exact and leave `coefficients` aside.
        coefficients: "auto", a preset's name, a schedule, one (a, b, c) repeated `steps` times, or
            one (a, b, c) a step. "auto" is the faster of two that are about equally exact: the
            quintic "p5" or, for larger matrices on a CPU, the rational "halley"; see
            `policy.for_device`.
        steps: number of steps; None takes the schedule's own.
        dtype: dtype of the matrix products; None chooses by input and device, see
            `policy.working_dtype`.
        nonfinite: what a matrix with a NaN or an infinity gives: "propagate" NaNs, "zero" zeros.
        largest: [...] in float32, the largest absolute entry of each matrix, NaN if one is NaN,
            from who has just seen them all: a pass over x is spared. None to look.

    Returns:
        [..., m, n] in x's dtype, contiguous. A zero matrix gives zeros.

    Raises:
        TypeError: x is not a dense real floating tensor, or an argument has a wrong type.
        ValueError: x has fewer than two dimensions or no elements, an argument is out of range, or
            the schedule would blow up.

    Source: https://kellerjordan.github.io/posts/muon/; docs/numerics.md
    """
    return orthogonalize_checked(
        x,
        method=method,
        coefficients=coefficients,
        steps=steps,
        dtype=dtype,
        nonfinite=nonfinite,
        largest=largest,
    ).update


@torch.no_grad()
def orthogonalize_checked(
    x: Tensor,
    *,
    method: Method = "auto",
    coefficients: Coefficients = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    nonfinite: NonFinite = "propagate",
    largest: Tensor | None = None,
) -> Orthogonalized:
    """`orthogonalize`, and a flag for each matrix that says whether its entries were finite.

    Args:
        x: as in `orthogonalize`.
        method: likewise.
        coefficients: likewise.
        steps: likewise.
        dtype: likewise.
        nonfinite: likewise.
        largest: likewise.

    Returns:
        The result and the flags.

    Raises:
        TypeError: as in `orthogonalize`.
        ValueError: as in `orthogonalize`.
    """
    _check_input(x)
    _check_choices(method, nonfinite, steps)
    schedule = policy.for_device(
        coefficients, steps, method=method, requested=dtype, device=x.device, shape=x.shape
    )
    work = policy.working_dtype(x, method, dtype, schedule)
    if method not in _EXACT and isinstance(schedule, Schedule):
        stability.check(schedule, policy.arithmetic(work, x.device))
    if method == "coupled" and isinstance(schedule, Schedule):
        stability.check_without_restart(schedule, policy.arithmetic(work, x.device))
    plan = _Plan(method, schedule, work, nonfinite)
    # Under autocast every product here would silently become a bfloat16 one.
    with torch.autocast(x.device.type, enabled=False):
        known = None if largest is None else largest.reshape(-1, 1, 1)
        update, finite = _each(x.reshape(-1, *x.shape[-2:]), plan, known)
    return Orthogonalized(update.reshape(x.shape), finite.reshape(x.shape[:-2]))


class _Plan(NamedTuple):
    method: Method
    schedule: AnySchedule
    dtype: torch.dtype
    nonfinite: NonFinite

    @property
    def uses_lapack(self) -> bool:
        """Whether LAPACK sees the matrix: it does not pass NaNs on, and rounds as memory lies."""
        return self.method in _EXACT or isinstance(self.schedule, Rational)


def _each(x: Tensor, plan: _Plan, largest: Tensor | None) -> tuple[Tensor, Tensor]:
    count, m, n = x.shape
    stacked = stack_numel(x.device) // (m * n)
    if _batched_on_cpu(x, plan):
        return _one(x, plan, largest)
    if count == 1:
        update, finite = _one(x[0], plan, None if largest is None else largest[0])
        return update[None], finite[None]
    if count <= stacked:
        return _one(x, plan, largest)
    # More than a step would hand over at once: its largest entries are looked for again.
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if stacked > 1:
        slices = [slice(start, start + stacked) for start in range(0, count, stacked)]
        return out, torch.cat([_one_into(out[some], x[some], plan) for some in slices])
    return out, torch.stack([_one_into(out[i], x[i], plan) for i in range(count)])


def _batched_on_cpu(x: Tensor, plan: _Plan) -> bool:
    """Whether small matrices go through batched products, also a single one: they round alike then.

    With sides that are multiples of four every matrix of a batch, and its Gram matrix, starts on a
    boundary of 64 bytes; products of others would round by where they start. In half precision
    torch's batched product rounds before it adds, with which `cubic` becomes infinite.
    """
    m, n = x.shape[-2:]
    aligned = m % 4 == 0 and n % 4 == 0
    exact = plan.dtype == torch.float32 and not plan.uses_lapack
    return x.device.type == "cpu" and m * n <= _BATCHED_ENTRIES and aligned and exact


def stack_numel(device: torch.device) -> int:
    """Entries of equal matrices that are worth one call: 0 on CPUs, where single ones are faster.

    Args:
        device: Where they are.
    """
    return 0 if device.type == "cpu" else _STACKED_ENTRIES


def _one_into(out: Tensor, x: Tensor, plan: _Plan) -> Tensor:
    update, finite = _one(x, plan)
    out.copy_(update)
    return finite


def _one(x: Tensor, plan: _Plan, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One matrix [m, n] and a flag, or a batch computed as one and a flag for each."""
    amax = largest_entry(x) if largest is None else largest
    finite = is_finite(amax)
    # float16 is scaled once more before it is rounded to, LAPACK has no half precision.
    at_once = plan.dtype == torch.bfloat16 and plan.method not in _EXACT
    scaled = prescale(x, amax, plan.dtype if at_once else None)
    if plan.nonfinite == "zero" or plan.uses_lapack:
        # LAPACK raises on NaN or loses it, and inf * 0 is NaN: only a selection removes them.
        scaled = torch.where(finite, scaled, 0.0)
    tall = x.size(-2) > x.size(-1)
    # A copy, as products of transposed views round differently; also of a view of one column.
    wide = scaled.mT.clone(memory_format=torch.contiguous_format) if tall else scaled
    del scaled
    out = _iterate(wide, plan) if plan.method not in _EXACT else _decompose(wide, plan)
    out = out.mT if tall else out
    if plan.nonfinite == "propagate" and plan.uses_lapack:
        out = torch.where(finite, out, torch.nan)
    return out.to(x.dtype).contiguous(), finite[..., 0, 0]


def _decompose(wide: Tensor, plan: _Plan) -> Tensor:
    # LAPACK and cuSOLVER have no half precision.
    work = wide.to(torch.promote_types(plan.dtype, torch.float32))
    return exact.svd(work) if plan.method == "svd" else exact.eigh(work)


def _iterate(wide: Tensor, plan: _Plan) -> Tensor:
    if isinstance(plan.schedule, Rational):
        return halley.on_gram(wide.to(plan.dtype), plan.schedule)
    precision = policy.arithmetic(plan.dtype, wide.device)
    method = plan.method
    if method == "auto":
        method = policy.choose_form(wide, plan.schedule, precision)
    if plan.dtype == torch.float16:
        norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
        # A power of two, and one pass: what is rounded is rounded once, to float16.
        work = torch.empty_like(wide, dtype=plan.dtype)
        torch.mul(wide, power_of_two(nonzero(norm)).mul_(_FLOAT16_NORM), out=work)
    else:
        work = wide.to(plan.dtype)
    if method == "gram":
        return newton_schulz.on_gram(
            work, plan.schedule, stability.windows(plan.schedule, precision)
        )
    if method == "coupled":
        return newton_schulz.coupled(work, plan.schedule)
    return newton_schulz.plain(work, plan.schedule)


def _check_input(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"Invalid x of type {type(x).__name__}. Must be one torch.Tensor of shape [..., m, n]."
            + see("bad-tensor")
        )
    if x.layout != torch.strided:
        raise TypeError(
            f"Invalid x of layout {x.layout}. Must be dense: pass x.to_dense()." + see("bad-tensor")
        )
    if x.dtype not in _INPUT_DTYPES:
        raise TypeError(
            f"Invalid x of dtype {x.dtype}. Must be float64, float32, float16 or bfloat16: "
            "pass x.float(), or the real and imaginary parts apart." + see("bad-tensor")
        )
    if x.dim() < 2:
        raise ValueError(
            f"Invalid x of shape {list(x.shape)}. Must be [..., m, n]: vectors have no polar "
            "factor and belong to AdamW." + see("bad-tensor")
        )
    if x.numel() == 0:
        raise ValueError(
            f"Invalid x of shape {list(x.shape)}. Must have at least one element."
            + see("bad-tensor")
        )


def _check_choices(method: str, nonfinite: str, steps: int | None) -> None:
    if method not in _METHODS:
        raise ValueError(
            f"Unknown {method=}. Must be one of {', '.join(_METHODS)}." + see("bad-option")
        )
    if nonfinite not in get_args(NonFinite):
        raise ValueError(
            f"Unknown {nonfinite=}. Must be 'propagate' or 'zero'." + see("bad-option")
        )
    if method in _EXACT and steps is not None:
        raise ValueError(
            f"Invalid {steps=} for {method=}, which takes none. Pass steps=None."
            + see("bad-option")
        )
