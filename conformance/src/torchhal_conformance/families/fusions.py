"""User functions for the fused matrix product, as models have them: each with the tensor it captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from torchhal.pointwise.primitives import PRIMITIVES
from torchhal_conformance.families import primitives


@dataclass(frozen=True)
class Function:
    """A prologue or epilogue, made over the tensor it captures (None where it captures none)."""

    over: Callable[[Any], Callable[..., Any]]
    captured: str = ""
    """Shape of the captured tensor in letters: ``b`` the flattened batch, ``r`` rows, ``c`` columns; ``0`` for none of them."""
    outputs: int = 1
    draw: Callable[[tuple[int, ...], torch.Generator], Tensor] | None = None
    """Makes what is captured from that shape; random numbers if None."""


PROLOGUES: Final[dict[str, Function]] = {
    "relu": Function(lambda _: torch.relu),
    "scaled": Function(lambda _: lambda v: v * 0.5 - 0.25),
    "dropped": Function(lambda _: lambda v, b, r, c: torch.where((r + c) % 3 == 0, 0.0, v)),
    "ramp": Function(lambda _: lambda v, b, r, c: v + (r - c) * 0.125),
    "constant": Function(lambda _: lambda v: v * 0.0 + 1.0),
    "by_column": Function(lambda t: lambda v, b, r, c: v * t[c], "c"),
    "by_row": Function(lambda t: lambda v, b, r, c: v * t[r], "r"),
    "by_batch": Function(lambda t: lambda v, b, r, c: v * t[b], "b"),
    "by_number": Function(lambda t: lambda v: v * t, "0"),
}
EPILOGUES: Final[dict[str, Function]] = {
    "gelu": Function(lambda _: F.gelu),
    "gelu_tanh": Function(lambda _: lambda v: F.gelu(v, approximate="tanh")),
    "silu": Function(lambda _: lambda v: F.silu(v)),
    "scaled": Function(lambda _: lambda v: v * 0.125 + 0.5),
    "soft_cap": Function(lambda _: lambda v: torch.tanh(v * 0.0625) * 16.0),
    "ramp": Function(lambda _: lambda v, b, r, c: v + (r * 2 - c) * 0.125),
    "triangle": Function(lambda _: lambda v, b, r, c: torch.where(c > r, v, v * 0.5)),
    "residual": Function(lambda t: lambda v, b, r, c: v + t[r, c], "rc"),
    "gated": Function(lambda t: lambda v, b, r, c: F.silu(v) * t[r, c], "rc"),
    "by_column": Function(lambda t: lambda v, b, r, c: v * t[c], "c"),
    "by_row": Function(lambda t: lambda v, b, r, c: torch.relu(v) + t[r], "r"),
    "per_batch": Function(lambda t: lambda v, b, r, c: v + t[b, c], "bc"),
    "shifted": Function(lambda t: lambda v, b, r, c: v + t[c], "c"),
    "by_number": Function(lambda t: lambda v: v * t, "0"),
    "two": Function(lambda _: lambda v: (v, F.gelu(v)), outputs=2),
    "three": Function(lambda t: lambda v, b, r, c: (v * t[c], torch.where(c > r, v, 0.0), v), "c", outputs=3),
}


def _of_primitive(name: str) -> Function:
    def over(table: Any) -> Callable[..., Any]:
        return lambda v, b, r, c: primitives.applied(name, v, lambda i: table[i, c])

    if not primitives.captures(name):
        return Function(over)
    return Function(over, "c", draw=lambda shape, generator: primitives.captured(name, shape, generator))


PRIMITIVE_FUNCTIONS: Final = {primitives.PREFIX + name: _of_primitive(name) for name in PRIMITIVES}
"""A prologue or epilogue for each primitive."""
PROLOGUES.update(PRIMITIVE_FUNCTIONS)
EPILOGUES.update(PRIMITIVE_FUNCTIONS)
PLACES: Final = {"a_prologue": PROLOGUES, "b_prologue": PROLOGUES, "epilogue": EPILOGUES}
"""By the argument that takes them."""
