"""Variable-length and paged attention, and BlockMasks, against the oracle and the dense layout."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from attention_calls import BLOCK_FIELDS, INF, NAN, alibi, call, close, normal, qkv, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from torchhal.errors import InvalidProblem

LENGTHS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), min_size=0, max_size=4)


def starts(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths, dtype=int)], dtype=torch.int32)


def packed(
    rows: Sequence[int], keys: Sequence[int], hq: int = 4, hkv: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv(1, hq, hkv, sum(rows), sum(keys), 8, 5)
    return query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1)


def varlen(rows: Sequence[int], keys: Sequence[int], tensors: Any, **rules: Any) -> tuple[Tensor, Tensor]:
    return call(*tensors, layout="varlen", cu_seqlens_q=starts(rows), cu_seqlens_k=starts(keys), **rules)


# ---------------------------------------------------------------------------- variable length


@settings(max_examples=25, deadline=None)
@given(LENGTHS, st.booleans(), st.booleans())
def test_each_packed_sequence_is_attention_of_its_own(
    lengths: list[tuple[int, int]], is_causal: bool, with_mods: bool
) -> None:
    rows, keys = [r for r, _ in lengths], [k for _, k in lengths]
    tensors = packed(rows, keys)
    slopes = torch.linspace(-1, 1, 4, dtype=torch.float64)
    mods: dict[str, Any] = (
        {"score_mod": alibi(slopes), "mask_mod": lambda b, h, q, k: k != b} if with_mods else {}
    )
    out, lse = varlen(rows, keys, tensors, is_causal=is_causal, scale=0.5, **mods)
    assert (tuple(out.shape), tuple(lse.shape)) == ((sum(rows), 4, 5), (sum(rows), 4))
    mods = {**mods, "score_mod": alibi(slopes.numpy())} if with_mods else {}
    q, k = starts(rows).tolist(), starts(keys).tolist()
    for b in range(len(rows)):
        one, two = slice(q[b], q[b + 1]), slice(k[b], k[b + 1])
        parts = [t[s].transpose(0, 1)[None] for t, s in zip(tensors, (one, two, two), strict=True)]
        expected = oracle.attention(*parts, is_causal=is_causal, scale=0.5, first_batch=b, **mods)
        close((out[one].transpose(0, 1), lse[one].T), (expected[0][0], expected[1][0]))


def test_one_packed_sequence_equals_dense_bit_for_bit() -> None:
    tensors = packed([7], [9])
    dense = call(*(t.transpose(0, 1)[None] for t in tensors), is_causal=True)
    out, lse = varlen([7], [9], tensors, is_causal=True)
    same((out, lse), (dense[0][0].transpose(0, 1), dense[1][0].T))


def test_a_neighbour_full_of_nan_leaves_a_packed_sequence_alone() -> None:
    tensors = packed([3, 4], [5, 6])
    clean = varlen([3, 4], [5, 6], tensors)
    tensors[1][5:], tensors[2][5:] = NAN, INF
    poisoned = varlen([3, 4], [5, 6], tensors)
    same((poisoned[0][:3], poisoned[1][:3]), (clean[0][:3], clean[1][:3]))


def test_packed_gradients_are_those_of_the_formula() -> None:
    inputs = tuple(t.detach().requires_grad_() for t in packed([2, 0, 1], [1, 3, 0]))
    assert torch.autograd.gradcheck(lambda *t: varlen([2, 0, 1], [1, 3, 0], t)[0], inputs)


def test_a_mask_over_packed_sequences_is_cut_to_each_length() -> None:
    tensors = packed([3, 2], [4, 5])
    mask = normal(2, 1, 3, 5)
    out, _ = varlen([3, 2], [4, 5], tensors, mask=mask, scale=1.0)
    parts = [
        t[s].transpose(0, 1)[None]
        for t, s in zip(tensors, (slice(3, 5), slice(4, 9), slice(4, 9)), strict=True)
    ]
    expected, _ = oracle.attention(*parts, scale=1.0, mask=mask[1:, :, :2])
    np.testing.assert_allclose(out[3:].transpose(0, 1).numpy(), expected[0], rtol=1e-11)
    with pytest.raises(InvalidProblem, match=r"sequence 0 needs 4 along S and it has \(2, 1, 3, 3\)"):
        varlen([3, 2], [4, 5], tensors, mask=mask[..., :3])


@pytest.mark.parametrize(("offsets", "message"), [
    ([1, 3, 5], "cu_seqlens_q must start at 0; it starts at 1"),
    ([0, 4, 3, 5], "cu_seqlens_q must not decrease; sequence 1 goes from 4 to 3"),
    ([0, 3], "cu_seqlens_q must end at the number of tokens, 5; it ends at 3"),
    ([[0, 5]], r"cu_seqlens_q must have shape \(B \+ 1,\), the running sum of B lengths; got shape \(1, 2\)"),
    ([0, 5], "cu_seqlens_q and cu_seqlens_k must have one length; got those of 1 and 2 sequences"),
    (None, "variable-length attention needs cu_seqlens_q and cu_seqlens_k, and at least one is absent"),
])  # fmt: skip
def test_contradictory_cumulative_lengths_are_refused(offsets: Any, message: str) -> None:
    given = None if offsets is None else torch.tensor(offsets, dtype=torch.int32)
    with pytest.raises(InvalidProblem, match=message):
        call(*packed([5], [6]), layout="varlen", cu_seqlens_q=given, cu_seqlens_k=starts([2, 4]))


# ---------------------------------------------------------------------------- pages


def paginate(dense: Tensor, lengths: Sequence[int], table: Tensor, count: int, size: int) -> Tensor:
    """Pages (count, H, size, E) that hold ``dense`` (B, H, S, E) at the table's places, NaN wherever else."""
    pages = torch.full((count, dense.shape[1], size, dense.shape[3]), NAN, dtype=dense.dtype)
    for b, length in enumerate(lengths):
        for position in range(length):
            pages[int(table[b, position // size]), :, position % size] = dense[b, :, position]
    return pages


def paged(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], size: int, seed: int, **rules: Any
) -> Any:
    columns = -(-max(*lengths, 1) // size) + 1
    order = torch.randperm(len(lengths) * columns, generator=torch.Generator().manual_seed(seed))
    table = order.view(len(lengths), columns).to(torch.int32)
    keys, values = (paginate(t, lengths, table, table.numel(), size) for t in (key, value))
    for b, length in enumerate(lengths):
        table[b, -(-length // size) :] = 10**9
    layout: dict[str, Any] = {"page_table": table, "seq_lens": torch.tensor(lengths, dtype=torch.int32)}
    return call(query, keys, values, layout="paged", **layout, **rules)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=3),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
)
def test_paged_keys_are_dense_keys_up_to_the_length_and_queries_are_the_newest_tokens(
    lengths: list[int], size: int, rows: int, is_causal: bool, with_mods: bool
) -> None:
    query, key, value = qkv(len(lengths), 4, 2, rows, max(lengths), 8, 5)
    slopes = torch.linspace(-1, 1, 4, dtype=torch.float64)
    mods: dict[str, Any] = (
        {"score_mod": alibi(slopes), "mask_mod": lambda b, h, q, k: q - k < 4} if with_mods else {}
    )
    result = paged(query, key, value, lengths, size, 0, is_causal=is_causal, scale=0.5, **mods)
    mods = {**mods, "score_mod": alibi(slopes.numpy())} if with_mods else {}
    for b, length in enumerate(lengths):
        place: dict[str, Any] = {"first_batch": b, "first_query": length - rows}
        one, keys, values = query[b : b + 1], key[b : b + 1, :, :length], value[b : b + 1, :, :length]
        expected = oracle.attention(one, keys, values, is_causal=is_causal, scale=0.5, **place, **mods)
        close((result[0][b], result[1][b]), (expected[0][0], expected[1][0]))


def test_permuting_the_pages_changes_nothing_at_all() -> None:
    query, key, value = qkv(2, 4, 2, 2, 11, 8, 8, torch.float32)
    first = paged(query, key, value, [11, 5], 4, seed=1, is_causal=True)
    same(first, paged(query, key, value, [11, 5], 4, seed=2, is_causal=True))
    dense = call(query[:1], key[:1], value[:1], mask=torch.ones(2, 11, dtype=torch.bool).tril(9))
    same((first[0][:1], first[1][:1]), dense)


def test_unused_slots_get_no_gradient_and_spoil_none() -> None:
    query, pages = (normal(*shape) for shape in ((1, 2, 1, 4), (2, 1, 4, 4)))
    pages[1, :, 1:] = NAN
    layout: dict[str, Any] = {
        "page_table": torch.tensor([[0, 1]], dtype=torch.int32),
        "seq_lens": torch.tensor([5]),
    }
    inputs = [query.requires_grad_(), pages.clone().requires_grad_(), pages.clone().requires_grad_()]
    torch.autograd.backward(call(*inputs, layout="paged", **layout)[0].sum())
    for pool in inputs[1:]:
        assert pool.grad is not None and (pool.grad[1, :, 1:] == 0).all() and (pool.grad[0] != 0).any()
    assert query.grad is not None and query.grad.isfinite().all()


@pytest.mark.parametrize(("table", "lengths", "message"), [
    ([[0, 3]], [6], r"is 3 and seq_lens\[0\] = 6 uses it; the cache has 3 pages, numbered from 0"),
    ([[-1, 0]], [1], r"page_table\[0, 0\] is -1"),
    ([[0, 1]], [9], r"seq_lens\[0\] is 9; page_table's 2 pages of 4 hold 0 to 8 keys"),
    ([[0, 1]], [-1], r"seq_lens\[0\] is -1"),
    ([0, 1], [1], r"page_table must have shape \(B, max_pages\) with B = 1 as in query; got \(2,\)"),
    ([[0, 1]], [[1]], r"seq_lens must have shape \(B,\) with B = 1 as in query; got \(1, 1\)"),
    (None, [1], "paged attention needs page_table and seq_lens, and at least one is absent"),
])  # fmt: skip
def test_contradictory_pages_are_refused(table: Any, lengths: Any, message: str) -> None:
    query, pages = torch.zeros(1, 2, 1, 4), torch.zeros(3, 1, 4, 4)
    given = None if table is None else torch.tensor(table, dtype=torch.int32)
    with pytest.raises(InvalidProblem, match=message):
        call(query, pages, pages, layout="paged", page_table=given, seq_lens=torch.tensor(lengths))


def test_shapes_alone_are_enough_in_every_layout() -> None:
    with FakeTensorMode():
        out, lse = varlen([3, 2], [4, 5], packed([3, 2], [4, 5]))
        query, pages, table = (
            torch.zeros(2, 4, 1, 8),
            torch.zeros(5, 2, 4, 8),
            torch.zeros(2, 3, dtype=torch.int32),
        )
        layout: dict[str, Any] = {"page_table": table, "seq_lens": torch.zeros(2, dtype=torch.int32)}
        paged_out, paged_lse = call(query, pages, pages[..., :6], layout="paged", **layout)
    assert (tuple(out.shape), tuple(lse.shape)) == ((5, 4, 5), (5, 4))
    assert (tuple(paged_out.shape), tuple(paged_lse.shape)) == ((2, 4, 1, 6), (2, 4, 1))


# ---------------------------------------------------------------------------- BlockMask


def blocks(mask: BlockMask, **replacements: Tensor | None) -> dict[str, Any]:
    fields: dict[str, Any] = {name: getattr(mask, name) for name in BLOCK_FIELDS}
    return {"block_size": mask.BLOCK_SIZE, **fields, **replacements}


def window(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q >= k) & (q - k < 9 + 3 * h + b)


@pytest.mark.parametrize("sizes", [(None, None), (2, None), (None, 6), (2, 6)])
@pytest.mark.parametrize("separate", [True, False])
def test_a_block_mask_means_its_mask_mod(sizes: tuple[int | None, int | None], separate: bool) -> None:
    query, key, value = qkv(2, 6, 2, 21, 19, 8, 8)

    def function(b: Any, h: Any, q: Any, k: Any) -> Any:
        return window(b if sizes[0] else 0, h if sizes[1] else 0, q, k)

    together = {} if separate else {"separate_full_blocks": False}
    if not together.keys() <= inspect.signature(create_block_mask).parameters.keys():
        pytest.skip("create_block_mask takes separate_full_blocks since torch 2.13")
    mask = create_block_mask(function, *sizes, 21, 19, "cpu", (4, 3), **together)
    result = call(query, key, value, mask_mod=function, **blocks(mask))
    same(result, call(query, key, value, mask_mod=function))
    close(result, oracle.attention(query, key, value, scale=8**-0.5, mask_mod=function))


def test_full_blocks_do_not_ask_the_mask_mod_and_unlisted_blocks_are_hidden_whatever_it_says() -> None:
    query, key, value = qkv(1, 1, 1, 4, 6, 8, 8)
    lists: dict[str, Any] = {
        "kv_num_blocks": torch.tensor([[[1, 0]]], dtype=torch.int32),
        "kv_indices": torch.tensor([[[[2, -7, 99], [0, 1, 2]]]], dtype=torch.int32),
        "full_kv_num_blocks": torch.tensor([[[1, 1]]], dtype=torch.int32),
        "full_kv_indices": torch.tensor([[[[0, 1, 2], [1, 0, 2]]]], dtype=torch.int32),
    }
    listed = {(0, 0): "full", (0, 2): "partial", (1, 1): "full"}

    def visible(b: int, h: int, q: int, k: int) -> bool:
        kind = listed.get((q // 2, k // 2))
        return kind == "full" or (kind == "partial" and k % 2 == 1)

    result = call(query, key, value, mask_mod=lambda b, h, q, k: k % 2 == 1, block_size=(2, 2), **lists)
    close(result, oracle.attention(query, key, value, scale=8**-0.5, visible=visible))


def test_a_hidden_block_hides_nan_and_an_empty_row_of_blocks_gives_zero() -> None:
    query, key, value = qkv(1, 2, 1, 8, 8, 4, 4)
    mask = create_block_mask(lambda b, h, q, k: (q // 4 == 1) & (k < 4), None, None, 8, 8, "cpu", 4)
    clean = call(query, key, value, **blocks(mask), mask_mod=mask.mask_mod)
    key[:, :, 4:], value[:, :, 4:] = NAN, INF
    out, lse = call(query, key, value, **blocks(mask), mask_mod=mask.mask_mod)
    same((out, lse), clean)
    assert (out[:, :, :4] == 0).all() and (lse[:, :, :4] == -INF).all()


def test_block_masks_count_blocks_within_each_packed_or_paged_sequence() -> None:
    mask = create_block_mask(window, 2, 4, 12, 12, "cpu", (4, 3))
    rules = {**blocks(mask), "mask_mod": window}
    tensors = packed([5, 7], [6, 8])
    same(varlen([5, 7], [6, 8], tensors, **rules), varlen([5, 7], [6, 8], tensors, mask_mod=window))
    query, key, value = qkv(2, 4, 2, 2, 11, 8, 8)
    same(
        paged(query, key, value, [11, 6], 4, 0, **rules),
        paged(query, key, value, [11, 6], 4, 0, mask_mod=window),
    )


def test_rows_before_position_0_see_no_key_under_a_block_mask() -> None:
    query, key, value = qkv(1, 2, 1, 3, 2, 8, 8)
    everything = create_block_mask(lambda b, h, q, k: k >= 0, None, None, 8, 8, "cpu", 4)
    out, lse = paged(query, key, value, [2], 4, 0, **blocks(everything))
    assert (out[:, :, 0] == 0).all() and (lse[:, :, 0] == -INF).all()
    assert (out[:, :, 1:] != 0).all() and lse[:, :, 1:].isfinite().all()


def test_a_block_mask_that_does_not_fit_is_refused() -> None:
    query, key, value = qkv(2, 2, 2, 9, 8, 4, 4)
    mask = create_block_mask(window, None, None, 8, 8, "cpu", 4)
    with pytest.raises(InvalidProblem, match="must cover every query position, 9; it has 2 blocks of 4 rows"):
        call(query, key, value, mask_mod=window, **blocks(mask))
    with pytest.raises(
        InvalidProblem, match=r"needs problem.block_size, \(query rows, keys\) of a block; it is None"
    ):
        call(query[:, :, :8], key, value, mask_mod=window, **{**blocks(mask), "block_size": None})
    mask = create_block_mask(window, 2, 3, 8, 8, "cpu", 4)
    with pytest.raises(
        InvalidProblem, match="must be for 1 or 2 sequences and 1 or 2 query heads; it is for 2 and 3"
    ):
        call(query[:, :, :8], key, value, mask_mod=window, **blocks(mask))
