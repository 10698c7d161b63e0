"""Intervals of values, and what arithmetic makes of them, elementwise over many boxes of operands.

Integers are bounded exactly (a result that may wrap is the whole range of its dtype), floats with the rounding of
their dtype. Sources: R. E. Moore, Interval Analysis (1966); by inclusion monotonicity the bounds on the hull of all
boxes bound each of them, which is what makes the check for overflow cheap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal.pointwise.dtypes import REDUCED, integer_range, is_float, is_integer


class Range(NamedTuple):
    """Everything between ``low`` and ``high``, both included, elementwise.

    Attributes:
        low, high: tensors of the value's dtype and of one shape, ``low <= high``; of a bool, (False, True) is either.
        nan: bool, where a floating value may also be nan; None where it can not be anywhere.
    """

    low: Tensor
    high: Tensor
    nan: Tensor | None = None


Rule = Callable[[torch.dtype, Sequence[Range]], Range]
Ends = Callable[..., tuple[Tensor, Tensor]]

EXACT: Final = 2**62
"""Integers up to here are compared in float64 without mistaking a wrapped int64 for one that is not."""


def point(value: Tensor) -> Range:
    """Values known exactly."""
    if not is_float(value.dtype):
        return Range(value, value)
    low, high, nan = without_nan(value, value)
    return Range(low, high, nan if bool(nan.any()) else None)


def anything(dtype: torch.dtype, like: Tensor) -> Range:
    """Every value of ``dtype``, in the shape and on the device of ``like``."""
    if is_float(dtype):
        high = torch.full_like(like, torch.inf, dtype=dtype)
        return Range(-high, high, torch.ones_like(like, dtype=torch.bool))
    least, most = (False, True) if dtype is torch.bool else integer_range(dtype)
    return Range(torch.full_like(like, least, dtype=dtype), torch.full_like(like, most, dtype=dtype))


def shaped(operands: Sequence[Range]) -> Tensor:
    """A tensor of the shape that operands broadcast to."""
    return reduce(
        torch.logical_or, (r.low.new_zeros((), dtype=torch.bool).expand_as(r.low) for r in operands)
    )


def without_nan(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of which a nan one is as far away as can be, and where there was one."""
    nan = low.isnan() | high.isnan()
    return low.masked_fill(nan, -torch.inf), high.masked_fill(nan, torch.inf), nan


def nan_in(operands: Sequence[Range], *more: Tensor) -> Tensor | None:
    flags = [*(r.nan for r in operands if r.nan is not None), *more]
    return reduce(torch.logical_or, flags) if flags else None


def holds_zero(value: Range) -> Tensor:
    return (value.low <= 0) & (value.high >= 0)


def widened(value: Tensor, dtype: torch.dtype, *, up: bool) -> Tensor:
    """A float64 bound moved outward by more than any libm is wrong, in ``dtype``."""
    info = torch.finfo(dtype)
    room = (value.abs() * ((4 if dtype in REDUCED else 64) * info.eps) + info.tiny).masked_fill(
        value.isinf(), 0
    )
    return (value + room if up else value - room).to(dtype)


# --- arithmetic: a function of the ends, the same for integers, floats, and the float64 check of integers


def corners(operation: Callable[[Tensor, Tensor], Tensor]) -> Ends:
    """Ends of an operation that is monotone in each operand: its extremes are at the corners of the box."""

    def ends(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        values = [operation(x, y) for x in (a, b) for y in (c, d)]
        return reduce(torch.minimum, values), reduce(torch.maximum, values)

    return ends


def abs_ends(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    least = torch.maximum(low, -high).clamp(min=0)
    return least, torch.maximum(-low, high)


def _integers(dtype: torch.dtype, operands: Sequence[Range], ends: Ends, check: Ends | None = None) -> Range:
    """``ends`` in int64 where ``check`` (``ends`` in float64) shows that nothing wraps, everything elsewhere."""
    check = check or ends
    given = [end for r in operands for end in (r.low, r.high)]
    hull = [end for r in operands for end in _hull(r)]
    if bool(_fits(dtype, hull, check).all()):
        low, high = ends(*(end.long() for end in given))
        return Range(low.to(dtype), high.to(dtype))
    fits = _fits(dtype, given, check)
    low, high = ends(*(end.long().clamp(-EXACT, EXACT) for end in given))
    whole = integer_range(dtype)
    low, high = (torch.where(fits, end, whole[i]).to(dtype) for i, end in enumerate((low, high)))
    return Range(low, high)


def _hull(value: Range) -> tuple[Tensor, Tensor]:
    return (value.low.amin(), value.high.amax()) if value.low.numel() else (value.low, value.high)


def _fits(dtype: torch.dtype, given: Sequence[Tensor], check: Ends) -> Tensor:
    least, most = integer_range(dtype)
    wide = [end.double() for end in given]
    low, high = check(*wide)
    # The operands too: beyond EXACT the division and the ends of int64 itself have no safe int64 form.
    safe = [(end >= -EXACT) & (end <= EXACT) for end in wide]
    return reduce(torch.logical_and, safe, (low >= max(least, -EXACT)) & (high <= min(most, EXACT)))


def _floats(operands: Sequence[Range], ends: Ends) -> Range:
    """``ends`` in the dtype itself: rounding to nearest is monotone, so rounded ends bound rounded values."""
    low, high, undefined = without_nan(*ends(*(end for r in operands for end in (r.low, r.high))))
    infinite = [r.low.isinf() | r.high.isinf() for r in operands]
    return Range(low, high, some(nan_in(operands, undefined, *infinite)))


def some(nan: Tensor | None) -> Tensor | None:
    return nan if nan is not None and bool(nan.any()) else None


def arithmetic(ends: Ends) -> Rule:
    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        return _floats(operands, ends) if is_float(dtype) else _integers(dtype, operands, ends)

    return rule


def monotone(ends: Ends) -> Rule:
    """A rule for what can neither wrap nor make a nan of what is none."""

    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        low, high = ends(*(end for r in operands for end in (r.low, r.high)))
        return Range(low, high, nan_in(operands))

    return rule


def each(operation: Callable[[Tensor], Tensor]) -> Rule:
    return monotone(lambda low, high: (operation(low), operation(high)))


def sign(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    """Torch's sign of nan is 0."""
    low, high, nan = operands[0].low.sign(), operands[0].high.sign(), operands[0].nan
    if nan is None:
        return Range(low, high)
    return Range(torch.where(nan, low.clamp(max=0), low), torch.where(nan, high.clamp(min=0), high), nan)


# --- division


def over(rounding: str | None) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda a, b: torch.div(a, b, rounding_mode=rounding)


def divided(operation: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        left, right = operands
        zero = holds_zero(right)
        safe = Range(right.low.masked_fill(zero, 1), right.high.masked_fill(zero, 1), right.nan)
        if is_float(dtype):
            found = _floats([left, safe], corners(operation))
        else:
            found = _integers(dtype, [left, safe], corners(operation), _no_larger)
        return unless(zero, found, dtype)

    return rule


def unless(undecided: Tensor, found: Range, dtype: torch.dtype) -> Range:
    """``found``, and anything where it is undecided."""
    if not bool(undecided.any()):
        return found
    free = anything(dtype, undecided)
    nan = (undecided if found.nan is None else undecided | found.nan) if is_float(dtype) else None
    return Range(
        torch.where(undecided, free.low, found.low), torch.where(undecided, free.high, found.high), nan
    )


def floor_division(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
    """Torch's floor of a floating quotient is corrected after rounding and may be one off: give it that room."""
    found = divided(over("floor"))(dtype, operands)
    if is_integer(dtype):
        return found
    wide = [widened(end.double() + by, dtype, up=by > 0) for end, by in ((found.low, -2), (found.high, 2))]
    return Range(wide[0], wide[1], found.nan)


def remainder_ends(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Of floored division: the divisor's sign; exact where the divisor and the quotient are one number."""
    positive = c > 0
    low, high = torch.where(positive, 0, c + 1), torch.where(positive, d - 1, 0)
    small = positive & (a >= 0)
    high = torch.where(small, torch.minimum(high, b), high)
    one = (c == d) & (over("floor")(a, c) == over("floor")(b, c))
    return torch.where(one, a - over("floor")(a, c) * c, low), torch.where(
        one, b - over("floor")(b, c) * c, high
    )


def fmod_ends(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Of truncated division: the dividend's sign, smaller than the divisor."""
    most = torch.maximum(c.abs(), d.abs()) - 1
    return torch.maximum(a, -most).clamp(max=0), torch.minimum(b, most).clamp(min=0)


def modulo(ends: Ends) -> Rule:
    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        left, right = operands
        if is_float(dtype):
            return anything(dtype, shaped(operands))
        zero = holds_zero(right)
        safe = Range(right.low.masked_fill(zero, 1), right.high.masked_fill(zero, 1))
        return unless(zero, _integers(dtype, [left, safe], ends, _nothing), dtype)

    return rule


def _no_larger(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """What no quotient of integers exceeds; unlike its corners, right for a hull of divisors of both signs, too."""
    most = torch.maximum(a.abs(), b.abs())
    return torch.where((a >= 0) & (c >= 0), 0, -most), most


def _nothing(*ends: Tensor) -> tuple[Tensor, Tensor]:
    """The check of what is always within its dtype."""
    return torch.zeros_like(ends[0]), torch.zeros_like(ends[0])


# --- bits


def bitwise(operation: Callable[[Tensor, Tensor], Tensor], nonnegative: Ends) -> Rule:
    """Exact for two numbers; for ranges of numbers that are not negative, ``nonnegative``."""

    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        left, right = operands
        known = (left.low == left.high) & (right.low == right.high)
        positive = (left.low >= 0) & (right.low >= 0)
        free = anything(dtype, positive)
        # Halves, so that the sum which bounds `or` and `xor` can not wrap an int64.
        most = integer_range(dtype)[1] // 2
        positive &= (left.high <= most) & (right.high <= most)
        low, high = nonnegative(
            *(end.long().clamp(-EXACT, EXACT) for r in operands for end in (r.low, r.high))
        )
        low, high = torch.where(positive, low, free.low), torch.where(positive, high, free.high)
        exact = operation(left.low, right.low)
        return Range(torch.where(known, exact, low.to(dtype)), torch.where(known, exact, high.to(dtype)))

    return rule


def shifted(operation: Callable[[Tensor, Tensor], Tensor], check: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """A shift by less than the width of the dtype is a product or a floored quotient by a power of two."""

    def rule(dtype: torch.dtype, operands: Sequence[Range]) -> Range:
        left, right = operands
        beyond = (right.low < 0) | (right.high >= torch.iinfo(dtype).bits)
        safe = Range(right.low.masked_fill(beyond, 0), right.high.masked_fill(beyond, 0))
        found = _integers(dtype, [left, safe], corners(operation), corners(check))
        return unless(beyond, found, dtype)

    return rule
