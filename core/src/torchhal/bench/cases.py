"""What a measured call is made of: its sizes, its tensors, the work it is, and the bar it has to clear.

:class:`Case` is what every kind has in common; the kinds are in :mod:`dense`, :mod:`layouts`, :mod:`backward`,
:mod:`block_mask` and :mod:`first_call` beside this file, and :mod:`catalogue` lists the calls that are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from torchhal._text import dtype_name
from torchhal.bench.timing import Effort, Timing, timed
from torchhal.problems import AttentionProblem

if TYPE_CHECKING:
    from torchhal.bench.candidates import Bound


class Inputs(NamedTuple):
    """Tensors of one call: query (B, Hq, L, D), key and value (B, Hkv, S, D), mask (L, S) or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None


@dataclass(frozen=True)
class Shape:
    """The sizes of a measured call that its Problem leaves open."""

    batch: int
    length: int
    keys: int

    def __str__(self) -> str:
        return f"B={self.batch} L={self.length} S={self.keys}"


OWN = "own "
"""How a requirement's yardstick begins when it is another call of the same backend: ``own dense``, ``own plain``."""


@dataclass(frozen=True)
class Requirement:
    """How fast a backend has to be, against what was measured beside it."""

    against: str
    """A peer's name, or ``own dense`` and the like for another call of the same backend."""
    ratio: float
    """The yardstick's time, times :attr:`factor`, is at least this many times the backend's."""
    factor: float = 1.0
    """Share of the yardstick's work that the case is: its density, where the yardstick computes every pair."""

    def __str__(self) -> str:
        share = "" if self.factor == 1.0 else f" x {self.factor:.3f} of its work"
        return f"{self.ratio:.2f}x {self.against}{share}"

    def measured(self, yardstick: Timing, ours: Timing) -> float:
        """What to hold against :attr:`ratio`, by medians."""
        return yardstick.median * self.factor / ours.median


@dataclass(frozen=True)
class Case:
    """One attention call; a subclass says of which kind, and how it is made."""

    kind: ClassVar[str] = ""
    """What sort of call it is, in a word or two."""
    baseline: ClassVar[str] = ""
    """The peer that speed-ups are relative to: torch's nearest equivalent."""
    grad: ClassVar[bool] = False
    """Whether gradients are computed."""

    name: str
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    length: int = 2048
    keys: int = 2048
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = False
    requirements: tuple[Requirement, ...] = ()

    @property
    def masked(self) -> bool:
        """Whether there is a mask in a tensor."""
        return False

    @property
    def pairs(self) -> int:
        """Pairs of query row and key that have to be computed for one head, over all rows of one sequence.

        A mask is data: only what ``is_causal``, a BlockMask or a sequence's end hides counts as not computed.
        """
        if not self.causal:
            return self.length * self.keys
        return sum(min(i + 1, self.keys) for i in range(self.length))

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products."""
        return 4.0 * self.batch * self.heads * self.pairs * self.head_size

    @property
    def bytes(self) -> float:
        """Bytes that have to be moved at least: each input read once, the output written once."""
        rows = 2 * self.heads * self.length + 2 * self.kv_heads * self.keys
        return float(self.batch * rows * self.head_size * self.dtype.itemsize)

    @property
    def scores(self) -> int:
        """Elements of the largest matrix of scores that a backend may hold which keeps them all."""
        return self.batch * self.heads * self.length * self.keys

    @property
    def shape(self) -> dict[str, int]:
        """The sizes by name."""
        names = ("batch", "heads", "kv_heads", "length", "keys", "head_size")
        return {name: getattr(self, name) for name in names}

    @property
    def grouped(self) -> bool:
        """Whether query heads share key heads."""
        return self.heads != self.kv_heads

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random query, key and value, the same for the same seed."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, rows: int) -> Tensor:
            shape = (self.batch, heads, rows, self.head_size)
            return torch.randn(shape, generator=generator, device=device).to(self.dtype)

        return Inputs(
            normal(self.heads, self.length),
            normal(self.kv_heads, self.keys),
            normal(self.kv_heads, self.keys),
        )

    def bind(self, device: torch.device, seed: int = 0) -> Bound:
        """The case with its tensors: what is called, against whom, and what has to come out."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its calls are made")

    def mode(self) -> AbstractContextManager[Any]:
        """What the calls run under."""
        return torch.enable_grad() if self.grad else torch.inference_mode()

    def time(
        self, calls: Mapping[str, Callable[[], Any]], effort: Effort, device: torch.device
    ) -> dict[str, Timing]:
        """Times of the candidates, which take turns."""
        return timed(calls, effort, device)

    def resized(self, length: int) -> Self:
        """The same call with another number of queries and keys, of which it had equally many."""
        return replace(self, length=length, keys=length)

    def quick(self) -> Self:
        """A smaller case of the same kind, of which nothing is required: the bars are for the full sizes."""
        length, keys = (max(1, n // 8) for n in (self.length, self.keys))
        return replace(self, length=length, keys=keys, requirements=())

    def traits(self) -> str:
        """What :func:`describe` says beside sizes and type."""
        return "causal" if self.causal else "full"


def describe(case: Case) -> str:
    """One line for a person."""
    heads = f"{case.heads}" if not case.grouped else f"{case.heads}/{case.kv_heads}"
    sizes = f"B={case.batch} H={heads} L={case.length} S={case.keys} D={case.head_size}"
    return f"{sizes} {dtype_name(case.dtype)} {case.traits()}"


# ---------------------------------------------------------------------------- inputs of any problem


def random_inputs(problem: AttentionProblem, shape: Shape, seed: int = 0) -> Inputs:
    """Inputs of the problem's types and heads at one shape, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(heads: int, rows: int, size: int, dtype: torch.dtype) -> Tensor:
        made = torch.randn((shape.batch, heads, rows, size), generator=generator)
        return made.to(device=problem.device, dtype=dtype).requires_grad_("backward" in problem.features)

    query = normal(problem.query_heads, shape.length, problem.head_size, problem.query_dtype)
    key = normal(problem.key_heads, shape.keys, problem.head_size, problem.key_dtype)
    value = normal(problem.key_heads, shape.keys, problem.value_head_size, problem.value_dtype)
    if problem.mask_dtype is None:
        return Inputs(query, key, value)
    # The last key of each query's causal window is always seen, so that no row is empty.
    seen = (
        torch.ones(shape.length, shape.keys, dtype=torch.bool)
        .tril(shape.keys - shape.length)
        .to(problem.device)
    )
    seen[:, 0] = True
    if problem.mask_dtype is torch.bool:
        return Inputs(query, key, value, seen)
    added = torch.zeros(seen.shape, dtype=problem.mask_dtype, device=problem.device).masked_fill_(
        ~seen, -torch.inf
    )
    return Inputs(query, key, value, added.requires_grad_("mask_gradient" in problem.features))
