"""A process that has imported everything and forks for each planted fault, which costs 20 ms where a start costs 2 s.

What a fork computes dies with it, as with a process of its own; only what is the same for all faults is shared. That
holds while the nursery itself never computes: threads of OpenMP or of autograd would be missing in every fork. A
backend under test always gets a process of its own (:class:`~torchhal_conformance.pool.Worker`).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import suppress
from multiprocessing import Pipe
from typing import Any

from torchhal_conformance import worker
from torchhal_conformance.child import Gone, StartFailed, ending, parsed
from torchhal_conformance.pool import Worker, ended


class Forks(Worker):
    """A worker whose process is a fork for whichever plugin was planted last. Linux alone."""

    def __init__(self, seed: int, timeout: float, threads: int) -> None:
        super().__init__("", "", seed, timeout, threads)
        self.module, self.arguments = __name__, [str(seed)]
        self._plugin = ""

    def plant(self, plugin: str) -> None:
        """Have ``plugin``, as :func:`~torchhal_conformance.examine.load_plugin` takes it, examined from here on.

        Raises:
            StartFailed: it does not load; says what it said.
        """
        self._plugin = plugin
        (answer,) = self.ask(self._message(None), seconds=self.timeout)
        told = parsed(answer)
        if "refused" in told:
            raise StartFailed(f"{plugin}: {told['refused']}")

    def request(self, case: str) -> bytes:
        """The plugin with the case: a nursery that was started again knows of no plugin."""
        return self._message(case)

    def _message(self, case: str | None) -> bytes:
        return json.dumps([self._plugin, case]).encode()


class _Fork:
    """A process of one plugin."""

    def __init__(self, plugin: str, seed: str, inherited: Any) -> None:
        self._connection, far_end = Pipe()
        self._process = os.fork()
        if self._process == 0:
            inherited.close()
            self._connection.close()
            _become(far_end, plugin, seed)
        far_end.close()
        self.greeting = self._received()

    def ask(self, case: str) -> list[bytes]:
        """A result and a tape, as a worker sends them.

        Raises:
            Gone: it ended instead; says how.
        """
        with suppress(OSError):  # which the next line finds out
            self._connection.send_bytes(case.encode())
        return [self._received(), self._received()]

    def _received(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            _, status = os.waitpid(self._process, 0)
            self._end_group()
            raise Gone(ending(os.waitstatus_to_exitcode(status))) from None

    def end(self) -> None:
        """End the process and what it started."""
        self._end_group()
        os.waitpid(self._process, 0)

    def _end_group(self) -> None:
        self._connection.close()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process, signal.SIGKILL)


def _become(connection: Any, plugin: str, seed: str) -> None:
    """Serve as a worker does, and end without the clean-up of the process that was forked."""
    code = 1
    try:
        os.setsid()
        worker.serve(connection, "", plugin, seed)
        code = 0
    finally:
        os._exit(code)


def main() -> None:
    """Serve one parent until it hangs up."""
    with worker.connected() as connection:
        worker.prepare(sys.argv[1])
        connection.send_bytes(json.dumps({"ready": {}}).encode())
        _serve(connection, sys.argv[1])


def _serve(connection: Any, seed: str) -> None:
    planted, fork = "", None
    while True:
        try:
            plugin, case = json.loads(connection.recv_bytes())
        except EOFError:
            return
        if fork is not None and (plugin != planted or case is None):
            fork.end()
            fork = None
        try:
            if fork is None:
                planted, fork = plugin, _Fork(plugin, seed, connection)
            answers = [fork.greeting] if case is None else fork.ask(case)
        except Gone as gone:
            fork = None
            answers = [_refused(gone)] if case is None else [_crashed(case, gone), b""]
        for answer in answers:
            connection.send_bytes(answer)


def _refused(gone: Gone) -> bytes:
    return json.dumps({"refused": str(gone)}).encode()


def _crashed(case: str, gone: Gone) -> bytes:
    return json.dumps({**ended(case, "fail", "Crash", str(gone)), "left": None}).encode()


if __name__ == "__main__":
    main()
