"""Each check of the contract passes an honest backend and finds the fault planted in a dishonest one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import torchhal
from torchhal.problems import AttentionClaims, BackendInfo, Capabilities, Decline, DeployClaims, Plan
from torchhal.registry import Backend, verify
from torchhal_conformance import smoke
from torchhal_conformance.cli import app
from torchhal_conformance.report import Report
from torchhal_conformance.runner import examine

CLAIMS = AttentionClaims(dtypes=frozenset({torch.float32}), layouts=frozenset({"dense"}), causal=True)
INFO = BackendInfo(
    name="honest",
    vendor="nobody",
    device_types=frozenset({"cpu"}),
    spec=">=1.0,<2",
    capabilities=Capabilities(attention=CLAIMS),
    preference={"cpu": 1},
    probe=lambda: {"status": "ready"},
)


def backend(hook: Callable[..., Any] | None = None, **changes: Any) -> Backend:
    """A backend that is honest but for ``hook`` and ``changes``."""
    info = dataclasses.replace(INFO, **changes)

    @torchhal.hookimpl
    def torchhal_backend() -> BackendInfo:
        return info

    @torchhal.hookimpl
    def torchhal_attention(problem: torchhal.problems.AttentionProblem) -> Any:
        return hook(problem) if hook else Plan(run=lambda *args: None)

    plugin = SimpleNamespace(torchhal_backend=torchhal_backend, torchhal_attention=torchhal_attention)
    outcome = verify(info.name, "nobody-honest", plugin, "1.0")
    assert isinstance(outcome, Backend), outcome
    return outcome


def found(report: Report) -> set[str]:
    return {finding.check for finding in report.findings}


def test_an_honest_backend_passes_and_something_was_examined() -> None:
    report = examine(backend())
    assert report.passed, str(report)
    assert report.examined > 20


def test_the_reference_passes() -> None:
    report = smoke("reference")
    assert report.passed, str(report)


@pytest.mark.parametrize(
    "fault",
    [
        {"vendor": ""},
        {"device_types": frozenset({"no_such_device"})},
        {"spec": ">=1.0"},
        {"preference": {"meta": 1}},
        {"probe": dict},
        {"probe": lambda: {"status": torch.float32}},
        {"probe": lambda: 1 / 0},
        {"name": "not-a-word"},
    ],
    ids=lambda fault: "-".join(fault),
)
def test_a_fault_of_identity_is_found(fault: dict[str, Any]) -> None:
    assert "contract.identity" in found(examine(backend(**fault)))


@pytest.mark.parametrize(
    "capabilities",
    [
        Capabilities(),
        Capabilities(attention=CLAIMS, deploy=DeployClaims(frozenset({"profiler"}))),
        Capabilities(attention=dataclasses.replace(CLAIMS, dtypes=frozenset())),
    ],
    ids=["hook without claim", "claim without hook", "empty claim"],
)
def test_a_claim_that_does_not_match_the_hooks_is_found(capabilities: Capabilities) -> None:
    assert "contract.claims" in found(examine(backend(capabilities=capabilities)))


def test_a_backend_that_answers_what_it_does_not_claim_is_found() -> None:
    eager = backend()
    accepts_all = Plan(run=lambda *args: None, description="yes to everything")
    object.__setattr__(eager, "ask", lambda problem: accepts_all)
    report = examine(eager)
    assert "contract.refusals" in found(report)
    assert "yes to everything" in str(report)


@pytest.mark.parametrize(
    "hook",
    [
        lambda problem: 1 / 0,
        lambda problem: "a plan",
        lambda problem: Decline("No Device", "there is none"),
        lambda problem: Plan(run=None),
    ],
    ids=["raises", "returns something else", "malformed code", "plan that can not run"],
)
def test_a_malformed_answer_to_a_claimed_problem_is_found(hook: Callable[..., Any]) -> None:
    assert found(examine(backend(hook))) == {"contract.answers"}


def test_a_fault_in_one_feature_alone_is_found() -> None:
    def hook(problem: Any) -> Plan:
        assert not problem.is_causal, "causal is claimed and not done"
        return Plan(run=lambda *args: None)

    (finding,) = examine(backend(hook)).findings
    assert "causal" in finding.subject
    assert "causal is claimed and not done" in finding.got


def test_a_decline_for_want_of_hardware_is_no_contradiction() -> None:
    assert examine(backend(lambda problem: Decline("no_device", "there is none"))).passed


def test_a_report_over_nothing_does_not_pass() -> None:
    assert not Report("empty", "1.0", "smoke", 0, ()).passed


def test_the_command_prints_json_and_exits_with_zero_for_the_reference() -> None:
    result = CliRunner().invoke(app, ["smoke", "reference", "--json"])
    assert result.exit_code == 0, result.output
    (report,) = json.loads(result.stdout)
    assert report["backend"] == "reference"
    assert report["passed"] is True


def test_the_command_names_an_unknown_backend_and_what_is_installed() -> None:
    result = CliRunner().invoke(app, ["smoke", "no_such_backend"])
    assert result.exit_code == 2
    assert "no_such_backend" in result.output
    assert "reference" in result.output
