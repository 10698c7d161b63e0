"""The specification of the fused matrix product, against float64 computed element by element."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchhal.matmul import Call, Functions, build_problem, capture_functions, element_dtype, operands_of
from torchhal.operands import PackedWeight
from torchhal.reference.matmul import matmul, plan
from torchhal.reference.packing import pack_weight, unpack

few = settings(max_examples=25, deadline=None)
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
sizes = st.integers(0, 6)


def functions(a: Tensor, b: Tensor | PackedWeight, **named: Any) -> Functions:
    wanted = {name: named.get(name) for name in ("a_prologue", "b_prologue", "epilogue")}
    return capture_functions(element_dtype(a, b), **wanted)


def compute(
    a: Tensor, b: Tensor | PackedWeight, bias: Tensor | None = None, out_dtype: Any = None, **named: Any
) -> tuple[Tensor, ...]:
    found = functions(a, b, **named)
    problem = build_problem(Call(a, b, bias, found, out_dtype))
    return matmul(problem, a, b, bias, operands_of(found))


def half_ulp(exact: Tensor, dtype: torch.dtype, products: Tensor) -> Tensor:
    """One rounding to ``dtype``, and float32's (or float64's) own in the sum."""
    inner = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return exact.abs() * torch.finfo(dtype).eps + torch.finfo(dtype).smallest_normal + products * 16 * inner


@few
@given(
    batch=st.sampled_from([((), ()), ((3,), ()), ((), (2,)), ((2, 1), (3,)), ((0,), (1,))]),
    m=sizes, k=sizes, n=sizes, seed=st.integers(0, 2**30), dtype=st.sampled_from(FLOATS), has_bias=st.booleans(),
)  # fmt: skip
def test_the_plain_product_is_the_float64_one_rounded_once(
    batch: Any, m: int, k: int, n: int, seed: int, dtype: torch.dtype, has_bias: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn((*batch[0], m, k), generator=generator).to(dtype)
    b = torch.randn((*batch[1], k, n), generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype) if has_bias else None
    (out,) = compute(a, b, bias)
    exact = a.double() @ b.double() + (0.0 if bias is None else bias.double())
    assert out.dtype == dtype and out.shape == exact.shape
    bound = half_ulp(exact, dtype, a.double().abs() @ b.double().abs() + 1)
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", FLOATS)
def test_functions_and_indices_mean_what_a_loop_over_elements_says(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    a, b, bias = torch.randn(2, 1, 3, 4).to(dtype), torch.randn(3, 4, 5).to(dtype), torch.randn(5).to(dtype)
    scale, shift, residual = torch.rand(6), torch.rand(4, 5), torch.randn(3, 5)
    (out,) = compute(
        a, b, bias,
        a_prologue=lambda v, batch, row, col: v * scale[batch] + row * 0.25 - col * 0.5,
        b_prologue=lambda v, batch, row, col: torch.tanh(v) + shift[row, col] + batch,
        epilogue=lambda v, batch, row, col: torch.relu(v) + residual[row, col] * batch,
    )  # fmt: skip
    exact = torch.empty(2, 3, 3, 5, dtype=torch.float64)
    wide_a, wide_b = a.expand(2, 3, 3, 4).double(), b.expand(2, 3, 4, 5).double()
    for i in range(6):
        left, right = wide_a[i // 3, i % 3], wide_b[i // 3, i % 3]
        left = (
            left * scale[i].double()
            + torch.arange(3).double()[:, None] * 0.25
            - torch.arange(4).double() * 0.5
        )
        right = torch.tanh(right) + shift.double() + i
        exact[i // 3, i % 3] = torch.relu(left @ right + bias.double()) + residual.double() * i
    error = (out.double() - exact).abs()
    assert bool((error <= exact.abs() * torch.finfo(dtype).eps + 2e-5).all())


def test_the_epilogue_sees_the_sum_before_it_is_rounded() -> None:
    a = torch.tensor([[1.0, 2.0**-12]], dtype=torch.bfloat16)
    b = torch.ones(2, 1, dtype=torch.bfloat16)
    (out,) = compute(a, b, epilogue=lambda v: v - 1.0)
    assert float(out) == 2.0**-12


def test_prologues_see_elements_in_float32() -> None:
    a = torch.tensor([[1.0]], dtype=torch.bfloat16)
    (out,) = compute(a, a, torch.zeros(1), a_prologue=lambda v: v + 2.0**-20, epilogue=lambda v: v - 1.0)
    assert float(out) == 2.0**-20


def test_without_inner_elements_the_epilogue_of_the_bias_remains() -> None:
    bias = torch.tensor([-1.0, 2.0, 3.0])
    (out,) = compute(
        torch.ones(2, 0), torch.ones(0, 3), bias, a_prologue=lambda v: 1.0, epilogue=lambda v: v * 2
    )
    assert torch.equal(out, (bias * 2).expand(2, 3))


def test_a_constant_prologue_still_counts_every_inner_element() -> None:
    (out,) = compute(torch.zeros(2, 3), torch.ones(3, 4), a_prologue=lambda v: 1.0)
    assert torch.equal(out, torch.full((2, 4), 3.0))


def test_outputs_never_share_memory() -> None:
    held = torch.tensor(2.0)
    first, second, third = compute(torch.ones(2, 2), torch.ones(2, 2), epilogue=lambda v: (v, v, held))
    first.zero_()
    assert float(second.min()) == 2.0 and third.shape == (2, 2)
    third.zero_()
    assert float(held) == 2.0


def test_any_strides_give_the_same_product() -> None:
    torch.manual_seed(1)
    a, b = torch.randn(6, 8), torch.randn(8, 10)
    strided = compute(a.t().contiguous().t()[::2], b.repeat(2, 1)[::2][:8].roll(0))[0]
    wanted = a[::2].double() @ b.repeat(2, 1)[::2].double()
    torch.testing.assert_close(strided.double(), wanted, rtol=1e-5, atol=1e-5)
    expanded = compute(torch.ones(1, 1).expand(3, 4), torch.ones(4, 1).expand(4, 2))[0]
    assert torch.equal(expanded, torch.full((3, 2), 4.0))


@few
@given(
    bits=st.sampled_from([8, 4]), group=st.sampled_from([None, 32]), symmetric=st.booleans(),
    k=st.integers(0, 70), n=st.integers(0, 5), seed=st.integers(0, 2**30),
)  # fmt: skip
def test_a_packed_weight_multiplies_as_its_dequantised_values(
    bits: int, group: int | None, symmetric: bool, k: int, n: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, weight = torch.randn(3, k, generator=generator), torch.randn(k, n, generator=generator)
    packed = pack_weight(weight, bits=bits, group=group, symmetric=symmetric)
    (out,) = compute(a, packed, epilogue=lambda v: v * 2)
    exact = a.double() @ unpack(packed, torch.float64) * 2
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-4)


def test_a_packed_half_weight_is_not_rounded_on_the_way() -> None:
    packed = pack_weight(torch.tensor([[100.0], [-33.0]], dtype=torch.bfloat16))
    identity = torch.eye(2)
    (out,) = compute(identity, packed, out_dtype=torch.float32)
    assert torch.equal(out, unpack(packed, torch.float32)) and not torch.equal(out, unpack(packed).float())


def test_gradients_reach_operands_bias_and_captured_tensors() -> None:
    torch.manual_seed(2)
    a = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    scale = torch.randn(4, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        a, b, bias, scale, residual = leaves
        return compute(
            a, b, bias,
            a_prologue=lambda v, batch, row, col: v * scale[col],
            epilogue=lambda v, batch, row, col: (torch.tanh(v) * residual[row, col], v * v),
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, (a, b, bias, scale, residual))


def test_gradient_passes_a_packed_weight_to_the_other_operand() -> None:
    packed = pack_weight(torch.randn(4, 5))
    a = torch.randn(3, 4, requires_grad=True)
    compute(a, packed)[0].sum().backward()
    torch.testing.assert_close(a.grad, unpack(packed).sum(1).expand(3, 4))


def test_autocast_does_not_round_the_operands() -> None:
    a = torch.full((1, 1), 1 + 2.0**-12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (out,) = compute(a, a)
    assert out.dtype == torch.float32 and float(out) == float(a * a)


def test_mixed_types_are_computed_in_the_wider() -> None:
    a, b = torch.full((1, 2), 1 / 3, dtype=torch.float64), torch.full((2, 1), 3.0, dtype=torch.float32)
    (out,) = compute(a, b)
    assert out.dtype == torch.float64 and float(out) == 2.0


def test_the_plan_promises_autograd_and_runs_the_specification() -> None:
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    made = plan(build_problem(Call(a, b)))
    assert made.differentiable and made.deterministic
    assert torch.equal(made.run(a, b, None, None)[0], a @ b)
