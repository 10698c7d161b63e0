"""The dtypes of the pointwise language: names, families, and exact rounding of Python numbers."""

from __future__ import annotations

import math
import struct
from typing import Final

import torch

FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS: Final = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
DTYPES: Final = (*FLOATS, *INTEGERS, torch.bool)

NAME_OF: Final[dict[torch.dtype, str]] = {dtype: str(dtype).removeprefix("torch.") for dtype in DTYPES}
DTYPE_OF: Final[dict[str, torch.dtype]] = {name: dtype for dtype, name in NAME_OF.items()}

FLOAT_SET: Final = frozenset(FLOATS)
INTEGER_SET: Final = frozenset(INTEGERS)
REDUCED: Final = frozenset((torch.bfloat16, torch.float16))
INDEX_DTYPES: Final = frozenset((torch.int64, torch.int32))

# A table, because torch.promote_types is a torch function and would be seen by the capture it serves.
_PROMOTED: Final = {(a, b): torch.promote_types(a, b) for a in DTYPES for b in DTYPES}

_BITS: Final = {torch.int64: 64, torch.int32: 32, torch.int16: 16, torch.int8: 8, torch.uint8: 8}

Number = bool | int | float


def is_float(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is one of the four floating dtypes."""
    return dtype in FLOAT_SET


def is_integer(dtype: torch.dtype) -> bool:
    """Whether ``dtype`` is a signed or unsigned integer dtype (not bool)."""
    return dtype in INTEGER_SET


def promote(left: torch.dtype, right: torch.dtype) -> torch.dtype:
    """``torch.promote_types`` of two dtypes of the language."""
    return _PROMOTED[left, right]


def integer_range(dtype: torch.dtype) -> tuple[int, int]:
    """The smallest and largest value of an integer dtype."""
    bits = _BITS[dtype]
    return (0, 2**bits - 1) if dtype is torch.uint8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wrap_integer(value: int, dtype: torch.dtype) -> int:
    """``value`` reduced modulo two's complement into ``dtype``, as integer arithmetic overflows."""
    low, high = integer_range(dtype)
    return (value - low) % (high - low + 1) + low


def round_float(value: float, dtype: torch.dtype) -> float:
    """``value`` rounded to nearest-even into ``dtype``; half types round through float32, as torch converts."""
    if dtype is torch.float64 or value != value or math.isinf(value):
        return value
    try:
        single: float = struct.unpack("<f", struct.pack("<f", value))[0]
        if dtype is torch.float32:
            return single
        if dtype is torch.float16:
            half: float = struct.unpack("<e", struct.pack("<e", single))[0]
            return half
    except OverflowError:
        return math.copysign(math.inf, value)
    return _round_bfloat16(single)


def _round_bfloat16(single: float) -> float:
    bits: int = struct.unpack("<I", struct.pack("<f", single))[0]
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    value: float = struct.unpack("<f", struct.pack("<I", rounded))[0]
    return value


def fits(value: Number, dtype: torch.dtype) -> bool:
    """Whether converting ``value`` to ``dtype`` is defined: a float or out-of-range int has no integer form."""
    if not is_integer(dtype):
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    low, high = integer_range(dtype)
    return low <= int(value) <= high


def convert(value: Number, dtype: torch.dtype) -> Number:
    """``value`` as ``dtype`` holds it: rounded for floats, truncated for integers, ``!= 0`` for bool."""
    if dtype is torch.bool:
        return value != 0
    if is_integer(dtype):
        return wrap_integer(int(value), dtype)
    try:
        return round_float(float(value), dtype)
    except OverflowError:  # a Python int beyond float64
        return math.copysign(math.inf, value)
