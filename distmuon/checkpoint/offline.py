"""Checkpoints without ranks: verified, cut anew, joined into one file. One process, no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from distmuon.buckets import BucketSpec, specify
from distmuon.checkpoint.completion import Completion
from distmuon.checkpoint.errors import CheckpointError
from distmuon.checkpoint.files import (
    Reader,
    check_content,
    check_sizes,
    dtype_of,
    require_safetensors,
    write_file,
)
from distmuon.checkpoint.folders import claim
from distmuon.checkpoint.manifest import (
    Manifest,
    merge_pieces,
    read_manifest,
)
from distmuon.checkpoint.parts import Part, PartBuilder
from distmuon.errors import see
from distmuon.options import Policy

Contents = Literal["all", "model", "optimizer"]
TorchOptimizer = Literal["muon", "adamw"]
# What torch's optimizers can be told; the rest of a group has no counterpart there.
_TORCH_KEYS = {
    "muon": ("lr", "weight_decay", "momentum", "nesterov", "adjust_lr_fn"),
    "adamw": ("lr", "weight_decay", "betas", "eps"),
}
_TORCH_STATE = {"muon": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}


def verify(path: str | Path) -> Manifest:
    """Read everything in a checkpoint and compare it with the manifest.

    Args:
        path: The checkpoint's folder.

    Returns:
        Its manifest.

    Raises:
        CheckpointError: naming every file that is damaged.
    """
    require_safetensors()
    folder = Path(path)
    manifest = read_manifest(folder)
    check_sizes(folder, manifest)
    problems = []
    for index in range(len(manifest.files)):
        try:
            check_content(folder, manifest, index)
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError("\n".join(problems))
    return manifest


def reshard(path: str | Path, out: str | Path, world_size: int) -> Path:
    """Write a checkpoint as if `world_size` ranks had saved it. Memory: one new shard at a time.

    Loading does not need it, since any number of ranks loads any checkpoint; it evens out the
    files. The tensors that each rank had stored for itself cannot be cut, and are left out.

    Args:
        path: The checkpoint's folder.
        out: The new one's.
        world_size: Number of ranks.

    Returns:
        The new folder.

    Raises:
        CheckpointError: if the checkpoint is damaged or the new one cannot be written.
        ValueError: for `world_size` below 1.
    """
    if world_size < 1:
        raise ValueError(f"Invalid {world_size=}. Must be >= 1." + see("bad-option"))
    manifest = verify(path)
    target = Path(out).absolute()
    if target.resolve() == Path(path).resolve():
        raise CheckpointError(
            f"{out} is the checkpoint itself. Write to another folder.",
            entry="checkpoint-not-written",
        )
    reader = Reader(Path(path), manifest)
    specs = _specify(manifest, world_size)
    workplace = claim(target)
    try:
        files, tables = [], []
        for rank in range(world_size):
            part = _cut(reader, manifest, specs, rank)
            files.append(part.write(workplace.path))
            tables.append(part.shared)
        changed = replace(
            manifest,
            world_size=world_size,
            plan_digest="",
            tensors=merge_pieces(tables),
            rank_tensors=None,
            files=(),
        )
        Completion(workplace, changed, None).run(files)
    except BaseException:
        workplace.discard()
        raise
    return target


def consolidate(path: str | Path, out: str | Path, contents: Contents = "all") -> Path:
    """Join a checkpoint into one safetensors file of whole tensors. Memory: all of them.

    Args:
        path: The checkpoint's folder.
        out: The file to write.
        contents: "model" under the bare FQNs, as `model.load_state_dict` wants them; "optimizer"
            or "all" under the manifest's names. Groups, steps and metadata go into the header.

    Returns:
        The file.

    Raises:
        CheckpointError: if the checkpoint is damaged, has no such contents, or the file cannot be
            written.
    """
    manifest = verify(path)
    reader = Reader(Path(path), manifest)
    prefix = "" if contents == "all" else f"{contents}/"
    names = [name for name in manifest.tensors if name.startswith(prefix)]
    if not names:
        raise CheckpointError(
            f"{path} holds no {contents}; it holds {sorted(manifest.kinds())}.",
            entry="checkpoint-mismatch",
        )
    drop = prefix if contents == "model" else ""
    tensors = {name.removeprefix(drop): reader.whole(name) for name in names}
    steps = {name: each.step for name, each in manifest.parameters.items()}
    header = {"metadata": manifest.metadata, "groups": manifest.groups, "steps": steps}
    return _write(Path(out), tensors, {"distmuon": json.dumps(header)})


def export(path: str | Path, out: str | Path, optimizer: TorchOptimizer) -> Path:
    """Write the state of one algorithm for torch's own optimizer, without pickle.

    `read_export` turns the file into what `torch.optim.Muon` or `torch.optim.AdamW` loads. The
    Newton-Schulz coefficients stay torch's: it knows one triple for all steps.

    Args:
        path: The checkpoint's folder.
        out: The file to write.
        optimizer: "muon" or "adamw".

    Returns:
        The file.

    Raises:
        CheckpointError: if the checkpoint is damaged, has no such parameters, or a group has a
            scaling that torch does not know.
    """
    manifest = verify(path)
    reader = Reader(Path(path), manifest)
    groups: list[dict[str, Any]] = []
    for index, saved in enumerate(manifest.groups):
        names = [n for n, each in manifest.parameters.items() if each.group == index]
        if not names or saved["algorithm"] != optimizer:
            continue
        if saved.get("blocks") is not None:
            raise CheckpointError(
                f"Group {index} has blocks={saved['blocks']}; torch.optim.Muon would orthogonalize "
                "its matrices whole."
            )
        options = {key: saved[key] for key in _TORCH_KEYS[optimizer]}
        if optimizer == "muon":
            options["adjust_lr_fn"] = _torch_scaling(saved["adjust_lr_fn"], index)
        groups.append({**options, "params": names})
    if not groups:
        raise CheckpointError(
            f"{path} holds no parameters with algorithm={optimizer!r}.", entry="checkpoint-mismatch"
        )
    tensors: dict[str, Tensor] = {}
    for name in (name for group in groups for name in group["params"]):
        for state in _TORCH_STATE[optimizer]:
            tensors[f"{state}/{name}"] = reader.whole(f"optimizer/{state}/{name}")
        tensors[f"step/{name}"] = torch.tensor(float(manifest.parameters[name].step))
    return _write(Path(out), tensors, {"optimizer": optimizer, "param_groups": json.dumps(groups)})


def read_export(path: str | Path) -> dict[str, Any]:
    """What `load_state_dict` of torch.optim.Muon or torch.optim.AdamW takes, from `export`.

    Args:
        path: The exported file.

    Returns:
        A state dictionary; its parameters are in the order of the saved groups, and
        "param_names" has their FQNs.

    Raises:
        CheckpointError: if it is no such file, or a group has a scaling that this torch does not
            know, as a file from a newer one may.
    """
    from safetensors import SafetensorError, safe_open

    require_safetensors()
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        kind, groups = header["optimizer"], json.loads(header["param_groups"])
        defaults = _torch_defaults(kind)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no file of `distmuon ckpt export`: {error!r}", entry="checkpoint-mismatch"
        ) from error
    state: dict[int, dict[str, Tensor]] = {}
    param_groups = []
    for index, group in enumerate(groups):
        if kind == "muon":
            _torch_scaling(group["adjust_lr_fn"], index)
        names, first = group.pop("params"), len(state)
        for number, name in enumerate(names, first):
            state[number] = {key: tensors[f"{key}/{name}"] for key in _TORCH_STATE[kind]}
            if kind == "adamw":
                state[number]["step"] = tensors[f"step/{name}"]
        numbers = list(range(first, first + len(names)))
        param_groups.append({**defaults, **group, "params": numbers, "param_names": names})
    return {"state": state, "param_groups": param_groups}


def _write(out: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Path:
    partial = out.with_name(f".{out.name}.part")
    try:
        write_file(partial, tensors, header)
        partial.replace(out)
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error}", entry="checkpoint-not-written"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return out


def _torch_defaults(kind: str) -> dict[str, Any]:
    # From the installed torch itself: later versions add keys.
    made: torch.optim.Optimizer
    if kind == "muon":
        made = torch.optim.Muon([torch.zeros(1, 1)])
    else:
        made = torch.optim.AdamW([torch.zeros(1)])
    return {key: value for key, value in made.param_groups[0].items() if key != "params"}


def _torch_scaling(adjust_lr_fn: Any, index: int) -> str:
    """The installed torch's name of a scaling.

    torch.optim.Muon checks the name only when it is made. One from a state dictionary that it does
    not know is no error there: it scales by 1.
    """
    name: str = "spectral_unclamped" if adjust_lr_fn == "mup" else adjust_lr_fn
    try:
        torch.optim.Muon([torch.zeros(1, 1)], adjust_lr_fn=name)
    except ValueError as error:
        raise CheckpointError(
            f"Group {index} has adjust_lr_fn={adjust_lr_fn!r}, which torch.optim.Muon of torch "
            f"{torch.__version__} does not know.",
            entry="checkpoint-mismatch",
        ) from error
    return name


def _specify(manifest: Manifest, world_size: int) -> list[BucketSpec]:
    # The planner wants parameters; shape and dtype are all that it looks at.
    names: dict[Tensor, str] = {}
    groups: list[dict[str, Any]] = [{**group, "params": []} for group in manifest.groups]
    for name, entry in manifest.parameters.items():
        parameter = torch.empty(entry.shape, dtype=dtype_of(entry.dtype), device="meta")
        names[parameter] = name
        groups[entry.group]["params"].append(parameter)
    return specify(groups, names, world_size, Policy())


def _cut(reader: Reader, manifest: Manifest, specs: list[BucketSpec], rank: int) -> Part:
    found = PartBuilder(rank)
    for name, start, numel in _ranges(manifest, specs, rank):
        entry = manifest.tensors[name]
        flat = torch.empty(numel, dtype=dtype_of(entry.dtype))
        reader.read_into(name, start, flat)
        found.add(name, entry, start, flat)
    return found.finish()


def _ranges(
    manifest: Manifest, specs: list[BucketSpec], rank: int
) -> Iterator[tuple[str, int, int]]:
    """Name, start and length of everything that a rank holds."""
    cut: set[str] = set()
    for spec in specs:
        for state in (None, *spec.states, "master"):
            kind = "model" if state is None else f"optimizer/{state}"
            cut |= {f"{kind}/{fqn}" for fqn in spec.names}
            for segment in spec.places(state or "master").segments(rank):
                name = f"{kind}/{spec.names[segment.tensor]}"
                if name in manifest.tensors:
                    yield name, segment.tensor_start, segment.numel
    if rank == 0:
        yield from ((n, 0, each.numel) for n, each in manifest.tensors.items() if n not in cut)
