"""The packed cases of ``torchhal bench matmul``: right results pass, and a candidate meets each copy of its weight in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torchhal.bench import matmul, packed
from torchhal.bench.timing import Effort

CPU = torch.device("cpu")
SCHEMES = {case.scheme: replace(case, rows=5, columns=40, inner=64) for case in packed.CASES}


@pytest.mark.parametrize("case", SCHEMES.values(), ids=lambda case: case.name)
def test_the_reference_and_torch_are_right_on_every_scheme(case: packed.PackedLinear) -> None:
    result = matmul.measure(case, ["reference"], CPU, Effort(1, 0.0, 0.0, 1, 0.0))
    assert all(row.passed(case.dtype) for row in result.rows), result.rows


def test_every_call_reads_another_copy_of_the_weight() -> None:
    weights = SCHEMES["int8"].operands(CPU)["weights"]
    assert next(weights).data.data_ptr() != next(weights).data.data_ptr()


def test_the_bytes_of_a_case_are_those_of_packed_quants_and_scales() -> None:
    case = SCHEMES["int4:128"]
    assert case.bytes == 2 * 5 * (64 + 40) + 32 * 40 + 4 * 40
