"""Philox4x32-10, the generator of dropout, written from its paper and apart from the core's.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The pair (b, h, q, k) of a call draws
word ``k % 4`` of the block with counter ``(k // 4, q, h, b)`` and the seed's two words as key.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[np.uint64]


def kept(
    seed: int, shape: tuple[int, int, int, int], p: float, first_query: int = 0, first_batch: int = 0
) -> Tensor:
    """Which probabilities of a (B, Hq, L, S) matrix survive; boolean."""
    b, h, q, k = np.meshgrid(*(np.arange(n, dtype=np.uint64) for n in shape), indexing="ij")
    block = _block((k // np.uint64(4), q + np.uint64(first_query), h, b + np.uint64(first_batch)), seed)
    words = np.choose((k % np.uint64(4)).astype(np.int64), block) if k.size else k
    return torch.from_numpy(words >= np.uint64(round(p * 2**32)))


def _block(counter: tuple[Words, Words, Words, Words], seed: int) -> list[Words]:
    mask, one, two = np.uint64(0xFFFFFFFF), np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
    c0, c1, c2, c3 = counter
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = c0 * one, c2 * two
        c0, c1, c2, c3 = (
            (second >> np.uint64(32)) ^ c1 ^ np.uint64(low),
            second & mask,
            (first >> np.uint64(32)) ^ c3 ^ np.uint64(high),
            first & mask,
        )
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]
