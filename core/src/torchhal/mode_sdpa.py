"""torch's scaled_dot_product_attention under the mode: served where a backend improves it, else torch's own."""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torchhal import scope
from torchhal.attention_call import Call, Functions, build_problem, operands_of, run
from torchhal.dense import MISSED, Flags, flags_of, serve_dense, serve_recent
from torchhal.errors import InvalidProblem, Unsupported
from torchhal.selection import is_traced, select

sdpa: Final = F.scaled_dot_product_attention
_uninstalled_sdpa: Final = scope.uninstalled(sdpa)
_scope: Final = scope.current
_is_dynamo_compiling: Final = torch.compiler.is_dynamo_compiling
_any_autocast: Final = torch._C._is_any_autocast_enabled
# Torch may choose among its kernels, except inside sdpa_kernel(...), where the user has and means it.
_flash_allowed: Final = torch._C._get_flash_sdp_enabled
_math_allowed: Final = torch._C._get_math_sdp_enabled

FourFlags = tuple[tuple[Flags, Flags], tuple[Flags, Flags]]
"""Indexed by ``is_causal`` and ``enable_gqa``."""


class Settings(NamedTuple):
    """What handlers read of a mode."""

    backend: str | None
    strict: bool | None
    flags: FourFlags | None = None
    """Those of :func:`four_flags`, where the time to look them up counts."""


@functools.cache
def four_flags(backend: str | None, strict: bool | None) -> FourFlags:
    """The flags of every kind of call under such a mode."""
    first, second, third, fourth = (
        flags_of(c, g, False, backend, strict, True) for c in (False, True) for g in (False, True)
    )
    return (first, second), (third, fourth)


class Arguments(NamedTuple):
    """The arguments of one call, as torch names them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def torchs_own(self) -> Tensor:
        """The call, served by torch."""
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = self
        return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def call(self, settings: Settings) -> Call:
        """The same as an attention call; torch's random numbers are not ours, so dropout draws its own seed."""
        operands = operands_of(Functions(), None, self.dropout_p, self.query) if self.dropout_p else None
        return Call(
            self.query, self.key, self.value, self.attn_mask, operands=operands, is_causal=self.is_causal,
            scale=self.scale, enable_gqa=self.enable_gqa, backend=settings.backend, strict=settings.strict, or_torch=True,
        )  # fmt: skip


def scaled_dot_product_attention(
    mode: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Serve one call; ``mode`` is the mode or its :class:`Settings`.

    Returns:
        The result, or None where the call is left to torch.
    """
    state = _scope.state
    if (
        state is _scope
        and dropout_p == 0.0
        and (attn_mask is None or (not is_causal and attn_mask.dtype in (torch.bool, query.dtype)))
        and _flash_allowed()
        and _math_allowed()
        and not _is_dynamo_compiling()
    ):
        flags = (mode.flags or four_flags(mode.backend, mode.strict))[is_causal][enable_gqa]
        try:
            result = MISSED if attn_mask is not None else serve_recent(query, key, value, scale, flags)
            if result is not MISSED:
                return result
            if type(query) is type(key) is type(value) is Tensor and not _any_autocast():
                return serve_dense(query, key, value, attn_mask, scale, flags, state)
        except InvalidProblem:  # torch broadcasts more, and has its own words for what it refuses
            pass
    given = Arguments(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _consider(Settings(mode.backend, mode.strict), given)


def _consider(settings: Settings, given: Arguments) -> Any:
    """Every call that is not of the common kind."""
    state = _scope.state
    if state is not _scope and state.context_parallel is not None:
        return _sharded(settings, given)
    given = _autocast(given)
    if _is_dynamo_compiling():
        from torchhal import compiled

        if torchs_business(given) or not _same_shapes(given):
            return None
        return compiled.scaled_dot_product_attention(settings, given)
    query, key, value, attn_mask, *_ = given
    if query.dim() == key.dim() == value.dim() == 3 and query.shape[0] == key.shape[0] == value.shape[0]:
        mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.dim() == 3 else attn_mask
        if mask is None or mask.dim() != 4 or mask is not attn_mask:
            heads = given._replace(
                query=query.unsqueeze(1), key=key.unsqueeze(1), value=value.unsqueeze(1), attn_mask=mask
            )
            served = served_by_policy(settings, heads)
            return None if served is None else served.squeeze(1)
    return served_by_policy(settings, given)


def served_by_policy(settings: Settings, given: Arguments) -> Tensor | None:
    """Ask the policy; None for what it leaves to torch.

    Raises:
        Unsupported: a backend was named to the mode, and the call is one that only torch serves.
    """
    fault = torchs_business(given, explicit=settings.backend is not None)
    if not fault:
        try:
            call = given.call(settings)
            problem = build_problem(call)
        except (
            InvalidProblem,
            RuntimeError,
        ) as error:  # strided nested tensors raise RuntimeError for a shape
            fault = str(error)
    if not fault:
        selected = select(problem, call.backend, strict=call.strict, or_torch=True)
        if selected.plan is not None:
            return run(call)  # type: ignore[return-value]
        selected.record()
    elif settings.backend is not None:
        raise Unsupported(
            f"enable(backend={settings.backend!r}) can not serve this scaled_dot_product_attention: {fault}"
        )
    return None


def torchs_business(given: Arguments, explicit: bool = False) -> str:
    """Why a call is torch's whatever backends there are; empty when it is not."""
    for tensor in given[:4]:
        if isinstance(tensor, Tensor) and not _ours(tensor):
            return f"{type(tensor).__name__} has a meaning of its own"
    if given.attn_mask is not None:
        if given.is_causal:
            return "attn_mask and is_causal together are for torch to judge"
        if given.attn_mask.dtype is not torch.bool and given.attn_mask.dtype is not given.query.dtype:
            return f"a mask of {given.attn_mask.dtype} beside a query of {given.query.dtype} is for torch to judge"
    query, key, value = given[:3]
    if query.dim() and key.dim() and value.dim() and not query.shape[0] == key.shape[0] == value.shape[0]:
        return "torch broadcasts batches in its own way"
    if given.dropout_p and not explicit:
        return "dropout draws torch's random numbers"
    if given.scale is not None and not isinstance(given.scale, (int, float, torch.SymFloat, torch.SymInt)):
        return f"scale is a {type(given.scale).__name__}"
    if not (_flash_allowed() and _math_allowed()):
        return "sdpa_kernel(...) has chosen a kernel of torch"
    return ""


def _ours(tensor: Tensor) -> bool:
    return (type(tensor) in (Tensor, torch.nn.Parameter) or is_traced(tensor)) and not tensor.is_nested


def _same_shapes(given: Arguments) -> bool:
    """Whether the result is shaped like the query, torch broadcasting nothing."""
    query, key, value = given[:3]
    if not query.dim() == key.dim() == value.dim() == 4 or given.dropout_p != 0.0:
        return False
    if query.shape[0] != key.shape[0] or key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3]:
        return False
    if query.shape[1] == key.shape[1]:
        return True
    return given.enable_gqa and key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0


def _autocast(given: Arguments) -> Arguments:
    """The arguments as torch's autocast, when on, would hand them to its kernel."""
    kind = given.query.device.type
    if not torch.is_autocast_enabled(kind):
        return given
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Any) -> Any:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype is not torch.float64
        return tensor.to(dtype) if eligible else tensor

    query, key, value, mask = (cast(tensor) for tensor in given[:4])
    return given._replace(query=query, key=key, value=value, attn_mask=mask)


def torchs_own(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    """A call that was left to torch, which an installation (installation.py) is not to consider again."""
    if _is_dynamo_compiling():
        return sdpa(*args, **(kwargs or {}))
    return _uninstalled_sdpa(*args, **(kwargs or {}))


def _sharded(settings: Settings, given: Arguments) -> Any:
    from torchhal.attention import attention

    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = given
    return attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale,
        enable_gqa=enable_gqa, dropout_p=dropout_p, backend=settings.backend,
    )  # fmt: skip
