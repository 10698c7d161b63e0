"""Worker processes: a case that crashes, hangs or ends its process is a result like any other, and the next one runs."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from multiprocessing.connection import Connection, Listener
from typing import Any, Final

from torchhal_conformance.worker import ADDRESS

START_SECONDS: Final = 120.0
TAIL: Final = 2000
"""Characters kept of what a worker prints."""
STATUSES: Final = ("pass", "fail", "unsupported-verified", "untestable", "error")


class StartFailed(Exception):
    """A worker did not come up; says what it printed."""


class Worker:
    """One process, started when first needed and again after each death."""

    def __init__(self, backend: str, plugin: str, seed: int, timeout: float, threads: int) -> None:
        self.arguments = [backend, plugin, str(seed)]
        self.timeout = timeout
        self.threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._reader = threading.Thread()
        self._printed: deque[bytes] = deque(maxlen=TAIL)

    def run(self, case: str) -> dict[str, Any]:
        """The result of one case, whatever becomes of the process."""
        if self._process is None:
            self._start()
        try:
            self._connection.send(case)
            if not self._connection.poll(self.timeout):
                self.stop()
                return _ended(case, "timeout", "Timeout", f"no result within {self.timeout:g} s")
            return self._checked(case, self._connection.recv())
        except (EOFError, OSError):
            return _ended(case, "fail", "Crash", self._obituary())

    def _checked(self, case: str, result: Any) -> dict[str, Any]:
        fits = isinstance(result, dict) and result.get("case") == case and result.get("status") in STATUSES
        if not fits:  # something else writes into the connection
            self.stop()
            return _ended(case, "fail", "Garbled", f"an answer that is no result: {str(result)[:200]}")
        return result  # type: ignore[no-any-return]

    def _start(self) -> None:
        key = secrets.token_bytes(16)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            host, port = listener.address
            environment = {
                **os.environ,
                ADDRESS: f"{host} {port} {key.hex()}",
                "OMP_NUM_THREADS": str(self.threads),
            }
            self._process = subprocess.Popen(
                [sys.executable, "-m", "torchhal_conformance.worker", *self.arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._reader = threading.Thread(target=self._drain, args=(self._process,), daemon=True)
            self._reader.start()
            self._connection = self._accept(listener)

    def _accept(self, listener: Listener) -> Connection:
        """The worker's connection; closing the listener from a timer is the one way to bound accept()."""
        assert self._process is not None
        process, found = self._process, []

        def wait() -> None:
            try:
                found.append(listener.accept())
            except (OSError, EOFError):
                return

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        for _ in range(int(START_SECONDS * 10)):
            waiting.join(0.1)
            if not waiting.is_alive() or process.poll() is not None:
                break
        connection = found[0] if found else None
        try:
            if connection is None or not connection.poll(START_SECONDS) or "ready" not in connection.recv():
                raise EOFError
        except (EOFError, OSError):
            text = self._obituary()
            raise StartFailed(f"a worker did not start: {text}") from None
        return connection  # type: ignore[no-any-return]

    def _drain(self, process: subprocess.Popen[bytes]) -> None:
        """Read whatever is printed, keep the end: a million lines must neither block the worker nor fill anything."""
        assert process.stdout is not None
        while chunk := process.stdout.read1(65536):  # type: ignore[attr-defined]
            self._printed.extend(bytes([byte]) for byte in chunk[-TAIL:])

    def _obituary(self) -> str:
        """How the process ended and what it said last; it is gone afterwards."""
        process = self._process
        assert process is not None
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            self.stop()
            return "the process closed its connection and went on"
        self._reader.join(2)
        said = b"".join(self._printed).decode(errors="replace").split()
        self.stop()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"the process ended with {how}" + (f"; it said last: {' '.join(said)[-300:]}" if said else "")

    def stop(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if process is None:
            return
        try:
            if sys.platform != "win32":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        except ProcessLookupError:
            pass
        process.wait()
        self._printed.clear()


def _ended(case: str, status: str, kind: str, message: str) -> dict[str, Any]:
    return {
        "case": case, "status": status, "ratio": None, "error": {"class": kind, "message": message},
        "expected": "a result", "got": message, "note": None, "seconds": None,
    }  # fmt: skip
