"""Does memory stay where it was after many calls, and grow with the length and not with its square?"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch

from torchhal_conformance import calls
from torchhal_conformance.checks.promises import representatives
from torchhal_conformance.families import attention
from torchhal_conformance.model import Check, CheckFailed, Explanation, Measured, Sample

CALLS: Final = 200
WARM_UP: Final = 30
LEAK: Final = 4096
"""Bytes a call may leave behind: less is the allocator's own rounding, measured over hundreds of calls."""


def growth(backend: str, sample: Sample, seed: int) -> Measured:
    """Two hundred calls, after some to warm up."""
    inputs = calls.make(sample, backend, seed)
    for _ in range(WARM_UP):
        calls.call(sample, backend, inputs)
    gc.collect()
    before = _used(inputs)
    for _ in range(CALLS):
        calls.call(sample, backend, inputs)
    gc.collect()
    grown = _used(inputs) - before
    if grown > CALLS * LEAK:
        raise CheckFailed(f"at most {LEAK} bytes more a call after {CALLS} calls", f"{grown / CALLS:.0f}")
    return Measured()


def _used(inputs: dict[str, Any]) -> int:
    tensor = next((value for value in inputs.values() if isinstance(value, torch.Tensor)), None)
    if tensor is not None and tensor.device.type not in ("cpu", "meta"):
        return int(torch.accelerator.memory_allocated(tensor.device))
    return _resident("VmRSS")


def _resident(field: str) -> int:
    """Bytes of this process by the kernel's account; 0 where there is none (not Linux), which proves nothing."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


LENGTHS: Final = (2048, 4096)
SQUARE: Final = 3.0
"""Doubling the length may multiply the extra memory by this: twice is linear, four times is quadratic."""
FLOOR: Final = 8 << 20


def linear(backend: str, sample: Sample, seed: int) -> Measured:
    """Peak memory beyond inputs and outputs at two lengths, where the plan says it does not grow with their square."""
    if sys.platform != "linux":
        return Measured(note="the peak is read from /proc")
    peaks = [_peak(backend, length, seed) for length in LENGTHS]
    if peaks[1] > FLOOR and peaks[1] > SQUARE * max(peaks[0], 1):
        raise CheckFailed(
            f"extra memory to grow less than {SQUARE:g} times from length {LENGTHS[0]} to {LENGTHS[1]}",
            f"from {peaks[0] >> 20} to {peaks[1] >> 20} MiB",
        )
    return Measured()


def _peak(backend: str, length: int, seed: int) -> int:
    sample = attention.sample(attention.Call(batch=1, heads=4, kv_heads=4, rows=length, keys=length))
    inputs = calls.make(sample, backend, seed)
    calls.call(sample, backend, inputs)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    result = calls.call(sample, backend, inputs)
    return max(_resident("VmHWM") - before - sum(t.nbytes for t in result), 0)


def _one_of_each(family: str) -> Iterator[Sample]:
    kinds = set()
    for sample in representatives(family):
        kind = (sample.needs.features, sample.needs.choice)
        if kind not in kinds and torch.float32 in sample.needs.dtypes:
            kinds.add(kind)
            yield sample


def _growth_checks() -> Iterator[Check]:
    explanation = Explanation(
        f"Makes {CALLS} calls after {WARM_UP} to warm up; memory may grow by {LEAK} bytes a call.",
        "A plan or a workspace kept for every call fills a server in a day; PyTorch checks its own tests for leaks for this reason.",
        "Compare memory after 200 and after 2000 calls; look at caches without a bound.",
    )
    for family in ("attention", "matmul", "foreach"):
        yield Check(
            name=f"{family}.memory_growth",
            explanation=explanation,
            samples=lambda family=family: _one_of_each(family),  # type: ignore[misc]
            run=growth,
        )


def checks() -> Iterator[Check]:
    """Growth in every family, and the shape of attention's workspace."""
    yield from _growth_checks()
    yield Check(
        name="attention.linear_memory",
        explanation=Explanation(
            f"Measures peak memory at {LENGTHS[0]} and {LENGTHS[1]} keys; it may not grow with their product, unless the "
            "plan says so in its workspace.",
            "A fallback that materialises the scores works in tests and dies at the first long prompt.",
            "Look for a temporary of shape (L, S); if it is meant, the plan's workspace has to say O(L S).",
        ),
        samples=lambda: [attention.sample(attention.Call(batch=1, rows=1024, keys=1024, size=16))],
        run=_linear_unless_declared,
    )


def _linear_unless_declared(backend: str, sample: Sample, seed: int) -> Measured:
    from torchhal.registry import registry

    problem_workspace = _workspace(registry().get(backend))
    if problem_workspace is not None and "L S" in problem_workspace:
        return Measured(note=f"the plan says {problem_workspace}")
    return linear(backend, sample, seed)


def _workspace(backend: Any) -> str | None:
    from torchhal.problems import AttentionProblem, Plan

    plan = backend.ask(
        AttentionProblem(
            calls.device_of(backend.name), query_heads=4, key_heads=4, head_size=16, value_head_size=16
        )
    )
    return plan.workspace if isinstance(plan, Plan) else None
