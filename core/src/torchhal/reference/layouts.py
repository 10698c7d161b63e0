"""Cuts the variable-length and paged layouts of attention into one dense piece for each sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from torchhal.errors import InvalidProblem
from torchhal.operands import AttentionOperands


@dataclass(frozen=True)
class Piece:
    """Dense attention over some sequences of a call; or the tensors of a whole call, in its own layout."""

    query: Tensor
    """(B, Hq, L, E)."""
    key: Tensor
    """(B, Hkv, S, E)."""
    value: Tensor
    """(B, Hkv, S, Ev)."""
    mask: Tensor | None
    """Broadcastable to (B, Hq, L, S)."""
    first_batch: int = 0
    """Number, in the whole call, of the piece's first sequence: where the mods' ``b`` starts."""
    first_query: int = 0
    """Position of the first query row in its sequence: where the mods' ``q_idx`` starts."""


def has_data(tensor: Tensor) -> bool:
    """Whether lengths and page numbers can be read, or only shapes are known (fake and meta tensors)."""
    return not (tensor.is_meta or is_fake(tensor))


def varlen_pieces(whole: Piece, operands: AttentionOperands) -> Iterator[Piece]:
    """One piece for each sequence of a packed call, whose tensors are (T, H, E) with cumulative lengths.

    Raises:
        InvalidProblem: the cumulative lengths are absent, differ in number, do not start at 0, decrease, or
            do not end at the number of tokens.
    """
    starts_q, starts_k = _both_offsets(whole.query, whole.key, operands)
    for b, (q, k) in enumerate(zip(_spans(starts_q), _spans(starts_k), strict=True)):
        mask = slice_mask(whole.mask, b, q.stop - q.start, k.stop - k.start)
        tensors = (_heads_first(whole.query[q]), _heads_first(whole.key[k]), _heads_first(whole.value[k]))
        yield Piece(*tensors, mask, first_batch=b)


def paged_pieces(whole: Piece, operands: AttentionOperands) -> Iterator[Piece]:
    """One piece for each sequence of a paged call, its used pages of (P, H, page_size, E) gathered in order and dequantised.

    The query rows are the newest tokens: row i stands at position ``seq_lens - L + i``. Slots and entries
    of the page table beyond ``seq_lens`` are never read.

    Raises:
        InvalidProblem: the page table or the lengths are absent or of the wrong shape, a length is negative
            or needs more pages than the table has, or a used entry names a page that does not exist.
    """
    table, lengths = _paged_operands(whole.query, operands)
    rows = whole.query.shape[2]
    for b, length in enumerate(lengths.tolist()):
        used = _used_pages(table, b, length, whole.key)
        halves = ((whole.key, operands.key_scale), (whole.value, operands.value_scale))
        keys, values = (_sequence(pages, scale, used, length, whole.query.dtype) for pages, scale in halves)
        mask = slice_mask(whole.mask, b, rows, length)
        yield Piece(whole.query[b : b + 1], keys, values, mask, first_batch=b, first_query=length - rows)


# ---------------------------------------------------------------------------- variable length


def _both_offsets(query: Tensor, key: Tensor, operands: AttentionOperands) -> tuple[list[int], list[int]]:
    if operands.cu_seqlens_q is None or operands.cu_seqlens_k is None:
        raise InvalidProblem(
            "variable-length attention needs cu_seqlens_q and cu_seqlens_k, and at least one is absent"
        )
    starts_q = _offsets("cu_seqlens_q", operands.cu_seqlens_q, query.shape[0])
    starts_k = _offsets("cu_seqlens_k", operands.cu_seqlens_k, key.shape[0])
    if len(starts_q) != len(starts_k):
        sequences = f"{len(starts_q) - 1} and {len(starts_k) - 1} sequences"
        raise InvalidProblem(f"cu_seqlens_q and cu_seqlens_k must have one length; got those of {sequences}")
    return starts_q, starts_k


def _offsets(name: str, offsets: Tensor, tokens: int) -> list[int]:
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        shape = tuple(offsets.shape)
        raise InvalidProblem(
            f"{name} must have shape (B + 1,), the running sum of B lengths; got shape {shape}"
        )
    starts: list[int] = offsets.tolist()
    if starts[0] != 0:
        raise InvalidProblem(f"{name} must start at 0; it starts at {starts[0]}")
    for b, (start, end) in enumerate(pairwise(starts)):
        if end < start:
            raise InvalidProblem(f"{name} must not decrease; sequence {b} goes from {start} to {end}")
    if starts[-1] != tokens:
        raise InvalidProblem(f"{name} must end at the number of tokens, {tokens}; it ends at {starts[-1]}")
    return starts


def _spans(starts: Sequence[int]) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(starts)]


def _heads_first(tokens: Tensor) -> Tensor:
    return tokens.transpose(0, 1).unsqueeze(0)


# ---------------------------------------------------------------------------- pages


def _paged_operands(query: Tensor, operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    if operands.page_table is None or operands.seq_lens is None:
        raise InvalidProblem("paged attention needs page_table and seq_lens, and at least one is absent")
    table, lengths = operands.page_table, operands.seq_lens
    batch = query.shape[0]
    if table.ndim != 2 or table.shape[0] != batch:
        expected = f"(B, max_pages) with B = {batch} as in query"
        raise InvalidProblem(f"page_table must have shape {expected}; got {tuple(table.shape)}")
    if tuple(lengths.shape) != (batch,):
        raise InvalidProblem(
            f"seq_lens must have shape (B,) with B = {batch} as in query; got {tuple(lengths.shape)}"
        )
    return table, lengths


def _used_pages(table: Tensor, b: int, length: int, pages: Tensor) -> Tensor:
    count, page_size, columns = pages.shape[0], pages.shape[2], table.shape[1]
    if not 0 <= length <= columns * page_size:
        room = f"{columns} pages of {page_size} hold 0 to {columns * page_size} keys"
        raise InvalidProblem(f"seq_lens[{b}] is {length}; page_table's {room}")
    used = table[b, : -(-length // max(page_size, 1))]
    for position, page in enumerate(used.tolist()):
        if not 0 <= page < count:
            where = f"page_table[{b}, {position}] is {page}"
            why = f"seq_lens[{b}] = {length} uses it"
            raise InvalidProblem(f"{where} and {why}; the cache has {count} pages, numbered from 0")
    return used


def _sequence(
    pages: Tensor, scale: Tensor | None, used: Tensor, length: int, query_dtype: torch.dtype
) -> Tensor:
    """(1, H, length, E), dequantised where there is a scale: in float32, or in float64 if the query is that."""
    stored = _gather(pages, used, length)
    if scale is None:
        return stored
    per_token = scale.dim() == 3
    factors = _gather(scale.unsqueeze(-1), used, length) if per_token else scale.view(1, -1, 1, 1)
    dtype = torch.promote_types(query_dtype, torch.float32)
    return stored.to(dtype) * factors.to(dtype)


def _gather(pages: Tensor, used: Tensor, length: int) -> Tensor:
    """(1, H, length, E) from pages (P, H, page_size, E)."""
    chosen = pages.index_select(0, used.to(torch.int64)).transpose(0, 1)
    return chosen.flatten(1, 2)[:, :length].unsqueeze(0)


# ---------------------------------------------------------------------------- masks


def slice_mask(mask: Tensor | None, b: int, rows: int, columns: int) -> Tensor | None:
    """The part of a call's ``attn_mask`` that sequence ``b`` sees; dimensions of size 1 broadcast.

    Raises:
        InvalidProblem: the mask is too small for the sequence.
    """
    if mask is None:
        return None
    cut = mask[(None,) * (4 - mask.ndim)]
    for dim, (name, start, size) in {0: ("B", b, 1), 2: ("L", 0, rows), 3: ("S", 0, columns)}.items():
        if cut.shape[dim] == 1:
            continue
        if cut.shape[dim] < start + size:
            place = f"sequence {b} needs {start + size} along {name} and it has {tuple(mask.shape)}"
            raise InvalidProblem(f"attn_mask must broadcast to (B, Hq, L, S); {place}")
        cut = cut.narrow(dim, start, size)
    return cut
