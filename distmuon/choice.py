"""Which layout is fastest, by prediction: build each, price it, keep the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from distmuon.cost import CostModel
from distmuon.layout import LayoutChoice, LayoutKind, TensorSpec
from distmuon.ownership import Ownership, assign

# What "auto" compares; of equally fast ones the first is taken.
CANDIDATES: tuple[LayoutKind, ...] = ("flat", "aligned")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Where the time of one step of one flat buffer goes, in seconds.

    Attributes:
        compute: Newton-Schulz on the slowest rank.
        exchange: Messages of the busiest rank, to the owners and back.
        publish: The all-gather of the parameters, padding included.
        waves: Rounds of the exchange.
    """

    compute: float
    exchange: float
    publish: float
    waves: int

    @property
    def seconds(self) -> float:
        """The whole step.

        The waves overlap with Newton-Schulz: the longer of the two is paid, and of the shorter one
        the share of one wave, which has nothing to hide behind.
        """
        longer, shorter = max(self.compute, self.exchange), min(self.compute, self.exchange)
        return longer + shorter / max(self.waves, 1) + self.publish

    @override
    def __str__(self) -> str:
        parts = (
            f"{name} {_milliseconds(getattr(self, name))}"
            for name in ("compute", "exchange", "publish")
        )
        return f"{_milliseconds(self.seconds)} ({', '.join(parts)})"


def predict(
    ownership: Ownership, model: CostModel, *, wave_numel: int, itemsize: int
) -> Prediction:
    """Time of one step, from the plan and three rates.

    Args:
        ownership: Places and owners.
        model: What work and messages cost.
        wave_numel: Most elements that one owner fetches in a wave.
        itemsize: Bytes of a parameter's element; momentum travels in fp32.

    Returns:
        The prediction: the same on every rank, because it is the same arithmetic in the same order.
    """
    layout = ownership.layout
    world_size = layout.world_size
    rounds = ownership.waves(wave_numel)
    waves = 1 + max((wave for wave in rounds if wave is not None), default=-1)
    busiest = max(max(direction) for direction in ownership.traffic())
    one_way = model.collective(busiest, 4, world_size) if waves else 0.0
    more_waves = (waves - 1) * model.collective(0, 4, world_size) if waves else 0.0
    others = (world_size - 1) * layout.shard_numel
    return Prediction(
        compute=max(ownership.loads(model)) / model.flops,
        exchange=2 * (one_way + more_waves),
        publish=model.collective(others, itemsize, world_size),
        waves=waves,
    )


def choose(
    specs: Sequence[TensorSpec],
    world_size: int,
    *,
    layout: LayoutChoice,
    model: CostModel,
    wave_numel: int,
    itemsize: int,
) -> Ownership:
    """Lay the parameters out as asked, or with "auto" as is predicted to be fastest.

    Args:
        specs: Muon parameters in the caller's order.
        world_size: Number of ranks.
        layout: A layout, or "auto".
        model: What work and messages cost.
        wave_numel: Most elements that one owner fetches in a wave.
        itemsize: Bytes of a parameter's element.

    Returns:
        The owners; `reason` has the figures of every layout that was compared.
    """
    kinds = CANDIDATES if layout == "auto" else (layout,)
    built = [assign(specs, world_size, layout=kind, model=model) for kind in kinds]
    predicted = [predict(each, model, wave_numel=wave_numel, itemsize=itemsize) for each in built]
    best = min(range(len(kinds)), key=lambda i: predicted[i].seconds)
    verb = "was asked for" if layout == kinds[best] else "is predicted to be the fastest"
    figures = ", ".join(f"{kind} {each}" for kind, each in zip(kinds, predicted, strict=True))
    return replace(built[best], reason=f'layout="{kinds[best]}" {verb}: {figures}')


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"
