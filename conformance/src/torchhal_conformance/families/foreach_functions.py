"""Functions of foreach_map: arithmetic, selection, optimizer steps, and each primitive of the pointwise language."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from torchhal.pointwise.primitives import PRIMITIVES
from torchhal_conformance.families import primitives


@dataclass(frozen=True)
class Function:
    """A function of foreach_map, made over the 0-dim tensor it captures (None where it captures none)."""

    over: Callable[[Any], Callable[..., Any]]
    outputs: int = 1
    captures: bool = False
    arithmetic: bool = True
    """Whether IEEE arithmetic or selection is all it does, so that every bit is decided."""
    truths: bool = False
    """Whether truth values or integers are among its results."""
    primitive: str = ""
    """The one primitive it is made of, within whose domain operands are to be drawn."""


def _adamw(p: Any, g: Any, m: Any, v: Any, rate: Any) -> Any:
    first = m * 0.9 + g * 0.1
    second = v * 0.999 + g * g * 0.001
    return p * (1.0 - rate * 0.01) - rate * first / (torch.sqrt(second) + 1e-8), first, second


FUNCTIONS: Final[dict[str, Function]] = {
    "add": Function(lambda _: torch.add),
    "sub": Function(lambda _: torch.sub),
    "mul": Function(lambda _: torch.mul),
    "div": Function(lambda _: torch.div),
    "pow": Function(lambda _: torch.pow, arithmetic=False),
    "add_": Function(lambda _: torch.Tensor.add_),
    "mul_": Function(lambda _: torch.Tensor.mul_),
    "sqrt": Function(lambda _: lambda x: torch.sqrt(torch.abs(x))),
    "root": Function(lambda _: torch.sqrt),
    "square": Function(lambda _: lambda x: x * x),
    "itself": Function(lambda _: lambda x: x),
    "double": Function(lambda _: lambda x: x * 2),
    "third": Function(lambda _: lambda x: x * 0.3),
    "fused": Function(lambda _: lambda x, y, z: x * y + z),
    "chain": Function(lambda _: lambda x, y: ((x - y) * x + y) * 0.7 - x / 3),
    "decay": Function(lambda _: lambda x, s: x * s + 0.1),
    "from_left": Function(lambda _: lambda s, x: s * x - x),
    "number_over": Function(lambda _: lambda s, x: s / x),
    "two_numbers": Function(lambda _: lambda x, s, t: x * s - t),
    "clip": Function(lambda _: lambda x: torch.clamp(x, -0.5, 0.5)),
    "larger": Function(lambda _: lambda x, y: torch.where(x > y, x, -y)),
    "compare": Function(lambda _: lambda x, y: x > y, truths=True),
    "bits": Function(lambda _: lambda x, y: (x & y) | (x ^ 5)),
    "not": Function(lambda _: torch.logical_not, truths=True),
    "sum_and_product": Function(lambda _: lambda x, y: (x + y, x * y), outputs=2),
    "value_and_sign": Function(lambda _: lambda x: (x, x > 0), outputs=2, truths=True),
    "adamw": Function(lambda _: _adamw, outputs=3),
    "by_held": Function(lambda t: lambda x: x * t + t, captures=True),
    "held_pair": Function(lambda t: lambda x, y: (x * t, y / (t * t + 1.0)), outputs=2, captures=True),
    "sigmoid": Function(lambda _: lambda x: torch.sigmoid(x), arithmetic=False),
    "gelu": Function(lambda _: torch.nn.functional.gelu, arithmetic=False),
    "exponential": Function(lambda _: lambda x, y: torch.exp(-x * x) * torch.tanh(y), arithmetic=False),
    "held_tanh": Function(lambda t: lambda x: torch.tanh(x * t), captures=True, arithmetic=False),
}


def _of_primitive(name: str) -> Function:
    def over(held: Any) -> Callable[..., Any]:
        return (lambda x: x + held) if name == "gather" else primitives.function(name)

    return Function(
        over,
        captures=name == "gather",
        arithmetic=name not in primitives.INEXACT,
        truths=not primitives.result_is_floating(name, primitives.own_dtype(name)),
        primitive=name,
    )


FUNCTIONS.update({primitives.PREFIX + name: _of_primitive(name) for name in PRIMITIVES})
