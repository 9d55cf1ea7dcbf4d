"""The command line: finds the command, runs it, turns what it raises into an exit code.

A command is a module with `add_parser(commands)`, which adds its parser and sets `run`, a function
from the parsed options to an exit code. It imports what it needs inside that function, so that
`--help` does not wait for torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distmuon.cli import bench, ckpt, doctor, estimate, init, plan, plot, train, verify
from distmuon.cli.output import EXIT_CODES, CommandError, print_error
from distmuon.version import __version__

COMMANDS = (init, train, plan, estimate, verify, bench, plot, doctor, ckpt)

DESCRIPTION = f"Tools around distmuon, Muon with ZeRO-1.\n\n{EXIT_CODES}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; None takes the process's own.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        prog="distmuon",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"distmuon {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    try:
        options, rest = parser.parse_known_args(arguments)
        if rest and not getattr(options, "takes_rest", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        options.rest = rest
        try:
            code: int = options.run(options)
        except CommandError as error:
            print_error(options.command, str(error), options)
            code = error.code
        sys.stdout.flush()
    except BrokenPipeError:  # `distmuon ... | head`
        sys.stderr.close()
        return 0
    return code
