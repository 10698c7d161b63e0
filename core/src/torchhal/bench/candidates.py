"""Who is measured on a case: our backends, other calls of theirs as yardsticks, and torch's own attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from torchhal.attention_call import Call, build_problem
from torchhal.bench.accuracy import Expectation
from torchhal.bench.cases import OWN, Case, Inputs
from torchhal.problems import AttentionProblem, Decline
from torchhal.registry import REFERENCE, Backend

SDPA: Final = "torch sdpa"
SDPA_DENSE: Final = "torch sdpa, dense mask"
SDPA_PADDED: Final = "torch sdpa, padded"
SDPA_GATHERED: Final = "torch sdpa, pages gathered"
UNFUSED: Final = "torch, unfused"
FLEX: Final = "torch flex, compiled"
READ: Final = "torch sum, same bytes"

_MOST_SCORES: Final = 1 << 30
"""Bytes of scores past which the reference, which keeps them all, is not run."""

Attention = Callable[[], Any]
View = Callable[[Any], Tensor]


def unchanged(result: Any) -> Tensor:
    """The result as it is: (B, Hq, L, Ev)."""
    assert isinstance(result, Tensor), f"expected a tensor and got {type(result).__name__}"
    return result


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case."""

    name: str
    call: Attention | None = None
    view: View = unchanged
    """Brings the result into the shape of the expectation, outside the timed call."""
    ours: bool = False
    """Whether it is a backend of torchhal, not a peer."""
    not_run: str = ""
    """Why there is nothing to call."""
    yardstick: str = ""
    """Of another call of a backend: what requirements call it, ``own dense``; empty for all others."""
    backend: str = ""
    """Whose call it is; empty for peers."""
    expected: Expectation | None = None
    """What a yardstick has to give, where that is not what the case has to."""


Wrap = Callable[[Backend, Attention], Attention]


def _directly(backend: Backend, call: Attention) -> Attention:
    return call


@dataclass(frozen=True)
class Own:
    """A call that our backends are asked to serve: the case's, or with a label another that it is held against."""

    call: Call
    view: View = unchanged
    label: str = ""
    """``dense`` makes it the candidate ``NAME, dense`` and the yardstick ``own dense``."""
    wrap: Wrap = _directly
    """What is timed, from the planned call."""
    expected: Callable[[], Expectation] | None = None

    def problem(self) -> AttentionProblem:
        """The Problem that backends are asked."""
        return build_problem(self.call)

    def candidate(self, case: Case, backend: Backend) -> Candidate:
        """The backend's planned call, or why there is none."""
        name = f"{backend.name}, {self.label}" if self.label else backend.name
        yardstick = OWN + self.label if self.label else ""
        made = functools.partial(Candidate, name, ours=True, yardstick=yardstick, backend=backend.name)
        answer = backend.ask(self.problem())
        if isinstance(answer, Decline):
            return made(not_run=f"declined: {answer}")
        if backend.name == REFERENCE and 4 * case.scores > _MOST_SCORES:
            return made(not_run=f"keeps all scores, {4 * case.scores / 2**30:.1f} GiB here")
        call = self.call
        scale = call.query.shape[-1] ** -0.5 if call.scale is None else call.scale
        planned = functools.partial(
            answer.run, call.query, call.key, call.value, call.attn_mask, scale, call.operands
        )
        return made(
            self.wrap(backend, planned),
            view=self.view,
            expected=None if self.expected is None else self.expected(),
        )


@dataclass(frozen=True)
class Bound:
    """A case with its tensors."""

    own: tuple[Own, ...]
    """The measured call first, then those it is held against."""
    peers: Callable[[bool], list[Candidate]]
    """Torch's equivalents; with True compiled flex_attention too, which takes seconds."""
    expected: Callable[[], Expectation]

    def problem(self) -> AttentionProblem:
        """The Problem of the measured call."""
        return self.own[0].problem()

    def ours(self, case: Case, backend: Backend) -> list[Candidate]:
        """The backend on the case and, where it serves that, on what it is held against."""
        first, *others = (functools.partial(own.candidate, case, backend) for own in self.own)
        found = first()
        return [found] if found.not_run else [found, *(other() for other in others)]


# ---------------------------------------------------------------------------- peers


def sdpa(inputs: Inputs, mask: Tensor | None = None, is_causal: bool = False) -> Attention:
    """Torch's scaled_dot_product_attention on these tensors."""
    query, key, value, _ = inputs
    grouped = query.shape[1] != key.shape[1]
    return functools.partial(
        F.scaled_dot_product_attention, query, key, value, mask, is_causal=is_causal, enable_gqa=grouped
    )


def reading(size: float, device: torch.device) -> Candidate:
    """Reading ``size`` bytes, for calls that memory limits: what it gives in the same run, from a buffer as large."""
    count = max(1, int(size) // 4)
    data = torch.ones(count, device=device)
    total = torch.full((1, 1, 1, 1), float(count), dtype=torch.float64, device=device)
    expected = Expectation(torch.zeros(1, dtype=torch.int64, device=device), total, 1e-4 * count)
    return Candidate(READ, data.sum, view=lambda found: found.view(1, 1, 1, 1), expected=expected)


def causal_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The ``mask_mod`` that hides keys after the query."""
    return q >= k


def flex(inputs: Inputs, block_mask: BlockMask | None = None, score_mod: Any = None) -> Attention:
    """Compiled flex_attention on these tensors, compiled anew: a graph for changing shapes would be a slower one."""
    from torch.nn.attention.flex_attention import flex_attention

    query, key, value, _ = inputs
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = query.shape[1] != key.shape[1]
    return functools.partial(
        compiled, query, key, value, score_mod=score_mod, block_mask=block_mask, enable_gqa=grouped
    )


def block_mask(mask_mod: Any, inputs: Inputs) -> BlockMask:
    """The BlockMask of a ``mask_mod`` for every sequence and head of these tensors."""
    from torch.nn.attention.flex_attention import create_block_mask

    query, key = inputs.query, inputs.key
    return create_block_mask(
        mask_mod, None, None, query.shape[2], key.shape[2], device=str(query.device), BLOCK_SIZE=128
    )
