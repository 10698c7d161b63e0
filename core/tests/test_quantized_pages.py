"""Attention over quantised pages: what the stored numbers mean, who is asked, and what is refused in which words."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from attention_calls import NAN
from fake_backends import EVERYTHING, Install, backend, constant_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchhal
from torchhal.errors import InvalidProblem, Unsupported
from torchhal.problems import AttentionProblem, Problem

INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
PAGE, PAGES = 3, 9
BOUND = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
LENGTHS = (7, 0, 12)
TABLE = torch.tensor([[8, 2, 5, -1], [-1, -1, -1, -1], [1, 7, 0, 4]], dtype=torch.int32)


def stored(kind: torch.dtype, heads: int, size: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(PAGES, heads, PAGE, size, generator=generator) * 40
    return drawn.round().clamp(-128, 127).to(kind) if kind is INT8 else drawn.to(kind)


def scales(how: str, heads: int, generator: torch.Generator) -> Tensor:
    shape = (heads,) if how == "head" else (PAGES, heads, PAGE)
    return (0.2 + torch.rand(shape, generator=generator)) / 40


def spoil_unused(pages: Tensor, scale: Tensor) -> None:
    used = torch.zeros(PAGES, PAGE, dtype=torch.bool)
    for b, length in enumerate(LENGTHS):
        for i in range(length):
            used[TABLE[b, i // PAGE], i % PAGE] = True
    if scale.dim() == 3:
        scale.masked_fill_(~used[:, None], NAN)
    for page, slot in (~used).nonzero().tolist():
        pages[page, :, slot] = 127 if pages.dtype is INT8 else NAN


def rows(pages: Tensor, scale: Tensor, b: int) -> Tensor:
    """(1, Hkv, S, E) float64: the tokens of a sequence, one at a time."""
    found = []
    for i in range(LENGTHS[b]):
        page, slot = int(TABLE[b, i // PAGE]), i % PAGE
        factor = scale if scale.dim() == 1 else scale[page, :, slot]
        found.append(pages[page, :, slot].double() * factor.double()[:, None])
    empty = torch.zeros(pages.shape[1], 0, pages.shape[3], dtype=torch.float64)
    return (torch.stack(found, 1) if found else empty)[None]


def soft_cap(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score * 0.5 + (k - q) * 0.125


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from([INT8, FLOAT8]),
    how=st.tuples(*[st.sampled_from(["head", "token"])] * 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    count=st.sampled_from([1, 3]),
    heads=st.sampled_from([1, 2]),
    causal=st.booleans(),
    mod=st.sampled_from([None, soft_cap]),
    seed=st.integers(0, 1000),
)
def test_the_reference_computes_with_stored_numbers_times_their_scales(
    kind: torch.dtype, how: tuple[str, str], dtype: torch.dtype, count: int, heads: int, causal: bool, mod: Any, seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(3, 2, count, 8, generator=generator).to(dtype)
    pages = [stored(kind, heads, size, generator) for size in (8, 5)]
    factors = [scales(each, heads, generator) for each in how]
    for tensor, scale in zip(pages, factors, strict=True):
        spoil_unused(tensor, scale)
    out, lse = torchhal.paged_attention(
        query, *pages, TABLE, torch.tensor(LENGTHS, dtype=torch.int32), key_scale=factors[0], value_scale=factors[1],
        score_mod=mod, is_causal=causal, enable_gqa=True, return_lse=True, backend="reference",
    )  # fmt: skip
    for b, length in enumerate(LENGTHS):
        key, value = (rows(tensor, scale, b) for tensor, scale in zip(pages, factors, strict=True))
        options: dict[str, Any] = {
            "scale": 8**-0.5,
            "is_causal": causal,
            "score_mod": mod,
            "first_query": length - count,
        }
        exact, exact_lse = oracle.attention(query[b : b + 1], key, value, **options)
        bound = BOUND[dtype]
        torch.testing.assert_close(out[b : b + 1].double(), torch.as_tensor(exact), rtol=bound, atol=bound)
        wide = torch.as_tensor(exact_lse)
        torch.testing.assert_close(
            lse[b : b + 1].double(), wide, rtol=BOUND[lse.dtype], atol=BOUND[lse.dtype]
        )


@pytest.mark.parametrize("kind", [INT8, FLOAT8])
def test_an_element_is_a_float32_product_and_a_float64_one_for_a_float64_query(kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pages = stored(kind, 1, 64, generator)
    scale = torch.rand(1, generator=generator)
    lengths, table = torch.ones(1, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    for dtype in (torch.float32, torch.float64):
        out = torchhal.paged_attention(
            torch.ones(1, 1, 1, 64, dtype=dtype), pages, pages, table, lengths, key_scale=scale, value_scale=scale,
            backend="reference",
        )  # fmt: skip
        assert isinstance(out, Tensor)
        assert torch.equal(out[0, 0, 0], pages[0, 0, 0].to(dtype) * scale.to(dtype))


# ---------------------------------------------------------------------------- who is asked


def given_call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "query": torch.ones(1, 2, 1, 8),
        "key_pages": torch.ones(4, 2, 3, 8, dtype=INT8),
        "value_pages": torch.ones(4, 2, 3, 5, dtype=INT8),
        "page_table": torch.tensor([[2, 3]], dtype=torch.int32),
        "seq_lens": torch.tensor([5], dtype=torch.int32),
        "key_scale": torch.ones(2),
        "value_scale": torch.ones(4, 2, 3),
    }
    return torchhal.paged_attention(**{**arguments, **changes})


def test_a_backend_is_asked_only_if_it_claims_the_feature_and_the_stored_type(install: Install) -> None:
    asked: list[AttentionProblem] = []

    def answer(problem: AttentionProblem) -> Any:
        asked.append(problem)
        return constant_plan(1.0)

    both = dataclasses.replace(EVERYTHING, dtypes=EVERYTHING.dtypes | {INT8})
    claims = {
        "no_feature": (dataclasses.replace(both, quantized_kv=False), "does not claim quantized_kv"),
        "no_type": (EVERYTHING, "does not claim torch.int8"),
    }
    for name, (claimed, reason) in claims.items():
        install(name, backend(name, answer, claims=claimed))
        with pytest.raises(Unsupported, match=reason):
            given_call(backend=name)
    assert not asked
    install("able", backend("able", answer, claims=both))
    assert (given_call(backend="able") == 1.0).all()
    (problem,) = asked
    assert (problem.key_scale, problem.value_scale, problem.key_dtype) == ("head", "token", INT8)
    assert problem.features == {"quantized_kv", "value_head_size"}
    assert Problem.from_text(problem.text) == problem
    assert "key_dtype=int8" in problem.summary() and "value_scale=token" in problem.summary()


def test_a_gradient_reaches_the_query_as_over_dequantised_pages() -> None:
    pages = torch.randint(-9, 9, (4, 2, 3, 8), dtype=INT8)
    scale = torch.rand(4, 2, 3)
    found = []
    for made, factors in ((pages, (scale, scale)), (pages.float() * scale[..., None], (None, None))):
        query = torch.linspace(-1, 1, 16).reshape(1, 2, 1, 8).requires_grad_()
        out = given_call(
            query=query, key_pages=made, value_pages=made, key_scale=factors[0], value_scale=factors[1]
        )
        out.square().sum().backward()
        found.append(query.grad)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


# ---------------------------------------------------------------------------- under a compiler


class Model(torch.nn.Module):
    def forward(
        self,
        query: Tensor,
        pages: Tensor,
        table: Tensor,
        lengths: Tensor,
        key_scale: Tensor,
        value_scale: Tensor,
    ) -> Any:
        return torchhal.paged_attention(
            query, pages, pages, table, lengths, key_scale=key_scale, value_scale=value_scale, is_causal=True,
            return_lse=True, score_mod=lambda s, b, h, q, k: s + (q - k) * 0.5,
        )  # fmt: skip


def model_inputs(kind: torch.dtype, pages: int = PAGES) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([5], dtype=torch.int32)
    made = torch.randn(pages, 2, PAGE, 8, generator=generator).mul(20).to(kind)
    scale = torch.rand(pages, 2, PAGE, generator=generator) / 20
    return (
        torch.randn(1, 2, 2, 8, generator=generator),
        made,
        torch.tensor([[2, 0]], dtype=torch.int32),
        lengths,
        torch.full((2,), 0.02),
        scale,
    )


@pytest.mark.parametrize("kind", [INT8, FLOAT8])
def test_a_call_compiles_as_one_graph_for_any_number_of_pages(kind: torch.dtype) -> None:
    torch._dynamo.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(Model(), fullgraph=True, dynamic=True, backend=count)
    for pages in (PAGES, 6, 11):
        inputs = model_inputs(kind, pages)
        for found, wanted in zip(compiled(*inputs), Model()(*inputs), strict=True):
            torch.testing.assert_close(found, wanted)
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", [INT8, FLOAT8])
def test_a_call_is_exported_with_its_scales(kind: torch.dtype) -> None:
    inputs = model_inputs(kind)
    exported = torch.export.export(Model(), inputs)
    for found, wanted in zip(exported.module()(*inputs), Model()(*inputs), strict=True):
        torch.testing.assert_close(found, wanted)


# ---------------------------------------------------------------------------- what is refused


FLOATS = torch.ones(4, 2, 3, 8)
GRAD = torch.ones(2, requires_grad=True)
MISUSES: list[tuple[dict[str, Any], str]] = [
    ({"key_scale": None}, r"key_pages is torch.int8 and has no scale; pass key_scale, float32 of shape \(2,\), one for each "
     r"head, or \(4, 2, 3\), one for each token and head$"),
    ({"value_scale": None}, "value_pages is torch.int8 and has no scale; pass value_scale"),
    ({"key_pages": FLOATS}, "key_scale is given and key_pages is torch.float32; leave it out, or quantise the pages to "
     "torch.int8 or torch.float8_e4m3fn$"),
    ({"key_scale": 0.5}, r"key_scale expects a float32 tensor of shape \(2,\), .* and got float"),
    ({"key_scale": torch.ones(3)}, r"key_scale expects float32 of shape \(2,\), .*, and is torch.float32 \(3,\)"),
    ({"key_scale": torch.ones(4, 3, 2)}, r"key_scale expects .* \(4, 2, 3\), .*, and is torch.float32 \(4, 3, 2\)"),
    ({"value_scale": torch.ones(4, 2, 3, 1)}, r"value_scale expects .*, and is torch.float32 \(4, 2, 3, 1\)"),
    ({"value_scale": torch.ones(2).bfloat16()}, r"value_scale expects float32 .*, and is torch.bfloat16 \(2,\)"),
    ({"value_scale": torch.ones(2).to_sparse()}, "value_scale expects a dense tensor and has the layout torch.sparse_coo"),
    ({"value_scale": torch.ones(2).to("meta")}, "value_pages is on cpu and value_scale on meta; move them to one device"),
    ({"key_scale": GRAD}, r"key_scale requires grad and no gradient reaches quantised pages; pass key_scale.detach\(\)"),
    ({"key_pages": FLOATS, "key_scale": None}, "key_pages is torch.float32 and value_pages torch.int8; quantise both, to one "
     "type, or neither"),
    ({"key_pages": FLOATS.to(FLOAT8)}, "key_pages is torch.float8_e4m3fn and value_pages torch.int8; quantise both"),
    ({"key_pages": torch.ones(4, 2, 3, 8, dtype=torch.uint8)}, "key expects a floating type .* and has torch.uint8"),
    ({"query": torch.ones(1, 2, 1, 8, dtype=INT8)}, "query expects a floating type .* and has torch.int8"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISUSES)
def test_each_misuse_of_scales_is_told_what_was_expected_and_what_arrived(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidProblem, match=message):
        given_call(**changes)


def test_scales_that_require_grad_are_taken_where_grad_is_off() -> None:
    with torch.no_grad():
        assert not given_call(key_scale=GRAD).requires_grad


@pytest.mark.parametrize(
    "call",
    [
        lambda q, k: torchhal.attention(q, k, k),
        lambda q, k: torchhal.varlen_attention(
            q[0], k[0], k[0], *[torch.tensor([0, 2], dtype=torch.int32)] * 2
        ),
    ],
)
def test_quantised_keys_outside_pages_are_refused(call: Callable[[Tensor, Tensor], Any]) -> None:
    query = torch.ones(1, 2, 2, 8)
    with pytest.raises(InvalidProblem, match="key expects a floating type .* and has torch.int8"):
        call(query, query.to(INT8))
