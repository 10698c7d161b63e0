"""Timers that take turns: every candidate is timed in every round, so that drift of the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Final

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Times of one candidate, in seconds per call."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle of the times."""
        return quantile(self.seconds, 0.5)

    @property
    def p10(self) -> float:
        """The time that one call in ten undercuts."""
        return quantile(self.seconds, 0.1)

    @property
    def p90(self) -> float:
        """The time that one call in ten exceeds."""
        return quantile(self.seconds, 0.9)

    @property
    def best(self) -> float:
        """The shortest time: the cost with the least interference."""
        return min(self.seconds)

    host: float | None = None
    """Seconds until a call returns to the host, median; None where the host computes."""

    def to_dict(self) -> dict[str, Any]:
        """Quantiles in seconds and the number of repetitions."""
        return {
            "median": self.median, "p10": self.p10, "p90": self.p90, "best": self.best, "repetitions": len(self.seconds),
            "host": self.host,
        }  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    repetitions: int = 9
    """Rounds that are always made, unless ``limit`` ends them."""
    budget: float = 2.0
    """Seconds to go on for after that, while rounds are few."""
    limit: float = 30.0
    """Seconds after which three rounds are enough."""
    most: int = 50
    """Rounds that are enough however short they are."""
    floor: float = 1e-3
    """Seconds one timing lasts at least, by repeating short calls."""

    def goes_on(self, rounds: int, elapsed: float) -> bool:
        """Whether another round is due."""
        if rounds < 3:
            return True
        if rounds < self.repetitions:
            return elapsed < self.limit
        return rounds < self.most and elapsed < self.budget


QUICK = Effort(repetitions=3, budget=0.2, limit=3.0, most=9)


def quantile(values: tuple[float, ...], at: float) -> float:
    """The value at a share of the sorted values, between neighbours in proportion."""
    ordered = sorted(values)
    place = at * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def synchronizer(device: torch.device) -> Call:
    """What waits for the device's work to finish; nothing for the CPU."""
    if device.type == "cpu":
        return _nothing
    return lambda: torch.accelerator.synchronize(device)


_CACHE: Final = 256 << 20
"""Bytes that are written before each call on an accelerator: more than its caches hold, so that every call finds them cold."""
_WRITINGS: Final = 6
"""How often they are written: work enough that the host has sent the call before the device could begin it. One writing takes
85 us at 3 TB/s, and some calls cost the host 300."""
_HOST_CALLS: Final = 20
"""Calls that the host sends one after the other when its own time is measured: fewer than a queue holds."""


def on_device(calls: Mapping[str, Call], effort: Effort, device: torch.device) -> dict[str, Timing]:
    """Time the candidates in turns by the device's own clock, with cold caches, and what a call costs the host.

    Args:
        calls: the candidates by name.
        effort: how long to measure.
        device: an accelerator, whose events are the clock.
    """
    written = torch.empty(_CACHE // 4, dtype=torch.int32, device=device)
    begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))

    def once(call: Call) -> float:
        for _ in range(_WRITINGS):
            written.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def host(call: Call) -> float:
        torch.accelerator.synchronize(device)
        start = time.perf_counter()
        for _ in range(_HOST_CALLS):
            call()
        return (time.perf_counter() - start) / _HOST_CALLS

    for call in calls.values():
        for _ in range(3):
            once(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    sent: dict[str, list[float]] = {name: [] for name in calls}
    start, rounds = time.perf_counter(), 0
    while effort.goes_on(rounds, time.perf_counter() - start):
        for name, call in calls.items():
            times[name].append(once(call))
            if rounds < 3:
                sent[name].append(host(call))
        rounds += 1
    return {name: Timing(tuple(values), quantile(tuple(sent[name]), 0.5)) for name, values in times.items()}


def timed(calls: Mapping[str, Call], effort: Effort, device: torch.device) -> dict[str, Timing]:
    """Time the candidates in turns, by the clock that suits the device."""
    return interleaved(calls, effort) if device.type == "cpu" else on_device(calls, effort, device)


def _nothing() -> None:
    return None


def interleaved(
    calls: Mapping[str, Call], effort: Effort = QUICK, wait: Call = _nothing
) -> dict[str, Timing]:
    """Time the candidates in turns, each warmed up first.

    Args:
        calls: the candidates by name.
        effort: how long to measure.
        wait: called before the clock is stopped, see :func:`synchronizer`.
    """
    inner = {name: _inner_count(call, effort.floor, wait) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while effort.goes_on(rounds, time.perf_counter() - begin):
        for name, call in calls.items():
            times[name].append(_batch(call, inner[name], wait))
        rounds += 1
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _inner_count(call: Call, floor: float, wait: Call) -> int:
    """Warm the call up; how often one timing repeats it."""
    _batch(call, 1, wait)
    once = _batch(call, 1, wait)
    return 1 if once >= floor else min(10_000, int(floor / max(once, 1e-7)) + 1)


def _batch(call: Call, count: int, wait: Call) -> float:
    wait()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    wait()
    return (time.perf_counter() - begin) / count


def in_turns(
    makers: Mapping[str, Callable[[], AbstractContextManager[Call]]], rounds: int, wait: Call = _nothing
) -> dict[str, Timing]:
    """Time calls that can be made once only, in turns: each is prepared outside the clock, and none is warmed up.

    Args:
        makers: by name, what prepares another call; it is made inside the context.
        rounds: how many calls of each.
        wait: called before the clock is stopped, see :func:`synchronizer`.
    """
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(rounds):
        for name, make in makers.items():
            with make() as call:
                times[name].append(_batch(call, 1, wait))
    return {name: Timing(tuple(values)) for name, values in times.items()}
