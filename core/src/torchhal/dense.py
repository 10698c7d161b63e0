"""Dense attention without user functions in eager mode, where a call's overhead has a budget of 3 us.

Two look-ups, the second of which fills the first:

1. *Recent*: a few kinds of call that were served lately, each with one of Dynamo's tensor guards. A guard compares in
   one C call (0.13 to 0.26 us) what takes a dozen attributes of three tensors (1.1 us) in Python: type, dtype, device, sizes,
   ``requires_grad``, and the dispatch keys with this thread's autocast, inference mode and interposed modes.
2. *Plans*: everything a Problem depends on as the key of one dictionary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchhal import scope
from torchhal._caches import fast_cache, forgotten_on_reset
from torchhal._checks import attention_fault, mask_fault
from torchhal.attention_call import Call, check_number, choose, diagnose, share_batch
from torchhal.errors import InvalidProblem
from torchhal.registry import blame

TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
"""Private to torch; without it every call takes the second look-up."""

_scope = scope.current
_grad_enabled = torch.is_grad_enabled

RECENT: Final = 4
"""Kinds of call tried first: a guard that does not fit costs 0.1 us, the second look-up 1.1."""
GUARDS: Final = 256
"""Guards kept for each combination of flags; more are needed where the batch size varies from call to call."""


class Dense(NamedTuple):
    """A choice, as calls need it."""

    run: Callable[..., Any] | None
    """The plan's; None: torch keeps the call."""
    record: Callable[[], object]
    """Counts one call of its Route."""
    default_scale: float
    backend: str | None


Guard = tuple[Callable[..., bool], Dense]


@dataclass(eq=False)
class Flags:
    """What a dense call says beside its tensors, and the plans of such calls. One for each combination."""

    is_causal: bool
    enable_gqa: bool
    return_lse: bool
    backend: str | None
    strict: bool | None = None
    or_torch: bool = False
    plans: dict[tuple[object, ...], Dense] = field(default_factory=fast_cache, repr=False)
    guards: dict[tuple[object, ...], Guard] = field(default_factory=fast_cache, repr=False)
    recent: list[Guard] = field(default_factory=lambda: forgotten_on_reset([]), repr=False)

    def arguments(self) -> dict[str, Any]:
        """The fields that a :class:`Call` has too."""
        return {name: value for name, value in vars(self).items() if name in Call._fields}


flags_of = functools.cache(Flags)

MISSED: Final = object()
"""What :func:`serve_recent` returns for a call it does not know."""


def checked_flags(is_causal: bool, enable_gqa: bool, return_lse: bool, backend: str | None) -> Flags:
    """The flags of a call of :func:`torchhal.attention`."""
    try:
        return flags_of(is_causal, enable_gqa, return_lse, backend)
    except TypeError:  # not hashable, so not a name either
        raise InvalidProblem(f"backend expects the name of a backend, or None, and got {backend!r}") from None


def serve_recent(query: Tensor, key: Tensor, value: Tensor, scale: float | None, flags: Flags) -> Any:
    """Serve a call without a mask, outside every ``use()``, if its like was served lately.

    Returns:
        As :func:`serve_dense`, or MISSED.
    """
    try:
        # A nested tensor of strided layout has no strides, and a guard that asks for them ends the process.
        nested = query.is_nested or key.is_nested or value.is_nested
    except AttributeError:  # no tensor
        return MISSED
    if forward_ad._current_level < 0 and not nested:
        for fits, dense in flags.recent:
            # A guard takes lengths as they come. That keys and values have the same one shows in their size.
            if fits(query, key, value) and key.nbytes == value.nbytes:
                return _run(dense, query, key, value, None, scale)
    return MISSED


def serve_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float | None,
    flags: Flags,
    state: object,
) -> Any:
    """Serve a dense call without user functions: shapes checked, one dictionary look-up, the plan.

    Args:
        query, key, value, attn_mask, scale: as in :func:`torchhal.attention`, one batch size throughout.
        flags: what else the call says.
        state: ``scope.current.state``.

    Returns:
        The plan's result, or None where the policy leaves the call to torch.
    """
    try:
        shape = key.shape
        batch, heads, _, size = query.shape
        key_batch, key_heads, _, key_size = shape
        value_size = key_size if value.shape == shape else _value_size(query, key, value, flags)
    except InvalidProblem:
        raise
    except (ValueError, AttributeError, RuntimeError):
        diagnose(query, key, value, "dense", flags.enable_gqa)
        raise
    if batch != key_batch or size != key_size:
        diagnose(query, key, value, "dense", flags.enable_gqa)
        if flags.or_torch:  # torch broadcasts in its own way
            raise InvalidProblem(f"query has batch size {batch} and key {key_batch}")
        return serve_dense(query, *share_batch(query, key, value), attn_mask, scale, flags, state)
    mask_kind = None if attn_mask is None else _mask_kind(attn_mask, query, key)
    try:
        learns = forward_ad._current_level >= 0 or (
            _grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        )
        dtype = query.dtype
        kind = (
            dtype if key.dtype is dtype and value.dtype is dtype else (dtype, key.dtype, value.dtype),
            # there is one CPU, and a bool hashes faster than its device
            (query.is_cpu and key.is_cpu and value.is_cpu) or (query.device, key.device, value.device),
            heads, key_heads, size, value_size, mask_kind, learns, state,
        )  # fmt: skip
    except AttributeError:  # an array of another library, which has a shape too
        diagnose(query, key, value, "dense", flags.enable_gqa)
        raise
    dense = flags.plans.get(kind)
    if dense is None:
        selected = choose(Call(query, key, value, attn_mask, **flags.arguments()))
        dense = Dense(selected.run, selected.record, size**-0.5, selected.route.chosen)
        flags.plans[kind] = dense
    # Guards take one tensor given twice for an error, and a tensor that learns would need to be told from one that does not.
    if attn_mask is None and state is _scope and not (learns or query is key or key is value):
        _remember(flags, (batch, kind), dense, query, key, value)
    return _run(dense, query, key, value, attn_mask, scale)


def _run(
    dense: Dense, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None
) -> Any:
    run_plan, record, default_scale, backend = dense
    if scale is None:
        scale = default_scale
    elif type(scale) is not float:
        scale = check_number("scale", scale)
    record()
    if run_plan is None:
        return None
    try:
        return run_plan(query, key, value, attn_mask, scale, None)
    except Exception as error:
        # The look-ups cost less for not asking each tensor whether it is dense, so one that is not arrives here. What
        # else could be wrong with the three is part of the key that found the plan.
        fault = attention_fault(query, key, value, "dense", enable_gqa=True)
        if fault:
            raise InvalidProblem(fault) from None
        blame(error, backend)
        raise


def _remember(
    flags: Flags, kind: tuple[object, ...], dense: Dense, query: Tensor, key: Tensor, value: Tensor
) -> None:
    """Put a guard for calls like this one first among the recent ones, where a guard can tell what counts."""
    guard = flags.guards.get(kind)
    if guard is None:
        if not _can_be_guarded(query, key, value):
            return
        if len(flags.guards) >= GUARDS:
            flags.guards.clear()
        sizes = [[*tensor.shape[:2], None, tensor.shape[3]] for tensor in (query, key, value)]
        unknown = [[None] * 4] * 3
        made = TensorGuards(query, key, value, dynamic_dims_sizes=sizes, dynamic_dims_strides=unknown)
        guard = flags.guards[kind] = (made.check, dense)
    if guard not in flags.recent[:1]:
        flags.recent[:] = [guard, *(other for other in flags.recent if other is not guard)][:RECENT]


def _can_be_guarded(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether equal sizes in bytes mean equal lengths, and a gradient would show as ``requires_grad``."""
    if TensorGuards is None or key.shape != value.shape or 0 in (*key.shape[:2], key.shape[3]):
        return False
    tensors = (query, key, value)
    return query is not value and all(type(t) is Tensor and not t.requires_grad for t in tensors)


def _value_size(query: Tensor, key: Tensor, value: Tensor, flags: Flags) -> int:
    """The head size of values that are not shaped like the keys."""
    if not isinstance(value, Tensor) or value.shape[:-1] != key.shape[:-1]:
        diagnose(query, key, value, "dense", flags.enable_gqa)
    return value.shape[-1]


def _mask_kind(attn_mask: Tensor, query: Tensor, key: Tensor) -> tuple[object, ...]:
    """What a Problem depends on of a mask, once its shape is known to fit."""
    fault = mask_fault(attn_mask, query, key)
    if fault:
        raise InvalidProblem(fault)
    return attn_mask.dtype, torch.is_grad_enabled() and attn_mask.requires_grad
