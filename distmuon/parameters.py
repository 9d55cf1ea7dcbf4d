"""The parameters of a model: each once, with all its names, wrappers left out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from distmuon.errors import see


@dataclass(frozen=True, slots=True)
class Use:
    """One place where a parameter is registered.

    Attributes:
        fqn: Name from the root, wrappers left out.
        owner: The module it belongs to.
    """

    fqn: str
    owner: nn.Module


@dataclass(frozen=True, slots=True)
class Entry:
    """A parameter with all its uses, the first registered first."""

    parameter: nn.Parameter
    uses: tuple[Use, ...]


_TRANSPARENT = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_WRAPPERS = frozenset(
    {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine"}
)


def find_parameters(model: nn.Module) -> list[Entry]:
    """List every parameter of a model once, with all its names.

    Args:
        model: Any module, wrapped or not.

    Returns:
        Parameters in the order in which the model registers them.

    Raises:
        TypeError: `model` is no module, or a parameter is a DTensor.
        ValueError: nothing is trainable, or a parameter is uninitialized or empty.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Invalid model of type {type(model).__name__}. Must be a torch.nn.Module: it is the "
            "modules that tell an embedding from a hidden matrix." + see("routing")
        )
    parameters: dict[int, nn.Parameter] = {}
    uses: dict[int, list[Use]] = defaultdict(list)
    named: dict[str, int] = {}
    for path, module, owner in walk_modules(model):
        for leaf, parameter in own_parameters(module):
            fqn = f"{path}.{leaf}" if path else leaf
            _check(fqn, parameter)
            if named.setdefault(fqn, id(parameter)) != id(parameter):
                raise ValueError(
                    f"Two parameters are called {fqn!r} once wrappers are left out."
                    + see("routing")
                )
            parameters[id(parameter)] = parameter
            uses[id(parameter)].append(Use(fqn, owner))
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(
            f"{type(model).__name__} has {len(parameters)} parameters and none is trainable. "
            "Set requires_grad=True on those to train before building the groups." + see("routing")
        )
    return [Entry(parameters[key], tuple(places)) for key, places in uses.items()]


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of those registered in a module itself, one of several names each.

    What `named_parameters(recurse=False)` yields: to ask 90,000 modules in that way takes seconds.
    """
    for leaf, parameter in module._parameters.items():
        if parameter is not None:
            yield leaf, parameter


def walk_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Yield each module's canonical path, itself, and the module its parameters belong to."""
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical: dict[str, str] = {}
    for path, module in modules.items():
        above, _, part = path.rpartition(".")
        prefix = canonical.get(above, "")
        left_out = part in _TRANSPARENT or (part == "module" and _is_wrapper(modules[above]))
        if not left_out:
            prefix = f"{prefix}.{part}" if prefix else part
        canonical[path] = prefix
        owner = module
        if isinstance(module, ParametrizationList):
            # weight_norm and the like keep `embed.weight` as `embed.parametrizations.weight.*`.
            owner = modules[".".join(path.split(".")[:-2])]
        yield prefix, module, owner


def _is_wrapper(module: nn.Module) -> bool:
    # By name: DeepSpeed must not be imported for this, and a model may have its own `module`.
    return any(base.__name__ in _WRAPPERS for base in type(module).__mro__)


def _check(fqn: str, parameter: nn.Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(
            f"{fqn} is uninitialized (a lazy module). Run one batch through the model first."
            + see("routing")
        )
    if hasattr(parameter, "placements"):
        raise TypeError(
            f"{fqn} is a DTensor. distmuon shards plain parameters itself: leave the model "
            "unsharded (DistributedDataParallel), or use an optimizer made for FSDP2."
            + see("sharded-elsewhere")
        )
    if parameter.requires_grad and parameter.numel() == 0:
        raise ValueError(
            f"{fqn} has shape {list(parameter.shape)}, no elements. Freeze it; or, if ZeRO-3 took "
            "the parameters apart (deepspeed.zero.Init), use ZeRO-1 instead."
            + see("deepspeed-zero3")
        )


def canonical_name(name: str) -> str:
    """The FQN without what DistributedDataParallel and torch.compile put into it.

    Args:
        name: A parameter's name, from `named_parameters()` of a wrapped or a bare model.
    """
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts[1:] if parts[0] == "module" and len(parts) > 1 else parts)
