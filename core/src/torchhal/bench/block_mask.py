"""Making a BlockMask: ours at a length where torch's, which looks at every pair, no longer can."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.flex_attention import BlockMask

from torchhal.attention_call import MaskMod
from torchhal.bench.accuracy import Expectation
from torchhal.bench.candidates import Attention, Bound, Candidate, Own, causal_mod
from torchhal.bench.cases import Case
from torchhal.bench.dense import plain_call
from torchhal.bench.timing import Effort, Timing, in_turns, synchronizer
from torchhal.block_masks import create_block_mask
from torchhal.registry import Backend

TORCH: Final = "torch create_block_mask"
_BLOCK: Final = 128
_REPETITIONS: Final = 3


@dataclass(frozen=True)
class MakeBlockMask(Case):
    """``create_block_mask`` of a causal mask or a window over ``length`` positions, and torch's over ``peer_length``.

    Torch's evaluates all pairs: a byte for each, 4 GiB at 65536 for every comparison in the function.
    """

    kind: ClassVar[str] = "BlockMask"
    baseline: ClassVar[str] = TORCH

    window: int | None = None
    peer_length: int = 1 << 15

    @property
    def flops(self) -> float:
        """None: nothing is multiplied."""
        return 0.0

    @property
    def bytes(self) -> float:
        """The lists of partial and of full blocks, by rows and by columns, int32."""
        return 4.0 * 4 * (self.length // _BLOCK) ** 2

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        inputs = self.resized(_BLOCK).inputs(device, seed)

        def wrap(backend: Backend, planned: Attention) -> Attention:
            return self._making(create_block_mask, self.length, device)

        return Bound(
            (Own(plain_call(inputs, False), view=counts, wrap=wrap),),
            lambda flex: [self._peer(device)],
            lambda: self._expected(self.length),
        )

    def _peer(self, device: torch.device) -> Candidate:
        call = self._making(flex_attention.create_block_mask, self.peer_length, device)
        return Candidate(TORCH, call, view=counts, expected=self._expected(self.peer_length))

    def _making(
        self, create: Callable[..., BlockMask], length: int, device: torch.device
    ) -> Callable[[], BlockMask]:
        return functools.partial(
            create, self._mask_mod(), None, None, length, length, device=str(device), BLOCK_SIZE=_BLOCK
        )

    def _mask_mod(self) -> MaskMod:
        window = self.window
        if window is None:
            return causal_mod

        def within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (q >= k) & (q - k < window)

        return within

    def _expected(self, length: int) -> Expectation:
        """Partial and full blocks of some rows of blocks, counted pair by pair."""
        rows = torch.linspace(0, length // _BLOCK - 1, 5).to(torch.int64)
        zero, keys, see = torch.zeros((), dtype=torch.int64), torch.arange(length), self._mask_mod()
        counted = []
        for row in rows.tolist():
            queries = torch.arange(row * _BLOCK, (row + 1) * _BLOCK)[:, None]
            pairs = see(zero, zero, queries, keys).view(_BLOCK, -1, _BLOCK).sum((0, 2))
            full = int((pairs == _BLOCK**2).sum())
            counted.append((int(pairs.count_nonzero()) - full, full))
        return Expectation(rows, torch.tensor(counted, dtype=torch.float64)[None, None], 0.0)

    def time(
        self, calls: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device
    ) -> dict[str, Timing]:
        def given(call: Callable[[], Any]) -> Callable[[], AbstractContextManager[Callable[[], Any]]]:
            return lambda: nullcontext(call)

        makers = {name: given(call) for name, call in calls.items()}
        return in_turns(makers, min(_REPETITIONS, effort.repetitions), synchronizer(device))

    def quick(self) -> Self:
        return replace(super().quick(), peer_length=self.peer_length // 8)

    def traits(self) -> str:
        what = "causal" if self.window is None else f"window of {self.window}"
        return f"{what}, torch's over {self.peer_length}"


def counts(mask: BlockMask) -> Tensor:
    """How many blocks of each row of blocks are partly and how many wholly visible: (B, H, rows, 2)."""
    assert mask.full_kv_num_blocks is not None
    return torch.stack((mask.kv_num_blocks, mask.full_kv_num_blocks), -1).cpu()
