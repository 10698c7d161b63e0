"""How much each bound of the suite may be moved: wider until a planted fault survives, narrower until an honest backend fails.

A bound is of a check and an element type, for each has arithmetic of its own. From below it is held by honest backends: the
largest error over bound among their results. From above it is held by the planted faults: of each fault the largest error
over bound among the cases of the check that is to find it, and of those the smallest, which is the fault that would survive
first. Cases of several element types count below for each of them, and above for none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from torchhal_conformance import corpus
from torchhal_conformance.checks import all_checks
from torchhal_conformance.model import Case
from torchhal_conformance.mutants import NAME, Mutant, all_mutants
from torchhal_conformance.pool import Worker
from torchhal_conformance.records import Report

STRONG: Final = 16.0
"""Error over bound that is enough: a fault this far beyond is not what holds a bound, so no worse case of it is looked for."""
UNTYPED: Final = "-"
"""Element type of cases that name none."""

Key = tuple[str, str]
"""A check and an element type."""


@dataclass(frozen=True)
class Honest:
    """The result of an honest backend that comes nearest to a bound."""

    ratio: float
    backend: str
    case: str


@dataclass(frozen=True)
class Exceeded:
    """By how much a planted fault exceeds a bound at most."""

    ratio: float
    mutant: str
    case: str


@dataclass(frozen=True)
class Bound:
    """One bound and what holds it."""

    check: str
    dtype: str
    honest: Honest
    weakest: Exceeded | None
    """Of the faults that exceed it, the one that does so least; None: no fault does."""
    faults: int
    """How many exceed it."""

    @property
    def widen(self) -> float | None:
        """Factor by which it could be wider before a fault survives."""
        return None if self.weakest is None else self.weakest.ratio

    @property
    def tighten(self) -> float:
        """Factor by which it could be narrower before an honest backend fails."""
        return math.inf if not self.honest.ratio else 1.0 / self.honest.ratio

    @property
    def holds(self) -> bool:
        """Whether a fault exceeds it, and no honest backend does."""
        return self.widen is not None and self.widen > 1.0 and self.tighten >= 1.0

    def record(self) -> dict[str, Any]:
        """It as JSON holds it; what has no end is null."""
        return {
            "check": self.check, "dtype": self.dtype, "honest": vars(self.honest), "faults": self.faults,
            "weakest": None if self.weakest is None else {**vars(self.weakest), "ratio": _finite(self.weakest.ratio)},
            "widen": _finite(self.widen), "tighten": _finite(self.tighten), "holds": self.holds,
        }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def nearest(reports: Iterable[Report], checks: Sequence[str] = ()) -> dict[Key, Honest]:
    """Of each bound the result that comes nearest to it.

    Args:
        reports: of backends that are taken to be honest.
        checks: bounds of these alone; all if empty.
    """
    found: dict[Key, Honest] = {}
    for report in reports:
        for result in report.results:
            ratio = result["ratio"]
            if ratio is None or result["kind"] != "corpus" or (checks and result["check"] not in checks):
                continue
            if not result["dtypes"] and ratio == 0:  # empty lists, of which nothing was compared
                continue
            for dtype in result["dtypes"] or [UNTYPED]:
                key = (result["check"], dtype)
                if key not in found or ratio > found[key].ratio:
                    found[key] = Honest(ratio, report.header["backend"]["name"], result["case"])
    return found


def exceeded(mutants: Sequence[Mutant], keys: Iterable[Key], jobs: int) -> Iterator[tuple[Key, Exceeded]]:
    """By how much each fault exceeds each bound of the checks that are to find it, at most or :data:`STRONG` times."""
    wanted = frozenset(keys)
    with ThreadPoolExecutor(jobs) as executor:
        for found in executor.map(lambda mutant: _exceeded_by(mutant, wanted), mutants):
            yield from found.items()


def _exceeded_by(mutant: Mutant, wanted: frozenset[Key]) -> Mapping[Key, Exceeded]:
    found: dict[Key, Exceeded] = {}
    worker = Worker(NAME, f"torchhal_conformance.mutants:plugins.{mutant.name}", 0, 60.0, 1)
    try:
        for case in corpus.cases():
            key = _key(case)
            if key not in wanted or case.check.name not in mutant.killers:
                continue
            if case.sample.needs.unclaimed(mutant.capabilities) or (
                key in found and found[key].ratio >= STRONG
            ):
                continue
            ratio = _ratio(worker.run(case.id))
            if ratio > 1.0 and (key not in found or ratio > found[key].ratio):
                found[key] = Exceeded(ratio, mutant.name, case.id)
    finally:
        worker.close()
    return found


def _key(case: Case) -> Key | None:
    dtypes = [str(dtype).removeprefix("torch.") for dtype in case.sample.needs.dtypes] or [UNTYPED]
    return (case.check.name, dtypes[0]) if len(dtypes) == 1 else None


def _ratio(result: Mapping[str, Any]) -> float:
    """Error over bound of a failure; 0 of one that has none, as of a wrong shape, which no width of a bound lets through."""
    ratio = result["ratio"]
    return float(ratio) if result["status"] == "fail" and ratio is not None else 0.0


def weigh(honest: Mapping[Key, Honest], faults: Iterable[tuple[Key, Exceeded]]) -> list[Bound]:
    """The bounds that honest results know of, and what holds them, in order of their names."""
    above: dict[Key, list[Exceeded]] = {}
    for key, found in faults:
        above.setdefault(key, []).append(found)
    return [
        Bound(
            *key,
            honest[key],
            min(above.get(key, []), key=lambda e: e.ratio, default=None),
            len(above.get(key, [])),
        )
        for key in sorted(honest)
    ]


def exact(honest: Mapping[Key, Honest], checks: Sequence[str] = ()) -> dict[str, list[str]]:
    """The checks without a bound, of bits or of yes and no, and the faults that each has to find."""
    bounded = {check for check, _ in honest}
    return {
        check.name: [mutant.name for mutant in all_mutants() if check.name in mutant.killers]
        for check in all_checks()
        if check.name not in bounded and (not checks or check.name in checks)
    }


def table(bounds: Sequence[Bound]) -> Iterator[str]:
    """Lines of a table for people."""
    yield f"{'bound':28} {'type':9} {'honest':>7} {'narrower':>9} {'wider':>7} {'faults':>6}  weakest fault"
    for bound in bounds:
        wider, weakest = "none", "no planted fault exceeds it"
        if bound.weakest is not None:
            strong = bound.weakest.ratio >= STRONG
            wider, weakest = (
                f">= {STRONG:g}" if strong else f"{bound.weakest.ratio:.2f}",
                bound.weakest.mutant,
            )
        mark = "" if bound.holds else "  DOES NOT HOLD"
        yield (
            f"{bound.check:28} {bound.dtype:9} {bound.honest.ratio:7.2f} {bound.tighten:9.2f} {wider:>7} {bound.faults:6}  "
            f"{weakest}{mark}"
        )
