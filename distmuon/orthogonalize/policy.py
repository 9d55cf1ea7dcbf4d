"""Which dtype to compute in and which form to use, from detected abilities of the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.orthogonalize import halley
from distmuon.orthogonalize.coefficients import QUINTIC_DEFAULT, Coefficients, resolve
from distmuon.orthogonalize.products import SMALLEST_CUT
from distmuon.orthogonalize.schedule import AnySchedule, Rational, Schedule
from distmuon.orthogonalize.stability import Arithmetic, windows

Form: TypeAlias = Literal["newton_schulz", "gram"]
Method: TypeAlias = Literal["auto", "newton_schulz", "gram", "coupled", "svd", "eigh"]

# Long side over short side from which the Gram form is faster: measured, docs/numerics.md. Below
# the size at which symmetric products are cut, it saves less.
_GRAM_ASPECT = 4 / 3
_GRAM_ASPECT_UNCUT = 1.6

# Short side from which a CPU gains from the rational iteration; and, for nearly square matrices,
# from which rounding errors of its result stay below 1e-5: measured, docs/numerics.md.
_SMALLEST_RATIONAL = 128
_SMALLEST_SQUARE_RATIONAL = 384

_ARITHMETIC: dict[torch.dtype, Arithmetic] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@cache
def cpu_has_fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware and torch was built to use it.

    Without, torch falls back to a loop many times slower than float32 (docs/numerics.md).
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # torch.cpu.get_capabilities() is younger than the oldest torch that the package accepts.
    supported: bool = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return supported


def for_device(
    coefficients: Coefficients,
    steps: int | None,
    *,
    method: Method,
    requested: torch.dtype | None,
    device: torch.device,
    shape: Sequence[int],
) -> AnySchedule:
    """`coefficients.resolve`, with "auto" as what is fastest among the equally exact.

    Args:
        coefficients: what the user wrote.
        steps: likewise.
        method: how it will be evaluated.
        requested: the caller's dtype, or None.
        device: where.
        shape: [..., m, n] of the matrix or of a batch, in either orientation.

    Returns:
        For "auto" the rational "halley" on a CPU that computes in full float32 or float64, for
        matrices with a short side of at least 128, or 384 if they are nearly square. Else the
        quintic "p5"; also where a method or a number of steps was asked for, as those are
        Newton-Schulz's.

    Raises:
        TypeError: as in `resolve`.
        ValueError: as in `resolve`, or the method or the dtype is not for a rational schedule.
    """
    dtype = torch.float32 if requested is None else _checked(requested)
    full = arithmetic(dtype, device) in ("float32", "float64")
    if coefficients == "auto" and steps is None and method == "auto":
        rational = full and device.type == "cpu" and _suits_rational(shape)
        return resolve("halley" if rational else QUINTIC_DEFAULT)
    schedule = resolve(coefficients, steps)
    if isinstance(schedule, Rational) and method not in ("auto", "svd", "eigh"):
        raise ValueError(
            f"Invalid {method=} for {schedule.name!r}, which needs an inverse in each step. Pass "
            "method='auto', or the coefficients of a polynomial such as 'p5'." + see("bad-option")
        )
    if isinstance(schedule, Rational) and not full:
        raise ValueError(
            f"Invalid dtype {dtype} in {arithmetic(dtype, device)} for {schedule.name!r}: its "
            "inverses need full float32 or float64. Pass dtype=None, undo "
            "torch.set_float32_matmul_precision, or take 'p5'." + see("bad-option")
        )
    return schedule


def _suits_rational(shape: Sequence[int]) -> bool:
    short, long = sorted(shape[-2:])
    square = halley.nearly_square(short, long)
    return short >= (_SMALLEST_SQUARE_RATIONAL if square else _SMALLEST_RATIONAL)


def working_dtype(
    x: Tensor, method: Method, requested: torch.dtype | None, schedule: AnySchedule
) -> torch.dtype:
    """Dtype of the matrix products.

    Args:
        x: [..., m, n], any supported dtype and device.
        method: how they will be used.
        requested: the caller's choice, or None.
        schedule: what will be evaluated; a rational one needs float32 on every device.

    Returns:
        `requested` if given. Else float64 for a float64 input; on a GPU float16 for the Gram form
        and bfloat16 for the plain one (float16 where there is no bfloat16); on a CPU float32,
        except that a bfloat16 input of the plain form stays bfloat16 where that is fast: the Gram
        form is as fast in float32. float32 for the references and on other devices.

    Raises:
        TypeError: `requested` is not a dtype.
        ValueError: `requested` is not a dtype that the iterations support.
    """
    if requested is not None:
        return _checked(requested)
    if x.dtype == torch.float64:
        return torch.float64
    if isinstance(schedule, Rational) or method not in ("auto", "newton_schulz", "gram"):
        return torch.float32
    on_gram = method == "gram" or (method == "auto" and _elongated(x))
    if x.device.type == "cuda":
        no_bfloat16 = torch.cuda.get_device_capability(x.device) < (8, 0)
        return torch.float16 if on_gram or no_bfloat16 else torch.bfloat16
    if x.device.type == "cpu" and x.dtype == torch.bfloat16 and not on_gram:
        return torch.bfloat16 if cpu_has_fast_bfloat16() else torch.float32
    return torch.float32


def _checked(dtype: torch.dtype) -> torch.dtype:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"Invalid {dtype=}. Must be a torch.dtype such as torch.float32, or None."
            + see("bad-option")
        )
    if dtype not in _ARITHMETIC:
        raise ValueError(
            f"Invalid {dtype=}. Must be torch.float64, float32, float16 or bfloat16, or None."
            + see("bad-option")
        )
    return dtype


def arithmetic(dtype: torch.dtype, device: torch.device) -> Arithmetic:
    """Precision that products of this dtype really have.

    torch's settings may replace float32 products by TF32 or bfloat16 ones, whose Gram matrices need
    the guards of those.

    Args:
        dtype: one of float64, float32, float16, bfloat16.
        device: where the products run.

    Returns:
        The name of the precision.
    """
    if dtype != torch.float32:
        return _ARITHMETIC[dtype]
    setting = float32_products(device)
    if setting == "bf16" and device.type == "cpu" and cpu_has_fast_bfloat16():
        return "bfloat16"
    return "float32" if setting == "ieee" else "tf32"


def float32_products(device: torch.device) -> str:
    """What torch may compute float32 products in: "ieee" for float32, "tf32" or "bf16".

    Read as torch.backends' `fp32_precision`, which torch.set_float32_matmul_precision sets, too:
    asked for the latter's value torch raises, once the former was set.

    Args:
        device: where the products run.
    """
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    setting: str = backend.matmul.fp32_precision
    return "ieee" if setting == "none" else setting


def choose_form(x: Tensor, schedule: Schedule, precision: Arithmetic) -> Form:
    """The faster of the two forms among those that are stable here.

    Args:
        x: [..., m, n] in the dtype of the iteration, m <= n or m > n alike.
        schedule: coefficients.
        precision: precision of the products.

    Returns:
        "gram" for elongated matrices where `stability.windows` allows it, else "newton_schulz".
    """
    if not _elongated(x):
        return "newton_schulz"
    try:
        windows(schedule, precision)
    except ValueError:
        return "newton_schulz"
    return "gram"


def _elongated(x: Tensor) -> bool:
    short, long = sorted(x.shape[-2:])
    cut = short >= SMALLEST_CUT or x.device.type == "cuda"
    return long >= (_GRAM_ASPECT if cut else _GRAM_ASPECT_UNCUT) * short
