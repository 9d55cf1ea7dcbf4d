"""What the aims leave for the symmetric kernel: the page has what the command prints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import gpu_budget
from benchmarks.gpu import GOALS

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"


@pytest.mark.parametrize("table", [gpu_budget.table, gpu_budget.step_table])
def test_the_page_has_what_the_command_prints(table: Callable[..., list[str]]) -> None:
    assert "\n".join(table(tflops=788.0, terabytes=4.3)) in PAGE.read_text()


def test_one_product_by_hand() -> None:
    # 528 tiles of 128 x 128 in four rounds of 132 processors: nothing is lost at the end.
    found = gpu_budget.budget((1, 4096, 4096), 0.7, rate=788e12, bandwidth=4.3e12)
    assert found.kernel_flops == 5 * 2 * (2 * 528 * 128**2 * 4096)
    assert found.cublas == pytest.approx(5 * 2 * 4096**3 / 788e12)
    assert found.passes == pytest.approx((16 + 5 * 4) * 4096**2 / 4.3e12)
    assert found.aim == pytest.approx(5 * 4 * 4096**3 / 788e12 / 0.7)


def test_more_of_the_bound_needs_a_faster_kernel() -> None:
    for shape, goal in GOALS.items():
        rates = [
            gpu_budget.budget(shape, share, rate=788e12, bandwidth=4.3e12).needed
            for share in (goal.share - 0.05, goal.share)
        ]
        assert rates[0] < rates[1] < 788e12, "or it could not be reached"
