"""Which positions of the lists of a foreach_map call one plan can serve, and by which graphs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from torchhal._foreach_capture import BUILTINS, Function, Slot, captured_for, check_signature, name_of
from torchhal._foreach_checks import Entry, device_at, slots_at, uniform_slots
from torchhal.errors import CaptureError, InvalidProblem
from torchhal.pointwise import Captured, Graph


class Group(NamedTuple):
    """Positions of the lists that one plan serves."""

    device: torch.device
    captures: tuple[Captured, ...]
    """One for each combination of element types."""
    how: tuple[str, ...]
    """How each operand that the graphs take is passed: ``list``, ``scalars`` or ``scalar``."""
    kept: tuple[int, ...]
    """Which operands of the call those are; the others are numbers that the graphs contain."""
    positions: tuple[int, ...] | None = None
    """None for all."""


def grouped(fn: Function, entries: Sequence[Entry], length: int) -> list[Group]:
    """The positions of the lists, in groups that one plan serves."""
    slots = uniform_slots(entries)
    devices = {t.device for entry in entries if entry.how == "list" for t in entry.content}
    if slots is not None and len(devices) == 1:
        captured, taken = captured_by(fn, slots)
        if all(
            slot.number is None or entry.how == "scalar" for slot, entry in zip(taken, entries, strict=True)
        ):
            return [_group(devices.pop(), (captured,), taken, entries)]
    return _grouped_one_by_one(fn, entries, length)


def _grouped_one_by_one(fn: Function, entries: Sequence[Entry], length: int) -> list[Group]:
    graphs: dict[object, dict[object, Captured]] = {}
    found: dict[object, tuple[torch.device, tuple[Slot, ...], list[int]]] = {}
    for position in range(length):
        captured, taken = captured_by(fn, slots_at(entries, position))
        device = device_at(entries, position)
        # A backend finds a position's graph by its element types, so whatever else tells graphs apart is a group's.
        key = (
            device,
            tuple((s.kind, repr(s.number)) for s in taken),
            tuple(map(id, captured.tensors)),
            captured.structure,
        )
        graphs.setdefault(key, {}).setdefault(tuple(s.dtype for s in taken), captured)
        found.setdefault(key, (device, taken, []))[2].append(position)
    returned = {(c.structure, len(c.graph.outputs)) for group in graphs.values() for c in group.values()}
    if len(returned) > 1:
        raise InvalidProblem(
            "the function of foreach_map returns another number of values at some positions than at others"
        )
    return [
        _group(
            device, tuple(graphs[key].values()), taken, entries, None if len(found) == 1 else tuple(positions)
        )
        for key, (device, taken, positions) in found.items()
    ]


def _group(
    device: torch.device, captures: tuple[Captured, ...], taken: tuple[Slot, ...], entries: Sequence[Entry],
    positions: tuple[int, ...] | None = None,
) -> Group:  # fmt: skip
    kept = tuple([i for i, slot in enumerate(taken) if slot.number is None])
    return Group(device, captures, tuple([entries[i].how for i in kept]), kept, positions)


def captured_by(fn: Function, slots: tuple[Slot, ...]) -> tuple[Captured, tuple[Slot, ...]]:
    """:func:`captured_for`, which blames operands and keywords that ``fn`` does not take on the call."""
    try:
        return captured_for(fn, slots)
    except (CaptureError, TypeError) as error:
        check_signature(fn.call, len(slots), fn.kwargs)
        if isinstance(error, TypeError) and isinstance(fn.call, BUILTINS):
            raise InvalidProblem(
                f"{name_of(fn.call)} does not take these operands and keywords: {error}"
            ) from None
        raise


def graph_at(group: Group, kept: Sequence[Entry], position: int) -> Graph:
    """The graph of one position, by the element types of the operands that graphs take."""
    wanted = tuple(slot.dtype for slot in slots_at(kept, position))
    return next(c.graph for c in group.captures if tuple(spec.dtype for spec in c.graph.inputs) == wanted)
