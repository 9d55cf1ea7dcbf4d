"""Values per row at the owners: where they lie, and state whose ranges are no neighbours."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distmuon.buckets import BucketSpec
from distmuon.checkpoint.files import Reader
from distmuon.checkpoint.manifest import (
    FileEntry,
    Manifest,
    TensorEntry,
    merge_pieces,
)
from distmuon.checkpoint.parts import PartBuilder
from distmuon.dcp import StateHandle
from distmuon.layout import TensorSpec, flat_layout, units_of
from distmuon.ownership import Ownership
from distmuon.row_state import row_shape, rows_at_owners
from distmuon.state_part import StatePart, fill, full_state, handles, new_part
from distmuon.structure import Axes

OWNERS = (0, 1, 0, 0, 1)  # four experts, then a matrix
SPECS = (TensorSpec("experts", (4, 3, 20)), TensorSpec("last", (5, 16)))
LAYOUT = flat_layout(SPECS, 2)
STATE = "second_momentum_buffer"


def spec_of(world_size: int, owners: tuple[int, ...]) -> BucketSpec:
    layout = flat_layout(SPECS, world_size)
    units, members = units_of(layout)
    ownership = Ownership(units, owners, (0, 1), layout, members)
    places = rows_at_owners(layout, members, owners)
    return BucketSpec("normuon", PARAMETERS, (0, 0), layout, ownership, {STATE: places})


PARAMETERS = tuple(nn.Parameter(torch.zeros(spec.shape)) for spec in SPECS)


def test_every_row_has_one_place_at_its_matrixs_owner() -> None:
    places = spec_of(2, OWNERS).places(STATE)
    assert [spec.shape for spec in places.specs] == [(4, 3, 1), (5, 1)]
    assert places.shard_numel == 9, "rank 0 has three experts, rank 1 has one and a matrix of 5"
    ranges = [(p.rank, p.tensor_start, p.shard_start, p.numel) for p in places.holders(0)]
    assert ranges == [(0, 0, 0, 3), (1, 3, 0, 3), (0, 6, 3, 6)]
    held = [[(p.tensor, p.shard_start, p.numel) for p in places.segments(r)] for r in range(2)]
    assert held == [[(0, 0, 3), (0, 3, 6)], [(0, 0, 3), (1, 3, 5)]]


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((6, 4), "out_in", (6, 1)),
        ((6, 4), "in_out", (1, 4)),
        ((5, 6, 4), "out_in", (5, 6, 1)),
        ((5, 6, 4), "in_out", (5, 1, 4)),
        ((8, 3, 2, 2), "conv", (8, 1)),
        ((8, 3, 2), "conv", (8, 1)),
    ],
)
def test_one_value_per_output(shape: tuple[int, ...], axes: Axes, expected: Any) -> None:
    assert row_shape(TensorSpec("w", shape, axes)) == expected


def parts_of(spec: BucketSpec, saved: dict[Tensor, dict[str, Tensor]]) -> list[StatePart]:
    parts = [new_part(spec, rank) for rank in range(spec.layout.world_size)]
    for part in parts:
        fill(part, saved)
    return parts


def test_state_is_cut_and_put_together_again() -> None:
    torch.manual_seed(0)
    saved = {
        p: {"momentum_buffer": torch.randn(p.shape), STATE: torch.rand((*p.shape[:-1], 1))}
        for p in PARAMETERS
    }
    parts = parts_of(spec_of(2, OWNERS), saved)
    assert parts[0].tensors[STATE].numel() == parts[1].tensors[STATE].numel() == 9
    assert (
        parts[0].tensors[STATE][:9].tolist()
        == saved[PARAMETERS[0]][STATE].flatten()[[0, 1, 2, 6, 7, 8, 9, 10, 11]].tolist()
    )
    # Handles know their elements, and what is read into them arrives there.
    found = {p: torch.full((*p.shape[:-1], 1), -1.0) for p in PARAMETERS}
    for part in parts:
        for parameter, state in handles(part).items():
            handle = state[STATE]
            assert isinstance(handle, StateHandle)
            for chunk in handle.__create_chunk_list__():
                where = tuple(
                    slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True)
                )
                found[parameter][where] = handle.__get_tensor_shard__(
                    type("Index", (), {"offset": chunk.offsets, "fqn": "x"})()
                )
    for parameter, values in found.items():
        assert torch.equal(values, saved[parameter][STATE])
    (alone,) = parts_of(spec_of(1, (0,) * 5), {p: dict(s) for p, s in saved.items()})
    for parameter, state in full_state(alone).items():
        for name, value in saved[parameter].items():
            assert torch.equal(state[name], value)


def test_each_matrix_has_its_own_values_in_its_owners_shard() -> None:
    for world_size, owners in ((2, OWNERS), (1, (0,) * len(OWNERS))):
        spec = spec_of(world_size, owners)
        places = spec.kept[STATE]
        assert spec.ownership is not None
        taken: list[set[int]] = [set() for _ in range(world_size)]
        rows = zip(owners, places.starts, spec.ownership.layout.specs, strict=True)
        for owner, start, matrix in rows:
            values = set(range(start, start + row_shape(matrix)[0]))
            assert not values & taken[owner]
            taken[owner] |= values
        assert max(map(len, taken)) == places.shard_numel
        assert all(each == set(range(len(each))) for each in taken)


def test_files_hold_several_ranges_of_one_tensor(tmp_path: Path) -> None:
    values = torch.arange(12.0)
    entry = TensorEntry("F32", (4, 3, 1))
    builders = [PartBuilder(rank) for rank in range(2)]
    for piece in spec_of(2, OWNERS).places(STATE).holders(0):
        flat = values[piece.tensor_start :][: piece.numel]
        builders[piece.rank].add("state", entry, piece.tensor_start, flat)
    parts = [builder.finish() for builder in builders]
    files: tuple[FileEntry, ...] = tuple(part.write(tmp_path) for part in parts)
    tensors = merge_pieces([part.shared for part in parts])
    manifest = Manifest(0, {}, 2, "", {}, (), {}, tensors, None, files)
    assert manifest.held_by(0) == {"state": ("F32", 9)}
    assert manifest.held_by(1) == {"state": ("F32", 3)}
    reader = Reader(tmp_path, manifest)
    assert torch.equal(reader.whole("state").flatten(), values)
    for start in range(12):
        for stop in range(start + 1, 13):
            target = torch.empty(stop - start)
            reader.read_into("state", start, target)
            assert torch.equal(target, values[start:stop])
