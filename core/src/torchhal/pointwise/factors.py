"""Factors of a function that a sum over one of its indices can be multiplied by afterwards.

``sum_k (a[m, k] * s[m]) * b[k, n]`` is ``s[m] * sum_k a[m, k] * b[k, n]``: a factor that does not depend on the summed
index commutes with a matrix product. A prologue that is nothing but such factors costs one multiplication for each
element of the result instead of one for each element of an operand, and leaves the operand as it lies in memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache

from torchhal.pointwise.builder import GraphBuilder
from torchhal.pointwise.graph import Graph


@lru_cache(maxsize=1024)
def factors(graph: Graph, summed: frozenset[int]) -> tuple[tuple[str, int], ...] | None:
    """How ``graph`` is its first input times or divided by values that do not depend on ``summed`` inputs.

    Args:
        graph: a function with one output.
        summed: positions of the inputs that vary within a sum; the first input counts as one of them.

    Returns:
        ``("mul" or "div", node)`` for each factor, in the order in which they are applied; empty where the function gives
        its input back, and None where it does anything else.
    """
    varies = depend(graph, {0, *summed})
    found: list[tuple[str, int]] = []
    at = graph.outputs[0]
    while True:
        node = graph.nodes[at]
        if node.primitive == "input" and node.position == 0:
            return tuple(reversed(found))
        if node.primitive not in ("mul", "div") or node.dtype is not graph.inputs[0].dtype:
            return None
        left, right = node.operands
        if not varies[right]:
            found.append((node.primitive, right))
            at = left
        elif node.primitive == "mul" and not varies[left]:
            found.append(("mul", left))
            at = right
        else:
            return None


def depend(graph: Graph, inputs: Collection[int]) -> list[bool]:
    """For each node, whether it depends on one of ``inputs``, given by position."""
    found: list[bool] = []
    for node in graph.nodes:
        own = node.primitive == "input" and node.position in inputs
        found.append(own or any(found[i] for i in node.operands))
    return found


def reads(graph: Graph, inputs: Collection[int]) -> bool:
    """Whether an output of ``graph`` depends on one of ``inputs``, given by position."""
    return any(node.primitive == "input" and node.position in inputs for node in graph.nodes)


def apply_factors(
    builder: GraphBuilder, value: int, found: Sequence[tuple[str, int]], nodes: Sequence[int]
) -> int:
    """``value`` with factors applied, whose nodes are ``nodes`` in ``builder``."""
    for primitive, node in found:
        value = builder.apply(primitive, value, nodes[node])
    return value
