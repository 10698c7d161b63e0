"""What this backend claims on suitable hardware; everything it does not name, it does not serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from torchhal.portable import attention, foreach, matmul
from torchhal.problems import Capabilities, DeployClaims

CAPABILITIES: Final = Capabilities(
    attention=replace(
        attention.CLAIMS,
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        boolean_mask=False,
        additive_mask=False,
    ),
    matmul=matmul.CLAIMS,
    foreach=foreach.CLAIMS,
    deploy=DeployClaims(tasks=frozenset({"compile_options", "profiler"})),
)
"""Of attention what the portable kernels do on Hopper by the conformance suite, in the types that its matrix units multiply.
They do float32 and dense masks too, which are not claimed: Triton lays sums out over threads as it loads a mask, so the last
bits of a result change with the mask's strides (H100, Triton 3.6)."""
