"""Other processes that a check starts, in which the backend is loaded again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from torchhal.registry import registry
from torchhal_conformance.model import CheckFailed

CHILD_SECONDS: Final = 120.0
"""How long another process may take, most of it to import torch."""


def specification(backend: str) -> str:
    """What another process finds the backend by: its name, or ``plugin MODULE:ATTRIBUTE`` for one that is not installed."""
    found = registry().get(backend)
    return found.distribution if found.distribution.startswith("plugin ") else backend


def named(specified: str) -> str:
    """The backend's name in this process, where it is loaded if it is not installed."""
    if not specified.startswith("plugin "):
        return specified
    from torchhal_conformance import examine

    return examine.load_plugin(specified.removeprefix("plugin "))


def start(module: str, function: str, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """``module.function(*arguments)`` in a process of its own, which finds what this one finds."""
    program = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def await_all(processes: list[subprocess.Popen[bytes]], logs: list[Path], what: str, seconds: float) -> None:
    """Wait until all have ended well; whatever happens, none of them survives.

    Raises:
        CheckFailed: one failed, or the time was up.
    """
    deadline = time.monotonic() + seconds
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                break
            if time.monotonic() > deadline:
                raise CheckFailed(f"{what} to end within {seconds:.0f} s", "a process that still runs")
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    # A process that was killed because another failed has a negative status and comes after it.
    failed = [(p.returncode, log) for p, log in zip(processes, logs) if p.returncode]
    if failed:
        status, log = max(failed, key=lambda pair: pair[0])
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
        raise CheckFailed(f"{what} to end well", lines[-1])
