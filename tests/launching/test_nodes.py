"""The scripts in launch/ with real launchers: one machine, and two agents that stand for two."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from distmuon.training.metrics import read_metrics
from tests.distributed.test_preemption import RANK, Job, kill, ranks_in, wait_until
from tests.distributed.test_resume import assert_same_run, configure, sit
from tests.distributed.test_train_run import TINY
from tests.harness import run_ranks

# DeepSpeed and Accelerate take half a minute to be imported where others compute as well.
pytestmark = pytest.mark.timeout(600)
LIMIT_SECONDS = 300.0
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for end in ("*.sh", "*.sbatch") for path in (ROOT / "launch").glob(end))
SAVING = ("run.save_every=10", "run.keep_latest=0", "run.name=x", "run.seed=3")
SHORT = ("train.steps=20", "train.log_every=1", "train.eval_every=1000", "sample.length=0")
LONG = ("train.steps=60", *SHORT[1:])


@dataclass(frozen=True, slots=True)
class Way:
    """One way to start two machines with a rank each.

    Attributes:
        script: in launch/.
        told: what a user sets on machine `{number}` of two.
        package: that it needs.
    """

    script: str
    told: Mapping[str, str]
    package: str = "torch"


FIXED = {"HEAD": "127.0.0.1", "PORT": "{port}", "NODE_RANK": "{number}"}
WAYS = {
    "static": Way("nodes_static.sh", {**FIXED, "NNODES": "2", "RESTARTS": "1"}),
    "c10d": Way(
        "nodes_c10d.sh",
        {"HEAD": "127.0.0.1", "PORT": "{port}", "NNODES": "2", "IS_HOST": "{is_first}"},
    ),
    # srun's words, and nothing else: no address, and a port that is made of the job's number.
    "slurm": Way(
        "slurm_node.sh",
        {
            "SLURM_NNODES": "2",
            "SLURM_NODEID": "{number}",
            "SLURM_JOB_ID": "{job}",
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        },
    ),
    "accelerate": Way(
        "with_accelerate.sh",
        {**FIXED, "NNODES": "2", "SETTINGS": str(ROOT / "configs/accelerate/cpu.yaml")},
        "accelerate",
    ),
    "deepspeed": Way("with_deepspeed.sh", {**FIXED, "HOSTFILE": "hosts"}, "deepspeed"),
}


def on_machine(number: int, way: Way, port: int) -> dict[str, str]:
    is_first = "true" if number == 0 else "false"
    # slurm_node.sh makes 20000 and the last four digits of it.
    values = {"number": number, "port": port, "job": port - 20000, "is_first": is_first}
    told = {key: value.format(**values) for key, value in way.told.items()}
    # Its ranks leave their numbers behind; the other launchers start our programs for them.
    program = {} if way.package != "torch" else {"PROGRAM": "rank.py"}
    return {"PYTHON": sys.executable, "NPROC": "1", "IFACE": "lo", **program, **told}


def free_port_of_a_job() -> int:
    """A free port that is 20000 and four digits."""
    for port in range(20000 + os.getpid() % 9000, 30000):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
    raise AssertionError("no free port")


@contextmanager
def agent(
    folder: Path, script: str, told: Mapping[str, str], *arguments: str, name: str
) -> Iterator[Job]:
    """One launcher, as started by hand on its machine."""
    words = [f"{key}={value}" for key, value in told.items()]
    job = Job(["env", *words, "bash", str(ROOT / "launch" / script), *arguments], folder, name)
    try:
        yield job
    finally:
        job.process.kill()
        job.process.wait()
        for number, _ in ranks_in(folder):
            kill(number)


@contextmanager
def two_machines(folder: Path, way: Way, *overrides: str) -> Iterator[tuple[Job, Job]]:
    port = free_port_of_a_job()
    (folder / "rank.py").write_text(RANK)
    (folder / "hosts").write_text("first slots=1\nsecond slots=1\n")
    arguments = (*TINY, *SAVING, *overrides)
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(
                agent(
                    folder,
                    way.script,
                    on_machine(number, way, port),
                    *arguments,
                    name=f"machine-{number}",
                )
            )
            for number in range(2)
        )
        yield first, second


def in_one_sitting(folder: Path, *overrides: str) -> Path:
    config = configure(folder / "one", *overrides, *SAVING)
    assert run_ranks(2, sit, config) == [""] * 2
    return folder / "one/x"


def end_both(jobs: tuple[Job, Job]) -> str:
    """Wait for both; return what rank 0 printed, on whichever machine it was."""
    codes = [job.process.wait(LIMIT_SECONDS) for job in jobs]
    printed = "".join(job.printed for job in jobs)
    assert codes == [0, 0], printed
    assert printed.count("ranks      2 on cpu") >= 1, printed
    return printed


# One of each kind of rendezvous is quick enough for every day.
@pytest.mark.parametrize(
    "name", ["c10d", *(pytest.param(each, marks=pytest.mark.slow) for each in ("static", "slurm"))]
)
def test_two_machines_train_as_one_does_to_the_bit(tmp_path: Path, name: str) -> None:
    with two_machines(tmp_path, WAYS[name], *SHORT) as jobs:
        end_both(jobs)
        parents = {parent for _, parent in ranks_in(tmp_path)}
        assert parents == {job.process.pid for job in jobs}, "each machine has a rank"
    assert_same_run(in_one_sitting(tmp_path, *SHORT), tmp_path / "runs/x")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate", "deepspeed"])
def test_other_launchers_train_on_two_machines(tmp_path: Path, name: str) -> None:
    way = WAYS[name]
    pytest.importorskip(way.package, reason=f"needs the extra distmuon[{way.package}]")
    with two_machines(tmp_path, way, *SHORT) as jobs:
        end_both(jobs)
    assert f"engine: {name}" in (tmp_path / "runs/x/config.yaml").read_text()
    here = read_metrics(tmp_path / "runs/x/metrics.jsonl")
    there = read_metrics(in_one_sitting(tmp_path, *SHORT) / "metrics.jsonl")
    assert [line.step for line in here] == [*range(1, 21)]
    for mine, theirs in zip(here, there, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static", "c10d"])
def test_a_rank_killed_on_the_second_machine_is_started_again(tmp_path: Path, name: str) -> None:
    with two_machines(tmp_path, WAYS[name], *LONG) as jobs:
        wait_until(
            lambda: (
                any("step 15/60" in job.printed for job in jobs)
                or all(job.process.poll() is not None for job in jobs)
            )
        )
        (victim,) = [rank for rank, parent in ranks_in(tmp_path) if parent == jobs[1].process.pid]
        kill(victim)
        printed = end_both(jobs)
    assert printed.count("resumes    after step 10 of runs/x/checkpoints/step-00000010") == 1
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["x"]
    assert_same_run(in_one_sitting(tmp_path, *LONG), tmp_path / "runs/x")


@pytest.mark.slow
def test_one_machine(tmp_path: Path) -> None:
    told = {"PYTHON": sys.executable, "NPROC": "2"}
    arguments = (*TINY, *SAVING, *SHORT)
    with agent(tmp_path, "single_node.sh", told, *arguments, name="only") as job:
        assert job.end() == 0, job.printed
    assert_same_run(in_one_sitting(tmp_path, *SHORT), tmp_path / "runs/x")


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("nodes_static.sh", "NNODES"),
        ("nodes_c10d.sh", "NNODES"),
        ("slurm_node.sh", "SLURM_NNODES"),
        ("with_deepspeed.sh", "NPROC"),
    ],
)
def test_a_script_names_what_it_was_not_told(script: str, missing: str) -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / script)],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert f"{missing}: " in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_whole_and_its_variables_are_on_the_page(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    page = (ROOT / "docs/launching.md").read_text()
    assert script.name in page
    read = set(re.findall(r"\$\{?#?([A-Z][A-Z_]+)", script.read_text()))
    own = {"BASH_SOURCE", "SRUN_CPUS_PER_TASK", "SLURM_CPUS_PER_TASK"}
    own |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE"}  # in docs/training.md
    assert not {name for name in read - own if f"`{name}" not in page}
