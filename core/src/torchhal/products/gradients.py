"""Gradients of the fused matrix product, each of them a fused product itself.

With ``z = a' @ b' + bias``, where ``a'`` and ``b'`` are the operands after their prologues, and ``dz`` the gradient that the
epilogue passes down to ``z``:

    dz = d epilogue(z; gradients of the outputs)      one product: z is computed again, and never kept
    da = d a_prologue(a; dz @ b'.T)                   one product: the derivative of the prologue is its epilogue
    db = d b_prologue(b; a'.T @ dz)                   one product
    dbias = the sum of dz over all rows

The gradients of captured tensors are further results of the epilogues of the same products, summed in float64 in a fixed
order: over whole rows, columns or entries of the batch where a function reads a tensor by its indices as they are, element
by element elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal.derivatives import first_derivatives
from torchhal.pointwise import Graph, GraphBuilder
from torchhal.pointwise.differentiate import differentiate
from torchhal.pointwise.factors import reads
from torchhal.products.graphs import BATCH, COL, ROW, Captured, Functions, fuse, transposed
from torchhal.products.packed import Operand

if TYPE_CHECKING:
    from torchhal.products.product import Product


def apply(
    product: Product, a: Tensor, b: Tensor | Operand, bias: Tensor | None, captured: Captured
) -> tuple[Tensor, ...]:
    """``product.run`` as a node of autograd's graph."""
    counts = tuple(map(len, captured))
    return _Product.apply(product, counts, a, b, bias, *captured.a, *captured.b, *captured.epilogue)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        counts: tuple[int, ...],
        a: Tensor,
        b: Tensor | Operand,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = product.run(a, b, bias, Captured(*_parts(tensors, counts)))
        ctx.product, ctx.counts = product, counts
        ctx.packed = None if isinstance(b, Tensor) else b
        ctx.save_for_backward(a, b if ctx.packed is None else None, bias, *tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(out for out in outputs if not out.is_floating_point()))
        return outputs

    @staticmethod
    def backward(ctx: Any, *above: Tensor | None) -> tuple[Tensor | None, ...]:
        a, b, bias, *tensors = ctx.saved_tensors
        above = tuple(None if gradient is None else gradient.resolve_neg() for gradient in above)
        need_a, need_b, need_bias, *need_tensors = ctx.needs_input_grad[2:]
        call = Backward(
            ctx.product,
            a,
            ctx.packed or b,
            bias,
            Captured(*_parts(tensors, ctx.counts)),
            Wanted(*_parts(need_tensors, ctx.counts)),
        )
        with torch.no_grad():
            found = call.gradients(above, need_a, need_b, need_bias)
        given = [gradient for gradient in found if gradient is not None]
        if torch.is_grad_enabled() and given:  # with create_graph
            sources = [t for t in (*ctx.saved_tensors, *above) if t is not None]
            rest = iter(first_derivatives(ctx.product.who, "matmul", given, sources))
            found = [None if gradient is None else next(rest) for gradient in found]
        return (None, None, *found)


def _parts(items: Sequence[Any], counts: Sequence[int]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """What belongs to each function, of a list of it all."""
    first, second = counts[0], counts[0] + counts[1]
    return items[:first], items[first:second], items[second:]


# ---------------------------------------------------------------------------- the gradient of one function


class Use(NamedTuple):
    """One contribution to the gradient of a captured tensor."""

    captured: int
    axes: tuple[int, ...] | None
    """The input that is the index of each dimension; None where indices are computed, and are results themselves."""
    indices: tuple[int, ...]
    """Results that are the indices."""
    value: int
    """Result that is added there."""


class Derivative(NamedTuple):
    """The gradient of a function, as a function of (value, batch, row, col) that may end a product."""

    graph: Graph
    """First result: the gradient of the value."""
    uses: tuple[Use, ...]
    seeds: tuple[int, ...]
    """Outputs whose gradients the graph reads as last captured tensors (batch, row, col), in this order."""


@lru_cache(maxsize=1024)
def derivative(
    graph: Graph, out_dtypes: tuple[torch.dtype, ...], given: tuple[bool, ...], wanted: tuple[bool, ...]
) -> Derivative:
    """The derivative of an epilogue whose results are cast to ``out_dtypes``.

    Args:
        graph: the epilogue.
        out_dtypes: of its results, and so of the gradients from above.
        given: whether an output has a gradient from above.
        wanted: whether a captured tensor's gradient is asked for.
    """
    gradient = differentiate(_cast(graph, out_dtypes))
    value = gradient.graph.inputs[0]
    builder = GraphBuilder((value, *_INDICES), gradient.graph.captured)
    places = tuple(builder.input(i) for i in (BATCH, ROW, COL))
    seeds = tuple(output for output in gradient.output_grads if given[output])
    above = []
    for output in gradient.output_grads:
        dtype = out_dtypes[output]
        if given[output]:
            above.append(builder.gather(builder.add_captured(dtype, 3), places))
        else:
            above.append(builder.constant(0.0, dtype))
    inputs = [builder.input(i) for i in range(len(graph.inputs))]
    return _results(builder, gradient, [*inputs, *above], wanted, seeds)


@lru_cache(maxsize=1024)
def prologue_derivative(
    graph: Graph, operand: torch.dtype, out_dtype: torch.dtype, wanted: tuple[bool, ...]
) -> Derivative:
    """The derivative of a prologue: the value is now the gradient from above, and a last captured tensor (batch, row, col) of
    type ``operand`` holds what the prologue's value was.
    """
    compute = graph.inputs[0].dtype
    gradient = differentiate(_cast(graph, (compute,)))
    builder = GraphBuilder((("value", compute), *_INDICES), gradient.graph.captured)
    places = tuple(builder.input(i) for i in (BATCH, ROW, COL))
    value = builder.cast(builder.gather(builder.add_captured(operand, 3), places), compute)
    inputs = [value, *(builder.input(i) for i in range(1, len(graph.inputs)))]
    found = _results(builder, gradient, [*inputs, builder.input(0)], wanted, ())
    return found._replace(graph=_cast(found.graph, (out_dtype, *found.graph.output_dtypes[1:])))


_INDICES: Final = tuple((name, torch.int32) for name in ("batch", "row", "col"))


def _results(
    builder: GraphBuilder,
    gradient: Any,
    inputs: Sequence[int],
    wanted: Sequence[bool],
    seeds: tuple[int, ...],
) -> Derivative:
    ids = builder.import_nodes(gradient.graph, inputs)
    outputs = [ids[i] for i in gradient.graph.outputs]
    results, uses = [outputs[0]], []
    axes_of = {builder.input(i): i for i in (BATCH, ROW, COL)}
    for part in gradient.contributions:
        if not wanted[part.captured]:
            continue
        indices = [outputs[i] for i in part.indices]
        axes = tuple(axes_of.get(i, 0) for i in indices)
        direct = 0 not in axes and len(set(axes)) == len(axes)
        first = len(results)
        results += [] if direct else indices
        places = () if direct else tuple(range(first, len(results)))
        uses.append(Use(part.captured, axes if direct else None, places, len(results)))
        results.append(outputs[part.value])
    return Derivative(builder.finish(results), tuple(uses), seeds)


def _cast(graph: Graph, dtypes: Sequence[torch.dtype]) -> Graph:
    if graph.output_dtypes == tuple(dtypes):
        return graph
    builder = GraphBuilder(graph.inputs, graph.captured)
    ids = builder.import_nodes(graph, [builder.input(i) for i in range(len(graph.inputs))])
    return builder.finish(
        [builder.cast(ids[i], dtype) for i, dtype in zip(graph.outputs, dtypes, strict=True)]
    )


# ---------------------------------------------------------------------------- the gradients of one call


class Wanted(NamedTuple):
    """Of the captured tensors of each function, whether a gradient is asked for."""

    a: Sequence[bool]
    b: Sequence[bool]
    epilogue: Sequence[bool]


@dataclass
class Backward:
    """The backward pass of one call."""

    product: Product
    a: Tensor
    b: Tensor | Operand
    bias: Tensor | None
    captured: Captured
    wanted: Wanted

    def gradients(
        self, above: Sequence[Tensor | None], need_a: bool, need_b: bool, need_bias: bool
    ) -> list[Tensor | None]:
        """Gradients of a, b, bias and the captured tensors of each function; None where none is asked for or there is none."""
        empty: list[Tensor | None] = [None] * (3 + sum(map(len, self.captured)))
        if all(gradient is None for gradient in above):
            return empty
        dz, of_epilogue = self._through_epilogue(above)
        dz = (
            dz.to(torch.float64) if self.product.compute is torch.float64 else dz
        )  # so that its products are of that type
        of_a = of_b = None
        da = db = None
        if need_a or any(self.wanted.a):
            da, of_a = self._of_left(dz)
        if need_b or any(self.wanted.b):
            db, of_b = self._of_right(dz)
        dbias = None
        if need_bias and self.bias is not None:
            dims = tuple(range(dz.dim() - 1))
            dbias = dz.sum(dims, dtype=self.product.compute).to(self.bias.dtype)
        captured = [
            *(of_a or [None] * len(self.captured.a)),
            *(of_b or [None] * len(self.captured.b)),
            *of_epilogue,
        ]
        return [da if need_a else None, db if need_b else None, dbias, *captured]

    def _through_epilogue(self, above: Sequence[Tensor | None]) -> tuple[Tensor, list[Tensor | None]]:
        """``dz`` and the gradients of what the epilogue captured."""
        graph = self.product.functions.epilogue
        if graph is None:
            (gradient,) = above
            assert gradient is not None
            return gradient, []
        given = tuple(gradient is not None for gradient in above)
        found = derivative(graph, self.product.out_dtypes, given, tuple(self.wanted.epilogue))
        seeds = [_three_dimensional(above[i]) for i in found.seeds]  # type: ignore[arg-type]
        a, b = self.a, self.b
        functions = self.product.functions._replace(epilogue=found.graph)
        if not reads(found.graph, (0,)):  # z itself is not asked for, so an empty sum will do
            a, b = a.narrow(-1, 0, 0), b.narrow(-2, 0, 0)
        fused = fuse(
            functions,
            self.product.compute,
            self.product.bias_dtype,
            found.graph.output_dtypes,
            a.shape[-1] > 0,
        )
        captured = self.captured._replace(epilogue=(*self.captured.epilogue, *seeds))
        results = self.product.multiply(
            a,
            b,
            None if fused.bias else self.bias,
            fused.arrange(captured, self.bias),
            found.graph.output_dtypes,
        )
        return results[0], collect(found.uses, results, self.captured.epilogue)

    def _of_left(self, dz: Tensor) -> tuple[Tensor, list[Tensor | None] | None]:
        """The gradients of a and of what its prologue captured."""
        graph = self.product.functions.b_prologue
        functions = Functions(None, None if graph is None else transposed(graph))
        captured = Captured((), self.captured.b)
        graph = self.product.functions.a_prologue
        return self._of_operand(
            dz, self.b.mT, functions, captured, self.a, graph, self.captured.a, self.wanted.a
        )

    def _of_right(self, dz: Tensor) -> tuple[Tensor, list[Tensor | None] | None]:
        """The gradients of b and of what its prologue captured."""
        graph = self.product.functions.a_prologue
        functions = Functions(None if graph is None else transposed(graph))
        captured = Captured(self.captured.a)
        graph = self.product.functions.b_prologue
        assert isinstance(self.b, Tensor)  # a packed weight has no gradient
        return self._of_operand(
            self.a.mT, dz, functions, captured, self.b, graph, self.captured.b, self.wanted.b
        )

    def _of_operand(
        self,
        left: Tensor,
        right: Tensor | Operand,
        functions: Functions,
        captured: Captured,
        operand: Tensor,
        prologue: Graph | None,
        tensors: Sequence[Tensor],
        wanted: Sequence[bool],
    ) -> tuple[Tensor, list[Tensor | None] | None]:
        """The product ``left @ right``, through the derivative of the operand's prologue."""
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])  # type: ignore[no-untyped-call]
        shape = (*batch, *operand.shape[-2:])
        # A gradient that has yet to be summed over entries of the batch is not rounded before that.
        dtype = operand.dtype if shape == operand.shape else self.product.compute
        uses: tuple[Use, ...] = ()
        out_dtypes: tuple[torch.dtype, ...] = (dtype,)
        if prologue is not None:
            found = prologue_derivative(prologue, operand.dtype, dtype, tuple(wanted))
            functions = functions._replace(epilogue=found.graph)
            captured = captured._replace(epilogue=(*tensors, _three_dimensional(operand.expand(shape))))
            uses, out_dtypes = found.uses, found.graph.output_dtypes
        fused = fuse(functions, self.product.compute, None, out_dtypes, left.shape[-1] > 0)
        results = self.product.multiply(left, right, None, fused.arrange(captured, None), out_dtypes)
        gradient = (
            results[0] if shape == operand.shape else results[0].sum_to_size(operand.shape).to(operand.dtype)
        )
        return gradient, collect(uses, results, tensors) if prologue is not None else None


def _three_dimensional(tensor: Tensor) -> Tensor:
    """(batch, M, N), the batch flattened."""
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def collect(
    uses: Sequence[Use], results: Sequence[Tensor], captured: Sequence[Tensor]
) -> list[Tensor | None]:
    """The gradients of captured tensors, from the results that say what is added where."""
    sums: list[Tensor | None] = [None] * len(captured)
    for use in uses:
        tensor = captured[use.captured]
        total = sums[use.captured]
        if total is None:
            total = sums[use.captured] = torch.zeros(tensor.shape, dtype=torch.float64, device=tensor.device)
        values = _three_dimensional(results[use.value])
        if use.axes is not None:
            _add_sums(total, values, use.axes)
        else:
            _add_elements(total, values, [results[i] for i in use.indices])
    return [
        None if total is None else total.to(tensor.dtype)
        for total, tensor in zip(sums, captured, strict=True)
    ]


def _add_sums(total: Tensor, values: Tensor, axes: Sequence[int]) -> None:
    """Add to the part of ``total`` that indices reached, each dimension of which is one of (batch, row, col) counted from 1."""
    others = tuple(i for i in range(3) if i + 1 not in axes)
    reduced = values.sum(others, dtype=torch.float64) if others else values
    kept = sorted(axes)
    total[tuple(slice(values.shape[axis - 1]) for axis in axes)] += reduced.permute(
        [kept.index(axis) for axis in axes]
    )


def _add_elements(total: Tensor, values: Tensor, indices: Sequence[Tensor]) -> None:
    place = torch.zeros((), dtype=torch.int64, device=total.device)
    for index, size, stride in zip(indices, total.shape, total.stride(), strict=True):
        # Where the forward pass read: an index out of range is taken to the nearest element.
        counted = torch.where(index < 0, index + size, index).clamp(0, size - 1)
        place = place + counted.to(torch.int64).flatten() * stride
    flat = values.flatten().to(torch.float64)
    place = place.expand(flat.shape)
    if total.device.type == "cpu":
        total.view(-1).index_add_(0, place, flat)  # of one dimension: one element after the other
    else:  # which sorts, where index_add_ adds in the order in which threads come
        total.view(-1).index_put_((place,), flat, accumulate=True)
