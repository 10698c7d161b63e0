"""The mode: reroutes torch's own attention and foreach calls to the best backend, models unchanged.

Calls that no backend improves go to torch untouched, and so does every call whose meaning torch and torchhal
might see differently. The handlers are looked up in one dictionary by the function called.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from torchhal import mode_foreach, scope
from torchhal.attention import LEFT_TO_TORCH, Flags, flags_of, serve_dense
from torchhal.attention_call import Call, build_problem, run
from torchhal.errors import InvalidProblem
from torchhal.registry import registry
from torchhal.selection import select


class Mode(TorchFunctionMode):
    """Intercepts torch calls inside a ``with`` block; made by :func:`enable`.

    ``__enter__`` and ``__exit__`` are torch's own, so that graph breaks inside the block stay legal, and the
    attributes never change, so that torch.compile can guard on them.
    """

    def __init__(self, backend: str | None = None, strict: bool | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.strict = strict
        self.flags = _flags(backend, strict)
        self.multi_head_attention_forward = _with_attention(_Settings(backend, strict))

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func is _sdpa
        ):  # also among the handlers; first here, since it is the call whose microseconds count
            return (
                scaled_dot_product_attention(self, *args, **kwargs)
                if kwargs
                else scaled_dot_product_attention(self, *args)
            )
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
        registry().get(backend)
    return Mode(backend, strict)


# ---------------------------------------------------------------------------- scaled_dot_product_attention

_sdpa: Final = F.scaled_dot_product_attention
_scope: Final = scope.current
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling


def scaled_dot_product_attention(
    mode: Mode | _Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Serve torch's scaled_dot_product_attention."""
    state = _scope.state
    if state is not _scope and state.context_parallel is not None:
        return _sharded(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, mode.backend)
    if _is_dynamo_compiling():
        from torchhal import compiled

        if (
            query.dim() != 4
            or key.dim() != 4
            or value.dim() != 4
            or dropout_p != 0.0
            or query.shape[0] != key.shape[0]
        ):
            return _sdpa(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return compiled.scaled_dot_product_attention(
            mode.backend, mode.strict, query, key, value, attn_mask, is_causal, scale, enable_gqa
        )
    if dropout_p == 0.0 and type(query) is Tensor and _flash_allowed() and _math_allowed():
        if attn_mask is None or (not is_causal and attn_mask.dtype in (torch.bool, query.dtype)):
            flags = mode.flags[is_causal][enable_gqa]
            try:
                result = serve_dense(query, key, value, attn_mask, scale, flags, state)
            except InvalidProblem:  # torch broadcasts more, and has its own words for what it refuses
                return _other_shapes(mode, query, key, value, attn_mask, is_causal, scale, enable_gqa)
            if result is not LEFT_TO_TORCH:
                return result
    elif type(query) is not Tensor and dropout_p == 0.0:
        return sdpa_traced(
            mode.backend, mode.strict, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


# Torch may choose among its kernels, except inside sdpa_kernel(...), where the user has and means it.
_flash_allowed = torch._C._get_flash_sdp_enabled
_math_allowed = torch._C._get_math_sdp_enabled


def _other_shapes(
    mode: Mode | _Settings,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Any:
    """(N, L, E) inputs as one head each; every other shape is torch's business."""
    if query.dim() == key.dim() == value.dim() == 3 and query.shape[0] == key.shape[0]:
        mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        return scaled_dot_product_attention(mode, query, key, value, mask, 0.0, is_causal, scale).squeeze(1)
    return _sdpa(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)


def sdpa_traced(
    backend: str | None, strict: bool | None, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None,
    dropout_p: float, is_causal: bool, scale: float | None, enable_gqa: bool,
) -> Any:  # fmt: skip
    """Serve a call whose tensors a compiler is tracing."""
    call = Call(
        query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
        backend=backend, strict=strict, or_torch=True,
    )  # fmt: skip
    plain = dropout_p == 0.0 and (
        attn_mask is None or (not is_causal and attn_mask.dtype in (torch.bool, query.dtype))
    )
    if plain and _flash_allowed() and _math_allowed():
        try:
            problem = build_problem(call)
        except InvalidProblem:
            problem = None
        if problem is not None and query.shape[0] == key.shape[0]:
            selected = select(problem, call.backend, strict=call.strict, or_torch=True)
            if selected.plan is not None:
                return run(call)
            selected.record()
    return _sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _sharded(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float,
    is_causal: bool, scale: float | None, enable_gqa: bool, backend: str | None,
) -> Any:  # fmt: skip
    from torchhal.attention import attention

    return attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa, dropout_p=dropout_p, backend=backend,
    )  # fmt: skip


# ---------------------------------------------------------------------------- nn.MultiheadAttention


FourFlags = tuple[tuple[Flags, Flags], tuple[Flags, Flags]]
"""Indexed by ``is_causal`` and ``enable_gqa``."""


class _Settings(NamedTuple):
    """What handlers read of a mode."""

    backend: str | None
    strict: bool | None

    @property
    def flags(self) -> FourFlags:
        """The flags of a call."""
        return _flags(self.backend, self.strict)


@functools.cache
def _flags(backend: str | None, strict: bool | None) -> FourFlags:
    first, second, third, fourth = (
        flags_of(c, g, False, backend, strict, True) for c in (False, True) for g in (False, True)
    )
    return (first, second), (third, fourth)


@functools.cache
def _with_attention(settings: _Settings) -> Callable[..., Any]:
    """Torch's multi_head_attention_forward with our handler as the attention it calls.

    Torch offers the function whole to an active mode and takes the mode off meanwhile, so the attention
    inside would go unseen. Putting the mode back on is no way out: the function would offer itself again, and
    Dynamo can not trace ``Tensor.unflatten``, which it uses, under a mode. So the same code runs with two of
    its global names changed, in a module of its own, since Dynamo guards on globals by the name of a module.
    """
    function: Any = F.multi_head_attention_forward
    module = types.ModuleType(f"torchhal.mode.multi_head_attention_{len(_copies)}")
    changed = {
        "__name__": module.__name__,
        "has_torch_function": lambda tensors: False,
        "scaled_dot_product_attention": lambda *args, **kwargs: scaled_dot_product_attention(
            settings, *args, **kwargs
        ),
    }
    vars(module).update({**function.__globals__, **changed})
    sys.modules[module.__name__] = module
    _copies.append(module)
    copy = types.FunctionType(function.__code__, vars(module), function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_copies: list[types.ModuleType] = []


def multi_head_attention_forward(mode: Mode, *args: Any, **kwargs: Any) -> Any:
    """Run torch's multi-head attention so that the attention inside is served."""
    return mode.multi_head_attention_forward(*args, **kwargs)


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
    _sdpa: scaled_dot_product_attention,
    F.multi_head_attention_forward: multi_head_attention_forward,
    torch.ops.higher_order.flex_attention: flex_attention,
    **mode_foreach.handlers(),
}
"""What the mode serves; everything else goes straight to torch."""
