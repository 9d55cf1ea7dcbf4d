"""What every check works with, and how it says that something is not as it should be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

REPORT = "Do not train on this set-up yet: report this line with the output of `distmuon doctor`."

# On a GPU the same products may take another kernel, whose sums are rounded in another order.
_CUDA_RTOL = 1e-4


class Mismatch(Exception):
    """A check has failed.

    Attributes:
        expected: What should have been seen.
        seen: What was seen instead.
        remedy: What the user can do.
    """

    def __init__(self, *, expected: str, seen: str, remedy: str = REPORT) -> None:
        """Keep all three apart, for the table and for --json."""
        super().__init__(f"expected {expected}; saw {seen}")
        self.expected = expected
        self.seen = seen
        self.remedy = remedy


class NotHere(Exception):
    """A check does not apply, or something that it needs is missing; its text says what."""


@dataclass(frozen=True, slots=True)
class Lab:
    """One rank's place during one check.

    Attributes:
        group: The ranks under test, in a group made for this check: an error that closes its
            connections does not reach the next check.
        smaller: All of them but the last, for another world size; None on the last and if there
            is only one.
        rank: This rank.
        world_size: Number of ranks.
        device: Where the parameters live.
        folder: Where all ranks can write; None if they have no file system in common.
        sabotage: Whether this check's subject is to be broken on purpose, to see it noticed.
    """

    group: dist.ProcessGroup
    smaller: dist.ProcessGroup | None
    rank: int
    world_size: int
    device: torch.device
    folder: Path | None
    sabotage: bool

    @property
    def last(self) -> int:
        """The rank that things are done to."""
        return self.world_size - 1

    @property
    def is_last(self) -> bool:
        """Whether this is the rank that things are done to."""
        return self.rank == self.last

    def require_several(self, why: str) -> None:
        """Leave a check out on a single rank.

        Args:
            why: What there is nothing of then.

        Raises:
            NotHere: on a single rank.
        """
        if self.world_size == 1:
            raise NotHere(f"{why}: needs 2 ranks or more (--ranks 2)")

    def require_folder(self) -> Path:
        """The folder that all ranks see.

        Raises:
            NotHere: if there is none.
        """
        if self.folder is None:
            raise NotHere(
                "the ranks are on several machines: give --folder on a file system that all share"
            )
        return self.folder


def require_same(
    lab: Lab, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str
) -> None:
    """Compare tensors by name: bitwise on CPUs, within 1e-4 of the largest value on GPUs.

    Args:
        lab: Says which of the two.
        found: What this rank has.
        expected: What it should have; the same names.
        what: Where the expected values come from, such as "one process".

    Raises:
        Mismatch: naming the tensor with the largest difference.
    """
    rtol = _CUDA_RTOL if lab.device.type == "cuda" else 0.0
    wrong = {}
    for name, value in expected.items():
        if torch.equal(found[name], value):
            continue
        worst = float((found[name].double() - value.double()).abs().max())
        # A NaN is never within bounds.
        if not worst <= rtol * float(value.abs().max()):
            wrong[name] = worst
    if wrong:
        name = max(wrong, key=lambda name: (wrong[name] != wrong[name], wrong[name]))
        within = f"within {rtol:g} of" if rtol else "bitwise equal to"
        raise Mismatch(
            expected=f"parameters {within} {what}",
            seen=f"{name} differs by up to {wrong[name]:.3g} "
            f"({len(wrong)} of {len(expected)} parameters differ)",
        )
