"""The DeepSpeed adapter under a short name; see docs/deepspeed.md."""

from distmuon.adapters.deepspeed import (
    ZeroOrtho,
    check_config,
    from_model,
    load,
    load_resharded,
    register,
    save,
    tag,
)

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
