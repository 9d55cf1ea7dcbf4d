"""Which tensors a checkpoint of an optimizer and a model has, and where they lie in memory here.

One list serves both directions: saving writes each place's range to a file, loading reads the same
range of the same tensor, whatever files it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distmuon.buckets import state_shapes
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import dtype_name
from distmuon.checkpoint.manifest import ParameterEntry, TensorEntry
from distmuon.checkpoint.sharded import AnyBucket, Sharded
from distmuon.layout import read_spec
from distmuon.parameters import walk_modules
from distmuon.state_part import wanted_state


@dataclass(frozen=True, slots=True)
class Place:
    """A range of a tensor, and the memory that it has on this rank.

    Attributes:
        name: Of the tensor, as in the manifest.
        shape: Of the whole tensor.
        start: First element of the range.
        data: [n], the range; or the whole tensor in its own shape, any strides.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    data: Tensor

    @property
    def entry(self) -> TensorEntry:
        """The whole tensor, without pieces."""
        return TensorEntry(dtype_name(self.data.dtype, self.name), self.shape)


def state_places(buckets: Sequence[AnyBucket]) -> Iterator[Place]:
    """This rank's ranges of the optimizer's state.

    Args:
        buckets: The optimizer's.

    Yields:
        Each range of each state tensor, the fp32 master of narrow parameters included.
    """
    for bucket in buckets:
        names = dict(zip(bucket.spec.parameters, bucket.spec.names, strict=True))
        for state, flat in bucket.shard.tensors.items():
            yield from _ranges(bucket, names, f"optimizer/{state}", flat, state)


def parameter_places(buckets: Sequence[AnyBucket], model: Mapping[str, Tensor]) -> Iterator[Place]:
    """This rank's ranges of those of a model's parameters that the optimizer updates.

    Args:
        buckets: The optimizer's.
        model: From `model_tensors`.

    Yields:
        Each range, in the parameters' own dtype.
    """
    names = {tensor: name for name, tensor in model.items()}
    for bucket in buckets:
        yield from _ranges(bucket, names, "model", bucket.shard.mine)


def other_places(buckets: Sequence[AnyBucket], model: Mapping[str, Tensor]) -> Iterator[Place]:
    """The rest of a model, whole: frozen parameters and buffers.

    Args:
        buckets: The optimizer's; without any it is all of the model.
        model: From `model_tensors`.

    Yields:
        Each tensor.
    """
    updated = {parameter for bucket in buckets for parameter in bucket.spec.parameters}
    for name, tensor in model.items():
        if tensor not in updated:
            yield Place(f"model/{name}", tuple(tensor.shape), 0, tensor.detach())


def _ranges(
    bucket: AnyBucket, names: Mapping[Tensor, str], prefix: str, flat: Tensor, state: str = ""
) -> Iterator[Place]:
    for segment in bucket.segments(state):
        parameter = bucket.shard.parameters[segment.tensor]
        if parameter in names:
            data = flat[segment.shard_start :][: segment.numel]
            name = f"{prefix}/{names[parameter]}"
            shape = bucket.spec.places(state).specs[segment.tensor].shape
            yield Place(name, shape, segment.tensor_start, data)


def model_tensors(model: nn.Module | None) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once, named without wrappers.

    Args:
        model: Any module, in DistributedDataParallel or compiled too; or None for nothing.

    Returns:
        The live tensors by FQN.

    Raises:
        CheckpointError: for a module with extra state, which is no tensor.
    """
    found: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for path, module, _ in walk_modules(model) if model is not None else ():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                f"{path or type(module).__name__} has extra state (get_extra_state), which a "
                "checkpoint does not hold. Put it into metadata= or tensors=.",
                entry="checkpoint-not-written",
            )
        transient = module._non_persistent_buffers_set
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for leaf, tensor in tensors:
            if leaf not in transient and tensor not in seen:
                seen.add(tensor)
                found[f"{path}.{leaf}" if path else leaf] = tensor
    return found


def model_entries(tensors: Mapping[str, Tensor]) -> dict[str, TensorEntry]:
    """Shapes and dtypes of a model's tensors.

    Args:
        tensors: From `model_tensors`.
    """
    return {
        name: TensorEntry(dtype_name(each.dtype, name), tuple(each.shape))
        for name, each in tensors.items()
    }


def optimizer_parameters(optimizer: Sharded) -> dict[str, ParameterEntry]:
    """The optimizer's parameters by FQN, in the order of its groups; no step yet.

    Args:
        optimizer: Before or after its first step.
    """
    names = optimizer.parameter_names
    return {
        names[parameter]: ParameterEntry(
            group["algorithm"],
            dtype_name(parameter.dtype, names[parameter]),
            tuple(parameter.shape),
            index,
            0,
        )
        for index, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }


def expected_state(optimizer: Sharded) -> dict[str, TensorEntry]:
    """Every state tensor that a checkpoint of this optimizer has, whole.

    Args:
        optimizer: Before or after its first step.
    """
    expected: dict[str, TensorEntry] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = optimizer.parameter_names[parameter]
            wide = torch.promote_types(parameter.dtype, torch.float32)
            wanted = wanted_state(group["algorithm"], parameter, group.get("stochastic_rounding"))
            spec = read_spec(name, parameter.shape, group)
            shapes = {"master": spec.shape, **state_shapes(group["algorithm"], spec)}
            for state in (key for key in wanted if key != "step"):
                shape = shapes[state]
                entry = TensorEntry(dtype_name(wide, name), shape)
                expected[f"optimizer/{state}/{name}"] = entry
    return expected
