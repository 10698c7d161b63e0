"""Bounds on what a graph computes when its inputs are known only as intervals: many boxes of inputs at once.

:func:`bound` runs a graph as :func:`~torchhal.pointwise.evaluate` does, with a
:class:`~torchhal.pointwise.interval_arithmetic.Range` in the place of each value. A primitive without a rule in
:data:`~torchhal.pointwise.interval_rules.RULES` is bounded by everything its dtype can hold, so a new one is sound
from its first day. A read of a captured tensor at an interval of indices is bounded by a :class:`RangeTable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from torchhal.pointwise.dtypes import is_float, is_integer
from torchhal.pointwise.graph import Graph, Node
from torchhal.pointwise.interval_arithmetic import Range, anything, holds_zero, point, shaped, without_nan
from torchhal.pointwise.interval_rules import RULES

DIVISIONS: Final = frozenset(("floordiv", "truncdiv", "remainder", "fmod"))
"""Primitives that torch refuses to compute where an integer divisor is zero."""


def bound(
    graph: Graph, inputs: Sequence[Range], tables: Sequence[RangeTable]
) -> tuple[tuple[Range, ...], Tensor]:
    """Bound the outputs of ``graph``.

    Args:
        graph: the function.
        inputs: one range per graph input, of the recorded dtype, of shapes that broadcast together.
        tables: one per captured tensor, on the inputs' device.

    Returns:
        One range per output, each of the broadcast shape of what it depends on; and a bool tensor of a shape that
        broadcasts with them: where an index may lie outside its tensor, or an integer be divided by zero, so that
        evaluating the function may raise.
    """
    device = next((r.low.device for r in inputs), torch.device("cpu"))
    values: list[Range] = []
    faulty = torch.zeros((), dtype=torch.bool, device=device)
    for node in graph.nodes:
        operands = [values[i] for i in node.operands]
        value, fault = _node(node, operands, inputs, tables, device)
        values.append(value)
        faulty = faulty if fault is None else faulty | fault
    return tuple(values[i] for i in graph.outputs), faulty


def _node(
    node: Node,
    operands: Sequence[Range],
    inputs: Sequence[Range],
    tables: Sequence[RangeTable],
    device: torch.device,
) -> tuple[Range, Tensor | None]:
    if node.primitive == "input":
        return inputs[node.position], None
    if node.primitive == "constant":
        return point(torch.full((), node.value, dtype=node.dtype, device=device)), None
    if node.primitive == "gather":
        return tables[node.position].read(operands)
    rule = RULES.get(node.primitive)
    value = anything(node.dtype, shaped(operands)) if rule is None else rule(node.dtype, operands)
    if node.primitive in DIVISIONS and is_integer(node.dtype):
        return value, holds_zero(operands[1])
    return value, None


class RangeTable:
    """The least and the greatest element of any stretch of a captured tensor along one of its dimensions.

    A sparse table: level ``k`` holds the extremes of the ``2**k`` elements from each position on, so that two reads
    cover any stretch. Only the levels that were asked for are kept. Source: M. A. Bender and M. Farach-Colton,
    The LCA Problem Revisited (2000), section 3.

    Args:
        source: the captured tensor.
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source.detach()
        self._levels: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def read(self, indices: Sequence[Range]) -> tuple[Range, Tensor | None]:
        """Bound the elements at ``indices``, one integer range per dimension.

        Returns:
            The range of the elements, and a bool tensor: where an index may be outside the tensor (None: nowhere).
            Where the indices of more than one dimension are no single numbers, an element is anything.
        """
        if not indices:
            return point(self.source), None
        like = shaped(indices)
        if 0 in self.source.shape:
            return anything(self.source.dtype, like), torch.ones_like(like, dtype=torch.bool)
        places = [_inside(index, size) for index, size in zip(indices, self.source.shape, strict=True)]
        outside = torch.zeros_like(like, dtype=torch.bool)
        for _, _, beyond in places:
            outside = outside | beyond
        value = self._stretch([(low, high) for low, high, _ in places])
        return value or anything(self.source.dtype, like), outside if bool(outside.any()) else None

    def _stretch(self, places: Sequence[tuple[Tensor, Tensor]]) -> Range | None:
        varying = [dim for dim, (low, high) in enumerate(places) if bool((low != high).any())]
        if len(varying) > 1:
            return None
        if not varying:
            return point(self.source[tuple(low for low, _ in places)])
        dim = varying[0]
        lead = [low for i, (low, _) in enumerate(places) if i != dim]
        least, greatest = self._extremes(dim, lead, *places[dim])
        if not is_float(self.source.dtype):
            return Range(least, greatest)
        return Range(*without_nan(least, greatest))

    def _extremes(self, dim: int, lead: list[Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        level = (high - low + 1).double().log2().floor().long()
        found: tuple[Tensor, Tensor] | None = None
        for k in range(int(level.min()), int(level.max()) + 1):
            here = level == k
            if not bool(here.any()):
                continue
            both = []
            for table, pick in zip(self._level(dim, k), (torch.minimum, torch.maximum), strict=True):
                last = table.shape[-1] - 1  # stretches of other levels are brought inside, and replaced below
                first = table[(*lead, low.clamp(max=last))]
                both.append(pick(first, table[(*lead, (high + 1 - 2**k).clamp(0, last))]))
            found = (
                (both[0], both[1])
                if found is None
                else (torch.where(here, both[0], found[0]), torch.where(here, both[1], found[1]))
            )
        assert found is not None
        return found

    def _level(self, dim: int, k: int) -> tuple[Tensor, Tensor]:
        """The extremes of ``2**k`` elements along ``dim``, which is the last dimension of both tensors."""
        known = self._levels.get((dim, k))
        if known is not None:
            return known
        below = max((j for d, j in self._levels if d == dim and j < k), default=0)
        elements = self.source.movedim(dim, -1)
        least, greatest = self._levels.get((dim, below), (elements, elements))
        for j in range(below, k):
            least = torch.minimum(least[..., : -(2**j)], least[..., 2**j :])
            greatest = torch.maximum(greatest[..., : -(2**j)], greatest[..., 2**j :])
        self._levels[dim, k] = least, greatest
        return least, greatest


def _inside(index: Range, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The places from the first to the last that an index may mean, and where it may mean one outside."""
    low, high = index.low.long(), index.high.long()
    beyond = (low < -size) | (high >= size)
    around = (low < 0) & (high >= 0)
    first = torch.where(low < 0, low + size, low).masked_fill(around, 0)
    last = torch.where(high < 0, high + size, high).masked_fill(around, size - 1)
    return first.masked_fill(beyond, 0), last.masked_fill(beyond, size - 1), beyond
