"""What is wrong with an attention call, in words: expected, arrived, what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands

_SHAPES = {
    "dense": (4, "query (B, Hq, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev)"),
    "varlen": (3, "query (T, Hq, E), key (Tk, Hkv, E), value (Tk, Hkv, Ev)"),
    "paged": (
        4,
        "query (B, Hq, L, E), key_pages (P, Hkv, page_size, E), value_pages (P, Hkv, page_size, Ev)",
    ),
}
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = (torch.int8, torch.float8_e4m3fn)
"""Types that keys and values in pages may be stored in, with a scale."""


def attention_fault(query: Tensor, key: Tensor, value: Tensor, layout: str, enable_gqa: bool) -> str:
    """The first thing wrong with the main tensors, or an empty string."""
    return (
        _kind_fault(query, key, value, layout)
        or _rank_fault(query, key, value, layout)
        or _type_fault(query, key, value, layout)
        or _size_fault(query, key, value, layout)
        or _head_fault(query, key, layout, enable_gqa)
    )


def _kind_fault(query: Tensor, key: Tensor, value: Tensor, layout: str) -> str:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            return f"{name} expects a tensor and got {type(tensor).__name__}"
        fault = storage_fault(name, tensor)
        if fault and tensor.is_nested and layout == "dense":
            return f"{fault}, or make query, key and value nested tensors of layout torch.jagged"
        if fault:
            return fault
    return ""


def storage_fault(name: str, tensor: Tensor) -> str:
    """Why a tensor has no plain shape and strides, or an empty string; every other check may read both."""
    if tensor.is_nested:
        advice = "convert it with torch.nested.to_padded_tensor"
        return f"{name} expects a dense tensor and is nested ({tensor.layout}); {advice}"
    if tensor.layout is not torch.strided:
        return (
            f"{name} expects a dense tensor and has the layout {tensor.layout}; convert it with .to_dense()"
        )
    return ""


def _rank_fault(query: Tensor, key: Tensor, value: Tensor, layout: str) -> str:
    rank, shapes = _SHAPES[layout]
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != rank:
            advice = "; add the missing dimensions with unsqueeze" if tensor.dim() < rank else ""
            return f"{layout} attention expects {shapes}, and {name} has {tensor.dim()} dimensions: {_shape(tensor)}{advice}"
    return ""


def _type_fault(query: Tensor, key: Tensor, value: Tensor, layout: str) -> str:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        quantized = layout == "paged" and name != "query" and tensor.dtype in QUANTIZED
        if tensor.dtype not in FLOATING and not quantized:
            known = ", ".join(str(t) for t in FLOATING)
            return (
                f"{name} expects a floating type ({known}) and has {tensor.dtype}; convert it with .to(...)"
            )
        if tensor.device != query.device:
            return f"query is on {query.device} and {name} on {tensor.device}; move them to one device"
    return ""


def _size_fault(query: Tensor, key: Tensor, value: Tensor, layout: str) -> str:
    if query.shape[-1] != key.shape[-1]:
        return f"query and key need the same head size, the last dimension, and have {query.shape[-1]} and {key.shape[-1]}"
    if query.shape[-1] == 0:
        return f"query has head size 0: {_shape(query)}; a score needs at least one element"
    if key.shape[:-1] != value.shape[:-1]:
        return f"key and value may differ in their last dimension alone, and are {_shape(key)} and {_shape(value)}"
    if layout == "dense" and key.shape[0] != query.shape[0] and key.shape[0] != 1:
        return f"query has batch size {query.shape[0]} and key {key.shape[0]}; they must be equal, or the key's 1"
    return ""


def _head_fault(query: Tensor, key: Tensor, layout: str, enable_gqa: bool) -> str:
    heads = -2 if layout == "varlen" else 1
    query_heads, key_heads = query.shape[heads], key.shape[heads]
    if query_heads == key_heads:
        return ""
    if not enable_gqa:
        return f"query has {query_heads} heads and key {key_heads}; pass enable_gqa=True if each key head serves several query heads"
    if key_heads == 0 or query_heads % key_heads:
        return f"enable_gqa needs query heads in whole groups for each key head, and there are {query_heads} over {key_heads}"
    return ""


def mask_fault(mask: Tensor, query: Tensor, key: Tensor) -> str:
    """The first thing wrong with ``attn_mask``, or an empty string."""
    if not isinstance(mask, Tensor):
        return f"attn_mask expects a tensor and got {type(mask).__name__}; a BlockMask goes to block_mask="
    fault = storage_fault("attn_mask", mask)
    if fault:
        return fault
    if mask.dtype is not torch.bool and mask.dtype not in FLOATING:
        return f"attn_mask expects bool (True takes part) or a floating type (added to the scores) and has {mask.dtype}"
    if mask.device != query.device:
        return f"query is on {query.device} and attn_mask on {mask.device}; move them to one device"
    full = (*query.shape[:3], key.shape[2])
    fits = mask.dim() <= 4 and all(
        m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False)
    )
    if not fits:
        return f"attn_mask must broadcast to (B, Hq, L, S) = {tuple(full)} and is {_shape(mask)}"
    return ""


def check_varlen(query: Tensor, key: Tensor, operands: AttentionOperands) -> None:
    """Ranks, types and sizes of the cumulative lengths; their content is data, and the backend's to check."""
    lengths = (("cu_seqlens_q", operands.cu_seqlens_q), ("cu_seqlens_k", operands.cu_seqlens_k))
    for name, tensor in lengths:
        _check_index_tensor(name, tensor, query, 1, "(B + 1,)")
        if tensor is not None and tensor.shape[0] < 1:
            raise InvalidProblem(
                f"{name} expects B + 1 cumulative lengths, at least the leading 0, and is empty"
            )
    first, second = (t.shape[0] for _, t in lengths if t is not None)
    if first != second:
        raise InvalidProblem(
            f"cu_seqlens_q and cu_seqlens_k count the same sequences, and have {first} and {second} entries"
        )


def check_paged(query: Tensor, key: Tensor, value: Tensor, operands: AttentionOperands) -> None:
    """Ranks, types and sizes of page table, lengths and scales; their content is data, and the backend's to check."""
    _check_index_tensor("page_table", operands.page_table, query, 2, "(B, max_pages)")
    _check_index_tensor("seq_lens", operands.seq_lens, query, 1, "(B,)")
    for name, tensor in (("page_table", operands.page_table), ("seq_lens", operands.seq_lens)):
        if tensor is not None and tensor.shape[0] != query.shape[0]:
            raise InvalidProblem(
                f"query has batch size {query.shape[0]} and {name} {tensor.shape[0]}; each sequence needs one row"
            )
    if key.shape[2] == 0:
        raise InvalidProblem(
            f"key_pages has a page size of 0: {_shape(key)}; a page holds at least one token"
        )
    fault = (
        _scale_fault("key", key, operands.key_scale)
        or _scale_fault("value", value, operands.value_scale)
        or _pages_fault(key, value)
    )
    if fault:
        raise InvalidProblem(fault)


def _scale_fault(name: str, pages: Tensor, scale: Tensor | None) -> str:
    """The first thing wrong with a scale, or with pages that need one, or an empty string."""
    label, known = f"{name}_scale", " or ".join(str(t) for t in QUANTIZED)
    heads, page_size = pages.shape[1:3]
    shapes = (
        f"({heads},), one for each head, or {(pages.shape[0], heads, page_size)}, one for each token and head"
    )
    if pages.dtype not in QUANTIZED:
        advice = f"leave it out, or quantise the pages to {known}"
        return "" if scale is None else f"{label} is given and {name}_pages is {pages.dtype}; {advice}"
    if scale is None:
        return f"{name}_pages is {pages.dtype} and has no scale; pass {label}, float32 of shape {shapes}"
    if not isinstance(scale, Tensor):
        return f"{label} expects a float32 tensor of shape {shapes}, and got {type(scale).__name__}"
    fault = storage_fault(label, scale)
    if fault:
        return fault
    if scale.dtype is not torch.float32 or _shape(scale) not in (
        (heads,),
        (pages.shape[0], heads, page_size),
    ):
        return f"{label} expects float32 of shape {shapes}, and is {scale.dtype} {_shape(scale)}"
    if scale.device != pages.device:
        return f"{name}_pages is on {pages.device} and {label} on {scale.device}; move them to one device"
    for part, tensor in ((f"{name}_pages", pages), (label, scale)):
        if tensor.requires_grad and torch.is_grad_enabled():
            return f"{part} requires grad and no gradient reaches quantised pages; pass {part}.detach()"
    return ""


def _pages_fault(key: Tensor, value: Tensor) -> str:
    if key.dtype is value.dtype or not {key.dtype, value.dtype} & set(QUANTIZED):
        return ""
    return f"key_pages is {key.dtype} and value_pages {value.dtype}; quantise both, to one type, or neither"


def _check_index_tensor(name: str, tensor: Tensor | None, query: Tensor, rank: int, shape: str) -> None:
    if not isinstance(tensor, Tensor):
        raise InvalidProblem(f"{name} expects an int32 tensor {shape} and got {type(tensor).__name__}")
    if tensor.dim() != rank or tensor.dtype is not torch.int32:
        raise InvalidProblem(
            f"{name} expects an int32 tensor {shape} and got {tensor.dtype} {_shape(tensor)}; convert it with .to(torch.int32)"
        )
    if tensor.device != query.device:
        raise InvalidProblem(
            f"query is on {query.device} and {name} on {tensor.device}; move them to one device"
        )


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
