"""Where the queries and keys of attention heads come from: rows of named parameters. Data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from distmuon.errors import see

Axis = Literal["rows", "columns"]


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The rows of one parameter that belong to attention heads, a block for each.

    Rows are those of the matrix [-1, last dimension] that the parameter is in memory; of a bias,
    its elements.

    Attributes:
        parameter: FQN of the parameter, as the optimizer knows it.
        starts: First row of each head.
        count: Rows of each head.
        axis: "columns" for weights [in, out], such as those of GPT-2's Conv1D.

    Raises:
        ValueError: for no head, or rows that cannot be.
    """

    parameter: str
    starts: tuple[int, ...]
    count: int
    axis: Axis = "rows"

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.starts or min(self.starts) < 0 or self.count < 1:
            raise ValueError(
                f"Invalid heads of {self.parameter}: {self.count} {self.axis} from {self.starts}. "
                "Must be one start >= 0 for each head, and at least one row."
                + see("qk-clip-layers")
            )

    @property
    def stop(self) -> int:
        """One past the last row of any head."""
        return max(self.starts) + self.count


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """One attention layer, as QK-Clip sees it.

    Attributes:
        name: What its maxima are observed under; usually the FQN of the module.
        query: Weight, and bias if there is one, of the queries: a block for each query head.
        key: The same of the keys: a block for each key head. Query head h meets key head
            `h // (heads / kv_heads)`.
        query_shared: Query rows that meet a key which all heads share, so that only these rows can
            be scaled (the RoPE part in DeepSeek's latent attention); none in most models.

    Raises:
        ValueError: if the blocks do not fit together.
    """

    name: str
    query: tuple[HeadRows, ...]
    key: tuple[HeadRows, ...]
    query_shared: tuple[HeadRows, ...] = ()

    def __post_init__(self) -> None:
        """Check that the numbers of heads agree."""
        if not self.query or not self.key:
            raise ValueError(
                f"{self.name} needs the rows of its queries and of its keys."
                + see("qk-clip-layers")
            )
        for rows in (*self.query, *self.query_shared):
            _check_heads(self.name, rows, self.heads, "query")
        for rows in self.key:
            _check_heads(self.name, rows, self.kv_heads, "key")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name} has {self.heads} query heads and {self.kv_heads} key heads. The "
                "first must be a multiple of the second." + see("qk-clip-layers")
            )

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.query[0].starts)

    @property
    def kv_heads(self) -> int:
        """Number of key heads."""
        return len(self.key[0].starts)

    @property
    def blocks(self) -> tuple[HeadRows, ...]:
        """All rows that a factor can scale; their heads are numbered in this order."""
        return (*self.query, *self.key, *self.query_shared)


def _check_heads(layer: str, rows: HeadRows, heads: int, kind: str) -> None:
    if len(rows.starts) != heads:
        raise ValueError(
            f"{layer}: {rows.parameter} has rows of {len(rows.starts)} {kind} heads. Must be "
            f"{heads}, as in the first of its parameters." + see("qk-clip-layers")
        )


def head_rows(
    parameter: str,
    heads: int,
    count: int,
    *,
    first: int = 0,
    stride: int | None = None,
    axis: Axis = "rows",
) -> HeadRows:
    """Rows of heads that follow each other evenly.

    Args:
        parameter: FQN.
        heads: Number of heads.
        count: Rows of each.
        first: First row of the first head.
        stride: Rows from one head to the next; None for `count`, without gaps.
        axis: As in `HeadRows`.

    Returns:
        The rows.
    """
    step = count if stride is None else stride
    return HeadRows(parameter, tuple(first + head * step for head in range(heads)), count, axis)


def attention_layer(
    name: str,
    *,
    query: str | Sequence[str],
    key: str | Sequence[str],
    heads: int,
    head_dim: int,
    kv_heads: int | None = None,
) -> AttentionLayer:
    """Multi-head or grouped-query attention with one projection for queries and one for keys.

    Args:
        name: What its maxima are observed under.
        query: FQN of the weight [heads * head_dim, in], or of weight and bias.
        key: FQN of the weight [kv_heads * head_dim, in], or of weight and bias.
        heads: Query heads.
        head_dim: Width of a head.
        kv_heads: Key heads; None for as many as query heads.

    Returns:
        The layer.
    """
    groups = heads if kv_heads is None else kv_heads
    return AttentionLayer(
        name,
        tuple(head_rows(parameter, heads, head_dim) for parameter in _listed(query)),
        tuple(head_rows(parameter, groups, head_dim) for parameter in _listed(key)),
    )


def latent_attention_layer(
    name: str,
    *,
    query: str | Sequence[str],
    key_value: str | Sequence[str],
    heads: int,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
) -> AttentionLayer:
    """Multi-head latent attention (MLA), as in DeepSeek-V2, DeepSeek-V3 and Kimi-K2.

    Each head's queries have a part without and a part with rotary positions; the keys of the second
    part are shared by all heads and stay as they are, as do the values.

    Args:
        name: What its maxima are observed under.
        query: FQN of the weight [heads * (nope_dim + rope_dim), in], such as `q_b_proj.weight`, or
            of weight and bias.
        key_value: FQN of the weight [heads * (nope_dim + value_dim), in], `kv_b_proj.weight`, or of
            weight and bias.
        heads: Number of heads.
        nope_dim: Width of a head's part without positions.
        rope_dim: Width of its part with positions.
        value_dim: Width of its values.

    Returns:
        The layer.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1; Kimi K2, arXiv 2507.20534, section 2.1.
    """
    width = nope_dim + rope_dim
    return AttentionLayer(
        name,
        tuple(head_rows(p, heads, nope_dim, stride=width) for p in _listed(query)),
        tuple(
            head_rows(p, heads, nope_dim, stride=nope_dim + value_dim) for p in _listed(key_value)
        ),
        tuple(head_rows(p, heads, rope_dim, first=nope_dim, stride=width) for p in _listed(query)),
    )


def check_apart(layers: Sequence[AttentionLayer]) -> None:
    """Refuse two layers of one name, and rows that two factors would scale.

    Args:
        layers: All layers.

    Raises:
        ValueError: naming the layers.
    """
    names = [layer.name for layer in layers]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two attention layers are called {twice[0]!r}." + see("qk-clip-layers"))
    spans: dict[tuple[str, Axis], list[tuple[int, int, str]]] = {}
    for layer in layers:
        for rows in layer.blocks:
            found = spans.setdefault((rows.parameter, rows.axis), [])
            found += [(start, start + rows.count, layer.name) for start in rows.starts]
    for (parameter, axis), found in spans.items():
        for (_, stop, one), (start, _, other) in pairwise(sorted(found)):
            if start < stop:
                raise ValueError(
                    f"{axis.capitalize()} {start} to {stop} of {parameter} belong to two heads, in "
                    f"{one} and {other}: they would be scaled twice. Describe weights that "
                    "several layers share once, and observe all of them under that one name."
                    + see("qk-clip-layers")
                )


def _listed(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
