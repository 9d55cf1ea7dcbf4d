"""Where a step's time goes: only when asked, and each second once."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from distmuon import Muon
from distmuon.phases import CudaClock, HostClock, PhaseClock, make_clock


def test_inner_phases_are_not_counted_in_outer_ones() -> None:
    clock = HostClock()
    began = time.perf_counter()
    with clock("outer"):
        time.sleep(0.02)
        with clock("inner"):
            time.sleep(0.05)
        time.sleep(0.01)
    total = time.perf_counter() - began
    seconds = clock.seconds()
    assert 0.05 <= seconds["inner"]
    assert 0.03 <= seconds["outer"]
    assert sum(seconds.values()) == pytest.approx(total, abs=2e-3)


def test_a_phase_that_raises_ends() -> None:
    clock = HostClock()
    with pytest.raises(ValueError, match="x"), clock("broken"):
        raise ValueError("x")
    time.sleep(0.02)
    with clock("next"):
        pass
    assert clock.seconds()["broken"] < 0.01


def _report(profile: Any) -> Any:
    matrices = [("w", nn.Parameter(torch.ones(64, 64))), ("v", nn.Parameter(torch.ones(32, 64)))]
    bias = [("b", nn.Parameter(torch.ones(64)))]
    groups = [{"params": matrices}, {"params": bias, "algorithm": "adamw"}]
    optimizer = Muon(groups, profile=profile)
    for _ in range(2):
        for _, parameter in matrices + bias:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return optimizer.report()


def test_the_report_has_phases_only_when_asked() -> None:
    assert _report("off").seconds == {}
    seconds = _report("phases").seconds
    assert {"read", "agree", "momentum", "newton-schulz", "apply", "adamw"} <= set(seconds)
    assert all(value > 0 for value in seconds.values())
    with pytest.raises(ValueError, match="Invalid profile='yes'"):
        _report("yes")


def test_off_is_one_shared_object_and_no_clock() -> None:
    clock = make_clock("off", torch.device("cpu"))
    assert type(clock) is PhaseClock
    assert clock("a") is clock("b")


@pytest.mark.gpu
def test_on_cuda_events_time_the_stream() -> None:
    clock = make_clock("phases", torch.device("cuda"))
    assert isinstance(clock, CudaClock)
    x = torch.randn(4096, 4096, device="cuda")
    with clock("outer"):
        for _ in range(3):
            with clock("product"):
                x @ x
    assert clock.seconds()["product"] > 0
