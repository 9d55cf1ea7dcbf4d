"""The elementwise update rules on one GPU: our kernels, torch's foreach, compiler and optimizers.

Over 64 matrices of 2048 x 2048, end to end in flat buffers as a shard holds them. Rates count the
bytes that a rule has to read and write at least, once each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.gpu_bench import Bench, Contestants, race
from distmuon import rounding, update_rules
from distmuon.kernels import elementwise as kernels

MOMENTUM, LR, DECAY, BETAS, EPS = 0.95, 1e-3, 0.1, (0.9, 0.95), 1e-8
KEEP = 1 - LR * DECAY
# For each element: fp32 gradient and momentum; parameter; both moments; fp32 to bfloat16.
LEAST_BYTES = {"momentum": 16, "apply": 12, "adamw": 28, "round": 6, "narrow": 6, "widen": 6}


class Flat(NamedTuple):
    """A flat buffer and its matrices.

    Attributes:
        whole: [count * numel].
        rows: [count, numel], the same memory.
        pieces: `count` views [numel].
    """

    whole: Tensor
    rows: Tensor
    pieces: list[Tensor]


def flat(bench: Bench) -> Flat:
    """Random numbers; few of them where this only tests the code."""
    count, numel = (3, 40) if bench.tiny else (64, 2048 * 2048)
    rows = torch.randn(count, numel, device=bench.device)
    return Flat(rows.view(-1), rows, list(rows.unbind()))


def compiled(bench: Bench, call: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled form, where compiling is what is measured."""
    return call if bench.tiny else torch.compile(call)


def momentum(bench: Bench, buffer: Flat) -> Contestants:
    """Average, look ahead, and each matrix's largest entry."""
    found = torch.zeros(len(buffer.pieces), 1, device=bench.device)

    def ours(grad: Flat) -> None:
        taken = kernels.takes(grad.whole, buffer.whole)
        found.zero_()
        for g, b, largest in zip(grad.pieces, buffer.pieces, found, strict=True):
            known = largest if taken else None
            update_rules.momentum_(g, b, momentum=MOMENTUM, nesterov=True, largest=known)

    def at_once(grad: Flat) -> None:
        options: dict[str, Any] = {"momentum": MOMENTUM, "nesterov": True}
        update_rules.momentum_(grad.whole, buffer.whole, **options)
        torch.linalg.vector_norm(grad.rows, torch.inf, dim=1)

    def plain(grad: Tensor, average: Tensor) -> Tensor:
        average.lerp_(grad, 1 - MOMENTUM)
        grad.lerp_(average, MOMENTUM)
        return grad.abs().amax(1)

    def foreach(grad: Flat) -> None:
        torch._foreach_lerp_(buffer.pieces, grad.pieces, 1 - MOMENTUM)
        torch._foreach_lerp_(grad.pieces, buffer.pieces, MOMENTUM)
        torch._foreach_norm(grad.pieces, torch.inf)

    fused = compiled(bench, plain)
    return {
        "ours": ours,
        "ours, largest entries apart": at_once,
        "torch": lambda grad: plain(grad.rows, buffer.rows),
        "foreach": foreach,
        "compiled": lambda grad: fused(grad.rows, buffer.rows),
    }


def apply(bench: Bench, param: Flat) -> Contestants:
    """Decoupled decay and step."""

    def plain(p: Tensor, update: Tensor) -> Tensor:
        return p.mul_(KEEP).add_(update, alpha=-LR)

    def foreach(update: Flat) -> None:
        torch._foreach_mul_(param.pieces, KEEP)
        torch._foreach_add_(param.pieces, update.pieces, alpha=-LR)

    fused = compiled(bench, plain)
    return {
        "ours": lambda u: update_rules.apply_(param.whole, u.whole, lr=LR, weight_decay=DECAY),
        "torch": lambda u: plain(param.whole, u.whole),
        "foreach": foreach,
        "compiled": lambda u: fused(param.whole, u.whole),
    }


def adamw(bench: Bench, param: Flat) -> Contestants:
    """A whole step, beside torch.optim.AdamW's."""
    first, second = torch.zeros_like(param.whole), torch.zeros_like(param.whole)
    options: dict[str, Any] = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}

    def theirs(**kind: bool) -> Callable[[Flat], None]:
        parameters = [nn.Parameter(piece) for piece in param.pieces]
        optimizer = torch.optim.AdamW(parameters, **options, **kind)

        def step(grad: Flat) -> None:
            for parameter, piece in zip(parameters, grad.pieces, strict=True):
                parameter.grad = piece
            optimizer.step()

        return step

    return {
        "ours": lambda grad: update_rules.adamw_(
            param.whole, grad.whole, first, second, step=3, **options
        ),
        "torch, foreach": theirs(foreach=True),
        "torch, fused": theirs(fused=True),
    }


def stochastic(bench: Bench, like: Flat) -> Contestants:
    """Stochastic rounding to bfloat16, beside torch's rounding to the nearest."""
    out = torch.empty_like(like.whole, dtype=torch.bfloat16)
    count = like.rows.size(1)
    pieces = [
        rounding.Piece(i * count, (i + 1) * count, 0, rounding.make_key(0, str(i), 1))
        for i in range(len(like.pieces))
    ]
    return {
        "ours": lambda x: rounding.round_(out, x.whole, pieces),
        "ours by torch's operations": lambda x: rounding._round_by_torch(out, x.whole, pieces),
        "torch, nearest": lambda x: out.copy_(x.whole),
    }


def narrow(bench: Bench, like: Flat) -> Contestants:
    """Scale each matrix and round it to half precision, into a stack."""
    out = torch.empty_like(like.rows, dtype=torch.float16)
    factor = torch.full((len(like.pieces), 1), 0.25, device=bench.device)

    def ours(x: Flat) -> None:
        for piece, by, place in zip(x.pieces, factor, out, strict=True):
            kernels.scale_into(piece, by, place)

    return {"ours": ours, "torch": lambda x: torch.mul(x.rows, factor, out=out)}


def widen(bench: Bench, like: Flat) -> Contestants:
    """Multiply half precision into float32."""
    half = like.rows.half()
    out = torch.empty_like(like.rows)
    factor = torch.full((len(like.pieces), 1), 0.2, device=bench.device)

    def ours(_: Flat) -> None:
        for piece, by, place in zip(half, factor, out, strict=True):
            kernels.scale_into(piece, by, place)

    return {"ours": ours, "torch": lambda _: torch.mul(half, factor, out=out)}


CONTESTS = {
    "narrow": narrow,
    "widen": widen,
    "momentum": momentum,
    "apply": apply,
    "adamw": adamw,
    "round": stochastic,
}


def elementwise(bench: Bench, name: str) -> None:
    """One of them.

    Args:
        bench: Where it goes.
        name: In `CONTESTS`.
    """
    inputs = [flat(bench) for _ in range(2)]
    numel = inputs[0].whole.numel()
    contest = CONTESTS[name](bench, flat(bench))
    times = race(contest, inputs, bench.device, 3 if bench.tiny else 15)
    terabytes = numel * LEAST_BYTES[name] / 1e12
    bench.record(
        "elementwise", rule=name, numel=numel, ms={n: 1e3 * t for n, t in times.items()},
        terabytes_per_second={n: terabytes / t for n, t in times.items()},
        faster_than={n: t / times["ours"] for n, t in times.items() if n != "ours"},
    )  # fmt: skip
