"""Gradients of the portable Triton kernels against autograd through a float64 evaluation, under Triton's interpreter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import interpreted
import numpy as np
import pytest
import torch
from attention_calls import INF, NAN, alibi, call, normal, qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from test_portable_attention import SLOPES, blocks, drawn_mask
from test_reference_attention_layouts import packed, paginate, starts
from tolerance import assert_accurate
from torch import Tensor

from torchhal.errors import InvalidProblem, Unsupported
from torchhal.portable import attention
from torchhal.portable.tiles import PLAIN, Tiles, Tuning
from torchhal.problems import AttentionProblem
from torchhal.reference.dropout import dropout_keep

FLOAT = torch.float32
BACKWARD = frozenset({"backward"})


# ---------------------------------------------------------------------------- the oracle


@dataclass(frozen=True)
class Rules:
    """What is asked of a dense call beside its tensors."""

    mask: Tensor | None = None
    scale: float = 0.25
    is_causal: bool = False
    score_mod: Callable[..., Any] | None = None
    mask_mod: Callable[..., Any] | None = None
    keep: Tensor | None = None
    """(B, Hq, L, S): what dropout multiplies weights by."""
    first_query: int = 0
    first_batch: int = 0


def attend(query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Output and LSE as anybody would write them in plain torch, in the type of the inputs; LSE in float32 or wider."""
    group = query.shape[1] // key.shape[1]
    wide = torch.promote_types(query.dtype, FLOAT)
    scores = query.to(wide) @ key.to(wide).repeat_interleave(group, 1).mT * rules.scale
    b, h, q, k = (
        torch.arange(size).view([-1 if i == d else 1 for i in range(4)])
        for d, size in enumerate(scores.shape)
    )
    b, q = b + rules.first_batch, q + rules.first_query
    if rules.score_mod is not None:
        scores = rules.score_mod(scores, b, h, q, k).to(wide).expand(scores.shape)
    live = torch.ones(scores.shape, dtype=torch.bool)
    if rules.is_causal:
        live = live & (k <= q)
    if rules.mask_mod is not None:
        live = live & rules.mask_mod(b, h, q, k)
    if rules.mask is not None and rules.mask.dtype is torch.bool:
        live = live & rules.mask
    elif rules.mask is not None:
        scores = scores + rules.mask.to(wide)
    live = live & (scores.detach() != -INF)
    blind = ~live.any(-1, keepdim=True)
    scores = scores.masked_fill(~live, -INF).masked_fill(blind, 0.0)
    weights = scores.softmax(-1).masked_fill(~live, 0.0)
    if rules.keep is not None:
        weights = weights * rules.keep.to(wide)
    out = weights.to(query.dtype) @ value.repeat_interleave(group, 1)
    lse = scores.logsumexp(-1) if scores.shape[-1] else scores.sum(-1)
    return out, lse.masked_fill(blind[..., 0], -INF)


def pulled_back(
    compute: Callable[..., tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor],
    above: Sequence[Tensor],
    through: str,
) -> list[Tensor]:
    """Gradients of the tensors through ``out``, ``lse`` or ``both``; that of an LSE of -inf means nothing and is 0."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = compute(*leaves)
    pairs = [
        (out, above[0].to(out.dtype)),
        (lse, torch.where(lse.detach() == -INF, 0.0, above[1]).to(lse.dtype)),
    ]
    pairs = [
        pair for pair in {"out": pairs[:1], "lse": pairs[1:], "both": pairs}[through] if pair[0].requires_grad
    ]
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.autograd.grad(
            [x for x, _ in pairs], leaves, [a for _, a in pairs], allow_unused=True, materialize_grads=True
        )
    return list(found)


def above_of(query: Tensor, value: Tensor, seed: int = 5) -> tuple[Tensor, Tensor]:
    return normal(*query.shape[:-1], value.shape[-1], seed=seed), normal(*query.shape[:-1], seed=seed + 1)


def portable(tuning: Tuning = PLAIN, **rules: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    compute = interpreted.attention(tuning)
    return lambda *tensors: call(*tensors, compute=compute, features=BACKWARD, **rules)


def check(
    tensors: Sequence[Tensor], rules: Rules, through: str = "both", tuning: Tuning = PLAIN, **given: Any
) -> None:
    """The kernels' gradients are as near to float64's as plain torch's, three times over."""
    above = above_of(tensors[0], tensors[2])
    asked = {
        "mask": rules.mask, "scale": rules.scale, "is_causal": rules.is_causal, "score_mod": rules.score_mod,
        "mask_mod": rules.mask_mod, **given,
    }  # fmt: skip
    found = pulled_back(portable(tuning, **asked), tensors, above, through)
    exact = pulled_back(lambda *t: attend(*t, rules), [t.double() for t in tensors], above, through)
    plain = pulled_back(lambda *t: attend(*t, rules), tensors, above, through)
    for name, got, truth, baseline in zip(("query", "key", "value"), found, exact, plain, strict=True):
        assert got.dtype is tensors[0].dtype, name
        if tensors[0].dtype is FLOAT:  # where plain torch may be exact by luck
            torch.testing.assert_close(
                got.double(), truth, rtol=5e-5, atol=5e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        elif got.numel():
            assert_accurate(got, truth, baseline, k=3, what=name)


# ---------------------------------------------------------------------------- dense


@settings(max_examples=10, deadline=None)
@given(
    group=st.integers(1, 3), kv=st.integers(1, 2), rows=st.integers(0, 35), keys=st.integers(0, 40),
    e=st.sampled_from([1, 5, 16, 33]), ev=st.sampled_from([1, 7, 16, 40]), causal=st.booleans(),
    mask=st.sampled_from([None, "boolean", "additive"]), scale=st.sampled_from([0.3, -0.7, 0.0]),
    through=st.sampled_from(["out", "lse", "both"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_gradients_of_any_dense_problem_are_those_of_autograd_in_float64(
    group: int, kv: int, rows: int, keys: int, e: int, ev: int, causal: bool, mask: str | None, scale: float,
    through: str, seed: int,
) -> None:  # fmt: skip
    tensors = qkv(2, kv * group, kv, rows, keys, e, ev, FLOAT, seed)
    drawn = normal(2, 1, rows, keys, seed=seed + 1)
    given_mask = drawn_mask(mask, drawn)
    check(tensors, Rules(given_mask, scale, causal), through)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_halves_are_as_accurate_as_plain_torch(dtype: torch.dtype) -> None:
    check(qkv(1, 4, 2, 37, 45, 24, 16, dtype), Rules(is_causal=True))


@pytest.mark.parametrize("tiles", [Tiles(16, 64), Tiles(64, 16), Tiles(32, 32)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_every_size_give_the_same_gradients(tiles: Tiles, causal: bool) -> None:
    tuning = replace(PLAIN, query_gradient=lambda problem: tiles, key_gradient=lambda problem: tiles)
    check(qkv(1, 2, 1, 70, 90, 16, 16, FLOAT), Rules(is_causal=causal), tuning=tuning)


def test_strides_and_an_expanded_gradient_from_above_change_no_bit() -> None:
    tensors = qkv(2, 4, 2, 9, 21, 16, 16, FLOAT)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    ones = torch.ones(()).expand(2, 4, 9, 16), torch.ones(()).expand(2, 4, 9)
    expected = pulled_back(portable(), tensors, [t.contiguous() for t in ones], "both")
    assert all(map(torch.equal, pulled_back(portable(), turned, ones, "both"), expected))


def test_a_key_head_gets_the_sum_over_its_query_heads_with_the_same_bits_every_time() -> None:
    tensors = qkv(1, 6, 2, 20, 30, 16, 16, FLOAT)
    above = above_of(tensors[0], tensors[2])
    first, again = (pulled_back(portable(), tensors, above, "both") for _ in range(2))
    assert all(map(torch.equal, first, again))
    apart = [tensors[0], *(t.repeat_interleave(3, 1) for t in tensors[1:])]
    each = pulled_back(portable(), apart, above, "both")
    torch.testing.assert_close(first[1], each[1].unflatten(1, (2, 3)).sum(2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [0.4, 1.0])
def test_gradients_pass_through_the_weights_that_dropout_kept(p: float) -> None:
    tensors = qkv(2, 2, 1, 18, 21, 16, 16, FLOAT)
    seed = torch.tensor(0x7234_5678_9ABC_DEF1)
    axes = [
        torch.arange(n).view([-1 if d == i else 1 for d in range(4)]) for i, n in enumerate((2, 2, 18, 21))
    ]
    keep = dropout_keep(seed, *axes, p).double() / (1 - p if p < 1 else 1)
    check(tensors, Rules(keep=keep), dropout_p=p, seed=seed)


# ---------------------------------------------------------------------------- functions and BlockMasks

MODS: dict[str, Callable[..., Any]] = {
    "alibi": alibi(SLOPES),
    "soft cap": lambda s, b, h, q, k: torch.tanh(s / 1.5) * 1.5,
    "hides by score": lambda s, b, h, q, k: torch.where((k + q) % 3 == 0, -INF, s * s),
    "a constant": lambda s, b, h, q, k: (q - k) * 0.125,
    "an integer": lambda s, b, h, q, k: torch.where(s > 0, k % 3, q % 2),
    "of half precision": lambda s, b, h, q, k: (s * 0.5).to(torch.float16),
}


@pytest.mark.parametrize("name", MODS)
def test_gradients_pass_through_the_derivative_of_a_score_mod(name: str) -> None:
    check(qkv(2, 4, 2, 21, 37, 16, 16, FLOAT), Rules(score_mod=MODS[name], is_causal=name == "alibi"))


def test_a_function_that_has_no_derivative_at_a_hidden_pair_harms_none() -> None:
    def root(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return torch.sqrt((q - k).to(FLOAT)) * s

    tensors = qkv(1, 1, 1, 20, 20, 16, 16, FLOAT)
    found = pulled_back(
        portable(score_mod=root, is_causal=True, scale=0.25),
        tensors,
        above_of(tensors[0], tensors[2]),
        "both",
    )
    assert all(bool(x.isfinite().all()) for x in found)


@pytest.mark.parametrize(("rows", "keys", "size"), [(64, 64, 16), (50, 61, (24, 20)), (33, 70, (8, 32))])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_mask_hides_from_gradients_what_its_function_hides(
    rows: int, keys: int, size: Any, causal: bool
) -> None:
    def window(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q + 9 * h) & (q - k < 17)

    given_blocks = blocks(window, rows, keys, size, heads=2)
    tensors = qkv(1, 2, 1, rows, keys, 16, 16, FLOAT)
    check(tensors, Rules(mask_mod=window, is_causal=causal), **given_blocks)


def test_blocks_that_are_not_listed_are_neither_read_nor_given_a_gradient() -> None:
    tensors = qkv(1, 1, 1, 32, 48, 16, 16, FLOAT)
    rules = blocks(lambda b, h, q, k: k < 16, 32, 48, 16)
    above = above_of(tensors[0], tensors[2])
    expected = pulled_back(portable(**rules), tensors, above, "both")
    tensors[1][:, :, 16:], tensors[2][:, :, 16:] = NAN, INF
    found = pulled_back(portable(**rules), tensors, above, "both")
    assert all(map(torch.equal, found, expected))
    assert not found[1][:, :, 16:].any() and not found[2][:, :, 16:].any()


# ---------------------------------------------------------------------------- what is not a number


@pytest.mark.parametrize("wild", [NAN, INF])
def test_what_hidden_keys_hold_reaches_no_gradient(wild: float) -> None:
    keep = torch.ones(20, 50, dtype=torch.bool)
    keep[:, 20:33] = keep[:, 49] = False
    tensors = qkv(1, 2, 1, 20, 50, 16, 16, FLOAT)
    above = above_of(tensors[0], tensors[2])
    expected = pulled_back(portable(mask=keep), tensors, above, "both")
    for tensor in tensors[1:]:
        tensor[:, :, ~keep[0]] = wild
    found = pulled_back(portable(mask=keep), tensors, above, "both")
    assert all(map(torch.equal, found, expected))
    assert not found[1][:, :, ~keep[0]].any() and not found[2][:, :, ~keep[0]].any()


def test_what_a_row_that_sees_nothing_holds_reaches_no_gradient() -> None:
    keep = torch.ones(20, 50, dtype=torch.bool)
    keep[7] = keep[10:13] = False
    tensors = qkv(1, 2, 1, 20, 50, 16, 16, FLOAT)
    above = above_of(tensors[0], tensors[2])
    expected = pulled_back(portable(mask=keep), tensors, above, "both")
    blind = ~keep[:, 0]
    tensors[0][:, :, blind] = NAN
    above[0][:, :, blind] = NAN
    found = pulled_back(portable(mask=keep), tensors, above, "both")
    assert all(map(torch.equal, found, expected))
    assert not found[0][:, :, blind].any()


def test_a_key_of_nan_reaches_the_rows_that_see_it_and_the_keys_that_those_see() -> None:
    keep = torch.ones(40, 60, dtype=torch.bool)
    keep[:20, 3] = keep[20:, 50:60] = False
    tensors = qkv(1, 2, 1, 40, 60, 16, 16, FLOAT)
    tensors[1][:, :, 3, 5] = NAN
    found = pulled_back(portable(mask=keep), tensors, above_of(tensors[0], tensors[2]), "both")
    rows, keys, values = (x.isnan().any(-1) for x in found)
    assert torch.equal(rows, (torch.arange(40) >= 20).expand_as(rows))
    seen = (torch.arange(60) < 50).expand_as(keys)
    assert torch.equal(keys, seen) and torch.equal(values, seen)


@pytest.mark.parametrize("wild", [NAN, INF])
def test_a_gradient_above_of_nan_reaches_its_row_and_what_that_sees(wild: float) -> None:
    tensors = qkv(1, 2, 2, 40, 60, 16, 16, FLOAT)
    above = above_of(tensors[0], tensors[2])
    above[0][0, 1, 25, 3] = wild
    found = pulled_back(portable(is_causal=True), tensors, above, "out")
    rows, keys, values = (~x.isfinite().all(-1) for x in found)
    assert rows.nonzero().tolist() == [[0, 1, 25]]
    for wrong in (keys, values):
        assert torch.equal(wrong.nonzero()[:, 2], torch.arange(26))
        assert bool((wrong.nonzero()[:, 1] == 1).all())
    assert bool(found[2][..., :3].isfinite().all())


# ---------------------------------------------------------------------------- packed and paged sequences


def test_gradients_of_each_packed_sequence_are_of_its_own() -> None:
    rows, keys = [3, 0, 37, 17, 1], [5, 6, 40, 0, 33]
    tensors = [t.float() for t in packed(rows, keys)]
    q, k = starts(rows), starts(keys)
    rules: dict[str, Any] = {"is_causal": True, "scale": 0.5, "score_mod": alibi(SLOPES)}
    above = above_of(tensors[0], tensors[2])
    found = pulled_back(
        portable(layout="varlen", cu_seqlens_q=q, cu_seqlens_k=k, **rules), tensors, above, "both"
    )
    for b in range(len(rows)):
        one, two = slice(q[b], q[b + 1]), slice(k[b], k[b + 1])
        parts = [t[s].transpose(0, 1)[None].double() for t, s in zip(tensors, (one, two, two), strict=True)]
        over = [above[0][one].transpose(0, 1)[None], above[1][one].T[None]]
        exact = pulled_back(lambda *t, b=b: attend(*t, Rules(first_batch=b, **rules)), parts, over, "both")
        for got, truth, part in zip(found, exact, (one, two, two), strict=True):
            torch.testing.assert_close(got[part].transpose(0, 1)[None].double(), truth, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("rows", "page"), [(1, 4), (3, 16), (40, 16)])
def test_a_page_gets_the_gradients_of_every_sequence_that_reads_it(rows: int, page: int) -> None:
    """The first page of each sequence is the same one: its tokens are read three times."""
    lengths = [70, 33, 41]
    query, key, value = qkv(3, 4, 2, rows, 72, 16, 8, FLOAT)
    for tensor in (key, value):
        tensor[1:, :, :page] = tensor[:1, :, :page]
    count = -(-72 // page)
    table = torch.arange(3 * count, dtype=torch.int32).view(3, count)
    pages = [paginate(t, lengths, table, 3 * count, page) for t in (key, value)]
    table[1:, 0] = table[0, 0]
    rules: dict[str, Any] = {"is_causal": True, "scale": 0.25, "score_mod": alibi(SLOPES)}
    above = above_of(query, value)
    lens = torch.tensor(lengths, dtype=torch.int32)
    found = pulled_back(
        portable(layout="paged", page_table=table, seq_lens=lens, **rules), [query, *pages], above, "both"
    )
    dense = [torch.zeros(tensor.shape, dtype=torch.float64) for tensor in pages]
    for b, length in enumerate(lengths):
        parts = [t[b : b + 1, :, :n].double() for t, n in ((query, rows), (key, length), (value, length))]
        over = [tensor[b : b + 1] for tensor in above]
        around = Rules(first_batch=b, first_query=length - rows, **rules)
        exact = pulled_back(lambda *t, r=around: attend(*t, r), parts, over, "both")
        torch.testing.assert_close(found[0][b : b + 1].double(), exact[0], rtol=5e-5, atol=5e-5)
        for whole, gradient in zip(dense, exact[1:], strict=True):
            for token in range(length):
                whole[table[b, token // page], :, token % page] += gradient[0, :, token]
    for got, truth in zip(found[1:], dense, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=5e-5, atol=5e-5)


# ---------------------------------------------------------------------------- refusals


def test_second_derivatives_are_refused() -> None:
    query, key, value = (t.requires_grad_() for t in qkv(1, 1, 1, 3, 4, 16, 16, FLOAT))
    out, _ = portable()(query, key, value)
    (first,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(Unsupported, match="no second ones.*call attention with backend='reference'"):
        (first.sum() + value.sum()).backward()


def test_gradients_through_a_block_mask_over_pages_are_declined() -> None:
    problem = AttentionProblem(torch.device("cpu"), BACKWARD, "paged", block_size=(8, 8), page_size=4)
    found = attention.decline(problem)
    assert found is not None
    assert (found.code, "BlockMask over pages" in found.reason) == ("paged_block_mask_gradient", True)
    assert attention.decline(replace(problem, features=frozenset())) is None


def test_transforms_of_functions_are_left_to_plain_torch() -> None:
    tensors = qkv(1, 1, 1, 3, 4, 16, 16, FLOAT)

    def run(query: Tensor) -> Tensor:
        compute = lambda problem, *arguments: attention.runner(problem)(*arguments)  # noqa: E731
        return call(query, *tensors[1:], scale=0.25, compute=compute, features=BACKWARD)[0].sum()

    found = torch.func.grad(run)(tensors[0])
    exact = pulled_back(
        lambda *t: attend(*t, Rules()), tensors, [torch.ones(1, 1, 3, 16), torch.zeros(1, 1, 3)], "out"
    )
    torch.testing.assert_close(found, exact[0])


def test_dropout_without_a_seed_is_refused_before_anything_is_computed() -> None:
    tensors = qkv(1, 1, 1, 3, 4, 16, 16, FLOAT)
    with pytest.raises(InvalidProblem, match="needs a seed"):
        portable(dropout_p=0.5)(*tensors)
