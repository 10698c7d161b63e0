"""What a run found: a list of findings, as an object, as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One contradiction between what a backend says and what it does; stands alone when read."""

    check: str
    """Identifier of the check, for example ``contract.claims``."""
    subject: str
    """What was looked at: a hook, a field, a problem."""
    expected: str
    got: str

    def __str__(self) -> str:
        return f"{self.check}: {self.subject}: expected {self.expected}, got {self.got}"


@dataclass(frozen=True)
class Report:
    """The outcome of one run over one backend."""

    backend: str
    version: str
    profile: str
    examined: int
    """How many statements were examined; a report over none proves nothing and does not pass."""
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether something was examined and nothing was found."""
        return self.examined > 0 and not self.findings

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {**asdict(self), "passed": self.passed}

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        head = f"{self.backend} {self.version}: {self.profile}: {self.examined} statements examined, "
        tail = "no contradiction" if self.passed else f"{len(self.findings)} contradicted"
        return "\n".join([head + tail, *(f"  {finding}" for finding in self.findings)])
