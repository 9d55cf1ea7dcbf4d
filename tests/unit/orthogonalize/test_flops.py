"""Operations are counted as torch's own counter sees them pass."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distmuon import orthogonalize
from distmuon.kernels import symmetric
from distmuon.orthogonalize.coefficients import Coefficients
from distmuon.orthogonalize.flops import count_flops, count_part_flops
from distmuon.orthogonalize.parts import apply_transform, check_parts, find_transform, part_gram

CPU = torch.device("cpu")
SHAPES = [(1, 1), (32, 32), (32, 128), (128, 32), (64, 100), (384, 400), (400, 1000), (1000, 385)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", ["p5", "keller", "polar_express"])
def test_the_count_is_torchs_own(shape: tuple[int, int], coefficients: Coefficients) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape), coefficients=coefficients)
    told = count_flops(shape, coefficients=coefficients, device=CPU)
    assert told == counter.get_total_flops() > 0


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_inverse_counts_as_half_a_product(shape: tuple[int, int], steps: int) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape), coefficients="halley", steps=steps)
    told = count_flops(shape, coefficients="halley", steps=steps, device=CPU)
    assert told == counter.get_total_flops() + steps * min(shape) ** 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("shape", [(48, 96), (64, 64)])
def test_dtype_and_steps_are_followed(
    dtype: torch.dtype, steps: int, shape: tuple[int, int]
) -> None:
    with FlopCounterMode(display=False) as counter:
        orthogonalize(torch.randn(shape), coefficients="keller", steps=steps, dtype=dtype)
    told = count_flops(shape, coefficients="keller", steps=steps, dtype=dtype, device=CPU)
    assert told == counter.get_total_flops()


@pytest.mark.parametrize("m", [32, 400])
@pytest.mark.parametrize(("name", "steps"), [("keller", 1), ("keller", 5), ("halley", 2)])
def test_a_shared_matrix_costs_what_its_parts_do(m: int, name: str, steps: int) -> None:
    widths = (100, 300)
    halves = check_parts(name, steps, torch.float64, CPU, (m, sum(widths)))
    inverses = steps * m**3 if name == "halley" else 0
    with FlopCounterMode(display=False) as counter:
        parts = [part_gram(torch.randn(m, width), dtype=torch.float64) for width in widths]
        transform = find_transform([p.gram for p in parts], [p.largest for p in parts], halves)
        for part in parts:
            apply_transform(part, transform)
    told = [count_part_flops(m, widths[0], halves, CPU), count_part_flops(m, widths[1], None, CPU)]
    assert sum(told) == counter.get_total_flops() + inverses


def test_the_gram_form_counts_for_less_where_it_is_taken() -> None:
    square, wide = (
        count_flops(shape, coefficients="p5", device=CPU) for shape in ((512, 512), (512, 2048))
    )
    assert wide < 4 * square
    assert count_flops((512, 2048), coefficients="p5", device=CPU) == count_flops(
        (2048, 512), coefficients="p5", device=CPU
    )


def test_where_a_kernel_computes_tiles_these_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(backend: symmetric.Backend, shape: tuple[int, int], dtype: torch.dtype) -> int:
        with symmetric.symmetric_backend(backend):
            return count_flops(shape, coefficients="p5", dtype=dtype, device=CPU)

    monkeypatch.setattr(symmetric, "triton_is_installed", lambda: True)
    m, n = 1024, 4096
    # 8 x 8 tiles of 128 x 128, of which 36 on and below the diagonal; windows of 2 and 3 steps.
    computed = 36 * 128 * 128
    assert count("triton", (m, n), torch.float16) == (
        2 * 2 * computed * n + (5 + 9) * 2 * computed * m + 2 * 2 * m * m * n
    )
    assert count("triton", (m, m), torch.bfloat16) == 5 * (4 * computed * m + 2 * m**3)
    assert count("triton", (m, n), torch.float32) == count("torch", (m, n), torch.float32)


def test_on_a_gpu_the_kernel_takes_what_is_large_and_aligned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(symmetric, "triton_is_usable", lambda device: device.type == "cuda")
    gpu, half = torch.device("cuda"), torch.float16
    assert symmetric.computed_entries(1024, 4096, half, gpu) == 36 * 128 * 128
    for m, k, dtype, device in (
        (512, 4096, half, gpu),
        (1000, 4096, half, gpu),
        (1024, 1023, half, gpu),
        (1024, 4096, torch.float32, gpu),
        (1024, 4096, half, CPU),
    ):
        assert symmetric.computed_entries(m, k, dtype, device) is None
