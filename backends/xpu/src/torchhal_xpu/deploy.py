"""Deployment on an Intel GPU: options for torch.compile, and what the profiler should record."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from torchhal.problems import Decline, DeployProblem, Plan
from torchhal_xpu.hardware import Hardware, cannot_compile, unsuitable


def plan(problem: DeployProblem, hardware: Hardware) -> Plan | Decline:
    """The plan for a deployment task on the hardware that was seen."""
    verdict = unsuitable(hardware, problem.device.index)
    if verdict:
        return verdict
    if problem.task == "profiler":
        return _profiler()
    if problem.task == "compile_options":
        return cannot_compile(hardware) or Plan(
            run=compile_options, description="Inductor with measured kernel choice"
        )
    return Decline("unclaimed_task", f"does not serve the task {problem.task!r}")


def compile_options() -> dict[str, Any]:
    """Options for ``torch.compile(options=...)``: choose among kernels by measuring them."""
    return {"max_autotune": True, "coordinate_descent_tuning": True}


def _profiler() -> Plan | Decline:
    if ProfilerActivity.XPU not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]
        return Decline(
            "profiler_without_xpu", f"the profiler of torch {torch.__version__} records no XPU activity"
        )
    return Plan(run=lambda: [ProfilerActivity.CPU, ProfilerActivity.XPU], description="host and XPU activity")
