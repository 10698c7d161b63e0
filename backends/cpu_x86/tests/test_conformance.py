"""Everything claimed, case by case, as the conformance suite judges it."""

from __future__ import annotations

from torchhal_conformance.pytest_plugin import ConformanceCase, conformance_cases


@conformance_cases(backend="cpu_x86", profile="training")
def test_conformance(case: ConformanceCase) -> None:
    case.check()
