"""docs/one-gradient.md, held against a traced step: the order, the count, and no call back up."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distmuon
from distmuon import Muon
from tests.harness import run_ranks
from tests.unit.test_house_rules import KNOWN_ROOMS

PACKAGE = Path(distmuon.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "one-gradient.md"
ROW = re.compile(r"^\| \d+ \| `([\w/.]+)` `([\w.]+)` \|", re.MULTILINE)

# Decorators hand on a call that somebody above has made, as frames outside the package do.
PASSED_ON = ("capture", "")
Call = tuple[str, str, str, str]  # room and function of the caller, room and function called


def _place(frame: FrameType) -> tuple[str, str] | None:
    path = Path(frame.f_code.co_filename)
    if not path.is_relative_to(PACKAGE):
        return None
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return room, frame.f_code.co_qualname


def trace(reduce: Literal["ddp", "hook", "owned"]) -> list[Call]:
    """Every call into the package during the second step, with the caller in the package."""
    torch.manual_seed(0)
    # The second rank's border cuts a matrix, so that pieces travel.
    model = nn.Sequential(*(nn.Linear(16, 3 * n, bias=False) for n in (7, 5, 3)))
    named = list(model.named_parameters())
    optimizer = Muon(named, process_group=dist.group.WORLD, reduce=reduce)
    wrapped: nn.Module = DistributedDataParallel(_Sum(model)) if reduce == "hook" else _Sum(model)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    wrapped().backward()
    optimizer.step()
    calls: list[Call] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        place = _place(frame) if event == "call" else None
        above = frame.f_back
        while above is not None and (_place(above) or PASSED_ON)[0] == PASSED_ON[0]:
            above = above.f_back
        if place is not None:
            caller = ("", "") if above is None else _place(above) or ("", "")
            calls.append((*caller, *place))

    wrapped().backward()
    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert any(plan.waves for plan in optimizer.plan), "pieces travel"
    return calls


class _Sum(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> torch.Tensor:
        return torch.stack([p.sum() for p in self.inner.parameters()]).sum()


def test_the_page_tells_the_order_of_a_real_step() -> None:
    rows = [
        (room.rstrip("/").removesuffix(".py"), name) for room, name in ROW.findall(PAGE.read_text())
    ]
    assert 1 <= len(rows) <= 8
    assert len({room for room, _ in rows}) <= 5
    for calls in run_ranks(2, trace, "ddp"):
        seen: list[tuple[str, str]] = []
        for _, _, room, name in calls:
            if (room, name) in rows and (room, name) not in seen:
                seen.append((room, name))
        assert seen == rows
        # Nothing else of these files is called from outside but what the page says only looks.
        entered = {(r, n) for caller, _, r, n in calls if r != caller and caller}
        rooms = {room for room, _ in rows}
        others = {n for r, n in entered if r in rooms} - {name for _, name in rows}
        assert others <= {
            "Shard.adopt",
            "Range.begin_step",
            "Shard.begin_step",
            "Shard.finish_step",
            "Range.first_nonfinite",
            "adjust_lr_factor",
            "check_splits",
            "count_flops",
            "overflow",
            "shape_factor",
            "stack_numel",
        }


@pytest.mark.parametrize("reduce", ["ddp", "hook", "owned"])
def test_no_call_goes_back_up(reduce: Literal["ddp", "hook", "owned"]) -> None:
    for calls in run_ranks(2, trace, reduce):
        assert len(calls) > 30
        up = {call for call in calls if call[0] and KNOWN_ROOMS[call[0]] < KNOWN_ROOMS[call[2]]}
        assert not up
