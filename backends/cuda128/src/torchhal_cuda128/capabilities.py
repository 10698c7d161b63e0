"""What this backend claims on suitable hardware; everything it does not name, it does not serve."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import torch

from torchhal.portable import attention
from torchhal.problems import Capabilities, DeployClaims

CAPABILITIES: Final = Capabilities(
    attention=replace(attention.CLAIMS, dtypes=frozenset({torch.bfloat16, torch.float16})),
    deploy=DeployClaims(tasks=frozenset({"compile_options", "profiler"})),
)
"""Of attention what the portable kernels do, in the types that the matrix units of Hopper multiply. They do float32 too,
and it is not claimed: on Hopper its last bits depended on the strides of a mask, and the mended kernels have not run there."""
