"""QK-Clip at work: the largest logits of all ranks, and factors on this rank's range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from distmuon.collectives import Communicator
from distmuon.errors import see
from distmuon.failure import Topic
from distmuon.layout import Layout
from distmuon.qk_clip.clip import QKClip
from distmuon.qk_clip.scaling import check_layers, locate, scale_
from distmuon.shard import Range

Factors = Sequence[Sequence[float]]


class Settled(NamedTuple):
    """What the ranks have found out together.

    Attributes:
        factors: Of each layer's heads.
        nonfinite: Why the step is to be skipped; None if it is not.
    """

    factors: Factors
    nonfinite: str | None


class Clipper:
    """Applies a `QKClip` to the ranges that a rank holds; without one it does nothing."""

    def __init__(
        self, clip: QKClip | None, layouts: Sequence[Layout], communicator: Communicator
    ) -> None:
        """Find the heads' rows in this rank's ranges.

        Args:
            clip: What to clip; None for nothing.
            layouts: Of each flat buffer.
            communicator: The group.

        Raises:
            ValueError: if a layer's parameters are not in the buffers as described.
        """
        self._clip = clip
        self._communicator = communicator
        layers = clip.layers if clip else ()
        check_layers(layers, {s.name: s.shape for layout in layouts for s in layout.specs})
        self._pieces = [locate(layers, layout, communicator.rank) for layout in layouts]

    def settle(self, nonfinite: str | None, like: Tensor) -> Settled:
        """Compare what the ranks observed, after it is known whether to step. A collective.

        Args:
            nonfinite: Why the step is skipped anyway; equal on all ranks.
            like: A tensor on the device that the backend expects.

        Returns:
            The factors, equal on all ranks.

        Raises:
            RuntimeError: on every rank, if a layer was observed on none.
        """
        if self._clip is None:
            return Settled((), nonfinite)
        observed = self._clip.take()
        if nonfinite is not None:
            return Settled((), nonfinite)
        with self._communicator.during(Topic("qk-clip")):
            maxima = self._communicator.extreme(observed, like.device, kind="max")
        message = self._clip.find_nonfinite(maxima)
        return Settled((), message) if message else Settled(self._clip.settle(maxima), None)

    def scale_(self, bucket: int, shard: Range, factors: Factors) -> None:
        """Multiply the rows of clipped heads in one range.

        Args:
            bucket: Which of the layouts.
            shard: The range, updated and not yet published.
            factors: From `settle`.
        """
        scale_(shard.master, self._pieces[bucket], factors)

    def discard(self) -> None:
        """Forget what was observed: the step is skipped."""
        if self._clip is not None:
            self._clip.discard()


def check_clip(clip: QKClip | None, names: Mapping[Tensor, str]) -> QKClip | None:
    """Refuse a clip that does not fit the optimizer's parameters.

    Args:
        clip: What to clip; None for nothing.
        names: FQN of each parameter.

    Returns:
        The clip.

    Raises:
        TypeError: if it is something else.
        ValueError: as `check_layers`.
    """
    if not isinstance(clip, QKClip | None):
        raise TypeError(
            f"Invalid qk_clip of type {type(clip).__name__}. Must be a distmuon.QKClip or None."
            + see("bad-option")
        )
    layers = clip.layers if clip else ()
    check_layers(layers, {name: parameter.shape for parameter, name in names.items()})
    return clip
