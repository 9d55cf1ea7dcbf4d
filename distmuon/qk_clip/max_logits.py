"""The largest attention logits from queries and keys, where the attention kernel keeps them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from distmuon.errors import see

Masking = Literal["none", "causal"]
Measure = Literal["exact", "bound"]

# Logits that exist at a time: 64 MiB in fp32.
_MOST_LOGITS = 2**24


@torch.no_grad()
def max_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    masking: Masking = "none",
    mask: Tensor | None = None,
    most_logits: int = _MOST_LOGITS,
) -> Tensor:
    """Each head's largest `scale * q.k` over the batch and all pairs of positions that may meet.

    Computed again from the queries and keys, a block of query positions at a time: as many
    operations as the first half of attention, and never more than `most_logits` logits at once
    (one query position of one sequence is the least).

    Args:
        query: [batch, heads, length, head_dim], as the softmax sees it: with positions.
        key: [batch, kv_heads, key length, head_dim]; `heads` is a multiple of `kv_heads`.
        scale: On the products; None for `1 / sqrt(head_dim)`. Must be what the model uses.
        masking: "causal": a query meets the keys up to its own position.
        mask: As in `scaled_dot_product_attention`, to be broadcast to [batch, heads, length, key
            length]: False, or numbers near the dtype's least, for pairs that do not meet.
        most_logits: Elements of the largest temporary.

    Returns:
        [heads], fp32; -inf for a head all of whose pairs are masked.

    Raises:
        ValueError: for shapes that do not fit.
    """
    factor = _check(query, key, scale)
    if masking == "causal" and query.shape[2] != key.shape[2]:
        raise ValueError(
            f"Causal attention of {query.shape[2]} queries to {key.shape[2]} keys: positions are "
            "not given. Pass a mask instead." + see("qk-clip-logits")
        )
    batch, heads, length, width = query.shape
    seen = key.shape[2]
    if mask is not None:
        mask = mask.broadcast_to(batch, heads, length, seen)
    result = query.new_full((heads,), -math.inf, dtype=torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        for some, rows in _blocks(query, seen, most_logits):
            columns = rows.stop if masking == "causal" else seen
            # Scaled first: products of fp16 could exceed its range.
            part = (query[some, :, rows] * factor).to(key.dtype)
            count, size = part.shape[0], part.shape[2]
            # Query heads that share a key head become rows of one product: keys are not copied.
            left = part.reshape(count, key.shape[1], -1, width)
            logits = left @ key[some, :, :columns].transpose(-1, -2)
            logits = logits.view(count, heads, size, columns)
            if masking == "causal":
                later = logits.new_ones((size, columns), dtype=torch.bool).triu_(rows.start + 1)
                logits.masked_fill_(later, -math.inf)
            if mask is not None:
                logits.masked_fill_(_closed(mask[some, :, rows, :columns]), -math.inf)
            result = torch.maximum(result, logits.amax(dim=(0, 2, 3)).float())
    return result


def _blocks(query: Tensor, keys: int, most_logits: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch and of the query positions whose logits are few enough."""
    batch, heads, length, _ = query.shape
    rows = min(length, max(1, most_logits // (heads * keys)))
    some = max(1, most_logits // (heads * keys * rows))
    for first in range(0, batch, some):
        for start in range(0, length, rows):
            yield slice(first, first + some), slice(start, min(start + rows, length))


def _closed(mask: Tensor) -> Tensor:
    """True where a pair does not meet."""
    if mask.dtype == torch.bool:
        return ~mask
    # Models add finfo.min, -inf, or a bias of moderate size, which is no mask.
    return mask <= torch.finfo(mask.dtype).min / 2


@torch.no_grad()
def max_logit_bound(query: Tensor, key: Tensor, *, scale: float | None = None) -> Tensor:
    """No logit of a head is larger than this: `scale * max|q| * max|k|`.

    Cheap, as it looks at each query and key once. Rotary positions keep lengths, so it may be
    taken before them. Clipping by it clips earlier than needed: the largest query and key seldom
    point the same way.

    Args:
        query: [batch, heads, length, head_dim].
        key: [batch, kv_heads, key length, head_dim].
        scale: On the products; None for `1 / sqrt(head_dim)`.

    Returns:
        [heads], fp32.

    Raises:
        ValueError: for shapes that do not fit.
    """
    factor = _check(query, key, scale)
    longest = [
        torch.linalg.vector_norm(each, dim=-1, dtype=torch.float32).amax(dim=(0, 2))
        for each in (query, key)
    ]
    repeat = query.shape[1] // key.shape[1]
    bound: Tensor = factor * longest[0] * longest[1].repeat_interleave(repeat)
    return bound


def _check(query: Tensor, key: Tensor, scale: float | None) -> float:
    fits = (
        query.dim() == key.dim() == 4
        and query.shape[0] == key.shape[0]
        and query.shape[1] % max(key.shape[1], 1) == 0
        and query.shape[3] == key.shape[3]
        and 0 not in (*query.shape, *key.shape)
    )
    if not fits:
        raise ValueError(
            f"Queries {list(query.shape)} and keys {list(key.shape)} do not fit. Must be [batch, "
            "heads, length, head_dim] and [batch, kv_heads, key length, head_dim]."
            + see("qk-clip-logits")
        )
    factor = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if not factor > 0:
        raise ValueError(f"Invalid {scale=}. Must be > 0." + see("bad-option"))
    return factor
