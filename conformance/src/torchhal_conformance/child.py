"""A Python process with a connection and a deadline: whatever it does, who started it goes on and gets rid of it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any, Final

from torchhal_conformance.worker import ADDRESS, undelayed

START_SECONDS: Final = 120.0
STOP_SECONDS: Final = 10.0
TAIL: Final = 2000
"""Characters kept of what a process prints."""
LONGEST: Final = 1 << 20
"""Bytes of an answer."""
KEEPER: Final = str(Path(__file__).with_name("keeper.py"))


class StartFailed(Exception):
    """A process did not come up; says what it printed."""


class Late(Exception):
    """A process gave no answer in time."""


class Gone(Exception):
    """A process ended, or closed its connection; says how."""


class Child:
    """One process of a module, started when first needed and again after each death."""

    def __init__(self, module: str, arguments: list[str], threads: int) -> None:
        self.module = module
        self.arguments = arguments
        self.threads = threads
        self.greeting: Any = None
        """What it said of itself when it was ready."""
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Any = None
        self._reader = threading.Thread()
        self._printed: deque[int] = deque(maxlen=TAIL)
        self._closed = False

    # ------------------------------------------------------------------------ talking

    def ask(self, *messages: bytes, seconds: float, answers: tuple[int, ...] = (LONGEST,)) -> list[bytes]:
        """Send messages and wait for as many answers as there are lengths, each no longer than its own.

        Raises:
            StartFailed: the process does not come up.
            Late: the answers are not there in time, or not to their ends.
            Gone: it ended or hung up.
        """
        self.start()
        connection = self._connection
        late = False
        try:
            with self._deadline(seconds) as is_late:
                try:
                    for message in messages:
                        connection.send_bytes(message)
                    return [connection.recv_bytes(length) for length in answers]
                finally:
                    late = is_late.is_set()
        except (EOFError, OSError):
            if late:
                self.stop()
                raise Late(f"no result within {seconds:g} s") from None
            raise Gone(self._obituary()) from None

    @contextmanager
    def _deadline(self, seconds: float) -> Iterator[threading.Event]:
        """Cut the connection after a while: an answer of which half arrives would be waited for without end."""
        connection, late = self._connection, threading.Event()

        def cut() -> None:
            late.set()
            _shut(connection)

        timer = threading.Timer(seconds, cut)
        timer.daemon = True
        timer.start()
        try:
            yield late
        finally:
            timer.cancel()
            if late.is_set():
                self.stop()  # also where the answer came in the same moment: the connection is of no more use

    # ------------------------------------------------------------------------ starting

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
            command = [sys.executable, "-m", self.module, *self.arguments]
            # The pipe tells a keeper when to end; where there is none it is an input that never says anything.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", KEEPER, *command] if sys.platform == "linux" else command,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self._printed = deque(maxlen=TAIL)
            self._reader = threading.Thread(target=_drain, args=(self._process, self._printed), daemon=True)
            self._reader.start()
            self._connection = self._accept(listener, key)
        self._greet()

    def _accept(self, listener: Listener, key: bytes) -> Connection:
        """The process's connection; accept() knows no timeout, so a thread waits in it and is called up in the end."""
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
        if waiting.is_alive():
            with suppress(OSError, EOFError, AuthenticationError):  # it may come up in this moment
                Client(listener.address, authkey=key).close()
            waiting.join(1)
            found.clear()
        if not found:
            raise StartFailed(f"a worker did not start: {self._obituary()}")
        return undelayed(found[0])

    def _greet(self) -> None:
        """Wait until it is ready, and hear what it says of itself."""
        try:
            (answer,) = self.ask(seconds=START_SECONDS)
        except Late:
            raise StartFailed(f"a worker was not ready within {START_SECONDS:g} s") from None
        except Gone as gone:
            raise StartFailed(f"a worker did not start: {gone}") from None
        told = parsed(answer)
        if isinstance(told, dict) and isinstance(told.get("refused"), str):
            self.stop()
            raise StartFailed(told["refused"])
        if not isinstance(told, dict) or not isinstance(told.get("ready"), dict):
            self.stop()
            raise StartFailed(f"a worker did not say that it was ready: {answer[:200]!r}")
        self.greeting = told["ready"]

    # ------------------------------------------------------------------------ ending

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
        return ending(code) + (f"; it said last: {' '.join(said)[-300:]}" if said else "")

    def close(self) -> None:
        """End the process for good: another thread that waits for it starts no new one."""
        self._closed = True
        self.stop()

    def stop(self) -> None:
        """End the process and all that it started, children that became daemons included where the system is Linux."""
        process, self._process = self._process, None
        connection, self._connection = self._connection, None
        if process is None:
            return
        assert process.stdin is not None
        try:
            process.stdin.close()
            if sys.platform == "linux":
                process.wait(STOP_SECONDS)  # the keeper ends the others first
        except (OSError, subprocess.TimeoutExpired):  # a keeper that was stopped; its worker dies with it
            pass
        if process.returncode is None or sys.platform != "linux":
            _kill_group(process)  # after a keeper is gone its number may be somebody else's
        process.wait()
        if connection is not None:
            _shut(connection)  # another thread may be reading
            connection.close()


def ending(code: int) -> str:
    """How a process ended: with an exit code, or by the signal of that negative number."""
    how = f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"
    return f"the process ended with {how}"


def parsed(answer: bytes) -> Any:
    """The value of JSON, None where it is none; whatever the bytes are."""
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        return None


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        if sys.platform != "win32":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):  # nobody is left, or on macOS the dead alone
        pass


def _shut(connection: Connection) -> None:
    """End reading and writing at once, for whoever is in the middle of it; closing alone would leave them there."""
    try:
        wire = socket.socket(fileno=connection.fileno())
    except OSError:  # closed already
        return
    try:
        wire.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    finally:
        wire.detach()


def _drain(process: subprocess.Popen[bytes], kept: deque[int]) -> None:
    """Read whatever is printed, keep the end: a million lines must neither block the process nor fill anything."""
    assert process.stdout is not None
    with process.stdout as stream:
        while chunk := stream.read1(65536):  # type: ignore[attr-defined]
            kept.extend(chunk[-TAIL:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return str(number)
