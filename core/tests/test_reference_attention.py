"""The reference attention against a float64 oracle: masks, mods, groups, types, strides and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from attention_calls import HIDERS, INF, NAN, alibi, call, close, normal, plain, qkv, same
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_accurate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchhal.errors import InvalidProblem
from torchhal.problems import AttentionProblem
from torchhal.reference import products
from torchhal.reference.attention import attention, plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    hkv, group = draw(st.integers(1, 2)), draw(st.sampled_from((1, 3, 5, 7, 8)))
    sizes = {"b": draw(st.integers(0, 2)), "hq": hkv * group, "hkv": hkv}
    sizes |= {"rows": draw(st.integers(0, 5)), "keys": draw(st.integers(0, 6))}
    return sizes | {"e": draw(st.sampled_from((1, 3, 8))), "ev": draw(st.sampled_from((1, 2, 8)))}


@settings(max_examples=25, deadline=None)
@given(shapes(), st.booleans(), st.sampled_from(("none", "boolean", "additive")), st.integers(0, 99))
def test_every_shape_group_and_mask_agrees_with_the_oracle(
    sizes: dict[str, Any], is_causal: bool, kind: str, seed: int
) -> None:
    query, key, value = qkv(**sizes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    bias = torch.randn((sizes["hq"], 1, sizes["keys"]), generator=generator, dtype=torch.float64)
    masks = {"none": None, "boolean": bias > -0.3, "additive": bias.masked_fill(bias > 1, -INF)}
    mask = masks[kind]
    result = call(query, key, value, is_causal=is_causal, mask=mask, scale=0.7)
    close(result, oracle.attention(query, key, value, scale=0.7, is_causal=is_causal, mask=mask))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_is_as_accurate_as_a_plain_evaluation(dtype: torch.dtype) -> None:
    query, key, value = qkv(2, 6, 2, 9, 33, 24, 17, dtype)
    out, lse = call(query, key, value)
    expected = oracle.attention(query, key, value, scale=24**-0.5)
    baseline = plain(query, key, value)
    assert (out.dtype, lse.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    assert_accurate(out, expected[0], baseline[0])
    assert_accurate(lse, expected[1], baseline[1])


def test_probabilities_are_not_rounded_before_they_meet_the_values() -> None:
    query, key, value = qkv(1, 1, 1, 64, 200, 16, 16, torch.bfloat16)
    out, _ = call(query, key, value)
    expected, _ = oracle.attention(query, key, value, scale=0.25)
    torch.testing.assert_close(out, torch.from_numpy(expected).bfloat16(), rtol=0.008, atol=1e-6)


def test_types_of_query_key_and_value_may_differ() -> None:
    query, key, value = qkv(1, 2, 1, 4, 7, 8, 5)
    query, key, value = query.half(), key.bfloat16(), value.float()
    out, lse = call(query, key, value)
    wide = call(query.float(), key.float(), value)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    same((out, lse), (wide[0].half(), wide[1]))


@pytest.mark.parametrize("rearrange", [
    lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    lambda t: t.mT.contiguous().mT,
    lambda t: torch.stack([t, t], -1).flatten(-2)[..., ::2],
    lambda t: torch.nn.functional.pad(t, (3, 1))[..., 3:-1],
])  # fmt: skip
def test_strides_do_not_change_a_bit_of_the_meaning(rearrange: Callable[[Tensor], Tensor]) -> None:
    tensors = qkv(2, 4, 2, 5, 6, 8, 8)
    close(
        call(*map(rearrange, tensors), is_causal=True),
        tuple(map(oracle.as64, call(*tensors, is_causal=True))),
    )


def test_an_expanded_key_is_read_once_for_all() -> None:
    query, key, value = qkv(3, 2, 2, 4, 5, 8, 8)
    key, value = key[:1].expand(3, -1, -1, -1), value[:1].expand(3, -1, -1, -1)
    close(call(query, key, value), oracle.attention(query, key, value, scale=8**-0.5))


# ---------------------------------------------------------------------------- user functions


def documents(ids: Any) -> Callable[..., Any]:
    return lambda b, h, q, k: ids[b, q] == ids[b, k]


def test_score_mod_sees_the_query_head_and_each_index() -> None:
    query, key, value = qkv(2, 6, 2, 4, 5, 8, 3)
    slopes = torch.linspace(-1, 1, 6, dtype=torch.float64)
    result = call(query, key, value, score_mod=alibi(slopes), scale=0.3)
    close(result, oracle.attention(query, key, value, score_mod=alibi(slopes.numpy()), scale=0.3))


def test_mods_and_masks_act_in_order_mod_then_mask() -> None:
    query, key, value = qkv(2, 3, 1, 5, 5, 8, 8)
    ids = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    bias = normal(2, 1, 5, 5)
    slopes = normal(3)
    rules: dict[str, Any] = {"is_causal": True, "mask": bias, "scale": 0.5}
    result = call(query, key, value, score_mod=alibi(slopes), mask_mod=documents(ids), **rules)
    mods: dict[str, Any] = {"score_mod": alibi(slopes.numpy()), "mask_mod": documents(ids.numpy())}
    close(result, oracle.attention(query, key, value, **mods, **rules))


def test_a_score_mod_that_ignores_the_score_still_gives_one_weight_to_each_key() -> None:
    query, key, value = qkv(1, 2, 2, 3, 4, 8, 8)
    out, lse = call(query, key, value, score_mod=lambda score, b, h, q, k: 0.0 * score)
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand(-1, -1, 3, -1))
    torch.testing.assert_close(lse, torch.full_like(lse, 4).log())


def test_half_precision_scores_reach_the_mod_in_float32() -> None:
    query = torch.full((1, 1, 1, 4), 200.0, dtype=torch.float16)
    seen = call(query, query, query, scale=1.0, score_mod=lambda score, b, h, q, k: score)
    assert seen[1].item() == 160000.0  # beyond the largest float16


def test_an_index_out_of_range_is_no_error_where_the_mask_hides_the_pair() -> None:
    query, key, value = qkv(1, 1, 1, 4, 6, 8, 8)
    table = normal(4)
    result = call(query, key, value, is_causal=True, score_mod=lambda s, b, h, q, k: s + table[k])
    close(result, oracle.attention(query, key, value, scale=8**-0.5, is_causal=True,
                                   score_mod=lambda s, b, h, q, k: s + float(table[k])))  # fmt: skip


# ---------------------------------------------------------------------------- hidden keys


@pytest.mark.parametrize("hider", HIDERS)
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_a_non_finite_key_or_value_reaches_exactly_the_rows_that_see_it(hider: str, poison: float) -> None:
    query, key, value = qkv(2, 4, 2, 6, 6, 8, 8)
    clean = call(query, key, value, **HIDERS[hider])
    value[:, :, 3, 5] = poison
    out, lse = call(query, key, value, **HIDERS[hider])
    same((out[:, :, :3], lse), (clean[0][:, :, :3], clean[1]))
    same((out[..., :5],), (clean[0][..., :5],))
    same((out[:, :, 3:, 5],), (torch.full_like(out[:, :, 3:, 5], poison),))
    key[:, :, 3, 1] = NAN
    out, lse = call(query, key, value, **HIDERS[hider])
    same((out[:, :, :3], lse[:, :, :3]), (clean[0][:, :, :3], clean[1][:, :, :3]))
    assert out[:, :, 3:].isnan().all() and lse[:, :, 3:].isnan().all()


@pytest.mark.parametrize("poison", [0.0, NAN, INF, -INF])
def test_a_device_that_is_not_asked_to_look_for_nan_gives_the_same_bits(
    poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = qkv(2, 4, 2, 6, 6, 8, 8)
    value[:, :, 3, 5] = poison
    looked = call(query, key, value, is_causal=True)
    monkeypatch.setattr(products, "_known_finite", lambda values: False)
    same(call(query, key, value, is_causal=True), looked)


def test_opposite_infinities_that_are_both_seen_make_nan() -> None:
    query, key, value = qkv(1, 1, 1, 3, 3, 8, 2)
    value[0, 0, 0, 0], value[0, 0, 1, 0] = INF, -INF
    out, _ = call(query, key, value, is_causal=True)
    assert out[0, 0, 0, 0] == INF and out[0, 0, 1:, 0].isnan().all() and out[..., 1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hide", [
    {"mask": torch.tensor([False, True, False, True]).unsqueeze(-1)},
    {"mask": torch.tensor([-INF, 0, -INF, 0]).unsqueeze(-1)},
    {"mask_mod": lambda b, h, q, k: q % 2 == 1},
    {"score_mod": lambda s, b, h, q, k: torch.where(q % 2 == 1, s, -float("inf"))},
])  # fmt: skip
def test_fully_masked_rows_give_zero_and_minus_infinity_lse_and_no_gradient(
    hide: dict[str, Any], dtype: torch.dtype
) -> None:
    query, key, value = (t.requires_grad_() for t in qkv(2, 2, 1, 4, 5, 8, 8, dtype))
    out, lse = call(query, key, value, **hide)
    assert (out[:, :, ::2] == 0).all() and (lse[:, :, ::2] == -INF).all()
    assert (out[:, :, 1::2] != 0).all() and lse[:, :, 1::2].isfinite().all()
    torch.autograd.backward(out.sum() + lse[:, :, 1::2].sum() + 0.5 * lse.exp().sum())
    assert query.grad is not None and key.grad is not None and value.grad is not None
    assert (query.grad[:, :, ::2] == 0).all() and (query.grad[:, :, 1::2] != 0).any()
    assert key.grad.isfinite().all() and value.grad.isfinite().all()


def test_no_keys_no_rows_and_no_sequences_are_fine() -> None:
    for sizes in ((2, 2, 1, 3, 0, 4, 4), (2, 2, 1, 0, 3, 4, 4), (0, 2, 1, 3, 3, 4, 4), (1, 2, 1, 3, 3, 0, 4)):
        query, key, value = (t.requires_grad_() for t in qkv(*sizes))
        result = call(query, key, value, is_causal=True, scale=1.0)
        close(result, oracle.attention(query, key, value, is_causal=True))
        torch.autograd.backward(result[0].sum())
        assert query.grad is not None and (query.grad == 0).all()


# ---------------------------------------------------------------------------- difficult numbers


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand_neither_overflow_nor_vanish(size: float) -> None:
    query, key, value = qkv(1, 1, 1, 8, 40, 8, 8, torch.float32)
    out, lse = call(query * size, key, value)
    expected = oracle.attention(query * size, key, value, scale=8**-0.5)
    baseline = plain(query * size, key, value)
    assert_accurate(out, expected[0], baseline[0])
    assert_accurate(lse, expected[1], baseline[1])


def test_rows_whose_live_logits_are_all_below_minus_100_do_not_underflow() -> None:
    query, key, value = qkv(1, 2, 2, 6, 70, 8, 8, torch.float32)
    bias = torch.full((6, 70), -150.0)
    bias[:, :64] = -INF
    expected = oracle.attention(query, key, value, scale=8**-0.5, mask=bias)
    out, lse = call(query, key, value, mask=bias)
    baseline = plain(query, key, value, bias)
    assert_accurate(out, expected[0], baseline[0])
    assert_accurate(lse, expected[1], baseline[1])


def test_negative_zero_is_a_score_like_zero() -> None:
    query, key, value = qkv(1, 1, 1, 2, 3, 4, 4)
    out, lse = call(-torch.zeros_like(query), key, value, mask=torch.tensor(-0.0, dtype=torch.float64))
    torch.testing.assert_close(out, value.mean(2, keepdim=True).expand_as(out))
    assert (lse == np.log(3)).all()


def test_autocast_does_not_round_what_attention_computes_with() -> None:
    tensors = qkv(1, 2, 2, 5, 9, 8, 8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(*tensors, is_causal=True)
    same(inside, call(*tensors, is_causal=True))


# ---------------------------------------------------------------------------- contract


def test_the_plan_runs_attention_and_promises_what_it_keeps() -> None:
    query, key, value = qkv(1, 2, 2, 3, 4, 4, 4)
    problem = AttentionProblem(device=torch.device("cpu"), query_dtype=torch.float64)
    answer = plan(problem)
    out = answer.run(query, key, value, None, 0.5, None)
    same((out,), (call(query, key, value)[0],))
    assert answer.deterministic and answer.differentiable and not answer.traceable


def test_an_unknown_layout_is_refused() -> None:
    query, key, value = qkv(1, 1, 1, 1, 1, 1, 1)
    problem = AttentionProblem(device=torch.device("cpu"), layout="jagged")
    with pytest.raises(InvalidProblem, match="expected the layout dense, varlen or paged and got 'jagged'"):
        attention(problem, query, key, value, None, 1.0, None)


def test_shapes_alone_are_enough_for_fake_and_meta_tensors() -> None:
    tensors = qkv(2, 4, 2, 3, 5, 8, 6, torch.bfloat16)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors]
        results = call(*fake, is_causal=True)
    for out, lse in (results, call(*(t.to("meta") for t in tensors), is_causal=True)):
        assert (tuple(out.shape), out.dtype) == ((2, 4, 3, 6), torch.bfloat16)
        assert (tuple(lse.shape), lse.dtype) == ((2, 4, 3), torch.float32)
