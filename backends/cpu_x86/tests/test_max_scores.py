"""Row maxima of the native kernels: of tiles, of few rows, of split keys, of every layout, as the specification has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import threads
from torch import Tensor

import torchhal


def _modified(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 5.0 * torch.tanh(score / 5.0) - 0.01 * (q_idx - kv_idx) * h


def _drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _both(function: Any, *tensors: Tensor, **asked: Any) -> tuple[Any, Any]:
    return tuple(
        function(*tensors, return_max_scores=True, **asked, backend=b) for b in ("cpu_x86", "reference")
    )


@pytest.mark.sanitized
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 15, 33, 130]),
    keys=st.sampled_from([0, 1, 31, 64, 257, 1500]),
    size=st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (6, 2), (8, 1)]),
    causal=st.booleans(),
    mod=st.sampled_from([None, _modified]),
    mask=st.booleans(),
    lse=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_maxima_are_those_of_the_specification_and_change_no_other_result(
    rows: int,
    keys: int,
    size: int,
    heads: tuple[int, int],
    causal: bool,
    mod: Any,
    mask: bool,
    lse: bool,
    dtype: torch.dtype,
) -> None:
    query = _drawn(2, heads[0], rows, size, seed=rows, dtype=dtype)
    key, value = (_drawn(2, heads[1], keys, size, seed=keys + i, dtype=dtype) for i in range(2))
    asked: dict[str, Any] = {"score_mod": mod, "is_causal": causal, "enable_gqa": True, "return_lse": lse}
    if mask:
        asked["attn_mask"] = _drawn(rows, keys, seed=5, dtype=torch.float32) > -0.5
    found, expected = _both(torchhal.attention, query, key, value, **asked)
    assert len(found) == 2 + lse
    torch.testing.assert_close(found[-1], expected[-1], rtol=1e-5, atol=1e-5)
    plain = torchhal.attention(query, key, value, **{**asked, "return_lse": True}, backend="cpu_x86")
    assert torch.equal(found[0], plain[0])
    assert not lse or torch.equal(found[1], plain[1])


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maxima_of_split_keys_are_those_of_all(count: int, dtype: torch.dtype) -> None:
    query = _drawn(1, 8, 1, 64, seed=1, dtype=dtype)
    key, value = (_drawn(1, 1, 9000, 64, seed=i, dtype=dtype) for i in (2, 3))
    with threads(count):
        found, expected = _both(torchhal.attention, query, key, value, enable_gqa=True)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_and_paged_sequences_have_maxima_of_their_own(causal: bool) -> None:
    lengths = torch.tensor([0, 3, 3, 40, 41], dtype=torch.int32)
    packed = [_drawn(41, 2, 16, seed=i, dtype=torch.float32) for i in range(3)]
    found, expected = _both(
        torchhal.varlen_attention, *packed, lengths, lengths, is_causal=causal, score_mod=_modified
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    query, keys, values = (
        _drawn(*s, seed=i, dtype=torch.float32)
        for i, s in enumerate([(2, 4, 2, 16), (9, 2, 4, 16), (9, 2, 4, 16)])
    )
    table = torch.tensor([[8, 1, 3], [2, 0, 0]], dtype=torch.int32)
    found, expected = _both(
        torchhal.paged_attention, query, keys, values, table, torch.tensor([11, 3], dtype=torch.int32),
        is_causal=causal, enable_gqa=True,
    )  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_maxima_have_no_gradient_and_change_none() -> None:
    leaves = [_drawn(1, 2, n, 8, seed=n, dtype=torch.float32).requires_grad_() for n in (5, 7, 7)]
    out, lse, maxima = torchhal.attention(*leaves, return_lse=True, return_max_scores=True, backend="cpu_x86")
    assert not maxima.requires_grad
    other = torchhal.attention(*leaves, return_lse=True, backend="cpu_x86")
    for one, two in zip(
        torch.autograd.grad(out.sum() + lse.sum(), leaves),
        torch.autograd.grad(other[0].sum() + other[1].sum(), leaves),
        strict=True,
    ):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_score_that_is_no_number_is_the_maximum_of_its_row_alone(rows: int) -> None:
    query, key, value = (_drawn(1, 1, n, 8, seed=n, dtype=torch.float32) for n in (rows, 50, 50))
    query[0, 0, -1, 3] = torch.nan
    _, maxima = torchhal.attention(query, key, value, return_max_scores=True, backend="cpu_x86")
    assert maxima[0, 0].isnan().nonzero().flatten().tolist() == [rows - 1]


def test_the_operator_with_maxima_is_as_torch_wants_its_operators() -> None:
    query, key, value = (_drawn(1, 2, n, 8, seed=n, dtype=torch.float32) for n in (5, 7, 7))

    def call(*tensors: Tensor) -> Any:
        return torchhal.attention(*tensors, score_mod=_modified, return_max_scores=True, backend="cpu_x86")

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(query, key, value)
    for one, other in zip(found, call(query, key, value), strict=True):
        assert torch.equal(one, other)
