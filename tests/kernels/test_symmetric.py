"""What decides about kernels, where there is none: no Triton, no GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from distmuon.kernels import symmetric
from distmuon.kernels.symmetric import sym_gemm, sym_gemm_norm, symmetric_backend
from distmuon.kernels.tiles import LARGE, SMALL, TILES, Tile, tile_for


def test_a_cpu_never_imports_triton() -> None:
    script = (
        "import sys, torch, distmuon; from distmuon.orthogonalize import orthogonalize\n"
        "for dtype in (torch.float32, torch.float16, torch.bfloat16):\n"
        "    orthogonalize(torch.randn(8, 16), dtype=dtype)\n"
        "sys.exit('distmuon.kernels.symmetric_triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_torch_form_computes_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 14).to(dtype)
    c = (x @ x.mT) / 3
    alpha, beta = torch.tensor([0.5, -2.0]), torch.tensor([1.5, 0.25])
    exact = x.double() @ x.double().mT * alpha.double()[:, None, None]
    exact += c.double() * beta.double()[:, None, None]
    with symmetric_backend("torch"):
        close = {"rtol": 0.02, "atol": 0.2}
        torch.testing.assert_close(
            sym_gemm(x, x.mT, c, alpha=alpha, beta=beta).double(), exact, **close
        )
        one = sym_gemm(x[0], x[0].mT, c[0], alpha=0.5, beta=1.5).double()
        torch.testing.assert_close(one, exact[0], **close)
        product, norm = sym_gemm_norm(x[0], x[0].mT)
    torch.testing.assert_close(norm.squeeze(), product.float().norm())


def test_backends_are_chosen_by_name_and_for_a_while() -> None:
    half = torch.zeros(4, 4).half()
    assert not symmetric.takes(half)
    with symmetric_backend("torch"):
        assert symmetric.takes(half)
        assert not symmetric.takes(half.float())
    assert not symmetric.takes(half)
    with pytest.raises(ValueError, match="Unknown backend='cublas'"), symmetric_backend("cublas"):
        pass


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 16384, 53248), "triton"),  # the largest matrix of Llama 405B
        ((1, 20000, 120000), "torch"),  # past 32 bits
        ((1, 46352, 16), "torch"),  # so is the product
        ((2**16, 16, 16), "torch"),
    ],
)
def test_offsets_and_grids_that_do_not_fit_are_left_to_cublas(
    shape: tuple[int, int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(symmetric, "_wanted", lambda *_: "triton")
    monkeypatch.setattr(symmetric, "_check", lambda _: True)
    monkeypatch.setattr(symmetric, "_trusted", {})
    x = torch.empty(shape, dtype=torch.float16, device="meta")
    assert symmetric._choose(x, x.mT, None, scaled=(False, False), squares=False) == expected


def test_quack_is_asked_for_only_by_who_has_it() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install quack-kernels"):
        with symmetric_backend("quack"):
            pass


def test_tiles_cover_the_triangle() -> None:
    for tile in TILES:
        assert tile.rows in (tile.cols, 2 * tile.cols)
    for m in (1, 63, 64, 65, 300):
        tile = Tile(64, 32, 16, 4, 2)
        needed = {(r // 64, c // 32) for r in range(m) for c in range(r + 1)}
        assert len(needed) <= tile.count(m) <= len(needed) + 1


def test_the_tile_leaves_least_to_the_busiest_processor() -> None:
    square, wide = LARGE
    # By tiles of each: 528 and 272, 1224 and 648, 864 and 480.
    assert tile_for(4096, processors=132) == square, "4 rounds against 3 of more than half as long"
    assert tile_for(2048, batch=9, processors=132) == wide, "10 against 5"
    assert tile_for(1024, batch=24, processors=132) == square, "7 against 4"
    assert tile_for(4096) == tile_for(4096, batch=1000, processors=132) == wide
    assert tile_for(100, batch=1000, processors=132) == SMALL


def test_only_what_fits_is_resident() -> None:
    for tile in TILES:
        stored = 2 * tile.stages * tile.depth * (tile.rows + tile.cols)
        assert tile.resident * (stored + 1024) <= 228 * 1024, "shared memory of an H200"
        assert tile.resident * tile.warps * 32 * tile.registers <= 65536
