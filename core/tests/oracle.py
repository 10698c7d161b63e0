"""An attention oracle in float64 NumPy: a loop over rows that shares nothing with the code under test."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, Any]
Mod = Callable[..., Any]


def as64(tensor: torch.Tensor | Array) -> Array:
    """The exact values of a tensor of any floating type, in float64."""
    if isinstance(tensor, torch.Tensor):
        return tensor.detach().to(torch.float64).numpy()
    return tensor.astype(np.float64)


def attention(
    query: torch.Tensor | Array,
    key: torch.Tensor | Array,
    value: torch.Tensor | Array,
    *,
    scale: float = 1.0,
    is_causal: bool = False,
    mask: torch.Tensor | Array | None = None,
    score_mod: Mod | None = None,
    mask_mod: Mod | None = None,
    visible: Callable[[int, int, int, int], bool] | None = None,
    factor: Array | None = None,
    first_batch: int = 0,
    first_query: int = 0,
) -> tuple[Array, Array]:
    """Output (B, Hq, L, Ev) and LSE (B, Hq, L).

    Args:
        query, key, value: (B, Hq, L, E), (B, Hkv, S, E) and (B, Hkv, S, Ev).
        mask: boolean (True takes part) or additive, broadcastable to (B, Hq, L, S).
        score_mod, mask_mod: called with Python numbers, one pair at a time; score_mod for visible pairs only.
        visible: any further rule, called with (b, h, q_idx, kv_idx).
        factor: (B, Hq, L, S), multiplies the probabilities: dropout.
        first_batch, first_query: where b and q_idx start.
    """
    q, k, v = as64(query), as64(key), as64(value)
    batch, heads, rows, _ = q.shape
    groups = heads // k.shape[1]
    out = np.zeros((batch, heads, rows, v.shape[-1]))
    lse = np.full((batch, heads, rows), -np.inf)
    bias, allowed = _masks(mask, (batch, heads, rows, k.shape[2]))
    for b, h, i in np.ndindex(batch, heads, rows):
        place = (b + first_batch, h, i + first_query)
        seen, scores = [], []
        for j in range(k.shape[2]):
            if not allowed[b, h, i, j] or (is_causal and j > place[2]):
                continue
            if (mask_mod and not mask_mod(*place, j)) or (visible and not visible(*place, j)):
                continue
            score = float(np.sum(q[b, h, i] * k[b, h // groups, j])) * scale
            score = (float(score_mod(score, *place, j)) if score_mod else score) + bias[b, h, i, j]
            if score != -math.inf:
                seen.append(j)
                scores.append(score)
        if seen:
            weights, lse[b, h, i] = _softmax(np.array(scores))
            kept = weights if factor is None else weights * factor[b, h, i, seen]
            out[b, h, i] = np.sum(kept[:, None] * v[b, h // groups, seen], axis=0)
    return out, lse


def _masks(mask: torch.Tensor | Array | None, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """A floating mask as a bias and a boolean one as what is allowed, each of the full shape."""
    array = mask.detach().cpu().to(torch.float64).numpy() if isinstance(mask, torch.Tensor) else mask
    boolean = mask is not None and str(mask.dtype).endswith("bool")
    bias = np.zeros(()) if array is None or boolean else array
    allowed = array.astype(bool) if array is not None and boolean else np.ones((), dtype=bool)
    return np.broadcast_to(bias, shape), np.broadcast_to(allowed, shape)


def _softmax(scores: Array) -> tuple[Array, float]:
    peak = scores.max()
    if not math.isfinite(peak):
        return np.full(scores.shape, np.nan), math.nan
    exponentials = np.exp(scores - peak)
    total = float(exponentials.sum())
    return exponentials / total, float(peak) + math.log(total)
