"""Attention under torch.compile: what Dynamo traces, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchhal import nested, scope
from torchhal.attention_call import (
    Call,
    Functions,
    block_size_of,
    capture_mask_mod,
    capture_score_mod,
    operands_of,
    run,
    share_batch,
)
from torchhal.compiled.call import FAMILIES, Family, Numbers, describe, record
from torchhal.errors import InvalidProblem
from torchhal.mode_sdpa import Arguments, Settings, served_by_policy
from torchhal.ops import Description
from torchhal.ops_families import attention_shapes
from torchhal.pointwise import capture
from torchhal.reference.attention import score_dtype

_INDICES = [(torch.int32, False)] * 4


def attention(
    query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: BlockMask | None, attn_mask: Tensor | None,
    is_causal: bool, scale: float | None, enable_gqa: bool, dropout_p: float, return_lse: bool,
    return_max_scores: bool, backend: str | None,
) -> Any:  # fmt: skip
    """The traced form of :func:`torchhal.attention`."""
    if query.is_nested:
        packed = nested.unpack(query, key, value, attn_mask, block_mask)
        result = varlen_attention(
            *packed,
            score_mod,
            None,
            is_causal,
            scale,
            enable_gqa,
            dropout_p,
            return_lse,
            return_max_scores,
            backend,
        )
        return nested.repack(result, query)
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    block_size, mask_mod = None, None
    if block_mask is not None:
        block_size, mask_mod = block_size_of(block_mask, query, key), block_mask.mask_mod
        for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
            blocks = getattr(block_mask, name)
            if blocks is not None:
                tensors[name] = blocks
    return _record(
        "dense",
        tensors,
        score_mod,
        mask_mod,
        is_causal,
        scale,
        enable_gqa,
        dropout_p,
        return_lse,
        return_max_scores,
        backend,
        block_size,
    )


def scaled_dot_product_attention(settings: Settings, given: Arguments) -> Any:
    """Torch's own attention under the mode; whether torch keeps it is decided when the node is run."""
    query, key, value, attn_mask, _, is_causal, scale, enable_gqa = given
    tensors = {"query": query, "key": key, "value": value}
    if attn_mask is not None:
        tensors["attn_mask"] = attn_mask
    return _record(
        "dense", tensors, None, None, is_causal, scale, enable_gqa, 0.0, False, False, settings.backend, None, True,
        settings.strict,
    )  # fmt: skip


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, score_mod: Any, mask_mod: Any,
    is_causal: bool, scale: float | None, enable_gqa: bool, dropout_p: float, return_lse: bool,
    return_max_scores: bool, backend: str | None,
) -> Any:  # fmt: skip
    """The traced form of :func:`torchhal.varlen_attention`."""
    tensors = {
        "query": query,
        "key": key,
        "value": value,
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
    }
    return _record(
        "varlen",
        tensors,
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


def paged_attention(
    query: Tensor, key_pages: Tensor, value_pages: Tensor, page_table: Tensor, seq_lens: Tensor, key_scale: Tensor | None,
    value_scale: Tensor | None, score_mod: Any, mask_mod: Any, is_causal: bool, scale: float | None, enable_gqa: bool,
    return_lse: bool,
    return_max_scores: bool, backend: str | None,
) -> Any:  # fmt: skip
    """The traced form of :func:`torchhal.paged_attention`."""
    tensors = {
        "query": query,
        "key": key_pages,
        "value": value_pages,
        "page_table": page_table,
        "seq_lens": seq_lens,
    }
    if key_scale is not None:
        tensors["key_scale"] = key_scale
    if value_scale is not None:
        tensors["value_scale"] = value_scale
    return _record(
        "paged",
        tensors,
        score_mod,
        mask_mod,
        is_causal,
        scale,
        enable_gqa,
        0.0,
        return_lse,
        return_max_scores,
        backend,
    )


def _record(
    layout: str, tensors: dict[str, Tensor], score_mod: Any, mask_mod: Any, is_causal: bool, scale: float | None,
    enable_gqa: bool, dropout_p: float, return_lse: bool,
    return_max_scores: bool, backend: str | None,
    block_size: tuple[int, int] | None = None, or_torch: bool = False, strict: bool | None = None,
) -> Any:  # fmt: skip
    functions = []
    if score_mod is not None:
        functions.append(
            (
                score_mod,
                [
                    (score_dtype(*[tensors[name].dtype for name in ("query", "key", "value")]), False),
                    *_INDICES,
                ],
            )
        )
    if mask_mod is not None:
        functions.append((mask_mod, _INDICES))
    state = scope.current.state  # read here so that Dynamo guards on it
    call = describe(
        family="attention", layout=layout, tensors=list(tensors), has_score_mod=score_mod is not None,
        has_mask_mod=mask_mod is not None, is_causal=is_causal, enable_gqa=enable_gqa,
        return_lse=return_lse, return_max_scores=return_max_scores, backend=backend, or_torch=or_torch, strict=strict,
        scoped=None if state is scope.current else state.backend,
    )  # fmt: skip
    # A symbolic scale that a function closes over too would be lifted into the body under this node's feet.
    own_scale = None if scale is None else scale * 1.0
    results = record(call, (own_scale, block_size, dropout_p), list(tensors.values()), functions)
    return tuple(results) if len(results) > 1 else results[0]


def _shapes(
    call: Description, tensors: Sequence[Tensor], outputs: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    named = dict(zip(call["tensors"], tensors, strict=True))
    return attention_shapes(
        named["query"], named["key"], named["value"], call["return_lse"] + call["return_max_scores"]
    )


def _run(
    call: Description, numbers: Numbers, tensors: Sequence[Tensor], functions: Sequence[Callable[..., Any]]
) -> Sequence[Tensor]:
    scale, block_size, dropout_p = numbers
    named = dict(zip(call["tensors"], tensors, strict=True))
    query, key, value, attn_mask = (named.pop(name, None) for name in ("query", "key", "value", "attn_mask"))
    if query is None or key is None or value is None:
        raise InvalidProblem("an attention call needs query, key and value")
    if call["or_torch"]:
        given = Arguments(query, key, value, attn_mask, 0.0, call["is_causal"], scale, call["enable_gqa"])
        served = served_by_policy(Settings(call["backend"], call["strict"]), given)
        return (given.torchs_own() if served is None else served,)
    if call["layout"] == "dense":
        key, value = share_batch(query, key, value)
    captured = _capture(call, (query, key, value), functions)
    operands = operands_of(captured, None, float(dropout_p), query, **named)
    result = run(
        Call(
            query,
            key,
            value,
            attn_mask,
            call["layout"],
            captured,
            operands,
            None if block_size is None else (int(block_size[0]), int(block_size[1])),
            call["is_causal"],
            scale,
            call["enable_gqa"],
            call["return_lse"],
            call["return_max_scores"],
            call["backend"],
        )
    )
    return result if isinstance(result, tuple) else (result,)


def _capture(call: Description, main: Sequence[Tensor], functions: Sequence[Callable[..., Any]]) -> Functions:
    pending = iter(functions)
    score = capture_score_mod(next(pending), *main, capture=capture) if call["has_score_mod"] else None
    mask = capture_mask_mod(next(pending), capture=capture) if call["has_mask_mod"] else None
    return Functions(score, mask)


FAMILIES["attention"] = Family(_shapes, _run)
