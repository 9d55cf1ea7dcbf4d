import pytest

from distmuon.units import format_bytes, format_flops, format_time


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1250, "1.25 kB"), (3e12, "3.00 TB"), (2.5e18, "2,500.00 PB")],
)
def test_bytes_get_a_readable_unit(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 µs"),
        (4e-5, "40.0 µs"),
        (0.0123, "12.3 ms"),
        (0.99999, "1.0 s"),
        (4321, "4,321.0 s"),
    ],
)
def test_times_get_a_readable_unit(seconds: float, text: str) -> None:
    assert format_time(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 FLOP"), (999, "999 FLOP"), (61_300_000, "61.30 MFLOP"), (2.5e18, "2,500.00 PFLOP")],
)
def test_operations_get_a_readable_unit(count: float, text: str) -> None:
    assert format_flops(count) == text
