"""The specification of foreach_map, in plain torch: one position of the lists after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from torchhal._text import short
from torchhal.errors import InvalidProblem
from torchhal.pointwise import Graph, evaluate
from torchhal.problems import ForeachProblem, Plan

NUMBER_DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}
"""Type of the graph input that stands for a Python number."""


def plan(problem: ForeachProblem) -> Plan:
    """The reference serves every foreach problem."""
    graphs = {tuple(spec.dtype for spec in graph.inputs): graph for graph in problem.functions}

    def run(
        operands: Sequence[Any], captured: Sequence[Tensor], out: Sequence[Sequence[Tensor]] | None
    ) -> tuple[list[Tensor], ...]:
        return _foreach_map(problem, graphs, operands, captured, out)

    return Plan(
        run,
        "plain torch, tensor by tensor",
        differentiable=True,
        workspace="one tensor for each node of the function",
    )


def foreach_map(
    problem: ForeachProblem,
    operands: Sequence[Any],
    captured: Sequence[Tensor],
    out: Sequence[Sequence[Tensor]] | None,
) -> tuple[list[Tensor], ...]:
    """The function at each position of the lists, as torch computes it there.

    Args:
        problem: the graphs, one for each combination of element types, and how each operand is passed.
        operands: for each of ``problem.operands``, a list of tensors, a list of numbers, or one number or 0-dim
            tensor. A Python float stands for a float64 input, an int for int64, a bool for bool. Tensors at one
            position broadcast together.
        captured: the function's 0-dim captured tensors.
        out: None, or for each output a list of destinations, one for each position.

    Returns:
        A list for each output: new tensors, or the destinations. An output has the broadcast shape of the
        operands it depends on; one that depends on none has that of all. With ``problem.reduction`` it is reduced.
    """
    graphs = {tuple(spec.dtype for spec in graph.inputs): graph for graph in problem.functions}
    return _foreach_map(problem, graphs, operands, captured, out)


def reduced_dtype(dtype: torch.dtype, reduction: str) -> torch.dtype:
    """Type that elements of ``dtype`` are reduced to: of sums float32, float64 for float64, int64 for all but floats."""
    if reduction == "any":
        return torch.bool
    if reduction == "max":
        return dtype
    if not dtype.is_floating_point:
        return torch.int64
    return torch.float64 if dtype is torch.float64 else torch.float32


def reduce(value: Tensor, reduction: str) -> Tensor:
    """One 0-dim tensor for all elements of a result.

    Args:
        value: of any shape, without elements too.
        reduction: ``sum``: in float64, rounded once to :func:`reduced_dtype`; 0 of nothing. ``max``: the largest, NaN if one
            is; of nothing the smallest number of the type, -inf for floats. ``any``: whether one is not 0, as NaN is
            not; False of nothing.
    """
    dtype = reduced_dtype(value.dtype, reduction)
    if reduction == "sum":
        return value.sum(dtype=torch.float64 if dtype.is_floating_point else dtype).to(dtype)
    if reduction == "any":
        return (value != 0).any()
    return value.amax() if value.numel() else value.sum(dtype=dtype) + smallest(dtype)


def smallest(dtype: torch.dtype) -> float | int | bool:
    """The largest of no elements of a type."""
    if dtype is torch.bool:
        return False
    return -float("inf") if dtype.is_floating_point else torch.iinfo(dtype).min


@lru_cache(maxsize=1024)
def depends_on(graph: Graph) -> tuple[frozenset[int], ...]:
    """For each output, the positions of the inputs it depends on."""
    reach: list[frozenset[int]] = []
    for node in graph.nodes:
        own = frozenset((node.position,)) if node.primitive == "input" else frozenset()
        reach.append(own.union(*(reach[i] for i in node.operands)))
    return tuple(reach[i] for i in graph.outputs)


def output_shape(needed: Iterable[int], shapes: Sequence[torch.Size | None]) -> torch.Size:
    """Shape of an output that depends on the operands ``needed``, given the shapes of all, None for numbers.

    Raises:
        RuntimeError: torch's, when they do not broadcast.
    """
    tensors = [shape for shape in shapes if shape is not None]
    own = [shape for shape in (shapes[i] for i in needed) if shape is not None]
    return torch.Size(torch.broadcast_shapes(*(own or tensors)))  # type: ignore[no-untyped-call]


def _foreach_map(
    problem: ForeachProblem,
    graphs: dict[tuple[torch.dtype, ...], Graph],
    operands: Sequence[Any],
    captured: Sequence[Tensor],
    out: Sequence[Sequence[Tensor]] | None,
) -> tuple[list[Tensor], ...]:
    lists = [entry for kind, entry in zip(problem.operands, operands, strict=True) if kind != "scalar"]
    results: tuple[list[Tensor], ...] = tuple([] for _ in problem.functions[0].outputs)
    for position in range(len(lists[0])):
        picked = [
            entry if kind == "scalar" else entry[position]
            for kind, entry in zip(problem.operands, operands, strict=True)
        ]
        for index, value in enumerate(_evaluate(graphs, picked, captured, problem.device, position)):
            if problem.reduction is not None:
                value = reduce(value, problem.reduction)
            results[index].append(value if out is None else out[index][position].copy_(value))
    return results


def _evaluate(
    graphs: dict[tuple[torch.dtype, ...], Graph],
    picked: Sequence[Any],
    captured: Sequence[Tensor],
    device: torch.device,
    position: int,
) -> list[Tensor]:
    values = [_as_tensor(value, device) for value in picked]
    shapes = [value.shape if isinstance(value, Tensor) else None for value in picked]
    graph = _graph(graphs, tuple(value.dtype for value in values), position)
    settled = []
    for index, (output, needed) in enumerate(
        zip(evaluate(graph, values, captured), depends_on(graph), strict=True)
    ):
        full = output.expand(output_shape(needed, shapes))
        settled.append(full.clone() if _may_alias(graph, index) else full)
    return settled


def _graph(
    graphs: dict[tuple[torch.dtype, ...], Graph], found: tuple[torch.dtype, ...], position: int
) -> Graph:
    graph = graphs.get(found)
    if graph is None:
        known = " and ".join(short(dtypes) for dtypes in graphs)
        raise InvalidProblem(
            f"position {position} of the lists has {short(found)} and the problem has graphs for {known}"
        )
    return graph


def _as_tensor(value: Any, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=NUMBER_DTYPES[type(value)], device=device)


def _may_alias(graph: Graph, index: int) -> bool:
    """Whether an output could share memory with an operand, a captured tensor, an earlier output, or itself."""
    node = graph.outputs[index]
    return (
        graph.nodes[node].primitive in ("input", "detach", "gather", "constant")
        or node in graph.outputs[:index]
    )
