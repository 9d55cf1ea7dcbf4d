"""The processes of a run: one process group over all of them, or none for a single process.

[Note: teardown]
DDP's C++ reducer holds a reference to the process group. If it is the last one, Python frees the
group while it holds the interpreter lock; the group then joins gloo's threads, and one of them may
wait for that lock to free the tensors of the last collective: the rank hangs at its very end (seen
with torch 2.13 on a busy machine). When Python itself drops the last reference the lock is given
up first. So every DDP wrapper must be gone before `destroy_process_group`.

[Note: meeting again]
torchrun keeps one key-value store for all restarts of a job, and torch's process groups write their
addresses there under the same names every time (pytorch#135712; so in torch 2.13). A rank that is
started again may therefore read the address of a dead one: gloo then fails to connect, and nccl
would wait. The number of the restart is of no help, as agents that joined later count from 0. So
rank 0 gives each meeting a name that was never used, and shows every rank that it is alive by
answering with the secret that this rank has just made up: an answer of the dead cannot have it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from distmuon.errors import see
from distmuon.training.config import ConfigError, Launch, RunConfig

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")

# How often a rank that waits for rank 0 looks again.
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class World:
    """This process among the others.

    Attributes:
        rank: number of this process.
        size: number of processes.
        device: where its model lives.
        group: process group over all ranks, or None for a single process.
    """

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add up some numbers over the ranks, in double precision. A collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return [float(value) for value in tensor.tolist()]

    def largest(self, value: int) -> int:
        """Return the largest of an integer over the ranks. A collective."""
        return max(row[0] for row in self.collect([value]))

    def largest_reals(self, values: Sequence[float]) -> list[float]:
        """Return the largest of each number over the ranks. A collective."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.group is not None:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return [float(value) for value in tensor.tolist()]

    def from_first(self, make: Callable[[], T]) -> T:
        """Let rank 0 alone do something, and hand its result to every rank. A collective.

        Args:
            make: what it does; the result must be picklable.

        Raises:
            ConfigError: on every rank, if rank 0 raises one.
        """
        if self.group is None:
            return make()
        told: list[T | ConfigError | None] = [None]
        if self.rank == 0:
            try:
                told = [make()]
            except ConfigError as error:
                told = [error]
        dist.broadcast_object_list(told, group=self.group, group_src=0, device=self.device)
        (result,) = told
        if isinstance(result, ConfigError):
            raise result
        return result  # type: ignore[return-value]  # no longer the None it was made with

    def collect(self, values: Sequence[int]) -> list[list[int]]:
        """Gather some integers from every rank, in the order of ranks. A collective."""
        tensor = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.group is None:
            return [tensor.tolist()]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return [part.tolist() for part in parts]

    def synchronize(self) -> None:
        """Wait for the device, so that a clock reads what the device really did."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def join_world(config: RunConfig, launch: Launch) -> Iterator[World]:
    """Join the process group that the launcher prepared, and leave it at the end.

    Args:
        config: device and timeout.
        launch: rank and world size.

    Yields:
        This process's place. Without torchrun, or with one process, there is no process group.

    Raises:
        ConfigError: if CUDA is asked for and missing, or has fewer devices than local ranks.
    """
    device = _choose_device(config.device, launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif launch.threads == "unset" and launch.local_world_size > 1:
        # Every rank would take all cores otherwise; torchrun itself sets OMP_NUM_THREADS=1.
        torch.set_num_threads(1)
    if launch.world_size == 1:
        yield World(0, 1, device, None)
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=config.timeout_s)
    found = rendezvous("env://", launch.rank, launch.world_size, timeout=limit)
    store, rank, size = next(iter(found))
    store.set_timeout(limit)
    store = dist.PrefixStore(meet(store, rank, size, limit=limit), store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    yield World(dist.get_rank(), dist.get_world_size(), device, dist.group.WORLD)
    # Not after an exception: other ranks may be inside a collective, and nccl would wait for them.
    dist.destroy_process_group()


def meet(store: Store, rank: int, size: int, *, limit: timedelta) -> str:
    """Agree with the living ranks on a name that no ranks before them had: [Note: meeting again].

    Args:
        store: that all ranks reach; what dead ranks wrote may still be in it.
        rank: of this process.
        size: number of ranks.
        limit: for how long to wait for rank 0.

    Returns:
        The name, equal on all ranks.

    Raises:
        RuntimeError: if rank 0 does not come in time; rank 0 waits as long as the store does.
    """
    secret = secrets.token_hex(8)
    if rank == 0:
        store.set("meeting", secret)
        for other in range(1, size):
            answer = store.get(f"{secret}/{other}/here").decode()
            store.set(f"{secret}/{other}/seen", answer)
        return secret
    began = time.monotonic()
    while time.monotonic() - began < limit.total_seconds():
        meeting: str = store.get("meeting").decode()
        store.set(f"{meeting}/{rank}/here", secret)
        seen = f"{meeting}/{rank}/seen"
        if store.check([seen]) and store.get(seen).decode() == secret:
            return meeting
        time.sleep(POLL_S)
    raise RuntimeError(
        f"Rank {rank} waited {limit} for rank 0 (run.timeout_s). Has it been started?"
        + see("launch")
    )


def _choose_device(wanted: Literal["auto", "cpu", "cuda"], launch: Launch) -> torch.device:
    available = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not available):
        return torch.device("cpu")
    if not available:
        raise ConfigError(
            "run.device=cuda, but torch sees no CUDA device.", key="run.device", entry="launch"
        )
    if launch.local_world_size > torch.cuda.device_count():
        raise ConfigError(
            f"{launch.local_world_size} ranks on this machine, but torch sees "
            f"{torch.cuda.device_count()} CUDA devices. Start one rank per device, or set "
            "run.device=cpu.",
            key="run.device",
            entry="launch",
        )
    return torch.device("cuda", launch.local_rank)
