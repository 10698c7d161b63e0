"""Products with packed weights that follow each other, prepared once and run by one call of their backend.

What a layer of a model computes for one token takes less time than to ask for it: a small product by :func:`torchhal.matmul` costs
15 us of Python, and three times that in a model whose weights have pushed that Python out of the caches. A chain is asked for
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal.matmul import NO_FUNCTIONS, Call, Functions, capture_functions, choose
from torchhal.operands import MatmulOperands, Packed
from torchhal.pointwise import Captured
from torchhal.problems import MatmulProblem
from torchhal.selection import Selected

Bound = Callable[[Tensor, Sequence[Tensor]], "list[Tensor]"]
"""What a backend makes of a chain: ``(a, parts)``, ``parts`` the tensors of all steps in their order, each its weight's
``tensors``, its bias, and what its epilogue captures. Returns the results of the steps that no later one
reads; or an empty list, having done nothing, where ``a`` or a part is not of the kind that the chain was made for."""


@dataclass(frozen=True)
class Step:
    """One product of a chain, as a backend is told of it."""

    problem: MatmulProblem
    """Without prologues. With a ``factor`` the epilogue multiplies the value by the one tensor it captures, at ``[row, col]``."""
    weight: Packed
    """One like those that calls bring: their shapes and schemes are the same."""
    source: int | None = None
    """The earlier step whose result is multiplied; None for what the chain is given."""
    factor: int | None = None
    """The earlier step whose result, of the shape of this one's, the epilogue captures."""


class Link(NamedTuple):
    """One product of a chain, as a module describes it, but for its weight and bias."""

    epilogue: Captured | None = None
    """Captured for float32 elements; it captures no tensors."""
    source: int | None = None
    """The earlier link whose result is multiplied; None for what the chain is given."""
    factor: int | None = None
    """The earlier link whose result multiplies this one's, element by element; then there is no ``epilogue``."""


class Layer(NamedTuple):
    """What a link multiplies by, in one call."""

    weight: Packed
    bias: Tensor | None
    backend: str | None


_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


class Prepared(NamedTuple):
    """Links that are ready to be run together."""

    bound: Bound | None
    """None where they have to be asked for one by one."""
    selected: tuple[Selected, ...]
    """The choice for each link."""
    parts: list[Tensor]


def prepare(
    links: Sequence[Link], layers: Sequence[Layer], dtype: torch.dtype, device: torch.device
) -> Prepared:
    """Choose a backend for each link, and have it bind them all if it is one and can; without gradients.

    Args:
        links: products that follow each other.
        layers: what each multiplies by.
        dtype: of what the first multiplies, and of every result.
        device: of all tensors.

    Raises:
        Unsupported, InvalidProblem: as :func:`torchhal.matmul` does for a link.
    """
    selected: tuple[Selected, ...] = ()
    bound = None
    if dtype in _TYPES:
        row = torch.empty((1, 1), dtype=dtype, device=device)
        selected = tuple([choose(_call(link, layer, row)) for link, layer in zip(links, layers, strict=True)])
        bound = _bound(links, layers, selected)
    parts = [t for layer in layers for t in (*layer.weight.tensors, layer.bias) if t is not None]
    return Prepared(bound, selected, parts)


def _call(link: Link, layer: Layer, like: Tensor) -> Call:
    """What asks for a link alone, on a row that stands for any."""
    rows, columns = layer.weight.shape
    epilogue = link.epilogue
    if link.factor is not None:
        factor = like.new_empty((1, columns))
        epilogue = capture_functions(
            torch.float32, None, None, lambda value, batch, row, col: value * factor[row, col]
        ).epilogue
    functions = NO_FUNCTIONS if epilogue is None else Functions(epilogue=epilogue)
    return Call(like.new_empty((1, rows)), layer.weight, layer.bias, functions, like.dtype, layer.backend)


def _bound(links: Sequence[Link], layers: Sequence[Layer], selected: tuple[Selected, ...]) -> Bound | None:
    binds = {entry.plan.bind if entry.plan else None for entry in selected}
    bind = binds.pop()
    if binds or bind is None:
        return None
    steps = []
    for link, layer, entry in zip(links, layers, selected, strict=True):
        assert isinstance(entry.route.problem, MatmulProblem)
        steps.append(Step(entry.route.problem, layer.weight, link.source, link.factor))
    bound: Bound | None = bind(steps)
    return bound


def record(
    selected: Selected, a: Tensor, b: Packed, bias: Tensor | None, operands: MatmulOperands | None
) -> tuple[Tensor, ...] | None:
    """Leave the backend's own operator for one product in a graph that is traced; None where that can not serve it, so that
    the core's operator has to, which looks for the plan at every call.
    """
    problem = selected.route.problem
    bind = selected.plan.bind if selected.plan else None
    assert isinstance(problem, MatmulProblem)
    if bind is None or problem.features & {"backward", "captured_gradient", "a_prologue", "b_prologue"}:
        return None
    if a.dim() > 2 and problem.epilogue is not None and len(problem.epilogue.inputs) > 1:
        return None  # rows of a chain are counted without batches
    weight = b.tensors
    bound = bind([Step(problem, b)], required=True) if all(t.is_contiguous() for t in weight) else None
    if bound is None:
        return None
    captured = () if operands is None else operands.epilogue_captured
    added = () if bias is None else (bias,)
    return tuple(bound(a.contiguous(), [*weight, *added, *captured]))
