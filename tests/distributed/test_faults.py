"""I7: a rank that dies, comes late or fails gives every other rank one error that says so.

Real processes, really killed: a communicator of the test's own stops its process where it is told.
"""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from distmuon import CostModel, Muon, RankFailure
from distmuon import optimizer as optimizer_module
from distmuon.collectives import Communicator, Pending
from distmuon.failure import Topic
from tests.harness import Ended, run_until_lost

GROUP_TIMEOUT = 4.0
NOTICE = 5.0  # seconds on top of it, in which every rank must have raised
WORLD = 3
DOOMED = 2

# Beside one large matrix the small ones lie far from their owners: two waves in each direction.
MATRICES = {"large": (61, 150)} | {f"small{i}": (20, 30) for i in range(6)}
VECTORS = {"bias": (23,)}
# Messages that cost nothing: balance alone decides, however small the matrices.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)

How = Literal["kill", "sleep", "raise"]
Mode = Literal["ddp", "hook", "owned"]


@dataclass(frozen=True, slots=True)
class Fate:
    """Where the doomed rank stops: before its n-th message of a phase, from 0."""

    phase: str
    number: int
    how: How = "kill"


class DoomedCommunicator(Communicator):
    """Stops this process at a chosen message."""

    fate = Fate("", 0)

    @override
    def exchange(self, send: Tensor, *args: Any, topic: Topic) -> Pending:
        self._meet(topic.phase)
        return super().exchange(send, *args, topic=topic)

    @override
    def publish(self, flat: Tensor, *, topic: Topic) -> Pending:
        self._meet(topic.phase)
        return super().publish(flat, topic=topic)

    @override
    def _all_reduce(self, *args: Any) -> list[float]:
        self._meet(self._topic.phase)
        return super()._all_reduce(*args)

    @override
    def collect(self, value: Any) -> list[Any]:
        self._meet(self._topic.phase)
        return super().collect(value)

    @override
    def gather(self, shard: Tensor, *, to: int) -> Tensor | None:
        self._meet(self._topic.phase)
        return super().gather(shard, to=to)

    def _meet(self, phase: str) -> None:
        if phase != self.fate.phase or self.rank != DOOMED:
            return
        self.met = getattr(self, "met", -1) + 1
        if self.met != self.fate.number:
            return
        if self.fate.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.fate.how == "sleep":
            time.sleep(GROUP_TIMEOUT + 3)
        else:
            raise MemoryError("this rank alone has none left")


class Weighted(nn.Module):
    """A loss whose gradient is one everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {**MATRICES, **VECTORS}
        self.weights = nn.ParameterDict(
            {n: nn.Parameter(torch.randn(s)) for n, s in shapes.items()}
        )

    @override
    def forward(self) -> Tensor:
        return torch.stack([p.sum() for p in self.weights.values()]).sum()


@dataclass(frozen=True, slots=True)
class Told:
    """What a surviving rank learned, and how long after its last completed step."""

    kind: str
    message: str
    seconds: float
    step: int = -1
    phase: str = ""
    wave: int | None = None
    names: tuple[str, ...] = ()
    missing: tuple[int, ...] = ()
    cause: str = ""


def train(mode: Mode, fate: Fate) -> Told:
    """Train until a rank is lost; consolidate after the third step."""
    DoomedCommunicator.fate = fate
    optimizer_module.Communicator = DoomedCommunicator  # type: ignore[misc]
    model = Weighted()
    named = list(model.weights.items())
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in named if n in MATRICES]},
        {"params": [(n, p) for n, p in named if n in VECTORS], "algorithm": "adamw"},
    ]
    began = time.monotonic()
    try:
        optimizer = Muon(
            groups,
            lr=1e-2,
            process_group=dist.group.WORLD,
            reduce=mode,
            wave_bytes=2400,
            cost_model=FREE,
        )
        if fate.phase in ("gather", "scatter"):
            assert len(optimizer.plan[0].waves) == 3
        wrapped: nn.Module = DistributedDataParallel(model) if mode == "hook" else model
        if mode != "ddp":
            optimizer.attach(wrapped)
        for _ in range(3):
            began = time.monotonic()
            optimizer.zero_grad()
            wrapped().backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        began = time.monotonic()
        optimizer.consolidate_state_dict(to=0)
    except RankFailure as error:
        return Told(
            "RankFailure",
            str(error),
            time.monotonic() - began,
            error.step,
            error.phase,
            error.wave,
            error.names,
            error.missing,
            str(error.__cause__),
        )
    except Exception as error:
        return Told(type(error).__name__, str(error), time.monotonic() - began)
    return Told("nothing", "", 0.0)


def lose(mode: Mode, fate: Fate) -> list[Ended]:
    return run_until_lost(
        WORLD, train, mode, fate, group_timeout=GROUP_TIMEOUT, timeout=GROUP_TIMEOUT + 25
    )


def assert_survivors_know(
    outcome: list[Ended], *, step: int, phases: tuple[str, ...], limit: float
) -> None:
    for rank in (0, 1):
        told = outcome[rank].value
        assert outcome[rank].exit_code == 0, f"rank {rank} hung or died"
        assert told.kind == "RankFailure", told.message
        assert told.seconds < limit
        assert (told.step, told.missing) == (step, (DOOMED,))
        assert told.phase in phases
        assert (told.wave is not None) == (told.phase in ("gather", "scatter"))
        assert set(told.names) <= {*MATRICES, *VECTORS}
        for part in (f"Step {step}, {told.phase}", "ranks [2]", *told.names[:3]):
            assert part in told.message
        assert "gloo" in told.cause, "the backend's own error is the cause"
    if step > 1:
        assert any(ended.value.names for ended in outcome[:2]), "one of them has a part in it"


# Each step: one clip, one agree, publish x 2 (AdamW's first), gather and scatter x 3 waves.
KILLED = [
    ("ddp", Fate("agree", 1), 2, ("agree",)),
    ("ddp", Fate("gather", 4), 2, ("gather", "scatter")),
    ("ddp", Fate("scatter", 3), 2, ("gather", "scatter")),
    ("ddp", Fate("publish", 3), 2, ("publish", "scatter")),
    ("owned", Fate("reduce", 1), 2, ("reduce",)),
]
KILLED_TOO = [
    ("hook", Fate("reduce", 1), 2, ("reduce",)),
    ("ddp", Fate("consolidate", 1), 4, ("consolidate",)),
    ("ddp", Fate("setup", 0), 0, ("setup",)),
    ("ddp", Fate("desync", 0), 1, ("desync",)),
    ("ddp", Fate("clip", 1), 2, ("clip",)),
    ("ddp", Fate("publish", 2), 2, ("publish", "gather")),
    ("ddp", Fate("gather", 3), 2, ("gather",)),
    ("ddp", Fate("scatter", 4), 2, ("gather", "scatter")),
    ("ddp", Fate("scatter", 5), 2, ("scatter",)),
]


def _cases(rows: list[Any]) -> list[Any]:
    return [pytest.param(*row, id=f"{row[0]}-{row[1].phase}-{row[1].number}") for row in rows]


@pytest.mark.parametrize(("mode", "fate", "step", "phases"), _cases(KILLED))
def test_i7_a_killed_rank_is_named_by_all_others(
    mode: Mode, fate: Fate, step: int, phases: tuple[str, ...]
) -> None:
    outcome = lose(mode, fate)
    assert outcome[DOOMED] == Ended(None, -signal.SIGKILL)
    # Nobody waits for the timeout: who notices closes its connections, and the others notice.
    assert_survivors_know(outcome, step=step, phases=phases, limit=NOTICE)
    assert all("are gone" in ended.value.message for ended in outcome[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "fate", "step", "phases"), _cases(KILLED_TOO))
def test_i7_a_killed_rank_is_named_wherever_it_dies(
    mode: Mode, fate: Fate, step: int, phases: tuple[str, ...]
) -> None:
    outcome = lose(mode, fate)
    assert_survivors_know(outcome, step=step, phases=phases, limit=NOTICE)


def assert_late(mode: Mode, fate: Fate, step: int, phases: tuple[str, ...]) -> None:
    outcome = lose(mode, Fate(fate.phase, fate.number, "sleep"))
    limit = GROUP_TIMEOUT + NOTICE
    assert_survivors_know(outcome, step=step, phases=phases, limit=limit)
    assert all("did not arrive" in ended.value.message for ended in outcome[:2])
    late = outcome[DOOMED].value
    assert late.kind == "RankFailure"
    assert "gave up on this rank" in late.message
    assert "ranks [0" in late.message, "it is told where the others were"


def test_i7_a_late_rank_is_named_by_the_others_and_told_when_it_comes() -> None:
    assert_late(*KILLED[0])


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "fate", "step", "phases"), _cases(KILLED[1:] + KILLED_TOO[:2]))
def test_i7_a_late_rank_is_named_wherever_it_sleeps(
    mode: Mode, fate: Fate, step: int, phases: tuple[str, ...]
) -> None:
    assert_late(mode, fate, step, phases)


def test_i7_an_error_in_the_middle_of_a_step_is_told_to_the_others_at_once() -> None:
    outcome = lose("ddp", Fate("gather", 4, "raise"))
    assert outcome[DOOMED].value.kind == "MemoryError", "a rank raises its own error"
    for ended in outcome[:2]:
        told = ended.value
        assert told.kind == "RankFailure"
        assert "ranks [2] stopped with an error: MemoryError: this rank alone" in told.message
        assert told.missing == (DOOMED,)
        assert told.seconds < 1.5, "neither the timeout nor the roll call is waited for"


def fail_in_newton_schulz() -> Told:
    """The owner of one matrix, and nobody else, fails at it in the second step."""
    model = Weighted()
    steps = 0

    def scale(rows: int, cols: int) -> float:
        if (rows, cols) == MATRICES["large"] and steps == 1:
            raise torch.OutOfMemoryError("no room")
        return 1.0

    named = [(n, p) for n, p in model.weights.items() if n in MATRICES]
    optimizer = Muon(named, process_group=dist.group.WORLD, adjust_lr_fn=scale)
    began = time.monotonic()
    try:
        for steps in range(2):  # noqa: B007 - `scale` reads it
            for _, parameter in named:
                parameter.grad = torch.ones_like(parameter)
            began = time.monotonic()
            optimizer.step()
    except Exception as error:
        notes = " ".join(getattr(error, "__notes__", []))
        return Told(type(error).__name__, f"{error} {notes}", time.monotonic() - began)
    return Told("nothing", "", 0.0)


def test_i7_an_error_in_newton_schulz_names_the_matrix_on_every_rank() -> None:
    outcome = run_until_lost(WORLD, fail_in_newton_schulz, group_timeout=GROUP_TIMEOUT)
    kinds = sorted(ended.value.kind for ended in outcome)
    assert kinds == ["OutOfMemoryError", "RankFailure", "RankFailure"]
    for ended in outcome:
        assert "no room" in ended.value.message
        assert "while orthogonalizing large [61, 150]" in ended.value.message
        assert ended.value.seconds < 1.5


def differ(what: Literal["shape", "nan"]) -> Told:
    shapes = dict(MATRICES)
    if what == "shape" and dist.get_rank() == DOOMED:
        shapes["large"] = (61, 151)
    named = [(n, nn.Parameter(torch.ones(shape))) for n, shape in shapes.items()]
    optimizer = Muon(named, process_group=dist.group.WORLD, nonfinite="skip")
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
        if what == "nan":
            parameter.grad[0, 0] = float("nan")
    began = time.monotonic()
    try:
        optimizer.step()
    except RuntimeError as error:
        return Told(type(error).__name__, str(error), time.monotonic() - began)
    return Told(f"skipped {optimizer.report().skipped}", "", time.monotonic() - began)


@pytest.mark.parametrize(("what", "kind"), [("shape", "RuntimeError"), ("nan", "skipped 1")])
def test_i7_other_shapes_and_nans_need_no_timeout(what: str, kind: str) -> None:
    outcome = run_until_lost(WORLD, differ, what, group_timeout=GROUP_TIMEOUT)
    assert [ended.value.kind for ended in outcome] == [kind] * WORLD
    assert all(ended.value.seconds < GROUP_TIMEOUT for ended in outcome)


def wait_apart() -> Told:
    """No rank is dead, but one is in another collective than the others."""
    named = [(n, nn.Parameter(torch.ones(shape))) for n, shape in MATRICES.items()]
    optimizer = Muon(named, process_group=dist.group.WORLD)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    began = time.monotonic()
    try:
        if dist.get_rank() == DOOMED:
            optimizer.consolidate_state_dict(to=DOOMED)
        else:
            optimizer.step()
    except RankFailure as error:
        return Told("RankFailure", str(error), time.monotonic() - began)
    return Told("nothing", "", 0.0)


def test_i7_ranks_in_different_collectives_are_told_where_each_of_them_is() -> None:
    outcome = run_until_lost(WORLD, wait_apart, group_timeout=2.0)
    for ended in outcome:
        message = ended.value.message
        assert "no rank is missing" in message
        assert "ranks [0, 1] in step 2, agree" in message
        assert "ranks [2] in step 2, consolidate" in message
        assert ended.value.seconds < 2.0 + NOTICE
