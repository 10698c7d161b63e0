"""Prints a pointwise graph as a function of Triton: the source that kernels have in place of a user's function.

The printed function takes the graph's inputs, blocks or scalars that broadcast together, and ``captured``: one flat
tuple with, for each captured tensor, its pointer, its sizes and its strides (:func:`flatten`). It returns what the
graph returns, each output in its own dtype and of the shape that its inputs broadcast to.
"""

from __future__ import annotations

import functools
import linecache
import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.pointwise import Graph, Node
from torchhal.pointwise.dtypes import INTEGERS, REDUCED, is_float, is_integer, round_float

TYPES: Final = {
    torch.float64: "tl.float64", torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16", torch.int64: "tl.int64", torch.int32: "tl.int32", torch.int16: "tl.int16",
    torch.int8: "tl.int8", torch.uint8: "tl.uint8", torch.bool: "tl.int1",
}  # fmt: skip
"""Every dtype of the language, as Triton calls it."""

_WIDTH: Final = dict(zip(INTEGERS, (64, 32, 16, 8, 8), strict=True))

_INFIX: Final = {
    "add": "+", "sub": "-", "mul": "*", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "logical_and": "&", "logical_or": "|", "logical_xor": "^",
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^",
}  # fmt: skip
_LIBRARY: Final = {
    "round": "rint",
    **{name: name for name in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "sin", "cos", "tan", "asin", "acos",
        "atan", "sinh", "cosh", "asinh", "acosh", "atanh", "erfc", "erfinv", "trunc", "fmod", "atan2",
    )},
}  # fmt: skip
"""Functions of floats that the mathematics library of the device has, under the name it has there."""
_FORMS: Final = {
    "where": "tl.where({0}, {1}, {2})",
    "detach": "{0}",
    "abs": "tl.abs({0})",
    "sign": "arithmetic.sign({0})",
    "truncdiv": "{0} // {1}",
    "bitwise_not": "~{0}",
    "logical_not": "{0} == 0",
    "min": "arithmetic.minimum({0}, {1})",
    "max": "arithmetic.maximum({0}, {1})",
    "clamp_min": "arithmetic.maximum({0}, {1})",
    "clamp_max": "arithmetic.minimum({0}, {1})",
    "div": "arithmetic.divide({0}, {1})",
    "sqrt": "arithmetic.square_root({0})",
    "reciprocal": "arithmetic.reciprocal({0})",
    "sigmoid": "arithmetic.sigmoid({0})",
    "tanh": "arithmetic.tanh({0})",
    "erf": "arithmetic.erf({0})",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "isnan": "{0} != {0}",
    "isinf": 'tl.abs({0}) == float("inf")',
    "isfinite": 'tl.abs({0}) < float("inf")',
}
"""How operands are put together, where it does not depend on their dtype."""
_FLOAT_FORMS: Final = {
    "neg": "{0} * -1.0",
    "relu": "tl.where({0} < 0, 0.0, {0})",
    "floordiv": "arithmetic.float_floordiv({0}, {1})",
    "remainder": "arithmetic.float_remainder({0}, {1})",
    "pow": "libdevice.pow({0}, {1})",
}
_INT_FORMS: Final = {
    "neg": "-{0}",
    "relu": "tl.maximum({0}, 0)",
    "min": "tl.minimum({0}, {1})",
    "max": "tl.maximum({0}, {1})",
    "clamp_min": "tl.maximum({0}, {1})",
    "clamp_max": "tl.minimum({0}, {1})",
    "floordiv": "arithmetic.int_floordiv({0}, {1})",
    "remainder": "arithmetic.int_remainder({0}, {1})",
    "fmod": "{0} % {1}",
    "pow": "arithmetic.int_pow({0}, {1}, {bits})",
    "shift_left": "arithmetic.shift_left({0}, {1}, {bits})",
    "shift_right": "arithmetic.shift_right({0}, {1}, {bits})",
}
_UNSIGNED_FORMS: Final = {
    "abs": "{0}",
    "bitwise_not": "{0} ^ 255",
    "neg": "0 - {0}",
    "pow": "arithmetic.unsigned_pow({0}, {1}, {bits})",
    "floordiv": "{0} // {1}",
    "remainder": "{0} % {1}",
}

# ---------------------------------------------------------------------------- nodes


def expression(
    graph: Graph, node: Node, wide: bool, direct: frozenset[int] | None = None, exact: bool = False
) -> str:
    """The Triton expression of one node, over ``v0``, ``v1``, ... for the earlier ones.

    Args:
        graph: the graph.
        node: one of its nodes.
        wide: whether offsets into captured tensors may exceed 32 bits.
        direct: as :func:`source` has it.
        exact: whether divisions by numbers are rounded correctly where the quotient is not normal, too.
    """
    if node.primitive == "input":
        return f"x{node.position}"
    if node.primitive == "constant":
        return _constant(node)
    if node.primitive == "gather":
        return _gather(graph, node, wide, direct or frozenset())
    operands = [_operand(graph, i) for i in node.operands]
    if node.primitive == "cast":
        return convert(operands[0], graph.nodes[node.operands[0]].dtype, node.dtype)
    by = graph.nodes[node.operands[-1]]
    if node.primitive == "div" and by.primitive == "constant" and by.dtype is not torch.float64:
        ordinary = "" if exact else _division(operands[0], float(by.value))
        if ordinary:
            return _rounded(ordinary, node)
    form = _form(node.primitive, by.dtype)
    return _rounded(form.format(*operands, bits=_WIDTH.get(node.dtype, 0)), node)


def _division(text: str, divisor: float) -> str:
    """Division by a number whose inverse is an ordinary float32; an empty string for others."""
    if not 2.0**-60 < abs(divisor) < 2.0**60:
        return ""
    inverse = round_float(1.0 / divisor, torch.float32)
    if math.frexp(divisor)[0] in (0.5, -0.5):
        return f"{text} * {inverse!r}"
    return f"arithmetic.divide_by({text}, {divisor!r}, {inverse!r})"


def _form(primitive: str, dtype: torch.dtype) -> str:
    """The template of a primitive over operands of a dtype."""
    tables: list[dict[str, str]] = [_FORMS]
    if is_float(dtype):
        tables.insert(0, _FLOAT_FORMS)
        if primitive in _LIBRARY:
            places = "{0}, {1}" if primitive in ("fmod", "atan2") else "{0}"
            return f"libdevice.{_LIBRARY[primitive]}({places})"
    elif is_integer(dtype):
        tables.insert(0, _INT_FORMS)
        if dtype is torch.uint8:
            tables.insert(0, _UNSIGNED_FORMS)
    if primitive in _INFIX:
        return f"{{0}} {_INFIX[primitive]} {{1}}"
    return next(table[primitive] for table in tables if primitive in table)


def _operand(graph: Graph, i: int) -> str:
    """A node as operand: of a half type, which is computed with in float32, widened."""
    return f"v{i}.to(tl.float32)" if graph.nodes[i].dtype in REDUCED else f"v{i}"


def _rounded(text: str, node: Node) -> str:
    """A half type's result rounded once, others in the type that they are."""
    return f"({text}).to({TYPES[node.dtype]})"


def _constant(node: Node) -> str:
    value, dtype = node.value, node.dtype
    if not is_float(dtype):
        return f"tl.full((), {int(value)}, {TYPES[dtype]})"
    text = repr(float(value)) if math.isfinite(value) else f'float("{float(value)}")'
    if dtype in REDUCED:
        return f"tl.full((), {text}, tl.float32).to({TYPES[dtype]})"
    return f"tl.full((), {text}, {TYPES[dtype]})"


def convert(text: str, source: torch.dtype, target: torch.dtype) -> str:
    """The expression that converts ``text``, a half type already widened, as torch does.

    Half types are rounded through float32; truth is being other than 0; a float becomes an unsigned byte by way of a
    signed number.
    """
    if target is source:
        return f"({text}).to({TYPES[target]})"
    if target is torch.bool:
        return f"({text} != 0)"
    steps = [target]
    if target in REDUCED and source is not torch.float32:
        steps.insert(0, torch.float32)
    if target is torch.uint8 and is_float(source):
        steps.insert(0, torch.int32)
    return text + "".join(f".to({TYPES[step]})" for step in steps)


def _gather(graph: Graph, node: Node, wide: bool, direct: frozenset[int]) -> str:
    start = sum(1 + 2 * spec.ndim for spec in graph.captured[: node.position])
    ndim = graph.captured[node.position].ndim
    pointer, mask = f"captured[{start}]", ""
    for dim, i in enumerate(node.operands):
        size, stride = f"captured[{start + 1 + dim}]", f"captured[{start + 1 + ndim + dim}]"
        if node.position in direct:
            pointer += f" + v{i}.to({'tl.int64' if wide else 'tl.int32'}) * {stride}"
            mask += " & " * bool(mask) + f"live[{graph.nodes[i].position}]"
        else:
            pointer += f" + arithmetic.offset(v{i}, {size}, {stride}, {wide})"
    loaded = f"tl.load({pointer}, mask={mask})" if mask else f"tl.load({pointer})"
    return f"({loaded} != 0)" if node.dtype is torch.bool else loaded


def direct_gathers(graph: Graph, extents: Sequence[int], captured: Sequence[Tensor]) -> frozenset[int]:
    """Positions of the captured tensors that are only read at inputs as they are, and are large enough for all of those.

    Args:
        graph: the function.
        extents: of each input how many values it counts through from 0; 0 for one that is no index.
        captured: its captured tensors.
    """
    other: set[int] = set()
    found: set[int] = set()
    for node in graph.nodes:
        if node.primitive == "gather" and node.operands:
            places = [graph.nodes[i] for i in node.operands]
            sizes = captured[node.position].shape
            fits = all(
                place.primitive == "input" and 0 < extents[place.position] <= size
                for place, size in zip(places, sizes, strict=True)
            )
            (found if fits else other).add(node.position)
    return frozenset(found - other)


# ---------------------------------------------------------------------------- functions


def source(
    graph: Graph, wide: bool = False, direct: frozenset[int] | None = None, exact: bool = False
) -> str:
    """The source of the graph's Triton function, ``pointwise``.

    Args:
        graph: the function.
        wide: whether offsets into captured tensors may exceed 32 bits.
        direct: captured tensors by :func:`direct_gathers`, whose indices need not be brought inside the tensor: the compiler
            can then see that neighbours lie side by side, and load them at once. The function takes a last argument
            ``live``, of each input where it is in range. None for a function without that argument.
        exact: as :func:`expression` has it.
    """
    last = ["captured"] if direct is None else ["captured", "live"]
    inputs = ", ".join([*(f"x{i}" for i in range(len(graph.inputs))), *last])
    lines = [
        f"    v{i} = {expression(graph, node, wide, direct, exact)}" for i, node in enumerate(graph.nodes)
    ]
    outputs = ", ".join(f"v{i}" for i in graph.outputs)
    return "\n".join(["@triton.jit", f"def pointwise({inputs}):", *lines, f"    return {outputs}", ""])


@functools.lru_cache(maxsize=1024)
def function(
    graph: Graph, wide: bool = False, direct: frozenset[int] | None = None, exact: bool = False
) -> Any:
    """The graph as a Triton function, compiled into the kernels that call it; made once for each graph.

    Needs Triton: ask :func:`torchhal.portable.unavailable` first.
    """
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    from torchhal.portable import arithmetic

    text = source(graph, wide, direct, exact)
    kind = "" if direct is None else f" direct {sorted(direct)}"
    name = f"<pointwise {graph.digest}{' wide' * wide}{kind}{' exact' * exact}>"
    # Triton reads the source of a function back from where Python says that it came from.
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {
        "triton": triton, "tl": tl, "libdevice": libdevice, "arithmetic": arithmetic, "__name__": __name__,
    }  # fmt: skip
    exec(compile(text, name, "exec"), space)
    return space["pointwise"]


def flatten(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """The argument ``captured`` of a printed function: for each tensor its pointer, sizes and strides.

    An empty tensor has nothing that could be read, and may yet be asked by positions that a mask hides: it is stood in
    for by a single zero.
    """
    flat: list[Any] = []
    for tensor in tensors:
        if tensor.numel() == 0:
            tensor = tensor.new_zeros((1,) * tensor.dim())
        flat += (tensor, *tensor.shape, *tensor.stride())
    return tuple(flat)


def is_wide(tensors: Sequence[Tensor]) -> bool:
    """Whether an offset into any of the tensors needs more than 32 bits."""
    return any(_extent(tensor) >= 2**31 for tensor in tensors)


def _extent(tensor: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
