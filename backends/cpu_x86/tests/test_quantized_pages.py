"""Quantised keys and values in pages: every stored number, scale, stride and hidden slot, on every instruction set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import DTYPES, INF, LIBRARY, forced, respread

import torchhal

Tensor = torch.Tensor
NAN = float("nan")
STORED = (torch.int8, torch.float8_e4m3fn)
BOUND = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def stored(shape: tuple[int, ...], kind: torch.dtype, generator: torch.Generator) -> Tensor:
    """Every number of the type but NaN, -128 and subnormal ones among them."""
    bits = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    if kind is torch.int8:
        return bits.view(torch.int8)
    return torch.where(bits & 0x7F == 0x7F, 0, bits).view(kind)


def scales(kind: str, pages: Tensor, generator: torch.Generator) -> Tensor:
    shape = pages.shape[1:2] if kind == "head" else pages.shape[:3]
    size = 100.0 if pages.dtype is torch.int8 else 200.0
    return (0.2 + torch.rand(shape, generator=generator)) * 2.0 / size


def dequantized(pages: Tensor, scale: Tensor) -> Tensor:
    """In float64, from tables of what each byte means, which share nothing with the kernels' arithmetic."""
    bits = pages.view(torch.uint8).long()
    if pages.dtype is torch.int8:
        table = [float(b if b < 128 else b - 256) for b in range(256)]
    else:
        table = [e4m3(b) for b in range(256)]
    wide = scale.double()
    return torch.tensor(table, dtype=torch.float64)[bits] * (
        wide[:, None, None] if wide.dim() == 1 else wide[..., None]
    )


def e4m3(byte: int) -> float:
    """By the definition of the format: 1 bit of sign, 4 of exponent with a bias of 7, 3 of fraction."""
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and fraction == 7:
        return NAN
    return sign * (fraction * 2.0**-9 if exponent == 0 else (8 + fraction) * 2.0 ** (exponent - 10))


def table_and_lengths(lengths: list[int], page: int, pages: int) -> tuple[Tensor, Tensor]:
    columns = max(1, -(-max(lengths) // page))
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(page))
    table = order[: len(lengths) * columns].view(len(lengths), columns).to(torch.int32)
    return table, torch.tensor(lengths, dtype=torch.int32)


def poison(lengths: list[int], table: Tensor, pages: Tensor, scale: Tensor) -> None:
    """NaN in every slot that no sequence uses, and in its scale."""
    page = pages.shape[2]
    used = torch.zeros(pages.shape[0], page, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for position in range(length):
            used[table[b, position // page], position % page] = True
    if pages.dtype is not torch.int8:
        pages.view(torch.uint8).masked_fill_(~used[:, None, :, None], 0x7F)
    if scale.dim() == 3:
        scale.masked_fill_(~used[:, None], NAN)


def call(
    query: Tensor, pages: tuple[Tensor, Tensor], given: Any, factors: Any, backend: str, **options: Any
) -> Any:
    return torchhal.paged_attention(
        query, *pages, *given, key_scale=factors[0], value_scale=factors[1], enable_gqa=True, return_lse=True,
        backend=backend, **options,
    )  # fmt: skip


def against_dequantized_pages(
    query: Tensor, pages: tuple[Tensor, Tensor], given: Any, factors: Any, **options: Any
) -> None:
    """Held against the specification in float64, for pages that were dequantised beforehand."""
    out, lse = call(query, pages, given, factors, "cpu_x86", **options)
    wide = tuple(dequantized(p, f) for p, f in zip(pages, factors, strict=True))
    exact, exact_lse = call(query.double(), wide, given, (None, None), "reference", **options)
    bound = BOUND[query.dtype]
    torch.testing.assert_close(out.double(), exact, rtol=bound, atol=bound, equal_nan=True)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5, equal_nan=True)


slopes = torch.tensor([0.5, 0.1, 0.01, 0.3])


def alibi(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return score + slopes[h] * (k - q)


def cut(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return torch.where((k + q) % 3 == 0, -INF, score)


def window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (k <= q) & (q - k < 37 + 9 * h)


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(STORED),
    scaled=st.tuples(*[st.sampled_from(["head", "token"])] * 2),
    page=st.sampled_from([1, 3, 16, 64, 200]),
    lengths=st.lists(st.integers(0, 350), min_size=1, max_size=3),
    rows=st.sampled_from([1, 2, 5, 9, 40]),
    kv_heads=st.sampled_from([1, 2, 4]),
    sizes=st.sampled_from([(16, 16), (7, 33), (40, 8), (128, 64), (1, 1)]),
    score_mod=st.sampled_from([None, alibi, cut]),
    mask_mod=st.sampled_from([None, window]),
    causal=st.booleans(),
    how=st.sampled_from(["", "swapped", "every_second", "columns"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(LIBRARY.instruction_sets()),
)
def test_quantised_pages_are_those_of_the_specification_whatever_unused_slots_and_scales_hold(
    kind: torch.dtype, scaled: tuple[str, str], page: int, lengths: list[int], rows: int, kv_heads: int,
    sizes: tuple[int, int], score_mod: Any, mask_mod: Any, causal: bool, how: str, dtype: torch.dtype, isa: str,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(page + rows)
    count = len(lengths) * max(1, -(-max(lengths) // page)) + 2
    given = table_and_lengths(lengths, page, count)
    query = torch.randn(len(lengths), 4, rows, sizes[0], generator=generator).to(dtype)
    made = [stored((count, kv_heads, page, size), kind, generator) for size in sizes]
    factors = [scales(each, pages, generator) for each, pages in zip(scaled, made, strict=True)]
    for pages, scale in zip(made, factors, strict=True):
        poison(lengths, given[0], pages, scale)
    spread = tuple(spread_like(pages, how) for pages in made)
    factors = [f.transpose(-1, 0).contiguous().transpose(-1, 0) if how == "swapped" else f for f in factors]
    with forced(isa, dtype):
        against_dequantized_pages(
            query,
            (spread[0], spread[1]),
            given,
            factors,
            score_mod=score_mod,
            mask_mod=mask_mod,
            is_causal=causal,
        )


def spread_like(pages: Tensor, how: str) -> Tensor:
    if not how:
        return pages
    return respread(pages.view(torch.int8).to(torch.float32), how).to(torch.int8).view(pages.dtype)


@pytest.mark.parametrize("isa", LIBRARY.instruction_sets())
@pytest.mark.parametrize("kind", STORED, ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_each_of_the_256_bytes_is_read_as_its_format_defines_it(
    isa: str, kind: torch.dtype, rows: int
) -> None:
    """A single key has weight 1, so its value is the result; a size of 256 and then 7 at a time meets every lane."""
    every = torch.arange(256, dtype=torch.uint8)
    for size in (256, 7):
        padded = torch.nn.functional.pad(every, (0, -256 % size)).view(-1, size)
        value = padded[:, None, None].view(kind)
        pages = (torch.zeros(len(value), 1, 1, 4, dtype=torch.int8).view(kind), value.contiguous())
        query = torch.zeros(len(value), 1, rows, 4)
        given = (
            torch.arange(len(value), dtype=torch.int32)[:, None],
            torch.ones(len(value), dtype=torch.int32),
        )
        with forced(isa, torch.float32):
            out, _ = call(query, pages, given, [torch.ones(1)] * 2, "cpu_x86")
        expected = dequantized(value, torch.ones(1)).expand(-1, -1, rows, -1).float()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", STORED, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("scale", [NAN, INF, -0.01, 0.0, 1e-39])
def test_odd_scales_of_seen_keys_count_and_those_of_hidden_keys_do_not(
    kind: torch.dtype, rows: int, scale: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    pages = tuple(stored((8, 2, 16, 24), kind, generator) for _ in range(2))
    factors = [scales("token", each, generator) for each in pages]
    given = (torch.arange(8, dtype=torch.int32)[None], torch.tensor([128], dtype=torch.int32))
    query = torch.randn(1, 4, rows, 24, generator=generator)
    hides = {"mask_mod": lambda b, h, q, k: k != 37}
    before = call(query, pages, given, factors, "cpu_x86", **hides)
    for each in factors:
        each[2, :, 5] = scale
    after = call(query, pages, given, factors, "cpu_x86", **hides)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
    factors[0] = scales("token", pages[0], generator)
    seen, _ = call(query, pages, given, factors, "cpu_x86")
    true, _ = call(query, pages, given, factors, "reference")
    torch.testing.assert_close(seen, true, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_stored_nan_behind_the_causal_limit_is_not_seen() -> None:
    generator = torch.Generator().manual_seed(2)
    for rows in (2, 40):
        pages = tuple(stored((4, 2, 16, 24), torch.float8_e4m3fn, generator) for _ in range(2))
        factors = [scales("token", each, generator) for each in pages]
        given = (torch.arange(4, dtype=torch.int32)[None], torch.tensor([64], dtype=torch.int32))
        query = torch.randn(1, 4, rows, 24, generator=generator)
        before, _ = call(query, pages, given, factors, "cpu_x86", is_causal=True)
        for each in pages:
            each.view(torch.uint8)[3, :, 15] = 0x7F
        after, _ = call(query, pages, given, factors, "cpu_x86", is_causal=True)
        assert torch.equal(before[:, :, :-1], after[:, :, :-1]) and after[:, :, -1].isnan().all()


QUANTIZED = "2 0 0 0 0 0 1 1 -1 -1 0 1 0 0 0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": torch.zeros(3, 2, 4, 8)}, "must both be int8 or both float8_e4m3fn"),
        ({"value": torch.zeros(3, 2, 4, 8).to(torch.float8_e4m3fn)}, "must both be int8 or both float8"),
        ({"key_scale": torch.ones(3)}, r"key_scale \(3\) must be \(Hkv,\) or \(P, Hkv, page_size\) of key \(3, 2, 4, 8\)"),
        ({"value_scale": torch.ones(3, 4, 2)}, r"value_scale \(3, 4, 2\) must be"),
        ({"value_scale": torch.ones(3, 2)}, r"value_scale \(3, 2\) must be"),
        ({"key_scale": torch.ones(2).double()}, "key_scale must be float32"),
        ({"text": QUANTIZED.replace("2 0", "0 0", 1)}, "not one that torchhal_cpu_x86.flex has written"),
    ],
)  # fmt: skip
def test_quantised_operands_that_do_not_fit_are_refused(changes: Any, message: str) -> None:
    pages = {name: torch.zeros(3, 2, 4, 8, dtype=torch.int8) for name in ("key", "value")}
    given: dict[str, Any] = {
        **pages, "key_scale": torch.ones(2), "value_scale": torch.ones(3, 2, 4), "text": QUANTIZED, **changes,
    }  # fmt: skip
    lists = [torch.zeros(1, 2, dtype=torch.int32), torch.tensor([5], dtype=torch.int32)]
    operands = [*lists, given["key_scale"], given["value_scale"]]
    query = torch.zeros(1, 2, 1, 8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.torchhal_cpu_x86.flex_attention(
            query, given["key"], given["value"], operands, given["text"], 1.0
        )
