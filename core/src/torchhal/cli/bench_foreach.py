"""``torchhal bench foreach``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer
from rich.markup import escape

from torchhal.bench import choice
from torchhal.bench import foreach as measuring
from torchhal.bench.timing import QUICK, Effort
from torchhal.cli import bench
from torchhal.cli.output import FAILED, Json, emit, progress, reporting_errors, usage
from torchhal.errors import InvalidProblem
from torchhal.registry import registry


@reporting_errors
def foreach(
    backend: bench.Chosen = None,
    select: bench.Select = None,
    quick: bench.Quick = False,
    threads: bench.Threads = None,
    device: bench.Device = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also torch's compiled foreach_map: a minute to compile.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Time an AdamW step written as one function: our backends and torch's optimizers, in turns.

    Shares are of what torch reads and writes where it overwrites a large tensor, measured in this run, counting each number once. A missed
    requirement is no error: the exit code is 1 only for a backend whose step is wrong.
    """
    bench.set_threads(threads)
    found, where = registry(), torch.device(device)
    if backend is not None:
        found.get(backend)
    try:
        cases = choice.named("foreach", measuring.CASES, select)
    except InvalidProblem as error:
        usage(str(error))
    measured = choice.backends("foreach", found.backends, where, backend)
    effort = QUICK if quick else Effort()
    results = []
    with progress(len(cases) + 1, "bench foreach", json_output) as step:
        step("the machine's limits")
        gbps = measuring.moving_gbps(where)
        for case in cases:
            step(case.name)
            results.append(
                measuring.measure(case.quick() if quick else case, measured, where, effort, compiled)
            )
    if json_output:
        shown = [r.to_dict(gbps) for r in results]
        emit({**bench.context(), "quick": quick, "moving_gbps": gbps, "cases": shown})
    else:
        limit = f"limit in this run: {gbps:.1f} GB/s read and written (256 MiB overwritten by torch)"
        numbers = ("median", "p10 .. p90", "GB/s", "of limit", "max error")
        bench.show_results(limit, "Foreach", numbers, results, partial(_cells, gbps=gbps))
    if any(row.ours and not row.passed for result in results for row in result.rows):
        raise typer.Exit(FAILED)


def _cells(result: measuring.Result, row: measuring.Row, gbps: float) -> list[str]:
    name = f"[bold]{escape(row.candidate)}[/]" if row.ours else escape(row.candidate)
    if row.timing is None:
        return [f"{name}: {escape(row.not_run)}", *[""] * 6]
    rate = result.case.bytes / row.timing.median / 1e9
    rates = ["", "", ""] if result.case.first else [f"{rate:.1f}", f"{rate / gbps:.0%}", f"{row.error:.1e}"]
    spread = f"{bench.seconds(row.timing.p10)} .. {bench.seconds(row.timing.p90)}"
    return [name, bench.seconds(row.timing.median), spread, *rates, _needs(result, row) if row.ours else ""]


def _needs(result: measuring.Result, row: measuring.Row) -> str:
    shown = []
    for needed in result.case.requirements:
        ratio = result.ratio(row, needed)
        if ratio is not None:
            shown.append(f"{ratio:.2f} of {escape(str(needed))} {bench.mark(ratio >= needed.ratio)}")
    return "\n".join(shown)
