"""The closed table of primitives: arity, result type, and what each one computes in torch.

A backend that lowers every name in :data:`PRIMITIVES` lowers every graph. Operands of a primitive
always have one dtype (``where`` aside, whose condition is bool); conversions are explicit ``cast``
nodes. Arithmetic on bfloat16 and float16 is computed in float32 and rounded once per node.
Integer arithmetic wraps. Integer division by zero is undefined, as it is in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from torchhal.pointwise.dtypes import INDEX_DTYPES, NAME_OF, is_float, is_integer

Rule = Callable[[Sequence[torch.dtype]], "torch.dtype | None"]


@dataclass(frozen=True, slots=True)
class Primitive:
    """One word of the language.

    Attributes:
        name: the word, as it stands in a graph's text.
        arity: number of operands; -1 for ``gather``, whose operands are one index per dimension.
        rule: operand dtypes to result dtype, or None where the operands are not acceptable.
        expects: the operand dtypes that ``rule`` accepts, in words.
        torch: the defining torch function; None for input, constant, gather and cast.
        tensors_only: whether ``torch`` refuses Python numbers, so constants become 0-dim tensors.
    """

    name: str
    arity: int
    rule: Rule
    expects: str
    torch: Callable[..., Any] | None = None
    tensors_only: bool = False


def _alike(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    first = dtypes[0]
    return first if all(dtype is first for dtype in dtypes) else None


def _arithmetic(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    same = _alike(dtypes)
    return None if same is torch.bool else same


def _floating(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    same = _alike(dtypes)
    return same if same is not None and is_float(same) else None


def _integral(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    same = _alike(dtypes)
    return same if same is not None and is_integer(same) else None


def _boolean(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    return torch.bool if _alike(dtypes) is torch.bool else None


def _compared(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    return None if _alike(dtypes) is None else torch.bool


def _classified(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    return None if _floating(dtypes) is None else torch.bool


def _selected(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    return _alike(dtypes[1:]) if dtypes[0] is torch.bool else None


def _leaf(dtypes: Sequence[torch.dtype]) -> torch.dtype | None:
    """Leaves and casts carry their dtype in the node; there is nothing to derive from operands."""
    return None


def truncdiv(left: Any, right: Any) -> Any:
    """Integer division rounding toward zero (C's ``/``)."""
    return torch.div(left, right, rounding_mode="trunc")


def _clamp_min(value: Any, bound: Any) -> Any:
    return torch.clamp(value, min=bound)


def _clamp_max(value: Any, bound: Any) -> Any:
    return torch.clamp(value, max=bound)


_SAME = "operands of one dtype"
_NUMBERS = "integer or floating operands of one dtype"
_FLOATS = "floating operands of one dtype"

_BINARY_NUMBERS: Final[dict[str, Callable[..., Any]]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": torch.floor_divide,
    "remainder": torch.remainder, "fmod": torch.fmod, "pow": torch.pow,
    "clamp_min": _clamp_min, "clamp_max": _clamp_max,
}  # fmt: skip
_UNARY_FLOATS: Final = (
    "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal",
    "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    "sigmoid", "erf", "erfc", "erfinv", "floor", "ceil", "round", "trunc",
)  # fmt: skip
_COMPARISONS: Final = ("eq", "ne", "lt", "le", "gt", "ge")
_BITS: Final[dict[str, Callable[..., Any]]] = {
    "bitwise_and": torch.bitwise_and, "bitwise_or": torch.bitwise_or, "bitwise_xor": torch.bitwise_xor,
    "shift_left": torch.bitwise_left_shift, "shift_right": torch.bitwise_right_shift,
}  # fmt: skip


def _table() -> dict[str, Primitive]:
    words = [
        Primitive("input", 0, _leaf, "no operands"),
        Primitive("constant", 0, _leaf, "no operands"),
        Primitive("gather", -1, _leaf, "one int32 or int64 index per dimension"),
        Primitive("cast", 1, _leaf, "one operand"),
        Primitive("where", 3, _selected, "a bool condition and two operands of one dtype", torch.where),
        Primitive("detach", 1, _alike, "one operand", torch.detach, tensors_only=True),
        Primitive("neg", 1, _arithmetic, _NUMBERS, torch.neg),
        Primitive("abs", 1, _arithmetic, _NUMBERS, torch.abs),
        Primitive("sign", 1, _arithmetic, _NUMBERS, torch.sign),
        Primitive("relu", 1, _arithmetic, _NUMBERS, torch.relu),
        Primitive("min", 2, _arithmetic, _NUMBERS, torch.minimum, tensors_only=True),
        Primitive("max", 2, _arithmetic, _NUMBERS, torch.maximum, tensors_only=True),
        Primitive("div", 2, _floating, _FLOATS, torch.div),
        Primitive("atan2", 2, _floating, _FLOATS, torch.atan2, tensors_only=True),
        Primitive("truncdiv", 2, _integral, "integer operands of one dtype", truncdiv),
        Primitive("bitwise_not", 1, _integral, "an integer operand", torch.bitwise_not),
        Primitive("logical_not", 1, _boolean, "a bool operand", torch.logical_not),
    ]
    words += [Primitive(name, 2, _arithmetic, _NUMBERS, fn) for name, fn in _BINARY_NUMBERS.items()]
    words += [Primitive(name, 1, _floating, _FLOATS, getattr(torch, name)) for name in _UNARY_FLOATS]
    words += [Primitive(name, 2, _compared, _SAME, getattr(torch, name)) for name in _COMPARISONS]
    words += [Primitive(name, 2, _integral, "integer operands", fn) for name, fn in _BITS.items()]
    for name in ("logical_and", "logical_or", "logical_xor"):
        words.append(Primitive(name, 2, _boolean, "bool operands", getattr(torch, name), tensors_only=True))
    for name in ("isnan", "isinf", "isfinite"):
        words.append(Primitive(name, 1, _classified, "a floating operand", getattr(torch, name)))
    return {word.name: word for word in words}


PRIMITIVES: Final[dict[str, Primitive]] = _table()
"""Every primitive by name; closed: a graph holds no other."""

TENSOR_FIRST: Final = frozenset(("fmod", "clamp_min", "clamp_max", *_COMPARISONS))
"""Primitives that torch computes with a Python number for any operand but the first."""

COMMUTATIVE: Final = frozenset(
    ("add", "mul", "min", "max", "eq", "ne", "logical_and", "logical_or", "logical_xor",
     "bitwise_and", "bitwise_or", "bitwise_xor")
)  # fmt: skip
"""Primitives whose operands may be swapped without changing a single bit; constants go to the right."""


def misfit(name: str, dtypes: Sequence[torch.dtype]) -> str:
    """A sentence saying what ``name`` expects and what it was given."""
    given = ", ".join(NAME_OF.get(dtype, str(dtype)) for dtype in dtypes) or "none"
    return f"{name} expects {PRIMITIVES[name].expects}, got {given}"


def is_index(dtype: torch.dtype) -> bool:
    """Whether a value of ``dtype`` may index a captured tensor (uint8 and bool would be masks in torch)."""
    return dtype in INDEX_DTYPES
