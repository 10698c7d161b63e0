"""What this backend claims."""

from __future__ import annotations

from typing import Final

import torch

from torchhal import Capabilities
from torchhal.pointwise.dtypes import DTYPES
from torchhal.problems import AttentionClaims, ForeachClaims, MatmulClaims

CAPABILITIES: Final = Capabilities(
    attention=AttentionClaims(
        dtypes=frozenset(
            {
                torch.float32,
                torch.bfloat16,
                torch.float16,
                torch.float64,
                torch.int8,
                torch.float8_e4m3fn,  # of pages
            }
        ),
        layouts=frozenset({"dense", "varlen", "paged"}),
        causal=True,
        boolean_mask=True,
        additive_mask=True,
        gqa=True,
        value_head_size=True,
        lse=True,
        max_scores=True,
        score_mod=True,
        mask_mod=True,
        captured_tensors=True,
        dropout=True,
        backward=True,
        mask_gradient=True,
        captured_gradient=True,
        quantized_kv=True,
    ),
    matmul=MatmulClaims(
        dtypes=frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64}),
        batched=True,
        bias=True,
        a_prologue=True,
        b_prologue=True,
        epilogue=True,
        auxiliary_outputs=True,
        captured_tensors=True,
        packed_int8=True,
        packed_int4=True,
        packed_gguf=True,
        mixed_dtypes=True,
        backward=True,
        captured_gradient=True,
    ),
    foreach=ForeachClaims(
        dtypes=frozenset(DTYPES),
        in_place=True,
        scalars=True,
        mixed_dtypes=True,
        several_outputs=True,
        captured_tensors=True,
        backward=True,
        captured_gradient=True,
        reduction=True,
    ),
)
