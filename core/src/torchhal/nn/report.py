"""What a swap did to a model, and the way back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchhal.errors import InvalidProblem


@dataclass(frozen=True)
class Swapped:
    """One module that was swapped."""

    name: str
    """Its path in the model."""
    kind: str
    """``FusedLinear``, ``FusedMLP`` or ``PackedEmbedding``."""
    weight: str
    """``dense``, or the scheme it is packed in."""
    note: str = ""
    """Why it is not packed as was asked, or what it shares its weight with."""


@dataclass(frozen=True)
class Left:
    """One module that stays as it was."""

    name: str
    why: str


@dataclass(frozen=True)
class Step:
    """One change of a model, which can be taken back where ``undo`` is known."""

    parent: nn.Module
    child: str
    new: nn.Module
    undo: Callable[[], nn.Module] | None
    """Gives the module that was there before, with the parameters that the new one has now."""

    def is_in_place(self) -> bool:
        """Whether nobody replaced the new module since."""
        return self.parent._modules.get(self.child) is self.new


@dataclass
class LinearReport:
    """What :func:`torchhal.nn.optimize_linear` or :func:`torchhal.nn.load_packed` did."""

    swapped: tuple[Swapped, ...]
    left: tuple[Left, ...]
    bytes_before: int
    """Of all parameters and buffers of the model, shared memory counted once, tensors without memory not at all."""
    bytes_after: int
    steps: list[Step] = field(default_factory=list, repr=False)

    def restore(self) -> None:
        """Put every module back where it was, on the parameters the model has now: bit by bit the same weights, where
        they were not trained since.

        Raises:
            InvalidProblem: originals of packed weights were not kept, this was done before, or a module was replaced, pruned or
                parametrized since; the model stays as it is then.
        """
        lost = sum(step.undo is None for step in self.steps)
        if lost:
            raise InvalidProblem(
                f"{lost} modules can not be restored, because their weights were packed and the originals not kept; pass "
                "keep_original=True when swapping, or load the model again"
            )
        if self.swapped and not self.steps:
            raise InvalidProblem("the model was restored before; a report restores once")
        replaced = [step.child for step in self.steps if not step.is_in_place()]
        if replaced:
            raise InvalidProblem(
                f"{', '.join(replaced)} was replaced after the swap; put it back before restore(), in the reverse order of the swaps"
            )
        steps = self.steps[::-1]
        modules = [
            step.undo() for step in steps if step.undo is not None
        ]  # all of them, before any is put in
        for step, module in zip(steps, modules, strict=True):
            step.parent._modules[step.child] = module
        self.steps = []

    def to_json(self) -> str:
        """The report as JSON."""
        content = {
            "swapped": [vars(entry) for entry in self.swapped],
            "left": [vars(entry) for entry in self.left],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }
        return json.dumps(content, indent=2)

    def __str__(self) -> str:
        size = f"{self.bytes_before / 1e6:.1f} MB before, {self.bytes_after / 1e6:.1f} MB after"
        lines = [f"{len(self.swapped)} modules swapped, {len(self.left)} left; {size}"]
        for entry in self.swapped:
            note = f" ({entry.note})" if entry.note else ""
            lines.append(f"  {entry.name}: {entry.kind}, {entry.weight}{note}")
        lines += [f"  {entry.name}: left, because {entry.why}" for entry in self.left]
        return "\n".join(lines)


def bytes_of(model: nn.Module) -> int:
    """Bytes of the memory behind a model's parameters and buffers."""
    storages = map(storage_of, (*model.parameters(), *model.buffers()))
    return sum({s._cdata: s.nbytes() for s in storages if s is not None}.values())


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """The memory of a tensor; None where it has none yet (meta, lazy) or none of its own (sparse)."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout != torch.strided:
        return None
    return tensor.untyped_storage()
