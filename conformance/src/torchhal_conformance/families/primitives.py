"""Every primitive of the pointwise language alone, read from its table, with operands for which it is defined.

A primitive that is added to :data:`torchhal.pointwise.primitives.PRIMITIVES` gets its samples by being there; what it
needs to be told here is a domain, where it is not defined on the whole line, and whether it jumps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from torchhal.pointwise.primitives import PRIMITIVES

PREFIX: Final = "primitive_"
"""What the names of functions that hold one primitive begin with."""
FEW: Final = ("cast", "div", "exp", "max", "remainder", "sigmoid", "where")
"""Primitives that are tried in every floating type; the others in one."""


class Range(NamedTuple):
    """Where an operand is drawn from."""

    low: float
    high: float
    signed: bool = False
    """Whether half of the operands have the other sign."""


_LINE: Final = Range(-3.0, 3.0)
_NEAR_ONE: Final = Range(-0.9, 0.9)
_POSITIVE: Final = Range(0.2, 4.0)
_DIVISOR: Final = Range(1.0, 5.0, signed=True)
_DIVISION: Final = (Range(-12.0, 12.0), _DIVISOR)
_SHIFT: Final = (Range(-12.0, 12.0), Range(0.0, 8.0))
DOMAINS: Final[dict[str, tuple[Range, ...]]] = {
    **dict.fromkeys(("log", "log2", "log10", "sqrt", "rsqrt", "reciprocal"), (_POSITIVE,)),
    **dict.fromkeys(("asin", "acos", "atanh", "erfinv"), (_NEAR_ONE,)),
    **dict.fromkeys(("floordiv", "truncdiv", "remainder", "fmod"), _DIVISION),
    **dict.fromkeys(("shift_left", "shift_right"), _SHIFT),
    "acosh": (Range(1.1, 4.0),),
    "log1p": (Range(-0.8, 3.0),),
    "tan": (Range(-1.2, 1.2),),
    "div": (_LINE, _DIVISOR),
    "pow": (_POSITIVE, Range(-2.0, 2.0)),
}
"""Range of each operand, for primitives that the whole line would take to where they are undefined or enormous."""
INTEGER_DOMAINS: Final[dict[str, tuple[Range, ...]]] = {"pow": (Range(-4.0, 4.0), Range(0.0, 3.0))}
"""The same where integers must lie elsewhere."""
JUMPS: Final = frozenset(("sign", "floor", "ceil", "round", "trunc"))
"""Float functions of the whole line that a last bit may take across a step: they get exact operands alone."""
INEXACT: Final = frozenset(
    ("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "sin", "cos", "tan", "asin", "acos", "atan",
     "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "sigmoid", "erf", "erfc", "erfinv", "pow", "atan2")
)  # fmt: skip
"""Primitives of which no standard says every bit; what is not listed has to have torch's."""
SPELLED: Final[dict[str, Callable[..., Any]]] = {
    "input": lambda x: x,
    "constant": lambda x: torch.full_like(x, 0.75),
    "cast": lambda x: x.to(torch.float32),
    "gather": lambda x: x,
}
"""How a function comes by primitives that no function of torch stands for."""


def function(name: str) -> Callable[..., Any]:
    """What a primitive computes, in torch.

    Raises:
        KeyError: the table says no function, and nothing here says how the primitive is written.
    """
    return PRIMITIVES[name].torch or SPELLED[name]


def operand_dtypes(name: str, dtype: torch.dtype) -> tuple[torch.dtype, ...] | None:
    """The operand types of a primitive over ``dtype``, a truth value first if it wants one; None if it takes none such."""
    word = PRIMITIVES[name]
    if name in SPELLED:
        return (dtype,)
    patterns = [(dtype,) * word.arity, (torch.bool, *(dtype,) * (word.arity - 1))][: word.arity]
    return next((dtypes for dtypes in patterns if word.rule(dtypes) is not None), None)


def own_dtype(name: str) -> torch.dtype:
    """The first of float32, int32 and bool that a primitive takes; a cast is one of integers."""
    if name == "cast":
        return torch.int32
    return next(d for d in (torch.float32, torch.int32, torch.bool) if operand_dtypes(name, d) is not None)


def result_is_floating(name: str, dtype: torch.dtype) -> bool:
    """Whether a primitive over ``dtype`` gives a floating result."""
    dtypes = operand_dtypes(name, dtype)
    assert dtypes is not None
    if name in SPELLED:
        return name == "cast" or dtype.is_floating_point
    found = PRIMITIVES[name].rule(dtypes)
    return found is not None and found.is_floating_point


def draw(
    name: str, operand: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """An operand of a primitive, within its domain; with NaN and infinities for what tells those apart."""
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    if dtype is torch.bool:
        return drawn < 0.5
    ranges = DOMAINS.get(name, (_LINE,))
    ranges = ranges if dtype.is_floating_point else INTEGER_DOMAINS.get(name, ranges)
    low, high, signed = ranges[min(operand, len(ranges) - 1)]
    values = low + (high - low) * drawn
    if signed:
        values = values * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)
    compares = dtype.is_floating_point and not result_is_floating(name, dtype)
    if compares or not dtype.is_floating_point:
        values = values.round()  # so that some are equal
    if compares and PRIMITIVES[name].arity == 1:
        flat = values.reshape(-1)
        for start, special in enumerate((torch.nan, torch.inf, -torch.inf)):
            flat[start::5] = special
    return values.to(dtype)


# ---------------------------------------------------------------------------- in the functions of other families


def takes_the_value(name: str) -> bool:
    """Whether a primitive can be applied to what has been computed, whose last bits may differ, anywhere on the line."""
    if name in SPELLED:
        return name in ("input", "constant")
    jumps = name in DOMAINS or name in JUMPS
    return own_dtype(name) is torch.float32 and result_is_floating(name, torch.float32) and not jumps


def captures(name: str) -> bool:
    """Whether :func:`applied` reads operands from a captured tensor."""
    return not takes_the_value(name) or PRIMITIVES[name].arity > 1


def captured(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The tensor that holds the operands for :func:`applied`: (operands, *shape)."""
    dtypes = operand_dtypes(name, own_dtype(name))
    assert dtypes is not None
    dtype = torch.float64 if dtypes[0].is_floating_point else dtypes[0]
    return torch.stack([draw(name, i, shape, dtype, generator) for i in range(len(dtypes))])


def applied(name: str, value: Any, at: Callable[[int], Any]) -> Any:
    """``value`` changed by one primitive, with little but arithmetic around it.

    Args:
        name: the primitive.
        value: what a user function is given, or a tensor.
        at: the operand of a number, out of what :func:`captured` made.
    """
    compute = function(name)
    if not takes_the_value(name):
        return (
            value + compute(*(at(i) for i in range(max(PRIMITIVES[name].arity, 1)))).to(value.dtype) * 0.125
        )
    small = value if name in SPELLED else value * 0.125
    if PRIMITIVES[name].arity == 3:
        return compute(at(0), small, value)
    return compute(small, *(at(i) for i in range(1, PRIMITIVES[name].arity)))
