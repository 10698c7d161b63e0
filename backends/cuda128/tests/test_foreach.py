"""Which foreach problems cuda128 plans on which hardware."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from torchhal.pointwise import capture
from torchhal.problems import Decline, ForeachProblem, Plan
from torchhal_cuda128 import foreach
from torchhal_cuda128.hardware import Device, Hardware

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 << 30, 132)
B200 = Device("NVIDIA B200", (10, 0), 180 << 30, 148)
READY = Hardware(
    "2.13.0+cu128", torch_cuda=(12, 8), driver_cuda=(12, 8), devices=(H100,), arch_list=("sm_90", "sm_100")
)
GRAPH = capture(lambda x: x * 2, [("x", torch.float32)]).graph


def problem(**fields: Any) -> ForeachProblem:
    options: dict[str, Any] = {"functions": (GRAPH,), "operands": ("list",), "in_place": True}
    return ForeachProblem(torch.device("cuda", 0), **{**options, **fields})


def test_foreach_on_hopper_is_planned_by_the_portable_kernel() -> None:
    pytest.importorskip("triton")
    answer = foreach.plan(problem(), READY)
    assert isinstance(answer, Plan), answer
    assert answer.description == "Triton, Hopper, one launch for each kind of tensors"
    assert answer.differentiable and answer.deterministic and answer.direct is not None


@pytest.mark.parametrize("fields", [
    {"features": frozenset({"backward"})},
    {"in_place": False},
    {"reduction": "sum", "in_place": False},
    {"functions": (GRAPH, GRAPH)},
], ids=lambda fields: next(iter(fields)))  # fmt: skip
def test_only_calls_in_place_of_one_function_are_served_directly(fields: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    answer = foreach.plan(problem(**fields), READY)
    assert isinstance(answer, Plan) and answer.direct is None


@pytest.mark.parametrize(("hardware", "operands", "words"), [
    (replace(READY, devices=(B200,)), 1, r"NVIDIA B200 has compute capability 10\.0; .* never run .*architecture_untried"),
    (replace(READY, torch_cuda=None), 1, "built without CUDA.*torch_without_cuda"),
    (READY, 65, "functions of up to 64 operands are served .too_many_operands"),
])  # fmt: skip
def test_what_is_not_served_is_declined_in_words(hardware: Hardware, operands: int, words: str) -> None:
    pytest.importorskip("triton")
    answer = foreach.plan(problem(operands=("list",) * operands), hardware)
    assert isinstance(answer, Decline)
    assert re.search(words, str(answer)), answer
