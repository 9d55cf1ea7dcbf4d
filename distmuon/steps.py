"""One step of each algorithm on one bucket: the straight path from a gradient to an update."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon import update_rules
from distmuon.buckets import Bucket
from distmuon.diagnostics import Probe
from distmuon.errors import see
from distmuon.kernels import elementwise
from distmuon.matrix_updates import matrix_updates
from distmuon.options import GroupOptions
from distmuon.orthogonalize.parts import check_parts
from distmuon.phases import PhaseClock
from distmuon.publication import Publication
from distmuon.shard import Range, Run
from distmuon.split_exchange import SplitJob
from distmuon.work import Work, check_all_done, part_flops, whole_flops

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
        found = matrix_updates(bucket, active, known, options, clock, probe)
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
