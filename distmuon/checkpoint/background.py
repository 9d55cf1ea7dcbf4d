"""Finishing a save behind training.

[Note: agreement without messages]
Training goes on using its process group, and collectives from a second thread would be matched
with it in another order on another rank. A second group would need its own connections, and its
own tear-down while a save may still run at the interpreter's exit. But ranks that share a folder
can agree through it: each puts a note with its file's size and hash, or its problem, beside its
file, and rank 0 completes the checkpoint once all notes are there. `wait` then tells everyone, over
the training's group, from the main thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import write_text
from distmuon.checkpoint.manifest import FileEntry

_logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.05
# How much longer than rank 0 another rank may write. At the interpreter's exit less: a rank that
# has died will never be done.
_PATIENCE_SECONDS = 1800.0
_PATIENCE_AT_EXIT_SECONDS = 60.0


class Background:
    """One rank's thread that writes its file; rank 0's also completes the checkpoint.

    The thread is no daemon, so the interpreter waits for it at its exit.
    """

    def __init__(
        self,
        write: Callable[[], FileEntry],
        complete: Callable[[Sequence[FileEntry]], None] | None,
        folder: Path,
        *,
        rank: int,
        world_size: int,
    ) -> None:
        """Start.

        Args:
            write: Writes this rank's file.
            complete: On rank 0: makes the checkpoint of all files. None on the others.
            folder: Where the files and the notes go.
            rank: This rank.
            world_size: Number of ranks.
        """
        self._folder, self._rank, self._world_size = folder, rank, world_size
        self._written, self._given_up = threading.Event(), threading.Event()
        self._problem: str | None = None
        self._failure: str | None = None
        # Only the thread holds `write`, and with it a copy of a shard, and drops it at its end.
        self._thread = threading.Thread(
            target=self._run, args=(write, complete), name="distmuon-checkpoint", daemon=False
        )
        self._thread.start()

    def check_written(self) -> None:
        """Wait for this rank's own file.

        Raises:
            CheckpointError: if it could not be written.
        """
        self._written.wait()
        if self._problem is not None:
            raise CheckpointError(self._problem, entry="checkpoint-not-written")

    def check_complete(self) -> None:
        """Wait for the checkpoint on rank 0; the others return once their file is written.

        Raises:
            CheckpointError: if it was not completed.
        """
        self._thread.join()
        if self._failure is not None:
            raise CheckpointError(self._failure, entry="checkpoint-not-written")

    def give_up(self) -> None:
        """Stop waiting for other ranks: one of them has failed."""
        self._given_up.set()
        self._thread.join()

    def _run(
        self,
        write: Callable[[], FileEntry],
        complete: Callable[[Sequence[FileEntry]], None] | None,
    ) -> None:
        try:
            note = asdict(write())
        except Exception as error:  # whatever it is, it belongs to wait(), not to this thread
            self._problem = str(error)
            note = {"problem": self._problem}
        try:
            write_text(self._folder / note_name(self._rank), json.dumps(note))
        except CheckpointError as error:
            self._problem = self._problem or str(error)
        if self._problem is not None:
            _logger.error("Rank %d could not save: %s", self._rank, self._problem)
        self._written.set()
        if complete is None:
            return
        try:
            complete(self._collect_notes())
        except Exception as error:
            self._failure = str(error)
            _logger.error("The checkpoint was not completed: %s", error)

    def _collect_notes(self) -> list[FileEntry]:
        files: list[FileEntry] = []
        began = time.monotonic()
        while len(files) < self._world_size:
            path = self._folder / note_name(len(files))
            if path.exists():
                files.append(_read_note(path, len(files)))
                continue
            waited = time.monotonic() - began
            if self._given_up.is_set():
                raise CheckpointError(
                    "Another rank could not write its file.", entry="checkpoint-not-written"
                )
            if waited > _PATIENCE_SECONDS or (
                waited > _PATIENCE_AT_EXIT_SECONDS and not threading.main_thread().is_alive()
            ):
                raise CheckpointError(
                    f"Rank {len(files)} has not written its file {waited:.0f} s after rank 0. It "
                    f"has died, or {self._folder.parent} is not shared by all ranks.",
                    entry="checkpoint-not-shared",
                )
            time.sleep(_POLL_SECONDS)
        return files


def note_name(rank: int) -> str:
    """Name of a rank's note."""
    return f".rank-{rank:05d}.json"


def _read_note(path: Path, rank: int) -> FileEntry:
    note = json.loads(path.read_text(encoding="utf-8"))
    if "problem" in note:
        raise CheckpointError(f"rank {rank}: {note['problem']}", entry="checkpoint-not-written")
    return FileEntry(**note)
