"""The one error of checkpoints."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or must not be loaded; names the file and the rank."""
