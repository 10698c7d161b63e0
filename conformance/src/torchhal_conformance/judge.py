"""Judges results where the backend that made them never was: the tape of a case is played to its check once more.

``python -m torchhal_conformance.judge`` is a process that loads no plugin but the reference. What it can not judge is
what a check sees of the backend's own process: memory, threads, torch's settings, the compiler, files and other
processes. There the word of the worker stands, and the report says so: ``judged`` is ``within``.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Final

from torchhal.problems import BackendInfo, Capabilities
from torchhal.registry import Backend, registry
from torchhal_conformance import claims, corpus, examine, explore, tape
from torchhal_conformance.model import Case

PROCESS: Final = frozenset(
    (
        "inputs_alone", "threads", "state", "memory_growth", "linear_memory", "compiled", "compiled_lengths", "opcheck",
        "gradcheck", "streams", "graphs", "own_work",
    )
)  # fmt: skip
"""Checks, by the second word of their names, that look at the process in which the backend computes, or at more of
autograd than one gradient of each call. Nothing is recorded for them, since a tape takes memory and time of its own."""
SERVICES: Final = frozenset(("cache_store", "context_parallel", "deploy"))
"""Families whose checks look at files and start processes that load the backend themselves."""


def is_recorded(check: str) -> bool:
    """Whether the cases of a check go to the judge; what else the judge can not see, it says itself."""
    family, _, question = check.partition(".")
    return family not in SERVICES and question not in PROCESS


def case_named(name: str, seed: int) -> Case:
    """The case with an id, of the corpus or a random one."""
    found = explore.case_named if name.startswith("explore.") else corpus.case_named
    return found(name, seed)


class Absent(BaseException):
    """The check asks for the backend itself, which is not here."""


class _Nobody:
    """In the place of a backend's hooks: whoever asks learns that it is not here."""

    def __init__(self) -> None:
        self.asked = False

    @property
    def hook(self) -> Any:
        """Raises Absent."""
        self.asked = True
        raise Absent


def absentee(name: str, device_types: frozenset[str], capabilities: Capabilities) -> Backend:
    """A backend of such claims that answers nothing."""
    manager: Any = _Nobody()
    info = BackendInfo(name, "judge", device_types, ">=1.0", capabilities)
    # As one that is installed and not as a plugin: no process that a check starts could load it.
    return Backend(info, "nobody", "", None, manager)


def judge(case: Case, absent: Backend, recorded: bytes) -> dict[str, Any]:
    """The result of a case by its tape; ``judged`` is ``within`` where a tape does not tell."""
    manager: Any = absent.manager
    manager.asked = False
    found: dict[str, Any]
    try:
        with tape.playing(tape.decode(recorded)):
            found = examine.examine(case, absent.name)
    except tape.TapeError as error:
        found = _forged(str(error))
    if manager.asked:
        return {**found, "status": "pass", "error": None, "judged": "within"}
    if (found["error"] or {}).get("class") == "TapeError":
        found = _forged(found["error"]["message"])
    return {**found, "judged": "apart"}


def _forged(message: str) -> dict[str, Any]:
    said = f"the worker said pass and did not give the results that it is judged by: {message}"
    return {
        "status": "fail", "ratio": None, "error": {"class": "Forged", "message": said},
        "expected": "the results of each call", "got": message, "note": None, "seconds": None,
    }  # fmt: skip


# ---------------------------------------------------------------------------- the process


def main() -> None:
    """Judge for one parent until it hangs up."""
    from torchhal_conformance.worker import connected

    os.environ["TORCHHAL_PLUGINS"] = ""  # nobody's code but the suite's and the core's
    with connected() as connection:
        _serve(connection, *sys.argv[1:])


def _serve(connection: Any, description: str, seed: str) -> None:
    import torch

    told = json.loads(description)
    torch.manual_seed(0)
    backend = absentee(told["name"], frozenset(told["device_types"]), claims.read(told["claims"]))
    registry().backends[backend.name] = backend
    corpus.cases(int(seed))
    connection.send_bytes(json.dumps({"ready": {}}).encode())
    while True:
        try:
            name, recorded = connection.recv_bytes().decode(), connection.recv_bytes()
        except EOFError:
            return
        result = judge(case_named(name, int(seed)), backend, recorded)
        connection.send_bytes(json.dumps({"case": name, **result}).encode())


if __name__ == "__main__":
    main()
