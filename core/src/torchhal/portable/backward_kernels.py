"""The Triton kernels of attention's gradients; :mod:`torchhal.portable.gradients` launches them.

Weights are computed again from the LSE (Dao et al., "FlashAttention", arXiv:2205.14135): with P the weights, dO what comes
from above and delta the sum of ``out * dO`` along a row less the gradient of its LSE,

    dV = P^T dO,    dS = P * (dO V^T - delta),    dQ = dS K * scale,    dK = dS^T Q * scale

with dS passed through the derivative of the ``score_mod``. One kernel walks the keys of a tile of query rows and one the rows,
of all query heads that share it, of a tile of keys: every sum has one program and one order, and there are no atomics.

A weight of 0 does not hide a NaN or an infinity. Where keys may be hidden, a program whose result is not finite says so in
``strange``, and a second launch of the same kernel, ``CLEAN``, walks again with such numbers taken out, and ends at once
everywhere else: a row that sees one of a key has an LSE of NaN already, and one of dO reaches the keys it sees. In one kernel
both walks would share registers: the one that hardly ever runs would make the other spill 2 KB of them (sm_90a, Triton 3.7).
"""

from __future__ import annotations

import triton
import triton.language as tl

from torchhal.portable.attention_kernels import list_walk, packed_sequence, span
from torchhal.portable.backward_steps import head_walk, query_walk, row_numbers


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    out, above, lse_above, lse, delta, o_strides, a_strides, la_strides, l_strides, rows,
    BLOCK: tl.constexpr, EV: tl.constexpr, EV_PAD: tl.constexpr, FROM_LSE: tl.constexpr,
):  # fmt: skip
    """Delta of rows, (B, H, L) as the strides have it: a program for ``BLOCK`` rows of a head."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    h = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    ev = tl.arange(0, EV_PAD)[None, :].to(tl.int64)
    ok = i < rows
    at = b * l_strides[0] + h * l_strides[1] + i * l_strides[2]
    sees = ok & (tl.load(lse + at, mask=ok, other=float("-inf")) != float("-inf"))
    there = sees[:, None] & (ev < EV)
    o = tl.load(out + b * o_strides[0] + h * o_strides[1] + i[:, None] * o_strides[2] + ev * o_strides[3],
                mask=there, other=0.0)  # fmt: skip
    a = tl.load(above + b * a_strides[0] + h * a_strides[1] + i[:, None] * a_strides[2] + ev * a_strides[3],
                mask=there, other=0.0)  # fmt: skip
    sums = tl.sum(o.to(tl.float32) * a.to(tl.float32), 1)
    if FROM_LSE:
        sums -= tl.load(
            lse_above + b * la_strides[0] + h * la_strides[1] + i * la_strides[2], mask=sees, other=0.0
        )
    tl.store(delta + at, sums, mask=ok)


@triton.jit(do_not_specialize=["heads", "rows", "tiles"])
def strange_kernel(
    gradient, strides, strange, heads, rows, tiles,
    BLOCK: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Whether a tile of a gradient in the dense layout, (B, H, L, E), holds a NaN or an infinity; or one looked at before did."""
    pid = tl.program_id(0)
    i = (pid % tiles * BLOCK + tl.arange(0, BLOCK))[:, None]
    h = (pid // tiles % heads).to(tl.int64)
    b = (pid // tiles // heads).to(tl.int64)
    e = tl.arange(0, E_PAD)[None, :]
    at = b * strides[0] + h * strides[1] + i.to(tl.int64) * strides[2] + e.to(tl.int64) * strides[3]
    there = tl.load(gradient + at, mask=(i < rows) & (e < E), other=0.0).to(tl.float32)
    found = tl.max((~(tl.abs(there) < float("inf"))).to(tl.int32))
    if not FIRST:
        found = tl.maximum(found, tl.load(strange + pid))
    tl.store(strange + pid, found)


# ---------------------------------------------------------------------------- gradients of query rows


@triton.jit(do_not_specialize=["batch", "heads", "group", "rows", "keys", "tiles"])
def query_gradient_kernel(
    query, key, value, above, lse, delta, strange, gradient,
    q_strides, k_strides, v_strides, a_strides, l_strides, g_strides,
    mask, score_captured, mask_captured, partial, full, block_sizes, sequences, dropout,
    batch, heads, group, rows, keys, tiles, scale, extra,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, E_PAD: tl.constexpr, EV_PAD: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr, FULL: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, score_mod: tl.constexpr,
    mask_mod: tl.constexpr, slope: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    EV: tl.constexpr, DROPOUT: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr, CLEAN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """DQ of one tile of query rows of one head."""
    config: tl.constexpr = (
        CAUSAL, MASK, score_mod, mask_mod, FOLD, False, 0, PRECISION, E, EV, DROPOUT, NATURAL,
    )  # fmt: skip
    pid = tl.program_id(0)
    if CLEAN:
        if tl.load(strange + pid) == 0:
            return
    tile = pid % tiles
    h = (pid // tiles) % heads
    b = pid // tiles // heads
    q_start = 0
    k_start = 0
    first = 0
    if LAYOUT == "varlen":
        starts_q, starts_k, total_q, total_k = sequences
        b, tile = packed_sequence(tile, starts_q, batch, BLOCK_M)
        q_start, rows = span(starts_q, b, total_q)
        k_start, keys = span(starts_k, b, total_k)
    if LAYOUT == "paged":
        keys = tl.minimum(tl.maximum(tl.load(sequences + b), 0), keys)
        first = keys - rows
    low = tile * BLOCK_M
    if BLOCKS:
        Q_BLOCK, K_BLOCK, tiles_of_block, parts, block_rows, columns = block_sizes
        block_row = tile // tiles_of_block
        low = block_row * Q_BLOCK + (tile % tiles_of_block) * BLOCK_M
    i = low + tl.arange(0, BLOCK_M)
    row_ok = i < rows
    if BLOCKS:
        row_ok = row_ok & (i < block_row * Q_BLOCK + Q_BLOCK)
    high = first + tl.minimum(low + BLOCK_M - 1, rows - 1)
    low = first + low
    place = (q_start + i).to(tl.int64)
    head = h.to(tl.int64)
    q_base = query + head * q_strides[1]
    a_base = above + head * a_strides[1]
    g_base = gradient + head * g_strides[1]
    k_base = key + (h // group).to(tl.int64) * k_strides[1]
    v_base = value + (h // group).to(tl.int64) * v_strides[1]
    at = head * l_strides[1] + place * l_strides[2]
    if LAYOUT != "varlen":
        sequence = b.to(tl.int64)
        q_base += sequence * q_strides[0]
        a_base += sequence * a_strides[0]
        g_base += sequence * g_strides[0]
        k_base += sequence * k_strides[0]
        v_base += sequence * v_strides[0]
        at += sequence * l_strides[0]
    lse_of, delta_of, blind = row_numbers(lse, delta, at, row_ok, NATURAL)
    lse_of, delta_of = lse_of[:, None], delta_of[:, None]
    e = tl.arange(0, E_PAD)[None, :].to(tl.int64)
    ev = tl.arange(0, EV_PAD)[None, :].to(tl.int64)
    sees = row_ok[:, None] & ~blind[:, None]
    q = tl.load(q_base + place[:, None] * q_strides[2] + e * q_strides[3], mask=sees & (e < E), other=0.0)
    a = tl.load(a_base + place[:, None] * a_strides[2] + ev * a_strides[3], mask=sees & (ev < EV), other=0.0)
    of_rows = (b, h, i[:, None], first + i[:, None], row_ok[:, None])
    source = (k_base, v_base, k_strides, v_strides, k_start)
    mods = (score_captured, mask_captured)
    if DROPOUT:
        dropout = (tl.load(dropout[0]), dropout[1])
    end = keys
    free = keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, high + 1), 0)
        free = tl.maximum(tl.minimum(keys, low + 1), 0)
    free = free // BLOCK_N
    last = tl.cdiv(end, BLOCK_N)
    walk = (key, 0, 1, 0, 0, end)
    walk_full = walk
    count = 0
    count_full = 0
    if BLOCKS:
        count, walk = list_walk(partial, b, h, block_row, block_rows, parts, K_BLOCK, columns, end)
        if FULL:
            count_full, walk_full = list_walk(full, b, h, block_row, block_rows, parts, K_BLOCK, columns, end)
    HAS_MASK_MOD: tl.constexpr = mask_mod is not None

    acc = tl.zeros((BLOCK_M, E_PAD), tl.float32)
    if BLOCKS:
        acc = query_walk(acc, q, a, lse_of, delta_of, 0, count, walk, source, of_rows, mods, mask, dropout, scale, extra,
                         BLOCK_N, True, True, HAS_MASK_MOD, CLEAN, slope, config)  # fmt: skip
        if FULL:
            acc = query_walk(acc, q, a, lse_of, delta_of, 0, count_full, walk_full, source, of_rows, mods, mask, dropout,
                             scale, extra, BLOCK_N, True, True, False, CLEAN, slope, config)  # fmt: skip
    else:
        acc = query_walk(acc, q, a, lse_of, delta_of, 0, free, walk, source, of_rows, mods, mask, dropout, scale, extra,
                         BLOCK_N, False, False, HAS_MASK_MOD, CLEAN, slope, config)  # fmt: skip
        acc = query_walk(acc, q, a, lse_of, delta_of, free, last, walk, source, of_rows, mods, mask, dropout, scale, extra,
                         BLOCK_N, False, True, HAS_MASK_MOD, CLEAN, slope, config)  # fmt: skip
    if EXACT and not CLEAN:
        tl.store(
            strange + tl.program_id(0), tl.max((row_ok[:, None] & ~(tl.abs(acc) < float("inf"))).to(tl.int32))
        )
    places = g_base + place[:, None] * g_strides[2] + e * g_strides[3]
    tl.store(places, (acc * scale).to(gradient.dtype.element_ty), mask=row_ok[:, None] & (e < E))


# ---------------------------------------------------------------------------- gradients of keys and values


@triton.jit(do_not_specialize=["batch", "heads", "group", "rows", "keys", "tiles"])
def key_gradient_kernel(
    query, key, value, above, lse, delta, strange, k_gradient, v_gradient,
    q_strides, k_strides, v_strides, a_strides, l_strides, kg_strides, vg_strides,
    mask, score_captured, mask_captured, partial, full, block_sizes, sequences, dropout,
    batch, heads, group, rows, keys, tiles, scale, extra,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, E_PAD: tl.constexpr, EV_PAD: tl.constexpr, LAYOUT: tl.constexpr,
    BLOCKS: tl.constexpr, FULL: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, score_mod: tl.constexpr,
    mask_mod: tl.constexpr, slope: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr, E: tl.constexpr,
    EV: tl.constexpr, DROPOUT: tl.constexpr, NATURAL: tl.constexpr, EXACT: tl.constexpr, CLEAN: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """DK and dV of one tile of keys of one key head, added over its query heads in their order. ``heads`` are key heads."""
    config: tl.constexpr = (
        CAUSAL, MASK, score_mod, mask_mod, FOLD, False, 0, PRECISION, E, EV, DROPOUT, NATURAL,
    )  # fmt: skip
    pid = tl.program_id(0)
    if CLEAN:
        if tl.load(strange + pid) == 0:
            return
    tile = pid % tiles
    kv_head = (pid // tiles) % heads
    b = pid // tiles // heads
    q_start = 0
    k_start = 0
    first = 0
    room = keys
    if LAYOUT == "varlen":
        starts_q, starts_k, total_q, total_k = sequences
        b, tile = packed_sequence(tile, starts_k, batch, BLOCK_N)
        q_start, rows = span(starts_q, b, total_q)
        k_start, keys = span(starts_k, b, total_k)
        room = keys
    if LAYOUT == "paged":
        keys = tl.minimum(tl.maximum(tl.load(sequences + b), 0), room)
        first = keys - rows
    start = tile * BLOCK_N
    block_column = 0
    edge = room
    if BLOCKS:
        _Q_BLOCK, K_BLOCK, tiles_of_block, _parts, _block_rows, _columns = block_sizes
        block_column = tile // tiles_of_block
        start = block_column * K_BLOCK + (tile % tiles_of_block) * BLOCK_N
        edge = tl.minimum(room, block_column * K_BLOCK + K_BLOCK)
    n = (start + tl.arange(0, BLOCK_N))[:, None]
    at = (k_start + n).to(tl.int64)
    stored = n < edge
    there = n < tl.minimum(edge, keys)
    head = kv_head.to(tl.int64)
    k_base = key + head * k_strides[1]
    v_base = value + head * v_strides[1]
    kg_base = k_gradient + head * kg_strides[1]
    vg_base = v_gradient + head * vg_strides[1]
    q_base = query
    a_base = above
    l_base = lse
    d_base = delta
    if LAYOUT != "varlen":
        sequence = b.to(tl.int64)
        k_base += sequence * k_strides[0]
        v_base += sequence * v_strides[0]
        kg_base += sequence * kg_strides[0]
        vg_base += sequence * vg_strides[0]
        q_base += sequence * q_strides[0]
        a_base += sequence * a_strides[0]
        l_base += sequence * l_strides[0]
        d_base += sequence * l_strides[0]
    e = tl.arange(0, E_PAD)[None, :].to(tl.int64)
    ev = tl.arange(0, EV_PAD)[None, :].to(tl.int64)
    k = tl.load(k_base + at * k_strides[2] + e * k_strides[3], mask=there & (e < E), other=0.0)
    v = tl.load(v_base + at * v_strides[2] + ev * v_strides[3], mask=there & (ev < EV), other=0.0)
    mods = (score_captured, mask_captured)
    if DROPOUT:
        dropout = (tl.load(dropout[0]), dropout[1])
    lists = (partial, full, block_sizes, block_column)
    place = (q_start, first, rows, keys)

    dk = tl.zeros((BLOCK_N, E_PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, EV_PAD), tl.float32)
    taken = tl.zeros((BLOCK_N, EV_PAD), tl.float32)
    for member in range(group):
        h = kv_head * group + member
        wide = h.to(tl.int64)
        source = (q_base + wide * q_strides[1], a_base + wide * a_strides[1], q_strides, a_strides, l_strides)
        numbers = (l_base + wide * l_strides[1], d_base + wide * l_strides[1])
        dk, dv, taken = head_walk(
            (dk, dv, taken), k, v, n, start, source, (b, h), numbers, place, mods, mask, lists, dropout, scale,
            extra, BLOCK_M, BLOCK_N, BLOCKS, FULL, not EVEN, CLEAN, slope, config,
        )  # fmt: skip
    if CLEAN:
        dv = tl.where(taken > 0, float("nan"), dv)
    elif EXACT:
        of_keys = tl.max((there & ~(tl.abs(dk) < float("inf"))).to(tl.int32))
        of_values = tl.max((there & ~(tl.abs(dv) < float("inf"))).to(tl.int32))
        tl.store(strange + tl.program_id(0), tl.maximum(of_keys, of_values))
    dk = tl.where(there, dk * scale, 0.0)
    dv = tl.where(there, dv, 0.0)
    tl.store(
        kg_base + at * kg_strides[2] + e * kg_strides[3],
        dk.to(k_gradient.dtype.element_ty),
        mask=stored & (e < E),
    )
    tl.store(
        vg_base + at * vg_strides[2] + ev * vg_strides[3],
        dv.to(v_gradient.dtype.element_ty),
        mask=stored & (ev < EV),
    )
