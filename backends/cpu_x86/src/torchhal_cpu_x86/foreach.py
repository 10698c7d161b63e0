"""Plans for foreach: the function as a program of the vector machine, in one parallel region over all lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchhal import Decline, Plan
from torchhal.pointwise import Graph
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import NUMBER_DTYPES, depends_on, output_shape
from torchhal.reference.foreach import foreach_map as reference
from torchhal_cpu_x86 import hardware, maps, native
from torchhal_cpu_x86.gradients import is_transformed
from torchhal_cpu_x86.maps import Column

Lists = Sequence[Sequence[Tensor]]
Results = tuple[list[Tensor], ...]


def plan(problem: ForeachProblem) -> Plan | Decline:
    """The native plan for a problem, or why this machine has none."""
    refusal = hardware.decline()
    if refusal is not None:
        return refusal
    if len(problem.operands) > maps.MOST_INPUTS:
        return Decline("too_many_operands", f"functions of up to {maps.MOST_INPUTS} operands are served")
    return Plan(
        run=_mapping(problem),
        description=f"native, {native.load().get_isa(torch.float32)}, one pass over all lists",
        workspace="copies of what is not contiguous or has a shape of its own",
    )


def _mapping(problem: ForeachProblem) -> Callable[..., Results]:
    """The ``run`` of a plan."""

    def run(operands: Sequence[Any], captured: Sequence[Tensor], out: Lists | None) -> Results:
        columns = _columns(problem, operands)
        if is_transformed() or not all(maps.is_readable(column) for column in columns):
            return reference(problem, operands, captured, out)
        if len(problem.functions) == 1 and _is_plain(problem.functions[0], columns):
            return maps.run(problem.functions[0], columns, captured, out)
        return _part_by_part(problem, operands, columns, captured, out)

    return run


def _columns(problem: ForeachProblem, operands: Sequence[Any]) -> list[Column]:
    """The operands as tensors; numbers are elements of the type that stands for them in the graph."""
    columns = []
    for entry, kind in zip(operands, problem.operands, strict=True):
        if kind == "list":
            columns.append(Column(entry))
        elif kind == "scalars":
            columns.append(Column([_number(value) for value in entry]))
        else:
            columns.append(Column([entry if isinstance(entry, Tensor) else _number(entry)], shared=True))
    return columns


def _number(value: Any) -> Tensor:
    return torch.tensor(value, dtype=NUMBER_DTYPES[type(value)])


def _is_plain(graph: Graph, columns: Sequence[Column]) -> bool:
    """Whether every output has the broadcast shape of all operands, wherever that is to be seen without looking closer."""
    listed = {index for index, column in enumerate(columns) if not column.shared}
    needs = depends_on(graph)
    if all(listed <= needed for needed in needs):
        return True
    return all(listed & needed for needed in needs) and maps.shapes_agree(columns)


def _part_by_part(
    problem: ForeachProblem,
    operands: Sequence[Any],
    columns: Sequence[Column],
    captured: Sequence[Tensor],
    out: Lists | None,
) -> Results:
    """Positions of one graph together, but for those whose outputs have a shape of their own: those go to plain torch."""
    results: tuple[list[Any], ...] = tuple(
        [None] * len(next(c.items for c in columns if not c.shared)) for _ in problem.functions[0].outputs
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
            found = maps.run(graph, part, captured, given)
        for values, target in zip(found, results, strict=True):
            for position, value in zip(where, values, strict=True):
                target[position] = value
    return results


def _by_graph(
    problem: ForeachProblem, operands: Sequence[Any], columns: Sequence[Column]
) -> dict[Graph | None, list[int]]:
    """Positions by the graph that serves them natively; None for those that plain torch does."""
    graphs = {tuple(spec.dtype for spec in graph.inputs): graph for graph in problem.functions}
    numbers = [
        kind == "scalars" or not isinstance(entry, (Tensor, list, tuple))
        for entry, kind in zip(operands, problem.operands, strict=True)
    ]
    found: dict[Graph | None, list[int]] = {}
    for position in range(len(next(c.items for c in columns if not c.shared))):
        tensors = [c.items[0 if c.shared else position] for c in columns]
        graph = graphs[tuple(t.dtype for t in tensors)]
        shapes = [None if number else t.shape for t, number in zip(tensors, numbers, strict=True)]
        whole = output_shape(range(len(shapes)), shapes)
        alike = all(output_shape(needed, shapes) == whole for needed in depends_on(graph))
        found.setdefault(graph if alike else None, []).append(position)
    return found
