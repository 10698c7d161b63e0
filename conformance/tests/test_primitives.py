"""Every primitive of the pointwise language has samples in which nothing else can be to blame."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from torchhal.pointwise import capture
from torchhal.pointwise.primitives import PRIMITIVES, Primitive
from torchhal_conformance.families import (
    attention_calls,
    foreach_calls,
    foreach_functions,
    fusions,
    matmul_calls,
    mods,
    primitives,
)

GLUE = {"input", "constant", "cast", "gather", "add", "mul"}
"""What may stand beside the one primitive of a function: its operands, and what adds it to a value."""
INDICES = {
    "score_mod": ("b", "h", "q", "k"),
    **dict.fromkeys(("a_prologue", "b_prologue", "epilogue"), ("b", "r", "c")),
}


def words(function: Callable[..., Any], inputs: list[tuple[str, torch.dtype]]) -> set[str]:
    return {node.primitive for node in capture(function, inputs).graph.nodes}


def function_of(place: str, name: str) -> Callable[..., Any]:
    table = primitives.captured(name, (5,), torch.Generator().manual_seed(1))
    known = mods.PRIMITIVE_MODS if place == "score_mod" else fusions.PRIMITIVE_FUNCTIONS
    return known[primitives.PREFIX + name].over(table.float() if table.is_floating_point() else table)


@pytest.mark.parametrize("name", PRIMITIVES)
def test_every_primitive_is_alone_in_a_function_of_every_place(name: str) -> None:
    dtypes = primitives.operand_dtypes(name, primitives.own_dtype(name))
    assert dtypes is not None
    mapped = foreach_functions.FUNCTIONS[primitives.PREFIX + name].over(torch.ones(()))
    assert name in words(mapped, [(f"x{i}", d) for i, d in enumerate(dtypes)]) <= {name, *GLUE}
    for place, letters in INDICES.items():
        inputs = [("value", torch.float32), *((letter, torch.int32) for letter in letters)]
        assert name in words(function_of(place, name), inputs) <= {name, *GLUE}, place


def test_every_primitive_has_a_sample_in_every_place() -> None:
    wanted = {primitives.PREFIX + name for name in PRIMITIVES}
    assert wanted <= {call.score_mod for call in attention_calls.calls()}
    assert wanted <= {call.function for call in foreach_calls.calls()}
    for place in fusions.PLACES:
        assert wanted <= {getattr(call, place) for call in matmul_calls.calls()}, place


@pytest.mark.parametrize("name", PRIMITIVES)
def test_operands_of_a_primitive_are_within_its_domain(name: str) -> None:
    """A domain that is missing shows as a NaN or as a number that no error bound can be taken of."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.int32, torch.int64):
        dtypes = primitives.operand_dtypes(name, dtype)
        if dtypes is None or name == "gather":
            continue
        operands = [primitives.draw(name, i, (999,), d, generator) for i, d in enumerate(dtypes)]
        found = primitives.function(name)(*operands)
        assert found.is_floating_point() == primitives.result_is_floating(name, dtype)
        assert torch.isfinite(found).all() and found.double().abs().max() < 1e5
        assert len(found.unique()) > 1 or name == "constant", "an operand for each outcome"


def test_a_primitive_that_nobody_spelled_can_not_be_overlooked(monkeypatch: pytest.MonkeyPatch) -> None:
    word = Primitive("lookup", 1, lambda dtypes: dtypes[0], "one operand")
    monkeypatch.setitem(PRIMITIVES, "lookup", word)
    with pytest.raises(KeyError, match="lookup"):
        primitives.function("lookup")
