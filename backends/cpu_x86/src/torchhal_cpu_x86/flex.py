"""Everything attention is beyond dense tensors and masks: captured functions, BlockMasks, packed and paged sequences.

One native operator serves all of it: ``flex_attention(query, key, value, operands, description, scale)`` with the
tensors of the call in a flat list, and what they are, the functions' programs included, as text. So a call survives
torch.compile, torch.export and AOTInductor as an ordinary operator with ordinary arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchhal.operands import AttentionOperands
from torchhal.pointwise import Graph
from torchhal.problems import AttentionProblem
from torchhal.reference.layouts import Piece, paged_pieces, varlen_pieces
from torchhal_cpu_x86 import gradients, programs
from torchhal_cpu_x86.gradients import Run


def is_needed(problem: AttentionProblem) -> bool:
    """Whether a problem is more than the plain operators serve."""
    functions = problem.score_mod is not None or problem.mask_mod is not None
    return (
        gradients.are_wanted(problem)
        or functions
        or problem.dropout
        or problem.return_max_scores
        or problem.block_size is not None
        or problem.layout != "dense"
    )


def runner(problem: AttentionProblem) -> Run:
    """The ``run`` of a plan: the operator with what the problem fixes bound."""
    described: dict[tuple[bool, bool, float], str] = {}
    plain = torch.ops.torchhal_cpu_x86.flex_attention.default
    wanted = 1 + problem.return_lse + problem.return_max_scores
    attend = _differentiable(problem) if gradients.are_wanted(problem) else plain

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands | None,
    ) -> Any:
        given = operands or AttentionOperands()
        kind = (given.kv_num_blocks is not None, given.full_kv_num_blocks is not None, given.dropout_p)
        text = described.get(kind)
        if text is None:
            described.clear()  # probabilities of dropout without end must not fill the memory
            text = described[kind] = _description(problem, *kind)
        tensors = _tensors(attn_mask, given)
        try:
            results = attend(query, key, value, tensors, text, scale)
        except RuntimeError:
            _blame_data(Piece(query, key, value, attn_mask), given)
            raise
        return tuple(results[:wanted]) if wanted > 1 else results[0]

    return gradients.outside_transforms(run, problem) if gradients.are_wanted(problem) else run


def _differentiable(problem: AttentionProblem) -> Run:
    """The operator that has a backward pass, with what that needs beside the tensors."""
    operator, text = (
        torch.ops.torchhal_cpu_x86.differentiable_attention.default,
        gradients.describe(problem).text(),
    )
    return lambda *arguments: operator(*arguments, text)


def _description(problem: AttentionProblem, has_blocks: bool, has_full_blocks: bool, dropout_p: float) -> str:
    rows, keys = problem.block_size or (1, 1)
    score, mask = problem.score_mod, problem.mask_mod
    returns_lse = problem.return_lse or gradients.are_wanted(problem)  # which the backward pass starts from
    numbers = [
        gradients.LAYOUTS[problem.layout],
        problem.is_causal,
        returns_lse,
        problem.mask_dtype is not None,
    ]
    numbers += [has_blocks, has_full_blocks, rows, keys, _captured(score), _captured(mask)]
    numbers += [programs.double_bits(dropout_p) if problem.dropout else 0, problem.key_scale is not None]
    numbers += [problem.return_max_scores]
    for graph in (score, mask):
        words = programs.encode(graph) if graph is not None else ()
        numbers += [len(words), *words]
    return " ".join(str(int(number)) for number in numbers)


def _captured(graph: Graph | None) -> int:
    """How many tensors a function captures; -1 where there is no function."""
    return -1 if graph is None else len(graph.captured)


def _tensors(attn_mask: Tensor | None, operands: AttentionOperands) -> list[Tensor]:
    """In the order in which the operator reads them; lists of lengths are contiguous there."""
    lists = (
        operands.kv_num_blocks,
        operands.kv_indices,
        operands.full_kv_num_blocks,
        operands.full_kv_indices,
    )
    lengths = (operands.cu_seqlens_q, operands.cu_seqlens_k)
    found = (attn_mask, *operands.captured, *operands.mask_captured, *lists)
    tensors = [tensor for tensor in found if tensor is not None]
    tensors += [tensor.contiguous() for tensor in lengths if tensor is not None]
    if operands.page_table is not None and operands.seq_lens is not None:
        tensors += [operands.page_table, operands.seq_lens.contiguous()]
    if operands.key_scale is not None and operands.value_scale is not None:
        tensors += [operands.key_scale, operands.value_scale]
    return [*tensors, operands.seed] if operands.seed is not None else tensors


def _blame_data(whole: Piece, operands: AttentionOperands) -> None:
    """Raise what the specification raises for lengths and pages that contradict the shapes; return if they do not."""
    if operands.cu_seqlens_q is not None:
        list(varlen_pieces(whole, operands))
    if operands.page_table is not None:
        list(paged_pieces(whole, operands))
