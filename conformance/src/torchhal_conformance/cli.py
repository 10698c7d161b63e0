"""The command ``torchhal-conformance``."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from torchhal.errors import TorchhalError
from torchhal.registry import registry
from torchhal_conformance import corpus, kills, records, run, signature, waivers
from torchhal_conformance.checks import all_checks, check_named
from torchhal_conformance.child import StartFailed
from torchhal_conformance.cli_calibrate import calibrate_command
from torchhal_conformance.model import PROFILES, in_profile
from torchhal_conformance.mutants import all_mutants
from torchhal_conformance.runner import smoke

app = typer.Typer(
    help="Checks whether a torchhal backend does what it claims.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_err = Console(stderr=True)

Profile = Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")]
Files = Annotated[list[Path], typer.Argument(metavar="REPORT...", exists=True, dir_okay=False)]


def _stop(message: object) -> typer.Exit:
    typer.echo(f"torchhal-conformance: {message}", err=True)
    return typer.Exit(2)


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
        raise _stop(error) from error
    typer.echo(
        json.dumps([r.to_dict() for r in reports], indent=2) if as_json else "\n".join(map(str, reports))
    )
    raise typer.Exit(0 if all(report.passed for report in reports) else 1)


@app.command("list")
def list_command(
    profile: Profile = "inference",
    family: Annotated[str | None, typer.Option(help="Cases of this family alone.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the cases of a profile, with those that came after it was frozen marked as not scored."""
    frozen = corpus.frozen(_profile(profile))
    found = [c for c in corpus.cases() if in_profile(c, profile) and family in (None, c.sample.needs.family)]
    if as_json:
        typer.echo(json.dumps([{"case": c.id, "scored": c.id in frozen} for c in found], indent=2))
        return
    for case in found:
        typer.echo(case.id if case.id in frozen else f"{case.id}  (not scored)")


def _profile(name: str) -> str:
    if name not in PROFILES:
        raise _stop(f"a profile is one of {', '.join(PROFILES)}, and not {name!r}")
    return name


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
        raise _stop(f"--shard expects a number and a count such as 1/4, and got {text!r}")
    return int(number), int(count)


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        return float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        raise _stop(f"--time-budget expects a time such as 90s, 10m or 1h, and got {text!r}") from None


@app.command("run")
def run_command(
    backend: Annotated[str, typer.Option(help="Name of the backend.")] = "",
    profile: Profile = "inference",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The report; conformance-NAME-PROFILE.jsonl by default."),
    ] = None,
    family: Annotated[str | None, typer.Option(help="Cases of this family alone; proves nothing.")] = None,
    case: Annotated[str | None, typer.Option(help="One case, to reproduce it.")] = None,
    shard: Annotated[str, typer.Option(help="A part of the run, such as 1/4, to merge later.")] = "1/1",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a report that was interrupted.")
    ] = False,
    time_budget: Annotated[
        str | None, typer.Option(help="Stop after so long, such as 10m; proves nothing.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Where the random numbers begin.")] = 0,
    explore: Annotated[int, typer.Option(help="Random cases beside the corpus; they only tell.")] = 0,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    timeout: Annotated[float, typer.Option(help="Seconds for one case.")] = run.TIMEOUT,
    plugin: Annotated[str, typer.Option(help="A backend that is not installed, module:attribute.")] = "",
    waiver_file: Annotated[
        Path | None, typer.Option("--waivers", help="TOML file of waivers.", exists=True)
    ] = None,
) -> None:
    """Examine a backend. Exits with 0 when it is conformant (or the chosen part passed), with 1 when it is not."""
    if not backend and not plugin:
        raise _stop("--backend NAME or --plugin MODULE:ATTRIBUTE is needed")
    try:
        waived = waivers.read(waiver_file, datetime.date.today()) if waiver_file else ()
        options = run.Options(
            backend or "",
            _profile(profile),
            family,
            case,
            _shard(shard),
            seed,
            jobs,
            timeout,
            _seconds(time_budget),
            explore,
            plugin,
            waived,
        )
        path = output or Path(f"conformance-{backend or 'plugin'}-{profile}.jsonl")
        report = _run_with_progress(options, path, resume)
    except (
        TorchhalError,
        records.ReportError,
        waivers.WaiverError,
        StartFailed,
        KeyError,
        ValueError,
    ) as error:
        raise _stop(error.args[0] if isinstance(error, KeyError) else error) from error
    _summary(report, path)


def _run_with_progress(options: run.Options, path: Path, resume: bool) -> records.Report:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def progress(done: int, total: int, result: dict[str, Any]) -> None:
            bar.update(task, completed=done, total=total, description=result["check"])
            if result["status"] in records.BAD | {"error"}:
                bar.console.print(
                    f"{result['status']}: {result['case']}\n    {(result['error'] or {}).get('message', '')}\n"
                    f"    reproduce: {options.command(result['case'])}",
                    markup=False,
                    highlight=False,
                )

        return run.run(options, path, resume, progress)


def _summary(report: records.Report, path: Path) -> None:
    assert report.footer is not None
    typer.echo(report.footer["sentence"])
    typer.echo("  " + ", ".join(f"{count} {status}" for status, count in report.footer["counts"].items()))
    told = [r for r in report.results if r["kind"] == "explore" and r["status"] == "fail"]
    for result in told:
        message = f"{result['case']} (seed {report.header['seed']}): {result['error']['message']}"
        typer.echo(f"  found by chance, not scored: {message}")
    typer.echo(f"  report: {path}")
    bad = any(report.footer["counts"].get(status) for status in [*records.BAD, "error"])
    raise typer.Exit(1 if bad or report.footer["verdict"].startswith("NO VERDICT: nothing") else 0)


@app.command("merge")
def merge_command(
    reports: Files, output: Annotated[Path, typer.Option("--output", "-o", help="The whole report.")]
) -> None:
    """Merge the shards of a run into one report."""
    try:
        merged = records.merge([records.read(path) for path in reports])
        merged.footer = _footer(merged)
    except (records.ReportError, waivers.WaiverError, TorchhalError) as error:
        raise _stop(error) from error
    records.write(output, merged)
    _summary(merged, output)


def _footer(report: records.Report) -> dict[str, Any]:
    required = run.required_by_header(report.header)
    whole = {result["case"] for result in report.results} >= run.expected_by_header(report.header)
    if whole:
        found = waivers.faults(report.header, report.results, whole)
        if found:
            raise waivers.WaiverError(found[0])
    return records.footer(report.header, report.results, required, whole)


@app.command("verify")
def verify_command(
    reports: Files,
    by: Annotated[
        str | None, typer.Option("--signer", help="Public key that must have signed, ed25519:HEX.")
    ] = None,
) -> None:
    """Check reports: form, completeness, duplicates, digest, verdict, signature. Exits with 1 when one does not hold."""
    failed = False
    for path in reports:
        found = run.faults(path)
        who: str | None = None
        try:
            who = signature.signer(path)
        except signature.SignatureError as error:
            found.append(str(error))
        if by is not None and who != by:
            found.append(f"expected the signature of {by}, found {who or 'none'}")
        failed |= bool(found)
        typer.echo(f"{path}: " + (f"{len(found)} faults" if found else f"holds, {who or 'not signed'}"))
        for fault in found:
            typer.echo(f"  {fault}")
    raise typer.Exit(1 if failed else 0)


@app.command("sign")
def sign_command(
    report: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    key: Annotated[Path, typer.Option(help="Ed25519 private key, PEM.", exists=True, dir_okay=False)],
) -> None:
    """Sign a report; the signature lies beside it, and `verify` checks it."""
    try:
        typer.echo(f"{signature.path_of(report)}: {signature.sign(report, key)}")
    except signature.SignatureError as error:
        raise _stop(error) from error


@app.command("report")
def report_command(
    reports: Files,
    output: Annotated[Path, typer.Option("--output", "-o", help="The page.")] = Path("conformance.html"),
) -> None:
    """Make one self-contained HTML page of reports, backends side by side."""
    from torchhal_conformance import page

    try:
        documents = [records.read(path, interrupted=True) for path in reports]
    except records.ReportError as error:
        raise _stop(error) from error
    output.write_text(page.page(documents), encoding="utf-8")
    typer.echo(str(output))


@app.command("explain")
def explain_command(
    name: Annotated[
        str, typer.Argument(help="Name of a check or id of a case; all checks when none is given.")
    ] = "",
) -> None:
    """Say what a check tests, why it matters, and how to debug it."""
    wanted = name.partition("/")[0]
    try:
        found = [check_named(wanted)] if wanted else list(all_checks())
    except KeyError:
        raise _stop(
            f"there is no check {wanted!r}; there are {', '.join(c.name for c in all_checks())}"
        ) from None
    for check in found:
        text = check.explanation
        proof = [m.name for m in all_mutants() if check.name in m.killers]
        typer.echo(f"{check.name}\n  tests: {text.tests}\n  why: {text.why}\n  debug: {text.debug}")
        typer.echo(f"  proved by the planted faults: {', '.join(proof) or 'none'}\n")


@app.command("mutants")
def mutants_command(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names of mutants; all when none is given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """Try every planted fault and print what killed it. Exits with 1 when one lives or a check is unproven."""
    wanted = tuple(m for m in all_mutants() if not names or m.name in names)
    if not wanted:
        raise _stop(f"there is no such mutant; there are {', '.join(m.name for m in all_mutants())}")
    found = []
    for kill in kills.hunt(wanted, jobs):
        found.append(kill)
        if not as_json:
            fate = (
                f"{kill.case} ({kill.seconds:.1f} s)"
                if kill.case
                else "LIVES"
                if kill.tried
                else kill.message
            )
            typer.echo(f"{kill.mutant:20} {kill.check:28} {fate}")
    alive, bare = [k for k in found if k.lives], kills.unproven()
    tried = [k for k in found if k.tried]
    if as_json:
        typer.echo(json.dumps([vars(kill) for kill in found], indent=2))
    else:
        typer.echo(
            f"{len(tried) - len(alive)} of {len(tried)} kills; unproven checks: {', '.join(bare) or 'none'}"
        )
        if len(tried) < len(found):
            typer.echo(f"{len(found) - len(tried)} not tried here: they need an accelerator")
    raise typer.Exit(1 if alive or (bare and not names) else 0)


app.command("calibrate")(calibrate_command)


def main() -> None:
    """Entry point of the console script."""
    app()
