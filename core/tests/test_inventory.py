"""What is installed, told without touching hardware; and what hardware probes say, however they misbehave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from installed_backends import Site

from torchhal import inventory, selection
from torchhal.hookspecs import FAMILIES
from torchhal.registry import registry


def test_the_reference_is_always_there_and_claims_every_family(site: Site) -> None:
    (only,) = inventory.backends().backends
    assert only.name == "reference"
    assert set(only.claims) == set(FAMILIES)
    assert only.device_types == () and only.preference == {"*": 0}


def test_backends_come_strongest_first_with_their_distribution_version_and_claims(site: Site) -> None:
    site.add("weak", preference=3)
    site.add("strong", preference=70)
    found = inventory.backends()
    assert [b.name for b in found.backends] == ["strong", "weak", "reference"]
    strong = found["strong"]
    assert (strong.distribution, strong.version, strong.vendor) == ("fake-strong", "1.5", "nobody")
    assert strong.device_types == ("cpu",) and strong.preference == {"cpu": 70}
    assert strong.claims == {
        "attention": {"dtypes": ["float32"], "layouts": ["dense"], "features": ["causal", "gqa", "backward"]}
    }


def test_a_plugin_that_fails_to_load_is_listed_with_its_reason_and_traceback(site: Site) -> None:
    site.add_module("broken", "raise OSError('undefined symbol: frobnicate')")
    found = inventory.backends()
    (failure,) = found.failures
    assert (failure.name, failure.stage) == ("broken", "import")
    assert "broken (from fake-broken) failed to load in stage 'import': OSError: undefined symbol" in str(
        found
    )
    assert "Traceback" in json.loads(found.to_json())["failures"][0]["details"]


def test_entry_points_left_out_by_the_environment_are_named(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.add("quiet")
    monkeypatch.setenv("TORCHHAL_PLUGINS", "")
    selection.reset()
    found = inventory.backends()
    assert "quiet" in found.excluded
    assert "quiet is left out by TORCHHAL_PLUGINS" in str(found)


def test_json_holds_what_the_object_holds(site: Site) -> None:
    site.add("fast")
    content = json.loads(inventory.backends().to_json())
    assert [b["name"] for b in content["backends"]] == ["fast", "reference"]
    assert content["specification"] == "1.0"


def test_an_unknown_name_says_what_is_loaded(site: Site) -> None:
    with pytest.raises(KeyError, match="no loaded backend is called 'fast'; loaded: reference"):
        inventory.backends()["fast"]


def test_listing_backends_does_not_probe_the_hardware(site: Site) -> None:
    site.add("shy", probe="raise RuntimeError('probed')")
    assert inventory.backends()["shy"].name == "shy"


def test_a_probe_that_raises_is_a_finding_with_its_traceback(site: Site) -> None:
    site.add("shy", probe="raise RuntimeError('no such bus')")
    found = inventory.probe(registry().get("shy"))
    assert found.status == "probe raised RuntimeError: no such bus"
    assert "Traceback" in found.details and dict(found.findings) == {}


def test_a_probe_without_a_status_is_told_so(site: Site) -> None:
    site.add("mute", probe="return {}")
    assert inventory.probe(registry().get("mute")).status == "gave no status"


def _fails() -> float:
    raise ArithmeticError("clock stopped")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: 3.5, 3.5),
        (lambda: {"a": (1, 2)}, {"a": [1, 2]}),
        (_fails, "could not be measured: ArithmeticError: clock stopped"),
        ({1: Path("x")}, {"1": "x"}),
        (None, None),
    ],
)
def test_findings_become_values_that_json_can_hold(value: Any, expected: Any) -> None:
    assert inventory.measured(value) == expected
    json.dumps(inventory.measured(value))
