"""The elementwise halves of Muon and AdamW, on any contiguous piece of a flat buffer.

Every function here gives the same bits for an element wherever the piece starts and ends, which is
what lets a sharded optimizer equal the one-process optimizer bitwise. On GPUs each is one kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.kernels import elementwise
from distmuon.structure import Axes

AdjustLrMode = Literal[
    "match_rms_adamw", "update_rms", "max_dim", "original", "mup", "spectral_unclamped", "none"
]
DecayRule = Literal["decoupled", "cautious"]
AdjustLrFn = AdjustLrMode | Callable[[int, int], float]

_ADJUST_LR: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "update_rms": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "max_dim": lambda rows, cols: 0.2 * max(rows, cols),
    "original": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "mup": lambda rows, cols: math.sqrt(rows / cols),
    "spectral_unclamped": lambda rows, cols: math.sqrt(rows / cols),
    "none": lambda rows, cols: 1.0,
}

# Weights, state and the factors of a step are float32, or less.
FLOAT32_MAX = torch.finfo(torch.float32).max


def adjust_lr_factor(adjust_lr_fn: AdjustLrFn, rows: int, cols: int) -> float:
    """Factor on the orthogonalized update of an A x B matrix.

    The polar factor of an A x B matrix of rank r has r singular values of 1, so its root mean
    square is `sqrt(r / (A*B))`, which is `1 / sqrt(max(A, B))` at full rank. After the factor:

    | `adjust_lr_fn`      | factor                | update RMS at full rank         |
    |---------------------|-----------------------|---------------------------------|
    | `"match_rms_adamw"` | `0.2*sqrt(max(A, B))` | 0.2                             |
    | `"update_rms"`      | `0.2*sqrt(max(A, B))` | 0.2, exactly: see `rescale_`    |
    | `"max_dim"`         | `0.2*max(A, B)`       | `0.2*sqrt(max(A, B))`           |
    | `"original"`        | `sqrt(max(1, A/B))`   | `sqrt(max(1, A/B) / max(A, B))` |
    | `"mup"`             | `sqrt(A/B)`           | `sqrt(A/B / max(A, B))`         |
    | `"none"`            | 1                     | `1 / sqrt(max(A, B))`           |

    `"spectral_unclamped"` is torch.optim.Muon's name, in torch 2.15, for `"mup"`.

    0.2 is AdamW's usual update RMS, so `match_rms_adamw` keeps AdamW's lr. `max_dim` makes the
    same step at an lr smaller by `sqrt(max(A, B))`, a different one for each shape.

    Args:
        adjust_lr_fn: A name above, or a callable `(A, B) -> factor`.
        rows: A, the output dimension of a `torch.nn.Linear` weight [A, B].
        cols: B, the input dimension.

    Returns:
        The factor; lr times factor times the polar factor is the step.

    Raises:
        ValueError: for an unknown name, or a callable whose result is not positive and finite in
            float32.
        TypeError: if `adjust_lr_fn` is neither a name nor callable, or a callable's result is no
            number.

    Source: `match_rms_adamw` Moonlight, arXiv 2502.16982, section 2.2; `original` Keller Jordan's
    Muon; `mup` Bernstein's modular norm scaling. `max_dim` is Moonlight's rule without the root.
    """
    if callable(adjust_lr_fn):
        result = adjust_lr_fn(rows, cols)
        try:
            factor = float(result)
        except (TypeError, ValueError):
            raise TypeError(
                f"Invalid adjust_lr_fn: it returned {result!r} for a {rows} x {cols} matrix. "
                "Must be a number." + see("bad-option")
            ) from None
        if not 0 < factor <= FLOAT32_MAX:
            raise ValueError(
                f"Invalid adjust_lr_fn: it returned {factor} for a {rows} x {cols} matrix. "
                "Must be positive and finite in float32." + see("bad-option")
            )
        return factor
    if not isinstance(adjust_lr_fn, str):
        raise TypeError(
            f"Invalid adjust_lr_fn={adjust_lr_fn!r}. Must be one of {sorted(_ADJUST_LR)} "
            "or a callable (rows, cols) -> float." + see("bad-option")
        )
    if adjust_lr_fn not in _ADJUST_LR:
        raise ValueError(
            f"Invalid {adjust_lr_fn=}. Must be one of {sorted(_ADJUST_LR)} "
            "or a callable (rows, cols) -> float." + see("bad-option")
        )
    return _ADJUST_LR[adjust_lr_fn](rows, cols)


def shape_factor(adjust_lr_fn: AdjustLrFn, axes: Axes, shape: Sequence[int]) -> float:
    """`adjust_lr_factor` of a matrix as it is stored.

    Args:
        adjust_lr_fn: As there.
        axes: "in_out" for a matrix whose rows are inputs.
        shape: [m, n], a convolution's kernel flattened.

    Returns:
        The factor.
    """
    rows, cols = shape
    return adjust_lr_factor(adjust_lr_fn, *((cols, rows) if axes == "in_out" else (rows, cols)))


def normuon_(polar: Tensor, second_moment: Tensor, axes: Axes, *, beta2: float, eps: float) -> None:
    """Divide each neuron of an orthogonalized matrix by the root of its second moment.

    A neuron is an output: a row of a matrix [out, in], a column of one that is stored [in, out].
    `v = beta2*v + (1 - beta2)*mean over inputs of O²`, then `O / (sqrt(v) + eps)`. The scale of
    the result means nothing: `rescale_` follows. So v needs no correction for its start at zero.

    Args:
        polar: [m, n], a whole matrix; updated in place.
        second_moment: [m, 1], or [1, n] for "in_out"; updated in place.
        axes: How the matrix is stored.
        beta2: Decay of the second moment.
        eps: Added to its root.

    Source: NorMuon, arXiv 2510.05491.
    """
    inputs = -2 if axes == "in_out" else -1
    second_moment.lerp_(polar.square().mean(inputs, keepdim=True), 1 - beta2)
    polar.div_(second_moment.sqrt().add_(eps))


def update_rms(update: Tensor) -> Tensor:
    """Root mean square of a whole matrix, a float64 scalar: fp32 sums would lose digits."""
    norm: Tensor = torch.linalg.vector_norm(update, dtype=torch.float64)
    return norm / math.sqrt(update.numel())


def rescale_(update: Tensor, rms: float) -> None:
    """Give a matrix this root mean square, whatever its rank and its singular values are.

    Args:
        update: [m, n], whole; updated in place. Zeros stay zeros.
        rms: The root mean square.

    Source: NorMuon, arXiv 2510.05491, without its lr; "Update Norm" in Moonlight, arXiv 2502.16982,
    table 1.
    """
    found = update_rms(update)
    update.mul_(torch.where(found > 0, rms / found, 0.0).to(update.dtype))


def cap_(update: Tensor, max_rms: float) -> None:
    """Scale a matrix down to this root mean square if its own is larger.

    Args:
        update: [m, n], whole; updated in place.
        max_rms: The largest root mean square.
    """
    found = update_rms(update)
    update.mul_(torch.where(found > max_rms, max_rms / found, 1.0).to(update.dtype))


def momentum_(
    grad: Tensor,
    momentum_buffer: Tensor,
    *,
    momentum: float,
    nesterov: bool,
    largest: Tensor | None = None,
) -> None:
    """Average the gradient into the momentum and turn `grad` into what is orthogonalized.

    `buffer = momentum*buffer + (1 - momentum)*grad`; with Nesterov the result is
    `momentum*buffer + (1 - momentum)*grad`, without it the buffer itself.

    Args:
        grad: Any shape; overwritten with the update.
        momentum_buffer: Same shape and dtype; updated in place, never aliased by `grad`.
        momentum: Decay of the exponential moving average, in [0, 1).
        nesterov: Whether to look ahead.
        largest: float32 [1], zero; receives the largest absolute value of the update. Only for
            tensors that a kernel takes (`elementwise.takes`).

    Source: torch.optim.Muon's convention (an average; Keller Jordan's early code keeps a sum,
    which is the same buffer divided by `1 - momentum`, and orthogonalization ignores scale).
    """
    if elementwise.takes(grad, momentum_buffer):
        elementwise.momentum_(
            grad, momentum_buffer, momentum=momentum, nesterov=nesterov, largest=largest
        )
        return
    assert largest is None, "only the kernel finds it"
    momentum_buffer.lerp_(grad, 1 - momentum)
    if nesterov:
        grad.lerp_(momentum_buffer, momentum)
    else:
        grad.copy_(momentum_buffer)


def adamw_direction(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """What `adamw_` has just subtracted from the parameter, over lr; read from its state.

    Args:
        exp_avg: First moment after the update.
        exp_avg_sq: Second moment after it.
        step: Number of that update, from 1.
        betas: As in `adamw_`.
        eps: As in `adamw_`.

    Returns:
        A new tensor like `exp_avg`.
    """
    beta1, beta2 = betas
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return exp_avg.div(denominator).div_(1 - beta1**step)


def overflow(*, lr: float, weight_decay: float, betas: tuple[float, float]) -> str | None:
    """Find what float32 cannot hold of the factors of a step.

    torch would end the step at such a factor in the middle, with some weights updated.

    Args:
        lr: Learning rate.
        weight_decay: Decay per unit of lr.
        betas: AdamW's; the first step divides lr by 1 - betas[0].

    Returns:
        The first such factor in words; None if there is none.
    """
    for words, value in (
        ("lr / (1 - betas[0])", lr / (1 - betas[0])),
        ("lr * weight_decay", lr * weight_decay),
    ):
        if value > FLOAT32_MAX:
            return f"{words} is {value:.3g}, and float32 ends at {FLOAT32_MAX:.2g}"
    return None


def decay_(
    param: Tensor, update: Tensor, *, lr: float, weight_decay: float, decay_rule: DecayRule
) -> None:
    """Decoupled weight decay: `param = param*(1 - lr*weight_decay)`, of some elements or all.

    Args:
        param: Any shape; updated in place.
        update: Same shape, of the sign of what will be subtracted.
        lr: Learning rate.
        weight_decay: Decay per unit of lr.
        decay_rule: "decoupled" for all; "cautious" leaves out the elements that the update makes
            larger, where decay would work against the loss.

    Source: Loshchilov and Hutter, arXiv 1711.05101; "cautious" Chen et al., arXiv 2510.12402.
    """
    decay = 1 - lr * weight_decay
    if decay_rule == "decoupled":
        param.mul_(decay)
    else:
        param.copy_(torch.where(update * param >= 0, param * decay, param))


def apply_(
    param: Tensor,
    update: Tensor,
    *,
    lr: float,
    weight_decay: float,
    decay_rule: DecayRule = "decoupled",
) -> None:
    """Decoupled weight decay, then the step: `param = param*(1 - lr*weight_decay) - lr*update`.

    Args:
        param: Any shape; updated in place.
        update: Same shape and dtype, already scaled by `adjust_lr_factor`.
        lr: Learning rate; the decay uses it unscaled.
        weight_decay: Decay per unit of lr.
        decay_rule: As for `decay_`.

    Source: Loshchilov and Hutter, arXiv 1711.05101; Moonlight, arXiv 2502.16982, equation 4.
    """
    if decay_rule == "decoupled" and elementwise.takes(param, update):
        elementwise.apply_(param, update, lr=lr, weight_decay=weight_decay)
        return
    decay_(param, update, lr=lr, weight_decay=weight_decay, decay_rule=decay_rule)
    param.add_(update, alpha=-lr)


def adamw_(  # noqa: PLR0913 - two moments and torch.optim.AdamW's hyperparameters
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decay_rule: DecayRule = "decoupled",
) -> None:
    """One AdamW step with bias correction and decoupled weight decay.

    Args:
        param: Any shape; updated in place.
        grad: Same shape and dtype.
        exp_avg: First moment; updated in place.
        exp_avg_sq: Second moment; updated in place.
        step: Number of this step, from 1.
        lr: Learning rate.
        betas: Decay of the first and second moment.
        eps: Added to the root of the corrected second moment.
        weight_decay: Decay per unit of lr.
        decay_rule: As for `decay_`.

    Source: Loshchilov and Hutter, arXiv 1711.05101, in the operation order of torch.optim.AdamW.
    """
    tensors = param, grad, exp_avg, exp_avg_sq
    if decay_rule == "decoupled" and elementwise.takes(*tensors):
        elementwise.adamw_(
            tensors, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        return
    beta1, beta2 = betas
    exp_avg.lerp_(grad, 1 - beta1)
    # The first moment has the sign of the update.
    decay_(param, exp_avg, lr=lr, weight_decay=weight_decay, decay_rule=decay_rule)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    param.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
