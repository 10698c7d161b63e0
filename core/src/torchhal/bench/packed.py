"""Cases of ``torchhal bench matmul`` with packed weights: a linear layer with bias and GELU, whose weight is not in a cache.

A model reads each of its weights once for a token, and all of them together are larger than any cache. So every candidate
goes through copies of its weight in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

import torchhal
from torchhal.bench.cases import Requirement
from torchhal.bench.matmul import COMPILED, Call, Case, Operands
from torchhal.operands import Packed, packed_from_state
from torchhal.reference.packing import unpack

COLD_BYTES: Final = 96 << 20
"""Of all copies of a weight together: three times the largest cache at hand."""
BLOCK_BYTES: Final = {"q4_0": 18, "q4_1": 20, "q8_0": 34}


@dataclass(frozen=True)
class PackedLinear(Case):
    """``gelu(a @ packed + bias)``."""

    kind: ClassVar[str] = "gelu(a @ packed + bias)"
    scheme: str = "int8"
    """``int8`` or ``int4``, for whole columns or with ``:`` and a group, or a kind of GGUF block."""

    @property
    def bytes(self) -> float:
        other = self.rows * (self.inner + self.columns) * self.dtype.itemsize
        return float(other + _bytes(self._weight()))

    def _weight(self) -> Packed:
        if self.scheme in BLOCK_BYTES:
            return _blocks(self.scheme, self.inner // 32 * 32, self.columns)
        name, _, group = self.scheme.partition(":")
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(self.inner, self.columns, generator=generator) * 0.05
        return torchhal.pack_weight(weight, bits=int(name[3:]), group=int(group) if group else None)

    def operands(self, device: torch.device) -> Operands:
        weight = self._weight()
        rows = self.random(device, self.rows, weight.shape[0])
        copies = [_copy(weight, device) for _ in range(1 + COLD_BYTES // max(_bytes(weight), 1 << 20))]
        return {
            "a": rows,
            "bias": self.random(device, self.columns),
            "weights": _turns(copies),
            "weight": weight,
        }

    def ours(self, operands: Operands, backend: str) -> Tensor:
        weight = next(operands["weights"])
        return torchhal.matmul(  # type: ignore[return-value]
            operands["a"],
            weight,
            bias=operands["bias"],
            epilogue=F.gelu,
            out_dtype=self.dtype,
            backend=backend,
        )

    def peers(self, operands: Operands, compiled: bool) -> dict[str, Call]:
        a, bias = operands["a"], operands["bias"]
        dense = unpack(operands["weight"], torch.float32).to(a.device, self.dtype).t().contiguous()
        size = dense.numel() * dense.element_size()
        copies = _turns([dense.clone() for _ in range(1 + COLD_BYTES // max(size, 1 << 20))])
        found: dict[str, Call] = {"torch": lambda: F.gelu(F.linear(a, next(copies), bias))}
        if compiled:
            found[COMPILED] = _dequantising(operands, self.dtype)
        return found

    def exact(self, operands: Operands, rows: Tensor) -> Tensor:
        dense = unpack(operands["weight"], torch.float64).to(rows.device)
        return F.gelu(operands["a"][rows].double() @ dense + operands["bias"].double())


def _dequantising(operands: Operands, dtype: torch.dtype) -> Call:
    """What torch.compile makes of dequantising, multiplying, adding and GELU."""
    a, bias, weights = operands["a"], operands["bias"], operands["weights"]

    def layer(a: Tensor, weight: Packed, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(a, unpack(weight, torch.float32).to(dtype).t(), bias))

    made: Callable[..., Tensor] = torch.compile(layer)
    return lambda: made(a, next(weights), bias)


def _turns(copies: list[Any]) -> Any:
    return itertools.cycle(copies)


def _copy(weight: Packed, device: torch.device) -> Packed:
    state = weight.state().items()
    return packed_from_state({k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in state})


def _bytes(weight: Packed) -> int:
    return sum(v.numel() * v.element_size() for v in weight.state().values() if isinstance(v, Tensor))


def _blocks(kind: str, inner: int, columns: int) -> Packed:
    generator = torch.Generator().manual_seed(0)
    shape = (columns, inner // 32)
    data = torch.randint(0, 256, (*shape, BLOCK_BYTES[kind]), generator=generator, dtype=torch.uint8)
    data[..., 1] = 0x21  # scales of about a hundredth
    if kind == "q4_1":
        data[..., 3] = 0xAC  # minima of about seven times that below zero
    return torchhal.gguf_weight(data.reshape(columns, inner // 32 * BLOCK_BYTES[kind]), kind)


def _linear(rows: int, scheme: str, *requirements: Requirement, side: int = 4096) -> PackedLinear:
    name = f"packed-{scheme.replace(':', '-')}-{rows}-{side}"
    return PackedLinear(name, rows, side, side, torch.bfloat16, requirements, scheme)


CASES: Final[tuple[Case, ...]] = (
    _linear(1, "int8", Requirement("torch", 1.8), Requirement(COMPILED, 2.0)),
    _linear(1, "int4:128", Requirement("torch", 3.0), Requirement(COMPILED, 2.0)),
    _linear(1, "q4_1", Requirement("torch", 3.0)),
    _linear(1, "q4_0"),
    _linear(1, "q8_0"),
    _linear(16, "int8", Requirement(COMPILED, 2.0)),
    _linear(16, "int4:128", Requirement(COMPILED, 2.0)),
    _linear(16, "q4_1"),
    _linear(512, "int8", Requirement(COMPILED, 1.3)),
    _linear(512, "int4:128", Requirement(COMPILED, 1.3)),
    _linear(512, "q4_1"),
)
"""One token, several, and a prompt, through a square layer of 4096."""
