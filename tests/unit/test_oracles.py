"""Muon's ground truth, numbered: what any implementation must give, with its tolerance.

docs/oracles.md has the same numbers, names the tests of those that are tested elsewhere, over ranks
or beside their feature, and lists the traps that other code has fallen into.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.torch_muon import newton_schulz_in_fp32
from distmuon import CostModel, Muon, orthogonalize
from distmuon.layout import TensorSpec
from distmuon.ownership import assign
from distmuon.update_rules import adjust_lr_factor
from tests.unit.orthogonalize.spectra import orthonormal

KELLER = (3.4445, -4.7750, 2.0315)
SHAPES = ((32, 96), (96, 32), (64, 64))
LR, DECAY = 2e-2, 0.1


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def keller(x: Tensor, **options: Any) -> Tensor:
    """Five steps of Newton-Schulz as published, by the plain iteration."""
    return orthogonalize(x, coefficients="keller", method="newton_schulz", **options)


def quintic(s: float, steps: int = 5) -> float:
    """What Newton-Schulz makes of a singular value."""
    a, b, c = KELLER
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    return s


def scaled_rms(update: Tensor) -> float:
    factor = adjust_lr_factor("match_rms_adamw", *update.shape)
    return float(update.double().square().mean().sqrt()) * factor


def with_singular_values(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """[m, n] of Frobenius norm 1 in float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (orthonormal(side, len(s), generator) for side in (m, n))
    return (u * (s / s.norm())) @ v.T


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(0.1 * gaussian(*shape, seed=i)) for i, shape in enumerate(SHAPES)]


def gradients(step: int) -> list[Tensor]:
    return [gaussian(*shape, seed=100 * step + i) for i, shape in enumerate(SHAPES)]


def train(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
    """Five steps on gradients that are given."""
    weights = parameters()
    optimizer = make(weights)
    for step in range(5):
        for weight, grad in zip(weights, gradients(step), strict=True):
            weight.grad = grad
        optimizer.step()
    return [weight.detach() for weight in weights]


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of a matrix, as a share of how far it has moved."""
    rows = zip(found, expected, (p.detach() for p in parameters()), strict=True)
    return max(float((a - b).norm() / (b - start).norm()) for a, b, start in rows)


def ours(weights: list[nn.Parameter], **options: Any) -> Muon:
    return Muon(weights, lr=LR, weight_decay=DECAY, ns_coefficients="keller", **options)


def torchs(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Muon(weights, lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize("rank", [1, 5, 20])
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (20, 20)])
def test_oracle_1_the_exact_update_has_an_rms_of_a_fifth_at_full_rank(
    shape: tuple[int, int], rank: int
) -> None:
    x = with_singular_values(*shape, torch.linspace(1, 0.1, rank, dtype=torch.float64)).float()
    expected = 0.2 * math.sqrt(rank / min(shape))
    assert scaled_rms(orthogonalize(x, method="svd")) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("shape", "rms"),
    [
        ((64, 64), 0.174),
        ((128, 128), 0.177),
        ((256, 256), 0.181),
        ((512, 512), 0.188),
        ((1024, 1024), 0.182),
        ((128, 512), 0.174),
        ((256, 1024), 0.191),
        ((1024, 2816), 0.189),
        ((64, 1024), 0.151),
        ((16, 1024), 0.146),
    ],
)
def test_oracle_2_five_published_steps_fall_short_of_it_on_gaussian_matrices(
    shape: tuple[int, int], rms: float
) -> None:
    found = [scaled_rms(keller(gaussian(*shape, seed=seed))) for seed in range(3)]
    assert sum(found) / 3 == pytest.approx(rms, abs=0.004)
    assert all(0.13 <= each <= 0.21 for each in found)


def test_oracle_3_a_matrix_of_rank_one() -> None:
    u, v = orthonormal(128, 1, torch.Generator()), orthonormal(512, 1, torch.Generator())
    found = keller((7 * u @ v.T).float())
    assert quintic(1.0) == pytest.approx(0.6964, abs=1e-4)
    torch.testing.assert_close(found, (0.6964 * u @ v.T).float(), rtol=1e-3, atol=1e-6)
    assert scaled_rms(found) == pytest.approx(0.0123, rel=1e-3)


def test_oracle_4_singular_values_end_in_their_band() -> None:
    for seed in range(20):
        draws = torch.rand(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = with_singular_values(24, 60, 10 ** (-2 * draws), seed)
        assert float(torch.linalg.svdvals(x).min()) >= 0.003
        values = torch.linalg.svdvals(keller(x.float()).double())
        assert 0.6818 - 1e-3 <= float(values.min())
        assert float(values.max()) <= 1.2024 + 1e-3
    small = torch.tensor([1.0, 0.001], dtype=torch.float64)
    values = torch.linalg.svdvals(keller(with_singular_values(2, 40, small).float()).double())
    assert float(values.min()) == pytest.approx(quintic(0.001), abs=1e-3)
    assert quintic(0.001) == pytest.approx(0.47, abs=5e-3)


@pytest.mark.parametrize("coefficients", ["keller", "p5", "halley"])
def test_oracle_5_rotations_go_through(coefficients: str) -> None:
    generator = torch.Generator().manual_seed(3)
    left, right = (orthonormal(side, side, generator).float() for side in (24, 72))
    x = gaussian(24, 72)
    rotated = orthogonalize(left @ x @ right, coefficients=coefficients)
    expected = left @ orthogonalize(x, coefficients=coefficients) @ right
    torch.testing.assert_close(rotated, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 72), (72, 24), (17, 19), (100, 130)])
def test_oracle_6_transposes_batches_and_zeros_are_exact(shape: tuple[int, int]) -> None:
    x = gaussian(3, *shape)
    for coefficients in ("keller", "p5", "halley", "auto"):
        whole = orthogonalize(x, coefficients=coefficients)
        apart = [orthogonalize(each, coefficients=coefficients) for each in x]
        assert torch.equal(whole, torch.stack(apart)), coefficients
        turned = orthogonalize(x[0].T, coefficients=coefficients)
        assert torch.equal(turned, apart[0].T), coefficients
        assert not orthogonalize(torch.zeros(shape), coefficients=coefficients).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 0.3, 1e5, 1e30])
def test_oracle_7_scale_does_not_matter(scale: float) -> None:
    x = gaussian(24, 72)
    for coefficients in ("keller", "p5", "halley"):
        expected = orthogonalize(x, coefficients=coefficients)
        found = orthogonalize(x * scale, coefficients=coefficients)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_oracle_8_an_average_and_a_sum_of_gradients_train_alike(nesterov: bool) -> None:
    found = train(lambda weights: ours(weights, nesterov=nesterov))
    expected = parameters()
    sums = [torch.zeros(shape) for shape in SHAPES]
    with torch.no_grad():
        for step in range(5):
            for weight, total, grad in zip(expected, sums, gradients(step), strict=True):
                total.mul_(0.95).add_(grad)
                update = keller(0.95 * total + grad if nesterov else total)
                factor = 0.2 * math.sqrt(max(weight.shape))
                weight.sub_(LR * (factor * update + DECAY * weight))
    assert worst(found, [weight.detach() for weight in expected]) < 5e-5


def test_oracle_9_torchs_muon_without_its_cast() -> None:
    with newton_schulz_in_fp32():
        assert worst(train(ours), train(torchs)) < 5e-5


def test_oracle_10_torchs_muon_as_it_is() -> None:
    difference = worst(train(ours), train(torchs))
    assert 5e-5 < difference < 0.03


def moonlights_example(weights: list[Tensor]) -> list[Tensor]:
    """Five steps by the rule of Moonlight's small training script, from its formulas.

    Gradients are summed with Nesterov momentum; 1e-7 is added to the norm; products are bfloat16.
    """
    a, b, c = KELLER
    sums = [torch.zeros(shape) for shape in SHAPES]
    for step in range(5):
        for weight, total, grad in zip(weights, sums, gradients(step), strict=True):
            total.mul_(0.95).add_(grad)
            ahead = (grad + 0.95 * total).bfloat16()
            tall = ahead.shape[0] > ahead.shape[1]
            x = ahead.T if tall else ahead
            x = x / (x.norm() + 1e-7)
            for _ in range(5):
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            update = (x.T if tall else x).float()
            weight.mul_(1 - LR * DECAY)
            weight.sub_(LR * 0.2 * math.sqrt(max(weight.shape)) * update)
    return weights


def test_oracle_11_moonlights_own_example() -> None:
    expected = moonlights_example([weight.detach().clone() for weight in parameters()])
    for found in (train(torchs), train(ours)):
        for weight, value in zip(found, expected, strict=True):
            assert float((weight - value).norm() / value.norm()) < 0.01
        assert worst(found, expected) < 0.03


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(24, 72), (96, 24), (64, 256)])
def test_oracle_12_the_gram_form_is_newton_schulz(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    x = gaussian(*shape, dtype=torch.float64).to(dtype)
    for coefficients in ("keller", "p5"):
        plain, gram = (
            orthogonalize(x, coefficients=coefficients, method=method)  # type: ignore[arg-type]
            for method in ("newton_schulz", "gram")
        )
        torch.testing.assert_close(gram, plain, rtol=0, atol=tolerance)


@pytest.mark.parametrize("algorithm", ["muon", "normuon"])
def test_oracle_13_without_gradient_and_momentum_only_decay_is_left(algorithm: str) -> None:
    weight = nn.Parameter(gaussian(12, 20))
    expected = weight.detach() * (1 - LR * DECAY)
    weight.grad = torch.zeros(12, 20)
    Muon([{"params": [weight], "algorithm": algorithm}], lr=LR, weight_decay=DECAY).step()
    assert torch.equal(weight, expected)


def llama_7b() -> list[TensorSpec]:
    one = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "o": (4096, 4096)}
    one |= {"gate": (11008, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    return [TensorSpec(f"{i}.{name}", shape) for i in range(32) for name, shape in one.items()]


@pytest.mark.parametrize("world_size", [2, 8, 64, 256])
def test_oracle_15_traffic_beside_adamws_and_state_per_rank(world_size: int) -> None:
    specs = llama_7b()
    ownership = assign(specs, world_size, model=CostModel(1e-5, 1e11, 5e14))
    elements = sum(spec.numel for spec in specs)
    # Out of one rank and into another: gradients, parameters, and both ways momentum's pieces.
    once, moved = elements * (world_size - 1), 2 * sum(ownership.traffic()[0])
    assert (4 * once * 2 + 4 * moved) / (4 * once * 2) <= 1.25
    assert (2 * once * 2 + 4 * moved) / (2 * once * 2) <= 1.5
    assert 4 * ownership.layout.shard_numel <= 1.001 * 4 * elements / world_size


@pytest.mark.parametrize(
    ("mode", "shape", "factor"),
    [
        ("match_rms_adamw", (1024, 256), 6.4),
        ("match_rms_adamw", (256, 1024), 6.4),
        ("original", (1024, 256), 2.0),
        ("original", (256, 1024), 1.0),
        ("mup", (1024, 256), 2.0),
        ("mup", (256, 1024), 0.5),
        ("spectral_unclamped", (1024, 256), 2.0),
        ("spectral_unclamped", (256, 1024), 0.5),
    ],
)
def test_oracle_19_the_scale_table_also_of_a_whole_step(
    mode: Any, shape: tuple[int, int], factor: float
) -> None:
    assert adjust_lr_factor(mode, *shape) == factor
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gaussian(*shape)
    Muon([weight], lr=1.0, adjust_lr_fn=mode, ns_coefficients="keller").step()
    expected = -factor * orthogonalize(weight.grad, coefficients="keller")
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------
# Traps that other implementations have fallen into, where no test of a feature shows ours.


def test_trap_a_bfloat16_buffer_is_not_normalized_without_nesterov() -> None:
    weight = nn.Parameter(torch.zeros(16, 40, dtype=torch.bfloat16))
    optimizer = Muon([weight], nesterov=False)
    weight.grad = torch.full((16, 40), 40.0, dtype=torch.bfloat16)
    optimizer.step()
    (state,) = optimizer.state_dict()["state"].values()
    torch.testing.assert_close(state["momentum_buffer"], torch.full((16, 40), 40 * 0.05))


def test_trap_an_eps_beside_the_norm_would_show_at_small_gradients() -> None:
    """The reason for oracle 7: it fails for this formula, and so it can fail."""
    x = 1e-5 * gaussian(24, 72)
    with_eps = keller(x) * float(x.norm() / (x.norm() + 1e-7))
    assert float((with_eps - keller(x)).norm() / keller(x).norm()) > 1e-5


def test_trap_norms_of_shards_are_not_the_norm_of_the_matrix() -> None:
    """Why a matrix comes together: orthogonalizing the rows that a rank holds is not Muon."""
    x = gaussian(128, 256)
    whole = keller(x)
    shards = torch.cat([keller(part) for part in x.chunk(4)])
    assert float((shards - whole).norm() / whole.norm()) > 0.3
