"""The graph every user function becomes: immutable, canonical, hashable, printable, storable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from torchhal.pointwise.dtypes import NAME_OF, Number, is_float

Attribute = bool | int | str | None


class Node(NamedTuple):
    """One value of a graph; its id is its position in :attr:`Graph.nodes`.

    Attributes:
        primitive: a name in :data:`~torchhal.pointwise.primitives.PRIMITIVES`.
        operands: ids of earlier nodes.
        dtype: the result's dtype.
        attribute: the input's position (``input``), the captured tensor's position (``gather``), the
            number (``constant``: an int, a bool, or a float written as ``repr`` writes it), else None. A number
            has the precision of ``dtype``, apart from the exponent of a float32 ``pow``, which may have float64's
            and which a backend may round.
    """

    primitive: str
    operands: tuple[int, ...]
    dtype: torch.dtype
    attribute: Attribute = None

    @property
    def value(self) -> Number:
        """The number of a ``constant`` node, infinities and nan included."""
        if self.primitive != "constant" or self.attribute is None:
            raise TypeError(f"{self.primitive} is no constant, so it has no value")
        return float(self.attribute) if isinstance(self.attribute, str) else self.attribute

    @property
    def position(self) -> int:
        """Which input (``input``) or which captured tensor (``gather``) the node reads."""
        if not isinstance(self.attribute, int) or self.primitive not in ("input", "gather"):
            raise TypeError(f"{self.primitive} reads neither an input nor a captured tensor")
        return self.attribute


class Input(NamedTuple):
    """A scalar argument of the user's function."""

    name: str
    dtype: torch.dtype


class CapturedSpec(NamedTuple):
    """What a graph knows of a captured tensor: its dtype and rank, never its sizes or data."""

    dtype: torch.dtype
    ndim: int


@dataclass(frozen=True)
class Graph:
    """A pointwise function: scalars in, scalars out, reading captured tensors by index.

    Built by :func:`~torchhal.pointwise.capture`, :meth:`from_text`, or a
    :class:`~torchhal.pointwise.GraphBuilder`, all of which give the canonical form: no dead node, no
    node twice, constants folded, nodes numbered in the order a depth-first walk from the outputs
    finishes them. Two functions that compute the same thing in the same way are therefore equal.

    ``gather`` semantics: its operands are int32 or int64 indices, one per dimension of the captured
    tensor (none for a 0-dim one). A negative index counts from the end. An index outside
    ``[-size, size)`` is undefined: backends that evaluate positions a mask will discard must clamp
    it or skip the load, never read outside the tensor. At any other position it is a mistake of the function, which
    a backend may leave unnoticed; one that notices raises :class:`~torchhal.errors.InvalidProblem`.
    """

    inputs: tuple[Input, ...]
    captured: tuple[CapturedSpec, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.inputs, self.captured, self.nodes, self.outputs))

    def __reduce__(self) -> tuple[Callable[[str], Graph], tuple[str]]:
        return Graph.from_text, (self.to_text(),)

    @property
    def output_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype of each output, in order."""
        return tuple(self.nodes[i].dtype for i in self.outputs)

    @property
    def floating_inputs(self) -> tuple[int, ...]:
        """Positions of the inputs a gradient can exist for."""
        return tuple(i for i, spec in enumerate(self.inputs) if is_float(spec.dtype))

    @property
    def primitives(self) -> frozenset[str]:
        """The primitives in use: what a backend must be able to lower."""
        return frozenset(node.primitive for node in self.nodes)

    def to_text(self) -> str:
        """Compact canonical JSON; equal graphs give equal text on every machine."""
        return self._text

    @cached_property
    def _text(self) -> str:
        from torchhal.pointwise import serial

        return serial.dump(self)

    @staticmethod
    def from_text(text: str) -> Graph:
        """Read :meth:`to_text` back.

        Raises:
            InvalidProblem: the text is not a canonical graph; the message says what is wrong and where.
        """
        from torchhal.pointwise import serial

        return serial.load(text)

    @cached_property
    def digest(self) -> str:
        """sha256 of :meth:`to_text` in hex; the same in every process and on every machine."""
        return hashlib.sha256(self.to_text().encode()).hexdigest()

    def __str__(self) -> str:
        inputs = ", ".join(f"{name}: {NAME_OF[dtype]}" for name, dtype in self.inputs)
        head = [f"graph({inputs})"]
        head += [f"  captured {i}: {NAME_OF[c.dtype]}, {c.ndim}-dim" for i, c in enumerate(self.captured)]
        body = [
            f"  %{i}: {NAME_OF[node.dtype]} = {self._describe(node)}" for i, node in enumerate(self.nodes)
        ]
        return "\n".join([*head, *body, "  return " + ", ".join(f"%{i}" for i in self.outputs)])

    def _describe(self, node: Node) -> str:
        operands = ", ".join(f"%{i}" for i in node.operands)
        if node.primitive == "input":
            return f"input {self.inputs[node.position].name}"
        if node.primitive == "constant":
            return f"constant {node.attribute}"
        return (
            f"captured {node.position}[{operands}]"
            if node.primitive == "gather"
            else f"{node.primitive}({operands})"
        )
