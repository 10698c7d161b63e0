"""The public foreach_map: what arrives, where results go, and a message for every misuse."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchhal import _caches, foreach
from torchhal.errors import CaptureError, InvalidProblem
from torchhal.foreach import foreach_map
from torchhal.selection import routes

few = settings(max_examples=25, deadline=None)
XS = [torch.randn(3), torch.randn(2, 4), torch.randn(())]
YS = [torch.randn(3), torch.randn(4), torch.randn(5)]
MATRIX = torch.randn(2, 2)
NESTED = torch.nested.nested_tensor([torch.randn(3)], layout=torch.jagged)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


arriving = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32])
shape = st.sampled_from([(), (3,), (2, 3), (1, 3)])


@few
@given(
    tensors=st.lists(st.tuples(arriving, shape, arriving, shape), min_size=1, max_size=4),
    number=st.one_of(st.floats(-4, 4, width=16), st.integers(-4, 4)),
)
def test_types_promote_as_in_torch_however_operands_arrive(tensors: list[Any], number: float) -> None:
    xs = [torch.ones(s).to(d) * 3 for d, s, _, _ in tensors]
    ys = [torch.ones(s).to(d) * 2 for _, _, d, s in tensors]
    assert_same(
        foreach_map(lambda x, y, n: x * y + n, xs, ys, number),
        [x * y + number for x, y in zip(xs, ys, strict=True)],
    )


def test_functions_that_close_over_a_changing_number_are_forgotten_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_caches, "REMEMBERED", 4)
    caches = (foreach._plans, foreach._common, foreach._direct)
    for cache in caches:
        cache.clear()
    for number in range(9):
        factor = number + 0.5
        (found,) = foreach_map(lambda x, factor=factor: x * factor, [torch.ones(3)])
        assert found.tolist() == [factor] * 3
    assert all(len(cache) <= 4 for cache in caches) and foreach._common


def test_lists_of_numbers_and_scalars_go_along() -> None:
    numbers = [2, 0.5, True]
    scalar = torch.tensor(1.5, dtype=torch.float64)
    found = foreach_map(lambda x, n, s: x * n + s, XS, numbers, scalar)
    assert_same(found, [x * n + scalar for x, n in zip(XS, numbers, strict=True)])


def test_a_number_may_change_without_another_problem() -> None:
    before = len(routes())
    for number in (0.1, 0.2, 0.3):
        assert_same(foreach_map(lambda x, n: x * n - 41, XS, number), [x * number - 41 for x in XS])
    assert len(routes()) <= before + 2  # one for tensors with dimensions, one for those without


@pytest.mark.parametrize("exponent", [2, 0.5, 3.0, -1, 1.75])
def test_a_number_that_torch_treats_in_its_own_way_is_part_of_the_function(exponent: float) -> None:
    xs = [x.abs() for x in XS]
    assert_same(foreach_map(lambda x, n: x**n, xs, exponent), [x**exponent for x in xs])
    assert_same(
        foreach_map(torch.pow, xs, [exponent, 2, 3]),
        [torch.pow(x, n) for x, n in zip(xs, [exponent, 2, 3], strict=True)],
    )


def test_a_function_may_branch_on_a_number() -> None:
    def relu_or_double(x: Any, n: float) -> Any:
        return torch.relu(x) if n > 0 else x * 2

    assert_same(
        foreach_map(relu_or_double, XS, [1, -1, 1]),
        [relu_or_double(x, n) for x, n in zip(XS, [1, -1, 1], strict=True)],
    )


def test_half_types_keep_the_digits_of_numbers_as_torch_does() -> None:
    halves = [x.bfloat16() for x in XS]
    for fn in (torch.mul, torch.div, torch.add, torch.sub):
        assert_same(foreach_map(fn, halves, 2.1), [fn(x, 2.1) for x in halves])


LEADING = [torch.add, torch.sub, torch.mul, torch.div, torch.pow]
LEADING += [
    operator.add,
    operator.sub,
    operator.mul,
    operator.truediv,
    operator.floordiv,
    operator.mod,
    operator.pow,
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("fn", LEADING, ids=lambda fn: f"{fn.__module__}.{fn.__name__}")
def test_a_leading_number_is_rounded_where_torch_rounds_it(
    fn: Callable[..., Any], dtype: torch.dtype
) -> None:
    """torch.mul rounds a number that comes first to the tensors' type; ``n * x`` and ``n / x`` never compute with it first."""
    xs = [(torch.rand(300) * 4 + 1).to(dtype), (torch.rand(2, 3) * 4 + 1).to(dtype)]
    for numbers in (0.9, 3, [0.9, 1e-3]):
        each = numbers if isinstance(numbers, list) else [numbers] * 2
        assert_same(foreach_map(fn, numbers, xs), [fn(n, x) for n, x in zip(each, xs, strict=True)])


def test_keywords_go_to_the_function() -> None:
    assert_same(
        foreach_map(torch.add, XS, YS, alpha=2),
        [torch.add(x, y, alpha=2) for x, y in zip(XS, YS, strict=True)],
    )
    assert_same(foreach_map(lambda x, *, by=1.0: x * by, XS, by=3.0), [x * 3.0 for x in XS])


def test_a_tuple_gives_a_tuple_of_lists() -> None:
    doubled, positive = foreach_map(lambda x: (x * 2, x > 0), XS)
    assert_same(doubled, [x * 2 for x in XS])
    assert_same(positive, [x > 0 for x in XS])


def test_captured_scalars_are_read_on_every_call() -> None:
    def scaled(by: Tensor) -> Any:
        return foreach_map(lambda x: x * by, XS)

    for number in (1.0, 2.0):
        assert_same(scaled(torch.tensor(number)), [x * number for x in XS])


def test_empty_lists_give_empty_lists() -> None:
    assert foreach_map(torch.add, [], []) == []
    assert foreach_map(torch.mul, [], 2.0) == []
    assert foreach_map(lambda x: (x, x), []) == ([], [])
    destinations: list[Tensor] = []
    assert foreach_map(torch.neg, [], out=destinations) is destinations


# ---------------------------------------------------------------------------- autograd


def test_gradients_are_those_of_torch() -> None:
    xs, ys = ([t.clone().requires_grad_() for t in items] for items in (XS, YS))
    scale = torch.tensor(0.3, requires_grad=True)
    results = foreach_map(lambda x, y: torch.tanh(x * scale) * y, xs, ys)
    wanted = [torch.tanh(x * scale) * y for x, y in zip(xs, ys, strict=True)]
    leaves = [*xs, *ys, scale]
    found = torch.autograd.grad([r.sum() for r in results], leaves)
    for grad, exact in zip(found, torch.autograd.grad([w.sum() for w in wanted], leaves), strict=True):
        torch.testing.assert_close(grad, exact)


def test_writing_to_a_leaf_raises_as_torch_does() -> None:
    leaf = torch.ones(3, requires_grad=True)
    for call in (
        lambda: foreach_map(torch.Tensor.add_, [leaf], 1.0),
        lambda: foreach_map(torch.neg, [leaf], out=[leaf]),
    ):
        with pytest.raises(
            RuntimeError, match="a leaf Variable that requires grad is being used in an in-place operation"
        ):
            call()
    with torch.no_grad():
        foreach_map(torch.Tensor.add_, [leaf], 1.0)
    assert leaf.tolist() == [2.0] * 3


def test_gradients_pass_through_an_intermediate_that_is_written_to() -> None:
    leaf = torch.ones(3, requires_grad=True)
    middle = leaf * 2
    foreach_map(torch.Tensor.mul_, [middle], 3.0)
    middle.sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [6.0] * 3


# ---------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: foreach_map(torch.add, XS, YS[:2]),
            "must have one length, and have 3, 2; nothing is cut or repeated",
        ),
        (lambda: foreach_map(torch.mul, XS, [1.0]), "must have one length, and have 3, 1"),
        (
            lambda: foreach_map(torch.add, MATRIX, XS),
            r"operand 0 of foreach_map is one tensor of shape \(2, 2\); pass a list",
        ),
        (
            lambda: foreach_map(torch.add, 1, 2.0),
            "at least one list of tensors among its operands and got int, float",
        ),
        (
            lambda: foreach_map(torch.add),
            "at least one list of tensors among its operands and got no operands",
        ),
        (lambda: foreach_map(torch.add, [1.0], [2.0]), "at least one list of tensors"),
        (
            lambda: foreach_map(torch.add, XS, [1, 2.0, MATRIX]),
            "tensors or numbers, not both; operand 1 holds Tensor, float, int",
        ),
        (lambda: foreach_map(torch.add, XS, ["a", 1, 2]), "operand 1 of foreach_map expects.*got str"),
        (lambda: foreach_map(torch.add, XS, 2j), "a number or a 0-dim tensor and got complex"),
        (
            lambda: foreach_map(torch.add, XS[:1], [torch.ones(4)]),
            r"position 0 of the lists do not broadcast.*\(3,\), \(4,\)",
        ),
        (
            lambda: foreach_map(torch.add, [MATRIX], [MATRIX.to("meta")]),
            "position 0 of the lists are on cpu and meta; move them",
        ),
        (
            lambda: foreach_map(torch.neg, [MATRIX.to_sparse()]),
            "operand 0 of foreach_map holds a torch.sparse_coo tensor",
        ),
        (lambda: foreach_map(torch.neg, [NESTED]), "operand 0 of foreach_map holds a nested tensor"),
        (lambda: foreach_map(3, XS), "foreach_map expects a function first and got int"),
        (
            lambda: foreach_map(torch.add, XS, YS, beta=2),
            "add does not take these operands and keywords.*beta",
        ),
        (
            lambda: foreach_map(lambda x: x, XS, alpha=2),
            "neither foreach_map nor .*<lambda> takes alpha.*takes x",
        ),
        (
            lambda: foreach_map(lambda x: x, XS, YS),
            r"<lambda>\(x\) can not be called with 2 operands: too many positional arguments",
        ),
        (lambda: foreach_map(lambda x, y: x, XS), "missing a required argument: 'y'"),
        (
            lambda: foreach_map(lambda x, n: (x, x) if n else x, XS, [1, 0, 1]),
            "another number of values at some positions",
        ),
    ],
)
def test_misuse_says_what_was_expected(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        call()


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (torch.sum, "reduces over many elements"),
        (lambda x: x.add_(1), "changes a tensor in place; use the out-of-place form add"),
        (lambda x: x + MATRIX, r"whole captured tensor of shape \(2, 2\)"),
        (
            lambda x: x + MATRIX[0, x.int()],
            r"may capture 0-dim tensors, and this one captures one of shape \(2, 2\); pass",
        ),
        (torch.rand_like, "draws random numbers"),
    ],
)
def test_what_is_not_pointwise_is_refused_with_advice(fn: Callable[..., Any], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        foreach_map(fn, XS)


def test_an_error_of_the_users_own_comes_through() -> None:
    def broken(x: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        foreach_map(broken, XS)


HALF = [torch.float16, torch.bfloat16]
SCALED: dict[str, Callable[..., Any]] = {
    "mul": torch.mul,
    "operator": lambda x, y: y * x,
    "div": torch.div,
    "trunc": lambda x, y: torch.div(x, y, rounding_mode="trunc"),
    "floor": torch.floor_divide,
}


@few
@given(
    name=st.sampled_from(sorted(SCALED)), dtype=st.sampled_from(HALF), start=st.floats(0.125, 4, width=16),
    number=st.one_of(st.floats(0.25, 8), st.integers(257, 5000).map(torch.tensor)),
)  # fmt: skip
def test_a_number_keeps_its_precision_beside_a_half_tensor_without_dimensions(
    name: str, dtype: torch.dtype, start: float, number: Any
) -> None:
    x, operand = torch.tensor(start, dtype=dtype), [number] if isinstance(number, Tensor) else number
    (found,) = foreach_map(SCALED[name], [x], operand, backend="reference")
    wanted = SCALED[name](x, number)
    assert (found.dtype, found.item()) == (wanted.dtype, wanted.item())


@pytest.mark.parametrize("exponent", [3.7, 0.3, -1.3, 1 / 3, 0.5000000001])
@pytest.mark.parametrize("length", [1, 5, 13, 1001])
def test_a_fractional_exponent_gives_the_bits_of_torch(exponent: float, length: int) -> None:
    x = torch.rand(length) * 3 + 0.1
    (found,) = foreach_map(torch.pow, [x], exponent, backend="reference")
    assert torch.equal(found, torch.pow(x, exponent))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_float_power_computes_in_float64(dtype: torch.dtype) -> None:
    x = torch.arange(1, 9).to(dtype)
    (found,) = foreach_map(torch.float_power, [x], 0.3, backend="reference")
    assert_same([found], [torch.float_power(x, 0.3)])


def test_a_factor_that_is_a_tensor_is_never_taken_for_one() -> None:
    x, factor = torch.randn(5), torch.tensor(0.5)
    (found,) = foreach_map(lambda x, f: torch.add(x, x, alpha=f), [x], factor, backend="reference")
    assert_same([found], [torch.add(x, x, alpha=0.5)])


def test_a_condition_between_equal_branches_broadcasts_all_the_same() -> None:
    x, y = torch.randn(4, 1), torch.randn(1, 3)
    assert_same(
        foreach_map(lambda x, y: torch.where(x > y, x, x), [x], [y], backend="reference"), [x.expand(4, 3)]
    )
