"""``torchhal cache``: compile caches in a store, from the command line."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.markup import escape

from torchhal import _cache_format as fmt
from torchhal._fingerprint import explain as differences
from torchhal._fingerprint import fingerprint
from torchhal.cache import CacheStore, cache_store, default_key, load_cache, save_cache
from torchhal.cli.output import FAILED, Json, emit, err, out, reporting_errors, table, usage
from torchhal.cli.program import Program, run_program
from torchhal.errors import CacheIntegrityError

app = typer.Typer(
    help="Keep, load and check compile caches. Only load caches you trust.", no_args_is_help=True
)

Store = Annotated[
    str, typer.Argument(metavar="STORE", help="A path, or a URL such as file:///var/cache/torchhal.")
]
Key = Annotated[
    str | None, typer.Option(help="Key of the caches; by default one that depends on this environment.")
]
Script = Annotated[
    str | None, typer.Argument(metavar="[SCRIPT]", help="A program to run; with -m a module's name.")
]
Arguments = Annotated[list[str] | None, typer.Argument(metavar="[ARGS]...", help="Passed on as they are.")]
Module = Annotated[bool, typer.Option("-m", "--module", help="SCRIPT is a module's name.")]

_RUNS = {"allow_interspersed_args": False}


@app.command("list")
@reporting_errors
def list_entries(
    store: Store,
    prefix: Annotated[str, typer.Option(help="Only keys that begin so.")] = "",
    json_output: Json = False,
) -> None:
    """List what a store holds."""
    opened = cache_store(store)
    keys, stats = opened.list(prefix), opened.stats()
    if json_output:
        emit({"url": opened.url, "keys": keys, "stats": dataclasses.asdict(stats)})
        return
    for key in keys:
        out().print(escape(key))
    bound = "" if stats.max_bytes is None else f" of at most {stats.max_bytes}"
    err().print(f"{stats.entries} entries, {stats.bytes} bytes{bound}, in {escape(opened.url)}")


@app.command("save", context_settings=_RUNS)
@reporting_errors
def save(
    store: Store, script: Script = None, arguments: Arguments = None, module: Module = False, key: Key = None
) -> None:
    """Run a program and keep what torch.compile produced in it.

    A cache is of one process, so this command runs the program itself, plainly; in a program of your own call
    torchhal.save_cache(). The program ends the command with its own exit code.
    """
    if script is None:
        usage(
            "cache save expects the program whose compilations to keep: torchhal cache save STORE SCRIPT [ARGS]..."
        )
    opened = cache_store(store)
    outcome = run_program(_program(script, arguments, module), lambda execute: execute())
    entry = save_cache(opened, key)
    if entry.section is not None:
        err().print(f"kept {entry.artifacts} artifacts, {entry.bytes} bytes, as {escape(entry.section)}")
    elif entry.recorded:
        err().print(f"all {entry.recorded} artifacts were in the store already, under {escape(entry.key)}")
    else:
        err().print("the program compiled nothing, so there was nothing to keep", style="yellow")
    outcome.leave()


@app.command("load", context_settings=_RUNS)
@reporting_errors
def load(
    store: Store, script: Script = None, arguments: Arguments = None, module: Module = False, key: Key = None
) -> None:
    """Hand a store's caches to torch, then run a program if one is named.

    Without a program the caches end up in torch's own cache directory, for later processes. Only load caches
    you trust: they hold code that torch runs.
    """
    program = None if script is None else _program(script, arguments, module)
    err().print(escape(str(load_cache(store, key))))
    if program is not None:
        run_program(program, lambda execute: execute()).leave()


def _program(script: str, arguments: list[str] | None, module: bool) -> Program:
    program = Program(script, arguments or (), module)
    if fault := program.fault():
        usage(fault)
    return program


# ---------------------------------------------------------------------------- looking without loading


@app.command("verify")
@reporting_errors
def verify(store: Store, key: Key = None, json_output: Json = False) -> None:
    """Check every byte of a store's compile caches against their digests; loads nothing.

    Digests find accidents; they do not prove who wrote an entry. Ends with exit code 1 if a section is damaged.
    """
    opened = cache_store(store)
    rows = [
        {"section": name, "artifacts": len(s.artifacts) if s else 0, "fault": fault}
        for name, s, fault in _sections(opened, key)
    ]
    if json_output:
        emit({"url": opened.url, "sections": rows, "damaged": sum(bool(row["fault"]) for row in rows)})
    else:
        made = table(
            f"Compile caches in {opened.url}", "section", "artifacts", "state", numbers=("artifacts",)
        )
        for row in rows:
            state = f"[red]{escape(str(row['fault']))}[/]" if row["fault"] else "[green]intact[/]"
            made.add_row(escape(str(row["section"])), str(row["artifacts"]), state)
        out().print(made)
    if any(row["fault"] for row in rows):
        raise typer.Exit(FAILED)


@app.command("explain")
@reporting_errors
def explain(store: Store, key: Key = None, json_output: Json = False) -> None:
    """Say whether this environment can load a store's compile caches, and which field keeps it from that.

    Ends with exit code 1 if none can be loaded.
    """
    opened, here = cache_store(store), fingerprint()
    rows: list[dict[str, Any]] = []
    for name, section, fault in _sections(opened, key):
        found = [] if section is None else differences(section.fingerprint, here)
        usable = not fault and not any(d.refuses for d in found)
        rows.append(
            {"section": name, "loads": usable, "reasons": [fault] if fault else [str(d) for d in found]}
        )
    if json_output:
        emit({"url": opened.url, "here": here.to_dict(), "key": key or default_key(), "sections": rows})
    else:
        for row in rows:
            out().print(
                f"{escape(row['section'])}: {'loads here' if row['loads'] else '[red]does not load here[/]'}"
            )
            for reason in row["reasons"]:
                out().print(f"  {escape(reason)}")
        if not rows:
            err().print(f"there are no compile caches in {escape(opened.url)}", style="yellow")
    if not any(row["loads"] for row in rows):
        raise typer.Exit(FAILED)


def _sections(store: CacheStore, key: str | None) -> list[tuple[str, fmt.Section | None, str]]:
    """Name, content and fault of every section under ``key``, or of all compile caches of the store."""
    found: list[tuple[str, fmt.Section | None, str]] = []
    for name in store.list("" if key is None else f"{key}/"):
        try:
            content = store.get(name)
            if content is None or (
                key is None and not content.startswith(fmt.MAGIC) and not name.startswith("compile-")
            ):
                continue
            found.append((name, fmt.decode_section(name, content), ""))
        except CacheIntegrityError as error:
            found.append((name, None, str(error)))
    return found
