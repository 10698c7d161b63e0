"""What attention means: the executable specification of ``torchhal_attention``, in plain torch.

An element of quantised keys and values, in pages, is the stored number times its scale, in float32, or in float64 if the
query is that. Then, in this order, for each query row i and key j:

1. ``score = (query_i . key_j) * scale`` in float32, or in float64 if query, key or value is float64;
2. ``score_mod(score, b, h, q_idx, kv_idx)``, with ``h`` the *query* head and int32 indices;
3. a floating ``attn_mask`` is added to the score;
4. the key is hidden by ``is_causal`` (kv_idx > q_idx), by a boolean ``attn_mask`` or a ``mask_mod`` that is
   False, by a BlockMask that does not list the pair's block (``mask_mod`` has no say in its full blocks), by
   a floating ``attn_mask`` of -inf, and by a score of -inf;
5. ``lse = log(sum_j exp(score_j))`` and ``p_j = exp(score_j - lse)`` over the keys that are not hidden;
6. dropout keeps or drops ``p_j`` and divides by ``1 - dropout_p`` (:mod:`torchhal.reference.dropout`); a
   dropped key is not a hidden one;
7. ``out = sum_j p_j value_j`` with ``p`` unrounded, then one rounding to the query's dtype.

What a hidden key holds, NaN included, reaches neither the output nor a gradient. A row that sees no key has
output 0, LSE -inf and passes no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.pointwise import evaluate
from torchhal.problems import AttentionProblem, Plan
from torchhal.reference.dropout import dropout_keep
from torchhal.reference.layouts import Piece, has_data, paged_pieces, varlen_pieces
from torchhal.reference.products import pair_products, weighted_sum
from torchhal.reference.visibility import Grid, visible_pairs

Result = tuple[Tensor, ...]
"""Output and LSE."""

_ORDINARY_SCORE: Final = 0.5
"""What a score_mod sees in place of a hidden score: log, sqrt, acos, atanh and 1/x are all finite there, as
are their derivatives, so that nothing undefined arises where nothing is asked."""


def plan(problem: AttentionProblem) -> Plan:
    """The reference's answer to every attention problem: yes."""
    return Plan(
        run=functools.partial(attention, problem),
        description="plain torch",
        deterministic=True,
        # Packed and paged sequences are computed one by one. A dense batch is one batched product, for which torch
        # takes another kernel, with other bits, where it is a batch of one.
        batch_invariant=problem.layout != "dense",
        differentiable=True,
        workspace="O(L S)",
    )


def attention(
    problem: AttentionProblem,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    operands: AttentionOperands | None,
) -> Tensor | Result:
    """Attention in any layout; :func:`torchhal.hookspecs.torchhal_attention` has the arguments and shapes.

    Differentiable with respect to query, key, value, a floating mask and captured tensors, through the output
    and through the LSE; ``score_mod`` needs finite derivatives with respect to its captured tensors, even at
    hidden pairs. Each index starts at 0 in each sequence, ``b`` is the number of the sequence, and
    ``is_causal`` compares those indices: top-left alignment. In the paged layout the query rows are the
    newest tokens, so row i has ``q_idx = seq_lens - L + i`` and ``is_causal`` ends in the bottom-right
    corner; a row before position 0 sees no key under ``is_causal`` or a BlockMask. A BlockMask counts its
    blocks in the same indices.

    Returns:
        ``out``, of the query's shape with the value's head size and the query's dtype; or ``(out, lse)``,
        with ``lse`` (B, Hq, L), or (T, Hq) for varlen, in float32 (float64 if an input is float64); or both and, of the
        LSE's shape and type, the largest score of each row, which has no gradient.

    Raises:
        InvalidProblem: lengths, pages or blocks that contradict the shapes; says which.
    """
    if problem.layout not in ("dense", "varlen", "paged"):
        raise InvalidProblem(f"expected the layout dense, varlen or paged and got {problem.layout!r}")
    operands = operands or AttentionOperands()
    whole = Piece(query, key, value, attn_mask)
    if problem.layout == "dense":
        result = _attend(problem, whole, scale, operands)
    elif has_data(query):
        result = _sequence_by_sequence(problem, whole, scale, operands)
    else:
        result = _empty_results(problem, whole)
    return result if problem.return_lse else result[0]


def score_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The type of scores, probabilities and LSE for such inputs: float64 if any is that, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _sequence_by_sequence(
    problem: AttentionProblem, whole: Piece, scale: float, operands: AttentionOperands
) -> Result:
    packed = problem.layout == "varlen"
    pieces = varlen_pieces(whole, operands) if packed else paged_pieces(whole, operands)
    results = [_attend(problem, piece, scale, operands) for piece in pieces]
    if packed:
        results = [tuple(part.squeeze(0).transpose(0, 1) for part in parts) for parts in results]
    # The empty start gives a call without a single sequence its shape and type.
    empty = tuple(tensor[:0] for tensor in _empty_results(problem, whole))
    return tuple(torch.cat(parts) for parts in zip(empty, *results, strict=True))


def _empty_results(problem: AttentionProblem, whole: Piece) -> Result:
    """Uninitialised results: all there is to say where only shapes are known."""
    shape = whole.query.shape[:-1]
    dtype = score_dtype(whole.query.dtype, whole.key.dtype, whole.value.dtype)
    out = whole.query.new_empty((*shape, whole.value.shape[-1]))
    return out, *(whole.query.new_empty(shape, dtype=dtype) for _ in range(1 + problem.return_max_scores))


# ---------------------------------------------------------------------------- one piece


def _packed(tensor: Tensor) -> Tensor:
    """A copy in fresh memory: torch's products choose a kernel, and the last bit of a result, by strides and alignment."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _attend(problem: AttentionProblem, piece: Piece, scale: float, operands: AttentionOperands) -> Result:
    dtype = score_dtype(piece.query.dtype, piece.key.dtype, piece.value.dtype)
    query, key, value = (_packed(tensor.to(dtype)) for tensor in (piece.query, piece.key, piece.value))
    grid = Grid.of(piece)
    visible = visible_pairs(problem, piece, grid, operands)
    scores = _ungroup(pair_products(_group(query, key.shape[1]), key), query) * scale
    scores = _modified(problem, scores, visible, grid, operands)
    if piece.mask is not None and piece.mask.is_floating_point():
        scores = scores + piece.mask.to(dtype)
    if visible is not None:
        scores = torch.where(visible, scores, -torch.inf)
    sees_everything = visible is None and problem.score_mod is None
    counts = None if sees_everything else scores != -torch.inf
    weights, lse = _softmax(_packed(scores), counts)  # a mask's strides may have become theirs
    if problem.dropout:
        weights = _dropped(weights, grid, operands)
    groups = key.shape[1]
    grouped_counts = None if counts is None else _group(counts, groups)
    out = weighted_sum(_group(weights, groups), grouped_counts, value)
    results = _ungroup(out, query).to(piece.query.dtype), lse
    return (*results, _largest(scores.detach())) if problem.return_max_scores else results


def _largest(scores: Tensor) -> Tensor:
    """The largest score of each row, -inf where there is none."""
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)


def _group(tensor: Tensor, groups: int) -> Tensor:
    """(B, Hq, L, X) -> (B, Hkv, Hq / Hkv * L, X): the query heads that share a key head become rows of it."""
    batch, heads, rows, width = tensor.shape
    return tensor.reshape(batch, groups, heads // max(groups, 1) * rows, width)


def _ungroup(tensor: Tensor, query: Tensor) -> Tensor:
    """The inverse of :func:`_group`: (B, Hq, L, X), with the query's own L, which no division finds if Hq is 0."""
    return tensor.reshape(tensor.shape[0], *query.shape[1:3], tensor.shape[-1])


def _softmax(scores: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities over the last dimension and the logarithm of their sum; rows of -inf give 0 and -inf."""
    peak = _row_peak(scores.detach())
    exponentials = torch.exp(scores - peak)
    total = exponentials.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    weights = exponentials / total
    if counts is not None:
        # A NaN in the row makes every quotient NaN, and the keys it does not see must stay out of it.
        weights = torch.where(counts, weights, 0.0)
    lse = torch.where(empty, -torch.inf, peak + torch.log(total))
    return weights, lse.squeeze(-1)


def _row_peak(scores: Tensor) -> Tensor:
    """The largest score of each row, (..., 1); 0 where there is none, for ``-inf - -inf`` is not a number."""
    if scores.shape[-1] == 0:
        return scores.new_zeros((*scores.shape[:-1], 1))
    peak = scores.amax(-1, keepdim=True)
    return torch.where(peak == -torch.inf, 0.0, peak)


def _dropped(weights: Tensor, grid: Grid, operands: AttentionOperands) -> Tensor:
    if operands.seed is None:
        raise InvalidProblem("attention with dropout needs a seed, a 0-dim int64 tensor, and there is none")
    p = operands.dropout_p
    keep = dropout_keep(operands.seed, grid.b, grid.h, grid.q, grid.k, p)
    return torch.where(keep, weights / (1 - p) if p < 1 else weights, 0.0)


def _modified(
    problem: AttentionProblem, scores: Tensor, visible: Tensor | None, grid: Grid, operands: AttentionOperands
) -> Tensor:
    if problem.score_mod is None:
        return scores
    if visible is not None:
        scores = torch.where(visible, scores, _ORDINARY_SCORE)
    inputs = (scores, grid.b, grid.h, grid.q, grid.k)
    # Where a mask hides pairs, the mod may have no value for them: an index out of range is no mistake there.
    (modified,) = evaluate(problem.score_mod, inputs, operands.captured, clamp_indices=visible is not None)
    return modified.to(scores.dtype).expand_as(scores)


# ---------------------------------------------------------------------------- merging


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over a union of disjoint sets of keys, from the attention over each set.

    Args:
        outs: partial outputs, (..., Ev), all of one shape and dtype.
        lses: their natural-logarithm LSEs, (...). A part whose LSE is -inf in a row saw no key there and
            contributes nothing to it, whatever its output holds.

    Returns:
        The output, in the parts' dtype, rounded once, and the LSE, float32 (float64 for a float64 part);
        0 and -inf where every part's LSE is -inf. Differentiable with respect to outputs and LSEs.

    Raises:
        InvalidProblem: no parts, or shapes, dtypes or devices that do not belong together.
    """
    _check_lists(outs, lses)
    _check_parts(outs, lses)
    dtype = score_dtype(outs[0].dtype, *(lse.dtype for lse in lses))
    logs = torch.stack([lse.to(dtype) for lse in lses], -1)
    counts = logs != -torch.inf
    weights, lse = _softmax(logs, counts)
    parts = torch.stack([out.to(dtype) for out in outs], -2)
    # Not a matrix product: those may be rounded to tf32, and this is all that is left of the precision.
    out = (weights.unsqueeze(-1) * torch.where(counts.unsqueeze(-1), parts, 0.0)).sum(-2)
    return out.to(outs[0].dtype), lse


def _check_lists(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise InvalidProblem(
                f"{name} expects a list of tensors, one for each part, and got {type(parts).__name__}"
            )
        for i, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise InvalidProblem(f"{name}[{i}] expects a tensor and got {type(part).__name__}")


def _check_parts(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise InvalidProblem(
            f"expected one or more outputs and as many LSEs; got {len(outs)} and {len(lses)}"
        )
    first = outs[0]
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != first.shape or out.dtype != first.dtype or out.device != first.device:
            got, expected = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (out, first))
            raise InvalidProblem(
                f"partial outputs must be alike; outs[{i}] is {got} and outs[0] is {expected}"
            )
        if not out.is_floating_point() or not lse.is_floating_point():
            raise InvalidProblem(
                f"outputs and LSEs must be floating; part {i} has {out.dtype} and {lse.dtype}"
            )
        if out.dim() == 0:
            raise InvalidProblem(f"outs[{i}] expects (..., Ev), at least one dimension, and has none")
        if lse.shape != out.shape[:-1] or lse.device != out.device:
            got, expected = f"{tuple(lse.shape)} on {lse.device}", f"{tuple(out.shape[:-1])} on {out.device}"
            raise InvalidProblem(
                f"lses[{i}] must be as outs[{i}] less its last dimension, {expected}; got {got}"
            )
