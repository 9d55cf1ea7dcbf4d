"""Where a model to look at comes from: its names and shapes, on the meta device."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distmuon.errors import Entry, with_entry
from distmuon.forecast.models import MODELS

if TYPE_CHECKING:
    from distmuon.training.config import Config


class SourceError(ValueError):
    """No model can be made of what was given."""

    def __init__(self, message: str, *, entry: Entry = "model-source") -> None:
        """Name the entry of docs/errors.md, unless the message holds another error's."""
        super().__init__(with_entry(message, entry))


@dataclass(frozen=True, slots=True)
class Source:
    """A model and what its configuration says about the optimizer.

    Attributes:
        name: What was asked for.
        model: On the meta device.
        groups: Keyword arguments of `build_param_groups`.
        options: Of `Muon`.
        config: The training configuration, if it came from one.
    """

    name: str
    model: nn.Module
    groups: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    config: Config | None = None


def open_source(text: str, overrides: Sequence[str] = ()) -> Source:
    """Make a model of what was given on a command line.

    Args:
        text: A training configuration `*.yaml`, a model that ships with distmuon (`MODELS`),
            `module:function`, or what transformers' `AutoConfig` takes: a `*.json` file, a folder,
            or the name of a model.
        overrides: `section.key=value` for a training configuration.

    Returns:
        The model, on the meta device.

    Raises:
        SourceError: if it cannot be made, with what to do.
    """
    path = Path(text)
    if path.suffix in (".yaml", ".yml"):
        return _from_training(path, overrides)
    if overrides:
        raise SourceError(
            f"{' '.join(overrides)}: section.key=value belongs to a training configuration "
            f"(*.yaml), and {text} is none."
        )
    if text in MODELS:
        return Source(text, MODELS[text]())
    if ":" in text and not path.exists():
        return Source(text, _from_function(text))
    return Source(text, _from_transformers(text))


def _from_training(path: Path, overrides: Sequence[str]) -> Source:
    missing = [name for name in ("omegaconf", "yaml") if importlib.util.find_spec(name) is None]
    if missing:
        raise SourceError(
            f"{path}: reading a training configuration needs {' and '.join(missing)}. Run: pip "
            "install 'distmuon[train]'",
            entry="missing-package",
        )
    from distmuon.training.config import ConfigError
    from distmuon.training.config_file import load_config
    from distmuon.training.model import Transformer
    from distmuon.training.optimizers import matrix_rule, muon_options

    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        # Here the file is no option of that name.
        raise SourceError(str(error).removeprefix("--config ")) from error
    with torch.device("meta"):
        model = Transformer(config.model, context=config.data.context)
    chosen = config.optimizer
    groups = {"weight_decay": chosen.weight_decay, "matrices": matrix_rule(chosen)}
    return Source(str(path), model, groups, muon_options(chosen), config)


def _from_function(text: str) -> nn.Module:
    module_name, _, function_name = text.partition(":")
    # As `python -m` does: the user's own module lies where the command is run.
    if "" not in sys.path:
        sys.path.insert(0, "")
    expected = (
        "Give a module that can be imported from here and a function in it that takes nothing and "
        "returns a torch.nn.Module."
    )
    if not module_name or not function_name:
        raise SourceError(f"{text} is no package.module:function. {expected}")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise SourceError(f"{text}: {error}. {expected}") from error
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise SourceError(f"{text}: importing {module_name} raised {told}") from error
    try:
        with torch.device("meta"):
            model = function()
    except Exception as error:
        raise SourceError(f"{text} raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise SourceError(f"{text} returned a {type(model).__name__}. Must be a torch.nn.Module.")
    return model


def _from_transformers(text: str) -> nn.Module:
    close = difflib.get_close_matches(text, MODELS, n=1, cutoff=0.8)
    if close and not Path(text).exists():
        raise SourceError(f"{text} is none of {', '.join(MODELS)}. Did you mean {close[0]}?")
    if Path(text).suffix == ".json" and not Path(text).is_file():
        raise SourceError(f"{text}: no such file.")
    if importlib.util.find_spec("transformers") is None:
        raise SourceError(
            f"{text} is no *.yaml file, no module:function and none of {', '.join(MODELS)}. For a "
            "transformers configuration run: pip install 'distmuon[hf]'",
            entry="missing-package",
        )
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(text)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any kind: the configuration's, the network's, the model's
        raise SourceError(
            f"{text}: transformers cannot make a causal language model of it: {error}\nNames are "
            f"looked up on the network; a JSON file needs none. Ships here: {', '.join(MODELS)}."
        ) from error
    assert isinstance(model, nn.Module)
    return model
