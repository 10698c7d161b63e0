"""``torchhal tune``: measure the backends and write the selection lock file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from torchhal import lock, tuning
from torchhal.bench.cases import Shape
from torchhal.cli.bench import seconds
from torchhal.cli.output import FAILED, Json, emit, out, progress, reporting_errors, table, usage
from torchhal.problems import Problem
from torchhal.registry import registry
from torchhal.tuning import Tuned


@reporting_errors
def tune(
    routes: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Measure the problems in FILE, written by `torchhal run --routes`."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Lock file to write; where torchhal looks by default.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and write nothing.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Batch size, with --length.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=1, help="Query rows; by default one decoding step and one prompt.")
    ] = None,
    keys: Annotated[
        int | None, typer.Option(min=1, help="Keys, with --length; as many as query rows by default.")
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads torch may use; the lock file holds for processes with as many."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Measure every backend that has a plan, reference included, and write the fastest into the lock file.

    Without --routes, common attention problems are measured on this machine's devices. The file holds for this
    environment: in another one (versions, machine, threads, devices) it is reported as stale and not used.
    Ends with exit code 1 if a backend gave a wrong result, or nothing could be measured.
    """
    if length is None and (keys is not None or batch != 1):
        usage("--keys and --batch go with --length")
    if threads is not None:
        torch.set_num_threads(threads)
    path = output or lock.default_path()
    if path is None and not dry_run:
        usage("TORCHHAL_LOCK is empty, so no lock file is used; unset it, or say --output PATH")
    shapes = None if length is None else [Shape(batch, length, keys or length)]
    problems = tuning.read_routes(routes) if routes is not None else _default_problems()
    if path is not None and not dry_run:
        tuning.kept_entries(registry(), path)  # refuses before anything is measured
    tuned = _measure_all(problems, shapes, json_output)
    written = None
    if path is not None and not dry_run and any(t.chosen for t in tuned):
        written = tuning.write_lock(tuned, registry(), path)
    if json_output:
        emit(_document(tuned, written))
    else:
        _show(tuned, written)
    if not any(t.chosen for t in tuned) or any(m.wrong for t in tuned for m in t.measurements):
        raise typer.Exit(FAILED)


def _default_problems() -> list[Problem]:
    return [problem for device in tuning.devices() for problem in tuning.default_problems(device)]


def _measure_all(
    problems: Sequence[Problem], shapes: Sequence[Shape] | None, json_output: bool
) -> list[Tuned]:
    tuned = []
    with progress(len(problems), "tune", json_output) as step:
        for problem in problems:
            step(problem.summary())
            tuned.append(tuning.tune(problem, registry(), shapes))
    return tuned


def _document(tuned: Sequence[Tuned], written: lock.Lock | None) -> dict[str, Any]:
    return {
        "lock": None if written is None else str(written.path),
        "environment": lock.environment_stamp(registry()),
        "problems": [
            {
                "problem": t.problem.text,
                **t.entry(),
                "declined": {name: {"code": d.code, "reason": d.reason} for name, d in t.declined.items()},
                "not_measured": t.not_measured,
            }
            for t in tuned
        ],
    }


def _show(tuned: Sequence[Tuned], written: lock.Lock | None) -> None:
    made = table(
        "Measured, in turns; a choice is by the geometric mean over shapes", "problem", "chosen", "times"
    )
    for t in tuned:
        made.add_row(
            escape(t.problem.summary()), f"[bold]{escape(t.chosen or '-')}[/]", escape("\n".join(_times(t)))
        )
    console = out()
    console.print(made)
    if written is None:
        console.print("Nothing was written.")
    else:
        console.print(f"Wrote {len(written.entries)} choices to {escape(str(written.path))}")


def _times(t: Tuned) -> list[str]:
    if t.not_measured:
        return [f"not measured: {t.not_measured}"]
    lines = []
    for m in t.measurements:
        times = ", ".join(f"{name} {seconds(timing.median)}" for name, timing in m.timings.items())
        lines += [f"{m.shape}: {times}", *(f"  {name} {fault}" for name, fault in m.wrong.items())]
    return lines + [f"{name} declined: {decline}" for name, decline in t.declined.items()]
