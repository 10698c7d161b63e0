"""User functions for attention, as models have them: each with the tensors it captures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchhal.pointwise.primitives import PRIMITIVES
from torchhal_conformance.families import primitives

Make = Callable[[torch.Generator, int, int, int, int], Tensor]
"""``(generator, B, Hq, L, S)`` to the captured tensor."""


@dataclass(frozen=True)
class Mod:
    """A ``score_mod`` or a ``mask_mod``, made over a captured tensor (None where it captures nothing)."""

    over: Callable[[Any], Callable[..., Tensor]]
    captured: Make | None = None
    trainable: bool = False
    silent_first: bool = False
    """Whether the first key of each sequence is there for its score alone, and its value is zero."""


def _alibi(slopes: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: score + slopes[h] * (k - q)


def _soft_cap(_: Any) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: torch.tanh(score / 2.0) * 2.0


def _relative(table: Tensor) -> Callable[..., Tensor]:
    reach = table.shape[1] // 2
    return lambda score, b, h, q, k: score + table[h, torch.clamp(k - q, -reach, reach) + reach]


def _distance(_: Any) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: (
        score * torch.exp(-(q - k).abs() * 0.125) + torch.where(q >= k, 0.5, -0.25)
    )


def _per_batch(bias: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: score * 0.5 + bias[b, k % bias.shape[1]]


def _sink(sinks: Tensor) -> Callable[..., Tensor]:
    return lambda score, b, h, q, k: torch.where(k == 0, sinks[h], score)


def sinks(generator: torch.Generator, heads: int) -> Tensor:
    """A learned logit for each query head that takes part in the softmax and carries no value, as in gpt-oss."""
    return torch.randn(heads, generator=generator)


SCORE_MODS: dict[str, Mod] = {
    "soft_cap": Mod(_soft_cap),
    "distance": Mod(_distance),
    "alibi": Mod(_alibi, lambda g, b, h, q, k: torch.rand(h, generator=g) * 0.5, trainable=True),
    "relative": Mod(_relative, lambda g, b, h, q, k: torch.randn(h, 17, generator=g), trainable=True),
    "per_batch": Mod(
        _per_batch, lambda g, b, h, q, k: torch.randn(b, max(k, 1), generator=g), trainable=True
    ),
    "sink": Mod(_sink, lambda g, b, h, q, k: sinks(g, h), trainable=True, silent_first=True),
}


def _of_primitive(name: str) -> Mod:
    def over(table: Any) -> Callable[..., Tensor]:
        return lambda score, b, h, q, k: primitives.applied(name, score, lambda i: table[i, k])

    captured: Make = lambda g, b, h, q, k: primitives.captured(name, (max(k, 1),), g)  # noqa: E731
    return Mod(over, captured if primitives.captures(name) else None)


PRIMITIVE_MODS: dict[str, Mod] = {primitives.PREFIX + name: _of_primitive(name) for name in PRIMITIVES}
"""A score_mod for each primitive."""


def _window(_: Any) -> Callable[..., Tensor]:
    return lambda b, h, q, k: (k <= q) & (q - k < 5)


def _prefix(_: Any) -> Callable[..., Tensor]:
    return lambda b, h, q, k: (k < 3) | (k <= q)


def _document(ids: Tensor) -> Callable[..., Tensor]:
    return lambda b, h, q, k: ids[q % ids.shape[0]] == ids[k % ids.shape[0]]


def _nothing(_: Any) -> Callable[..., Tensor]:
    return lambda b, h, q, k: (k > q) & (k < q)


MASK_MODS: dict[str, Mod] = {
    "window": Mod(_window),
    "prefix": Mod(_prefix),
    "nothing": Mod(_nothing),
    "document": Mod(
        _document, lambda g, b, h, q, k: torch.arange(64).div(7, rounding_mode="floor").to(torch.int32)
    ),
}
