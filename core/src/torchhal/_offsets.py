"""Rewrites the masks and functions of attention over a whole sequence for one rank's rows and some keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchhal.errors import InvalidProblem


@dataclass(frozen=True, eq=False)
class Located:
    """An ordinary attention call that equals part of one over the whole sequence."""

    query: Tensor
    score_mod: Callable[..., Any] | None
    block_mask: Any
    attn_mask: Tensor | None
    is_causal: bool
    padding: int
    """Rows put before this rank's, so that a BlockMask's blocks begin where its own do."""

    def own_rows(self, result: Any) -> Any:
        """``out`` or ``(out, lse)`` without the padding."""
        if not self.padding:
            return result
        if isinstance(result, tuple):
            out, lse = result
            return out[:, :, self.padding :], lse[:, :, self.padding :]
        return result[:, :, self.padding :]


def locate(
    query: Tensor,
    key: Tensor,
    *,
    query_offset: int,
    key_offset: int,
    score_mod: Callable[..., Any] | None,
    block_mask: Any,
    attn_mask: Tensor | None,
    is_causal: bool,
) -> Located:
    """The local call for query rows from ``query_offset`` on and keys from ``key_offset`` on.

    A causal call whose diagonal does not begin at the corner becomes a boolean mask of L x S bytes, which every
    backend that takes masks serves; a diagonal that passes above all keys needs none.
    """
    rows, columns = query.shape[2], key.shape[2]
    mask = _columns(attn_mask, key_offset, columns)
    if is_causal and query_offset != key_offset:
        is_causal = False
        if query_offset < key_offset + columns - 1:
            mask = _combine(mask, causal_mask(rows, columns, query_offset - key_offset, query.device))
    padding = 0
    if block_mask is not None:
        padding = query_offset % block_mask.BLOCK_SIZE[0]
        block_mask = _block_rows(block_mask, query_offset - padding, rows + padding, key_offset, columns)
        query, mask = pad(query, (0, 0, padding, 0)), _pad_rows(mask, padding)
    first = query_offset - padding
    if score_mod is not None:
        score_mod = _shift_score(score_mod, first, key_offset, query.device)
    return Located(query, score_mod, block_mask, mask, is_causal, padding)


# ---------------------------------------------------------------------------- masks


def causal_mask(rows: int, columns: int, diagonal: int, device: torch.device) -> Tensor:
    """(rows, columns) bool, True where ``column <= row + diagonal``."""
    row = torch.arange(rows, device=device).unsqueeze(1)
    return torch.arange(columns, device=device) <= row + diagonal


def _combine(mask: Tensor | None, visible: Tensor) -> Tensor:
    if mask is None:
        return visible
    if mask.dtype == torch.bool:
        return mask & visible
    return mask.masked_fill(~visible, float("-inf"))


def _columns(mask: Tensor | None, offset: int, columns: int) -> Tensor | None:
    if mask is None or mask.dim() == 0 or mask.shape[-1] == 1:
        return mask
    return mask.narrow(-1, offset, columns)


def _pad_rows(mask: Tensor | None, padding: int) -> Tensor | None:
    if mask is None or not padding or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    return torch.cat((mask.new_zeros((*mask.shape[:-2], padding, mask.shape[-1])), mask), dim=-2)


def _block_rows(mask: Any, first: int, rows: int, key_offset: int, columns: int) -> Any:
    """The BlockMask of ``rows`` rows from ``first``, a multiple of its block size, and all of its keys."""
    from torch.nn.attention.flex_attention import BlockMask

    if key_offset or columns != mask.seq_lengths[1]:
        raise InvalidProblem(
            f"a BlockMask over {mask.seq_lengths[1]} keys can not be applied to keys {key_offset} to "
            f"{key_offset + columns} alone; a scheme has to give LocalAttention all keys when block_mask is set"
        )
    block = mask.BLOCK_SIZE[0]
    taken = slice(first // block, first // block + -(-rows // block))
    full = mask.full_kv_num_blocks is not None
    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks[:, :, taken],
        mask.kv_indices[:, :, taken],
        mask.full_kv_num_blocks[:, :, taken] if full else None,
        mask.full_kv_indices[:, :, taken] if full else None,
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=_shift_mask(mask.mask_mod, first, mask.kv_indices.device),
        seq_lengths=(rows, columns),
        compute_q_blocks=mask.q_indices is not None,
    )


# ---------------------------------------------------------------------------- functions


def _position(offset: int, device: torch.device) -> Tensor:
    """An offset as a captured tensor: a number would make another graph, and another plan, for every length."""
    return torch.full((), offset, dtype=torch.int32, device=device)


def _shift_score(mod: Callable[..., Any], row: int, column: int, device: torch.device) -> Callable[..., Any]:
    if not row and not column:
        return mod
    first_row, first_column = _position(row, device), _position(column, device)

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mod(score, b, h, q_idx + first_row, kv_idx + first_column)

    return score_mod


def _shift_mask(mod: Callable[..., Any], row: int, device: torch.device) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import noop_mask

    if not row or mod is noop_mask:
        return mod
    first_row = _position(row, device)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mod(b, h, q_idx + first_row, kv_idx)

    return mask_mod
