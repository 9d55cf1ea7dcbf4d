"""The kernels compile for GPUs that this machine does not have: Triton brings the assembler."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distmuon.kernels.tiles import LARGE, TILES, Tile

triton = pytest.importorskip("triton")

HALF_POINTERS = {"a_ptr", "b_ptr", "c_ptr", "out_ptr"}
POINTERS = {"bits_ptr": "*i32"}
AS_INTEGERS = {
    "_round_kernel": {"out_ptr": "*i16", "value_ptr": "*i32"},
    "_adopt_kernel": {"master_ptr": "*i32", "narrow_ptr": "*i16"},
}
INTEGERS = {"m", "k", "count", "first", "second"}
HOPPER, AMPERE = 90, 80
# Bytes that one program may have; all of a processor's together may have one kilobyte more.
BLOCK_SHARED = {HOPPER: 227 * 1024, AMPERE: 163 * 1024}


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
        return "i32" if name in INTEGERS or name.endswith(("_batch", "_row", "_col")) else "fp32"

    names = kernel.arg_names
    plain = ("constexpr", "fp32")
    any_value = {p.name for p in kernel.params if p.do_not_specialize}
    aligned = {(i,) for i, n in enumerate(names) if kind(n) not in plain and n not in any_value}
    source = ASTSource(
        fn=kernel,
        signature={name: kind(name) for name in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={place: [["tt.divisibility", 16]] for place in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


class Machine(NamedTuple):
    """What the assembler made of a kernel.

    Attributes:
        registers: Of a thread.
        spilled: Bytes of a thread that did not fit into them.
        shared: Bytes of shared memory of a program.
        code: Its instructions.
    """

    registers: int
    spilled: int
    shared: int
    code: str


# The symmetric products of the pipeline: X X^T with its norm, and scaled or not, of X as it lies in
# memory or turned; and those of two m x m matrices with an addend, scaled or not.
PLAIN = {"HAS_C": False, "HAS_ALPHA": False, "HAS_BETA": False, "HAS_SQUARE": False}
LONG, TALL = {"a_col": 1, "b_row": 1}, {"a_row": 1, "b_col": 1}
SQUARE = {"a_col": 1, "b_col": 1, "HAS_C": True}
GRAM = {**PLAIN, **LONG, "HAS_SQUARE": True}
PRODUCTS: tuple[dict[str, bool | int], ...] = (
    GRAM,
    {**PLAIN, **LONG},
    {**PLAIN, **LONG, "HAS_ALPHA": True},
    {**PLAIN, **TALL, "HAS_SQUARE": True},
    {**PLAIN, **TALL, "HAS_ALPHA": True},
    {**PLAIN, **SQUARE},
    {**PLAIN, **SQUARE, "HAS_ALPHA": True, "HAS_BETA": True},
)


def compile_symmetric(
    tile: Tile, switches: dict[str, bool | int], capability: int, dtype: str, *, masked: bool
) -> Machine:
    """The symmetric product as the pipeline launches it."""
    from distmuon.kernels.symmetric_triton import _symmetric_kernel

    constants: dict[str, object] = {
        "MASK_M": masked, "MASK_K": masked, "WIDEN": False,
        "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth,
        "c_col": 1, **switches,
    }  # fmt: skip
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers}
    compiled = compile_kernel(
        _symmetric_kernel, constants, half=dtype, capability=capability, **options
    )
    return read_machine(compiled)


def read_machine(compiled: Any) -> Machine:
    """What Triton's own tools say about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tools = triton.knobs.nvidia
        usage, code = (
            subprocess.run(
                [tool.path, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in ((tools.cuobjdump, "-res-usage"), (tools.nvdisasm, "-c"))
        )
    used = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Machine(used["REG"], used["STACK"] + used["LOCAL"], compiled.metadata.shared, code)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def assert_runs_well(machine: Machine, tile: Tile, capability: int) -> None:
    # Ampere's matrix instructions take their operands from registers, too: a few more are needed.
    assert machine.spilled <= (0 if capability == HOPPER else 48)
    assert machine.registers <= tile.registers
    # Stores of single elements would take longer than the sums of a tile across the diagonal.
    assert "STG.E.128" in machine.code
    assert "STG.E.U16" not in machine.code
    # The next operands are on their way while these are multiplied.
    assert "LDGSTS.E.BYPASS.128" in machine.code
    resident = 1
    if capability == HOPPER:
        resident = tile.resident
        assert "HGMMA" in machine.code
        # One group of matrix instructions is left running while the loop goes on.
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", machine.code)
        assert waits == ["0x1", "0x0"], "in the loop, and after it"
    else:
        assert "HMMA" in machine.code
    assert machine.shared <= BLOCK_SHARED[capability]
    # Of each program the GPU keeps a kilobyte for itself.
    assert resident * (machine.shared + 1024) <= BLOCK_SHARED[capability] + 1024
    assert resident * tile.warps * 32 * machine.registers <= 65536


@pytest.mark.parametrize("tile", LARGE)
def test_on_hopper_the_kernel_spills_nothing_and_waits_for_nothing(tile: Tile) -> None:
    machine = compile_symmetric(tile, GRAM, HOPPER, "fp16", masked=False)
    assert_runs_well(machine, tile, HOPPER)


@pytest.mark.parametrize(
    "kernel",
    [
        "_momentum_kernel",
        "_apply_kernel",
        "_adamw_kernel",
        "_round_kernel",
        "_adopt_kernel",
        "_scale_kernel",
    ],
)
def test_the_update_rules_compile_to_wide_loads_whatever_the_count(kernel: str) -> None:
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
    machine = read_machine(compiled)
    assert "LDG.E.128" in machine.code
    assert machine.registers <= 64, "more would leave fewer loads under way than the memory needs"


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "masked"), [("fp16", False), ("bf16", True)])
@pytest.mark.parametrize("capability", [HOPPER, AMPERE])
@pytest.mark.parametrize("tile", TILES)
def test_every_product_with_every_tile(
    tile: Tile, capability: int, dtype: str, masked: bool
) -> None:
    for switches in PRODUCTS:
        machine = compile_symmetric(tile, switches, capability, dtype, masked=masked)
        assert_runs_well(machine, tile, capability)
