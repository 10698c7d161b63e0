"""The plugin: hook implementations only. ``pyproject.toml`` names this module as the entry point."""

from __future__ import annotations

import torchhal
from torchhal.problems import AttentionProblem, BackendInfo, Decline, Plan
from torchhal_template import attention
from torchhal_template.capabilities import CAPABILITIES


@torchhal.hookimpl
def torchhal_backend() -> BackendInfo:
    """Identity, claims, and how strongly this backend wants to be chosen."""
    return BackendInfo(
        name="template",
        vendor="you",
        device_types=frozenset({"cpu"}),
        spec=">=1.0,<2",
        capabilities=CAPABILITIES,
        preference={"cpu": 1},  # above the reference, which has 0, and below every serious backend
        probe=lambda: {"status": "ready"},
    )


@torchhal.hookimpl
def torchhal_attention(problem: AttentionProblem) -> Plan | Decline:
    """A plan, or a decline with a code and a sentence."""
    return attention.plan(problem)
