"""The first call with a function never seen before: capture, negotiation and whatever has to be compiled."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from torchhal.attention import attention
from torchhal.attention_call import Call, Functions, ScoreMod, capture_score_mod, operands_of
from torchhal.bench import accuracy, candidates
from torchhal.bench.candidates import FLEX, UNFUSED, Attention, Bound, Candidate, Own, block_mask, causal_mod
from torchhal.bench.cases import Case, Inputs
from torchhal.bench.dense import SOFT_CAP, plain_call, unfused
from torchhal.bench.timing import Effort, Timing, in_turns, synchronizer
from torchhal.registry import Backend

_REPETITIONS: Final = 3
_numbers = itertools.count(1)


def new_mod() -> ScoreMod:
    """A soft-cap that no call has used: its constant, and with it its graph, is new, its values next to the same."""
    return soft_cap(SOFT_CAP + next(_numbers) * 2.0**-18)


def soft_cap(cap: float) -> ScoreMod:
    """The ``score_mod`` that keeps scores between ``-cap`` and ``cap``."""

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return changed


@dataclass(frozen=True)
class Fresh:
    """A call that is never made twice: each time ``make`` prepares another, outside the clock."""

    make: Callable[[], AbstractContextManager[Attention]]

    def __call__(self) -> Any:
        with self.make() as call:
            return call()


@dataclass(frozen=True)
class FirstCall(Case):
    """The public function with a new ``score_mod`` each time, held against compiled flex_attention from nothing.

    Checking the results makes one call of each candidate, so what a process does once (loading a library, starting a
    compiler's workers) is not counted for any of them.
    """

    kind: ClassVar[str] = "first call"
    baseline: ClassVar[str] = FLEX

    causal: bool = True

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.inputs(device, seed)

        def wrap(backend: Backend, planned: Attention) -> Attention:
            return Fresh(functools.partial(self._fresh_own, inputs, backend.name))

        return Bound(
            (Own(self._call(inputs), wrap=wrap),),
            functools.partial(self._peers, inputs),
            lambda: accuracy.expectation(inputs, self.causal, score_mod=lambda dtype: soft_cap(SOFT_CAP)),
        )

    def _call(self, inputs: Inputs) -> Call:
        """The call that backends are asked about before."""
        query, key, value, _ = inputs
        functions = Functions(capture_score_mod(soft_cap(SOFT_CAP), query, key, value))
        operands = operands_of(functions, None, 0.0, query)
        return plain_call(inputs, self.causal)._replace(functions=functions, operands=operands)

    @contextmanager
    def _fresh_own(self, inputs: Inputs, backend: str) -> Iterator[Attention]:
        query, key, value, _ = inputs
        yield functools.partial(
            attention,
            query,
            key,
            value,
            score_mod=new_mod(),
            is_causal=self.causal,
            enable_gqa=self.grouped,
            backend=backend,
        )

    def _peers(self, inputs: Inputs, flex: bool) -> list[Candidate]:
        eager = functools.partial(unfused, self, inputs)

        @contextmanager
        def fresh_eager() -> Iterator[Attention]:
            yield functools.partial(eager, new_mod())

        peers = [Candidate(UNFUSED, Fresh(fresh_eager))]
        if flex:
            peers.append(Candidate(FLEX, Fresh(functools.partial(self._fresh_flex, inputs))))
        return peers

    @contextmanager
    def _fresh_flex(self, inputs: Inputs) -> Iterator[Attention]:
        from torch._inductor.utils import fresh_cache

        mask = block_mask(causal_mod, inputs) if self.causal else None
        with fresh_cache():
            yield candidates.flex(inputs, mask, new_mod())
        torch._dynamo.reset()

    def time(
        self, calls: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device
    ) -> dict[str, Timing]:
        makers = {name: call.make for name, call in calls.items() if isinstance(call, Fresh)}
        return in_turns(makers, min(_REPETITIONS, effort.repetitions), synchronizer(device))

    def traits(self) -> str:
        return f"{super().traits()}, first call with a new soft-cap"
