"""Where a run talks: words for people, objects for programs. Rank 0 has one."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from distmuon.training.metrics import StepMetrics, to_json

# "plain" lines, what the "terminal" allows, or "json" lines.
Output = Literal["plain", "terminal", "json"]


@dataclass(frozen=True, slots=True)
class Terminal:
    """The two streams of a run.

    Attributes:
        words: What people read.
        objects: What programs read, a JSON object a line; None for nothing.
    """

    words: TextIO
    objects: TextIO | None = None

    def say(self, text: str) -> None:
        """Tell people something.

        Args:
            text: Without the end of its last line.
        """
        print(text, file=self.words, flush=True)

    def hand_out(self, metrics: StepMetrics) -> None:
        """Give a line of metrics to programs, as it stands in the file.

        Args:
            metrics: Just measured.
        """
        if self.objects is not None:
            print(to_json(metrics), file=self.objects, end="", flush=True)

    def conclude(self, answer: Mapping[str, Any], *, ok: bool = True) -> None:
        """Give programs the last object.

        Args:
            answer: Its content.
            ok: Becomes its first key, which no line of metrics has.
        """
        if self.objects is not None:
            print(json.dumps({"ok": ok, **answer}), file=self.objects, flush=True)


def open_terminal(output: Output, stdout: TextIO) -> Terminal:
    """Choose the streams: with "json" standard output is for programs alone.

    Args:
        output: What was asked for.
        stdout: Where standard output leads; see `streams.objects_alone`.
    """
    return Terminal(sys.stderr, stdout) if output == "json" else Terminal(stdout)
