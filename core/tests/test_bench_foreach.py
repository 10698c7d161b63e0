"""``torchhal bench foreach``: every candidate is held against float64, and misses are told from mistakes."""

from __future__ import annotations

import pytest
import torch
from cli_support import document

from torchhal.bench import choice
from torchhal.bench import foreach as measuring
from torchhal.bench.cases import Requirement
from torchhal.bench.timing import Effort, Timing
from torchhal.errors import InvalidProblem
from torchhal.registry import registry

CPU = torch.device("cpu")
BRIEF = Effort(repetitions=3, budget=0.0, most=3, floor=1e-5)
TINY = measuring.Case("tiny", 3, 40, (Requirement(measuring.FUSED, 1.0),))


def test_ours_and_torchs_optimizers_agree_with_float64_and_are_compared() -> None:
    result = measuring.measure(TINY, [registry().get("reference")], CPU, BRIEF, compiled=False)
    assert [row.candidate for row in result.rows] == ["reference", measuring.FUSED, measuring.FOREACH]
    assert all(row.passed and row.timing is not None and row.error > 0 for row in result.rows)
    assert result.ratio(result.rows[0], TINY.requirements[0]) is not None


def test_a_wrong_step_has_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "foreach_map", lambda *args, **kwargs: None)
    result = measuring.measure(TINY, [registry().get("reference")], CPU, BRIEF, compiled=False)
    assert not result.rows[0].passed and result.ratio(result.rows[0], TINY.requirements[0]) is None


def test_the_first_call_is_of_a_function_nobody_has_seen() -> None:
    case = measuring.Case("first", 4, 8, first=True)
    (row,) = measuring.measure(case, [registry().get("reference")], CPU, BRIEF, compiled=False).rows
    assert isinstance(row.timing, Timing) and len(row.timing.seconds) == 4
    assert (
        measuring._unseen(0)(*[torch.ones(1)] * 4, 1.0, 0.1, 1.0)[0]
        != measuring._unseen(9)(*[torch.ones(1)] * 4, 1.0, 0.1, 1.0)[0]
    )


def test_bytes_are_those_of_four_reads_and_three_writes() -> None:
    assert measuring.CASES[0].bytes == 28 * 20 * 2**20


def test_cases_are_chosen_by_name_and_an_unknown_one_is_refused() -> None:
    assert [c.name for c in choice.named("foreach", measuring.CASES, "adamw-20*, first")] == [
        "adamw-20x1m",
        "first-call-2000",
    ]
    with pytest.raises(InvalidProblem, match="no foreach case is called 'sgd'.*adamw-20x1m"):
        choice.named("foreach", measuring.CASES, "sgd")


def test_the_command_reports_every_case_as_json() -> None:
    found = document("bench", "foreach", "--quick", "--cases", "adamw-1000", "--backend", "reference")
    (case,) = found["cases"]
    assert (
        case["case"] == "adamw-1000x1k"
        and case["candidates"][0]["requirements"][measuring.FUSED]["ratio"] == 2.0
    )
