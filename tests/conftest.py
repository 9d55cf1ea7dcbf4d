"""What holds for every test."""

from __future__ import annotations

import hypothesis
import pytest
import torch

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
