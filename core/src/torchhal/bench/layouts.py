"""Cases whose sequences are packed or paged: documents of unequal lengths, and decoding from pages."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Final, NamedTuple, Self

import torch
from torch import Tensor

from torchhal._memory import large
from torchhal._quantize import check_scale, quantized
from torchhal._text import dtype_name
from torchhal.attention_call import Call, Functions, MaskMod, operands_of
from torchhal.bench import accuracy, candidates
from torchhal.bench.accuracy import Expectation
from torchhal.bench.candidates import SDPA_GATHERED, SDPA_PADDED, Bound, Candidate, Own, block_mask
from torchhal.bench.cases import Case, Inputs
from torchhal.bench.dense import block_mask_call, plain_call

LENGTHS: Final = (2048, 704, 448, 320, 256, 160, 96, 64)
"""Rows of each document: the mean is a quarter of the longest."""


@dataclass(frozen=True)
class Documents(Case):
    """Causal attention within packed documents, held against the documents padded to the longest.

    The result of every candidate is judged packed, as (1, H, T, E).
    """

    kind: ClassVar[str] = "documents"
    baseline: ClassVar[str] = SDPA_PADDED

    lengths: tuple[int, ...] = LENGTHS
    causal: bool = True

    def __post_init__(self) -> None:
        # What the other cases call length and keys is all rows here, in one batch.
        object.__setattr__(self, "length", sum(self.lengths))
        object.__setattr__(self, "keys", self.length)

    @property
    def pairs(self) -> int:
        return sum(n * (n + 1) // 2 if self.causal else n * n for n in self.lengths)

    @property
    def scores(self) -> int:
        return self.heads * max(self.lengths) ** 2

    @property
    def shape(self) -> dict[str, int]:
        return {**super().shape, "documents": len(self.lengths), "longest": max(self.lengths)}

    def quick(self) -> Self:
        return replace(super().quick(), lengths=tuple(max(1, n // 8) for n in self.lengths))

    def document_mod(self, device: torch.device) -> MaskMod:
        """The ``mask_mod`` over packed rows: the same document, and with :attr:`causal` no later key."""
        counts = torch.tensor(self.lengths, device=device)
        document = torch.repeat_interleave(torch.arange(len(self.lengths), device=device), counts).int()

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = document[q] == document[k]
            return same & (q >= k) if self.causal else same

        return seen

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        packed = self.inputs(device, seed)
        mod = self.document_mod(device)
        blocks = Own(block_mask_call(packed, mod), label="block mask")
        return Bound(
            (Own(self._varlen(packed), _heads_first), blocks),
            functools.partial(self._peers, packed, mod),
            lambda: accuracy.expectation(packed, False, mask_mod=mod),
        )

    def _varlen(self, packed: Inputs) -> Call:
        query, key, value = (t.squeeze(0).transpose(0, 1).contiguous() for t in packed[:3])
        ends = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=query.device)
        operands = operands_of(Functions(), None, 0.0, query, cu_seqlens_q=ends, cu_seqlens_k=ends)
        return Call(
            query,
            key,
            value,
            layout="varlen",
            operands=operands,
            is_causal=self.causal,
            enable_gqa=self.grouped,
        )

    def _peers(self, packed: Inputs, mod: MaskMod, flex: bool) -> list[Candidate]:
        padded = Inputs(*(self.padded(t) for t in packed[:3]))
        # Padding comes last, so causality hides it by itself; without, a mask has to.
        mask = None if self.causal else self._kept(packed.query.device)[:, None, None, :]
        call = candidates.sdpa(padded, mask, self.causal)
        peers = [Candidate(SDPA_PADDED, call, self.unpadded)]
        if flex:
            peers += candidates.flexes(packed, block_mask(mod, packed))
        return peers

    def _kept(self, device: torch.device) -> Tensor:
        """(documents, longest) bool: the rows that are no padding."""
        return torch.arange(max(self.lengths), device=device) < torch.tensor(
            self.lengths, device=device
        ).unsqueeze(1)

    def padded(self, packed: Tensor) -> Tensor:
        """(1, H, T, E) as (documents, H, longest, E), zeros behind each document."""
        _, heads, _, size = packed.shape
        made = packed.new_zeros((len(self.lengths), max(self.lengths), heads, size))
        made[self._kept(packed.device)] = packed.squeeze(0).transpose(0, 1)
        return made.transpose(1, 2).contiguous()

    def unpadded(self, result: Any) -> Tensor:
        """The inverse of :meth:`padded`."""
        rows: Tensor = result.transpose(1, 2)[self._kept(result.device)]
        return _heads_first(rows)

    def traits(self) -> str:
        return f"{super().traits()}, {len(self.lengths)} documents, longest {max(self.lengths)}"


def _heads_first(result: Any) -> Tensor:
    """(T, H, E) as (1, H, T, E)."""
    found: Tensor = result.transpose(0, 1).unsqueeze(0)
    return found


class _Pages(NamedTuple):
    """Keys and values in pages (P, Hkv, page_size, D), their table (B, pages) and lengths (B,), both int32.

    Quantised ones have scales, (P, Hkv, page_size) float32.
    """

    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None

    def quantized(self, stored: torch.dtype) -> _Pages:
        """The same tokens as a :class:`torchhal.PagedKVCache` stores them, with scales of their own."""
        key, key_scale = _stored(self.key, stored)
        value, value_scale = _stored(self.value, stored)
        return _Pages(key, value, self.table, self.lengths, key_scale, value_scale)

    def gathered(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values as (B, Hkv, S, D), dequantised if they have scales."""
        made = []
        for pages, scale in ((self.key, self.key_scale), (self.value, self.value_scale)):
            found = pages[self.table.long()]  # (B, pages, Hkv, page_size, D)
            if scale is not None:
                found = found.to(torch.float32) * scale[self.table.long()].unsqueeze(-1)
            found = found.transpose(1, 2).to(dtype)
            made.append(found.reshape(found.shape[0], found.shape[1], -1, found.shape[-1]))
        return made[0], made[1]


def _stored(pages: Tensor, stored: torch.dtype) -> tuple[Tensor, Tensor]:
    count, heads, page_size, _ = pages.shape
    slots = pages.new_empty((count, heads, page_size, 0), dtype=stored)
    rows = pages.transpose(1, 2).flatten(0, 1)
    written = quantized("tokens", rows, slots, check_scale("scale", None, slots))
    assert written.scale is not None

    def cut(tokens: Tensor) -> Tensor:
        return tokens.view(count, page_size, *tokens.shape[1:]).transpose(1, 2).contiguous()

    return cut(written.rows), cut(written.scale)


@dataclass(frozen=True)
class PagedDecode(Case):
    """One new token of each sequence against keys in shuffled pages, held against the same keys in one piece; and with
    :attr:`stored` against the same keys in pages that are not quantised.
    """

    kind: ClassVar[str] = "paged decode"
    baseline: ClassVar[str] = SDPA_GATHERED

    length: int = 1
    page_size: int = 16
    stored: torch.dtype | None = None
    """Type of quantised pages."""

    @property
    def bytes(self) -> float:
        table = 4 * self.batch * (self.keys // self.page_size + 1)
        if self.stored is None:
            return super().bytes + table
        rows = 2 * self.batch * self.heads * self.length * self.head_size * self.dtype.itemsize
        tokens = 2 * self.batch * self.kv_heads * self.keys
        return float(rows + tokens * (self.head_size * self.stored.itemsize + 4) + table)

    @property
    def shape(self) -> dict[str, int]:
        return {**super().shape, "page_size": self.page_size}

    def quick(self) -> Self:
        keys = max(self.page_size, self.keys // 8 // self.page_size * self.page_size)
        return replace(super().quick(), keys=keys)

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)
        pages = self.pages(inputs, seed)
        if self.stored is None:
            others = Own(plain_call(inputs), label="dense")
            return self._bound(inputs, pages, others, lambda: accuracy.expectation(inputs, False))
        plain = Own(
            self._call(inputs, pages),
            label="unquantised",
            expected=lambda: accuracy.expectation(inputs, False),
        )
        held = pages.quantized(self.stored)
        exact = Inputs(inputs.query, *held.gathered(torch.float32))
        return self._bound(inputs, held, plain, lambda: accuracy.expectation(exact, False))

    def _bound(
        self, inputs: Inputs, pages: _Pages, yardstick: Own, expected: Callable[[], Expectation]
    ) -> Bound:
        own = (Own(self._call(inputs, pages)), yardstick)
        return Bound(own, functools.partial(self._peers, inputs, pages), expected)

    def _call(self, inputs: Inputs, pages: _Pages) -> Call:
        operands = operands_of(
            Functions(),
            None,
            0.0,
            inputs.query,
            page_table=pages.table,
            seq_lens=pages.lengths,
            key_scale=pages.key_scale,
            value_scale=pages.value_scale,
        )
        return Call(
            inputs.query,
            pages.key,
            pages.value,
            layout="paged",
            operands=operands,
            enable_gqa=self.grouped,
        )

    def pages(self, inputs: Inputs, seed: int = 0) -> _Pages:
        """The keys and values of ``inputs`` cut into pages that lie in random order."""
        used = self.keys // self.page_size
        order = torch.randperm(self.batch * used, generator=torch.Generator().manual_seed(seed))
        device = inputs.query.device
        return _Pages(
            self._cut(inputs.key, order),
            self._cut(inputs.value, order),
            order.view(self.batch, used).to(device=device, dtype=torch.int32),
            torch.full((self.batch,), self.keys, dtype=torch.int32, device=device),
        )

    def _cut(self, dense: Tensor, order: Tensor) -> Tensor:
        shape = (self.batch, self.kv_heads, -1, self.page_size, self.head_size)
        cut = dense.reshape(shape).transpose(1, 2).flatten(0, 1)
        made = large(cut.shape, cut.dtype, cut.device)  # as PagedKVCache has them
        made[order.to(dense.device)] = cut
        return made

    def _peers(self, inputs: Inputs, pages: _Pages, flex: bool) -> list[Candidate]:
        def gather_and_attend() -> Any:
            return candidates.sdpa(Inputs(inputs.query, *pages.gathered(self.dtype)))()

        peers = [Candidate(SDPA_GATHERED, gather_and_attend)]
        if flex:
            peers += candidates.flexes(Inputs(inputs.query, *pages.gathered(self.dtype)))
        return peers

    def traits(self) -> str:
        kept = "" if self.stored is None else f" of {dtype_name(self.stored)}"
        return f"pages of {self.page_size}{kept}"
