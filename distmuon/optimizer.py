"""Muon and AdamW in one optimizer, its state sharded over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from distmuon import agreement, group_check
from distmuon.buckets import Bucket, BucketSpec, specify
from distmuon.capture import refuse_capture, uncompiled
from distmuon.clipping import check_clip
from distmuon.collectives import Communicator
from distmuon.cost import CostModel
from distmuon.engine import Engine
from distmuon.layout import LayoutChoice
from distmuon.more_options import MoreOptions, complete
from distmuon.options import (
    MissingGrad,
    NonFinite,
    NsDtype,
    Policy,
    Reduce,
    StateDictKind,
    Wire,
    refuse_unused_bound,
)
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.phases import Profile
from distmuon.plan import ExchangePlan
from distmuon.qk_clip import QKClip
from distmuon.report import Report, make_report
from distmuon.saved_optimizer import SavedOptimizer
from distmuon.splits import SplitDtype
from distmuon.state_io import StateKeeper
from distmuon.update_rules import AdjustLrFn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim.optimizer import ParamsT


class Muon(SavedOptimizer):
    """Muon for matrices and AdamW for the rest, with ZeRO-1 sharding.

    With a `process_group` each of its N ranks holds 1/N of the optimizer state. One step, on every
    rank: read the averaged gradients of my range; agree that they exist and are finite; average
    them into my momentum; fetch the missing pieces of the matrices I own; orthogonalize each of
    those once; return the pieces; apply decay and update to my range; publish the parameters.
    Given equal averaged gradients the parameters are bitwise those of one process (fp32, CPU).
    Without a process group nothing is sent. At the first step parameters become views of buffers.

    Attributes:
        communicator: The ranks that the state is sharded over.
        policy: How they work together.
    """

    def __init__(  # noqa: PLR0913 - torch.optim.Muon's signature, then ours
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,  # noqa: FBT001, FBT002 - positional in torch.optim.Muon too
        ns_coefficients: Coefficients = "auto",
        eps: float = 1e-8,
        ns_steps: int | None = None,
        adjust_lr_fn: AdjustLrFn = "match_rms_adamw",
        *,
        ns_dtype: NsDtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        process_group: ProcessGroup | None = None,
        layout: LayoutChoice = "flat",
        cost_model: CostModel | None = None,
        max_split: int = 1,
        split_dtype: SplitDtype = "float32",
        reduce: Reduce = "ddp",
        nonfinite: NonFinite = "raise",
        max_skips: int = 10,
        missing_grad: MissingGrad = "raise",
        wave_bytes: int = 64 * 2**20,
        check_desync_every: int = 0,
        state_dict_kind: StateDictKind = "whole",
        profile: Profile = "off",
        diagnostics_every: int = 0,
        qk_clip: QKClip | None = None,
        wire: Wire = "full",
        publish_bytes: int = 0,
        **more: Unpack[MoreOptions],
    ) -> None:
        """Check the groups and every option. Nothing is allocated or sent before the first step.

        Args:
            params: Groups from `build_param_groups`, or any of torch's forms. `algorithm` is "muon"
                (default: matrices [m, n] or stacks [E, m, n]), "normuon", "adamw" or a class. All
                arguments but `process_group` can be set per group; "axes" and "blocks" too.
            lr: Learning rate; with the default scaling AdamW's carries over.
            weight_decay: Decoupled decay per unit of lr.
            momentum: Decay of the momentum average.
            nesterov: Whether to look ahead.
            ns_coefficients: A preset's name or numbers. "auto" leaves singular values in [0.98,
                1.01] ("halley" for larger ones on CPUs, else "p5"), "keller" in [0.68, 1.20].
            eps: Offset of AdamW's and NorMuon's denominators. Newton-Schulz needs none.
            ns_steps: Newton-Schulz iterations; None takes the preset's own number.
            adjust_lr_fn: Shape scaling; see `distmuon.update_rules.adjust_lr_factor`.
            ns_dtype: Dtype of the Newton-Schulz products; None: fp32 on CPUs.
            betas: AdamW's moment decays; the second is NorMuon's too.
            process_group: Data-parallel ranks to shard over; None for one process.
            layout: "flat" cuts equal shards and moves what drifted over a border; "aligned" moves
                nothing and pads the shards; "auto" predicts the faster one (`plan[i].reason`).
            cost_model: Rates to plan with; None for the defaults of the device.
            max_split: Most ranks, up to 4, that may share one costly matrix (docs/sharding.md).
            split_dtype: Dtype of such matrices' Gram matrices and transforms (docs/numerics.md).
            reduce: Who averages the gradients over the ranks. "ddp": someone already has, as
                DistributedDataParallel does. "hook": a DDP hook sends each rank only its range
                (call `attach(ddp_model)`). "owned": no DDP, own hooks (call `attach(model)`).
            nonfinite: What a NaN or infinity in any rank's gradient does: "raise" or "skip" the
                step on every rank, nothing changed; or "propagate": nobody looks (docs/gpu.md).
            max_skips: How many steps in a row may be skipped before it raises.
            missing_grad: Of some ranks: "raise", or "zero" there (with reduce="owned").
            wave_bytes: Bytes of momentum that one rank fetches at a time; bounds the buffers.
            check_desync_every: Updates between two comparisons of all ranks' parameters; 0: once.
            state_dict_kind: Of `state_dict`: "whole" tensors, or what `sharded_state_dict` returns.
            profile: "phases" times the phases of a step for `report()`.
            diagnostics_every: Steps between two looks at the updates (docs/diagnostics.md).
            qk_clip: Attention layers whose logits are clipped (docs/qk-clip.md).
            wire: "bfloat16" halves the exchange's bytes, and rounds (docs/sharding.md).
            publish_bytes: Bytes to publish at a time as they become final; 0: all at the end.
            **more: `decay_rule`, `max_update_rms`, `stochastic_rounding`; see
                `distmuon.more_options`.

        Raises:
            ValueError: for a value out of range, a parameter that is frozen or in two groups, a
                shape Muon cannot take, or no matrix; TypeError for a wrong type of anything.
        """
        self.policy = Policy(
            reduce=reduce,
            nonfinite=nonfinite,
            max_skips=max_skips,
            missing_grad=missing_grad,
            wave_bytes=wave_bytes,
            check_desync_every=check_desync_every,
            layout=layout,
            cost_model=cost_model,
            max_split=max_split,
            split_dtype=split_dtype,
            profile=profile,
            diagnostics_every=diagnostics_every,
            wire=wire,
            publish_bytes=publish_bytes,
        )
        self.communicator = Communicator(process_group)
        # Where p.grad is not what is used, a GradScaler has to show itself to step().
        self._step_supports_amp_scaling = reduce != "ddp" and self.communicator.world_size > 1
        self._names = {}
        self._engine: Engine | None = None
        self.keeper = StateKeeper(self.communicator, state_dict_kind)
        defaults: dict[str, Any] = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
            **group_check.PLAIN_READING,
            "betas": betas,
            **complete(more),
        }
        super().__init__(params, defaults)
        group_check.require_muon(self.param_groups)
        self.qk_clip = check_clip(qk_clip, self._names)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and add it; after the first step it takes a `refresh` on every rank.

        Args:
            param_group: As in torch.optim, with the optional keys of the constructor.

        Raises:
            ValueError: as the constructor, and so TypeError.
        """
        index = len(self.param_groups)
        group, names = group_check.read_group(param_group, index, self.defaults, self._names)
        refuse_unused_bound(param_group, index, self.defaults)
        super().add_param_group(group)
        self._names = names
        self.keeper.mark(self.state, self.param_groups)

    def refresh(self) -> None:
        """Lay the parameters out anew after the groups have changed. A collective.

        Parameters that stay keep their state bit by bit, new ones start from zero, and those in no
        group any more are forgotten. Call it between a step and the next backward pass, and then,
        with "hook" or "owned", `attach` the model again (for "hook" in a new DDP).

        Raises:
            RuntimeError: on every rank, if their groups differ, or those of another are wrong.
            ValueError: as the constructor, and so TypeError. In either case nothing was changed.
        """
        self.communicator.locate(parameter.device for parameter in self._names)
        with agreement.together(self.communicator, "refresh"):
            names = group_check.recheck_groups(self.param_groups, self._names)
        if self._engine is not None:
            engine = self._build(names)
            engine.take_over(self._engine)
            self._use(engine)
        self._names = names
        self.keeper.forget_gathered()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    @uncompiled
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, on all ranks together.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: if ranks disagree, no gradient exists, or a CUDA graph is captured;
                `RankFailure` if a rank is lost.
            FloatingPointError: if a gradient is not finite; nothing has been changed then.
        """
        refuse_capture("Muon.step")
        loss = None if closure is None else torch.enable_grad()(closure)()
        self.keeper.forget_gathered()
        engine = self._open().check_averaged()
        # A GradScaler sets both around its step().
        found_inf, scale = (getattr(self, key, None) for key in ("found_inf", "grad_scale"))
        if found_inf is None or engine.settle_scale(found_inf, scale) == "step":
            engine.step(self.param_groups)
        return loss

    def unscale_(self, factor: float) -> bool:
        """For `GradScaler`: multiply the averaged gradients. A collective; `Engine.unscale`."""
        return self._open().check_averaged().unscale(factor)

    def attach(self, model: nn.Module) -> None:
        """Let the optimizer average a model's gradients, from now on. A collective.

        Args:
            model: On its device, before its first backward pass. With "hook" the DDP wrapper;
                `p.grad` then keeps the rank's own gradient. With "owned" the bare model; rank 0's
                weights and buffers go to all ranks, and `p.grad` is freed as it is sent.

        Raises:
            RuntimeError: if it is attached already, or the ranks' setups differ.
            ValueError: if `reduce="ddp"`, where there is nothing to attach.
            TypeError: if the model has the wrong wrapper.
        """
        self._open().attach(model)

    def no_sync(self) -> AbstractContextManager[None]:
        """Context to accumulate gradients unsent, for all micro-batches but the last.

        With "hook" or "ddp" use DDP's own.

        Raises:
            RuntimeError: if the gradients are not the optimizer's to send.
        """
        return self._open().no_sync()

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those already sent included.

        Args:
            set_to_none: As in torch.
        """
        super().zero_grad(set_to_none)
        if self._engine:
            self._engine.source.clear()

    @torch.no_grad()
    @uncompiled
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the averaged gradients so that their norm over all parameters is at most this.

        Right for every `reduce`; torch's function would see one rank's gradients only. `report()`
        has the norms, Muon's and AdamW's apart. A non-finite norm leaves the gradients alone:
        `step` names the parameter. A collective.

        Args:
            max_norm: Largest norm; infinity only measures.

        Returns:
            The norm before clipping, a scalar, equal on every rank.

        Raises:
            ValueError: if `max_norm` is not positive.
        """
        refuse_capture("Muon.clip_grad_norm_")
        return self._open().check_averaged().clip(max_norm)

    @property
    def plan(self) -> tuple[ExchangePlan, ...]:
        """This rank's plan for each flat buffer of matrices, also before the first step."""
        sizes = self.communicator.rank, self.policy.wave_numel, self.policy.part_numel
        return tuple(plan for spec in self._specify() if (plan := spec.plan(*sizes)))

    @property
    def parameter_names(self) -> Mapping[Tensor, str]:
        """FQN of each parameter, in the order of the groups."""
        return self._names

    def open(self, mode: Literal["read", "write"] = "read") -> Sequence[Bucket]:
        """The live buffers, made if need be; "write" forgets what was gathered. A collective."""
        if mode == "write":
            self.keeper.forget_gathered()
        return self._open().buckets

    def report(self) -> Report:
        """What this rank has done so far: counts, bytes, times. Never a collective."""
        return make_report(self._specify(), self.communicator, self._engine)

    @override
    def _specify(self) -> list[BucketSpec]:
        buckets = self._engine.buckets if self._engine else ()
        return [bucket.spec for bucket in buckets] or self._lay_out(self._names)

    def _lay_out(self, names: Mapping[Tensor, str]) -> list[BucketSpec]:
        return specify(self.param_groups, names, self.communicator.world_size, self.policy)

    def _open(self) -> Engine:
        return self._engine or self._use(self._build(self._names))

    def _build(self, names: Mapping[Tensor, str]) -> Engine:
        rest = self.param_groups, self.policy, self.communicator, self.qk_clip
        return Engine(self._lay_out(names), *rest)

    def _use(self, engine: Engine) -> Engine:
        self.keeper.open(engine.buckets)
        self._engine = engine
        self.keeper.mark(self.state, self.param_groups)
        return engine
