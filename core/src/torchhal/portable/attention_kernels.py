"""The Triton kernels of attention; :mod:`torchhal.portable.attention` launches them.

One program computes a tile of query rows against the keys they may see, tile by tile, with the softmax of what has
been seen so far (Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867; Dao et al.,
"FlashAttention", arXiv:2205.14135). Logits of 16-bit inputs are kept in base 2 from the score on, since that is what
hardware exponentiates. Three ideas make one kernel serve every problem:

- **the walk**: keys are visited as tiles ``first .. last`` of a walk, either along the sequence or along a list of a
  BlockMask; a walk is bounded where a tile may hold keys that are to be hidden by position, and free of such tests elsewhere;
- **rows**: in decoding, the query heads that share a key head are rows of one tile, so that keys are read once for all
  of them, and the keys may be split over programs, whose partial results :func:`merge_kernel` adds in a fixed order;
- **the exact walk**: a weight of 0 does not hide a NaN or an infinity in a value. A tile whose result is not finite is
  computed again with such values taken out, and added for exactly those rows that see them.

Hidden pairs have a logit of -inf and no other mark.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from torchhal.portable.attention_steps import exact_scan, power, scan

LN2 = tl.constexpr(0.6931471805599453)
CHUNK = tl.constexpr(16)
"""Columns of the values that the exact walk computes at a time: its sums must not take registers from the fast one."""


# ---------------------------------------------------------------------------- where a program is


@triton.jit
def packed_sequence(tile, starts, batch, BLOCK_M: tl.constexpr):
    """The sequence that the tile belongs to in a packed batch, and the tile's number in it.

    Sequence b owns the tiles from ``starts[b] // BLOCK_M + b`` on: as many as it needs or one more, which no program
    has to count through all sequences to find.
    """
    low = 0
    high = batch
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_M + middle <= tile:
            low = middle
        else:
            high = middle
    return low, tile - (tl.load(starts + low) // BLOCK_M + low)


@triton.jit
def span(starts, b, total):
    """Start and length of sequence b of a packed batch, inside the tensor whatever the numbers are."""
    start = tl.minimum(tl.maximum(tl.load(starts + b), 0), total)
    end = tl.minimum(tl.maximum(tl.load(starts + b + 1), start), total)
    return start, end - start


@triton.jit
def floordiv(a, b):
    """Rounded toward minus infinity."""
    return tl.where(a < 0, -((b - 1 - a) // b), a // b)


@triton.jit
def list_walk(listed, b, h, row, rows, parts, width, columns, end):
    """Steps of the walk along one row of a BlockMask's list, and the walk; no step where the BlockMask has no such row."""
    counts_b, counts_h, counts_l, counts, b_step, h_step, l_step, step, indices = listed
    exists = (row >= 0) & (row < rows)
    row = tl.where(exists, row, 0)
    count = tl.load(
        counts + b.to(tl.int64) * counts_b + h.to(tl.int64) * counts_h + row.to(tl.int64) * counts_l
    )
    start = indices + b.to(tl.int64) * b_step + h.to(tl.int64) * h_step + row.to(tl.int64) * l_step
    steps = tl.where(exists, tl.minimum(count, columns) * parts, 0)
    return steps, (start, step, parts, width, columns, end)


# ---------------------------------------------------------------------------- programs


@triton.jit
def store(result, results, rows_out, row_ok, ev, total, extra, EV: tl.constexpr, SPLIT: tl.constexpr):
    """Columns ``ev`` of the result: divided by the total, or as they are for :func:`merge_kernel`."""
    out, stride = results
    if not SPLIT:
        result = result / tl.where(total == 0, 1.0, total)[:, None] * extra
    tl.store(
        out + rows_out + ev.to(tl.int64) * stride, result.to(out.dtype.element_ty), mask=row_ok & (ev < EV)
    )


@triton.jit(do_not_specialize=["rows_in_all", "batch", "heads", "group", "rows", "keys", "tiles", "splits"])
def attention_kernel(
    query, key, value, k_tiles, v_tiles, out, lse, parts_out, rows_in_all,
    q_strides, k_strides, v_strides, o_strides, lse_strides,
    mask, score_captured, mask_captured, partial, full, block_sizes, sequences, dropout,
    batch, heads, group, rows, keys, tiles, splits, scale, extra,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, E_PAD: tl.constexpr, EV_PAD: tl.constexpr,
    LAYOUT: tl.constexpr, PAGE: tl.constexpr, PACKED: tl.constexpr, SPLIT: tl.constexpr, BLOCKS: tl.constexpr, FULL: tl.constexpr,
    EVEN: tl.constexpr, LSE: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr,
    score_mod: tl.constexpr, mask_mod: tl.constexpr, FOLD: tl.constexpr, PRECISION: tl.constexpr,
    E: tl.constexpr, EV: tl.constexpr, DROPOUT: tl.constexpr, NATURAL: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    """One tile of query rows. ``heads`` counts what has tiles of its own: query heads, or key heads of packed rows.

    With ``WRITTEN`` the result is there already, and only a tile that is not finite is computed.
    """
    PAGED: tl.constexpr = PAGE > 0
    config: tl.constexpr = (
        CAUSAL, MASK, score_mod, mask_mod, FOLD, BLOCKS and PAGED, PAGE, PRECISION, E, EV, DROPOUT, NATURAL,
    )  # fmt: skip
    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % splits
        pid = pid // splits
    tile = pid % tiles
    head = (pid // tiles) % heads
    b = pid // tiles // heads
    q_start = 0
    first = 0
    place = (0,)
    if LAYOUT == "dense":
        if CAUSAL:
            tile = tiles - 1 - tile  # the longest first
    if LAYOUT == "varlen":
        starts_q, starts_k, total_q, total_k = sequences
        b, tile = packed_sequence(tile, starts_q, batch, BLOCK_M)
        q_start, rows = span(starts_q, b, total_q)
        k_start, keys = span(starts_k, b, total_k)
        place = (k_start,)
    if PAGED:
        table, table_b, table_p, lengths, pages, room = sequences
        keys = tl.minimum(tl.maximum(tl.load(lengths + b), 0), room)
        first = keys - rows
        place = (table + b.to(tl.int64) * table_b, table_p, pages)

    # Rows: r of the tile, i of the query, q its position.
    if BLOCKS:
        Q_BLOCK, K_BLOCK, tiles_of_block, parts, block_rows, columns = block_sizes
        block_row = tile // tiles_of_block
        if PAGED:
            block_row += floordiv(first, Q_BLOCK)
        low = block_row * Q_BLOCK + (tile % tiles_of_block) * BLOCK_M
        q = low + tl.arange(0, BLOCK_M)
        i = q - first
        row_ok = (i >= 0) & (i < rows) & (q < block_row * Q_BLOCK + Q_BLOCK)
        h = head
        high = low + BLOCK_M - 1
    else:
        r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        i = r
        h = head
        low = tile * BLOCK_M
        high = low + BLOCK_M - 1
        if PACKED:
            i = r // group
            h = (head * group + r % group)[:, None]
            low = low // group
            high = high // group
        q = first + i
        row_ok = i < rows
        low = first + low
        high = first + tl.minimum(high, rows - 1)
    kv_head = head
    if not PACKED:
        kv_head = head // group
    i, q, row_ok = i[:, None], q[:, None], row_ok[:, None]
    place_of_rows = (b, h, i, q, row_ok)

    ev = tl.arange(0, EV_PAD)[None, :]
    if not SPLIT:
        rows_out = h.to(tl.int64) * o_strides[1] + (q_start + i).to(tl.int64) * o_strides[2]
        if LAYOUT != "varlen":
            rows_out += b.to(tl.int64) * o_strides[0]
    if WRITTEN:
        there = tl.load(out + rows_out + ev.to(tl.int64) * o_strides[3], mask=row_ok & (ev < EV), other=0.0)
        if tl.max((~(tl.abs(there.to(tl.float32)) < float("inf"))).to(tl.int32)) == 0:
            return

    # Query, and where keys and values of this head start.
    e = tl.arange(0, E_PAD)[None, :]
    q_base = query + h.to(tl.int64) * q_strides[1] + (q_start + i).to(tl.int64) * q_strides[2]
    if LAYOUT != "varlen":
        q_base += b.to(tl.int64) * q_strides[0]
    q_tile = tl.load(q_base + e.to(tl.int64) * q_strides[3], mask=row_ok & (e < E), other=0.0)
    k_base = key + kv_head.to(tl.int64) * k_strides[1]
    v_base = value + kv_head.to(tl.int64) * v_strides[1]
    if LAYOUT == "dense":
        k_base += b.to(tl.int64) * k_strides[0]
        v_base += b.to(tl.int64) * v_strides[0]
    source = (k_base, v_base, k_strides, v_strides, place)
    mods = (score_captured, mask_captured)
    if DROPOUT:
        dropout = (tl.load(dropout[0]), dropout[1])

    # The walk along the sequence: free up to ``free`` steps, bounded to ``last``.
    end = keys
    if CAUSAL:
        end = tl.maximum(tl.minimum(keys, high + 1), 0)
    free = end
    if CAUSAL:
        free = tl.maximum(tl.minimum(keys, low + 1), 0)
    begin = 0
    free = free // BLOCK_N
    last = tl.cdiv(end, BLOCK_N)
    if SPLIT:
        share = tl.cdiv(last, splits)
        begin = split * share
        last = tl.minimum(last, begin + share)
        free = tl.maximum(tl.minimum(free, last), begin)
    walk = (key, 0, 1, 0, 0, end)
    walk_full = walk
    count = 0
    count_full = 0
    if BLOCKS:
        count, walk = list_walk(partial, b, h, block_row, block_rows, parts, K_BLOCK, columns, end)
        if FULL:
            count_full, walk_full = list_walk(full, b, h, block_row, block_rows, parts, K_BLOCK, columns, end)
    HAS_MASK_MOD: tl.constexpr = mask_mod is not None
    BOUNDED: tl.constexpr = CAUSAL or not EVEN

    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, EV_PAD), tl.float32)
    state = (acc, peak, total)
    if BLOCKS:
        state = scan(state, q_tile, 0, count, walk, source, k_tiles, v_tiles, kv_head, place_of_rows, mods, mask, dropout, scale,
                     BLOCK_N, True, BOUNDED, HAS_MASK_MOD, config)  # fmt: skip
        if FULL:
            state = scan(state, q_tile, 0, count_full, walk_full, source, k_tiles, v_tiles, kv_head, place_of_rows,
                         mods, mask, dropout, scale, BLOCK_N, True, BOUNDED, False, config)  # fmt: skip
    else:
        state = scan(state, q_tile, begin, free, walk, source, k_tiles, v_tiles, kv_head, place_of_rows, mods, mask, dropout, scale,
                     BLOCK_N, False, False, HAS_MASK_MOD, config)  # fmt: skip
        state = scan(state, q_tile, free, last, walk, source, k_tiles, v_tiles, kv_head, place_of_rows, mods, mask, dropout, scale,
                     BLOCK_N, False, True, HAS_MASK_MOD, config)  # fmt: skip
    acc, peak, total = state

    # Results: of the call, or of this part of the keys.
    row_number = (b.to(tl.int64) * (heads * group if PACKED else heads) + h) * rows + i
    if SPLIT:
        rows_out = (split.to(tl.int64) * rows_in_all + row_number) * EV
        results = (parts_out, 1)
    else:
        results = (out, o_strides[3])
    if SPLIT:
        totals = parts_out + splits.to(tl.int64) * rows_in_all * EV
        at = (split.to(tl.int64) * rows_in_all + row_number) * 2
        tl.store(totals + at, peak[:, None], mask=row_ok)
        tl.store(totals + at + 1, total[:, None], mask=row_ok)
    elif LSE:
        at = h.to(tl.int64) * lse_strides[1] + (q_start + i).to(tl.int64) * lse_strides[2]
        if LAYOUT != "varlen":
            at += b.to(tl.int64) * lse_strides[0]
        tl.store(lse + at, log_sum(peak, total, NATURAL)[:, None], mask=row_ok)

    if EXACT:
        strange = row_ok & (ev < EV) & ~(tl.abs(acc) < float("inf"))
        if tl.max(strange.to(tl.int32)) == 0:
            store(acc, results, rows_out, row_ok, ev, total, extra, EV, SPLIT)
        else:
            for column in tl.range(0, EV_PAD, CHUNK, num_stages=1):
                some = column + tl.arange(0, CHUNK)[None, :]
                zero = tl.zeros((BLOCK_M, CHUNK), tl.float32)
                exact = (
                    zero,
                    tl.full((BLOCK_M,), float("-inf"), tl.float32),
                    tl.zeros((BLOCK_M,), tl.float32),
                    zero,
                    zero,
                )
                if BLOCKS:
                    exact = exact_scan(exact, q_tile, 0, count, walk, source, place_of_rows, mods, mask, dropout, scale,
                                       some, BLOCK_N, True, HAS_MASK_MOD, config)  # fmt: skip
                    if FULL:
                        exact = exact_scan(exact, q_tile, 0, count_full, walk_full, source, place_of_rows, mods, mask,
                                           dropout, scale, some, BLOCK_N, True, False, config)  # fmt: skip
                else:
                    exact = exact_scan(exact, q_tile, begin, last, walk, source, place_of_rows, mods, mask, dropout, scale,
                                       some, BLOCK_N, False, HAS_MASK_MOD, config)  # fmt: skip
                result, _peak, exact_total, above, below = exact
                result += tl.where(above > 0, float("inf"), 0.0)
                result += tl.where(below > 0, float("-inf"), 0.0)
                store(result, results, rows_out, row_ok, some, exact_total, extra, EV, SPLIT)
    else:
        store(acc, results, rows_out, row_ok, ev, total, extra, EV, SPLIT)


@triton.jit
def log_sum(peak, total, NATURAL: tl.constexpr):
    """Natural logarithm of the sum of exponentials, from a peak and the total over it; -inf over nothing."""
    safe = tl.where(total == 0, 1.0, total)
    if NATURAL:
        found = peak + libdevice.log(safe)
    else:
        found = (peak + tl.log2(safe)) * LN2
    return tl.where(total == 0, float("-inf"), found)


@triton.jit(do_not_specialize=["heads", "rows", "splits", "rows_in_all"])
def merge_kernel(
    parts, out, lse, o_strides, lse_strides, heads, rows, splits, rows_in_all, extra,
    EV: tl.constexpr, EV_PAD: tl.constexpr, SPLITS: tl.constexpr, LSE: tl.constexpr, NATURAL: tl.constexpr,
):  # fmt: skip
    """One row's result out of its partial ones, always added in the same order."""
    row = tl.program_id(0).to(tl.int64)
    i = row % rows
    h = row // rows % heads
    b = row // rows // heads
    split = tl.arange(0, SPLITS)
    ev = tl.arange(0, EV_PAD)
    ok = split < splits
    totals = parts + splits.to(tl.int64) * rows_in_all * EV + (split * rows_in_all + row) * 2
    peaks = tl.load(totals, mask=ok, other=float("-inf"))
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    shares = power(peaks - base, NATURAL)
    total = tl.sum(tl.load(totals + 1, mask=ok, other=0.0) * shares, 0)
    places = parts + (split[:, None] * rows_in_all + row) * EV + ev[None, :]
    used = ok & (peaks != float("-inf"))
    sums = tl.load(places, mask=used[:, None] & (ev < EV)[None, :], other=0.0)
    weighed = tl.where(
        tl.abs(sums) == float("inf"), sums, sums * shares[:, None]
    )  # a share may have become 0
    result = tl.sum(weighed, 0) / tl.where(total == 0, 1.0, total) * extra
    at = out + b * o_strides[0] + h * o_strides[1] + i * o_strides[2] + ev.to(tl.int64) * o_strides[3]
    tl.store(at, result.to(out.dtype.element_ty), mask=ev < EV)
    if LSE:
        tl.store(
            lse + b * lse_strides[0] + h * lse_strides[1] + i * lse_strides[2], log_sum(peak, total, NATURAL)
        )
