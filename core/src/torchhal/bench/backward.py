"""The backward pass alone: gradients of query, key and value, the forward pass done before the clock starts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from torchhal.bench import accuracy, candidates
from torchhal.bench.accuracy import Expectation
from torchhal.bench.candidates import SDPA, Attention, Bound, Candidate, Own
from torchhal.bench.cases import Case, Inputs
from torchhal.bench.dense import causal_mask, plain_call
from torchhal.registry import Backend

FACTOR: Final = 3.0
"""How many times the error of a plain backward pass is allowed: it has more steps than the forward pass."""


@dataclass(frozen=True)
class Backward(Case):
    """Gradients of (square) attention. Judged at the first sequence's first key head, whose gradients need no other."""

    kind: ClassVar[str] = "backward"
    baseline: ClassVar[str] = SDPA
    grad: ClassVar[bool] = True

    @property
    def flops(self) -> float:
        """Five products where the forward pass has two."""
        return 2.5 * super().flops

    @property
    def bytes(self) -> float:
        """Query, output and its gradient read and the query's gradient written; keys and values read, theirs written."""
        return 2.0 * super().bytes

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        query, key, value, mask = super().inputs(device, seed)
        return Inputs(query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), mask)

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)
        generator = torch.Generator(device).manual_seed(seed + 1)
        above = torch.randn(inputs.query.shape, generator=generator, device=device).to(inputs.query)

        def wrap(backend: Backend, forward: Attention) -> Attention:
            return _gradients(forward, inputs, above)

        with torch.enable_grad():
            call = plain_call(inputs, self.causal)
        return Bound(
            (Own(call, self._judged, wrap=wrap),),
            functools.partial(self._peers, inputs, above),
            lambda: self._expectation(inputs, above),
        )

    def _peers(self, inputs: Inputs, above: Tensor, flex: bool) -> list[Candidate]:
        def pulled(forward: Attention) -> Attention:
            return _gradients(forward, inputs, above)

        peers = [Candidate(SDPA, pulled(candidates.sdpa(inputs, None, self.causal)), self._judged)]
        peers += candidates.each_fused(inputs, self.causal, pulled, self._judged)
        if flex:
            # What compiled flex_attention can not do is for it to say: on CPUs it has no backward pass.
            mask = candidates.block_mask(candidates.causal_mod, inputs) if self.causal else None
            peers += candidates.flexes(inputs, mask, None, pulled, self._judged)
        return peers

    @property
    def _group(self) -> int:
        return self.heads // self.kv_heads

    def _judged(self, gradients: Any) -> Tensor:
        """The gradients of the first key head and of its query heads, (1, group + 2, L, D)."""
        query, key, value = gradients
        return torch.cat((query[:1, : self._group], key[:1, :1], value[:1, :1]), 1)

    def _expectation(self, inputs: Inputs, above: Tensor) -> Expectation:
        exact, plain = (self._plain(inputs, above, dtype) for dtype in (torch.float64, self.dtype))
        return accuracy.judged(exact, plain, torch.arange(self.length, device=above.device), FACTOR)

    def _plain(self, inputs: Inputs, above: Tensor, dtype: torch.dtype) -> Tensor:
        heads = (self._group, 1, 1)
        query, key, value = (
            t.detach()[:1, :n].to(dtype).requires_grad_() for t, n in zip(inputs[:3], heads, strict=True)
        )
        with torch.enable_grad():
            scores = query @ key.transpose(-2, -1) * self.head_size**-0.5
            if self.causal:
                scores = scores.masked_fill(~causal_mask(self, query.device), -torch.inf)
            out = torch.softmax(scores, -1) @ value
            wanted = torch.autograd.grad(out, (query, key, value), above[:1, : self._group].to(dtype))
        return self._judged(wanted)

    def traits(self) -> str:
        return f"{super().traits()}, backward"


def _gradients(forward: Attention, inputs: Inputs, above: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """What computes the gradients; the forward pass is made once, at the first call, and its graph kept."""
    wanted = inputs[:3]
    made: list[Tensor] = []

    def gradients() -> tuple[Tensor, ...]:
        if not made:
            made.append(forward())
        return torch.autograd.grad(made[0], wanted, above, retain_graph=True)

    return gradients
