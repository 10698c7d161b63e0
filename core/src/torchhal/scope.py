"""What the surrounding code has chosen: ``use()`` and the context-parallel block, as context variables.

Threads and asyncio tasks each see their own. Under torch.compile the choice has to be a guard: Dynamo can
not trace a ContextVar, but it does guard on attributes of modules, and reads them with ``getattr``. So the
current choice is a property of a module object whose getter is the C method ``ContextVar.get`` itself:
exact per thread and task, and no Python runs when the guard is checked.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from torchhal.errors import InvalidProblem


class State(NamedTuple):
    """What is chosen around this code; absent altogether outside every block."""

    backend: str | None = None
    """The argument of the innermost ``use()``."""
    context_parallel: Any = None
    """The innermost ``context_parallel()`` block."""


STATE: ContextVar[State] = ContextVar("torchhal_state")


class _Scope(types.ModuleType):
    # ContextVar.get(default) is called with this module as its default: "nothing chosen" reads as the module.
    state = property(STATE.get)


current: Any = _Scope("torchhal.scope.current")
sys.modules["torchhal.scope.current"] = current


def state() -> State:
    """The state around this code, empty outside every block."""
    found = current.state
    return State() if found is current else found


def chosen_backend() -> str | None:
    """The backend of the innermost ``use()`` around this code, None outside one."""
    return state().backend


def active_context_parallel() -> Any:
    """The innermost context-parallel block around this code, None outside one."""
    return state().context_parallel


class _Thread(threading.local):
    uninstalled = False
    """Whether torch's own functions, called on this thread now, are torch's in an installed process too."""


thread: Final = _Thread()


def uninstalled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, inside which torch's attention is torch's own, installation or not: it serves, or is torch's choice."""

    def call(*args: Any, **kwargs: Any) -> Any:
        before, thread.uninstalled = thread.uninstalled, True
        try:
            return function(*args, **kwargs)
        finally:
            thread.uninstalled = before

    return call


@contextmanager
def changed(**fields: Any) -> Iterator[None]:
    """Run the block with some fields of the state replaced, on this thread or asyncio task alone."""
    token = STATE.set(state()._replace(**fields))
    try:
        yield
    finally:
        STATE.reset(token)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Choose a backend for the code inside the block, on this thread or asyncio task alone.

    Stronger than environment variables, weaker than a ``backend=`` argument. Blocks nest.

    Args:
        backend: name of an installed backend, as in ``torchhal.backends()``.

    Raises:
        BackendNotFound, BackendLoadError: there is no such backend, or it failed to load.
    """
    from torchhal.registry import registry

    if not isinstance(backend, str):
        raise InvalidProblem(
            f"use() expects the name of a backend and got {backend!r}; for example use('reference')"
        )
    registry().get(backend)
    with changed(backend=backend):
        yield
