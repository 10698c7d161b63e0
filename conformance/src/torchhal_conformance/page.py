"""Reports as one HTML page that needs nothing beside it: no network, no other file.

The page holds the reports as JSON and draws them itself. Words of a report come from backends and their errors, so
they are data all the way: escaped here, put into the page as text there, and the page's policy runs no other script
than the template's own.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

Record = dict[str, Any]

INCOMPLETE: Final = "incomplete report, proves nothing"
"""Verdict on a report without a footer: its run did not come to an end."""


@dataclass(frozen=True)
class Document:
    """One report as it was written: what ran where, what came out, and the sum of it."""

    header: Record
    results: list[Record]
    footer: Record | None


def read(path: str | Path) -> Document:
    """A report from JSON Lines; a last line that was cut short is left out, and with it the footer.

    Raises:
        ValueError: it is no report; says which line is wrong and why.
    """
    lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    records = [_record(path, number, line, number == len(lines)) for number, line in enumerate(lines, 1)]
    found = [record for record in records if record is not None]
    kinds = [record["record"] for record in found]
    complete = kinds[-1:] == ["footer"]
    if kinds != ["header"] + ["result"] * (len(kinds) - 1 - complete) + ["footer"] * complete:
        raise ValueError(
            f"{path}: expected one header, results and at most one footer, in this order; "
            f"got {', '.join(dict.fromkeys(kinds)) or 'nothing'}"
        )
    return Document(found[0], found[1 : len(found) - complete], found[-1] if complete else None)


def _record(path: str | Path, number: int, line: str, last: bool) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        if last:
            return None
        raise ValueError(f"{path}, line {number}: expected a JSON object, got {line[:80]!r}") from error
    if not isinstance(record, dict) or not isinstance(record.get("record"), str):
        raise ValueError(f"{path}, line {number}: expected an object with 'record', got {line[:80]!r}")
    return record


def page(reports: Sequence[Document]) -> str:
    """The page over reports of one or several backends, side by side in the order given."""
    template = files("torchhal_conformance").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "POLICY": _policy(template),
        "TITLE": html.escape(_title(reports)),
        "SUMMARY": "".join(f"<li>{html.escape(verdict(report))}</li>" for report in reports),
        "DATA": embedded([asdict(report) for report in reports]),
    }
    return re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], template)


def verdict(report: Document) -> str:
    """The verdict in one line of text."""
    backend, footer = report.header["backend"], report.footer
    if footer is None:
        return f"{backend['name']} {backend['version']}: {INCOMPLETE}"
    counted = f"{footer['passed']} / {footer['required']} required passed"
    return f"{backend['name']} {backend['version']}: {footer['verdict']}, {counted}"


def embedded(value: Any) -> str:
    """JSON that can stand inside a script element: no character in it means anything to HTML."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    """The same without numbers that JSON has no word for; the page turns the words back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _title(reports: Sequence[Document]) -> str:
    return "torchhal conformance: " + ", ".join(str(report.header["backend"]["name"]) for report in reports)


def _policy(template: str) -> str:
    """Content security policy that runs the template's script and nothing else, and loads nothing."""
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
