"""The scale table, the update RMS it means, momentum's conventions, AdamW against torch."""

import math

import pytest
import torch

from distmuon.update_rules import adamw_, adjust_lr_factor, apply_, momentum_


@pytest.mark.parametrize(
    ("mode", "rows", "cols", "factor"),
    [
        ("match_rms_adamw", 1024, 256, 6.4),
        ("match_rms_adamw", 256, 1024, 6.4),
        ("max_dim", 1024, 256, 204.8),
        ("max_dim", 256, 1024, 204.8),
        ("original", 1024, 256, 2.0),
        ("original", 256, 1024, 1.0),
        ("mup", 1024, 256, 2.0),
        ("spectral_unclamped", 1024, 256, 2.0),
        ("mup", 256, 1024, 0.5),
        ("none", 1024, 256, 1.0),
        (lambda rows, cols: rows / cols, 6, 3, 2.0),
    ],
)
def test_scale_table(mode: str, rows: int, cols: int, factor: float) -> None:
    assert adjust_lr_factor(mode, rows, cols) == pytest.approx(factor, rel=1e-15)


@pytest.mark.parametrize(
    ("rows", "cols", "rank"), [(48, 20, 20), (20, 48, 20), (32, 32, 32), (48, 20, 5), (64, 64, 1)]
)
def test_exact_polar_factor_scaled_by_match_rms_adamw_has_the_stated_rms(
    rows: int, cols: int, rank: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, rank, dtype=torch.float64) @ torch.randn(rank, cols, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > 1e-9 * s[0]
    polar = (u[:, keep] @ vh[keep]).float()
    update = polar * adjust_lr_factor("match_rms_adamw", rows, cols)
    expected = 0.2 * math.sqrt(rank / min(rows, cols))
    assert update.square().mean().sqrt().item() == pytest.approx(expected, rel=1e-5)


def test_max_dim_has_the_rms_its_documentation_states() -> None:
    polar = torch.linalg.qr(torch.randn(48, 20, dtype=torch.float64))[0]
    rms = (polar * adjust_lr_factor("max_dim", 48, 20)).square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * math.sqrt(48), rel=1e-12)


@pytest.mark.parametrize("result", [0.0, -1.0, math.inf, math.nan])
def test_a_callable_must_return_a_usable_factor(result: float) -> None:
    with pytest.raises(ValueError, match="4 x 3 matrix"):
        adjust_lr_factor(lambda rows, cols: result, 4, 3)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="match_rms_adamw"):
        adjust_lr_factor("match_rms_adam", 4, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="callable"):
        adjust_lr_factor(0.2, 4, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("nesterov", [True, False])
def test_momentum_is_an_average(nesterov: bool) -> None:
    torch.manual_seed(0)
    buffer = torch.zeros(50, dtype=torch.float64)
    expected = torch.zeros(50, dtype=torch.float64)
    for _ in range(4):
        grad = torch.randn(50, dtype=torch.float64)
        update = grad.clone()
        momentum_(update, buffer, momentum=0.9, nesterov=nesterov)
        expected = 0.9 * expected + 0.1 * grad
        want = 0.9 * expected + 0.1 * grad if nesterov else expected
        torch.testing.assert_close(buffer, expected)
        torch.testing.assert_close(update, want)
        assert update.data_ptr() != buffer.data_ptr()


def test_average_and_sum_conventions_differ_by_a_factor() -> None:
    torch.manual_seed(0)
    average, summed = torch.zeros(30, dtype=torch.float64), torch.zeros(30, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(30, dtype=torch.float64)
        summed = 0.95 * summed + grad
        momentum_(grad, average, momentum=0.95, nesterov=False)
    torch.testing.assert_close(average, 0.05 * summed)


def test_decay_is_decoupled_and_uses_the_unscaled_lr() -> None:
    param = torch.tensor([2.0, -4.0])
    apply_(param, torch.tensor([10.0, 0.0]), lr=0.1, weight_decay=0.5)
    torch.testing.assert_close(param, torch.tensor([2.0 * 0.95 - 1.0, -4.0 * 0.95]))


def test_no_gradient_and_no_momentum_leave_only_the_decay() -> None:
    param = torch.randn(40)
    before = param.clone()
    update, buffer = torch.zeros(40), torch.zeros(40)
    momentum_(update, buffer, momentum=0.95, nesterov=True)
    apply_(param, update, lr=0.01, weight_decay=0.1)
    assert torch.equal(param, before * (1 - 0.01 * 0.1))


def test_adamw_is_torchs_bit_for_bit() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.randn(37), torch.nn.Parameter(torch.empty(37))
    theirs.data.copy_(ours)
    reference = torch.optim.AdamW(
        [theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False
    )
    exp_avg, exp_avg_sq = torch.zeros(37), torch.zeros(37)
    for step in range(1, 6):
        grad = torch.randn(37)
        theirs.grad = grad.clone()
        reference.step()
        adamw_(
            ours,
            grad,
            exp_avg,
            exp_avg_sq,
            step=step,
            lr=3e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
        )
        assert torch.equal(ours, theirs.detach())


@pytest.mark.parametrize("threads", [1, 2])
def test_pieces_give_the_same_bits_as_the_whole(threads: int) -> None:
    """What sharding rests on: an element's result does not depend on where its run starts."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    size = 70001
    param, grad, state = torch.randn(size), torch.randn(size), torch.randn(size).abs()

    def steps(start: int, stop: int) -> tuple[torch.Tensor, ...]:
        p, g, m, v, q = (t[start:stop].clone() for t in (param, grad, state, state, param))
        update = g.clone()
        momentum_(update, m, momentum=0.95, nesterov=True)
        apply_(p, update, lr=1e-2, weight_decay=0.1)
        adamw_(q, g, g.clone(), v, step=3, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        return p, m, q, v

    try:
        whole = steps(0, size)
        for start, stop in [(0, 1), (3, 20), (16, 48), (5, 40007), (32768, 70001), (69990, 70001)]:
            for piece, full in zip(steps(start, stop), whole, strict=True):
                assert torch.equal(piece, full[start:stop])
    finally:
        torch.set_num_threads(1)
