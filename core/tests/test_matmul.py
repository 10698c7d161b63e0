"""The public matmul: shapes as torch.matmul, functions, routing, and a message for every misuse."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchhal.errors import CaptureError, InvalidProblem, Unsupported
from torchhal.matmul import Call, build_problem, matmul, pack_weight
from torchhal.problems import MatmulProblem, Problem
from torchhal.selection import routes

few = settings(max_examples=25, deadline=None)
X = torch.randn(3, 4)
ELSEWHERE = torch.ones((), device="meta")


@few
@given(
    left=st.sampled_from([(4,), (3, 4), (2, 3, 4), (5, 1, 3, 4), (0, 4), (0, 3, 4)]),
    right=st.sampled_from([(4,), (4, 2), (2, 4, 2), (1, 4, 2), (4, 0)]),
)
def test_shapes_are_those_of_torch_matmul(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = torch.randn(left), torch.randn(right)
    try:
        wanted = torch.matmul(a, b)
    except RuntimeError:
        with pytest.raises(InvalidProblem, match="batch dimensions of a and b must broadcast"):
            matmul(a, b)
        return
    found = matmul(a, b)
    assert isinstance(found, torch.Tensor) and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted)


def test_a_vector_times_a_packed_weight_is_a_vector() -> None:
    assert matmul(torch.randn(4), pack_weight(torch.randn(4, 7))).shape == (7,)


@pytest.mark.parametrize(
    "epilogue",
    [torch.relu, torch.nn.functional.relu, torch.nn.ReLU(), lambda v: v.relu(), functools.partial(torch.clamp, min=0.0),
     lambda v, slope=0.0: torch.where(v > 0, v, v * slope), lambda v, b, m, n: torch.maximum(v, v * 0)],
)  # fmt: skip
def test_every_kind_of_callable_is_a_function(epilogue: Any) -> None:
    torch.testing.assert_close(matmul(X, X.mT, epilogue=epilogue), (X @ X.mT).relu())


def test_an_epilogue_with_a_tuple_gives_a_tuple() -> None:
    main, sign = matmul(X, X.mT, epilogue=lambda v: (v * 2, v > 0))
    assert main.dtype == torch.float32 and sign.dtype == torch.bool
    torch.testing.assert_close(main, 2 * (X @ X.mT))
    assert torch.equal(sign, X @ X.mT > 0)
    single = matmul(X, X.mT, epilogue=lambda v: (v,))
    assert isinstance(single, tuple) and len(single) == 1


def test_out_dtype_is_for_every_output_or_each() -> None:
    first, second = matmul(X, X.mT, epilogue=lambda v: (v, v), out_dtype=torch.bfloat16)
    assert first.dtype == second.dtype == torch.bfloat16
    first, second = matmul(X, X.mT, epilogue=lambda v: (v, v), out_dtype=(torch.float64, torch.float16))
    assert (first.dtype, second.dtype) == (torch.float64, torch.float16)


def test_a_new_captured_tensor_is_read_on_every_call() -> None:
    def shifted(shift: torch.Tensor) -> Any:
        return matmul(X, X.mT, epilogue=lambda v: v + shift)

    for value in (1.0, 2.0, 3.0):
        torch.testing.assert_close(shifted(torch.tensor(value)), X @ X.mT + value)


def test_gradients_reach_everything_that_asks() -> None:
    a, b, bias, scale = (torch.randn(s, requires_grad=True) for s in ((3, 4), (4, 5), (5,), (5,)))
    out = matmul(a, b, bias=bias, epilogue=lambda v, batch, row, col: v * scale[col])
    wanted = (a @ b + bias) * scale
    found = torch.autograd.grad(out.square().sum(), (a, b, bias, scale))
    for grad, exact in zip(
        found, torch.autograd.grad(wanted.square().sum(), (a, b, bias, scale)), strict=True
    ):
        torch.testing.assert_close(grad, exact)


def test_requiring_a_gradient_is_another_problem() -> None:
    a = torch.randn(3, 4, requires_grad=True)
    assert not matmul(X, X.mT).requires_grad
    assert matmul(a, X.mT).requires_grad
    with torch.no_grad():
        assert not matmul(a, X.mT).requires_grad


def test_the_problem_names_every_feature() -> None:
    a = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    problem = build_problem(Call(a, pack_weight(torch.randn(4, 5), bits=4, group=32), torch.randn(5)))
    assert problem.features == {"batched", "bias", "packed_int4", "mixed_dtypes", "backward"}
    assert problem.packing == "int4:group=channel:symmetric" and problem.out_dtypes == (torch.float32,)
    assert isinstance(problem, MatmulProblem) and Problem.from_text(problem.text) == problem


def test_lengths_are_no_part_of_the_problem() -> None:
    assert build_problem(Call(torch.randn(3, 4), torch.randn(4, 5))) == build_problem(
        Call(torch.randn(0, 1), torch.randn(1, 9))
    )


def test_calls_are_counted_on_their_route() -> None:
    before = sum(r.count for r in routes() if r.problem.family == "matmul")
    for _ in range(3):
        matmul(X, X.mT, backend="reference")
    assert sum(r.count for r in routes() if r.problem.family == "matmul") == before + 3


def test_eight_bit_floats_need_the_type_of_the_result() -> None:
    eight = X.to(torch.float8_e4m3fn)
    with pytest.raises(InvalidProblem, match="no common type in torch; say the result's with out_dtype="):
        matmul(eight, X.mT)
    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        matmul(eight, X.mT, out_dtype=torch.float32, backend="reference")


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        (X, X, {}, r"a \(3, 4\) has rows of 4 elements and b \(3, 4\) columns of 3; both are K.*pass b.mT"),
        (X, torch.randn(5, 2), {}, r"rows of 4 elements and b \(5, 2\) columns of 5; both are K and must be equal$"),
        (X, pack_weight(torch.randn(6, 4)), {}, "packed weight b.*pack it with transposed=True"),
        (torch.randn(2, 3, 4), torch.randn(3, 4, 2), {}, r"must broadcast, and are \(2,\) of \(2, 3, 4\) and \(3,\) of \(3, 4, 2\)"),
        (torch.tensor(1.0), X, {}, "a expects at least one dimension and is 0-dim; multiply by a number"),
        (X, torch.tensor(1.0), {}, "b expects at least one dimension"),
        (X, [1.0], {}, "b expects a tensor or a packed weight.*got list"),
        ([1.0], X, {}, "a expects a tensor and got list"),
        (pack_weight(X), X, {}, "a expects a tensor and got PackedWeight; only b may be a packed weight"),
        (X, X.mT, {"bias": 1.0}, r"bias expects a tensor of shape \(N,\) and got float"),
        (X, X.mT, {"bias": torch.randn(3, 1)}, r"bias expects the shape \(N,\) = \(3,\).*has \(3, 1\); add other shapes in an epilogue"),
        (X, X.mT, {"bias": torch.randn(3, dtype=torch.float64)}, "bias expects the type of a or b, or float32.*has torch.float64"),
        (X, X.mT, {"bias": torch.randn(3, device="meta")}, "a is on cpu and bias on meta"),
        (X, X.mT.to("meta"), {}, "a is on cpu and b on meta; move them"),
        (X.int(), X.mT, {}, r"a expects a floating type and has torch.int32; convert it with .to\(...\), or use torch.matmul"),
        (X, X.mT.to(torch.complex64), {}, "b expects a floating type and has torch.complex64"),
        (X.to_sparse(), X.mT, {}, r"a expects a dense tensor and has the layout torch.sparse_coo; convert it with .to_dense\(\)"),
        (torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), X.mT, {}, r"a is a nested tensor; multiply its a.values\(\)"),
        (X, X.mT, {"out_dtype": torch.int32}, "out_dtype expects a floating type.*got torch.int32"),
        (X, X.mT, {"out_dtype": "float32"}, "out_dtype expects a floating type.*got 'float32'"),
        (X, X.mT, {"out_dtype": (torch.float32,) * 2}, "out_dtype names 2 types and the call has 1 outputs"),
        (X, X.mT, {"epilogue": lambda v, b, m, n, x: v}, r"epilogue takes \(value\) or \(value, batch, row, col\).*it has 5"),
        (X, X.mT, {"a_prologue": lambda: 1.0}, "a_prologue takes.*it has 0"),
        (X, X.mT, {"epilogue": 3}, r"epilogue expects a function of \(value\).*got int"),
        (X, X.mT, {"b_prologue": lambda v: (v, v)}, "b_prologue returns a tuple of 2; only an epilogue may"),
        (X, X.mT, {"epilogue": lambda v: v + ELSEWHERE}, r"epilogue captures a tensor of shape \(\) on meta"),
    ],
)  # fmt: skip
def test_misuse_says_what_was_expected(a: Any, b: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        matmul(a, b, **options)


def test_a_function_that_is_not_pointwise_is_refused_with_its_line() -> None:
    residual = torch.randn(3, 3)
    with pytest.raises(CaptureError, match=r"cannot capture this epilogue.*softmax(.|\n)*test_matmul.py"):
        matmul(X, X.mT, epilogue=lambda v: torch.softmax(v, -1))
    with pytest.raises(CaptureError, match=r"whole captured tensor of shape \(3, 3\)"):
        matmul(X, X.mT, epilogue=lambda v: v + residual)


def test_a_wrong_call_is_refused_after_a_right_one_of_the_same_types() -> None:
    matmul(X, X.mT, bias=torch.randn(3))
    with pytest.raises(InvalidProblem, match="both are K"):
        matmul(X, X, bias=torch.randn(3))
    with pytest.raises(InvalidProblem, match="bias expects the shape"):
        matmul(X, X.mT, bias=torch.randn(4))
