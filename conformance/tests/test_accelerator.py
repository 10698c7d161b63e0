"""Streams and graphs of a real device: the reference presented on it passes, and the planted faults that need one die.

The same checks are seen with both outcomes on a made-up device in ``test_device.py``, on any machine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from torchhal import BackendInfo, Decline, Plan, hookimpl, selection
from torchhal.problems import SPEC_VERSION
from torchhal.reference import plugin as reference
from torchhal_conformance import calls, corpus, examine, kills
from torchhal_conformance.checks import check_named
from torchhal_conformance.model import Case, Check
from torchhal_conformance.mutants import Mutant, all_mutants
from torchhal_conformance.mutants.promises import ON_DEVICE

pytestmark = [
    pytest.mark.hardware,
    pytest.mark.skipif(
        not torch.accelerator.is_available(), reason="this machine has no accelerator that this torch can use"
    ),
    pytest.mark.timeout(600),
]


def plugin() -> Any:
    """The reference's families on whole tensors, on the accelerator."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None

    @hookimpl
    def torchhal_backend() -> BackendInfo:
        kinds = frozenset({kind.type})
        return BackendInfo(
            "on_device",
            "torchhal",
            kinds,
            f">={SPEC_VERSION},<2",
            ON_DEVICE,
            {kind.type: 1},
            lambda: {"status": "ready"},
        )

    @hookimpl
    def torchhal_attention(problem: Any) -> Plan | Decline:
        return reference.torchhal_attention(problem)  # type: ignore[no-any-return]

    @hookimpl
    def torchhal_matmul(problem: Any) -> Plan | Decline:
        return reference.torchhal_matmul(problem)  # type: ignore[no-any-return]

    @hookimpl
    def torchhal_foreach(problem: Any) -> Plan | Decline:
        return reference.torchhal_foreach(problem)  # type: ignore[no-any-return]

    return SimpleNamespace(
        torchhal_backend=torchhal_backend,
        torchhal_attention=torchhal_attention,
        torchhal_matmul=torchhal_matmul,
        torchhal_foreach=torchhal_foreach,
    )


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    selection.reset()
    module = ModuleType("presented_plugin")
    module.plugin = plugin()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield examine.load_plugin("presented_plugin:plugin")
    selection.reset()


def asked(check: Check, backend: str) -> dict[str, Any]:
    """What became of each case of a check that applies, by id."""
    here = calls.facilities(backend)
    cases = [Case(check, sample) for sample in check.samples()]
    return {c.id: examine.examine(c, backend) for c in cases if corpus.applies(c, ON_DEVICE, here)}


def test_the_device_has_streams_and_says_whether_it_has_graphs(backend: str) -> None:
    assert calls.device_of(backend).type != "cpu"
    assert "streams" in calls.facilities(backend)
    print(f"{calls.device_of(backend)}: {', '.join(sorted(calls.facilities(backend)))}")


@pytest.mark.parametrize("name", ["streams", "graphs"])
@pytest.mark.parametrize("family", ["attention", "matmul", "foreach"])
def test_the_reference_on_the_device_passes(family: str, name: str, backend: str) -> None:
    if name not in calls.facilities(backend):
        pytest.skip(f"this device has no {name}")
    found = asked(check_named(f"{family}.{name}"), backend)
    bad = {case: result["error"] for case, result in found.items() if result["status"] != "pass"}
    assert found and not bad


NEEDY = [mutant for mutant in all_mutants() if mutant.needs]


@pytest.mark.parametrize("mutant", NEEDY, ids=[mutant.name for mutant in NEEDY])
def test_a_fault_that_needs_the_device_dies_on_it(mutant: Mutant) -> None:
    if not mutant.needs <= calls.accelerator_facilities():
        pytest.skip(
            f"this device has no {' and no '.join(sorted(mutant.needs - calls.accelerator_facilities()))}"
        )
    found = list(kills.hunt((mutant,), 1))
    assert all(kill.tried and not kill.lives for kill in found), found
