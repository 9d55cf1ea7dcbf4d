"""The DeepSpeed adapter inside real DeepSpeed engines, against the one-process optimizer."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmuon import Muon, build_param_groups, checkpoint
from tests.distributed.deepspeed_ranks import (
    ADAM_LR,
    LR,
    Case,
    Net,
    batch,
    deepspeed_world,
    farthest,
    loss_of,
    make_model,
    parameters_of,
    reference,
    start,
    train,
)
from tests.harness import run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed",
)

LIMIT = 90.0
ROOT = Path(__file__).parents[2]
BF16 = torch.bfloat16
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
OWN_CPU = {"zero_force_ds_cpu_optimizer": False}
# Makes DeepSpeed choose BF16_Optimizer in stage 1.
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}

CASES: dict[str, Case] = {
    "stage 0": Case(0),
    "stage 0, accumulation, clipping": Case(0, accumulation=2, clip=0.05),
    "stage 1": Case(1),
    "stage 1, accumulation": Case(1, accumulation=2),
    "stage 1, clip 1.0": Case(1, clip=1.0),
    "stage 1, clip 0.05": Case(1, clip=0.05),
    "stage 1, all-reduce": Case(1, {"reduce_scatter": False}),
    "stage 1, round robin": Case(1, {"round_robin_gradients": True}),
    "stage 1, alignment": Case(1, {"parameter_alignment": True}),
    "stage 1, offload, accumulation, clip": Case(1, OFFLOAD, OWN_CPU, accumulation=2, clip=0.05),
    "stage 2": Case(2),
    "stage 2, clip 1.0": Case(2, clip=1.0),
    "stage 2, clip 0.05": Case(2, clip=0.05),
    "stage 2, accumulation 3": Case(2, accumulation=3),
    "stage 2, all-reduce": Case(2, {"reduce_scatter": False}),
    "stage 2, overlap": Case(2, {"overlap_comm": True}),
    "stage 2, scattered gradients": Case(2, {"contiguous_gradients": False}),
    "stage 2, reduced to each owner": Case(2, {"use_multi_rank_bucket_allreduce": False}),
    "stage 2, small buckets": Case(2, {"reduce_bucket_size": 300, "allgather_bucket_size": 300}),
    "stage 2, round robin, alignment, accumulation": Case(
        2, {"round_robin_gradients": True, "parameter_alignment": True}, accumulation=2
    ),
    "stage 2, offload": Case(2, OFFLOAD, OWN_CPU),
    "stage 2, one matrix a wave": Case(2, options={"wave_bytes": 4}),
    "stage 2, fused matrices": Case(2, options={"blocks": {"wide.weight": 3, "experts": (4, 12)}}),
    "bf16, stage 1": Case(1, dtype=BF16),
    "bf16, stage 2, clip 1.0": Case(2, dtype=BF16, clip=1.0),
    "bf16, stage 2, accumulation": Case(2, dtype=BF16, accumulation=2),
    "bf16, BF16_Optimizer": Case(1, dtype=BF16, rest=FP32_SUMS),
    "bf16, BF16_Optimizer, clip 1.0": Case(1, dtype=BF16, rest=FP32_SUMS, clip=1.0),
    "bf16, BF16_Optimizer, accumulation 3, clip 0.05": Case(
        1, dtype=BF16, rest=FP32_SUMS, accumulation=3, clip=0.05
    ),
}


def run_cases(names: list[str]) -> dict[str, tuple[float, str, float]]:
    """Distance from the reference after three steps, the wrapper, and how far weights moved."""
    results = {}
    with deepspeed_world():
        for name in names:
            case = CASES[name]
            engine = start(case)
            train(engine, case, range(3))
            trained = parameters_of(engine.module)
            wanted = reference(case, range(3), dist.get_world_size())
            moved = farthest(trained, parameters_of(make_model(case.dtype)))
            # DeepSpeed's own Muon orthogonalized nothing at stage 0, and nobody noticed.
            done = engine.basic_optimizer.report()
            assert 0 < done.newton_schulz_calls == done.newton_schulz_expected, name
            results[name] = farthest(trained, wanted), type(engine.optimizer).__name__, moved
            engine.destroy()
    return results


@pytest.mark.parametrize("kinds", [("stage 0", "stage 1"), ("stage 2",), ("bf16",)])
def test_every_configuration_equals_one_process(kinds: tuple[str, ...]) -> None:
    names = [name for name in CASES if name.startswith(kinds)]
    wrapped = {
        "stage 0": "ZeroOrtho",
        "stage 1": "DeepSpeedZeroOptimizer",
        "bf16, stage 1": "DeepSpeedZeroOptimizer",
        "bf16, BF16_Optimizer": "BF16_Optimizer",
    }
    for result in run_ranks(2, run_cases, names, timeout=LIMIT):
        # Rounding of the norm that is clipped is all that can differ in fp32.
        far = {name: result[name][0] for name in names}
        assert {name for name in names if far[name] > 1e-6} == set()
        assert {name for name in names if CASES[name].dtype == BF16 and far[name] > 0.0} == set()
        assert all(moved > 0.02 for _, _, moved in result.values())
        wrappers = {name: wrapper for name, (_, wrapper, _) in result.items() if name in wrapped}
        assert wrappers == {name: wrapped[name] for name in wrappers}


SWITCHES = ("reduce_scatter", "overlap_comm", "contiguous_gradients", "round_robin_gradients")
SHARED: dict[Any, dict[str, Tensor]] = {}


def run_combinations(stage: int, dtype: torch.dtype, zero: dict[str, Any]) -> dict[str, float]:
    """Distance from the reference after two steps, of every combination of the other switches."""
    results = {}
    rest = OWN_CPU if "offload_optimizer" in zero else {}
    with deepspeed_world():
        for *on, accumulation, clip in itertools.product(
            *[(False, True)] * len(SWITCHES), (1, 2), (0.0, 0.05)
        ):
            chosen = {**zero, **dict(zip(SWITCHES, on, strict=True))}
            case = Case(stage, chosen, rest, accumulation, clip, dtype)
            engine = start(case)
            train(engine, case, range(2))
            if (accumulation, clip) not in SHARED:
                SHARED[accumulation, clip] = reference(case, range(2), dist.get_world_size())
            far = farthest(parameters_of(engine.module), SHARED[accumulation, clip])
            results[f"{chosen}, {accumulation=}, {clip=}"] = far
            engine.destroy()
    return results


@pytest.mark.slow
@pytest.mark.parametrize("offload", [{}, OFFLOAD], ids=["device", "offload"])
@pytest.mark.parametrize("alignment", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("stage", [1, 2])
def test_every_combination_of_the_switches(
    stage: int, dtype: torch.dtype, alignment: bool, offload: dict[str, Any]
) -> None:
    zero = {"parameter_alignment": alignment, **offload}
    for far in run_ranks(2, run_combinations, stage, dtype, zero, timeout=2 * LIMIT):
        assert len(far) == 64
        bound = 1e-6 if dtype == torch.float32 else 0.0
        assert {name: value for name, value in far.items() if value > bound} == {}


HALF = {"fp16": {"enabled": True, "loss_scale": 256}}
HALF_CASES = {
    "stage 1": Case(1, dtype=torch.float16, rest=HALF),
    "stage 2": Case(2, dtype=torch.float16, rest=HALF),
    "stage 2, clip 0.05": Case(2, dtype=torch.float16, rest=HALF, clip=0.05),
}


@contextmanager
def fp16_world() -> Iterator[None]:
    """DeepSpeed refuses fp16 on CPUs that are slow at it; this is told to a plug of its own."""
    with deepspeed_world():
        from deepspeed.accelerator import get_accelerator, set_accelerator
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        class SlowCPU(CPU_Accelerator):
            def is_fp16_supported(self) -> bool:
                return True

        before = get_accelerator()
        set_accelerator(SlowCPU())
        yield
        set_accelerator(before)


# Doubled once more than two steps went without an overflow, halved at each.
DYNAMIC = {
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 8,
        "loss_scale_window": 2,
        "hysteresis": 1,
    }
}


def run_fp16() -> dict[str, float]:
    """Distance from the reference."""
    from distmuon.deepspeed import save

    results = {}
    with fp16_world():
        for name, case in HALF_CASES.items():
            engine = start(case)
            train(engine, case, range(3))
            trained = parameters_of(engine.module)
            results[name] = farthest(trained, reference(case, range(3), dist.get_world_size()))
            assert farthest(trained, parameters_of(make_model(case.dtype))) > 0.02
            engine.destroy()
        for stage in (1, 2):
            case = Case(stage, dtype=torch.float16, rest=DYNAMIC)
            results[f"stage {stage}, dynamic"] = run_dynamic_scale(case)
        said = message_of(lambda: save("nowhere", start(HALF_CASES["stage 1"])))
        assert "loss scale of fp16" in said
    return results


def run_dynamic_scale(case: Case) -> float:
    """Seven steps, an overflow at the fourth on one rank; distance from the reference."""
    engine = start(case)
    scales = []
    for step in range(7):
        scales.append(float(engine.optimizer.cur_scale))
        if step != 3:
            train(engine, case, [step])
            continue
        before = snapshot(engine)
        overflow(engine, step)
        same = zip(before, snapshot(engine), strict=True)
        assert all(torch.equal(one, other) for one, other in same)
    scales.append(float(engine.optimizer.cur_scale))
    assert scales == [256.0, 256.0, 256.0, 512.0, 256.0, 256.0, 256.0, 512.0]
    steps = [step for step in range(7) if step != 3]
    # DeepSpeed 0.19.8 doubles the scale first and then divides by it, under any optimizer.
    pairs = [(scales[step], scales[step + 1]) for step in steps]
    wanted = reference(case, steps, dist.get_world_size(), pairs)
    far = farthest(parameters_of(engine.module), wanted)
    engine.destroy()
    return far


def test_fp16_equals_one_process() -> None:
    for far in run_ranks(2, run_fp16, timeout=LIMIT):
        assert len(far) == 5
        assert far.pop("stage 2, clip 0.05") <= 1e-6
        assert set(far.values()) == {0.0}


@pytest.mark.parametrize("world_size", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_other_numbers_of_ranks(world_size: int) -> None:
    names = ["stage 1", "stage 2, clip 1.0", "stage 2, round robin, alignment, accumulation"]
    for result in run_ranks(world_size, run_cases, names, timeout=LIMIT):
        # Not bitwise: gloo has an order of its own to sum three gradients or more.
        assert all(far <= 1e-6 for far, _, _ in result.values()), result


# --------------------------------------------------------------------------------------------------
# Steps that are skipped or refused.


def snapshot(engine: Any) -> list[Tensor]:
    optimizer = engine.basic_optimizer
    flats = [group["params"][0] for group in optimizer.param_groups]
    held = [value for flat in flats for value in optimizer.state[flat].values()]
    weights = [p.detach() for p in engine.module.parameters()]
    kept = [value.clone() for value in [*flats, *held, *weights] if isinstance(value, Tensor)]
    return [*kept, torch.tensor([optimizer.state[flat]["step"] for flat in flats])]


def overflow(engine: Any, step: int) -> None:
    """A step with an infinity on rank 1."""
    loss = loss_of(engine.module, batch(step, 0, dist.get_rank()), engine)
    engine.backward(loss * float("inf") if dist.get_rank() == 1 else loss)
    engine.step()


def run_overflow(case: Case) -> tuple[bool, float]:
    """Whether a step with an infinity on rank 1 changed nothing, and the distance afterwards."""
    engine = start(case)
    train(engine, case, range(2))
    before = snapshot(engine)
    overflow(engine, 9)
    after = snapshot(engine)
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    train(engine, case, range(2, 4))
    far = farthest(parameters_of(engine.module), reference(case, range(4), dist.get_world_size()))
    engine.destroy()
    return same, far


def run_overflows() -> list[tuple[bool, float]]:
    cases = [CASES[name] for name in ("stage 1", "stage 2", "bf16, stage 2, clip 1.0")]
    with deepspeed_world():
        return [run_overflow(case) for case in [*cases, CASES["bf16, BF16_Optimizer"]]]


def test_an_overflow_on_one_rank_changes_nothing_on_any() -> None:
    for result in run_ranks(2, run_overflows, timeout=LIMIT):
        assert result == [(True, 0.0)] * 4


def message_of(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def other_lr(engine: Any) -> None:
    if dist.get_rank() == 1:
        engine.basic_optimizer.param_groups[0]["lr"] = 0.5


def written_weight(engine: Any) -> None:
    if dist.get_rank() == 1:
        with torch.no_grad():
            next(p for p in engine.module.parameters() if p.numel() > 100).add_(1.0)


def new_storage(engine: Any) -> None:
    if dist.get_rank() == 0:
        engine.module.up.weight.data = engine.module.up.weight.data.clone()


def bad_option(engine: Any) -> None:
    if dist.get_rank() == 1:
        engine.basic_optimizer.param_groups[0]["momentum"] = 7.0


def run_faults() -> dict[str, str]:
    said = {}
    with deepspeed_world():
        for fault in (other_lr, written_weight, new_storage, bad_option):
            engine = start(CASES["stage 1"])
            fault(engine)
            weights = parameters_of(engine.module)
            said[fault.__name__] = message_of(partial(train, engine, Case(1), range(1)))
            assert farthest(parameters_of(engine.module), weights) == 0.0
            engine.destroy()
        config = {"bf16": {"enabled": True, "check_grad_overflow": False}}
        case = Case(2, dtype=BF16, rest=config)
        engine = start(case)
        loss = loss_of(engine.module, batch(0, 0, dist.get_rank()))
        engine.backward(loss * float("inf") if dist.get_rank() == 1 else loss)
        said["unchecked overflow"] = message_of(engine.step)
        engine.destroy()
        said |= run_refusals()
    return said


def run_refusals() -> dict[str, str]:
    import deepspeed

    from distmuon.deepspeed import ZeroOrtho, from_model

    def stage3() -> None:
        model = make_model()
        optimizer = from_model(model)
        config = Case(3).config
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        train(engine, Case(3), range(1))

    class ZeroMuon(ZeroOrtho):
        pass

    def gpt2_params() -> Iterator[dict[str, Any]]:
        yield {"params": list(make_model().named_parameters())[:1], "algorithm": "muon"}

    def replaced() -> None:
        other = start(CASES["stage 1"])
        del other.module.up.weight._dp_group  # as if ZeRO had never seen this parameter
        train(other, Case(1), range(1))

    def by_hand(engine: Any, group: int, algorithm: str, step: int) -> str:
        """What every rank says where one, or after the first step each, has changed a group."""
        if dist.get_rank() == 1 or step > 0:
            engine.basic_optimizer.param_groups[group]["algorithm"] = algorithm
        return message_of(partial(train, engine, Case(1), [step]))

    first, second = start(CASES["stage 1"]), start(CASES["stage 1"])
    hands = {"by hand, vectors": by_hand(first, 2, "muon", 0)}
    train(second, Case(1), range(1))
    hands["by hand"] = by_hand(second, 0, "adamw", 1)
    for other in (first, second):
        other.destroy()
    engine = start(CASES["stage 1"])
    late = {"params": [torch.nn.Parameter(torch.ones(2, 2))], "algorithm": "muon"}
    said = hands | {
        "stage 3": message_of(stage3),
        "name": message_of(lambda: ZeroMuon(gpt2_params())),
        "replaced": message_of(replaced),
        "late group": message_of(lambda: engine.basic_optimizer.add_param_group(late)),
        "bf16 stage 0": message_of(lambda: train(start(Case(0, dtype=BF16)), Case(0), range(1))),
        "outside": message_of(engine.basic_optimizer.step),
    }
    engine.destroy()
    return said


WANTED = {
    "other_lr": "hyperparameters differ between ranks",
    "written_weight": "was written to after deepspeed.initialize",
    "new_storage": "lie in different buffers",
    "bad_option": "Invalid momentum=7.0",
    "unchecked overflow": '"check_grad_overflow": true',
    "stage 3": '"stage": 2',
    "name": 'a name without "muon"',
    "replaced": "Build the optimizer last",
    "late group": "partitions the groups once",
    "bf16 stage 0": '"stage": 1',
    "outside": "never optimizer.step()",
    "by hand, vectors": "Muon takes matrices",
    "by hand": "is adamw now, and was muon when its partition was laid out",
}


def test_a_fault_on_one_rank_raises_on_all() -> None:
    for said in run_ranks(2, run_faults, timeout=LIMIT):
        assert {name: text for name, text in said.items() if WANTED[name] not in text} == {}
        assert said.keys() == WANTED.keys()


# --------------------------------------------------------------------------------------------------
# Checkpoints.

SAVED = {
    "stage 1": CASES["stage 1"],
    "stage 2": CASES["stage 2, round robin, alignment, accumulation"],
    "bf16": CASES["bf16, stage 2, clip 1.0"],
    "BF16_Optimizer": CASES["bf16, BF16_Optimizer"],
    "stage 0": CASES["stage 0"],
}


def full_momenta(engine: Any) -> dict[str, tuple[float, ...]]:
    """Norm of each parameter's whole optimizer state, through DeepSpeed's own accessor."""
    from deepspeed.utils import safe_get_full_optimizer_state

    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    muon = {n for group in engine.basic_optimizer._named[:1] for n, _ in group}
    keys = {n: ("momentum_buffer",) if n in muon else ("exp_avg", "exp_avg_sq") for n, _ in named}
    return {
        name: tuple(float(safe_get_full_optimizer_state(p, key).norm()) for key in keys[name])
        for name, p in named
    }


def save_and_resume(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {}
    with deepspeed_world():
        for name, case in SAVED.items():
            engine = start(case)
            train(engine, case, range(3))
            engine.save_checkpoint(f"{folder}/{name}")
            states = full_momenta(engine) if name == "stage 1" else {}
            train(engine, case, range(3, 6))
            wanted = parameters_of(engine.module)
            engine.destroy()
            resumed = start(case, other_weights(case.dtype))
            resumed.load_checkpoint(f"{folder}/{name}")
            train(resumed, case, range(3, 6))
            results[name] = farthest(parameters_of(resumed.module), wanted)
            resumed.destroy()
            results |= states
        results["refused"] = refuse_other_order(folder)
    return results


def refuse_other_order(folder: str) -> str:
    """What a run says that has the same matrices in another order; DeepSpeed would not notice."""
    import deepspeed

    from distmuon.deepspeed import from_model

    model = make_model()
    optimizer = from_model(model)
    optimizer.param_groups[0]["params"].reverse()
    config = SAVED["stage 1"].config
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    said = message_of(lambda: engine.load_checkpoint(f"{folder}/stage 1"))
    engine.destroy()
    return said


def reshard(folder: str) -> dict[str, float]:
    """Three more steps from what two ranks saved, on however many there are now."""
    from distmuon.deepspeed import load_resharded

    results = {}
    with deepspeed_world():
        for name in ("stage 1", "stage 2", "BF16_Optimizer"):
            case = SAVED[name]
            engine = start(case)
            load_resharded(engine, f"{folder}/{name}")
            loaded = parameters_of(engine.module)
            results[name] = farthest(loaded, reference(case, range(3), 2))
            train(engine, case, range(3, 6))
            results[f"{name}, on"] = farthest(
                parameters_of(engine.module), resumed_reference(case, dist.get_world_size())
            )
            engine.destroy()
    return results


def resumed_reference(case: Case, world_size: int) -> dict[str, Tensor]:
    """Three steps as two ranks, three more as however many."""
    return reference(case, range(6), [2, 2, 2, world_size, world_size, world_size])


def test_resume_is_bit_exact_and_other_world_sizes_load(tmp_path: Path) -> None:
    for result in run_ranks(2, save_and_resume, str(tmp_path), timeout=LIMIT):
        assert {name: result.pop(name) for name in SAVED} == dict.fromkeys(SAVED, 0.0)
        assert "do not lie where this run has them" in result.pop("refused")
        trained = {name for name in result if "unused" not in name}
        assert len(trained) > 8
        assert all(norm > 0 for name in trained for norm in result[name])
    for world_size in (1, 2, 3):
        for result in run_ranks(world_size, reshard, str(tmp_path), timeout=LIMIT):
            # What is loaded is exact; steps on three ranks sum three gradients in gloo's order.
            assert all(far == 0.0 for name, far in result.items() if not name.endswith("on"))
            assert all(far <= 1e-6 for name, far in result.items() if "BF16" not in name), result


PORTABLE = {
    "stage 2": Case(
        2,
        {"round_robin_gradients": True, "parameter_alignment": True},
        options={"momentum_key": "exp_avg"},
    ),
    "bf16": CASES["bf16, stage 2, clip 1.0"],
    "BF16_Optimizer": CASES["bf16, BF16_Optimizer"],
}


def other_weights(dtype: torch.dtype) -> Net:
    model = make_model(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return model


def save_and_load(folder: str) -> dict[str, Any]:
    """Checkpoints of `distmuon.deepspeed.save`: distance after going on, and what is refused."""
    from distmuon.deepspeed import load, save

    results: dict[str, Any] = {}
    with deepspeed_world():
        for name, case in PORTABLE.items():
            engine = start(case)
            train(engine, case, range(2))
            save(f"{folder}/{name}", engine, metadata={"done": 2})
            train(engine, case, range(2, 4))
            wanted = parameters_of(engine.module)
            engine.destroy()
            resumed = start(case, other_weights(case.dtype))
            resumed.basic_optimizer.param_groups[0]["lr"] = 0.5
            assert load(f"{folder}/{name}", resumed).metadata == {"done": 2}
            train(resumed, case, range(2, 4))
            results[name] = farthest(parameters_of(resumed.module), wanted)
            resumed.destroy()
        results["stage 0"] = message_of(lambda: save(folder, start(CASES["stage 0"])))
        results["foreign"] = message_of(lambda: save(folder, start_foreign()))
        results["uneven"] = load_uneven(f"{folder}/uneven")
    return results


def start_foreign() -> Any:
    import deepspeed

    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    return deepspeed.initialize(model=model, optimizer=sgd, config=Case(1).config)[0]


def load_uneven(folder: str) -> str:
    """What is said to a native run's state in which a parameter never had a gradient."""
    from distmuon.deepspeed import load

    model = make_model()
    optimizer = Muon(build_param_groups(model), process_group=dist.group.WORLD)
    loss_of(model, batch(0, 0, 0)).backward()
    optimizer.step()
    checkpoint.save(folder, optimizer, model=model)
    engine = start(CASES["stage 1"])
    weights = parameters_of(engine.module)
    said = message_of(lambda: load(folder, engine))
    assert farthest(parameters_of(engine.module), weights) == 0.0
    return said


def test_checkpoints_without_pickle_resume_to_the_bit(tmp_path: Path) -> None:
    for result in run_ranks(2, save_and_load, str(tmp_path), timeout=LIMIT):
        assert {name: result.pop(name) for name in PORTABLE} == dict.fromkeys(PORTABLE, 0.0)
        assert "In stage 0 nothing is sharded: use engine.save_checkpoint" in result.pop("stage 0")
        assert "The engine has a SGD" in result.pop("foreign")
        assert "has 0 updates of unused." in result["uneven"]
    for result in run_ranks(3, load_and_compare, str(tmp_path), timeout=LIMIT):
        assert result == dict.fromkeys(PORTABLE, 0.0)


def load_and_compare(folder: str) -> dict[str, float]:
    """Distance of what is loaded, on however many ranks there are now, from what was saved."""
    from distmuon.deepspeed import load

    results = {}
    with deepspeed_world():
        for name, case in PORTABLE.items():
            engine = start(case, other_weights(case.dtype))
            load(f"{folder}/{name}", engine)
            loaded = parameters_of(engine.module)
            plain = replace(case, options={})
            results[name] = farthest(loaded, reference(plain, range(2), 2))
            train(engine, case, [2])  # the partitions are compared with the weights first
            engine.destroy()
    return results


LOAD_UNIVERSAL = {"checkpoint": {"load_universal": True}}


def universal(folder: str, kind: str) -> float:
    """Save with the names that DeepSpeed's converter wants, or load what it has made of them."""
    case = Case(
        1, options={"momentum_key": "exp_avg"}, rest=LOAD_UNIVERSAL if kind == "load" else {}
    )
    with deepspeed_world():
        engine = start(case)
        if kind == "save":
            train(engine, case, range(3))
            engine.save_checkpoint(folder, tag="three")
        else:
            engine.load_checkpoint(folder, tag="universal")
            train(engine, case, range(3, 6))
        steps = range(3) if kind == "save" else range(6)
        ranks = 2 if kind == "save" else [2, 2, 2, 3, 3, 3]
        far = farthest(parameters_of(engine.module), reference(Case(1), steps, ranks))
        state = next(iter(engine.basic_optimizer.state.values()))
        assert state["exp_avg_sq"].untyped_storage().nbytes() == 4
        engine.destroy()
        return far


@pytest.mark.slow
def test_the_universal_checkpoint_converts(tmp_path: Path) -> None:
    assert max(run_ranks(2, universal, str(tmp_path), "save", timeout=LIMIT)) == 0.0
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", f"{tmp_path}/three", "--output_folder", f"{tmp_path}/universal"]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    subprocess.run([*command, *folders, *workers], check=True, timeout=LIMIT)
    # Frozen parameters are not in it; this model's are the same in every run.
    assert max(run_ranks(3, universal, str(tmp_path), "load", timeout=LIMIT)) <= 1e-6


def by_name() -> float:
    """Three steps with the optimizer that the configuration names."""
    import deepspeed

    from distmuon.deepspeed import check_config, register, tag

    with deepspeed_world():
        register()
        model = make_model()
        tag(model)
        params = {"lr": LR, "adam_lr": ADAM_LR, "betas": [0.9, 0.95]}
        config = {**Case(2).config, "optimizer": {"type": "DistMuon", "params": params}}
        del config["zero_allow_untested_optimizer"]
        check_config(config, by_name=True)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        train(engine, Case(2), range(3))
        far = farthest(parameters_of(model), reference(Case(2), range(3), 2))
        engine.destroy()
        return far


def test_the_optimizer_can_be_named_in_the_config() -> None:
    assert run_ranks(2, by_name, timeout=LIMIT) == [0.0, 0.0]


def run_training(folder: Path, engine: str) -> list[float]:
    """The losses of a training run of twenty steps on two ranks."""
    script = "train.py" if engine == "native" else "train_deepspeed.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    files = ["--nproc-per-node=2", str(ROOT / "launch" / script)]
    options = ["--config", str(ROOT / "configs/tiny.yaml"), f"run.dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [*command, *files, *options, f"run.name={engine}", "train.log_every=1", "sample.length=0"],
        check=True,
        timeout=2 * LIMIT,
        env={**environment, "DS_ACCELERATOR": "cpu"},
    )
    lines = (folder / engine / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.slow
def test_a_training_run_has_the_same_losses_with_either_engine(tmp_path: Path) -> None:
    native, deepspeed = (run_training(tmp_path, engine) for engine in ("native", "deepspeed"))
    assert len(native) == len(deepspeed) == 20
    assert max(abs(a - b) for a, b in zip(native, deepspeed, strict=True)) <= 1e-5
    assert native[-1] < native[0] - 1.0


@pytest.mark.slow
def test_with_json_deepspeeds_own_lines_are_not_among_the_objects(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    files = ["--nproc-per-node=2", str(ROOT / "launch/train_deepspeed.py"), "--json"]
    options = ["--config", str(ROOT / "configs/tiny.yaml"), f"run.dir={tmp_path}", "train.steps=2"]
    done = subprocess.run(
        [*command, *files, *options],
        check=True,
        timeout=2 * LIMIT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    *steps, end = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["step"] for each in steps] == [1, 2]
    assert end["ok"]
    assert "You are using ZeRO with an untested optimizer" in done.stderr
