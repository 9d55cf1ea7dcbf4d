"""The symmetric product against float64, element by element of its memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distmuon.kernels import symmetric, symmetric_triton
from distmuon.kernels.symmetric import sym_gemm, sym_gemm_norm, symmetric_backend
from distmuon.kernels.tiles import TILES, Scaled, Tile, tile_for
from distmuon.orthogonalize import newton_schulz, orthogonalize, stability
from distmuon.orthogonalize.coefficients import preset
from tests.unit.orthogonalize.spectra import Known, largest_singular_value, relative_error

HALF = (torch.float16, torch.bfloat16)
SMALL = Tile(16, 16, 16, warps=1, stages=1)
WIDE = Tile(32, 16, 16, warps=1, stages=1)


@pytest.fixture(autouse=True)
def _kernel() -> object:
    assert os.environ["TRITON_INTERPRET"] == "1"
    with symmetric_backend("triton"):
        yield


def launch_poisoned(
    a: Tensor, b: Tensor, c: Tensor | None, tile: Tile, alpha: list[float], beta: list[float]
) -> tuple[Tensor, Tensor]:
    """The product, computed into NaNs in the middle of other memory, and its squares."""
    batch, m, _ = a.shape
    memory = torch.full((batch * m * m + 64,), torch.nan, dtype=a.dtype)
    out = memory[32:-32].view(batch, m, m)
    square = torch.full((batch, tile.count(m)), torch.nan)
    # Half of each factor comes as a number, half from memory.
    factors = [Scaled(0.5, 2 * torch.tensor(x)) for x in (alpha, beta)]
    symmetric_triton.launch(
        a, b, c, out, alpha=factors[0], beta=factors[1], square=square, tile=tile
    )
    assert memory[:32].isnan().all(), "wrote before its memory"
    assert memory[-32:].isnan().all(), "wrote past its memory"
    assert not out.isnan().any(), "left elements unwritten"
    return out, square


def assert_right(out: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    # One rounding of a float32 sum: half an eps of each element, and the sum's own error. The
    # interpreter cuts bfloat16 off where the GPU rounds.
    bound = (
        (0.51 if dtype == torch.float16 else 1.01) * torch.finfo(dtype).eps * exact.abs()
        + 1e-5 * exact.abs().max()
        + 1e-7
    )
    assert ((out.double() - exact).abs() <= bound).all()
    assert torch.equal(out, out.mT)


@pytest.mark.parametrize("tile", [SMALL, WIDE])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [(1, 1), (17, 5), (33, 70), (64, 16)])
def test_every_element_is_written_and_right(
    size: tuple[int, int], dtype: torch.dtype, tile: Tile
) -> None:
    x = torch.randn(2, *size).to(dtype)
    c = torch.randn(2, size[0], size[0])
    c = (c + c.mT).to(dtype)
    alpha, beta = [0.5, -2.0], [3.0, 0.25]
    out, square = launch_poisoned(x, x.mT, c, tile, alpha, beta)
    factors = [torch.tensor(f, dtype=torch.float64)[:, None, None] for f in (alpha, beta)]
    exact = x.double() @ x.double().mT * factors[0] + c.double() * factors[1]
    assert_right(out, exact, dtype)
    torch.testing.assert_close(
        square.double().sum(1), exact.square().sum((1, 2)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [(1, 40), (17, 17), (129, 70), (100, 300)])
def test_the_public_function_takes_any_size(size: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(size).to(dtype)
    product, norm = sym_gemm_norm(x, x.mT)
    exact = x.double() @ x.double().mT
    assert_right(product, exact, dtype)
    torch.testing.assert_close(norm.squeeze(), exact.norm().float(), rtol=1e-4, atol=0)
    assert all(symmetric._trusted.values())


def test_a_large_matrix_that_fills_no_tile() -> None:
    x = torch.randn(1, 1000, 3000).half()
    tile = tile_for(1000)
    out, square = launch_poisoned(x, x.mT, None, tile, [1.0], [0.0])
    exact = torch.bmm(x.float(), x.float().mT).double()
    assert_right(out, exact, torch.float16)
    norm = square.double().sum(1).sqrt()
    torch.testing.assert_close(norm, exact.norm()[None], rtol=1e-4, atol=0)


def test_operands_may_lie_in_memory_in_any_way() -> None:
    whole = torch.randn(2, 50, 3, 37).half()
    tall = torch.randn(41, 19).half()
    for a in (whole[:, :, 1], whole[:, ::2, 2, 5:], whole[1:, :, 0].mT, tall.mT[None]):
        out, _ = launch_poisoned(a, a.mT, None, WIDE, [1.0] * len(a), [0.0] * len(a))
        assert_right(out, a.double() @ a.double().mT, torch.float16)


def test_products_of_matrices_that_commute() -> None:
    x = torch.randn(2, 45, 30)
    r = (x @ x.mT / 45).half()
    z = (r.double() @ r.double()).half()
    out = sym_gemm(r, z, r, alpha=0.5, beta=2.0)
    exact = 0.5 * r.double() @ z.double() + 2.0 * r.double()
    # z was rounded, so that the exact product is symmetric to that rounding only.
    assert (out.double() - exact).abs().max() < 4e-3 * exact.abs().max()
    assert torch.equal(out, out.mT)


def test_nothing_of_c_is_read_above_its_diagonal_and_nothing_beside_the_operands() -> None:
    c = torch.randn(1, 20, 20).half()
    c = c + c.mT
    memory = torch.full((3, 22, 23), torch.nan).half()
    memory[1, 1:21, 1:18] = torch.randn(20, 17)
    a = memory[1:2, 1:21, 1:18]
    exact = a.double() @ a.double().mT + c.double()
    assert_right(launch_poisoned(a, a.mT, c, SMALL, [1.0], [1.0])[0], exact, torch.float16)


def test_the_same_bits_every_time() -> None:
    x = torch.randn(2, 100, 90).bfloat16()
    first, again = (sym_gemm_norm(x, x.mT) for _ in range(2))
    assert torch.equal(first.product, again.product)
    assert torch.equal(first.norm, again.norm)


def test_factors_come_from_memory_or_from_numbers_alike() -> None:
    x = torch.randn(2, 20, 20).half()
    c = (x @ x.mT).clone()
    numbers = sym_gemm(x, x.mT, c, alpha=0.3, beta=-0.7)
    tensors = sym_gemm(x, x.mT, c, alpha=torch.tensor([0.3, 0.3]), beta=torch.tensor([-0.7, -0.7]))
    assert torch.equal(numbers, tensors)
    apart = sym_gemm(x, x.mT, c, alpha=0.3, beta=Scaled(-1.4, torch.full((2, 1, 1), 0.5)))
    assert torch.equal(numbers, apart)
    assert torch.equal(sym_gemm(x, x.mT, alpha=0.3), sym_gemm(x, x.mT, alpha=torch.tensor([0.3])))


def test_every_tile_of_the_table_computes_right() -> None:
    for tile in TILES:
        m = tile.rows + 3
        x = torch.randn(1, m, tile.depth + 1).half()
        out, _ = launch_poisoned(x, x.mT, None, tile, [1.0], [0.0])
        assert_right(out, x.double() @ x.double().mT, torch.float16)


def test_a_kernel_that_computes_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = symmetric_triton.launch

    def wrong(*args: object, **options: object) -> None:
        right(*args, **options)
        args[3][..., 0, 0] *= 1.5

    monkeypatch.setattr(symmetric_triton, "launch", wrong)
    monkeypatch.setattr(symmetric, "_trusted", {})
    x = torch.randn(1, 20, 20).half()
    with pytest.warns(RuntimeWarning, match="missed the product by"):
        out = sym_gemm(x, x.mT)
    torch.testing.assert_close(out, x @ x.mT)


def test_a_kernel_that_does_not_compile_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise NotImplementedError("no such instruction")

    monkeypatch.setattr(symmetric_triton, "launch", broken)
    monkeypatch.setattr(symmetric, "_trusted", {})
    x = torch.randn(1, 20, 20).half()
    with pytest.warns(RuntimeWarning, match="no such instruction"):
        torch.testing.assert_close(sym_gemm(x, x.mT), x @ x.mT)


# docs/numerics.md, table "Accuracy". bfloat16 cannot tell missing directions from its own rounding
# of the input; there only the largest singular value is bounded.
BOUNDS = {
    (torch.float16, "power_law"): 6e-3,
    (torch.float16, "condition_1e2"): 8e-3,
    (torch.float16, "condition_1e8"): 4e-2,
    (torch.float16, "rank_1"): 0.15,
    (torch.float16, "rank_8"): 8e-2,
    (torch.bfloat16, "power_law"): 4e-2,
    (torch.bfloat16, "condition_1e2"): 6e-2,
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "kind", ["power_law", "condition_1e2", "condition_1e8", "rank_1", "rank_8"]
)
def test_orthogonalization_stays_within_its_bounds(dtype: torch.dtype, kind: str) -> None:
    method = "gram" if dtype == torch.float16 else "newton_schulz"
    known = Known(34, 67, kind)
    update = orthogonalize((known.matrix * 2.0**-100).float(), method=method, dtype=dtype)
    assert largest_singular_value(update.double()) < 1.03
    assert (update.double() * known.matrix).sum() > 0
    error = relative_error(update, known.image(preset("p5")))
    assert error < BOUNDS.get((dtype, kind), torch.inf)
    assert all(symmetric._trusted.values())


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((1, 17), torch.float16), ((17, 129), torch.float16), ((129, 130), torch.bfloat16)],
)
def test_odd_sizes_stay_within_bounds_whatever_the_scale_and_twice_alike(
    size: tuple[int, int], dtype: torch.dtype
) -> None:
    method = "gram" if dtype == torch.float16 else "newton_schulz"
    known = Known(*size, "condition_1e2")
    small, large = (
        orthogonalize((known.matrix * scale).float(), method=method, dtype=dtype)
        for scale in (2.0**-100, 2.0**100)
    )
    assert torch.equal(small, large), "scales are powers of two: the same products"
    assert relative_error(large, known.image(preset("p5"))) < BOUNDS[dtype, "condition_1e2"]


# Products, memory for them, views of them; and copies, which the interpreter makes of arguments.
IGNORED = ("bmm", "new_empty", "_unsafe_view", "set_", "copy_")


class _Passes(TorchDispatchMode):
    """Names torch's operations on large tensors, views and what the interpreter does left out."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        large = isinstance(result, Tensor) and result.numel() >= self.least
        if large and not func.is_view and name not in IGNORED:
            self.names.append(name)
        return result


@pytest.mark.parametrize("preset_name", ["p5", "keller"])  # Schatten-4 and Frobenius norm
@pytest.mark.parametrize("dtype", HALF)
def test_normalizing_takes_no_pass_of_its_own(dtype: torch.dtype, preset_name: str) -> None:
    schedule, known = preset(preset_name), Known(20, 44, "condition_1e2")
    x = known.matrix.float()
    x = torch.stack([x / x.norm() * size for size in (40.0, 64.0)]).to(dtype)
    for _ in range(2):  # the kernels' checks come first
        with _Passes(20 * 20) as passes:
            if dtype == torch.float16:
                cut = stability.windows(schedule, "float16")
                update = newton_schulz.on_gram(x, schedule, cut)
            else:
                update, scale = newton_schulz.plain(x, schedule)
    if dtype == torch.float16:
        # Each window's Q is the first step's matrix with another diagonal.
        assert passes.names == ["clone"] * len(cut)
    else:
        # X keeps its own scale, which whoever takes the result undoes.
        assert passes.names == ["baddbmm"] * schedule.steps
        assert update.dtype == dtype
        assert scale is not None
        update = update * scale
    for each in update:
        error = relative_error(each.double(), known.image(schedule))
        assert error < BOUNDS[dtype, "condition_1e2"]


def test_a_batch_with_a_zero_a_tall_and_a_nan_matrix() -> None:
    x = torch.randn(3, 67, 34)
    x[1] = 0
    x[2, 3, 4] = torch.nan
    for dtype in HALF:
        update = orthogonalize(x, dtype=dtype)
        assert largest_singular_value(update[:1].double()) < 1.03
        assert torch.equal(update[1], torch.zeros(67, 34))
        assert update[2].isnan().all()
