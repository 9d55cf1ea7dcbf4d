"""`distmuon init`: write a configuration file in which every key is explained."""

from __future__ import annotations

import argparse
import shlex
import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from distmuon.cli.output import (
    DONE,
    EXIT_CODES,
    USAGE,
    CommandError,
    add_json_option,
    print_json,
    write_file,
)

if TYPE_CHECKING:
    from distmuon.training.config import Config
    from distmuon.training.keys import KeyInfo

_WIDTH = 96
_NEEDED = "omegaconf"

_EXAMPLES = f"""\
Every key stands in the file with its default, its type and its meaning; what you delete keeps its
default. A key that does not exist, or a value out of range, is refused here as it is in training.

examples:
  distmuon init
  distmuon init my.yaml optimizer.lr=0.01 model.layers=4 data.path=texts
  distmuon train --config my.yaml

{EXIT_CODES}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `init`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "init",
        help="write a commented configuration to start from",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "file", nargs="?", metavar="FILE", default="distmuon.yaml", help="default: distmuon.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="values other than the defaults"
    )
    parser.add_argument("--force", action="store_true", help="overwrite the file if it exists")
    add_json_option(parser)
    parser.set_defaults(run=_run, needs_torch=False)


def _run(options: argparse.Namespace) -> int:
    import importlib.util

    from distmuon.training.config import Config, ConfigError

    overrides: list[str] = list(options.overrides)
    if "=" in options.file:  # `distmuon init optimizer.lr=0.01`: no file was named
        overrides.insert(0, options.file)
        options.file = "distmuon.yaml"
    path = Path(options.file)
    config = Config()
    if overrides:
        if importlib.util.find_spec(_NEEDED) is None:
            raise CommandError(
                f"Values need {_NEEDED}: pip install 'distmuon[train]'.", entry="missing-package"
            )
        from distmuon.training.config_file import load_config

        try:
            config = load_config(None, overrides)
        except ConfigError as error:
            raise CommandError(str(error), code=USAGE) from None
    if path.exists() and not options.force:
        raise CommandError(f"{path} exists. Choose another name, or overwrite it with --force.")
    write_file(path, starter(config))
    file = shlex.quote(str(path))
    start = f"torchrun --standalone --nproc-per-node 2 -m distmuon train --config {file}"
    if options.json:
        print_json({"written": path, "start": start})
    else:
        print(f"written to {path}; train with\n  {start}")
    return DONE


def starter(config: Config) -> str:
    """Write a configuration as YAML with everything explained.

    Args:
        config: The values.

    Returns:
        The file's text; `load_config` reads it back to an equal configuration.
    """
    from distmuon.training.keys import describe_keys

    lines = [
        "# A training run of distmuon. Every key has its default unless you change it; keys may be",
        "# left out. On the command line: section.key=value.",
        "#   torchrun --standalone --nproc-per-node 2 -m distmuon train --config THIS_FILE",
    ]
    for section, group in groupby(describe_keys(config), lambda key: key.name.split(".")[0]):
        keys = list(group)
        lines += ["", *_comment(keys[0].section, indent=""), f"{section}:"]
        lines += _explain(keys)
    return "\n".join(lines) + "\n"


def _explain(keys: Sequence[KeyInfo]) -> list[str]:
    lines = []
    for info in keys:
        lines += _comment(f"{info.meaning} ({info.type})", indent="  ")
        lines.append(f"  {info.name.split('.')[1]}: {info.default}")
    return lines


def _comment(text: str, *, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=f"{indent}# ",
        subsequent_indent=f"{indent}# ",
        break_long_words=False,
    )
