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
from dataclasses import asdict
from importlib.resources import files
from typing import Any, Final

from torchhal_conformance.records import Report

INCOMPLETE: Final = "incomplete report, proves nothing"
"""Verdict on a report without a footer: its run did not come to an end."""


def page(reports: Sequence[Report]) -> str:
    """The page over reports of one or several backends, side by side in the order given."""
    template = files("torchhal_conformance").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "POLICY": _policy(template),
        "TITLE": html.escape(_title(reports)),
        "SUMMARY": "".join(f"<li>{html.escape(verdict(report))}</li>" for report in reports),
        "DATA": embedded([asdict(report) for report in reports]),
    }
    return re.sub("@@([A-Z]+)@@", lambda mark: parts[mark[1]], template)


def verdict(report: Report) -> str:
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


def _title(reports: Sequence[Report]) -> str:
    return "torchhal conformance: " + ", ".join(str(report.header["backend"]["name"]) for report in reports)


def _policy(template: str) -> str:
    """Content security policy that runs the template's script and nothing else, and loads nothing."""
    script = template.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
