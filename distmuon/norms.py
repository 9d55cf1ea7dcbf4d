"""Norms of the averaged gradients, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from distmuon.buckets import Bucket
from distmuon.collectives import Communicator
from distmuon.gradients import GradientSource


class GradientNorms(NamedTuple):
    """Norms of the averaged gradients before clipping, over all parameters of a rule.

    Attributes:
        total: Of all parameters.
        muon: Of those that Muon updates.
        adamw: Of those that AdamW updates, or the class in its place.
    """

    total: float
    muon: float
    adamw: float


def gradient_norms(
    source: GradientSource, buckets: Sequence[Bucket], communicator: Communicator
) -> GradientNorms:
    """Euclidean norms over all ranks' ranges, summed in fp64. A collective.

    Args:
        source: Where the gradients are.
        buckets: What they belong to.
        communicator: The group.

    Returns:
        The norms, equal on every rank.
    """
    source.present()  # sends what is still to be sent
    muon = adamw = 0.0
    for bucket, grad in zip(buckets, source.read(), strict=True):
        norm = torch.linalg.vector_norm(grad, dtype=torch.float64)
        if bucket.spec.ownership is not None:
            muon += float(norm) ** 2
        else:
            adamw += float(norm) ** 2
    device = buckets[0].shard.master.device
    muon, adamw = communicator.add_up_reals([muon, adamw], device)
    return GradientNorms(math.sqrt(muon + adamw), math.sqrt(muon), math.sqrt(adamw))
