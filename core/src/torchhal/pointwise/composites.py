"""Torch's elementwise functions that are written with others: activations, conversions, constants."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from torchhal.pointwise.dtypes import REDUCED, is_float
from torchhal.pointwise.functions import call, clamp, define, floating_unary, is_one, round_like, unify, where
from torchhal.pointwise.promotion import Kind
from torchhal.pointwise.values import Value

if TYPE_CHECKING:
    from torchhal.pointwise.tracer import Tracer


def activation(*names: str) -> Callable[[Callable[..., Value]], Callable[..., Value]]:
    """Register a function of one floating value, computed in float32 for half types and rounded once."""

    def register(function: Callable[..., Value]) -> Callable[..., Value]:
        def handler(t: Tracer, input: Any, *args: Any, inplace: bool = False, **kwargs: Any) -> Value:
            if inplace:
                t.refuse(f"{names[0]} with inplace=True", "values are immutable: use the result")
            (value,), _ = unify(t, [t.lift(input, names[0])], names[0], floating=True)
            if value.dtype not in REDUCED:
                return function(value, *args, **kwargs)
            return t.convert(function(t.convert(value, torch.float32), *args, **kwargs), value.dtype)

        define(*names)(handler)
        return function

    return register


@activation("gelu")
def gelu(x: Value, approximate: str = "none") -> Any:
    if approximate == "none":
        return x * 0.5 * (call("erf", x * math.sqrt(0.5)) + 1.0)
    if approximate != "tanh":
        x.tracer.refuse(f"gelu with approximate={approximate!r}", "approximate is 'none' or 'tanh'")
    inner = (x + x * x * x * 0.044715) * math.sqrt(2.0 / math.pi)
    return x * 0.5 * (call("tanh", inner) + 1.0)


@activation("silu")
def silu(x: Value) -> Any:
    return x * call("sigmoid", x)


@activation("softplus")
def softplus(x: Value, beta: float = 1.0, threshold: float = 20.0) -> Any:
    scaled = x * beta
    large = scaled > threshold
    # The inner where keeps exp finite on the branch that is not taken, so its gradient is 0, not nan.
    return call("where", large, x, call("log1p", call("exp", call("where", large, 0.0, scaled))) / beta)


@activation("mish")
def mish(x: Value) -> Any:
    return x * call("tanh", softplus(x))


@activation("log_sigmoid", "logsigmoid")
def log_sigmoid(x: Value) -> Any:
    return call("minimum", x, 0.0) - call("log1p", call("exp", -abs(x)))


@activation("elu")
def elu(x: Value, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    negative = call("expm1", call("where", x > 0, 0.0, x * input_scale)) * (alpha * scale)
    return call("where", x > 0, x * scale, negative)


@activation("selu")
def selu(x: Value) -> Any:
    return elu(x, 1.6732632423543772, 1.0507009873554805)


@activation("celu")
def celu(x: Value, alpha: float = 1.0) -> Any:
    return elu(x, alpha, 1.0, 1.0 / alpha)


@activation("leaky_relu")
def leaky_relu(x: Value, negative_slope: float = 0.01) -> Any:
    return call("where", x > 0, x, x * negative_slope)


@activation("relu6")
def relu6(x: Value) -> Any:
    return hardtanh(x, 0.0, 6.0)


@activation("hardtanh")
def hardtanh(x: Value, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    # As torch, and unlike clamp, the gradient is 0 at both bounds.
    return call("where", x <= min_val, min_val, call("where", x >= max_val, max_val, x))


@activation("hardsigmoid")
def hardsigmoid(x: Value) -> Any:
    return hardtanh(x + 3.0, 0.0, 6.0) / 6.0


@activation("hardswish")
def hardswish(x: Value) -> Any:
    # In torch the gradient is 0 at -3 and 1 at 3, which selecting (and not multiplying) reproduces.
    return call("where", x <= -3, x * 0.0, call("where", x >= 3, x, x * ((x + 3.0) / 6.0)))


@activation("softsign")
def softsign(x: Value) -> Any:
    return x / (abs(x) + 1.0)


@activation("tanhshrink")
def tanhshrink(x: Value) -> Any:
    return x - call("tanh", x)


@activation("threshold", "_threshold")
def threshold(x: Value, threshold: float, value: float) -> Any:
    return call("where", x <= threshold, value, x)


@activation("deg2rad")
def deg2rad(x: Value) -> Any:
    return x * (math.pi / 180.0)


@activation("rad2deg")
def rad2deg(x: Value) -> Any:
    return x * (180.0 / math.pi)


@define("square")
def square(t: Tracer, input: Any) -> Value:
    return call("pow", t.lift(input), 2)


@define("frac")
def frac(t: Tracer, input: Any) -> Value:
    value = t.lift(input)
    return call("sub", value, round_like(t, "trunc", value))


@define("round")
def round_(t: Tracer, input: Any, *, decimals: int = 0) -> Value:
    if decimals:
        t.refuse("round to decimals", "multiply, torch.round, divide")
    return round_like(t, "round", input)


@define("fmax")
def fmax(t: Tracer, input: Any, other: Any) -> Value:
    return _ignoring_nan(t, "maximum", input, other)


@define("fmin")
def fmin(t: Tracer, input: Any, other: Any) -> Value:
    return _ignoring_nan(t, "minimum", input, other)


def _ignoring_nan(t: Tracer, name: str, input: Any, other: Any) -> Value:
    left, right = t.lift(input), t.lift(other)
    kept = call("where", call("isnan", right), left, call(name, left, right))
    return call("where", call("isnan", left), right, kept)


@define("logaddexp")
def logaddexp(t: Tracer, input: Any, other: Any) -> Value:
    left, right = t.lift(input), t.lift(other)
    equal = call("logical_and", call("eq", left, right), call("isinf", left))
    gap = call("where", equal, 0.0, abs(left - right))
    high = call("maximum", left, right)
    return call("where", equal, left, call("add", high, call("log1p", call("exp", -gap))))


@define("hypot")
def hypot(t: Tracer, input: Any, other: Any) -> Value:
    left, right = t.lift(input), t.lift(other)
    return call("sqrt", call("add", call("square", left), call("square", right)))


@define("lerp")
def lerp(t: Tracer, input: Any, end: Any, weight: Any) -> Value:
    """Torch picks the form by the weight, so that both ends are reached exactly."""
    start, stop, share = t.lift(input), t.lift(end), t.lift(weight)
    span = call("sub", stop, start)
    near = call("add", start, call("mul", span, share))
    far = call("sub", stop, call("mul", span, call("sub", 1.0, share)))
    return where(t, call("lt", abs(share), 0.5), near, far)


@define("addcmul")
def addcmul(t: Tracer, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Value:
    product = call("mul", t.lift(tensor1), t.lift(tensor2))
    return call("add", t.lift(input), product if is_one(value) else call("mul", product, value))


@define("addcdiv")
def addcdiv(t: Tracer, input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> Value:
    quotient = call("div", t.lift(tensor1), t.lift(tensor2))
    return call("add", t.lift(input), quotient if is_one(value) else call("mul", quotient, value))


@define("nan_to_num")
def nan_to_num(
    t: Tracer, input: Any, nan: float | None = 0.0, posinf: float | None = None, neginf: float | None = None
) -> Value:
    value = t.lift(input)
    if not is_float(value.dtype):
        return value
    limits = torch.finfo(value.dtype)
    high, low = limits.max if posinf is None else posinf, limits.min if neginf is None else neginf
    bounded = call(
        "where", call("eq", value, math.inf), high, call("where", call("eq", value, -math.inf), low, value)
    )
    return call("where", call("isnan", value), 0.0 if nan is None else nan, bounded)


@define(
    "positive", "clone", "contiguous", "alias", "lift_fresh", "lift_fresh_copy", "lift_fresh_copy_default"
)
def same(t: Tracer, input: Any, *, memory_format: Any = None) -> Value:
    return t.lift(input)


@define("detach")
def detach(t: Tracer, input: Any) -> Value:
    value = t.lift(input)
    return t.emit("detach", value.kind, value)


def _register_conversions() -> None:
    dtypes = {
        "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
        "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8, "byte": torch.uint8,
        "bool": torch.bool,
    }  # fmt: skip
    for name, dtype in dtypes.items():
        define(name)(lambda t, input, dtype=dtype: t.convert(t.lift(input), dtype))


_register_conversions()


@define("type_as")
def type_as(t: Tracer, input: Any, other: Any) -> Value:
    return t.convert(t.lift(input), other.dtype)


@define("to", "type", "_to_copy", "convert_element_type")
def to(
    t: Tracer,
    input: Any,
    *args: Any,
    dtype: torch.dtype | None = None,
    device: Any = None,
    non_blocking: bool = False,
    copy: bool = False,
    memory_format: Any = None,
    layout: Any = None,
    pin_memory: Any = None,
) -> Value:
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (torch.Tensor, Value)):
            dtype = arg.dtype
        elif isinstance(arg, (str, torch.device)):
            device = arg
    if device is not None and torch.device(device).type != t.device.type:
        t.refuse(
            f"moving a value to {device}",
            f"values live where the call's tensors live ({t.device}): leave it out",
        )
    value = t.lift(input)
    return value if dtype is None else t.convert(value, dtype)


@define("full_like")
def full_like(
    t: Tracer, input: Any, fill_value: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Value:
    value, filling = t.lift(input), t.lift(fill_value)
    constant = t.convert(filling, dtype or value.dtype)
    return Value(t, constant.node, constant.dtype, value.kind)


def _register_fills() -> None:
    for name, number in (("zeros_like", 0), ("ones_like", 1)):
        define(name)(lambda t, input, number=number, **options: full_like(t, input, number, **options))
    for name, number in (("new_zeros", 0), ("new_ones", 1)):
        define(name)(
            lambda t, input, size=(), number=number, **options: new_full(t, input, size, number, **options)
        )


@define("new_full")
def new_full(t: Tracer, input: Any, size: Any, fill_value: Any, **options: Any) -> Value:
    if tuple(size):
        t.refuse(
            f"a new tensor of shape {tuple(size)}", "a pointwise function makes scalars only: use size ()"
        )
    constant = full_like(t, input, fill_value, **options)
    return Value(t, constant.node, constant.dtype, Kind.SCALAR)


@define("new_tensor")
def new_tensor(
    t: Tracer, input: Any, data: Any, *, dtype: torch.dtype | None = None, **options: Any
) -> Value:
    constant = t.lift(data, "new_tensor")
    chosen = dtype or (torch.get_default_dtype() if is_float(constant.dtype) else constant.dtype)
    return Value(t, t.convert(constant, chosen).node, chosen, Kind.SCALAR)


_register_fills()


@define("getitem")
def getitem(t: Tracer, input: Any, index: Any) -> Any:
    indices = index if isinstance(index, tuple) else (index,)
    return t.index(input, indices) if isinstance(input, torch.Tensor) else input[index]


@define("index")
def index(t: Tracer, input: Any, indices: Any) -> Any:
    return t.index(input, tuple(indices))


@define("scalar_tensor", "tensor", "as_tensor", "asarray")
def tensor(t: Tracer, data: Any, *, dtype: torch.dtype | None = None, **options: Any) -> Value:
    value = t.lift(data, "torch.tensor")
    return value if dtype is None else t.convert(value, dtype)


@define("dim", "numel", "nelement", "element_size")
def no_dimensions(t: Tracer, input: Any) -> Any:
    t.refuse(
        "a shape query of a value", "a value is a scalar; its position is given by the function's arguments"
    )


@define("size")
def size(t: Tracer, input: Any, dim: int | None = None) -> Any:
    if dim is not None:
        t.refuse(
            "size(dim) of a value", "a value is a scalar; its position is given by the function's arguments"
        )
    return torch.Size(())


@define("is_floating_point")
def is_floating_point(t: Tracer, input: Any) -> Any:
    return is_float(t.lift(input).dtype)


__all__ = ["activation", "clamp", "floating_unary"]
