"""QK-Clip: attention logits that exceed a threshold are brought back by scaling Wq and Wk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from distmuon.errors import see
from distmuon.qk_clip.layers import AttentionLayer, check_apart

Grouped = Literal["query", "balanced"]
Unobserved = Literal["raise", "keep"]

_NEVER = -math.inf


@dataclass(frozen=True, slots=True)
class _Clipped:
    """What the last step found in one layer."""

    max_logit: float
    heads: int


class QKClip:
    """Keeps attention logits at a threshold (MuonClip). Give it to `Muon(..., qk_clip=...)`.

    After forward, every layer's largest logit per head is `observe`d, by hand or by one of the
    recorders. `Muon.step` takes the largest over the micro-batches and ranks, updates the weights,
    and then scales the query and key rows of each head with `S > threshold` so that their product
    changes by `threshold / S`: before the parameters go to the other ranks, on the fp32 values.
    Other heads keep their logits, values stay as they are, and so do momentum and moments.

    With as many key heads as query heads the factor is split: `(threshold/S)**alpha` on the
    queries, the rest on the keys. Where several query heads share keys, `grouped` says how.

    Attributes:
        layers: The attention layers.
        threshold: Largest logit that is left alone.
        alpha: The queries' share of the factor's logarithm.
        grouped: What happens where query heads share keys.
        unobserved: What a step without a layer's maxima does.

    Source: Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        *,
        threshold: float = 100.0,
        alpha: float = 0.5,
        grouped: Grouped = "query",
        unobserved: Unobserved = "raise",
    ) -> None:
        """Check the description.

        Args:
            layers: From `attention_layers(model)` or written by hand.
            threshold: Largest logit that is left alone, after the softmax scale; infinity only
                measures.
            alpha: The queries' share of the factor's logarithm, from 0 to 1.
            grouped: Grouped-query attention: "query" puts the whole factor on the head's queries;
                "balanced" scales shared keys for the worst head of the group, and the queries of
                the others back up. Both leave the other heads' logits as they are.
            unobserved: What a step does if a layer was observed by no rank: "raise", or "keep" its
                weights, for those who measure in some steps only.

        Raises:
            ValueError: for no layers, layers that overlap, or a value out of range.
        """
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError(
                "QKClip was given no attention layers: nothing would ever be clipped."
                + see("qk-clip-layers")
            )
        check_apart(self.layers)
        if not threshold > 0:
            raise ValueError(f"Invalid {threshold=}. Must be > 0." + see("bad-option"))
        if not 0 <= alpha <= 1:
            raise ValueError(f"Invalid {alpha=}. Must be between 0 and 1." + see("bad-option"))
        if grouped not in get_args(Grouped):
            raise ValueError(
                f"Invalid {grouped=}. Must be one of {get_args(Grouped)}." + see("bad-option")
            )
        if unobserved not in get_args(Unobserved):
            raise ValueError(
                f"Invalid {unobserved=}. Must be one of {get_args(Unobserved)}." + see("bad-option")
            )
        self.threshold = float(threshold)
        self.alpha = float(alpha)
        self.grouped: Grouped = grouped
        self.unobserved: Unobserved = unobserved
        self._heads = {layer.name: layer.heads for layer in self.layers}
        self._seen: dict[str, Tensor] = {}
        self._last: dict[str, _Clipped] = {}
        self._total = 0

    def observe(self, layer: str, max_logits: Tensor | Sequence[float]) -> None:
        """Take in the largest logits of one forward pass; the largest of several passes count.

        Args:
            layer: The layer's name.
            max_logits: [heads], the largest `scale * q.k` of each query head over the batch and all
                unmasked pairs of positions. Stays on its device; nothing waits for it.

        Raises:
            KeyError: for an unknown layer.
            ValueError: for another number of heads.
        """
        if layer not in self._heads:
            raise KeyError(
                f"No attention layer {layer!r}. There are {list(self._heads)}."
                + see("qk-clip-logits")
            )
        found = torch.as_tensor(max_logits).detach().to(torch.float32)
        if found.shape != (self._heads[layer],):
            raise ValueError(
                f"{layer} was observed with maxima of shape {list(found.shape)}. Must be "
                f"[{self._heads[layer]}], one for each query head." + see("qk-clip-logits")
            )
        before = self._seen.get(layer)
        # maximum keeps a NaN, which must not be lost to the next micro-batch.
        self._seen[layer] = found.clone() if before is None else torch.maximum(before, found)

    def discard(self) -> None:
        """Forget what was observed since the last step."""
        self._seen.clear()

    def take(self) -> list[float]:
        """What this rank has observed since the last step; forgets it.

        Returns:
            One number per head of all layers in order; -inf where nothing was observed and inf for
            a logit that is not finite.
        """
        device = next(iter(self._seen.values())).device if self._seen else torch.device("cpu")
        rows = [
            self._seen[layer.name].to(device)
            if layer.name in self._seen
            else torch.full((layer.heads,), _NEVER, device=device)
            for layer in self.layers
        ]
        self.discard()
        # One copy to the host for all layers.
        values: list[float] = torch.cat(rows).tolist()
        return [math.inf if math.isnan(value) else value for value in values]

    def find_nonfinite(self, maxima: Sequence[float]) -> str | None:
        """Name the first layer with a logit that is not finite.

        Args:
            maxima: As from `take`, the largest over all ranks.

        Returns:
            A message, or None.
        """
        for layer, own in zip(self.layers, self._by_layer(maxima), strict=True):
            if math.inf in own:
                return (
                    f"The attention logits of {layer.name}, head {own.index(math.inf)}, have a NaN "
                    "or an infinity. Parameters and optimizer state are unchanged on every rank."
                )
        return None

    def settle(self, maxima: Sequence[float]) -> list[list[float]]:
        """Decide each block's factor.

        Args:
            maxima: As from `take`, the largest over all ranks; no infinity.

        Returns:
            For each layer the factors of its blocks' heads, as in `AttentionLayer.blocks`.

        Raises:
            RuntimeError: if a layer was not observed on any rank, unless that is allowed.
        """
        rows = list(zip(self.layers, self._by_layer(maxima), strict=True))
        missing = [layer.name for layer, own in rows if _NEVER in own]
        if missing and self.unobserved == "raise":
            raise RuntimeError(
                f"QK-Clip has seen no attention logits of {missing[0]} in this step "
                f"({len(missing)} of {len(rows)} layers are so), so it cannot clip them. Call "
                "observe() after every forward pass, or use a recorder (docs/qk-clip.md); "
                'QKClip(unobserved="keep") leaves such layers alone.' + see("qk-clip-logits")
            )
        self._last = {
            layer.name: _Clipped(max(own), sum(value > self.threshold for value in own))
            for layer, own in rows
            if layer.name not in missing
        }
        self._total += sum(clipped.heads for clipped in self._last.values())
        return [self._factors(layer, own) for layer, own in rows]

    def _factors(self, layer: AttentionLayer, maxima: Sequence[float]) -> list[float]:
        whole = [self.threshold / s if s > self.threshold else 1.0 for s in maxima]
        repeat = layer.heads // layer.kv_heads
        worst = [min(whole[start : start + repeat]) for start in range(0, layer.heads, repeat)]
        on_query = repeat > 1 and self.grouped == "query"
        key = [1.0 if on_query else factor ** (1.0 - self.alpha) for factor in worst]
        query = [factor / key[head // repeat] for head, factor in enumerate(whole)]
        blocks = [query] * len(layer.query) + [key] * len(layer.key)
        blocks += [whole] * len(layer.query_shared)
        return [factor for block in blocks for factor in block]

    def _by_layer(self, values: Sequence[float]) -> list[Sequence[float]]:
        ends = list(accumulate(self._heads.values(), initial=0))
        return [values[start:stop] for start, stop in pairwise(ends)]

    def stats(self) -> dict[str, float]:
        """What the last step found, over all ranks; never a collective.

        Returns:
            "max_logit", the largest logit of any layer; "clipped_heads", how many heads were
            scaled; "clipped_heads_total", since this object was made; and for each layer
            "NAME/max_logit" and "NAME/clipped_heads". Empty before the first step; layers that
            were not observed are left out.
        """
        if not self._last:
            return {}
        result = {
            "max_logit": max(each.max_logit for each in self._last.values()),
            "clipped_heads": float(sum(each.heads for each in self._last.values())),
            "clipped_heads_total": float(self._total),
        }
        for name, each in self._last.items():
            result[f"{name}/max_logit"] = each.max_logit
            result[f"{name}/clipped_heads"] = float(each.heads)
        return result

    def describe(self) -> list[str]:
        """What every rank must have alike."""
        rules = f"threshold={self.threshold}, alpha={self.alpha}, grouped={self.grouped}"
        head = f"QK-Clip with {rules}, unobserved={self.unobserved}"
        return [head, *(f"QK-Clip of {layer}" for layer in self.layers)]
