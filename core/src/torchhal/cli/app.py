"""Puts the commands together."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer

from torchhal.cli import bench, bench_foreach, bench_matmul, cache, doctor, explain, run, tune
from torchhal.cli.output import out

app = typer.Typer(
    help="torchhal: one PyTorch program, the best kernels on each machine, every choice explainable.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        import torch

        out().print(f"torchhal {_own_version()} with torch {torch.__version__}")
        raise typer.Exit


def _own_version() -> str:
    try:
        return metadata.version("torchhal")
    except metadata.PackageNotFoundError:
        return "(not installed as a distribution)"


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print versions and exit.")
    ] = False,
) -> None:
    """One PyTorch program, the best kernels on each machine, every choice explainable."""


app.command("doctor")(doctor.doctor)
app.command("run", context_settings={"allow_interspersed_args": False}, no_args_is_help=True)(run.run)
app.add_typer(explain.app, name="explain")
app.command("tune")(tune.tune)
bench.app.command("foreach")(bench_foreach.foreach)
bench.app.command("matmul")(bench_matmul.matmul)
app.add_typer(bench.app, name="bench")
app.add_typer(cache.app, name="cache")
