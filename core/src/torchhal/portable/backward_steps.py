"""One tile at a time of attention's gradients: the parts of :mod:`torchhal.portable.backward_kernels`, whose docstring has the
words used here; what travels in tuples is as in :mod:`torchhal.portable.attention_steps`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchhal.portable.attention_kernels import list_walk
from torchhal.portable.attention_steps import LOG2E, keep, load_tile, logits, power, where_to

# ---------------------------------------------------------------------------- a tile


@triton.jit
def finite(x):
    """With zeros in place of what is no finite number."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@triton.jit
def weights_of(s, lse, factor, FOLD: tl.constexpr, NATURAL: tl.constexpr, CLEAN: tl.constexpr):
    """The forward pass's weights of a tile of logits; 0 where hidden and, ``CLEAN``, whatever the LSE is."""
    if FOLD:
        weights = tl.exp2(s * factor - lse)
    else:
        weights = power(s - lse, NATURAL)
    if CLEAN:
        weights = tl.where(s == float("-inf"), 0.0, weights)
    return weights


@triton.jit
def score_gradient(
    products, s, weights, above, delta, n, rows, captured, scale, slope: tl.constexpr,
    CLEAN: tl.constexpr,
):  # fmt: skip
    """DS of a tile, with respect to the score that the ``score_mod`` is given; 0 where hidden."""
    b, h, _i, q, _row_ok = rows
    found = weights * (above - delta)
    if slope is not None:
        found = tl.broadcast_to(slope(products * scale, b, h, q, n, found, captured), products.shape)
    if CLEAN:
        found = tl.where(s == float("-inf"), 0.0, found)
    return found


@triton.jit
def row_numbers(lse, delta, places, row_ok, NATURAL: tl.constexpr):
    """LSE of rows, of the base of the logits, and delta. A row that sees nothing, or is none, has an LSE of +inf."""
    found = tl.load(lse + places, mask=row_ok, other=float("-inf"))
    blind = found == float("-inf")
    sums = tl.load(delta + places, mask=row_ok & (found != float("-inf")), other=0.0)
    if not NATURAL:
        found = found * LOG2E
    return tl.where(blind, float("inf"), found), sums, blind


# ---------------------------------------------------------------------------- walks


@triton.jit
def query_walk(
    acc, q, above, lse, delta, first, last, walk, source, rows, mods, mask, dropout, scale, extra,
    BLOCK_N: tl.constexpr, LISTED: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
    CLEAN: tl.constexpr, slope: tl.constexpr, config: tl.constexpr,
):  # fmt: skip
    """Add dS K over steps ``first`` to ``last`` of a walk along keys; ``CLEAN`` takes out what is not finite."""
    key, value, k_strides, v_strides, k_start = source
    PRECISION: tl.constexpr = config[7]
    E: tl.constexpr = config[8]
    EV: tl.constexpr = config[9]
    e = tl.arange(0, q.shape[1])[None, :]
    ev = tl.arange(0, above.shape[1])[None, :]
    for step in range(first, last):
        start, limit = where_to(step, walk, LISTED, BLOCK_N)
        n = start + tl.arange(0, BLOCK_N)
        at = (k_start + n[:, None]).to(tl.int64)
        k = load_tile(key, at * k_strides[2], e, k_strides[3], n[:, None], limit, E, BOUNDED)
        v = load_tile(value, at * v_strides[2], ev, v_strides[3], n[:, None], limit, EV, BOUNDED)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        s = logits(products, n[None, :], limit, rows, mods, mask, scale, BOUNDED, MASKED, config)
        weights = weights_of(s, lse, scale * LOG2E, config[4], config[11], CLEAN)
        dp = tl.dot(above, tl.trans(v), input_precision=PRECISION)
        if config[10]:
            kept = keep(n[None, :], rows[3], rows[1], rows[0], dropout[0], dropout[1])
            dp = tl.where(kept, dp * extra, 0.0)
        ds = score_gradient(products, s, weights, dp, delta, n[None, :], rows, mods[0], scale, slope, CLEAN)
        if CLEAN:
            k = finite(k)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc


@triton.jit
def key_walk(
    state, k, v, n, first, last, walk, source, of_head, numbers, place, mods, mask, dropout, scale, extra,
    BLOCK_M: tl.constexpr, LISTED: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr, RAGGED: tl.constexpr,
    CLEAN: tl.constexpr, slope: tl.constexpr, config: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO over steps ``first`` to ``last`` of a walk along query rows of a head.

    Tiles are (keys, rows); ``RAGGED`` ones may reach past the last row. ``CLEAN`` takes out what is not finite, and counts
    what of dO it took from rows that see a key.
    """
    dk, dv, taken = state
    query, above, q_strides, a_strides, l_strides = source
    b, h = of_head
    lse, delta = numbers
    q_start, first_position, _rows, keys = place
    NATURAL: tl.constexpr = config[11]
    PRECISION: tl.constexpr = config[7]
    E: tl.constexpr = config[8]
    EV: tl.constexpr = config[9]
    e = tl.arange(0, k.shape[1])[None, :].to(tl.int64)
    ev = tl.arange(0, v.shape[1])[None, :].to(tl.int64)
    for step in range(first, last):
        start, limit = where_to(step, walk, LISTED, BLOCK_M)
        i = start + tl.arange(0, BLOCK_M)
        row_ok = i < limit
        at = (q_start + i).to(tl.int64)
        lse_of, delta_of, _blind = row_numbers(lse, delta, at * l_strides[2], row_ok, NATURAL)
        # Not masked by what the LSE says: loads that wait for a load are not fetched ahead. Rows that see nothing are hidden
        # from every key, and what they hold is taken out where it is not finite.
        q = load_tile(query, at[:, None] * q_strides[2], e, q_strides[3], i[:, None], limit, E, RAGGED)
        a = load_tile(above, at[:, None] * a_strides[2], ev, a_strides[3], i[:, None], limit, EV, RAGGED)
        of_rows = (b, h, i[None, :], first_position + i[None, :], row_ok[None, :])
        products = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        s = logits(products, n, keys, of_rows, mods, mask, scale, BOUNDED, MASKED, config)
        if RAGGED:
            s = tl.where(row_ok[None, :], s, float("-inf"))
        weights = weights_of(s, lse_of[None, :], scale * LOG2E, config[4], NATURAL, CLEAN)
        dp = tl.dot(v, tl.trans(a), input_precision=PRECISION)
        kept_weights = weights
        if config[10]:
            kept = keep(n, of_rows[3], h, b, dropout[0], dropout[1])
            dp = tl.where(kept, dp * extra, 0.0)
            kept_weights = tl.where(kept, weights * extra, 0.0)
        ds = score_gradient(
            products, s, weights, dp, delta_of[None, :], n, of_rows, mods[0], scale, slope, CLEAN
        )
        if CLEAN:
            q = finite(q)
            lost = ~(tl.abs(a.to(tl.float32)) < float("inf"))
            taken = tl.dot((s != float("-inf")).to(a.dtype), lost.to(a.dtype), taken, input_precision="tf32")
            a = finite(a)
        dv = tl.dot(kept_weights.to(a.dtype), a, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, taken


@triton.jit
def head_walk(
    state, k, v, n, start, source, of_head, numbers, place, mods, mask, lists, dropout, scale, extra,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr, RAGGED: tl.constexpr,
    CLEAN: tl.constexpr, slope: tl.constexpr, config: tl.constexpr,
):  # fmt: skip
    """:func:`key_walk` along all rows of a head that may see the tile's keys."""
    _q_start, first, rows, _keys = place
    partial, full, block_sizes, block_column = lists
    HAS_MASK_MOD: tl.constexpr = config[3] is not None
    CAUSAL: tl.constexpr = config[0]
    if BLOCKS:
        b, h = of_head
        Q_BLOCK, _K_BLOCK, _tiles_of_block, parts, block_rows, columns = block_sizes
        count, walk = list_walk(partial, b, h, block_column, columns, parts, Q_BLOCK, block_rows, rows)
        state = key_walk(state, k, v, n, 0, count, walk, source, of_head, numbers, place, mods, mask, dropout, scale, extra,
                         BLOCK_M, True, True, HAS_MASK_MOD, RAGGED, CLEAN, slope, config)  # fmt: skip
        if FULL:
            count, walk = list_walk(full, b, h, block_column, columns, parts, Q_BLOCK, block_rows, rows)
            state = key_walk(state, k, v, n, 0, count, walk, source, of_head, numbers, place, mods, mask, dropout, scale,
                             extra, BLOCK_M, True, True, False, RAGGED, CLEAN, slope, config)  # fmt: skip
    else:
        walk = (numbers[0], 0, 1, 0, 0, rows)
        last = tl.cdiv(rows, BLOCK_M)
        free = 0
        if CAUSAL:
            begin = tl.maximum(start - first, 0) // BLOCK_M
            free = tl.minimum(tl.cdiv(tl.maximum(start + BLOCK_N - 1 - first, 0), BLOCK_M), last)
            state = key_walk(state, k, v, n, begin, free, walk, source, of_head, numbers, place, mods, mask, dropout, scale,
                             extra, BLOCK_M, False, True, HAS_MASK_MOD, RAGGED, CLEAN, slope, config)  # fmt: skip
            free = tl.maximum(free, begin)
        state = key_walk(state, k, v, n, free, last, walk, source, of_head, numbers, place, mods, mask, dropout, scale, extra,
                         BLOCK_M, False, False, HAS_MASK_MOD, RAGGED, CLEAN, slope, config)  # fmt: skip
    return state
