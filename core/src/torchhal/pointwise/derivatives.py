"""The derivative rule of every primitive, with autograd's conventions at kinks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch

from torchhal.pointwise.functions import call

Rule = Callable[..., tuple[Any, ...]]
"""``rule(g, y, *x)``: gradient of each operand from the result's gradient ``g``, result ``y``, operands ``x``;
None for an operand the result does not depend on smoothly."""

NON_DIFFERENTIABLE: Final = frozenset(
    ("constant", "input", "gather", "detach", "sign", "floor", "ceil", "round", "trunc", "floordiv", "truncdiv",
     "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_xor", "logical_not",
     "bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not", "shift_left", "shift_right",
     "isnan", "isinf", "isfinite")
)  # fmt: skip
"""Primitives through which no gradient flows (leaves collect it instead)."""

_LN2, _LN10 = math.log(2.0), math.log(10.0)


def _keep(condition: Any, g: Any) -> Any:
    return call("where", condition, g, 0.0)


def _drop(condition: Any, g: Any) -> Any:
    return call("where", condition, 0.0, g)


def _where(g: Any, y: Any, condition: Any, left: Any, right: Any) -> tuple[Any, ...]:
    return None, _keep(condition, g), _drop(condition, g)


def _extreme(g: Any, left: Any, right: Any, left_loses: Any, right_loses: Any) -> tuple[Any, ...]:
    """Ties split evenly, as torch.maximum and torch.minimum do."""
    shared = call("where", call("eq", left, right), g / 2.0, g)
    return _drop(left_loses, shared), _drop(right_loses, shared)


def _max(g: Any, y: Any, left: Any, right: Any) -> tuple[Any, ...]:
    return _extreme(g, left, right, left < right, left > right)


def _min(g: Any, y: Any, left: Any, right: Any) -> tuple[Any, ...]:
    return _extreme(g, left, right, left > right, left < right)


_TIES: Final = torch.torch_version.TorchVersion(torch.__version__) >= "2.14"
"""Torch's clamps pass the whole gradient to the input at a bound until 2.13; since 2.14 none of it where the bound
is a number, and half to each where it is a tensor."""


def _clamp_min(g: Any, y: Any, x: Any, bound: Any) -> tuple[Any, ...]:
    if not _TIES:
        return _keep(x >= bound, g), _keep(x < bound, g)
    return (_keep(x > bound, g), None) if _is_number(bound) else _max(g, y, x, bound)


def _clamp_max(g: Any, y: Any, x: Any, bound: Any) -> tuple[Any, ...]:
    if not _TIES:
        return _keep(x <= bound, g), _keep(x > bound, g)
    return (_keep(x < bound, g), None) if _is_number(bound) else _min(g, y, x, bound)


def _is_number(value: Any) -> bool:
    return bool(value.tracer.nodes[value.node].primitive == "constant")


def _pow(g: Any, y: Any, base: Any, exponent: Any) -> tuple[Any, ...]:
    slope = g * (exponent * call("pow", base, exponent - 1.0))
    flat = call("logical_and", base == 0, exponent >= 0)
    return _drop(exponent == 0, slope), _drop(flat, g * (y * call("log", base)))


def _atan2(g: Any, y: Any, left: Any, right: Any) -> tuple[Any, ...]:
    scale = call("reciprocal", left * left + right * right)
    scale = call("where", call("isinf", scale), 0.0, scale)
    return g * (right * scale), g * (-left * scale)


def _div(g: Any, y: Any, left: Any, right: Any) -> tuple[Any, ...]:
    return g / right, -g * (y / right)


def _remainder(g: Any, y: Any, left: Any, right: Any) -> tuple[Any, ...]:
    return g, -g * call("floor", left / right)


def _fmod(g: Any, y: Any, left: Any, right: Any) -> tuple[Any, ...]:
    return g, -g * call("trunc", left / right)


def _one(rule: Callable[[Any, Any, Any], Any]) -> Rule:
    return lambda g, y, x: (rule(g, y, x),)


DERIVATIVES: Final[dict[str, Rule]] = {
    "where": _where, "max": _max, "min": _min, "pow": _pow, "atan2": _atan2, "div": _div,
    "remainder": _remainder, "fmod": _fmod,
    "add": lambda g, y, left, right: (g, g),
    "sub": lambda g, y, left, right: (g, -g),
    "mul": lambda g, y, left, right: (g * right, g * left),
    "clamp_min": _clamp_min, "clamp_max": _clamp_max,
    "relu": _one(lambda g, y, x: _drop(y <= 0, g)),
    "cast": _one(lambda g, y, x: call("to", g, x.dtype)),
    "neg": _one(lambda g, y, x: -g),
    "abs": _one(lambda g, y, x: g * call("sign", x)),
    "exp": _one(lambda g, y, x: g * y),
    "exp2": _one(lambda g, y, x: g * y * _LN2),
    "expm1": _one(lambda g, y, x: g * (y + 1.0)),
    "log": _one(lambda g, y, x: g / x),
    "log2": _one(lambda g, y, x: g / (x * _LN2)),
    "log10": _one(lambda g, y, x: g / (x * _LN10)),
    "log1p": _one(lambda g, y, x: g / (x + 1.0)),
    "sqrt": _one(lambda g, y, x: g / (y * 2.0)),
    "rsqrt": _one(lambda g, y, x: g * -0.5 * (y * y * y)),
    "reciprocal": _one(lambda g, y, x: -g * (y * y)),
    "sin": _one(lambda g, y, x: g * call("cos", x)),
    "cos": _one(lambda g, y, x: g * -call("sin", x)),
    "tan": _one(lambda g, y, x: g * (y * y + 1.0)),
    "asin": _one(lambda g, y, x: g * call("rsqrt", 1.0 - x * x)),
    "acos": _one(lambda g, y, x: g * -call("rsqrt", 1.0 - x * x)),
    "atan": _one(lambda g, y, x: g / (x * x + 1.0)),
    "sinh": _one(lambda g, y, x: g * call("cosh", x)),
    "cosh": _one(lambda g, y, x: g * call("sinh", x)),
    "tanh": _one(lambda g, y, x: g * (1.0 - y * y)),
    "asinh": _one(lambda g, y, x: g * call("rsqrt", x * x + 1.0)),
    "acosh": _one(lambda g, y, x: g * call("rsqrt", x * x - 1.0)),
    "atanh": _one(lambda g, y, x: g / (1.0 - x * x)),
    "sigmoid": _one(lambda g, y, x: g * ((1.0 - y) * y)),
    "erf": _one(lambda g, y, x: g * (call("exp", -(x * x)) * (2.0 / math.sqrt(math.pi)))),
    "erfc": _one(lambda g, y, x: g * (call("exp", -(x * x)) * (-2.0 / math.sqrt(math.pi)))),
    "erfinv": _one(lambda g, y, x: g * (call("exp", y * y) * (math.sqrt(math.pi) / 2.0))),
}  # fmt: skip
"""The rule of each differentiable primitive; together with NON_DIFFERENTIABLE it covers the table."""
