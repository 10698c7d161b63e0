"""Attention over nested jagged tensors: the packed values of each, as one varlen call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchhal.attention_call import Call, Functions, capture_score_mod, operands_of, run
from torchhal.errors import InvalidProblem

_HOW = "make one with torch.nested.nested_tensor([...], layout=torch.jagged), each (length, H, E), and transpose(1, 2)"


def attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: Any, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None, enable_gqa: bool, dropout_p: float, return_lse: bool,
    return_max_scores: bool, backend: str | None,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    """Serve a call whose query is nested.

    Args:
        query, key, value: nested jagged tensors of logical shape (B, H, lengths, E), ragged in dimension 2; key
            and value share their lengths, which may differ from the query's.
        block_mask: has to be None: its blocks are for one common length.
        attn_mask: has to be None.
        score_mod, is_causal, scale, enable_gqa, dropout_p, return_lse, return_max_scores, backend: as in :func:`torchhal.attention`.

    Returns:
        Nested, ragged as the query: (B, H, lengths, Ev), and (B, H, lengths) for each of ``return_lse`` and ``return_max_scores``.

    Raises:
        InvalidProblem: a tensor is not nested in this way, or a mask of one common shape was given.
    """
    packed = unpack(query, key, value, attn_mask, block_mask)
    functions = Functions(capture_score_mod(score_mod, query, key, value))
    lengths = {"cu_seqlens_q": packed[3], "cu_seqlens_k": packed[4]}
    operands = operands_of(functions, None, dropout_p, packed[0], **lengths)
    call = Call(
        *packed[:3],
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
    return repack(run(call), query)  # type: ignore[no-any-return]


def unpack(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, block_mask: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Packed query, key and value, and the cumulative lengths of queries and keys as int32.

    Raises:
        InvalidProblem: a tensor is not nested jagged, or a mask of one common shape was given.
    """
    if attn_mask is not None:
        raise InvalidProblem(
            "attn_mask has one shape and nested sequences have many; say it as a mask_mod of torchhal.varlen_attention"
        )
    if block_mask is not None:
        raise InvalidProblem(
            "a BlockMask has blocks of one common length and nested sequences have many; "
            "pass its mask_mod to torchhal.varlen_attention"
        )
    packed_query, lengths_q = _packed("query", query)
    packed_key, lengths_k = _packed("key", key)
    packed_value, lengths_v = _packed("value", value)
    tracing = torch.compiler.is_compiling()  # whose lengths are symbols, equal where the sizes are
    if lengths_k is not lengths_v and not tracing and not torch.equal(lengths_k, lengths_v):
        raise InvalidProblem("key and value are nested with different lengths; each key needs its value")
    return packed_query, packed_key, packed_value, lengths_q.to(torch.int32), lengths_k.to(torch.int32)


def repack(result: Any, query: Tensor) -> Any:
    """Packed results ragged again as the query is."""
    if isinstance(result, tuple):
        return tuple(_nested(part, query) for part in result)
    return _nested(result, query)


def _packed(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Values (T, H, E) and offsets (B + 1,) of a nested tensor of logical shape (B, H, lengths, E)."""
    if not tensor.is_nested or tensor.layout is not torch.jagged:
        raise InvalidProblem(f"query is a nested jagged tensor, so {name} has to be one too; {_HOW}")
    if tensor.dim() != 4:
        raise InvalidProblem(
            f"{name} expects a nested tensor of 4 dimensions (B, H, lengths, E) and has {tensor.dim()}; {_HOW}"
        )
    by_token = tensor.transpose(1, 2)
    if getattr(by_token, "_ragged_idx", 1) != 1:
        raise InvalidProblem(f"{name} has to be ragged in dimension 2, the sequence; {_HOW}")
    if getattr(by_token, "_lengths", None) is not None:
        raise InvalidProblem(
            f"{name} is nested with gaps between its sequences; call .contiguous() on it first"
        )
    return by_token.values(), _offsets(by_token)


def _offsets(by_token: Any) -> Tensor:
    return by_token.offsets()  # type: ignore[no-any-return]


def _nested(values: Tensor, like: Tensor) -> Tensor:
    """Packed rows (T, H, ...) as a nested tensor (B, H, lengths, ...) ragged exactly as ``like``."""
    by_token = torch.nested.nested_tensor_from_jagged(values, _offsets(like.transpose(1, 2)))
    return by_token.transpose(1, 2)
