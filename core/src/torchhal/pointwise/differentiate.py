"""Reverse-mode differentiation: a graph in, the graph of its gradients out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torchhal.pointwise import composites as _composites  # noqa: F401  (the rules call what it registers)
from torchhal.pointwise.derivatives import DERIVATIVES, NON_DIFFERENTIABLE
from torchhal.pointwise.dtypes import is_float
from torchhal.pointwise.graph import Graph
from torchhal.pointwise.promotion import Kind
from torchhal.pointwise.tracer import Tracer
from torchhal.pointwise.values import Value


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one ``gather`` adds to a captured tensor's gradient, at every position evaluated.

    Attributes:
        captured: position of the captured tensor.
        indices: outputs of the gradient graph that hold the index of each dimension.
        value: output of the gradient graph to add at that index.
    """

    captured: int
    indices: tuple[int, ...]
    value: int


@dataclass(frozen=True, slots=True)
class Gradient:
    """The gradients of a graph.

    Attributes:
        graph: takes the original inputs, then one gradient per entry of ``output_grads``; captured
            tensors are the original's, at the same positions.
        output_grads: positions of the original's floating outputs, in the order of the added inputs.
        inputs: positions of the original's floating inputs; output ``k`` of ``graph`` is the
            gradient of input ``inputs[k]``.
        contributions: what to scatter-add into the gradients of captured tensors. A negative index
            counts from the end, as in ``gather``.
    """

    graph: Graph
    output_grads: tuple[int, ...]
    inputs: tuple[int, ...]
    contributions: tuple[Contribution, ...]


@lru_cache(maxsize=1024)
def differentiate(graph: Graph) -> Gradient:
    """The gradient graph of ``graph``, by reverse accumulation.

    Conventions are torch autograd's: relu and abs have slope 0 at 0, max and min split ties evenly,
    clamp does at its bounds what this release of torch does, rounding and sign have slope 0.
    """
    outputs = tuple(i for i, node in enumerate(graph.outputs) if is_float(graph.nodes[node].dtype))
    names = {name for name, _ in graph.inputs}
    grads = [(_fresh(f"grad_{i}", names), graph.nodes[graph.outputs[i]].dtype) for i in outputs]
    tracer = Tracer((*graph.inputs, *grads), "gradient")
    for dtype, ndim in graph.captured:
        tracer.add_captured(dtype, ndim)
    ids = tracer.import_nodes(graph, [tracer.input(i) for i in range(len(graph.inputs))])
    values = [Value(tracer, i, tracer.dtype(i), Kind.LANE) for i in ids]
    seeds = [
        Value(tracer, tracer.input(len(graph.inputs) + k), dtype, Kind.LANE)
        for k, (_, dtype) in enumerate(grads)
    ]
    adjoints = _accumulate(graph, values, [graph.outputs[i] for i in outputs], seeds)
    return _collect(graph, tracer, ids, adjoints, outputs)


def _fresh(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _active(graph: Graph) -> list[bool]:
    """Which nodes depend smoothly on a floating input or captured tensor."""
    active: list[bool] = []
    for node in graph.nodes:
        leaf = node.primitive in ("input", "gather")
        flows = node.primitive not in NON_DIFFERENTIABLE and any(active[i] for i in node.operands)
        active.append(is_float(node.dtype) and (leaf or flows))
    return active


def _accumulate(
    graph: Graph, values: Sequence[Value], outputs: Sequence[int], seeds: Sequence[Value]
) -> dict[int, Value]:
    """The gradient of each node that has one, from the last node to the first."""
    adjoints: dict[int, Value] = {}
    active = _active(graph)
    for output, seed in zip(outputs, seeds, strict=True):
        adjoints[output] = adjoints[output] + seed if output in adjoints else seed
    for i in range(len(graph.nodes) - 1, -1, -1):
        node = graph.nodes[i]
        if i not in adjoints or not active[i] or node.primitive in NON_DIFFERENTIABLE:
            continue
        parts = DERIVATIVES[node.primitive](adjoints[i], values[i], *[values[j] for j in node.operands])
        for j, part in zip(node.operands, parts, strict=True):
            if part is not None and active[j]:
                adjoints[j] = adjoints[j] + part if j in adjoints else part
    return adjoints


def _collect(
    graph: Graph, tracer: Tracer, ids: Sequence[int], adjoints: dict[int, Value], outputs: tuple[int, ...]
) -> Gradient:
    wanted = []
    leaf = {node.position: i for i, node in enumerate(graph.nodes) if node.primitive == "input"}
    for position in graph.floating_inputs:
        found = adjoints.get(leaf.get(position, -1))
        wanted.append(tracer.constant(0.0, graph.inputs[position].dtype) if found is None else found.node)
    contributions = []
    for i, node in enumerate(graph.nodes):
        if node.primitive == "gather" and i in adjoints:
            start = len(wanted)
            wanted += [ids[j] for j in node.operands] + [adjoints[i].node]
            places = tuple(range(start, start + len(node.operands)))
            contributions.append(Contribution(node.position, places, start + len(places)))
    return Gradient(tracer.finish(wanted), outputs, graph.floating_inputs, tuple(contributions))
