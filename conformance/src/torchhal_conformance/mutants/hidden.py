"""Faults in what attention hides, remembers and differentiates."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Final

import torch
from torch import Tensor

from torchhal_conformance.mutants import Change, Mutant, Run
from torchhal_conformance.mutants.attention import inputs, outputs

# ---------------------------------------------------------------------------- what is hidden


def _nan_through(p: Any, out: Tensor, lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    if p.layout == "dense" and v.shape[2]:
        group = p.query_heads // max(p.key_heads, 1)
        out = out + (v * 0.0).sum(2, keepdim=True).repeat_interleave(group, 1).to(out.dtype)
    return out, lse


def _nan_through_pages(p: Any, out: Tensor, lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return (out + (v * 0.0).sum().to(out.dtype), lse) if p.layout == "paged" else (out, lse)


def _blind_nan(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    blind = (out == 0).all(-1, keepdim=True)
    return torch.where(blind, math.nan, out), lse


def _blind_lse(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    return out, None if lse is None else torch.where(torch.isneginf(lse), -1e30, lse)


def _neighbours(run: Run, problem: Any) -> Run:
    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        found = run(q, k, v, mask, scale, operands)
        if (
            problem.layout != "dense"
            or q.shape[0] < 2
            or mask is not None
            or operands is not None
            or problem.is_causal
        ):
            return found
        flipped = run(q, k.flip(2), v.flip(2), mask, scale, operands)  # another order of the sums
        out, other = (f[0] if problem.return_lse else f for f in (found, flipped))
        mixed = torch.cat([out[:1], other[1:]])
        return (mixed, found[1]) if problem.return_lse else mixed

    return faulty


def _floor_of_maximum(run: Run, problem: Any) -> Run:
    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        plain = problem.layout == "dense" and not problem.features - {"lse"} and k.shape[2] > 1
        if not plain:
            return run(q, k, v, mask, scale, operands)
        scores = (q.double() @ k.double().mT) * scale
        half = k.shape[2] // 2
        tops = [s.amax(-1, keepdim=True).clamp(min=-100.0) for s in (scores[..., :half], scores[..., half:])]
        weights = torch.cat(
            [
                torch.exp(s - t).clamp(min=1e-3)
                for s, t in zip((scores[..., :half], scores[..., half:]), tops)
            ],
            -1,
        )
        weights = weights * torch.exp(
            torch.cat([t.expand(*t.shape[:-1], n) for t, n in zip(tops, (half, k.shape[2] - half))], -1)
            - torch.maximum(*tops)
        )
        out = ((weights / weights.sum(-1, keepdim=True)) @ v.double()).to(q.dtype)
        lse = (torch.log(weights.sum(-1)) + torch.maximum(*tops).squeeze(-1)).to(
            torch.promote_types(q.dtype, torch.float32)
        )
        return (out, lse) if problem.return_lse else out

    return faulty


# ---------------------------------------------------------------------------- gradients


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


def _leaf(position: int, factor: float) -> Change:
    def change(p: Any, *given: Any) -> tuple[Any, ...]:
        changed = list(given)
        if isinstance(changed[position], Tensor) and changed[position].requires_grad:
            changed[position] = _Scaled.apply(changed[position], factor)  # type: ignore[no-untyped-call]
        return tuple(changed)

    return inputs(change)


def _no_dlse(p: Any, out: Tensor, lse: Any, *given: Any) -> Any:
    return out, None if lse is None else lse.detach()


def _no_captured_gradient(run: Run, problem: Any) -> Run:
    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        if operands is not None:
            operands = dataclasses.replace(operands, captured=tuple(t.detach() for t in operands.captured))
        return run(q, k, v, mask, scale, operands)

    return faulty


def _first_captured(run: Run, problem: Any) -> Run:
    kept: dict[Any, Any] = {}

    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        if operands is not None and operands.captured:
            shapes = tuple(t.shape for t in operands.captured)
            first = kept.setdefault(shapes, tuple(t.detach().clone() for t in operands.captured))
            operands = dataclasses.replace(operands, captured=first)
        return run(q, k, v, mask, scale, operands)

    return faulty


_m = functools.partial(Mutant, family="attention")

MUTANTS: Final = (
    _m(
        "first_captured",
        "captured tensors are those of the first call",
        ("attention.fresh_data",),
        _first_captured,
    ),
    _m(
        "nan_through",
        "hidden values are multiplied by 0 instead of skipped",
        ("attention.poison",),
        outputs(_nan_through),
    ),
    _m(
        "nan_through_pages",
        "unused slots are multiplied by 0 instead of skipped",
        ("attention.page_poison",),
        outputs(_nan_through_pages),
    ),
    _m("blind_nan", "rows that see nothing give NaN", ("attention.blind_rows",), outputs(_blind_nan)),
    _m(
        "blind_lse",
        "rows that see nothing have a finite LSE",
        ("attention.blind_rows",),
        outputs(_blind_lse),
    ),
    _m("neighbours", "sums are ordered by the place in the batch", ("attention.batch_order",), _neighbours),
    _m(
        "floor_of_maximum",
        "a partition's maximum begins at -100",
        ("attention.far_below",),
        _floor_of_maximum,
    ),
    _m("no_dlse", "the gradient of the LSE is dropped", ("attention.gradients",), outputs(_no_dlse)),
    _m("dq_scaled", "the gradient of the query is 1 % too large", ("attention.gradients",), _leaf(0, 1.01)),
    _m("no_dk", "the gradient of the key is zero", ("attention.gradients",), _leaf(1, 0.0)),
    _m(
        "dv_flipped", "the gradient of the value has the other sign", ("attention.gradients",), _leaf(2, -1.0)
    ),
    _m("no_dmask", "the gradient of the mask is zero", ("attention.gradients",), _leaf(3, 0.0)),
    _m("no_dcaptured", "captured tensors get no gradient", ("attention.gradients",), _no_captured_gradient),
)
