"""Training goes on in another optimizer as if it had never changed."""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from typing_extensions import override

from benchmarks.torch_muon import newton_schulz_in_fp32
from distmuon import Muon, orthogonalize
from distmuon.migrate import export_state_dict, import_state_dict, with_names

MATRICES = ("first.weight", "second.weight")
KELLER = (3.4445, -4.775, 2.0315)
Optimizers = tuple[torch.optim.Optimizer, ...]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 5)


def split(model: Model) -> tuple[list[Any], list[Any]]:
    named = list(model.named_parameters())
    return [e for e in named if e[0] in MATRICES], [e for e in named if e[0] not in MATRICES]


def ours(model: Model, **options: Any) -> Muon:
    muon, rest = split(model)
    # AdamW's first: our order is another than theirs.
    groups = [{"params": rest, "algorithm": "adamw"}, {"params": muon}]
    options = {"ns_coefficients": KELLER, "ns_steps": 5, "betas": (0.9, 0.999)} | options
    return Muon(groups, lr=0.01, weight_decay=0.1, **options)


def torchs(model: Model, *, named: bool = True) -> Optimizers:
    muon, rest = (e if named else [p for _, p in e] for e in split(model))
    return (
        torch.optim.Muon(muon, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1),
    )


class SumMuon(torch.optim.Optimizer):
    """The sum convention with AdamW for the rest, its state named as Moonlight's."""

    def __init__(self, params: Iterable[Any]) -> None:
        super().__init__(params, {"lr": 0.01, "wd": 0.1, "momentum": 0.95, "nesterov": True})

    @override
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state, grad, lr = self.state[parameter], parameter.grad, group["lr"]
                parameter.mul_(1 - lr * group["wd"])
                if parameter.dim() == 2:
                    state.setdefault("use_muon", True)
                    total = state.setdefault("momentum_buffer", torch.zeros_like(grad))
                    total.mul_(group["momentum"]).add_(grad)
                    update = grad + group["momentum"] * total if group["nesterov"] else total
                    update = orthogonalize(update, coefficients=KELLER, steps=5)
                    parameter.sub_(update, alpha=lr * 0.2 * max(parameter.shape) ** 0.5)
                    continue
                state["step"] = state.get("step", 0) + 1
                first = state.setdefault("moment1", torch.zeros_like(grad))
                second = state.setdefault("moment2", torch.zeros_like(grad))
                first.lerp_(grad, 0.1)
                second.lerp_(grad.square(), 0.001)
                corrected = first / (1 - 0.9 ** state["step"])
                spread = (second / (1 - 0.999 ** state["step"])).sqrt() + 1e-8
                parameter.sub_(corrected / spread, alpha=lr)


def sums(model: Model) -> Optimizers:
    return (SumMuon(model.named_parameters()),)


def sum_and_adamw(model: Model) -> Optimizers:
    muon, rest = split(model)
    return SumMuon(muon), torch.optim.AdamW(rest, lr=0.01, weight_decay=0.1)


def train(model: Model, optimizers: Iterable[torch.optim.Optimizer], seeds: range) -> Model:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            # Of a scale that grows: a momentum of the wrong scale gives another direction.
            parameter.grad = (1 + seed) * torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return model


def assert_close(found: Model, expected: Model, start: Model, *, tolerance: float = 1e-4) -> None:
    rows = zip(found.named_parameters(), expected.parameters(), start.parameters(), strict=True)
    for (name, mine), theirs, before in rows:
        distance = (mine - theirs).norm() / (theirs - before).norm()
        assert distance <= tolerance, f"{name} is off by {distance:.1e} of its way"


@pytest.fixture(autouse=True)
def _newton_schulz_in_fp32() -> Iterator[None]:
    # torch.optim.Muon orthogonalizes in bf16, and rounding would hide what is looked for.
    with newton_schulz_in_fp32():
        yield


Build = Callable[[Model], Optimizers]


@pytest.mark.parametrize(("build", "convention"), [(torchs, "ema"), (sums, "sum")])
def test_training_goes_on_here(build: Build, convention: Any) -> None:
    model = Model()
    theirs = build(model)
    train(model, theirs, range(4))
    moved = copy.deepcopy(model)
    mine = ours(moved)
    given = [copy.deepcopy(each.state_dict()) for each in theirs]
    import_state_dict(mine, *given, momentum_convention=convention)
    start = copy.deepcopy(model)
    expected = train(model, theirs, range(4, 8))
    assert_close(train(moved, [mine], range(4, 8)), expected, start)


def test_adamw_goes_on_bit_for_bit() -> None:
    model = Model()
    theirs = torchs(model)
    train(model, theirs, range(3))
    moved = copy.deepcopy(model)
    mine = ours(moved)
    import_state_dict(mine, *(each.state_dict() for each in theirs))
    expected = dict(train(model, theirs, range(3, 6)).named_parameters())
    found = dict(train(moved, [mine], range(3, 6)).named_parameters())
    assert all(torch.equal(found[n], expected[n]) for n in expected if n not in MATRICES)


@pytest.mark.parametrize(("build", "convention"), [(torchs, "ema"), (sum_and_adamw, "sum")])
def test_training_goes_on_there(build: Build, convention: Any) -> None:
    model = Model()
    mine = ours(model)
    train(model, [mine], range(4))
    moved = copy.deepcopy(model)
    theirs = build(moved)
    for target in theirs:
        target.load_state_dict(export_state_dict(mine, target, momentum_convention=convention))
    start = copy.deepcopy(model)
    expected = train(model, [mine], range(4, 8))
    assert_close(train(moved, theirs, range(4, 8)), expected, start)


def test_the_wrong_convention_is_another_training() -> None:
    model = Model()
    theirs = sums(model)
    train(model, theirs, range(4))
    moved = copy.deepcopy(model)
    mine = ours(moved)
    import_state_dict(mine, theirs[0].state_dict(), momentum_convention="ema")
    start = copy.deepcopy(model)
    expected = train(model, theirs, range(4, 8))
    with pytest.raises(AssertionError, match=r"weight is off by \d.\de\+00"):
        assert_close(train(moved, [mine], range(4, 8)), expected, start)


@pytest.mark.parametrize("keyed", ["number", "name", "param_names"])
def test_any_keys_are_taken(keyed: str) -> None:
    model = Model()
    theirs = torchs(model, named=keyed == "param_names")
    train(model, theirs, range(2))
    given: list[Any] = [each.state_dict() for each in theirs]
    if keyed == "name":
        given = [get_optimizer_state_dict(model, theirs)]
    if keyed == "number":
        with pytest.raises(ValueError, match=r"by number only. Name them with with_names"):
            import_state_dict(ours(model), *given)
        names = [[name for name, _ in part] for part in split(model)]
        given = [with_names(each, some) for each, some in zip(given, names, strict=True)]
    mine = ours(model)
    import_state_dict(mine, *given)
    found = mine.state_dict()
    for parameter, number in zip(
        [p for group in mine.param_groups for p in group["params"]], range(6), strict=True
    ):
        for each in theirs:
            for key, value in each.state.get(parameter, {}).items():
                assert torch.equal(torch.as_tensor(found["state"][number][key]), value)


def damaged(damage: str) -> list[Any]:
    model = Model()
    theirs = torchs(model)
    train(model, theirs, range(1))
    muon, adamw = (copy.deepcopy(each.state_dict()) for each in theirs)
    match damage:
        case "missing":
            del muon["state"][1]
        case "twice":
            return [muon, muon, adamw]
        case "foreign":
            muon["param_groups"][0]["param_names"][1] = "third.weight"
        case "rule":
            muon["state"][0] = adamw["state"][0]
        case "shape":
            muon["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
        case "amsgrad":
            adamw["state"][0]["max_exp_avg_sq"] = torch.zeros(8)
        case "step":
            adamw["state"][0]["step"] = torch.tensor(float("nan"))
    return [muon, adamw]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"state of second.weight has \[\]. muon needs \['momentum_buffer'\]"),
        ("twice", "first.weight has state in two"),
        ("foreign", r"state of \['third.weight'\]"),
        ("rule", "state of first.weight has .* muon needs"),
        ("shape", r"momentum_buffer of first.weight is \[3, 3\]. Must be .* \[12, 8\]"),
        ("amsgrad", "state of norm.weight is AMSGrad's"),
        ("step", "saved step of norm.weight is .*nan"),
    ],
)
def test_what_cannot_be_imported_is_named_and_changes_nothing(damage: str, message: str) -> None:
    model = Model()
    mine = ours(model)
    train(model, [mine], range(1))
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(ValueError, match=message):
        import_state_dict(mine, *damaged(damage))
    after = mine.state_dict()
    assert all(
        torch.equal(torch.as_tensor(after["state"][number][key]), torch.as_tensor(value))
        for number, entry in before["state"].items()
        for key, value in entry.items()
    )


def test_what_cannot_be_exported_is_named() -> None:
    model = Model()
    mine = ours(model)
    train(model, [mine], range(1))
    everything = torch.optim.AdamW(model.named_parameters())
    with pytest.raises(ValueError, match=r"first.weight is trained by muon here, AdamW needs"):
        export_state_dict(mine, everything)
    other = torch.optim.Muon([("third.weight", nn.Parameter(torch.zeros(3, 3)))])
    with pytest.raises(ValueError, match=r"third.weight of the target's group 0"):
        export_state_dict(mine, other)
    with pytest.raises(ValueError, match="momentum_convention='mean'"):
        export_state_dict(mine, other, momentum_convention="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="There are 2 names, 1 of them different, for the 1"):
        with_names(other.state_dict(), ["a", "a"])
    unnamed = Muon([nn.Parameter(torch.zeros(3, 3))])
    with pytest.raises(ValueError, match="group 0 have no names"):
        import_state_dict(unnamed)
    handles = ours(model, state_dict_kind="sharded")
    with pytest.raises(RuntimeError, match="never whole"):
        export_state_dict(handles, torchs(model)[0])


def test_what_is_exported_does_not_follow_the_optimizer() -> None:
    model = Model()
    mine = ours(model)
    train(model, [mine], range(1))
    target = torchs(model, named=False)[0]  # its parameters are found by identity
    target.load_state_dict(export_state_dict(mine, target))
    kept = target.state_dict()["state"][0]["momentum_buffer"]
    before = kept.clone()
    train(model, [mine], range(1, 2))
    assert torch.equal(kept, before)


@pytest.mark.parametrize("algorithm", ["muon", "normuon"])
def test_adamws_matrices_begin_with_its_first_moment_and_a_warning(algorithm: str) -> None:
    model = Model()
    before = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before.step()
    saved = before.state_dict()
    muon, rest = split(model)
    groups = [{"params": rest, "algorithm": "adamw"}, {"params": muon, "algorithm": algorithm}]
    optimizer = Muon(groups)
    with pytest.raises(ValueError, match='adamw_matrices="momentum"'):
        import_state_dict(optimizer, saved)
    with pytest.warns(UserWarning, match=r"2 matrices .*table 7"):
        import_state_dict(optimizer, saved, adamw_matrices="momentum")
    state = optimizer.state_dict()["state"]
    for name, parameter in muon:
        number = [n for n, _ in rest + muon].index(name)
        first = before.state[parameter]["exp_avg"]
        assert torch.equal(state[number]["momentum_buffer"], first)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def test_a_muon_run_is_brought_over_without_a_warning() -> None:
    model = Model()
    theirs = torchs(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for each in theirs:
        each.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_state_dict(
            ours(model), *(each.state_dict() for each in theirs), adamw_matrices="momentum"
        )
