"""A backend whose plans do nothing, so that what is measured around them is torchhal's own cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from torchhal import selection
from torchhal.hookspecs import hookimpl
from torchhal.problems import SPEC_VERSION, AttentionClaims, AttentionProblem, BackendInfo, Capabilities, Plan
from torchhal.registry import Backend, registry, verify

NAME: Final = "idle"


def _run(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float, operands: Any
) -> Tensor:
    return query


class _Idle:
    """Claims dense attention, is never chosen unless named, and returns the query."""

    @hookimpl
    def torchhal_backend(self) -> BackendInfo:
        features = {
            f.name: True for f in dataclasses.fields(AttentionClaims) if f.name not in ("dtypes", "layouts")
        }
        claims = AttentionClaims(
            dtypes=frozenset((torch.float32,)), layouts=frozenset(("dense",)), **features
        )
        kinds = frozenset(("cpu",))
        return BackendInfo(NAME, "torchhal", kinds, f">={SPEC_VERSION},<2", Capabilities(claims), {"cpu": -1})

    @hookimpl
    def torchhal_attention(self, problem: AttentionProblem) -> Plan:
        return Plan(_run, "returns the query")


@contextmanager
def installed() -> Iterator[Backend]:
    """The idle backend, installed for the block alone; forgets all plans when it goes."""
    backend = verify(NAME, "torchhal", _Idle())
    assert isinstance(backend, Backend), backend
    found = registry()
    found.backends[NAME] = backend
    try:
        yield backend
    finally:
        del found.backends[NAME]
        selection.reset()
