"""``torchhal run``: an unmodified program in a process where torchhal is installed, and where each of its calls went."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from torchhal import mode_foreach
from torchhal.cli.output import err, note, reporting_errors, table, usage
from torchhal.cli.program import Outcome, Program, run_program
from torchhal.registry import registry
from torchhal.selection import Route, routes


@reporting_errors
def run(
    program: Annotated[
        str, typer.Argument(metavar="SCRIPT", help="Path of a script; with -m the name of a module.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[ARGS]...", help="Passed on as they are.")
    ] = None,
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is a module's name, as for `python -m`.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="Serve with this backend, and fail where it can not.")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Fail where a backend declines.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--json", "--routes", metavar="FILE", help="Write the routes to FILE, for `torchhal tune` too."
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Do not print the routes.")] = False,
) -> None:
    """Run a program that never heard of torchhal, its attention served on every thread as after `torchhal.install()`.

    The program sees its own arguments, sys.path and __main__, writes to standard output alone, and ends this command with
    its own exit code. Then the routes its calls took are printed to standard error.

    Where a backend that claims the foreach family is chosen by name, torch's _foreach functions are
    served too, under `torchhal.enable()`.
    That belongs to one thread, so calls of them on threads that the program starts go to torch; that there were such
    threads is noted. Processes that the program starts are not covered.
    """
    wanted = Program(program, arguments or (), module)
    if backend is not None:
        registry().get(backend)
    if file is not None and not file.absolute().parent.is_dir():
        usage(f"there is no folder {file.absolute().parent} to write {file.name} into")
    if fault := wanted.fault():
        usage(fault)
    file = None if file is None else file.absolute()  # the program may change the directory
    foreach = mode_foreach.is_chosen(backend, unscoped=True)
    outcome = run_program(wanted, _served(backend, strict, foreach))
    if not foreach:
        outcome.threads.clear()
    taken = routes()
    if file is not None:
        file.write_text(json.dumps(routes_document(taken, outcome), indent=2) + "\n", encoding="utf-8")
    if not quiet:
        show_routes(taken, outcome)
    outcome.leave()


def _served(backend: str | None, strict: bool | None, foreach: bool) -> Callable[[Callable[[], None]], None]:
    def around(execute: Callable[[], None]) -> None:
        import torchhal

        with ExitStack() as stack:
            stack.enter_context(torchhal.install(backend, strict))
            if foreach:
                stack.enter_context(torchhal.enable(backend, strict))
            execute()

    return around


def routes_document(taken: Sequence[Route], outcome: Outcome) -> dict[str, Any]:
    """What ``--routes`` writes and ``torchhal tune`` reads."""
    return {"routes": [json.loads(route.to_json()) for route in taken], "threads": outcome.threads}


def show_routes(taken: Sequence[Route], outcome: Outcome) -> None:
    """Print a table of routes to standard error."""
    made = table("Routes", "problem", "chosen", "calls", "why", numbers=("calls",))
    for route in taken:
        chosen = f"[bold]{escape(route.chosen or 'nobody')}[/]"
        why = [f"by {route.rule}" + (f" ({route.description})" if route.description else "")]
        why += [f"unfused {text}" for text in route.unfused_texts()]
        why += [f"{name}: {decline}" for name, decline in route.declined]
        made.add_row(escape(route.problem.summary()), chosen, str(route.count), escape("\n".join(why)))
    if taken:
        err().print(made)
    else:
        note("torchhal: the program made no call that torchhal routes")
    if outcome.threads:
        names, count = ", ".join(dict.fromkeys(outcome.threads[:5])), len(outcome.threads)
        started = "a thread" if count == 1 else f"{count} threads"
        note(
            f"torchhal: the program started {started} ({names}); torch's function modes belong to one thread, so the "
            "torch._foreach functions it called there went to torch and are not in the table"
        )
