"""From gathered momenta to updates: Newton-Schulz in stacks, then each matrix by itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distmuon import update_rules
from distmuon.buckets import Bucket
from distmuon.diagnostics import Probe
from distmuon.layout import TensorSpec
from distmuon.options import GroupOptions
from distmuon.orthogonalize.api import orthogonalize_each
from distmuon.orthogonalize.pipeline import Polar, stack_numel
from distmuon.phases import PhaseClock
from distmuon.row_state import row_shape
from distmuon.shard import Range
from distmuon.structure import Axes, cut, join
from distmuon.work import products_dtype


class MatrixUpdate(NamedTuple):
    """An update but for its factor, which whoever copies it to its place multiplies by in passing.

    Attributes:
        value: [m, n], in float32, or the dtype of the products.
        factor: A number, or [1] in float32.
    """

    value: Tensor
    factor: float | Tensor


def matrix_updates(
    bucket: Bucket[Range],
    batch: Sequence[tuple[int, Tensor]],
    largest: Sequence[Tensor | None],
    options: Sequence[GroupOptions],
    clock: PhaseClock,
    probe: Probe,
) -> list[MatrixUpdate]:
    """Updates of gathered momenta of one kind and group.

    Args:
        bucket: They are in.
        batch: Indices in its layout, and the momenta [m, n], or what Nesterov makes of them.
        largest: Of each its largest absolute entry [1]; None where nobody has looked.
        options: Of each parameter group.
        clock: Times it.
        probe: Is shown every matrix without blocks.

    Returns:
        One for each.
    """
    ownership = bucket.spec.ownership
    assert ownership is not None, "a Muon bucket has owners"
    if not batch:
        return []
    tensors, matrices = zip(*batch, strict=True)
    spec = ownership.layout.specs[tensors[0]]
    chosen = options[bucket.spec.groups[ownership.members[tensors[0]]]]
    try:
        with clock("newton-schulz"):
            if not _only_scaled(bucket, spec, chosen):
                return _scaled_apart(bucket, batch, largest, chosen, probe)
            shape = matrices[0].shape[-2:]
            factor = update_rules.shape_factor(chosen.adjust_lr_fn, spec.axes, shape)
            return _only_to_scale(tensors, _polar(matrices, largest, chosen), factor, probe)
    except Exception as error:
        names = ", ".join(ownership.layout.specs[tensor].name for tensor in tensors)
        error.add_note(f"while orthogonalizing {names} {list(matrices[0].shape[-2:])}")
        raise


def _only_scaled(bucket: Bucket[Range], spec: TensorSpec, options: GroupOptions) -> bool:
    """Whether a matrix's polar factor is only multiplied by a number that its shape gives."""
    alone = options.adjust_lr_fn == "update_rms" or options.max_update_rms is not None
    return spec.blocks is None and not bucket.spec.kept and not alone


def _polar(
    matrices: Sequence[Tensor], largest: Sequence[Tensor | None], options: GroupOptions
) -> Polar:
    return orthogonalize_each(
        matrices,
        coefficients=options.ns_coefficients,
        steps=options.ns_steps,
        dtype=products_dtype(options),
        largest=largest,
    )


def _only_to_scale(
    tensors: Sequence[int], polar: Polar, factor: float, probe: Probe
) -> list[MatrixUpdate]:
    for index, tensor in enumerate(tensors):
        scale = None if polar.scale is None else polar.scale[index]
        probe.look(tensor, polar.values[index], scale)
    values = polar.values.unbind()
    if polar.values.dtype in (torch.float32, torch.float64) and polar.scale is None:
        return [MatrixUpdate(value, factor) for value in values]
    factors = polar.factor(factor).view(-1, 1)
    return [MatrixUpdate(*pair) for pair in zip(values, factors, strict=True)]


def _scaled_apart(
    bucket: Bucket[Range],
    batch: Sequence[tuple[int, Tensor]],
    largest: Sequence[Tensor | None],
    options: GroupOptions,
    probe: Probe,
) -> list[MatrixUpdate]:
    """Updates of momenta, or of their blocks, of which each is scaled by what is in it."""
    assert bucket.spec.ownership is not None, "a Muon bucket has owners"
    spec = bucket.spec.ownership.layout.specs[batch[0][0]]
    if spec.blocks is None:
        values = _polars([matrix for _, matrix in batch], largest, options)
        for (tensor, _), value in zip(batch, values, strict=True):
            probe.look(tensor, value)
            _scale_(value, spec.axes, options, _row_state(bucket, tensor))
        return [MatrixUpdate(value, 1.0) for value in values]
    parts = [cut(matrix, spec.blocks) for _, matrix in batch]
    flat = [part for row in parts for part in row]
    found = iter(_polars(flat, [None] * len(flat), options))
    updates = []
    for (tensor, matrix), row in zip(batch, parts, strict=True):
        second = _row_state(bucket, tensor)
        values = [next(found) for _ in row]
        moments = [None] * len(row) if second is None else cut(second, spec.blocks)
        for value, moment in zip(values, moments, strict=True):
            _scale_(value, spec.axes, options, moment)
        if second is not None:  # the blocks of some are copies
            changed = [moment for moment in moments if moment is not None]
            second.copy_(join(changed, second.shape, spec.blocks))
        updates.append(MatrixUpdate(join(values, matrix.shape, spec.blocks), 1.0))
    return updates


def _polars(
    matrices: Sequence[Tensor], largest: Sequence[Tensor | None], options: GroupOptions
) -> list[Tensor]:
    """Polar factors in the momenta's dtype, of one shape in stacks where single ones are slower."""
    alike: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape].append(index)
    found: dict[int, Tensor] = {}
    for shape, indices in alike.items():
        count = max(1, stack_numel(matrices[0].device) // shape.numel())
        for start in range(0, len(indices), count):
            some = indices[start : start + count]
            polar = _polar([matrices[i] for i in some], [largest[i] for i in some], options)
            found.update(zip(some, polar.finish(matrices[0].dtype).unbind(), strict=True))
    return [found[index] for index in range(len(matrices))]


def _row_state(bucket: Bucket[Range], matrix: int) -> Tensor | None:
    """The second moment [m, 1] of an owned matrix, or [1, n]; None for rules without."""
    name, ownership = "second_momentum_buffer", bucket.spec.ownership
    if name not in bucket.spec.kept or ownership is None:
        return None
    shape = row_shape(ownership.layout.specs[matrix])
    start = bucket.spec.kept[name].starts[matrix]
    return bucket.shard.state[name][start : start + math.prod(shape)].view(shape)


def _scale_(polar: Tensor, axes: Axes, options: GroupOptions, second: Tensor | None) -> None:
    """Scale a polar factor [m, n] for its shape, in place."""
    factor = update_rules.shape_factor(options.adjust_lr_fn, axes, polar.shape[-2:])
    if second is not None:
        beta2, eps = options.betas[1], options.eps
        update_rules.normuon_(polar, second, axes, beta2=beta2, eps=eps)
    if second is not None or options.adjust_lr_fn == "update_rms":
        update_rules.rescale_(polar, factor / math.sqrt(max(polar.shape[-2:])))
    else:
        polar.mul_(factor)
    if options.max_update_rms is not None:
        update_rules.cap_(polar, options.max_update_rms)
