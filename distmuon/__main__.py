"""The program: `distmuon`, or `python -m distmuon`."""

from __future__ import annotations

import sys

from distmuon.cli.interrupts import leaving_at_once


def main() -> int:
    """Run the command line of this process.

    Returns:
        The exit code.
    """
    with leaving_at_once():
        from distmuon.cli.main import main as run_command
    return run_command()


if __name__ == "__main__":
    sys.exit(main())
