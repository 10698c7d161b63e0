"""Which engine computes a call of attention: the Triton kernels, or cuDNN where that was measured to be faster, or whichever
``torchhal tune`` found the fastest on the user's machine.

Under ``is_causal`` a NaN in the value of key 100 reached row 0 by cuDNN, and by torch's flash kernels alike (H100, torch
2.11.0+cu130, cuDNN 9.19, 2026-11-25); so after either engine the Triton kernels mend what is not finite
(:mod:`torchhal.portable.engine`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from torchhal.portable import gradients
from torchhal.portable.engine import Engine
from torchhal.problems import AttentionProblem, Decline
from torchhal_cuda128 import fa4
from torchhal_cuda128.hardware import Device
from torchhal_cuda128.lengths import Least, regular, seen_keys

NAMES: Final[Mapping[str, str]] = {"fa4": "FlashAttention-4", "cudnn": "cuDNN"}
"""The engines beside the Triton kernels, and what a person calls them."""

JUDGED: Final = frozenset({"cudnn"})
"""Engines that serve wherever a rule says that they are faster. The suite has not been passed with FlashAttention-4 yet, so
that serves only where the user's own measurement chose it (``torchhal tune``, whose lock file names ``cuda128:fa4``)."""


@dataclass(frozen=True)
class Rule:
    """Where an engine was faster than the Triton kernels."""

    engine: str
    major: int
    """Compute capability."""
    head_size: int
    causal: bool
    backward: bool
    """With gradients, or without."""
    least: int
    """Query rows, and keys, from which on it was."""
    measured: str
    """Microseconds of the engine, mending included, and of the Triton kernels, by length; with gradients of both passes together."""


RULES: Final = (
    Rule("fa4", 9, 64, True, True, 4096, "4096: 1647 and 1884; 2048: 1392 and 1009"),
    Rule("fa4", 9, 128, True, True, 4096, "4096: 2917 and 3452; 2048: 1326 and 1349"),
    Rule("fa4", 9, 64, False, True, 4096, "4096: 2461 and 3252; 2048: 1074 and 1020"),
    Rule("fa4", 9, 128, False, True, 2048, "4096: 4388 and 5926; 2048: 1674 and 1760; 1024: 980 and 871"),
    Rule("cudnn", 9, 64, True, False, 2048, "4096: 360 and 405; 2048: 110 and 125; 1024: 45 and 43"),
    Rule("cudnn", 9, 128, True, False, 2048, "4096: 570 and 677; 2048: 190 and 209; 1024: 93 and 88"),
    Rule("cudnn", 9, 64, False, False, 512, "4096: 599 and 764; 2048: 155 and 206; 1024: 46 and 67; 512: 18 and 30"),
    Rule("cudnn", 9, 128, False, False, 512, "4096: 866 and 1239; 2048: 218 and 368; 1024: 62 and 149; 512: 36 and 117"),
)  # fmt: skip
"""H100, torch 2.11.0+cu130, Triton 3.6.0, cuDNN 9.19, flash-attn-4 4.0.0b36, 2026-11-25: bfloat16, B=4, 16 query heads over 4, L = S."""

UNMEASURED: Final = 512
"""Rows and keys from which on an engine without a rule serves, where a user's own measurement chose it."""


def able(problem: AttentionProblem, device: Device, fa4_version: str | None) -> dict[str, Decline | None]:
    """For each engine why it can not serve a problem whatever the lengths, or None where it can."""
    return {
        "fa4": fa4.decline(problem, device, fa4_version),
        "cudnn": _cudnn_declines(problem),
    }


def rule_for(name: str, problem: AttentionProblem, device: Device) -> Rule | Decline:
    """The rule by which an engine that can serve a problem does, or that nobody has measured it to be faster there."""
    for rule in RULES:
        if rule.engine == name and _covers(rule, problem, device):
            return rule
    asked = f"head sizes {problem.head_size} and {problem.value_head_size}"
    asked += (", causal" if problem.is_causal else ", full") + (
        ", with gradients" if gradients.are_wanted(problem) else ""
    )
    return Decline(
        f"{name}_unmeasured",
        f"{NAMES[name]} was not measured to be faster than the Triton kernels on {device.architecture} for {asked}",
    )


def _covers(rule: Rule, problem: AttentionProblem, device: Device) -> bool:
    asked = (
        device.capability[0], problem.head_size, problem.value_head_size, problem.is_causal, gradients.are_wanted(problem),
    )  # fmt: skip
    return asked == (rule.major, rule.head_size, rule.head_size, rule.causal, rule.backward)


def engine(name: str, problem: AttentionProblem, least: int) -> Engine:
    """An engine that :func:`able` lets pass, for calls of at least so many rows and keys."""
    return fa4.engine(problem, least) if name == "fa4" else _cudnn(problem, least)


# ---------------------------------------------------------------------------- cuDNN


def _cudnn_declines(problem: AttentionProblem) -> Decline | None:
    if problem.layout != "dense" or problem.page_size is not None:
        return Decline("cudnn_layout", f"cuDNN is not used for the layout {problem.layout!r}")
    if problem.mask_dtype is not None or problem.block_size is not None or problem.mask_mod is not None:
        return Decline("cudnn_mask", "cuDNN is not used with masks and BlockMasks")
    if problem.score_mod is not None:
        return Decline("cudnn_score_mod", "cuDNN takes no functions")
    if problem.dropout:
        return Decline("cudnn_dropout", "cuDNN draws other random numbers than the specification's")
    sizes = problem.head_size, problem.value_head_size
    if sizes[0] != sizes[1] or sizes[0] not in fa4.HEAD_SIZES:
        return Decline(
            "cudnn_head_size",
            f"cuDNN is used at head sizes 64 and 128, where it was tried, not at {sizes[0]} and {sizes[1]}",
        )
    if gradients.are_wanted(problem) or problem.return_lse:
        return Decline("cudnn_lse", "the LSE, which gradients start from, is taken from the Triton kernels")
    return None


def _cudnn(problem: AttentionProblem, least: int) -> Engine:
    """Attention by cuDNN, through torch.

    It is always given contiguous tensors, copied where they are not: which of its kernels it takes, and so the last bits of
    a result, may depend on strides, and in the specification they do not.
    """
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    causal = problem.is_causal

    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        tensors: list[Any] = [regular(t) for t in (query, *seen_keys(causal, query, key, value))]
        out: Tensor = attend(*tensors, None, False, 0.0, causal, False, scale=scale)[0]
        return out, query.new_empty((0,), dtype=torch.float32)

    return Engine(Least(least, causal), forward)
