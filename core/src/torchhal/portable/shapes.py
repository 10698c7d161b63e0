"""The lengths of one call of the portable kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands
from torchhal.problems import AttentionProblem


class Shape(NamedTuple):
    """The lengths of one call."""

    batch: int
    heads: int
    key_heads: int
    rows: int
    """Of a sequence; of all of them where they are packed."""
    keys: int
    """Of a sequence, at most."""

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.heads // self.key_heads


def shape_of(problem: AttentionProblem, query: Tensor, key: Tensor, operands: AttentionOperands) -> Shape:
    """The lengths of a call in any layout."""
    if problem.layout == "varlen":
        if operands.cu_seqlens_q is None or operands.cu_seqlens_k is None:
            raise InvalidProblem(
                "variable-length attention needs cu_seqlens_q and cu_seqlens_k, and at least one is absent"
            )
        if operands.cu_seqlens_q.shape[0] < 2:
            raise InvalidProblem(
                f"cu_seqlens_q must end at the number of tokens, {query.shape[0]}; it is 0 alone"
            )
        rows, heads, _ = query.shape
        return Shape(operands.cu_seqlens_q.shape[0] - 1, heads, key.shape[1], rows, key.shape[0])
    batch, heads, rows, _ = query.shape
    if problem.layout == "paged":
        if operands.page_table is None or operands.seq_lens is None:
            raise InvalidProblem("paged attention needs page_table and seq_lens, and at least one is absent")
        return Shape(batch, heads, key.shape[1], rows, operands.page_table.shape[1] * key.shape[2])
    return Shape(batch, heads, key.shape[1], rows, key.shape[2])
