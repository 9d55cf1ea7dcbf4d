"""A parameter group inside DeepSpeed, read as a layout of ours.

ZeRO-1, ZeRO-2 and BF16_Optimizer lay the parameters of a group end to end in one low-precision
buffer, cut it into equal partitions, and leave the client optimizer one 1-D fp32 tensor in place of
the group's parameters: this rank's partition. What follows needs the parameters only:

- where each one lies: its offset in the storage that it became a view of;
- how the buffer is cut: the length of the partition;
- over whom: the process group that DeepSpeed notes on every parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmuon.adapters.deepspeed.refusals import MomentumKey, refuse_companion, refuse_zero3
from distmuon.buckets import STATE_NAMES, Bucket, BucketSpec
from distmuon.collectives import Communicator
from distmuon.description import outline
from distmuon.errors import see
from distmuon.exchange import Exchange
from distmuon.group_check import check_matrix
from distmuon.layout import Layout, read_spec
from distmuon.options import Algorithm
from distmuon.ownership import assign_fixed
from distmuon.shard import FlatRange
from distmuon.split_exchange import SplitExchange

Named = Sequence[tuple[str, Tensor]]
# What `Partition.place` says, and a group in a checkpoint with it.
PLACE = ("names", "shapes", "offsets", "world_size", "shard_numel")


@dataclass(frozen=True, slots=True)
class Partition:
    """One parameter group, ready to be stepped.

    Attributes:
        number: Of the group.
        bucket: The flat partition with its state, its layout, its owners and its exchange.
        communicator: The ranks that the group is partitioned over.
        rule: What of the group the partition was opened for: its algorithm, and how it reads
            matrices.
    """

    number: int
    bucket: Bucket[FlatRange]
    communicator: Communicator
    rule: str

    def refuse_other_rule(self, group: Mapping[str, Any]) -> None:
        """Refuse a group that was changed by hand: state and owners are those of its old rule.

        Args:
            group: The `param_groups` entry as it is now.

        Raises:
            ValueError: if its algorithm, axes or blocks are others.
        """
        now = rule_of(group)
        if now != self.rule:
            raise ValueError(
                f"Group {self.number} ({self.bucket.spec.names[0]}, ...) is {now} now, and was "
                f"{self.rule} when its partition was laid out. Under DeepSpeed a group keeps its "
                "rule: leave it, or build the optimizer and call deepspeed.initialize anew."
                + see("changed-parameters")
            )

    @property
    def grad(self) -> Tensor:
        """[shard_numel], averaged, unscaled and clipped by DeepSpeed.

        Raises:
            RuntimeError: if there is none.
        """
        grad = self.bucket.shard.master.grad
        if grad is None:
            raise RuntimeError(
                "The partition has no gradient: DeepSpeed sets it just before it calls this "
                "optimizer. Call engine.backward(loss) and engine.step(), never optimizer.step()."
                + see("deepspeed")
            )
        return grad

    def place(self) -> dict[str, Any]:
        """Where every parameter lies, as plain data: what a checkpoint has to say about itself."""
        layout = self.bucket.spec.layout
        return {
            "names": [spec.name for spec in layout.specs],
            "shapes": [list(spec.shape) for spec in layout.specs],
            "offsets": list(layout.offsets),
            "world_size": layout.world_size,
            "shard_numel": layout.shard_numel,
        }


def rule_of(group: Mapping[str, Any]) -> str:
    """What of a group its partition depends on, without the number of tensors."""
    return outline(group).partition(" ")[2]


def find_process_group(named: Named) -> dist.ProcessGroup:
    """The ranks over which DeepSpeed partitions a group.

    Args:
        named: The group's parameters as (FQN, parameter).

    Returns:
        The process group.

    Raises:
        ValueError: for ZeRO-3, or parameters that ZeRO does not know.
    """
    for name, parameter in named:
        refuse_zero3(name, parameter)
        if not hasattr(parameter, "_dp_group"):
            raise ValueError(
                f"DeepSpeed partitioned other parameters than {name}: it was replaced after the "
                "optimizer had been built, as AutoTP does (tensor_parallel.autotp_size in the "
                "config, which distmuon does not support). Build the optimizer last, from the "
                "model that deepspeed.initialize gets." + see("deepspeed")
            )
    group: dist.ProcessGroup = named[0][1]._dp_group  # type: ignore[attr-defined]
    return group


def read_layout(
    named: Named, flat: Tensor, world_size: int, group: Mapping[str, Any]
) -> tuple[Layout, Named]:
    """Read where the parameters of a group lie in its flat buffer.

    Args:
        named: The group's parameters as (FQN, parameter), in any order.
        flat: [shard_numel], this rank's fp32 partition.
        world_size: Number of partitions.
        group: Says how its matrices are read.

    Returns:
        The layout, and the parameters in its order.

    Raises:
        ValueError: if parameters and partition do not fit together, saying how.
    """
    first = named[0][1]
    if flat.device != first.device:
        raise ValueError(
            f"The partition is on {flat.device}, the parameters are on {first.device}: "
            "offload_optimizer keeps it in host memory, from where the exchange over "
            f"{first.device.type} cannot send. Remove zero_optimization.offload_optimizer."
            + see("deepspeed")
        )
    for name, parameter in named:
        if not parameter.is_contiguous():
            raise ValueError(
                f"{name} is not contiguous in DeepSpeed's flat buffer." + see("deepspeed")
            )
        if _storage(parameter) != _storage(first):
            raise ValueError(
                f"{name} and {named[0][0]} lie in different buffers: one of them got new storage "
                "after deepspeed.initialize (model.to(), parameter.data = ...). Move and change "
                "the model before it." + see("deepspeed")
            )
    ordered = sorted(named, key=lambda entry: entry[1].storage_offset())
    base = ordered[0][1].storage_offset()
    layout = Layout(
        tuple(read_spec(name, p.shape, group) for name, p in ordered),
        tuple(int(p.storage_offset()) - int(base) for _, p in ordered),
        world_size,
        flat.numel(),
    )
    held = first.untyped_storage().nbytes() // first.element_size()
    if base + layout.numel > held:
        raise ValueError(
            f"{world_size} partitions of {flat.numel()} elements do not fit into the flat buffer "
            f"of {held}, which starts with {ordered[0][0]}." + see("deepspeed")
        )
    return layout, ordered


def open_partition(
    group: Mapping[str, Any], named: Named, communicator: Communicator, *, wave_numel: int
) -> Partition:
    """Read a group's layout and plan its exchange. Sends nothing.

    Args:
        group: What DeepSpeed made of the group: "params" has this rank's fp32 partition.
        named: Its parameters as (FQN, parameter), in any order.
        communicator: Over the ranks of `find_process_group`.
        wave_numel: Most elements that one owner fetches in a wave.

    Returns:
        The partition, without state.

    Raises:
        ValueError: if parameters and partition do not fit together, saying how, or if the group
            was changed by hand to a rule that its parameters cannot have.
    """
    refuse_companion(group, group["index"])
    for name, parameter in named if group["algorithm"] == "muon" else ():
        check_matrix(name, parameter, group)
    rank, algorithm, flat = communicator.rank, group["algorithm"], group["params"][0]
    layout, ordered = read_layout(named, flat, communicator.world_size, group)
    parameters = tuple(parameter for _, parameter in ordered)
    ownership = assign_fixed(layout) if algorithm == "muon" else None
    spec = BucketSpec(algorithm, parameters, (0,) * len(parameters), layout, ownership)
    # The buffer that ZeRO made the parameters views of, as far as it is cut into partitions.
    whole = parameters[0].detach().as_strided((layout.numel,), (1,))
    plan, shard = spec.plan(rank, wave_numel), FlatRange(layout, rank, parameters, whole, flat, {})
    if plan is None:
        bucket = Bucket(spec, shard, None, None, None)
        return Partition(group["index"], bucket, communicator, rule_of(group))
    split = SplitExchange(plan, communicator, torch.float32)  # assign_fixed splits nothing
    bucket = Bucket(spec, shard, plan, Exchange(plan, communicator), split)
    return Partition(group["index"], bucket, communicator, rule_of(group))


def compare_values(partition: Partition) -> None:
    """Refuse a partition that does not hold what the parameters hold.

    The one check that no wrong guess about the layout can pass.

    Args:
        partition: Before its first step.

    Raises:
        ValueError: naming the first parameter that differs.
    """
    spec, shard = partition.bucket.spec, partition.bucket.shard
    for segment in shard.segments:
        parameter = spec.parameters[segment.tensor].detach()
        low = parameter.reshape(-1)[segment.tensor_start :][: segment.numel]
        high = shard.master.detach()[segment.shard_start :][: segment.numel].to(low.dtype)
        if not torch.equal(low.nan_to_num(), high.nan_to_num()):
            raise ValueError(
                f"{spec.names[segment.tensor]} differs from its fp32 copy in the partition of rank "
                f"{partition.communicator.rank}. Either it was written to after "
                "deepspeed.initialize, whose copy would overwrite it at the first step (load "
                "weights before, or with engine.load_checkpoint), or this version of DeepSpeed "
                "lays parameters out in another way than distmuon reads." + see("deepspeed")
            )


def new_state(algorithm: Algorithm, flat: Tensor, momentum_key: MomentumKey) -> dict[str, Any]:
    """State of a partition before its first update.

    Args:
        algorithm: The update rule.
        flat: [shard_numel], the partition.
        momentum_key: Name of Muon's momentum.

    Returns:
        Zeros of the partition's shape by name: that shape is what makes DeepSpeed save and show
        them.
    """
    if algorithm == "adamw":
        return {"step": 0, **{name: torch.zeros_like(flat) for name in STATE_NAMES["adamw"]}}
    state = {"step": 0, momentum_key: torch.zeros_like(flat)}
    momentum_of(state, momentum_key)
    return state


def momentum_of(state: dict[str, Any], momentum_key: MomentumKey) -> Tensor:
    """Muon's momentum in a partition's state.

    With the key "exp_avg" there is also an "exp_avg_sq", which DeepSpeed's universal checkpoint
    insists on: one zero, as long as the partition to the eye. Loading such a checkpoint makes a
    real tensor of it, which is dropped here.

    Args:
        state: Of a Muon group's partition; completed in place.
        momentum_key: Its name.

    Returns:
        [shard_numel].
    """
    momentum: Tensor = state[momentum_key]
    if momentum_key == "exp_avg":
        second = state.get("exp_avg_sq")
        if second is None or second.stride() != (0,):
            state["exp_avg_sq"] = momentum.new_zeros(1).expand(momentum.shape)
    return momentum


def first_difference(here: Mapping[str, Any], there: Mapping[str, Any]) -> str | None:
    """The first difference between two results of `Partition.place`, for a person."""
    rows = [
        [f"{n} {s} at {o}" for n, s, o in zip(p["names"], p["shapes"], p["offsets"], strict=True)]
        for p in (here, there)
    ]
    for mine, saved in zip(*rows, strict=False):
        if mine != saved:
            return f"here {mine}, there {saved}"
    for key in ("world_size", "shard_numel"):
        if here[key] != there[key]:
            return f"here {key} {here[key]}, there {there[key]}"
    missing = set(here["names"]) ^ set(there["names"])
    return f"{sorted(missing)[0]} is in only one of them" if missing else None


def _storage(parameter: Tensor) -> int:
    return parameter.untyped_storage().data_ptr()
