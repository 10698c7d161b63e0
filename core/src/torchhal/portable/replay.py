"""Calls like an earlier one, started without working out their arguments again.

What a call gives to Triton is a few dozen numbers that follow from shapes and strides, and a few pointers. For a call of the
same shapes, strides and alignment only the pointers differ. So a first call is recorded, kernel by kernel, and a later one
puts its own tensors in the places of the recorded ones and starts the kernels that were compiled then.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from torch import Tensor

from torchhal.operands import AttentionOperands

ALIGNMENT: Final = 16
"""Bytes: Triton compiles one kernel for pointers at multiples of this and another for the rest."""
MOST: Final = 256
"""Recordings kept for a problem: a length that grows by one each time must not fill the memory."""


def kind_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    scale: float,
    operands: AttentionOperands | None,
) -> tuple[Any, ...] | None:
    """What the arguments of a call depend on beside pointers; None for a call that is not worth recording."""
    if attn_mask is not None:
        return None
    pointers = query.data_ptr() | key.data_ptr() | value.data_ptr()
    kind: tuple[Any, ...] = (
        scale, query.shape, key.shape, value.shape, query.stride(), key.stride(), value.stride(),
    )  # fmt: skip
    if operands is not None:
        others = tensors_of(operands)
        for tensor in others:
            pointers |= tensor.data_ptr()
        kind += (operands.dropout_p, *[(tensor.shape, tensor.stride()) for tensor in others])
    return None if pointers % ALIGNMENT else kind


def tensors_of(operands: AttentionOperands) -> list[Tensor]:
    """Every tensor that a call carries beside its main ones."""
    found = [*operands.captured, *operands.mask_captured]
    return found + list(operands.layout().values())


class Recording:
    """The kernels that one call started."""

    def __init__(self) -> None:
        self._launches: list[Launch] = []
        self.workspace = 0
        """Elements of the float32 workspace that the call had; 0 for none."""
        self.usable = True
        """Whether every tensor of the call was found again among the kernels' arguments."""

    def add(
        self, again: Callable[..., object], arguments: Sequence[Any], tensors: Sequence[Tensor | None]
    ) -> None:
        """Record one kernel: how to start it again, and its arguments, some of which are among ``tensors``."""
        places = []
        for place, argument in enumerate(arguments):
            source = _source(argument, tensors)
            if source is NOWHERE:
                self.usable = False
            if source is not None:
                places.append((place, source))
        self._launches.append(Launch(again, list(arguments), places))

    def replay(self, tensors: Sequence[Tensor | None]) -> None:
        """Start the kernels on other tensors, in the order of those that were recorded."""
        for launch in self._launches:
            launch(tensors)

    def release(self) -> None:
        """Forget the recorded tensors, which are not to be kept alive."""
        for launch in self._launches:
            launch.release()


def keep(recordings: dict[Any, Recording], kind: Any, recording: Recording | None) -> None:
    """Keep what was recorded of a kind of call, without its tensors, where it can be started again."""
    if recording is not None and recording.usable:
        recording.release()
        recordings[kind] = recording


NOWHERE: Final = object()
"""The source of a tensor that was made on the way and is not among those of the call."""

Source = Any
"""Where an argument comes from: the number of a tensor of the call; :class:`Base`; for a tuple the source of each part; None for a
constant."""


def _source(argument: Any, tensors: Sequence[Tensor | None]) -> Source:
    if isinstance(argument, Tensor):
        return next((i for i, tensor in enumerate(tensors) if tensor is argument), NOWHERE)
    if isinstance(argument, tuple):
        parts = tuple(_source(part, tensors) for part in argument)
        if any(part is NOWHERE for part in parts):
            return NOWHERE
        return None if all(part is None for part in parts) else parts
    base = getattr(argument, "base", None)
    if isinstance(base, Tensor):
        found = _source(base, tensors)
        return NOWHERE if found is NOWHERE else Base(found)
    return None


class Base(NamedTuple):
    """Where the tensor of a tensor descriptor comes from."""

    number: int


@dataclass(slots=True)
class Launch:
    """One kernel with its arguments."""

    again: Callable[..., object]
    template: list[Any]
    places: list[tuple[int, Source]]

    def __call__(self, tensors: Sequence[Tensor | None]) -> None:
        arguments = self.template.copy()
        for place, source in self.places:
            arguments[place] = (
                tensors[source] if type(source) is int else _filled(arguments[place], source, tensors)
            )
        self.again(*arguments)

    def release(self) -> None:
        for place, source in self.places:
            self.template[place] = _emptied(self.template[place], source)


def _filled(argument: Any, source: Source, tensors: Sequence[Tensor | None]) -> Any:
    """The argument with tensors of this call in their places."""
    if source is None:
        return argument
    if type(source) is int:
        return tensors[source]
    if type(source) is Base:
        return _described(argument, tensors[source.number])
    return tuple(_filled(part, where, tensors) for part, where in zip(argument, source, strict=True))


def _emptied(argument: Any, source: Source) -> Any:
    if source is None:
        return argument
    if type(source) is int:
        return None
    if type(source) is Base:
        return _described(argument, None)
    return tuple(_emptied(part, where) for part, where in zip(argument, source, strict=True))


def _described(descriptor: Any, tensor: Tensor | None) -> Any:
    """The descriptor of another tensor of the same shape, strides and alignment, which need not be checked again."""
    other = copy.copy(descriptor)
    other.base = tensor
    return other
