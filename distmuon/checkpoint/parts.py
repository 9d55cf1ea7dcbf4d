"""What one rank writes, and what rank 0 says about all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.checkpoint import content
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import dtype_name, write_file
from distmuon.checkpoint.groups import dump_groups
from distmuon.checkpoint.manifest import (
    FileEntry,
    Manifest,
    Piece,
    TensorEntry,
    file_name,
    merge_pieces,
)
from distmuon.checkpoint.sharded import AnyBucket, Sharded
from distmuon.options import read_options
from distmuon.plan import digest
from distmuon.version import __version__

Table = Mapping[str, TensorEntry]


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be saved.

    Attributes:
        optimizer: Or None.
        buckets: Its buffers.
        model: Or None.
        metadata: The caller's; rank 0's counts.
        tensors: The caller's; rank 0's count.
        rank_tensors: The caller's, of this rank.
    """

    optimizer: Sharded | None
    buckets: Sequence[AnyBucket]
    model: nn.Module | None
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    rank_tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank writes.

    Attributes:
        rank: The rank.
        tensors: By their names in the file.
        shared: The tensors that ranks hold pieces of, each with this rank's piece.
        own: The rank's own tensors.
    """

    rank: int
    tensors: Mapping[str, Tensor]
    shared: Table
    own: Table

    def on_host(self) -> Part:
        """A copy in host memory that training does not change."""
        copies = {name: each.to("cpu", copy=True) for name, each in self.tensors.items()}
        return replace(self, tensors=copies)

    def write(self, folder: Path) -> FileEntry:
        """Write this rank's file.

        Args:
            folder: Where to.

        Returns:
            Its name, size and hash.

        Raises:
            CheckpointError: naming the file.
        """
        return write_file(folder / file_name(self.rank), self.tensors)


class PartBuilder:
    """Puts a rank's part together from ranges of tensors, each tensor's in ascending order."""

    def __init__(self, rank: int) -> None:
        """Start with nothing.

        Args:
            rank: The rank.
        """
        self._rank = rank
        self._flats: dict[str, list[Tensor]] = {}
        self._shared: dict[str, TensorEntry] = {}

    def add(self, name: str, entry: TensorEntry, start: int, flat: Tensor) -> None:
        """Add a range.

        Args:
            name: Of the tensor.
            entry: The whole tensor; its pieces do not matter.
            start: First element of the range.
            flat: [n], the range; kept, not copied, where it is the tensor's only one.
        """
        known = self._shared.setdefault(name, replace(entry, pieces=()))
        if flat.numel():
            pieces = (*known.pieces, Piece(self._rank, start, flat.numel()))
            self._shared[name] = replace(known, pieces=pieces)
            self._flats.setdefault(name, []).append(flat)

    def finish(self) -> Part:
        """The part, without the rank's own tensors."""
        tensors = {n: f[0] if len(f) == 1 else torch.cat(f) for n, f in self._flats.items()}
        return Part(self._rank, tensors, self._shared, {})


def gather_part(source: Source, rank: int) -> Part:
    """Find what a rank has to write. Nothing is copied but what memory cannot be written as it is.

    Args:
        source: What is to be saved.
        rank: This rank.

    Returns:
        Its part.

    Raises:
        CheckpointError: for a tensor that no file can hold, naming it.
    """
    for bucket in source.buckets:
        # What was written into parameters since the last step belongs into the master copies.
        bucket.shard.adopt()
    found = PartBuilder(rank)
    for place in _places(source, rank):
        found.add(place.name, place.entry, place.start, place.data.detach().reshape(-1))
    part = found.finish()
    tensors = dict(part.tensors)
    own: dict[str, TensorEntry] = {}
    for name, tensor in source.rank_tensors.items():
        _check_tensor(name, tensor, "rank_tensors")
        own[name] = TensorEntry(dtype_name(tensor.dtype, name), tuple(tensor.shape))
        tensors[f"rank/{name}"] = tensor.detach().reshape(-1)
    return Part(rank, _apart(tensors), part.shared, own)


def describe(source: Source, shared: Sequence[Table], own: Sequence[Table]) -> Manifest:
    """The manifest of what all ranks will write, on rank 0, without the files.

    Args:
        source: What is to be saved.
        shared: Each rank's `Part.shared`.
        own: Each rank's `Part.own`.

    Returns:
        The manifest, `files` and `saved_at` missing.

    Raises:
        CheckpointError: for metadata that JSON cannot hold, or ranks with other tensors.
    """
    try:
        metadata = json.loads(json.dumps(dict(source.metadata)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"metadata must be what JSON can hold: {error}", entry="checkpoint-not-written"
        ) from error
    steps = {
        name: step
        for bucket in source.buckets
        for name, step in zip(bucket.spec.names, bucket.shard.steps, strict=True)
    }
    groups = source.optimizer.param_groups if source.optimizer is not None else []
    options = [read_options(group, index) for index, group in enumerate(groups)]
    lines = [line for bucket in source.buckets for line in bucket.spec.lines(options)]
    parameters = content.optimizer_parameters(source.optimizer) if source.optimizer else {}
    return Manifest(
        saved_at=0,
        versions={"distmuon": __version__, "torch": torch.__version__},
        world_size=len(shared),
        plan_digest=digest(lines).hex() if lines else "",
        metadata=metadata,
        groups=dump_groups(groups),
        parameters={name: replace(each, step=steps[name]) for name, each in parameters.items()},
        tensors=merge_pieces(shared),
        rank_tensors=tuple(own),
        files=(),
    )


def _places(source: Source, rank: int) -> Iterator[content.Place]:
    model = content.model_tensors(source.model)
    yield from content.state_places(source.buckets)
    yield from content.parameter_places(source.buckets, model)
    if rank == 0:
        yield from content.other_places(source.buckets, model)
        for name, tensor in source.tensors.items():
            _check_tensor(name, tensor, "tensors")
            yield content.Place(f"tensors/{name}", tuple(tensor.shape), 0, tensor)


def _check_tensor(name: str, tensor: object, argument: str) -> None:
    if not isinstance(tensor, Tensor):
        raise CheckpointError(
            f"{argument}[{name!r}] is a {type(tensor).__name__}. Must be a tensor; put numbers and "
            "text into metadata=.",
            entry="checkpoint-not-written",
        )


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses two tensors over the same memory, such as a buffer that is also a
    # parameter's view.
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, name) for name, t in tensors.items())
    apart = dict(tensors)
    end = 0
    for start, stop, name in spans:
        if start < end:
            apart[name] = tensors[name].clone()
        end = max(end, stop)
    return apart
