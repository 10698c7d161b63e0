"""A report as JSON Lines: a header that says what was tested, one result a line as they come, and a footer with the verdict.

Results are appended while a run goes on, so that what was found survives whatever ends it; a report without a footer
proves nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
"""Of the records, as the published schema has them; a change that a reader must know of raises it."""
STATUSES: Final = (
    "pass", "fail", "unsupported-verified", "untestable", "waived", "stale-waiver", "error", "timeout", "not-run",
)  # fmt: skip
BAD: Final = frozenset(("fail", "untestable", "stale-waiver", "timeout"))
"""Statuses that make a profile fail."""

Record = dict[str, Any]


class ReportError(ValueError):
    """A report is damaged, incomplete, or does not belong with another."""


@dataclass
class Report:
    """A report as read."""

    header: Record
    results: list[Record] = field(default_factory=list)
    footer: Record | None = None


def line(record: Mapping[str, Any]) -> str:
    """A record as its line."""
    return json.dumps(record, sort_keys=True, ensure_ascii=True, allow_nan=False) + "\n"


def digest(header: Record, results: Iterable[Record]) -> str:
    """Of everything that two runs of the same seed have in common: times are left out."""
    total = hashlib.sha256(line({k: v for k, v in header.items() if k not in TIMES}).encode())
    for result in sorted(results, key=lambda r: r["case"]):
        total.update(line({k: v for k, v in result.items() if k not in TIMES}).encode())
    return total.hexdigest()


TIMES: Final = ("seconds", "started", "shard")


def read(path: Path, interrupted: bool = False) -> Report:
    """The report in a file.

    Args:
        interrupted: leave out a last line that was not written to its end.

    Raises:
        ReportError: a line is no record, or the records are not a header, results and at most one footer.
    """
    report: Report | None = None
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise ReportError(f"{path} is no text: {error}") from error
    if interrupted and lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
            kind = record["record"]
        except (ValueError, KeyError, TypeError) as error:
            raise ReportError(f"{path}, line {number}: not a record: {error}") from error
        if (kind == "header") != (report is None) or kind not in ("header", "result", "footer"):
            raise ReportError(f"{path}, line {number}: a {kind} record has no place here")
        if report is None:
            report = Report(record)
        elif report.footer is not None:
            raise ReportError(f"{path}, line {number}: a record after the footer")
        elif kind == "footer":
            report.footer = record
        else:
            report.results.append(record)
    if report is None:
        raise ReportError(f"{path} is empty: expected a header first")
    return report


def write(path: Path, report: Report) -> None:
    """The report as a file, which is the old one until the new one is complete."""
    records = [report.header, *report.results, *([report.footer] if report.footer else [])]
    beside = path.with_name(f".{path.name}.part")
    beside.write_text("".join(map(line, records)), encoding="utf-8")
    beside.replace(path)


# ---------------------------------------------------------------------------- verdicts


def footer(header: Record, results: Sequence[Record], required: frozenset[str], whole: bool) -> Record:
    """The verdict over results.

    Args:
        required: ids that the frozen profile requires of what this backend claims.
        whole: whether the run covered everything; a part proves nothing.
    """
    counts = Counter(result["status"] for result in results if result["kind"] == "corpus")
    status = {result["case"]: result["status"] for result in results}
    passed = sum(status.get(case) == "pass" for case in required)
    waived = sum(status.get(case) == "waived" for case in required)
    word = _verdict(counts, len(required), passed, waived, whole)
    backend = header["backend"]
    subject = f"torchhal {header['spec']} / {header['profile']} {header['edition']} / {backend['name']} {backend['version']}"
    sentence = f"{subject} on {header['environment']['device']}: {word} ({passed} of {len(required)} required; {waived} waived)"
    return {
        "record": "footer", "counts": dict(sorted(counts.items())), "required": len(required), "passed": passed,
        "waived": waived, "verdict": word, "sentence": sentence, "digest": digest(header, results),
    }  # fmt: skip


def _verdict(counts: Counter[str], required: int, passed: int, waived: int, whole: bool) -> str:
    if not required:
        return "NO VERDICT: nothing of this profile is claimed"
    if any(counts[status] for status in BAD):
        return "NOT CONFORMANT"
    if counts["error"]:
        return "NO VERDICT: the suite itself failed"
    if not whole or passed + waived < required:
        return "NO VERDICT: a part of a run proves nothing"
    return "CONFORMANT" if not waived else "CONFORMANT WITH WAIVERS"


def merge(reports: Sequence[Report]) -> Report:
    """One report of the shards of a run, without a footer.

    Raises:
        ReportError: they are not of one thing tested, or overlap.
    """
    first = reports[0]
    for other in reports[1:]:
        for key in sorted({*first.header, *other.header} - set(TIMES)):
            if first.header.get(key) != other.header.get(key):
                raise ReportError(
                    f"these reports differ in what they tested: {key} is {first.header.get(key)!r} and {other.header.get(key)!r}"
                )
    results = sorted((r for report in reports for r in report.results), key=lambda r: r["order"])
    twice = [case for case, count in Counter(r["case"] for r in results).items() if count > 1]
    if twice:
        raise ReportError(f"{twice[0]} is in more than one of these reports")
    return Report({**first.header, "shard": "1/1"}, results)


def form_faults(report: Report) -> list[str]:
    """What contradicts the published schema, and cases that occur twice."""
    import jsonschema

    kinds = {kind["properties"]["record"]["const"]: kind for kind in schema()["oneOf"]}
    validators = {name: jsonschema.Draft202012Validator(kind) for name, kind in kinds.items()}
    everything = [report.header, *report.results, *([report.footer] if report.footer else [])]
    found = [
        f"record {number}: {error.message}"
        for number, record in enumerate(everything, 1)
        for error in validators[record["record"]].iter_errors(record)
    ]
    twice = [case for case, count in Counter(r.get("case") for r in report.results).items() if count > 1]
    return found + [f"{case} has more than one result" for case in twice]


def schema() -> dict[str, Any]:
    """The JSON Schema of a record."""
    from importlib import resources

    return json.loads(resources.files("torchhal_conformance").joinpath("schema.json").read_text("utf-8"))  # type: ignore[no-any-return]
