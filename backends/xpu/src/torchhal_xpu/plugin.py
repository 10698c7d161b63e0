"""The plugin: hook implementations only; what they say comes from the modules beside this one."""

from __future__ import annotations

import torchhal
from torchhal.problems import BackendInfo, Decline, DeployProblem, Plan
from torchhal_xpu import deploy, hardware
from torchhal_xpu.capabilities import CAPABILITIES


@torchhal.hookimpl
def torchhal_backend() -> BackendInfo:
    """Identity and claims; the hardware is looked at when the probe is asked."""
    return BackendInfo(
        name="xpu",
        vendor="Intel",
        device_types=frozenset({"xpu"}),
        spec=">=1.0,<2",
        capabilities=CAPABILITIES,
        probe=lambda: hardware.describe(hardware.observe()),
    )


@torchhal.hookimpl
def torchhal_deploy(problem: DeployProblem) -> Plan | Decline:
    """Compile options and profiler activities, where the hardware is suitable."""
    return deploy.plan(problem, hardware.observe())
