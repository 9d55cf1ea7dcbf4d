"""Symmetric matrix products at half the work on GPUs: what computes them, and whether it may.

A kernel is trusted after a small problem of the same class (dtype, tiles, masks, alignment) has
come out right on this device. Where none is, cuBLAS computes the whole product.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.kernels import quack
from distmuon.kernels.device import MOST_MATRICES, on_device_of
from distmuon.kernels.tiles import Scaled, Tile, tile_for, tile_of

Backend: TypeAlias = Literal["auto", "torch", "triton", "quack"]
# A number, one float32 for each matrix in the device's memory, or their product.
Factor: TypeAlias = float | Tensor | Scaled

# Rows from which half the work is worth a kernel of our own. From published comparisons, where
# Triton kernels are slower than cuBLAS up to 512 and faster from 1024; `make gpu` measures it.
SMALLEST = 768
_DTYPES = (torch.float16, torch.bfloat16)
# Past this an offset inside one matrix does not fit into the kernel's 32-bit integers.
_LARGEST_OFFSET = 2**31
_OLDEST_CAPABILITY = (8, 0)
_backend: ContextVar[Backend] = ContextVar("symmetric_backend", default="auto")
_trusted: dict[_Class, bool] = {}


class SquaredNorm(NamedTuple):
    """A symmetric product and its norm.

    Attributes:
        product: [..., m, m].
        norm: [..., 1, 1] float32, the product's Frobenius norm.
    """

    product: Tensor
    norm: Tensor


class _Class(NamedTuple):
    """Products that are compiled to the same kernel."""

    backend: Backend
    device: torch.device
    dtype: torch.dtype
    tile: Tile
    addend: bool
    scaled: tuple[bool, bool]
    squares: bool
    rows_past_tile: int
    depth_past_tile: int
    a_by_rows: bool
    b_by_rows: bool


@contextmanager
def symmetric_backend(backend: Backend) -> Iterator[None]:
    """Choose what computes symmetric half-precision products in this context.

    Args:
        backend: "auto" takes the Triton kernel for large matrices on GPUs that have been seen to
            compute right, and torch otherwise. "torch" takes cuBLAS. "triton" takes the kernel for
            any size, on any device on which Triton runs. "quack" takes the kernel of the package
            quack-kernels where it has been seen to compute right, and torch otherwise.

    Raises:
        ValueError: for another name.
        ModuleNotFoundError: for a package that is not installed.
    """
    if backend not in get_args(Backend):
        raise ValueError(
            f"Unknown {backend=}. Must be one of {', '.join(get_args(Backend))}."
            + see("bad-option")
        )
    if backend == "triton" and not triton_is_installed():
        raise ModuleNotFoundError(
            "backend='triton' needs Triton: pip install triton" + see("missing-package")
        )
    if backend == "quack":
        quack.require()
    token = _backend.set(backend)
    try:
        yield
    finally:
        _backend.reset(token)


@cache
def triton_is_installed() -> bool:
    """Whether Triton can be imported; asked only where a kernel could run."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def triton_is_usable(device: torch.device) -> bool:
    """Whether Triton's kernels may be tried on a device: an Nvidia GPU from Ampere on.

    Args:
        device: Any device.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= _OLDEST_CAPABILITY and triton_is_installed()


def takes(a: Tensor) -> bool:
    """Whether products with a left operand like this should come here.

    Args:
        a: [..., m, k].
    """
    if a.dtype not in _DTYPES or a.dim() not in (2, 3):
        return False
    return a.device.type == "cuda" or _backend.get() != "auto"


def folds(r: Tensor) -> bool:
    """Whether factors from the device's memory cost nothing in products of a symmetric matrix.

    In torch's they would take a pass over the result, and in float16 the result without them may
    be out of range.

    Args:
        r: [m, m] or [batch, m, m], contiguous.

    Returns:
        Whether the Triton kernel computes r @ r.
    """
    if not takes(r):
        return False
    r3 = r if r.dim() == 3 else r[None]
    return _choose(r3, r3, r3, scaled=(True, True), squares=False) == "triton"


def sym_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: Factor = 1.0,
    beta: Factor = 1.0,
) -> Tensor:
    """Compute alpha * a @ b + beta * c where the product and c are symmetric.

    Sums are kept in float32 and rounded once. With the Triton kernel the result is exactly
    symmetric, and the same bits every time.

    Args:
        a: [m, k] or [batch, m, k], float16 or bfloat16, any strides.
        b: [k, m] or [batch, k, m]: a's transpose, or a matrix that commutes with a symmetric a.
        c: [m, m] or [batch, m, m], or None for no addend.
        alpha: A number, or one float32 for each matrix in the device's memory (nothing waits for
            it), or both.
        beta: Likewise.

    Returns:
        A new [m, m] or [batch, m, m].
    """
    a3, b3, c3 = (x if x is None or x.dim() == 3 else x[None] for x in (a, b, c))
    assert a3 is not None, "given"
    assert b3 is not None, "given"
    factors = _scaled(alpha, a3), _scaled(beta, a3)
    product = _product(a3, b3, c3, *factors, squares=None)
    return product if a.dim() == 3 else product[0]


def sym_gemm_norm(a: Tensor, b: Tensor) -> SquaredNorm:
    """The symmetric product a @ b, and its Frobenius norm from the same pass.

    Args:
        a: As in `sym_gemm`.
        b: Likewise.

    Returns:
        Both. The norm is that of the product before it was rounded, where the kernel computed it.
    """
    a3, b3 = (x if x.dim() == 3 else x[None] for x in (a, b))
    squares: list[Tensor] = []
    product = _product(a3, b3, None, Scaled(1.0), Scaled(0.0), squares=squares)
    if squares:
        # Summed in a fixed order, unlike atomic additions.
        norm = squares[0].sum(-1)[:, None, None].sqrt()
    else:
        norm = torch.linalg.vector_norm(product, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    return SquaredNorm(product, norm) if a.dim() == 3 else SquaredNorm(product[0], norm[0])


def _product(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: Scaled,
    beta: Scaled,
    *,
    squares: list[Tensor] | None,
) -> Tensor:
    scaled = alpha.by is not None, beta.by is not None
    kernel = _choose(a, b, c, scaled=scaled, squares=squares is not None)
    if kernel == "triton":
        return _with_triton(a, b, c, alpha, beta, squares, tile_of(a))
    if kernel == "quack" and not any(scaled):
        return quack.symmetric(a, b, c, alpha=alpha.number, beta=beta.number)
    return _with_torch(a, b, c, alpha, beta)


def _with_torch(a: Tensor, b: Tensor, c: Tensor | None, alpha: Scaled, beta: Scaled) -> Tensor:
    if alpha.by is not None or beta.by is not None:
        factors = [x.number if x.by is None else x.number * x.by for x in (alpha, beta)]
        product = torch.bmm(a, b).mul_(_for_each(factors[0]))
        return product if c is None else product.add_(c * _for_each(factors[1]))
    if c is not None:
        return torch.baddbmm(c, a, b, beta=beta.number, alpha=alpha.number)
    product = torch.bmm(a, b)
    return product if alpha.number == 1.0 else product.mul_(alpha.number)


def _for_each(factor: float | Tensor) -> float | Tensor:
    return factor.view(-1, 1, 1) if isinstance(factor, Tensor) else factor


def _with_triton(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    alpha: Scaled,
    beta: Scaled,
    squares: list[Tensor] | None,
    tile: Tile,
) -> Tensor:
    from distmuon.kernels.symmetric_triton import launch

    batch, m, _ = a.shape
    out = a.new_empty(batch, m, m)
    square = None
    if squares is not None:
        square = a.new_empty(batch, tile.count(m), dtype=torch.float32)
        squares.append(square)
    with on_device_of(a):
        launch(a, b, c, out, alpha=alpha, beta=beta, square=square, tile=tile)
    return out


def _scaled(factor: Factor, a: Tensor) -> Scaled:
    """A factor with its part in memory [batch], contiguous, for a left operand [batch, m, k]."""
    if isinstance(factor, Tensor):
        factor = Scaled(1.0, factor)
    if not isinstance(factor, Scaled):
        return Scaled(factor)
    if factor.by is None:
        return factor
    by = factor.by.reshape(-1).to(torch.float32).expand(a.size(0)).contiguous()
    return Scaled(factor.number, by)


def computed_entries(m: int, k: int, dtype: torch.dtype, device: torch.device) -> int | None:
    """How many entries of a symmetric m x m product are computed, the others being copies.

    Args:
        m: Rows.
        k: Terms of each sum.
        dtype: Of the operands, which are contiguous.
        device: Where they are.

    Returns:
        Those of the kernel's tiles, as in a stack of many; None where no kernel is to be used, and
        all are computed.
    """
    if _wanted(m, k, dtype, device) == "torch":
        return None
    tile = tile_for(m)
    return tile.count(m) * tile.rows * tile.cols


def _wanted(m: int, k: int, dtype: torch.dtype, device: torch.device) -> Backend:
    """What is to compute a product of this size, if it has been seen to compute right."""
    wanted = _backend.get()
    if wanted == "torch" or dtype not in _DTYPES:
        return "torch"
    if wanted != "auto":
        return wanted
    # With other sizes the kernel could not copy 16 bytes at a time.
    fits = m >= SMALLEST and m % 16 == 0 and k % 16 == 0
    return "triton" if fits and triton_is_usable(device) else "torch"


def _choose(
    a: Tensor, b: Tensor, c: Tensor | None, *, scaled: tuple[bool, bool], squares: bool
) -> Backend:
    m, k = a.shape[1:]
    kernel = _wanted(m, k, a.dtype, a.device)
    if kernel == "torch":
        return "torch"
    operands = [a, b] if c is None else [a, b, c]
    if _backend.get() == "auto" and any(s % 16 for o in operands for s in o.stride() if s != 1):
        return "torch"
    ends = [x.size(1) * x.stride(1) + x.size(2) * x.stride(2) for x in operands]
    if a.size(0) > MOST_MATRICES or max(*ends, m * m) >= _LARGEST_OFFSET:
        return "torch"
    tile = tile_of(a)
    key = _Class(
        kernel,
        a.device,
        a.dtype,
        tile,
        c is not None,
        scaled,
        squares,
        m % tile.rows,
        k % tile.depth,
        a.stride(2) == 1,
        b.stride(2) == 1,
    )
    if key not in _trusted:
        if a.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "torch"  # the check waits for the device, which a graph cannot
        _trusted[key] = _check(key)
    return kernel if _trusted[key] else "torch"


def _check(key: _Class) -> bool:
    """Whether a kernel computes a small problem of its class right; warns if not."""
    try:
        error = self_check(key)
    except Exception as problem:
        # Whatever a compiler or a driver raises: there is another way to the same product.
        text = f"raised {type(problem).__name__}: {problem}"
    else:
        if error <= 2 * torch.finfo(key.dtype).eps:
            return True
        text = f"missed the product by {error:.2g} of its norm"
    warnings.warn(
        f"distmuon's {key.backend} kernel for symmetric {key.dtype} products {text}; products like "
        f"it (m = {key.rows_past_tile} mod {key.tile.rows}, k = {key.depth_past_tile} mod "
        f"{key.tile.depth}) go through cuBLAS on {key.device}, slower and right."
        + see("gpu-kernels"),
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def self_check(key: _Class) -> float:
    """Relative error of a kernel on a small problem of its class, infinite if it is not symmetric.

    Args:
        key: The class.

    Returns:
        Frobenius norm of the error over that of the product, in float64; NaN if anything is.
    """
    tile = key.tile
    m, k = tile.rows + (key.rows_past_tile or tile.rows), 2 * tile.depth + key.depth_past_tile
    generator = torch.Generator(key.device).manual_seed(m * k)
    x = torch.randn(2, m, k, generator=generator, device=key.device).to(key.dtype)
    a = x if key.a_by_rows else x.mT.contiguous().mT
    b = x.mT.contiguous() if key.b_by_rows else x.mT
    c = torch.randn(2, m, m, generator=generator, device=key.device) if key.addend else None
    c = None if c is None else (c + c.mT).to(key.dtype)
    by = torch.tensor([0.5, -2.0], device=key.device)
    alpha, beta = (
        Scaled(number, by if has else None)
        for number, has in zip((1.5, -0.75), key.scaled, strict=True)
    )
    squares: list[Tensor] | None = [] if key.squares else None
    if key.backend == "quack":
        out = quack.symmetric(a, b, c, alpha=alpha.number, beta=beta.number)
    else:
        out = _with_triton(a, b, c, alpha, beta, squares, tile)
    factors = [
        x.number * (torch.ones_like(by) if x.by is None else x.by).double()[:, None, None]
        for x in (alpha, beta)
    ]
    exact = torch.bmm(x.double(), x.double().mT) * factors[0]
    if c is not None:
        exact += c.double() * factors[1]
    if key.backend == "triton" and not torch.equal(out, out.mT):
        return torch.inf
    errors = [(out.double() - exact).norm() / exact.norm()]
    if squares:
        norms = exact.norm(dim=(-2, -1))
        errors.append(((squares[0].sum(-1).double().sqrt() - norms) / norms).abs().max())
    return max(float(error.nan_to_num(torch.inf)) for error in errors)
