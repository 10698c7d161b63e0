"""Destinations of foreach_map: that results fit them, and that no write can change what is still to be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal._foreach_checks import Entry, shapes_at
from torchhal.errors import InvalidProblem
from torchhal.pointwise import Graph
from torchhal.reference.foreach import depends_on, output_shape


def destinations(out: Any, structure: str, outputs: int, length: int) -> tuple[Sequence[Tensor], ...]:
    """``out`` as one list for each output.

    Raises:
        InvalidProblem: it has not the structure of the result.
    """
    wanted = f"a tuple of {outputs} lists" if structure == "tuple" else "a list"
    lists = tuple(out) if structure == "tuple" and isinstance(out, (tuple, list)) else (out,)
    if len(lists) != outputs or not all(isinstance(items, (list, tuple)) for items in lists):
        raise InvalidProblem(
            f"out expects {wanted} of tensors, as the function returns, and got {_shown(out)}"
        )
    for items in lists:
        if len(items) != length:
            raise InvalidProblem(
                f"out must be as long as the operands, {length} tensors, and a list of it has {len(items)}"
            )
        if not all(isinstance(t, Tensor) for t in items):
            raise InvalidProblem(f"out expects {wanted} of tensors and got {_shown(items)}")
    return lists


def _shown(item: Any) -> str:
    if isinstance(item, (list, tuple)):
        return (
            f"a {type(item).__name__} of {', '.join(sorted({type(i).__name__ for i in item})) or 'nothing'}"
        )
    return type(item).__name__


def fits_plainly(
    graph: Graph, device: torch.device, entries: Sequence[Entry], lists: Sequence[Sequence[Tensor]]
) -> bool:
    """Whether every destination has the shape of the operands, which is one, and nothing else stands in the way."""
    shapes = next([t.shape for t in entry.content] for entry in entries if entry.how == "list")
    grad = torch.is_grad_enabled()
    for dtype, needed, items in zip(graph.output_dtypes, depends_on(graph), lists, strict=True):
        types_fit = all(torch.can_cast(dtype, held) for held in {t.dtype for t in items})
        plain = {t.device for t in items} == {device} and not (grad and any(t.requires_grad for t in items))
        if not (needed and types_fit and plain and [t.shape for t in items] == shapes):
            return False
    return True


def check_fit(
    graph: Graph, device: torch.device, position: int, entries: Sequence[Entry], found: Sequence[Tensor]
) -> None:
    """Refuse destinations that the results at ``position`` can not be written to, by type, shape or autograd.

    Args:
        graph: of the function, at this position.
        device: where it is computed.
        position: of the lists.
        entries: the operands that the graph takes.
        found: the destination of each output.

    Raises:
        InvalidProblem: a result's type can not be cast to the destination's, or its shape not broadcast to it.
        RuntimeError: torch's own, for a leaf that requires grad.
    """
    shapes = shapes_at(entries, position)
    for dtype, needed, destination in zip(graph.output_dtypes, depends_on(graph), found, strict=True):
        if destination.device != device:
            raise InvalidProblem(
                f"the result at position {position} is on {device} and its destination on {destination.device}"
            )
        if not torch.can_cast(dtype, destination.dtype):
            held = f"{destination.dtype}, which can not hold it; convert inside the function, or pass a destination of that type"
            raise InvalidProblem(f"the result at position {position} is {dtype} and its destination {held}")
        _check_shape(position, output_shape(needed, shapes), destination.shape)
        if destination.requires_grad and destination.is_leaf and torch.is_grad_enabled():
            raise RuntimeError("a leaf Variable that requires grad is being used in an in-place operation.")


def _check_shape(position: int, shape: torch.Size, wanted: torch.Size) -> None:
    try:
        fits = torch.broadcast_shapes(shape, wanted) == wanted  # type: ignore[no-untyped-call]
    except RuntimeError:
        fits = False
    if not fits:
        raise InvalidProblem(
            f"the result at position {position} has the shape {tuple(shape)} and its destination {tuple(wanted)}"
        )


# ---------------------------------------------------------------------------- aliasing


class _Span(NamedTuple):
    start: int
    end: int
    order: int
    """Tells spans apart before the tensors are compared, which they can not be."""
    tensor: Tensor
    position: int
    """``_SCALAR`` or ``_CAPTURED`` for a tensor that is read at every one."""
    written: bool


_SCALAR: Final = -1
_CAPTURED: Final = -2


def check_aliasing(
    entries: Sequence[Entry], lists: Sequence[Sequence[Tensor]], captured: Sequence[Tensor] = ()
) -> None:
    """Refuse destinations that share memory with one another, themselves, or an operand they are not exactly.

    Args:
        entries: the operands.
        lists: the destinations.
        captured: tensors that the function captures, with which no destination may share memory.

    Raises:
        InvalidProblem: says which destination and what it shares memory with.
    """
    spans: list[_Span] = []
    for items in lists:
        for position, tensor in enumerate(items):
            _add(spans, tensor, position, True)
            if not tensor.is_contiguous() and torch._debug_has_internal_overlap(tensor) == 1:
                raise InvalidProblem(
                    f"the destination at position {position} is expanded: its elements share memory; clone it"
                )
    for entry in entries:
        if entry.how == "list":
            for position, tensor in enumerate(entry.content):
                if not any(tensor is items[position] for items in lists):
                    _add(spans, tensor, position, False)
        elif isinstance(entry.content, Tensor):
            _add(spans, entry.content, _SCALAR, False)
    for tensor in captured:
        _add(spans, tensor, _CAPTURED, False)
    _sweep(spans)


def _add(spans: list[_Span], tensor: Tensor, position: int, written: bool) -> None:
    if type(tensor) not in (Tensor, torch.nn.Parameter) or not tensor.numel():
        return  # tensors that are being traced have no address; there, everything is computed before anything is written
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        length = tensor.nbytes
    else:
        furthest = sum(
            (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        )
        length = (furthest + 1) * tensor.element_size()
    spans.append(_Span(start, start + length, len(spans), tensor, position, written))


def _sweep(spans: list[_Span]) -> None:
    spans.sort(key=lambda span: span[:3])
    active: list[_Span] = []
    for span in spans:
        active = [other for other in active if other.end > span.start]
        for other in active:
            if (span.written or other.written) and _conflict(span, other):
                raise InvalidProblem(_conflict_text(*((span, other) if span.written else (other, span))))
        active.append(span)


def _conflict(one: _Span, other: _Span) -> bool:
    if one.tensor.device != other.tensor.device:
        return False
    if (
        not (one.written and other.written)
        and one.position == other.position
        and _same(one.tensor, other.tensor)
    ):
        return False
    return _share_elements(one, other)


def _share_elements(one: _Span, other: _Span) -> bool:
    """Whether two tensors whose spans of memory overlap really share an element, or only interleave."""
    if one.tensor.is_contiguous() and other.tensor.is_contiguous():
        return True
    if one.tensor.element_size() != other.tensor.element_size():
        return True
    return bool(torch.isin(_addresses(one), _addresses(other)).any())


def _addresses(span: _Span) -> Tensor:
    addresses = torch.tensor(span.start)
    for size, stride in zip(span.tensor.shape, span.tensor.stride(), strict=True):
        addresses = addresses.unsqueeze(-1) + torch.arange(size) * (stride * span.tensor.element_size())
    return addresses.flatten()


def _same(one: Tensor, other: Tensor) -> bool:
    return (one.data_ptr(), one.shape, one.stride(), one.dtype) == (
        other.data_ptr(),
        other.shape,
        other.stride(),
        other.dtype,
    )


def _conflict_text(written: _Span, other: _Span) -> str:
    if other.written:
        return f"the destinations at positions {written.position} and {other.position} share memory; each result needs memory of its own"
    if other.position == _CAPTURED:
        return f"the destination at position {written.position} shares memory with a tensor that the function captures; clone that one"
    where = "passed as a scalar" if other.position == _SCALAR else f"at position {other.position}"
    advice = "a destination may be exactly the operand of its own position, or share nothing with any; clone one of them"
    return f"the destination at position {written.position} shares memory with an operand {where}; {advice}"
