"""A forecast in words: the tables and facts that `distmuon plan` prints and puts on its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from distmuon.cli.output import Column, Table
from distmuon.forecast.folding import write_ranges
from distmuon.units import format_bytes, format_flops, format_time

if TYPE_CHECKING:
    from distmuon.forecast.forecast import Buffer, Forecast, Row

# More owners than these are counted, not named.
_OWNERS_NAMED = 4
_EVERY_RANK = "every rank its range"
_NAMES = {"muon": "Muon", "normuon": "NorMuon", "adamw": "AdamW"}
_KINDS = {
    "muon": ("momentum",),
    "normuon": ("momentum", "row moments"),
    "adamw": ("AdamW moments",),
}

# How the kinds of `Report.bytes_sent` are grouped for a reader.
_TRAFFIC = (
    ("average the gradients", ("all-reduce", "reduce")),
    ("publish the parameters", ("publish",)),
    ("pieces of matrices to owners", ("gather",)),
    ("pieces of updates back", ("scatter",)),
    ("shared matrices: Gram, transforms", ("gram", "transform")),
    ("agree on the step", ("agree",)),
)


def parameter_table(forecast: Forecast) -> Table:
    """Each parameter, equal ones of several layers on one line.

    Args:
        forecast: What to show.
    """
    columns = (
        Column("parameter"),
        Column("shape"),
        Column("route"),
        Column("lr x", "right"),
        Column("decay", "right"),
        Column("owner"),
        Column("why"),
    )
    rows = (
        (
            row.name,
            " x ".join(map(str, row.shape)) or "scalar",
            row.algorithm,
            "-" if row.lr_factor is None else f"{row.lr_factor:.4g}",
            "-" if row.weight_decay is None else f"{row.weight_decay:g}",
            _owners(row, forecast.world_size),
            row.reason + (" (to confirm)" if row.doubt else ""),
        )
        for row in forecast.rows
    )
    return Table(columns, tuple(rows))


def facts(forecast: Forecast, rates: str) -> list[tuple[str, str]]:
    """Totals, balance, memory and time.

    Args:
        forecast: What to show.
        rates: Where its rates come from.

    Returns:
        Pairs of a name and a text.
    """
    busiest, idle = max(forecast.loads), forecast.loads.count(0)
    work = (
        f"{format_flops(busiest)} of Newton-Schulz on the busiest rank, "
        f"{forecast.imbalance:.3f} times the mean"
    )
    if idle:
        work += f"; {idle:,} of {forecast.world_size:,} ranks have none"
    model = forecast.cost_model
    pairs = [
        ("model", f"{forecast.source} on {forecast.world_size:,} ranks, {_options(forecast)}"),
        ("parameters", _totals(forecast.rows)),
        ("layout", "\n".join(buffer.layout for buffer in forecast.buffers if buffer.layout)),
        ("work", work),
        ("state", _state(forecast)),
        ("step", "\n".join(_times(forecast))),
        (
            "rates",
            f"latency {format_time(model.latency)}, bandwidth {model.bandwidth / 1e9:g} GB/s, "
            f"Newton-Schulz {format_flops(model.flops)}/s"
            + (f", {len(model.measured)} measured shapes" if model.measured else "")
            + f" ({rates})",
        ),
    ]
    doubts = sum(row.count for row in forecast.doubts)
    pairs.append(("to confirm", f"{doubts:,} parameters" if doubts else "nothing"))
    return pairs


def traffic_table(forecast: Forecast) -> Table:
    """What a rank sends in a step, beside AdamW.

    Args:
        forecast: What to show.
    """
    adamw = forecast.adamw
    zero1 = {"all-reduce": adamw.reduce_scatter, "publish": adamw.all_gather}
    rows = []
    for text, kinds in _TRAFFIC:
        counts = [forecast.sent[kind] for kind in kinds if kind in forecast.sent]
        if not counts:
            continue
        per_rank = [sum(each) for each in zip(*counts, strict=True)]
        mine = (_mean(per_rank), format_bytes(max(per_rank)))
        ddp = adamw.all_reduce if "reduce" in kinds else 0
        rows.append((text, *mine, _bytes(zero1.get(kinds[0], 0)), _bytes(ddp)))
    total = forecast.sent_by_rank
    ends = (_mean(total), format_bytes(max(total)))
    rows.append(("in all", *ends, _bytes(adamw.zero1), _bytes(adamw.all_reduce)))
    columns = (
        Column("sent per rank and step"),
        Column("distmuon, mean", "right"),
        Column("busiest rank", "right"),
        Column("AdamW ZeRO-1", "right"),
        Column("AdamW DDP", "right"),
    )
    return Table(columns, tuple(rows))


def doubt_table(forecast: Forecast) -> Table:
    """What a person should confirm, and how.

    Args:
        forecast: What to show.
    """
    columns = (Column("to confirm"), Column("why"), Column("to settle it, one of"))
    rows = tuple(
        (row.name, row.doubt, f"--override '{_pattern(row.name)}=muon' or =adamw")
        for row in forecast.doubts
    )
    return Table(columns, rows)


def _pattern(name: str) -> str:
    parts = ("*" if part.startswith("{") or part.isdecimal() else part for part in _split(name))
    return ".".join(parts)


def _split(name: str) -> list[str]:
    # Not at the dots of a range.
    return [part.replace("\0", "..") for part in name.replace("..", "\0").split(".")]


def _owners(row: Row, world_size: int) -> str:
    if not (row.owners or row.holders):
        return _EVERY_RANK if row.algorithm != "frozen" else "-"
    ranks = sorted(set(row.owners or row.holders))
    if len(ranks) == world_size > _OWNERS_NAMED:
        text = f"all {world_size:,} ranks"
    elif len(ranks) > _OWNERS_NAMED:
        text = f"{len(ranks):,} of {world_size:,} ranks"
    else:
        text = f"rank{'s' if len(ranks) > 1 else ''} {write_ranges(ranks)}"
    if row.holders:
        return f"whole at {text}"
    return text + (f", {row.shared:,} shared" if row.shared else "")


def _totals(rows: Sequence[Row]) -> str:
    def numel(algorithm: str) -> int:
        return sum(row.numel for row in rows if row.algorithm == algorithm)

    dtypes = "/".join(sorted({row.dtype for row in rows}))
    matrices = sum(len(row.owners) for row in rows)
    ours = numel("muon") + numel("normuon")
    name = "NorMuon" if numel("normuon") else "Muon"
    classes = sorted({row.algorithm for row in rows} - {"muon", "normuon", "adamw", "frozen"})
    beside = [each for each in ("adamw", *classes) if numel(each) or not classes]
    text = (
        f"{sum(row.numel for row in rows):,} in {dtypes}: {ours:,} by {name} in "
        f"{matrices:,} matrices"
    )
    text += "".join(f", {numel(each):,} by {_NAMES.get(each, each)}" for each in beside)
    frozen = numel("frozen")
    return text + (f", {frozen:,} frozen" if frozen else "")


def _state(forecast: Forecast) -> str:
    buffers = forecast.buffers
    parts = (f"{format_bytes(b.state_bytes)} {_kinds(b)}" for b in buffers)
    whole = format_bytes(sum(buffer.state_bytes for buffer in buffers))
    lines = [f"{whole} on every rank: {', '.join(parts)}"]
    for buffer in buffers:
        if buffer.cut == "whole":
            ratio = buffer.shard_numel * forecast.world_size / buffer.numel
            lines.append(
                f"  {buffer.algorithm} keeps tensors whole, {ratio:.2f} times the mean on the "
                "fullest rank"
            )
    return "\n".join(lines)


def _kinds(buffer: Buffer) -> str:
    kinds = _KINDS.get(buffer.algorithm, ("companion state",))
    narrow = buffer.dtype in ("bfloat16", "float16")
    *first, last = (*kinds, "master weights") if narrow else kinds
    return f"{', '.join(first)} and {last}" if first else last


def _times(forecast: Forecast) -> list[str]:
    lines = [f"{format_time(forecast.step_seconds)} predicted, elementwise work not counted"]
    for buffer in forecast.buffers:
        name = _NAMES.get(buffer.algorithm, buffer.algorithm)
        found = buffer.prediction
        if found is None:
            lines.append(f"  {name}: publish {format_time(buffer.publish_seconds)}")
            continue
        parts = [
            f"Newton-Schulz {format_time(found.compute)}",
            f"exchange {format_time(found.exchange)} in {_waves(found.waves)} beside it",
            f"publish {format_time(found.publish)}",
        ]
        if found.shared:
            parts.append(f"shared matrices {format_time(found.shared)}")
        lines.append(f"  {name}: {', '.join(parts)}")
    if forecast.world_size > 1:
        gradients = format_time(forecast.reduce_seconds)
        lines.append(f"  gradients are averaged in {gradients}, beside the backward pass")
    return lines


def _waves(count: int) -> str:
    return "1 wave" if count == 1 else f"{count} waves"


def _options(forecast: Forecast) -> str:
    policy = forecast.policy
    text = f'layout="{policy.layout}", reduce="{policy.reduce}"'
    text += f', wire="{policy.wire}"' if policy.wire != "full" else ""
    return text + (f", max_split={policy.max_split}" if policy.max_split > 1 else "")


def _mean(counts: Sequence[int]) -> str:
    return format_bytes(sum(counts) / len(counts))


def _bytes(count: int) -> str:
    return format_bytes(count) if count else "-"
