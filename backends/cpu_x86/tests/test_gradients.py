"""Gradients of the native kernels are those of autograd in float64, whatever the sizes, strides, masks and functions."""

from __future__ import annotations

from typing import Any

import gradient_cases as cases
import pytest
import torch
from gradient_cases import CAPTURED, Problem, check, draw, native, pulled_back
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, INF, SETS, Tensor, forced, inputs, respread, threads

import torchhal

FLOOR = 8e-6
"""Of float32 sums over a few thousand pairs, where a plain evaluation is exact by luck."""


def few(dtype: torch.dtype) -> float:
    """What is allowed where a few numbers, an output of 16 bits among them, may be exact by luck.

    Errors have no upper bound that a rule of this kind knows, so properties that are judged by it try the same examples in
    every run.
    """
    return FLOOR + 4 * torch.finfo(dtype).eps


@pytest.mark.sanitized
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.sampled_from([1, 2, 17, 64, 100, 131]),
    keys=st.sampled_from([1, 7, 64, 119, 121, 257]),
    kv_heads=st.sampled_from([1, 2, 4]),
    sizes=st.sampled_from([(16, 16), (7, 33), (40, 8), (1, 5)]),
    captured=st.sampled_from([None, *CAPTURED]),
    hidden=st.booleans(),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "boolean", "additive"]),
    through=st.sampled_from(["out", "lse", "both"]),
    scale=st.sampled_from([0.25, -0.5, 0.1]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(SETS),
)
def test_gradients_of_any_problem_are_those_of_autograd_in_float64(
    rows: int, keys: int, kv_heads: int, sizes: tuple[int, int], captured: str | None, hidden: bool, causal: bool,
    mask: str, through: str, scale: float, dtype: torch.dtype, isa: str,
) -> None:  # fmt: skip
    main = inputs(2, 4, kv_heads, rows, keys, *sizes, dtype, seed=rows + keys)
    (drawn,) = draw((2, 1, rows, keys), dtype=dtype, seed=keys)
    attn_mask = {"none": None, "boolean": drawn > -0.5, "additive": drawn}[mask]
    score, tensors = CAPTURED[captured] if captured else (None, ())
    visible = cases.window if hidden else None
    problem = Problem(*main, attn_mask, tensors, score, visible, causal, scale)
    with forced(isa, dtype):
        check(problem, through, few(dtype))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "keys", "size", "value_size"),
    [(1, 120, 1, 1), (119, 121, 33, 64), (120, 120, 64, 33), (121, 257, 128, 192), (257, 119, 192, 128),
     (40, 130, 576, 512), (65, 1, 16, 16), (3, 1500, 24, 24), (300, 12, 5, 0)],
)  # fmt: skip
def test_tiles_and_blocks_of_every_size_give_whole_gradients(
    rows: int, keys: int, size: int, value_size: int, dtype: torch.dtype
) -> None:
    problem = Problem(
        *inputs(1, 2, 1, rows, keys, size, value_size, dtype), scale=size**-0.5, causal=keys > 1
    )
    check(problem, floor=FLOOR)


@pytest.mark.parametrize("score", [None, "a table of distances for each head"])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "rows", "keys", "value_size"),
    [(0, 4, 2, 3, 5, 8), (2, 4, 2, 0, 5, 8), (2, 4, 2, 5, 0, 8), (2, 4, 2, 0, 0, 8), (2, 0, 2, 3, 5, 8),
     (2, 0, 0, 3, 5, 8), (2, 4, 2, 3, 5, 0)],
)  # fmt: skip
def test_what_nothing_reaches_has_a_gradient_of_zero(
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, value_size: int, score: str | None
) -> None:
    function, tensors = CAPTURED[score] if score else (None, ())
    main = inputs(batch, heads, kv_heads, rows, keys, 16, value_size, torch.float32)
    (mask,) = draw((rows, keys))
    problem = Problem(*main, mask, tensors, function)
    found = pulled_back(native, problem, cases.gradients_above(problem), "out")
    for gradient, leaf in zip(found, problem.leaves, strict=True):
        assert gradient.shape == leaf.shape and not gradient.any()


MASKS = [(), (30, 140), (1, 140), (30, 1), (2, 4, 1, 1), (1, 1, 30, 140), (2, 1, 1, 140), (1, 4, 30, 1),
         (2, 4, 30, 140), (4, 1, 140), (2, 1, 30, 140), (1, 4, 1, 140)]  # fmt: skip


@pytest.mark.parametrize("shape", MASKS, ids=str)
def test_a_mask_of_any_shape_gets_the_sum_over_what_it_is_broadcast_to(
    shape: tuple[int, ...],
) -> None:
    main = inputs(2, 4, 2, 30, 140, 16, 16, torch.float32)
    check(Problem(*main, draw(shape, seed=9)[0]), floor=FLOOR)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_has_gradients_in_its_own_type_and_strides_and_none_where_it_hides(dtype: torch.dtype) -> None:
    wide = (
        torch.float64 if dtype is torch.float64 else torch.float32
    )  # a float64 mask goes with float64 queries
    main = inputs(1, 2, 2, 40, 130, 16, 16, wide)
    mask = draw((1, 130, 2, 40), dtype=dtype, seed=9)[0].permute(0, 2, 3, 1)
    mask[:, :, :, 50:60] = mask[:, 1, 7] = -INF
    found = check(Problem(*main, mask), floor=FLOOR)[3]
    assert found.dtype is dtype and not found[mask == -INF].any()
    whole = mask[:, :1, :1].expand(1, 2, 40, 130)
    check(Problem(*main, whole), floor=FLOOR)


@pytest.mark.parametrize("through", ["out", "lse"])
@pytest.mark.parametrize("name", CAPTURED)
def test_captured_tensors_get_the_sum_over_all_pairs_that_read_them(name: str, through: str) -> None:
    score, tensors = CAPTURED[name]
    main = inputs(2, 4, 2, 21, 125, 16, 24, torch.float32)
    check(Problem(*main, None, tensors, score, causal=through == "out"), through, FLOOR)


# ---------------------------------------------------------------------------- strides


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["swapped", "sliced", "every_second", "columns"])
def test_strides_of_inputs_and_of_the_gradient_above_do_not_change_a_bit(
    how: str, dtype: torch.dtype
) -> None:
    problem = Problem(*inputs(2, 4, 2, 40, 150, 33, 48, dtype), causal=True)
    above = cases.gradients_above(problem)
    expected = pulled_back(native, problem, above, "both")
    spread = problem.over([respread(x, how) for x in problem.leaves])
    lse = above[1].transpose(1, 2).contiguous().transpose(1, 2)
    found = pulled_back(native, spread, [respread(above[0], how), lse], "both")
    assert all(map(torch.equal, found, expected))


def test_expanded_gradients_above_are_read_through_stride_zero() -> None:
    problem = cases.learning(Problem(*inputs(2, 4, 2, 40, 150, 16, 24, torch.float32)))
    out, lse = native(problem)
    expected = torch.autograd.grad(
        (out, lse), problem.leaves, (torch.ones_like(out), torch.ones_like(lse)), retain_graph=True
    )
    assert all(map(torch.equal, torch.autograd.grad(out.sum() + lse.sum(), problem.leaves), expected))


def test_expanded_keys_get_the_sum_of_what_each_copy_got() -> None:
    query, key, value = inputs(3, 2, 2, 9, 50, 16, 16, torch.float32)
    apart = Problem(query, key[:1].repeat(3, 1, 1, 1), value[:1].repeat(3, 1, 1, 1))
    above = cases.gradients_above(apart)
    expected = pulled_back(native, apart, above, "both")
    together = pulled_back(
        lambda p: native(p.over([p.query, p.key.expand(3, -1, -1, -1), p.value.expand(3, -1, -1, -1)])),
        apart.over([query, key[:1], value[:1]]),
        above,
        "both",
    )
    for found, each in zip(together, expected, strict=True):
        torch.testing.assert_close(found, each if found.shape == each.shape else each.sum(0, keepdim=True))


# ---------------------------------------------------------------------------- what is not a number, and what is large


def finite_problem(**options: Any) -> Problem:
    return Problem(*inputs(1, 4, 2, 40, 130, 16, 24, torch.float32), **options)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wild", [INF, torch.nan])
def test_what_hidden_keys_hold_reaches_no_gradient(wild: float, dtype: torch.dtype, isa: str) -> None:
    keep = torch.ones(40, 130, dtype=torch.bool)
    keep[:, 20:33] = keep[:, 129] = False
    clean = Problem(*inputs(1, 4, 2, 40, 130, 16, 24, dtype), keep)
    above = cases.gradients_above(clean)
    hidden = ~keep[0]
    with forced(isa, dtype):
        expected = pulled_back(native, clean, above, "both")
        key, value = (x.masked_fill(hidden[:, None], wild) for x in (clean.key, clean.value))
        found = pulled_back(native, clean.over([clean.query, key, value]), above, "both")
    assert all(map(torch.equal, found, expected))
    assert not found[1][:, :, hidden].any() and not found[2][:, :, hidden].any()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_that_sees_nothing_holds_reaches_no_gradient(dtype: torch.dtype, isa: str) -> None:
    keep = torch.ones(40, 130, dtype=torch.bool)
    keep[7] = keep[30:35] = False
    clean = Problem(*inputs(1, 4, 2, 40, 130, 16, 24, dtype), keep)
    above = cases.gradients_above(clean)
    blind = ~keep[:, 0]
    with forced(isa, dtype):
        expected = pulled_back(native, clean, above, "both")
        query, out = (x.masked_fill(blind[:, None], torch.nan) for x in (clean.query, above[0]))
        lse = above[1].masked_fill(blind, torch.nan)
        found = pulled_back(native, clean.over([query, clean.key, clean.value]), [out, lse], "both")
    assert all(map(torch.equal, found, expected))
    assert not found[0][:, :, blind].any()


def wild_rows(gradients: list[Tensor]) -> list[Tensor]:
    """Rows that hold something that is no number, of each gradient."""
    return [x.isnan().any(-1) for x in gradients]


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_key_of_nan_reaches_the_rows_that_see_it_and_the_keys_that_those_see(
    dtype: torch.dtype, isa: str
) -> None:
    """Key 3 is seen by rows from 20 on alone; they see no key between 50 and 60."""
    keep = torch.ones(40, 130, dtype=torch.bool)
    keep[:20, 3] = keep[20:, 50:60] = False
    problem = Problem(*inputs(1, 4, 2, 40, 130, 16, 24, dtype), keep)
    problem.key[:, :, 3, 5] = torch.nan
    with forced(isa, dtype):
        rows, keys, values = wild_rows(pulled_back(native, problem, cases.gradients_above(problem), "both"))
    assert torch.equal(rows, (torch.arange(40) >= 20).expand_as(rows))
    seen = ((torch.arange(130) < 50) | (torch.arange(130) >= 60)).expand_as(keys)
    assert torch.equal(keys, seen) and torch.equal(values, seen)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_above_of_nan_reaches_its_row_and_what_that_sees(dtype: torch.dtype, isa: str) -> None:
    problem = Problem(*inputs(1, 4, 4, 40, 130, 16, 24, dtype), causal=True)
    above = cases.gradients_above(problem)
    above[0][0, 1, 25, 3] = torch.nan
    with forced(isa, dtype):
        rows, keys, values = wild_rows(pulled_back(native, problem, above, "out"))
    assert rows.nonzero().tolist() == [[0, 1, 25]]
    for found in (keys, values):
        assert torch.equal(found.nonzero()[:, 2], torch.arange(26)) and (found.nonzero()[:, 1] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_scores_give_finite_gradients(dtype: torch.dtype) -> None:
    """Weights come from an LSE in float32, one unit of whose last place is their relative error."""
    main = inputs(1, 4, 2, 60, 150, 16, 24, dtype)
    lifted = torch.tensor([1e4, -1e4])[torch.arange(150) % 2].expand(60, 150)
    for problem in (Problem(*main, scale=1e3, causal=True), Problem(*main, lifted), Problem(*main, -lifted)):
        size = float(cases.attend(problem)[1].abs().max())
        rounding = size * 2**-23 + 2 * torch.finfo(dtype).eps  # of the weights, and of the output
        for found in check(problem, "out", floor=rounding * max(problem.scale, 1.0)):
            assert found.isfinite().all()
    found = check(Problem(*main, lifted), "out", floor=2e-3)
    assert not found[1][:, :, 1::2].any() and not found[2][:, :, 1::2].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_scores_give_accurate_gradients(dtype: torch.dtype) -> None:
    check(Problem(*inputs(1, 4, 2, 60, 150, 16, 24, dtype), scale=1e-4))


# ---------------------------------------------------------------------------- order, threads, dropout


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [(), (1, 4, 300, 300)])
def test_gradients_are_the_same_bits_run_by_run_for_any_number_of_threads(
    mask: tuple[int, ...], dtype: torch.dtype, isa: str
) -> None:
    score, tensors = CAPTURED["a table of distances for each head"]
    problem = Problem(*inputs(1, 4, 2, 300, 300, 32, 32, dtype), draw(mask)[0], tensors, score)
    above = cases.gradients_above(problem)
    results = []
    with forced(isa, dtype):
        for count in (1, 2, 3, 2):
            with threads(count):
                results.append(pulled_back(native, problem, above, "both"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.3, 0.9, 1.0])
def test_gradients_pass_through_the_weights_that_dropout_kept(p: float, dtype: torch.dtype) -> None:
    """Values that are rows of the unit matrix show which: the output is then the weights."""
    query, key, value = inputs(2, 4, 2, 33, 125, 16, 24, dtype)
    unit = torch.eye(125, dtype=dtype).expand(2, 2, 125, 125)

    def dropped(problem: Problem) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return native(problem, dropout_p=p)

    keep = dropped(Problem(query, key, unit))[0] != 0
    problem = Problem(query, key, value)
    above = cases.gradients_above(problem)
    wide = problem.over([x.double() for x in problem.leaves])

    def plain(of: Problem) -> tuple[Tensor, Tensor]:
        return cases.attend(of, keep, p if p < 1 else 0.0)

    found = pulled_back(dropped, problem, above, "both")
    exact, same = pulled_back(plain, wide, above, "both"), pulled_back(plain, problem, above, "both")
    for a, b, c in zip(found, exact, same, strict=True):
        cases.assert_accurate(a, b, c, "a gradient", dtype, FLOOR)


# ---------------------------------------------------------------------------- sequences of lengths of their own


def by_sequence(pieces: list[Problem]) -> tuple[Tensor, Tensor]:
    """Output (T, Hq, Ev) and LSE (T, Hq) of the oracle."""
    results = [cases.attend(piece) for piece in pieces]
    out = torch.cat([x[0].transpose(0, 1) for x, _ in results])
    return out, torch.cat([x[0].transpose(0, 1) for _, x in results])


def judge(
    run: Any, oracle: Any, leaves: list[Tensor], results: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    """Gradients of ``leaves`` by ``run``, held against those by ``oracle``."""
    above = draw(*results, seed=8)
    found = []
    for function, of in ((run, leaves), (oracle, [x.double() for x in leaves]), (oracle, leaves)):
        own = [x.detach().requires_grad_() for x in of]
        got = function(*own)
        given = [a.to(dtype if i == 0 else a.dtype).to(x.dtype) for i, (a, x) in enumerate(zip(above, got))]
        found.append(torch.autograd.grad(got, own, given))
    for a, b, c in zip(*found, strict=True):
        cases.assert_accurate(a, b, c, "a gradient", dtype, few(dtype))


@pytest.mark.sanitized
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 140)), min_size=1, max_size=4),
    captured=st.sampled_from([None, "one tensor gathered twice", "a slope for each head"]),
    causal=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_packed_sequences_have_the_gradients_of_each_alone(
    lengths: list[tuple[int, int]], captured: str | None, causal: bool, dtype: torch.dtype
) -> None:
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).to(torch.int32) for i in (0, 1)]
    tokens, keys = (int(each[-1]) for each in starts)
    leaves = draw((tokens, 4, 24), (keys, 2, 24), (keys, 2, 16), dtype=dtype, seed=tokens)
    score, tensors = CAPTURED[captured] if captured else (None, ())
    leaves += tensors

    def run(query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Any:
        return torchhal.varlen_attention(
            query, key, value, *starts, score_mod=score and score(*own), is_causal=causal, enable_gqa=True,
            scale=0.3, return_lse=True, backend="cpu_x86",
        )  # fmt: skip

    def oracle(query: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Any:
        parts = [x.split([pair[i > 0] for pair in lengths]) for i, x in enumerate((query, key, value))]
        pieces = [[x.transpose(0, 1)[None] for x in piece] for piece in zip(*parts, strict=True)]
        return by_sequence([Problem(*piece, None, own, score, causal=causal) for piece in pieces])

    judge(run, oracle, leaves, [(tokens, 4, 16), (tokens, 4)], dtype)


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("page", "rows"), [(1, 3), (16, 1), (16, 40), (64, 9), (130, 9)])
def test_pages_that_sequences_share_get_the_sum_of_both(page: int, rows: int, dtype: torch.dtype) -> None:
    lengths, columns = [130, 0, 47], -(-130 // page)
    table = torch.arange(3 * columns).view(3, columns)
    table[2, 0] = table[0, 0]
    leaves = draw((3, 4, rows, 24), (3 * columns, 2, page, 24), (3 * columns, 2, page, 16), dtype=dtype)
    given = (table.to(torch.int32), torch.tensor(lengths, dtype=torch.int32))

    def run(query: Tensor, keys: Tensor, values: Tensor) -> Any:
        return torchhal.paged_attention(
            query, keys, values, *given, enable_gqa=True, scale=0.3, return_lse=True, backend="cpu_x86"
        )

    def oracle(query: Tensor, keys: Tensor, values: Tensor) -> Any:
        results = []
        for b, length in enumerate(lengths):
            key, value = (x[table[b]].transpose(0, 1).flatten(1, 2)[None, :, :length] for x in (keys, values))
            results.append(cases.attend(Problem(query[b : b + 1], key, value)))
        return [torch.cat(parts) for parts in zip(*results, strict=True)]

    judge(run, oracle, leaves, [(3, 4, rows, 16), (3, 4, rows)], dtype)


def test_nested_tensors_have_the_gradients_of_their_sequences() -> None:
    lengths = [5, 40, 1, 130]
    parts = [inputs(1, 4, 4, n, n, 16, 16, torch.float32, seed=n) for n in lengths]
    leaves = [torch.cat([part[i][0].transpose(0, 1) for part in parts]).requires_grad_() for i in range(3)]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    nested = [torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in leaves]
    out: Any = torchhal.attention(*nested, is_causal=True, scale=0.3, backend="cpu_x86")
    found = torch.autograd.grad(out.values().square().sum(), leaves)
    for i, part in enumerate(parts):
        alone = cases.learning(Problem(*part, causal=True))
        expected = torch.autograd.grad(native(alone)[0].square().sum(), alone.leaves)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a[offsets[i] : offsets[i + 1]], b[0].transpose(0, 1))
