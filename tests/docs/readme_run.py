"""The training run that README.md shows: run it, shorten it, compare it with the page.

    python -m tests.docs.readme_run

runs what `make train` runs, about a minute on two quiet cores, and writes what it prints into the
page.
"""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "README.md"
CONFIG = ROOT / "configs" / "shakespeare.yaml"
# Others become "...".
STEPS = (1, 100, 200, 400, 800)
# Rounding differs between kinds of CPUs, and after 800 steps it is in the second decimal.
LOSS_TOLERANCE = 0.03

_SHOWN = re.compile(r"```bash\nmake train\n```\n.*?```text\n(?P<output>.*?)\n```", re.DOTALL)
_STEP = re.compile(r"step +(?P<step>\d+)/\d+  ")
_LOSS = re.compile(r"(?<=loss )\d+\.\d+|(?<=val )\d+\.\d+")
_SAMPLE = re.compile(r"(?<=\n)(sample of .*?:\n).*?\n\n(?=Muon orthogonalized )", re.DOTALL)
_NUMBER = r"\d[\d,.]*(?:e[-+]\d+)?"

# What every run measures anew.
_TIMES = (
    (re.compile(rf"{_NUMBER} tokens/s"), "# tokens/s"),
    (re.compile(rf"optimizer {_NUMBER} ms"), "optimizer # ms"),
    (re.compile(r"eta [\d:]+"), "eta #"),
    (re.compile(r"(?<=steps in )[\d:]+"), "#"),
    (re.compile(rf"\({_NUMBER} bits per byte\)"), "(# bits per byte)"),
)
# What depends on how many steps there are.
_LENGTH = (
    (re.compile(r"step +\d+/\d+"), "step #/#"),
    (re.compile(rf"lr {_NUMBER}  "), "lr #  "),
    (re.compile(rf"(?<=after ){_NUMBER}(?= steps)"), "#"),
    # Ranks compare their plans once.
    (re.compile(rf"agree {_NUMBER} B"), "agree # B"),
    (re.compile(rf"x {_NUMBER} steps = {_NUMBER} of {_NUMBER}"), "x # steps = # of #"),
)

Length = Literal["same", "shorter"]


def shown() -> str:
    """What the page shows."""
    found = _SHOWN.search(PAGE.read_text(encoding="utf-8"))
    assert found, "README.md shows no training run"
    return found["output"]


def shorten(printed: str) -> str:
    """Leave out most steps.

    Args:
        printed: Everything that rank 0 printed.
    """

    def leave_out(line: str) -> bool:
        step = _STEP.match(line)
        return step is not None and int(step["step"]) not in STEPS

    kept: list[str] = []
    for left_out, lines in groupby(printed.strip().splitlines(), leave_out):
        kept += ["..."] if left_out else lines
    return "\n".join(kept)


def run(folder: Path) -> str:
    """Do what `make train` does, in another folder, and return what it prints.

    Args:
        folder: To run in; its `runs` is made.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "launch/train.py"), "--config", str(CONFIG)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout


def losses(text: str) -> list[float]:
    """All losses of a run, in order.

    Args:
        text: What it printed, shortened or not.
    """
    return [float(each) for each in _LOSS.findall(text)]


def form(text: str, length: Length) -> list[str]:
    """The lines of a run without what differs from run to run.

    Args:
        text: What it printed, shortened.
        length: "shorter" to compare with a run of fewer steps.
    """
    masked = _LOSS.sub("#", _SAMPLE.sub(r"\1...\n", text))
    for pattern, mask in (*_TIMES, *(_LENGTH if length == "shorter" else ())):
        masked = pattern.sub(mask, masked)
    lines = masked.splitlines()
    if length == "shorter":
        lines = [line for line, _ in groupby(line for line in lines if line != "...")]
        steps = dict.fromkeys(line for line in lines if line.startswith("step "))
        first = lines.index(next(iter(steps)))
        lines = [line for line in lines if line not in steps]
        lines[first:first] = steps
    return lines


def differences(printed: str, length: Length) -> Sequence[str]:
    """Lines of the page that a run does not print, and the other way round.

    Args:
        printed: By the run, shortened.
        length: As for `form`.
    """
    page = shown()
    found = list(difflib.unified_diff(form(page, length), form(printed, length), lineterm="", n=0))
    if length == "same" and not found:
        pairs = zip(losses(page), losses(printed), strict=True)
        found += [f"{old} {new}" for old, new in pairs if abs(old - new) > LOSS_TOLERANCE]
    return found


def main() -> None:
    """Write the page anew."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        printed = shorten(run(Path(folder)))
    PAGE.write_text(PAGE.read_text(encoding="utf-8").replace(shown(), printed), encoding="utf-8")
    print(printed)


if __name__ == "__main__":
    main()
