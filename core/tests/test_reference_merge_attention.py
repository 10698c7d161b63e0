"""Merging partial attention: parts over disjoint keys give what attention over all of them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_calls import INF, NAN, call, normal, plain, qkv, same
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_accurate
from torch import Tensor

from torchhal.errors import InvalidProblem
from torchhal.reference.attention import merge_attention


def parts(query: Tensor, key: Tensor, value: Tensor, cuts: list[int], mask: Tensor) -> tuple[Any, Any]:
    spans = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, key.shape[2]], strict=True)]
    results = [call(query, key[:, :, s], value[:, :, s], mask=mask[..., s]) for s in spans]
    return zip(*results, strict=True)  # type: ignore[return-value]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=4), st.integers(0, 99))
def test_parts_merge_to_the_whole_wherever_the_keys_are_cut(cuts: list[int], seed: int) -> None:
    query, key, value = qkv(2, 4, 2, 5, 12, 8, 3, seed=seed)
    mask = torch.rand(5, 12, generator=torch.Generator().manual_seed(seed)) > 0.6
    outs, lses = parts(query, key, value, sorted(cuts), mask)
    merged = merge_attention(outs, lses)
    for got, expected in zip(merged, call(query, key, value, mask=mask), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 1e3])
def test_merging_is_as_accurate_as_plain_attention_in_the_same_type(dtype: torch.dtype, size: float) -> None:
    query, key, value = qkv(1, 2, 2, 8, 96, 16, 16, dtype)
    query = query * size
    outs, lses = parts(query, key, value, [30, 64], torch.ones(8, 96, dtype=torch.bool))
    out, lse = merge_attention(outs, lses)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    expected, baseline = call(query.double(), key.double(), value.double()), plain(query, key, value)
    assert_accurate(out, expected[0], baseline[0])
    assert_accurate(lse, expected[1], baseline[1])


def test_one_part_is_returned_bit_for_bit() -> None:
    out, lse = normal(3, 4, 5, dtype=torch.float32), normal(3, 4, dtype=torch.float32)
    same(merge_attention([out], [lse]), (out, lse))


def test_a_part_that_saw_nothing_contributes_nothing_whatever_it_holds() -> None:
    out, lse = normal(3, 5, dtype=torch.float32), torch.tensor([1.0, -1000.0, -INF])
    garbage, nothing = torch.full((3, 5), NAN), torch.full((3,), -INF)
    merged = merge_attention([garbage, out, garbage], [nothing, lse, nothing])
    same(merged, (torch.cat([out[:2], torch.zeros(1, 5)]), lse))


def test_where_every_part_saw_nothing_gradients_are_zero_and_not_nan() -> None:
    outs = [torch.full((2, 3), NAN, requires_grad=True), normal(2, 3, dtype=torch.float32).requires_grad_()]
    lses = [torch.tensor([-INF, -INF], requires_grad=True), torch.tensor([-INF, 2.0], requires_grad=True)]
    out, lse = merge_attention(outs, lses)
    assert (out[0] == 0).all() and lse.tolist() == [-INF, 2.0]
    torch.autograd.backward(out.sum() + lse[1])
    gradients = [t.grad for t in (*outs, *lses)]
    same(tuple(gradients[:2]), (torch.zeros(2, 3), torch.tensor([[0.0] * 3, [1.0] * 3])))  # type: ignore[arg-type]
    assert gradients[2] is not None and (gradients[2] == 0).all()
    assert gradients[3] is not None and gradients[3][0] == 0
    torch.testing.assert_close(gradients[3][1], torch.tensor(1.0))  # the output's share cancels, to rounding


def test_merging_is_differentiable_in_outputs_and_lses() -> None:
    inputs = [normal(2, 3, 4, seed=i) for i in range(3)]
    inputs += [normal(2, 3, seed=i) for i in range(3)]
    leaves = tuple(t.requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(lambda *t: merge_attention(t[:3], t[3:]), leaves)


def test_empty_parts_merge() -> None:
    out, lse = merge_attention([torch.zeros(0, 4), torch.zeros(0, 4)], [torch.zeros(0), torch.zeros(0)])
    assert (tuple(out.shape), tuple(lse.shape)) == ((0, 4), (0,))


FLAT, ROW = torch.zeros(3, 4), torch.zeros(3)


@pytest.mark.parametrize(("outs", "lses", "message"), [
    ([], [], "expected one or more outputs and as many LSEs; got 0 and 0"),
    ([FLAT], [ROW, ROW], "expected one or more outputs and as many LSEs; got 1 and 2"),
    ([FLAT, FLAT[:2]], [ROW, ROW], r"outs\[1\] is \(2, 4\) torch.float32 on cpu and outs\[0\] is \(3, 4\)"),
    ([FLAT, FLAT.half()], [ROW, ROW], r"outs\[1\] is \(3, 4\) torch.float16"),
    ([FLAT, FLAT], [ROW, FLAT], r"lses\[1\] must be as outs\[1\] less its last dimension, \(3,\) on cpu"),
    ([FLAT.long()], [ROW], "outputs and LSEs must be floating; part 0 has torch.int64 and torch.float32"),
    ([FLAT], [ROW.int()], "outputs and LSEs must be floating; part 0 has torch.float32 and torch.int32"),
])  # fmt: skip
def test_parts_that_do_not_belong_together_are_refused(outs: Any, lses: Any, message: str) -> None:
    with pytest.raises(InvalidProblem, match=message):
        merge_attention(outs, lses)
