"""What each parameter of a model is, and so which update rule it gets, with the reason.

What a module *is* decides first, what it is called second. A tensor used in several places is
judged once, and any use as an embedding or output head wins.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

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


_NORM_CLASS = re.compile(r"\w*Norm(\dd|Gated)?")
_EMBEDDING_CLASS = re.compile(r"\w*Embed(der|dings?)?(Bag|Table|Layer)?")
_EMBEDDING_NAME = re.compile(
    r"(\w*_)?(emb|embed|embeds|embedding|embeddings|embedder|wte|wpe)(_(tokens|positions|in|table))?"
    r"|(\w*_)?(pos|position|positional)_(\w+_)?(table|encoding)"
    r"|(\w*_)?(cls|class|mask|register|query)_tokens?"
)
_HEAD_NAME = re.compile(
    r"(\w*_)?heads?|classifier|scores?|unembed(ding)?|embed_out|to_logits|qa_outputs"
    r"|output_projection"
)
# Too common elsewhere to mean a head, except for a Linear that is the model's own child.
_TOP_LEVEL_HEAD_NAME = re.compile(r"output|out|fc|decoder|logits")
_FUSED_NAME = re.compile(
    r"\w*qkv\w*|in_proj_weight|c_attn|query_key_value|\w*gate_up\w*|weight_[ih]h_l\w+"
)
# Rows of their weights are inputs: transformers' GPT-2 and two of its mixtures of experts.
_IN_OUT_CLASS = re.compile(r"Conv1D|GptOssExperts|Llama4TextExperts")
_LORA_NAME = re.compile(r"lora_\w+")
_ADAPTER_CLASS = re.compile(r"BaseTunerLayer")
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
    marked = {
        **_last_linear_of_vocabulary_size(entries),
        **_heads_by_name(entries),
        **_declared(model),
    }
    adapters = _adapter_parts(model)
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


def _adapter_parts(model: nn.Module) -> frozenset[str]:
    """The names under which PEFT's layers of whatever method keep what they train."""
    layers = (m for m in model.modules() if _base_class(m, _ADAPTER_CLASS))
    return frozenset(name for layer in layers for name in getattr(layer, "adapter_layer_names", ()))


def _by_part(entry: Entry, adapters: frozenset[str]) -> Verdict | None:
    """Judge adapters, norms, biases and vectors: what they are does not depend on their module."""
    # A factor of ones, as IA3 trains it, must not decay to zero.
    row = entry.parameter.numel() == max(entry.parameter.shape, default=1)
    adapted: Kind = "vector" if row else "other"
    for use in entry.uses:
        parts = use.fqn.split(".")
        leaf = parts[-1]
        if any(map(_is_lora, parts)):
            return Verdict(adapted, "LoRA factor: orthogonalizing one factor is not Muon on W")
        if adapter := next((part for part in parts if part in adapters), None):
            return Verdict(adapted, f"part of an adapter ({adapter}), no weight matrix")
        if norm := _base_class(use.owner, _NORM_CLASS):
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
        if name := _base_class(use.owner, _EMBEDDING_CLASS):
            return Verdict("embedding", f"embedding ({name})")
    return None


def _by_embedding_name(entry: Entry) -> Verdict | None:
    for use in entry.uses:
        name = _telling_name(use.fqn)
        if _EMBEDDING_NAME.fullmatch(name):
            return Verdict("embedding", f"embedding by its name, {name}")
    return None


def find_convolution(entry: Entry) -> _ConvNd | None:
    """The convolution that a kernel belongs to; None for anything else."""
    owners = (use.owner for use in entry.uses)
    return next((owner for owner in owners if isinstance(owner, _ConvNd)), None)


def find_structure(entry: Entry) -> tuple[Axes, Blocks | None]:
    """How Muon would read a parameter, as far as its module tells."""
    convolution = find_convolution(entry)
    if convolution is not None:
        # The groups of a convolution share no input: each is a matrix of its own.
        groups = convolution.groups
        return "conv", Blocks(groups) if groups > 1 else None
    turned = any(_base_class(use.owner, _IN_OUT_CLASS) for use in entry.uses)
    return ("in_out" if turned else "out_in"), None


def _by_kernel(entry: Entry) -> Verdict | None:
    """Judge the kernels of convolutions."""
    convolution = find_convolution(entry)
    if convolution is None:
        return None
    rows, columns = entry.parameter.shape[0], entry.parameter.shape[1:].numel()
    inputs, groups = convolution.in_channels, convolution.groups
    parts = entry.uses[0].fqn.split(".")
    if name := next((part for part in parts if _EMBEDDING_NAME.fullmatch(part)), None):
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
        fused = ", its fused blocks as one" if _FUSED_NAME.fullmatch(name) else ""
        reason = f"stack of {count} matrices, orthogonalized one by one{fused}{turned}"
        return Verdict("stack", reason)
    if name in ("router", "gate") and parent in moe_paths:
        return Verdict("matrix", "hidden matrix (MoE router, as Moonlight does)")
    if _FUSED_NAME.fullmatch(name):
        return Verdict("matrix", f"hidden matrix, its fused blocks orthogonalized as one{turned}")
    return Verdict("matrix", f"hidden matrix ({type(first.owner).__name__}){turned}")


# --------------------------------------------------------------------------------------------------
# Heads and embeddings that only the whole model can tell.


def _declared(model: nn.Module) -> dict[int, Verdict]:
    """What the model itself says through Hugging Face's two getters."""
    marked: dict[int, Verdict] = {}
    getters: tuple[tuple[str, Kind], ...] = (
        ("get_output_embeddings", "head"),
        ("get_input_embeddings", "embedding"),
    )
    for getter, kind in getters:  # the embedding second: it wins over the head tied to it
        for module in model.modules():
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
            if entry.parameter.dim() < 2 or any(map(_is_lora, parts)):
                continue
            name = _telling_name(use.fqn)
            key = _head_container(parts)
            if _HEAD_NAME.fullmatch(name) or (
                len(parts) == 2
                and isinstance(use.owner, nn.Linear)
                and _TOP_LEVEL_HEAD_NAME.fullmatch(name)
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
        if _HEAD_NAME.fullmatch(part):
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


def _base_class(module: nn.Module, pattern: re.Pattern[str]) -> str | None:
    """The name of the module's own class if it or one of its bases matches."""
    bases = tuple(base.__name__ for base in type(module).__mro__)
    return bases[0] if _matches(bases, pattern) else None


# A model of 70,000 matrices has few classes and few words in its names.
@cache
def _matches(bases: tuple[str, ...], pattern: re.Pattern[str]) -> bool:
    return any(map(pattern.fullmatch, bases))


@cache
def _is_lora(part: str) -> bool:
    return _LORA_NAME.fullmatch(part) is not None
