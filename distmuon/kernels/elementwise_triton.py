"""The elementwise update rules as Triton kernels. Imports Triton: see `kernels.elementwise`.

Each reads and writes every element once, in the operation order of `distmuon.update_rules`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
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
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
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


@triton.jit
def _apply_kernel(param_ptr, update_ptr, count, keep, lr, BLOCK: tl.constexpr):
    """Decay and step for BLOCK elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    param = tl.load(param_ptr + at, mask=inside)
    update = tl.load(update_ptr + at, mask=inside)
    tl.store(param_ptr + at, param * keep - lr * update, mask=inside)


@triton.jit
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
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
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
        momentum,
        1 - momentum,
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
        param, update, param.numel(), 1 - lr * weight_decay, lr, BLOCK=BLOCK
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
    _adamw_kernel[triton.cdiv(count, BLOCK),](*tensors, count, *factors, BLOCK=BLOCK)
