"""The plugin: hook implementations only; what they say comes from the modules beside this one."""

from __future__ import annotations

import torchhal
from torchhal.problems import (
    AttentionProblem,
    BackendInfo,
    Decline,
    DeployProblem,
    ForeachProblem,
    MatmulProblem,
    Plan,
)
from torchhal_cuda128 import attention, deploy, doctor, foreach, hardware, matmul
from torchhal_cuda128.capabilities import CAPABILITIES


@torchhal.hookimpl
def torchhal_backend() -> BackendInfo:
    """Identity and claims; the hardware is looked at when the probe is asked."""
    return BackendInfo(
        name="cuda128",
        vendor="NVIDIA",
        device_types=frozenset({"cuda"}),
        spec=">=1.0,<2",
        capabilities=CAPABILITIES,
        preference={"cuda": 200},
        probe=lambda: doctor.describe(hardware.observe()),
    )


@torchhal.hookimpl
def torchhal_attention(problem: AttentionProblem) -> Plan | Decline:
    """The Triton kernels, where the hardware is suitable and Triton is installed."""
    return attention.plan(problem, hardware.observe())


@torchhal.hookimpl
def torchhal_matmul(problem: MatmulProblem) -> Plan | Decline:
    """The Triton kernels, and cuBLAS for plain products, where the hardware is suitable and Triton is installed."""
    return matmul.plan(problem, hardware.observe())


@torchhal.hookimpl
def torchhal_foreach(problem: ForeachProblem) -> Plan | Decline:
    """The Triton kernel, where the hardware is suitable and Triton is installed."""
    return foreach.plan(problem, hardware.observe())


@torchhal.hookimpl
def torchhal_deploy(problem: DeployProblem) -> Plan | Decline:
    """Compile options and profiler activities, where the hardware is suitable."""
    return deploy.plan(problem, hardware.observe())
