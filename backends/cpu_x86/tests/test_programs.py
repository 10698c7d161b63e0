"""The native vector machine computes what a graph means, for every primitive, type and span, and runs nothing else."""

from __future__ import annotations

import itertools
import random

import program_cases as cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchhal.pointwise import Graph, GraphBuilder, evaluate
from torchhal.pointwise.dtypes import DTYPES, is_float, is_integer
from torchhal.pointwise.graph import CapturedSpec, Input
from torchhal.pointwise.primitives import PRIMITIVES
from torchhal_cpu_x86 import programs

Tensor = torch.Tensor

COMPUTED = [name for name in PRIMITIVES if name not in ("input", "constant", "gather", "cast", "detach")]
DIVISIONS = ("floordiv", "remainder", "fmod", "truncdiv")
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1.0, -1.0, 1e-40, 88.5, -87.0, 0.5)


def values(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Ordinary numbers with the special ones of the type among them."""
    if dtype is torch.bool:
        return torch.rand(shape) < 0.5
    chosen = torch.rand(shape) < 0.15
    if dtype.is_floating_point:
        special = torch.tensor(SPECIAL, dtype=torch.float64)
        drawn = torch.randn(shape, dtype=torch.float64) * 3
    else:
        info = torch.iinfo(dtype)
        special = torch.tensor([info.min, info.max, info.bits, info.bits - 1])
        drawn = torch.randint(-9 if info.min else 0, 10, shape)
    return torch.where(chosen, special[torch.randint(len(special), shape)], drawn).to(dtype)


def divisors(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """Without what is undefined: whole numbers divided by 0, the smallest divided by -1."""
    if dtype.is_floating_point:  # torch's vector fmod gives NaN for subnormal divisors
        return torch.where(tensor.abs() < 1e-30, torch.ones_like(tensor), tensor)
    return torch.where((tensor == 0) | (tensor == -1), torch.full_like(tensor, 2), tensor)


def operand_types(name: str, dtype: torch.dtype) -> list[torch.dtype]:
    return [torch.bool, dtype, dtype] if name == "where" else [dtype] * PRIMITIVES[name].arity


def apply(name: str, types: list[torch.dtype]) -> Graph:
    builder = GraphBuilder([Input(f"x{i}", t) for i, t in enumerate(types)], [])
    return builder.finish([builder.apply(name, *(builder.input(i) for i in range(len(types))))])


def check_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within 4 units in the last place, and the same NaN and infinities; whole numbers exactly."""
    expected = expected.expand(found.shape).to(found.dtype)
    if not dtype.is_floating_point:
        assert torch.equal(found, expected)
        return
    info = torch.finfo(dtype)
    a, b = found.double(), expected.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs() / (info.eps * b.abs().clamp_min(info.tiny)))
    assert error.nan_to_num(torch.inf).max() <= 4


def test_the_library_names_the_primitives_of_the_core() -> None:
    assert set(programs.primitive_codes()) == set(PRIMITIVES)


@pytest.mark.parametrize("isa", cases.SETS)
@pytest.mark.parametrize("name", COMPUTED)
def test_every_primitive_computes_what_it_means_for_every_type_and_span(name: str, isa: str) -> None:
    torch.manual_seed(0)
    draw = random.Random(name)
    for dtype in DTYPES:
        types = operand_types(name, dtype)
        if PRIMITIVES[name].rule(types) is None:
            continue
        graph = apply(name, types)
        combinations = list(itertools.product(cases.SPANS, repeat=len(types)))
        for spans in draw.sample(combinations, min(len(combinations), 16)):
            rows = draw.choice([1, 3, 16, 17, 40, 41, 97, 128])
            shapes = [tuple(rows if size == -1 else size for size in cases.SPANS[span]) for span in spans]
            inputs = [values(t, shape) for t, shape in zip(types, shapes, strict=True)]
            if name in DIVISIONS:
                inputs[1] = divisors(dtype, inputs[1])
            (expected,) = evaluate(graph, inputs)
            check_close(cases.run(graph, inputs, spans, rows=rows, isa=isa), expected, expected.dtype)


@pytest.mark.parametrize("isa", cases.SETS)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_casts_are_those_of_torch_between_all_types(target: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    for source in DTYPES:
        x = values(source, (5, 16))
        if source.is_floating_point and is_integer(target):  # what no integer holds is undefined
            x = x.nan_to_num(0.0, 7.0, -7.0).clamp(0 if target is torch.uint8 else -100, 100)
        builder = GraphBuilder([Input("x", source)], [])
        graph = builder.finish([builder.cast(builder.input(0), target)])
        check_close(cases.run(graph, [x], ["block"], isa=isa), evaluate(graph, [x])[0], target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constants_keep_their_value(dtype: torch.dtype) -> None:
    number = True if dtype is torch.bool else 3.25 if is_float(dtype) else 101
    builder = GraphBuilder([], [])
    graph = builder.finish([builder.constant(number, dtype)])
    assert (cases.run(graph, [], [], rows=3) == number).all()


def gather_graph(spec: CapturedSpec, index: torch.dtype) -> Graph:
    builder = GraphBuilder([Input(f"i{d}", index) for d in range(spec.ndim)], [spec])
    return builder.finish([builder.gather(0, [builder.input(d) for d in range(spec.ndim)])])


@pytest.mark.sanitized
@pytest.mark.parametrize("isa", cases.SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_read_any_strides_by_indices_from_both_ends(dtype: torch.dtype, isa: str) -> None:
    torch.manual_seed(0)
    table = values(dtype, (14, 3, 10)).transpose(0, 2)[::2, :, 1::3]
    for index, spans in itertools.product(
        (torch.int32, torch.int64),
        [("rows", "one", "lanes"), ("block", "rows", "one"), ("lanes", "lanes", "one")],
    ):
        shapes = [tuple(50 if size == -1 else size for size in cases.SPANS[span]) for span in spans]
        inputs = [
            torch.randint(-size, size, shape).to(index)
            for size, shape in zip(table.shape, shapes, strict=True)
        ]
        graph = gather_graph(CapturedSpec(dtype, 3), index)
        found = cases.run(graph, inputs, spans, [table], rows=50, isa=isa)
        check_close(found, evaluate(graph, inputs, [table])[0], dtype)


@pytest.mark.sanitized
def test_an_index_out_of_range_reads_inside_the_tensor() -> None:
    memory = torch.full((40,), 99.0)
    table = memory[10:30]
    table[:] = 1.0
    indices = torch.tensor([-(2**31), -21, -20, -1, 0, 19, 20, 2**31 - 1] * 2, dtype=torch.int32)[None]
    graph = gather_graph(CapturedSpec(torch.float32, 1), torch.int32)
    assert (cases.run(graph, [indices], ["lanes"], [table], rows=2) == 1.0).all()


def test_an_empty_captured_tensor_gives_zeros_and_is_not_read() -> None:
    graph = gather_graph(CapturedSpec(torch.float32, 2), torch.int32)
    inputs = [torch.zeros(1, 16, dtype=torch.int32), torch.zeros(5, 1, dtype=torch.int32)]
    assert (cases.run(graph, inputs, ["lanes", "rows"], [torch.empty(3, 0)]) == 0).all()


# ---------------------------------------------------------------------------- whole programs

EXACT = (
    "add", "sub", "mul", "min", "max", "neg", "abs", "relu", "where", "eq", "lt", "ge", "bitwise_and", "bitwise_xor",
    "logical_or", "logical_not", "clamp_min", "floor", "isnan", "shift_left", "sign",
)  # fmt: skip
"""Primitives that are rounded once, or not at all: whatever is made of them has to agree to the bit."""


@st.composite
def graphs(draw: st.DrawFn) -> Graph:
    """A function of a score and indices, made of exact primitives."""
    inputs = [Input("s", torch.float32), *(Input(name, torch.int32) for name in "bhqk")]
    builder = GraphBuilder(inputs, [CapturedSpec(torch.float32, 1)])
    ids = [builder.input(i) for i in range(5)]
    ids.append(builder.constant(draw(st.floats(-4, 4, width=32)), torch.float32))
    ids.append(builder.constant(draw(st.integers(-9, 9)), torch.int32))
    ids.append(builder.gather(0, [draw(st.sampled_from(ids[1:5]))]))
    for _ in range(draw(st.integers(1, 14))):
        name = draw(st.sampled_from((*EXACT, "cast")))
        if name == "cast":
            dtype = draw(
                st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
            )
            source = draw(st.sampled_from(ids))
            if is_float(dtype) or not is_float(builder.dtype(source)):
                ids.append(builder.cast(source, dtype))
            continue
        operands = [draw(st.sampled_from(ids)) for _ in range(PRIMITIVES[name].arity)]
        if PRIMITIVES[name].rule([builder.dtype(i) for i in operands]) is not None:
            ids.append(builder.apply(name, *operands))
    return builder.finish([builder.cast(ids[-1], torch.float32)])


@settings(max_examples=300, deadline=None)
@given(graphs(), st.sampled_from(cases.SETS), st.sampled_from([1, 16, 39, 40, 41, 120]), st.booleans())
def test_a_function_of_exact_primitives_agrees_to_the_bit_in_both_layouts(
    graph: Graph, isa: str, rows: int, lanes_are_keys: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    score = torch.randn(rows, 16, generator=generator)
    b, h = torch.full((1, 1), 3), torch.arange(16)[None]
    q, k = torch.arange(16)[None] + 7, torch.arange(rows)[:, None] + 100
    spans = ["block", "one", "lanes", "lanes", "rows"]
    if lanes_are_keys:
        h, q, k = h.new_ones(rows, 1) * 2, torch.arange(rows)[:, None], torch.arange(rows * 16).view(rows, 16)
        spans = ["block", "one", "rows", "rows", "block"]
    inputs = [score, *(t.to(torch.int32).contiguous() for t in (b, h, q, k))]
    captured = [torch.randn(11, generator=generator)]
    (expected,) = evaluate(graph, inputs, captured, clamp_indices=True)
    found = cases.run(graph, inputs, spans, captured, rows=rows, isa=isa)
    same = (found == expected) | (found.isnan() & expected.isnan())
    assert same.all()


def alibi() -> Graph:
    builder = GraphBuilder(
        [Input("s", torch.float32), *(Input(name, torch.int32) for name in "bhqk")],
        [CapturedSpec(torch.float32, 1)],
    )
    score, _, head, row, key = (builder.input(i) for i in range(5))
    distance = builder.cast(builder.apply("sub", key, row), torch.float32)
    bias = builder.apply("mul", builder.gather(0, [head]), distance)
    return builder.finish([builder.apply("tanh", builder.apply("add", score, bias))])


@pytest.mark.sanitized
@settings(max_examples=1000, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 200), st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 90)), max_size=4
    ),
    st.integers(-60, 3),
)
def test_damaged_words_are_refused_or_are_another_program_and_nothing_else_is_read(
    changes: list[tuple[int, int]], length: int
) -> None:
    """Run under an address sanitizer by tools/sanitize.py, where a word that is trusted too early is found."""
    words = list(programs.encode(alibi()))
    for place, word in changes:
        words[place % len(words)] = word
    words = words[: length or None] if length <= 0 else [*words, *range(length)]
    rows, captured = 41, [torch.randn(3)]
    inputs = [torch.randn(rows, 16), *(torch.ones(rows, 16, dtype=torch.int32) for _ in range(4))]
    spans = ["block", "one", "lanes", "lanes", "rows"]
    code, _ = cases.run_words(words, inputs, spans, captured, rows, cases.SETS[-1], torch.float32)
    assert code in (0, 10)


@pytest.mark.parametrize(
    ("rows", "captured", "code"),
    [(0, [torch.zeros(3)], 4), (129, [torch.zeros(3)], 4), (5, [], 10), (5, [torch.zeros(3, 1)], 10),
     (5, [torch.zeros(3, dtype=torch.float64)], 10)],
)  # fmt: skip
def test_sizes_and_operands_that_do_not_fit_are_refused(rows: int, captured: list[Tensor], code: int) -> None:
    inputs = [torch.zeros(5, 16), *(torch.zeros(5, 16, dtype=torch.int32) for _ in range(4))]
    spans = ["block", "one", "lanes", "lanes", "rows"]
    words = programs.encode(alibi())
    assert cases.run_words(words, inputs, spans, captured, rows, "avx2", torch.float32)[0] == code
