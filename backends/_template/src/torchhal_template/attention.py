"""Attention without masks, in plain torch. A real backend launches its kernel in ``run``."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchhal.problems import AttentionProblem, Decline, Plan


def plan(problem: AttentionProblem) -> Plan | Decline:
    """The plan for a problem whose features are all claimed: the core has seen to that."""
    if problem.head_size == 0:
        return Decline("empty_head", "a head size of 0 gives no scores to compute")
    run = partial(_run, return_lse=problem.return_lse)
    return Plan(run=run, description="plain torch: matmul, softmax, matmul", workspace="O(B H L S)")


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: None,
    scale: float,
    operands: Any,
    *,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    # torch's products choose a kernel by strides and alignment; copies make every layout give the same bits.
    query, key, value = (t.clone(memory_format=torch.contiguous_format) for t in (query, key, value))
    scores = query @ key.transpose(-2, -1) * scale
    out = torch.softmax(scores, dim=-1) @ value
    return (out, torch.logsumexp(scores, dim=-1)) if return_lse else out
