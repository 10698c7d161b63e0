"""Attention: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchhal import scope
from torchhal.attention_call import (
    Call,
    Functions,
    MaskMod,
    ScoreMod,
    block_size_of,
    capture_block_mask,
    capture_mask_mod,
    capture_score_mod,
    diagnose,
    operands_of,
    run,
    share_batch,
)
from torchhal.dense import MISSED, checked_flags, serve_dense, serve_recent
from torchhal.errors import InvalidProblem

_scope = scope.current


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
    return_max_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
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
        return_max_scores: also return each row's largest score, as it enters the softmax, after what else is returned; for
            watching the growth of logits in training. No gradient reaches it.
        backend: name of the backend to use; overrides every other choice.

    Returns:
        (B, Hq, L, Ev) in the query's type; with ``return_lse`` or ``return_max_scores`` a tuple of that and (B, Hq, L) in
        float32 (float64 for float64) for each. Rows that see no key give 0, -inf and -inf.

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
            return_max_scores,
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
            return_max_scores,
            backend,
        )
    plain = score_mod is None and block_mask is None and dropout_p == 0.0 and not return_max_scores
    if plain and type(query) is Tensor:
        flags = checked_flags(is_causal, enable_gqa, return_lse, backend)
        if attn_mask is None and state is _scope:
            result = serve_recent(query, key, value, scale, flags)
            if result is not MISSED:
                return result  # type: ignore[no-any-return]
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
            return_max_scores,
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
            return_max_scores=return_max_scores,
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
    return_max_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention within each of B sequences that are packed one after the other.

    Args:
        query: (T, Hq, E), all query rows.
        key: (Tk, Hkv, E).
        value: (Tk, Hkv, Ev).
        cu_seqlens_q: (B + 1,) int32; sequence b owns query rows ``cu_seqlens_q[b]:cu_seqlens_q[b + 1]``.
        cu_seqlens_k: (B + 1,) int32, the same for keys.
        score_mod: as in :func:`attention`; ``b`` is the sequence, indices count from its start.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, False hides.
        is_causal, scale, enable_gqa, dropout_p, return_lse, return_max_scores, backend: as in :func:`attention`; causality is
            counted from the start of each sequence.

    Returns:
        (T, Hq, Ev), and (T, Hq) for each of ``return_lse`` and ``return_max_scores``.

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
            return_max_scores,
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
            return_max_scores,
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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    return_max_scores: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over keys and values that live in pages, as inference servers keep them.

    Args:
        query: (B, Hq, L, E), the newest L tokens of each sequence: row i is at position ``seq_lens[b] - L + i``.
        key_pages: (P, Hkv, page_size, E), floating point; or quantised, int8 or float8_e4m3fn, with ``key_scale``.
        value_pages: (P, Hkv, page_size, Ev), quantised to the keys' type if they are.
        page_table: (B, max_pages) int32; logical page j of sequence b is physical page ``page_table[b, j]``.
        seq_lens: (B,) int32, keys of each sequence; slots and table entries beyond are never read.
        key_scale: float32, for quantised pages alone: (Hkv,), one scale for each head, or (P, Hkv, page_size), one for
            each token and head. A key's element is the stored number times its scale, in float32 (float64 for a float64
            query). No gradient reaches it or the pages. Scales of slots beyond ``seq_lens`` are never read.
        value_scale: the same for values; of either shape, whichever ``key_scale`` has.
        score_mod: as in :func:`attention`; ``kv_idx`` and ``q_idx`` are positions in the sequence.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, False hides.
        is_causal: hide keys after the query's position in the sequence.
        scale, enable_gqa, return_lse, return_max_scores, backend: as in :func:`attention`.

    Returns:
        (B, Hq, L, Ev), and (B, Hq, L) for each of ``return_lse`` and ``return_max_scores``.

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
            key_scale,
            value_scale,
            score_mod,
            mask_mod,
            is_causal,
            scale,
            enable_gqa,
            return_lse,
            return_max_scores,
            backend,
        )
    functions = Functions(
        capture_score_mod(score_mod, query, key_pages, value_pages), capture_mask_mod(mask_mod)
    )
    operands = operands_of(
        functions,
        None,
        0.0,
        query,
        page_table=page_table,
        seq_lens=seq_lens,
        key_scale=key_scale,
        value_scale=value_scale,
    )
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
            return_max_scores,
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


def _context_parallel(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    from torchhal.context_parallel import AttentionArguments

    given = AttentionArguments(*arguments)
    if given.return_max_scores:
        raise InvalidProblem(
            "return_max_scores is not computed across ranks, each of which sees a part of the keys; leave it out inside "
            "context_parallel"
        )
    return scope.active_context_parallel().attention(given)  # type: ignore[no-any-return]
