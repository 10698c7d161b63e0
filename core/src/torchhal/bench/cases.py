"""The calls that ``torchhal bench attention`` times, and the inputs for them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from torchhal._text import dtype_name
from torchhal.attention_call import Call, build_problem
from torchhal.errors import InvalidProblem
from torchhal.problems import AttentionProblem


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


@dataclass(frozen=True)
class Case:
    """One dense attention call."""

    name: str
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    length: int = 2048
    keys: int = 2048
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = False
    masked: bool = False
    """With a boolean mask: keys up to the query's own, at most :attr:`window` of them."""

    @property
    def window(self) -> int:
        """Keys a query of a masked case sees at most."""
        return max(1, self.keys // 4)

    @property
    def pairs(self) -> int:
        """Pairs of query row and key that have to be computed for one head.

        A mask is data: only what ``is_causal`` hides counts as not computed.
        """
        if not self.causal:
            return self.length * self.keys
        return sum(min(i + 1, self.keys) for i in range(self.length))

    @property
    def flops(self) -> float:
        """Floating-point operations of the two matrix products."""
        return 4.0 * self.batch * self.heads * self.pairs * self.head_size

    @property
    def bytes(self) -> float:
        """Bytes that have to be moved at least: each input read once, the output written once."""
        rows = 2 * self.heads * self.length + 2 * self.kv_heads * self.keys
        mask = self.length * self.keys if self.masked else 0
        return float(self.batch * rows * self.head_size * self.dtype.itemsize + mask)

    @property
    def shape(self) -> dict[str, int]:
        """The sizes by name."""
        names = ("batch", "heads", "kv_heads", "length", "keys", "head_size")
        return {name: getattr(self, name) for name in names}

    def inputs(self, device: torch.device, seed: int = 0) -> Inputs:
        """Random inputs, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)

        def normal(heads: int, rows: int) -> Tensor:
            made = torch.randn((self.batch, heads, rows, self.head_size), generator=generator)
            return made.to(device=device, dtype=self.dtype)

        mask = self.mask().to(device) if self.masked else None
        return Inputs(
            normal(self.heads, self.length),
            normal(self.kv_heads, self.keys),
            normal(self.kv_heads, self.keys),
            mask,
        )

    def mask(self) -> Tensor:
        """The sliding window of a masked case as (L, S) bool."""
        distance = torch.arange(self.length).unsqueeze(1) - torch.arange(self.keys)
        return (distance >= 0) & (distance < self.window)

    def problem(self, inputs: Inputs) -> AttentionProblem:
        """The Problem of the call on these inputs."""
        query, key, value, mask = inputs
        call = Call(query, key, value, mask, is_causal=self.causal, enable_gqa=self.heads != self.kv_heads)
        return build_problem(call)

    def quick(self) -> Case:
        """A smaller case of the same kind."""
        return replace(self, length=max(1, self.length // 8), keys=max(1, self.keys // 8))


_TYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_SHORT: Final = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def _each_type(case: Case, types: Iterable[torch.dtype] = _TYPES) -> list[Case]:
    return [replace(case, name=f"{case.name}-{_SHORT[t]}", dtype=t) for t in types]


_F32_BF16: Final = (torch.float32, torch.bfloat16)

ATTENTION: Final[tuple[Case, ...]] = (
    *_each_type(Case("causal-2048-d64", causal=True)),
    *_each_type(Case("causal-2048-d128", causal=True, head_size=128)),
    *_each_type(Case("full-2048-d64")),
    *_each_type(Case("decode-gqa-d128", batch=8, heads=32, kv_heads=8, length=1, head_size=128), _F32_BF16),
    *_each_type(Case("causal-8192-d64", heads=8, kv_heads=8, length=8192, keys=8192, causal=True), _F32_BF16),
    *_each_type(Case("window-mask-2048-d64", masked=True), _F32_BF16),
    *_each_type(Case("small-causal-64-d64", heads=8, kv_heads=8, length=64, keys=64, causal=True), _F32_BF16),
    *_each_type(Case("small-decode-128-d64", heads=9, kv_heads=3, length=1, keys=128), _F32_BF16),
)
"""Prefill and decoding as models do them, at lengths where kernels differ, and calls so small that overhead does."""


def chosen(patterns: str | None) -> list[Case]:
    """The cases whose names match one of some patterns, separated by commas; all without patterns.

    Raises:
        InvalidProblem: a pattern matches nothing.
    """
    if patterns is None:
        return list(ATTENTION)
    found: dict[str, Case] = {}
    for pattern in (p.strip() for p in patterns.split(",")):
        matching = {
            c.name: c for c in ATTENTION if fnmatch.fnmatchcase(c.name, pattern) or c.name.startswith(pattern)
        }
        if not matching or not pattern:
            known = ", ".join(c.name for c in ATTENTION)
            raise InvalidProblem(
                f"no attention case is called {pattern!r}; cases are {known}, and * stands for any letters"
            )
        found.update(matching)
    return list(found.values())


def describe(case: Case) -> str:
    """One line for a person."""
    heads = f"{case.heads}" if case.heads == case.kv_heads else f"{case.heads}/{case.kv_heads}"
    kind = "causal" if case.causal else "windowed mask" if case.masked else "full"
    sizes = f"B={case.batch} H={heads} L={case.length} S={case.keys} D={case.head_size}"
    return f"{sizes} {dtype_name(case.dtype)} {kind}"


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
