"""What must hold on a GPU, as plain functions: `make gpu` calls them, and so does tests/gpu.

Each raises AssertionError. They run on the CPU too, with small sizes, which is how their own logic
is tested where there is no GPU.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from distmuon import Muon, rounding
from distmuon.kernels import elementwise, symmetric
from distmuon.kernels.symmetric import Backend, sym_gemm_norm, symmetric_backend
from distmuon.orthogonalize import orthogonalize
from distmuon.orthogonalize.coefficients import preset
from distmuon.orthogonalize.pipeline import stack_numel
from distmuon.orthogonalize.policy import Method
from distmuon.rounding import Piece, make_key, round_
from tests.unit.orthogonalize.spectra import Known, largest_singular_value, relative_error

FORMS: tuple[tuple[torch.dtype, Method], ...] = (
    (torch.float16, "gram"),
    (torch.bfloat16, "newton_schulz"),
)
HALF = (torch.float16, torch.bfloat16)
# Relative errors to the exact polynomial, docs/numerics.md. bfloat16 cannot tell missing directions
# from its own rounding of the input: there only the largest singular value is bounded.
BOUNDS = {
    (torch.float16, "power_law"): 1e-2,
    (torch.float16, "condition_1e2"): 1e-2,
    (torch.float16, "condition_1e8"): 6e-2,
    (torch.float16, "rank_1"): 0.15,
    (torch.float16, "rank_8"): 0.1,
    (torch.bfloat16, "power_law"): 4e-2,
    (torch.bfloat16, "condition_1e2"): 6e-2,
}
# Parameters' dtype, and the seed of stochastic rounding.
KINDS = ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, 0))
# Few, because each takes kernels that have to be compiled.
ODD_SIZES = ((17, 129), (129, 129), (1000, 3000))
SIZES = ((1, 1), (17, 40), (129, 70), (768, 768), (1000, 3000), (1024, 4096), (2048, 1000))
# Those of which views that start off a boundary, or lie transposed, are tried as well.
ALSO_AS_VIEWS = ((17, 40), (129, 70), (1024, 4096))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill memory that torch hands out without values with NaNs, so that what is left is seen."""
    with warnings.catch_warnings():
        # Nothing else of this mode is wanted, and cuBLAS would like to be told so at the start.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
        try:
            assert bool(torch.ones(1).new_empty(64).isnan().all()), "memory is not filled"
            yield
        finally:
            torch.use_deterministic_algorithms(mode=False)


def products_are_right(device: torch.device, sizes: tuple[tuple[int, int], ...] = SIZES) -> None:
    """Symmetric products by the kernel, any size and alignment, fully written, twice the same."""
    backend: Backend = "triton" if device.type == "cuda" else "torch"
    for dtype in HALF:
        for m, k in sizes:
            x = torch.randn(2, m, k + 3, device=device).to(dtype)
            views = x[..., :k], x[..., 1 : k + 1], x[..., :k].mT.contiguous().mT
            for a in views if (m, k) in ALSO_AS_VIEWS else views[:1]:
                with symmetric_backend(backend), poisoned():
                    product, norm = sym_gemm_norm(a, a.mT)
                    again, _ = sym_gemm_norm(a, a.mT)
                exact = a.double() @ a.double().mT
                error = float((product.double() - exact).norm() / exact.norm())
                assert error < torch.finfo(dtype).eps, (m, k, dtype, error)
                assert torch.equal(product, again), (m, k, dtype)
                size = exact.norm(dim=(-2, -1), keepdim=True)
                # The kernel's norm is that of the sums before they are rounded.
                close = 1e-3 if backend == "triton" else torch.finfo(dtype).eps
                assert float(((norm - size) / size).abs().max()) < close, (m, k, dtype)
                if backend == "triton":
                    assert torch.equal(product, product.mT), (m, k, dtype)
    distrusted = [key for key, trusted in symmetric._trusted.items() if not trusted]
    assert not distrusted, f"kernels that failed their own check: {distrusted}"


def update_rules_are_right(device: torch.device) -> None:
    """The fused elementwise kernels are used, and right."""
    if device.type == "cuda":
        assert elementwise.takes(torch.ones(8, device=device)), "not trusted on this GPU"
        assert elementwise.self_check(device) < 1e-5


def bounds_hold(device: torch.device, m: int = 1024, n: int = 1536) -> None:
    """Both half-precision forms on random, rank-deficient and badly scaled matrices."""
    for kind in ("power_law", "condition_1e2", "condition_1e8", "rank_1", "rank_8"):
        known = Known(m, n, kind)
        image = known.image(preset("p5"))
        for dtype, method in FORMS:
            for scale in (1.0, 2.0**-100, 2.0**100):
                x = (known.matrix * scale).float().to(device)
                with poisoned():
                    update = orthogonalize(x, dtype=dtype, method=method)
                again = orthogonalize(x, dtype=dtype, method=method)
                assert torch.equal(update, again), (kind, dtype)
                assert largest_singular_value(update) < 1.03, (kind, dtype, scale)
                update = update.cpu().double()
                assert float((update * known.matrix).sum()) > 0, (kind, dtype, scale)
                error = relative_error(update, image)
                assert error < BOUNDS.get((dtype, kind), torch.inf), (kind, dtype, error)


def odd_sizes_stay_in_bounds(
    device: torch.device, sizes: tuple[tuple[int, int], ...] = ODD_SIZES
) -> None:
    """Sizes that fill no tile, by the kernel, which `auto` leaves to cuBLAS."""
    backend: Backend = "triton" if device.type == "cuda" else "torch"
    for m, n in sizes:
        known = Known(m, n, "condition_1e2")
        image = known.image(preset("p5"))
        for dtype, method in FORMS:
            with symmetric_backend(backend), poisoned():
                update = orthogonalize(known.matrix.float().to(device), dtype=dtype, method=method)
            error = relative_error(update.cpu().double(), image)
            assert error < BOUNDS[dtype, "condition_1e2"], (m, n, dtype, error)


def batches_are_loops(device: torch.device, m: int = 1024, n: int = 2048) -> None:
    """A stack with a zero and a NaN matrix gives what single matrices give."""
    x = torch.randn(5, m, n, device=device)
    x[1] = 0
    x[3, 0, 0] = torch.nan
    whole = orthogonalize(x)
    for i in range(len(x)):
        torch.testing.assert_close(whole[i], orthogonalize(x[i]), rtol=0, atol=5e-3, equal_nan=True)
    assert not whole[1].any()
    assert bool(whole[3].isnan().all())


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Raise at whatever makes the host wait for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def model_and_optimizer(
    device: torch.device, dim: int, dtype: torch.dtype, seed: int | None = None
) -> tuple[nn.Module, Muon]:
    """A few layers of two shapes, a norm and an embedding."""
    layers = [nn.Linear(dim, dim, bias=False) for _ in range(3)]
    model = nn.Sequential(
        nn.Embedding(64, dim), *layers, nn.Linear(dim, 2 * dim), nn.LayerNorm(2 * dim)
    )
    model = model.to(device=device, dtype=dtype)
    matrices = [p for m in model if isinstance(m, nn.Linear) for p in [m.weight]]
    ids = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [{"params": matrices}, {"params": rest, "algorithm": "adamw"}]
    return model, Muon(groups, lr=1e-3, nonfinite="propagate", stochastic_rounding=seed)


def step_never_waits(device: torch.device, dim: int = 1024) -> None:
    """`step()` makes no host synchronization once kernels are checked and buffers allocated."""
    for dtype, seed in KINDS:
        model, optimizer = model_and_optimizer(device, dim, dtype, seed)
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            if step < 2:
                optimizer.step()
                continue
            with no_waiting(device):
                optimizer.step()
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def two_runs_have_the_same_bits(device: torch.device, dim: int = 1024) -> None:
    """Whole steps, given the same gradients."""
    for dtype, seed in KINDS:
        found = []
        for _ in range(2):
            torch.manual_seed(1)
            model, optimizer = model_and_optimizer(device, dim, dtype, seed)
            for _ in range(3):
                for parameter in model.parameters():
                    parameter.grad = torch.randn_like(parameter)
                optimizer.step()
            found.append([parameter.detach().clone() for parameter in model.parameters()])
        assert all(torch.equal(one, other) for one, other in zip(*found, strict=True)), dtype


def steps_are_those_of_the_cpu(device: torch.device, dim: int = 1024) -> None:
    """Parameters move as on a CPU, within what half precision and the presets differ by."""
    starts, ends = [], []
    for where in (torch.device("cpu"), device):
        torch.manual_seed(2)
        model, optimizer = model_and_optimizer(torch.device("cpu"), dim, torch.float32)
        model.to(where)  # before the first step, which makes the buffers
        starts.append([p.detach().cpu().clone() for p in model.parameters()])
        for _ in range(2):
            for parameter in model.parameters():
                parameter.grad = (1e-9 * torch.randn(parameter.shape)).to(where)
            optimizer.step()
        ends.append([p.detach().cpu() for p in model.parameters()])
    for start, expected, found in zip(starts[0], *ends, strict=True):
        error = float((found - expected).norm() / (expected - start).norm())
        assert error < 0.05, (list(start.shape), error)


def rounding_has_the_bits_of_the_cpu(device: torch.device, count: int = 3_000_017) -> None:
    """Stochastic rounding draws the same bits on every device."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(count, generator=generator)
    value[:3] = torch.tensor([torch.nan, torch.inf, -0.0])
    pieces = [Piece(0, 1000, 5, make_key(0, "a", 1)), Piece(1000, count, 0, make_key(0, "b", 2))]
    expected = torch.empty(count, dtype=torch.bfloat16)
    round_(expected, value, pieces)
    found = torch.empty(count, dtype=torch.bfloat16, device=device)
    if device.type == "cuda":
        assert rounding._takes(value.to(device)), "the kernel is not trusted on this GPU"
    round_(found, value.to(device), pieces)
    assert torch.equal(found.cpu()[1:], expected[1:])
    assert bool(found[0].isnan())


def a_graph_replays_it(device: torch.device, m: int = 1024) -> None:
    """`orthogonalize` can be captured in a CUDA graph; replays give the bits of a plain call."""
    if device.type != "cuda":
        return
    for n in (m, 4 * m):  # the plain form, and that on the Gram matrix
        x = torch.randn(4, m, n, device=device)
        expected = orthogonalize(x)  # checks the kernels, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = orthogonalize(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            expected = orthogonalize(x)
            graph.replay()
            assert torch.equal(captured, expected), n


def memory_is_bounded(device: torch.device, m: int = 2048, n: int = 4096) -> None:
    """A large stack takes its result and a bounded workspace."""
    if device.type != "cuda":
        return
    x = torch.randn(64, m, n, device=device)
    orthogonalize(x[:1])
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = orthogonalize(x)
    peak = torch.cuda.max_memory_allocated() - before - result.numel() * 4
    assert peak <= 12 * stack_numel(device), f"{peak / 2**30:.2f} GiB"


CHECKS: tuple[Callable[[torch.device], None], ...] = (
    products_are_right,
    update_rules_are_right,
    bounds_hold,
    odd_sizes_stay_in_bounds,
    batches_are_loops,
    step_never_waits,
    two_runs_have_the_same_bits,
    steps_are_those_of_the_cpu,
    rounding_has_the_bits_of_the_cpu,
    a_graph_replays_it,
    memory_is_bounded,
)
TINY: dict[str, dict[str, object]] = {
    "products_are_right": {"sizes": ((1, 1), (17, 40))},
    "bounds_hold": {"m": 24, "n": 40},
    "batches_are_loops": {"m": 12, "n": 20},
    "odd_sizes_stay_in_bounds": {"sizes": ODD_SIZES[:2]},
    "step_never_waits": {"dim": 16},
    "two_runs_have_the_same_bits": {"dim": 16},
    "steps_are_those_of_the_cpu": {"dim": 16},
    "rounding_has_the_bits_of_the_cpu": {"count": 2000},
}
"""Sizes for a run on the CPU."""


def run_check(check: Callable[..., None], device: torch.device) -> None:
    """Call a check, with small sizes on the CPU.

    Args:
        check: One of `CHECKS`.
        device: Where to run it.
    """
    check(device, **(TINY.get(check.__name__, {}) if device.type == "cpu" else {}))


def newton_schulz_flops(m: int, n: int, count: int) -> float:
    """FLOPs of five p5 steps with symmetric products at half: the less of both forms.

    Args:
        m: Shorter side.
        n: Longer side.
        count: Matrices.
    """
    gram = 6 * m**2 * n + 14 * m**3
    plain = 5 * (3 * m**2 * n + m**3)
    return float(count * min(gram, plain))
