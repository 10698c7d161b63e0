"""What ``torchhal bench matmul`` measures: right results pass, wrong ones do not, and cases are chosen by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cli_support import invoke

from torchhal.bench import choice, matmul
from torchhal.bench.ceilings import Ceilings
from torchhal.bench.timing import Effort, Timing
from torchhal.errors import InvalidProblem

CPU = torch.device("cpu")
SMALL = [replace(case, rows=9, columns=11, inner=13) for case in matmul.CASES]
EFFORT = Effort(repetitions=1, budget=0.0, limit=0.0, most=1, floor=0.0)
LIMITS = Ceilings(100.0, 10.0, "one", "another")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_the_reference_and_torch_are_right_on_every_case(case: matmul.Case) -> None:
    result = matmul.measure(case, ["reference"], CPU, EFFORT)
    assert all(row.passed(case.dtype) for row in result.rows), [
        (r.candidate, r.error, r.not_run) for r in result.rows
    ]
    assert result.rows[0].ours and result.timing(case.baseline) is not None


@pytest.mark.parametrize("case", SMALL[:2], ids=lambda case: case.name)
def test_a_result_that_is_off_by_a_hundredth_does_not_pass(case: matmul.Case) -> None:
    operands, rows = case.operands(CPU), torch.arange(case.rows)
    exact = case.exact(operands, rows)

    def call() -> torch.Tensor:
        return case.ours(operands, "reference") * 1.07

    assert not matmul._checked("off", True, call, exact, rows).passed(case.dtype)


def test_a_candidate_that_raises_is_a_row_that_says_so() -> None:
    result = matmul.measure(SMALL[0], ["nobody"], CPU, EFFORT)
    assert "BackendNotFound" in result.rows[0].not_run and not result.rows[0].passed(torch.float32)
    assert result.to_dict(LIMITS)["candidates"][0]["not_run"]


def test_speedups_and_needs_are_ratios_of_medians() -> None:
    case = next(c for c in matmul.CASES if c.requirements)
    rows = [
        matmul.Row("mine", True, Timing((2.0,)), 0.0),
        matmul.Row("torch", False, Timing((3.0,)), 0.0),
        matmul.Row("wrong", True, Timing((1.0,)), 1.0),
    ]
    result = matmul.CaseResult(case, rows)
    assert result.speedup(rows[0]) == 1.5 and result.speedup(rows[2]) is None
    assert [measured for _, measured in result.verdicts(rows[0])] == [1.5]
    told = result.to_dict(LIMITS)["candidates"][0]
    assert told["gflops"] == case.flops / 2e9 and told["compute_share"] == pytest.approx(
        case.flops / 2e9 / 100
    )


def test_a_pattern_that_matches_nothing_is_refused_with_the_names() -> None:
    assert {c.name for c in choice.named("matmul", matmul.CASES, "gemm-64*, linear-1-")} >= {
        "gemm-64-f32",
        "linear-1-4096-bf16",
    }
    with pytest.raises(InvalidProblem, match="no matmul case is called 'nothing'; cases are gemm-2048-f32"):
        choice.named("matmul", matmul.CASES, "nothing")


def test_the_command_prints_numbers_for_every_candidate() -> None:
    result = invoke(
        "bench", "matmul", "--quick", "--cases", "gemm-64-f32", "--backend", "reference", "--json"
    )
    assert result.exit_code == 0, result.output
    (case,) = json.loads(result.stdout)["cases"]
    assert [c["candidate"] for c in case["candidates"]] == ["reference", "torch"]
