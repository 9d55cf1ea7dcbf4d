"""`distmuon doctor`: versions, devices and settings, and which of them are known to be bad."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from distmuon.cli.output import BROKEN, DONE, EXIT_CODES, add_json_option, print_json

if TYPE_CHECKING:
    from distmuon.cli.doctor_facts import Facts
    from distmuon.cli.doctor_rules import Finding

_EXPLAIN = f"""\
Prints Markdown, to be pasted into an issue as it is: no host names, addresses or paths. Each known
problem comes with its cure. Nothing is computed or sent; `distmuon verify` tries things out.

examples:
  distmuon doctor
  distmuon doctor --json
  srun -n 1 python -m distmuon doctor      where the job runs, not where you log in

A problem is what is wrong here; warnings and notes are not.
{EXIT_CODES}"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor`.

    Args:
        commands: Of `distmuon`.
    """
    parser = commands.add_parser(
        "doctor",
        help="report versions, devices and settings, with what is known to be bad",
        description=__doc__,
        epilog=_EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_json_option(parser)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from distmuon.cli.doctor_facts import gather_facts
    from distmuon.cli.doctor_rules import diagnose

    facts = gather_facts()
    findings = diagnose(facts)
    bad = any(finding.level == "problem" for finding in findings)
    if options.json:
        print_json({"facts": facts, "findings": findings}, ok=not bad)
    else:
        print(as_markdown(facts, findings))
    return BROKEN if bad else DONE


def as_markdown(facts: Facts, findings: Sequence[Finding]) -> str:
    """Write a report.

    Args:
        facts: Of the machine.
        findings: The worst first.

    Returns:
        Markdown.
    """
    lines = ["## distmuon doctor", ""]
    lines += [f"- **{found.level}**: {found.what} {found.cure}" for found in findings]
    lines += ["" if findings else "Nothing is known to be bad here.\n"]
    lines += _section("Machine", _machine(facts))
    lines += _section(
        "Packages", [(name, version or "-") for name, version in facts.versions.items()]
    )
    lines += _section("Environment", list(facts.variables.items()) or [("(none of ours)", "")])
    return "\n".join(lines).rstrip()


def _machine(facts: Facts) -> list[tuple[str, str]]:
    gpus = [
        f"{gpu.name}, {gpu.bytes / 2**30:.0f} GiB, sm_{gpu.capability[0]}{gpu.capability[1]}"
        for gpu in facts.gpus
    ]
    return [
        ("Python", facts.python),
        ("system", facts.system),
        ("cores", f"{facts.cores}; torch takes {facts.threads} threads"),
        ("CPU", f"{facts.cpu}, bfloat16 {'in hardware' if facts.bfloat16 else 'emulated'}"),
        ("float32 products", facts.matmul),
        ("GPUs", "; ".join(gpus) or "none"),
        ("CUDA", f"{facts.cuda or 'not built in'}{', nccl ' + facts.nccl if facts.nccl else ''}"),
        ("backends", ", ".join(facts.backends)),
    ]


def _section(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
