"""Writing a checkpoint: every rank its own file, rank 0 the manifest, then one rename."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from distmuon.checkpoint.background import Background
from distmuon.checkpoint.completion import Completion
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import require_safetensors
from distmuon.checkpoint.folders import Workplace, absolute, claim
from distmuon.checkpoint.manifest import FileEntry
from distmuon.checkpoint.parts import Part, Source, Table, describe, gather_part
from distmuon.checkpoint.sharded import Sharded
from distmuon.checkpoint.together import all_ranks, find_communicator
from distmuon.collectives import Communicator
from distmuon.errors import see

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class PendingSave:
    """A checkpoint that is complete, or is being completed behind training.

    Attributes:
        path: The checkpoint's folder.
    """

    def __init__(
        self,
        path: Path,
        communicator: Communicator,
        background: Background | None = None,
        workplace: Workplace | None = None,
    ) -> None:
        """Follow a save.

        Args:
            path: The checkpoint's folder.
            communicator: The ranks that save.
            background: The work in progress; None if it is done.
            workplace: On rank 0, where it is done.
        """
        self.path = path
        self._communicator = communicator
        self._background = background
        self._workplace = workplace
        self._failure: str | None = None

    def wait(self) -> Path:
        """Wait until the checkpoint is complete. A collective the first time.

        Returns:
            Its path.

        Raises:
            CheckpointError: on every rank if any failed, naming rank and file; there is no new
                checkpoint then.
        """
        background, self._background = self._background, None
        if background is not None:
            _PENDING.remove(self)
            try:
                all_ranks(self._communicator, background.check_written)
                all_ranks(self._communicator, background.check_complete)
            except CheckpointError as error:
                self._failure = str(error)
                background.give_up()
                if self._workplace is not None:
                    self._workplace.discard()
        if self._failure is not None:
            raise CheckpointError(self._failure, entry="checkpoint-not-written")
        return self.path


# At most one: two could write the same folder, and a failure must not go unnoticed.
_PENDING: list[PendingSave] = []


def save(  # noqa: PLR0913 - what is saved, then how
    path: str | Path,
    optimizer: Sharded | None = None,
    *,
    model: nn.Module | None = None,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    rank_tensors: Mapping[str, Tensor] | None = None,
    process_group: ProcessGroup | None = None,
    async_save: bool = False,
    keep_latest: int | None = None,
) -> PendingSave:
    """Write a checkpoint that appears whole or not at all. A collective.

    Every rank writes its own part of the state; the folder gets its name by one rename when all
    files are durable. An older checkpoint of the same name is replaced at that moment. A killed
    save leaves a hidden folder, which the next save in the same place removes.

    Args:
        path: The checkpoint's own folder, such as `runs/x/checkpoints/step-00000100`, on a file
            system that all ranks share.
        optimizer: Its state, and its hyperparameters. Its buffers are allocated if it has not
            stepped yet.
        model: Its parameters and persistent buffers. What the optimizer updates is written from
            each rank's range, the rest by rank 0.
        metadata: JSON-able; rank 0's. Tuples come back as lists, keys as strings.
        tensors: Whole tensors by name; rank 0's.
        rank_tensors: Tensors by name that each rank has for itself, such as its RNG state.
        process_group: The ranks that save; None for the optimizer's, or without an optimizer the
            default group, if there is one.
        async_save: Copy this rank's part to host memory and return; files are written behind
            training. A save that is still pending is waited for first.
        keep_latest: Remove all but so many of the newest whole checkpoints beside this one, once
            it is complete.

    Returns:
        The save; complete unless `async_save`.

    Raises:
        CheckpointError: on every rank if any failed, now or in a pending save before, naming
            rank and file; older checkpoints are untouched and the unfinished one is removed.
        ValueError: for `keep_latest` below 1, or a process group that is not the optimizer's.
    """
    if keep_latest is not None and (type(keep_latest) is not int or keep_latest < 1):
        raise ValueError(
            f"Invalid {keep_latest=}. Must be an int >= 1, or None to keep all." + see("bad-option")
        )
    require_safetensors()
    communicator = find_communicator(optimizer, process_group, model)
    settle()
    buckets = optimizer.open() if optimizer is not None else ()
    source = Source(optimizer, buckets, model, metadata or {}, tensors or {}, rank_tensors or {})
    part, completion, target, folder = _prepare(
        source, path, keep_latest, communicator, async_save=async_save
    )
    workplace = completion.workplace if completion is not None else None
    if async_save:
        background = Background(
            partial(part.write, folder),
            completion.run if completion is not None else None,
            folder,
            rank=communicator.rank,
            world_size=communicator.world_size,
        )
        pending = PendingSave(target, communicator, background, workplace)
        _PENDING.append(pending)
        return pending
    try:
        files = all_ranks(communicator, partial(part.write, folder))
        all_ranks(communicator, partial(_complete, completion, files))
    except BaseException:
        if workplace is not None:
            workplace.discard()
        raise
    return PendingSave(target, communicator)


def settle() -> None:
    """Wait for a save that is still pending. A collective of its ranks.

    Raises:
        CheckpointError: on every rank, if it failed and nobody has waited for it.
    """
    for pending in tuple(_PENDING):
        pending.wait()


def _prepare(
    source: Source,
    path: str | Path,
    keep_latest: int | None,
    communicator: Communicator,
    *,
    async_save: bool,
) -> tuple[Part, Completion | None, Path, Path]:
    parts: list[Part] = []

    def gather() -> tuple[str, Table, Table]:
        target = absolute(path)
        part = gather_part(source, communicator.rank)
        # Copied here, where one rank without memory for it stops all of them.
        parts.append(part.on_host() if async_save else part)
        return str(target), part.shared, part.own

    gathered = all_ranks(communicator, gather)
    paths = [path for path, _, _ in gathered]
    if len(set(paths)) > 1:
        raise CheckpointError(
            f"The ranks save to different paths: {paths}. Give all the same one.",
            entry="checkpoint-not-shared",
        )
    target = Path(paths[0])
    completions: list[Completion] = []

    def begin() -> str | None:
        if communicator.rank != 0:
            return None
        manifest = describe(source, [each[1] for each in gathered], [each[2] for each in gathered])
        completions.append(Completion(claim(target), manifest, keep_latest))
        return str(completions[0].workplace.path)

    try:
        folder = all_ranks(communicator, begin)[0]
    except CheckpointError:
        for completion in completions:
            completion.workplace.discard()
        raise
    return parts[0], (completions[0] if completions else None), target, Path(str(folder))


def _complete(completion: Completion | None, files: Sequence[FileEntry]) -> None:
    if completion is not None:
        completion.run(files)
