"""torch's flex_attention under the mode: the operator it ends in, read back into a torchhal call.

In eager mode torch compiles that operator alone and in a compiled program it traces it, so the handler is
always reached through Dynamo, except with torch's own switch for debugging user functions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, _identity, noop_mask

from torchhal import environment, scope
from torchhal._tracing import constant_while_tracing
from torchhal.attention import attention
from torchhal.problems import AttentionProblem
from torchhal.reference.attention import score_dtype
from torchhal.registry import REFERENCE, registry

if TYPE_CHECKING:
    from torchhal.mode import Mode

torchs_own: Final = torch.ops.higher_order.flex_attention
_LOG2E: Final = 1.0 / math.log(2.0)
_NO_BLOCKS: Final = 1 << 30
"""Block size of the mask that torch makes up when it is given none."""


def flex_attention(
    mode: Mode,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score_mod: Any,
    block_mask: tuple[Any, ...],
    scale: float,
    options: dict[str, Any],
    *rest: Any,
) -> Any:
    """Serve a flex_attention call, or hand it to torch.

    Torch keeps calls that ask for one of its own kernels by name, and those for which no backend but the reference
    claims what the call needs.
    """
    rows, columns, mask_mod = block_mask[-3:]
    score_mod = None if score_mod is _identity else score_mod
    masked = not (rows == _NO_BLOCKS and columns == _NO_BLOCKS and mask_mod is noop_mask)
    wants_lse = bool(options.get("OUTPUT_LOGSUMEXP", False))
    wants_maxima = bool(options.get("OUTPUT_MAX", False))
    features = _features(query, key, value, score_mod is not None, masked, wants_lse, wants_maxima)
    autocast = torch.is_autocast_enabled(query.device.type)
    special = autocast or options.get("BACKEND", "AUTO") != "AUTO"
    if special or not improvable(
        mode.backend, query.device, query.dtype, features, scope.current.state is scope.current
    ):
        return torchs_own(query, key, value, score_mod or _identity, block_mask, scale, options, *rest)
    result = attention(
        query,
        key,
        value,
        score_mod=score_mod,
        block_mask=_BlockMask(block_mask) if masked else None,
        scale=scale,
        enable_gqa=True,
        return_lse=wants_lse,
        return_max_scores=wants_maxima,
        backend=mode.backend,
    )
    out, *rows = result if isinstance(result, tuple) else (result,)
    nothing = query.new_empty(0, dtype=score_dtype(query.dtype))
    lse = rows.pop(0) * _LOG2E if wants_lse else nothing
    return out, lse, rows.pop(0) * _LOG2E if wants_maxima else nothing


class _BlockMask(BlockMask):
    """A BlockMask made again from the tuple that torch hands its operator; only what attention reads."""

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.seq_lengths = (parts[0], parts[1])
        self.kv_num_blocks, self.kv_indices, self.full_kv_num_blocks, self.full_kv_indices = parts[2:6]
        self.BLOCK_SIZE = (parts[-3], parts[-2])
        self.mask_mod = parts[-1]


def _features(
    query: Tensor, key: Tensor, value: Tensor, modified: bool, masked: bool, lse: bool, maxima: bool
) -> str:
    names = []
    if modified:
        names.append("score_mod")
    if masked:
        names.append("mask_mod")
    if lse or maxima:
        names.append("lse")
    if maxima:
        names.append("max_scores")
    if query.shape[1] != key.shape[1]:
        names.append("gqa")
    if query.shape[-1] != value.shape[-1]:
        names.append("value_head_size")
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        names.append("backward")
    return ",".join(names)


@constant_while_tracing
def improvable(
    backend: str | None, device: torch.device, dtype: torch.dtype, features: str, unscoped: bool
) -> bool:
    """Whether someone besides the reference claims such a call, or the user chose who is to serve it."""
    chosen = backend or (None if unscoped else scope.chosen_backend())
    names = [chosen] if chosen else (environment.preferred_backends("attention") or ([], ""))[0]
    if names:
        return any(registry().get(name).info.capabilities.attention is not None for name in names)
    asked = frozenset(features.split(",")) if features else frozenset()
    problem = AttentionProblem(
        device=device, features=asked, query_dtype=dtype, key_dtype=dtype, value_dtype=dtype
    )
    others = (b for b in registry().backends.values() if b.name != REFERENCE and b.serves(problem))
    return any(b.info.capabilities.refuse(problem) is None for b in others)
