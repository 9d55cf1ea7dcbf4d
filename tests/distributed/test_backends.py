"""Which backend may send from which device."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from distmuon.agreement import check_backend
from distmuon.collectives import Communicator
from tests.harness import run_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def ask() -> str:
    communicator = Communicator(dist.group.WORLD)
    check_backend(communicator, [CPU])
    with pytest.raises(ValueError, match="gloo, which lacks the all-to-all") as error:
        check_backend(communicator, [CPU, CUDA])
    return str(error.value)


def test_gloo_is_refused_for_a_gpu_on_every_rank() -> None:
    first, second = run_ranks(2, ask)
    assert first == second
    check_backend(Communicator(None), [CUDA])


def ask_one_for_gpus_alone() -> None:
    # As NCCL's groups are. gloo stands for it, whose messages are not sent here.
    communicator = Communicator(dist.new_group(backend="cuda:gloo"))
    with pytest.raises(ValueError, match="parameters on cpu, from where the process group cannot"):
        check_backend(communicator, [CPU])


def test_a_group_without_a_backend_for_the_device_is_refused() -> None:
    run_ranks(2, ask_one_for_gpus_alone)
