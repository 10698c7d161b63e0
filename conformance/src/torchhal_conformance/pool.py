"""Worker processes: a case that crashes, hangs or ends its process is a result like any other, and the next one runs."""

from __future__ import annotations

import json
import math
import queue
import threading
from typing import Any, Final

from torchhal_conformance import tape
from torchhal_conformance.child import LONGEST, Child, Gone, Late, StartFailed, parsed

STATUSES: Final = ("pass", "fail", "unsupported-verified", "untestable", "error")
FIELDS: Final = frozenset(("case", "status", "ratio", "error", "expected", "got", "note", "seconds", "left"))
"""Of a result as a worker gives it; ``left`` is what the case changed for all that come after it."""
TEXT: Final = 2000
"""Characters of each text of a result: what a backend says of itself must not fill a report."""
STARTS: Final = 3
"""Tries to bring up a process before a run gives it up."""
JUDGE_SECONDS: Final = 300.0
"""For the judge, whose time is nobody's fault."""

Result = dict[str, Any]


class Worker(Child):
    """The process in which a backend computes."""

    def __init__(self, backend: str, plugin: str, seed: int, timeout: float, threads: int) -> None:
        super().__init__("torchhal_conformance.worker", [backend, plugin, str(seed)], threads)
        self.timeout = timeout

    def run(self, case: str) -> Result:
        """The result of one case as the worker gives it, whatever becomes of the process.

        Raises:
            StartFailed: there is no process to ask.
        """
        return self.recorded(case)[0]

    def request(self, case: str) -> bytes:
        """What the process is told, to examine a case."""
        return case.encode()

    def recorded(self, case: str) -> tuple[Result, bytes]:
        """The result of one case, and the tape of its calls for a :class:`Judge`."""
        try:
            answer, recorded = self.ask(
                self.request(case), seconds=self.timeout, answers=(LONGEST, tape.LONGEST)
            )
        except Late as late:
            return ended(case, "timeout", "Timeout", str(late)), b""
        except Gone as gone:
            return ended(case, "fail", "Crash", str(gone)), b""
        result = parsed(answer)  # JSON and not a pickle, since a backend could have sent it
        if not is_result(result, case):
            self.stop()  # what comes next would be off by one
            return ended(case, "fail", "Garbled", f"an answer that is no result: {answer[:200]!r}"), b""
        left = result.pop("left")
        if left is not None:
            self.stop()
            result["note"] = (
                f"{result['note'] or ''} (its process was replaced, since it changed {left})".strip()
            )
        return clipped(result), recorded


class Judge(Child):
    """The process that judges results, in which the backend never was."""

    def __init__(self, description: Result, seed: int, threads: int) -> None:
        told = {key: description[key] for key in ("name", "device_types", "claims")}
        super().__init__("torchhal_conformance.judge", [json.dumps(told), str(seed)], threads)

    def judged(self, result: Result, recorded: bytes) -> Result:
        """A result that passed, as it is where the backend is not."""
        case = result["case"]
        try:
            (answer,) = self.ask(case.encode(), recorded, seconds=JUDGE_SECONDS)
        except Late as late:
            return ended(case, "error", "JudgeTimeout", str(late))
        except (Gone, StartFailed) as failure:
            return ended(case, "error", "JudgeFailed", str(failure))
        verdict = parsed(answer)
        if verdict["judged"] == "within":
            return {**result, "judged": "within"}
        kept = {"seconds": result["seconds"], "note": result["note"]}
        return clipped({**verdict, **kept})


class Examiners:
    """Workers and judges of a run: a case goes to whichever worker has nothing to do, and what passed to a judge."""

    def __init__(
        self,
        workers: list[Worker],
        seed: int,
        threads: int,
        judges: int = 1,
        judge: type[Judge] | None = None,
    ) -> None:
        self.all = workers
        self.first = workers[0]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._idle.put(worker)
        self._judges: list[Judge] = []
        self._bench: queue.SimpleQueue[Judge] = queue.SimpleQueue()
        self._kind = judge or Judge
        self._seed, self._threads, self._count = seed, threads, judges
        self._failures = 0
        self._lock = threading.Lock()

    def start(self) -> Result:
        """Start the first worker, and say who the backend is.

        Raises:
            StartFailed: it does not come up.
        """
        self.first.start()
        told = self.first.greeting
        self._judges = [self._kind(told, self._seed, self._threads) for _ in range(self._count)]
        for judge in self._judges:
            self._bench.put(judge)
        return told  # type: ignore[no-any-return]

    def run(self, case: str, is_recorded: bool) -> Result:
        """The result of a case, once a process could be started for it or none could."""
        result, recorded = self._examined(case)
        if result["status"] != "pass" or not is_recorded:
            return {**result, "judged": "within" if result["status"] == "pass" else None}
        judge = self._bench.get()
        try:
            return judge.judged(result, recorded)
        finally:
            self._bench.put(judge)

    def _examined(self, case: str) -> tuple[Result, bytes]:
        worker = self._idle.get()
        said = ""
        try:
            while self._failures < STARTS:
                try:
                    found = worker.recorded(case)
                except StartFailed as failure:
                    said = str(failure)
                    with self._lock:
                        self._failures += 1
                    continue
                with self._lock:
                    self._failures = 0
                return found
        finally:
            self._idle.put(worker)
        message = f"no worker came up in {STARTS} tries" + (f": {said}" if said else ", for a case before")
        return ended(case, "error", "StartFailed", message), b""

    def __enter__(self) -> Examiners:
        return self

    def __exit__(self, *error: object) -> None:
        for process in [*self.all, *self._judges]:
            process.close()


# ---------------------------------------------------------------------------- results


def is_result(found: Any, case: str) -> bool:
    """Whether an answer has the fields of a result of the case, each of its kind."""
    if not isinstance(found, dict) or set(found) != FIELDS or found["case"] != case:
        return False
    error = found["error"]
    return (
        isinstance(found["status"], str)
        and found["status"] in STATUSES
        and (error is None or (isinstance(error, dict) and set(error) == {"class", "message"}))
        and all(isinstance(text, str) for text in (error or {}).values())
        and all(
            found[name] is None or isinstance(found[name], str)
            for name in ("expected", "got", "note", "left")
        )
        and _is_number(found["ratio"])
        and _is_number(found["seconds"])
        and (found["seconds"] is None or math.isfinite(found["seconds"]))
    )


def _is_number(value: Any) -> bool:
    """Whether a value is none, or a number that is not negative and fits a float; a ratio may be infinite or no number."""
    if value is None:
        return True
    if type(value) not in (int, float):
        return False
    try:
        return not float(value) < 0
    except OverflowError:  # JSON knows whole numbers without end
        return False


def clipped(result: Result) -> Result:
    """The result with texts of a length that a report can hold for thousands of cases."""
    error = result["error"]
    short = {name: (result[name] or "")[:TEXT] or None for name in ("expected", "got", "note")}
    return {**result, **short, "error": error and {key: text[:TEXT] for key, text in error.items()}}


def ended(case: str, status: str, kind: str, message: str) -> Result:
    """The result of a case that gave none."""
    return {
        "case": case, "status": status, "ratio": None, "error": {"class": kind, "message": message},
        "expected": "a result", "got": message, "note": None, "seconds": None,
    }  # fmt: skip
