"""The largest attention logit of each layer, while somebody wants to know."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distmuon.training.model import CoreAttention


@contextmanager
def record_max_logits(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Watch a model's attention: the largest of all passes inside the context.

    Computed beside the forward pass from the queries and keys that it uses; outside of the context
    there is no hook and no cost.

    Args:
        model: with `CoreAttention` modules.

    Yields:
        By the name of each attention module a scalar, filled in by the passes.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():
            if isinstance(module, CoreAttention):
                layer = path.removesuffix(".core")
                handle = module.register_forward_pre_hook(partial(_look, layer, found))
                hooks.callback(handle.remove)
        yield found


@torch.no_grad()
def _look(
    layer: str, found: dict[str, Tensor], module: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    largest = max_causal_logit(inputs[0], inputs[1])
    found[layer] = torch.maximum(found[layer], largest) if layer in found else largest


def max_causal_logit(query: Tensor, key: Tensor) -> Tensor:
    """Largest entry of query @ keyᵀ / sqrt(head_dim) on and below the diagonal.

    Args:
        query: [batch, heads, length, head_dim], with positions.
        key: Same shape.

    Returns:
        A float32 scalar.
    """
    length, head_dim = query.shape[-2:]
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu_(1)
    # One sequence at a time: all logits of a batch at once may be larger than the model.
    rows = [
        (q.float() @ k.float().mT).masked_fill_(later, -math.inf).amax()
        for q, k in zip(query, key, strict=True)
    ]
    return torch.stack(rows).amax() / math.sqrt(head_dim)
