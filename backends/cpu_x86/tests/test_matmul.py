"""The native fused matrix product against sums in float64: layouts, blocks, functions, gradients and refusals."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, LIBRARY, SETS, Tensor, forced, threads

import torchhal
from torchhal.errors import Unsupported
from torchhal.pointwise import capture
from torchhal.products.graphs import Functions, fuse
from torchhal.products.product import GRADIENTS, NO_FUNCTIONS
from torchhal_cpu_x86 import products

VALUE = (("value", torch.float32), *((name, torch.int32) for name in ("batch", "row", "col")))


def multiply(*operands: Any, **options: Any) -> Any:
    return torchhal.matmul(*operands, backend="cpu_x86", **options)


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    with ExitStack() as stack:
        for dtype in DTYPES:
            stack.enter_context(forced(isa, dtype))
        yield


def laid_out(x: Tensor, how: str) -> Tensor:
    """The same values in other strides, amid NaN that must not be read."""
    if how == "transposed":
        return x.mT.contiguous().mT
    wide = torch.full((*x.shape[:-2], 2 * x.shape[-2] + 1, 3 * x.shape[-1] + 2), torch.nan, dtype=x.dtype)
    if how == "rows apart":
        inner = wide[..., 1::2, 1 : x.shape[-1] + 1]
    elif how == "all apart":
        inner = wide[..., : 2 * x.shape[-2] : 2, : 3 * x.shape[-1] : 3]
    else:
        return x
    return inner.copy_(x)


def assert_close(found: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None) -> None:
    """Within what rounding each product, each partial sum and the result may do."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    unit = torch.finfo(torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32).eps
    allowed = (
        size * unit * 40
        + exact.abs() * torch.finfo(found.dtype).eps
        + torch.finfo(found.dtype).smallest_normal
    )
    assert found.shape == exact.shape and ((found.double() - exact).abs() <= allowed).all()


lengths = st.one_of(st.integers(0, 40), st.sampled_from([47, 48, 49, 130, 193, 257, 513]))
layouts = st.sampled_from(["", "transposed", "rows apart", "all apart"])


@pytest.mark.sanitized
@settings(max_examples=150, deadline=None)
@given(
    sizes=st.tuples(lengths, lengths, lengths),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    how=st.tuples(layouts, layouts),
    batch=st.sampled_from([((), ()), ((3,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), (1,))]),
    isa=st.sampled_from(SETS),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_of_any_size_type_and_layout_are_sums_rounded_once(
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    how: tuple[str, str],
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    isa: str,
    biased: bool,
    seed: int,
) -> None:
    rows, columns, inner = sizes
    random = torch.Generator().manual_seed(seed)
    a = laid_out(torch.randn(*batch[0], rows, inner, generator=random).to(dtypes[0]), how[0])
    b = laid_out(torch.randn(*batch[1], inner, columns, generator=random).to(dtypes[1]), how[1])
    bias = torch.randn(columns, generator=random).to(dtypes[1]) if biased else None
    with instruction_set(isa):
        assert_close(multiply(a, b, bias=bias), a, b, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(400, 1100, 300), (600, 1100, 6000)])
def test_tiles_that_share_packed_operands_meet_at_their_edges(
    dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    # The larger one shares more than fits into shared memory at once. Small whole numbers make every sum exact.
    rows, columns, inner = sizes
    a, b = torch.randint(-2, 3, (rows, inner)).to(dtype), torch.randint(-2, 3, (columns, inner)).to(dtype).mT
    assert torch.equal(multiply(a, b, out_dtype=torch.float32), (a.float() @ b.float()))


@pytest.mark.parametrize("sizes", [(1, 700, 900), (3, 260, 500), (100, 130, 140), (250, 600, 520)])
def test_the_number_of_threads_changes_no_bit(sizes: tuple[int, int, int]) -> None:
    rows, columns, inner = sizes
    a, b, scale = torch.randn(rows, inner), torch.randn(inner, columns), torch.rand(inner)

    def found() -> Tensor:
        return multiply(a, b, a_prologue=lambda v, i, m, k: v * scale[k], epilogue=torch.nn.functional.gelu)  # type: ignore[no-any-return]

    with threads(1):
        alone = found()
    assert torch.equal(found(), alone)


# ---------------------------------------------------------------------------- functions


def test_factors_of_rows_and_columns_leave_the_prologues_for_the_epilogue() -> None:
    scale, other = torch.rand(9), torch.rand(11)
    a_prologue = capture(lambda v, i, m, k: v * scale[m] / 3, VALUE).graph
    b_prologue = capture(lambda v, i, k, n: other[n] * v, VALUE).graph
    found = fuse(Functions(a_prologue, b_prologue), torch.float32, None, (torch.bfloat16,))
    assert (
        found.functions.a_prologue is None
        and found.functions.b_prologue is None
        and found.hoisted == (True, True)
    )
    a, b, bias = torch.randn(9, 300), torch.randn(300, 11), torch.randn(11)
    result = multiply(
        a,
        b,
        bias=bias,
        a_prologue=lambda v, i, m, k: v * scale[m] / 3,
        b_prologue=lambda v, i, k, n: other[n] * v,
        epilogue=torch.tanh,
    )
    exact = ((a.double() * scale[:, None] / 3) @ (b.double() * other) + bias).tanh()
    torch.testing.assert_close(result, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "prologue",
    [
        lambda v, i, m, k: v * v,
        lambda v, i, m, k: v + 1,
        lambda v, i, m, k: 2 / v,
        lambda v, i, m, k: v * k,
        lambda v, i, m, k: (v * 2).to(torch.bfloat16),
    ],
)
def test_what_is_no_factor_of_a_row_stays_in_the_prologue(prologue: Callable[..., Tensor]) -> None:
    graph = capture(prologue, VALUE).graph
    assert fuse(Functions(graph), torch.float32, None, (torch.float32,)).functions.a_prologue is graph


@pytest.mark.parametrize("isa", SETS)
def test_a_prologue_of_many_rows_and_a_deep_panel_has_room(isa: str) -> None:
    a, b = torch.randn(64, 700), torch.randn(700, 130)
    exact = (a.double().sin() @ b.double()).float()
    with instruction_set(isa):
        found = multiply(a, b, a_prologue=torch.sin)
        wide = multiply(a.double(), b, a_prologue=torch.sin)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(wide.float(), exact, rtol=1e-5, atol=1e-5)


def test_results_are_on_the_cpu_whatever_the_default_device() -> None:
    a, b = torch.randn(2, 5, 7), torch.randn(7, 4)
    with torch.device("meta"):
        found = multiply(a, b, epilogue=lambda v, i, m, n: v + i)
    assert torch.equal(found, multiply(a, b, epilogue=lambda v, i, m, n: v + i))


def test_many_batch_dimensions_of_one_are_no_more_than_one() -> None:
    a, b = torch.randn((1,) * 17 + (2, 3)), torch.randn((1,) * 17 + (3, 2))
    torch.testing.assert_close(multiply(a, b), a @ b)


def test_an_empty_sum_is_zero_whatever_its_factors_are() -> None:
    scale = torch.full((3,), torch.inf)
    found = multiply(torch.ones(3, 0), torch.ones(0, 5), a_prologue=lambda v, i, m, k: v * scale[m])
    assert torch.equal(found, torch.zeros(3, 5))


@pytest.mark.sanitized
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 1, 7), (3, 150, 7)])
def test_functions_of_a_batch_of_rows_are_told_the_indices_of_the_batch(shape: tuple[int, ...]) -> None:
    batch, rows = (
        shape[:-2].numel() if isinstance(shape, torch.Size) else torch.Size(shape[:-2]).numel(),
        shape[-2],
    )
    a, b, scale, shift = (
        torch.randn(shape),
        torch.randn(7, 20),
        torch.rand(batch, rows, 7),
        torch.randn(batch, rows, 20),
    )
    found = multiply(
        a,
        b,
        a_prologue=lambda v, i, m, k: v * scale[i, m, k],
        epilogue=lambda v, i, m, n: v + shift[i, m, n] + 10 * i,
    )
    number = torch.arange(batch).view(*shape[:-2], 1, 1)
    exact = (a * scale.view(shape)).double() @ b.double() + shift.view(*shape[:-1], 20) + 10 * number
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.sanitized
def test_gathers_in_rows_columns_and_at_computed_places_read_what_torch_reads() -> None:
    table, line = torch.randn(60, 90)[::2, ::3], torch.randn(100)
    a, b = torch.randn(30, 5), torch.randn(5, 30)
    found = multiply(
        a,
        b,
        epilogue=lambda v, i, m, n: (
            v + table[m, n],
            v + table[n, m],
            v + line[m + 2 * n],
            v + table[-1 - m, n] + line[n // 2],
        ),
    )
    m, n = torch.arange(30)[:, None], torch.arange(30)
    sums = (a.double() @ b.double()).float()
    wanted = (table, table.T, line[m + 2 * n], table.flip(0) + line[n // 2])
    for result, extra in zip(found, wanted, strict=True):
        torch.testing.assert_close(result, sums + extra, rtol=1e-5, atol=1e-5)


def test_outputs_of_every_type_come_from_one_pass() -> None:
    a, b = torch.randn(20, 40), torch.randn(40, 50)
    found = multiply(a, b, epilogue=lambda v, i, m, n: (v, v > 0, m - n, v.to(torch.float64)), out_dtype=None)
    sums, positive, difference, wide = found
    assert torch.equal(positive, sums > 0) and positive.dtype is torch.bool
    assert torch.equal(
        difference, torch.arange(20, dtype=torch.int32)[:, None] - torch.arange(50, dtype=torch.int32)
    )
    assert torch.equal(wide, sums.to(wide.dtype))


# ---------------------------------------------------------------------------- gradients


def of_reference(call: Callable[..., Any], leaves: list[Tensor], above: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients by torch's own formulas, in float64."""
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = call("reference", *wide)
    outputs = found if isinstance(found, tuple) else (found,)
    return torch.autograd.grad(outputs, wide, [g.double() for g in above], allow_unused=True)  # type: ignore[no-any-return]


def computed_places(
    backend: str, a: Tensor, b: Tensor, bias: Tensor, table: Tensor, line: Tensor, one: Tensor
) -> Any:
    return torchhal.matmul(
        a,
        b,
        bias=bias,
        a_prologue=lambda v, i, m, k: torch.sin(v) * line[k // 2] + one,
        b_prologue=lambda v, i, k, n: v * line[-1 - k],
        epilogue=lambda v, i, m, n: (torch.sigmoid(v) * table[n, m], v * one + line[n % 3]),
        backend=backend,
    )


def scaled_rows(
    backend: str, a: Tensor, b: Tensor, bias: Tensor, table: Tensor, line: Tensor, one: Tensor
) -> Any:
    return torchhal.matmul(
        a,
        b,
        bias=bias,
        a_prologue=lambda v, i, m, k: v * line[m] * one,
        b_prologue=lambda v, i, k, n: v / (2 + line[n] ** 2),
        epilogue=lambda v, i, m, n: (v + table[n, m], v * 2),
        backend=backend,
    )


@pytest.mark.parametrize("shape", [(13, 21), (2, 13, 21)])
@pytest.mark.parametrize("call", [computed_places, scaled_rows])
def test_gradients_reach_operands_bias_and_captured_tensors(
    call: Callable[..., Any], shape: tuple[int, ...]
) -> None:
    leaves = [
        *(torch.randn(shape), torch.randn(21, 17), torch.randn(17)),
        *(torch.randn(17, 13), torch.randn(30), torch.randn(())),
    ]
    for leaf in leaves:
        leaf.requires_grad_()
    found = call("cpu_x86", *leaves)
    above = [torch.randn_like(out) for out in found]
    gradients = torch.autograd.grad(found, leaves, above)
    for gradient, exact in zip(gradients, of_reference(call, leaves, above), strict=True):
        scale = exact.abs().max().item()
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-4, atol=1e-5 * max(scale, 1.0))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_without_a_gradient_adds_nothing(unused: int) -> None:
    a, b = torch.randn(5, 6, requires_grad=True), torch.randn(6, 7, requires_grad=True)
    found = multiply(a, b, epilogue=lambda v: (v * v, torch.exp(v)))
    total = found[1 - unused].sum()
    gradients = torch.autograd.grad(total, (a, b))
    z = a @ b
    wanted = torch.autograd.grad((torch.exp(z) if unused == 0 else z * z).sum(), (a, b))
    for gradient, exact in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-4)


def test_gradients_are_the_same_bits_every_time() -> None:
    a, b, line = (
        torch.randn(40, 30, requires_grad=True),
        torch.randn(30, 200, requires_grad=True),
        torch.randn(7, requires_grad=True),
    )
    found = multiply(a, b, epilogue=lambda v, i, m, n: v * line[(m * n) % 7])
    above = torch.randn_like(found)
    first = torch.autograd.grad(found, (a, b, line), above, retain_graph=True)
    for _ in range(3):
        again = torch.autograd.grad(found, (a, b, line), above, retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_a_gradient_that_is_stored_negated_counts_with_its_sign() -> None:
    a, b = torch.randn(4, 6, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    above = torch.randn(4, 3, dtype=torch.complex64).conj().imag
    assert above.is_neg()
    multiply(a, b).backward(above)
    torch.testing.assert_close(a.grad, above.resolve_neg() @ b.detach().mT)
    torch.testing.assert_close(b.grad, a.detach().mT @ above.resolve_neg())


def test_gradients_go_where_indices_past_the_end_were_read() -> None:
    table = torch.randn(3, 4, requires_grad=True)
    a, b = torch.randn(3, 5), torch.randn(5, 4)
    multiply(a, b, epilogue=lambda v, i, m, n: v + table[m, n + 1]).sum().backward()
    assert torch.equal(table.grad, torch.tensor([0.0, 1.0, 1.0, 2.0]).expand(3, 4))


def test_a_second_derivative_is_refused_in_words() -> None:
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(multiply(a, b, epilogue=torch.tanh).sum(), a, create_graph=True)
    with pytest.raises(Unsupported, match="first derivatives of matmul .* backend='reference'"):
        gradient.sum().backward()


def test_transforms_and_subclasses_get_what_torch_gives() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(5, 6)
    assert torch.allclose(torch.vmap(lambda x: multiply(x, b))(a), a @ b, atol=1e-5)
    negated = torch._neg_view(a[0])
    assert torch.allclose(multiply(negated, b), -a[0] @ b, atol=1e-5)


# ---------------------------------------------------------------------------- the C interface


class Call(ctypes.Structure):
    """``thal_matmul``, field by field."""

    _fields_ = (
        *((name, ctypes.c_uint32 if name == "struct_size" else ctypes.c_int32) for name in (
            "struct_size", "isa", "a_type", "b_type", "bias_type", "num_threads", "batch_dims", "outputs")),
        *((name, ctypes.c_int64) for name in ("M", "N", "K", "batches")),
        *((name, ctypes.c_void_p) for name in ("batch_sizes", "a_batch_stride", "b_batch_stride", "a", "b", "bias")),
        ("a_stride", ctypes.c_int64 * 2), ("b_stride", ctypes.c_int64 * 2), ("bias_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in (
            "a_prologue", "b_prologue", "epilogue", "out_types", "out", "parallel", "parallel_user", "packed")),
    )  # fmt: skip


def run_changed(changes: dict[str, Any]) -> int:
    """The code of a good call of 3 x 4 by 4 x 5 after ``changes``."""
    seen: list[bytes] = []
    keep: list[object] = []
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    good = LIBRARY.matmul
    try:
        LIBRARY.matmul = seen.append  # type: ignore[method-assign, assignment]
        products.multiply(a, b, None, NO_FUNCTIONS, (torch.float32,))
    finally:
        LIBRARY.matmul = good  # type: ignore[method-assign]
    call = Call.from_buffer_copy(seen[0])
    out, types = torch.empty(3, 5), (ctypes.c_int32 * 1)(1)
    pointers = (ctypes.c_void_p * 1)(out.data_ptr())
    call.out, call.out_types = ctypes.addressof(pointers), ctypes.addressof(types)
    keep += [out, types, pointers]
    for name, value in changes.items():
        if name == "out_type":
            types[0] = value
        elif name == "out_pointer":
            pointers[0] = value
        else:
            setattr(call, name, value)
    return int(LIBRARY.library.thal_matmul_run(bytes(call)))


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"struct_size": 8}, 1),
        ({"a_type": 4}, 2), ({"b_type": -1}, 2), ({"out_type": 0}, 2), ({"out_type": 99}, 2), ({"out_type": 9}, 2),
        ({"isa": 99}, 3), ({"isa": -3}, 3),
        ({"M": -1}, 4), ({"N": -1}, 4), ({"K": 1 << 31}, 4), ({"batches": 2}, 4), ({"batches": -1}, 4), ({"outputs": 0}, 4),
        ({"outputs": 2}, 4), ({"batch_dims": 65}, 4), ({"batch_dims": -1}, 4),
        ({"batch_dims": 1}, 5), ({"a": None}, 5), ({"b": None}, 5), ({"out": None}, 5), ({"out_types": None}, 5),
        ({"out_pointer": None}, 5),
        ({"num_threads": 0}, 7), ({"num_threads": 2, "parallel": None}, 7),
        ({"M": 0, "a": None, "out_pointer": None}, 0),
    ],
)  # fmt: skip
def test_a_wrong_descriptor_is_refused_before_anything_is_read(changes: dict[str, Any], code: int) -> None:
    assert run_changed(changes) == code


@pytest.mark.sanitized
@settings(max_examples=200, deadline=None)
@given(
    words=st.lists(st.one_of(st.integers(-3, 12), st.integers(-(1 << 63), (1 << 63) - 1)), max_size=40),
    place=st.sampled_from(["a_prologue", "b_prologue", "epilogue"]),
)
def test_words_that_are_no_program_are_refused(words: list[int], place: str) -> None:
    numbers = (ctypes.c_int64 * max(len(words), 1))(*words)
    function = products.programs.Function(ctypes.addressof(numbers), len(words), None, 0)
    assert run_changed({place: ctypes.addressof(function)}) in (0, 2, 10)


def test_a_result_of_a_type_that_is_not_written_is_declined() -> None:
    with pytest.raises(Unsupported, match="float8_e4m3fn"):
        multiply(torch.ones(4, 4), torch.ones(4, 4), out_dtype=torch.float8_e4m3fn)


def test_a_plan_says_what_serves_and_packed_weights_are_declined_or_served() -> None:
    route = torchhal.explain(torchhal.matmul, torch.randn(3, 4), torch.randn(4, 5), backend="cpu_x86")
    assert route.chosen == "cpu_x86"
    assert {"backward", "captured_gradient"} == GRADIENTS
