from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from distmuon.training.streams import objects_alone

ROOT = Path(__file__).resolve().parents[3]
# As DeepSpeed's logger, gloo's C++ and a compiler's process write; one handler is older.
NOISE = """
import logging, os, subprocess, sys
from distmuon.training.streams import objects_alone
old, new = logging.getLogger("old"), logging.getLogger("new")
old.addHandler(logging.StreamHandler(sys.stdout))
print("before")
with objects_alone() as stdout:
    new.addHandler(logging.StreamHandler(sys.stdout))
    old.warning("old logger")
    new.warning("new logger")
    print("print")
    os.write(1, b"from C++\\n")
    subprocess.run([sys.executable, "-c", "print('a process')"], check=True)
    print("object", file=stdout, flush=True)
new.warning("late")
print("after")
"""


def test_what_libraries_write_goes_to_standard_error() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOISE], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.splitlines() == ["before", "object", "after"]
    said = ["old logger", "new logger", "print", "from C++", "a process", "late"]
    assert sorted(done.stderr.splitlines()) == sorted(said)


def test_an_error_inside_gives_standard_output_back(capfd: pytest.CaptureFixture[str]) -> None:
    with suppress(ZeroDivisionError), objects_alone():
        print("aside", flush=True)
        print(1 / 0)
    print("back", flush=True)
    assert capfd.readouterr() == ("back\n", "aside\n")


def test_output_that_is_caught_in_memory_is_kept_apart_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with objects_alone() as stdout:
        print("aside")
        print("object", file=stdout)
    assert capsys.readouterr() == ("object\n", "aside\n")


JOINED = """
from distmuon.cli.ranks import Team, run_team
def work(device):
    print("a line of a library")
    return str(device)
print(run_team(Team("joined", 1, 0, 1, "cpu", 60.0), work))
"""


def test_a_command_prints_when_its_ranks_are_done() -> None:
    """What `bench` and `verify` do with the ranks of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    done = subprocess.run(
        [sys.executable, "-c", JOINED],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **place},
        check=False,
    )
    assert done.stdout == "['cpu']\n", done.stderr
    assert "a line of a library\n" in done.stderr
