"""The kernels compile for GPUs that this machine does not have: Triton brings the assembler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distmuon.kernels.tiles import TILES, Tile

triton = pytest.importorskip("triton")

HALF_POINTERS = {"a_ptr", "b_ptr", "c_ptr", "out_ptr"}
POINTERS = {"bits_ptr": "*i32"}
AS_INTEGERS = {
    "_round_kernel": {"out_ptr": "*i16", "value_ptr": "*i32"},
    "_adopt_kernel": {"master_ptr": "*i32", "narrow_ptr": "*i16"},
}
INTEGERS = {"m", "k", "count"}
KEYS = {"first", "second"}
HOPPER, AMPERE = 90, 80


def compile_kernel(
    kernel: Any,
    constants: dict[str, object],
    *,
    half: str,
    capability: int,
    pointers: dict[str, str] = POINTERS,
    **options: int,
) -> Any:
    """One specialization of a kernel, as aligned operands would get it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name.endswith("_ptr"):
            return pointers.get(name, f"*{half}" if name in HALF_POINTERS else "*fp32")
        if name in KEYS:
            return "i32"
        return "i32" if name in INTEGERS or name.endswith(("_batch", "_row", "_col")) else "fp32"

    names = kernel.arg_names
    plain = ("constexpr", "fp32")
    aligned = {(i,) for i, n in enumerate(names) if kind(n) not in plain and n not in KEYS}
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_symmetric(tile: Tile, capability: int, dtype: str, **switches: bool) -> str:
    """The assembly of the symmetric product."""
    from distmuon.kernels.symmetric_triton import _symmetric_kernel

    constants: dict[str, object] = {
        "HAS_C": True, "HAS_ALPHA": True, "HAS_BETA": True, "HAS_SQUARE": True,
        "MASK_M": False, "MASK_K": False, "WIDEN": False,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth,
        "a_col": 1, "b_row": 1, "c_col": 1, **switches,
    }  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    compiled = compile_kernel(
        _symmetric_kernel, constants, half=dtype, capability=capability, **options
    )
    assert compiled.metadata.shared < (227 if capability == HOPPER else 163) * 1024
    return str(compiled.asm["ptx"])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_on_hopper_the_kernel_uses_its_matrix_instructions_and_wide_stores() -> None:
    text = compile_symmetric(TILES[1][1], HOPPER, "fp16")
    assert "wgmma.mma_async" in text
    assert "st.global.v4" in text


@pytest.mark.parametrize(
    "kernel",
    ["_momentum_kernel", "_apply_kernel", "_adamw_kernel", "_round_kernel", "_adopt_kernel"],
)
def test_the_update_rules_compile_to_wide_loads(kernel: str) -> None:
    from distmuon.kernels import elementwise_triton

    constants: dict[str, object] = {"BLOCK": elementwise_triton.BLOCK}
    if kernel == "_momentum_kernel":
        constants |= {"NESTEROV": True, "LARGEST": True}
    if kernel == "_round_kernel":
        constants |= {"FIRST_FACTOR": 3, "SECOND_FACTOR": 5}
    compiled = compile_kernel(
        getattr(elementwise_triton, kernel),
        constants,
        half="fp16",
        capability=HOPPER,
        pointers=AS_INTEGERS.get(kernel, POINTERS),
    )
    assert "ld.global.v4" in compiled.asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtype", "masked"), [(AMPERE, "fp16", True), (HOPPER, "bf16", False)]
)
@pytest.mark.parametrize("tile", [tile for _, tile in TILES])
def test_every_tile_compiles(tile: Tile, masked: bool, dtype: str, capability: int) -> None:
    text = compile_symmetric(tile, capability, dtype, MASK_M=masked, MASK_K=masked)
    assert ("wgmma.mma_async" if capability == HOPPER else "mma.sync") in text
