"""Which dtype and which form, by what the device can do."""

import subprocess
import sys

import pytest
import torch

from distmuon.orthogonalize import orthogonalize, policy
from distmuon.orthogonalize.coefficients import preset
from tests.unit.orthogonalize.spectra import Known, relative_error

CPU = torch.device("cpu")
P5 = preset("p5")


@pytest.mark.parametrize("fast", [True, False])
def test_float32_inputs_are_computed_in_float32_on_every_cpu(
    fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy, "cpu_has_fast_bfloat16", lambda: fast)
    for shape in ((8, 8), (8, 64)):
        assert policy.working_dtype(torch.empty(shape), "auto", None, P5) == torch.float32
    assert policy.working_dtype(torch.empty(8, 8).half(), "auto", None, P5) == torch.float32
    assert policy.working_dtype(torch.empty(8, 8).double(), "auto", None, P5) == torch.float64


def test_bfloat16_inputs_stay_only_where_that_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    square, long = torch.empty(8, 8).bfloat16(), torch.empty(8, 64).bfloat16()
    monkeypatch.setattr(policy, "cpu_has_fast_bfloat16", lambda: True)
    assert policy.working_dtype(square, "auto", None, P5) == torch.bfloat16
    assert policy.working_dtype(long, "newton_schulz", None, P5) == torch.bfloat16
    assert policy.working_dtype(long, "auto", None, P5) == torch.float32
    assert policy.working_dtype(square, "gram", None, P5) == torch.float32
    assert policy.working_dtype(square, "svd", None, P5) == torch.float32
    monkeypatch.setattr(policy, "cpu_has_fast_bfloat16", lambda: False)
    assert policy.working_dtype(square, "auto", None, P5) == torch.float32


def test_the_caller_decides() -> None:
    x = torch.empty(8, 8)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert policy.working_dtype(x, "auto", dtype, P5) == dtype


def test_a_requested_dtype_is_used() -> None:
    known = Known(16, 16, "uniform")
    image = known.image(preset("p5"))
    errors = [
        relative_error(orthogonalize(known.matrix, coefficients="p5", dtype=dtype), image)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    ]
    assert errors[0] < 1e-10 < errors[1] < 1e-5 < errors[2] < errors[3]


@pytest.mark.parametrize(
    ("shape", "form"),
    [
        ((384, 384), "newton_schulz"),
        ((384, 511), "newton_schulz"),
        ((384, 512), "gram"),
        ((512, 384), "gram"),
        ((64, 102), "newton_schulz"),
        ((64, 103), "gram"),
    ],
)
def test_elongated_matrices_take_the_gram_form(shape: tuple[int, int], form: str) -> None:
    assert policy.choose_form(torch.empty(shape), preset("p5"), "float32") == form


def test_no_automatic_gram_form_where_it_is_unstable() -> None:
    x = torch.empty(8, 64)
    assert policy.choose_form(x, preset("p5"), "float16") == "gram"
    assert policy.choose_form(x, preset("p5"), "bfloat16") == "newton_schulz"


def test_auto_is_the_form_that_it_chose() -> None:
    for shape, form in (((24, 30), "newton_schulz"), ((24, 48), "gram")):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(
            orthogonalize(x, coefficients="p5"),
            orthogonalize(x, method=form, coefficients="p5"),  # type: ignore[arg-type]
        )


def test_reduced_float32_products_get_the_guards_of_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert policy.arithmetic(torch.float32, CPU) == "float32"
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert policy.arithmetic(torch.float32, CPU) == "tf32"
        torch.set_float32_matmul_precision("medium")
        monkeypatch.setattr(policy, "cpu_has_fast_bfloat16", lambda: True)
        assert policy.arithmetic(torch.float32, CPU) == "bfloat16"
        monkeypatch.setattr(policy, "cpu_has_fast_bfloat16", lambda: False)
        assert policy.arithmetic(torch.float32, CPU) == "tf32"
        assert policy.arithmetic(torch.float64, CPU) == "float64"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["tf32", "bf16"])
@pytest.mark.parametrize("where", ["backends", "backends.mkldnn", "backends.mkldnn.matmul"])
def test_the_new_settings_are_read_too(where: str, setting: str) -> None:
    # In a process of its own: torch then refuses to tell the old setting, for good.
    script = (
        "import torch\n"
        f"torch.{where}.fp32_precision = '{setting}'\n"
        "from distmuon import Muon\n"
        "from distmuon.orthogonalize import orthogonalize, policy\n"
        "cpu = torch.device('cpu')\n"
        "assert policy.arithmetic(torch.float32, cpu) != 'float32'\n"
        "assert policy.arithmetic(torch.float64, cpu) == 'float64'\n"
        "assert orthogonalize(torch.randn(200, 300)).isfinite().all()\n"
        "weight = torch.nn.Parameter(torch.randn(8, 16))\n"
        "weight.grad = torch.randn(8, 16)\n"
        "Muon([weight]).step()\n"
        "torch.backends.fp32_precision = torch.backends.mkldnn.fp32_precision = 'ieee'\n"
        "torch.backends.mkldnn.matmul.fp32_precision = 'ieee'\n"
        "assert policy.arithmetic(torch.float32, cpu) == 'float32'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_detection_is_a_flag_not_a_measurement() -> None:
    assert policy.cpu_has_fast_bfloat16() is policy.cpu_has_fast_bfloat16()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_dtypes() -> None:
    assert (
        policy.working_dtype(torch.empty(64, 256, device="cuda"), "auto", None, P5) == torch.float16
    )
    assert policy.working_dtype(torch.empty(64, 64, device="cuda"), "auto", None, P5) in (
        torch.bfloat16,
        torch.float16,
    )
    known = Known(64, 256, "condition_1e2")
    out = orthogonalize(known.matrix.float().cuda(), coefficients="p5")
    assert relative_error(out.cpu(), known.image(preset("p5"))) < 1e-2
