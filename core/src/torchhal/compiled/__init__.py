"""The public functions as torch.compile sees them; each leaves one node in the graph."""

from __future__ import annotations

from torchhal.compiled.attention import attention, paged_attention, scaled_dot_product_attention, varlen_attention

__all__ = ["attention", "paged_attention", "scaled_dot_product_attention", "varlen_attention"]
