"""`distmuon bench`: how fast this machine is, and where the time of a step goes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmuon.cli.output import (
    BROKEN,
    DONE,
    EXIT_CODES,
    Column,
    CommandError,
    Table,
    positive,
    print_table,
    write_file,
)
from distmuon.cli.ranks import RanksError, Team, add_rank_options, run_team, team_of

if TYPE_CHECKING:
    import torch

    from distmuon.measure.contest import Result, Track
    from distmuon.measure.phases import Breakdown
    from distmuon.measure.rates import Rates

PARTS = ("rates", "phases", "contest")
# `distmuon.measure.contest.VARIANTS` in order; here too so that --help need not import torch.
VARIANTS = (
    "adamw-ddp",
    "adamw-zero",
    "muon-ddp",
    "muon-zero",
    "distmuon-ddp",
    "distmuon-hook",
    "distmuon-owned",
)
_RANKS = 2
_LIMIT_S = 900.0
_FIVE = ("reduce", "gather", "Newton-Schulz", "scatter", "publish")

_EXPLAIN = f"""\
  rates    latency, bandwidth and Newton-Schulz operations per second: the cost model that
           layout="auto" and `distmuon plan` reckon with
  phases   where a step's time goes: waiting for messages (reduce, gather, scatter, publish; what
           overlaps with work does not count) and Newton-Schulz, for each reduce=
  contest  forward, backward and step beside torch's AdamW and torch.optim.Muon, taking turns

The model is --blocks GPT blocks of matrices with a tiny forward pass. torch.optim.Muon always
rounds to bfloat16, which a CPU without bfloat16 instructions does very slowly.

examples:
  distmuon bench
  distmuon bench --only rates --shapes 4096x4096 4096x11008 --save-cost-model cluster.json
  distmuon plan --cost-model cluster.json ...
  torchrun --nproc-per-node 8 -m distmuon bench --dim 4096 --blocks 8 --json > bench.jsonl

{EXIT_CODES}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "bench",
        help="measure this machine, a step's phases, and optimizers side by side",
        description=__doc__,
        epilog=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rank_options(parser, default=_RANKS, limit_s=_LIMIT_S)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--dim", type=positive, default=256, help="model width (default: 256)")
    parser.add_argument("--blocks", type=positive, default=4, help="model depth (default: 4)")
    parser.add_argument(
        "--repeats", type=positive, default=7, help="measured steps of each (default: 7)"
    )
    parser.add_argument(
        "--warmup", type=positive, default=2, help="steps before, not measured (default: 2)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=VARIANTS,
        metavar="VARIANT",
        help=f"contestants, of {', '.join(VARIANTS)}",
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, default=[], metavar="MxN", help="matrices to time"
    )
    parser.add_argument(
        "--save-cost-model", type=Path, metavar="FILE", help="write the rates as JSON"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.set_defaults(run=_run)


@dataclasses.dataclass(frozen=True, slots=True)
class _Wish:
    """What the ranks are told."""

    parts: Sequence[str]
    track: Track
    variants: Sequence[str]
    shapes: Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """What the ranks have measured."""

    rates: Rates | None
    phases: list[Breakdown]
    contest: list[Result]


def _run(options: argparse.Namespace) -> int:
    from distmuon.measure.contest import Track

    team = team_of(options, default=_RANKS)
    if options.save_cost_model is not None and (team.size == 1 or "rates" not in options.only):
        raise CommandError("--save-cost-model needs 2 ranks or more, and the part `rates`.")
    _check_place(options.save_cost_model)  # before it takes minutes
    track = Track(options.dim, options.blocks, warmup=options.warmup, repeats=options.repeats)
    wish = _Wish(options.only, track, options.variants, options.shapes)
    try:
        found = run_team(team, _measure, wish)[0]
    except RanksError as error:
        raise CommandError(f"{error}\nSee `distmuon verify`.", code=BROKEN) from None
    if team.rank == 0:
        facts = _facts(team, track)
        if options.save_cost_model is not None:
            assert found.rates is not None, "asked for"
            content = {**_as_cost_model(found.rates), "measured on": facts}
            write_file(options.save_cost_model, json.dumps(content, indent=1) + "\n")
        (_tell_json if options.json else _tell)(facts, found)
    return DONE


def _check_place(file: Path | None) -> None:
    if file is not None and (file.is_dir() or not file.parent.is_dir()):
        what = "is a folder" if file.is_dir() else f"cannot be: {file.parent} is no folder"
        raise CommandError(f"--save-cost-model {file} {what}. Name a file.")


def _measure(device: torch.device, wish: _Wish) -> _Found:
    """What every rank does."""
    import torch.distributed as dist

    from distmuon.measure import contest
    from distmuon.measure.phases import break_down
    from distmuon.measure.rates import measure_rates

    group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
    rates, phases, results = None, [], []
    if "rates" in wish.parts:
        rates = measure_rates(wish.shapes, group, device)
    if "phases" in wish.parts:
        phases = [break_down(wish.track, r, group, device) for r in ("ddp", "hook", "owned")]
    if "contest" in wish.parts:
        chosen = {name: contest.VARIANTS[name] for name in wish.variants}
        results = contest.hold(wish.track, chosen, group, device)
    return _Found(rates, phases, results)


def _facts(team: Team, track: Track) -> dict[str, Any]:
    """What a figure means nothing without."""
    import torch

    from distmuon.version import __version__

    cuda = team.device == "cuda"
    device = torch.cuda.get_device_name() if cuda else torch.backends.cpu.get_cpu_capability()
    return {
        "distmuon": __version__,
        "torch": torch.__version__,
        "device": f"{team.device} ({device})",
        "ranks": team.size,
        "machines": team.machines,
        "load": round(os.getloadavg()[0], 1),
        **dataclasses.asdict(track),
    }


def _as_cost_model(rates: Rates) -> dict[str, Any]:
    """The shape of a cost model's file; docs/bench.md describes it."""
    measured = {f"{m}x{n}": float(f"{s:.3g}") for (m, n), s in rates.measured.items()}
    named = {"latency": rates.latency, "bandwidth": rates.bandwidth, "flops": rates.flops}
    rounded = {key: None if v is None else float(f"{v:.3g}") for key, v in named.items()}
    return {**rounded, "measured": measured}


def _tell_json(facts: dict[str, Any], found: _Found) -> None:
    lines: list[dict[str, Any]] = []
    if found.rates is not None:
        spread = {key: round(value, 2) for key, value in found.rates.spread.items()}
        lines.append({"kind": "rates", **_as_cost_model(found.rates), "spread": spread})
    lines += [{"kind": "phases", **dataclasses.asdict(each)} for each in found.phases]
    lines += [{"kind": "contest", **dataclasses.asdict(each)} for each in found.contest]
    for line in lines:
        print(json.dumps({**line, **{key: facts[key] for key in facts if key not in line}}))


def _tell(facts: dict[str, Any], found: _Found) -> None:
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if found.rates is not None:
        _tell_rates(found.rates)
    if found.phases:
        print()
        print_table(_phases_table(found.phases))
    if found.contest:
        print()
        print_table(_contest_table(found.contest))


def _tell_rates(rates: Rates) -> None:
    content = _as_cost_model(rates)
    rows = []
    if rates.latency is not None and rates.bandwidth is not None:
        rows.append(("latency", f"{1e6 * rates.latency:,.0f} us per doubling", "latency"))
        rows.append(("bandwidth", f"{rates.bandwidth / 1e9:.2f} GB/s each way", "bandwidth"))
    rows += [
        (f"Newton-Schulz {shape}", f"{1e3 * seconds:,.2f} ms a matrix", shape)
        for shape, seconds in content["measured"].items()
    ]
    lines = [(name, value, f"{rates.spread[key]:.2f}") for name, value, key in rows]
    lines.append(("Newton-Schulz", f"{rates.flops / 1e9:,.1f} GFLOP/s", ""))
    columns = (
        Column("rate"),
        Column("median, slowest rank", "right"),
        Column("max / min", "right"),
    )
    print()
    print_table(Table(columns, tuple(lines)))
    if rates.latency is None:
        print("No cost model: one rank has nobody to send to.")
        return
    measured = ", ".join(
        f"({shape.replace('x', ', ')}): {seconds:g}"
        for shape, seconds in content["measured"].items()
    )
    model = ", ".join(f"{key}={content[key]:g}" for key in ("latency", "bandwidth", "flops"))
    print(f"\ncost_model=CostModel({model}, measured={{{measured}}})")


def _phases_table(phases: Sequence[Breakdown]) -> Table:
    titles = ("reduce=", "step ms", *_FIVE, "other", "bytes sent")
    rows = []
    for each in phases:
        other = sum(value for key, value in each.mean_ms.items() if key not in _FIVE)
        five = (f"{each.mean_ms[key]:.2f}" for key in _FIVE)
        step = f"{each.step_ms:.2f}"
        rows.append((each.reduce, step, *five, f"{other:.2f}", f"{each.sent_bytes:,}"))
    columns = tuple(Column(title, "right" if i else "left") for i, title in enumerate(titles))
    return Table(columns, tuple(rows), "phases of a step, ms, mean over the ranks")


def _contest_table(results: Sequence[Result]) -> Table:
    base = next((r.wall_ms for r in results if r.variant.startswith("adamw")), None)
    titles = ("variant", "wall ms", "min to max", "step() ms", "CPU ms per rank", "/ AdamW")
    rows = tuple(
        (
            r.variant,
            f"{r.wall_ms:.1f}",
            f"{r.wall_min_ms:.1f} to {r.wall_max_ms:.1f}",
            f"{r.optimizer_ms:.1f}",
            f"{r.cpu_ms_per_rank:.1f}",
            f"{r.wall_ms / base:.2f}" if base else "-",
        )
        for r in results
    )
    columns = tuple(Column(title, "right" if i else "left") for i, title in enumerate(titles))
    return Table(columns, rows, "forward, backward and step; medians")


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    try:
        return positive(rows), positive(columns)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is no shape such as 1024x4096") from None
