"""Named coefficient schedules with their sources, a generator, and what users may write."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

from distmuon.errors import see
from distmuon.orthogonalize import halley
from distmuon.orthogonalize.minimax import compose
from distmuon.orthogonalize.schedule import AnySchedule, Normalization, Schedule, Triple

Coefficients: TypeAlias = str | AnySchedule | Sequence[float] | Sequence[Sequence[float]]

# The cushion of the published Polar Express schedule, recovered by matching its eight triples.
_POLAR_EXPRESS_CUSHION = 0.02407327424182761
_ONE_TRIPLE_STEPS = 5
_MAX_STEPS = 99


def generate(
    lower: float,
    steps: int,
    safety: float = 1.02,
    *,
    cushion: float = 0.02,
    normalization: Normalization = "schatten4",
    name: str = "custom",
) -> Schedule:
    """Make a schedule that takes every singular value in [lower, 1] near 1 in `steps` steps.

    Args:
        lower: smallest singular value, relative to the normalizing norm, that shall reach 1.
        steps: number of steps.
        safety: dividing the argument of all polynomials but the last by it (a/safety, b/safety**3,
            c/safety**5), and multiplying the norm by it, keeps a value that rounding pushed past
            the interval's end from being thrown out by the next step. 1 for the exact minimax.
        cushion: see `minimax.compose`.
        normalization: "schatten4" or "frobenius".
        name: name of the schedule.

    Returns:
        The schedule.

    Raises:
        ValueError: an argument is out of range.

    Source: https://arxiv.org/abs/2505.16932, sections 3 and 4.
    """
    if not 0.0 < lower < 1.0:
        raise ValueError(f"Invalid {lower=}. Must be in (0, 1)." + see("bad-option"))
    _check_steps(steps)
    if not 1.0 <= safety < 2.0:
        raise ValueError(f"Invalid {safety=}. Must be in [1, 2)." + see("bad-option"))
    if not 0.0 <= cushion < 1.0:
        raise ValueError(f"Invalid {cushion=}. Must be in [0, 1)." + see("bad-option"))
    triples = compose(lower, steps, cushion)
    safe = tuple(_deflate(triple, safety) for triple in triples[:-1]) + triples[-1:]
    return Schedule(
        name=name,
        coefficients=safe,
        normalization=normalization,
        safety=safety,
        source=f"generate({lower}, {steps}, {safety}, cushion={cushion}), arXiv:2505.16932",
    )


def _deflate(triple: Triple, safety: float) -> Triple:
    a, b, c = triple
    return a / safety, b / safety**3, c / safety**5


def _repeat(triple: Triple, steps: int) -> tuple[Triple, ...]:
    return (triple,) * steps


def _keller(steps: int | None) -> Schedule:
    return Schedule(
        name="keller",
        coefficients=_repeat((3.4445, -4.7750, 2.0315), steps or 5),
        normalization="frobenius",
        safety=1.0,
        source="https://kellerjordan.github.io/posts/muon/; torch.optim.Muon's default",
    )


def _polar_express(steps: int | None) -> Schedule:
    count = steps or 5
    published = compose(1e-3, 7, _POLAR_EXPRESS_CUSHION)
    safe = tuple(_deflate(triple, 1.01) for triple in published)
    # From the eighth step on the interval is a point, and the paper repeats this one undeflated.
    tail = _repeat((1.875, -1.25, 0.375), max(0, count - len(safe)))
    return Schedule(
        name="polar_express",
        coefficients=(safe + tail)[:count],
        normalization="frobenius",
        safety=1.01,
        source="https://arxiv.org/abs/2505.16932, algorithm 1, safety factor 1.01",
    )


def _you(steps: int | None) -> Schedule:
    _fixed("you", 5, steps)
    return Schedule(
        name="you",
        coefficients=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        normalization="frobenius",
        safety=1.0,
        source="https://x.com/YouJiacheng/status/1905861218138804534",
    )


def _cubic(steps: int | None) -> Schedule:
    return Schedule(
        name="cubic",
        coefficients=_repeat((1.5, -0.5, 0.0), steps or 12),
        normalization="frobenius",
        safety=1.0,
        source="the classical Newton-Schulz iteration; Higham, Functions of Matrices, eq. 8.20",
    )


def _taylor(steps: int | None) -> Schedule:
    return Schedule(
        name="taylor",
        coefficients=_repeat((15 / 8, -10 / 8, 3 / 8), steps or 10),
        normalization="frobenius",
        safety=1.0,
        source="Pade [2/0] iteration for the sign; Higham, Functions of Matrices, table 5.1",
    )


def _deepseek_v4(steps: int | None) -> Schedule:
    _fixed("deepseek_v4", 10, steps)
    return Schedule(
        name="deepseek_v4",
        coefficients=_repeat((3.4445, -4.7750, 2.0315), 8) + _repeat((2.0, -1.5, 0.5), 2),
        normalization="frobenius",
        safety=1.0,
        source="https://huggingface.co/deepseek-ai/DeepSeek-V4-Pro, DeepSeek_V4.pdf, algorithm 1",
    )


def _p5(steps: int | None) -> Schedule:
    _fixed("p5", 5, steps)
    return generate(3e-3, 5, 1.02, name="p5")


_PRESETS: dict[str, Callable[[int | None], Schedule]] = {
    "keller": _keller,
    "polar_express": _polar_express,
    "you": _you,
    "cubic": _cubic,
    "taylor": _taylor,
    "deepseek_v4": _deepseek_v4,
    "p5": _p5,
}
PRESETS: tuple[str, ...] = tuple(_PRESETS)
# "auto" is "halley" where that is faster, see `policy.for_device`, and this elsewhere.
QUINTIC_DEFAULT = "p5"
NAMES = ("auto", "halley", *PRESETS)


@cache
def preset(name: str, steps: int | None = None) -> Schedule:
    """A named schedule.

    Args:
        name: one of `PRESETS`.
        steps: number of steps; None for the preset's own. "you", "deepseek_v4" and "p5" are made
            for one number of steps only.

    Returns:
        The schedule.

    Raises:
        ValueError: unknown name, or `steps` that the preset cannot have.
    """
    if name not in _PRESETS:
        raise ValueError(
            f"Unknown coefficients={name!r}. Must be one of {', '.join(NAMES)}; or pass one "
            "(a, b, c), one (a, b, c) a step, or a Schedule." + see("bad-option")
        )
    return _PRESETS[name](steps)


def resolve(coefficients: Coefficients, steps: int | None = None) -> AnySchedule:
    """Turn what a user wrote into a schedule.

    Args:
        coefficients: one of `NAMES`, a schedule, one (a, b, c) repeated `steps` times, or one
            (a, b, c) a step. "auto" is "p5" here, as everywhere but for larger matrices on a CPU.
        steps: number of steps; None takes the preset's default, 5 for one triple, and the length
            of a sequence of triples or of a Schedule.

    Returns:
        The schedule, a `Rational` for "halley". Bare numbers get Frobenius normalization, for which
        they are usually meant.

    Raises:
        ValueError: unknown name, a wrong number of values, values that are not finite, or `steps`
            that the schedule cannot have.
        TypeError: `coefficients` is neither a name nor numbers, or `steps` is not an integer.
    """
    _check_steps(steps)
    if coefficients == "halley":
        return halley.schedule(steps or halley.STEPS)
    if isinstance(coefficients, str):
        return preset(QUINTIC_DEFAULT if coefficients == "auto" else coefficients, steps)
    if isinstance(coefficients, AnySchedule):
        _fixed(coefficients.name, coefficients.steps, steps)
        return coefficients
    if not isinstance(coefficients, Sequence) or len(coefficients) == 0:
        raise TypeError(
            f"Invalid {coefficients=}. Must be a preset's name, a Schedule, one (a, b, c), or one "
            "(a, b, c) for each step." + see("bad-option")
        )
    if isinstance(coefficients[0], int | float):
        triples = _repeat(_triple(coefficients), steps or _ONE_TRIPLE_STEPS)
    else:
        triples = tuple(_triple(triple) for triple in coefficients)
        _fixed("custom", len(triples), steps)
    return Schedule("custom", triples, "frobenius", 1.0, "the caller")


def _fixed(name: str, own: int, steps: int | None) -> None:
    if steps is not None and steps != own:
        raise ValueError(
            f"Invalid {steps=} for the schedule {name!r}, which has {own} steps. "
            f"Pass steps=None or steps={own}." + see("bad-option")
        )


def _check_steps(steps: object) -> None:
    if steps is None:
        return
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(
            f"Invalid {steps=}. Must be an integer, or None for the schedule's own."
            + see("bad-option")
        )
    if not 1 <= steps <= _MAX_STEPS:
        raise ValueError(
            f"Invalid {steps=}. Must be between 1 and {_MAX_STEPS}." + see("bad-option")
        )


def _triple(values: object) -> Triple:
    message = f"Invalid coefficients {values!r}. Each step needs three finite numbers (a, b, c)."
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(message + see("bad-option"))
    if len(values) != 3:
        raise ValueError(message + see("bad-option"))
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise TypeError(message + see("bad-option"))
    if not all(math.isfinite(value) for value in values):
        raise ValueError(message + see("bad-option"))
    a, b, c = values
    return float(a), float(b), float(c)
