"""Weights in blocks of GGUF files: random ones, and what each byte stands for."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

ELEMENTS: Final = 32
"""Of a block."""
KINDS: Final = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
"""Bytes of a block: a float16 scale, of q4_1 a float16 minimum, then the quants."""
_USUAL: Final = {"q4_0": 4.6, "q4_1": 4.6, "q8_0": 74.0}
"""Root mean square of a quant: scales are such that weights are of about the size of any others."""


def drawn(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """(columns, rows / 32 * bytes) uint8 for a weight (rows, columns): every quant is as likely, no two scales alike."""
    blocks = rows // ELEMENTS
    scale = (0.5 + torch.rand(columns, blocks, 1, generator=generator, dtype=torch.float64)) / _USUAL[kind]
    head = [scale]
    if kind == "q4_1":
        head.append(
            -scale * (7.5 + torch.randn(columns, blocks, 1, generator=generator, dtype=torch.float64))
        )
    numbers = torch.cat(head, -1).to(torch.float16).view(torch.uint8)
    size = KINDS[kind] - numbers.shape[-1]
    quants = torch.randint(0, 256, (columns, blocks, size), generator=generator, dtype=torch.uint8)
    return torch.cat((numbers, quants), -1).reshape(columns, blocks * KINDS[kind])


def decoded(kind: str, data: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (K, N) that blocks (N, bytes) stand for, computed in ``dtype``: element by element of a block."""
    size = KINDS[kind]
    columns, blocks = data.shape[0], data.shape[1] // size
    whole = data.reshape(columns, blocks, size).to(torch.int32)

    def half(at: int) -> Tensor:
        bits = whole[..., at] + 256 * whole[..., at + 1]
        return torch.where(bits < 2**15, bits, bits - 2**16).to(torch.int16).view(torch.float16).to(dtype)

    scale, first = half(0), 4 if kind == "q4_1" else 2
    elements = []
    for i in range(ELEMENTS):
        if kind == "q8_0":
            byte = whole[..., first + i]
            quant = torch.where(byte < 128, byte, byte - 256)
        else:
            byte = whole[..., first + i % 16]
            quant = byte % 16 if i < 16 else byte // 16
        if kind == "q4_1":
            elements.append(scale * quant.to(dtype) + half(2))
        else:
            elements.append(scale * (quant - 8 * (kind == "q4_0")).to(dtype))
    return torch.stack(elements, -1).reshape(columns, blocks * ELEMENTS).T
