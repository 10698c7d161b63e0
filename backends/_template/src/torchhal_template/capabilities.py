"""What this backend claims. Start with almost nothing and turn claims on one at a time."""

from __future__ import annotations

from typing import Final

import torch

from torchhal.problems import AttentionClaims, Capabilities

CAPABILITIES: Final = Capabilities(
    attention=AttentionClaims(
        dtypes=frozenset({torch.float32}),
        layouts=frozenset({"dense"}),
        value_head_size=True,
        lse=True,
    )
)
