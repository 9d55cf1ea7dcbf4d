"""All checks one after the other, on all ranks; what they found, put together."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from distmuon.selftest import exactness, faults, messages, saves
from distmuon.selftest.lab import REPORT, Lab, Mismatch, NotHere

Status = Literal["pass", "fail", "skip"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that can be verified.

    Attributes:
        name: One word, for the table and `--only`.
        promise: What is verified, in one line.
        run: Does it on every rank; says what it saw, or raises Mismatch or NotHere.
    """

    name: str
    promise: str
    run: Callable[[Lab], str]


CHECKS = (
    Check("peer", "the update agrees with torch.optim.Muon", exactness.check_peer),
    Check("parity", "all ranks compute what one process does", exactness.check_parity),
    Check("work", "every matrix is orthogonalized once a step", exactness.check_work),
    Check("gradients", "they are averaged rightly in every mode", exactness.check_gradients),
    Check("bytes", "what is sent is what was planned", messages.check_bytes),
    Check("desync", "a rank with other weights is named", faults.check_desync),
    Check("missing", "a gradient missing on one rank is named", faults.check_missing),
    Check("nonfinite", "a step with an infinity is skipped by all", faults.check_nonfinite),
    Check("resume", "training goes on from a checkpoint", saves.check_resume),
    Check("reshard", "and on another number of ranks", saves.check_reshard),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a check found, over all ranks.

    Attributes:
        check: Its name.
        promise: What was verified.
        status: "pass", "fail", or "skip" where it does not apply.
        seconds: Time that the slowest rank took.
        ranks: Ranks on which it failed.
        seen: What was seen; the first failing rank's if it failed.
        expected: What should have been seen; empty unless it failed.
        remedy: What to do; empty unless it failed.
    """

    check: str
    promise: str
    status: Status
    seconds: float
    ranks: tuple[int, ...]
    seen: str
    expected: str = ""
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to check, and where.

    Attributes:
        device: Where parameters live.
        folder: Where all ranks can write; None if nowhere.
        only: Names of the checks; none for all.
        sabotage: Name of the check whose subject is broken on purpose, if any.
        limit_s: Seconds that a check may wait for a message.
    """

    device: torch.device
    folder: Path | None
    only: Sequence[str] = ()
    sabotage: str | None = None
    limit_s: float = 20.0


def run_checks(plan: Plan) -> Iterator[Row]:
    """Run the checks on the ranks of the default process group. A collective.

    Args:
        plan: What to check; the same on every rank.

    Yields:
        One row for each check, as soon as it is done, the same on every rank.
    """
    chosen = [check for check in CHECKS if not plan.only or check.name in plan.only]
    for check in chosen:
        lab = _open_lab(check, plan)
        found = _run_here(check, lab)
        # A DDP wrapper may not outlive its group: [Note: teardown] in training/world.py.
        gc.collect()
        everyone: list[Row | None] = [None] * lab.world_size
        dist.all_gather_object(everyone, found)
        rows = [row for row in everyone if row is not None]
        yield _together(rows)


def _open_lab(check: Check, plan: Plan) -> Lab:
    limit = timedelta(seconds=plan.limit_s)
    backend = "nccl" if plan.device.type == "cuda" else "gloo"
    rank, size = dist.get_rank(), dist.get_world_size()
    group = dist.new_group(backend=backend, timeout=limit)
    smaller = None
    if size > 1:
        # Every rank calls it, members or not.
        made = dist.new_group(list(range(size - 1)), backend=backend, timeout=limit)
        smaller = made if rank < size - 1 else None
    sabotage = plan.sabotage == check.name
    return Lab(group, smaller, rank, size, plan.device, plan.folder, sabotage)


def _run_here(check: Check, lab: Lab) -> Row:
    began = time.perf_counter()
    status: Status = "pass"
    ranks: tuple[int, ...] = ()
    expected = remedy = ""
    try:
        seen = check.run(lab)
    except NotHere as reason:
        status, seen = "skip", str(reason)
    except Mismatch as found:
        status, ranks = "fail", (lab.rank,)
        seen, expected, remedy = found.seen, found.expected, found.remedy
    except Exception as error:
        status, ranks = "fail", (lab.rank,)
        seen, expected, remedy = f"{type(error).__name__}: {error}", check.promise, REPORT
    seconds = time.perf_counter() - began
    return Row(check.name, check.promise, status, seconds, ranks, seen, expected, remedy)


def _together(rows: Sequence[Row]) -> Row:
    """One row for all ranks: failed if any has, and then the first to fail speaks."""
    failed = [row for row in rows if row.status == "fail"]
    # Who waits for a rank that failed fails later, at the group's timeout.
    speaker = min(failed, key=lambda row: row.seconds) if failed else rows[0]
    ranks = tuple(sorted(rank for row in failed for rank in row.ranks))
    return Row(
        speaker.check,
        speaker.promise,
        speaker.status,
        max(row.seconds for row in rows),
        ranks,
        speaker.seen,
        speaker.expected,
        speaker.remedy,
    )
