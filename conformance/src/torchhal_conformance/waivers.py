"""Known failures that a vendor answers for: named, owned, explained, and over by themselves after half a year at most."""

from __future__ import annotations

import datetime
import fnmatch
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

LONGEST: Final = datetime.timedelta(days=180)
FIELDS: Final = ("case", "owner", "issue", "error", "reason", "expires")


class WaiverError(ValueError):
    """A waiver file says something that can not be honoured."""


@dataclass(frozen=True)
class Waiver:
    """One ``[[waiver]]`` of a file."""

    case: str
    """Glob over case ids."""
    owner: str
    issue: str
    """URL where it is being mended."""
    error: str
    """Class of the failure, as in the result: a different failure is not waived."""
    reason: str
    expires: datetime.date

    def covers(self, case: str) -> bool:
        """Whether the case is one of those it is about."""
        return fnmatch.fnmatchcase(case, self.case)

    def record(self) -> dict[str, str]:
        """It as a header holds it, so that a report answers for itself."""
        return {name: str(getattr(self, name)) for name in FIELDS}


def read(path: Path, today: datetime.date) -> tuple[Waiver, ...]:
    """The waivers of a file.

    Raises:
        WaiverError: a field is missing, misspelt or of another kind, or an expiry lies too far ahead or behind.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise WaiverError(f"{path} can not be read as TOML: {error}") from error
    unknown = sorted(set(document) - {"waiver"})
    if unknown:
        raise WaiverError(f"{path}: expected [[waiver]] tables alone and found {', '.join(unknown)}")
    return tuple(
        _waiver(entry, path, number, today) for number, entry in enumerate(document.get("waiver", []), 1)
    )


def _waiver(entry: dict[str, Any], path: Path, number: int, today: datetime.date) -> Waiver:
    where = f"{path}, waiver {number}"
    if set(entry) != set(FIELDS):
        wrong = sorted(set(entry) ^ set(FIELDS))
        raise WaiverError(
            f"{where}: expected exactly the fields {', '.join(FIELDS)}; missing or unknown: {', '.join(wrong)}"
        )
    texts = [name for name in FIELDS[:-1] if not isinstance(entry[name], str) or not entry[name].strip()]
    if texts:
        raise WaiverError(f"{where}: {texts[0]} expects a text and is {entry[texts[0]]!r}")
    expires = entry["expires"]
    if not isinstance(expires, datetime.date) or isinstance(expires, datetime.datetime):
        raise WaiverError(f"{where}: expires expects a date such as 2026-12-31 and is {expires!r}")
    if expires < today:
        raise WaiverError(f"{where}: expired on {expires}; mend the failure or file it anew")
    if expires > today + LONGEST:
        raise WaiverError(
            f"{where}: expires on {expires}; at most {LONGEST.days} days ahead, {today + LONGEST}, is allowed"
        )
    return Waiver(**entry)


def apply(results: Iterable[dict[str, Any]], waivers: Iterable[Waiver]) -> list[dict[str, Any]]:
    """The results with their waivers: a failure of the named class is waived, a waived case that passes is stale."""
    listed = list(waivers)
    return [_applied(result, listed) for result in results]


def _applied(result: dict[str, Any], waivers: list[Waiver]) -> dict[str, Any]:
    for waiver in waivers:
        if not waiver.covers(result["case"]):
            continue
        if result["status"] in ("pass", "unsupported-verified"):
            return {**result, "status": "stale-waiver", "waiver": waiver.issue}
        if result["status"] in ("fail", "timeout") and (result["error"] or {}).get("class") == waiver.error:
            return {**result, "status": "waived", "waiver": waiver.issue}
    return result


def require_cases(waivers: Iterable[Waiver], cases: Sequence[str]) -> None:
    """Refuse waivers that are about no case at all: nobody needs them, or a name is misspelt.

    Raises:
        WaiverError: there is one; says which.
    """
    for waiver in waivers:
        if not any(waiver.covers(case) for case in cases):
            raise WaiverError(
                f"the waiver of {waiver.case!r} ({waiver.issue}) is about none of the {len(cases)} cases of this run; "
                "remove it, or mend its glob (`torchhal-conformance list` shows the cases)"
            )


def faults(header: dict[str, Any], results: Sequence[dict[str, Any]], whole: bool) -> list[str]:
    """What of a report's results does not follow from the waivers of its header.

    Args:
        header: as the schema has it.
        results: of the report.
        whole: whether they are all of a run; in a part a waiver may be about nothing.
    """
    try:
        started = datetime.datetime.fromisoformat(header["started"]).date()
        listed = [
            _waiver(
                {**entry, "expires": datetime.date.fromisoformat(entry["expires"])},
                Path("header"),
                n,
                started,
            )
            for n, entry in enumerate(header["waivers"], 1)
        ]
        if whole:
            require_cases(listed, [result["case"] for result in results])
    except ValueError as error:
        return [str(error)]
    return [fault for result in results if (fault := _fault(result, listed))]


def _fault(result: dict[str, Any], waivers: list[Waiver]) -> str | None:
    """What is wrong with one result: it stays as it is if they are applied to it again, or has what they gave it."""
    if result["status"] not in ("waived", "stale-waiver"):
        again = _applied(result, waivers)
        return (
            None
            if again == result
            else f"{result['case']} is {result['status']} and should be {again['status']}"
        )
    before = {"waived": "fail", "stale-waiver": "pass"}[result["status"]]
    again = _applied({**result, "status": before}, waivers)
    if (again["status"], again["waiver"]) == (result["status"], result["waiver"]):
        return None
    return f"{result['case']} is {result['status']} by {result['waiver']}, and no waiver of the header makes it so"
