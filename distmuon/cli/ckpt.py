"""`distmuon ckpt`: look at checkpoints, check them, cut them anew, take them elsewhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmuon.cli.output import BROKEN, DONE, CommandError, add_json_option, positive, print_json

if TYPE_CHECKING:
    from distmuon.checkpoint.manifest import Manifest

_EXAMPLES = """\
examples:
  distmuon ckpt inspect runs/x/checkpoints/step-00000100
  distmuon ckpt verify  runs/x/checkpoints
  distmuon ckpt consolidate runs/x/checkpoints/step-00000100 model.safetensors --only model
  distmuon ckpt reshard runs/x/checkpoints/step-00000100 step-100-on-8 --ranks 8
  distmuon ckpt export  runs/x/checkpoints/step-00000100 muon.safetensors --optimizer muon

PATH is a checkpoint, or a folder of checkpoints, of which the newest whole one is taken. Those of
distmuon.deepspeed.save are checkpoints like the others; DeepSpeed's own are not.

exit codes: 0 done, 1 the checkpoint is broken or cannot be written, 2 wrong usage"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `ckpt` and its own commands.

    Args:
        commands: Of `distmuon`.
    """
    ckpt = commands.add_parser(
        "ckpt",
        help="inspect, verify, consolidate, reshard or export checkpoints",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = ckpt.add_subparsers(metavar="ACTION", required=True)
    _add(actions, "inspect", _inspect, "say what is in a checkpoint; reads the manifest only")
    _add(actions, "verify", _verify, "read every file and compare it with the manifest")
    parser = _add(actions, "consolidate", _consolidate, "join it into one safetensors file")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--only", choices=("model", "optimizer"), help="default: everything")
    parser = _add(actions, "reshard", _reshard, "write it as if so many ranks had saved it")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write")
    parser.add_argument("--ranks", type=positive, required=True, help="number of ranks")
    parser = _add(actions, "export", _export, "write a file for torch's own optimizer")
    parser.add_argument("out", metavar="OUT", type=Path, help="the file to write")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), required=True)


def _add(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    action: Callable[[Path, argparse.Namespace], dict[str, Any]],
    what: str,
) -> argparse.ArgumentParser:
    parser = actions.add_parser(
        name,
        help=what,
        description=what,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", type=Path, help="a checkpoint, or a folder of them")
    add_json_option(parser)
    parser.set_defaults(run=_run, action=action)
    return parser


def _run(options: argparse.Namespace) -> int:
    from distmuon.checkpoint import CheckpointError

    if not options.path.is_dir():
        raise CommandError(f"{options.path} is no folder")
    try:
        answer = options.action(_resolve(options.path), options)
    except CheckpointError as error:
        raise CommandError(str(error), code=BROKEN) from error
    if options.json:
        print_json(answer)
    else:
        for key, value in answer.items():
            print(f"{key:<12} {_say(value)}")
    return DONE


def _resolve(path: Path) -> Path:
    from distmuon import checkpoint
    from distmuon.checkpoint.manifest import MANIFEST

    if (path / MANIFEST).exists():
        return path
    newest = checkpoint.latest(path)
    if newest is None and (_is_deepspeeds(path) or any(map(_is_deepspeeds, _folders(path)))):
        raise CommandError(
            f"{path} is a checkpoint of DeepSpeed's own, from engine.save_checkpoint: load it with "
            "engine.load_checkpoint or distmuon.deepspeed.load_resharded. These commands read what "
            "distmuon.deepspeed.save writes.",
            entry="deepspeed",
        )
    return path if newest is None else newest


def _is_deepspeeds(path: Path) -> bool:
    return any(path.glob("*_optim_states.pt"))


def _folders(path: Path) -> Iterator[Path]:
    return (each for each in path.iterdir() if each.is_dir())


def _inspect(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    from distmuon.checkpoint.files import check_sizes
    from distmuon.checkpoint.manifest import read_manifest

    manifest = read_manifest(path)
    check_sizes(path, manifest)
    return _summary(path, manifest) | {
        "metadata": dict(manifest.metadata),
        "groups": [dict(group) for group in manifest.groups],
        "files": {entry.name: entry.size for entry in manifest.files},
    }


def _verify(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    from distmuon import checkpoint

    manifest = checkpoint.verify(path)
    total = sum(entry.size for entry in manifest.files)
    return {"path": str(path), "verified": f"{len(manifest.files)} files, {total:,} bytes"}


def _consolidate(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    from distmuon import checkpoint

    written = checkpoint.consolidate(path, options.out, options.only or "all")
    return {"path": str(path), "written": str(written), "bytes": written.stat().st_size}


def _reshard(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    from distmuon import checkpoint
    from distmuon.checkpoint.manifest import read_manifest

    written = checkpoint.reshard(path, options.out, options.ranks)
    return _summary(written, read_manifest(written))


def _export(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    from distmuon import checkpoint

    written = checkpoint.export(path, options.out, options.optimizer)
    return {
        "path": str(path),
        "written": str(written),
        "load with": f"load_state_dict(distmuon.checkpoint.read_export({str(written)!r}))",
    }


def _summary(path: Path, manifest: Manifest) -> dict[str, Any]:
    elements: dict[str, int] = {}
    for name, entry in manifest.tensors.items():
        kind = name.rpartition("/")[0] if name.startswith("optimizer/") else name.partition("/")[0]
        elements[kind] = elements.get(kind, 0) + entry.numel
    steps = sorted({entry.step for entry in manifest.parameters.values()})
    moment = datetime.fromtimestamp(manifest.saved_at / 1e6, UTC)
    return {
        "path": str(path),
        "saved": moment.isoformat(timespec="seconds"),
        "by": dict(manifest.versions),
        "ranks": manifest.world_size,
        "parameters": len(manifest.parameters),
        "steps": steps,
        "elements": elements,
        "bytes": sum(entry.size for entry in manifest.files),
        "per rank": sorted(manifest.rank_tensors[0]) if manifest.rank_tensors else [],
        "plan": manifest.plan_digest,
    }


def _say(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_say(each)}" for key, each in value.items()) or "none"
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  {number}: {_say(each)}" for number, each in enumerate(value))
    if isinstance(value, list):
        return ", ".join(map(_say, value)) or "none"
    if isinstance(value, str) and not value.isprintable():
        return repr(value)  # a prompt of several lines
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
