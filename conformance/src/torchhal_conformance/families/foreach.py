"""Functions mapped over lists: types and shapes that vary along them, numbers of every kind, and places to write to.

What is true of foreach arithmetic is what torch gives tensor by tensor, bit for bit: ``plain`` is that loop, and samples
tagged ``bitwise`` demand its bits. Samples tagged ``integer`` have integers or truth values among operands or results,
for which no float64 evaluation is the truth: only the bits of ``plain`` are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import torchhal
from torchhal_conformance.families import primitives
from torchhal_conformance.families.foreach_functions import FUNCTIONS, Function
from torchhal_conformance.model import Inputs, Needs, Outputs, Sample

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

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
    """``list``, ``floats``, ``integers``, ``truths``, ``mixed`` (lists of numbers), ``float``, ``integer`` or ``tensor`` (0-dim)."""
    dtypes: tuple[torch.dtype, ...] = (torch.float32,)
    """Of the first list, from position to position, over and over."""
    others: tuple[torch.dtype, ...] = ()
    """Of the other lists; those of the first if empty."""
    shapes: str = "mixed"
    out: str = ""
    """``first`` or ``second``: over that operand; ``operands``: each result over the operand of its number.

    ``new``: into other tensors; ``wide``: into float64 ones; ``pieces``: into views of one buffer, one after the other;
    ``woven``: into views of one buffer whose elements alternate; ``apart``: :func:`apart` from one another.
    """
    alias: str = ""
    """``repeated``: every other position of the lists has the tensors of the one before it; ``same``: all lists are
    the first; ``buffer``: the tensors of a list are pieces of one buffer."""
    memory: str = ""
    """``transposed``, ``gaps``, ``expanded`` (stride 0) or ``offset`` (misaligned): how the tensors lie in memory."""
    gradient: str = ""
    """``operands``, or ``captured`` for those and the captured tensor."""
    reduction: str = ""
    """``sum``, ``max`` or ``any`` of the elements of each result."""

    @property
    def name(self) -> str:
        """What differs from the plainest call."""
        words = [self.function, "_".join(map(_short, self.dtypes))]
        words += ["with_" + "_".join(map(_short, self.others))] if self.others else []
        words += ["_".join(self.operands), self.shapes]
        words += [
            f"{label}_{value}"
            for label in ("out", "memory", "alias", "reduction")
            if (value := getattr(self, label))
        ]
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
        together = set(zip(*(self.list_dtypes(i) for i in self.lists), strict=True))
        wanted = {
            "in_place": self.in_place,
            "scalars": self.passes_numbers,
            "mixed_dtypes": len(together) > 1 or "mixed" in self.operands,
            "several_outputs": self.mapped.outputs > 1,
            "captured_tensors": self.mapped.captures,
            "backward": bool(self.gradient),
            "captured_gradient": self.gradient == "captured",
            "reduction": bool(self.reduction),
        }
        features = frozenset(name for name, on in wanted.items() if on)
        return Needs("foreach", features, frozenset().union(*together))

    def tags(self) -> frozenset[str]:
        """What checks select it by."""
        floating = all(d.is_floating_point for i in self.lists for d in self.list_dtypes(i))
        told = {
            "small": self.shapes == "mixed",
            # Of integers every bit is decided, and of sums of floats that they are near.
            "bitwise": (self.mapped.arithmetic and self.reduction != "sum") or not floating,
            "integer": not floating or self.mapped.truths or self.reduction == "any",
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
                drawn = _random(call, operand, shape, dtype, generator)
                made[f"x{operand}_{position}"] = _laid_out(drawn.to(device), call.memory)
        else:
            made[f"x{operand}"] = _number(how, call.length, generator)
    if call.mapped.captures:
        made["held"] = torch.rand((), generator=generator, dtype=torch.float64).to(device, call.dtypes[0])
    return made


def _shapes(call: Call, operand: int) -> tuple[tuple[int, ...], ...]:
    return PARTNERS.get(call.shapes, SHAPES[call.shapes]) if operand else SHAPES[call.shapes]


def _random(
    call: Call, operand: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if call.mapped.primitive:
        return primitives.draw(call.mapped.primitive, operand, shape, dtype, generator)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    low, high = (0, 2) if dtype is torch.bool else (1, 12)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def _laid_out(tensor: Tensor, memory: str) -> Tensor:
    """The same values (for ``expanded``, the first of each row throughout) as memory of that kind holds them."""
    if memory == "transposed":
        order = tuple(reversed(range(tensor.dim())))
        return tensor.permute(order).contiguous().permute(order)
    if memory == "gaps":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if memory == "expanded":
        return tensor[..., :1].expand(tensor.shape)
    if memory == "offset":
        return tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape).copy_(tensor)
    return tensor


def _number(how: str, length: int, generator: torch.Generator) -> Any:
    drawn = torch.rand(max(length, 1), generator=generator, dtype=torch.float64) + 0.1
    numbers: dict[str, Any] = {
        "float": float(drawn[0]),
        "integer": 3,
        "tensor": drawn[0].to(torch.float32),
        "floats": drawn.tolist()[:length],
        "integers": [2 + i % 5 for i in range(length)],
        "truths": [i % 2 == 0 for i in range(length)],
        "mixed": [(2, 0.75, True, -0.5)[i % 4] for i in range(length)],
    }
    return numbers[how]


def _operands(call: Call, inputs: Inputs, wide: bool = False) -> list[Any]:
    """The operands of a call; with ``wide``, floating tensors as float64."""

    def taken(value: Any) -> Any:
        return value.double() if wide and isinstance(value, Tensor) and value.is_floating_point() else value

    found = [
        [taken(inputs[f"x{i}_{position}"]) for position in range(call.length)]
        if how == "list"
        else taken(inputs[f"x{i}"])
        for i, how in enumerate(call.operands)
    ]
    for i in call.lists:
        found[i] = _aliased(call.alias, found[i], found[call.lists[0]])
    return found


def _aliased(alias: str, items: list[Tensor], first: list[Tensor]) -> list[Tensor]:
    """The tensors of a list, some of them in each other's memory."""
    if alias == "repeated":
        return [items[position - position % 2] for position in range(len(items))]
    if alias == "same":
        return first
    if alias == "buffer":
        return _pieces(torch.cat([t.flatten() for t in items]), items)
    return items


def _pieces(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    sizes = [t.numel() for t in like]
    parts = torch.split(buffer[: sum(sizes)], sizes)
    return [part.view(t.shape) for part, t in zip(parts, like, strict=True)]


def _woven(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    return [buffer[i :: len(like)][: t.numel()].view(t.shape) for i, t in enumerate(like)]


# ---------------------------------------------------------------------------- the call


def _destinations(call: Call, operands: list[Any], results: Outputs) -> tuple[list[Tensor], ...]:
    """Where results go: operands, or tensors as large as ``results``, list after list."""
    over = {"": 1, "first": 1, "operands": call.mapped.outputs}
    if call.out in over:
        return tuple(operands[: over[call.out]])
    if call.out == "second":
        return (operands[1],)
    lists = [results[i * call.length : (i + 1) * call.length] for i in range(call.mapped.outputs)]
    return tuple(_fresh(call.out, items) for items in lists)


def _fresh(out: str, like: Sequence[Tensor]) -> list[Tensor]:
    if out in ("pieces", "woven"):
        largest = max(t.numel() for t in like)
        return (_pieces if out == "pieces" else _woven)(like[0].new_full((largest * len(like),), 7), like)
    if out == "apart":
        filled = [torch.full_like(t, 7) for t in like]
        return [apart(t, 0) if position == 1 else t for position, t in enumerate(filled)]
    return [torch.full_like(t, 7, dtype=torch.float64 if out == "wide" else None) for t in like]


def _call(call: Call, backend: str, inputs: Inputs) -> Outputs:
    function = call.mapped.over(inputs.get("held"))
    if call.reduction:
        operands = _operands(call, inputs)
        return _flat(
            call, torchhal.foreach_reduce(function, *operands, reduction=call.reduction, backend=backend)
        )
    if not call.in_place:
        return _flat(call, torchhal.foreach_map(function, *_operands(call, inputs), backend=backend))
    # The sample's data stays as it is.
    operands = _operands(call, {n: t.clone() if isinstance(t, Tensor) else t for n, t in inputs.items()})
    fresh = call.out not in ("", "first", "second", "operands")
    destinations = _destinations(call, operands, _loop(call, inputs) if fresh else ())
    if call.out:
        out = destinations if call.mapped.outputs > 1 else destinations[0]
        torchhal.foreach_map(function, *operands, out=out, backend=backend)
    else:
        torchhal.foreach_map(function, *operands, backend=backend)
    return tuple(t for items in destinations for t in items)


FAR: Final = 2**31
"""Elements that an int32 can not count."""
_LINE: Final = 64
"""Elements that strides are multiples of, so that what is aligned stays so."""


def apart(tensor: Tensor, dimension: int) -> Tensor:
    """The same values, of which the first and the last along a dimension lie more than ``FAR`` elements apart.

    Nothing of the memory between is touched. Dimensions keep their order in memory, but that this one is outermost.
    """
    steps, inside = tensor.shape[dimension] - 1, tensor.numel() // tensor.shape[dimension]
    step = -(-FAR // (steps * _LINE)) * _LINE + _LINE
    memory = tensor.new_empty(step * steps + inside)
    strides = list(tensor.select(dimension, 0).contiguous().stride())
    strides.insert(dimension, step)
    return memory.as_strided(tensor.shape, strides).copy_(tensor)


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
        found = found if isinstance(found, tuple) else (found,)
        results.append(tuple(_reduced(call, value, wide) for value in found) if call.reduction else found)
    return tuple(at[number] for number in range(call.mapped.outputs) for at in results)


def _reduced(call: Call, value: Tensor, wide: bool) -> Tensor:
    """What all elements come to; sums in float32, or with ``wide`` in float64."""
    if call.reduction == "any":
        return (value != 0).any()
    if call.reduction == "max":
        return value.max() if value.numel() else value.new_tensor(_least(value.dtype))
    if not value.dtype.is_floating_point:
        return value.sum(dtype=torch.int64)
    kept = wide or value.dtype is torch.float64
    return value.sum(dtype=torch.float64 if kept else torch.float32)


def _least(dtype: torch.dtype) -> float:
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _plain(call: Call, inputs: Inputs) -> Outputs:
    found = _loop(call, inputs)
    if not call.out:
        return found
    destinations = _destinations(call, _operands(call, inputs), found)
    flat = [t for items in destinations for t in items]
    return tuple(value.to(place.dtype) for value, place in zip(found, flat, strict=True))


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
    from torchhal_conformance.families.foreach_calls import calls

    return (sample(call) for call in dict.fromkeys(calls()))
