"""A remembered capture is never a wrong one."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

import torchhal.pointwise.memo as memo
from torchhal.pointwise import capture, capture_cached, clear_cache, evaluate, function_key

F32, I32 = torch.float32, torch.int32
INPUTS = [("s", F32), ("h", I32)]
WINDOW = 3
MUTABLE = [1.0]
SCALES = (1.0, 2.0)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    clear_cache()


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The functions that were really captured."""
    seen: list[Any] = []

    def counting(fn: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(fn)
        return capture(fn, *args, **kwargs)

    monkeypatch.setattr(memo, "capture", counting)
    return seen


def make(*cells: Any) -> Any:
    table, number = cells
    return lambda s, h: torch.where(h < WINDOW, s * number + table[h], -math.inf)


def test_a_fresh_lambda_with_new_tensors_is_recognised_and_bound_to_them(captures: list[Any]) -> None:
    s, h = torch.rand(4), torch.arange(4, dtype=I32)
    for _ in range(3):
        table = torch.rand(4)
        found = capture_cached(make(table, 2.0), INPUTS)
        assert found.tensors[0] is table
        assert torch.equal(evaluate(found.graph, [s, h], found.tensors)[0], make(table, 2.0)(s, h))
    assert len(captures) == 1


def test_index_arithmetic_of_mixed_dtypes_is_recognised_too(captures: list[Any]) -> None:
    def alibi(slopes: torch.Tensor, offset: torch.Tensor) -> Any:
        return lambda s, h: s + slopes[h] * (h - offset)

    for _ in range(2):
        slopes, offset = torch.rand(4), torch.tensor(2)
        found = capture_cached(alibi(slopes, offset), INPUTS)
        assert found.tensors[0] is slopes and found.tensors[1] is offset
    assert len(captures) == 1


@pytest.mark.parametrize("numbers", [(2, 2.0), (0.0, -0.0), (1, True), (1.0, 1.5), (0.0, math.nan)])
def test_constants_that_differ_in_type_sign_or_value_are_captured_anew(
    captures: list[Any], numbers: Any
) -> None:
    table = torch.rand(4)
    for number in numbers:
        capture_cached(make(table, number), INPUTS)
    assert len(captures) == 2


@pytest.mark.parametrize(
    "other", [torch.rand(4, dtype=torch.float64), torch.rand(5), torch.rand(4, 1)[:, 0].half()]
)
def test_tensors_of_another_dtype_or_shape_are_captured_anew(
    captures: list[Any], other: torch.Tensor
) -> None:
    capture_cached(make(torch.rand(4), 2.0), INPUTS)
    capture_cached(make(other, 2.0), INPUTS)
    assert len(captures) == 2


def pair(first: Any, second: Any) -> Any:
    return lambda s, h: s + first[h] * second[h]


def test_the_same_tensor_twice_is_told_from_two_tensors() -> None:
    one, two = torch.rand(4), torch.rand(4)
    assert len(capture_cached(pair(one, one), INPUTS).tensors) == 1
    found = capture_cached(pair(one, two), INPUTS)
    assert found.tensors[0] is one and found.tensors[1] is two
    assert len(capture_cached(pair(two, two), INPUTS).tensors) == 1


def test_a_changed_global_is_noticed(captures: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fn = make(torch.rand(4), 2.0)
    before = capture_cached(fn, INPUTS).graph
    monkeypatch.setitem(globals(), "WINDOW", 2)
    assert capture_cached(fn, INPUTS).graph != before
    assert len(captures) == 2


def test_the_default_dtype_is_part_of_the_key() -> None:
    def fn(s: Any, h: Any) -> Any:
        return h * 0.5

    narrow = capture_cached(fn, INPUTS).graph.output_dtypes
    torch.set_default_dtype(torch.float64)
    try:
        assert (narrow, capture_cached(fn, INPUTS).graph.output_dtypes) == ((F32,), (torch.float64,))
    finally:
        torch.set_default_dtype(F32)


def test_what_was_computed_from_a_tensor_is_never_bound_again(captures: list[Any]) -> None:
    def derived(bias: torch.Tensor) -> Any:
        return lambda s, h: s + bias.exp()[h]

    for _ in range(2):
        bias = torch.rand(4)
        assert torch.equal(capture_cached(derived(bias), INPUTS).tensors[0], bias.exp())
    assert len(captures) == 2


def test_what_depends_on_strides_is_captured_anew(captures: list[Any]) -> None:
    def strided(bias: torch.Tensor) -> Any:
        return lambda s, h: s * bias.stride(0)

    graphs = {capture_cached(strided(bias), INPUTS).graph for bias in (torch.rand(4), torch.rand(8)[::2])}
    assert len(graphs) == 2 and len(captures) == 2


class Holder:
    window = 3

    def method(self, s: Any, h: Any) -> Any:
        return s + self.window

    def closure(self) -> Any:
        return lambda s, h: s + self.window


def helper_with_attribute(s: Any) -> Any:
    return s * helper_with_attribute.scale  # type: ignore[attr-defined]


helper_with_attribute.scale = 2.0  # type: ignore[attr-defined]


def writes_global(s: Any, h: Any) -> Any:
    global WINDOW
    WINDOW = WINDOW
    return s


def imports(s: Any, h: Any) -> Any:
    import os

    return s * len(os.environ)


def uncertain_functions() -> list[Any]:
    counter, table = {"n": 0}, torch.rand(4)
    tagged = torch.rand(4)
    tagged.scale = 2.0  # type: ignore[attr-defined]

    def writes_cell(s: Any, h: Any) -> Any:
        nonlocal counter
        counter = {}
        return s

    return [
        Holder().method,
        Holder().closure(),
        lambda s, h: s + MUTABLE[0],
        lambda s, h: s + counter["n"],
        lambda s, h: helper_with_attribute(s),
        lambda s, h: s if torch.is_grad_enabled() else -s,
        lambda s, h: s * torch.initial_seed(),
        lambda s, h: s if table.requires_grad else -s,
        lambda s, h: s + tagged[h],
        lambda s, h: s * torch,
        writes_global,
        writes_cell,
        imports,
        torch.nn.ReLU(),
        torch.exp,
    ]


@pytest.mark.parametrize("case", range(15))
def test_functions_that_can_depend_on_anything_else_have_no_key(case: int) -> None:
    assert function_key(uncertain_functions()[case]) is None


def twice(s: Any, by: Any) -> Any:
    return s * by


def test_helpers_defaults_tuples_and_nested_functions_are_seen_through(captures: list[Any]) -> None:
    def build(scale: float, table: torch.Tensor) -> Any:
        def inner(s: Any) -> Any:
            return twice(s, scale) + SCALES[1]

        def fn(s: Any, h: Any, extra: float = 0.5) -> Any:
            return (lambda v: v + table[h])(inner(s)) + extra + torch.nn.functional.silu(s)

        return fn

    table = torch.rand(4)
    for scale in (2.0, 2.0, 3.0):
        fn = build(scale, table)
        found = capture_cached(fn, INPUTS)
        assert found.graph == capture(fn, INPUTS).graph
    assert len(captures) == 2


def test_the_cache_is_bounded_and_forgets_the_least_recently_used() -> None:
    cache = memo._Cache(2)
    entry = memo._Entry(capture(lambda s, h: s, INPUTS).graph, (), "single")
    for key in ("a", "b"):
        cache.put(key, entry)
    cache.get("a")
    cache.put("c", entry)
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_threads_share_the_cache_and_keep_their_own_tensors() -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        for _ in range(50):
            table = torch.full((4,), float(seed))
            if capture_cached(make(table, 2.0), INPUTS).tensors[0] is not table:
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
