"""Row maxima: the largest score of each row as it enters the softmax, beside the output and the LSE or without it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import torchhal
from torchhal import errors, mode_flex, scope


def _softcap(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return 5.0 * torch.tanh(score / 5.0) - 0.1 * h


def _drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _expected(query: Tensor, key: Tensor, scale: float, causal: bool, mod: Any) -> Tensor:
    """In float64: -inf where a row sees no key."""
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query.double() @ key.mT * scale
    b, h, q, k = (
        torch.arange(n).view([n if i == j else 1 for j in range(4)]) for i, n in enumerate(scores.shape)
    )
    if mod is not None:
        scores = mod(scores, b, h, q, k)
    if causal:
        scores = scores.masked_fill(k > q, -torch.inf)
    return scores.amax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -torch.inf)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    keys=st.integers(0, 70),
    size=st.integers(1, 20),
    causal=st.booleans(),
    lse=st.booleans(),
    mod=st.sampled_from([None, _softcap]),
    scale=st.sampled_from([-0.7, 0.25, 3.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_maximum_is_that_of_the_scores_and_comes_last(
    rows: int,
    keys: int,
    size: int,
    causal: bool,
    lse: bool,
    mod: Any,
    scale: float,
    dtype: torch.dtype,
) -> None:
    query, key, value = (
        _drawn(2, h, n, size, seed=h + n, dtype=dtype) for h, n in ((4, rows), (2, keys), (2, keys))
    )
    asked: dict[str, Any] = {
        "score_mod": mod,
        "is_causal": causal,
        "scale": scale,
        "enable_gqa": True,
    }
    plain = torchhal.attention(query, key, value, return_lse=True, **asked)
    found = torchhal.attention(query, key, value, return_lse=lse, return_max_scores=True, **asked)
    assert len(found) == 2 + lse
    for one, other in zip(found[:-1], plain, strict=False):
        assert torch.equal(one, other), "asking for one more result changes no other"
    assert found[-1].dtype == plain[1].dtype
    expected = _expected(query, key, scale, causal, mod)
    torch.testing.assert_close(found[-1].double(), expected, rtol=2e-5, atol=2e-5)


def test_maxima_have_no_gradient_and_change_none() -> None:
    query, key, value = (_drawn(1, 2, 5, 8, seed=i).requires_grad_() for i in range(3))
    out, lse, maxima = torchhal.attention(query, key, value, return_lse=True, return_max_scores=True)
    assert not maxima.requires_grad
    found = torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))
    other = torchhal.attention(query, key, value, return_lse=True)
    for one, two in zip(
        found, torch.autograd.grad(other[0].sum() + other[1].sum(), (query, key, value)), strict=True
    ):
        assert torch.equal(one, two)


def test_packed_nested_and_paged_sequences_have_the_maxima_of_each_sequence() -> None:
    lengths = [3, 0, 6]
    parts = [[_drawn(n, 2, 8, seed=10 * i + n) for n in lengths] for i in range(3)]
    packed = [torch.cat(part) for part in parts]
    starts = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    _, maxima = torchhal.varlen_attention(*packed, starts, starts, is_causal=True, return_max_scores=True)
    for b, n in enumerate(lengths):
        query, key, _ = (part[b].transpose(0, 1)[None] for part in parts)
        expected = _expected(query, key, 8**-0.5, True, None)[0].T
        torch.testing.assert_close(maxima[starts[b] : starts[b] + n].double(), expected, rtol=2e-5, atol=2e-5)
    nested = [torch.nested.nested_tensor(part, layout=torch.jagged).transpose(1, 2) for part in parts]
    out, lse, ragged = torchhal.attention(*nested, is_causal=True, return_lse=True, return_max_scores=True)
    assert torch.equal(ragged.transpose(1, 2).values(), maxima)
    assert out.is_nested
    assert lse.is_nested
    cache = torchhal.PagedKVCache(4, 4, 2, 8)
    kept = [cache.allocate(*(part[2].transpose(0, 1)[None] for part in parts[1:]))]
    query = parts[0][2].transpose(0, 1)[None]
    _, paged = cache.attention(query, kept, is_causal=True, return_max_scores=True)
    assert torch.allclose(paged[0].T, maxima[3:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lse", [False, True])
def test_a_compiled_call_returns_what_an_eager_one_does(lse: bool) -> None:
    query, key, value = (_drawn(1, 2, 6, 8, seed=i) for i in range(3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torchhal.attention(q, k, v, score_mod=_softcap, return_lse=lse, return_max_scores=True)

    found = torch.compile(call, backend="aot_eager", fullgraph=True)(query, key, value)
    for one, other in zip(found, call(query, key, value), strict=True):
        assert torch.equal(one, other)


def test_torchs_operator_is_served_with_maxima_in_its_own_unit() -> None:
    """Torch refuses to ask for them on a CPU before the mode sees the call, so the handler is called here."""
    query, key, value = (_drawn(1, 2, 150, 16, seed=i) for i in range(3))
    blocks = create_block_mask(lambda b, h, q, k: q >= k, None, None, 150, 150, device="cpu")
    options = {"OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": True}
    mode: Any = SimpleNamespace(backend="reference")
    out, lse, maxima = mode_flex.flex_attention(
        mode, query, key, value, _softcap, blocks.as_tuple(), 0.25, options
    )
    expected = _expected(query, key, 0.25, True, _softcap) * math.log2(math.e)
    torch.testing.assert_close(maxima.double(), expected, rtol=2e-5, atol=2e-5)
    assert (lse >= maxima).all()
    options["OUTPUT_LOGSUMEXP"] = False
    again = mode_flex.flex_attention(mode, query, key, value, _softcap, blocks.as_tuple(), 0.25, options)
    assert torch.equal(again[0], out)
    assert again[1].numel() == 0
    assert torch.equal(again[2], maxima)


def test_a_score_that_is_no_number_is_the_maximum_of_its_row_alone() -> None:
    query, key, value = (_drawn(1, 1, 4, 8, seed=i) for i in range(3))
    query[0, 0, 2, 3] = torch.nan
    _, maxima = torchhal.attention(query, key, value, return_max_scores=True)
    assert maxima[0, 0].isnan().tolist() == [False, False, True, False]


def test_ranks_refuse_what_none_of_them_knows() -> None:
    query = _drawn(1, 1, 4, 8)
    with (
        scope.changed(context_parallel=object()),
        pytest.raises(errors.InvalidProblem, match="not computed across ranks"),
    ):
        torchhal.attention(query, query, query, return_max_scores=True)
