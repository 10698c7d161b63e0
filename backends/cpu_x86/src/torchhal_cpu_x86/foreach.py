"""Plans for foreach: the function as a native program, in one parallel region over all lists."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import Decline, Plan
from torchhal.derivatives import is_transformed
from torchhal.pointwise import Graph
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import NUMBER_DTYPES, depends_on, output_shape, reduce
from torchhal.reference.foreach import foreach_map as reference
from torchhal_cpu_x86 import hardware, map_gradients, maps, native
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
    learns = not _LEARNING.isdisjoint(problem.features)
    return Plan(
        run=_mapping(problem, _native(problem, learns)),
        description=f"native, {native.load().get_isa(torch.float32)}, one pass over all lists",
        differentiable=True,
        workspace="copies of what is not contiguous or has a shape of its own",
        direct=None if learns else _direct(problem),
    )


_LEARNING: Final = frozenset({"backward", "captured_gradient"})
"""Features of a problem that ask for gradients."""


def _native(problem: ForeachProblem, learns: bool) -> Callable[..., Results]:
    """What serves one graph, whose outputs have the shape of all operands; the arguments of :func:`maps.run`."""
    reduction = problem.reduction
    if reduction is None:
        return _learn if learns else maps.run

    def reduced(
        graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], out: Lists | None = None
    ) -> Results:
        if not learns:
            return maps.reduce(graph, columns, captured, reduction)
        if reduction == "sum":
            return map_gradients.run(graph, columns, captured, total=True)
        results = map_gradients.run(graph, columns, captured)
        return tuple([[reduce(value, reduction) for value in items] for items in results])

    return reduced


def _learn(
    graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], out: Lists | None = None
) -> Results:
    """What :func:`maps.run` computes, through which gradients flow; destinations are copied to, as autograd wants it."""
    if out is None:
        return map_gradients.run(graph, columns, captured)
    written = {t.data_ptr() for items in out for t in items}
    results = map_gradients.run(graph, [_kept(column, written) for column in columns], captured)
    return tuple(
        [place.copy_(value) for place, value in zip(items, values, strict=True)]
        for items, values in zip(out, results, strict=True)
    )


def _kept(column: Column, written: set[int]) -> Column:
    """The column with copies of what is written over, since gradients may need what was there."""
    return column._replace(items=[t.clone() if t.data_ptr() in written else t for t in column.items])


def _mapping(problem: ForeachProblem, native_run: Callable[..., Results]) -> Callable[..., Results]:
    """The ``run`` of a plan, whose native part is ``native_run``."""

    def run(operands: Sequence[Any], captured: Sequence[Tensor], out: Lists | None) -> Results:
        columns = _columns(problem, operands)
        if is_transformed() or not all(maps.is_readable(column) for column in columns):
            return reference(problem, operands, captured, out)
        if len(problem.functions) == 1 and _is_plain(problem.functions[0], columns):
            return native_run(problem.functions[0], columns, captured, out)
        return _part_by_part(problem, operands, columns, captured, out, native_run)

    return run


def _direct(problem: ForeachProblem) -> Callable[..., Results | None] | None:
    """The ``direct`` of a plan: the native operator, which looks at the tensors itself."""
    (graph, *others) = problem.functions
    listed = {index for index, how in enumerate(problem.operands) if how == "list"}
    if others or graph.captured or not all(listed & needed for needed in depends_on(graph)):
        return None
    operator = torch.ops.torchhal_cpu_x86.foreach.default
    ready: dict[tuple[object, ...], tuple[maps.Prepared, int]] = {}

    def direct(operands: Sequence[Any], out: Lists | None) -> Results | None:
        gathered = _gathered(operands, out)
        if gathered is None or is_transformed() or torch._C._len_torch_dispatch_stack():
            return None
        kinds, targets, tensors, numbers = gathered
        found = ready.get((kinds, targets))
        if found is None:
            places = targets or (maps.NEW,) * len(graph.outputs)
            program = maps.prepared(graph, kinds, places, problem.reduction)
            found = ready[kinds, targets] = program, len(graph.outputs)
        program, outputs = found
        with torch._C._AutoDispatchBelowAutograd():
            made, served = operator(tensors, numbers, program.number)
        if not served:
            return None
        if out is not None:
            if not native.load().notes_writes:
                torch.autograd.graph.increment_version([t for items in out for t in items])
            return out  # type: ignore[return-value]
        if problem.reduction is not None:
            return maps.settled(graph, made, problem.reduction)
        length = len(made) // outputs
        return tuple(made[start : start + length] for start in range(0, len(made), length))

    return direct


def _gathered(
    operands: Sequence[Any], out: Lists | None
) -> tuple[tuple[int, ...], tuple[int, ...], list[Tensor], list[float]] | None:
    """Kinds and targets of a call, its tensors and its numbers; None for what the operator does not take."""
    kinds, tensors, numbers = [], [], []
    for entry in operands:
        if type(entry) is float:
            kinds.append(maps.NUMBER)
            numbers.append(entry)
        elif isinstance(entry, Tensor):
            kinds.append(maps.SHARED)
            tensors.append(entry)
        elif type(entry[0]) is float:
            kinds.append(maps.NUMBERS)
            numbers += entry
        else:
            kinds.append(maps.LIST)
            tensors += entry
    targets = []
    for items in out or ():
        at = next((index for index, entry in enumerate(operands) if entry is items), maps.GIVEN)
        targets.append(at)
        if at == maps.GIVEN:
            tensors += items
    if not set(map(type, tensors)) <= maps.PLAIN or not set(map(type, numbers)) <= {float}:
        return None
    return tuple(kinds), tuple(targets), tensors, numbers


def _columns(problem: ForeachProblem, operands: Sequence[Any]) -> list[Column]:
    """The operands as tensors; numbers are elements of the type that stands for them in the graph."""
    columns = []
    for entry, kind in zip(operands, problem.operands, strict=True):
        if kind == "list":
            columns.append(Column(entry))
        elif kind == "scalars":
            columns.append(Column(_numbers(entry), maps.NUMBERS))
        else:
            columns.append(Column([entry if isinstance(entry, Tensor) else _number(entry)], maps.SHARED))
    return columns


def _number(value: Any) -> Tensor:
    return torch.tensor(value, dtype=NUMBER_DTYPES[type(value)])


def _numbers(values: Sequence[Any]) -> Sequence[Tensor]:
    """Numbers as 0-dim tensors; of one type, as most lists are, all at once, in a fiftieth of the time."""
    kinds = set(map(type, values))
    if len(kinds) > 1:
        return [_number(value) for value in values]
    return torch.tensor(values, dtype=NUMBER_DTYPES[kinds.pop()]).unbind()


def _is_plain(graph: Graph, columns: Sequence[Column]) -> bool:
    """Whether every output has the broadcast shape of all operands, wherever that is to be seen without looking closer."""
    listed = {index for index, column in enumerate(columns) if column.kind == maps.LIST}
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
    native_run: Callable[..., Results],
) -> Results:
    """Positions of one graph together, but for those whose outputs have a shape of their own: those go to plain torch."""
    results: tuple[list[Any], ...] = tuple(
        [None] * len(next(c.items for c in columns if c.kind == maps.LIST))
        for _ in problem.functions[0].outputs
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
            found = native_run(graph, part, captured, given)
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
    for position in range(len(next(c.items for c in columns if c.kind == maps.LIST))):
        tensors = [c.items[0 if c.shared else position] for c in columns]
        graph = graphs[tuple(t.dtype for t in tensors)]
        shapes = [None if number else t.shape for t, number in zip(tensors, numbers, strict=True)]
        whole = output_shape(range(len(shapes)), shapes)
        alike = all(output_shape(needed, shapes) == whole for needed in depends_on(graph))
        found.setdefault(graph if alike else None, []).append(position)
    return found
