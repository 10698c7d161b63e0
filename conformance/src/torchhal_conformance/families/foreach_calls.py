"""Which calls of foreach_map the corpus is made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Final

import torch

from torchhal.pointwise.primitives import PRIMITIVES
from torchhal_conformance.families import primitives
from torchhal_conformance.families.foreach import FLOATS, INTEGERS, SHAPES, Call

LIST: Final = ("list",)
ONES: Final = ("sqrt", "double", "third", "clip", "sigmoid", "gelu", "by_held", "held_tanh")
TWOS: Final = ("add", "mul", "div", "chain", "larger", "sum_and_product", "exponential")
ADAMW: Final[dict[str, Any]] = {
    "function": "adamw",
    "operands": ("list", "list", "list", "list", "float"),
}
LEADING: Final = ("add", "sub", "mul", "div", "pow", "number_over")
"""Functions that take a number first, of which torch rounds some to the tensors' type before it computes."""
THREE: Final = ("list", "list", "list")
MEMORY: Final[tuple[dict[str, Any], ...]] = (
    *({"function": "chain", "memory": memory, "shapes": "odd"} for memory in ("expanded", "offset")),
    {"function": "decay", "operands": ("list", "mixed"), "shapes": "odd"},
)
ALIASING: Final[tuple[dict[str, Any], ...]] = (
    {"function": "chain", "alias": "repeated"},
    {"function": "decay", "operands": ("list", "floats"), "alias": "repeated", "shapes": "odd"},
    {"function": "chain", "alias": "same"},
    {"function": "fused", "operands": THREE, "alias": "same", "shapes": "odd"},
    {"function": "chain", "alias": "same", "out": "first"},
    {"function": "chain", "alias": "repeated", "out": "new"},
    *(
        {"function": "chain", "alias": "buffer", "shapes": shapes}
        for shapes in ("mixed", "empty", "some_scalars")
    ),
    {"function": "chain", "alias": "buffer", "out": "first", "shapes": "odd"},
    *({"function": "chain", "out": out} for out in ("second", "pieces", "woven")),
    *({"function": "chain", "out": out, "shapes": "empty"} for out in ("second", "pieces", "woven")),
    *({"function": "chain", "out": out, "shapes": "some_scalars"} for out in ("first", "pieces", "woven")),
    {"function": "chain", "out": "woven", "shapes": "broadcast"},
    *({"function": "sum_and_product", "out": out} for out in ("operands", "pieces", "woven")),
)
"""Tensors in one another's memory, where that means something; what does not is refused before a backend is asked."""
FEATURES: Final[tuple[dict[str, Any], ...]] = (
    *({"function": name, "operands": LIST} for name in ONES),
    *({"function": name} for name in TWOS),
    *({"function": "chain", "shapes": shapes} for shapes in SHAPES if shapes not in ("thousand", "few")),
    {"function": "fused", "operands": ("list", "list", "list"), "shapes": "odd"},
    {"function": "fused", "operands": ("list", "list", "list"), "shapes": "broadcast"},
    {"function": "sum_and_product", "shapes": "empty"},
    {"function": "compare"},
    {"function": "value_and_sign", "operands": LIST},
    *({"function": "decay", "operands": ("list", how)} for how in ("float", "integer", "tensor", "floats")),
    *({"function": "decay", "operands": ("list", how)} for how in ("integers", "truths")),
    {"function": "two_numbers", "operands": ("list", "floats", "integer"), "shapes": "odd"},
    {"function": "two_numbers", "operands": ("list", "tensor", "float")},
    {"function": "mul", "operands": ("list", "float")},
    {"function": "from_left", "operands": ("float", "list")},
    *(
        {"function": name, "operands": (how, "list")}
        for name in LEADING
        for how in ("float", "integer", "floats")
    ),
    {"function": "decay", "operands": ("list", "floats"), "shapes": "one"},
    *({**ADAMW, "shapes": shapes} for shapes in ("mixed", "odd", "empty")),
    {"function": "chain", "memory": "transposed"},
    {"function": "chain", "memory": "gaps"},
    {"function": "chain", "out": "first"},
    {"function": "chain", "out": "new"},
    {"function": "chain", "out": "wide"},
    {"function": "chain", "out": "first", "memory": "transposed"},
    {"function": "chain", "out": "first", "shapes": "empty"},
    {"function": "sum_and_product", "out": "new"},
    {"function": "decay", "operands": ("list", "floats"), "out": "first"},
    {"function": "add_"},
    {"function": "mul_", "operands": ("list", "float"), "shapes": "odd"},
    *({"function": name, "gradient": "operands"} for name in ("chain", "exponential", "sum_and_product")),
    {"function": "fused", "operands": ("list", "list", "list"), "gradient": "operands"},
    {"function": "fused", "operands": ("list",) * 3, "gradient": "operands", "shapes": "broadcast"},
    {"function": "decay", "operands": ("list", "floats"), "gradient": "operands", "shapes": "odd"},
    {"function": "chain", "gradient": "operands", "shapes": "empty"},
    # The gradient of one number is a sum, in which a long list would leave more luck than arithmetic.
    {"function": "held_tanh", "operands": LIST, "gradient": "captured", "shapes": "few"},
    {"function": "held_pair"},
)
REDUCTIONS: Final[tuple[dict[str, Any], ...]] = (
    # Of squares, so that sums are not what is left of larger numbers.
    *({"function": "square", "operands": LIST, "shapes": s, "reduction": "sum"} for s in ("mixed", "odd", "empty", "scalars")),
    *({"function": "chain", "shapes": shapes, "reduction": "max"} for shapes in ("mixed", "odd", "empty", "broadcast")),
    {"function": "root", "operands": LIST, "shapes": "odd", "reduction": "max"},  # NaN, of what is negative
    {"function": "root", "operands": LIST, "shapes": "empty", "reduction": "any"},
    {"function": "compare", "shapes": "odd", "reduction": "any"},
    {"function": "square", "operands": LIST, "memory": "transposed", "reduction": "sum"},
    {"function": "sum_and_product", "shapes": "odd", "reduction": "max"},
    {"function": "square", "operands": LIST, "gradient": "operands", "reduction": "sum"},
    {"function": "by_held", "operands": LIST, "reduction": "max"},
)  # fmt: skip
INTEGER_REDUCTIONS: Final[tuple[dict[str, Any], ...]] = tuple(
    {"function": "itself", "operands": LIST, "shapes": shapes, "reduction": reduction}
    for reduction in ("sum", "max", "any")
    for shapes in ("odd", "empty")
)
INTEGER_FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {"function": "add"},
    {"function": "div"},
    {"function": "bits"},
    {"function": "compare"},
    {"function": "larger"},
    {"function": "double", "operands": LIST},
    {"function": "third", "operands": LIST},
    {"function": "two_numbers", "operands": ("list", "integers", "integer"), "shapes": "odd"},
    {"function": "mul_", "operands": ("list", "integer")},
    {"function": "not", "operands": LIST},
    *(
        {"function": name, "operands": ("integer", "list")}
        for name in ("add", "sub", "mul", "div", "number_over")
    ),
)


def _mixed() -> Iterator[Call]:
    several = (torch.float32, torch.bfloat16, torch.float64)
    yield Call("chain", dtypes=several)
    yield Call("chain", dtypes=several, others=(torch.float32, torch.float16), shapes="odd")
    yield Call("chain", dtypes=(torch.bfloat16,), others=(torch.float32,), out="first")
    yield Call("chain", dtypes=(torch.float32,), others=(torch.bfloat16,))
    yield Call("add_", dtypes=(torch.float16, torch.float32), others=(torch.float32,))
    yield Call("double", LIST, dtypes=(torch.float32, torch.int32, torch.bfloat16, torch.int64))
    yield Call("decay", ("list", "floats"), dtypes=several)
    yield Call("add", dtypes=(torch.float32,), others=(torch.int64,))
    yield Call("mul", dtypes=(torch.int32,), others=(torch.int64, torch.uint8))
    yield Call("exponential", dtypes=several, gradient="operands")
    yield Call("add", dtypes=(torch.bool,), others=(torch.float32,))


def _of_primitives() -> Iterator[Call]:
    """A call for each primitive of the pointwise language; over 64-bit integers and other floats where it takes them."""
    for name in PRIMITIVES:
        for dtype in (primitives.own_dtype(name), torch.int64, *FLOATS[1:] * (name in primitives.FEW)):
            dtypes = primitives.operand_dtypes(name, dtype)
            if dtypes is not None and not (dtype is torch.int64 and name in primitives.SPELLED):
                others = () if dtypes[-1] is dtypes[0] else (dtypes[-1],)
                yield Call(primitives.PREFIX + name, LIST * len(dtypes), dtypes[:1], others, "one")


def calls() -> Iterator[Call]:
    """Every call of the corpus."""
    for dtype in FLOATS:
        for changes in (*FEATURES, *REDUCTIONS):
            yield dataclasses.replace(Call(dtypes=(dtype,)), **changes)
    for dtype in INTEGERS:
        for changes in (*INTEGER_FEATURES, *INTEGER_REDUCTIONS):
            yield dataclasses.replace(Call(dtypes=(dtype,)), **changes)
    yield Call("not", LIST, dtypes=(torch.bool,))
    yield Call("larger", dtypes=(torch.int64,), shapes="broadcast")
    yield from _mixed()
    several = (torch.float32, torch.bfloat16, torch.float64)
    yield Call("square", LIST, dtypes=several, reduction="sum")
    yield Call("square", LIST, shapes="thousand", reduction="sum")
    yield Call("chain", shapes="thousand")
    yield Call("chain", shapes="thousand", dtypes=(torch.float32, torch.bfloat16), out="first")
    yield Call(**ADAMW, shapes="thousand")
    yield Call("decay", ("list", "floats"), shapes="thousand", dtypes=(torch.bfloat16,))
    for dtype in FLOATS[:2]:
        for changes in (*MEMORY, *ALIASING):
            yield dataclasses.replace(Call(dtypes=(dtype,)), **changes)
    yield from _of_primitives()
