"""The sharded optimizer at work: one rank's buffers, its gradients, and the step over them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from operator import is_not
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from distmuon import agreement
from distmuon.buckets import BucketSpec, open_bucket, refuse_shared_storage
from distmuon.clipping import Clipper, Factors
from distmuon.collectives import Communicator, Pending
from distmuon.companion_step import companion_step
from distmuon.description import describe_setup, outline
from distmuon.desync import check_desync
from distmuon.diagnostics import Diagnostics
from distmuon.errors import see
from distmuon.failure import RankFailure, Topic
from distmuon.gradients import GradientSource, make_source
from distmuon.norms import GradientNorms, gradient_norms
from distmuon.observer import make_observer
from distmuon.options import GroupOptions, Policy, read_options
from distmuon.phases import make_clock
from distmuon.publication import Publication
from distmuon.qk_clip import QKClip
from distmuon.relayout import carry_state
from distmuon.steps import adamw_step, check_splits, muon_step

_logger = logging.getLogger(__name__)


class Engine:
    """Allocated at the first step, when the parameters have their final dtype and device.

    Attributes:
        buckets: The flat buffers, AdamW's first.
        source: Where the averaged gradients come from.
        steps: Completed steps.
        skipped: Steps left out because of a non-finite gradient.
        calls: Matrices this rank has orthogonalized, summed over the steps.
        expected: Owned matrices that had a gradient, summed over the steps.
        flops: Operations of the products that this took on this rank.
        norms: Of the gradients at the last clipping.
        diagnostics: Of the last step that was measured.
        clock: Times the phases of a step, if the policy says so.
    """

    def __init__(
        self,
        specs: Sequence[BucketSpec],
        groups: Sequence[Mapping[str, Any]],
        policy: Policy,
        communicator: Communicator,
        clip: QKClip | None = None,
    ) -> None:
        """Compare the plan over the ranks, then allocate. A collective.

        Args:
            specs: What goes into which buffer.
            groups: `param_groups`.
            policy: How the ranks work together.
            communicator: The group.
            clip: Attention layers whose logits are clipped.

        Raises:
            RuntimeError: on every rank, if their setups differ; names the first difference.
            ValueError: if two parameters share memory, or an option is out of range.
        """
        devices = list(dict.fromkeys(p.device for spec in specs for p in spec.parameters))
        communicator.locate(devices)
        with communicator.during(Topic("setup")):
            agreement.check_same_setup(communicator, describe_setup(specs, groups, policy, clip))
        refuse_shared_storage(specs)
        agreement.check_backend(communicator, devices)
        self._clipper = Clipper(clip, [spec.layout for spec in specs], communicator)
        self._communicator = communicator
        self._policy = policy
        self.buckets = [open_bucket(spec, communicator, policy) for spec in specs]
        self.source: GradientSource = make_source(policy.reduce, self.buckets, communicator)
        self._names = tuple(name for bucket in self.buckets for name in bucket.spec.names)
        self.norms = GradientNorms(math.nan, math.nan, math.nan)
        self.diagnostics: Diagnostics | None = None
        self.steps = self.skipped = self._skipped_in_a_row = 0
        self.calls = self.expected = self.flops = 0
        self._averages_unchecked = policy.reduce == "ddp"
        self._attached = False
        self._weights_unchecked = True
        self._inspected = False  # whether a GradScaler has looked at the averaged gradients
        self._outlines = [outline(group) for group in groups]
        self._members = [tuple(group["params"]) for group in groups]
        communicator.step = 1
        self.clock = make_clock(policy.profile, self.buckets[0].shard.master.device)
        communicator.clock = self.clock

    def take_over(self, before: Engine) -> None:
        """Go on with the state and the counts of an engine with another layout. A collective.

        Args:
            before: The engine so far; of no more use afterwards.
        """
        counts = "steps", "skipped", "calls", "expected", "flops", "_skipped_in_a_row"
        for name in (*counts, "norms", "diagnostics"):
            setattr(self, name, getattr(before, name))
        self._communicator.step = self.steps + 1
        before.source.clear()
        carry_state(before.buckets, self.buckets, self._communicator)
        # Only now: this was no part of a step.
        self.clock = self._communicator.clock = before.clock

    def attach(self, model: nn.Module) -> None:
        """Let the source register with a model. A collective.

        Args:
            model: The model whose gradients are averaged.

        Raises:
            ValueError: if there is nothing to attach.
            RuntimeError: if a model is attached already.
        """
        if self._policy.reduce == "ddp":
            raise ValueError(
                'reduce="ddp" takes gradients that are averaged already, so there is nothing to '
                'attach. Use Muon(..., reduce="hook") or reduce="owned".' + see("attach")
            )
        if self._attached:
            raise RuntimeError(
                "A model is attached already. Build a new optimizer for another." + see("attach")
            )
        self.source.attach(model)
        self._attached = True

    def no_sync(self) -> AbstractContextManager[None]:
        """A context in which gradients accumulate and are not sent.

        Raises:
            RuntimeError: if the gradients are not the optimizer's to send.
        """
        if self._policy.reduce == "owned" and self._communicator.world_size == 1:
            return nullcontext()
        self._require_model()
        return self.source.no_sync()

    def _require_model(self) -> None:
        needs_model = self._policy.reduce != "ddp" and self._communicator.world_size > 1
        if needs_model and not self._attached:
            raise RuntimeError(
                f'reduce="{self._policy.reduce}" averages the gradients itself: call '
                "attach(model) once, before the first backward pass." + see("attach")
            )

    def step(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Update every parameter that has a gradient, on all ranks together.

        Args:
            groups: `param_groups`, as they are now.

        Raises:
            RankFailure: on every rank that is left, if one is dead, late or stopped with an error.
            RuntimeError: if ranks disagree about their gradients, parameters or hyperparameters,
                no parameter has a gradient, or a matrix that had one was not orthogonalized.
            FloatingPointError: if a gradient is not finite and the policy says so.
        """
        self._check_parameters()
        ready = self._prepare(groups)
        verdict = self._agree(ready)
        self.source.clear()
        clip = self._clipper.settle(verdict.nonfinite, self.buckets[0].shard.master)
        if clip.nonfinite is not None:
            self._skip(clip.nonfinite)
            return
        try:
            self._update(ready, verdict.present, clip.factors)
        except Exception as error:
            # The others are in the middle of the exchange and would wait for this rank.
            self._communicator.abandon(error)
            raise
        self.steps += 1
        self._communicator.step = self.steps + 1
        self._skipped_in_a_row = 0

    def _update(self, ready: _Ready, present: Sequence[bool], factors: Factors) -> None:
        agreed = iter(present)
        published: list[Pending] = []
        shared = self.buckets, ready.options, self._communicator
        observer = make_observer(self._policy.diagnostics_every, *shared)
        flops = 0
        for index, (bucket, update) in enumerate(zip(self.buckets, ready.updates, strict=True)):
            active = [next(agreed) for _ in bucket.spec.parameters]
            probe = observer.before(index, update, active)
            # What QK-Clip scales, it scales last.
            early = bucket.plan.parts if bucket.plan and not factors else ()
            publication = Publication(bucket.shard, early, self._communicator)
            if bucket.spec.ownership is not None:
                rest = ready.options, self.clock, probe, publication
                work = muon_step(bucket, update, active, *rest)
                self.calls += work.matrices
                self.expected += sum(active[i] for i in bucket.owned)
                flops += work.flops
            else:
                step = adamw_step if bucket.spec.algorithm == "adamw" else companion_step
                step(bucket, update, active, ready.options, self.clock)
            self._clipper.scale_(index, bucket.shard, factors)
            observer.after(index, update)
            published.extend(publication.finish())
        for message in published:
            message.wait()
        self.flops += flops
        self.diagnostics = observer.finish(flops) or self.diagnostics

    def _check_parameters(self) -> None:
        # Before the update: publishing it overwrites what other ranks hold of each range. At the
        # first step always: without DDP nobody has given the ranks the same weights.
        every = self._policy.check_desync_every
        due = self._weights_unchecked or (every and self.steps % every == 0)
        if self._communicator.world_size > 1 and due:
            with self._communicator.during(Topic("desync")):
                check_desync(self._communicator, self.buckets, self.steps)
            self._weights_unchecked = False

    def _prepare(self, groups: Sequence[Mapping[str, Any]]) -> _Ready:
        present = [has for row in self.source.present() for has in row]
        options: list[GroupOptions] = []
        updates: list[Tensor] = []
        nonfinite, problem = None, None
        # What goes wrong on this rank alone is kept until all ranks can raise together.
        try:
            self._refuse_other_groups(groups)
            options = [read_options(group, index) for index, group in enumerate(groups)]
            for bucket in self.buckets:
                bucket.shard.adopt()
                check_splits(bucket, options)
            with self.clock("read"):
                updates = self.source.read()
                # Looking waits for the device.
                looked = updates if self._policy.nonfinite != "propagate" else []
                rows = zip(self.buckets, looked, strict=False)
                found = (bucket.shard.first_nonfinite(update) for bucket, update in rows)
                nonfinite = next((name for name in found if name is not None), None)
        except RankFailure:
            raise
        except Exception as error:
            problem = error
        described = "; ".join(option.describe() for option in options)
        return _Ready(options, updates, agreement.Finding(present, nonfinite, described, problem))

    def _refuse_other_groups(self, groups: Sequence[Mapping[str, Any]]) -> None:
        outlines = [outline(group) for group in groups]
        if outlines != self._outlines:
            raise RuntimeError(
                f"The groups have [{', '.join(outlines)}] parameters now, and "
                f"[{', '.join(self._outlines)}] when they were laid out over the ranks. Call "
                "refresh() on every rank after add_param_group(), or a change of algorithm, blocks "
                "or axes." + see("changed-parameters")
            )
        for index, (group, known) in enumerate(zip(groups, self._members, strict=True)):
            if any(map(is_not, group["params"], known)):
                raise RuntimeError(
                    f"Group {index} has other parameters than when they were laid out over the "
                    "ranks. Call refresh() on every rank." + see("changed-parameters")
                )

    def unscale(self, factor: float) -> bool:
        """Multiply the averaged gradients, and look for a NaN or an infinity. A collective.

        Args:
            factor: One over the loss scale; 1 only looks.

        Returns:
            Whether any rank has found one, the same on every rank.
        """
        self.source.present()  # sends what is still to be sent
        if factor != 1.0:
            self.source.scale_(factor)
        rows = zip(self.buckets, self.source.read(), strict=True)
        found = any(bucket.shard.first_nonfinite(grad) is not None for bucket, grad in rows)
        with self._communicator.during(Topic("unscale", None, self._names)):
            total = self._communicator.add_up([int(found)], self.buckets[0].shard.master.device)
        self._inspected = True
        return total[0] > 0

    def settle_scale(
        self, found_inf: Tensor | float, grad_scale: Tensor | None
    ) -> Literal["step", "skip"]:
        """Do what a GradScaler asks for at `step`.

        Args:
            found_inf: Not 0 if there was a NaN or an infinity.
            grad_scale: The loss scale; None if the gradients have been unscaled.

        Returns:
            Whether to step. A skipped step's gradients are forgotten.

        Raises:
            RuntimeError: if the scaler has looked at `p.grad` instead of the averages.
        """
        if not self._inspected:
            raise RuntimeError(
                "torch's GradScalers unscale and inspect p.grad, but with this reduce= mode the "
                "averaged gradients are elsewhere: they would stay scaled, and each rank would "
                "have a scale of its own. Use distmuon.GradScaler, which takes the same arguments."
                + see("grad-scaler")
            )
        self._inspected = False
        if float(found_inf) > 0:
            self.source.clear()
            self._clipper.discard()
            self.skipped += 1
            return "skip"
        if grad_scale is not None:
            self.source.scale_(1.0 / float(grad_scale))
        return "step"

    def clip(self, max_norm: float) -> Tensor:
        """Measure the averaged gradients and scale them down if need be. A collective.

        Args:
            max_norm: Largest norm over all parameters.

        Returns:
            The norm before, a scalar.

        Raises:
            ValueError: if `max_norm` is not positive.
        """
        if not max_norm > 0:
            raise ValueError(f"Invalid {max_norm=}. Must be > 0." + see("bad-option"))
        with self._communicator.during(Topic("clip", None, self._names)):
            self.norms = gradient_norms(self.source, self.buckets, self._communicator)
        total = self.norms.total
        if math.isfinite(total) and total > max_norm:
            self.source.scale_(max_norm / total)
        return torch.tensor(total, dtype=torch.float32, device=self.buckets[0].shard.master.device)

    def check_averaged(self) -> Engine:
        """Refuse gradients in `p.grad` that nobody averaged, once. A collective.

        Returns:
            The engine itself.

        Raises:
            RuntimeError: on every rank, naming the first parameter; or if no model is attached.
        """
        self._require_model()
        # Not at opening: loading a checkpoint opens before there are gradients.
        if self._communicator.world_size > 1 and self._averages_unchecked:
            parameters = [p for bucket in self.buckets for p in bucket.spec.parameters]
            norms = [None if p.grad is None else float(p.grad.norm()) for p in parameters]
            with self._communicator.during(Topic("setup", None, self._names)):
                compared = agreement.check_averaged(self._communicator, self._names, norms)
            self._averages_unchecked = not compared
        return self

    def _agree(self, ready: _Ready) -> agreement.Verdict:
        try:
            topic = Topic("agree", None, self._names)
            with self.clock("agree"), self._communicator.during(topic):
                return agreement.agree(
                    self._communicator,
                    self._names,
                    ready.finding,
                    missing_grad=self._policy.missing_grad,
                    device=self.buckets[0].shard.master.device,
                )
        except Exception as error:
            # If the messages themselves failed, the first failure says more than the second.
            problem = ready.finding.problem
            if problem is None or error is problem:
                raise
            raise problem from error

    def _skip(self, message: str) -> None:
        if self._policy.nonfinite == "raise":
            raise FloatingPointError(
                f"{message} Skip the batch or lower the lr." + see("non-finite")
            )
        if self._skipped_in_a_row == self._policy.max_skips:
            raise FloatingPointError(
                f"{message} {self._policy.max_skips} steps in a row were skipped before this one "
                "(max_skips): training no longer moves. Lower the lr or look at the data."
                + see("non-finite")
            )
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._communicator.rank == 0:
            _logger.warning("Step skipped. %s%s", message, see("non-finite"))


class _Ready(NamedTuple):
    """What this rank steps with, and what it has to say before."""

    options: list[GroupOptions]
    updates: list[Tensor]
    finding: agreement.Finding
