"""distmuon inside DeepSpeed beside DeepSpeed's own Muon, in one run on two gloo ranks.

Both get the same update rule (Keller Jordan's: his coefficients, sqrt(max(1, rows/cols)) as scale,
Nesterov), the same groups, gradients and clipping at 1.0, and are compared with that rule in one
process; "distmuon, default rule" is compared with its own. They take turns, so that a change in the
machine's speed meets all, and each round gives a ratio to "built-in gram" of the same round. JSON
lines tell the milliseconds and CPU milliseconds of a step (forward, backward, update: the built-in
orthogonalizes in backward), medians of those ratios with the lowest and the highest, bytes sent per
rank and step in units of the weights, momentum bytes per rank over the ideal 1/N, and the distance
from the exact weights beside how far they moved.

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed
    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 benchmarks/deepspeed_muon.py
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from distmuon import Muon, build_param_groups
from distmuon.deepspeed import from_model

LR, DECAY, CLIP = 0.02, 0.1, 1.0
KINDS = (
    "distmuon",
    "distmuon, to owners",
    "distmuon, default rule",
    "built-in gram",
    "built-in standard",
)
KELLER: dict[str, Any] = {
    "ns_coefficients": "keller",
    "adjust_lr_fn": "original",
    "ns_dtype": "float32",
}


class Net(nn.Module):
    """Matrices of a transformer's shapes, and an embedding, a head, biases and a norm for AdamW."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, dim)
        shapes = [(dim, dim)] * 4 + [(4 * dim, dim), (dim, 4 * dim)]
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Linear(cols, rows) for rows, cols in shapes) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [b, t] to logits [b, t, 256]; attention is left out, the forward is to be tiny."""
        x = self.embed(tokens)
        for q, k, v, o, up, down in self.layers:
            x = x + o(torch.tanh(q(x)) * torch.tanh(k(x)) + v(x))
            x = x + down(torch.relu(up(x)))
        return self.lm_head(self.norm(x))


class CountBytes(TorchDispatchMode):
    """Payload that one rank must send at least for each collective, by the ring algorithm."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        if func.namespace == "c10d":
            self.sent += _payload(name.partition(".")[0], args)
        return func(*args, **(kwargs or {}))


def _payload(name: str, args: Any) -> float:
    share = 1 - 1 / dist.get_world_size()
    if name in ("allreduce_", "reduce_", "broadcast_", "allgather_"):
        tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
        flat = [
            t for each in tensors for t in (each if isinstance(each, (list, tuple)) else [each])
        ]
        size = sum(t.numel() * t.element_size() for t in flat)
        return size * share * (2 if name == "allreduce_" else 1)
    if name in ("_allgather_base_", "_reduce_scatter_base_"):
        whole = args[0] if name == "_allgather_base_" else args[1]
        return whole.numel() * whole.element_size() * share
    if name == "alltoall_base_":
        send, splits = args[1], args[4]
        kept = splits[dist.get_rank()] if splits else send.numel() // dist.get_world_size()
        return (send.numel() - kept) * send.element_size()
    return 0.0


def make_model(options: argparse.Namespace) -> Net:
    """The same weights for every kind."""
    torch.manual_seed(0)
    return Net(options.layers, options.dim)


def batch(step: int, rank: int) -> Tensor:
    """A rank's tokens [4, 33] of a step."""
    generator = torch.Generator().manual_seed(step * 10 + rank)
    return torch.randint(256, (4, 33), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Cross-entropy, and a push in random directions.

    Without it gradients are nearly singular, and orthogonalization makes the rounding errors in
    their empty directions as large as everything else: nothing could be compared closely.
    """
    loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    generator = torch.Generator().manual_seed(int((tokens * torch.arange(33)).sum()))
    for name, p in model.named_parameters():
        if p.dim() == 2 and name.startswith("layers"):
            loss = loss + (p * torch.randn(p.shape, generator=generator)).sum() / 20
    return loss


def config_of(kind: str) -> dict[str, Any]:
    """DeepSpeed's configuration of a kind."""
    zero: dict[str, Any] = {"stage": 1}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
    }
    if kind.startswith("built-in"):
        params = {"lr": LR, "momentum": 0.95, "weight_decay": DECAY, "betas": [0.9, 0.95]}
        own = {"ns_method": kind.partition(" ")[2], "torch_adam": True}
        config["optimizer"] = {"type": "Muon", "params": {**params, **own}}
    elif kind != "distmuon":
        zero["use_multi_rank_bucket_allreduce"] = False
    return config


def rule_of(kind: str) -> dict[str, Any]:
    """The options of a kind's update rule."""
    return {} if kind == "distmuon, default rule" else KELLER


def run(kind: str, options: argparse.Namespace, exact: Mapping[str, Tensor]) -> dict[str, Any]:
    """One kind's steps on this rank, measured."""
    import deepspeed

    model = make_model(options)
    begin = {name: p.detach().clone() for name, p in model.named_parameters()}
    ours = kind.startswith("distmuon")
    rule = rule_of(kind)
    optimizer = from_model(model, lr=LR, weight_decay=DECAY, decay="all", **rule) if ours else None
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        optimizer=optimizer,
        config=config_of(kind),
    )
    wall, cpu = [], []
    counter = CountBytes()
    for step in range(options.steps):
        dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        engine.backward(loss_of(engine.module, batch(step, dist.get_rank())))
        engine.step()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - began_cpu)
    trained = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    with counter:  # one more, whose time does not count
        engine.backward(loss_of(engine.module, batch(options.steps, dist.get_rank())))
        engine.step()
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith("layers")]
    far = max(float((trained[n] - exact[n]).abs().max()) for n in matrices)
    moved = max(float((begin[n] - exact[n]).abs().max()) for n in matrices)
    weights = sum(p.numel() * 4 for p in model.parameters())
    ideal = sum(p.numel() * 4 for n, p in model.named_parameters() if n in matrices)
    held = _momentum_bytes(engine)
    engine.destroy()
    return {
        "kind": kind,
        "ms": round(1e3 * statistics.median(wall[2:]), 1),
        "cpu_ms": round(1e3 * statistics.median(cpu[2:]), 1),
        "sent_over_weights": round(counter.sent / weights, 3),
        "momentum_over_ideal": round(held * dist.get_world_size() / ideal, 3),
        "max_distance": far,
        "max_moved": moved,
    }


def _momentum_bytes(engine: Any) -> int:
    states = engine.basic_optimizer.state.values()
    kept = [state["momentum_buffer"] for state in states if "momentum_buffer" in state]
    staged = getattr(engine.optimizer, "_muon_pending_momentum", {}).values()
    return sum(t.numel() * t.element_size() for t in [*kept, *(entry[0] for entry in staged)])


def exact_weights(options: argparse.Namespace, rule: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same steps in one process, by the same rule."""
    model = make_model(options)
    groups = build_param_groups(model, weight_decay=DECAY, decay="all")
    optimizer = Muon(groups, lr=LR, **rule)
    for step in range(options.steps):
        for rank in range(dist.get_world_size()):
            (loss_of(model, batch(step, rank)) / dist.get_world_size()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def ratio_of(times: Sequence[float], peer: Sequence[float]) -> list[float]:
    """Median, lowest and highest ratio over the rounds."""
    ratios = sorted(mine / other for mine, other in zip(times, peer, strict=True))
    return [round(x, 3) for x in (statistics.median(ratios), ratios[0], ratios[-1])]


def main() -> None:
    """Run every kind and print a JSON line for each rank."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled for a benchmark
    deepspeed.init_distributed(verbose=False)
    exact = {kind: exact_weights(options, rule_of(kind)) for kind in (KINDS[0], KINDS[2])}
    runs = [
        {kind: run(kind, options, exact.get(kind, exact[KINDS[0]])) for kind in KINDS}
        for _ in range(options.rounds)
    ]
    load = os.getloadavg()[0]
    for kind in KINDS:
        times = {key: [row[kind][key] for row in runs] for key in ("ms", "cpu_ms")}
        peer = {key: [row["built-in gram"][key] for row in runs] for key in times}
        best = {key: min(values) for key, values in times.items()}
        ratios = {f"{key}_ratio": ratio_of(times[key], peer[key]) for key in times}
        mine: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(mine, {**runs[0][kind], **best, **ratios})
        if dist.get_rank() == 0:
            versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__}
            rest = {**vars(options), **versions, "load": load}
            for rank, row in enumerate(mine):
                print(json.dumps({**row, "rank": rank, **rest}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
