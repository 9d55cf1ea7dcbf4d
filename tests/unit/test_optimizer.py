"""Muon in one process: parity with torch, what it refuses, what it counts, its state."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from benchmarks.torch_muon import newton_schulz_in_fp32
from distmuon import Muon
from distmuon.exchange import Exchange
from distmuon.update_rules import AdjustLrMode

SHAPES = ((16, 24), (24, 16), (12, 12))


def _torch_knows(adjust_lr_fn: str) -> bool:
    try:
        torch.optim.Muon([torch.zeros(1, 1)], adjust_lr_fn=adjust_lr_fn)
    except ValueError:
        return False
    return True


TORCH_SCALINGS = [*filter(_torch_knows, get_args(AdjustLrMode))]


def parameters(*shapes: tuple[int, ...], seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("mode", TORCH_SCALINGS)
@newton_schulz_in_fp32()
def test_five_steps_match_torch_muon_in_fp32(nesterov: bool, mode: str) -> None:
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    arguments: dict[str, Any] = {"lr": 2e-2, "weight_decay": 0.1, "nesterov": nesterov}
    mine = Muon(ours, ns_coefficients="keller", adjust_lr_fn=mode, **arguments)
    reference = torch.optim.Muon(theirs, adjust_lr_fn=mode, **arguments)
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        reference.step()
    for mine_p, their_p, start in zip(ours, theirs, parameters(*SHAPES), strict=True):
        error = (mine_p - their_p).norm() / (their_p - start).norm()
        assert error < 5e-5


def test_arguments_begin_with_torchs_in_its_order() -> None:
    """An option that a later torch adds shows here."""
    theirs, ours = (inspect.signature(each).parameters for each in (torch.optim.Muon, Muon))
    assert [*ours][: len(theirs)] == [*theirs]
    same = ("lr", "weight_decay", "momentum", "nesterov")
    assert [ours[name].default for name in same] == [theirs[name].default for name in same]


def test_adamw_group_matches_torch_adamw_bit_for_bit() -> None:
    matrix, other, theirs = parameters((8, 8), (5, 3), (5, 3))
    theirs.data.copy_(other.data)
    mine = Muon(
        [{"params": [matrix]}, {"params": [other], "algorithm": "adamw", "weight_decay": 0.3}],
        lr=1e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    reference = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, foreach=False
    )
    for step in range(4):
        give_gradients([matrix, other], step)
        theirs.grad = other.grad.clone() if other.grad is not None else None
        mine.step()
        reference.step()
    assert torch.equal(other, theirs)


def test_groups_keep_their_own_hyperparameters() -> None:
    apart = parameters(*SHAPES)
    together = parameters(*SHAPES)
    settings = [{"lr": 1e-2}, {"lr": 3e-2, "nesterov": False}, {"lr": 1e-3, "weight_decay": 0.0}]
    alone = [Muon([{"params": [p], **s}]) for p, s in zip(apart, settings, strict=True)]
    joint = Muon([{"params": [p], **s} for p, s in zip(together, settings, strict=True)])
    for step in range(3):
        give_gradients(apart, step)
        give_gradients(together, step)
        for optimizer in alone:
            optimizer.step()
        joint.step()
    assert all(torch.equal(a, b) for a, b in zip(apart, together, strict=True))


def test_schedulers_drive_each_group() -> None:
    matrix, bias = parameters((8, 8), (5,))
    optimizer = Muon([{"params": [matrix], "lr": 0.5}, {"params": [bias], "algorithm": "adamw"}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    give_gradients([matrix, bias], 0)
    optimizer.step()
    scheduler.step()
    before = matrix.detach().clone(), bias.detach().clone()
    give_gradients([matrix, bias], 1)
    optimizer.step()
    assert torch.equal(matrix, before[0])
    assert torch.equal(bias, before[1])


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_keys_that_schedulers_add_survive_a_round_trip(name: str) -> None:
    optimizer = Muon([nn.Parameter(torch.ones(4, 3))])
    rates = {"OneCycleLR": {"total_steps": 5}, "CyclicLR": {"base_lr": 0.1}}[name]
    getattr(torch.optim.lr_scheduler, name)(optimizer, max_lr=0.5, **rates)
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["max_momentum"] == saved["param_groups"][0]["max_momentum"]


def test_a_stack_of_matrices_is_a_loop_over_them() -> None:
    (stack,) = parameters((3, 8, 6))
    singles = [nn.Parameter(stack.data[i].clone()) for i in range(3)]
    one, many = Muon([stack]), Muon(singles)
    give_gradients([stack], 0)
    assert stack.grad is not None
    for i, single in enumerate(singles):
        single.grad = stack.grad[i].clone()
    one.step()
    many.step()
    torch.testing.assert_close(stack.data, torch.stack([s.data for s in singles]))


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    first, second, bias = parameters((8, 8), (6, 6), (4,))
    optimizer = Muon([{"params": [first, second]}, {"params": [bias], "algorithm": "adamw"}])
    give_gradients([first, second, bias], 0)
    optimizer.step()
    second.grad = bias.grad = None
    before = second.detach().clone(), bias.detach().clone()
    moved = first.detach().clone()
    give_gradients([first], 1)
    optimizer.step()
    assert torch.equal(second, before[0]), "no update and no decay"
    assert torch.equal(bias, before[1])
    assert not torch.equal(first, moved)
    report = optimizer.report()
    assert (report.newton_schulz_calls, report.newton_schulz_expected) == (3, 3)


def test_ns_dtype_is_the_dtype_of_the_products() -> None:
    outcome = []
    for ns_dtype in (None, "float32", "bfloat16"):
        (matrix,) = parameters((48, 48))
        optimizer = Muon([matrix], lr=1.0, weight_decay=0.0, ns_dtype=ns_dtype)  # type: ignore[arg-type]
        give_gradients([matrix], 0)
        optimizer.step()
        outcome.append(matrix.detach() - parameters((48, 48))[0].detach())
    default, single, half = outcome
    assert torch.equal(default, single)
    assert 1e-4 < float((half - single).norm() / single.norm()) < 0.1


def test_closure_is_called_with_gradients_enabled() -> None:
    (matrix,) = parameters((4, 4))
    optimizer = Muon([matrix])

    def closure() -> float:
        loss = matrix.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == pytest.approx(parameters((4, 4))[0].square().sum().item())


def test_gradients_are_not_modified() -> None:
    matrix, bias = parameters((8, 8), (5,))
    optimizer = Muon([{"params": [matrix]}, {"params": [bias], "algorithm": "adamw"}])
    give_gradients([matrix, bias], 0)
    assert matrix.grad is not None
    assert bias.grad is not None
    before = matrix.grad.clone(), bias.grad.clone()
    optimizer.step()
    assert torch.equal(matrix.grad, before[0])
    assert torch.equal(bias.grad, before[1])


def test_noncontiguous_gradients_and_parameters_give_the_same_update() -> None:
    (plain,) = parameters((6, 10))
    turned = nn.Parameter(plain.data.T.contiguous().T)
    assert not turned.is_contiguous()
    optimizers = Muon([plain]), Muon([turned])
    give_gradients([plain], 0)
    assert plain.grad is not None
    turned.grad = plain.grad.T.contiguous().T
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(plain, turned)


def test_a_range_longer_than_a_piece_is_updated_to_its_end() -> None:
    size = 2**20 + 3  # a piece is 2**20
    matrix, vector, theirs = map(
        nn.Parameter, (torch.ones(4, 8), torch.ones(size), torch.ones(size))
    )
    groups = [{"params": [matrix]}, {"params": [vector], "algorithm": "adamw"}]
    ours = Muon(groups, lr=1e-2, weight_decay=0.1)
    torchs = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for _ in range(2):
        matrix.grad = torch.randn(4, 8)
        vector.grad = torch.randn(size)
        theirs.grad = vector.grad.clone()
        ours.step()
        torchs.step()
    assert torch.equal(vector, theirs)


def test_storage_replaced_between_steps_is_taken_in() -> None:
    (matrix,) = parameters((6, 6))
    optimizer = Muon([matrix], weight_decay=0.0)
    give_gradients([matrix], 0)
    optimizer.step()
    matrix.data = torch.zeros(6, 6)
    optimizer.step()
    assert 0 < matrix.abs().max() < 1e-2, "the step started from the new zeros"


def test_parameters_in_one_buffer_do_not_look_tied() -> None:
    # Accelerate's save_state drops all but one of the tensors that share a storage.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = Muon([model[0].weight, model[1].weight])
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    first, second = model[0].weight, model[1].weight
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == 4 * first.numel()


def test_values_written_into_bf16_parameters_are_taken_in() -> None:
    matrix = nn.Parameter(torch.randn(6, 6).bfloat16())
    optimizer = Muon([matrix], weight_decay=0.0)
    matrix.grad = torch.randn(6, 6).bfloat16()
    optimizer.step()
    with torch.no_grad():
        matrix.zero_()
    optimizer.step()
    assert 0 < matrix.abs().max() < 1e-2


def test_bf16_parameters_keep_small_updates_in_their_master() -> None:
    matrix = nn.Parameter(torch.ones(8, 8).bfloat16())
    optimizer = Muon([matrix], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        matrix.grad = torch.eye(8).bfloat16()
        optimizer.step()
    assert matrix[0, 0].item() < 1.0, "100 steps of 6e-5 are visible, one is not"
    assert optimizer.report().state_bytes == 2 * 4 * 64


def test_the_dtype_may_change_before_the_first_step_but_not_after() -> None:
    layer = nn.Linear(6, 6, bias=False)
    optimizer = Muon([("layer.weight", layer.weight)])
    layer.to(torch.float64)
    layer.weight.grad = torch.randn(6, 6, dtype=torch.float64)
    optimizer.step()
    layer.to(torch.float32)
    layer.weight.grad = torch.randn(6, 6)
    with pytest.raises(RuntimeError, match=r"layer\.weight became torch\.float32"):
        optimizer.step()


def test_report_counts_before_and_after_steps() -> None:
    first, second, bias = parameters((8, 8), (2, 6, 5), (4,))
    optimizer = Muon([{"params": [first, second]}, {"params": [bias], "algorithm": "adamw"}])
    assert optimizer.report().newton_schulz_calls == 0
    for step in range(3):
        give_gradients([first, second, bias], step)
        optimizer.step()
    report = optimizer.report()
    assert (report.steps, report.matrices, report.matrices_owned) == (3, 3, 3), "a stack is two"
    assert report.newton_schulz_calls == report.newton_schulz_expected == 9
    assert (report.muon_parameters, report.adamw_parameters) == (124, 4)
    assert dict(report.bytes_sent) == {}
    assert "9 of 9" in str(report)


# --- what it refuses -------------------------------------------------------------------------


def frozen() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 4), requires_grad=False)


MATRIX = nn.Parameter(torch.randn(4, 4))
VECTOR = nn.Parameter(torch.randn(4))

REFUSED: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: Muon([]), ValueError, "empty parameter list"),
    (lambda: Muon([{"params": []}]), ValueError, "No parameter is routed to Muon"),
    (
        lambda: Muon([{"params": [MATRIX], "algorithm": "adamw"}]),
        ValueError,
        "No parameter is routed to Muon",
    ),
    (lambda: Muon([("w", VECTOR)]), ValueError, r"w has shape \[4\].*adamw"),
    (
        lambda: Muon([("conv", nn.Parameter(torch.randn(2, 2, 3, 3)))]),
        ValueError,
        r"conv has shape \[2, 2, 3, 3\]",
    ),
    (lambda: Muon([("w", frozen())]), ValueError, "w is frozen"),
    (lambda: Muon([("w", nn.Parameter(torch.empty(0, 4)))]), ValueError, "no elements"),
    (
        lambda: Muon([{"params": [("a", MATRIX)]}, {"params": [("b", MATRIX)]}]),
        ValueError,
        "b is already in the optimizer as a",
    ),
    (lambda: Muon([("a", MATRIX), ("a2", MATRIX)]), ValueError, "a2 is already"),
    (
        lambda: Muon([("a", MATRIX), ("a", nn.Parameter(torch.randn(3, 4)))]),
        ValueError,
        "Two parameters are called a",
    ),
    (lambda: Muon([("a",)]), TypeError, r"Group 0 has the entry \(str\)"),
    (lambda: Muon([(3, MATRIX)]), TypeError, r"Group 0 has the entry \(int, Parameter\)"),
    (lambda: Muon([MATRIX], lr=-1.0), ValueError, r"Invalid lr=-1\.0 in group 0"),
    (lambda: Muon([MATRIX], lr=float("nan")), ValueError, "Invalid lr=nan"),
    (lambda: Muon([MATRIX], lr="fast"), TypeError, "Invalid lr='fast'"),  # type: ignore[arg-type]
    (lambda: Muon([MATRIX], momentum=1.0), ValueError, "Invalid momentum"),
    (lambda: Muon([MATRIX], weight_decay=-0.1), ValueError, "Invalid weight_decay"),
    (lambda: Muon([MATRIX], nesterov=1), TypeError, "Invalid nesterov"),  # type: ignore[arg-type]
    (lambda: Muon([MATRIX], ns_dtype="bf16"), ValueError, "ns_dtype"),  # type: ignore[arg-type]
    (lambda: Muon([MATRIX], ns_steps=0), ValueError, "ns_steps"),
    (lambda: Muon([MATRIX], ns_steps=2.5), TypeError, "ns_steps"),  # type: ignore[arg-type]
    (lambda: Muon([MATRIX], ns_coefficients="keler"), ValueError, "keller"),
    (lambda: Muon([MATRIX], adjust_lr_fn="rms"), ValueError, "match_rms_adamw"),  # type: ignore[arg-type]
    (lambda: Muon([MATRIX], betas=(0.9, 1.0)), ValueError, r"betas\[1\]"),
    (lambda: Muon([MATRIX], lr=1e38), ValueError, r"lr / \(1 - betas\[0\]\) is 1e\+39"),
    (lambda: Muon([MATRIX], lr=1.0, weight_decay=1e39), ValueError, r"lr \* weight_decay"),
    (lambda: Muon([MATRIX], eps=1e39), ValueError, "eps=1e\\+39"),
    (lambda: Muon([MATRIX], adjust_lr_fn=lambda a, b: 1e39), ValueError, "finite in float32"),
    (lambda: Muon([MATRIX], betas=0.9), TypeError, "betas"),  # type: ignore[arg-type]
    (lambda: Muon([{"params": [MATRIX], "algorithm": "moun"}]), ValueError, "moun"),
    (
        lambda: Muon([{"params": [MATRIX], "weight_decy": 0.1}]),
        ValueError,
        "Did you mean 'weight_decay'",
    ),
    (lambda: Muon([{"lr": 0.1}]), TypeError, 'no "params"'),
    (lambda: Muon([{"params": {MATRIX}}]), TypeError, "set"),
    (lambda: Muon([3]), TypeError, "int"),  # type: ignore[list-item]
    (lambda: Muon([nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))]), TypeError, "complex"),
    (lambda: Muon([MATRIX], process_group="world"), TypeError, "ProcessGroup"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("build", "error", "message"), REFUSED)
def test_bad_input_is_refused_by_name(
    build: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build()


def test_params_may_be_a_generator() -> None:
    optimizer = Muon(p for p in [MATRIX])
    assert optimizer.report().matrices == 1


def test_an_empty_group_beside_a_full_one_is_allowed() -> None:
    optimizer = Muon([{"params": [MATRIX]}, {"params": [], "algorithm": "adamw"}])
    MATRIX.grad = torch.randn(4, 4)
    optimizer.step()
    assert optimizer.report().newton_schulz_calls == 1


def test_a_group_added_after_the_first_step_takes_a_refresh() -> None:
    first, second = parameters((4, 4), (3, 3))
    optimizer = Muon([first])
    give_gradients([first], 0)
    optimizer.step()
    optimizer.add_param_group({"params": [second], "lr": 0.5})
    give_gradients([first, second], 1)
    with pytest.raises(RuntimeError, match=r"Call refresh\(\) on every rank"):
        optimizer.step()
    optimizer.refresh()
    optimizer.step()
    assert optimizer.report().newton_schulz_calls == 3


def test_a_step_without_any_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="No parameter has a gradient"):
        Muon(parameters((4, 4))).step()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_a_nonfinite_gradient_changes_nothing(bad: float, where: int) -> None:
    matrix, bias = params = parameters((4, 4), (5,))
    optimizer = Muon([{"params": [("w", matrix)]}, {"params": [("b", bias)], "algorithm": "adamw"}])
    give_gradients(params, 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in b.shard.state.items()} for b in optimizer._engine.buckets]
    give_gradients(params, 1)
    grad = params[where].grad
    assert grad is not None
    grad.view(-1)[3] = bad
    with pytest.raises(FloatingPointError, match=f"gradient of {'wb'[where]} "):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    for bucket, kept in zip(optimizer._engine.buckets, state, strict=True):
        assert all(torch.equal(bucket.shard.state[k], v) for k, v in kept.items())


@pytest.mark.parametrize("reduce", ["ddp", "hook", "owned"])
def test_one_process_works_with_torchs_grad_scaler(reduce: Any) -> None:
    scaled, plain = parameters((4, 4), (4, 4))
    plain.data.copy_(scaled.data)
    optimizer, reference = Muon([scaled], reduce=reduce), Muon([plain])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(3, 4)
    scaler.scale((x @ scaled).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    (x @ plain).square().sum().backward()
    reference.step()
    torch.testing.assert_close(scaled, plain)


def test_sparse_gradients_are_refused_by_name() -> None:
    matrix, table = parameters((4, 4), (6, 3))
    optimizer = Muon(
        [{"params": [("w", matrix)]}, {"params": [("emb", table)], "algorithm": "adamw"}]
    )
    give_gradients([matrix], 0)
    table.grad = torch.eye(6, 3).to_sparse()
    with pytest.raises(TypeError, match=r"emb has a torch\.sparse_coo gradient"):
        optimizer.step()


def test_i4_a_matrix_that_was_not_orthogonalized_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, lost = parameters((4, 4), (6, 6))
    optimizer = Muon([("kept", kept), ("lost", lost)])
    give_gradients([kept, lost], 0)
    whole = Exchange.gather
    # A plan that forgets a matrix: the step must notice from what was delivered.
    monkeypatch.setattr(
        Exchange,
        "gather",
        lambda self, update: (
            [m for m in batch if m[1].shape != (6, 6)] for batch in whole(self, update)
        ),
    )
    before = lost.detach().clone()
    with pytest.raises(RuntimeError, match=r"1 of 2 owned .* missing \['lost'\]"):
        optimizer.step()
    assert torch.equal(lost, before)


# --- state -----------------------------------------------------------------------------------


def fresh(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Muon]:
    params = [nn.Parameter(p.data.to(dtype)) for p in parameters((8, 6), (5, 5), (4,))]
    groups = [{"params": params[:2]}, {"params": params[2:], "algorithm": "adamw"}]
    return params, Muon(groups, lr=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stepped", [True, False])
def test_resuming_from_state_dict_is_bitwise(dtype: torch.dtype, stepped: bool) -> None:
    params, optimizer = fresh(dtype)

    def step(chosen: list[nn.Parameter], which: Muon, seed: int) -> None:
        give_gradients(chosen, seed)
        which.step()

    for seed in range(3):
        step(params, optimizer, seed)
    saved = optimizer.state_dict()
    assert saved["state"][0]["momentum_buffer"].shape == (8, 6)
    assert saved["state"][0]["momentum_buffer"].dtype == torch.float32
    saved["state"] = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        for key, entry in saved["state"].items()
    }
    others, resumed = fresh(dtype)
    if stepped:
        step(others, resumed, 77)
    for mine, other in zip(params, others, strict=True):
        other.data.copy_(mine.data)
    resumed.load_state_dict(saved)
    for seed in range(3, 6):
        step(params, optimizer, seed)
        step(others, resumed, seed)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_state_dict_survives_a_round_trip_before_the_first_step() -> None:
    params, optimizer = fresh()
    optimizer.load_state_dict(optimizer.state_dict())
    give_gradients(params, 0)
    optimizer.step()
    assert optimizer.report().newton_schulz_calls == 2


@pytest.mark.parametrize("mode", [None, *TORCH_SCALINGS])
@newton_schulz_in_fp32()
def test_a_torch_muon_state_dict_continues_here(mode: Any) -> None:
    theirs, ours = parameters(*SHAPES), parameters(*SHAPES)
    reference = torch.optim.Muon(theirs, lr=1e-2, adjust_lr_fn=mode)
    mine = Muon(ours, lr=0.5)
    for step in range(3):
        give_gradients(theirs, step)
        reference.step()
    for mine_p, their_p in zip(ours, theirs, strict=True):
        mine_p.data.copy_(their_p.data)
    mine.load_state_dict(reference.state_dict())
    give_gradients(theirs, 9)
    give_gradients(ours, 9)
    before = [p.detach().clone() for p in theirs]
    reference.step()
    mine.step()
    for mine_p, their_p, start in zip(ours, theirs, before, strict=True):
        assert (mine_p - their_p).norm() < 1e-4 * (their_p - start).norm()


def test_torch_checkpointing_takes_no_hidden_step() -> None:
    layer = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    groups = [
        {"params": [(n, p) for n, p in layer.named_parameters() if p.dim() == 2]},
        {"params": [(n, p) for n, p in layer.named_parameters() if p.dim() == 1]}
        | {"algorithm": "adamw"},
    ]
    optimizer = Muon(groups)
    layer(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    saved = get_optimizer_state_dict(layer, optimizer)
    assert optimizer.report().steps == 1
    assert saved["state"]["0.weight"]["momentum_buffer"].shape == (6, 6)


def test_loading_an_empty_state_starts_anew() -> None:
    params, optimizer = fresh()
    initial = optimizer.state_dict()
    give_gradients(params, 0)
    optimizer.step()
    optimizer.load_state_dict(initial)
    assert all(not entry.get("step") for entry in optimizer.state_dict()["state"].values())
    assert not optimizer.state_dict()["state"][0]["momentum_buffer"].any()


def test_bad_hyperparameters_in_a_file_change_nothing() -> None:
    params, optimizer = fresh()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid lr=-1\.0 in group 0"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    saved["param_groups"][0] |= {"lr": 0.1, "algorithm": "adamw"}
    with pytest.raises(ValueError, match="was saved with algorithm='adamw'"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"The saved groups have \[2\] parameters"):
        optimizer.load_state_dict({"state": {}, "param_groups": saved["param_groups"][:1]})
    give_gradients(params, 0)
    optimizer.step()


def test_a_misshaped_master_is_refused() -> None:
    params, optimizer = fresh(torch.bfloat16)
    give_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], "master": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="saved master of group 0 parameter 0"):
        fresh(torch.bfloat16)[1].load_state_dict(saved)


@pytest.mark.parametrize("copying", [copy.deepcopy, pickle.dumps])
def test_copies_of_the_optimizer_are_refused(copying: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"state_dict\(\)"):
        copying(Muon(parameters((4, 4))))


def test_parameters_over_the_same_memory_are_refused_by_name() -> None:
    (first,) = parameters((4, 4))
    second = nn.Parameter(first.data)
    optimizer = Muon([("first", first), ("second", second)])
    give_gradients([first, second], 0)
    with pytest.raises(ValueError, match="first and second are two Parameters over the same"):
        optimizer.step()


def test_a_refused_group_can_be_corrected() -> None:
    first, second = parameters((4, 4), (5, 5))
    optimizer = Muon([("first", first)])
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": [("second", second)], "lr": -1.0})
    with pytest.raises(ValueError, match="names"):
        optimizer.add_param_group({"params": [second]})
    optimizer.add_param_group({"params": [("second", second)]})
    assert optimizer.report().matrices == 2


def test_a_matrix_turned_in_place_is_taken_in() -> None:
    (matrix,) = parameters((5, 5))
    twin = nn.Parameter(matrix.data.clone())
    optimizers = Muon([matrix]), Muon([twin])
    for step in range(2):
        give_gradients([matrix], step)
        assert matrix.grad is not None
        twin.grad = matrix.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        if step == 0:
            matrix.data, twin.data = matrix.data.t(), twin.data.t().contiguous()
    assert torch.equal(matrix, twin)


@pytest.mark.parametrize("damage", ["missing", "foreign", "shape"])
def test_partial_or_foreign_state_is_refused_by_name(damage: str) -> None:
    params, optimizer = fresh()
    give_gradients(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    if damage == "missing":
        del saved["state"][1]
    elif damage == "foreign":
        saved["state"][1] = {"step": 1, "exp_avg": torch.zeros(5, 5)}
    else:
        saved["state"][1] = {"step": 1, "momentum_buffer": torch.zeros(5, 4)}
    _, other = fresh()
    with pytest.raises(ValueError, match="group 0 parameter 1"):
        other.load_state_dict(saved)


def test_nobody_looks_for_nans_that_may_propagate() -> None:
    params = parameters(*SHAPES)
    optimizer = Muon(params, lr=0.1, nonfinite="propagate")
    give_gradients(params, seed=1)
    params[0].grad[0, 0] = torch.nan  # type: ignore[index]
    optimizer.step()
    assert bool(params[0].isnan().all())
    assert all(bool(p.isfinite().all()) for p in params[1:])
