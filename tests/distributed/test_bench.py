"""`distmuon bench`: what it measures is really measured, and goes where it is promised to go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from distmuon import CostModel
from distmuon.cli import bench
from distmuon.cli.main import main
from distmuon.measure import contest, rates
from distmuon.measure.contest import Result, Track
from distmuon.measure.phases import NAMES, Breakdown, break_down
from distmuon.measure.rates import Rates
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TRACK = Track(32, 1, warmup=1, repeats=3)


def hold_one() -> tuple[list[Result], list[str]]:
    order: list[str] = []
    group = dist.group.WORLD
    assert group is not None

    class Slow(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            order.append("slow")
            time.sleep(0.02 if dist.get_rank() == 1 else 0.0)

    class Fast(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            order.append("fast")

    variants: dict[str, contest.Factory] = {
        "slow": lambda m, g: contest.Case(contest.in_ddp(m, g), Slow(m.parameters(), 1e-3)),
        "fast": lambda m, g: contest.Case(contest.in_ddp(m, g), Fast(m.parameters(), 1e-3)),
    }
    return contest.hold(TRACK, variants, group, CPU), order


def test_contestants_take_turns_and_the_slowest_rank_counts() -> None:
    (results, order), (others, _) = run_ranks(2, hold_one)
    assert results == others
    assert order == ["slow", "fast"] * 4
    slow, fast = results
    assert slow.variant == "slow"
    assert 20 <= slow.optimizer_ms < 200
    assert slow.wall_min_ms >= 20
    assert slow.wall_min_ms <= slow.wall_ms <= slow.wall_max_ms
    assert fast.optimizer_ms < slow.optimizer_ms


def hold_all() -> tuple[list[Result], list[Breakdown]]:
    group = dist.group.WORLD
    assert group is not None
    modes = [break_down(TRACK, reduce, group, CPU) for reduce in ("ddp", "hook", "owned")]
    return contest.hold(TRACK, contest.VARIANTS, group, CPU), modes


def test_every_variant_runs_and_every_phase_is_there() -> None:
    results, modes = run_ranks(3, hold_all)[0]
    assert tuple(result.variant for result in results) == bench.VARIANTS
    assert all(0 < r.wall_min_ms <= r.wall_ms <= r.wall_max_ms for r in results)
    elements = 12 * 32 * 32  # a multiple of 16 on 3 ranks: no padding
    for mode in modes:
        assert set(NAMES.values()) <= set(mode.phases_ms)
        assert 0 < mode.phases_ms["Newton-Schulz"] < mode.step_ms
        assert sum(mode.mean_ms.values()) <= mode.step_ms
        assert mode.phases_ms["publish"] > 0
        publish = 4 * elements * 2 // 3
        assert mode.sent_bytes >= publish * (1 if mode.reduce == "ddp" else 2)
    assert modes[2].phases_ms["reduce"] > 0


def measure() -> tuple[Rates, float, float]:
    group = dist.group.WORLD
    assert group is not None
    found = rates.measure_rates([(64, 32), (32, 32)], group, CPU)

    def nap() -> None:
        time.sleep(0.01 if dist.get_rank() == 1 else 0.0)

    return found, *rates._slowest(nap, 3, group, CPU)


def test_rates_make_a_cost_model() -> None:
    everyone = run_ranks(2, measure)
    assert everyone[0] == everyone[1]
    found, nap, spread = everyone[0]
    assert 0.01 <= nap < 0.1, "the slowest rank's"
    assert spread >= 1
    model = found.cost_model()
    assert model is not None
    assert list(model.measured) == [(32, 32), (32, 64)]
    assert 1e-6 < model.latency < 0.1
    assert 1e6 < model.bandwidth < 1e12
    operations = 5 * (4 * 32 * 32 * 32 + 2 * 32**3) + 5 * (4 * 32 * 32 * 64 + 2 * 32**3)
    assert model.flops == pytest.approx(operations / sum(model.measured.values()))


def measure_alone() -> Rates:
    group = dist.group.WORLD
    assert group is not None
    return rates.measure_rates([(16, 16)], group, CPU)


def test_one_rank_has_no_cost_model() -> None:
    (found,) = run_ranks(1, measure_alone)
    assert found.cost_model() is None
    assert found.flops > 0


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "distmuon", "bench", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


SMALL = ("--dim", "32", "--blocks", "1", "--repeats", "2", "--shapes", "64x32")


@pytest.mark.slow
def test_json_lines_and_the_file_for_the_planner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "machine.json"
    done = run_command(*SMALL, "--json", "--save-cost-model", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["rates"] + ["phases"] * 3 + ["contest"] * 7
    for line in lines:
        assert line["torch"] == torch.__version__
        assert line["ranks"] == 2
        assert line["repeats"] == 2
    content = json.loads(file.read_text())
    assert {key: content[key] for key in content if key != "measured on"} == {
        key: lines[0][key] for key in ("latency", "bandwidth", "flops", "measured")
    }
    assert content["measured on"]["ranks"] == 2
    assert list(content["measured"]) == ["32x64"]
    model = ["configs/tiny.yaml", "--world-size", "2", "--cost-model", str(file), "--json"]
    assert main(["plan", str(ROOT / model[0]), *model[1:]]) == 0
    planned_with = json.loads(capsys.readouterr().out)["cost_model"]
    assert {key: planned_with[key] for key in ("latency", "bandwidth", "flops", "measured")} == {
        key: content[key] for key in ("latency", "bandwidth", "flops", "measured")
    }


@pytest.mark.slow
def test_the_cost_model_can_be_pasted() -> None:
    done = run_command(*SMALL, "--only", "rates")
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("cost_model="))
    model = eval(line.partition("=")[2], {"CostModel": CostModel})
    assert isinstance(model, CostModel)
    assert list(model.measured) == [(32, 64)]
    assert "phases of a step" not in done.stdout


@pytest.mark.parametrize(
    "wrong",
    [
        ["--shapes", "64"],
        ["--shapes", "0x4"],
        ["--variants", "sgd"],
        ["--ranks", "0"],
        ["--only", "luck"],
    ],
)
def test_wrong_use(wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *wrong])
    assert caught.value.code == 2


def test_a_cost_model_that_cannot_be_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(tmp_path / "x.json")
    assert main(["bench", "--ranks", "1", "--save-cost-model", file]) == 2
    assert main(["bench", "--only", "contest", "--save-cost-model", file, "--json"]) == 2
    assert "2 ranks or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "bench", "doctor", "init"])
def test_help_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"\n  distmuon {command}\n" in text, "an example"
    assert "exit codes: 0 done" in text
