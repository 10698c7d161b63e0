"""torchhal: one PyTorch program, the best kernels on any hardware.

>>> import torch, torchhal
>>> q = k = v = torch.randn(1, 8, 128, 64)
>>> out = torchhal.attention(q, k, v, is_causal=True)

or, with a program that never heard of torchhal::

    with torchhal.enable():
        model(inputs)
"""

from __future__ import annotations

from torchhal import errors, pointwise
from torchhal.attention import attention, merge_attention, paged_attention, varlen_attention

from torchhal.foreach import foreach_map
from torchhal.hookspecs import hookimpl
from torchhal.matmul import matmul, pack_weight
from torchhal.mode import enable
from torchhal.problems import SPEC_VERSION, BackendInfo, Capabilities, Decline, Plan, Problem
from torchhal.scope import use
from torchhal.selection import Route, explain, routes

__all__ = [
    "SPEC_VERSION",
    "BackendInfo",
    "Capabilities",
    "Decline",
    "Plan",
    "Problem",
    "Route",
    "attention",

    "enable",
    "errors",
    "explain",
    "foreach_map",
    "hookimpl",
    "matmul",
    "merge_attention",
    "pack_weight",
    "paged_attention",
    "pointwise",
    "routes",
    "use",
    "varlen_attention",
]
