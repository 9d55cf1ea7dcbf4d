"""Check of what is sent: the plan's bytes, and not one more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.selftest.exactness import FREE
from distmuon.selftest.lab import REPORT, Lab, Mismatch
from distmuon.selftest.meter import Meter
from distmuon.selftest.problem import Problem, own_gradients, wrapped

STEPS = 2


def check_bytes(lab: Lab) -> str:
    """Bytes handed to the process group against the plan's.

    Args:
        lab: The ranks.

    Returns:
        How many per step.

    Raises:
        Mismatch: if a message is longer, shorter, missing or unplanned.
        NotHere: on a single rank.
    """
    lab.require_several("nothing is sent")
    problem = Problem(lab.device, lab.group, reduce="owned", cost_model=FREE)
    with wrapped(problem, lab, "owned") as model:
        _step(problem, lab, model, 0)  # the first step compares set-ups
        agreed = problem.optimizer.report().bytes_sent["agree"]
        with Meter(lab.group) as meter:
            for step in range(1, STEPS + 1):
                _step(problem, lab, model, step)
            if lab.sabotage:
                extra = torch.zeros(lab.world_size, device=lab.device)
                ones = [1] * lab.world_size
                dist.all_to_all_single(extra.clone(), extra, ones, ones, group=lab.group)
    agreed = problem.optimizer.report().bytes_sent["agree"] - agreed
    planned = _planned(problem, lab)
    found = _by_purpose(meter.sent)
    expected = {key: STEPS * value for key, value in planned.items()} | {"agreement": agreed}
    for key in sorted({*found, *expected}):
        if found.get(key, 0) != expected.get(key, 0):
            raise Mismatch(
                expected=f"{expected.get(key, 0):,} bytes of {key} in {STEPS} steps, by the plan",
                seen=f"{found.get(key, 0):,} bytes",
                remedy="Something sends besides the optimizer, or it does not follow its plan. "
                + REPORT,
            )
    per_step = sum(found.values()) // STEPS
    return f"rank {lab.rank} sent {per_step:,} bytes a step, to the byte as planned"


def _step(problem: Problem, lab: Lab, model: torch.nn.Module, step: int) -> None:
    gradients: Mapping[str, Tensor] = own_gradients(lab.rank, step, lab.device)
    model(gradients).backward()
    problem.optimizer.step()


def _planned(problem: Problem, lab: Lab) -> dict[str, int]:
    """Bytes that this rank sends in one step, derived from layouts and plans alone."""
    moved = sum(plan.outgoing_numel + plan.incoming_numel for plan in problem.optimizer.plan)
    reduced = published = 0
    for bucket in problem.optimizer.open():
        layout = bucket.spec.layout
        others = [rank for rank in range(lab.world_size) if rank != lab.rank]
        reduced += sum(s.numel for rank in others for s in layout.segments(rank))
        published += layout.shard_numel * len(others)
    return {"exchange and reduction": 4 * (moved + reduced), "publication": 4 * published}


def _by_purpose(sent: Counter[str]) -> Counter[str]:
    names = {
        "alltoall_base_": "exchange and reduction",
        "send": "publication",
        "_allgather_base_": "publication",
        "allreduce_": "agreement",
    }
    found: Counter[str] = Counter()
    for kind, count in sent.items():
        found[names.get(kind, f"unplanned {kind}")] += count
    return found
