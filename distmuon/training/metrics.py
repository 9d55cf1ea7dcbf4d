"""What is measured during training, and the file it goes to."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from distmuon.diagnostics import Diagnostics, GroupDiagnostics, MatrixDiagnostics
from distmuon.errors import see

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of `metrics.jsonl`. Averages run over the steps since the line before.

    Attributes:
        step: optimizer steps done.
        loss: mean training loss over those steps and all ranks, nats per byte.
        val_loss: validation loss in nats per byte, None where there was no validation.
        lr: peak-scaled learning rate of this step.
        grad_norm: gradient norm of this step before clipping.
        tokens_per_s: bytes trained on per second, all ranks together, validation not counted.
        optimizer_ms: mean time of one optimizer step in milliseconds, on rank 0.
        elapsed_s: seconds since the first step began, validation included.
        step_ms: mean time of a whole step in milliseconds, on rank 0; None in older files.
        diagnostics: of this step, if it was measured (`train.diagnostics_every`).
        max_logits: largest attention logit of each layer in this step, likewise.
        qk_clip: what QK-Clip found and did in this step, None without it.
    """

    step: int
    loss: float
    val_loss: float | None
    lr: float
    grad_norm: float
    tokens_per_s: float
    optimizer_ms: float
    elapsed_s: float
    step_ms: float | None = None
    diagnostics: Diagnostics | None = None
    max_logits: Mapping[str, float] | None = None
    qk_clip: Mapping[str, float] | None = None


# Those of `metrics.jsonl` that are one number, and those of them that may be null.
_NUMBERS = frozenset(
    "step loss val_loss lr grad_norm tokens_per_s optimizer_ms elapsed_s step_ms".split()
)
_MAY_BE_NULL = frozenset({"val_loss", "step_ms"})


@dataclass(slots=True)
class Interval:
    """Sums over the steps since the last line of metrics.

    Attributes:
        steps: how many.
        loss: sum of their losses.
        optimizer_s: seconds spent in the optimizer.
        train_s: seconds spent in whole steps.
    """

    steps: int = 0
    loss: float = 0.0
    optimizer_s: float = 0.0
    train_s: float = 0.0

    def add(self, *, loss: float, optimizer_s: float, train_s: float) -> None:
        """Count one step."""
        self.steps += 1
        self.loss += loss
        self.optimizer_s += optimizer_s
        self.train_s += train_s


@dataclass(slots=True)
class Progress:
    """Where a run stands, apart from tensors and configuration.

    Attributes:
        step: optimizer steps done; it decides which windows of the text come next.
        logged: step of the last line of metrics.
        elapsed_s: seconds since the first step began, without the time between two sittings.
        interval: the steps since the last line of metrics.
    """

    step: int = 0
    logged: int = 0
    elapsed_s: float = 0.0
    interval: Interval = field(default_factory=Interval)


@dataclass(slots=True)
class MetricsLog:
    """Writes metrics to a file line by line, and keeps them for the plot.

    Attributes:
        path: the JSON Lines file.
        lines: what the file shall begin with, then everything written so far.
    """

    path: Path
    lines: list[StepMetrics] = field(default_factory=list)
    _file: TextIO | None = None
    _warned: bool = False

    def __enter__(self) -> MetricsLog:
        """Open the file; from now on it has the first lines and no others.

        Raises:
            OSError: if it cannot be written; once a run trains, that only makes it warn.
        """
        self._begin()
        return self

    def _begin(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(map(to_json, self.lines)), encoding="utf-8")
        partial.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the file."""
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            # Closing writes what an earlier write could not.
            with suppress(OSError):
                file.close()

    def write(self, metrics: StepMetrics) -> None:
        """Append one line; it is in the file when this returns, so a killed run keeps it.

        If the disk is full or gone it says so once and goes on; as soon as it can be written again
        the file has all lines.
        """
        self.lines.append(metrics)
        try:
            if self._file is None:
                self._begin()
            else:
                self._file.write(to_json(metrics))
                self._file.flush()
        except OSError as error:
            self._close()
            if not self._warned:
                _logger.warning(
                    "%s is not written: %s. Training goes on.%s",
                    self.path,
                    error,
                    see("run-folder"),
                )
            self._warned = True


def to_json(metrics: StepMetrics) -> str:
    """One line of the file, with its end.

    Args:
        metrics: What it holds.
    """
    row: dict[str, Any] = asdict(metrics)
    for key in ("diagnostics", "max_logits"):
        if row[key] is None:
            del row[key]
    if metrics.diagnostics is not None:
        for group, shown in zip(
            metrics.diagnostics.groups, row["diagnostics"]["groups"], strict=True
        ):
            shown |= {"ratio": group.ratio, "effective_lr": group.effective_lr}
        for shown in (*row["diagnostics"]["groups"], *row["diagnostics"]["matrices"]):
            # JSON has no word for numbers that are not finite.
            unknown = [k for k, v in shown.items() if isinstance(v, float) and not math.isfinite(v)]
            shown |= dict.fromkeys(unknown)
    return json.dumps(row) + "\n"


class MetricsError(ValueError):
    """A line of metrics is none that a training run writes."""

    def __init__(self, what: str, place: str = "") -> None:
        """Keep what is wrong apart from where.

        Args:
            what: A clause.
            place: File and line; empty where they are not known yet.
        """
        said = f"{place}: {what}. A training run writes no such line." if place else what
        super().__init__(said + see("metrics"))
        self.what = what


def read_metrics(path: Path) -> list[StepMetrics]:
    """Read a `metrics.jsonl` file.

    Args:
        path: The file. Keys that this version does not know are left out: a newer one wrote them.

    Returns:
        Its lines, but for one that has no end yet.

    Raises:
        OSError: If it cannot be read.
        MetricsError: Naming file and line, if one has no metrics.
    """
    # A run that was killed while it wrote leaves half a line, without an end.
    *whole, _ = path.read_bytes().split(b"\n")
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append(_from_json(line))
        except MetricsError as error:
            raise MetricsError(error.what, f"{path}, line {number}") from None
    return lines


def _from_json(line: bytes) -> StepMetrics:
    try:
        row = json.loads(line)
    except ValueError:  # also for bytes that are no text
        raise MetricsError(f"no JSON: {line[:40]!r}") from None
    row = _known(StepMetrics, row)
    for key in _NUMBERS & row.keys():
        value = row[key]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number and not (value is None and key in _MAY_BE_NULL):
            raise MetricsError(f"{key!r} is {json.dumps(value)}, no number")
    if row.get("diagnostics") is not None:
        row["diagnostics"] = _read_diagnostics(row["diagnostics"])
    return StepMetrics(**row)


def _known(kind: type[Any], row: Any) -> dict[str, Any]:
    """What a record of this version can hold of an object from a file."""
    if not isinstance(row, dict):
        raise MetricsError(f"no JSON object: {json.dumps(row)[:40]}")
    for each in fields(kind):
        if each.default is MISSING and each.name not in row:
            raise MetricsError(f"{each.name!r} is missing")
    return {each.name: row[each.name] for each in fields(kind) if each.name in row}


def _read_diagnostics(row: Any) -> Diagnostics:
    def read(kind: type[Any], rows: Any) -> tuple[Any, ...]:
        return tuple(
            kind(**{k: math.nan if value is None else value for k, value in known.items()})
            for known in (_known(kind, each) for each in _list(rows))
        )

    known = _known(Diagnostics, row)
    return Diagnostics(
        **{
            **known,
            "groups": read(GroupDiagnostics, known["groups"]),
            "matrices": read(MatrixDiagnostics, known["matrices"]),
            "owner_flops": tuple(_list(known["owner_flops"])),
        }
    )


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise MetricsError(f"no list in the diagnostics: {json.dumps(value)[:40]}")
    return value


class Stopwatch:
    """Seconds since it was made or last asked."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Return the seconds since the last lap and start the next."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
