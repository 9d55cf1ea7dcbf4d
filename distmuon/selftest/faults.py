"""Checks that what goes wrong on one rank is told on all of them, and changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon.selftest.lab import Lab, Mismatch, require_same
from distmuon.selftest.problem import Problem


def check_desync(lab: Lab) -> str:
    """One element changes on the last rank.

    Args:
        lab: The ranks.

    Returns:
        What was named.

    Raises:
        Mismatch: if not every rank names the parameter and the rank.
        NotHere: on a single rank.
    """
    lab.require_several("no rank can differ from another")
    problem = Problem(lab.device, lab.group, check_desync_every=1)
    problem.train(range(2))
    if lab.is_last and not lab.sabotage:
        with torch.no_grad():
            problem.model.get_parameter("tall").view(-1)[5] += 1e-3
    problem.give_gradients(2)
    said = _said(problem)
    _require_named(said, "tall", f"[{lab.last}]")
    return f"one changed element of tall on rank {lab.last} was named on every rank"


def check_missing(lab: Lab) -> str:
    """The last rank has no gradient for one parameter.

    Args:
        lab: The ranks.

    Returns:
        What was named.

    Raises:
        Mismatch: if not every rank names parameter and rank, or something was changed.
        NotHere: on a single rank.
    """
    lab.require_several("no rank can lack what another has")
    problem = Problem(lab.device, lab.group)
    problem.train(range(2))
    before = problem.everything()
    problem.give_gradients(2)
    if lab.is_last and not lab.sabotage:
        problem.model.get_parameter("square").grad = None
    said = _said(problem)
    _require_named(said, "square", f"[{lab.last}]")
    _require_untouched(lab, problem, before)
    return f"square without gradient on rank {lab.last} was named on every rank, nothing changed"


def check_nonfinite(lab: Lab) -> str:
    """One gradient has an infinity, where only one rank's range sees it.

    Args:
        lab: The ranks.

    Returns:
        What was skipped.

    Raises:
        Mismatch: if a rank did not skip, something was changed, or the next step is off.
    """
    oracle = Problem(lab.device, None)
    expected = oracle.train([0, 1, 3])
    problem = Problem(lab.device, lab.group, nonfinite="skip")
    problem.train(range(2))
    before = problem.everything()
    problem.give_gradients(2)
    gradient = problem.model.get_parameter("wide").grad
    assert gradient is not None, "just given"
    if not lab.sabotage:
        gradient[-1, -1] = float("inf")
    problem.optimizer.step()
    skipped = problem.optimizer.report().skipped
    if skipped != 1:
        raise Mismatch(expected="1 skipped step on every rank", seen=f"{skipped}")
    _require_untouched(lab, problem, before)
    require_same(lab, problem.train([3]), expected, "one process that never saw the bad step")
    return "a step with an infinity was skipped by every rank, nothing changed; the next was right"


def _said(problem: Problem) -> str:
    """What the error of a step says; empty if there was none."""
    try:
        problem.optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def _require_named(said: str, *words: str) -> None:
    if not all(word in said for word in words):
        raise Mismatch(
            expected=f"an error that names {' and '.join(words)}",
            seen=f"the error {said!r}" if said else "no error",
        )


def _require_untouched(lab: Lab, problem: Problem, before: dict[str, Tensor]) -> None:
    for name, value in problem.everything().items():
        if not torch.equal(value, before[name]):
            raise Mismatch(
                expected="parameters and state bit-identical after a step that did not happen",
                seen=f"{name} has changed on rank {lab.rank}",
            )
