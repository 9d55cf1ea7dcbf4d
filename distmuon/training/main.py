"""The command line of a training run: `launch/train.py` calls `main`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec
from typing import NoReturn

from typing_extensions import override

from distmuon.errors import see
from distmuon.training.config import ConfigError, Launch
from distmuon.training.streams import give_up_output, is_of_output, somewhere_to_print

EXTRAS = ("omegaconf", "yaml", "safetensors", "matplotlib")
FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
# How long a failed rank that has nothing to say waits for the one that has.
SILENT_WAIT_S = 5.0

DESCRIPTION = """\
Train a small byte-level transformer on real text, with Muon or AdamW under ZeRO-1.

  torchrun --standalone --nproc-per-node 2 {several} --config configs/shakespeare.yaml
  {one} --config configs/shakespeare.yaml train.steps=50 optimizer.lr=0.01
"""
EPILOG = """\
With --json standard output has the lines of metrics.jsonl as they are measured, and a last object
that begins with "ok"; all other text goes to standard error.

exit codes: 0 done, or stopped by a signal and saved; 1 the training failed, with a traceback, or
nobody read its output any more; 2 a mistake in the command or the configuration; 130 Ctrl-C before
or after the training. torchrun shows a rank's code and exits with 1 itself."""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as ConfigError, so that they are printed once, not once per rank."""

    @override
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. Keys are set as section.key=value; see --help.")


def main(arguments: Sequence[str] | None = None, program: str = "launch/train.py") -> int:
    """Run a training from the command line. Every rank calls this.

    Args:
        arguments: without the program's name; None takes the process's own.
        program: what the user called, for `--help`.

    Returns:
        Exit code: 0, also when a signal stopped the training, which is saved then; or 2 for a
        mistake of the user's (printed once per machine), or 130 after an interrupt outside of
        training. Other failures raise, with a traceback, so that torchrun can record them.
    """
    with somewhere_to_print():
        return _main(sys.argv[1:] if arguments is None else arguments, program)


def _main(given: Sequence[str], program: str) -> int:
    launch = Launch()
    answers = "--json" in given
    try:
        launch = Launch.from_environment()
        return _run(given, launch, program)
    except ConfigError as error:
        if launch.local_rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
            if answers and launch.rank == 0:
                _answer_failure(str(error))
        else:
            # torchrun stops all ranks as soon as one fails: let the rank with the message be it.
            time.sleep(SILENT_WAIT_S)
        return USER_ERROR
    except KeyboardInterrupt:
        if launch.rank == 0:
            print("\nInterrupted. What was saved is kept.", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if launch.rank == 0 and is_of_output(error):
            message = (
                f"the run has ended before its time: its output cannot be written ({error}). What "
                "was saved is kept. If nobody reads standard output any more, send it to a file: "
                "> run.log" + see("command")
            )
            print(f"error: {message}", file=sys.stderr, flush=True)
            if answers:
                with suppress(OSError):
                    _answer_failure(message)
            give_up_output()
            return FAILED
        if answers and launch.rank == 0:
            _answer_failure(f"{type(error).__name__}: {error}")
        raise


def _print_help(head: str) -> None:
    from distmuon.training.config_file import keys_help

    try:
        print(f"{head}\n{keys_help()}", flush=True)
    except BrokenPipeError:  # `launch/train.py --help | head`
        give_up_output()


def _answer_failure(message: str) -> None:
    # Not terminal.py's: to say which packages are missing, none may be needed.
    print(json.dumps({"ok": False, "error": message}), flush=True)


def _run(arguments: Sequence[str], launch: Launch, program: str) -> int:
    missing = [name for name in EXTRAS if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"Training needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} "
            "not installed. Get everything with: pip install 'distmuon[train]' "
            "(in a clone: pip install -e '.[train]').",
            entry="missing-package",
        )
    # Only now: these import the packages that were just looked for.
    from distmuon.training.config_file import load_config

    script = program.endswith(".py")
    parser = _Parser(
        prog=program,
        description=DESCRIPTION.format(
            several=program if script else f"-m {program}",
            one=f"python {program}" if script else program,
        ),
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    parser.add_argument("--config", metavar="FILE", help="YAML file; without one, the defaults")
    parser.add_argument("--json", action="store_true", help="print JSON lines; see below")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="overrules the file; later wins"
    )
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        if launch.local_rank == 0:
            _print_help(f"{parser.format_help()}\nConfiguration keys and their defaults:\n")
        return 0
    config = load_config(options.config, options.overrides)

    from distmuon.training.loop import run_training

    run_training(config, replace(launch, output="json") if options.json else launch)
    return 0
