"""The ranks of a command: those that torchrun started, or as many of our own on this machine."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal, TypeVar

from distmuon.cli.output import USAGE, CommandError, positive, seconds
from distmuon.errors import see, with_entry

T = TypeVar("T")
Device = Literal["auto", "cpu", "cuda"]

# What is left of the other ranks' output is shown when one fails: enough for a traceback.
_TAIL = 3000
# The others are told of a failed rank by their closed connections, or never.
_GRACE_S = 5.0


class RanksError(Exception):
    """The ranks of a command did not come to their end; its text says which and why."""


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks a command runs on, as asked for.

    Attributes:
        kind: "joined" if a launcher has started them, "own" if they are still to be started.
        size: Number of ranks.
        rank: This process among them; 0 for ranks still to be started.
        machines: How many machines they are on, as far as the launcher says.
        device: "cpu" or "cuda".
        limit_s: Seconds that they may take in all.
    """

    kind: Literal["joined", "own"]
    size: int
    rank: int
    machines: int
    device: Literal["cpu", "cuda"]
    limit_s: float


def choose_team(ranks: int | None, device: Device, *, default: int, limit_s: float) -> Team:
    """Decide which ranks a command gets.

    Args:
        ranks: What the user wants; None for the launcher's, or one per GPU, or `default`.
        device: What the user wants; "auto" takes GPUs if there are two or more.
        default: Ranks on a CPU.
        limit_s: Seconds that they may take.

    Returns:
        The team.

    Raises:
        ValueError: if a launcher has started another number of ranks, or GPUs are missing.
    """
    import torch

    from distmuon.training.config import Launch

    launch = Launch.from_environment()
    gpus = torch.cuda.device_count()
    joined = launch.world_size > 1 or torch.distributed.is_torchelastic_launched()
    if joined and ranks not in (None, launch.world_size):
        raise ValueError(
            f"--ranks {ranks}, but the launcher has started {launch.world_size}. Leave --ranks out."
            + see("launch")
        )
    here = launch.local_world_size if joined else ranks or 0
    if device == "auto":
        device = "cuda" if gpus >= max(here, 2) else "cpu"
    if device == "cuda" and gpus < max(here, 1):
        raise ValueError(
            f"--device cuda with {max(here, 1)} ranks on this machine, but torch sees {gpus} GPUs. "
            "Start one rank for each GPU, or use --device cpu." + see("launch")
        )
    if joined:
        machines = launch.world_size // max(launch.local_world_size, 1)
        return Team("joined", launch.world_size, launch.rank, machines, device, limit_s)
    return Team("own", ranks or (gpus if device == "cuda" else default), 0, 1, device, limit_s)


def add_rank_options(parser: argparse.ArgumentParser, *, default: int, limit_s: float) -> None:
    """Add the options of every command that runs on ranks.

    Args:
        parser: Of the command.
        default: Ranks on a CPU.
        limit_s: Seconds that they may take.
    """
    parser.add_argument(
        "--ranks",
        type=positive,
        help=f"ranks to start (default: one for each GPU if there are two or more, else {default})",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto"
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=limit_s,
        metavar="SECONDS",
        help=f"stop ranks that take longer (default: {limit_s:g})",
    )


def team_of(options: argparse.Namespace, *, default: int) -> Team:
    """The ranks that a command line asks for.

    Args:
        options: With those of `add_rank_options`.
        default: Ranks on a CPU.

    Raises:
        CommandError: if it cannot have them.
    """
    try:
        return choose_team(options.ranks, options.device, default=default, limit_s=options.timeout)
    except ValueError as error:
        raise CommandError(str(error), code=USAGE, entry="launch") from None


def run_team(team: Team, function: Callable[..., T], *arguments: Any) -> list[T]:
    """Call a function on every rank, in a process group over all of them.

    Args:
        team: The ranks.
        function: At the top level of a module; called with the rank's torch.device and the
            arguments. The default process group is gloo; groups on GPUs are its own to make.
        *arguments: Picklable.

    Returns:
        What each of our own ranks returned, in their order; only this process's if it has joined.

    Raises:
        RanksError: if a rank raised, died, or was not done in time.
    """
    if team.kind == "joined":
        from distmuon.training.config import Launch
        from distmuon.training.streams import objects_alone

        launch = Launch.from_environment()
        with objects_alone():  # the command prints when its ranks are done
            _enter(team, launch.local_rank, "env://", launch.rank)
            return [_call(team, launch.local_rank, function, arguments)]
    message = pickle.dumps((function, arguments))
    # A rank that was killed a moment ago may still be writing.
    with tempfile.TemporaryDirectory(prefix="distmuon-", ignore_cleanup_errors=True) as name:
        return _run_own(team, message, Path(name))


# --------------------------------------------------------------------------------------------------
# The parent of our own ranks.


def _run_own(team: Team, message: bytes, folder: Path) -> list[Any]:
    # Importing torch takes seconds: one server does it, and the ranks fork from it. It never
    # computes, so it has no threads and no CUDA context when it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "distmuon.optimizer"])
    _start_server()
    processes = [
        context.Process(target=_rank_main, args=(team, rank, str(folder), message), daemon=True)
        for rank in range(team.size)
    ]
    started = []
    try:
        for process in processes:
            process.start()
            started.append(process)
        _wait(processes, folder, team.limit_s)
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        return _settle(team, folder, late)
    finally:
        for process in started:
            process.kill()
            process.join()


def _start_server() -> None:
    """Start the fork server, which Ctrl-C shall not strike: it ends with this process."""
    # First, as it unblocks the signal where it starts this one.
    multiprocessing.resource_tracker.ensure_running()
    # The server inherits the mask, and so do the ranks.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(processes: Sequence[ForkServerProcess], folder: Path, limit_s: float) -> None:
    """Until all have ended, or the limit, or a moment after one has failed."""
    deadline = time.monotonic() + limit_s
    running = {process.sentinel: rank for rank, process in enumerate(processes)}
    while running and time.monotonic() < deadline:
        ended = multiprocessing.connection.wait(list(running), deadline - time.monotonic())
        for rank in (running.pop(sentinel) for sentinel in ended if isinstance(sentinel, int)):
            if not _read(folder, rank)[0]:
                deadline = min(deadline, time.monotonic() + _GRACE_S)


def _settle(team: Team, folder: Path, late: Sequence[int]) -> list[Any]:
    results = [_read(folder, rank) for rank in range(team.size)]
    failed = [rank for rank, (fine, _) in enumerate(results) if not fine and rank not in late]
    if not failed and not late:
        return [value for _, value in results]
    lines = []
    if late:
        lines.append(f"ranks {late} of {team.size} were still running and were stopped")
    if failed:
        said = results[failed[0]][1] or "it died without a word"
        lines.append(f"rank {failed[0]} of {team.size} failed: {said}")
    shown = (failed or late)[0]
    lines.append(f"last output of rank {shown}:\n{_output(folder, shown) or '(none)'}")
    raise RanksError(with_entry("\n".join(lines), "one-rank-stopped"))


def _read(folder: Path, rank: int) -> tuple[bool, Any]:
    """Whether a rank has come to its end, and its result or its error."""
    try:
        fine, value = pickle.loads((folder / f"result-{rank}").read_bytes())
    except FileNotFoundError:
        return False, None
    return fine, value


def _output(folder: Path, rank: int) -> str:
    path = folder / f"output-{rank}"
    text = path.read_text(errors="replace") if path.exists() else ""
    # gloo announces every group it connects.
    kept = [line for line in text.splitlines() if not line.startswith("[Gloo]")]
    return "\n".join(kept)[-_TAIL:]


# --------------------------------------------------------------------------------------------------
# A rank.


def _rank_main(team: Team, rank: int, folder: str, message: bytes) -> None:
    place = Path(folder)
    # What ranks print would be mixed; it is shown if one fails.
    try:
        descriptor = os.open(place / f"output-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    except FileNotFoundError:
        os._exit(1)  # The command was interrupted before it knew this process, and is gone.
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its ranks
    # If the parent is killed, or interrupted before it knows this process, nobody else ends it.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.alarm(int(team.limit_s + 2 * _GRACE_S))
    try:
        function, arguments = pickle.loads(message)
        _enter(team, rank, f"file://{place / 'rendezvous'}", rank)
        answer = (True, _call(team, rank, function, arguments))
    except BaseException as error:
        traceback.print_exc()
        answer = (False, f"{type(error).__name__}: {error}")
    part = place / f"part-{rank}"
    part.write_bytes(pickle.dumps(answer))
    part.rename(place / f"result-{rank}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's exit: threads of a broken group may wait for peers for ever.
    os._exit(0)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "ranks are started by the command"
    parent.join()
    os._exit(1)


def _enter(team: Team, local_rank: int, address: str, rank: int) -> None:
    """Join the process group of the team."""
    import torch
    import torch.distributed as dist

    from distmuon.training.config import Launch, prefer_environment

    if team.device == "cuda":
        torch.cuda.set_device(local_rank)
    elif Launch.from_environment().threads == "unset" and team.size > 1:
        torch.set_num_threads(1)  # every rank would take all cores otherwise
    if team.kind == "own" and any(name == "lo" for _, name in socket.if_nameindex()):
        # gloo looks up the machine's own name otherwise, which a container may not know.
        prefer_environment("GLOO_SOCKET_IFNAME", "lo")
    limit = timedelta(seconds=team.limit_s)
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=team.size, timeout=limit
    )


def _call(team: Team, local_rank: int, function: Callable[..., T], arguments: Sequence[Any]) -> T:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", local_rank) if team.device == "cuda" else torch.device("cpu")
    value = function(device, *arguments)
    dist.destroy_process_group()
    return value
