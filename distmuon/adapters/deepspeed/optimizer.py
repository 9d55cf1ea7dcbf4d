"""The client optimizer that DeepSpeed calls: Muon and AdamW on the partitions that ZeRO made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from distmuon import Muon, agreement
from distmuon.adapters.deepspeed.partition import (
    Partition,
    compare_values,
    find_process_group,
    first_difference,
    new_state,
    open_partition,
)
from distmuon.adapters.deepspeed.refusals import (
    MomentumKey,
    check_momentum_key,
    read_groups,
    read_options_here,
    refuse_zero3,
)
from distmuon.adapters.deepspeed.stepping import prepare, settle, update
from distmuon.capture import refuse_capture, uncompiled
from distmuon.collectives import Communicator
from distmuon.errors import see
from distmuon.group_check import PLAIN_READING, refuse_other_structure
from distmuon.more_options import MoreOptions
from distmuon.options import ALGORITHMS, NsDtype, Policy, read_options
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.plan import ExchangePlan
from distmuon.report import Report, planned_loads
from distmuon.update_rules import AdjustLrFn
from distmuon.version import __version__


class ZeroOrtho(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, inside ZeRO-1, ZeRO-2 or BF16_Optimizer.

    DeepSpeed averages, unscales and clips the gradients, skips steps that overflow, and publishes
    the parameters; this class updates the fp32 partitions in between. State has the partition's
    shape, so DeepSpeed saves it. In stage 0, where nothing is partitioned, every rank steps alike.

    [Note: name] DeepSpeed orthogonalizes gradients itself for a client optimizer whose class name
    contains "muon" and parameters that have `use_muon`; so this name may not.
    """

    def __init__(  # noqa: PLR0913 - the hyperparameters of Muon and AdamW
        self,
        groups: Iterable[Mapping[str, Any]],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = "auto",
        ns_steps: int | None = None,
        ns_dtype: NsDtype | None = None,
        adjust_lr_fn: AdjustLrFn = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        wave_bytes: int = 64 * 2**20,
        momentum_key: MomentumKey = "momentum_buffer",
        **more: Unpack[MoreOptions],
    ) -> None:
        """Check the groups. DeepSpeed has not seen them yet, nothing is allocated or sent.

        Args:
            groups: From `build_param_groups`: "params" as (FQN, parameter) pairs.
            lr: Learning rate of groups that have none of their own.
            weight_decay: As `distmuon.Muon`, like all that follow.
            momentum: Decay of the momentum average.
            nesterov: Whether to look ahead.
            ns_coefficients: Newton-Schulz coefficients.
            ns_steps: Newton-Schulz iterations.
            ns_dtype: Dtype of the Newton-Schulz products.
            adjust_lr_fn: Shape scaling.
            betas: AdamW's moment decays.
            eps: Offset of AdamW's denominator.
            wave_bytes: Bytes of momentum that one rank fetches at a time.
            momentum_key: Name of Muon's momentum in the state. "exp_avg" is what DeepSpeed's
                universal checkpoint converter looks for.
            **more: As `distmuon.Muon`.

        Raises:
            ValueError: for a value out of range, an argument of `distmuon.Muon` that is not for
                DeepSpeed, ZeRO-3 parameters, or a class name that it would take for its own Muon.
        """
        if "muon" in type(self).__name__.lower():
            raise ValueError(
                f"DeepSpeed takes {type(self).__name__} for its own Muon because of its name, and "
                'would orthogonalize twice. Give the class a name without "muon".'
                + see("deepspeed")
            )
        defaults: dict[str, Any] = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "ns_steps": ns_steps,
            "ns_dtype": ns_dtype,
            "adjust_lr_fn": adjust_lr_fn,
            **PLAIN_READING,
            "betas": betas,
            "eps": eps,
            **read_options_here(more),
        }
        plain, self._named = read_groups(groups, defaults)
        self._wave_numel = Policy(wave_bytes=wave_bytes).wave_numel
        self.momentum_key = check_momentum_key(momentum_key)
        self._partitions: dict[int, Partition] = {}
        self._communicators: dict[Any, Communicator] = {}
        self._replica: Muon | None = None
        self._open: Literal["no", "read", "checked"] = "no"
        self._calls = self._expected = self._flops = 0
        self._updates: Counter[int] = Counter()  # of each group; a state may count earlier runs
        super().__init__(plain, defaults)
        # While DeepSpeed shows one group to step(), this list still has them all.
        self._all_groups: list[dict[str, Any]] = self.param_groups

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor: ZeRO fixes its partitions in `deepspeed.initialize`.

        Args:
            param_group: As in torch.optim.

        Raises:
            RuntimeError: after construction.
        """
        if hasattr(self, "_all_groups"):
            raise RuntimeError(
                "DeepSpeed partitions the groups once, in deepspeed.initialize. Give all "
                "parameters to from_model, and unfreeze later ones by their lr instead."
                + see("deepspeed")
            )
        super().add_param_group(param_group)

    @override
    @torch.no_grad()
    @uncompiled
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the groups that DeepSpeed shows, on all ranks together.

        Args:
            closure: Re-evaluates the model; DeepSpeed passes none.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: at the first step, if the partitions are not what they are read as.
            RuntimeError: on every rank, if one has a problem or their settings differ.
            FloatingPointError: on every rank, if a gradient is not finite.
        """
        refuse_capture("ZeroOrtho.step")
        loss = None if closure is None else torch.enable_grad()(closure)()
        if self._open != "checked":
            self._check()
        if self._replica is not None:
            self._replica.step()
        else:
            # All groups agree before the first of them is touched.
            shown = [(self._partitions[group["index"]], group) for group in self.param_groups]
            for ready in [prepare(p, group, self.ensure_state(p)) for p, group in shown]:
                state = self.ensure_state(ready.partition)
                work = update(ready, state, self.momentum_key)
                self._calls += work.matrices
                self._flops += work.flops
                self._expected += len(ready.partition.bucket.owned)
                self._updates[ready.partition.number] += 1
        return loss

    @override
    def state_dict(self) -> dict[str, Any]:
        """This rank's state, as DeepSpeed saves it: the files of all ranks together are the whole.

        Returns:
            torch's form; each group says which parameters lie where.
        """
        return super().state_dict() if self._replica is None else self._replica.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take hyperparameters and state of the same rank of as many.

        Args:
            state_dict: From `state_dict`.

        Raises:
            ValueError: if it was saved with other groups, another order or another number of
                ranks; nothing has been changed then.
        """
        self._read()
        if self._replica is not None:
            self._replica.load_state_dict(state_dict)
            self.param_groups = self._replica.param_groups
        else:
            self._refuse_other_places(state_dict["param_groups"])
            super().load_state_dict(state_dict)
        self._all_groups = self.param_groups

    @property
    def plan(self) -> tuple[ExchangePlan, ...]:
        """This rank's plan for each group of matrices; empty before the first step."""
        return tuple(p.bucket.plan for p in self._partitions.values() if p.bucket.plan is not None)

    @property
    def partitions(self) -> Mapping[int, Partition]:
        """Each group's partition by the number in its group; empty in stage 0. Sends nothing.

        Raises:
            ValueError: if DeepSpeed's partitions are not what they are read as.
        """
        self._read()
        return self._partitions

    @property
    def communicator(self) -> Communicator:
        """The ranks that the first group is sharded over; this one alone in stage 0."""
        return next(iter(self._communicators.values()), Communicator(None))

    def report(self) -> Report:
        """What this rank has done so far. Never a collective.

        Returns:
            Counts of matrices, Newton-Schulz calls and bytes; DeepSpeed's own bytes and masters
            are not in it.
        """
        if self._replica is not None:
            return self._replica.report()
        sent: Counter[str] = Counter()
        for communicator in self._communicators.values():
            sent.update(communicator.bytes_sent)
        plans = self.plan
        elements = {
            rule: sum(
                p.numel()
                for group in self._all_groups
                for _, p in self._named[group["index"]]
                if group["algorithm"] == rule
            )
            for rule in ALGORITHMS
        }
        first = self.communicator
        return Report(
            steps=max(self._updates.values(), default=0),
            skipped=0,
            rank=first.rank,
            world_size=first.world_size,
            matrices=sum(sum(plan.ownership.counts()) for plan in plans),
            matrices_owned=sum(plan.ownership.counts()[plan.rank] for plan in plans),
            newton_schulz_calls=self._calls,
            newton_schulz_expected=self._expected,
            newton_schulz_flops=self._flops,
            loads=planned_loads(
                plan.ownership
                for plan in plans
                if plan.ownership.layout.world_size == first.world_size
            ),
            bytes_sent=dict(sent),
            gradient_norms=None,
            diagnostics=None,
            state_bytes=sum(
                value.untyped_storage().nbytes()
                for state in self.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ),
            muon_parameters=elements["muon"],
            adamw_parameters=elements["adamw"],
            seconds={},
        )

    def _read(self) -> None:
        """Find out what DeepSpeed made of the groups. Sends nothing."""
        if self._open != "no":
            return
        for named in self._named:
            for name, parameter in named:
                refuse_zero3(name, parameter)
        if any(hasattr(p, "_dp_group") for named in self._named for _, p in named):
            self._read_partitions()
        else:
            self._replica = self._replicate()
        self._open = "read"

    def _read_partitions(self) -> None:
        for group in self._all_groups:
            process_group = find_process_group(self._named[group["index"]])
            if process_group not in self._communicators:
                self._communicators[process_group] = Communicator(process_group)
        for group in self._all_groups:
            named = self._named[group["index"]]
            communicator = self._communicators[find_process_group(named)]
            partition = open_partition(group, named, communicator, wave_numel=self._wave_numel)
            self._partitions[group["index"]] = partition
            group.update(partition.place())

    def _replicate(self) -> Muon:
        """Stage 0: no partition, so every rank holds everything and makes the same step."""
        groups = []
        for group in self._all_groups:
            named = self._named[group["index"]]
            own = [parameter for _, parameter in named]
            if any(a is not b for a, b in zip(group["params"], own, strict=False)):
                raise ValueError(
                    "This optimizer works in ZeRO stages 1 and 2, in BF16_Optimizer, and in stage "
                    f"0 with fp32 weights; DeepSpeed has put something else in place of "
                    f'{named[0][0]}. Set "zero_optimization": {{"stage": 1}} or 2.'
                    + see("deepspeed")
                )
            groups.append({**group, "params": named})
        replica = Muon(groups, max_update_rms=self.defaults["max_update_rms"])
        replica.param_groups = self._all_groups
        self.state = replica.state
        return replica

    def _check(self) -> None:
        """Compare what the ranks have read, before anything is exchanged. A collective."""
        problem = None
        described: list[tuple[Partition, list[str]]] = []
        try:
            self._read()
            described = [self._describe(group) for group in self._all_groups if self._partitions]
        except (TypeError, ValueError) as error:
            if not self._communicators:
                raise  # every rank has the same parameters and configuration
            problem = error
        self.raise_together(problem)
        for partition, lines in described:
            agreement.check_same_setup(partition.communicator, lines)
            self.ensure_state(partition)
        self._open = "checked"

    def _describe(self, group: Mapping[str, Any]) -> tuple[Partition, list[str]]:
        partition = self._partitions[group["index"]]
        compare_values(partition)
        lines = partition.bucket.spec.lines([read_options(group, partition.number)])
        return partition, [f"distmuon {__version__}, torch {torch.__version__}", *lines]

    def ensure_state(self, partition: Partition) -> dict[str, Any]:
        """A partition's state, zeros if it has none.

        DeepSpeed looks once, after the first group's step, which state there is: all groups must
        have theirs by then.

        Args:
            partition: One of `partitions`.

        Returns:
            Its entry in `state`.
        """
        flat = partition.bucket.shard.master
        state: dict[str, Any] = self.state[flat]
        if not state:
            state.update(new_state(partition.bucket.spec.algorithm, flat, self.momentum_key))
        return state

    def raise_together(self, problem: Exception | None) -> None:
        """Raise on every rank if one of them has a problem. A collective.

        Args:
            problem: This rank's.
        """
        for communicator in self._communicators.values():
            settle(communicator, self._device, agreement.Finding([True], None, "", problem))

    @property
    def _device(self) -> torch.device:
        first: Tensor = self._all_groups[0]["params"][0]
        return first.device

    def _refuse_other_places(self, saved: Sequence[Mapping[str, Any]]) -> None:
        if len(saved) != len(self._all_groups):
            raise ValueError(
                f"The checkpoint has {len(saved)} parameter groups, this optimizer has "
                f"{len(self._all_groups)}. Build it as in the run that saved it."
                + see("state-mismatch")
            )
        for here, there in zip(self._all_groups, saved, strict=True):
            refuse_other_structure(here, there, f"Group {here['index']}")
            difference = first_difference(self._partitions[here["index"]].place(), there)
            if difference is not None:
                raise ValueError(
                    "The checkpoint's parameters do not lie where this run has them: "
                    f"{difference}. On another number of ranks, or with another model order, load "
                    "with distmuon.deepspeed.load_resharded." + see("state-mismatch")
                )
