"""torchhal: one PyTorch program, the best kernels on any hardware.

>>> import torch, torchhal
>>> q = k = v = torch.randn(1, 8, 128, 64)
>>> out = torchhal.attention(q, k, v, is_causal=True)

or, with a program that never heard of torchhal::

    with torchhal.enable():
        model(inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from torchhal import errors, pointwise
from torchhal.attention import attention, merge_attention, paged_attention, varlen_attention
from torchhal.context_parallel import context_parallel
from torchhal.hookspecs import hookimpl
from torchhal.matmul import gguf_weight, matmul, pack_weight
from torchhal.problems import SPEC_VERSION, BackendInfo, Capabilities, Decline, Plan, Problem
from torchhal.scope import use
from torchhal.selection import Route, explain, routes

if TYPE_CHECKING:
    from torchhal import deploy, nn, optim
    from torchhal.block_masks import create_block_mask
    from torchhal.cache import cache_store, load_cache, save_cache
    from torchhal.foreach import foreach_map
    from torchhal.installation import install
    from torchhal.inventory import backends
    from torchhal.mode import enable
    from torchhal.paged_cache import PagedKVCache
    from torchhal.reductions import foreach_any_nonfinite, foreach_norm, foreach_reduce

_WHEN_ASKED_FOR: Final = {
    "PagedKVCache": "torchhal.paged_cache",
    "backends": "torchhal.inventory",
    "cache_store": "torchhal.cache",
    "create_block_mask": "torchhal.block_masks",
    "deploy": "",
    "enable": "torchhal.mode",
    "foreach_any_nonfinite": "torchhal.reductions",
    "foreach_map": "torchhal.foreach",
    "foreach_norm": "torchhal.reductions",
    "foreach_reduce": "torchhal.reductions",
    "install": "torchhal.installation",
    "load_cache": "torchhal.cache",
    "nn": "",
    "optim": "",
    "save_cache": "torchhal.cache",
}
"""Names that cost a third of the time of ``import torchhal``, and the modules they come from, imported on first use."""


def __getattr__(name: str) -> Any:
    if name not in _WHEN_ASKED_FOR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _WHEN_ASKED_FOR[name]
    found = getattr(import_module(module), name) if module else import_module(f"{__name__}.{name}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "SPEC_VERSION",
    "BackendInfo",
    "Capabilities",
    "Decline",
    "PagedKVCache",
    "Plan",
    "Problem",
    "Route",
    "attention",
    "backends",
    "cache_store",
    "context_parallel",
    "create_block_mask",
    "deploy",
    "enable",
    "errors",
    "explain",
    "foreach_any_nonfinite",
    "foreach_map",
    "foreach_norm",
    "foreach_reduce",
    "gguf_weight",
    "hookimpl",
    "install",
    "load_cache",
    "matmul",
    "merge_attention",
    "nn",
    "optim",
    "pack_weight",
    "paged_attention",
    "pointwise",
    "routes",
    "save_cache",
    "use",
    "varlen_attention",
]
