"""``torchhal doctor``: what is installed, what works, what does not, and why."""

from __future__ import annotations

import os
import platform
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import platformdirs
import torch
import typer
from rich.markup import escape

from torchhal import environment, inventory, lock
from torchhal.cli.output import FAILED, Json, emit, out, reporting_errors, table
from torchhal.errors import ConfigurationError
from torchhal.registry import Registry, registry


@reporting_errors
def doctor(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show claims, and tracebacks of what failed.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Show torch, every backend and what its hardware probe finds, load failures, settings, lock file and caches.

    Ends with exit code 1 if a plugin failed to load or a probe raised.
    """
    report = examine()
    if json_output:
        emit(report)
    else:
        _show(report, verbose)
    if report["failures"] or any(backend["probe"]["error"] for backend in report["backends"]):
        raise typer.Exit(FAILED)


def examine() -> dict[str, Any]:
    """Everything the command shows, as plain dictionaries and lists."""
    found = registry()
    installed = inventory.backends().to_dict()
    probes = {backend.name: inventory.probe(backend) for backend in found.backends.values()}
    for entry in installed["backends"]:
        probe = probes[entry["name"]]
        entry["probe"] = {
            "status": probe.status, "error": probe.error, "details": probe.details, "findings": dict(probe.findings)
        }  # fmt: skip
    return {
        "environment": _environment(),
        **installed,
        "variables": _variables(found),
        "lock": _lock(found),
        "directories": _directories(),
    }


def _environment() -> dict[str, Any]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "accelerator": None
        if accelerator is None
        else f"{accelerator.type} x {torch.accelerator.device_count()}",
    }


def _variables(found: Registry) -> dict[str, Any]:
    names = [name for name in sorted(os.environ) if name.startswith("TORCHHAL_")]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        environment.warn_unknown(found.backends)
    return {"set": {name: os.environ[name] for name in names}, "unknown": [str(w.message) for w in caught]}


def _lock(found: Registry) -> dict[str, Any]:
    path = lock.default_path()
    if path is None:
        return {"path": None, "state": "off", "detail": "TORCHHAL_LOCK is empty"}
    try:
        locked = lock.read(found, path)
    except ConfigurationError as error:
        return {"path": str(path), "state": "corrupt", "detail": str(error)}
    if locked is None:
        return {"path": str(path), "state": "absent", "detail": "`torchhal tune` writes it"}
    state = "stale" if locked.stale else "valid"
    return {
        "path": str(path),
        "state": state,
        "detail": locked.stale or f"{len(locked.entries)} measured choices",
    }


def _directories() -> dict[str, dict[str, Any]]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    places = {
        "torchhal cache": Path(platformdirs.user_cache_dir("torchhal")),
        "torchhal configuration": Path(platformdirs.user_config_dir("torchhal")),
        "torch compile cache": Path(cache_dir()),
    }
    return {name: {"path": str(path), "exists": path.is_dir()} for name, path in places.items()}


# ---------------------------------------------------------------------------- for a person


def _show(report: dict[str, Any], verbose: bool) -> None:
    console = out()
    here = report["environment"]
    console.print(
        f"torch {here['torch']}, Python {here['python']}, {here['platform']}, {here['threads']} threads"
    )
    console.print(f"accelerator: {here['accelerator'] or 'none that torch sees'}")
    console.print(_backend_table(report["backends"]))
    for backend in report["backends"]:
        _show_findings(backend, verbose)
    _show_failures(report, verbose)
    _show_settings(report)


def _backend_table(backends: list[dict[str, Any]]) -> Any:
    made = table("Backends", "backend", "distribution", "devices", "families", "status")
    for backend in backends:
        made.add_row(
            f"[bold]{escape(backend['name'])}[/]",
            escape(f"{backend['distribution']} {backend['version']}".strip()),
            ", ".join(backend["device_types"]) or "any",
            ", ".join(backend["claims"]) or "none",
            escape(backend["probe"]["status"]),
        )
    return made


def _show_findings(backend: dict[str, Any], verbose: bool) -> None:
    console = out()
    found = backend["probe"]["findings"]
    findings = {key: value for key, value in found.items() if key not in ("status", "mend")}
    if findings:
        console.print(f"[bold]{escape(backend['name'])}[/] sees")
    for key, value in findings.items():
        console.print(f"  {escape(key)}: {escape(_text(value))}")
    for fault in found.get("mend", []):
        console.print(f"  [yellow]{escape(fault['reason'])}[/] {escape('[' + fault['code'] + ']')}")
        console.print(f"    to mend it: [bold]{escape(fault['do'])}[/]", soft_wrap=True)
    if verbose:
        for family, claims in backend["claims"].items():
            console.print(
                f"  claims {family}: "
                + escape("; ".join(", ".join(values) for values in claims.values() if values))
            )
        if backend["probe"]["details"]:
            console.print(escape(backend["probe"]["details"]), style="dim")


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def _show_failures(report: dict[str, Any], verbose: bool) -> None:
    console = out()
    for failure in report["failures"]:
        where = f"{failure['name']} (from {failure['distribution']})"
        console.print(
            f"[bold red]failed to load[/]: {escape(where)} in stage '{failure['stage']}': {escape(failure['reason'])}"
        )
        if verbose and failure["details"]:
            console.print(escape(failure["details"]), style="dim")
    if report["failures"] and not verbose and any(f["details"] for f in report["failures"]):
        console.print("`torchhal doctor --verbose` shows the tracebacks.")
    for name in report["excluded"]:
        console.print(f"left out by TORCHHAL_PLUGINS: {escape(name)}")


def _show_settings(report: dict[str, Any]) -> None:
    console = out()
    chosen = report["variables"]["set"]
    console.print("[bold]Environment variables[/]" + ("" if chosen else ": none of TORCHHAL_* is set"))
    for name, value in chosen.items():
        meaning = environment.VARIABLES.get(name, "")
        console.print(f"  {escape(name)}={escape(value)}  [dim]{escape(meaning)}[/]")
    for text in report["variables"]["unknown"]:
        console.print(f"  [yellow]{escape(text)}[/]")
    locked = report["lock"]
    style = {"stale": "yellow", "corrupt": "red"}.get(locked["state"], "default")
    console.print(
        f"[bold]Lock file[/]: [{style}]{locked['state']}[/] {escape(locked['path'] or '')} ({escape(locked['detail'])})"
    )
    console.print("[bold]Directories[/]")
    for name, place in report["directories"].items():
        console.print(f"  {name}: {escape(place['path'])}" + ("" if place["exists"] else " (not there yet)"))
