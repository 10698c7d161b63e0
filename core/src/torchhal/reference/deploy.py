"""Deployment by torch's own means: its defaults, AOTInductor, torchao's quantizers and the profiler."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch.profiler import ProfilerActivity

from torchhal.problems import Decline, DeployProblem, Plan

_PT2E: Final = "torchao.quantization.pt2e.quantizer"


def plan(problem: DeployProblem) -> Plan | Decline:
    """Serves compile options and packages everywhere, quantizers on CPUs, the profiler where torch has one."""
    return _TASKS[problem.task](problem.device)


def _compile_options(device: torch.device) -> Plan | Decline:
    return Plan(run=dict, description="torch's own defaults")


def _package(device: torch.device) -> Plan | Decline:
    return Plan(run=aoti_package, description="AOTInductor")


def aoti_package(exported_program: torch.export.ExportedProgram, path: Path) -> Path:
    """Write an AOTInductor package of ``exported_program`` to ``path`` (``.pt2``) and return the path."""
    from torch._inductor import aoti_compile_and_package

    return Path(aoti_compile_and_package(exported_program, package_path=os.fspath(path)))


# ---------------------------------------------------------------------------- quantizer

_QUANTIZERS: Final = {
    "x86_64": (
        "x86_inductor_quantizer",
        "X86InductorQuantizer",
        "get_default_x86_inductor_quantization_config",
    ),
    "amd64": (
        "x86_inductor_quantizer",
        "X86InductorQuantizer",
        "get_default_x86_inductor_quantization_config",
    ),
    "aarch64": (
        "arm_inductor_quantizer",
        "ArmInductorQuantizer",
        "get_default_arm_inductor_quantization_config",
    ),
    "arm64": (
        "arm_inductor_quantizer",
        "ArmInductorQuantizer",
        "get_default_arm_inductor_quantization_config",
    ),
}
"""Module, class and default configuration of torchao's quantizer for each machine (torchao 0.18)."""


def _quantizer(device: torch.device) -> Plan | Decline:
    names = _QUANTIZERS.get(platform.machine().lower())
    if device.type != "cpu" or names is None:
        return Decline(
            "other_device",
            f"has PT2E quantizers for x86-64 and 64-bit Arm CPUs, not for {device.type} on {platform.machine()}",
        )
    module, class_name, configuration = names
    try:
        importlib.import_module("torchao")
        found: Any = importlib.import_module(f"{_PT2E}.{module}")
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchao":
            return Decline(
                "missing_dependency",
                "PT2E quantizers live in torchao, which is not installed; run: pip install torchao",
            )
        # A torchao built for another torch fails with anything, and older ones have no such module.
        reason = f"{type(error).__name__}: {error}"
        return Decline(
            "broken_dependency",
            f"torchao is installed and its PT2E quantizer does not import ({reason}); run: pip install -U torchao",
        )

    def configured() -> Any:
        return getattr(found, class_name)().set_global(getattr(found, configuration)())

    return Plan(run=configured, description=f"{class_name} of torchao")


# ---------------------------------------------------------------------------- profiler


def _profiler(device: torch.device) -> Plan | Decline:
    activities = [ProfilerActivity.CPU]
    if device.type != "cpu":
        own = getattr(ProfilerActivity, device.type.upper(), None)
        if own is None or own not in torch.profiler.supported_activities():  # type: ignore[no-untyped-call]
            return Decline(
                "no_profiler",
                f"this torch ({torch.__version__}) was built without profiling of {device.type}",
            )
        activities.append(own)
    return Plan(run=activities.copy, description=f"torch.profiler: {', '.join(a.name for a in activities)}")


_TASKS: Final[dict[str, Callable[[torch.device], Plan | Decline]]] = {
    "compile_options": _compile_options,
    "quantizer": _quantizer,
    "package": _package,
    "profiler": _profiler,
}
