"""Short ways to make, fill and read a PagedKVCache, for its tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_calls import NAN, normal
from torch import Tensor

import torchhal

HEADS, E, EV = 2, 8, 4


def cache(pages: int = 8, page_size: int = 4, **options: Any) -> torchhal.PagedKVCache:
    """A cache whose slots hold NaN until they are written."""
    made = torchhal.PagedKVCache(pages, page_size, HEADS, E, EV, **options)
    spoil(made, list(range(pages)))
    return made


def spoil(held: torchhal.PagedKVCache, pages: list[int]) -> None:
    """Put NaN into pages, and into their scales if they have any; int8, which has no NaN, is left as it is."""
    for pool in (held.key_pages, held.value_pages, held.key_scale, held.value_scale):
        if pool is not None and pool.dim() > 1 and pool.dtype is not torch.int8:
            pool[pages] = NAN


def tokens(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of ``length`` tokens for each of ``batch`` sequences."""
    keys = normal(batch, HEADS, length, E, dtype=torch.float32, seed=2 * seed)
    return keys, normal(batch, HEADS, length, EV, dtype=torch.float32, seed=2 * seed + 1)


def packed(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of shape (1, Hkv, L, E) one after the other, as (T, Hkv, E), and their cumulative lengths."""
    counts = torch.tensor([0] + [k.shape[2] for k, _ in parts])
    keys, values = (torch.cat([p[i][0].transpose(0, 1) for p in parts]) for i in (0, 1))
    return keys, values, counts.cumsum(0).to(torch.int32)


def contents(held: torchhal.PagedKVCache, sequence: int) -> tuple[Tensor, Tensor]:
    """Keys (1, Hkv, S, E) and values of a sequence, read page by page through its page table."""
    pages, length = pages_of(held, sequence), int(held.seq_lens([sequence]))
    pools = ((held.key_pages, held.key_scale), (held.value_pages, held.value_scale))
    keys, values = (
        torch.cat([pool[:0].transpose(0, 1).flatten(1, 2), *(pool[page] for page in pages)], dim=1)[
            None, :, :length
        ]
        for pool in (dequantized(*each) for each in pools)
    )
    return keys, values


def dequantized(pool: Tensor, scale: Tensor | None) -> Tensor:
    """What a pool's stored numbers stand for, in float32; the pool itself where nothing is quantised."""
    if scale is None:
        return pool
    return pool.float() * (scale[:, None, None] if scale.dim() == 1 else scale[..., None])


def pages_of(held: torchhal.PagedKVCache, sequence: int) -> list[int]:
    """The pages that a sequence holds, in order."""
    length = int(held.seq_lens([sequence]))
    return held.page_table([sequence])[0, : -(-length // held.page_size)].tolist()  # type: ignore[no-any-return]


def state(held: torchhal.PagedKVCache) -> Any:
    """All that can be seen of a cache, to be compared before and after a call that fails."""
    seen = [(s, pages_of(held, s), [t.tolist() for t in contents(held, s)]) for s in held.sequences]
    return held.free_pages, held.used_pages, seen


class Broken(Tensor):
    """A pool whose write number ``fails`` raises, as one does that finds no memory."""

    fails: int

    def __setitem__(self, index: Any, value: Any) -> None:
        self.fails -= 1
        if self.fails < 0:
            raise MemoryError
        with torch._C.DisableTorchFunctionSubclass():
            super().__setitem__(index, value)


def assert_append_breaks_off(
    held: torchhal.PagedKVCache, sequences: list[int], pool: str, fails: int
) -> None:
    """An append of a token to each of two sequences, in which a write to ``pool`` finds no memory, changes nothing."""
    before, sound = state(held), getattr(held, pool)
    broken = sound.as_subclass(Broken)
    broken.fails = fails
    setattr(held, pool, broken)
    with pytest.raises(MemoryError):
        held.append(sequences, *tokens(2, 1, 1))
    setattr(held, pool, sound)
    assert state(held) == before
