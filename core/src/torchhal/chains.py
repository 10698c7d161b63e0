"""Products with packed weights that follow each other, prepared once and run by one call of their backend.

What a layer of a model does between one token and the next takes longer to ask for than to compute: a small product by
:func:`torchhal.matmul` costs some 15 us of Python. A chain is asked for once; each call then looks whether all is as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal import scope
from torchhal._caches import forgotten_on_reset
from torchhal.derivatives import is_transformed
from torchhal.matmul import NO_FUNCTIONS, Call, Functions, capture_functions, choose
from torchhal.operands import MatmulOperands, Packed
from torchhal.pointwise import Captured
from torchhal.problems import MatmulProblem
from torchhal.registry import blame
from torchhal.selection import Selected

Bound = Callable[[Tensor, Sequence[Tensor]], "list[Tensor]"]
"""What a backend makes of a chain: ``(a, parts)``, ``parts`` the tensors of all steps in their order, each its weight's, as
:func:`parts_of` lists them, its bias, and what its epilogue captures. Returns the results of the steps that no later one reads; or an empty list, having
done nothing, where ``a`` or a part is not of the kind that the chain was made for."""


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


_any_autocast: Final = torch._C._is_any_autocast_enabled
_dispatch_modes: Final = torch._C._len_torch_dispatch_stack
_scope: Final = scope.current
_epoch: list[object] = forgotten_on_reset([])
"""Holds one object, until a reset: what was prepared before it is not used any more."""
_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


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
    weight = parts_of(b)
    bound = bind([Step(problem, b)], required=True) if all(t.is_contiguous() for t in weight) else None
    if bound is None:
        return None
    captured = () if operands is None else operands.epilogue_captured
    added = () if bias is None else (bias,)
    return tuple(bound(a.contiguous(), [*weight, *added, *captured]))


def parts_of(weight: Packed) -> list[Tensor]:
    """The tensors of a packed weight, in the order of its ``state()``."""
    return [value for value in weight.state().values() if isinstance(value, Tensor)]


class Chain:
    """Runs products that follow each other by one call of a backend, where one backend serves them all and can.

    A chain holds nothing that has to be saved: copies and pickles of it begin anew.
    """

    def __init__(self, links: tuple[Link, ...]) -> None:
        self._links = links
        self._ready: _Ready | None = None

    def __reduce__(self) -> tuple[type[Chain], tuple[tuple[Link, ...]]]:
        return Chain, (self._links,)

    def run(self, x: Tensor, layers: tuple[Layer, ...]) -> list[Tensor] | None:
        """The results that no link reads, for x (..., K); None where the links have to be asked for one by one: where gradients
        may be wanted, under autocast, ``use()`` and transforms, and for what no backend makes a chain of.

        Args:
            x: what the first link multiplies.
            layers: one for each link.
        """
        if (
            type(x) is not Tensor
            or torch.is_grad_enabled()
            or _any_autocast()
            or _scope.state is not _scope
            or _dispatch_modes()
            or is_transformed()
        ):
            return None
        ready = self._ready
        if ready is None or not ready.fits(x, layers):
            ready = self._ready = _prepare(self._links, layers, x)
        if ready.bound is None:
            return None
        try:
            results = ready.bound(x, ready.parts)
        except Exception as error:
            blame(error, ready.selected[0].route.chosen)
            raise
        if not results:
            return None
        for selected in ready.selected:
            selected.record()
        return results


@dataclass(frozen=True, slots=True)
class _Ready:
    """A chain for operands of one kind and layers that are these."""

    epoch: object
    dtype: torch.dtype
    device: torch.device
    layers: tuple[Layer, ...]
    bias_dtypes: tuple[torch.dtype | None, ...]
    selected: tuple[Selected, ...]
    parts: list[Tensor]
    bound: Bound | None
    """None where the links are asked for one by one."""

    def fits(self, x: Tensor, layers: tuple[Layer, ...]) -> bool:
        if not _epoch or _epoch[0] is not self.epoch or x.dtype is not self.dtype or x.device != self.device:
            return False
        for (weight, bias, backend), layer, dtype in zip(self.layers, layers, self.bias_dtypes, strict=True):
            if weight is not layer.weight or bias is not layer.bias or backend != layer.backend:
                return False
            if bias is not None and bias.dtype is not dtype:  # a module converts its parameters in place
                return False
        return True


def _prepare(links: tuple[Link, ...], layers: tuple[Layer, ...], x: Tensor) -> _Ready:
    if not _epoch:
        _epoch.append(object())
    selected: tuple[Selected, ...] = ()
    bound = None
    if x.dtype in _TYPES:
        calls = [_call(link, layer, x) for link, layer in zip(links, layers, strict=True)]
        selected = tuple([choose(call) for call in calls])
        bound = _bound(links, layers, selected)
    parts = [t for layer in layers for t in (*parts_of(layer.weight), layer.bias) if t is not None]
    dtypes = tuple([None if layer.bias is None else layer.bias.dtype for layer in layers])
    return _Ready(_epoch[0], x.dtype, x.device, layers, dtypes, selected, parts, bound)


def _call(link: Link, layer: Layer, x: Tensor) -> Call:
    """What asks for a link alone, on a row that stands for any. All results have the type of x."""
    rows, columns = layer.weight.shape
    epilogue = link.epilogue
    if link.factor is not None:
        factor = x.new_empty((1, columns))
        epilogue = capture_functions(
            torch.float32, None, None, lambda value, batch, row, col: value * factor[row, col]
        ).epilogue
    functions = NO_FUNCTIONS if epilogue is None else Functions(epilogue=epilogue)
    return Call(x.new_empty((1, rows)), layer.weight, layer.bias, functions, x.dtype, layer.backend)


def _bound(links: tuple[Link, ...], layers: tuple[Layer, ...], selected: tuple[Selected, ...]) -> Bound | None:
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
