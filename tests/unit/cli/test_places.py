"""Files and outputs that no command can use: a line and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distmuon.cli.main import main

ROOT = Path(__file__).parents[3]
LONG = "x" * 300  # longer than a file's name may be
PYTHON = [sys.executable, "-m", "distmuon"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", LONG],
        ["estimate", LONG],
        ["plot", LONG],
        ["init", LONG],
        ["train", "--config", LONG],
        ["ckpt", "inspect", LONG],
        ["ckpt", "verify", LONG],
        ["ckpt", "consolidate", LONG, "out"],
        ["ckpt", "reshard", LONG, "out", "--ranks", "2"],
        ["ckpt", "export", LONG, "out", "--optimizer", "muon"],
        ["plan", "llama-7b", "--cost-model", LONG],
        ["plan", "llama-7b", "--html", LONG],
        ["verify", "--folder", LONG],
        ["bench", "--only", "rates", "--save-cost-model", LONG],
    ],
    ids=lambda arguments: " ".join(arguments[:2]).replace(LONG, "LONG"),
)
def test_a_name_that_no_file_may_have_is_a_mistake_of_use(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    said = capsys.readouterr()
    assert not json.loads(said.out)["ok"]
    assert LONG in said.err


def test_bench_looks_before_it_measures_whether_it_can_write(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file, reason in ((tmp_path, "is a folder"), (tmp_path / "no" / "x", "is no folder")):
        assert main(["bench", "--only", "rates", "--save-cost-model", str(file)]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "verify"])
@pytest.mark.parametrize("limit", ["1e300", "inf", "nan", "0"])
def test_a_time_that_no_timer_holds_is_refused(
    command: str, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--timeout", limit])
    assert caught.value.code == 2
    assert f"{limit} is no number of seconds above 0 and at most 1e+09" in capsys.readouterr().err


def run(command: list[str], redirect: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'"$@" {redirect}', "sh", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )


def test_a_command_without_standard_output_does_its_work(tmp_path: Path) -> None:
    done = run([*PYTHON, "init", str(tmp_path / "run.yaml")], ">&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "run.yaml").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line(tmp_path: Path) -> None:
    done = run([*PYTHON, "init", str(tmp_path / "run.yaml")], ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "distmuon init: output cannot be written: No space left on device."
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_pipe_that_nobody_reads_is_no_error_of_a_command(tmp_path: Path) -> None:
    done = run([*PYTHON, "init", str(tmp_path / "run.yaml")], "| true; sleep 1")
    assert done.stderr == ""
    done = run([sys.executable, "launch/train.py", "--help"], "| head -1")
    assert done.stdout.startswith("usage: launch/train.py")
    assert done.stderr == ""


@pytest.mark.parametrize("flag", [[], ["--json"]])
def test_a_training_that_loses_its_output_says_so_and_fails(
    tmp_path: Path, flag: list[str]
) -> None:
    """It ended with exit code 0, as if it had come to its end."""
    options = ["--config", "configs/tiny.yaml", f"run.dir={tmp_path}", "train.steps=3"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "launch/train.py", *options, *flag],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    os.close(write)
    assert done.returncode == 1
    assert "its output cannot be written ([Errno 32] Broken pipe)" in done.stderr
    assert "Traceback" not in done.stderr
