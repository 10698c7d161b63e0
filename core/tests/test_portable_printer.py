"""The printer of pointwise graphs as Triton, under Triton's interpreter: what it prints computes what torch computes."""

from __future__ import annotations

from typing import Any

import interpreted
import pytest
import torch
from torch import Tensor

from torchhal.pointwise import PRIMITIVES, GraphBuilder, capture, evaluate
from torchhal.pointwise.dtypes import DTYPES, FLOATS
from torchhal.portable import printer

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


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_each_conversion_is_that_of_torch(source: torch.dtype, target: torch.dtype) -> None:
    builder = GraphBuilder([("x", source)])
    graph = builder.finish([builder.cast(builder.input(0), target)])
    x = operand(source, 5)
    if source.is_floating_point and not target.is_floating_point and target is not torch.bool:
        x = x.nan_to_num(1.0, 3.0, 2.0).abs()  # what has no integer has no meaning either
    assert torch.equal(interpreted.evaluate(graph, [x]).nan_to_num(77.0), x.to(target).nan_to_num(77.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_captured_tensors_are_read_by_any_strides_from_either_end(dtype: torch.dtype) -> None:
    table = operand(dtype, 1)[:60].view(4, 15).T
    row, column = (torch.arange(SIZE, dtype=torch.int32) * 7) % 15, torch.arange(SIZE) % 4 - 4
    captured = capture(lambda i, j: table[i, j], [("i", torch.int32), ("j", torch.int64)])
    for wide in (table, table.expand(15, 4)):
        found = interpreted.evaluate(captured.graph, [row, column], [wide])
        assert torch.equal(found.nan_to_num(7.0), wide[row.long(), column].nan_to_num(7.0))


def test_an_index_outside_a_captured_tensor_is_brought_to_its_nearest_end() -> None:
    table = torch.tensor([1.0, 2.0, 3.0])
    index = torch.arange(-32, 32, dtype=torch.int32)
    graph = capture(lambda i: table[i], [("i", torch.int32)]).graph
    expected = table[index.long().clamp(-3, 2)]
    assert torch.equal(interpreted.evaluate(graph, [index], [table]), expected)
    assert torch.equal(interpreted.evaluate(graph, [index], [torch.empty(0)]), torch.zeros(SIZE))


def test_offsets_of_more_than_32_bits_are_computed_in_64() -> None:
    memory = torch.empty(2**31 + 8, dtype=torch.uint8)  # which nobody touches, and so takes no memory
    table = memory.as_strided((2, 2), (2**31, 1))
    table[0], table[1] = torch.tensor([1, 2], dtype=torch.uint8), torch.tensor([3, 4], dtype=torch.uint8)
    assert printer.is_wide([table])
    graph = capture(lambda i: table[i, i], [("i", torch.int32)]).graph
    index = torch.arange(SIZE, dtype=torch.int32) % 2
    assert torch.equal(interpreted.evaluate(graph, [index], [table]), table[index.long(), index.long()])


def test_a_program_of_many_steps_computes_what_torch_computes() -> None:
    bias = torch.linspace(-1, 1, 9, dtype=torch.bfloat16)
    scale = torch.tensor(0.5)

    def program(x: Any, i: Any) -> Any:
        near = torch.where(i % 3 == 0, x * scale, torch.sigmoid(x)) + bias[i % 9]
        return torch.tanh(near / 3.0) * torch.exp(-(x**2)) - (i // 4).to(torch.float16) * 1e-3

    x, i = (
        operand(torch.float32, 2).nan_to_num(0.0, 1.0, -1.0),
        torch.arange(-20, SIZE - 20, dtype=torch.int32),
    )
    captured = capture(program, [("x", torch.float32), ("i", torch.int32)])
    found = interpreted.evaluate(captured.graph, [x, i], captured.tensors)
    torch.testing.assert_close(found, program(x, i), rtol=1e-6, atol=1e-7)


def test_a_function_is_printed_once_for_each_graph() -> None:
    first, again = (capture(lambda x: x + 0.5, [("x", torch.float32)]).graph for _ in range(2))
    assert printer.function(first) is printer.function(again)
    assert printer.function(first) is not printer.function(first, True)


def test_erf_is_within_two_units_in_the_last_place_and_keeps_what_is_no_number() -> None:
    x = torch.cat(
        [
            torch.linspace(-6, 6, 4088),
            torch.tensor([0.92, -0.92, 4.0, 1e-30, -0.0, float("inf"), -float("inf"), float("nan")]),
        ]
    )
    builder = GraphBuilder([("x", torch.float32)])
    found = interpreted.evaluate(builder.finish([builder.apply("erf", builder.input(0))]), [x]).double()
    truth = torch.special.erf(x.double())
    unit = torch.finfo(torch.float32).eps * 2.0 ** torch.floor(torch.log2(truth.abs().clamp_min(1e-38)))
    assert torch.equal(found.isnan(), truth.isnan())
    assert ((found - truth).abs() <= 2 * unit)[~truth.isnan()].all()
