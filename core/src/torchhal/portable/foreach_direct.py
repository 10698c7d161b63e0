"""Calls of foreach in place on the tensors of an earlier call, as an optimizer makes them: nothing is worked out again.

What is launched follows from types, shapes, strides and addresses. An earlier call's are compared in a pass or two of torch's
own C++; Python asks each tensor only where there is no such pass, or once something has changed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal._caches import Bounded
from torchhal.derivatives import is_transformed
from torchhal.foreach_columns import LIST, NUMBER, SHARED
from torchhal.foreach_plans import Lists, Results
from torchhal.operands import PLAIN
from torchhal.portable.fitting import on_device
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


Launch = tuple[Form, Ready]
PLACES: Final = 16
"""Sets of addresses that are known of the tensors of a call: gradients come and go between a few places."""
BLOCK: Final = 128
"""Tensors that are asked all questions before the next ones are asked any, while their memory is in the cache. The questions
took 0.9, 0.75 and 0.4 ms of 4000 tensors one after the other, and 0.75, 0.55 and 0.3 ms so (profiled, host of an H100)."""


class _Block(NamedTuple):
    """Some tensors of one list."""

    where: slice
    """Among all tensors of the call."""
    check: Callable[..., bool]
    """Whether tensors are like those of the call in type, device, shape and strides."""
    order: list[int]
    """0, 1, ... for each."""
    written: bool


@dataclass(slots=True)
class _Known:
    """A call that was looked at closely, and where its tensors have been."""

    blocks: list[_Block] | None
    """None where tensors can not be compared quickly."""
    lengths: list[int]
    """How many tensors each operand has that is no number, and each list of destinations that is no operand."""
    sizes: list[int]
    """Elements at each position."""
    bytes: Tensor
    """Of each tensor, int64."""
    launches: dict[tuple[Any, ...], Launch]
    """By stream and addresses."""
    last: tuple[Any, list[list[int]], Launch] | None = None
    """The last of them: its stream, and addresses by blocks."""

    def is_like(self, other: _Known) -> bool:
        """Whether what is known of another call's addresses holds for this one, for want of a quick check."""
        same = (self.lengths, self.sizes) == (other.lengths, other.sizes)
        return same and other.blocks is None and torch.equal(self.bytes, other.bytes)


class _Calls:
    """Serves the calls of one problem, and knows the last ones."""

    def __init__(self, problem: ForeachProblem, mapper: Mapper) -> None:
        (self.graph,) = problem.functions
        self.device = problem.device
        self.mapper = mapper
        self.known: dict[tuple[object, ...], _Known] = Bounded(MOST)

    def __call__(self, operands: Sequence[Any], out: Lists) -> Results | None:
        kinds = tuple([_kind(entry) for entry in operands])
        places = tuple([_place(items, operands) for items in out])
        given: list[Sequence[Tensor]] = [
            entry if kind == LIST else [entry]
            for entry, kind in zip(operands, kinds, strict=True)
            if kind != NUMBER
        ]
        given += [items for items, place in zip(out, places, strict=True) if place is None]
        tensors = list(chain.from_iterable(given))
        if not tensors:
            return None
        with on_device(tensors[0]):
            key = (kinds, places, len(tensors), id(tensors[0]))
            known = self.known.get(key)
            there = None if known is None else self._compare(known, tensors)
            if known is None or there is None:
                looked = self._look(operands, kinds, out, given, tensors)
                if looked is None:
                    return None
                if known is None or not looked.is_like(known):
                    known = self.known[key] = looked
            launch = known.last[2] if there and known.last else self._launch(known, kinds, places, tensors)
            if launch is None:
                return None
            numbers = [bits_of(entry) for entry in operands if type(entry) is float]
            self.mapper.launch(*launch, (), numbers)
        if there is None:
            torch.autograd.graph.increment_version([t for items in out for t in items])
        return out  # type: ignore[return-value]

    def _compare(self, known: _Known, tensors: list[Tensor]) -> bool | None:
        """Whether tensors are where those of the last call were, and on its stream; None where they are not like those.

        Of destinations it notes on the way that they are written.
        """
        if known.blocks is None:
            return None
        last = known.last
        there = last is not None and last[0] == stream_of(self.device) and not is_capturing(self.device)
        for number, (where, check, order, written) in enumerate(known.blocks):
            part = tensors[where]
            if not check(*part):
                return None
            there = there and last is not None and _are_at(part, last[1][number], order)
            if written:
                torch.autograd.graph.increment_version(part)
        return there

    def _launch(
        self, known: _Known, kinds: tuple[int, ...], places: tuple[int | None, ...], tensors: list[Tensor]
    ) -> Launch | None:
        """What computes with tensors where they are now; None where a destination overlaps with anything."""
        capturing = is_capturing(self.device)
        stream = stream_of(self.device)
        pointers = list(map(Tensor.data_ptr, tensors))
        key = (stream, *pointers)
        found = None if capturing else known.launches.get(key)
        if found is None:
            if _overlap(pointers, known.bytes):
                return None
            part = self._part(known, kinds, places, pointers)
            found = (part.form, self.mapper.uploaded(part))
        if not capturing:
            known.launches[key] = found
            known.last = (stream, [pointers[block.where] for block in known.blocks or ()], found)
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
        written = {id(items) for items in out}
        written |= {
            id(entry)
            for entry, kind in zip(operands, kinds, strict=True)
            if kind == LIST and _is_among(entry, out)
        }
        return _Known(
            _blocks([(items, id(items) in written) for items in given]), [len(items) for items in given],
            [shape.numel() for shape in shapes], torch.tensor([t.nbytes for t in tensors]), Bounded(PLACES),
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
    found = [
        index for index, entry in enumerate(operands) if _kind(entry) == LIST and _are_same(items, entry)
    ]
    return found[0] if found else None


def _is_among(entry: Sequence[Tensor], out: Lists) -> bool:
    return any([_are_same(entry, items) for items in out])  # noqa: C419 (a list is quicker)


def _are_same(items: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return items is others or (items[0] is others[0] and all(map(operator.is_, items, others)))


def _overlap(pointers: list[int], sizes: Tensor) -> bool:
    """Whether any two tensors share memory; each is given once."""
    some = sizes > 0
    starts, order = torch.tensor(pointers)[some].sort()
    return bool((starts[:-1] + sizes[some][order][:-1] > starts[1:]).any())


# ---------------------------------------------------------------------------- torch's own passes


def _blocks(lists: Sequence[tuple[Sequence[Tensor], bool]]) -> list[_Block] | None:
    """Lists, and whether they are written, in blocks; None where torch does not have what compares them.

    These are the guards of torch's compiler, which look at a tensor in 60 ns. They are nobody's public interface.
    """
    found: list[_Block] = []
    at = 0
    try:
        from torch._C._dynamo.guards import TensorGuards

        for items, written in lists:
            for start in range(0, len(items), BLOCK):
                part = items[start : start + BLOCK]
                sizes: Any = [list(t.shape) for t in part]
                strides: Any = [list(t.stride()) for t in part]
                check = TensorGuards(*part, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
                found.append(_Block(slice(at, at + len(part)), check, list(range(len(part))), written))
                at += len(part)
    except (ImportError, AttributeError, TypeError):
        return None
    return found


_compared: Final[Callable[..., bool] | None] = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
"""Of builds of torch for accelerators."""


def _are_at(tensors: list[Tensor], pointers: list[int], order: list[int]) -> bool:
    """Whether tensors are at these addresses."""
    if _compared is not None:
        return bool(_compared(tensors, pointers, order))
    return list(map(Tensor.data_ptr, tensors)) == pointers
