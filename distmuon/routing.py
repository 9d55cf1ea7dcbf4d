"""What each parameter of a model is, and so which update rule it gets, with the reason.

What a module *is* decides first, what it is called second. A tensor used in several places is
judged once, and any use as an embedding or output head wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

from distmuon.parameters import Entry
from distmuon.structure import Axes, Blocks

Rule = Literal["muon", "adamw", "frozen"]
Kind = Literal["matrix", "stack", "kernel", "embedding", "head", "norm", "bias", "vector", "other"]


@dataclass(frozen=True, slots=True)
class Route:
    """What happens to one parameter.

    Attributes:
        fqn: Its name in the unwrapped model; the first one if it is used in several places.
        shape: Its shape.
        algorithm: "muon", "adamw", or "frozen" for one that is not trained.
        kind: What it was taken for.
        reason: Why, for a person.
        axes: What the dimensions of a Muon parameter stand for.
        blocks: Where its matrices are cut; None for whole ones.
    """

    fqn: str
    shape: tuple[int, ...]
    algorithm: Rule
    kind: Kind
    reason: str
    axes: Axes = "out_in"
    blocks: Blocks | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a parameter is, and why it is taken for that."""

    kind: Kind
    reason: str


# A model of 70,000 matrices has few classes and few words in its names: answers about them are
# kept. So many, for a notebook may define the same class many times.
_CLASSES, _WORDS = 1024, 16384


def _name_test(pattern: str) -> Callable[[str], bool]:
    """A function that tells whether a part of a name matches."""
    match = re.compile(pattern).fullmatch

    @lru_cache(_WORDS)
    def matches(word: str) -> bool:
        return match(word) is not None

    return matches


def _class_test(pattern: str) -> Callable[[Any], str | None]:
    """A function that gives a class's own name if that or one of its bases' matches."""
    match = re.compile(pattern).fullmatch

    @lru_cache(_CLASSES)
    def name_of(kind: Any) -> str | None:
        matches = any(match(base.__name__) for base in kind.__mro__)
        return kind.__name__ if matches else None

    return name_of


_norm_class = _class_test(r"\w*Norm(\dd|Gated)?")
_embedding_class = _class_test(r"\w*Embed(der|dings?)?(Bag|Table|Layer)?")
_is_embedding_name = _name_test(
    r"(\w*_)?(emb|embed|embeds|embedding|embeddings|embedder|wte|wpe)(_(tokens|positions|in|table))?"
    r"|(\w*_)?(pos|position|positional)_(\w+_)?(table|encoding)"
    r"|(\w*_)?(cls|class|mask|register|query)_tokens?"
)
_is_head_name = _name_test(
    r"(\w*_)?heads?|classifier|scores?|unembed(ding)?|embed_out|to_logits|qa_outputs"
    r"|output_projection"
)
# Too common elsewhere to mean a head, except for a Linear that is the model's own child.
_is_top_level_head_name = _name_test(r"output|out|fc|decoder|logits")
_is_fused_name = _name_test(
    r"\w*qkv\w*|in_proj_weight|c_attn|query_key_value|\w*gate_up\w*|weight_[ih]h_l\w+"
)
# Rows of their weights are inputs: transformers' GPT-2 and two of its mixtures of experts.
_in_out_class = _class_test(r"Conv1D|GptOssExperts|Llama4TextExperts")
_is_lora_name = _name_test(r"lora_\w+")
_adapter_class = _class_test(r"BaseTunerLayer")
# A convolution of at most so many input channels reads pixels, as an embedding reads tokens.
_PIXEL_CHANNELS = 4


def judge(entries: Sequence[Entry], model: nn.Module) -> list[Verdict]:
    """Decide what each parameter is.

    Args:
        entries: From `find_parameters(model)`.
        model: The model, asked for its input and output embeddings where it can tell.

    Returns:
        Verdicts parallel to `entries`; "matrix" and "stack" are for Muon.
    """
    modules = list(model.modules())
    marked = {
        **_last_linear_of_vocabulary_size(entries),
        **_heads_by_name(entries),
        **_declared(modules),
    }
    adapters = _adapter_parts(modules)
    moe_paths = frozenset(
        f".{use.fqn}".split(".experts.")[0]
        for entry in entries
        for use in entry.uses
        if ".experts." in f".{use.fqn}"
    )
    return [
        _by_part(entry, adapters)
        or _by_embedding_class(entry)
        or marked.get(id(entry.parameter))
        or _by_embedding_name(entry)
        or _by_kernel(entry)
        or _by_shape(entry)
        or _matrix(entry, moe_paths)
        for entry in entries
    ]


def _adapter_parts(modules: Iterable[nn.Module]) -> frozenset[str]:
    """The names under which PEFT's layers of whatever method keep what they train."""
    layers = (module for module in modules if _adapter_class(type(module)))
    return frozenset(name for layer in layers for name in getattr(layer, "adapter_layer_names", ()))


def _by_part(entry: Entry, adapters: frozenset[str]) -> Verdict | None:
    """Judge adapters, norms, biases and vectors: what they are does not depend on their module."""
    # A factor of ones, as IA3 trains it, must not decay to zero.
    row = entry.parameter.numel() == max(entry.parameter.shape, default=1)
    adapted: Kind = "vector" if row else "other"
    for use in entry.uses:
        parts = use.fqn.split(".")
        leaf = parts[-1]
        if any(map(_is_lora_name, parts)):
            return Verdict(adapted, "LoRA factor: orthogonalizing one factor is not Muon on W")
        if adapters and (adapter := next((part for part in parts if part in adapters), None)):
            return Verdict(adapted, f"part of an adapter ({adapter}), no weight matrix")
        if norm := _norm_class(type(use.owner)):
            return Verdict("norm", f"norm ({norm})")
        if leaf.endswith("bias"):
            return Verdict("bias", "bias")
        if leaf.endswith("_log"):
            return Verdict("vector", "logarithms of decay rates (state-space model), no matrix")
    if entry.parameter.dim() < 2:
        return Verdict("vector", f"{entry.parameter.dim()}-D, no matrix")
    return None


def _by_embedding_class(entry: Entry) -> Verdict | None:
    for use in entry.uses:
        if name := _embedding_class(type(use.owner)):
            return Verdict("embedding", f"embedding ({name})")
    return None


def _by_embedding_name(entry: Entry) -> Verdict | None:
    for use in entry.uses:
        name = _telling_name(use.fqn)
        if _is_embedding_name(name):
            return Verdict("embedding", f"embedding by its name, {name}")
    return None


def find_convolution(entry: Entry) -> _ConvNd | None:
    """The convolution that a kernel belongs to; None for anything else."""
    for use in entry.uses:
        if isinstance(use.owner, _ConvNd):
            return use.owner
    return None


def find_structure(entry: Entry) -> tuple[Axes, Blocks | None]:
    """How Muon would read a parameter, as far as its module tells."""
    convolution = find_convolution(entry)
    if convolution is not None:
        # The groups of a convolution share no input: each is a matrix of its own.
        groups = convolution.groups
        return "conv", Blocks(groups) if groups > 1 else None
    turned = any(_in_out_class(type(use.owner)) for use in entry.uses)
    return ("in_out" if turned else "out_in"), None


def _by_kernel(entry: Entry) -> Verdict | None:
    """Judge the kernels of convolutions."""
    convolution = find_convolution(entry)
    if convolution is None:
        return None
    rows, columns = entry.parameter.shape[0], entry.parameter.shape[1:].numel()
    inputs, groups = convolution.in_channels, convolution.groups
    parts = entry.uses[0].fqn.split(".")
    if name := next((part for part in parts if _is_embedding_name(part)), None):
        return Verdict("embedding", f"embedding by its name, {name}")
    if convolution.transposed:
        return Verdict("other", "transposed convolution: its first dimension is the input")
    if groups > 1 and groups in (rows, inputs):
        return Verdict("other", "depthwise convolution: a kernel per channel, no matrix")
    if 1 in (rows, columns):
        return Verdict("other", "one row or column: its polar factor is only its direction")
    if inputs <= _PIXEL_CHANNELS:
        return Verdict("other", f"convolution that reads the input ({inputs} channels)")
    each = f"{groups} x [{rows // groups}, {columns}]" if groups > 1 else f"[{rows}, {columns}]"
    return Verdict("kernel", f"convolution, flattened to {each}")


def _by_shape(entry: Entry) -> Verdict | None:
    shape = list(entry.parameter.shape)
    if len(shape) > 3:
        return Verdict("other", f"{len(shape)}-D, no matrix or stack of matrices")
    if 1 in shape[-2:]:
        return Verdict("other", "one row or column: its polar factor is only its direction")
    if len(shape) == 3 and shape[0] == 1:
        return Verdict("embedding", "first dimension 1: a broadcast table, not a stack of matrices")
    return None


def _matrix(entry: Entry, moe_paths: frozenset[str]) -> Verdict:
    first = entry.uses[0]
    parent, _, name = f".{first.fqn}".removesuffix(".weight").rpartition(".")
    turned = ", stored [in, out]" if find_structure(entry)[0] == "in_out" else ""
    if len(entry.parameter.shape) == 3:
        count = entry.parameter.shape[0]
        fused = ", its fused blocks as one" if _is_fused_name(name) else ""
        reason = f"stack of {count} matrices, orthogonalized one by one{fused}{turned}"
        return Verdict("stack", reason)
    if name in ("router", "gate") and parent in moe_paths:
        return Verdict("matrix", "hidden matrix (MoE router, as Moonlight does)")
    if _is_fused_name(name):
        return Verdict("matrix", f"hidden matrix, its fused blocks orthogonalized as one{turned}")
    return Verdict("matrix", f"hidden matrix ({type(first.owner).__name__}){turned}")


# --------------------------------------------------------------------------------------------------
# Heads and embeddings that only the whole model can tell.


def _declared(modules: Sequence[nn.Module]) -> dict[int, Verdict]:
    """What the model itself says through Hugging Face's two getters."""
    marked: dict[int, Verdict] = {}
    getters: tuple[tuple[str, Kind], ...] = (
        ("get_output_embeddings", "head"),
        ("get_input_embeddings", "embedding"),
    )
    for getter, kind in getters:  # the embedding second: it wins over the head tied to it
        for module in modules:
            cls: Any = type(module)
            if not _may_have(cls, getter) and getter not in vars(module):
                continue
            try:
                part = getattr(module, getter)()
            except (AttributeError, NotImplementedError, TypeError):
                continue  # no such part, or a method of another meaning: classes and names decide
            if isinstance(part, nn.Module):
                word = "output head" if kind == "head" else "embedding"
                verdict = Verdict(kind, f"{word} (the model's {getter})")
                marked.update((id(p), verdict) for p in part.parameters() if p.dim() >= 2)
    return marked


def _heads_by_name(entries: Sequence[Entry]) -> dict[int, Verdict]:
    """Find output heads by conventional names.

    In a container with such a name (`classifier.dense`, `classifier.out_proj`) only the last matrix
    is the head; inside numbered layers a container is none (`blocks.0.heads.3.key`).
    """
    found: dict[str, tuple[int, Verdict]] = {}
    for entry in entries:
        for use in entry.uses:
            parts = use.fqn.split(".")
            if entry.parameter.dim() < 2 or any(map(_is_lora_name, parts)):
                continue
            name = _telling_name(use.fqn)
            key = _head_container(parts)
            if _is_head_name(name) or (
                len(parts) == 2
                and isinstance(use.owner, nn.Linear)
                and _is_top_level_head_name(name)
            ):
                key = key or use.fqn
            if key:
                label = name if key == use.fqn else f"last matrix of {key}"
                verdict = Verdict("head", f"output head by its name, {label}")
                found[key] = id(entry.parameter), verdict
    return dict(found.values())


def _head_container(parts: Sequence[str]) -> str | None:
    for depth, part in enumerate(parts[:-2]):
        if part.isdecimal():
            return None
        if _is_head_name(part):
            return ".".join(parts[: depth + 1])
    return None


def _last_linear_of_vocabulary_size(entries: Sequence[Entry]) -> dict[int, Verdict]:
    """Find a head that no name gives away: one output for each row of an embedding.

    Only the last Linear, and only if no other has as many outputs: a position table can be as long
    as a hidden layer is wide.
    """
    rows = {
        use.owner.num_embeddings: use.fqn
        for entry in entries
        for use in entry.uses
        if isinstance(use.owner, (nn.Embedding, nn.EmbeddingBag))
    }
    linears = [
        entry
        for entry in entries
        if entry.parameter.dim() == 2 and isinstance(entry.uses[0].owner, nn.Linear)
    ]
    if not linears:
        return {}
    *others, last = linears
    outputs = last.parameter.shape[0]
    if outputs not in rows or any(each.parameter.shape[0] == outputs for each in others):
        return {}
    reason = f"output head: the last Linear, one output for each row of {rows[outputs]}"
    return {id(last.parameter): Verdict("head", reason)}


def _telling_name(fqn: str) -> str:
    """The part of a name that a person chose: `pos_embed.0.weight` -> `pos_embed`."""
    for part in reversed(fqn.split(".")):
        if not (part.isdecimal() or part in ("weight", "original", "original0", "original1")):
            return part
    return fqn


@lru_cache(_CLASSES)
def _may_have(kind: type[Any], method: str) -> bool:
    """Whether modules of a class may answer to a method that is none of their attributes."""
    return hasattr(kind, method) or kind.__getattr__ is not nn.Module.__getattr__
