"""What `distmuon doctor` reports: facts about this machine, its packages and its settings."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from importlib import metadata

PACKAGES = (
    "distmuon",
    "torch",
    "safetensors",
    "omegaconf",
    "PyYAML",
    "rich",
    "numpy",
    "matplotlib",
    "accelerate",
    "transformers",
    "peft",
    "deepspeed",
)
# What torch, gloo, nccl, OpenMP, the launchers and DeepSpeed read. Addresses and host names are
# left out: a report is to be pasted.
VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "GLOO_SOCKET_IFNAME",
    "NCCL_SOCKET_IFNAME",
    "NCCL_DEBUG",
    "NCCL_IB_DISABLE",
    "NCCL_P2P_DISABLE",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "TORCH_DISTRIBUTED_DEBUG",
    "TORCHDYNAMO_DISABLE",
    "ONEDNN_MAX_CPU_ISA",
    "DS_ACCELERATOR",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that torch sees.

    Attributes:
        name: As its driver calls it.
        capability: Compute capability, such as (9, 0).
        bytes: Its memory.
    """

    name: str
    capability: tuple[int, int]
    bytes: int


@dataclass(frozen=True, slots=True)
class Facts:
    """A machine as distmuon sees it.

    Attributes:
        python: Version of Python.
        system: Operating system and processor type.
        versions: Version by package; empty for what is not installed.
        cores: Cores that this process may use.
        threads: Threads that torch takes for one product.
        cpu: Instructions that torch uses, such as "AVX512".
        bfloat16: Whether this CPU multiplies bfloat16 in hardware.
        matmul: What float32 products may be computed in: "ieee", "tf32" or "bf16".
        cuda: CUDA (or ROCm) version that torch was built for; empty for a CPU build.
        nccl: Version of nccl; empty without.
        gpus: What torch sees.
        backends: Of torch.distributed that are built in.
        named: Whether this machine's own name can be looked up, as gloo does.
        variables: Those of `VARIABLES` that are set.
    """

    python: str
    system: str
    versions: dict[str, str]
    cores: int
    threads: int
    cpu: str
    bfloat16: bool
    matmul: str
    cuda: str
    nccl: str
    gpus: tuple[Gpu, ...]
    backends: tuple[str, ...]
    named: bool
    variables: dict[str, str]


def gather_facts() -> Facts:
    """Look around. Nothing is computed or sent, but a GPU's driver is asked."""
    import torch
    import torch.distributed as dist

    from distmuon.orthogonalize.policy import cpu_has_fast_bfloat16, float32_products
    from distmuon.training.config import environment

    available = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    versions = {name: _version(name) for name in PACKAGES}
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        # With the build, such as 2.13.0+cpu.
        versions={**versions, "torch": torch.__version__},
        cores=_cores(),
        threads=torch.get_num_threads(),
        cpu=torch.backends.cpu.get_cpu_capability(),
        bfloat16=cpu_has_fast_bfloat16(),
        matmul=float32_products(torch.device("cuda" if torch.cuda.device_count() else "cpu")),
        cuda=torch.version.cuda or torch.version.hip or "",
        nccl=_nccl_version(),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())),
        backends=tuple(name for name, there in available.items() if there),
        named=_can_be_looked_up(),
        variables=environment(*VARIABLES),
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        if package != "distmuon":
            return ""
    from distmuon.version import __version__

    return f"{__version__} (not installed: run from its folder)"


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))  # what a container or Slurm leaves of them
    except AttributeError:
        return os.cpu_count() or 1


def _nccl_version() -> str:
    import torch

    if not torch.cuda.is_available() or not torch.distributed.is_nccl_available():
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return Gpu(properties.name, (properties.major, properties.minor), properties.total_memory)


def _can_be_looked_up() -> bool:
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        return False
    return True
