"""How every command speaks: tables for people, one JSON document for programs, errors as sentences.

Under ``--json`` standard output holds one JSON document and nothing else, errors included. Everything
that is not the command's result (progress, notes, warnings) goes to standard error.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Final, NoReturn, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from torchhal.errors import TorchhalError

FAILED: Final = 1
USAGE: Final = 2
_WIDTH: Final = 160

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to standard output, and nothing else there.")
]
"""The ``--json`` option of every command."""


def out() -> Console:
    """The console for results. Made when used, so that a redirected stream is the one written to."""
    return _console(sys.stdout)


def err() -> Console:
    """The console for progress and notes."""
    return _console(sys.stderr)


def _console(stream: TextIO) -> Console:
    # Into a file or pipe, lines are as long as tables need; nobody's window is known there.
    width = None if stream.isatty() or "COLUMNS" in os.environ else _WIDTH
    return Console(file=stream, highlight=False, width=width)


def emit(document: Any) -> None:
    """Write the JSON document that is the command's result."""
    sys.stdout.write(json.dumps(document, indent=2, allow_nan=False) + "\n")
    sys.stdout.flush()


def note(text: str) -> None:
    """Tell a person something beside the result."""
    err().print(escape(text), style="yellow")


def usage(text: str) -> NoReturn:
    """End with exit code 2: the command was not understood."""
    err().print(escape(text), style="red")
    raise typer.Exit(USAGE)


def table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """An empty table; columns named in ``numbers`` are aligned to the right."""
    made = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    return made


@contextmanager
def progress(total: int, what: str, json_output: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error; the value is called with the name of each step as it starts.

    Nothing is drawn under ``--json`` or when standard error is no terminal.
    """
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    console = err()
    bar = Progress(*columns, console=console, transient=True, disable=json_output or not console.is_terminal)
    with bar:
        task = bar.add_task("", total=total)
        started = False

        def step(name: str) -> None:
            nonlocal started
            bar.update(task, advance=1 if started else 0, description=escape(name))
            started = True

        yield step


@contextmanager
def collected_warnings(ignoring: type[Warning] | None = None) -> Iterator[list[str]]:
    """Gather the warnings given inside the block, except those of one class, so that a command can show them as notes."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    kept = (w for w in caught if ignoring is None or not issubclass(w.category, ignoring))
    texts += list(dict.fromkeys(str(w.message) for w in kept))


def reporting_errors(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn torchhal's own errors into exit code 1: a sentence, or under ``--json`` an ``error`` object."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except TorchhalError as error:
            fail(error, as_json=kwargs.get("json_output") is True)

    return wrapped


def fail(error: Exception, as_json: bool) -> NoReturn:
    """End with exit code 1 and the error in words."""
    if as_json:
        emit({"error": {"type": type(error).__name__, "message": str(error)}})
    else:
        err().print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}")
    raise typer.Exit(FAILED)
