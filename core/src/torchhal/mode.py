"""The mode: reroutes torch's own attention and foreach calls to the best backend, models unchanged.

Calls that no backend improves go to torch untouched, and so does every call whose meaning torch and torchhal
might see differently. The handlers are looked up in one dictionary by the function called.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchhal import mode_foreach
from torchhal._tracing import constant_while_tracing
from torchhal.mode_sdpa import Settings, four_flags, scaled_dot_product_attention, sdpa, torchs_own
from torchhal.registry import registry


class Mode(TorchFunctionMode):
    """Intercepts torch calls inside a ``with`` block; made by :func:`enable`.

    ``__enter__`` and ``__exit__`` are torch's own, so that graph breaks inside the block stay legal, and the
    attributes never change, so that torch.compile can guard on them.
    """

    def __init__(self, backend: str | None = None, strict: bool | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.strict = strict
        # Dynamo can not trace how these are made. A mode that is made inside a compiled function goes without:
        # nothing reads its flags there, and torch keeps the attention of nn.MultiheadAttention.
        tracing = torch.compiler.is_dynamo_compiling()
        self.flags = None if tracing else four_flags(backend, strict)
        self.multi_head_attention_forward = None if tracing else _with_attention(backend, strict)

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is sdpa:  # first here, since it is the call whose microseconds count
            result = (
                scaled_dot_product_attention(self, *args, **kwargs)
                if kwargs
                else scaled_dot_product_attention(self, *args)
            )
            return torchs_own(args, kwargs) if result is None else result
        handler = HANDLERS.get(func)
        if handler is None:
            return func(*args, **kwargs) if kwargs else func(*args)
        return handler(self, *args, **kwargs) if kwargs else handler(self, *args)


def enable(backend: str | None = None, strict: bool | None = None) -> Mode:
    """Reroute torch's own calls inside the block to the best backend: ``with torchhal.enable(): model(x)``.

    Serves ``scaled_dot_product_attention`` wherever it was imported, also inside ``nn.MultiheadAttention`` and
    the models of transformers, ``flex_attention``, and the ``torch._foreach_*`` functions, in eager mode and
    under torch.compile, with torch's exact meaning of every argument.

    Args:
        backend: serve with this backend and raise where it can not, except for families that it does not
            claim at all, which torch keeps. By default the policy chooses, and torch keeps what nobody improves.
        strict: raise instead of leaving a call to torch that a backend for the device declined; by
            default as ``TORCHHAL_STRICT`` says.

    Raises:
        BackendNotFound, BackendLoadError: there is no such backend, or it failed to load.
    """
    if backend is not None:
        _check(backend)
    return Mode(backend, strict)


@constant_while_tracing
def _check(backend: str) -> None:
    registry().get(backend)


def active_mode() -> Mode | None:
    """The innermost mode around this code."""
    stack = torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    return next((mode for mode in reversed(stack) if isinstance(mode, Mode)), None)


# ---------------------------------------------------------------------------- nn.MultiheadAttention


@functools.cache
def _with_attention(backend: str | None, strict: bool | None) -> Callable[..., Any]:
    """Torch's multi_head_attention_forward with our handler as the attention it calls.

    Torch offers the function whole to an active mode and takes the mode off meanwhile, so the attention
    inside would go unseen. Putting the mode back on is no way out: the function would offer itself again, and
    Dynamo can not trace ``Tensor.unflatten``, which it uses, under a mode. So the same code runs with two of
    its global names changed, in a module of its own, since Dynamo guards on globals by the name of a module.
    """
    settings = Settings(backend, strict)

    def attention(*args: Any, **kwargs: Any) -> Any:
        result = scaled_dot_product_attention(settings, *args, **kwargs)
        return torchs_own(args, kwargs) if result is None else result

    function: Any = F.multi_head_attention_forward
    module = types.ModuleType(f"torchhal.mode.multi_head_attention_{len(_copies)}")
    changed = {
        "__name__": module.__name__,
        "has_torch_function": _any_override,
        "scaled_dot_product_attention": attention,
    }
    vars(module).update({**function.__globals__, **changed})
    sys.modules[module.__name__] = module
    _copies.append(module)
    copy = types.FunctionType(function.__code__, vars(module), function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_copies: list[types.ModuleType] = []


def _any_override(tensors: Sequence[Tensor | None]) -> bool:
    """``has_torch_function`` with no regard to modes."""
    plain = (Tensor, torch.nn.Parameter)
    return any([t is not None and type(t) not in plain for t in tensors])  # noqa: C419  # Dynamo traces lists


def multi_head_attention_forward(mode: Mode, *args: Any, **kwargs: Any) -> Any:
    """Run torch's multi-head attention so that the attention inside is served."""
    return (mode.multi_head_attention_forward or F.multi_head_attention_forward)(*args, **kwargs)


# ---------------------------------------------------------------------------- flex_attention


def flex_attention(
    mode: Mode,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    block_mask: Any,
    scale: float,
    kernel_options: Any,
    *rest: Any,
) -> Any:
    """Serve the operator that torch's flex_attention ends in; returns (out, lse in base 2, row maxima)."""
    from torchhal import mode_flex

    return mode_flex.flex_attention(
        mode, query, key, value, score_mod, block_mask, scale, kernel_options, *rest
    )


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: multi_head_attention_forward,
    torch.ops.higher_order.flex_attention: flex_attention,
    **mode_foreach.handlers(),
}
"""What the mode serves beside ``scaled_dot_product_attention``; everything else goes straight to torch."""
