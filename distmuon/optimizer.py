"""Muon and AdamW in one optimizer, its state sharded over the data-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from typing_extensions import override

from distmuon import agreement
from distmuon.buckets import Bucket, BucketSpec, open_bucket, specify
from distmuon.collectives import Communicator
from distmuon.group_check import check_group, named_parameters
from distmuon.options import Algorithm, GroupOptions, read_options
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.plan import ExchangePlan, build_plan
from distmuon.report import Report
from distmuon.state_io import WholeState, check_saved, full_state, load_full_state
from distmuon.steps import adamw_step, muon_step
from distmuon.update_rules import AdjustLrFn
from distmuon.version import __version__

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.optim.optimizer import ParamsT


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, with ZeRO-1 sharding.

    With a `process_group` each of its N ranks holds 1/N of the optimizer state. One step, on every
    rank: read the averaged gradients of my range; agree that they exist and are finite; average
    them into my momentum; fetch the missing pieces of the matrices I own; orthogonalize each of
    those once; return the pieces; apply decay and update to my range; publish the parameters.
    Given equal averaged gradients the parameters are bitwise those of one process (fp32, CPU).

    Without a process group the same path runs with nothing to send.

    At the first step the parameters become views of flat buffers. Gradients must be averaged over
    the ranks before `step`, as `DistributedDataParallel` does.
    """

    def __init__(  # noqa: PLR0913 - torch.optim.Muon's signature, then ours
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,  # noqa: FBT001, FBT002 - positional in torch.optim.Muon too
        ns_coefficients: Coefficients = "keller",
        eps: float = 1e-8,
        ns_steps: int | None = None,
        adjust_lr_fn: AdjustLrFn = "match_rms_adamw",
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        process_group: ProcessGroup | None = None,
        wave_bytes: int = 64 * 2**20,
    ) -> None:
        """Check the groups and every option. Nothing is allocated or sent before the first step.

        Args:
            params: Groups from `build_param_groups`, or any of torch's forms. A group's
                `algorithm` is "muon" (the default: matrices [m, n], or stacks [E, m, n] of them)
                or "adamw". Every other argument but `process_group` can be set per group.
            lr: Learning rate; with the default scaling AdamW's carries over.
            weight_decay: Decoupled decay per unit of lr.
            momentum: Decay of the momentum average.
            nesterov: Whether to look ahead.
            ns_coefficients: Newton-Schulz coefficients: a preset's name or numbers.
            eps: Offset of AdamW's denominator. Newton-Schulz needs none: a zero matrix gives a
                zero update, and scale does not matter.
            ns_steps: Newton-Schulz iterations; None takes the preset's own number.
            adjust_lr_fn: Shape scaling; see `distmuon.update_rules.adjust_lr_factor`.
            betas: AdamW's moment decays.
            process_group: Data-parallel ranks to shard over; None for one process.
            wave_bytes: Bytes of momentum that one rank fetches at a time, which bounds the
                exchange's buffers; a single larger matrix is fetched whole.

        Raises:
            ValueError: for a value out of range, a parameter in two groups, a frozen parameter,
                a shape Muon cannot take, or no Muon parameter at all.
            TypeError: for a wrong type, or a sparse, complex or distributed tensor.
        """
        if isinstance(wave_bytes, bool) or not isinstance(wave_bytes, int):
            raise TypeError(f"Invalid {wave_bytes=}. Must be an int.")
        if wave_bytes < 1:
            raise ValueError(f"Invalid {wave_bytes=}. Must be >= 1.")
        self._wave_numel = wave_bytes // 4  # momentum travels in fp32
        self._communicator = Communicator(process_group)
        self._names: dict[Tensor, str] = {}
        self._buckets: list[Bucket] = []
        self._pending: dict[Tensor, WholeState] = {}  # loaded before there are buckets
        self._steps = self._calls = self._expected = 0
        defaults: dict[str, Any] = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
        }
        super().__init__(params, defaults)
        if not any(g["params"] for g in self.param_groups if g["algorithm"] == "muon"):
            raise ValueError(
                'No parameter is routed to Muon: every group is empty or has algorithm="adamw". '
                "Use torch.optim.AdamW if that is meant, or give at least one group of matrices "
                'algorithm="muon".'
            )

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and add it; allowed until the first step.

        Args:
            param_group: As in torch.optim, with the optional keys of the constructor.

        Raises:
            RuntimeError: after the first step, when the plan is fixed.
            ValueError: as the constructor.
            TypeError: as the constructor.
        """
        if self._buckets:
            raise RuntimeError(
                "The parameters are already laid out over the ranks. Add parameter groups before "
                "the first step(), or build a new optimizer."
            )
        if not isinstance(param_group, dict):
            raise TypeError(f"A parameter group is a {type(param_group).__name__}. Must be a dict.")
        index = len(self.param_groups)
        named = named_parameters(param_group, index)
        check_group({**self.defaults, **param_group, "params": named}, index)
        for name, parameter in named:
            if parameter in self._names:
                raise ValueError(
                    f"{name} is already in the optimizer as {self._names[parameter]}. Every "
                    "parameter must be in exactly one group, once; a tied weight is one parameter."
                )
            self._names[parameter] = name
        group = {key: value for key, value in param_group.items() if key != "reasons"}
        group["params"] = list(param_group["params"]) if named else []
        super().add_param_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, on all ranks together.

        Args:
            closure: Re-evaluates the model and returns the loss; optional.

        Returns:
            The closure's result, or None.

        Raises:
            RuntimeError: if ranks disagree about their setup or gradients, no parameter has a
                gradient, or a matrix that had one was not orthogonalized.
            FloatingPointError: if a gradient is not finite; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        options = [read_options(group, i) for i, group in enumerate(self.param_groups)]
        if not self._buckets:
            self._open(options)
        updates = [bucket.shard.read_grad() for bucket in self._buckets]
        active = self._agree(updates)
        published = []
        for bucket, update, present in zip(self._buckets, updates, active, strict=True):
            bucket.shard.adopt()
            if bucket.spec.algorithm == "muon":
                self._calls += muon_step(bucket, update, present, options)
                self._expected += sum(present[i] for i in bucket.owned)
            else:
                adamw_step(bucket, update, present, options)
            published.append(bucket.shard.publish(self._communicator))
        for message in published:
            message.wait()
        self._steps += 1
        return loss

    @property
    def plan(self) -> tuple[ExchangePlan, ...]:
        """This rank's plan for each flat buffer of matrices; may be read before the first step."""
        rank = self._communicator.rank
        owned = [spec.ownership for spec in self._specify() if spec.ownership is not None]
        return tuple(
            build_plan(ownership, rank, wave_numel=self._wave_numel) for ownership in owned
        )

    def report(self) -> Report:
        """What this rank has done so far. Never a collective.

        Returns:
            Counts of matrices, Newton-Schulz calls and bytes.
        """
        specs = self._specify()
        muon = [spec for spec in specs if spec.algorithm == "muon"]
        owners = [owner for spec in muon if spec.ownership for owner in spec.ownership.owners]
        return Report(
            steps=self._steps,
            rank=self._communicator.rank,
            world_size=self._communicator.world_size,
            matrices=len(owners),
            matrices_owned=owners.count(self._communicator.rank),
            newton_schulz_calls=self._calls,
            newton_schulz_expected=self._expected,
            bytes_sent=dict(self._communicator.bytes_sent),
            state_bytes=sum(bucket.shard.state_bytes for bucket in self._buckets),
            muon_parameters=_numel(specs, "muon"),
            adamw_parameters=_numel(specs, "adamw"),
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """State of every parameter, in torch's form. Never a collective.

        Returns:
            An ordinary optimizer dictionary: "momentum_buffer", or "exp_avg" and "exp_avg_sq", in
            each parameter's own shape, and "step". The fp32 "master" of narrow parameters too.

        Raises:
            RuntimeError: after the first step over several ranks, each of which has only a part.
        """
        world_size = self._communicator.world_size
        if world_size > 1 and (self._buckets or self._pending):
            raise RuntimeError(
                f"This rank holds 1/{world_size} of the optimizer state, and state_dict() does "
                "not communicate: saved as it is, the other shards would be lost. Gathering them "
                "is not implemented in this version; save the model's weights, or train with "
                "process_group=None where the optimizer state must be saved."
            )
        if self._buckets:
            for bucket in self._buckets:
                self.state.update(full_state(bucket))
        else:
            self.state.update(self._pending)
        try:
            return super().state_dict()
        finally:
            self.state.clear()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take hyperparameters and state from a full dictionary, at any world size.

        Args:
            state_dict: From `state_dict` of an optimizer with the same groups. Each rank keeps its
                own part; momentum stays fp32 whatever the parameters' dtype.

        Raises:
            ValueError: for state that is partial, foreign or misshaped, naming the parameter;
                nothing has been changed then.
        """
        saved, groups = state_dict["state"], state_dict["param_groups"]
        pending: dict[Tensor, WholeState] = {}
        if saved and len(groups) == len(self.param_groups):
            for here, there in zip(self.param_groups, groups, strict=True):
                entries = [saved.get(key) for key in there["params"]]
                if len(entries) != len(here["params"]):
                    break  # torch's own check below says so
                names = [self._names[parameter] for parameter in here["params"]]
                check_saved(here["algorithm"], names, here["params"], entries)
                pending.update(zip(here["params"], entries, strict=True))
        super().load_state_dict({**state_dict, "state": {}})
        self._pending = pending
        if self._buckets:
            self._load_pending()

    def _load_pending(self) -> None:
        if self._pending:
            for bucket in self._buckets:
                load_full_state(bucket, self._pending)
            self._pending = {}

    def _specify(self) -> list[BucketSpec]:
        if self._buckets:
            return [bucket.spec for bucket in self._buckets]
        return specify(self.param_groups, self._names, self._communicator.world_size)

    def _open(self, options: Sequence[GroupOptions]) -> None:
        specs = self._specify()
        lines = [f"distmuon {__version__}, torch {torch.__version__}", *map(str, options)]
        for spec in specs:
            lines += spec.lines()
        agreement.check_same_setup(self._communicator, lines)
        if self._communicator.world_size > 1:
            parameters = [p for spec in specs for p in spec.parameters]
            norms = [None if p.grad is None else float(p.grad.norm()) for p in parameters]
            names = [name for spec in specs for name in spec.names]
            agreement.check_averaged(self._communicator, names, norms)
        self._buckets = [open_bucket(spec, self._communicator, self._wave_numel) for spec in specs]
        self._load_pending()

    def _agree(self, updates: Sequence[Tensor]) -> list[list[bool]]:
        present = [[p.grad is not None for p in b.spec.parameters] for b in self._buckets]
        found = (b.shard.first_nonfinite(u) for b, u in zip(self._buckets, updates, strict=True))
        agreed = iter(
            agreement.agree_on_gradients(
                self._communicator,
                [name for bucket in self._buckets for name in bucket.spec.names],
                [has for row in present for has in row],
                next((name for name in found if name is not None), None),
                updates[0].device,
            )
        )
        return [[next(agreed) for _ in row] for row in present]


def _numel(specs: Sequence[BucketSpec], algorithm: Algorithm) -> int:
    return sum(t.numel for s in specs if s.algorithm == algorithm for t in s.layout.specs)
