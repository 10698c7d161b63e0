"""The fused matrix product: shapes on and off any tile, every claim alone, packed weights, and the usual fusions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

import torchhal
from torchhal.operands import GGUFWeight, PackedWeight
from torchhal_conformance.families import blocks
from torchhal_conformance.families.fusions import PLACES, Function
from torchhal_conformance.model import Inputs, Needs, Outputs, Sample

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# ---------------------------------------------------------------------------- one call


@dataclass(frozen=True)
class Call:
    """What decides a call; everything else follows from the seed."""

    dtype: torch.dtype = torch.float32
    b_dtype: torch.dtype | None = None
    rows: int = 9
    columns: int = 11
    inner: int = 13
    a_batch: tuple[int, ...] = ()
    b_batch: tuple[int, ...] = ()
    a_memory: str = ""
    """``transposed``, ``gaps``, ``expanded`` or ``offset``: how the operand lies in memory; rows after rows if empty."""
    b_memory: str = ""
    vectors: str = ""
    """Which of ``a`` and ``b`` are vectors: ``a``, ``b`` or ``ab``."""
    bias: str = ""
    """``own`` for the type of ``a``, or ``float32``."""
    a_prologue: str = ""
    b_prologue: str = ""
    epilogue: str = ""
    out_dtype: tuple[torch.dtype, ...] = ()
    bits: int = 0
    """Of a packed weight; 0 for a tensor."""
    group: int | None = None
    symmetric: bool = True
    from_transposed: bool = False
    """Whether the weight was packed from (N, K)."""
    gguf: str = ""
    """Kind of block of a GGUF file that the weight is in: ``q4_0``, ``q4_1`` or ``q8_0``."""
    gradient: str = ""
    """``inputs``, or ``captured`` for those and what the functions capture."""

    @property
    def name(self) -> str:
        """What differs from the plainest call, and the sizes."""
        words = [_short(self.dtype), *(["b_" + _short(self.b_dtype)] if self.b_dtype else [])]
        for label, batch in (("a", self.a_batch), ("b", self.b_batch)):
            words += [label + "x".join(map(str, batch))] if batch else []
        for label in ("a_memory", "b_memory", "vectors", "bias", *PLACES, "gradient"):
            words += [f"{label}_{getattr(self, label)}"] if getattr(self, label) else []
        words += ["to_" + "_".join(map(_short, self.out_dtype))] if self.out_dtype else []
        if self.bits:
            kind = "symmetric" if self.symmetric else "asymmetric"
            words.append(f"int{self.bits}_{self.group or 'channel'}_{kind}" + "_nk" * self.from_transposed)
        words += [f"gguf_{self.gguf}"] if self.gguf else []
        return "-".join([*words, f"m{self.rows}-n{self.columns}-k{self.inner}"])

    @property
    def second_dtype(self) -> torch.dtype:
        """The type of ``b``."""
        return self.b_dtype or self.dtype

    @property
    def element(self) -> torch.dtype:
        """The type of the result, unless another is asked for."""
        return torch.promote_types(self.dtype, self.second_dtype)

    @property
    def batch(self) -> tuple[int, ...]:
        """The broadcast batch."""
        return tuple(torch.broadcast_shapes(self.a_batch, self.b_batch))  # type: ignore[no-untyped-call]

    def functions(self) -> dict[str, Function]:
        """The functions by argument."""
        return {place: known[getattr(self, place)] for place, known in PLACES.items() if getattr(self, place)}

    def needs(self) -> Needs:
        """The claims that cover it."""
        functions = self.functions()
        wanted = {
            "batched": bool(self.a_batch or self.b_batch),
            "bias": bool(self.bias),
            **{place: place in functions for place in PLACES},
            "auxiliary_outputs": any(f.outputs > 1 for f in functions.values()),
            "captured_tensors": any(f.captured for f in functions.values()),
            "packed_int8": self.bits == 8,
            "packed_int4": self.bits == 4,
            "packed_gguf": bool(self.gguf),
            "mixed_dtypes": self.dtype != self.second_dtype,
            "backward": bool(self.gradient),
            "captured_gradient": self.gradient == "captured",
        }
        features = frozenset(name for name, on in wanted.items() if on)
        return Needs("matmul", features, frozenset({self.dtype, self.second_dtype}))

    def leaves(self) -> tuple[str, ...]:
        """What gradients reach."""
        if not self.gradient:
            return ()
        found = ["a", *["b"] * (not self.bits and not self.gguf), *["bias"] * bool(self.bias)]
        if self.gradient == "captured":
            found += [f"{place}_tensor" for place, f in self.functions().items() if f.captured]
        return tuple(found)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------- data


def _make(call: Call, generator: torch.Generator, device: torch.device) -> Inputs:
    def random(shape: tuple[int, ...], dtype: torch.dtype, memory: str = "") -> Tensor:
        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(device, dtype)

        return _laid_out(draw, shape, memory)

    a_shape = (*call.a_batch, call.rows, call.inner)
    b_shape = (*call.b_batch, call.inner, call.columns)
    made: Inputs = {"a": random(a_shape, call.dtype, call.a_memory)}
    if call.bits:
        made["b"] = _packed(call, random(b_shape, call.second_dtype))
    elif call.gguf:
        data = blocks.drawn(call.gguf, call.inner, call.columns, generator).to(device)
        made["b"] = torchhal.gguf_weight(data, call.gguf, dtype=call.second_dtype)
    else:
        made["b"] = random(b_shape, call.second_dtype, call.b_memory)
    if "a" in call.vectors:
        made["a"] = made["a"][0]
    if "b" in call.vectors:
        made["b"] = made["b"][:, 0]
    if call.bias:
        made["bias"] = random((call.columns,), call.dtype if call.bias == "own" else torch.float32)
    wide = torch.promote_types(
        call.element, torch.float32
    )  # so that no promotion rule decides about the truth
    for place, function in call.functions().items():
        if function.captured:
            shape = _captured_shape(call, place, function.captured)
            made[f"{place}_tensor"] = (
                random(shape, wide)
                if function.draw is None
                else _drawn(function.draw(shape, generator), wide).to(device)
            )
    return made


def _drawn(tensor: Tensor, wide: torch.dtype) -> Tensor:
    return tensor.to(wide) if tensor.is_floating_point() else tensor


def _laid_out(draw: Callable[..., Tensor], shape: tuple[int, ...], memory: str) -> Tensor:
    if memory == "transposed":
        return draw(*shape[:-2], shape[-1], shape[-2]).mT
    if memory == "gaps":
        return draw(*shape[:-2], 2 * shape[-2] + 1, shape[-1] + 3)[..., 1::2, 1:-2]
    if memory == "expanded":
        return draw(*shape[1:]).expand(shape)
    if memory == "offset":  # of one element, so that no vector of them is aligned
        tensor = draw(*shape)
        return tensor.new_empty(tensor.numel() + 1)[1:].view(shape).copy_(tensor)
    return draw(*shape)


def _packed(call: Call, weight: Tensor) -> PackedWeight:
    given = weight.mT.contiguous() if call.from_transposed else weight
    return torchhal.pack_weight(
        given,
        bits=call.bits,
        group=call.group,
        symmetric=call.symmetric,
        transposed=call.from_transposed,
    )


def _captured_shape(call: Call, place: str, letters: str) -> tuple[int, ...]:
    rows, columns = {
        "a_prologue": (call.rows, call.inner),
        "b_prologue": (call.inner, call.columns),
        "epilogue": (call.rows, call.columns),
    }[place]
    # One more than is read where nothing would be: a table is never empty.
    sizes = {"b": math.prod(call.batch), "r": max(rows, 1), "c": max(columns, 1)}
    return tuple(sizes[letter] for letter in letters if letter != "0")


# ---------------------------------------------------------------------------- the call


def _call(call: Call, backend: str, inputs: Inputs) -> Outputs:
    functions: dict[str, Any] = {
        place: function.over(inputs.get(f"{place}_tensor")) for place, function in call.functions().items()
    }
    out_dtype = call.out_dtype[0] if len(call.out_dtype) == 1 else call.out_dtype or None
    found = torchhal.matmul(
        inputs["a"], inputs["b"], bias=inputs.get("bias"), out_dtype=out_dtype, backend=backend, **functions
    )
    return found if isinstance(found, tuple) else (found,)


# ---------------------------------------------------------------------------- the truth


def dequantised(packed: PackedWeight, dtype: torch.dtype) -> Tensor:
    """The weight that a packed one stands for, from its documented parts, computed in ``dtype``."""
    rows, columns = packed.shape
    data = packed.data
    if packed.bits == 4:
        data = torch.stack((data % 16, data // 16), 1).reshape(-1, columns)[:rows].to(torch.int8) - 8
    at = torch.arange(rows, device=data.device) // packed.group
    zero = 0.0 if packed.zero is None else packed.zero.to(dtype)[at]
    return (data.to(dtype) - zero) * packed.scale.to(dtype)[at]


def _evaluate(call: Call, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    a, b = inputs["a"], inputs["b"]
    if isinstance(b, GGUFWeight):
        b = blocks.decoded(b.kind, b.data, dtype)
    b = dequantised(b, dtype) if isinstance(b, PackedWeight) else b.to(dtype)
    a = a.to(dtype)[None] if "a" in call.vectors else a.to(dtype)
    b = b[:, None] if "b" in call.vectors else b
    (a,) = _apply(call, "a_prologue", a, inputs, dtype)
    (b,) = _apply(call, "b_prologue", b, inputs, dtype)
    total = a.to(dtype) @ b.to(dtype)
    if call.bias:
        total = total + inputs["bias"].to(dtype)
    found = _apply(call, "epilogue", total, inputs, dtype)
    for vector, dimension in (("b", -1), ("a", -1 if "b" in call.vectors else -2)):
        if vector in call.vectors:
            found = tuple(t.squeeze(dimension) for t in found)
    return found


def _apply(call: Call, place: str, value: Tensor, inputs: Inputs, dtype: torch.dtype) -> Outputs:
    function = call.functions().get(place)
    if function is None:
        return (value,)
    held = inputs.get(f"{place}_tensor")
    if held is not None and dtype is torch.float64:
        held = _drawn(held, dtype)
    user = function.over(held)
    batch = call.batch

    def line(size: int, *shape: int) -> Tensor:
        return torch.arange(size, dtype=torch.int32, device=value.device).view(shape)

    rows, columns = value.shape[-2:]
    places = (line(math.prod(batch), *batch, 1, 1), line(rows, rows, 1), line(columns, columns))
    code = getattr(user, "__code__", None)  # a function of torch has none
    found = user(value) if code is None or code.co_argcount == 1 else user(value, *places)
    return found if isinstance(found, tuple) else (found,)


def _plain(call: Call, inputs: Inputs) -> Outputs:
    outputs = max((f.outputs for f in call.functions().values()), default=1)
    wanted = (call.out_dtype or (call.element,)) * (outputs if len(call.out_dtype) < 2 else 1)
    # Nobody is allowed the error of a narrow sum in a result that was asked for in a wider type.
    return tuple(
        _evaluate(call, inputs, torch.promote_types(call.element, dtype))[number].to(dtype)
        for number, dtype in enumerate(wanted)
    )


def sample(call: Call) -> Sample:
    """The sample of a call."""
    needs = call.needs()
    tags = set(needs.features)
    sizes = (call.rows, call.columns, call.inner, *call.batch)
    if min(sizes) > 0 and max(sizes) <= 40:
        tags.add("small")
    if call in (Call(dtype=call.dtype), Call(dtype=call.dtype, bias="own")):
        tags.add("typical")
    return Sample(
        name=call.name,
        needs=needs,
        make=lambda generator, device: _make(call, generator, device),
        call=lambda backend, inputs: _call(call, backend, inputs),
        exact=lambda inputs: _evaluate(call, inputs, torch.float64),
        plain=lambda inputs: _plain(call, inputs),
        leaves=call.leaves(),
        tags=frozenset(tags),
        profile="training" if call.gradient else "inference",
    )


def samples() -> Iterator[Sample]:
    """Every sample of the family."""
    from torchhal_conformance.families.matmul_calls import calls

    return (sample(call) for call in dict.fromkeys(calls()))
