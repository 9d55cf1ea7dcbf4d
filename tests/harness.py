"""Run a test on several real gloo ranks.

`run_ranks` starts one process per rank, lets them meet through a file in a temporary folder (never
a port, which two test runs could fight over), and hands back each rank's result, in rank order.
`distributed` turns a test into one whose whole body runs on every rank.

    def total(rank_value: int) -> float:
        x = torch.tensor(float(dist.get_rank() + rank_value))
        dist.all_reduce(x)
        return x.item()

    assert run_ranks(3, total, 1) == [6.0, 6.0, 6.0]

A rank that raises fails the test with its own traceback; a rank that hangs is killed at the limit
and the failure shows the line where it stood. Under torchrun (`RANK` is set) nothing is started:
the processes that torchrun started join and run the body themselves, so that a debugger works:

    torchrun --standalone --nproc-per-node=3 -m pytest -s tests/unit/test_harness.py::test_body

with `torch.distributed.breakpoint(rank=1)` at the line in question.
"""

from __future__ import annotations

import atexit
import datetime
import faulthandler
import functools
import gc
import importlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import pytest
import torch
import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")

LIMIT_SECONDS = 60.0

# What the other ranks get to notice that one has failed (gloo tells them when its sockets close).
_GRACE_SECONDS = 3.0
# What a killed rank gets to write down where it stands.
_STACK_SECONDS = 0.5


class RankFailure(AssertionError):
    """One or more ranks raised, died, or did not finish in time."""


@dataclass(frozen=True, slots=True)
class _Record:
    """How one rank ended; written by the rank, read by the parent."""

    outcome: Literal["returned", "raised", "skipped"]
    moment: float
    value: Any = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class _Call:
    """What every rank shall do."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def run_ranks(
    world_size: int,
    function: Callable[..., T],
    *args: object,
    timeout: float = LIMIT_SECONDS,
) -> list[T]:
    """Run `function(*args)` on every rank of a gloo group and return the results in rank order.

    Args:
        world_size: Number of ranks, at least 1.
        function: A function at the top level of a module; inside it `torch.distributed` is ready.
        *args: Picklable arguments, tensors and modules included; every rank gets its own copy.
        timeout: Seconds after which ranks still running are killed.

    Returns:
        One picklable result for each rank. Tensors come back by value.

    Raises:
        RankFailure: A rank raised, died or was still running at the limit.
    """
    __tracebackhide__ = True
    return _run(world_size, _Call(function, args, {}), timeout)


@dataclass(frozen=True, slots=True)
class Ended:
    """How one rank of `run_until_lost` ended.

    Attributes:
        value: What the function returned; None if the rank did not get that far.
        exit_code: Negative signal number for a killed rank; None for one that hung.
    """

    value: Any
    exit_code: int | None


def run_until_lost(
    world_size: int,
    function: Callable[..., object],
    *args: object,
    group_timeout: float,
    timeout: float = LIMIT_SECONDS,
) -> list[Ended]:
    """Run `function(*args)` on every rank, some of which are meant to die.

    Args:
        world_size: Number of ranks.
        function: As for `run_ranks`; a rank that it kills ends there.
        *args: As for `run_ranks`.
        group_timeout: The process group's own timeout in seconds.
        timeout: Seconds after which ranks still running are killed.

    Returns:
        How each rank ended.

    Raises:
        RankFailure: A rank raised.
    """
    __tracebackhide__ = True
    message = pickle.dumps(_Call(function, args, {}))
    with tempfile.TemporaryDirectory(prefix="distmuon-ranks-") as name:
        folder = Path(name)
        codes = _start_and_wait(
            world_size, message, folder, timeout, group_timeout=group_timeout, grace=timeout
        )
        records = {rank: _read_record(folder, rank) for rank in range(world_size)}
    for rank, record in records.items():
        if record is not None and record.outcome != "returned":
            raise RankFailure(f"rank {rank} of {world_size} {record.outcome}:\n{record.text}")
    return [Ended(record and record.value, codes[rank]) for rank, record in records.items()]


def distributed(
    *, world_size: int, timeout: float = LIMIT_SECONDS
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a test run on `world_size` ranks; fixtures and parameters reach every rank by value.

    Args:
        world_size: Number of ranks.
        timeout: Seconds after which ranks still running are killed.

    Returns:
        The decorator.
    """

    def decorate(body: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(body)
        def on_every_rank(*args: P.args, **kwargs: P.kwargs) -> None:
            __tracebackhide__ = True
            # The module's name for the body is this wrapper, so the body itself cannot be pickled.
            place = (body.__module__, body.__qualname__)
            _run(world_size, _Call(_run_body, (place, args, kwargs), {}), timeout)

        return on_every_rank

    return decorate


def _run_body(place: tuple[str, str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    module, name = place
    wrapper = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    wrapper.__wrapped__(*args, **kwargs)


def _run(world_size: int, call: _Call, timeout: float) -> list[Any]:
    __tracebackhide__ = True
    if world_size < 1:
        raise ValueError(f"Invalid {world_size=}. Must be >= 1.")
    if "RANK" in os.environ:
        return _join_torchrun(world_size, call)
    try:
        message = pickle.dumps(call)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TypeError(
            f"{call.function!r} or one of its arguments cannot be sent to another process: {error}."
            " Put the function at the top level of a module and give it picklable arguments."
        ) from error
    with tempfile.TemporaryDirectory(prefix="distmuon-ranks-") as name:
        folder = Path(name)
        stuck = _start_and_wait(world_size, message, folder, timeout)
        records = {rank: _read_record(folder, rank) for rank in range(world_size)}
        outputs = {rank: _read_output(folder, rank) for rank in range(world_size)}
    return _settle(records, outputs, stuck, timeout)


# --------------------------------------------------------------------------------------------------
# The parent.


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    """A server process with torch imported, from which ranks fork in milliseconds.

    Importing torch anew takes several seconds for each rank. The server itself never computes, so
    it has one thread and no OpenMP pool when it forks, and no rank can inherit a held lock.
    `torch._dynamo` is there because the first `torch.optim.Optimizer` of a process imports it, and
    the others because they take seconds; what is not installed is passed over.
    """
    context = multiprocessing.get_context("forkserver")
    modules = ["torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "pytest"]
    frameworks = ["accelerate", "transformers.trainer", "transformers.models.llama.modeling_llama"]
    context.set_forkserver_preload([*modules, *frameworks])
    return context


def _start_and_wait(
    world_size: int,
    message: bytes,
    folder: Path,
    timeout: float,
    *,
    group_timeout: float | None = None,
    grace: float = _GRACE_SECONDS,
) -> dict[int, int | None]:
    """Run all ranks to their end or the limit, or to `grace` after one has failed.

    Returns:
        Exit code by rank; None for a rank that had to be killed.
    """
    processes: list[ForkServerProcess] = []
    environment, group_limit = dict(os.environ), group_timeout or timeout
    deadline = time.monotonic() + timeout
    try:
        for rank in range(world_size):
            process = _context().Process(
                target=_rank_main,
                args=(
                    rank,
                    world_size,
                    str(folder),
                    message,
                    group_limit,
                    environment,
                ),
                name=f"rank-{rank}",
            )
            process.start()
            processes.append(process)
        running = set(range(world_size))
        while running and time.monotonic() < deadline:
            sentinels = {processes[rank].sentinel: rank for rank in running}
            ready = multiprocessing.connection.wait(
                list(sentinels), timeout=deadline - time.monotonic()
            )
            for sentinel in ready:
                rank = sentinels[sentinel]  # type: ignore[index]  # wait() returns what it was given
                processes[rank].join()
                running.discard(rank)
                record = _read_record(folder, rank)
                if record is None or record.outcome == "raised":
                    deadline = min(deadline, time.monotonic() + grace)
        _ask_where(processes[rank] for rank in running)
        return {
            rank: None if rank in running else processes[rank].exitcode
            for rank in range(world_size)
        }
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
            process.close()


def _ask_where(stuck: Iterable[ForkServerProcess]) -> None:
    """Make ranks about to be killed write their stacks into their output."""
    asked = [process for process in stuck if process.pid is not None]
    for process in asked:
        os.kill(process.pid, signal.SIGUSR1)  # type: ignore[arg-type]  # not None: filtered above
    if asked:
        time.sleep(_STACK_SECONDS)


def _settle(
    records: Mapping[int, _Record | None],
    outputs: Mapping[int, str],
    exit_codes: Mapping[int, int | None],
    timeout: float,
) -> list[Any]:
    """Turn what the ranks left behind into results, a skip, or one failure that tells all."""
    __tracebackhide__ = True
    world_size = len(records)
    ended = {rank: record for rank, record in records.items() if record is not None}
    stuck = [rank for rank, code in exit_codes.items() if code is None]
    died = [rank for rank in records if rank not in ended and rank not in stuck]
    raised = sorted(
        (rank for rank, record in ended.items() if record.outcome == "raised"),
        key=lambda rank: ended[rank].moment,
    )
    for rank, output in outputs.items():
        for line in output.splitlines():
            print(f"[rank {rank}] {line}")
    if not (stuck or died or raised):
        skipped = [record.text for record in ended.values() if record.outcome == "skipped"]
        if skipped:
            pytest.skip(skipped[0])
        return [ended[rank].value for rank in range(world_size)]

    parts: list[str] = []
    parts += [f"rank {r} of {world_size} died with exit code {exit_codes[r]}." for r in died]
    if raised:
        parts.append(f"rank {raised[0]} of {world_size} raised:\n{ended[raised[0]].text}")
    parts += [f"rank {r} raised later: {_last_line(ended[r].text)}" for r in raised[1:]]
    if stuck and (raised or died):
        parts.append(
            f"ranks {stuck} were still running {_GRACE_SECONDS:g} s later and were killed."
        )
    elif stuck:
        finished = [rank for rank in records if rank not in stuck]
        parts.append(
            f"ranks {stuck} of {world_size} were still running after {timeout:g} s and were killed;"
            f" finished: {finished}."
        )
        parts += [f"rank {rank} stood at:\n{outputs[rank]}" for rank in stuck]
    raise RankFailure("\n".join(parts))


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def _read_record(folder: Path, rank: int) -> _Record | None:
    try:
        record: _Record = pickle.loads((folder / f"record-{rank}").read_bytes())
    except FileNotFoundError:
        return None
    return record


def _read_output(folder: Path, rank: int) -> str:
    try:
        text = (folder / f"output-{rank}").read_text(errors="replace")
    except FileNotFoundError:
        return ""
    # gloo announces every connected mesh on standard error.
    return "\n".join(line for line in text.splitlines() if not line.startswith("[Gloo]"))


# --------------------------------------------------------------------------------------------------
# A rank.


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    message: bytes,
    timeout: float,
    environment: Mapping[str, str],
) -> None:
    _redirect_output(Path(folder) / f"output-{rank}")
    # The server was started before this test: what the test has set since must reach the rank.
    os.environ.clear()
    os.environ.update(environment)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    # If the parent is killed outright nobody is left to end this process; the kernel then does.
    signal.alarm(int(max(timeout, LIMIT_SECONDS) + _GRACE_SECONDS + 30))
    if any(name == "lo" for _, name in socket.if_nameindex()):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    record = _perform(rank, world_size, Path(folder), message, timeout)
    path = Path(folder) / f"record-{rank}"
    temporary = path.with_suffix(".part")
    try:
        temporary.write_bytes(pickle.dumps(record))
    except Exception:
        text = f"The result of rank {rank} cannot be pickled.\n{traceback.format_exc()}"
        temporary.write_bytes(pickle.dumps(_Record("raised", time.monotonic(), text=text)))
    temporary.replace(path)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's exit: a failed rank's gloo threads may wait for peers for ever.
    os._exit(0)


def _perform(rank: int, world_size: int, folder: Path, message: bytes, timeout: float) -> _Record:
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        call: _Call = pickle.loads(message)
        value = call.function(*call.args, **call.kwargs)
        # A DDP wrapper that outlives the group can hang gloo's threads: [Note: teardown] in
        # distmuon/training/world.py.
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()
    except pytest.skip.Exception as skip:
        return _Record("skipped", time.monotonic(), text=str(skip))
    except BaseException:  # SystemExit and pytest.fail too: the parent must learn of them.
        return _Record("raised", time.monotonic(), text=traceback.format_exc())
    return _Record("returned", time.monotonic(), value=value)


def _redirect_output(path: Path) -> None:
    """Send Python's and C++'s output to a file, and stacks on SIGUSR1 with it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    faulthandler.enable(file=descriptor)
    faulthandler.register(signal.SIGUSR1, file=descriptor, all_threads=True)


# --------------------------------------------------------------------------------------------------
# Under torchrun.


def _join_torchrun(world_size: int, call: _Call) -> list[Any]:
    """Run the call on the ranks that torchrun started, in this very process."""
    started = int(os.environ["WORLD_SIZE"])
    if started != world_size:
        pytest.skip(f"needs {world_size} ranks, torchrun started {started}")
    if not dist.is_initialized():
        dist.init_process_group("gloo")
        atexit.register(dist.destroy_process_group)
    # As when spawned, all ranks see one process's arguments: tmp_path, for one, differs by rank.
    box = [pickle.dumps((call.args, call.kwargs))]
    dist.broadcast_object_list(box, src=0)
    args, kwargs = pickle.loads(box[0])
    results: list[Any] = [None] * world_size
    dist.all_gather_object(results, call.function(*args, **kwargs))
    return results
