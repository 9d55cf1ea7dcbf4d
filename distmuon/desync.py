"""Find ranks whose parameters have drifted apart, and name them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from distmuon.buckets import Bucket
from distmuon.collectives import Communicator
from distmuon.errors import see

# Odd weights: an odd number times any change is not 0 modulo 2**64, so that no single changed word
# goes unseen. Their period is prime, so that rows of a power-of-two length weigh differently.
_PERIOD = 8191


def check_desync(communicator: Communicator, buckets: Sequence[Bucket], step: int) -> None:
    """Compare a checksum of every parameter over the ranks. A collective.

    Args:
        communicator: The group.
        buckets: Whose parameters are compared; each rank holds all of them whole.
        step: Number of the step, for the message.

    Raises:
        RuntimeError: on every rank, naming the first parameter that differs and the ranks that
            are not with the majority.
    """
    names = [name for bucket in buckets for name in bucket.spec.names]
    sums = [checksum(p) for bucket in buckets for p in bucket.spec.parameters]
    device = sums[0].device
    mine = torch.stack([each.to(device) for each in sums]).tolist()
    least = communicator.extreme(mine, device, kind="min")
    most = communicator.extreme(mine, device, kind="max")
    differing = [i for i, (a, b) in enumerate(zip(least, most, strict=True)) if a != b]
    if not differing:
        return
    seen = communicator.collect(mine[differing[0]])
    majority, _ = Counter(seen).most_common(1)[0]
    ranks = [rank for rank, value in enumerate(seen) if value != majority]
    raise RuntimeError(
        f"Desync after step {step}: {names[differing[0]]} is not the same on all ranks; ranks "
        f"{ranks} differ from the majority ({len(differing)} parameters differ in all). Something "
        "wrote to the parameters of some ranks only, or a transfer was corrupted. Restart these "
        "ranks from a checkpoint." + see("desync")
    )


def checksum(tensor: Tensor) -> Tensor:
    """A position-weighted sum of a tensor's bits.

    Args:
        tensor: Any shape and dtype of 1, 2, 4 or 8 bytes.

    Returns:
        An int64 scalar; any change of a single element changes it.
    """
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().reshape(-1).view(words).to(torch.int64)
    weights = torch.arange(bits.numel(), device=bits.device).remainder_(_PERIOD).mul_(2).add_(1)
    return (bits * weights).sum()  # never in place: for 8-byte dtypes `bits` is the tensor itself
