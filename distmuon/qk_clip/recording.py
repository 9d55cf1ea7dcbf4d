"""Observe the queries and keys that pass through a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distmuon.errors import see
from distmuon.qk_clip.clip import QKClip
from distmuon.qk_clip.max_logits import Masking, Measure, max_logit_bound, max_logits


def record(
    clip: QKClip,
    modules: Mapping[str, nn.Module],
    *,
    scale: float | None = None,
    masking: Masking = "none",
    measure: Measure = "exact",
) -> list[RemovableHandle]:
    """Observe modules that are called with (query, key, ...), such as a model's core attention.

    Passes without gradients are not observed, so validation does not count.

    Args:
        clip: What observes.
        modules: By layer name; each is called with query [batch, heads, length, head_dim] and key
            [batch, kv_heads, length, head_dim] first, positions applied.
        scale: As in `max_logits`.
        masking: As in `max_logits`.
        measure: "exact" computes all logits again; "bound" takes `max_logit_bound`.

    Returns:
        Handles; `remove()` ends it.

    Raises:
        KeyError: for a name that is no layer of `clip`.
    """
    unknown = sorted(set(modules) - {layer.name for layer in clip.layers})
    if unknown:
        raise KeyError(f"No attention layer {unknown[0]!r} in this QKClip." + see("qk-clip-logits"))

    observe = torch.compiler.disable(observe_pass)  # type: ignore[no-untyped-call]

    def look(name: str, query: Tensor, key: Tensor) -> None:
        observe(clip, name, query, key, scale=scale, masking=masking, mask=None, measure=measure)

    def hook_for(name: str) -> Any:
        return lambda module, inputs: look(name, inputs[0], inputs[1])

    return [module.register_forward_pre_hook(hook_for(name)) for name, module in modules.items()]


def observe_pass(
    clip: QKClip,
    layer: str,
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None,
    masking: Masking,
    mask: Tensor | None,
    measure: Measure,
) -> None:
    """Observe one layer's queries and keys, unless gradients are off.

    Its data leave a compiled graph: who calls it from a model's forward wraps it in
    `torch.compiler.disable` there. Not here, as that imports the compiler, which takes as long as
    torch itself.

    Args:
        clip: What observes.
        layer: Name of the layer.
        query: As in `max_logits`.
        key: As in `max_logits`.
        scale: As in `max_logits`.
        masking: As in `max_logits`.
        mask: As in `max_logits`.
        measure: "exact" or "bound".
    """
    if not torch.is_grad_enabled():
        return
    if measure == "bound":
        found = max_logit_bound(query, key, scale=scale)
    else:
        found = max_logits(query, key, scale=scale, masking=masking, mask=mask)
    clip.observe(layer, found)
