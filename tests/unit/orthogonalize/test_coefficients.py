"""Presets, the generator, and what users may write."""

import numbers

import pytest
import torch

from distmuon.orthogonalize.coefficients import PRESETS, generate, preset, resolve
from distmuon.orthogonalize.minimax import best_quintic
from distmuon.orthogonalize.schedule import Schedule, evaluate

# https://arxiv.org/abs/2505.16932, algorithm 1.
PUBLISHED_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
P5 = (
    (8.089257, -22.297789, 15.747758),
    (3.940458, -2.783920, 0.503931),
    (3.450025, -2.484423, 0.477172),
    (2.456931, -1.741247, 0.397004),
    (1.920729, -1.299923, 0.380026),
)


def image(schedule: Schedule, lower: float) -> tuple[float, float]:
    """Smallest and largest value of the composed polynomial on [lower, 1]."""
    values = torch.logspace(float(torch.log10(torch.tensor(lower))), 0, 20_001).tolist()
    for triple in schedule.coefficients:
        values = [evaluate(triple, value) for value in values]
    return min(values), max(values)


def test_the_generator_reproduces_the_published_polar_express() -> None:
    made = generate(1e-3, 8, 1.0, cushion=0.02407327424182761)
    torch.testing.assert_close(
        torch.tensor(made.coefficients), torch.tensor(PUBLISHED_POLAR_EXPRESS), rtol=0, atol=1e-6
    )


def test_polar_express_deflates_all_but_the_repeated_last() -> None:
    schedule = preset("polar_express", 9)
    expected = [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in PUBLISHED_POLAR_EXPRESS[:7]] + [
        PUBLISHED_POLAR_EXPRESS[7]
    ] * 2
    torch.testing.assert_close(
        torch.tensor(schedule.coefficients), torch.tensor(expected), rtol=0, atol=1e-6
    )
    assert schedule.safety == 1.01
    assert preset("polar_express").coefficients == schedule.coefficients[:5]


def test_p5_is_what_the_generator_makes() -> None:
    schedule = preset("p5")
    torch.testing.assert_close(
        torch.tensor(schedule.coefficients), torch.tensor(P5), rtol=0, atol=1e-6
    )
    assert (schedule.normalization, schedule.safety) == ("schatten4", 1.02)


def test_p5_is_as_tight_as_it_says() -> None:
    # The norm is divided by the safety factor once more, so that 1 is never reached.
    low, high = image(preset("p5"), 3e-3)
    assert low > 0.98
    assert high < 1.01
    assert image(preset("keller"), 3e-3)[1] > 1.2
    assert image(preset("keller"), 1e-2)[0] < 0.69


def test_the_exchange_equioscillates() -> None:
    lower, upper = 0.1, 1.3
    triple = best_quintic(lower, upper)
    errors = [1 - evaluate(triple, lower + (upper - lower) * i / 50_000) for i in range(50_001)]
    assert max(errors) == pytest.approx(-min(errors), rel=1e-6)
    assert errors[0] == pytest.approx(max(errors), rel=1e-6)
    assert errors[-1] == pytest.approx(min(errors), rel=1e-6)


def test_a_longer_schedule_reaches_one() -> None:
    low, high = image(generate(1e-3, 8, 1.0), 1e-3)
    assert low == pytest.approx(1.0, abs=1e-5)
    assert high == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_its_source(name: str) -> None:
    schedule = preset(name)
    assert schedule.name == name
    assert "http" in schedule.source or "Higham" in schedule.source or "arXiv" in schedule.source


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("keller", 5),
        ("polar_express", 5),
        ("you", 5),
        ("cubic", 12),
        ("taylor", 10),
        ("deepseek_v4", 10),
        ("p5", 5),
    ],
)
def test_default_steps(name: str, steps: int) -> None:
    assert preset(name).steps == steps
    assert resolve(name, steps) == preset(name)


def test_cubic_is_converged_at_its_default_and_not_at_five() -> None:
    assert image(preset("cubic"), 2e-2)[0] > 0.97
    assert image(preset("cubic", 5), 2e-2)[0] < 0.2


def test_one_triple_repeats() -> None:
    assert resolve((2, -1.5, 0.5)).steps == 5
    assert resolve([2.0, -1.5, 0.5], 7).coefficients == ((2.0, -1.5, 0.5),) * 7


def test_a_sequence_of_triples_is_taken_as_it_is() -> None:
    schedule = resolve([(3.4445, -4.775, 2.0315), (2, -1.5, 0.5)])
    assert schedule.steps == 2
    assert all(isinstance(v, numbers.Real) for triple in schedule.coefficients for v in triple)
    assert resolve(schedule, 2) is schedule


@pytest.mark.parametrize(
    ("coefficients", "steps", "error", "words"),
    [
        ("kellerr", None, ValueError, "Unknown coefficients='kellerr'.*keller, polar_express"),
        ("p5", 4, ValueError, "steps=4.*'p5'.*5 steps.*steps=None"),
        ("you", 6, ValueError, "'you'"),
        ("deepseek_v4", 5, ValueError, "10 steps"),
        ([(2.0, -1.5, 0.5)] * 2, 5, ValueError, "2 steps"),
        ((2.0, -1.5), None, ValueError, "three finite numbers"),
        ([(2.0, -1.5)], None, ValueError, "three finite numbers"),
        ((2.0, float("nan"), 0.5), None, ValueError, "three finite numbers"),
        ((2.0, "x", 0.5), None, TypeError, "three finite numbers"),
        ([2.0, (1.0, 2.0, 3.0), 1.0], None, TypeError, "three finite numbers"),
        (["abc"], None, TypeError, "three finite numbers"),
        ((), None, TypeError, "preset's name"),
        (3.0, None, TypeError, "preset's name"),
        (None, None, TypeError, "preset's name"),
        ("keller", 0, ValueError, "between 1 and 99"),
        ("keller", 100, ValueError, "between 1 and 99"),
        ("keller", 5.0, TypeError, "integer"),
        ("keller", True, TypeError, "integer"),
    ],
)
def test_bad_coefficients(
    coefficients: object, steps: object, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        resolve(coefficients, steps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lower": 0.0, "steps": 5}, "lower"),
        ({"lower": 1.0, "steps": 5}, "lower"),
        ({"lower": 1e-3, "steps": 0}, "steps"),
        ({"lower": 1e-3, "steps": 5, "safety": 0.99}, "safety"),
        ({"lower": 1e-3, "steps": 5, "cushion": 1.0}, "cushion"),
        ({"lower": 1e-3, "steps": 5, "normalization": "spectral"}, "normalization"),
    ],
)
def test_bad_generator_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(**arguments)  # type: ignore[arg-type]


def test_a_schedule_needs_steps() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Schedule("custom", (), "frobenius", 1.0, "the caller")
