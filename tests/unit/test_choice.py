"""Predictions, and the layout that "auto" takes with its reason."""

import pytest

from distmuon.choice import Prediction, choose, predict
from distmuon.cost import CostModel
from distmuon.layout import TensorSpec
from distmuon.ownership import Ownership, assign

SPECS = [TensorSpec(f"w{i}", (256, 640)) for i in range(6)] + [TensorSpec("large", (1024, 2048))]
SLOW_NETWORK = CostModel(latency=1e-6, bandwidth=1e6, flops=1e12)
SLOW_START = CostModel(latency=1.0, bandwidth=1e12, flops=1e12)


def take(layout: str, model: CostModel) -> Ownership:
    return choose(SPECS, 4, layout=layout, model=model, wave_numel=2**20, itemsize=4)  # type: ignore[arg-type]


def test_auto_avoids_padding_where_bytes_are_dear() -> None:
    ownership = take("auto", SLOW_NETWORK)
    assert ownership.layout == assign(SPECS, 4, layout="flat", model=SLOW_NETWORK).layout
    assert ownership.reason.startswith(
        'layout="flat" is predicted to be the fastest: layout="flat" '
    )


def test_auto_avoids_messages_where_latency_is_dear() -> None:
    ownership = take("auto", SLOW_START)
    assert ownership.layout == assign(SPECS, 4, layout="aligned", model=SLOW_START).layout
    assert ownership.reason.startswith(
        'layout="aligned" is predicted to be the fastest: layout="flat" '
    )
    assert ', layout="aligned" ' in ownership.reason


def test_a_layout_that_was_asked_for_is_taken_and_says_what_it_costs() -> None:
    ownership = take("aligned", SLOW_NETWORK)
    assert ownership.reason.startswith('layout="aligned" was asked for: layout="aligned" ')
    assert "compute" in ownership.reason


def test_a_prediction_adds_up() -> None:
    ownership = assign(SPECS, 4, model=SLOW_NETWORK)
    predicted = predict(ownership, SLOW_NETWORK, wave_numel=2**30, itemsize=2)
    assert predicted.compute == max(ownership.loads(SLOW_NETWORK)) / 1e12
    shard = ownership.layout.shard_numel
    assert predicted.publish == pytest.approx(2e-6 + 3 * shard * 2 / 1e6)
    busiest = max(map(max, ownership.traffic()))
    assert predicted.exchange == pytest.approx(2 * (2e-6 + busiest * 4 / 1e6))
    assert predicted.waves == 1
    narrow = predict(ownership, SLOW_NETWORK, wave_numel=2**30, itemsize=2, wire_itemsize=2)
    assert narrow.exchange == pytest.approx(2 * (2e-6 + busiest * 2 / 1e6))
    assert narrow.publish == predicted.publish
    more = predict(ownership, SLOW_NETWORK, wave_numel=1, itemsize=2)
    assert more.waves >= predicted.waves


def test_waves_hide_the_shorter_of_computing_and_sending() -> None:
    one = Prediction(compute=3.0, exchange=1.0, publish=0.5, waves=1)
    four = Prediction(compute=3.0, exchange=1.0, publish=0.5, waves=4)
    reverse = Prediction(compute=1.0, exchange=3.0, publish=0.5, waves=4)
    assert one.seconds == 4.5
    assert four.seconds == reverse.seconds == 3.75


def test_one_rank_sends_nothing() -> None:
    ownership = assign(SPECS, 1, model=SLOW_START)
    predicted = predict(ownership, SLOW_START, wave_numel=1, itemsize=4)
    assert (predicted.exchange, predicted.publish, predicted.waves) == (0.0, 0.0, 0)
