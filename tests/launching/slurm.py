"""A real Slurm of two nodes on this machine: its daemons, without root's services or settings."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.test_preemption import free_port, wait_until
from tests.distributed.test_train_run import environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")

SETTINGS = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Slurm:
    """A running cluster.

    Attributes:
        variables: of the environment of its commands.
    """

    variables: dict[str, str]

    def call(self, *command: str, folder: Path | None = None) -> str:
        done = subprocess.run(
            command,
            cwd=folder,
            env=self.variables,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", job).split()
        (state,) = (word for word in words if word.startswith("JobState="))
        return state.removeprefix("JobState=")

    def nodes_are_idle(self) -> bool:
        try:
            return self.call("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"]
        except AssertionError:
            return False  # the controller has not opened its port yet


def why_not_here() -> str:
    """Say what this machine lacks; empty if it has all."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"needs Slurm (Debian: slurmctld slurmd slurm-client munge), has no {missing[0]}"
    return "" if os.geteuid() == 0 else "slurmd must be root"


@contextmanager
def cluster(folder: Path) -> Iterator[Slurm]:
    """Start the daemons, wait until both nodes are idle, and end them."""
    ports = [free_port() for _ in range(3)]
    settings, key = folder / "slurm.conf", folder / "key"
    settings.write_text(SETTINGS.format(host=socket.gethostname(), folder=folder, ports=ports))
    (folder / "state").mkdir()
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    munge = [f"--socket={folder}/munge.sock", f"--key-file={key}", f"--seed-file={folder}/seed"]
    munge += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log"]
    commands = [["munged", "--foreground", "--force", *munge]]
    commands += [["slurmctld", "-D", "-f", str(settings)]]
    commands += [["slurmd", "-D", "-N", name, "-f", str(settings)] for name in ("n1", "n2")]
    slurm = Slurm(environment() | {"SLURM_CONF": str(settings)})
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for number, command in enumerate(commands):
            (folder / f"spool-n{number}").mkdir()
            log = (folder / f"daemon-{number}.log").open("wb")
            daemons.append(
                subprocess.Popen(command, env=slurm.variables, stdout=log, stderr=log, cwd=folder)
            )
            log.close()
            if number == 0:
                wait_until((folder / "munge.sock").exists)
        wait_until(slurm.nodes_are_idle)
        yield slurm
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(60)
