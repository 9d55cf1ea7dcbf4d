"""The elementwise update rules as Triton kernels. Imports Triton: see `kernels.elementwise`.

Each reads and writes every element once, in the operation order of `distmuon.update_rules`.

A mask that may end anywhere makes the compiler access elements one by one, with three times the
registers. So each kernel goes by groups of 16, its first program also takes what is left after the
last of them, and one compiled kernel serves every count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _block(count, BLOCK: tl.constexpr):
    """Where this program's elements are, and which of them are in whole groups."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < count // 16 * 16


@triton.jit
def _rest(count):
    """Where the elements after the last whole group are, and which of 16 there are."""
    at = (count // 16 * 16).to(tl.int64) + tl.arange(0, 16)
    return at, at < count


@triton.jit
def _momentum(
    grad_ptr,
    buffer_ptr,
    bits_ptr,
    at,
    inside,
    momentum,
    rest,
    NESTEROV: tl.constexpr,
    LARGEST: tl.constexpr,
):
    grad = tl.load(grad_ptr + at, mask=inside)
    buffer = tl.load(buffer_ptr + at, mask=inside)
    buffer += rest * (grad - buffer)
    tl.store(buffer_ptr + at, buffer, mask=inside)
    if NESTEROV:
        # From the nearer end, as torch.lerp does.
        ahead = tl.where(momentum < 0.5, grad + momentum * (buffer - grad), buffer)
        buffer = tl.where(momentum < 0.5, ahead, buffer - rest * (buffer - grad))
    tl.store(grad_ptr + at, buffer, mask=inside)
    if LARGEST:
        size = tl.where(inside, tl.abs(buffer), 0.0).to(tl.int32, bitcast=True)
        tl.atomic_max(bits_ptr, tl.max(size, axis=0), sem="relaxed")


@triton.jit(do_not_specialize=["count"])
def _momentum_kernel(
    grad_ptr,
    buffer_ptr,
    bits_ptr,
    count,
    momentum,
    rest,
    NESTEROV: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Average BLOCK gradients into the momentum; the gradient becomes what is orthogonalized.

    The largest of its absolute values is found on the way. As integers the bits of floats that
    are not negative have the floats' order, NaNs above infinity, and a maximum of integers does
    not depend on the order in which the programs come.
    """
    at, inside = _block(count, BLOCK)
    _momentum(grad_ptr, buffer_ptr, bits_ptr, at, inside, momentum, rest, NESTEROV, LARGEST)
    if tl.program_id(0) == 0:
        last, left = _rest(count)
        _momentum(grad_ptr, buffer_ptr, bits_ptr, last, left, momentum, rest, NESTEROV, LARGEST)


@triton.jit
def _apply(param_ptr, update_ptr, at, inside, keep, lr):
    param = tl.load(param_ptr + at, mask=inside)
    update = tl.load(update_ptr + at, mask=inside)
    tl.store(param_ptr + at, param * keep - lr * update, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _apply_kernel(param_ptr, update_ptr, count, keep, lr, BLOCK: tl.constexpr):
    """Decay and step for BLOCK elements."""
    at, inside = _block(count, BLOCK)
    _apply(param_ptr, update_ptr, at, inside, keep, lr)
    if tl.program_id(0) == 0:
        last, left = _rest(count)
        _apply(param_ptr, update_ptr, last, left, keep, lr)


@triton.jit
def _adamw(
    param_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    at,
    inside,
    keep,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    rate,
):
    grad = tl.load(grad_ptr + at, mask=inside)
    first = tl.load(first_ptr + at, mask=inside)
    second = tl.load(second_ptr + at, mask=inside, other=1.0)
    first += rest1 * (grad - first)
    second = second * beta2 + rest2 * grad * grad
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    denominator = tl.sqrt(second) / root + eps
    param = tl.load(param_ptr + at, mask=inside) * keep
    tl.store(param_ptr + at, param - rate * first / denominator, mask=inside)


@triton.jit(do_not_specialize=["count"])
def _adamw_kernel(
    param_ptr,
    grad_ptr,
    first_ptr,
    second_ptr,
    count,
    keep,
    rest1,
    beta2,
    rest2,
    root,
    eps,
    rate,
    BLOCK: tl.constexpr,
):
    """One AdamW step for BLOCK elements."""
    at, inside = _block(count, BLOCK)
    _adamw(
        param_ptr, grad_ptr, first_ptr, second_ptr, at, inside,
        keep, rest1, beta2, rest2, root, eps, rate,
    )  # fmt: skip
    if tl.program_id(0) == 0:
        last, left = _rest(count)
        _adamw(
            param_ptr, grad_ptr, first_ptr, second_ptr, last, left,
            keep, rest1, beta2, rest2, root, eps, rate,
        )  # fmt: skip


@triton.jit
def _adopt(master_ptr, narrow_ptr, at, inside):
    bits = tl.load(master_ptr + at, mask=inside, other=0)
    narrow = tl.load(narrow_ptr + at, mask=inside, other=0).to(tl.int32)
    # To the nearest, of two as near to the even one.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    written = (nearest != narrow) | ((bits & 0x7FFFFFFF) > 0x7F800000)
    tl.store(master_ptr + at, narrow << 16, mask=inside & written)


@triton.jit(do_not_specialize=["count"])
def _adopt_kernel(master_ptr, narrow_ptr, count, BLOCK: tl.constexpr):
    """Where BLOCK bfloat16 numbers are not the rounded ones of their float32 master, take them."""
    at, inside = _block(count, BLOCK)
    _adopt(master_ptr, narrow_ptr, at, inside)
    if tl.program_id(0) == 0:
        last, left = _rest(count)
        _adopt(master_ptr, narrow_ptr, last, left)


@triton.jit
def _round(
    out_ptr,
    value_ptr,
    at,
    inside,
    first,
    second,
    FIRST_FACTOR: tl.constexpr,
    SECOND_FACTOR: tl.constexpr,
):
    bits = tl.load(value_ptr + at, mask=inside, other=0)
    # Integers wrap around; their shifts repeat the sign, which the masks take away.
    draw = at.to(tl.int32) + first
    draw = (draw ^ ((draw >> 16) & 0xFFFF)) * FIRST_FACTOR
    draw = draw ^ second
    draw = (draw ^ ((draw >> 15) & 0x1FFFF)) * SECOND_FACTOR
    rounded = (bits + ((draw >> 16) & 0xFFFF)) >> 16
    infinite = (bits & 0x7FFFFFFF) == 0x7F800000
    rounded = tl.where(infinite, bits >> 16, rounded)
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
    tl.store(out_ptr + at, rounded.to(tl.int16), mask=inside)


# Specialized for the values of the keys, too, it would be compiled again and again.
@triton.jit(do_not_specialize=["count", "first", "second"])
def _round_kernel(
    out_ptr,
    value_ptr,
    count,
    first,
    second,
    FIRST_FACTOR: tl.constexpr,
    SECOND_FACTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Round BLOCK numbers to bfloat16 at random, as `distmuon.rounding` describes."""
    at, inside = _block(count, BLOCK)
    _round(out_ptr, value_ptr, at, inside, first, second, FIRST_FACTOR, SECOND_FACTOR)
    if tl.program_id(0) == 0:
        last, left = _rest(count)
        _round(out_ptr, value_ptr, last, left, first, second, FIRST_FACTOR, SECOND_FACTOR)


@triton.jit
def _scale(out_ptr, x_ptr, at, inside, factor):
    value = tl.load(x_ptr + at, mask=inside).to(tl.float32) * factor
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _scale_kernel(out_ptr, x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """Multiply BLOCK elements of one matrix by its factor, in float32, into another dtype."""
    matrix = tl.program_id(1)
    # Of several matrices each has whole groups of 16, see `launch_scale`.
    start = tl.multiple_of(matrix.to(tl.int64) * count, 16)
    factor = tl.load(factor_ptr + matrix)
    at, inside = _block(count, BLOCK)
    _scale(out_ptr + start, x_ptr + start, at, inside, factor)
    if tl.program_id(0) == 0:
        last, left = _rest(count)
        _scale(out_ptr + start, x_ptr + start, last, left, factor)


def launch_scale(x: Tensor, factor: Tensor, out: Tensor) -> None:
    """Multiply and change the dtype in one pass.

    Args:
        x: [count, numel], contiguous; where count > 1, numel is a multiple of 16.
        factor: float32 [count], contiguous.
        out: [count, numel], contiguous; overwritten.
    """
    count, numel = x.shape
    _scale_kernel[triton.cdiv(numel, BLOCK), count](out, x, factor, numel, BLOCK=BLOCK)


def launch_round(
    out: Tensor, value: Tensor, *, first: int, second: int, factors: tuple[int, int]
) -> None:
    """`rounding.round_` of one piece in one pass.

    Args:
        out: bfloat16 [n], contiguous; overwritten.
        value: float32 [n], contiguous.
        first: What the hash of the first element starts from, a signed 32-bit integer.
        second: What it takes in halfway, likewise.
        factors: Its multipliers, likewise.
    """
    _round_kernel[triton.cdiv(value.numel(), BLOCK),](
        out.view(torch.int16),
        value.view(torch.int32),
        value.numel(),
        first,
        second,
        FIRST_FACTOR=factors[0],
        SECOND_FACTOR=factors[1],
        BLOCK=BLOCK,
    )


def launch_adopt(master: Tensor, narrow: Tensor) -> None:
    """Take into a master what was written into its rounded copy, in one pass.

    Args:
        master: float32 [n], contiguous; updated in place.
        narrow: bfloat16 [n], contiguous.
    """
    count = master.numel()
    _adopt_kernel[triton.cdiv(count, BLOCK),](
        master.view(torch.int32), narrow.view(torch.int16), count, BLOCK=BLOCK
    )


def launch_momentum(
    grad: Tensor, buffer: Tensor, *, momentum: float, nesterov: bool, largest: Tensor | None = None
) -> None:
    """`update_rules.momentum_` in one pass.

    Args:
        grad: float32, contiguous; overwritten.
        buffer: Likewise.
        momentum: Decay of the average.
        nesterov: Whether to look ahead.
        largest: float32 [1], not negative; raised to the largest absolute value of the result.
    """
    _momentum_kernel[triton.cdiv(grad.numel(), BLOCK),](
        grad,
        buffer,
        (grad if largest is None else largest).view(torch.int32),
        grad.numel(),
        float(momentum),  # an int would be compiled for its value
        1.0 - momentum,
        NESTEROV=nesterov,
        LARGEST=largest is not None,
        BLOCK=BLOCK,
    )


def launch_apply(param: Tensor, update: Tensor, *, lr: float, weight_decay: float) -> None:
    """`update_rules.apply_` in one pass.

    Args:
        param: float32, contiguous; overwritten.
        update: Likewise; not modified.
        lr: Learning rate.
        weight_decay: Decay per unit of lr.
    """
    _apply_kernel[triton.cdiv(param.numel(), BLOCK),](
        param, update, param.numel(), 1.0 - lr * weight_decay, float(lr), BLOCK=BLOCK
    )


def launch_adamw(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    keep: float,
    betas: tuple[float, float],
    root: float,
    eps: float,
    rate: float,
) -> None:
    """`update_rules.adamw_` in one pass.

    Args:
        tensors: Parameter, gradient, first and second moment; float32, contiguous.
        keep: Factor on the parameter: 1 - lr * weight_decay.
        betas: Decay of the moments.
        root: Root of the second moment's bias correction.
        eps: Added to the denominator.
        rate: lr over the first moment's bias correction.
    """
    count = tensors[0].numel()
    factors = (keep, 1 - betas[0], betas[1], 1 - betas[1], root, eps, rate)
    _adamw_kernel[triton.cdiv(count, BLOCK),](*tensors, count, *map(float, factors), BLOCK=BLOCK)
