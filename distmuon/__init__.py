"""Muon with ZeRO-1: one owner orthogonalizes each matrix once, from its whole momentum."""

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
from distmuon.version import __version__

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
