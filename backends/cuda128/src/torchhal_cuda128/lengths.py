"""Which lengths an engine serves, and its tensors as it can read them: what cuDNN and FlashAttention-4 have in common."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes, of pointers and of all strides but the last: what the bulk copies of the hardware need."""


@dataclass(frozen=True)
class Least:
    """Serves calls of at least so many query rows and keys, and a positive scale."""

    rows: int
    causal: bool

    def __call__(self, query: Tensor, key: Tensor, scale: float) -> bool:
        """Whether a call is served. Of causal ones those with no fewer keys than rows: both engines align at the bottom right,
        and without the keys that no row sees (:func:`seen_keys`) that is the top left.
        """
        rows, keys = query.shape[2], key.shape[2]
        fits = keys >= rows if self.causal else True
        return scale > 0 and min(rows, keys) >= self.rows and fits and query.numel() > 0


def seen_keys(causal: bool, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values without those that are hidden from every row."""
    rows = query.shape[2]
    return (key[:, :, :rows], value[:, :, :rows]) if causal and key.shape[2] > rows else (key, value)


def regular(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes: itself, or a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor with elements of a row side by side, rows at multiples of 16 bytes, and no dimension of stride 0: itself, or a
    contiguous copy.
    """
    size = tensor.element_size()
    *outer, inner = tensor.stride()
    fits = inner == 1 and all(step > 0 and step * size % ALIGNMENT == 0 for step in outer)
    if fits and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
