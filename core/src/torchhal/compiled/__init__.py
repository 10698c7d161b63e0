"""The public functions as torch.compile sees them; each leaves one node in the graph."""

from __future__ import annotations

from torchhal.compiled.attention import (
    attention,
    paged_attention,
    scaled_dot_product_attention,
    varlen_attention,
)
from torchhal.compiled.foreach import foreach_map
from torchhal.compiled.matmul import matmul

__all__ = [
    "attention",
    "foreach_map",
    "matmul",
    "paged_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
