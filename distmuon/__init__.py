"""Muon with ZeRO-1: one owner orthogonalizes each matrix once, from its whole momentum."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from typing_extensions import override

from distmuon.version import __version__

if TYPE_CHECKING:
    from distmuon import recipes
    from distmuon.cost import CostModel
    from distmuon.failure import RankFailure
    from distmuon.grad_scaler import GradScaler
    from distmuon.optimizer import Muon
    from distmuon.orthogonalize import orthogonalize
    from distmuon.param_groups import build_param_groups
    from distmuon.qk_clip import QKClip
    from distmuon.report import Report
    from distmuon.structure import Blocks, qkv_blocks
    from distmuon.summary import summarize

__all__ = [
    "Blocks",
    "CostModel",
    "GradScaler",
    "Muon",
    "QKClip",
    "RankFailure",
    "Report",
    "__version__",
    "build_param_groups",
    "orthogonalize",
    "qkv_blocks",
    "recipes",
    "summarize",
]

# [Note: lazy names] Where each name lives. It is imported when it is first asked for: the command
# line is part of this package, and must neither wait for torch before it prints its help nor be
# interrupted in the middle of torch before it can say so.
_HOMES = {
    "Blocks": "structure",
    "CostModel": "cost",
    "GradScaler": "grad_scaler",
    "Muon": "optimizer",
    "QKClip": "qk_clip",
    "RankFailure": "failure",
    "Report": "report",
    "build_param_groups": "param_groups",
    "orthogonalize": "orthogonalize",
    "qkv_blocks": "structure",
    "summarize": "summary",
}


def __getattr__(name: str) -> object:
    if name == "recipes":
        return importlib.import_module(f"{__name__}.recipes")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, in which `orthogonalize` is the function.

    The import system would put the folder of that name in its place.
    """

    @override
    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
