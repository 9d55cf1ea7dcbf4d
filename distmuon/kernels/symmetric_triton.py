"""The symmetric product as a Triton kernel. Imports Triton: see `distmuon.kernels.symmetric`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distmuon.kernels.tiles import Scaled, Tile


@triton.jit
def _place(pid, ACROSS: tl.constexpr):
    """Row and column of a tile, counted along the rows: row i has (i + 1) * ACROSS of them."""
    group = pid // ACROSS
    row = ((tl.sqrt(8.0 * group.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # The root is rounded: one too few or too many is put right in integers.
    row = tl.where((row + 1) * (row + 2) // 2 <= group, row + 1, row)
    row = tl.where(row * (row + 1) // 2 > group, row - 1, row)
    return row, (group - row * (row + 1) // 2) * ACROSS + pid % ACROSS


@triton.jit
def _product(
    a_ptr,
    b_ptr,
    rows,
    cols,
    m,
    k,
    a_row,
    a_col,
    b_row,
    b_col,
    MASK_M: tl.constexpr,
    MASK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sums of one tile, over k terms.

    What moves along the terms is a scalar. Pointers of a tile would take two registers an element
    and 64-bit additions in every round.
    """
    depth = tl.arange(0, DEPTH)
    a_offset = rows[:, None] * a_row + depth[None, :] * a_col
    b_offset = depth[:, None] * b_row + cols[None, :] * b_col
    acc = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, k, DEPTH):
        if MASK_M or MASK_K:
            inside = depth < k - start
            a_mask = (rows < m)[:, None] & inside[None, :]
            a = tl.load(a_ptr + a_offset, mask=a_mask, other=0.0)
            b_mask = inside[:, None] & (cols < m)[None, :]
            b = tl.load(b_ptr + b_offset, mask=b_mask, other=0.0)
        else:
            a = tl.load(a_ptr + a_offset)
            b = tl.load(b_ptr + b_offset)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc)
        a_ptr += DEPTH * a_col
        b_ptr += DEPTH * b_row
    return acc


@triton.jit
def _store_block(out, base, rows, cols, m, stride, below_diagonal, MASK_M: tl.constexpr):
    """Write a square block of the lower triangle and its mirror.

    Above the diagonal a block across it takes what is below, so the result is symmetric to the
    last bit. Both stores are 16 bytes wide in every block, and there is no branch for the compiler
    to keep copies of the block for.
    """
    # Triton 3.9's interpreter takes a scalar comparison of integers for an integer, no mask.
    below_diagonal = tl.where(below_diagonal, x=True, y=False)
    mirror = tl.trans(out)
    # In a block below the diagonal this changes nothing.
    out = tl.where(rows[:, None] >= cols[None, :], out, mirror)
    lower = base + (rows[:, None] * stride + cols[None, :])
    upper = base + (cols[:, None] * stride + rows[None, :])
    if MASK_M:
        tl.store(lower, out, mask=(rows < m)[:, None] & (cols < m)[None, :])
        inside = (cols < m)[:, None] & (rows < m)[None, :]
        tl.store(upper, mirror, mask=inside & below_diagonal)
    else:
        tl.store(lower, out)
        tl.store(upper, mirror, mask=below_diagonal)


@triton.jit
def _store_tile(
    out, base, row, col, m, stride, MASK_M: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Write a tile as one or two square blocks; one above the diagonal is dropped."""
    rows = row * ROWS + tl.arange(0, COLS)
    cols = col * COLS + tl.arange(0, COLS)
    if ROWS == COLS:
        _store_block(out, base, rows, cols, m, stride, row > col, MASK_M)
    else:
        tl.static_assert(ROWS == 2 * COLS)
        top, bottom = tl.split(tl.permute(tl.reshape(out, (2, COLS, COLS)), (1, 2, 0)))
        if 2 * row >= col:
            _store_block(top, base, rows, cols, m, stride, 2 * row > col, MASK_M)
        _store_block(bottom, base, rows + COLS, cols, m, stride, 2 * row + 1 > col, MASK_M)


@triton.jit
def _symmetric_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    out_ptr,
    alpha_ptr,
    beta_ptr,
    square_ptr,
    alpha,
    beta,
    m,
    k,
    a_batch,
    a_row,
    a_col,
    b_batch,
    b_row,
    b_col,
    c_batch,
    c_row,
    c_col,
    out_batch,
    out_row,
    HAS_C: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_SQUARE: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile [ROWS, COLS] of the lower triangle of alpha * a @ b + beta * c, and its mirror."""
    pid = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row, col = _place(pid, ROWS // COLS)
    rows = row * ROWS + tl.arange(0, ROWS)
    cols = col * COLS + tl.arange(0, COLS)
    # Tiles beyond the matrix's edge, at most one row of tiles has them, have nothing to sum.
    acc = _product(
        a_ptr + batch * a_batch,
        b_ptr + batch * b_batch,
        rows,
        cols,
        m,
        tl.where(col * COLS < m, k, 0),
        a_row,
        a_col,
        b_row,
        b_col,
        MASK_M,
        MASK_K,
        WIDEN,
        ROWS,
        COLS,
        DEPTH,
    )
    if HAS_ALPHA:
        alpha *= tl.load(alpha_ptr + batch)
    value = acc * alpha
    if HAS_C:
        c_tile = c_ptr + batch * c_batch + (rows[:, None] * c_row + cols[None, :] * c_col)
        edge = (rows < m)[:, None] & (cols < m)[None, :]
        c = tl.load(c_tile, mask=edge, other=0.0) if MASK_M else tl.load(c_tile)
        if HAS_BETA:
            beta *= tl.load(beta_ptr + batch)
        value += c.to(tl.float32) * beta
    if HAS_SQUARE:
        # Of the square blocks, those below the diagonal count twice, those above it not.
        place = rows // COLS - col
        weight = tl.where(place > 0, 2.0, tl.where(place == 0, 1.0, 0.0))
        total = tl.sum(value * value * weight[:, None])
        tl.store(square_ptr + batch * tl.num_programs(0) + pid, total)
    out = value.to(out_ptr.dtype.element_ty)
    _store_tile(out, out_ptr + batch * out_batch, row, col, m, out_row, MASK_M, ROWS, COLS)


def launch(
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    out: Tensor,
    *,
    alpha: Scaled,
    beta: Scaled,
    square: Tensor | None,
    tile: Tile,
) -> None:
    """Run the kernel.

    Args:
        a: [batch, m, k], float16 or bfloat16, any strides.
        b: [batch, k, m], likewise; a @ b is symmetric.
        c: [batch, m, m], symmetric, or None. Only its lower triangle is read.
        out: [batch, m, m], rows contiguous; every element is written.
        alpha: Factor on the product; its `by` is [batch] float32, contiguous, on the device.
        beta: Likewise on `c`; without one it is not read.
        square: [batch, tile.count(m)] float32 or None; receives the sum of the squares of what each
            tile, mirrored, writes, before it is rounded.
        tile: Shape of the tiles.
    """
    batch, m, k = a.shape
    addend, squares = (out if c is None else c), (out if square is None else square)
    alphas, betas = (out if factor.by is None else factor.by for factor in (alpha, beta))
    _symmetric_kernel[tile.count(m), batch](
        a,
        b,
        addend,
        out,
        alphas,
        betas,
        squares,
        float(alpha.number),  # an int would be compiled for its value
        float(beta.number),
        m,
        k,
        *a.stride(),
        *b.stride(),
        *addend.stride(),
        *out.stride()[:2],
        HAS_C=c is not None,
        HAS_ALPHA=alpha.by is not None,
        HAS_BETA=beta.by is not None,
        HAS_SQUARE=square is not None,
        MASK_M=m % tile.rows != 0,
        MASK_K=k % tile.depth != 0,
        # The interpreter keeps bfloat16 as 16-bit integers and would multiply those.
        WIDEN=a.device.type == "cpu" and a.dtype == torch.bfloat16,
        ROWS=tile.rows,
        COLS=tile.cols,
        DEPTH=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
        maxnreg=tile.registers,
    )
