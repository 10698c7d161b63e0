"""Constant folding, only where Python computes the same bits as every backend must."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from torchhal.pointwise.dtypes import Number, convert, fits, is_float


def _divide(left: float, right: float) -> float:
    if right == 0:
        if left == 0 or left != left:
            return math.nan
        return math.copysign(math.inf, left) * math.copysign(1.0, right)
    return left / right


def _minimum(left: Number, right: Number) -> Number:
    if left != left or right != right:
        return math.nan
    return min(left, right)


def _maximum(left: Number, right: Number) -> Number:
    if left != left or right != right:
        return math.nan
    return max(left, right)


def _select(condition: Number, left: Number, right: Number) -> Number:
    return left if condition else right


_ANY: Final[dict[str, Callable[..., Any]]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "neg": operator.neg, "abs": abs,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt,
    "ge": operator.ge, "where": _select, "logical_not": operator.not_, "logical_and": operator.and_,
    "logical_or": operator.or_, "logical_xor": operator.xor,
}  # fmt: skip
_FLOATS: Final[dict[str, Callable[..., Any]]] = {
    "div": _divide, "isnan": math.isnan, "isinf": math.isinf, "isfinite": math.isfinite,
}  # fmt: skip
_INTEGERS: Final[dict[str, Callable[..., Any]]] = {
    "bitwise_and": operator.and_, "bitwise_or": operator.or_, "bitwise_xor": operator.xor,
    "bitwise_not": operator.invert, "min": _minimum, "max": _maximum,
    "clamp_min": _maximum, "clamp_max": _minimum,
}  # fmt: skip


def fold(
    primitive: str, values: Sequence[Number], operand: torch.dtype, result: torch.dtype
) -> Number | None:
    """The constant ``primitive`` gives over constants ``values``, or None where folding is not exact.

    Transcendental functions are left alone: their last bit belongs to whoever runs the graph. The
    arithmetic here is computed in float64 and rounded once, which for one operation on float32 or
    narrower gives the correctly rounded result.
    """
    if primitive == "cast":
        return convert(values[0], result) if fits(values[0], result) else None
    function = _ANY.get(primitive) or (_FLOATS if is_float(operand) else _INTEGERS).get(primitive)
    if function is None:
        return None
    return convert(function(*values), result)
