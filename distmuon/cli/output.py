"""How commands talk: tables, JSON, errors and exit codes.

A command raises `CommandError` for what it cannot do; `cli.main` prints it, as JSON too where that
was asked for, and returns its exit code.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from distmuon.errors import Entry, with_entry
from distmuon.pictures.page import Grid
from distmuon.units import LONGEST_S

# The exit codes of every command, with 130 for Ctrl-C (interrupts.py); `distmuon --help` and
# docs/plan.md say them too.
DONE = 0
BROKEN = 1
USAGE = 2

EXIT_CODES = (
    "exit codes: 0 done, 1 what was looked at is wrong, 2 the command was used wrongly, 130 Ctrl-C"
)

Align = Literal["left", "right"]


class CommandError(Exception):
    """A command cannot go on.

    Attributes:
        code: The exit code, `BROKEN` or `USAGE`.
    """

    def __init__(self, message: str, *, code: int = USAGE, entry: Entry = "command") -> None:
        """Keep the exit code beside the message.

        Args:
            message: What is wrong, what was expected, how to fix it.
            code: The process's exit code.
            entry: Of docs/errors.md, unless the message holds another error's.
        """
        super().__init__(with_entry(message, entry))
        self.code = code


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        title: Shown above it.
        align: "right" for numbers.
    """

    title: str
    align: Align = "left"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under titles.

    Attributes:
        columns: At least one.
        rows: A text for each column; all formatted already.
        title: Above the table; empty for none.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add `--json`, which every command has.

    Args:
        parser: Of the command.
    """
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1.

    Args:
        text: What the user wrote.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return number


def seconds(text: str) -> float:
    """For argparse: a time that is more than none and fits into a timer.

    Args:
        text: What the user wrote.

    Raises:
        argparse.ArgumentTypeError: if it is none.
    """
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number <= LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text} is no number of seconds above 0 and at most {LONGEST_S:g}"
        )
    return number


def print_table(table: Table, *, file: TextIO | None = None) -> None:
    """Print a table: with rich where that is installed and a person looks, else as plain text.

    Plain text is never cut or wrapped, whatever the width of the terminal, so that it can be piped.

    Args:
        table: What to print.
        file: Where to; None for standard output.
    """
    out = file or sys.stdout
    if out.isatty() and importlib.util.find_spec("rich") is not None:
        _print_rich(table, out)
    else:
        print(format_table(table), file=out)


def format_table(table: Table) -> str:
    """Lay a table out as plain text.

    Args:
        table: What to lay out.

    Returns:
        Lines without trailing spaces; columns are two spaces apart.
    """
    lines = [tuple(column.title for column in table.columns), *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    text = [table.title] if table.title else []
    for line in lines:
        cells = (
            cell.rjust(width) if column.align == "right" else cell.ljust(width)
            for cell, width, column in zip(line, widths, table.columns, strict=True)
        )
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


def as_grid(table: Table) -> Grid:
    """The same table for a page.

    Args:
        table: Its title is left out: a page has headings.
    """
    numbers = frozenset(i for i, column in enumerate(table.columns) if column.align == "right")
    return Grid(tuple(column.title for column in table.columns), table.rows, numbers)


def _print_rich(table: Table, out: TextIO) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD, title=table.title or None, title_justify="left")
    for column in table.columns:
        drawn.add_column(column.title, justify=column.align, overflow="fold")
    for row in table.rows:
        # As Text: a shape in brackets is no markup.
        drawn.add_row(*map(Text, row))
    Console(file=out).print(drawn)


def format_facts(facts: Iterable[tuple[str, str]]) -> str:
    """Lay pairs of a name and a text out in two columns.

    Args:
        facts: The pairs; a text may have several lines.

    Returns:
        One line for each line of text, aligned.
    """
    pairs = list(facts)
    width = max((len(name) for name, _ in pairs), default=0)
    lines = []
    for name, text in pairs:
        for number, line in enumerate(text.splitlines() or [""]):
            lines.append(f"{'' if number else name:<{width}}  {line}".rstrip())
    return "\n".join(lines)


def print_json(answer: Mapping[str, Any], *, ok: bool = True) -> None:
    """Print one JSON object on standard output.

    Args:
        answer: Its content. Dataclasses become objects, paths text, numbers that are not finite
            null: JSON has no word for them.
        ok: Becomes the first key.
    """
    print(json.dumps({"ok": ok, **_plain(answer)}, indent=1, allow_nan=False))


def print_error(command: str, message: str, options: argparse.Namespace) -> None:
    """Say on standard error what is wrong; with `--json` on standard output too.

    Args:
        command: Its name.
        message: What is wrong.
        options: The parsed command line.
    """
    if getattr(options, "json", False):
        print_json({"error": message}, ok=False)
    print(f"distmuon {command}: {message}", file=sys.stderr)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that was asked for by an option.

    Args:
        path: Where to; its folder must exist.
        content: Text is written as UTF-8.

    Raises:
        CommandError: if it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        path.write_bytes(data)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"{path} cannot be written: {reason}.") from error


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
