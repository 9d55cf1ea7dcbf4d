"""What holds for every test."""

from __future__ import annotations

import signal

import hypothesis
import pytest
import torch

# A script's job in the background ignores Ctrl-C and hands that down to every program it starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Test processes share the cores, and an OpenMP reduction's order depends on the number of threads:
# ranks have one, so what they are compared with has one.
torch.set_num_threads(1)

# On a busy machine the time of one example says nothing. The same examples in every run.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
