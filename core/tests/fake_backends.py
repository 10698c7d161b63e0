"""Backends made to order, for tests of discovery and selection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from torchhal import BackendInfo, Capabilities, Decline, Plan, hookimpl
from torchhal.problems import AttentionClaims, AttentionProblem

Install = Callable[..., None]


class FakeEntryPoint:
    """An entry point whose load() gives an object made in the test, or raises what the test wants."""

    def __init__(self, name: str, plugin: object, error: BaseException | None, distribution: str) -> None:
        self.name = name
        self.plugin = plugin
        self.error = error
        self.dist = SimpleNamespace(name=distribution, version="1.2.3")

    def load(self) -> object:
        if self.error is not None:
            raise self.error
        return self.plugin


Answer = Callable[[AttentionProblem], Plan | Decline | None]
EVERYTHING = AttentionClaims(
    dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
    layouts=frozenset({"dense", "varlen", "paged"}),
    **{name: True for name, kind in AttentionClaims.__annotations__.items() if kind == "bool"},
)


def constant_plan(value: float, **promises: Any) -> Plan:
    """A plan whose result is full of ``value``, so that a test sees who computed it."""

    def run(query: Any, key: Any, value_: Any, attn_mask: Any, scale: float, operands: Any) -> torch.Tensor:
        return torch.full((*query.shape[:-1], value_.shape[-1]), value, dtype=query.dtype)

    return Plan(run=run, description=f"always {value}", **promises)


def backend(
    name: str,
    answer: Answer | None = None,
    *,
    claims: AttentionClaims | None = EVERYTHING,
    preference: Mapping[str, int] | None = None,
    spec: str = ">=1.0,<2",
    **info: Any,
) -> SimpleNamespace:
    """A plugin called ``name`` that answers attention problems with ``answer``."""

    @hookimpl
    def torchhal_backend() -> BackendInfo:
        known = {
            "vendor": "tests",
            "device_types": frozenset({"cpu"}),
            "preference": preference or {},
            **info,
        }
        return BackendInfo(name=name, spec=spec, capabilities=Capabilities(attention=claims), **known)

    @hookimpl
    def torchhal_attention(problem: AttentionProblem) -> Plan | Decline | None:
        return None if answer is None else answer(problem)

    return SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_attention=torchhal_attention)
