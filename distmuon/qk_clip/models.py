"""Read a model's attention layers from its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from distmuon.errors import see
from distmuon.parameters import walk_modules
from distmuon.qk_clip.layers import (
    AttentionLayer,
    Axis,
    HeadRows,
    attention_layer,
    head_rows,
    latent_attention_layer,
)
from distmuon.qk_clip.scaling import inert, is_qk_norm

# Names of the two projections: Llama and most others; BERT and ViT; Meta's own Llama; diffusers;
# DistilBERT.
_PROJECTIONS = (
    ("q_proj", "k_proj"),
    ("query", "key"),
    ("wq", "wk"),
    ("to_q", "to_k"),
    ("q_lin", "k_lin"),
)
_HEAD_COUNTS = ("num_heads", "heads", "n_heads", "num_attention_heads", "n_local_heads", "n_head")
_HEAD_WIDTHS = ("head_dim", "attention_head_size", "head_size")


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Describe every attention layer of a model.

    Known are modules with separate projections (`q_proj` and `k_proj`, `query` and `key`, `wq` and
    `wk`, ...: Llama, Mistral, Qwen2, Gemma, OPT, BERT, ViT, ...), DeepSeek's latent attention
    (`kv_b_proj`: DeepSeek-V2 and V3, Kimi-K2), and three with a fused projection: `qkv_proj`
    (Phi-3), `query_key_value` (GPT-NeoX) and `c_attn` (GPT-2). Others are described with
    `AttentionLayer`.

    Args:
        model: Wrapped or not; not yet sharded or quantized.

    Returns:
        The layers, named as their modules, wrappers left out.

    Raises:
        ValueError: if there are none, an attention module is of another kind, or its queries or
            keys are normalized, where clipping is inert.
    """
    found: dict[str, AttentionLayer] = {}
    strange: list[str] = []
    for path, module, _ in walk_modules(model):
        reader = _reader(module)
        if reader is not None:
            _refuse_norm(path, module)
            found[path] = reader(path, module)
        elif _looks_like_attention(module):
            strange.append(path)
    # `attention` may hold the module that was understood, or be inside it.
    strange = [path for path in strange if not any(_related(path, known) for known in found)]
    if strange:
        raise ValueError(
            f"{strange[0]} looks like attention, but where its queries and keys come from is not "
            f"known ({len(strange)} modules are so). Describe the layers with "
            "distmuon.qk_clip.AttentionLayer (docs/qk-clip.md)." + see("qk-clip-layers")
        )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no module with projections of a known name, such as "
            "q_proj and k_proj. Describe its attention with distmuon.qk_clip.AttentionLayer "
            "(docs/qk-clip.md)." + see("qk-clip-layers")
        )
    return tuple(found.values())


_Reader = Callable[[str, nn.Module], AttentionLayer]


def _reader(module: nn.Module) -> _Reader | None:
    if hasattr(module, "kv_b_proj") and hasattr(module, "qk_nope_head_dim"):
        return _read_latent
    if _projections(module) is not None:
        return _read_separate
    for child, reader in (
        ("qkv_proj", _read_blocks),
        ("query_key_value", _read_interleaved),
        ("c_attn", _read_columns),
    ):
        if _is_projection(getattr(module, child, None)):
            return reader
    return None


def _is_projection(module: object) -> bool:
    # GPT-2's Conv1D is no Linear, but has a matrix.
    weight = getattr(module, "weight", None)
    return isinstance(module, nn.Module) and weight is not None and weight.dim() == 2


def _projections(module: nn.Module) -> tuple[str, str] | None:
    for pair in _PROJECTIONS:
        if all(_is_projection(getattr(module, child, None)) for child in pair):
            return pair
    return None


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return name.endswith("attention") and any(p.dim() >= 2 for p in module.parameters())


def _related(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _refuse_norm(path: str, module: nn.Module) -> None:
    for child, _ in module.named_children():
        if is_qk_norm(child):
            raise ValueError(inert(path, _join(path, child)) + see("qk-norm"))


class _Sizes(NamedTuple):
    heads: int
    head_dim: int


def _read_sizes(path: str, module: nn.Module, outputs: int) -> _Sizes:
    """Heads and their width, of queries of so many elements."""
    config = getattr(module, "config", None)
    for place in (module, config):
        for key in _HEAD_WIDTHS:
            width = getattr(place, key, None)
            if isinstance(width, int) and outputs % width == 0:
                return _Sizes(outputs // width, width)
    for place in (module, config):
        for key in _HEAD_COUNTS:
            heads = getattr(place, key, None)
            if isinstance(heads, int) and outputs % heads == 0:
                return _Sizes(heads, outputs // heads)
    raise ValueError(
        f"{path} does not say how many heads its {outputs} query elements have: it has none of "
        f"{[*_HEAD_WIDTHS, *_HEAD_COUNTS]}. Describe it with distmuon.qk_clip.attention_layer."
        + see("qk-clip-layers")
    )


def _read_separate(path: str, module: nn.Module) -> AttentionLayer:
    pair = _projections(module)
    assert pair is not None
    queries, elements = (_matrix(module, child).shape[0] for child in pair)
    sizes = _read_sizes(path, module, queries)
    keys, rest = divmod(elements, sizes.head_dim)
    if rest:
        raise ValueError(
            f"{path} has heads of width {sizes.head_dim}, but {elements} key elements. "
            "Describe it with distmuon.qk_clip.attention_layer." + see("qk-clip-layers")
        )
    return attention_layer(
        path,
        query=_weights(path, module, pair[0]),
        key=_weights(path, module, pair[1]),
        heads=sizes.heads,
        head_dim=sizes.head_dim,
        kv_heads=keys,
    )


def _read_latent(path: str, module: nn.Module) -> AttentionLayer:
    child = "q_b_proj" if _is_projection(getattr(module, "q_b_proj", None)) else "q_proj"
    nope, rope, value = (
        int(getattr(module, key)) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    return latent_attention_layer(
        path,
        query=_weights(path, module, child),
        key_value=_weights(path, module, "kv_b_proj"),
        heads=_matrix(module, child).shape[0] // (nope + rope),
        nope_dim=nope,
        rope_dim=rope,
        value_dim=value,
    )


def _read_blocks(path: str, module: nn.Module) -> AttentionLayer:
    """Rows in the order queries, keys, values; as many keys as values."""
    config = getattr(module, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", heads)
    outputs = _matrix(module, "qkv_proj").shape[0]
    if not heads or not groups or outputs % (heads + 2 * groups):
        raise ValueError(
            f"{path} does not say how its {outputs} fused elements are cut. Describe it with "
            "distmuon.qk_clip.AttentionLayer." + see("qk-clip-layers")
        )
    width = outputs // (heads + 2 * groups)
    names = _weights(path, module, "qkv_proj")
    return AttentionLayer(
        path,
        tuple(head_rows(name, heads, width) for name in names),
        tuple(head_rows(name, groups, width, first=heads * width) for name in names),
    )


def _read_interleaved(path: str, module: nn.Module) -> AttentionLayer:
    """Rows in the order of heads; each has queries, keys and values."""
    outputs = _matrix(module, "query_key_value").shape[0]
    sizes = _read_sizes(path, module, outputs // 3)
    config = getattr(module, "config", None)
    if outputs % 3 or getattr(config, "multi_query", None) or hasattr(config, "num_kv_heads"):
        raise ValueError(
            f"{path} fuses shared keys in an order of its own. Describe it with "
            "distmuon.qk_clip.AttentionLayer." + see("qk-clip-layers")
        )
    width = sizes.head_dim

    def rows(name: str, first: int) -> HeadRows:
        return head_rows(name, sizes.heads, width, first=first, stride=3 * width)

    names = _weights(path, module, "query_key_value")
    return AttentionLayer(
        path, tuple(rows(name, 0) for name in names), tuple(rows(name, width) for name in names)
    )


def _read_columns(path: str, module: nn.Module) -> AttentionLayer:
    """GPT-2: a weight [in, 3 * out], queries, keys, values side by side; or, in a Linear, rows."""
    axis: Axis = "rows" if isinstance(module.get_submodule("c_attn"), nn.Linear) else "columns"
    outputs = _matrix(module, "c_attn").shape[0 if axis == "rows" else 1]
    sizes = _read_sizes(path, module, outputs // 3)
    if outputs % 3 or getattr(module, "is_cross_attention", False):
        raise ValueError(
            f"{path} does not fuse queries, keys and values of one size. Describe it with "
            "distmuon.qk_clip.AttentionLayer." + see("qk-clip-layers")
        )

    def rows(name: str, first: int) -> HeadRows:
        along: Axis = "rows" if name.endswith("bias") else axis
        return head_rows(name, sizes.heads, sizes.head_dim, first=first, axis=along)

    names = _weights(path, module, "c_attn")
    half = outputs // 3
    return AttentionLayer(
        path, tuple(rows(name, 0) for name in names), tuple(rows(name, half) for name in names)
    )


def _matrix(module: nn.Module, child: str) -> Tensor:
    weight = module.get_submodule(child).weight
    assert isinstance(weight, Tensor)
    return weight


def _weights(path: str, module: nn.Module, child: str) -> list[str]:
    """FQNs of a projection's weight, and of its bias if it has one."""
    projection = module.get_submodule(child)
    leaves = ["weight"] if getattr(projection, "bias", None) is None else ["weight", "bias"]
    return [_join(path, f"{child}.{leaf}") for leaf in leaves]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
