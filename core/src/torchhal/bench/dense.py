"""Cases in the dense layout: plain and masked attention, a sliding window as a BlockMask, changed scores."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar, Final, Self

import torch
from torch import Tensor

from torchhal.attention_call import (
    Call,
    Functions,
    MaskMod,
    ScoreMod,
    block_size_of,
    capture_block_mask,
    capture_score_mod,
    operands_of,
)
from torchhal.bench import accuracy, candidates
from torchhal.bench.candidates import (
    SDPA,
    SDPA_DENSE,
    UNFUSED,
    Bound,
    Candidate,
    Own,
    block_mask,
    causal_mod,
)
from torchhal.bench.cases import Case, Inputs, Requirement

SOFT_CAP: Final = 50.0
"""Where scores saturate: the soft-cap of attention in Gemma 2 (arXiv 2408.00118)."""


def plain_call(inputs: Inputs, is_causal: bool = False) -> Call:
    """Dense attention on these tensors."""
    grouped = inputs.query.shape[1] != inputs.key.shape[1]
    return Call(*inputs, is_causal=is_causal, enable_gqa=grouped)


def block_mask_call(inputs: Inputs, mask_mod: MaskMod) -> Call:
    """Dense attention under the BlockMask of ``mask_mod``, for every sequence and head the same."""
    query, key, value, _ = inputs
    mask = block_mask(mask_mod, inputs)
    functions = Functions(None, capture_block_mask(mask))
    return Call(
        query,
        key,
        value,
        functions=functions,
        operands=operands_of(functions, mask, 0.0, query),
        block_size=block_size_of(mask, query, key),
        enable_gqa=query.shape[1] != key.shape[1],
    )


def causal_mask(case: Case, device: torch.device) -> Tensor:
    """What ``is_causal`` means, as (L, S) bool."""
    rows = torch.arange(case.length, device=device).unsqueeze(1)
    return torch.arange(case.keys, device=device) <= rows


@dataclass(frozen=True)
class Dense(Case):
    """Attention as scaled_dot_product_attention has it: full, causal, or with a boolean mask."""

    kind: ClassVar[str] = "dense"
    baseline: ClassVar[str] = SDPA

    windowed: bool = False
    """With a boolean mask: keys up to the query's own, at most :attr:`window` of them."""

    @property
    def masked(self) -> bool:
        return self.windowed

    @property
    def window(self) -> int:
        """Keys a query of a masked case sees at most."""
        return max(1, self.keys // 4)

    @property
    def bytes(self) -> float:
        return super().bytes + (self.length * self.keys if self.masked else 0)

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        made = super().inputs(device, seed)
        return made._replace(attn_mask=self.mask().to(device)) if self.masked else made

    def mask(self) -> Tensor:
        """The sliding window of a masked case as (L, S) bool."""
        distance = torch.arange(self.length).unsqueeze(1) - torch.arange(self.keys)
        return (distance >= 0) & (distance < self.window)

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)
        return Bound(
            (Own(plain_call(inputs, self.causal)),),
            functools.partial(self._peers, inputs),
            lambda: accuracy.expectation(inputs, self.causal),
        )

    def _peers(self, inputs: Inputs, flex: bool) -> list[Candidate]:
        peers = [Candidate(SDPA, candidates.sdpa(inputs, inputs.attn_mask, self.causal))]
        if self.length == 1:
            peers.append(candidates.reading(self.bytes, inputs.query.device))
        if self.causal:
            dense = causal_mask(self, inputs.query.device)
            peers.append(Candidate(SDPA_DENSE, candidates.sdpa(inputs, dense)))
        peers += candidates.each_fused(inputs, self.causal, lambda call: call)
        if flex:
            mod = causal_mod if self.causal else window_mod(self.window) if self.masked else None
            peers += candidates.flexes(inputs, None if mod is None else block_mask(mod, inputs))
        return peers

    def traits(self) -> str:
        return "windowed mask" if self.masked else super().traits()


def window_mod(window: int) -> MaskMod:
    """The ``mask_mod`` of a sliding window: the query's own key and the ``window - 1`` before it."""

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q - k < window)

    return seen


@dataclass(frozen=True)
class Window(Case):
    """A causal sliding window given as a BlockMask, held against the same mask as a tensor and against every pair."""

    kind: ClassVar[str] = "sliding window"
    baseline: ClassVar[str] = SDPA_DENSE

    window: int = 512

    @property
    def pairs(self) -> int:
        return sum(max(0, min(i + 1, self.keys) - max(0, i + 1 - self.window)) for i in range(self.length))

    @property
    def density(self) -> float:
        """Share of all pairs that are seen."""
        return self.pairs / (self.length * self.keys)

    def against_dense(self, most: float) -> Self:
        """The case, also required to take at most ``most`` times its share of the backend's own time for every pair."""
        needed = Requirement("own dense", 1 / most, self.density)
        return replace(self, requirements=(*self.requirements, needed))

    def quick(self) -> Self:
        return replace(super().quick(), window=max(1, self.window // 8))

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)
        mod = window_mod(self.window)
        every = Own(plain_call(inputs), label="dense", expected=lambda: accuracy.expectation(inputs, False))
        return Bound(
            (Own(block_mask_call(inputs, mod)), every),
            functools.partial(self._peers, inputs),
            lambda: accuracy.expectation(inputs, False, mask_mod=mod),
        )

    def _peers(self, inputs: Inputs, flex: bool) -> list[Candidate]:
        device = inputs.query.device
        distance = torch.arange(self.length, device=device).unsqueeze(1) - torch.arange(
            self.keys, device=device
        )
        dense = (distance >= 0) & (distance < self.window)
        peers = [Candidate(SDPA_DENSE, candidates.sdpa(inputs, dense))]
        if flex:
            peers += candidates.flexes(inputs, block_mask(window_mod(self.window), inputs))
        return peers

    def traits(self) -> str:
        return f"window of {self.window} as a BlockMask"


# ---------------------------------------------------------------------------- changed scores


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """(H,) float32: the geometric series of ALiBi (Press, Smith and Lewis, arXiv 2108.12409)."""
    exponents = torch.arange(1, heads + 1, dtype=torch.float64) * (-8.0 / heads)
    return torch.exp2(exponents).to(device=device, dtype=torch.float32)


def alibi_soft_cap(slopes: Tensor) -> ScoreMod:
    """The ``score_mod`` that caps scores softly, then lowers them by the distance times the head's slope."""

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return SOFT_CAP * torch.tanh(score / SOFT_CAP) - slopes[h] * (q - k)

    return changed


@dataclass(frozen=True)
class AlibiSoftCap(Case):
    """Causal prefill with ALiBi and a soft-cap as one ``score_mod``, held against the same prefill without it."""

    kind: ClassVar[str] = "ALiBi and soft-cap"
    baseline: ClassVar[str] = UNFUSED

    causal: bool = True

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)
        query, key, value, _ = inputs
        slopes = alibi_slopes(self.heads, device)
        functions = Functions(capture_score_mod(alibi_soft_cap(slopes), query, key, value))
        call = plain_call(inputs, self.causal)._replace(
            functions=functions, operands=operands_of(functions, None, 0.0, query)
        )
        plain = Own(
            plain_call(inputs, self.causal),
            label="plain",
            expected=lambda: accuracy.expectation(inputs, self.causal),
        )
        return Bound(
            (Own(call), plain),
            functools.partial(self._peers, inputs, slopes),
            lambda: accuracy.expectation(
                inputs, self.causal, score_mod=lambda dtype: alibi_soft_cap(slopes.to(dtype))
            ),
        )

    def _peers(self, inputs: Inputs, slopes: Tensor, flex: bool) -> list[Candidate]:
        peers = [Candidate(UNFUSED, functools.partial(unfused, self, inputs, alibi_soft_cap(slopes)))]
        if flex:
            mask = block_mask(causal_mod, inputs) if self.causal else None
            peers += candidates.flexes(inputs, mask, alibi_soft_cap(slopes))
        return peers

    def traits(self) -> str:
        return f"{super().traits()}, ALiBi and soft-cap"


def unfused(case: Case, inputs: Inputs, score_mod: ScoreMod) -> Tensor:
    """The call in torch operations one after the other: all that torch has for changed scores without a compiler."""
    query, key, value, _ = inputs
    device = query.device
    group = case.heads // case.kv_heads
    key, value = (t.repeat_interleave(group, 1) if group > 1 else t for t in (key, value))
    scores = (query @ key.transpose(-2, -1)).float() * case.head_size**-0.5
    head = torch.arange(case.heads, device=device).view(-1, 1, 1)
    row, column = torch.arange(case.length, device=device).view(-1, 1), torch.arange(case.keys, device=device)
    scores = score_mod(scores, torch.zeros((), dtype=torch.int64, device=device), head, row, column)
    if case.causal:
        scores = scores.masked_fill(column > row, -torch.inf)
    return torch.softmax(scores, -1).to(value.dtype) @ value
