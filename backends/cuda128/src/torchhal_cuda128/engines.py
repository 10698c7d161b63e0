"""Which engine computes a call of attention: the Triton kernels, or cuDNN through torch where it was measured to be faster.

cuDNN serves what hides no key from any row, forward. Elsewhere it does not keep the contract: under ``is_causal`` a NaN in the
value of key 100 reached row 0, by cuDNN and by torch's flash kernels alike (H100, torch 2.11.0+cu130, cuDNN 9.19, 2026-11-25).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.operands import AttentionOperands
from torchhal.portable import gradients
from torchhal.problems import AttentionProblem, Decline
from torchhal_cuda128.hardware import Device


@dataclass(frozen=True)
class Rule:
    """Where cuDNN was faster than the Triton kernels."""

    major: int
    """Compute capability."""
    head_size: int
    least: int
    """Query rows, and keys, from which on it was."""
    measured: str
    """Microseconds of cuDNN and of the Triton kernels, the host's time included, by length."""


RULES: Final = (
    Rule(9, 64, 512, "512: 19 and 35; 1024: 47 and 65; 2048: 155 and 179; 4096: 590 and 687"),
    Rule(9, 128, 512, "512: 25 and 31; 1024: 63 and 85; 2048: 218 and 295; 4096: 891 and 1147"),
)
"""H100, torch 2.11.0+cu130, Triton 3.6.0, cuDNN 9.19, 2026-11-25: bfloat16, full attention, B=4, 16 query heads over 4, L = S."""


def rule_for(problem: AttentionProblem, device: Device) -> Rule | Decline:
    """The rule by which cuDNN serves long calls of a problem, or why it serves none."""
    if problem.layout != "dense" or problem.page_size is not None:
        return Decline("cudnn_layout", f"cuDNN is not used for the layout {problem.layout!r}")
    hides = problem.is_causal or problem.mask_dtype is not None or problem.block_size is not None
    if hides or problem.mask_mod is not None:
        return Decline("cudnn_hides", "in cuDNN a NaN in a hidden value reaches rows that do not see it")
    if problem.score_mod is not None:
        return Decline("cudnn_score_mod", "cuDNN takes no functions")
    if problem.dropout:
        return Decline("cudnn_dropout", "cuDNN draws other random numbers than the specification's")
    if gradients.are_wanted(problem) or problem.return_lse:
        return Decline("cudnn_lse", "the LSE, which gradients start from, is taken from the Triton kernels")
    if problem.head_size == problem.value_head_size:
        for rule in RULES:
            if (rule.major, rule.head_size) == (device.capability[0], problem.head_size):
                return rule
    return Decline(
        "cudnn_unmeasured",
        f"cuDNN was not measured for head sizes {problem.head_size} and {problem.value_head_size} on {device.architecture}",
    )


def with_cudnn(run: Callable[..., Any], rule: Rule) -> Callable[..., Any]:
    """``run`` for short calls, and cuDNN for long ones.

    It is always given contiguous tensors, copied where they are not: which of its kernels it takes, and so the last bits of
    a result, may depend on strides, and in the specification they do not.
    """
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default

    def choose(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        scale: float,
        operands: AttentionOperands | None,
    ) -> Any:
        long = query.shape[2] >= rule.least and key.shape[2] >= rule.least
        if not (long and query.numel() and scale > 0):
            return run(query, key, value, attn_mask, scale, operands)
        tensors = (regular(tensor) for tensor in (query, key, value))
        return attend(*tensors, None, False, 0.0, False, False, scale=scale)[0]

    return choose


def regular(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and at a multiple of 16 bytes: itself, or a copy."""
    if tensor.is_contiguous() and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
