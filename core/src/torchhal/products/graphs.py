"""The functions of a fused matrix product as a kernel takes them: rewritten, cast and joined.

All of it is algebra on graphs, done once for a problem. Names: *compute* is the type of values and sums, float32 or
float64; the inputs of a function are ``(value)`` or ``(value, batch, row, col)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal.pointwise import Graph, GraphBuilder
from torchhal.pointwise.factors import apply_factors, factors, reads

BATCH, ROW, COL = 1, 2, 3
"""Positions of the indices among the inputs of a function."""
_INDICES: Final = tuple((name, torch.int32) for name in ("batch", "row", "col"))


STORED: Final = {
    torch.float32: frozenset({torch.float32, torch.bfloat16, torch.float16}),
    torch.float64: frozenset({torch.float64}),
}
"""What sums of a type are rounded to by a kernel without an epilogue that casts them."""


class Function(NamedTuple):
    """A captured function and its tensors."""

    graph: Graph
    tensors: Sequence[Tensor] = ()


class Functions(NamedTuple):
    """The functions of a product, any of which may be missing."""

    a_prologue: Graph | None = None
    b_prologue: Graph | None = None
    epilogue: Graph | None = None


class Captured(NamedTuple):
    """The captured tensors of each function."""

    a: Sequence[Tensor] = ()
    b: Sequence[Tensor] = ()
    epilogue: Sequence[Tensor] = ()


class Fused(NamedTuple):
    """Functions as the kernel runs them."""

    functions: Functions
    hoisted: tuple[bool, bool]
    """Whether the prologues of a and b have become a part of the epilogue."""
    bias: bool
    """Whether the epilogue adds the bias, which comes after such factors."""

    def arrange(
        self, captured: Captured, bias: Tensor | None
    ) -> tuple[Function | None, Function | None, Function | None]:
        """The functions with the tensors that each reads."""
        a, b, epilogue = self.functions
        moved = [*captured.epilogue]
        for hoisted, tensors in zip(self.hoisted, (captured.a, captured.b), strict=True):
            moved += tensors if hoisted else ()
        if self.bias and bias is not None:
            moved.append(bias)
        return (
            None if a is None else Function(a, captured.a),
            None if b is None else Function(b, captured.b),
            None if epilogue is None else Function(epilogue, moved),
        )


@lru_cache(maxsize=1024)
def fuse(
    functions: Functions,
    compute: torch.dtype,
    bias: torch.dtype | None,
    out_dtypes: tuple[torch.dtype, ...],
    hoist: bool = True,
) -> Fused:
    """The functions with results of ``out_dtypes``, and, where told to ``hoist``, without prologues that are mere factors.

    Args:
        functions: as they were captured.
        compute: type of values and sums.
        bias: type of the bias; None where there is none.
        out_dtypes: of the results.
        hoist: not for an empty sum, which factors that are not finite would turn into NaN.
    """
    a, b, epilogue = functions
    a_factors = factors(a, frozenset({COL})) if hoist and a is not None else None
    b_factors = factors(b, frozenset({ROW})) if hoist and b is not None else None
    hoisted = (a_factors is not None, b_factors is not None)
    prologues = (None if hoisted[0] else a, None if hoisted[1] else b)
    if not (a_factors or b_factors or epilogue is not None or out_dtypes[0] not in STORED[compute]):
        return Fused(Functions(*prologues), hoisted, False)
    builder = GraphBuilder(_inputs(compute), () if epilogue is None else epilogue.captured)
    value = builder.input(0)
    for graph, found in ((a, a_factors), (b, b_factors)):
        if graph is not None and found is not None:
            value = apply_factors(builder, value, found, _import(builder, graph, builder.input(0)))
    added = any(hoisted) and bias is not None
    if added and bias is not None:
        place = builder.add_captured(bias, 1)
        value = builder.apply(
            "add", value, builder.cast(builder.gather(place, (builder.input(COL),)), compute)
        )
    results = [value]
    if epilogue is not None:
        ids = builder.import_nodes(epilogue, _arguments(builder, epilogue, value))
        results = [ids[i] for i in epilogue.outputs]
    cast = [builder.cast(node, dtype) for node, dtype in zip(results, out_dtypes, strict=True)]
    return Fused(Functions(*prologues, builder.finish(cast)), hoisted, added)


def _inputs(compute: torch.dtype) -> tuple[tuple[str, torch.dtype], ...]:
    return (("value", compute), *_INDICES)


def _arguments(builder: GraphBuilder, graph: Graph, value: int) -> list[int]:
    """What stands for the inputs of ``graph``: ``value``, and the builder's indices."""
    return [value, *(builder.input(i) for i in range(1, len(graph.inputs)))]


def _import(builder: GraphBuilder, graph: Graph, value: int) -> list[int]:
    """The nodes of a function whose captured tensors are added to the builder's."""
    places = [builder.add_captured(*spec) for spec in graph.captured]
    return builder.import_nodes(graph, _arguments(builder, graph, value), places)


# ---------------------------------------------------------------------------- operands seen in another way


@lru_cache(maxsize=1024)
def transposed(graph: Graph) -> Graph:
    """The function of the transposed operand: row and column change places."""
    if len(graph.inputs) == 1:
        return graph
    builder = GraphBuilder(graph.inputs, graph.captured)
    ids = builder.import_nodes(graph, [builder.input(i) for i in (0, BATCH, COL, ROW)])
    return builder.finish([ids[i] for i in graph.outputs])


@lru_cache(maxsize=1024)
def folded(graph: Graph) -> Graph:
    """The function of an operand whose batch was folded into its rows; a last 0-dim captured int32 is the rows of an entry."""
    if not reads(graph, (BATCH, ROW)):
        return graph
    builder = GraphBuilder(graph.inputs, graph.captured)
    rows = builder.gather(builder.add_captured(torch.int32, 0), ())
    batch, row = (builder.apply(name, builder.input(ROW), rows) for name in ("floordiv", "remainder"))
    ids = builder.import_nodes(graph, [builder.input(0), batch, row, builder.input(COL)])
    return builder.finish([ids[i] for i in graph.outputs])
