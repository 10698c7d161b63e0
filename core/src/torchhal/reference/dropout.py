"""Which attention probabilities dropout keeps: a pure function of the seed and the place in the score matrix.

The generator is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
SC 2011, doi:10.1145/2063384.2063405; the Random123 library), the one that CUDA and Triton provide. It keeps
no state, so every backend, layout, tiling and device can draw the same numbers in any order.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from torchhal.errors import InvalidProblem

_WORD: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS: Final = (0x9E3779B9, 0xBB67AE85)
_ROUNDS: Final = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def dropout_keep(seed: Tensor | int, b: Tensor, h: Tensor, q: Tensor, k: Tensor, p: float) -> Tensor:
    """Whether the probability of each pair survives dropout; boolean, of the broadcast shape of the indices.

    The pair (b, h, q, k) draws the 32-bit word number ``k % 4`` of the Philox block with counter
    ``(k // 4, q, h, b)`` and key ``(seed's low word, seed's high word)``, and is kept if that word is at
    least ``round(p * 2**32)``. So four neighbouring keys share one evaluation of the generator.

    Args:
        seed: 0-dim int64 tensor, or a number.
        b, h, q, k: integer tensors that broadcast together: number of the sequence, query head, position of
            the query and of the key in their sequence; non-negative.
        p: probability of dropping, from 0 (everything is kept) to 1 (nothing is).

    Raises:
        InvalidProblem: ``p`` is not between 0 and 1.
    """
    if not 0.0 <= p <= 1.0:
        raise InvalidProblem(f"expected a dropout probability from 0 to 1 and got {p!r}")
    seed = torch.as_tensor(seed, dtype=torch.int64, device=k.device)
    b, h, q, k = (index.to(torch.int64) for index in (b, h, q, k))
    words = philox((k >> 2, q, h, b), (seed & _WORD, (seed >> 32) & _WORD))
    lane = k & 3
    first, second = torch.where(lane == 0, words[0], words[1]), torch.where(lane == 2, words[2], words[3])
    return torch.where(lane < 2, first, second) >= round(p * 2**32)


def philox(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Philox4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Every word is an int64 tensor holding a value from 0 to 2**32 - 1 (counter words are reduced to that);
    the words of the counter broadcast together, and with those of the key.
    """
    c0, c1, c2, c3 = (word & _WORD for word in counter)
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, in two 48-bit halves so that no signed number overflows."""
    upper = word * (factor >> 16)
    lower = word * (factor & 0xFFFF)
    low = (((upper & 0xFFFF) << 16) + lower) & _WORD
    high = (upper + (lower >> 16)) >> 16
    return high, low
