"""Combinations that are known to be wrong, slow or untested, each with its cure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from distmuon.cli.doctor_facts import Facts

# "problem": does not work. "warning": works, but slowly, or nobody has tried. "note": good to know.
Level = Literal["problem", "warning", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a machine that its user should know.

    Attributes:
        level: How bad it is.
        what: What is so.
        cure: What to do, or why nothing needs to be done.
    """

    level: Level
    what: str
    cure: str


Rule = Callable[[Facts], Iterator[Finding]]

OLDEST_TORCH = (2, 9)
TESTED_TORCH = ((2, 9), (2, 13), (2, 15))
OLDEST_DEEPSPEED = (0, 19)
TESTED_DEEPSPEED = "0.19.8"
# As in pyproject.toml, which a test compares: from the first version to below the second.
TESTED = {"accelerate": ((1, 15), (1, 16)), "transformers": ((5, 23), (5, 24))}


def numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version: (2, 13) of "2.13.0+cpu"; none of "unknown"."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def torch_version(facts: Facts) -> Iterator[Finding]:
    """Only releases with torch.optim.Muon are supported."""
    version = facts.versions["torch"]
    if numbers(version) < OLDEST_TORCH:
        yield Finding("problem", f"torch {version} is older than 2.9.", "pip install -U torch")
    elif numbers(version) not in TESTED_TORCH:
        yield Finding(
            "warning",
            f"torch {version} has not been tested: 2.9.0, 2.13.0 and 2.15.0 have.",
            "Run `distmuon verify`.",
        )


def numpy(facts: Facts) -> Iterator[Finding]:
    """What torch sends objects between ranks with, and does not ask for."""
    if not facts.versions["numpy"]:
        yield Finding(
            "problem",
            "numpy is missing: several ranks cannot compare their plans.",
            "pip install numpy",
        )


def deepspeed_version(facts: Facts) -> Iterator[Finding]:
    """Older versions average gradients wrongly in some stages."""
    version = facts.versions["deepspeed"]
    if version and numbers(version) < OLDEST_DEEPSPEED:
        yield Finding(
            "problem",
            f"DeepSpeed {version} is older than 0.19: some versions before it average gradients "
            "wrongly (0.17.6 and 0.18.2: ZeRO-2 with accumulation) or stop (0.18.9: ZeRO-1 on "
            "torch 2.13 with gloo), with any optimizer.",
            "pip install -U deepspeed",
        )
    elif version and version.partition("+")[0] != TESTED_DEEPSPEED:
        yield Finding(
            "warning",
            f"DeepSpeed {version} has not been tested: {TESTED_DEEPSPEED} has.",
            "Compare a short run with one process.",
        )


def framework_versions(facts: Facts) -> Iterator[Finding]:
    """The adapters use private members of both."""
    for name, (first, beyond) in TESTED.items():
        version = facts.versions[name]
        if version and not first <= numbers(version) < beyond:
            low, high = (".".join(map(str, v)) for v in (first, beyond))
            yield Finding(
                "warning",
                f"{name} {version} is outside of the tested versions, {low} to below {high}.",
                f"pip install '{name}>={low},<{high}', if you use distmuon with {name}.",
            )


def threads(facts: Facts) -> Iterator[Finding]:
    """Each rank takes all cores unless told otherwise."""
    here = int(facts.variables.get("LOCAL_WORLD_SIZE", "1"))
    if facts.threads * here > facts.cores:
        yield Finding(
            "warning",
            f"{here} ranks of {facts.threads} threads on {facts.cores} cores.",
            f"Set OMP_NUM_THREADS={max(facts.cores // here, 1)}.",
        )
    elif "OMP_NUM_THREADS" not in facts.variables and not facts.gpus:
        yield Finding(
            "note",
            f"OMP_NUM_THREADS is not set: every process takes {facts.threads} threads.",
            "torchrun sets it to 1. With another launcher set it to the cores per rank: ranks that "
            "share cores slow each other down many times.",
        )


def bfloat16(facts: Facts) -> Iterator[Finding]:
    """CPUs without bf16 instructions emulate them."""
    if not facts.bfloat16 and not facts.gpus:
        yield Finding(
            "warning",
            "This CPU has no bfloat16 products (AVX512-BF16 or AMX) that torch uses.",
            "distmuon computes Newton-Schulz in float32 by itself; do not set ns_dtype=bfloat16. "
            "torch.optim.Muon always casts to bfloat16 and is many times slower here.",
        )


def gloo(facts: Facts) -> Iterator[Finding]:
    """What is known of the CPU backend."""
    if facts.gpus:
        return
    if not facts.named and "GLOO_SOCKET_IFNAME" not in facts.variables:
        yield Finding(
            "problem",
            "The name of this machine cannot be looked up, which gloo does to find its address.",
            "Set GLOO_SOCKET_IFNAME to a network interface: lo on one machine (see `ip link`).",
        )
    yield Finding(
        "note",
        "gloo's reduce_scatter sends as much as an all-reduce.",
        "distmuon does not use it: reduce='hook' and 'owned' send each rank its range only.",
    )


def gpus(facts: Facts) -> Iterator[Finding]:
    """GPUs that cannot be used, or only in part."""
    if facts.gpus and "nccl" not in facts.backends:
        yield Finding(
            "problem", "GPUs, but no nccl in this torch.", "Install a CUDA build of torch."
        )
    if facts.cuda and not facts.gpus:
        yield Finding(
            "warning",
            f"torch is built for CUDA {facts.cuda} and sees no GPU.",
            "Look at `nvidia-smi` and CUDA_VISIBLE_DEVICES; without a GPU everything runs on gloo.",
        )
    if any(gpu.capability < (8, 0) for gpu in facts.gpus):
        yield Finding(
            "note",
            "A GPU older than Ampere has no bfloat16.",
            "Newton-Schulz takes float16 there by itself.",
        )
    if facts.gpus:
        yield Finding(
            "warning", "distmuon's own tests run on CPUs.", "Run `distmuon verify` on these GPUs."
        )


def precision(facts: Facts) -> Iterator[Finding]:
    """A setting that changes float32 products."""
    if facts.matmul != "ieee":
        yield Finding(
            "note",
            f"float32 products may be computed in {facts.matmul}: torch is set to it.",
            "Newton-Schulz keeps to the limits of the lower precision (docs/numerics.md).",
        )


def optional(facts: Facts) -> Iterator[Finding]:
    """Packages without which a part of distmuon cannot be used."""
    if not facts.versions["safetensors"]:
        yield Finding(
            "note", "No checkpoints without safetensors.", "pip install 'distmuon[checkpoint]'"
        )
    missing = [name for name in ("omegaconf", "PyYAML", "matplotlib") if not facts.versions[name]]
    if missing:
        yield Finding(
            "note",
            f"`distmuon train` needs {', '.join(missing)}.",
            "pip install 'distmuon[train]'",
        )


def errors(facts: Facts) -> Iterator[Finding]:
    """Settings that let a job hang."""
    if facts.variables.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        yield Finding(
            "warning",
            "TORCH_NCCL_ASYNC_ERROR_HANDLING=0: a collective that a dead rank left does not end.",
            "Unset it.",
        )


RULES: tuple[Rule, ...] = (
    torch_version,
    numpy,
    deepspeed_version,
    framework_versions,
    gpus,
    gloo,
    threads,
    bfloat16,
    precision,
    errors,
    optional,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Apply every rule.

    Args:
        facts: Of the machine.

    Returns:
        What was found, the worst first.
    """
    order: tuple[Level, ...] = ("problem", "warning", "note")
    found = [finding for rule in RULES for finding in rule(facts)]
    return sorted(found, key=lambda finding: order.index(finding.level))
