"""``torchhal bench``: attention against its peers and the machine's limits, and torchhal's own cost."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape

from torchhal.bench import attention as measuring
from torchhal.bench import chart, choice, overhead
from torchhal.bench import memory as growing
from torchhal.bench.cases import describe
from torchhal.bench.ceilings import Ceilings, ceilings
from torchhal.bench.timing import QUICK, Effort
from torchhal.cli.output import FAILED, Json, emit, note, out, progress, reporting_errors, table, usage
from torchhal.errors import InvalidProblem
from torchhal.registry import Backend, registry

app = typer.Typer(
    help="Measure a family of operations, candidates taking turns in one run.", no_args_is_help=True
)

Chosen = Annotated[
    str | None, typer.Option("--backend", help="Measure this backend; by default all but the reference.")
]
Quick = Annotated[
    bool, typer.Option("--quick", help="Smaller and shorter: to see that it works, not to report.")
]
Select = Annotated[
    str | None, typer.Option("--cases", help="Names, beginnings or patterns, separated by commas.")
]
Device = Annotated[str, typer.Option(help="torch device to measure on.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads torch may use.")]


@app.command("attention")
@reporting_errors
def attention(
    backend: Chosen = None,
    select: Select = None,
    quick: Quick = False,
    threads: Threads = None,
    device: Device = "cpu",
    flex: Annotated[
        bool,
        typer.Option("--flex", help="Also torch's compiled flex_attention: seconds to compile each case."),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the speed-ups to FILE, for example attention.png."),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory",
            help="Also the peak of extra memory at doubling lengths, each in a process of its own (Linux).",
        ),
    ] = False,
    json_output: Json = False,
) -> None:
    """Time attention of every kind: our backends and torch's nearest equivalents, in turns.

    Every candidate is first checked against float64. Shares are of the machine's limits as measured in this
    run: arithmetic in float32, and reading memory, counting each input and output once. What a case needs, against
    a peer or against another call of the same backend ("cpu, dense" is such a call), is shown with pass or MISS. A
    miss is no error: the exit code is 1 only for a backend whose result is wrong. On an accelerator there are other cases, the
    clock is the device's own with cold caches, the limits are bfloat16 arithmetic and a copy, and what a call costs the
    host stands beside.
    """
    set_threads(threads)
    if plot is not None:
        chart.require_matplotlib()
        if not plot.absolute().parent.is_dir():
            usage(f"there is no folder {plot.absolute().parent} to draw {plot.name} into")
    found = registry()
    if backend is not None:
        found.get(backend)
    try:
        where = choice.usable_device(device)
        cases = measuring.select_cases(select, quick, where)
    except InvalidProblem as error:
        usage(str(error))
    measured = choice.backends("attention", found.backends, where, backend)
    effort = QUICK if quick else Effort()
    results = []
    grown: list[growing.Growth] = []
    with progress(len(cases) + 1 + memory, "bench attention", json_output) as step:
        step("the machine's limits")
        limits = ceilings(where, list(found.backends.values()))
        for case in cases:
            step(case.name)
            results.append(measuring.measure(case, measured, where, effort, flex))
        if memory:
            step("memory")
            lengths = growing.QUICK_LENGTHS if quick else growing.LENGTHS
            grown += growing.growths(measured, where, lengths)
    if plot is not None:
        chart.draw(results, title(), plot)
    if json_output:
        emit(
            {
                **context(),
                "quick": quick,
                "ceilings": limits.to_dict(),
                "cases": [r.to_dict(limits) for r in results],
                "memory": [g.to_dict() for g in grown],
            }
        )
    else:
        _show_attention(results, limits, plot)
        _show_memory(grown)
    if any(measuring.wrong(results)):
        raise typer.Exit(FAILED)


@app.command("overhead")
@reporting_errors
def cost(
    backend: Annotated[
        str | None, typer.Option(help="Backend whose plans are called; the preferred one by default.")
    ] = None,
    quick: Quick = False,
    threads: Threads = None,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Include torch.compile, which takes seconds.")
    ] = True,
    json_output: Json = False,
) -> None:
    """Measure what torchhal itself costs, each against its budget. Ends with exit code 1 if a budget is exceeded."""
    set_threads(threads)
    found = registry().get(backend) if backend is not None else _preferred()
    amount = overhead.QUICK if quick else overhead.Amount()
    steps = overhead.steps(found, amount, compiled)
    results: list[overhead.Overhead] = []
    with progress(len(steps), "bench overhead", json_output) as step:
        for name, measure in steps:
            step(name)
            results += measure()
    if json_output:
        emit({**context(), "quick": quick, "overheads": [r.to_dict() for r in results]})
    else:
        _show_overheads(results)
    if any(result.passed is False for result in results):
        raise typer.Exit(FAILED)


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


def _preferred() -> Backend:
    """The backend whose plans are worth measuring: the most preferred one that works on this machine's CPU."""
    ranked = sorted(registry().backends.values(), key=lambda b: b.preference("cpu"), reverse=True)
    return next(b for b in ranked if overhead.plan_of(b, torch.zeros(1, 1, 1, 16)) is not None)


def _machine() -> str:
    from torchhal.lock import environment_stamp

    return environment_stamp(registry())["machine"]


def title() -> str:
    threads = torch.get_num_threads()
    return f"{_machine()}, {threads} thread{'' if threads == 1 else 's'}, torch {torch.__version__}"


def _load() -> float | None:
    """Programs that wanted to run in the last minute, on average; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def note_load() -> None:
    load, cores = _load(), os.cpu_count() or 1
    if load is not None and load > cores + 0.5:
        note(
            f"{load:.1f} programs shared {cores} cores in the last minute: these times are longer, and vary more, than on an idle machine"
        )


def show_results(
    limits: str,
    name: str,
    numbers: Sequence[str],
    results: Sequence[Any],
    cells: Callable[[Any, Any], Sequence[str]],
) -> None:
    """The machine, its ``limits`` in words, and a table with the rows of each result, whose first cell names the case."""
    console = out()
    console.print(escape(title()))
    console.print(limits)
    made = table(name, "case", "candidate", *numbers, "needs", numbers=numbers)
    for result in results:
        for index, row in enumerate(result.rows):
            made.add_row(result.case.name if index == 0 else "", *cells(result, row))
        made.add_section()
    console.print(made)
    note_load()


def context() -> dict[str, Any]:
    return {
        "load_average": _load(),
        "machine": _machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------------------- for a person


def _show_attention(results: Sequence[measuring.CaseResult], limits: Ceilings, plot: Path | None) -> None:
    console = out()
    console.print(escape(title()))
    arithmetic, reading = (
        f"{limits.gflops:.0f} GFLOP/s ({limits.gflops_source})",
        f"{limits.gbps:.1f} GB/s ({limits.gbps_source})",
    )
    console.print(f"limits in this run: {arithmetic}, {reading}")
    numbers = (
        "median",
        "p10 .. p90",
        "x torch",
        "by best",
        "GFLOP/s",
        "of limit",
        "GB/s",
        "of limit ",
        "max error",
    )
    hosted = any(row.timing and row.timing.host is not None for result in results for row in result.rows)
    columns = (*numbers, "host") if hosted else numbers
    made = table("Attention", "case", "candidate", *columns, "needs", numbers=columns)
    for result in results:
        for index, row in enumerate(result.rows):
            case = (
                [result.case.name, f"[dim]{escape(describe(result.case))}[/]"][index : index + 1]
                if index < 2
                else []
            )
            made.add_row(*(case or [""]), *_attention_cells(result, row, limits, hosted))
        made.add_section()
    console.print(made)
    _show_needs(results)
    if plot is not None:
        console.print(f"chart: {escape(str(plot))}")
    note_load()


def _attention_cells(
    result: measuring.CaseResult, row: measuring.Row, limits: Ceilings, hosted: bool
) -> list[str]:
    name = f"[bold]{escape(row.candidate)}[/]" if row.ours else escape(row.candidate)
    needs = ", ".join(mark(verdict.passed) for verdict in result.verdicts(row))
    if row.timing is None:
        return [f"{name}: {escape(row.not_run)}", *[""] * (9 + hosted), needs]
    timing = row.timing
    speedups = [result.speedup(row), result.speedup(row, best=True)]
    return [
        name,
        seconds(timing.median),
        f"{seconds(timing.p10)} .. {seconds(timing.p90)}",
        *("" if speedup is None else f"{speedup:.2f}" for speedup in speedups),
        *_rates(result, row, limits),
        f"{row.error:.1e}" if row.passed else f"[red]{row.error:.1e} > {row.tolerance:.1e}[/]",
        *([] if not hosted else ["" if timing.host is None else seconds(timing.host)]),
        needs,
    ]


def _rates(result: measuring.CaseResult, row: measuring.Row, limits: Ceilings) -> list[str]:
    """The case's work by the time it took; nothing for a yardstick whose work is another."""
    if row.timing is None or row.other_work:
        return [""] * 4
    case, taken = result.case, row.timing.median
    return [
        f"{case.flops / taken / 1e9:.1f}",
        f"{limits.compute_share(case.flops, taken):.0%}",
        f"{case.bytes / taken / 1e9:.1f}",
        f"{limits.read_share(case.bytes, taken):.0%}",
    ]


def mark(passed: bool | None) -> str:
    return {True: "[green]pass[/]", False: "[red]MISS[/]", None: "[dim]-[/]"}[passed]


def _show_needs(results: Sequence[measuring.CaseResult]) -> None:
    """What lies behind each pass and MISS."""
    made = table("What cases need", "case", "backend", "at least", "measured", "", numbers=("measured",))
    for result in results:
        for row in result.rows:
            for verdict in result.verdicts(row):
                measured = row.not_run or _ratio(verdict)
                cells = (result.case.name, row.candidate, str(verdict.requirement), measured)
                made.add_row(*map(escape, cells), mark(verdict.passed))
    if made.row_count:
        out().print(made)


def _ratio(verdict: measuring.Verdict) -> str:
    return "not measured" if verdict.measured is None else f"{verdict.measured:.2f}x"


def _show_memory(grown: Sequence[growing.Growth]) -> None:
    if not grown:
        return
    lengths = list(dict.fromkeys(length for growth in grown for length in growth.peaks))
    numbers = [*(f"L={length}" for length in lengths), "exponent"]
    title = "Peak memory beyond the inputs, output included"
    made = table(title, "case", "backend", *numbers, "needs", numbers=numbers)
    for growth in grown:
        if growth.exponent is None:
            reason = growth.not_run or "no growth that the system's counter shows"
            made.add_row(escape(growth.case.name), escape(f"{growth.backend}: {reason}"))
            continue
        peaks = [f"{growth.peaks[n] / 2**20:.1f} MiB" if n in growth.peaks else "" for n in lengths]
        needs = f"linear, at most {growing.LINEAR}: {mark(growth.passed)}" + (
            f"; {escape(growth.not_run)}" if growth.not_run else ""
        )
        made.add_row(
            escape(growth.case.name), escape(growth.backend), *peaks, f"{growth.exponent:.2f}", needs
        )
    out().print(made)


def _show_overheads(results: Sequence[overhead.Overhead]) -> None:
    made = table(
        f"What torchhal costs ({_machine()})",
        "cost",
        "measured",
        "budget",
        "",
        "note",
        numbers=("measured", "budget"),
    )
    for result in results:
        verdict = {True: "[green]pass[/]", False: "[red]FAIL[/]", None: ""}[result.passed]
        measured, budget = _amount(result.value, result.unit), _amount(result.budget, result.unit)
        made.add_row(escape(result.what), measured, budget, verdict, escape(result.note))
    out().print(made)
    note_load()


def _amount(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return seconds(value) if unit == "s" else f"{value:.0f} {unit}"


def seconds(value: float) -> str:
    """A time in the unit that suits it."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value * 1e9:.0f} ns"
