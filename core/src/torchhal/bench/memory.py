"""How much memory a call needs beyond its inputs, and how that grows with the length of the sequence.

Every point is a process of its own, which makes its inputs, warms up on a short call, sets the peak back, and then
makes one call: what the kernel of Linux counts as the peak of resident memory, less what was resident before. The
output is part of it. ``python -m torchhal.bench.memory BACKEND CASE LENGTH`` is such a process.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from torchhal.bench.cases import Case
from torchhal.bench.catalogue import MEMORY
from torchhal.registry import Backend, registry

LENGTHS: Final = (1024, 2048, 4096, 8192)
QUICK_LENGTHS: Final = (1024, 2048, 4096)
LINEAR: Final = 1.1
"""The largest exponent that counts as linear: what is left for the counter's granularity."""

_WARM: Final = 64
_SECONDS: Final = 120.0
# Freed memory goes back to the system at once, so that none of it hides what the call needs.
_ALLOCATOR: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


@dataclass(frozen=True)
class Growth:
    """One backend's peak extra memory on one case, length by length."""

    case: Case
    backend: str
    peaks: dict[int, int] = field(default_factory=dict)
    """Bytes by length."""
    not_run: str = ""
    """Why there are none; empty if there are."""

    @property
    def exponent(self) -> float | None:
        """The power of the length that the peak grows with; None without two points above zero."""
        return exponent(self.peaks)

    @property
    def passed(self) -> bool | None:
        """Whether it grows linearly at most; None if it was not measured."""
        return None if self.exponent is None else self.exponent <= LINEAR

    def to_dict(self) -> dict[str, Any]:
        """Numbers for JSON."""
        return {
            "case": self.case.name,
            "backend": self.backend,
            "peak_bytes": {str(length): peak for length, peak in self.peaks.items()},
            "exponent": self.exponent,
            "passed": self.passed,
            "not_run": self.not_run,
        }


def exponent(peaks: dict[int, int]) -> float | None:
    """The slope of log(bytes) over log(length), by least squares; None without two points above zero."""
    points = [(math.log(length), math.log(peak)) for length, peak in peaks.items() if peak > 0]
    if len(points) < 2:
        return None
    x0, y0 = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = math.fsum((x - x0) ** 2 for x, _ in points)
    return math.fsum((x - x0) * (y - y0) for x, y in points) / spread


def obstacle(device: torch.device) -> str:
    """Why memory can not be measured here; empty if it can."""
    if device.type != "cpu":
        return f"peak memory is measured for the CPU, not for {device.type}"
    if not Path("/proc/self/clear_refs").exists():
        return (
            "peak memory is measured on Linux, which lets a process set its peak back (/proc/self/clear_refs)"
        )
    return ""


def growths(
    backends: Sequence[Backend], device: torch.device, lengths: Sequence[int] = LENGTHS
) -> Iterator[Growth]:
    """The growth of every backend on every case of :data:`~torchhal.bench.catalogue.MEMORY`."""
    reason = obstacle(device)
    for case in MEMORY:
        for backend in backends:
            yield Growth(case, backend.name, not_run=reason) if reason else _growth(case, backend, lengths)


def _growth(case: Case, backend: Backend, lengths: Sequence[int]) -> Growth:
    small = case.resized(_WARM)
    with small.mode():
        candidate = small.bind(torch.device("cpu")).own[0].candidates(small, backend)[0]
    if candidate.not_run:
        return Growth(case, backend.name, not_run=candidate.not_run)
    peaks: dict[int, int] = {}
    for length in lengths:
        try:
            peaks[length] = _in_a_process(backend.name, case.name, length)
        except RuntimeError as error:
            return Growth(case, backend.name, peaks, not_run=f"at length {length}: {error}")
    return Growth(case, backend.name, peaks)


def _in_a_process(backend: str, case: str, length: int) -> int:
    command = [sys.executable, "-m", __name__, backend, case, str(length), str(torch.get_num_threads())]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
            env={**os.environ, **_ALLOCATOR},
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(f"no answer within {_SECONDS:.0f} s") from late
    if done.returncode != 0:
        told = " ".join(done.stderr.split())[-300:]
        raise RuntimeError(f"the process ended with exit code {done.returncode}: {told}")
    return int(json.loads(done.stdout.strip().splitlines()[-1]))


# ---------------------------------------------------------------------------- in the process


def peak_of_one_call(backend: Backend, case: Case) -> int:
    """Bytes by which resident memory grows at most during one call of a backend on a case."""
    cpu = torch.device("cpu")
    with case.mode():
        small = case.resized(_WARM)
        for warm in (small, small):
            _call(backend, warm, cpu)()
        call = _call(backend, case, cpu)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
        del result
    return max(0, peak - before)


def _call(backend: Backend, case: Case, device: torch.device) -> Any:
    candidate = case.bind(device).own[0].candidates(case, backend)[0]
    if candidate.call is None:
        raise RuntimeError(candidate.not_run)
    return candidate.call


def _status(name: str) -> int:
    """A counter of this process in bytes."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def main(arguments: Sequence[str]) -> None:
    """Print the bytes of one point: ``BACKEND CASE LENGTH THREADS``."""
    name, wanted, length, threads = arguments
    torch.set_num_threads(int(threads))
    case = next(c for c in MEMORY if c.name == wanted)
    print(json.dumps(peak_of_one_call(registry().get(name), case.resized(int(length)))))


if __name__ == "__main__":
    main(sys.argv[1:])
