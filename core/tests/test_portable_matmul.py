"""The portable matrix product against float64 evaluations, under Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import DEVICE
from torch import Tensor

import torchhal
from torchhal.errors import Unsupported
from torchhal.operands import Packed
from torchhal.pointwise import capture
from torchhal.portable import matmul, printer
from torchhal.portable.matmul_launch import float32_precision
from torchhal.portable.matmul_tiles import PLAIN, Tiles, Tuning
from torchhal.problems import MatmulProblem
from torchhal.products.product import Run
from torchhal.reference.packing import unpack

SPLIT = Tuning(lambda work: Tiles(16, 16, 16, splits=5), multiprocessors=64, shortest=2)
"""Cuts every sum into as many parts as it can."""
PIECES = Tuning(lambda work: Tiles(16, 64, 32, persistent=1, parts=4, band=2), multiprocessors=2)
"""A few programs that go through all tiles, and finish each in pieces."""
FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
GGUF_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}
front = sys.modules["torchhal.matmul"]


def normal(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def planned(tuning: Tuning = PLAIN) -> Callable[..., tuple[Tensor, ...]]:
    """:func:`torchhal.matmul` by the portable kernels alone; always a tuple."""
    runs: dict[MatmulProblem, Run] = {}

    def multiply(
        a: Tensor, b: Tensor | Packed, *, out_dtype: Any = None, bias: Any = None, **given: Any
    ) -> Any:
        names = ("a_prologue", "b_prologue", "epilogue")
        functions = front.capture_functions(front.element_dtype(a, b), *(given.get(name) for name in names))
        problem = front.build_problem(front.Call(a, b, bias, functions, out_dtype))
        assert matmul.decline(problem) is None
        run = runs.setdefault(problem, matmul.runner(problem, "these kernels", matmul.Multiplier(tuning)))
        with np.errstate(all="ignore"):
            return run(a, b, bias, front.operands_of(functions))

    return multiply


def accurate(found: Tensor, a: Tensor, b: Tensor, truth: Tensor, slack: float = 0.0) -> None:
    """Within a unit in the last place of the result's type, and what float32 sums of these terms may be off by."""
    terms = a.double().abs() @ b.double().abs()
    bound = torch.finfo(found.dtype).eps * truth.abs() + (a.shape[-1] * 2.0**-24 + slack) * terms + 1e-30
    assert found.shape == truth.shape
    assert ((found.double() - truth).abs() <= bound).all(), ((found.double() - truth).abs() / bound).max()


# ---------------------------------------------------------------------------- products


def laid(tensor: Tensor, how: str) -> Tensor:
    if how == "turned":
        return tensor.mT.contiguous().mT
    if how == "gaps":
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    return tensor


@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(*[st.sampled_from([1, 3, 16, 17, 33])] * 2, st.sampled_from([0, 1, 16, 31, 130])),
    batches=st.sampled_from(
        [((), ()), ((2,), ()), ((), (3,)), ((2, 1), (3,)), ((1, 2), (2, 2)), ((0,), (1,))]
    ),
    memory=st.tuples(*[st.sampled_from(["", "turned", "gaps"])] * 2),
    dtype=st.sampled_from([FLOAT, BRAIN, HALF]),
    tuning=st.sampled_from([PLAIN, SPLIT, PIECES]),
    bias=st.booleans(),
)
def test_a_product_is_that_of_float64_whatever_the_shapes_strides_and_tiles(
    sizes: Any, batches: Any, memory: Any, dtype: Any, tuning: Any, bias: bool
) -> None:
    rows, columns, inner = sizes
    a = laid(normal(*batches[0], rows, inner, dtype=dtype, seed=1), memory[0])
    b = laid(normal(*batches[1], inner, columns, dtype=dtype, seed=2), memory[1])
    added = normal(columns, dtype=dtype, seed=3) if bias else None
    (found,) = planned(tuning)(a, b, bias=added)
    truth = a.double() @ b.double()
    assert found.dtype is dtype
    accurate(found, a, b, truth if added is None else truth + added.double(), slack=2.0**-22 * bias)


def test_types_that_differ_are_multiplied_in_the_wider_one() -> None:
    a, b = normal(5, 19, dtype=BRAIN), normal(19, 7, seed=1)
    for pair in ((a, b), (b.mT, a.mT), (a, b.half())):
        (found,) = planned()(*pair)
        assert found.dtype is FLOAT
        accurate(found, *pair, pair[0].double() @ pair[1].double())


def test_a_wider_result_is_not_rounded_to_the_type_of_the_operands() -> None:
    a, b = normal(5, 19, dtype=BRAIN), normal(19, 7, dtype=BRAIN, seed=1)
    (found,) = planned()(a, b, out_dtype=FLOAT)
    accurate(found, a, b, a.double() @ b.double())


# ---------------------------------------------------------------------------- functions


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN, HALF], ids=str)
def test_prologues_change_nothing_beyond_the_operands(dtype: torch.dtype) -> None:
    a, b = normal(3, 19, dtype=dtype), normal(19, 7, dtype=dtype, seed=1)  # 19 is no whole number of steps
    (found,) = planned()(a, b, a_prologue=torch.sigmoid, b_prologue=torch.exp)
    left, right = torch.sigmoid(a.double()), b.double().exp()
    accurate(found, left, right, left @ right, slack=2.0**-15 * (dtype is not FLOAT))


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_a_prologues_numbers_are_not_rounded_before_the_product(dtype: torch.dtype) -> None:
    a = normal(16, 16, dtype=dtype)
    b = torch.eye(16, dtype=dtype, device=DEVICE) * 2.0  # a sum of one term
    (found,) = planned()(a, b, a_prologue=lambda v: v * 0.3, epilogue=lambda v: v - 0.5)
    once, exact = found.double(), a.double() * 0.6 - 0.5
    (twice,) = planned()((a * 0.3), b, epilogue=lambda v: v - 0.5)
    assert (once - exact).abs().max() < 0.6 * torch.finfo(dtype).eps * exact.abs().max()
    assert (once - exact).abs().mean() < (twice.double() - exact).abs().mean()


def test_infinities_of_prologues_stay_infinities() -> None:
    a = torch.tensor([[float("inf"), 1.0], [1.0, 2.0]], dtype=BRAIN, device=DEVICE)
    b = torch.tensor([[1.0, 0.3], [1.0, float("-inf")]], dtype=BRAIN, device=DEVICE)
    (found,) = planned()(a, b, a_prologue=lambda v: v + v, b_prologue=lambda v: v * 3.0)
    expected = (a.double() * 2) @ (b.double() * 3)
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.equal(found.isnan(), expected.isnan())


@pytest.mark.parametrize("tuning", [PLAIN, SPLIT, PIECES], ids=["plain", "split", "pieces"])
def test_an_epilogue_reads_tensors_by_row_column_and_batch_and_has_several_results(tuning: Tuning) -> None:
    a, b = normal(2, 17, 33), normal(2, 33, 20, seed=1)
    residual, scale, entry = normal(17, 20, seed=2), normal(20, seed=3), normal(2, seed=4)
    few = normal(3, 20, seed=5)  # read at an index that is worked out
    found = planned(tuning)(
        a,
        b,
        epilogue=lambda v, n, r, c: (
            F.gelu(v * scale[c]) + residual[r, c],
            v * entry[n] + few[r % 3, c],
            v > 0.0,
            entry[n],
        ),
        out_dtype=(FLOAT, HALF, FLOAT, FLOAT),
    )
    total = a.double() @ b.double()
    rows = torch.arange(17, device=DEVICE) % 3
    expected = [
        F.gelu(total * scale) + residual,
        total * entry[:, None, None] + few[rows],
        (total > 0).double(),
        entry[:, None, None].expand(2, 17, 20),
    ]
    for one, other, tolerance in zip(found, expected, (2e-5, 2e-2, 0, 0), strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-3 * bool(tolerance), atol=tolerance)
    (positive,) = planned(tuning)(a, b, epilogue=lambda v: v > 0.0)
    assert positive.dtype is torch.bool
    assert torch.equal(positive, total > 0)


def test_a_batch_of_few_rows_before_one_matrix_keeps_its_indices() -> None:
    a, b, table = normal(3, 2, 9), normal(9, 5, seed=1), normal(3, 2, 5, seed=2)
    (found,) = planned()(a, b, epilogue=lambda v, n, r, c: v + table[n, r, c])
    torch.testing.assert_close(found.double(), a.double() @ b.double() + table, rtol=1e-5, atol=1e-5)


def test_an_equal_function_of_another_call_is_folded_like_the_first() -> None:
    def check(dtype: torch.dtype) -> None:
        a, b, scale, table = (
            normal(3, 2, 9, dtype=dtype),
            normal(9, 5, dtype=dtype, seed=1),
            normal(9),
            normal(3),
        )
        (found,) = planned()(
            a, b, a_prologue=lambda v, n, r, c: v + scale[c], epilogue=lambda v, n, r, c: v * table[n]
        )
        left = a.double() + scale
        accurate(found, left, b, (left @ b.double()) * table[:, None, None], slack=2.0**-14)

    check(FLOAT)
    check(BRAIN)


@pytest.mark.skipif(DEVICE != "cpu", reason="settings of the other device")
def test_settings_of_torch_in_either_style_are_read() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert float32_precision("cuda") == "tf32"
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert float32_precision("cuda") == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert float32_precision("cpu") == "ieee"


def test_only_indices_that_stay_inside_are_read_without_a_test() -> None:
    index = [(name, torch.int32) for name in ("batch", "row", "col")]
    table = torch.zeros(4, 5)
    graph = capture(lambda v, n, r, c: v + table[r, c], [("value", FLOAT), *index]).graph
    assert printer.direct_gathers(graph, (0, 1, 4, 5), [table]) == {0}
    assert printer.direct_gathers(graph, (0, 1, 5, 5), [table]) == frozenset()
    moved = capture(lambda v, n, r, c: v + table[r, c] + table[r, 0 * c], [("value", FLOAT), *index]).graph
    assert printer.direct_gathers(moved, (0, 1, 4, 5), [table]) == frozenset()
    assert "mask=live[2] & live[3]" in printer.source(graph, False, frozenset({0}))


# ---------------------------------------------------------------------------- packed weights


def weights(inner: int, columns: int) -> dict[str, Packed]:
    random = torch.Generator().manual_seed(1)
    matrix = torch.randn(inner, columns, generator=random)
    found: dict[str, Packed] = {}
    for bits in (8, 4):
        for group, symmetric in ((None, True), (None, False), (32, False), (64, True)):
            packed = torchhal.pack_weight(matrix, bits=bits, group=group, symmetric=symmetric)
            found[packed.scheme] = packed
    for kind, size in GGUF_BYTES.items():
        data = torch.randint(0, 256, (columns, inner // 32, size), dtype=torch.uint8, generator=random)
        head = torch.rand(columns, inner // 32, 2, generator=random).half().view(torch.uint8)
        data[..., : 4 if kind == "q4_1" else 2] = head[..., : 4 if kind == "q4_1" else 2]
        found[kind] = torchhal.gguf_weight(data.flatten(1), kind)
    return found


@pytest.mark.parametrize("name", weights(64, 1))
def test_the_elements_of_a_packed_weight_are_never_rounded(name: str) -> None:
    weight = weights(96, 19)[name].to(DEVICE)
    exact = unpack(weight, torch.float64)
    one = torch.eye(96, device=DEVICE)[:33]
    for dtype in (FLOAT, BRAIN):
        (found,) = planned()(one.to(dtype), weight, out_dtype=FLOAT)
        torch.testing.assert_close(found.double(), exact[:33], rtol=2e-7, atol=1e-7)
    a = normal(3, 96, dtype=BRAIN)
    (found,) = planned(SPLIT)(a, weight, a_prologue=torch.relu, out_dtype=BRAIN)
    left = a.double().relu()
    accurate(found, left, exact, left @ exact, slack=2.0**-15)
    (found,) = planned()(a, weight, b_prologue=lambda v, n, k, c: v * (k + c), out_dtype=BRAIN)
    right = exact * (torch.arange(96, device=DEVICE)[:, None] + torch.arange(19, device=DEVICE))
    accurate(found, a, right, a.double() @ right, slack=2.0**-15)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_odd_number_of_rows_leaves_its_padding_out(bits: int) -> None:
    weight = torchhal.pack_weight(normal(37, 5).cpu() + 4.0, bits=bits, group=32, symmetric=False).to(DEVICE)
    a = normal(2, 37)
    (found,) = planned()(a, weight)
    exact = unpack(weight, torch.float64)
    accurate(found, a, exact, a.double() @ exact)


# ---------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [FLOAT, BRAIN], ids=str)
def test_gradients_reach_operands_bias_and_captured_tensors(dtype: torch.dtype) -> None:
    leaves = {
        "a": normal(2, 5, 19, dtype=dtype), "b": normal(19, 7, dtype=dtype, seed=1), "bias": normal(7, dtype=dtype, seed=2),
        "gate": normal(7, seed=3), "residual": normal(5, 7, seed=4), "row": normal(19, seed=5),
    }  # fmt: skip

    def run(compute: Any, t: dict[str, Tensor]) -> Any:
        return compute(
            t["a"], t["b"], bias=t["bias"], a_prologue=lambda v, n, r, c: torch.tanh(v) * t["row"][c],
            epilogue=lambda v, n, r, c: F.silu(v) * t["gate"][c] + t["residual"][r, c],
        )  # fmt: skip

    def plain(a: Tensor, b: Tensor, *, bias: Tensor, **_: Any) -> tuple[Tensor]:
        t = wide
        return (F.silu((torch.tanh(a) * t["row"]) @ b + bias) * t["gate"] + t["residual"],)

    wide = {name: t.double().requires_grad_() for name, t in leaves.items()}
    given = {name: t.clone().requires_grad_() for name, t in leaves.items()}
    above = normal(2, 5, 7, dtype=dtype, seed=6)
    found = torch.autograd.grad(run(planned(), given)[0], list(given.values()), above)
    expected = torch.autograd.grad(run(plain, wide)[0], list(wide.values()), above.double())
    for name, one, other in zip(leaves, found, expected, strict=True):
        error = (one.double() - other).abs().max() / other.abs().max()
        assert error < (1e-6 if dtype is FLOAT else 8e-3), (name, error)


@pytest.mark.parametrize("name", ["int4:group=32:asymmetric", "int8:group=channel:symmetric", "q4_1"])
def test_the_gradient_through_a_packed_weight_is_by_its_transpose(name: str) -> None:
    weight = weights(64, 9)[name].to(DEVICE)
    a, above = normal(3, 64).requires_grad_(), normal(3, 9, seed=7)
    (found,) = torch.autograd.grad(planned()(a, weight)[0], [a], above)
    exact = unpack(weight, torch.float64).mT
    accurate(found, above, exact, above.double() @ exact)


def test_gradients_at_computed_indices_add_up() -> None:
    a, b, table = normal(4, 9), normal(9, 6, seed=1), normal(2, seed=2).requires_grad_()
    (out,) = planned()(a.requires_grad_(), b, epilogue=lambda v, n, r, c: v * table[r % 2])
    (found,) = torch.autograd.grad(out.sum(), [table])
    torch.testing.assert_close(found.double(), (a.double() @ b.double()).sum(1).view(2, 2).sum(0))


def test_a_second_derivative_is_refused_with_the_name_of_who_can_not() -> None:
    a, b = normal(3, 4).requires_grad_(), normal(4, 5)
    (first,) = torch.autograd.grad(planned()(a, b)[0].sum(), [a], create_graph=True)
    with pytest.raises(Unsupported, match="these kernels computes the first derivatives of matmul"):
        first.sum().backward()


# ---------------------------------------------------------------------------- promises and refusals


@pytest.mark.parametrize("tuning", [PLAIN, SPLIT], ids=["plain", "split"])
def test_a_call_like_an_earlier_one_reads_its_own_tensors(tuning: Tuning) -> None:
    multiply, table = planned(tuning), normal(5, seed=9)
    for seed in (1, 2, 3):
        a, b = normal(1, 64, seed=seed), normal(64, 5, seed=seed + 9)
        table.mul_(2.0)
        (found,) = multiply(a, b, epilogue=lambda v, n, r, c: v + table[c])
        torch.testing.assert_close(found.double(), a.double() @ b.double() + table, rtol=1e-5, atol=1e-4)


def test_parts_of_a_sum_are_added_in_one_order() -> None:
    a, b = normal(1, 1031, dtype=BRAIN), normal(1031, 3, dtype=BRAIN, seed=1)
    first, *others = (planned(SPLIT)(a, b, out_dtype=FLOAT)[0] for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


def test_what_is_not_what_its_memory_says_is_computed_by_plain_torch() -> None:
    turned = torch.complex(normal(3, 4), normal(3, 4, seed=1)).conj().imag
    assert turned.is_neg()
    (found,) = planned()(turned, normal(4, 5, seed=2))
    torch.testing.assert_close(found, turned.clone() @ normal(4, 5, seed=2), rtol=1e-5, atol=1e-5)


def test_results_of_a_type_that_is_not_written_are_declined_in_words() -> None:
    answer = matmul.decline(MatmulProblem(torch.device("cpu"), out_dtypes=(torch.float8_e5m2,)))
    assert answer is not None
    assert str(answer) == "the kernels write no torch.float8_e5m2; ask for another out_dtype [out_dtype]"


def test_tiles_shrink_to_the_smallest_and_no_further() -> None:
    tiles, count = Tiles(128, 256, 64, stages=4), 0
    while (found := tiles.smaller()) is not None:
        tiles, count = found, count + 1
    assert (tiles.rows, tiles.columns, tiles.stages) == (16, 16, 1)
    assert count == 3 + 4 + 3
