"""Which layout is fastest, by prediction: build each, price it, keep the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from typing_extensions import override

from distmuon.cost import CostModel
from distmuon.layout import LayoutChoice, LayoutKind, TensorSpec
from distmuon.ownership import Ownership, assign
from distmuon.split_plan import moved_pieces
from distmuon.splits import Sharing, packed_numel

# What "auto" compares; of equally fast ones the first is taken.
CANDIDATES: tuple[LayoutKind, ...] = ("flat", "aligned")
_WHOLE = Sharing()


@dataclass(frozen=True, slots=True)
class Prediction:
    """Where the time of one step of one flat buffer goes, in seconds.

    Attributes:
        compute: Newton-Schulz on the slowest rank.
        exchange: Messages of the busiest rank, to the owners and back.
        publish: The all-gather of the parameters, padding included.
        waves: Rounds of the exchange.
        shared: Messages about split matrices, of the busiest rank; nothing hides them.
    """

    compute: float
    exchange: float
    publish: float
    waves: int
    shared: float = 0.0

    @property
    def seconds(self) -> float:
        """The whole step.

        The waves overlap with Newton-Schulz: the longer of the two is paid, and of the shorter one
        the share of one wave, which has nothing to hide behind.
        """
        longer, shorter = max(self.compute, self.exchange), min(self.compute, self.exchange)
        return longer + shorter / max(self.waves, 1) + self.publish + self.shared

    @override
    def __str__(self) -> str:
        parts = (
            f"{name} {_milliseconds(getattr(self, name))}"
            for name in ("compute", "exchange", "publish", "shared")
            if name != "shared" or self.shared
        )
        return f"{_milliseconds(self.seconds)} ({', '.join(parts)})"


def predict(
    ownership: Ownership,
    model: CostModel,
    *,
    wave_numel: int,
    itemsize: int,
    wire_itemsize: int = 4,
    sharing: Sharing = _WHOLE,
) -> Prediction:
    """Time of one step, from the plan and three rates.

    Args:
        ownership: Places and owners.
        model: What work and messages cost.
        wave_numel: Most elements that one owner fetches in a wave.
        itemsize: Bytes of a parameter's element.
        wire_itemsize: Bytes of an element of momentum or update on its way.
        sharing: Says in what dtype Gram matrices travel.

    Returns:
        The prediction: the same on every rank, because it is the same arithmetic in the same order.
    """
    layout = ownership.layout
    world_size = layout.world_size
    rounds = ownership.waves(wave_numel)
    waves = 1 + max((wave for wave in rounds if wave is not None), default=-1)
    busiest = max(max(direction) for direction in ownership.traffic())
    one_way = model.collective(busiest, wire_itemsize, world_size) if waves else 0.0
    more_waves = (waves - 1) * model.collective(0, wire_itemsize, world_size) if waves else 0.0
    others = (world_size - 1) * layout.shard_numel
    return Prediction(
        compute=max(ownership.loads(model)) / model.flops,
        exchange=2 * (one_way + more_waves),
        publish=model.collective(others, itemsize, world_size),
        waves=waves,
        shared=_shared(ownership, model, sharing),
    )


def choose(
    specs: Sequence[TensorSpec],
    world_size: int,
    *,
    layout: LayoutChoice,
    model: CostModel,
    wave_numel: int,
    itemsize: int,
    wire_itemsize: int = 4,
    sharing: Sharing = _WHOLE,
) -> Ownership:
    """Lay the parameters out as asked, or with "auto" as is predicted to be fastest.

    Args:
        specs: Muon parameters in the caller's order.
        world_size: Number of ranks.
        layout: A layout, or "auto".
        model: What work and messages cost.
        wave_numel: Most elements that one owner fetches in a wave.
        itemsize: Bytes of a parameter's element.
        wire_itemsize: Bytes of an element of momentum or update on its way.
        sharing: How far costly matrices may be split; with "auto", where that is predicted to be
            faster.

    Returns:
        The owners; `reason` has the figures of every layout that was compared.
    """
    kinds = CANDIDATES if layout == "auto" else (layout,)
    built = {kind: assign(specs, world_size, layout=kind, model=model) for kind in kinds}
    named: dict[str, Ownership] = {f'layout="{kind}"': each for kind, each in built.items()}
    shared = built["flat"].with_splits(model, sharing) if "flat" in built else None
    if shared is not None and shared.splits:
        if layout != "auto":
            named.clear()
        named[f'layout="flat" with {len(shared.splits)} split matrices'] = shared
    predicted = {
        name: predict(
            each,
            model,
            wave_numel=wave_numel,
            itemsize=itemsize,
            wire_itemsize=wire_itemsize,
            sharing=sharing,
        )
        for name, each in named.items()
    }
    best = min(predicted, key=lambda name: predicted[name].seconds)
    verb = "is predicted to be the fastest" if layout == "auto" else "was asked for"
    figures = ", ".join(f"{name} {each}" for name, each in predicted.items())
    return replace(named[best], reason=f"{best} {verb}: {figures}")


def _shared(ownership: Ownership, model: CostModel, sharing: Sharing) -> float:
    """Seconds of the messages about split matrices: pieces both ways, Gram matrices, transforms."""
    if not ownership.splits:
        return 0.0
    layout = ownership.layout
    pieces = [[0] * layout.world_size for _ in range(2)]
    grams = [[0] * layout.world_size for _ in range(2)]
    for split in ownership.splits:
        packed = packed_numel(min(layout.specs[split.matrix].shape))
        for holder, user, numel in moved_pieces(layout, split):
            pieces[0][holder] += numel
            pieces[1][user] += numel
        for rank in split.ranks:
            if rank != split.owner:
                grams[0][rank] += packed
                grams[1][split.owner] += packed
    gram = max(max(direction) for direction in grams)
    return (
        2 * model.collective(max(max(each) for each in pieces), 4, layout.world_size)
        + model.collective(gram, sharing.itemsize, layout.world_size)
        + model.collective(2 * gram, sharing.itemsize, layout.world_size)
    )


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"
