"""Faults in what quantised keys and values in pages stand for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from torchhal_conformance.mutants import Change, Mutant, Run
from torchhal_conformance.mutants.attention import outputs

SCALES: Final = ("key_scale", "value_scale")


def _scales(change: Callable[[Any, Tensor], Tensor], *names: str) -> Change:
    """``change(operands, scale)`` gives the scale used instead."""

    def make(run: Run, problem: Any) -> Run:
        def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
            if problem.key_scale is not None:
                changed = {name: change(operands, getattr(operands, name)) for name in names}
                operands = dataclasses.replace(operands, **changed)
            return run(q, k, v, mask, scale, operands)

        return faulty

    return make


def _of_first_head(operands: Any, scale: Tensor) -> Tensor:
    return (scale[:1] if scale.dim() == 1 else scale[:, :1]).expand(scale.shape)


def _of_next_page(operands: Any, scale: Tensor) -> Tensor:
    """Scales by another table than the page table, that is right as long as nobody moves a page."""
    return scale if scale.dim() == 1 else scale.roll(1, 0)


def _rounded(operands: Any, scale: Tensor) -> Tensor:
    return scale.to(torch.bfloat16).to(torch.float32)


def _nan_through_scales(p: Any, out: Tensor, lse: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    return out + (rest[-1].value_scale * 0.0).sum().to(out.dtype), lse


def _unsigned(run: Run, problem: Any) -> Run:
    """Bytes are read as 0 to 255."""

    def faulty(q: Any, k: Any, v: Any, mask: Any, scale: float, operands: Any) -> Any:
        if problem.value_dtype is not torch.int8:
            return run(q, k, v, mask, scale, operands)
        # Halves that int8 can hold: what is off is the sign.
        return run(
            q,
            k,
            v.to(torch.int16).remainder(256).div(2, rounding_mode="floor").to(torch.int8),
            mask,
            scale,
            operands,
        )

    return faulty


def _quantized(problem: Any) -> bool:
    return problem.key_scale is not None


_m = functools.partial(Mutant, family="attention")
_NUMBERS: Final = ("attention.numbers",)

MUTANTS: Final = (
    _m("first_head_scales", "the first head's scales serve all heads", _NUMBERS, _scales(_of_first_head, *SCALES)),
    _m("next_page_scales", "scales are those of another page", _NUMBERS, _scales(_of_next_page, *SCALES)),
    _m("narrow_scales", "scales are rounded to bfloat16", _NUMBERS, _scales(_rounded, *SCALES)),
    _m("unsigned_bytes", "the values' bytes are read without their sign", _NUMBERS, _unsigned),
    _m(
        "nan_through_scales", "scales of unused slots are multiplied by 0 instead of skipped", ("attention.page_poison",),
        outputs(_nan_through_scales, _quantized),
    ),
)  # fmt: skip
