"""``torchhal bench matmul``: fused products against torch and the machine's limits."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import torch
import typer
from rich.markup import escape

from torchhal.bench import choice, packed
from torchhal.bench import matmul as measuring
from torchhal.bench.ceilings import Ceilings, ceilings
from torchhal.bench.timing import QUICK, Effort
from torchhal.cli import bench
from torchhal.cli.output import FAILED, Json, emit, progress, reporting_errors, usage
from torchhal.errors import InvalidProblem
from torchhal.registry import registry


@reporting_errors
def matmul(
    backend: bench.Chosen = None,
    select: bench.Select = None,
    quick: bench.Quick = False,
    threads: bench.Threads = None,
    device: bench.Device = "cpu",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also what torch.compile makes of it: seconds for each case.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Time fused matrix products: our backends and torch, in turns.

    Every candidate is first checked against float64. Shares are of the machine's limits as measured in this run:
    arithmetic in float32, and reading memory, counting each operand and the result once. A miss of what a case needs is no
    error: the exit code is 1 only for a backend whose result is wrong.
    """
    bench.set_threads(threads)
    found, where = registry(), torch.device(device)
    if backend is not None:
        found.get(backend)
    try:
        cases = choice.named("matmul", (*measuring.CASES, *packed.CASES), select)
    except InvalidProblem as error:
        usage(str(error))
    cases = [case.quick() for case in cases] if quick else cases
    measured = [b.name for b in choice.backends("matmul", found.backends, where, backend)]
    effort = QUICK if quick else Effort()
    results: list[measuring.CaseResult] = []
    with progress(len(cases) + 1, "bench matmul", json_output) as step:
        step("the machine's limits")
        limits = ceilings(where, list(found.backends.values()))
        for case in cases:
            step(case.name)
            results.append(measuring.measure(case, measured, where, effort, compiled))
    if json_output:
        made = {"quick": quick, "ceilings": limits.to_dict(), "cases": [r.to_dict(limits) for r in results]}
        emit({**bench.context(), **made})
    else:
        known = f"limits in this run: {limits.gflops:.0f} GFLOP/s, {limits.gbps:.1f} GB/s"
        numbers = ("median", "x torch", "GFLOP/s", "of limit", "GB/s", "of limit ", "max error")
        bench.show_results(known, "Matmul", numbers, results, partial(_cells, limits=limits))
    if any(row.ours and not row.passed(result.case.dtype) for result in results for row in result.rows):
        raise typer.Exit(FAILED)


def _cells(result: measuring.CaseResult, row: measuring.Row, limits: Ceilings) -> list[str]:
    name = f"[bold]{escape(row.candidate)}[/]" if row.ours else escape(row.candidate)
    if row.timing is None:
        return [f"{name}: {escape(row.not_run)}", *[""] * 8]
    case, taken, speedup = result.case, row.timing.median, result.speedup(row)
    needs = [
        f"{r}: {'not measured' if got is None else f'{got:.2f}x'} {bench.mark(None if got is None else got >= r.ratio)}"
        for r, got in result.verdicts(row)
    ]
    return [
        name,
        bench.seconds(taken),
        "" if speedup is None else f"{speedup:.2f}",
        f"{case.flops / taken / 1e9:.1f}",
        f"{limits.compute_share(case.flops, taken):.0%}",
        f"{case.bytes / taken / 1e9:.1f}",
        f"{limits.read_share(case.bytes, taken):.0%}",
        f"{row.error:.1e}" if row.passed(case.dtype) else f"[red]{row.error:.1e}[/]",
        ", ".join(needs),
    ]
