"""Gradients of foreach: one more pass of the backend over the lists, of the derivative's graph.

The pass is differentiable in its turn, so second derivatives need nothing of their own. Gradients of what is one for all
positions (0-dim operands and captured tensors) are sums over all of them, taken in float64 in the order of the lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchhal.foreach_columns import LIST, NUMBER, SHARED, Column
from torchhal.pointwise import Graph, GraphBuilder, differentiate

if TYPE_CHECKING:
    from torchhal.foreach_plans import Passes

Results = tuple[list[Tensor], ...]


def run(
    passes: Passes, graph: Graph, columns: Sequence[Column], captured: Sequence[Tensor], total: bool = False
) -> Results:
    """``passes.map``: new tensors through which gradients reach columns and captured tensors.

    Args:
        passes: what the backend does itself.
        graph: the function.
        columns: its operands.
        captured: its captured tensors.
        total: whether to give the sum of each result's elements, as ``passes.reduce`` takes it.
    """
    tensors = [t for column in columns for t in column.items] + list(captured)
    form = _Form(passes, graph, tuple([(len(c.items), c.kind) for c in columns]), total)
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in tensors):
        return form.run(tensors)
    found = _Mapped.apply(form, *tensors)  # type: ignore[no-untyped-call]
    length = form.length
    return tuple(list(found[start : start + length]) for start in range(0, len(found), length))


_Like = tuple[torch.Size, torch.dtype]


class _Form(NamedTuple):
    """A call but for its tensors, which are in one flat list: those of each column, then captured ones."""

    passes: Passes
    graph: Graph
    columns: tuple[tuple[int, int], ...]
    """How many tensors each column has, and its kind."""
    total: bool
    """Whether results are sums of their elements."""

    @property
    def length(self) -> int:
        """Positions of the lists."""
        return next(count for count, kind in self.columns if kind == LIST)

    def divide(self, items: Sequence[Any]) -> tuple[list[Sequence[Any]], Sequence[Any]]:
        """What is in the flat list, or belongs to its tensors, for each column and for the captured tensors."""
        columns, at = [], 0
        for count, _ in self.columns:
            columns.append(items[at : at + count])
            at += count
        return columns, items[at:]

    def run(self, tensors: Sequence[Tensor]) -> Results:
        """The results, without gradients."""
        columns, captured = self.divide(tensors)
        kinds = [kind for _, kind in self.columns]
        given = [Column(*pair) for pair in zip(columns, kinds, strict=True)]
        if self.total:
            return self.passes.reduce(self.graph, given, captured, "sum")
        return self.passes.map(self.graph, given, captured)

    def spread(self, gradients: Sequence[Tensor], like: Sequence[_Like]) -> Sequence[Tensor]:
        """Gradients of the results as those of all their elements."""
        if not self.total:
            return [gradient.resolve_neg() for gradient in gradients]
        columns, _ = self.divide([shape for shape, _ in like])
        lists = [items for items, (_, kind) in zip(columns, self.columns, strict=True) if kind == LIST]
        shapes = [torch.broadcast_shapes(*found) for found in zip(*lists, strict=True)]  # type: ignore[no-untyped-call]
        dtypes = [self.graph.nodes[node].dtype for node in self.graph.outputs]
        return [
            gradient.resolve_neg().to(dtypes[i // self.length]).expand(shapes[i % self.length])
            for i, gradient in enumerate(gradients)
        ]


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, form: _Form, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.form, ctx.like = form, [(t.shape, t.dtype) for t in tensors]
        flags, held = form.divide(ctx.needs_input_grad[1:])
        inputs = tuple([i for i, flag in enumerate(flags) if any(flag)])
        ctx.derivative = _derivative(form.graph, inputs, tuple([i for i, flag in enumerate(held) if flag]))
        columns, captured = form.divide(tensors)
        ctx.save_for_backward(*[t for i in ctx.derivative.takes for t in columns[i]], *captured)
        flat = [t for items in form.run(tensors) for t in items]
        ctx.mark_non_differentiable(*[t for t in flat if not t.dtype.is_floating_point])
        return tuple(flat)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = _pull_back(ctx.form, ctx.derivative, ctx.saved_tensors, gradients, ctx.like)
        wanted = ctx.needs_input_grad[1:]
        return None, *[gradient if need else None for gradient, need in zip(found, wanted, strict=True)]


def _pull_back(
    form: _Form,
    derivative: _Derivative,
    saved: Sequence[Tensor],
    gradients: Sequence[Tensor],
    like: Sequence[_Like],
) -> list[Tensor | None]:
    """The gradient of each tensor of a call; None where it has none or none is wanted."""
    columns, at = [], 0
    for index in derivative.takes:
        count, kind = form.columns[index]
        columns.append(Column(saved[at : at + count], kind))
        at += count
    length, gradients = form.length, form.spread(gradients, like)
    columns += [Column(gradients[i * length : (i + 1) * length]) for i in derivative.output_grads]
    forms, held = form.divide(like)
    found: list[list[Tensor | None]] = [[None] * count for count, _ in form.columns]
    sums: list[Tensor | None] = [None] * len(held)
    if derivative.graph.outputs:
        outputs = iter(run(form.passes, derivative.graph, columns, saved[at:]))
        for index in derivative.inputs:
            found[index] = _fitted(next(outputs), forms[index], form.columns[index][1] in (SHARED, NUMBER))
        for index in derivative.captured:
            sums[index] = _sum(next(outputs), held[index][1])
    return [gradient for items in found for gradient in items] + sums


class _Derivative(NamedTuple):
    """The graph of some gradients."""

    graph: Graph
    """Takes ``takes``, then gradients of ``output_grads``, and all captured tensors."""
    takes: tuple[int, ...]
    """Which inputs of the original it reads: nothing else has to be kept."""
    output_grads: tuple[int, ...]
    """Of which outputs of the original it reads the gradients."""
    inputs: tuple[int, ...]
    """Which inputs its first outputs are the gradients of; those that do not depend on any are left out."""
    captured: tuple[int, ...]
    """Which captured tensors its other outputs are added to."""


@lru_cache(maxsize=1024)
def _derivative(graph: Graph, inputs: tuple[int, ...], captured: tuple[int, ...]) -> _Derivative:
    gradient = differentiate(graph)
    full, count = gradient.graph, len(graph.inputs)
    places = dict(zip(gradient.inputs, full.outputs, strict=False))
    own = tuple([i for i in inputs if i in places and not _is_zero(full, places[i])])
    added = {c.captured: full.outputs[c.value] for c in gradient.contributions}
    held = tuple([i for i in captured if i in added])
    only = _with_outputs(full, [places[i] for i in own] + [added[i] for i in held])
    read = sorted({node.position for node in only.nodes if node.primitive == "input"})
    grads = tuple([gradient.output_grads[i - count] for i in read if i >= count])
    return _Derivative(_reading(only, read), tuple([i for i in read if i < count]), grads, own, held)


def _with_outputs(graph: Graph, outputs: Sequence[int]) -> Graph:
    """The graph with other outputs, and no node that these do not need."""
    builder = GraphBuilder(graph.inputs, graph.captured)
    nodes = builder.import_nodes(graph, [builder.input(i) for i in range(len(graph.inputs))])
    return builder.finish([nodes[i] for i in outputs])


def _reading(graph: Graph, inputs: Sequence[int]) -> Graph:
    """The graph with no inputs but these, which are all that it reads."""
    builder = GraphBuilder([graph.inputs[i] for i in inputs], graph.captured)
    at = {position: builder.input(place) for place, position in enumerate(inputs)}
    nodes = builder.import_nodes(graph, [at.get(i, -1) for i in range(len(graph.inputs))])
    return builder.finish([nodes[i] for i in graph.outputs])


def _is_zero(graph: Graph, node: int) -> bool:
    """Whether a gradient is the constant that stands for there being none."""
    found = graph.nodes[node]
    return found.primitive == "constant" and found.value == 0


def _fitted(gradients: Sequence[Tensor], like: Sequence[_Like], shared: bool) -> list[Tensor | None]:
    """Gradients of the broadcast shape as those of a column's tensors."""
    if shared:
        return [_sum(gradients, like[0][1])]
    return [
        gradient if gradient.shape == shape else gradient.sum_to_size(shape)
        for gradient, (shape, _) in zip(gradients, like, strict=True)
    ]


def _sum(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of all elements, rounded once."""
    return torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum().to(dtype)
