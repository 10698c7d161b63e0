"""Deployment on a suitable GPU: options for torch.compile, and what the profiler should record."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from torchhal.problems import Decline, DeployProblem, Plan
from torchhal_cuda128.hardware import Hardware, unsuitable


def plan(problem: DeployProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for a deployment task on the hardware that was seen."""
    verdict = unsuitable(hardware, problem.device.index)
    if verdict:
        return verdict
    if problem.task == "profiler":
        return _profiler()
    if problem.task == "compile_options":
        return Plan(
            run=compile_options, description="Inductor tuned for tensor memory access and this device"
        )
    return Decline("unclaimed_task", f"does not serve the task {problem.task!r}")


def compile_options() -> dict[str, Any]:
    """Options for ``torch.compile(options=...)``: measured kernel choice, tensor-memory-access products among them.

    Left out is any option this torch does not have. Warp specialisation stays off: Triton can give wrong
    results with it (triton issue 8311).
    """
    wanted = {
        "max_autotune": True,
        "coordinate_descent_tuning": True,
        "triton.enable_persistent_tma_matmul": True,
    }
    known = set(torch._inductor.list_options())
    return {name: value for name, value in wanted.items() if name in known}


def _profiler() -> Plan | Decline:
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]
        return Decline(
            "profiler_without_cuda", f"the profiler of torch {torch.__version__} records no CUDA activity"
        )
    return Plan(
        run=lambda: [ProfilerActivity.CPU, ProfilerActivity.CUDA], description="host and CUDA activity"
    )
