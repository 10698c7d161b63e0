"""The portable Triton kernels of attention against the float64 oracle, under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import interpreted
import numpy as np
import oracle
import pytest
import torch
from attention_calls import BLOCK_FIELDS, INF, NAN, alibi, call, normal, plain, qkv, same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_reference_attention_layouts import packed, paginate, starts
from tolerance import assert_accurate
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from torchhal.portable import attention
from torchhal.portable.tiles import PLAIN, Tiles
from torchhal.reference.dropout import dropout_keep

FLOAT = torch.float32
SLOPES = torch.tensor([0.5, -0.25, 0.125, 1.0])
SPLIT = replace(PLAIN, programs=10**6)
"""As if no device were ever busy: keys are split wherever they may be."""


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that an oracle of loops can follow are worth splitting."""
    monkeypatch.setattr("torchhal.portable.attention.SHORTEST_SPLIT", 16)


def portable(*tensors: Tensor, tuning: Any = PLAIN, **rules: Any) -> tuple[Tensor, Tensor]:
    return call(*tensors, compute=interpreted.attention(tuning), **rules)


def close(result: tuple[Tensor, Tensor], expected: Any, tolerance: float = 2e-5) -> None:
    """Equal to float64 numbers within a few float32 roundings, and exactly where those are not finite."""
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(
            got.double(), torch.as_tensor(want), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def of_numbers(function: Any) -> Any:
    """A mask_mod for the oracle, which calls with numbers."""
    return lambda b, h, q, k: bool(function(*(torch.tensor(x) for x in (b, h, q, k))))


# ---------------------------------------------------------------------------- dense


def drawn_mask(kind: str | None, drawn: torch.Tensor) -> torch.Tensor | None:
    """A mask of a kind, by random numbers."""
    return {
        None: None,
        "boolean": drawn > -0.3,
        "additive": torch.where(drawn > 1, -INF, drawn).float(),
    }[kind]


@settings(max_examples=12, deadline=None)
@given(
    group=st.integers(1, 3), kv=st.integers(1, 2), rows=st.integers(0, 35), keys=st.integers(0, 40),
    e=st.sampled_from([1, 5, 16, 33]), ev=st.sampled_from([1, 7, 16, 40]), causal=st.booleans(),
    mask=st.sampled_from([None, "boolean", "additive"]), scale=st.sampled_from([0.3, -0.7, 0.0]),
    tuning=st.sampled_from([PLAIN, SPLIT]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_dense_problem_equals_the_oracle(
    group: int, kv: int, rows: int, keys: int, e: int, ev: int, causal: bool, mask: str | None, scale: float,
    tuning: Any, seed: int,
) -> None:  # fmt: skip
    tensors = qkv(2, kv * group, kv, rows, keys, e, ev, FLOAT, seed)
    drawn = normal(2, 1, rows, keys, seed=seed + 1)
    given_mask = drawn_mask(mask, drawn)
    result = portable(*tensors, tuning=tuning, mask=given_mask, is_causal=causal, scale=scale)
    close(result, oracle.attention(*tensors, mask=given_mask, is_causal=causal, scale=scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FLOAT], ids=str)
@pytest.mark.parametrize("rows", [1, 37], ids=["decode", "prefill"])
def test_each_type_is_as_accurate_as_plain_torch(rows: int, dtype: torch.dtype) -> None:
    tensors = qkv(1, 4, 2, rows, 45, 24, 16, dtype)
    scale = 24**-0.5
    out, lse = portable(*tensors, tuning=SPLIT)
    expected = oracle.attention(*tensors, scale=scale)
    baseline = plain(*tensors)
    assert_accurate(out, expected[0], baseline[0], what="out")
    assert_accurate(lse, expected[1], plain(*(t.float() for t in tensors))[1], what="lse")


def test_the_largest_head_sizes_are_served_by_padding() -> None:
    tensors = qkv(1, 1, 1, 2, 3, 576, 513, FLOAT)
    close(portable(*tensors), oracle.attention(*tensors, scale=576**-0.5))


def test_strides_and_broadcasting_change_no_bit() -> None:
    tensors = qkv(2, 4, 2, 9, 21, 16, 16, FLOAT)
    mask = normal(1, 4, 1, 21).float().expand(2, 4, 9, 21)
    before = portable(*tensors, mask=mask.contiguous())
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    wide = torch.full((2, 2, 21, 19), NAN)
    wide[..., 1:17] = tensors[2]
    same(portable(turned[0], turned[1], wide[..., 1:17], mask=mask), before)
    single = [t[:1].expand(t.shape) for t in tensors]
    same(portable(*single), portable(*(t.contiguous() for t in single)))


def test_a_row_that_sees_no_key_gives_zero_and_minus_infinity() -> None:
    tensors = qkv(1, 2, 2, 19, 20, 16, 16, FLOAT)
    mask = torch.ones(19, 20, dtype=torch.bool)
    mask[::3] = False
    for hidden in (mask, torch.where(mask, 0.0, -INF)):
        out, lse = portable(*tensors, mask=hidden)
        assert torch.equal(out[:, :, ::3], torch.zeros(1, 2, 7, 16))
        assert bool((lse[:, :, ::3] == -INF).all())
        assert bool(lse[:, :, 1::3].isfinite().all())


HIDERS: dict[str, dict[str, Any]] = {
    "is_causal": {"is_causal": True},
    "boolean mask": {"mask": torch.ones(20, 20, dtype=torch.bool).tril()},
    "additive mask": {"mask": torch.full((20, 20), -INF).triu(1)},
    "score_mod": {"score_mod": lambda s, b, h, q, k: torch.where(k <= q, s, -INF)},
}


@pytest.mark.parametrize("how", HIDERS)
@pytest.mark.parametrize("tuning", [PLAIN, SPLIT], ids=["whole", "split"])
def test_what_a_hidden_key_holds_reaches_exactly_the_rows_that_see_it(how: str, tuning: Any) -> None:
    tensors = qkv(1, 2, 1, 20, 20, 16, 16, FLOAT)
    clean = oracle.attention(*tensors, scale=0.25, is_causal=True)
    tensors[2][0, 0, 11, 3], tensors[2][0, 0, 13, 4], tensors[2][0, 0, 15, 4] = NAN, INF, -INF
    tensors[1][0, 0, 18] = NAN
    out, lse = portable(*tensors, scale=0.25, tuning=tuning, **HIDERS[how])
    expected = torch.as_tensor(clean[0]).clone()
    expected[..., 11:, 3], expected[..., 13:, 4], expected[..., 15:, 4] = NAN, INF, NAN
    expected[..., 18:, :] = NAN
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(
        lse[..., :18].double(), torch.as_tensor(clean[1])[..., :18], rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("tuning", [PLAIN, SPLIT], ids=["whole", "split"])
@pytest.mark.parametrize("p", [0.4, 1.0])
def test_dropout_keeps_what_the_reference_keeps(p: float, tuning: Any) -> None:
    tensors = qkv(2, 2, 1, 18, 21, 16, 16, FLOAT)
    seed = torch.tensor(0x7234_5678_9ABC_DEF1)
    axes = [
        torch.arange(n).view([-1 if d == i else 1 for d in range(4)]) for i, n in enumerate((2, 2, 18, 21))
    ]
    kept = dropout_keep(seed, *axes, p).double().numpy() / (1 - p if p < 1 else 1)
    result = portable(*tensors, scale=0.25, dropout_p=p, seed=seed, tuning=tuning)
    close(result, oracle.attention(*tensors, scale=0.25, factor=kept))


def test_splitting_the_keys_gives_the_same_bits_every_time_and_the_same_numbers_as_not_splitting() -> None:
    tensors = qkv(2, 4, 2, 3, 90, 16, 16, FLOAT)
    split = portable(*tensors, tuning=SPLIT)
    same(portable(*tensors, tuning=SPLIT), split)
    torch.testing.assert_close(split, portable(*tensors), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- functions and BlockMasks


def test_functions_see_the_query_head_and_positions_of_their_own_row() -> None:
    for rows, tuning in ((21, PLAIN), (3, SPLIT)):
        tensors = qkv(2, 4, 2, rows, 37, 16, 16, FLOAT)
        mods = {"score_mod": alibi(SLOPES), "mask_mod": lambda b, h, q, k: (k + h + b) % 3 != 0}
        result = portable(*tensors, scale=0.25, tuning=tuning, **mods)
        truth = {"score_mod": alibi(SLOPES.double().numpy()), "mask_mod": mods["mask_mod"]}
        close(result, oracle.attention(*tensors, scale=0.25, **truth))


def blocks(
    function: Any, rows: int, keys: int, size: int | tuple[int, int], heads: int | None = None
) -> dict[str, Any]:
    made = create_block_mask(function, None, heads, rows, keys, device="cpu", BLOCK_SIZE=size)
    return {
        "mask_mod": function,
        "block_size": made.BLOCK_SIZE,
        **{n: getattr(made, n) for n in BLOCK_FIELDS},
    }


@pytest.mark.parametrize(
    ("rows", "keys", "size"), [(64, 64, 16), (50, 61, (24, 20)), (33, 70, (8, 32)), (3, 40, 128)]
)
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_mask_hides_what_its_function_hides(rows: int, keys: int, size: Any, causal: bool) -> None:
    tensors = qkv(1, 2, 1, rows, keys, 16, 16, FLOAT)

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q + 9 * h) & (q - k < 17)

    result = portable(*tensors, is_causal=causal, **blocks(window, rows, keys, size, heads=2))
    close(result, oracle.attention(*tensors, scale=0.25, is_causal=causal, mask_mod=of_numbers(window)))


def test_full_blocks_are_not_asked_and_blocks_that_are_not_listed_are_not_read() -> None:
    tensors = qkv(1, 1, 1, 32, 32, 16, 16, FLOAT)
    rules = blocks(lambda b, h, q, k: k < 16, 32, 32, 16)
    assert rules["kv_num_blocks"].sum() == 0
    tensors[1][:, :, 16:], tensors[2][:, :, 16:] = NAN, INF
    rules["mask_mod"] = lambda b, h, q, k: k < 0
    out, _ = portable(*tensors, **rules)
    close(
        (out,), (oracle.attention(*(t[:, :, :16] if i else t for i, t in enumerate(tensors)), scale=0.25)[0],)
    )


def test_an_index_out_of_range_is_clamped_where_a_mask_hides_the_pair() -> None:
    tensors = qkv(1, 1, 1, 5, 9, 16, 16, FLOAT)
    bias = torch.tensor([1.0, 2.0, 3.0])
    mods = {"score_mod": lambda s, b, h, q, k: s + bias[k], "mask_mod": lambda b, h, q, k: k < 3}
    truth = {"score_mod": lambda s, b, h, q, k: s + float(bias[k]), "mask_mod": mods["mask_mod"]}
    close(portable(*tensors, **mods), oracle.attention(*tensors, scale=0.25, **truth))
    empty = torch.empty(0)
    out, _ = portable(
        *tensors, score_mod=lambda s, b, h, q, k: s + empty[k], mask_mod=lambda b, h, q, k: k < 0
    )
    assert torch.equal(out, torch.zeros_like(out))


# ---------------------------------------------------------------------------- packed and paged sequences


def test_each_packed_sequence_is_attention_of_its_own() -> None:
    rows, keys = [3, 0, 37, 17, 1], [5, 6, 40, 0, 33]
    tensors = [t.float() for t in packed(rows, keys)]
    q, k = starts(rows), starts(keys)
    rules: dict[str, Any] = {"mask_mod": lambda b, h, q, k: k != b, "is_causal": True, "scale": 0.5}
    out, lse = portable(
        *tensors, layout="varlen", cu_seqlens_q=q, cu_seqlens_k=k, score_mod=alibi(SLOPES), **rules
    )
    for b in range(len(rows)):
        one, two = slice(q[b], q[b + 1]), slice(k[b], k[b + 1])
        parts = [t[s].transpose(0, 1)[None] for t, s in zip(tensors, (one, two, two), strict=True)]
        expected = oracle.attention(*parts, score_mod=alibi(SLOPES.double().numpy()), first_batch=b, **rules)
        close((out[one].transpose(0, 1), lse[one].T), (expected[0][0], expected[1][0]))


def test_a_neighbour_full_of_nan_changes_no_bit_of_a_packed_sequence() -> None:
    tensors = [t.float() for t in packed([3, 4], [5, 6])]
    rules = {"layout": "varlen", "cu_seqlens_q": starts([3, 4]), "cu_seqlens_k": starts([5, 6])}
    clean = portable(*tensors, **rules)
    tensors[1][5:], tensors[2][5:] = NAN, INF
    poisoned = portable(*tensors, **rules)
    same((poisoned[0][:3], poisoned[1][:3]), (clean[0][:3], clean[1][:3]))


@pytest.mark.parametrize(("rows", "page"), [(1, 4), (3, 16), (40, 16), (1, 32)])
@pytest.mark.parametrize("tuning", [PLAIN, SPLIT], ids=["whole", "split"])
def test_pages_hold_what_the_dense_layout_holds_wherever_they_lie(rows: int, page: int, tuning: Any) -> None:
    lengths = [70, 33, 0 if rows == 1 else 41]
    query, key, value = qkv(3, 4, 2, rows, 72, 16, 8, FLOAT)
    count = -(-72 // page)
    order = torch.randperm(3 * count + 2, generator=torch.Generator().manual_seed(3)).to(torch.int32)
    table = order[: 3 * count].view(3, count)
    pages = [paginate(t, lengths, table, len(order), page) for t in (key, value)]
    rules: dict[str, Any] = {"is_causal": True, "scale": 0.25}
    out, lse = portable(
        query, *pages, layout="paged", page_table=table, seq_lens=torch.tensor(lengths, dtype=torch.int32),
        score_mod=alibi(SLOPES), tuning=tuning, **rules,
    )  # fmt: skip
    for b, length in enumerate(lengths):
        parts = (query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length])
        truth = {"score_mod": alibi(SLOPES.double().numpy()), "first_batch": b, "first_query": length - rows}
        close((out[b : b + 1], lse[b : b + 1]), oracle.attention(*parts, **truth, **rules))


def test_a_block_mask_over_pages_counts_in_positions() -> None:
    lengths, rows, page = [37, 21], 7, 8
    query, key, value = qkv(2, 2, 2, rows, 40, 16, 16, FLOAT)
    table = torch.arange(10, dtype=torch.int32).view(2, 5)
    pages = [paginate(t, lengths, table, 10, page) for t in (key, value)]

    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (q - k < 6)

    rules = blocks(window, 40, 40, (16, 8))
    out, lse = portable(
        query,
        *pages,
        layout="paged",
        page_table=table,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        **rules,
    )
    for b, length in enumerate(lengths):
        parts = (query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length])
        truth = oracle.attention(*parts, scale=0.25, mask_mod=of_numbers(window), first_query=length - rows)
        close((out[b : b + 1], lse[b : b + 1]), truth)


def test_rows_before_the_first_position_see_nothing_under_a_block_mask() -> None:
    query, key, value = qkv(1, 1, 1, 7, 8, 16, 16, FLOAT)
    rules = blocks(lambda b, h, q, k: k >= 0, 8, 8, (8, 8))
    out, lse = portable(
        query, key, value, layout="paged", page_table=torch.zeros(1, 1, dtype=torch.int32),
        seq_lens=torch.tensor([3], dtype=torch.int32), **rules,
    )  # fmt: skip
    assert torch.equal(out[:, :, :4], torch.zeros(1, 1, 4, 16))
    assert bool((lse[:, :, :4] == -INF).all())
    seen = oracle.attention(query[:, :, 4:], key[:, :, :3], value[:, :, :3], scale=0.25)
    close((out[:, :, 4:], lse[:, :, 4:]), seen)


def test_page_numbers_that_do_not_exist_are_read_from_pages_that_do() -> None:
    query, key, value = qkv(1, 1, 1, 1, 8, 16, 16, FLOAT)
    rules = {"layout": "paged", "seq_lens": torch.tensor([99], dtype=torch.int32)}
    wild = torch.tensor([[2**30]], dtype=torch.int32)
    out, _ = portable(query, key, value, page_table=wild, **rules)
    close((out,), (oracle.attention(query, key, value, scale=0.25)[0],))


def test_tiles_that_a_device_has_no_room_for_are_replaced_by_smaller_ones_and_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from triton.runtime.errors import OutOfResources

    tried = []
    real = attention.Launcher.__call__

    def launch(self: attention.Launcher, tiles: Tiles, *arguments: Any) -> None:
        tried.append((tiles.rows, tiles.keys, tiles.stages))
        if tiles.rows * tiles.keys > 32 * 16:
            raise OutOfResources(999, 99, "shared memory")
        real(self, tiles, *arguments)

    monkeypatch.setattr(attention.Launcher, "__call__", launch)
    tuning = replace(PLAIN, prefill=lambda problem: Tiles(64, 32, stages=2))
    compute = interpreted.attention(tuning)
    for rows in (70, 71):  # for a call of the same length would be replayed
        tensors = qkv(1, 1, 1, rows, 20, 16, 16, FLOAT)
        close(call(*tensors, compute=compute), oracle.attention(*tensors, scale=0.25))
    assert tried == [(64, 32, 2), (64, 32, 1), (64, 16, 1), (32, 16, 1), (32, 16, 1)]


def test_a_device_without_room_for_the_smallest_tiles_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    def launch(*arguments: Any) -> None:
        raise OutOfResources(999, 99, "shared memory")

    monkeypatch.setattr(attention.Launcher, "__call__", launch)
    with pytest.raises(OutOfResources, match="Required: 999, Hardware limit: 99"):
        portable(*qkv(1, 1, 1, 70, 20, 16, 16, FLOAT))


def test_tiles_of_every_size_give_the_same_numbers() -> None:
    tensors = qkv(1, 2, 1, 70, 90, 16, 16, FLOAT)
    expected = oracle.attention(*tensors, scale=0.25, is_causal=True)
    sizes = (Tiles(16, 16), Tiles(64, 32), Tiles(32, 128), Tiles(128, 64))
    for tiles in (*sizes, Tiles(64, 32, descriptors=True)):
        close(
            portable(*tensors, is_causal=True, tuning=replace(PLAIN, prefill=lambda problem, t=tiles: t)),
            expected,
        )
    assert np.isfinite(expected[1]).all()
