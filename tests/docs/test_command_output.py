"""What the documentation shows commands print is what they print."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
from pathlib import Path

import pytest

from distmuon.cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "docs" / "plan.md"]
# A command alone in its block, and the text block after it.
SHOWN = re.compile(
    r"```bash\n(?P<command>distmuon (?:plan|estimate) [^\n]*)\n```\n+```text\n(?P<output>.*?)\n```",
    re.DOTALL,
)


def commands(page: Path) -> list[tuple[str, str]]:
    found = SHOWN.findall(page.read_text(encoding="utf-8"))
    return [(command, output) for command, output in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_shown_output_is_current(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shown = commands(page)
    assert shown, "the page shows no command"
    for command, expected in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert main(shlex.split(command)[1:]) == 0
        actual = printed.getvalue().rstrip().splitlines()
        difference = list(difflib.unified_diff(expected.splitlines(), actual, lineterm=""))
        assert not difference, f"$ {command}{os.linesep}" + os.linesep.join(difference)


def test_every_plan_in_a_text_block_is_checked() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        tables = text.count("sent per rank and step  ") + text.count("bytes per rank  ")
        assert tables == len(commands(page)), page.name
