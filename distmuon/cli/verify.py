"""`distmuon verify`: check the optimizer on this machine, or on the ranks of a launcher."""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distmuon.cli.output import (
    BROKEN,
    DONE,
    EXIT_CODES,
    USAGE,
    Column,
    CommandError,
    Table,
    add_json_option,
    print_json,
    print_table,
)
from distmuon.cli.ranks import RanksError, Team, add_rank_options, run_team, team_of

if TYPE_CHECKING:
    import torch

    from distmuon.selftest import Row

# `distmuon.selftest.CHECKS` in order; written here too so that --help need not import torch.
CHECKS = (
    "peer",
    "parity",
    "work",
    "gradients",
    "bytes",
    "desync",
    "missing",
    "nonfinite",
    "resume",
    "reshard",
)
_RANKS = 4
_LIMIT_S = 300.0

_EXPLAIN = f"""\
Trains small models whose results are known, and compares. On a CPU it starts its own ranks (gloo,
meeting in a file); with two GPUs or more one rank for each (nccl); under a launcher it takes the
ranks that it is given. Nothing of yours is read or changed.

  peer       one process agrees with torch.optim.Muon
  parity     all ranks together compute what one process does: bitwise on CPUs
  work       every matrix is orthogonalized once a step, by one rank
  gradients  averaged rightly by DistributedDataParallel, our hook in it, and our own hooks
  bytes      what is handed to the process group is what the plan says, to the byte
  desync     one changed weight on one rank is named, on every rank
  missing    a gradient missing on one rank is named, and nothing is changed
  nonfinite  a step with an infinity is skipped by all ranks, and nothing is changed
  resume     save, load, go on: as if it had never stopped
  reshard    save on N ranks, go on with N-1, then with N again

examples:
  distmuon verify
  distmuon verify --ranks 3 --only parity bytes
  distmuon verify --sabotage parity        break it on purpose, to see that it is noticed
  torchrun --nproc-per-node 8 -m distmuon verify
  torchrun --nnodes 2 ... -m distmuon verify --folder /shared/tmp

{EXIT_CODES}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `verify`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "verify",
        help="check on this machine that sharded training computes what it should",
        description=__doc__,
        epilog=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_rank_options(parser, default=_RANKS, limit_s=_LIMIT_S)
    names = ", ".join(CHECKS)
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {names}")
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are tried; all machines must see it"
    )
    parser.add_argument(
        "--sabotage",
        choices=CHECKS,
        metavar="CHECK",
        help="break what this check looks at on one rank: it must fail",
    )
    add_json_option(parser)
    parser.set_defaults(run=_run)


@dataclass(frozen=True, slots=True)
class _Wish:
    """What the ranks are told."""

    only: Sequence[str]
    sabotage: str | None
    folder: Path | None
    machines: int


def _run(options: argparse.Namespace) -> int:
    from distmuon.selftest import Row

    team = team_of(options, default=_RANKS)
    if options.folder is not None and not options.folder.is_dir():
        raise CommandError(f"--folder {options.folder} is no folder.", code=USAGE)
    wish = _Wish(options.only or (), options.sabotage, options.folder, team.machines)
    began = time.perf_counter()
    promise = "the ranks start, meet and come to their end"
    try:
        rows = run_team(team, _check, wish)[0]
    except RanksError as error:
        rows = [
            Row(
                "ranks",
                promise,
                "fail",
                time.perf_counter() - began,
                (),
                str(error),
                f"{team.size} ranks that end within {team.limit_s:g} s",
                "See `distmuon doctor`; on a slow or busy machine give more --timeout.",
            )
        ]
    else:
        spent = sum(row.seconds for row in rows)
        taken = time.perf_counter() - began - spent
        backend = "nccl" if team.device == "cuda" else "gloo"
        seen = f"{team.size} ranks on {team.device}, {backend}"
        rows = [Row("ranks", promise, "pass", taken, (), seen), *rows]
    if team.rank == 0:
        _tell(rows, team, options)
    return BROKEN if any(row.status == "fail" for row in rows) else DONE


def _tell(rows: Sequence[Row], team: Team, options: argparse.Namespace) -> None:
    failed = [row for row in rows if row.status == "fail"]
    seconds = sum(row.seconds for row in rows)
    if options.json:
        answer = {"ranks": team.size, "device": team.device, "seconds": seconds, "checks": rows}
        print_json(answer, ok=not failed)
        return
    columns = (
        Column("check"),
        Column("result"),
        Column("seconds", "right"),
        Column("what was seen"),
    )
    lines = [
        (row.check, row.status.upper(), f"{row.seconds:.1f}", row.seen.partition("\n")[0])
        for row in rows
    ]
    print_table(Table(columns, tuple(lines)))
    for row in failed:
        where = f" on rank{'s'[: len(row.ranks) != 1]} {_list(row.ranks)}" if row.ranks else ""
        print(f"\nFAIL {row.check}{where}: {row.promise}")
        print(f"  expected  {row.expected}\n  saw       {row.seen}\n  do        {row.remedy}")
    passed = sum(row.status == "pass" for row in rows)
    skipped = sum(row.status == "skip" for row in rows)
    print(
        f"\n{passed} passed, {len(failed)} failed, {skipped} skipped "
        f"on {team.size} ranks ({team.device}) in {seconds:.0f} s"
    )


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _check(device: torch.device, wish: _Wish) -> list[Row]:
    """What every rank does."""
    import torch.distributed as dist

    from distmuon.selftest import run_checks
    from distmuon.selftest.run import Plan

    # The skipped step is reported as a check, not as a warning.
    logging.getLogger("distmuon").setLevel(logging.ERROR)
    folder = None
    if wish.machines == 1 or wish.folder is not None:
        made = (
            [tempfile.mkdtemp(prefix="distmuon-", dir=wish.folder)]
            if dist.get_rank() == 0
            else [""]
        )
        dist.broadcast_object_list(made, src=0)
        folder = Path(made[0])
    try:
        return list(run_checks(Plan(device, folder, wish.only, wish.sabotage)))
    finally:
        if folder is not None and dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
