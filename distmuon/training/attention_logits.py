"""The largest attention logit of each layer, while somebody wants to know."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from distmuon.qk_clip import max_logits
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
    largest = max_logits(inputs[0], inputs[1], masking="causal").amax()
    found[layer] = torch.maximum(found[layer], largest) if layer in found else largest
