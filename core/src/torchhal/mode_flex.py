"""torch's flex_attention under the mode: the operator it ends in, read back into a torchhal call."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from torchhal.attention import attention
from torchhal.problems import AttentionProblem
from torchhal.registry import REFERENCE, registry

if TYPE_CHECKING:
    from torchhal.mode import Mode

_flex: Final = torch.ops.higher_order.flex_attention
_LOG2E: Final = 1.0 / math.log(2.0)
_NO_BLOCKS: Final = 1 << 30
"""Block size of the mask torch makes up when it is given none."""


def flex_attention(
    mode: Mode, query: Tensor, key: Tensor, value: Tensor, score_mod: Any, block_mask: tuple[Any, ...], scale: float, options: dict[str, Any], *rest: Any
) -> Any:
    """Serve a flex_attention call, or hand it to torch."""
    return _flex(query, key, value, score_mod, block_mask, scale, options, *rest)
