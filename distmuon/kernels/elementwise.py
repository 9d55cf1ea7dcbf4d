"""Whether the elementwise update rules go through one fused kernel each.

Like the symmetric products, a kernel is used on a GPU once it has been seen to compute right there.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.kernels.device import MOST_MATRICES, on_device_of
from distmuon.kernels.symmetric import triton_is_usable

_trusted: dict[torch.device, bool] = {}
# Elements of a piece, on average, that keep a GPU as busy as a launch the host: some 30 us at 16
# bytes an element. Not yet measured.
_LEAST_PIECE = 2**22
_SCALED_DTYPES = {torch.float32, torch.float16, torch.bfloat16}
_COUNT = 5000
_TOLERANCE = 1e-5


def takes(*tensors: Tensor) -> bool:
    """Whether tensors may be updated by the fused kernels.

    Args:
        tensors: All that a rule reads and writes, of one device.
    """
    if not all(t.dtype == torch.float32 and t.is_contiguous() and t.numel() for t in tensors):
        return False
    return _are_trusted(tensors[0].device)


def _are_trusted(device: torch.device) -> bool:
    if device.type == "cpu" or not triton_is_usable(device):
        return False
    if device not in _trusted:
        if torch.cuda.is_current_stream_capturing():
            return False  # the check waits for the device, which a graph cannot
        _trusted[device] = _check(device)
    return _trusted[device]


def takes_apart(pieces: int, *tensors: Tensor) -> bool:
    """Whether tensors may be updated by the fused kernels, and best piece by piece.

    A call for each matrix finds its largest entry; for small ones that costs more than it spares.

    Args:
        pieces: How many calls that would be.
        tensors: As for `takes`.
    """
    return tensors[0].numel() >= pieces * _LEAST_PIECE and takes(*tensors)


def takes_scaling(x: Tensor, out: Tensor) -> bool:
    """Whether the fused kernel is to multiply x [..., m, n] into another dtype.

    Args:
        x: Any shape; each factor is for its last two dimensions, or for all of fewer.
        out: Of the same shape.
    """
    if x.numel() < _LEAST_PIECE or not (x.is_contiguous() and out.is_contiguous()):
        return False
    if x.dim() > 2 and (x.stride(-3) % 16 or x.size(0) > MOST_MATRICES):
        return False
    return {x.dtype, out.dtype} <= _SCALED_DTYPES and _are_trusted(x.device)


def scale_into(x: Tensor, factor: Tensor, out: Tensor) -> Tensor:
    """Multiply in float32 and round once, in one pass where a kernel does it.

    Where dtypes differ torch's own operations convert one element at a time, not 16 bytes.

    Args:
        x: [..., m, n], or [numel]. Not modified.
        factor: float32 (float64 for a float64 x) [..., 1, 1], or [1].
        out: Like x, in any dtype; overwritten.

    Returns:
        `out`.
    """
    if not takes_scaling(x, out):
        return torch.mul(x, factor, out=out)
    from distmuon.kernels.elementwise_triton import launch_scale

    count = factor.numel()
    with on_device_of(x):
        launch_scale(x.view(count, -1), factor.reshape(count).contiguous(), out.view(count, -1))
    return out


def momentum_(
    grad: Tensor, buffer: Tensor, *, momentum: float, nesterov: bool, largest: Tensor | None = None
) -> None:
    """`update_rules.momentum_`, fused. For tensors that `takes` accepts.

    Args:
        grad: Overwritten with the update.
        buffer: Updated in place.
        momentum: Decay of the average.
        nesterov: Whether to look ahead.
        largest: float32 [1], not negative; raised to the largest absolute value of the update, to
            NaN if there is one. The same bits every time.
    """
    from distmuon.kernels.elementwise_triton import launch_momentum

    with on_device_of(grad):
        launch_momentum(grad, buffer, momentum=momentum, nesterov=nesterov, largest=largest)


def adopt_(master: Tensor, narrow: Tensor) -> None:
    """Replace what is not rounded to `narrow` by it. For a master that `takes` accepts.

    Args:
        master: Updated in place.
        narrow: bfloat16 of the same shape, contiguous.
    """
    from distmuon.kernels.elementwise_triton import launch_adopt

    with on_device_of(master):
        launch_adopt(master, narrow)


def apply_(param: Tensor, update: Tensor, *, lr: float, weight_decay: float) -> None:
    """`update_rules.apply_`, fused. For tensors that `takes` accepts.

    Args:
        param: Updated in place.
        update: The scaled update.
        lr: Learning rate.
        weight_decay: Decay per unit of lr.
    """
    from distmuon.kernels.elementwise_triton import launch_apply

    with on_device_of(param):
        launch_apply(param, update, lr=lr, weight_decay=weight_decay)


def adamw_(
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """`update_rules.adamw_`, fused. For tensors that `takes` accepts.

    Args:
        tensors: Parameter, gradient, first and second moment.
        step: Number of this step, from 1.
        lr: Learning rate.
        betas: Decay of the moments.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decay per unit of lr.
    """
    from distmuon.kernels.elementwise_triton import launch_adamw

    with on_device_of(tensors[0]):
        launch_adamw(
            tensors,
            keep=1 - lr * weight_decay,
            betas=betas,
            root=math.sqrt(1 - betas[1] ** step),
            eps=eps,
            rate=lr / (1 - betas[0] ** step),
        )


def _check(device: torch.device) -> bool:
    """Whether all of them compute right on this device; warns if not."""
    try:
        error = self_check(device)
    except Exception as problem:
        # Whatever a compiler or a driver raises: torch's own operations do the same.
        text = f"raised {type(problem).__name__}: {problem}"
    else:
        if error <= _TOLERANCE:
            return True
        text = f"are off by {error:.2g}"
    warnings.warn(
        f"distmuon's fused elementwise kernels {text} on {device}; torch's operations are used "
        "there, slower and right." + see("gpu-kernels"),
        RuntimeWarning,
        stacklevel=3,
    )
    return False


def self_check(device: torch.device) -> float:
    """Largest error of the kernels against float64 on random numbers of size 1.

    Args:
        device: Where to run them.

    Returns:
        The error; infinite if anything is NaN.
    """
    generator = torch.Generator(device).manual_seed(0)
    p, g, m, v = torch.randn(4, _COUNT, generator=generator, device=device)
    v = v.abs()
    p64, g64, m64, v64 = (x.double() for x in (p, g, m, v))
    errors = []
    adamw_((p, g, m, v), step=3, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    m64, v64 = 0.9 * m64 + 0.1 * g64, 0.95 * v64 + 0.05 * g64**2
    p64 = p64 * 0.95 - 0.1 / (1 - 0.9**3) * m64 / ((v64 / (1 - 0.95**3)).sqrt() + 1e-8)
    # Where the second moment is small the quotient is large.
    errors += [(p - p64) / p64.abs().clamp(min=1), m - m64, v - v64]
    for momentum in (0.3, 0.95):
        largest = torch.zeros(1, device=device)
        momentum_(g, m, momentum=momentum, nesterov=True, largest=largest)
        m64 = momentum * m64 + (1 - momentum) * g64
        g64 = momentum * m64 + (1 - momentum) * g64
        errors += [g - g64, m - m64, (largest - g.abs().max()).expand_as(g)]
    apply_(p, g, lr=0.1, weight_decay=0.5)
    errors.append((p - (p64 * 0.95 - 0.1 * g64)) / p64.abs().clamp(min=1))
    narrow, adopted = p.bfloat16(), p.clone()
    narrow[::3] = g[::3].bfloat16()
    adopt_(adopted, narrow)
    errors.append(adopted - torch.where(narrow != p.bfloat16(), narrow.float(), p))
    errors += _scaling_errors(p)
    largest = torch.stack([error.abs().max() for error in errors]).max()
    return float(largest.nan_to_num(torch.inf))


def _scaling_errors(p: Tensor) -> list[Tensor]:
    """Of float32 numbers by way of both half precisions and back, in their last places."""
    from distmuon.kernels.elementwise_triton import launch_scale

    rows = p[: p.numel() // 32 * 32].view(2, -1)
    factor = torch.tensor([0.5, 4.0], device=p.device)
    errors = []
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds.
    for dtype, most in ((torch.float16, 0.51), (torch.bfloat16, 1.01)):
        half, back = torch.empty_like(rows, dtype=dtype), torch.empty_like(rows)
        launch_scale(rows, factor, half)
        launch_scale(half, 1 / factor, back)
        step = torch.finfo(dtype).eps * rows.abs().clamp(min=1e-3)
        errors.append(((back - rows).abs() > most * step).flatten().float())
    return errors
