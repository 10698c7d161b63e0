"""torchhal: one PyTorch program, the best kernels on any hardware.

>>> import torch, torchhal
>>> q = k = v = torch.randn(1, 8, 128, 64)
>>> out = torchhal.attention(q, k, v, is_causal=True)

or, with a program that never heard of torchhal::

    with torchhal.enable():
        model(inputs)
"""

from __future__ import annotations

from torchhal import deploy, errors, pointwise
from torchhal.attention import attention, merge_attention, paged_attention, varlen_attention
from torchhal.cache import cache_store, load_cache, save_cache
from torchhal.context_parallel import context_parallel
from torchhal.foreach import foreach_map
from torchhal.hookspecs import hookimpl
from torchhal.installation import install
from torchhal.inventory import backends
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
    "backends",
    "cache_store",
    "context_parallel",
    "deploy",
    "enable",
    "errors",
    "explain",
    "foreach_map",
    "hookimpl",
    "install",
    "load_cache",
    "matmul",
    "merge_attention",
    "pack_weight",
    "paged_attention",
    "pointwise",
    "routes",
    "save_cache",
    "use",
    "varlen_attention",
]
