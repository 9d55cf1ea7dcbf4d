"""The folder that a run writes into."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from pathlib import Path

from safetensors.torch import save
from torch import nn

from distmuon.training.config import Config, ConfigError, RunConfig
from distmuon.training.config_file import to_yaml


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
        """The final weights."""
        return self.path / "model.safetensors"

    def save_weights(self, model: nn.Module) -> None:
        """Write the weights; a reader never sees half a file under the final name."""
        # Copies: the optimizer may have made the parameters views of one flat buffer, and a file
        # must not hold that. A tied weight is one parameter and is saved under its first name.
        tensors = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        partial = self.weights.with_suffix(".partial")
        partial.write_bytes(save(tensors))
        partial.replace(self.weights)


def create_run_folder(config: Config) -> RunFolder:
    """Make the folder of a run and write its configuration. Only rank 0 calls this.

    An existing folder is never written into unless `run.if_exists` is "replace", and then only
    the files of a run are removed from it.

    Raises:
        ConfigError: if the folder cannot be made.
    """
    try:
        folder = _replace(config.run) if config.run.if_exists == "replace" else _number(config.run)
        folder.config.write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        message = f"run.dir={config.run.dir}: cannot write a run here: {error}"
        raise ConfigError(message, key="run.dir") from None
    return folder


def _number(config: RunConfig) -> RunFolder:
    parent = Path(config.dir)
    parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        path = parent / (config.name if number == 1 else f"{config.name}-{number}")
        try:
            # mkdir is atomic: two runs started at once get two folders.
            path.mkdir()
        except FileExistsError:
            continue
        return RunFolder(path)
    raise AssertionError("count() does not end")


def _replace(config: RunConfig) -> RunFolder:
    folder = RunFolder(Path(config.dir) / config.name)
    folder.path.mkdir(parents=True, exist_ok=True)
    for file in (folder.config, folder.metrics, folder.plot, folder.weights):
        file.unlink(missing_ok=True)
    return folder
