"""The folder that a run writes into, and the lock that keeps a second run out of it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save
from torch import nn

from distmuon.training.config import Config, ConfigError, RunConfig
from distmuon.training.config_file import to_yaml

# What flock says on a file system that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class InUseError(Exception):
    """A running process holds the folder."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Names of the files of a run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def config(self) -> Path:
        """The configuration with every key."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        """The loss curves."""
        return self.path / "loss.png"

    @property
    def weights(self) -> Path:
        """The final weights, written last: a run that has them is finished."""
        return self.path / "model.safetensors"

    @property
    def checkpoints(self) -> Path:
        """A folder with one checkpoint per folder in it."""
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files, with `run.loggers=[tensorboard]`."""
        return self.path / "tensorboard"

    @property
    def wandb(self) -> Path:
        """Weights & Biases' own files, with `run.loggers=[wandb]`."""
        return self.path / "wandb"

    @property
    def lock(self) -> Path:
        """Held by rank 0 while it runs; has torchrun's name of the job."""
        return self.path / ".lock"

    def checkpoint(self, step: int) -> Path:
        """Name the checkpoint of a step."""
        return self.checkpoints / f"step-{step:08}"

    def save_weights(self, model: nn.Module) -> None:
        """Write the weights; a reader never sees half a file under the final name."""
        # Copies: the optimizer may have made the parameters views of one flat buffer, and a file
        # must not hold that. A tied weight is one parameter and is saved under its first name.
        tensors = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        partial = self.weights.with_suffix(".partial")
        partial.write_bytes(save(tensors))
        partial.replace(self.weights)

    def clear(self) -> None:
        """Remove the files of a run and no others."""
        for file in (self.config, self.metrics, self.plot, self.weights):
            file.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard, self.wandb):
            if folder.is_dir():
                shutil.rmtree(folder)

    def job(self) -> str | None:
        """Read which job of torchrun's wrote here last; None if it had no name."""
        try:
            return self.lock.read_text(encoding="utf-8") or None
        except OSError:
            return None

    @contextmanager
    def hold(self, *, patience: Literal["wait", "none"]) -> Iterator[None]:
        """Keep other runs out. The lock ends with the process, however that ends.

        Raises:
            InUseError: if a running process has it and there is no patience.
        """
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if patience == "none" else 0))
        except BlockingIOError:
            os.close(descriptor)
            raise InUseError(str(self.path)) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                os.close(descriptor)
                raise
        try:
            yield
        finally:
            os.close(descriptor)


def existing_folders(config: RunConfig) -> list[RunFolder]:
    """List the folders that runs of this name have made, oldest first."""
    parent = Path(config.dir)
    if config.if_exists == "replace":
        folder = RunFolder(parent / config.name)
        return [folder] if folder.path.is_dir() else []
    numbered = re.compile(re.escape(config.name) + r"(?:-([2-9]|[1-9]\d+))?")
    found: list[tuple[int, RunFolder]] = []
    for path in parent.iterdir() if parent.is_dir() else ():
        match = numbered.fullmatch(path.name)
        if match is not None and path.is_dir():
            found.append((int(match[1] or 1), RunFolder(path)))
    return [folder for _, folder in sorted(found, key=lambda pair: pair[0])]


def make_folder(config: RunConfig) -> RunFolder:
    """Make the folder of a new run, numbered after all that exist, or take the one to replace."""
    parent = Path(config.dir)
    parent.mkdir(parents=True, exist_ok=True)
    if config.if_exists == "replace":
        folder = RunFolder(parent / config.name)
        folder.path.mkdir(exist_ok=True)
        return folder
    while True:
        older = existing_folders(config)
        last = older[-1].path.name.removeprefix(config.name) if older else ""
        number = int(last.removeprefix("-") or 1) + 1 if older else 1
        path = parent / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            # mkdir is atomic: two runs started at once get two folders.
            path.mkdir()
        except FileExistsError:
            if not path.is_dir():
                raise
            continue
        return RunFolder(path)


def write_config(folder: RunFolder, config: Config, *, job: str | None) -> None:
    """Say in the folder which run it is, and which job of torchrun's writes to it."""
    folder.config.write_text(to_yaml(config), encoding="utf-8")
    folder.lock.write_text(job or "", encoding="utf-8")


def folder_error(config: RunConfig, error: OSError) -> ConfigError:
    """Put a failure of the file system into terms of the configuration."""
    message = f"run.dir={config.dir}: cannot write a run here: {error}"
    return ConfigError(message, key="run.dir", entry="run-folder")
