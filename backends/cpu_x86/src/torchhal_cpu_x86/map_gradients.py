"""Gradients of foreach: one more native pass over the lists, of the derivative's graph.

The pass is differentiable in its turn, so second derivatives need nothing of their own. Gradients of what is one for all
positions (0-dim operands and captured tensors) are sums over all of them, taken in float64 in the order of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchhal.pointwise import Graph, GraphBuilder, differentiate
from torchhal_cpu_x86 import maps
from torchhal_cpu_x86.maps import Column

Results = tuple[list[Tensor], ...]


def run(graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor]) -> Results:
    """:func:`torchhal_cpu_x86.maps.run`, new tensors through which gradients reach columns and captured tensors."""
    tensors = [t for column in columns for t in column.items] + list(captured)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return maps.run(graph, columns, captured)
    form = _Form(graph, tuple([(len(c.items), c.kind) for c in columns]))
    found = _Mapped.apply(form, *tensors)  # type: ignore[no-untyped-call]
    length = form.length
    return tuple(list(found[start : start + length]) for start in range(0, len(found), length))


class _Form(NamedTuple):
    """A call but for its tensors, which are in one flat list: those of each column, then captured ones."""

    graph: Graph
    columns: tuple[tuple[int, int], ...]
    """How many tensors each column has, and its kind."""

    @property
    def length(self) -> int:
        """Positions of the lists."""
        return next(count for count, kind in self.columns if kind == maps.LIST)

    def divide(self, tensors: Sequence[Tensor]) -> tuple[list[Column], list[Tensor]]:
        """The columns and the captured tensors."""
        columns, at = [], 0
        for count, kind in self.columns:
            columns.append(Column(tensors[at : at + count], kind))
            at += count
        return columns, list(tensors[at:])


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: _Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.form = form
        ctx.save_for_backward(*tensors)
        results = maps.run(form.graph, *form.divide(tensors))
        flat = [t for items in results for t in items]
        ctx.mark_non_differentiable(*[t for t in flat if not t.dtype.is_floating_point])
        return tuple(flat)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        form, tensors = ctx.form, ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        return None, *_pull_back(form, tensors, gradients, wanted)


def _pull_back(
    form: _Form, tensors: Sequence[Tensor], gradients: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """The gradient of each tensor of a call; None where it has none or none is wanted."""
    columns, captured = form.divide(tensors)
    flags, held = form.divide(wanted)  # type: ignore[arg-type]
    inputs = tuple([i for i, flag in enumerate(flags) if any(flag.items)])
    chosen = _derivative(form.graph, inputs, tuple([i for i, flag in enumerate(held) if flag]))
    length = form.length
    above = [Column(gradients[i * length : (i + 1) * length]) for i in chosen.output_grads]
    found: list[list[Tensor | None]] = [[None] * len(column.items) for column in columns]
    sums: list[Tensor | None] = [None] * len(captured)
    if chosen.graph.outputs:
        passes = iter(run(chosen.graph, [*columns, *above], captured))
        for index in chosen.inputs:
            found[index] = _fitted(next(passes), columns[index])
        for index in chosen.captured:
            sums[index] = _sum(next(passes), captured[index].dtype)
    flat = [gradient for items in found for gradient in items] + sums
    return [gradient if need else None for gradient, need in zip(flat, wanted, strict=True)]


class _Derivative(NamedTuple):
    """The graph of some gradients: takes the original's inputs, then the gradients of its floating outputs."""

    graph: Graph
    output_grads: tuple[int, ...]
    inputs: tuple[int, ...]
    """Which inputs its first outputs are the gradients of; those that do not depend on any are left out."""
    captured: tuple[int, ...]
    """Which captured tensors its other outputs are added to."""


@lru_cache(maxsize=1024)
def _derivative(graph: Graph, inputs: tuple[int, ...], captured: tuple[int, ...]) -> _Derivative:
    gradient = differentiate(graph)
    full = gradient.graph
    places = dict(zip(gradient.inputs, full.outputs, strict=False))
    own = tuple([i for i in inputs if i in places and not _is_zero(full, places[i])])
    added = {c.captured: full.outputs[c.value] for c in gradient.contributions}
    held = tuple([i for i in captured if i in added])
    outputs = [places[i] for i in own] + [added[i] for i in held]
    builder = GraphBuilder(full.inputs, full.captured)
    nodes = builder.import_nodes(full, [builder.input(i) for i in range(len(full.inputs))])
    return _Derivative(builder.finish([nodes[i] for i in outputs]), gradient.output_grads, own, held)


def _is_zero(graph: Graph, node: int) -> bool:
    """Whether a gradient is the constant that stands for there being none."""
    found = graph.nodes[node]
    return found.primitive == "constant" and found.value == 0


def _fitted(gradients: Sequence[Tensor], column: Column) -> list[Tensor | None]:
    """Gradients of the broadcast shape as those of a column's tensors."""
    if column.shared:
        return [_sum(gradients, column.items[0].dtype)]
    return [
        gradient if gradient.shape == tensor.shape else gradient.sum_to_size(tensor.shape)
        for gradient, tensor in zip(gradients, column.items, strict=True)
    ]


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of all elements, rounded once."""
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum().to(dtype)
