"""A fork is a process of its own: what one plugin does reaches neither the next nor the nursery."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from torchhal_conformance.child import StartFailed
from torchhal_conformance.nursery import Forks

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform != "linux", reason="faults are hunted in forks on Linux alone"),
]

CASE = "attention.numbers/dense-float32-b2-h4-l1-s1-e16"
HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", HERE, prepend=os.pathsep)
        found = Forks(0, 5.0, 1)
        yield found
        found.close()


@pytest.mark.parametrize(
    ("plugin", "status", "kind", "message"),
    [
        ("raises", "fail", "RuntimeError", "the kernel gave up"),
        ("agrees_with_itself", "pass", None, None),
        ("segfaults", "fail", "Crash", "SIGSEGV"),
        ("quits", "fail", "Crash", "exit code 0"),
        ("sleeps", "timeout", "Timeout", "within 5 s"),
    ],
)
def test_what_a_plugin_does_is_its_own_result_and_the_next_one_is_as_good_as_ever(
    forks: Forks, plugin: str, status: str, kind: str | None, message: str | None
) -> None:
    forks.plant(f"hostile:{plugin}")
    result = forks.run(CASE)
    assert (result["case"], result["status"]) == (CASE, status)
    if kind is not None:
        assert result["error"]["class"] == kind
        assert message in result["error"]["message"]
    forks.plant("hostile:zeros_for_everything")
    assert forks.run(CASE)["status"] == "fail", "torch was made to agree with everything in another fork"
    forks.plant("hostile:good")
    assert forks.run(CASE)["status"] == "pass"


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("hostile:quits_at_import", "hostile:quits_at_import: the process ended with exit code 0"),
        ("hostile:identity_raises", "RuntimeError: who am I"),
        ("no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_plugin_that_does_not_load_is_no_dead_fault(forks: Forks, plugin: str, message: str) -> None:
    with pytest.raises(StartFailed, match=message):
        forks.plant(plugin)
    forks.plant("hostile:good")
    assert forks.run(CASE)["status"] == "pass"
