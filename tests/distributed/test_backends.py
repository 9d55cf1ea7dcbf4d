"""Which backend may send from which device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from distmuon.agreement import check_backend
from distmuon.collectives import Communicator
from tests.harness import run_ranks


def ask() -> str:
    communicator = Communicator(dist.group.WORLD)
    check_backend(communicator, torch.device("cpu"))
    with pytest.raises(ValueError, match="gloo, which lacks the all-to-all") as error:
        check_backend(communicator, torch.device("cuda"))
    return str(error.value)


def test_gloo_is_refused_for_a_gpu_on_every_rank() -> None:
    first, second = run_ranks(2, ask)
    assert first == second
    check_backend(Communicator(None), torch.device("cuda"))
