"""Cases whose sequences are packed or paged: documents of unequal lengths, and decoding from pages."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, ClassVar, Final, NamedTuple, Self

import torch
from torch import Tensor

from torchhal.attention_call import Call, Functions, MaskMod, operands_of
from torchhal.bench import accuracy, candidates
from torchhal.bench.candidates import FLEX, SDPA_GATHERED, SDPA_PADDED, Bound, Candidate, Own, block_mask
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
            peers.append(Candidate(FLEX, candidates.flex(packed, block_mask(mod, packed))))
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
    """Keys and values in pages (P, Hkv, page_size, D), their table (B, pages) and lengths (B,), both int32."""

    key: Tensor
    value: Tensor
    table: Tensor
    lengths: Tensor

    def gathered(self) -> tuple[Tensor, Tensor]:
        """Keys and values as (B, Hkv, S, D)."""
        made = []
        for pages in (self.key, self.value):
            found = pages[self.table.long()]  # (B, pages, Hkv, page_size, D)
            made.append(found.transpose(1, 2).reshape(found.shape[0], found.shape[2], -1, found.shape[-1]))
        return made[0], made[1]


@dataclass(frozen=True)
class PagedDecode(Case):
    """One new token of each sequence against keys in shuffled pages, held against the same keys in one piece."""

    kind: ClassVar[str] = "paged decode"
    baseline: ClassVar[str] = SDPA_GATHERED

    length: int = 1
    page_size: int = 16

    @property
    def bytes(self) -> float:
        return super().bytes + 4 * self.batch * (self.keys // self.page_size + 1)

    @property
    def shape(self) -> dict[str, int]:
        return {**super().shape, "page_size": self.page_size}

    def quick(self) -> Self:
        keys = max(self.page_size, self.keys // 8 // self.page_size * self.page_size)
        return replace(super().quick(), keys=keys)

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)
        pages = self.pages(inputs, seed)
        operands = operands_of(
            Functions(), None, 0.0, inputs.query, page_table=pages.table, seq_lens=pages.lengths
        )
        call = Call(
            inputs.query,
            pages.key,
            pages.value,
            layout="paged",
            operands=operands,
            enable_gqa=self.grouped,
        )

        return Bound(
            (Own(call), Own(plain_call(inputs), label="dense")),
            functools.partial(self._peers, inputs, pages),
            lambda: accuracy.expectation(inputs, False),
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
        made = torch.empty_like(cut, memory_format=torch.contiguous_format)
        made[order.to(dense.device)] = cut
        return made

    def _peers(self, inputs: Inputs, pages: _Pages, flex: bool) -> list[Candidate]:
        def gather_and_attend() -> Any:
            return candidates.sdpa(Inputs(inputs.query, *pages.gathered()))()

        peers = [Candidate(SDPA_GATHERED, gather_and_attend)]
        if flex:
            peers.append(Candidate(FLEX, candidates.flex(inputs)))
        return peers

    def traits(self) -> str:
        return f"pages of {self.page_size}"
