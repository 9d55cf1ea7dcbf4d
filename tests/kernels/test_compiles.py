"""The kernels compile for GPUs that this machine does not have: Triton brings the assembler."""

from __future__ import annotations

from pathlib import Path

import pytest

from distmuon.kernels.tiles import TILES, Tile

triton = pytest.importorskip("triton")

POINTERS = {"a_ptr", "b_ptr", "c_ptr", "out_ptr"}
FLOATS = {"alpha_ptr", "beta_ptr", "square_ptr"}
HOPPER, AMPERE = 90, 80


def compile_symmetric(tile: Tile, capability: int, dtype: str, **switches: bool) -> dict[str, str]:
    """The assembly of one specialization of the kernel, as aligned operands would get it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from distmuon.kernels.symmetric_triton import _symmetric_kernel as kernel

    if not hasattr(kernel, "arg_names") or triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    constants: dict[str, object] = {
        "HAS_C": True, "HAS_SQUARE": True, "MASK_M": False, "MASK_K": False, "WIDEN": False,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth,
        "a_col": 1, "b_row": 1, "c_col": 1, **switches,
    }  # fmt: skip
    kinds = {**dict.fromkeys(POINTERS, f"*{dtype}"), **dict.fromkeys(FLOATS, "*fp32")}
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else kinds.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.metadata.shared < (227 if capability == HOPPER else 163) * 1024
    return dict(compiled.asm)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_on_hopper_the_kernel_uses_its_matrix_instructions_and_wide_stores() -> None:
    text = compile_symmetric(TILES[1][1], HOPPER, "fp16")["ptx"]
    assert "wgmma.mma_async" in text
    assert "st.global.v4" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "masked"), [(AMPERE, "fp16", True), (HOPPER, "bf16", False)]
)
@pytest.mark.parametrize("tile", [tile for _, tile in TILES])
def test_every_tile_compiles(tile: Tile, masked: bool, dtype: str, capability: int) -> None:
    text = compile_symmetric(tile, capability, dtype, MASK_M=masked, MASK_K=masked)["ptx"]
    assert ("wgmma.mma_async" if capability == HOPPER else "mma.sync") in text
