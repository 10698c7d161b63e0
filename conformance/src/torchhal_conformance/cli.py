"""The command ``torchhal-conformance``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from torchhal.errors import TorchhalError
from torchhal.registry import registry
from torchhal_conformance.runner import smoke

app = typer.Typer(
    help="Checks whether a torchhal backend does what it claims.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _group() -> None:
    """Keeps ``smoke`` a subcommand."""


@app.command("smoke")
def smoke_command(
    backends: Annotated[
        list[str] | None, typer.Argument(help="Names of installed backends; all of them when none is given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as a JSON list.")] = False,
) -> None:
    """Check identity and claims. Exits with 1 when something is contradicted, with 2 when a backend can not be loaded."""
    try:
        reports = [smoke(name) for name in backends or sorted(registry().backends)]
    except TorchhalError as error:
        typer.echo(f"torchhal-conformance: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(
        json.dumps([r.to_dict() for r in reports], indent=2) if as_json else "\n".join(map(str, reports))
    )
    raise typer.Exit(0 if all(report.passed for report in reports) else 1)


def main() -> None:
    """Entry point of the console script."""
    app()
