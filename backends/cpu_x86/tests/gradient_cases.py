"""Problems with gradients, and a float64 oracle for them: plain torch and its autograd, and nothing of torchhal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from native_cases import INF, Tensor, rms

import torchhal

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Problem:
    """A dense call of attention. What has gradients is in ``leaves``; the rest says what is made of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    captured: tuple[Tensor, ...] = ()
    score: Callable[..., Function] | None = None
    """``score(*captured)`` is the ``score_mod``."""
    visible: Function | None = None
    """A ``mask_mod``."""
    causal: bool = False
    scale: float = 0.3

    @property
    def dtype(self) -> torch.dtype:
        return self.query.dtype

    @property
    def leaves(self) -> list[Tensor]:
        given = (self.query, self.key, self.value, self.mask, *self.captured)
        return [x for x in given if x is not None and x.is_floating_point()]

    def over(self, leaves: Sequence[Tensor]) -> Problem:
        """The same problem of other tensors."""
        left = iter(leaves)
        query, key, value = (next(left) for _ in range(3))
        mask = self.mask
        if mask is not None and mask.is_floating_point():
            mask = next(left)
        captured = tuple(next(left) if x.is_floating_point() else x for x in self.captured)
        return replace(self, query=query, key=key, value=value, mask=mask, captured=captured)


def learning(problem: Problem) -> Problem:
    """With leaves of its own that require gradients."""
    return problem.over([x.detach().requires_grad_() for x in problem.leaves])


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


# ---------------------------------------------------------------------------- the oracle


def attend(problem: Problem, keep: Tensor | None = None, p: float = 0.0) -> tuple[Tensor, Tensor]:
    """Output and LSE by plain torch: scores and softmax in float32, or in float64 for a query of that type.

    Args:
        keep: (B, Hq, L, S), the weights that dropout of probability ``p`` keeps.
    """
    query, key, value, mask = problem.query, problem.key, problem.value, problem.mask
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    scores = query.to(wide) @ key.to(wide).repeat_interleave(group, 1).transpose(-1, -2) * problem.scale
    b, h, q, k = (
        torch.arange(size).view([-1 if i == d else 1 for i in range(4)])
        for d, size in enumerate(scores.shape)
    )
    if problem.score is not None:
        scores = problem.score(*problem.captured)(scores, b, h, q, k).to(wide).expand(scores.shape)
    live = torch.ones(scores.shape, dtype=torch.bool)
    if problem.causal:
        live = live & (k <= q)
    if problem.visible is not None:
        live = live & problem.visible(b, h, q, k)
    if mask is not None and mask.dtype is torch.bool:
        live = live & mask
    elif mask is not None:
        scores = scores + mask.to(wide)
    live = live & (scores.detach() != -INF)
    dead = ~live.any(-1, keepdim=True)
    scores = scores.masked_fill(~live, -INF).masked_fill(dead, 0.0)
    weights = torch.softmax(scores, -1).masked_fill(~live, 0.0)
    if keep is not None:
        weights = weights * keep / (1 - p)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1)
    out = weights.to(query.dtype) @ value.repeat_interleave(group, 1)
    return out, lse.masked_fill(dead[..., 0], -INF)


def native(problem: Problem, **options: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE of the kernels."""
    score = problem.score and problem.score(*problem.captured)
    mask = problem.mask
    if problem.visible is not None and "block_mask" not in options:
        mods = {"b": problem.query.shape[0], "h": problem.query.shape[1]}
        lengths = (problem.query.shape[2], problem.key.shape[2])
        options["block_mask"] = torchhal.create_block_mask(
            problem.visible, mods["b"], mods["h"], *lengths, device="cpu", BLOCK_SIZE=32
        )
    return torchhal.attention(
        problem.query, problem.key, problem.value, attn_mask=mask, score_mod=score, is_causal=problem.causal,
        scale=problem.scale, enable_gqa=True, return_lse=True, backend="cpu_x86", **options,
    )  # type: ignore[return-value]  # fmt: skip


def pulled_back(
    run: Callable[..., tuple[Tensor, Tensor]], problem: Problem, above: Sequence[Tensor], through: str
) -> list[Tensor]:
    """Gradients of all leaves of a problem, through ``"out"``, ``"lse"`` or ``"both"``."""
    problem = learning(problem)
    results = list(zip(run(problem), above, strict=True))
    chosen = {"out": results[:1], "lse": results[1:], "both": results}[through]
    total = [(x, a.to(x.dtype)) for x, a in chosen if x.requires_grad]
    if not total:
        return [torch.zeros_like(leaf) for leaf in problem.leaves]
    found = torch.autograd.grad(
        [x for x, _ in total], problem.leaves, [a for _, a in total], allow_unused=True
    )
    pairs = zip(found, problem.leaves, strict=True)
    return [torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs]


def gradients_above(problem: Problem, seed: int = 5) -> list[Tensor]:
    """Gradients of output and LSE."""
    out, lse = draw((*problem.query.shape[:3], problem.value.shape[-1]), problem.query.shape[:3], seed=seed)
    return [out.to(problem.dtype), lse]


def assert_accurate(
    found: Tensor, exact: Tensor, plain: Tensor, name: str, dtype: torch.dtype, floor: float = 0.0
) -> None:
    """At most 3 times as far from the truth as a plain evaluation in the same type, plus some ulp.

    Args:
        dtype: of the problem, whose output is rounded to it before the gradients start from it.
        floor: what else is allowed, relative to the largest number, or to 1. A gradient that is a sum over all pairs,
            where most of it cancels, may be exact by luck in one order and not in another.
    """
    assert found.shape == exact.shape and found.dtype == plain.dtype, name
    if not found.numel():
        return
    floor *= max(1.0, float(exact.abs().max()))
    error, allowed, ulp = found.double() - exact, plain.double() - exact, torch.finfo(dtype).eps
    assert error.abs().max() <= 3 * allowed.abs().max() + 2 * ulp * exact.abs().max() + floor, name
    assert rms(error) <= 3 * rms(allowed) + ulp * rms(exact) + floor, name


def check(problem: Problem, through: str = "both", floor: float = 0.0, **options: Any) -> list[Tensor]:
    """Gradients of the kernels, compared with those of the oracle.

    Args:
        floor: of :func:`assert_accurate`.
        options: of :func:`native`.
    """
    above = gradients_above(problem)
    wide = problem.over([x.double() for x in problem.leaves])
    exact = pulled_back(attend, wide, above, through)
    plain = pulled_back(attend, problem, above, through)
    found = pulled_back(lambda x: native(x, **options), problem, above, through)
    rounding = torch.finfo(
        problem.dtype
    ).eps  # of the output, which is charged to the sum of each row's score gradients
    for place, (a, b, c) in enumerate(zip(found, exact, plain, strict=True)):
        sums = place > 2
        name = f"gradient of leaf {place} through {through}"
        # Of float64 the oracle is no more exact than the kernels are.
        own = 64 * rounding if problem.dtype is torch.float64 else 0.0
        assert_accurate(a, b, c, name, problem.dtype, floor + own + (8 * rounding if sums else 0.0))
    return found


# ---------------------------------------------------------------------------- functions with captured tensors


def integral(bias: Tensor) -> Function:
    return lambda s, b, h, q, k: torch.where(s > 0, k % 3, q % 2)


def table_of_distances(table: Tensor) -> Function:
    return lambda s, b, h, q, k: s + table[h, torch.clamp(k - q, -16, 16) + 16]


def slope_of_each_head(slopes: Tensor) -> Function:
    return lambda s, b, h, q, k: s * 0.5 + slopes[h] * ((k - q) * 0.03125)


def soft_cap(cap: Tensor) -> Function:
    return lambda s, b, h, q, k: torch.tanh(s / cap) * cap


def counted_from_the_end(bias: Tensor) -> Function:
    return lambda s, b, h, q, k: s + bias[-1 - k % 5]


def gathered_twice(scales: Tensor) -> Function:
    return lambda s, b, h, q, k: s + torch.tanh(s) * scales[h] + scales[q % 4]


def by_kind_of_key(kinds: Tensor, bias: Tensor) -> Function:
    return lambda s, b, h, q, k: s + bias[kinds[k % 7], b]


def two_tables(rows: Tensor, keys: Tensor) -> Function:
    return lambda s, b, h, q, k: s + torch.tanh(s) * (rows[q % 9, h] + keys[k % 11])


KINDS = torch.tensor([2, 0, -1, 1, 1, 0, 2], dtype=torch.int32)
CAPTURED: dict[str, tuple[Callable[..., Function], tuple[Tensor, ...]]] = {
    "a table of distances for each head": (table_of_distances, tuple(draw((4, 33), seed=1))),
    "a transposed table": (table_of_distances, (draw((33, 4), seed=1)[0].t(),)),
    "a slope for each head": (slope_of_each_head, (torch.tensor([2.0, 1.0, 0.1, -3.0]),)),
    "a scalar": (soft_cap, (torch.tensor(1.7),)),
    "a table in bfloat16": (table_of_distances, tuple(draw((4, 33), dtype=torch.bfloat16, seed=1))),
    "a table in float64": (table_of_distances, tuple(draw((4, 33), dtype=torch.float64, seed=1))),
    "a result that is an integer": (integral, (torch.ones(1),)),
    "a tensor counted from its end": (counted_from_the_end, tuple(draw((6,), seed=2))),
    "one tensor gathered twice": (gathered_twice, tuple(draw((4,), seed=3))),
    "a table by integers that are captured too": (by_kind_of_key, (KINDS, *draw((3, 2), seed=4))),
    "two tables": (two_tables, tuple(draw((9, 4), (11,), seed=5))),
    "an expanded vector": (table_of_distances, (draw((33,), seed=6)[0].expand(4, 33),)),
}


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q + 3) & (q - k < 37 + 9 * h)
