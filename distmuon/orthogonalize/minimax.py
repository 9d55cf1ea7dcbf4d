"""Minimax odd quintics for the sign function, one step after another (a Remez exchange)."""

from __future__ import annotations

import math

import torch

from distmuon.orthogonalize.schedule import Triple, evaluate

# Below this relative width the interval's minimax quintic and the one that is flat at its centre
# agree to double precision, and the exchange would divide by differences of equal numbers.
_NARROW = 5e-6
_MAX_EXCHANGES = 100
_ALTERNATION = (1.0, -1.0, 1.0, -1.0)


def best_quintic(lower: float, upper: float) -> Triple:
    """The odd quintic closest to 1 on [lower, upper] in the maximum norm.

    Args:
        lower: smallest singular value, > 0.
        upper: largest singular value, >= lower.

    Returns:
        (a, b, c) of a*s + b*s**3 + c*s**5.

    Source: Remez exchange; its use for this composition is https://arxiv.org/abs/2505.16932.
    """
    if lower / upper > 1 - _NARROW:
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    points = [lower, (3 * lower + upper) / 4, (lower + 3 * upper) / 4, upper]
    error = math.inf
    triple: Triple = (0.0, 0.0, 0.0)
    for _ in range(_MAX_EXCHANGES):
        rows = [[s, s**3, s**5, sign] for s, sign in zip(points, _ALTERNATION, strict=True)]
        system = torch.tensor(rows, dtype=torch.float64)
        solution = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64))
        a, b, c, new_error = solution.tolist()
        triple = (a, b, c)
        if abs(new_error - error) < 1e-15:
            break
        error = new_error
        # The inner extrema: roots of a + 3 b s² + 5 c s⁴.
        root = math.sqrt(9 * b * b - 20 * a * c)
        points[1] = math.sqrt((-3 * b - root) / (10 * c))
        points[2] = math.sqrt((-3 * b + root) / (10 * c))
    return triple


def compose(lower: float, steps: int, cushion: float) -> tuple[Triple, ...]:
    """Greedy composition: each step is the best quintic for the interval that the last one left.

    Args:
        lower: smallest singular value, relative to the largest, that shall reach 1.
        steps: number of quintics.
        cushion: each step is designed for an interval no wider than [cushion*upper, upper]; it
            keeps the early steps from pushing small values up by sending middle ones near zero.

    Returns:
        One (a, b, c) a step, each centred so that its image is symmetric about 1.

    Source: https://arxiv.org/abs/2505.16932, section 3.
    """
    low, high = lower, 1.0
    triples: list[Triple] = []
    for _ in range(steps):
        a, b, c = best_quintic(max(low, cushion * high), high)
        centre = 2 / (evaluate((a, b, c), low) + evaluate((a, b, c), high))
        triple = (a * centre, b * centre, c * centre)
        triples.append(triple)
        low = evaluate(triple, low)
        high = 2 - low
    return tuple(triples)
