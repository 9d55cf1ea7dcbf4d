"""The optimizer and the learning-rate schedule that a configuration asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distmuon import Muon, QKClip, build_param_groups
from distmuon.param_groups import MatrixRule
from distmuon.qk_clip import attention_layers, record
from distmuon.training.baselines import BASELINES, OURS
from distmuon.training.config import Config, ConfigError, OptimizerConfig, TrainConfig
from distmuon.training.world import World
from distmuon.update_rules import AdjustLrMode, adjust_lr_factor

# What some classes count in their groups instead of in their state.
_COUNTER = "step"


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    world: World,
    *,
    clip: QKClip | None = None,
    diagnostics_every: int = 0,
) -> Optimizer:
    """Build Muon, or an optimizer to compare it with; each spreads its state over the ranks.

    All decay the same parameters: those that `build_param_groups` says.

    Args:
        model: the bare model, not its DDP wrapper, so that names are the model's own.
        config: the section `optimizer`.
        world: with its process group, or without for one process.
        clip: what bounds the attention logits; Muon's and NorMuon's alone.
        diagnostics_every: steps between two looks at the updates; likewise.

    Raises:
        ConfigError: for a value that the optimizer refuses, or one that is not installed.
    """
    groups = build_param_groups(
        model, weight_decay=config.weight_decay, matrices=matrix_rule(config)
    )
    if config.name in BASELINES and diagnostics_every:
        raise ConfigError(
            "train.diagnostics_every needs optimizer.name=muon or normuon: "
            f"{config.name} has none.",
            key="train.diagnostics_every",
        )
    ours: dict[str, Any] = {
        "process_group": world.group,
        "diagnostics_every": diagnostics_every,
        "qk_clip": clip,
    }
    try:
        if config.name in BASELINES:
            return _build_baseline(groups, config, world)
        return Muon(groups, **ours, **muon_options(config))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"optimizer: {error}") from error


def muon_options(config: OptimizerConfig) -> dict[str, Any]:
    """Hyperparameters of Muon under any engine: all of the section but its name."""
    options = {key: value for key, value in asdict(config).items() if key != "name"}
    scale = options.pop("update_scale")
    if scale != 1.0:
        options["adjust_lr_fn"] = scaled_factor(config.adjust_lr_fn, scale)
    return options


def scaled_factor(mode: AdjustLrMode, scale: float) -> Callable[[int, int], float]:
    """Multiply the factors of an `adjust_lr_fn`.

    Args:
        mode: Which.
        scale: By how much.

    Returns:
        An `adjust_lr_fn`, with a name by which ranks and checkpoints know what it computes.
    """

    def factor(rows: int, cols: int) -> float:
        return scale * adjust_lr_factor(mode, rows, cols)

    factor.__qualname__ = f"{scale!r} * {mode}"
    return factor


def matrix_rule(config: OptimizerConfig) -> MatrixRule:
    """The update rule of what is routed to Muon."""
    return "normuon" if config.name == "normuon" else "muon"


def build_clip(model: nn.Module, config: Config) -> QKClip | None:
    """Build what bounds the attention logits, and let it observe the model.

    Args:
        model: the bare model; each attention has a module `core` that gets queries and keys.
        config: of the run.

    Returns:
        None if it is turned off.

    Raises:
        ConfigError: with an optimizer or engine that cannot clip.
    """
    if not config.qk_clip.threshold:
        return None
    for key, value, possible in (
        ("optimizer.name", config.optimizer.name, OURS),
        ("run.engine", config.run.engine, ("native", "accelerate")),
    ):
        if value not in possible:
            wanted = " or ".join(possible)
            raise ConfigError(f"qk_clip needs {key}={wanted}, not {value}.", key=key)
    clip = QKClip(
        attention_layers(model), threshold=config.qk_clip.threshold, alpha=config.qk_clip.alpha
    )
    cores = {layer.name: model.get_submodule(f"{layer.name}.core") for layer in clip.layers}
    record(clip, cores, masking="causal", measure=config.qk_clip.measure)
    return clip


def clip_stats(optimizer: Optimizer) -> Mapping[str, float] | None:
    """What QK-Clip found and did in the last step; None without it."""
    clip = optimizer.qk_clip if isinstance(optimizer, Muon) else None
    if clip is None:
        return None
    # The total begins anew with each sitting, which a run that goes on must not show.
    return {key: value for key, value in clip.stats().items() if key != "clipped_heads_total"}


def _build_baseline(
    groups: Sequence[Mapping[str, Any]], config: OptimizerConfig, world: World
) -> Optimizer:
    """Give every parameter to one optimizer, with the weight decay it has under Muon."""
    baseline = BASELINES[config.name]
    if baseline.gradient == "differentiable" and world.group is not None:
        raise ConfigError(
            f"optimizer.name={config.name} takes second derivatives through the gradients, which "
            "DistributedDataParallel does not provide. Run it in one process.",
            key="optimizer.name",
        )
    try:
        cls = baseline.load()
    except ImportError as error:
        raise ConfigError(f"optimizer.name={config.name}: {error}", key="optimizer.name") from error
    options = {
        "lr": config.lr,
        **{key: getattr(config, key) for key in baseline.takes},
        **baseline.fixed,
    }
    plain = [
        {
            "params": [parameter for _, parameter in group["params"]],
            "weight_decay": group["weight_decay"],
        }
        for group in groups
    ]
    if world.group is None:
        return cls(plain, **options)
    # It gives whole parameters to ranks, which is right for every class.
    return ZeroRedundancyOptimizer(plain, cls, process_group=world.group, **options)


def build_schedule(optimizer: Optimizer, config: TrainConfig) -> LambdaLR:
    """Scale every group's lr: linear warm-up, then as `lr_scale` says."""
    return LambdaLR(optimizer, partial(lr_scale, config=config))


def lr_scale(step: int, config: TrainConfig) -> float:
    """Compute the learning rate of a step as a share of the peak.

    Args:
        step: from 0.
        config: the section `train`.

    Returns:
        Rises from 1/w to 1 over the w warm-up steps. Then "cosine" falls along half a cosine,
        "linear" along a line, and "wsd" (warm-up, stable, decay) stays at 1 and falls along a line
        over its `cooldown`; the last step has `final_lr`. "constant" stays at 1.

    Source: "wsd" MiniCPM, arXiv 2404.06395; the straight line Hägele et al., arXiv 2405.18392.
    """
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return (step + 1) / warmup
    falling = config.steps - warmup
    if config.schedule == "wsd":
        falling = min(max(round(config.cooldown * config.steps), 1), falling)
    start = config.steps - falling
    progress = min(max((step + 1 - start) / max(falling, 1), 0.0), 1.0)
    share = 1.0 - progress
    if config.schedule == "cosine":
        share = 0.5 * (1.0 + math.cos(math.pi * progress))
    elif config.schedule == "constant":
        share = 1.0
    return config.final_lr + (1.0 - config.final_lr) * share


def place_schedule(schedule: LambdaLR, step: int) -> None:
    """Put a new schedule where it stands after some steps: it depends on nothing else."""
    optimizer = schedule.optimizer
    rates = [
        base * scale(step)
        for base, scale in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": step, "_last_lr": rates})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def whole_state(optimizer: Optimizer, model: nn.Module, name: str) -> dict[str, Tensor]:
    """Gather the state of an optimizer of torch's kind on rank 0. A collective.

    Args:
        optimizer: with a state of tensors and numbers.
        model: that its parameters belong to.
        name: what the configuration calls it.

    Returns:
        On rank 0 each state tensor as "adamw.FQN.exp_avg" and so on, and the groups' counters as
        "adamw.step.0"; nothing on the others.
    """
    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
        if optimizer.rank != 0:
            return {}
    state = optimizer.state_dict()["state"]
    tensors = {
        f"{name}.{fqn}.{key}": torch.as_tensor(value)
        for index, fqn in enumerate(_names(optimizer, model))
        for key, value in state.get(index, {}).items()
        if value is not None
    }
    counters = {
        f"{name}.{_COUNTER}.{index}": torch.tensor(group[_COUNTER])
        for index, group in enumerate(optimizer.param_groups)
        if _COUNTER in group
    }
    return tensors | counters


def load_whole_state(
    optimizer: Optimizer, model: nn.Module, name: str, tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer its state back, at any world size; each rank keeps its own part.

    Args:
        optimizer: with the same parameters; its hyperparameters stay.
        model: that they belong to.
        name: what the configuration calls it.
        tensors: from `whole_state`, on every rank.

    Raises:
        ConfigError: if the state of a parameter is missing.
    """
    fqns = _names(optimizer, model)
    state: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(fqns))}
    for index, fqn in enumerate(fqns):
        prefix = f"{name}.{fqn}."
        for full in tensors:
            if full.startswith(prefix):
                state[index][full.removeprefix(prefix)] = tensors[full]
    missing = [fqns[index] for index, entry in state.items() if not entry]
    if missing and len(missing) < len(fqns):  # plain SGD has none at all
        raise ConfigError(
            f"run.resume: the checkpoint has no {name} state of {missing[0]}.", entry="resume"
        )
    count = iter(range(len(state)))
    groups = [
        {**group, "params": [next(count) for _ in group["params"]]}
        for group in optimizer.param_groups
    ]
    for index, group in enumerate(groups):
        counter = tensors.get(f"{name}.{_COUNTER}.{index}")
        group |= {} if counter is None else {_COUNTER: int(counter)}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _names(optimizer: Optimizer, model: nn.Module) -> list[str]:
    """List the parameters' FQNs in the order of the optimizer's own numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[p] for group in optimizer.param_groups for p in group["params"]]


def state_bytes(optimizer: Optimizer) -> int:
    """Count the bytes of the tensors in a torch optimizer's state on this rank."""
    local = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    return sum(
        value.numel() * value.element_size()
        for state in local.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
