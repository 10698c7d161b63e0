"""The Triton kernels of the fused matrix product; :mod:`torchhal.portable.matmul` launches them.

A program computes tiles of the result one after the other. Three ideas make one kernel serve every problem:

- **exact numbers**: elements of 16 bits, and the whole numbers of a packed weight, go to the matrix units as they are; a
  packed weight's scales multiply the sum over each group, so that no element is ever rounded;
- **two halves**: an element that was computed in float32, by a prologue or from a packed weight's scale, is the exact sum
  of a 16-bit number, the upper half of its bits, and a rest of which 8 bits are kept: 16 bits of each element count,
  of a result that has 8 or 11;
- **parts of the sum**: where tiles are too few to keep the device busy, the sum over K is cut into parts, which
  :func:`finish_kernel` adds in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchhal.portable.matmul_weights import elements, group_numbers, quant_pairs, quants, scales, zeros_of

# ---------------------------------------------------------------------------- one product of tiles


@triton.jit
def upper(x):
    """float32 numbers without the lower half of their bits, as bfloat16; infinities and NaN stay."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def rest(x):
    """What :func:`upper` leaves, as bfloat16."""
    left = x - upper(x).to(tl.float32)
    return tl.where(tl.abs(x) < float("inf"), left, 0.0).to(tl.bfloat16)


@triton.jit
def add_product(
    x, y, total, MODE: tl.constexpr, X_WIDE: tl.constexpr, Y_WIDE: tl.constexpr, PRECISION: tl.constexpr
):
    """``total + x @ y``: of 16-bit numbers, of float32 ones, or of the halves of those that are WIDE."""
    if MODE == "half":
        total = tl.dot(x, y, total)
    elif MODE == "full":
        # Added at once, for a sum term by term over all of K is twice as far off; fused, for the compiler makes a sum of a plain "+".
        part = tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision=PRECISION)
        total = tl.fma(part, tl.full(total.shape, 1.0, tl.float32), total)
    else:
        if X_WIDE:
            x_upper = upper(x.to(tl.float32))
        else:
            x_upper = x.to(tl.bfloat16)
        if Y_WIDE:
            y_upper = upper(y.to(tl.float32))
        else:
            y_upper = y.to(tl.bfloat16)
        small = tl.zeros(total.shape, tl.float32)
        if X_WIDE:
            small = tl.dot(rest(x.to(tl.float32)), y_upper, small)
        if Y_WIDE:
            small = tl.dot(x_upper, rest(y.to(tl.float32)), small)
        # Infinity times a rest of 0 is NaN, which the product of the upper halves is not.
        total += tl.where(tl.abs(small) < float("inf"), small, 0.0)
        total = tl.dot(x_upper, y_upper, total)
    return total


@triton.jit
def transformed(x, function: tl.constexpr, batch, row, col, captured, row_ok, col_ok):
    """A prologue's tile: 0 outside the operand, whatever the function makes of 0."""
    live = (True, True, row_ok, col_ok)
    found = tl.broadcast_to(function(x.to(tl.float32), batch, row, col, captured, live), x.shape)
    return tl.where(row_ok & col_ok, found.to(tl.float32), 0.0)


# ---------------------------------------------------------------------------- where a tile is


@triton.jit
def place_of(number, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that programs at work together share what they read."""
    width = GROUP * tiles_n
    first = number // width * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = number % width
    return first + within % height, within // height


@triton.jit
def batch_offset(entry, sizes, steps):
    """How far into an operand the matrix of a flattened batch entry lies; a dimension that it is broadcast along has step 0."""
    left = entry
    offset = entry.to(tl.int64) * 0
    for i in tl.static_range(len(sizes) - 1, -1, -1):
        offset += (left % sizes[i]).to(tl.int64) * steps[i]
        left = left // sizes[i]
    return offset


@triton.jit
def in_range(index, size, EVEN: tl.constexpr):
    """Whether indices are inside; known without asking where tiles are EVEN."""
    if EVEN:
        found = tl.full(index.shape, 1, tl.int1)
    else:
        found = index < size
    return found


@triton.jit
def far(index, stride, WIDE: tl.constexpr):
    """An offset, in 64 bits where that may be needed."""
    if WIDE:
        place = index.to(tl.int64) * stride
    else:
        place = index * stride
    return place


@triton.jit
def strip(
    a_base, rows, across, row_ok, across_ok, a_col, entry, captured, a_prologue: tl.constexpr, A_FAR: tl.constexpr,
):  # fmt: skip
    """A tile of ``a`` after its prologue: columns ``across``."""
    x = tl.load(a_base + far(across, a_col, A_FAR), mask=row_ok & across_ok, other=0.0)
    if a_prologue is not None:
        x = transformed(x, a_prologue, entry, rows, across, captured, row_ok, across_ok)
    return x


# ---------------------------------------------------------------------------- results


@triton.jit
def store_results(
    total, entry, rows, first, row_ok, row_count, col_count, bias, bias_step, captured, outs,
    epilogue: tl.constexpr, BIAS: tl.constexpr, OUTPUTS: tl.constexpr, EVEN_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Add the bias, apply the epilogue, and round to each result's type: columns from ``first`` on, in PARTS for want of registers."""
    HEIGHT: tl.constexpr = total.shape[0]
    WIDTH: tl.constexpr = total.shape[1]
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(total, (HEIGHT, 2, WIDTH // 2)), (0, 2, 1)))
        store_results(left, entry, rows, first, row_ok, row_count, col_count, bias, bias_step, captured, outs,
                      epilogue, BIAS, OUTPUTS, EVEN_N, PARTS // 2)  # fmt: skip
        store_results(right, entry, rows, first + WIDTH // 2, row_ok, row_count, col_count, bias, bias_step, captured, outs,
                      epilogue, BIAS, OUTPUTS, EVEN_N, PARTS // 2)  # fmt: skip
    else:
        cols = (first + tl.arange(0, WIDTH))[None, :]
        col_ok = in_range(cols, col_count, EVEN_N)
        if BIAS:
            total += tl.load(bias + cols * bias_step, mask=col_ok, other=0.0).to(tl.float32)
        place = (entry.to(tl.int64) * row_count + rows) * col_count + cols
        ok = row_ok & col_ok
        if epilogue is None:
            tl.store(outs[0] + place, total.to(outs[0].dtype.element_ty), mask=ok)
        else:
            found = epilogue(total, entry, rows, cols, captured, (True, True, row_ok, col_ok))
            if OUTPUTS == 1:
                value = tl.broadcast_to(found, total.shape)
                tl.store(outs[0] + place, value.to(outs[0].dtype.element_ty), mask=ok)
            else:
                for i in tl.static_range(OUTPUTS):
                    value = tl.broadcast_to(found[i], total.shape)
                    tl.store(outs[i] + place, value.to(outs[i].dtype.element_ty), mask=ok)


# ---------------------------------------------------------------------------- programs


@triton.jit
def product_kernel(
    a, b, a_tiles, b_tiles, weight, bias, outs, parts, a_captured, b_captured, captured,
    a_row, a_col, b_row, b_col, bias_step, sizes, a_steps, b_steps,
    entries, row_count, col_count, inner, tiles_m, tiles_n, splits, programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    KIND: tl.constexpr, TURNED: tl.constexpr, PER: tl.constexpr, ASYMMETRIC: tl.constexpr,
    MODE: tl.constexpr, A_WIDE: tl.constexpr, B_WIDE: tl.constexpr, PRECISION: tl.constexpr,
    a_prologue: tl.constexpr, b_prologue: tl.constexpr, epilogue: tl.constexpr, BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
    SPLIT: tl.constexpr, A_TILES: tl.constexpr, B_TILES: tl.constexpr,
    EVEN_M: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, A_FAR: tl.constexpr, B_FAR: tl.constexpr,
    FLATTEN: tl.constexpr, PARTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Tiles of ``epilogue(a_prologue(a) @ b_prologue(b) + bias)``, or of a part of its sum.

    KIND says what ``b`` is: ``tensor``, or a packed weight, TURNED where the product is by its transpose. PER is how scales
    are applied: to the sum of a ``group``, to the sum of a ``channel``, or to each ``element``. A_TILES and B_TILES say
    whether a tensor descriptor fetches tiles: ``""``, ``rows`` or, of the transposed matrix, ``columns``. With PAIRS the terms
    of two ``int4`` numbers in a byte are added apart, so that each byte is loaded once.
    """
    steps = tl.cdiv(inner, BLOCK_K)
    share = tl.cdiv(steps, splits)
    tiles = tiles_m * tiles_n
    for number in tl.range(tl.program_id(0), tiles * entries * splits, programs, flatten=FLATTEN):
        split = number % splits
        entry = number // splits // tiles
        tile_m, tile_n = place_of(number // splits % tiles, tiles_m, tiles_n, GROUP)
        rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        row_ok = in_range(rows, row_count, EVEN_M)
        col_ok = in_range(cols, col_count, EVEN_N)
        a_base = a + batch_offset(entry, sizes, a_steps) + far(rows, a_row, A_FAR)
        if KIND == "tensor":
            b_base = b + batch_offset(entry, sizes, b_steps) + far(cols, b_col, B_FAR)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if PER == "group":  # numbers of a group are fetched a step before they are used
            ahead = group_numbers(weight, split * share * BLOCK_K, cols, col_ok, inner, KIND, ASYMMETRIC)
        for step in tl.range(split * share, tl.minimum(steps, split * share + share)):
            across = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
            down = step * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
            across_ok = in_range(across, inner, EVEN_K)
            down_ok = in_range(down, inner, EVEN_K)

            if A_TILES == "rows":
                x = a_tiles.load([tile_m * BLOCK_M, step * BLOCK_K])
            elif A_TILES == "columns":
                x = a_tiles.load([step * BLOCK_K, tile_m * BLOCK_M]).T
            else:
                x = strip(a_base, rows, across, row_ok, across_ok, a_col, entry, a_captured, a_prologue, A_FAR)  # fmt: skip
            if A_TILES != "" and a_prologue is not None:
                x = transformed(x, a_prologue, entry, rows, across, a_captured, row_ok, across_ok)

            ok = down_ok & col_ok
            if B_TILES == "rows":
                y = b_tiles.load([step * BLOCK_K, tile_n * BLOCK_N])
            elif B_TILES == "columns":
                y = b_tiles.load([tile_n * BLOCK_N, step * BLOCK_K]).T
            elif KIND == "tensor":
                y = tl.load(b_base + far(down, b_row, B_FAR), mask=ok, other=0.0)
            elif PER == "element":
                if TURNED:
                    y = tl.where(ok, elements(weight, cols, down, ok, KIND, ASYMMETRIC), 0.0)
                else:
                    y = tl.where(ok, elements(weight, down, cols, ok, KIND, ASYMMETRIC), 0.0)
            else:
                zero = tl.zeros((1, BLOCK_N), tl.int32)
                if PER == "group":
                    scale, zero, minimum = ahead
                    ahead = group_numbers(weight, (step + 1) * BLOCK_K, cols, col_ok, inner, KIND, ASYMMETRIC)
                elif ASYMMETRIC:
                    zero = zeros_of(weight, 0, cols, col_ok)
                if PAIRS:
                    pair = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)[:, None]
                    pair_ok = in_range(pair * 2, inner, EVEN_K) & col_ok
                    whole, odd = quant_pairs(weight, pair, cols, pair_ok, zero, ASYMMETRIC, x.dtype)
                else:
                    whole = quants(weight, down, cols, ok, KIND)
                    if ASYMMETRIC:
                        whole = whole.to(tl.float32) - zero.to(tl.float32)
                    # A byte of 0 stands for another number. Those of pairs meet a 0 of the other operand.
                    if (ASYMMETRIC or KIND != "int8") and not EVEN_K:
                        whole = tl.where(down_ok, whole, 0)
                y = whole.to(x.dtype)
            if b_prologue is not None:
                y = transformed(y, b_prologue, entry, down, cols, b_captured, down_ok, col_ok)

            if PAIRS:
                x, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
            before = total
            if PER == "group":
                before = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            part = add_product(x, y, before, MODE, A_WIDE, B_WIDE, PRECISION)
            if PAIRS:
                part = add_product(x_odd, odd.to(x.dtype), part, MODE, A_WIDE, B_WIDE, PRECISION)
            if PER == "group":
                total += part * scale
                if KIND == "q4_1":
                    total += tl.sum(x.to(tl.float32), 1)[:, None] * minimum
            else:
                total = part
        if PER == "channel":
            total *= scales(weight, 0, cols, col_ok, KIND)

        if SPLIT:
            first = (entry.to(tl.int64) + split * entries) * row_count
            tl.store(parts + (first + rows) * col_count + cols, total, mask=row_ok & col_ok)
        else:
            store_results(total, entry, rows, tile_n * BLOCK_N, row_ok, row_count, col_count, bias, bias_step, captured, outs,
                          epilogue, BIAS, OUTPUTS, EVEN_N, PARTS)  # fmt: skip


@triton.jit
def finish_kernel(
    parts, bias, outs, captured, bias_step, entries, row_count, col_count, tiles_m, tiles_n, splits,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    epilogue: tl.constexpr, BIAS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One tile of the results, from the parts of its sum, in their order."""
    number = tl.program_id(0)
    tile = number % (tiles_m * tiles_n)
    entry = number // (tiles_m * tiles_n)
    rows = (tile // tiles_n * ROWS + tl.arange(0, ROWS))[:, None]
    cols = (tile % tiles_n * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    row_ok = rows < row_count
    col_ok = cols < col_count
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for split in tl.range(0, splits):
        first = (entry.to(tl.int64) + split * entries) * row_count
        total += tl.load(parts + (first + rows) * col_count + cols, mask=row_ok & col_ok, other=0.0)
    store_results(total, entry, rows, tile % tiles_n * COLUMNS, row_ok, row_count, col_count, bias, bias_step, captured, outs,
                  epilogue, BIAS, OUTPUTS, False, 1)  # fmt: skip
