"""Functions mapped over lists: types and shapes that vary along them, numbers of every kind, and places to write to.

What is true of foreach arithmetic is what torch gives tensor by tensor, bit for bit: ``plain`` is that loop, and samples
tagged ``bitwise`` demand its bits. Samples tagged ``integer`` have integers or truth values among operands or results,
for which no float64 evaluation is the truth: only the bits of ``plain`` are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import torchhal
from torchhal_conformance.model import Inputs, Needs, Outputs, Sample

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

# ---------------------------------------------------------------------------- user functions


@dataclass(frozen=True)
class Function:
    """A function of foreach_map, made over the 0-dim tensor it captures (None where it captures none)."""

    over: Callable[[Any], Callable[..., Any]]
    outputs: int = 1
    captures: bool = False
    arithmetic: bool = True
    """Whether IEEE arithmetic or selection is all it does, so that every bit is decided."""
    truths: bool = False
    """Whether truth values are among its results."""


def _adamw(p: Any, g: Any, m: Any, v: Any, rate: Any) -> Any:
    first = m * 0.9 + g * 0.1
    second = v * 0.999 + g * g * 0.001
    return p * (1.0 - rate * 0.01) - rate * first / (torch.sqrt(second) + 1e-8), first, second


FUNCTIONS: Final[dict[str, Function]] = {
    "add": Function(lambda _: torch.add),
    "mul": Function(lambda _: torch.mul),
    "div": Function(lambda _: torch.div),
    "add_": Function(lambda _: torch.Tensor.add_),
    "mul_": Function(lambda _: torch.Tensor.mul_),
    "sqrt": Function(lambda _: lambda x: torch.sqrt(torch.abs(x))),
    "double": Function(lambda _: lambda x: x * 2),
    "third": Function(lambda _: lambda x: x * 0.3),
    "fused": Function(lambda _: lambda x, y, z: x * y + z),
    "chain": Function(lambda _: lambda x, y: ((x - y) * x + y) * 0.7 - x / 3),
    "decay": Function(lambda _: lambda x, s: x * s + 0.1),
    "from_left": Function(lambda _: lambda s, x: s * x - x),
    "two_numbers": Function(lambda _: lambda x, s, t: x * s - t),
    "clip": Function(lambda _: lambda x: torch.clamp(x, -0.5, 0.5)),
    "larger": Function(lambda _: lambda x, y: torch.where(x > y, x, -y)),
    "compare": Function(lambda _: lambda x, y: x > y, truths=True),
    "bits": Function(lambda _: lambda x, y: (x & y) | (x ^ 5)),
    "not": Function(lambda _: torch.logical_not, truths=True),
    "sum_and_product": Function(lambda _: lambda x, y: (x + y, x * y), outputs=2),
    "value_and_sign": Function(lambda _: lambda x: (x, x > 0), outputs=2, truths=True),
    "adamw": Function(lambda _: _adamw, outputs=3),
    "by_held": Function(lambda t: lambda x: x * t + t, captures=True),
    "held_pair": Function(lambda t: lambda x, y: (x * t, y / (t * t + 1.0)), outputs=2, captures=True),
    "sigmoid": Function(lambda _: lambda x: torch.sigmoid(x), arithmetic=False),
    "gelu": Function(lambda _: torch.nn.functional.gelu, arithmetic=False),
    "exponential": Function(lambda _: lambda x, y: torch.exp(-x * x) * torch.tanh(y), arithmetic=False),
    "held_tanh": Function(lambda t: lambda x: torch.tanh(x * t), captures=True, arithmetic=False),
}

SHAPES: Final[dict[str, tuple[tuple[int, ...], ...]]] = {
    "mixed": ((3,), (2, 5), (1,), (4, 1, 3), (130,)),
    "odd": ((1,), (7,), (15,), (16,), (17,), (31,), (33,), (63,), (65,), (127,), (1031,)),
    "empty": ((0,), (3, 0), (5,), (0, 2)),
    "all_empty": ((0,), (2, 0, 3)),
    "one": ((37,),),
    "few": ((1,), (2,)),
    "scalars": ((), (), ()),
    "some_scalars": ((), (4,), (), (2, 3)),
    "nothing": (),
    "thousand": tuple((1 + i % 13,) for i in range(1000)),
    "broadcast": ((4, 1), (5,), (2, 1, 3), (1,)),
}
"""Shapes of the first list, by name."""
PARTNERS: Final = {"broadcast": ((3,), (2, 5), (4, 1), (7,))}
"""Shapes of the other lists, where they differ."""

# ---------------------------------------------------------------------------- one call


@dataclass(frozen=True)
class Call:
    """What decides a call; everything else follows from the seed."""

    function: str = "add"
    operands: tuple[str, ...] = ("list", "list")
    """``list``, ``floats``, ``integers``, ``truths`` (lists of numbers), ``float``, ``integer`` or ``tensor`` (0-dim)."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Of the first list, from position to position, over and over."""
    others: tuple[torch.dtype, ...] = ()
    """Of the other lists; those of the first if empty."""
    shapes: str = "mixed"
    out: str = ""
    """``first``: over the first operand; ``new``: into other tensors; ``wide``: into float64 ones."""
    memory: str = ""
    """``transposed`` or ``gaps``: how the tensors lie in memory."""
    gradient: str = ""
    """``operands``, or ``captured`` for those and the captured tensor."""

    @property
    def name(self) -> str:
        """What differs from the plainest call."""
        words = [self.function, "_".join(map(_short, self.dtypes))]
        words += ["with_" + "_".join(map(_short, self.others))] if self.others else []
        words += ["_".join(self.operands), self.shapes]
        words += [f"{label}_{value}" for label in ("out", "memory") if (value := getattr(self, label))]
        return "-".join([*words, *([f"grad_{self.gradient}"] if self.gradient else [])])

    @property
    def mapped(self) -> Function:
        """The function, with what is known of it."""
        return FUNCTIONS[self.function]

    @property
    def in_place(self) -> bool:
        """Whether results are written to given tensors."""
        return bool(self.out) or self.function.endswith("_")

    @property
    def length(self) -> int:
        """Number of positions."""
        return len(SHAPES[self.shapes])

    def list_dtypes(self, operand: int) -> tuple[torch.dtype, ...]:
        """Types of a list, from position to position."""
        chosen = self.others if operand and self.others else self.dtypes
        return tuple(chosen[i % len(chosen)] for i in range(self.length))

    @property
    def lists(self) -> tuple[int, ...]:
        """Which operands are lists of tensors."""
        return tuple(i for i, how in enumerate(self.operands) if how == "list")

    @property
    def passes_numbers(self) -> bool:
        """Whether numbers are operands; a whole one among whole numbers becomes part of the function."""
        floating = any(d.is_floating_point for i in self.lists for d in self.list_dtypes(i))
        whole = () if floating else ("integers", "integer", "truths")
        return any(how not in ("list", *whole) for how in self.operands)

    def needs(self) -> Needs:
        """The claims that cover it; nobody is asked about empty lists."""
        if not self.length:
            return Needs("foreach")
        together = {tuple(self.list_dtypes(i)[at] for i in self.lists) for at in range(self.length)}
        wanted = {
            "in_place": self.in_place,
            "scalars": self.passes_numbers,
            "mixed_dtypes": len(together) > 1,
            "several_outputs": self.mapped.outputs > 1,
            "captured_tensors": self.mapped.captures,
            "backward": bool(self.gradient),
            "captured_gradient": self.gradient == "captured",
        }
        features = frozenset(name for name, on in wanted.items() if on)
        return Needs("foreach", features, frozenset().union(*together))

    def tags(self) -> frozenset[str]:
        """What checks select it by."""
        floating = all(d.is_floating_point for i in self.lists for d in self.list_dtypes(i))
        told = {
            "small": self.shapes == "mixed",
            "bitwise": self.mapped.arithmetic,
            "integer": not floating or self.mapped.truths,
        }
        return self.needs().features | {tag for tag, on in told.items() if on}


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------- data


def _make(call: Call, generator: torch.Generator, device: torch.device) -> Inputs:
    """Tensors as ``x0_3``: operand 0 at position 3; other operands as ``x1``; the captured tensor as ``held``."""
    made: Inputs = {}
    for operand, how in enumerate(call.operands):
        if how == "list":
            for position, dtype in enumerate(call.list_dtypes(operand)):
                shape = _shapes(call, operand)[position]
                tensor = _random(shape, dtype, call.memory, generator)
                made[f"x{operand}_{position}"] = tensor.to(device)
        else:
            made[f"x{operand}"] = _number(how, call.length, generator)
    if call.mapped.captures:
        made["held"] = torch.rand((), generator=generator, dtype=torch.float64).to(device, call.dtypes[0])
    return made


def _shapes(call: Call, operand: int) -> tuple[tuple[int, ...], ...]:
    return PARTNERS.get(call.shapes, SHAPES[call.shapes]) if operand else SHAPES[call.shapes]


def _random(shape: tuple[int, ...], dtype: torch.dtype, memory: str, generator: torch.Generator) -> Tensor:
    def draw(*sizes: int) -> Tensor:
        if dtype.is_floating_point:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
        low, high = (0, 2) if dtype is torch.bool else (1, 12)
        return torch.randint(low, high, sizes, generator=generator).to(dtype)

    if memory == "transposed":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    if memory == "gaps":
        return draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    return draw(*shape)


def _number(how: str, length: int, generator: torch.Generator) -> Any:
    drawn = torch.rand(max(length, 1), generator=generator, dtype=torch.float64) + 0.1
    numbers: dict[str, Any] = {
        "float": float(drawn[0]),
        "integer": 3,
        "tensor": drawn[0].to(torch.float32),
        "floats": drawn.tolist()[:length],
        "integers": [2 + i % 5 for i in range(length)],
        "truths": [i % 2 == 0 for i in range(length)],
    }
    return numbers[how]


def _operands(call: Call, inputs: Inputs, wide: bool = False) -> list[Any]:
    """The operands of a call; with ``wide``, floating tensors as float64."""

    def taken(value: Any) -> Any:
        return value.double() if wide and isinstance(value, Tensor) and value.is_floating_point() else value

    return [
        [taken(inputs[f"x{i}_{position}"]) for position in range(call.length)]
        if how == "list"
        else taken(inputs[f"x{i}"])
        for i, how in enumerate(call.operands)
    ]


# ---------------------------------------------------------------------------- the call


def _destinations(call: Call, first: list[Tensor], results: Outputs) -> tuple[list[Tensor], ...]:
    """Where results go: the first operand, or tensors as large as ``results``, list after list."""
    if not call.out or call.out == "first":
        return (first,)
    made = [torch.full_like(t, 7, dtype=torch.float64 if call.out == "wide" else None) for t in results]
    return tuple(made[i * call.length : (i + 1) * call.length] for i in range(call.mapped.outputs))


def _call(call: Call, backend: str, inputs: Inputs) -> Outputs:
    operands = _operands(call, inputs)
    function = call.mapped.over(inputs.get("held"))
    if not call.in_place:
        return _flat(call, torchhal.foreach_map(function, *operands, backend=backend))
    operands[0] = [t.clone() for t in operands[0]]  # the sample's data stays as it is
    destinations = _destinations(call, operands[0], () if call.out in ("", "first") else _loop(call, inputs))
    if call.out:
        out = destinations if call.mapped.outputs > 1 else destinations[0]
        torchhal.foreach_map(function, *operands, out=out, backend=backend)
    else:
        torchhal.foreach_map(function, *operands, backend=backend)
    return tuple(t for items in destinations for t in items)


def _flat(call: Call, found: Any) -> Outputs:
    lists = found if call.mapped.outputs > 1 else (found,)
    return tuple(t for items in lists for t in items)


# ---------------------------------------------------------------------------- the truth


def _loop(call: Call, inputs: Inputs, wide: bool = False) -> Outputs:
    """The function at each position, as torch computes it there; list after list."""
    operands = _operands(call, inputs, wide)
    held = inputs.get("held")
    function = call.mapped.over(held.double() if wide and held is not None else held)
    results = []
    for position in range(call.length):
        values = [value[position] if isinstance(value, list) else value for value in operands]
        if call.function.endswith("_"):
            values[0] = values[0].clone()
        found = function(*values)
        results.append(found if isinstance(found, tuple) else (found,))
    return tuple(at[number] for number in range(call.mapped.outputs) for at in results)


def _plain(call: Call, inputs: Inputs) -> Outputs:
    found = _loop(call, inputs)
    if not call.out:
        return found
    destinations = _destinations(call, _operands(call, inputs)[0], found)
    flat = [t for items in destinations for t in items]
    return tuple(value.to(place.dtype) for value, place in zip(found, flat, strict=True))


# ---------------------------------------------------------------------------- which calls


LIST: Final = ("list",)
ONES: Final = ("sqrt", "double", "third", "clip", "sigmoid", "gelu", "by_held", "held_tanh")
TWOS: Final = ("add", "mul", "div", "chain", "larger", "sum_and_product", "exponential")
ADAMW: Final[dict[str, Any]] = {
    "function": "adamw",
    "operands": ("list", "list", "list", "list", "float"),
}
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


def calls() -> Iterator[Call]:
    """Every call of the corpus."""
    for dtype in FLOATS:
        for changes in FEATURES:
            yield dataclasses.replace(Call(dtypes=(dtype,)), **changes)
    for dtype in INTEGERS:
        for changes in INTEGER_FEATURES:
            yield dataclasses.replace(Call(dtypes=(dtype,)), **changes)
    yield Call("not", LIST, dtypes=(torch.bool,))
    yield Call("larger", dtypes=(torch.int64,), shapes="broadcast")
    yield from _mixed()
    yield Call("chain", shapes="thousand")
    yield Call("chain", shapes="thousand", dtypes=(torch.float32, torch.bfloat16), out="first")
    yield Call(**ADAMW, shapes="thousand")
    yield Call("decay", ("list", "floats"), shapes="thousand", dtypes=(torch.bfloat16,))


def sample(call: Call) -> Sample:
    """The sample of a call."""
    leaves: tuple[str, ...] = ()
    if call.gradient:
        leaves = tuple(f"x{i}_{position}" for i in call.lists for position in range(call.length))
        leaves += ("held",) * (call.gradient == "captured")
    return Sample(
        name=call.name,
        needs=call.needs(),
        make=lambda generator, device: _make(call, generator, device),
        call=lambda backend, inputs: _call(call, backend, inputs),
        exact=lambda inputs: _loop(call, inputs, wide=True),
        plain=lambda inputs: _plain(call, inputs),
        leaves=leaves,
        # Over empty lists there is nothing to choose a backend for, so none can refuse.
        tags=call.tags() | ({"asks_nobody"} if call.shapes == "nothing" else set()),
        profile="training" if call.gradient else "inference",
    )


def samples() -> Iterator[Sample]:
    """Every sample of the family."""
    return (sample(call) for call in dict.fromkeys(calls()))
