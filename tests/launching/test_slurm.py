"""launch/slurm.sbatch in a real Slurm, where one is installed: told to stop, queued again, done."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import pytest

from distmuon.training.metrics import read_metrics
from tests.distributed.test_preemption import wait_until
from tests.distributed.test_resume import assert_same_run
from tests.launching.slurm import Slurm, cluster, why_not_here
from tests.launching.test_nodes import ROOT, SAVING, SHORT, in_one_sitting

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_not_here() != "", reason=why_not_here()),
]
LENGTH = ("train.steps=300", *SHORT[1:])
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def submit(slurm: Slurm, folder: Path, *overrides: str) -> str:
    """As a user does, from a folder that looks like the repository."""
    for name in ("launch", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    set_here = f"--export=ALL,PYTHON={sys.executable},NPROC=1,IFACE=lo"
    script = ["launch/slurm.sbatch", "--config", "configs/tiny.yaml"]
    told = slurm.call("sbatch", set_here, *script, *SAVING, *overrides, folder=folder)
    return told.split()[-1]


def test_a_job_that_is_told_to_stop_is_queued_again_and_finishes(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    with cluster(tmp_path) as slurm:
        job = submit(slurm, work, *LENGTH)
        output = work / f"distmuon-{job}.out"

        def printed() -> str:
            return output.read_text() if output.exists() else ""

        wait_until(lambda: "step  15/300" in printed() or slurm.state(job) in ENDED)
        # What --signal=B:USR1@180 does when the time is nearly up.
        slurm.call("scancel", "--signal=USR1", "--batch", job)
        wait_until(lambda: slurm.state(job) in ("PENDING", *ENDED))
        assert slurm.state(job) == "PENDING", printed()
        # Slurm lets a job that was queued again wait for two minutes, counted from its very end.
        wait_until(slurm.nodes_are_idle)
        slurm.call("scontrol", "update", f"jobid={job}", "starttime=now")
        wait_until(lambda: slurm.state(job) in ENDED)
        assert slurm.state(job) == "COMPLETED", printed()
    told = printed()
    stopped = re.search(r"stopped by SIGTERM after step (\d+)/300", told)
    assert stopped is not None, told
    assert 15 <= int(stopped[1]) < 300
    assert f"resumes    after step {stopped[1]} of runs/x/checkpoints/" in told
    assert told.count("ranks      2 on cpu") == 2, "in the same file, on both machines' ranks"
    assert [path.name for path in (work / "runs").iterdir()] == ["x"]
    lines = read_metrics(work / "runs/x/metrics.jsonl")
    assert [line.step for line in lines] == [*range(1, 301)]
    one = in_one_sitting(tmp_path, *LENGTH)
    assert_same_run(one, work / "runs/x")
