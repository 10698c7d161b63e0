"""What the surrounding code has chosen: ``use()`` and the context-parallel block, as context variables.

Threads and asyncio tasks each see their own. Under torch.compile the choice has to be a guard: Dynamo can
not trace a ContextVar, but it does guard on attributes of modules, and reads them with ``getattr``. So the
current choice is a property of a module object whose getter is the C method ``ContextVar.get`` itself:
exact per thread and task, and no Python runs when the guard is checked.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torchhal.errors import InvalidProblem

CHOICE: ContextVar[str] = ContextVar("torchhal_choice")
CONTEXT_PARALLEL: ContextVar[Any] = ContextVar("torchhal_context_parallel")


class _Scope(types.ModuleType):
    # ContextVar.get(default) is called with this module as its default: "nothing chosen" reads as the module.
    choice = property(CHOICE.get)  # type: ignore[arg-type]
    context_parallel = property(CONTEXT_PARALLEL.get)  # type: ignore[arg-type]


current: Any = _Scope("torchhal.scope.current")
sys.modules["torchhal.scope.current"] = current


def chosen_backend() -> str | None:
    """The backend of the innermost ``use()`` around this code, None outside one."""
    choice = current.choice
    return None if choice is current else choice


def active_context_parallel() -> Any:
    """The innermost context-parallel block around this code, None outside one."""
    block = current.context_parallel
    return None if block is current else block


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
        raise InvalidProblem(f"use() expects the name of a backend and got {backend!r}; for example use('reference')")
    registry().get(backend)
    token = CHOICE.set(backend)
    try:
        yield
    finally:
        CHOICE.reset(token)
