"""What a checkpoint says about itself: `manifest.json`, written last and checked first.

Everything else in a checkpoint is reached through its manifest, so a folder without a whole one is
no checkpoint. docs/checkpoints.md, "The manifest", describes every key.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from distmuon.checkpoint.errors import CheckpointError

FORMAT = "distmuon checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_FILE_NAME = re.compile(r"rank-\d{5,}\.safetensors")


@dataclass(frozen=True, slots=True)
class Piece:
    """A contiguous part of a row-major tensor, stored in one file under the tensor's name.

    Several pieces of a tensor in one file lie there end to end, by `start`.

    Attributes:
        file: Index into `Manifest.files`.
        start: First element within the tensor.
        numel: Number of elements.
    """

    file: int
    start: int
    numel: int


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor and where its pieces are; together they cover it exactly once.

    Attributes:
        dtype: In safetensors' spelling, such as "F32".
        shape: The whole tensor's.
        pieces: By `start`.
    """

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """A parameter of the optimizer.

    Attributes:
        algorithm: "muon" or "adamw".
        dtype: The parameter's own, in safetensors' spelling.
        shape: Its shape.
        group: Index of its parameter group.
        step: How often it has been updated.
    """

    algorithm: str
    dtype: str
    shape: tuple[int, ...]
    group: int
    step: int


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One rank's file.

    Attributes:
        name: Within the checkpoint's folder.
        size: Bytes.
        sha256: Of the content, in hexadecimal.
    """

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole checkpoint.

    Attributes:
        saved_at: Microseconds since 1970, by rank 0's clock; later than any older sibling's.
        versions: Of distmuon and torch.
        world_size: Ranks that saved it.
        plan_digest: SHA-256 of the layout that the ranks had; empty without an optimizer.
        metadata: The caller's.
        groups: Hyperparameters of each parameter group.
        parameters: The optimizer's parameters by FQN, in the order of the groups.
        tensors: By name: "optimizer/<state>/<FQN>", "model/<FQN>" or "tensors/<name>".
        rank_tensors: What each rank stored of its own under "rank/<name>"; None if the files are
            no longer those of the ranks.
        files: One per rank.
    """

    saved_at: int
    versions: Mapping[str, str]
    world_size: int
    plan_digest: str
    metadata: Mapping[str, Any]
    groups: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, ParameterEntry]
    tensors: Mapping[str, TensorEntry]
    rank_tensors: tuple[Mapping[str, TensorEntry], ...] | None
    files: tuple[FileEntry, ...]

    def kinds(self) -> set[str]:
        """What is in it: "optimizer", "model", "tensors"."""
        found = {name.partition("/")[0] for name in self.tensors}
        return found | ({"optimizer"} if self.parameters else set())

    def held_by(self, file: int) -> dict[str, tuple[str, int]]:
        """Dtype and number of elements of each tensor in a file, by its name there.

        Args:
            file: Index into `files`.
        """
        held: dict[str, tuple[str, int]] = {}
        for name, entry in self.tensors.items():
            numel = sum(piece.numel for piece in entry.pieces if piece.file == file)
            if numel:
                held[name] = (entry.dtype, numel)
        own = self.rank_tensors[file] if self.rank_tensors is not None else {}
        return held | {f"rank/{name}": (entry.dtype, entry.numel) for name, entry in own.items()}


def file_name(rank: int) -> str:
    """Name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def is_ours(name: str) -> bool:
    """Whether a checkpoint could have a file of this name."""
    return name == MANIFEST or _FILE_NAME.fullmatch(name) is not None


def merge_pieces(
    parts: Sequence[Mapping[str, TensorEntry]],
) -> dict[str, TensorEntry]:
    """One table of tensors from what each rank has written.

    Args:
        parts: Of each rank, its tensors with the pieces in its own file.

    Returns:
        All tensors with all pieces, sorted.
    """
    merged: dict[str, TensorEntry] = {}
    for part in parts:
        for name, entry in part.items():
            known = merged.get(name, replace(entry, pieces=()))
            if (known.dtype, known.shape) != (entry.dtype, entry.shape):
                raise CheckpointError(
                    f"{name} is {entry.dtype} {list(entry.shape)} on one rank and {known.dtype} "
                    f"{list(known.shape)} on another. Build the same model on every rank.",
                    entry="ranks-differ",
                )
            pieces = sorted([*known.pieces, *entry.pieces], key=lambda piece: piece.start)
            merged[name] = replace(known, pieces=tuple(pieces))
    for name, entry in merged.items():
        _check_cover(name, entry)
    return merged


def dump(manifest: Manifest) -> str:
    """The manifest's text, with a checksum of itself.

    Args:
        manifest: Its metadata and group options must be JSON-able.

    Returns:
        JSON.
    """
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest)}
    body["tensors"] = {name: _pack(entry) for name, entry in manifest.tensors.items()}
    if manifest.rank_tensors is not None:
        body["rank_tensors"] = [
            {name: _pack(entry) for name, entry in part.items()} for part in manifest.rank_tensors
        ]
    return json.dumps({**body, "checksum": _checksum(body)}, indent=1)


def read_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a checkpoint.

    Args:
        path: The checkpoint's folder.

    Returns:
        The manifest. The other files have not been looked at.

    Raises:
        CheckpointError: if it is missing, damaged, or of another format.
    """
    file = path / MANIFEST
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is no complete checkpoint: it has no {MANIFEST}, which is written last."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    try:
        return _parse(json.loads(text), file)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged: {type(error).__name__}: {error}. Use an older checkpoint."
        ) from error


def _parse(body: dict[str, Any], file: Path) -> Manifest:
    if body["format"] != FORMAT:
        raise CheckpointError(f"{file} is no manifest of a {FORMAT}: format={body['format']!r}.")
    if body["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {body['format_version']!r}; this distmuon reads version "
            f"{FORMAT_VERSION}. Load it with the distmuon that wrote it, or a newer one."
        )
    found = body.pop("checksum")
    if found != _checksum(body):
        raise CheckpointError(
            f"{file} is damaged: its checksum does not match. Use an older checkpoint."
        )
    ranks = body["rank_tensors"]
    manifest = Manifest(
        saved_at=body["saved_at"],
        versions=body["versions"],
        world_size=body["world_size"],
        plan_digest=body["plan_digest"],
        metadata=body["metadata"],
        groups=tuple(body["groups"]),
        parameters={
            name: ParameterEntry(**{**entry, "shape": tuple(entry["shape"])})
            for name, entry in body["parameters"].items()
        },
        tensors={name: _unpack(entry) for name, entry in body["tensors"].items()},
        rank_tensors=None
        if ranks is None
        else tuple({name: _unpack(entry) for name, entry in part.items()} for part in ranks),
        files=tuple(FileEntry(**entry) for entry in body["files"]),
    )
    for entry in manifest.files:
        # A name with a slash would lead out of the folder.
        if not _FILE_NAME.fullmatch(entry.name):
            raise CheckpointError(f"{file} names {entry.name!r}, which no checkpoint has.")
    for name, tensor in manifest.tensors.items():
        _check_cover(name, tensor)
        if any(not 0 <= piece.file < len(manifest.files) for piece in tensor.pieces):
            raise CheckpointError(f"{file} has pieces of {name} in files that it does not list.")
    return manifest


def _check_cover(name: str, entry: TensorEntry) -> None:
    position = 0
    for piece in entry.pieces:
        if piece.start != position:
            break
        position += piece.numel
    if position != entry.numel or any(piece.numel < 1 for piece in entry.pieces):
        raise CheckpointError(
            f"The pieces of {name} {list(entry.shape)} do not cover its {entry.numel} elements "
            f"exactly once: {[(piece.start, piece.numel) for piece in entry.pieces][:8]}."
        )


def _pack(entry: TensorEntry) -> dict[str, Any]:
    pieces = [[piece.file, piece.start, piece.numel] for piece in entry.pieces]
    return {"dtype": entry.dtype, "shape": list(entry.shape), "pieces": pieces}


def _unpack(entry: dict[str, Any]) -> TensorEntry:
    pieces = tuple(Piece(*piece) for piece in entry["pieces"])
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), pieces)


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
