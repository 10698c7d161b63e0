"""Whether the native library can run here, and what the machine can do, measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import torch

from torchhal import Decline
from torchhal_cpu_x86 import native

X86_64 = frozenset({"x86_64", "AMD64", "amd64"})


def decline() -> Decline | None:
    """Why no kernel can run on this machine, or None when they can."""
    if platform.machine() not in X86_64:
        return Decline("not_x86_64", f"this machine is {platform.machine()}, and the kernels are for x86-64")
    try:
        native.load()
    except native.NativeUnavailable as error:
        return Decline("no_native_library", str(error))
    return None


def probe() -> Mapping[str, Any]:
    """What ``torchhal doctor`` shows: instruction sets, the one chosen for each type, and measured ceilings."""
    refusal = decline()
    if refusal is not None:
        return {"status": str(refusal)}
    library = native.load()
    measured = library.measure()
    return {
        "status": "ready",
        "instruction_sets": list(library.instruction_sets()),
        "chosen": {str(dtype).removeprefix("torch."): library.get_isa(dtype) for dtype in native.DTYPES},
        "attention_gflops_one_thread": measured.attention,
        "fma_gflops": max(max(both) for both in measured.fma.values()),
        "read_gbps": measured.bandwidth,
        "threads": torch.get_num_threads(),
        "library": str(library.path),
    }
