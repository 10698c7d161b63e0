"""Which pairs of query and key the masks of an attention call leave visible."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.pointwise import evaluate
from torchhal.problems import AttentionProblem
from torchhal.reference.layouts import Piece


@dataclass(frozen=True)
class Grid:
    """Indices of every pair, int32, each along its own dimension of (B, Hq, L, S)."""

    b: Tensor
    h: Tensor
    q: Tensor
    k: Tensor

    @staticmethod
    def of(piece: Piece) -> Grid:
        batch, heads, rows, _ = piece.query.shape
        spans = ((piece.first_batch, batch), (0, heads), (piece.first_query, rows), (0, piece.key.shape[2]))
        return Grid(*(_axis(start, size, dim, piece.query.device) for dim, (start, size) in enumerate(spans)))


def _axis(start: int, size: int, dim: int, device: torch.device) -> Tensor:
    indices = torch.arange(start, start + size, dtype=torch.int32, device=device)
    return indices.view([-1 if d == dim else 1 for d in range(4)])


def visible_pairs(
    problem: AttentionProblem, piece: Piece, grid: Grid, operands: AttentionOperands
) -> Tensor | None:
    """Which pairs the masks leave; a floating ``attn_mask`` hides where it is -inf.

    Returns:
        Boolean, broadcastable to (B, Hq, L, S); None if there is no mask.

    Raises:
        InvalidProblem: a BlockMask without block size, or with too few rows of blocks for the queries.
    """
    masks: list[Tensor] = []
    if problem.is_causal:
        masks.append(grid.k <= grid.q)
    if piece.mask is not None:
        # Adding -inf would not hide a score of nan; that the mask is -inf does.
        masks.append(piece.mask != -torch.inf if piece.mask.is_floating_point() else piece.mask)
    blocks = _blocks(problem, piece, grid, operands)
    if blocks is not None:
        masks.append(blocks)
    elif problem.mask_mod is not None:
        masks.append(_mask_mod(problem, grid, operands, clamp=bool(masks)))
    return functools.reduce(operator.and_, masks) if masks else None


def _mask_mod(problem: AttentionProblem, grid: Grid, operands: AttentionOperands, clamp: bool) -> Tensor:
    assert problem.mask_mod is not None
    inputs = (grid.b, grid.h, grid.q, grid.k)
    (visible,) = evaluate(problem.mask_mod, inputs, operands.mask_captured, clamp_indices=clamp)
    return visible.to(torch.bool)


def _blocks(
    problem: AttentionProblem, piece: Piece, grid: Grid, operands: AttentionOperands
) -> Tensor | None:
    if operands.kv_num_blocks is None or operands.kv_indices is None:
        return None
    visible = _listed(operands.kv_num_blocks, operands.kv_indices, problem, piece, grid)
    if problem.mask_mod is not None:
        visible = visible & _mask_mod(problem, grid, operands, clamp=True)
    if operands.full_kv_num_blocks is not None and operands.full_kv_indices is not None:
        full = _listed(operands.full_kv_num_blocks, operands.full_kv_indices, problem, piece, grid)
        visible = visible | full
    return visible


def _listed(counts: Tensor, indices: Tensor, problem: AttentionProblem, piece: Piece, grid: Grid) -> Tensor:
    """Boolean (Bm, Hm, L, S): whether the pair's block is listed in a BlockMask's counts and indices."""
    if problem.block_size is None:
        raise InvalidProblem(
            "a BlockMask needs problem.block_size, (query rows, keys) of a block; it is None"
        )
    rows, columns = problem.block_size
    _check_cover(indices, rows, piece)
    if counts.shape[0] > 1:
        batch = slice(piece.first_batch, piece.first_batch + piece.query.shape[0])
        counts, indices = counts[batch], indices[batch]
    table = block_table(counts, indices, -(-piece.key.shape[2] // columns))
    query, key = grid.q.flatten(), grid.k.flatten()
    listed = table[:, :, query.clamp(min=0) // rows][..., key // columns]
    return listed & (grid.q >= 0)


def _check_cover(indices: Tensor, rows: int, piece: Piece) -> None:
    masks, heads, blocks = indices.shape[:3]
    batch, query_heads, queries, _ = piece.query.shape
    sequences, positions = piece.first_batch + batch, piece.first_query + queries
    if positions > blocks * rows:
        covers = f"{blocks} blocks of {rows} rows"
        raise InvalidProblem(f"the BlockMask must cover every query position, {positions}; it has {covers}")
    if (masks > 1 and sequences > masks) or heads not in (1, query_heads):
        expected = f"1 or {sequences} sequences and 1 or {query_heads} query heads"
        raise InvalidProblem(f"the BlockMask must be for {expected}; it is for {masks} and {heads}")


def block_table(counts: Tensor, indices: Tensor, columns: int) -> Tensor:
    """Boolean (Bm, Hm, query blocks, columns); entries past the count or past the keys mean nothing."""
    order = torch.arange(indices.shape[-1], device=indices.device)
    used = (order < counts.unsqueeze(-1)) & (indices >= 0) & (indices < columns)
    table = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    table = table.scatter(-1, torch.where(used, indices, columns).to(torch.int64), True)
    return table[..., :columns]
