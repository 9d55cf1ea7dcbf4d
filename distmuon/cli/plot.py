"""`distmuon plot`: curves of one or several training runs, as a PNG and as a page."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distmuon.cli.output import (
    BROKEN,
    DONE,
    EXIT_CODES,
    Column,
    CommandError,
    Table,
    add_json_option,
    print_json,
    print_table,
    write_file,
)

if TYPE_CHECKING:
    from distmuon.training.curves import Run

_EXAMPLES = f"""\
examples:
  distmuon plot runs/shakespeare
  distmuon plot runs/shakespeare runs/shakespeare-adamw --png both.png
  distmuon plot runs/*/metrics.jsonl --html runs.html

RUN is a run's folder or its metrics.jsonl. Without --png and --html it writes plot.png and
plot.html here.

{EXIT_CODES}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plot`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "plot",
        help="draw loss, learning rate, updates, weights, times and loads of training runs",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run to draw")
    parser.add_argument("--png", metavar="FILE", type=Path, help="write a picture")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page in one file")
    add_json_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from distmuon.pictures.figure import require_matplotlib, to_png
    from distmuon.training.curves import gather_facts, iterate_missing
    from distmuon.training.plot import TITLES, describe_missing, draw_runs, to_page, to_rows

    try:
        require_matplotlib()
    except ModuleNotFoundError as error:
        raise CommandError(str(error)) from error
    runs = _read_runs(options.runs)
    png, html = options.png, options.html
    if png is None and html is None:
        png, html = Path("plot.png"), Path("plot.html")
    if png is not None:
        write_file(png, to_png(draw_runs(runs)))
    if html is not None:
        write_file(html, to_page(runs))
    written = [str(path) for path in (png, html) if path is not None]
    if options.json:
        missing = list(iterate_missing(runs))
        print_json({"runs": list(map(gather_facts, runs)), "missing": missing, "written": written})
        return DONE
    columns = [Column(title, "right") for title in TITLES[1:-1]]
    print_table(Table((Column(TITLES[0]), *columns, Column(TITLES[-1])), to_rows(runs)))
    for line in (describe_missing(runs), f"written: {', '.join(written)}"):
        if line:
            print(line)
    return DONE


def _read_runs(paths: Sequence[Path]) -> list[Run]:
    from distmuon.training.curves import Run
    from distmuon.training.metrics import MetricsError, read_metrics

    files = [path / "metrics.jsonl" if path.is_dir() else path for path in paths]
    folders = [file.resolve().parent.name for file in files]
    counts = Counter(folders)
    runs = []
    for path, file, folder in zip(paths, files, folders, strict=True):
        try:
            lines = read_metrics(file)
        except FileNotFoundError:
            message = f"{file}: no such file. Give a run's folder, such as runs/NAME."
            raise CommandError(message) from None
        except OSError as error:
            raise CommandError(f"{file} cannot be read: {error.strerror or error}.") from error
        except MetricsError as error:
            raise CommandError(str(error), code=BROKEN) from None
        if not lines:
            raise CommandError(f"{file} has no whole line yet.", code=BROKEN)
        # The folder's name, unless two runs have the same.
        runs.append(Run(folder if counts[folder] == 1 else str(path), tuple(lines)))
    return runs
