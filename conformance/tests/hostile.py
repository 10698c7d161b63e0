"""Backends that do the runner harm: ``--plugin hostile:NAME`` with this folder on PYTHONPATH.

Each claims dense float32 attention, computes it honestly, and does one thing that no backend should.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import BackendInfo, Capabilities, Decline, Plan, hookimpl
from torchhal.problems import AttentionClaims
from torchhal_conformance import tolerance
from torchhal_conformance.model import HarnessError

DENSE: Final = AttentionClaims(dtypes=frozenset({torch.float32}), layouts=frozenset({"dense"}))
EVERYTHING: Final = AttentionClaims(
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    layouts=frozenset({"dense", "varlen", "paged"}),
    **{name: True for name, kind in AttentionClaims.__annotations__.items() if kind == "bool"},
)
ORDERS: Final = "HOSTILE_ORDERS"
"""Environment variable with a file that names the harm that ``as_ordered`` does."""
CHILDREN: Final = "HOSTILE_CHILDREN"
"""Environment variable with a file that the ids of child processes are written to."""

STARTED: Final = "HOSTILE_STARTED"
"""Environment variable with a file that is there once a process has loaded ``comes_up_once``."""

_numbers = itertools.count()


def honest(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return torch.softmax(query @ key.transpose(-2, -1) * scale, dim=-1) @ value


def zeros(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    return torch.zeros(*query.shape[:-1], value.shape[-1], dtype=query.dtype)


def plugin(
    harm: Callable[[], object] = lambda: None,
    *,
    name: str = "",
    claims: AttentionClaims | None = DENSE,
    run: Callable[..., Any] | None = None,
    hook: Callable[[Any], Any] | None = None,
) -> SimpleNamespace:
    """A backend whose plan first does ``harm`` and then computes, or runs ``run``; or whose hook is ``hook``."""
    unique = name or f"hostile{next(_numbers)}"  # since the core remembers plans by the names of backends

    def computed(
        query: Tensor, key: Tensor, value: Tensor, mask: object, scale: float, operands: object
    ) -> Tensor:
        harm()
        return honest(query, key, value, scale)

    @hookimpl
    def torchhal_backend() -> BackendInfo:
        return BackendInfo(
            name=unique, vendor="tests", device_types=frozenset({"cpu"}), spec=">=1.0,<2",
            capabilities=Capabilities(attention=claims), preference={"cpu": -1},
        )  # fmt: skip

    @hookimpl
    def torchhal_attention(problem: Any) -> Any:
        return hook(problem) if hook else Plan(run=run or computed)

    made = SimpleNamespace(torchhal_backend=torchhal_backend)
    if claims is not None:
        made.torchhal_attention = torchhal_attention
    return made


def throw(error: BaseException) -> Callable[..., Any]:
    def thrower(*arguments: Any) -> Any:
        raise error

    return thrower


# ---------------------------------------------------------------------------- ways to do harm


def _loop() -> None:
    while True:
        pass


def _print_a_million_lines() -> None:
    lines = "a line that nobody reads\n" * 1000
    for _ in range(500):
        os.write(1, lines.encode())
        os.write(2, lines.encode())


def _close_the_output() -> None:
    for descriptor in (1, 2):
        os.close(descriptor)


def _close_everything() -> None:
    os.closerange(3, 4096)


def _leave_a_child() -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with Path(os.environ[CHILDREN]).open("a") as file:
        file.write(f"{child.pid}\n")


def _leave_a_daemon() -> None:
    """A process of its own session whose parent is dead: neither group nor descent leads to it."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with Path(os.environ[CHILDREN]).open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.closerange(0, 4096)
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)"])
        os._exit(0)
    os.wait()


def _leave_a_daemon_and_die() -> None:
    _leave_a_daemon()
    os._exit(3)


def _leave_a_child_and_die() -> None:
    _leave_a_child()
    os._exit(3)


def _leave_threads() -> None:
    for _ in range(3):
        threading.Thread(target=_loop, daemon=True).start()


def _stop_the_keeper() -> None:
    os.kill(os.getppid(), signal.SIGSTOP)
    os._exit(4)


def _ignore_signals_and_loop() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    _loop()


def _limit_everything() -> None:
    import resource

    for what in (resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(what, (0, 0))


def _leave_the_folder() -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    os.rmdir(folder)


def _ruin_the_modules() -> None:
    for name in [name for name in sys.modules if name.startswith(("torchhal", "json", "multiprocessing"))]:
        sys.modules[name] = types.ModuleType(name)


def _make_torch_agree() -> None:
    """What a suite would judge with, made to say that all is well."""
    torch.equal = lambda *tensors: True
    torch.isfinite = lambda tensor: torch.ones_like(tensor, dtype=torch.bool)
    tolerance.ratio = lambda *tensors: 0.0  # type: ignore[assignment]


def _half_an_answer() -> None:
    """A message of which the end never comes."""
    for found in gc.get_objects():
        if isinstance(found, Connection) and not found.closed:
            os.write(found.fileno(), (1000).to_bytes(4, "big") + b"{")
    time.sleep(600)


def _fill_memory() -> None:
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), before[1]))
    try:
        kept = []
        while True:
            kept.append(bytearray(16 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("and its message too")


def _answer_in_its_own_name(answer: bytes) -> Callable[[], None]:
    """Sends an answer of its own to the runner, as if the case were done."""

    def send() -> None:
        for found in gc.get_objects():
            if isinstance(found, Connection) and not found.closed:
                found.send_bytes(answer)

    return send


def _result(**changes: Any) -> bytes:
    empty = dict.fromkeys(("case", "ratio", "error", "expected", "got", "note", "seconds", "left"))
    return json.dumps({**empty, "status": "pass", **changes}).encode()


def _current_case() -> str:
    """The case that is being examined, as its process's stack has it."""
    frame = sys._getframe()
    while frame.f_code.co_name != "_examined":
        assert frame.f_back is not None
        frame = frame.f_back
    return str(frame.f_locals["name"])


def _forge() -> None:
    """Answers the run itself that the case has passed, and keeps the true answer from it."""
    for found in gc.get_objects():
        if isinstance(found, Connection) and not found.closed:
            found.send_bytes(_result(case=_current_case(), ratio=0.5, seconds=0.01))
            found.send_bytes(FORGED_TAPE)
            while True:  # in the worker's place from here on
                case = found.recv_bytes().decode()
                found.send_bytes(_result(case=case, ratio=0.5, seconds=0.01))
                found.send_bytes(FORGED_TAPE)


FORGED_TAPE: Final = b""


def _write_past_the_end(
    query: Tensor, key: Tensor, value: Tensor, mask: object, scale: float, operands: object
) -> Tensor:
    """The result is right, and the memory behind the value is not what it was."""
    result = honest(query, key, value, scale)
    if value.numel():
        last = value.data_ptr() + sum((n - 1) * s for n, s in zip(value.shape, value.stride())) * 4
        ctypes.memset(last + 4, 0x41, 4)
    return result


def _denies_dense(problem: Any) -> Any:
    return (
        Plan(run=zeros)
        if problem.layout == "dense"
        else Plan(run=throw(RuntimeError("claimed, and not there")))
    )


def _answers_everything(problem: Any) -> Any:
    return Plan(run=zeros)


def _as_ordered() -> None:
    """The harm named in a file, so that one worker can meet them all."""
    HARM[Path(os.environ[ORDERS]).read_text()]()


# ---------------------------------------------------------------------------- the backends

HARM: Final[dict[str, Callable[[], object]]] = {
    "nothing": lambda: None,
    "raises": throw(RuntimeError("the kernel gave up")),
    "exits": throw(SystemExit(0)),
    "interrupts": throw(KeyboardInterrupt()),
    "cannot say why": throw(_Unprintable()),
    "quits": lambda: os._exit(0),
    "quits with 7": lambda: os._exit(7),
    "segfaults": lambda: ctypes.string_at(0),
    "aborts": os.abort,
    "loops": _loop,
    "sleeps": lambda: time.sleep(600),
    "prints": _print_a_million_lines,
    "closes its output": _close_the_output,
    "closes everything": _close_everything,
    "fills memory": _fill_memory,
    "leaves a child": _leave_a_child,
    "leaves a child and dies": _leave_a_child_and_die,
    "answers for another": _answer_in_its_own_name(b'{"case": "another", "status": "pass"}'),
    "leaves a daemon": _leave_a_daemon,
    "leaves a daemon and dies": _leave_a_daemon_and_die,
    "leaves threads": _leave_threads,
    "stops the keeper": _stop_the_keeper,
    "ignores signals": _ignore_signals_and_loop,
    "limits everything": _limit_everything,
    "leaves the folder": _leave_the_folder,
    "ruins the modules": _ruin_the_modules,
    "gives half an answer": _half_an_answer,
    "answers brackets": _answer_in_its_own_name(b"[" * 100_000),
    "answers endless numbers": lambda: _answer_in_its_own_name(
        _result(case=_current_case(), ratio=10**400)
    )(),
    "takes infinite time": lambda: _answer_in_its_own_name(_result(case=_current_case(), seconds=math.inf))(),
    "answers nonsense": _answer_in_its_own_name(b"\x80\x05this is no JSON"),
}
as_ordered = plugin(_as_ordered)
forges = plugin(_forge)
agrees_with_itself = plugin(run=lambda *given: (_make_torch_agree(), zeros(*given))[1])
raises = plugin(throw(RuntimeError("the kernel gave up")))
segfaults, quits, sleeps = (plugin(HARM[harm]) for harm in ("segfaults", "quits", "sleeps"))
writes_past_the_end = plugin(run=_write_past_the_end)
varlen_is_not_there = plugin(
    claims=dataclasses.replace(DENSE, layouts=frozenset({"dense", "varlen"})), hook=_denies_dense
)
zeros_for_everything = plugin(claims=EVERYTHING, hook=_answers_everything)
claims_nothing = plugin(claims=None)
declines = plugin(hook=lambda problem: Decline("no_device", "there is none"))
hook_hangs = plugin(hook=lambda problem: time.sleep(600))
hook_raises = plugin(hook=throw(RuntimeError("no plan for you")))
hook_exits = plugin(hook=throw(SystemExit(0)))
blames_the_suite = plugin(throw(HarnessError("not my fault")))
good = plugin(name="good")
other = plugin(name="other")
identity_raises = SimpleNamespace(torchhal_backend=throw(RuntimeError("who am I")))
identity_exits = SimpleNamespace(torchhal_backend=throw(SystemExit(0)))


def __getattr__(name: str) -> Any:
    """What happens as early as an import."""
    if name == "comes_up_once":
        mark = Path(os.environ[STARTED])
        if mark.exists():
            raise RuntimeError("not again")
        mark.touch()
        return plugin(lambda: os._exit(9), name="comes_up_once")
    if name == "quits_at_import":
        os._exit(0)
    if name == "hangs_at_import":
        time.sleep(600)
    raise AttributeError(name)
