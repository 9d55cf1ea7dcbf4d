"""Attention logits of transformers' models, observed for QK-Clip.

clip = QKClip(attention_layers(model))
record_attention(model, clip)
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from distmuon.errors import see
from distmuon.parameters import walk_modules
from distmuon.qk_clip import Measure, QKClip
from distmuon.qk_clip.recording import observe_pass

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        "distmuon.adapters.transformers_attention needs transformers 4.56 or later: "
        "pip install 'distmuon[hf]'." + see("missing-package")
    ) from error

_observe = torch.compiler.disable(observe_pass)  # type: ignore[no-untyped-call]
# transformers looks an implementation up by this name, which its model's configuration holds.
_NAME = "distmuon_sdpa"


class _Watch(NamedTuple):
    """What observes an attention module."""

    clip: QKClip
    layer: str
    measure: Measure


# The function that transformers calls gets the module and nothing of ours.
_WATCHED: WeakKeyDictionary[nn.Module, _Watch] = WeakKeyDictionary()


def record_attention(model: Any, clip: QKClip, *, measure: Measure = "exact") -> None:
    """Observe the queries and keys of a transformers model, in passes with gradients.

    The model then uses the attention implementation "distmuon_sdpa", registered as transformers
    provides for: it observes, and computes what "sdpa" does.

    Args:
        model: A `PreTrainedModel`, not wrapped, that uses "sdpa", its usual default.
        clip: Described from this model, by `attention_layers(model)`.
        measure: "exact" computes all logits again, in blocks; "bound" takes their bound.

    Raises:
        ValueError: if the model uses another implementation, or a layer is not in it.
    """
    modules = {path: module for path, module, _ in walk_modules(model)}
    missing = [layer.name for layer in clip.layers if layer.name not in modules]
    if missing:
        raise ValueError(
            f"The model has no module {missing[0]!r}: describe this very model."
            + see("qk-clip-layers")
        )
    used = model.config._attn_implementation
    if used not in ("sdpa", _NAME):
        raise ValueError(
            f'The model uses the attention implementation {used!r}. Must be "sdpa": load it with '
            'attn_implementation="sdpa", or observe the logits yourself (docs/qk-clip.md).'
            + see("qk-clip-logits")
        )
    AttentionInterface.register(_NAME, _observed_sdpa)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    for layer in clip.layers:
        _WATCHED[modules[layer.name]] = _Watch(clip, layer.name, measure)


def _observed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,  # noqa: FBT001 - transformers passes it by name
    **kwargs: Any,
) -> Any:
    watch = _WATCHED.get(module)
    if watch is not None:
        # As sdpa_attention_forward decides: without a mask the module's own word counts.
        length = query.shape[2]
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        _observe(
            watch.clip,
            watch.layer,
            query,
            key,
            scale=scaling,
            masking="causal" if attention_mask is None and causal and length > 1 else "none",
            mask=attention_mask,
            measure=watch.measure,
        )
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
