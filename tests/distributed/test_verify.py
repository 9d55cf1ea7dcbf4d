"""`distmuon verify`: that it passes here, and that every one of its checks can fail."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmuon import matrix_updates
from distmuon.cli import verify
from distmuon.cli.main import main
from distmuon.orthogonalize.pipeline import Polar
from distmuon.selftest import CHECKS, Lab, Mismatch, Row, run_checks
from distmuon.selftest.lab import require_same
from distmuon.selftest.meter import Meter
from distmuon.selftest.run import Plan
from tests.harness import run_ranks

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def check_all(folder: Path) -> list[Row]:
    return list(run_checks(Plan(CPU, folder, limit_s=60)))


def test_all_checks_pass_on_three_ranks(tmp_path: Path) -> None:
    everyone = run_ranks(3, check_all, tmp_path, timeout=120)
    assert [row.check for row in everyone[0]] == list(verify.CHECKS)
    assert [row.status for row in everyone[0]] == ["pass"] * len(CHECKS), everyone[0]
    assert everyone[1] == everyone[0]  # the same table on every rank, times included


def break_each(folder: Path) -> list[Row]:
    rows: list[Row] = []
    for check in CHECKS:
        own = folder / check.name
        own.mkdir(exist_ok=True)
        rows += run_checks(Plan(CPU, own, only=[check.name], sabotage=check.name))
    return rows


SEEN = {
    "peer": "100.0% apart",
    "parity": "wide differs by up to 0.01",
    "work": "31",
    "gradients": "of the way from the start",
    "bytes": "bytes",
    "desync": "no error",
    "missing": "no error",
    "nonfinite": "0",
    "resume": "wide differs by up to",
    "reshard": "wide differs by up to",
}


def test_every_check_notices_what_it_is_there_for(tmp_path: Path) -> None:
    rows = run_ranks(2, break_each, tmp_path, timeout=120)[0]
    assert {row.check for row in rows} == set(SEEN)
    for row in rows:
        assert row.status == "fail", row
        assert SEEN[row.check] in row.seen, row
        assert row.expected, row
        assert row.remedy, row
        assert row.seconds < 15, "no rank waits for one that has failed"
    ranks = {row.check: row.ranks for row in rows}
    assert ranks["parity"] == (1,), "only the rank whose weights were changed"


def drop_an_update(folder: Path) -> list[Row]:
    """The optimizer itself is broken, on one rank: its Newton-Schulz forgets a sign."""
    if dist.get_rank() == 1:
        right = matrix_updates.orthogonalize_each

        def wrong(*matrices: Any, **options: Any) -> Polar:
            polar = right(*matrices, **options)
            return polar._replace(values=-polar.values)

        matrix_updates.orthogonalize_each = wrong
    return list(run_checks(Plan(CPU, folder, only=["parity", "gradients"])))


def test_a_broken_optimizer_is_noticed(tmp_path: Path) -> None:
    rows = run_ranks(2, drop_an_update, tmp_path)[0]
    assert [row.status for row in rows] == ["fail", "fail"]


def send_unplanned() -> dict[str, int]:
    group = dist.new_group()
    with Meter(group) as meter:
        dist.broadcast(torch.zeros(5), src=0, group=group)
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4), [2, 2], [2, 2], group=group)
        dist.barrier(group)
    dist.all_reduce(torch.zeros(3), group=group)  # outside
    return dict(meter.sent)


def test_the_meter_counts_what_others_send_too() -> None:
    for sent in run_ranks(2, send_unplanned):
        assert sent == {"broadcast_": 20, "alltoall_base_": 8}


def test_a_nan_is_a_difference() -> None:
    group: Any = None
    lab = Lab(group, None, 0, 1, CPU, None, sabotage=False)
    good: dict[str, Tensor] = {"a": torch.ones(2), "b": torch.zeros(2)}
    require_same(lab, good, good, "itself")
    with pytest.raises(Mismatch, match="b differs by up to nan"):
        require_same(lab, {**good, "b": torch.tensor([0.0, float("nan")])}, good, "itself")


def run_command(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    launcher = prefix or (sys.executable,)
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [*launcher, "-m", "distmuon", "verify", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


@pytest.mark.slow
def test_the_command_starts_its_own_ranks_and_prints_what_the_page_says() -> None:
    done = run_command()
    assert done.returncode == 0, done.stdout + done.stderr
    page = (ROOT / "docs" / "verify.md").read_text()
    said = page.partition("```text\n")[2].partition("\n```")[0]
    assert without_times(done.stdout) == without_times(said)


def without_times(text: str) -> list[str]:
    """Each line without its seconds, and without what bfloat16 makes of one processor."""
    lines = [re.sub(r"  +[\d.]+  |in \d+ s$|[\d.]+% of", " ", line) for line in text.splitlines()]
    return [line.rstrip() for line in lines if line.strip()]


@pytest.mark.slow
def test_a_failing_line_says_what_was_expected_seen_and_to_be_done() -> None:
    done = run_command("--ranks", "2", "--only", "parity", "--sabotage", "parity")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL parity on rank 1: all ranks compute what one process does" in done.stdout
    assert "expected  parameters bitwise equal to one process" in done.stdout
    assert "saw       wide differs by up to 0.01" in done.stdout
    assert "do        Do not train" in done.stdout
    assert "1 passed, 1 failed, 0 skipped on 2 ranks (cpu)" in done.stdout


@pytest.mark.slow
def test_under_torchrun_it_takes_the_ranks_that_it_is_given() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    done = run_command(
        "--json", "--only", "parity", "resume", prefix=(*torchrun, "--nproc-per-node=3")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads(done.stdout)  # one table, not three
    assert answer["ranks"] == 3
    done = run_command("--ranks", "2", prefix=(*torchrun, "--nproc-per-node=3"))
    assert done.returncode != 0
    assert "the launcher has started 3" in done.stderr


def test_wrong_use_is_told_apart_from_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--folder", "/nowhere/at/all"]) == 2
    if not torch.cuda.is_available():
        assert main(["verify", "--device", "cuda", "--json"]) == 2
        said = capsys.readouterr()
        assert not json.loads(said.out)["ok"]
        assert "torch sees 0 GPUs" in said.err
    with pytest.raises(SystemExit) as caught:
        main(["verify", "--only", "luck"])
    assert caught.value.code == 2


def test_ranks_that_take_too_long_are_a_failing_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--ranks", "2", "--timeout", "0.5", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)["checks"]
    assert row["check"] == "ranks"
    assert "ranks [0, 1] of 2 were still running and were stopped" in row["seen"]
    assert "--timeout" in row["remedy"]
