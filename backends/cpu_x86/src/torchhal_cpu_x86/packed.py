"""Packed weights as the native library is told of them."""

from __future__ import annotations

from array import array
from typing import Final

from torchhal.operands import GGUFWeight
from torchhal.products.packed import Operand

SCHEMES: Final = {"int8": 0, "int4": 1, "q4_0": 2, "q4_1": 3, "q8_0": 4}
"""As ``torchhal_cpu_x86.h`` numbers them."""


def description(operand: Operand) -> array[int]:
    """``thal_packed`` of torchhal_cpu_x86.h, which the native library reads while this and the weight live."""
    weight = operand.weight
    if isinstance(weight, GGUFWeight):
        scheme, group, scale, zero = SCHEMES[weight.kind], 1, 0, 0
    else:
        scheme, group, scale = SCHEMES[f"int{weight.bits}"], weight.group, weight.scale.data_ptr()
        zero = 0 if weight.zero is None else weight.zero.data_ptr()
    first = scheme | operand.transposed << 32  # two int32
    return array("q", (first, *weight.shape, group, weight.data.data_ptr(), scale, zero))
