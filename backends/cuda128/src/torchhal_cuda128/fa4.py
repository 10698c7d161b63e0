"""FlashAttention-4: which calls it can serve, and how it is called.

The distribution ``flash-attn-4`` (import name ``flash_attn.cute``) has kernels for Hopper and for data-centre Blackwell, written
in a Python dialect that is compiled when a kernel is first needed. It is optional, and serves where ``torchhal tune`` chose it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from torchhal.errors import BackendWarning
from torchhal.operands import empty_output
from torchhal.portable import gradients
from torchhal.portable.engine import Engine
from torchhal.problems import AttentionProblem, Decline
from torchhal_cuda128.hardware import Device
from torchhal_cuda128.lengths import Least, aligned, regular, seen_keys

FAMILIES: Final = frozenset({9, 10})
"""Compute capability majors with kernels here. It has some for 12 too, with mma.sync and without paged keys, split keys and
deterministic gradients; they were never run here, and 12 is not a newer 10."""
VERSIONS: Final = SpecifierSet(">=4.0.0b36,<4.1", prereleases=True)
"""Releases whose functions are those that are called here."""
MODULE: Final = "flash_attn.cute.interface"
HEAD_SIZES: Final = (64, 128)
"""Of queries, keys and values alike. It has kernels for more; of those, on an H100 (4.0.0b36, 2026-11-25), the gradient of the
query at head size 16 was 0 in row 64 of 65, and after 8 with values of 40 came an illegal memory access."""
DTYPES: Final = (torch.bfloat16, torch.float16)


def unavailable(version: str | None) -> Decline | None:
    """Why an installed version (None: there is none) is not used, or None where it is."""
    if version is None:
        reason = "FlashAttention-4 is not installed; it is optional, and can make long training faster, which `torchhal tune` measures"
        return Decline("fa4_missing", reason)
    if version not in VERSIONS:
        reason = f"flash-attn-4 is {version}; this backend was written for {VERSIONS}"
        return Decline("fa4_incompatible", reason)
    return None


def decline(problem: AttentionProblem, device: Device, version: str | None) -> Decline | None:
    """Why it does not serve a problem that the Triton kernels serve, whatever the lengths; None where it can."""
    return unavailable(version) or _outside(problem) or _heads(problem, device)


def _outside(problem: AttentionProblem) -> Decline | None:
    """What of a problem it is not given."""
    if problem.layout == "varlen":
        why = "its tiles reach into the next sequence, whose NaN would change the bits of this one"
        return Decline("fa4_layout", f"FlashAttention-4 is not used for packed sequences: {why}")
    if problem.layout != "dense":
        why = "the pages of few rows, as in decoding, are read faster with their keys split over programs, which it does on 10.x alone"
        return Decline("fa4_layout", f"FlashAttention-4 is not used for the layout {problem.layout!r}: {why}")
    if problem.mask_dtype is not None:
        return Decline("fa4_mask", "FlashAttention-4 takes no mask in a tensor")
    if problem.score_mod or problem.mask_mod or problem.block_size:
        why = "it takes functions in a dialect of its own, and a BlockMask with them"
        return Decline("fa4_functions", f"FlashAttention-4 is not given captured functions: {why}")
    if problem.dropout:
        return Decline("fa4_dropout", "FlashAttention-4 has no dropout")
    if len(problem.dtypes) > 1 or problem.query_dtype not in DTYPES:
        found = ", ".join(sorted(map(str, problem.dtypes)))
        return Decline(
            "fa4_dtype", f"FlashAttention-4 takes bfloat16 or float16 for all three tensors, not {found}"
        )
    return None


def _heads(problem: AttentionProblem, device: Device) -> Decline | None:
    """The families and head sizes on which it was found to be right."""
    if device.capability[0] not in FAMILIES:
        names = f"{device.name} has compute capability {device.capability[0]}.{device.capability[1]}"
        return Decline("fa4_architecture", f"{names}; FlashAttention-4 is used on 9.x and 10.x")
    sizes = problem.head_size, problem.value_head_size
    if sizes[0] == sizes[1] and sizes[0] in HEAD_SIZES:
        return None
    known = " and ".join(map(str, HEAD_SIZES))
    reason = f"FlashAttention-4 is used at head sizes {known}, where it was found to be right, not at {sizes[0]} and {sizes[1]}"
    return Decline("fa4_head_size", reason)


@functools.cache
def _usable() -> bool:
    """Whether the installed package can be imported; warns if not. That takes seconds, so a first long call asks and no plan."""
    try:
        _functions()
    except Exception as error:  # a package that does not fit raises whatever it likes
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        advice = "install it again as `torchhal doctor` says, or uninstall it"
        warnings.warn(
            f"flash-attn-4 fails to import, and the Triton kernels serve instead; {advice} ({text})",
            BackendWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Forward and backward: the two functions that torch's own registration of it calls (torch.nn.attention._fa4)."""
    module = import_module(MODULE)
    return module._flash_attn_fwd, module._flash_attn_bwd


# ---------------------------------------------------------------------------- calls


def engine(problem: AttentionProblem, least: int) -> Engine:
    """The engine of a problem that :func:`decline` lets pass.

    Args:
        problem: what is asked.
        least: query rows, and keys, from which on it serves.
    """
    causal = problem.is_causal
    with_lse = problem.return_lse or gradients.are_wanted(problem)

    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        key, value = seen_keys(causal, query, key, value)
        out = empty_output(query, value)
        lse = query.new_empty(query.shape[:-1] if with_lse else (0,), dtype=torch.float32)
        _functions()[0](
            *map(_turned, (query, key, value)), softmax_scale=scale, causal=causal, num_splits=1,
            out=out.transpose(1, 2), lse=lse if with_lse else None, return_lse=with_lse,
        )  # fmt: skip
        return out, lse

    def backward(
        query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, lse: Tensor, above: Tensor, lse_above: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        keys, values = seen_keys(causal, query, key, value)
        parts = (found[0], *seen_keys(causal, query, *found[1:]))
        results = [aligned(part) for part in parts]
        _functions()[1](
            *map(_turned, (query, keys, values, out, above)), lse.contiguous(), softmax_scale=scale, causal=causal,
            deterministic=True, dlse=None if lse_above is None else regular(lse_above),
            **{name: r.transpose(1, 2) for name, r in zip(("dq", "dk", "dv"), results, strict=True)},
        )  # fmt: skip
        for part, result in zip(parts, results, strict=True):
            if result is not part:
                part.copy_(result)
        if keys.shape[2] < key.shape[2]:
            for whole in found[1:]:
                whole[:, :, keys.shape[2] :] = 0
        return found

    lengths = Least(least, causal)
    return Engine(lambda query, key, scale: lengths(query, key, scale) and _usable(), forward, backward)


def _turned(tensor: Tensor) -> Tensor:
    """(B, H, L, E) as the (B, L, H, E) that it takes: the same memory, or a copy of what it can not read."""
    return aligned(tensor).transpose(1, 2)
