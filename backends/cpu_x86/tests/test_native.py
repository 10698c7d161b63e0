"""The native attention kernels against a float64 oracle, on every instruction set this machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, INF, LIBRARY, OPS, SETS, check, inputs, oracle, respread, run, threads


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Problems this small run faster on one thread; tests of threads set their own count."""
    with threads(1):
        yield


@pytest.fixture(params=SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = {dtype: LIBRARY.get_isa(dtype) for dtype in DTYPES}
    for dtype in DTYPES:
        LIBRARY.set_isa(dtype, request.param)
    yield request.param
    for dtype, name in before.items():
        LIBRARY.set_isa(dtype, name)


SHAPES = [
    # batch, heads, kv heads, L, S, E, Ev
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 1, 5, 7, 8, 8),
    (1, 5, 5, 33, 31, 33, 33),
    (1, 7, 1, 61, 127, 72, 40),
    (2, 2, 2, 32, 120, 64, 64),
    (1, 2, 2, 31, 119, 64, 64),
    (1, 2, 2, 33, 121, 64, 65),
    (1, 2, 1, 129, 241, 96, 96),
    (1, 2, 2, 128, 240, 128, 128),
    (1, 1, 1, 40, 250, 192, 128),
    (1, 2, 1, 70, 130, 576, 512),
    (1, 8, 1, 1, 300, 128, 128),
    (1, 8, 1, 2, 65, 80, 17),
    (2, 4, 4, 1, 1100, 64, 64),
    (1, 6, 2, 3, 2048, 40, 24),
    (1, 3, 3, 20, 1500, 16, 16),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_is_as_exact_as_plain_torch(
    isa: str, shape: tuple[int, ...], causal: bool, dtype: torch.dtype
) -> None:
    batch, heads, kv_heads, length, keys, e, ev = shape
    check(*inputs(batch, heads, kv_heads, length, keys, e, ev, dtype), causal)


@pytest.mark.parametrize("group", [1, 3, 5, 7, 8])
@pytest.mark.parametrize("length", [1, 2, 9, 50])
def test_grouped_heads_equal_repeated_keys(isa: str, group: int, length: int) -> None:
    query, key, value = inputs(2, 2 * group, 2, length, 77, 24, 24, torch.float32)
    grouped = OPS.attention(query, key, value, True, 0.3)
    check(query, key, value, True)
    repeated = OPS.attention(
        query, key.repeat_interleave(group, 1), value.repeat_interleave(group, 1), True, 0.3
    )
    torch.testing.assert_close(grouped, repeated, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "keys"), [(0, 5), (5, 0), (0, 0), (3, 0)])
def test_no_keys_give_zero_and_minus_infinity_lse(
    isa: str, length: int, keys: int, dtype: torch.dtype
) -> None:
    out, lse = run(*inputs(2, 4, 2, length, keys, 16, 8, dtype), True, 0.25)
    assert out.shape == (2, 4, length, 8) and lse.shape == (2, 4, length)
    assert torch.equal(out, torch.zeros_like(out)) and lse.isneginf().all()


def test_an_empty_batch_gives_an_empty_output(isa: str) -> None:
    out, lse = run(*inputs(0, 4, 2, 3, 5, 16, 8, torch.float32), False, 0.25)
    assert out.shape == (0, 4, 3, 8) and lse.shape == (0, 4, 3)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["swapped", "sliced", "every_second", "columns"])
@pytest.mark.parametrize("length", [2, 40])
def test_strides_do_not_change_a_bit(isa: str, how: str, length: int, dtype: torch.dtype) -> None:
    tensors = inputs(2, 4, 2, length, 150, 33, 48, dtype)
    expected = OPS.attention(*tensors, True, 0.2)
    assert torch.equal(OPS.attention(*(respread(x, how) for x in tensors), True, 0.2), expected)


def test_expanded_keys_are_read_through_stride_zero(isa: str) -> None:
    query, key, value = inputs(3, 2, 2, 9, 50, 16, 16, torch.float32)
    shared_key, shared_value = key[:1].expand(3, -1, -1, -1), value[:1].expand(3, -1, -1, -1)
    expected = OPS.attention(query, shared_key.contiguous(), shared_value.contiguous(), False, 0.25)
    assert torch.equal(OPS.attention(query, shared_key, shared_value, False, 0.25), expected)
    check(query, key[:, :, :1].expand(-1, -1, 50, -1), value)


@pytest.mark.parametrize("kv_heads", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_query_heads_give_an_empty_output(isa: str, dtype: torch.dtype, kv_heads: int) -> None:
    out, lse = run(*inputs(2, 0, kv_heads, 3, 5, 16, 8, dtype), True, 0.25)
    assert out.shape == (2, 0, 3, 8) and lse.shape == (2, 0, 3)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "keys"), [(1, 5), (1, 2100), (9, 65), (130, 300), (3, 0), (0, 3)])
def test_values_of_size_zero_give_an_empty_output_and_the_same_lse(
    isa: str, length: int, keys: int, dtype: torch.dtype
) -> None:
    query, key, value = inputs(2, 4, 2, length, keys, 24, 8, dtype)
    keep = torch.rand(length, keys, generator=torch.Generator().manual_seed(2)) > 0.5
    for mask in (None, keep):
        out, lse = run(query, key, value[..., :0], True, 0.2, mask)
        assert out.shape == (2, 4, length, 0)
        assert torch.equal(lse, run(query, key, value, True, 0.2, mask)[1])


MASKS = [(2, 4, 1, 1), (1, 1, 30, 140), (2, 1, 1, 140), (1, 4, 30, 1), (2, 4, 30, 140)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float32", "same"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_masks_broadcast(isa: str, shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(shape, generator=generator) > 0.3
    bias = torch.randn(shape, generator=generator).masked_fill(~keep, -INF)
    mask = keep if kind == "bool" else bias.to(torch.float32 if kind == "float32" else dtype)
    for length in (30, 1):
        for causal in (False, True):
            part = mask if mask.shape[2] == 1 else mask[:, :, :length]
            check(*inputs(2, 4, 2, length, 140, 24, 24, dtype), causal, mask=part)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (140,), (30, 140), (4, 30, 140), (4, 1, 1)], ids=str)
def test_masks_of_fewer_dimensions_broadcast(isa: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(4)) > 0.3
    bias = torch.where(keep, 0.5, -INF)
    tensors = inputs(2, 4, 2, 30, 140, 24, 24, torch.float32)
    mask = keep if kind == torch.bool else bias.to(kind)
    check(*tensors, mask=mask)
    check(*tensors, True, mask=mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("length", [1, 40])
def test_a_mask_of_no_dimensions_hides_all_or_nothing(isa: str, kind: torch.dtype, length: int) -> None:
    tensors = inputs(1, 2, 2, length, 50, 16, 16, torch.float32)
    hidden = torch.tensor(False) if kind == torch.bool else torch.tensor(-INF)
    out, lse = run(*tensors, False, 0.25, hidden)
    assert not out.any() and lse.isneginf().all()
    shown = torch.tensor(True) if kind == torch.bool else torch.tensor(0.0)
    torch.testing.assert_close(run(*tensors, False, 0.25, shown), run(*tensors, False, 0.25))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mask_strides_do_not_change_a_bit(isa: str, kind: torch.dtype) -> None:
    tensors = inputs(1, 2, 2, 40, 130, 16, 16, torch.float32)
    keep = torch.rand(1, 2, 40, 130, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = keep if kind == torch.bool else torch.zeros(keep.shape).masked_fill(~keep, -INF).to(kind)
    expected = OPS.masked_attention(*tensors, mask, False, 0.25)
    for other in (mask.transpose(2, 3).contiguous().transpose(2, 3), torch.stack((mask, mask), -1)[..., 0]):
        assert torch.equal(OPS.masked_attention(*tensors, other, False, 0.25), expected)
    assert torch.equal(OPS.masked_attention(*tensors, mask[0, 0], False, 0.25)[:, 0], expected[:, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [2, 50])
def test_fully_masked_rows_give_zero_and_minus_infinity_lse(
    isa: str, length: int, dtype: torch.dtype
) -> None:
    query, key, value = inputs(1, 2, 2, length, 300, 16, 16, dtype)
    keep = torch.ones(1, 1, length, 300, dtype=torch.bool)
    keep[:, :, ::2] = False
    for mask in (keep, torch.zeros(keep.shape).masked_fill(~keep, -INF)):
        check(query, key, value, mask=mask)
        out, lse = run(query, key, value, False, 0.25, mask)
        assert (
            torch.equal(out[:, :, ::2], torch.zeros_like(out[:, :, ::2])) and lse[:, :, ::2].isneginf().all()
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [torch.nan, INF, -INF])
@pytest.mark.parametrize("length", [3, 200])
@pytest.mark.parametrize("kind", ["causal", "bool", "additive"])
def test_poison_in_masked_keys_never_reaches_the_output(
    isa: str, kind: str, length: int, poison: float, dtype: torch.dtype
) -> None:
    query, key, value = inputs(1, 2, 1, length, 201, 20, 24, dtype)
    keep = torch.rand(1, 2, length, 201, generator=torch.Generator().manual_seed(5)) > 0.5
    bad = torch.arange(201) % 7 == 3
    keep &= ~bad
    mask = {"causal": None, "bool": keep, "additive": torch.zeros(keep.shape).masked_fill(~keep, -INF)}[kind]
    if kind == "causal":
        bad = torch.arange(201) >= length - 1  # the last query may see the first bad key, nobody else may
    expected = run(query, key, value, kind == "causal", 0.2, mask)
    key[:, :, bad], value[:, :, bad] = poison, poison
    out, lse = run(query, key, value, kind == "causal", 0.2, mask)
    seen = length - 1 if kind == "causal" else length
    assert torch.equal(out[:, :, :seen], expected[0][:, :, :seen])
    assert torch.equal(lse[:, :, :seen], expected[1][:, :, :seen])
    if kind == "causal":
        assert not out[:, :, -1].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [1, 2, 5])
def test_nobody_sees_what_lies_behind_a_causal_limit_that_a_whole_panel_shares(
    isa: str, first: int, dtype: torch.dtype
) -> None:
    query, key, value = inputs(1, 32, 1, 7, 40, 16, 24, dtype)
    expected = OPS.attention(query, key, value, True, 0.25)
    value[:, :, first:] = torch.nan
    out = OPS.attention(query, key, value, True, 0.25)
    assert torch.equal(out[:, :, :first], expected[:, :, :first])
    assert out[:, :, first:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 60])
def test_nan_in_a_live_value_reaches_exactly_the_rows_that_see_it(
    isa: str, length: int, dtype: torch.dtype
) -> None:
    query, key, value = inputs(1, 1, 1, length, 90, 16, 16, dtype)
    value[0, 0, 70, 5] = torch.nan
    keep = torch.rand(1, 1, length, 90, generator=torch.Generator().manual_seed(6)) > 0.5
    out = OPS.masked_attention(query, key, value, keep, False, 0.25)
    expected, _ = oracle(query, key, value, False, 0.25, keep)
    assert torch.equal(out.isnan(), expected.isnan())
    assert OPS.attention(query, key, value, False, 0.25)[..., 5].isnan().all()


@pytest.mark.parametrize("length", [1, 40])
@pytest.mark.parametrize("bad", [INF, torch.nan])
def test_infinite_and_nan_biases_give_nan_in_their_rows_only(isa: str, length: int, bad: float) -> None:
    query, key, value = inputs(1, 1, 1, length, 50, 16, 16, torch.float32)
    mask = torch.zeros(1, 1, length, 50)
    mask[..., 0, 11] = bad
    out = OPS.masked_attention(query, key, value, mask, False, 0.25)
    assert out[..., 0, :].isnan().all() and out[..., 1:, :].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0, 100.0, 1e-30])
@pytest.mark.parametrize("length", [2, 40])
def test_any_scale_is_honoured(isa: str, scale: float, length: int, dtype: torch.dtype) -> None:
    tensors = inputs(1, 2, 2, length, 130, 16, 16, dtype)
    check(*tensors, True, scale)
    check(*tensors, False, scale, torch.randn(1, 1, length, 130, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("length", [1, 40])
def test_logits_of_ten_thousand_do_not_overflow(isa: str, length: int) -> None:
    query, key, value = inputs(1, 2, 2, length, 700, 64, 64, torch.float32)
    check(query * 40, key * 40, value, False, 1.0)
    mask = torch.full((1, 1, length, 700), -1e4)
    check(query, key, value, mask=mask)


def test_ones_stay_ones_and_one_key_is_copied(isa: str) -> None:
    query, key, value = inputs(1, 1, 1, 50, 333, 32, 32, torch.float32)
    torch.testing.assert_close(
        OPS.attention(query, key, torch.ones_like(value), False, 1.0),
        torch.ones(1, 1, 50, 32),
        rtol=5e-7,
        atol=0,
    )
    assert torch.equal(
        OPS.attention(query, key[:, :, :1], value[:, :, :1], False, 1.0), value[:, :, :1].expand(1, 1, 50, 32)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 4, 4, 300, 300, 64, 64), (1, 8, 1, 1, 3000, 64, 64), (2, 2, 1, 20, 2000, 32, 32)]
)
def test_results_are_bitwise_equal_for_every_thread_count(
    isa: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, heads, kv_heads, length, keys, e, ev = shape
    tensors = inputs(batch, heads, kv_heads, length, keys, e, ev, dtype)
    results = []
    for count in (1, 2, 3, 2):
        with threads(count):
            results.append(run(*tensors, True, 0.1))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_batch_entries_do_not_depend_on_each_other(isa: str) -> None:
    tensors = inputs(4, 2, 2, 70, 130, 24, 24, torch.bfloat16)
    whole = OPS.attention(*tensors, True, 0.2)
    assert torch.equal(OPS.attention(*(x[2:3] for x in tensors), True, 0.2), whole[2:3])


@pytest.mark.sanitized
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_problem_matches_the_oracle(data: st.DataObject) -> None:
    size = st.integers(1, 70)
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 8))
    length, keys, e, ev = data.draw(size), data.draw(st.integers(1, 260)), data.draw(size), data.draw(size)
    dtype = data.draw(st.sampled_from(DTYPES))
    LIBRARY.set_isa(dtype, data.draw(st.sampled_from(SETS)))
    tensors = inputs(
        data.draw(st.integers(1, 2)), kv_heads * group, kv_heads, length, keys, e, ev, dtype, length
    )
    how = [data.draw(st.sampled_from(["none", "swapped", "sliced", "every_second"])) for _ in tensors]
    spread = [x if h == "none" else respread(x, h) for x, h in zip(tensors, how)]
    mask = None
    if data.draw(st.booleans()):
        shape = (
            1,
            data.draw(st.sampled_from([1, kv_heads * group])),
            data.draw(st.sampled_from([1, length])),
            keys,
        )
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(keys)) > data.draw(
            st.sampled_from([0.2, 0.9])
        )
    check(spread[0], spread[1], spread[2], data.draw(st.booleans()), mask=mask)
