"""The eager fast path: what it remembers of a call never serves a call that is different."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_backends import EVERYTHING, Install, backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import torchhal
from torchhal import dense, scope, selection
from torchhal.errors import InvalidProblem
from torchhal.problems import AttentionProblem, Plan
from torchhal.reference.attention import plan as reference_plan

FLAGS = dense.checked_flags(False, False, False, None)
GUARDED = pytest.mark.skipif(dense.TensorGuards is None, reason="this torch has no tensor guards")


def three(*shape: int, **options: Any) -> list[torch.Tensor]:
    return [torch.randn(*shape, **options) for _ in range(3)]


def remembered(tensors: list[Any]) -> bool:
    """Whether a call is one that was served lately."""
    return dense.serve_recent(*tensors, None, FLAGS) is not dense.MISSED


@pytest.fixture
def asked(install: Install) -> list[AttentionProblem]:
    """What a backend that serves everything was asked."""
    problems: list[AttentionProblem] = []

    def answer(problem: AttentionProblem) -> Any:
        problems.append(problem)
        return reference_plan(problem)

    install("mine", backend("mine", answer, preference={"cpu": 10}))
    torchhal.attention(*three(2, 4, 5, 8))
    return problems


@GUARDED
def test_a_call_with_other_lengths_and_strides_is_remembered(asked: object) -> None:
    query, key, value = torch.randn(2, 9, 4, 8).transpose(1, 2), *three(2, 4, 7, 8)[1:]
    assert remembered([query, key, value])
    result = torchhal.attention(query, key, value)
    torch.testing.assert_close(result, F.scaled_dot_product_attention(query, key, value))


OTHERS: dict[str, Callable[[], list[Any]]] = {
    "dtype": lambda: three(2, 4, 5, 8, dtype=torch.float64),
    "dtype of the value": lambda: [*three(2, 4, 5, 8)[:2], torch.randn(2, 4, 5, 8, dtype=torch.bfloat16)],
    "batch": lambda: three(3, 4, 5, 8),
    "heads": lambda: three(2, 2, 5, 8),
    "head size": lambda: three(2, 4, 5, 16),
    "value's head size": lambda: [*three(2, 4, 5, 8)[:2], torch.randn(2, 4, 5, 16)],
    "value's length": lambda: [*three(2, 4, 5, 8)[:2], torch.randn(2, 4, 6, 8)],
    "rank": lambda: three(2, 4, 8),
    "device": lambda: [torch.randn(2, 4, 5, 8), *three(2, 4, 5, 8, device="meta")[1:]],
    "gradient": lambda: [torch.randn(2, 4, 5, 8, requires_grad=True), *three(2, 4, 5, 8)[1:]],
    "parameter": lambda: [torch.nn.Parameter(torch.randn(2, 4, 5, 8)), *three(2, 4, 5, 8)[1:]],
    "same tensor": lambda: [torch.randn(2, 4, 5, 8)] * 3,
    "no tensor": lambda: [torch.randn(2, 4, 5, 8), None, "value"],
}


@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_a_call_that_differs_in_what_a_problem_depends_on_is_not_taken_for_a_remembered_one(
    asked: object, tensors: Callable[[], list[Any]]
) -> None:
    assert not remembered(tensors())


@GUARDED
def test_autocast_inference_mode_and_forward_mode_are_not_taken_for_what_was_remembered_without_them(
    asked: object,
) -> None:
    tensors = three(2, 4, 5, 8)
    assert remembered(tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert not remembered(tensors)
    with torch.inference_mode():
        assert not remembered(three(2, 4, 5, 8))
    with forward_ad.dual_level():
        assert not remembered(tensors)


def test_what_is_remembered_keeps_no_tensor_alive(asked: object) -> None:
    import weakref

    tensors = three(2, 4, 6, 8)
    torchhal.attention(*tensors)
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors
    assert [reference() for reference in alive] == [None] * 3


class Shaped:
    """What only looks like a tensor, as an array of another library does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape = tensor.shape


STRANGE: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "none": (lambda t: None, "expects a tensor and got NoneType"),
    "list": (lambda t: t.tolist(), "expects a tensor and got list"),
    "array": (Shaped, "expects a tensor and got Shaped"),
    "sparse": (lambda t: t.to_sparse(), "layout torch.sparse_coo; convert it with .to_dense()"),
    "nested": (lambda t: torch.nested.nested_tensor(list(t)), "is nested (torch.strided)"),
}


@pytest.mark.parametrize("learns", [False, True], ids=["by a guard", "by a plan"])
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_no_dense_tensor_is_named_after_a_good_call_as_before_one(
    kind: str, position: int, learns: bool
) -> None:
    tensors: list[Any] = three(2, 4, 5, 8, requires_grad=learns)
    torchhal.attention(*tensors, backend="reference")
    make, words = STRANGE[kind]
    tensors[position] = make(tensors[position].detach())
    with pytest.raises(InvalidProblem) as refusal:
        torchhal.attention(*tensors, backend="reference")
    assert words in str(refusal.value) and ("query", "key", "value")[position] in str(refusal.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_mode_leaves_nested_tensors_to_torch_after_a_call_it_served(asked: object) -> None:
    with torchhal.enable():
        F.scaled_dot_product_attention(*three(2, 4, 5, 8))
        nested = [torch.nested.nested_tensor(list(tensor)) for tensor in three(2, 4, 5, 8)]
        assert F.scaled_dot_product_attention(*nested).is_nested


def test_a_mask_of_values_longer_than_the_keys_is_refused_after_a_call_that_fitted(asked: object) -> None:
    query, key, value = three(2, 4, 5, 8)
    with pytest.raises(InvalidProblem, match="value"):
        torchhal.attention(query, key, torch.cat([value, value], dim=2))


def test_under_autocast_the_mode_serves_what_torch_would_compute_in_the_lower_precision(
    asked: list[AttentionProblem],
) -> None:
    tensors = three(2, 4, 5, 8)
    with torchhal.enable():
        assert F.scaled_dot_product_attention(*tensors).dtype is torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert F.scaled_dot_product_attention(*tensors).dtype is torch.bfloat16
    assert asked[-1].query_dtype is torch.bfloat16


def test_a_gradient_that_is_switched_on_after_the_first_call_arrives(asked: object) -> None:
    tensors = three(2, 4, 5, 8)
    torchhal.attention(*tensors)
    tensors[1].requires_grad_()
    torchhal.attention(*tensors).sum().backward()  # type: ignore[union-attr]
    assert tensors[1].grad is not None


def test_a_choice_by_use_is_not_overlooked_for_what_was_remembered_outside_it(asked: object) -> None:
    tensors = three(2, 4, 5, 8)
    with torchhal.use("reference"):
        torchhal.attention(*tensors)
    assert {route.chosen for route in torchhal.routes()} == {"mine", "reference"}


def test_every_call_is_counted(asked: object) -> None:
    for length in range(1, 6):
        torchhal.attention(*three(2, 4, length, 8))
    assert [route.count for route in torchhal.routes()] == [6]


def test_a_reset_forgets_what_was_remembered(asked: object) -> None:
    selection.reset()
    assert not remembered(three(2, 4, 5, 8))


def test_a_plan_that_fails_is_named_whichever_way_its_call_came(install: Install) -> None:
    def fail(*_: Any) -> Any:
        raise ArithmeticError("broken plan")

    install("frail", backend("frail", lambda problem: Plan(fail, ""), preference={"cpu": 10}))
    for _ in range(2):
        with pytest.raises(ArithmeticError) as caught:
            torchhal.attention(*three(1, 2, 3, 4))
        assert caught.value.__notes__ == ["raised by the plan of backend 'frail'"]


def test_more_kinds_of_call_than_are_remembered_are_all_served_by_their_own_plans(install: Install) -> None:
    def answer(problem: AttentionProblem) -> Plan:
        return Plan(lambda q, *_: torch.full_like(q, problem.head_size), "")

    install("mine", backend("mine", answer, claims=EVERYTHING, preference={"cpu": 10}))
    for _ in range(2):
        for size in range(1, 3 * dense.RECENT):
            assert torchhal.attention(*three(1, 2, 3, size)).unique().item() == size  # type: ignore[union-attr]
    assert len(FLAGS.recent) <= dense.RECENT


SHAPES = st.tuples(*(st.integers(low, 3) for low in (0, 0, 0, 0, 1, 0)))


@given(st.lists(SHAPES, min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_a_sequence_of_calls_gives_what_each_gives_alone(shapes: list[tuple[int, ...]]) -> None:
    for batch, heads, length, keys, size, value_size in shapes:
        query = torch.randn(batch, heads, length, size, dtype=torch.float64)
        key = torch.randn(batch, heads, keys, size, dtype=torch.float64)
        value = torch.randn(batch, heads, keys, value_size, dtype=torch.float64)
        scores = (query @ key.transpose(2, 3)) * 0.5
        expected = torch.nan_to_num(torch.softmax(scores, -1)) @ value
        torch.testing.assert_close(torchhal.attention(query, key, value, scale=0.5), expected)
    assert scope.state() == scope.State()
