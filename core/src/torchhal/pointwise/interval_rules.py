"""The bounds on each primitive's result, given intervals of its operands: bools are false, true or either."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Final

import torch
from torch import Tensor

from torchhal.pointwise.dtypes import integer_range, is_float
from torchhal.pointwise.interval_arithmetic import (
    EXACT,
    Range,
    Rule,
    abs_ends,
    arithmetic,
    bitwise,
    corners,
    divided,
    each,
    floor_division,
    fmod_ends,
    holds_zero,
    modulo,
    monotone,
    nan_in,
    over,
    remainder_ends,
    shifted,
    sign,
    some,
    unless,
    widened,
    without_nan,
)

# --- bools


def _less(a: Range, b: Range, *, strict: bool) -> Range:
    less = torch.lt if strict else torch.le
    nan = nan_in((a, b))
    surely = less(a.high, b.low)
    return Range(surely if nan is None else surely & ~nan, less(a.low, b.high))


def _equal(a: Range, b: Range) -> Range:
    nan = nan_in((a, b))
    surely = (a.low == a.high) & (b.low == b.high) & (a.low == b.low)
    return Range(surely if nan is None else surely & ~nan, (a.low <= b.high) & (b.low <= a.high))


def _not(value: Range) -> Range:
    return Range(~value.high, ~value.low)


def _xor(a: Range, b: Range) -> Range:
    known = (a.low == a.high) & (b.low == b.high)
    return Range(known & (a.low ^ b.low), ~known | (a.low ^ b.low))


def _logical(rule: Callable[..., Range]) -> Rule:
    return lambda dtype, operands: rule(*operands)


def _finite(value: Range) -> Range:
    surely = ~(value.low.isinf() | value.high.isinf())
    possibly = ~(value.low.isinf() & (value.low == value.high))
    return Range(surely if value.nan is None else surely & ~value.nan, possibly)


def _infinite(value: Range) -> Range:
    surely = value.low.isinf() & (value.low == value.high)
    possibly = value.low.isinf() | value.high.isinf()
    return Range(surely if value.nan is None else surely & ~value.nan, possibly)


def _is_nan(value: Range) -> Range:
    never = torch.zeros_like(value.low, dtype=torch.bool)
    return Range(never, never if value.nan is None else value.nan.expand_as(never))


# --- conversions and choice


def _cast(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    value = operands[0]
    if dtype is torch.bool:
        nan = value.nan if value.nan is not None else torch.zeros_like(value.low, dtype=torch.bool)
        zero = torch.zeros_like(value.low)
        return Range(
            ~((value.low <= zero) & (value.high >= zero)), (value.low != 0) | (value.high != 0) | nan
        )
    if is_float(dtype) or value.low.dtype is torch.bool:
        return Range(value.low.to(dtype), value.high.to(dtype), value.nan)
    low, high = (end.double().trunc() for end in value[:2])
    least, most = integer_range(dtype)
    undecided = ~((low >= max(least, -EXACT)) & (high <= min(most, EXACT)))
    undecided = undecided if value.nan is None else undecided | value.nan
    # What does not fit is replaced before it is converted, for its conversion is undefined.
    ends = [end.masked_fill(undecided, 0).to(dtype) for end in value[:2]]
    return unless(undecided, Range(ends[0], ends[1]), dtype)


def _where(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    chosen, a, b = operands
    low = torch.where(chosen.low, a.low, torch.where(chosen.high, torch.minimum(a.low, b.low), b.low))
    high = torch.where(chosen.low, a.high, torch.where(chosen.high, torch.maximum(a.high, b.high), b.high))
    flags = [side & r.nan for side, r in ((chosen.high, a), (~chosen.low, b)) if r.nan is not None]
    return Range(low, high, reduce(torch.logical_or, flags) if flags else None)


# --- functions of real numbers


def _real(
    function: Callable[[Tensor], Tensor],
    domain: tuple[float, float],
    *,
    falling: bool = False,
    room: float = 0.0,
) -> Rule:
    """A monotone function, nan outside ``domain``; ``room`` is what evaluations of it are off by, however small it is."""

    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        value = operands[0]
        ends = [function(end.double().clamp(*domain)) for end in value[:2]]
        low, high = reversed(ends) if falling else ends
        outside = (value.low < domain[0]) | (value.high > domain[1])
        low, high, undefined = without_nan(low, high)
        nan = some(nan_in(operands, outside, undefined))
        return Range(widened(low - room, dtype, up=False), widened(high + room, dtype, up=True), nan)

    return rule


def _wave(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    value = operands[0]
    one = widened(torch.ones_like(value.low, dtype=torch.float64), dtype, up=True)
    return Range(-one, one, nan_in(operands, value.low.isinf() | value.high.isinf()))


def _reciprocal(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    value = operands[0]
    zero = holds_zero(value)
    ends = [1 / end.double().masked_fill(zero, 1) for end in value[:2]]
    low, high = widened(ends[1], dtype, up=False), widened(ends[0], dtype, up=True)
    return unless(zero, Range(low, high, value.nan), dtype)


def _inverse_root(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    """Not at zero: of its two signs one gives inf and the other -inf."""
    value = operands[0]
    beyond = value.low <= 0
    ends = [torch.rsqrt(end.double().masked_fill(beyond, 1)) for end in value[:2]]
    low, high = widened(ends[1], dtype, up=False), widened(ends[0], dtype, up=True)
    return unless(beyond, Range(low, high, value.nan), dtype)


_INF: Final = float("inf")
_ANYWHERE: Final = (-_INF, _INF)

_ORDERED: Final[dict[str, Rule]] = {
    "detach": lambda dtype, operands: operands[0],
    "neg": arithmetic(lambda low, high: (-high, -low)),
    "abs": arithmetic(abs_ends),
    "sign": sign,
    "relu": each(lambda end: end.clamp(min=0)),
    "min": monotone(lambda a, b, c, d: (torch.minimum(a, c), torch.minimum(b, d))),
    "max": monotone(lambda a, b, c, d: (torch.maximum(a, c), torch.maximum(b, d))),
    "clamp_max": monotone(lambda a, b, c, d: (torch.minimum(a, c), torch.minimum(b, d))),
    "clamp_min": monotone(lambda a, b, c, d: (torch.maximum(a, c), torch.maximum(b, d))),
    "add": arithmetic(lambda a, b, c, d: (a + c, b + d)),
    "sub": arithmetic(lambda a, b, c, d: (a - d, b - c)),
    "mul": arithmetic(corners(torch.mul)),
    "div": divided(over(None)),
    "floordiv": floor_division,
    "truncdiv": divided(over("trunc")),
    "remainder": modulo(remainder_ends),
    "fmod": modulo(fmod_ends),
    "cast": _cast,
    "where": _where,
}
_OF_BITS: Final[dict[str, Rule]] = {
    "bitwise_not": monotone(lambda low, high: (~high, ~low)),
    "bitwise_and": bitwise(torch.bitwise_and, lambda a, b, c, d: (a * 0, torch.minimum(b, d))),
    "bitwise_or": bitwise(torch.bitwise_or, lambda a, b, c, d: (torch.maximum(a, c), b + d)),
    "bitwise_xor": bitwise(torch.bitwise_xor, lambda a, b, c, d: (a * 0, b + d)),
    "shift_left": shifted(torch.bitwise_left_shift, lambda a, by: a * torch.exp2(by)),
    "shift_right": shifted(torch.bitwise_right_shift, lambda a, by: a + 0 * by),
}
_OF_TRUTH: Final[dict[str, Rule]] = {
    "eq": _logical(_equal),
    "ne": _logical(lambda a, b: _not(_equal(a, b))),
    "lt": _logical(lambda a, b: _less(a, b, strict=True)),
    "le": _logical(lambda a, b: _less(a, b, strict=False)),
    "gt": _logical(lambda a, b: _less(b, a, strict=True)),
    "ge": _logical(lambda a, b: _less(b, a, strict=False)),
    "logical_not": _logical(_not),
    "logical_and": _logical(lambda a, b: Range(a.low & b.low, a.high & b.high)),
    "logical_or": _logical(lambda a, b: Range(a.low | b.low, a.high | b.high)),
    "logical_xor": _logical(_xor),
    "isnan": _logical(_is_nan),
    "isinf": _logical(_infinite),
    "isfinite": _logical(_finite),
}
_OF_REALS: Final[dict[str, Rule]] = {
    **{name: each(getattr(torch, name)) for name in ("floor", "ceil", "round", "trunc")},
    **{
        name: _real(getattr(torch, name), _ANYWHERE)
        for name in ("exp", "exp2", "expm1", "atan", "sinh", "tanh", "asinh", "sigmoid")
    },
    # Torch 2.13's of 16-bit floats is off by up to 2.7e-7, of erf(3e-6) a twentieth.
    "erf": _real(torch.erf, _ANYWHERE, room=5e-7),
    **{name: _real(getattr(torch, name), (0, _INF)) for name in ("log", "log2", "log10", "sqrt")},
    **{name: _real(getattr(torch, name), (-1, 1)) for name in ("asin", "atanh", "erfinv")},
    "log1p": _real(torch.log1p, (-1, _INF)),
    "acosh": _real(torch.acosh, (1, _INF)),
    "acos": _real(torch.acos, (-1, 1), falling=True),
    "erfc": _real(torch.erfc, _ANYWHERE, falling=True),
    "sin": _wave,
    "cos": _wave,
    "reciprocal": _reciprocal,
    "rsqrt": _inverse_root,
}
RULES: Final[dict[str, Rule]] = {**_ORDERED, **_OF_BITS, **_OF_TRUTH, **_OF_REALS}
"""Bounds on the result by the name of the primitive; what is not here is bounded by :func:`anything`."""
