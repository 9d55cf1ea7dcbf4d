"""The last work of a save, once all files are there: manifest, rename, pruning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distmuon.checkpoint.background import note_name
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import write_text
from distmuon.checkpoint.folders import Workplace, next_moment, prune
from distmuon.checkpoint.manifest import MANIFEST, FileEntry, Manifest, dump


@dataclass(frozen=True, slots=True)
class Completion:
    """Rank 0's last work.

    Attributes:
        workplace: Where the files are.
        manifest: Without the files.
        keep_latest: How many checkpoints to keep, or None.
    """

    workplace: Workplace
    manifest: Manifest
    keep_latest: int | None

    def run(self, files: Sequence[FileEntry]) -> None:
        """Write the manifest, give the folder its name, remove what is too old.

        Args:
            files: Of every rank.

        Raises:
            CheckpointError: naming the file.
        """
        folder, parent = self.workplace.path, self.workplace.target.parent
        for rank, file in enumerate(files):
            if not (folder / file.name).exists():
                raise CheckpointError(
                    f"{folder / file.name} was written by rank {rank}, but rank 0 does not see "
                    "it. Save to a file system that all ranks share.",
                    entry="checkpoint-not-shared",
                )
            (folder / note_name(rank)).unlink(missing_ok=True)
        whole = replace(self.manifest, saved_at=next_moment(parent), files=tuple(files))
        write_text(folder / MANIFEST, dump(whole))
        try:
            self.workplace.finish()
        except OSError as error:
            raise CheckpointError(
                f"{self.workplace.target} cannot be written: {error}",
                entry="checkpoint-not-written",
            ) from error
        if self.keep_latest is not None:
            prune(parent, self.keep_latest)
