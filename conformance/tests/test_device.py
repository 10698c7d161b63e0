"""Streams and graphs: the checks on a made-up accelerator, and that they exist where the device has what they need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_up_device
import pytest
import torch

from torchhal import selection
from torchhal.reference import plugin as reference
from torchhal.registry import registry
from torchhal_conformance import calls, corpus, examine, kills, run, worker
from torchhal_conformance.checks import check_named, device
from torchhal_conformance.model import Case, CheckFailed, Sample
from torchhal_conformance.mutants import all_mutants
from torchhal_conformance.run import Options

FAMILIES = ("attention", "matmul", "foreach")
BOTH = frozenset({"streams", "graphs"})


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Planted faults share one name, and plans are kept by name."""
    selection.reset()
    yield
    selection.reset()


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> made_up_device.Device:
    monkeypatch.setattr(device, "DELAY", 2)
    monkeypatch.setattr(device, "DELAY_SIZE", 4)
    return made_up_device.install(monkeypatch)


def plainest(family: str) -> Sample:
    return next(iter(check_named(f"{family}.graphs").samples()))


def asked(name: str, backend: str) -> Any:
    check = check_named(name)
    return check.run(backend, plainest(name.partition(".")[0]), 1)


def mutant(name: str) -> str:
    return examine.load_plugin(f"torchhal_conformance.mutants:plugins.{name}")


# ---------------------------------------------------------------------------- both outcomes


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", ["graphs", "streams"])
def test_a_backend_that_launches_where_it_is_called_passes(
    family: str, check: str, accelerator: made_up_device.Device
) -> None:
    assert asked(f"{family}.{check}", "reference").note == ""


@pytest.mark.parametrize("family", FAMILIES)
def test_work_on_the_default_stream_reads_data_before_they_are_written(
    family: str, accelerator: made_up_device.Device
) -> None:
    name = mutant(f"{family}_default_stream")
    with pytest.raises(CheckFailed, match="expected the same bits on a side stream"):
        asked(f"{family}.streams", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_number_read_on_the_host_is_stale_when_the_graph_is_replayed_with_new_data(
    family: str, accelerator: made_up_device.Device
) -> None:
    name = mutant(f"{family}_baked_constants")
    with pytest.raises(CheckFailed, match="replayed with new data as called with it"):
        asked(f"{family}.graphs", name)


def test_a_value_that_is_read_on_the_host_while_the_call_is_captured_is_named(
    accelerator: made_up_device.Device,
) -> None:
    # On the CPU the reference looks whether values are finite, to save a product where something is hidden.
    masked = next(s for s in check_named("attention.graphs").samples() if "boolean_mask" in s.tags)
    expected = "that a device graph can capture, got HostRead: operation not permitted"
    with pytest.raises(CheckFailed, match=expected):
        device.graphs("reference", masked, 1)


# ---------------------------------------------------------------------------- where they apply


def test_a_device_without_streams_and_graphs_has_no_such_cases() -> None:
    frozen = {case.id for case in corpus.cases() if case.profile == "inference"}
    these = [case for case in corpus.cases() if case.check.facilities]
    assert these and not any(corpus.applies(case, reference.CAPABILITIES) for case in these)
    assert all(corpus.applies(case, reference.CAPABILITIES, BOTH) for case in these)
    only = {
        n
        for c in these
        if corpus.applies(c, reference.CAPABILITIES, frozenset({"streams"}))
        for n in c.check.facilities
    }
    assert only == {"streams"}
    assert {case.id for case in these} <= frozen


def test_what_a_profile_requires_grows_with_what_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    every = frozenset(case.id for case in corpus.cases())
    monkeypatch.setattr(corpus, "frozen", lambda profile, edition="": every)
    these = {case.id for case in corpus.cases() if case.check.facilities}
    without = corpus.required("inference", reference.CAPABILITIES)
    with_both = corpus.required("inference", reference.CAPABILITIES, facilities=BOTH)
    assert with_both - without == these and not without & these


def test_a_report_says_what_the_device_has_and_is_verified_by_it() -> None:
    options = Options("reference")
    told = worker.described(registry().get("reference"))
    header = json.loads(json.dumps(run.make_header(options, told)))
    assert header["environment"]["facilities"] == ""
    these = {case.id for case in corpus.cases() if case.check.facilities}
    assert not run.expected_by_header(header) & these
    header["environment"]["facilities"] = "graphs streams"
    assert these <= run.expected_by_header(header)


def test_a_case_that_does_not_apply_is_said_to_and_counts_for_nothing() -> None:
    case = Case(check_named("attention.graphs"), plainest("attention"))
    result = examine.examine(case, "reference")
    assert result["status"] == "error"
    assert "does not apply: cpu has no graphs" in result["error"]["message"]


def test_a_device_for_which_torch_has_no_graphs_has_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise RuntimeError("no graphs for this device")

    assert calls.accelerator_facilities() == frozenset() or torch.accelerator.is_available()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "Graph", none)
    assert calls.accelerator_facilities() == {"streams"}
    monkeypatch.setattr(torch.accelerator, "Graph", lambda: object())
    assert calls.accelerator_facilities() == BOTH


# ---------------------------------------------------------------------------- planted faults


def test_a_fault_that_needs_an_accelerator_is_neither_killed_nor_living_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "accelerator_facilities", lambda: frozenset({"streams"}))
    (fault,) = [m for m in all_mutants() if m.name == "attention_baked_constants"]
    (kill,) = kills.hunt((fault,), 1)
    assert kill.case is None and not kill.tried and not kill.lives
    assert kill.message == "not tried here: no accelerator with graphs"


def test_the_command_says_which_faults_were_not_tried_and_does_not_count_them(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from torchhal_conformance.cli import app

    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here, on which they are tried")
    found = CliRunner().invoke(app, ["mutants", "attention_default_stream", "matmul_baked_constants"])
    assert found.exit_code == 0, found.output
    assert "not tried here: no accelerator with streams" in found.output
    assert "0 of 0 kills" in found.output
    assert "2 not tried here: they need an accelerator" in found.output
