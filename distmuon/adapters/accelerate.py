"""Hugging Face Accelerate: one call after `prepare`, and nothing is lost.

    optimizer = Muon(build_param_groups(model), process_group=torch.distributed.group.WORLD)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    attach(accelerator, optimizer)

Accelerate calls `optimizer.state_dict()` on every process and writes the main process's. The state
therefore goes to `<folder>/distmuon`, every process its own part, and Accelerate's `optimizer.bin`
only says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distmuon import GradScaler, Muon, checkpoint
from distmuon.errors import see

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError(
        "distmuon.adapters.accelerate needs Accelerate: pip install 'distmuon[accelerate]'."
        + see("missing-package")
    ) from error

FOLDER = "distmuon"
"""Where the optimizer's state lies in a checkpoint of Accelerate or of the Trainer."""

_SUPPORTED = ("NO", "MULTI_CPU", "MULTI_GPU")


def attach(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, model: nn.Module | None = None
) -> None:
    """Make `save_state`, `load_state`, clipping and accumulation right. A collective; call it once.

    With `reduce="hook"` or "owned" the optimizer averages the gradients from now on, so call it
    before the first backward pass.

    Args:
        accelerator: After it prepared model and optimizer.
        optimizer: What `prepare` returned for a `Muon`, or the `Muon` itself.
        model: What Accelerate returned for the model; needed with `reduce="hook"` and "owned".

    Raises:
        TypeError: if the optimizer is no `Muon`.
        ValueError: if model or optimizer were not prepared, the optimizer has another number of
            processes, or Accelerate shards or scales in a way that does not go with the optimizer.
    """
    _refuse_sharded(accelerator)
    muon = unwrap(optimizer)
    _refuse_other_processes(accelerator, muon)
    prepared = [unwrap_any(each) for each in accelerator._optimizers]
    if muon not in prepared:
        raise ValueError(
            "This optimizer was not prepared. Call model, optimizer = "
            "accelerator.prepare(model, optimizer) first, then attach(accelerator, optimizer)."
            + see("accelerate")
        )
    if muon.policy.reduce != "ddp" and accelerator.num_processes > 1:
        _reduce(accelerator, muon, model)
    index = prepared.index(muon)
    folder = FOLDER if index == 0 else f"{FOLDER}_{index}"
    accelerator.register_save_state_pre_hook(
        lambda models, weights, output_dir: save_state(Path(output_dir) / folder, muon)
    )
    accelerator.register_load_state_pre_hook(
        lambda models, input_dir: load_state(Path(input_dir) / folder, muon)
    )


def save_state(folder: Path, muon: Muon) -> None:
    """Save the optimizer's state, and let `state_dict` refer to it until it changes. A collective.

    Args:
        folder: Its own folder in the checkpoint.
        muon: The optimizer.
    """
    checkpoint.save(folder, muon)
    muon.keeper.saved_in(folder.name)


def load_state(folder: Path, muon: Muon) -> None:
    """Load what `save_state` saved; `load_state_dict` may then refer to it. A collective.

    Args:
        folder: The same folder.
        muon: The optimizer, over any number of processes.
    """
    # Without the folder it is one process's ordinary file, or load_state_dict says what is missing.
    if folder.is_dir():
        checkpoint.load(folder, muon)
        muon.keeper.loaded_from(folder.name)


def unwrap(optimizer: torch.optim.Optimizer) -> Muon:
    """The `Muon` inside Accelerate's wrapper.

    Args:
        optimizer: Prepared or not.

    Raises:
        TypeError: if there is none.
    """
    inner = unwrap_any(optimizer)
    if not isinstance(inner, Muon):
        raise TypeError(
            f"Invalid optimizer of type {type(inner).__name__}. Must be a distmuon.Muon."
            + see("accelerate")
        )
    return inner


def unwrap_any(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, whatever it is."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def _refuse_sharded(accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        raise ValueError(
            "DeepSpeed shards, clips, saves and loads by itself: build the optimizer with "
            "distmuon.deepspeed.from_model, and leave attach out." + see("sharded-elsewhere")
        )
    if kind not in [DistributedType[name] for name in _SUPPORTED]:
        raise ValueError(
            f"Accelerate runs with distributed_type={kind.value}, which shards model or optimizer "
            f"itself. Muon shards its own state: use one of {', '.join(_SUPPORTED)}."
            + see("sharded-elsewhere")
        )


def _refuse_other_processes(accelerator: Accelerator, muon: Muon) -> None:
    world_size = muon.communicator.world_size
    if world_size != accelerator.num_processes:
        raise ValueError(
            f"The optimizer is sharded over {world_size} processes, Accelerate runs "
            f"{accelerator.num_processes}. Build the Accelerator first, then "
            "Muon(..., process_group=torch.distributed.group.WORLD)." + see("accelerate")
        )


def _reduce(accelerator: Accelerator, muon: Muon, model: nn.Module | None) -> None:
    """Let the optimizer average the gradients, and everything that asks for them ask it."""
    reduce = muon.policy.reduce
    modules = [] if model is None else list(model.modules())
    wrapper = next((each for each in modules if isinstance(each, DistributedDataParallel)), None)
    if model is None or (reduce == "hook") != (wrapper is not None):
        prepare = (
            "accelerator.prepare"
            if reduce == "hook"
            else "accelerator.prepare_model(model, evaluation_mode=True), which leaves it bare,"
        )
        raise ValueError(
            f'With reduce="{reduce}" the optimizer averages the model\'s gradients. Pass what '
            f"{prepare} returned for it: attach(accelerator, optimizer, model)." + see("accelerate")
        )
    if reduce == "owned":
        # Accelerate's accumulate() asks the model.
        model.no_sync = muon.no_sync  # type: ignore[assignment]
    muon.attach(wrapper if wrapper is not None else model)
    if accelerator.scaler is not None:
        _scale(accelerator)
    # The Accelerator has no hook for clipping, and its own method would measure and scale p.grad,
    # which is not what the optimizer steps with. Only this accelerator is changed.
    accelerator.clip_grad_norm_ = partial(_clip, accelerator, muon, accelerator.clip_grad_norm_)


def _scale(accelerator: Accelerator) -> None:
    """Put a scaler that sees the averaged gradients in the place of Accelerate's."""
    theirs = accelerator.scaler
    ours = GradScaler(accelerator.device.type, enabled=theirs.is_enabled())
    ours.load_state_dict(theirs.state_dict())
    for each in accelerator._optimizers:
        if each.scaler is theirs:
            each.scaler = ours
    accelerator.scaler = ours


def _clip(
    accelerator: Accelerator,
    muon: Muon,
    otherwise: Callable[..., Tensor],
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2,
) -> Tensor:
    """`Accelerator.clip_grad_norm_` where the optimizer has the averaged gradients."""
    given = {id(p): p for p in ([parameters] if isinstance(parameters, Tensor) else parameters)}
    mine = {id(p) for group in muon.param_groups for p in group["params"]}
    if mine.isdisjoint(given):
        return otherwise(list(given.values()), max_norm, norm_type)
    trained = {key for key, parameter in given.items() if parameter.requires_grad}
    if trained != mine or norm_type != 2:
        raise ValueError(
            "Averaged gradients are clipped together: pass model.parameters(), all of them, and "
            "norm_type=2." + see("accelerate")
        )
    if accelerator.scaler is not None:
        accelerator.scaler.unscale_(muon)
    return muon.clip_grad_norm_(max_norm)
