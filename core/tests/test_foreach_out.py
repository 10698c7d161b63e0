"""Where foreach_map writes: in place, over operands, into pieces of one buffer, and nowhere that another result lies."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.foreach import foreach_map

XS = [torch.randn(3), torch.randn(2, 4), torch.randn(())]
YS = [torch.randn(3), torch.randn(4), torch.randn(5)]
MATRIX = torch.randn(2, 2)


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))


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


FLAT = torch.arange(12.0)
OVERLAPPING: dict[str, Callable[[], Any]] = {
    "a tensor twice, in place": lambda: foreach_map(torch.Tensor.add_, [FLAT, FLAT], 1.0),
    "pieces with one element in common": lambda: foreach_map(
        torch.neg, [XS[0]] * 2, out=[FLAT[:3], FLAT[2:5]]
    ),
    "woven views of the same elements": lambda: foreach_map(
        torch.neg, [YS[0]] * 2, out=[FLAT[:6:2], FLAT[2:8:2]]
    ),
    "both results": lambda: foreach_map(lambda x: (x, -x), [XS[0]], out=([FLAT[:3]], [FLAT[:3]])),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_writes_that_overlap_are_refused_before_anything_is_written(case: str) -> None:
    with pytest.raises(InvalidProblem, match="destinations at positions . and . share memory"):
        OVERLAPPING[case]()
    assert FLAT.tolist() == list(range(12))


def test_a_destination_shares_nothing_with_a_captured_tensor() -> None:
    buffer = torch.ones(4)
    scalar = buffer[0]
    with pytest.raises(
        InvalidProblem, match="at position 0 shares memory with a tensor that the function cap"
    ):
        foreach_map(lambda x: x * 2 + scalar, [buffer], out=[buffer])
    assert buffer.tolist() == [1.0] * 4
    foreach_map(lambda x: x * 2 + scalar, [buffer[1:]], out=[buffer[1:]])
    assert buffer.tolist() == [1.0] + [3.0] * 3


def test_pieces_of_one_buffer_are_destinations_if_they_share_no_element() -> None:
    for cut in (lambda b: [b[:3], b[3:6]], lambda b: [b[:6:2], b[1:6:2]], lambda b: [b[:3], b[:0]]):
        out = cut(torch.zeros(12))
        xs = [torch.randn(t.shape) for t in out]
        foreach_map(torch.neg, xs, out=out)
        assert_same(out, [-x for x in xs])


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
