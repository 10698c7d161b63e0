"""What the printed kernels of foreach are made of, as functions of Triton; and the kernel that ends a reduction."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk(table, chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The program's row of the table, its first element (int64), and whether it has a whole block of them."""
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(chunks + 2 * program).to(tl.int64) * WIDTH
    start = tl.load(chunks + 2 * program + 1).to(tl.int64) * BLOCK
    return row, start, start + BLOCK <= tl.load(row)


@triton.jit
def address(row, AT: tl.constexpr, TYPE: tl.constexpr):
    """The pointer that is kept in a row."""
    return tl.load(row + AT).to(tl.pointer_type(TYPE))


@triton.jit
def places(pointer, lanes, ALIGNED: tl.constexpr):
    """Pointers of consecutive elements."""
    found = pointer + lanes
    if ALIGNED:
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def counted(start, lanes, WIDE: tl.constexpr):
    """The numbers of the elements: in 32 bits where those are enough, which are divided in a fifth of the time."""
    if WIDE:
        found = start + lanes
    else:
        found = start.to(tl.int32) + lanes
    return found


@triton.jit
def divided(rest, size, WIDE: tl.constexpr, LAST: tl.constexpr):
    """The index in a dimension (int64), and what is left for those outside it."""
    if LAST:
        index = rest
    else:
        if not WIDE:
            size = size.to(tl.int32)
        index = rest % size
        rest = rest // size
    return index.to(tl.int64), rest


@triton.jit
def number(bits, TYPE: tl.constexpr):
    """A number from its int64."""
    bits = bits.to(tl.int64)
    if tl.float64 == TYPE:
        found = bits.to(tl.float64, bitcast=True)
    elif tl.int1 == TYPE:
        found = bits != 0
    else:
        found = bits.to(TYPE)
    return found


# ---------------------------------------------------------------------------- reductions


@triton.jit
def sum_of(values, inside):
    """The sum of the values that are ``inside``."""
    return tl.sum(tl.where(inside, values, 0).to(values.dtype), 0)


@triton.jit
def any_of(values, inside):
    """1 if one of them is not 0."""
    return tl.max(tl.where(inside, values, 0).to(values.dtype), 0)


@triton.jit
def max_of(values, inside):
    """The largest of them; NaN if one is, and the least number of the type if there are none."""
    if values.dtype == tl.float64:
        least = tl.full((), float("-inf"), tl.float64)
        found = tl.max(tl.where(inside & (values == values), values, least), 0)
        odd = tl.max((inside & (values != values)).to(tl.int32), 0)
        found = tl.where(odd != 0, float("nan"), found).to(tl.float64)
    else:
        found = tl.max(tl.where(inside, values, tl.full((), -(2**63), tl.int64)), 0)
    return found


@triton.jit
def keep(partial, OUTPUT: tl.constexpr, value):
    """Write a program's number among those of an output."""
    place = partial + OUTPUT * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    tl.store(place, value.to(tl.int64, bitcast=True))


@triton.jit
def settle(
    table, partial, results, programs: tl.int64, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OUTPUT: tl.constexpr,
    OUTPUTS: tl.constexpr, CHUNK: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr, LEAST: tl.constexpr,
    REDUCTION: tl.constexpr,
):  # fmt: skip
    """Reduce the numbers of one position's chunks, one block after the other, and write the result where it belongs.

    Args:
        table: rows of positions.
        partial: (outputs, programs) numbers, as int64.
        results: (positions of the lists, outputs) addresses.
        programs: chunks of all positions.
        WIDTH: numbers of a row.
        BLOCK: numbers reduced at once.
        OUTPUT: which of the outputs.
        OUTPUTS: how many there are.
        CHUNK: elements of a chunk.
        KIND: what is reduced in, float64 or int64.
        TYPE: of the result.
        LEAST: the largest of nothing, of integers.
        REDUCTION: ``sum``, ``max`` or ``any``.
    """
    row = table + tl.program_id(0).to(tl.int64) * WIDTH
    count = (tl.load(row) + CHUNK - 1) // CHUNK
    numbers = partial + OUTPUT * programs + tl.load(row + 2)
    lanes = tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), KIND)
    if REDUCTION == "max":
        found = lowest(found)
    for start in range(0, count, BLOCK):
        inside = start + lanes < count
        values = tl.load(numbers + start + lanes, mask=inside, other=0).to(KIND, bitcast=True)
        if REDUCTION == "sum":
            found += tl.where(inside, values, 0).to(KIND)
        elif REDUCTION == "any":
            found |= tl.where(inside, values, 0).to(KIND)
        else:
            values = tl.where(inside, values, lowest(values))
            found = tl.where((values > found) | (values != values), values, found)
    every = lanes >= 0
    if REDUCTION == "sum":
        total = sum_of(found, every)
    elif REDUCTION == "any":
        total = any_of(found, every)
    else:
        total = max_of(found, every)
        if tl.int64 == KIND:
            total = tl.maximum(total, LEAST)
    place = tl.load(results + tl.load(row + 1) * OUTPUTS + OUTPUT).to(tl.pointer_type(TYPE))
    if TYPE.is_floating() and TYPE.primitive_bitwidth < 32:
        total = total.to(tl.float32)  # which 16-bit types are rounded from
    tl.store(place, total.to(TYPE))


@triton.jit
def lowest(like):
    """What is less than anything, of float64 or int64."""
    if like.dtype == tl.float64:
        found = tl.zeros_like(like) + float("-inf")
    else:
        found = tl.zeros_like(like) + tl.full((), -(2**63), tl.int64)
    return found
