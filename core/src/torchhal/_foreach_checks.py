"""What is wrong with a foreach_map call, in words: expected, arrived, what to do; and how operands arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchhal._foreach_capture import Slot
from torchhal.errors import InvalidProblem
from torchhal.pointwise import Kind
from torchhal.reference.foreach import NUMBER_DTYPES

Number = bool | int | float


class Entry(NamedTuple):
    """One operand of a call."""

    how: str
    """``list`` of tensors, ``scalars`` (a list of numbers) or ``scalar`` (a number or a 0-dim tensor)."""
    content: Any


def arrange(operands: Sequence[Any]) -> tuple[list[Entry], int]:
    """Each operand and how it is passed, and the common length of the lists.

    Raises:
        InvalidProblem: no list of tensors, lists of different lengths, or an operand that is neither list nor scalar.
    """
    entries = [_entry(index, operand) for index, operand in enumerate(operands)]
    lengths = [len(entry.content) for entry in entries if entry.how != "scalar"]
    if not any(entry.how == "list" for entry in entries) and not (lengths and lengths[0] == 0):
        shown = ", ".join(type(o).__name__ for o in operands) or "no operands"
        raise InvalidProblem(
            f"foreach_map expects at least one list of tensors among its operands and got {shown}"
        )
    if len(set(lengths)) > 1:
        shown = ", ".join(str(length) for length in lengths)
        raise InvalidProblem(
            f"the lists of foreach_map must have one length, and have {shown}; nothing is cut or repeated"
        )
    return entries, lengths[0]


def _entry(index: int, operand: Any) -> Entry:
    if isinstance(operand, (list, tuple)):
        return _list_entry(index, operand)
    if isinstance(operand, Tensor):
        if operand.dim():
            advice = "pass a list of tensors ([x] * n to use one n times), or a 0-dim tensor as a scalar"
            raise InvalidProblem(
                f"operand {index} of foreach_map is one tensor of shape {tuple(operand.shape)}; {advice}"
            )
        return Entry("scalar", operand)
    return Entry("scalar", _number(index, operand))


def _list_entry(index: int, items: Sequence[Any]) -> Entry:
    types = set(map(type, items))
    if all(issubclass(kind, Tensor) for kind in types):
        return Entry("list", items)
    if not any(issubclass(kind, Tensor) for kind in types):
        return Entry(
            "scalars", items if types <= set(NUMBER_DTYPES) else [_number(index, item) for item in items]
        )
    shown = ", ".join(sorted(kind.__name__ for kind in types))
    raise InvalidProblem(
        f"a list of foreach_map holds tensors or numbers, not both; operand {index} holds {shown}"
    )


def _number(index: int, item: Any) -> Number:
    if type(item) in NUMBER_DTYPES:
        return item  # type: ignore[no-any-return]
    for kind in (int, float):  # numpy's float64 and enums are floats and ints with a type of their own
        if isinstance(item, kind):
            return kind(item)
    expected = "a list of tensors, a list of numbers, a number or a 0-dim tensor"
    raise InvalidProblem(f"operand {index} of foreach_map expects {expected} and got {type(item).__name__}")


# ---------------------------------------------------------------------------- how operands arrive


def tensor_slot(tensor: Tensor) -> Slot:
    return Slot(tensor.dtype, Kind.LANE if tensor.dim() else Kind.SCALAR)


def number_slot(number: Number) -> Slot:
    return Slot(NUMBER_DTYPES[type(number)], Kind.NUMBER, number)


def slots_at(entries: Sequence[Entry], position: int) -> tuple[Slot, ...]:
    """What arrives at one position of the lists."""
    picked = [entry.content if entry.how == "scalar" else entry.content[position] for entry in entries]
    return tuple(tensor_slot(item) if isinstance(item, Tensor) else number_slot(item) for item in picked)


def uniform_slots(entries: Sequence[Entry]) -> tuple[Slot, ...] | None:
    """What arrives at every position, where that is the same but for the numbers in lists; else None."""
    for entry in entries:
        if entry.how == "list":
            items = entry.content
            shapes = [t.shape for t in items]
            if len({t.dtype for t in items}) > 1 or (_SCALAR in shapes and any(shapes)):
                return None
        elif entry.how == "scalars" and len(set(map(type, entry.content))) > 1:
            return None
    return slots_at(entries, 0)


_SCALAR = torch.Size(())


def slots_of_nothing(entry: Entry) -> Slot:
    """What stands for an operand of empty lists, whose element types nobody knows."""
    if entry.how == "list":
        return Slot(torch.float32, Kind.LANE)
    if isinstance(entry.content, Tensor):
        return tensor_slot(entry.content)
    return number_slot(entry.content if entry.how == "scalar" else 0.0)


def check_layouts(entries: Sequence[Entry]) -> None:
    """Refuse tensors that are not dense."""
    for index, entry in enumerate(entries):
        tensors = (
            entry.content
            if entry.how == "list"
            else [entry.content]
            if isinstance(entry.content, Tensor)
            else []
        )
        for tensor in tensors:
            if tensor.is_nested or tensor.layout is not torch.strided:
                kind = "nested" if tensor.is_nested else tensor.layout
                raise InvalidProblem(
                    f"operand {index} of foreach_map holds a {kind} tensor; use dense ones, such as its .values()"
                )


def device_at(entries: Sequence[Entry], position: int) -> torch.device:
    """Where the tensors of one position are; 0-dim CPU tensors go with the others, as in torch.

    Raises:
        InvalidProblem: they are on several devices.
    """
    tensors = [entry.content[position] for entry in entries if entry.how == "list"]
    tensors += [
        entry.content for entry in entries if entry.how == "scalar" and isinstance(entry.content, Tensor)
    ]
    fixed: set[torch.device] = {t.device for t in tensors if t.dim() or t.device.type != "cpu"} or {
        tensors[0].device
    }
    if len(fixed) > 1:
        shown = " and ".join(sorted(map(str, fixed)))
        raise InvalidProblem(
            f"the tensors at position {position} of the lists are on {shown}; move them to one device"
        )
    (device,) = fixed
    return device


def shapes_at(entries: Sequence[Entry], position: int) -> list[torch.Size | None]:
    """Shapes at one position; None for a number."""
    items = [entry.content if entry.how == "scalar" else entry.content[position] for entry in entries]
    return [item.shape if isinstance(item, Tensor) else None for item in items]


def check_shapes(entries: Sequence[Entry]) -> bool:
    """Whether all tensors with dimensions have one shape at each position.

    Raises:
        InvalidProblem: some do not broadcast; says where.
    """
    lists = [[t.shape for t in entry.content] for entry in entries if entry.how == "list"]
    if all(shapes == lists[0] for shapes in lists[1:]):
        return True
    for position, shapes in enumerate(zip(*lists, strict=True)):
        try:
            torch.broadcast_shapes(*shapes)  # type: ignore[no-untyped-call]
        except RuntimeError:
            shown = ", ".join(str(tuple(shape)) for shape in shapes)
            raise InvalidProblem(
                f"the tensors at position {position} of the lists do not broadcast: their shapes are {shown}"
            ) from None
    return False
