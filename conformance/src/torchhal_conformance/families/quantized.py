"""Quantised pages for the attention family: stored numbers, their scales, and what they stand for."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

STORED: Final = (torch.int8, torch.float8_e4m3fn)
SCALED: Final = ("head", "token")
"""Whether a scale is that of a head or of a token in a head."""

_USUAL: Final = {torch.int8: 64.0, torch.float8_e4m3fn: 128.0}
"""What about stands for 1: numbers and scales are such that keys and values are of about the size of any others."""


def stored(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Finite stored numbers, all of the type's range among them."""
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * _USUAL[dtype]
    if dtype is torch.int8:
        return drawn.round().clamp(-128, 127).to(dtype)
    return drawn.clamp(-448, 448).to(dtype)


def scales(pages: Tensor, scaled: str, generator: torch.Generator) -> Tensor:
    """(Hkv,) or (P, Hkv, page_size) float32 for pages (P, Hkv, page_size, E); no two alike."""
    shape = pages.shape[1:2] if scaled == "head" else pages.shape[:3]
    drawn = 0.25 + 1.5 * torch.rand(*shape, generator=generator, dtype=torch.float64)
    return (drawn / _USUAL[pages.dtype]).to(pages.device, torch.float32)


def dequantized(pages: Tensor, scale: Tensor) -> Tensor:
    """In float64, where the product of a stored number and its scale is exact."""
    factors = scale.double()
    return pages.double() * (factors[:, None, None] if scale.dim() == 1 else factors[..., None])


def poisoned(pages: Tensor, scale: Tensor | None, unused: Tensor) -> tuple[Tensor, Tensor | None]:
    """Pages, and scales if each token has its own, with NaN in the slots (P, page_size) that are ``unused``.

    int8, which has no NaN, gets its largest number.
    """
    hidden = unused[:, None, :, None].to(pages.device)
    if pages.dtype in STORED:
        # All bits but the sign's: NaN in float8_e4m3fn, for which torch has no masked_fill.
        spoiled = pages.view(torch.uint8).masked_fill(hidden, 0x7F).view(pages.dtype)
    else:
        spoiled = pages.masked_fill(hidden, torch.nan)
    if scale is not None and scale.dim() == 3:
        scale = scale.masked_fill(hidden[..., 0], torch.nan)
    return spoiled, scale
