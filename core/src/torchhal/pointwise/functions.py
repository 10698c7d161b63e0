"""Torch's elementwise functions in terms of primitives, with torch's own promotion rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

import torch

from torchhal.pointwise.dtypes import REDUCED, convert, fits, is_float, is_integer
from torchhal.pointwise.promotion import Kind, number_type, result_type
from torchhal.pointwise.values import Value

if TYPE_CHECKING:
    from torchhal.pointwise.tracer import Tracer

Handler = Callable[..., Value]
FUNCTIONS: Final[dict[str, Handler]] = {}
"""Every torch function that can be captured, by the name :func:`~torchhal.pointwise.names.name_of` gives it."""

_ON_BOOL: Final = {"add": "logical_or", "mul": "logical_and", "max": "logical_or", "min": "logical_and",
                   "clamp_min": "logical_or", "clamp_max": "logical_and",
                   "bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_xor": "logical_xor"}  # fmt: skip


def define(*names: str) -> Callable[[Handler], Handler]:
    """Register a handler under torch function names."""

    def register(handler: Handler) -> Handler:
        FUNCTIONS.update(dict.fromkeys(names, handler))
        return handler

    return register


def call(name: str, *args: Any, **kwargs: Any) -> Value:
    """A registered function applied to arguments of which the first value tells the tracer."""
    tracer = next(arg.tracer for arg in args if isinstance(arg, Value))
    return FUNCTIONS[name](tracer, *args, **kwargs)


def unify(
    t: Tracer, operands: Sequence[Value], name: str, *, floating: bool = False
) -> tuple[list[Value], Kind]:
    """Operands cast to the dtype torch computes in, and the kind of the result."""
    kind = max(value.kind for value in operands)
    dtypes = [value.dtype for value in operands]
    if kind is Kind.NUMBER:
        dtype = torch.float64 if floating else number_type(dtypes)
    else:
        dtype = result_type([(value.dtype, value.kind) for value in operands])
        if floating and not is_float(dtype):
            dtype = torch.get_default_dtype()
    return [narrow(t, value, dtype, name) for value in operands], kind


def narrow(t: Tracer, value: Value, dtype: torch.dtype, name: str) -> Value:
    """Cast an operand; a Python number that an integer dtype can not hold is refused, as in torch."""
    if value.dtype is not dtype and value.kind is Kind.NUMBER:
        number = t.constant_value(value.node)
        if number is not None and not fits(number, dtype):
            t.refuse(
                f"{name} of a {dtype} value and the number {number}",
                f"{number} does not fit {dtype}: convert first",
            )
    return t.convert(value, dtype)


def binary(t: Tracer, primitive: str, left: Any, right: Any, *, floating: bool = False) -> Value:
    """A two-operand primitive with torch's promotion."""
    operands = [t.lift(left, primitive), t.lift(right, primitive)]
    operands, kind = unify(t, operands, primitive, floating=floating)
    if operands[0].dtype is torch.bool and primitive not in _COMPARISONS:
        if primitive not in _ON_BOOL:
            t.refuse(f"{primitive} of bool values", "convert first: value.to(torch.int32), or use &, |, ^, ~")
        primitive = _ON_BOOL[primitive]
    return t.emit(primitive, kind, *operands)


def widened(t: Tracer, primitive: str, left: Value, right: Value, *, then: str | None = None) -> Value | None:
    """The half-precision case in which torch's kernels keep float32 between operand and result.

    That is multiplication and division by a scalar on the right that the half type would round, of a tensor with
    dimensions or without: the scalar keeps float32 precision and only the result (after ``then``) is rounded. None
    elsewhere.
    """
    if left.kind is Kind.NUMBER or right.kind is Kind.LANE:
        return None
    dtype = result_type([(left.dtype, left.kind), (right.dtype, right.kind)])
    if dtype not in REDUCED or _exact(t, right, dtype):
        return None
    kind = max(left.kind, right.kind)
    result = t.emit(primitive, kind, t.convert(left, torch.float32), t.convert(right, torch.float32))
    return t.convert(result if then is None else t.emit(then, kind, result), dtype)


def _exact(t: Tracer, value: Value, dtype: torch.dtype) -> bool:
    """Whether converting ``value`` to ``dtype`` loses nothing that float32 would keep."""
    number = t.constant_value(value.node)
    if number is None:
        return value.dtype is dtype
    return repr(convert(number, dtype)) == repr(convert(number, torch.float32))


_COMPARISONS: Final = ("eq", "ne", "lt", "le", "gt", "ge")


def is_one(factor: Any) -> bool:
    """Whether a factor is the number 1, which torch leaves out; one whose value is not known yet is not."""
    return isinstance(factor, (int, float)) and factor == 1


def _scaled(t: Tracer, other: Any, alpha: Any) -> Any:
    return other if is_one(alpha) else binary(t, "mul", t.lift(other), alpha)


@define("add")
def add(t: Tracer, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    return binary(t, "add", input, _scaled(t, other, alpha))


@define("sub")
def sub(t: Tracer, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    return binary(t, "sub", input, _scaled(t, other, alpha))


@define("rsub")
def rsub(t: Tracer, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    return binary(t, "sub", other, _scaled(t, input, alpha))


@define("mul")
def mul(t: Tracer, input: Any, other: Any) -> Value:
    left, right = t.lift(input, "mul"), t.lift(other, "mul")
    wide = widened(t, "mul", left, right)
    return binary(t, "mul", left, right) if wide is None else wide


@define("operator_mul")
def operator_mul(t: Tracer, input: Any, other: Any) -> Value:
    """``input * other``: Python leaves a number on the left to the tensor's ``__rmul__``, where it stands right."""
    left, right = t.lift(input, "mul"), t.lift(other, "mul")
    return mul(t, right, left) if left.kind is Kind.NUMBER else mul(t, left, right)


@define("div")
def div(t: Tracer, input: Any, other: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode == "floor":
        return floor_divide(t, input, other)
    if rounding_mode == "trunc":
        return _truncated_division(t, t.lift(input, "div"), t.lift(other, "div"))
    if rounding_mode is not None:
        t.refuse(f"div with rounding_mode={rounding_mode!r}", "rounding_mode is None, 'floor' or 'trunc'")
    left, right = t.lift(input, "div"), t.lift(other, "div")
    wide = widened(t, "div", left, right)
    return binary(t, "div", left, right, floating=True) if wide is None else wide


def _truncated_division(t: Tracer, left: Value, right: Value) -> Value:
    operands, kind = unify(t, [left, right], "div")
    if is_integer(operands[0].dtype):
        return t.emit("truncdiv", kind, *operands)
    wide = widened(t, "div", left, right, then="trunc")
    return round_like(t, "trunc", binary(t, "div", left, right, floating=True)) if wide is None else wide


@define("operator_div")
def operator_div(t: Tracer, input: Any, other: Any) -> Value:
    """``input / other``: Python leaves a number on the left to the tensor's ``__rtruediv__``."""
    left = t.lift(input, "div")
    return operator_rdiv(t, left, other) if left.kind is Kind.NUMBER else div(t, left, other)


@define("operator_rdiv")
def operator_rdiv(t: Tracer, input: Any, other: Any) -> Value:
    """``input / other`` for a number ``input``: torch's operator multiplies by the reciprocal."""
    other = t.lift(other)
    if other.kind is Kind.NUMBER:
        return div(t, input, other)
    return mul(t, floating_unary(t, "reciprocal", other), input)


@define("floor_divide")
def floor_divide(t: Tracer, input: Any, other: Any) -> Value:
    left, right = t.lift(input, "floor_divide"), t.lift(other, "floor_divide")
    wide = widened(t, "floordiv", left, right)
    return binary(t, "floordiv", left, right) if wide is None else wide


@define("pow")
def pow_(t: Tracer, input: Any, exponent: Any) -> Value:
    """Small constant exponents become the products and roots that torch's own kernel uses."""
    raised, by = t.lift(input, "pow"), t.lift(exponent, "pow")
    (base, power), kind = unify(t, [raised, by], "pow")
    # A number as it was written: torch compares, and raises the elements that fill no vector, in float64.
    number = t.constant_value((by if by.kind is Kind.NUMBER else power).node)
    if base.dtype is torch.bool or (is_integer(base.dtype) and number is not None and number < 0):
        t.refuse(f"pow of a {base.dtype} value with exponent {number}", "convert the base to a float first")
    if kind is Kind.NUMBER or number is None or base.dtype in REDUCED:
        return t.emit("pow", kind, base, power)
    special = _special_power(t, base, number)
    if special is not None:
        return special
    if base.dtype is torch.float32 and by.kind is Kind.NUMBER:
        power = Value(t, t.exponent(number), torch.float32, Kind.NUMBER)
    return t.emit("pow", kind, base, power)


@define("float_power")
def float_power(t: Tracer, input: Any, exponent: Any) -> Value:
    """``pow`` in float64, whatever the operands are."""
    operands = [t.lift(operand, "float_power") for operand in (input, exponent)]
    return pow_(t, *(t.convert(operand, torch.float64) for operand in operands))


def _special_power(t: Tracer, base: Value, number: float) -> Value | None:
    if number == 1:
        return base
    if number == 2:
        return t.emit("mul", base.kind, base, base)
    if number == 3:
        return t.emit("mul", base.kind, t.emit("mul", base.kind, base, base), base)
    roots = {0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    return t.emit(roots[number], base.kind, base) if number in roots and is_float(base.dtype) else None


@define("where")
def where(t: Tracer, condition: Any, input: Any, other: Any) -> Value:
    chosen = t.lift(condition, "where")
    if chosen.dtype is not torch.bool:
        t.refuse(
            f"torch.where with a {chosen.dtype} condition",
            "the condition must be bool: compare, or .to(torch.bool)",
        )
    operands = [t.lift(input, "where"), t.lift(other, "where")]
    dtype = result_type([(value.dtype, value.kind) for value in operands])
    operands = [narrow(t, value, dtype, "where") for value in operands]
    return t.emit("where", max(chosen.kind, *(value.kind for value in operands)), chosen, *operands)


@define("masked_fill")
def masked_fill(t: Tracer, input: Any, mask: Any, value: Any) -> Value:
    """The result keeps ``input``'s dtype, as in torch."""
    held = t.lift(input)
    return where(t, mask, t.convert(t.lift(value), held.dtype), held)


@define("clamp")
def clamp(t: Tracer, input: Any, min: Any = None, max: Any = None) -> Value:
    """Bounds join promotion; a nan bound gives nan; where bounds cross, ``max`` wins, as in torch."""
    bounds = {"clamp_min": min, "clamp_max": max}
    given = {name: t.lift(bound, "clamp") for name, bound in bounds.items() if bound is not None}
    if not given:
        t.refuse("clamp without bounds", "give min, max or both")
    operands, kind = unify(t, [t.lift(input), *given.values()], "clamp")
    value = operands[0]
    for name, bound in zip(given, operands[1:], strict=True):
        value = t.emit(_ON_BOOL[name] if value.dtype is torch.bool else name, kind, value, bound)
    return value


@define("clamp_min")
def clamp_min(t: Tracer, input: Any, min: Any) -> Value:
    return clamp(t, input, min=min)


@define("clamp_max")
def clamp_max(t: Tracer, input: Any, max: Any) -> Value:
    return clamp(t, input, max=max)


def _extreme(primitive: str, many: str) -> Handler:
    def handler(t: Tracer, input: Any, *other: Any, **named: Any) -> Value:
        rest = [*other, *named.values()]
        if len(rest) != 1 or not (set(named) <= {"other"}):
            t.refuse(
                f"{many} over elements",
                f"a pointwise function sees one scalar at a time: use torch.{many}(a, b)",
            )
        return binary(t, primitive, input, rest[0])

    return handler


define("max", "maximum")(_extreme("max", "maximum"))
define("min", "minimum")(_extreme("min", "minimum"))


def floating_unary(t: Tracer, primitive: str, input: Any) -> Value:
    """A function of real numbers: integers and bools become torch's default floating dtype."""
    operands, kind = unify(t, [t.lift(input, primitive)], primitive, floating=True)
    return t.emit(primitive, kind, *operands)


def round_like(t: Tracer, primitive: str, input: Any) -> Value:
    """Rounding; integers are already there."""
    value = t.lift(input, primitive)
    return value if is_integer(value.dtype) else floating_unary(t, primitive, value)


def _on_numbers(t: Tracer, primitive: str, input: Any) -> Value:
    value = t.lift(input, primitive)
    if value.dtype is torch.bool and primitive == "sign":
        return value
    if value.dtype is torch.bool:
        t.refuse(
            f"{primitive} of a bool value",
            "convert first: value.to(torch.int32); the negation of a mask is ~mask",
        )
    return t.emit(primitive, value.kind, value)


def _classify(t: Tracer, primitive: str, input: Any) -> Value:
    value = t.lift(input, primitive)
    if is_float(value.dtype):
        return t.emit(primitive, value.kind, value)
    return t.literal(primitive == "isfinite", torch.bool, value.kind)


def truth(t: Tracer, input: Any) -> Value:
    """``input != 0``."""
    return t.convert(t.lift(input, "a logical function"), torch.bool)


def _logical(t: Tracer, primitive: str, input: Any, other: Any) -> Value:
    left, right = truth(t, input), truth(t, other)
    return t.emit(primitive, max(left.kind, right.kind), left, right)


@define("logical_not")
def logical_not(t: Tracer, input: Any) -> Value:
    value = truth(t, input)
    return t.emit("logical_not", value.kind, value)


@define("bitwise_not")
def bitwise_not(t: Tracer, input: Any) -> Value:
    value = t.lift(input, "bitwise_not")
    if is_float(value.dtype):
        t.refuse(f"~ of a {value.dtype} value", "bitwise functions take integers or bools; compare first")
    return t.emit("logical_not" if value.dtype is torch.bool else "bitwise_not", value.kind, value)


def _bits(t: Tracer, primitive: str, input: Any, other: Any) -> Value:
    left, right = t.lift(input, primitive), t.lift(other, primitive)
    if is_float(left.dtype) or is_float(right.dtype):
        t.refuse(f"{primitive} of floating values", "bitwise functions take integers or bools; compare first")
    if left.kind is right.kind is Kind.NUMBER and left.dtype is right.dtype is torch.bool:
        return _logical(t, _ON_BOOL[primitive], left, right)
    return binary(t, primitive, left, right)


def _fixed(function: Callable[..., Value], primitive: str) -> Handler:
    if function in (binary, _bits, _logical):
        return lambda t, input, other: function(t, primitive, input, other)
    return lambda t, input: function(t, primitive, input)


def _register(function: Callable[..., Value], names: str, primitives: str = "") -> None:
    for name, primitive in zip(names.split(), (primitives or names).split(), strict=True):
        define(name)(_fixed(function, primitive))


_register(binary, "eq ne lt le gt ge remainder fmod")
_register(_bits, "bitwise_and bitwise_or bitwise_xor")
_register(_bits, "bitwise_left_shift bitwise_right_shift", "shift_left shift_right")
_register(_logical, "logical_and logical_or logical_xor")
_register(_classify, "isnan isinf isfinite")
_register(_on_numbers, "neg abs sign")
_register(floating_unary, "exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal sigmoid erf erfc erfinv")
_register(floating_unary, "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh")
_register(round_like, "floor ceil trunc")


@define("relu")
def relu(t: Tracer, input: Any, inplace: bool = False) -> Value:
    if inplace:
        t.refuse("relu with inplace=True", "values are immutable: use the result")
    return _on_numbers(t, "relu", input)


@define("atan2")
def atan2(t: Tracer, input: Any, other: Any) -> Value:
    return binary(t, "atan2", input, other, floating=True)
