"""One tile of keys at a time: loads, logits, weights, and the walks that go from tile to tile.

The parts of :mod:`torchhal.portable.attention_kernels`, whose docstring has the words used here. What several of them
need travels in tuples:

- ``walk``: indices of blocks and the step between two of them, tiles of a block, keys of a block, blocks, and the end
  of the keys that may be visited;
- ``source``: keys, values, their strides, and the place of the sequence (its first token, or its table of pages);
- ``rows``: sequence, query head, row of the query, position, and whether there is such a row;
- ``config``: what is compiled in; :data:`CONFIG` names its entries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOG2E = tl.constexpr(1.4426950408889634)

CONFIG = (
    "CAUSAL", "MASK", "score_mod", "mask_mod", "FOLD", "FROM_ZERO", "PAGE", "PRECISION", "E", "EV", "DROPOUT", "NATURAL",
)  # fmt: skip
"""In their order: keys after the query are hidden; kind of ``attn_mask`` (None, ``boolean``, ``additive``); the user's
functions; the scale is applied with the exponential; rows before position 0 see nothing; tokens of a page (0: no pages);
how float32 is multiplied; the head sizes; whether weights are dropped; whether logits are natural ones (:func:`power`)."""

# ---------------------------------------------------------------------------- one tile of keys


@triton.jit
def key_rows(start, n, limit, place, strides, PAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets in memory of the keys n, which begin with ``start``.

    ``place`` is the first token, or the table of pages; ``ALIGNED`` says that one page holds all of them.
    """
    if PAGE == 0:
        rows = (place[0] + n).to(tl.int64) * strides[2]
    else:
        table, step, pages = place
        if ALIGNED:
            page = tl.load(table + (tl.full((), 0, tl.int64) + start // PAGE) * step)
        else:
            page = tl.load(table + (n // PAGE).to(tl.int64) * step, mask=n < limit, other=0)
        page = tl.minimum(tl.maximum(page, 0), pages - 1)
        rows = page.to(tl.int64) * strides[0] + (n % PAGE).to(tl.int64) * strides[2]
    return rows


@triton.jit
def load_tile(pointer, rows, columns, stride, n, limit, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):
    """(rows, columns) of keys or values, zero past ``limit`` and past ``WIDTH``."""
    pointers = pointer + rows + columns.to(tl.int64) * stride
    if BOUNDED:
        return tl.load(pointers, mask=(n < limit) & (columns < WIDTH), other=0.0)
    if columns.shape[0] * columns.shape[1] > WIDTH:
        return tl.load(pointers, mask=columns < WIDTH, other=0.0)
    return tl.load(pointers)


@triton.jit
def keep(n, q, h, b, seed, threshold):
    """Which pairs dropout keeps, by the generator of :mod:`torchhal.reference.dropout`."""
    w0, w1, w2, w3 = tl.philox(seed, n >> 2, q, h, b, 10)
    lane = n & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word.to(tl.int64) >= threshold


@triton.jit
def logits(
    products, n, limit, rows, mods, mask, scale,
    BOUNDED: tl.constexpr, MASKED: tl.constexpr, config: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of products (without the factor ``scale`` where config folds it), -inf where hidden.

    Of base 2, or natural ones where config says so.
    """
    b, h, i, q, row_ok = rows
    CAUSAL: tl.constexpr = config[0]
    MASK: tl.constexpr = config[1]
    score_mod: tl.constexpr = config[2]
    mask_mod: tl.constexpr = config[3]
    FOLD: tl.constexpr = config[4]
    FROM_ZERO: tl.constexpr = config[5]
    NATURAL: tl.constexpr = config[11]
    score_captured, mask_captured = mods
    if FOLD:
        s = products
    else:
        s = products * scale
        if score_mod is not None:
            s = tl.broadcast_to(score_mod(s, b, h, q, n, score_captured).to(tl.float32), products.shape)
    if MASK is not None:
        pointer, sb, sh, sl, sk = mask
        if NATURAL:
            sb, sh, sl, sk = (sb - 3) // 2, (sh - 3) // 2, (sl - 3) // 2, (sk - 3) // 2
        places = (
            pointer + b.to(tl.int64) * sb + h.to(tl.int64) * sh + i.to(tl.int64) * sl + n.to(tl.int64) * sk
        )
        given = tl.load(places, mask=row_ok & (n < limit), other=0)
        if MASK == "boolean":
            s = tl.where(given != 0, s, float("-inf"))
        else:
            given = given.to(tl.float32)
            s = tl.where(given == float("-inf"), float("-inf"), s + given)
    if not (FOLD or NATURAL):
        s = s * LOG2E
    if MASKED:
        seen = mask_mod(b, h, q, n, mask_captured)
        s = tl.where(tl.broadcast_to(seen, products.shape), s, float("-inf"))
    if BOUNDED:
        s = tl.where(n < limit, s, float("-inf"))
        if CAUSAL:
            s = tl.where(n <= q, s, float("-inf"))
    if FROM_ZERO:
        s = tl.where(q >= 0, s, float("-inf"))
    return s


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """2 to the power of x, as hardware has it; e to the power of x, correct to the last bit but one, for float32 inputs.

    Logits of base 2 carry the rounding of their factor into every weight. That is below what 16-bit inputs can show.
    """
    if NATURAL:
        result = libdevice.exp(x)
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def weigh(s, peak, total, factor, FOLD: tl.constexpr, NATURAL: tl.constexpr):
    """Weights of a tile of logits: (weights, what to multiply earlier sums by, new peak, new total)."""
    if FOLD:
        new_peak = tl.maximum(peak, tl.max(s, 1) * factor)
    else:
        new_peak = tl.maximum(peak, tl.max(s, 1))
    base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    if FOLD:
        weights = tl.exp2(s * factor - base[:, None])
    else:
        weights = power(s - base[:, None], NATURAL)
    decay = power(peak - base, NATURAL)
    return weights, decay, new_peak, total * decay + tl.sum(weights, 1)


@triton.jit
def where_to(step, walk, LISTED: tl.constexpr, BLOCK_N: tl.constexpr):
    """First key of a step of a walk, and the end of the keys that it may visit."""
    indices, stride, parts, width, columns, end = walk
    if LISTED:
        block = tl.load(indices + (step // parts).to(tl.int64) * stride)
        inside = (block >= 0) & (block < columns)
        block = tl.minimum(tl.maximum(block, 0), tl.maximum(columns - 1, 0))
        start = block * width + (step % parts) * BLOCK_N
        return start, tl.where(inside, tl.minimum(end, block * width + width), 0)
    return step * BLOCK_N, end


# ---------------------------------------------------------------------------- walks


@triton.jit
def scan(
    state, q, first, last, walk, source, k_tiles, v_tiles, kv_head, rows, mods, mask, dropout, scale,
    BLOCK_N: tl.constexpr, LISTED: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    config: tl.constexpr,
):  # fmt: skip
    """Go on from ``state`` (sums of values, peaks, totals) over steps ``first`` to ``last`` of a walk.

    ``k_tiles`` and ``v_tiles`` are tensor descriptors of (B, Hkv, S, E), by which hardware fetches tiles on its own, or None.
    """
    acc, peak, total = state
    key, value, k_strides, v_strides, place = source
    PAGE: tl.constexpr = config[6]
    PRECISION: tl.constexpr = config[7]
    E: tl.constexpr = config[8]
    EV: tl.constexpr = config[9]
    factor = scale * LOG2E
    e = tl.arange(0, q.shape[1])[:, None]
    ev = tl.arange(0, acc.shape[1])[None, :]
    for step in range(first, last):
        start, limit = where_to(step, walk, LISTED, BLOCK_N)
        n = start + tl.arange(0, BLOCK_N)
        if k_tiles is None:
            at = key_rows(start, n, limit, place, k_strides, PAGE, not LISTED and PAGE % BLOCK_N == 0)
            k = load_tile(key, at[None, :], e, k_strides[3], n[None, :], limit, E, BOUNDED)
        else:
            k = tl.trans(tl.reshape(k_tiles.load([rows[0], kv_head, start, 0]), (BLOCK_N, q.shape[1])))
        s = tl.dot(q, k, input_precision=PRECISION)
        s = logits(s, n[None, :], limit, rows, mods, mask, scale, BOUNDED, MASKED, config)
        weights, decay, peak, total = weigh(s, peak, total, factor, config[4], config[11])
        if config[10]:
            kept = keep(n[None, :], rows[3], rows[1], rows[0], dropout[0], dropout[1])
            weights = tl.where(kept, weights, 0.0)
        if v_tiles is None:
            at = key_rows(start, n, limit, place, v_strides, PAGE, not LISTED and PAGE % BLOCK_N == 0)
            v = load_tile(value, at[:, None], ev, v_strides[3], n[:, None], limit, EV, BOUNDED)
        else:
            v = tl.reshape(v_tiles.load([rows[0], kv_head, start, 0]), (BLOCK_N, acc.shape[1]))
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, peak, total


@triton.jit
def exact_scan(
    state, q, first, last, walk, source, rows, mods, mask, dropout, scale, ev,
    BLOCK_N: tl.constexpr, LISTED: tl.constexpr, MASKED: tl.constexpr, config: tl.constexpr,
):  # fmt: skip
    """:func:`scan` over the columns ``ev`` of the values, with counts of the visible values that are +inf, -inf or NaN."""
    acc, peak, total, above, below = state
    key, value, k_strides, v_strides, place = source
    PAGE: tl.constexpr = config[6]
    PRECISION: tl.constexpr = config[7]
    E: tl.constexpr = config[8]
    EV: tl.constexpr = config[9]
    factor = scale * LOG2E
    e = tl.arange(0, q.shape[1])[:, None]
    for step in tl.range(first, last, num_stages=1):
        start, limit = where_to(step, walk, LISTED, BLOCK_N)
        n = start + tl.arange(0, BLOCK_N)
        at = key_rows(start, n, limit, place, k_strides, PAGE, not LISTED and PAGE % BLOCK_N == 0)
        k = load_tile(key, at[None, :], e, k_strides[3], n[None, :], limit, E, True)
        s = tl.dot(q, k, input_precision=PRECISION)
        s = logits(s, n[None, :], limit, rows, mods, mask, scale, True, MASKED, config)
        seen = (s != float("-inf")).to(value.dtype.element_ty)
        weights, decay, peak, total = weigh(s, peak, total, factor, config[4], config[11])
        if config[10]:
            kept = keep(n[None, :], rows[3], rows[1], rows[0], dropout[0], dropout[1])
            weights = tl.where(kept, weights, 0.0)
        at = key_rows(start, n, limit, place, v_strides, PAGE, not LISTED and PAGE % BLOCK_N == 0)
        v = load_tile(value, at[:, None], ev, v_strides[3], n[:, None], limit, EV, True)
        wide = v.to(tl.float32)
        finite = tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(v.dtype)
        up = ((wide == float("inf")) | (wide != wide)).to(v.dtype)
        down = ((wide == float("-inf")) | (wide != wide)).to(v.dtype)
        acc = tl.dot(weights.to(v.dtype), finite, acc * decay[:, None], input_precision=PRECISION)
        above = tl.dot(seen, up, above, input_precision="tf32")  # of zeros and ones, exact in any type
        below = tl.dot(seen, down, below, input_precision="tf32")
    return acc, peak, total, above, below
