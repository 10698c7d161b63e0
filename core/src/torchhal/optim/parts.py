"""Which parameters of a group are updated together: those that have been updated equally often."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from torchhal.operands import PLAIN

State = dict[str, Any]


@dataclass(slots=True)
class Part:
    """Parameters of one group that are updated with the same numbers."""

    params: list[Tensor]
    grads: list[Tensor]
    states: list[State]
    step: int | Tensor = 2
    """How often they have been updated, this time included; for a rule that does not count, 1 or 2."""
    kept: list[list[Tensor]] = field(default_factory=list)
    """The state of each name, as :meth:`read` found it."""

    def read(self, names: tuple[str, ...]) -> None:
        """Read the state of each name, in one pass over the parameters."""
        if len(names) == 1:
            self.kept = [[state[names[0]] for state in self.states]]
        elif names:
            self.kept = list(map(list, zip(*map(operator.itemgetter(*names), self.states), strict=True)))

    def read_again(self, names: tuple[str, ...], counts: bool) -> bool:
        """Read it with the count, which has to be one for all; False where a closer look is needed."""
        try:
            self.read((*names, "step") if counts else names)
        except KeyError:
            return False
        if not counts:
            return True
        steps = self.kept.pop()
        return isinstance(steps[0], Tensor) and all(map(operator.is_, steps, repeat(steps[0])))


@dataclass(slots=True)
class Arrangement:
    """The parts of a group whose parameters all had a gradient: those of the next step, if nothing else changes.

    To look at 1000 parameters one by one takes longer than to update them, if they are small; to see that they are the same
    ones does not.
    """

    params: list[Tensor]
    grads: list[Tensor]
    names: tuple[str, ...]
    parts: list[Part]

    def again(self, params: list[Tensor], names: tuple[str, ...], counts: bool) -> list[Part] | None:
        """The parts with the gradients there are now; None where a closer look is needed."""
        if names != self.names or not same(params, self.params):
            return None
        grads = [p.grad for p in params]
        if not same(grads, self.grads):
            if not set(map(type, grads)) <= PLAIN or {g.layout for g in grads if g is not None} != {
                torch.strided
            }:
                return None
            self.grads = [g for g in grads if g is not None]
        for part in self.parts:
            in_order = len(self.parts) == 1 and same(part.params, self.params)
            part.grads = self.grads if in_order else [p.grad for p in part.params if p.grad is not None]
            part.step = 2
            if not part.read_again(names, counts):
                return None
        return self.parts


def same(items: Collection[Any], others: Collection[Any]) -> bool:
    """Whether two collections hold the same objects."""
    return len(items) == len(others) and all(map(operator.is_, items, others))


# ---------------------------------------------------------------------------- counts on the host


def count_again(part: Part) -> None:
    """One step more for a part whose count is nobody else's."""
    count = part.states[0]["step"]
    before = None if count.device.type != "cpu" else float(count)
    count.add_(1.0)
    part.step = count if before is None else int(before) + 1


def counted(parts: Iterable[Part]) -> Iterator[Part]:
    """One step more for each; parts that have come as far as one another share their count from then on.

    1000 counts in tensors of their own take longer to increase than 1000 small parameters to update.
    """
    merged: dict[float, Part] = {}
    for part in parts:
        before = float(part.states[0]["step"])
        found = merged.setdefault(before, Part([], [], [], int(before) + 1))
        found.params += part.params
        found.grads += part.grads
        found.states += part.states
    for before, part in merged.items():
        # A new one: parameters that have no gradient this time may share the old one.
        _share(part, torch.tensor(before + 1.0, dtype=torch.float32))
        yield part


def _share(part: Part, count: Tensor) -> None:
    for state in part.states:
        state["step"] = count


# ---------------------------------------------------------------------------- counts on the device


def counted_there(parts: Iterable[Part], states: Iterable[State]) -> Iterator[Part]:
    """:func:`counted` without asking the device how far parts have come; ``states`` are those of all parameters."""
    sharing = Counter([id(state.get("step")) for state in states])
    for part in parts:
        count = part.states[0]["step"]
        if sharing[id(count)] == len(part.states):
            count.add_(1.0)  # where it is, for a graph that is replayed counts on
        else:
            count = count + 1.0
            _share(part, count)
        part.step = count
        yield part


def share_equal_counts(states: Iterable[State]) -> None:
    """Let parameters share counts on a device that are equal, as those of a checkpoint are; waits for the device."""
    found: dict[tuple[torch.device, float], Tensor] = {}
    for state in states:
        count = state.get("step")
        if isinstance(count, Tensor):
            state["step"] = found.setdefault((count.device, float(count)), count)
