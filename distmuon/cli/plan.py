"""`distmuon plan`: what the optimizer will do with a model on so many ranks, without any."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmuon.cli import plan_words as words
from distmuon.cli.model_options import (
    MODEL_HELP,
    add_model_options,
    read_cost_model,
    read_source,
    without_collecting,
)
from distmuon.cli.output import (
    BROKEN,
    DONE,
    CommandError,
    as_grid,
    format_facts,
    print_json,
    print_table,
    write_file,
)

if TYPE_CHECKING:
    from distmuon.forecast.forecast import Forecast

_EPILOG = f"""\
{MODEL_HELP}

examples:
  distmuon plan llama-3-70b --world-size 1024 --layout auto --reduce hook
  distmuon plan configs/shakespeare.yaml --world-size 2 --html plan.html
  distmuon plan my_package.model:build --world-size 64 --strict

Times are predicted with the rates of --device: cuda's are assumed (an H100 with a 400 Gbit/s
network card), cpu's measured with gloo. A training configuration has a device of its own; other
models are planned for cuda.

exit codes: 0 done, 1 with --strict if the routing of a parameter should be confirmed, 2 wrong usage
or a model that cannot be planned"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "plan",
        help="show who gets, owns and sends what, and predict a step; runs without ranks",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    parser.add_argument(
        "--strict", action="store_true", help="exit with 1 if the routing had to guess"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a picture")
    parser.add_argument("--png", type=Path, metavar="FILE", help="write the picture alone")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    forecast, rates = _forecast(options)
    _write_pictures(forecast, rates, options)
    if options.json:
        print_json(_as_json(forecast, rates))
    else:
        _print(forecast, rates)
    return BROKEN if options.strict and forecast.doubts else DONE


def _forecast(options: argparse.Namespace) -> tuple[Forecast, str]:
    with without_collecting():
        from distmuon.forecast.forecast import make_forecast
        from distmuon.options import MATRIX_ALGORITHMS

        source = read_source(options)
        if source.config is not None and source.config.optimizer.name not in MATRIX_ALGORITHMS:
            raise CommandError(
                f"{source.name} has optimizer.name={source.config.optimizer.name}, which orders "
                "nothing and exchanges nothing. Add optimizer.name=muon."
            )
        cost_model, rates = read_cost_model(options, source)
        try:
            forecast = make_forecast(
                source.name,
                source.model,
                world_size=options.world_size,
                cost_model=cost_model,
                groups=source.groups,
                options=source.options,
            )
        except (TypeError, ValueError) as error:
            raise CommandError(str(error)) from error
    return forecast, rates


def _print(forecast: Forecast, rates: str) -> None:
    print_table(words.parameter_table(forecast))
    print()
    print(format_facts(words.facts(forecast, rates)))
    print()
    print_table(words.traffic_table(forecast))
    doubts = words.doubt_table(forecast)
    if doubts.rows:
        print()
        print_table(doubts)


def _write_pictures(forecast: Forecast, rates: str, options: argparse.Namespace) -> None:
    if options.html is None and options.png is None:
        return
    from distmuon.forecast.picture import draw_plan

    try:
        picture = draw_plan(forecast)
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    if options.png is not None:
        write_file(options.png, picture)
    if options.html is not None:
        write_file(options.html, _page(forecast, rates, picture))


def _page(forecast: Forecast, rates: str, picture: bytes) -> str:
    from distmuon.pictures.page import Grid, Heading, Part, Picture, render_page

    parts: list[Part] = [
        Grid(("of the plan", ""), tuple(words.facts(forecast, rates))),
        Picture(picture, "png", "who owns, computes, sends and receives what, by rank"),
        Heading("Messages"),
        as_grid(words.traffic_table(forecast)),
        Heading("Parameters"),
        as_grid(words.parameter_table(forecast)),
    ]
    if forecast.doubts:
        parts += [Heading("To confirm"), as_grid(words.doubt_table(forecast))]
    return render_page(f"{forecast.source} on {forecast.world_size:,} ranks", parts)


def _as_json(forecast: Forecast, rates: str) -> dict[str, Any]:
    policy = forecast.policy
    model = forecast.cost_model
    return {
        "model": forecast.source,
        "ranks": forecast.world_size,
        "options": {
            "layout": policy.layout,
            "max_split": policy.max_split,
            "split_dtype": policy.split_dtype,
            "wave_bytes": policy.wave_bytes,
            "wire": policy.wire,
            "reduce": policy.reduce,
        },
        "cost_model": {
            "latency": model.latency,
            "bandwidth": model.bandwidth,
            "flops": model.flops,
            "measured": {f"{m}x{n}": seconds for (m, n), seconds in model.measured.items()},
            "from": rates,
        },
        "parameters": forecast.rows,
        "buffers": forecast.buffers,
        "loads": forecast.loads,
        "max_over_mean_load": forecast.imbalance,
        "bytes_sent": forecast.sent,
        "adamw_bytes_sent": forecast.adamw,
        "state_bytes": sum(buffer.state_bytes for buffer in forecast.buffers),
        "predicted_seconds": {
            "optimizer_step": forecast.step_seconds,
            "average_gradients": forecast.reduce_seconds,
        },
        "to_confirm": {row.name: row.doubt for row in forecast.doubts},
    }
