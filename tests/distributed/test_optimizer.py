"""The sharded optimizer on real gloo ranks, against the same optimizer in one process."""

from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import CostModel, Muon, Report
from distmuon.cost import newton_schulz_cost
from distmuon.plan import ExchangePlan
from tests.harness import run_ranks

WORLDS = [1, 2, 3, 4, 7]
# "wide" is so large that its flat range reaches into every rank's shard, for every world size.
RAGGED = {
    "wide": (61, 150),
    "row": (1, 37),
    "column": (29, 1),
    "experts": (3, 11, 6),
    "square": (17, 17),
    "tall": (40, 9),
    "tiny": (2, 2),
}
MATRICES = len(RAGGED) + 2  # the stack is three
OTHERS = {"bias": (23,), "table": (19, 5), "scale": (1,)}
TWO_MATRICES = {"first": (12, 20), "second": (9, 4)}


def build(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    process_group: Any,
    **options: Any,
) -> tuple[dict[str, nn.Parameter], Muon]:
    generator = torch.Generator().manual_seed(3)
    model = {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in {**shapes, **OTHERS}.items()
    }
    matrices = [(name, model[name]) for name in shapes]
    half = len(matrices) // 2
    groups = [
        {"params": matrices[:half]},
        {"params": matrices[half:], "lr": 5e-3, "nesterov": False, "weight_decay": 0.0},
        {"params": [(name, model[name]) for name in OTHERS], "algorithm": "adamw"},
    ]
    return model, Muon(groups, lr=2e-2, process_group=process_group, **options)


def train(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    process_group: Any,
    steps: int = 5,
    absent: dict[int, tuple[str, ...]] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], Muon]:
    model, optimizer = build(shapes, dtype, process_group, **options)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        for name, parameter in model.items():
            grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            parameter.grad = None if name in (absent or {}).get(step, ()) else grad
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}, optimizer


def on_rank(
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    absent: dict[int, tuple[str, ...]] | None = None,
) -> tuple[dict[str, Tensor], Report, tuple[ExchangePlan, ...]]:
    result, optimizer = train(shapes, dtype, dist.group.WORLD, absent=absent)
    return result, optimizer.report(), optimizer.plan


def assert_same_bits(results: list[dict[str, Tensor]], reference: dict[str, Tensor]) -> None:
    for rank, result in enumerate(results):
        for name, expected in reference.items():
            assert torch.equal(result[name], expected), f"{name} differs on rank {rank}"


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_i1_five_steps_are_bitwise_those_of_one_process(
    world_size: int, dtype: torch.dtype
) -> None:
    reference, _ = train(RAGGED, dtype, None)
    results, reports, plans = zip(*run_ranks(world_size, on_rank, RAGGED, dtype), strict=True)
    assert_same_bits(list(results), reference)
    cut = {s.rank for s in plans[0][0].ownership.layout.holders(_index(plans[0][0], "wide"))}
    assert cut == set(range(world_size)), "a matrix is cut by every rank"
    assert sum(report.newton_schulz_calls for report in reports) == 5 * MATRICES
    assert sum(report.matrices_owned for report in reports) == MATRICES
    assert len({report.loads for report in reports}) == 1
    matrices = [spec.shape for spec in plans[0][0].ownership.layout.specs]
    assert sum(reports[0].loads) == sum(map(newton_schulz_cost, matrices))
    for report in reports:
        assert (report.loads[report.rank] > 0) == (report.matrices_owned > 0)


def _index(plan: ExchangePlan, name: str) -> int:
    return [spec.name for spec in plan.ownership.layout.specs].index(name)


# Beside one large matrix the small ones lie far from their owners: each owner fetches both of its.
DRIFTED = {"large": (61, 150)} | {f"small{i}": (20, 30) for i in range(6)}


def in_waves(wave_bytes: int) -> tuple[dict[str, Tensor], int]:
    # Messages that cost nothing: balance alone decides, however small the matrices.
    free = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
    result, optimizer = train(
        DRIFTED, torch.float32, dist.group.WORLD, wave_bytes=wave_bytes, cost_model=free
    )
    return result, len(optimizer.plan[0].waves)


@pytest.mark.parametrize(("wave_bytes", "waves"), [(1, 2), (2400, 2), (4800, 1)])
def test_i1_any_wave_size_gives_the_same_bits(wave_bytes: int, waves: int) -> None:
    reference, _ = train(DRIFTED, torch.float32, None)
    outcome = run_ranks(4, in_waves, wave_bytes)
    assert_same_bits([result for result, _ in outcome], reference)
    assert {count for _, count in outcome} == {waves}


def test_i1_more_ranks_than_matrices_and_ranks_that_own_nothing() -> None:
    reference, _ = train(TWO_MATRICES, torch.float32, None)
    outcome = run_ranks(4, on_rank, TWO_MATRICES, torch.float32)
    assert_same_bits([result for result, _, _ in outcome], reference)
    assert sorted(report.matrices_owned for _, report, _ in outcome) == [0, 0, 1, 1]


def test_i1_gradients_absent_everywhere_leave_their_parameters_alone() -> None:
    absent = {0: ("row",), 2: ("wide", "experts", "bias"), 4: ("tiny", "table")}
    reference, _ = train(RAGGED, torch.float32, None, absent=absent)
    outcome = run_ranks(3, on_rank, RAGGED, torch.float32, absent)
    assert_same_bits([result for result, _, _ in outcome], reference)
    assert sum(r.newton_schulz_calls for _, r, _ in outcome) == 5 * MATRICES - 3 - 3


@pytest.mark.parametrize("world_size", [2, 4])
def test_i2_bytes_sent_are_what_the_plan_says(world_size: int) -> None:
    for _, report, (plan,) in run_ranks(world_size, on_rank, RAGGED, torch.float32):
        layout = plan.ownership.layout
        assert report.bytes_sent["gather"] == 5 * 4 * plan.outgoing_numel
        assert report.bytes_sent["scatter"] == 5 * 4 * plan.incoming_numel
        others = 16 * -(-(32 + 96 + 16) // (16 * world_size))  # aligned sizes of OTHERS, cut
        publish = (layout.shard_numel + others) * 4 * (world_size - 1)
        assert report.bytes_sent["publish"] == 5 * publish


def test_i3_state_is_sharded() -> None:
    shapes = {f"w{i}": (64, 96) for i in range(6)}
    whole = 4 * (sum(64 * 96 for _ in shapes) + 2 * (32 + 96 + 16))
    for _, report, _ in run_ranks(4, on_rank, shapes, torch.float32):
        assert report.state_bytes <= 1.01 * whole / 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)))
        return out


def net_and_optimizer(process_group: Any) -> tuple[Net, Muon]:
    torch.manual_seed(0)
    net = Net()
    matrices = [(n, p) for n, p in net.named_parameters() if p.dim() == 2]
    biases = [(n, p) for n, p in net.named_parameters() if p.dim() == 1]
    groups = [{"params": matrices}, {"params": biases, "algorithm": "adamw"}]
    return net, Muon(groups, lr=1e-2, process_group=process_group)


def train_net(world_size: int, rank: int, process_group: Any, *, averaged: bool) -> list[Tensor]:
    net, optimizer = net_and_optimizer(process_group)
    model = DistributedDataParallel(net) if world_size > 1 and averaged else net
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(12, 12, generator=generator).chunk(world_size)[rank]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def ddp_rank() -> list[Tensor]:
    return train_net(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, averaged=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_under_ddp_the_ranks_train_the_full_batch(world_size: int) -> None:
    expected = train_net(1, 0, None, averaged=True)
    results = run_ranks(world_size, ddp_rank)
    for result in results:
        for mine, first, whole in zip(result, results[0], expected, strict=True):
            assert torch.equal(mine, first)
            torch.testing.assert_close(mine, whole, rtol=1e-4, atol=1e-5)


Mistake = Literal["shape", "lr", "order", "extra"]


def mistaken(mistake: Mistake) -> str:
    rank = dist.get_rank()
    shapes = {"a": (4, 6), "b": (4, 6)}
    if rank == 1 and mistake == "shape":
        shapes["b"] = (4, 7)
    if rank == 1 and mistake == "order":
        shapes = dict(reversed(shapes.items()))
    if rank == 1 and mistake == "extra":
        shapes["c"] = (3, 3)
    named = [(name, nn.Parameter(torch.ones(shape))) for name, shape in shapes.items()]
    lr = 0.2 if rank == 1 and mistake == "lr" else 0.1
    optimizer = Muon(named, lr=lr, process_group=dist.group.WORLD)
    for _, parameter in named:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("mistake", "named"),
    [("shape", "[4, 7]"), ("lr", "lr=0.2"), ("order", "has 'b: "), ("extra", "c: shape")],
)
def test_i7_ranks_that_differ_all_raise_and_name_the_difference(
    mistake: Mistake, named: str
) -> None:
    messages = run_ranks(3, mistaken, mistake)
    assert len(set(messages)) == 1, "every rank says the same"
    assert "Ranks [1] do not have the same optimizer as rank 0" in messages[0]
    assert named in messages[0]


def unaveraged() -> str:
    try:
        train_net(dist.get_world_size(), dist.get_rank(), dist.group.WORLD, averaged=False)
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_gradients_that_were_not_averaged_are_refused_on_every_rank() -> None:
    messages = run_ranks(2, unaveraged)
    assert messages[0] == messages[1]
    assert "gradients of first.bias differ between ranks" in messages[0]
    assert "DistributedDataParallel" in messages[0]


def unaveraged_later() -> list[str]:
    weight = nn.Parameter(torch.ones(4, 5))
    optimizer = Muon([("weight", weight)], process_group=dist.group.WORLD)
    said = []
    for gradient in (None, torch.full_like(weight, 1.0 + dist.get_rank())):
        weight.grad = gradient
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        said.append(str(error.value))
    return said


def test_a_step_without_gradients_does_not_use_up_the_look_whether_they_are_averaged() -> None:
    for empty, unlike in run_ranks(2, unaveraged_later):
        assert "No parameter has a gradient" in empty
        assert "gradients of weight differ between ranks" in unlike


Damage = Literal["missing", "nan"]


def damaged(damage: Damage) -> tuple[str, bool]:
    model, optimizer = build(RAGGED, torch.float32, dist.group.WORLD)
    for step in range(2):
        for parameter in model.values():
            parameter.grad = torch.full_like(parameter, 0.5)
        if step == 0:
            optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in model.items()}
    state = [b.shard.state for b in optimizer._engine.buckets]
    kept = [{name: t.clone() for name, t in tensors.items()} for tensors in state]
    if damage == "missing" and dist.get_rank() == 2:
        model["square"].grad = None
    if damage == "nan":
        grad = model["wide"].grad
        assert grad is not None
        grad[60, 149] = float("nan")  # one element, in one rank's range
    message = "no error"
    try:
        optimizer.step()
    except (RuntimeError, FloatingPointError) as error:
        message = str(error)
    same = all(torch.equal(before[name], model[name]) for name in model)
    for tensors, copies in zip(state, kept, strict=True):
        same = same and all(torch.equal(tensors[name], t) for name, t in copies.items())
    return message, same


def test_i7_a_gradient_missing_on_one_rank_raises_on_all_and_names_it() -> None:
    outcome = run_ranks(3, damaged, "missing")
    assert {message for message, _ in outcome} == {outcome[0][0]}
    assert "square has a gradient on some ranks but not on ranks [2]" in outcome[0][0]
    assert all(same for _, same in outcome), "nothing was changed"


def test_i5_a_nan_seen_by_one_rank_raises_on_all_and_changes_nothing() -> None:
    outcome = run_ranks(3, damaged, "nan")
    assert {message for message, _ in outcome} == {outcome[0][0]}
    assert "gradient of wide has a NaN" in outcome[0][0]
    assert all(same for _, same in outcome)


def save_on_rank_zero() -> str:
    _, optimizer = train(TWO_MATRICES, torch.float32, dist.group.WORLD, steps=1)
    message = ""
    if dist.get_rank() == 0:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            message = str(error)
    dist.barrier()  # would time out if state_dict had entered a collective
    return message


def test_i6_state_dict_is_no_collective_and_refuses_to_return_one_shard() -> None:
    message = run_ranks(2, save_on_rank_zero)[0]
    assert "holds 1/2 of the optimizer state" in message
    assert "consolidate_state_dict(to=0)" in message


def consolidate(dtype: torch.dtype, to: int) -> tuple[Any, dict[str, Tensor], str]:
    weights, optimizer = train(RAGGED, dtype, dist.group.WORLD, steps=3)
    optimizer.consolidate_state_dict(to=to)
    saved, message = None, ""
    if dist.get_rank() == to:
        saved = optimizer.state_dict()
    try:
        if dist.get_rank() != to:
            optimizer.state_dict()
    except RuntimeError as error:
        message = str(error)
    return saved, weights, message


def continue_from(
    saved: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, process_group: Any
) -> dict[str, Tensor]:
    model, optimizer = build(RAGGED, dtype, process_group)
    for name, parameter in model.items():
        parameter.data.copy_(weights[name])
    optimizer.load_state_dict(saved)
    return step_with_ones(model, optimizer)


def continue_on_rank(
    saved: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    return continue_from(saved, weights, dtype, dist.group.WORLD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("before", "after", "to"), [(2, 1, 0), (3, 4, 2), (4, 2, 1)])
def test_i6_consolidated_state_continues_bitwise_on_other_ranks(
    before: int, after: int, to: int, dtype: torch.dtype
) -> None:
    model, optimizer = build(RAGGED, dtype, None)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        for parameter in model.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.step()
    expected = step_with_ones(model, optimizer)
    outcome = run_ranks(before, consolidate, dtype, to)
    saved, weights, _ = outcome[to]
    assert saved["param_groups"][0]["param_names"] == ["wide", "row", "column"]
    assert saved["state"][0]["momentum_buffer"].shape == RAGGED["wide"]
    assert all(
        f"Rank {to} has the whole" in said for r, (_, _, said) in enumerate(outcome) if r != to
    )
    if after == 1:
        assert_same_bits([continue_from(saved, weights, dtype, None)], expected)
    else:
        results = run_ranks(after, continue_on_rank, saved, weights, dtype)
        assert_same_bits(results, expected)


def stale() -> str:
    model, optimizer = build(TWO_MATRICES, torch.float32, dist.group.WORLD)
    step_with_ones(model, optimizer)
    optimizer.consolidate_state_dict()
    step_with_ones(model, optimizer)
    try:
        optimizer.state_dict()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_i6_consolidated_state_is_not_returned_after_another_step() -> None:
    assert all("holds 1/2 of the optimizer state" in said for said in run_ranks(2, stale))


def resume(saved: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    model, optimizer = build(RAGGED, torch.float32, dist.group.WORLD)
    for name, parameter in model.items():
        parameter.data.copy_(weights[name])
    optimizer.load_state_dict(saved)
    return step_with_ones(model, optimizer)


def step_with_ones(model: dict[str, nn.Parameter], optimizer: Muon) -> dict[str, Tensor]:
    for parameter in model.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.items()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_full_state_from_one_process_is_taken_in_at_any_world_size(world_size: int) -> None:
    model, optimizer = build(RAGGED, torch.float32, None)
    for step in range(3):
        for parameter in model.values():
            parameter.grad = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(step)
            )
        optimizer.step()
    saved = optimizer.state_dict()
    saved["state"] = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for key, entry in saved["state"].items()
    }
    weights = {name: parameter.detach().clone() for name, parameter in model.items()}
    expected = step_with_ones(model, optimizer)
    assert_same_bits(run_ranks(world_size, resume, saved, weights), expected)


def in_a_subgroup() -> tuple[dict[str, Tensor], Report]:
    """Two replicas of two shards each: ranks 0 and 2 share one optimizer, 1 and 3 the other."""
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    result, optimizer = train(RAGGED, torch.float32, groups[dist.get_rank() % 2])
    return result, optimizer.report()


def test_i1_a_subgroup_shards_among_its_own_ranks_only() -> None:
    reference, _ = train(RAGGED, torch.float32, None)
    outcome = run_ranks(4, in_a_subgroup)
    assert_same_bits([result for result, _ in outcome], reference)
    assert [(r.rank, r.world_size) for _, r in outcome] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    for pair in (outcome[0::2], outcome[1::2]):
        assert sum(report.matrices_owned for _, report in pair) == MATRICES


def foreign_group() -> str:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        return ""
    try:
        Muon([nn.Parameter(torch.ones(2, 2))], process_group=group)
    except TypeError as error:
        return str(error)
    return "no error"


def test_a_group_without_this_rank_is_refused() -> None:
    assert "member" in run_ranks(2, foreign_group)[1]


Rift = Literal["weights", "lr", "groups", "option", "sparse", "callable", "hook group"]


def rift(kind: Rift) -> str:
    """Something is different on rank 1, or goes wrong there alone."""
    odd = dist.get_rank() == 1
    torch.manual_seed(7 if odd and kind == "weights" else 0)
    first, second, third, table = (nn.Parameter(torch.randn(6, 6)) for _ in range(4))
    matrices = [("first", first), ("second", second), ("third", third)]
    cut = 1 if odd and kind == "groups" else 2
    groups: list[dict[str, Any]] = [
        {"params": matrices[:cut], "lr": 0.1},
        {"params": matrices[cut:], "lr": 0.001},
        {"params": [("table", table)], "algorithm": "adamw"},
    ]
    scale = (lambda rows, cols: 0.5) if kind == "callable" else "match_rms_adamw"
    optimizer = Muon(groups, process_group=dist.group.WORLD, adjust_lr_fn=scale)
    try:
        if kind == "hook group":
            pair = dist.new_group([0, 1, 2])
            wrapped = DistributedDataParallel(nn.Linear(3, 3, bias=False))
            other = Muon(list(wrapped.named_parameters()), process_group=pair, reduce="hook")
            other.attach(wrapped)
        for step in range(2):
            for parameter in (first, second, third, table):
                parameter.grad = torch.ones_like(parameter)
            if step == 1 and odd and kind == "lr":
                optimizer.param_groups[0]["lr"] = 0.05
            if step == 1 and odd and kind == "option":
                optimizer.param_groups[0]["momentum"] = 2.0
            if step == 1 and odd and kind == "sparse":
                table.grad = torch.eye(6).to_sparse()
            optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("weights", "Desync after step 0: table is not the same on all ranks; ranks [1]"),
        ("lr", "The hyperparameters differ between ranks: rank 0 has lr=0.1, rank 1 has lr=0.05"),
        ("groups", "Ranks [1] do not have the same optimizer as rank 0"),
        ("option", "Invalid momentum=2.0 in group 0"),
        ("sparse", "table has a torch.sparse_coo gradient"),
        ("callable", "no error"),
    ],
)
def test_i7_what_differs_on_one_rank_is_told_by_all(kind: Rift, message: str) -> None:
    for rank, said in enumerate(run_ranks(3, rift, kind, timeout=30)):
        assert message in said, f"rank {rank}"


def test_a_hook_in_another_group_is_refused() -> None:
    said = run_ranks(4, rift, "hook group")
    assert all("different process groups" in text for text in said[:3])


def flip(every: int) -> list[str]:
    model, optimizer = build(RAGGED, torch.float32, dist.group.WORLD, check_desync_every=every)
    said = []
    for step in range(1, 5):
        for parameter in model.values():
            parameter.grad = torch.full_like(parameter, 0.5)
        try:
            optimizer.step()
        except RuntimeError as error:
            return [*said, str(error)]
        said.append("")
        if step == 2 and dist.get_rank() == 2:
            model["wide"].data.view(-1).view(torch.int32)[4321] ^= (
                1  # the lowest bit of one element
            )
    return said


def test_i7_one_flipped_bit_is_named_before_the_next_update() -> None:
    outcome = run_ranks(4, flip, 1)
    for said in outcome:
        assert said[:2] == ["", ""]
        assert "Desync after step 2: wide is not the same on all ranks; ranks [2]" in said[2]


def test_without_the_check_the_next_update_overwrites_a_flipped_bit() -> None:
    assert run_ranks(4, flip, 0) == [["", "", "", ""]] * 4


def test_desync_is_looked_for_only_as_often_as_asked() -> None:
    # The flip comes after step 2 and lives until the update of step 3: every second step sees it.
    assert all("Desync after step 2" in said[-1] for said in run_ranks(4, flip, 2))
    assert run_ranks(4, flip, 3) == [["", "", "", ""]] * 4
