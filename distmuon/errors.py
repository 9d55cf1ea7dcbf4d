"""Every error and warning names its entry in docs/errors.md, where cause and fix stand at length.

Messages say what is wrong, where, and how to go on; the page says why, once for all messages of a
kind. tests/unit/test_errors.py holds page, entries and messages together.
"""

from __future__ import annotations

from typing import Literal

PAGE = "docs/errors.md"

Entry = Literal[
    "accelerate",
    "adamw-weights",
    "attach",
    "bad-group",
    "bad-option",
    "bad-tensor",
    "changed-parameters",
    "checkpoint-damaged",
    "checkpoint-mismatch",
    "checkpoint-not-shared",
    "checkpoint-not-written",
    "command",
    "config",
    "deepspeed",
    "deepspeed-zero3",
    "desync",
    "gpu-kernels",
    "grad-scaler",
    "graph-capture",
    "gradient-not-averaged",
    "launch",
    "lightning",
    "logging",
    "metrics",
    "missing-gradient",
    "missing-package",
    "model-source",
    "non-finite",
    "not-orthogonalized",
    "one-rank-stopped",
    "partial-state",
    "qk-clip-layers",
    "qk-clip-logits",
    "qk-norm",
    "rank-late",
    "rank-lost",
    "ranks-apart",
    "ranks-differ",
    "resume",
    "routing",
    "run-folder",
    "sharded-elsewhere",
    "state-mismatch",
    "text",
    "unsafe-coefficients",
]


def see(entry: Entry) -> str:
    """The end of a message: where to read on.

    Args:
        entry: A heading of the page.

    Returns:
        Such as ` (docs/errors.md#routing)`, with the space.
    """
    return f" ({PAGE}#{entry})"


def with_entry(message: str, entry: Entry) -> str:
    """Name an entry in a message that may hold another error's, which then stays the only one.

    Args:
        message: Perhaps of several lines.
        entry: For a message that names none.

    Returns:
        The message with an entry.
    """
    return message if f"({PAGE}#" in message else message + see(entry)
