"""Runs over six cases whose worker and judge are this process, for backends that leave it alone."""

from __future__ import annotations

import datetime
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from torchhal.errors import TorchhalError
from torchhal.registry import registry
from torchhal_conformance import claims, corpus, examine, judge, run, worker
from torchhal_conformance.child import StartFailed
from torchhal_conformance.cli import app
from torchhal_conformance.run import Options

CLAIMED = (
    "attention.numbers/dense-float32-b2-h4-l1-s1-e16",
    "attention.numbers/dense-float32-b2-h4-l15-s17-e16",
    "attention.numbers/dense-float32-b2-h4-l9-s0-e16",
    "attention.determinism/dense-float32-b2-h4-l1-s1-e16",
)
REFUSED = (
    "attention.numbers/varlen-float32-b4-h4-l9-s13-e16",
    "attention.numbers/varlen-float32-causal-b4-h4-l9-s13-e16",
)
TODAY = datetime.date(2026, 11, 25)
GOOD = Options("", plugin="hostile:good")


class InProcess:
    """A worker without a process, for backends that leave this one alone."""

    def __init__(self, backend: str, plugin: str, seed: int, timeout: float, threads: int) -> None:
        self.specified, self.seed = plugin, seed
        self.backend, self.greeting = backend, {}

    def start(self) -> None:
        """Load it, as a worker does."""
        try:
            self.backend = examine.load_plugin(self.specified) if self.specified else self.backend
            self.greeting = worker.described(registry().get(self.backend))
        except (TorchhalError, ValueError) as error:
            raise StartFailed(str(error)) from error

    def close(self) -> None:
        """It stays."""

    def recorded(self, case: str) -> tuple[dict[str, Any], bytes]:
        result, recorded = worker._examined(case, self.backend, self.seed)
        return result, recorded


class InProcessJudge:
    """A judge without a process, which takes a backend's place while it judges."""

    def __init__(self, description: dict[str, Any], seed: int, threads: int) -> None:
        kinds = frozenset(description["device_types"])
        self.absent = judge.absentee(description["name"], kinds, claims.read(description["claims"]))
        self.seed = seed

    def close(self) -> None:
        """It stays."""

    def judged(self, result: dict[str, Any], recorded: bytes) -> dict[str, Any]:
        present = registry().backends[self.absent.name]
        registry().backends[self.absent.name] = self.absent
        try:
            found = judge.judge(judge.case_named(result["case"], self.seed), self.absent, recorded)
        finally:
            registry().backends[self.absent.name] = present
        return {**result, **found, "seconds": result["seconds"]}


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of six cases, all required, and backends that leave nothing behind."""
    whole, ids = corpus.cases, {*CLAIMED, *REFUSED}
    monkeypatch.setattr(corpus, "cases", lambda seed=0: tuple(c for c in whole(seed) if c.id in ids))
    monkeypatch.setattr(corpus, "frozen", lambda profile, edition="": frozenset(ids))
    monkeypatch.setattr(registry(), "backends", dict(registry().backends))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worker and judge without processes."""
    monkeypatch.setattr(run, "Worker", InProcess)
    monkeypatch.setattr(run, "Judge", InProcessJudge)
    # One thread: the two of a real run have processes of their own to work in.
    monkeypatch.setattr(run, "ThreadPoolExecutor", lambda count: ThreadPoolExecutor(1))


def changed(options: Options, **changes: Any) -> Options:
    return Options(**{**vars(options), **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])
