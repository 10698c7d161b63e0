"""Attention: the public functions, the one place their Problem is built, and the eager fast path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchhal import scope
from torchhal._checks import attention_fault, check_varlen, check_paged, mask_fault
from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.pointwise import Captured, capture_cached
from torchhal.problems import AttentionProblem, Plan
from torchhal.reference.attention import score_dtype
from torchhal.selection import Selected, fast_cache, is_traced, select

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

INDICES = tuple((name, torch.int32) for name in ("b", "h", "q_idx", "kv_idx"))

_plans: dict[tuple[object, ...], Dense] = fast_cache()
_unchosen = scope.current


class Functions(NamedTuple):
    """The captured user functions of one attention call."""

    score_mod: Captured | None = None
    mask_mod: Captured | None = None


class Call(NamedTuple):
    """Everything one attention call says, in one layout, after user functions were captured."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    layout: str = "dense"
    functions: Functions = Functions()
    operands: AttentionOperands | None = None
    block_size: tuple[int, int] | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
    return_lse: bool = False
    backend: str | None = None
    strict: bool | None = None
    or_torch: bool = False


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
    if scope.current.state is not _unchosen and scope.active_context_parallel() is not None:
        return _context_parallel(
            query, key, value, score_mod, block_mask, attn_mask, is_causal, scale, enable_gqa, dropout_p, return_lse, backend
        )
    if torch.compiler.is_dynamo_compiling():
        from torchhal import compiled

        return compiled.attention(
            query, key, value, score_mod, block_mask, attn_mask, is_causal, scale, enable_gqa, dropout_p, return_lse, backend
        )
    if score_mod is None and block_mask is None and dropout_p == 0.0 and type(query) is Tensor:
        if key.size(0) != query.size(0):
            key, value = share_batch(query, key, value)
        flags = (is_causal, enable_gqa, return_lse, backend, None, False)
        run_plan, record, default_scale = dense_plan(query, key, value, attn_mask, flags)
        assert run_plan is not None
        record()
        return run_plan(query, key, value, attn_mask, default_scale if scale is None else scale, None)  # type: ignore[no-any-return]
    if isinstance(query, Tensor) and query.is_nested:
        from torchhal import nested

        return nested.attention(
            query, key, value, score_mod, block_mask, attn_mask, is_causal, scale, enable_gqa, dropout_p, return_lse, backend
        )
    diagnose(query, key, value, "dense", enable_gqa)
    key, value = share_batch(query, key, value)
    functions = Functions(capture_score_mod(score_mod, query, key, value), _capture_block_mask(block_mask))
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

        return compiled.varlen_attention(
            query, key, value, cu_seqlens_q, cu_seqlens_k, score_mod, mask_mod, is_causal, scale, enable_gqa, dropout_p, return_lse, backend
        )
    functions = Functions(capture_score_mod(score_mod, query, key, value), capture_mask_mod(mask_mod))
    operands = operands_of(functions, None, dropout_p, query, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return run(
        Call(
            query, key, value, None, "varlen", functions, operands, None, is_causal, scale, enable_gqa, return_lse, backend
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

        return compiled.paged_attention(
            query, key_pages, value_pages, page_table, seq_lens, score_mod, mask_mod, is_causal, scale, enable_gqa, return_lse, backend
        )
    functions = Functions(capture_score_mod(score_mod, query, key_pages, value_pages), capture_mask_mod(mask_mod))
    operands = operands_of(functions, None, 0.0, query, page_table=page_table, seq_lens=seq_lens)
    return run(
        Call(
            query, key_pages, value_pages, None, "paged", functions, operands, None, is_causal, scale, enable_gqa, return_lse, backend
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


Flags = tuple[bool, bool, bool, str | None, bool | None, bool]
"""is_causal, enable_gqa, return_lse, backend, strict, or_torch."""
Dense = tuple[Callable[..., Any] | None, Callable[[], object], float]
"""The plan's ``run`` (None: torch keeps the call), the counter of its Route, and the default scale."""


def dense_plan(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, flags: Flags) -> Dense:
    """The plan for a dense call without user functions: one dictionary look-up after checking shapes.

    The whole budget of a call is 3 us, so what is read here is what a Problem depends on and no more. A key
    on another device than the query is left for ``run`` to refuse; :func:`diagnose` then finds the words.
    """
    try:
        batch, heads, _, size = query.shape
        key_batch, key_heads, length, key_size = key.shape
        value_batch, value_heads, value_length, value_size = value.shape
    except (ValueError, AttributeError):
        raise InvalidProblem(attention_fault(query, key, value, "dense", flags[1])) from None
    if batch != key_batch or batch != value_batch or length != value_length or size != key_size or key_heads != value_heads:
        diagnose(query, key, value, "dense", flags[1])
        if batch != key_batch:  # attention() has shared a batch of 1 already; torch broadcasts in its own way
            raise InvalidProblem(f"query has batch size {batch} and key {key_batch}; they must be equal here")
    if attn_mask is None:
        mask_kind: object = None
    else:
        fault = mask_fault(attn_mask, query, key)
        if fault:
            raise InvalidProblem(fault)
        mask_kind = (attn_mask.dtype, attn_mask.requires_grad)
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad, mask_kind)
    cache_key = (
        flags, query.dtype, key.dtype, value.dtype, query.device, heads, key_heads, size, value_size, mask_kind, grad,
        scope.current.state,
    )  # fmt: skip
    dense = _plans.get(cache_key)
    if dense is None:
        is_causal, enable_gqa, return_lse, backend, strict, or_torch = flags
        call = Call(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa, return_lse=return_lse,
                    backend=backend, strict=strict, or_torch=or_torch)  # fmt: skip
        selected = choose(call)
        dense = _plans[cache_key] = (selected.run, selected.record, size**-0.5)
    return dense


def diagnose(query: Tensor, key: Tensor, value: Tensor, layout: str, enable_gqa: bool) -> None:
    """Raise InvalidProblem if something is wrong with the main tensors of a call."""
    fault = attention_fault(query, key, value, layout, enable_gqa)
    if fault:
        raise InvalidProblem(fault)


# ---------------------------------------------------------------------------- every other call


def share_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value of batch size 1 as views of the query's batch size; others unchanged, to be diagnosed."""
    if query.dim() == key.dim() == value.dim() == 4 and key.shape[0] == value.shape[0] == 1:
        batch = query.shape[0]
        return key.expand(batch, -1, -1, -1), value.expand(batch, -1, -1, -1)
    return key, value


def choose(call: Call) -> Selected:
    """The selection for a call of any layout."""
    return select(build_problem(call), call.backend, strict=call.strict, or_torch=call.or_torch)


def run(call: Call) -> Tensor | tuple[Tensor, Tensor]:
    """Serve a call of any layout: directly, or through an operator when the tensors are being traced."""
    selected = choose(call)
    selected.record()
    assert selected.plan is not None
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
    if is_traced(call.query) and not selected.plan.traceable:
        from torchhal import ops_families

        return ops_families.attention(selected.route, call, scale)
    return run_plan(selected.plan, call, scale)


def run_plan(plan: Plan, call: Call, scale: float) -> Tensor | tuple[Tensor, Tensor]:
    return plan.run(call.query, call.key, call.value, call.attn_mask, scale, call.operands)  # type: ignore[no-any-return]


def build_problem(call: Call) -> AttentionProblem:
    """The Problem of a call, checked.

    Raises:
        InvalidProblem: the call means nothing on any backend.
    """
    query, key, value = call.query, call.key, call.value
    fault = attention_fault(query, key, value, call.layout, call.enable_gqa)
    if not fault and call.attn_mask is not None:
        fault = mask_fault(call.attn_mask, query, key)
    if fault:
        raise InvalidProblem(fault)
    operands = call.operands or AttentionOperands()
    if call.layout == "varlen":
        check_varlen(query, key, operands)
    if call.layout == "paged":
        check_paged(query, key, operands)
    heads = 1 if call.layout != "varlen" else -2
    score, mask = call.functions
    return AttentionProblem(
        device=query.device,
        features=frozenset(_features(call, operands)),
        layout=call.layout,
        query_dtype=query.dtype,
        key_dtype=key.dtype,
        value_dtype=value.dtype,
        query_heads=int(query.shape[heads]),
        key_heads=int(key.shape[heads]),
        head_size=int(query.shape[-1]),
        value_head_size=int(value.shape[-1]),
        is_causal=call.is_causal,
        return_lse=call.return_lse,
        mask_dtype=None if call.attn_mask is None else call.attn_mask.dtype,
        score_mod=None if score is None else score.graph,
        mask_mod=None if mask is None else mask.graph,
        block_size=call.block_size,
        page_size=int(key.shape[2]) if call.layout == "paged" else None,
        dropout=operands.dropout_p > 0.0,
    )


def _features(call: Call, operands: AttentionOperands) -> list[str]:
    query, key, value, mask = call.query, call.key, call.value, call.attn_mask
    heads = 1 if call.layout != "varlen" else -2
    captured = (*operands.captured, *operands.mask_captured)
    grad = torch.is_grad_enabled()
    asked = {
        "causal": call.is_causal,
        "boolean_mask": mask is not None and mask.dtype is torch.bool,
        "additive_mask": mask is not None and mask.dtype is not torch.bool,
        "gqa": query.shape[heads] != key.shape[heads],
        "value_head_size": query.shape[-1] != value.shape[-1],
        "lse": call.return_lse,
        "score_mod": call.functions.score_mod is not None,
        "mask_mod": call.functions.mask_mod is not None or call.block_size is not None,
        "captured_tensors": bool(captured),
        "dropout": operands.dropout_p > 0.0,
        "mixed_dtypes": not query.dtype == key.dtype == value.dtype,
        "backward": grad and any(t.requires_grad for t in (query, key, value)),
        "mask_gradient": grad and mask is not None and mask.requires_grad,
        "captured_gradient": grad and any(t.requires_grad for t in captured),
    }
    return [name for name, wanted in asked.items() if wanted]


# ---------------------------------------------------------------------------- user functions and block masks


def capture_score_mod(score_mod: ScoreMod | None, *tensors: Tensor) -> Captured | None:
    if score_mod is None:
        return None
    return capture_cached(score_mod, (("score", score_dtype(*(t.dtype for t in tensors))), *INDICES), what="score_mod")


def capture_mask_mod(mask_mod: MaskMod | None) -> Captured | None:
    return None if mask_mod is None else capture_cached(mask_mod, INDICES, what="mask_mod")


def _capture_block_mask(block_mask: BlockMask | None) -> Captured | None:
    if block_mask is None:
        return None
    if not isinstance(block_mask, BlockMask):
        hint = "build one with torch.nn.attention.flex_attention.create_block_mask, or pass a tensor as attn_mask"
        raise InvalidProblem(f"block_mask expects a BlockMask and got {type(block_mask).__name__}; {hint}")
    return capture_mask_mod(block_mask.mask_mod)


def block_size_of(block_mask: BlockMask, query: Tensor, key: Tensor) -> tuple[int, int]:
    """The mask's block sizes, once its lengths are known to be those of the call."""
    lengths = (query.shape[2], key.shape[2])
    if tuple(block_mask.seq_lengths) != lengths:
        asked, made = f"{lengths[0]} queries and {lengths[1]} keys", tuple(block_mask.seq_lengths)
        raise InvalidProblem(f"block_mask was made for {made[0]} queries and {made[1]} keys, and the call has {asked}; make one for these lengths")
    rows, columns = block_mask.BLOCK_SIZE
    return rows, columns


def operands_of(
    functions: Functions, block_mask: BlockMask | None, dropout_p: float, query: Tensor, **layout: Tensor | None
) -> AttentionOperands:
    """Gather what a call carries beyond its main tensors."""
    if not 0.0 <= dropout_p <= 1.0:
        raise InvalidProblem(f"dropout_p expects a probability between 0 and 1 and got {dropout_p}")
    score, mask = functions
    blocks: dict[str, Any] = {}
    if block_mask is not None:
        names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
        blocks = {name: getattr(block_mask, name) for name in names}
    seed = torch.randint(2**62, (), dtype=torch.int64, device=query.device) if dropout_p > 0.0 else None
    return AttentionOperands(
        captured=() if score is None else tuple(score.tensors),
        mask_captured=() if mask is None else tuple(mask.tensors),
        dropout_p=dropout_p,
        seed=seed,
        **blocks,
        **layout,
    )


def _context_parallel(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    from torchhal.context_parallel import AttentionArguments

    return scope.active_context_parallel().attention(AttentionArguments(*arguments))  # type: ignore[no-any-return]
