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


# ---------------------------------------------------------------------------- destinations


@pytest.mark.parametrize(
    ("in_place", "fn"),
    [
        (torch.Tensor.add_, torch.add),
        (operator.imul, torch.mul),
        (torch.Tensor.copy_, lambda x, y: y.expand_as(x).clone()),
    ],
)
def test_torchs_in_place_functions_write_to_the_first_list(
    in_place: Callable[..., Any], fn: Callable[..., Any]
) -> None:
    xs = [x.clone() for x in XS[:2]]
    pointers = [x.data_ptr() for x in xs]
    assert foreach_map(in_place, xs, YS[:2]) is xs
    assert [x.data_ptr() for x in xs] == pointers
    assert_same(xs, [fn(x, y) for x, y in zip(XS[:2], YS[:2], strict=True)])


def test_in_place_functions_of_one_list() -> None:
    xs = [x.clone() for x in XS]
    foreach_map(torch.relu_, xs)
    assert_same(xs, [x.relu() for x in XS])
    foreach_map(torch.Tensor.zero_, xs)
    assert_same(xs, [torch.zeros_like(x) for x in XS])


def test_an_in_place_result_is_rounded_to_the_destination() -> None:
    xs = [torch.tensor([1.0], dtype=torch.bfloat16)]
    foreach_map(torch.Tensor.add_, xs, [torch.tensor([2.0**-12])])
    assert xs[0].dtype == torch.bfloat16 and xs[0].tolist() == [1.0]


def test_out_may_be_an_operand_or_anything_else_that_fits() -> None:
    xs = [x.clone() for x in XS[:2]]
    out = ([torch.empty(3), torch.empty(2, 4)], xs)
    assert foreach_map(lambda x: (x + 1, x * 2), xs, out=out) is out
    assert_same(out[0], [x + 1 for x in XS[:2]])
    assert_same(xs, [x * 2 for x in XS[:2]])


def test_interleaved_views_of_one_tensor_may_be_operand_and_destination() -> None:
    flat = torch.arange(10.0)
    foreach_map(torch.neg, [flat[::2]], out=[flat[1::2]])
    assert flat.tolist() == [0.0, -0.0, 2.0, -2.0, 4.0, -4.0, 6.0, -6.0, 8.0, -8.0]


@pytest.mark.parametrize(
    ("operand", "out", "message"),
    [
        ([XS[1]], [XS[1].t()], r"shape \(2, 4\) and its destination \(4, 2\)"),
        (
            [MATRIX],
            [MATRIX.t()],
            "position 0 shares memory with an operand at position 0; a destination may be exactly the operand",
        ),
        ([YS[2][:4]], [YS[2][1:]], "shares memory with an operand at position 0"),
        ([XS[0], YS[0]], [YS[0], XS[0]], "shares memory with an operand at position"),
        ([XS[0], YS[0]], [XS[0], XS[0]], "destinations at positions . and . share memory"),
        ([MATRIX], [torch.empty(2, 1).expand(2, 2)], "the destination at position 0 is expanded"),
        (
            [MATRIX],
            [torch.empty(2, 2, dtype=torch.int64)],
            "is torch.float32 and its destination torch.int64.*convert inside the function",
        ),
        ([MATRIX], [torch.empty(2)], r"shape \(2, 2\) and its destination \(2,\)"),
        ([MATRIX], [torch.empty(2, 2, device="meta")], "is on cpu and its destination on meta"),
        ([MATRIX], [], "as long as the operands, 1 tensors, and a list of it has 0"),
        ([MATRIX], MATRIX, "out expects a list of tensors, as the function returns, and got Tensor"),
        ([MATRIX], [1.0], "out expects a list of tensors and got a list of float"),
        ([], [MATRIX], "out must be as long as the operands, which are empty"),
    ],
)
def test_destinations_that_do_not_fit_are_refused(operand: Any, out: Any, message: str) -> None:
    before = [t.clone() for t in operand]
    with pytest.raises(InvalidProblem, match=message):
        foreach_map(torch.neg, operand, out=out)
    assert_same(operand, before)


def test_a_call_seen_before_is_still_checked() -> None:
    flat = torch.ones(6)
    foreach_map(torch.Tensor.add_, [flat[:3]], [flat[3:]])
    with pytest.raises(
        InvalidProblem, match="the destination at position 0 shares memory with an operand at position 0"
    ):
        foreach_map(torch.Tensor.add_, [flat[:3]], [flat[1:4]])
    foreach_map(torch.Tensor.mul_, [flat[:3], flat[3:]], 1.0)
    with pytest.raises(InvalidProblem, match="destinations at positions 1 and 0 share memory"):
        foreach_map(torch.Tensor.mul_, [flat[:3], flat[:3]], 1.0)
    foreach_map(torch.Tensor.mul_, [flat[::2], flat[1::2]], 2.0)
    assert flat.tolist() == [4.0] * 3 + [2.0] * 3
    foreach_map(torch.Tensor.mul_, [torch.ones(2)], 2.0)
    with pytest.raises(RuntimeError, match="leaf Variable"):
        foreach_map(torch.Tensor.mul_, [torch.ones(2, requires_grad=True)], 2.0)


def test_a_result_that_does_not_fit_its_operand_is_refused_in_place() -> None:
    with pytest.raises(InvalidProblem, match=r"position 0 has the shape \(5,\) and its destination \(1,\)"):
        foreach_map(torch.Tensor.add_, [torch.ones(1)], [torch.ones(5)])
    with pytest.raises(
        InvalidProblem, match="is torch.float32 and its destination torch.int64, which can not hold it"
    ):
        foreach_map(torch.Tensor.mul_, [torch.ones(1, dtype=torch.int64)], 0.5)
    with pytest.raises(
        InvalidProblem, match="add_ writes to its first operand, which must be a list of tensors; got float"
    ):
        foreach_map(torch.Tensor.add_, 1.0, [MATRIX])
    with pytest.raises(
        InvalidProblem, match="add_ writes to its first operand, and out= names other destinations"
    ):
        foreach_map(torch.Tensor.add_, [MATRIX], 1.0, out=[MATRIX])


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
