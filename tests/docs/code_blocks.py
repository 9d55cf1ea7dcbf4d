"""Find and run the Python blocks of a Markdown page.

    python tests/docs/code_blocks.py README.md

runs every block of the page in one namespace, top to bottom, and fails with a traceback that names
the page and the line in it. What a block prints is compared with the `text output` block after it,
where there is one.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^ *(?P<fence>`{3,})(?P<info>[^`]*)$")
_NOT_RUN = re.compile(r"no-run: *(?P<reason>\S.*)")


class PageError(ValueError):
    """A page has a fence that cannot be read, or output that has changed."""


@dataclass(frozen=True, slots=True)
class Block:
    """One Python block.

    Attributes:
        line: Number of its first line of code in the page, from 1.
        code: Its code.
        not_run: Why it is not run; empty if it is.
        output: What the page says that it prints; None if it says nothing.
    """

    line: int
    code: str
    not_run: str = ""
    output: str | None = None


def find_blocks(page: str, name: str) -> list[Block]:
    """List the Python blocks of a page.

    A fence is opened by three backticks and `python`, or, for a block that cannot run here,
    `python no-run: why`.

    Args:
        page: Markdown.
        name: What to call the page in errors.

    Raises:
        PageError: An unknown word after `python`, a `no-run` without a reason, an unclosed fence.
    """
    blocks: list[Block] = []
    for line, info, content in _fences(page, name):
        place = f"{name}:{line - 1}"
        language, _, rest = info.partition(" ")
        if language in ("py", "python3", "pycon"):
            raise PageError(f"{place}: write `python`, not `{language}`")
        if language == "python":
            blocks.append(Block(line, content, _reason(rest.strip(), place)))
        elif info == "text output":
            if not blocks or blocks[-1].not_run or blocks[-1].output is not None:
                raise PageError(f"{place}: no block above has this output")
            blocks[-1] = Block(blocks[-1].line, blocks[-1].code, output=content)
    return blocks


def _fences(page: str, name: str) -> Iterator[tuple[int, str, str]]:
    """Yield first line, info string and content of each fenced block."""
    lines = page.splitlines()
    number = 0
    while number < len(lines):
        opening = _FENCE.match(lines[number])
        number += 1
        if not opening:
            continue
        start = number
        while number < len(lines) and lines[number].strip() != opening["fence"]:
            number += 1
        if number == len(lines):
            raise PageError(f"{name}:{start}: this fence is never closed")
        yield start + 1, opening["info"].strip(), textwrap.dedent("\n".join(lines[start:number]))
        number += 1


def _reason(info: str, place: str) -> str:
    if not info:
        return ""
    found = _NOT_RUN.fullmatch(info)
    if not found:
        raise PageError(f"{place}: `python {info}` must be `python` or `python no-run: why`")
    return found["reason"]


def run_page(path: Path) -> None:
    """Run all blocks of a page in one namespace and compare what they print.

    Raises:
        PageError: A block does not print what the page says.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in find_blocks(path.read_text(encoding="utf-8"), str(path)):
        if block.not_run:
            continue
        # Empty lines in front make the page's own line numbers appear in tracebacks.
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        actual = printed.getvalue().rstrip()
        if block.output is not None and actual != block.output:
            difference = difflib.ndiff(block.output.splitlines(), actual.splitlines())
            raise PageError(
                f"{path}:{block.line}: the block prints something else than the page says\n"
                + "\n".join(difference)
            )


if __name__ == "__main__":
    run_page(Path(sys.argv.pop(1)))  # a page's program sees no arguments
