"""The printer of pointwise graphs as Triton, under Triton's interpreter: what it prints computes what torch computes."""

from __future__ import annotations

import interpreted
import pytest
import torch
from torch import Tensor

from torchhal.pointwise import PRIMITIVES, GraphBuilder, capture, evaluate
from torchhal.pointwise.dtypes import DTYPES, FLOATS

SIZE = 64
LEAVES = ("input", "constant", "gather", "cast")
ODD = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    float("inf"),
    -float("inf"),
    float("nan"),
    0.5,
    1.5,
    2.5,
    -0.5,
    -1.5,
    -2.5,
    7.0,
    -7.0,
    1e-8,
)


def operand(dtype: torch.dtype, seed: int) -> Tensor:
    """Numbers of either sign, the odd ones of the type among them."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(SIZE, generator=generator) > 0.5
    if not dtype.is_floating_point:
        low = 0 if dtype is torch.uint8 else -20
        return torch.randint(low, 21, (SIZE,), generator=generator).to(dtype)
    drawn = torch.randn(SIZE, generator=generator, dtype=torch.float64) * 2
    drawn[:: SIZE // len(ODD)] = torch.tensor(ODD, dtype=torch.float64)
    return drawn.roll(seed).to(dtype)


def patterns(name: str) -> list[tuple[torch.dtype, ...]]:
    """Every row of operand types that a primitive takes."""
    word = PRIMITIVES[name]
    rows = (
        [(dtype,) * word.arity for dtype in DTYPES]
        if name != "where"
        else [(torch.bool, d, d) for d in DTYPES]
    )
    return [row for row in rows if word.rule(row) is not None]


CASES = [(name, row) for name in PRIMITIVES if name not in LEAVES for row in patterns(name)]


def _defined(name: str, row: tuple[torch.dtype, ...], operands: list[Tensor]) -> None:
    """Move operands out of where integers have no answer."""
    if row[-1].is_floating_point or row[-1] is torch.bool:
        return
    if name in ("floordiv", "truncdiv", "remainder", "fmod"):
        operands[1][operands[1] == 0] = 3


@pytest.mark.parametrize(("name", "row"), CASES, ids=lambda x: x if isinstance(x, str) else str(x[-1])[6:])
def test_each_primitive_is_what_torch_computes_in_every_type(name: str, row: tuple[torch.dtype, ...]) -> None:
    builder = GraphBuilder([(f"x{i}", dtype) for i, dtype in enumerate(row)])
    graph = builder.finish([builder.apply(name, *(builder.input(i) for i in range(len(row))))])
    operands = [operand(dtype, 7 * i) for i, dtype in enumerate(row)]
    _defined(name, row, operands)
    (expected,) = evaluate(graph, operands)
    found = interpreted.evaluate(graph, operands)
    assert found.dtype is expected.dtype
    bound = 4 * torch.finfo(found.dtype).eps if found.dtype.is_floating_point else 0.0
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound / 8, equal_nan=True)


@pytest.mark.parametrize("divisor", [20.0, 3.0, -0.7, 8.0, -0.25, 1e10, 0.0, float("inf"), 1e-30])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_division_by_a_number_is_what_torch_computes(divisor: float, dtype: torch.dtype) -> None:
    x = operand(dtype, 3)
    captured = capture(lambda x: x / divisor, [("x", dtype)])
    expected = (x / divisor).nan_to_num(nan=77.0)
    found = interpreted.evaluate(captured.graph, [x]).nan_to_num(nan=77.0)
    if interpreted.DEVICE == "cpu":  # where a fused multiply-add is not fused
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(found, expected)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))
