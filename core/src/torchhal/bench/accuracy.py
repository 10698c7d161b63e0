"""Whether a candidate computes the right thing, checked before it is timed.

The measure is float64 in plain torch, on the already rounded inputs, for a sample of query rows; it shares nothing
with any backend. A candidate passes when its largest error is at most :data:`FACTOR` times that of a plain evaluation in
the inputs' own type, plus a few units in the last place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchhal.bench.cases import Inputs

FACTOR: Final = 2.0
ULPS: Final = 4.0
_ROWS: Final = 33


@dataclass(frozen=True)
class Expectation:
    """What a call has to give at some query rows, and how far from it a candidate may be."""

    rows: Tensor
    """(R,) indices of the rows that are checked."""
    exact: Tensor
    """(B, Hq, R, Ev) float64."""
    tolerance: float

    def error(self, out: Tensor) -> float:
        """Largest absolute error of a candidate's (B, Hq, L, Ev); infinite for NaN or for another shape."""
        if out.dim() != 4 or out.shape[:2] != self.exact.shape[:2] or out.shape[-1] != self.exact.shape[-1]:
            return float("inf")
        found = out.detach().index_select(2, self.rows).to(torch.float64)
        worst = float((found - self.exact).abs().max()) if found.numel() else 0.0
        return worst if worst == worst else float("inf")


def expectation(inputs: Inputs, is_causal: bool, scale: float | None = None) -> Expectation:
    """The exact result of a dense call at up to 33 rows, first and last included.

    Args:
        inputs: query (B, Hq, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev); a mask broadcastable to (B, Hq, L, S).
        is_causal: hide keys after the query, counted from the top left.
        scale: factor of the scores; ``E ** -0.5`` by default.
    """
    length = inputs.query.shape[2]
    rows = (
        torch.linspace(0, max(length - 1, 0), min(_ROWS, length), device=inputs.query.device)
        .round()
        .to(torch.int64)
    )
    factor = inputs.query.shape[-1] ** -0.5 if scale is None else scale
    exact = _plain(inputs, rows, is_causal, factor, torch.float64)
    plain = _plain(inputs, rows, is_causal, factor, inputs.query.dtype)
    plain_error = float((plain.to(torch.float64) - exact).abs().max()) if exact.numel() else 0.0
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    unit = torch.finfo(inputs.query.dtype).eps * largest
    return Expectation(rows, exact, FACTOR * plain_error + ULPS * unit)


def _plain(inputs: Inputs, rows: Tensor, is_causal: bool, scale: float, dtype: torch.dtype) -> Tensor:
    query = inputs.query.detach().index_select(2, rows).to(dtype)
    key, value = (t.detach().to(dtype) for t in (inputs.key, inputs.value))
    shape = (*query.shape[:3], key.shape[2])
    # The query heads that share a key head become rows of it, so that keys and values are not copied.
    grouped = (query.shape[0], key.shape[1], -1)
    scores = (query.reshape(*grouped, query.shape[-1]) @ key.transpose(-2, -1)).reshape(shape) * scale
    if is_causal:
        hidden = torch.arange(key.shape[2], device=rows.device) > rows.unsqueeze(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    if inputs.attn_mask is not None:
        scores = _masked(scores, inputs.attn_mask, rows)
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return (weights.reshape(*grouped, shape[-1]) @ value).reshape(*shape[:3], value.shape[-1])


def _masked(scores: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    kept = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask.index_select(mask.dim() - 2, rows)
    if kept.dtype is torch.bool:
        return scores.masked_fill(~kept, -torch.inf)
    return scores + kept.to(scores.dtype)
