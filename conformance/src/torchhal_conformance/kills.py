"""Which planted faults die, of which check, after how long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

from torchhal_conformance import calls, corpus
from torchhal_conformance.checks import all_checks
from torchhal_conformance.mutants import NAME, Mutant, all_mutants
from torchhal_conformance.nursery import Forks
from torchhal_conformance.pool import Worker

DEADLY: Final = frozenset(("fail", "timeout", "untestable"))
"""Statuses that make a profile fail."""


@dataclass(frozen=True)
class Kill:
    """What became of one mutant."""

    mutant: str
    fault: str
    check: str
    """The check that was to find it."""
    case: str | None
    """The first case that did; None: the mutant lives."""
    message: str
    seconds: float
    tried: bool = True
    """False: nothing here has what the fault needs to be seen, so it counts neither as killed nor as living."""

    @property
    def lives(self) -> bool:
        """Whether the check was asked and found nothing."""
        return self.tried and self.case is None


def hunt(mutants: tuple[Mutant, ...], jobs: int, timeout: float = 60.0) -> Iterator[Kill]:
    """Try every mutant's killers, each until its first failure; in the order of the mutants."""
    nurseries: SimpleQueue[Forks] = SimpleQueue()
    for _ in range(jobs):
        nurseries.put(Forks(0, timeout, 1))
    try:
        with ThreadPoolExecutor(jobs) as executor:
            for kills in executor.map(lambda mutant: _hunt_one(mutant, nurseries, timeout), mutants):
                yield from kills
    finally:
        for _ in range(jobs):
            nurseries.get().close()


def _hunt_one(mutant: Mutant, nurseries: SimpleQueue[Forks], timeout: float) -> list[Kill]:
    lacking = mutant.needs - calls.accelerator_facilities()
    if lacking:
        message = f"not tried here: no accelerator with {' and '.join(sorted(lacking))}"
        return [Kill(mutant.name, mutant.fault, check, None, message, 0.0, False) for check in mutant.killers]
    plugin = f"torchhal_conformance.mutants:plugins.{mutant.name}"
    # A device's context does not live through a fork, and there is none outside POSIX; macOS has it in name.
    if mutant.needs or sys.platform != "linux":
        worker = Worker(NAME, plugin, 0, timeout, 1)
        try:
            return [_first_kill(worker, mutant, check) for check in mutant.killers]
        finally:
            worker.stop()
    forks = nurseries.get()
    forks.plant(plugin)
    try:
        return [_first_kill(forks, mutant, check) for check in mutant.killers]
    finally:
        nurseries.put(forks)


def _first_kill(worker: Worker, mutant: Mutant, check: str) -> Kill:
    begin = time.monotonic()
    for case in corpus.cases():
        if case.check.name != check or case.sample.needs.unclaimed(mutant.capabilities):
            continue
        result = worker.run(case.id)
        if result["status"] in DEADLY:
            message = (result["error"] or {}).get("message", "")
            return Kill(mutant.name, mutant.fault, check, case.id, message, time.monotonic() - begin)
    return Kill(mutant.name, mutant.fault, check, None, "lives", time.monotonic() - begin)


def unproven() -> list[str]:
    """Checks that no mutant names among its killers."""
    proven = {check for mutant in all_mutants() for check in mutant.killers}
    return sorted(check.name for check in all_checks() if check.name not in proven)
