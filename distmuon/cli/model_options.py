"""What `plan` and `estimate` ask for alike: a model, ranks, and the optimizer's options."""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmuon.cli.output import CommandError, add_json_option, positive
from distmuon.errors import see

if TYPE_CHECKING:
    from distmuon.cost import CostModel
    from distmuon.forecast.sources import Source

MODEL_HELP = """\
MODEL is one of
  configs/shakespeare.yaml   a training configuration; section.key=value may follow
  llama-3-70b                shapes that ship here: llama-7b, llama-3-70b, qwen3-32b, kimi-k2 (each
                             expert a matrix), kimi-k2-stacked (three stacks of experts a layer)
  config.json                a transformers configuration: a file, a folder, or a model's name
  package.module:function    a function that takes nothing and returns a model; it is called with
                             torch's default device set to "meta", so nothing is allocated"""


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the model, the ranks, and the options spelled as `Muon` spells them.

    Args:
        parser: Of the command.
    """
    parser.add_argument("model", metavar="MODEL", help="what to look at; see below")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="for *.yaml only"
    )
    parser.add_argument("--world-size", type=positive, default=8, help="ranks (default: 8)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the parameters (default: the model's own)",
    )
    parser.add_argument(
        "--layout", choices=("flat", "aligned", "auto"), default="flat", help="default: flat"
    )
    parser.add_argument("--max-split", type=positive, default=1, help="default: 1")
    parser.add_argument(
        "--split-dtype", choices=("float32", "float64"), default="float32", help="default: float32"
    )
    parser.add_argument(
        "--wave-bytes", type=positive, default=64 * 2**20, help="default: 64 MiB, in bytes"
    )
    parser.add_argument(
        "--wire", choices=("full", "bfloat16"), default="full", help="default: full"
    )
    parser.add_argument(
        "--reduce", choices=("ddp", "hook", "owned"), default="ddp", help="default: ddp"
    )
    parser.add_argument("--adjust-lr-fn", help="default: the configuration's, or match_rms_adamw")
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="PATTERN=RULE",
        help="send parameters to muon or adamw, as overrides= of build_param_groups; repeatable",
    )
    parser.add_argument(
        "--companion",
        metavar="CLASS",
        help="an optimizer class in AdamW's place, such as torch.optim.Adafactor (default: adamw)",
    )
    parser.add_argument(
        "--blocks",
        action="append",
        default=[],
        metavar="PATTERN=N",
        help="cut fused matrices into N equal row blocks, or into rows N,N,...; repeatable",
    )
    parser.add_argument(
        "--recipe",
        choices=("moonlight", "kimi_k2", "keller", "normuon"),
        help="take the options of a preset of distmuon.recipes",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="whose rates to plan with (default: see below)"
    )
    parser.add_argument(
        "--cost-model",
        type=Path,
        metavar="FILE",
        help='JSON with "latency", "bandwidth", "flops" and perhaps "measured" seconds by shape, '
        'such as {"4096x4096": 0.002}',
    )
    add_json_option(parser)


def read_source(options: argparse.Namespace) -> Source:
    """Make the model of the command line.

    Args:
        options: The parsed command line.

    Returns:
        The model and the optimizer's options, those of the command line included.

    Raises:
        CommandError: if no model can be made.
    """
    from dataclasses import replace

    import torch

    from distmuon import recipes
    from distmuon.forecast.sources import SourceError, open_source

    try:
        source = open_source(options.model, options.overrides)
    except SourceError as error:
        raise CommandError(str(error)) from error
    if options.dtype is not None:
        source.model.to(getattr(torch, options.dtype))
    groups, chosen = dict(source.groups), dict(source.options)
    if options.recipe is not None:
        recipe = getattr(recipes, options.recipe)()
        groups, chosen = groups | recipe.groups, chosen | recipe.optimizer
    groups |= {"overrides": _read_overrides(options.override), "blocks": _read_cuts(options.blocks)}
    if options.companion is not None:
        groups["companion"] = options.companion
    chosen |= {
        "layout": options.layout,
        "max_split": options.max_split,
        "split_dtype": options.split_dtype,
        "wave_bytes": options.wave_bytes,
        "wire": options.wire,
        "reduce": options.reduce,
    }
    if options.adjust_lr_fn is not None:
        chosen["adjust_lr_fn"] = options.adjust_lr_fn
    return replace(source, groups=groups, options=chosen)


def _read_overrides(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        pattern, equals, rule = text.rpartition("=")
        if not equals:
            raise CommandError(f"--override {text}: expected PATTERN=muon or PATTERN=adamw.")
        found[pattern] = rule
    return found


def _read_cuts(texts: Sequence[str]) -> dict[str, int | tuple[int, ...]]:
    found: dict[str, int | tuple[int, ...]] = {}
    for text in texts:
        pattern, _, sizes = text.rpartition("=")
        numbers = tuple(int(each) for each in sizes.split(",") if each.isdecimal())
        if not pattern or len(numbers) != sizes.count(",") + 1:
            raise CommandError(
                f"--blocks {text}: expected PATTERN=N or PATTERN=N,N,..., such as "
                "'*.gate_up_proj.weight=2'."
            )
        found[pattern] = numbers if len(numbers) > 1 else numbers[0]
    return found


def read_cost_model(options: argparse.Namespace, source: Source) -> tuple[CostModel, str]:
    """Choose the rates to plan with.

    Args:
        options: The parsed command line.
        source: Says on what device a training configuration runs.

    Returns:
        The rates, and where they come from.

    Raises:
        CommandError: if the file cannot be used.
    """
    from distmuon.cost import default_cost_model

    if options.cost_model is not None:
        return _load_cost_model(options.cost_model), str(options.cost_model)
    device = options.device or _device_of(source)
    origin = "measured with gloo on 2 CPU cores" if device == "cpu" else "assumed, not measured"
    return default_cost_model(device), f"defaults for {device}, {origin}"


def _device_of(source: Source) -> str:
    import torch

    if source.config is None:
        return "cuda"
    wanted = source.config.run.device
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _load_cost_model(path: Path) -> CostModel:
    from distmuon.cost import CostModel

    try:
        content: Any = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise TypeError(
                "the file must be an object with latency, bandwidth and flops." + see("command")
            )
        measured = {_shape(text): seconds for text, seconds in content.get("measured", {}).items()}
        rates = {key: content[key] for key in ("latency", "bandwidth", "flops")}
        return CostModel(**rates, measured=measured)
    except OSError as error:
        raise CommandError(f"--cost-model {path}: {error.strerror or error}.") from error
    except json.JSONDecodeError as error:
        raise CommandError(f"--cost-model {path} is no JSON: {error}.") from None
    except KeyError as error:
        raise CommandError(f"--cost-model {path} has no {error}.") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"--cost-model {path}: {error}") from error


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise ValueError(f"{text!r} is no shape such as 4096x4096." + see("command"))
    return int(rows), int(columns)


@contextmanager
def without_collecting() -> Iterator[None]:
    """Leave the garbage collector out while a model is made and planned."""
    # A mixture of experts is a million small objects that all stay: looking through them for
    # cycles over and over takes as long as the planning.
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            # Nor later: a command ends soon, and the first look at a million objects takes 0.5 s.
            gc.freeze()
            gc.enable()
