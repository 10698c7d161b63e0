"""The hooks this backend implements; no logic of its own."""

from __future__ import annotations

from torchhal import BackendInfo, Decline, Plan, hookimpl
from torchhal.problems import AttentionProblem, ForeachProblem, MatmulProblem
from torchhal_cpu_x86 import attention, foreach, hardware, matmul
from torchhal_cpu_x86.capabilities import CAPABILITIES


@hookimpl
def torchhal_backend() -> BackendInfo:
    return BackendInfo(
        name="cpu_x86",
        vendor="torchhal",
        device_types=frozenset({"cpu"}),
        spec=">=1.0,<2",
        capabilities=CAPABILITIES,
        preference={"cpu": 200},
        probe=hardware.probe,
    )


@hookimpl
def torchhal_attention(problem: AttentionProblem) -> Plan | Decline | None:
    return attention.plan(problem)


@hookimpl
def torchhal_matmul(problem: MatmulProblem) -> Plan | Decline | None:
    return matmul.plan(problem)


@hookimpl
def torchhal_foreach(problem: ForeachProblem) -> Plan | Decline | None:
    return foreach.plan(problem)
