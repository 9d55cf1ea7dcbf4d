"""One step of each algorithm on one bucket: the straight path from a gradient to an update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon import update_rules
from distmuon.buckets import Bucket
from distmuon.diagnostics import Probe
from distmuon.errors import see
from distmuon.kernels import elementwise
from distmuon.layout import TensorSpec
from distmuon.options import GroupOptions
from distmuon.orthogonalize import orthogonalize
from distmuon.orthogonalize.api import orthogonalize_each
from distmuon.orthogonalize.parts import check_parts
from distmuon.orthogonalize.pipeline import Polar
from distmuon.phases import PhaseClock
from distmuon.publication import Publication
from distmuon.row_state import row_shape
from distmuon.shard import Range, Run
from distmuon.split_exchange import SplitJob
from distmuon.structure import Axes, cut, join
from distmuon.work import Work, check_all_done, part_flops, products_dtype, whole_flops

# Elements of a piece for the elementwise rules on CPUs. Their several passes then find it in the
# cache: AdamW took 59 ms in one piece and 31 in these (10.6 M elements); smaller ones gain no more.
_PIECE_NUMEL = 2**20


def muon_step(
    bucket: Bucket[Range],
    update: Tensor,
    present: Sequence[bool],
    options: Sequence[GroupOptions],
    clock: PhaseClock,
    probe: Probe,
    publication: Publication | None = None,
) -> Work:
    """Update this rank's range of a Muon or NorMuon bucket.

    Args:
        bucket: The buffers and their exchange.
        update: [shard_numel], this rank's averaged gradients; overwritten.
        present: For each parameter whether it has a gradient; equal on all ranks.
        options: Of each parameter group.
        clock: Times the phases.
        probe: Is shown every matrix without blocks that this rank orthogonalizes alone.
        publication: Sends what is final while the rest is computed; None leaves it to the caller.

    Returns:
        What this rank did.

    Raises:
        RuntimeError: if that is not each owned matrix with a gradient, naming the lost ones.
    """
    shard, exchange, ownership = bucket.shard, bucket.exchange, bucket.spec.ownership
    assert exchange is not None, "a Muon bucket has an exchange"
    assert bucket.split is not None, "a Muon bucket has an exchange for split matrices"
    assert ownership is not None, "a Muon bucket has owners"
    runs = _pieces(shard.begin_step(present, bucket.spec.groups), update.device)
    with clock("momentum"):
        largest = _average_(bucket, update, runs, present, options)
    bucket.split.begin(update)
    done: set[int] = set()
    for batch in exchange.gather(update):
        active = [pair for pair in batch if present[ownership.members[pair[0]]]]
        known = [largest.get(tensor) for tensor, _ in active]
        found = _orthogonal_updates(bucket, active, known, options, clock, probe)
        for (tensor, _), (value, factor) in zip(active, found, strict=True):
            exchange.scatter(tensor, value, factor, out=update)
            done.add(tensor)
        if publication is not None:
            for span in publication.due(dict(batch)):
                _apply(shard, update, _within(runs, span), options, clock)
    jobs = _split_jobs(bucket, present, options)
    flops = whole_flops(bucket, done, options) + part_flops(bucket, jobs)
    done |= bucket.split.finish(update, jobs)
    check_all_done(bucket, present, done)
    for span in publication.rest if publication else [(0, shard.layout.shard_numel)]:
        _apply(shard, update, _within(runs, span), options, clock)
    parts = sum(ownership.layout.specs[matrix].parts for matrix in done)
    return Work(parts, flops)


def _average_(
    bucket: Bucket[Range],
    update: Tensor,
    runs: Sequence[Run],
    present: Sequence[bool],
    options: Sequence[GroupOptions],
) -> dict[int, Tensor]:
    """Average the gradients into the momentum.

    Returns:
        The largest entry [1] of each matrix that lies here whole, where a kernel finds it.
    """
    plan, buffer = bucket.plan, bucket.shard.state["momentum_buffer"]
    assert plan is not None, "a Muon bucket has a plan"
    if not elementwise.takes_apart(len(plan.segments), update, buffer):
        for group, _, start, stop in runs:
            update_rules.momentum_(
                update[start:stop],
                buffer[start:stop],
                momentum=options[group].momentum,
                nesterov=options[group].nesterov,
            )
        return {}
    specs, members = plan.ownership.layout.specs, plan.ownership.members
    active = [segment for segment in plan.segments if present[members[segment.tensor]]]
    found = update.new_zeros(len(active), 1)
    for segment, largest in zip(active, found, strict=True):
        chosen = options[bucket.spec.groups[members[segment.tensor]]]
        where = slice(segment.shard_start, segment.shard_start + segment.numel)
        update_rules.momentum_(
            update[where],
            buffer[where],
            momentum=chosen.momentum,
            nesterov=chosen.nesterov,
            largest=largest,
        )
    return {
        segment.tensor: largest
        for segment, largest in zip(active, found, strict=True)
        if segment.numel == specs[segment.tensor].numel
    }


def _within(runs: Sequence[Run], span: tuple[int, int]) -> list[Run]:
    """What of some runs lies in a stretch of the shard."""
    first, last = span
    cut = [run._replace(start=max(run.start, first), stop=min(run.stop, last)) for run in runs]
    return [run for run in cut if run.start < run.stop]


def _apply(
    shard: Range,
    update: Tensor,
    runs: Sequence[Run],
    options: Sequence[GroupOptions],
    clock: PhaseClock,
) -> None:
    with clock("apply"):
        for group, _, start, stop in runs:
            update_rules.apply_(
                shard.master[start:stop],
                update[start:stop],
                lr=options[group].lr,
                weight_decay=options[group].weight_decay,
                decay_rule=options[group].decay_rule,
            )


def adamw_step(
    bucket: Bucket[Range],
    grad: Tensor,
    present: Sequence[bool],
    options: Sequence[GroupOptions],
    clock: PhaseClock,
) -> None:
    """Update this rank's range of an AdamW bucket.

    Args:
        bucket: The buffers.
        grad: [shard_numel], this rank's averaged gradients.
        present: For each parameter whether it has a gradient; equal on all ranks.
        options: Of each parameter group.
        clock: Times it.
    """
    shard = bucket.shard
    with clock("adamw"):
        runs = shard.begin_step(present, bucket.spec.groups)
        for group, step, start, stop in _pieces(runs, grad.device):
            update_rules.adamw_(
                shard.master[start:stop],
                grad[start:stop],
                shard.state["exp_avg"][start:stop],
                shard.state["exp_avg_sq"][start:stop],
                step=step,
                lr=options[group].lr,
                betas=options[group].betas,
                eps=options[group].eps,
                weight_decay=options[group].weight_decay,
                decay_rule=options[group].decay_rule,
            )


def _pieces(runs: Sequence[Run], device: torch.device) -> list[Run]:
    """The same runs, on CPUs in pieces that fit into a cache."""
    if device.type != "cpu":
        return list(runs)
    return [
        run._replace(start=start, stop=min(start + _PIECE_NUMEL, run.stop))
        for run in runs
        for start in range(run.start, run.stop, _PIECE_NUMEL)
    ]


def _orthogonal_updates(
    bucket: Bucket[Range],
    batch: Sequence[tuple[int, Tensor]],
    largest: Sequence[Tensor | None],
    options: Sequence[GroupOptions],
    clock: PhaseClock,
    probe: Probe,
) -> list[tuple[Tensor, float | Tensor]]:
    """Polar factors of gathered momenta [m, n] of one kind and group, or of their blocks.

    Returns:
        Each, and what it is still to be multiplied by: a number, or [1] in float32.
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
                rows = zip(batch, largest, strict=True)
                return [(_update(bucket, *pair, chosen, probe, amax), 1.0) for pair, amax in rows]
            factor = update_rules.shape_factor(
                chosen.adjust_lr_fn, spec.axes, matrices[0].shape[-2:]
            )
            polar = orthogonalize_each(
                matrices,
                coefficients=chosen.ns_coefficients,
                steps=chosen.ns_steps,
                dtype=products_dtype(chosen),
                largest=largest,
            )
            return _unscaled(tensors, polar, factor, probe)
    except Exception as error:
        names = ", ".join(ownership.layout.specs[tensor].name for tensor in tensors)
        error.add_note(f"while orthogonalizing {names} {list(matrices[0].shape[-2:])}")
        raise


def _unscaled(
    tensors: Sequence[int], polar: Polar, factor: float, probe: Probe
) -> list[tuple[Tensor, float | Tensor]]:
    """Polar factors, and their factors: `scatter` multiplies in passing."""
    for index, tensor in enumerate(tensors):
        scale = None if polar.scale is None else polar.scale[index]
        probe.look(tensor, polar.values[index], scale)
    values = polar.values.unbind()
    if polar.scale is not None:
        return list(zip(values, (polar.scale * factor).view(-1, 1), strict=True))
    if polar.values.dtype in (torch.float32, torch.float64):
        return [(value, factor) for value in values]
    # Half precision times a number would be rounded to half precision once more.
    shared = torch.full((1,), factor, device=polar.values.device)
    return [(value, shared) for value in values]


def _only_scaled(bucket: Bucket[Range], spec: TensorSpec, options: GroupOptions) -> bool:
    """Whether a matrix's polar factor is only multiplied by a number that its shape gives."""
    alone = options.adjust_lr_fn == "update_rms" or options.max_update_rms is not None
    return spec.blocks is None and not bucket.spec.kept and not alone


def _row_state(bucket: Bucket[Range], matrix: int) -> Tensor | None:
    """The second moment [m, 1] of an owned matrix, or [1, n]; None for rules without."""
    name, ownership = "second_momentum_buffer", bucket.spec.ownership
    if name not in bucket.spec.kept or ownership is None:
        return None
    shape = row_shape(ownership.layout.specs[matrix])
    start = bucket.spec.kept[name].starts[matrix]
    return bucket.shard.state[name][start : start + math.prod(shape)].view(shape)


def _update(
    bucket: Bucket[Range],
    tensor: int,
    matrix: Tensor,
    options: GroupOptions,
    probe: Probe,
    largest: Tensor | None,
) -> Tensor:
    """Update of a momentum [m, n], or of its blocks, in which the polar factor is only a part."""
    assert bucket.spec.ownership is not None, "a Muon bucket has owners"
    spec, second = bucket.spec.ownership.layout.specs[tensor], _row_state(bucket, tensor)
    if spec.blocks is None:
        polar = _polar(matrix, options, largest)
        probe.look(tensor, polar)
        _scale_(polar, spec.axes, options, second)
        return polar
    values = [_polar(block, options) for block in cut(matrix, spec.blocks)]
    moments = [None] * len(values) if second is None else cut(second, spec.blocks)
    for value, moment in zip(values, moments, strict=True):
        _scale_(value, spec.axes, options, moment)
    if second is not None:  # the blocks of some are copies
        changed = [moment for moment in moments if moment is not None]
        second.copy_(join(changed, second.shape, spec.blocks))
    return join(values, matrix.shape, spec.blocks)


def _polar(x: Tensor, options: GroupOptions, largest: Tensor | None = None) -> Tensor:
    """Polar factor of a matrix x [m, n]."""
    return orthogonalize(
        x,
        coefficients=options.ns_coefficients,
        steps=options.ns_steps,
        dtype=products_dtype(options),
        largest=largest,
    )


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


def check_splits(bucket: Bucket[Range], options: Sequence[GroupOptions]) -> None:
    """Refuse hyperparameters with which the split matrices could not be computed.

    To be called on every rank, before anything is sent or changed.

    Args:
        bucket: Any bucket.
        options: Of each parameter group.

    Raises:
        TypeError: if the coefficients are of a wrong type, naming the matrix.
        ValueError: if they are out of range, or too steep for one Gram matrix; likewise.
    """
    if bucket.split is not None:
        _split_jobs(bucket, [True] * len(bucket.spec.parameters), options)


def _split_jobs(
    bucket: Bucket[Range], present: Sequence[bool], options: Sequence[GroupOptions]
) -> dict[int, SplitJob]:
    """What to do with each split matrix that has a gradient, by index in the layout."""
    ownership = bucket.spec.ownership
    assert ownership is not None, "a Muon bucket has owners"
    assert bucket.split is not None, "a Muon bucket has an exchange for split matrices"
    jobs = {}
    for split in ownership.splits:
        member, spec = ownership.members[split.matrix], ownership.layout.specs[split.matrix]
        chosen = options[bucket.spec.groups[member]]
        device = bucket.shard.master.device
        try:
            _refuse_parts(chosen)
            halves = check_parts(
                chosen.ns_coefficients, chosen.ns_steps, bucket.split.dtype, device, spec.shape
            )
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"{spec.name} is split over {len(split.ranks)} ranks: {error}"
            ) from None
        if present[member]:
            factor = update_rules.shape_factor(chosen.adjust_lr_fn, spec.axes, spec.shape)
            jobs[split.matrix] = SplitJob(halves, factor)
    return jobs


def _refuse_parts(options: GroupOptions) -> None:
    wholly = {
        'algorithm="normuon"': options.algorithm == "normuon",
        'adjust_lr_fn="update_rms"': options.adjust_lr_fn == "update_rms",
        "max_update_rms": options.max_update_rms is not None,
    }
    for name, used in wholly.items():
        if used:
            raise ValueError(
                f"{name} scales by the norm of the whole update, which none of them has. Set "
                "max_split=1." + see("bad-option")
            )
