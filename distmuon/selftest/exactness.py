"""Checks of what is computed: the update itself, and that sharding it changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from distmuon import CostModel, Muon
from distmuon.selftest.lab import REPORT, Lab, Mismatch, require_same
from distmuon.selftest.problem import (
    MATRICES,
    OTHERS,
    Problem,
    averaged_gradients,
    own_gradients,
    wrapped,
)

STEPS = 4
# Messages that cost nothing: balance alone chooses the owners, so that pieces really travel.
FREE = CostModel(latency=1e-12, bandwidth=1e18, flops=1e9)
# torch.optim.Muon rounds to bfloat16 in every product: 3e-2 of the way a parameter has gone.
_PEER_RTOL = 5e-2


def check_peer(lab: Lab) -> str:
    """One process against torch.optim.Muon.

    Args:
        lab: Where to do it.

    Returns:
        How near they were.

    Raises:
        Mismatch: if they are farther apart than bfloat16 explains.
    """
    start, ours = _trained_by(lab, "ours")
    _, theirs = _trained_by(lab, "torch")
    if lab.sabotage:
        ours = [2 * a - b for a, b in zip(ours, start, strict=True)]
    gaps = [
        float((a - b).norm() / (b - s).norm()) for a, b, s in zip(ours, theirs, start, strict=True)
    ]
    if not max(gaps) <= _PEER_RTOL:
        raise Mismatch(
            expected=f"within {_PEER_RTOL:.0%} of torch.optim.Muon's displacement after {STEPS} "
            "steps (it rounds to bfloat16)",
            seen=f"{max(gaps):.1%} apart",
            remedy="This torch may have other defaults than the tested ones. " + REPORT,
        )
    return (
        f"{STEPS} steps, {max(gaps):.2%} of the displacement apart (bfloat16 there, float32 here)"
    )


def _trained_by(lab: Lab, whose: str) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(48, 48), (32, 96), (96, 32)]
    weights = [torch.randn(shape, generator=generator).to(lab.device) for shape in shapes]
    start = [weight.clone() for weight in weights]
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer: torch.optim.Optimizer
    if whose == "ours":
        optimizer = Muon(
            parameters, lr=2e-2, ns_coefficients="keller", ns_steps=5, ns_dtype="float32"
        )
    else:
        optimizer = torch.optim.Muon(
            parameters, lr=2e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        )
    for _ in range(STEPS):
        for parameter in parameters:
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = grad.to(lab.device)
        optimizer.step()
    return start, [parameter.detach() for parameter in parameters]


def check_parity(lab: Lab) -> str:
    """All ranks against one process, given equal averaged gradients.

    Args:
        lab: The ranks.

    Returns:
        What was compared.

    Raises:
        Mismatch: if a parameter is not that of one process.
    """
    cases = [("flat", torch.float32), ("aligned", torch.float32), ("flat", torch.bfloat16)]
    found = []
    for layout, dtype in cases:
        problem = Problem(lab.device, lab.group, dtype=dtype, layout=layout, cost_model=FREE)
        found.append(problem.train(range(STEPS)))
    if lab.sabotage and lab.is_last:
        found[0]["wide"][0, 0] += 1e-2
    # Compared only when nothing is left to be sent: a rank that stops keeps no other waiting.
    for (layout, dtype), parameters in zip(cases, found, strict=True):
        oracle = Problem(lab.device, None, dtype=dtype).train(range(STEPS))
        require_same(lab, parameters, oracle, f"one process (layout {layout}, {dtype})")
    matrices, others = len(MATRICES), len(OTHERS)
    how = "bitwise" if lab.device.type == "cpu" else "within 1e-4 of"
    return (
        f"{how} one process: {matrices} matrices, {others} others, flat and aligned, fp32 and bf16"
    )


def check_gradients(lab: Lab) -> str:
    """Gradients averaged by DDP, by our hook in DDP, and by our own hooks.

    Args:
        lab: The ranks, each with gradients of its own.

    Returns:
        What was compared.

    Raises:
        Mismatch: if training differs from one process with the known average.
    """
    oracle = Problem(lab.device, None)
    for step in range(STEPS):
        for name, grad in averaged_gradients(lab.world_size, step, lab.device).items():
            oracle.model.get_parameter(name).grad = grad
        oracle.optimizer.step()
    start = Problem(lab.device, None).parameters()
    far = {}
    for reduce in ("ddp", "hook", "owned"):
        far[reduce] = _farthest(lab, reduce, start, oracle.parameters())
    worst = max(far, key=lambda reduce: far[reduce])
    if not far[worst] <= 1e-3:
        raise Mismatch(
            expected=f'reduce="{worst}" within 1e-3 of one process with the average gradient',
            seen=f"{far[worst]:.2g} of the way from the start",
            remedy="Messages are lost or added up wrongly. " + REPORT,
        )
    how_far = f"within {far[worst]:.0e} of" if far[worst] else "exactly as"
    return f"ddp, hook and owned: {how_far} one process with the average"


def _farthest(lab: Lab, reduce: str, start: dict[str, Tensor], oracle: dict[str, Tensor]) -> float:
    problem = Problem(lab.device, lab.group, reduce=reduce)
    with wrapped(problem, lab, reduce) as model:
        for step in range(STEPS):
            problem.optimizer.zero_grad()
            gradients = own_gradients(lab.rank, step, lab.device)
            if lab.sabotage and lab.is_last and reduce == "owned":
                gradients["wide"][0] *= -2
            model(gradients).backward()
            problem.optimizer.step()
    found = problem.parameters()
    return max(
        float((found[name] - value).norm() / (value - start[name]).norm())
        for name, value in oracle.items()
    )


def check_work(lab: Lab) -> str:
    """Every matrix is orthogonalized once per step, by one rank.

    Args:
        lab: The ranks.

    Returns:
        How many, and by whom.

    Raises:
        Mismatch: if the ranks together did less or more.
    """
    problem = Problem(lab.device, lab.group, cost_model=FREE)
    problem.train(range(STEPS))
    report = problem.optimizer.report()
    calls = report.newton_schulz_calls - (1 if lab.sabotage and lab.rank == 0 else 0)
    owned = problem.optimizer.communicator.collect([report.matrices_owned, calls])
    total, expected = sum(done for _, done in owned), STEPS * report.matrices
    if total != expected:
        raise Mismatch(
            expected=f"{report.matrices} matrices x {STEPS} steps = {expected} orthogonalized",
            seen=f"{total}",
        )
    each = ", ".join(str(count) for count, _ in owned)
    return f"{report.matrices} matrices x {STEPS} steps = {total} orthogonalized; per rank {each}"
