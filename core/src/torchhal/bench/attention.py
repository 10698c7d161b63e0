"""``torchhal bench attention``: our backends, torch's own attention and its variants, on the same inputs, in turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from torchhal._text import dtype_name
from torchhal.bench import catalogue
from torchhal.bench.accuracy import Expectation
from torchhal.bench.candidates import Candidate
from torchhal.bench.cases import OWN, Case, Requirement
from torchhal.bench.ceilings import Ceilings
from torchhal.bench.timing import Effort, Timing
from torchhal.registry import Backend


@dataclass(frozen=True)
class Row:
    """One candidate on one case."""

    case: Case
    candidate: str
    ours: bool
    """Whether it is a backend of torchhal, not a peer."""
    timing: Timing | None = None
    error: float = 0.0
    """Largest absolute error at the checked rows."""
    tolerance: float = 0.0
    not_run: str = ""
    """Why there is no time; empty if there is one."""
    yardstick: str = ""
    """Of a call that a backend's own is held against: ``own dense`` and the like; empty for the case itself."""
    backend: str = ""
    """Whose call it is; empty for peers."""
    other_work: bool = False
    """Whether it computes something else than the case, so that rates and speed-ups would mean nothing."""

    @property
    def passed(self) -> bool:
        """Whether the result was right."""
        return bool(self.not_run) or self.error <= self.tolerance


@dataclass(frozen=True)
class Verdict:
    """One requirement of a case, held against what was measured."""

    requirement: Requirement
    measured: float | None
    """How many times faster than the yardstick; None if one of them was not measured or was wrong."""

    @property
    def passed(self) -> bool | None:
        """Whether the requirement is met; None if it was not measured."""
        return None if self.measured is None else self.measured >= self.requirement.ratio

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        needed = self.requirement
        return {
            "against": needed.against,
            "ratio": needed.ratio,
            "factor": needed.factor,
            "measured": self.measured,
            "passed": self.passed,
        }


@dataclass(frozen=True)
class CaseResult:
    """All candidates on one case."""

    case: Case
    rows: list[Row] = field(default_factory=list)

    def timing(self, candidate: str) -> Timing | None:
        """The times of a candidate, None if it was not run."""
        return next((row.timing for row in self.rows if row.candidate == candidate), None)

    def speedup(self, row: Row, best: bool = False) -> float | None:
        """How many times faster than the case's baseline, torch's nearest equivalent, a candidate is; None if it is wrong.

        By medians, or by the best times, which other programs on the machine disturb less.
        """
        peer = self.timing(self.case.baseline)
        if peer is None or row.timing is None or row.other_work or not row.passed:
            return None
        return peer.best / row.timing.best if best else peer.median / row.timing.median

    def verdicts(self, row: Row) -> list[Verdict]:
        """Whether a backend's time clears each bar of the case; nothing for peers and yardsticks."""
        if not row.ours or row.yardstick:
            return []
        return [Verdict(needed, self._measured(needed, row)) for needed in self.case.requirements]

    def _measured(self, needed: Requirement, row: Row) -> float | None:
        held = next((r for r in self.rows if self._is_yardstick(r, needed, row)), None)
        usable = held is not None and held.passed and row.passed
        if not usable or held is None or held.timing is None or row.timing is None:
            return None
        return needed.measured(held.timing, row.timing)

    @staticmethod
    def _is_yardstick(other: Row, needed: Requirement, row: Row) -> bool:
        if needed.against.startswith(OWN):
            return other.backend == row.backend and other.yardstick == needed.against
        return not other.ours and other.candidate == needed.against

    def to_dict(self, limits: Ceilings) -> dict[str, Any]:
        """Numbers for JSON."""
        case = self.case
        described = {
            "dtype": dtype_name(case.dtype),
            "causal": case.causal,
            "masked": case.masked,
            **case.shape,
        }
        return {
            "case": case.name,
            "kind": case.kind,
            "baseline": case.baseline,
            **described,
            "flops": case.flops,
            "bytes": case.bytes,
            "candidates": [self._row_dict(row, limits) for row in self.rows],
        }

    def _row_dict(self, row: Row, limits: Ceilings) -> dict[str, Any]:
        start: dict[str, Any] = {
            "candidate": row.candidate,
            "ours": row.ours,
            "yardstick": row.yardstick,
            "requirements": [verdict.to_dict() for verdict in self.verdicts(row)],
        }
        if row.timing is None:
            return {**start, "not_run": row.not_run}
        over_sdpa = self.case.baseline.startswith("torch sdpa")
        speedup, by_best = self.speedup(row), self.speedup(row, best=True)
        return {
            **start,
            "seconds": row.timing.to_dict(),
            "speedup": speedup,
            "speedup_by_best": by_best,
            "speedup_over_sdpa": speedup if over_sdpa else None,
            "speedup_over_sdpa_by_best": by_best if over_sdpa else None,
            **self._work(row, row.timing.median, limits),
            "max_error": row.error if row.error != float("inf") else None,
            "tolerance": row.tolerance,
            "passed": row.passed,
        }

    def _work(self, row: Row, seconds: float, limits: Ceilings) -> dict[str, float | None]:
        """Rates and shares of the limits, by the work that the case is; nothing for other work."""
        if row.other_work:
            return dict.fromkeys(("gflops", "gbps", "compute_share", "read_share"))
        return {
            "gflops": self.case.flops / seconds / 1e9,
            "gbps": self.case.bytes / seconds / 1e9,
            "compute_share": limits.compute_share(self.case.flops, seconds),
            "read_share": limits.read_share(self.case.bytes, seconds),
        }


def measure(
    case: Case, backends: list[Backend], device: torch.device, effort: Effort, flex: bool = False
) -> CaseResult:
    """Check every candidate on one case, then time those that are right, in turns."""
    with case.mode():
        bound = case.bind(device)
        found = [c for backend in backends for c in bound.ours(case, backend)] + bound.peers(flex)
        expected = bound.expected()
        checked = [_checked(case, candidate, expected) for candidate in found]
        calls = {
            c.name: c.call
            for row, c in zip(checked, found, strict=True)
            if not row.not_run and c.call is not None
        }
        timings = case.time(calls, effort, device)
    return CaseResult(case, [replace(row, timing=timings.get(row.candidate)) for row in checked])


def _checked(case: Case, candidate: Candidate, expected: Expectation) -> Row:
    made = Row(
        case,
        candidate.name,
        candidate.ours,
        not_run=candidate.not_run,
        yardstick=candidate.yardstick,
        backend=candidate.backend,
        other_work=candidate.expected is not None,
    )
    if candidate.call is None:
        return made
    expected = candidate.expected or expected
    try:
        error = expected.error(candidate.view(candidate.call()))
    except Exception as fault:  # a candidate that fails is a result
        return replace(made, not_run=f"raised {type(fault).__name__}: {' '.join(str(fault).split())[:200]}")
    return replace(made, error=error, tolerance=expected.tolerance)


def wrong(results: list[CaseResult]) -> Iterator[Row]:
    """The rows of our backends whose result was not right."""
    return (row for result in results for row in result.rows if row.ours and not row.passed)


def select_cases(patterns: str | None, quick: bool, device: torch.device) -> list[Case]:
    """The cases to time on a device: processors and accelerators have their own."""
    chosen = catalogue.chosen(patterns, device)
    return [case.quick() for case in chosen] if quick else chosen
