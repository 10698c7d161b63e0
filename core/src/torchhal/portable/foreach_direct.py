"""Calls of foreach in place on the tensors of an earlier call, as an optimizer makes them: nothing is worked out again.

What is launched follows from types, shapes, strides and addresses. An earlier call's are compared in a pass or two of torch's
own C++; Python asks each tensor only where there is no such pass, or once something has changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.derivatives import is_transformed
from torchhal.foreach_columns import LIST, NUMBER, PLAIN, SHARED
from torchhal.foreach_plans import Lists, Results
from torchhal.portable.attention import on_device
from torchhal.portable.foreach import Mapper, Part, Ready, bits_of, is_aligned
from torchhal.portable.foreach_kernels import Form
from torchhal.portable.foreach_tables import MOST
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import depends_on
from torchhal.streams import is_capturing, stream_of

Direct = Callable[[Sequence[Any], Lists | None], Results | None]


def direct(problem: ForeachProblem, mapper: Mapper) -> Direct | None:
    """The ``direct`` of a plan, as :class:`torchhal.Plan` has it; None for a problem that always needs a closer look."""
    (graph, *others) = problem.functions
    listed = {index for index, how in enumerate(problem.operands) if how == "list"}
    if others or graph.captured or problem.reduction is not None or "scalars" in problem.operands:
        return None
    if not problem.in_place or not all(listed & needed for needed in depends_on(graph)):
        return None
    calls = _Calls(problem, mapper)

    def run(operands: Sequence[Any], out: Lists | None) -> Results | None:
        if out is None or is_transformed() or torch._C._len_torch_dispatch_stack():
            return None
        return calls(operands, out)

    return run


@dataclass(slots=True)
class _Known:
    """A call that was looked at closely, and where its tensors have been."""

    check: Callable[..., bool] | None
    """Whether tensors are like those of the call in type, device, shape and strides; None where that can not be told quickly."""
    lengths: list[int]
    """How many tensors each operand has that is no number, and each list of destinations that is no operand."""
    sizes: list[int]
    """Elements at each position."""
    bytes: Tensor
    """Of each tensor, int64."""
    order: list[int]
    """0, 1, ... for each tensor."""
    launches: dict[tuple[Any, ...], Launch]
    """By stream and addresses."""
    last: tuple[Any, list[int], Launch] | None = None
    """The last of them."""

    def is_like(self, other: _Known) -> bool:
        """Whether what is known of another call's addresses holds for this one, for want of a quick check."""
        same = (self.lengths, self.sizes) == (other.lengths, other.sizes)
        return same and other.check is None and torch.equal(self.bytes, other.bytes)


Launch = tuple[Form, Ready]


class _Calls:
    """Serves the calls of one problem, and knows the last ones."""

    def __init__(self, problem: ForeachProblem, mapper: Mapper) -> None:
        (self.graph,) = problem.functions
        self.device = problem.device
        self.mapper = mapper
        self.known: dict[tuple[object, ...], _Known] = {}

    def __call__(self, operands: Sequence[Any], out: Lists) -> Results | None:
        kinds = tuple([_kind(entry) for entry in operands])
        places = tuple([_place(items, operands) for items in out])
        given: list[Sequence[Tensor]] = [
            entry if kind == LIST else [entry]
            for entry, kind in zip(operands, kinds, strict=True)
            if kind != NUMBER
        ]
        given += [items for items, place in zip(out, places, strict=True) if place is None]
        tensors = [tensor for items in given for tensor in items]
        if not tensors:
            return None
        with on_device(tensors[0]):
            key = (kinds, places, len(tensors), id(tensors[0]))
            known = self.known.get(key)
            if known is None or known.check is None or not known.check(*tensors):
                looked = self._look(operands, kinds, out, given, tensors)
                if looked is None:
                    return None
                if known is None or not looked.is_like(known):
                    known = self._remember(key, looked)
            launch = self._launch(known, kinds, places, tensors)
            if launch is None:
                return None
            numbers = [bits_of(entry) for entry in operands if type(entry) is float]
            self.mapper.launch(*launch, (), numbers)
        torch.autograd.graph.increment_version([t for items in out for t in items])
        return out  # type: ignore[return-value]

    def _remember(self, key: tuple[object, ...], known: _Known) -> _Known:
        if len(self.known) >= MOST:
            self.known.pop(next(iter(self.known)))
        self.known[key] = known
        return known

    def _launch(
        self, known: _Known, kinds: tuple[int, ...], places: tuple[int | None, ...], tensors: list[Tensor]
    ) -> Launch | None:
        """What computes with tensors where they are now; None where a destination overlaps with anything."""
        capturing = is_capturing(self.device)
        stream = stream_of(self.device)
        if known.last is not None and not capturing:
            at, pointers, launch = known.last
            if at == stream and _are_at(tensors, pointers, known.order):
                return launch
        pointers = list(map(Tensor.data_ptr, tensors))
        key = (stream, *pointers)
        found = None if capturing else known.launches.get(key)
        if found is None:
            if _overlap(pointers, known.bytes):
                return None
            part = self._part(known, kinds, places, pointers)
            found = (part.form, self.mapper.uploaded(part))
        if not capturing:
            if len(known.launches) >= MOST:
                known.launches.pop(next(iter(known.launches)))
            known.launches[key] = found
            known.last = (stream, pointers, found)
        return found

    def _part(
        self, known: _Known, kinds: tuple[int, ...], places: tuple[int | None, ...], pointers: list[int]
    ) -> Part:
        """All positions of a call, with the addresses of its tensors."""
        ends = list(accumulate(known.lengths))
        given = iter([pointers[end - length : end] for end, length in zip(ends, known.lengths, strict=True)])
        fields = [[0] if kind == NUMBER else next(given) for kind in kinds]
        fields += [next(given) if place is None else fields[place] for place in places]
        form = Form(self.graph, kinds, aligned=is_aligned(pointers))
        return Part(form, range(len(known.sizes)), known.sizes, None, fields)

    def _look(
        self,
        operands: Sequence[Any],
        kinds: tuple[int, ...],
        out: Lists,
        given: list[Sequence[Tensor]],
        tensors: list[Tensor],
    ) -> _Known | None:
        """The call looked at closely; None for one that is not of the kind that is served here."""
        lists = [entry for entry, kind in zip(operands, kinds, strict=True) if kind == LIST]
        shapes = [t.shape for t in lists[0]]
        if not self._are_plain(operands, kinds, out) or not all(
            [t.shape for t in items] == shapes for items in (*lists[1:], *out)
        ):
            return None
        return _Known(
            _checking(tensors), [len(items) for items in given], [shape.numel() for shape in shapes],
            torch.tensor([t.nbytes for t in tensors]), list(range(len(tensors))), {},
        )  # fmt: skip

    def _are_plain(self, operands: Sequence[Any], kinds: tuple[int, ...], out: Lists) -> bool:
        """Whether tensors are contiguous, of the problem's types, and on its device."""
        wanted = [spec.dtype for spec in self.graph.inputs]
        given = zip(
            (*operands, *out), (*kinds, *[LIST] * len(out)), (*wanted, *self.graph.output_dtypes), strict=True
        )
        for entry, kind, dtype in given:
            if kind == NUMBER:
                continue
            items = entry if kind == LIST else [entry]
            if not set(map(type, items)) <= PLAIN:
                return False
            if {(t.dtype, t.device, t.layout) for t in items} != {(dtype, self.device, torch.strided)}:
                return False
            if not all([t.is_contiguous() and not t.is_neg() for t in items]):  # noqa: C419 (a list is quicker)
                return False
        return True


def _kind(entry: Any) -> int:
    if type(entry) is float:
        return NUMBER
    return SHARED if isinstance(entry, Tensor) else LIST


def _place(items: Sequence[Tensor], operands: Sequence[Any]) -> int | None:
    """Which operand a list of destinations is; None for none of them."""
    for index, entry in enumerate(operands):
        if entry is items:
            return index
    for index, entry in enumerate(operands):
        if _kind(entry) == LIST and all(map(operator.is_, items, entry)):
            return index
    return None


def _overlap(pointers: list[int], sizes: Tensor) -> bool:
    """Whether any two tensors share memory; each is given once."""
    some = sizes > 0
    starts, order = torch.tensor(pointers)[some].sort()
    return bool((starts[:-1] + sizes[some][order][:-1] > starts[1:]).any())


# ---------------------------------------------------------------------------- torch's own passes


def _checking(tensors: list[Tensor]) -> Callable[..., bool] | None:
    """What compares other tensors with these in C++: the guards of torch's compiler, 60 ns a tensor."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        dimensions: Any = [[list(t.shape) for t in tensors], [list(t.stride()) for t in tensors]]
        guards = TensorGuards(*tensors, dynamic_dims_sizes=dimensions[0], dynamic_dims_strides=dimensions[1])
        return guards.check
    except (ImportError, AttributeError, TypeError):  # they are nobody's public interface
        return None


_compare: Final[Callable[..., bool] | None] = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
"""Of builds of torch for accelerators."""


def _are_at(tensors: list[Tensor], pointers: list[int], order: list[int]) -> bool:
    """Whether tensors are at these addresses."""
    if _compare is not None:
        return bool(_compare(tensors, pointers, order))
    return list(map(Tensor.data_ptr, tensors)) == pointers
