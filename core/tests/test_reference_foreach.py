"""The specification of foreach_map: bit for bit what the function gives tensor by tensor in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.pointwise import Graph, capture
from torchhal.problems import ForeachProblem
from torchhal.reference.foreach import depends_on, foreach_map, output_shape, plan

few = settings(max_examples=25, deadline=None)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8]
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "arithmetic": lambda x, y: (x + y) * x - y,
    "comparison": lambda x, y: torch.where(x > y, x - y, y),
    "torch": lambda x, y: torch.maximum(x, y).abs(),
    "floats": lambda x, y: torch.exp(-torch.sigmoid(x)) / (torch.sqrt(torch.abs(y)) + 1),
    "bool": lambda x, y: (x < y) & (x >= 0),
}


def graph_of(fn: Callable[..., Any], *dtypes: torch.dtype) -> Graph:
    return capture(fn, [(f"operand_{i}", dtype) for i, dtype in enumerate(dtypes)], what="function").graph


def problem_of(graphs: list[Graph], *how: str) -> ForeachProblem:
    return ForeachProblem(device=torch.device("cpu"), functions=tuple(graphs), operands=how)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=generator) * 4).abs().to(dtype)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


@few
@given(
    name=st.sampled_from(sorted(FUNCTIONS)), first=st.sampled_from(DTYPES), second=st.sampled_from(DTYPES), seed=st.integers(0, 2**30),
    shapes=st.lists(st.sampled_from([((3,), (3,)), ((2, 1), (4,)), ((0,), (1,)), ((7, 5), (5,)), ((130,), (1,))]), min_size=1, max_size=4),
)  # fmt: skip
def test_every_position_has_torchs_bits(
    name: str, first: torch.dtype, second: torch.dtype, seed: int, shapes: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    xs = [random_tensor(left, first, generator) for left, _ in shapes]
    ys = [random_tensor(right, second, generator) for _, right in shapes]
    fn = FUNCTIONS[name]
    (found,) = foreach_map(problem_of([graph_of(fn, first, second)], "list", "list"), [xs, ys], (), None)
    for x, y, result in zip(xs, ys, found, strict=True):
        assert_same(result, fn(x, y))


def test_each_position_uses_the_graph_of_its_types() -> None:
    graphs = [graph_of(lambda x: x / 2, dtype) for dtype in (torch.float32, torch.int64)]
    xs = [torch.tensor([3.0]), torch.tensor([3]), torch.tensor([5.0])]
    (found,) = foreach_map(problem_of(graphs, "list"), [xs], (), None)
    assert [t.tolist() for t in found] == [[1.5], [1.5], [2.5]]


def test_numbers_arrive_by_their_python_type() -> None:
    graph = graph_of(lambda x, s, t: x * s + t, torch.float32, torch.float64, torch.int64)
    xs = [torch.ones(2), torch.ones(3)]
    (found,) = foreach_map(problem_of([graph], "list", "scalars", "scalar"), [xs, [0.5, 0.25], 2], (), None)
    assert [t.tolist() for t in found] == [[2.5] * 2, [2.25] * 3]


def test_captured_scalars_are_read() -> None:
    held = torch.tensor(3.0)
    captured = capture(lambda x: x * held, [("x", torch.float32)], what="function")
    (found,) = foreach_map(problem_of([captured.graph], "list"), [[torch.ones(2)]], captured.tensors, None)
    assert found[0].tolist() == [3.0, 3.0]


def test_results_go_to_the_destinations_with_one_rounding() -> None:
    graph = graph_of(lambda x: (x + 1, x * 2), torch.float32)
    xs = [torch.tensor([1.0 + 2.0**-12]), torch.tensor([2.0])]
    out = ([torch.empty(1, dtype=torch.bfloat16), torch.empty(1)], xs)
    first, second = foreach_map(problem_of([graph], "list"), [xs], (), out)
    assert first[0] is out[0][0] and second[1] is xs[1]
    assert first[0].tolist() == [2.0] and first[1].tolist() == [3.0] and second[1].tolist() == [4.0]


def test_results_share_memory_with_nothing() -> None:
    x, held = torch.ones(3), torch.tensor(5.0)
    captured = capture(lambda x: (x, x, x.detach(), held, 1.0), [("x", torch.float32)], what="function")
    results = foreach_map(problem_of([captured.graph], "list"), [[x]], captured.tensors, None)
    tensors = [items[0] for items in results]
    assert [t.shape for t in tensors] == [(3,)] * 5
    pointers = {t.data_ptr() for t in (*tensors, x, held)}
    assert len(pointers) == 7
    tensors[3][0] = 0.0
    assert tensors[3].tolist() == [0.0, 5.0, 5.0]


def test_an_output_has_the_shape_of_what_it_depends_on() -> None:
    graph = graph_of(
        lambda x, y, s: (x + 1, y * s, torch.zeros_like(x) + s), torch.float32, torch.float32, torch.float64
    )
    assert depends_on(graph) == ({0}, {1, 2}, {2})
    results = foreach_map(
        problem_of([graph], "list", "list", "scalar"), [[torch.ones(3)], [torch.ones(2, 1)], 2.0], (), None
    )
    assert [items[0].shape for items in results] == [(3,), (2, 1), (2, 3)]


def test_shapes_that_do_not_broadcast_are_torchs_error() -> None:
    with pytest.raises(RuntimeError):
        output_shape((0, 1), (torch.Size((2,)), torch.Size((3,))))


def test_gradients_flow_to_operands_and_captured_scalars() -> None:
    held = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    captured = capture(
        lambda x, y: torch.tanh(x * held) * y, [("x", torch.float64), ("y", torch.float64)], what="function"
    )
    made = plan(problem_of([captured.graph], "list", "list"))

    def run(x: Tensor, y: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return tuple(made.run([[x, x * 2], [y, y]], (scale,), None)[0])

    x, y = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3,), (2, 1)))
    assert made.differentiable and torch.autograd.gradcheck(run, (x, y, held))


def test_empty_lists_give_empty_lists() -> None:
    graph = graph_of(lambda x: (x, x), torch.float32)
    assert foreach_map(problem_of([graph], "list"), [[]], (), None) == ([], [])


def test_a_tensor_of_another_type_is_refused() -> None:
    graph = graph_of(lambda x: x + 1, torch.float32)
    with pytest.raises(
        InvalidProblem,
        match=r"position 0 of the lists has \(float64\) and the problem has graphs for \(float32\)",
    ):
        foreach_map(problem_of([graph], "list"), [[torch.ones(1, dtype=torch.float64)]], (), None)
