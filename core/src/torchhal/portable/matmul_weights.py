"""Packed weights inside the Triton kernels: their elements, out of the bytes as they lie in memory.

A weight is told by one tuple ``(data, scale, zero, group, columns, row_bytes)``: of a :class:`torchhal.operands.PackedWeight`
(K, N) its tensors, the rows of a group and N; of a :class:`torchhal.operands.GGUFWeight` its data and the bytes of a row.
``k`` and ``n`` are int32 blocks that broadcast together: element (k, n).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def half_at(data, place, ok):
    """The little-endian float16 at a byte, wherever it lies, as float32."""
    low = tl.load(data + place, mask=ok, other=0).to(tl.uint16)
    high = tl.load(data + place + 1, mask=ok, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def block_size(KIND: tl.constexpr):
    """Bytes of a block of 32 elements of a GGUF file."""
    return 34 if KIND == "q8_0" else (20 if KIND == "q4_1" else 18)


@triton.jit
def quants(weight, k, n, ok, KIND: tl.constexpr):
    """The stored whole numbers, int8 or int32: what :func:`scales` multiplies. Where not ``ok`` whatever a byte of 0 stands for."""
    data, scale, zero, group, columns, row_bytes = weight
    if KIND == "int8":
        found = tl.load(data + k.to(tl.int64) * columns + n, mask=ok, other=0)
    elif KIND == "int4":
        both = tl.load(data + (k // 2).to(tl.int64) * columns + n, mask=ok, other=0).to(tl.int32)
        found = ((both >> ((k % 2) * 4)) & 15) - 8
    else:
        BYTES: tl.constexpr = block_size(KIND)
        place = n.to(tl.int64) * row_bytes + (k // 32) * BYTES
        if KIND == "q8_0":
            byte = tl.load(data + place + (2 + k % 32), mask=ok, other=0)
            found = byte.to(tl.int8, bitcast=True).to(tl.int32)
        else:
            HEAD: tl.constexpr = 4 if KIND == "q4_1" else 2
            both = tl.load(data + place + (HEAD + k % 16), mask=ok, other=0).to(tl.int32)
            found = (both >> ((k % 32) // 16 * 4)) & 15
            if KIND == "q4_0":
                found -= 8
    return found


@triton.jit
def quant_pairs(weight, pair, n, ok, zero, ASYMMETRIC: tl.constexpr, TYPE: tl.constexpr):
    """The ``int4`` numbers of rows ``2 * pair`` and ``2 * pair + 1`` less ``zero`` of asymmetric weights, each byte loaded once.

    A number becomes the last bits of 128 (of 1024 in float16), from which one subtraction of 16-bit numbers leaves it: five
    instructions of a loop for each element where conversions took nine (sm_90a).
    """
    data, scale, zeros, group, columns, row_bytes = weight
    both = tl.load(data + pair.to(tl.int64) * columns + n, mask=ok, other=0).to(tl.int16)
    HALF: tl.constexpr = tl.float16 if tl.float16 == TYPE else tl.bfloat16
    BITS: tl.constexpr = 0x6400 if tl.float16 == TYPE else 0x4300
    EXCESS: tl.constexpr = 1032 if tl.float16 == TYPE else 136
    low = ((both & 15) | BITS).to(HALF, bitcast=True)
    high = ((both >> 4) | BITS).to(HALF, bitcast=True)
    excess = tl.full((1, 1), EXCESS, tl.float32).to(HALF)
    if ASYMMETRIC:
        excess = (zero + EXCESS).to(tl.float32).to(HALF)
    return low - excess, high - excess


@triton.jit
def zeros_of(weight, k, n, ok):
    """What is subtracted from the stored numbers of an asymmetric packed weight, int32."""
    data, scale, zero, group, columns, row_bytes = weight
    return tl.load(zero + (k // group).to(tl.int64) * columns + n, mask=ok, other=0).to(tl.int32)


@triton.jit
def scales(weight, k, n, ok, KIND: tl.constexpr):
    """What the numbers are multiplied by, float32."""
    data, scale, zero, group, columns, row_bytes = weight
    if KIND == "int8" or KIND == "int4":
        found = tl.load(scale + (k // group).to(tl.int64) * columns + n, mask=ok, other=0.0)
    else:
        found = half_at(data, n.to(tl.int64) * row_bytes + (k // 32) * block_size(KIND), ok)
    return found


@triton.jit
def minima(weight, k, n, ok):
    """What is added to the elements of ``q4_1``, float32."""
    data, scale, zero, group, columns, row_bytes = weight
    return half_at(data, n.to(tl.int64) * row_bytes + (k // 32) * 20 + 2, ok)


@triton.jit
def group_numbers(weight, k, n, ok, inner, KIND: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Scale, zero (int32; 0 of symmetric weights) and minimum (of ``q4_1``) of the group of row ``k``; 0 behind the last one."""
    ok = ok & (k < inner)
    scale = scales(weight, k, n, ok, KIND)
    zero = (scale * 0.0).to(tl.int32)
    minimum = scale
    if ASYMMETRIC:
        zero = zeros_of(weight, k, n, ok)
    if KIND == "q4_1":
        minimum = minima(weight, k, n, ok)
    return scale, zero, minimum


@triton.jit
def elements(weight, k, n, ok, KIND: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """The elements themselves, float32."""
    found = quants(weight, k, n, ok, KIND)
    if ASYMMETRIC:
        found -= zeros_of(weight, k, n, ok)
    found = found.to(tl.float32) * scales(weight, k, n, ok, KIND)
    if KIND == "q4_1":
        found += minima(weight, k, n, ok)
    return found
