"""A byte-level decoder-only transformer: RMSNorm, rotary positions, SDPA, MLP, pre-norm.

Parameter names follow the common convention (`embed_tokens`, `layers.0.attention.q_proj`,
`layers.0.mlp.up_proj`, `norm`, `lm_head`), so that any tool which routes by name knows them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from distmuon.training.config import ModelConfig

VOCABULARY = 256
EMBEDDING_STD = 0.02


class Transformer(nn.Module):
    """Predicts the next byte from the bytes before it."""

    def __init__(self, config: ModelConfig, *, context: int) -> None:
        """Build and initialize the model with torch's current random state.

        Args:
            config: sizes.
            context: longest sequence it will see.
        """
        super().__init__()
        self.context = context
        self.rotary: Tensor
        self.embed_tokens = nn.Embedding(VOCABULARY, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim)
        self.lm_head = nn.Linear(config.dim, VOCABULARY, bias=False)
        self._initialize(config)
        if config.head == "tied":
            self.lm_head.weight = self.embed_tokens.weight
        table = rotary_table(config.dim // config.heads, length=context, base=config.rope_base)
        self.register_buffer("rotary", table, persistent=False)

    def _initialize(self, config: ModelConfig) -> None:
        for module in self.layers.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        # A block adds two outputs to the residual stream, whose variance must not grow with depth.
        for block in self.layers:
            assert isinstance(block, Block)
            for output in (block.attention.o_proj, block.mlp.down_proj):
                with torch.no_grad():
                    output.weight.mul_((2 * config.layers) ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=EMBEDDING_STD)
        # A small head starts at a nearly uniform prediction: a loss of log(256).
        nn.init.normal_(self.lm_head.weight, std=EMBEDDING_STD)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Compute the logits of the next byte at every position.

        Args:
            tokens: int64 [batch, length], length at most `context`.

        Returns:
            Logits [batch, length, 256].
        """
        table = self.rotary[: tokens.shape[1]]
        hidden = self.embed_tokens(tokens)
        for block in self.layers:
            hidden = block(hidden, table)
        logits: Tensor = self.lm_head(self.norm(hidden))
        return logits


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream after a norm of its input."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the block from the sizes in `config`."""
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim)
        self.mlp = MLP(config)

    @override
    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Map hidden states [batch, length, dim] to hidden states of the same shape."""
        hidden = hidden + self.attention(self.attention_norm(hidden), table)
        result: Tensor = hidden + self.mlp(self.mlp_norm(hidden))
        return result


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        """Build the four projections, one matrix each."""
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.k_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.v_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.o_proj = nn.Linear(config.dim, config.dim, bias=False)
        self.core = CoreAttention()

    @override
    def forward(self, hidden: Tensor, table: Tensor) -> Tensor:
        """Map hidden states [batch, length, dim] to attention outputs of the same shape."""
        query = rotate(self._split_heads(self.q_proj(hidden)), table)
        key = rotate(self._split_heads(self.k_proj(hidden)), table)
        value = self._split_heads(self.v_proj(hidden))
        mixed = self.core(query, key, value)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return output

    def _split_heads(self, x: Tensor) -> Tensor:
        """[batch, length, dim] -> [batch, heads, length, dim / heads]."""
        batch, length, dim = x.shape
        return x.view(batch, length, self.heads, dim // self.heads).transpose(1, 2)


class CoreAttention(nn.Module):
    """Causal attention itself; a module of its own, so that hooks see queries and keys."""

    @override
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mix values [batch, heads, length, dim / heads]; all three arguments have this shape."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class MLP(nn.Module):
    """Two matrices with a GELU between them."""

    def __init__(self, config: ModelConfig) -> None:
        """Build both projections."""
        super().__init__()
        self.up_proj = nn.Linear(config.dim, config.mlp_ratio * config.dim, bias=False)
        self.down_proj = nn.Linear(config.mlp_ratio * config.dim, config.dim, bias=False)

    @override
    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [batch, length, dim] to hidden states of the same shape."""
        output: Tensor = self.down_proj(F.gelu(self.up_proj(hidden)))
        return output


def rotary_table(head_dim: int, *, length: int, base: float) -> Tensor:
    """Compute cosine and sine of every rotation angle.

    Args:
        head_dim: even width of a head.
        length: number of positions.
        base: of the frequencies.

    Returns:
        float32 [length, 2, head_dim / 2], cosines then sines.

    Source: RoFormer, arXiv 2104.09864.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    frequencies = torch.exp(-math.log(base) * exponents)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by the angle of its position.

    Args:
        x: [batch, heads, length, head_dim].
        table: [length, 2, head_dim / 2], from `rotary_table`.

    Returns:
        Tensor like `x`. Scalar products of two results depend on the distance of positions only.
    """
    cosine, sine = table.to(x.dtype).unbind(1)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
