"""Attention: the public functions and the eager fast path."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.flex_attention import BlockMask

from torchhal import scope
from torchhal._checks import attention_fault, mask_fault
from torchhal.attention_call import (
    Call,
    Functions,
    MaskMod,
    ScoreMod,
    block_size_of,
    capture_block_mask,
    capture_mask_mod,
    capture_score_mod,
    check_number,
    choose,
    diagnose,
    operands_of,
    run,
    share_batch,
)
from torchhal.errors import InvalidProblem
from torchhal.registry import blame
from torchhal.selection import fast_cache

_scope = scope.current
_grad_enabled = torch.is_grad_enabled


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score_mod: ScoreMod | None = None,
    block_mask: BlockMask | None = None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(score_mod(query @ key.T * scale) + mask) @ value``, on the best backend there is.

    Args:
        query: (B, Hq, L, E), floating point, any strides; or a nested jagged tensor of that logical shape.
        key: (B, Hkv, S, E); B may be 1 and is then shared.
        value: (B, Hkv, S, Ev).
        score_mod: ``(score, b, h, q_idx, kv_idx) -> score``, a pointwise function that may read captured
            tensors; ``score`` is float32 (float64 for float64 inputs), indices are int32.
        block_mask: which keys each query sees, from ``create_block_mask`` of
            ``torch.nn.attention.flex_attention``.
        attn_mask: broadcastable to (B, Hq, L, S); boolean (True takes part) or floating (added to the scores).
        is_causal: hide keys ``j > i``, counted from the top left as in ``scaled_dot_product_attention``.
        scale: factor of the scores; ``E ** -0.5`` by default.
        enable_gqa: let each key head serve ``Hq / Hkv`` query heads.
        dropout_p: probability with which attention weights are dropped.
        return_lse: also return the natural-logarithm log-sum-exp of each row.
        backend: name of the backend to use; overrides every other choice.

    Returns:
        (B, Hq, L, Ev) in the query's type; with ``return_lse`` also (B, Hq, L) in float32 (float64 for
        float64). Rows that see no key give 0 and -inf.

    Raises:
        InvalidProblem: shapes, types or devices that mean nothing together; the message says which.
        Unsupported: nobody the policy allows can serve the call; carries each backend's reason.
    """
    state = _scope.state
    if state is not _scope and state.context_parallel is not None:
        return _context_parallel(
            query,
            key,
            value,
            score_mod,
            block_mask,
            attn_mask,
            is_causal,
            scale,
            enable_gqa,
            dropout_p,
            return_lse,
            backend,
        )
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        return compiled.attention(  # type: ignore[no-any-return]
            query,
            key,
            value,
            score_mod,
            block_mask,
            attn_mask,
            is_causal,
            scale,
            enable_gqa,
            dropout_p,
            return_lse,
            backend,
        )
    if score_mod is None and block_mask is None and dropout_p == 0.0 and type(query) is Tensor:
        flags = _flags_of(is_causal, enable_gqa, return_lse, backend)
        return serve_dense(query, key, value, attn_mask, scale, flags, state)  # type: ignore[no-any-return]
    if isinstance(query, Tensor) and query.is_nested:
        from torchhal import nested

        return nested.attention(
            query,
            key,
            value,
            score_mod,
            block_mask,
            attn_mask,
            is_causal,
            scale,
            enable_gqa,
            dropout_p,
            return_lse,
            backend,
        )
    diagnose(query, key, value, "dense", enable_gqa)
    key, value = share_batch(query, key, value)
    functions = Functions(capture_score_mod(score_mod, query, key, value), capture_block_mask(block_mask))
    return run(
        Call(
            query,
            key,
            value,
            attn_mask,
            functions=functions,
            operands=operands_of(functions, block_mask, dropout_p, query),
            block_size=None if block_mask is None else block_size_of(block_mask, query, key),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            return_lse=return_lse,
            backend=backend,
        )
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each of B sequences that are packed one after the other.

    Args:
        query: (T, Hq, E), all query rows.
        key: (Tk, Hkv, E).
        value: (Tk, Hkv, Ev).
        cu_seqlens_q: (B + 1,) int32; sequence b owns query rows ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``.
        cu_seqlens_k: (B + 1,) int32, the same for keys.
        score_mod: as in :func:`attention`; ``b`` is the sequence, indices count from its start.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, False hides.
        is_causal, scale, enable_gqa, dropout_p, return_lse, backend: as in :func:`attention`; causality is
            counted from the start of each sequence.

    Returns:
        (T, Hq, Ev), and with ``return_lse`` (T, Hq).

    Raises:
        InvalidProblem, Unsupported: as in :func:`attention`.
    """
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        return compiled.varlen_attention(  # type: ignore[no-any-return]
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            score_mod,
            mask_mod,
            is_causal,
            scale,
            enable_gqa,
            dropout_p,
            return_lse,
            backend,
        )
    functions = Functions(capture_score_mod(score_mod, query, key, value), capture_mask_mod(mask_mod))
    operands = operands_of(
        functions, None, dropout_p, query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    return run(
        Call(
            query,
            key,
            value,
            None,
            "varlen",
            functions,
            operands,
            None,
            is_causal,
            scale,
            enable_gqa,
            return_lse,
            backend,
        )
    )


def paged_attention(
    query: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    *,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over keys and values that live in pages, as inference servers keep them.

    Args:
        query: (B, Hq, L, E), the newest L tokens of each sequence: row i is at position ``seq_lens[b] - L + i``.
        key_pages: (P, Hkv, page_size, E).
        value_pages: (P, Hkv, page_size, Ev).
        page_table: (B, max_pages) int32; logical page j of sequence b is physical page ``page_table[b, j]``.
        seq_lens: (B,) int32, keys of each sequence; slots and table entries beyond are never read.
        score_mod: as in :func:`attention`; ``kv_idx`` and ``q_idx`` are positions in the sequence.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, False hides.
        is_causal: hide keys after the query's position in the sequence.
        scale, enable_gqa, return_lse, backend: as in :func:`attention`.

    Returns:
        (B, Hq, L, Ev), and with ``return_lse`` (B, Hq, L).

    Raises:
        InvalidProblem, Unsupported: as in :func:`attention`.
    """
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        return compiled.paged_attention(  # type: ignore[no-any-return]
            query,
            key_pages,
            value_pages,
            page_table,
            seq_lens,
            score_mod,
            mask_mod,
            is_causal,
            scale,
            enable_gqa,
            return_lse,
            backend,
        )
    functions = Functions(
        capture_score_mod(score_mod, query, key_pages, value_pages), capture_mask_mod(mask_mod)
    )
    operands = operands_of(functions, None, 0.0, query, page_table=page_table, seq_lens=seq_lens)
    return run(
        Call(
            query,
            key_pages,
            value_pages,
            None,
            "paged",
            functions,
            operands,
            None,
            is_causal,
            scale,
            enable_gqa,
            return_lse,
            backend,
        )
    )


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join partial results over disjoint sets of keys into the result over all of them.

    Args:
        outs: partial outputs, (..., Ev) each.
        lses: their log-sum-exps, natural logarithm, shaped like the outputs without the last dimension.

    Returns:
        ``(out, lse)`` of the same shapes. Partial results with an LSE of -inf contribute nothing.

    Raises:
        InvalidProblem: lists of different lengths, or shapes that do not belong together.
    """
    from torchhal.reference.attention import merge_attention as merge

    return merge(outs, lses)


# ---------------------------------------------------------------------------- eager fast path


Dense = tuple[Callable[..., Any] | None, Callable[[], object], float, str | None]
"""The plan's ``run`` (None: torch keeps the call), the counter of its Route, the default scale, and the backend."""


@dataclass(frozen=True, eq=False)
class Flags:
    """What a dense call says beside its tensors, and the plans of such calls. One for each combination."""

    is_causal: bool
    enable_gqa: bool
    return_lse: bool
    backend: str | None
    strict: bool | None = None
    or_torch: bool = False
    plans: dict[tuple[object, ...], Dense] = field(default_factory=fast_cache)

    def arguments(self) -> dict[str, Any]:
        """The fields that a :class:`Call` has too."""
        return {name: value for name, value in vars(self).items() if name != "plans"}


LEFT_TO_TORCH: Final = object()
"""What :func:`serve_dense` returns for a call that the policy leaves to torch."""

flags_of = functools.cache(Flags)


def _flags_of(is_causal: bool, enable_gqa: bool, return_lse: bool, backend: str | None) -> Flags:
    try:
        return flags_of(is_causal, enable_gqa, return_lse, backend)
    except TypeError:  # not hashable, so not a name either
        raise InvalidProblem(f"backend expects the name of a backend, or None, and got {backend!r}") from None


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

    The budget of a whole call is 3 us, so what is read here is what a Problem depends on and no more.

    Args:
        query, key, value, attn_mask, scale: as in :func:`attention`, one batch size throughout.
        flags: what else the call says.
        state: ``scope.current.state``.

    Returns:
        The plan's result, or LEFT_TO_TORCH where the policy says so.
    """
    try:
        shape = key.shape
        batch, heads, _, size = query.shape
        key_batch, key_heads, _, key_size = shape
    except (ValueError, AttributeError, RuntimeError):
        raise InvalidProblem(attention_fault(query, key, value, "dense", flags.enable_gqa)) from None
    value_size = key_size if value.shape == shape else _value_size(query, key, value, flags)
    if batch != key_batch or size != key_size:
        diagnose(query, key, value, "dense", flags.enable_gqa)
        if flags.or_torch:  # torch broadcasts in its own way
            raise InvalidProblem(f"query has batch size {batch} and key {key_batch}")
        return serve_dense(query, *share_batch(query, key, value), attn_mask, scale, flags, state)
    mask_kind = None if attn_mask is None else _mask_kind(attn_mask, query, key)
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
    dense = flags.plans.get(kind)
    if dense is None:
        selected = choose(Call(query, key, value, attn_mask, **flags.arguments()))
        dense = flags.plans[kind] = (selected.run, selected.record, size**-0.5, selected.route.chosen)
    run_plan, record, default_scale, backend = dense
    if scale is None:
        scale = default_scale
    elif type(scale) is not float:
        scale = check_number("scale", scale)
    record()
    if run_plan is None:
        return LEFT_TO_TORCH
    try:
        return run_plan(query, key, value, attn_mask, scale, None)
    except Exception as error:
        blame(error, backend)
        raise


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


def _context_parallel(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    from torchhal.context_parallel import AttentionArguments

    return scope.active_context_parallel().attention(AttentionArguments(*arguments))  # type: ignore[no-any-return]
