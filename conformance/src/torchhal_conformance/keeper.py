"""The process between a run and its worker on Linux: when it ends, everything that the worker ever started has ended.

A child that calls ``setsid`` leaves its process group, and one that forks twice leaves its parent; neither leaves the
keeper, which the kernel makes the new parent of every orphan below it (``PR_SET_CHILD_SUBREAPER``). So nobody has to be
found by a name or a session, and nobody else's processes are in reach. It ends with its worker, as its worker ended, or
when its standard input ends: then the run closed it, or is dead itself.

Nothing of torch and nothing of the suite is imported here, so that it costs a few milliseconds. psutil would not do in
its place: it follows parents, which an orphan has lost. A worker that kills its keeper dies with it
(``PR_SET_PDEATHSIG``); what it had made to leave before then goes free, as it would with a hypervisor of any less rank.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

PDEATHSIG, SUBREAPER = 1, 36
"""From ``linux/prctl.h``."""
SECONDS = 5.0
"""How long the descendants are hunted; those that wait in the kernel for a device end later."""


def main() -> None:
    """Run the command of the arguments and keep it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        libc.prctl(PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)
        _become(sys.argv[1:])
    status = _wait(worker)
    end_descendants(keeper)
    _end_like(status)


def _become(command: list[str]) -> None:
    os.setsid()  # a signal that the worker sends to its group reaches nobody else
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.execv(command[0], command)


def _wait(worker: int) -> int | None:
    """The worker's status once it has ended; None where the run wants it to end."""
    watched: list[int] = [0]
    timeout: float | None = 0.05
    with suppress(OSError):  # a kernel before 5.3 is asked again and again
        watched, timeout = [0, os.pidfd_open(worker)], None
    while True:
        ready, _, _ = select.select(watched, [], [], timeout)
        found, status = os.waitpid(worker, os.WNOHANG)
        if found:
            return status
        if 0 in ready and not os.read(0, 1):
            return None


def end_descendants(root: int) -> None:
    """Kill everything below a process until nothing is there: an orphan that is made meanwhile comes to the root."""
    deadline = time.monotonic() + SECONDS
    while (found := _descendants(root)) and time.monotonic() < deadline:
        for process in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(process, signal.SIGKILL)
        _reap()
        time.sleep(0.002)


def _reap() -> None:
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _descendants(root: int) -> list[int]:
    """Processes below ``root``, dead ones that nobody has waited for among them."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                words = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(words[1]), []).append(int(entry))
    found, queue = [], [root]
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def _end_like(status: int | None) -> None:
    """End as the worker ended, so that who waits for the keeper learns of the worker."""
    if status is None:
        os._exit(0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else 1)


if __name__ == "__main__":
    main()
