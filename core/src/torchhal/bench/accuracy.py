"""Whether a candidate computes the right thing, checked before it is timed.

The measure is float64 in plain torch, on the already rounded inputs, for a sample of query rows; it shares nothing
with any backend. A candidate passes when its largest error is at most :data:`FACTOR` times that of a plain evaluation in
the inputs' own type, plus a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from torchhal.attention_call import MaskMod, ScoreMod
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


ModOf = Callable[[torch.dtype], ScoreMod]


def expectation(
    inputs: Inputs,
    is_causal: bool,
    scale: float | None = None,
    *,
    score_mod: ModOf | None = None,
    mask_mod: MaskMod | None = None,
) -> Expectation:
    """The exact result of a dense call at up to 33 rows, first and last included.

    Args:
        inputs: query (B, Hq, L, E), key (B, Hkv, S, E), value (B, Hkv, S, Ev); a mask broadcastable to (B, Hq, L, S).
        is_causal: hide keys after the query, counted from the top left.
        scale: factor of the scores; ``E ** -0.5`` by default.
        score_mod: gives the function that changes scores of a type; its captured tensors have that type.
        mask_mod: ``(b, h, q_idx, kv_idx) -> bool``, False hides; called with whole tensors of indices.
    """
    length = inputs.query.shape[2]
    rows = (
        torch.linspace(0, max(length - 1, 0), min(_ROWS, length), device=inputs.query.device)
        .round()
        .to(torch.int64)
    )
    factor = inputs.query.shape[-1] ** -0.5 if scale is None else scale
    call = _Plain(inputs, rows, is_causal, factor, score_mod, mask_mod)
    return judged(call.result(torch.float64), call.result(inputs.query.dtype), rows)


def judged(exact: Tensor, plain: Tensor, rows: Tensor, factor: float = FACTOR) -> Expectation:
    """What a call has to give, with the tolerance that a plain evaluation in the inputs' type sets.

    Args:
        exact: (B, H, R, E) float64.
        plain: the same computed in the inputs' type.
        rows: (R,) the rows these are.
        factor: how many times the plain evaluation's error is allowed.
    """
    plain_error = float((plain.to(torch.float64) - exact).abs().max()) if exact.numel() else 0.0
    largest = float(exact.abs().max()) if exact.numel() else 0.0
    unit = torch.finfo(plain.dtype).eps * largest
    return Expectation(rows, exact, factor * plain_error + ULPS * unit)


@dataclass(frozen=True)
class _Plain:
    """A dense call at some rows, operation by operation."""

    inputs: Inputs
    rows: Tensor
    is_causal: bool
    scale: float
    score_mod: ModOf | None
    mask_mod: MaskMod | None

    def result(self, dtype: torch.dtype) -> Tensor:
        """(B, Hq, R, Ev) computed in ``dtype``."""
        query = self.inputs.query.detach().index_select(2, self.rows).to(dtype)
        key, value = (t.detach().to(dtype) for t in (self.inputs.key, self.inputs.value))
        shape = (*query.shape[:3], key.shape[2])
        # The query heads that share a key head become rows of it, so that keys and values are not copied.
        grouped = (query.shape[0], key.shape[1], -1)
        scores = (query.reshape(*grouped, query.shape[-1]) @ key.transpose(-2, -1)).reshape(
            shape
        ) * self.scale
        weights = torch.softmax(self._hidden(self._changed(scores)), -1).nan_to_num(0.0).to(dtype)
        return (weights.reshape(*grouped, shape[-1]) @ value).reshape(*shape[:3], value.shape[-1])

    def _changed(self, scores: Tensor) -> Tensor:
        if self.score_mod is None:
            return scores
        # A score_mod sees float32 scores whatever the inputs' type, by definition.
        kind = torch.promote_types(scores.dtype, torch.float32)
        return self.score_mod(kind)(scores.to(kind), *self._indices(scores))

    def _hidden(self, scores: Tensor) -> Tensor:
        *_, row, column = self._indices(scores)
        if self.is_causal:
            scores = scores.masked_fill(column > row, -torch.inf)
        if self.mask_mod is not None:
            scores = scores.masked_fill(~self.mask_mod(*self._indices(scores)), -torch.inf)
        return scores if self.inputs.attn_mask is None else _masked(scores, self.inputs.attn_mask, self.rows)

    def _indices(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """b, h, q_idx and kv_idx, broadcastable to the scores."""
        batch, heads, _, keys = scores.shape
        numbers = [torch.arange(n, device=scores.device) for n in (batch, heads, keys)]
        return numbers[0].view(-1, 1, 1, 1), numbers[1].view(-1, 1, 1), self.rows.view(-1, 1), numbers[2]


def _masked(scores: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    kept = mask if mask.dim() < 2 or mask.shape[-2] == 1 else mask.index_select(mask.dim() - 2, rows)
    if kept.dtype is torch.bool:
        return scores.masked_fill(~kept, -torch.inf)
    return scores + kept.to(scores.dtype)
