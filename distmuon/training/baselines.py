"""The optimizers that Muon can be compared with: torch's own, and those of pytorch_optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from torch.optim import Optimizer

from distmuon.errors import see

OptimizerName = Literal[
    "muon", "normuon", "adamw", "adam", "sgd", "momentum", "nag", "adagrad", "rmsprop", "adafactor",
    "lion", "lamb", "lars", "sophia", "shampoo",
]  # fmt: skip
# Those that are distmuon.Muon itself; the others are compared with them.
OURS: tuple[OptimizerName, ...] = ("muon", "normuon")
Gradient = Literal["plain", "differentiable"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """An optimizer class and what it is told of the configuration.

    Attributes:
        label: Its name for a person.
        package: Where its class is.
        cls: The class.
        takes: Keys of the section `optimizer` that it takes under the same name, beside `lr` and
            `weight_decay`.
        fixed: What it is told besides.
        gradient: "differentiable" for one that takes second derivatives through `p.grad`.
    """

    label: str
    package: Literal["torch.optim", "pytorch_optimizer"]
    cls: str
    takes: tuple[str, ...] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    gradient: Gradient = "plain"

    def load(self) -> type[Optimizer]:
        """Import the class.

        Raises:
            ImportError: if its package is not installed, or has no such class.
        """
        try:
            found: type[Optimizer] = getattr(import_module(self.package), self.cls)
        except (ImportError, AttributeError) as error:
            raise ImportError(
                f"{self.label} is {self.cls} of {self.package}, which is not installed, or too "
                f"old: pip install 'distmuon[compare]'. ({error})" + see("missing-package")
            ) from error
        return found


BASELINES: Mapping[OptimizerName, Baseline] = {
    "sgd": Baseline("SGD", "torch.optim", "SGD"),
    "momentum": Baseline("SGD with momentum", "torch.optim", "SGD", ("momentum",)),
    "nag": Baseline(
        "SGD with Nesterov momentum", "torch.optim", "SGD", ("momentum",), {"nesterov": True}
    ),
    "adagrad": Baseline("Adagrad", "torch.optim", "Adagrad", ("eps",)),
    "rmsprop": Baseline("RMSprop", "torch.optim", "RMSprop", ("eps",)),
    "adam": Baseline("Adam", "torch.optim", "Adam", ("betas", "eps")),
    "adamw": Baseline("AdamW", "torch.optim", "AdamW", ("betas", "eps")),
    "adafactor": Baseline("Adafactor", "torch.optim", "Adafactor"),
    "lion": Baseline("Lion", "pytorch_optimizer", "Lion", ("betas",)),
    "lamb": Baseline("LAMB", "pytorch_optimizer", "Lamb", ("betas", "eps")),
    "lars": Baseline("LARS", "pytorch_optimizer", "LARS", ("momentum",)),
    "sophia": Baseline(
        "Sophia (Hutchinson)", "pytorch_optimizer", "SophiaH", ("betas",), gradient="differentiable"
    ),
    "shampoo": Baseline("Shampoo", "pytorch_optimizer", "Shampoo", ("momentum",)),
}
