"""Torch's eager type promotion, decided from dtypes and from how strongly each operand counts."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import torch

from torchhal.pointwise.dtypes import is_float, promote


class Kind(IntEnum):
    """How much an operand's dtype counts: an input or what depends on one, a 0-dim tensor, a Python number."""

    NUMBER = 0
    SCALAR = 1
    LANE = 2


def result_type(operands: Iterable[tuple[torch.dtype, Kind]]) -> torch.dtype:
    """The dtype torch computes in: like ``torch.result_type`` on 1-D, 0-dim and Python operands.

    A weaker kind raises the category (bool, integer, floating) but never the width within one; a
    Python float stands for torch's default dtype, a Python int for int64.
    """
    groups: dict[Kind, torch.dtype] = {}
    for dtype, kind in operands:
        if kind is Kind.NUMBER and is_float(dtype):
            dtype = torch.get_default_dtype()
        known = groups.get(kind)
        groups[kind] = dtype if known is None or known is dtype else promote(known, dtype)
    result: torch.dtype | None = None
    for kind in (Kind.NUMBER, Kind.SCALAR, Kind.LANE):
        if kind in groups:
            result = groups[kind] if result is None else _combine(groups[kind], result)
    assert result is not None
    return result


def _combine(strong: torch.dtype, weak: torch.dtype) -> torch.dtype:
    """c10's ``combine_categories``: ``weak`` matters only where it is of a higher category."""
    if is_float(strong) or strong is weak:
        return strong
    if strong is torch.bool or is_float(weak):
        return promote(strong, weak)
    return strong


def number_type(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of Python arithmetic on Python numbers: float64 with a float in it, else int64."""
    return torch.float64 if any(is_float(dtype) for dtype in dtypes) else torch.int64
