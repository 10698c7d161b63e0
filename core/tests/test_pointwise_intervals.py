"""Bounds: whatever a primitive gives inside a box of operands lies within the range that was said of the box."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchhal.pointwise import PRIMITIVES, GraphBuilder, Primitive, evaluate
from torchhal.pointwise.dtypes import FLOATS, INTEGERS, integer_range, is_float, is_integer
from torchhal.pointwise.interval_arithmetic import Range, point
from torchhal.pointwise.interval_rules import RULES
from torchhal.pointwise.intervals import DIVISIONS, RangeTable, bound

LEAVES = frozenset(("input", "constant", "gather"))
COMPUTING = sorted(set(PRIMITIVES) - LEAVES)
DTYPES = (*FLOATS, *INTEGERS, torch.bool)


def operand_dtypes(name: str, dtype: torch.dtype) -> list[torch.dtype]:
    rest = [dtype] * (PRIMITIVES[name].arity - 1)
    return [torch.bool if name == "where" else dtype, *rest]


SIGNATURES = [
    (name, dtype)
    for name in COMPUTING
    for dtype in DTYPES
    if name == "cast" or PRIMITIVES[name].rule(operand_dtypes(name, dtype)) is not None
]
LIMITS = {dtype: integer_range(dtype) for dtype in INTEGERS}
FLOATING = (
    -torch.inf,
    -300.0,
    -2.5,
    -1.0,
    -0.75,
    -0.0,
    0.0,
    1e-6,
    0.5,
    1.0,
    1.5,
    7.0,
    65504.0,
    3e38,
    torch.inf,
)


@st.composite
def boxes(draw: st.DrawFn, dtype: torch.dtype) -> list[Any]:
    """Sorted values of ``dtype``, of which the first and the last are the ends of a range."""
    if dtype is torch.bool:
        return draw(st.sampled_from([[False], [True], [False, True]]))
    if is_float(dtype):
        numbers = draw(st.lists(st.sampled_from(FLOATING) | st.floats(-20, 20), min_size=1, max_size=5))
        return sorted(torch.tensor(numbers, dtype=dtype).tolist())
    least, most = LIMITS[dtype]
    small = st.integers(max(least, -9), 9)
    edge = st.integers(least, least + 3) | st.integers(most - 3, most)
    first = draw(small | edge)
    return list(range(first, min(most, first + draw(st.integers(0, 8))) + 1))


def ranged(values: list[Any], dtype: torch.dtype) -> Range:
    numbers = torch.tensor(values, dtype=dtype)
    return Range(numbers[0], numbers[-1])


def operation(word: Primitive, dtypes: list[torch.dtype], result: torch.dtype | None = None) -> Any:
    builder = GraphBuilder([(f"x{i}", dtype) for i, dtype in enumerate(dtypes)])
    operands = [builder.input(i) for i in range(len(dtypes))]
    node = builder.cast(operands[0], result) if result is not None else builder.apply(word.name, *operands)
    return builder.finish([node])


def assert_within(value: torch.Tensor, found: Range) -> None:
    low, high = (end.expand_as(value) for end in found[:2])
    inside = (low <= value) & (value <= high)
    if is_float(value.dtype):
        nan = torch.tensor(False) if found.nan is None else found.nan
        inside = torch.where(value.isnan(), nan.expand_as(value), inside)
    assert bool(inside.all()), (value[~inside], found)


@pytest.mark.parametrize(("name", "dtype"), SIGNATURES, ids=lambda item: str(item).removeprefix("torch."))
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_no_value_of_a_primitive_lies_outside_its_bounds(
    name: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    word = PRIMITIVES[name]
    dtypes = operand_dtypes(name, dtype)
    result = data.draw(st.sampled_from([d for d in DTYPES if d is not dtype])) if name == "cast" else None
    values = [data.draw(boxes(d)) for d in dtypes]
    ranges = [ranged(v, d) for v, d in zip(values, dtypes, strict=True)]
    graph = operation(word, dtypes, result)
    (found,), faulty = bound(graph, ranges, [])
    assert found.low.dtype is found.high.dtype is graph.output_dtypes[0]
    if is_integer(dtype) and name in DIVISIONS:
        assert bool(faulty) == (0 in values[1])
        assume(not faulty)
        assume(
            not (LIMITS[dtype][0] in values[0] and -1 in values[1])
        )  # a trap of the processor, not a number
    if is_integer(dtype) and name == "pow":
        assume(min(values[1]) >= 0)
    if name == "cast" and is_float(dtype) and result is not None and is_integer(result):
        least, most = LIMITS[result]
        assume(
            all(least <= v < most for v in values[0]) and abs(values[0][0]) < 2**62
        )  # others are undefined
    points = [torch.tensor(v, dtype=d) for v, d in zip(values, dtypes, strict=True)]
    grid = [p.view([-1 if j == i else 1 for j in range(len(points))]) for i, p in enumerate(points)]
    assert_within(evaluate(graph, grid)[0], found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_values_of_erf_lie_within_bounds_though_torch_is_off(dtype: torch.dtype) -> None:
    for value in torch.logspace(-8, 0, 200).to(dtype):
        (found,), _ = bound(operation(PRIMITIVES["erf"], [dtype], None), [Range(value, value, None)], [])
        assert_within(torch.erf(value[None]), found)


@pytest.mark.parametrize("name", COMPUTING)
def test_a_primitive_without_a_rule_is_bounded_by_all_of_its_dtype(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(RULES, name, raising=False)
    dtype = next(d for n, d in SIGNATURES if n == name)
    dtypes = operand_dtypes(name, dtype)
    ranges = [ranged([1], d) for d in dtypes]
    graph = operation(PRIMITIVES[name], dtypes, torch.int32 if name == "cast" else None)
    (found,), _ = bound(graph, ranges, [])
    result = found.low.dtype
    if is_float(result):
        assert (found.low, found.high) == (-torch.inf, torch.inf)
        assert found.nan is not None and bool(found.nan)
    else:
        assert (found.low.item(), found.high.item()) == LIMITS.get(result, (False, True))


def test_every_rule_is_of_a_primitive() -> None:
    assert set(RULES) <= set(PRIMITIVES)


@settings(deadline=None)
@given(
    left=st.tuples(*[st.integers(-40, 40)] * 2),
    right=st.tuples(*[st.integers(-40, 40)] * 2),
    name=st.sampled_from(("add", "sub", "mul", "min", "max")),
)
def test_integer_arithmetic_is_bounded_exactly(
    left: tuple[int, int], right: tuple[int, int], name: str
) -> None:
    sides = [list(range(min(pair), max(pair) + 1)) for pair in (left, right)]
    graph = operation(PRIMITIVES[name], [torch.int64] * 2)
    (found,), _ = bound(graph, [ranged(side, torch.int64) for side in sides], [])
    values = evaluate(graph, torch.meshgrid(*map(torch.tensor, sides), indexing="ij"))[0]
    assert (found.low.item(), found.high.item()) == (values.min().item(), values.max().item())


def test_one_box_that_wraps_leaves_the_others_exact() -> None:
    most = torch.iinfo(torch.int64).max
    graph = operation(PRIMITIVES["add"], [torch.int64] * 2)
    low, high = torch.tensor([1, 0]), torch.tensor([2, most])
    (found,), _ = bound(graph, [Range(low, high), Range(low, high)], [])
    assert found.low.tolist() == [2, -most - 1]
    assert found.high.tolist() == [4, most]


def test_a_float_that_may_be_nan_compares_with_nothing_for_sure() -> None:
    builder = GraphBuilder([("x", torch.float32)])
    root = builder.apply("sqrt", builder.input(0))
    graph = builder.finish([builder.apply("ge", root, builder.constant(-1.0, torch.float32))])
    for low, expected in ((0.0, True), (-1.0, False)):
        (found,), _ = bound(graph, [Range(torch.tensor(low), torch.tensor(4.0))], [])
        assert bool(found.low) is expected
        assert bool(found.high)


@settings(deadline=None)
@given(
    data=st.data(),
    dtype=st.sampled_from((torch.float32, torch.int64, torch.int32, torch.bool)),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_elements_read_at_an_interval_of_one_dimension_are_bounded_exactly(
    data: st.DataObject, dtype: torch.dtype, shape: list[int]
) -> None:
    seed = data.draw(st.integers(0, 99))
    source = torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    dim = data.draw(st.integers(0, len(shape) - 1))
    places = []
    for i, size in enumerate(shape):
        index = st.integers(-size, size - 1)
        places.append(sorted(data.draw(st.tuples(*[index] * (2 if i == dim else 1)))))
    indices = [Range(torch.tensor(place[0]), torch.tensor(place[-1])) for place in places]
    found, outside = RangeTable(source).read(indices)
    assert outside is None
    grid = torch.meshgrid(*[torch.arange(place[0], place[-1] + 1) for place in places], indexing="ij")
    values = source[grid]
    assert_within(values, found)
    if places[dim][0] >= 0 or places[dim][-1] < 0:  # around zero an index means both ends of the tensor
        assert found.low == values.to(found.low.dtype).amin()
        assert found.high == values.amax()


def test_stretches_of_unlike_lengths_are_read_at_once() -> None:
    source = torch.randint(0, 1000, (100,), generator=torch.Generator().manual_seed(1))
    pairs = list(itertools.combinations(range(0, 100, 7), 2))
    low, high = (torch.tensor(ends) for ends in zip(*pairs, strict=True))
    found, _ = RangeTable(source).read([Range(low, high)])
    assert found.low.tolist() == [source[a : b + 1].min().item() for a, b in pairs]
    assert found.high.tolist() == [source[a : b + 1].max().item() for a, b in pairs]


def test_a_nan_in_a_stretch_makes_its_elements_unordered() -> None:
    source = torch.tensor([1.0, torch.nan, 3.0, 4.0])
    found, _ = RangeTable(source).read([Range(torch.tensor([0, 2]), torch.tensor([1, 3]))])
    assert found.nan is not None
    assert found.nan.tolist() == [True, False]
    assert found.low.tolist() == [-torch.inf, 3.0]


@pytest.mark.parametrize(("low", "high", "beyond"), [(0, 3, True), (-4, -1, True), (-3, 2, False)])
def test_an_index_that_may_be_outside_its_tensor_is_told(low: int, high: int, beyond: bool) -> None:
    _, outside = RangeTable(torch.arange(3)).read([Range(torch.tensor(low), torch.tensor(high))])
    assert (outside is not None and bool(outside)) is beyond


def test_an_element_of_an_empty_tensor_is_told_to_be_outside() -> None:
    _, outside = RangeTable(torch.zeros(0)).read([point(torch.tensor(0))])
    assert outside is not None
    assert bool(outside)
