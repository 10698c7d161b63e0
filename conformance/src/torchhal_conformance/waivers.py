"""Known failures that a vendor answers for: named, owned, explained, and over by themselves after half a year at most."""

from __future__ import annotations

import datetime
import fnmatch
import tomllib
from collections.abc import Iterable
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

    def covers(self, result: dict[str, Any]) -> bool:
        """Whether the case is one of those it is about."""
        return fnmatch.fnmatchcase(result["case"], self.case)


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
        if not waiver.covers(result):
            continue
        if result["status"] in ("pass", "unsupported-verified"):
            return {**result, "status": "stale-waiver", "waiver": waiver.issue}
        if result["status"] in ("fail", "timeout") and (result["error"] or {}).get("class") == waiver.error:
            return {**result, "status": "waived", "waiver": waiver.issue}
    return result
