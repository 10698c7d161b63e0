"""The arguments of the portable kernels: how tensors and numbers of a call are told to Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.portable.shapes import Shape
from torchhal.problems import AttentionProblem


def describable(*tensors: Tensor) -> bool:
    """Whether tensor descriptors can be made: rows that are contiguous, and everything at multiples of 16 bytes.

    A stride of 0 is no step that a descriptor can take.
    """
    return all(
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(s > 0 and s * tensor.element_size() % 16 == 0 for s in tensor.stride()[:-1])
        for tensor in tensors
    )


def check_cover(indices: Tensor, rows: int, shape: Shape, positions: int) -> None:
    """Refuse a BlockMask that is not for these sequences, heads and query positions.

    Raises:
        InvalidProblem: says for how many it has to be, and is.
    """
    masks, heads, blocks = indices.shape[:3]
    if positions > blocks * rows:
        covers = f"{blocks} blocks of {rows} rows"
        raise InvalidProblem(f"the BlockMask must cover every query position, {positions}; it has {covers}")
    if masks not in (1, shape.batch) or heads not in (1, shape.heads):
        expected = f"1 or {shape.batch} sequences and 1 or {shape.heads} query heads"
        raise InvalidProblem(f"the BlockMask must be for {expected}; it is for {masks} and {heads}")


def mask_argument(mask: Tensor | None, disguised: bool) -> Any:
    """The pointer of ``attn_mask`` and its strides along (B, Hq, L, S), 0 where it broadcasts.

    Triton compiles one kernel for a stride of 1 or a multiple of 16 and another for the rest, and lays float32 sums out
    over threads as the loads of the mask are: the same mask with other strides would give other last bits. Disguised as
    odd numbers, strides are all alike.
    """
    if mask is None:
        return None
    mask = mask.view(torch.uint8) if mask.dtype is torch.bool else mask
    mask = mask[(None,) * (4 - mask.dim())]
    steps = [0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    return (mask, *(2 * step + 3 if disguised else step for step in steps))


def block_list(counts: Tensor, indices: Tensor) -> tuple[Any, ...]:
    """Strides and pointers of one list of blocks; those of a dimension of size 1 are 0."""
    lists = []
    for tensor, kept in ((counts, 3), (indices, 4)):
        steps = [s if size > 1 else 0 for size, s in zip(tensor.shape[:2], tensor.stride()[:2], strict=True)]
        lists += [*steps, *tensor.stride()[2:kept], tensor]
    return tuple(lists)


def mask_kind(problem: AttentionProblem) -> str | None:
    """``boolean`` or ``additive``; None without a mask."""
    if problem.mask_dtype is None:
        return None
    return "boolean" if problem.mask_dtype is torch.bool else "additive"


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Along (B or page, H, L or slot, E); those of packed tensors (T, H, E) have no batch."""
    if tensor.dim() == 4:
        return tensor.stride()
    token, head, element = tensor.stride()
    return 0, head, token, element


def row_strides(lse: Tensor) -> tuple[int, ...]:
    """Those of an LSE along (B, H, L); all 0 of the stand-in for one that is not asked for."""
    if lse.dim() == 3:
        return lse.stride()
    if lse.dim() == 1:
        return 0, 0, 0
    token, head = lse.stride()
    return 0, head, token


def dropout_argument(operands: AttentionOperands) -> Any:
    """The seed and the word below which a probability is dropped."""
    if operands.dropout_p == 0.0:
        return None
    if operands.seed is None:
        raise InvalidProblem("attention with dropout needs a seed, a 0-dim int64 tensor, and there is none")
    return operands.seed, round(operands.dropout_p * 2**32)


def kept_factor(operands: AttentionOperands) -> float:
    """What weights are multiplied by that dropout keeps."""
    return 1.0 / (1.0 - operands.dropout_p) if operands.dropout_p < 1.0 else 1.0


def ordered_lists(table: Tensor) -> tuple[Tensor, Tensor]:
    """Counts (B, H, R) and indices (B, H, R, C), int32, of what is True in each row of a table (B, H, R, C)."""
    indices = table.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), indices.to(torch.int32)
