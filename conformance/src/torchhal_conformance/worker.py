"""A process that examines cases one by one, so that what a backend does to it is done to nobody else.

It is told case ids and answers with results over a local connection of its own; standard output and error stay free for
whatever the backend prints. First it says who the backend is and what it claims: the run itself never loads it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Client
from typing import Any, TypeVar

ADDRESS = "TORCHHAL_CONFORMANCE_WORKER"
"""Environment variable with the address and the key of the connection; nobody is to set it by hand."""

Wire = TypeVar("Wire", bound=Any)


def connected() -> Any:
    """The connection to the process that started this one."""
    host, port, key = os.environ.pop(ADDRESS).split(" ")
    return undelayed(Client((host, int(port)), authkey=bytes.fromhex(key)))


def undelayed(connection: Wire) -> Wire:
    """The connection with every message sent at once: a second small one would wait 40 ms for the first's receipt."""
    wire = socket.socket(fileno=connection.fileno())
    try:
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    finally:
        wire.detach()
    return connection


def main() -> None:
    """Serve one parent until it hangs up."""
    with connected() as connection:
        serve(connection, *sys.argv[1:])


def prepare(seed: str) -> None:
    """Do what is the same for every backend: import what is installed, and list the cases."""
    from torchhal.registry import registry
    from torchhal_conformance import corpus, examine, judge, tape  # noqa: F401  (imported for whoever is forked)

    registry()
    corpus.cases(int(seed))


def serve(connection: Any, backend: str, plugin: str, seed: str) -> None:
    """Say who the backend is, then examine one case after the other until the connection ends."""
    import torch

    from torchhal.errors import TorchhalError
    from torchhal.registry import registry
    from torchhal_conformance import examine

    torch.manual_seed(0)
    try:
        name = examine.load_plugin(plugin) if plugin else backend
        greeting = {"ready": described(registry().get(name))}  # which imports what is installed
    except (TorchhalError, ValueError) as error:
        connection.send_bytes(json.dumps({"refused": str(error)}).encode())
        return
    prepare(seed)  # seconds that are no case's
    connection.send_bytes(json.dumps(greeting).encode())
    while True:
        try:
            case = connection.recv_bytes().decode()
        except EOFError:
            return
        before = surroundings()
        result, recorded = _examined(case, name, int(seed))
        after = surroundings()
        result["left"] = ", ".join(what for what, value in before.items() if after[what] != value) or None
        connection.send_bytes(json.dumps(result).encode())
        connection.send_bytes(recorded)


def _examined(name: str, backend: str, seed: int) -> tuple[dict[str, Any], bytes]:
    """The result of a case, and the tape of its calls; an empty one where nobody needs it."""
    from torchhal_conformance import examine, judge, tape

    case = judge.case_named(name, seed)
    none: AbstractContextManager[list[tape.Entry]] = nullcontext([])
    recorder = tape.recording() if judge.is_recorded(case.check.name) else none
    with recorder as entries:
        result = {"case": name, **examine.examine(case, backend)}
    if not entries or result["status"] != "pass":
        return result, b""
    try:
        return result, tape.encode(entries)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ):  # tensors without plain memory, which no check's bounds are for
        return result, b""


def surroundings() -> dict[str, object]:
    """What no call has a reason to change and what the cases after it can not do without."""
    try:
        folder = os.getcwd()
    except OSError:
        folder = "none"
    found: dict[str, object] = {"the working directory": folder}
    if sys.platform != "win32":
        import resource

        names = (name for name in dir(resource) if name.startswith("RLIMIT_"))
        found["resource limits"] = [resource.getrlimit(getattr(resource, name)) for name in names]
    return found


def described(backend: Any) -> dict[str, Any]:
    """Who a backend is, what it claims and where it computes, in values that JSON holds."""
    from torchhal_conformance import calls, claims

    return {
        "name": backend.name, "version": backend.version, "distribution": backend.distribution,
        "device_types": sorted(backend.info.device_types), "claims": claims.written(backend.info.capabilities),
        "facilities": sorted(calls.facilities(backend.name)), "device": _device(calls.device_of(backend.name)),
    }  # fmt: skip


def _device(device: Any) -> str:
    import torch

    if device.type != "cpu":
        return f"{device.type} {getattr(torch, device.type).get_device_name(0)}"
    return processor()


def processor() -> str:
    """The processor's name as the system gives it."""
    import platform
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (text.split(":")[1].strip() for text in lines if text.startswith("model name"))
    return next(named, platform.machine())


if __name__ == "__main__":
    main()
