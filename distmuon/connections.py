"""Connections between ranks after a message has failed: which are closed, and closing one's own.

gloo only: other backends have no connections that a rank could ask or close.
"""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist

_PROBE_TAG = 1_000_003  # nobody else's


def find_closed(group: dist.ProcessGroup | None) -> list[int]:
    """Ranks whose connections to this one are known to be closed.

    Args:
        group: The group of both; None has no connections.

    Returns:
        Ranks within the group.
    """
    closed = []
    for rank in _peers(group):
        try:
            # Announced, never received; on a closed connection it fails at once.
            dist.isend(torch.zeros(1), group=group, group_dst=rank, tag=_PROBE_TAG)
        except RuntimeError:
            closed.append(rank)
    return closed


def close(group: dist.ProcessGroup | None, ranks: Container[int]) -> None:
    """Close this rank's connections, so that who waits for it notices.

    Args:
        group: The group of both; None has no connections.
        ranks: Ranks within the group at the other ends; this rank itself is left out.
    """
    for rank in _peers(group):
        if rank not in ranks:
            continue
        # The timeout of one message closes the connections to all ranks, in gloo's words so that
        # "the exception surfaces everywhere". Its abort() does nothing (torch 2.13).
        with suppress(RuntimeError):
            nothing = torch.zeros(1)
            work = dist.irecv(nothing, group=group, group_src=rank, tag=_PROBE_TAG + 1)
            if work is not None:
                work.wait(timedelta(milliseconds=1))


def _peers(group: dist.ProcessGroup | None) -> list[int]:
    if group is None or dist.get_backend(group) != "gloo":
        return []
    return [rank for rank in range(group.size()) if rank != group.rank()]
