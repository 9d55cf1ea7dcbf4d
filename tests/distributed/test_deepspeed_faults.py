"""A rank that dies or fails inside a DeepSpeed engine: all others raise, and nobody hangs."""

from __future__ import annotations

import importlib.util
import os
import signal
import time

import pytest
import torch.distributed as dist

from distmuon import RankFailure
from distmuon.adapters.deepspeed import optimizer as zero_module
from tests.distributed.deepspeed_ranks import Case, deepspeed_world, start, train
from tests.distributed.test_faults import (
    DOOMED,
    GROUP_TIMEOUT,
    NOTICE,
    WORLD,
    DoomedCommunicator,
    Fate,
    How,
    Told,
)
from tests.harness import Ended, run_until_lost

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)

# Each step: agree once for each of three groups, after once for all of them at the start.
MEETINGS = {"agree": Fate("agree", 4), "gather": Fate("gather", 1), "scatter": Fate("scatter", 1)}
BEFORE_BACKWARD = Fate("backward", 1)


def train_until_lost(fate: Fate) -> Told:
    """Three steps, the second of which one rank does not survive."""
    DoomedCommunicator.fate = fate
    zero_module.Communicator = DoomedCommunicator  # type: ignore[misc]
    with deepspeed_world():
        case = Case(1)
        engine = start(case)
        began = time.monotonic()
        try:
            for step in range(3):
                began = time.monotonic()
                if (fate.phase, step, dist.get_rank()) == ("backward", fate.number, DOOMED):
                    os.kill(os.getpid(), signal.SIGKILL)
                train(engine, case, [step])
        except RankFailure as error:
            seconds = time.monotonic() - began
            told = Told("RankFailure", str(error), seconds, error.step, error.phase)
        except Exception as error:
            told = Told(type(error).__name__, str(error), time.monotonic() - began)
        else:
            told = Told("nothing", "", 0.0)
        # DeepSpeed's own threads and groups would wait for the dead.
        return told


def lose(fate: Fate) -> list[Ended]:
    return run_until_lost(WORLD, train_until_lost, fate, group_timeout=GROUP_TIMEOUT, timeout=60.0)


SLOW = [pytest.param(phase, marks=pytest.mark.slow) for phase in ("agree", "scatter")]


@pytest.mark.parametrize("phase", ["gather", *SLOW])  # one is quick enough for every day
def test_a_killed_rank_is_named_by_all_others(phase: str) -> None:
    outcome = lose(MEETINGS[phase])
    assert outcome[DOOMED] == Ended(None, -signal.SIGKILL)
    for ended in outcome[:2]:
        assert (ended.value.kind, ended.value.step) == ("RankFailure", 2), ended.value
        assert "ranks [2] are gone" in ended.value.message
        assert ended.value.seconds < NOTICE


def test_an_error_in_the_middle_of_a_step_is_told_to_the_others_at_once() -> None:
    how: How = "raise"
    outcome = lose(Fate("gather", 1, how))
    assert outcome[DOOMED].value.kind == "MemoryError"
    for ended in outcome[:2]:
        assert ended.value.kind == "RankFailure", ended.value
        assert "ranks [2] stopped with an error: MemoryError" in ended.value.message
        assert ended.value.seconds < NOTICE


def test_a_rank_killed_outside_of_this_package_stops_the_others_too() -> None:
    """In DeepSpeed's own collectives it is DeepSpeed, or gloo, that raises."""
    outcome = lose(BEFORE_BACKWARD)
    assert outcome[DOOMED] == Ended(None, -signal.SIGKILL)
    for ended in outcome[:2]:
        assert ended.exit_code == 0, "it hung"
        assert ended.value.kind != "nothing"
        assert ended.value.seconds < GROUP_TIMEOUT + NOTICE
