"""Folders of checkpoints: the unfinished one, the newest whole one, those that may go.

A save works in a hidden sibling, `.saving-<name>-<token>`, which becomes the checkpoint by one
rename. Rank 0 keeps a lock on it as long as it lives, so that the leftover of a killed run can be
told from the work of another run in the same folder.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Literal

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import check_content, check_sizes, refuse_foreign, sync
from distmuon.checkpoint.manifest import Manifest, is_ours, read_manifest
from distmuon.errors import see, with_entry

_logger = logging.getLogger(__name__)
_UNFINISHED = ".saving-"
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


class Workplace:
    """The hidden folder that a save works in, locked by rank 0.

    Attributes:
        path: The folder.
        target: What it becomes.
    """

    def __init__(self, target: Path) -> None:
        """Make the folder and lock it.

        Args:
            target: What it becomes; its parent exists.

        Raises:
            OSError: if it cannot be made.
        """
        self.target = target
        self.path = target.with_name(f"{_UNFINISHED}{target.name}-{secrets.token_hex(4)}")
        self.path.mkdir()
        self._lock: int | None = _lock(self.path, fcntl.LOCK_EX)

    def finish(self) -> None:
        """Give the folder its final name; an older checkpoint of that name is removed.

        Raises:
            OSError: if the file system cannot do it; the older one is as before then.
        """
        sync(self.path)
        if self.target.exists():
            _exchange(self.path, self.target)
        else:
            os.rename(self.path, self.target)
        sync(self.target.parent)
        self.discard()

    def discard(self) -> None:
        """Remove what is left under the hidden name, as far as possible."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def absolute(path: object) -> Path:
    """A path that does not change with the working directory.

    Args:
        path: What the caller gave.

    Raises:
        CheckpointError: if it is no path.
    """
    if not isinstance(path, (str, Path)):
        raise CheckpointError(
            f"path={path!r} is no path. `latest` returns None where it finds no whole checkpoint.",
            entry="checkpoint-not-written",
        )
    return Path(path).absolute()


def claim(target: Path) -> Workplace:
    """Make the hidden folder for a save, and remove those that killed runs have left.

    Args:
        target: The checkpoint's folder; its parents are made.

    Returns:
        The new folder.

    Raises:
        CheckpointError: if something else than a checkpoint is already there, or the folder
            cannot be made.
    """
    if target.name.startswith("."):
        raise CheckpointError(
            f"Invalid path {target}: hidden names are for unfinished saves.",
            entry="checkpoint-not-written",
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_symlink():
            raise CheckpointError(
                f"{target} is a symbolic link. Save to {target.resolve()}.",
                entry="checkpoint-not-written",
            )
        if target.exists():
            if not target.is_dir():
                raise CheckpointError(
                    f"{target} is a file. Save to another path.", entry="checkpoint-not-written"
                )
            refuse_foreign(target)
        _remove_leftovers(target.parent)
        return Workplace(target)
    except OSError as error:
        raise CheckpointError(
            f"{target} cannot be written: {error}", entry="checkpoint-not-written"
        ) from error


def _exchange(one: Path, other: Path) -> None:
    # Both names change at one moment: there is none at which a kill leaves no checkpoint.
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if libc.renameat2(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(
            code,
            f"{other} already exists, and this file system cannot replace a folder at one moment "
            f"({os.strerror(code)}). Save to another name, or remove it first",
        )


def _lock(folder: Path, how: int) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError as error:
        # Some network file systems do not lock folders: then a leftover looks like any other.
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP):
            os.close(descriptor)
            raise
    return descriptor


def _in_use(folder: Path) -> bool:
    try:
        os.close(_lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _remove_leftovers(folder: Path) -> None:
    for child in folder.glob(f"{_UNFINISHED}*"):
        if child.is_dir() and not _in_use(child):
            _logger.warning(
                "Removing %s, left by a save that was interrupted.%s",
                child,
                see("checkpoint-not-written"),
            )
            shutil.rmtree(child, ignore_errors=True)


def whole_siblings(folder: Path) -> list[tuple[Path, Manifest]]:
    """Checkpoints in a folder with all their files, oldest first; not a look into the files.

    Args:
        folder: The folder that holds them.

    Returns:
        Paths and manifests.
    """
    found, _ = _survey(folder, "sizes")
    return found


def next_moment(folder: Path) -> int:
    """Microseconds since 1970, but later than any checkpoint in a folder: clocks can be set back.

    Args:
        folder: The folder that holds the checkpoints.
    """
    known = [manifest.saved_at for _, manifest in whole_siblings(folder)]
    return max(time.time_ns() // 1000, *(each + 1 for each in known), 0)


def prune(folder: Path, keep_latest: int) -> None:
    """Remove all but the newest whole checkpoints; broken ones and other folders stay.

    Args:
        folder: The folder that holds them.
        keep_latest: How many to keep.
    """
    try:
        # Someone's link to a checkpoint, such as "last", is not one more.
        whole = [path for path, _ in whole_siblings(folder) if not path.is_symlink()]
        for path in whole[:-keep_latest]:
            # First out of sight: a kill in the middle must not leave half a checkpoint.
            doomed = path.with_name(f"{_UNFINISHED}{path.name}-{secrets.token_hex(4)}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)
    except OSError as error:  # the new checkpoint is complete all the same
        _logger.warning(
            "keep_latest=%d could not be kept: %s%s",
            keep_latest,
            error,
            see("checkpoint-not-written"),
        )


def latest(folder: str | Path, *, check: Literal["sizes", "content"] = "sizes") -> Path | None:
    """The newest whole checkpoint in a folder. Never a collective.

    Ranks that must agree take rank 0's answer. A warning is logged for every broken checkpoint
    and every interrupted save that was passed over, with the reason.

    Args:
        folder: The folder that holds the checkpoints; need not exist.
        check: "sizes" looks for manifest and files; "content" compares every file's SHA-256 too,
            newest first.

    Returns:
        Its path, or None.
    """
    found, broken = _survey(Path(folder), check)
    for path, reason in broken.items():
        _logger.warning("Passed over %s: %s", path, with_entry(reason, "checkpoint-damaged"))
    return found[-1][0] if found else None


def _survey(
    folder: Path, check: Literal["sizes", "content"]
) -> tuple[list[tuple[Path, Manifest]], dict[Path, str]]:
    found: list[tuple[Path, Manifest]] = []
    broken: dict[Path, str] = {}
    for child in folder.iterdir() if folder.is_dir() else ():
        if child.name.startswith(_UNFINISHED):
            if not _in_use(child):
                broken[child] = "it was never finished: the save was interrupted."
        elif _looks_like_one(child):
            try:
                manifest = read_manifest(child)
                check_sizes(child, manifest)
                found.append((child, manifest))
            except (CheckpointError, OSError) as error:
                broken[child] = str(error)
    found.sort(key=lambda each: (each[1].saved_at, _natural(each[0].name)))
    while check == "content" and found:
        path, manifest = found[-1]
        try:
            for index in range(len(manifest.files)):
                check_content(path, manifest, index)
            break
        except CheckpointError as error:
            broken[path] = str(error)
            found.pop()
    return found, broken


def _looks_like_one(folder: Path) -> bool:
    if folder.name.startswith(".") or not folder.is_dir():
        return False
    return any(is_ours(name) for name in os.listdir(folder))


def _natural(name: str) -> tuple[tuple[str, int], ...]:
    # "step-9" before "step-10"
    return tuple((text, int(digits or 0)) for text, digits in re.findall(r"(\D*)(\d*)", name))
