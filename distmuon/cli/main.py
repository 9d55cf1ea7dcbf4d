"""The command line: finds the command, runs it, turns what it raises into an exit code.

A command is a module with `add_parser(commands)`, which adds its parser and sets `run`, a function
from the parsed options to an exit code. It imports what it needs inside that function, so that
`--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from typing_extensions import override

from distmuon.cli import bench, ckpt, doctor, estimate, init, plan, plot, train, verify
from distmuon.cli.interrupts import INTERRUPTED, leaving_at_once
from distmuon.cli.output import (
    BROKEN,
    DONE,
    EXIT_CODES,
    USAGE,
    CommandError,
    print_error,
    print_json,
)
from distmuon.errors import see, with_entry
from distmuon.training.streams import give_up_output, is_of_output, somewhere_to_print
from distmuon.version import __version__

COMMANDS = (init, train, plan, estimate, verify, bench, plot, doctor, ckpt)

DESCRIPTION = f"Tools around distmuon, Muon with ZeRO-1.\n\n{EXIT_CODES}"


class _Parser(argparse.ArgumentParser):
    """Tells a mistake once per machine, not once per rank, and with `--json` as JSON, too."""

    asks_for_json = False

    @override
    def parse_known_args(  # type: ignore[override]  # argparse has four overloads
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        self.asks_for_json = "--json" in (sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    @override
    def error(self, message: str) -> NoReturn:
        if _is_told_elsewhere():
            self.exit(USAGE)
        if self.asks_for_json:
            print_json({"error": message}, ok=False)
        super().error(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    with somewhere_to_print():
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = _Parser(
        prog="distmuon",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"distmuon {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    name = "distmuon"
    try:
        options, rest = parser.parse_known_args(arguments)
        if hasattr(options, "overrides"):
            # argparse takes them in one place only: not behind an option.
            more = [each for each in rest if _is_override(each)]
            options.overrides = [*options.overrides, *more]
            rest = [each for each in rest if not _is_override(each)]
        if rest and not getattr(options, "takes_rest", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.rest = rest
        name = f"distmuon {options.command}"
        if getattr(options, "needs_torch", True):
            with leaving_at_once(name):
                importlib.import_module("torch")
        code = _run(options)
        sys.stdout.flush()
    except OSError as error:
        if not is_of_output(error):
            raise
        give_up_output()
        if isinstance(error, BrokenPipeError):  # `distmuon ... | head`
            return DONE
        why = f"output cannot be written: {error.strerror}." + see("command")
        print(f"{name}: {why}", file=sys.stderr)
        return BROKEN
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted.", file=sys.stderr)
        return INTERRUPTED
    return code


def _run(options: argparse.Namespace) -> int:
    try:
        code: int = options.run(options)
    except CommandError as error:
        if error.code != USAGE or not _is_told_elsewhere():
            print_error(options.command, str(error), options)
        code = error.code
    except OSError as error:
        # A name that no file may have, a folder that may not be looked into. A training's own
        # traceback is for torchrun.
        if error.filename is None or options.command == "train":
            raise
        message = with_entry(f"{error.filename}: {error.strerror}.", "command")
        print_error(options.command, message, options)
        code = USAGE
    return code


def _is_override(text: str) -> bool:
    return "=" in text and not text.startswith("-")


def _is_told_elsewhere() -> bool:
    """Whether the first rank of this machine makes the same mistake; gives it time to say so."""
    from distmuon.training.config import ConfigError, Launch
    from distmuon.training.main import SILENT_WAIT_S

    try:
        first = Launch.from_environment().local_rank == 0
    except ConfigError:
        return False  # what is wrong with it is said where it matters
    if not first:
        # A launcher stops all ranks as soon as one fails: let the rank with the message be it.
        time.sleep(SILENT_WAIT_S)
    return not first
