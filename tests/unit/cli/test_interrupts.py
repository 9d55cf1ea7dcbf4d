"""Ctrl-C at the program: one line, exit code 130, and nobody is left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from distmuon.cli.interrupts import INTERRUPTED, leaving_at_once

ROOT = Path(__file__).parents[3]
# Of a machine on which others compute, too; on a quiet one each takes a second.
LIMIT_S = 60.0
LONG = ("bench", "--only", "contest", "--variants", "adamw-ddp", "--repeats", "1000000")


@dataclass
class Program:
    """`distmuon` in a process group of its own, and all processes that come of it."""

    process: subprocess.Popen[str]
    mark: str

    def members(self) -> dict[int, str]:
        """Everything that inherited the mark, as its command line."""
        found = {}
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if folder.name.isdecimal() and self.mark in (folder / "environ").read_text():
                    found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        return found

    def wait_until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not holds():
            assert time.monotonic() < deadline, what
            time.sleep(0.05)

    def has_imported(self, file: str) -> bool:
        maps = Path(f"/proc/{self.process.pid}/maps")
        return file in maps.read_text()

    def end(self) -> tuple[int, str]:
        """Exit code and standard error, once the pipe is closed by everybody who had it."""
        out, said = self.process.communicate(timeout=LIMIT_S)
        self.wait_until(lambda: not self.members(), "orphans")
        assert out == ""
        return self.process.returncode, said


@pytest.fixture
def start() -> Iterator[Callable[..., Program]]:
    programs: list[Program] = []

    def begin(*arguments: str, program: Sequence[str] = ("-m", "distmuon")) -> Program:
        mark = f"DISTMUON_MARK={uuid.uuid4()}"
        name, _, value = mark.partition("=")
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), name: value},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        programs.append(Program(process, mark))
        return programs[-1]

    yield begin
    for program in programs:
        for pid in program.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        program.process.communicate()


def test_an_interrupt_while_torch_is_imported_is_one_line(start: Callable[..., Program]) -> None:
    program = start("plan", "llama-7b")
    # The first of torch's libraries is there; its Python takes another second or two.
    program.wait_until(lambda: program.has_imported("libtorch_cpu"), "torch")
    program.process.send_signal(signal.SIGINT)
    assert program.end() == (INTERRUPTED, "\ndistmuon plan: interrupted.\n")


@pytest.mark.parametrize("script", ["train", "train_accelerate", "train_deepspeed"])
def test_an_interrupt_while_a_script_imports_torch_is_one_line(
    start: Callable[..., Program], script: str
) -> None:
    program = start("--config", "configs/tiny.yaml", program=[f"launch/{script}.py"])
    program.wait_until(lambda: program.has_imported("libtorch_cpu"), "torch")
    program.process.send_signal(signal.SIGINT)
    assert program.end() == (INTERRUPTED, f"\nlaunch/{script}.py: interrupted.\n")


def measures(program: Program) -> bool:
    """Whether both ranks are at work: the parent, the server and what they need are fewer."""
    return sum("forkserver" in line for line in program.members().values()) >= 3


@pytest.mark.parametrize("to", ["the command", "its group, as a terminal does"])
def test_bench_ends_at_an_interrupt_with_its_ranks(start: Callable[..., Program], to: str) -> None:
    program = start(*LONG)
    program.wait_until(lambda: measures(program), "ranks")
    if to == "the command":
        program.process.send_signal(signal.SIGINT)
    else:
        os.killpg(program.process.pid, signal.SIGINT)
    assert program.end() == (INTERRUPTED, "\ndistmuon bench: interrupted.\n")


@pytest.mark.slow
@pytest.mark.parametrize("after_s", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0])
def test_bench_ends_at_an_interrupt_at_any_moment(
    start: Callable[..., Program], after_s: float
) -> None:
    program = start(*LONG)
    program.wait_until(lambda: program.has_imported("libtorch_cpu"), "torch")
    time.sleep(after_s)
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.end() == (INTERRUPTED, "\ndistmuon bench: interrupted.\n")


def test_ranks_end_when_their_command_is_killed(start: Callable[..., Program]) -> None:
    program = start(*LONG)
    program.wait_until(lambda: measures(program), "ranks")
    program.process.kill()
    assert program.end() == (-signal.SIGKILL, "")


def test_another_handler_stays() -> None:
    def mine(number: int, frame: object) -> None: ...

    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (mine, signal.SIG_IGN):
            signal.signal(signal.SIGINT, handler)
            with leaving_at_once():
                assert signal.getsignal(signal.SIGINT) is handler
            assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with leaving_at_once():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from distmuon.__main__ import main\n"
        "sys.argv[1:] = ['plan', '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'rich', 'matplotlib', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: distmuon plan")
