"""Captured functions, BlockMasks, packed and paged sequences: what the kernels hide, read and refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import LIBRARY, threads
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import torchhal

Tensor = torch.Tensor
INF = float("inf")
NAN = float("nan")


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def against_specification(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """Output and LSE of cpu_x86, compared with the reference in float64 on the same values."""
    options |= {"return_lse": True, "enable_gqa": True}
    out, lse = function(*arguments, backend="cpu_x86", **options)
    wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments]
    if isinstance(options.get("attn_mask"), Tensor) and options["attn_mask"].is_floating_point():
        options["attn_mask"] = options["attn_mask"].double()
    exact, exact_lse = function(*wide, backend="reference", **options)
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[out.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound, equal_nan=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5, equal_nan=True)
    return out, lse


slopes = torch.tensor([0.5, 0.1, 0.01, 0.3])
tables = torch.linspace(-1, 1, 4 * 33).view(4, 33).double()


def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.tanh((score + slopes[h] * (k - q)) / 2.0) * 2.0


def relative(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + tables[h, torch.clamp(k - q, -16, 16) + 16].to(torch.float32)


def cut(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where((k + q) % 3 == 0, -INF, score)


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q - k < 37 + 9 * h)


def blocks(shape: str, rows: int, keys: int, size: int | tuple[int, int]) -> BlockMask | None:
    if shape == "none":
        return None
    batch, heads = (2, 4) if shape == "each head" else (None, None)
    mask = window if shape == "each head" else lambda b, h, q, k: (k <= q + 5) & (q - k < 50)
    return create_block_mask(mask, batch, heads, rows, keys, device="cpu", BLOCK_SIZE=size)


@pytest.mark.sanitized
@settings(max_examples=80, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 3, 17, 64, 100, 131]),
    keys=st.sampled_from([1, 7, 64, 119, 121, 300, 1100]),
    kv_heads=st.sampled_from([1, 2, 4]),
    sizes=st.sampled_from([(16, 16), (7, 33), (40, 8)]),
    score_mod=st.sampled_from([None, alibi, relative, cut]),
    shape=st.sampled_from(["none", "shared", "each head"]),
    block=st.sampled_from([8, 128, (16, 32), (128, 48)]),
    causal=st.booleans(),
    mask=st.sampled_from(["none", "boolean", "additive"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    isa=st.sampled_from(LIBRARY.instruction_sets()),
)
def test_dense_calls_with_functions_and_masks_in_every_combination_are_those_of_the_specification(
    rows: int, keys: int, kv_heads: int, sizes: tuple[int, int], score_mod: Any, shape: str, block: Any,
    causal: bool, mask: str, dtype: torch.dtype, isa: str,
) -> None:  # fmt: skip
    query, key, value, drawn = tensors(
        (2, 4, rows, sizes[0]), (2, kv_heads, keys, sizes[0]), (2, kv_heads, keys, sizes[1]), (2, 1, rows, keys),
        dtype=dtype, seed=rows + keys,
    )  # fmt: skip
    attn_mask = {"none": None, "boolean": drawn > -0.5, "additive": drawn}[mask]
    before = LIBRARY.get_isa(dtype)
    LIBRARY.set_isa(dtype, isa)
    try:
        against_specification(
            torchhal.attention, query, key, value, score_mod=score_mod, attn_mask=attn_mask, is_causal=causal,
            block_mask=blocks(shape, rows, keys, block),
        )  # fmt: skip
    finally:
        LIBRARY.set_isa(dtype, before)


@pytest.mark.sanitized
@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 70), st.integers(0, 300)), min_size=0, max_size=5),
    score_mod=st.sampled_from([None, alibi, cut]),
    mask_mod=st.sampled_from([None, window]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_packed_sequences_are_those_of_the_specification(
    lengths: list[tuple[int, int]], score_mod: Any, mask_mod: Any, causal: bool, dtype: torch.dtype
) -> None:
    starts = [torch.tensor([0, *(pair[i] for pair in lengths)]).cumsum(0).to(torch.int32) for i in (0, 1)]
    tokens, keys = (int(each[-1]) for each in starts)
    query, key, value = tensors((tokens, 4, 24), (keys, 2, 24), (keys, 2, 24), dtype=dtype, seed=tokens)
    against_specification(
        torchhal.varlen_attention,
        query,
        key,
        value,
        *starts,
        score_mod=score_mod,
        mask_mod=mask_mod,
        is_causal=causal,
    )


@pytest.mark.sanitized
@settings(max_examples=30, deadline=None)
@given(
    page=st.sampled_from([1, 3, 16, 64, 200]),
    lengths=st.lists(st.integers(0, 350), min_size=1, max_size=3),
    rows=st.sampled_from([1, 2, 9, 40]),
    score_mod=st.sampled_from([None, alibi, cut]),
    mask_mod=st.sampled_from([None, window]),
    causal=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_pages_are_those_of_the_specification_whatever_unused_slots_hold(
    page: int, lengths: list[int], rows: int, score_mod: Any, mask_mod: Any, causal: bool, dtype: torch.dtype
) -> None:
    batch, columns = len(lengths), -(-350 // page)
    pages = batch * columns + 2
    query, key, value = tensors(
        (batch, 4, rows, 24), (pages, 2, page, 24), (pages, 2, page, 32), dtype=dtype, seed=page
    )
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(page))[: batch * columns].view(
        batch, columns
    )
    used = torch.zeros(pages, page, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for position in range(length):
            used[table[b, position // page], position % page] = True
    for cache in (key, value):
        cache.masked_fill_(~used[:, None, :, None], NAN)
    for b, length in enumerate(lengths):  # entries of the table that nobody uses name no page
        table[b, -(-length // page) :] = -7
    given = (table.to(torch.int32), torch.tensor(lengths, dtype=torch.int32))
    against_specification(
        torchhal.paged_attention,
        query,
        key,
        value,
        *given,
        score_mod=score_mod,
        mask_mod=mask_mod,
        is_causal=causal,
    )


@pytest.mark.parametrize("isa", LIBRARY.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("p", [0.3, 0.999, 1.0])
def test_dropout_takes_the_weights_that_the_specification_takes(
    p: float, rows: int, dtype: torch.dtype, isa: str
) -> None:
    query, key, value = tensors((2, 4, rows, 16), (2, 2, 701, 16), (2, 2, 701, 24), dtype=dtype)
    mask = blocks("shared", rows, 701, (16, 7))  # blocks that begin between two evaluations of the generator
    before = LIBRARY.get_isa(dtype)
    LIBRARY.set_isa(dtype, isa)
    try:
        found = []
        for backend, given in (
            ("cpu_x86", (query, key, value)),
            ("reference", (query.double(), key.double(), value.double())),
        ):
            torch.manual_seed(3)
            found.append(
                torchhal.attention(
                    *given,
                    score_mod=alibi,
                    block_mask=mask,
                    dropout_p=p,
                    enable_gqa=True,
                    return_lse=True,
                    backend=backend,
                )
            )
    finally:
        LIBRARY.set_isa(dtype, before)
    bound = 1e-5 if dtype is torch.float32 else 2e-2
    largest = float(found[1][0].abs().max())
    torch.testing.assert_close(found[0][0].double(), found[1][0], rtol=bound, atol=bound * max(largest, 1.0))
    torch.testing.assert_close(found[0][1].double(), found[1][1], rtol=1e-5, atol=1e-5)


def test_a_score_of_minus_infinity_hides_what_its_key_holds() -> None:
    for rows in (1, 40):
        query, key, value = tensors((1, 2, rows, 16), (1, 2, 90, 16), (1, 2, 90, 16))
        value[:, :, 30:60] = NAN
        out = torchhal.attention(
            query, key, value, backend="cpu_x86",
            score_mod=lambda s, b, h, q, k: torch.where((k >= 30) & (k < 60), -INF, s),
        )  # fmt: skip
        assert out.isfinite().all()


@pytest.mark.parametrize("rows", [1, 100])
def test_results_do_not_depend_on_the_number_of_threads(rows: int) -> None:
    query, key, value = tensors((2, 4, rows, 32), (2, 2, 3000, 32), (2, 2, 3000, 32))
    mask = blocks("each head", rows, 3000, 64)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(
                torchhal.attention(
                    query, key, value, score_mod=alibi, block_mask=mask, enable_gqa=True, backend="cpu_x86"
                )
            )
    assert torch.equal(*results)


def test_a_function_that_captures_another_tensor_of_one_shape_reads_the_new_one() -> None:
    query, key, value = tensors((1, 1, 8, 16), (1, 1, 20, 16), (1, 1, 20, 16))
    found = []
    for seed in (1, 2):
        (bias,) = tensors((20,), seed=seed)
        found.append(
            against_specification(
                torchhal.attention, query, key, value, score_mod=lambda s, b, h, q, k, t=bias: s + t[k]
            )[0]
        )
    assert not torch.equal(*found)


def starts_that(what: str) -> tuple[Tensor, Tensor]:
    wrong = {"begin late": [1, 5, 9], "fall": [0, 7, 5], "end early": [0, 5, 8]}[what]
    return torch.tensor(wrong, dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("begin late", "must start at 0"),
        ("fall", "must not decrease"),
        ("end early", "must end at the number of tokens"),
    ],
)
def test_cumulative_lengths_that_contradict_the_tokens_are_refused(what: str, message: str) -> None:
    query, key, value = tensors((9, 2, 8), (9, 2, 8), (9, 2, 8))
    with pytest.raises(torchhal.errors.InvalidProblem, match=message):
        torchhal.varlen_attention(query, key, value, *starts_that(what), backend="cpu_x86")


@pytest.mark.parametrize(
    ("entry", "length", "message"),
    [(9, 5, r"page_table\[0, 1\] is 9"), (-1, 5, r"page_table\[0, 1\] is -1"), (1, 9, r"seq_lens\[0\] is 9"),
     (1, -1, r"seq_lens\[0\] is -1")],
)  # fmt: skip
def test_pages_that_do_not_exist_are_refused_before_they_are_read(
    entry: int, length: int, message: str
) -> None:
    query, key, value = tensors((1, 2, 1, 8), (9, 2, 4, 8), (9, 2, 4, 8))
    table, lengths = torch.tensor([[0, entry]], dtype=torch.int32), torch.tensor([length], dtype=torch.int32)
    with pytest.raises(torchhal.errors.InvalidProblem, match=message):
        torchhal.paged_attention(query, key, value, table, lengths, backend="cpu_x86")


def flex(description: str, operands: list[Tensor], rows: int = 4) -> Any:
    query, key, value = tensors((1, 2, rows, 8), (1, 2, 6, 8), (1, 2, 6, 8))
    return torch.ops.torchhal_cpu_x86.flex_attention(query, key, value, operands, description, 1.0)


PLAIN = "0 0 0 0 0 0 1 1 -1 -1 0 0 0 0 0"


@pytest.mark.sanitized
@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(max_size=40),
        st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 3), max_size=30).map(
            lambda words: " ".join(map(str, words))
        ),
    )
)
def test_descriptions_that_nobody_wrote_are_refused(description: str) -> None:
    """As with programs, tools/sanitize.py runs this where a read out of bounds is seen."""
    try:
        flex(description, [torch.ones(4, 6)])
    except RuntimeError as error:
        assert "torchhal_cpu_x86::flex_attention" in str(error)


def test_operands_that_are_missing_or_too_many_are_refused() -> None:
    assert flex(PLAIN, [])[0].shape == (1, 2, 4, 8)
    with pytest.raises(RuntimeError, match="attn_mask is missing"):
        flex("0 0 0 1 0 0 1 1 -1 -1 0 0 0 0 0", [])
    with pytest.raises(RuntimeError, match="there are 1 operands and the description names 0"):
        flex(PLAIN, [torch.ones(4, 6)])
    with pytest.raises(RuntimeError, match="kv_num_blocks must be int32"):
        flex("0 0 0 0 1 0 1 1 -1 -1 0 0 0 0 0", [torch.ones(1, 1, 4), torch.ones(1, 1, 4, 6)])
    lists = [torch.ones(1, 1, 3, dtype=torch.int32), torch.ones(1, 1, 3, 6, dtype=torch.int32)]
    with pytest.raises(RuntimeError, match="the BlockMask must cover every query position"):
        flex("0 0 0 0 1 0 1 1 -1 -1 0 0 0 0 0", lists)
