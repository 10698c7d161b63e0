"""The command ``torchhal-conformance calibrate``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from torchhal_conformance import calibrate, calls, records, run
from torchhal_conformance.checks import all_checks
from torchhal_conformance.child import StartFailed
from torchhal_conformance.mutants import all_mutants


def _stop(message: object) -> typer.Exit:
    typer.echo(f"torchhal-conformance: {message}", err=True)
    return typer.Exit(2)


def calibrate_command(
    reports: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="REPORT...",
            exists=True,
            dir_okay=False,
            help="Of honest backends; the reference is run if none.",
        ),
    ] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="Bounds of this check alone; may be repeated.")
    ] = None,
    mutant: Annotated[list[str] | None, typer.Option(help="This mutant alone; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
) -> None:
    """Print by which factor each bound could be wider or narrower. Exits with 1 when one is held by no planted fault."""
    chosen = [_known(name, [c.name for c in all_checks()], "check") for name in check or ()]
    for name in mutant or ():
        _known(name, [m.name for m in all_mutants()], "mutant")
    try:
        documents = [records.read(path) for path in reports or ()] or _reference_reports(jobs)
    except (records.ReportError, StartFailed) as error:
        raise _stop(error) from error
    honest = calibrate.nearest(documents, chosen)
    if not honest:
        raise _stop(
            "these reports hold no result with an error over its bound, so there is nothing to calibrate"
        )
    found = calls.accelerator_facilities()
    wanted = [
        m
        for m in all_mutants()
        if (not mutant or m.name in mutant)
        and {check for check, _ in honest} & {*m.killers}
        and m.needs <= found
    ]
    bounds = calibrate.weigh(honest, calibrate.exceeded(wanted, honest, jobs))
    exact = calibrate.exact(honest, chosen)
    if as_json:
        typer.echo(json.dumps({"bounds": [bound.record() for bound in bounds], "exact": exact}, indent=2))
    else:
        typer.echo(
            "\n".join(
                [*calibrate.table(bounds), "", "without a bound, and the planted faults that each must find:"]
            )
        )
        for name, faults in exact.items():
            typer.echo(f"{name:28} {len(faults):3}  {', '.join(faults) or 'NONE'}")
    raise typer.Exit(0 if all(bound.holds for bound in bounds) and all(exact.values()) else 1)


def _known(name: str, names: list[str], kind: str) -> str:
    if name not in names:
        raise _stop(f"there is no {kind} {name!r}; there are {', '.join(names)}")
    return name


def _reference_reports(jobs: int) -> list[records.Report]:
    """Of a run of the reference over each profile that has bounds."""
    with tempfile.TemporaryDirectory(prefix="torchhal-conformance-") as folder:
        return [
            run.run(run.Options("reference", profile, jobs=jobs), Path(folder) / f"{profile}.jsonl")
            for profile in ("training", "distributed")
        ]
