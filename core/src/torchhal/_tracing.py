"""Marks for Dynamo that do not import Dynamo, whose import takes most of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_while_tracing(function: F) -> F:
    """Let Dynamo run ``function``, whose arguments are constants, and take its result as one.

    What ``torch.compiler.assume_constant_result`` does, by the attribute it sets.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
