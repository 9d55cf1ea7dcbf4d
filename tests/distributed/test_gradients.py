"""Who averages the gradients: DDP, our DDP hook, or our own hooks. On real gloo ranks."""

import time
import warnings
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import Muon, Report, build_param_groups
from distmuon import gradients as gradients_module
from tests.harness import run_ranks

Reduce = Literal["ddp", "hook", "owned"]
MODES: tuple[Reduce, ...] = ("ddp", "hook", "owned")
SHAPES = {"wide": (23, 50), "row": (1, 37), "experts": (3, 11, 6), "bias": (19,), "table": (7, 5)}
ADAMW = ("bias", "table")


class Weighted(nn.Module):
    """A loss whose gradient of each parameter is exactly the tensor it is called with."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
                for name, shape in SHAPES.items()
            }
        )

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        terms = [(self.weights[name] * g).sum() for name, g in gradients.items()]
        return torch.stack(terms).sum()


def make(
    reduce: Reduce,
    process_group: Any,
    *,
    attach: Literal["yes", "no"] = "yes",
    unused: Literal["some", "none"] = "none",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Weighted, nn.Module, Muon]:
    model = Weighted(dtype)
    named = dict(model.weights.items())
    groups = [
        {"params": [(n, p) for n, p in named.items() if n not in ADAMW]},
        {"params": [(n, named[n]) for n in ADAMW], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=1e-2, process_group=process_group, reduce=reduce, **options)
    wrapped: nn.Module = model
    if process_group is not None and reduce != "owned":
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused == "some")
    if process_group is not None and reduce != "ddp" and attach == "yes":
        optimizer.attach(wrapped)
    return model, wrapped, optimizer


def gradients(step: int, rank: int, world_size: int) -> dict[str, Tensor]:
    """Integers whose mean over the ranks is the same for every world size, and exact.

    Multiples of 3, because DDP divides before it sums.
    """
    generator = torch.Generator().manual_seed(step)
    offset = 2 * rank - (world_size - 1)  # sums to 0
    return {
        name: 3.0 * (torch.randint(-8, 9, shape, generator=generator) + offset)
        for name, shape in SHAPES.items()
    }


def weights(model: Weighted) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.weights.items()}


def train(
    reduce: Reduce, process_group: Any, rank: int, world_size: int, **options: Any
) -> tuple[Any, Report]:
    model, wrapped, optimizer = make(reduce, process_group, **options)
    for step in range(5):
        optimizer.zero_grad()
        wrapped(gradients(step, rank, world_size)).backward()
        optimizer.step()
    return weights(model), optimizer.report()


def train_on_rank(reduce: Reduce) -> tuple[Any, Report]:
    return train(reduce, dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def assert_same_bits(results: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> None:
    for rank, result in enumerate(results):
        for name, expected in reference.items():
            assert torch.equal(result[name], expected), f"{name} differs on rank {rank}"


@pytest.mark.parametrize("reduce", MODES)
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_i1_every_mode_gives_the_bits_of_one_process(reduce: Reduce, world_size: int) -> None:
    reference, _ = train("ddp", None, 0, 1)
    outcome = run_ranks(world_size, train_on_rank, reduce)
    assert_same_bits([result for result, _ in outcome], reference)


def train_aligned(reduce: Reduce) -> tuple[Any, Report]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return train(reduce, dist.group.WORLD, rank, world_size, layout="aligned")


@pytest.mark.parametrize("reduce", MODES)
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_i1_aligned_matrices_give_the_bits_of_one_process(reduce: Reduce, world_size: int) -> None:
    reference, _ = train("ddp", None, 0, 1)
    outcome = run_ranks(world_size, train_aligned, reduce)
    if reduce == "ddp" and world_size == 7:
        # DDP divides by 7 before it sums, which is not exact for multiples of 3.
        for result, _ in outcome:
            for name, expected in reference.items():
                torch.testing.assert_close(result[name], expected, rtol=1e-4, atol=1e-5)
    else:
        assert_same_bits([result for result, _ in outcome], reference)
    for _, report in outcome:
        assert "gather" not in report.bytes_sent, "nothing moves"
        assert "scatter" not in report.bytes_sent


@pytest.mark.parametrize("reduce", ["hook", "owned"])
def test_i2_reduced_bytes_are_each_ranks_own_part(reduce: Reduce) -> None:
    world_size = 3
    total = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    outcome = run_ranks(world_size, train_on_rank, reduce)
    sent = [report.bytes_sent["reduce"] for _, report in outcome]
    # Every element leaves every rank but its holder's: (N-1)P in all, 5 steps of fp32.
    assert sum(sent) == 5 * 4 * total * (world_size - 1)


def accumulate(reduce: Reduce, passes: int) -> dict[str, Tensor]:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    model, wrapped, optimizer = make(reduce, dist.group.WORLD)
    each = 8 // (world_size * passes)
    for step in range(3):
        samples = [gradients(100 * step + i, 0, 1) for i in range(8)]
        mine = samples[rank * each * passes :][: each * passes]
        optimizer.zero_grad()
        for number in range(passes):
            part = mine[number * each :][:each]
            mean = {n: torch.stack([g[n] for g in part]).mean(0) / passes for n in SHAPES}
            context: AbstractContextManager[Any] = nullcontext()
            if number < passes - 1:
                owner = optimizer if reduce == "owned" else cast(Any, wrapped)
                context = owner.no_sync()
            with context:
                wrapped(mean).backward()
        optimizer.step()
    return weights(model)


@pytest.mark.parametrize("reduce", MODES)
def test_accumulation_does_not_change_the_result(reduce: Reduce) -> None:
    one_by_eight = run_ranks(1, accumulate, reduce, 8)[0]
    for world_size, passes in ((2, 1), (2, 4), (4, 2)):
        for result in run_ranks(world_size, accumulate, reduce, passes):
            for name, expected in one_by_eight.items():
                torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6)


def clipped(reduce: Reduce, process_group: Any, rank: int, world_size: int) -> list[Any]:
    model, wrapped, optimizer = make(reduce, process_group)
    norms = []
    for step in range(3):
        optimizer.zero_grad()
        wrapped(gradients(step, rank, world_size)).backward()
        norms.append(float(optimizer.clip_grad_norm_(120.0)))
        optimizer.step()
    return [norms, optimizer.report().gradient_norms, weights(model)]


def clipped_on_rank(reduce: Reduce) -> list[Any]:
    return clipped(reduce, dist.group.WORLD, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("reduce", MODES)
def test_clipping_is_by_the_norm_of_the_averaged_gradient(reduce: Reduce) -> None:
    model, wrapped, optimizer = make("ddp", None)
    expected = []
    for step in range(3):
        optimizer.zero_grad()
        wrapped(gradients(step, 0, 1)).backward()
        expected.append(float(nn.utils.clip_grad_norm_(model.parameters(), 120.0)))
        optimizer.step()
    last = gradients(2, 0, 1)
    adamw = torch.cat([last[n].flatten() for n in ADAMW]).norm().item()
    for norms, report, result in run_ranks(3, clipped_on_rank, reduce):
        assert norms == pytest.approx(expected, rel=1e-6)
        assert min(norms) > 120.0, "every step was clipped"
        assert report.total == pytest.approx(expected[-1], rel=1e-6)
        assert report.adamw == pytest.approx(adamw, rel=1e-6)
        assert report.muon**2 + report.adamw**2 == pytest.approx(report.total**2)
        for name, value in weights(model).items():
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6)


def overflow(reduce: Reduce) -> tuple[bool, list[int], str]:
    """Rank 1 overflows in steps 1 to 3; two skips in a row are allowed."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, wrapped, optimizer = make(reduce, dist.group.WORLD, nonfinite="skip", max_skips=2)
    unchanged, skipped, message = True, [], ""
    for step in range(4):
        given = gradients(step, rank, world_size)
        if step and rank == 1:
            given["wide"][22, 49] = float("inf")
        before = weights(model)
        state = [t.clone() for t in _state(optimizer)]
        optimizer.zero_grad()
        wrapped(given).backward()
        try:
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
        except FloatingPointError as error:
            message = str(error)
        if step:
            after = weights(model)
            unchanged &= all(torch.equal(before[name], after[name]) for name in before)
            unchanged &= all(
                torch.equal(a, b) for a, b in zip(state, _state(optimizer), strict=True)
            )
        skipped.append(optimizer.report().skipped)
    return unchanged, skipped, message


def _state(optimizer: Muon) -> list[Tensor]:
    engine = optimizer._engine
    return [t for b in engine.buckets for t in b.shard.state.values()] if engine else []


@pytest.mark.parametrize("reduce", MODES)
def test_i5_an_overflow_on_one_rank_skips_the_step_on_all(reduce: Reduce) -> None:
    outcome = run_ranks(3, overflow, reduce)
    assert len({message for _, _, message in outcome}) == 1
    for unchanged, skipped, message in outcome:
        assert unchanged, "a skipped step leaves parameters and state bit-identical"
        assert skipped == [0, 1, 2, 2]
        assert "gradient of wide" in message
        assert "2 steps in a row" in message


def unused(reduce: Reduce, policy: Literal["raise", "zero"]) -> tuple[Any, str]:
    """Nobody uses `row`; rank 0 does not use `experts`."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, wrapped, optimizer = make(reduce, dist.group.WORLD, unused="some", missing_grad=policy)
    before = weights(model)
    given = gradients(0, rank, world_size)
    del given["row"]
    if rank == 0:
        del given["experts"]
    wrapped(given).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return torch.equal(before["row"], model.weights["row"]), str(error)
    still = torch.equal(before["row"], model.weights["row"])
    moved = not torch.equal(before["experts"], model.weights["experts"])
    return still and moved, ""


@pytest.mark.parametrize(
    ("reduce", "policy", "message"),
    [
        ("ddp", "raise", ""),  # DDP itself fills in zeros for a parameter that others use
        ("hook", "raise", ""),
        ("owned", "zero", ""),
        ("owned", "raise", "experts has a gradient on some ranks but not on ranks [0]"),
    ],
)
def test_i7_parameters_that_some_or_no_ranks_used(
    reduce: Reduce, policy: Literal["raise", "zero"], message: str
) -> None:
    for as_expected, error in run_ranks(3, unused, reduce, policy):
        assert as_expected
        assert message in error
        assert bool(message) == bool(error)


def _step_after_no_sync(given: dict[str, Tensor], *, first: Literal["synced", "none"]) -> None:
    _, wrapped, optimizer = make("hook", dist.group.WORLD)
    if first == "synced":
        wrapped(given).backward()
    with cast(Any, wrapped).no_sync():
        wrapped(given).backward()
    optimizer.step()


def misuse(case: str) -> str:
    group = dist.group.WORLD
    given = gradients(0, dist.get_rank(), dist.get_world_size())
    try:
        if case == "hook without ddp":
            make("hook", group, attach="no")[2].attach(Weighted())
        elif case == "owned with ddp":
            model, _, optimizer = make("owned", group, attach="no")
            optimizer.attach(DistributedDataParallel(model))
        elif case == "ddp attached":
            make("ddp", group)[2].attach(Weighted())
        elif case == "attached twice":
            _, wrapped, optimizer = make("hook", group)
            optimizer.attach(wrapped)
        elif case == "not attached":
            _, wrapped, optimizer = make("hook", group, attach="no")
            wrapped(given).backward()
            optimizer.step()
        elif case in ("all under no_sync", "no_sync last"):
            _step_after_no_sync(given, first="synced" if case == "no_sync last" else "none")
        elif case == "second backward":
            _, wrapped, optimizer = make("owned", group)
            wrapped(given).backward()
            wrapped(given).backward()
        elif case == "another model":
            make("owned", group, attach="no")[2].attach(Weighted())
        else:
            make("hook", group, missing_grad="zero")
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("hook without ddp", 'TypeError: reduce="hook" is for DistributedDataParallel'),
        ("owned with ddp", 'TypeError: reduce="owned" replaces DistributedDataParallel'),
        ("ddp attached", "ValueError"),
        ("attached twice", "RuntimeError: A model is attached already"),
        ("not attached", 'RuntimeError: reduce="hook" averages the gradients itself: call'),
        ("all under no_sync", "RuntimeError: The gradient of"),
        ("no_sync last", "RuntimeError: The gradient of"),
        ("second backward", "RuntimeError: A parameter got a second gradient"),
        ("another model", "is trainable but not in the optimizer"),
        ("missing_grad", 'ValueError: missing_grad="zero" needs reduce="owned"'),
    ],
)
def test_misuse_is_refused_on_every_rank(case: str, message: str) -> None:
    for said in run_ranks(2, misuse, case):
        assert message in said


def train_transformer(reduce: Reduce) -> tuple[list[Tensor], int]:
    """Rank-dependent weights and data; owned broadcasts, DDP does so itself."""
    torch.manual_seed(dist.get_rank() if reduce == "owned" else 0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, bias=False)
    model = nn.Sequential(layer, nn.Linear(16, 4))
    optimizer = Muon(
        build_param_groups(model), lr=1e-2, process_group=dist.group.WORLD, reduce=reduce
    )
    model.to(torch.float64).to(torch.float32)  # new storage after construction
    wrapped = model if reduce == "owned" else DistributedDataParallel(model)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    generator = torch.Generator().manual_seed(dist.get_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        for _ in range(3):
            x = torch.randn(4, 5, 16, generator=generator)
            optimizer.zero_grad()
            wrapped(x).square().mean().backward()
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()], optimizer.report().newton_schulz_calls


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_real_model_trains_alike_in_all_modes(world_size: int) -> None:
    results = {reduce: run_ranks(world_size, train_transformer, reduce) for reduce in MODES}
    for reduce in MODES:
        for parameters, _ in results[reduce]:
            for mine, first in zip(parameters, results[reduce][0][0], strict=True):
                assert torch.equal(mine, first), "all ranks agree"
            for mine, ddp in zip(parameters, results["ddp"][0][0], strict=True):
                torch.testing.assert_close(mine, ddp, rtol=1e-3, atol=1e-4)
    assert sum(calls for _, calls in results["hook"]) > 0


# --- regressions, each found by trying to break it ----------------------------------------------


def train_in_small_sets(dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    gradients_module.BUCKET_BYTES = 100
    model, wrapped, optimizer = make("owned", dist.group.WORLD, dtype=dtype)
    for step in range(5):
        optimizer.zero_grad()
        given = gradients(step, dist.get_rank(), dist.get_world_size())
        wrapped({name: g.to(dtype) for name, g in given.items()}).backward()
        optimizer.step()
    source: Any = optimizer._engine.source if optimizer._engine else None
    return weights(model), len(source._sets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_owned_sends_many_sets_in_one_order(dtype: torch.dtype) -> None:
    model, wrapped, optimizer = make("ddp", None, dtype=dtype)
    for step in range(5):
        optimizer.zero_grad()
        wrapped({name: g.to(dtype) for name, g in gradients(step, 0, 1).items()}).backward()
        optimizer.step()
    outcome = run_ranks(3, train_in_small_sets, dtype)
    assert_same_bits([result for result, _ in outcome], weights(model))
    assert all(sets >= 4 for _, sets in outcome)


def part_of_a_step(policy: Literal["raise", "zero"], then: Literal["reduce", "skip"]) -> str:
    """Rank 0 leaves a parameter out; then comes a collective of the user's, or no step at all."""
    gradients_module.BUCKET_BYTES = 100
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model, wrapped, optimizer = make("owned", dist.group.WORLD, missing_grad=policy)
    given = gradients(0, rank, world_size)
    if rank == 0:
        del given["experts"]
    loss = wrapped(given)
    loss.backward()
    if then == "reduce":
        dist.all_reduce(loss.detach())
    else:
        optimizer.zero_grad()
        wrapped(gradients(1, rank, world_size)).backward()
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return f"{float(model.weights['experts'].norm()):.4f}"


@pytest.mark.parametrize("policy", ["raise", "zero"])
@pytest.mark.parametrize("then", ["reduce", "skip"])
def test_owned_does_not_hang_where_ranks_used_other_parameters(
    policy: Literal["raise", "zero"], then: Literal["reduce", "skip"]
) -> None:
    said = run_ranks(2, part_of_a_step, policy, then, timeout=30)
    assert said[0] == said[1]
    refused = policy == "raise" and then == "reduce"
    assert ("experts has a gradient on some ranks but not on ranks [0]" in said[0]) == refused


def train_in_a_pair(reduce: Reduce) -> tuple[dict[str, Tensor], bool]:
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    group = pairs[dist.get_rank() % 2]
    model = Weighted()
    named = dict(model.weights.items())
    groups = [
        {"params": [(n, p) for n, p in named.items() if n not in ADAMW]},
        {"params": [(n, named[n]) for n in ADAMW], "algorithm": "adamw"},
    ]
    optimizer = Muon(groups, lr=1e-2, process_group=group, reduce=reduce)
    wrapped: nn.Module = model
    if reduce != "owned":
        wrapped = DistributedDataParallel(model, process_group=group)
    if reduce != "ddp":
        optimizer.attach(wrapped)
    for step in range(5):
        optimizer.zero_grad()
        wrapped(gradients(step, dist.get_rank(group), 2)).backward()
        optimizer.step()
    optimizer.consolidate_state_dict(to=1)
    whole = dist.get_rank(group) == 1 and bool(optimizer.state_dict()["state"])
    return weights(model), whole


@pytest.mark.parametrize("reduce", MODES)
def test_disjoint_groups_of_ranks_train_apart(reduce: Reduce) -> None:
    reference, _ = train("ddp", None, 0, 1)
    outcome = run_ranks(4, train_in_a_pair, reduce)
    assert_same_bits([result for result, _ in outcome], reference)
    assert [whole for _, whole in outcome] == [False, False, True, True]


def skip_good_skip() -> list[int]:
    _, wrapped, optimizer = make("hook", dist.group.WORLD, nonfinite="skip", max_skips=1)
    counts = []
    for step in range(4):
        given = gradients(step, dist.get_rank(), dist.get_world_size())
        if step % 2 and dist.get_rank() == 0:
            given["row"][0, 0] = float("nan")
        optimizer.zero_grad()
        wrapped(given).backward()
        optimizer.step()
        counts.append(optimizer.report().skipped)
    return counts


def test_a_good_step_forgives_the_skips_before_it() -> None:
    assert run_ranks(2, skip_good_skip) == [[0, 1, 1, 2]] * 2


def buffers_after_attach() -> list[list[float]]:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    shapes = torch.arange(6.0).view(2, 3).t() + dist.get_rank()
    model.register_buffer("turned", shapes)
    model.register_buffer("short", torch.tensor(dist.get_rank(), dtype=torch.int16))
    optimizer = Muon(list(model.named_parameters()), process_group=dist.group.WORLD, reduce="owned")
    optimizer.attach(model)
    return [model.turned.flatten().tolist(), [float(model.short)]]


def test_owned_gives_all_ranks_the_buffers_of_the_first() -> None:
    first, second = run_ranks(2, buffers_after_attach)
    assert first == second == [[0.0, 3.0, 1.0, 4.0, 2.0, 5.0], [0.0]]


def attach_again() -> tuple[str, int]:
    model, _, optimizer = make("owned", dist.group.WORLD, attach="no")
    message = ""
    try:
        optimizer.attach(DistributedDataParallel(model))
    except TypeError as error:
        message = str(error)
    optimizer.attach(model)  # the right call after the wrong one
    del optimizer
    successor = Muon(
        [(n, p) for n, p in model.weights.items() if p.dim() > 1],
        process_group=dist.group.WORLD,
        reduce="owned",
    )
    model.weights["bias"].requires_grad_(False)
    successor.attach(model)
    given = gradients(0, dist.get_rank(), dist.get_world_size())
    model(given).backward()
    successor.step()
    return message, successor.report().newton_schulz_calls


def test_a_model_can_be_attached_again() -> None:
    outcome = run_ranks(2, attach_again)
    assert all("replaces DistributedDataParallel" in message for message, _ in outcome)
    assert sum(calls for _, calls in outcome) == 6, "three matrices and a stack of three"


def without_steps() -> int:
    model, wrapped, optimizer = make("hook", dist.group.WORLD)
    for step in range(8):
        model.zero_grad()
        wrapped(gradients(step, dist.get_rank(), dist.get_world_size())).backward()
    source: Any = optimizer._engine.source if optimizer._engine else None
    return len(source._reducer._flying)


def test_backward_passes_without_steps_do_not_pile_up() -> None:
    assert all(count <= 2 for count in run_ranks(2, without_steps))


def copies_held_while_others_are_sent() -> int:
    model, _, optimizer = make("owned", dist.group.WORLD)
    source: Any = optimizer._engine.source if optimizer._engine else None
    reducer = source._reducer
    *others, last = model.weights.values()
    sent = []
    for parameter in others:
        reducer.start([(parameter, torch.ones_like(parameter))])
        _, pending = list(reducer._flying.values())[-1]
        sent.append(weakref.ref(pending._keep))
        deadline = time.monotonic() + 20
        while not pending._works[0].is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
    reducer.start([(last, torch.ones_like(last))])
    held = sum(copy() is not None for copy in sent)
    reducer.drop()
    return held


def test_copies_of_gradients_do_not_pile_up_until_the_step() -> None:
    assert run_ranks(2, copies_held_while_others_are_sent) == [0, 0]


def step_again() -> None:
    _, wrapped, optimizer = make("hook", dist.group.WORLD)
    wrapped(gradients(0, dist.get_rank(), dist.get_world_size())).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"was not reduced .* came before the last step"):
        optimizer.step()


def test_i4_hook_does_not_take_a_gradient_that_was_not_sent_for_zeros() -> None:
    run_ranks(2, step_again)


def send_in_a_graph(reduce: Reduce) -> None:
    _, wrapped, _ = make(reduce, dist.group.WORLD)
    # What a GPU would say during a capture.
    torch.cuda.is_initialized = lambda: True
    torch.cuda.is_current_stream_capturing = lambda: True
    with pytest.raises(RuntimeError, match=r"Gradients were to be sent .*graph-capture"):
        wrapped(gradients(0, dist.get_rank(), dist.get_world_size())).backward()


@pytest.mark.parametrize("reduce", ["hook", "owned"])
def test_gradients_are_not_sent_in_a_captured_graph(reduce: Reduce) -> None:
    run_ranks(2, send_in_a_graph, reduce)
