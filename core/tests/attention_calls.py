"""Short ways to call the reference attention and a plain evaluation of it, for tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchhal.operands import AttentionOperands
from torchhal.pointwise import capture
from torchhal.problems import AttentionProblem
from torchhal.reference.attention import attention, score_dtype

NAN, INF = float("nan"), float("inf")
INDEX = torch.int32
BLOCK_FIELDS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")


def call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    layout: str = "dense",
    mask: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    block_size: tuple[int, int] | None = None,
    dropout_p: float = 0.0,
    compute: Callable[..., Any] = attention,
    features: frozenset[str] = frozenset(),
    **tensors: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE of the reference, or of ``compute`` in its place; ``tensors`` are fields of AttentionOperands."""
    score = captured_mod(score_mod, query, key, value)
    visible = captured_mod(mask_mod, None)
    problem = AttentionProblem(
        device=query.device,
        features=features,
        layout=layout,
        query_dtype=query.dtype,
        key_dtype=key.dtype,
        value_dtype=value.dtype,
        query_heads=query.shape[1],
        key_heads=key.shape[1],
        head_size=query.shape[-1],
        value_head_size=value.shape[-1],
        is_causal=is_causal,
        return_lse=True,
        mask_dtype=None if mask is None else mask.dtype,
        score_mod=score and score.graph,
        mask_mod=visible and visible.graph,
        block_size=block_size,
        page_size=key.shape[2] if layout == "paged" else None,
        dropout=dropout_p > 0,
    )
    operands = AttentionOperands(
        tuple(score.tensors) if score else (),
        tuple(visible.tensors) if visible else (),
        dropout_p=dropout_p,
        **tensors,
    )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result = compute(problem, query, key, value, mask, scale, operands)
    assert isinstance(result, tuple)
    return result


def captured_mod(function: Callable[..., Any] | None, *inputs: Tensor | None) -> Any:
    if function is None:
        return None
    indices = [(name, INDEX) for name in ("b", "h", "q_idx", "kv_idx")]
    if inputs == (None,):
        return capture(function, indices, what="mask_mod")
    dtype = score_dtype(*(tensor.dtype for tensor in inputs if tensor is not None))
    return capture(function, [("score", dtype), *indices], what="score_mod")


def plain(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Attention as anybody would write it in the inputs' own type, its probabilities rounded to that."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query @ key.mT).to(wide) * query.shape[-1] ** -0.5 + bias
    return scores.softmax(-1).to(value.dtype) @ value, scores.logsumexp(-1)


def qkv(
    b: int,
    hq: int,
    hkv: int,
    rows: int,
    keys: int,
    e: int,
    ev: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, hq, rows, e), (b, hkv, keys, e), (b, hkv, keys, ev))
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    )
    return query, key, value


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """Standard normal numbers, the same in every run."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def close(result: tuple[Tensor, Tensor], expected: Sequence[Any]) -> None:
    for got, want in zip(result, expected, strict=True):
        np.testing.assert_allclose(got.detach().to(torch.float64).numpy(), want, rtol=1e-11, atol=1e-12)


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def alibi(slopes: Any) -> Callable[..., Any]:
    return lambda score, b, h, q, k: score * 2 + slopes[h] * (q - k) - b


HIDERS: dict[str, dict[str, Any]] = {
    "is_causal": {"is_causal": True},
    "boolean mask": {"mask": torch.ones(6, 6, dtype=torch.bool).tril()},
    "additive mask": {"mask": torch.full((6, 6), -INF, dtype=torch.float64).triu(1)},
    "mask_mod": {"mask_mod": lambda b, h, q, k: k <= q},
    "score_mod": {"score_mod": lambda s, b, h, q, k: torch.where(k <= q, s, -float("inf"))},
}
"""Five ways to hide the same keys, those after the query."""
