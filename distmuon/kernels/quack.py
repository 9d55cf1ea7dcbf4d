"""The symmetric product of the package quack-kernels, where somebody has installed it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from distmuon.errors import see


def require() -> None:
    """Refuse to go on without the package.

    Raises:
        ModuleNotFoundError: if it is not installed.
    """
    if find_spec("quack") is None:
        raise ModuleNotFoundError(
            "backend='quack' needs quack-kernels, which pins its own CUDA packages: "
            "pip install quack-kernels (tried with 0.5)" + see("missing-package")
        )


def symmetric(a: Tensor, b: Tensor, c: Tensor | None, *, alpha: float, beta: float) -> Tensor:
    """Compute alpha * a @ b + beta * c.

    Args:
        a: [batch, m, k], float16 or bfloat16; the package wants dimensions divisible by 8.
        b: [batch, k, m]; the product is symmetric.
        c: [batch, m, m], symmetric, or None.
        alpha: Factor on the product.
        beta: Factor on c.

    Returns:
        A new [batch, m, m].

    Source: https://github.com/Dao-AILab/quack, `quack.gemm_interface.gemm_symmetric`.
    """
    # Importing it compiles and starts a lot, and it is not typed.
    interface: Any = import_module("quack.gemm_interface")
    product: Tensor = interface.gemm_symmetric(a, b, C=c, alpha=float(alpha), beta=float(beta))
    return product
