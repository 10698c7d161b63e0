"""Runs a program as ``python`` itself would, for commands that put something around it."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as a shell reports it."""


@dataclass(frozen=True)
class Program:
    """A script's path or a module's name, and the arguments it sees in ``sys.argv[1:]``."""

    target: str
    arguments: Sequence[str] = ()
    is_module: bool = False

    def fault(self) -> str:
        """Why it can not be run, or an empty string; looks for a module where the program would."""
        self.prepare()
        if not self.is_module:
            return (
                ""
                if Path(self.target).exists()
                else f"there is no script {self.target!r}; for a module, use -m"
            )
        try:
            found = importlib.util.find_spec(self.target)
        except (ImportError, ValueError, AttributeError) as error:
            return f"there is no module {self.target!r} to run: {error}"
        return "" if found is not None else f"there is no module {self.target!r} to run"

    def prepare(self) -> None:
        """Set ``sys.argv`` and ``sys.path[0]`` to what the program would find."""
        sys.argv = [self.target, *self.arguments]
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = self._first_path()

    def _first_path(self) -> str:
        if self.is_module:
            return os.getcwd()
        script = os.path.realpath(self.target)
        return (
            os.path.dirname(script)
            if os.path.isfile(script) and not script.endswith((".zip", ".pyz"))
            else script
        )

    def execute(self) -> None:
        """Run it as ``__main__``; what it raises comes out."""
        if self.is_module:
            runpy.run_module(self.target, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(self.target, run_name="__main__")


@dataclass
class Outcome:
    """How a program ended."""

    error: BaseException | None = None
    threads: list[str] = field(default_factory=list)
    """Names of the threads it started, which a function mode of torch would not reach."""

    def leave(self) -> None:
        """End this process as the program ended; returns if it came to its end without an error."""
        if self.error is None:
            return
        if isinstance(self.error, SystemExit):
            raise self.error
        trace = _own_frames(self.error)
        sys.excepthook(type(self.error), self.error.with_traceback(trace), trace)
        raise SystemExit(INTERRUPTED if isinstance(self.error, KeyboardInterrupt) else 1)


def run_program(program: Program, around: Callable[[Callable[[], None]], None]) -> Outcome:
    """Run ``program`` through ``around(execute)`` and report how it ended, instead of raising."""
    outcome = Outcome()
    program.prepare()
    with _WatchingThreads(outcome.threads):
        try:
            around(program.execute)
        except BaseException as error:  # SystemExit and KeyboardInterrupt are ways for a program to end
            outcome.error = error
    return outcome


class _WatchingThreads:
    """Notes each thread that ``threading`` starts, by the one public hook there is: a profile function that
    takes itself off at its first event. A program that sets its own hook replaces this one.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __enter__(self) -> None:
        self.before = threading.getprofile()
        if self.before is None:
            threading.setprofile(self._first_event)

    def __exit__(self, *_: object) -> None:
        if threading.getprofile() == self._first_event:
            threading.setprofile(self.before)

    def _first_event(self, *_: Any) -> None:
        sys.setprofile(None)
        self.names.append(threading.current_thread().name)


def _own_frames(error: BaseException) -> types.TracebackType | None:
    """The program's part of the traceback: without the frames of this package and of runpy that started it."""
    trace = error.__traceback__
    inside = None
    while trace is not None:
        if trace.tb_frame.f_globals is vars(runpy):
            inside = trace
        elif inside is not None:
            return trace
        trace = trace.tb_next
    return error.__traceback__ if inside is None else None
