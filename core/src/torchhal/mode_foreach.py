"""torch's ``_foreach_*`` functions under the mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchhal import environment, scope
from torchhal._tracing import constant_while_tracing
from torchhal.foreach import LEFT_TO_TORCH, Policy
from torchhal.foreach_torch import TABLE, translate
from torchhal.registry import registry

if TYPE_CHECKING:
    from torchhal.mode import Mode


def handlers() -> dict[Any, Callable[..., Any]]:
    """A handler for each torch function that foreach_map can express."""
    return {function: _handler(function) for function in TABLE}


def _handler(function: Callable[..., Any]) -> Callable[..., Any]:
    def handler(mode: Mode, *args: Any, **kwargs: Any) -> Any:
        unscoped = scope.current.state is scope.current
        if not is_chosen(mode.backend, unscoped):
            return function(*args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            return _traced(mode, function, args, kwargs)
        call = translate(function, args, kwargs)
        if call is None:
            return function(*args, **kwargs)
        result = call.run(Policy(mode.backend, mode.strict, True))
        return function(*args, **kwargs) if result is LEFT_TO_TORCH else result

    return handler


def _traced(mode: Mode, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Under torch.compile the compiler fuses what torch's function decomposes into; a backend chosen by name serves."""
    from torchhal.foreach import foreach_map

    rule, in_place = TABLE[function]
    if mode.backend is None or rule.shape != "binary" or kwargs or rule.scalar_fn is not None:
        return function(*args, **kwargs)
    result = foreach_map(rule.fn, *args, backend=mode.backend, out=args[0] if in_place else None)
    return tuple(result) if not in_place else result


@constant_while_tracing
def is_chosen(backend: str | None, unscoped: bool) -> bool:
    """Whether the user chose who is to serve the foreach family, and that backend claims it.

    Each of torch's ``_foreach_`` functions is one pass over memory whoever serves it, so there is nothing to gain but
    launches, and looking at the list costs more than they do: of 1000 tensors 2 ms, where torch's own takes about 1.4 (the
    host of an H100). What gains is a whole step as one pass, :func:`torchhal.foreach_map` and :mod:`torchhal.optim`.
    """
    chosen = backend or (None if unscoped else scope.chosen_backend())
    names = [chosen] if chosen else (environment.preferred_backends("foreach") or ([], ""))[0]
    return any(registry().get(name).info.capabilities.foreach is not None for name in names)
