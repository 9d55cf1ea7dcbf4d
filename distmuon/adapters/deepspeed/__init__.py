"""DeepSpeed: Muon as a client optimizer of ZeRO-1, ZeRO-2 and BF16_Optimizer."""

from distmuon.adapters.deepspeed.build import from_model
from distmuon.adapters.deepspeed.by_name import register, tag
from distmuon.adapters.deepspeed.config_check import check_config
from distmuon.adapters.deepspeed.optimizer import ZeroOrtho
from distmuon.adapters.deepspeed.portable import load, save
from distmuon.adapters.deepspeed.reshard import load_resharded

__all__ = [
    "ZeroOrtho",
    "check_config",
    "from_model",
    "load",
    "load_resharded",
    "register",
    "save",
    "tag",
]
