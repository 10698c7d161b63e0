"""What is true, in torch's plainest operations and in any type: float64 for the truth, the element type for the baseline.

It shares no code with the core's reference, and takes user functions as Python calls them, uncaptured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Mod = Callable[..., Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dtype: torch.dtype,
    scale: float,
    is_causal: bool = False,
    mask: Tensor | None = None,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    first_query: int = 0,
    batch: int | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, Hq, L, Ev), and LSE and largest score of each row (B, Hq, L), computed in ``dtype``.

    Args:
        query, key, value: (B, Hq, L, E), (B, Hkv, S, E), (B, Hkv, S, Ev).
        mask: boolean (True takes part) or added to the scores.
        first_query: position of the first query row.
        batch: number of the sequence where there is one sequence that is not the first.
        keep: (B, Hq, L, S), which probabilities survive dropout.
    """
    group = query.shape[1] // max(key.shape[1], 1)
    q = query.to(dtype)
    k, v = (t.to(dtype).repeat_interleave(group, 1) for t in (key, value))
    place = _places(query, key, first_query, batch)
    scores = (q @ k.mT) * scale
    if score_mod is not None:
        scores = score_mod(scores, *place).to(dtype)
    hidden = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if mask is not None and mask.dtype is torch.bool:
        hidden = hidden | ~mask
    elif mask is not None:
        scores = scores + mask.to(dtype)
    if is_causal:
        hidden = hidden | (place[3] > place[2])
    if mask_mod is not None:
        hidden = hidden | ~mask_mod(*place)
    scores = scores.masked_fill(hidden, -math.inf)
    largest = scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -math.inf)
    return *_softmax_product(scores, v, keep, dropout_p), largest


def _softmax_product(
    scores: Tensor, v: Tensor, keep: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    blind = torch.isneginf(scores).all(-1, keepdim=True)
    top = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_zeros((*scores.shape[:-1], 1))
    )
    top = torch.where(blind, 0.0, top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    lse = torch.where(blind, -math.inf, top + torch.log(torch.where(blind, 1.0, total))).squeeze(-1)
    weights = torch.where(blind, 0.0, weights / torch.where(blind, 1.0, total))
    if keep is not None:
        weights = weights * keep / (1.0 - dropout_p) if dropout_p < 1.0 else weights * 0.0
    # What is hidden has weight 0, and 0 times a value that is not finite must not count.
    return weights @ torch.where(torch.isfinite(v), v, 0.0), lse


def _places(query: Tensor, key: Tensor, first_query: int, batch: int | None) -> tuple[Tensor, ...]:
    def line(size: int, dimension: int) -> Tensor:
        shape = [1] * 4
        shape[dimension] = size
        return torch.arange(size, dtype=torch.int32, device=query.device).view(shape)

    b = line(query.shape[0], 0) if batch is None else torch.full((1, 1, 1, 1), batch, dtype=torch.int32)
    return b, line(query.shape[1], 1), line(query.shape[2], 2) + first_query, line(key.shape[2], 3)


def worst_of(evaluations: list[tuple[Tensor, ...]], exact: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of several evaluations in one type, for each output the one that is furthest from the truth."""
    found = []
    for position, truth in enumerate(exact):
        errors: list[tuple[float, Any]] = []
        for outputs in evaluations:
            error = (outputs[position].detach().double() - truth.detach()).nan_to_num(0.0, 0.0, 0.0)
            errors.append((float(error.abs().max()) if error.numel() else 0.0, outputs[position]))
        found.append(max(errors, key=lambda pair: pair[0])[1])
    return tuple(found)
