"""`distmuon estimate`: what each rank holds in memory, under AdamW and under distmuon."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import TYPE_CHECKING

from distmuon.cli.model_options import (
    MODEL_HELP,
    add_model_options,
    read_cost_model,
    read_source,
    without_collecting,
)
from distmuon.cli.output import DONE, Column, CommandError, Table, print_json, print_table
from distmuon.units import format_bytes

if TYPE_CHECKING:
    from distmuon.forecast.memory import Kind, Memory

_EPILOG = f"""\
{MODEL_HELP}

examples:
  distmuon estimate llama-3-70b --world-size 64 --reduce hook
  distmuon estimate configs/shakespeare.yaml --world-size 2

Counted: tensors of the model, the optimizer and DistributedDataParallel, on the rank that has most.
Not counted: activations, the framework itself, what the allocator keeps in reserve.

exit codes: 0 done, 2 wrong usage or a model that cannot be planned"""

_NAMES: dict[Kind, str] = {
    "adamw-ddp": "AdamW DDP",
    "adamw-zero1": "AdamW ZeRO-1",
    "distmuon": "distmuon",
}
_HELD = (
    ("parameters", "parameters and buffers"),
    ("gradients", "gradients"),
    ("buckets", "DDP's buckets"),
    ("master", "fp32 master weights"),
    ("momentum", "momentum"),
    ("moments", "AdamW moments"),
)
_DURING = (
    ("averages", "averaged gradients of my range"),
    ("exchange", "exchange buffers"),
    ("work", "temporaries"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `estimate`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "estimate",
        help="memory per rank, beside AdamW with and without ZeRO-1",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    found = _estimate(options)
    if options.json:
        answer = {
            kind: {
                **{field.name: getattr(memory, field.name) for field in fields(memory)},
                "held": memory.held,
                "most": memory.most,
            }
            for kind, memory in found.items()
        }
        print_json({"model": options.model, "ranks": options.world_size, "bytes": answer})
        return DONE
    print(f"{options.model} on {options.world_size:,} ranks, the one that has most\n")
    print_table(_table(found, options.companion))
    return DONE


def _estimate(options: argparse.Namespace) -> dict[Kind, Memory]:
    from distmuon.forecast.memory import estimate_memory

    with without_collecting():
        source = read_source(options)
        cost_model, _ = read_cost_model(options, source)
        try:
            return estimate_memory(
                source.model,
                world_size=options.world_size,
                cost_model=cost_model,
                groups=source.groups,
                options=source.options,
            )
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from error


def _table(found: dict[Kind, Memory], companion: str | None) -> Table:
    def row(text: str, key: str) -> tuple[str, ...]:
        counts = (int(getattr(memory, key)) for memory in found.values())
        return (text, *(format_bytes(count) if count else "-" for count in counts))

    rows = [
        *(row(text, key) for key, text in _HELD if key != "moments"),
        row(
            dict(_HELD)["moments"] + (f", or state of {companion}" if companion else ""), "moments"
        ),
        row("held between steps", "held"),
        *(row(text, key) for key, text in _DURING),
        row("most during a step", "most"),
    ]
    columns = (Column("bytes per rank"), *(Column(_NAMES[kind], "right") for kind in found))
    empty = ("-",) * len(found)
    return Table(columns, tuple(each for each in rows if each[1:] != empty))
