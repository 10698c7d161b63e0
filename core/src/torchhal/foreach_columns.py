"""Operands of foreach as backends compute with them: columns of tensors, numbers among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchhal.pointwise import Graph
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import NUMBER_DTYPES, depends_on

LIST, SHARED, NUMBER, NUMBERS = range(4)
"""How an operand is given: a list of tensors, one 0-dim tensor, one number, a list of numbers."""


class Column(NamedTuple):
    """One operand: a tensor for each position, or one 0-dim tensor for all of them."""

    items: Sequence[Tensor]
    kind: int = LIST
    """Numbers are 0-dim tensors of the CPU, of the types that stand for them in a graph."""

    @property
    def shared(self) -> bool:
        """Whether there is one element for all positions."""
        return self.kind in (SHARED, NUMBER)

    def at(self, positions: Sequence[int]) -> Column:
        """The column at some positions."""
        return self if self.shared else self._replace(items=[self.items[position] for position in positions])


def columns_of(problem: ForeachProblem, operands: Sequence[Any]) -> list[Column]:
    """The operands of a call of ``problem``, as ``Plan.run`` has them."""
    return [_column(entry, kind) for entry, kind in zip(operands, problem.operands, strict=True)]


def _column(entry: Any, kind: str) -> Column:
    if kind == "list":
        return Column(entry)
    if kind == "scalars":
        return Column(_numbers(entry), NUMBERS)
    return Column([entry], SHARED) if isinstance(entry, Tensor) else Column([_number(entry)], NUMBER)


def _number(value: Any) -> Tensor:
    return torch.tensor(value, dtype=NUMBER_DTYPES[type(value)])


def _numbers(values: Sequence[Any]) -> Sequence[Tensor]:
    """Numbers as 0-dim tensors; of one type, as most lists are, all at once, in a fiftieth of the time."""
    kinds = set(map(type, values))
    if len(kinds) > 1:
        return [_number(value) for value in values]
    return torch.tensor(values, dtype=NUMBER_DTYPES[kinds.pop()]).unbind()


def lists_of(columns: Sequence[Column]) -> list[Sequence[Tensor]]:
    """The lists of tensors among the columns."""
    return [column.items for column in columns if column.kind == LIST]


def shapes_agree(columns: Sequence[Column]) -> bool:
    """Whether all lists of tensors have the same shapes."""
    first, *others = lists_of(columns)
    if not others:
        return True
    shapes = [tensor.shape for tensor in first]
    return all([tensor.shape for tensor in items] == shapes for items in others)


def is_plain(graph: Graph, columns: Sequence[Column]) -> bool:
    """Whether every output has the broadcast shape of all operands, wherever that is to be seen without looking closer."""
    listed = {index for index, column in enumerate(columns) if column.kind == LIST}
    needs = depends_on(graph)
    if all(listed <= needed for needed in needs):
        return True
    return all(listed & needed for needed in needs) and shapes_agree(columns)
