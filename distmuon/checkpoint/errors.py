"""The one error of checkpoints."""

from __future__ import annotations

from distmuon.errors import Entry, with_entry


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or must not be loaded; names the file and the rank."""

    def __init__(self, message: str, *, entry: Entry = "checkpoint-damaged") -> None:
        """Name the entry of docs/errors.md, unless the message holds another error's."""
        super().__init__(with_entry(message, entry))
