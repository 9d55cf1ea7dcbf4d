"""One rank's file: written durably by the safetensors library, hashed, read slice by slice."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.manifest import MANIFEST, FileEntry, Manifest, TensorEntry, is_ours

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def require_safetensors() -> None:
    """Say what to install.

    Raises:
        CheckpointError: if the safetensors package is missing.
    """
    if find_spec("safetensors") is None:
        raise CheckpointError(
            "Checkpoints need the safetensors package: pip install 'distmuon[checkpoint]'.",
            entry="missing-package",
        )


def dtype_name(dtype: torch.dtype, what: str) -> str:
    """A dtype in safetensors' spelling.

    Args:
        dtype: Any.
        what: Whose it is, for the message.

    Raises:
        CheckpointError: if a file cannot hold it.
    """
    if dtype not in _NAMES:
        raise CheckpointError(
            f"{what} has dtype {dtype}, which safetensors files do not hold.",
            entry="checkpoint-not-written",
        )
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a safetensors name.

    Raises:
        CheckpointError: if it is unknown.
    """
    if name not in _DTYPES:
        raise CheckpointError(f"Unknown dtype {name!r} in the manifest.")
    return _DTYPES[name]


def write_file(
    path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None
) -> FileEntry:
    """Write a safetensors file and make it durable.

    Args:
        path: Its place; an existing file is overwritten.
        tensors: Contiguous; on another device than the CPU a host copy is made.
        header: Text to go with them.

    Returns:
        Its name, size and SHA-256.

    Raises:
        CheckpointError: naming the file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        # From safetensors 0.8 on written straight from the tensors' memory, without a copy, and
        # without the interpreter lock: training goes on beside it.
        host = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        save_file(host, path, dict(header) if header else None)
        sync(path)
        return FileEntry(path.name, path.stat().st_size, hash_file(path))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}", entry="checkpoint-not-written"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a small file durably; it never exists half-written under its name.

    Raises:
        CheckpointError: naming the file.
    """
    partial = path.with_name(f".{path.name}.part")
    try:
        partial.write_text(text, encoding="utf-8")
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: {error}", entry="checkpoint-not-written"
        ) from error


def sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Look at the list of files in a checkpoint, without opening any.

    Args:
        path: The folder.
        manifest: Its manifest.

    Raises:
        CheckpointError: for a missing, truncated or foreign file, naming it.
    """
    for entry in manifest.files:
        file = path / entry.name
        try:
            size = file.stat().st_size
        except OSError as error:
            raise CheckpointError(f"{file} is missing: {error.strerror}.") from error
        if size != entry.size:
            raise CheckpointError(
                f"{file} has {size} bytes; the manifest says {entry.size}. It is truncated or was "
                "overwritten."
            )
    refuse_foreign(path, {MANIFEST, *(entry.name for entry in manifest.files)})


def check_content(path: Path, manifest: Manifest, index: int) -> None:
    """Compare a file with the manifest: its SHA-256, and the tensors that it holds.

    Args:
        path: The folder.
        manifest: Its manifest.
        index: Which of its files.

    Raises:
        CheckpointError: if it differs or cannot be read, naming the file.
    """
    from safetensors import SafetensorError, safe_open

    entry = manifest.files[index]
    file = path / entry.name
    try:
        found = hash_file(file)
        if found != entry.sha256:
            raise CheckpointError(
                f"{file} is damaged: its SHA-256 is {found[:16]}..., the manifest says "
                f"{entry.sha256[:16]}.... Use an older checkpoint."
            )
        # A manifest that was forged to fit is not stopped by a hash.
        with safe_open(file, framework="pt") as opened:
            held = {}
            for key in opened.keys():
                part = opened.get_slice(key)
                held[key] = (part.get_dtype(), math.prod(part.get_shape()))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    for name, (dtype, numel) in manifest.held_by(index).items():
        if held.get(name) != (dtype, numel):
            raise CheckpointError(
                f"{file} should hold {numel} elements of {dtype} under {name!r}; it has "
                f"{held.get(name)}."
            )


def refuse_foreign(path: Path, known: set[str] | None = None) -> None:
    """Refuse a folder with files that no checkpoint has; nothing is opened.

    Args:
        path: The folder.
        known: All names that may be there; None for any that some checkpoint could have.

    Raises:
        CheckpointError: naming the first.
    """
    for name in sorted(child.name for child in path.iterdir()):
        # Hidden files (an NFS client's, a file browser's) are never opened, so they do no harm.
        if not name.startswith(".") and not (name in known if known else is_ours(name)):
            raise CheckpointError(
                f"{path / name} is not part of the checkpoint, so {path} is not trusted; the file "
                "was not opened. Move it elsewhere."
            )


class Reader:
    """Reads ranges of tensors from a checkpoint whose files have been checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Open nothing yet.

        Args:
            path: The folder.
            manifest: Its manifest.
        """
        self._path = path
        self._manifest = manifest
        self._files: dict[int, object] = {}

    def read_into(self, name: str, start: int, target: Tensor) -> None:
        """Copy a range of a tensor.

        Args:
            name: Of the tensor in the manifest.
            start: First element of the range.
            target: [n], of any floating dtype or the tensor's own, on any device.

        Raises:
            CheckpointError: if the file does not hold what the manifest says, naming it.
        """
        stop = start + target.numel()
        ahead: Counter[int] = Counter()  # elements of the tensor before this piece in each file
        for piece in self._manifest.tensors[name].pieces:
            low, high = max(start, piece.start), min(stop, piece.start + piece.numel)
            if low < high:
                first = ahead[piece.file] + low - piece.start
                part = self._slice(piece.file, name, first, first + high - low)
                target[low - start : high - start].copy_(part)
            ahead[piece.file] += piece.numel

    def whole(self, name: str) -> Tensor:
        """A whole tensor, in host memory and of its own."""
        entry = self._manifest.tensors[name]
        flat = torch.empty(entry.numel, dtype=dtype_of(entry.dtype))
        self.read_into(name, 0, flat)
        return flat.view(entry.shape)

    def rank_tensor(self, rank: int, name: str, entry: TensorEntry) -> Tensor:
        """One of the tensors that a rank has stored for itself."""
        flat = self._slice(rank, f"rank/{name}", 0, entry.numel)
        return flat.clone().view(entry.shape)

    def _slice(self, file: int, key: str, start: int, stop: int) -> Tensor:
        from safetensors import SafetensorError, safe_open

        path = self._path / self._manifest.files[file].name
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="pt")
            found = self._files[file].get_slice(key)  # type: ignore[attr-defined]
            part: Tensor = found[start:stop]
            return part
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read: {key}: {error}") from error
