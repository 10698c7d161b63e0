"""What Triton has no word for, as functions of Triton: the arithmetic that printed graphs call.

Every function has torch's meaning for its operands, infinities, NaN and wrapping integers included. Floating operands
are float32 or float64; narrower ones are widened by whoever calls, and rounded once afterwards.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

# ---------------------------------------------------------------------------- integers


@triton.jit
def int_floordiv(a, b):
    """Quotient rounded toward minus infinity; that of the language is rounded toward zero."""
    quotient = a // b
    inexact = quotient * b != a
    return tl.where(inexact & ((a < 0) != (b < 0)), quotient - 1, quotient).to(a.dtype)


@triton.jit
def int_remainder(a, b):
    """What :func:`int_floordiv` leaves: of the sign of ``b``."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest).to(a.dtype)


@triton.jit
def int_pow(base, exponent, BITS: tl.constexpr):
    """By squaring, wrapping; a negative exponent gives what torch's integers give: 0, or a power of 1 and -1."""
    negative = exponent < 0
    odd = (exponent & 1) != 0
    result = base * 0 + 1 + exponent * 0
    square = base + exponent * 0
    rest = exponent + base * 0
    for _ in range(BITS):
        result = tl.where((rest & 1) != 0, result * square, result).to(base.dtype)
        square = square * square
        rest = rest >> 1
    unit = tl.where(base == 1, base * 0 + 1, tl.where(base == -1, tl.where(odd, base, -base), base * 0))
    return tl.where(negative, unit, result).to(base.dtype)


@triton.jit
def unsigned_pow(base, exponent, BITS: tl.constexpr):
    """By squaring, wrapping."""
    result = base * 0 + 1 + exponent * 0
    square = base + exponent * 0
    rest = exponent + base * 0
    for _ in range(BITS):
        result = tl.where((rest & 1) != 0, result * square, result).to(base.dtype)
        square = (square * square).to(base.dtype)
        rest = rest >> 1
    return result


@triton.jit
def shift_left(a, b, BITS: tl.constexpr):
    """0 where the distance is negative or not less than the width."""
    outside = (b < 0) | (b >= BITS)
    return tl.where(outside, a * 0, a << tl.where(outside, b * 0, b)).to(a.dtype)


@triton.jit
def shift_right(a, b, BITS: tl.constexpr):
    """Arithmetic; nothing but copies of the sign where the distance is negative or not less than the width."""
    outside = (b < 0) | (b >= BITS)
    signs = tl.where(a < 0, a * 0 - 1, a * 0)
    return tl.where(outside, signs, a >> tl.where(outside, b * 0, b)).to(a.dtype)


@triton.jit
def sign(a):
    """-1, 0 or 1; 0 for NaN."""
    return ((a > 0).to(a.dtype) - (a < 0).to(a.dtype)).to(a.dtype)


# ---------------------------------------------------------------------------- floats


@triton.jit
def divide(a, b):
    """Correctly rounded in float32 too, where the operator of the language is not."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def divide_by(a, B: tl.constexpr, INVERSE: tl.constexpr):
    """``a / B`` correctly rounded, for a number B of ordinary size, without the branches of a division.

    The quotient by the rounded inverse is corrected by what it leaves (Markstein, "Computation of elementary functions
    on the IBM RISC System/6000 processor", 1990); where nothing is left, or the quotient is not finite, it stays.
    """
    quotient = a * INVERSE
    rest = tl.fma(quotient, tl.full((), -B, tl.float32), a)
    return tl.where(tl.abs(rest) > 0, tl.fma(rest, tl.full((), INVERSE, tl.float32), quotient), quotient)


@triton.jit
def square_root(a):
    """Correctly rounded, as :func:`divide` is."""
    if a.dtype == tl.float32:
        return tl.sqrt_rn(a)
    return libdevice.sqrt(a)


@triton.jit
def reciprocal(a):
    """``1 / a``, correctly rounded."""
    return divide(tl.where(a == a, 1.0, 1.0).to(a.dtype), a)


@triton.jit
def float_remainder(a, b):
    """``fmod`` moved to the sign of ``b``."""
    rest = libdevice.fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def float_floordiv(a, b):
    """The whole quotient nearest to ``(a - remainder) / b``, of the sign of the quotient where it is 0; ``a / b`` for b = 0."""
    rest = libdevice.fmod(a, b)
    quotient = divide(a - rest, b)
    quotient = tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1.0, quotient)
    whole = tl.floor(quotient)
    whole = tl.where(quotient - whole > 0.5, whole + 1.0, whole)
    plain = divide(a, b)
    zero = libdevice.copysign(plain * 0.0, plain)
    return tl.where(b == 0, plain, tl.where(quotient != 0, whole, zero))


@triton.jit
def sigmoid(a):
    """``1 / (1 + exp(-a))``."""
    return reciprocal(1.0 + libdevice.exp(-a))


@triton.jit
def tanh(a):
    """Within 2 ulp and free of branches in float32: a polynomial near 0, and by an exponential elsewhere."""
    if a.dtype == tl.float32:
        square = a * a
        near = -0.005754792597144842 * square + 0.020682543516159058
        near = near * square - 0.05375269800424576
        near = near * square + 0.13331593573093414
        near = near * square - 0.3333328664302826
        near = near * square * a + a
        size = tl.abs(a)
        far = 1.0 - 2.0 / (tl.exp2(size * 2.8853900817779268) + 1.0)
        result = tl.where(size < 0.62, near, tl.where(a < 0, -far, far))
    else:
        result = libdevice.tanh(a)
    return result


@triton.jit
def erf(a):
    """Within 2 ulp and free of branches in float32: a polynomial near 0, and by an exponential elsewhere.

    The coefficients are a weighted minimax fit of ``erf(x) / x - 1`` in ``x * x`` up to 0.92, and of ``log2(erfc(x)) / x`` up to 4,
    where erf is 1: 1.04 and 1.21 ulp at most over 600 000 numbers. The mathematics library selects between coefficients, which
    took 12 moves of constants for each element of a GELU (sm_90a).
    """
    if a.dtype == tl.float32:
        square = a * a
        near = -0.0005999404820613563 * square + 0.0049948301166296005
        near = near * square - 0.02676771953701973
        near = near * square + 0.11281845718622208
        near = near * square - 0.3761249780654907
        near = (near * square + 0.12837915122509003) * a + a
        size = tl.minimum(tl.abs(a), 4.0)
        far = 0.00030852697091177106 * size - 0.0046367947943508625
        far = far * size + 0.03301924094557762
        far = far * size - 0.15185536444187164
        far = far * size - 0.9171510338783264
        far = 1.0 - tl.exp2((far * size - 1.6281012296676636) * size)
        result = tl.where(tl.abs(a) >= 0.92, tl.where(a < 0, -far, far), near)
    else:
        result = libdevice.erf(a)
    return result


@triton.jit
def minimum(a, b):
    """NaN if either is."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(a, b):
    """NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


# ---------------------------------------------------------------------------- captured tensors


@triton.jit
def offset(index, size, stride, WIDE: tl.constexpr):
    """How far into a captured tensor ``index`` leads along one dimension; negative ones count from the end.

    An index outside the tensor, which a position that a mask hides may ask for, is brought to its nearest end.
    """
    index = tl.minimum(tl.maximum(index, -size), size - 1)
    index = tl.where(index < 0, index + size, index)
    if WIDE:
        place = index.to(tl.int64) * stride
    else:  # a return in the other branch would not keep Triton from reading on, and from finding two types
        place = index.to(tl.int32) * stride
    return place
