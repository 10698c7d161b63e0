"""Plans for attention: which native operator serves a problem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchhal import Decline, Plan
from torchhal.problems import AttentionProblem
from torchhal_cpu_x86 import flex, gradients, hardware, native

MASK_DTYPES = frozenset({torch.bool, *native.DTYPES})
NARROW_MASKS = MASK_DTYPES - {torch.float64}
"""What is read beside a query that is not float64."""


def plan(problem: AttentionProblem) -> Plan | Decline:
    """The native plan for a problem, or why this machine has none."""
    refusal = hardware.decline()
    if refusal is not None:
        return refusal
    wide = problem.query_dtype is torch.float64
    if problem.mask_dtype is not None and problem.mask_dtype not in (MASK_DTYPES if wide else NARROW_MASKS):
        return Decline(
            "mask_dtype",
            f"a mask of {problem.mask_dtype} is not served; the kernels read bool, float32, bfloat16 and float16, and "
            "float64 beside a query of that type",
        )
    if "quantized_kv" in problem.features and gradients.are_wanted(problem):
        return Decline(
            "quantized_gradient", "quantised keys and values belong to inference; dequantise them to train"
        )
    isa = native.load().get_isa(problem.query_dtype)
    needs_flex = flex.is_needed(problem)
    return Plan(
        run=flex.runner(problem) if needs_flex else _runner(problem),
        description=f"native, {isa}, tiled prefill and split-key decode"
        + (_functions(problem) if needs_flex else ""),
        deterministic=True,
        differentiable=gradients.are_wanted(problem),
        traceable=True,
        workspace="O(L + S)" if problem.block_size is not None else "O(threads)",
    )


def _functions(problem: AttentionProblem) -> str:
    """What else the kernels do, for a person."""
    parts = [] if problem.layout == "dense" else [f"{problem.layout} sequences"]
    if problem.key_scale is not None:
        parts.append("dequantised in registers")
    if problem.score_mod is not None or problem.mask_mod is not None:
        parts.append("functions by the vector machine")
    if problem.block_size is not None:
        parts.append("empty blocks skipped")
    return "".join(f", {part}" for part in parts)


def _runner(problem: AttentionProblem) -> Callable[..., Any]:
    """A call of the operator for the problem's mask and LSE, with what the problem fixes bound."""
    operators = torch.ops.torchhal_cpu_x86
    causal = problem.is_causal
    if problem.mask_dtype is None:
        plain = operators.attention_lse.default if problem.return_lse else operators.attention.default

        def run(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None,
            scale: float,
            operands: object,
        ) -> Any:
            return plain(query, key, value, causal, scale)

        return run
    masked = (
        operators.masked_attention_lse.default if problem.return_lse else operators.masked_attention.default
    )

    def run_masked(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float, operands: object
    ) -> Any:
        return masked(query, key, value, attn_mask, causal, scale)

    return run_masked
