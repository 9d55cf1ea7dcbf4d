"""Run the kernels in Triton's interpreter, in a process of its own.

The interpreter is switched on by a variable that Triton reads while it is imported, for good, and
this process may already have imported it. So the checks of `interpreted/` are a pytest run inside.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
SCRIPTS = sorted(path.name for path in FOLDER.glob("check_*.py"))


def _why_not() -> str:
    """Why the interpreter cannot run here, or nothing."""
    try:
        triton, numpy = (
            tuple(int(part) for part in version(name).split(".")[:2])
            for name in ("triton", "numpy")
        )
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if triton < (3, 7) and numpy >= (2, 4):
        return f"the interpreter of Triton {version('triton')} fails with numpy {version('numpy')}"
    return ""


def test_there_are_checks() -> None:
    assert len(SCRIPTS) >= 1


@pytest.mark.skipif(bool(_why_not()), reason=_why_not())
@pytest.mark.parametrize("script", SCRIPTS)
def test_kernels_are_right_in_the_interpreter(script: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
    ]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, str(FOLDER / script)],
        env={**variables, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
