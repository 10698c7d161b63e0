"""The ``run`` of a plan for foreach around what a backend does itself: one graph over columns whose outputs have the shape of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from torch import Tensor

from torchhal import foreach_gradients
from torchhal.derivatives import is_transformed
from torchhal.foreach_columns import LIST, Column, columns_of, is_plain, lists_of
from torchhal.operands import is_readable
from torchhal.pointwise import Graph
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import depends_on, output_shape, reduce
from torchhal.reference.foreach import foreach_map as reference

Lists = Sequence[Sequence[Tensor]]
Results = tuple[list[Tensor], ...]
Run = Callable[[Sequence[Any], Sequence[Tensor], Lists | None], Results]


class Mapping(Protocol):
    """Results of a graph at every position, each of the broadcast shape of all columns there, without gradients."""

    def __call__(
        self, graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], out: Lists | None = None
    ) -> Results:
        """``captured`` are 0-dim; ``out`` has a list of destinations for each output, of any strides and element types."""


class Passes(NamedTuple):
    """What a backend does itself, each in as few passes over memory as it can."""

    map: Mapping
    reduce: Callable[[Graph, Sequence[Column], Sequence[Tensor], str], Results]
    """What elements of each result come to, at every position a 0-dim tensor: ``reduce(graph, columns, captured, reduction)``."""


_LEARNING: Final = frozenset({"backward", "captured_gradient"})


def learns(problem: ForeachProblem) -> bool:
    """Whether a problem asks for gradients."""
    return not _LEARNING.isdisjoint(problem.features)


def runner(problem: ForeachProblem, passes: Passes) -> Run:
    """The ``run`` of a plan whose own part are ``passes``."""
    own = _own(problem, passes)

    def run(operands: Sequence[Any], captured: Sequence[Tensor], out: Lists | None) -> Results:
        columns = columns_of(problem, operands)
        if is_transformed() or not all(is_readable(column.items) for column in columns):
            return reference(problem, operands, captured, out)
        if len(problem.functions) == 1 and is_plain(problem.functions[0], columns):
            return own(problem.functions[0], columns, captured, out)
        return _part_by_part(problem, operands, columns, captured, out, own)

    return run


def _own(problem: ForeachProblem, passes: Passes) -> Mapping:
    """What serves one graph, whose outputs have the shape of all operands."""
    reduction = problem.reduction
    if reduction is None:
        return _learning(passes) if learns(problem) else passes.map

    def reduced(
        graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], out: Lists | None = None
    ) -> Results:
        if not learns(problem):
            return passes.reduce(graph, columns, captured, reduction)
        if reduction == "sum":
            return foreach_gradients.run(passes, graph, columns, captured, total=True)
        results = foreach_gradients.run(passes, graph, columns, captured)
        return tuple([[reduce(value, reduction) for value in items] for items in results])

    return reduced


def _learning(passes: Passes) -> Mapping:
    """``passes.map`` through which gradients flow; destinations are copied to, as autograd wants it."""

    def learn(
        graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], out: Lists | None = None
    ) -> Results:
        if out is None:
            return foreach_gradients.run(passes, graph, columns, captured)
        written = {t.data_ptr() for items in out for t in items}
        kept = [_kept(column, written) for column in columns]
        results = foreach_gradients.run(passes, graph, kept, captured)
        return tuple(
            [place.copy_(value) for place, value in zip(items, values, strict=True)]
            for items, values in zip(out, results, strict=True)
        )

    return learn


def _kept(column: Column, written: set[int]) -> Column:
    """The column with copies of what is written over, since gradients may need what was there."""
    return column._replace(items=[t.clone() if t.data_ptr() in written else t for t in column.items])


# ---------------------------------------------------------------------------- positions of different kinds


def _part_by_part(
    problem: ForeachProblem,
    operands: Sequence[Any],
    columns: Sequence[Column],
    captured: Sequence[Tensor],
    out: Lists | None,
    own: Mapping,
) -> Results:
    """Positions of one graph together, but for those whose outputs have a shape of their own: those go to plain torch."""
    results: tuple[list[Any], ...] = tuple(
        [None] * len(lists_of(columns)[0]) for _ in problem.functions[0].outputs
    )
    for graph, where in _by_graph(problem, operands, columns).items():
        given = None if out is None else [[items[p] for p in where] for items in out]
        part = [column.at(where) for column in columns]
        if graph is None:
            picked = [
                entry if kind == "scalar" else [entry[p] for p in where]
                for entry, kind in zip(operands, problem.operands, strict=True)
            ]
            found = reference(problem, picked, captured, given)
        else:
            found = own(graph, part, captured, given)
        for values, target in zip(found, results, strict=True):
            for position, value in zip(where, values, strict=True):
                target[position] = value
    return results


def _by_graph(
    problem: ForeachProblem, operands: Sequence[Any], columns: Sequence[Column]
) -> dict[Graph | None, list[int]]:
    """Positions by the graph that serves them; None for those that plain torch does."""
    graphs = {tuple(spec.dtype for spec in graph.inputs): graph for graph in problem.functions}
    numbers = [
        kind == "scalars" or not isinstance(entry, (Tensor, list, tuple))
        for entry, kind in zip(operands, problem.operands, strict=True)
    ]
    found: dict[Graph | None, list[int]] = {}
    for position in range(len(next(c.items for c in columns if c.kind == LIST))):
        tensors = [c.items[0 if c.shared else position] for c in columns]
        graph = graphs[tuple(t.dtype for t in tensors)]
        shapes = [None if number else t.shape for t, number in zip(tensors, numbers, strict=True)]
        whole = output_shape(range(len(shapes)), shapes)
        alike = all(output_shape(needed, shapes) == whole for needed in depends_on(graph))
        found.setdefault(graph if alike else None, []).append(position)
    return found
