"""Models whose shapes are known by heart, on the meta device: names and shapes, no numbers.

Enough to plan with on a laptop, without a network and without the libraries that train them. They
cannot be run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from distmuon.layout import TensorSpec, read_spec
from distmuon.param_groups import route

# As they are published.
_DTYPE = torch.bfloat16


class Linear(nn.Module):
    """A matrix and nothing else: nn.Linear takes twice as long, and a model may have 70,000."""

    def __init__(self, rows: int, columns: int) -> None:
        """Make the weight [rows, columns].

        Args:
            rows: Outputs.
            columns: Inputs.
        """
        super().__init__()
        self.weight = _parameter(rows, columns)


class Experts(nn.Module):
    """The experts of a layer as three stacks [experts, m, n]."""

    def __init__(self, experts: int, *, width: int, hidden: int) -> None:
        """Make the stacks.

        Args:
            experts: How many.
            width: Of the residual stream.
            hidden: Width inside one expert.
        """
        super().__init__()
        self.gate_proj = _parameter(experts, hidden, width)
        self.up_proj = _parameter(experts, hidden, width)
        self.down_proj = _parameter(experts, width, hidden)


@dataclass(frozen=True, slots=True)
class Dense:
    """A Llama-like transformer: q, k, v, o, gate, up, down in each layer.

    Attributes:
        layers: Number of blocks.
        width: Of the residual stream.
        hidden: Width inside the MLP.
        queries: All query heads together.
        keys: All key heads together, and so the value heads.
        vocabulary: Tokens; embedding and head are not tied.
    """

    layers: int
    width: int
    hidden: int
    queries: int
    keys: int
    vocabulary: int

    def build(self) -> nn.Module:
        """The model, on the meta device."""
        return _decoder(self.vocabulary, self.width, [self._block() for _ in range(self.layers)])

    def _block(self) -> nn.Module:
        attention = {
            "q_proj": _matrix(self.queries, self.width),
            "k_proj": _matrix(self.keys, self.width),
            "v_proj": _matrix(self.keys, self.width),
            "o_proj": _matrix(self.width, self.queries),
        }
        return _block(self.width, attention, _mlp(self.width, self.hidden))


@dataclass(frozen=True, slots=True)
class KimiK2:
    """Kimi-K2-like: 61 layers of latent attention, 384 experts a layer but the first.

    Attributes:
        experts: "separate" matrices, as its checkpoints name them, or three "stacked" [384, m, n] a
            layer.

    Source: https://huggingface.co/moonshotai/Kimi-K2-Base/blob/main/config.json
    """

    experts: str

    def build(self) -> nn.Module:
        """The model, on the meta device."""
        width = 7168
        return _decoder(163840, width, [self._block(layer, width) for layer in range(61)])

    def _block(self, layer: int, width: int) -> nn.Module:
        heads, hidden = 64, 2048
        attention = {
            "q_a_proj": _matrix(1536, width),
            "q_a_layernorm": _norm(1536),
            "q_b_proj": _matrix(heads * 192, 1536),
            "kv_a_proj_with_mqa": _matrix(576, width),
            "kv_a_layernorm": _norm(512),
            "kv_b_proj": _matrix(heads * 256, 512),
            "o_proj": _matrix(width, heads * 128),
        }
        if layer == 0:
            return _block(width, attention, _mlp(width, 18432))
        parts = {
            "shared_experts": _mlp(width, hidden),
            "gate": _matrix(384, width),
            "experts": Experts(384, width=width, hidden=hidden)
            if self.experts == "stacked"
            else nn.ModuleList([_mlp(width, hidden) for _ in range(384)]),
        }
        return _block(width, attention, nn.ModuleDict(parts))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    "llama-7b": Dense(32, 4096, 11008, 4096, 4096, 32000).build,
    "llama-3-70b": Dense(80, 8192, 28672, 8192, 1024, 128256).build,
    "qwen3-32b": Dense(64, 5120, 25600, 8192, 1024, 151936).build,
    "kimi-k2": KimiK2("separate").build,
    "kimi-k2-stacked": KimiK2("stacked").build,
}


def muon_specs(model: nn.Module) -> list[TensorSpec]:
    """Muon's parameters of a model, in its order.

    Args:
        model: Any module, on any device.

    Returns:
        Their names and shapes.
    """
    return [
        read_spec(r.fqn, r.shape, {"axes": r.axes, "blocks": r.blocks})
        for r in route(model)
        if r.algorithm == "muon"
    ]


def _decoder(vocabulary: int, width: int, blocks: list[nn.Module]) -> nn.Module:
    inner = {
        "embed_tokens": nn.Embedding(vocabulary, width, device="meta", dtype=_DTYPE),
        "layers": nn.ModuleList(blocks),
        "norm": _norm(width),
    }
    return nn.ModuleDict({"model": nn.ModuleDict(inner), "lm_head": _matrix(vocabulary, width)})


def _block(width: int, attention: Mapping[str, nn.Module], mlp: nn.Module) -> nn.Module:
    parts = {
        "self_attn": nn.ModuleDict(attention),
        "mlp": mlp,
        "input_layernorm": _norm(width),
        "post_attention_layernorm": _norm(width),
    }
    return nn.ModuleDict(parts)


def _mlp(width: int, hidden: int) -> nn.Module:
    parts = {
        "gate_proj": _matrix(hidden, width),
        "up_proj": _matrix(hidden, width),
        "down_proj": _matrix(width, hidden),
    }
    return nn.ModuleDict(parts)


def _matrix(rows: int, columns: int) -> nn.Module:
    return Linear(rows, columns)


def _norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, device="meta", dtype=_DTYPE)


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(_empty(shape))


# Parameters of one shape may stand over the same tensor: there is nothing in it.
@cache
def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta", dtype=_DTYPE)
