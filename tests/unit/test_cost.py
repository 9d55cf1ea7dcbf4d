"""The cost model: what it refuses, what measured times change, how messages are priced."""

from typing import Any

import pytest

from distmuon.cost import CostModel, default_cost_model, newton_schulz_cost
from distmuon.layout import TensorSpec
from distmuon.structure import Blocks


def model(**values: Any) -> CostModel:
    return CostModel(**{"latency": 1e-5, "bandwidth": 1e10, "flops": 1e12, **values})


def test_cost_is_the_same_in_both_orientations_and_counts_stacked_matrices() -> None:
    assert newton_schulz_cost((4, 6)) == 5 * (4 * 4 * 4 * 6 + 2 * 4**3)
    assert newton_schulz_cost((4, 6)) == newton_schulz_cost((6, 4))
    assert newton_schulz_cost((3, 4, 6)) == 3 * newton_schulz_cost((4, 6))


@pytest.mark.parametrize("key", ["latency", "bandwidth", "flops"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_rates_must_be_positive(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"Invalid {key}="):
        model(**{key: value})


@pytest.mark.parametrize("value", ["fast", True, None])
def test_rates_must_be_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="Invalid flops="):
        model(flops=value)


def test_measured_times_must_be_positive_and_name_the_shape() -> None:
    with pytest.raises(TypeError, match="Invalid measured=3"):
        model(measured=3)
    with pytest.raises(ValueError, match=r"measured\[\(4, 6\)\]=0"):
        model(measured={(4, 6): 0.0})


def test_a_measured_time_replaces_the_formula_in_both_orientations() -> None:
    measured = model(measured={(6, 4): 2e-6})
    assert measured.work((4, 6)) == measured.work((6, 4)) == 2_000_000
    assert measured.work((3, 6, 4)) == 6_000_000
    assert measured.work((4, 4)) == newton_schulz_cost((4, 4))
    specs = [TensorSpec(str(shape), shape) for shape in [(4, 6), (4, 4), (4, 6)]]
    assert measured.works(specs) == [2_000_000, 1920, 2_000_000]


def test_a_fused_matrix_costs_what_its_blocks_cost() -> None:
    model = CostModel(1.0, 1.0, 1e9)
    fused = TensorSpec("qkv", (12, 6), blocks=Blocks((8, 2, 2)))
    kernel = TensorSpec("conv", (8, 4, 3, 3), "conv")
    stack = TensorSpec("experts", (5, 12, 6), blocks=Blocks((6, 6), "rows"))
    assert model.works([fused, kernel, stack]) == [
        newton_schulz_cost((8, 6)) + 2 * newton_schulz_cost((2, 6)),
        newton_schulz_cost((8, 36)),
        10 * newton_schulz_cost((6, 6)),
    ]


def test_models_with_the_same_times_look_the_same_whatever_their_order() -> None:
    first = model(measured={(4, 6): 1e-6, (2, 2): 1e-7})
    second = model(measured={(2, 2): 1e-7, (6, 4): 1e-6})
    assert first == second
    assert str(first) == str(second), "the ranks' digests compare the text"


def test_moving_an_element_costs_eight_bytes() -> None:
    assert model(flops=1e12, bandwidth=1e10).price == 800


def test_a_collective_takes_latency_per_doubling_and_the_bytes() -> None:
    assert model().collective(10**9, 4, 8) == pytest.approx(3e-5 + 0.4)
    assert model().collective(10**9, 4, 1) == 0.0, "one rank sends nothing"


def test_unknown_devices_are_planned_for_like_a_gpu() -> None:
    assert default_cost_model("xpu") == default_cost_model("cuda") != default_cost_model("cpu")
