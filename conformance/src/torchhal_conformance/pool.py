"""Worker processes: a case that crashes, hangs or ends its process is a result like any other, and the next one runs."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections import deque
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any, Final

from torchhal_conformance.worker import ADDRESS, READY

START_SECONDS: Final = 120.0
TAIL: Final = 2000
"""Characters kept of what a worker prints."""
LONGEST: Final = 1 << 20
"""Bytes of an answer."""
STATUSES: Final = ("pass", "fail", "unsupported-verified", "untestable", "error")
FIELDS: Final = frozenset(("case", "status", "ratio", "error", "expected", "got", "note", "seconds"))
"""Of a result as a worker gives it."""


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
        self._printed: deque[int] = deque(maxlen=TAIL)
        self._closed = False

    def run(self, case: str) -> dict[str, Any]:
        """The result of one case, whatever becomes of the process."""
        self.start()
        connection = self._connection
        try:
            connection.send_bytes(case.encode())
            if not connection.poll(self.timeout):
                self.stop()
                return _ended(case, "timeout", "Timeout", f"no result within {self.timeout:g} s")
            return self._checked(case, connection.recv_bytes(LONGEST))
        except (EOFError, OSError):
            return _ended(case, "fail", "Crash", self._obituary())

    def _checked(self, case: str, answer: bytes) -> dict[str, Any]:
        """The answer if it is a result of the case; JSON and not a pickle, since a backend could have sent it."""
        try:
            result = json.loads(answer)
        except ValueError:
            result = None
        if not _is_result(result, case):
            self.stop()  # what comes next would be off by one
            return _ended(case, "fail", "Garbled", f"an answer that is no result: {answer[:200]!r}")
        return result  # type: ignore[no-any-return]

    def start(self) -> None:
        """Start the process unless it is there.

        Raises:
            StartFailed: it does not come up, or :meth:`close` was called.
        """
        if self._closed:
            raise StartFailed("the run was ended")
        if self._process is not None:
            return
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
            self._printed = deque(maxlen=TAIL)
            self._reader = threading.Thread(target=_drain, args=(self._process, self._printed), daemon=True)
            self._reader.start()
            self._connection = self._accept(listener, key)

    def _accept(self, listener: Listener, key: bytes) -> Connection:
        """The worker's connection; accept() knows no timeout, so a thread waits in it and is called up in the end."""
        process, found = self._process, []

        def wait() -> None:
            try:
                found.append(listener.accept())
            except (OSError, EOFError, AuthenticationError):
                return

        waiting = threading.Thread(target=wait, daemon=True)
        waiting.start()
        for _ in range(int(START_SECONDS * 10)):
            waiting.join(0.1)
            if not waiting.is_alive() or process is None or process.poll() is not None:
                break
        connection = found[0] if found else None
        if waiting.is_alive():
            Client(listener.address, authkey=key).close()
        try:
            if connection is None:
                raise EOFError
            if not connection.poll(START_SECONDS):
                self.stop()
                raise StartFailed(f"a worker was not ready within {START_SECONDS:g} s")
            if connection.recv_bytes(LONGEST) != READY:
                raise EOFError
        except (EOFError, OSError):
            text = self._obituary()
            raise StartFailed(f"a worker did not start: {text}") from None
        return connection

    def _obituary(self) -> str:
        """How the process ended and what it said last; it is gone afterwards."""
        process = self._process
        if process is None:
            return "the run was ended"
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            self.stop()
            return "the process closed its connection and went on"
        self._reader.join(2)
        said = bytes(self._printed).decode(errors="replace").split()
        self.stop()
        how = f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"
        return f"the process ended with {how}" + (f"; it said last: {' '.join(said)[-300:]}" if said else "")

    def close(self) -> None:
        """End the process for good: another thread that waits for it starts no new one."""
        self._closed = True
        self.stop()

    def stop(self) -> None:
        """End the process and all that it started."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if process is None:
            return
        try:
            if sys.platform != "win32":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        except (ProcessLookupError, PermissionError):  # nobody is left, or on macOS the dead alone
            pass
        process.wait()
        if connection is not None:
            connection.close()


def _drain(process: subprocess.Popen[bytes], kept: deque[int]) -> None:
    """Read whatever is printed, keep the end: a million lines must neither block the worker nor fill anything."""
    assert process.stdout is not None
    with process.stdout as stream:
        while chunk := stream.read1(65536):  # type: ignore[attr-defined]
            kept.extend(chunk[-TAIL:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return str(number)


def _is_result(found: Any, case: str) -> bool:
    """Whether an answer has the fields of a result of the case, each of its kind."""
    if not isinstance(found, dict) or set(found) != FIELDS or found["case"] != case:
        return False
    error = found["error"]
    numbers = [found[name] for name in ("ratio", "seconds") if found[name] is not None]
    return (
        found["status"] in STATUSES
        and (error is None or (isinstance(error, dict) and set(error) == {"class", "message"}))
        and all(isinstance(text, str) for text in (error or {}).values())
        and all(found[name] is None or isinstance(found[name], str) for name in ("expected", "got", "note"))
        and all(type(number) in (int, float) and not number < 0 for number in numbers)
    )


def _ended(case: str, status: str, kind: str, message: str) -> dict[str, Any]:
    return {
        "case": case, "status": status, "ratio": None, "error": {"class": kind, "message": message},
        "expected": "a result", "got": message, "note": None, "seconds": None,
    }  # fmt: skip
