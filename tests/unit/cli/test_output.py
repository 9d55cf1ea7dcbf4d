"""What every command prints with: tables, JSON, errors."""

from __future__ import annotations

import argparse
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from distmuon.cli import main as command_line
from distmuon.cli.interrupts import INTERRUPTED
from distmuon.cli.output import (
    BROKEN,
    USAGE,
    Column,
    CommandError,
    Table,
    add_json_option,
    format_facts,
    format_table,
    positive,
    print_json,
    print_table,
    seconds,
    write_file,
)

TABLE = Table(
    (Column("name"), Column("bytes", "right")),
    (("q_proj [4, 4]", "16"), ("[bold]", "1,024")),
    title="what moves",
)


class Terminal(io.StringIO):
    @override
    def isatty(self) -> bool:
        return True


def test_a_plain_table_is_aligned_and_has_no_trailing_spaces() -> None:
    assert format_table(TABLE) == (
        "what moves\nname           bytes\nq_proj [4, 4]     16\n[bold]         1,024"
    )


def test_a_table_that_is_piped_is_plain_and_never_cut() -> None:
    wide = Table((Column("why"),), (("x" * 500,),))
    out = io.StringIO()
    print_table(wide, file=out)
    assert out.getvalue().splitlines()[1] == "x" * 500


def test_on_a_terminal_rich_draws_and_takes_no_text_for_markup() -> None:
    pytest.importorskip("rich")
    out = Terminal()
    print_table(TABLE, file=out)
    text = out.getvalue()
    assert text != format_table(TABLE) + "\n"
    assert all(word in text for word in ("what moves", "q_proj [4, 4]", "[bold]", "1,024"))


def test_facts_keep_their_lines_in_one_column() -> None:
    assert format_facts([("a", "1\n2"), ("long", "3")]) == "a     1\n      2\nlong  3"


@dataclass(frozen=True)
class Record:
    path: Path
    values: tuple[float, ...]


def test_json_is_one_strict_object(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"record": Record(Path("a/b"), (1.5, float("nan"), float("inf")))})

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    answer = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert answer == {"ok": True, "record": {"path": "a/b", "values": [1.5, None, None]}}


class Failing:
    """A command, as a module of `distmuon.cli` is one."""

    @staticmethod
    def add_parser(commands: Any) -> None:
        parser = commands.add_parser("fail")
        parser.add_argument("code", type=int)
        add_json_option(parser)

        def run(options: argparse.Namespace) -> int:
            raise CommandError("no such thing", code=options.code)

        parser.set_defaults(run=run)


@pytest.mark.parametrize("code", [BROKEN, USAGE])
def test_an_error_is_told_on_both_channels_and_is_the_exit_code(
    code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "COMMANDS", (Failing,))
    assert command_line.main(["fail", str(code)]) == code
    told = "no such thing (docs/errors.md#command)"
    assert capsys.readouterr() == ("", f"distmuon fail: {told}\n")
    assert command_line.main(["fail", str(code), "--json"]) == code
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": False, "error": told}
    assert err == f"distmuon fail: {told}\n"


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    write_file(tmp_path / "a.html", "ä")
    assert (tmp_path / "a.html").read_bytes() == "ä".encode()
    with pytest.raises(CommandError, match="cannot be written: No such file"):
        write_file(tmp_path / "nowhere" / "a.html", b"")


class Stopped:
    """A command that is interrupted."""

    @staticmethod
    def add_parser(commands: Any) -> None:
        def run(options: argparse.Namespace) -> int:
            raise KeyboardInterrupt

        commands.add_parser("stop").set_defaults(run=run)


def test_an_interrupt_is_one_line_and_the_shells_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_line, "COMMANDS", (Stopped,))
    assert command_line.main(["stop"]) == INTERRUPTED
    assert capsys.readouterr() == ("", "\ndistmuon stop: interrupted.\n")


def test_under_a_launcher_only_the_first_rank_of_a_machine_tells_a_mistake(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distmuon.training.main.SILENT_WAIT_S", 0.0)
    monkeypatch.setattr(command_line, "COMMANDS", (Failing,))
    told = []
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert command_line.main(["fail", str(USAGE)]) == USAGE
        with pytest.raises(SystemExit, match=str(USAGE)):
            command_line.main(["fail", "--nonsense"])
        told.append(capsys.readouterr().err)
    assert "no such thing" in told[0]
    assert "usage:" in told[0]
    assert told[1] == ""
    # What is wrong with one rank alone is always said.
    assert command_line.main(["fail", str(BROKEN)]) == BROKEN
    assert "no such thing" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-3", "x", "1.5"])
def test_a_count_is_a_whole_number(text: str) -> None:
    assert positive("7") == 7
    with pytest.raises(argparse.ArgumentTypeError, match="no whole number of at least 1"):
        positive(text)


def test_a_mistake_in_the_options_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        command_line.main(["doctor", "--bogus", "--json"])
    assert stop.value.code == USAGE
    out, err = capsys.readouterr()
    assert json.loads(out) == {"ok": False, "error": "unrecognized arguments: --bogus"}
    assert "usage:" in err


@pytest.mark.parametrize("text", ["0", "-3", "x", "inf", "nan"])
def test_a_time_is_more_than_none(text: str) -> None:
    assert seconds("0.5") == 0.5
    with pytest.raises(argparse.ArgumentTypeError, match="no number of seconds above 0"):
        seconds(text)
