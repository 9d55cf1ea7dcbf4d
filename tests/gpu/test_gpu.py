"""The checks of `make gpu`: on a GPU in full size, and their own logic on the CPU in small."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_bench, gpu_checks

ROOT = Path(__file__).parents[2]


@pytest.mark.gpu
@pytest.mark.parametrize("check", gpu_checks.CHECKS, ids=lambda check: check.__name__)
def test_on_a_gpu(check: Callable[[torch.device], None]) -> None:
    gpu_checks.run_check(check, torch.device("cuda"))


@pytest.mark.parametrize("check", gpu_checks.CHECKS, ids=lambda check: check.__name__)
def test_the_checks_run(check: Callable[[torch.device], None]) -> None:
    gpu_checks.run_check(check, torch.device("cpu"))


def test_flops_are_those_of_the_study() -> None:
    # 24 x (1024 x 4096), 4096 x 11008 and 4096², in ms at 790 TFLOP/s.
    for shape, expected in (
        ((1024, 4096, 24), 1.24),
        ((4096, 11008, 1), 2.62),
        ((4096, 4096, 1), 1.74),
    ):
        assert gpu_checks.newton_schulz_flops(*shape) / 790e9 == pytest.approx(expected, abs=0.01)


def test_the_benchmark_runs_on_a_cpu_in_small(tmp_path: Path) -> None:
    out = tmp_path / "gpu.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["section"] for line in lines} == {
        "machine", "checks", "products", "newton-schulz", "elementwise", "step",
    }  # fmt: skip
    assert all(line["passed"] for line in lines if line["section"] == "checks")
    assert {line["rule"] for line in lines if line["section"] == "elementwise"} == {
        "momentum", "apply", "adamw", "round", "narrow", "widen",
    }  # fmt: skip
    assert done.stdout.count(": step torch.") == 4, "two aims of two dtypes"


def test_aims_are_told_as_reached_missed_or_not_tried(tmp_path: Path) -> None:
    shape, bound = (1, 4096, 4096), 1.8e-3
    times = {"distmuon": 2.4e-3, gpu.THEIRS: 2.9e-3}
    found = gpu.reached(shape, bound, times)
    assert list(found.values()) == [True, False, None]
    out = tmp_path / "gpu.jsonl"
    out.write_text(json.dumps({"section": "newton-schulz", "shape": shape, "reached": found}))
    first, second, third = gpu.summarize(out)
    assert first == "reached: newton-schulz [1, 4096, 4096]: 70% of the bound"
    assert second.startswith("MISSED: newton-schulz")
    assert third.startswith("not tried: ")
    assert third.endswith("gram-newton-schulz")
    assert gpu.reached((2, 8, 32), bound, times) == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr


def test_a_section_that_fails_leaves_the_others_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise KeyError("distmuon")

    ran: list[int] = []
    bench = gpu_bench.Bench(torch.device("cpu"), tmp_path / "out", time.monotonic() + 60)
    assert not gpu.run_sections({"one": fails, "two": lambda: ran.append(2)}, bench)
    assert gpu.run_sections({"three": lambda: ran.append(3)}, bench)
    assert not gpu.run_sections({"four": fails}, bench)
    late = bench._replace(deadline=time.monotonic() - 1)
    assert gpu.run_sections({"five": lambda: ran.append(5)}, late)
    assert ran == [2, 3]
    shown = capsys.readouterr()
    assert "one failed" in shown.err
    assert "Left out for lack of time: five." in shown.out


def test_it_runs_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert gpu_bench.commit() or not (ROOT / ".git").exists()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bench.commit() == ""
